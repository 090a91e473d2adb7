//! What opening finds and puts right. All else that callers give and get is the queue's.

use std::fmt;
use std::path::PathBuf;

pub use crate::queue::{Accepted, Batch, Outcome, QueueConfig, QueueError, QueueStats, RetryOutcome};

/// What opening found.
#[derive(Clone, Default, Debug)]
pub struct Recovery {
    pub pending: u64,
    pub pending_bytes: u64,
    pub dead_letters: u64,
    /// What was put right, to be logged: [`Repair::is_loss`] as an error, the others as warnings.
    pub repairs: Vec<Repair>,
}

/// Something opening had to put right.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Repair {
    /// sled did not open a segment with its snapshots, but did without.
    SnapshotsSetAside { segment: u64 },
    /// Records of a batch whose commit was never reached.
    UncommittedRemoved { keys: u64 },
    /// A segment that was being made when the process died.
    LeftOverRemoved { folder: PathBuf },
    /// The log is shorter than it was: what had been acknowledged from `from` to `to` is gone; all files are to be read from
    /// their beginning.
    LogCut { from: u64, to: u64 },
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
        matches!(self, Repair::SegmentSetAside { .. } | Repair::LogCut { .. } | Repair::OldFormat { .. })
    }

    /// Events that were acknowledged and are not there any more, at most.
    pub fn missing(&self) -> u64 {
        match self {
            Repair::SegmentSetAside { missing, .. } => *missing,
            Repair::LogCut { from, to } => to - from + 1,
            _ => 0,
        }
    }
}

impl fmt::Display for Repair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Repair::SnapshotsSetAside { segment } => {
                write!(f, "read the whole log of segment {segment}, whose snapshots were not readable")
            }
            Repair::UncommittedRemoved { keys } => {
                write!(f, "removed {keys} records that had not been acknowledged")
            }
            Repair::LeftOverRemoved { folder } => write!(f, "removed left-over {}", folder.display()),
            Repair::LogCut { from, to } => write!(
                f,
                "the disk lost what it had confirmed: events numbered {from} to {to}, unless delivered, are gone; \
                 those from transcripts are read again"
            ),
            Repair::SegmentSetAside { to, cause, found, missing } => write!(
                f,
                "a part of the queue was damaged ({cause}); kept it in {}, found {found} events in it, {missing} are missing; \
                 transcripts are read again from their beginning",
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
