//! What is on its way, as the running watcher tells or as the folder has it: cursors, pending events, dead letters.
//!
//! Which of the two is asked is decided anew each time: a watcher may start or end while `verify` looks. The folder is
//! let go at once, so that one that starts is not kept waiting.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::claude::transcript;
use crate::event::Cursor;
use crate::intake::transcripts::census::Cursors;
use crate::listing::{self, CursorLine, Filter, Listing, ListingError};
use crate::queue::QueueError;
use http_body_util::BodyExt;
use serde::Deserialize;
use uuid::Uuid;

use super::super::client::{self, ClientError};
use super::super::{Context, Exit, Failure, inspect_queue};

/// How long a watcher may be starting or ending, neither of which lets the queue be asked.
const PATIENCE: Duration = Duration::from_secs(15);

/// Pause between two attempts.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// How long the watcher may take for the next piece of an answer.
const PIECE_TIMEOUT: Duration = Duration::from_secs(30);

/// Numbers of the transcripts by path.
pub type Files = HashMap<String, u32>;

/// What has not left the queue.
#[derive(Default)]
pub struct Waiting {
    /// Sorted.
    pending: Vec<Uuid>,
    /// Events that were set aside; sorted.
    dead: Vec<Uuid>,
    /// What was rejected has no identity any more: transcript, offset, and whether it is a registration.
    rejected: HashSet<(u32, u64, bool)>,
}

impl Waiting {
    pub fn is_pending(&self, id: &Uuid) -> bool {
        self.pending.binary_search(id).is_ok()
    }

    pub fn is_dead(&self, id: &Uuid) -> bool {
        self.dead.binary_search(id).is_ok()
    }

    pub fn is_rejected(&self, file: u32, offset: u64, is_registration: bool) -> bool {
        self.rejected.contains(&(file, offset, is_registration))
    }
}

/// How far the watcher has read, durably.
pub async fn cursors(context: &Context) -> Result<Cursors, Failure> {
    let mut cursors = Cursors::new();
    read(context, Part::Cursors, |line| {
        if let Ok(line) = serde_json::from_slice::<CursorLine<'_>>(line) {
            let fingerprint = u64::from_str_radix(&line.fingerprint, 16).unwrap_or_default();
            let project_path = line.registered.then(String::new);
            let cursor = Cursor { offset: line.offset, fingerprint, project_path, ..transcript::START };
            cursors.insert(line.path.into_owned(), cursor);
        }
    })
    .await?;
    Ok(cursors)
}

/// Looks at the queue, at the dead letters, and at the queue again: whatever is in one of them all the while is found,
/// also when it is set aside or put back in between. What has left them both is in Postgres by now.
pub async fn waiting(context: &Context, files: &Files) -> Result<Waiting, Failure> {
    let mut waiting = Waiting::default();
    let mut pending = HashSet::new();
    let take_id = |line: &[u8], pending: &mut HashSet<Uuid>| {
        let line: Option<EventLine<'_>> = serde_json::from_slice(line).ok();
        pending.extend(line.and_then(|line| line.event_id));
    };
    read(context, Part::Pending, |line| take_id(line, &mut pending)).await?;
    read(context, Part::DeadLetters, |line| {
        let Ok(line) = serde_json::from_slice::<EventLine<'_>>(line) else { return };
        if let Some(id) = line.event_id {
            waiting.dead.push(id);
        } else if let (Some(event_type), Some(path), Some(offset)) =
            (line.event_type, line.origin.path, line.origin.offset)
            && let Some(file) = files.get(&*path)
            && matches!(&*event_type, "turn_detected" | "session_registered")
        {
            waiting.rejected.insert((*file, offset, event_type == "session_registered"));
        }
    })
    .await?;
    if !waiting.dead.is_empty() {
        read(context, Part::Pending, |line| take_id(line, &mut pending)).await?;
    }
    waiting.pending = pending.into_iter().collect();
    waiting.pending.sort_unstable();
    waiting.dead.sort_unstable();
    Ok(waiting)
}

/// A pending event or a dead letter, as listings show it.
#[derive(Deserialize)]
struct EventLine<'a> {
    event_id: Option<Uuid>,
    #[serde(borrow)]
    event_type: Option<Cow<'a, str>>,
    #[serde(borrow)]
    origin: OriginLine<'a>,
}

#[derive(Deserialize)]
struct OriginLine<'a> {
    #[serde(borrow)]
    path: Option<Cow<'a, str>>,
    offset: Option<u64>,
}

#[derive(Clone, Copy)]
enum Part {
    Cursors,
    Pending,
    DeadLetters,
}

impl Part {
    fn target(self) -> &'static str {
        match self {
            Part::Cursors => "/cursors",
            Part::Pending => "/queue",
            Part::DeadLetters => "/dead-letters",
        }
    }
}

/// Gives the lines of one part, whole; some more than once where an answer broke off.
async fn read(context: &Context, part: Part, mut take: impl FnMut(&[u8])) -> Result<(), Failure> {
    let socket = &context.config().http.socket;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let problem = match from_watcher(socket, part, &mut take).await {
            Ok(()) => return Ok(()),
            Err(ClientError::NoAnswer(problem)) => {
                format!("the watcher on {} does not answer: {problem}; restart it", socket.display())
            }
            Err(ClientError::NotRunning) => match from_folder(context, part, &mut take) {
                Ok(()) | Err(QueueError::NotFound { .. }) => return Ok(()),
                Err(error @ QueueError::InUse { .. }) => error.to_string(),
                Err(error) => return Err(error.into()),
            },
        };
        if Instant::now() >= deadline {
            return Err(Failure::new(Exit::Unavailable, format!("could not ask what waits: {problem}")));
        }
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

async fn from_watcher(socket: &Path, part: Part, take: &mut impl FnMut(&[u8])) -> Result<(), ClientError> {
    let mut response = client::get(socket, part.target()).await?;
    if !response.status().is_success() {
        return Err(ClientError::NoAnswer(response.status().to_string()));
    }
    let mut lines = Lines::default();
    loop {
        let frame = tokio::time::timeout(PIECE_TIMEOUT, response.body_mut().frame()).await;
        let frame = frame.map_err(|_| ClientError::NoAnswer("its answer does not go on".to_owned()))?;
        let Some(frame) = frame else { return Ok(()) };
        let frame = frame.map_err(|error| ClientError::NoAnswer(error.to_string()))?;
        if let Some(bytes) = frame.data_ref() {
            lines.take(bytes, take);
        }
    }
}

fn from_folder(context: &Context, part: Part, take: &mut impl FnMut(&[u8])) -> Result<(), QueueError> {
    let queue = inspect_queue(context.config())?;
    let listing = match part {
        Part::Cursors => {
            for (path, cursor) in queue.cursors()? {
                take(&serde_json::to_vec(&CursorLine::of(&path, &cursor)).unwrap_or_default());
            }
            return Ok(());
        }
        Part::Pending => Listing::Pending,
        Part::DeadLetters => Listing::DeadLetters,
    };
    let mut lines = Lines::default();
    let listed = listing::write_lines(&queue, listing, &Filter::default(), |page| {
        lines.take(&page, take);
        Ok(())
    });
    match listed {
        Err(ListingError::Queue(error)) => Err(error),
        // Nobody reads but us.
        Ok(()) | Err(ListingError::Reader(_)) => Ok(()),
    }
}

/// Puts lines together from pieces.
#[derive(Default)]
struct Lines {
    /// The beginning of a line whose end has not come yet.
    partial: Vec<u8>,
}

impl Lines {
    fn take(&mut self, bytes: &[u8], take: &mut impl FnMut(&[u8])) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            match piece.strip_suffix(b"\n") {
                Some(end) if self.partial.is_empty() => take(end),
                Some(end) => {
                    self.partial.extend_from_slice(end);
                    take(&std::mem::take(&mut self.partial));
                }
                None => self.partial.extend_from_slice(piece),
            }
        }
    }
}
