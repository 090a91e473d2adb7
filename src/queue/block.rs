//! Several records of events in one value of sled.
//!
//! sled keeps some 500 bytes in memory for each page, and a page holds only up to 16 values. With one event a value, a
//! million waiting events were 90 MB; packed they are a few pages, fewer writes and fewer look-ups too.
//!
//! ```text
//! offset  size  field
//!      0     1  version of the layout: 1
//!      1     1  n, the number of entries: at least 1
//!      2  10 n  for each entry: sequence, u64 big endian; bytes that stand here, u16 big endian
//!        ...    the entries' bytes, one after another: whole records, or the first part of a long one
//! ```
//!
//! A block is no longer than a chunk. Its key is the sequence of its first entry when it was written; settling takes
//! entries out and leaves the key.

use super::codec::{CodecError, NUMBER_MAX};
use super::store::CHUNK_BYTES;
use crate::event::Sequence;

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 2;
const ENTRY_BYTES: usize = 10;

/// Longest part of a record that fits into a block.
pub const PART_BYTES_MAX: usize = CHUNK_BYTES - HEADER_BYTES - ENTRY_BYTES;

/// Entries of a block, in the order of their sequences.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct Block {
    entries: Vec<(Sequence, Vec<u8>)>,
    bytes: usize,
}

impl Block {
    pub fn decode(value: &[u8]) -> Result<Block, CodecError> {
        let mut block = Block::default();
        for (sequence, part) in entries(value)? {
            block.add(sequence, part.to_vec());
        }
        Ok(block)
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut value = Vec::with_capacity(self.bytes());
        value.extend_from_slice(&[VERSION, u8::try_from(self.entries.len()).expect("has_room keeps it below 256")]);
        for (sequence, part) in &self.entries {
            value.extend_from_slice(&sequence.get().to_be_bytes());
            let length = u16::try_from(part.len()).expect("a part is no longer than a chunk");
            value.extend_from_slice(&length.to_be_bytes());
        }
        for (_, part) in &self.entries {
            value.extend_from_slice(part);
        }
        value
    }

    /// Whether a part of `bytes` bytes fits in beside what is there.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.entries.len() < usize::from(u8::MAX) && self.bytes() + ENTRY_BYTES + bytes <= CHUNK_BYTES
    }

    pub fn add(&mut self, sequence: Sequence, part: Vec<u8>) {
        self.bytes += ENTRY_BYTES + part.len();
        self.entries.push((sequence, part));
    }

    /// Takes the entry out.
    pub fn remove(&mut self, sequence: Sequence) -> Option<Vec<u8>> {
        let index = self.entries.binary_search_by_key(&sequence, |&(here, _)| here).ok()?;
        let (_, part) = self.entries.remove(index);
        self.bytes -= ENTRY_BYTES + part.len();
        Some(part)
    }

    pub fn contains(&self, sequence: Sequence) -> bool {
        self.entries.binary_search_by_key(&sequence, |&(here, _)| here).is_ok()
    }

    pub fn first(&self) -> Option<Sequence> {
        self.entries.first().map(|&(sequence, _)| sequence)
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Length of its encoding.
    pub fn bytes(&self) -> usize {
        HEADER_BYTES + self.bytes
    }
}

/// The entries of an encoded block.
pub fn entries(value: &[u8]) -> Result<Vec<(Sequence, &[u8])>, CodecError> {
    let Some((&[version, count], rest)) = value.split_first_chunk::<HEADER_BYTES>() else {
        return Err(CodecError::Short(value.len()));
    };
    if version > VERSION {
        return Err(CodecError::TooNew { found: version, supported: VERSION });
    }
    let broken = || CodecError::Length { found: value.len(), expected: 0 };
    let (table, mut parts) = rest.split_at_checked(usize::from(count) * ENTRY_BYTES).ok_or_else(broken)?;
    let mut entries = Vec::with_capacity(usize::from(count));
    let mut before = 0;
    for entry in table.chunks_exact(ENTRY_BYTES) {
        let &[a, b, c, d, e, f, g, h, high, low] = entry.first_chunk::<ENTRY_BYTES>().ok_or_else(broken)?;
        let number = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
        let (part, rest) = parts.split_at_checked(usize::from(u16::from_be_bytes([high, low]))).ok_or_else(broken)?;
        parts = rest;
        let sequence = Sequence::new(number).filter(|_| number > before && number <= NUMBER_MAX).ok_or_else(broken)?;
        before = number;
        entries.push((sequence, part));
    }
    if version != VERSION || entries.is_empty() || !parts.is_empty() {
        return Err(broken());
    }
    Ok(entries)
}
