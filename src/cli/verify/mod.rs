//! `verify`: proves for each turn on disk that it is in Postgres, in the queue or among the dead letters.
//!
//! # Right while everything moves
//!
//! An event goes one way: from its transcript into the queue, and from there into Postgres or to the dead letters. So we
//! look in this order, and whatever moves on while we look is met further down:
//!
//! 1. cursors: what stands before them was handed to the queue durably; what comes after them is *not yet read*;
//! 2. the transcripts, each up to its size at that moment, from their first byte, by the follower's own rules;
//! 3. what waits in the queue and what was set aside;
//! 4. Postgres: receipts, and the rows that they lead to.
//!
//! What is in none of them is looked for again ([`CONFIRMATIONS`] times), then among rows that have lost their receipt, and
//! at last on disk: only what still stands there is called missing.
//!
//! # Memory
//!
//! 32 bytes for each turn on disk, 16 for each pending event, and one page of whatever is read.

mod inventory;
mod repair;
mod report;
mod waiting;

use crate::event::Timestamp;
use crate::service::connect_settings;
use crate::sink::DeliverError;
use crate::sink::postgres::{Auditor, inspect};
use jiff::SignedDuration;

use self::inventory::Inventory;
use self::repair::Sender;
use self::report::Report;
use super::{Context, Exit, Failure, VerifyArguments, block_on, written};

/// How often what was found nowhere is looked for again.
const CONFIRMATIONS: u32 = 2;

/// The oldest that `--since` takes.
const SINCE_DAYS_MAX: i64 = 365_000;

pub fn verify(context: &Context, arguments: &VerifyArguments) -> Result<Exit, Failure> {
    block_on(run(context, arguments))?
}

/// Reads `--since`.
pub fn since(text: &str) -> Result<Timestamp, String> {
    let days = text.strip_suffix('d').and_then(|days| days.parse::<i64>().ok());
    let since = match days {
        Some(days) if (0..=SINCE_DAYS_MAX).contains(&days) => {
            Some(Timestamp::now().checked_sub(SignedDuration::from_hours(days * 24)).unwrap_or(Timestamp::MIN))
        }
        Some(_) => None,
        None => text.parse().ok(),
    };
    since.ok_or_else(|| "expected a time with its zone (2026-01-02T03:04:05Z) or days (90d)".to_owned())
}

async fn run(context: &Context, arguments: &VerifyArguments) -> Result<Exit, Failure> {
    let mut inventory = Inventory::take(context, arguments.since).await?;
    let mut failure = None;
    match look(context, &mut inventory).await {
        Ok(auditor) if inventory.is_anything_missing() => {
            let sender = match arguments.repair {
                true => Some(Sender::open(context, &auditor).await?),
                false => None,
            };
            failure = repair::revisit(&mut inventory, sender).await;
            if arguments.repair {
                note_triggers(context).await;
            }
            if arguments.accept_missing {
                failure = repair::accept(&mut inventory, &auditor).await.err();
            }
        }
        Ok(_) => {}
        Err(Unasked::Waiting(failure)) => return Err(failure),
        Err(Unasked::Postgres(error)) => {
            let waiting = waiting::waiting(context, &inventory.files).await?;
            inventory.place_without_postgres(&waiting);
            let message = format!("could not ask the database, so nothing is proved: {error}");
            failure = Some(Failure::new(Exit::Unavailable, message));
        }
    }
    let report = Report::of(&mut inventory);
    written(report.write(&inventory, arguments.json, failure.as_ref()))?;
    match failure {
        Some(failure) => Err(failure),
        None if report.is_all_there() && inventory.unreadable.is_empty() => Ok(Exit::Fine),
        None => Ok(Exit::CheckFailed),
    }
}

/// What was sent again waits in the queue where a trigger drops its row.
async fn note_triggers(context: &Context) {
    let Ok((target, _)) = context.target() else { return };
    if let Ok(database) = inspect(&connect_settings(context.config(), target)).await
        && !database.triggers.is_empty()
    {
        let triggers = database.triggers.join(", ");
        eprintln!("note: triggers run before a row is inserted: {triggers}; what one of them drops waits in the queue");
    }
}

/// Who could not be asked.
enum Unasked {
    Postgres(DeliverError),
    Waiting(Failure),
}

impl From<DeliverError> for Unasked {
    fn from(error: DeliverError) -> Self {
        Unasked::Postgres(error)
    }
}

impl From<Failure> for Unasked {
    fn from(failure: Failure) -> Self {
        Unasked::Waiting(failure)
    }
}

/// Finds each event's place.
async fn look(context: &Context, inventory: &mut Inventory) -> Result<Auditor, Unasked> {
    let waiting = waiting::waiting(context, &inventory.files).await?;
    let (target, _) = context.target()?;
    let auditor = Auditor::connect(&connect_settings(context.config(), target)).await?;
    inventory.place_all(&auditor, &waiting).await?;
    for _ in 0..CONFIRMATIONS {
        if !inventory.is_anything_missing() {
            break;
        }
        let waiting = waiting::waiting(context, &inventory.files).await?;
        inventory.place_missing(&auditor, &waiting).await?;
    }
    if inventory.is_anything_missing() {
        inventory.find_without_receipt(&auditor).await?;
    }
    inventory.is_asked = true;
    Ok(auditor)
}
