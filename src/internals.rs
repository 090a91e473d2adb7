//! The parts that the benchmarks, the fuzz target and the integration tests drive without the program around them.
//!
//! No interface for others: it changes with what is inside.

pub use crate::agent::{Agent, Memory};
pub use crate::claude::repair::{Segment, salvage};
pub use crate::config::{Config, Environment, TableName};
pub use crate::event::{
    Candidate, Cursor, Envelope, Event, EventId, ForeignKeys, Origin, Rejection, Sequence, Timestamp,
};
pub use crate::intake::schema::Schemas;
pub use crate::queue::{Batch, Queue, QueueConfig, Ticket};
pub use crate::sink::drain::{DrainConfig, Drainer};
pub use crate::sink::postgres::{ConnectSettings, Needs, PostgresSink, TargetSource};
pub use crate::sink::{Delivered, Place, Sink, Verdict};
pub use crate::telemetry::Metrics;
pub use uuid::Uuid;

pub use crate::transcript::{Found, LineReport, START, Source, TranscriptKind};
