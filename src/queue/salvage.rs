//! What can still be had from a queue that had to be set aside.
//!
//! If sled still opens it, everything that can be read is taken: events, then dead letters. If it does not, the log
//! itself is searched for records of events: a record in one chunk stands in it as one piece, and its checksum tells it
//! from anything else. The log also holds events that were delivered long ago; delivering them again stores nothing.
//! Cursors are never taken: something may be missing, so the transcripts are read again from their beginning.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::block::{self, Block, PART_BYTES_MAX};
use super::codec::{self, Counters, HEADER_BYTES, Kind, StoredEvent};
use super::database::StoreError;
use super::folder::corrupt;
use super::store::{self, CHUNK_BYTES, Changes, Store};
use super::{folder, journal, reader};
use crate::event::Sequence;

/// How many numbers are tried beyond one that could not be read. A page holds about 16.
const SKIP_MAX: u64 = 4096;

/// Events a search of the log keeps track of.
const FOUND_MAX: usize = 1_000_000;

const READ_BYTES: usize = 1 << 20;
const APPLY_BYTES: usize = 1 << 20;

/// Appends what can be found in `generations`, the newest first, to the fresh `store`; says how many events it was.
///
/// With `by_sled` it is read by sled down to the first one that sled opens and that knows which of those before it are still
/// needed, or, where none `is_sealed`, to the first one that sled opens. The log of each that it does not open is searched,
/// which ends whatever stands in it.
pub fn run(
    generations: &[PathBuf],
    is_sealed: bool,
    by_sled: bool,
    store: &Store,
    counters: Counters,
) -> Result<(Counters, u64), StoreError> {
    let mut found = Vec::new();
    for folder in generations {
        let opened = if by_sled { Store::open(folder).ok() } else { None };
        let knows = opened.as_ref().is_some_and(|(old, _)| old.knows_sealed().unwrap_or(false));
        let is_last = knows || (opened.is_some() && !is_sealed);
        found.push((folder, opened));
        if is_last {
            break;
        }
    }
    let mut salvage = Salvage::new(store, counters);
    for (folder, opened) in found.into_iter().rev() {
        match opened {
            Some((old, _)) => salvage.copy(&old)?,
            None => salvage.search(folder)?,
        }
    }
    salvage.apply()?;
    Ok((salvage.counters, salvage.events))
}

/// Puts the events that stand in `gaps` of the journal at `file` at the tail of `store`, in one batch with what stands around them.
pub fn gaps(file: &Path, gaps: &[Range<u64>], store: &Store, counters: Counters) -> Result<Counters, StoreError> {
    let mut salvage = Salvage::new(store, counters);
    let pieces: io::Result<Vec<_>> = gaps.iter().map(|gap| Ok((File::open(file)?, gap.clone()))).collect();
    salvage.search_pieces(&pieces?)?;
    salvage.apply()?;
    Ok(salvage.counters)
}

struct Salvage<'a> {
    store: &'a Store,
    counters: Counters,
    changes: Changes,
    block: Block,
    events: u64,
}

impl<'a> Salvage<'a> {
    fn new(store: &'a Store, counters: Counters) -> Self {
        Salvage { store, counters, changes: Changes::default(), block: Block::default(), events: 0 }
    }

    /// Takes all that `old` can still read, in its order.
    fn copy(&mut self, old: &Store) -> Result<(), StoreError> {
        let end = match folder::read_counters(old) {
            Ok(Ok(counters)) => counters.next_sequence,
            _ => u64::MAX,
        };
        for generation in old.sealed() {
            let sequences = generation.sequences();
            if !self.copy_events(old, sequences.start, sequences.end)? {
                self.search(generation.folder())?;
            }
        }
        self.copy_events(old, old.sealed_end().max(1), end)?;
        let mut from = 1;
        while let Found::Pair(sequence, letter) = next_readable(old, b'd', from, end) {
            from = sequence.saturating_add(1);
            let Ok(Some(head)) = old.get(&store::content_key(sequence)) else { continue };
            if let Ok(content) = old.record(&head, |index| store::chunk_key(sequence, index)) {
                self.add_letter(&letter, &content)?;
            }
        }
        Ok(())
    }

    /// Takes the events numbered from `first` to below `end`; says whether all of them could be read.
    fn copy_events(&mut self, old: &Store, first: u64, end: u64) -> Result<bool, StoreError> {
        let mut from = first;
        loop {
            match next_readable(old, b'e', from, end) {
                Found::None => return Ok(true),
                Found::Unreadable => return Ok(false),
                Found::Pair(number, value) => {
                    from = number.saturating_add(1);
                    for (sequence, part) in block::entries(&value).unwrap_or_default() {
                        if let Ok(Ok(stored)) = reader::event_record(old, sequence, part) {
                            self.add(&stored)?;
                        }
                    }
                }
            }
        }
    }

    /// Takes the events whose records stand in one piece in the log or the journal in `folder`, in the order of their capture.
    fn search(&mut self, folder: &Path) -> Result<(), StoreError> {
        let mut pieces = Vec::new();
        for name in ["db", journal::FILE] {
            match File::open(folder.join(name)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => pieces.push((other?, 0..u64::MAX)),
            }
        }
        self.search_pieces(&pieces)
    }

    fn search_pieces(&mut self, pieces: &[(File, Range<u64>)]) -> Result<(), StoreError> {
        let mut found = Vec::new();
        for (piece, (file, range)) in pieces.iter().enumerate() {
            search_records(file, range, |offset, record| {
                if let Ok(stored) = codec::decode_event(record) {
                    let times = (stored.captured_at, stored.event.timestamp());
                    found.push((times, piece, offset, record.len(), stored.event.id()));
                }
                found.len() < FOUND_MAX
            })?;
        }
        found.sort_unstable_by_key(|&(times, piece, offset, ..)| (times, piece, offset));
        let mut seen = HashSet::new();
        for (_, piece, offset, length, id) in found {
            let Some((file, _)) = pieces.get(piece).filter(|_| seen.insert(id)) else { continue };
            let mut record = vec![0; length];
            file.read_exact_at(&mut record, offset)?;
            if let Ok(stored) = codec::decode_event(&record) {
                self.add(&stored)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, stored: &StoredEvent) -> Result<(), StoreError> {
        let record = codec::encode_event(&stored.event, stored.captured_at, stored.attempts).map_err(corrupt)?;
        let Some(sequence) = Sequence::new(self.counters.next_sequence) else { return Ok(()) };
        let (part, rest) = record.split_at_checked(PART_BYTES_MAX).unwrap_or((&record, &[]));
        if self.changes.bytes() > APPLY_BYTES {
            self.apply()?;
        }
        if !self.block.has_room(part.len()) {
            self.close_block();
        }
        self.block.add(sequence, part.to_vec());
        for (index, chunk) in (1..).zip(rest.chunks(CHUNK_BYTES)) {
            self.changes.insert(&store::chunk_key(sequence.get(), index), chunk);
        }
        self.counters.add_event(sequence, record.len() as u64);
        self.counters.next_sequence += 1;
        self.events += 1;
        Ok(())
    }

    fn add_letter(&mut self, letter: &[u8], content: &[u8]) -> Result<(), StoreError> {
        let sequence = self.counters.next_sequence;
        let (part, rest) = content.split_at_checked(PART_BYTES_MAX).unwrap_or((content, &[]));
        self.changes.insert(&store::content_key(sequence), part);
        for (index, chunk) in (1..).zip(rest.chunks(CHUNK_BYTES)) {
            self.changes.insert(&store::chunk_key(sequence, index), chunk);
        }
        self.changes.insert(&store::letter_key(sequence), letter);
        self.counters.dead_letters += 1;
        self.counters.dead_letter_bytes += content.len() as u64;
        self.counters.next_sequence += 1;
        if self.changes.bytes() > APPLY_BYTES { self.apply() } else { Ok(()) }
    }

    fn close_block(&mut self) {
        let block = std::mem::take(&mut self.block);
        if let Some(first) = block.first() {
            self.changes.insert(&store::block_key(first.get()), &block.encode());
        }
    }

    fn apply(&mut self) -> Result<(), StoreError> {
        self.close_block();
        let counters = codec::encode_counters(&self.counters).map_err(corrupt)?;
        self.changes.insert(&store::counters_key(), &counters);
        self.store.apply(std::mem::take(&mut self.changes))
    }
}

enum Found {
    /// The sequence in its key, and its value.
    Pair(u64, Vec<u8>),
    /// There is no more.
    None,
    /// What comes next can't be read, nor what comes for long after it.
    Unreadable,
}

/// The first key of the kind `prefix` at `from` or after, below `end`, whose page can be read.
fn next_readable(store: &Store, prefix: u8, from: u64, end: u64) -> Found {
    for start in from..end.min(from.saturating_add(SKIP_MAX)) {
        let Ok(mut range) = store.range(store::sequence_range(prefix, start, end - 1)) else { continue };
        match range.next() {
            Some(Ok((key, value))) => {
                let sequence = store::key_sequence(&key).map_or(end, Sequence::get);
                return Found::Pair(sequence, value.to_vec());
            }
            Some(Err(_)) => {}
            None => return Found::None,
        }
    }
    if from < end { Found::Unreadable } else { Found::None }
}

/// Gives `visit` every record of an event that stands in `range` of `file` in one piece, until it has enough.
fn search_records(mut file: &File, range: &Range<u64>, mut visit: impl FnMut(u64, &[u8]) -> bool) -> io::Result<()> {
    let mut buffer: Vec<u8> = Vec::with_capacity(READ_BYTES + CHUNK_BYTES);
    let mut offset = file.seek(SeekFrom::Start(range.start))?;
    let mut file = file.take(range.end - range.start);
    loop {
        let read = (&mut file).take(READ_BYTES as u64).read_to_end(&mut buffer)?;
        // While there is more to come the last chunk's length stays, for records that go on in what comes.
        let searched = if read == 0 { buffer.len() } else { buffer.len().saturating_sub(CHUNK_BYTES) };
        let mut at = 0;
        while at < searched {
            let here = buffer.get(at..).unwrap_or_default();
            let record = here
                .starts_with(&[Kind::Event.version(), Kind::Event as u8])
                .then(|| codec::record_bytes(here).ok())
                .flatten()
                .filter(|length| (HEADER_BYTES..=CHUNK_BYTES).contains(length))
                .and_then(|length| here.get(..length))
                .filter(|record| codec::decode_event(record).is_ok());
            match record {
                Some(record) => {
                    if !visit(offset + at as u64, record) {
                        return Ok(());
                    }
                    at += record.len();
                }
                None => at += 1,
            }
        }
        let done = at.min(buffer.len());
        buffer.drain(..done);
        offset += done as u64;
        if read == 0 {
            return Ok(());
        }
    }
}
