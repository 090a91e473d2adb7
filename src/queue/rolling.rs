//! Making segments: what goes over to a new one, and how it becomes the newest.

use super::codec::{Marks, NUMBER_MAX};
use super::files::{self, restrict};
use super::log::Source;
use super::piece::{self, Piece};
use super::segment::{Changes, Segment, StoreError};
use crate::faults;

/// Bytes that are carried over at once.
const SLICE_BYTES: usize = 512 << 10;

/// Kinds that are carried over to a new segment.
pub const CARRIED: &[u8] = &[piece::CURSOR, piece::LETTER];

/// Carries all records of these kinds over, durably.
pub fn carry_over(old: &Source, new: &Segment, kinds: &[u8]) -> Result<(), StoreError> {
    let write = |changes| new.apply(changes).and_then(|()| new.sync());
    let mut changes = Changes::default();
    for kind in kinds {
        for record in piece::records(old.pieces(*kind, 0..=NUMBER_MAX)) {
            let Piece { number, batch, content, .. } = record?;
            piece::chunks(*kind, number, 0, batch, &content).for_each(|chunk| changes.insert(chunk));
            if changes.bytes() >= SLICE_BYTES {
                write(std::mem::take(&mut changes))?;
            }
        }
    }
    write(changes)
}

/// Makes a segment the newest: the file FIRST is the commit, and the last thing that is written.
pub fn finish_segment(segment: &Segment, marks: &Marks, batch: u64) -> Result<(), StoreError> {
    let mut changes = Changes::default();
    changes.insert(piece::mark(marks, batch, 1));
    segment.apply(changes)?;
    segment.sync_folder()?;
    faults::reach("segment-copied");
    files::write_first(segment.folder(), segment.name.first)?;
    files::sync_folder(segment.folder())?;
    restrict(segment.folder());
    faults::reach("segment-committed");
    Ok(())
}
