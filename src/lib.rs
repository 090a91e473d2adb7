//! A durable outbox pipeline: from what happens in Claude Code sessions to rows in Postgres, exactly once, in order.
//!
//! ```text
//!  ~/.claude/projects/**/*.jsonl, ~/.codex/sessions/**/rollout-*.jsonl
//!         │ notified, checked, rescanned
//!         ▼
//!  intake/transcripts ─► agent ─► Intake      ◄── schemas/*.json
//!                                         │ events + rejections + cursor: one commit, one real fsync
//!                                         ▼
//!                                       queue     pending · dead letters · cursors
//!                                         │ a window of the oldest durable envelopes
//!                                         ▼
//!                                     sink/drain ── verdict? ──► pause and retry, or set aside
//!                                         │ one transaction per event, pipelined, in order
//!                                         ▼
//!                                      Postgres   events + event_receipts
//! ```
//!
//! # Promises
//!
//! Each has tests that were seen to fail (`tests/it`, and beside the code).
//!
//! 1. Nothing unchecked is queued: only [`intake::schema::Schemas::check`] makes an [`event::Event`].
//! 2. A cursor never runs ahead of its events: they are one commit.
//! 3. Acknowledged means durable against power loss, and nothing leaves the queue before it is durable.
//! 4. Nothing is removed before Postgres has durably committed it.
//! 5. Repeating any step is harmless: identities are derived, the receipt refuses a second copy.
//! 6. The order in the table is the order of acceptance, also when one transaction of a window fails.
//! 7. Only the database's verdict on *this event* sets it aside; never a clock, never an unknown code.
//! 8. A storage error ends the process (fail-stop); the supervisor starts it again.
//! 9. Everything has a limit, and every wait ends on `stop`.
//! 10. Nobody but the owner reads or changes anything without the token.
//! 11. A start that fails removes and overwrites nothing of anybody ([`service::socket`]).
//! 12. A hang of the program is told from whatever a restart would not change ([`health::HealthSource::is_alive`]).
//!
//! # Layers
//!
//! `main → cli → service → http → intake | sink → agent → claude | codex → session | queue → event`; [`config`], [`telemetry`], [`json`],
//! [`private_folder`], [`regular_file`] and `finding` are leaves, open to all. `verify` sees intake, sink and queue and is seen by cli
//! alone; `source` is the queue for those who only look.
//! `intake` and `sink` never see each other. One outside crate is known in one place. `tests/it/architecture.rs` reads
//! the sources and checks it. Only [`cli`] is for the outside; `internals` is for benchmarks and tests.

#![warn(unreachable_pub)]
// The documentation is for who works on the program.
#![allow(rustdoc::private_intra_doc_links)]

mod agent;
mod claude;
pub mod cli;
mod client;
mod codex;
mod config;
mod event;
mod faults;
mod finding;
mod health;
mod history;
mod http;
mod intake;
#[doc(hidden)]
pub mod internals;
mod json;
mod listing;
mod private_folder;
mod queue;
mod regular_file;
mod service;
mod session;
mod sink;
#[cfg(test)]
#[path = "../tests/it/skip.rs"]
mod skip;
mod source;
mod telemetry;
mod transcript;
mod verify;
