//! What transcripts hold, byte for byte as the fuzzer likes it, read as the watcher reads it.
//!
//! Beside not panicking: every whole JSON object is read, the rest is named byte for byte, places are in order and in
//! the file, events fit their schemas, and reading in two parts gives what reading at once gives.

#![no_main]

use std::ops::Range;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use headspace_watcher::internals::{
    Agent, Candidate, Cursor, EventId, Found, LineReport, Memory, Origin, Rejection, START, Schemas, Segment, Source,
    Timestamp, TranscriptKind, Uuid, salvage,
};
use libfuzzer_sys::fuzz_target;
use serde::de::IgnoredAny;
use serde_json::Value;

static SCHEMAS: LazyLock<Schemas> =
    LazyLock::new(|| Schemas::load(None, u64::MAX).expect("the built-in schemas compile"));

const MAIN: TranscriptKind = TranscriptKind::Main { session: Uuid::from_u128(1) };

/// One thing that was found, as far as it must be the same whenever it is read.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Piece {
    Event { id: EventId, event_type: String, payload: String, offset: u64 },
    Lost { offset: u64, bytes: Vec<u8> },
}

impl Piece {
    fn offset(&self) -> u64 {
        match self {
            Piece::Event { offset, .. } | Piece::Lost { offset, .. } => *offset,
        }
    }
}

fuzz_target!(|file: &[u8]| {
    let lines = lines(file);
    for agent in [Agent::ClaudeCode, Agent::CodexCli] {
        read_in_parts(agent, file, &lines);
    }
    let source = source(Agent::ClaudeCode, TranscriptKind::SubAgent);
    let (mut cursor, mut memory, mut found) = (START, Memory::default(), Vec::new());
    for range in &lines {
        read(&source, &file[range.clone()], range.start, &mut cursor, &mut memory, &mut found);
    }
    assert!(found.iter().all(|piece| matches!(piece, Piece::Lost { .. })), "a sub-agent's lines are no events");
});

fn read_in_parts(agent: Agent, file: &[u8], lines: &[Range<usize>]) {
    let source = source(agent, MAIN);
    let (mut cursor, mut memory, mut whole) = (START, Memory::default(), Vec::new());
    let mut halfway = None;
    for (number, range) in lines.iter().enumerate() {
        if number == lines.len() / 2 {
            halfway = Some((cursor.clone(), whole.len()));
        }
        let before = whole.len();
        let line = &file[range.clone()];
        let report = read(&source, line, range.start, &mut cursor, &mut memory, &mut whole);
        check_line(agent, line, range, &report, &whole[before..]);
    }
    assert!(whole.is_sorted_by_key(Piece::offset), "places are in order: {whole:?}");

    if let Some((mut cursor, read_before)) = halfway {
        // What the cursor does not keep is found again in the lines before it.
        let (mut again, mut memory) = (START, Memory::default());
        for range in &lines[..lines.len() / 2] {
            read(&source, &file[range.clone()], range.start, &mut again, &mut memory, &mut Vec::new());
        }
        let mut rest = Vec::new();
        for range in &lines[lines.len() / 2..] {
            read(&source, &file[range.clone()], range.start, &mut cursor, &mut memory, &mut rest);
        }
        assert_eq!(rest, whole[read_before..], "reading on from a cursor gives what reading through gives");
    }
}

fn source(agent: Agent, kind: TranscriptKind) -> Source {
    Source {
        agent,
        kind,
        path: Arc::from("/p/a.jsonl"),
        inactivity_timeout: Duration::from_secs(60),
        active_max: Timestamp::MAX,
        inherited_to: 0,
    }
}

/// The lines that are complete, without their newlines.
fn lines(file: &[u8]) -> Vec<Range<usize>> {
    let mut start = 0;
    let ends = file.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(end, _)| end);
    ends.map(|end| std::mem::replace(&mut start, end + 1)..end).collect()
}

fn read(
    source: &Source,
    line: &[u8],
    offset: usize,
    cursor: &mut Cursor,
    memory: &mut Memory,
    pieces: &mut Vec<Piece>,
) -> LineReport {
    source.read(line, offset as u64, cursor, memory, |found| {
        pieces.push(match found {
            Found::Event(candidate) | Found::OfOther(_, candidate) => event(candidate),
            Found::Unreadable(rejection) => lost(rejection),
            Found::NoTurn(_) => return,
        });
    })
}

fn event(candidate: Candidate) -> Piece {
    let Origin::Transcript { offset, .. } = candidate.origin else { panic!("it comes from a transcript") };
    let mut payload = candidate.payload.clone();
    // The present moment where the line names none.
    payload.remove("turn_timestamp");
    let piece = Piece::Event {
        id: candidate.id,
        event_type: candidate.event_type.clone(),
        payload: serde_json::to_string(&payload).expect("a payload is JSON"),
        offset,
    };
    if let Err(refused) = SCHEMAS.check(candidate) {
        panic!("an event that does not fit: {}", refused.invalid);
    }
    piece
}

fn lost(rejection: Rejection) -> Piece {
    let Origin::Transcript { offset, .. } = rejection.origin else { panic!("it comes from a transcript") };
    Piece::Lost { offset, bytes: rejection.bytes }
}

fn check_line(agent: Agent, line: &[u8], range: &Range<usize>, report: &LineReport, pieces: &[Piece]) {
    for piece in pieces {
        let at = usize::try_from(piece.offset()).expect("it fits");
        assert!(range.contains(&at), "{piece:?} is not on its line {range:?}");
        match piece {
            // Decoded: the letters of an escape are harmless.
            Piece::Event { payload, .. } => {
                let payload: Value = serde_json::from_str(payload).expect("a payload is JSON");
                assert!(!holds_nul(&payload), "U+0000, which Postgres refuses");
            }
            Piece::Lost { bytes, .. } => {
                let there = &line[at - range.start..];
                assert!(!bytes.is_empty() && there.starts_with(bytes), "a dead letter of bytes that are not there");
            }
        }
    }
    let is_blank = line.iter().all(u8::is_ascii_whitespace);
    assert_eq!(report.is_blank, is_blank);
    if is_object(line) {
        assert!(report.bad.is_none(), "a whole object is never bad: {:?}", report.bad);
    }
    if report.bad.is_none() {
        assert!(pieces.iter().all(|piece| matches!(piece, Piece::Event { .. })), "nothing is lost of a good line");
        return;
    }
    if agent != Agent::ClaudeCode {
        assert!(pieces.iter().any(|piece| matches!(piece, Piece::Lost { .. })), "bytes of which nobody hears");
        return;
    }
    let mut covered = 0;
    for segment in salvage(line) {
        let (Segment::Record(part) | Segment::Lost(part)) = &segment;
        assert!(part.start >= covered && part.end > part.start, "segments are in order");
        assert!(line[covered..part.start].iter().all(is_padding), "bytes of which nobody hears");
        covered = part.end;
        let lost = pieces.iter().any(|piece| match piece {
            Piece::Lost { offset, bytes } => *offset == (range.start + part.start) as u64 && bytes.len() == part.len(),
            Piece::Event { .. } => false,
        });
        assert_eq!(lost, matches!(segment, Segment::Lost(_)), "one dead letter for each lost part, none for others");
    }
    assert!(line[covered..].iter().all(is_padding), "bytes of which nobody hears");
}

fn holds_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(values) => values.iter().any(holds_nul),
        Value::Object(members) => members.iter().any(|(key, value)| key.contains('\0') || holds_nul(value)),
        _ => false,
    }
}

fn is_padding(byte: &u8) -> bool {
    *byte == 0 || byte.is_ascii_whitespace()
}

/// As serde_json has it, which knows nothing of transcripts.
fn is_object(line: &[u8]) -> bool {
    // JSON's own blanks, of which a form feed is none.
    let start = line.iter().position(|byte| !b" \t\r\n".contains(byte)).unwrap_or(line.len());
    line[start..].starts_with(b"{") && serde_json::from_slice::<IgnoredAny>(line).is_ok()
}
