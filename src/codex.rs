//! All that knows the Codex CLI: its rollout files and what their lines mean.
//!
//! [`line`](mod@line) reads one line, [`rollout`] puts it beside what the lines before it said,
//! and [`transcript`] makes events of it.
//!
//! The format is no stable interface of Codex: what is relied on is listed where it is read. Pure: time and the bytes of files
//! are arguments. Of ours it knows events and JSON, nothing else.

/// The folder beside that of the sessions where those are that were put away.
pub(crate) const ARCHIVE: &str = "archived_sessions";

/// The events that are hooked: those that all versions with stable hooks know.
pub(crate) const HOOK_EVENTS: &[&str] = &[
    "SessionStart",
    "UserPromptSubmit",
    "PreToolUse",
    "PermissionRequest",
    "PostToolUse",
    "SubagentStop",
    "PreCompact",
    "Stop",
    "SessionEnd",
];

mod line;
pub(crate) mod rollout;
pub(crate) mod transcript;
