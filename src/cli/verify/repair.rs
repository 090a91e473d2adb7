//! A last look on disk at what is missing, and `--repair`: what still stands there is sent again. Or `--accept-missing`: it was removed
//! on purpose.
//!
//! A receipt that leads to no row of its event would refuse the event a second time, so it is removed first, on condition
//! that it is still as it was found. Whatever ends us between the two, the event is missing as before, and the next
//! `--repair` sends it; sent twice, the second is refused by the receipt of the first.

use std::path::Path;
use std::sync::Arc;

use crate::event::Candidate;
use crate::intake::Intake;
use crate::intake::redact::Redactor;
use crate::intake::resend::{BYTES_MAX, EVENTS_MAX, Resent};
use crate::intake::schema::Schemas;
use crate::intake::transcripts::census::{Buffer, NoTurns, Sighting};
use crate::queue::{Queue, QueueConfig};
use crate::sink::postgres::{ASKED_MAX, Auditor, StaleReceipt};
use crate::telemetry::Metrics;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, StatusCode};
use serde_json::Value;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::super::client::{self, ClientError};
use super::super::{Context, Exit, Failure, open_queue};
use super::inventory::{Inventory, Standing, progress, set};

/// Sightings on their way from the thread that reads.
const SIGHTINGS_MAX: usize = 64;

/// What the thread that reads has found.
enum Found {
    Sighting(Box<Sighting>),
    /// A transcript can't be read any more; what was in it stays missing.
    Unreadable,
}

/// Looks on disk again for all that is missing, and sends it where there is a sender. What stands there no more is not
/// missing.
pub async fn revisit(inventory: &mut Inventory, mut sender: Option<Sender<'_>>) -> Option<Failure> {
    let mut failure = None;
    let mut files: Vec<u32> = inventory.occurrences.iter().filter(|one| one.is_missing()).map(|one| one.file).collect();
    files.sort_unstable();
    files.dedup();
    let bar = progress("looking at what is missing", files.len() as u64, "{pos}/{len} files");
    let mut batch: Vec<Candidate> = Vec::new();
    let mut batch_bytes = 0;
    let (found, mut findings) = mpsc::channel(SIGHTINGS_MAX);
    let reading = read(inventory, &files, found);
    while let Some((file, finding)) = findings.recv().await {
        bar.set_position(files.partition_point(|known| *known < file) as u64);
        let sighting = match finding {
            Found::Sighting(sighting) => sighting,
            Found::Unreadable => {
                let missing = inventory.occurrences.iter_mut().filter(|one| one.file == file && one.is_missing());
                missing.for_each(|one| one.is_confirmed = true);
                continue;
            }
        };
        let group = inventory.group(sighting.candidate.id.0);
        if !group.iter().all(|one| one.is_missing() && !one.is_confirmed) {
            continue;
        }
        let Some(index) = group.iter().position(|one| one.file == file) else { continue };
        if let Some(one) = group.get_mut(index) {
            one.is_confirmed = true;
            one.offset = sighting.offset;
        }
        if sender.is_some() {
            batch_bytes += sighting.candidate.payload.get("text").and_then(Value::as_str).map_or(0, str::len);
            batch.push(sighting.candidate);
        }
        if let Some(sending) = &sender
            && (batch.len() >= EVENTS_MAX || batch_bytes >= BYTES_MAX)
        {
            batch_bytes = 0;
            if let Err(problem) = send(inventory, sending, std::mem::take(&mut batch)).await {
                failure = Some(problem);
                sender = None;
            }
        }
    }
    // It ends with its channel; what made it panic would have been told.
    let _ = reading.await;
    if let Some(sending) = &sender
        && !batch.is_empty()
        && let Err(problem) = send(inventory, sending, batch).await
    {
        failure = Some(problem);
    }
    if let Some(sender) = sender
        && let Err(problem) = sender.close()
    {
        failure = failure.or(Some(problem));
    }
    bar.finish_and_clear();
    for group in inventory.occurrences.chunk_by_mut(|a, b| a.id == b.id) {
        if group.iter().all(|one| one.is_missing() && !one.is_confirmed) {
            set(group, Standing::Vanished);
        }
    }
    failure
}

/// Takes rows that are gone for removed on purpose. Where the receipt is gone, too, nothing can say so.
pub async fn accept(inventory: &mut Inventory, auditor: &Auditor) -> Result<(), Failure> {
    let mut ids: Vec<Uuid> = inventory.occurrences.iter().filter(|one| one.is_missing()).map(|one| one.id).collect();
    ids.dedup();
    for ids in ids.chunks(ASKED_MAX) {
        let receipts = auditor.find(ids).await.map_err(unaccepted)?;
        let gone: Vec<(Uuid, i64)> =
            receipts.iter().filter_map(|(id, receipt)| Some((*id, receipt.row_id()?))).collect();
        for id in auditor.accept_removed(&gone).await.map_err(unaccepted)? {
            set(inventory.group(id), Standing::Removed);
        }
    }
    Ok(())
}

fn unaccepted(error: crate::sink::DeliverError) -> Failure {
    match error.sqlstate.as_deref() {
        Some("42501") => Failure::new(
            Exit::Configuration,
            format!("could not note what was removed: {}; GRANT UPDATE ON event_receipts to this user", error.message),
        ),
        _ => Failure::new(Exit::Unavailable, format!("could not note what was removed: {error}; repeat it")),
    }
}

/// Reads these files on a thread of their own, from which each missing event comes when its turn is.
fn read(inventory: &Inventory, files: &[u32], found: mpsc::Sender<(u32, Found)>) -> tokio::task::JoinHandle<()> {
    let mut missing: Vec<Uuid> =
        inventory.occurrences.iter().filter(|one| one.is_missing()).map(|one| one.id).collect();
    missing.dedup();
    let transcripts: Vec<_> = files
        .iter()
        .filter_map(|file| inventory.transcripts.get(*file as usize).map(|transcript| (*file, transcript.main.clone())))
        .collect();
    let census = inventory.census.clone();
    tokio::task::spawn_blocking(move || {
        let mut buffer = Buffer::default();
        for (file, main) in transcripts {
            let read = census.read(&main, None, &mut buffer, &mut NoTurns::new(), |sighting| {
                if missing.binary_search(&sighting.candidate.id.0).is_ok() {
                    // Who does not listen any more has ended.
                    let _ = found.blocking_send((file, Found::Sighting(Box::new(sighting))));
                }
            });
            if read.is_err() {
                let _ = found.blocking_send((file, Found::Unreadable));
            }
        }
    })
}

/// Sends a batch and notes what became of it.
async fn send(inventory: &mut Inventory, sender: &Sender<'_>, batch: Vec<Candidate>) -> Result<(), Failure> {
    let ids: Vec<Uuid> = batch.iter().map(|candidate| candidate.id.0).collect();
    sender.send(batch).await?;
    for id in ids {
        let group = inventory.group(id);
        if let Some(Standing::Missing(absence)) = group.first().map(|one| one.standing) {
            set(group, Standing::SentAgain(absence));
        }
    }
    Ok(())
}

/// Sends events again.
pub struct Sender<'a> {
    auditor: &'a Auditor,
    door: Door<'a>,
}

enum Door<'a> {
    Watcher(&'a Path),
    Queue { queue: Queue, intake: Intake },
}

impl<'a> Sender<'a> {
    /// Through the running watcher, else into the queue that nobody holds.
    pub async fn open(context: &'a Context, auditor: &'a Auditor) -> Result<Sender<'a>, Failure> {
        let config = context.config();
        let door = match client::get(&config.http.socket, "/livez").await {
            Ok(_) => Door::Watcher(&config.http.socket),
            Err(ClientError::NotRunning) => {
                let schemas = Schemas::load(config.schemas.path.as_deref(), config.event_system.max_event_bytes)
                    .map_err(|error| Failure::new(Exit::Configuration, error))?;
                let redactor =
                    Redactor::new(&config.redact).map_err(|error| Failure::new(Exit::Configuration, error))?;
                let queue = open_queue(&QueueConfig {
                    path: config.queue.path.clone(),
                    max_pending_bytes: config.queue.max_pending_bytes,
                })?;
                let intake = Intake::new(schemas, queue.clone(), redactor, Arc::new(Metrics::default()));
                Door::Queue { queue, intake }
            }
            Err(ClientError::NoAnswer(problem)) => return Err(no_answer(&config.http.socket, &problem)),
        };
        Ok(Sender { auditor, door })
    }

    /// Durable on return.
    async fn send(&self, batch: Vec<Candidate>) -> Result<(), Failure> {
        let ids: Vec<Uuid> = batch.iter().map(|candidate| candidate.id.0).collect();
        let receipts = self.auditor.find(&ids).await.map_err(unsent)?;
        let stale: Vec<StaleReceipt> = batch
            .iter()
            .filter_map(|candidate| {
                let row_id = receipts.get(&candidate.id.0)?.row_id()?;
                let identity = match candidate.event_type.as_str() {
                    "session_registered" => candidate.payload.get("session_uuid"),
                    _ => candidate.payload.get("turn_uuid"),
                };
                Some(StaleReceipt {
                    event_id: candidate.id.0,
                    row_id,
                    event_type: candidate.event_type.clone(),
                    identity: identity.and_then(Value::as_str).map(str::to_owned),
                })
            })
            .collect();
        if !stale.is_empty() {
            self.auditor.forget_stale(&stale).await.map_err(|error| match error.sqlstate.as_deref() {
                Some("42501") => Failure::new(
                    Exit::Configuration,
                    format!(
                        "could not remove {} receipts whose rows are gone: {}; GRANT DELETE ON event_receipts to this user",
                        stale.len(),
                        error.message
                    ),
                ),
                _ => unsent(error),
            })?;
        }
        match &self.door {
            Door::Queue { intake, .. } => Ok(intake.resend(batch)?),
            Door::Watcher(socket) => post(socket, &batch).await,
        }
    }

    fn close(self) -> Result<(), Failure> {
        match self.door {
            Door::Watcher(_) => Ok(()),
            Door::Queue { queue, .. } => Ok(queue.close()?),
        }
    }
}

async fn post(socket: &Path, batch: &[Candidate]) -> Result<(), Failure> {
    let mut lines = Vec::new();
    for resent in batch.iter().filter_map(Resent::of) {
        serde_json::to_writer(&mut lines, &resent).map_err(|error| Failure::new(Exit::Internal, error))?;
        lines.push(b'\n');
    }
    let request = client::request(Method::POST, "/transcripts").header("content-type", "application/x-ndjson");
    let request = request.body(Full::from(Bytes::from(lines)).boxed_unsync());
    let request = request.map_err(|error| Failure::new(Exit::Internal, error))?;
    let answer = async {
        let response = client::send(socket, request).await?;
        Ok((response.status(), client::body(response).await?))
    };
    match answer.await {
        Ok((StatusCode::ACCEPTED, _)) => Ok(()),
        Ok((code, body)) => {
            let problem = client::problem(code, &body);
            Err(Failure::new(Exit::Io, format!("could not send all again: {problem}; then repeat it")))
        }
        Err(ClientError::NotRunning) => Err(no_answer(socket, "it has just ended")),
        Err(ClientError::NoAnswer(problem)) => Err(no_answer(socket, &problem)),
    }
}

fn unsent(error: crate::sink::DeliverError) -> Failure {
    Failure::new(Exit::Unavailable, format!("could not send all again: {error}; repeat it when the database is back"))
}

fn no_answer(socket: &Path, problem: &str) -> Failure {
    let socket = socket.display();
    Failure::new(Exit::Unavailable, format!("the watcher on {socket} does not answer: {problem}; repeat it"))
}
