//! Sealed generations: full, read from and never written again, and gone when all events in them are settled.
//!
//! sled keeps some 500 bytes in memory for each of its pages, 8 MB for a gigabyte that waits. So a generation that has grown
//! large is sealed, a fresh one takes what comes, and of the sealed ones only those are open that are being read: memory
//! does not grow with what waits, and the disk gets back what was delivered generation by generation.
//!
//! Of a sealed generation only the blocks of pending events count (`e`), and the further chunks (`x`) of those and of dead
//! letters. What changes about them stands in the current generation, in the same batches as the counters:
//!
//! ```text
//! g      the sealed generations, the oldest first: each the number, first and end of its sequences, three u64
//! w      all blocks of theirs with a smaller number are settled, as u64
//! e S    what is left of a block of theirs, from w on; empty: nothing
//! ```
//!
//! A chunk that belongs to nothing any more stays where it is and is never asked for: numbers are not used twice.

use std::collections::VecDeque;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use sled::IVec;

use super::codec::NUMBER_MAX;
use super::database::{Database, StoreError, Turnover, guarded};
use super::store;

/// Where the current generation keeps the list of the sealed ones.
pub const LIST_KEY: &[u8] = b"g";

/// Where the current generation keeps up to where the blocks of sealed ones are settled.
pub const SETTLED_KEY: &[u8] = b"w";

/// Pages that sled keeps in memory of each that is open.
const CACHE_BYTES: u64 = 2 << 20;

/// How many stay open when nobody reads them just now: the one that is drained, and one that somebody looks at.
const OPEN_MAX: usize = 2;

const ENTRY_BYTES: usize = 24;

/// One sealed generation. A retired one takes its folder away when the last reader has let go.
pub struct Generation {
    number: u64,
    /// The sequences whose blocks and chunks are in it.
    sequences: Range<u64>,
    folder: PathBuf,
    /// Size of its files.
    bytes: u64,
    /// While somebody has it open.
    database: Mutex<Weak<Database>>,
    retired: AtomicBool,
}

impl Generation {
    fn new(number: u64, sequences: Range<u64>, folder: PathBuf, database: Weak<Database>) -> Self {
        let bytes = fs::metadata(folder.join("db")).map_or(0, |metadata| metadata.len());
        Generation { number, sequences, folder, bytes, database: Mutex::new(database), retired: AtomicBool::new(false) }
    }

    pub fn number(&self) -> u64 {
        self.number
    }

    pub fn sequences(&self) -> Range<u64> {
        self.sequences.clone()
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn database(&self) -> Result<Arc<Database>, StoreError> {
        let mut open = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(database) = open.upgrade() {
            return Ok(database);
        }
        // sled would make a new one.
        if !self.folder.join("db").is_file() {
            return Err(StoreError::Corrupt(format!("{} is not there", self.folder.display())));
        }
        let (database, repairs) = Database::open(&self.folder, CACHE_BYTES)?;
        for repair in repairs {
            tracing::warn!(folder = %self.folder.display(), ?repair, "put a sealed generation of the queue right");
        }
        let database = Arc::new(database);
        *open = Arc::downgrade(&database);
        Ok(database)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.retired.load(Ordering::Acquire) {
            return;
        }
        match self.database.get_mut().unwrap_or_else(PoisonError::into_inner).upgrade() {
            Some(database) => database.retire(),
            // What stays is removed at the next opening.
            None => drop(fs::remove_dir_all(&self.folder)),
        }
    }
}

/// All sealed generations of a queue, and what is settled of them.
#[derive(Default)]
pub struct Sealed {
    /// The oldest first; the sequences of each begin where those of the one before end.
    list: RwLock<Vec<Arc<Generation>>>,
    settled: AtomicU64,
    /// Kept open, the one that was read last at the end.
    open: Mutex<VecDeque<Arc<Database>>>,
}

impl Sealed {
    /// Those that stand in the records at [`LIST_KEY`] and [`SETTLED_KEY`], beside the generation in `folder`.
    pub fn read(folder: &Path, list: Option<&[u8]>, settled: Option<&[u8]>) -> Result<Sealed, StoreError> {
        let broken = || StoreError::Corrupt("its list of sealed generations is not readable".into());
        let beside = folder.parent().unwrap_or_else(|| Path::new(""));
        let mut generations: Vec<Arc<Generation>> = Vec::new();
        let (entries, rest) = list.unwrap_or_default().as_chunks::<ENTRY_BYTES>();
        for entry in entries {
            let (numbers, _) = entry.as_chunks::<8>();
            let &[number, first, end] = numbers else { return Err(broken()) };
            let [number, first, end] = [number, first, end].map(u64::from_be_bytes);
            if first >= end
                || number.max(end) > NUMBER_MAX
                || generations.last().is_some_and(|before| before.sequences.end != first)
            {
                return Err(broken());
            }
            let folder = super::folder::generation_folder(beside, number);
            generations.push(Arc::new(Generation::new(number, first..end, folder, Weak::new())));
        }
        let settled = match settled {
            None => 0,
            Some(settled) => u64::from_be_bytes(settled.try_into().map_err(|_| broken())?),
        };
        if !rest.is_empty() || settled > NUMBER_MAX {
            return Err(broken());
        }
        Ok(Sealed { list: RwLock::new(generations), settled: AtomicU64::new(settled), open: Mutex::default() })
    }

    /// These and, as the newest, the generation `number` that has `database` up to the sequence `end`, which is above all of these.
    pub fn with(&self, number: u64, end: u64, database: &Arc<Database>) -> Sealed {
        let mut list = self.list();
        let first = list.last().map_or(1, |newest| newest.sequences.end);
        let folder = database.folder().to_owned();
        list.push(Arc::new(Generation::new(number, first..end, folder, Arc::downgrade(database))));
        // Who reads one opens it again: else one that nobody reads would stay open.
        Sealed { list: RwLock::new(list), settled: AtomicU64::new(self.settled()), open: Mutex::default() }
    }

    /// The record for [`LIST_KEY`].
    pub fn encode_list<'a>(list: impl IntoIterator<Item = &'a Arc<Generation>>) -> Vec<u8> {
        let numbers = list.into_iter().flat_map(|one| [one.number, one.sequences.start, one.sequences.end]);
        numbers.flat_map(u64::to_be_bytes).collect()
    }

    pub fn list(&self) -> Vec<Arc<Generation>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn is_empty(&self) -> bool {
        self.list.read().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Blocks and chunks of this sequence and of those after it are in the current generation.
    pub fn end(&self) -> u64 {
        self.list.read().unwrap_or_else(PoisonError::into_inner).last().map_or(0, |newest| newest.sequences.end)
    }

    /// All blocks with a smaller number are settled.
    pub fn settled(&self) -> u64 {
        self.settled.load(Ordering::Acquire)
    }

    /// Whether `key` is that of a block that is settled for this reason.
    pub fn is_settled(&self, key: &[u8]) -> bool {
        key.starts_with(b"e") && store::key_sequence(key).is_some_and(|number| number.get() < self.settled())
    }

    pub fn settle(&self, upto: u64) {
        self.settled.store(upto, Ordering::Release);
    }

    /// Size of the files.
    pub fn bytes(&self) -> u64 {
        self.list.read().unwrap_or_else(PoisonError::into_inner).iter().map(|generation| generation.bytes).sum()
    }

    /// The generation in which the block or chunk at `key` would be.
    pub fn of(&self, key: &[u8]) -> Option<Arc<Generation>> {
        if !matches!(key.first(), Some(b'e' | b'x')) {
            return None;
        }
        let sequence = store::key_sequence(key)?.get();
        let list = self.list.read().unwrap_or_else(PoisonError::into_inner);
        let at = list.partition_point(|generation| generation.sequences.end <= sequence);
        list.get(at).filter(|generation| generation.sequences.contains(&sequence)).cloned()
    }

    /// The database of a generation, which stays open for whoever reads on.
    fn database(&self, generation: &Generation) -> Result<Arc<Database>, StoreError> {
        let database = generation.database()?;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.back().is_none_or(|last| !Arc::ptr_eq(last, &database)) {
            open.retain(|other| !Arc::ptr_eq(other, &database));
            open.push_back(Arc::clone(&database));
        }
        let closed = if open.len() > OPEN_MAX { open.pop_front() } else { None };
        drop(open);
        // Takes a moment, when nobody else reads it.
        drop(closed);
        Ok(database)
    }

    pub fn get(&self, generation: &Generation, key: &[u8]) -> Result<Option<IVec>, StoreError> {
        let database = self.database(generation)?;
        guarded(|| Ok(database.db()?.get(key)?))
    }

    /// The number of the first block at `from` or after, settled or not.
    pub fn first_block(&self, from: u64) -> Result<Option<u64>, StoreError> {
        for generation in self.list() {
            let sequences = generation.sequences();
            if from >= sequences.end {
                continue;
            }
            let database = self.database(&generation)?;
            let blocks = store::sequence_range(b'e', from.max(sequences.start), sequences.end - 1);
            let first = guarded(|| Ok(database.db()?.range(blocks).next().transpose()?))?;
            if let Some(number) = first.and_then(|(key, _)| store::key_sequence(&key)) {
                return Ok(Some(number.get()));
            }
        }
        Ok(None)
    }

    /// The key of the last block in `range` for which `is_there` holds.
    pub fn last_block(
        &self,
        range: Range<u64>,
        is_there: impl Fn(&[u8]) -> Result<bool, StoreError>,
    ) -> Result<Option<IVec>, StoreError> {
        for generation in self.list().into_iter().rev() {
            let sequences = generation.sequences();
            let first = range.start.max(sequences.start).max(self.settled());
            let last = range.end.min(sequences.end) - 1;
            if first > last {
                continue;
            }
            let database = self.database(&generation)?;
            let mut keys = database.db()?.range(store::sequence_range(b'e', first, last));
            while let Some((key, _)) = guarded(|| Ok(keys.next_back().transpose()?))? {
                if is_there(&key)? {
                    return Ok(Some(key));
                }
            }
        }
        Ok(None)
    }

    /// The blocks of `generation` in a range that is not empty, settled or not, in their order.
    pub fn blocks(&self, generation: &Generation, range: Range<u64>) -> Result<Blocks, StoreError> {
        let database = self.database(generation)?;
        let keys = database.db()?.range(store::sequence_range(b'e', range.start, range.end - 1));
        Ok(Blocks { keys, database, turnover: Turnover::reading() })
    }

    /// Reads every key and value of all of them.
    pub fn read_all(&self) -> Result<(), StoreError> {
        for generation in self.list() {
            let database = self.database(&generation)?;
            let mut turnover = Turnover::reading();
            let mut pairs = database.db()?.iter();
            while let Some((key, value)) = guarded(|| Ok(pairs.next().transpose()?))? {
                guarded(|| turnover.pass(&database, &key, value.len()))?;
            }
        }
        Ok(())
    }

    /// Those of which all blocks are settled.
    pub fn spent(&self) -> Vec<Arc<Generation>> {
        let settled = self.settled();
        let mut list = self.list();
        list.retain(|generation| generation.sequences.end <= settled);
        list
    }

    /// Lets go of `generations` for good.
    pub fn remove(&self, generations: &[Arc<Generation>]) {
        generations.iter().for_each(|generation| generation.retired.store(true, Ordering::Release));
        let is_gone = |one: &Arc<Generation>| generations.iter().any(|generation| Arc::ptr_eq(generation, one));
        self.list.write().unwrap_or_else(PoisonError::into_inner).retain(|generation| !is_gone(generation));
        let has_gone = |folder: &Path| generations.iter().any(|generation| generation.folder == folder);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let (closed, rest) = open.drain(..).partition(|database| has_gone(database.folder()));
        *open = rest;
        drop(open);
        drop::<VecDeque<Arc<Database>>>(closed);
    }
}

/// Blocks of a sealed generation, one after another.
pub struct Blocks {
    keys: sled::Iter,
    /// Goes after `keys`: with it sled closes.
    database: Arc<Database>,
    turnover: Turnover,
}

impl Iterator for Blocks {
    type Item = Result<(IVec, IVec), StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (keys, database, turnover) = (&mut self.keys, &self.database, &mut self.turnover);
        guarded(|| {
            let pair = keys.next().transpose()?;
            if let Some((key, value)) = &pair {
                turnover.pass(database, key, value.len())?;
            }
            Ok(pair)
        })
        .transpose()
    }
}
