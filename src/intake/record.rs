//! A record of the spool as a line of JSON.
//!
//! ```text
//! line := {"event": {event_id, event_type, timestamp, refs, origin, payload}}
//!       | {"rejected": {too_large, message, event_type, origin, input}}
//! ```

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::event::{
    Candidate, Event, EventId, EventType, Failure, FailureKind, ForeignKeys, Origin, Record, Rejection, Timestamp,
};
use crate::json;

/// Bytes that are kept of input that can't be read.
pub(crate) const UNREADABLE_BYTES_MAX: usize = 64 << 10;

/// `P` is the payload, one object: values where a record is written, text where it is read, until its size was looked at.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StoredRecord<P> {
    Event(StoredEvent<P>),
    Rejected(StoredRejection),
}

#[derive(Serialize, Deserialize)]
struct StoredEvent<P> {
    event_id: Uuid,
    event_type: String,
    timestamp: Timestamp,
    refs: ForeignKeys,
    origin: Origin,
    payload: P,
}

#[derive(Serialize, Deserialize)]
struct StoredRejection {
    too_large: bool,
    message: String,
    event_type: Option<EventType>,
    origin: Origin,
    /// The input; what was no UTF-8 in it is replaced.
    input: String,
}

/// The line of a record, without its newline.
pub(crate) fn encode(record: &Record) -> serde_json::Result<Vec<u8>> {
    match record {
        Record::Event(candidate) => serde_json::to_vec(&StoredRecord::Event(StoredEvent {
            event_id: candidate.id.0,
            event_type: candidate.event_type.clone(),
            timestamp: candidate.timestamp,
            refs: candidate.refs,
            origin: candidate.origin.clone(),
            payload: &candidate.payload,
        })),
        Record::Rejected(rejection) => serde_json::to_vec(&StoredRecord::<()>::Rejected(StoredRejection {
            too_large: rejection.failure.kind == FailureKind::TooLarge,
            message: rejection.failure.message.clone(),
            event_type: rejection.event_type.clone(),
            origin: rejection.origin.clone(),
            input: String::from_utf8_lossy(&rejection.bytes).into_owned(),
        })),
    }
}

/// As [`encode`], of an event that was checked already.
pub(crate) fn encode_event(event: &Event) -> serde_json::Result<Vec<u8>> {
    let payload: &RawValue = serde_json::from_str(event.payload().as_json())?;
    serde_json::to_vec(&StoredRecord::Event(StoredEvent {
        event_id: event.id().0,
        event_type: event.event_type().as_str().to_owned(),
        timestamp: event.timestamp(),
        refs: *event.refs(),
        origin: event.origin().clone(),
        payload,
    }))
}

/// Parses a line. A payload that would take too much memory makes it a rejection. The error says what is wrong.
pub(crate) fn decode(line: &[u8]) -> Result<Record, &'static str> {
    match parse(line)? {
        StoredRecord::Event(event) => event.into_record(),
        StoredRecord::Rejected(StoredRejection { too_large, message, event_type, origin, input }) => {
            let kind = if too_large { FailureKind::TooLarge } else { FailureKind::Unreadable };
            let failure = Failure { kind, message, sqlstate: None };
            Ok(Record::Rejected(Rejection { failure, event_type, origin, bytes: input.into_bytes() }))
        }
    }
}

/// The identity of the event on a line; `None` for a rejection and for what is no record.
pub(crate) fn event_id(line: &[u8]) -> Option<Uuid> {
    match parse(line) {
        Ok(StoredRecord::Event(event)) => Some(event.event_id),
        Ok(StoredRecord::Rejected(_)) | Err(_) => None,
    }
}

fn parse(line: &[u8]) -> Result<StoredRecord<&RawValue>, &'static str> {
    serde_json::from_slice(line).map_err(|_| "a line is no record")
}

impl StoredEvent<&RawValue> {
    fn into_record(self) -> Result<Record, &'static str> {
        let StoredEvent { event_id, event_type, timestamp, refs, origin, payload } = self;
        // It was repaired, where needed, before it was written.
        match json::value(payload.get(), &mut false) {
            Ok(Value::Object(payload)) => {
                Ok(Record::Event(Candidate { id: EventId(event_id), event_type, timestamp, payload, refs, origin }))
            }
            Ok(_) => Err("a record's payload is no object"),
            Err(unfit) => {
                let message = format!("payload: {unfit}");
                let bytes = payload.get().as_bytes();
                Ok(Record::Rejected(Rejection {
                    failure: Failure { kind: FailureKind::Invalid, message, sqlstate: None },
                    event_type: Some(EventType::new(&event_type)),
                    origin,
                    bytes: bytes.get(..bytes.len().min(UNREADABLE_BYTES_MAX)).unwrap_or_default().to_vec(),
                }))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_record_comes_back_as_it_was_written_whatever_its_origin() {
        let origins =
            [Origin::Cli, Origin::Hook, Origin::Http, Origin::Transcript { path: "/p/ä.jsonl".into(), offset: 7 }];
        for origin in origins {
            let Value::Object(payload) = json!({"number": 1, "text": "ä\u{fffd}\n"}) else { unreachable!() };
            let candidate = Candidate {
                id: EventId::derived(b"1"),
                event_type: "hook_received".to_owned(),
                timestamp: "2026-01-02T03:04:05.678901234Z".parse().unwrap(),
                payload,
                refs: ForeignKeys { agent_id: Some(-7), ..ForeignKeys::default() },
                origin: origin.clone(),
            };
            let line = encode(&Record::Event(candidate)).unwrap();
            assert!(!line.contains(&b'\n'));
            assert_eq!(event_id(&line), Some(EventId::derived(b"1").0));
            let Ok(Record::Event(read)) = decode(&line) else { panic!("{origin:?}") };
            assert_eq!(
                (&read.origin, read.refs.agent_id, read.payload["number"].as_u64()),
                (&origin, Some(-7), Some(1))
            );
            assert_eq!(encode(&Record::Event(read)).unwrap(), line);
        }
    }

    #[test]
    fn what_is_no_record_says_so_and_a_payload_that_is_too_deep_is_a_rejection() {
        for line in ["", "{}", "[]", r#"{"event":{}}"#, "HWSPOOL"] {
            assert_eq!(decode(line.as_bytes()).err(), Some("a line is no record"), "{line}");
        }
        let event = |payload: &str| {
            format!(
                r#"{{"event":{{"event_id":"{}","event_type":"t","timestamp":"2026-01-02T03:04:05Z","refs":{{}},"origin":"Cli","payload":{payload}}}}}"#,
                Uuid::nil()
            )
        };
        assert_eq!(decode(event("[]").as_bytes()).err(), Some("a record's payload is no object"));
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let Ok(Record::Rejected(rejection)) = decode(event(&deep).as_bytes()) else { panic!("it is no rejection") };
        assert_eq!((rejection.failure.kind, rejection.bytes.len()), (FailureKind::Invalid, UNREADABLE_BYTES_MAX));
    }
}
