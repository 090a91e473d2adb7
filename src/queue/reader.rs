//! Reading the queue: on the caller's thread, beside the writer, without changing anything.

use std::path::PathBuf;

use uuid::Uuid;

use super::codec::{self, NUMBER_MAX};
use super::log::{Log, Source};
use super::piece;
use super::segment::StoreError;
use crate::event::{
    Cursor, DeadContent, DeadLetter, Envelope, Failure, FailureKind, Origin, Rejection, Sequence, Timestamp,
};

/// Bytes a page holds at most, above one element.
pub(super) const PAGE_BYTES_MAX: u64 = 16 << 20;

/// The events from `first` to `last`, oldest first, until `limit` or `bytes_max` is reached; at least one.
pub(super) fn envelopes(
    log: &Log,
    first: u64,
    last: u64,
    limit: usize,
    bytes_max: u64,
) -> Result<Vec<Envelope>, StoreError> {
    let (mut found, mut bytes) = (Vec::new(), 0);
    for event in log.events(first, last).take(limit) {
        let (source, totals, entry) = event?;
        bytes += u64::from(entry.record_bytes);
        if bytes > bytes_max && !found.is_empty() {
            break;
        }
        found.push(source.envelope(totals.sequence, &entry)?);
    }
    Ok(found)
}

/// The oldest event from `first` to `last`, and when it was captured.
pub(super) fn oldest(log: &Log, first: u64, last: u64) -> Result<Option<(Sequence, Timestamp)>, StoreError> {
    let oldest = envelopes(log, first, last, 1, 0)?.pop();
    Ok(oldest.map(|envelope| (envelope.sequence, envelope.captured_at)))
}

/// Dead letters from `first` to `last`, oldest first, until `limit` or [`PAGE_BYTES_MAX`] is reached; at least one.
pub(super) fn dead_letters(
    source: &Source,
    first: u64,
    last: u64,
    limit: usize,
) -> Result<Vec<DeadLetter>, StoreError> {
    let (mut letters, mut bytes) = (Vec::new(), 0);
    for record in piece::records(source.pieces(piece::LETTER, first..=last)).take(limit) {
        let record = record?;
        bytes += record.content.len() as u64;
        letters.extend(Sequence::new(record.number).map(|sequence| dead_letter(source, sequence, &record.content)));
        if bytes > PAGE_BYTES_MAX {
            break;
        }
    }
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

/// All cursors; one that can't be read is left out, which only reads its file again.
pub(super) fn cursors(source: &Source, mut seen: impl FnMut(PathBuf, Cursor)) -> Result<(), StoreError> {
    for record in piece::records(source.pieces(piece::CURSOR, 0..=NUMBER_MAX)) {
        if let Ok((path, cursor)) = codec::decode_cursor(&record?.content) {
            seen(path, cursor);
        }
    }
    Ok(())
}

/// The sessions' ends that are noted; one that can't be read is left out.
pub(super) fn session_ends(source: &Source) -> Result<Vec<(Uuid, Timestamp)>, StoreError> {
    let mut ends = Vec::new();
    for record in piece::records(source.pieces(piece::SESSION_END, 0..=NUMBER_MAX)) {
        ends.extend(codec::decode_session_end(&record?.content).ok());
    }
    Ok(ends)
}
