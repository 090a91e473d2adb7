//! `POST /hook/{kind}`: what a hook says, as Claude Code's own `http` hooks and Claude Headspace's script send it.
//!
//! The answer has an empty body, always: Claude Code takes any text for a message. It goes by the spool like every
//! hook, so it is durable before the answer, also while the queue is full.

use axum::Extension;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use tracing::warn;

use super::events::{BodyRoom, Incoming, busy};
use super::{Api, Pace, error};
use crate::event::{EventId, Timestamp};
use crate::intake::hook::{self, Arrival};
use crate::intake::request::IdempotencyKey;

/// Room for what a hook says besides the event that is made of it.
const OVERHEAD_BYTES: u64 = 48 << 20;

pub async fn hook(
    State(api): State<Api>,
    Extension(pace): Extension<Pace>,
    Path(kind): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let received_at = Timestamp::now();
    let key = headers.get("idempotency-key").and_then(|key| key.to_str().ok()).and_then(IdempotencyKey::new);
    let bytes_max = api.intake.event_bytes_max() + OVERHEAD_BYTES;
    let mut incoming = Incoming::new(body, pace);
    let mut room = BodyRoom::new(&api);
    let mut input = Vec::new();
    loop {
        match incoming.next().await {
            Ok(Some(bytes)) => input.extend_from_slice(&bytes),
            Ok(None) => break,
            Err(answer) => return answer,
        }
        if incoming.bytes > bytes_max {
            return error(StatusCode::PAYLOAD_TOO_LARGE, format!("a hook's input has at most {bytes_max} bytes"));
        }
        if !room.hold(input.capacity()) {
            return busy();
        }
    }
    let arrival = Arrival {
        id: key.map_or_else(EventId::new, |key| key.event_id(0)),
        received_at,
        hook_type: Some(hook::hook_type_of_path(&kind)),
        working_directory: None,
        project_path: None,
    };
    let left = api
        .work(|| {
            let record = api.intake.redacted(hook::record(&input, arrival, api.capture));
            api.spool.leave(&record)
        })
        .await;
    match left {
        Ok(()) => {
            api.spool.ring();
            StatusCode::OK.into_response()
        }
        Err(problem) => {
            let spool = api.spool.folder().display().to_string();
            warn!(spool, error = %problem, "a hook could not be kept; free space or mend the folder's mode");
            StatusCode::SERVICE_UNAVAILABLE.into_response()
        }
    }
}
