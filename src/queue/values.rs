//! What callers give to the queue and get from it.

use std::fmt;
use std::path::PathBuf;

use thiserror::Error;
use uuid::Uuid;

use crate::event::{Cursor, Event, Failure, Rejection, Sequence, Timestamp};
use crate::private_folder::FolderError;

/// Where the queue is and how large it may become.
#[derive(Clone, Debug)]
pub struct QueueConfig {
    /// Folder of the queue; made with mode 0700 where it is missing.
    pub path: PathBuf,
    /// Bytes of pending events, as they are encoded, above which nothing more is taken in.
    pub max_pending_bytes: u64,
}

/// What is taken in together: all of it or nothing.
#[derive(Clone, Default, Debug)]
pub struct Batch {
    pub events: Vec<Event>,
    /// Input that did not become an event; kept as dead letters.
    pub rejections: Vec<Rejection>,
    /// How far files have been read with this batch. `None` forgets the file.
    pub cursors: Vec<(PathBuf, Option<Cursor>)>,
    /// SessionEnd hooks, and when they ran, of sessions whose end is not an event yet. `None` forgets the note.
    pub session_ends: Vec<(Uuid, Option<Timestamp>)>,
}

/// A batch was taken in.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Accepted {
    /// The numbers of the batch's events, in their order.
    pub sequences: Vec<Sequence>,
}

/// What became of a pending event.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It is durably where it belongs.
    Delivered,
    /// It can't be delivered: it becomes a dead letter. `attempts` counts all its refused deliveries.
    Refused { failure: Failure, attempts: u32 },
}

/// What became of the wish to send a dead letter again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RetryOutcome {
    /// It waits at the tail again, under a new number.
    Queued(Sequence),
    /// There is no such dead letter.
    NotFound,
    /// It never was an event (or can't be read any more): it can only be looked at or dropped.
    NotAnEvent,
}

/// The queue in numbers, of what is durable; asking costs a lock.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct QueueStats {
    /// Events that wait.
    pub pending: u64,
    /// Their encoded bytes.
    pub pending_bytes: u64,
    /// The one that waits longest and when it was captured.
    pub oldest: Option<(Sequence, Timestamp)>,
    pub dead_letters: u64,
    /// Events that were missing when the queue was opened.
    pub missing: u64,
    /// Size of the files.
    pub disk_bytes: u64,
    /// No room: the last batch that did not fit would still not fit.
    pub full: bool,
    /// The number given last, to an event or a rejection.
    pub last_sequence: Option<Sequence>,
}

/// Why the queue did not do it.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum QueueError {
    #[error("queue is full: {pending_bytes} of at most {max} bytes are waiting to be delivered")]
    Full { pending_bytes: u64, max: u64 },
    #[error("could not open queue {}: held by {}; ask it with \"headspace-watcher status\"", path.display(), holder(*.pid))]
    InUse { path: PathBuf, pid: Option<u32> },
    #[error(
        "could not open queue {}: written in format {found}, this program knows up to {supported}; use the newer program again",
        path.display()
    )]
    TooNew { path: PathBuf, found: u64, supported: u64 },
    #[error("could not read queue {}: {cause}; the next start of the watcher keeps what is damaged aside and goes on with the rest", path.display())]
    Damaged { path: PathBuf, cause: String },
    /// Fail-stop: the handle is dead, and so should the process be.
    #[error("could not use queue {}: {cause}; {}, then start again", path.display(), way_out(cause))]
    Storage { path: PathBuf, cause: String },
    #[error("queue is closed")]
    Closed,
    #[error("no queue at {}: it is made when the watcher first runs", path.display())]
    NotFound { path: PathBuf },
    #[error("could not queue an event: {cause}")]
    TooLarge { cause: String },
    #[error("could not look into queue {}: {cause}", path.display())]
    Look { path: PathBuf, cause: String },
    #[error(transparent)]
    Folder(FolderError),
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".into(), |pid| format!("process {pid}"))
}

/// What someone can do about an error of the system, in the words of glibc, musl or macOS.
fn way_out(cause: &str) -> &'static str {
    const KNOWN: &[(&str, &str)] = &[
        ("No space left", "free space"),
        ("uota exceeded", "free space"),
        ("Permission denied", "correct its owner or mode, or set queue.path"),
        ("Operation not permitted", "correct its owner or mode, or set queue.path"),
        ("Read-only file system", "make it writable, or set queue.path"),
        ("Too many open files", "raise the limit of open files (ulimit -n)"),
        ("No file descriptors available", "raise the limit of open files (ulimit -n)"),
    ];
    KNOWN
        .iter()
        .find(|(words, _)| cause.contains(words))
        .map_or("free space or repair the disk", |(_, way_out)| way_out)
}

/// Something opening had to put right, to be logged: [`Repair::is_loss`] as an error, the others as warnings.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Repair {
    /// A segment could not be trusted: it was moved away, and what was found in its log took its place. Where events are
    /// missing, all files are to be read from their beginning.
    SegmentSetAside { to: PathBuf, cause: String, found: u64, missing: u64 },
    /// The folder had been written by an earlier version of the program, and was moved away.
    OldFormat { to: PathBuf },
    /// Others had rights to the folder, by this mode.
    FolderTightened { folder: PathBuf, mode: u32 },
}

impl Repair {
    /// Whether something may be missing now: somebody should look.
    pub fn is_loss(&self) -> bool {
        !matches!(self, Repair::FolderTightened { .. })
    }

    /// Events that were acknowledged and are not there any more, at most.
    pub fn missing(&self) -> u64 {
        match self {
            Repair::SegmentSetAside { missing, .. } => *missing,
            _ => 0,
        }
    }
}

impl fmt::Display for Repair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Repair::SegmentSetAside { to, cause, found, missing } => write!(
                f,
                "a part of the queue was damaged ({cause}); {found} of its waiting events are found and delivered from {}, which \
                 is kept; {missing} are missing; transcripts are read again from their beginning",
                to.display()
            ),
            Repair::OldFormat { to } => write!(
                f,
                "the queue had been written by an earlier version; kept it in {}, and started a new one; transcripts are \
                 read again from their beginning",
                to.display()
            ),
            Repair::FolderTightened { folder, mode } => {
                write!(f, "others had rights to {} (mode {mode:04o}); it has mode 0700 now", folder.display())
            }
        }
    }
}
