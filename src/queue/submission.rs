//! What callers hand to the writer, and how they hear back.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use tokio::sync::oneshot;

use super::piece::CursorId;
use super::values::{Accepted, Outcome, QueueError, RetryOutcome};
use crate::event::Sequence;

/// Bytes that may wait for the writer. One more batch than that is always taken, whatever its size.
pub const WAITING_BYTES_MAX: usize = 16 << 20;

/// The answer to something that was handed to the writer: wait for it on a thread or await it.
///
/// Dropping it takes nothing back.
#[must_use = "what was submitted is durable only when the ticket says so"]
#[derive(Debug)]
pub struct Ticket<T = Accepted> {
    answer: oneshot::Receiver<Result<T, QueueError>>,
}

/// The other end of a [`Ticket`].
pub type Reply<T> = oneshot::Sender<Result<T, QueueError>>;

impl<T> Ticket<T> {
    pub(super) fn new() -> (Reply<T>, Ticket<T>) {
        let (reply, answer) = oneshot::channel();
        (reply, Ticket { answer })
    }

    /// Blocks this thread until there is an answer. Needs no runtime; in async code await the ticket instead.
    // tokio's own way to block panics on the threads of a runtime, where handles may be dropped.
    pub fn wait(mut self) -> Result<T, QueueError> {
        struct Unpark(std::thread::Thread);
        impl Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut context = Context::from_waker(&waker);
        loop {
            if let Poll::Ready(answer) = Pin::new(&mut self).poll(&mut context) {
                return answer;
            }
            std::thread::park();
        }
    }
}

impl<T> Future for Ticket<T> {
    type Output = Result<T, QueueError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        // The writer answers everything it takes; an answer that never comes was never taken.
        Pin::new(&mut self.answer).poll(context).map(|answer| answer.unwrap_or(Err(QueueError::Closed)))
    }
}

/// A batch with everything encoded that does not depend on sequences.
pub struct EncodedBatch {
    /// Records of events.
    pub events: Vec<Vec<u8>>,
    pub rejections: Vec<EncodedRejection>,
    pub cursors: Vec<EncodedCursor>,
    /// Bytes of `events`.
    pub event_bytes: u64,
}

impl EncodedBatch {
    /// About what it takes, in memory and in sled.
    pub fn bytes(&self) -> usize {
        let events: usize = self.events.iter().map(|record| record.len() + 32).sum();
        let rejections: usize = self.rejections.iter().map(|one| one.letter.len() + one.content.len() + 64).sum();
        let cursors: usize = self.cursors.iter().map(|one| one.record.as_ref().map_or(0, Vec::len) + 64).sum();
        256 + events + rejections + cursors
    }
}

pub struct EncodedRejection {
    /// Record of the letter: one chunk.
    pub letter: Vec<u8>,
    pub content: Vec<u8>,
}

pub struct EncodedCursor {
    pub id: CursorId,
    /// `None` removes the cursor.
    pub record: Option<Vec<u8>>,
}

/// One thing for the writer to do.
pub enum Work {
    Append(EncodedBatch, Reply<Accepted>),
    Settle(Vec<(Sequence, Outcome)>, Reply<()>),
    Retry(Sequence, Reply<RetryOutcome>),
    Drop(Sequence, Reply<bool>),
    /// Begin a segment now.
    #[cfg_attr(not(test), expect(dead_code, reason = "tests ask for it"))]
    Roll(Reply<()>),
    Close(Reply<()>),
}

impl Work {
    /// About what it takes in memory.
    fn bytes(&self) -> usize {
        match self {
            Work::Append(batch, _) => batch.bytes(),
            Work::Settle(outcomes, _) => 64 * outcomes.len(),
            _ => 64,
        }
    }

    /// Answers with an error instead of doing it.
    fn refuse(self, error: &QueueError) {
        match self {
            Work::Append(_, reply) => drop(reply.send(Err(error.clone()))),
            Work::Settle(_, reply) | Work::Roll(reply) | Work::Close(reply) => {
                drop(reply.send(Err(error.clone())));
            }
            Work::Retry(_, reply) => drop(reply.send(Err(error.clone()))),
            Work::Drop(_, reply) => drop(reply.send(Err(error.clone()))),
        }
    }
}

/// Work in the order in which it came, bounded in bytes.
#[derive(Default)]
pub struct Inbox {
    state: Mutex<InboxState>,
    arrived: Condvar,
    taken: Condvar,
}

#[derive(Default)]
struct InboxState {
    waiting: VecDeque<(Work, usize)>,
    bytes: usize,
    /// Why nothing is taken in any more.
    ended: Option<QueueError>,
}

impl Inbox {
    /// Hands `work` over; blocks while far too many bytes wait.
    pub fn send(&self, work: Work) {
        let bytes = work.bytes();
        let mut state = self.lock();
        while state.ended.is_none() && state.bytes > 0 && state.bytes + bytes > WAITING_BYTES_MAX {
            state = self.taken.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(error) = state.ended.clone() {
            drop(state);
            return work.refuse(&error);
        }
        state.bytes += bytes;
        state.waiting.push_back((work, bytes));
        drop(state);
        self.arrived.notify_one();
    }

    /// All that has arrived, at least one; nothing when `patience` ran out (without one it waits for ever).
    /// `None` when the end has come.
    pub fn take(&self, patience: Option<Duration>) -> Option<Vec<Work>> {
        let nothing = |state: &mut InboxState| state.waiting.is_empty() && state.ended.is_none();
        let mut state = self.lock();
        match patience {
            None => state = self.arrived.wait_while(state, nothing).unwrap_or_else(PoisonError::into_inner),
            Some(patience) => {
                (state, _) =
                    self.arrived.wait_timeout_while(state, patience, nothing).unwrap_or_else(PoisonError::into_inner);
            }
        }
        if state.ended.is_some() {
            return None;
        }
        state.bytes = 0;
        let works = state.waiting.drain(..).map(|(work, _)| work).collect();
        drop(state);
        self.taken.notify_all();
        Some(works)
    }

    /// Refuses what waits and all that will come with `error`; the first call counts.
    pub fn end(&self, error: QueueError) {
        let mut state = self.lock();
        let error = state.ended.get_or_insert(error).clone();
        state.bytes = 0;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        self.taken.notify_all();
        self.arrived.notify_all();
        for (work, _) in waiting {
            work.refuse(&error);
        }
    }

    fn lock(&self) -> MutexGuard<'_, InboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
