//! Takes what waits in the spool into the queue.
//!
//! One thread, woken by whoever leaves something and by the clock. Files are taken in order, small ones together, large ones
//! in parts; see `spool` for what is promised. When the queue is full it waits for room: the files are the buffer.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{debug, error, info, warn};
use uuid::Uuid;

use super::Intake;
use super::record::{self, UNREADABLE_BYTES_MAX};
use super::spool::{Attempt, Lines, ReadError, Spool, UnreadSpool};
use crate::event::{Failure, FailureKind, Origin, Rejection, Timestamp};
use crate::queue::{Batch, QueueError};

/// Records and bytes that go into one batch.
const BATCH_RECORDS_MAX: usize = 512;
const BATCH_BYTES_MAX: usize = 1 << 20;

/// A record above this takes memory that counts, also on its way into the queue.
const LARGE_RECORD_BYTES: usize = 256 << 10;

/// Times that the program may end while it processes a file, before the file is renamed.
const ATTEMPTS_MAX: u32 = 2;

/// How often a stop is looked for while there is no room.
const ROOM_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Files that are remembered as done though the last look did not find them: their folder may have been renamed, or moved
/// away, for a while. Above this the oldest are forgotten.
const GONE_FILES_MAX: usize = 10_000;

/// Why a pass over the spool ended early.
#[derive(Debug)]
enum Interruption {
    /// It is to stop.
    Stopped,
    Queue(QueueError),
}

/// Reads the spool until it is stopped.
pub(crate) struct SpoolReader {
    spool: Spool,
    intake: Arc<Intake>,
    /// Time between two looks without being woken.
    polling_interval: Duration,
    stop: Arc<AtomicBool>,
    idle: watch::Sender<bool>,
    /// Files that could not be read at the last look, and why.
    unread: BTreeMap<PathBuf, String>,
    /// Files that are never to be read again but could not be removed or renamed. Known by their names, which are unique.
    done: BTreeMap<PathBuf, Done>,
    /// The file that was being processed when the program ended last, where it was killed or crashed.
    interrupted: Option<Attempt>,
}

/// What is still to be done with a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Done {
    /// All of it is in the queue: remove it.
    TakenIn,
    /// It ends the program and is a dead letter: rename it.
    Fatal,
}

/// Ends a [`SpoolReader`] and tells whether it has work. Cheap to clone.
#[derive(Clone)]
pub(crate) struct SpoolHandle {
    spool: Spool,
    stop: Arc<AtomicBool>,
    idle: watch::Receiver<bool>,
}

impl SpoolHandle {
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.spool.notify();
    }

    /// Whether the last look found nothing more to take in.
    pub(crate) fn is_idle(&self) -> bool {
        *self.idle.borrow()
    }

    /// What could not be read at the last look.
    pub(crate) fn unread(&self) -> UnreadSpool {
        self.spool.unread()
    }
}

impl SpoolReader {
    pub(crate) fn new(spool: Spool, intake: Arc<Intake>, polling_interval: Duration) -> (SpoolReader, SpoolHandle) {
        let stop = Arc::new(AtomicBool::new(false));
        let (idle, is_idle) = watch::channel(false);
        let handle = SpoolHandle { spool: spool.clone(), stop: stop.clone(), idle: is_idle };
        let (interrupted, unread, done) = (spool.attempt(), BTreeMap::new(), BTreeMap::new());
        (SpoolReader { spool, intake, polling_interval, stop, idle, unread, done, interrupted }, handle)
    }

    /// Takes in what waits, again and again. Blocks until stopped; an error is the queue's.
    pub(crate) fn run(mut self) -> Result<(), QueueError> {
        while !self.is_stopped() {
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
        let folder = self.spool.folder().display().to_string();
        match self.spool.remove_old_drafts().and_then(|()| self.spool.waiting()) {
            Ok(paths) => {
                self.ingest(&paths)?;
                let first = self.unread.first_key_value();
                let unread = UnreadSpool {
                    files: self.unread.len(),
                    error: first.map(|(path, error)| format!("{}: {error}", path.display())),
                    is_folder_unread: false,
                };
                if self.spool.set_unread(unread).is_folder_unread {
                    info!(spool = folder, "the spool can be read again");
                }
            }
            Err(error) => {
                let unread =
                    UnreadSpool { files: 0, error: Some(format!("{folder}: {error}")), is_folder_unread: true };
                if !self.spool.set_unread(unread).is_folder_unread {
                    warn!(spool = folder, error = %error,
                          "the spool can't be read, retrying; correct its owner or mode, or set queue.spool_path");
                }
            }
        }
        Ok(())
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Takes in the files at `paths`, which are sorted.
    fn ingest(&mut self, paths: &[PathBuf]) -> Result<(), Interruption> {
        self.unread.retain(|path, _| paths.binary_search(path).is_ok());
        self.forget_gone(paths);
        let mut gathered = Gathered::default();
        for path in paths {
            if self.is_stopped() {
                return Err(Interruption::Stopped);
            }
            if let Some(done) = self.done.get(path) {
                let finished = match done {
                    Done::TakenIn => std::fs::remove_file(path),
                    Done::Fatal => self.spool.set_failed(path),
                };
                if finished.is_ok() {
                    self.done.remove(path);
                }
                continue;
            }
            self.idle.send_replace(false);
            let Some(attempt) = self.begin_attempt(path, &mut gathered)? else { continue };
            let taken = match Lines::open(path) {
                Ok(lines) => self.ingest_file(path, lines, &attempt, &mut gathered),
                Err(error) => {
                    self.keep_unread(path, &error);
                    Ok(())
                }
            };
            self.spool.clear_attempt();
            taken?;
        }
        self.submit(&mut gathered)
    }

    /// Forgets the oldest of the files that are done and that `paths` lacks, where there are too many.
    fn forget_gone(&mut self, paths: &[PathBuf]) {
        let excess = self.done.len().saturating_sub(paths.len() + GONE_FILES_MAX);
        let gone = self.done.keys().filter(|path| paths.binary_search(path).is_err());
        for path in gone.take(excess).cloned().collect::<Vec<_>>() {
            self.done.remove(&path);
        }
    }

    /// Notes that this file is being processed. `None`, and the file is renamed, where that has ended the program
    /// [`ATTEMPTS_MAX`] times.
    fn begin_attempt(&mut self, path: &Path, gathered: &mut Gathered) -> Result<Option<Attempt>, Interruption> {
        let name = path.file_name().unwrap_or_default();
        let before = self.interrupted.take_if(|attempt| attempt.file == name).map_or(0, |attempt| attempt.count);
        if before < ATTEMPTS_MAX {
            let attempt = Attempt { file: name.to_owned(), count: before + 1 };
            self.spool.note_attempt(&attempt);
            return Ok(Some(attempt));
        }
        let failed = Spool::failed_path(path);
        error!(file = %failed.display(), attempts = before,
               "processing a file of the spool ended the program; it is renamed and becomes a dead letter");
        let message = format!(
            "spool file {}: processing it ended the program {before} times; it was not taken in. To try again, rename it \
             without .failed",
            failed.display()
        );
        gathered.batch.rejections.push(damaged(message, Vec::new()));
        // Its dead letter first: if the program ends between the two, there are two of them and not none.
        self.spool.clear_attempt();
        self.submit(gathered)?;
        if let Err(error) = self.spool.set_failed(path) {
            warn!(file = %path.display(), error = %error,
                  "a spool file ends the program and can't be renamed; correct the owner or mode of its folder, or remove it");
            self.done.insert(path.to_owned(), Done::Fatal);
        }
        Ok(None)
    }

    /// Gathers the records of a file, submitting them on the way.
    ///
    /// If the program ends while a record is checked, or while a large one is on its way into the queue, the file is to
    /// blame; if it ends while the queue is written, it is not.
    fn ingest_file(
        &mut self,
        path: &Path,
        mut lines: Lines,
        attempt: &Attempt,
        gathered: &mut Gathered,
    ) -> Result<(), Interruption> {
        loop {
            let mut line = Vec::new();
            let read = match lines.read(&mut line) {
                Ok(true) => self.ingest_record(&line, attempt, gathered).map_err(ReadError::Damaged),
                Ok(false) => break,
                Err(error) => Err(error),
            };
            match read {
                Ok(()) => {}
                Err(ReadError::Io(error)) => {
                    self.keep_unread(path, &error);
                    return Ok(());
                }
                Err(ReadError::Damaged(problem)) => {
                    warn!(file = %path.display(), problem, "a file in the spool is damaged; what stands before is taken in");
                    let message =
                        format!("spool file {}: {problem}; what stands before that was taken in", path.display());
                    line.truncate(UNREADABLE_BYTES_MAX);
                    gathered.batch.rejections.push(damaged(message, line));
                    break;
                }
            }
            // The files before this one are done with; this one is not.
            if gathered.is_full() {
                if line.len() <= LARGE_RECORD_BYTES {
                    self.spool.clear_attempt();
                }
                drop(line);
                self.submit(gathered)?;
            }
        }
        if self.unread.remove(path).is_some() {
            info!(file = %path.display(), "a spool file could be read again and is taken in");
        }
        gathered.files.push(path.to_owned());
        Ok(())
    }

    fn ingest_record(&self, line: &[u8], attempt: &Attempt, gathered: &mut Gathered) -> Result<(), &'static str> {
        if line.len() > LARGE_RECORD_BYTES {
            self.spool.note_attempt(attempt);
        }
        gathered.bytes += line.len();
        let _reservation = self.intake.checker().values().reserve(line.len());
        gathered.ended_sessions.extend(self.intake.admit_record(record::decode(line)?, &mut gathered.batch));
        Ok(())
    }

    /// Appends what was gathered and, once that is durable, removes the files it came from.
    fn submit(&mut self, gathered: &mut Gathered) -> Result<(), Interruption> {
        let Gathered { mut batch, bytes, files, ended_sessions } = std::mem::take(gathered);
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
        for (session, at) in ended_sessions {
            self.intake.session_closed(session, at);
        }
        for path in files {
            let Err(error) = std::fs::remove_file(&path) else { continue };
            if error.kind() != io::ErrorKind::NotFound {
                warn!(file = %path.display(), error = %error,
                      "a spool file was taken in but can't be removed; correct the owner or mode of its folder");
            }
            self.done.insert(path, Done::TakenIn);
        }
        Ok(())
    }

    fn wait_for_room(&self) -> Result<(), Interruption> {
        // Whatever ends the program now, no file is to blame.
        self.spool.clear_attempt();
        debug!("the queue is full; the spool waits for room");
        while !self.intake.queue().wait_for_room(Instant::now() + ROOM_CHECK_INTERVAL) {
            if self.is_stopped() {
                return Err(Interruption::Stopped);
            }
        }
        Ok(())
    }

    /// Keeps a file for later that could not be read. Logged once, until it could be.
    fn keep_unread(&mut self, path: &Path, error: &io::Error) {
        if error.kind() == io::ErrorKind::NotFound {
            return;
        }
        if self.unread.insert(path.to_owned(), error.to_string()).is_none() {
            warn!(file = %path.display(), error = %error,
                  "a spool file could not be read and is tried again; correct its owner or mode, or remove it");
        }
    }
}

/// What goes into the queue together.
#[derive(Default)]
struct Gathered {
    batch: Batch,
    bytes: usize,
    /// Files that are wholly in this batch or in one before it.
    files: Vec<PathBuf>,
    /// Sessions whose end is told in this batch.
    ended_sessions: Vec<(Uuid, Timestamp)>,
}

impl Gathered {
    fn is_full(&self) -> bool {
        self.batch.events.len() + self.batch.rejections.len() >= BATCH_RECORDS_MAX || self.bytes >= BATCH_BYTES_MAX
    }
}

fn damaged(message: String, bytes: Vec<u8>) -> Rejection {
    let failure = Failure { kind: FailureKind::Damaged, message, sqlstate: None };
    Rejection { failure, event_type: None, origin: Origin::Hook, bytes }
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
        let arrival = hook::Arrival {
            id: EventId::new(),
            received_at: Timestamp::now(),
            hook_type: None,
            working_directory: None,
            project_path: None,
        };
        let input = format!(r#"{{"session_id":"{session}","cwd":"/app","hook_event_name":"Stop"}}"#);
        spool.leave(&hook::record(input.as_bytes(), arrival, HookCapture::Summary, 1 << 20)).unwrap();
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
    fn of_files_that_are_gone_the_latest_ten_thousand_are_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let (spool, intake) = scene(folder.path(), 1 << 30);
        let (mut reader, _handle) = SpoolReader::new(spool, intake, Duration::ZERO);
        let path = |number: usize| PathBuf::from(format!("{number:05}"));
        reader.done = (0..GONE_FILES_MAX + 101).map(|number| (path(number), Done::TakenIn)).collect();
        reader.forget_gone(&[path(3)]);
        assert_eq!(reader.done.len(), GONE_FILES_MAX + 1);
        let has = |number: usize| reader.done.contains_key(&path(number));
        assert!(has(3) && !has(0) && !has(100) && has(101) && has(GONE_FILES_MAX + 100));
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
