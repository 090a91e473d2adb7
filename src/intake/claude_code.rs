//! What a line of a Claude Code transcript means: a turn, something about its session, nothing, or damage.
//!
//! Pure functions over bytes: no files, no clock, no memory from one line to the next. Claude Code calls the format of
//! these lines internal and changes it between versions, so reading is lenient: **a JSON object is never bad**, whatever
//! its fields are; only what is no JSON object is a [`BadLine`], and [`salvage`] finds what is still whole on it.
//!
//! # What is a turn
//!
//! * A `user` line that a human typed: about one in fifteen, the others carry tool results, notifications, reminders and
//!   output of local commands. Slash commands and `!` shell lines are turns of a kind of their own.
//! * An `attachment` line with a prompt that was typed while the agent worked; it has no `user` line.
//! * An `assistant` line with text. A message has no two of them, so lines need no grouping.
//! * Never a sub-agent's line, nor a nested message inside another line (`progress` lines hold whole ones).
//!
//! A prompt that versions below 2.1.97 queued and then sent in the middle of a turn is only found in `queue-operation`
//! lines, which can't be told from prompts that come again as `user` lines; it is no turn here.
//!
//! # Text
//!
//! Kept whole, neither trimmed nor cut, except for blocks that an editor put before it and the tags of commands. What
//! Postgres can't store is mended (see [`Turn::is_repaired`]).

use std::borrow::Cow;
use std::path::{Component, Path};

use jiff::Timestamp;
use serde_json::{Map, Value};
use thiserror::Error;
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_128;

use super::json::{self, items, members};
pub use super::salvage::{Segment, salvage};
use crate::event::EventId;

/// What the place of a file below the projects folder says about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TranscriptKind {
    /// `<project>/<session>.jsonl`: the transcript of a session, whose identity is the file's stem.
    Main { session: Uuid },
    /// `<project>/agent-*.jsonl` or `<project>/<session>/subagents/**/agent-*.jsonl`: its lines are no turns.
    SubAgent,
}

/// Tells what kind of transcript lies at `relative`, a path below the projects folder; `None` for anything else.
pub fn classify(relative: &Path) -> Option<TranscriptKind> {
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
#[derive(Clone, PartialEq, Debug)]
pub struct LineMeaning {
    pub line_type: LineType,
    /// Name of a type that this program does not know, to be counted: at most [`UNKNOWN_TYPE_CHARS_MAX`] characters;
    /// [`NO_TYPE`] where there is none.
    pub unknown_type: Option<String>,
    /// Whether it belongs to the conversation. Other lines are state that Claude Code writes again whenever a session is
    /// merely opened: they are no activity.
    pub is_envelope: bool,
    /// The session named on the line. Not always the file's: copies of an old kind start with another session's lines.
    pub session: Option<Uuid>,
    /// When it happened. Lines are not in this order.
    pub timestamp: Option<Timestamp>,
    /// The working directory at that moment; it changes within a session.
    pub cwd: Option<String>,
    pub git_branch: Option<String>,
    /// Whether the line says itself that it was copied from another session (`forkedFrom`).
    pub is_forked: bool,
    pub turn: Option<Turn>,
    /// Whether bytes of the line were mended: NULs taken out, or invalid UTF-8 replaced.
    pub repaired: bool,
}

/// Stands for the type of an object without one.
pub const NO_TYPE: &str = "none";

/// Longest `cwd` and `gitBranch`: no system has longer paths (Linux's PATH_MAX), and the path goes into every turn.
const FOLDER_BYTES_MAX: usize = 4096;

/// Longest name of an unknown type that is passed on.
pub const UNKNOWN_TYPE_CHARS_MAX: usize = 64;

/// The families of lines.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum LineType {
    User,
    Assistant,
    System,
    Attachment,
    Progress,
    /// State of the program rather than something said or done; see [`METADATA_TYPES`].
    Metadata,
    Unknown,
    /// Nothing but blanks.
    Blank,
}

/// The known types of lines outside the conversation.
pub const METADATA_TYPES: &[&str] = &[
    "agent-name",
    "ai-title",
    "bridge-session",
    "content-replacement",
    "custom-title",
    "file-history-delta",
    "file-history-snapshot",
    "fork-context-ref",
    "frame-link",
    "last-prompt",
    "mode",
    "permission-mode",
    "pr-link",
    "queue-operation",
    "result",
    "started",
    "summary",
    "tag",
    "worktree-state",
];

impl LineType {
    fn named(name: &str) -> Self {
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
#[derive(Clone, PartialEq, Debug)]
pub struct Turn {
    pub identity: TurnIdentity,
    /// The session in which it was first said, by the line itself: the one it was copied from, else the one it names.
    pub said_in: Option<Uuid>,
    pub actor: Actor,
    /// How the human said it; `None` for the agent.
    pub kind: Option<TurnKind>,
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

/// By what a turn is known again.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TurnIdentity {
    /// The line's `uuid`, or that of the line it was copied from. The same in every copy of a session.
    Uuid(String),
    /// Only its place tells it: see [`turn_event_id`].
    None,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Actor {
    User,
    Agent,
}

impl Actor {
    pub fn as_str(self) -> &'static str {
        match self {
            Actor::User => "user",
            Actor::Agent => "agent",
        }
    }
}

/// How a human's turn came about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TurnKind {
    Prompt,
    /// A slash command; the text is its name and its arguments.
    Command,
    /// A prompt typed while the agent worked.
    Queued,
    /// A prompt made from an approved plan.
    Plan,
    /// A shell command typed behind `!`.
    Shell,
}

impl TurnKind {
    pub fn as_str(self) -> &'static str {
        match self {
            TurnKind::Prompt => "prompt",
            TurnKind::Command => "command",
            TurnKind::Queued => "queued",
            TurnKind::Plan => "plan",
            TurnKind::Shell => "shell",
        }
    }
}

/// A complete line that is no JSON object. The message names cause and column, never text of the line.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("{message}")]
pub struct BadLine {
    pub message: String,
}

/// Reads one complete line, given without its newline, of a transcript of the given kind.
///
/// A line of nothing but blanks means nothing and is not bad; one of nothing but NULs is.
pub fn read_line(line: &[u8], kind: &TranscriptKind) -> Result<LineMeaning, BadLine> {
    let mended = MendedLine::new(line);
    let text = mended.text.as_ref();
    if !text.trim_ascii_start().starts_with('{') {
        return not_an_object(&mended);
    }
    let fields = Fields::of(text).map_err(|error| bad_json(&error))?;
    let mut mender = Mender { is_mended: mended.is_mended };

    let type_name = mender.string(fields.line_type);
    let line_type = type_name.as_deref().map_or(LineType::Unknown, LineType::named);
    let is_envelope = fields.is_envelope(line_type);
    let timestamp = mender.string(fields.timestamp).and_then(|text| text.parse::<Timestamp>().ok());
    let cwd = mender.filled_string(fields.cwd).filter(|path| path.len() <= FOLDER_BYTES_MAX);
    let git_branch = mender.filled_string(fields.git_branch).filter(|name| name.len() <= FOLDER_BYTES_MAX);
    let session = mender.string(fields.session).and_then(|text| text.parse::<Uuid>().ok());

    let said = match kind {
        TranscriptKind::SubAgent => None,
        TranscriptKind::Main { .. } => match line_type {
            LineType::User => user_said(&fields, &mut mender),
            LineType::Attachment => queued_said(&fields, &mut mender),
            LineType::Assistant => agent_said(&fields, &mut mender),
            _ => None,
        },
    };
    let turn = said.map(|said| Turn {
        identity: identity(&fields, &mut mender),
        said_in: forked_from(&fields, &mut mender).or(session),
        actor: said.actor,
        kind: said.kind,
        text: said.text,
        timestamp,
        message_id: said.message_id,
        cwd: cwd.clone(),
        git_branch: git_branch.clone(),
        is_final: said.is_final,
        model: said.model,
        has_attachment: said.has_attachment,
        is_repaired: mender.is_mended,
    });
    let unknown_type = (line_type == LineType::Unknown)
        .then(|| type_name.as_deref().unwrap_or(NO_TYPE).chars().take(UNKNOWN_TYPE_CHARS_MAX).collect());
    Ok(LineMeaning {
        line_type,
        unknown_type,
        is_envelope,
        session,
        timestamp,
        cwd,
        git_branch,
        is_forked: fields.forked_from.is_some(),
        turn,
        repaired: mended.is_mended,
    })
}

/// A line's bytes as text that can be parsed.
struct MendedLine<'a> {
    text: Cow<'a, str>,
    is_mended: bool,
}

impl<'a> MendedLine<'a> {
    fn new(line: &'a [u8]) -> Self {
        let line = json::without_byte_order_mark(line);
        if memchr::memchr(0, line).is_some() {
            let stripped = line.iter().copied().filter(|byte| *byte != 0).collect::<Vec<_>>();
            let text = String::from_utf8(stripped)
                .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
            return MendedLine { text: Cow::Owned(text), is_mended: true };
        }
        match String::from_utf8_lossy(line) {
            Cow::Borrowed(text) => MendedLine { text: Cow::Borrowed(text), is_mended: false },
            Cow::Owned(text) => MendedLine { text: Cow::Owned(text), is_mended: true },
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
    Ok(LineMeaning {
        line_type: LineType::Blank,
        unknown_type: None,
        is_envelope: false,
        session: None,
        timestamp: None,
        cwd: None,
        git_branch: None,
        is_forked: false,
        turn: None,
        repaired: false,
    })
}

/// Syntax errors of serde_json name what was expected and where, nothing of the text.
fn bad_json(error: &serde_json::Error) -> BadLine {
    let place = format!(" at line {} column {}", error.line(), error.column());
    let message = error.to_string();
    let cause = message.strip_suffix(&place).unwrap_or("malformed");
    BadLine { message: format!("no JSON object: {cause}, at column {}", error.column()) }
}

/// The fields of a line that matter here, as raw JSON; the last one of a name wins. Null counts as absent.
#[derive(Default)]
struct Fields<'a> {
    line_type: Option<&'a str>,
    uuid: Option<&'a str>,
    parent: Option<&'a str>,
    session: Option<&'a str>,
    timestamp: Option<&'a str>,
    cwd: Option<&'a str>,
    git_branch: Option<&'a str>,
    is_sidechain: Option<&'a str>,
    is_meta: Option<&'a str>,
    is_compact_summary: Option<&'a str>,
    is_visible_in_transcript_only: Option<&'a str>,
    is_api_error_message: Option<&'a str>,
    team_name: Option<&'a str>,
    origin: Option<&'a str>,
    prompt_id: Option<&'a str>,
    plan_content: Option<&'a str>,
    forked_from: Option<&'a str>,
    message: Option<&'a str>,
    attachment: Option<&'a str>,
}

impl<'a> Fields<'a> {
    fn of(line: &'a str) -> Result<Self, serde_json::Error> {
        let mut fields = Fields::default();
        members(line, |key, value| {
            let field = match key {
                "type" => &mut fields.line_type,
                "uuid" => &mut fields.uuid,
                "parentUuid" => &mut fields.parent,
                "sessionId" => &mut fields.session,
                "timestamp" => &mut fields.timestamp,
                "cwd" => &mut fields.cwd,
                "gitBranch" => &mut fields.git_branch,
                "isSidechain" => &mut fields.is_sidechain,
                "isMeta" => &mut fields.is_meta,
                "isCompactSummary" => &mut fields.is_compact_summary,
                "isVisibleInTranscriptOnly" => &mut fields.is_visible_in_transcript_only,
                "isApiErrorMessage" => &mut fields.is_api_error_message,
                "teamName" => &mut fields.team_name,
                "origin" => &mut fields.origin,
                "promptId" => &mut fields.prompt_id,
                "planContent" => &mut fields.plan_content,
                "forkedFrom" => &mut fields.forked_from,
                "message" => &mut fields.message,
                "attachment" => &mut fields.attachment,
                _ => return,
            };
            *field = given(value);
        })?;
        Ok(fields)
    }

    /// Whether a line of this type with these fields belongs to the conversation.
    fn is_envelope(&self, line_type: LineType) -> bool {
        match line_type {
            LineType::User | LineType::Assistant | LineType::System | LineType::Attachment | LineType::Progress => true,
            LineType::Metadata | LineType::Blank => false,
            // What newer versions add to the conversation is stamped and has an identity.
            LineType::Unknown => self.uuid.is_some() && self.timestamp.is_some(),
        }
    }

    /// Whether the program put the line there, or another agent did.
    fn is_not_typed(&self) -> bool {
        is_set(self.is_sidechain)
            || is_set(self.is_meta)
            || is_set(self.is_compact_summary)
            || is_set(self.is_visible_in_transcript_only)
            || self.team_name.is_some()
    }
}

fn given(value: &str) -> Option<&str> {
    (value != "null").then_some(value)
}

/// A flag is set by `true` alone.
fn is_set(flag: Option<&str>) -> bool {
    flag == Some("true")
}

/// Decodes strings and remembers whether one had to be mended.
struct Mender {
    is_mended: bool,
}

impl Mender {
    /// `None` where there is no string.
    fn string<'a>(&mut self, raw: Option<&'a str>) -> Option<Cow<'a, str>> {
        let decoded = json::string(raw?)?;
        self.is_mended |= decoded.is_mended;
        Some(decoded.text)
    }

    /// As [`Mender::string`], and the empty string is none.
    fn filled_string(&mut self, raw: Option<&str>) -> Option<String> {
        self.string(raw).filter(|text| !text.is_empty()).map(Cow::into_owned)
    }
}

/// The members called `names` of the object `raw`, last ones first served; all absent where it is no object.
fn pick<'a, const N: usize>(raw: Option<&'a str>, names: [&str; N]) -> [Option<&'a str>; N] {
    let mut found = [None; N];
    if let Some(raw) = raw {
        // What is no object has no members, which is all there is to know here.
        let _ = members(raw, |key, value| {
            for (name, slot) in names.iter().zip(&mut found) {
                if *name == key {
                    *slot = given(value);
                }
            }
        });
    }
    found
}

/// Who or what brought a line about, as newer versions note it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Provenance {
    Unsaid,
    Human,
    /// Also whatever is not recognised.
    Program,
}

fn provenance(origin: Option<&str>, mender: &mut Mender) -> Provenance {
    let Some(origin) = origin else { return Provenance::Unsaid };
    let kind = if origin.starts_with('"') { Some(origin) } else { pick(Some(origin), ["kind"])[0] };
    match (kind, mender.string(kind)) {
        (None, _) => Provenance::Unsaid,
        (Some(_), Some(kind)) if kind == "human" => Provenance::Human,
        (Some(_), _) => Provenance::Program,
    }
}

/// The part of a turn that depends on the type of its line.
struct Said {
    actor: Actor,
    kind: Option<TurnKind>,
    text: String,
    message_id: Option<String>,
    is_final: Option<bool>,
    model: Option<String>,
    has_attachment: bool,
}

fn user_said(fields: &Fields<'_>, mender: &mut Mender) -> Option<Said> {
    if fields.is_not_typed() {
        return None;
    }
    let provenance = provenance(fields.origin, mender);
    if provenance == Provenance::Program {
        return None;
    }
    let [content] = pick(fields.message, ["content"]);
    let content = Content::of(content?, mender);
    let has_attachment = content.has_attachment;
    let (kind, text) = typed(content, provenance)?;
    let kind = if kind == TurnKind::Prompt && fields.plan_content.is_some() { TurnKind::Plan } else { kind };
    Some(human(kind, text, has_attachment, fields, mender))
}

fn queued_said(fields: &Fields<'_>, mender: &mut Mender) -> Option<Said> {
    let [kind, mode, prompt, origin, is_meta] =
        pick(fields.attachment, ["type", "commandMode", "prompt", "origin", "isMeta"]);
    if mender.string(kind)? != "queued_command" || mender.string(mode)? != "prompt" {
        return None;
    }
    if fields.is_not_typed() || is_set(is_meta) {
        return None;
    }
    let provenance = provenance(origin.or(fields.origin), mender);
    if provenance == Provenance::Program {
        return None;
    }
    let content = Content::of(prompt?, mender);
    let has_attachment = content.has_attachment;
    let (_, text) = typed(content, provenance)?;
    Some(human(TurnKind::Queued, text, has_attachment, fields, mender))
}

fn human(kind: TurnKind, text: String, has_attachment: bool, fields: &Fields<'_>, mender: &mut Mender) -> Said {
    Said {
        actor: Actor::User,
        kind: Some(kind),
        text,
        message_id: mender.filled_string(fields.prompt_id),
        is_final: None,
        model: None,
        has_attachment,
    }
}

/// The model's name on lines that the program made: API errors and the like.
const SYNTHETIC_MODEL: &str = "<synthetic>";

fn agent_said(fields: &Fields<'_>, mender: &mut Mender) -> Option<Said> {
    if is_set(fields.is_sidechain) || is_set(fields.is_api_error_message) {
        return None;
    }
    let [content, id, model, stop_reason] = pick(fields.message, ["content", "id", "model", "stop_reason"]);
    let model = mender.filled_string(model);
    if model.as_deref() == Some(SYNTHETIC_MODEL) {
        return None;
    }
    let content = Content::of(content?, mender);
    let has_attachment = content.has_attachment;
    let text = content.into_text();
    if text.trim().is_empty() {
        return None;
    }
    let is_final = mender
        .string(stop_reason)
        .map(|reason| matches!(reason.as_ref(), "end_turn" | "stop_sequence" | "max_tokens" | "refusal"));
    Some(Said {
        actor: Actor::Agent,
        kind: None,
        text,
        message_id: mender.filled_string(id),
        is_final,
        model,
        has_attachment,
    })
}

fn identity(fields: &Fields<'_>, mender: &mut Mender) -> TurnIdentity {
    let [copied_from] = pick(fields.forked_from, ["messageUuid"]);
    mender
        .filled_string(copied_from)
        .or_else(|| mender.filled_string(fields.uuid))
        .map_or(TurnIdentity::None, TurnIdentity::Uuid)
}

fn forked_from(fields: &Fields<'_>, mender: &mut Mender) -> Option<Uuid> {
    let [session] = pick(fields.forked_from, ["sessionId"]);
    mender.string(session)?.parse().ok()
}

/// Texts of one message that are kept apart.
const TEXTS_MAX: usize = 10_000;

/// What a message holds.
#[derive(Default)]
struct Content<'a> {
    /// A string is one text.
    texts: Vec<Cow<'a, str>>,
    has_tool_result: bool,
    has_attachment: bool,
}

impl<'a> Content<'a> {
    /// Of a string or an array of blocks; anything else is empty.
    fn of(raw: &'a str, mender: &mut Mender) -> Self {
        let mut content = Content::default();
        if let Some(text) = mender.string(Some(raw)) {
            content.texts.push(text);
            return content;
        }
        // What is no array has no blocks.
        let _ = items(raw, |block| {
            if content.has_tool_result {
                return; // decided; the rest may be large
            }
            let [kind, text] = pick(Some(block), ["type", "text"]);
            match mender.string(kind).as_deref() {
                Some("text") => content.add(mender.string(text)),
                Some("image" | "document") => content.has_attachment = true,
                Some("tool_result") => content.has_tool_result = true,
                _ => {}
            }
        });
        content
    }

    /// Adds a text. Beyond [`TEXTS_MAX`] it is joined to the last one: millions of empty texts take no memory of their own.
    fn add(&mut self, text: Option<Cow<'a, str>>) {
        let Some(text) = text else { return };
        let is_full = self.texts.len() == TEXTS_MAX;
        match self.texts.last_mut() {
            Some(last) if is_full => {
                let last = last.to_mut();
                last.push('\n');
                last.push_str(&text);
            }
            _ => self.texts.push(text),
        }
    }

    /// All texts, a line break between them. Moves a single one, which may be long.
    fn into_text(self) -> String {
        match <[Cow<'a, str>; 1]>::try_from(self.texts) {
            Ok([text]) => text.into_owned(),
            Err(texts) => texts.join("\n"),
        }
    }
}

/// What a human typed, out of the content of a message; `None` where it was no human.
fn typed(content: Content<'_>, provenance: Provenance) -> Option<(TurnKind, String)> {
    if content.has_tool_result {
        return None;
    }
    let text = match <[Cow<'_, str>; 1]>::try_from(content.texts) {
        Ok([text]) => match without_editor_blocks(&text) {
            kept if kept.len() == text.len() => text.into_owned(),
            kept => kept.to_owned(),
        },
        Err(texts) => {
            // A block that was nothing but an editor's leaves no empty line behind.
            let kept = texts.iter().filter_map(|text| {
                let kept = without_editor_blocks(text);
                (!kept.is_empty() || text.is_empty()).then_some(kept)
            });
            kept.collect::<Vec<_>>().join("\n")
        }
    };
    match opening(text.trim_start(), provenance) {
        Opening::Program => None,
        Opening::Command => Some((TurnKind::Command, command(&text)?)),
        Opening::Shell => {
            let line = tagged(&text, "bash-input")?;
            (!line.trim().is_empty()).then(|| (TurnKind::Shell, line.to_owned()))
        }
        Opening::Words => (!text.trim().is_empty() || content.has_attachment).then_some((TurnKind::Prompt, text)),
    }
}

/// What the start of a text says about who wrote it.
enum Opening {
    Program,
    Command,
    Shell,
    Words,
}

fn opening(text: &str, provenance: Provenance) -> Opening {
    // The first is an interrupt: the state it leads to is told by others.
    if text.starts_with("[Request interrupted by user") || text.starts_with("Caveat: The messages below were generated")
    {
        return Opening::Program;
    }
    match opening_tag(text) {
        Some("command-name" | "command-message") => Opening::Command,
        Some("bash-input") => Opening::Shell,
        Some(
            "bash-stdout"
            | "bash-stderr"
            | "local-command-stdout"
            | "local-command-stderr"
            | "local-command-caveat"
            | "task-notification"
            | "system-reminder"
            | "teammate-message"
            | "tick"
            | "goal"
            | "session-start-hook"
            | "user-memory-input",
        ) => Opening::Program,
        // Tags of events come and go with versions (`<ci-monitor-event>`): a guess, which a word from the program beats.
        Some(tag) if tag.ends_with("-event") && provenance != Provenance::Human => Opening::Program,
        _ => Opening::Words,
    }
}

/// The name of the tag that `text` starts with.
fn opening_tag(text: &str) -> Option<&str> {
    let text = text.strip_prefix('<')?;
    let (name, after) =
        text.split_at_checked(text.find(|c: char| !(c.is_ascii_alphanumeric() || "-_".contains(c)))?)?;
    (!name.is_empty() && after.starts_with(|c: char| c == '>' || c == '/' || c.is_ascii_whitespace())).then_some(name)
}

/// `text` without the blocks (`<ide_opened_file>…`, `<ide_selection>…`) that an editor put before it.
fn without_editor_blocks(text: &str) -> &str {
    let mut kept = text;
    loop {
        let start = kept.trim_start();
        let Some(name) = opening_tag(start).filter(|name| name.starts_with("ide_")) else { return kept };
        // Unclosed, it may hold what the human said.
        let Some((_, after)) = start.split_once(&format!("</{name}>")) else { return kept };
        kept = after.trim_start_matches(['\n', '\r']);
    }
}

/// Name and arguments of a slash command, separated by a space.
fn command(text: &str) -> Option<String> {
    // Old versions append the command's own prompt.
    let text = text.split_once("<command-contents>").map_or(text, |(text, _)| text);
    let name = ["command-name", "command-message"].into_iter().find_map(|tag| tagged(text, tag))?;
    let name = name.split_once("</").map_or(name, |(name, _)| name).trim();
    if name.is_empty() {
        return None;
    }
    Some(match tagged(text, "command-args") {
        Some(arguments) if !arguments.trim().is_empty() => format!("{name} {arguments}"),
        _ => name.to_owned(),
    })
}

/// What stands between the first `<tag>` and its end: the last `</tag>` for what a human typed may hold one, and the end
/// of the text where there is none.
fn tagged<'a>(text: &'a str, tag: &str) -> Option<&'a str> {
    let (_, after) = text.split_once(&format!("<{tag}>"))?;
    Some(after.rsplit_once(&format!("</{tag}>")).map_or(after, |(inside, _)| inside))
}

/// Whether the object `record` is a line rather than a part of one: of a known type, and placed in a session unless its
/// type is one that isn't.
pub(super) fn looks_like_a_line(record: &str) -> bool {
    let Ok(fields) = Fields::of(record) else { return false };
    let mut mender = Mender { is_mended: false };
    match mender.string(fields.line_type).as_deref().map(LineType::named) {
        Some(LineType::Metadata) => true,
        Some(LineType::Unknown) | None => fields.session.is_some(),
        Some(_) => fields.session.is_some() || fields.parent.is_some() || fields.cwd.is_some(),
    }
}

impl Turn {
    /// The payload of `turn_detected`, as its schema has it: what is not known is left out, except that `is_final` of an
    /// agent's turn is null then. `has_attachment` is there only when true.
    ///
    /// `session` is the file's, told where the line names none, `project_path` its project's;
    /// `otherwise` is the time to be told where the line has none. `copied_at`: when the session was made as a copy of
    /// another in which this was said, and the line does not tell which.
    pub fn payload(
        self,
        session: Uuid,
        project_path: Option<&str>,
        otherwise: Timestamp,
        copied_at: Option<Timestamp>,
    ) -> Map<String, Value> {
        let mut payload = Map::new();
        let mut put = |name: &str, value: Value| payload.insert(name.to_owned(), value);
        put("session_uuid", self.said_in.unwrap_or(session).to_string().into());
        put("actor", self.actor.as_str().into());
        put("text", self.text.into());
        put("source", "polling".into());
        put("turn_timestamp", iso_8601(self.timestamp.unwrap_or(otherwise)).into());
        if let TurnIdentity::Uuid(uuid) = self.identity {
            put("turn_uuid", uuid.into());
        }
        if let Some(message_id) = self.message_id {
            put("message_id", message_id.into());
        }
        if let Some(kind) = self.kind {
            put("kind", kind.as_str().into());
        }
        if let Some(project_path) = project_path {
            put("project_path", project_path.into());
        }
        if let Some(cwd) = self.cwd {
            put("working_directory", cwd.into());
        }
        if let Some(git_branch) = self.git_branch {
            put("git_branch", git_branch.into());
        }
        if self.actor == Actor::Agent {
            put("is_final", self.is_final.into());
        }
        if let Some(model) = self.model {
            put("model", model.into());
        }
        if self.has_attachment {
            put("has_attachment", true.into());
        }
        let mut metadata = Map::new();
        if self.is_repaired {
            metadata.insert("repaired".to_owned(), true.into());
        }
        if let Some(copied_at) = copied_at {
            metadata.insert("copied_at".to_owned(), iso_8601(copied_at).into());
        }
        if !metadata.is_empty() {
            put("metadata", metadata.into());
        }
        payload
    }
}

/// Milliseconds as Claude Code writes them; finer where the line was.
pub(super) fn iso_8601(timestamp: Timestamp) -> String {
    if timestamp.subsec_nanosecond() % 1_000_000 == 0 { format!("{timestamp:.3}") } else { timestamp.to_string() }
}

/// The identity of a turn, the same wherever and whenever the turn is read: by the line's own uuid, which copies of a
/// session share; without one by session, place and content. `line` begins at byte `offset` of the session's file.
pub fn turn_event_id(turn: &Turn, session: Uuid, offset: u64, line: &[u8]) -> EventId {
    match &turn.identity {
        TurnIdentity::Uuid(uuid) => event_id_of_turn(uuid),
        TurnIdentity::None => EventId::derived(format!("turn/{session}/{offset}/{:032x}", xxh3_128(line)).as_bytes()),
    }
}

/// The identity of the turn whose line has this uuid: `turn_uuid` in its payload.
pub fn event_id_of_turn(uuid: &str) -> EventId {
    EventId::derived(format!("turn/{uuid}").as_bytes())
}

/// The identity of a session's registration.
pub fn session_registered_event_id(session: Uuid) -> EventId {
    EventId::derived(format!("session_registered/{session}").as_bytes())
}

/// What is known when a session is first seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SessionFacts<'a> {
    pub session: Uuid,
    /// The first working directory: project path and working directory at once.
    pub cwd: &'a str,
    pub git_branch: Option<&'a str>,
    pub transcript_path: Option<&'a str>,
    pub started_at: Option<Timestamp>,
}

impl SessionFacts<'_> {
    /// The payload of `session_registered`.
    pub fn payload(&self) -> Map<String, Value> {
        let mut payload = Map::new();
        let mut put = |name: &str, value: String| payload.insert(name.to_owned(), value.into());
        put("session_uuid", self.session.to_string());
        put("project_path", self.cwd.to_owned());
        put("working_directory", self.cwd.to_owned());
        if let Some(git_branch) = self.git_branch {
            put("git_branch", git_branch.to_owned());
        }
        if let Some(transcript_path) = self.transcript_path {
            put("transcript_path", transcript_path.to_owned());
        }
        if let Some(started_at) = self.started_at {
            put("started_at", iso_8601(started_at));
        }
        payload
    }
}

/// Sorts transcripts so that what was said is read first where it was first said: originals by their beginning, then
/// copies (forks, old resumes) by theirs. Files that tell no time come first among their like.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HeadOrder {
    // Compared in this order.
    pub is_copy: bool,
    pub began_at: Option<Timestamp>,
}

/// Lines of a head that are looked at.
const HEAD_LINES_MAX: usize = 50;

/// A copy is made this long after its first line was said, at least. In originals the two are milliseconds to some
/// seconds apart, in copies minutes or hours.
pub(super) const COPY_DELAY_SECONDS_MIN: i64 = 60;

/// Where a main file belongs in the order of reading, from its first lines; a last line without newline is passed over.
///
/// Copies have their history's own uuids and times, but give themselves away: the state they start with was stamped long
/// after the first line of the conversation that follows it; or that line names another session; or lines say
/// `forkedFrom`.
pub fn head_order(first_lines: &[u8], stem: Uuid) -> HeadOrder {
    let mut opened_at = None; // stamped state before the conversation
    let mut first_said: Option<(Option<Timestamp>, bool)> = None; // when, and whether in another session
    let mut own_at = None; // first of the conversation in this session
    let mut is_forked = false;
    for line in first_lines.split_inclusive(|byte| *byte == b'\n').take(HEAD_LINES_MAX) {
        let Some(line) = line.strip_suffix(b"\n") else { break };
        let mended = MendedLine::new(line);
        let Ok(fields) = Fields::of(&mended.text) else { continue };
        let mut mender = Mender { is_mended: false };
        let at = mender.string(fields.timestamp).and_then(|text| text.parse::<Timestamp>().ok());
        let line_type = mender.string(fields.line_type).map_or(LineType::Unknown, |name| LineType::named(&name));
        if !fields.is_envelope(line_type) {
            if first_said.is_none() {
                opened_at = opened_at.or(at);
            }
            continue;
        }
        let session = mender.string(fields.session).and_then(|text| text.parse::<Uuid>().ok());
        let is_foreign = session.is_some_and(|session| session != stem);
        first_said = first_said.or(Some((at, is_foreign)));
        if !is_foreign {
            own_at = own_at.or(at);
        }
        is_forked |= fields.forked_from.is_some();
    }
    let (said_at, is_foreign) = first_said.unwrap_or((None, false));
    let is_late = match (opened_at, said_at) {
        (Some(opened_at), Some(said_at)) => opened_at.as_second() - said_at.as_second() >= COPY_DELAY_SECONDS_MIN,
        _ => false,
    };
    let is_copy = is_late || is_foreign || is_forked;
    let began_at = if is_copy { opened_at.or(own_at).or(said_at) } else { said_at.or(opened_at) };
    HeadOrder { is_copy, began_at }
}

#[cfg(test)]
mod tests;
