//! The body of a request: read whole, within the memory for all bodies. How long it may take is the whole request's limit.

use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use tokio::sync::OwnedSemaphorePermit;

use super::{Api, error};

/// What one body may take of memory without asking.
const FREE_BYTES: usize = 64 << 10;

/// What is still read of a body that is too large, so that the caller gets to read the answer: a connection that is closed
/// with bytes unread loses it.
const LEFTOVER_BYTES_MAX: u64 = 16 << 20;
const LEFTOVER_TIME_MAX: Duration = Duration::from_secs(2);

/// A whole body and its share of the memory for bodies.
pub(super) struct WholeBody {
    pub(super) bytes: Vec<u8>,
    room: Option<OwnedSemaphorePermit>,
}

/// Reads a body of at most `bytes_max`. The error is the answer.
pub(super) async fn read(api: &Api, mut body: Body, bytes_max: u64) -> Result<WholeBody, Response> {
    let announced = body.size_hint().lower();
    let mut fits = announced <= bytes_max;
    // Memory is taken when it is written to.
    let capacity = if fits { announced as usize } else { 0 };
    let mut whole = WholeBody { bytes: Vec::with_capacity(capacity), room: None };
    while fits {
        let Some(frame) = body.frame().await else { return Ok(whole) };
        let broke_off = |problem| error(StatusCode::BAD_REQUEST, format!("the body broke off: {problem}"));
        // Trailers mean nothing here.
        let Ok(piece) = frame.map_err(broke_off)?.into_data() else { continue };
        whole.bytes.extend_from_slice(&piece);
        fits = whole.bytes.len() as u64 <= bytes_max;
        if !whole.has_room(api) {
            let busy = error(StatusCode::SERVICE_UNAVAILABLE, "too many large requests at once; try again in a moment");
            return Err(([(RETRY_AFTER, "1")], busy).into_response());
        }
    }
    let leftovers = async {
        let mut bytes = 0;
        while bytes < LEFTOVER_BYTES_MAX
            && let Some(Ok(frame)) = body.frame().await
        {
            bytes += frame.data_ref().map_or(0, |piece| piece.len() as u64);
        }
    };
    let _ = tokio::time::timeout(LEFTOVER_TIME_MAX, leftovers).await;
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
