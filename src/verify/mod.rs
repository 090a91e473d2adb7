//! `verify`: proves for each turn on disk that it is in Postgres, in the queue or among the dead letters.
//!
//! # Right while everything moves
//!
//! An event goes one way: from its transcript (when it is sent again: by the spool) into the queue, and from there into
//! Postgres or to the dead letters. So we look in this order, and whatever moves on while we look is met further down:
//!
//! 1. cursors: what stands before them was handed to the queue durably; what comes after them is *not yet read*;
//! 2. the transcripts, each up to its size at that moment, from their first byte, by the follower's own rules;
//! 3. what waits in the spool and in the queue, and the dead letters;
//! 4. Postgres: receipts, and the rows that they lead to.
//!
//! What is in none of them is looked for again ([`CONFIRMATIONS`] times), then among rows that have lost their receipt, and
//! at last on disk: only what still stands there is called missing.
//!
//! # Memory
//!
//! 32 bytes for each turn on disk, some 30 for each pending event, and one page of whatever is read.

mod inventory;
mod repair;
mod report;
mod waiting;

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use thiserror::Error;

use self::inventory::Inventory;
use self::repair::Sender;
pub(crate) use self::report::{ConflictingLines, Counts, IncompleteLine, MissingLine, Report};
use crate::config::Config;
use crate::event::Timestamp;
use crate::intake::redact::PatternError;
use crate::intake::spool::SpoolError;
use crate::sink::DeliverError;
use crate::sink::postgres::{Auditor, ConnectSettings};
use crate::source::SourceError;

/// How often what was found nowhere is looked for again.
const CONFIRMATIONS: u32 = 2;

/// What is done about events that are missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Remedy {
    None,
    /// They are sent again, through the spool.
    Repair,
    /// Rows that are gone count as removed on purpose.
    Accept,
}

#[derive(Debug, Error)]
pub(crate) enum VerifyError {
    #[error("could not ask what waits: {0}")]
    Source(#[from] SourceError),
    #[error("could not ask what waits: could not read the spool {folder}: {error}; correct its owner or mode")]
    Spool { folder: String, error: std::io::Error },
    #[error("could not ask the database, so nothing is proved: {0}")]
    Database(#[from] DeliverError),
    #[error(transparent)]
    Redact(#[from] PatternError),
    #[error("could not send all again: {0}")]
    NotSpooled(#[from] SpoolError),
    #[error("could not send all again: {0}; repeat it when the database is back")]
    NotSent(DeliverError),
    #[error(
        "could not remove {count} receipts whose rows are gone: {message}; GRANT DELETE ON event_receipts to this user"
    )]
    MayNotForget { count: usize, message: String },
    #[error("could not note what was removed: {0}; repeat it")]
    NotAccepted(DeliverError),
    #[error("could not note what was removed: {0}; GRANT UPDATE ON event_receipts to this user")]
    MayNotAccept(String),
}

/// What was found, and what kept us from finding or doing the rest.
pub(crate) struct Verification {
    inventory: Inventory,
    pub(crate) error: Option<VerifyError>,
}

impl Verification {
    pub(crate) fn report(&mut self) -> Report<'_> {
        Report::of(&mut self.inventory, self.error.as_ref().map(ToString::to_string))
    }
}

/// Looks for all that stands on disk since then.
pub(crate) async fn verify(
    config: &Config,
    database: &ConnectSettings,
    since: Option<Timestamp>,
    remedy: Remedy,
) -> Result<Verification, VerifyError> {
    let mut inventory = Inventory::take(config, since).await?;
    let outcome = match look(config, database, &mut inventory).await {
        Ok(auditor) if inventory.is_anything_missing() => {
            let sender = if remedy == Remedy::Repair { Some(Sender::new(config, &auditor)?) } else { None };
            let revisited = repair::revisit(&mut inventory, sender).await;
            if remedy == Remedy::Accept { repair::accept(&mut inventory, &auditor).await } else { revisited }
        }
        Ok(_) => Ok(()),
        Err(VerifyError::Database(error)) => {
            let waiting = waiting::waiting(config, &inventory.files).await?;
            inventory.place_without_postgres(&waiting);
            Err(VerifyError::Database(error))
        }
        Err(error) => return Err(error),
    };
    Ok(Verification { inventory, error: outcome.err() })
}

/// Finds each event's place.
async fn look(config: &Config, database: &ConnectSettings, inventory: &mut Inventory) -> Result<Auditor, VerifyError> {
    let waiting = waiting::waiting(config, &inventory.files).await?;
    let auditor = Auditor::connect(database).await?;
    inventory.place(&auditor, &waiting, false).await?;
    for _ in 0..CONFIRMATIONS {
        if !inventory.is_anything_missing() {
            break;
        }
        let waiting = waiting::waiting(config, &inventory.files).await?;
        inventory.place(&auditor, &waiting, true).await?;
    }
    if inventory.is_anything_missing() {
        inventory.find_without_receipt(&auditor).await?;
    }
    inventory.is_asked = true;
    Ok(auditor)
}

/// A bar on a terminal, nothing elsewhere.
fn progress(what: &'static str, length: u64, unit: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = if length == 0 { "{spinner}" } else { "{bar:32}" };
    let style = ProgressStyle::with_template(&format!("{{elapsed_precise}} {bar} {unit} {{msg}}"));
    ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())).with_message(what)
}
