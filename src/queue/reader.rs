//! Reading the queue: on the caller's thread, beside the writer, without changing anything.

use std::ops::{ControlFlow, RangeInclusive};
use std::path::PathBuf;

use super::codec::{self, StoredEvent};
use super::log::{Log, Source};
use super::piece::{self, CursorId, Live};
use super::segment::StoreError;
use crate::event::{
    Cursor, DeadContent, DeadLetter, Envelope, Failure, FailureKind, Origin, Rejection, Sequence, Timestamp,
};

/// Bytes a page holds at most, above one element.
pub const PAGE_BYTES_MAX: u64 = 16 << 20;

/// The events from `first` to `last`, oldest first, until `limit` or `bytes_max` is reached; at least one.
pub fn envelopes(log: &Log, first: u64, last: u64, limit: usize, bytes_max: u64) -> Result<Vec<Envelope>, StoreError> {
    let mut found: Vec<Envelope> = Vec::new();
    let mut bytes = 0;
    if limit == 0 {
        return Ok(found);
    }
    log.each_event(first, last, |source, number, entry| {
        bytes += u64::from(entry.record_bytes);
        if bytes > bytes_max && !found.is_empty() {
            return Ok(ControlFlow::Break(()));
        }
        let StoredEvent { event, captured_at, attempts } = source.event(number, entry)?;
        found.extend(Sequence::new(number).map(|sequence| Envelope { sequence, event, captured_at, attempts }));
        Ok(if found.len() >= limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    Ok(found)
}

/// The oldest event from `first` to `last`, and when it was captured.
pub fn oldest(log: &Log, first: u64, last: u64) -> Result<Option<(Sequence, Timestamp)>, StoreError> {
    let mut oldest = None;
    log.each_event(first, last, |source, number, entry| {
        let captured_at = source.event(number, entry)?.captured_at;
        oldest = Sequence::new(number).map(|sequence| (sequence, captured_at));
        Ok(ControlFlow::Break(()))
    })?;
    Ok(oldest)
}

/// Gives `visit` the records of a kind, in the order of their numbers, until it has enough.
fn records(
    source: &Source,
    kind: u8,
    numbers: RangeInclusive<u64>,
    mut visit: impl FnMut(u64, &[u8]) -> bool,
) -> Result<(), StoreError> {
    let (mut live, mut record, mut number, mut is_enough) = (Live::default(), Vec::new(), 0, false);
    source.each(kind, numbers, |piece| {
        if piece.index == 0 && !record.is_empty() {
            is_enough = !visit(number, &record);
            record.clear();
        }
        if live.passes(piece) {
            number = piece.number;
            record.extend_from_slice(piece.content);
        }
        !is_enough
    })?;
    if !record.is_empty() && !is_enough {
        visit(number, &record);
    }
    Ok(())
}

/// Dead letters from `first` to `last`, oldest first, until `limit` or [`PAGE_BYTES_MAX`] is reached; at least one.
pub fn dead_letters(source: &Source, first: u64, last: u64, limit: usize) -> Result<Vec<DeadLetter>, StoreError> {
    let (mut letters, mut bytes) = (Vec::new(), 0);
    if limit == 0 {
        return Ok(letters);
    }
    records(source, piece::LETTER, first..=last, |number, record| {
        bytes += record.len() as u64;
        letters.extend(Sequence::new(number).map(|sequence| dead_letter(source, sequence, record)));
        letters.len() < limit && bytes <= PAGE_BYTES_MAX
    })?;
    Ok(letters)
}

/// A letter is always shown, also when it can't be read any more.
fn dead_letter(source: &Source, sequence: Sequence, record: &[u8]) -> DeadLetter {
    codec::decode_letter(sequence, record).unwrap_or_else(|error| {
        let message = format!("could not read the record back from the queue: {error}");
        let failure = Failure { kind: FailureKind::Damaged, message, sqlstate: None };
        // Where it was seen is lost with it: what is named is the part of the queue.
        let origin = Origin::Transcript { path: format!("segment {}", source.name().number).into(), offset: 0 };
        let bytes = record.to_vec();
        let input = Rejection { failure: failure.clone(), event_type: None, origin, bytes };
        DeadLetter { sequence, failed_at: Timestamp::now(), failure, content: DeadContent::Input(input) }
    })
}

/// The cursors with these ids; one that can't be read is left out, which only reads its file again.
pub fn cursors(
    source: &Source,
    ids: RangeInclusive<CursorId>,
    mut seen: impl FnMut(PathBuf, Cursor),
) -> Result<(), StoreError> {
    records(source, piece::CURSOR, ids.start().0..=ids.end().0, |_, record| {
        if let Ok((path, cursor)) = codec::decode_cursor(record) {
            seen(path, cursor);
        }
        true
    })
}
