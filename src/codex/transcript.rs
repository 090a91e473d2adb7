//! From the lines of one rollout to events: the one way that the follower and `verify` both go.

use std::borrow::Cow;
use std::path::Path;

use serde_json::{Value, json};

use super::line::type_of;
use super::rollout::{Reading, Rollout, Said};
use crate::event::{Candidate, Cursor, ForeignKeys};
use crate::json::without_byte_order_mark;
use crate::session::{Agent, LineTime, event_id_of_turn, iso_8601, known};
use crate::transcript::{
    Actor, BadLine, Explained, ExplainedTurn, Found, LineReport, SessionLine, Source, TranscriptKind, UNKNOWN_TYPE,
    Unknown,
};

/// How a line begins. Behind a line that a crash cut off the next one stands on the same line.
const LINE_START: &[u8] = b"{\"timestamp\":\"";

/// Tells whether a rollout lies at `relative`, a path below one of Codex's folders: `rollout-<time>-<thread>.jsonl`, in
/// whatever folder, compressed or not; behind the thread may stand `_<rollout>`.
pub(crate) fn classify(relative: &Path) -> Option<TranscriptKind> {
    let name = relative.file_name()?.to_str()?.strip_prefix("rollout-")?;
    let stem = name.strip_suffix(".zst").unwrap_or(name).strip_suffix(".jsonl")?;
    let stem = stem.split_once('_').map_or(stem, |(thread, _)| thread);
    let thread = stem.get(stem.len().checked_sub(uuid::fmt::Hyphenated::LENGTH)?..)?;
    Some(TranscriptKind::Main { session: thread.parse().ok()? })
}

/// Whether this is one JSON object.
pub(crate) fn is_record(line: &[u8]) -> bool {
    read_text(&mut Rollout::default(), line).is_ok()
}

/// Reads one line, as [`Source::read`].
pub(crate) fn read(
    source: &Source,
    line: &[u8],
    offset: u64,
    cursor: &mut Cursor,
    rollout: &mut Rollout,
    found: &mut impl FnMut(Found),
) -> LineReport {
    let mut report = LineReport::default();
    if let Err(bad) = take(source, line, offset, cursor, rollout, &mut report, found) {
        let whole = memchr::memmem::rfind(line, LINE_START).filter(|at| *at > 0);
        let (lost, whole) = line.split_at(whole.unwrap_or(line.len()));
        let at = offset + lost.len() as u64;
        found(Found::Unreadable(source.unreadable(lost, offset, &bad)));
        if !whole.is_empty()
            && let Err(bad) = take(source, whole, at, cursor, rollout, &mut report, found)
        {
            found(Found::Unreadable(source.unreadable(whole, at, &bad)));
        }
        report.bad = Some(bad);
    }
    report
}

fn read_text(rollout: &mut Rollout, line: &[u8]) -> Result<Reading, BadLine> {
    let text: Cow<'_, str> = String::from_utf8_lossy(without_byte_order_mark(line));
    rollout.read(&text).map_err(|error| BadLine { message: format!("no JSON object: {error}") })
}

/// What `explain` shows of a line: each turn that it led to, or why it is none.
pub(crate) fn explain(line: &[u8], rollout: &mut Rollout) -> Result<Vec<Explained>, BadLine> {
    let reading = read_text(rollout, line)?;
    let line_type = type_of(&String::from_utf8_lossy(line));
    let unknowns: Vec<Unknown> = reading.unknown.map(|unknown| unknown_of(unknown, rollout)).into_iter().collect();
    let of_its_type = match &*line_type {
        _ if rollout.session().is_none() => "in a sub-agent's transcript, or in none",
        "response_item/message" => "the model's own input and output: it counts where nothing else tells of it",
        _ if unknowns.iter().any(|unknown| unknown.field == UNKNOWN_TYPE) => "unknown type",
        _ => "nothing said",
    };
    let reason = reading.no_turn.unwrap_or(of_its_type).to_owned();
    let explained = |turn| Explained { line_type: line_type.clone(), turn, unknowns: unknowns.clone() };
    if reading.said.is_empty() {
        return Ok(vec![explained(Err(reason))]);
    }
    let turn = |said: Said| ExplainedTurn {
        actor: said.message.actor.as_str(),
        kind: said.kind,
        provenance: said.provenance,
        uuid: Some(said.uuid.to_string()),
        text: said.message.text,
    };
    Ok(reading.said.into_iter().map(|said| explained(Ok(turn(said)))).collect())
}

fn unknown_of((field, value): (&'static str, String), rollout: &Rollout) -> Unknown {
    Unknown { field, value, version: rollout.version.clone().unwrap_or_default() }
}

/// The session's end before a pause, its registration, and what was said; in this order.
fn take(
    source: &Source,
    line: &[u8],
    offset: u64,
    cursor: &mut Cursor,
    rollout: &mut Rollout,
    report: &mut LineReport,
    found: &mut impl FnMut(Found),
) -> Result<(), BadLine> {
    let reading = read_text(rollout, line)?;
    report.unknowns.extend(reading.unknown.map(|unknown| unknown_of(unknown, rollout)));
    if let Some(no_turn) = reading.no_turn {
        found(Found::NoTurn(no_turn));
    }
    let Some(session) = rollout.session() else { return Ok(()) };
    let at = reading.at.map(|at| source.not_in_future(at));
    let time = at.map(|at| LineTime { at, is_envelope: reading.is_activity, is_inherited: false });
    let said = SessionLine {
        is_envelope: reading.is_activity,
        cwd: rollout.cwd.as_deref(),
        git_branch: rollout.git_branch.as_deref(),
    };
    let Cursor { project_path, session: state, .. } = cursor;
    let told = source.note_session(session, said, time, project_path, state, &|| source.origin(offset));
    told.into_iter().flatten().for_each(|candidate| found(Found::Event(candidate)));
    for said in reading.said {
        found(Found::Event(turn(source, said, offset, cursor, rollout)));
    }
    Ok(())
}

fn turn(source: &Source, said: Said, offset: u64, cursor: &Cursor, rollout: &Rollout) -> Candidate {
    let timestamp = said.timestamp.unwrap_or(source.active_max);
    let text = |text: Option<String>| text.map(Value::from);
    let (uuid, message) = (said.uuid.to_string(), said.message);
    Candidate {
        id: event_id_of_turn(&uuid),
        event_type: "turn_detected".to_owned(),
        timestamp,
        refs: ForeignKeys::default(),
        origin: source.origin(offset),
        payload: known([
            ("agent", Some(Agent::CodexCli.as_str().into())),
            ("session_uuid", Some(said.thread.to_string().into())),
            ("actor", Some(message.actor.as_str().into())),
            ("text", Some(message.text.into())),
            ("source", Some("polling".into())),
            ("turn_timestamp", Some(iso_8601(timestamp).into())),
            ("turn_uuid", Some(uuid.into())),
            ("message_id", text(message.message_id)),
            ("kind", said.kind.map(Value::from)),
            ("provenance", said.provenance.map(Value::from)),
            ("project_path", cursor.project_path.as_deref().map(Value::from)),
            ("working_directory", text(said.cwd)),
            ("git_branch", rollout.git_branch.as_deref().map(Value::from)),
            ("is_final", (message.actor == Actor::Agent).then(|| message.is_final.into())),
            ("model", text(said.model)),
            ("has_attachment", message.has_attachment.then(|| true.into())),
            ("metadata", message.is_repaired.then(|| json!({"repaired": true}))),
        ]),
    }
}
