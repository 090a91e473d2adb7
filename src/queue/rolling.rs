//! Making segments: what goes over to a new one, and how it becomes the current one.

use std::ops::RangeInclusive;
use std::path::Path;

use super::faults;
use super::files::{remove_folder, restrict};
use super::piece::{self, Marks, OlderSegment};
use super::segment::{self, Changes, Segment, StoreError};

/// Bytes that are carried over at once: some ten milliseconds.
const SLICE_BYTES: usize = 512 << 10;

/// Keys removed in one batch.
const CLEAR_KEYS_MAX: usize = 1024;

/// Makes a segment, empty yet: without a mark it counts as a left-over.
pub fn begin_segment(path: &Path, number: u64) -> Result<Segment, StoreError> {
    let folder = segment::folder_of(path, number);
    remove_folder(&folder)?;
    Segment::open(&folder, number)
}

/// Best effort: what stays is removed at the next opening.
pub fn remove_segment(path: &Path, number: u64) {
    let _ = remove_folder(&segment::folder_of(path, number));
}

/// What is still to be carried over from one segment to another.
pub struct Carrying {
    kinds: &'static [u8],
    from: Vec<u8>,
}

impl Carrying {
    /// All of these kinds.
    pub fn of(kinds: &'static [u8]) -> Carrying {
        Carrying { kinds, from: Vec::new() }
    }

    /// Carries a slice over, durably. False: there is no more.
    pub fn next(&mut self, old: &Segment, new: &Segment) -> Result<bool, StoreError> {
        let Some((kind, others)) = self.kinds.split_first() else { return Ok(false) };
        let (start, end) = piece::all_keys(*kind).into_inner();
        let mut changes = Changes::default();
        let mut last = None;
        old.each(start.max(self.from.clone())..=end, |key, value| {
            changes.insert(key.to_vec(), value.to_vec());
            last = Some(key.to_vec());
            changes.bytes() < SLICE_BYTES
        })?;
        new.apply(changes)?;
        new.sync()?;
        match last {
            Some(last) => self.from = [&last[..], &[0]].concat(),
            None => *self = Carrying::of(others),
        }
        Ok(!self.kinds.is_empty())
    }
}

/// Makes a segment the current one: its mark is the commit, and the last thing that is written.
pub fn finish_segment(segment: &Segment, older: &[OlderSegment], marks: &Marks) -> Result<(), StoreError> {
    let mut changes = Changes::default();
    put_older(&mut changes, older);
    segment.apply(changes)?;
    segment.sync_folder()?;
    faults::reach("segment-copied");
    segment.apply(Changes::of([marks.encode()]))?;
    segment.sync()?;
    restrict(segment.folder());
    faults::reach("segment-committed");
    Ok(())
}

/// Puts the list of the older segments, in as many values as it takes.
pub fn put_older(changes: &mut Changes, older: &[OlderSegment]) {
    let parts = older.chunks(piece::OLDER_MAX).chain(std::iter::once(&[][..]));
    for (index, part) in (0..).zip(parts) {
        changes.insert(piece::indexed_key(piece::OLDER, 0, index), piece::encode_older(part, index));
    }
}

/// Removes all keys in `range`.
pub fn clear(segment: &Segment, range: &RangeInclusive<Vec<u8>>) -> Result<(), StoreError> {
    let mut before: Option<Vec<u8>> = None;
    loop {
        let (mut changes, mut keys, mut first) = (Changes::default(), 0, None);
        segment.each(range.clone(), |key, _| {
            first.get_or_insert_with(|| key.to_vec());
            changes.remove(key.to_vec());
            keys += 1;
            keys < CLEAR_KEYS_MAX
        })?;
        if keys == 0 {
            return Ok(());
        }
        if first == before {
            return Err(segment.damaged("a key was removed and is there again"));
        }
        before = first;
        segment.apply(changes)?;
    }
}
