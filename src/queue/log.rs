//! All segments as one log: events enter at its tail, in the newest segment, and are read from its head.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::piece::{self, Block, Entry, OlderSegment, Piece, Totals};
use super::remains::Remains;
use super::segment::{Segment, StoreError};

/// The segments. A new one is made where a segment begins or goes: who reads holds on to his.
#[derive(Clone)]
pub struct Log {
    path: PathBuf,
    pub newest: Arc<Segment>,
    /// The others, oldest first.
    pub older: Vec<OlderSegment>,
    /// The older segment that was read last: its index takes some megabytes.
    opened: Arc<Mutex<Option<Arc<Remains>>>>,
}

impl Log {
    pub fn new(path: &Path, newest: Segment, older: Vec<OlderSegment>) -> Log {
        Log { path: path.to_owned(), newest: Arc::new(newest), older, opened: Arc::default() }
    }

    /// The same log with another segment as its tail.
    pub fn with_newest(&self, newest: Arc<Segment>, older: Vec<OlderSegment>) -> Log {
        Log { newest, older, ..self.clone() }
    }

    /// The same log without the segments in which all is settled.
    pub fn without_settled(&self, settled: u64) -> Log {
        let older: Vec<_> = self.older.iter().copied().filter(|one| one.last > settled).collect();
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if opened.as_ref().is_some_and(|opened| older.iter().all(|one| one.number != opened.number)) {
            *opened = None;
        }
        Log { older, ..self.clone() }
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.newest.bytes() + self.older.iter().map(|one| one.log_bytes).sum::<u64>()
    }

    /// The segment in which a number is.
    fn source_of(&self, sequence: u64) -> Result<Source, StoreError> {
        let Some(one) = self.older.iter().find(|one| (one.first..=one.last).contains(&sequence)) else {
            return Ok(Source::Newest(Arc::clone(&self.newest)));
        };
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(remains) = opened.as_ref().filter(|opened| opened.number == one.number) {
            return Ok(Source::Older(Arc::clone(remains)));
        }
        *opened = None;
        let remains = Arc::new(Remains::of(&self.path, one.number)?);
        if !remains.is_whole(Some(one.first), one.last) {
            let cause = "numbers are missing in its log".to_owned();
            return Err(StoreError::Damaged { segment: one.number, cause });
        }
        *opened = Some(Arc::clone(&remains));
        Ok(Source::Older(remains))
    }

    /// Gives `visit` the blocks with the numbers from `first` to `last`, in order, until it has enough. Numbers have no gaps:
    /// one that is not there is damage.
    pub fn each_block(
        &self,
        first: u64,
        last: u64,
        mut visit: impl FnMut(&Source, &Block<'_>) -> Result<ControlFlow<()>, StoreError>,
    ) -> Result<(), StoreError> {
        let mut next = first;
        while next <= last {
            let source = self.source_of(next)?;
            let is_missing = || source.damaged(format!("what has the number {next} is not there, or is damaged"));
            // The first may have begun before.
            let value = if next == first { source.last_block(next)? } else { source.value(piece::BLOCK, next, 0)? };
            let value = value.ok_or_else(is_missing)?;
            let piece = Piece::decode(&value).ok_or_else(is_missing)?;
            let block = Block::of(&piece).filter(|block| block.last >= next).ok_or_else(is_missing)?;
            if visit(&source, &block)?.is_break() {
                return Ok(());
            }
            next = block.last + 1;
        }
        Ok(())
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

/// Where a part of the log is read.
pub enum Source {
    Newest(Arc<Segment>),
    Older(Arc<Remains>),
}

impl Source {
    fn value(&self, kind: u8, sequence: u64, index: u32) -> Result<Option<Vec<u8>>, StoreError> {
        match self {
            Source::Newest(segment) => {
                let key = match kind {
                    piece::BLOCK => piece::key(kind, sequence),
                    _ => piece::indexed_key(kind, sequence, index),
                };
                Ok(segment.get(&key)?.map(|value| value.to_vec()))
            }
            Source::Older(remains) => Ok(remains.value(kind, sequence, index)?),
        }
    }

    /// The last block that begins with this number or a smaller one.
    fn last_block(&self, sequence: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let begin = match self {
            Source::Newest(segment) => {
                let last = segment.edge(piece::keys(piece::BLOCK, 1..=sequence), true)?;
                last.and_then(|(key, _)| piece::key_sequence(&key))
            }
            Source::Older(remains) => remains.pieces(piece::BLOCK, 1, sequence).next_back().map(|(begin, _)| begin),
        };
        begin.map_or(Ok(None), |begin| self.value(piece::BLOCK, begin, 0))
    }

    pub fn damaged(&self, cause: impl Into<String>) -> StoreError {
        let segment = match self {
            Source::Newest(segment) => segment.number,
            Source::Older(remains) => remains.number,
        };
        StoreError::Damaged { segment, cause: cause.into() }
    }

    /// The whole record of an event of a block.
    pub fn record(&self, entry: &Entry<'_>) -> Result<Vec<u8>, StoreError> {
        let record = entry.record(|index| self.value(piece::CHUNK, entry.sequence, index))?;
        record.ok_or_else(|| self.damaged(format!("a part of event {} is not there", entry.sequence)))
    }
}
