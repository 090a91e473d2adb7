//! The queue for those who only look: as the running watcher tells it, else as its folder has it. Nothing on disk changes.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::BodyExt;
use thiserror::Error;

use crate::client::{self, ClientError};
use crate::config::Config;
use crate::listing::{self, CursorLine, Filter, Listing, ListingError};
use crate::queue::{Queue, QueueConfig, QueueError};

/// How long the watcher may take for the next piece of an answer.
const PIECE_TIMEOUT: Duration = Duration::from_secs(30);

/// What is asked for, a line of JSON for each.
#[derive(Clone, Copy)]
pub(crate) enum Part<'a> {
    /// How far each transcript was read: [`CursorLine`].
    Cursors,
    Records(Listing, &'a Filter),
}

#[derive(Debug, Error)]
pub(crate) enum SourceError {
    #[error("the watcher on {} does not answer: {problem}; restart it", socket.display())]
    NoAnswer { socket: PathBuf, problem: String },
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// Of the one who takes the lines.
    #[error("could not write: {0}")]
    Reader(io::Error),
}

/// The queue's own configuration.
pub(crate) fn queue_config(config: &Config) -> QueueConfig {
    QueueConfig { path: config.queue.path.clone(), max_pending_bytes: config.queue.max_pending_bytes }
}

/// Looks at the queue while no watcher runs.
pub(crate) fn inspect_queue(config: &Config) -> Result<Queue, QueueError> {
    Queue::inspect(&queue_config(config))
}

/// Passes each line to `take`, whole and without its newline. Takes the memory of one page.
pub(crate) async fn read(
    config: &Config,
    part: Part<'_>,
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), SourceError> {
    let socket = &config.http.socket;
    match from_watcher(socket, &target(part), &mut take).await {
        Ok(taken) => taken.map_err(SourceError::Reader),
        Err(ClientError::NoAnswer(problem)) => Err(SourceError::NoAnswer { socket: socket.clone(), problem }),
        Err(ClientError::NotRunning) => from_folder(config, part, take),
    }
}

/// The route and its query. Values are percent-encoded as a whole.
fn target(part: Part<'_>) -> String {
    let (route, filter) = match part {
        Part::Cursors => return "/cursors".to_owned(),
        Part::Records(Listing::Pending, filter) => ("/queue", filter),
        Part::Records(Listing::DeadLetters, filter) => ("/dead-letters", filter),
    };
    let Filter { after, limit, event_type, session, payload } = filter;
    let encoded = |value: &String| value.bytes().map(|byte| format!("%{byte:02X}")).collect::<String>();
    let parameters = [
        ("after", after.map(|after| after.to_string())),
        ("limit", limit.map(|limit| limit.to_string())),
        ("type", event_type.as_ref().map(encoded)),
        ("session", session.as_ref().map(encoded)),
    ];
    let parameters = parameters.iter().filter_map(|(name, value)| Some(format!("&{name}={}", value.as_ref()?)));
    format!("{route}?payload={payload}{}", parameters.collect::<String>())
}

/// The inner error is of the one who takes the lines.
async fn from_watcher(
    socket: &Path,
    target: &str,
    take: &mut impl FnMut(&[u8]) -> io::Result<()>,
) -> Result<io::Result<()>, ClientError> {
    let mut response = client::get(socket, target).await?;
    if !response.status().is_success() {
        return Err(ClientError::NoAnswer(response.status().to_string()));
    }
    let mut lines = Lines::default();
    loop {
        let frame = tokio::time::timeout(PIECE_TIMEOUT, response.body_mut().frame()).await;
        let frame = frame.map_err(|_| ClientError::NoAnswer("its answer does not go on".to_owned()))?;
        let Some(frame) = frame else { return Ok(Ok(())) };
        if let Some(bytes) = frame?.data_ref()
            && let Err(error) = lines.split(bytes, take)
        {
            return Ok(Err(error));
        }
    }
}

fn from_folder(
    config: &Config,
    part: Part<'_>,
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), SourceError> {
    let queue = inspect_queue(config)?;
    match part {
        Part::Cursors => {
            for (path, cursor) in queue.cursors()? {
                let line = serde_json::to_vec(&CursorLine::of(&path, &cursor)).unwrap_or_default();
                take(&line).map_err(SourceError::Reader)?;
            }
            Ok(())
        }
        Part::Records(listing, filter) => {
            let mut lines = Lines::default();
            let listed = listing::write_lines(&queue, listing, filter, |page| lines.split(&page, &mut take));
            listed.map_err(|error| match error {
                ListingError::Queue(error) => error.into(),
                ListingError::Reader(error) => SourceError::Reader(error),
            })
        }
    }
}

/// Puts lines together from pieces.
#[derive(Default)]
struct Lines {
    /// The beginning of a line whose end has not come yet.
    partial: Vec<u8>,
}

impl Lines {
    fn split(&mut self, bytes: &[u8], take: &mut impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            match piece.strip_suffix(b"\n") {
                Some(end) if self.partial.is_empty() => take(end)?,
                Some(end) => {
                    self.partial.extend_from_slice(end);
                    take(&std::mem::take(&mut self.partial))?;
                }
                None => self.partial.extend_from_slice(piece),
            }
        }
        Ok(())
    }
}
