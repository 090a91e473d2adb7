//! What can still be had from a segment that can't be trusted: its log is searched for whole pieces, without sled.
//!
//! Each piece says itself what it is, and has a checksum. What is found of the numbers that are not settled goes into a fresh
//! segment, under its old numbers; what is missing becomes a hole. The fresh one is whole and durable before the damaged one is
//! moved away, inside of the queue's folder: who dies on the way finds the damaged one again, or the fresh one still to be put
//! in its place. Nothing that is damaged is ever deleted.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::piece::{self, Block, BlockBuilder, Hole, Piece, Totals, VALUE_BYTES_MAX};
use super::segment::{self, Changes, Segment, StoreError};
use crate::event::Timestamp;
use crate::queue::faults;
use crate::queue::folder::{remove_folder, sync_folder};

const READ_BYTES: usize = 1 << 20;

/// Bytes that are written at once.
const APPLY_BYTES: usize = 512 << 10;

/// What is known of a segment before its log is searched.
#[derive(Clone, Copy)]
pub struct Asked {
    pub number: u64,
    /// The first number that is wanted of it.
    pub first: u64,
    /// The totals up to the number before, where they are known.
    pub before: Option<Totals>,
    /// The totals up to its last number, where they are known; for the newest segment the last one that was acknowledged.
    pub end: Option<Totals>,
    /// The last number that it has at least.
    pub last_min: u64,
    /// It is the newest: it has marks, dead letters and holes as well.
    pub is_newest: bool,
}

/// What came of it.
pub struct Salvaged {
    /// Where the damaged one is now.
    pub to: PathBuf,
    pub end: Totals,
    /// What is settled, where the newest segment tells.
    pub settled: Option<Totals>,
    /// The totals are those of all events, not only of those that were found.
    is_counted: bool,
    pub holes: Vec<Hole>,
    /// Events that were found.
    pub found: u64,
}

/// Where pieces are in the log, by key; the last ones that were written.
type Places = BTreeMap<Vec<u8>, Found>;

/// One piece in a log.
#[derive(Clone, Copy)]
struct Found {
    sequence: u64,
    offset: u64,
    length: usize,
    opened: u64,
}

/// Makes a fresh segment of what is found in the log of a damaged one, and lets it take its place once `finish` has put in what
/// it is to say besides.
pub fn salvage(
    path: &Path,
    asked: Asked,
    finish: impl FnOnce(&Segment, &Salvaged) -> Result<(), StoreError>,
) -> Result<Salvaged, StoreError> {
    let damaged = segment::folder_of(path, asked.number);
    let fresh = fresh_folder(path, asked.number);
    remove_folder(&fresh)?;
    let log = File::open(damaged.join("db"));
    let (places, marks) = match &log {
        Ok(log) => search(log)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Default::default(),
        Err(error) => return Err(StoreError::Io(error.to_string())),
    };
    let segment = Segment::open(&fresh, asked.number)?.0;
    let mut filling =
        Filling { segment: &segment, changes: Changes::default(), builder: BlockBuilder::default(), opened: 0 };
    // Where that mark is lost, all that is there is delivered once more.
    let settled = asked.is_newest.then_some(marks.settled).flatten();
    // Up to here it has nothing that is wanted.
    let begin = settled.map_or(0, |settled| settled.sequence).max(asked.first - 1);
    let before = settled.or(asked.before).filter(|before| before.sequence == begin);
    let mut salvaged = Salvaged {
        to: PathBuf::new(),
        end: before.unwrap_or(Totals { sequence: begin, ..Totals::default() }),
        settled,
        is_counted: before.is_some() || begin == 0,
        holes: Vec::new(),
        found: 0,
    };
    if let Ok(log) = &log {
        fill(log, &places, &asked, &mut filling, &mut salvaged)?;
    }
    // A mark that is in the log may be of a batch that never was whole: of the newest, what was acknowledged counts.
    let end = asked.end.or(marks.acknowledged).filter(|end| end.sequence == asked.last_min);
    let last = asked.last_min.max(begin);
    if last > salvaged.end.sequence {
        let before = salvaged.end;
        let first = before.sequence.max(begin) + 1;
        // Where nothing tells, each number was an event's.
        let unknown = || Totals { sequence: last, events: before.events + (last + 1 - first), bytes: before.bytes };
        salvaged.end = end.filter(|end| end.sequence == last).unwrap_or_else(unknown);
        if first <= last {
            // Where nothing was found nothing says how many events were before it.
            let known = salvaged.is_counted;
            let events = if known { salvaged.end.events.saturating_sub(before.events) } else { last + 1 - first };
            let bytes = if known { salvaged.end.bytes.saturating_sub(before.bytes) } else { 0 };
            salvaged.holes.push(Hole { first, last, events, bytes });
        }
    }
    if asked.is_newest
        && let Ok(log) = &log
    {
        copy_letters(log, &places, &mut filling)?;
    }
    filling.apply()?;
    finish(&segment, &salvaged)?;
    segment.sync_folder()?;
    drop(segment);
    faults::reach("damage-salvaged");
    salvaged.to = set_aside(path, &damaged)?;
    faults::reach("damage-moved");
    fs::rename(&fresh, &damaged)?;
    sync_folder(path)?;
    faults::reach("damage-replaced");
    Ok(salvaged)
}

/// Whether all numbers from `first` to `last` are in a log; of the newest segment, which has no `first`, those that it has itself
/// behind what is settled. Looked up without sled: what is damaged sled may pass over, and cut off for good.
pub fn is_whole(log: &Path, first: Option<u64>, last: u64) -> io::Result<bool> {
    let log = File::open(log)?;
    let (places, marks) = search(&log)?;
    let mut blocks = Vec::new();
    for place in places.range(piece::all_keys(piece::BLOCK)).map(|(_, place)| *place) {
        let value = read_value(&log, place)?;
        let block = Piece::decode(&value).and_then(|piece| Block::of(&piece).map(|block| block.last()));
        blocks.extend(block.map(|end| (place.sequence, end)));
    }
    let settled = marks.settled.map_or(0, |settled| settled.sequence);
    let mut next = match (first, blocks.first()) {
        (Some(first), _) => first,
        (None, Some((begin, _))) => settled.max(begin - 1) + 1,
        // What there is may be in the segments before it.
        (None, None) => return Ok(marks.acknowledged.is_some_and(|acknowledged| acknowledged.sequence >= last)),
    };
    for (begin, end) in blocks {
        if begin <= next {
            next = next.max(end + 1);
        }
    }
    Ok(next > last)
}

/// Puts fresh segments in the place of damaged ones that have been moved away, and removes those that were not finished.
pub fn finish_replacing(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.strip_prefix("salvaged-")?.parse::<u64>().ok());
        let Some(number) = number else { continue };
        let place = segment::folder_of(path, number);
        if place.exists() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::rename(entry.path(), &place)?;
            sync_folder(path)?;
        }
    }
    Ok(())
}

fn fresh_folder(path: &Path, number: u64) -> PathBuf {
    path.join(format!("salvaged-{number}"))
}

/// Moves something in the queue's folder away under a name that says when. It stays inside of it: that may be a mount point.
pub fn set_aside(path: &Path, what: &Path) -> io::Result<PathBuf> {
    let time = Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let name = what.file_name().unwrap_or_default().to_string_lossy();
    for attempt in 0..100 {
        let suffix = if attempt == 0 { String::new() } else { format!("-{attempt}") };
        let to = path.join(format!("damaged-{time}{suffix}-{name}"));
        if !to.exists() {
            match fs::rename(what, &to) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => fs::create_dir(&to)?,
                renamed => renamed?,
            }
            sync_folder(path)?;
            return Ok(to);
        }
    }
    Err(io::Error::new(io::ErrorKind::AlreadyExists, "no free name for what is damaged"))
}

/// The newest marks that were found.
#[derive(Default)]
struct Marks {
    acknowledged: Option<Totals>,
    settled: Option<Totals>,
}

fn search(log: &File) -> io::Result<(Places, Marks)> {
    let mut places = Places::new();
    let mut marks = Marks::default();
    let mut buffer: Vec<u8> = Vec::with_capacity(READ_BYTES + VALUE_BYTES_MAX);
    let mut offset = 0;
    loop {
        let read = log.take(READ_BYTES as u64).read_to_end(&mut buffer)?;
        // While there is more to come a value's length stays, for those that go on in what comes.
        let searched = if read == 0 { buffer.len() } else { buffer.len().saturating_sub(VALUE_BYTES_MAX) };
        let mut at = 0;
        while let Some(found) = memchr::memmem::find(buffer.get(at..).unwrap_or_default(), piece::magic()) {
            at += found;
            if at >= searched {
                break;
            }
            let Some((piece, length)) = Piece::find(buffer.get(at..).unwrap_or_default()) else {
                at += 1;
                continue;
            };
            let later = |mark: Option<Totals>| {
                Totals::of(&piece).filter(|new| mark.is_none_or(|known| new.sequence >= known.sequence)).or(mark)
            };
            match piece.kind {
                piece::ACKNOWLEDGED => marks.acknowledged = later(marks.acknowledged),
                piece::SETTLED => marks.settled = later(marks.settled),
                piece::BLOCK | piece::LETTER | piece::CHUNK | piece::LETTER_CONTENT => {
                    let key = match piece.kind {
                        piece::BLOCK | piece::LETTER => piece::key(piece.kind, piece.sequence),
                        _ => piece::indexed_key(piece.kind, piece.sequence, piece.index),
                    };
                    let found =
                        Found { sequence: piece.sequence, offset: offset + at as u64, length, opened: piece.opened };
                    let known = places.entry(key).or_insert(found);
                    if known.opened <= found.opened {
                        *known = found;
                    }
                }
                _ => {}
            }
            at += length;
        }
        let done = at.max(searched).min(buffer.len());
        buffer.drain(..done);
        offset += done as u64;
        if read == 0 {
            return Ok((places, marks));
        }
    }
}

fn read_value(log: &File, found: Found) -> io::Result<Vec<u8>> {
    let mut value = vec![0; found.length];
    log.read_exact_at(&mut value, found.offset)?;
    Ok(value)
}

/// A fresh segment, and what is on its way into it.
struct Filling<'a> {
    segment: &'a Segment,
    changes: Changes,
    builder: BlockBuilder,
    /// Of the block that is taken over.
    opened: u64,
}

impl Filling<'_> {
    fn insert(&mut self, key: Vec<u8>, value: Vec<u8>) -> Result<(), StoreError> {
        self.changes.insert(key, value);
        if self.changes.bytes() >= APPLY_BYTES { self.apply() } else { Ok(()) }
    }

    fn close_block(&mut self) -> Result<(), StoreError> {
        if self.builder.is_empty() {
            return Ok(());
        }
        let (key, value) = self.builder.take(self.opened);
        self.insert(key, value)
    }

    fn apply(&mut self) -> Result<(), StoreError> {
        self.segment.apply(std::mem::take(&mut self.changes))?;
        self.segment.sync()
    }
}

/// Takes over the events behind `salvaged.end` that are whole.
fn fill(
    log: &File,
    places: &Places,
    asked: &Asked,
    filling: &mut Filling<'_>,
    salvaged: &mut Salvaged,
) -> Result<(), StoreError> {
    for (_, place) in places.range(piece::all_keys(piece::BLOCK)) {
        let value = read_value(log, *place)?;
        let Some(piece) = Piece::decode(&value) else { continue };
        let Some(block) = Block::of(&piece) else { continue };
        filling.opened = filling.opened.max(piece.opened);
        for entry in &block.entries {
            if entry.sequence <= salvaged.end.sequence {
                continue;
            }
            let before = block.totals_through(entry.sequence - 1);
            let missing = entry.sequence - salvaged.end.sequence - 1;
            if missing > 0 {
                // What is behind a gap and was never acknowledged was never committed.
                if asked.is_newest && salvaged.end.sequence >= asked.last_min {
                    return filling.close_block();
                }
                filling.close_block()?;
                // Of the first hole nothing says how many events were before it.
                let known = salvaged.is_counted;
                let events = if known { before.events.saturating_sub(salvaged.end.events) } else { missing };
                let bytes = if known { before.bytes.saturating_sub(salvaged.end.bytes) } else { 0 };
                salvaged.holes.push(Hole { first: salvaged.end.sequence + 1, last: entry.sequence - 1, events, bytes });
            }
            salvaged.is_counted = true;
            salvaged.end = block.totals_through(entry.sequence);
            if copy_chunks(log, places, filling, entry)? {
                if !filling.builder.has_room(entry.part.len()) {
                    filling.close_block()?;
                }
                filling.builder.add(&before, entry.record_bytes, entry.part);
                salvaged.found += u64::from(entry.record_bytes > 0);
            } else {
                filling.close_block()?;
                let bytes = u64::from(entry.record_bytes);
                salvaged.holes.push(Hole { first: entry.sequence, last: entry.sequence, events: 1, bytes });
            }
        }
    }
    filling.close_block()
}

/// Takes over the chunks of an event; says whether it is whole.
fn copy_chunks(
    log: &File,
    places: &Places,
    filling: &mut Filling<'_>,
    entry: &piece::Entry<'_>,
) -> Result<bool, StoreError> {
    let mut missing = (entry.record_bytes as usize).saturating_sub(entry.part.len());
    let mut index = 1;
    while missing > 0 {
        let key = piece::indexed_key(piece::CHUNK, entry.sequence, index);
        let Some(place) = places.get(&key) else { return Ok(false) };
        let content_bytes = place.length - piece::HEADER_BYTES;
        if content_bytes == 0 || content_bytes > missing {
            return Ok(false);
        }
        filling.insert(key, read_value(log, *place)?)?;
        missing -= content_bytes;
        index += 1;
    }
    Ok(true)
}

fn copy_letters(log: &File, places: &Places, filling: &mut Filling<'_>) -> Result<(), StoreError> {
    for (key, place) in places.range(piece::all_keys(piece::LETTER)) {
        filling.insert(key.clone(), read_value(log, *place)?)?;
        let sequence = piece::key_sequence(key).unwrap_or_default();
        for (key, place) in places.range(piece::keys(piece::LETTER_CONTENT, sequence..=sequence)) {
            filling.insert(key.clone(), read_value(log, *place)?)?;
        }
    }
    Ok(())
}
