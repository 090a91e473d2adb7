//! What stands in a segment: the keys, and the values under them.
//!
//! ```text
//! key          value
//! e S 0        block: the events and rejections numbered S and following, as far as they fit
//! x S I        further chunk I of the record of event S (from 1 on)
//! d S I        chunk I of the record of dead letter S (from 0 on)
//! c H I        chunk I of the record of the cursor of the file whose path has the hash H
//! s H I        chunk I of the record of the SessionEnd hook of the session whose id has the hash H
//! m 0 0        mark: the last number that was acknowledged and the last one that is settled, with the totals up to them
//! ```
//!
//! S and H are u64, I is a u32, all big endian: keys are in the order of acceptance. Each value is a piece, which says itself what
//! it is and has a checksum, so that it is found in a log without sled:
//!
//! ```text
//! offset  size  field
//!      0     4  "hwq2"
//!      4    13  its key
//!     17     8  number of the batch with which it was written; all batches of a queue are counted
//!     25     2  length of the content
//!     27     4  crc32 (IEEE) over bytes 0..27 and the content
//!     31     n  content
//! ```
//!
//! Numbers have no gaps: a rejection takes one too, and leaves an entry without a record in the block. So what is missing is
//! noticed when it is read. A dead letter, a cursor or a session's end goes by an empty chunk 0: where a piece is found twice, the one of the later
//! batch counts. A mark is the last piece of its batch and says how many there are, so a batch that was torn is told.

use std::ops::RangeInclusive;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

use super::codec::{self, Entry, Marks, NUMBER_MAX, Totals, decode_block, encode_block};

/// Longest value: sled keeps longer ones in files that it never syncs.
pub(super) const VALUE_BYTES_MAX: usize = 4096;

/// By which a raw search looks for pieces.
pub(super) const MAGIC: [u8; 4] = *b"hwq2";
pub(super) const HEADER_BYTES: usize = 31;

/// Longest content of a piece.
pub(super) const CONTENT_BYTES_MAX: usize = VALUE_BYTES_MAX - HEADER_BYTES;

pub(super) const BLOCK: u8 = b'e';
pub(super) const CHUNK: u8 = b'x';
pub(super) const LETTER: u8 = b'd';
pub(super) const CURSOR: u8 = b'c';
pub(super) const SESSION_END: u8 = b's';
pub(super) const MARK: u8 = b'm';

/// A value, taken apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    pub kind: u8,
    pub number: u64,
    pub index: u32,
    /// The batch with which it was written.
    pub batch: u64,
    pub content: Vec<u8>,
}

impl Piece {
    /// `None` where it is damaged.
    pub(super) fn decode(value: &[u8]) -> Option<Piece> {
        Self::find(value).filter(|piece| piece.bytes() == value.len())
    }

    /// The piece at the beginning of these bytes, which may go on behind it.
    pub(super) fn find(bytes: &[u8]) -> Option<Piece> {
        let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let number = |at: usize| Some(u64::from_be_bytes(*header.get(at..)?.first_chunk()?));
        let piece = Piece {
            kind: header[4],
            number: number(5)?,
            index: u32::from_be_bytes(*header.get(13..)?.first_chunk()?),
            batch: number(17)?,
            content: rest.get(..usize::from(u16::from_be_bytes([header[25], header[26]])))?.to_vec(),
        };
        let is_sound = header.starts_with(&MAGIC)
            && piece.bytes() <= VALUE_BYTES_MAX
            && header[27..] == checksum(&header[..27], &piece.content)
            && piece.number.max(piece.batch) <= NUMBER_MAX;
        is_sound.then_some(piece)
    }

    /// Length of its value.
    pub(super) fn bytes(&self) -> usize {
        HEADER_BYTES + self.content.len()
    }

    pub(super) fn key(&self) -> Vec<u8> {
        key(self.kind, self.number, self.index)
    }

    /// Key and value.
    pub(super) fn encode(&self) -> (Vec<u8>, Vec<u8>) {
        let key = self.key();
        let length = u16::try_from(self.content.len()).unwrap_or(u16::MAX).to_be_bytes();
        let header = [&MAGIC[..], &key, &self.batch.to_be_bytes(), &length].concat();
        let value = [&header[..], &checksum(&header, &self.content), &self.content].concat();
        (key, value)
    }
}

/// The mark of a batch of so many pieces, itself included.
pub(super) fn mark(marks: &Marks, batch: u64, pieces: u64) -> (Vec<u8>, Vec<u8>) {
    Piece { kind: MARK, number: 0, index: 0, batch, content: codec::encode_marks(marks, pieces) }.encode()
}

fn checksum(header: &[u8], content: &[u8]) -> [u8; 4] {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(content);
    hasher.finalize().to_be_bytes()
}

pub(super) fn key(kind: u8, number: u64, index: u32) -> Vec<u8> {
    [&[kind], &number.to_be_bytes()[..], &index.to_be_bytes()].concat()
}

/// All keys of a kind whose number is in the range.
pub(super) fn keys(kind: u8, numbers: RangeInclusive<u64>) -> RangeInclusive<Vec<u8>> {
    key(kind, *numbers.start(), 0)..=key(kind, *numbers.end(), u32::MAX)
}

/// The number of a file's cursor: a hash of its path. Two files with the same one take the cursor from one another, and are
/// read again: nothing else.
pub(super) fn number_of_path(path: &Path) -> u64 {
    xxh3_64(path.as_os_str().as_bytes()) & NUMBER_MAX
}

/// The number of the record of a session's end.
pub(super) fn number_of_session(session: Uuid) -> u64 {
    xxh3_64(session.as_bytes()) & NUMBER_MAX
}

/// The chunks of a record, from the index `first` on. An empty record, which stands for none, is one empty chunk.
pub(super) fn chunks(
    kind: u8,
    number: u64,
    first: u32,
    batch: u64,
    record: &[u8],
) -> impl DoubleEndedIterator<Item = (Vec<u8>, Vec<u8>)> {
    let count = record.len().div_ceil(CONTENT_BYTES_MAX).max(usize::from(first == 0));
    (0..count).map(move |at| {
        let chunk = record.get(at * CONTENT_BYTES_MAX..).unwrap_or_default();
        let content = chunk.get(..chunk.len().min(CONTENT_BYTES_MAX)).unwrap_or_default().to_vec();
        let index = first + u32::try_from(at).unwrap_or(u32::MAX);
        Piece { kind, number, index, batch, content }.encode()
    })
}

/// The records that `pieces`, in the order of their keys, are the chunks of, each as one piece with all of its content. What was
/// removed is left out, and what a longer record has left behind.
pub(super) fn records<E>(pieces: impl Iterator<Item = Result<Piece, E>>) -> impl Iterator<Item = Result<Piece, E>> {
    let mut pieces = pieces.peekable();
    std::iter::from_fn(move || {
        loop {
            let mut record = match pieces.next()? {
                Ok(first) if first.index == 0 && !first.content.is_empty() => first,
                Ok(_) => continue,
                error => return Some(error),
            };
            for index in 1.. {
                let is_next =
                    |piece: &Piece| (piece.number, piece.batch, piece.index) == (record.number, record.batch, index);
                let Some(Ok(chunk)) = pieces.next_if(|piece| piece.as_ref().is_ok_and(is_next)) else { break };
                record.content.extend(chunk.content);
            }
            return Some(Ok(record));
        }
    })
}

/// The record of an entry, of which `chunks` are the further ones; shorter where some are missing.
pub(super) fn record<E>(entry: &Entry, mut chunks: impl Iterator<Item = Result<Piece, E>>) -> Result<Vec<u8>, E> {
    let mut record = entry.part.clone();
    while record.len() < entry.record_bytes as usize
        && let Some(chunk) = chunks.next()
    {
        record.extend(chunk?.content);
    }
    Ok(record)
}

/// Consecutive numbers, as far as they fit into one piece. One without entries stands for nothing.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(super) struct Block {
    /// Up to the number before its first.
    pub before: Totals,
    pub entries: Vec<Entry>,
}

/// What the frame of a block takes at most, and what one of its entries takes besides its part.
const FRAME_BYTES_MAX: usize = 2 * 9 + 3;
const ENTRY_BYTES_MAX: usize = 5 + 3;

/// Longest part of a record that stands in a block.
pub(super) const PART_BYTES_MAX: usize = CONTENT_BYTES_MAX - FRAME_BYTES_MAX - ENTRY_BYTES_MAX;

impl Block {
    pub(super) fn of(piece: &Piece) -> Option<Block> {
        let (events, bytes, entries) = decode_block(&piece.content)?;
        let before = Totals { sequence: piece.number.checked_sub(1)?, events, bytes };
        (piece.kind == BLOCK && !entries.is_empty()).then_some(Block { before, entries })
    }

    /// Its last number.
    pub(super) fn last(&self) -> u64 {
        self.before.sequence + self.entries.len() as u64
    }

    /// Its entries, with the totals up to each: their `sequence` is its number.
    pub(super) fn numbered(self) -> impl Iterator<Item = (Totals, Entry)> {
        let mut totals = self.before;
        self.entries.into_iter().map(move |entry| {
            totals = totals.with(entry.record_bytes);
            (totals, entry)
        })
    }

    /// Of what will be its value, at most.
    pub(super) fn bytes(&self) -> usize {
        let entries = self.entries.iter().map(|entry| ENTRY_BYTES_MAX + entry.part.len());
        HEADER_BYTES + FRAME_BYTES_MAX + entries.sum::<usize>()
    }

    pub(super) fn has_room(&self, part_bytes: usize) -> bool {
        self.bytes() + ENTRY_BYTES_MAX + part_bytes <= VALUE_BYTES_MAX
    }

    /// Adds the number behind `totals`, which are those up to the one before.
    pub(super) fn add(&mut self, totals: &Totals, record_bytes: u32, part: &[u8]) {
        if self.entries.is_empty() {
            self.before = *totals;
        }
        self.entries.push(Entry { record_bytes, part: part.to_vec() });
    }

    /// Key and value; it is empty then.
    pub(super) fn take(&mut self, batch: u64) -> (Vec<u8>, Vec<u8>) {
        let Block { before, entries } = std::mem::take(self);
        let content = encode_block(&before, &entries);
        Piece { kind: BLOCK, number: before.sequence + 1, index: 0, batch, content }.encode()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_comes_back_as_it_was_and_is_found_among_other_bytes() {
        let mut builder = Block::default();
        let before = Totals { sequence: 6, events: 3, bytes: 500 };
        builder.add(&before, 5, b"first");
        builder.add(&Totals { sequence: 7, events: 4, bytes: 505 }, 0, b"");
        builder.add(&Totals { sequence: 8, events: 4, bytes: 505 }, 9000, b"begin");
        let (key, value) = builder.take(9);
        assert!(builder.entries.is_empty());
        let piece = Piece::decode(&value).unwrap();
        assert_eq!((piece.key(), piece.number, piece.batch), (key, 7, 9));
        let block = Block::of(&piece).unwrap();
        assert_eq!((block.before, block.last()), (before, 9));
        let parts: Vec<_> = block.numbered().collect();
        let entry = |record_bytes, part: &[u8]| Entry { record_bytes, part: part.to_vec() };
        assert_eq!(
            parts,
            [
                (Totals { sequence: 7, events: 4, bytes: 505 }, entry(5, b"first")),
                (Totals { sequence: 8, events: 4, bytes: 505 }, entry(0, b"")),
                (Totals { sequence: 9, events: 5, bytes: 9505 }, entry(9000, b"begin")),
            ]
        );
        assert_eq!(Piece::find(&[&value[..], b"more"].concat()), Some(piece));
    }

    #[test]
    fn whatever_byte_of_a_piece_is_changed_or_missing_it_is_damaged() {
        let (_, value) = Piece { kind: CHUNK, number: 7, index: 3, batch: 9, content: b"content".to_vec() }.encode();
        assert!(Piece::decode(&value).is_some());
        for at in 0..value.len() {
            let mut changed = value.clone();
            changed[at] ^= 1;
            assert_eq!(Piece::decode(&changed), None, "byte {at}");
            assert_eq!(Piece::decode(&value[..at]), None, "{at} bytes");
        }
        assert_eq!(Piece::decode(&[&value[..], b"x"].concat()), None);
    }

    #[test]
    fn a_full_block_is_no_longer_than_a_value_may_be() {
        let mut builder = Block::default();
        assert!(builder.has_room(PART_BYTES_MAX) && !builder.has_room(PART_BYTES_MAX + 1));
        let far = Totals { sequence: NUMBER_MAX - 1, events: NUMBER_MAX, bytes: NUMBER_MAX };
        builder.add(&far, u32::MAX, &[1; PART_BYTES_MAX]);
        assert!(!builder.has_room(0));
        let (_, value) = builder.take(NUMBER_MAX);
        assert!((VALUE_BYTES_MAX - FRAME_BYTES_MAX..=VALUE_BYTES_MAX).contains(&value.len()), "{}", value.len());
        assert!(Block::of(&Piece::decode(&value).unwrap()).is_some());
        let mut next = Totals::default();
        while builder.has_room(0) {
            builder.add(&next, 0, b"");
            next = next.with(0);
        }
        let (_, value) = builder.take(1);
        assert_eq!(Block::of(&Piece::decode(&value).unwrap()).unwrap().last(), next.sequence);
    }

    #[test]
    fn what_was_removed_or_left_behind_is_no_record() {
        let pieces: [(u64, u32, u64, &[u8]); 9] = [
            (1, 0, 5, b"a"),
            (1, 1, 5, b"b"),
            (1, 2, 4, b"left behind by a longer one"),
            (1, 3, 5, b"not behind the last"),
            (2, 1, 5, b"without a first one"),
            (3, 0, 5, b""),
            (3, 1, 5, b"of one that was removed"),
            (4, 0, 6, b"c"),
            (4, 1, 6, b"d"),
        ];
        let pieces = pieces.map(|(number, index, batch, content)| {
            Ok::<_, ()>(Piece { kind: LETTER, number, index, batch, content: content.to_vec() })
        });
        let found = records(pieces.into_iter()).map(Result::unwrap);
        let found: Vec<_> = found.map(|record| (record.number, record.batch, record.content)).collect();
        assert_eq!(found, [(1, 5, b"ab".to_vec()), (4, 6, b"cd".to_vec())]);
        let broken =
            [Ok(Piece { kind: LETTER, number: 1, index: 0, batch: 5, content: b"a".to_vec() }), Err("damaged")];
        assert!(matches!(records(broken.into_iter()).collect::<Vec<_>>()[..], [Ok(_), Err("damaged")]));
    }
}
