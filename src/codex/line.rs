//! One line of a rollout, by itself.
//!
//! ```text
//! {"timestamp":"…Z","ordinal":7,"type":"event_msg","payload":{"type":"item_completed","turn_id":"…","item":{…}}}
//! ```
//!
//! A message stands in a file up to twice: as what the model was sent or has answered (`response_item`), and as what the
//! user saw. The latter is an event of its own in legacy files (`user_message`, `agent_message`), and an item
//! (`item_completed`) in paginated ones. See [`Form`].

use std::borrow::Cow;

use jiff::Timestamp;
use uuid::Uuid;

use crate::json::{self, items, named, pick};
use crate::transcript::{Actor, NAME_BYTES_MAX, UNKNOWN_TYPE, shortened};

/// Types of lines. What an unknown one says is not read.
const LINE_TYPES: &[&str] = &[
    "compacted",
    "event_msg",
    "inter_agent_communication",
    "inter_agent_communication_metadata",
    "realtime_item",
    "response_item",
    "retained_context",
    "security_risk_score",
    "session_meta",
    "token_usage_record",
    "turn_context",
    "world_state",
];

/// How the model's input begins where the program, and not a person, has written it; blanks before it don't count.
const INJECTED: &[&str] = &[
    "# AGENTS.md instructions",
    "<INSTRUCTIONS>",
    "<environment_context>",
    "<hook_prompt",
    "<permissions",
    "<recommended_plugins>",
    "<send_user_message_question_reply>",
    "<skill",
    "<subagent_notification>",
    "<turn_aborted>",
    "<user_instructions>",
    "<user_shell_command>",
];

/// Where a message was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Form {
    /// `event_msg`/`item_completed`: paginated files.
    Item,
    /// `event_msg`/`user_message` and `agent_message`: legacy files.
    Event,
    /// `response_item`/`message`: all files. It counts only where there is nothing else.
    Response,
}

/// What one line says.
#[derive(Debug)]
pub(super) struct Line {
    /// When it was written.
    pub(super) at: Option<Timestamp>,
    /// Whether something was said or done. Other lines are state.
    pub(super) is_activity: bool,
    pub(super) content: Content,
    /// Something that was said, or a type of line, in a form that is not known: the field and its value.
    pub(super) unknown: Option<(&'static str, String)>,
}

#[derive(Debug)]
pub(super) enum Content {
    Session(Box<SessionMeta>),
    TurnStarted {
        turn_id: Option<String>,
        started_at: Option<Timestamp>,
    },
    TurnEnded,
    Context {
        cwd: Option<String>,
        model: Option<String>,
    },
    Message(Message),
    /// The model's input, written by the program.
    Injected,
    Other,
}

/// `session_meta`: the first line of each rollout. Further ones were copied with the lines of another thread.
#[derive(PartialEq, Debug)]
pub(crate) struct SessionMeta {
    pub(crate) thread: Uuid,
    pub(crate) began_at: Option<Timestamp>,
    pub(crate) cwd: Option<String>,
    pub(crate) git_branch: Option<String>,
    pub(crate) version: Option<String>,
    /// The program that wrote it, such as `codex-tui`.
    pub(crate) originator: Option<String>,
    /// `source`, where that is a text.
    pub(crate) source: Option<String>,
    /// Another thread went on in this one.
    pub(crate) is_fork: bool,
    /// No person talks in it: a sub-agent's, a reviewer's, the memory's.
    pub(crate) is_sub_agent: bool,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Message {
    pub(crate) form: Form,
    pub(crate) actor: Actor,
    /// `None` in legacy files: it belongs to the turn that was started last.
    pub(crate) turn_id: Option<String>,
    /// The API's, of an answer; of a prompt its turn's.
    pub(crate) message_id: Option<String>,
    /// The blocks' texts, a line break between them.
    pub(crate) text: String,
    pub(crate) has_attachment: bool,
    pub(crate) is_final: Option<bool>,
    /// `None`: only the line has a time.
    pub(crate) completed_at: Option<Timestamp>,
    /// What can't be stored was replaced.
    pub(crate) is_repaired: bool,
}

/// Reads a line, which is one JSON object; the error says why it is none.
pub(super) fn read(line: &str) -> Result<Line, serde_json::Error> {
    let [timestamp, line_type, payload] = named(line, ["timestamp", "type", "payload"])?;
    let line_type = text(line_type).unwrap_or_default();
    let mut unknown = None;
    let content = match &*line_type {
        "session_meta" => session_meta(payload).map_or(Content::Other, |meta| Content::Session(Box::new(meta))),
        "turn_context" => {
            let [cwd, model] = pick(payload, ["cwd", "model"]);
            Content::Context { cwd: name(cwd), model: name(model) }
        }
        "event_msg" => event(payload, &mut unknown),
        "response_item" => response(payload),
        _ => Content::Other,
    };
    if !LINE_TYPES.contains(&&*line_type) {
        unknown = Some((UNKNOWN_TYPE, shortened(if line_type.is_empty() { "none" } else { &line_type })));
    }
    let is_activity = matches!(&*line_type, "event_msg" | "response_item" | "session_meta");
    Ok(Line { at: time(timestamp), is_activity, content, unknown })
}

/// Type of a line, and of its payload: `event_msg/user_message`.
pub(super) fn type_of(line: &str) -> String {
    let [line_type, payload] = pick(Some(line), ["type", "payload"]);
    let [kind] = pick(payload, ["type"]);
    let types = [line_type, kind].map(text);
    shortened(&types.iter().flatten().map(|name| &**name).collect::<Vec<_>>().join("/"))
}

fn session_meta(payload: Option<&str>) -> Option<SessionMeta> {
    let [id, timestamp, cwd, git, version, originator, source] =
        pick(payload, ["id", "timestamp", "cwd", "git", "cli_version", "originator", "source"]);
    let [forked_from, parent, thread_source] = pick(payload, ["forked_from_id", "parent_thread_id", "thread_source"]);
    let [branch] = pick(git, ["branch"]);
    let is_user = text(thread_source).is_none_or(|source| source == "user");
    Some(SessionMeta {
        thread: text(id)?.parse().ok()?,
        began_at: time(timestamp),
        cwd: name(cwd),
        git_branch: name(branch),
        version: name(version),
        originator: name(originator),
        source: name(source),
        is_fork: forked_from.is_some(),
        is_sub_agent: source.is_some_and(|source| source.starts_with('{')) || parent.is_some() || !is_user,
    })
}

fn event(payload: Option<&str>, unknown: &mut Option<(&'static str, String)>) -> Content {
    let [kind, turn_id, message, item] = pick(payload, ["type", "turn_id", "message", "item"]);
    let turn_id = name(turn_id);
    match text(kind).as_deref() {
        Some("task_started" | "turn_started") => {
            let [started_at] = pick(payload, ["started_at"]);
            let seconds = started_at.and_then(|seconds| seconds.parse::<f64>().ok());
            Content::TurnStarted {
                turn_id,
                started_at: seconds.and_then(|seconds| Timestamp::from_second(seconds as i64).ok()),
            }
        }
        Some("task_complete" | "turn_complete" | "turn_aborted") => Content::TurnEnded,
        Some(kind @ ("user_message" | "agent_message")) => {
            let [images, local_images, phase] = pick(payload, ["images", "local_images", "phase"]);
            let is_filled = |array: Option<&str>| array.is_some_and(|array| array != "[]" && array.starts_with('['));
            let Some(text) = message.and_then(json::string) else { return Content::Other };
            Content::Message(Message {
                form: Form::Event,
                actor: if kind == "user_message" { Actor::User } else { Actor::Agent },
                turn_id: None,
                message_id: None,
                is_repaired: text.is_mended,
                text: text.text.into_owned(),
                has_attachment: is_filled(images) || is_filled(local_images),
                is_final: is_final(phase),
                completed_at: None,
            })
        }
        Some("item_completed") => item_completed(payload, turn_id, item, unknown),
        // Such as errors: for the user to see, and said by neither.
        _ => Content::Other,
    }
}

fn item_completed(
    payload: Option<&str>,
    turn_id: Option<String>,
    item: Option<&str>,
    unknown: &mut Option<(&'static str, String)>,
) -> Content {
    let [kind, id, content, phase] = pick(item, ["type", "id", "content", "phase"]);
    let [completed_at] = pick(payload, ["completed_at_ms"]);
    let kind = text(kind).unwrap_or_default();
    let actor = match &*kind {
        "UserMessage" => Actor::User,
        "AgentMessage" => Actor::Agent,
        _ => {
            // A message of another name would be lost in silence.
            if kind.ends_with("Message") {
                *unknown = Some(("item", shortened(&kind)));
            }
            return Content::Other;
        }
    };
    let blocks = Blocks::of(content, None);
    Content::Message(Message {
        form: Form::Item,
        actor,
        turn_id,
        message_id: name(id).filter(|id| id.starts_with("msg_")),
        text: blocks.texts.join("\n"),
        has_attachment: blocks.has_attachment,
        is_final: is_final(phase),
        completed_at: completed_at.and_then(|at| at.parse().ok()).and_then(|at| Timestamp::from_millisecond(at).ok()),
        is_repaired: blocks.is_repaired,
    })
}

fn response(payload: Option<&str>) -> Content {
    let [kind, role, content, id, phase, passed] =
        pick(payload, ["type", "role", "content", "id", "phase", "internal_chat_message_metadata_passthrough"]);
    let actor = match (text(kind).as_deref(), text(role).as_deref()) {
        (Some("message"), Some("user")) => Actor::User,
        (Some("message"), Some("assistant")) => Actor::Agent,
        _ => return Content::Other,
    };
    let [turn_id, kinds] = pick(passed, ["turn_id", "content_item_kinds"]);
    // Without kinds the words themselves tell who wrote them.
    let mut blocks = Blocks::of(content, kinds.filter(|_| actor == Actor::User));
    if actor == Actor::User {
        let is_injected = |text: &&String| INJECTED.iter().any(|start| text.trim_start().starts_with(start));
        if blocks.texts.is_empty() || kinds.is_none() && blocks.texts.first().as_ref().is_some_and(is_injected) {
            return Content::Injected;
        }
        // Written around the name of a picture, with the prompt behind it.
        if kinds.is_none() && blocks.texts.first().is_some_and(|text| text.trim_start().starts_with("<image ")) {
            blocks.texts.drain(..blocks.texts.len() - 1);
        }
    }
    Content::Message(Message {
        form: Form::Response,
        actor,
        turn_id: name(turn_id),
        message_id: name(id).filter(|id| actor == Actor::Agent && id.starts_with("msg_")),
        text: blocks.texts.join("\n"),
        has_attachment: blocks.has_attachment,
        is_final: is_final(phase),
        completed_at: None,
        is_repaired: blocks.is_repaired,
    })
}

fn is_final(phase: Option<&str>) -> Option<bool> {
    match text(phase).as_deref() {
        Some("final_answer") => Some(true),
        Some("commentary") => Some(false),
        _ => None,
    }
}

/// The blocks of a message's content.
#[derive(Default)]
struct Blocks {
    texts: Vec<String>,
    has_attachment: bool,
    is_repaired: bool,
}

impl Blocks {
    /// `kinds`: who each block is from, where only a person's count.
    fn of(content: Option<&str>, kinds: Option<&str>) -> Blocks {
        let mut from = Vec::new();
        let _ = items(kinds.unwrap_or("[]"), |kind| {
            from.push(text(Some(kind)).is_some_and(|kind| kind.starts_with("user.")))
        });
        let mut blocks = Blocks::default();
        let mut number = 0;
        // What is no array has no blocks.
        let _ = items(content.unwrap_or("[]"), |block| {
            let is_wanted = kinds.is_none() || from.get(number) == Some(&true);
            number += 1;
            let [kind, text] = pick(Some(block), ["type", "text"]);
            let kind = self::text(kind).unwrap_or_default();
            if !is_wanted {
                return;
            }
            match &*kind {
                "text" | "Text" | "input_text" | "output_text" => {
                    if let Some(text) = text.and_then(json::string) {
                        blocks.is_repaired |= text.is_mended;
                        blocks.texts.push(text.text.into_owned());
                    }
                }
                // Skills are named in the text as well.
                "skill" => {}
                _ => blocks.has_attachment = true,
            }
        });
        blocks
    }
}

fn text(raw: Option<&str>) -> Option<Cow<'_, str>> {
    Some(json::string(raw?)?.text)
}

/// A short text, such as a path or an identifier.
fn name(raw: Option<&str>) -> Option<String> {
    text(raw).filter(|text| (1..=NAME_BYTES_MAX).contains(&text.len())).map(Cow::into_owned)
}

fn time(raw: Option<&str>) -> Option<Timestamp> {
    text(raw)?.parse().ok()
}
