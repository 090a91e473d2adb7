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
//! 1. A batch is taken whole or not at all: its events, its rejections, its cursors and its notes of sessions' ends are one commit. So a cursor never
//!    runs ahead of its events, where the next batch of the same file is handed over when this one is durable.
//! 2. What is acknowledged is durable against power loss, and nothing can be read through [`Queue::window`] before it is.
//! 3. Nothing leaves but by [`Queue::submit_settle`] and [`Queue::drop_dead_letter`]. Losing a settlement only repeats a delivery.
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
//! into segments, each a sled database of some 64 MB that one process writes, and only adds to. The folders are the list: a file in
//! each says with which number it begins. What has left is a number, and so is what has been acknowledged: both are in the mark `m`, in the
//! batch of the events themselves, so what is beyond it was never committed. A segment all of whose events have left goes as a
//! whole. The newest one also has what changes: cursors, sessions' ends and dead letters; what is removed of them is an empty value. When it is large
//! the next one is begun between two batches: these are carried over, and its file FIRST, written last, makes it the newest.
//!
//! One thread owns all changes. It takes everything that has arrived, makes one batch of it, syncs once and answers everybody
//! (group commit); it never waits for more to come. What is settled goes along with the next batch, or by itself a moment later.
//!
//! Each value says itself what it is and has a checksum. So a log can be read without sled, and all but the one that this process
//! writes are: older ones, those that are looked at, damaged ones, and at a start the one that was written last, behind which the
//! next is begun. Each batch counts its pieces, so one that was torn is told. Numbers have no gaps, so what is missing is noticed
//! when it is read. Then the segment's folder is renamed, which keeps it, and it is read on, with what is missing passed over. How many
//! numbers are missing is said; cursors are not carried over, so that the transcripts are read again.
//!
//! From the inside to the outside: `codec` the bytes of a record; `piece` keys and values; `files` the names and files of the folder;
//! `guard` what sled is called through; `segment` one sled database; `remains` its log, read without sled; `log` all of them; `reader`
//! what everybody may do; `opening` how all is opened and put right; `looking` how it is looked at without a watcher; `submission`
//! the way to the writer; `shared` what all have in common; `writer` the thread. sled is known in this module only.

mod codec;
mod files;
mod guard;
mod log;
mod looking;
mod opening;
mod piece;
mod reader;
mod remains;
mod segment;
mod shared;
mod submission;
#[cfg(test)]
pub(crate) mod tests;
mod values;
mod writer;

use std::borrow::Borrow;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::sync::watch;
use uuid::Uuid;

pub use self::submission::Ticket;
pub(crate) use self::values::{Accepted, Outcome, QueueError, QueueStats, Repair, RetryOutcome};
pub use self::values::{Batch, QueueConfig};

use self::files::storage;
use self::opening::Opened;
use self::shared::{Shared, State};
use self::submission::Work;
use crate::event::{Cursor, DeadLetter, Envelope, Failure, FailureKind, Origin, Rejection, Sequence, Timestamp};

/// A handle on the open queue; cheap to clone. When the last one is dropped the queue closes.
#[derive(Clone)]
pub struct Queue {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
    /// `None` where it is closed, or only looked at.
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Queue {
    /// Opens the queue for this process alone, making or repairing it where needed.
    pub fn open(config: &QueueConfig) -> Result<(Queue, Vec<Repair>), QueueError> {
        let path = &config.path;
        let (lock, opened) = opening::open(path)?;
        let Opened { log, marks, repairs, .. } = &opened;
        let shared = Shared::new(config, log.clone(), marks).map_err(|error| error.of_queue(path))?;
        shared.state().missing = repairs.iter().map(Repair::missing).sum();
        let (repairs, shared) = (repairs.clone(), Arc::new(shared));
        let writer = writer::Writer::new(Arc::clone(&shared), lock, opened);
        let thread = std::thread::Builder::new()
            .name("queue-writer".into())
            .spawn(move || writer.run())
            .map_err(|error| storage(path, &error))?;
        let queue = Queue { handle: Arc::new(Handle { shared, writer: Mutex::new(Some(thread)) }) };
        let rejections: Vec<Rejection> = repairs.iter().filter_map(|repair| notice(config, repair)).collect();
        if !rejections.is_empty() {
            queue.append(Batch { rejections, ..Batch::default() })?;
        }
        files::forget_damaged(path).map_err(|error| storage(path, &error))?;
        Ok((queue, repairs))
    }

    /// Looks at a queue that no watcher holds. Nothing in its folder changes, and a watcher may start meanwhile; whatever would change
    /// it is refused with [`QueueError::Closed`].
    ///
    /// # Errors
    /// [`QueueError::InUse`] where a watcher holds it, [`QueueError::NotFound`] where there is none,
    /// [`QueueError::Look`] where it can't be read, [`QueueError::Damaged`], [`QueueError::TooNew`].
    pub fn inspect(config: &QueueConfig) -> Result<Queue, QueueError> {
        let (log, marks) = looking::look(&config.path)?;
        let shared = Shared::new(config, log, &marks).map_err(|error| error.of_queue(&config.path))?;
        shared.inbox.end(QueueError::Closed);
        Ok(Queue { handle: Arc::new(Handle { shared: Arc::new(shared), writer: Mutex::new(None) }) })
    }

    /// Hands `batch` to the writer and returns; the ticket says when it is durable.
    ///
    /// Blocks only while more than 16 MiB wait for the writer. Batches submitted by one thread are taken in that order.
    pub fn submit(&self, batch: impl Borrow<Batch>) -> Ticket {
        let shared = &self.handle.shared;
        let encoded = shared.encode(batch.borrow(), Timestamp::now());
        shared.inbox.send(|reply| Work::Append(encoded, reply))
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
        let durable = shared.state().marks.acknowledged.sequence;
        let log = shared.log()?;
        let settled = shared.state().marks.settled.sequence;
        let first = after.map_or(1, |sequence| sequence.get().saturating_add(1)).max(settled + 1);
        match reader::envelopes(&log, first, durable, limit, bytes_max) {
            // It was settled, and its segment removed, while it was read.
            Err(_) if shared.state().marks.settled.sequence >= first => self.window(after, limit, bytes_max),
            read => shared.reading(read),
        }
    }

    /// Forgets what was delivered and sets aside what was refused: the oldest events, without one left out. Those that were settled
    /// before are passed over.
    ///
    /// Visible when the ticket says so, durable a little later: losing it only repeats a delivery.
    pub fn submit_settle(&self, outcomes: Vec<(Sequence, Outcome)>) -> Ticket<()> {
        self.handle.shared.inbox.send(|reply| Work::Settle(outcomes, reply))
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
        let last = shared.state().marks.acknowledged.sequence;
        shared.reading(reader::dead_letters(&shared.log()?.newest, first, last, limit))
    }

    pub fn dead_letter(&self, sequence: Sequence) -> Result<Option<DeadLetter>, QueueError> {
        let next = self.dead_letters(Sequence::new(sequence.get() - 1), 1)?.pop();
        Ok(next.filter(|letter| letter.sequence == sequence))
    }

    /// Puts the event of a dead letter back at the tail under a new number; durable on return.
    pub fn retry_dead_letter(&self, sequence: Sequence) -> Result<RetryOutcome, QueueError> {
        self.handle.shared.inbox.send(|reply| Work::Retry(sequence, reply)).wait()
    }

    /// Forgets a dead letter for good; durable on return. `false` when there is none.
    pub fn drop_dead_letter(&self, sequence: Sequence) -> Result<bool, QueueError> {
        self.handle.shared.inbox.send(|reply| Work::Drop(sequence, reply)).wait()
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

    /// When the SessionEnd hooks ran of sessions whose end is not an event yet.
    pub fn session_ends(&self) -> Result<Vec<(Uuid, Timestamp)>, QueueError> {
        let shared = &self.handle.shared;
        shared.reading(reader::session_ends(&shared.log()?.newest))
    }

    /// The queue in numbers; reads nothing from disk.
    pub fn stats(&self) -> QueueStats {
        self.handle.shared.stats(&self.handle.shared.state())
    }

    /// The number given last, where events wait; changes with every append of events, once they are durable.
    pub fn subscribe(&self) -> watch::Receiver<Option<Sequence>> {
        self.handle.shared.newest.subscribe()
    }

    /// Bytes of pending events above which nothing more is taken in.
    pub fn max_pending_bytes(&self) -> u64 {
        self.handle.shared.config.max_pending_bytes
    }

    /// Blocks until there is room or `deadline` has come; says whether there is. Also `true` when the queue has failed
    /// or was closed: then the next append says so.
    pub fn wait_for_room(&self, deadline: Instant) -> bool {
        let shared = &self.handle.shared;
        let patience = deadline.saturating_duration_since(Instant::now());
        let has_none = |state: &mut State| shared.stats(state).full && !shared.inbox.has_ended();
        let waited = shared.room.wait_timeout_while(shared.state(), patience, has_none);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Becomes the error with which the queue has failed, for good: the process must end (exit 74).
    pub fn failed(&self) -> watch::Receiver<Option<QueueError>> {
        self.handle.shared.failed.subscribe()
    }

    /// Does what was submitted, syncs, and lets go of files and lock. Later calls give [`QueueError::Closed`].
    pub fn close(&self) -> Result<(), QueueError> {
        self.handle.close()
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("path", &self.handle.shared.config.path).field("stats", &self.stats()).finish()
    }
}

impl Handle {
    fn close(&self) -> Result<(), QueueError> {
        let thread = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return Ok(()) };
        let answer = self.shared.inbox.send(Work::Close).wait();
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
