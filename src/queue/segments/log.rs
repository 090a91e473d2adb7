//! All segments as one log: events enter at its tail, in the newest segment, and are read from its head.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::damage;
use super::piece::{self, Block, Entry, Hole, OlderSegment, Totals};
use super::segment::{self, Segment, StoreError};

/// The segments, and what is missing in them. A new one is made where a segment begins or goes: who reads holds on to his.
#[derive(Clone)]
pub struct Log {
    path: PathBuf,
    pub newest: Arc<Segment>,
    /// The others, oldest first.
    pub older: Vec<OlderSegment>,
    pub holes: Vec<Hole>,
    /// The older segment that was read last: each takes a megabyte or two while it is open.
    opened: Arc<Mutex<Option<Arc<Segment>>>>,
}

impl Log {
    pub fn new(path: &Path, newest: Segment, older: Vec<OlderSegment>, holes: Vec<Hole>) -> Log {
        Log { path: path.to_owned(), newest: Arc::new(newest), older, holes, opened: Arc::default() }
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
        Log { older, holes: self.holes.iter().copied().filter(|hole| hole.last > settled).collect(), ..self.clone() }
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.newest.bytes() + self.older.iter().map(|one| one.log_bytes).sum::<u64>()
    }

    /// The segment in which a number is.
    pub fn segment_of(&self, sequence: u64) -> Result<Arc<Segment>, StoreError> {
        match self.older.iter().find(|one| (one.first..=one.last).contains(&sequence)) {
            Some(one) => self.open_older(one),
            None => Ok(Arc::clone(&self.newest)),
        }
    }

    pub fn open_older(&self, one: &OlderSegment) -> Result<Arc<Segment>, StoreError> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(segment) = opened.as_ref().filter(|segment| segment.number == one.number) {
            return Ok(Arc::clone(segment));
        }
        *opened = None;
        let folder = segment::folder_of(&self.path, one.number);
        // sled takes a log that was cut for a whole one.
        let bytes = std::fs::metadata(folder.join("db")).map_or(0, |metadata| metadata.len());
        if bytes < one.log_bytes {
            let cause = format!("its log has {bytes} bytes and had {}", one.log_bytes);
            return Err(StoreError::Damaged { segment: one.number, cause });
        }
        // Nor does it say what it has passed over.
        let has_holes = self.holes.iter().any(|hole| hole.first <= one.last && hole.last >= one.first);
        if !has_holes && !damage::is_whole(&folder.join("db"), Some(one.first), one.last)? {
            let cause = "numbers are missing in its log".to_owned();
            return Err(StoreError::Damaged { segment: one.number, cause });
        }
        let segment = Arc::new(Segment::open(&folder, one.number)?.0);
        *opened = Some(Arc::clone(&segment));
        Ok(segment)
    }

    /// Gives `visit` the blocks with the numbers from `first` to `last`, in order, until it has enough. Numbers have no gaps
    /// but the holes: one that is not there is damage.
    pub fn each_block(
        &self,
        first: u64,
        last: u64,
        mut visit: impl FnMut(&Segment, &Block<'_>) -> Result<ControlFlow<()>, StoreError>,
    ) -> Result<(), StoreError> {
        let mut next = first;
        while next <= last {
            if let Some(hole) = self.holes.iter().find(|hole| (hole.first..=hole.last).contains(&next)) {
                next = hole.last + 1;
                continue;
            }
            let segment = self.segment_of(next)?;
            // Where a block has begun before, its key is the last one up to here.
            let found = match segment.get(&piece::key(piece::BLOCK, next))? {
                Some(value) => Some(value),
                None if next == first => {
                    segment.edge(piece::keys(piece::BLOCK, 1..=next), true)?.map(|(_, value)| value)
                }
                None => None,
            };
            let is_missing = || segment.damaged(format!("what has the number {next} is not there, or is damaged"));
            let piece = found.as_deref().and_then(piece::Piece::decode).ok_or_else(is_missing)?;
            let block = Block::of(&piece).filter(|block| block.last() >= next).ok_or_else(is_missing)?;
            if visit(&segment, &block)?.is_break() {
                return Ok(());
            }
            next = block.last() + 1;
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

    /// Events that wait between these marks, and the bytes of their records.
    pub fn pending(&self, settled: &Totals, acknowledged: &Totals) -> (u64, u64) {
        let (lost_events, lost_bytes) = self.lost_behind(settled.sequence);
        let events = acknowledged.events.saturating_sub(settled.events).saturating_sub(lost_events);
        let bytes = acknowledged.bytes.saturating_sub(settled.bytes).saturating_sub(lost_bytes);
        (events, if events == 0 { 0 } else { bytes })
    }

    /// Events and bytes of the holes behind a number.
    pub fn lost_behind(&self, sequence: u64) -> (u64, u64) {
        let behind = self.holes.iter().filter(|hole| hole.last > sequence);
        behind.fold((0, 0), |(events, bytes), hole| (events + hole.events, bytes + hole.bytes))
    }
}

/// The whole record of an event of a block.
pub fn record(segment: &Segment, entry: &Entry<'_>) -> Result<Vec<u8>, StoreError> {
    let length = entry.record_bytes as usize;
    let mut record = Vec::with_capacity(length.min(crate::queue::codec::RECORD_BYTES_MAX));
    record.extend_from_slice(entry.part);
    let mut index = 1;
    while record.len() < length {
        let key = piece::indexed_key(piece::CHUNK, entry.sequence, index);
        let chunk = segment.piece(&key, |piece| Some(piece.content.to_vec()))?;
        let chunk = chunk.filter(|chunk| !chunk.is_empty() && record.len() + chunk.len() <= length);
        let missing = || segment.damaged(format!("a part of event {} is not there", entry.sequence));
        record.extend_from_slice(&chunk.ok_or_else(missing)?);
        index += 1;
    }
    Ok(record)
}
