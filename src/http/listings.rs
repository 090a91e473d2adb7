//! `GET /cursors`, how far each transcript has been read; `GET /queue` and `GET /dead-letters`, streamed page by page, so that
//! a million lines take the memory of a page.

use std::io;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use tokio::runtime::Handle;

use super::dead_letters::unavailable;
use super::{Api, error};
use crate::listing::{self, CursorLine, Filter, Listing};

/// Headers of an answer that is a line of JSON for each record.
const NDJSON: [(HeaderName, &str); 2] = [(CONTENT_TYPE, "application/x-ndjson"), (CACHE_CONTROL, "no-store")];

/// How long a reader may take for one page.
const READER_TIMEOUT: Duration = Duration::from_secs(30);

pub(super) async fn queue(State(api): State<Api>, Query(filter): Query<Filter>) -> Response {
    ndjson(api, Listing::Pending, filter)
}

pub(super) async fn dead_letters(State(api): State<Api>, Query(filter): Query<Filter>) -> Response {
    ndjson(api, Listing::DeadLetters, filter)
}

pub(super) async fn cursors(State(api): State<Api>) -> Response {
    let cursors = match api.work(|| api.intake.queue().cursors()).await {
        Ok(cursors) => cursors,
        Err(problem) => return unavailable(&problem),
    };
    let mut lines = Vec::new();
    for (path, cursor) in &cursors {
        if serde_json::to_writer(&mut lines, &CursorLine::of(path, cursor)).is_ok() {
            lines.push(b'\n');
        }
    }
    (NDJSON, lines).into_response()
}

fn ndjson(api: Api, listing: Listing, filter: Filter) -> Response {
    let Ok(permit) = api.listings.clone().try_acquire_owned() else {
        let busy = error(StatusCode::SERVICE_UNAVAILABLE, "too many listings at once; try again in a moment");
        return ([(RETRY_AFTER, "1")], busy).into_response();
    };
    let queue = api.intake.queue().clone();
    let stream = streamed(move |write| {
        let _permit = permit;
        listing::write_lines(&queue, listing, &filter, write).map_err(io::Error::other)
    });
    (NDJSON, stream).into_response()
}

/// A body that `produce` writes on a thread of its own, as fast as the reader takes it. Where it fails the connection is
/// broken off: what is not whole must not look as if it were.
fn streamed(
    produce: impl FnOnce(&mut dyn FnMut(Vec<u8>) -> io::Result<()>) -> io::Result<()> + Send + 'static,
) -> Body {
    let (sender, receiver) = tokio::sync::mpsc::channel::<io::Result<Bytes>>(2);
    let runtime = Handle::current();
    tokio::task::spawn_blocking(move || {
        // One who does not read any more must not hold the thread for ever.
        let send = |piece| match runtime.block_on(tokio::time::timeout(READER_TIMEOUT, sender.send(piece))) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(io::ErrorKind::BrokenPipe.into()),
        };
        let produced = produce(&mut |piece| send(Ok(Bytes::from(piece))));
        if let Err(error) = produced {
            // The reader may be who has gone.
            let _: io::Result<()> = send(Err(error));
        }
    });
    let stream = futures_util::stream::unfold(receiver, |mut receiver| async {
        receiver.recv().await.map(|page| (page, receiver))
    });
    Body::from_stream(stream)
}
