//! `POST /hook/{kind}`: what a hook says, as Claude Code's own `http` hooks and Claude Headspace's script send it.
//!
//! The answer has an empty body, always: Claude Code takes any text for a message. It goes by the spool like every
//! hook, so it is durable before the answer, also while the queue is full.

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use tracing::warn;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128_with_seed};

use super::dead_letters::unavailable;
use super::{Api, body, error};
use crate::claude::hook::{self, Arrival};
use crate::event::{EventId, Timestamp};
use crate::intake::request::{IdempotencyKey, RequestError};
use crate::intake::{Intake, record};

/// Room for what a hook says besides the event that is made of it.
const OVERHEAD_BYTES: u64 = 14 << 20;

/// Bytes that a hook's input has at most.
pub(super) fn input_bytes_max(intake: &Intake) -> u64 {
    intake.checker().event_bytes_max() + OVERHEAD_BYTES
}

pub(super) async fn hook(State(api): State<Api>, Path(kind): Path<String>, headers: HeaderMap, body: Body) -> Response {
    let received_at = Timestamp::now();
    let key = headers.get("idempotency-key").and_then(|key| key.to_str().ok()).and_then(IdempotencyKey::new);
    let mut body = match body::read(&api, body, input_bytes_max(&api.intake)).await {
        Ok(body) => body,
        Err(answer) => return answer,
    };
    let input = std::mem::take(&mut body.bytes);
    let arrival = Arrival {
        id: key.as_ref().map_or_else(EventId::new, |key| key.event_id(0)),
        received_at,
        hook_type: Some(hook::hook_type_of_path(&kind)),
        working_directory: None,
        project_path: None,
    };
    let accepted = api
        .work(|| match &key {
            Some(key) => {
                let request = xxh3_128_with_seed(&input, xxh3_64(kind.as_bytes()));
                api.intake.keys().once(key, request, || keep(&api, input, arrival))
            }
            None => keep(&api, input, arrival),
        })
        .await;
    match accepted {
        Ok(()) => StatusCode::OK.into_response(),
        Err(RequestError::KeyReused) => StatusCode::CONFLICT.into_response(),
        Err(problem) => {
            warn!(error = %problem, "a hook could not be stored");
            StatusCode::SERVICE_UNAVAILABLE.into_response()
        }
    }
}

fn keep(api: &Api, input: Vec<u8>, arrival: Arrival) -> Result<(), RequestError> {
    let checker = api.intake.checker();
    let _reservation = checker.values().reserve(input.len());
    let record = hook::record(&input, arrival, api.capture, checker.event_bytes_max());
    drop(input);
    let record = api.intake.redacted(record);
    match api.spool.leave(&record) {
        Ok(()) => {
            api.spool.notify();
            Ok(())
        }
        // As long as the queue takes events, they need no spool.
        Err(problem) => Ok(api.intake.take_record(record).map_err(|_| problem)?),
    }
}

/// `POST /spool`: there is something in the spool; or, with a body, a record that could not be written there.
pub(super) async fn spool(State(api): State<Api>, body: Body) -> Response {
    let body = match body::read(&api, body, input_bytes_max(&api.intake)).await {
        Ok(body) => body,
        Err(answer) => return answer,
    };
    if body.bytes.is_empty() {
        api.spool.notify();
        return StatusCode::NO_CONTENT.into_response();
    }
    let taken = api.work(|| {
        let _reservation = api.intake.checker().values().reserve(body.bytes.len());
        record::decode(&body.bytes).map(|record| api.intake.take_record(record))
    });
    match taken.await {
        Ok(Ok(())) => StatusCode::NO_CONTENT.into_response(),
        Ok(Err(problem)) => unavailable(&problem),
        Err(problem) => error(StatusCode::BAD_REQUEST, problem),
    }
}
