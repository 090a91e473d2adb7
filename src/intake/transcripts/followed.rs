//! What is remembered of one transcript while nothing happens to it: less than 500 bytes, with its path.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use uuid::Uuid;

use super::tail::Scanned;
use crate::agent::{Agent, Memory};
use crate::claude::transcript::OtherSession;
use crate::event::{Cursor, FileIdentity};
use crate::intake::sessions::Roots;
use crate::session::End;
use crate::transcript::TranscriptKind;

/// All transcripts. Boxed, since a map has room for up to twice as many as are in it.
pub(crate) type Files = HashMap<Arc<Path>, Box<Followed>>;

/// One transcript that is followed.
pub(crate) struct Followed {
    pub(crate) agent: Agent,
    pub(crate) kind: TranscriptKind,
    /// Which of the projects folders it lies below.
    pub(crate) roots: Roots,
    pub(crate) path: Arc<Path>,
    pub(crate) cursor: Cursor,
    pub(crate) scanned: Option<Scanned>,
    /// How the file was when it was last read to its end. `None`: there may be more to read.
    pub(crate) seen: Option<Stamp>,
    /// When it was last modified, as far as is known; seconds since 1970, else 0.
    pub(crate) modified: i64,
    pub(crate) access: Access,
    /// Since when a last line without newline is there that may be complete: look again when the file has been quiet.
    pub(crate) unterminated: Option<Instant>,
    /// When a line was read in this run that is its session's latest activity.
    pub(crate) advanced_at: Option<Instant>,
    /// What is known of its beginning, while nothing of its own was read; of some agents' files for good.
    pub(crate) beginning: Option<Box<Beginning>>,
}

/// What the last look at a file found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Access {
    Readable,
    /// Logged: it can't be read.
    Unreadable,
    Gone,
}

impl Followed {
    pub(crate) fn new(roots: Roots, path: Arc<Path>, agent: Agent, kind: TranscriptKind, cursor: Cursor) -> Followed {
        Followed {
            agent,
            kind,
            roots,
            path,
            cursor,
            scanned: None,
            seen: None,
            modified: 0,
            access: Access::Readable,
            unterminated: None,
            advanced_at: None,
            beginning: None,
        }
    }

    /// Whether the file is as it was when it was read to its end, and nothing waits for it to be quiet.
    pub(crate) fn is_as_seen(&self) -> bool {
        let is_same =
            |metadata: &Metadata| self.seen == Some(Stamp::of(metadata)) && self.cursor.file == identity(metadata);
        self.unterminated.is_none()
            && self.seen.is_some()
            && std::fs::metadata(&self.path).is_ok_and(|now| is_same(&now))
    }

    /// The session of a main transcript.
    pub(crate) fn session(&self) -> Option<Uuid> {
        session_of(&self.kind)
    }

    /// Whether it has registered its session.
    pub(crate) fn is_registered(&self) -> bool {
        self.cursor.project_path.is_some()
    }

    /// Whether its beginning is of no interest any more.
    pub(crate) fn has_begun(&self) -> bool {
        self.cursor.session.last_activity.is_some() && !self.agent.always_remembers()
    }

    /// The other session whose lines were read last, where nothing of its own came after them.
    pub(crate) fn other(&self) -> Option<&OtherSession> {
        self.beginning.as_ref()?.memory.other.as_ref()
    }

    /// The end of the other session was emitted. The cursor says so in the place of the file's own session, of which nothing
    /// was read yet.
    pub(crate) fn note_end_of_other(&mut self, end: &End) {
        let other = self.beginning.as_mut().and_then(|beginning| beginning.memory.other.as_mut());
        self.cursor.session.ended_through = other.and_then(|other| other.ended(end));
    }

    /// Whether it is in the middle of a line that is too long to be read: what comes next is skipped.
    pub(crate) fn is_skipping(&self, line_bytes_max: u64) -> bool {
        self.scanned.is_some_and(|scanned| scanned.to.saturating_sub(self.cursor.offset) > line_bytes_max)
    }
}

/// The session of a main transcript.
pub(crate) fn session_of(kind: &TranscriptKind) -> Option<Uuid> {
    match kind {
        TranscriptKind::Main { session } => Some(*session),
        TranscriptKind::SubAgent => None,
    }
}

/// By what a changed file is told from an unchanged one without reading it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Stamp {
    pub(crate) inode: u64,
    pub(crate) size: u64,
    /// Unlike the time of modification nobody can set it.
    changed: i64,
    changed_nanoseconds: u32,
    modified_nanoseconds: u32,
    /// Seconds since 1970.
    pub(crate) modified: i64,
}

impl Stamp {
    pub(crate) fn of(metadata: &Metadata) -> Stamp {
        let nanoseconds = |nanoseconds: i64| u32::try_from(nanoseconds).unwrap_or_default();
        Stamp {
            inode: metadata.ino(),
            size: metadata.len(),
            changed: metadata.ctime(),
            changed_nanoseconds: nanoseconds(metadata.ctime_nsec()),
            modified_nanoseconds: nanoseconds(metadata.mtime_nsec()),
            modified: metadata.mtime(),
        }
    }

    /// Whether the file was modified since, without new bytes.
    pub(crate) fn is_modified_in_place(&self, now: &Stamp) -> bool {
        let modified = |stamp: &Stamp| (stamp.modified, stamp.modified_nanoseconds);
        (self.inode, self.size) == (now.inode, now.size) && modified(self) != modified(now)
    }
}

pub(crate) fn identity(metadata: &Metadata) -> FileIdentity {
    FileIdentity { device: metadata.dev(), inode: metadata.ino() }
}

/// What is known of the beginning of a file.
#[derive(Default)]
pub(crate) struct Beginning {
    /// The files it may have been copied from. `None`: not looked up, or the file does not tell yet.
    pub(crate) ancestors: Option<Vec<PathBuf>>,
    /// Lines that begin before here were inherited.
    pub(crate) inherited_to: u64,
    /// The file was compared with its ancestors as far as this.
    pub(crate) compared_to: u64,
    pub(crate) memory: Memory,
    /// `memory` is what the lines before the cursor say.
    pub(crate) remembers: bool,
}

impl Beginning {
    pub(crate) fn of_copy_of(ancestors: Vec<PathBuf>) -> Beginning {
        Beginning { ancestors: Some(ancestors), ..Beginning::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn less_than_500_bytes_are_remembered_of_a_transcript_to_which_nothing_happens() {
        let path = "/home/alex/.claude/projects/-home-alex-src-app/00000000-0000-4000-8000-000000000000.jsonl";
        // An allocation has 16 bytes of its own, an `Arc` two counters, and a map is at least seven sixteenths full.
        let allocated = |bytes: usize| (bytes + 16).next_multiple_of(16);
        let entry = (size_of::<(Arc<Path>, Box<Followed>)>() + 1) * 16 / 7;
        let bytes = allocated(size_of::<Followed>()) + allocated(path.len() + 16) + entry;
        assert!(bytes <= 500, "{bytes} bytes");
    }
}
