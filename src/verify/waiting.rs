//! What is on its way: cursors, events in the spool and in the queue, dead letters.
//!
//! Whether the watcher or the folder is asked is decided again each time: a watcher may start or end while `verify` looks.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use serde::Deserialize;
use uuid::Uuid;

use super::VerifyError;
use crate::config::Config;
use crate::event::Cursor;
use crate::intake::record;
use crate::intake::spool::{Lines, Spool};
use crate::intake::transcripts::census::Cursors;
use crate::listing::{CursorLine, Filter, Listing};
use crate::queue::QueueError;
use crate::source::{self, Part, SourceError};
use crate::transcript;

/// How long a watcher may be starting or ending, neither of which lets the queue be asked.
const PATIENCE: Duration = Duration::from_secs(15);

/// Pause between two attempts.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// Numbers of the transcripts by path.
pub(super) type Files = HashMap<String, u32>;

/// What is in the spool, in the queue or among the dead letters.
#[derive(Default)]
pub(super) struct Waiting {
    /// In the spool or in the queue.
    pub(super) pending: HashSet<Uuid>,
    /// Events among the dead letters.
    pub(super) dead: HashSet<Uuid>,
    /// What was rejected has no identity any more: transcript, offset, and whether it is a registration.
    pub(super) rejected: HashSet<(u32, u64, bool)>,
}

/// How far the watcher has read, durably.
pub(super) async fn cursors(config: &Config) -> Result<Cursors, SourceError> {
    let mut cursors = Cursors::new();
    read(config, Part::Cursors, |line| {
        if let Ok(line) = serde_json::from_slice::<CursorLine<'_>>(line) {
            let fingerprint = u64::from_str_radix(&line.fingerprint, 16).unwrap_or_default();
            let project_path = line.registered.then(|| "".into());
            let cursor = Cursor { offset: line.offset, fingerprint, project_path, ..transcript::START };
            cursors.insert(line.path.into_owned(), cursor);
        }
    })
    .await?;
    Ok(cursors)
}

/// Looks into the spool, at the queue, at the dead letters, and at the queue again: whatever is in one of them all the while
/// is found, also when it is dead-lettered or put back in between. What has left them all is in Postgres by now.
pub(super) async fn waiting(config: &Config, files: &Files) -> Result<Waiting, VerifyError> {
    let all = Filter::default();
    let mut waiting = Waiting { pending: spooled(config)?, ..Waiting::default() };
    let pending_id = |line: &[u8]| serde_json::from_slice::<EventLine<'_>>(line).ok().and_then(|line| line.event_id);
    read(config, Part::Records(Listing::Pending, &all), |line| waiting.pending.extend(pending_id(line))).await?;
    read(config, Part::Records(Listing::DeadLetters, &all), |line| {
        let Ok(line) = serde_json::from_slice::<EventLine<'_>>(line) else { return };
        if let Some(id) = line.event_id {
            waiting.dead.insert(id);
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
        read(config, Part::Records(Listing::Pending, &all), |line| waiting.pending.extend(pending_id(line))).await?;
    }
    Ok(waiting)
}

/// The events in the spool. A file that is gone was taken in meanwhile; events of one that can't be read may be sent twice,
/// which the receipts refuse.
fn spooled(config: &Config) -> Result<HashSet<Uuid>, VerifyError> {
    let spool = Spool::new(&config.queue.spool_path);
    let paths = spool.waiting().map_err(|error| {
        let folder = spool.folder().display().to_string();
        VerifyError::Spool { folder, error }
    })?;
    let mut ids = HashSet::new();
    for mut lines in paths.iter().filter_map(|path| Lines::open(path).ok()) {
        let mut line = Vec::new();
        while lines.read(&mut line).is_ok_and(|is_line| is_line) {
            ids.extend(record::event_id(&line));
        }
    }
    Ok(ids)
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

/// Passes on the lines of one part; some more than once where an answer broke off. None where there is no queue.
async fn read(config: &Config, part: Part<'_>, mut take: impl FnMut(&[u8])) -> Result<(), SourceError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let reading = source::read(config, part, |line| {
            take(line);
            Ok(())
        });
        match reading.await {
            Err(SourceError::Queue(QueueError::NotFound { .. })) => return Ok(()),
            Err(SourceError::NoAnswer { .. } | SourceError::Queue(QueueError::InUse { .. }))
                if Instant::now() < deadline =>
            {
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
            read => return read,
        }
    }
}
