//! The body of a request: read whole, at least as fast as it must come, within the memory for all bodies.

use std::time::{Duration, Instant};

use axum::body::{Body, Bytes, HttpBody};
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use tokio::sync::OwnedSemaphorePermit;

use super::{Api, error};

/// What one body may take of memory without asking.
const FREE_BYTES: usize = 64 << 10;

/// How long a body may stop, and the bytes per second at which it must come in the long run.
const IDLE_TIME_MAX: Duration = Duration::from_secs(10);
const BYTES_PER_SECOND_MIN: u64 = 16 << 10;

/// What is still read of a body whose answer is already known, so that the caller gets to read that answer.
const LEFTOVER_BYTES_MAX: u64 = 16 << 20;
const LEFTOVER_TIME_MAX: Duration = Duration::from_secs(2);

/// A whole body and its share of the memory for bodies.
pub(super) struct WholeBody {
    pub(super) bytes: Vec<u8>,
    room: Option<OwnedSemaphorePermit>,
}

/// Reads a body of at most `bytes_max`. The error is the answer.
pub(super) async fn read(api: &Api, body: Body, bytes_max: u64) -> Result<WholeBody, Response> {
    let announced = body.size_hint().lower();
    // Memory is taken when it is written to.
    let capacity = if announced <= bytes_max { announced as usize } else { 0 };
    let mut whole = WholeBody { bytes: Vec::with_capacity(capacity), room: None };
    let mut incoming = Incoming { body, begun: Instant::now(), bytes: 0 };
    let mut fits = announced <= bytes_max;
    while fits {
        let Some(piece) = incoming.next().await? else { return Ok(whole) };
        fits = incoming.bytes <= bytes_max;
        whole.bytes.extend_from_slice(&piece);
        if !whole.has_room(api) {
            let busy = error(StatusCode::SERVICE_UNAVAILABLE, "too many large requests at once; try again in a moment");
            return Err(([(RETRY_AFTER, "1")], busy).into_response());
        }
    }
    incoming.read_leftovers().await;
    Err(error(StatusCode::PAYLOAD_TOO_LARGE, format!("a request has at most {bytes_max} bytes")))
}

impl WholeBody {
    /// Takes a share of the memory for all of its bytes; false where there is none left.
    fn has_room(&mut self, api: &Api) -> bool {
        let bytes = self.bytes.len();
        let kilobytes = if bytes <= FREE_BYTES { 0 } else { bytes.div_ceil(1024) };
        let held = self.room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let Ok(wanted) = u32::try_from(kilobytes.saturating_sub(held)) else { return false };
        let Ok(more) = api.body_room.clone().try_acquire_many_owned(wanted) else { return false };
        match &mut self.room {
            Some(held) => held.merge(more),
            None => self.room = Some(more),
        }
        true
    }
}

/// A body as it comes in.
struct Incoming {
    body: Body,
    begun: Instant,
    /// So many have come.
    bytes: u64,
}

impl Incoming {
    /// The next piece; `None` at the end. The error is the answer to a caller that was too slow or broke off.
    async fn next(&mut self) -> Result<Option<Bytes>, Response> {
        loop {
            let allowed = IDLE_TIME_MAX + Duration::from_secs(self.bytes / BYTES_PER_SECOND_MIN);
            let patience = allowed.saturating_sub(self.begun.elapsed()).min(IDLE_TIME_MAX);
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
        let bytes_max = self.bytes + LEFTOVER_BYTES_MAX;
        let reading = async { while self.bytes < bytes_max && matches!(self.next().await, Ok(Some(_))) {} };
        let _ = tokio::time::timeout(LEFTOVER_TIME_MAX, reading).await;
    }
}
