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
use super::piece::{self, Block, Live, Piece, VALUE_BYTES_MAX};
use super::segment::StoreError;

const READ_BYTES: usize = 1 << 20;

/// What is passed over at once where the device can't read.
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
pub struct Remains {
    pub name: Name,
    /// `None` where there is none.
    log: Option<File>,
    /// Those of the latest batches.
    places: BTreeMap<Key, Place>,
    /// Of a damaged one: the events whose records are not whole.
    lost: BTreeSet<u64>,
    /// The latest batch of which something is in the log, whole or not.
    pub last_batch: u64,
}

impl Remains {
    /// Of a segment before the newest: what was never committed is behind its last number.
    pub fn of(path: &Path, name: Name) -> Result<Remains, StoreError> {
        Remains::of_newest(path, name, Highest { batch: u64::MAX, ..Highest::default() })
    }

    /// Of the segment that was written last.
    pub fn of_newest(path: &Path, name: Name, highest: Highest) -> Result<Remains, StoreError> {
        match File::open(name.folder(path).join("db")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Remains::of_log(name, None, highest),
            log => Remains::of_log(name, Some(log?), highest),
        }
    }

    pub fn of_log(name: Name, log: Option<File>, highest: Highest) -> Result<Remains, StoreError> {
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
        let value = self.read(&place)?;
        let pieces =
            Piece::decode(&value).and_then(|piece| codec::decode_marks(piece.content)).map(|(_, pieces)| pieces);
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
        self.each_block(|block| {
            for (number, entry) in block.numbered().filter(|(_, entry)| entry.record_bytes > 0) {
                let record = piece::record(entry, |visit| self.each(piece::CHUNK, number..=number, visit))?;
                if codec::decode_event(&record).is_err() {
                    broken.insert(number);
                }
            }
            Ok(())
        })?;
        Ok(broken)
    }

    /// Makes it durable, as far as it is not.
    pub fn sync(&self) -> io::Result<()> {
        self.log.as_ref().map_or(Ok(()), File::sync_data)
    }

    pub fn is_lost(&self, number: u64) -> bool {
        self.lost.contains(&number)
    }

    /// What it says of the queue, by the latest mark, and the batch of that.
    pub fn marks(&self) -> Option<(Marks, u64)> {
        let value = self.value(piece::MARK, 0, 0).ok()??;
        let piece = Piece::decode(&value)?;
        codec::decode_marks(piece.content).map(|(marks, _)| (marks, piece.batch))
    }

    /// The dead letters that are there.
    pub fn letters(&self) -> Result<Letters, StoreError> {
        let (mut letters, mut live) = (Letters::default(), Live::default());
        self.each(piece::LETTER, 0..=NUMBER_MAX, |piece| {
            if live.passes(piece) {
                letters.count += u64::from(piece.index == 0);
                letters.bytes += piece.content.len() as u64;
            }
            true
        })?;
        Ok(letters)
    }

    /// The last number with which a block begins up to this one.
    pub fn last_block(&self, number: u64) -> Option<u64> {
        self.places.range((piece::BLOCK, 0, 0)..=(piece::BLOCK, number, 0)).next_back().map(|((_, begin, _), _)| *begin)
    }

    /// The first number behind this one with which a block begins.
    pub fn next_block(&self, number: u64) -> Option<u64> {
        let behind = (piece::BLOCK, number + 1, 0)..=(piece::BLOCK, NUMBER_MAX, 0);
        self.places.range(behind).next().map(|((_, begin, _), _)| *begin)
    }

    /// The totals up to the number before the first that is there.
    pub fn before(&self) -> Option<Totals> {
        self.block(self.next_block(0)?, |block| block.before)
    }

    /// The totals up to a number, or to the last one before it that is there.
    pub fn totals_through(&self, number: u64) -> Option<Totals> {
        self.block(self.last_block(number)?, |block| block.totals_through(number))
    }

    /// The last number up to which all are there from `first` on; the one before it where that is not.
    pub fn whole_through(&self, first: u64) -> u64 {
        let mut last = first - 1;
        let begin = self.last_block(first).unwrap_or(first);
        for ((_, begin, _), _) in self.places.range((piece::BLOCK, begin, 0)..=(piece::BLOCK, NUMBER_MAX, 0)) {
            if *begin > last + 1 {
                break;
            }
            last = last.max(self.block(*begin, |block| block.last()).unwrap_or(0));
        }
        last
    }

    /// How many events are there behind the number `begin` up to `last`, and how many numbers are missing.
    pub fn count(&self, begin: u64, last: u64) -> Result<(u64, u64), StoreError> {
        let (mut events, mut others) = (0, 0);
        self.each_block(|block| {
            for (number, entry) in block.numbered().filter(|(number, _)| (begin + 1..=last).contains(number)) {
                events += u64::from(entry.record_bytes > 0 && !self.is_lost(number));
                others += u64::from(entry.record_bytes == 0);
            }
            Ok(())
        })?;
        Ok((events, last.saturating_sub(begin).saturating_sub(events + others)))
    }

    /// The value of a piece.
    pub fn value(&self, kind: u8, number: u64, index: u32) -> Result<Option<Vec<u8>>, StoreError> {
        self.places.get(&(kind, number, index)).map(|place| self.read(place)).transpose()
    }

    /// Gives `visit` the pieces of a kind, in order, until it has enough.
    pub fn each(
        &self,
        kind: u8,
        numbers: RangeInclusive<u64>,
        mut visit: impl FnMut(&Piece<'_>) -> bool,
    ) -> Result<(), StoreError> {
        let (first, last) = numbers.into_inner();
        for place in self.places.range((kind, first, 0)..=(kind, last, u32::MAX)).map(|(_, place)| place) {
            let value = self.read(place)?;
            if let Some(piece) = Piece::decode(&value)
                && !visit(&piece)
            {
                break;
            }
        }
        Ok(())
    }

    fn each_block(&self, mut visit: impl FnMut(&Block<'_>) -> Result<(), StoreError>) -> Result<(), StoreError> {
        let mut result = Ok(());
        self.each(piece::BLOCK, 0..=NUMBER_MAX, |piece| {
            result = Block::of(piece).as_ref().map_or(Ok(()), &mut visit);
            result.is_ok()
        })?;
        result
    }

    fn block<T>(&self, begin: u64, read: impl FnOnce(&Block<'_>) -> T) -> Option<T> {
        let value = self.value(piece::BLOCK, begin, 0).ok()??;
        Some(read(&Block::of(&Piece::decode(&value)?)?))
    }

    fn read(&self, place: &Place) -> Result<Vec<u8>, StoreError> {
        let mut value = vec![0; place.length];
        if let Some(log) = &self.log {
            log.read_exact_at(&mut value, place.offset)?;
        }
        Ok(value)
    }
}

/// All whole pieces in a log, in the order of their places.
fn search(log: &File) -> io::Result<Vec<(Key, Place)>> {
    let (mut found, mut offset) = (Vec::new(), 0);
    let mut buffer: Vec<u8> = Vec::with_capacity(READ_BYTES + VALUE_BYTES_MAX);
    loop {
        let read = read_more(log, offset + buffer.len() as u64, &mut buffer)?;
        // While there is more to come a value's length stays, for those that go on in what comes.
        let searched = if read == 0 { buffer.len() } else { buffer.len().saturating_sub(VALUE_BYTES_MAX) };
        let mut at = 0;
        while let Some(next) = memchr::memmem::find(buffer.get(at..).unwrap_or_default(), piece::magic()) {
            at += next;
            if at >= searched {
                break;
            }
            let Some(piece) = Piece::find(buffer.get(at..).unwrap_or_default()) else {
                at += 1;
                continue;
            };
            let place = Place { offset: offset + at as u64, length: piece.bytes(), batch: piece.batch };
            found.push(((piece.kind, piece.number, piece.index), place));
            at += place.length;
        }
        let done = at.max(searched).min(buffer.len());
        buffer.drain(..done);
        offset += done as u64;
        if read == 0 {
            return Ok(found);
        }
    }
}

/// Reads on at `offset`. What the device can't read is passed over, and missed where it mattered.
fn read_more(log: &File, offset: u64, buffer: &mut Vec<u8>) -> io::Result<usize> {
    let begin = buffer.len();
    for length in [READ_BYTES, SECTOR_BYTES] {
        buffer.resize(begin + length, 0);
        match log.read_at(buffer.get_mut(begin..).unwrap_or_default(), offset) {
            Ok(read) => {
                buffer.truncate(begin + read);
                return Ok(read);
            }
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {}
            Err(error) => return Err(error),
        }
    }
    buffer.get_mut(begin..).unwrap_or_default().fill(0);
    Ok(SECTOR_BYTES)
}
