//! Records of the queue to bytes and back.
//!
//! ```text
//! offset  size  field
//!      0     1  version of the layout: 1
//!      1     4  crc32 (IEEE) of the body, u32 little endian: a long record stands in several pieces, which must be of one record
//!      5     n  body: bincode 2, little endian, integers at full width, fields in the order of the structs below and in `event`
//! ```
//!
//! What records stand in is at the head of `piece`. What is in a single piece, which has a checksum itself, is bincode 2 alone,
//! integers at variable width.
//!
//! Nothing outside this file knows bincode, and nothing inside it knows sled. What is written here is read
//! by every later version of the program, so a layout is never edited: it gets a new version number.
//!
//! Timestamps are nanoseconds since 1970 as i128; paths of cursors are the bytes the system uses.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use bincode::config::{Configuration, Fixint, Limit, LittleEndian, Varint};
use bincode::serde::Compat;
use bincode::{BorrowDecode, Decode, Encode};
use thiserror::Error;
use uuid::Uuid;

use crate::event::{
    Cursor, DeadContent, DeadLetter, Envelope, Event, EventParts, EventType, Failure, FailureKind, Origin, Rejection,
    Sequence, SessionState, Timestamp,
};

/// The layout that is written, and the newest that is understood.
const VERSION: u8 = 1;

/// Bytes before the body.
const HEADER_BYTES: usize = 5;

/// Longest record. Above every limit of the intake.
pub(super) const RECORD_BYTES_MAX: usize = 96 << 20;

/// Greatest number that is believed when it is read from disk: counting by ones never gets there, and adding to one that is
/// believed cannot overflow.
pub(super) const NUMBER_MAX: u64 = u64::MAX / 2;

/// Longest message of a failure that is kept.
const MESSAGE_BYTES_MAX: usize = 2048;

/// Full-width integers, so that a record's length follows from its content alone.
const RECORD: Configuration<LittleEndian, Fixint, Limit<RECORD_BYTES_MAX>> =
    bincode::config::standard().with_fixed_int_encoding().with_limit::<RECORD_BYTES_MAX>();

const PIECE: Configuration<LittleEndian, Varint, Limit<RECORD_BYTES_MAX>> =
    bincode::config::standard().with_limit::<RECORD_BYTES_MAX>();

/// Why bytes are not the record they should be.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum CodecError {
    #[error("record has layout version {0}, this program knows {VERSION}")]
    Version(u8),
    #[error("checksum of the record does not match")]
    Checksum,
    #[error("body of the record is not readable: {0}")]
    Body(String),
    #[error("record of {0} bytes is longer than {RECORD_BYTES_MAX}")]
    TooLarge(usize),
}

/// How far the queue has come at a number: what has been taken in up to it, since the queue was made.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Encode, Decode)]
pub(super) struct Totals {
    pub sequence: u64,
    pub events: u64,
    /// Of their records.
    pub bytes: u64,
}

impl Totals {
    /// With the next number, which has a record of so many bytes; 0: a rejection.
    pub(super) fn with(self, record_bytes: u32) -> Totals {
        let bytes = self.bytes + u64::from(record_bytes);
        Totals { sequence: self.sequence + 1, events: self.events + u64::from(record_bytes > 0), bytes }
    }
}

/// Dead letters, and the bytes of what they hold.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Encode, Decode)]
pub(super) struct Letters {
    pub count: u64,
    pub bytes: u64,
}

/// What has entered and what has left.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Encode, Decode)]
pub(super) struct Marks {
    pub acknowledged: Totals,
    pub settled: Totals,
    pub letters: Letters,
}

impl Marks {
    /// Events that wait, and the bytes of their records. Lost ones among them count until it is past them.
    pub(super) fn pending(&self) -> (u64, u64) {
        let events = self.acknowledged.events.saturating_sub(self.settled.events);
        (events, if events == 0 { 0 } else { self.acknowledged.bytes.saturating_sub(self.settled.bytes) })
    }
}

/// `pieces`: how many its batch has, with the mark itself.
pub(super) fn encode_marks(marks: &Marks, pieces: u64) -> Vec<u8> {
    pack(&(marks, pieces))
}

pub(super) fn decode_marks(content: &[u8]) -> Option<(Marks, u64)> {
    let is_sound = |totals: Totals| totals.sequence.max(totals.events).max(totals.bytes) <= NUMBER_MAX;
    unpack(content).filter(|(marks, _): &(Marks, u64)| is_sound(marks.acknowledged) && is_sound(marks.settled))
}

/// One number of a block.
#[derive(Clone, PartialEq, Eq, Debug, Encode, Decode)]
pub(super) struct Entry {
    /// Length of the event's record; 0 for a rejection.
    pub record_bytes: u32,
    /// The record, or the first part of a long one.
    pub part: Vec<u8>,
}

pub(super) fn encode_block(before: &Totals, entries: &[Entry]) -> Vec<u8> {
    pack(&(before.events, before.bytes, entries))
}

/// Events and bytes before it, and its entries.
pub(super) fn decode_block(content: &[u8]) -> Option<(u64, u64, Vec<Entry>)> {
    unpack(content).filter(|(events, bytes, _): &(u64, u64, _)| events.max(bytes) <= &NUMBER_MAX)
}

fn pack(content: &impl Encode) -> Vec<u8> {
    // Into memory, without a limit on what is written: nothing in it can fail.
    bincode::encode_to_vec(content, PIECE).unwrap_or_default()
}

fn unpack<T: Decode<()>>(content: &[u8]) -> Option<T> {
    let (value, read) = bincode::decode_from_slice(content, PIECE).ok()?;
    (read == content.len()).then_some(value)
}

// What is on disk: these, and what derives `Serialize` in `event`. Never reorder, never edit: add a version.

#[derive(Encode, BorrowDecode)]
struct LetterBody<'a> {
    failed_at: i128,
    /// Place in [`KINDS`].
    kind: u8,
    message: &'a str,
    sqlstate: Option<&'a str>,
    content: ContentBody<'a>,
}

const KINDS: [FailureKind; 5] =
    [FailureKind::Unreadable, FailureKind::Invalid, FailureKind::TooLarge, FailureKind::Refused, FailureKind::Damaged];

#[derive(Encode, BorrowDecode)]
enum ContentBody<'a> {
    Event {
        attempts: u32,
        record: &'a [u8],
    },
    Input {
        event_type: Option<&'a str>,
        #[bincode(with_serde)]
        origin: Origin,
        mask: [u8; 16],
        bytes: &'a [u8],
    },
}

pub(super) fn encode_event(event: &Event, captured_at: Timestamp, attempts: u32) -> Result<Vec<u8>, CodecError> {
    encode((captured_at.as_nanosecond(), attempts, Compat(event)))
}

/// The event with this number.
pub(super) fn decode_event(number: u64, record: &[u8]) -> Result<Envelope, CodecError> {
    let sequence = Sequence::new(number).ok_or_else(|| CodecError::Body("no number".into()))?;
    let (captured_at, attempts, Compat(parts)) = decode::<(_, _, Compat<EventParts>)>(record)?;
    Ok(Envelope { sequence, event: Event::from_checked_parts(parts), captured_at: timestamp(captured_at)?, attempts })
}

/// A dead letter of an event, by its record. `attempts`: deliveries that were refused, in all.
pub(super) fn encode_refused(
    failure: &Failure,
    failed_at: Timestamp,
    attempts: u32,
    record: &[u8],
) -> Result<Vec<u8>, CodecError> {
    encode_letter(failure, failed_at, ContentBody::Event { attempts, record })
}

/// A dead letter of what never was an event. Its bytes are masked with random ones: whole pieces of a segment among
/// them must not be found in its log.
pub(super) fn encode_rejection(rejection: &Rejection, failed_at: Timestamp) -> Result<Vec<u8>, CodecError> {
    let mask = Uuid::new_v4().into_bytes();
    let event_type = rejection.event_type.as_ref().map(EventType::as_str);
    let bytes = &masked(&rejection.bytes, mask);
    let content = ContentBody::Input { event_type, origin: rejection.origin.clone(), mask, bytes };
    encode_letter(&rejection.failure, failed_at, content)
}

fn masked(bytes: &[u8], mask: [u8; 16]) -> Vec<u8> {
    bytes.iter().zip(mask.into_iter().cycle()).map(|(byte, mask)| byte ^ mask).collect()
}

fn encode_letter(failure: &Failure, failed_at: Timestamp, content: ContentBody<'_>) -> Result<Vec<u8>, CodecError> {
    let message = failure.message.get(..failure.message.floor_char_boundary(MESSAGE_BYTES_MAX)).unwrap_or_default();
    encode(LetterBody {
        failed_at: failed_at.as_nanosecond(),
        kind: failure.kind as u8,
        message,
        sqlstate: failure.sqlstate.as_deref(),
        content,
    })
}

pub(super) fn decode_letter(sequence: Sequence, record: &[u8]) -> Result<DeadLetter, CodecError> {
    let body: LetterBody<'_> = decode(record)?;
    let kind = KINDS.get(usize::from(body.kind)).copied().ok_or_else(|| CodecError::Body("unknown kind".into()))?;
    let failure = Failure { kind, message: body.message.to_owned(), sqlstate: body.sqlstate.map(str::to_owned) };
    let content = match body.content {
        ContentBody::Event { attempts, record } => {
            let Envelope { event, captured_at, .. } = decode_event(sequence.get(), record)?;
            DeadContent::Event { event, captured_at, attempts }
        }
        ContentBody::Input { event_type, origin, mask, bytes } => DeadContent::Input(Rejection {
            failure: failure.clone(),
            event_type: event_type.map(EventType::new),
            origin,
            bytes: masked(bytes, mask),
        }),
    };
    Ok(DeadLetter { sequence, failed_at: timestamp(body.failed_at)?, failure, content })
}

pub(super) fn encode_cursor(path: &Path, cursor: &Cursor) -> Result<Vec<u8>, CodecError> {
    let SessionState { began_at, last_activity, ended_through, process } = cursor.session;
    let times = [began_at, last_activity, ended_through].map(|time| time.map(Timestamp::as_nanosecond));
    encode((path.as_os_str().as_bytes(), Compat(cursor), times, process))
}

pub(super) fn decode_cursor(record: &[u8]) -> Result<(PathBuf, Cursor), CodecError> {
    let (path, Compat(cursor), times, process) = decode::<(Vec<u8>, _, [Option<i128>; 3], _)>(record)?;
    let [began_at, last_activity, ended_through] = times.map(|time| time.map(timestamp).transpose());
    let (began_at, last_activity, ended_through) = (began_at?, last_activity?, ended_through?);
    let session = SessionState { began_at, last_activity, ended_through, process };
    Ok((OsString::from_vec(path).into(), Cursor { session, ..cursor }))
}

pub(super) fn encode_session_end(session: Uuid, at: Timestamp) -> Result<Vec<u8>, CodecError> {
    encode((session.into_bytes(), at.as_nanosecond()))
}

pub(super) fn decode_session_end(record: &[u8]) -> Result<(Uuid, Timestamp), CodecError> {
    let (session, at) = decode(record)?;
    Ok((Uuid::from_bytes(session), timestamp(at)?))
}

fn encode(body: impl Encode) -> Result<Vec<u8>, CodecError> {
    let record = bincode::encode_to_vec((VERSION, [0_u8; 4], body), RECORD);
    let mut record = record.map_err(|error| CodecError::Body(error.to_string()))?;
    let checksum = crc32fast::hash(record.get(HEADER_BYTES..).unwrap_or_default());
    record.splice(1..HEADER_BYTES, checksum.to_le_bytes());
    if record.len() > RECORD_BYTES_MAX { Err(CodecError::TooLarge(record.len())) } else { Ok(record) }
}

fn decode<'a, T: BorrowDecode<'a, ()>>(record: &'a [u8]) -> Result<T, CodecError> {
    let body = match record {
        [VERSION, a, b, c, d, body @ ..] if u32::from_le_bytes([*a, *b, *c, *d]) == crc32fast::hash(body) => body,
        [version, ..] if *version != VERSION => return Err(CodecError::Version(*version)),
        _ => return Err(CodecError::Checksum),
    };
    let decoded = bincode::borrow_decode_from_slice(body, RECORD);
    let (value, read) = decoded.map_err(|error| CodecError::Body(error.to_string()))?;
    if read == body.len() { Ok(value) } else { Err(CodecError::Body(format!("{} bytes too many", body.len() - read))) }
}

fn timestamp(nanoseconds: i128) -> Result<Timestamp, CodecError> {
    Timestamp::from_nanosecond(nanoseconds).map_err(|error| CodecError::Body(error.to_string()))
}
