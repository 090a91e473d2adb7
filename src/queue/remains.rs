//! What a segment's log holds, read without sled.
//!
//! Each piece says itself what it is and has a checksum ([`piece`]), so a log is an index of whole pieces and where they are. So
//! older segments are read, which never change; at a start the one that was written last; all that are looked at; and what is left of
//! damaged ones: sled takes a log that was cut for a whole one, does not say what it has passed over, and cuts off for good what it
//! does not understand.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::codec::{self, Letters, Marks, NUMBER_MAX, Totals};
use super::files::{Highest, Name};
use super::piece::{self, Block, Piece, VALUE_BYTES_MAX};
use super::segment::StoreError;

/// What is searched at once.
const READ_BYTES: usize = 1 << 20;

/// What is read at once, and passed over where the device can't.
const SECTOR_BYTES: usize = 4096;

/// One piece in a log.
#[derive(Clone, Copy)]
struct Place {
    offset: u64,
    length: usize,
    batch: u64,
}

/// A kind, a number and an index.
type Key = (u8, u64, u32);

/// The whole pieces of a log.
pub(super) struct Remains {
    pub name: Name,
    /// `None` where there is none.
    log: Option<File>,
    /// Those of the latest batches.
    places: BTreeMap<Key, Place>,
    /// Of a damaged one: the events whose records are not whole.
    pub lost: BTreeSet<u64>,
    /// The latest batch of which something is in the log, whole or not.
    pub last_batch: u64,
}

impl Remains {
    /// Of a segment before the newest: what was never committed is behind its last number.
    pub(super) fn of(path: &Path, name: Name) -> Result<Remains, StoreError> {
        Remains::of_newest(path, name, Highest { batch: u64::MAX, ..Highest::default() })
    }

    /// Of the segment that was written last.
    pub(super) fn of_newest(path: &Path, name: Name, highest: Highest) -> Result<Remains, StoreError> {
        let log = match File::open(name.folder(path).join("db")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            log => Some(log?),
        };
        let found = log.as_ref().map(search).transpose()?.unwrap_or_default();
        let last_batch = found.iter().map(|(_, place)| place.batch).max().unwrap_or(0);
        let mut remains = Remains { name, log, places: BTreeMap::new(), lost: BTreeSet::new(), last_batch };
        let committed = remains.committed(&found, highest)?;
        for (key, place) in found.into_iter().filter(|(_, place)| place.batch <= committed) {
            let known = remains.places.entry(key).or_insert(place);
            if known.batch < place.batch {
                *known = place;
            }
        }
        if name.is_damaged {
            remains.lost = remains.broken_records()?;
        }
        Ok(remains)
    }

    /// The last batch that was committed: one that was torn, by a kill or a power cut, was not. What was acknowledged was, whatever is
    /// left of it.
    fn committed(&self, found: &[(Key, Place)], highest: Highest) -> Result<u64, StoreError> {
        let mut marks = BTreeMap::new();
        for (_, place) in found.iter().filter(|((kind, ..), _)| *kind == piece::MARK) {
            marks.insert(place.batch, *place);
        }
        let mut marks = marks.into_iter().rev();
        let Some((batch, place)) = marks.next() else {
            return Ok(if highest.batch == 0 { u64::MAX } else { highest.batch });
        };
        let mark = self.read(&place)?.and_then(|piece| codec::decode_marks(&piece.content));
        let pieces = mark.map(|(_, pieces)| pieces);
        let of_batch: BTreeSet<&Key> =
            found.iter().filter(|(_, place)| place.batch == batch).map(|(key, _)| key).collect();
        let is_whole = pieces == Some(of_batch.len() as u64);
        let committed =
            if is_whole || batch <= highest.batch { batch } else { marks.next().map_or(0, |(batch, _)| batch) };
        Ok(committed.max(highest.batch))
    }

    /// The events whose records are not whole. A chunk that another event has left under its number is not taken for its own.
    fn broken_records(&self) -> Result<BTreeSet<u64>, StoreError> {
        let mut broken = BTreeSet::new();
        for block in self.blocks(0) {
            for (Totals { sequence, .. }, entry) in block?.numbered().filter(|(_, entry)| entry.record_bytes > 0) {
                let record = piece::record(&entry, self.pieces(piece::CHUNK, sequence..=sequence))?;
                if codec::decode_event(sequence, &record).is_err() {
                    broken.insert(sequence);
                }
            }
        }
        Ok(broken)
    }

    /// Makes it durable, as far as it is not.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.log.as_ref().map_or(Ok(()), File::sync_data)
    }

    /// What it says of the queue, by the latest mark, and the batch of that.
    pub(super) fn marks(&self) -> Option<(Marks, u64)> {
        let mark = self.pieces(piece::MARK, 0..=0).next()?.ok()?;
        codec::decode_marks(&mark.content).map(|(marks, _)| (marks, mark.batch))
    }

    /// The dead letters that are there.
    pub(super) fn letters(&self) -> Result<Letters, StoreError> {
        let mut letters = Letters::default();
        for letter in piece::records(self.pieces(piece::LETTER, 0..=NUMBER_MAX)) {
            letters.count += 1;
            letters.bytes += letter?.content.len() as u64;
        }
        Ok(letters)
    }

    /// The last block that begins with this number or a smaller one.
    pub(super) fn last_block(&self, number: u64) -> Result<Option<Block>, StoreError> {
        let place = self.places.range((piece::BLOCK, 0, 0)..=(piece::BLOCK, number, 0)).next_back();
        let piece = place.map_or(Ok(None), |(_, place)| self.read(place))?;
        Ok(piece.as_ref().and_then(Block::of))
    }

    /// The first number behind this one with which a block begins.
    pub(super) fn next_block(&self, number: u64) -> Option<u64> {
        let behind = (piece::BLOCK, number + 1, 0)..=(piece::BLOCK, NUMBER_MAX, 0);
        self.places.range(behind).next().map(|((_, begin, _), _)| *begin)
    }

    /// The totals up to the number before the first that is there.
    pub(super) fn before(&self) -> Option<Totals> {
        Some(self.blocks(0).next()?.ok()?.before)
    }

    /// The totals up to the last number that is there.
    pub(super) fn end(&self) -> Option<Totals> {
        let (totals, _) = self.last_block(NUMBER_MAX).ok()??.numbered().last()?;
        Some(totals)
    }

    /// The last number up to which all are there from `first` on; the one before it where that is not.
    pub(super) fn whole_through(&self, first: u64) -> u64 {
        let begin = self.last_block(first).ok().flatten().map_or(first, |block| block.before.sequence + 1);
        let mut last = first - 1;
        for block in self.blocks(begin).map_while(Result::ok) {
            if block.before.sequence > last {
                break;
            }
            last = last.max(block.last());
        }
        last
    }

    /// How many events are there behind the number `begin` up to `last`, and how many numbers are missing.
    pub(super) fn count(&self, begin: u64, last: u64) -> Result<(u64, u64), StoreError> {
        let (mut events, mut others) = (0, 0);
        for block in self.blocks(0) {
            for (Totals { sequence, .. }, entry) in block?.numbered() {
                if (begin + 1..=last).contains(&sequence) {
                    events += u64::from(entry.record_bytes > 0 && !self.lost.contains(&sequence));
                    others += u64::from(entry.record_bytes == 0);
                }
            }
        }
        Ok((events, last.saturating_sub(begin).saturating_sub(events + others)))
    }

    /// The pieces of a kind, in order.
    pub(super) fn pieces(
        &self,
        kind: u8,
        numbers: RangeInclusive<u64>,
    ) -> impl Iterator<Item = Result<Piece, StoreError>> {
        let (first, last) = numbers.into_inner();
        let places = self.places.range((kind, first, 0)..=(kind, last, u32::MAX));
        places.filter_map(|(_, place)| self.read(place).transpose())
    }

    /// The blocks that begin with this number or a greater one, in order.
    fn blocks(&self, first: u64) -> impl Iterator<Item = Result<Block, StoreError>> {
        let pieces = self.pieces(piece::BLOCK, first..=NUMBER_MAX);
        pieces.filter_map(|piece| piece.map(|piece| Block::of(&piece)).transpose())
    }

    /// `None` where it is damaged by now.
    fn read(&self, place: &Place) -> Result<Option<Piece>, StoreError> {
        let mut value = vec![0; place.length];
        if let Some(log) = &self.log {
            log.read_exact_at(&mut value, place.offset)?;
        }
        Ok(Piece::decode(&value))
    }
}

/// All whole pieces in a log, in the order of their places.
fn search(log: &File) -> io::Result<Vec<(Key, Place)>> {
    let (mut found, mut free) = (Vec::new(), 0);
    // What begins at the end of one part goes on in the next.
    let mut part = vec![0; READ_BYTES + VALUE_BYTES_MAX];
    for begin in (0..log.metadata()?.len()).step_by(READ_BYTES) {
        read_part(log, begin, &mut part)?;
        for at in memchr::memmem::find_iter(&part, &piece::MAGIC).take_while(|at| *at < READ_BYTES) {
            let offset = begin + at as u64;
            if offset >= free
                && let Some(piece) = Piece::find(part.get(at..).unwrap_or_default())
            {
                let place = Place { offset, length: piece.bytes(), batch: piece.batch };
                found.push(((piece.kind, piece.number, piece.index), place));
                free = offset + place.length as u64;
            }
        }
    }
    Ok(found)
}

/// Reads the part of a log that begins there. What is behind its end, or what the device can't read, is zeros: it is missed where
/// it mattered.
fn read_part(log: &File, begin: u64, part: &mut [u8]) -> io::Result<()> {
    for (sector, offset) in part.chunks_mut(SECTOR_BYTES).zip((begin..).step_by(SECTOR_BYTES)) {
        let read = match log.read_at(sector, offset) {
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => 0,
            read => read?,
        };
        sector.iter_mut().skip(read).for_each(|byte| *byte = 0);
    }
    Ok(())
}
