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
use xxhash_rust::xxh3::{xxh3_64, xxh3_128_with_seed};

use super::dead_letters::unavailable;
use super::events::{BodyRoom, Incoming, busy};
use super::{Api, Pace, error};
use crate::claude::hook::{self, Arrival};
use crate::event::{EventId, Timestamp};
use crate::intake::Intake;
use crate::intake::request::{IdempotencyKey, RequestError};
use crate::intake::spool::Frame;

/// Room for what a hook says besides the event that is made of it.
const OVERHEAD_BYTES: u64 = 14 << 20;

/// Bytes that a hook's input has at most.
pub fn input_bytes_max(intake: &Intake) -> u64 {
    intake.checker().event_bytes_max() + OVERHEAD_BYTES
}

pub async fn hook(
    State(api): State<Api>,
    Extension(pace): Extension<Pace>,
    Path(kind): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let received_at = Timestamp::now();
    let key = headers.get("idempotency-key").and_then(|key| key.to_str().ok()).and_then(IdempotencyKey::new);
    let (input, _room) = match read(&api, body, pace).await {
        Ok(read) => read,
        Err(answer) => return answer,
    };
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
            api.spool.ring();
            Ok(())
        }
        // As long as the queue takes events, they need no spool.
        Err(source) => api.intake.take_record(record).map_err(|_| {
            let spool = api.spool.folder().display().to_string();
            RequestError::Spool { spool, source }
        }),
    }
}

/// `POST /spool`: there is something in the spool; or, with a body, a record that could not be written there.
pub async fn spool(State(api): State<Api>, Extension(pace): Extension<Pace>, body: Body) -> Response {
    let (bytes, _room) = match read(&api, body, pace).await {
        Ok(read) => read,
        Err(answer) => return answer,
    };
    if bytes.is_empty() {
        api.spool.ring();
        return StatusCode::NO_CONTENT.into_response();
    }
    let taken = api.work(|| {
        let frame = Frame::new(bytes);
        let _reservation = api.intake.checker().values().reserve(frame.byte_length());
        frame.record().map(|record| api.intake.take_record(record))
    });
    match taken.await {
        Ok(Ok(())) => StatusCode::NO_CONTENT.into_response(),
        Ok(Err(problem)) => unavailable(&problem),
        Err(problem) => error(StatusCode::BAD_REQUEST, problem),
    }
}

/// The whole body, and its share of the memory for bodies.
async fn read(api: &Api, body: Body, pace: Pace) -> Result<(Vec<u8>, BodyRoom<'_>), Response> {
    let bytes_max = input_bytes_max(&api.intake);
    let mut incoming = Incoming::new(body, pace);
    let mut room = BodyRoom::new(api);
    let mut input = Vec::new();
    while let Some(bytes) = incoming.next().await? {
        if incoming.bytes > bytes_max {
            return Err(error(StatusCode::PAYLOAD_TOO_LARGE, format!("a hook's input has at most {bytes_max} bytes")));
        }
        input.extend_from_slice(&bytes);
        if !room.hold(input.capacity()) {
            return Err(busy());
        }
    }
    Ok((input, room))
}
