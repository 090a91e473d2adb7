//! Takes what waits in the spool into the queue.
//!
//! One thread, woken by who leaves something and by the clock. Files are taken in order, small ones together, large ones
//! in parts; see `spool` for what is promised. When the queue is full it waits for room: the files are the buffer.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{debug, error, info, warn};
use uuid::Uuid;

use super::Intake;
use super::spool::{Attempt, DAMAGED_BYTES_KEPT_MAX, Frame, Frames, ReadError, Spool};
use crate::event::{Failure, FailureKind, Origin, Rejection, Timestamp};
use crate::queue::{Batch, QueueError};

/// Records and bytes that go into one batch.
const BATCH_RECORDS_MAX: usize = 512;
const BATCH_BYTES_MAX: usize = 1 << 20;

/// A record above this takes memory that counts, also on its way into the queue.
const LARGE_FRAME_BYTES: usize = 256 << 10;

/// Times that the program may end while it processes a file, before the file is moved aside.
const ATTEMPTS_MAX: u32 = 2;

/// How often a stop is looked for while there is no room.
const ROOM_CHECK_INTERVAL: Duration = Duration::from_millis(100);

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
    /// Files that can't be removed, or not read: passed over, so that they are neither taken in again and again nor
    /// complained of at every look.
    passed_over: HashSet<PathBuf>,
    unread: Arc<Unread>,
    /// The file that was being processed when the program ended last, if it did not end by itself.
    interrupted: Option<Attempt>,
}

/// What could not be read, as the reader counts it.
#[derive(Default)]
struct Unread {
    files: AtomicUsize,
    folder: AtomicBool,
}

/// What the spool's reader could not read.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct UnreadSpool {
    /// Files in it.
    pub files: usize,
    /// The folder itself, at the last look.
    pub folder: bool,
}

/// Ends a [`SpoolReader`] and tells whether it has work. Cheap to clone.
#[derive(Clone)]
pub struct SpoolHandle {
    spool: Spool,
    stop: Arc<AtomicBool>,
    idle: watch::Receiver<bool>,
    unread: Arc<Unread>,
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

    /// What could not be read so far.
    pub fn unread(&self) -> UnreadSpool {
        UnreadSpool {
            files: self.unread.files.load(Ordering::Acquire),
            folder: self.unread.folder.load(Ordering::Acquire),
        }
    }
}

impl SpoolReader {
    pub fn new(spool: Spool, intake: Arc<Intake>, polling_interval: Duration) -> (SpoolReader, SpoolHandle) {
        let stop = Arc::new(AtomicBool::new(false));
        let (idle, is_idle) = watch::channel(false);
        let unread = Arc::<Unread>::default();
        let handle = SpoolHandle { spool: spool.clone(), stop: stop.clone(), idle: is_idle, unread: unread.clone() };
        let (interrupted, passed_over) = (spool.attempt(), HashSet::new());
        (SpoolReader { spool, intake, polling_interval, stop, idle, passed_over, unread, interrupted }, handle)
    }

    /// Takes in what waits, again and again. Blocks until stopped; an error is the queue's.
    pub fn run(mut self) -> Result<(), QueueError> {
        while !self.stopped() {
            match self.spool.remove_old_drafts().and_then(|()| self.spool.waiting()) {
                Ok(paths) => {
                    if self.unread.folder.swap(false, Ordering::AcqRel) {
                        info!(spool = %self.spool.folder().display(), "the spool can be read again");
                    }
                    match self.take_in(paths) {
                        Ok(()) => self.idle.send_replace(true),
                        Err(Interruption::Stopped) => return Ok(()),
                        Err(Interruption::Queue(error)) => return Err(error),
                    };
                }
                Err(error) => {
                    if !self.unread.folder.swap(true, Ordering::AcqRel) {
                        warn!(spool = %self.spool.folder().display(), error = %error,
                              "the spool can't be read, trying on; mend its mode or set queue.spool_path");
                    }
                    self.idle.send_replace(true);
                }
            }
            self.spool.wait(self.polling_interval);
        }
        Ok(())
    }

    /// Takes in what waits once.
    #[cfg(test)]
    fn run_once(mut self) -> io::Result<Result<(), QueueError>> {
        let paths = self.spool.waiting()?;
        Ok(match self.take_in(paths) {
            Ok(()) | Err(Interruption::Stopped) => Ok(()),
            Err(Interruption::Queue(error)) => Err(error),
        })
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn take_in(&mut self, paths: Vec<PathBuf>) -> Result<(), Interruption> {
        let mut gathered = Gathered::default();
        for path in paths {
            if self.stopped() {
                return Err(Interruption::Stopped);
            }
            if self.passed_over.contains(&path) {
                continue;
            }
            self.idle.send_replace(false);
            let Some(attempt) = self.begin_attempt(&path, &mut gathered)? else { continue };
            match Frames::open(&path) {
                Ok(frames) => {
                    let taken = self.take_file(path, &attempt, frames, &mut gathered);
                    self.spool.clear_attempt();
                    taken?;
                }
                Err(error) => {
                    self.spool.clear_attempt();
                    self.pass_over_unread(path, &error);
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
        if let Err(error) = self.spool.move_aside(path) {
            self.pass_over(path.to_owned(), &error, "a file of the spool ends the program and can't be renamed");
        }
        Ok(None)
    }

    /// Gathers the records of a file, handing over on the way.
    ///
    /// If the program ends while a record is checked, or while a large one is on its way into the queue, the file is to
    /// blame; if it ends while the queue is written, it is not.
    fn take_file(
        &mut self,
        path: PathBuf,
        attempt: &Attempt,
        mut frames: Frames,
        gathered: &mut Gathered,
    ) -> Result<(), Interruption> {
        loop {
            let mut is_large = false;
            let checker = self.intake.checker().clone();
            let taken = match frames.next_frame(|bytes| checker.values().reserve(bytes)) {
                Ok(Some((frame, _reservation))) => {
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
                    self.pass_over_unread(path, &error);
                    return Ok(());
                }
                Err(ReadError::Damaged(problem)) => {
                    warn!(file = %path.display(), problem, "a file in the spool is damaged; what is whole is taken in");
                    gathered.batch.rejections.push(damaged(&path, problem));
                    break;
                }
            }
        }
        gathered.done.push(path);
        if gathered.is_full() { self.hand_over(gathered) } else { Ok(()) }
    }

    fn admit(&self, frame: &Frame, gathered: &mut Gathered) -> Result<(), ReadError> {
        gathered.closed.extend(self.intake.admit_record(frame.record()?, &mut gathered.batch));
        Ok(())
    }

    /// Appends what was gathered and, once that is durable, removes the files it came from.
    fn hand_over(&mut self, gathered: &mut Gathered) -> Result<(), Interruption> {
        let Gathered { batch, bytes, done, closed } = std::mem::take(gathered);
        if !batch.events.is_empty() || !batch.rejections.is_empty() {
            loop {
                // As for a request: a large event is copied on its way to the disk.
                let reservation = (bytes > BATCH_BYTES_MAX).then(|| self.intake.checker().values().reserve(bytes));
                let submitted = self.intake.submit(batch.clone()).wait();
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
        for path in done {
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                self.pass_over(path, &error, "a file of the spool was taken in but can't be removed");
            }
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

    fn pass_over_unread(&mut self, path: PathBuf, error: &io::Error) {
        if error.kind() != io::ErrorKind::NotFound {
            self.unread.files.fetch_add(1, Ordering::AcqRel);
        }
        self.pass_over(path, error, "a file in the spool can't be read and stays there");
    }

    fn pass_over(&mut self, path: PathBuf, error: &io::Error, what: &str) {
        if error.kind() != io::ErrorKind::NotFound {
            warn!(file = %path.display(), error = %error, "{what}; mend its mode or remove it");
            self.passed_over.insert(path);
        }
    }
}

/// What goes into the queue together.
#[derive(Default)]
struct Gathered {
    batch: Batch,
    bytes: usize,
    /// Files that are wholly in this batch or in one before it.
    done: Vec<PathBuf>,
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
    use crate::config::HookCapture;
    use crate::event::{EventId, Timestamp};
    use crate::intake::hook;
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
        SpoolReader::new(spool.clone(), intake.clone(), Duration::ZERO).0.run_once().unwrap().unwrap();
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
    fn a_full_queue_leaves_the_files_where_they_are_until_there_is_room() {
        let folder = tempfile::tempdir().unwrap();
        let (spool, intake) = scene(folder.path(), 300);
        leave(&spool, "first");
        take_in(&spool, &intake);
        (0..3).for_each(|_| leave(&spool, "later"));
        let (reader, handle) = SpoolReader::new(spool.clone(), intake.clone(), Duration::from_secs(60));
        let thread = std::thread::spawn(move || reader.run());
        let deadline = Instant::now() + Duration::from_secs(10);
        while intake.queue().has_room() {
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
