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
use super::log::{self, CARRIED, Left, Log, Older, Source};
use super::piece;
use super::reader;
use super::remains::Remains;
use super::segment::{Segment, StoreError};
use super::values::{QueueError, Repair};
use crate::event::Timestamp;
use crate::faults;
use crate::private_folder::Ensured;

/// A queue's folder, opened.
pub(super) struct Opened {
    pub highest: Mark,
    pub newest: Arc<Segment>,
    pub log: Log,
    pub marks: Marks,
    /// The last batch that was written.
    pub batch: u64,
    pub repairs: Vec<Repair>,
}

/// Opens the folder for work: makes it where it is missing, and puts right what can be.
pub(super) fn open(path: &Path) -> Result<(Lock, Opened), QueueError> {
    /// Far more than there are segments to be found damaged first.
    const TRIES_MAX: usize = 100;
    let mut repairs = Vec::new();
    if let Ensured::Tightened { mode } = ensure_folder(path)? {
        repairs.push(Repair::FolderTightened { folder: path.to_owned(), mode });
    }
    let lock = Lock::take(path)?;
    faults::reach("open-locked");
    repairs.extend(move_old_format(path).map_err(|error| storage(path, &error))?);
    for _ in 0..TRIES_MAX {
        match recover(path, Mark::open(path)?) {
            Err(StoreError::Damaged { segment, cause }) => {
                files::note_damaged(path, segment, &cause).map_err(|error| storage(path, &error))?;
            }
            Err(error) => return Err(error.of_queue(path)),
            Ok(mut opened) => {
                repairs.append(&mut opened.repairs);
                faults::reach("open-recovered");
                return Ok((lock, Opened { repairs, ..opened }));
            }
        }
    }
    Err(storage(path, &"damage is found again and again"))
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
    let next = Name { number, first: marks.acknowledged.sequence + 1, is_damaged: false };
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
        let mut left = Left::all_of(if repairs.is_empty() { CARRIED } else { &[piece::SESSION_END, piece::LETTER] });
        while last.carry_over(&mut left, &newest)? {}
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
    let (mut names, unfinished): (Vec<_>, Vec<_>) = log::segments(path)?.into_iter().partition(|name| name.first > 0);
    // What stays is removed when the next one of its number is made.
    unfinished.iter().for_each(|name| drop(files::remove_folder(&name.folder(path))));
    let is_gone = highest.sequence > 0 && names.last().is_none_or(|last| last.number < highest.segment);
    if is_gone {
        let behind = names.last().map(|last| Remains::of(path, *last)).transpose()?;
        let end = behind.as_ref().and_then(Remains::end).map_or(0, |end| end.sequence);
        let first = names.last().map_or(1, |last| last.first.max(end + 1));
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
pub(super) fn damage_of(last: &Remains, highest: Highest) -> Option<String> {
    if last.name.is_damaged {
        return None;
    }
    let Some((marks, batch)) = last.marks() else { return Some("its mark is missing".to_owned()) };
    if last.whole_through(last.name.first.max(marks.settled.sequence + 1)) < marks.acknowledged.sequence {
        return Some("numbers are missing in its log".to_owned());
    }
    let letters = last.letters().map_or(0, |letters| letters.count);
    if letters < marks.letters.count {
        return Some(format!("{} dead letters are missing in its log", marks.letters.count - letters));
    }
    let is_older = last.name.number == highest.segment && batch < highest.batch;
    is_older.then(|| "its log ends before what was acknowledged".to_owned())
}

/// What the queue was like, as far as the segments tell: the one that was written last can't be trusted, or there is none.
fn marks_of_all(path: &Path, names: &[Name], last: Option<&Remains>, highest: Highest) -> Result<Marks, StoreError> {
    let (mut latest, mut known, mut first) = (None, Totals::default(), Totals::default());
    // That of an older one says less than is settled by now: some is delivered once more, and refused by its receipts.
    let mut has_told = |remains: &Remains| {
        latest = remains.marks().map(|(marks, _)| marks);
        let told = [remains.end(), latest.map(|marks: Marks| marks.acknowledged)];
        known = told.into_iter().flatten().chain([known]).max_by_key(|totals| totals.sequence).unwrap_or_default();
        first = remains.before().unwrap_or(first);
        latest.is_some()
    };
    let mut is_told = last.is_some_and(&mut has_told);
    let mut older = names.iter().rev().skip(1);
    while !is_told && let Some(name) = older.next() {
        is_told = has_told(&Remains::of(path, *name)?);
    }
    let sequence = names.first().map_or(0, |oldest| oldest.first - 1);
    let mut marks = latest.unwrap_or(Marks { settled: Totals { sequence, ..first }, ..Marks::default() });
    let begun = names.last().map_or(0, |last| last.first - 1);
    marks.acknowledged = Totals { sequence: highest.sequence.max(known.sequence).max(begun), ..known };
    Ok(marks)
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
