//! Everything that stands on disk, and where else each of it was found.

use std::path::{Path, PathBuf};

use crate::agent;
use crate::config::Config;
use crate::event::{Candidate, EventId, Timestamp};
use crate::intake::retention::Retention;
use crate::intake::transcripts::census::{Census, Extent, MainTranscript, NoTurns, Sighting};
use crate::session::{event_id_of_turn, session_registered_event_id};
use crate::sink::DeliverError;
use crate::sink::postgres::{ASKED_MAX, AuditedRow, Auditor, Receipt};
use crate::source::SourceError;
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

use super::progress;
use super::waiting::{self, Files, Waiting};

/// Everything that stands on disk.
pub(super) struct Inventory {
    pub(super) census: Census,
    /// The transcripts, in the order in which they were read.
    pub(super) transcripts: Vec<Transcript>,
    pub(super) files: Files,
    pub(super) sub_agents: u64,
    /// What can't be read, and why.
    pub(super) unreadable: Vec<(PathBuf, String)>,
    /// Projects folders that do not exist.
    pub(super) missing_folders: Vec<PathBuf>,
    pub(super) no_turns: NoTurns,
    /// Sorted by identity, then in the order of reading.
    pub(super) occurrences: Vec<Occurrence>,
    /// Postgres has told of all of them.
    pub(super) is_asked: bool,
    pub(super) retention: Retention,
}

pub(super) struct Transcript {
    pub(super) main: MainTranscript,
    /// `None`: it could not be read, or was gone.
    pub(super) extent: Option<Extent>,
}

/// A turn or a registration at one place on disk; in copies of a session the same stands at several.
pub(super) struct Occurrence {
    pub(super) id: Uuid,
    pub(super) offset: u64,
    pub(super) file: u32,
    /// By which different texts under one identity are told apart.
    pub(super) text_hash: u32,
    /// The same for all occurrences.
    pub(super) standing: Standing,
    pub(super) is_registration: bool,
    /// The follower's cursor is past it.
    pub(super) is_read: bool,
    /// It was looked at again, and still stands there.
    pub(super) is_confirmed: bool,
}

/// Where an event is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Standing {
    /// In Postgres: the receipt, and the row that it leads to.
    Stored,
    /// In Postgres: the row, whose receipt is gone.
    StoredWithoutReceipt,
    /// The receipt says that the row was removed on purpose.
    Removed,
    Pending,
    /// Among the dead letters.
    Dead,
    NotYetRead,
    /// Postgres could not be asked, and it is nowhere else.
    Unproven,
    Missing(Absence),
    /// It was missing, and waits in the spool now.
    SentAgain(Absence),
    /// It was missing, and stands on disk no more.
    Vanished,
}

/// What Postgres has of an event that is missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(crate) enum Absence {
    #[serde(rename = "no_receipt")]
    Receipt,
    /// The receipt leads nowhere.
    #[serde(rename = "no_row")]
    Row,
    /// The receipt leads to the row of another event.
    #[serde(rename = "other_row")]
    OtherRow,
}

impl Standing {
    /// What it lacks, or lacked.
    pub(super) fn absence(self) -> Option<Absence> {
        match self {
            Standing::Missing(absence) | Standing::SentAgain(absence) => Some(absence),
            _ => None,
        }
    }
}

impl Absence {
    pub(crate) fn described(self) -> &'static str {
        match self {
            Absence::Receipt => "neither receipt nor row",
            Absence::Row => "its row is gone",
            Absence::OtherRow => "its receipt leads to another event's row",
        }
    }
}

impl Inventory {
    /// Reads every transcript.
    pub(super) async fn take(config: &Config, since: Option<Timestamp>) -> Result<Inventory, SourceError> {
        let folders = agent::folders(config);
        let retention = Retention::new(&folders);
        let watcher = &config.file_watcher;
        let mut census = Census::new(folders, watcher.max_line_bytes, watcher.inactivity_timeout);
        let cursors = waiting::cursors(config).await?;
        let found = census.find();
        let bar = progress("reading", found.bytes, "{bytes}/{total_bytes}");
        let mut inventory = Inventory {
            census,
            transcripts: Vec::with_capacity(found.main.len()),
            files: Files::new(),
            sub_agents: found.sub_agents,
            unreadable: found.unreadable,
            missing_folders: found.missing_folders,
            no_turns: NoTurns::new(),
            occurrences: Vec::new(),
            is_asked: false,
            retention,
        };
        for (file, main) in (0..).zip(found.main) {
            let name = main.path.to_string_lossy().into_owned();
            let occurrences = &mut inventory.occurrences;
            let no_turns = &mut inventory.no_turns;
            let read = inventory.census.read(&main, cursors.get(&name), no_turns, |sighting| {
                if is_wanted(&sighting, since) {
                    occurrences.push(Occurrence::of(&sighting, file));
                }
            });
            let extent = match read {
                Ok(extent) => extent,
                Err(error) => {
                    inventory.unreadable.push((main.path.clone(), error.to_string()));
                    None
                }
            };
            bar.inc(extent.map_or(0, |extent| extent.bytes));
            inventory.files.insert(name, file);
            inventory.transcripts.push(Transcript { main, extent });
        }
        bar.finish_and_clear();
        inventory.occurrences.sort_unstable_by_key(|one| (one.id, one.file, one.offset));
        Ok(inventory)
    }

    /// Path of a transcript.
    pub(super) fn path(&self, file: u32) -> String {
        let transcript = self.transcripts.get(file as usize);
        transcript.map(|transcript| shown(&transcript.main.path)).unwrap_or_default()
    }

    pub(super) fn is_anything_missing(&self) -> bool {
        self.occurrences.iter().any(|one| one.is_missing())
    }

    /// Finds the place of each event; or, where they have one, of those that are missing.
    pub(super) async fn place(
        &mut self,
        auditor: &Auditor,
        waiting: &Waiting,
        only_missing: bool,
    ) -> Result<(), DeliverError> {
        let bar = progress("asking Postgres", self.occurrences.len() as u64, "{pos}/{len}");
        let is_wanted = |one: &Occurrence| !only_missing || one.is_missing();
        let mut groups = groups(&mut self.occurrences).filter(|group| group.first().is_some_and(is_wanted));
        loop {
            let asked: Vec<&mut [Occurrence]> = groups.by_ref().take(ASKED_MAX).collect();
            if asked.is_empty() {
                break;
            }
            let ids: Vec<Uuid> = asked.iter().filter_map(|group| group.first()).map(|one| one.id).collect();
            let receipts = auditor.find(&ids).await?;
            for group in asked {
                bar.inc(group.len() as u64);
                let Some(first) = group.first() else { continue };
                let standing = match first.judge(receipts.get(&first.id)) {
                    Standing::Missing(absence) => {
                        standing_elsewhere(group, waiting).unwrap_or(Standing::Missing(absence))
                    }
                    standing => standing,
                };
                set(group, standing);
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// What can be said while Postgres can't be asked.
    pub(super) fn place_without_postgres(&mut self, waiting: &Waiting) {
        for group in groups(&mut self.occurrences) {
            let standing = standing_elsewhere(group, waiting).unwrap_or(Standing::Unproven);
            set(group, standing);
        }
    }

    /// Looks for missing events among all rows: a ledger that was pruned or restored to another state knows nothing of
    /// rows that are there, and those must not be stored a second time.
    pub(super) async fn find_without_receipt(&mut self, auditor: &Auditor) -> Result<(), DeliverError> {
        let bar = progress("looking for rows without receipt", 0, "{pos} rows");
        let mut after = i64::MIN;
        while let Some((last, rows)) = auditor.rows_after(after).await? {
            after = last;
            bar.inc(rows.len() as u64);
            for id in rows.iter().filter_map(identity_of) {
                let group = self.group(id.0);
                if group.first().is_some_and(Occurrence::is_missing) {
                    set(group, Standing::StoredWithoutReceipt);
                }
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Notes that a missing event still stands in this file. False where it is not missing, or was seen already.
    pub(super) fn confirm(&mut self, file: u32, sighting: &Sighting) -> bool {
        let group = self.group(sighting.candidate.id.0);
        if !group.iter().all(|one| one.is_missing() && !one.is_confirmed) {
            return false;
        }
        let Some(one) = group.iter_mut().find(|one| one.file == file) else { return false };
        one.is_confirmed = true;
        one.offset = sighting.offset;
        true
    }

    /// All occurrences of an event.
    pub(super) fn group(&mut self, id: Uuid) -> &mut [Occurrence] {
        let start = self.occurrences.partition_point(|one| one.id < id);
        let rest = self.occurrences.get_mut(start..).unwrap_or_default();
        let length = rest.iter().take_while(|one| one.id == id).count();
        rest.get_mut(..length).unwrap_or_default()
    }
}

impl Occurrence {
    fn of(sighting: &Sighting, file: u32) -> Occurrence {
        Occurrence {
            id: sighting.candidate.id.0,
            offset: sighting.offset,
            file,
            text_hash: text_hash(&sighting.candidate),
            standing: Standing::Unproven,
            is_registration: sighting.candidate.event_type == "session_registered",
            is_read: sighting.is_read,
            is_confirmed: false,
        }
    }

    pub(super) fn is_missing(&self) -> bool {
        matches!(self.standing, Standing::Missing(_))
    }

    pub(super) fn event_type(&self) -> &'static str {
        if self.is_registration { "session_registered" } else { "turn_detected" }
    }

    /// Where it is, by what Postgres says alone.
    fn judge(&self, receipt: Option<&Receipt>) -> Standing {
        match receipt {
            None => Standing::Missing(Absence::Receipt),
            Some(Receipt::Removed) => Standing::Removed,
            Some(Receipt::WithoutRow { .. }) => Standing::Missing(Absence::Row),
            Some(Receipt::Row { row, .. }) if self.is_told_by(row) => Standing::Stored,
            Some(Receipt::Row { .. }) => Standing::Missing(Absence::OtherRow),
        }
    }

    /// Whether the row is this event's. Turns whose line has no uuid are known by their place alone, of which the row
    /// says nothing.
    fn is_told_by(&self, row: &AuditedRow) -> bool {
        row.event_type == self.event_type()
            && (row.identity.is_none() || identity_of(row).is_some_and(|id| id.0 == self.id))
    }
}

fn text_hash(candidate: &Candidate) -> u32 {
    let text = candidate.payload.get("text").and_then(Value::as_str).unwrap_or_default();
    xxh3_64(text.as_bytes()) as u32
}

/// The identity of the event that a row says it is.
fn identity_of(row: &AuditedRow) -> Option<EventId> {
    let identity = row.identity.as_deref()?;
    match row.event_type.as_str() {
        "session_registered" => identity.parse().ok().map(session_registered_event_id),
        "turn_detected" => Some(event_id_of_turn(identity)),
        _ => None,
    }
}

/// Where an event is that Postgres does not have; `None`: nowhere, though it was read.
fn standing_elsewhere(group: &[Occurrence], waiting: &Waiting) -> Option<Standing> {
    let id = group.first().map(|one| one.id)?;
    let is_rejected = |one: &Occurrence| waiting.rejected.contains(&(one.file, one.offset, one.is_registration));
    if waiting.pending.contains(&id) {
        Some(Standing::Pending)
    } else if waiting.dead.contains(&id) || group.iter().any(is_rejected) {
        Some(Standing::Dead)
    } else if group.iter().any(|one| one.is_read) {
        None
    } else {
        Some(Standing::NotYetRead)
    }
}

pub(super) fn shown(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The occurrences of each event.
fn groups(occurrences: &mut [Occurrence]) -> impl Iterator<Item = &mut [Occurrence]> {
    occurrences.chunk_by_mut(|a, b| a.id == b.id)
}

pub(super) fn set(group: &mut [Occurrence], standing: Standing) {
    group.iter_mut().for_each(|one| one.standing = standing);
}

fn is_wanted(sighting: &Sighting, since: Option<Timestamp>) -> bool {
    since.is_none_or(|since| sighting.candidate.timestamp >= since)
}
