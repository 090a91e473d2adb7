//! What a segment's log holds, read without sled.
//!
//! Each piece says itself what it is and has a checksum ([`piece`]), so a log is an index of whole pieces and where they are. So
//! older segments are read, which never change; copies that are looked at; and what is left of damaged ones: sled takes a log that
//! was cut for a whole one, does not say what it has passed over, and cuts off for good what it does not understand.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::codec::{self, Marks, NUMBER_MAX, Totals};
use super::files::Name;
use super::piece::{self, Block, Piece, VALUE_BYTES_MAX};
use super::segment::StoreError;

const READ_BYTES: usize = 1 << 20;

/// One piece in a log.
#[derive(Clone, Copy)]
struct Place {
    offset: u64,
    length: usize,
    batch: u64,
}

/// The whole pieces of a log.
pub struct Remains {
    pub name: Name,
    /// `None` where there is none.
    log: Option<File>,
    /// By kind, number and index; those of the latest batches.
    places: BTreeMap<(u8, u64, u32), Place>,
    /// Of a damaged one: the events whose records are not whole.
    lost: BTreeSet<u64>,
}

impl Remains {
    pub fn of(path: &Path, name: Name) -> Result<Remains, StoreError> {
        match File::open(name.folder(path).join("db")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Remains::of_log(name, None),
            log => Remains::of_log(name, Some(log?)),
        }
    }

    pub fn of_log(name: Name, log: Option<File>) -> Result<Remains, StoreError> {
        let mut remains = Remains { name, log: None, places: BTreeMap::new(), lost: BTreeSet::new() };
        if let Some(log) = &log {
            remains.search(log)?;
        }
        remains.log = log;
        // Of two blocks that follow one another none was written before the other: it is of a batch that was never committed, and whose
        // numbers were given anew.
        let mut latest = 0;
        remains.places.retain(|(kind, ..), place| {
            let is_stale = *kind == piece::BLOCK && place.batch < latest;
            latest = if *kind == piece::BLOCK { latest.max(place.batch) } else { latest };
            !is_stale
        });
        if name.is_damaged {
            remains.lost = remains.broken_records()?;
        }
        Ok(remains)
    }

    /// The events whose records are not whole. A chunk that another event has left under its number is not taken for its own.
    fn broken_records(&self) -> Result<BTreeSet<u64>, StoreError> {
        let mut broken = BTreeSet::new();
        self.each_block(|block| {
            for (number, entry) in block.numbered().filter(|(_, entry)| entry.record_bytes > 0) {
                let mut record = entry.part.to_vec();
                self.each(piece::CHUNK, number..=number, |chunk| {
                    record.extend_from_slice(chunk.content);
                    record.len() < entry.record_bytes as usize
                })?;
                if codec::decode_event(&record).is_err() {
                    broken.insert(number);
                }
            }
            Ok(())
        })?;
        Ok(broken)
    }

    pub fn is_lost(&self, number: u64) -> bool {
        self.lost.contains(&number)
    }

    /// What it says of the queue, by the latest mark.
    pub fn marks(&self) -> Option<Marks> {
        let value = self.value(piece::MARK, 0, 0).ok()??;
        codec::decode_marks(Piece::decode(&value)?.content)
    }

    /// The latest batch that wrote something of it.
    pub fn last_batch(&self) -> u64 {
        self.places.values().map(|place| place.batch).max().unwrap_or(0)
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

    fn search(&mut self, log: &File) -> io::Result<()> {
        let mut buffer: Vec<u8> = Vec::with_capacity(READ_BYTES + VALUE_BYTES_MAX);
        let (mut log, mut offset) = (log, 0);
        loop {
            let read = log.by_ref().take(READ_BYTES as u64).read_to_end(&mut buffer)?;
            // While there is more to come a value's length stays, for those that go on in what comes.
            let searched = if read == 0 { buffer.len() } else { buffer.len().saturating_sub(VALUE_BYTES_MAX) };
            let mut at = 0;
            while let Some(found) = memchr::memmem::find(buffer.get(at..).unwrap_or_default(), piece::magic()) {
                at += found;
                if at >= searched {
                    break;
                }
                let Some(piece) = Piece::find(buffer.get(at..).unwrap_or_default()) else {
                    at += 1;
                    continue;
                };
                let place = Place { offset: offset + at as u64, length: piece.bytes(), batch: piece.batch };
                let known = self.places.entry((piece.kind, piece.number, piece.index)).or_insert(place);
                if known.batch <= place.batch {
                    *known = place;
                }
                at += place.length;
            }
            let done = at.max(searched).min(buffer.len());
            buffer.drain(..done);
            offset += done as u64;
            if read == 0 {
                return Ok(());
            }
        }
    }
}
