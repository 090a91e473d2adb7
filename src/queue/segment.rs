//! One segment: a sled database that is only ever added to.
//!
//! sled 0.34.7 does not do by itself, all measured:
//!
//! * Its `flush` does not sync on Linux: the log is synced here, through a descriptor of our own. So are, once, the files that it
//!   creates. A batch is whole after a power cut only if everything before it is on disk: one batch, one sync, and before it
//!   pages are split, by asking for each changed key.
//! * Opening one that is damaged it panics, cuts off for good what it does not understand, or takes a log that was cut for a whole
//!   one. So none is ever opened again: each start makes a new one.
//! * It can panic. A panic is damage, and nothing is printed of it ([`guard`]).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use sled::IVec;
use thiserror::Error;

use super::codec::Marks;
use super::files::{self, Highest, Name, sync_folder};
use super::guard;
use super::piece::{self, Piece};
use super::values::QueueError;
use crate::faults;

/// Bytes of a segment's pages that sled keeps in memory.
const CACHE_BYTES: u64 = 1 << 20;

/// Why a segment could not do what was asked.
#[derive(Debug, Error)]
pub(super) enum StoreError {
    /// The system refused: full disk, missing permission.
    #[error("{0}")]
    Io(String),
    /// A segment could not be written. Linux counts pages as written that it could not write: what is read of it can't be trusted.
    #[error("{cause}")]
    NotWritten { segment: u64, cause: String },
    /// What is on disk is not what was written.
    #[error("{cause}")]
    Damaged { segment: u64, cause: String },
}

impl StoreError {
    pub(super) fn damaged(segment: u64, cause: impl Into<String>) -> StoreError {
        StoreError::Damaged { segment, cause: cause.into() }
    }

    /// In the words of the queue at `path`.
    pub(super) fn of_queue(&self, path: &Path) -> QueueError {
        let (path, cause) = (path.to_owned(), self.to_string());
        match self {
            StoreError::Io(_) | StoreError::NotWritten { .. } => QueueError::Storage { path, cause },
            StoreError::Damaged { .. } => QueueError::Damaged { path, cause },
        }
    }
}

impl From<io::Error> for StoreError {
    fn from(error: io::Error) -> Self {
        StoreError::Io(error.to_string())
    }
}

/// Pieces to be written together, by their keys.
#[derive(Default)]
pub(super) struct Changes {
    list: BTreeMap<Vec<u8>, Vec<u8>>,
    bytes: usize,
}

impl Changes {
    pub(super) fn insert(&mut self, (key, value): (Vec<u8>, Vec<u8>)) {
        self.bytes += key.len() + value.len();
        let key_bytes = key.len();
        if let Some(before) = self.list.insert(key, value) {
            self.bytes -= key_bytes + before.len();
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn count(&self) -> u64 {
        self.list.len() as u64
    }

    /// Takes some that have about so many bytes, those with the greatest keys: of a record the first chunk comes last, without
    /// which the others are nothing.
    pub(super) fn take_part(&mut self, bytes: usize) -> Changes {
        let mut part = Changes::default();
        while part.bytes < bytes
            && let Some((key, value)) = self.list.pop_last()
        {
            self.bytes -= key.len() + value.len();
            part.insert((key, value));
        }
        part
    }
}

pub(super) struct Segment {
    pub name: Name,
    folder: PathBuf,
    /// `None` only while it is being dropped.
    db: Option<sled::Db>,
    /// sled's log.
    log: File,
}

impl Segment {
    /// Makes a segment of the queue at `path`. No other process ever opens it: what it holds is read without sled.
    pub(super) fn make(path: &Path, name: Name) -> Result<Segment, StoreError> {
        let folder = name.folder(path);
        files::remove_folder(&folder)?;
        let config =
            sled::Config::new().path(&folder).cache_capacity(CACHE_BYTES).flush_every_ms(None).use_compression(false);
        let db = guarded(name.number, || config.open())?;
        let log = File::open(folder.join("db"))?;
        Ok(Segment { name, folder, db: Some(db), log })
    }

    /// Length of its log.
    pub(super) fn bytes(&self) -> u64 {
        self.log.metadata().map_or(0, |metadata| metadata.len())
    }

    /// What is noted of it when all up to `sequence` is durable.
    pub(super) fn highest(&self, sequence: u64, batch: u64) -> Highest {
        Highest { sequence, segment: self.name.number, batch }
    }

    /// The pieces with these keys, in order.
    pub(super) fn pieces(&self, keys: RangeInclusive<Vec<u8>>) -> impl Iterator<Item = Result<Piece, StoreError>> {
        let mut found = self.db.as_ref().map(|db| db.range(keys));
        let mut before: Option<IVec> = None;
        std::iter::from_fn(move || {
            let next = self.guarded(|_| found.as_mut().and_then(Iterator::next).transpose()).transpose()?;
            Some(next.and_then(|(key, value)| {
                // Pages that contradict one another can give the same keys again and again.
                if before.replace(key.clone()).is_some_and(|before| before >= key) {
                    return Err(StoreError::damaged(self.name.number, "its pages contradict one another"));
                }
                self.sound(&key, &value)
            }))
        })
    }

    /// The last piece with one of these keys.
    pub(super) fn last(&self, keys: RangeInclusive<Vec<u8>>) -> Result<Option<Piece>, StoreError> {
        let found = self.guarded(|db| db.range(keys).next_back().transpose())?;
        found.map(|(key, value)| self.sound(&key, &value)).transpose()
    }

    /// The piece that is this value, which must name its key.
    fn sound(&self, key: &[u8], value: &[u8]) -> Result<Piece, StoreError> {
        let piece = Piece::decode(value).filter(|piece| piece.key() == key);
        piece.ok_or_else(|| StoreError::damaged(self.name.number, "one of its values is not what was written"))
    }

    /// Makes changes visible, all at once; durable after the next [`Segment::sync`].
    pub(super) fn apply(&self, changes: Changes) -> Result<(), StoreError> {
        let (mut batch, mut keys) = (sled::Batch::default(), Vec::with_capacity(changes.list.len()));
        for (key, value) in changes.list {
            let key = IVec::from(key);
            keys.push(key.clone());
            batch.insert(key, value);
        }
        if keys.is_empty() {
            return Ok(());
        }
        self.writing(self.guarded(|db| {
            faults::reach("segment-applying");
            db.apply_batch(batch)?;
            keys.iter().try_for_each(|key| db.get(key).map(drop))
        }))
    }

    /// Makes all that was applied durable against power loss.
    pub(super) fn sync(&self) -> Result<(), StoreError> {
        faults::reach("sync-before-flush");
        self.writing(self.guarded(|db| db.flush()))?;
        faults::reach("sync-flushed");
        #[cfg(test)]
        self.writing(super::tests::before_sync().map_err(StoreError::from))?;
        self.writing(self.log.sync_data().map_err(StoreError::from))
    }

    /// Where there was no room, nothing was written: what is there can be trusted.
    fn writing<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        result.map_err(|error| match error {
            StoreError::Io(cause) if !cause.contains("space") && !cause.contains("uota") => {
                StoreError::NotWritten { segment: self.name.number, cause }
            }
            error => error,
        })
    }

    /// Makes it the newest, with all that is in it. The file FIRST is the commit, and the last thing that is written.
    pub(super) fn finish(&self, marks: &Marks, batch: u64) -> Result<(), StoreError> {
        let mut changes = Changes::default();
        changes.insert(piece::mark(marks, batch, 1));
        self.apply(changes)?;
        self.sync()?;
        // What sled created, and the name of the folder.
        File::open(self.folder.join("conf"))?.sync_all()?;
        self.log.sync_all()?;
        sync_folder(&self.folder)?;
        self.folder.parent().map_or(Ok(()), sync_folder)?;
        faults::reach("segment-copied");
        files::write_first(&self.folder, self.name.first)?;
        sync_folder(&self.folder)?;
        faults::reach("segment-committed");
        Ok(())
    }

    pub(super) fn guarded<T>(&self, work: impl FnOnce(&sled::Db) -> Result<T, sled::Error>) -> Result<T, StoreError> {
        let db = self.db.as_ref().ok_or_else(|| StoreError::Io("the queue is closed".into()))?;
        guarded(self.name.number, || work(db))
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let db = self.db.take();
        // sled flushes when it is dropped, and panics when that fails. Whatever was acknowledged is already synced.
        let _ = guard::caught(|| drop(db));
    }
}

/// Runs a call of sled. A panic is damage.
fn guarded<T>(segment: u64, work: impl FnOnce() -> Result<T, sled::Error>) -> Result<T, StoreError> {
    match guard::caught(work) {
        Ok(answer) => answer.map_err(|error| match error {
            // sled hands on an error it met earlier as text of its own making; its kind still says it in words.
            sled::Error::Io(error) => StoreError::Io(format!("{} ({error})", error.kind())),
            other => StoreError::damaged(segment, other.to_string()),
        }),
        Err(panic) => {
            let message = panic.downcast_ref::<String>().map(String::as_str);
            let message = message.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Err(StoreError::damaged(segment, format!("sled panicked: {message}")))
        }
    }
}
