//! What travels through the pipeline: events, their envelopes, dead letters and cursors.
//!
//! Plain values without behaviour of their own; this module imports nothing of ours. Every layer above it
//! (`queue`, `intake`, `sink`, `http`, `cli`) speaks in these types, and none of them owns them.
//!
//! What derives `Serialize` is on disk: `queue::codec` writes it by its fields, in their order and without their names. So none
//! of these types may change without a new version of the record there; a test over the bytes keeps it so.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;

pub use jiff::Timestamp;
use jiff::fmt::serde::timestamp::nanosecond::required as nanoseconds;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

/// Identity of an event: the same thing seen again has the same id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct EventId(#[serde(with = "uuid::serde::compact")] pub Uuid);

impl EventId {
    /// A new identity for something that has none of its own (UUIDv7, ordered by time).
    pub fn new() -> Self {
        EventId(Uuid::now_v7())
    }

    /// The identity that follows from `name`: the same name gives the same id, on every machine.
    pub fn derived(name: &[u8]) -> Self {
        /// Namespace of all derived identities (a random UUID, fixed for ever).
        const NAMESPACE: Uuid = Uuid::from_u128(0x5e0a_6d1c_7f4b_4c57_9d37_2f0e_8b61_a4c3);
        EventId(Uuid::new_v5(&NAMESPACE, name))
    }
}

impl Default for EventId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Name of a type of event: the stem of its file in `schemas/`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct EventType(Arc<str>);

impl EventType {
    pub fn new(name: &str) -> Self {
        EventType(name.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EventType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The payload as JSON text, one object. Shown by nobody who is not asked for it: `Debug` gives its size only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payload(Box<str>);

impl Payload {
    /// `json` is the text of one JSON object; the caller has checked it.
    pub fn from_json(json: String) -> Self {
        Payload(json.into_boxed_str())
    }

    pub fn as_json(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Payload({} bytes)", self.0.len())
    }
}

/// Foreign keys of a row, as the caller gave them.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct ForeignKeys {
    pub project_id: Option<i32>,
    pub agent_id: Option<i32>,
    /// Goes into `command_id` or, in older databases, `task_id`.
    pub command_id: Option<i32>,
    pub turn_id: Option<i32>,
}

impl ForeignKeys {
    /// By the names of their columns.
    pub fn named(&self) -> [(&'static str, Option<i32>); 4] {
        let ForeignKeys { project_id, agent_id, command_id, turn_id } = *self;
        [("project_id", project_id), ("agent_id", agent_id), ("command_id", command_id), ("turn_id", turn_id)]
    }
}

/// Where an event was seen.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Origin {
    /// Bytes from `offset` on in the transcript at `path` (absolute; lossy where it is not UTF-8).
    Transcript {
        path: Arc<str>,
        offset: u64,
    },
    Hook,
    Http,
    Cli,
}

impl Origin {
    /// The origin's name in JSON output and in `event_sources` for what has no path.
    pub fn kind(&self) -> &'static str {
        match self {
            Origin::Transcript { .. } => "transcript",
            Origin::Hook => "hook",
            Origin::Http => "http",
            Origin::Cli => "cli",
        }
    }
}

/// Something that happened, checked against the schema of its type.
///
/// Only `intake::schema` makes one, and `queue::codec` reads one back; a test over the sources keeps it so.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(transparent)]
pub struct Event {
    parts: EventParts,
}

/// The fields of an [`Event`] before they are checked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct EventParts {
    pub id: EventId,
    /// When it happened, not when it was seen or written.
    #[serde(with = "nanoseconds")]
    pub timestamp: Timestamp,
    pub event_type: EventType,
    pub refs: ForeignKeys,
    pub origin: Origin,
    pub payload: Payload,
}

impl Event {
    /// The checked event. To be called by `intake::schema` (after the check) and `queue::codec` (reading back) only.
    pub(crate) fn from_checked_parts(parts: EventParts) -> Self {
        Event { parts }
    }

    pub fn id(&self) -> EventId {
        self.parts.id
    }

    pub fn event_type(&self) -> &EventType {
        &self.parts.event_type
    }

    pub fn timestamp(&self) -> Timestamp {
        self.parts.timestamp
    }

    pub fn payload(&self) -> &Payload {
        &self.parts.payload
    }

    pub fn refs(&self) -> &ForeignKeys {
        &self.parts.refs
    }

    pub fn origin(&self) -> &Origin {
        &self.parts.origin
    }
}

/// Order of acceptance: starts at 1, grows by one, is never used again. Events and dead letters share the numbers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Sequence(pub NonZeroU64);

impl Sequence {
    pub const FIRST: Sequence = Sequence(NonZeroU64::MIN);

    /// `None` for 0, which is no sequence.
    pub fn new(number: u64) -> Option<Self> {
        NonZeroU64::new(number).map(Sequence)
    }

    pub fn get(self) -> u64 {
        self.0.get()
    }
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An event that was accepted into the queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Envelope {
    pub sequence: Sequence,
    pub event: Event,
    pub captured_at: Timestamp,
    /// Deliveries that the database refused before this event was set aside and put back; 0 for a new one.
    pub attempts: u32,
}

/// Why something can't become a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FailureKind {
    /// A line that is no JSON object.
    Unreadable,
    /// Its type is unknown or its payload does not fit the schema.
    Invalid,
    /// Above `max_line_bytes` or `max_event_bytes`.
    TooLarge,
    /// Postgres refused this very event.
    Refused,
    /// A record of the queue that could not be read back.
    Damaged,
}

impl FailureKind {
    pub fn as_str(self) -> &'static str {
        match self {
            FailureKind::Unreadable => "unreadable",
            FailureKind::Invalid => "invalid",
            FailureKind::TooLarge => "too_large",
            FailureKind::Refused => "refused",
            FailureKind::Damaged => "damaged",
        }
    }
}

/// Why something was set aside. `message` names fields and causes and never holds text of the payload.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
    pub sqlstate: Option<String>,
}

/// Input that did not become an event, kept for inspection.
#[derive(Clone, PartialEq, Eq)]
pub struct Rejection {
    pub failure: Failure,
    pub event_type: Option<EventType>,
    pub origin: Origin,
    /// The input as it came. Empty where it is too large to be kept: then `failure.message` says where it is.
    pub bytes: Vec<u8>,
}

impl fmt::Debug for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rejection")
            .field("failure", &self.failure)
            .field("event_type", &self.event_type)
            .field("origin", &self.origin)
            .field("bytes", &self.bytes.len())
            .finish()
    }
}

/// What was set aside: an event that Postgres refused, or input that never became one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeadLetter {
    pub sequence: Sequence,
    pub failed_at: Timestamp,
    pub failure: Failure,
    pub content: DeadContent,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DeadContent {
    /// Can be sent again as it is.
    Event { event: Event, captured_at: Timestamp, attempts: u32 },
    /// Can only be looked at: `rejection.failure` equals the letter's.
    Input(Rejection),
}

/// Which file on disk a cursor speaks of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct FileIdentity {
    pub device: u64,
    pub inode: u64,
}

/// How far a transcript has been read: every byte before `offset` is queued or set aside.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Cursor {
    pub file: FileIdentity,
    /// Byte offset after the last line that was read.
    pub offset: u64,
    /// Hash over bytes before `offset`; tells a file that was replaced in place.
    pub fingerprint: u64,
    /// The first `cwd` of the file; with it the session is registered.
    pub project_path: Option<Arc<str>>,
    /// How the session of a main transcript stands, as far as these bytes tell. Stored beside the cursor.
    #[serde(skip)]
    pub session: SessionState,
}

/// What is remembered of a session from one line to the next; see `session`.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SessionState {
    /// When it began. Before its first line of its own was read: the first time that any line of the file names.
    pub began_at: Option<Timestamp>,
    /// The newest time on a line of its conversation; lines that it inherited from another session don't count.
    pub last_activity: Option<Timestamp>,
    /// Activity up to here has been told to have ended: what is newer means that the session is back.
    pub ended_through: Option<Timestamp>,
    /// The process that was last seen to have it open, while that had not been seen to be gone.
    pub process: Option<u32>,
}

/// An event on its way in: everything but the proof that it fits.
pub struct Candidate {
    pub id: EventId,
    pub event_type: String,
    pub timestamp: Timestamp,
    pub payload: Map<String, Value>,
    pub refs: ForeignKeys,
    pub origin: Origin,
}

/// Input: an event that is not checked yet, or what never can be one.
pub(crate) enum Record {
    Event(Candidate),
    Rejected(Rejection),
}
