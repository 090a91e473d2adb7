//! The outcome: numbers, and what is to be looked at. Its JSON is the object of `verify --json`.

use jiff::SignedDuration;
use serde::{Serialize, Serializer};

use super::inventory::{Absence, Inventory, Occurrence, Standing, shown};
use crate::event::Timestamp;
use crate::intake::transcripts::census::NoTurns;

/// Events by where they are. They add up to `on_disk`, but for `without_receipt`, which are among `in_postgres`, and
/// `sent_again`, which are among `missing`. `None`: Postgres could not be asked.
#[derive(Clone, Copy, Serialize, Debug)]
pub(crate) struct Counts {
    /// Each once, however many transcripts it stands in.
    pub(crate) on_disk: u64,
    pub(crate) in_postgres: Option<u64>,
    /// The row is there, its receipt is not.
    pub(crate) without_receipt: Option<u64>,
    /// The receipt says that the row was removed on purpose.
    pub(crate) removed: Option<u64>,
    /// In the spool or in the queue.
    pub(crate) in_queue: u64,
    pub(crate) dead_letters: u64,
    pub(crate) not_yet_read: u64,
    pub(crate) unproven: u64,
    pub(crate) missing: Option<u64>,
    /// Missing, and left in the spool by `--repair`.
    pub(crate) sent_again: Option<u64>,
}

#[derive(Serialize)]
pub(crate) struct Report<'a> {
    pub(crate) turns: Counts,
    pub(crate) sessions: Counts,
    /// Transcripts of sessions that were found.
    pub(crate) transcripts: usize,
    /// Of these, so many were read.
    #[serde(skip)]
    pub(crate) transcripts_read: usize,
    pub(crate) sub_agent_transcripts: u64,
    pub(crate) unreadable: Vec<UnreadablePath>,
    pub(crate) missing_folders: Vec<String>,
    pub(crate) expiring: Vec<Expiring>,
    pub(crate) user_lines_no_turns: &'a NoTurns,
    pub(crate) incomplete: Vec<IncompleteLine>,
    pub(crate) conflicting: Vec<ConflictingLines>,
    pub(crate) error: Option<String>,
    pub(crate) missing: Missing<'a>,
}

/// A file or folder that can't be read.
#[derive(Serialize)]
pub(crate) struct UnreadablePath {
    pub(crate) path: String,
    pub(crate) error: String,
}

/// A transcript that Claude Code is about to delete and that is not wholly stored.
#[derive(Serialize)]
pub(crate) struct Expiring {
    pub(crate) path: String,
    /// Claude Code deletes it after this.
    pub(crate) kept_until: String,
    /// Events in it that Postgres does not have.
    pub(crate) not_stored: u64,
}

/// The last bytes of a transcript that are no complete line: they were not read.
#[derive(Serialize)]
pub(crate) struct IncompleteLine {
    pub(crate) path: String,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// Two lines with one uuid and different texts: one of the two is stored.
#[derive(Serialize)]
pub(crate) struct ConflictingLines {
    pub(crate) event_id: String,
    pub(crate) path: String,
    pub(crate) offset: u64,
    pub(crate) other_path: String,
    pub(crate) other_offset: u64,
}

/// A missing event.
#[derive(Serialize)]
pub(crate) struct MissingLine {
    pub(crate) path: String,
    pub(crate) offset: u64,
    pub(crate) event_type: &'static str,
    pub(crate) event_id: String,
    session_uuid: Option<String>,
    pub(crate) reason: Absence,
    pub(crate) sent_again: bool,
}

/// The missing events, made one by one: a million of them take no memory.
pub(crate) struct Missing<'a>(&'a Inventory);

impl Serialize for Missing<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.lines())
    }
}

impl Missing<'_> {
    pub(crate) fn lines(&self) -> impl Iterator<Item = MissingLine> {
        missing(self.0).filter_map(|one| {
            let main = &self.0.transcripts.get(one.file as usize)?.main;
            Some(MissingLine {
                path: shown(&main.path),
                offset: one.offset,
                event_type: one.event_type(),
                event_id: one.id.to_string(),
                session_uuid: Some(main.session.to_string()),
                reason: one.standing.absence()?,
                sent_again: matches!(one.standing, Standing::SentAgain(_)),
            })
        })
    }
}

impl<'a> Report<'a> {
    pub(super) fn of(inventory: &'a mut Inventory, error: Option<String>) -> Report<'a> {
        let (mut turns, mut sessions) = (Counts::new(inventory.is_asked), Counts::new(inventory.is_asked));
        let mut not_stored = vec![0; inventory.transcripts.len()];
        for group in inventory.occurrences.chunk_by(|a, b| a.id == b.id) {
            let Some(first) = group.first() else { continue };
            let counts = if first.is_registration { &mut sessions } else { &mut turns };
            counts.add(first.standing);
            if !is_stored(first.standing) {
                let files = group.iter().filter_map(|one| usize::try_from(one.file).ok());
                files.for_each(|file| not_stored.get_mut(file).into_iter().for_each(|count| *count += 1));
            }
        }
        let expiring = expiring(inventory, &not_stored);
        let inventory = &*inventory;
        let unreadable = inventory.unreadable.iter();
        Report {
            turns,
            sessions,
            transcripts: inventory.transcripts.len(),
            transcripts_read: inventory.transcripts.iter().filter(|transcript| transcript.extent.is_some()).count(),
            sub_agent_transcripts: inventory.sub_agents,
            unreadable: unreadable
                .map(|(path, error)| UnreadablePath { path: shown(path), error: error.clone() })
                .collect(),
            missing_folders: inventory.missing_folders.iter().map(|path| shown(path)).collect(),
            expiring,
            user_lines_no_turns: &inventory.no_turns,
            incomplete: incomplete(inventory).collect(),
            conflicting: conflicting(inventory).collect(),
            error,
            missing: Missing(inventory),
        }
    }

    /// Whether all was looked at and nothing is missing any more.
    pub(crate) fn is_all_there(&self) -> bool {
        self.unreadable.is_empty()
            && [self.turns, self.sessions].iter().all(|counts| counts.missing == counts.sent_again)
    }
}

impl Counts {
    fn new(is_asked: bool) -> Counts {
        let asked = is_asked.then_some(0);
        Counts {
            on_disk: 0,
            in_postgres: asked,
            without_receipt: asked,
            removed: asked,
            in_queue: 0,
            dead_letters: 0,
            not_yet_read: 0,
            unproven: 0,
            missing: asked,
            sent_again: asked,
        }
    }

    fn add(&mut self, standing: Standing) {
        let count = match standing {
            Standing::Vanished => return,
            Standing::Stored => self.in_postgres.get_or_insert(0),
            Standing::StoredWithoutReceipt => {
                *self.without_receipt.get_or_insert(0) += 1;
                self.in_postgres.get_or_insert(0)
            }
            Standing::Removed => self.removed.get_or_insert(0),
            Standing::Pending => &mut self.in_queue,
            Standing::Dead => &mut self.dead_letters,
            Standing::NotYetRead => &mut self.not_yet_read,
            Standing::Unproven => &mut self.unproven,
            Standing::Missing(_) => self.missing.get_or_insert(0),
            Standing::SentAgain(_) => {
                *self.sent_again.get_or_insert(0) += 1;
                self.missing.get_or_insert(0)
            }
        };
        *count += 1;
        self.on_disk += 1;
    }
}

/// `not_stored`: events of each transcript that Postgres does not have.
fn expiring(inventory: &mut Inventory, not_stored: &[u64]) -> Vec<Expiring> {
    let expires_before = inventory.retention.expires_before(Timestamp::now());
    let period = SignedDuration::try_from(inventory.retention.period()).unwrap_or(SignedDuration::MAX);
    let transcripts = inventory.transcripts.iter().zip(not_stored).filter(|(_, not_stored)| **not_stored > 0);
    let expiring = transcripts.filter_map(|(transcript, not_stored)| {
        let modified = transcript.extent.map(|extent| extent.modified).filter(|at| *at < expires_before)?;
        Some(Expiring {
            path: shown(&transcript.main.path),
            kept_until: modified.checked_add(period).unwrap_or(Timestamp::MAX).to_string(),
            not_stored: *not_stored,
        })
    });
    expiring.collect()
}

fn is_stored(standing: Standing) -> bool {
    match standing {
        Standing::Stored | Standing::StoredWithoutReceipt | Standing::Removed | Standing::Dead => true,
        // Whether those of which Postgres said nothing are stored is not known, and so no reason to warn.
        Standing::Unproven | Standing::Vanished => true,
        Standing::Pending | Standing::NotYetRead | Standing::Missing(_) | Standing::SentAgain(_) => false,
    }
}

/// What is missing, each once, at the place where it was seen last.
fn missing(inventory: &Inventory) -> impl Iterator<Item = &Occurrence> {
    let groups = inventory.occurrences.chunk_by(|a, b| a.id == b.id);
    groups.filter_map(|group| {
        let first = group.first().filter(|first| first.standing.absence().is_some())?;
        Some(group.iter().find(|one| one.is_confirmed).unwrap_or(first))
    })
}

fn incomplete(inventory: &Inventory) -> impl Iterator<Item = IncompleteLine> {
    inventory.transcripts.iter().filter_map(|transcript| {
        let extent = transcript.extent?;
        let offset = extent.incomplete_at?;
        Some(IncompleteLine { path: shown(&transcript.main.path), offset, bytes: extent.bytes - offset })
    })
}

/// Each line whose text differs from that of the first line with its uuid, with that line.
fn conflicting(inventory: &Inventory) -> impl Iterator<Item = ConflictingLines> {
    let groups = inventory.occurrences.chunk_by(|a, b| a.id == b.id);
    groups.filter_map(|group| Some((group.first()?, group))).flat_map(move |(first, group)| {
        let others = group.iter().filter(|one| one.text_hash != first.text_hash);
        others.map(move |other| ConflictingLines {
            event_id: first.id.to_string(),
            path: inventory.path(first.file),
            offset: first.offset,
            other_path: inventory.path(other.file),
            other_offset: other.offset,
        })
    })
}
