//! What stands in a segment: the keys, and the values under them.
//!
//! ```text
//! key          value
//! e S          block: the events and rejections numbered S and following, as far as they fit
//! x S I        further chunk I of event S (from 1 on)
//! d S, f S I   dead letter S: its record, chunk I of its content (from 0 on)
//! c H I        chunk I of the cursor of the file whose path has the hash H
//! m            mark: the last number that was acknowledged and the last one that is settled, with the totals up to them
//! g            the older segments that are still needed
//! ```
//!
//! S is a u64, I a u32, both big endian: keys are in the order of acceptance. Each value is a piece, which says itself what it is
//! and has a checksum, so that it is found in a damaged log without sled:
//!
//! ```text
//! offset  size  field
//!      0     4  "hwq1"
//!      4     1  kind: the first byte of its key
//!      5     8  S, else 0
//!     13     4  I, else 0
//!     17     8  in which start of the queue it was written; they are counted
//!     25     2  length of the content
//!     27     4  crc32 (IEEE) over bytes 0..27 and the content
//!     31     n  content
//! ```
//!
//! Numbers have no gaps: a rejection takes one too, and leaves an entry without a record in the block. So what is missing is
//! noticed when it is read. What a process had written and not committed when it died is removed at the next opening, and its
//! numbers are given anew; the log may still have it. There the later one counts.

use std::ops::RangeInclusive;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use xxhash_rust::xxh3::xxh3_128;

use super::codec::RECORD_BYTES_MAX;

/// Longest value: sled keeps longer ones in files that it never syncs.
pub const VALUE_BYTES_MAX: usize = 4096;

const MAGIC: [u8; 4] = *b"hwq1";
pub const HEADER_BYTES: usize = 31;

/// Longest content of a piece.
pub const CONTENT_BYTES_MAX: usize = VALUE_BYTES_MAX - HEADER_BYTES;

/// Greatest number that is believed when it is read from disk: counting by ones never gets there, and adding to one that is
/// believed cannot overflow.
pub const NUMBER_MAX: u64 = u64::MAX / 2;

pub const BLOCK: u8 = b'e';
pub const CHUNK: u8 = b'x';
pub const LETTER: u8 = b'd';
pub const LETTER_CONTENT: u8 = b'f';
pub const CURSOR: u8 = b'c';
pub const MARK: u8 = b'm';
pub const OLDER: u8 = b'g';

/// A value, taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece<'a> {
    pub kind: u8,
    pub sequence: u64,
    pub index: u32,
    /// The start in which it was written.
    pub start: u64,
    pub content: &'a [u8],
}

impl<'a> Piece<'a> {
    /// `None` where it is damaged.
    pub fn decode(value: &'a [u8]) -> Option<Piece<'a>> {
        let (header, content) = value.split_first_chunk::<HEADER_BYTES>()?;
        let length = usize::from(u16::from_be_bytes([header[25], header[26]]));
        let content = content.get(..length).filter(|content| content.len() + HEADER_BYTES == value.len())?;
        let piece = Piece {
            kind: header[4],
            sequence: u64::from_be_bytes(*header.get(5..)?.first_chunk()?),
            index: u32::from_be_bytes(*header.get(13..)?.first_chunk()?),
            start: u64::from_be_bytes(*header.get(17..)?.first_chunk()?),
            content,
        };
        let is_sound = header.starts_with(&MAGIC)
            && header[27..] == checksum(&header[..27], content)
            && piece.sequence <= NUMBER_MAX;
        is_sound.then_some(piece)
    }

    /// The piece that begins with these bytes, which may go on behind it, and its length.
    pub fn find(bytes: &'a [u8]) -> Option<(Piece<'a>, usize)> {
        if !bytes.starts_with(&MAGIC) {
            return None;
        }
        let length = HEADER_BYTES + usize::from(u16::from_be_bytes(*bytes.get(25..)?.first_chunk()?));
        Piece::decode(bytes.get(..length.min(VALUE_BYTES_MAX + 1))?).map(|piece| (piece, length))
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut value = Vec::with_capacity(HEADER_BYTES + self.content.len());
        value.extend_from_slice(&MAGIC);
        value.push(self.kind);
        value.extend_from_slice(&self.sequence.to_be_bytes());
        value.extend_from_slice(&self.index.to_be_bytes());
        value.extend_from_slice(&self.start.to_be_bytes());
        let length = u16::try_from(self.content.len()).unwrap_or(u16::MAX);
        value.extend_from_slice(&length.to_be_bytes());
        let checksum = checksum(&value, self.content);
        value.extend_from_slice(&checksum);
        value.extend_from_slice(self.content);
        value
    }
}

/// By which a raw search looks for pieces.
pub fn magic() -> &'static [u8] {
    &MAGIC
}

fn checksum(header: &[u8], content: &[u8]) -> [u8; 4] {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(content);
    hasher.finalize().to_be_bytes()
}

pub fn key(kind: u8, sequence: u64) -> Vec<u8> {
    [&[kind], &sequence.to_be_bytes()[..]].concat()
}

pub fn indexed_key(kind: u8, sequence: u64, index: u32) -> Vec<u8> {
    [&[kind], &sequence.to_be_bytes()[..], &index.to_be_bytes()].concat()
}

pub fn cursor_key(id: CursorId, index: u32) -> Vec<u8> {
    [&[CURSOR], &id.0[..], &index.to_be_bytes()].concat()
}

/// All keys of a kind whose number is in the range, with their indexes.
pub fn keys(kind: u8, sequences: RangeInclusive<u64>) -> RangeInclusive<Vec<u8>> {
    key(kind, *sequences.start())..=indexed_key(kind, *sequences.end(), u32::MAX)
}

pub fn all_keys(kind: u8) -> RangeInclusive<Vec<u8>> {
    vec![kind]..=[&[kind], [u8::MAX; 24].as_slice()].concat()
}

/// The number in a key that has one.
pub fn key_sequence(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(*key.get(1..)?.first_chunk()?))
}

/// By what a cursor is found: a hash of the path of its file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct CursorId([u8; 16]);

impl CursorId {
    pub const MIN: CursorId = CursorId([u8::MIN; 16]);
    pub const MAX: CursorId = CursorId([u8::MAX; 16]);

    pub fn of(path: &Path) -> CursorId {
        CursorId(xxh3_128(path.as_os_str().as_bytes()).to_be_bytes())
    }

    /// In the key of a cursor's chunk.
    pub fn in_key(key: &[u8]) -> Option<CursorId> {
        Some(CursorId(*key.get(1..)?.first_chunk()?))
    }
}

/// How far the queue has come at a number: what has been taken in up to it, since the queue was made.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Totals {
    pub sequence: u64,
    pub events: u64,
    /// Of their records.
    pub bytes: u64,
}

impl Totals {
    /// Events that wait between these marks, and the bytes of their records. Lost ones among them count until it is past them.
    pub fn since(&self, settled: &Totals) -> (u64, u64) {
        let events = self.events.saturating_sub(settled.events);
        (events, if events == 0 { 0 } else { self.bytes.saturating_sub(settled.bytes) })
    }
}

/// What has entered and what has left.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Marks {
    /// How often the queue was opened.
    pub start: u64,
    pub acknowledged: Totals,
    pub settled: Totals,
}

impl Marks {
    /// Key and value.
    pub fn encode(&self) -> (Vec<u8>, Vec<u8>) {
        let Marks { start, acknowledged, settled } = *self;
        let numbers = [acknowledged.events, acknowledged.bytes, settled.sequence, settled.events, settled.bytes];
        let content = numbers.map(u64::to_be_bytes).concat();
        let piece = Piece { kind: MARK, sequence: acknowledged.sequence, index: 0, start, content: &content };
        (vec![MARK], piece.encode())
    }

    pub fn of(piece: &Piece<'_>) -> Option<Marks> {
        let [events, bytes, settled, settled_events, settled_bytes] = numbers(piece.content)?;
        let acknowledged = Totals { sequence: piece.sequence, events, bytes };
        Some(Marks {
            start: piece.start,
            acknowledged,
            settled: Totals { sequence: settled, events: settled_events, bytes: settled_bytes },
        })
    }
}

/// So many u64, and nothing else.
fn numbers<const N: usize>(content: &[u8]) -> Option<[u64; N]> {
    if content.len() != 8 * N {
        return None;
    }
    let mut found = [0; N];
    for (number, bytes) in found.iter_mut().zip(content.chunks_exact(8)) {
        *number = u64::from_be_bytes(*bytes.first_chunk()?);
    }
    found.iter().all(|number| *number <= NUMBER_MAX).then_some(found)
}

/// A segment that gets no more events.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OlderSegment {
    pub number: u64,
    pub first: u64,
    pub last: u64,
    /// Length of its log when it was finished.
    pub log_bytes: u64,
}

/// How many fit into one value; with the size of a segment that is more than a queue may hold.
pub const OLDER_MAX: usize = CONTENT_BYTES_MAX / 32;

/// `index`: which part of the list this is.
pub fn encode_older(list: &[OlderSegment], index: u32) -> Vec<u8> {
    let numbers = |one: &OlderSegment| [one.number, one.first, one.last, one.log_bytes].map(u64::to_be_bytes).concat();
    let content: Vec<u8> = list.iter().flat_map(numbers).collect();
    Piece { kind: OLDER, sequence: 0, index, start: 0, content: &content }.encode()
}

pub fn decode_older(piece: &Piece<'_>) -> Option<Vec<OlderSegment>> {
    let list = piece.content.chunks(32).map(|one| {
        let [number, first, last, log_bytes] = numbers(one)?;
        Some(OlderSegment { number, first, last, log_bytes })
    });
    list.collect()
}

/// One number of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry<'a> {
    pub sequence: u64,
    /// Length of the event's record; 0 for a rejection.
    pub record_bytes: u32,
    /// The record, or the first part of a long one.
    pub part: &'a [u8],
}

impl Entry<'_> {
    /// The whole record, of which `chunk` gives the further pieces; `None` where one of them is missing or does not fit.
    pub fn record<E>(&self, mut chunk: impl FnMut(u32) -> Result<Option<Vec<u8>>, E>) -> Result<Option<Vec<u8>>, E> {
        let length = self.record_bytes as usize;
        let mut record = Vec::with_capacity(length.min(RECORD_BYTES_MAX));
        record.extend_from_slice(self.part);
        for index in 1.. {
            if record.len() >= length {
                break;
            }
            let Some(value) = chunk(index)? else { return Ok(None) };
            let Some(piece) = Piece::decode(&value).filter(|piece| !piece.content.is_empty()) else { return Ok(None) };
            record.extend_from_slice(piece.content);
        }
        Ok(Some(record).filter(|record| record.len() == length))
    }
}

/// A block, taken apart.
///
/// ```text
/// size  field
///    8  events before it, of all that were ever taken in
///    8  bytes of their records
///    2  n, the number of entries
///  6 n  for each: length of its record, u32 (0: a rejection, or lost); bytes of it that stand here, u16
///  ...  these bytes, one after another
/// ```
///
/// One without entries stands for numbers that are lost: behind n is the last of them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Block<'a> {
    /// Up to the number before its first.
    pub before: Totals,
    pub entries: Vec<Entry<'a>>,
    pub last: u64,
}

const BLOCK_HEADER_BYTES: usize = 18;
const ENTRY_BYTES: usize = 6;

/// Longest part of a record that stands in a block.
pub const PART_BYTES_MAX: usize = CONTENT_BYTES_MAX - BLOCK_HEADER_BYTES - ENTRY_BYTES;

impl<'a> Block<'a> {
    pub fn of(piece: &Piece<'a>) -> Option<Block<'a>> {
        let (before, rest) = piece.content.split_at_checked(16)?;
        let [events, bytes] = numbers(before)?;
        let (count, rest) = rest.split_first_chunk::<2>()?;
        let (table, mut parts) = rest.split_at_checked(usize::from(u16::from_be_bytes(*count)) * ENTRY_BYTES)?;
        let mut entries = Vec::with_capacity(table.len() / ENTRY_BYTES);
        for (sequence, entry) in (piece.sequence..).zip(table.chunks_exact(ENTRY_BYTES)) {
            let record_bytes = u32::from_be_bytes(*entry.first_chunk()?);
            let (part, rest) =
                parts.split_at_checked(usize::from(u16::from_be_bytes(*entry.get(4..)?.first_chunk()?)))?;
            parts = rest;
            entries.push(Entry { sequence, record_bytes, part });
        }
        let before = Totals { sequence: piece.sequence.checked_sub(1)?, events, bytes };
        let last = if entries.is_empty() {
            let [last] = numbers(std::mem::take(&mut parts))?;
            last
        } else {
            before.sequence + entries.len() as u64
        };
        (piece.kind == BLOCK && last > before.sequence && parts.is_empty()).then_some(Block { before, entries, last })
    }

    /// Key and value of one that stands for the numbers behind `before` up to `last`, which are lost.
    pub fn lost(before: &Totals, last: u64, start: u64) -> (Vec<u8>, Vec<u8>) {
        let sequence = before.sequence + 1;
        let content =
            [&before.events.to_be_bytes()[..], &before.bytes.to_be_bytes(), &[0, 0], &last.to_be_bytes()].concat();
        (key(BLOCK, sequence), Piece { kind: BLOCK, sequence, index: 0, start, content: &content }.encode())
    }

    /// The totals up to a number of this block.
    pub fn totals_through(&self, sequence: u64) -> Totals {
        let mut totals = Totals { sequence, ..self.before };
        for entry in self.entries.iter().filter(|entry| entry.sequence <= sequence && entry.record_bytes > 0) {
            totals.events += 1;
            totals.bytes += u64::from(entry.record_bytes);
        }
        totals
    }
}

/// A block that is being filled.
#[derive(Default)]
pub struct BlockBuilder {
    before: Totals,
    table: Vec<u8>,
    parts: Vec<u8>,
}

impl BlockBuilder {
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Of what will be its value.
    pub fn bytes(&self) -> usize {
        HEADER_BYTES + BLOCK_HEADER_BYTES + self.table.len() + self.parts.len()
    }

    pub fn has_room(&self, part_bytes: usize) -> bool {
        self.bytes() + ENTRY_BYTES + part_bytes <= VALUE_BYTES_MAX
    }

    /// Adds the number behind `totals`, which are those up to the one before.
    pub fn add(&mut self, totals: &Totals, record_bytes: u32, part: &[u8]) {
        if self.is_empty() {
            self.before = *totals;
        }
        self.table.extend_from_slice(&record_bytes.to_be_bytes());
        self.table.extend_from_slice(&u16::try_from(part.len()).unwrap_or(u16::MAX).to_be_bytes());
        self.parts.extend_from_slice(part);
    }

    /// Key and value; it is empty then.
    pub fn take(&mut self, start: u64) -> (Vec<u8>, Vec<u8>) {
        let BlockBuilder { before, table, parts } = std::mem::take(self);
        let count = u16::try_from(table.len() / ENTRY_BYTES).unwrap_or(u16::MAX).to_be_bytes();
        let content = [&before.events.to_be_bytes()[..], &before.bytes.to_be_bytes(), &count, &table, &parts].concat();
        let sequence = before.sequence + 1;
        (key(BLOCK, sequence), Piece { kind: BLOCK, sequence, index: 0, start, content: &content }.encode())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_comes_back_as_it_was_and_is_found_among_other_bytes() {
        let mut builder = BlockBuilder::default();
        let before = Totals { sequence: 6, events: 3, bytes: 500 };
        builder.add(&before, 5, b"first");
        builder.add(&Totals { sequence: 7, events: 4, bytes: 505 }, 0, b"");
        builder.add(&Totals { sequence: 8, events: 4, bytes: 505 }, 9000, b"begin");
        let (key, value) = builder.take(9);
        assert!(builder.is_empty());
        assert_eq!(key_sequence(&key), Some(7));
        let piece = Piece::decode(&value).unwrap();
        let block = Block::of(&piece).unwrap();
        let parts: Vec<_> =
            block.entries.iter().map(|entry| (entry.sequence, entry.record_bytes, entry.part)).collect();
        assert_eq!(parts, [(7, 5, &b"first"[..]), (8, 0, b""), (9, 9000, b"begin")]);
        assert_eq!((block.before, block.last), (before, 9));
        assert_eq!(block.totals_through(8), Totals { sequence: 8, events: 4, bytes: 505 });
        assert_eq!(block.totals_through(9), Totals { sequence: 9, events: 5, bytes: 9505 });
        let among = [&value[..], b"more"].concat();
        assert_eq!(Piece::find(&among), Some((piece, value.len())));
    }

    #[test]
    fn whatever_byte_of_a_piece_is_changed_or_missing_it_is_damaged() {
        let value = Piece { kind: CHUNK, sequence: 7, index: 3, start: 9, content: b"content" }.encode();
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
    fn a_full_block_is_as_long_as_a_value_may_be() {
        let mut builder = BlockBuilder::default();
        assert!(builder.has_room(PART_BYTES_MAX) && !builder.has_room(PART_BYTES_MAX + 1));
        builder.add(&Totals::default(), 1 << 20, &[1; PART_BYTES_MAX]);
        assert!(!builder.has_room(0));
        assert_eq!(builder.take(9).1.len(), VALUE_BYTES_MAX);
    }

    #[test]
    fn marks_lost_numbers_and_the_list_come_back_as_they_were() {
        let totals = Totals { sequence: 5, events: 4, bytes: 300 };
        let marks = Marks { start: 9, acknowledged: totals, settled: Totals { sequence: 4, events: 3, bytes: 200 } };
        assert_eq!(Marks::of(&Piece::decode(&marks.encode().1).unwrap()), Some(marks));
        let (key, value) = Block::lost(&totals, 9, 1);
        assert_eq!(key_sequence(&key), Some(6));
        let expected = Block { before: totals, entries: Vec::new(), last: 9 };
        assert_eq!(Block::of(&Piece::decode(&value).unwrap()), Some(expected));
        assert_eq!(Block::of(&Piece::decode(&Block::lost(&totals, 5, 1).1).unwrap()), None, "it has no number");
        let list =
            [1, 2].map(|number| OlderSegment { number, first: 10 * number, last: 10 * number + 9, log_bytes: 7 });
        assert_eq!(decode_older(&Piece::decode(&encode_older(&list, 0)).unwrap()), Some(list.to_vec()));
        assert_eq!(Marks::of(&Piece { kind: MARK, sequence: 1, index: 0, start: 0, content: &[0xff; 40] }), None);
    }
}
