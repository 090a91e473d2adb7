//! Making segments: what goes over to a new one, and how it becomes the newest.

use std::path::Path;

use super::codec::{self, Marks, NUMBER_MAX};
use super::files::{self, Name, remove_folder, restrict};
use super::log::Source;
use super::piece::{self, Live, Piece};
use super::segment::{Changes, Segment, StoreError};
use crate::faults;

/// Bytes that are carried over at once: some ten milliseconds.
const SLICE_BYTES: usize = 512 << 10;

/// Makes a segment, empty yet: without a mark it counts as a left-over.
pub fn begin_segment(path: &Path, number: u64) -> Result<Segment, StoreError> {
    let name = Name::new(number);
    remove_folder(&name.folder(path))?;
    Segment::open(path, name)
}

/// The mark, as it is written.
pub fn mark(marks: &Marks, batch: u64) -> (Vec<u8>, Vec<u8>) {
    Piece { kind: piece::MARK, number: 0, index: 0, batch, content: &codec::encode_marks(marks) }.encode()
}

/// What is still to be carried over from one segment to another.
pub struct Carrying {
    kinds: &'static [u8],
    /// Number and index of the piece that comes next.
    next: (u64, u32),
    live: Live,
}

impl Carrying {
    /// All records of these kinds.
    pub fn of(kinds: &'static [u8]) -> Carrying {
        Carrying { kinds, next: (0, 0), live: Live::default() }
    }

    /// Carries a slice over, durably. False: there is no more.
    pub fn next(&mut self, old: &Source, new: &Segment) -> Result<bool, StoreError> {
        let Some((kind, others)) = self.kinds.split_first() else { return Ok(false) };
        let mut changes = Changes::default();
        let (begin, mut is_all) = (self.next, true);
        old.each(*kind, begin.0..=NUMBER_MAX, |piece| {
            if (piece.number, piece.index) < begin {
                return true;
            }
            if changes.bytes() >= SLICE_BYTES {
                self.next = (piece.number, piece.index);
                is_all = false;
                return false;
            }
            if self.live.passes(piece) {
                changes.insert(piece.encode());
            }
            true
        })?;
        if is_all {
            *self = Carrying::of(others);
        }
        new.apply(changes)?;
        new.sync()?;
        Ok(!self.kinds.is_empty())
    }
}

/// Makes a segment the newest: its mark is the commit, and the last thing that is written.
pub fn finish_segment(segment: &mut Segment, marks: &Marks, batch: u64) -> Result<(), StoreError> {
    segment.name.first = marks.acknowledged.sequence + 1;
    files::write_first(segment.folder(), segment.name.first)?;
    segment.sync_folder()?;
    faults::reach("segment-copied");
    let mut changes = Changes::default();
    changes.insert(mark(marks, batch));
    segment.apply(changes)?;
    segment.sync()?;
    restrict(segment.folder());
    faults::reach("segment-committed");
    Ok(())
}
