//! Records of the queue to bytes and back.
//!
//! ```text
//! offset  size  field
//!      0     1  version of the layout: 1
//!      1     4  crc32 (IEEE) of the body, u32 little endian: a long record stands in several pieces, which must be of one event
//!      5     n  body: bincode 2, little endian, integers at full width, fields in the order of the structs below
//! ```
//!
//! What records stand in is at the head of `piece`.
//!
//! Nothing outside this file knows bincode, and nothing inside it knows sled. What is written here is read
//! by every later version of the program, so a layout is never edited: it gets a new version number.
//!
//! The body of an event begins with `captured_at`, so it can be read from the first bytes of a record whose rest is
//! elsewhere ([`captured_at`]).
//! Timestamps are nanoseconds since 1970 as i128; paths of cursors are the bytes the system uses.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use bincode::{BorrowDecode, Encode};
use thiserror::Error;
use uuid::Uuid;

use crate::event::{
    Cursor, Event, EventId, EventParts, EventType, Failure, FailureKind, FileIdentity, ForeignKeys, Origin, Payload,
    Rejection, SessionState, Timestamp,
};

/// The layout that is written, and the newest that is understood.
const VERSION: u8 = 1;

/// Bytes before the body.
const HEADER_BYTES: usize = 5;

/// Longest record. Above every limit of the intake.
pub const RECORD_BYTES_MAX: usize = 96 << 20;

/// Longest message of a failure that is kept; with it a letter always fits into one piece.
const MESSAGE_BYTES_MAX: usize = 2048;
const SQLSTATE_BYTES_MAX: usize = 16;

/// Little endian and full-width integers, so that a record's length follows from its content alone.
const BINCODE: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Fixint,
    bincode::config::Limit<RECORD_BYTES_MAX>,
> = bincode::config::standard().with_fixed_int_encoding().with_limit::<RECORD_BYTES_MAX>();

/// Why bytes are not the record they should be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CodecError {
    #[error("record has layout version {0}, this program knows {VERSION}")]
    Version(u8),
    #[error("checksum of the record does not match")]
    Checksum,
    #[error("body of the record is not readable: {0}")]
    Body(String),
    #[error("record of {0} bytes is longer than {RECORD_BYTES_MAX}")]
    TooLarge(usize),
}

/// What lies in the record beside a letter.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, BorrowDecode)]
pub enum Content {
    /// A record of an event, good to be sent again.
    Event,
    /// A record of an input that was rejected.
    Input,
}

/// Why and when something was set aside.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Letter {
    pub failed_at: Timestamp,
    pub failure: Failure,
    pub content: Content,
    /// Deliveries that were refused, in all.
    pub attempts: u32,
}

/// An event as it was accepted, without its sequence (which is the key).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoredEvent {
    pub event: Event,
    pub captured_at: Timestamp,
    pub attempts: u32,
}

// The mirrors: what is on disk. Never reorder, never edit: add a version.

#[derive(Encode, BorrowDecode)]
struct EventBody<'a> {
    captured_at: i128,
    attempts: u32,
    id: [u8; 16],
    timestamp: i128,
    event_type: &'a str,
    project_id: Option<i32>,
    agent_id: Option<i32>,
    command_id: Option<i32>,
    turn_id: Option<i32>,
    origin: OriginBody<'a>,
    payload: &'a str,
}

#[derive(Encode, BorrowDecode)]
enum OriginBody<'a> {
    Transcript { path: &'a str, offset: u64 },
    Hook,
    Http,
    Cli,
}

#[derive(Encode, BorrowDecode)]
struct InputBody<'a> {
    event_type: Option<&'a str>,
    origin: OriginBody<'a>,
    mask: [u8; 16],
    bytes: &'a [u8],
}

#[derive(Encode, BorrowDecode)]
struct LetterBody<'a> {
    failed_at: i128,
    attempts: u32,
    content: Content,
    kind: FailureBody,
    message: &'a str,
    sqlstate: Option<&'a str>,
}

#[derive(Encode, BorrowDecode)]
enum FailureBody {
    Unreadable,
    Invalid,
    TooLarge,
    Refused,
    Damaged,
}

#[derive(Encode, BorrowDecode)]
struct CursorBody<'a> {
    path: &'a [u8],
    device: u64,
    inode: u64,
    offset: u64,
    fingerprint: u64,
    project_path: Option<&'a str>,
    began_at: Option<i128>,
    last_activity: Option<i128>,
    ended_through: Option<i128>,
    process: Option<u32>,
}

pub fn encode_event(event: &Event, captured_at: Timestamp, attempts: u32) -> Result<Vec<u8>, CodecError> {
    let refs = event.refs();
    let body = EventBody {
        captured_at: captured_at.as_nanosecond(),
        attempts,
        id: event.id().0.into_bytes(),
        timestamp: event.timestamp().as_nanosecond(),
        event_type: event.event_type().as_str(),
        project_id: refs.project_id,
        agent_id: refs.agent_id,
        command_id: refs.command_id,
        turn_id: refs.turn_id,
        origin: origin_body(event.origin()),
        payload: event.payload().as_json(),
    };
    encode(&body, 256 + body.payload.len() + body.event_type.len())
}

pub fn decode_event(record: &[u8]) -> Result<StoredEvent, CodecError> {
    let body: EventBody<'_> = decode(record)?;
    Ok(StoredEvent {
        captured_at: timestamp(body.captured_at)?,
        attempts: body.attempts,
        event: Event::from_checked_parts(EventParts {
            id: EventId(Uuid::from_bytes(body.id)),
            event_type: EventType::new(body.event_type),
            timestamp: timestamp(body.timestamp)?,
            payload: Payload::from_json(body.payload.to_owned()),
            refs: ForeignKeys {
                project_id: body.project_id,
                agent_id: body.agent_id,
                command_id: body.command_id,
                turn_id: body.turn_id,
            },
            origin: origin(body.origin),
        }),
    })
}

/// When an event was captured, from the first bytes of its record.
pub fn captured_at(head: &[u8]) -> Result<Timestamp, CodecError> {
    timestamp(begin(take_apart(head)?.1)?.0)
}

/// The bytes are masked with random ones: whole pieces of a segment among them must not be found in its log.
pub fn encode_input(rejection: &Rejection, bytes: &[u8]) -> Result<Vec<u8>, CodecError> {
    let mask = Uuid::new_v4().into_bytes();
    let body = InputBody {
        event_type: rejection.event_type.as_ref().map(EventType::as_str),
        origin: origin_body(&rejection.origin),
        mask,
        bytes: &masked(bytes, mask),
    };
    encode(&body, 256 + bytes.len())
}

fn masked(bytes: &[u8], mask: [u8; 16]) -> Vec<u8> {
    bytes.iter().zip(mask.into_iter().cycle()).map(|(byte, mask)| byte ^ mask).collect()
}

/// The rejection in `record`; the failure is the letter's.
pub fn decode_input(record: &[u8], failure: Failure) -> Result<Rejection, CodecError> {
    let body: InputBody<'_> = decode(record)?;
    Ok(Rejection {
        failure,
        event_type: body.event_type.map(EventType::new),
        origin: origin(body.origin),
        bytes: masked(body.bytes, body.mask),
    })
}

/// Always fits into one piece: a message above 2 KiB is cut.
pub fn encode_letter(letter: &Letter) -> Result<Vec<u8>, CodecError> {
    let body = LetterBody {
        failed_at: letter.failed_at.as_nanosecond(),
        attempts: letter.attempts,
        content: letter.content,
        kind: match letter.failure.kind {
            FailureKind::Unreadable => FailureBody::Unreadable,
            FailureKind::Invalid => FailureBody::Invalid,
            FailureKind::TooLarge => FailureBody::TooLarge,
            FailureKind::Refused => FailureBody::Refused,
            FailureKind::Damaged => FailureBody::Damaged,
        },
        message: cut(&letter.failure.message, MESSAGE_BYTES_MAX),
        sqlstate: letter.failure.sqlstate.as_deref().map(|state| cut(state, SQLSTATE_BYTES_MAX)),
    };
    encode(&body, 128 + body.message.len())
}

pub fn decode_letter(record: &[u8]) -> Result<Letter, CodecError> {
    let body: LetterBody<'_> = decode(record)?;
    Ok(Letter {
        failed_at: timestamp(body.failed_at)?,
        attempts: body.attempts,
        content: body.content,
        failure: Failure {
            kind: match body.kind {
                FailureBody::Unreadable => FailureKind::Unreadable,
                FailureBody::Invalid => FailureKind::Invalid,
                FailureBody::TooLarge => FailureKind::TooLarge,
                FailureBody::Refused => FailureKind::Refused,
                FailureBody::Damaged => FailureKind::Damaged,
            },
            message: body.message.to_owned(),
            sqlstate: body.sqlstate.map(str::to_owned),
        },
    })
}

pub fn encode_cursor(path: &Path, cursor: &Cursor) -> Result<Vec<u8>, CodecError> {
    let nanoseconds = |time: Option<Timestamp>| time.map(Timestamp::as_nanosecond);
    let session = &cursor.session;
    let body = CursorBody {
        path: path.as_os_str().as_bytes(),
        device: cursor.file.device,
        inode: cursor.file.inode,
        offset: cursor.offset,
        fingerprint: cursor.fingerprint,
        project_path: cursor.project_path.as_deref(),
        began_at: nanoseconds(session.began_at),
        last_activity: nanoseconds(session.last_activity),
        ended_through: nanoseconds(session.ended_through),
        process: session.process,
    };
    encode(&body, 256 + body.path.len())
}

pub fn decode_cursor(record: &[u8]) -> Result<(PathBuf, Cursor), CodecError> {
    let body: CursorBody<'_> = decode(record)?;
    let time = |nanoseconds: Option<i128>| nanoseconds.map(timestamp).transpose();
    let path = PathBuf::from(std::ffi::OsString::from_vec(body.path.to_vec()));
    let cursor = Cursor {
        file: FileIdentity { device: body.device, inode: body.inode },
        offset: body.offset,
        fingerprint: body.fingerprint,
        project_path: body.project_path.map(str::to_owned),
        session: SessionState {
            began_at: time(body.began_at)?,
            last_activity: time(body.last_activity)?,
            ended_through: time(body.ended_through)?,
            process: body.process,
        },
    };
    Ok((path, cursor))
}

fn encode<T: Encode>(body: &T, bytes_expected: usize) -> Result<Vec<u8>, CodecError> {
    let mut record = Vec::with_capacity(HEADER_BYTES + bytes_expected);
    record.extend_from_slice(&[VERSION, 0, 0, 0, 0]);
    bincode::encode_into_std_write(body, &mut record, BINCODE).map_err(|error| CodecError::Body(error.to_string()))?;
    let checksum = crc32fast::hash(record.get(HEADER_BYTES..).unwrap_or_default());
    record.splice(1..HEADER_BYTES, checksum.to_le_bytes());
    if record.len() > RECORD_BYTES_MAX { Err(CodecError::TooLarge(record.len())) } else { Ok(record) }
}

fn decode<'a, T: BorrowDecode<'a, ()>>(record: &'a [u8]) -> Result<T, CodecError> {
    let (checksum, body) = take_apart(record)?;
    if crc32fast::hash(body) != checksum {
        return Err(CodecError::Checksum);
    }
    let (value, read) = begin(body)?;
    if read == body.len() { Ok(value) } else { Err(CodecError::Body(format!("{} bytes too many", body.len() - read))) }
}

/// Checksum and body.
fn take_apart(record: &[u8]) -> Result<(u32, &[u8]), CodecError> {
    match record {
        [VERSION, a, b, c, d, body @ ..] => Ok((u32::from_le_bytes([*a, *b, *c, *d]), body)),
        [version, ..] if *version != VERSION => Err(CodecError::Version(*version)),
        _ => Err(CodecError::Checksum),
    }
}

/// What a body begins with, and how many bytes that takes.
fn begin<'a, T: BorrowDecode<'a, ()>>(body: &'a [u8]) -> Result<(T, usize), CodecError> {
    bincode::borrow_decode_from_slice(body, BINCODE).map_err(|error| CodecError::Body(error.to_string()))
}

fn timestamp(nanoseconds: i128) -> Result<Timestamp, CodecError> {
    Timestamp::from_nanosecond(nanoseconds).map_err(|error| CodecError::Body(error.to_string()))
}

fn origin_body(origin: &Origin) -> OriginBody<'_> {
    match origin {
        Origin::Transcript { path, offset } => OriginBody::Transcript { path, offset: *offset },
        Origin::Hook => OriginBody::Hook,
        Origin::Http => OriginBody::Http,
        Origin::Cli => OriginBody::Cli,
    }
}

fn origin(body: OriginBody<'_>) -> Origin {
    match body {
        OriginBody::Transcript { path, offset } => Origin::Transcript { path: path.into(), offset },
        OriginBody::Hook => Origin::Hook,
        OriginBody::Http => Origin::Http,
        OriginBody::Cli => Origin::Cli,
    }
}

/// `text`, or as much of its beginning as fits into `bytes_max`.
fn cut(text: &str, bytes_max: usize) -> &str {
    text.get(..text.floor_char_boundary(bytes_max)).unwrap_or_default()
}
