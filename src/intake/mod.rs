//! Where events come in: everything that is seen is checked here and handed to the queue.
//!
//! [`transcripts`] follows the files of Claude Code, and [`claude`](crate::claude) makes events of their lines and of what
//! its hooks leave in the [`spool`]; [`sessions`] knows what the system tells of sessions; [`request`] takes what other
//! programs hand in. [`redact`] strikes out secrets before anything is written, and [`schema`] decides what is an event.
//! [`Intake`] is the one door into the queue: what passes the check goes in as an event, what does not is kept among the
//! dead letters with the field at fault, logged and counted.

pub(crate) mod record;
pub(crate) mod redact;
pub(crate) mod request;
pub(crate) mod retention;
pub(crate) mod schema;
pub(crate) mod sessions;
pub(crate) mod spool;
pub(crate) mod spool_reader;
pub(crate) mod transcripts;

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use tracing::warn;
use uuid::Uuid;

use self::redact::Redactor;
use self::request::IdempotencyKeys;
use self::schema::{Invalid, Refused, Schemas};
use crate::agent::Agent;
use crate::claude::hook;
use crate::event::{Candidate, Event, EventType, Failure, FailureKind, Origin, Record, Rejection, Timestamp};
use crate::json::ValuesMemory;
use crate::queue::{Accepted, Batch, Queue, QueueError, Ticket};
use crate::telemetry::{Metrics, RecentEvent};

/// Makes events of candidates: strikes out secrets, then asks the schemas. Needs no queue.
pub(crate) struct Checker {
    schemas: Schemas,
    redactor: Redactor,
    values: ValuesMemory,
}

impl Checker {
    pub(crate) fn new(schemas: Schemas, redactor: Redactor) -> Checker {
        Checker { schemas, redactor, values: ValuesMemory::default() }
    }

    /// The event, redacted, when it fits its schema.
    ///
    /// `max_event_bytes` is a limit on the texts as they came, and on the event as it would be stored: an event that is too
    /// large is not redacted first, as that takes much longer than to see its size.
    pub(crate) fn check(&self, mut candidate: Candidate) -> Result<Event, Box<Refused>> {
        if let Err(invalid) = self.schemas.check_texts(&candidate) {
            return Err(Box::new(Refused { invalid, candidate }));
        }
        self.redactor.payload(&mut candidate.payload);
        self.schemas.check(candidate)
    }

    /// Bytes that a payload has at most.
    pub(crate) fn event_bytes_max(&self) -> u64 {
        self.schemas.event_bytes_max()
    }

    /// Memory for parsed payloads: to be reserved while one is parsed and checked.
    pub(crate) fn values(&self) -> &ValuesMemory {
        &self.values
    }
}

/// The one door into the queue.
pub(crate) struct Intake {
    checker: Arc<Checker>,
    keys: IdempotencyKeys,
    queue: Queue,
    metrics: Arc<Metrics>,
    /// Sessions whose SessionEnd hook has come, until the follower asks.
    closings: Mutex<BTreeMap<Uuid, sessions::Closing>>,
}

impl Intake {
    pub(crate) fn new(schemas: Schemas, queue: Queue, redactor: Redactor, metrics: Arc<Metrics>) -> Self {
        let checker = Arc::new(Checker::new(schemas, redactor));
        Intake { checker, keys: IdempotencyKeys::default(), queue, metrics, closings: Mutex::default() }
    }

    pub(crate) fn checker(&self) -> &Arc<Checker> {
        &self.checker
    }

    pub(crate) fn keys(&self) -> &IdempotencyKeys {
        &self.keys
    }

    pub(crate) fn queue(&self) -> &Queue {
        &self.queue
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// What is to be left in the spool, redacted.
    pub(crate) fn redacted(&self, record: Record) -> Record {
        self.checker.redactor.record(record)
    }

    /// Checks a candidate and puts it into the batch: as an event, or as a rejection that names the field.
    pub(crate) fn admit(&self, candidate: Candidate, batch: &mut Batch) {
        match self.checker.check(candidate) {
            Ok(event) => batch.events.push(event),
            Err(refused) => {
                let Refused { invalid, candidate } = *refused;
                self.metrics.events_rejected.add(&candidate.event_type, 1);
                log_rejection(&invalid, &candidate.origin);
                batch.rejections.push(rejection_of(&invalid, candidate));
            }
        }
    }

    /// Puts a record of the spool into the batch, with what a hook stands for besides its own event. Gives the session
    /// whose end it tells, for [`Intake::session_closed`] once the batch is durable.
    pub(crate) fn admit_record(&self, record: Record, batch: &mut Batch) -> Option<(Uuid, Timestamp)> {
        let candidate = match record {
            Record::Event(candidate) => candidate,
            Record::Rejected(rejection) => {
                self.count_rejection(rejection.event_type.as_ref(), &rejection.origin, &rejection.failure.message);
                batch.rejections.push(rejection);
                return None;
            }
        };
        if let Some(registration) = hook::registration(&candidate, |path| Agent::of_transcript(Path::new(path))) {
            self.admit(registration, batch);
        }
        let ended = hook::session_end(&candidate);
        // In the batch of the hook's own event: after a restart the follower finds it there.
        batch.session_ends.extend(ended.map(|(session, at)| (session, Some(at))));
        self.admit(candidate, batch);
        ended
    }

    /// Takes in a record that could not be written to the spool. Blocks until it is durable.
    pub(crate) fn take_record(&self, record: Record) -> Result<(), QueueError> {
        let mut batch = Batch::default();
        let ended = self.admit_record(record, &mut batch);
        self.submit(&mut batch).wait()?;
        if let Some((session, at)) = ended {
            self.session_closed(session, at);
        }
        Ok(())
    }

    /// Counts and logs input that is no event.
    pub(crate) fn count_rejection(&self, event_type: Option<&EventType>, origin: &Origin, problem: &str) {
        self.metrics.events_rejected.add(event_type.map_or("unknown", EventType::as_str), 1);
        warn!(origin = origin.kind(), error = problem, "an event was rejected");
    }

    /// Hands the batch over; it is durable when the submission says so, and is counted then. One that found no room can be
    /// handed over again.
    pub(crate) fn submit(&self, batch: &mut Batch) -> Submission {
        for rejection in &mut batch.rejections {
            rejection.bytes = self.checker.redactor.bytes(std::mem::take(&mut rejection.bytes));
        }
        let counts = BatchCounts::of(batch);
        let begun = Instant::now();
        Submission { ticket: self.queue.submit(batch), begun, counts: Some(counts), metrics: self.metrics.clone() }
    }

    /// Says that the SessionEnd hook of `session`, which ran at `at`, has arrived: its end is emitted at the next rescan.
    pub(crate) fn session_closed(&self, session: Uuid, at: Timestamp) {
        self.note_closing(session, sessions::Closing::arriving(at, sessions::Now::read()));
    }

    fn note_closing(&self, session: Uuid, closing: sessions::Closing) {
        self.closings.lock().unwrap_or_else(PoisonError::into_inner).insert(session, closing);
    }

    /// Whether a SessionEnd hook has come of which the follower does not know yet.
    pub(crate) fn has_closings(&self) -> bool {
        !self.closings.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Takes them; if there are any, `first` is called before [`Intake::has_closings`] can say that there are none.
    fn take_closings(&self, first: impl FnOnce()) -> BTreeMap<Uuid, sessions::Closing> {
        let mut closings = self.closings.lock().unwrap_or_else(PoisonError::into_inner);
        if !closings.is_empty() {
            first();
        }
        std::mem::take(&mut *closings)
    }
}

/// A batch on its way into the queue: wait for it on a thread or await it.
#[must_use = "what was submitted is durable only when the submission says so"]
pub(crate) struct Submission {
    ticket: Ticket,
    begun: Instant,
    /// Until the answer was heard.
    counts: Option<BatchCounts>,
    metrics: Arc<Metrics>,
}

/// What is counted when a batch is accepted.
struct BatchCounts {
    types: Vec<(EventType, u64)>,
    rejections: Vec<FailureKind>,
    recent: Vec<RecentEvent>,
}

impl BatchCounts {
    fn of(batch: &Batch) -> BatchCounts {
        let mut types: Vec<(EventType, u64)> = Vec::new();
        for event in &batch.events {
            match types.iter_mut().find(|(known, _)| known == event.event_type()) {
                Some((_, count)) => *count += 1,
                None => types.push((event.event_type().clone(), 1)),
            }
        }
        BatchCounts {
            types,
            rejections: batch.rejections.iter().map(|rejection| rejection.failure.kind).collect(),
            recent: RecentEvent::last_of(&batch.events, Timestamp::now()),
        }
    }

    fn add_to(self, metrics: &Metrics, begun: Instant) {
        let mut events = 0;
        for (event_type, count) in &self.types {
            metrics.events_captured.add(event_type.as_str(), *count);
            events += count;
        }
        for kind in self.rejections {
            metrics.events_dead_lettered.add(kind.as_str(), 1);
        }
        if events > 0 {
            metrics.capture_seconds.observe(begun.elapsed(), events);
            metrics.recent_events.extend(self.recent);
        }
    }
}

impl Submission {
    /// Whether waiting for the answer takes no time.
    pub(crate) fn is_answered(&self) -> bool {
        self.ticket.is_answered()
    }

    /// Blocks this thread until there is an answer. Needs no runtime; in async code await the submission instead.
    pub(crate) fn wait(self) -> Result<Accepted, QueueError> {
        pollster::block_on(self)
    }
}

impl Future for Submission {
    type Output = Result<Accepted, QueueError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = std::task::ready!(Pin::new(&mut self.ticket).poll(context));
        if let (Ok(_), Some(counts)) = (&answer, self.counts.take()) {
            counts.add_to(&self.metrics, self.begun);
        }
        Poll::Ready(answer)
    }
}

fn rejection_of(invalid: &Invalid, candidate: Candidate) -> Rejection {
    let kind = match invalid {
        Invalid::TooLarge { .. } => FailureKind::TooLarge,
        Invalid::UnknownType { .. } | Invalid::Payload { .. } => FailureKind::Invalid,
    };
    // What is too large is not kept a second time: the message says where it is.
    let bytes = match kind {
        FailureKind::TooLarge => Vec::new(),
        _ => serde_json::to_vec(&candidate.payload).unwrap_or_default(),
    };
    Rejection {
        failure: Failure { kind, message: format!("{invalid}{}", place(&candidate.origin)), sqlstate: None },
        event_type: Some(EventType::new(&candidate.event_type)),
        origin: candidate.origin,
        bytes,
    }
}

fn log_rejection(invalid: &Invalid, origin: &Origin) {
    let (file, offset) = match origin {
        Origin::Transcript { path, offset } => (Some(&**path), Some(*offset)),
        Origin::Hook | Origin::Http | Origin::Cli => (None, None),
    };
    warn!(origin = origin.kind(), file, offset, field = invalid.field(), error = %invalid, "an event was rejected");
}

fn place(origin: &Origin) -> String {
    match origin {
        Origin::Transcript { path, offset } => format!("; from {path} at byte {offset}"),
        Origin::Hook | Origin::Http | Origin::Cli => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config::RedactConfig;
    use crate::event::{EventId, ForeignKeys};

    fn candidate(event_type: &str, payload: Value) -> Candidate {
        let Value::Object(payload) = payload else { panic!("a payload is an object") };
        Candidate {
            id: EventId::new(),
            event_type: event_type.to_owned(),
            timestamp: Timestamp::UNIX_EPOCH,
            payload,
            refs: ForeignKeys::default(),
            origin: Origin::Cli,
        }
    }

    #[test]
    fn an_event_that_is_too_large_is_refused_by_the_size_it_came_with_and_not_redacted_first() {
        let redactor = Redactor::new(&RedactConfig { enabled: true, patterns: vec!["x+".to_owned()] }).unwrap();
        let checker = Checker::new(Schemas::load(None, 1000).unwrap(), redactor);
        let ended = |extra: Value| json!({"session_uuid": "s", "reason": "timeout", "metadata": {"a": [extra]}});
        // Redacted, each of them would be small.
        let (fits, large) = ("x".repeat(900), "x".repeat(1001));
        let event = checker.check(candidate("session_ended", ended(json!(fits)))).map_err(|refused| refused.invalid);
        assert!(event.unwrap().payload().as_json().contains("[redacted]"));
        let refused = checker.check(candidate("session_ended", ended(json!(large)))).err().unwrap();
        assert!(
            matches!(refused.invalid, Invalid::TooLarge { bytes: 1009, bytes_max: 1000, .. }),
            "{}",
            refused.invalid
        );
        assert_eq!(refused.candidate.payload["metadata"]["a"][0], large, "it was not looked at");
        // What stays large in another way is found at the end.
        let numbers = json!(vec![1; 600]);
        let refused = checker.check(candidate("session_ended", ended(numbers))).err().unwrap();
        assert!(matches!(refused.invalid, Invalid::TooLarge { .. }), "{}", refused.invalid);
    }
}
