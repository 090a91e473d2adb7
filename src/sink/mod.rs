//! Where events leave: what a delivery is, what can go wrong with it, and what follows from that.
//!
//! [`drain`] takes envelopes from the queue and hands them to a [`Sink`] in windows; [`postgres`] is the sink. The
//! trait stands between them because tests script it.
//!
//! Promises kept here: nothing is removed from the queue before the sink says that it is durable; repeating a
//! delivery is harmless; the order of rows is the order of acceptance; only the database's verdict on *this* event
//! sets it aside.

pub mod drain;
pub mod postgres;

use std::fmt;

use crate::event::Envelope;

/// Takes envelopes where they belong.
pub trait Sink: Send + Sync + 'static {
    /// Stores the envelopes, one transaction each, in order. Safe to repeat, safe to cancel.
    ///
    /// Stops at the first failure: what follows the failed envelope was not stored. What is reported as done is
    /// durable.
    fn deliver(&self, window: &[Envelope]) -> impl Future<Output = Delivery> + Send;

    /// Makes sure that the way to the database is open; for times when nothing is to be delivered.
    fn probe(&self) -> impl Future<Output = Result<(), DeliverError>> + Send;
}

/// What became of a window.
#[derive(Debug)]
pub struct Delivery {
    /// One for each envelope from the start of the window up to the first failure. All of them are durable.
    pub done: Vec<Delivered>,
    /// Why the envelope after the last of `done` was not stored. `None` when all were.
    pub failure: Option<DeliverError>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delivered {
    Stored,
    /// An earlier delivery had stored it: the receipt refused the second copy.
    AlreadyStored,
}

/// Whose fault a failure is, and so what to do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The moment's: the same event again after a pause, for ever.
    Again,
    /// Someone must mend something: pause the same way and say so.
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
