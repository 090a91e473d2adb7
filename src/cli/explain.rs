//! `explain`: for each line of a transcript, whether it is a turn, or why not. Reads one file and nothing else.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::agent::{Agent, Memory};
use crate::intake::transcripts::compressed::{is_compressed, unpacked};
use crate::telemetry::{UnknownFormat, UnknownFormats};
use crate::transcript::{BadLine, Explained, ExplainedTurn, TranscriptKind, Unknown};

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
    Read(Explained),
    Unreadable(String),
}

pub(super) fn explain(context: &Context, arguments: &ExplainArguments) -> Result<Exit, Failure> {
    let (path, only) = place(&arguments.place);
    let failed = |error: io::Error| {
        let exit = if error.kind() == io::ErrorKind::NotFound { Exit::Data } else { Exit::Io };
        Failure::new(exit, format!("could not read {}: {error}", path.display()))
    };
    let file = File::open(&path).map_err(failed)?;
    let file = if is_compressed(&path) { unpacked(file).map_err(failed)? } else { file };
    let (agent, kind) = kind_of(&path);
    let mut memory = Memory::default();
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
        if is_too_long || !text.trim_ascii().is_empty() {
            let mut records = if is_too_long {
                vec![unreadable(number, offset, format!("{length} bytes, more than file_watcher.max_line_bytes"))]
            } else {
                let explained = agent.explain(text, &kind, is_whole, &mut memory).into_iter();
                explained.map(|(at, outcome)| Record::of(number, offset + at as u64, outcome, is_whole)).collect()
            };
            if only.is_some_and(|only| only != number) {
                records.clear();
            }
            is_found |= !records.is_empty();
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
        writeln!(out, "unknown to this version: {field} \"{value}\" on {lines} (version \"{version}\")")?;
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
fn kind_of(path: &Path) -> (Agent, TranscriptKind) {
    let agent = Agent::of_transcript(path).unwrap_or(Agent::ClaudeCode);
    let kind = agent.classify(&Path::new("project").join(path.file_name().unwrap_or_default()));
    (agent, kind.unwrap_or(TranscriptKind::Main { session: Uuid::nil() }))
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

impl Record {
    fn of(line: u64, offset: u64, outcome: Result<Explained, BadLine>, is_whole: bool) -> Record {
        let outcome = match outcome {
            Ok(explained) => Outcome::Read(explained),
            Err(_) if !is_whole => Outcome::Unreadable("incomplete: it has no newline yet".to_owned()),
            Err(bad) => Outcome::Unreadable(bad.message),
        };
        Record { line, offset, is_whole, outcome }
    }

    fn unknowns(&self) -> &[Unknown] {
        match &self.outcome {
            Outcome::Read(explained) => &explained.unknowns,
            Outcome::Unreadable(_) => &[],
        }
    }

    fn type_name(&self) -> &str {
        match &self.outcome {
            Outcome::Read(explained) => &explained.line_type,
            Outcome::Unreadable(_) => "-",
        }
    }

    /// The turn, or why it is none.
    fn turn(&self) -> Result<&ExplainedTurn, &str> {
        match &self.outcome {
            Outcome::Read(explained) => explained.turn.as_ref().map_err(String::as_str),
            Outcome::Unreadable(message) => Err(message),
        }
    }

    fn write(&self, out: &mut impl Write, with_text: bool) -> io::Result<()> {
        let turn = self.turn();
        let mut what = match turn {
            Err(reason) => format!("no turn: {reason}"),
            Ok(turn) => {
                let words = [Some(turn.actor), turn.kind, turn.provenance];
                format!("turn: {}", words.into_iter().flatten().collect::<Vec<_>>().join(", "))
            }
        };
        if turn.is_ok() && !self.is_whole {
            what.push_str(" (it has no newline yet)");
        }
        let (line_type, what) = (harmless(self.type_name()), harmless(&what));
        writeln!(out, "{:>7} {:>11}  {line_type:<10}  {what}", self.line, self.offset)?;
        for line in turn.ok().filter(|_| with_text).into_iter().flat_map(|turn| turn.text.lines()) {
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
        if let Outcome::Unreadable(message) = &self.outcome {
            put("unreadable", message.as_str().into());
            return object.into();
        }
        let turn = match self.turn() {
            Ok(turn) => turn,
            Err(reason) => {
                put("reason", reason.into());
                return object.into();
            }
        };
        put("actor", turn.actor.into());
        if let (Some(kind), Some(provenance)) = (turn.kind, turn.provenance) {
            put("kind", kind.into());
            put("provenance", provenance.into());
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
