//! Reading the queue: on the caller's thread, beside the writer, without changing anything.

use std::path::PathBuf;

use super::block;
use super::codec::{self, CodecError, Content, Counters};
use super::database::StoreError;
use super::store::{self, CursorId, Store, chunk_key, content_key, key_sequence, letter_key};
use crate::event::{
    Cursor, DeadContent, DeadLetter, Envelope, Failure, FailureKind, Origin, Rejection, Sequence, Timestamp,
};

/// Bytes a page holds at most, above one element.
pub const PAGE_BYTES_MAX: u64 = 16 << 20;

/// Envelopes that were asked for, and the sequences that could not be read back.
#[derive(Default)]
pub struct Envelopes {
    pub envelopes: Vec<Envelope>,
    pub damaged: Vec<Sequence>,
}

/// The pending events from `first` to `last`, oldest first, until `limit` or `bytes_max` is reached; at least one.
pub fn envelopes(store: &Store, first: u64, last: u64, limit: usize, bytes_max: u64) -> Result<Envelopes, StoreError> {
    let mut found = Envelopes::default();
    if first > last || limit == 0 {
        return Ok(found);
    }
    let mut bytes = 0;
    for pair in store.range(store::sequence_range(b'e', block_of(store, first)?, last))? {
        let (key, value) = pair?;
        let Ok(entries) = block::entries(&value) else {
            found.damaged.extend(key_sequence(&key));
            continue;
        };
        for (sequence, part) in entries {
            if sequence.get() < first {
                continue;
            }
            if sequence.get() > last || found.envelopes.len() + found.damaged.len() >= limit {
                return Ok(found);
            }
            let length = codec::record_bytes(part).unwrap_or(part.len()) as u64;
            if !found.envelopes.is_empty() && bytes + length > bytes_max {
                return Ok(found);
            }
            match event_record(store, sequence, part)? {
                Ok(stored) => {
                    bytes += length;
                    found.envelopes.push(Envelope {
                        sequence,
                        event: stored.event,
                        captured_at: stored.captured_at,
                        attempts: stored.attempts,
                    });
                }
                // Between its first part and its chunks it may have been settled: then it is not damaged but gone.
                Err(_) => match event_part(store, sequence)? {
                    Some(Ok(now)) if now != part => {}
                    Some(_) => found.damaged.push(sequence),
                    None => {}
                },
            }
        }
    }
    Ok(found)
}

/// The number of the block in which the event numbered `sequence` would be; itself when there is none before it.
fn block_of(store: &Store, sequence: u64) -> Result<u64, StoreError> {
    let before = store.last_key(store::sequence_range(b'e', 1, sequence))?;
    Ok(before.and_then(|key| key_sequence(&key)).map_or(sequence, Sequence::get))
}

/// The block in which `sequence` would be: its number and its value.
pub fn block(store: &Store, sequence: Sequence) -> Result<Option<(u64, sled::IVec)>, StoreError> {
    let number = block_of(store, sequence.get())?;
    Ok(store.get(&store::block_key(number))?.map(|value| (number, value)))
}

/// What stands in a block of the pending event `sequence`; an error when its block can't be read.
fn event_part(store: &Store, sequence: Sequence) -> Result<Option<Result<Vec<u8>, CodecError>>, StoreError> {
    let Some((_, value)) = block(store, sequence)? else { return Ok(None) };
    Ok(match block::entries(&value) {
        Ok(entries) => {
            let part = entries.into_iter().find(|&(here, _)| here == sequence);
            part.map(|(_, part)| Ok(part.to_vec()))
        }
        Err(error) => Some(Err(error)),
    })
}

/// The event whose record begins with `part`.
pub fn event_record(
    store: &Store,
    sequence: Sequence,
    part: &[u8],
) -> Result<Result<codec::StoredEvent, CodecError>, StoreError> {
    if codec::record_bytes(part) == Ok(part.len()) {
        return Ok(codec::decode_event(part));
    }
    let record = store.record(part, |index| chunk_key(sequence.get(), index))?;
    Ok(codec::decode_event(&record))
}

/// Dead letters from `first` to `last`, oldest first, until `limit` or [`PAGE_BYTES_MAX`] is reached; at least one.
pub fn dead_letters(store: &Store, first: u64, last: u64, limit: usize) -> Result<Vec<DeadLetter>, StoreError> {
    let mut letters = Vec::new();
    if first > last || limit == 0 {
        return Ok(letters);
    }
    let mut bytes = 0;
    for pair in store.range(store::sequence_range(b'd', first, last))? {
        let (key, record) = pair?;
        let Some(sequence) = key_sequence(&key) else { continue };
        let head = store.get(&content_key(sequence.get()))?;
        let length = head.as_ref().map_or(0, |head| codec::record_bytes(head).unwrap_or(head.len())) as u64;
        if !letters.is_empty() && bytes + length > PAGE_BYTES_MAX {
            break;
        }
        bytes += length;
        let letter = assemble(store, sequence, &record, head.as_deref())?;
        // Dropped or put back while it was read.
        if store.get(&key)?.is_some() {
            letters.push(letter);
        }
        if letters.len() >= limit {
            break;
        }
    }
    Ok(letters)
}

pub fn dead_letter(store: &Store, sequence: Sequence) -> Result<Option<DeadLetter>, StoreError> {
    let Some(record) = store.get(&letter_key(sequence.get()))? else { return Ok(None) };
    let head = store.get(&content_key(sequence.get()))?;
    assemble(store, sequence, &record, head.as_deref()).map(Some)
}

/// A letter is always shown, also when its own record or its content can't be read any more.
fn assemble(store: &Store, sequence: Sequence, letter: &[u8], head: Option<&[u8]>) -> Result<DeadLetter, StoreError> {
    let content = match head {
        Some(head) => store.record(head, |index| chunk_key(sequence.get(), index))?,
        None => Vec::new(),
    };
    let letter = codec::decode_letter(letter).unwrap_or_else(|error| codec::Letter {
        failed_at: Timestamp::UNIX_EPOCH,
        failure: damage(&error),
        content: Content::Raw,
        attempts: 0,
    });
    let decoded = match letter.content {
        Content::Event => codec::decode_event(&content).map(|stored| DeadContent::Event {
            event: stored.event,
            captured_at: stored.captured_at,
            attempts: letter.attempts,
        }),
        Content::Input => codec::decode_input(&content, letter.failure.clone()).map(DeadContent::Input),
        Content::Raw => Ok(raw(store, &letter.failure, content.clone())),
    };
    let (failure, content) = match decoded {
        Ok(decoded) => (letter.failure, decoded),
        Err(error) => {
            let failure = Failure {
                kind: FailureKind::Damaged,
                message: format!("{}; set aside before because: {}", damage(&error).message, letter.failure.message),
                sqlstate: letter.failure.sqlstate,
            };
            let content = raw(store, &failure, content);
            (failure, content)
        }
    };
    Ok(DeadLetter { sequence, failed_at: letter.failed_at, failure, content })
}

/// The failure of a record that can't be read back.
pub fn damage(error: &CodecError) -> Failure {
    Failure {
        kind: FailureKind::Damaged,
        message: format!("could not read the record back from the queue: {error}"),
        sqlstate: None,
    }
}

/// Bytes nobody can read any more. Where they were seen is lost with them, so their origin is the queue's own folder.
fn raw(store: &Store, failure: &Failure, bytes: Vec<u8>) -> DeadContent {
    let path = store.folder().to_string_lossy().as_ref().into();
    DeadContent::Input(Rejection {
        failure: failure.clone(),
        event_type: None,
        origin: Origin::Transcript { path, offset: 0 },
        bytes,
    })
}

/// All cursors; one that can't be read is left out, which only reads its file again.
pub fn cursors(store: &Store, mut seen: impl FnMut(PathBuf, Cursor)) -> Result<(), StoreError> {
    for pair in store.range(store::prefix_range(b'c'))? {
        let (key, head) = pair?;
        if let Some((path, cursor)) = decoded_cursor(store, &key, &head)? {
            seen(path, cursor);
        }
    }
    Ok(())
}

pub fn cursor(store: &Store, id: CursorId) -> Result<Option<(PathBuf, Cursor)>, StoreError> {
    let key = store::cursor_key(id);
    match store.get(&key)? {
        Some(head) => decoded_cursor(store, &key, &head),
        None => Ok(None),
    }
}

fn decoded_cursor(store: &Store, key: &[u8], head: &[u8]) -> Result<Option<(PathBuf, Cursor)>, StoreError> {
    let record = store.record(head, |index| store::cursor_chunk_key(key, index))?;
    Ok(codec::decode_cursor(&record).ok())
}

/// The oldest pending event from `first` to `last`, and when it was captured.
pub fn oldest(store: &Store, first: u64, last: u64) -> Result<Option<(Sequence, Timestamp)>, StoreError> {
    if first > last {
        return Ok(None);
    }
    for pair in store.range(store::sequence_range(b'e', block_of(store, first)?, last))? {
        let (key, value) = pair?;
        let Ok(entries) = block::entries(&value) else {
            return Ok(key_sequence(&key).map(|sequence| (sequence, Timestamp::UNIX_EPOCH)));
        };
        let oldest = entries.into_iter().find(|(sequence, _)| (first..=last).contains(&sequence.get()));
        if let Some((sequence, part)) = oldest {
            return Ok(Some((sequence, codec::captured_at(part).unwrap_or(Timestamp::UNIX_EPOCH))));
        }
    }
    Ok(None)
}

/// The newest pending event that was committed.
pub fn newest(store: &Store, counters: &Counters) -> Result<Option<Sequence>, StoreError> {
    let Some(last) = Sequence::new(counters.next_sequence.saturating_sub(1)) else { return Ok(None) };
    let Some((number, value)) = block(store, last)? else { return Ok(None) };
    let newest = block::entries(&value).ok().and_then(|entries| entries.last().map(|&(sequence, _)| sequence));
    Ok(newest.or(Sequence::new(number)))
}

/// What counting everything in a store gave.
pub struct Counted {
    pub counters: Counters,
    /// Whether a block could not be read, so that nobody knows how many events it holds; it counts as one.
    pub unreadable: bool,
}

/// Counts everything there is. Numbers from `next_sequence` on are new.
///
/// What one after the other gives must also be found by its key: with a page missing sled gives keys that it does not find,
/// and such an event could never be taken out.
pub fn recount(store: &Store, next_sequence: u64) -> Result<Counted, StoreError> {
    let mut counters = Counters::new(next_sequence);
    let mut unreadable = false;
    for pair in store.range(store::prefix_range(b'e'))? {
        let (key, value) = pair?;
        let Ok(entries) = block::entries(&value) else {
            // Will be found and set aside as one.
            unreadable = true;
            counters.pending += 1;
            counters.pending_bytes += value.len() as u64;
            counters.next_sequence = counters.next_sequence.max(after(key_sequence(&key).map_or(0, Sequence::get))?);
            continue;
        };
        if let Some(&(last, _)) = entries.last()
            && block(store, last)?.is_none_or(|(_, found)| found != value)
        {
            return Err(store::contradiction());
        }
        for (sequence, part) in entries {
            counters.add_event(sequence, codec::record_bytes(part).unwrap_or(part.len()) as u64);
            counters.next_sequence = counters.next_sequence.max(after(sequence.get())?);
        }
    }
    for pair in store.range(store::prefix_range(b'd'))? {
        let (key, _) = pair?;
        counters.dead_letters += 1;
        let sequence = key_sequence(&key).map_or(0, Sequence::get);
        if let Some(head) = store.get(&content_key(sequence))? {
            counters.dead_letter_bytes += codec::record_bytes(&head).unwrap_or(head.len()) as u64;
        }
        counters.next_sequence = counters.next_sequence.max(after(sequence)?);
    }
    Ok(Counted { counters, unreadable })
}

/// The number after `sequence`, which stands in a key: damage where no queue can have reached it.
fn after(sequence: u64) -> Result<u64, StoreError> {
    if sequence < codec::NUMBER_MAX {
        Ok(sequence + 1)
    } else {
        Err(StoreError::Corrupt(format!("the number {sequence} of a record is out of range")))
    }
}
