//! Looking at a queue that nobody holds, on a copy: nothing in its folder changes, whatever state it is in.
//!
//! sled can't only read. Opening may cut the log, remove and rename snapshots; closing writes one. So what is there is
//! copied into a folder of its own (0700) in the folder for temporary files (`TMPDIR`, else `/tmp`), and that is opened:
//! the generation that CURRENT names and, where there can be sealed ones, those before it. It takes as much room as
//! they do, which is checked first; there, and not beside the queue, because the user can choose the place, and because a
//! full or read-only disk is a reason to look. The copy goes with its [`Copy`], at a signal with
//! [`remove_all`]; what kill -9 leaves goes at the next look, which finds its lock free.
//!
//! No watcher is kept out meanwhile. Who opens a queue locks the file `lock` and writes into it before changing anything
//! ([`LockStamp`]). So where it is held neither before nor after the copy and is the same both times, the copy is of one
//! state. Holding it for the time of the copy would keep a starting watcher out for as long as gigabytes take; and where
//! the file is missing it would have to be made.

use std::fs::{self, DirBuilder, File, Permissions, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use uuid::Uuid;
use walkdir::WalkDir;

use super::{QueueError, folder};
use crate::regular_file;

/// How the name of each copy begins.
const PREFIX: &str = "headspace-watcher-look-";

/// Names that are tried for a copy: one is lost only where somebody else takes it for a left-over at that moment.
const NAMES_MAX: usize = 8;

/// How often and in what intervals removing is tried: threads of sled's may still be writing.
const REMOVALS_MAX: u32 = 50;
const REMOVAL_INTERVAL: Duration = Duration::from_millis(10);

/// The copies of this process.
static COPIES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes the copies of this process, which is about to end without letting go of them.
pub fn remove_all() {
    let copies = std::mem::take(&mut *COPIES.lock().unwrap_or_else(PoisonError::into_inner));
    copies.iter().for_each(|copy| remove(copy));
}

/// How the file `lock` was at a moment in which nobody held it; `None` where there was none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LockStamp(Option<(u64, u64, [i64; 4])>);

impl LockStamp {
    /// # Errors
    /// [`QueueError::InUse`] where somebody holds it.
    pub fn of(path: &Path) -> Result<LockStamp, QueueError> {
        let failed = |error: io::Error| look_error(path, format!("could not read its lock: {error}"));
        let mut file = match regular_file::open(&path.join("lock")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(LockStamp(None)),
            opened => opened.map_err(failed)?,
        };
        match file.try_lock_shared() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // The holder may be just writing it: then it stays unnamed.
                let _ = (&mut file).take(64).read_to_string(&mut holder);
                return Err(QueueError::InUse { path: path.to_owned(), pid: holder.trim().parse().ok() });
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let metadata = file.metadata().map_err(failed)?;
        let times = [metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec()];
        Ok(LockStamp(Some((metadata.ino(), metadata.len(), times))))
    }
}

/// A copy of some generations of a queue, removed when it is dropped.
pub struct Copy {
    folder: PathBuf,
    /// Held for as long as it is in use.
    _lock: File,
}

impl Copy {
    /// Copies `generations` of the queue at `path`, which must not change meanwhile.
    ///
    /// # Errors
    /// [`QueueError::Look`] where there is no room, or something can't be read or written.
    pub fn of(path: &Path, generations: &[u64]) -> Result<Copy, QueueError> {
        let temporary = std::env::temp_dir();
        remove_left_overs(&temporary);
        let folders: Vec<PathBuf> = generations.iter().map(|number| folder::generation_folder(path, *number)).collect();
        let bytes = folders.iter().map(|folder| bytes_in(folder)).sum();
        let no_room = |error: io::Error| {
            let temporary = temporary.display();
            let way_out = "set TMPDIR to a folder with room, or start the watcher and ask it";
            look_error(path, format!("could not copy its {bytes} bytes to {temporary}: {error}; {way_out}"))
        };
        refuse_without_room(&temporary, bytes).map_err(no_room)?;
        let copy = Copy::begin(&temporary).map_err(no_room)?;
        for folder in folders {
            let to = copy.folder.join(folder.file_name().unwrap_or_default());
            copy_folder(&folder, &to).map_err(no_room)?;
        }
        Ok(copy)
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes the folder and locks it, so that nobody takes it for a left-over.
    fn begin(temporary: &Path) -> io::Result<Copy> {
        for _ in 0..NAMES_MAX {
            let folder = temporary.join(format!("{PREFIX}{}", Uuid::now_v7().simple()));
            COPIES.lock().unwrap_or_else(PoisonError::into_inner).push(folder.clone());
            DirBuilder::new().mode(0o700).create(&folder)?;
            let Ok(lock) = File::open(&folder) else { continue };
            let is_ours = lock.try_lock().is_ok() && folder.exists();
            let copy = Copy { folder, _lock: lock };
            if is_ours {
                return Ok(copy);
            }
        }
        Err(io::Error::other("each folder that was made is gone again"))
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        remove(&self.folder);
        COPIES.lock().unwrap_or_else(PoisonError::into_inner).retain(|copy| *copy != self.folder);
    }
}

/// Best effort: what stays is removed at the next look.
fn remove(copy: &Path) {
    for _ in 0..REMOVALS_MAX {
        match fs::remove_dir_all(copy) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => std::thread::sleep(REMOVAL_INTERVAL),
            _ => return,
        }
    }
}

/// Removes the copies of processes that were killed: their locks are free.
fn remove_left_overs(temporary: &Path) {
    let user = rustix::process::geteuid().as_raw();
    for entry in fs::read_dir(temporary).into_iter().flatten().flatten() {
        let is_copy = entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes())
            // Of the entry itself: links are not followed.
            && entry.metadata().is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == user);
        if !is_copy {
            continue;
        }
        // Held until it is removed: else its name could be somebody's new copy by then.
        let Ok(folder) = File::open(entry.path()) else { continue };
        if folder.try_lock().is_ok() {
            remove(&entry.path());
        }
    }
}

fn bytes_in(folder: &Path) -> u64 {
    let files = WalkDir::new(folder).into_iter().flatten();
    files
        .filter(|entry| entry.file_type().is_file())
        .filter_map(|file| file.metadata().ok())
        .map(|file| file.len())
        .sum()
}

fn refuse_without_room(temporary: &Path, bytes: u64) -> io::Result<()> {
    let found = rustix::fs::statvfs(temporary)?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if bytes < free {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::StorageFull, format!("{free} bytes are free")))
    }
}

/// Files and folders only: a queue has nothing else.
fn copy_folder(from: &Path, to: &Path) -> io::Result<()> {
    for entry in WalkDir::new(from) {
        let entry = entry?;
        let target = match entry.path().strip_prefix(from) {
            Ok(below) if !below.as_os_str().is_empty() => to.join(below),
            _ => to.to_owned(),
        };
        if entry.file_type().is_dir() {
            DirBuilder::new().mode(0o700).create(&target)?;
        } else if entry.file_type().is_file() {
            fs::copy(entry.path(), &target)?;
            // sled writes into it, whatever the original allows.
            fs::set_permissions(&target, Permissions::from_mode(0o600))?;
        }
    }
    Ok(())
}

pub fn look_error(path: &Path, cause: String) -> QueueError {
    QueueError::Look { path: path.to_owned(), cause }
}
