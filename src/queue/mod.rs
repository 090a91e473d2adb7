//! Events wait here: a durable queue on disk between what captures them and what delivers them.
//!
//! ```text
//!  append ─┐                                       ┌─ window   (the drainer: oldest durable envelopes)
//!  settle ─┼─► inbox ─► writer thread ─► store ────┼─ page     (people)
//!  retry  ─┘     bounded    │  one batch, one sync └─ dead_letters
//!                           └─► counters, watch of the newest durable sequence, room, failure
//! ```
//!
//! # Promises
//!
//! 1. A batch is taken whole or not at all: its events, its rejections and its cursors are one commit. So a cursor never
//!    runs ahead of its events, where the next batch of the same file is handed over when this one is durable.
//! 2. What is acknowledged is durable against power loss, and nothing can be read through [`Queue::window`] before it is.
//! 3. Nothing is removed but by [`Queue::settle`] and [`Queue::drop_dead_letter`]. Losing a settlement only repeats a delivery.
//! 4. Sequences are the order of acceptance and are never used twice.
//! 5. A record that can't be read back becomes a dead letter; it stops nothing.
//! 6. After a storage error the handle is dead ([`Queue::failed`]); there is no half-state to go on from.
//! 7. Everything is bounded: pending bytes, bytes waiting for the writer, pages, kept bytes of dead letters.
//!
//! Not promised: several processes at once (one holds the lock), order between batches that are submitted at the same
//! time from different threads, and a size on disk close to the pending bytes (the files shrink when little is pending).
//!
//! # How it is done
//!
//! One thread owns all changes. It takes everything that has arrived, makes one batch of it, syncs once and
//! answers everybody (group commit); it never waits for more to come. Batches that only settle or only move cursors are
//! visible at once, and durable some milliseconds later or with the next sync, whichever comes first.
//!
//! `store` is all that is on disk as one map, with its keys and the syncing; `database` one sled database, `sealed` those
//! that are full and only read, `journal` the file through which small batches go first, `memtable` what of them is not
//! in sled yet; `codec` the bytes of a record, `block` of several in one value; `folder` the files around it and opening;
//! `salvage` what is left of a damaged one; `guard` ends the process when sled does not come back; `writer` the thread;
//! `reader` what everybody may do; `looking` the copy that is looked at without a watcher; `submission` the way to the writer.
//! sled is known in this module only.

mod block;
mod codec;
mod database;
pub mod faults;
mod folder;
mod guard;
mod journal;
mod looking;
mod memtable;
mod reader;
mod salvage;
mod sealed;
#[cfg(test)]
#[expect(dead_code, reason = "its users are still the queue's")]
mod segments;
mod store;
mod submission;
#[cfg(test)]
pub(crate) mod tests;
mod writer;

use std::borrow::Borrow;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::watch;

pub use self::folder::Repair;
pub use self::looking::remove_all as remove_copies;
pub use self::store::CursorId;
pub use self::submission::Ticket;

use self::codec::{CodecError, Content, Letter};
use self::database::StoreError;
use self::store::Store;
use self::submission::{EncodedBatch, EncodedCursor, EncodedRejection, Inbox, Reply, Work};
use crate::event::{Cursor, DeadContent, DeadLetter, Envelope, Event, Failure, Origin, Rejection, Sequence, Timestamp};
use crate::private_folder::FolderError;

/// Where the queue is and how large it may become.
#[derive(Clone, Debug)]
pub struct QueueConfig {
    /// Folder of the queue; made with mode 0700 where it is missing.
    pub path: PathBuf,
    /// Bytes of pending events, as they are encoded, above which nothing more is taken in.
    pub max_pending_bytes: u64,
}

/// What is taken in together: all of it or nothing.
#[derive(Clone, Default, Debug)]
pub struct Batch {
    pub events: Vec<Event>,
    /// Input that did not become an event; kept as dead letters.
    pub rejections: Vec<Rejection>,
    /// How far files have been read with this batch. `None` forgets the file.
    pub cursors: Vec<(PathBuf, Option<Cursor>)>,
}

/// A batch was taken in.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Accepted {
    /// The numbers of the batch's events, in their order.
    pub sequences: Vec<Sequence>,
}

/// What became of a pending event.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It is durably where it belongs.
    Delivered,
    /// It can't be delivered: it becomes a dead letter. `attempts` counts all its refused deliveries.
    Refused { failure: Failure, attempts: u32 },
}

/// What became of the wish to send a dead letter again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RetryOutcome {
    /// It waits at the tail again, under a new number.
    Queued(Sequence),
    /// There is no such dead letter.
    NotFound,
    /// It never was an event (or can't be read any more): it can only be looked at or dropped.
    NotAnEvent,
}

/// What opening found.
#[derive(Clone, Default, Debug)]
pub struct Recovery {
    pub pending: u64,
    pub pending_bytes: u64,
    pub dead_letters: u64,
    /// What was put right, to be logged: [`Repair::is_loss`] as an error, the others as warnings.
    pub repairs: Vec<Repair>,
}

/// The queue in numbers. Kept up to date with every change; asking costs a lock and a copy.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct QueueStats {
    /// Events waiting, durable or about to be.
    pub pending: u64,
    /// Their encoded bytes.
    pub pending_bytes: u64,
    /// The one that waits longest and when it was captured.
    pub oldest: Option<(Sequence, Timestamp)>,
    pub dead_letters: u64,
    /// Size of the files.
    pub disk_bytes: u64,
    /// No room: the last batch that did not fit would still not fit.
    pub full: bool,
    /// The number given last, to an event or a rejection.
    pub last_sequence: Option<Sequence>,
}

/// Why the queue did not do it.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum QueueError {
    #[error("queue is full: {pending_bytes} of at most {max} bytes are waiting to be delivered")]
    Full { pending_bytes: u64, max: u64 },
    #[error("could not open queue {}: held by {}; ask it with \"headspace-watcher status\"", path.display(), holder(*.pid))]
    InUse { path: PathBuf, pid: Option<u32> },
    #[error(
        "could not open queue {}: written in format {found}, this program knows up to {supported}; use the newer program again",
        path.display()
    )]
    TooNew { path: PathBuf, found: u32, supported: u32 },
    #[error("could not read queue {}: {cause}; the next start of the watcher sets it aside and starts anew", path.display())]
    Damaged { path: PathBuf, cause: String },
    /// Fail-stop: the handle is dead, and so should the process be.
    #[error("could not use queue {}: {cause}; {}, then start again", path.display(), way_out(cause))]
    Storage { path: PathBuf, cause: String },
    #[error("queue is closed")]
    Closed,
    #[error("no queue at {}: it is made when the watcher first runs", path.display())]
    NotFound { path: PathBuf },
    #[error("could not queue an event: {cause}")]
    TooLarge { cause: String },
    #[error("could not look into queue {}: {cause}", path.display())]
    Look { path: PathBuf, cause: String },
    #[error(transparent)]
    Folder(FolderError),
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".into(), |pid| format!("process {pid}"))
}

/// What someone can do about an error of the system, in the words of glibc, musl or macOS.
fn way_out(cause: &str) -> &'static str {
    const KNOWN: &[(&str, &str)] = &[
        ("No space left", "free space"),
        ("uota exceeded", "free space"),
        ("Permission denied", "mend its owner or mode, or set queue.path"),
        ("Operation not permitted", "mend its owner or mode, or set queue.path"),
        ("Read-only file system", "make it writable, or set queue.path"),
        ("Too many open files", "raise the limit of open files (ulimit -n)"),
        ("No file descriptors available", "raise the limit of open files (ulimit -n)"),
    ];
    KNOWN.iter().find(|(words, _)| cause.contains(words)).map_or("free space or mend the disk", |(_, way_out)| way_out)
}

/// Most chunks of a cursor: room for two paths of the greatest length.
const CURSOR_CHUNKS_MAX: usize = 3;

/// The share of `max_pending_bytes` up to which the input of rejections is kept: one quarter.
const DEAD_LETTER_SHARE: u64 = 4;

/// A handle on the open queue; cheap to clone. When the last one is dropped the queue closes.
#[derive(Clone)]
pub struct Queue {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// What the handles and the writer share.
struct Shared {
    path: PathBuf,
    max_pending_bytes: u64,
    inbox: Inbox<Work>,
    /// The current generation; `None` once closed. Readers clone it and let go.
    store: RwLock<Option<Arc<Store>>>,
    state: Mutex<State>,
    /// Signalled when room appears, and at the end.
    room: Condvar,
    newest: watch::Sender<Option<Sequence>>,
    failed: watch::Sender<Option<QueueError>>,
}

#[derive(Default)]
struct State {
    stats: QueueStats,
    dead_letter_bytes: u64,
    /// Everything up to here has been synced.
    durable: u64,
    /// No pending event has a smaller number.
    first_pending: u64,
    failure: Option<QueueError>,
    closed: bool,
}

impl Queue {
    /// Opens the queue for this process alone, making or repairing it where needed.
    pub fn open(config: &QueueConfig) -> Result<(Queue, Recovery), QueueError> {
        guard::watch(&config.path);
        let opened = folder::open(config)?;
        let folder::Opened { counters, oldest, newest, .. } = opened;
        let last = counters.next_sequence - 1;
        let recovery = Recovery {
            pending: counters.pending,
            pending_bytes: counters.pending_bytes,
            dead_letters: counters.dead_letters,
            repairs: opened.repairs,
        };
        let stats = QueueStats {
            pending: counters.pending,
            pending_bytes: counters.pending_bytes,
            oldest,
            dead_letters: counters.dead_letters,
            disk_bytes: opened.store.disk_bytes(),
            full: counters.pending > 0 && counters.pending_bytes >= config.max_pending_bytes,
            last_sequence: Sequence::new(last),
        };
        let store = Arc::new(opened.store);
        let shared = Arc::new(Shared {
            path: config.path.clone(),
            max_pending_bytes: config.max_pending_bytes,
            inbox: Inbox::default(),
            store: RwLock::new(Some(Arc::clone(&store))),
            state: Mutex::new(State {
                stats,
                dead_letter_bytes: counters.dead_letter_bytes,
                durable: last,
                first_pending: oldest.map_or(counters.next_sequence, |(sequence, _)| sequence.get()),
                ..State::default()
            }),
            room: Condvar::new(),
            newest: watch::Sender::new(newest),
            failed: watch::Sender::new(None),
        });
        let writer =
            writer::Writer::new(Arc::clone(&shared), store, opened.lock, opened.mark, opened.generation, counters);
        let thread = std::thread::Builder::new()
            .name("queue-writer".into())
            .spawn(move || writer.run())
            .map_err(|error| folder::storage(&config.path, &error))?;
        Ok((Queue { handle: Arc::new(Handle { shared, writer: Mutex::new(Some(thread)) }) }, recovery))
    }

    /// Opens a copy of a queue that no watcher holds, to look at it. Nothing in its folder changes, and a watcher may
    /// start meanwhile.
    ///
    /// # Errors
    /// [`QueueError::InUse`] where a watcher holds it, [`QueueError::NotFound`] where there is none,
    /// [`QueueError::Look`] where it can't be copied, [`QueueError::Damaged`], [`QueueError::TooNew`].
    pub fn inspect(config: &QueueConfig) -> Result<Inspector, QueueError> {
        let folder::Inspected { store, counters, oldest, original, copy } = folder::inspect(&config.path)?;
        let path = config.path.clone();
        let last = counters.next_sequence.saturating_sub(1);
        let stats = QueueStats {
            pending: counters.pending,
            pending_bytes: counters.pending_bytes,
            oldest,
            dead_letters: counters.dead_letters,
            disk_bytes: store.disk_bytes(),
            full: counters.pending > 0 && counters.pending_bytes >= config.max_pending_bytes,
            last_sequence: Sequence::new(last),
        };
        Ok(Inspector { path, original, store, stats, last, _copy: copy })
    }

    /// Hands `batch` to the writer and returns; the ticket says when it is durable.
    ///
    /// Blocks only while more than 16 MiB wait for the writer. Batches submitted by one thread are taken in that order.
    pub fn submit(&self, batch: impl Borrow<Batch>) -> Ticket {
        let shared = &self.handle.shared;
        let (reply, ticket) = Ticket::new();
        match shared.encode(batch.borrow(), Timestamp::now()) {
            Ok(encoded) => shared.inbox.send(Work::Append(encoded, reply)),
            Err(error) => drop(reply.send(Err(error))),
        }
        ticket
    }

    /// Takes `batch` in: all or nothing, and durable against power loss on return. Blocks.
    pub fn append(&self, batch: Batch) -> Result<Accepted, QueueError> {
        self.submit(batch).wait()
    }

    /// The oldest durable envelopes after `after`, at most `limit`, until they have `bytes_max` encoded bytes; at least
    /// one if there is one. Removes nothing. A record that can't be read is set aside on the way.
    pub fn window(&self, after: Option<Sequence>, limit: usize, bytes_max: u64) -> Result<Vec<Envelope>, QueueError> {
        let mut before = Vec::new();
        loop {
            let found = self.read(after, limit, bytes_max)?;
            if found.damaged.is_empty() {
                return Ok(found.envelopes);
            }
            let damaged = found.damaged;
            if damaged == before {
                return Err(self.handle.shared.fail(&store::contradiction()));
            }
            before.clone_from(&damaged);
            self.send(|reply| Work::SetAside(damaged, reply)).wait()?;
            if !found.envelopes.is_empty() {
                return Ok(found.envelopes);
            }
        }
    }

    /// Forgets what was delivered and sets aside what was refused; unknown numbers are passed over.
    ///
    /// Visible on return, durable a little later: losing it only repeats a delivery.
    pub fn settle(&self, outcomes: Vec<(Sequence, Outcome)>) -> Result<(), QueueError> {
        self.submit_settle(outcomes).wait()
    }

    /// [`Queue::settle`] without waiting.
    pub fn submit_settle(&self, outcomes: Vec<(Sequence, Outcome)>) -> Ticket<()> {
        self.send(|reply| Work::Settle(outcomes, reply))
    }

    /// Pending envelopes after `after`, oldest first, to look at. May give fewer than `limit` (16 MiB at most, or one):
    /// only an empty page is the end. Passes over what can't be read.
    pub fn page(&self, after: Option<Sequence>, limit: usize) -> Result<Vec<Envelope>, QueueError> {
        self.read(after, limit, reader::PAGE_BYTES_MAX).map(|found| found.envelopes)
    }

    /// Dead letters after `after`, oldest first; fewer than `limit` as with [`Queue::page`].
    pub fn dead_letters(&self, after: Option<Sequence>, limit: usize) -> Result<Vec<DeadLetter>, QueueError> {
        let shared = &self.handle.shared;
        let first = after.map_or(1, |sequence| sequence.get().saturating_add(1));
        let (store, durable) = (shared.store()?, shared.state().durable);
        shared.reading(reader::dead_letters(&store, first, durable, limit))
    }

    pub fn dead_letter(&self, sequence: Sequence) -> Result<Option<DeadLetter>, QueueError> {
        let shared = &self.handle.shared;
        shared.reading(reader::dead_letter(&*shared.store()?, sequence))
    }

    /// Puts the event of a dead letter back at the tail under a new number; durable on return.
    pub fn retry_dead_letter(&self, sequence: Sequence) -> Result<RetryOutcome, QueueError> {
        self.send(|reply| Work::Retry(sequence, reply)).wait()
    }

    /// Forgets a dead letter for good; durable on return. `false` when there is none.
    pub fn drop_dead_letter(&self, sequence: Sequence) -> Result<bool, QueueError> {
        self.send(|reply| Work::Drop(sequence, reply)).wait()
    }

    /// How far each file has been read.
    pub fn cursors(&self) -> Result<Vec<(PathBuf, Cursor)>, QueueError> {
        let mut cursors = Vec::new();
        self.for_each_cursor(|path, cursor| cursors.push((path, cursor)))?;
        Ok(cursors)
    }

    /// As [`Queue::cursors`], one after the other.
    pub fn for_each_cursor(&self, seen: impl FnMut(PathBuf, Cursor)) -> Result<(), QueueError> {
        let shared = &self.handle.shared;
        shared.reading(reader::cursors(&*shared.store()?, seen))
    }

    /// How far one file has been read, and its path.
    pub fn cursor(&self, id: CursorId) -> Result<Option<(PathBuf, Cursor)>, QueueError> {
        let shared = &self.handle.shared;
        shared.reading(reader::cursor(&*shared.store()?, id))
    }

    /// Gives back what is kept in memory of the files for who reads them next. Takes some milliseconds.
    pub fn trim_memory(&self) -> Result<(), QueueError> {
        let shared = &self.handle.shared;
        shared.reading(shared.store()?.trim_cache())
    }

    /// The queue in numbers; reads nothing from disk.
    pub fn stats(&self) -> QueueStats {
        self.handle.shared.state().stats.clone()
    }

    /// The newest durable event that was taken in (or found at opening); changes with every append of events.
    pub fn subscribe(&self) -> watch::Receiver<Option<Sequence>> {
        self.handle.shared.newest.subscribe()
    }

    /// Bytes of pending events above which nothing more is taken in.
    pub fn max_pending_bytes(&self) -> u64 {
        self.handle.shared.max_pending_bytes
    }

    /// Whether a batch like the last refused one would be taken in now.
    pub fn has_room(&self) -> bool {
        !self.handle.shared.state().stats.full
    }

    /// Blocks until there is room or `deadline` has come; says whether there is. Also `true` when the queue has failed
    /// or was closed: then the next append says so.
    pub fn wait_for_room(&self, deadline: Instant) -> bool {
        let shared = &self.handle.shared;
        let mut state = shared.state();
        loop {
            if !state.stats.full || state.closed || state.failure.is_some() {
                return true;
            }
            let patience = deadline.saturating_duration_since(Instant::now());
            if patience == Duration::ZERO {
                return false;
            }
            (state, _) = shared.room.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Becomes the error with which the queue has failed, for good: the process must end (exit 74).
    pub fn failed(&self) -> watch::Receiver<Option<QueueError>> {
        self.handle.shared.failed.subscribe()
    }

    /// Does what was submitted, syncs, and lets go of files and lock. Later calls give [`QueueError::Closed`].
    pub fn close(&self) -> Result<(), QueueError> {
        self.handle.close()
    }

    /// Starts a fresh, small generation of files now if little is pending; says whether it did.
    ///
    /// Happens by itself when the files are large for what is in them.
    pub fn compact(&self) -> Result<bool, QueueError> {
        self.send(Work::Compact).wait()
    }

    fn read(&self, after: Option<Sequence>, limit: usize, bytes_max: u64) -> Result<reader::Envelopes, QueueError> {
        let shared = &self.handle.shared;
        let store = shared.store()?;
        let (first, durable) = {
            let state = shared.state();
            (state.first_pending, state.durable)
        };
        let first = after.map_or(1, |sequence| sequence.get().saturating_add(1)).max(first);
        shared.reading(reader::envelopes(&store, first, durable, limit, bytes_max))
    }

    fn send<T>(&self, work: impl FnOnce(Reply<T>) -> Work) -> Ticket<T> {
        let (reply, ticket) = Ticket::new();
        self.handle.shared.inbox.send(work(reply));
        ticket
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("path", &self.handle.shared.path).field("stats", &self.stats()).finish()
    }
}

impl Handle {
    fn close(&self) -> Result<(), QueueError> {
        let thread = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return Ok(()) };
        let (reply, ticket) = Ticket::new();
        self.shared.inbox.send(Work::Close(reply));
        let answer = ticket.wait();
        // The thread catches its own panics; there is nothing in its result.
        let _ = thread.join();
        answer
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // Nobody is left to hear of an error; what was acknowledged is durable already.
        let _ = self.close();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The current generation, for reading.
    fn store(&self) -> Result<Arc<Store>, QueueError> {
        if let Some(failure) = self.state().failure.clone() {
            return Err(failure);
        }
        self.store.read().unwrap_or_else(PoisonError::into_inner).clone().ok_or(QueueError::Closed)
    }

    /// A failed read ends the queue as a failed write does.
    fn reading<T>(&self, result: Result<T, StoreError>) -> Result<T, QueueError> {
        result.map_err(|error| self.fail(&error))
    }

    /// Fail-stop: remembers the first error, refuses everything from now on, tells who watches.
    fn fail(&self, error: &StoreError) -> QueueError {
        if matches!(error, StoreError::Corrupt(_)) {
            folder::mark_damaged(&self.path);
        }
        let mut state = self.state();
        let first = state.failure.get_or_insert_with(|| folder::storage(&self.path, error)).clone();
        drop(state);
        self.inbox.end(first.clone());
        self.failed.send_replace(Some(first.clone()));
        self.room.notify_all();
        first
    }

    fn encode(&self, batch: &Batch, captured_at: Timestamp) -> Result<EncodedBatch, QueueError> {
        let too_large = |error: CodecError| QueueError::TooLarge { cause: error.to_string() };
        let dead_letter_bytes = self.state().dead_letter_bytes;
        let events = batch
            .events
            .iter()
            .map(|event| codec::encode_event(event, captured_at, 0))
            .collect::<Result<Vec<_>, _>>()
            .map_err(too_large)?;
        let mut room = (self.max_pending_bytes / DEAD_LETTER_SHARE).saturating_sub(dead_letter_bytes);
        let mut rejections = Vec::with_capacity(batch.rejections.len());
        for rejection in &batch.rejections {
            let fits = rejection.bytes.len() as u64 <= room;
            room = if fits { room - rejection.bytes.len() as u64 } else { room };
            rejections.push(encode_rejection(rejection, fits, captured_at).map_err(too_large)?);
        }
        let cursors = batch
            .cursors
            .iter()
            .map(|(path, cursor)| encode_cursor(path, cursor.as_ref(), CURSOR_CHUNKS_MAX * store::CHUNK_BYTES))
            .collect::<Result<Vec<_>, _>>()
            .map_err(too_large)?;
        let event_bytes = events.iter().map(|record| record.len() as u64).sum();
        Ok(EncodedBatch { events, rejections, cursors, event_bytes })
    }
}

fn encode_rejection(
    rejection: &Rejection,
    keep_bytes: bool,
    failed_at: Timestamp,
) -> Result<EncodedRejection, CodecError> {
    let mut failure = rejection.failure.clone();
    if !keep_bytes {
        failure.message.push_str(" (its bytes were not kept: there are too many dead letters)");
    }
    let letter = Letter { failed_at, failure, content: Content::Input, attempts: 0 };
    Ok(EncodedRejection {
        letter: codec::encode_letter(&letter)?,
        content: codec::encode_input(rejection, if keep_bytes { &rejection.bytes } else { &[] })?,
    })
}

/// The record has `bytes_max` at most.
fn encode_cursor(path: &Path, cursor: Option<&Cursor>, bytes_max: usize) -> Result<EncodedCursor, CodecError> {
    let id = CursorId::of(path);
    let Some(cursor) = cursor else { return Ok(EncodedCursor { id, record: None }) };
    let mut record = codec::encode_cursor(path, cursor)?;
    if record.len() > bytes_max {
        // No folder has such a name: better to forget it than to be unable to store the cursor.
        record = codec::encode_cursor(path, &Cursor { project_path: None, ..cursor.clone() })?;
    }
    if record.len() > bytes_max {
        return Err(CodecError::TooLarge(record.len()));
    }
    Ok(EncodedCursor { id, record: Some(record) })
}

/// A copy of a queue that was opened to be looked at; the copy goes with it.
pub struct Inspector {
    path: PathBuf,
    /// The generation's folder in the queue itself.
    original: PathBuf,
    store: Store,
    stats: QueueStats,
    last: u64,
    /// Goes after `store`.
    _copy: looking::Copy,
}

impl Inspector {
    /// As [`Queue::page`].
    pub fn page(&self, after: Option<Sequence>, limit: usize) -> Result<Vec<Envelope>, QueueError> {
        let first = after.map_or(1, |sequence| sequence.get().saturating_add(1));
        let found = reader::envelopes(&self.store, first, self.last, limit, reader::PAGE_BYTES_MAX);
        self.reading(found.map(|found| found.envelopes))
    }

    /// As [`Queue::dead_letters`].
    pub fn dead_letters(&self, after: Option<Sequence>, limit: usize) -> Result<Vec<DeadLetter>, QueueError> {
        let first = after.map_or(1, |sequence| sequence.get().saturating_add(1));
        let mut letters = self.reading(reader::dead_letters(&self.store, first, self.last, limit))?;
        letters.iter_mut().for_each(|letter| self.name_original(letter));
        Ok(letters)
    }

    /// What can't be read any more has the folder it was in as its origin: the queue's, and not that of the copy.
    fn name_original(&self, letter: &mut DeadLetter) {
        if let DeadContent::Input(Rejection { origin: Origin::Transcript { path, .. }, .. }) = &mut letter.content
            && **path == *self.store.folder().to_string_lossy()
        {
            *path = self.original.to_string_lossy().into();
        }
    }

    pub fn cursors(&self) -> Result<Vec<(PathBuf, Cursor)>, QueueError> {
        let mut cursors = Vec::new();
        self.reading(reader::cursors(&self.store, |path, cursor| cursors.push((path, cursor))))?;
        Ok(cursors)
    }

    pub fn stats(&self) -> QueueStats {
        self.stats.clone()
    }

    fn reading<T>(&self, result: Result<T, StoreError>) -> Result<T, QueueError> {
        result.map_err(|error| match error {
            StoreError::Corrupt(cause) => QueueError::Damaged { path: self.path.clone(), cause },
            StoreError::Io(cause) => looking::look_error(&self.path, cause),
        })
    }
}
