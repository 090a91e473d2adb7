//! Reading the queue: on the caller's thread, beside the writer, without changing anything.

use std::ops::ControlFlow;
use std::path::PathBuf;

use super::codec::{self, CodecError, Content};
use super::log::Log;
use super::piece::{self, CursorId, Piece};
use super::segment::{Segment, StoreError};
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
    log.each_block(first, last, |source, block| {
        for entry in &block.entries {
            if !(first..=last).contains(&entry.sequence) || entry.record_bytes == 0 {
                continue;
            }
            let is_full = found.len() >= limit || bytes + u64::from(entry.record_bytes) > bytes_max;
            if is_full && !found.is_empty() {
                return Ok(ControlFlow::Break(()));
            }
            bytes += u64::from(entry.record_bytes);
            let damaged = |error: CodecError| source.damaged(format!("event {}: {error}", entry.sequence));
            let stored = codec::decode_event(&source.record(entry)?).map_err(damaged)?;
            let Some(sequence) = Sequence::new(entry.sequence) else { continue };
            let codec::StoredEvent { event, captured_at, attempts } = stored;
            found.push(Envelope { sequence, event, captured_at, attempts });
        }
        Ok(if found.len() >= limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    Ok(found)
}

/// The oldest event from `first` to `last`, and when it was captured.
pub fn oldest(log: &Log, first: u64, last: u64) -> Result<Option<(Sequence, Timestamp)>, StoreError> {
    let mut oldest = None;
    log.each_block(first, last, |source, block| {
        let mut events = block.entries.iter().filter(|entry| entry.record_bytes > 0);
        let Some(entry) = events.find(|entry| (first..=last).contains(&entry.sequence)) else {
            return Ok(ControlFlow::Continue(()));
        };
        let damaged = |error: CodecError| source.damaged(format!("event {}: {error}", entry.sequence));
        let captured_at = codec::captured_at(entry.part).map_err(damaged)?;
        oldest = Sequence::new(entry.sequence).map(|sequence| (sequence, captured_at));
        Ok(ControlFlow::Break(()))
    })?;
    Ok(oldest)
}

/// Dead letters from `first` on, oldest first, until `limit` or [`PAGE_BYTES_MAX`] is reached; at least one.
pub fn dead_letters(segment: &Segment, first: u64, limit: usize) -> Result<Vec<DeadLetter>, StoreError> {
    let mut sequences = Vec::new();
    segment.each(piece::keys(piece::LETTER, first..=piece::NUMBER_MAX), |key, _| {
        sequences.extend(piece::key_sequence(key));
        sequences.len() < limit
    })?;
    let mut letters = Vec::new();
    let mut bytes = 0;
    for sequence in sequences.into_iter().take(limit) {
        if bytes > PAGE_BYTES_MAX {
            break;
        }
        // Dropped or put back while it was read.
        let Some((letter, content)) = letter(segment, sequence)? else { continue };
        bytes += content.len() as u64;
        letters.extend(Sequence::new(sequence).map(|sequence| assemble(segment, sequence, letter, &content)));
    }
    Ok(letters)
}

pub fn dead_letter(segment: &Segment, sequence: Sequence) -> Result<Option<DeadLetter>, StoreError> {
    let letter = letter(segment, sequence.get())?;
    Ok(letter.map(|(letter, content)| assemble(segment, sequence, letter, &content)))
}

/// The record of a letter, and its content.
fn letter(segment: &Segment, sequence: u64) -> Result<Option<(codec::Letter, Vec<u8>)>, StoreError> {
    let read = |piece: &Piece<'_>| codec::decode_letter(piece.content).ok();
    let Some(letter) = segment.piece(&piece::key(piece::LETTER, sequence), read)? else { return Ok(None) };
    Ok(Some((letter, content(segment, sequence)?)))
}

pub fn content(segment: &Segment, sequence: u64) -> Result<Vec<u8>, StoreError> {
    let mut content = Vec::new();
    segment.each(piece::keys(piece::LETTER_CONTENT, sequence..=sequence), |_, value| {
        let piece = Piece::decode(value);
        piece.iter().for_each(|piece| content.extend_from_slice(piece.content));
        piece.is_some()
    })?;
    Ok(content)
}

/// A letter is always shown, also when its content can't be read any more.
fn assemble(segment: &Segment, sequence: Sequence, letter: codec::Letter, content: &[u8]) -> DeadLetter {
    let decoded = match letter.content {
        Content::Event => codec::decode_event(content).map(|stored| DeadContent::Event {
            event: stored.event,
            captured_at: stored.captured_at,
            attempts: letter.attempts,
        }),
        Content::Input => codec::decode_input(content, letter.failure.clone()).map(DeadContent::Input),
    };
    let failed_at = letter.failed_at;
    let (failure, content) = match decoded {
        Ok(decoded) => (letter.failure, decoded),
        Err(error) => {
            let message = format!(
                "could not read the record back from the queue: {error}; set aside before because: {}",
                letter.failure.message
            );
            let failure = Failure { kind: FailureKind::Damaged, message, sqlstate: letter.failure.sqlstate };
            // Where it was seen is lost with it, so its origin is the queue's own folder.
            let origin = Origin::Transcript { path: segment.folder().to_string_lossy().as_ref().into(), offset: 0 };
            let bytes = content.to_vec();
            let input = Rejection { failure: failure.clone(), event_type: None, origin, bytes };
            (failure, DeadContent::Input(input))
        }
    };
    DeadLetter { sequence, failed_at, failure, content }
}

/// All cursors; one that can't be read is left out, which only reads its file again.
pub fn cursors(segment: &Segment, mut seen: impl FnMut(PathBuf, Cursor)) -> Result<(), StoreError> {
    let mut record: (Option<CursorId>, Vec<u8>) = (None, Vec::new());
    let mut tell = |record: &[u8]| {
        if let Ok((path, cursor)) = codec::decode_cursor(record) {
            seen(path, cursor);
        }
    };
    segment.each(piece::all_keys(piece::CURSOR), |key, value| {
        let id = CursorId::in_key(key);
        if record.0 != id {
            tell(&record.1);
            record = (id, Vec::new());
        }
        Piece::decode(value).iter().for_each(|piece| record.1.extend_from_slice(piece.content));
        true
    })?;
    tell(&record.1);
    Ok(())
}

pub fn cursor(segment: &Segment, id: CursorId) -> Result<Option<(PathBuf, Cursor)>, StoreError> {
    let mut record = Vec::new();
    segment.each(piece::cursor_key(id, 0)..=piece::cursor_key(id, u32::MAX), |_, value| {
        Piece::decode(value).iter().for_each(|piece| record.extend_from_slice(piece.content));
        true
    })?;
    Ok(codec::decode_cursor(&record).ok())
}
