//! Where events leave: what a delivery is, what can go wrong with it, and what follows from that.
//!
//! [`drain`] takes envelopes from the queue and hands them to a [`Sink`] in windows; [`postgres`] is the sink. The
//! trait stands between them because tests script it.
//!
//! Promises kept here: nothing is removed from the queue before the sink says that it is durable; repeating a
//! delivery is harmless; the order of rows is the order of acceptance; only the database's verdict on *this* event
//! sets it aside.

pub(crate) mod drain;
pub(crate) mod postgres;

use std::fmt;

use crate::event::{Envelope, Sequence};

/// Takes envelopes where they belong.
pub trait Sink: Send + Sync + 'static {
    /// Stores the envelopes, one transaction each, in order. Safe to repeat, safe to cancel.
    ///
    /// Stops at the first failure: what follows the failed envelope was not stored, neither of this window nor of one
    /// that follows it. An empty window only makes durable what came before it.
    fn deliver(&self, window: &[Envelope], place: Place) -> impl Future<Output = Delivery> + Send;

    /// Makes sure that the way to the database is open; for times when nothing is to be delivered.
    fn probe(&self) -> impl Future<Output = Result<(), DeliverError>> + Send;
}

/// How a window goes together with the one before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The last envelope of the window that is still under way: nothing of this one is stored unless that one is.
    /// `None` when no window is under way.
    pub after: Option<Sequence>,
    /// Whether the window is made durable. One that is not is made so by the next that is.
    pub durable: bool,
}

/// What became of a window.
#[derive(Debug)]
pub struct Delivery {
    /// One for each envelope from the start of the window up to the first failure.
    pub done: Vec<Delivered>,
    /// Whether all of `done`, and everything done before it, is on the server's disk. Else it must not be forgotten yet.
    pub durable: bool,
    /// Why the envelope after the last of `done` was not stored. `None` when all were.
    pub failure: Option<DeliverError>,
}

impl Delivery {
    /// Nothing was stored, or nobody knows what was.
    pub fn failed(failure: DeliverError) -> Self {
        Delivery { done: Vec::new(), durable: false, failure: Some(failure) }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delivered {
    Stored,
    /// An earlier delivery had stored it: the receipt refused the second copy.
    AlreadyStored,
}

impl Delivered {
    /// `repeated`: it had been stored before.
    pub fn of(repeated: bool) -> Self {
        if repeated { Delivered::AlreadyStored } else { Delivered::Stored }
    }
}

/// Whose fault a failure is, and so what to do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The moment's: the same event again after a pause, for ever.
    Again,
    /// Someone must fix something: pause the same way and say so.
    Operator,
    /// The event's own: a few tries, then a dead letter.
    Event,
}

impl Verdict {
    pub fn as_str(self) -> &'static str {
        match self {
            Verdict::Again => "again",
            Verdict::Operator => "operator",
            Verdict::Event => "event",
        }
    }
}

/// Why a delivery failed. `message` holds the server's own words and never text of a payload.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeliverError {
    pub verdict: Verdict,
    /// The server's code; `None` when the connection failed before the server could speak.
    pub sqlstate: Option<String>,
    pub message: String,
}

impl fmt::Display for DeliverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(sqlstate) = &self.sqlstate {
            write!(f, " (SQLSTATE {sqlstate})")?;
        }
        Ok(())
    }
}

impl std::error::Error for DeliverError {}
