//! What takes the place of a segment that can't be trusted: what is found in its log ([`Remains`]).
//!
//! What is found of the numbers that are not settled goes into a fresh
//! segment, under its old numbers; what is missing is noted as lost. The fresh one is whole and durable before the damaged one is
//! moved away, inside of the queue's folder: who dies on the way finds the damaged one again, or the fresh one still to be put
//! in its place. Nothing that is damaged is ever deleted.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::codec;
use super::faults;
use super::files::{self, numbered, remove_folder, sync_folder};
use super::piece::{self, Block, BlockBuilder, Piece, Totals};
use super::remains::Remains;
use super::segment::{self, Changes, Segment, StoreError};
use super::values::Repair;

/// How the folders are called of what takes the place of a damaged segment.
const PREFIX: &str = "salvaged-";

/// Bytes that are written at once.
const APPLY_BYTES: usize = 512 << 10;

/// What is known of a segment before its log is searched.
#[derive(Clone, Copy)]
pub struct Asked {
    /// The first number that is wanted of it.
    pub first: u64,
    /// The totals up to the number before, where they are known.
    pub before: Option<Totals>,
    /// The totals up to its last number, where they are known; for the newest segment the last one that was acknowledged.
    pub end: Option<Totals>,
    /// The last number that it has at least.
    pub last_min: u64,
    /// It is the newest: it has marks and dead letters as well.
    pub is_newest: bool,
}

/// What came of it.
pub struct Salvaged {
    pub end: Totals,
    /// Events that were found.
    pub found: u64,
    /// Events that were not, at most.
    missing: u64,
}

/// Makes a fresh segment of what is found in the log of a damaged one, and lets it take its place once `finish` has put in what
/// it is to say besides.
pub fn salvage(
    path: &Path,
    remains: &Remains,
    asked: Asked,
    cause: String,
    finish: impl FnOnce(&Segment, &Salvaged) -> Result<(), StoreError>,
) -> Result<Salvaged, StoreError> {
    let damaged = segment::folder_of(path, remains.number);
    let fresh = fresh_folder(path, remains.number);
    remove_folder(&fresh)?;
    let segment = Segment::open(&fresh, remains.number)?;
    let mut filling = Filling { segment: &segment, changes: Changes::default() };
    // Where that mark is lost, all that is there is delivered once more.
    let settled = remains.marks.filter(|_| asked.is_newest).map(|marks| marks.settled);
    // Up to here it has nothing that is wanted.
    let begin = settled.map_or(0, |settled| settled.sequence).max(asked.first - 1);
    let before = settled.or(asked.before).filter(|before| before.sequence == begin);
    // Where nothing tells, rather too many are counted as waiting than too few.
    let acknowledged = remains.marks.map(|marks| marks.acknowledged);
    let end = Totals { sequence: begin, ..before.or(acknowledged).unwrap_or_default() };
    let mut salvaged = Salvaged { end, found: 0, missing: 0 };
    let mut is_counted = before.is_some() || begin == 0;
    fill(remains, &asked, &mut filling, &mut salvaged, &mut is_counted)?;
    let last = asked.last_min;
    if last > salvaged.end.sequence {
        // A mark that is in the log may be of a batch that never was whole: of the newest, what was acknowledged counts.
        let end = asked.end.or(acknowledged).filter(|end| end.sequence == last && is_counted);
        salvaged.missing += lost(&salvaged.end, last, end);
        let (key, value) = Block::lost(&salvaged.end, last, remains.last_start());
        filling.insert(key, value)?;
        salvaged.end.sequence = last;
    }
    if asked.is_newest {
        copy_letters(remains, &mut filling)?;
    }
    filling.apply()?;
    finish(&segment, &salvaged)?;
    segment.sync_folder()?;
    drop(segment);
    faults::reach("damage-salvaged");
    let to = files::name_aside(path, &damaged);
    let Salvaged { found, missing, .. } = salvaged;
    // Before it is moved: who dies from here on has it told at the next opening.
    files::note_repair(path, &Repair::SegmentSetAside { to: to.clone(), cause, found, missing })?;
    files::set_aside(path, &damaged, &to)?;
    faults::reach("damage-moved");
    fs::rename(&fresh, &damaged)?;
    sync_folder(path)?;
    if files::read_mark(path, files::DAMAGED, remains.number).is_some() {
        files::remove_mark(path, files::DAMAGED)?;
    }
    faults::reach("damage-replaced");
    Ok(salvaged)
}

/// Puts fresh segments in the place of damaged ones that have been moved away, and removes those that were not finished.
pub fn finish_replacing(path: &Path) -> io::Result<()> {
    for number in numbered(path, PREFIX)? {
        let (fresh, place) = (fresh_folder(path, number), segment::folder_of(path, number));
        if place.exists() {
            remove_folder(&fresh)?;
        } else {
            fs::rename(&fresh, &place)?;
            sync_folder(path)?;
        }
    }
    Ok(())
}

fn fresh_folder(path: &Path, number: u64) -> PathBuf {
    path.join(format!("{PREFIX}{number}"))
}

/// Events among the numbers up to `last` behind these totals; each number, where nothing tells the totals at `last`.
fn lost(before: &Totals, last: u64, end: Option<Totals>) -> u64 {
    end.map_or(last - before.sequence, |end| end.events.saturating_sub(before.events))
}

/// A fresh segment, and what is on its way into it.
struct Filling<'a> {
    segment: &'a Segment,
    changes: Changes,
}

impl Filling<'_> {
    fn insert(&mut self, key: Vec<u8>, value: Vec<u8>) -> Result<(), StoreError> {
        self.changes.insert(key, value);
        if self.changes.bytes() >= APPLY_BYTES { self.apply() } else { Ok(()) }
    }

    fn apply(&mut self) -> Result<(), StoreError> {
        self.segment.apply(std::mem::take(&mut self.changes))?;
        self.segment.sync()
    }
}

/// Takes over the blocks with numbers behind `salvaged.end`, and puts others in the place of those that are missing.
fn fill(
    remains: &Remains,
    asked: &Asked,
    filling: &mut Filling<'_>,
    salvaged: &mut Salvaged,
    is_counted: &mut bool,
) -> Result<(), StoreError> {
    let begin = salvaged.end.sequence;
    for sequence in remains.blocks() {
        let value = remains.value(piece::BLOCK, sequence, 0)?.unwrap_or_default();
        let Some(piece) = Piece::decode(&value) else { continue };
        let Some(block) = Block::of(&piece).filter(|block| block.last > salvaged.end.sequence) else { continue };
        if block.before.sequence > salvaged.end.sequence {
            // What is behind a gap and was never acknowledged was never committed.
            if asked.is_newest && salvaged.end.sequence >= asked.last_min {
                break;
            }
            salvaged.missing += lost(&salvaged.end, block.before.sequence, is_counted.then_some(block.before));
            let (key, value) = Block::lost(&salvaged.end, block.before.sequence, piece.start);
            filling.insert(key, value)?;
        }
        *is_counted = true;
        salvaged.end = block.totals_through(block.last);
        let (mut rebuilt, mut lost) = (BlockBuilder::default(), 0);
        for entry in &block.entries {
            if copy_chunks(remains, filling, entry)? {
                salvaged.found += u64::from(entry.record_bytes > 0 && entry.sequence > begin);
                rebuilt.add(&block.before, entry.record_bytes, entry.part);
            } else {
                lost += 1;
                rebuilt.add(&block.before, 0, &[]);
            }
        }
        salvaged.missing += lost;
        let (key, value) =
            if lost > 0 { rebuilt.take(piece.start) } else { (piece::key(piece::BLOCK, piece.sequence), value) };
        filling.insert(key, value)?;
    }
    Ok(())
}

/// Takes over the chunks of an event; says whether it is whole. A chunk that another event has left under its number is not taken
/// for its own.
fn copy_chunks(remains: &Remains, filling: &mut Filling<'_>, entry: &piece::Entry<'_>) -> Result<bool, StoreError> {
    if entry.record_bytes == 0 {
        return Ok(true);
    }
    let mut chunks = Vec::new();
    let record = entry.record(|index| {
        let value = remains.value(piece::CHUNK, entry.sequence, index)?;
        chunks.extend(value.clone().map(|value| (piece::indexed_key(piece::CHUNK, entry.sequence, index), value)));
        io::Result::Ok(value)
    })?;
    let is_whole = record.is_some_and(|record| codec::decode_event(&record).is_ok());
    if is_whole {
        chunks.into_iter().try_for_each(|(key, value)| filling.insert(key, value))?;
    }
    Ok(is_whole)
}

fn copy_letters(remains: &Remains, filling: &mut Filling<'_>) -> Result<(), StoreError> {
    for (sequence, _) in remains.pieces(piece::LETTER, 0, u64::MAX) {
        let letter = remains.value(piece::LETTER, sequence, 0)?.unwrap_or_default();
        filling.insert(piece::key(piece::LETTER, sequence), letter)?;
        for (_, index) in remains.pieces(piece::LETTER_CONTENT, sequence, sequence) {
            let content = remains.value(piece::LETTER_CONTENT, sequence, index)?.unwrap_or_default();
            filling.insert(piece::indexed_key(piece::LETTER_CONTENT, sequence, index), content)?;
        }
    }
    Ok(())
}
