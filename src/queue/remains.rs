//! What a segment's log holds, read without sled.
//!
//! Each piece says itself what it is and has a checksum ([`piece`]), so a log is an index of whole pieces and where they are. So
//! older segments are read, which never change, and what is left of damaged ones: sled takes a log that was cut for a whole one, does not say
//! what it has passed over, and cuts off for good what it does not understand.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::piece::{self, Block, Marks, Piece, Totals, VALUE_BYTES_MAX};
use super::segment::{self, StoreError};

const READ_BYTES: usize = 1 << 20;

/// One piece in a log.
#[derive(Clone, Copy)]
struct Place {
    offset: u64,
    length: usize,
    /// The start in which it was written.
    start: u64,
}

/// The whole pieces of a log.
#[derive(Default)]
pub struct Remains {
    pub number: u64,
    /// `None` where there is none.
    log: Option<File>,
    pub log_bytes: u64,
    /// By kind, number and index; the last ones that were written.
    places: BTreeMap<(u8, u64, u32), Place>,
    /// The latest start in which something of it was written.
    pub start: u64,
    /// The newest that were found.
    pub marks: Option<Marks>,
}

impl Remains {
    pub fn of(path: &Path, number: u64) -> Result<Remains, StoreError> {
        let mut remains = Remains { number, ..Remains::default() };
        match File::open(segment::folder_of(path, number).join("db")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            log => {
                let log = log?;
                remains.log_bytes = log.metadata()?.len();
                remains.search(&log)?;
                remains.log = Some(log);
            }
        }
        remains.forget_uncommitted();
        Ok(remains)
    }

    /// Whether all numbers from `first` to `last` are there; of the newest segment, which has no `first`, those that it has itself
    /// behind what is settled, and its mark.
    pub fn is_whole(&self, first: Option<u64>, last: u64) -> bool {
        let mut next = match (first, self.first()) {
            (Some(first), _) => first,
            (None, Some(begin)) => self.marks.map_or(0, |marks| marks.settled.sequence).max(begin - 1) + 1,
            // What there is may be in the segments before it.
            (None, None) => last + 1,
        };
        for sequence in self.blocks() {
            let end = self.block(sequence, |block| block.last).unwrap_or(0);
            if sequence <= next {
                next = next.max(end + 1);
            }
        }
        let is_acknowledged = self.marks.is_some_and(|marks| marks.acknowledged.sequence >= last);
        next > last && (first.is_some() || is_acknowledged)
    }

    /// The numbers with which blocks begin.
    pub fn blocks(&self) -> impl DoubleEndedIterator<Item = u64> {
        self.places.range((piece::BLOCK, 0, 0)..(piece::BLOCK + 1, 0, 0)).map(|((_, sequence, _), _)| *sequence)
    }

    /// The first number that is there.
    pub fn first(&self) -> Option<u64> {
        self.blocks().next()
    }

    /// The totals up to the number before it.
    pub fn before(&self) -> Option<Totals> {
        self.block(self.first()?, |block| block.before)
    }

    /// The totals up to the last number that is there.
    pub fn end(&self) -> Option<Totals> {
        self.block(self.blocks().next_back()?, |block| block.totals_through(block.last))
    }

    /// The start in which the last of the blocks was written.
    pub fn last_start(&self) -> u64 {
        let last = self.blocks().next_back().and_then(|sequence| self.places.get(&(piece::BLOCK, sequence, 0)));
        last.map_or(0, |place| place.start)
    }

    /// The value of a piece.
    pub fn value(&self, kind: u8, sequence: u64, index: u32) -> io::Result<Option<Vec<u8>>> {
        let (Some(place), Some(log)) = (self.places.get(&(kind, sequence, index)), &self.log) else { return Ok(None) };
        let mut value = vec![0; place.length];
        log.read_exact_at(&mut value, place.offset)?;
        Ok(Some(value))
    }

    /// The pieces of a kind from `first` to `last`: their numbers and indexes.
    pub fn pieces(&self, kind: u8, first: u64, last: u64) -> impl DoubleEndedIterator<Item = (u64, u32)> {
        let places = self.places.range((kind, first, 0)..=(kind, last, u32::MAX));
        places.map(|((_, sequence, index), _)| (*sequence, *index))
    }

    fn block<T>(&self, sequence: u64, read: impl FnOnce(&Block<'_>) -> T) -> Option<T> {
        let value = self.value(piece::BLOCK, sequence, 0).ok()??;
        Some(read(&Block::of(&Piece::decode(&value)?)?))
    }

    /// Forgets blocks of batches that were never committed and whose numbers were given anew: of two that follow one another none was
    /// written in an earlier start than the one before.
    fn forget_uncommitted(&mut self) {
        let mut latest = 0;
        self.places.retain(|(kind, ..), place| {
            let is_stale = *kind == piece::BLOCK && place.start < latest;
            latest = if *kind == piece::BLOCK { latest.max(place.start) } else { latest };
            !is_stale
        });
    }

    fn search(&mut self, log: &File) -> io::Result<()> {
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
                self.note(&piece, offset + at as u64, length);
                at += length;
            }
            let done = at.max(searched).min(buffer.len());
            buffer.drain(..done);
            offset += done as u64;
            if read == 0 {
                return Ok(());
            }
        }
    }

    fn note(&mut self, piece: &Piece<'_>, offset: u64, length: usize) {
        self.start = self.start.max(piece.start);
        match piece.kind {
            piece::MARK => {
                let age = |marks: &Marks| (marks.start, marks.acknowledged.sequence, marks.settled.sequence);
                self.marks = self.marks.into_iter().chain(Marks::of(piece)).max_by_key(age);
            }
            piece::BLOCK | piece::LETTER | piece::CHUNK | piece::LETTER_CONTENT => {
                let place = Place { offset, length, start: piece.start };
                let known = self.places.entry((piece.kind, piece.sequence, piece.index)).or_insert(place);
                if known.start <= place.start {
                    *known = place;
                }
            }
            _ => {}
        }
    }
}
