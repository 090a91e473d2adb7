//! Follows the transcripts: discovers files, reads complete lines from where it left off, notices replacement, and emits the
//! ends of sessions.
//!
//! | File | Its part |
//! |---|---|
//! | `scanner` | walks through the folders: what is there, new, moved, gone |
//! | `followed` | what is remembered of one file |
//! | `tail` | one file: bytes to lines to cursor; pure, `verify` reads with it too |
//! | `reader` | one pass over one file: lines to events |
//! | `descent` | what a copy has inherited from its original |
//! | `outbox` | batches on their way into the queue |
//! | `ends` | when sessions have ended |
//! | `watching` | notifications |
//! | `polling` | checks of active files by `stat` |
//! | `compressed` | files that were compressed |
//! | `census` | what stands on disk, for `verify` |
//!
//! Notifications are hints. Correctness relies on the rescan by size every `polling_interval`; it finds what notifications
//! miss (overflow, limits, network homes, files created before their watch). A notified path that is not known yet leads to
//! a rescan, so that new files are read in the right order: copies of a session after what they were copied from.
//!
//! A file's cursor moves in the same queue transaction as the events of the lines before it, so it never runs ahead of them.
//! A file that was moved goes on at its cursor. Whatever can't be told for certain is read again, which stores nothing twice.
//!
//! Runs on a thread of its own. The only user of notify.

pub(crate) mod census;
pub(crate) mod compressed;
mod descent;
mod ends;
mod followed;
mod outbox;
pub(crate) mod polling;
mod reader;
mod scanner;
mod tail;
#[cfg(test)]
mod tests;
mod watching;

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{debug, info};
use uuid::Uuid;

pub(crate) use self::watching::{Doorbell, Unread, do_notifications_arrive};

use self::ends::{Ending, Ends};
use self::followed::{Access, Files, Followed};
use self::outbox::{Outbox, QueuePort};
use self::polling::Active;
use self::reader::{Logged, Progress};
use self::scanner::{Moves, Scan, Scanner};
use self::watching::Watch;
use super::Intake;
use super::retention::Retention;
use super::sessions::{Closing, Now};
use crate::agent::{Agent, AgentFolder};
use crate::event::{Cursor, Timestamp};
use crate::queue::{Batch, QueueError};
use crate::telemetry::RescanCause;
use crate::transcript::{START, TranscriptKind};

/// Ends of sessions, or files that have gone, in one batch.
const BATCH_SESSIONS_MAX: usize = 256;

/// After a rescan that something unknown led to, the next such waits for so many times as long as it took: with many
/// files and many new ones rescans take a fifth of a core, not all of it.
const RESCAN_PAUSE_FACTOR: u32 = 4;

/// Least pause between two rescans.
const RESCAN_PAUSE_MIN: Duration = Duration::from_millis(2);

#[derive(Clone, Debug)]
pub(crate) struct FollowConfig {
    /// The folders that the transcripts lie below, outside of each other.
    pub folders: Vec<AgentFolder>,
    pub polling_interval: Duration,
    /// Time to gather notifications before files are read; zero reads at once.
    pub debounce: Duration,
    pub line_bytes_max: u64,
    /// Quiet after which a session has ended.
    pub inactivity_timeout: Duration,
}

/// Follows all transcripts below the agents' folders.
pub(crate) struct Follower {
    config: FollowConfig,
    intake: Arc<Intake>,
    files: Files,
    /// The same text once, however many cursors have it.
    project_paths: HashSet<Arc<str>>,
    scanner: Scanner,
    outbox: Outbox<QueuePort>,
    ends: Ends,
    /// What was known before this rescan, or this round, once somebody has asked.
    known_families: Option<descent::Families>,
    logged: Logged,
    /// Bytes that are read at once.
    chunk_bytes: usize,
    doorbell: Doorbell,
    watch: Watch,
    active: Active,
    retention: Retention,
    /// Files are read to their end one after the other, so that originals come before their copies: at the first pass,
    /// and whenever a copy is new.
    in_order: bool,
    /// Why the next rescan will be done.
    cause: RescanCause,
}

impl Follower {
    /// Takes over the cursors in the queue; reads nothing yet.
    pub(crate) fn new(config: FollowConfig, intake: Arc<Intake>) -> Result<Follower, QueueError> {
        let now = Now::read();
        for (session, at) in intake.queue().session_ends()? {
            intake.note_closing(session, Closing::noted(at, now.wall));
        }
        let scanner = Scanner::new(config.folders.clone());
        let doorbell = Doorbell::default();
        let port = QueuePort { intake: Arc::clone(&intake), doorbell: doorbell.clone() };
        let outbox = Outbox::new(port, intake.queue().stats().last_sequence);
        let ends = Ends::new(&config.folders, config.inactivity_timeout);
        let mut follower = Follower {
            retention: Retention::new(&config.folders),
            config,
            intake: Arc::clone(&intake),
            files: Files::new(),
            project_paths: HashSet::new(),
            scanner,
            outbox,
            ends,
            known_families: None,
            logged: Logged::default(),
            chunk_bytes: tail::CHUNK_BYTES,
            doorbell,
            watch: Watch::default(),
            active: Active::default(),
            in_order: true,
            cause: RescanCause::Start,
        };
        intake.queue().for_each_cursor(|path, cursor| {
            // Of a folder that is not followed any more: should it come back, its files go on where they were.
            if let Some((agent, kind)) = follower.kind_of(&path) {
                follower.insert(path, agent, kind, cursor);
            }
        })?;
        Ok(follower)
    }

    pub(crate) fn doorbell(&self) -> Doorbell {
        self.doorbell.clone()
    }

    /// Reads until stopped. An error is the queue's.
    pub(crate) fn run(mut self) -> Result<(), QueueError> {
        let mut next_rescan = Instant::now();
        // When something unknown may lead to a rescan again.
        let mut not_before = next_rescan;
        let mut more: BTreeSet<Arc<Path>> = BTreeSet::new();
        while !self.doorbell.is_stopped() {
            self.intake.metrics().live.reading.beat();
            if Instant::now() >= next_rescan {
                let begun = Instant::now();
                self.watch.renew(&self.config.folders, &self.doorbell);
                more.extend(self.rescan(Now::read())?);
                self.outbox.flush()?;
                let is_undecided =
                    self.ends.is_undecided(Now::read()) || self.files.values().any(|file| file.unterminated.is_some());
                self.doorbell.set_idle(more.is_empty() && !is_undecided);
                let now = Instant::now();
                next_rescan = now + self.config.polling_interval;
                not_before = now + (RESCAN_PAUSE_FACTOR * begun.elapsed()).max(RESCAN_PAUSE_MIN);
            }
            let next_look = self.active.next_check().map_or(next_rescan, |check| check.min(next_rescan));
            let patience =
                if more.is_empty() { next_look.saturating_duration_since(Instant::now()) } else { Duration::ZERO };
            if let Some(cause) = self.wait_for_changes(patience, &mut more)
                && not_before < next_rescan
            {
                next_rescan = not_before;
                self.cause = cause;
            }
            self.read_round(&mut more)?;
            self.outbox.flush()?;
        }
        self.outbox.flush()
    }

    /// Waits for notifications, and checks the active files. Adds to `more` those that have changed; returns why a rescan is
    /// needed, if it is.
    fn wait_for_changes(&mut self, patience: Duration, more: &mut BTreeSet<Arc<Path>>) -> Option<RescanCause> {
        let rung = self.doorbell.wait(patience, self.config.debounce);
        self.watch.heed(&rung);
        let mut wants_rescan = rung.rescan.then_some(RescanCause::Overflow);
        for path in rung.paths {
            self.scanner.note_notification(&path);
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
            if more.insert(Arc::clone(&path))
                && let Some(folder) = self.scanner.note_silence(&path)
            {
                self.watch.note_silence(folder);
            }
        }
        if wants_rescan.is_some() || !more.is_empty() {
            self.doorbell.set_idle(false);
        }
        wants_rescan
    }

    /// Reads these files, a turn each. Those with more to read stay.
    fn read_round(&mut self, more: &mut BTreeSet<Arc<Path>>) -> Result<(), QueueError> {
        // Those that skip a line that is too long share one turn.
        let mut has_skipped = false;
        self.known_families = None;
        for path in std::mem::take(more) {
            if self.doorbell.is_stopped() {
                break;
            }
            let waits = self.is_skipping(&path) && std::mem::replace(&mut has_skipped, true);
            if waits || self.look_at(&path)? == Progress::More {
                more.insert(path);
            }
        }
        Ok(())
    }

    /// Looks at every transcript. Returns those with more to read.
    fn rescan(&mut self, now: Now) -> Result<Vec<Arc<Path>>, QueueError> {
        self.known_families = None;
        let closings = self.intake.take_closings(|| self.doorbell.set_idle(false));
        self.ends.look(closings, &self.files, now);
        let Scan { met, fresh, is_folder_new } = self.scan();
        self.in_order |= is_folder_new;
        let Moves { moved, gone } = scanner::moves(&fresh, self.scanner.vanished(&self.files, &met));
        let mut paths = self.adopt(moved)?;
        paths.extend(met);
        paths.extend(self.follow(fresh));
        let mut unfinished = self.look_at_all(paths)?;
        // Known from an earlier run, and not met: below a folder that is not there.
        let is_unseen = |file: &Followed| {
            file.seen.is_none() && file.access == Access::Readable && !unfinished.contains(&file.path)
        };
        let unseen = self.files.values().filter(|file| is_unseen(file)).map(|file| Arc::clone(&file.path)).collect();
        unfinished.extend(self.look_at_all(unseen)?);
        self.known_families = None;
        if self.doorbell.is_stopped() {
            return Ok(unfinished);
        }
        self.forget(gone, now.wall)?;
        self.end_sessions(&unfinished, now)?;
        self.note_open_sessions();
        self.report();
        self.in_order = false;
        Ok(unfinished)
    }

    fn scan(&mut self) -> Scan {
        let (intake, doorbell) = (&self.intake, &self.doorbell);
        // Many entries on a slow file system are no hang.
        self.scanner.scan(&self.files, &|| {
            intake.metrics().live.reading.beat();
            !doorbell.is_stopped()
        })
    }

    /// Notes that reading makes progress. False: it is to end.
    fn may_go_on(&self) -> bool {
        self.intake.metrics().live.reading.beat();
        !self.doorbell.is_stopped()
    }

    /// Reads the files in this order; where it matters each is read to its end before the next. Returns those with more
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
            } else if progress == Progress::More {
                paths.push_front(path);
            }
        }
        self.outbox.flush()?;
        Ok(unfinished)
    }

    /// Whether the file has more of a line that is too long to be read.
    fn is_skipping(&self, path: &Path) -> bool {
        self.files.get(path).is_some_and(|file| file.is_skipping(self.config.line_bytes_max))
    }

    fn kind_of(&self, path: &Path) -> Option<(Agent, TranscriptKind)> {
        self.scanner.kind_of(path)
    }

    /// Follows a file from this cursor on.
    fn insert(&mut self, path: PathBuf, agent: Agent, kind: TranscriptKind, mut cursor: Cursor) -> &mut Followed {
        self.intern(&mut cursor);
        let path: Arc<Path> = path.into();
        let file = Followed::new(self.scanner.roots_of(&path), Arc::clone(&path), agent, kind, cursor);
        self.files.entry(path).insert_entry(Box::new(file)).into_mut()
    }

    /// Shares the text of the project's path with all cursors that have it.
    fn intern(&mut self, cursor: &mut Cursor) {
        let Some(path) = &mut cursor.project_path else { return };
        match self.project_paths.get(path) {
            Some(known) => *path = Arc::clone(known),
            None => drop(self.project_paths.insert(Arc::clone(path))),
        }
    }

    /// Follows moved files where they are now, from their cursors on. Returns them.
    fn adopt(&mut self, moved: Vec<(PathBuf, PathBuf)>) -> Result<Vec<Arc<Path>>, QueueError> {
        let (mut batch, mut paths) = (Batch::default(), Vec::new());
        for (from, to) in moved {
            if !self.may_go_on() {
                break;
            }
            let Some(Followed { agent, kind, cursor, .. }) = self.files.remove(from.as_path()).map(|file| *file) else {
                continue;
            };
            info!(from = %from.display(), to = %to.display(), "a transcript was moved");
            self.outbox.rename(&from, &to);
            batch.cursors.extend([(from, None), (to.clone(), Some(cursor.clone()))]);
            paths.push(Arc::clone(&self.insert(to, agent, kind, cursor).path));
            if batch.cursors.len() >= BATCH_SESSIONS_MAX {
                self.outbox.submit(std::mem::take(&mut batch))?;
            }
        }
        self.outbox.submit(batch)?;
        Ok(paths)
    }

    /// Follows new files, but for those that were moved. Returns them in the order in which they are to be read.
    fn follow(&mut self, mut fresh: Vec<PathBuf>) -> Vec<Arc<Path>> {
        fresh.retain(|path| !self.files.contains_key(path.as_path()));
        let mut paths = Vec::with_capacity(fresh.len());
        for fresh in self.in_order_of_reading(fresh) {
            let Some((agent, kind)) = self.kind_of(&fresh.path) else { continue };
            let file = self.insert(fresh.path, agent, kind, START);
            file.beginning = fresh.ancestors.map(|ancestors| Box::new(followed::Beginning::of_copy_of(ancestors)));
            paths.push(Arc::clone(&file.path));
        }
        paths
    }

    /// Forgets files that are gone, and their cursors: should one come back it is read again, which is harmless. A
    /// session whose last transcript this was has ended.
    fn forget(&mut self, gone: Vec<PathBuf>, now: Timestamp) -> Result<(), QueueError> {
        let mut transcripts: HashMap<Uuid, usize> = HashMap::new();
        if !gone.is_empty() {
            self.files
                .values()
                .filter_map(|file| file.session())
                .for_each(|session| *transcripts.entry(session).or_default() += 1);
        }
        let mut batch = Batch::default();
        for path in gone {
            if !self.may_go_on() {
                break;
            }
            let Some(file) = self.files.remove(path.as_path()) else { continue };
            debug!(file = %path.display(), "transcript gone");
            let of_other = self.ends.of_other_of_gone(&file, &self.files, now);
            let left = file.session().and_then(|session| transcripts.get_mut(&session));
            let is_last = left.is_some_and(|left| {
                *left -= 1;
                *left == 0
            });
            let own = if is_last { self.ends.of_gone(&file, now) } else { None };
            for ending in of_other.into_iter().chain(own) {
                self.end_session(ending, &mut batch);
            }
            batch.cursors.push((path, None));
            self.submit_if_large(&mut batch)?;
        }
        self.outbox.submit(batch)
    }

    /// Emits the ends of sessions.
    fn end_sessions(&mut self, unfinished: &[Arc<Path>], now: Now) -> Result<(), QueueError> {
        let mut batch = Batch::default();
        for transcripts in self.ends.live(&self.files).chunk_by(|(one, _), (other, _)| one == other) {
            if let Some(ending) = self.ends.ending(transcripts, &self.files, unfinished, now) {
                self.end_session(ending, &mut batch);
                self.submit_if_large(&mut batch)?;
            }
        }
        for ending in self.ends.without_transcript(&self.files) {
            self.end_session(ending, &mut batch);
        }
        for ending in self.ends.of_others(&self.files, unfinished, now.wall) {
            let Some(file) = self.files.get_mut(&ending.path) else { continue };
            file.note_end_of_other(&ending.end);
            batch.cursors.push((ending.path.to_path_buf(), Some(file.cursor.clone())));
            if !ending.is_told {
                let origin = ends::origin(file);
                self.intake.admit(ending.end.candidate(ending.session, origin), &mut batch);
            }
            self.submit_if_large(&mut batch)?;
        }
        self.outbox.submit(batch)
    }

    /// Notes in its cursors what is known of a session, and its end if it has come.
    fn end_session(&mut self, ending: Ending, batch: &mut Batch) {
        let Ending { session, end, origin, process, paths, has_note } = ending;
        if let Some(end) = &end {
            debug!(session = %session, reason = end.reason.as_str(), "session ended");
            self.intake.admit(end.candidate(session, origin), batch);
        }
        for path in &paths {
            let Some(file) = self.files.get_mut(path) else { continue };
            match &end {
                Some(end) => file.cursor.session.ended(end),
                None => file.cursor.session.process = process,
            }
            batch.cursors.push((path.to_path_buf(), Some(file.cursor.clone())));
        }
        batch.session_ends.extend(has_note.then_some((session, None)));
    }

    fn submit_if_large(&mut self, batch: &mut Batch) -> Result<(), QueueError> {
        if batch.cursors.len() < BATCH_SESSIONS_MAX { Ok(()) } else { self.outbox.submit(std::mem::take(batch)) }
    }

    /// Updates the metrics.
    fn report(&mut self) {
        self.project_paths.retain(|path| Arc::strong_count(path) > 1);
        let metrics = self.intake.metrics();
        metrics.live.files_watched.set(self.files.len() as u64);
        let sessions = self.files.values().filter(|file| file.is_registered()).count();
        metrics.live.sessions_known.set(sessions as u64);
        let now = Timestamp::now();
        self.outbox.forget_delivered(self.intake.queue().stats().oldest.map(|(sequence, _)| sequence));
        let expires_before = self.retention.expires_before(now).as_second();
        let is_expiring = |file: &Followed| {
            let is_stored =
                file.seen.is_some() && file.access != Access::Unreadable && self.outbox.is_delivered(&file.path);
            file.agent.deletes_transcripts() && (1..expires_before).contains(&file.modified) && !is_stored
        };
        metrics.live.transcripts_expiring.set(self.files.values().filter(|file| is_expiring(file)).count() as u64);
        self.doorbell.set_unread(Unread {
            files: self.files.values().filter(|file| file.access == Access::Unreadable).count(),
            folders: self.scanner.unread_folders(),
        });
        metrics.rescanned(std::mem::replace(&mut self.cause, RescanCause::Interval), now);
    }
}
