//! All that knows Claude Code: its files, their formats, and what they mean.
//!
//! [`line`](mod@line) says what a line of a transcript means by itself, [`provenance`] who said it, [`repair`] finds what is whole on a damaged one,
//! [`copies`] which of several files a line was said in, [`transcript`] makes events of lines in their order, [`hook`] makes events of what hooks are given. [`settings`] puts our hook into Claude Code's settings, and
//! [`retention`] says how long it keeps transcripts.
//!
//! Pure: time and the bytes of files are arguments. Of ours it knows events, sessions, JSON and plain configuration, nothing else;
//! [`agent`](crate::agent) is how the rest asks it.

pub(crate) mod copies;
pub(crate) mod explain;
mod fields;
pub(crate) mod hook;
pub(crate) mod line;
pub(crate) mod provenance;
pub(crate) mod repair;
pub(crate) mod retention;
pub(crate) mod settings;
pub(crate) mod transcript;
