//! Takes what waits in the spool into the queue.
//!
//! One thread, woken by who leaves something and by the clock. Files are taken in order, small ones together, large ones
//! in parts; see `spool` for what is promised. When the queue is full it waits for room: the files are the buffer.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{debug, error, info, warn};
use uuid::Uuid;

use super::Intake;
use super::spool::{Attempt, DAMAGED_BYTES_KEPT_MAX, Frame, Frames, ReadError, Spool, UnreadSpool};
use crate::event::{Failure, FailureKind, Origin, Rejection, Timestamp};
use crate::queue::{Batch, QueueError};

/// Records and bytes that go into one batch.
const BATCH_RECORDS_MAX: usize = 512;
const BATCH_BYTES_MAX: usize = 1 << 20;

/// A record above this takes memory that counts, also on its way into the queue.
const LARGE_FRAME_BYTES: usize = 256 << 10;

/// Times that the program may end while it processes a file, before the file is moved aside.
const ATTEMPTS_MAX: u32 = 2;

/// How often a file that can't be read is tried again though nothing about it has changed: a disk may have failed, or
/// the limit of open files may have been reached.
const UNREAD_RETRY_INTERVAL: Duration = Duration::from_secs(60);

/// How often a stop is looked for while there is no room.
const ROOM_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Files whose state is kept though the last look did not find them: their folder may have been renamed, or moved away,
/// for a while. Above this, those that are gone the longest are forgotten.
const GONE_FILES_MAX: usize = 10_000;

/// Why a pass over the spool ended early.
#[derive(Debug)]
enum Interruption {
    /// It is to stop.
    Stopped,
    Queue(QueueError),
}

/// Reads the spool until it is stopped.
pub struct SpoolReader {
    spool: Spool,
    intake: Arc<Intake>,
    /// Time between two looks without being woken.
    polling_interval: Duration,
    stop: Arc<AtomicBool>,
    idle: watch::Sender<bool>,
    /// Files that stay in the spool though they were looked at.
    kept: HashMap<PathBuf, KeptFile>,
    /// How often the files were listed.
    listings: u64,
    /// The file that was being processed when the program ended last, if it did not end by itself.
    interrupted: Option<Attempt>,
}

/// A file that stays in the spool.
struct KeptFile {
    kept: Kept,
    /// As it was when it was read or last looked at. `None` where that could not be told, and nothing of it was read.
    version: Option<Version>,
    /// The first listing in which it was missing, since it was seen last.
    gone_since: Option<u64>,
}

/// Why a file stays in the spool.
enum Kept {
    /// It can't be read.
    Unread { tried_at: Instant, error: String, records_taken: u64 },
    /// All of it is in the queue, but it can't be removed.
    TakenIn,
    /// It ends the program and is a dead letter, but can't be renamed.
    Fatal,
}

/// What of a file changes when somebody replaces it, writes to it, or changes its owner or mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Version {
    inode: u64,
    /// Seconds and nanoseconds of the time of its last change, content or not.
    changed_at: (i64, i64),
}

impl Version {
    /// `None` where there is no such file, or its folder may not be searched.
    fn of(path: &Path) -> Option<Version> {
        Some(Version::from(&path.symlink_metadata().ok()?))
    }
}

impl From<&Metadata> for Version {
    fn from(metadata: &Metadata) -> Version {
        Version { inode: metadata.ino(), changed_at: (metadata.ctime(), metadata.ctime_nsec()) }
    }
}

/// What is to be done with a file that stayed in the spool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// Read it, but for so many records at its beginning.
    Read(u64),
    Remove,
    MoveAside,
    Nothing,
}

impl KeptFile {
    fn new(kept: Kept, version: Option<Version>) -> KeptFile {
        KeptFile { kept, version, gone_since: None }
    }

    /// What is to be done now that the last listing has its name. `found` is what is there.
    fn step(&mut self, found: Option<Version>, now: Instant) -> Step {
        // Whatever is there can't be reached: it may be this file or another one.
        let Some(found) = found else { return Step::Nothing };
        let is_same = self.version.is_none_or(|version| match self.gone_since {
            None => version.inode == found.inode,
            // The inode may have been used again meanwhile.
            Some(_) => version == found,
        });
        if !is_same {
            return Step::Read(0);
        }
        let is_changed = self.version.replace(found) != Some(found);
        self.gone_since = None;
        match self.kept {
            Kept::Unread { tried_at, records_taken, .. } => {
                let is_due = is_changed || now.saturating_duration_since(tried_at) >= UNREAD_RETRY_INTERVAL;
                if is_due { Step::Read(records_taken) } else { Step::Nothing }
            }
            Kept::TakenIn => Step::Remove,
            Kept::Fatal => Step::MoveAside,
        }
    }
}

/// Ends a [`SpoolReader`] and tells whether it has work. Cheap to clone.
#[derive(Clone)]
pub struct SpoolHandle {
    spool: Spool,
    stop: Arc<AtomicBool>,
    idle: watch::Receiver<bool>,
}

impl SpoolHandle {
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.spool.ring();
    }

    /// Whether the last look found nothing more to take in.
    pub fn is_idle(&self) -> bool {
        *self.idle.borrow()
    }

    /// What could not be read at the last look.
    pub fn unread(&self) -> UnreadSpool {
        self.spool.unread()
    }
}

impl SpoolReader {
    pub fn new(spool: Spool, intake: Arc<Intake>, polling_interval: Duration) -> (SpoolReader, SpoolHandle) {
        let stop = Arc::new(AtomicBool::new(false));
        let (idle, is_idle) = watch::channel(false);
        let handle = SpoolHandle { spool: spool.clone(), stop: stop.clone(), idle: is_idle };
        let (interrupted, kept) = (spool.attempt(), HashMap::new());
        (SpoolReader { spool, intake, polling_interval, stop, idle, kept, listings: 0, interrupted }, handle)
    }

    /// Takes in what waits, again and again. Blocks until stopped; an error is the queue's.
    pub fn run(mut self) -> Result<(), QueueError> {
        while !self.stopped() {
            match self.look() {
                Ok(()) => self.idle.send_replace(true),
                Err(Interruption::Stopped) => return Ok(()),
                Err(Interruption::Queue(error)) => return Err(error),
            };
            self.spool.wait(self.polling_interval);
        }
        Ok(())
    }

    /// Takes in what waits once, and says what could not be read.
    fn look(&mut self) -> Result<(), Interruption> {
        match self.spool.remove_old_drafts().and_then(|()| self.spool.waiting()) {
            Ok(paths) => {
                self.take_in(paths)?;
                let unread = self.unread();
                if self.spool.set_unread(unread).is_folder_unread {
                    info!(spool = %self.spool.folder().display(), "the spool can be read again");
                }
            }
            Err(error) => {
                let folder = self.spool.folder().display();
                let unread =
                    UnreadSpool { files: 0, error: Some(format!("{folder}: {error}")), is_folder_unread: true };
                if !self.spool.set_unread(unread).is_folder_unread {
                    warn!(spool = %folder, error = %error,
                          "the spool can't be read, trying on; correct its owner or mode, or set queue.spool_path");
                }
            }
        }
        Ok(())
    }

    /// The files that can't be read.
    fn unread(&self) -> UnreadSpool {
        let unread = self.kept.iter().filter_map(|(path, file)| match &file.kept {
            Kept::Unread { error, .. } if file.gone_since.is_none() => Some((path, error)),
            Kept::Unread { .. } | Kept::TakenIn | Kept::Fatal => None,
        });
        let first = unread.clone().min();
        UnreadSpool {
            files: unread.count(),
            error: first.map(|(path, error)| format!("{}: {error}", path.display())),
            is_folder_unread: false,
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Notes which files the listing `paths` lacks, and forgets those that are gone the longest where there are too many.
    fn note_gone(&mut self, paths: &[PathBuf]) {
        self.listings += 1;
        let mut gone = Vec::new();
        for (path, file) in &mut self.kept {
            if paths.binary_search(path).is_err() {
                gone.push(*file.gone_since.get_or_insert(self.listings));
            }
        }
        if let Some(excess) = gone.len().checked_sub(GONE_FILES_MAX).filter(|excess| *excess > 0) {
            gone.sort_unstable();
            let first_kept = gone.get(excess).copied().unwrap_or_default();
            self.kept.retain(|_, file| file.gone_since.is_none_or(|since| since >= first_kept));
            // Of those that are gone for the same time, any.
            let mut excess =
                self.kept.values().filter(|file| file.gone_since.is_some()).count().saturating_sub(GONE_FILES_MAX);
            self.kept.retain(|_, file| {
                let is_excess = excess > 0 && file.gone_since == Some(first_kept);
                excess -= usize::from(is_excess);
                !is_excess
            });
        }
    }

    fn take_in(&mut self, paths: Vec<PathBuf>) -> Result<(), Interruption> {
        self.note_gone(&paths);
        let mut gathered = Gathered::default();
        for path in paths {
            if self.stopped() {
                return Err(Interruption::Stopped);
            }
            let step = match self.kept.get_mut(&path) {
                Some(file) => file.step(Version::of(&path), Instant::now()),
                None => Step::Read(0),
            };
            let records_taken = match step {
                Step::Read(records_taken) => records_taken,
                // One that is not found may come back: its folder may just have been renamed.
                Step::Remove => {
                    if std::fs::remove_file(&path).is_ok() {
                        self.kept.remove(&path);
                    }
                    continue;
                }
                Step::MoveAside => {
                    if self.spool.move_aside(&path).is_ok() {
                        self.kept.remove(&path);
                    }
                    continue;
                }
                Step::Nothing => continue,
            };
            self.idle.send_replace(false);
            let Some(attempt) = self.begin_attempt(&path, &mut gathered)? else { continue };
            match Frames::open(&path).and_then(|frames| Ok((Version::from(&frames.metadata()?), frames))) {
                Ok((version, frames)) => {
                    let file = OpenFile { path, version, frames };
                    let taken = self.take_file(file, &attempt, records_taken, &mut gathered);
                    self.spool.clear_attempt();
                    taken?;
                }
                Err(error) => {
                    self.spool.clear_attempt();
                    self.keep_unread(path, None, &error, records_taken);
                }
            }
        }
        self.hand_over(&mut gathered)
    }

    /// Notes that this file is being processed. `None`, and the file is moved aside, where that has ended the program
    /// [`ATTEMPTS_MAX`] times.
    fn begin_attempt(&mut self, path: &Path, gathered: &mut Gathered) -> Result<Option<Attempt>, Interruption> {
        let name = path.file_name().unwrap_or_default();
        let before = self.interrupted.take_if(|attempt| attempt.file == name).map_or(0, |attempt| attempt.count);
        if before < ATTEMPTS_MAX {
            let attempt = Attempt { file: name.to_owned(), count: before + 1 };
            self.spool.note_attempt(&attempt);
            return Ok(Some(attempt));
        }
        let kept = Spool::aside(path);
        error!(file = %kept.display(), attempts = before,
               "processing a file of the spool ended the program; it is moved aside as a dead letter");
        gathered.batch.rejections.push(fatal(&kept, before));
        // Its dead letter first: if the program ends between the two, there are two of them and not none.
        self.spool.clear_attempt();
        self.hand_over(gathered)?;
        let version = Version::of(path);
        self.kept.remove(path);
        if let Err(error) = self.spool.move_aside(path) {
            warn!(file = %path.display(), error = %error,
                  "a spool file ends the program and can't be renamed; correct the owner or mode of its folder, or remove it");
            self.kept.insert(path.to_owned(), KeptFile::new(Kept::Fatal, version));
        }
        Ok(None)
    }

    /// Gathers the records of a file behind the first `records_taken`, handing over on the way.
    ///
    /// If the program ends while a record is checked, or while a large one is on its way into the queue, the file is to
    /// blame; if it ends while the queue is written, it is not.
    fn take_file(
        &mut self,
        file: OpenFile,
        attempt: &Attempt,
        records_taken: u64,
        gathered: &mut Gathered,
    ) -> Result<(), Interruption> {
        let OpenFile { path, version, mut frames } = file;
        let mut records = 0;
        loop {
            let mut is_large = false;
            let checker = self.intake.checker().clone();
            let taken = match frames.next_frame(|bytes| checker.values().reserve(bytes)) {
                Ok(Some(_)) if records < records_taken => {
                    records += 1;
                    continue;
                }
                Ok(Some((frame, _reservation))) => {
                    records += 1;
                    is_large = frame.byte_length() > LARGE_FRAME_BYTES;
                    if is_large {
                        self.spool.note_attempt(attempt);
                    }
                    gathered.bytes += frame.byte_length();
                    self.admit(&frame, gathered)
                }
                Ok(None) => break,
                Err(error) => Err(error),
            };
            match taken {
                // The files before this one are done with; this one is not.
                Ok(()) if gathered.is_full() => {
                    if !is_large {
                        self.spool.clear_attempt();
                    }
                    self.hand_over(gathered)?;
                }
                Ok(()) => {}
                Err(ReadError::Io(error)) => {
                    self.keep_unread(path, Some(version), &error, records);
                    return Ok(());
                }
                Err(ReadError::Damaged(problem)) => {
                    warn!(file = %path.display(), problem, "a file in the spool is damaged; what is whole is taken in");
                    gathered.batch.rejections.push(damaged(&path, problem));
                    break;
                }
            }
        }
        if let Some(KeptFile { kept: Kept::Unread { .. }, .. }) = self.kept.remove(&path) {
            info!(file = %path.display(), "a spool file could be read again and is taken in");
        }
        gathered.done.push((path, version));
        if gathered.is_full() { self.hand_over(gathered) } else { Ok(()) }
    }

    fn admit(&self, frame: &Frame, gathered: &mut Gathered) -> Result<(), ReadError> {
        gathered.closed.extend(self.intake.admit_record(frame.record()?, &mut gathered.batch));
        Ok(())
    }

    /// Appends what was gathered and, once that is durable, removes the files it came from.
    fn hand_over(&mut self, gathered: &mut Gathered) -> Result<(), Interruption> {
        let Gathered { mut batch, bytes, done, closed } = std::mem::take(gathered);
        if !batch.events.is_empty() || !batch.rejections.is_empty() {
            loop {
                // As for a request: a large event is copied on its way to the disk.
                let reservation = (bytes > BATCH_BYTES_MAX).then(|| self.intake.checker().values().reserve(bytes));
                let submitted = self.intake.submit(&mut batch).wait();
                drop(reservation);
                match submitted {
                    Ok(_) => break,
                    Err(QueueError::Full { .. }) => self.wait_for_room()?,
                    Err(error) => return Err(Interruption::Queue(error)),
                }
            }
        }
        for (session, at) in closed {
            self.intake.session_closed(session, at);
        }
        for (path, version) in done {
            let Err(error) = std::fs::remove_file(&path) else { continue };
            let mut file = KeptFile::new(Kept::TakenIn, Some(version));
            if error.kind() == io::ErrorKind::NotFound {
                file.gone_since = Some(self.listings);
            } else {
                warn!(file = %path.display(), error = %error,
                      "a spool file was taken in but can't be removed; correct the owner or mode of its folder");
            }
            self.kept.insert(path, file);
        }
        Ok(())
    }

    fn wait_for_room(&self) -> Result<(), Interruption> {
        // Whatever ends the program now, no file is to blame.
        self.spool.clear_attempt();
        debug!("the queue is full; the spool waits for room");
        while !self.intake.queue().wait_for_room(Instant::now() + ROOM_CHECK_INTERVAL) {
            if self.stopped() {
                return Err(Interruption::Stopped);
            }
        }
        Ok(())
    }

    /// Keeps a file for later that could not be read. Said once, until it could be. `version` is that of what was read.
    fn keep_unread(&mut self, path: PathBuf, version: Option<Version>, error: &io::Error, records_taken: u64) {
        if error.kind() == io::ErrorKind::NotFound {
            return;
        }
        let before = self.kept.get(&path);
        if before.is_none() {
            warn!(file = %path.display(), error = %error,
                  "a spool file could not be read and is tried again; correct its owner or mode, or remove it");
        }
        // What can't be reached any more is the file that was kept, as far as is known.
        let version = version.or_else(|| Version::of(&path)).or(before.and_then(|file| file.version));
        let kept = Kept::Unread { tried_at: Instant::now(), error: error.to_string(), records_taken };
        self.kept.insert(path, KeptFile::new(kept, version));
    }
}

/// A file that is being read.
struct OpenFile {
    path: PathBuf,
    version: Version,
    frames: Frames,
}

/// What goes into the queue together.
#[derive(Default)]
struct Gathered {
    batch: Batch,
    bytes: usize,
    /// Files that are wholly in this batch or in one before it.
    done: Vec<(PathBuf, Version)>,
    /// Sessions whose end is told in this batch.
    closed: Vec<(Uuid, Timestamp)>,
}

impl Gathered {
    fn is_full(&self) -> bool {
        self.batch.events.len() + self.batch.rejections.len() >= BATCH_RECORDS_MAX || self.bytes >= BATCH_BYTES_MAX
    }
}

/// The dead letter of a file that ended the program each time.
fn fatal(path: &Path, attempts: u32) -> Rejection {
    let message = format!(
        "spool file {}: processing it ended the program {attempts} times; it was not taken in. To try again, rename it \
         without .failed",
        path.display()
    );
    Rejection {
        failure: Failure { kind: FailureKind::Damaged, message, sqlstate: None },
        event_type: None,
        origin: Origin::Hook,
        bytes: Vec::new(),
    }
}

fn damaged(path: &Path, problem: &str) -> Rejection {
    let mut bytes = Vec::new();
    // What can't be read is not kept; the message says which file it was.
    let _ = File::open(path).and_then(|file| file.take(DAMAGED_BYTES_KEPT_MAX as u64).read_to_end(&mut bytes));
    Rejection {
        failure: Failure {
            kind: FailureKind::Damaged,
            message: format!("spool file {}: {problem}; what was whole before that was taken in", path.display()),
            sqlstate: None,
        },
        event_type: None,
        origin: Origin::Hook,
        bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::claude::hook;
    use crate::config::HookCapture;
    use crate::event::{EventId, Timestamp};
    use crate::intake::redact::Redactor;
    use crate::intake::schema::Schemas;
    use crate::queue::{Queue, QueueConfig};
    use crate::telemetry::Metrics;

    fn scene(folder: &Path, max_pending_bytes: u64) -> (Spool, Arc<Intake>) {
        let config = QueueConfig { path: folder.join("queue"), max_pending_bytes };
        let queue = Queue::open(&config).unwrap().0;
        let schemas = Schemas::load(None, 1 << 20).unwrap();
        let intake = Arc::new(Intake::new(schemas, queue, Redactor::default(), Arc::new(Metrics::default())));
        (Spool::new(&folder.join("spool")), intake)
    }

    fn leave(spool: &Spool, session: &str) {
        spool.leave(&record(session, "")).unwrap();
    }

    fn record(session: &str, message: &str) -> crate::event::Record {
        let arrival = hook::Arrival {
            id: EventId::new(),
            received_at: Timestamp::now(),
            hook_type: None,
            working_directory: None,
            project_path: None,
        };
        let input =
            format!(r#"{{"session_id":"{session}","cwd":"/app","hook_event_name":"Stop","message":"{message}"}}"#);
        hook::record(input.as_bytes(), arrival, HookCapture::Summary, 1 << 20)
    }

    fn sessions(intake: &Intake) -> Vec<String> {
        let page = intake.queue().page(None, 10_000).unwrap();
        let payload = |json: &str| serde_json::from_str::<serde_json::Value>(json).unwrap();
        page.iter()
            .map(|envelope| {
                payload(envelope.event.payload().as_json())["claude_session_id"].as_str().unwrap().to_owned()
            })
            .collect()
    }

    fn take_in(spool: &Spool, intake: &Arc<Intake>) {
        SpoolReader::new(spool.clone(), intake.clone(), Duration::ZERO).0.look().unwrap();
    }

    #[test]
    fn files_are_taken_in_by_their_order_and_removed_once_they_are_in_the_queue() {
        let folder = tempfile::tempdir().unwrap();
        let (spool, intake) = scene(folder.path(), 1 << 30);
        let left: Vec<String> = (0..BATCH_RECORDS_MAX + 10).map(|number| format!("s{number}")).collect();
        left.iter().for_each(|session| leave(&spool, session));
        take_in(&spool, &intake);
        assert_eq!(sessions(&intake), left);
        assert!(spool.waiting().unwrap().is_empty());
    }

    #[test]
    fn a_damaged_file_becomes_a_dead_letter_and_the_next_one_is_taken_in() {
        let folder = tempfile::tempdir().unwrap();
        let (spool, intake) = scene(folder.path(), 1 << 30);
        leave(&spool, "cut");
        let path = spool.waiting().unwrap().remove(0);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        leave(&spool, "whole");
        take_in(&spool, &intake);
        assert_eq!(sessions(&intake), ["whole"]);
        assert!(spool.waiting().unwrap().is_empty());
        let letters = intake.queue().dead_letters(None, 10).unwrap();
        assert_eq!(letters.len(), 1);
        assert_eq!(letters[0].failure.kind, FailureKind::Damaged);
    }

    #[test]
    fn a_file_that_could_not_be_read_is_tried_again_when_it_changes_and_once_a_minute() {
        let now = Instant::now();
        let version = Version { inode: 7, changed_at: (100, 5) };
        let unread = |records_taken| {
            let error = "Too many open files".to_owned();
            KeptFile::new(Kept::Unread { tried_at: now, error, records_taken }, Some(version))
        };
        let later = |seconds| now + Duration::from_secs(seconds);
        assert_eq!(unread(3).step(Some(version), later(59)), Step::Nothing);
        assert_eq!(unread(3).step(Some(version), later(60)), Step::Read(3));
        let touched = Version { changed_at: (100, 6), ..version };
        assert_eq!(unread(3).step(Some(touched), now), Step::Read(3));
        let other = Version { inode: 8, ..version };
        assert_eq!(unread(3).step(Some(other), now), Step::Read(0), "nothing of this one was taken");
        assert_eq!(unread(3).step(None, later(60)), Step::Nothing, "it can't be reached");
        let gone = |kept: KeptFile| KeptFile { gone_since: Some(1), ..kept };
        assert_eq!(gone(unread(3)).step(Some(version), later(60)), Step::Read(3), "it came back");
        assert_eq!(gone(unread(3)).step(Some(touched), later(60)), Step::Read(0), "perhaps another one of its inode");
        // What is done with is never read again, whatever happens to it; another file of its name is.
        let done = [
            (KeptFile::new(Kept::TakenIn, Some(version)), Step::Remove),
            (KeptFile::new(Kept::Fatal, Some(version)), Step::MoveAside),
        ];
        for (mut file, step) in done {
            assert_eq!(file.step(Some(version), later(3600)), step);
            assert_eq!(file.step(None, now), Step::Nothing);
            assert_eq!(file.step(Some(touched), now), step);
            file.gone_since = Some(1);
            assert_eq!(file.step(None, now), Step::Nothing);
            assert_eq!(file.step(Some(touched), now), step, "its last change was seen before it was gone");
            assert_eq!(file.step(Some(other), now), Step::Read(0));
            file.gone_since = Some(1);
            assert_eq!(file.step(Some(version), now), Step::Read(0));
        }
    }

    #[test]
    fn of_files_that_are_gone_the_latest_ten_thousand_are_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let (spool, intake) = scene(folder.path(), 1 << 30);
        let (mut reader, _handle) = SpoolReader::new(spool, intake, Duration::ZERO);
        let version = Version { inode: 7, changed_at: (100, 5) };
        let keep = |reader: &mut SpoolReader, names: std::ops::Range<usize>| {
            for name in names {
                reader.kept.insert(format!("{name:05}").into(), KeptFile::new(Kept::TakenIn, Some(version)));
            }
        };
        keep(&mut reader, 0..10);
        reader.note_gone(&["00003".into()]);
        keep(&mut reader, 10..GONE_FILES_MAX);
        reader.note_gone(&["00003".into()]);
        assert_eq!(reader.kept.len(), GONE_FILES_MAX);
        keep(&mut reader, GONE_FILES_MAX..GONE_FILES_MAX + 100);
        reader.note_gone(&["00003".into()]);
        assert_eq!(reader.kept.len(), GONE_FILES_MAX + 1);
        let has = |name: &str| reader.kept.contains_key(Path::new(name));
        assert!(has("00003") && !has("00000") && !has("00009") && has("10050"));
    }

    #[test]
    fn a_file_whose_reading_failed_in_the_middle_is_read_on_where_it_failed() {
        let folder = tempfile::tempdir().unwrap();
        let (spool, intake) = scene(folder.path(), 1 << 30);
        let mut draft = spool.draft().unwrap();
        // The second lies beyond what is read at once.
        for (session, bytes) in [("first", 1), ("second", 100_000)] {
            draft.add(&record(session, &"x".repeat(bytes))).unwrap();
        }
        draft.commit(crate::intake::spool::Kind::Events).unwrap();
        let path = spool.waiting().unwrap().remove(0);
        let whole = std::fs::read(&path).unwrap();
        let (mut reader, _handle) = SpoolReader::new(spool.clone(), intake.clone(), Duration::ZERO);
        let frames = Frames::open(&path).unwrap();
        let version = Version::from(&frames.metadata().unwrap());
        // The disk fails now.
        File::options().write(true).open(&path).unwrap().set_len(20_000).unwrap();
        let mut gathered = Gathered::default();
        let attempt = Attempt { file: path.file_name().unwrap().to_owned(), count: 1 };
        let file = OpenFile { path: path.clone(), version, frames };
        reader.take_file(file, &attempt, 0, &mut gathered).unwrap();
        reader.hand_over(&mut gathered).unwrap();
        assert_eq!(sessions(&intake), ["first"]);
        let unread = reader.unread();
        assert_eq!(unread.files, 1);
        assert!(unread.error.unwrap().starts_with(&format!("{}: ", path.display())));
        // And works again.
        std::fs::write(&path, whole).unwrap();
        reader.look().unwrap();
        assert_eq!(sessions(&intake), ["first", "second"]);
        assert!(spool.waiting().unwrap().is_empty());
        assert_eq!(spool.unread(), UnreadSpool::default());
    }

    #[test]
    fn a_full_queue_leaves_the_files_where_they_are_until_there_is_room() {
        let folder = tempfile::tempdir().unwrap();
        let (spool, intake) = scene(folder.path(), 300);
        leave(&spool, "first");
        take_in(&spool, &intake);
        (0..3).for_each(|_| leave(&spool, "later"));
        let (reader, handle) = SpoolReader::new(spool.clone(), intake.clone(), Duration::from_secs(60));
        let thread = std::thread::spawn(move || reader.run());
        let deadline = Instant::now() + Duration::from_secs(10);
        while !intake.queue().stats().full {
            assert!(Instant::now() < deadline, "it was never full");
            std::thread::yield_now();
        }
        assert_eq!(spool.waiting().unwrap().len(), 3);
        let first = intake.queue().page(None, 1).unwrap().remove(0);
        intake.queue().settle(vec![(first.sequence, crate::queue::Outcome::Delivered)]).unwrap();
        while !handle.is_idle() {
            assert!(Instant::now() < deadline, "it does not go on");
            std::thread::yield_now();
        }
        assert_eq!(sessions(&intake), ["later", "later", "later"]);
        handle.stop();
        thread.join().unwrap().unwrap();
    }
}
