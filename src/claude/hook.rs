//! What one of Claude Code's hooks says, as a `hook_received` event.
//!
//! A hook's input is one flat JSON object without id and time, so who receives it mints both ([`Arrival`]). Nothing is
//! required of it here and no string in it hurts: a field of the wrong type is passed over, what Postgres can't store is
//! mended and marked (`metadata.repaired`). The schema has the last word.
//!
//! What is kept, by `hooks.capture`:
//!
//! * `summary`: the fields named in [`KEPT`], where they are strings. No prompt, no tool input or output, no answer of
//!   the model: none of them stands in a field of these names.
//! * `full`: the same, and the whole input as `data`.

use serde_json::{Map, Value};
use uuid::Uuid;

use crate::config::HookCapture;
use crate::event::{
    Candidate, EventId, EventType, Failure, FailureKind, ForeignKeys, Origin, Record, Rejection, Timestamp,
};
use crate::json;
use crate::session::{Agent, SessionFacts, session_registered_event_id};

/// The type of every event that is made here.
pub(crate) const EVENT_TYPE: &str = "hook_received";

/// Fields of the input that are kept as they are, and what they are called in the payload.
const KEPT: &[(&str, &str)] = &[
    ("hook_event_name", "hook_type"),
    ("session_id", "claude_session_id"),
    ("cwd", "working_directory"),
    ("transcript_path", "transcript_path"),
    ("tool_name", "tool_name"),
    ("tool_use_id", "tool_use_id"),
    ("notification_type", "notification_type"),
    ("permission_mode", "permission_mode"),
    ("prompt_id", "prompt_id"),
    ("agent_type", "agent_type"),
    ("agent_id", "subagent_id"),
    ("reason", "reason"),
    ("source", "source"),
    ("trigger", "trigger"),
    ("message", "message"),
    ("title", "title"),
    ("turn_id", "turn_id"),
    ("model", "model"),
];

/// What a payload has beside `data`, as a rule.
const OVERHEAD_BYTES_MAX: u64 = 64 << 10;

/// Kept of an input that is no JSON object.
const REJECTED_BYTES_KEPT_MAX: usize = 64 << 10;

/// What the receiver of a hook knows besides its input.
pub(crate) struct Arrival {
    /// The event's identity, made by the receiver (UUIDv7).
    pub id: EventId,
    /// The receiver's clock when the hook began.
    pub received_at: Timestamp,
    /// The hook's name where the input has none: the last part of the path it was posted to.
    pub hook_type: Option<String>,
    /// Where the hook runs, for input without `cwd`.
    pub working_directory: Option<String>,
    /// The project's folder, as Claude Code tells its hooks.
    pub project_path: Option<String>,
}

/// The record of a hook with this input; a rejection where that is no JSON object.
///
/// The input of a rejection is kept under `full` only: it may hold anything. An input above `data_bytes_max` is not
/// kept as `data`: the event would be too large.
pub(crate) fn record(input: &[u8], arrival: Arrival, capture: HookCapture, data_bytes_max: u64) -> Record {
    let input = json::without_byte_order_mark(input);
    let lossy = String::from_utf8_lossy(input);
    let text = lossy.trim_ascii();
    let mut is_mended = matches!(lossy, std::borrow::Cow::Owned(_));
    let Some(mut payload) = kept_fields(text, &mut is_mended) else {
        return unreadable(input, format!("a hook's input of {} bytes is no JSON object", input.len()), capture);
    };
    for (name, value) in [
        ("hook_id", Some(arrival.id.to_string())),
        ("hook_type", arrival.hook_type),
        ("working_directory", arrival.working_directory),
        ("project_path", arrival.project_path),
    ] {
        if let Some(value) = value {
            payload.entry(name).or_insert_with(|| value.into());
        }
    }
    let mut metadata = Map::new();
    if capture == HookCapture::Full {
        let data = if text.len() as u64 + OVERHEAD_BYTES_MAX > data_bytes_max {
            Err(format!("{} bytes, more than max_event_bytes ({data_bytes_max})", text.len()))
        } else {
            json::field_value(text, &mut is_mended).map_err(|unfit| unfit.to_string())
        };
        match data {
            Ok(data) => drop(payload.insert("data".to_owned(), data)),
            Err(problem) => drop(metadata.insert("data_omitted".to_owned(), problem.into())),
        }
    }
    if is_mended {
        metadata.insert("repaired".to_owned(), true.into());
    }
    if !metadata.is_empty() {
        payload.insert("metadata".to_owned(), metadata.into());
    }
    Record::Event(Candidate {
        id: arrival.id,
        event_type: EVENT_TYPE.to_owned(),
        timestamp: arrival.received_at,
        payload,
        refs: ForeignKeys::default(),
        origin: Origin::Hook,
    })
}

/// The record of a hook whose input was not complete when its time was over.
pub(crate) fn incomplete(input: &[u8], seconds: u64, capture: HookCapture) -> Record {
    if input.is_empty() {
        let message = format!("a hook got no input within {seconds} s");
        return rejection(FailureKind::Unreadable, message, Vec::new());
    }
    let bytes = input.len();
    unreadable(input, format!("a hook got no complete JSON object within {seconds} s, only {bytes} bytes"), capture)
}

fn unreadable(input: &[u8], message: String, capture: HookCapture) -> Record {
    let (kept, note) = match capture {
        HookCapture::Full if input.len() <= REJECTED_BYTES_KEPT_MAX => (input, String::new()),
        HookCapture::Full => {
            let kept = input.get(..REJECTED_BYTES_KEPT_MAX).unwrap_or_default();
            (kept, format!("; the first {REJECTED_BYTES_KEPT_MAX} bytes are kept"))
        }
        HookCapture::Summary => (&[][..], "; it is kept only where hooks.capture is full".to_owned()),
    };
    rejection(FailureKind::Unreadable, message + &note, kept.to_vec())
}

/// The record of a hook whose input is larger than anybody reads.
pub(crate) fn too_large(bytes_max: usize) -> Record {
    let message = format!("a hook's input has more than {bytes_max} bytes; it was not kept");
    rejection(FailureKind::TooLarge, message, Vec::new())
}

/// The record of what follows as many objects as one hook may have.
pub(crate) fn too_many(objects_max: usize) -> Record {
    let message = format!("a hook's input has more than {objects_max} objects; the others were not kept");
    rejection(FailureKind::TooLarge, message, Vec::new())
}

fn rejection(kind: FailureKind, message: String, bytes: Vec<u8>) -> Record {
    Record::Rejected(Rejection {
        failure: Failure { kind, message, sqlstate: None },
        event_type: Some(EventType::new(EVENT_TYPE)),
        origin: Origin::Hook,
        bytes,
    })
}

/// The strings of an input that are kept, by their names in the payload; `None` where `text` is not exactly one object.
/// Takes any nesting.
fn kept_fields(text: &str, is_mended: &mut bool) -> Option<Map<String, Value>> {
    let mut kept = Map::new();
    json::members(text, |key, value| {
        // As Claude Headspace's own hook script calls `cwd`, which goes before it.
        let is_fallback = key == "working_directory";
        let name = KEPT.iter().find(|(name, _)| *name == key).map(|(_, kept)| *kept);
        let Some(name) = name.or(is_fallback.then_some("working_directory")) else { return };
        let Some(found) = json::string(value).filter(|found| !found.text.is_empty()) else { return };
        *is_mended |= found.is_mended;
        if !(is_fallback && kept.contains_key(name)) {
            kept.insert(name.to_owned(), found.text.into_owned().into());
        }
    })
    .ok()?;
    Some(kept)
}

/// The registration that a SessionStart hook stands for. It has the identity that the session's first line would give it,
/// so that whichever comes second is refused. `agent_of`: whose transcript has this path.
pub(crate) fn registration(hook: &Candidate, agent_of: impl Fn(&str) -> Option<Agent>) -> Option<Candidate> {
    let field = |name: &str| hook.payload.get(name).and_then(Value::as_str);
    if hook.event_type != EVENT_TYPE || field("hook_type") != Some("SessionStart") {
        return None;
    }
    let session = field("claude_session_id")?.parse().ok()?;
    let transcript_path = field("transcript_path");
    let facts = SessionFacts {
        agent: transcript_path.and_then(agent_of),
        session,
        cwd: field("working_directory")?,
        git_branch: None,
        transcript_path,
        started_at: Some(hook.timestamp),
    };
    Some(Candidate {
        id: session_registered_event_id(session),
        event_type: "session_registered".to_owned(),
        timestamp: hook.timestamp,
        payload: facts.payload(),
        refs: ForeignKeys::default(),
        origin: Origin::Hook,
    })
}

/// The session whose end a SessionEnd hook tells, and when.
pub(crate) fn session_end(hook: &Candidate) -> Option<(Uuid, Timestamp)> {
    let field = |name: &str| hook.payload.get(name).and_then(Value::as_str);
    if hook.event_type != EVENT_TYPE || field("hook_type") != Some("SessionEnd") {
        return None;
    }
    Some((field("claude_session_id")?.parse().ok()?, hook.timestamp))
}

/// The hook's name in a path: `session-start` → `SessionStart`; what is written so already stays.
pub(crate) fn hook_type_of_path(kind: &str) -> String {
    let mut name = String::new();
    for part in kind.split(['-', '_']) {
        let mut letters = part.chars();
        name.extend(letters.next().map(|first| first.to_ascii_uppercase()));
        name.push_str(letters.as_str());
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn arrival() -> Arrival {
        Arrival {
            id: EventId::derived(b"hook"),
            received_at: Timestamp::UNIX_EPOCH,
            hook_type: None,
            working_directory: None,
            project_path: None,
        }
    }

    fn payload(input: &str, capture: HookCapture) -> Value {
        match record(input.as_bytes(), arrival(), capture, 1 << 20) {
            Record::Event(candidate) => {
                let mut payload = candidate.payload;
                assert_eq!(payload.remove("hook_id"), Some(candidate.id.to_string().into()));
                Value::Object(payload)
            }
            Record::Rejected(rejection) => panic!("{rejection:?}"),
        }
    }

    const TOOL: &str = r#"{"session_id":"s","cwd":"/app","hook_event_name":"PostToolUse","tool_name":"Bash",
        "tool_input":{"command":"secret"},"tool_response":{"stdout":"N\u0000A"},"agent_id":"a1","trigger":null,
        "prompt":"secret","last_assistant_message":"secret","message":7}"#;

    #[test]
    fn a_summary_holds_no_prompt_and_nothing_of_a_tool() {
        assert_eq!(
            payload(TOOL, HookCapture::Summary),
            json!({"claude_session_id": "s", "working_directory": "/app", "hook_type": "PostToolUse",
                   "tool_name": "Bash", "subagent_id": "a1"})
        );
    }

    #[test]
    fn full_capture_adds_the_whole_input_mended_and_marked() {
        let payload = payload(TOOL, HookCapture::Full);
        assert_eq!(payload["data"]["tool_response"]["stdout"], "N\u{fffd}A");
        assert_eq!(payload["data"]["prompt"], "secret");
        assert_eq!(payload["metadata"], json!({"repaired": true}));
        assert_eq!(payload["tool_name"], "Bash");
    }

    #[test]
    fn nesting_that_no_reader_takes_costs_the_data_and_not_the_event() {
        let deep = format!(r#"{{"hook_event_name":"Stop","x":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        let payload = payload(&deep, HookCapture::Full);
        assert_eq!(payload["hook_type"], "Stop");
        assert_eq!(payload["data"], Value::Null);
        assert!(payload["metadata"]["data_omitted"].as_str().unwrap().contains("deeper"));
    }

    #[test]
    fn what_is_no_object_is_rejected_and_its_text_kept_only_in_full() {
        for input in ["", "garbage secret", "[1]", "{\"a\":1", "{} {}", "null"] {
            for (capture, kept) in [(HookCapture::Summary, ""), (HookCapture::Full, input)] {
                let Record::Rejected(rejection) = record(input.as_bytes(), arrival(), capture, 1 << 20) else {
                    panic!("{input} is accepted")
                };
                assert_eq!(String::from_utf8(rejection.bytes).unwrap(), kept);
                assert!(!rejection.failure.message.contains("secret"));
            }
        }
    }

    #[test]
    fn a_path_names_the_hook_where_the_input_does_not() {
        for (kind, name) in [
            ("session-start", "SessionStart"),
            ("user-prompt-submit", "UserPromptSubmit"),
            ("stop", "Stop"),
            ("PostToolUse", "PostToolUse"),
            ("post_tool_use", "PostToolUse"),
        ] {
            assert_eq!(hook_type_of_path(kind), name);
        }
    }

    #[test]
    fn only_a_session_start_registers_and_under_the_identity_of_the_first_line() {
        let session = "11111111-2222-4333-8444-555555555555";
        let hook = |name: &str| {
            let input = json!({"session_id": session, "cwd": "/app", "hook_event_name": name}).to_string();
            match record(input.as_bytes(), arrival(), HookCapture::Summary, 1 << 20) {
                Record::Event(candidate) => registration(&candidate, |_| None),
                Record::Rejected(_) => None,
            }
        };
        let registered = hook("SessionStart").unwrap();
        assert_eq!(registered.id, session_registered_event_id(session.parse().unwrap()));
        assert_eq!(registered.payload["project_path"], "/app");
        assert!(hook("Stop").is_none());
    }
}
