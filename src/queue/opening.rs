//! Opening: what stands in the folder is made whole, with all in the place of what is damaged that can be had.
//!
//! Damage has one answer, whatever it is: the segment is noted and its folder renamed. From then on it is an older one, read without
//! sled ([`Remains`]), in which what is missing is passed over; where it was the newest, the next one is begun, with its
//! dead letters. What is missing is counted, and all cursors are forgotten. The note stays until a dead letter says so: each step may
//! be the last one of a process, and the next opening goes on. A segment that sled twice did not come back from opening is not
//! opened a third time. Nothing that is damaged is ever deleted.

use std::fs;
use std::io;
use std::path::Path;

use super::codec::{self, Marks, NUMBER_MAX, Totals};
use super::files::{self, Highest, Lock, Mark, Name, ensure_folder, remove_folder, restrict, storage, sync_folder};
use super::log::{self, Log, Older, Source};
use super::piece;
use super::reader::{self, Letters};
use super::remains::Remains;
use super::rolling::{Carrying, begin_segment, finish_segment, mark};
use super::segment::{Changes, Segment, StoreError};
use super::values::{QueueError, Repair};
use crate::event::Timestamp;
use crate::faults;
use crate::private_folder::Ensured;

/// A queue's folder, opened.
pub struct Opened {
    pub highest: Mark,
    pub newest: std::sync::Arc<Segment>,
    pub log: Log,
    pub marks: Marks,
    /// Batches that were written, in all.
    pub batches: u64,
    pub letters: Letters,
    pub repairs: Vec<Repair>,
}

/// Opens the folder for work: makes it where it is missing, and puts right what can be.
pub fn open(path: &Path) -> Result<(Lock, Opened), QueueError> {
    /// Far more than there are segments to be opened first.
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
            // It opened, and could not be read.
            Err(StoreError::Damaged { segment, cause }) => {
                files::note_damaged(path, segment, &cause).map_err(|error| storage(path, &error))?;
                last = format!("segment {segment}: {cause}");
            }
            Err(error) => return Err(error.of_queue(path)),
            Ok(mut opened) => {
                restrict(path);
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

/// What stands in the folder, cleared of left-overs.
fn recover(path: &Path, mut highest: Mark) -> Result<Opened, StoreError> {
    let (newest, mut marks, batches) = open_newest(path, highest.written)?;
    let newest = std::sync::Arc::new(newest);
    for kind in [piece::BLOCK, piece::CHUNK, piece::LETTER] {
        // What was written for batches that were never committed: nothing of it may mix with what comes.
        newest.clear(piece::keys(kind, marks.acknowledged.sequence + 1..=NUMBER_MAX))?;
    }
    let names = older_segments(path, newest.name, marks.settled.sequence)?;
    let older = Older::all(path, &names, newest.name).into_iter();
    let (older, spent): (Vec<_>, Vec<_>) = older.partition(|one| one.is_needed(marks.settled.sequence));
    let repairs = repairs(path, older.iter().chain(&spent), marks.settled.sequence)?;
    if !repairs.is_empty() {
        newest.clear(piece::keys(piece::CURSOR, 0..=NUMBER_MAX))?;
    }
    let log = Log::new(path, Source::Sled(newest.clone()), older);
    if reader::oldest(&log, marks.settled.sequence + 1, marks.acknowledged.sequence)?.is_none() {
        marks.settled = marks.acknowledged;
    }
    // What is written from now on is told from a batch that was torn.
    let batches = batches + 2;
    let mut changes = Changes::default();
    changes.insert(mark(&marks, batches));
    newest.apply(changes)?;
    // What an earlier process wrote may be in the system's memory only: nothing leaves before it is on disk.
    newest.sync()?;
    for one in spent.iter().filter(|one| !one.name.is_damaged) {
        remove_folder(&one.name.folder(path))?;
    }
    let letters = reader::count_letters(&log.newest, NUMBER_MAX)?;
    highest.raise(newest.highest(marks.acknowledged.sequence))?;
    files::forget_opening(path)?;
    Ok(Opened { highest, newest, log, marks, batches, letters, repairs })
}

/// Opens the newest segment that was ever in use, or begins the next one where it can't be trusted; gives what it says, and how many
/// batches were written.
fn open_newest(path: &Path, highest: Highest) -> Result<(Segment, Marks, u64), StoreError> {
    let mut names = log::segments(path)?;
    while let Some(name) = names.pop() {
        let is_unfinished = |remains: &Remains| remains.marks().is_none() && remains.next_block(0).is_none();
        if name.number > highest.segment && !name.is_damaged && is_unfinished(&Remains::of(path, name)?) {
            // It was being made when the process died: nothing was ever acknowledged in it, whatever became of it.
            remove_folder(&name.folder(path))?;
            continue;
        }
        if name.number < highest.segment {
            names.push(name);
            break;
        }
        let cause = match damage_of(path, name, highest)? {
            Some(cause) => cause,
            None => match open_marked(path, name) {
                Ok((segment, Some((marks, batches)))) if marks.acknowledged.sequence >= highest.sequence => {
                    return Ok((segment, marks, batches));
                }
                Ok((_, Some((marks, _)))) => {
                    let sequence = marks.acknowledged.sequence;
                    format!("it ends at number {sequence}, and {} was acknowledged", highest.sequence)
                }
                Ok((_, None)) => "its mark is missing".to_owned(),
                Err(StoreError::Damaged { cause, .. }) => cause,
                Err(error) => {
                    // sled did come back.
                    files::forget_opening(path)?;
                    return Err(error);
                }
            },
        };
        let mut name = name;
        set_aside(path, &mut name, &cause)?;
        return begin_behind(path, name, highest);
    }
    if highest.sequence == 0 && names.is_empty() {
        return begin(path, 1, Marks::default(), 1, None);
    }
    let first = names.last().map_or(Ok(1), |last| log::first_behind(path, *last))?;
    let gone = Name { number: highest.segment.max(1), first, is_damaged: true };
    note_gone(path, gone)?;
    begin_behind(path, gone, highest)
}

/// An empty folder in the place of a segment's that is gone.
fn note_gone(path: &Path, name: Name) -> Result<(), StoreError> {
    files::note_damaged(path, name.number, "its folder is gone")?;
    fs::create_dir_all(name.folder(path))?;
    files::write_first(&name.folder(path), name.first)?;
    sync_folder(&name.folder(path))?;
    Ok(sync_folder(path)?)
}

fn set_aside(path: &Path, name: &mut Name, cause: &str) -> Result<(), StoreError> {
    if !name.is_damaged {
        files::note_damaged(path, name.number, cause)?;
        faults::reach("damage-noted");
        files::set_aside(path, name)?;
        faults::reach("damage-moved");
    }
    Ok(())
}

/// What is known to be wrong with a segment, the newest one, before it is opened.
fn damage_of(path: &Path, name: Name, highest: Highest) -> Result<Option<String>, StoreError> {
    if let Some((_, cause)) = files::damaged(path).into_iter().find(|(number, _)| *number == name.number) {
        return Ok(Some(cause));
    }
    if name.is_damaged {
        return Ok(Some(String::new()));
    }
    // sled takes a log that was cut for a whole one, and does not say what it has passed over.
    let remains = Remains::of(path, name)?;
    let marks = remains.marks().unwrap_or_default();
    let whole_through = remains.whole_through(name.first.max(marks.settled.sequence + 1));
    if name.number == highest.segment && whole_through.min(marks.acknowledged.sequence) < highest.sequence {
        return Ok(Some("numbers are missing in its log".to_owned()));
    }
    match files::openings(path, name.number) {
        tried if tried >= 2 => Ok(Some("sled did not come back from opening it".to_owned())),
        tried => {
            files::note_opening(path, name.number, tried + 1)?;
            Ok(None)
        }
    }
}

/// A segment, what it says of the queue, and the last batch.
fn open_marked(path: &Path, name: Name) -> Result<(Segment, Option<(Marks, u64)>), StoreError> {
    let segment = Segment::open(path, name)?;
    faults::reach("open-segment-opened");
    let key = piece::key(piece::MARK, 0, 0);
    let Some(value) = segment.get(&key)? else { return Ok((segment, None)) };
    let piece = segment.sound(&key, &value)?;
    let marks = codec::decode_marks(piece.content).ok_or_else(|| segment.damaged("its mark can't be read"))?;
    let batch = piece.batch;
    files::forget_opening(path)?;
    Ok((segment, Some((marks, batch))))
}

/// Begins the segment behind one that can't be trusted, or is gone.
fn begin_behind(path: &Path, damaged: Name, highest: Highest) -> Result<(Segment, Marks, u64), StoreError> {
    let names = log::segments(path)?;
    let (mut latest, mut known, mut first) = (None, Vec::new(), Totals::default());
    for name in names.iter().rev() {
        let remains = Remains::of(path, *name)?;
        // That of an older one says less than is settled by now: some is delivered once more, and refused by its receipts.
        latest = latest.or(remains.marks());
        // Also what may be of a batch that never was whole: rather too many are said to be missing than too few.
        known.extend(latest.map(|marks| marks.acknowledged));
        known.extend(remains.totals_through(NUMBER_MAX));
        first = remains.before().unwrap_or(first);
    }
    let known = known.into_iter().max_by_key(|totals| totals.sequence).unwrap_or_default();
    let last = highest.sequence.max(known.sequence).max(damaged.first - 1);
    let acknowledged = Totals { sequence: last, ..known };
    let begin_all = names.first().map_or(0, |oldest| oldest.first - 1);
    let settled = latest.map_or(Totals { sequence: begin_all, ..first }, |marks| marks.settled);
    let marks = Marks { acknowledged, settled };
    let remains = Remains::of(path, damaged)?;
    let batch = remains.last_batch() + 1;
    let opened = begin(path, damaged.number + 1, marks, batch, Some(&Source::Raw(remains.into())))?;
    faults::reach("damage-replaced");
    Ok(opened)
}

/// Makes a segment, with the dead letters of another.
fn begin(
    path: &Path,
    number: u64,
    marks: Marks,
    batch: u64,
    letters: Option<&Source>,
) -> Result<(Segment, Marks, u64), StoreError> {
    let mut segment = begin_segment(path, number)?;
    if let Some(source) = letters {
        let mut carrying = Carrying::of(&[piece::LETTER]);
        while carrying.next(source, &segment)? {}
    }
    finish_segment(&mut segment, &marks, batch)?;
    faults::reach("open-segment-created");
    Ok((segment, marks, batch))
}

/// The segments before the newest; those that were noted are set aside.
fn older_segments(path: &Path, newest: Name, settled: u64) -> Result<Vec<Name>, StoreError> {
    let mut names = log::segments(path)?;
    names.retain(|name| *name != newest);
    for (number, cause) in files::damaged(path) {
        if let Some(name) = names.iter_mut().find(|name| name.number == number) {
            set_aside(path, name, &cause)?;
        }
    }
    let next = names.first().unwrap_or(&newest);
    if next.first > settled + 1 {
        let gone = Name { number: next.number.saturating_sub(1), first: settled + 1, is_damaged: true };
        note_gone(path, gone)?;
        names.insert(0, gone);
    }
    Ok(names)
}

/// What is missing of the segments that were noted.
fn repairs<'a>(
    path: &Path,
    older: impl Iterator<Item = &'a Older> + Clone,
    settled: u64,
) -> Result<Vec<Repair>, StoreError> {
    let mut repairs = Vec::new();
    for (number, cause) in files::damaged(path) {
        let Some(one) = older.clone().find(|one| one.name.number == number) else { continue };
        let begin = settled.max(one.name.first - 1);
        // Each number that is missing may have been an event's.
        let (found, missing) = Remains::of(path, one.name)?.count(begin, one.last)?;
        repairs.push(Repair::SegmentSetAside { to: one.name.folder(path), cause, found, missing });
    }
    Ok(repairs)
}
