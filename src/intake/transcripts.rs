//! Follows the transcripts: discovers files, reads whole lines from where it left off, notices replacement.
//!
//! notify is a doorbell only: it says that something may have changed. The truth is the rescan by size every
//! `polling_interval`; it finds what notifications miss (overflow, network homes, files born before their watch).
//!
//! A file's cursor moves in the same queue transaction as the events of the lines before it, so it never runs ahead
//! of them. A line ends with its newline; a last line without one waits for it. Only when such a line is one whole
//! JSON object and its file has been quiet for [`UNTERMINATED_QUIET`] is it read as it stands: nothing that could
//! still follow would change it (a cut-off object is never valid JSON).
//!
//! Runs on a thread of its own. The only user of notify.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant, SystemTime};

use notify::{RecursiveMode, Watcher};
use serde_json::Map;
use tracing::{debug, info, warn};

use super::claude_code::{self, HeadOrder, LineMeaning, Segment, SessionFacts, TranscriptKind};
use super::schema::Candidate;
use super::{Intake, Submission};
use crate::event::{Cursor, Failure, FailureKind, FileIdentity, ForeignKeys, Origin, Rejection, Timestamp};
use crate::queue::{Batch, QueueError};
use crate::telemetry::RescanCause;

/// How long a file must be unchanged before its last line is read without a newline.
pub const UNTERMINATED_QUIET: Duration = Duration::from_secs(5);

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 1 << 20;

/// Events of one batch: with lines of a kilobyte about as much as a chunk.
const BATCH_EVENTS_MAX: usize = 1024;

/// Batches handed to the queue whose sync has not been awaited: parsing goes on while the disk works.
const BATCHES_IN_FLIGHT_MAX: usize = 2;

/// How often the wait for room looks whether it is to stop.
const ROOM_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Bytes of one file that are read before others have their turn; at the first pass files are read to their end, so
/// that originals come before their forks.
const TURN_BYTES_MAX: u64 = 8 << 20;

/// Bytes at the start of the file and before the offset that a fingerprint covers, each.
const FINGERPRINT_BYTES: u64 = 1024;

/// Folders deep that are searched: `<project>/<session>/subagents/workflows/<run>/agent-x.jsonl` and some room.
const DEPTH_MAX: usize = 8;

/// Bytes of a file's head that decide whether it is a copy of another.
const HEAD_BYTES: usize = 64 * 1024;

/// Warnings about one file's bad lines in one go; the rest is counted.
const WARNINGS_PER_CHUNK_MAX: u64 = 5;

#[derive(Clone, Debug)]
pub struct FollowConfig {
    /// The folder that holds the project folders.
    pub projects: PathBuf,
    pub polling_interval: Duration,
    /// Time to gather notifications before files are read; zero reads at once.
    pub debounce: Duration,
    pub line_bytes_max: u64,
}

/// Wakes the follower. Cheap to clone.
#[derive(Clone)]
pub struct Doorbell {
    sender: Sender<Ring>,
    stop: Arc<AtomicBool>,
    idle: tokio::sync::watch::Sender<bool>,
}

enum Ring {
    Paths(Vec<PathBuf>),
    Rescan,
    Stop,
}

impl Doorbell {
    /// Ends the follower after the chunk it is at.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        // The receiver is gone only when the follower has ended already.
        let _ = self.sender.send(Ring::Stop);
    }

    /// Turns true when a whole pass over the files has found nothing more to read.
    pub fn idle(&self) -> tokio::sync::watch::Receiver<bool> {
        self.idle.subscribe()
    }
}

/// One transcript that is followed.
struct Followed {
    kind: TranscriptKind,
    path: PathBuf,
    /// The path as events name it: lossy where it is not UTF-8.
    origin: Arc<str>,
    cursor: Cursor,
    /// Size and time of change when it was last read to its end.
    seen: Option<(u64, Option<SystemTime>)>,
    /// No newline stands between the cursor and here.
    scanned_to: u64,
    /// A last line without newline is there that may be whole: look again when the file has been quiet.
    unterminated: bool,
    /// Said already that it can't be read.
    unreadable: bool,
}

/// A batch whose sync has not been awaited.
struct HandedOver {
    submission: Submission,
    path: PathBuf,
    /// The file's cursor before the batch, to go back to when the queue has no room for it. `None`: the file is gone.
    before: Option<Cursor>,
}

/// What one look at a file led to.
enum Progress {
    /// Nothing more to read now.
    End,
    /// There is more; others have their turn first.
    More,
}

/// Follows all transcripts below one folder.
pub struct Follower {
    config: FollowConfig,
    intake: Arc<Intake>,
    files: HashMap<PathBuf, Followed>,
    /// Cursors of files that have not been seen in this run.
    stored: HashMap<PathBuf, Cursor>,
    /// Batches that were handed over, oldest first.
    in_flight: VecDeque<HandedOver>,
    /// Files to look at again without waiting for a notification.
    again: BTreeSet<PathBuf>,
    /// Cursors to go back to once their files are not being read.
    rewound: Vec<(PathBuf, Cursor)>,
    buffer: Vec<u8>,
    rings: Receiver<Ring>,
    bell: Doorbell,
    watcher: Option<notify::RecommendedWatcher>,
    /// Which folder the watcher watches: it may be removed and made anew.
    watched: Option<FileIdentity>,
    watch_failed: bool,
    projects_missing: bool,
    first_pass: bool,
    /// Why the next rescan will be done.
    cause: RescanCause,
}

impl Follower {
    /// Takes up the cursors in the queue; reads nothing yet.
    pub fn new(config: FollowConfig, intake: Arc<Intake>) -> Result<Follower, QueueError> {
        let stored = intake.queue().cursors()?.into_iter().collect();
        let (sender, rings) = channel();
        let (idle, _) = tokio::sync::watch::channel(false);
        let bell = Doorbell { sender, stop: Arc::new(AtomicBool::new(false)), idle };
        Ok(Follower {
            config,
            intake,
            files: HashMap::new(),
            stored,
            in_flight: VecDeque::new(),
            again: BTreeSet::new(),
            rewound: Vec::new(),
            buffer: Vec::new(),
            rings,
            bell,
            watcher: None,
            watched: None,
            watch_failed: false,
            projects_missing: false,
            first_pass: true,
            cause: RescanCause::Start,
        })
    }

    pub fn doorbell(&self) -> Doorbell {
        self.bell.clone()
    }

    /// Reads until stopped. An error is the queue's.
    pub fn run(mut self) -> Result<(), QueueError> {
        let mut next_rescan = Instant::now();
        let mut more = BTreeSet::new();
        while !self.stopped() {
            self.intake.metrics().reading.beat();
            if Instant::now() >= next_rescan {
                self.watch();
                let unfinished = self.rescan()?;
                more.extend(unfinished);
                next_rescan = Instant::now() + self.config.polling_interval;
                self.await_tickets(0)?;
                more.append(&mut self.again);
                let idle = more.is_empty() && !self.files.values().any(|file| file.unterminated);
                self.bell.idle.send_replace(idle);
            } else if !more.is_empty() {
                for path in std::mem::take(&mut more) {
                    if let Progress::More = self.look_at(&path)? {
                        more.insert(path);
                    }
                }
            }
            self.await_tickets(0)?;
            more.append(&mut self.again);
            let wait =
                if more.is_empty() { next_rescan.saturating_duration_since(Instant::now()) } else { Duration::ZERO };
            for path in self.gather(wait, &mut next_rescan) {
                self.bell.idle.send_replace(false);
                if let Progress::More = self.look_at(&path)? {
                    more.insert(path);
                }
            }
        }
        self.await_tickets(0)
    }

    fn stopped(&self) -> bool {
        self.bell.stop.load(Ordering::Acquire)
    }

    /// The files that rang, after waiting at most `wait`.
    fn gather(&mut self, wait: Duration, next_rescan: &mut Instant) -> BTreeSet<PathBuf> {
        let mut paths = BTreeSet::new();
        let mut ring = match self.rings.recv_timeout(wait) {
            Ok(ring) => Some(ring),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return paths,
        };
        if !self.config.debounce.is_zero() && !self.stopped() {
            std::thread::sleep(self.config.debounce);
        }
        while let Some(next) = ring.take() {
            match next {
                Ring::Stop => return BTreeSet::new(),
                Ring::Rescan => {
                    *next_rescan = Instant::now();
                    self.cause = RescanCause::Overflow;
                }
                Ring::Paths(rung) => {
                    for path in rung {
                        if self.files.contains_key(&path) || self.kind_of(&path).is_some() {
                            paths.insert(path);
                        } else if path.is_dir() {
                            // A new folder: files may have been born in it before its watch was set.
                            *next_rescan = Instant::now();
                            self.cause = RescanCause::NewFolder;
                        }
                    }
                }
            }
            ring = self.rings.try_recv().ok();
        }
        paths
    }

    /// Sets the watch where it is missing: at the start, and after the folder was replaced.
    fn watch(&mut self) {
        let identity = std::fs::metadata(&self.config.projects).map(|metadata| identity(&metadata)).ok();
        if identity == self.watched && (self.watcher.is_some() || self.watch_failed || identity.is_none()) {
            return;
        }
        self.watcher = None;
        self.watched = identity;
        if identity.is_none() {
            return;
        }
        let sender = self.bell.sender.clone();
        let handler = move |event: notify::Result<notify::Event>| {
            let ring = match event {
                Ok(event) if event.need_rescan() => Ring::Rescan,
                Ok(event) if matches!(event.kind, notify::EventKind::Access(_)) => return,
                Ok(event) => Ring::Paths(event.paths),
                Err(_) => Ring::Rescan,
            };
            // Nobody listens any more: the follower has ended.
            let _ = sender.send(ring);
        };
        let watcher = notify::recommended_watcher(handler).and_then(|mut watcher| {
            watcher.watch(&self.config.projects, RecursiveMode::Recursive)?;
            Ok(watcher)
        });
        match watcher {
            Ok(watcher) => {
                self.watcher = Some(watcher);
                self.watch_failed = false;
            }
            Err(error) if self.watch_failed => debug!(error = %error, "still no notifications"),
            Err(error) => {
                self.watch_failed = true;
                warn!(error = %error, folder = %self.config.projects.display(),
                      polling_interval_seconds = self.config.polling_interval.as_secs_f64(),
                      "no notifications of changed files; new lines are found by rescanning. On Linux raise fs.inotify.max_user_watches");
            }
        }
    }

    /// Looks at every transcript. Gives those with more to read.
    fn rescan(&mut self) -> Result<Vec<PathBuf>, QueueError> {
        let (found, whole) = self.discover();
        let mut fresh = Vec::new();
        let mut paths = Vec::new();
        for (path, kind) in found {
            if self.files.contains_key(&path) {
                paths.push(path);
            } else {
                let order = head_order(&path, &kind);
                fresh.push((order, path, kind));
            }
        }
        if whole {
            self.forget_vanished(paths.iter().collect())?;
        }
        fresh.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
        for (_, path, kind) in fresh {
            self.follow(&path, kind);
            paths.push(path);
        }
        let mut unfinished = Vec::new();
        for path in paths {
            if self.stopped() {
                return Ok(unfinished);
            }
            if let Progress::More = self.look_at(&path)? {
                unfinished.push(path);
            }
        }
        let metrics = self.intake.metrics();
        metrics.files_watched.set(self.files.len() as u64);
        let sessions = self.files.values().filter(|file| file.cursor.project_path.is_some()).count();
        metrics.sessions_known.set(sessions as u64);
        metrics.rescanned(std::mem::replace(&mut self.cause, RescanCause::Interval), Timestamp::now());
        self.first_pass = false;
        Ok(unfinished)
    }

    /// All transcripts on disk, and whether every folder could be read.
    fn discover(&mut self) -> (Vec<(PathBuf, TranscriptKind)>, bool) {
        let mut found = Vec::new();
        let mut whole = true;
        for entry in walkdir::WalkDir::new(&self.config.projects).follow_links(true).max_depth(DEPTH_MAX) {
            match entry {
                Ok(entry) => {
                    if let Some(kind) = self.kind_of(entry.path())
                        && entry.file_type().is_file()
                    {
                        found.push((entry.into_path(), kind));
                    }
                }
                Err(error) => {
                    whole = false;
                    if error.depth() == 0 {
                        if !self.projects_missing {
                            self.projects_missing = true;
                            warn!(folder = %self.config.projects.display(), error = %error,
                                  "the transcripts folder can't be read; looking for it again at every rescan");
                        }
                        return (found, false);
                    }
                    debug!(error = %error, "a folder or file can't be read");
                }
            }
        }
        if std::mem::take(&mut self.projects_missing) {
            info!(folder = %self.config.projects.display(), "the transcripts folder is there");
        }
        (found, whole)
    }

    fn kind_of(&self, path: &Path) -> Option<TranscriptKind> {
        path.strip_prefix(&self.config.projects).ok().and_then(claude_code::classify)
    }

    /// Forgets files that are gone, and their cursors: should one come back it is read anew, which is harmless.
    fn forget_vanished(&mut self, present: BTreeSet<&PathBuf>) -> Result<(), QueueError> {
        let vanished: Vec<PathBuf> = self.files.keys().filter(|path| !present.contains(path)).cloned().collect();
        if vanished.is_empty() {
            return Ok(());
        }
        for path in vanished {
            debug!(file = %path.display(), "transcript gone");
            self.files.remove(&path);
            let batch = Batch { cursors: vec![(path.clone(), None)], ..Batch::default() };
            self.submit(batch, path, None)?;
        }
        Ok(())
    }

    fn follow(&mut self, path: &Path, kind: TranscriptKind) {
        let cursor = self.stored.remove(path).unwrap_or_else(start_of_file);
        let scanned_to = cursor.offset;
        let origin = path.to_string_lossy().into();
        let file = Followed {
            kind,
            path: path.to_owned(),
            origin,
            cursor,
            seen: None,
            scanned_to,
            unterminated: false,
            unreadable: false,
        };
        self.files.insert(path.to_owned(), file);
    }

    /// Reads what is new in one file, if anything.
    fn look_at(&mut self, path: &Path) -> Result<Progress, QueueError> {
        if !self.files.contains_key(path) {
            match self.kind_of(path) {
                Some(kind) if path.is_file() => self.follow(path, kind),
                _ => return Ok(Progress::End),
            }
        }
        let Some(mut file) = self.files.remove(path) else { return Ok(Progress::End) };
        let progress = self.read_new(path, &mut file);
        match progress {
            Ok(progress) => {
                if std::mem::take(&mut file.unreadable) {
                    info!(file = %path.display(), "the transcript can be read again");
                }
                self.files.insert(path.to_owned(), file);
                Ok(progress)
            }
            Err(ReadError::Queue(error)) => Err(error),
            Err(ReadError::NoRoom) => {
                self.files.insert(path.to_owned(), file);
                self.await_tickets(0)?;
                Ok(Progress::More)
            }
            Err(ReadError::File(error)) => {
                // Gone is no error: the next rescan forgets it.
                if error.kind() != io::ErrorKind::NotFound && !std::mem::replace(&mut file.unreadable, true) {
                    warn!(file = %path.display(), error = %error, "a transcript can't be read; trying again at every rescan");
                }
                self.files.insert(path.to_owned(), file);
                Ok(Progress::End)
            }
        }
    }

    fn read_new(&mut self, path: &Path, file: &mut Followed) -> Result<Progress, ReadError> {
        let metadata = std::fs::metadata(path)?;
        let now = (metadata.len(), metadata.modified().ok());
        if file.seen == Some(now) && file.cursor.file == identity(&metadata) && !file.unterminated {
            return Ok(Progress::End);
        }
        let handle = File::open(path)?;
        let metadata = handle.metadata()?;
        if file.scanned_to > metadata.len() {
            file.scanned_to = file.cursor.offset;
        }
        self.check_identity(path, file, &handle, &metadata)?;
        let mut read = 0;
        loop {
            if self.stopped() {
                return Ok(Progress::End);
            }
            if read >= TURN_BYTES_MAX && !self.first_pass {
                return Ok(Progress::More);
            }
            self.wait_for_room();
            let before = file.cursor.offset;
            if !self.read_chunk(&handle, file)? {
                break;
            }
            read += file.cursor.offset - before;
        }
        self.take_unterminated(&handle, file, &metadata)?;
        file.seen = Some((metadata.len(), metadata.modified().ok()));
        Ok(Progress::End)
    }

    /// Starts anew where the bytes before the cursor are not those that were read.
    fn check_identity(&self, path: &Path, file: &mut Followed, handle: &File, metadata: &Metadata) -> io::Result<()> {
        let now = identity(metadata);
        let cursor = &mut file.cursor;
        if cursor.offset == 0 {
            cursor.file = now;
            return Ok(());
        }
        let same = metadata.len() >= cursor.offset && fingerprint(handle, cursor.offset)? == cursor.fingerprint;
        if same {
            // Copied or restored from a backup: other inode, same bytes.
            cursor.file = now;
            return Ok(());
        }
        info!(file = %path.display(), offset = cursor.offset, bytes = metadata.len(),
              "the transcript was replaced or cut short; reading it anew, what is known already is not stored twice");
        *cursor = Cursor { file: now, ..start_of_file() };
        file.scanned_to = 0;
        Ok(())
    }

    /// Reads up to one chunk of whole lines and hands them over. False at the end of the whole lines.
    fn read_chunk(&mut self, handle: &File, file: &mut Followed) -> Result<bool, ReadError> {
        self.intake.metrics().reading.beat();
        let start = file.cursor.offset;
        // Bytes that hold no newline are not read again until one has come.
        let unscanned = file.scanned_to.max(start);
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(CHUNK_BYTES, 0);
        let length = read_full_at(handle, &mut buffer, unscanned)?;
        let whole = memchr::memrchr(b'\n', buffer.get(..length).unwrap_or_default());
        let result = match whole {
            None if length == 0 => Ok(false),
            None => {
                file.scanned_to = unscanned + length as u64;
                Ok(length == CHUNK_BYTES)
            }
            Some(end) if unscanned == start => {
                let lines = buffer.get(..=end).unwrap_or_default();
                self.take_lines(lines, handle, file).map(|()| true)
            }
            Some(_) => {
                let first = memchr::memchr(b'\n', buffer.get(..length).unwrap_or_default()).unwrap_or_default();
                let line_bytes = unscanned + first as u64 - start;
                if line_bytes > self.config.line_bytes_max {
                    self.skip_long_line(line_bytes, handle, file).map(|()| true)
                } else {
                    let bytes = usize::try_from(line_bytes).unwrap_or(usize::MAX).saturating_add(1);
                    let mut line = vec![0; bytes];
                    handle
                        .read_exact_at(&mut line, start)
                        .map_err(ReadError::File)
                        .and_then(|()| self.take_lines(&line, handle, file).map(|()| true))
                }
            }
        };
        self.buffer = buffer;
        result
    }

    /// Hands over whole lines (each with its newline) that start at the cursor.
    fn take_lines(&mut self, lines: &[u8], handle: &File, file: &mut Followed) -> Result<(), ReadError> {
        let mut batch = Batch::default();
        let mut before = file.cursor.clone();
        let mut warnings = 0;
        let mut start = 0;
        for end in memchr::memchr_iter(b'\n', lines) {
            let line = lines.get(start..end).unwrap_or_default();
            let offset = file.cursor.offset;
            if line.len() as u64 > self.config.line_bytes_max {
                batch.rejections.push(long_line(line.len() as u64, file));
                self.intake.metrics().bad_lines.add(1);
            } else {
                self.take_line(line, offset, file, &mut batch, &mut warnings);
            }
            file.cursor.offset = offset + (end + 1 - start) as u64;
            start = end + 1;
            if batch.events.len() + batch.rejections.len() >= BATCH_EVENTS_MAX {
                self.hand_over(std::mem::take(&mut batch), &before, handle, file)?;
                before = file.cursor.clone();
            }
        }
        if warnings > WARNINGS_PER_CHUNK_MAX {
            warn!(file = %file.origin, lines = warnings - WARNINGS_PER_CHUNK_MAX, "more bad lines, not shown");
        }
        self.hand_over(batch, &before, handle, file)
    }

    fn take_line(&self, line: &[u8], offset: u64, file: &mut Followed, batch: &mut Batch, warnings: &mut u64) {
        let metrics = self.intake.metrics();
        if line.iter().all(u8::is_ascii_whitespace) {
            return;
        }
        metrics.lines_read.add(1);
        match claude_code::read_line(line, &file.kind) {
            Ok(meaning) => self.take_meaning(meaning, line, offset, file, batch),
            Err(bad) => {
                metrics.bad_lines.add(1);
                *warnings += 1;
                if *warnings <= WARNINGS_PER_CHUNK_MAX {
                    warn!(file = %file.origin, offset, bytes = line.len(), error = %bad, "a line can't be read; it is kept among the dead letters");
                }
                for segment in claude_code::salvage(line) {
                    let (Segment::Record(range) | Segment::Lost(range)) = &segment;
                    let bytes = line.get(range.clone()).unwrap_or_default();
                    let at = offset + range.start as u64;
                    match segment {
                        Segment::Record(_) => match claude_code::read_line(bytes, &file.kind) {
                            Ok(meaning) => self.take_meaning(meaning, bytes, at, file, batch),
                            Err(bad) => batch.rejections.push(unreadable(bytes, at, &bad.message, file)),
                        },
                        Segment::Lost(_) => batch.rejections.push(unreadable(bytes, at, &bad.message, file)),
                    }
                }
            }
        }
    }

    /// What a line leads to: the session's registration at its first working directory, and a turn.
    fn take_meaning(&self, meaning: LineMeaning, line: &[u8], offset: u64, file: &mut Followed, batch: &mut Batch) {
        if let Some(name) = &meaning.unknown_type {
            self.intake.metrics().unknown_line_types.add(name, 1);
        }
        let TranscriptKind::Main { session } = file.kind else { return };
        if file.cursor.project_path.is_none()
            && let Some(cwd) = &meaning.cwd
        {
            let timestamp = meaning.timestamp.unwrap_or_else(Timestamp::now);
            let facts = SessionFacts {
                session,
                cwd,
                git_branch: meaning.git_branch.as_deref(),
                transcript_path: Some(&file.origin),
                started_at: meaning.timestamp,
            };
            let id = claude_code::session_registered_event_id(session);
            self.admit("session_registered", id, timestamp, facts.payload(), offset, file, batch);
            file.cursor.project_path = Some(cwd.clone());
        }
        if let Some(turn) = meaning.turn {
            let timestamp = turn.timestamp.unwrap_or_else(Timestamp::now);
            let id = claude_code::turn_event_id(&turn, session, offset, line);
            let payload = turn.payload(session, file.cursor.project_path.as_deref(), timestamp);
            self.admit("turn_detected", id, timestamp, payload, offset, file, batch);
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn admit(
        &self,
        event_type: &str,
        id: crate::event::EventId,
        timestamp: Timestamp,
        payload: Map<String, serde_json::Value>,
        offset: u64,
        file: &Followed,
        batch: &mut Batch,
    ) {
        let candidate = Candidate {
            id,
            event_type: event_type.to_owned(),
            timestamp,
            payload,
            refs: ForeignKeys::default(),
            origin: Origin::Transcript { path: file.origin.clone(), offset },
        };
        self.intake.admit(candidate, batch);
    }

    /// A line above `max_line_bytes` is passed over; a dead letter says where it is.
    fn skip_long_line(&mut self, line_bytes: u64, handle: &File, file: &mut Followed) -> Result<(), ReadError> {
        let before = file.cursor.clone();
        let batch = Batch { rejections: vec![long_line(line_bytes, file)], ..Batch::default() };
        self.intake.metrics().bad_lines.add(1);
        file.cursor.offset += line_bytes + 1;
        self.hand_over(batch, &before, handle, file)
    }

    /// Reads a last line that has no newline, once its file is quiet and if it is one whole object.
    fn take_unterminated(&mut self, handle: &File, file: &mut Followed, metadata: &Metadata) -> Result<(), ReadError> {
        file.unterminated = false;
        let start = file.cursor.offset;
        let length = metadata.len().saturating_sub(start);
        if length == 0 || length > self.config.line_bytes_max {
            return Ok(());
        }
        let mut line = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        handle.read_exact_at(&mut line, start)?;
        if line.contains(&b'\n') || claude_code::read_line(&line, &file.kind).is_err() {
            return Ok(());
        }
        let quiet = metadata.modified().ok().and_then(|modified| modified.elapsed().ok());
        if quiet.is_none_or(|quiet| quiet < UNTERMINATED_QUIET) {
            file.unterminated = true;
            return Ok(());
        }
        let before = file.cursor.clone();
        let mut batch = Batch::default();
        self.take_line(&line, start, file, &mut batch, &mut 0);
        file.cursor.offset = start + length;
        self.hand_over(batch, &before, handle, file)
    }

    /// Hands a batch to the queue together with the file's cursor, which was at `before` when the batch began.
    fn hand_over(
        &mut self,
        mut batch: Batch,
        before: &Cursor,
        handle: &File,
        file: &mut Followed,
    ) -> Result<(), ReadError> {
        let cursor = &mut file.cursor;
        cursor.fingerprint = fingerprint(handle, cursor.offset)?;
        file.scanned_to = cursor.offset;
        batch.cursors.push((file.path.clone(), Some(cursor.clone())));
        self.submit(batch, file.path.clone(), Some(before.clone()))?;
        // A batch that found no room has set the file back; what was read after it is to be read again.
        if self.again.contains(&file.path) { Err(ReadError::NoRoom) } else { Ok(()) }
    }

    fn submit(&mut self, batch: Batch, path: PathBuf, before: Option<Cursor>) -> Result<(), QueueError> {
        let submission = self.intake.submit(batch);
        self.in_flight.push_back(HandedOver { submission, path, before });
        self.await_tickets(BATCHES_IN_FLIGHT_MAX)
    }

    /// Waits until at most so many batches are under way. Those that found no room are put down to be read again, from
    /// the first of them on: the queue refuses all that come after a refused one until we know of it.
    fn await_tickets(&mut self, at_most: usize) -> Result<(), QueueError> {
        let mut at_most = at_most;
        while self.in_flight.len() > at_most {
            let Some(HandedOver { submission, path, before }) = self.in_flight.pop_front() else { break };
            match submission.wait() {
                Ok(_) => {}
                Err(QueueError::Full { .. }) => {
                    at_most = 0;
                    if let Some(before) = before
                        && self.again.insert(path.clone())
                    {
                        self.rewound.push((path, before));
                    }
                }
                Err(error) => return Err(error),
            }
        }
        for (path, before) in std::mem::take(&mut self.rewound) {
            match self.files.get_mut(&path) {
                Some(file) => file.rewind(before),
                // It is being read at this moment.
                None => self.rewound.push((path, before)),
            }
        }
        Ok(())
    }

    /// Waits while the queue is full: the transcripts on disk are the buffer.
    fn wait_for_room(&self) {
        while !self.stopped() && !self.intake.queue().wait_for_room(Instant::now() + ROOM_CHECK_INTERVAL) {
            self.intake.metrics().reading.beat();
        }
    }
}

impl Followed {
    fn rewind(&mut self, cursor: Cursor) {
        self.scanned_to = cursor.offset;
        self.cursor = cursor;
        self.seen = None;
    }
}

enum ReadError {
    File(io::Error),
    /// The queue is full.
    NoRoom,
    Queue(QueueError),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        ReadError::File(error)
    }
}

impl From<QueueError> for ReadError {
    fn from(error: QueueError) -> Self {
        ReadError::Queue(error)
    }
}

fn start_of_file() -> Cursor {
    Cursor { file: FileIdentity::default(), offset: 0, fingerprint: 0, project_path: None, session: Default::default() }
}

fn identity(metadata: &Metadata) -> FileIdentity {
    FileIdentity { device: metadata.dev(), inode: metadata.ino() }
}

/// Hash over the first bytes of the file, the last ones before `offset`, and `offset`.
fn fingerprint(handle: &File, offset: u64) -> io::Result<u64> {
    let length = offset.min(FINGERPRINT_BYTES);
    let mut bytes = [0; 2 * FINGERPRINT_BYTES as usize + 8];
    let (head, rest) = bytes.split_at_mut(length as usize);
    let (tail, rest) = rest.split_at_mut(length as usize);
    handle.read_exact_at(head, 0)?;
    handle.read_exact_at(tail, offset - length)?;
    let (number, _) = rest.split_at_mut(8);
    number.copy_from_slice(&offset.to_le_bytes());
    Ok(xxhash_rust::xxh3::xxh3_64(&bytes))
}

/// Reads until the buffer is full or the file ends.
fn read_full_at(handle: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut length = 0;
    while let Some(rest) = buffer.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match handle.read_at(rest, offset + length as u64) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

/// Where a new file comes in the order of reading: originals before their copies, by when they began.
fn head_order(path: &Path, kind: &TranscriptKind) -> HeadOrder {
    let TranscriptKind::Main { session } = kind else { return HeadOrder { is_copy: false, began_at: None } };
    let mut head = vec![0; HEAD_BYTES];
    let length = File::open(path).and_then(|file| read_full_at(&file, &mut head, 0)).unwrap_or_default();
    claude_code::head_order(head.get(..length).unwrap_or_default(), *session)
}

fn unreadable(bytes: &[u8], offset: u64, problem: &str, file: &Followed) -> Rejection {
    Rejection {
        failure: Failure {
            kind: FailureKind::Unreadable,
            message: format!("{problem}; from {} at byte {offset}", file.origin),
            sqlstate: None,
        },
        event_type: None,
        origin: Origin::Transcript { path: file.origin.clone(), offset },
        bytes: bytes.to_vec(),
    }
}

fn long_line(line_bytes: u64, file: &Followed) -> Rejection {
    let offset = file.cursor.offset;
    warn!(file = %file.origin, offset, bytes = line_bytes, "a line is longer than max_line_bytes; it is passed over");
    Rejection {
        failure: Failure {
            kind: FailureKind::TooLarge,
            message: format!(
                "the line has {line_bytes} bytes, more than file_watcher.max_line_bytes; it stands in {} at byte {offset}",
                file.origin
            ),
            sqlstate: None,
        },
        event_type: None,
        origin: Origin::Transcript { path: file.origin.clone(), offset },
        bytes: Vec::new(),
    }
}
