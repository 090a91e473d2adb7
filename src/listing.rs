//! What waits in the queue and the dead letters, as lines of JSON: the one shape of `queue-dump`, `GET /queue` and
//! `GET /dead-letters`.

use std::borrow::Cow;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::event::{
    Cursor, DeadContent, DeadLetter, Envelope, Event, EventType, Origin, Rejection, Sequence, Timestamp,
};
use crate::queue::{Queue, QueueError};

/// Records that are read from the queue at once.
const PAGE_RECORDS: usize = 128;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Listing {
    Pending,
    DeadLetters,
}

/// Which records are listed: the parameters of `GET /queue` and `GET /dead-letters`.
#[derive(Clone, Default, Debug, Deserialize)]
pub(crate) struct Filter {
    /// Only those behind this sequence number.
    pub after: Option<u64>,
    pub limit: Option<u64>,
    #[serde(rename = "type")]
    pub event_type: Option<String>,
    /// The payload's session_uuid or claude_session_id.
    pub session: Option<String>,
    /// Whole payloads; without it no text is shown.
    #[serde(default)]
    pub payload: bool,
}

/// Writes the listing, oldest first, in pieces of whole lines of JSON. Takes the memory of one page.
pub(crate) fn write_lines(
    queue: &Queue,
    listing: Listing,
    filter: &Filter,
    mut write: impl FnMut(Vec<u8>) -> io::Result<()>,
) -> Result<(), ListingError> {
    let mut after = filter.after.and_then(Sequence::new);
    let mut left = filter.limit.unwrap_or(u64::MAX);
    loop {
        let (lines, last) = match listing {
            Listing::Pending => {
                let page = queue.page(after, PAGE_RECORDS)?;
                let lines = lines(page.iter().filter_map(|envelope| pending_line(envelope, filter)), &mut left);
                (lines, page.last().map(|envelope| envelope.sequence))
            }
            Listing::DeadLetters => {
                let page = queue.dead_letters(after, PAGE_RECORDS)?;
                let lines = lines(page.iter().filter_map(|letter| dead_line(letter, filter)), &mut left);
                (lines, page.last().map(|letter| letter.sequence))
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

/// As many of them as are `left`.
fn lines<'a>(page: impl Iterator<Item = Line<'a>>, left: &mut u64) -> Vec<u8> {
    let mut lines = Vec::new();
    for line in page.take(usize::try_from(*left).unwrap_or(usize::MAX)) {
        *left -= 1;
        let start = lines.len();
        match serde_json::to_writer(&mut lines, &line) {
            Ok(()) => lines.push(b'\n'),
            Err(_) => lines.truncate(start),
        }
    }
    lines
}

/// How far a transcript has been read: one line of `GET /cursors`.
#[derive(Serialize, Deserialize, Debug)]
pub(crate) struct CursorLine<'a> {
    /// As events name it.
    pub path: Cow<'a, str>,
    /// Every byte before it is queued or dead-lettered.
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
    pub(crate) fn of(path: &'a Path, cursor: &Cursor) -> CursorLine<'a> {
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
pub(crate) enum ListingError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("could not write the listing: {0}")]
    Reader(io::Error),
}

/// One line of a listing.
#[derive(Serialize, Default)]
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

#[derive(Serialize, Default)]
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

fn pending_line<'a>(envelope: &'a Envelope, filter: &Filter) -> Option<Line<'a>> {
    event_line(envelope.sequence, &envelope.event, envelope.captured_at, envelope.attempts, filter)
}

fn dead_line<'a>(letter: &'a DeadLetter, filter: &Filter) -> Option<Line<'a>> {
    let line = match &letter.content {
        DeadContent::Event { event, captured_at, attempts } => {
            event_line(letter.sequence, event, *captured_at, *attempts, filter)?
        }
        DeadContent::Input(rejection) => input_line(letter.sequence, rejection, filter)?,
    };
    Some(Line {
        reason: Some(letter.failure.kind.as_str()),
        message: Some(&letter.failure.message),
        sqlstate: letter.failure.sqlstate.as_deref(),
        failed_at: Some(letter.failed_at.to_string()),
        ..line
    })
}

/// `None` for an event that the filter leaves out.
fn event_line<'a>(
    sequence: Sequence,
    event: &'a Event,
    captured_at: Timestamp,
    attempts: u32,
    filter: &Filter,
) -> Option<Line<'a>> {
    let event_type = event.event_type().as_str();
    let is_wanted = filter.event_type.as_deref().is_none_or(|wanted| event_type == wanted)
        && filter.session.as_deref().is_none_or(|wanted| is_of_session(event, wanted));
    let payload = event.payload().as_json();
    is_wanted.then(|| Line {
        sequence: sequence.get(),
        event_id: Some(event.id().to_string()),
        event_type: Some(event_type),
        timestamp: Some(event.timestamp().to_string()),
        captured_at: Some(captured_at.to_string()),
        bytes: payload.len(),
        attempts,
        origin: event.origin().into(),
        payload: filter.payload.then(|| RawValue::from_string(payload.to_owned()).ok()).flatten(),
        ..Line::default()
    })
}

/// `None` for input that the filter leaves out.
fn input_line<'a>(sequence: Sequence, rejection: &'a Rejection, filter: &Filter) -> Option<Line<'a>> {
    let event_type = rejection.event_type.as_ref().map(EventType::as_str);
    let is_wanted = filter.event_type.as_deref().is_none_or(|wanted| event_type == Some(wanted));
    (is_wanted && filter.session.is_none()).then(|| Line {
        sequence: sequence.get(),
        event_type,
        bytes: rejection.bytes.len(),
        origin: (&rejection.origin).into(),
        input: filter.payload.then(|| String::from_utf8_lossy(&rejection.bytes).into_owned()),
        ..Line::default()
    })
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
