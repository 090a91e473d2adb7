//! Records of the queue to bytes and back: a header of ten bytes, then a bincode body.
//!
//! The layouts of what records stand in are at the heads of `block` (several in one value), `store` (the keys) and `journal`.
//!
//! Nothing outside this file knows bincode, and nothing inside it knows sled. What is written here is read
//! by every later version of the program, so a layout is never edited: it gets a new version number.
//!
//! ```text
//! offset  size  field
//!      0     1  version of the layout, by kind: 1; 2 for cursors and counters
//!      1     1  kind: 1 event, 2 input, 3 letter, 4 cursor, 5 counters
//!      2     4  length of the body, u32 little endian
//!      6     4  crc32 (IEEE) over bytes 0..6 and the body, u32 little endian
//!     10     n  body: bincode 2, little endian, integers at full width, fields in the order of the structs below
//! ```
//!
//! The body of an event begins with `captured_at` (i128, nanoseconds) and `attempts` (u32), so both can be read
//! from the first bytes of a record whose rest is elsewhere ([`captured_at`]).
//!
//! Timestamps are nanoseconds since 1970 as i128; paths of cursors are the bytes the system uses.

use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use bincode::{BorrowDecode, Encode};
use thiserror::Error;
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

use crate::event::{
    Cursor, Event, EventId, EventParts, EventType, Failure, FailureKind, FileIdentity, ForeignKeys, Origin, Payload,
    Rejection, Sequence, SessionState, Timestamp,
};

/// Bytes before the body.
pub const HEADER_BYTES: usize = 10;

/// Longest record. Above every limit of the intake; a longer length in a header is damage.
pub const RECORD_BYTES_MAX: usize = 96 << 20;

/// Greatest number that is believed when it is read from disk: of sequences, records, generations and counters.
///
/// Counting by ones never gets there, so a greater one is damage; and adding to one that is believed cannot overflow.
pub const NUMBER_MAX: u64 = u64::MAX / 2;

/// Longest message of a failure that is kept; with it a letter always fits into one chunk.
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
    #[error("record ends after {0} bytes")]
    Short(usize),
    #[error("record has layout version {found}, this program knows up to {supported}")]
    TooNew { found: u8, supported: u8 },
    #[error("record is of kind {found}, not {expected}")]
    Kind { found: u8, expected: u8 },
    #[error("record has {found} bytes where its header says {expected}")]
    Length { found: usize, expected: usize },
    #[error("checksum of the record does not match")]
    Checksum,
    #[error("body of the record is not readable: {0}")]
    Body(String),
    #[error("record of {0} bytes is longer than {RECORD_BYTES_MAX}")]
    TooLarge(usize),
    #[error("number {0} is out of range")]
    Number(u64),
}

/// What a record holds; the number is on disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    Event = 1,
    Input = 2,
    Letter = 3,
    Cursor = 4,
    Counters = 5,
}

impl Kind {
    /// The layout in which it is written, and the newest that is understood. Each kind has its own, so that an older
    /// program goes on to understand the kinds that did not change.
    pub const fn version(self) -> u8 {
        match self {
            Kind::Cursor | Kind::Counters => 2,
            Kind::Event | Kind::Input | Kind::Letter => 1,
        }
    }
}

/// The queue's own numbers, written with every change: what opening needs to know without reading the rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, BorrowDecode)]
pub struct Counters {
    /// The number the next event or rejection gets. Whatever is stored at this number or above was never committed.
    pub next_sequence: u64,
    pub pending: u64,
    /// Encoded bytes of the pending events.
    pub pending_bytes: u64,
    pub dead_letters: u64,
    /// Encoded bytes of what the dead letters hold.
    pub dead_letter_bytes: u64,
    /// Which events are pending, as a sum over a hash of their numbers: with it one that vanished and one that came back
    /// don't make up for each other. `None` where a program wrote it that did not know it yet.
    pub pending_checksum: Option<u64>,
}

impl Counters {
    pub fn new(next_sequence: u64) -> Self {
        Counters {
            next_sequence,
            pending: 0,
            pending_bytes: 0,
            dead_letters: 0,
            dead_letter_bytes: 0,
            pending_checksum: Some(0),
        }
    }

    /// Counts a pending event whose record has `bytes` bytes.
    pub fn add_event(&mut self, sequence: Sequence, bytes: u64) {
        self.pending += 1;
        self.pending_bytes += bytes;
        self.pending_checksum = self.pending_checksum.map(|sum| sum.wrapping_add(hash(sequence)));
    }

    /// Counts a pending event no more.
    pub fn remove_event(&mut self, sequence: Sequence, bytes: u64) {
        self.pending = self.pending.saturating_sub(1);
        self.pending_bytes = self.pending_bytes.saturating_sub(bytes);
        if self.pending == 0 {
            // A damaged length can have put it out of step.
            self.pending_bytes = 0;
        }
        self.pending_checksum = self.pending_checksum.map(|sum| sum.wrapping_sub(hash(sequence)));
    }

    /// Whether both speak of the same events, and of as many dead letters.
    pub fn agrees_with(&self, other: &Counters) -> bool {
        (self.pending, self.pending_checksum, self.dead_letters)
            == (other.pending, other.pending_checksum, other.dead_letters)
    }
}

fn hash(sequence: Sequence) -> u64 {
    xxh3_64(&sequence.get().to_le_bytes())
}

/// What lies in the record beside a letter.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Encode, BorrowDecode)]
pub enum Content {
    /// A record of an event, good to be sent again.
    Event,
    /// A record of an input that was rejected.
    Input,
    /// Bytes that could not be read back as a record.
    Raw,
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

/// A cursor in layout 1, and the beginning of one in layout 2.
#[derive(Encode, BorrowDecode)]
struct CursorBody<'a> {
    path: &'a [u8],
    device: u64,
    inode: u64,
    offset: u64,
    fingerprint: u64,
    project_path: Option<&'a str>,
}

/// A cursor in layout 2: times in nanoseconds.
#[derive(Encode, BorrowDecode)]
struct CursorBody2<'a> {
    cursor: CursorBody<'a>,
    began_at: Option<i128>,
    last_activity: Option<i128>,
    ended_through: Option<i128>,
    process: Option<u32>,
}

/// The counters in layout 1; [`Counters`] are layout 2.
#[derive(BorrowDecode)]
struct CountersBody {
    next_sequence: u64,
    pending: u64,
    pending_bytes: u64,
    dead_letters: u64,
    dead_letter_bytes: u64,
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
    encode(Kind::Event, &body, 256 + body.payload.len() + body.event_type.len())
}

pub fn decode_event(record: &[u8]) -> Result<StoredEvent, CodecError> {
    let body: EventBody<'_> = decode(Kind::Event, record)?;
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

/// When an event was captured, from the first chunk of its record; the checksum is not looked at.
pub fn captured_at(head: &[u8]) -> Result<Timestamp, CodecError> {
    let body = head.get(HEADER_BYTES..).ok_or(CodecError::Short(head.len()))?;
    let (nanoseconds, _): (i128, usize) = bincode::borrow_decode_from_slice(body, BINCODE).map_err(body_error)?;
    timestamp(nanoseconds)
}

pub fn encode_input(rejection: &Rejection, bytes: &[u8]) -> Result<Vec<u8>, CodecError> {
    let body = InputBody {
        event_type: rejection.event_type.as_ref().map(EventType::as_str),
        origin: origin_body(&rejection.origin),
        bytes,
    };
    encode(Kind::Input, &body, 256 + bytes.len())
}

/// The rejection in `record`; the failure is the letter's.
pub fn decode_input(record: &[u8], failure: Failure) -> Result<Rejection, CodecError> {
    let body: InputBody<'_> = decode(Kind::Input, record)?;
    Ok(Rejection {
        failure,
        event_type: body.event_type.map(EventType::new),
        origin: origin(body.origin),
        bytes: body.bytes.to_vec(),
    })
}

/// Always fits into one chunk: a message above 2 KiB is cut.
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
    encode(Kind::Letter, &body, 128 + body.message.len())
}

pub fn decode_letter(record: &[u8]) -> Result<Letter, CodecError> {
    let body: LetterBody<'_> = decode(Kind::Letter, record)?;
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
    let body = CursorBody2 {
        cursor: CursorBody {
            path: path.as_os_str().as_bytes(),
            device: cursor.file.device,
            inode: cursor.file.inode,
            offset: cursor.offset,
            fingerprint: cursor.fingerprint,
            project_path: cursor.project_path.as_deref(),
        },
        began_at: nanoseconds(session.began_at),
        last_activity: nanoseconds(session.last_activity),
        ended_through: nanoseconds(session.ended_through),
        process: session.process,
    };
    encode(Kind::Cursor, &body, 256 + body.cursor.path.len())
}

/// In layout 1 nothing is known of the session.
pub fn decode_cursor(record: &[u8]) -> Result<(PathBuf, Cursor), CodecError> {
    let (body, session) = if record.first() == Some(&1) {
        (decode(Kind::Cursor, record)?, SessionState::default())
    } else {
        let body: CursorBody2<'_> = decode(Kind::Cursor, record)?;
        let time = |nanoseconds: Option<i128>| nanoseconds.map(timestamp).transpose();
        let session = SessionState {
            began_at: time(body.began_at)?,
            last_activity: time(body.last_activity)?,
            ended_through: time(body.ended_through)?,
            process: body.process,
        };
        (body.cursor, session)
    };
    let path = PathBuf::from(std::ffi::OsString::from_vec(body.path.to_vec()));
    let cursor = Cursor {
        file: FileIdentity { device: body.device, inode: body.inode },
        offset: body.offset,
        fingerprint: body.fingerprint,
        project_path: body.project_path.map(str::to_owned),
        session,
    };
    Ok((path, cursor))
}

pub fn encode_counters(counters: &Counters) -> Result<Vec<u8>, CodecError> {
    encode(Kind::Counters, counters, 64)
}

/// In layout 1 the checksum is not known.
pub fn decode_counters(record: &[u8]) -> Result<Counters, CodecError> {
    let counters: Counters = if record.first() == Some(&1) {
        let CountersBody { next_sequence, pending, pending_bytes, dead_letters, dead_letter_bytes } =
            decode(Kind::Counters, record)?;
        Counters { next_sequence, pending, pending_bytes, dead_letters, dead_letter_bytes, pending_checksum: None }
    } else {
        decode(Kind::Counters, record)?
    };
    let Counters { next_sequence, pending, pending_bytes, dead_letters, dead_letter_bytes, .. } = counters;
    if next_sequence == 0 {
        return Err(CodecError::Number(0));
    }
    match [next_sequence, pending, pending_bytes, dead_letters, dead_letter_bytes].into_iter().max() {
        Some(greatest) if greatest > NUMBER_MAX => Err(CodecError::Number(greatest)),
        _ => Ok(counters),
    }
}

/// Length of the whole record, header included, that begins with `head`.
pub fn record_bytes(head: &[u8]) -> Result<usize, CodecError> {
    let header = Header::read(head)?;
    let length = HEADER_BYTES + header.body_bytes;
    if length > RECORD_BYTES_MAX { Err(CodecError::TooLarge(length)) } else { Ok(length) }
}

struct Header {
    version: u8,
    kind: u8,
    body_bytes: usize,
    checksum: u32,
}

impl Header {
    fn read(record: &[u8]) -> Result<Header, CodecError> {
        let Some(&[version, kind, a, b, c, d, e, f, g, h]) = record.first_chunk::<HEADER_BYTES>() else {
            return Err(CodecError::Short(record.len()));
        };
        Ok(Header {
            version,
            kind,
            body_bytes: u32::from_le_bytes([a, b, c, d]) as usize,
            checksum: u32::from_le_bytes([e, f, g, h]),
        })
    }
}

fn encode<T: Encode>(kind: Kind, body: &T, bytes_expected: usize) -> Result<Vec<u8>, CodecError> {
    let mut record = Vec::with_capacity(HEADER_BYTES + bytes_expected);
    record.extend_from_slice(&[0; HEADER_BYTES]);
    bincode::encode_into_std_write(body, &mut record, BINCODE).map_err(|error| CodecError::Body(error.to_string()))?;
    if record.len() > RECORD_BYTES_MAX {
        return Err(CodecError::TooLarge(record.len()));
    }
    let body_bytes = u32::try_from(record.len() - HEADER_BYTES).expect("RECORD_BYTES_MAX is below 4 GiB").to_le_bytes();
    let start = [[kind.version(), kind as u8].as_slice(), body_bytes.as_slice()].concat();
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(&start);
    checksum.update(record.get(HEADER_BYTES..).unwrap_or_default());
    for (place, byte) in record.iter_mut().zip(start.iter().chain(&checksum.finalize().to_le_bytes())) {
        *place = *byte;
    }
    Ok(record)
}

fn decode<'a, T: BorrowDecode<'a, ()>>(kind: Kind, record: &'a [u8]) -> Result<T, CodecError> {
    let header = Header::read(record)?;
    // A newer program may have changed everything after the version: it is looked at before anything else.
    if header.version > kind.version() {
        return Err(CodecError::TooNew { found: header.version, supported: kind.version() });
    }
    let (start, rest) = record.split_at(HEADER_BYTES - 4);
    let body = rest.get(4..).unwrap_or_default();
    if body.len() != header.body_bytes {
        return Err(CodecError::Length { found: record.len(), expected: HEADER_BYTES + header.body_bytes });
    }
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(start);
    checksum.update(body);
    if checksum.finalize() != header.checksum {
        return Err(CodecError::Checksum);
    }
    if header.kind != kind as u8 {
        return Err(CodecError::Kind { found: header.kind, expected: kind as u8 });
    }
    let (value, read) = bincode::borrow_decode_from_slice(body, BINCODE).map_err(body_error)?;
    if read != body.len() {
        return Err(CodecError::Body(format!("{} bytes too many", body.len() - read)));
    }
    Ok(value)
}

fn body_error(error: bincode::error::DecodeError) -> CodecError {
    CodecError::Body(error.to_string())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn cursor() -> Cursor {
        Cursor {
            file: FileIdentity { device: 1, inode: 2 },
            offset: 3,
            fingerprint: 4,
            project_path: Some("/home/someone".into()),
            session: SessionState {
                began_at: Some(Timestamp::from_nanosecond(5).unwrap()),
                last_activity: Some(Timestamp::from_nanosecond(-6).unwrap()),
                ended_through: None,
                process: Some(7),
            },
        }
    }

    #[test]
    fn a_cursor_comes_back_as_it_was() {
        let record = encode_cursor(Path::new("/a/b.jsonl"), &cursor()).unwrap();
        assert_eq!(decode_cursor(&record).unwrap(), (PathBuf::from("/a/b.jsonl"), cursor()));
    }

    #[test]
    fn a_cursor_that_an_older_program_wrote_is_still_read() {
        // Byte for byte what version 0.1 wrote in layout 1.
        let body = [
            &[2, 0, 0, 0, 0, 0, 0, 0][..],
            b"/a",
            &1u64.to_le_bytes(),
            &2u64.to_le_bytes(),
            &3u64.to_le_bytes(),
            &4u64.to_le_bytes(),
            &[1, 13, 0, 0, 0, 0, 0, 0, 0],
            b"/home/someone",
        ]
        .concat();
        let start = [&[1, 4][..], &(body.len() as u32).to_le_bytes()].concat();
        let checksum = crc32fast::hash(&[&start[..], &body].concat()).to_le_bytes();
        let record = [&start[..], &checksum, &body].concat();
        let expected = Cursor { session: SessionState::default(), ..cursor() };
        assert_eq!(decode_cursor(&record).unwrap(), (PathBuf::from("/a"), expected));
    }

    #[test]
    fn kinds_that_did_not_change_are_written_in_their_old_layout() {
        let rejection = Rejection {
            failure: Failure { kind: FailureKind::Unreadable, message: String::new(), sqlstate: None },
            event_type: None,
            origin: Origin::Http,
            bytes: Vec::new(),
        };
        assert_eq!(encode_input(&rejection, b"").unwrap()[0], 1);
        assert_eq!(encode_cursor(Path::new("/a"), &cursor()).unwrap()[0], 2);
        assert_eq!(encode_counters(&Counters::new(1)).unwrap()[0], 2);
    }
}
