//! What a line of a Claude Code transcript means: a turn, something about its session, nothing, or damage.
//!
//! Pure functions over bytes: no files, no clock, no memory from one line to the next. Claude Code calls the format of
//! these lines internal and changes it between versions, so reading is lenient: **a JSON object is never bad**, whatever
//! its fields are; only what is no JSON object is a [`BadLine`], and [`salvage`](super::repair::salvage) finds what is still whole on it.
//!
//! # What is a turn
//!
//! * A `user` line, or an `attachment` line with a prompt that was typed while the agent worked, where a person said it:
//!   [`provenance`](super::provenance) judges that.
//! * An `assistant` line with text. A message has no two of them, so lines need no grouping.
//! * Never a sub-agent's line, nor a nested message inside another line (`progress` lines hold whole ones).
//!
//! A prompt that versions below 2.1.97 queued and then sent in the middle of a turn is only found in `queue-operation`
//! lines, which can't be told from prompts that come again as `user` lines; it is no turn here.
//!
//! # Text
//!
//! Kept whole, neither trimmed nor cut. What Postgres can't store is mended (see [`Turn::is_repaired`]).

use std::borrow::Cow;
use std::path::{Component, Path};

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_128;

use super::fields::{Content, Fields, Mender, is_something, joined};
pub(crate) use super::provenance::{NoTurn, Provenance, TurnKind};
use super::provenance::{judge, trim, version};
use crate::event::EventId;
use crate::json::{self, pick};
use crate::session::{Agent, event_id_of_turn, iso_8601, known};
use crate::transcript::{Actor, NAME_BYTES_MAX, UNKNOWN_TYPE, shortened};
pub(crate) use crate::transcript::{BadLine, TranscriptKind, Unknown};

/// Tells what kind of transcript lies at `relative`, a path below the projects folder; `None` for anything else.
pub(crate) fn classify(relative: &Path) -> Option<TranscriptKind> {
    let mut folders = relative
        .components()
        .map(|component| match component {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect::<Option<Vec<_>>>()?;
    let stem = folders.pop()?.to_str()?.strip_suffix(".jsonl")?;
    let is_agent = stem.strip_prefix("agent-").is_some_and(|id| !id.is_empty());
    match folders.as_slice() {
        [_project] if is_agent => Some(TranscriptKind::SubAgent),
        [_project] => Some(TranscriptKind::Main { session: session_of_stem(stem)? }),
        [_project, session, subagents, ..] if is_agent && *subagents == "subagents" => {
            session_of_stem(session.to_str()?)?;
            Some(TranscriptKind::SubAgent)
        }
        _ => None,
    }
}

/// Only the form with hyphens: other spellings of a UUID are names somebody else gave.
fn session_of_stem(stem: &str) -> Option<Uuid> {
    if stem.len() == uuid::fmt::Hyphenated::LENGTH { stem.parse().ok() } else { None }
}

/// What one line says.
#[derive(Clone, PartialEq, Default, Debug)]
pub(crate) struct LineMeaning {
    pub line_type: LineType,
    /// Whether it belongs to the conversation. Other lines are state that Claude Code writes again whenever a session is
    /// merely opened: they are no activity.
    pub is_envelope: bool,
    /// The session in which it was said, by the line itself. Not always the file's: some copies start with another
    /// session's lines.
    pub said_in: Option<Uuid>,
    /// When it happened. Lines are not in this order.
    pub timestamp: Option<Timestamp>,
    /// The working directory at that moment; it changes within a session.
    pub cwd: Option<String>,
    pub git_branch: Option<String>,
    /// Whether the line says itself that it was copied from another session (`forkedFrom`).
    pub is_forked: bool,
    pub turn: Option<Turn>,
    /// Why a line of the user's side, or of the agent's, is no turn; `None` for turns and for all other lines.
    pub no_turn: Option<NoTurn>,
    /// What it has that the format did not have when this was written.
    pub unknowns: Vec<Unknown>,
}

impl LineMeaning {
    /// Name of a type that this program does not know: at most [`UNKNOWN_CHARS_MAX`] characters; [`NO_TYPE`] where there
    /// is none.
    pub(crate) fn unknown_type(&self) -> Option<&str> {
        let unknown = self.unknowns.iter().find(|unknown| unknown.field == UNKNOWN_TYPE)?;
        Some(&unknown.value)
    }
}

/// Stands for the type of an object without one.
pub(crate) const NO_TYPE: &str = "none";

/// The families of lines.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub(crate) enum LineType {
    User,
    Assistant,
    System,
    Attachment,
    Progress,
    /// State of the program rather than something said or done; see [`METADATA_TYPES`].
    Metadata,
    Unknown,
    /// Nothing but blanks.
    #[default]
    Blank,
}

/// The known types of lines outside the conversation.
pub(crate) const METADATA_TYPES: &[&str] = &[
    "agent-color",
    "agent-name",
    "agent-setting",
    "ai-title",
    "api-request",
    "api-request-blob",
    "api-request-shape",
    "artifact-autoreact-ledger",
    "artifact-comment-monitor",
    "atis-latch",
    "attribution-snapshot",
    "auto-mode-denial",
    "bridge-session",
    "content-replacement",
    "continued-in",
    "conversation_reset",
    "cost-state",
    "custom-title",
    "ended",
    "file-history-delta",
    "file-history-snapshot",
    "fork-context-ref",
    "frame-link",
    "isolation-latch",
    "last-prompt",
    "mode",
    "permission-mode",
    "pr-link",
    "queue-operation",
    "relocated",
    "result",
    "rewind-pointer",
    "started",
    "summary",
    "tag",
    "tools-used",
    "workflow-cancelled",
    "workflow-complete",
    "workflow-error",
    "workflow-progress",
    "workflow-start",
    "worktree-state",
];

impl LineType {
    pub(super) fn named(name: &str) -> Self {
        match name {
            "user" => LineType::User,
            "assistant" => LineType::Assistant,
            "system" => LineType::System,
            "attachment" => LineType::Attachment,
            "progress" => LineType::Progress,
            _ if METADATA_TYPES.contains(&name) => LineType::Metadata,
            _ => LineType::Unknown,
        }
    }
}

/// Something that was said, by the human or by the agent.
#[derive(Clone, PartialEq, Default, Debug)]
pub(crate) struct Turn {
    /// The line's `uuid`, or that of the line it was copied from: the same in every copy of a session. `None`: only its
    /// place identifies it, see [`turn_event_id`].
    pub uuid: Option<String>,
    /// The session in which it was first said, by the line itself: the one it was copied from, else the one it names.
    pub said_in: Option<Uuid>,
    pub actor: Actor,
    /// How the human said it; `None` for the agent.
    pub kind: Option<TurnKind>,
    /// How well it is known that a person said it; `None` for the agent.
    pub provenance: Option<Provenance>,
    pub text: String,
    pub timestamp: Option<Timestamp>,
    /// The API's message for the agent, the program's prompt for the human (versions from 2.1.76 on).
    pub message_id: Option<String>,
    pub cwd: Option<String>,
    pub git_branch: Option<String>,
    /// Whether the agent's answer ends here. `None`: unknown (versions below 2.1.60), or a human's turn.
    pub is_final: Option<bool>,
    pub model: Option<String>,
    /// An image or document came with it.
    pub has_attachment: bool,
    /// Whether something in it, or bytes anywhere on its line, could not be kept as they were: lone surrogates, U+0000
    /// and invalid UTF-8 are U+FFFD now, NUL bytes are gone.
    pub is_repaired: bool,
}

/// Reads one complete line, given without its newline, of a transcript of the given kind.
///
/// A line of nothing but blanks means nothing and is not bad; one of nothing but NULs is.
pub(crate) fn read_line(line: &[u8], kind: &TranscriptKind) -> Result<LineMeaning, BadLine> {
    let mended = MendedLine::new(line)?;
    let text = mended.text.as_ref();
    if !text.trim_ascii_start().starts_with('{') {
        return not_an_object(&mended);
    }
    let fields = Fields::of(text).map_err(|error| bad_json(&error))?;
    let mut mender = Mender { is_mended: mended.is_mended };

    let type_name = mender.string(fields.get("type"));
    let line_type = type_name.as_deref().map_or(LineType::Unknown, LineType::named);
    let is_envelope = is_envelope(&fields, line_type);
    let timestamp = mender.string(fields.get("timestamp")).and_then(|text| text.parse::<Timestamp>().ok());
    let cwd = mender.filled_string(fields.get("cwd")).filter(|path| path.len() <= NAME_BYTES_MAX);
    let git_branch = mender.filled_string(fields.get("gitBranch")).filter(|name| name.len() <= NAME_BYTES_MAX);
    let session = mender.string(fields.get("sessionId")).and_then(|text| text.parse::<Uuid>().ok());
    let said_in = forked_from(&fields, &mut mender).or(session);

    let mut unknowns = Vec::new();
    let turn = match (kind, line_type) {
        (TranscriptKind::Main { .. }, LineType::User | LineType::Attachment) => {
            Some(user_turn(&fields, line_type == LineType::Attachment, &mut mender, &mut unknowns))
        }
        (TranscriptKind::Main { .. }, LineType::Assistant) => Some(agent_turn(&fields, &mut mender)),
        _ => None,
    };
    let (turn, no_turn) = match turn.transpose() {
        Ok(turn) => (turn, None),
        Err(no_turn) => (None, Some(no_turn)),
    };
    let turn = turn.map(|turn| Turn {
        uuid: turn_uuid(&fields, &mut mender),
        said_in,
        timestamp,
        cwd: cwd.clone(),
        git_branch: git_branch.clone(),
        is_repaired: mender.is_mended,
        ..turn
    });
    if line_type == LineType::Unknown {
        let value = shortened(type_name.as_deref().unwrap_or(NO_TYPE));
        unknowns.push(Unknown { field: UNKNOWN_TYPE, value, version: version(&fields, &mut mender) });
    }
    Ok(LineMeaning {
        line_type,
        is_envelope,
        said_in,
        timestamp,
        cwd,
        git_branch,
        is_forked: fields.get("forkedFrom").is_some(),
        turn,
        no_turn,
        unknowns,
    })
}

/// A line's bytes as text that can be parsed.
pub(super) struct MendedLine<'a> {
    pub(super) text: Cow<'a, str>,
    is_mended: bool,
}

/// Places of a line that are not UTF-8 and are mended. A line with more was no text, and mended it would take three times
/// its memory.
const MENDED_PLACES_MAX: usize = 1 << 20;

impl<'a> MendedLine<'a> {
    pub(super) fn new(line: &'a [u8]) -> Result<Self, BadLine> {
        let line = json::without_byte_order_mark(line);
        let places = |bytes: &[u8]| bytes.utf8_chunks().filter(|chunk| !chunk.invalid().is_empty()).count();
        let mended = |bytes: &[u8]| {
            if places(bytes) > MENDED_PLACES_MAX {
                let message = format!("no text: more than {MENDED_PLACES_MAX} places that are not UTF-8, at column 1");
                return Err(BadLine { message });
            }
            Ok(String::from_utf8_lossy(bytes).into_owned())
        };
        if memchr::memchr(0, line).is_some() {
            let stripped = line.iter().copied().filter(|byte| *byte != 0).collect::<Vec<_>>();
            let text = String::from_utf8(stripped).or_else(|error| mended(error.as_bytes()))?;
            return Ok(MendedLine { text: Cow::Owned(text), is_mended: true });
        }
        match std::str::from_utf8(line) {
            Ok(text) => Ok(MendedLine { text: Cow::Borrowed(text), is_mended: false }),
            Err(_) => Ok(MendedLine { text: Cow::Owned(mended(line)?), is_mended: true }),
        }
    }
}

fn not_an_object(line: &MendedLine<'_>) -> Result<LineMeaning, BadLine> {
    let text = line.text.trim_ascii_start();
    if !text.is_empty() {
        let column = line.text.len() - text.len() + 1;
        return Err(BadLine { message: format!("no JSON object: does not begin with a brace, at column {column}") });
    }
    if line.is_mended {
        return Err(BadLine { message: "no JSON object: nothing but NUL bytes, at column 1".into() });
    }
    Ok(LineMeaning::default())
}

/// Syntax errors of serde_json name what was expected and where, nothing of the text.
fn bad_json(error: &serde_json::Error) -> BadLine {
    let place = format!(" at line {} column {}", error.line(), error.column());
    let message = error.to_string();
    let cause = message.strip_suffix(&place).unwrap_or("malformed");
    BadLine { message: format!("no JSON object: {cause}, at column {}", error.column()) }
}

/// Whether a line of this type with these fields belongs to the conversation.
pub(super) fn is_envelope(fields: &Fields<'_>, line_type: LineType) -> bool {
    match line_type {
        LineType::User | LineType::Assistant | LineType::System | LineType::Attachment | LineType::Progress => true,
        LineType::Metadata | LineType::Blank => false,
        // What newer versions add to the conversation is stamped and has an identity.
        LineType::Unknown => fields.get("uuid").is_some() && fields.get("timestamp").is_some(),
    }
}

/// The part of a turn that depends on the type of its line, as [`agent_turn`].
fn user_turn(
    fields: &Fields<'_>,
    is_attachment: bool,
    mender: &mut Mender,
    unknowns: &mut Vec<Unknown>,
) -> Result<Turn, NoTurn> {
    let human = judge(fields, is_attachment, mender, unknowns)?;
    Ok(Turn {
        actor: Actor::User,
        kind: Some(human.kind),
        provenance: Some(human.provenance),
        text: human.text,
        message_id: mender.filled_string(fields.get("promptId")),
        has_attachment: human.has_attachment,
        ..Turn::default()
    })
}

/// The model's name on lines that the program made: API errors and the like.
const SYNTHETIC_MODEL: &str = "<synthetic>";

fn agent_turn(fields: &Fields<'_>, mender: &mut Mender) -> Result<Turn, NoTurn> {
    if is_something(fields.get("isSidechain")) {
        return Err(NoTurn::because("isSidechain"));
    }
    let [content, id, model, stop_reason] = pick(fields.get("message"), ["content", "id", "model", "stop_reason"]);
    let model = mender.filled_string(model);
    if is_something(fields.get("isApiErrorMessage")) || model.as_deref() == Some(SYNTHETIC_MODEL) {
        return Err(NoTurn::because("words_of_the_program"));
    }
    let content = Content::of(content, mender, |_| None);
    let has_attachment = content.has_attachment;
    let text = joined(content.texts);
    if trim(&text).is_empty() {
        return Err(NoTurn::because("no_text"));
    }
    let is_final = mender
        .string(stop_reason)
        .map(|reason| matches!(reason.as_ref(), "end_turn" | "stop_sequence" | "max_tokens" | "refusal"));
    Ok(Turn {
        actor: Actor::Agent,
        text,
        message_id: mender.filled_string(id),
        is_final,
        model,
        has_attachment,
        ..Turn::default()
    })
}

fn turn_uuid(fields: &Fields<'_>, mender: &mut Mender) -> Option<String> {
    let [copied_from] = pick(fields.get("forkedFrom"), ["messageUuid"]);
    // A queued prompt may come again as a `user` line with the uuid that it names.
    let [queued_as] = pick(fields.get("attachment"), ["source_uuid"]);
    mender
        .filled_string(copied_from)
        .or_else(|| mender.filled_string(queued_as))
        .or_else(|| mender.filled_string(fields.get("uuid")))
}

fn forked_from(fields: &Fields<'_>, mender: &mut Mender) -> Option<Uuid> {
    let [session] = pick(fields.get("forkedFrom"), ["sessionId"]);
    mender.string(session)?.parse().ok()
}

/// Whether the object `record` is a line rather than a part of one: of a known type, and placed in a session unless its
/// type is one that isn't.
pub(super) fn looks_like_a_line(record: &[u8]) -> bool {
    let Ok(mended) = MendedLine::new(record) else { return false };
    let Ok(fields) = Fields::of(&mended.text) else { return false };
    let mut mender = Mender { is_mended: false };
    match mender.string(fields.get("type")).as_deref().map(LineType::named) {
        Some(LineType::Metadata) => true,
        Some(LineType::Unknown) | None => fields.get("sessionId").is_some(),
        Some(_) => {
            fields.get("sessionId").is_some() || fields.get("parentUuid").is_some() || fields.get("cwd").is_some()
        }
    }
}

impl Turn {
    /// The payload of `turn_detected`, as its schema has it: what is not known is left out, except that `is_final` of an
    /// agent's turn is null then. `has_attachment` is there only when true.
    ///
    /// `session` is the file's, told where the line names none, `project_path` its project's;
    /// `otherwise` is the time to be told where the line has none.
    pub(crate) fn payload(self, session: Uuid, project_path: Option<&str>, otherwise: Timestamp) -> Map<String, Value> {
        let text = |text: Option<String>| text.map(Value::from);
        known([
            ("agent", Some(Agent::ClaudeCode.as_str().into())),
            ("session_uuid", Some(self.said_in.unwrap_or(session).to_string().into())),
            ("actor", Some(self.actor.as_str().into())),
            ("text", Some(self.text.into())),
            ("source", Some("polling".into())),
            ("turn_timestamp", Some(iso_8601(self.timestamp.unwrap_or(otherwise)).into())),
            ("turn_uuid", text(self.uuid)),
            ("message_id", text(self.message_id)),
            ("kind", self.kind.map(|kind| kind.as_str().into())),
            ("provenance", self.provenance.map(|provenance| provenance.as_str().into())),
            ("project_path", project_path.map(Value::from)),
            ("working_directory", text(self.cwd)),
            ("git_branch", text(self.git_branch)),
            ("is_final", (self.actor == Actor::Agent).then(|| self.is_final.into())),
            ("model", text(self.model)),
            ("has_attachment", self.has_attachment.then(|| true.into())),
            ("metadata", self.is_repaired.then(|| json!({"repaired": true}))),
        ])
    }
}

/// The identity of a turn, the same wherever and whenever the turn is read: by the line's own uuid, which copies of a
/// session share; without one by session, place and content. `line` begins at byte `offset` of the session's file.
pub(crate) fn turn_event_id(turn: &Turn, session: Uuid, offset: u64, line: &[u8]) -> EventId {
    match &turn.uuid {
        Some(uuid) => event_id_of_turn(uuid),
        None => EventId::derived(format!("turn/{session}/{offset}/{:032x}", xxh3_128(line)).as_bytes()),
    }
}

#[cfg(test)]
mod tests;
