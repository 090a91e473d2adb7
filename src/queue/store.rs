//! The queue on disk: a sled database, the journal in front of it, the sealed generations before it, and what sled 0.34.7
//! does not do by itself.
//!
//! # What is added
//!
//! * **Syncing.** `sled::Db::flush` ends in `sync_file_range`, which promises nothing about a power cut. So the store
//!   holds a descriptor of its own on `db` and [`Store::sync`] calls `fdatasync` (macOS: `F_FULLFSYNC`) after the flush.
//! * **One batch, one sync.** When sled begins a new segment (every 512 KiB) it writes into its header up to where the
//!   log is "stable", and recovery trusts that without looking. Stable means `sync_file_range`. During an
//!   `apply_batch` the mark can't pass the batch's beginning, because the batch's manifest is held back until it is
//!   sealed (`PageCache::pin_log`, `StabilityIntervals`). So if everything *before* a batch is on the platter, a power cut
//!   leaves the batch whole or not at all. [`Store::apply`] therefore syncs what an earlier batch of sled's left unsynced,
//!   and has sled split and merge pages before that sync: by itself it does so when they are read next.
//! * **Small batches.** They become durable in the [`journal`], with one write, and visible in the [`memtable`]; all of it goes to
//!   sled with the next large batch, or in an idle moment, as a part of the same sled batch. `journal` says how that
//!   stays whole.
//! * **Chunks.** A leaf of sled holds up to 16 values, for moments some more, and a page above 131,052 bytes is moved
//!   to `blobs/`, which is never synced. No value is longer than [`CHUNK_BYTES`], so no page comes near it.
//! * **Sealed generations.** Of blocks and their chunks, what is older is in databases of its own, which are only read:
//!   `sealed` says how they are settled.
//!
//! # Keys
//!
//! One tree; `database` has another, of small pages for sled's cache. `S` is a sequence as u64, `I` an index from 1 on as
//! u32, `H` the xxh3-128 of a path; all big endian, so that the order of the keys is the order of acceptance.
//!
//! ```text
//! m        counters                                    always written in the same batch as what they count
//! e S      block of pending events, the first of which was S: their records, or the first part of a long one
//! d S      letter: why and when S was set aside
//! f S      first part of what was set aside: the record of an event or an input, or unreadable bytes
//! x S I    further chunks of the record S, wherever its first part is
//! c H      first chunk of a cursor
//! k H I    further chunks of a cursor
//! j        number up to which sled has what was in the journal, as u64
//! g        sealed generations
//! w        up to where their blocks are settled
//! ```
//!
//! The counters are the commit: whatever stands at `next_sequence` or above was never acknowledged, is not shown,
//! and is removed at the next opening. So chunks may be written in earlier batches than the counters.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::ops::{Bound, RangeBounds, RangeInclusive};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use sled::IVec;
use xxhash_rust::xxh3::xxh3_128;

use super::database::{Database, DatabaseRepair, StoreError, Turnover, guarded};
use super::journal::{self, Journal, Replay};
use super::memtable::{Change, Memtable};
use super::sealed::{self, Blocks, Generation, Sealed};
use super::{codec, folder};
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

/// Bytes copied in one batch from one generation to the next.
const COPY_BYTES_MAX: usize = 256 << 10;

/// Bytes copied until sled is to give back what it keeps of them.
const TRIM_BYTES: usize = 1 << 20;

/// Where sled keeps the number up to which it has all that was in the journal, as u64 big endian.
const JOURNALED_KEY: &[u8] = b"j";

/// Pages that sled keeps in memory of the current generation. With four times as much nothing is faster.
const CACHE_BYTES: u64 = 1 << 20;

/// What opening a store had to put right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreRepair {
    Database(DatabaseRepair),
    /// Changes that had been acknowledged are missing from the journal.
    JournalDamaged {
        file: PathBuf,
        gaps: Vec<std::ops::Range<u64>>,
    },
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
        self.push((IVec::from(key), Some(IVec::from(value))));
    }

    pub fn remove(&mut self, key: &[u8]) {
        self.push((IVec::from(key), None));
    }

    fn push(&mut self, change: Change) {
        self.bytes += change.0.len() + change.1.as_ref().map_or(0, |value| value.len());
        self.list.push(change);
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

/// An open queue: the current generation, and what is still to be read of sealed ones. Reading is for everybody;
/// [`Store::apply`] and [`Store::sync`] are for the one writer.
pub struct Store {
    database: Arc<Database>,
    /// Our own descriptor of sled's `db`.
    file: File,
    /// Whether sled has changes that are not synced.
    unsynced: AtomicBool,
    journal: Mutex<Journal>,
    memtable: Arc<RwLock<Memtable>>,
    sealed: Arc<Sealed>,
    /// Remove all folders once the last reader has let go.
    retired: AtomicBool,
    hooks: Mutex<Hooks>,
}

/// What tests put between the store and the disk.
#[derive(Clone, Default)]
pub struct Hooks {
    /// Called before each sync; an error is that of the sync.
    #[cfg(test)]
    pub before_sync: Option<std::sync::Arc<dyn Fn() -> io::Result<()> + Send + Sync>>,
    /// Whether the generation is to be sealed whatever its size.
    #[cfg(test)]
    pub seal_next: bool,
}

impl Hooks {
    #[cfg_attr(not(test), expect(clippy::unused_self, reason = "tests put something in here"))]
    pub fn take_seal_next(&mut self) -> bool {
        #[cfg(test)]
        return std::mem::take(&mut self.seal_next);
        #[cfg(not(test))]
        false
    }
}

impl Store {
    /// Opens the generation in `folder`, or makes one where there is none.
    pub fn open(folder: &Path) -> Result<(Store, Vec<StoreRepair>), StoreError> {
        let (database, repairs) = Database::open(folder, CACHE_BYTES)?;
        let mut repairs: Vec<_> = repairs.into_iter().map(StoreRepair::Database).collect();
        let db = database.db()?;
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
        let mut store = Store {
            database: Arc::new(database),
            file: File::open(folder.join("db"))?,
            unsynced: AtomicBool::new(true),
            journal: Mutex::new(journal),
            memtable: Arc::new(RwLock::new(memtable)),
            sealed: Arc::default(),
            retired: AtomicBool::new(false),
            hooks: Mutex::default(),
        };
        let (list, settled) = (store.own(sealed::LIST_KEY)?, store.own(sealed::SETTLED_KEY)?);
        store.sealed = Arc::new(Sealed::read(folder, list.as_deref(), settled.as_deref())?);
        Ok((store, repairs))
    }

    /// Makes the folder's own entries durable: what sled created in it and its name in its parent.
    pub fn sync_folder(&self) -> Result<(), StoreError> {
        File::open(self.folder().join("conf"))?.sync_all()?;
        self.file.sync_all()?;
        folder::sync_folder(self.folder())?;
        if let Some(parent) = self.folder().parent() {
            folder::sync_folder(parent)?;
        }
        Ok(())
    }

    /// Makes `changes` visible at once and as a whole; durable after the next [`Store::sync`].
    pub fn apply(&self, changes: Changes) -> Result<(), StoreError> {
        if changes.is_empty() {
            return Ok(());
        }
        let changes = self.settle_sealed(changes)?;
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
            let db = self.database.db()?;
            changes.try_for_each(|change| memtable.note(change, |key| Ok(db.contains_key(key)?)))
        })
    }

    /// Turns what is to be settled of sealed generations into what the current one says about them.
    fn settle_sealed(&self, changes: Changes) -> Result<Changes, StoreError> {
        if self.sealed.is_empty() {
            return Ok(changes);
        }
        let mut own = Changes::default();
        let mut gone = BTreeSet::new();
        for (key, value) in changes.list {
            match self.sealed.of(&key).filter(|_| value.is_none()) {
                Some(_) if key.starts_with(b"e") => gone.extend(key_sequence(&key).map(Sequence::get)),
                // A chunk that belongs to nothing is never asked for; but it may have been carried over.
                Some(_) if self.own(&key)?.is_none() => {}
                _ => own.push((key, value)),
            }
        }
        if gone.is_empty() {
            return Ok(own);
        }
        let before = self.sealed.settled();
        let mut settled = before;
        loop {
            let next = self.sealed.first_block(settled)?;
            settled = next.unwrap_or(self.sealed.end());
            let Some(number) = next else { break };
            if !gone.contains(&number) && self.is_left(&block_key(number))? {
                break;
            }
            settled += 1;
        }
        if settled > before {
            own.insert(sealed::SETTLED_KEY, &settled.to_be_bytes());
            for pair in self.own_range(sequence_range(b'e', before, settled - 1))? {
                own.remove(&pair?.0);
            }
            self.sealed.settle(settled);
        }
        for number in gone.range(settled..) {
            own.insert(&block_key(*number), &[]);
        }
        Ok(own)
    }

    /// Takes over, as sealed, the generation `number` that `old` has been, up to the sequence `end`, and those that it has.
    pub fn adopt(&mut self, old: &Store, number: u64, end: u64) -> Result<(), StoreError> {
        let sealed = old.sealed.with(number, end, &old.database);
        let mut copying = Copying::begin(old, self)?;
        copying.insert(sealed::LIST_KEY, &Sealed::encode_list(&sealed.list()))?;
        copying.insert(sealed::SETTLED_KEY, &sealed.settled().to_be_bytes())?;
        for prefix in *b"ckdf" {
            copying.insert_all(old.own_range(prefix_range(prefix))?)?;
        }
        // What it says about sealed ones, and carried over from them.
        for prefix in *b"ex" {
            let last = old.sealed.end().saturating_sub(1);
            copying.insert_all(old.own_range(sequence_range(prefix, 0, last))?)?;
        }
        copying.finish()?;
        self.sealed = Arc::new(sealed);
        Ok(())
    }

    /// Lets go of the sealed generations in which everything is settled, once what dead letters have in them is in the
    /// current one.
    pub fn drop_spent(&self) -> Result<(), StoreError> {
        let spent = self.sealed.spent();
        if spent.is_empty() {
            return Ok(());
        }
        let mut copying = Copying::begin(self, self)?;
        for generation in &spent {
            let sequences = generation.sequences();
            for pair in self.own_range(sequence_range(b'f', sequences.start, sequences.end - 1))? {
                let (key, head) = pair?;
                let Some(sequence) = key_sequence(&key) else { continue };
                copying.insert_chunks(sequence.get(), &head)?;
            }
        }
        super::faults::reach("spent-carried");
        let list = self.sealed.list();
        let rest = list.get(spent.len()..).unwrap_or_default();
        copying.insert(sealed::LIST_KEY, &Sealed::encode_list(rest))?;
        copying.finish()?;
        self.sync()?;
        super::faults::reach("spent-synced");
        self.sealed.remove(&spent);
        super::faults::reach("spent-removed");
        Ok(())
    }

    /// Whether they are few, and take nothing out of sled: that is the way of much that is drained.
    fn is_for_journal(&self, journal: &mut Journal, changes: &Changes) -> Result<bool, StoreError> {
        let memtable = self.memtable();
        if changes.journal_bytes() > JOURNALED_BYTES_MAX || memtable.len() + changes.list.len() > NOTED_MAX {
            return Ok(false);
        }
        for (key, value) in &changes.list {
            if value.is_none() && !memtable.knows(key) && guarded(|| Ok(self.database.db()?.contains_key(key)?))? {
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
            let db = self.database.db()?;
            let mut batch = sled::Batch::default();
            let mut changed = Vec::with_capacity(list.len());
            for (key, value) in list {
                changed.push((key.clone(), value.as_ref().map_or(0, |value| value.len())));
                match value {
                    Some(value) => batch.insert(key, value),
                    None => batch.remove(key),
                }
            }
            db.apply_batch(batch)?;
            let mut turnover = Turnover::writing();
            // The pages above are settled by the keys that come after.
            for (key, bytes) in &changed {
                db.get(key)?;
                turnover.pass(&self.database, key, *bytes)?;
            }
            changed.last().map_or(Ok(()), |(key, _)| Ok(settle_pages(db, key)?))
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
        guarded(|| self.database.db()?.flush().map_err(StoreError::from))?;
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

    /// Bytes that sled had still to write.
    #[cfg(test)]
    pub fn write_out(&self) -> Result<usize, StoreError> {
        Ok(self.database.db()?.flush()?)
    }

    pub fn is_unsynced(&self) -> bool {
        self.unsynced.load(Ordering::Acquire) || self.journal().is_unsynced()
    }

    /// What stands in the current generation itself.
    fn own(&self, key: &[u8]) -> Result<Option<IVec>, StoreError> {
        look_up(&self.memtable, self.database.db()?, key)
    }

    /// Whether the current generation does not say that the block of a sealed one at `key` is settled.
    fn is_left(&self, key: &[u8]) -> Result<bool, StoreError> {
        Ok(self.own(key)?.is_none_or(|left| !left.is_empty()))
    }

    pub fn get(&self, key: &[u8]) -> Result<Option<IVec>, StoreError> {
        let generation = self.sealed.of(key);
        let own = self.own(key)?;
        match generation {
            Some(_) if own.as_ref().is_some_and(|left| left.is_empty()) => Ok(None),
            Some(generation) if own.is_none() && !self.sealed.is_settled(key) => self.sealed.get(&generation, key),
            _ => Ok(own),
        }
    }

    /// Keys and values in `range`, in order. Each step sees what is there at that moment.
    ///
    /// Of the sealed generations it has their blocks, where it is a range of blocks.
    pub fn range(&self, range: RangeInclusive<Vec<u8>>) -> Result<Range, StoreError> {
        let sealed = sealed_part(&range, self.sealed.end());
        let blocks = sealed.as_ref().map(|sealed| SealedBlocks {
            sealed: Arc::clone(&self.sealed),
            generations: self.sealed.list().into(),
            sequences: sealed.clone(),
            blocks: None,
        });
        let (start, end) = range.into_inner();
        let start = sealed.map_or(start, |sealed| block_key(sealed.end));
        Ok(Range { blocks, own: self.own_range(start..=end)? })
    }

    /// Of the current generation itself.
    fn own_range(&self, range: RangeInclusive<Vec<u8>>) -> Result<OwnRange, StoreError> {
        let (start, end) = range.into_inner();
        Ok(OwnRange {
            memtable: Arc::clone(&self.memtable),
            database: Arc::clone(&self.database),
            iter: None,
            ahead: None,
            least: Bound::Included(IVec::from(start)),
            end: IVec::from(end),
            turnover: Turnover::reading(),
        })
    }

    /// The last key in `range`.
    pub fn last_key(&self, range: RangeInclusive<Vec<u8>>) -> Result<Option<IVec>, StoreError> {
        let Some(sealed) = sealed_part(&range, self.sealed.end()) else { return self.own_last_key(range) };
        let own = block_key(sealed.end)..=range.into_inner().1;
        if own.start() <= own.end()
            && let Some(key) = self.own_last_key(own)?
        {
            return Ok(Some(key));
        }
        self.sealed.last_block(sealed, |key| self.is_left(key))
    }

    fn own_last_key(&self, range: RangeInclusive<Vec<u8>>) -> Result<Option<IVec>, StoreError> {
        let memtable = self.memtable();
        let noted = memtable.last_present((Bound::Included(range.start()), Bound::Included(range.end())));
        let in_sled = guarded(|| {
            for pair in self.database.db()?.range(range).rev() {
                let (key, _) = pair?;
                if memtable.get(&key).is_none_or(|value| value.is_some()) {
                    return Ok(Some(key));
                }
            }
            Ok(None)
        })?;
        Ok(noted.max(in_sled))
    }

    /// Gives back what is kept in memory of the current generation.
    pub fn trim_cache(&self) -> Result<(), StoreError> {
        self.database.trim_cache()
    }

    /// Reads every key and value there is.
    pub fn read_all(&self) -> Result<(), StoreError> {
        self.own_range(all_keys())?.try_for_each(|pair| pair.map(drop))?;
        self.sealed.read_all()
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

    /// Bytes of all generations on disk.
    pub fn disk_bytes(&self) -> u64 {
        self.own_bytes() + self.sealed.bytes()
    }

    /// Bytes of the current generation on disk.
    pub fn own_bytes(&self) -> u64 {
        self.file.metadata().map(|metadata| metadata.len()).unwrap_or(0)
    }

    pub fn folder(&self) -> &Path {
        self.database.folder()
    }

    /// The sequence from which on blocks and chunks are in the current generation.
    pub fn sealed_end(&self) -> u64 {
        self.sealed.end()
    }

    /// Whether it says which generations are sealed, be it that none is.
    pub fn knows_sealed(&self) -> Result<bool, StoreError> {
        Ok(self.own(sealed::LIST_KEY)?.is_some())
    }

    /// The sealed generations that are still needed, the oldest first.
    pub fn sealed(&self) -> Vec<Arc<Generation>> {
        self.sealed.list()
    }

    /// All folders go when the last one who reads from them has finished.
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
}

impl Drop for Store {
    fn drop(&mut self) {
        if self.retired.load(Ordering::Acquire) {
            self.database.retire();
            self.sealed.remove(&self.sealed.list());
        }
    }
}

/// Much that is put into a store: in batches, and without its pages in memory. While files are copied two databases are open,
/// and what that takes at most is what the process goes on taking, as the allocator keeps it.
pub struct Copying<'a> {
    from: &'a Store,
    to: &'a Store,
    changes: Changes,
    /// Bytes put in since memory was given back.
    untrimmed: usize,
}

impl<'a> Copying<'a> {
    pub fn begin(from: &'a Store, to: &'a Store) -> Result<Self, StoreError> {
        from.database.trim_cache()?;
        Ok(Copying { from, to, changes: Changes::default(), untrimmed: 0 })
    }

    pub fn insert(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.changes.insert(key, value);
        if self.changes.bytes() <= COPY_BYTES_MAX {
            return Ok(());
        }
        self.untrimmed += self.changes.bytes;
        self.to.apply(std::mem::take(&mut self.changes))?;
        if self.untrimmed > TRIM_BYTES { self.trim() } else { Ok(()) }
    }

    fn insert_all(&mut self, pairs: OwnRange) -> Result<(), StoreError> {
        pairs.into_iter().try_for_each(|pair| pair.and_then(|(key, value)| self.insert(&key, &value)))
    }

    /// Puts in the further chunks of the record `sequence` of which `head` is the first part.
    pub fn insert_chunks(&mut self, sequence: u64, head: &[u8]) -> Result<(), StoreError> {
        if codec::record_bytes(head) == Ok(head.len()) {
            return Ok(());
        }
        // As many as there are: the length in a damaged head says nothing.
        for index in 1.. {
            let key = chunk_key(sequence, index);
            let Some(chunk) = self.from.get(&key)? else { break };
            self.insert(&key, &chunk)?;
        }
        Ok(())
    }

    /// Puts in the rest.
    pub fn finish(mut self) -> Result<(), StoreError> {
        self.to.apply(std::mem::take(&mut self.changes))?;
        self.trim()
    }

    fn trim(&mut self) -> Result<(), StoreError> {
        self.untrimmed = 0;
        self.from.database.trim_cache()?;
        self.to.database.trim_cache()
    }
}

/// Makes sled split and merge what `key` calls for: its page, and those above it, one each time it is asked for. sled does so
/// when a page is asked for next, be it by a reader, and then it would not be on the platter before the next batch.
fn settle_pages(tree: &sled::Tree, key: &IVec) -> Result<(), sled::Error> {
    const LEVELS: usize = 3;
    (0..LEVELS).try_for_each(|_| tree.get(key).map(drop))
}

/// What stands at `key` in a memtable, or else in the database behind it.
fn look_up(memtable: &RwLock<Memtable>, tree: &sled::Tree, key: &[u8]) -> Result<Option<IVec>, StoreError> {
    let memtable = memtable.read().unwrap_or_else(PoisonError::into_inner);
    match memtable.get(key) {
        Some(value) => Ok(value),
        None => guarded(|| Ok(tree.get(key)?)),
    }
}

/// The part of a range of blocks that is in sealed generations, which end at `end`.
fn sealed_part(range: &RangeInclusive<Vec<u8>>, end: u64) -> Option<std::ops::Range<u64>> {
    let first = key_sequence(range.start()).map_or(0, Sequence::get);
    let last = key_sequence(range.end()).map_or(0, Sequence::get);
    (range.start().starts_with(b"e") && range.end().starts_with(b"e") && first < end)
        .then(|| first..end.min(last.saturating_add(1)))
}

/// Iterator over a range of keys.
pub struct Range {
    /// First what is in sealed generations.
    blocks: Option<SealedBlocks>,
    own: OwnRange,
}

/// The blocks of sealed generations in a range of sequences.
struct SealedBlocks {
    sealed: Arc<Sealed>,
    /// Still to come.
    generations: VecDeque<Arc<Generation>>,
    sequences: std::ops::Range<u64>,
    blocks: Option<Blocks>,
}

impl Iterator for Range {
    type Item = Result<(IVec, IVec), StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        while let Some(sealed) = &mut self.blocks {
            match sealed.next(&self.own) {
                Ok(Some(block)) => return Some(Ok(block)),
                Ok(None) => self.blocks = None,
                Err(error) => return Some(Err(error)),
            }
        }
        self.own.next()
    }
}

impl SealedBlocks {
    fn next(&mut self, own: &OwnRange) -> Result<Option<(IVec, IVec)>, StoreError> {
        loop {
            let Some(blocks) = &mut self.blocks else {
                let Some(generation) = self.generations.pop_front() else { return Ok(None) };
                let sequences = generation.sequences();
                let first = self.sequences.start.max(sequences.start).max(self.sealed.settled());
                let end = self.sequences.end.min(sequences.end);
                if first < end {
                    self.blocks = Some(self.sealed.blocks(&generation, first..end)?);
                }
                continue;
            };
            let Some((key, value)) = blocks.next().transpose()? else {
                self.blocks = None;
                continue;
            };
            match look_up(&own.memtable, own.database.db()?, &key)? {
                Some(left) if left.is_empty() => {}
                Some(left) => return Ok(Some((key, left))),
                // After the other: what is said of a block goes when it is settled.
                None if self.sealed.is_settled(&key) => {}
                None => return Ok(Some((key, value))),
            }
        }
    }
}

/// Iterator over a range of keys of the current generation itself.
struct OwnRange {
    memtable: Arc<RwLock<Memtable>>,
    /// sled's own, and how often sled had changed when it was made.
    iter: Option<(sled::Iter, u64)>,
    /// What `iter` gave and is not passed yet.
    ahead: Option<(IVec, IVec)>,
    /// The next key is not below it.
    least: Bound<IVec>,
    end: IVec,
    turnover: Turnover,
    /// Goes after `iter`: with it sled closes.
    database: Arc<Database>,
}

impl Iterator for OwnRange {
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

impl OwnRange {
    /// The next key that sled has.
    fn look_ahead(&mut self, folds: u64) -> Result<Option<IVec>, StoreError> {
        if self.iter.as_ref().is_none_or(|&(_, then)| then != folds) {
            let range = (self.least.clone(), Bound::Included(self.end.clone()));
            self.iter = Some((self.database.db()?.range(range), folds));
            self.ahead = None;
        }
        if self.ahead.is_none()
            && let Some((iter, _)) = &mut self.iter
            && let Some((key, value)) = iter.next().transpose()?
        {
            self.turnover.pass(&self.database, &key, value.len())?;
            self.ahead = Some((key, value));
        }
        Ok(self.ahead.as_ref().map(|(key, _)| key.clone()))
    }
}

/// What sled gave is not what it gave before.
pub fn contradiction() -> StoreError {
    StoreError::Corrupt("its pages contradict one another".into())
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

pub fn cursor_key(id: CursorId) -> Vec<u8> {
    let mut key = vec![b'c'];
    key.extend_from_slice(&id.0);
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

/// By what a cursor is found: a hash of the path of its file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct CursorId(pub(super) [u8; 16]);

impl CursorId {
    pub const MIN: CursorId = CursorId([u8::MIN; 16]);
    pub const MAX: CursorId = CursorId([u8::MAX; 16]);

    pub fn of(path: &Path) -> CursorId {
        use std::os::unix::ffi::OsStrExt;
        CursorId(xxh3_128(path.as_os_str().as_bytes()).to_be_bytes())
    }
}
