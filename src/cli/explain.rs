//! `explain`: for each line of a transcript, whether it is a turn, or why not. Reads one file and nothing else.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::claude::line::{self, BadLine, LineMeaning, LineType, TranscriptKind, Unknown};
use crate::claude::repair;
use crate::telemetry::{UnknownFormat, UnknownFormats};

use super::{Context, Exit, Failure, written};

/// Say of each line of a transcript whether it is a turn and whose, or why not
#[derive(Args)]
#[command(
    after_help = "Examples:\n  headspace-watcher explain ~/.claude/projects/-home-me-app/SESSION.jsonl\n  headspace-watcher explain SESSION.jsonl:17 --text\n\nExit code 65: there is no such file or line."
)]
pub(super) struct ExplainArguments {
    /// The transcript, and the number of a line in it [default: all lines]
    #[arg(value_name = "FILE[:LINE]")]
    place: PathBuf,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// Show what was said
    #[arg(long)]
    text: bool,
}

/// What was found at one place: a line, or a whole record on a damaged one.
struct Record {
    line: u64,
    offset: u64,
    /// Its line has a newline.
    is_whole: bool,
    outcome: Outcome,
}

enum Outcome {
    Read(Box<LineMeaning>),
    Unreadable(String),
}

pub(super) fn explain(context: &Context, arguments: &ExplainArguments) -> Result<Exit, Failure> {
    let (path, only) = place(&arguments.place);
    let failed = |error: io::Error| {
        let exit = if error.kind() == io::ErrorKind::NotFound { Exit::Data } else { Exit::Io };
        Failure::new(exit, format!("could not read {}: {error}", path.display()))
    };
    let file = File::open(&path).map_err(failed)?;
    let kind = kind_of(&path);
    let bytes_max = context.config().file_watcher.max_line_bytes;
    let mut out = BufWriter::new(io::stdout().lock());
    let (mut file, mut bytes, mut number, mut offset) = (BufReader::new(file), Vec::new(), 0, 0);
    let mut is_found = false;
    let unknown_formats = UnknownFormats::default();
    while let Some(length) = next_line(&mut file, bytes_max, &mut bytes).map_err(failed)? {
        number += 1;
        let is_whole = bytes.last() == Some(&b'\n');
        let text = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
        let is_too_long = length > bytes.len() as u64;
        if only.is_none_or(|only| only == number) && (is_too_long || !text.trim_ascii().is_empty()) {
            is_found = true;
            let records = if is_too_long {
                vec![unreadable(number, offset, format!("{length} bytes, more than file_watcher.max_line_bytes"))]
            } else {
                records(text, number, offset, &kind, is_whole)
            };
            for record in &records {
                for Unknown { field, value, version } in record.unknowns() {
                    unknown_formats.note(field, value, version, Instant::now());
                }
                let shown = if arguments.json {
                    writeln!(out, "{}", record.json(arguments.text))
                } else {
                    record.write(&mut out, arguments.text)
                };
                if shown.is_err() {
                    return written(shown);
                }
            }
        }
        offset += length;
    }
    match only {
        Some(only) if !is_found => {
            let message = format!("{} has no line {only}, or it is blank; it has {number} lines", path.display());
            Err(Failure::new(Exit::Data, message))
        }
        _ if arguments.json => written(out.flush()),
        _ => written(write_unknown(&mut out, &unknown_formats).and_then(|()| out.flush())),
    }
}

/// What the lines had that this version does not know.
fn write_unknown(out: &mut impl Write, formats: &UnknownFormats) -> io::Result<()> {
    for UnknownFormat { field, value, version, lines } in formats.list() {
        let lines = if lines == 1 { "1 line".to_owned() } else { format!("{lines} lines") };
        writeln!(out, "unknown to this version: {field} \"{value}\" on {lines} (Claude Code \"{version}\")")?;
    }
    Ok(())
}

/// `FILE:LINE`, where there is no file of that whole name.
fn place(place: &Path) -> (PathBuf, Option<u64>) {
    let line = || {
        let (path, line) = place.to_str()?.rsplit_once(':')?;
        Some((PathBuf::from(path), Some(line.parse::<u64>().ok()?)))
    };
    if place.exists() { (place.to_owned(), None) } else { line().unwrap_or_else(|| (place.to_owned(), None)) }
}

/// By its name alone: it may lie anywhere.
fn kind_of(path: &Path) -> TranscriptKind {
    let name = path.file_name().unwrap_or_default();
    let kind = line::classify(&Path::new("project").join(name));
    kind.unwrap_or(TranscriptKind::Main { session: Uuid::nil() })
}

/// Reads the next line with its newline; of a line above `bytes_max` only the beginning is kept. Returns its length in the
/// file; `None` at the end.
fn next_line(file: &mut impl BufRead, bytes_max: u64, bytes: &mut Vec<u8>) -> io::Result<Option<u64>> {
    bytes.clear();
    // One more for the newline.
    let kept = file.take(bytes_max + 1).read_until(b'\n', bytes)? as u64;
    let is_cut = kept > bytes_max && bytes.last() != Some(&b'\n');
    let length = if is_cut { kept + file.skip_until(b'\n')? as u64 } else { kept };
    Ok((length > 0).then_some(length))
}

fn unreadable(line: u64, offset: u64, message: String) -> Record {
    Record { line, offset, is_whole: true, outcome: Outcome::Unreadable(message) }
}

/// What stands on a line: itself, or the whole records of a damaged one and what lies between them.
fn records(text: &[u8], line: u64, offset: u64, kind: &TranscriptKind, is_whole: bool) -> Vec<Record> {
    let read = |offset: u64, outcome: Result<LineMeaning, BadLine>| {
        let outcome = match outcome {
            Ok(meaning) => Outcome::Read(Box::new(meaning)),
            Err(_) if !is_whole => Outcome::Unreadable("incomplete: it has no newline yet".to_owned()),
            Err(bad) => Outcome::Unreadable(bad.message),
        };
        Record { line, offset, is_whole, outcome }
    };
    match line::read_line(text, kind) {
        Ok(meaning) => vec![read(offset, Ok(meaning))],
        Err(bad) if !is_whole => vec![read(offset, Err(bad))],
        Err(bad) => {
            let found = repair::read_damaged(text, kind, &bad);
            found.map(|(range, record)| read(offset + range.start as u64, record)).collect()
        }
    }
}

impl Record {
    fn unknowns(&self) -> &[Unknown] {
        match &self.outcome {
            Outcome::Read(meaning) => &meaning.unknowns,
            Outcome::Unreadable(_) => &[],
        }
    }

    fn type_name(&self) -> &str {
        let Outcome::Read(meaning) = &self.outcome else { return "-" };
        match meaning.line_type {
            LineType::User => "user",
            LineType::Assistant => "assistant",
            LineType::System => "system",
            LineType::Attachment => "attachment",
            LineType::Progress => "progress",
            LineType::Metadata => "state",
            LineType::Unknown => meaning.unknown_type().unwrap_or(line::NO_TYPE),
            LineType::Blank => "blank",
        }
    }

    /// Why it is no turn; `None` for a turn.
    fn reason(&self) -> Option<String> {
        let meaning = match &self.outcome {
            Outcome::Unreadable(message) => return Some(message.clone()),
            Outcome::Read(meaning) => meaning,
        };
        if meaning.turn.is_some() {
            return None;
        }
        let of_its_type = match meaning.line_type {
            LineType::Metadata => "state",
            LineType::Unknown => "unknown type",
            LineType::User | LineType::Assistant | LineType::Attachment => "in a sub-agent's transcript",
            LineType::System | LineType::Progress | LineType::Blank => "nothing said",
        };
        Some(meaning.no_turn.as_ref().map_or_else(|| of_its_type.to_owned(), ToString::to_string))
    }

    fn write(&self, out: &mut impl Write, with_text: bool) -> io::Result<()> {
        let turn = match &self.outcome {
            Outcome::Read(meaning) => meaning.turn.as_ref(),
            Outcome::Unreadable(_) => None,
        };
        let mut what = match turn {
            None => format!("no turn: {}", self.reason().unwrap_or_default()),
            Some(turn) => {
                let kind = turn.kind.map(line::TurnKind::as_str);
                let provenance = turn.provenance.map(line::Provenance::as_str);
                let words = [Some(turn.actor.as_str()), kind, provenance];
                format!("turn: {}", words.into_iter().flatten().collect::<Vec<_>>().join(", "))
            }
        };
        if turn.is_some() && !self.is_whole {
            what.push_str(" (it has no newline yet)");
        }
        let (line_type, what) = (harmless(self.type_name()), harmless(&what));
        writeln!(out, "{:>7} {:>11}  {line_type:<10}  {what}", self.line, self.offset)?;
        for line in turn.filter(|_| with_text).into_iter().flat_map(|turn| turn.text.lines()) {
            writeln!(out, "{:>22}| {}", "", harmless(line))?;
        }
        Ok(())
    }

    fn json(&self, with_text: bool) -> Value {
        let mut object = Map::new();
        let mut put = |name: &str, value: Value| object.insert(name.to_owned(), value);
        put("line", self.line.into());
        put("offset", self.offset.into());
        put("type", self.type_name().into());
        if !self.is_whole {
            put("has_newline", false.into());
        }
        let unknowns = self
            .unknowns()
            .iter()
            .map(|Unknown { field, value, version }| json!({"field": field, "value": value, "version": version}));
        let unknowns: Vec<Value> = unknowns.collect();
        if !unknowns.is_empty() {
            put("unknown", unknowns.into());
        }
        let turn = match &self.outcome {
            Outcome::Unreadable(message) => {
                put("unreadable", message.as_str().into());
                return object.into();
            }
            Outcome::Read(meaning) => meaning.turn.as_ref(),
        };
        let Some(turn) = turn else {
            put("reason", self.reason().into());
            return object.into();
        };
        put("actor", turn.actor.as_str().into());
        if let (Some(kind), Some(provenance)) = (turn.kind, turn.provenance) {
            put("kind", kind.as_str().into());
            put("provenance", provenance.as_str().into());
        }
        put("turn_uuid", turn.uuid.as_deref().into());
        put("text_bytes", turn.text.len().into());
        if with_text {
            put("text", turn.text.as_str().into());
        }
        object.into()
    }
}

/// What a file says, without the power to steer a terminal or to turn the direction of writing.
fn harmless(text: &str) -> String {
    let is_harmful = |c: char| {
        c != '\t' && c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c) || ('\u{2066}'..='\u{2069}').contains(&c)
    };
    text.chars().map(|c| if is_harmful(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}
