//! A last look on disk at what is missing, and `--repair`: what still stands there is sent again, by the spool. Or
//! `--accept-missing`: it was removed on purpose.
//!
//! A receipt that leads to no row of its event would refuse the event a second time, so it is removed first, on condition
//! that it is still as it was found. Whatever ends us between the two, the event is missing as before, and the next
//! `--repair` sends it; sent twice, the second is refused by the receipt of the first.
//!
//! What is sent has the identity and the place that reading it gives. No cursor moves.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;
use uuid::Uuid;

use super::inventory::{Inventory, Standing, set};
use super::{VerifyError, progress};
use crate::client;
use crate::config::Config;
use crate::event::{Candidate, Record};
use crate::intake::redact::Redactor;
use crate::intake::spool::{Draft, Spool, SpoolError};
use crate::intake::transcripts::census::NoTurns;
use crate::sink::DeliverError;
use crate::sink::postgres::{ASKED_MAX, Auditor, StaleReceipt};

const INSUFFICIENT_PRIVILEGE: &str = "42501";

/// Looks on disk again for all that is missing, and sends it where there is a sender. What stands there no more is not
/// missing.
pub(super) async fn revisit(inventory: &mut Inventory, mut sender: Option<Sender<'_>>) -> Result<(), VerifyError> {
    let files: BTreeSet<u32> =
        inventory.occurrences.iter().filter(|one| one.is_missing()).map(|one| one.file).collect();
    let bar = progress("looking at what is missing", files.len() as u64, "{pos}/{len} files");
    let census = inventory.census.clone();
    for file in files {
        let Some(transcript) = inventory.transcripts.get(file as usize) else { continue };
        let main = transcript.main.clone();
        let read = census.read(&main, None, &mut NoTurns::new(), |sighting| {
            if inventory.confirm(file, &sighting)
                && let Some(sender) = &mut sender
            {
                sender.add(sighting.candidate);
            }
        });
        if read.is_err() {
            // What was in it stays missing.
            let missing = inventory.occurrences.iter_mut().filter(|one| one.file == file && one.is_missing());
            missing.for_each(|one| one.is_confirmed = true);
        }
        if let Some(sender) = sender.as_mut().filter(|sender| sender.is_full()) {
            sender.send(inventory).await;
        }
        bar.inc(1);
    }
    if let Some(sender) = &mut sender {
        sender.send(inventory).await;
    }
    bar.finish_and_clear();
    for group in inventory.occurrences.chunk_by_mut(|a, b| a.id == b.id) {
        if group.iter().all(|one| one.is_missing() && !one.is_confirmed) {
            set(group, Standing::Vanished);
        }
    }
    sender.map_or(Ok(()), |sender| sender.outcome)
}

/// Takes rows that are gone for removed on purpose. Where the receipt is gone, too, nothing can say so.
pub(super) async fn accept(inventory: &mut Inventory, auditor: &Auditor) -> Result<(), VerifyError> {
    let mut ids: Vec<Uuid> = inventory.occurrences.iter().filter(|one| one.is_missing()).map(|one| one.id).collect();
    ids.dedup();
    for ids in ids.chunks(ASKED_MAX) {
        let receipts = auditor.find(ids).await.map_err(not_accepted)?;
        let gone: Vec<(Uuid, i64)> =
            receipts.iter().filter_map(|(id, receipt)| Some((*id, receipt.row_id()?))).collect();
        for id in auditor.accept_removed(&gone).await.map_err(not_accepted)? {
            set(inventory.group(id), Standing::Removed);
        }
    }
    Ok(())
}

fn not_accepted(error: DeliverError) -> VerifyError {
    match error.sqlstate.as_deref() {
        Some(INSUFFICIENT_PRIVILEGE) => VerifyError::MayNotAccept(error.message),
        _ => VerifyError::NotAccepted(error),
    }
}

/// Sends events again, a file of the spool at a time, until the first failure.
pub(super) struct Sender<'a> {
    auditor: &'a Auditor,
    spool: Spool,
    /// What may wait in the spool.
    spool_bytes_max: u64,
    redactor: Redactor,
    socket: &'a Path,
    batch: Option<Batch>,
    outcome: Result<(), VerifyError>,
}

impl<'a> Sender<'a> {
    pub(super) fn new(config: &'a Config, auditor: &'a Auditor) -> Result<Sender<'a>, VerifyError> {
        Ok(Sender {
            auditor,
            spool: Spool::new(&config.queue.spool_path),
            spool_bytes_max: config.queue.max_pending_bytes,
            redactor: Redactor::new(&config.redact)?,
            socket: &config.http.socket,
            batch: None,
            outcome: Ok(()),
        })
    }

    fn add(&mut self, candidate: Candidate) {
        if self.outcome.is_ok()
            && let Err(error) = self.try_add(candidate)
        {
            self.batch = None;
            self.outcome = Err(error.into());
        }
    }

    fn try_add(&mut self, candidate: Candidate) -> Result<(), SpoolError> {
        let batch = match &mut self.batch {
            Some(batch) => batch,
            none => {
                let draft = self.spool.draft(Some(self.spool_bytes_max))?;
                none.insert(Batch { draft, events: Vec::new() })
            }
        };
        let field = if candidate.event_type == "session_registered" { "session_uuid" } else { "turn_uuid" };
        batch.events.push(SentEvent {
            id: candidate.id.0,
            event_type: candidate.event_type.clone(),
            identity: candidate.payload.get(field).and_then(Value::as_str).map(str::to_owned),
        });
        batch.draft.add(&self.redactor.record(Record::Event(candidate)))
    }

    fn is_full(&self) -> bool {
        self.batch.as_ref().is_some_and(|batch| batch.events.len() >= ASKED_MAX)
    }

    /// Sends what was added, and notes what became of it.
    async fn send(&mut self, inventory: &mut Inventory) {
        let Some(batch) = self.batch.take() else { return };
        let ids: Vec<Uuid> = batch.events.iter().map(|event| event.id).collect();
        self.outcome = self.publish(batch).await;
        for id in ids.into_iter().filter(|_| self.outcome.is_ok()) {
            let group = inventory.group(id);
            if let Some(Standing::Missing(absence)) = group.first().map(|one| one.standing) {
                set(group, Standing::SentAgain(absence));
            }
        }
    }

    /// Durable on return.
    async fn publish(&self, batch: Batch) -> Result<(), VerifyError> {
        for events in batch.events.chunks(ASKED_MAX) {
            self.forget_stale(events).await?;
        }
        batch.draft.publish()?;
        // Where no watcher runs, the next one looks into the spool when it starts.
        let _ = client::notify(self.socket);
        Ok(())
    }

    async fn forget_stale(&self, events: &[SentEvent]) -> Result<(), VerifyError> {
        let ids: Vec<Uuid> = events.iter().map(|event| event.id).collect();
        let receipts = self.auditor.find(&ids).await.map_err(VerifyError::NotSent)?;
        let stale = events.iter().filter_map(|SentEvent { id, event_type, identity }| {
            let row_id = receipts.get(id)?.row_id()?;
            Some(StaleReceipt { event_id: *id, row_id, event_type: event_type.clone(), identity: identity.clone() })
        });
        let stale: Vec<StaleReceipt> = stale.collect();
        if stale.is_empty() {
            return Ok(());
        }
        match self.auditor.forget_stale(&stale).await {
            Ok(_) => Ok(()),
            Err(error) if error.sqlstate.as_deref() == Some(INSUFFICIENT_PRIVILEGE) => {
                Err(VerifyError::MayNotForget { count: stale.len(), message: error.message })
            }
            Err(error) => Err(VerifyError::NotSent(error)),
        }
    }
}

struct Batch {
    draft: Draft,
    events: Vec<SentEvent>,
}

/// What a stale receipt is told by.
struct SentEvent {
    id: Uuid,
    event_type: String,
    identity: Option<String>,
}
