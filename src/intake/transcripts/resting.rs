//! Transcripts that nothing happens to: a few bytes of each in memory, the rest in the queue.
//!
//! A file that was read to its end, and whose cursor stands in the queue as it stands in memory, may be put to rest. A
//! change is still noticed, as each look at the folder compares what the system says of the file. Then it is woken with the
//! cursor from the queue, as at the start of the program, and the bytes before it are compared. All transcripts of a session
//! rest, or none.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

use super::super::claude_code::TranscriptKind;
use super::reading::Stamp;
use crate::event::{Sequence, Timestamp};
use crate::queue::CursorId;

/// What rests and wakes together: the transcripts of a session, or the one of a sub-agent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Group(u64);

impl Group {
    pub fn of(kind: &TranscriptKind, path: &Path) -> Group {
        match kind {
            TranscriptKind::Main { session } => Group::of_session(*session),
            TranscriptKind::SubAgent => Group(xxh3_64(path.as_os_str().as_bytes())),
        }
    }

    pub fn of_session(session: Uuid) -> Group {
        Group(xxh3_64(session.as_bytes()))
    }
}

/// What is known of a file that rests.
#[derive(Clone, Copy, Debug)]
pub struct Rest {
    /// How it was when it was read to its end. `None`: known from an earlier run only, and not looked at in this one.
    pub seen: Option<Stamp>,
    /// The newest event that came from it.
    pub newest: Option<Sequence>,
    /// Whether it has registered its session.
    pub is_registered: bool,
    /// The walk through the folder that came upon it last.
    walk: u32,
}

impl Rest {
    pub fn new(seen: Option<Stamp>, newest: Option<Sequence>, is_registered: bool) -> Rest {
        Rest { seen, newest, is_registered, walk: 0 }
    }
}

/// What is to happen to a session that rests and has not ended.
#[derive(Clone, Copy, Debug)]
pub struct Live {
    /// When it ends if nothing more happens; seconds since 1970.
    pub ends_at: Option<i64>,
    /// The process that has it open.
    pub process: Option<u32>,
}

/// How a file that was come upon stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Met {
    /// It does not rest.
    Unknown,
    Unchanged,
    Changed,
}

/// All transcripts that rest.
#[derive(Default)]
pub struct Resting {
    files: BTreeMap<(Group, CursorId), Rest>,
    live: HashMap<Uuid, Live>,
    walk: u32,
}

impl Resting {
    pub fn insert(&mut self, group: Group, id: CursorId, rest: Rest) {
        self.files.insert((group, id), Rest { walk: self.walk, ..rest });
    }

    /// Notes that a session which rests has not ended.
    pub fn insert_live(&mut self, session: Uuid, live: Live) {
        self.live.insert(session, live);
    }

    /// Takes out what is to be woken.
    pub fn take(&mut self, group: Group) -> Vec<(CursorId, Rest)> {
        let ids: Vec<CursorId> = self.ids(group).collect();
        ids.into_iter().filter_map(|id| Some((id, self.files.remove(&(group, id))?))).collect()
    }

    /// The session does not rest any more.
    pub fn forget_live(&mut self, session: Uuid) {
        self.live.remove(&session);
    }

    fn ids(&self, group: Group) -> impl Iterator<Item = CursorId> {
        self.files.range((group, CursorId::MIN)..=(group, CursorId::MAX)).map(|((_, id), _)| *id)
    }

    /// A new walk through the folder begins.
    pub fn begin_walk(&mut self) {
        self.walk = self.walk.wrapping_add(1);
    }

    /// The walk has come upon this file.
    pub fn meet(&mut self, group: Group, path: &Path, stamp: impl FnOnce() -> Option<Stamp>) -> Met {
        let Some(rest) = self.files.get_mut(&(group, CursorId::of(path))) else { return Met::Unknown };
        rest.walk = self.walk;
        if rest.seen.is_some() && rest.seen == stamp() { Met::Unchanged } else { Met::Changed }
    }

    /// Those that the walk did not come upon.
    pub fn unmet(&self) -> Vec<(Group, CursorId)> {
        self.files.iter().filter(|(_, rest)| rest.walk != self.walk).map(|(key, _)| *key).collect()
    }

    /// The sessions that are to be looked at: their time is up, or another process has them open than before, or none.
    pub fn due(&self, now: Timestamp, open: &HashMap<Uuid, u32>) -> Vec<Uuid> {
        let is_due = |session: &Uuid, live: &Live| {
            live.ends_at.is_some_and(|at| at <= now.as_second()) || live.process != open.get(session).copied()
        };
        self.live.iter().filter(|(session, live)| is_due(session, live)).map(|(session, _)| *session).collect()
    }

    /// The sessions that have not ended and that the process has open which had them open before.
    pub fn open(&self, open: &HashMap<Uuid, u32>) -> impl Iterator<Item = Uuid> {
        let is_open =
            |(session, live): &(&Uuid, &Live)| live.process.is_some() && live.process == open.get(session).copied();
        self.live.iter().filter(is_open).map(|(session, _)| *session)
    }

    /// The files that were looked at in this run.
    pub fn looked_at(&self) -> impl Iterator<Item = &Rest> {
        self.files.values().filter(|rest| rest.seen.is_some())
    }
}
