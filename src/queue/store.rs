//! One generation of the queue on disk: a sled database, the journal in front of it, and what sled 0.34.7 does not do by itself.
//!
//! # What is added
//!
//! * **Syncing.** `sled::Db::flush` ends in `sync_file_range`, which promises nothing about a power cut. So the store
//!   holds a descriptor of its own on `db` and [`Store::sync`] calls `fdatasync` (macOS: `F_FULLFSYNC`) after the flush.
//! * **One batch, one sync.** When sled begins a new segment (every 512 KiB) it writes into its header up to where the
//!   log is "stable", and recovery trusts that without looking. Stable means `sync_file_range`. During an
//!   `apply_batch` the mark can't pass the batch's beginning, because the batch's manifest is held back until it is
//!   sealed (`PageCache::pin_log`, `StabilityIntervals`). So if everything *before* a batch is on the platter, a power cut
//!   leaves the batch whole or not at all. [`Store::apply`] therefore syncs what an earlier batch of sled's left unsynced.
//! * **Small batches.** They become durable in the [`journal`], with one write, and visible in the [`memtable`]; all of it goes to
//!   sled with the next large batch, or in an idle moment, as a part of the same sled batch. `journal` says how that
//!   stays whole.
//! * **Chunks.** A leaf of sled holds up to 16 values, for moments some more, and a page above 131,052 bytes is moved
//!   to `blobs/`, which is never synced. No value is longer than [`CHUNK_BYTES`], so no page comes near it.
//! * **Opening.** See [`Store::open`].
//!
//! # Keys
//!
//! One tree. `S` is a sequence as u64, `I` an index from 1 on as u32, `H` the xxh3-128 of a path; all big endian, so
//! that the order of the keys is the order of acceptance.
//!
//! ```text
//! m        counters                                    always written in the same batch as what they count
//! e S      block of pending events, the first of which was S: their records, or the first part of a long one
//! d S      letter: why and when S was set aside
//! f S      first part of what was set aside: the record of an event or an input, or unreadable bytes
//! x S I    further chunks of the record S, wherever its first part is
//! c H      first chunk of a cursor
//! j        number up to which sled has what was in the journal, as u64
//! k H I    further chunks of a cursor
//! ```
//!
//! The counters are the commit: whatever stands at `next_sequence` or above was never acknowledged, is not shown,
//! and is removed at the next opening. So chunks may be written in earlier batches than the counters.

use std::fs::{self, File};
use std::io;
use std::ops::{Bound, RangeBounds, RangeInclusive};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use sled::IVec;
use thiserror::Error;
use xxhash_rust::xxh3::xxh3_128;

use super::journal::{self, Journal, Replay};
use super::memtable::{Change, Memtable};
use super::{codec, guard};
use crate::event::Sequence;

/// Longest value in sled. 20 of them and their keys still make a page of 83 KB, well below the blobs' threshold.
pub const CHUNK_BYTES: usize = 4096;

/// What a change takes in memory beside its key and value until its batch is through: sled copies the page it is in, and
/// now and then the one above, and gives none of the copies back before the batch's end.
const CHANGE_BYTES: usize = 2048;

/// Changes up to this size go through the journal. Two dozen events of the usual size: above it sled is no slower.
const JOURNALED_BYTES_MAX: usize = 64 << 10;

/// Keys that are carried over into sled at once, at most. Each can make sled copy a page of 64 kB, and none of the copies is
/// given back before the batch's end.
const NOTED_MAX: usize = 128;

/// Where sled keeps the number up to which it has all that was in the journal, as u64 big endian.
const JOURNALED_KEY: &[u8] = b"j";

/// Pages sled keeps in memory.
const CACHE_BYTES: u64 = 8 << 20;

/// How long opening waits for sled's own lock: only threads of a handle that was just dropped can hold it.
const SLED_LOCK_WAIT: Duration = Duration::from_secs(5);

/// Why the store could not do what was asked.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The system refused: full disk, missing permission, failing device.
    #[error("{0}")]
    Io(String),
    /// What is on disk is not what was written.
    #[error("{0}")]
    Corrupt(String),
}

impl From<sled::Error> for StoreError {
    fn from(error: sled::Error) -> Self {
        use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
        match error {
            // sled reads beyond the end of a cut file, or decodes what is not its own.
            sled::Error::Io(error) if matches!(error.kind(), UnexpectedEof | InvalidData | InvalidInput) => {
                StoreError::Corrupt(error.to_string())
            }
            // sled hands on an error it met earlier as text of its own making; its kind still says it in words.
            sled::Error::Io(error) if error.raw_os_error().is_none() => {
                StoreError::Io(format!("{} ({error})", error.kind()))
            }
            sled::Error::Io(error) => StoreError::Io(error.to_string()),
            other => StoreError::Corrupt(other.to_string()),
        }
    }
}

impl From<io::Error> for StoreError {
    fn from(error: io::Error) -> Self {
        StoreError::Io(error.to_string())
    }
}

/// What opening a store had to put right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreRepair {
    /// A snapshot that was being written when the process died; with it there sled never opens again.
    SnapshotUnfinished { file: PathBuf },
    /// Snapshots with which sled did not open; without them it reads its whole log.
    SnapshotsSetAside { cause: String },
    /// Changes that had been acknowledged are missing from the journal.
    JournalDamaged { file: PathBuf, gaps: Vec<std::ops::Range<u64>> },
}

/// Changes that become visible and durable together.
#[derive(Default)]
pub struct Changes {
    list: Vec<Change>,
    /// Of keys and values.
    bytes: usize,
}

impl Changes {
    pub fn insert(&mut self, key: &[u8], value: &[u8]) {
        self.bytes += key.len() + value.len();
        self.list.push((IVec::from(key), Some(IVec::from(value))));
    }

    pub fn remove(&mut self, key: &[u8]) {
        self.bytes += key.len();
        self.list.push((IVec::from(key), None));
    }

    /// Memory it takes to apply them.
    pub fn bytes(&self) -> usize {
        self.bytes + self.list.len() * CHANGE_BYTES
    }

    /// Bytes they take in the journal.
    fn journal_bytes(&self) -> usize {
        self.bytes + self.list.len() * journal::CHANGE_BYTES
    }

    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}

/// An open generation. Reading is for everybody; [`Store::apply`] and [`Store::sync`] are for the one writer.
pub struct Store {
    /// `None` only while it is being dropped.
    db: Option<sled::Db>,
    /// Our own descriptor of sled's `db`.
    file: File,
    folder: PathBuf,
    /// Whether sled has changes that are not synced.
    unsynced: AtomicBool,
    journal: Mutex<Journal>,
    memtable: Arc<RwLock<Memtable>>,
    /// Remove the folder once the last reader has let go.
    retired: AtomicBool,
    hooks: Mutex<Hooks>,
}

/// What tests put between the store and the disk.
#[derive(Clone, Default)]
pub struct Hooks {
    /// Called before each sync; an error is that of the sync.
    #[cfg(test)]
    pub before_sync: Option<std::sync::Arc<dyn Fn() -> io::Result<()> + Send + Sync>>,
}

impl Store {
    /// Opens the sled database in `folder`, or makes one where there is none.
    ///
    /// Snapshots are only a cache of the log, so unfinished ones are removed, and if sled does not open with the finished ones
    /// they are renamed and it opens without. sled panics on some kinds of damage: such a panic counts as [`StoreError::Corrupt`].
    pub fn open(folder: &Path) -> Result<(Store, Vec<StoreRepair>), StoreError> {
        let mut repairs = Vec::new();
        let snapshots = snapshots(folder)?;
        for file in snapshots.iter().filter(|file| file.extension().is_some_and(|end| end == "generating")) {
            fs::remove_file(file)?;
            repairs.push(StoreRepair::SnapshotUnfinished { file: file.clone() });
        }
        let db = match open_sled(folder) {
            Err(StoreError::Corrupt(cause)) if set_snapshots_aside(folder)? => {
                repairs.push(StoreRepair::SnapshotsSetAside { cause });
                open_sled(folder)?
            }
            other => other?,
        };
        let in_sled = guarded(|| Ok(db.get(JOURNALED_KEY)?))?;
        let applied = in_sled.and_then(|number| number.first_chunk().map(|&number| u64::from_be_bytes(number)));
        let Replay { journal, changes, gaps } = Journal::open(folder, applied.unwrap_or(0))?;
        let mut memtable = Memtable::default();
        changes
            .into_iter()
            .try_for_each(|change| guarded(|| memtable.note(change, |key| Ok(db.contains_key(key)?))))?;
        if !gaps.is_empty() {
            repairs.push(StoreRepair::JournalDamaged { file: folder.join(journal::FILE), gaps });
        }
        let store = Store {
            db: Some(db),
            file: File::open(folder.join("db"))?,
            folder: folder.to_owned(),
            unsynced: AtomicBool::new(true),
            journal: Mutex::new(journal),
            memtable: Arc::new(RwLock::new(memtable)),
            retired: AtomicBool::new(false),
            hooks: Mutex::default(),
        };
        Ok((store, repairs))
    }

    /// Makes the folder's own entries durable: what sled created in it and its name in its parent.
    pub fn sync_folder(&self) -> Result<(), StoreError> {
        File::open(self.folder.join("conf"))?.sync_all()?;
        self.file.sync_all()?;
        sync_folder(&self.folder)?;
        if let Some(parent) = self.folder.parent() {
            sync_folder(parent)?;
        }
        Ok(())
    }

    /// Makes `changes` visible at once and as a whole; durable after the next [`Store::sync`].
    pub fn apply(&self, changes: Changes) -> Result<(), StoreError> {
        if changes.is_empty() {
            return Ok(());
        }
        // What comes after is not durable before: a batch of sled's, then the journal's next record.
        self.sync_sled()?;
        let mut journal = self.journal();
        if !self.is_for_journal(&mut journal, &changes)? {
            return self.fold(&mut journal, changes);
        }
        journal.note(&changes.list);
        let mut memtable = self.memtable.write().unwrap_or_else(PoisonError::into_inner);
        let mut changes = changes.list.into_iter();
        guarded(|| {
            let db = self.db()?;
            changes.try_for_each(|change| memtable.note(change, |key| Ok(db.contains_key(key)?)))
        })
    }

    /// Whether they are few, and take nothing out of sled: that is the way of much that is drained.
    fn is_for_journal(&self, journal: &mut Journal, changes: &Changes) -> Result<bool, StoreError> {
        let memtable = self.memtable();
        if changes.journal_bytes() > JOURNALED_BYTES_MAX || memtable.len() + changes.list.len() > NOTED_MAX {
            return Ok(false);
        }
        for (key, value) in &changes.list {
            if value.is_none() && !memtable.knows(key) && guarded(|| Ok(self.db()?.contains_key(key)?))? {
                return Ok(false);
            }
        }
        Ok(journal.has_room(changes.journal_bytes()))
    }

    /// Applies all that is in the journal, and `changes`, as one batch of sled's.
    fn fold(&self, journal: &mut Journal, changes: Changes) -> Result<(), StoreError> {
        let mut list: Vec<Change> = self.memtable().changes().collect();
        let is_used = journal.is_used();
        if is_used {
            list.push((IVec::from(JOURNALED_KEY), Some(IVec::from(&journal.number().to_be_bytes()))));
        }
        list.extend(changes.list);
        // Before, not after: when the batch fails half-way nothing must be taken for synced.
        self.unsynced.store(true, Ordering::Release);
        guarded(|| {
            super::faults::reach("store-applying");
            let db = self.db()?;
            let mut batch = sled::Batch::default();
            let mut inserted = Vec::with_capacity(list.len());
            for (key, value) in list {
                match value {
                    Some(value) => {
                        inserted.push((key.clone(), value.len()));
                        batch.insert(key, value);
                    }
                    None => batch.remove(key),
                }
            }
            db.apply_batch(batch)?;
            let mut turnover = Turnover::default();
            inserted.iter().try_for_each(|(key, bytes)| turnover.pass(db, key, *bytes))?;
            Ok(())
        })?;
        self.memtable.write().unwrap_or_else(PoisonError::into_inner).folded();
        if is_used {
            journal.fold();
        }
        Ok(())
    }

    /// Makes everything that was applied durable against power loss. Costs nothing when there is nothing to do.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.sync_sled()?;
        let mut journal = self.journal();
        if journal.is_unsynced() {
            self.before_sync()?;
            journal.sync()?;
        }
        Ok(())
    }

    /// Whether so much is in the journal that it is better carried over now than when somebody waits.
    pub fn is_journal_half_full(&self) -> bool {
        self.journal().is_half_full() || self.memtable().len() > NOTED_MAX / 2
    }

    /// Carries all that is in the journal over into sled, durably.
    pub fn carry_over(&self) -> Result<(), StoreError> {
        self.sync_sled()?;
        let mut journal = self.journal();
        if journal.is_used() {
            self.fold(&mut journal, Changes::default())?;
        }
        drop(journal);
        self.sync()
    }

    fn sync_sled(&self) -> Result<(), StoreError> {
        if !self.unsynced.load(Ordering::Acquire) {
            return Ok(());
        }
        super::faults::reach("sync-before-flush");
        guarded(|| self.db()?.flush().map_err(StoreError::from))?;
        super::faults::reach("sync-flushed");
        self.before_sync()?;
        self.file.sync_data()?;
        self.unsynced.store(false, Ordering::Release);
        Ok(self.journal().sled_synced()?)
    }

    #[cfg_attr(
        not(test),
        expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "tests put something in here")
    )]
    fn before_sync(&self) -> io::Result<()> {
        #[cfg(test)]
        if let Some(before_sync) = self.hooks().before_sync.clone() {
            before_sync()?;
        }
        Ok(())
    }

    pub fn is_unsynced(&self) -> bool {
        self.unsynced.load(Ordering::Acquire) || self.journal().is_unsynced()
    }

    pub fn get(&self, key: &[u8]) -> Result<Option<IVec>, StoreError> {
        let memtable = self.memtable();
        match memtable.get(key) {
            Some(value) => Ok(value),
            None => guarded(|| Ok(self.db()?.get(key)?)),
        }
    }

    /// Keys and values in `range`, in order. Each step sees what is there at that moment.
    pub fn range(&self, range: RangeInclusive<Vec<u8>>) -> Result<Range, StoreError> {
        let (start, end) = range.into_inner();
        let tree = sled::Tree::clone(self.db()?);
        let least = Bound::Included(IVec::from(start));
        Ok(Range {
            memtable: Arc::clone(&self.memtable),
            tree,
            iter: None,
            ahead: None,
            least,
            end: IVec::from(end),
            turnover: Turnover::default(),
        })
    }

    /// The last key in `range`.
    pub fn last_key(&self, range: RangeInclusive<Vec<u8>>) -> Result<Option<IVec>, StoreError> {
        let memtable = self.memtable();
        let noted = memtable.last_present((Bound::Included(range.start()), Bound::Included(range.end())));
        let in_sled = guarded(|| {
            for pair in self.db()?.range(range).rev() {
                let (key, _) = pair?;
                if memtable.get(&key).is_none_or(|value| value.is_some()) {
                    return Ok(Some(key));
                }
            }
            Ok(None)
        })?;
        Ok(noted.max(in_sled))
    }

    /// The whole record of which `head` is the first part, as far as its further chunks are there.
    ///
    /// A record whose header makes no sense is `head` alone: the codec will refuse it.
    pub fn record(&self, head: &[u8], further: impl Fn(u32) -> Vec<u8>) -> Result<Vec<u8>, StoreError> {
        let length = codec::record_bytes(head).unwrap_or(head.len());
        let mut record = Vec::with_capacity(length);
        record.extend_from_slice(head);
        let mut index = 1;
        while record.len() < length
            && let Some(chunk) = self.get(&further(index))?
        {
            record.extend_from_slice(&chunk);
            index += 1;
        }
        Ok(record)
    }

    /// Bytes of the database on disk.
    pub fn disk_bytes(&self) -> u64 {
        self.file.metadata().map(|metadata| metadata.len()).unwrap_or(0)
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder goes when the last one who reads from it has finished.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::Release);
    }

    /// What stands between store and disk; a generation hands it to the next.
    pub fn hooks(&self) -> MutexGuard<'_, Hooks> {
        self.hooks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn memtable(&self) -> RwLockReadGuard<'_, Memtable> {
        self.memtable.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn db(&self) -> Result<&sled::Db, StoreError> {
        self.db.as_ref().ok_or_else(|| StoreError::Io("store is closed".into()))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let db = self.db.take();
        // sled flushes when it is dropped, and panics when that fails. Whatever was acknowledged is already synced.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(db)));
        if self.retired.load(Ordering::Acquire) {
            // What stays is removed at the next opening.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// Iterator over a range of keys.
pub struct Range {
    memtable: Arc<RwLock<Memtable>>,
    tree: sled::Tree,
    /// sled's own, and how often sled had changed when it was made.
    iter: Option<(sled::Iter, u64)>,
    /// What `iter` gave and is not passed yet.
    ahead: Option<(IVec, IVec)>,
    /// The next key is not below it.
    least: Bound<IVec>,
    end: IVec,
    turnover: Turnover,
}

impl Iterator for Range {
    type Item = Result<(IVec, IVec), StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        let memtable = Arc::clone(&self.memtable);
        let memtable = memtable.read().unwrap_or_else(PoisonError::into_inner);
        loop {
            let least = self.least.as_ref().map(|key| &**key);
            match least {
                Bound::Included(least) if *least > *self.end => return None,
                Bound::Excluded(least) if *least >= *self.end => return None,
                _ => {}
            }
            let noted = memtable.first((least, Bound::Included(&self.end)));
            let in_sled = match guarded(|| self.look_ahead(memtable.folds())) {
                Ok(in_sled) => in_sled,
                Err(error) => return Some(Err(error)),
            };
            let (key, value) = match noted {
                Some(noted) if in_sled.as_ref().is_none_or(|in_sled| noted.0 <= *in_sled) => {
                    if in_sled.is_some_and(|in_sled| in_sled == noted.0) {
                        self.ahead = None;
                    }
                    noted
                }
                _ => {
                    let (key, value) = self.ahead.take()?;
                    // Pages that contradict one another can give the same keys again and again.
                    if !(self.least.clone(), Bound::Unbounded).contains(&key) {
                        return Some(Err(contradiction()));
                    }
                    (key, Some(value))
                }
            };
            self.least = Bound::Excluded(key.clone());
            if let Some(value) = value {
                return Some(Ok((key, value)));
            }
        }
    }
}

impl Range {
    /// The next key that sled has.
    fn look_ahead(&mut self, folds: u64) -> Result<Option<IVec>, StoreError> {
        if self.iter.as_ref().is_none_or(|&(_, then)| then != folds) {
            self.iter = Some((self.tree.range((self.least.clone(), Bound::Included(self.end.clone()))), folds));
            self.ahead = None;
        }
        if self.ahead.is_none()
            && let Some((iter, _)) = &mut self.iter
            && let Some((key, value)) = iter.next().transpose()?
        {
            self.turnover.pass(&self.tree, &key, value.len())?;
            self.ahead = Some((key, value));
        }
        Ok(self.ahead.as_ref().map(|(key, _)| key.clone()))
    }
}

/// Keeps sled's cache small while much is read or written.
///
/// sled looks whether its cache is full only after every 64 accesses to one of the 256 parts of it, however large the pages
/// are. Writing a page full takes some thirty, reading it through one: hundreds of pages would stay beyond the capacity.
/// So what was read or written is asked for again, as often as it is large.
#[derive(Default)]
struct Turnover {
    bytes: usize,
}

impl Turnover {
    /// Bytes to an access: 64 of these times 256 is what the cache may go beyond its capacity.
    const ACCESS_BYTES: usize = 1024;

    fn pass(&mut self, tree: &sled::Tree, key: &IVec, bytes: usize) -> Result<(), sled::Error> {
        self.bytes += key.len() + bytes;
        while self.bytes >= Self::ACCESS_BYTES {
            self.bytes -= Self::ACCESS_BYTES;
            tree.get(key)?;
        }
        Ok(())
    }
}

/// What sled gave is not what it gave before.
pub fn contradiction() -> StoreError {
    StoreError::Corrupt("its pages contradict one another".into())
}

/// How many chunks a record of `bytes` has; the first one included.
pub fn chunk_count(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(CHUNK_BYTES).max(1)).unwrap_or(u32::MAX)
}

pub fn counters_key() -> Vec<u8> {
    vec![b'm']
}

pub fn block_key(sequence: u64) -> Vec<u8> {
    sequence_key(b'e', sequence)
}

pub fn letter_key(sequence: u64) -> Vec<u8> {
    sequence_key(b'd', sequence)
}

pub fn content_key(sequence: u64) -> Vec<u8> {
    sequence_key(b'f', sequence)
}

pub fn chunk_key(sequence: u64, index: u32) -> Vec<u8> {
    let mut key = sequence_key(b'x', sequence);
    key.extend_from_slice(&index.to_be_bytes());
    key
}

pub fn cursor_key(path: &Path) -> Vec<u8> {
    let mut key = vec![b'c'];
    key.extend_from_slice(&path_hash(path));
    key
}

/// The key of a further chunk of the cursor at `cursor_key`.
pub fn cursor_chunk_key(cursor_key: &[u8], index: u32) -> Vec<u8> {
    let mut key = vec![b'k'];
    key.extend_from_slice(cursor_key.get(1..).unwrap_or_default());
    key.extend_from_slice(&index.to_be_bytes());
    key
}

/// All keys of the kind `prefix` from sequence `first` to `last`, chunks included.
pub fn sequence_range(prefix: u8, first: u64, last: u64) -> RangeInclusive<Vec<u8>> {
    let mut end = sequence_key(prefix, last);
    end.extend_from_slice(&[u8::MAX; 4]);
    sequence_key(prefix, first)..=end
}

/// All keys there are.
pub fn all_keys() -> RangeInclusive<Vec<u8>> {
    vec![]..=vec![u8::MAX; 2]
}

/// All keys of the kind `prefix`.
pub fn prefix_range(prefix: u8) -> RangeInclusive<Vec<u8>> {
    vec![prefix]..=[&[prefix], [u8::MAX; 24].as_slice()].concat()
}

/// The sequence in a key of an event, a letter, a content or a chunk.
pub fn key_sequence(key: &[u8]) -> Option<Sequence> {
    let number = key.get(1..)?.first_chunk::<8>()?;
    Sequence::new(u64::from_be_bytes(*number))
}

fn sequence_key(prefix: u8, sequence: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(16);
    key.push(prefix);
    key.extend_from_slice(&sequence.to_be_bytes());
    key
}

fn path_hash(path: &Path) -> [u8; 16] {
    use std::os::unix::ffi::OsStrExt;
    xxh3_128(path.as_os_str().as_bytes()).to_be_bytes()
}

/// Makes the entries of `folder` durable.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    File::open(folder)?.sync_all()
}

fn open_sled(folder: &Path) -> Result<sled::Db, StoreError> {
    let deadline = Instant::now() + SLED_LOCK_WAIT;
    loop {
        let opened = guarded_for(opening_max(folder), || {
            sled::Config::new()
                .path(folder)
                .cache_capacity(CACHE_BYTES)
                .flush_every_ms(None)
                .use_compression(false)
                .open()
                .map_err(StoreError::from)
        });
        match opened {
            Err(StoreError::Io(cause)) if cause.contains("could not acquire lock") && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

/// Processor time that opening may use: far more than the second a gigabyte takes.
fn opening_max(folder: &Path) -> Duration {
    const LEAST: Duration = Duration::from_secs(60);
    const EACH_GIGABYTE: u64 = 60;
    let bytes = fs::metadata(folder.join("db")).map_or(0, |metadata| metadata.len());
    LEAST + Duration::from_secs((bytes >> 30) * EACH_GIGABYTE)
}

/// Runs `work` and takes a panic of sled for damage, and so its not coming back.
fn guarded<T>(work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    guarded_for(guard::CALL_MAX, work)
}

fn guarded_for<T>(max: Duration, work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    catch_unwind(AssertUnwindSafe(|| guard::limited(max, work))).unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(StoreError::Corrupt(format!("sled panicked: {message}")))
    })
}

pub(super) fn snapshots(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b"snap.") {
            files.push(entry.path());
        }
    }
    Ok(files)
}

/// Renames the snapshots so that sled does not see them; `false` when there are none.
fn set_snapshots_aside(folder: &Path) -> io::Result<bool> {
    let files = snapshots(folder)?;
    for file in &files {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        fs::rename(file, folder.join(format!("aside.{name}")))?;
    }
    Ok(!files.is_empty())
}
