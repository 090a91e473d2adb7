//! The file in which small changes become durable with one write and one `fdatasync`, before they are in sled.
//!
//! sled hands each piece of its log to other threads and writes it in two parts; a single event took twice as long as the
//! disk needs. So a small batch goes here first, in one piece, and into the `memtable`; the next large batch, or an idle moment when
//! this file is half full, carries all of it into sled, and the file starts again from its beginning.
//!
//! ```text
//! offset  size  field
//!      0     4  "hwj" and the version of the layout: 1
//!      4     4  n, the length of the body, u32 little endian
//!      8     8  number, u64 little endian: one more than that of the record before, and never used twice
//!     16     8  xxh3-64 over bytes 0..16 and the body, u64 little endian
//!     24     n  the changes, one after another
//!        ...    zeros up to a multiple of 8
//!
//! a change:  1  1: the key gets a value, 0: it goes
//!            2  length of the key, u16 little endian; the key
//!            4  length of the value, u32 little endian; the value: only where the key gets one
//! ```
//!
//! The file has its full length from birth, so that syncing it does not sync its metadata. One record is written at a time
//! and synced before the next: only the last one can be torn, and was not acknowledged then. A whole record behind one
//! that is not whole is therefore damage. sled says under the key `j` up to which number it has everything: what has been
//! carried over is passed over, wherever it still stands.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sled::IVec;
use xxhash_rust::xxh3::Xxh3;

use super::codec::NUMBER_MAX;
use super::database::StoreError;
use super::memtable::Change;
use super::{faults, folder};

/// Name of the file in a generation's folder.
pub const FILE: &str = "journal";

/// Length of the file.
const FILE_BYTES: u64 = 1 << 20;

/// Longest file that is read: longer ones are not ours.
const READ_BYTES_MAX: u64 = 64 << 20;

const MAGIC: [u8; 3] = *b"hwj";
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 24;
const ALIGNMENT: usize = 8;

/// Bytes of a change beside its key and value.
pub const CHANGE_BYTES: usize = 7;

/// The journal of one generation, in the hands of the one who writes.
pub struct Journal {
    path: PathBuf,
    /// `None` until the first record, so that looking makes no file; and where it could not be made.
    file: Option<File>,
    /// Whether it could not be made.
    failed: bool,
    /// Where the next record goes; at the end where all must be carried over first.
    position: u64,
    /// The number of the next record, or of the next batch that goes to sled at once.
    next: u64,
    /// The body of the next record.
    pending: Vec<u8>,
    /// Whether an earlier process wrote records that may be in the system's memory only.
    unsynced: bool,
    /// Whether all that stands here has gone to sled; to be begun anew once that is durable.
    folded: bool,
}

/// What stood in a journal.
pub struct Replay {
    pub journal: Journal,
    /// The changes that sled may not have yet, in their order.
    pub changes: Vec<Change>,
    /// Where records were that are missing among them.
    pub gaps: Vec<Range<u64>>,
}

impl Journal {
    /// Reads the journal in `folder` of which sled has all up to the number `applied`.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] where a number, be it `applied`, is greater than any journal can have reached.
    pub fn open(folder: &Path, applied: u64) -> Result<Replay, StoreError> {
        let path = folder.join(FILE);
        let mut bytes = Vec::new();
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => drop(other?.take(READ_BYTES_MAX).read_to_end(&mut bytes)?),
        }
        let found = Found::search(&bytes, applied);
        if found.last > NUMBER_MAX {
            let cause = format!("the number {} of a record in {} is out of range", found.last, path.display());
            return Err(StoreError::Corrupt(cause));
        }
        let journal = Journal {
            path,
            file: None,
            failed: false,
            position: if found.gaps.is_empty() { found.end as u64 } else { FILE_BYTES },
            next: found.last + 1,
            pending: Vec::new(),
            unsynced: found.last > applied,
            folded: false,
        };
        Ok(Replay { journal, changes: found.changes, gaps: found.gaps })
    }

    /// Whether `bytes` of changes can be noted; makes the file where it is not there.
    pub fn has_room(&mut self, bytes: usize) -> bool {
        let end = self.position + (HEADER_BYTES + ALIGNMENT + self.pending.len() + bytes) as u64;
        if self.failed || end > FILE_BYTES {
            return false;
        }
        if self.file.is_none() {
            self.file = self.make().ok();
            // Then everything goes to sled at once: on a full disk that may find room yet.
            self.failed = self.file.is_none();
        }
        self.file.is_some()
    }

    /// Opens the file for writing, at its full length.
    fn make(&self) -> io::Result<File> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&self.path)?;
        let length = file.metadata()?.len();
        let missing = usize::try_from(FILE_BYTES.saturating_sub(length)).unwrap_or(0);
        if missing > 0 {
            if let Err(error) = file.write_all_at(&vec![0; missing], length) {
                // The room is needed.
                file.set_len(length)?;
                return Err(error);
            }
            file.sync_all()?;
            if let Some(folder) = self.path.parent() {
                folder::sync_folder(folder)?;
            }
        }
        faults::reach("journal-made");
        Ok(file)
    }

    /// Notes changes for the next record.
    pub fn note(&mut self, changes: &[Change]) {
        for (key, value) in changes {
            self.pending.push(u8::from(value.is_some()));
            self.pending.extend_from_slice(&u16::try_from(key.len()).unwrap_or(u16::MAX).to_le_bytes());
            self.pending.extend_from_slice(key);
            if let Some(value) = value {
                self.pending.extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_le_bytes());
                self.pending.extend_from_slice(value);
            }
        }
    }

    /// Whether something is not durable yet.
    pub fn is_unsynced(&self) -> bool {
        !self.pending.is_empty() || self.unsynced
    }

    /// Writes what was noted as one record and makes it durable.
    pub fn sync(&mut self) -> io::Result<()> {
        if !self.pending.is_empty() {
            let record = encode(self.next, &self.pending);
            let Some(file) = &self.file else { return Err(io::Error::other("no journal is open")) };
            faults::reach("journal-before-write");
            file.write_all_at(&record, self.position)?;
            faults::reach("journal-written");
            file.sync_data()?;
            self.position += record.len() as u64;
            self.next += 1;
            self.pending.clear();
        } else if self.unsynced {
            File::open(&self.path)?.sync_data()?;
        }
        self.unsynced = false;
        Ok(())
    }

    /// Whether something stands here that sled does not have; then what goes to sled needs a number.
    pub fn is_used(&self) -> bool {
        self.position > 0 || !self.pending.is_empty()
    }

    /// Whether it is time to carry over what stands here.
    pub fn is_half_full(&self) -> bool {
        self.position > FILE_BYTES / 2
    }

    /// The number for the batch with which all that stands here goes to sled.
    pub fn number(&self) -> u64 {
        self.next
    }

    /// That batch has been applied.
    pub fn fold(&mut self) {
        self.pending.clear();
        self.next += 1;
        self.folded = true;
    }

    /// sled has been synced: what was folded is durable there.
    pub fn sled_synced(&mut self) -> io::Result<()> {
        if !std::mem::take(&mut self.folded) {
            return Ok(());
        }
        faults::reach("fold-synced");
        self.position = 0;
        // Not synced, and not needed but where sled loses its number.
        if let Some(file) = &self.file {
            file.write_all_at(&[0; HEADER_BYTES], 0)?;
        }
        Ok(())
    }
}

/// The records in a file.
struct Found {
    changes: Vec<Change>,
    /// The number of the last one, and where it ends.
    last: u64,
    end: usize,
    gaps: Vec<Range<u64>>,
}

impl Found {
    fn search(bytes: &[u8], applied: u64) -> Found {
        let mut found = Found { changes: Vec::new(), last: applied, end: 0, gaps: Vec::new() };
        let mut at = 0;
        let mut before = None;
        while let Some(record) = decode(bytes.get(at..).unwrap_or_default())
            && before.is_none_or(|before: u64| before.checked_add(1) == Some(record.number))
        {
            before = Some(record.number);
            at = found.take(at, record);
        }
        // Behind the end nothing is newer, unless what stood there is not whole any more.
        while at < bytes.len() {
            at = match decode(bytes.get(at..).unwrap_or_default()) {
                Some(record) => found.take(at, record),
                None => at + ALIGNMENT,
            }
        }
        found
    }

    /// Takes the record at `at` if sled does not have it yet; gives its end.
    fn take(&mut self, at: usize, record: Record) -> usize {
        let end = at + record.length;
        if record.number <= self.last {
            return end;
        }
        if record.number - self.last > 1 {
            self.gaps.push(self.end as u64..at as u64);
        }
        self.last = record.number;
        self.end = end;
        self.changes.extend(record.changes);
        end
    }
}

struct Record {
    number: u64,
    changes: Vec<Change>,
    /// Bytes in the file.
    length: usize,
}

fn encode(number: u64, body: &[u8]) -> Vec<u8> {
    let mut record = Vec::with_capacity(HEADER_BYTES + body.len() + ALIGNMENT);
    record.extend_from_slice(&MAGIC);
    record.push(VERSION);
    record.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
    record.extend_from_slice(&number.to_le_bytes());
    let checksum = checksum(&record, body);
    record.extend_from_slice(&checksum.to_le_bytes());
    record.extend_from_slice(body);
    record.resize(record.len().next_multiple_of(ALIGNMENT), 0);
    record
}

/// The record at the beginning of `bytes`, if a whole one is there.
fn decode(bytes: &[u8]) -> Option<Record> {
    let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
    let (named, sum) = header.split_at_checked(16)?;
    let (magic, named_rest) = named.split_first_chunk::<3>()?;
    let (&[version], named_rest) = named_rest.split_first_chunk::<1>()?;
    let (length, number) = named_rest.split_first_chunk::<4>()?;
    if *magic != MAGIC || version != VERSION {
        return None;
    }
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    let body = rest.get(..length)?;
    if checksum(named, body).to_le_bytes() != *sum {
        return None;
    }
    Some(Record {
        number: u64::from_le_bytes(number.try_into().ok()?),
        changes: decode_changes(body)?,
        length: (HEADER_BYTES + length).next_multiple_of(ALIGNMENT),
    })
}

fn decode_changes(mut body: &[u8]) -> Option<Vec<Change>> {
    let mut changes = Vec::new();
    while let Some((&kind, rest)) = body.split_first() {
        let (length, rest) = rest.split_first_chunk::<2>()?;
        let (key, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
        let (value, rest) = if kind == 1 {
            let (length, rest) = rest.split_first_chunk::<4>()?;
            let (value, rest) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
            (Some(IVec::from(value)), rest)
        } else {
            (None, rest)
        };
        changes.push((IVec::from(key), value));
        body = rest;
    }
    Some(changes)
}

fn checksum(header: &[u8], body: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(header);
    hasher.update(body);
    hasher.digest()
}
