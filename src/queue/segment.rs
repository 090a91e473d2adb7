//! One segment: a sled database that is only ever added to, but for what the newest one says of all.
//!
//! sled 0.34.7 does not do by itself, all measured:
//!
//! * Its `flush` does not sync on Linux: the log is synced here, through a descriptor of our own. So are, once, the files that it
//!   creates. A batch is whole after a power cut only if everything before it is on disk: one batch, one sync, and before it
//!   pages are split, by asking for each changed key.
//! * Killed while it opens it leaves a snapshot that is not finished, with which it never opens again. Snapshots are a
//!   cache of the log: unfinished ones are removed, and where it does not open with the others it opens without.
//! * On some damage it panics. A panic is damage, and nothing is printed of it ([`guard`]).

use std::fs::{self, File};
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sled::IVec;
use thiserror::Error;

use super::files::{self, Highest, sync_folder};
use super::piece::Piece;
use super::values::QueueError;
use super::{faults, guard};

/// How the folders of segments are called, before their number.
pub const PREFIX: &str = "segment-";

/// Bytes of a segment's pages that sled keeps in memory.
const CACHE_BYTES: u64 = 1 << 20;

/// How long opening waits for sled's own lock: only threads of a handle that was just dropped can hold it.
const SLED_LOCK_WAIT: Duration = Duration::from_secs(5);

/// Why a segment could not do what was asked.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The system refused: full disk, missing permission, failing device.
    #[error("{0}")]
    Io(String),
    /// What is on disk is not what was written.
    #[error("{cause}")]
    Damaged { segment: u64, cause: String },
}

impl StoreError {
    /// In the words of the queue at `path`.
    pub fn of_queue(&self, path: &Path) -> QueueError {
        let (path, cause) = (path.to_owned(), self.to_string());
        match self {
            StoreError::Io(_) => QueueError::Storage { path, cause },
            StoreError::Damaged { .. } => QueueError::Damaged { path, cause },
        }
    }
}

impl From<io::Error> for StoreError {
    fn from(error: io::Error) -> Self {
        StoreError::Io(error.to_string())
    }
}

/// Keys to be written together; `None` removes one.
#[derive(Default)]
pub struct Changes {
    list: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    bytes: usize,
}

impl Changes {
    pub fn of(pairs: impl IntoIterator<Item = (Vec<u8>, Vec<u8>)>) -> Changes {
        let mut changes = Changes::default();
        pairs.into_iter().for_each(|(key, value)| changes.insert(key, value));
        changes
    }

    pub fn insert(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.bytes += key.len() + value.len();
        self.list.push((key, Some(value)));
    }

    pub fn remove(&mut self, key: Vec<u8>) {
        self.bytes += key.len();
        self.list.push((key, None));
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Those of these kinds, which are written a second time.
    pub fn of_kinds(&self, kinds: &[u8]) -> Changes {
        let mut some = Changes::default();
        for (key, value) in self.list.iter().filter(|(key, _)| key.first().is_some_and(|kind| kinds.contains(kind))) {
            match value {
                Some(value) => some.insert(key.clone(), value.clone()),
                None => some.remove(key.clone()),
            }
        }
        some
    }
}

/// What tests put between a segment and the disk: called before each sync; an error is that of the sync.
#[cfg(test)]
pub type BeforeSync = std::sync::Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

pub struct Segment {
    pub number: u64,
    folder: PathBuf,
    /// `None` only while it is being dropped.
    db: Option<sled::Db>,
    /// sled's log.
    log: File,
    /// Whether something was applied since the last sync.
    unsynced: AtomicBool,
    #[cfg(test)]
    pub before_sync: std::sync::Mutex<Option<BeforeSync>>,
}

impl Segment {
    /// Opens the segment in `folder`, or makes one where there is none.
    pub fn open(folder: &Path, number: u64) -> Result<Segment, StoreError> {
        for file in snapshots(folder)? {
            if file.extension().is_some_and(|end| end == "generating") {
                fs::remove_file(file)?;
            }
        }
        let db = match open_sled(folder, number) {
            Err(StoreError::Damaged { cause, .. }) if set_snapshots_aside(folder)? => {
                tracing::warn!(
                    segment = number,
                    error = cause,
                    "set snapshots of the queue aside, reading the whole log"
                );
                open_sled(folder, number)?
            }
            opened => opened?,
        };
        let log = File::open(folder.join("db"))?;
        Ok(Segment {
            number,
            folder: folder.to_owned(),
            db: Some(db),
            log,
            // What an earlier process wrote may be in the system's memory only.
            unsynced: AtomicBool::new(true),
            #[cfg(test)]
            before_sync: std::sync::Mutex::default(),
        })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Length of its log.
    pub fn bytes(&self) -> u64 {
        self.log.metadata().map_or(0, |metadata| metadata.len())
    }

    /// What is noted of it when all up to `sequence` is durable.
    pub fn highest(&self, sequence: u64) -> Highest {
        Highest { sequence, segment: self.number }
    }

    pub fn damaged(&self, cause: impl Into<String>) -> StoreError {
        StoreError::Damaged { segment: self.number, cause: cause.into() }
    }

    pub fn get(&self, key: &[u8]) -> Result<Option<IVec>, StoreError> {
        self.guarded(|db| db.get(key))
    }

    /// The piece under a key, whose number and index it must name.
    pub fn piece<T>(&self, key: &[u8], read: impl FnOnce(&Piece<'_>) -> Option<T>) -> Result<Option<T>, StoreError> {
        let Some(value) = self.get(key)? else { return Ok(None) };
        let piece = Piece::decode(&value).filter(|piece| key.first() == Some(&piece.kind));
        match piece.as_ref().and_then(read) {
            Some(found) => Ok(Some(found)),
            None => Err(self.damaged("one of its values is not what was written")),
        }
    }

    /// The first key in the range, or the last one, with its value.
    pub fn edge(&self, range: RangeInclusive<Vec<u8>>, is_last: bool) -> Result<Option<(IVec, IVec)>, StoreError> {
        self.guarded(|db| {
            let mut found = db.range(range);
            if is_last { found.next_back().transpose() } else { found.next().transpose() }
        })
    }

    /// Gives `visit` keys and values of the range, in order, until it has enough.
    pub fn each(
        &self,
        range: RangeInclusive<Vec<u8>>,
        mut visit: impl FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        let mut before: Option<IVec> = None;
        let mut found = self.guarded(|db| Ok(db.range(range)))?;
        while let Some((key, value)) = self.guarded(|_| found.next().transpose())? {
            // Pages that contradict one another can give the same keys again and again.
            if before.as_ref().is_some_and(|before| *before >= key) {
                return Err(self.damaged("its pages contradict one another"));
            }
            if !visit(&key, &value) {
                break;
            }
            before = Some(key);
        }
        Ok(())
    }

    /// Makes changes visible, all at once; durable after the next [`Segment::sync`].
    pub fn apply(&self, changes: Changes) -> Result<(), StoreError> {
        if changes.is_empty() {
            return Ok(());
        }
        // Before, not after: when the batch fails half-way nothing must be taken for synced.
        self.unsynced.store(true, Ordering::Release);
        self.guarded(|db| {
            faults::reach("segment-applying");
            let mut batch = sled::Batch::default();
            let mut keys = Vec::with_capacity(changes.list.len());
            for (key, value) in changes.list {
                let key = IVec::from(key);
                keys.push(key.clone());
                match value {
                    Some(value) => batch.insert(key, value),
                    None => batch.remove(key),
                }
            }
            db.apply_batch(batch)?;
            keys.iter().try_for_each(|key| db.get(key).map(drop))
        })
        .inspect_err(|error| self.note_unsynced(error))
    }

    /// Makes all that was applied durable against power loss. Costs nothing when there is nothing to do.
    pub fn sync(&self) -> Result<(), StoreError> {
        if !self.is_unsynced() {
            return Ok(());
        }
        faults::reach("sync-before-flush");
        self.guarded(|db| db.flush()).inspect_err(|error| self.note_unsynced(error))?;
        faults::reach("sync-flushed");
        self.sync_log().map_err(StoreError::from).inspect_err(|error| self.note_unsynced(error))?;
        self.unsynced.store(false, Ordering::Release);
        Ok(())
    }

    /// Linux counts pages as written that it could not write: the next opening must not trust what it reads. Where there was no room,
    /// nothing was written.
    fn note_unsynced(&self, error: &StoreError) {
        if matches!(error, StoreError::Io(cause) if !cause.contains("space") && !cause.contains("uota")) {
            let queue = self.folder.parent().unwrap_or(&self.folder);
            let _ = files::write_mark(queue, files::UNSYNCED, self.number, 1);
        }
    }

    fn sync_log(&self) -> io::Result<()> {
        #[cfg(test)]
        if let Some(before_sync) = &*self.before_sync.lock().unwrap() {
            before_sync()?;
        }
        self.log.sync_data()
    }

    /// Bytes that sled had still to write.
    #[cfg(test)]
    pub fn write_out(&self) -> Result<usize, StoreError> {
        self.guarded(|db| db.flush())
    }

    pub fn is_unsynced(&self) -> bool {
        self.unsynced.load(Ordering::Acquire)
    }

    /// Makes the folder itself durable: what sled created in it, and its name.
    pub fn sync_folder(&self) -> Result<(), StoreError> {
        self.sync()?;
        File::open(self.folder.join("conf"))?.sync_all()?;
        self.log.sync_all()?;
        sync_folder(&self.folder)?;
        self.folder.parent().map_or(Ok(()), |parent| Ok(sync_folder(parent)?))
    }

    fn guarded<T>(&self, work: impl FnOnce(&sled::Db) -> Result<T, sled::Error>) -> Result<T, StoreError> {
        let db = self.db.as_ref().ok_or_else(|| StoreError::Io("the queue is closed".into()))?;
        guarded(self.number, guard::CALL_MAX, || work(db))
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let db = self.db.take();
        // sled flushes when it is dropped, and panics when that fails. Whatever was acknowledged is already synced.
        let _ = guard::caught(|| drop(db));
    }
}

/// Where a segment of the queue at `path` is.
pub fn folder_of(path: &Path, number: u64) -> PathBuf {
    path.join(format!("{PREFIX}{number}"))
}

fn open_sled(folder: &Path, number: u64) -> Result<sled::Db, StoreError> {
    /// Processor time that opening may use: far more than the second a gigabyte takes.
    const OPENING_MAX: Duration = Duration::from_secs(60);
    let deadline = Instant::now() + SLED_LOCK_WAIT;
    loop {
        let config =
            sled::Config::new().path(folder).cache_capacity(CACHE_BYTES).flush_every_ms(None).use_compression(false);
        match guarded(number, OPENING_MAX, || config.open()) {
            Err(StoreError::Io(cause)) if cause.contains("could not acquire lock") && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            opened => return opened,
        }
    }
}

/// Runs a call of sled. A panic is damage.
fn guarded<T>(segment: u64, max: Duration, work: impl FnOnce() -> Result<T, sled::Error>) -> Result<T, StoreError> {
    let damaged = |cause: String| StoreError::Damaged { segment, cause };
    match guard::caught(|| guard::limited(segment, max, work)) {
        Ok(answer) => answer.map_err(|error| of_sled(error, damaged)),
        Err(panic) => {
            let message = panic.downcast_ref::<String>().map(String::as_str);
            let message = message.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Err(damaged(format!("sled panicked: {message}")))
        }
    }
}

/// sled's snapshots in a folder: what it need not read of the log at opening.
pub fn snapshots(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let paths = entries.map(|entry| Ok(entry?.path()));
    let is_snapshot =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"snap."));
    paths.filter(|path: &io::Result<PathBuf>| path.as_ref().map_or(true, is_snapshot)).collect()
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

fn of_sled(error: sled::Error, damaged: impl Fn(String) -> StoreError) -> StoreError {
    use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    match error {
        // sled reads beyond the end of a cut file, or decodes what is not its own.
        sled::Error::Io(error) if matches!(error.kind(), UnexpectedEof | InvalidData | InvalidInput) => {
            damaged(error.to_string())
        }
        // sled hands on an error it met earlier as text of its own making; its kind still says it in words.
        sled::Error::Io(error) if error.raw_os_error().is_none() => {
            StoreError::Io(format!("{} ({error})", error.kind()))
        }
        sled::Error::Io(error) => StoreError::Io(error.to_string()),
        other => damaged(other.to_string()),
    }
}
