//! One sled database: opened with care, read without a panic, closed without a word, and gone with its folder where that was asked for.
//!
//! * **Opening.** See [`Database::open`].
//! * **Panics.** sled panics on some kinds of damage, and now and then does not come back: [`guarded`] takes both for damage.
//! * **Cache.** sled's is kept near the size that was asked for by [`Turnover`].

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::{Duration, Instant};

use sled::IVec;
use thiserror::Error;

use super::guard;

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

/// What opening a database had to put right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DatabaseRepair {
    /// A snapshot that was being written when the process died; with it there sled never opens again.
    SnapshotUnfinished { file: PathBuf },
    /// Snapshots with which sled did not open; without them it reads its whole log.
    SnapshotsSetAside { cause: String },
}

/// An open database. It closes when the last one who uses it lets go.
pub struct Database {
    /// `None` only while it is being dropped.
    db: Option<sled::Db>,
    folder: PathBuf,
    /// Remove the folder once the last one has let go.
    retired: AtomicBool,
    filler: Option<Filler>,
}

impl Database {
    /// Opens the sled database in `folder`, or makes one where there is none; keeps `cache_bytes` of its pages in memory.
    ///
    /// Snapshots are only a cache of the log, so unfinished ones are removed, and if sled does not open with the finished ones
    /// they are renamed and it opens without. sled panics on some kinds of damage: such a panic counts as [`StoreError::Corrupt`].
    pub fn open(folder: &Path, cache_bytes: u64) -> Result<(Database, Vec<DatabaseRepair>), StoreError> {
        let mut repairs = Vec::new();
        let snapshots = snapshots(folder)?;
        for file in snapshots.iter().filter(|file| file.extension().is_some_and(|end| end == "generating")) {
            fs::remove_file(file)?;
            repairs.push(DatabaseRepair::SnapshotUnfinished { file: file.clone() });
        }
        let db = match open_sled(folder, cache_bytes) {
            Err(StoreError::Corrupt(cause)) if set_snapshots_aside(folder)? => {
                repairs.push(DatabaseRepair::SnapshotsSetAside { cause });
                open_sled(folder, cache_bytes)?
            }
            other => other?,
        };
        let retired = AtomicBool::new(false);
        let mut database = Database { db: Some(db), folder: folder.to_owned(), retired, filler: None };
        database.filler = guarded(|| Filler::of(database.db()?))?;
        Ok((database, repairs))
    }

    pub fn db(&self) -> Result<&sled::Db, StoreError> {
        self.db.as_ref().ok_or_else(|| StoreError::Io("store is closed".into()))
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Leaves no more in sled's cache than was asked for when the database was opened. Takes some milliseconds.
    pub fn trim_cache(&self) -> Result<(), StoreError> {
        guarded(|| self.filler.as_ref().map_or(Ok(()), |filler| Ok(filler.ask_all()?)))
    }

    /// The folder goes when the last one who reads from it has finished.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::Release);
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        self.filler = None;
        let db = self.db.take();
        // sled flushes when it is dropped, and panics when that fails. Whatever was acknowledged is already synced.
        let _ = guard::caught(|| drop(db));
        if self.retired.load(Ordering::Acquire) {
            // What stays is removed at the next opening.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// Keeps sled's cache small while much is read or written.
///
/// sled looks whether its cache is full only after every 64 accesses to one of the 256 parts of it, and even then leaves the
/// page that was asked for last, however large: with pages of up to 64 kB some 16 MB in each database, whatever its
/// capacity. So as often as there is much, small pages are asked for, of which each part has some: they push the large
/// ones out.
pub struct Turnover {
    access_bytes: usize,
    bytes: usize,
}

impl Turnover {
    /// Bytes for which a small page is asked for once: 64 of these times 256 is what the cache may go beyond its capacity,
    /// 4 MB. A page is read with one access.
    const READING_BYTES: usize = 256;

    /// Writing a page full takes some thirty accesses by itself.
    const WRITING_BYTES: usize = 1024;

    pub fn reading() -> Self {
        Turnover { access_bytes: Self::READING_BYTES, bytes: 0 }
    }

    pub fn writing() -> Self {
        Turnover { access_bytes: Self::WRITING_BYTES, bytes: 0 }
    }

    /// Notes that `key` with a value of `bytes` was read or written.
    pub fn pass(&mut self, database: &Database, key: &IVec, bytes: usize) -> Result<(), StoreError> {
        self.bytes += key.len() + bytes;
        while self.bytes >= self.access_bytes {
            self.bytes -= self.access_bytes;
            match &database.filler {
                Some(filler) => filler.ask()?,
                None => drop(database.db()?.get(key)?),
            }
        }
        Ok(())
    }
}

/// Small pages in all parts of sled's cache, in a tree of their own.
struct Filler {
    tree: sled::Tree,
    next: AtomicU16,
}

impl Filler {
    const TREE: &str = "filler";

    /// Keys without values. With every eighth that is added in order sled begins a page; it numbers its pages as they come,
    /// and the part of the cache is the number modulo 256. Some are pages above those with keys.
    const KEYS: u16 = (256 + 64) * Self::KEYS_IN_PAGE;
    const KEYS_IN_PAGE: u16 = 8;

    /// sled looks at a part of its cache after so many accesses to it.
    const ACCESSES: u16 = 64;

    /// The filler of `db`. A new database gets one; one that an earlier build has made has none.
    fn of(db: &sled::Db) -> Result<Option<Filler>, StoreError> {
        let is_new = !db.was_recovered();
        if !is_new && !db.tree_names().iter().any(|name| *name == Self::TREE.as_bytes()) {
            return Ok(None);
        }
        let tree = db.open_tree(Self::TREE)?;
        if is_new {
            // One by one: of all that a batch changes sled keeps copies until its end.
            (0..Self::KEYS).try_for_each(|number| tree.insert(number.to_be_bytes(), &[]).map(drop))?;
        }
        Ok(Some(Filler { tree, next: AtomicU16::new(0) }))
    }

    /// Enough to make sled look at each part of its cache.
    fn ask_all(&self) -> Result<(), sled::Error> {
        (0..Self::ACCESSES * (Self::KEYS / Self::KEYS_IN_PAGE)).try_for_each(|_| self.ask())
    }

    fn ask(&self) -> Result<(), sled::Error> {
        let page = self.next.fetch_add(1, Ordering::Relaxed) % (Self::KEYS / Self::KEYS_IN_PAGE);
        self.tree.get((page * Self::KEYS_IN_PAGE).to_be_bytes()).map(drop)
    }
}

fn open_sled(folder: &Path, cache_bytes: u64) -> Result<sled::Db, StoreError> {
    let deadline = Instant::now() + SLED_LOCK_WAIT;
    loop {
        let opened = guarded_for(opening_max(folder), || {
            sled::Config::new()
                .path(folder)
                .cache_capacity(cache_bytes)
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
pub fn guarded<T>(work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    guarded_for(guard::CALL_MAX, work)
}

fn guarded_for<T>(max: Duration, work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    guard::caught(|| guard::limited(max, work)).unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(StoreError::Corrupt(format!("sled panicked: {message}")))
    })
}

pub fn snapshots(folder: &Path) -> io::Result<Vec<PathBuf>> {
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
pub fn set_snapshots_aside(folder: &Path) -> io::Result<bool> {
    let files = snapshots(folder)?;
    for file in &files {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        fs::rename(file, folder.join(format!("aside.{name}")))?;
    }
    Ok(!files.is_empty())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn large_pages_that_were_read_do_not_stay_in_the_cache() {
        const CACHE_BYTES: u64 = 2 << 20;
        const VALUE: [u8; 4096] = [7; 4096];
        const BATCHES: u64 = 1024;
        const BATCH_VALUES: u64 = 16;
        // Memory of its own that this process has, in kB.
        let own_memory = || {
            let status = fs::read_to_string("/proc/self/status").unwrap();
            let own = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
            own.split_whitespace().next().unwrap().parse::<u64>().unwrap()
        };
        let folder = tempfile::tempdir().unwrap();
        let [written, copied] = ["written", "copied"].map(|name| folder.path().join(name));
        let writer = Database::open(&written, CACHE_BYTES).unwrap().0;
        for number in 0..BATCHES {
            let mut batch = sled::Batch::default();
            let keys = (number * BATCH_VALUES..).take(BATCH_VALUES as usize).map(|key| IVec::from(&key.to_be_bytes()));
            let keys: Vec<IVec> = keys.collect();
            keys.iter().for_each(|key| batch.insert(key, VALUE.as_slice()));
            writer.db().unwrap().apply_batch(batch).unwrap();
            // What it would give back must not be taken for the reader's.
            let mut turnover = Turnover::writing();
            keys.iter().for_each(|key| turnover.pass(&writer, key, VALUE.len()).unwrap());
        }
        writer.db().unwrap().flush().unwrap();
        fs::create_dir(&copied).unwrap();
        for file in ["conf", "db"] {
            fs::copy(written.join(file), copied.join(file)).unwrap();
        }
        let reader = Database::open(&copied, CACHE_BYTES).unwrap().0;
        let before = own_memory();
        let mut turnover = Turnover::reading();
        for pair in reader.db().unwrap().iter() {
            let (key, value) = pair.unwrap();
            turnover.pass(&reader, &key, value.len()).unwrap();
        }
        let grown = own_memory().saturating_sub(before);
        // 2 MB; without the filler 7.
        assert!(grown < 4 << 10, "{grown} kB");
        drop(writer);
    }
}
