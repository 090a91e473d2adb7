//! What `verify` says: a table for people, one JSON object for programs.

use std::io::{self, Write};

use crate::event::Timestamp;
use jiff::SignedDuration;
use serde::Serialize;

use super::super::Failure;
use super::inventory::{Inventory, Occurrence, Standing};

/// Missing events that are listed for people.
const LISTED_MAX: usize = 20;

/// Events by where they are. They add up to `on_disk`, but for `without_receipt`, which are among `in_postgres`, and
/// `sent_again`, which are among `missing`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize, Debug)]
struct Counts {
    /// Each once, however many transcripts it stands in.
    on_disk: u64,
    in_postgres: u64,
    /// The row is there, its receipt is not.
    without_receipt: u64,
    /// The receipt says that the row was removed on purpose.
    removed: u64,
    in_queue: u64,
    dead_letters: u64,
    not_yet_read: u64,
    /// Postgres could not be asked.
    unproven: u64,
    missing: u64,
    /// Missing, and put into the queue by `--repair`.
    sent_again: u64,
}

/// The outcome in numbers.
pub struct Report {
    turns: Counts,
    sessions: Counts,
    expiring: Vec<Expiring>,
}

/// A transcript that Claude Code is about to delete and that is not wholly stored.
#[derive(Serialize)]
struct Expiring {
    path: String,
    /// Claude Code deletes it after this.
    kept_until: String,
    /// Events in it that Postgres does not have.
    not_stored: u64,
}

/// The last bytes of a transcript that are no complete line: they were not read.
#[derive(Serialize)]
struct IncompleteLine {
    path: String,
    offset: u64,
    bytes: u64,
}

/// Two lines with one uuid and different texts: one of the two is stored.
#[derive(Serialize)]
struct ConflictingLines {
    event_id: String,
    path: String,
    offset: u64,
    other_path: String,
    other_offset: u64,
}

/// A missing event.
#[derive(Serialize)]
struct MissingLine<'a> {
    path: &'a str,
    offset: u64,
    event_type: &'a str,
    event_id: String,
    session_uuid: Option<&'a str>,
    /// no_receipt, no_row or other_row.
    reason: &'a str,
    sent_again: bool,
}

impl Report {
    pub fn of(inventory: &mut Inventory) -> Report {
        let (mut turns, mut sessions) = (Counts::default(), Counts::default());
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
        let expires_before = inventory.retention.expires_before(Timestamp::now());
        let period = SignedDuration::try_from(inventory.retention.period()).unwrap_or(SignedDuration::MAX);
        let expiring = inventory.transcripts.iter().zip(not_stored).filter_map(|(transcript, not_stored)| {
            let modified = transcript.extent.map(|extent| extent.modified).filter(|at| *at < expires_before)?;
            (not_stored > 0).then(|| Expiring {
                path: transcript.main.path.to_string_lossy().into_owned(),
                kept_until: modified.checked_add(period).unwrap_or(Timestamp::MAX).to_string(),
                not_stored,
            })
        });
        Report { turns, sessions, expiring: expiring.collect() }
    }

    /// Whether nothing is missing any more.
    pub fn is_all_there(&self) -> bool {
        [self.turns, self.sessions].iter().all(|counts| counts.missing == counts.sent_again)
    }

    pub fn write(&self, inventory: &Inventory, json: bool, failure: Option<&Failure>) -> io::Result<()> {
        let mut out = io::BufWriter::new(io::stdout().lock());
        if json {
            self.write_json(&mut out, inventory, failure)?;
        } else {
            self.write_table(&mut out, inventory)?;
        }
        out.flush()
    }

    /// Written piece by piece: a million missing events take no memory.
    fn write_json(&self, out: &mut impl Write, inventory: &Inventory, failure: Option<&Failure>) -> io::Result<()> {
        let unreadable = inventory.unreadable.iter();
        let unreadable =
            unreadable.map(|(path, error)| serde_json::json!({"path": path.to_string_lossy(), "error": error}));
        let known = |counts: &Counts| {
            let mut counts = serde_json::to_value(counts).unwrap_or_default();
            if !inventory.is_asked
                && let Some(counts) = counts.as_object_mut()
            {
                for name in ["in_postgres", "without_receipt", "removed", "missing", "sent_again"] {
                    counts.insert(name.to_owned(), serde_json::Value::Null);
                }
            }
            counts
        };
        let head = [
            ("turns", known(&self.turns)),
            ("sessions", known(&self.sessions)),
            ("transcripts", inventory.transcripts.len().into()),
            ("sub_agent_transcripts", inventory.sub_agents.into()),
            ("unreadable", unreadable.collect()),
            ("missing_folders", inventory.missing_folders.iter().map(|path| path.to_string_lossy()).collect()),
            ("expiring", serde_json::to_value(&self.expiring)?),
            ("user_lines_no_turns", serde_json::to_value(&inventory.no_turns)?),
            ("incomplete", serde_json::to_value(incomplete(inventory).collect::<Vec<_>>())?),
            ("conflicting", serde_json::to_value(conflicting(inventory).collect::<Vec<_>>())?),
            ("error", failure.map(|failure| failure.message.as_str()).into()),
        ];
        write!(out, "{{")?;
        for (name, value) in head {
            write!(out, "\"{name}\":{value},")?;
        }
        write!(out, "\"missing\":[")?;
        for (index, line) in missing(inventory).enumerate() {
            if index > 0 {
                write!(out, ",")?;
            }
            let path = transcript_path(inventory, line);
            let reason = line.standing.absence().map_or("", |absence| absence.as_str());
            let session = inventory.transcripts.get(line.file as usize);
            let session = session.and_then(|transcript| transcript.main.path.file_stem()?.to_str());
            serde_json::to_writer(
                &mut *out,
                &MissingLine {
                    path: &path,
                    offset: line.offset,
                    event_type: line.event_type(),
                    event_id: line.id.to_string(),
                    session_uuid: session,
                    reason,
                    sent_again: matches!(line.standing, Standing::SentAgain(_)),
                },
            )?;
        }
        writeln!(out, "]}}")
    }

    fn write_table(&self, out: &mut impl Write, inventory: &Inventory) -> io::Result<()> {
        let (turns, sessions) = (&self.turns, &self.sessions);
        writeln!(out, "{:<14}{:>12}{:>12}", "", "TURNS", "SESSIONS")?;
        let mut row = |name: &str, turns: Option<u64>, sessions: Option<u64>| {
            let shown = |count: Option<u64>| count.map_or_else(|| "?".to_owned(), |count| count.to_string());
            writeln!(out, "{name:<14}{:>12}{:>12}", shown(turns), shown(sessions))
        };
        let asked = |count: u64| inventory.is_asked.then_some(count);
        row("on disk", Some(turns.on_disk), Some(sessions.on_disk))?;
        row("in Postgres", asked(turns.in_postgres), asked(sessions.in_postgres))?;
        row("in the queue", Some(turns.in_queue), Some(sessions.in_queue))?;
        row("dead letters", Some(turns.dead_letters), Some(sessions.dead_letters))?;
        for (name, turns, sessions) in [
            ("removed", turns.removed, sessions.removed),
            ("not yet read", turns.not_yet_read, sessions.not_yet_read),
            ("unproven", turns.unproven, sessions.unproven),
        ] {
            if turns + sessions > 0 {
                row(name, Some(turns), Some(sessions))?;
            }
        }
        row("missing", asked(turns.missing), asked(sessions.missing))?;
        let read = inventory.transcripts.iter().filter(|transcript| transcript.extent.is_some()).count();
        writeln!(out, "\n{read} transcripts read, {} of sub-agents passed over", inventory.sub_agents)?;
        let no_turns: u64 = inventory.no_turns.values().sum();
        if no_turns > 0 {
            writeln!(out, "{no_turns} lines of the user's side are no turns (\"explain FILE\" says so of each):")?;
            let mut reasons: Vec<_> = inventory.no_turns.iter().collect();
            reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
            let reasons = reasons.iter().map(|(reason, count)| format!("{count} {reason}"));
            writeln!(out, "  {}", reasons.collect::<Vec<_>>().join(", "))?;
        }
        let without_receipt = turns.without_receipt + sessions.without_receipt;
        if without_receipt > 0 {
            writeln!(out, "{without_receipt} rows are there without a receipt")?;
        }
        for (path, error) in &inventory.unreadable {
            writeln!(out, "can't be read, so nothing is proved of it: {}: {error}", path.display())?;
        }
        for path in &inventory.missing_folders {
            writeln!(out, "warning: {} does not exist: transcripts that were in it are not verified", path.display())?;
        }
        for line in incomplete(inventory).take(LISTED_MAX) {
            let IncompleteLine { path, offset, bytes } = line;
            writeln!(
                out,
                "warning: the last line of {path} is incomplete ({bytes} bytes from byte {offset} on): it is not stored"
            )?;
        }
        for lines in conflicting(inventory).take(LISTED_MAX) {
            let ConflictingLines { event_id, path, offset, other_path, other_offset } = lines;
            writeln!(
                out,
                "warning: {path}:{offset} and {other_path}:{other_offset} have one uuid and different texts: only one of \
                 them is stored (event {event_id})"
            )?;
        }
        for one in &self.expiring {
            writeln!(
                out,
                "warning: Claude Code keeps {} until {}, and {} events of it are not in Postgres yet; see that the watcher \
                 and the database run, or raise cleanupPeriodDays in Claude Code's settings.json",
                one.path, one.kept_until, one.not_stored
            )?;
        }
        if turns.not_yet_read + sessions.not_yet_read > 0 {
            writeln!(out, "what is not yet read is read by the running watcher, or at its next start")?;
        }
        self.write_missing(out, inventory)
    }

    fn write_missing(&self, out: &mut impl Write, inventory: &Inventory) -> io::Result<()> {
        let missing_count = self.turns.missing + self.sessions.missing;
        if missing_count == 0 {
            return Ok(());
        }
        writeln!(out, "\nmissing:")?;
        for line in missing(inventory).take(LISTED_MAX) {
            let absence = line.standing.absence().map_or("", |absence| absence.described());
            let sent = if matches!(line.standing, Standing::SentAgain(_)) { "; sent again" } else { "" };
            let path = transcript_path(inventory, line);
            writeln!(out, "  {path}:{}  {}  {}  {absence}{sent}", line.offset, line.event_type(), line.id)?;
        }
        if let Some(more) = missing_count.checked_sub(LISTED_MAX as u64).filter(|more| *more > 0) {
            writeln!(out, "  and {more} more; --json lists all")?;
        }
        match self.turns.sent_again + self.sessions.sent_again {
            0 => writeln!(out, "\"headspace-watcher verify --repair\" sends them again"),
            sent => writeln!(out, "{sent} of {missing_count} sent again: they wait in the queue"),
        }
    }
}

impl Counts {
    fn add(&mut self, standing: Standing) {
        let count = match standing {
            Standing::Vanished => return,
            Standing::Stored => &mut self.in_postgres,
            Standing::StoredWithoutReceipt => {
                self.without_receipt += 1;
                &mut self.in_postgres
            }
            Standing::Removed => &mut self.removed,
            Standing::Pending => &mut self.in_queue,
            Standing::Dead => &mut self.dead_letters,
            Standing::NotYetRead => &mut self.not_yet_read,
            Standing::Unproven => &mut self.unproven,
            Standing::Missing(_) => &mut self.missing,
            Standing::SentAgain(_) => {
                self.sent_again += 1;
                &mut self.missing
            }
        };
        *count += 1;
        self.on_disk += 1;
    }
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
        let path = transcript.main.path.to_string_lossy().into_owned();
        Some(IncompleteLine { path, offset, bytes: extent.bytes - offset })
    })
}

/// Each line whose text differs from that of the first line with its uuid, with that line.
fn conflicting(inventory: &Inventory) -> impl Iterator<Item = ConflictingLines> {
    let groups = inventory.occurrences.chunk_by(|a, b| a.id == b.id);
    groups.filter_map(|group| Some((group.first()?, group))).flat_map(move |(first, group)| {
        let others = group.iter().filter(|one| !one.has_text_of(first));
        others.map(move |other| ConflictingLines {
            event_id: first.id.to_string(),
            path: transcript_path(inventory, first),
            offset: first.offset,
            other_path: transcript_path(inventory, other),
            other_offset: other.offset,
        })
    })
}

fn transcript_path(inventory: &Inventory, occurrence: &Occurrence) -> String {
    let transcript = inventory.transcripts.get(occurrence.file as usize);
    transcript.map(|transcript| transcript.main.path.to_string_lossy().into_owned()).unwrap_or_default()
}
