//! Where events come in: everything that is seen is checked here and handed to the queue.
//!
//! [`transcripts`] follows the files of Claude Code and asks [`claude_code`] what their lines mean; [`schema`] decides
//! what is an event. [`Intake`] is the one door into the queue: what passes the check goes in as an event, what does
//! not is kept among the dead letters with the field at fault, logged and counted.

pub mod claude_code;
mod json;
mod salvage;
pub mod schema;
pub mod transcripts;

use std::sync::Arc;

use tracing::warn;

use self::schema::{Candidate, Invalid, Refused, Schemas};
use crate::event::{EventType, Failure, FailureKind, Origin, Rejection};
use crate::queue::{Accepted, Batch, Queue, Ticket};
use crate::telemetry::Metrics;

/// The one door into the queue.
pub struct Intake {
    schemas: Schemas,
    queue: Queue,
    metrics: Arc<Metrics>,
}

impl Intake {
    pub fn new(schemas: Schemas, queue: Queue, metrics: Arc<Metrics>) -> Self {
        Intake { schemas, queue, metrics }
    }

    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Checks a candidate and puts it into the batch: as an event, or as a rejection that names the field.
    pub fn admit(&self, candidate: Candidate, batch: &mut Batch) {
        match self.schemas.check(candidate) {
            Ok(event) => batch.events.push(event),
            Err(refused) => {
                let Refused { invalid, candidate } = *refused;
                self.metrics.events_rejected.add(1);
                log_rejection(&invalid, &candidate.origin);
                let kind = match invalid {
                    Invalid::TooLarge { .. } => FailureKind::TooLarge,
                    Invalid::UnknownType { .. } | Invalid::Payload { .. } => FailureKind::Invalid,
                };
                // What is too large is not kept a second time: the message says where it is.
                let bytes = match kind {
                    FailureKind::TooLarge => Vec::new(),
                    _ => serde_json::to_vec(&candidate.payload).unwrap_or_default(),
                };
                batch.rejections.push(Rejection {
                    failure: Failure {
                        kind,
                        message: format!("{invalid}{}", place(&candidate.origin)),
                        sqlstate: None,
                    },
                    event_type: Some(EventType::new(&candidate.event_type)),
                    origin: candidate.origin,
                    bytes,
                });
            }
        }
    }

    /// Hands the batch over; it is durable when the ticket says so.
    pub fn submit(&self, batch: Batch) -> Ticket {
        self.queue.submit(batch)
    }

    /// Counts what the queue has taken in.
    pub fn note_accepted(&self, accepted: &Accepted) {
        self.metrics.events_captured.add(accepted.sequences.len() as u64);
    }
}

fn log_rejection(invalid: &Invalid, origin: &Origin) {
    match origin {
        Origin::Transcript { path, offset } => {
            warn!(file = %path, offset, field = invalid.field(), error = %invalid, "an event was rejected");
        }
        Origin::Hook | Origin::Http | Origin::Cli => {
            warn!(origin = origin.kind(), field = invalid.field(), error = %invalid, "an event was rejected");
        }
    }
}

fn place(origin: &Origin) -> String {
    match origin {
        Origin::Transcript { path, offset } => format!("; from {path} at byte {offset}"),
        Origin::Hook | Origin::Http | Origin::Cli => String::new(),
    }
}
