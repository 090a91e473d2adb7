//! What is still whole on a line that is no JSON object.
//!
//! Seen in the wild: a record cut off with the next one following on the same line, two records on one line, runs of NUL
//! before a record (power loss). Not every whole object is believed to be a record (see [`is_a_record`]): else the
//! objects *inside* a damaged one, such as the messages nested in `progress` lines, would come back as lines that nobody
//! wrote.
//!
//! # Cost
//!
//! Linear in the length of the line. Where an attempt fails at some byte, the search goes on just before that byte, so
//! bytes are looked at once. Only objects that run to the end of the line without closing make it look again, and of
//! those at most [`UNCLOSED_MAX`] are tried.

use std::ops::Range;

use memchr::memmem;
use serde::de::IgnoredAny;

use super::line::{BadLine, LineMeaning, TranscriptKind, looks_like_a_line, read_line};

/// How records start: 99.9 % of lines have one of these as their first key.
const PREFIXES: [&[u8]; 2] = [b"{\"parentUuid\"", b"{\"type\""];

/// Unclosed objects that are tried; each costs a pass over the rest of the line. Real lines nest at most 10 deep.
const UNCLOSED_MAX: usize = 16;

/// Records taken from one line; what follows counts as lost.
const RECORDS_MAX: usize = 4096;

/// A parser notices at most so many bytes after the start of the next record that its own record was cut.
const LOOK_BACK_BYTES: usize = 32;

/// A piece of a damaged line, as a range of its bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Segment {
    /// One whole record: a JSON object, perhaps with NULs in it, which [`read_line`]
    /// passes over.
    Record(Range<usize>),
    /// Bytes that belong to no whole record. NULs and blanks at its ends are left out.
    Lost(Range<usize>),
}

/// The pieces of `line` (which holds no newline) in order: whole records, and what lies between them.
///
/// Never empty: a line with nothing whole on it is one lost piece.
pub fn salvage(line: &[u8]) -> Vec<Segment> {
    if memchr::memchr(0, line).is_none() {
        return pieces(line);
    }
    let stripped = line.iter().copied().filter(|byte| *byte != 0).collect::<Vec<_>>();
    let mut pieces = pieces(&stripped);
    // Pieces are in order, so one walk over the line finds all their places again.
    let mut places = line.iter().enumerate().filter(|(_, byte)| **byte != 0).map(|(place, _)| place).enumerate();
    for piece in &mut pieces {
        let (Segment::Record(range) | Segment::Lost(range)) = piece;
        let mut place_of = |index| places.find(|(stripped, _)| *stripped == index).map(|(_, place)| place);
        let length = range.len();
        let (Some(start), true) = (place_of(range.start), length > 0) else {
            *range = 0..line.len(); // nothing but NULs
            continue;
        };
        let last = if length == 1 { Some(start) } else { place_of(range.end - 1) };
        *range = start..last.map_or(line.len(), |last| last + 1);
    }
    pieces
}

/// What stands on a damaged line: each piece's place, and what it means; `bad` for what is lost.
pub(crate) fn read_damaged(
    line: &[u8],
    kind: &TranscriptKind,
    bad: &BadLine,
) -> impl Iterator<Item = (Range<usize>, Result<LineMeaning, BadLine>)> {
    salvage(line).into_iter().map(move |segment| match segment {
        Segment::Record(range) => (range.clone(), read_line(line.get(range).unwrap_or_default(), kind)),
        Segment::Lost(range) => (range, Err(bad.clone())),
    })
}

/// As [`salvage`], for a line without NULs.
fn pieces(line: &[u8]) -> Vec<Segment> {
    let mut found = Vec::new();
    let mut records = 0;
    let mut unclosed = 0;
    let mut lost_from = 0; // everything before is in `found`
    let mut position = 0;
    let mut between_records = true; // nothing but records and blanks before `position`
    while records < RECORDS_MAX && unclosed < UNCLOSED_MAX {
        let next = skip_blanks(line, position);
        between_records &= line.get(next) == Some(&b'{');
        let Some(start) = (if between_records { Some(next) } else { next_candidate(line, position) }) else { break };
        match attempt(line, start) {
            Attempt::Whole { end } if is_a_record(line, start..end, between_records) => {
                push_lost(&mut found, line, lost_from..start);
                found.push(Segment::Record(start..end));
                records += 1;
                lost_from = end;
                position = end;
                between_records = true;
            }
            Attempt::Whole { end } => position = end,
            Attempt::Unclosed => {
                unclosed += 1;
                position = start + 1;
                between_records = false;
            }
            Attempt::Broken { at } => {
                position = at.saturating_sub(LOOK_BACK_BYTES).max(start + 1);
                between_records = false;
            }
        }
    }
    push_lost(&mut found, line, lost_from..line.len());
    if found.is_empty() {
        found.push(Segment::Lost(0..line.len()));
    }
    found
}

enum Attempt {
    Whole { end: usize },
    Unclosed,
    Broken { at: usize },
}

/// Skims the object that starts at `start`.
fn attempt(line: &[u8], start: usize) -> Attempt {
    let mut stream = serde_json::Deserializer::from_slice(line.get(start..).unwrap_or_default()).into_iter();
    match stream.next() {
        Some(Ok(IgnoredAny)) => Attempt::Whole { end: start + stream.byte_offset() },
        Some(Err(error)) if error.is_eof() => Attempt::Unclosed,
        Some(Err(error)) => Attempt::Broken { at: start + error.column() },
        None => Attempt::Unclosed,
    }
}

/// Whether the object at `range` is a record and not a part of one: two of three signs are enough, namely that it stands
/// where a record must start, that one may start where it ends, and that it looks like a line.
fn is_a_record(line: &[u8], range: Range<usize>, between_records: bool) -> bool {
    let ends_well = matches!(line.get(skip_blanks(line, range.end)), None | Some(b'{'));
    match (between_records, ends_well) {
        (true, true) => true,
        (false, false) => false,
        _ => line.get(range).is_some_and(looks_like_a_line),
    }
}

/// The first place at or after `position` where a record may start.
fn next_candidate(line: &[u8], position: usize) -> Option<usize> {
    let rest = line.get(position..)?;
    // `{"` first: both prefixes searched to the end of the line, again and again, would cost too much.
    memmem::find_iter(rest, b"{\"")
        .find(|at| rest.get(*at..).is_some_and(|rest| PREFIXES.iter().any(|prefix| rest.starts_with(prefix))))
        .map(|at| position + at)
}

fn skip_blanks(line: &[u8], position: usize) -> usize {
    let rest = line.get(position..).unwrap_or_default();
    position + rest.iter().take_while(|byte| byte.is_ascii_whitespace()).count()
}

fn push_lost(found: &mut Vec<Segment>, line: &[u8], range: Range<usize>) {
    let bytes = line.get(range.clone()).unwrap_or_default();
    let lost = bytes.trim_ascii();
    if !lost.is_empty() {
        let start = range.start + (bytes.len() - bytes.trim_ascii_start().len());
        found.push(Segment::Lost(start..start + lost.len()));
    }
}
