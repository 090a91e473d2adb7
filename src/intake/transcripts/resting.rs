//! Transcripts that nothing happens to: a few bytes of each in memory, the rest in the queue.
//!
//! A file that was read to its end, and whose cursor stands in the queue as it stands in memory, may be put to rest. A
//! change is still noticed, as each look at the folder compares what the system says of the file. Then it is woken with the
//! cursor from the queue, as at the start of the program, and the bytes before it are compared. All transcripts of a session
//! rest, or none.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

use super::super::sessions::{OpenSessions, Roots};
use super::reading::{Followed, Stamp};
use super::{Follower, Standing, is_gone, root_of};
use crate::claude::line::TranscriptKind;
use crate::event::{Cursor, Sequence, Timestamp};
use crate::queue::{CursorId, QueueError};

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
    /// Which of the projects folders it lies below.
    root: usize,
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
    pub fn new(root: usize, seen: Option<Stamp>, newest: Option<Sequence>, is_registered: bool) -> Rest {
        Rest { root, seen, newest, is_registered, walk: 0 }
    }
}

/// What is to happen to a session that rests and has not ended.
#[derive(Clone, Copy, Debug)]
pub struct Live {
    /// When it ends if nothing more happens; seconds since 1970.
    pub ends_at: Option<i64>,
    /// The process that has it open.
    pub process: Option<u32>,
    /// The projects folders that its transcripts lie below.
    pub roots: Roots,
    /// When its files were last modified; seconds since 1970.
    pub modified: i64,
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

    /// Whether one of these has registered its session, or was not read in this run.
    pub fn registers(&self, group: Group) -> bool {
        let mut files = self.ids(group).filter_map(|id| self.files.get(&(group, id)));
        files.any(|rest| rest.is_registered || rest.seen.is_none())
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

    /// Those that the walk did not come upon, of the projects folders that were there.
    pub fn unmet(&self, is_there: impl Fn(usize) -> bool) -> Vec<(Group, CursorId)> {
        let is_unmet = |rest: &Rest| rest.walk != self.walk && is_there(rest.root);
        self.files.iter().filter(|(_, rest)| is_unmet(rest)).map(|(key, _)| *key).collect()
    }

    /// The sessions that are to be looked at: their time is up, or another process has them open than before, or none.
    pub fn due(&self, now: Timestamp, open: &OpenSessions) -> Vec<Uuid> {
        let is_due = |session: &Uuid, live: &Live| {
            live.ends_at.is_some_and(|at| at <= now.as_second())
                || live.process != open.process(*session, live.roots, live.process, live.modified)
        };
        self.live.iter().filter(|(session, live)| is_due(session, live)).map(|(session, _)| *session).collect()
    }

    /// The sessions that have not ended and that a process's file names.
    pub fn named(&self, open: &OpenSessions) -> impl Iterator<Item = Uuid> {
        self.live.keys().copied().filter(|session| open.named(*session).is_some())
    }

    /// The processes that have sessions open.
    pub fn processes(&self) -> impl Iterator<Item = (Roots, u32)> {
        self.live.values().filter_map(|live| Some((live.roots, live.process?)))
    }

    /// Whether there are any below this projects folder.
    pub fn is_any_below(&self, root: usize) -> bool {
        self.files.values().any(|rest| rest.root == root)
    }

    /// The files that were looked at in this run.
    pub fn looked_at(&self) -> impl Iterator<Item = &Rest> {
        self.files.values().filter(|rest| rest.seen.is_some())
    }
}

impl Follower {
    /// Wakes the file if it rests.
    pub(super) fn wake_file(&mut self, path: &Path) -> Result<(), QueueError> {
        if !self.files.contains_key(path)
            && let Some(kind) = self.kind_of(path)
        {
            self.wake(Group::of(&kind, path))?;
        }
        Ok(())
    }

    /// Follows again what rests. Gives the files, which are to be looked at.
    pub(super) fn wake(&mut self, group: Group) -> Result<Vec<Arc<Path>>, QueueError> {
        let mut paths = Vec::new();
        for (id, rest) in self.resting.take(group) {
            // Without a cursor it is a new file.
            let Some((path, cursor)) = self.intake.queue().cursor(id)? else { continue };
            let Some(kind) = self.kind_of(&path) else { continue };
            if let TranscriptKind::Main { session } = kind {
                self.resting.forget_live(session);
            }
            let path: Arc<Path> = path.into();
            let mut file = Followed::new(self.roots_of(&path), Arc::clone(&path), kind, cursor);
            file.newest = rest.newest;
            file.seen = rest.seen;
            file.modified = rest.seen.map(|seen| seen.modified);
            self.files.insert(Arc::clone(&path), Box::new(file));
            paths.push(path);
        }
        Ok(paths)
    }

    /// Wakes what rests and was not met, if it is gone for certain: not what merely can't be looked at.
    pub(super) fn wake_vanished(&mut self) -> Result<Vec<Arc<Path>>, QueueError> {
        let unmet = self.resting.unmet(|root| self.roots.get(root).is_some_and(|root| root.is_there));
        let mut awake = Vec::new();
        for (group, id) in &unmet {
            if self.doorbell.is_stopped() {
                break;
            }
            self.intake.metrics().live.reading.beat();
            if self.intake.queue().cursor(*id)?.is_none_or(|(path, _)| is_gone(&path)) {
                awake.extend(self.wake(*group)?);
            }
        }
        Ok(awake)
    }

    /// Puts files to rest where too many are awake. Of those that were read to their end nothing is lost with that.
    pub(super) fn put_to_rest(&mut self) -> Result<(), QueueError> {
        if self.files.len() <= self.config.awake_max {
            return Ok(());
        }
        self.flush_moved()?;
        self.await_batch()?;
        if self.is_cut_off {
            return Ok(());
        }
        let mut groups: BTreeMap<Group, Vec<Arc<Path>>> = BTreeMap::new();
        for (path, file) in &self.files {
            groups.entry(file.group()).or_default().push(Arc::clone(path));
        }
        // Those that are checked for changes are parked last.
        let is_active = |paths: &[Arc<Path>]| paths.iter().any(|path| self.active.contains(path));
        let mut quiet: Vec<(bool, Option<Instant>, Vec<Arc<Path>>)> = groups
            .into_values()
            .filter(|paths| paths.iter().filter_map(|path| self.files.get(path)).all(|file| self.may_rest(file)))
            .map(|paths| {
                let files = paths.iter().filter_map(|path| self.files.get(path));
                (is_active(&paths), files.filter_map(|file| file.read_at).max(), paths)
            })
            .collect();
        // Only those count: others are awake however many they are.
        let mut left: usize = quiet.iter().map(|(.., paths)| paths.len()).sum();
        if left <= self.config.awake_max {
            return Ok(());
        }
        quiet.sort_unstable_by_key(|(is_active, read_at, _)| (*is_active, *read_at));
        for (.., paths) in quiet {
            if left <= self.config.awake_max / 2 {
                break;
            }
            left -= paths.len();
            self.put_group_to_rest(&paths)?;
        }
        Ok(())
    }

    fn may_rest(&self, file: &Followed) -> bool {
        let is_closing = |session| self.closings.contains_key(&session);
        file.is_quiet() && !matches!(file.kind, TranscriptKind::Main { session } if is_closing(session))
    }

    fn put_group_to_rest(&mut self, paths: &[Arc<Path>]) -> Result<(), QueueError> {
        let mut standing = Standing::default();
        let mut live = None;
        for path in paths {
            let Some(file) = self.files.get(path) else { continue };
            let stored = self.intake.queue().cursor(CursorId::of(path))?;
            // One whose batch was refused has an older one. Which file it is shows when it is woken.
            let is_same = |cursor| Cursor { file: file.cursor.file, ..cursor } == file.cursor;
            if !stored.is_some_and(|(at, cursor)| *at == **path && is_same(cursor)) {
                return Ok(());
            }
            standing.add(file, false);
            live = live.or(self.live_session(file));
        }
        for path in paths {
            let Some(root) = root_of(&self.config.projects, path) else { continue };
            let Some(file) = self.files.remove(path) else { continue };
            let rest = Rest::new(root, file.seen, file.newest, file.cursor.project_path.is_some());
            self.resting.insert(file.group(), CursorId::of(path), rest);
        }
        if let Some(session) = live {
            let ends_at = standing.state.times_out_at(self.config.inactivity_timeout).map(Timestamp::as_second);
            let Standing { state, roots, modified, .. } = standing;
            self.resting.insert_live(session, Live { ends_at, process: state.process, roots, modified });
        }
        Ok(())
    }
}
