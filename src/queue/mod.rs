//! Events wait here: a durable queue on disk between what captures them and what delivers them. A log of sled segments.
//!
//! ```text
//!  append ─┐                                      ┌─ window   (the drainer: oldest durable envelopes)
//!  settle ─┼─► inbox ─► writer thread ─► log ─────┼─ page     (people)
//!  retry  ─┘     bounded   one batch, one sync    └─ dead_letters
//! ```
//!
//! # Promises
//!
//! 1. A batch is taken whole or not at all: its events, its rejections and its cursors are one commit. So a cursor never
//!    runs ahead of its events, where the next batch of the same file is handed over when this one is durable.
//! 2. What is acknowledged is durable against power loss, and nothing can be read through [`Queue::window`] before it is.
//! 3. Nothing leaves but by [`Queue::settle`] and [`Queue::drop_dead_letter`]. Losing a settlement only repeats a delivery.
//! 4. Sequences are the order of acceptance, without gaps, and are never used twice.
//! 5. What is damaged is noticed when it is read. It is kept aside, all around it that can be read goes on, and it is said how
//!    many events are missing.
//! 6. After a storage error the handle is dead ([`Queue::failed`]); there is no half-state to go on from.
//! 7. Everything is bounded: pending bytes, bytes waiting for the writer, pages, number and bytes of dead letters of what never
//!    was an event.
//!
//! Not promised: several processes at once (one holds the lock), and order between batches that are submitted at the same
//! time from different threads.
//!
//! # How it is done
//!
//! A queue is a log: events enter at its tail and leave from its head, in order. So nothing is deleted one by one. The log is cut
//! into segments, each a sled database of some 64 MB that is only added to. What has left is a number, and so is what has been
//! acknowledged: both are in the mark `m`, in the batch of the events themselves, so what is beyond it was never committed. A segment
//! all of whose events have left goes as a whole. The newest one also has what changes: cursors, dead letters,
//! and the list of the segments before it. When it is large the next one is begun: these are carried over, a slice at a time between
//! batches, and its own mark, written last, makes it the current one.
//!
//! One thread owns all changes. It takes everything that has arrived, makes one batch of it, syncs once and answers everybody
//! (group commit); it never waits for more to come. What is settled goes along with the next batch, or by itself a moment later.
//!
//! Whatever is damaged has one answer: the segment is moved aside, its log is searched for whole pieces without sled, and what
//! is found takes its place under its old numbers. Numbers have no gaps, so what is missing is noticed when it is read. How many
//! events are missing is said; all cursors are forgotten, so that the transcripts are read again. Older segments never change and
//! are read in the same way, so only one database is open.
//!
//! From the inside to the outside: `codec` the bytes of a record; `piece` keys and values; `files` the files around the segments;
//! `guard` what sled is called through; `segment` one sled database; `remains` its log, read without sled; `damage` what takes
//! the place of one that can't be trusted; `log` all of them; `reader` what everybody may do; `rolling` how a segment is made;
//! `opening` how all is opened and put right; `submission` the way to the writer; `writer` the thread; `looking` the copy that is
//! looked at without a watcher. sled is known in this module only.

mod codec;
mod damage;
pub mod faults;
mod files;
mod guard;
mod log;
mod looking;
mod opening;
mod piece;
mod reader;
mod remains;
mod rolling;
mod segment;
mod shared;
mod submission;
#[cfg(test)]
pub(crate) mod tests;
mod values;
mod writer;

use std::borrow::Borrow;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::watch;

pub use self::looking::remove_all as remove_copies;
pub use self::piece::CursorId;
pub use self::submission::Ticket;
pub use self::values::{Accepted, Batch, Outcome, QueueConfig, QueueError, QueueStats, Repair, RetryOutcome};

use self::files::storage;
use self::looking::Copy;
use self::shared::Shared;
use self::submission::{Reply, Work};
use crate::event::{Cursor, DeadLetter, Envelope, Failure, FailureKind, Origin, Rejection, Sequence, Timestamp};

/// A handle on the open queue; cheap to clone. When the last one is dropped the queue closes.
#[derive(Clone)]
pub struct Queue {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
    /// Where it is a copy that is looked at: goes last.
    _copy: Option<Copy>,
}

impl Queue {
    /// Opens the queue for this process alone, making or repairing it where needed.
    pub fn open(config: &QueueConfig) -> Result<(Queue, Vec<Repair>), QueueError> {
        Queue::open_folder(&config.path, config, None)
    }

    /// Opens a copy of a queue that no watcher holds, to look at it; the copy goes with it. Nothing in the queue's own folder
    /// changes, and a watcher may start meanwhile.
    ///
    /// # Errors
    /// [`QueueError::InUse`] where a watcher holds it, [`QueueError::NotFound`] where there is none,
    /// [`QueueError::Look`] where it can't be copied, [`QueueError::Damaged`], [`QueueError::TooNew`].
    pub fn inspect(config: &QueueConfig) -> Result<Queue, QueueError> {
        let copy = Copy::of(&config.path)?;
        let folder = copy.folder().to_owned();
        let (queue, repairs) = Queue::open_folder(&folder, config, Some(copy)).map_err(|error| match error {
            QueueError::Storage { cause, .. } => looking::cant_copy(&config.path, &cause),
            error => error.with_path(&config.path),
        })?;
        match repairs.into_iter().find(Repair::is_loss) {
            Some(Repair::SegmentSetAside { cause, .. }) => {
                Err(QueueError::Damaged { path: config.path.clone(), cause })
            }
            _ => Ok(queue),
        }
    }

    fn open_folder(path: &Path, config: &QueueConfig, copy: Option<Copy>) -> Result<(Queue, Vec<Repair>), QueueError> {
        let (lock, opened) = opening::open(path)?;
        let stats = opened.stats(config);
        let repairs = opened.repairs.clone();
        let shared = Arc::new(Shared::new(path, config, stats, &opened));
        let writer = writer::Writer::new(Arc::clone(&shared), lock, opened);
        let thread = std::thread::Builder::new()
            .name("queue-writer".into())
            .spawn(move || writer.run())
            .map_err(|error| storage(path, &error))?;
        let queue = Queue { handle: Arc::new(Handle { shared, writer: Mutex::new(Some(thread)), _copy: copy }) };
        let rejections: Vec<Rejection> = repairs.iter().filter_map(|repair| notice(config, repair)).collect();
        if !rejections.is_empty() {
            queue.append(Batch { rejections, ..Batch::default() })?;
        }
        files::forget_repairs(path).map_err(|error| storage(path, &error))?;
        Ok((queue, repairs))
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
    /// one if there is one. Removes nothing.
    pub fn window(&self, after: Option<Sequence>, limit: usize, bytes_max: u64) -> Result<Vec<Envelope>, QueueError> {
        let shared = &self.handle.shared;
        // In this order: the log has what is durable, and what it has not any more is settled.
        let durable = shared.state().durable;
        let log = shared.log()?;
        let settled = shared.state().settled;
        let first = after.map_or(1, |sequence| sequence.get().saturating_add(1)).max(settled + 1);
        match reader::envelopes(&log, first, durable, limit, bytes_max) {
            // It was settled, and its segment removed, while it was read.
            Err(_) if self.handle.shared.state().settled >= first => self.window(after, limit, bytes_max),
            read => shared.reading(read),
        }
    }

    /// Forgets what was delivered and sets aside what was refused: the oldest events, without one left out. Those that were settled
    /// before are passed over.
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
    /// only an empty page is the end.
    pub fn page(&self, after: Option<Sequence>, limit: usize) -> Result<Vec<Envelope>, QueueError> {
        self.window(after, limit, reader::PAGE_BYTES_MAX)
    }

    /// Dead letters after `after`, oldest first; fewer than `limit` as with [`Queue::page`].
    pub fn dead_letters(&self, after: Option<Sequence>, limit: usize) -> Result<Vec<DeadLetter>, QueueError> {
        let shared = &self.handle.shared;
        let first = after.map_or(1, |sequence| sequence.get().saturating_add(1));
        shared.reading(reader::dead_letters(&shared.log()?.newest, first, limit))
    }

    pub fn dead_letter(&self, sequence: Sequence) -> Result<Option<DeadLetter>, QueueError> {
        let shared = &self.handle.shared;
        shared.reading(reader::dead_letter(&shared.log()?.newest, sequence))
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
        shared.reading(reader::cursors(&shared.log()?.newest, seen))
    }

    /// How far one file has been read, and its path.
    pub fn cursor(&self, id: CursorId) -> Result<Option<(PathBuf, Cursor)>, QueueError> {
        let shared = &self.handle.shared;
        shared.reading(reader::cursor(&shared.log()?.newest, id))
    }

    /// The queue in numbers; reads nothing from disk.
    pub fn stats(&self) -> QueueStats {
        self.handle.shared.state().stats.clone()
    }

    /// The number given last, where events wait; changes with every append of events, once they are durable.
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

    /// Begins a segment now, whatever the size of the newest.
    #[cfg(test)]
    pub fn roll(&self) -> Result<(), QueueError> {
        self.send(Work::Roll).wait()
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

/// What is missing, as a dead letter: so that it is not only said in the log of one moment.
fn notice(config: &QueueConfig, repair: &Repair) -> Option<Rejection> {
    let message = (repair.missing() > 0).then(|| repair.to_string())?;
    let failure = Failure { kind: FailureKind::Damaged, message, sqlstate: None };
    let origin = Origin::Transcript { path: config.path.to_string_lossy().as_ref().into(), offset: 0 };
    Some(Rejection { failure, event_type: None, origin, bytes: Vec::new() })
}

/// Whether sled goes on; to be asked once a second by who runs the queue at `path`.
///
/// # Errors
/// [`QueueError::Damaged`] where a call of it does not come back: the process must end, and the next opening sets the segment aside.
pub fn goes_on(path: &Path) -> Result<(), QueueError> {
    let Some(segment) = guard::stuck() else { return Ok(()) };
    files::mark_damaged(path, segment);
    let cause = format!("sled does not come back from segment {segment}");
    Err(QueueError::Damaged { path: path.to_owned(), cause })
}
