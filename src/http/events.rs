//! `POST /events`: events of other programs, all of a request or nothing of it. `intake::request` says how.

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde::Serialize;
use serde_json::json;

use super::dead_letters::unavailable;
use super::{Api, answer, body, error};
use crate::intake::request::{EventError, IdempotencyKey, REQUEST_BYTES_MAX, RequestError};

pub(super) async fn events(State(api): State<Api>, headers: HeaderMap, body: Body) -> Response {
    let key = match headers.get("idempotency-key").map(|key| key.to_str().ok().and_then(IdempotencyKey::new)) {
        Some(None) => {
            return error(StatusCode::BAD_REQUEST, "Idempotency-Key: expected 1 to 255 visible ASCII characters");
        }
        Some(Some(key)) => Some(key),
        None => None,
    };
    // More than the whole queue takes will never fit.
    let bytes_max = REQUEST_BYTES_MAX.min(api.intake.queue().max_pending_bytes());
    let body = match body::read(&api, body, bytes_max).await {
        Ok(body) => body,
        Err(answer) => return answer,
    };
    match api.work(|| api.intake.accept(&body.bytes, key.as_ref())).await {
        Ok(ids) => {
            let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
            answer(StatusCode::ACCEPTED, &json!({"accepted": ids.len(), "event_ids": ids}))
        }
        Err(refusal) => refused(refusal),
    }
}

fn refused(refusal: RequestError) -> Response {
    /// The answer to an event that is not valid.
    #[derive(Serialize)]
    struct Fault {
        error: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        line: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        field: Option<String>,
    }
    match refusal {
        RequestError::Event(EventError { line, field, problem, is_too_large: false, .. }) => {
            answer(StatusCode::BAD_REQUEST, &Fault { error: problem, line, field })
        }
        RequestError::Empty => error(StatusCode::BAD_REQUEST, refusal),
        RequestError::Event(_) | RequestError::TooManyEvents => error(StatusCode::PAYLOAD_TOO_LARGE, refusal),
        RequestError::KeyReused => error(StatusCode::CONFLICT, refusal),
        RequestError::Queue(problem) => unavailable(&problem),
        RequestError::Spool(_) => error(StatusCode::INTERNAL_SERVER_ERROR, refusal),
    }
}
