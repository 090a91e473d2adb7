//! Opening: what stands in the folder is made whole, with all in the place of what is damaged that can be had.
//!
//! ```text
//! <queue>/segment-<n>/       a sled database; n grows. The newest that has the mark `m` is the current one
//! <queue>/salvaged-<n>/      what takes the place of a damaged segment, while it is being made
//! <queue>/damaged-<time>-…   what was damaged, kept as it was
//! <queue>/old-<time>/        what an earlier version has written
//! ```
//!
//! Damage has one answer, whatever it is ([`damage`]): the segment is moved aside, and what is found in its log takes its
//! place. A segment that sled twice did not come back from opening is not opened a third time. Each step may be the last one of
//! a process: the next opening goes on.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use super::damage::{self, Asked};
use super::faults;
use super::files::{self, Highest, Lock, Mark, ensure_folder, remove_folder, restrict, storage, sync_folder};
use super::log::Log;
use super::piece::{self, Marks, NUMBER_MAX, OlderSegment, Totals};
use super::reader;
use super::remains::Remains;
use super::rolling::{Carrying, begin_segment, clear, finish_segment, put_older};
use super::segment::{self, Changes, Segment, StoreError};
use super::values::{QueueConfig, QueueError, QueueStats, Repair};
use crate::event::{Sequence, Timestamp};
use crate::private_folder::Ensured;

/// Dead letters, and the bytes of what they hold.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Letters {
    pub count: u64,
    pub bytes: u64,
}

/// A queue's folder, opened.
pub struct Opened {
    pub mark: Mark,
    pub log: Log,
    pub marks: Marks,
    pub letters: Letters,
    /// The oldest event that waits, and when it was captured.
    pub oldest: Option<(Sequence, Timestamp)>,
    pub repairs: Vec<Repair>,
}

impl Opened {
    pub fn stats(&self, config: &QueueConfig) -> QueueStats {
        let (pending, pending_bytes) = self.marks.acknowledged.since(&self.marks.settled);
        QueueStats {
            pending,
            pending_bytes,
            oldest: self.oldest,
            dead_letters: self.letters.count,
            missing: self.repairs.iter().map(Repair::missing).sum(),
            disk_bytes: self.log.bytes(),
            full: pending > 0 && pending_bytes >= config.max_pending_bytes,
            last_sequence: Sequence::new(self.marks.acknowledged.sequence),
        }
    }
}

/// Opens the folder for work: makes it where it is missing, and puts right what can be.
pub fn open(path: &Path) -> Result<(Lock, Opened), QueueError> {
    let mut repairs = Vec::new();
    if let Ensured::Tightened { mode } = ensure_folder(path)? {
        repairs.push(Repair::FolderTightened { folder: path.to_owned(), mode });
    }
    let lock = Lock::take(path)?;
    faults::reach("open-locked");
    repairs.extend(move_old_format(path).map_err(|error| storage(path, &error))?);
    let mut opened = recover(path)?;
    restrict(path);
    repairs.append(&mut opened.repairs);
    faults::reach("open-recovered");
    Ok((lock, Opened { repairs, ..opened }))
}

/// What an earlier version of the program has written, moved away.
fn move_old_format(path: &Path) -> io::Result<Option<Repair>> {
    if !path.join("CURRENT").exists() && !path.join("sled-1").exists() {
        return Ok(None);
    }
    let time = Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let to = path.join(format!("old-{time}"));
    fs::create_dir(&to)?;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let is_old = ["CURRENT", "HIGHEST", "DAMAGED", "REREAD"].iter().any(|old| name == *old)
            || name.as_encoded_bytes().starts_with(b"sled-");
        if is_old {
            fs::rename(entry.path(), to.join(name))?;
        }
    }
    sync_folder(&to)?;
    sync_folder(path)?;
    Ok(Some(Repair::OldFormat { to }))
}

/// What stands in the folder, cleared of left-overs.
fn recover(path: &Path) -> Result<Opened, QueueError> {
    /// Far more than there are segments to be opened first.
    const TRIES_MAX: usize = 100;
    let mut last = String::new();
    for _ in 0..TRIES_MAX {
        match recover_once(path, Mark::open(path)?) {
            // It opened, and could not be read.
            Err(StoreError::Damaged { segment, cause }) => {
                files::mark_damaged(path, segment);
                last = format!("segment {segment}: {cause}");
            }
            Err(error) => return Err(error.of_queue(path)),
            Ok(recovered) => return Ok(recovered),
        }
    }
    Err(storage(path, &format!("damage is found again and again, at last in {last}")))
}

fn recover_once(path: &Path, mut mark: Mark) -> Result<Opened, StoreError> {
    damage::finish_replacing(path)?;
    let (segment, mut marks) = open_newest(path, mark.written)?;
    let Marks { acknowledged, settled, .. } = marks;
    let mut older = read_older(&segment)?;
    older.retain(|one| one.last > settled.sequence);
    remove_uncommitted(&segment, acknowledged.sequence + 1)?;
    let mut log = Log::new(path, segment, older);
    for one in log.older.clone() {
        // It is looked at as a whole when it is read.
        if files::read_mark(path, files::DAMAGED, one.number).is_some() {
            replace_older(path, &mut log, one, "the queue had stopped at it".to_owned(), settled.sequence)?;
        }
    }
    let repairs = files::noted_repairs(path);
    if !repairs.is_empty() {
        clear(&log.newest, &piece::all_keys(piece::CURSOR))?;
    }
    let oldest = reader::oldest(&log, settled.sequence + 1, acknowledged.sequence)?;
    if oldest.is_none() {
        marks.settled = acknowledged;
    }
    // What is written from now on is told from what an earlier start has left uncommitted.
    marks.start = marks.start.saturating_add(1);
    log.newest.apply(Changes::of([marks.encode()]))?;
    // What an earlier process wrote may be in the system's memory only: nothing leaves before it is on disk.
    log.newest.sync()?;
    if path.join(files::UNSYNCED).exists() {
        log = copy_newest(path, &log, &marks)?;
    }
    remove_left_overs(path, &log)?;
    let letters = count_letters(&log.newest)?;
    mark.raise(log.newest.highest(acknowledged.sequence))?;
    for name in [files::DAMAGED, files::UNSYNCED, files::OPENING] {
        files::remove_mark(path, name)?;
    }
    Ok(Opened { mark, log, marks, letters, oldest, repairs })
}

/// Opens the newest segment that was ever in use.
fn open_newest(path: &Path, highest: Highest) -> Result<(Segment, Marks), StoreError> {
    let numbers = segments(path)?;
    for (index, number) in numbers.iter().copied().enumerate().rev() {
        // It was being made when the process died: nothing was ever acknowledged in it, whatever became of it.
        if number != highest.segment && is_unfinished(&Remains::of(path, number)?, highest) {
            continue;
        }
        let cause = match damage_of(path, number, highest)? {
            Some(cause) => cause,
            None => match open_marked(path, number) {
                Ok((segment, Some(marks))) if marks.acknowledged.sequence >= highest.sequence => {
                    return Ok((segment, marks));
                }
                Ok((_, Some(marks))) => {
                    let sequence = marks.acknowledged.sequence;
                    format!("it ends at number {sequence}, and {} was acknowledged", highest.sequence)
                }
                Ok((_, None)) => "its mark is missing".to_owned(),
                Err(StoreError::Damaged { cause, .. }) => cause,
                Err(error) => {
                    // sled did come back.
                    files::remove_mark(path, files::OPENING)?;
                    return Err(error);
                }
            },
        };
        return replace_newest(path, number, numbers.get(..index).unwrap_or_default(), highest, cause);
    }
    if highest.sequence > 0 {
        // Or its numbers would be given again.
        return replace_newest(path, highest.segment.max(1), &[], highest, "its folder is gone".to_owned());
    }
    create_first(path)
}

/// Whether a segment never was the newest one: then it would have its mark. Where nothing tells which one was, one with events is
/// not taken for unfinished.
fn is_unfinished(remains: &Remains, highest: Highest) -> bool {
    let may_be = if highest.segment == 0 { remains.first().is_none() } else { remains.number > highest.segment };
    remains.marks.is_none() && may_be
}

/// What is known to be wrong with a segment, the newest one, before it is opened.
fn damage_of(path: &Path, number: u64, highest: Highest) -> Result<Option<String>, StoreError> {
    if files::read_mark(path, files::DAMAGED, number).is_some() {
        return Ok(Some("the queue had stopped at it".to_owned()));
    }
    // sled takes a log that was cut for a whole one, and does not say what it has passed over.
    let remains = if number == highest.segment { Some(Remains::of(path, number)?) } else { None };
    if remains.is_some_and(|remains| !remains.is_whole(None, highest.sequence)) {
        return Ok(Some("numbers are missing in its log".to_owned()));
    }
    match files::read_mark(path, files::OPENING, number).unwrap_or(0) {
        tried if tried >= 2 => Ok(Some("sled did not come back from opening it".to_owned())),
        tried => {
            files::write_mark(path, files::OPENING, number, tried + 1)?;
            Ok(None)
        }
    }
}

/// A segment and what it says of the queue.
fn open_marked(path: &Path, number: u64) -> Result<(Segment, Option<Marks>), StoreError> {
    let segment = Segment::open(&segment::folder_of(path, number), number)?;
    faults::reach("open-segment-opened");
    let marks = segment.piece(&[piece::MARK], Marks::of)?;
    if marks.is_some() {
        files::remove_mark(path, files::OPENING)?;
    }
    Ok((segment, marks))
}

/// Makes the first segment.
fn create_first(path: &Path) -> Result<(Segment, Marks), StoreError> {
    let number = segments(path)?.last().map_or(1, |last| last + 1);
    let segment = begin_segment(path, number)?;
    finish_segment(&segment, &[], &Marks::default())?;
    faults::reach("open-segment-created");
    Ok((segment, Marks::default()))
}

/// Puts what is found of the newest segment in its place.
fn replace_newest(
    path: &Path,
    number: u64,
    others: &[u64],
    highest: Highest,
    cause: String,
) -> Result<(Segment, Marks), StoreError> {
    let remains = Remains::of(path, number)?;
    // What it said of the others is lost: they tell themselves.
    let Others { mut older, begin, end: before } = Others::by_themselves(path, others, &remains)?;
    let first = older.last().map_or(1, |one| one.last + 1);
    let asked = Asked { first, before, end: None, last_min: highest.sequence, is_newest: true };
    let mut marks = Marks::default();
    damage::salvage(path, &remains, asked, cause, |segment, salvaged| {
        // Where the mark of what is settled is lost, all that is there is delivered once more, and refused by its receipts. What is
        // missing before it counts as settled: a segment goes only once all in it is, and the mark may be older than that.
        let settled = remains.marks.map(|marks| marks.settled);
        let settled = settled.filter(|settled| settled.sequence <= salvaged.end.sequence);
        let known = begin.unwrap_or(salvaged.end);
        let sequence = older.first().map_or(known.sequence, |one| one.first - 1);
        // Where nothing tells, each number was an event's.
        let begin = Totals { sequence, events: known.events.saturating_sub(known.sequence - sequence), ..known };
        let settled = match settled {
            Some(settled) if older.is_empty() || settled.sequence > begin.sequence => settled,
            _ => begin,
        };
        older.retain(|one| one.last > settled.sequence);
        let mut changes = Changes::default();
        put_older(&mut changes, &older);
        marks = Marks { start: remains.start, acknowledged: salvaged.end, settled };
        let (key, value) = marks.encode();
        changes.insert(key, value);
        segment.apply(changes)
    })?;
    let segment = Segment::open(&segment::folder_of(path, number), number)?;
    Ok((segment, marks))
}

/// The older segments as their logs tell.
struct Others {
    older: Vec<OlderSegment>,
    /// The totals up to before the first number that is there, of all segments.
    begin: Option<Totals>,
    /// The totals up to the end of the last older one.
    end: Option<Totals>,
}

impl Others {
    /// What is missing between two of them counts to the one before, and is noticed when that is read.
    fn by_themselves(path: &Path, numbers: &[u64], newest: &Remains) -> Result<Others, StoreError> {
        let (mut found, mut begin, mut end) = (Vec::new(), newest.before(), None);
        for number in numbers.iter().rev() {
            let remains = Remains::of(path, *number)?;
            let own_end = remains.end();
            let last = begin.or(own_end).map(|totals| totals.sequence);
            if found.is_empty() {
                end = own_end.filter(|end| Some(end.sequence) == last);
            }
            found.extend(last.map(|last| (*number, remains.first(), last, remains.log_bytes)));
            begin = remains.before().or(begin);
        }
        let mut older: Vec<OlderSegment> = Vec::new();
        for (number, first, last, log_bytes) in found.into_iter().rev() {
            let first = first.unwrap_or_else(|| older.last().map_or(1, |one| one.last + 1));
            older.extend((first <= last).then_some(OlderSegment { number, first, last, log_bytes }));
        }
        Ok(Others { older, begin, end })
    }
}

/// Puts what is found of an older segment in its place.
fn replace_older(path: &Path, log: &mut Log, one: OlderSegment, cause: String, settled: u64) -> Result<(), StoreError> {
    let next = log.older.iter().find(|other| other.first > one.last).map_or(log.newest.number, |next| next.number);
    let end = Remains::of(path, next)?.before().filter(|end| end.sequence == one.last);
    let first = one.first.max(settled + 1);
    let asked = Asked { first, before: None, end, last_min: one.last, is_newest: false };
    damage::salvage(path, &Remains::of(path, one.number)?, asked, cause, |_, _| Ok(()))?;
    let log_bytes = fs::metadata(segment::folder_of(path, one.number).join("db"))?.len();
    for other in log.older.iter_mut().filter(|other| other.number == one.number) {
        *other = OlderSegment { first, log_bytes, ..one };
    }
    let mut changes = Changes::default();
    put_older(&mut changes, &log.older);
    log.newest.apply(changes)?;
    log.newest.sync()?;
    Ok(())
}

/// Copies the newest segment into a fresh one, after a sync that failed: pages of it that the system counts as written may be
/// in its memory only.
fn copy_newest(path: &Path, log: &Log, marks: &Marks) -> Result<Log, StoreError> {
    let new = begin_segment(path, log.newest.number + 1)?;
    let mut carrying = Carrying::of(b"exdfc");
    while carrying.next(&log.newest, &new)? {}
    finish_segment(&new, &log.older, marks)?;
    Ok(log.with_newest(new.into(), log.older.clone()))
}

fn read_older(segment: &Segment) -> Result<Vec<OlderSegment>, StoreError> {
    let mut older = Vec::new();
    for index in 0.. {
        let part = segment.piece(&piece::indexed_key(piece::OLDER, 0, index), piece::decode_older)?.unwrap_or_default();
        if part.is_empty() {
            break;
        }
        older.extend(part);
    }
    Ok(older)
}

/// Counts the dead letters, and removes what a process that died has left of one.
fn count_letters(segment: &Segment) -> Result<Letters, StoreError> {
    let (mut letters, mut known, mut orphans) = (Letters::default(), BTreeSet::new(), BTreeSet::new());
    segment.each(piece::all_keys(piece::LETTER), |key, _| {
        letters.count += 1;
        known.extend(piece::key_sequence(key));
        true
    })?;
    segment.each(piece::all_keys(piece::LETTER_CONTENT), |key, value| {
        match piece::key_sequence(key) {
            Some(sequence) if known.contains(&sequence) => letters.bytes += value.len() as u64,
            other => orphans.extend(other),
        }
        true
    })?;
    for sequence in orphans {
        clear(segment, &piece::keys(piece::LETTER_CONTENT, sequence..=sequence))?;
    }
    Ok(letters)
}

/// Removes what was written for batches that were never committed, so that nothing of it mixes with what comes.
fn remove_uncommitted(segment: &Segment, first: u64) -> Result<(), StoreError> {
    for kind in [piece::BLOCK, piece::CHUNK, piece::LETTER, piece::LETTER_CONTENT] {
        clear(segment, &piece::keys(kind, first..=NUMBER_MAX))?;
    }
    Ok(())
}

fn remove_left_overs(path: &Path, log: &Log) -> Result<(), StoreError> {
    for number in segments(path)? {
        if number != log.newest.number && log.older.iter().all(|one| one.number != number) {
            tracing::debug!(segment = number, "removing a segment of the queue that is not needed");
            remove_folder(&segment::folder_of(path, number))?;
        }
    }
    Ok(())
}

/// The segments in the folder, oldest first.
pub fn segments(path: &Path) -> io::Result<Vec<u64>> {
    files::numbered(path, segment::PREFIX)
}
