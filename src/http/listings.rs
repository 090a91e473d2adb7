//! `GET /queue` and `GET /dead-letters`: streamed page by page, so that a million lines take the memory of a page.

use std::io;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use tokio::runtime::Handle;

use super::{Api, error};
use crate::event::Sequence;
use crate::listing::{self, Filter, Listing};

/// How long a reader may take for one page.
const READER_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Deserialize)]
pub struct ListingParameters {
    after: Option<u64>,
    limit: Option<u64>,
    #[serde(rename = "type")]
    event_type: Option<String>,
    session: Option<String>,
    #[serde(default)]
    payload: bool,
}

impl From<ListingParameters> for Filter {
    fn from(parameters: ListingParameters) -> Self {
        Filter {
            after: parameters.after.and_then(Sequence::new),
            limit: parameters.limit,
            event_type: parameters.event_type,
            session: parameters.session,
            payload: parameters.payload,
        }
    }
}

pub async fn queue(State(api): State<Api>, Query(parameters): Query<ListingParameters>) -> Response {
    ndjson(api, Listing::Pending, parameters.into())
}

pub async fn dead_letters(State(api): State<Api>, Query(parameters): Query<ListingParameters>) -> Response {
    ndjson(api, Listing::DeadLetters, parameters.into())
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
    ([(CONTENT_TYPE, "application/x-ndjson"), (CACHE_CONTROL, "no-store")], stream).into_response()
}

/// A body that `produce` writes on a thread of its own, as fast as the reader takes it. Where it fails the connection is
/// broken off: what is not whole must not look as if it were.
pub fn streamed(
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
