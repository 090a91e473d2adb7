//! What callers hand to the writer, and how they hear back.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::oneshot;

use super::values::{Accepted, Outcome, QueueError, RetryOutcome};
use crate::event::Sequence;

/// Bytes that may wait for the writer. One more batch than that is always taken, whatever its size.
pub(super) const WAITING_BYTES_MAX: usize = 16 << 20;

/// The answer to something that was handed to the writer: wait for it on a thread or await it.
///
/// Dropping it takes nothing back.
#[must_use = "what was submitted is durable only when the ticket says so"]
pub struct Ticket<T = Accepted> {
    answer: oneshot::Receiver<Result<T, QueueError>>,
    inbox: Arc<Inbox>,
}

/// The other end of a [`Ticket`]. Where it is dropped without an answer, the end of the queue is the answer.
pub(super) type Reply<T> = oneshot::Sender<Result<T, QueueError>>;

impl<T> Ticket<T> {
    /// Whether there is an answer by now.
    pub fn is_answered(&self) -> bool {
        self.answer.is_terminated() || !self.answer.is_empty()
    }

    /// Blocks this thread until there is an answer. Needs no runtime; in async code await the ticket instead.
    // tokio's own way to block panics on the threads of a runtime, where handles may be dropped.
    pub fn wait(self) -> Result<T, QueueError> {
        pollster::block_on(self)
    }
}

impl<T> Future for Ticket<T> {
    type Output = Result<T, QueueError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = Pin::new(&mut self.answer).poll(context);
        answer
            .map(|answer| answer.unwrap_or_else(|_| Err(self.inbox.lock().ended.clone().unwrap_or(QueueError::Closed))))
    }
}

/// A batch with everything encoded that does not depend on sequences.
#[derive(Default)]
pub(super) struct EncodedBatch {
    /// Records of events.
    pub events: Vec<Vec<u8>>,
    /// Records of dead letters.
    pub rejections: Vec<Vec<u8>>,
    /// Records of cursors and of sessions' ends, by kind and number; an empty one removes what is there.
    pub keyed: Vec<(u8, u64, Vec<u8>)>,
}

impl EncodedBatch {
    /// About what it takes, in memory and in sled.
    pub(super) fn bytes(&self) -> usize {
        let keyed = self.keyed.iter().map(|(.., record)| record);
        let records = self.events.iter().chain(&self.rejections).chain(keyed);
        256 + records.map(|record| record.len() + record.len() / 64 + 128).sum::<usize>()
    }
}

/// One thing for the writer to do.
pub(super) enum Work {
    Append(Result<EncodedBatch, QueueError>, Reply<Accepted>),
    Settle(Vec<(Sequence, Outcome)>, Reply<()>),
    Retry(Sequence, Reply<RetryOutcome>),
    Drop(Sequence, Reply<bool>),
    /// Begin a segment now.
    #[cfg(test)]
    Roll(Reply<()>),
    Close(Reply<()>),
}

impl Work {
    /// About what it takes in memory.
    fn bytes(&self) -> usize {
        if let Work::Append(Ok(batch), _) = self { batch.bytes() } else { 64 }
    }
}

/// Work in the order in which it came, bounded in bytes.
#[derive(Default)]
pub(super) struct Inbox {
    state: Mutex<InboxState>,
    /// Something arrived, or was taken.
    changed: Condvar,
}

#[derive(Default)]
struct InboxState {
    waiting: VecDeque<Work>,
    bytes: usize,
    /// Why nothing is taken in any more.
    ended: Option<QueueError>,
}

impl Inbox {
    /// Hands work over; blocks while far too many bytes wait.
    pub(super) fn send<T>(self: &Arc<Self>, work: impl FnOnce(Reply<T>) -> Work) -> Ticket<T> {
        let (reply, answer) = oneshot::channel();
        let work = work(reply);
        let bytes = work.bytes();
        let is_too_much = |state: &mut InboxState| {
            state.ended.is_none() && state.bytes > 0 && state.bytes + bytes > WAITING_BYTES_MAX
        };
        let mut state = self.changed.wait_while(self.lock(), is_too_much).unwrap_or_else(PoisonError::into_inner);
        if state.ended.is_none() {
            state.bytes += bytes;
            state.waiting.push_back(work);
            self.changed.notify_all();
        }
        Ticket { answer, inbox: Arc::clone(self) }
    }

    /// All that has arrived, at least one; nothing when `patience` ran out. `None` when the end has come.
    pub(super) fn take(&self, patience: Duration) -> Option<VecDeque<Work>> {
        let nothing = |state: &mut InboxState| state.waiting.is_empty() && state.ended.is_none();
        let waited = self.changed.wait_timeout_while(self.lock(), patience, nothing);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.ended.is_some() {
            return None;
        }
        state.bytes = 0;
        self.changed.notify_all();
        Some(std::mem::take(&mut state.waiting))
    }

    /// Refuses what waits and all that will come with `error`; the first call counts.
    pub(super) fn end(&self, error: QueueError) {
        let mut state = self.lock();
        state.ended.get_or_insert(error);
        state.waiting.clear();
        self.changed.notify_all();
    }

    pub(super) fn has_ended(&self) -> bool {
        self.lock().ended.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, InboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
