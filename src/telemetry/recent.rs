//! The last captured events, for the page and `top`. Names only: no text of a payload is kept.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::lock;
use crate::event::{Event, Timestamp};

/// Events that are remembered.
const EVENTS_MAX: usize = 20;

/// A larger payload is not searched for names.
const PAYLOAD_BYTES_MAX: usize = 16 * 1024;

/// One captured event.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct RecentEvent {
    /// This, `session`, `project` and `detail` are null for callers without the token.
    pub(crate) event_id: Option<String>,
    pub(crate) event_type: String,
    pub(crate) timestamp: String,
    pub(crate) captured_at: String,
    pub(crate) origin: String,
    pub(crate) session: Option<String>,
    /// The last folder of the project's path.
    pub(crate) project: Option<String>,
    /// Who, what or how, in some words: a turn's actor and kind, a hook's type and tool, an end's reason; and the agent
    /// where it is not Claude Code.
    pub(crate) detail: Option<String>,
}

impl RecentEvent {
    /// The last of `events`, oldest first.
    pub(crate) fn last_of(events: &[Event], now: Timestamp) -> Vec<RecentEvent> {
        let skipped = events.len().saturating_sub(EVENTS_MAX);
        events.iter().skip(skipped).map(|event| RecentEvent::new(event, now)).collect()
    }

    fn new(event: &Event, now: Timestamp) -> RecentEvent {
        let payload = Some(event.payload().as_json()).filter(|payload| payload.len() <= PAYLOAD_BYTES_MAX);
        let payload: Value = payload.and_then(|payload| serde_json::from_str(payload).ok()).unwrap_or_default();
        let field =
            |names: &[&str]| names.iter().find_map(|name| payload.get(name).and_then(Value::as_str)).map(str::to_owned);
        let agent = field(&["agent"]).filter(|agent| agent != "claude-code");
        let words = [field(&["actor", "hook_type", "to_state", "reason"]), field(&["kind", "tool_name"]), agent];
        let words: Vec<String> = words.into_iter().flatten().collect();
        RecentEvent {
            event_id: Some(event.id().to_string()),
            event_type: event.event_type().to_string(),
            timestamp: event.timestamp().to_string(),
            captured_at: now.to_string(),
            origin: event.origin().kind().to_owned(),
            session: field(&["session_uuid", "claude_session_id"]),
            project: field(&["project_path"]).as_deref().and_then(last_folder),
            detail: Some(words.join(" ")).filter(|words| !words.is_empty()),
        }
    }

    /// What callers without the token may see of it.
    pub(crate) fn without_names(self) -> RecentEvent {
        RecentEvent { event_id: None, session: None, project: None, detail: None, ..self }
    }
}

fn last_folder(path: &str) -> Option<String> {
    Path::new(path).file_name().map(|name| name.to_string_lossy().into_owned())
}

#[derive(Default, Debug)]
pub(crate) struct RecentEvents(Mutex<VecDeque<RecentEvent>>);

impl RecentEvents {
    /// Adds events, oldest first.
    pub(crate) fn extend(&self, events: Vec<RecentEvent>) {
        let mut recent = lock(&self.0);
        recent.extend(events);
        let surplus = recent.len().saturating_sub(EVENTS_MAX);
        recent.drain(..surplus);
    }

    /// All of them, newest first.
    pub(crate) fn list(&self) -> Vec<RecentEvent> {
        lock(&self.0).iter().rev().cloned().collect()
    }
}
