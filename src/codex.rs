//! All that knows the Codex CLI: its rollout files and what their lines mean.
//!
//! [`line`](mod@line) reads one line, [`rollout`] puts it beside what the lines before it said.
//!
//! The format is no stable interface of Codex: what is relied on is listed where it is read. Pure: time and the bytes of files
//! are arguments. Of ours it knows events and JSON, nothing else.
#![allow(dead_code, reason = "nothing reads rollouts yet")]

mod line;
pub(crate) mod rollout;
