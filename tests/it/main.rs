//! The promises, each against the real program and a real Postgres. Run by `scripts/test.sh`.
//!
//! `stage` sets the scene: a folder with transcripts, a database, the watcher as a process, servers to break. Every
//! other module is a promise or a part of the contract, and the names of its tests are claims.

// In a test a panic is an answer.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod skip;
mod spool;
mod stage;

mod architecture;
mod bad_events;
mod bsd_tools;
mod capture;
mod check;
mod citus;
mod codex;
mod commands;
mod copies;
mod damage;
mod dead_letters;
mod delivery;
mod dev_postgres;
mod docs;
mod emit;
mod explain;
mod fairness;
mod full_disk;
mod health;
mod hooks;
mod hooks_install;
mod http;
mod inside;
mod ledger;
mod logs;
mod looking;
mod memory;
mod metrics;
mod moving_files;
mod neighbours;
mod no_notifications;
mod odd_files;
mod operator_errors;
mod order;
mod outages;
mod page;
mod power_cut;
mod privacy;
mod private_folders;
mod proxy;
mod queue_dump;
mod scaling;
mod services;
mod sessions;
mod several_folders;
mod standby;
mod starting;
mod stopping;
mod supervisor;
mod top;
mod torture;
mod uninstall;
mod verify;
