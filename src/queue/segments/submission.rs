//! What callers hand to the writer.

pub use crate::queue::submission::{EncodedBatch, EncodedCursor, Inbox, Reply, Request, Ticket};

use super::repairs::{Accepted, Outcome, QueueError, RetryOutcome};
use crate::event::Sequence;

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

impl Request for Work {
    fn bytes(&self) -> usize {
        match self {
            Work::Append(batch, _) => batch.bytes(),
            Work::Settle(outcomes, _) => 64 * outcomes.len(),
            _ => 64,
        }
    }

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
