//! The spool: records that wait in files of their own until the watcher takes them into the queue.
//!
//! A hook leaves one record and is gone, whether or not a watcher runs; `emit` leaves all of its events in one file. So nobody
//! but the watcher has to open the queue for writing.
//!
//! ```text
//!  Draft  .<uuid>.draft ── synced, renamed, folder synced ──► <UUIDv7>.jsonl ── SpoolReader ──► queue ── removed
//! ```
//!
//! # Promises
//!
//! 1. A file is complete or not there: it gets its name once its bytes are on disk. A writer that is killed leaves a draft,
//!    which nobody reads and which is removed ten minutes later.
//! 2. A file is removed only once all that is in it is durable in the queue. Killed in between, it is taken in again
//!    under the same event ids, and the receipts refuse the second copy.
//! 3. Files are taken in by their names, which is the order in which they were made.
//! 4. A damaged file gives the records before the damage and a dead letter; it stops nothing.
//! 5. A file that can't be read is tried again at each look, and health says so until then. One that can't be removed is
//!    not taken in again.
//! 6. A file that ends the program each time it is processed does not do so for good: `.attempt` names the file being
//!    processed, and at the third attempt the file is renamed to `<name>.failed` and reported as a dead letter.
//!
//! A file has one [`record`] a line, each ended by a newline. Files have mode 0600, the folder 0700.

use std::ffi::OsString;
use std::fs::{self, DirEntry, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::fs::{Mode, OFlags};
use thiserror::Error;
use uuid::Uuid;

use super::record;
use crate::event::{Event, Record};
use crate::private_folder::{self, Ensured};

/// A longer line is damage. More than the largest `max_event_bytes`, with room for what stands around a payload.
const LINE_BYTES_MAX: u64 = (256 << 20) + (1 << 20);

/// After this a draft that nobody holds is what a killed writer left.
const DRAFT_AGE_MAX: Duration = Duration::from_secs(10 * 60);

const EXTENSION: &str = "jsonl";

/// Why nothing was left in the spool.
#[derive(Debug, Error)]
pub(crate) enum SpoolError {
    #[error("could not write the events to the spool {folder}: {source}; free space or fix its permissions")]
    Io { folder: String, source: io::Error },
    #[error(
        "the spool {folder} is full: {bytes} bytes wait in it, at most {bytes_max} may (queue.max_pending_bytes); start the watcher"
    )]
    Full { folder: String, bytes: u64, bytes_max: u64 },
}

/// A handle on the folder; cheap to clone.
#[derive(Clone)]
pub(crate) struct Spool {
    folder: Arc<Path>,
    wakeup: Arc<Wakeup>,
    unread: Arc<Mutex<UnreadSpool>>,
}

/// What could not be read at the last look, and why.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct UnreadSpool {
    /// Files in it.
    pub files: usize,
    /// Path and cause: of the folder where that can't be read, else of the first of the files.
    pub error: Option<String>,
    pub is_folder_unread: bool,
}

#[derive(Default)]
struct Wakeup {
    is_notified: Mutex<bool>,
    notified: Condvar,
}

impl Spool {
    /// Touches nothing yet: the folder is made by the first writer.
    pub(crate) fn new(folder: &Path) -> Spool {
        Spool { folder: folder.into(), wakeup: Arc::default(), unread: Arc::default() }
    }

    /// What its reader could not read at the last look.
    pub(crate) fn unread(&self) -> UnreadSpool {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets what could not be read; returns what was set before.
    pub(crate) fn set_unread(&self, unread: UnreadSpool) -> UnreadSpool {
        std::mem::replace(&mut *self.unread.lock().unwrap_or_else(PoisonError::into_inner), unread)
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Leaves one record; durable on return.
    pub(crate) fn leave(&self, record: &Record) -> Result<(), SpoolError> {
        let mut draft = self.draft(None)?;
        draft.add(record)?;
        draft.publish()
    }

    /// Begins a file. `bytes_max`: what may wait in the spool in all, this file included.
    pub(crate) fn draft(&self, bytes_max: Option<u64>) -> Result<Draft, SpoolError> {
        let path = self.folder.join(format!(".{}.draft", Uuid::now_v7()));
        let file = self.create(&path).map_err(|source| self.io_error(source))?;
        Ok(Draft { spool: self.clone(), path, file: BufWriter::new(file), bytes: 0, bytes_max })
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        // Takes the rights of others away where it can. What it can't put right is refused by the watcher's start and by
        // `check`; a hook goes on.
        if let Ok(Ensured::Created) = private_folder::ensure(&self.folder)
            && let Some(parent) = self.folder.parent()
        {
            File::open(parent)?.sync_all()?;
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        // Held while it is written, so that nobody takes it for what a killed writer left.
        file.lock()?;
        Ok(file)
    }

    fn io_error(&self, source: impl Into<io::Error>) -> SpoolError {
        SpoolError::Io { folder: self.folder.display().to_string(), source: source.into() }
    }

    /// Wakes [`Spool::wait`].
    pub(crate) fn notify(&self) {
        *self.wakeup.is_notified.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.wakeup.notified.notify_all();
    }

    /// Waits until it is notified or `patience` has run out.
    pub(crate) fn wait(&self, patience: Duration) {
        let Wakeup { is_notified, notified } = &*self.wakeup;
        let guard = is_notified.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = notified.wait_timeout_while(guard, patience, |is_notified| !*is_notified);
        *waited.unwrap_or_else(PoisonError::into_inner).0 = false;
    }

    /// The regular files that wait, in the order in which they were made. None where there is no folder.
    pub(crate) fn waiting(&self) -> io::Result<Vec<PathBuf>> {
        let mut paths = self.entries()?;
        paths.retain(|path| path.extension().is_some_and(|extension| extension == EXTENSION));
        paths.sort();
        Ok(paths)
    }

    /// Bytes that wait.
    fn waiting_bytes(&self) -> u64 {
        let paths = self.waiting().unwrap_or_default();
        paths.iter().filter_map(|path| path.metadata().ok()).map(|metadata| metadata.len()).sum()
    }

    /// Removes old drafts whose writers are gone.
    pub(crate) fn remove_old_drafts(&self) -> io::Result<()> {
        for path in self.entries()? {
            let is_draft = path.extension().is_some_and(|extension| extension == "draft");
            let changed = path.metadata().and_then(|metadata| metadata.modified()).unwrap_or(SystemTime::now());
            let is_old = is_draft && changed.elapsed().is_ok_and(|age| age > DRAFT_AGE_MAX);
            // One that can't be opened or removed harms nothing.
            if is_old && open_own(&path).is_ok_and(|draft| draft.try_lock().is_ok()) {
                let _ = fs::remove_file(&path);
            }
        }
        Ok(())
    }

    /// The attempt that was noted last and not cleared.
    pub(crate) fn attempt(&self) -> Option<Attempt> {
        let mut text = String::new();
        // Larger than any note of ours.
        open_own(&self.attempt_path()).ok()?.take(4096).read_to_string(&mut text).ok()?;
        let (count, file) = text.trim_end().split_once(' ')?;
        Some(Attempt { file: file.into(), count: count.parse().ok()? })
    }

    /// Notes that a file is about to be processed. Not synced: losing it only means one attempt more. An error is no
    /// reason not to process the file.
    pub(crate) fn note_attempt(&self, attempt: &Attempt) {
        let text = format!("{} {}\n", attempt.count, attempt.file.to_string_lossy());
        self.clear_attempt();
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(self.attempt_path());
        let _ = file.and_then(|mut file| file.write_all(text.as_bytes()));
    }

    /// Notes that no file is being processed.
    pub(crate) fn clear_attempt(&self) {
        let _ = fs::remove_file(self.attempt_path());
    }

    /// What a file is called that is not to be read any more.
    pub(crate) fn failed_path(path: &Path) -> PathBuf {
        let mut name = path.as_os_str().to_owned();
        name.push(".failed");
        PathBuf::from(name)
    }

    /// Renames a file to that.
    pub(crate) fn set_failed(&self, path: &Path) -> io::Result<()> {
        fs::rename(path, Spool::failed_path(path))?;
        File::open(&self.folder)?.sync_all()
    }

    fn attempt_path(&self) -> PathBuf {
        self.folder.join(".attempt")
    }

    fn entries(&self) -> io::Result<Vec<PathBuf>> {
        match fs::read_dir(&self.folder) {
            Ok(entries) => entries.filter_map(|entry| regular_file(entry).transpose()).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

/// Opens a regular file that is ours. Anything else is an error; a FIFO does not block, a link is not followed.
fn open_own(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user"));
    }
    Ok(file)
}

/// The path of an entry that is a regular file. Nothing else is ours: a FIFO would block its reader for good, and a
/// symbolic link leads out of the folder.
fn regular_file(entry: io::Result<DirEntry>) -> io::Result<Option<PathBuf>> {
    let entry = entry?;
    match entry.file_type() {
        Ok(kind) => Ok(kind.is_file().then(|| entry.path())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A file that is being processed, and how often it has been, counting this time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Attempt {
    pub(crate) file: OsString,
    pub(crate) count: u32,
}

/// A file that is being written. Removed when dropped before it was published.
pub(crate) struct Draft {
    spool: Spool,
    /// Empty once it has its name.
    path: PathBuf,
    file: BufWriter<File>,
    bytes: u64,
    bytes_max: Option<u64>,
}

impl Draft {
    pub(crate) fn add(&mut self, record: &Record) -> Result<(), SpoolError> {
        let line = record::encode(record).map_err(|error| self.spool.io_error(error))?;
        self.write(line)
    }

    /// As [`Draft::add`], of an event that was checked already.
    pub(crate) fn add_event(&mut self, event: &Event) -> Result<(), SpoolError> {
        let line = record::encode_event(event).map_err(|error| self.spool.io_error(error))?;
        self.write(line)
    }

    fn write(&mut self, mut line: Vec<u8>) -> Result<(), SpoolError> {
        if line.len() as u64 > LINE_BYTES_MAX {
            return Err(self.spool.io_error(io::Error::new(io::ErrorKind::FileTooLarge, "the record is too large")));
        }
        line.push(b'\n');
        self.bytes += line.len() as u64;
        self.check_room(0)?;
        self.file.write_all(&line).map_err(|source| self.spool.io_error(source))
    }

    fn check_room(&self, waiting_bytes: u64) -> Result<(), SpoolError> {
        let bytes = self.bytes + waiting_bytes;
        match self.bytes_max {
            Some(bytes_max) if bytes > bytes_max => {
                Err(SpoolError::Full { folder: self.spool.folder.display().to_string(), bytes, bytes_max })
            }
            _ => Ok(()),
        }
    }

    /// Makes it durable and gives it its name. After an error no file has the name, so that the caller may send the records
    /// another way.
    pub(crate) fn publish(mut self) -> Result<(), SpoolError> {
        if self.bytes_max.is_some() {
            self.check_room(self.spool.waiting_bytes())?;
        }
        self.rename().map_err(|source| self.spool.io_error(source))
    }

    fn rename(&mut self) -> io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_data()?;
        // Opened before there is the name, so that only the disk can fail afterwards.
        let folder = File::open(&self.spool.folder)?;
        let path = self.spool.folder.join(format!("{}.{EXTENSION}", Uuid::now_v7()));
        rename_durably(&self.path, &path, || folder.sync_all())?;
        self.path = PathBuf::new();
        Ok(())
    }
}

/// Renames a file and makes that durable. Where it can't be made durable the new name is removed again: nobody may find
/// what the caller, told of the error, sends another way. Where that fails too, or the reader has taken the file already, it
/// counts as renamed.
fn rename_durably(from: &Path, to: &Path, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    fs::rename(from, to)?;
    let Err(error) = sync() else { return Ok(()) };
    match fs::remove_file(to) {
        Ok(()) => Err(error),
        Err(_) => Ok(()),
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() {
            // What can't be removed now is removed as an old draft.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Why a file gave no further record.
#[derive(Debug, Error)]
pub(crate) enum ReadError {
    #[error("damaged: {0}")]
    Damaged(&'static str),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The lines of one file, in order.
pub(crate) struct Lines(BufReader<File>);

impl Lines {
    /// Opens a file of ours.
    pub(crate) fn open(path: &Path) -> io::Result<Lines> {
        Ok(Lines(BufReader::new(open_own(path)?)))
    }

    /// Reads the next line into `line`, without its newline; false at the end.
    pub(crate) fn read(&mut self, line: &mut Vec<u8>) -> Result<bool, ReadError> {
        line.clear();
        self.0.by_ref().take(LINE_BYTES_MAX + 1).read_until(b'\n', line)?;
        match line.last() {
            None => Ok(false),
            Some(b'\n') => {
                line.pop();
                Ok(true)
            }
            Some(_) => Err(ReadError::Damaged("it ends within a record")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Candidate, EventId, ForeignKeys, Origin};
    use std::os::unix::fs::PermissionsExt;

    fn event(number: usize) -> Record {
        Record::Event(Candidate {
            id: EventId::derived(&number.to_le_bytes()),
            event_type: "hook_received".to_owned(),
            timestamp: "2026-01-02T03:04:05.678901234Z".parse().unwrap(),
            payload: serde_json::Map::from_iter([("number".to_owned(), number.into())]),
            refs: ForeignKeys::default(),
            origin: Origin::Cli,
        })
    }

    fn encoded(number: usize) -> Vec<u8> {
        record::encode(&event(number)).unwrap()
    }

    fn all(path: &Path) -> (Vec<Vec<u8>>, Result<(), String>) {
        let mut lines = Lines::open(path).unwrap();
        let mut found = Vec::new();
        loop {
            let mut line = Vec::new();
            match lines.read(&mut line) {
                Ok(true) => found.push(line),
                Ok(false) => return (found, Ok(())),
                Err(error) => return (found, Err(error.to_string())),
            }
        }
    }

    #[test]
    fn records_come_back_as_they_were_left_in_the_order_of_their_files() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::new(&folder.path().join("made/when/needed"));
        assert!(spool.waiting().unwrap().is_empty());
        spool.leave(&event(1)).unwrap();
        let mut draft = spool.draft(None).unwrap();
        draft.add(&event(2)).unwrap();
        draft.add(&event(3)).unwrap();
        assert_eq!(spool.waiting().unwrap().len(), 1, "a draft is not seen");
        draft.publish().unwrap();
        drop(spool.draft(None).unwrap());
        let waiting = spool.waiting().unwrap();
        let found: Vec<Vec<u8>> = waiting.iter().flat_map(|path| all(path).0).collect();
        assert_eq!(found, [encoded(1), encoded(2), encoded(3)]);
        assert_eq!(fs::read_dir(spool.folder()).unwrap().count(), 2, "a draft that is given up is removed");
        assert_eq!(spool.folder().metadata().unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(waiting[0].metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_does_not_fit_beside_what_waits_is_refused_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::new(folder.path());
        let bytes = encoded(1).len() as u64 + 1;
        let leave = |records: usize, bytes_max: u64| {
            let mut draft = spool.draft(Some(bytes_max))?;
            (0..records).try_for_each(|_| draft.add(&event(1)))?;
            draft.publish()
        };
        leave(2, 2 * bytes).unwrap();
        for (records, bytes_max) in [(1, 3 * bytes - 1), (3, 3 * bytes - 1)] {
            let refused = leave(records, bytes_max);
            assert!(matches!(refused, Err(SpoolError::Full { .. })), "{refused:?}");
            assert_eq!(fs::read_dir(spool.folder()).unwrap().count(), 1);
        }
        leave(1, 3 * bytes).unwrap();
    }

    #[test]
    fn a_name_that_can_not_be_made_durable_is_taken_back_before_the_error_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let [draft, named] = ["draft", "named"].map(|name| folder.path().join(name));
        fs::write(&draft, "").unwrap();
        let error = rename_durably(&draft, &named, || Err(io::Error::from_raw_os_error(5))).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        // One that its reader has taken already is no error: it must not come in a second time.
        fs::write(&draft, "").unwrap();
        let taken = || fs::remove_file(&named).and(Err(io::Error::from_raw_os_error(5)));
        rename_durably(&draft, &named, taken).unwrap();
    }

    #[test]
    fn an_old_draft_is_removed_only_when_nobody_writes_it_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::new(folder.path());
        let draft = spool.draft(None).unwrap();
        let path = draft.path.clone();
        let old = SystemTime::now() - DRAFT_AGE_MAX - Duration::from_secs(60);
        draft.file.get_ref().set_modified(old).unwrap();
        spool.remove_old_drafts().unwrap();
        assert!(path.exists(), "its writer is still there");
        let left = folder.path().join(".left.draft");
        fs::rename(&path, &left).unwrap();
        drop(draft);
        File::options().write(true).open(&left).unwrap().set_modified(old).unwrap();
        spool.remove_old_drafts().unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_is_cut_anywhere_gives_only_complete_records() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::new(folder.path());
        let mut draft = spool.draft(None).unwrap();
        draft.add(&event(1)).unwrap();
        draft.add(&event(2)).unwrap();
        draft.publish().unwrap();
        let path = spool.waiting().unwrap().remove(0);
        let bytes = fs::read(&path).unwrap();
        let complete = [encoded(1), encoded(2)];
        for cut in 0..bytes.len() {
            fs::write(&path, &bytes[..cut]).unwrap();
            let (found, outcome) = all(&path);
            assert!(complete.starts_with(&found), "{cut}: {found:?}");
            let is_between = cut == 0 || bytes[cut - 1] == b'\n';
            assert_eq!(outcome.is_ok(), is_between, "{cut}");
        }
    }
}
