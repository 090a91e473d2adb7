//! What waits in the queue and what was set aside, as lines of JSON: the one shape of `queue-dump`, `GET /queue` and
//! `GET /dead-letters`.

use std::borrow::Cow;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::event::{Cursor, DeadContent, DeadLetter, Envelope, Event, Origin, Sequence};
use crate::queue::{Queue, QueueError};

/// Records that are read from the queue at once.
const PAGE_RECORDS: usize = 128;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Listing {
    Pending,
    DeadLetters,
}

/// Which records are listed.
#[derive(Clone, Default, Debug)]
pub struct Filter {
    pub after: Option<Sequence>,
    pub limit: Option<u64>,
    pub event_type: Option<String>,
    /// The payload's session_uuid or claude_session_id.
    pub session: Option<String>,
    /// Whole payloads; without it no text is shown.
    pub payload: bool,
}

/// Gives the listing, oldest first, in pieces of whole lines of JSON. Takes the memory of one page.
pub fn write_lines(
    queue: &Queue,
    listing: Listing,
    filter: &Filter,
    mut write: impl FnMut(Vec<u8>) -> io::Result<()>,
) -> Result<(), ListingError> {
    let mut after = filter.after;
    let mut left = filter.limit.unwrap_or(u64::MAX);
    loop {
        let mut lines = Vec::new();
        let last = match listing {
            Listing::Pending => {
                let page = queue.page(after, PAGE_RECORDS)?;
                for envelope in page.iter().filter(|envelope| matches(&envelope.event, filter)) {
                    if left > 0 {
                        left -= 1;
                        push(&mut lines, &pending_line(envelope, filter));
                    }
                }
                page.last().map(|envelope| envelope.sequence)
            }
            Listing::DeadLetters => {
                let page = queue.dead_letters(after, PAGE_RECORDS)?;
                for letter in page.iter().filter(|letter| letter_matches(letter, filter)) {
                    if left > 0 {
                        left -= 1;
                        push(&mut lines, &dead_line(letter, filter));
                    }
                }
                page.last().map(|letter| letter.sequence)
            }
        };
        if !lines.is_empty() {
            write(lines).map_err(ListingError::Reader)?;
        }
        match last {
            Some(sequence) if left > 0 => after = Some(sequence),
            _ => return Ok(()),
        }
    }
}

/// How far a transcript has been read: one line of `GET /cursors`.
#[derive(Serialize, Deserialize, Debug)]
pub struct CursorLine<'a> {
    /// As events name it.
    pub path: Cow<'a, str>,
    /// Every byte before it is queued or set aside.
    pub offset: u64,
    /// Hash over bytes before the offset, in hexadecimal: it holds for the file that was read, not for one that has
    /// replaced it.
    pub fingerprint: Cow<'a, str>,
    /// Whether its session was registered: not while nothing but what it inherited was read. Earlier versions do not say.
    #[serde(default = "is_registered")]
    pub registered: bool,
}

fn is_registered() -> bool {
    true
}

impl<'a> CursorLine<'a> {
    pub fn of(path: &'a Path, cursor: &Cursor) -> CursorLine<'a> {
        CursorLine {
            path: path.to_string_lossy(),
            offset: cursor.offset,
            fingerprint: format!("{:016x}", cursor.fingerprint).into(),
            registered: cursor.project_path.is_some(),
        }
    }
}

/// Why a listing ended early.
#[derive(Debug, thiserror::Error)]
pub enum ListingError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("could not write the listing: {0}")]
    Reader(io::Error),
}

/// One line of a listing.
#[derive(Serialize)]
struct Line<'a> {
    sequence: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    event_id: Option<String>,
    event_type: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timestamp: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    captured_at: Option<String>,
    bytes: usize,
    attempts: u32,
    origin: OriginLine<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sqlstate: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failed_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<Box<RawValue>>,
    /// Input that never became an event, as text; what is no UTF-8 is replaced.
    #[serde(skip_serializing_if = "Option::is_none")]
    input: Option<String>,
}

#[derive(Serialize)]
struct OriginLine<'a> {
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

impl<'a> From<&'a Origin> for OriginLine<'a> {
    fn from(origin: &'a Origin) -> Self {
        match origin {
            Origin::Transcript { path, offset } => {
                OriginLine { kind: origin.kind(), path: Some(path), offset: Some(*offset) }
            }
            Origin::Hook | Origin::Http | Origin::Cli => OriginLine { kind: origin.kind(), path: None, offset: None },
        }
    }
}

fn pending_line<'a>(envelope: &'a Envelope, filter: &Filter) -> Line<'a> {
    let event = &envelope.event;
    Line {
        sequence: envelope.sequence.get(),
        event_id: Some(event.id().to_string()),
        event_type: Some(event.event_type().as_str()),
        timestamp: Some(event.timestamp().to_string()),
        captured_at: Some(envelope.captured_at.to_string()),
        bytes: event.payload().as_json().len(),
        attempts: envelope.attempts,
        origin: event.origin().into(),
        reason: None,
        message: None,
        sqlstate: None,
        failed_at: None,
        payload: filter.payload.then(|| raw_payload(event)).flatten(),
        input: None,
    }
}

fn dead_line<'a>(letter: &'a DeadLetter, filter: &Filter) -> Line<'a> {
    let failure = &letter.failure;
    let line = match &letter.content {
        DeadContent::Event { event, captured_at, attempts } => Line {
            sequence: letter.sequence.get(),
            event_id: Some(event.id().to_string()),
            event_type: Some(event.event_type().as_str()),
            timestamp: Some(event.timestamp().to_string()),
            captured_at: Some(captured_at.to_string()),
            bytes: event.payload().as_json().len(),
            attempts: *attempts,
            origin: event.origin().into(),
            reason: None,
            message: None,
            sqlstate: None,
            failed_at: None,
            payload: filter.payload.then(|| raw_payload(event)).flatten(),
            input: None,
        },
        DeadContent::Input(rejection) => Line {
            sequence: letter.sequence.get(),
            event_id: None,
            event_type: rejection.event_type.as_ref().map(|event_type| event_type.as_str()),
            timestamp: None,
            captured_at: None,
            bytes: rejection.bytes.len(),
            attempts: 0,
            origin: (&rejection.origin).into(),
            reason: None,
            message: None,
            sqlstate: None,
            failed_at: None,
            payload: None,
            input: filter.payload.then(|| String::from_utf8_lossy(&rejection.bytes).into_owned()),
        },
    };
    Line {
        reason: Some(failure.kind.as_str()),
        message: Some(&failure.message),
        sqlstate: failure.sqlstate.as_deref(),
        failed_at: Some(letter.failed_at.to_string()),
        ..line
    }
}

fn raw_payload(event: &Event) -> Option<Box<RawValue>> {
    RawValue::from_string(event.payload().as_json().to_owned()).ok()
}

fn matches(event: &Event, filter: &Filter) -> bool {
    filter.event_type.as_deref().is_none_or(|wanted| event.event_type().as_str() == wanted)
        && filter.session.as_deref().is_none_or(|wanted| is_of_session(event, wanted))
}

fn letter_matches(letter: &DeadLetter, filter: &Filter) -> bool {
    match &letter.content {
        DeadContent::Event { event, .. } => matches(event, filter),
        DeadContent::Input(rejection) => {
            let event_type = rejection.event_type.as_ref().map(|event_type| event_type.as_str());
            filter.event_type.as_deref().is_none_or(|wanted| event_type == Some(wanted)) && filter.session.is_none()
        }
    }
}

fn is_of_session(event: &Event, wanted: &str) -> bool {
    /// The two fields that name a session; the others are skipped, whatever their size.
    #[derive(Deserialize)]
    struct SessionFields<'a> {
        #[serde(borrow)]
        session_uuid: Option<&'a RawValue>,
        #[serde(borrow)]
        claude_session_id: Option<&'a RawValue>,
    }
    let Ok(fields) = serde_json::from_str::<SessionFields<'_>>(event.payload().as_json()) else { return false };
    let is_wanted = |raw: &RawValue| serde_json::from_str::<Cow<'_, str>>(raw.get()).is_ok_and(|name| name == wanted);
    fields.session_uuid.is_some_and(is_wanted) || fields.claude_session_id.is_some_and(is_wanted)
}

fn push(lines: &mut Vec<u8>, line: &Line<'_>) {
    let start = lines.len();
    if serde_json::to_writer(&mut *lines, line).is_err() {
        lines.truncate(start);
        return;
    }
    lines.push(b'\n');
}
