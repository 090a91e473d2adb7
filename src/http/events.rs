//! `POST /events`: events of other programs, all of a request or nothing of it. `intake::request` says how.

use std::io;
use std::time::{Duration, Instant};

use axum::Extension;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::State;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;

use super::dead_letters::unavailable;
use super::listings::streamed;
use super::{Api, Pace, answer, error};
use crate::event::Origin;
use crate::intake::request::{
    AcceptedRequest, Destination, EventRequest, IdempotencyKey, Layout, RequestError, SpooledIds,
};

/// What one body may take of memory without asking.
const FREE_BODY_BYTES: usize = 64 << 10;

/// What is still read of a body whose answer is already known, so that the caller gets to read that answer.
const LEFTOVER_BYTES_MAX: usize = 16 << 20;
const LEFTOVER_TIME_MAX: Duration = Duration::from_secs(2);

/// Bytes of identities that are written at once.
const IDS_BYTES: usize = 16 << 10;

pub async fn events(
    State(api): State<Api>,
    Extension(pace): Extension<Pace>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let key = match headers.get("idempotency-key").map(|key| key.to_str().ok().and_then(IdempotencyKey::new)) {
        Some(None) => {
            return error(StatusCode::BAD_REQUEST, "Idempotency-Key: expected 1 to 255 visible ASCII characters");
        }
        Some(Some(key)) => Some(key),
        None => None,
    };
    let bytes_max = api.intake.queue().max_pending_bytes();
    if body.size_hint().lower() > bytes_max {
        let problem = format!("a request has at most {bytes_max} bytes (queue.max_pending_bytes)");
        return error(StatusCode::PAYLOAD_TOO_LARGE, problem);
    }
    let mut request = EventRequest::new(
        Destination::Queue(api.intake.clone()),
        api.spool.clone(),
        Origin::Http,
        key,
        layout(&headers),
    );
    let mut incoming = Incoming::new(body, pace);
    let mut room = BodyRoom::new(&api);
    loop {
        match incoming.next().await {
            Ok(Some(bytes)) => {
                if let Err(refusal) = api.work(|| request.feed(&bytes)).await {
                    incoming.read_leftovers().await;
                    return refused(refusal);
                }
                if incoming.bytes > bytes_max {
                    incoming.read_leftovers().await;
                    let problem = format!("a request has at most {bytes_max} bytes (queue.max_pending_bytes)");
                    return error(StatusCode::PAYLOAD_TOO_LARGE, problem);
                }
                if !room.hold(request.memory_bytes()) {
                    return busy();
                }
            }
            Ok(None) => break,
            Err(answer) => return answer,
        }
    }
    match api.work(|| request.finish()).await {
        Ok(AcceptedRequest::Batch(ids)) => {
            let ids: Vec<String> = ids.iter().map(|id| id.to_string()).collect();
            answer(StatusCode::ACCEPTED, &json!({"accepted": ids.len(), "event_ids": ids}))
        }
        Ok(AcceptedRequest::Spooled { count, ids }) => spooled(count, ids),
        Err(refusal) => refused(refusal),
    }
}

fn layout(headers: &HeaderMap) -> Layout {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let content_type = content_type.to_ascii_lowercase();
    let is_lines = ["ndjson", "jsonl", "json-lines", "jsonlines"].iter().any(|name| content_type.contains(name));
    if is_lines { Layout::Lines } else { Layout::Either }
}

/// The answer to a request of any length, in the memory of a few lines.
fn spooled(count: u64, ids: SpooledIds) -> Response {
    let stream = streamed(move |write| {
        let mut piece = format!("{{\"accepted\":{count},\"event_ids\":[").into_bytes();
        for (index, id) in ids.enumerate() {
            // The file was written a moment ago; if it can't be read the answer is cut short, and so no JSON.
            let id = id.map_err(io::Error::other)?;
            piece.extend_from_slice(if index == 0 { b"\"" } else { b",\"" });
            piece.extend_from_slice(id.to_string().as_bytes());
            piece.push(b'"');
            if piece.len() >= IDS_BYTES {
                write(std::mem::take(&mut piece))?;
            }
        }
        piece.extend_from_slice(b"]}");
        write(piece)
    });
    (StatusCode::ACCEPTED, [(CONTENT_TYPE, "application/json")], stream).into_response()
}

fn refused(refusal: RequestError) -> Response {
    match &refusal {
        RequestError::Invalid { line, field, problem } => {
            let mut fault = json!({"error": problem});
            if let (Value::Object(fault), Some(line)) = (&mut fault, line) {
                fault.insert("line".to_owned(), (*line).into());
            }
            if let (Value::Object(fault), Some(field)) = (&mut fault, field) {
                fault.insert("field".to_owned(), field.as_str().into());
            }
            answer(StatusCode::BAD_REQUEST, &fault)
        }
        RequestError::KeyReused => error(StatusCode::CONFLICT, &refusal),
        RequestError::TooLarge { .. } => error(StatusCode::PAYLOAD_TOO_LARGE, &refusal),
        RequestError::Queue(problem) => unavailable(problem),
        RequestError::Spool { .. } | RequestError::SpoolFull { .. } => {
            error(StatusCode::INTERNAL_SERVER_ERROR, &refusal)
        }
    }
}

pub fn busy() -> Response {
    let busy = error(StatusCode::SERVICE_UNAVAILABLE, "too many large requests at once; try again in a moment");
    ([(RETRY_AFTER, "1")], busy).into_response()
}

/// A body as it comes in, at least as fast as it must.
pub struct Incoming {
    body: Body,
    pace: Pace,
    begun: Instant,
    /// So many have come.
    pub bytes: u64,
}

impl Incoming {
    pub fn new(body: Body, pace: Pace) -> Incoming {
        Incoming { body, pace, begun: Instant::now(), bytes: 0 }
    }

    /// The next piece; `None` at the end. The error is the answer to who was too slow or broke off.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Response> {
        loop {
            let patience = match self.pace.bytes_per_second_min {
                0 => self.pace.idle,
                minimum => {
                    let allowed = self.pace.idle + Duration::from_secs(self.bytes / minimum);
                    allowed.saturating_sub(self.begun.elapsed()).min(self.pace.idle)
                }
            };
            match tokio::time::timeout(patience, self.body.frame()).await {
                Err(_) => return Err(error(StatusCode::REQUEST_TIMEOUT, "the body comes too slowly")),
                Ok(None) => return Ok(None),
                Ok(Some(Err(problem))) => {
                    return Err(error(StatusCode::BAD_REQUEST, format!("the body broke off: {problem}")));
                }
                Ok(Some(Ok(frame))) => {
                    // Trailers mean nothing here.
                    let Ok(bytes) = frame.into_data() else { continue };
                    self.bytes += bytes.len() as u64;
                    return Ok(Some(bytes));
                }
            }
        }
    }

    /// Reads on without a use for it: a connection that is closed with bytes unread loses the answer on its way.
    async fn read_leftovers(&mut self) {
        let reading = async {
            let mut left = LEFTOVER_BYTES_MAX;
            while let Ok(Some(bytes)) = self.next().await {
                let Some(rest) = left.checked_sub(bytes.len()) else { return };
                left = rest;
            }
        };
        let _ = tokio::time::timeout(LEFTOVER_TIME_MAX, reading).await;
    }
}

/// One body's share of the memory for all of them.
pub struct BodyRoom<'a> {
    api: &'a Api,
    held: Option<OwnedSemaphorePermit>,
}

impl<'a> BodyRoom<'a> {
    pub fn new(api: &'a Api) -> BodyRoom<'a> {
        BodyRoom { api, held: None }
    }

    /// Makes its share so many bytes; false where there is no room for them.
    pub fn hold(&mut self, bytes: usize) -> bool {
        let kilobytes = if bytes <= FREE_BODY_BYTES { 0 } else { bytes.div_ceil(1024) };
        let held = self.held.as_ref().map_or(0, |held| held.num_permits());
        let Some(wanted) = kilobytes.checked_sub(held).filter(|wanted| *wanted > 0) else { return true };
        let Ok(wanted) = u32::try_from(wanted) else { return false };
        match (self.api.body_room.clone().try_acquire_many_owned(wanted), &mut self.held) {
            (Ok(more), Some(held)) => held.merge(more),
            (Ok(more), none) => *none = Some(more),
            (Err(_), _) => return false,
        }
        true
    }
}
