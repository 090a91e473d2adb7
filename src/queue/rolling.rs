//! Making segments: what goes over to a new one, and how it becomes the newest.

use super::codec::{Marks, NUMBER_MAX};
use super::files::{self, restrict};
use super::log::Source;
use super::piece::{self, Piece};
use super::segment::{Changes, Segment, StoreError};
use crate::faults;

/// Bytes that are carried over at once: some ten milliseconds.
const SLICE_BYTES: usize = 512 << 10;

/// What is still to be carried over from one segment to another.
pub struct Carrying {
    kinds: &'static [u8],
    /// Number of the record that comes next.
    next: u64,
}

impl Carrying {
    /// All records of these kinds.
    pub fn of(kinds: &'static [u8]) -> Carrying {
        Carrying { kinds, next: 0 }
    }

    /// Carries a slice over, durably. False: there is no more.
    pub fn next(&mut self, old: &Source, new: &Segment) -> Result<bool, StoreError> {
        let Some((kind, others)) = self.kinds.split_first() else { return Ok(false) };
        let (mut changes, mut is_all) = (Changes::default(), true);
        for record in piece::records(old.pieces(*kind, self.next..=NUMBER_MAX)) {
            let Piece { number, batch, content, .. } = record?;
            if changes.bytes() >= SLICE_BYTES {
                (self.next, is_all) = (number, false);
                break;
            }
            piece::chunks(*kind, number, 0, batch, &content).for_each(|chunk| changes.insert(chunk));
        }
        if is_all {
            *self = Carrying::of(others);
        }
        new.apply(changes)?;
        new.sync()?;
        Ok(!self.kinds.is_empty())
    }
}

/// Makes a segment the newest: the file FIRST is the commit, and the last thing that is written.
pub fn finish_segment(segment: &mut Segment, marks: &Marks, batch: u64) -> Result<(), StoreError> {
    let mut changes = Changes::default();
    changes.insert(piece::mark(marks, batch, 1));
    segment.apply(changes)?;
    segment.sync_folder()?;
    faults::reach("segment-copied");
    segment.name.first = marks.acknowledged.sequence + 1;
    files::write_first(segment.folder(), segment.name.first)?;
    files::sync_folder(segment.folder())?;
    restrict(segment.folder());
    faults::reach("segment-committed");
    Ok(())
}
