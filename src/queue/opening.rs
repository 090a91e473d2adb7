//! Opening: each start begins a segment behind the last one, with its cursors and dead letters.
//!
//! What was written before is read without sled ([`Remains`]), so opening is the same whatever was left: a queue that was closed, the
//! log of a process that was killed in the middle of a batch, or one of which a part is damaged. Damage has one answer:
//! the segment is noted and its folder renamed, and from then on what is missing in it is passed over. What is missing is counted, and the
//! cursors are not carried over. The note stays until a dead letter says so: each step may be the last one of a process, and the
//! next opening goes on. Nothing that is damaged is ever deleted.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::codec::{Marks, Totals};
use super::files::{self, Highest, Lock, Mark, Name, ensure_folder, storage, sync_folder};
use super::log::{self, CARRIED, Log, Older, Source};
use super::piece;
use super::reader;
use super::remains::Remains;
use super::segment::{Segment, StoreError};
use super::values::{QueueError, Repair};
use crate::event::Timestamp;
use crate::faults;
use crate::private_folder::Ensured;

/// A queue's folder, opened.
pub struct Opened {
    pub highest: Mark,
    pub newest: Arc<Segment>,
    pub log: Log,
    pub marks: Marks,
    /// The last batch that was written.
    pub batch: u64,
    pub repairs: Vec<Repair>,
}

/// Opens the folder for work: makes it where it is missing, and puts right what can be.
pub fn open(path: &Path) -> Result<(Lock, Opened), QueueError> {
    /// Far more than there are segments to be found damaged first.
    const TRIES_MAX: usize = 100;
    let mut repairs = Vec::new();
    if let Ensured::Tightened { mode } = ensure_folder(path)? {
        repairs.push(Repair::FolderTightened { folder: path.to_owned(), mode });
    }
    let lock = Lock::take(path)?;
    faults::reach("open-locked");
    repairs.extend(move_old_format(path).map_err(|error| storage(path, &error))?);
    let mut last = String::new();
    for _ in 0..TRIES_MAX {
        match recover(path, Mark::open(path)?) {
            Err(StoreError::Damaged { segment, cause }) => {
                files::note_damaged(path, segment, &cause).map_err(|error| storage(path, &error))?;
                last = format!("segment {segment}: {cause}");
            }
            Err(error) => return Err(error.of_queue(path)),
            Ok(mut opened) => {
                repairs.append(&mut opened.repairs);
                faults::reach("open-recovered");
                return Ok((lock, Opened { repairs, ..opened }));
            }
        }
    }
    Err(storage(path, &format!("damage is found again and again, at last in {last}")))
}

/// What an earlier version of the program has written, moved away.
fn move_old_format(path: &Path) -> io::Result<Option<Repair>> {
    if !files::is_old(path) {
        return Ok(None);
    }
    let to = path.join(format!("old-{}", Timestamp::now().strftime("%Y%m%dT%H%M%S.%6fZ")));
    fs::create_dir(&to)?;
    for entry in fs::read_dir(path)? {
        let (from, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
        if name != "lock" && !name.as_encoded_bytes().starts_with(b"old-") {
            fs::rename(from, to.join(name))?;
        }
    }
    sync_folder(&to)?;
    sync_folder(path)?;
    Ok(Some(Repair::OldFormat { to }))
}

/// Begins the next segment behind what stands in the folder.
fn recover(path: &Path, mut highest: Mark) -> Result<Opened, StoreError> {
    let (mut names, last) = used_segments(path, highest.written)?;
    if let Some(last) = &last
        && let Some(cause) = damage_of(last, highest.written)
    {
        files::note_damaged(path, last.name.number, &cause)?;
    }
    for (number, _) in files::damaged(path) {
        if let Some(name) = names.iter_mut().find(|name| name.number == number && !name.is_damaged) {
            faults::reach("damage-noted");
            files::set_aside(path, name)?;
            faults::reach("damage-moved");
        }
    }
    let is_damaged = names.last().is_some_and(|name| name.is_damaged);
    let batch = last.as_ref().map_or(0, |last| last.last_batch).max(highest.written.batch);
    let mut marks = match last.as_ref().and_then(Remains::marks) {
        Some((marks, _)) if !is_damaged => marks,
        _ => marks_of_all(path, &names, last.as_ref(), highest.written)?,
    };
    if let Some(oldest) = names.first().filter(|oldest| oldest.first > marks.settled.sequence + 1) {
        let number = oldest.number.saturating_sub(1);
        names.insert(0, gone(path, number, marks.settled.sequence + 1)?);
    }
    let number = names.last().map_or(0, |name| name.number) + 1;
    let next = Name { first: marks.acknowledged.sequence + 1, ..Name::new(number) };
    let older = Older::all(path, &names, next);
    let mut repairs = repairs(path, &older, marks.settled.sequence)?;
    let newest = Arc::new(Segment::make(path, next)?);
    if let Some(last) = last {
        // What was written last may be in the system's memory only: nothing leaves before it is on disk.
        last.sync()?;
        if is_damaged {
            let letters = last.letters()?;
            if let Some(Repair::SegmentSetAside { missing, .. }) = repairs.last_mut() {
                *missing += marks.letters.count.saturating_sub(letters.count);
            }
            marks.letters = letters;
        }
        let last = Source::Raw(Arc::new(last));
        last.carry_over(if repairs.is_empty() { CARRIED } else { &[piece::LETTER] }, &newest)?;
    }
    let (older, spent): (Vec<_>, Vec<_>) = older.into_iter().partition(|one| one.is_needed(marks.settled.sequence));
    let log = Log::new(path, Source::Sled(Arc::clone(&newest)), older);
    if reader::oldest(&log, marks.settled.sequence + 1, marks.acknowledged.sequence)?.is_none() {
        marks.settled = marks.acknowledged;
    }
    newest.finish(&marks, batch + 1)?;
    faults::reach("open-segment-created");
    highest.raise(newest.highest(marks.acknowledged.sequence, batch + 1))?;
    spent.iter().try_for_each(|one| files::let_go(path, &one.name))?;
    Ok(Opened { highest, newest, log, marks, batch: batch + 1, repairs })
}

/// The segments that were ever in use, and what is in the last one. What is not finished is removed: nothing was ever acknowledged in it.
fn used_segments(path: &Path, highest: Highest) -> Result<(Vec<Name>, Option<Remains>), StoreError> {
    let mut names = log::segments(path)?;
    names.retain(|name| {
        let is_finished = name.first > 0;
        if !is_finished {
            // What stays is removed when the next one of its number is made.
            let _ = files::remove_folder(&name.folder(path));
        }
        is_finished
    });
    let is_gone = highest.sequence > 0 && names.last().is_none_or(|last| last.number < highest.segment);
    if is_gone {
        let first = names.last().map_or(Ok(1), |last| log::first_behind(path, *last))?;
        names.push(gone(path, highest.segment.max(1), first)?);
    }
    let last = names.last().map(|last| Remains::of_newest(path, *last, highest)).transpose()?;
    Ok((names, last))
}

/// An empty folder in the place of a segment's that is gone.
fn gone(path: &Path, number: u64, first: u64) -> Result<Name, StoreError> {
    let name = Name { number, first, is_damaged: true };
    files::note_damaged(path, number, "its folder is gone")?;
    fs::create_dir_all(name.folder(path))?;
    files::write_first(&name.folder(path), first)?;
    sync_folder(&name.folder(path))?;
    sync_folder(path)?;
    Ok(name)
}

/// What is wrong with the segment that was written last.
pub fn damage_of(last: &Remains, highest: Highest) -> Option<String> {
    if last.name.is_damaged {
        return None;
    }
    let Some((marks, batch)) = last.marks() else { return Some("its mark is missing".to_owned()) };
    let is_newest = last.name.number == highest.segment;
    let acknowledged = marks.acknowledged.sequence.max(if is_newest { highest.sequence } else { 0 });
    let whole_through = last.whole_through(last.name.first.max(marks.settled.sequence + 1));
    if whole_through < acknowledged || is_newest && marks.acknowledged.sequence < acknowledged {
        return Some("numbers are missing in its log".to_owned());
    }
    let letters = last.letters().map_or(0, |letters| letters.count);
    if letters < marks.letters.count {
        return Some(format!("{} dead letters are missing in its log", marks.letters.count - letters));
    }
    if is_newest && batch < highest.batch {
        return Some("its log ends before what was acknowledged".to_owned());
    }
    None
}

/// What the queue was like, as far as all segments tell: the one that was written last can't be trusted, or there is none.
fn marks_of_all(path: &Path, names: &[Name], last: Option<&Remains>, highest: Highest) -> Result<Marks, StoreError> {
    let (mut latest, mut known, mut first) = (None, Vec::new(), Totals::default());
    for name in names.iter().rev() {
        let before;
        let remains = match last.filter(|last| last.name.number == name.number) {
            Some(last) => last,
            None => {
                before = Remains::of(path, *name)?;
                &before
            }
        };
        // That of an older one says less than is settled by now: some is delivered once more, and refused by its receipts.
        latest = latest.or(remains.marks().map(|(marks, _)| marks));
        known.extend(latest.map(|marks| marks.acknowledged));
        known.extend(remains.end());
        first = remains.before().unwrap_or(first);
    }
    let known = known.into_iter().max_by_key(|totals| totals.sequence).unwrap_or_default();
    let last_first = names.last().map_or(1, |last| last.first);
    let sequence = highest.sequence.max(known.sequence).max(last_first - 1);
    let acknowledged = Totals { sequence, ..known };
    let sequence = names.first().map_or(0, |oldest| oldest.first - 1);
    let settled = latest.map_or(Totals { sequence, ..first }, |marks| marks.settled);
    let letters = latest.map(|marks| marks.letters).unwrap_or_default();
    Ok(Marks { acknowledged, settled, letters })
}

/// What is missing of the segments that were noted.
fn repairs(path: &Path, older: &[Older], settled: u64) -> Result<Vec<Repair>, StoreError> {
    let mut repairs = Vec::new();
    let noted = files::damaged(path);
    for one in older {
        let Some((_, cause)) = noted.iter().find(|(number, _)| *number == one.name.number) else { continue };
        let (to, remains) = (one.name.folder(path), Remains::of(path, one.name)?);
        let (found_in_all, _) = remains.count(one.name.first - 1, one.last)?;
        files::write_known(&to, one.last, found_in_all)?;
        // Each number that is missing may have been an event's.
        let (found, missing) = remains.count(settled.max(one.name.first - 1), one.last)?;
        repairs.push(Repair::SegmentSetAside { to, cause: cause.clone(), found, missing });
    }
    Ok(repairs)
}
