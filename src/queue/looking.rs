//! Looking at a queue that nobody holds, on a copy: nothing in its folder changes, whatever state it is in.
//!
//! sled can't only read. Opening may cut the log, remove and rename snapshots; closing writes one. So the current segment, some
//! 64 MB, is copied into a folder of its own (0700) in the folder for temporary files (`TMPDIR`, else `/tmp`), beside links to the
//! older ones, which are only read; and that is opened as the queue itself is. There, and not beside the queue, because the user
//! can choose the place, and because a full or read-only disk is a reason to look. The copy goes with its [`Copy`], at a
//! signal with [`remove_all`]; what kill -9 leaves goes at the next look, which finds its lock free.
//!
//! The queue is held while it is copied: a watcher that starts meanwhile waits so long. What one removes after that, because it was
//! delivered, can't be looked at any more.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use uuid::Uuid;
use walkdir::WalkDir;

use super::files::{Highest, Lock};
use super::opening;
use super::segment;
use super::values::QueueError;

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

/// A copy of a queue, removed when it is dropped.
pub struct Copy {
    folder: PathBuf,
    /// Held for as long as it is in use.
    _lock: File,
}

impl Copy {
    /// Copies the queue at `path`.
    ///
    /// # Errors
    /// [`QueueError::Look`] where there is no room, or something can't be read or written.
    pub fn of(path: &Path) -> Result<Copy, QueueError> {
        let missing = || QueueError::NotFound { path: path.to_owned() };
        let cant_read = |error: io::Error| look_error(path, format!("could not read it: {error}"));
        let lock = Lock::look(path).map_err(|error| match error {
            QueueError::Storage { cause, .. } => look_error(path, format!("could not read its lock: {cause}")),
            error => error,
        })?;
        let temporary = std::env::temp_dir();
        remove_left_overs(&temporary);
        let segments = match opening::segments(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing()),
            found => found.map_err(cant_read)?,
        };
        // One that is only being made may be behind the current one.
        let highest = Highest::read(path)?.segment;
        let current = segments.iter().rev().find(|number| **number <= highest).or(segments.first());
        let current = *current.ok_or_else(missing)?;
        let copied = |number: &u64| *number >= current;
        let folders = segments.iter().filter(|number| copied(number)).map(|number| segment::folder_of(path, *number));
        let bytes = folders.map(|folder| bytes_in(&folder)).sum();
        let no_room = |error: io::Error| cant_copy(path, &format!("{bytes} bytes: {error}"));
        refuse_without_room(&temporary, bytes).map_err(no_room)?;
        let copy = Copy::begin(&temporary).map_err(no_room)?;
        for entry in fs::read_dir(path).map_err(cant_read)?.flatten().filter(|entry| entry.path().is_file()) {
            copy_file(&entry.path(), &copy.folder.join(entry.file_name())).map_err(no_room)?;
        }
        for number in segments {
            let (from, to) = (segment::folder_of(path, number), segment::folder_of(&copy.folder, number));
            let from = std::path::absolute(from).map_err(cant_read)?;
            if copied(&number) { copy_folder(&from, &to) } else { symlink(&from, &to) }.map_err(no_room)?;
        }
        drop(lock);
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

/// Files and folders only: a segment has nothing else.
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
            copy_file(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// What is copied is written to, whatever the original allows.
fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    fs::copy(from, to)?;
    fs::set_permissions(to, Permissions::from_mode(0o600))
}

pub fn cant_copy(path: &Path, cause: &str) -> QueueError {
    let temporary = std::env::temp_dir();
    let way_out = "set TMPDIR to a folder with room, or start the watcher and ask it";
    look_error(path, format!("could not copy it to {}: {cause}; {way_out}", temporary.display()))
}

fn look_error(path: &Path, cause: String) -> QueueError {
    QueueError::Look { path: path.to_owned(), cause }
}
