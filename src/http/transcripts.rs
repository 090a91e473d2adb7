//! `GET /cursors`: how far each transcript has been read. `POST /transcripts`, on the socket only: turns that `verify`
//! found on disk and nowhere else, to be taken in again; durable before the answer.

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::dead_letters::unavailable;
use super::{Api, MayBeCommand, Pace, answer, body, error};
use crate::intake::resend::{EVENTS_MAX, Resent};
use crate::intake::sessions;
use crate::json::check_size;
use crate::listing::CursorLine;

/// Room for what a request holds besides its largest event; JSON escapes can take six bytes for one.
const BYTES_MAX: u64 = 128 << 20;

pub async fn cursors(State(api): State<Api>) -> Response {
    let cursors = match api.work(|| api.intake.queue().cursors()).await {
        Ok(cursors) => cursors,
        Err(problem) => return unavailable(&problem),
    };
    let mut lines = Vec::new();
    for (path, cursor) in cursors.iter().filter(|(path, _)| sessions::closing_of(path).is_none()) {
        if serde_json::to_writer(&mut lines, &CursorLine::of(path, cursor)).is_ok() {
            lines.push(b'\n');
        }
    }
    ([(CONTENT_TYPE, "application/x-ndjson"), (CACHE_CONTROL, "no-store")], lines).into_response()
}

pub async fn resend(
    State(api): State<Api>,
    Extension(pace): Extension<Pace>,
    Extension(MayBeCommand(may_be_command)): Extension<MayBeCommand>,
    body: Body,
) -> Response {
    if !may_be_command {
        return error(StatusCode::NOT_FOUND, "no such route");
    }
    let body = match body::read(&api, body, pace, BYTES_MAX).await {
        Ok(body) => body,
        Err(answer) => return answer,
    };
    let mut candidates = Vec::new();
    for line in body.bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        if let Err(unfit) = check_size(line) {
            return error(StatusCode::BAD_REQUEST, unfit);
        }
        match serde_json::from_slice::<Resent<'_>>(line) {
            Ok(resent) if candidates.len() < EVENTS_MAX => candidates.push(resent.into_candidate()),
            Ok(_) => return error(StatusCode::PAYLOAD_TOO_LARGE, format!("a request has at most {EVENTS_MAX} events")),
            Err(problem) => return error(StatusCode::BAD_REQUEST, format!("a line is not understood: {problem}")),
        }
    }
    let count = candidates.len();
    match api.work(|| api.intake.resend(candidates)).await {
        Ok(()) => answer(StatusCode::ACCEPTED, &json!({"accepted": count})),
        Err(problem) => unavailable(&problem),
    }
}
