//! Follows the transcripts: discovers files, reads whole lines from where it left off, notices replacement, and tells
//! when a session has ended.
//!
//! `watching`: notifications are hints. Correctness relies on the rescan by size every `polling_interval`; it finds what
//! notifications miss (overflow, limits, network homes, files created before their watch). A notified path that is not
//! known yet leads to a rescan, so that new files are read in the right order: copies of a session after what they were
//! copied from.
//!
//! `polling`: active transcripts are checked several times a second, for the systems where notifications come late or not
//! at all.
//!
//! `reading`: a file's cursor moves in the same queue transaction as the events of the lines before it, so it never runs
//! ahead of them. A line ends with its newline; a last line without one waits for it. Only when such a line is one
//! whole JSON object and its file has been quiet for [`UNTERMINATED_QUIET`] is it read as it stands: nothing that could
//! still follow would change it (a cut-off object is never valid JSON).
//!
//! Files move: a file that is found where none was, and has the name of one that is gone, goes on at that one's cursor.
//! Whatever can't be told for certain is read anew, which stores nothing twice.
//!
//! `resting`: of most files nothing is kept in memory but that they were read to their end, and how they were then.
//!
//! Runs on a thread of its own. The only user of notify.

pub mod census;
mod descent;
pub mod polling;
mod reading;
mod resting;
#[cfg(test)]
mod tests;
mod watching;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::ffi::OsString;
use std::fs::{DirEntry, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};
use uuid::Uuid;

pub use self::reading::UNTERMINATED_QUIET;
pub use self::watching::{Doorbell, Unread, do_notifications_arrive};

use self::descent::{Beginning, Fresh};
use self::polling::Active;
use self::reading::{Followed, Progress, Stamp};
use self::resting::{Group, Met, Rest, Resting};
use self::watching::{Silence, Watch};
use super::retention::Retention;
use super::sessions::{self, Closing, OpenSessions, Roots};
use super::{Intake, Submission};
use crate::claude::line::{self, TranscriptKind};
use crate::claude::session::{End, EndReason};
use crate::claude::transcript;
use crate::event::{Cursor, FileIdentity, Origin, Sequence, SessionState, Timestamp};
use crate::queue::{Batch, CursorId, QueueError};
use crate::telemetry::RescanCause;

/// How often the wait for room looks whether it is to stop.
const ROOM_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Folders deep that are searched: `<project>/<session>/subagents/workflows/<run>/agent-x.jsonl` and some room.
const DEPTH_MAX: usize = 8;

/// Ends of sessions, or files that have gone, in one batch.
const BATCH_SESSIONS_MAX: usize = 256;

/// Of batches that are gathered while one is not durable yet: cursors, and bytes of payloads.
const BATCH_CURSORS_MAX: usize = 256;
const BATCH_BYTES: usize = 64 << 10;

/// Files that are taken up or woken before others are put to rest.
const FILES_AT_ONCE_MAX: usize = 512;

/// After a rescan that something unknown led to, the next such waits for so many times as long as it took: with many
/// files and many new ones rescans take a fifth of a core, not all of it.
const RESCAN_PAUSE_FACTOR: u32 = 4;

/// Least pause between two rescans.
const RESCAN_PAUSE_MIN: Duration = Duration::from_millis(2);

#[derive(Clone, Debug)]
pub struct FollowConfig {
    /// The folders that hold project folders, outside of each other. Beside each Claude Code keeps `sessions/` and
    /// `settings.json`.
    pub projects: Vec<PathBuf>,
    pub polling_interval: Duration,
    /// Time to gather notifications before files are read; zero reads at once.
    pub debounce: Duration,
    pub line_bytes_max: u64,
    /// Quiet after which a session has ended.
    pub inactivity_timeout: Duration,
    /// Files above which those are put to rest that were read to their end, the longest ago first.
    pub awake_max: usize,
}

/// What is usual for [`FollowConfig::awake_max`]: more than anybody works in at once, and half a megabyte.
pub const AWAKE_MAX: usize = 1024;

/// What is known of one of the folders that hold project folders.
#[derive(Clone, Default)]
struct Root {
    /// Whether the last walk found project folders in it. If not, what is missing below it is not known to be gone.
    is_there: bool,
    /// Logged: it can't be read.
    is_missing: bool,
    /// Logged: there is no project folder left, though transcripts are known.
    is_emptied: bool,
    /// It is another of the folders.
    is_second_name: bool,
    silence: Silence,
}

/// What a walk through the folders has come upon.
struct Walk {
    /// Files that are awake.
    met: Vec<Arc<Path>>,
    /// What rests and has changed.
    changed: BTreeSet<Group>,
    fresh: Vec<PathBuf>,
}

/// Follows all transcripts below the projects folders.
pub struct Follower {
    config: FollowConfig,
    intake: Arc<Intake>,
    /// Those that are awake. Boxed, since a map has room for up to twice as many as are in it.
    files: HashMap<Arc<Path>, Box<Followed>>,
    resting: Resting,
    /// Cursors of files that were moved to here and are not followed yet.
    adopted: HashMap<PathBuf, Cursor>,
    /// Files with a cursor in the queue that are no transcripts by what is known today.
    strays: Vec<PathBuf>,
    /// The batch that was handed over last, until it is durable: meanwhile the next one is made. Only then that one is
    /// handed over, so that no cursor runs ahead of the events before it.
    under_way: Option<(Submission, Batch)>,
    /// What came after it while it was not durable: of many small files many share a sync.
    gathered: Batch,
    /// It was stopped while a batch found no room.
    is_cut_off: bool,
    /// Cursors that moved over lines which are no events.
    moved: BTreeMap<Arc<Path>, Cursor>,
    /// Files of which was said that their last line is incomplete.
    incomplete_logged: u32,
    /// Files of which was said that they were modified in place.
    changes_logged: u32,
    buffer: Vec<u8>,
    /// Bytes that are read at once.
    chunk_bytes: usize,
    doorbell: Doorbell,
    watch: Watch,
    active: Active,
    retention: Retention,
    /// SessionEnd hooks that are to be looked at.
    closings: BTreeMap<Uuid, Closing>,
    open_sessions: OpenSessions,
    /// Those whose files this rescan has found to be new, and has not come to yet.
    new_sessions: HashSet<Uuid>,
    /// What was known before this rescan, or this round, once somebody has asked.
    known_roots: Option<descent::Roots>,
    /// Sessions that a process was seen to have open in this run.
    seen_open: HashSet<Uuid>,
    /// In the order of [`FollowConfig::projects`].
    roots: Vec<Root>,
    /// Folders of which was said that they can't be read.
    unreadable: BTreeSet<PathBuf>,
    /// Files are read to their end one after the other, so that originals come before their copies: at the first pass,
    /// and whenever a copy is new.
    in_order: bool,
    /// Why the next rescan will be done.
    cause: RescanCause,
}

impl Follower {
    /// Takes up the cursors in the queue; reads nothing yet.
    pub fn new(config: FollowConfig, intake: Arc<Intake>) -> Result<Follower, QueueError> {
        let mut resting = Resting::default();
        let mut strays = Vec::new();
        let mut processes = Vec::new();
        // What an earlier run read may still wait in the queue.
        let newest = intake.queue().stats().last_sequence;
        intake.queue().for_each_cursor(|path, cursor| {
            if let (Some(session), Some(at)) = (sessions::closing_of(&path), cursor.session.ended_through) {
                intake.note_closing(session, Closing::noted(at));
            } else if let Some(root) = root_of(&config.projects, &path) {
                processes.extend(cursor.session.process.map(|pid| (Roots::of(root), pid)));
                match kind_of(&config.projects, &path) {
                    Some(kind) => {
                        let rest = Rest::new(root, None, newest, cursor.project_path.is_some());
                        resting.insert(Group::of(&kind, &path), CursorId::of(&path), rest);
                    }
                    None => strays.push(path),
                }
            }
        })?;
        let retention = Retention::new(&config.projects);
        let session_folders = config.projects.iter().map(|projects| projects.with_file_name("sessions"));
        let open_sessions = OpenSessions::new(session_folders, &processes);
        let roots = vec![Root::default(); config.projects.len()];
        Ok(Follower {
            config,
            intake,
            files: HashMap::new(),
            resting,
            adopted: HashMap::new(),
            strays,
            under_way: None,
            gathered: Batch::default(),
            is_cut_off: false,
            moved: BTreeMap::new(),
            incomplete_logged: 0,
            changes_logged: 0,
            buffer: Vec::new(),
            chunk_bytes: reading::CHUNK_BYTES,
            doorbell: Doorbell::new(),
            watch: Watch::default(),
            active: Active::default(),
            retention,
            closings: BTreeMap::new(),
            open_sessions,
            new_sessions: HashSet::new(),
            known_roots: None,
            seen_open: HashSet::new(),
            roots,
            unreadable: BTreeSet::new(),
            in_order: true,
            cause: RescanCause::Start,
        })
    }

    pub fn doorbell(&self) -> Doorbell {
        self.doorbell.clone()
    }

    /// Reads until stopped. An error is the queue's.
    pub fn run(mut self) -> Result<(), QueueError> {
        let mut next_rescan = Instant::now();
        // When something unknown may lead to a rescan again.
        let mut not_before = next_rescan;
        let mut more: BTreeSet<Arc<Path>> = BTreeSet::new();
        while !self.doorbell.is_stopped() {
            self.intake.metrics().live.reading.beat();
            if Instant::now() >= next_rescan {
                let begun = Instant::now();
                self.watch.renew(&self.config.projects, &self.doorbell);
                more.extend(self.rescan()?);
                self.await_batch()?;
                let idle = more.is_empty()
                    && !self.open_sessions.is_undecided()
                    && !self.files.values().any(|file| file.unterminated.is_some());
                self.doorbell.set_idle(idle);
                let now = Instant::now();
                next_rescan = now + self.config.polling_interval;
                not_before = now + (RESCAN_PAUSE_FACTOR * begun.elapsed()).max(RESCAN_PAUSE_MIN);
            }
            let next_look = self.active.next_check().map_or(next_rescan, |check| check.min(next_rescan));
            let patience =
                if more.is_empty() { next_look.saturating_duration_since(Instant::now()) } else { Duration::ZERO };
            let rung = self.doorbell.wait(patience, self.config.debounce);
            self.watch.heed(&rung);
            let mut wants_rescan = None;
            if rung.rescan {
                wants_rescan = Some(RescanCause::Overflow);
            }
            for path in rung.paths {
                if let Some(root) = self.root_mut(&path) {
                    root.silence = Silence::default();
                }
                self.wake_file(&path)?;
                match self.files.get(path.as_path()) {
                    Some(file) => drop(more.insert(Arc::clone(&file.path))),
                    // In a new folder files may have been born before its watch was set.
                    None if wants_rescan.is_none() && (self.kind_of(&path).is_some() || path.is_dir()) => {
                        wants_rescan = Some(RescanCause::NewFolder);
                    }
                    None => {}
                }
            }
            for path in self.check_active() {
                if more.insert(Arc::clone(&path)) {
                    self.note_silence(&path);
                }
            }
            if let Some(cause) = wants_rescan
                && not_before < next_rescan
            {
                next_rescan = not_before;
                self.cause = cause;
            }
            if wants_rescan.is_some() || !more.is_empty() {
                self.doorbell.set_idle(false);
            }
            // Those that skip a line that is too long share one turn.
            let mut has_skipped = false;
            self.known_roots = None;
            for path in std::mem::take(&mut more) {
                if self.doorbell.is_stopped() {
                    break;
                }
                let waits = self.is_skipping(&path) && std::mem::replace(&mut has_skipped, true);
                if waits || self.look_at(&path)? == Progress::More {
                    more.insert(path);
                }
            }
            self.flush_moved()?;
            self.await_batch()?;
        }
        self.flush_moved()?;
        self.await_batch()
    }

    /// Looks at every transcript. Gives those with more to read.
    fn rescan(&mut self) -> Result<Vec<Arc<Path>>, QueueError> {
        let begun = Timestamp::now();
        self.known_roots = None;
        let mut awake = self.take_closings()?;
        let followed = self.files.values().filter_map(|file| Some((file.roots, file.cursor.session.process?)));
        let known: Vec<_> = followed.chain(self.resting.processes()).collect();
        self.open_sessions.look(&known);
        let Walk { met, changed, fresh } = self.walk();
        awake.extend(self.wake_vanished()?);
        let vanished = self.vanished(&met);
        let vanished = self.adopt_moved(&fresh, vanished)?;
        let fresh = self.in_order_of_reading(fresh)?;
        self.new_sessions = fresh.iter().filter_map(|fresh| self.session_of(&fresh.path)).collect();
        awake.extend(met);
        let mut unfinished = self.look_at_all(awake)?;
        unfinished.extend(self.in_parts(changed, Follower::wake)?);
        unfinished.extend(self.in_parts(fresh, Follower::follow)?);
        self.new_sessions.clear();
        self.known_roots = None;
        if self.doorbell.is_stopped() {
            return Ok(unfinished);
        }
        self.forget(vanished, begun)?;
        self.end_sessions(&unfinished, begun)?;
        self.end_other_sessions(&unfinished, begun)?;
        self.put_to_rest()?;
        self.seen_open.extend(self.resting.named(&self.open_sessions));
        for sessions in self.resting.due(begun, &self.open_sessions).chunks(FILES_AT_ONCE_MAX) {
            if self.doorbell.is_stopped() {
                return Ok(unfinished);
            }
            let mut paths = Vec::new();
            for session in sessions {
                self.resting.forget_live(*session);
                paths.extend(self.wake(Group::of_session(*session))?);
            }
            unfinished.extend(self.look_at_all(paths)?);
            self.end_sessions(&unfinished, begun)?;
            self.put_to_rest()?;
        }
        self.note_open_sessions()?;
        self.report();
        self.in_order = false;
        Ok(unfinished)
    }

    /// Takes in the SessionEnd hooks that have arrived. Returns the transcripts of their sessions that were parked.
    fn take_closings(&mut self) -> Result<Vec<Arc<Path>>, QueueError> {
        let mut awake = Vec::new();
        for (session, closing) in self.intake.take_closings(|| self.doorbell.set_idle(false)) {
            awake.extend(self.wake(Group::of_session(session))?);
            self.closings.insert(session, closing);
        }
        Ok(awake)
    }

    /// Follows what `take_up` makes of the items, and looks at it, so many at a time that not all are in memory at once.
    /// Gives those with more to read.
    fn in_parts<T>(
        &mut self,
        items: impl IntoIterator<Item = T>,
        mut take_up: impl FnMut(&mut Follower, T) -> Result<Vec<Arc<Path>>, QueueError>,
    ) -> Result<Vec<Arc<Path>>, QueueError> {
        let mut items = items.into_iter().peekable();
        let mut unfinished = Vec::new();
        while items.peek().is_some() && !self.doorbell.is_stopped() {
            let mut paths = Vec::new();
            for item in items.by_ref().take(FILES_AT_ONCE_MAX) {
                paths.extend(take_up(self, item)?);
            }
            unfinished.extend(self.look_at_all(paths)?);
            self.put_to_rest()?;
        }
        Ok(unfinished)
    }

    /// Looks at the files in this order; where it matters each is read to its end before the next. Gives those with more
    /// to read.
    fn look_at_all(&mut self, paths: Vec<Arc<Path>>) -> Result<Vec<Arc<Path>>, QueueError> {
        let mut unfinished = Vec::new();
        let mut paths = VecDeque::from(paths);
        while let Some(path) = paths.pop_front() {
            if self.doorbell.is_stopped() {
                return Ok(unfinished);
            }
            if self.is_skipping(&path) {
                unfinished.push(path);
                continue;
            }
            let progress = self.look_at(&path)?;
            // What skips a line that is too long has no events that others could come after.
            if !self.in_order || self.is_skipping(&path) {
                unfinished.extend((progress == Progress::More).then_some(path));
                continue;
            }
            if progress == Progress::More {
                paths.push_front(path);
            }
        }
        self.flush_moved()?;
        self.await_batch()?;
        Ok(unfinished)
    }

    /// Whether the file has more of a line that is too long to be read.
    fn is_skipping(&self, path: &Path) -> bool {
        self.files.get(path).is_some_and(|file| file.is_skipping(self.config.line_bytes_max))
    }

    /// Goes through the folders.
    fn walk(&mut self) -> Walk {
        let mut walk = Walk { met: Vec::new(), changed: BTreeSet::new(), fresh: Vec::new() };
        let mut unreadable = BTreeSet::new();
        self.resting.begin_walk();
        for index in 0..self.config.projects.len() {
            let Some(projects) = self.config.projects.get(index).cloned() else { break };
            let is_walked =
                !self.is_second_name(index, &projects) && self.walk_root(&projects, &mut walk, &mut unreadable);
            if !is_walked {
                unreadable.extend(self.unreadable.iter().filter(|folder| folder.starts_with(&projects)).cloned());
            }
            // Removed during the walk, or unmounted: then what was not found says nothing.
            let is_there = is_walked && has_folders(&projects);
            let is_known =
                || self.files.keys().any(|path| path.starts_with(&projects)) || self.resting.is_any_below(index);
            let is_emptied = is_walked && !is_there && is_known();
            let Some(root) = self.roots.get_mut(index) else { break };
            if is_emptied && !std::mem::replace(&mut root.is_emptied, true) {
                warn!(folder = %projects.display(),
                      "the transcripts folder is empty; is it unmounted? Its sessions end by hook, process or inactivity only");
            }
            root.is_emptied = is_emptied || !is_walked && root.is_emptied;
            // At the start, and after the whole folder was away.
            self.in_order |= is_there && !root.is_there;
            root.is_there = is_there;
            if is_there && std::mem::take(&mut root.is_missing) {
                info!(folder = %projects.display(), "the transcripts folder is there");
            }
        }
        for folder in unreadable.difference(&self.unreadable) {
            warn!(folder = %folder.display(), "a folder can't be read; trying again at every rescan");
        }
        for folder in self.unreadable.difference(&unreadable) {
            info!(folder = %folder.display(), "the folder can be read again");
        }
        self.unreadable = unreadable;
        walk
    }

    /// Whether this folder is one that comes before it in the list, under another name.
    fn is_second_name(&mut self, index: usize, projects: &Path) -> bool {
        let before = self.config.projects.get(..index).unwrap_or_default();
        if before.is_empty() {
            return false;
        }
        let identity_of = |folder: &Path| std::fs::metadata(folder).map(|metadata| identity(&metadata)).ok();
        let own = identity_of(projects);
        let first = before.iter().find(|folder| own.is_some() && identity_of(folder) == own);
        let Some(root) = self.roots.get_mut(index) else { return false };
        if let Some(first) = first
            && !root.is_second_name
        {
            warn!(folder = %projects.display(), first = %first.display(),
                  "two of the transcripts folders are the same one; it is followed by the first name");
        }
        root.is_second_name = first.is_some();
        root.is_second_name
    }

    /// Goes through one of the folders. False: it can't be read, or the follower was stopped.
    fn walk_root(&mut self, projects: &Path, walk: &mut Walk, unreadable: &mut BTreeSet<PathBuf>) -> bool {
        for entry in walkdir::WalkDir::new(projects).follow_links(true).max_depth(DEPTH_MAX) {
            // Many entries on a slow file system are no hang.
            self.intake.metrics().live.reading.beat();
            if self.doorbell.is_stopped() {
                return false;
            }
            match entry {
                Ok(entry) if entry.depth() == 0 && !entry.file_type().is_dir() => {
                    if self.root_mut(projects).is_some_and(|root| !std::mem::replace(&mut root.is_missing, true)) {
                        warn!(folder = %projects.display(),
                              "the transcripts folder is no folder; looking for it again at every rescan");
                    }
                    return false;
                }
                Ok(entry) if entry.file_type().is_file() => {
                    if let Some(file) = self.files.get(entry.path()) {
                        walk.met.push(Arc::clone(&file.path));
                    } else if let Some(kind) = self.kind_of(entry.path()) {
                        let group = Group::of(&kind, entry.path());
                        let stamp = || entry.metadata().ok().map(|metadata| Stamp::of(&metadata));
                        match self.resting.meet(group, entry.path(), stamp) {
                            Met::Unchanged => {}
                            Met::Changed => drop(walk.changed.insert(group)),
                            Met::Unknown => walk.fresh.push(entry.into_path()),
                        }
                    }
                }
                Ok(_) => {}
                Err(error) if error.depth() == 0 => {
                    if self.root_mut(projects).is_some_and(|root| !std::mem::replace(&mut root.is_missing, true)) {
                        warn!(folder = %projects.display(), error = %error,
                              "the transcripts folder can't be read; looking for it again at every rescan");
                    }
                    return false;
                }
                Err(error) => {
                    let is_denied =
                        error.io_error().is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
                    match error.path() {
                        Some(path) if is_denied => drop(unreadable.insert(path.to_owned())),
                        // Links that lead nowhere or in circles, and what went while we looked.
                        _ => debug!(error = %error, "passed over"),
                    }
                }
            }
        }
        true
    }

    fn kind_of(&self, path: &Path) -> Option<TranscriptKind> {
        kind_of(&self.config.projects, path)
    }

    fn roots_of(&self, path: &Path) -> Roots {
        root_of(&self.config.projects, path).map_or(Roots::default(), Roots::of)
    }

    fn root_mut(&mut self, path: &Path) -> Option<&mut Root> {
        root_of(&self.config.projects, path).and_then(|index| self.roots.get_mut(index))
    }

    /// Notes that a check has found this file to have changed, and no notification.
    fn note_silence(&mut self, path: &Path) {
        let Some(index) = root_of(&self.config.projects, path) else { return };
        let (Some(folder), Some(root)) = (self.config.projects.get(index), self.roots.get_mut(index)) else { return };
        // No watch reports what a link leads to elsewhere.
        let is_inside = |path: PathBuf| folder.canonicalize().is_ok_and(|folder| path.starts_with(folder));
        if path.canonicalize().is_ok_and(is_inside) && root.silence.is_certain() {
            root.silence = Silence::default();
            self.watch.note_silence(folder);
        }
    }

    /// Whether the projects folder that holds this path was there at the last walk.
    fn is_root_there(&self, path: &Path) -> bool {
        let root = root_of(&self.config.projects, path).and_then(|index| self.roots.get(index));
        root.is_some_and(|root| root.is_there)
    }

    /// The transcripts that are gone for certain.
    fn vanished(&mut self, met: &[Arc<Path>]) -> Vec<PathBuf> {
        let met: HashSet<&Path> = met.iter().map(AsRef::as_ref).collect();
        let strays = self.strays.iter().map(PathBuf::as_path);
        let followed = self.files.keys().map(AsRef::as_ref).filter(|path| !met.contains(path));
        let is_gone = |path: &&Path| self.is_root_there(path) && is_gone(path);
        let vanished: Vec<PathBuf> = strays.chain(followed).filter(is_gone).map(Path::to_owned).collect();
        for path in &vanished {
            // It stays awake until it is forgotten.
            if let Some(file) = self.files.get_mut(path.as_path()) {
                file.seen = None;
            }
        }
        vanished
    }

    /// Gives fresh files the cursors of those of the same name that are gone. Gives the others that are gone.
    fn adopt_moved(&mut self, fresh: &[PathBuf], vanished: Vec<PathBuf>) -> Result<Vec<PathBuf>, QueueError> {
        let mut by_name: HashMap<OsString, Vec<PathBuf>> = HashMap::new();
        for path in vanished {
            by_name.entry(path.file_name().unwrap_or_default().to_owned()).or_default().push(path);
        }
        let mut batch = Batch::default();
        for path in fresh {
            if self.doorbell.is_stopped() {
                break;
            }
            let Some(gone) = path.file_name().and_then(|name| by_name.get_mut(name)) else { continue };
            if self.adopted.contains_key(path) {
                continue;
            }
            let Some(gone) = gone.pop() else { continue };
            let Some(cursor) = self.take_cursor(&gone)? else { continue };
            self.intake.metrics().live.reading.beat();
            info!(from = %gone.display(), to = %path.display(), "a transcript was moved");
            batch.cursors.extend([(gone, None), (path.clone(), Some(cursor.clone()))]);
            self.adopted.insert(path.clone(), cursor);
            if batch.cursors.len() >= BATCH_SESSIONS_MAX {
                self.submit(std::mem::take(&mut batch))?;
            }
        }
        self.submit(batch)?;
        Ok(by_name.into_values().flatten().collect())
    }

    /// Follows a new file. Gives what is to be looked at: it, and what was woken, as all transcripts of a session are awake or
    /// none.
    fn follow(&mut self, fresh: Fresh) -> Result<Vec<Arc<Path>>, QueueError> {
        let Fresh { path, ancestors, .. } = fresh;
        let Some(kind) = self.kind_of(&path) else { return Ok(Vec::new()) };
        if let TranscriptKind::Main { session } = kind {
            self.new_sessions.remove(&session);
        }
        let mut paths = self.wake(Group::of(&kind, &path))?;
        let adopted = self.adopted.remove(&path);
        let is_known = adopted.is_some();
        let path: Arc<Path> = path.into();
        let mut file =
            Followed::new(self.roots_of(&path), Arc::clone(&path), kind, adopted.unwrap_or(transcript::START));
        // What was read at its place before may still wait in the queue.
        file.newest = self.intake.queue().stats().last_sequence.filter(|_| is_known);
        file.beginning = ancestors.map(|ancestors| Box::new(Beginning::of_copy_of(ancestors)));
        self.files.insert(Arc::clone(&path), Box::new(file));
        paths.push(path);
        Ok(paths)
    }

    fn session_of(&self, path: &Path) -> Option<Uuid> {
        match self.kind_of(path)? {
            TranscriptKind::Main { session } => Some(session),
            TranscriptKind::SubAgent => None,
        }
    }

    /// Whether a session has a file of its own that has registered it, or was not read yet.
    fn has_transcript(&self, session: Uuid) -> bool {
        let is_its = |file: &Followed| matches!(file.kind, TranscriptKind::Main { session: its } if its == session);
        let registers = |file: &Followed| file.cursor.project_path.is_some() || file.seen.is_none();
        self.new_sessions.contains(&session)
            || self.resting.registers(Group::of_session(session))
            || self.files.values().any(|file| is_its(file) && registers(file))
    }

    /// The cursor of a file that is followed no more.
    fn take_cursor(&mut self, path: &Path) -> Result<Option<Cursor>, QueueError> {
        self.strays.retain(|stray| stray != path);
        match self.files.remove(path) {
            Some(file) => Ok(Some(file.cursor)),
            None => Ok(self.intake.queue().cursor(CursorId::of(path))?.map(|(_, cursor)| cursor)),
        }
    }

    /// Forgets files that are gone, and their cursors: should one come back it is read anew, which is harmless. A
    /// session whose last transcript this was has ended.
    fn forget(&mut self, vanished: Vec<PathBuf>, now: Timestamp) -> Result<(), QueueError> {
        if vanished.is_empty() {
            return Ok(());
        }
        let mut transcripts = self.transcripts_by_session();
        for paths in vanished.chunks(BATCH_SESSIONS_MAX) {
            if self.doorbell.is_stopped() {
                break;
            }
            self.intake.metrics().live.reading.beat();
            let mut batch = Batch::default();
            for path in paths {
                let was_followed = self.files.contains_key(path.as_path());
                self.end_other_of(path, now, &mut batch);
                let Some(cursor) = self.take_cursor(path)? else { continue };
                debug!(file = %path.display(), "transcript gone");
                if let Some(TranscriptKind::Main { session }) = self.kind_of(path).filter(|_| was_followed)
                    && let Some(others) = transcripts.get_mut(&session)
                {
                    *others -= 1;
                }
                if let Some(TranscriptKind::Main { session }) = self.kind_of(path)
                    && cursor.project_path.is_some()
                    && transcripts.get(&session).is_none_or(|others| *others == 0)
                {
                    let closing = self.closings.remove(&session);
                    let gone =
                        closing.map_or((EndReason::Unregistered, now), |closing| (EndReason::Closed, closing.at));
                    if let Some(end) = cursor.session.end(now, self.config.inactivity_timeout, Some(gone)) {
                        self.admit_end(session, &end, path, &cursor, &mut batch);
                    }
                    if closing.is_some() {
                        batch.cursors.push((sessions::closing_path(session), None));
                    }
                }
                batch.cursors.push((path.clone(), None));
            }
            self.submit(batch)?;
        }
        Ok(())
    }

    /// Ends the session that a file, which is gone, was the last to tell of.
    fn end_other_of(&self, path: &Path, now: Timestamp, batch: &mut Batch) {
        let Some(file) = self.files.get(path) else { return };
        let Some(other) = file.other().filter(|other| !self.has_transcript(other.session)) else { return };
        let gone = Some((EndReason::Unregistered, now));
        if let Some(end) = other.end(now, self.config.inactivity_timeout, gone) {
            self.admit_end(other.session, &end, path, &file.cursor, batch);
        }
    }

    /// The session of a transcript that has not ended by what is known of it, or of which a hook says that it has.
    fn live_session(&self, file: &Followed) -> Option<Uuid> {
        let TranscriptKind::Main { session } = file.kind else { return None };
        let is_live = file.cursor.session.is_live() || self.closings.contains_key(&session);
        (file.cursor.project_path.is_some() && is_live).then_some(session)
    }

    /// How many transcripts each session has.
    fn transcripts_by_session(&self) -> HashMap<Uuid, usize> {
        let mut transcripts = HashMap::new();
        for file in self.files.values() {
            if let TranscriptKind::Main { session } = file.kind {
                *transcripts.entry(session).or_default() += 1;
            }
        }
        transcripts
    }

    fn admit_end(&self, session: Uuid, end: &End, path: &Path, cursor: &Cursor, batch: &mut Batch) {
        debug!(session = %session, reason = end.reason.as_str(), "session ended");
        let origin = Origin::Transcript { path: path.to_string_lossy().into(), offset: cursor.offset };
        self.intake.admit(end.candidate(session, origin), batch);
    }

    /// Tells the ends of sessions that have come. Files that were not read to their end may hold more activity: their
    /// sessions wait.
    fn end_sessions(&mut self, unfinished: &[Arc<Path>], now: Timestamp) -> Result<(), QueueError> {
        let live: HashSet<Uuid> = self.files.values().filter_map(|file| self.live_session(file)).collect();
        let session_of = |file: &Followed| match file.kind {
            TranscriptKind::Main { session } => Some(session).filter(|session| live.contains(session)),
            _ => None,
        };
        let files = self.files.values();
        let mut paths: Vec<_> = files.filter_map(|file| Some((session_of(file)?, Arc::clone(&file.path)))).collect();
        paths.sort_unstable();
        let mut batch = Batch::default();
        for paths in paths.chunk_by(|(one, _), (other, _)| one == other) {
            let Some(&(session, _)) = paths.first() else { continue };
            let mut standing = Standing::default();
            for file in paths.iter().filter_map(|(_, path)| self.files.get(path)) {
                standing.add(file, unfinished.contains(&file.path));
            }
            if !standing.is_read {
                continue;
            }
            let process =
                self.open_sessions.process(session, standing.roots, standing.state.process, standing.modified);
            if self.open_sessions.named(session).is_some() {
                self.seen_open.insert(session);
            }
            let closing = self.closings.remove(&session);
            let gone = self.gone(session, &standing, process, closing, now);
            let end = standing.state.end(now, self.config.inactivity_timeout, gone);
            if end.is_none() && closing.is_none() && standing.state.process == process {
                continue;
            }
            let Some(first) = standing.paths.first() else { continue };
            if let Some(end) = &end
                && let Some(file) = self.files.get(first)
            {
                self.admit_end(session, end, first, &file.cursor, &mut batch);
            }
            for path in &standing.paths {
                let Some(file) = self.files.get_mut(path) else { continue };
                match &end {
                    Some(end) => file.cursor.session.ended(end),
                    None => file.cursor.session.process = process,
                }
                batch.cursors.push((path.to_path_buf(), Some(file.cursor.clone())));
            }
            if closing.is_some() {
                batch.cursors.push((sessions::closing_path(session), None));
            }
            if end.is_some() {
                self.seen_open.remove(&session);
            }
            if batch.cursors.len() >= BATCH_SESSIONS_MAX {
                self.submit(std::mem::take(&mut batch))?;
            }
        }
        self.close_without_transcript(&mut batch);
        self.submit(batch)
    }

    /// Tells the ends of sessions that are only named in other sessions' files, by timeout.
    fn end_other_sessions(&mut self, unfinished: &[Arc<Path>], now: Timestamp) -> Result<(), QueueError> {
        let end_of = |file: &Followed| {
            let other = file.other().filter(|_| file.seen.is_some())?;
            let is_told = self.has_transcript(other.session);
            // Its own file tells its end; should that go, it has been told.
            let at_once = is_told.then_some((EndReason::Closed, now));
            let end = other.end(now, self.config.inactivity_timeout, at_once)?;
            Some((Arc::clone(&file.path), other.session, end, is_told))
        };
        let ended: Vec<_> = self.files.values().filter_map(|file| end_of(file)).collect();
        let mut batch = Batch::default();
        for (path, session, end, is_told) in ended.into_iter().filter(|(path, ..)| !unfinished.contains(path)) {
            let Some(file) = self.files.get(&path) else { continue };
            if !is_told {
                self.admit_end(session, &end, &path, &file.cursor, &mut batch);
            }
            let Some(file) = self.files.get_mut(&path) else { continue };
            file.note_end_of_other(&end);
            batch.cursors.push((path.to_path_buf(), Some(file.cursor.clone())));
        }
        self.submit(batch)
    }

    /// How and when a session has ended otherwise than by timeout.
    fn gone(
        &self,
        session: Uuid,
        standing: &Standing,
        process: Option<u32>,
        closing: Option<Closing>,
        now: Timestamp,
    ) -> Option<(EndReason, Timestamp)> {
        let Standing { state, advanced_at, modified, .. } = standing;
        let is_resumed = |closing: &Closing| closing.is_resumed(state.last_activity, *advanced_at, *modified);
        let by_hook = closing.filter(|closing| !is_resumed(closing)).map(|closing| closing.at);
        let by_process = (process.is_none() && standing.state.process.is_some()).then(|| {
            // Noticed just now, or it went while nobody looked: then the file's last change is the last sign of life.
            let last_sign = Timestamp::from_second(standing.modified).unwrap_or(now);
            if self.seen_open.contains(&session) { now } else { last_sign.min(now) }
        });
        [by_hook, by_process].into_iter().flatten().min().map(|at| (EndReason::Closed, at))
    }

    /// Ends sessions of which no transcript is there: their hooks are all that tells of them.
    fn close_without_transcript(&mut self, batch: &mut Batch) {
        if self.closings.is_empty() {
            return;
        }
        let known: HashSet<Uuid> = self
            .files
            .values()
            .filter_map(|file| match file.kind {
                // One that was read and is not registered holds nothing but metadata.
                TranscriptKind::Main { session }
                    if file.cursor.project_path.is_some() || file.seen.is_none() || file.unterminated.is_some() =>
                {
                    Some(session)
                }
                _ => None,
            })
            .collect();
        let without: Vec<(Uuid, Closing)> = self
            .closings
            .iter()
            .map(|(session, closing)| (*session, *closing))
            .filter(|(session, _)| !known.contains(session))
            .take(BATCH_SESSIONS_MAX)
            .collect();
        for (session, closing) in without {
            let at = closing.at;
            self.closings.remove(&session);
            let state = SessionState { began_at: None, last_activity: Some(at), ..SessionState::default() };
            if let Some(end) = state.end(at, self.config.inactivity_timeout, Some((EndReason::Closed, at))) {
                self.intake.admit(end.candidate(session, Origin::Hook), batch);
            }
            batch.cursors.push((sessions::closing_path(session), None));
        }
    }

    /// Tells the metrics how things stand.
    fn report(&mut self) {
        let metrics = self.intake.metrics();
        let resting = || self.resting.looked_at();
        metrics.live.files_watched.set((self.files.len() + resting().count()) as u64);
        let sessions = self.files.values().filter(|file| file.cursor.project_path.is_some()).count()
            + resting().filter(|rest| rest.is_registered).count();
        metrics.live.sessions_known.set(sessions as u64);
        let now = Timestamp::now();
        let waiting = self.intake.queue().stats().oldest.map(|(sequence, _)| sequence);
        let is_delivered =
            |newest: Option<Sequence>| waiting.is_none_or(|oldest| newest.is_none_or(|newest| newest < oldest));
        let expires_before = self.retention.expires_before(now).as_second();
        let expires = |modified: Option<i64>| modified.is_some_and(|modified| modified < expires_before);
        let is_stored = |file: &Followed| file.seen.is_some() && !file.unreadable && is_delivered(file.newest);
        let expiring = self.files.values().filter(|file| expires(file.modified) && !is_stored(file)).count()
            + resting()
                .filter(|rest| expires(rest.seen.map(|seen| seen.modified)) && !is_delivered(rest.newest))
                .count();
        metrics.live.transcripts_expiring.set(expiring as u64);
        // What does not exist has nothing to be read.
        let roots = self.config.projects.iter().zip(&self.roots);
        let hidden = roots.filter(|(projects, root)| root.is_missing && !is_gone(projects)).count();
        self.doorbell.set_unread(Unread {
            files: self.files.values().filter(|file| file.unreadable).count(),
            folders: self.unreadable.len() + hidden,
        });
        metrics.rescanned(std::mem::replace(&mut self.cause, RescanCause::Interval), now);
    }

    /// Hands over the cursors that moved over lines which are no events.
    fn flush_moved(&mut self) -> Result<(), QueueError> {
        if self.moved.is_empty() {
            return Ok(());
        }
        let cursors = self.take_moved().collect();
        self.submit(Batch { cursors, ..Batch::default() })
    }

    fn take_moved(&mut self) -> impl Iterator<Item = (PathBuf, Option<Cursor>)> + use<> {
        let moved = std::mem::take(&mut self.moved).into_iter();
        moved.map(|(path, cursor)| (path.to_path_buf(), Some(cursor)))
    }

    /// Hands a batch over once the one before it is durable; until then small ones are gathered. Nothing more is handed over once the
    /// follower is stopped while one finds no room: what is in memory is ahead of the queue then, and is forgotten.
    fn submit(&mut self, mut batch: Batch) -> Result<(), QueueError> {
        self.gathered.events.append(&mut batch.events);
        self.gathered.rejections.append(&mut batch.rejections);
        self.gathered.cursors.append(&mut batch.cursors);
        let is_free = self.under_way.as_ref().is_none_or(|(submission, _)| submission.is_answered());
        if is_free || is_large(&self.gathered) { self.submit_gathered() } else { Ok(()) }
    }

    /// Waits until all is durable.
    fn await_batch(&mut self) -> Result<(), QueueError> {
        self.submit_gathered()?;
        self.await_one()
    }

    /// Hands over what was gathered.
    fn submit_gathered(&mut self) -> Result<(), QueueError> {
        self.await_one()?;
        let mut batch = std::mem::take(&mut self.gathered);
        if !batch.cursors.is_empty() && !self.is_cut_off {
            self.under_way = Some((self.intake.submit(&mut batch), batch));
        }
        Ok(())
    }

    /// Waits until the batch that was handed over is durable. One that finds no room is handed over again when there is some.
    fn await_one(&mut self) -> Result<(), QueueError> {
        let Some((mut submission, mut batch)) = self.under_way.take() else { return Ok(()) };
        let accepted = loop {
            match submission.wait() {
                Ok(accepted) => break accepted,
                Err(QueueError::Full { .. }) => self.wait_for_room(),
                Err(error) => return Err(error),
            }
            if self.doorbell.is_stopped() {
                self.is_cut_off = true;
                return Ok(());
            }
            submission = self.intake.submit(&mut batch);
        };
        if let Some(newest) = accepted.sequences.last() {
            for (path, _) in &batch.cursors {
                if let Some(file) = self.files.get_mut(path.as_path()) {
                    file.newest = Some(*newest);
                }
            }
        }
        Ok(())
    }

    /// Waits while the queue is full: the transcripts on disk are the buffer.
    fn wait_for_room(&self) {
        while !self.doorbell.is_stopped() && !self.intake.queue().wait_for_room(Instant::now() + ROOM_CHECK_INTERVAL) {
            self.intake.metrics().live.reading.beat();
        }
    }
}

/// Whether a batch is worth a sync of its own.
fn is_large(batch: &Batch) -> bool {
    let payloads = batch.events.iter().map(|event| event.payload().as_json().len());
    let kept = batch.rejections.iter().map(|rejection| rejection.bytes.len());
    batch.cursors.len() >= BATCH_CURSORS_MAX || payloads.chain(kept).sum::<usize>() >= BATCH_BYTES
}

/// How a session stands by all of its transcripts.
struct Standing {
    state: SessionState,
    roots: Roots,
    paths: Vec<Arc<Path>>,
    /// All of them were read to their end.
    is_read: bool,
    /// Seconds since 1970.
    modified: i64,
    /// When the latest activity was read in this run.
    advanced_at: Option<Instant>,
}

impl Default for Standing {
    fn default() -> Self {
        let state = SessionState::default();
        Standing { state, roots: Roots::default(), paths: Vec::new(), is_read: true, modified: 0, advanced_at: None }
    }
}

impl Standing {
    fn add(&mut self, file: &Followed, is_unfinished: bool) {
        self.state = self.state.merge(&file.cursor.session);
        self.roots = self.roots.union(file.roots);
        self.paths.push(Arc::clone(&file.path));
        // A last line without newline may be read in a moment.
        let is_read = file.seen.is_some() || file.unreadable || file.is_gone;
        self.is_read &= !is_unfinished && is_read && file.unterminated.is_none();
        self.modified = self.modified.max(file.modified.unwrap_or(0));
        self.advanced_at = self.advanced_at.max(file.advanced_at);
    }
}

/// Which of the projects folders holds this path.
fn root_of(projects: &[PathBuf], path: &Path) -> Option<usize> {
    projects.iter().position(|projects| path.starts_with(projects))
}

fn kind_of(projects: &[PathBuf], path: &Path) -> Option<TranscriptKind> {
    projects.iter().find_map(|projects| path.strip_prefix(projects).ok()).and_then(line::classify)
}

/// Whether there are any project folders. There are none below an unmounted file system.
fn has_folders(projects: &Path) -> bool {
    let is_folder = |entry: io::Result<DirEntry>| entry.is_ok_and(|entry| entry.path().is_dir());
    std::fs::read_dir(projects).is_ok_and(|mut entries| entries.any(is_folder))
}

/// Whether there is no such file for certain.
fn is_gone(path: &Path) -> bool {
    let gone = |kind| matches!(kind, io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
    std::fs::metadata(path).is_err_and(|error| gone(error.kind()))
}

fn identity(metadata: &Metadata) -> FileIdentity {
    FileIdentity { device: metadata.dev(), inode: metadata.ino() }
}
