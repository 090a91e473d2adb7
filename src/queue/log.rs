//! All segments as one log: events enter at its tail, in the newest segment, and are read from its head.

use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::codec::{self, Entry, NUMBER_MAX, Totals};
use super::files::{self, Name};
use super::piece::{self, Block, Piece};
use super::remains::Remains;
use super::segment::{Changes, Segment, StoreError};
use crate::event::Envelope;

/// Kinds that are carried over to a new segment.
pub(super) const CARRIED: &[u8] = &[piece::CURSOR, piece::SESSION_END, piece::LETTER];

/// Bytes that are carried over at once.
const SLICE_BYTES: usize = 512 << 10;

/// A segment that gets no more events.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Older {
    pub name: Name,
    pub last: u64,
    /// Length of its log.
    bytes: u64,
}

impl Older {
    /// The one before the segment that begins with number `next`.
    pub(super) fn before(path: &Path, name: Name, next: u64) -> Older {
        let bytes = fs::metadata(name.folder(path).join("db")).map_or(0, |metadata| metadata.len());
        Older { name, last: next - 1, bytes }
    }

    /// Those before the newest.
    pub(super) fn all(path: &Path, names: &[Name], newest: Name) -> Vec<Older> {
        let older = names.iter().filter(|name| **name < newest);
        let nexts = older.clone().skip(1).chain([&newest]);
        older.zip(nexts).map(|(name, next)| Older::before(path, *name, next.first)).collect()
    }

    pub(super) fn is_needed(&self, settled: u64) -> bool {
        self.last > settled && self.last >= self.name.first
    }
}

/// The segments in the folder, oldest first. Where a file does not say with which number one begins, its log does; 0 where that has none,
/// either: then it was not finished.
pub(super) fn segments(path: &Path) -> Result<Vec<Name>, StoreError> {
    let mut names = files::segments(path)?;
    for name in names.iter_mut().filter(|name| name.first == 0) {
        name.first = Remains::of(path, *name)?.before().map_or(0, |before| before.sequence + 1);
    }
    Ok(names)
}

/// The segments. A new one is made where a segment begins or goes: who reads holds on to his.
#[derive(Clone)]
pub(super) struct Log {
    path: PathBuf,
    pub newest: Source,
    /// The others in which something waits, oldest first.
    pub older: Vec<Older>,
    /// The older segment that was read last: its index takes some megabytes.
    opened: Arc<Mutex<Option<Arc<Remains>>>>,
}

impl Log {
    pub(super) fn new(path: &Path, newest: Source, older: Vec<Older>) -> Log {
        Log { path: path.to_owned(), newest, older, opened: Arc::default() }
    }

    /// A log that has these segments.
    pub(super) fn with(&self, newest: Source, older: Vec<Older>) -> Log {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.take_if(|opened| older.iter().all(|one| one.name != opened.name));
        Log { newest, older, ..self.clone() }
    }

    /// Bytes of all segments.
    pub(super) fn bytes(&self) -> u64 {
        let newest = if let Source::Sled(segment) = &self.newest { segment.bytes() } else { 0 };
        newest + self.older.iter().map(|one| one.bytes).sum::<u64>()
    }

    /// The segment in which a number is, and its last number.
    fn source_of(&self, sequence: u64) -> Result<(Source, u64), StoreError> {
        let newest = self.newest.name();
        if sequence >= newest.first {
            return Ok((self.newest.clone(), u64::MAX));
        }
        let Some(one) = self.older.iter().find(|one| sequence <= one.last && sequence >= one.name.first) else {
            let cause = format!("the segment that has the number {sequence} is gone");
            return Err(StoreError::damaged(newest.number, cause));
        };
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let remains = match opened.as_ref().filter(|opened| opened.name == one.name) {
            Some(remains) => Arc::clone(remains),
            None => {
                *opened = None;
                let remains = Remains::of(&self.path, one.name)?;
                let is_as_known = if one.name.is_damaged {
                    let (found, _) = remains.count(one.name.first - 1, one.last)?;
                    let known = files::known(&one.name.folder(&self.path));
                    known.is_some_and(|(last, known)| one.last <= last && found >= known)
                } else {
                    remains.whole_through(one.name.first) >= one.last
                };
                if !is_as_known {
                    return Err(StoreError::damaged(one.name.number, "numbers are missing in its log"));
                }
                Arc::clone(opened.insert(Arc::new(remains)))
            }
        };
        Ok((Source::Raw(remains), one.last))
    }

    /// The block with a number, or the next one where it is known to be lost; none where that is behind `last`. Numbers have no
    /// gaps: one that is not there is damage, or known to be lost.
    fn block(&self, mut number: u64, last: u64) -> Result<Option<(Source, Block)>, StoreError> {
        while number <= last {
            let (source, source_last) = self.source_of(number)?;
            // It may have begun before.
            let block = source.last_block(number)?.filter(|block| block.last() >= number);
            match (block, &source) {
                (Some(block), _) => return Ok(Some((source, block))),
                (None, Source::Raw(remains)) if remains.name.is_damaged => {
                    let next = remains.next_block(number).unwrap_or(u64::MAX);
                    number = next.min(source_last.saturating_add(1));
                }
                (None, _) => {
                    return Err(source.damaged(format!("what has the number {number} is not there, or is damaged")));
                }
            }
        }
        Ok(None)
    }

    /// The totals up to a number, where it is there.
    pub(super) fn totals(&self, sequence: u64) -> Result<Option<Totals>, StoreError> {
        let Some((_, block)) = self.block(sequence, sequence)? else { return Ok(None) };
        Ok(block.numbered().map(|(totals, _)| totals).find(|totals| totals.sequence == sequence))
    }

    /// The events with the numbers from `first` to `last`, in order, each with where it is and the totals up to it.
    pub(super) fn events(
        &self,
        first: u64,
        last: u64,
    ) -> impl Iterator<Item = Result<(Source, Totals, Entry), StoreError>> {
        let mut next = first;
        let blocks = std::iter::from_fn(move || {
            let found = self.block(next, last).transpose()?;
            // Behind an error there is nothing.
            next = found.as_ref().map_or(u64::MAX, |(_, block)| block.last() + 1);
            Some(found)
        });
        blocks.flat_map(move |found| {
            let (source, block) = match found {
                Ok(found) => found,
                Err(error) => return vec![Err(error)],
            };
            let is_wanted = |totals: &Totals, entry: &Entry| {
                entry.record_bytes > 0 && (first..=last).contains(&totals.sequence) && !source.is_lost(totals.sequence)
            };
            let events = block.numbered().filter(|(totals, entry)| is_wanted(totals, entry));
            events.map(|(totals, entry)| Ok((source.clone(), totals, entry))).collect()
        })
    }
}

/// Where a part of the log is read: through sled, or its log.
#[derive(Clone)]
pub(super) enum Source {
    Sled(Arc<Segment>),
    Raw(Arc<Remains>),
}

/// What is still to be carried over: the records of the first of these kinds from this number on, and all of the others.
pub(super) struct Left {
    kinds: &'static [u8],
    from: u64,
}

impl Left {
    pub(super) fn all_of(kinds: &'static [u8]) -> Left {
        Left { kinds, from: 0 }
    }
}

impl Source {
    pub(super) fn name(&self) -> Name {
        match self {
            Source::Sled(segment) => segment.name,
            Source::Raw(remains) => remains.name,
        }
    }

    /// The pieces of a kind, in order.
    pub(super) fn pieces(
        &self,
        kind: u8,
        numbers: RangeInclusive<u64>,
    ) -> Box<dyn Iterator<Item = Result<Piece, StoreError>> + '_> {
        match self {
            _ if numbers.is_empty() => Box::new(std::iter::empty()),
            Source::Sled(segment) => Box::new(segment.pieces(piece::keys(kind, numbers))),
            Source::Raw(remains) => Box::new(remains.pieces(kind, numbers)),
        }
    }

    /// Carries a slice of what is left over to another segment, durably. False: nothing is left.
    pub(super) fn carry_over(&self, left: &mut Left, to: &Segment) -> Result<bool, StoreError> {
        let Some((&kind, others)) = left.kinds.split_first() else { return Ok(false) };
        let mut changes = Changes::default();
        for record in piece::records(self.pieces(kind, left.from..=NUMBER_MAX)) {
            let Piece { number, batch, content, .. } = record?;
            left.from = number + 1;
            piece::chunks(kind, number, 0, batch, &content).for_each(|chunk| changes.insert(chunk));
            if changes.bytes() >= SLICE_BYTES {
                break;
            }
        }
        if changes.bytes() < SLICE_BYTES {
            *left = Left { kinds: others, from: 0 };
        }
        to.apply(changes)?;
        to.sync()?;
        Ok(true)
    }

    /// The last block that begins with this number or a smaller one.
    fn last_block(&self, sequence: u64) -> Result<Option<Block>, StoreError> {
        match self {
            Source::Sled(segment) => {
                let piece = segment.last(piece::keys(piece::BLOCK, 1..=sequence))?;
                Ok(piece.as_ref().and_then(Block::of))
            }
            Source::Raw(remains) => remains.last_block(sequence),
        }
    }

    fn is_lost(&self, number: u64) -> bool {
        matches!(self, Source::Raw(remains) if remains.lost.contains(&number))
    }

    fn damaged(&self, cause: String) -> StoreError {
        StoreError::damaged(self.name().number, cause)
    }

    /// The whole record of an event.
    pub(super) fn record(&self, number: u64, entry: &Entry) -> Result<Vec<u8>, StoreError> {
        let record = piece::record(entry, self.pieces(piece::CHUNK, number..=number))?;
        if record.len() == entry.record_bytes as usize {
            Ok(record)
        } else {
            Err(self.damaged(format!("a part of event {number} is not there")))
        }
    }

    pub(super) fn envelope(&self, number: u64, entry: &Entry) -> Result<Envelope, StoreError> {
        let envelope = codec::decode_event(number, &self.record(number, entry)?);
        envelope.map_err(|error| self.damaged(format!("event {number}: {error}")))
    }
}
