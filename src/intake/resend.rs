//! Turns that stand on disk and nowhere else, sent again: `verify --repair`.
//!
//! They come with the identity and the place that reading them gives, so repeating it is harmless, and what is stored
//! says where it came from. No cursor moves.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::Intake;
use crate::event::{Candidate, EventId, ForeignKeys, Origin, Timestamp};
use crate::queue::{Batch, QueueError};

/// Events in one request, at most.
pub const EVENTS_MAX: usize = 256;

/// Payload bytes of one request above which no further event is added.
pub const BYTES_MAX: usize = 1 << 20;

/// One turn or registration, as a line of JSON.
#[derive(Serialize, Deserialize)]
pub struct Resent<'a> {
    pub event_id: Uuid,
    pub event_type: Cow<'a, str>,
    pub timestamp: Timestamp,
    /// The transcript.
    pub path: Cow<'a, str>,
    pub offset: u64,
    pub payload: Cow<'a, Map<String, Value>>,
}

impl<'a> Resent<'a> {
    /// `None` for what does not come from a transcript.
    pub fn of(candidate: &'a Candidate) -> Option<Resent<'a>> {
        let Origin::Transcript { path, offset } = &candidate.origin else { return None };
        Some(Resent {
            event_id: candidate.id.0,
            event_type: candidate.event_type.as_str().into(),
            timestamp: candidate.timestamp,
            path: Cow::Borrowed(path),
            offset: *offset,
            payload: Cow::Borrowed(&candidate.payload),
        })
    }

    pub fn into_candidate(self) -> Candidate {
        Candidate {
            id: EventId(self.event_id),
            event_type: self.event_type.into_owned(),
            timestamp: self.timestamp,
            payload: self.payload.into_owned(),
            refs: ForeignKeys::default(),
            origin: Origin::Transcript { path: self.path.as_ref().into(), offset: self.offset },
        }
    }
}

impl Intake {
    /// Takes them in together: durable on return, or nothing is. What does not fit its schema becomes a dead letter, as
    /// when it was first read.
    pub fn resend(&self, candidates: Vec<Candidate>) -> Result<(), QueueError> {
        let mut batch = Batch::default();
        for candidate in candidates {
            self.admit(candidate, &mut batch);
        }
        self.submit(&mut batch).wait().map(|_| ())
    }
}
