//! What `explain` shows of a line.

use super::line::{self, BadLine, LineMeaning, LineType, TranscriptKind};
use super::repair;
use crate::transcript::{Explained, ExplainedTurn};

/// What stands on a line, with the places where it begins: itself, or the whole records of a damaged one and what lies
/// between them. `is_whole`: the line has its newline.
pub(crate) fn explain(text: &[u8], kind: &TranscriptKind, is_whole: bool) -> Vec<(usize, Result<Explained, BadLine>)> {
    match line::read_line(text, kind) {
        Ok(meaning) => vec![(0, Ok(explained(meaning)))],
        Err(bad) if !is_whole => vec![(0, Err(bad))],
        Err(bad) => {
            let found = repair::read_damaged(text, kind, &bad);
            found.map(|(range, record)| (range.start, record.map(explained))).collect()
        }
    }
}

fn explained(meaning: LineMeaning) -> Explained {
    let line_type = match meaning.line_type {
        LineType::User => "user",
        LineType::Assistant => "assistant",
        LineType::System => "system",
        LineType::Attachment => "attachment",
        LineType::Progress => "progress",
        LineType::Metadata => "state",
        LineType::Unknown => meaning.unknown_type().unwrap_or(line::NO_TYPE),
        LineType::Blank => "blank",
    };
    let of_its_type = match meaning.line_type {
        LineType::Metadata => "state",
        LineType::Unknown => "unknown type",
        LineType::User | LineType::Assistant | LineType::Attachment => "in a sub-agent's transcript",
        LineType::System | LineType::Progress | LineType::Blank => "nothing said",
    };
    let line_type = line_type.to_owned();
    let reason = meaning.no_turn.as_ref().map_or_else(|| of_its_type.to_owned(), ToString::to_string);
    let turn = meaning.turn.map(|turn| ExplainedTurn {
        actor: turn.actor.as_str(),
        kind: turn.kind.map(line::TurnKind::as_str),
        provenance: turn.provenance.map(line::Provenance::as_str),
        uuid: turn.uuid,
        text: turn.text,
    });
    Explained { line_type, turn: turn.ok_or(reason), unknowns: meaning.unknowns }
}
