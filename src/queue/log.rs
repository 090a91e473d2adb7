//! All segments as one log: events enter at its tail, in the newest segment, and are read from its head.

use std::fs;
use std::ops::{ControlFlow, RangeInclusive};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::codec::{self, Entry, NUMBER_MAX, StoredEvent, Totals};
use super::files::{self, Name};
use super::piece::{self, Block, Piece};
use super::remains::Remains;
use super::segment::{Segment, StoreError};

/// A segment that gets no more events.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Older {
    pub name: Name,
    pub last: u64,
    /// Length of its log.
    bytes: u64,
}

impl Older {
    /// The one before the segment that begins with number `next`.
    pub fn before(path: &Path, name: Name, next: u64) -> Older {
        let bytes = fs::metadata(name.folder(path).join("db")).map_or(0, |metadata| metadata.len());
        Older { name, last: next - 1, bytes }
    }

    /// Those before the newest.
    pub fn all(path: &Path, names: &[Name], newest: Name) -> Vec<Older> {
        let older = names.iter().filter(|name| **name < newest);
        let nexts = older.clone().skip(1).chain([&newest]);
        older.zip(nexts).map(|(name, next)| Older::before(path, *name, next.first)).collect()
    }

    pub fn is_needed(&self, settled: u64) -> bool {
        self.last > settled && self.last >= self.name.first
    }
}

/// The segments in the folder, oldest first. Where a file does not say with which number one begins, its log does; 0 where that has none,
/// either: then it was not finished.
pub fn segments(path: &Path) -> Result<Vec<Name>, StoreError> {
    let mut names = files::segments(path)?;
    for name in names.iter_mut().filter(|name| name.first == 0) {
        name.first = Remains::of(path, *name)?.before().map_or(0, |before| before.sequence + 1);
    }
    Ok(names)
}

/// The number behind all that are there in a segment.
pub fn first_behind(path: &Path, name: Name) -> Result<u64, StoreError> {
    let end = Remains::of(path, name)?.totals_through(NUMBER_MAX);
    Ok(end.map_or(0, |end| end.sequence + 1).max(name.first))
}

/// The segments. A new one is made where a segment begins or goes: who reads holds on to his.
#[derive(Clone)]
pub struct Log {
    path: PathBuf,
    pub newest: Source,
    /// The others in which something waits, oldest first.
    pub older: Vec<Older>,
    /// The older segment that was read last: its index takes some megabytes.
    opened: Arc<Mutex<Option<Arc<Remains>>>>,
}

impl Log {
    pub fn new(path: &Path, newest: Source, older: Vec<Older>) -> Log {
        Log { path: path.to_owned(), newest, older, opened: Arc::default() }
    }

    /// The same log with another segment as its tail.
    pub fn with_newest(&self, newest: Arc<Segment>, older: Vec<Older>) -> Log {
        Log { newest: Source::Sled(newest), older, ..self.clone() }
    }

    /// The same log without the segments in which all is settled.
    pub fn without_settled(&self, settled: u64) -> Log {
        let older: Vec<_> = self.older.iter().copied().filter(|one| one.is_needed(settled)).collect();
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.take_if(|opened| older.iter().all(|one| one.name != opened.name));
        Log { older, ..self.clone() }
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
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
            return Err(StoreError::Damaged { segment: newest.number, cause });
        };
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let remains = match opened.as_ref().filter(|opened| opened.name == one.name) {
            Some(remains) => Arc::clone(remains),
            None => {
                *opened = None;
                let damaged = |cause: &str| StoreError::Damaged { segment: one.name.number, cause: cause.into() };
                if !one.name.folder(&self.path).exists() {
                    return Err(damaged("its folder is gone"));
                }
                let remains = Remains::of(&self.path, one.name)?;
                let is_as_known = match files::known(&one.name.folder(&self.path)) {
                    Some((_, found)) if one.name.is_damaged => remains.count(one.name.first - 1, one.last)?.0 >= found,
                    _ => one.name.is_damaged || remains.whole_through(one.name.first) >= one.last,
                };
                if !is_as_known {
                    return Err(damaged("numbers are missing in its log"));
                }
                Arc::clone(opened.insert(Arc::new(remains)))
            }
        };
        Ok((Source::Raw(remains), one.last))
    }

    /// Gives `visit` the blocks with the numbers from `first` to `last`, in order, until it has enough. Numbers have no gaps:
    /// one that is not there is damage, or known to be lost.
    pub fn each_block(
        &self,
        first: u64,
        last: u64,
        mut visit: impl FnMut(&Source, &Block<'_>) -> Result<ControlFlow<()>, StoreError>,
    ) -> Result<(), StoreError> {
        let mut next = first;
        while next <= last {
            let (source, source_last) = self.source_of(next)?;
            // The first may have begun before.
            let value = if next == first { source.last_block(next)? } else { source.value(piece::BLOCK, next, 0)? };
            let piece = value.as_deref().and_then(Piece::decode);
            let Some(block) = piece.as_ref().and_then(Block::of).filter(|block| block.last() >= next) else {
                next = match &source {
                    Source::Raw(remains) if remains.name.is_damaged => {
                        remains.next_block(next).unwrap_or(u64::MAX).min(source_last.saturating_add(1))
                    }
                    _ => return Err(source.damaged(format!("what has the number {next} is not there, or is damaged"))),
                };
                continue;
            };
            if visit(&source, &block)?.is_break() {
                return Ok(());
            }
            next = block.last() + 1;
        }
        Ok(())
    }

    /// Gives `visit` the events with the numbers from `first` to `last`, in order, until it has enough.
    pub fn each_event(
        &self,
        first: u64,
        last: u64,
        mut visit: impl FnMut(&Source, u64, &Entry<'_>) -> Result<ControlFlow<()>, StoreError>,
    ) -> Result<(), StoreError> {
        self.each_block(first, last, |source, block| {
            for (number, entry) in block.numbered().filter(|(number, _)| (first..=last).contains(number)) {
                if entry.record_bytes > 0 && !source.is_lost(number) && visit(source, number, entry)?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            Ok(ControlFlow::Continue(()))
        })
    }

    /// The totals up to a number, which is that of an event or a rejection that is there.
    pub fn totals_through(&self, sequence: u64) -> Result<Totals, StoreError> {
        let mut totals = Totals::default();
        self.each_block(sequence, sequence, |_, block| {
            totals = block.totals_through(sequence);
            Ok(ControlFlow::Break(()))
        })?;
        Ok(totals)
    }
}

/// Where a part of the log is read: through sled, or its log.
#[derive(Clone)]
pub enum Source {
    Sled(Arc<Segment>),
    Raw(Arc<Remains>),
}

impl Source {
    pub fn name(&self) -> Name {
        match self {
            Source::Sled(segment) => segment.name,
            Source::Raw(remains) => remains.name,
        }
    }

    pub fn value(&self, kind: u8, number: u64, index: u32) -> Result<Option<Vec<u8>>, StoreError> {
        match self {
            Source::Sled(segment) => Ok(segment.get(&piece::key(kind, number, index))?.map(|value| value.to_vec())),
            Source::Raw(remains) => remains.value(kind, number, index),
        }
    }

    /// Gives `visit` the pieces of a kind, in order, until it has enough.
    pub fn each(
        &self,
        kind: u8,
        numbers: RangeInclusive<u64>,
        visit: impl FnMut(&Piece<'_>) -> bool,
    ) -> Result<(), StoreError> {
        match self {
            _ if numbers.is_empty() => Ok(()),
            Source::Sled(segment) => segment.each(piece::keys(kind, numbers), visit),
            Source::Raw(remains) => remains.each(kind, numbers, visit),
        }
    }

    /// The last block that begins with this number or a smaller one.
    fn last_block(&self, sequence: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let begin = match self {
            Source::Sled(segment) => {
                let key = segment.last_key(piece::keys(piece::BLOCK, 1..=sequence))?;
                key.and_then(|key| Some(u64::from_be_bytes(*key.get(1..)?.first_chunk()?)))
            }
            Source::Raw(remains) => remains.last_block(sequence),
        };
        begin.map_or(Ok(None), |begin| self.value(piece::BLOCK, begin, 0))
    }

    fn is_lost(&self, number: u64) -> bool {
        matches!(self, Source::Raw(remains) if remains.is_lost(number))
    }

    pub fn damaged(&self, cause: impl Into<String>) -> StoreError {
        StoreError::Damaged { segment: self.name().number, cause: cause.into() }
    }

    /// The whole record of an event.
    pub fn record(&self, number: u64, entry: &Entry<'_>) -> Result<Vec<u8>, StoreError> {
        let record = piece::record(entry, |visit| self.each(piece::CHUNK, number..=number, visit))?;
        let length = entry.record_bytes as usize;
        if record.len() == length {
            Ok(record)
        } else {
            Err(self.damaged(format!("a part of event {number} is not there")))
        }
    }

    pub fn event(&self, number: u64, entry: &Entry<'_>) -> Result<StoredEvent, StoreError> {
        let event = codec::decode_event(&self.record(number, entry)?);
        event.map_err(|error| self.damaged(format!("event {number}: {error}")))
    }
}
