//! The files of a queue's folder, and what everybody needs of the file system.
//!
//! ```text
//! <queue>/lock               held while open; process id of the holder
//! <queue>/HIGHEST            format of the folder, the last number that was acknowledged, the segment it is in, and the last batch:
//!                            written after each sync, synced itself only where a segment begins
//! <queue>/DAMAGED            segments that can't be trusted, and why, until a dead letter says what is missing
//! <queue>/segment-<n>/       a sled database, written by one process; n grows
//! <queue>/segment-<n>/FIRST  the first number that is in it, or comes into it; written last: without it, it is not finished
//! <queue>/damaged-<n>/       one that can't be trusted: read like any older one, and never removed
//! <queue>/damaged-<n>/KNOWN  its last number, and how many events were found in it when that was told
//! <queue>/damaged-<n>/DRAINED  all that was found in it has left: it is kept, and nothing more
//! ```
//!
//! The small files end with a checksum; what does not match it says nothing.
//!
//! HIGHEST costs one small write and tells what nothing else can: that a log came back shorter than it was acknowledged to be (a
//! disk that lies about syncing, a restored copy, a file cut by a repair of the file system). sled takes such a log for a
//! whole one.

use std::fmt::Display;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::codec::NUMBER_MAX;
use super::values::QueueError;
use crate::private_folder::{self, Ensured, FolderError};
use crate::regular_file;

/// Layout of the folder and of what is in the segments.
const FORMAT: u64 = 2;

const DAMAGED: &str = "DAMAGED";
const HIGHEST: &str = "HIGHEST";
const FIRST: &str = "FIRST";
const KNOWN: &str = "KNOWN";
const DRAINED: &str = "DRAINED";

/// A segment, by its folder.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Name {
    pub number: u64,
    /// The first number that is in it, or comes into it; 0: it is not known.
    pub first: u64,
    pub is_damaged: bool,
}

impl Name {
    pub(super) fn folder(&self, path: &Path) -> PathBuf {
        let kind = if self.is_damaged { "damaged" } else { "segment" };
        path.join(format!("{kind}-{}", self.number))
    }
}

/// The segments in the folder, oldest first.
pub(super) fn segments(path: &Path) -> io::Result<Vec<Name>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some((kind, number)) = name.to_str().and_then(|name| name.split_once('-')) else { continue };
        let number = number.parse().ok().filter(|number| *number < NUMBER_MAX);
        let folder = entry.path();
        let is_used = matches!(kind, "segment" | "damaged") && folder.is_dir() && !folder.join(DRAINED).exists();
        if let Some(number) = number.filter(|_| is_used) {
            let first = read_numbers(&folder, FIRST).map_or(0, |[first]| first);
            found.push(Name { number, first, is_damaged: kind == "damaged" });
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Notes with which number a segment begins; durable once its folder is synced.
pub(super) fn write_first(folder: &Path, first: u64) -> io::Result<()> {
    write_numbers(&folder.join(FIRST), &[first])
}

/// Notes of a damaged segment its last number, and how many events were found in it.
pub(super) fn write_known(folder: &Path, last: u64, found: u64) -> io::Result<()> {
    write_numbers(&folder.join(KNOWN), &[last, found])?;
    sync_folder(folder)
}

pub(super) fn known(folder: &Path) -> Option<(u64, u64)> {
    read_numbers(folder, KNOWN).map(|[last, found]| (last, found))
}

/// Renames the folder of a segment that can't be trusted.
pub(super) fn set_aside(path: &Path, name: &mut Name) -> io::Result<()> {
    let from = name.folder(path);
    name.is_damaged = true;
    fs::rename(from, name.folder(path))?;
    sync_folder(path)
}

/// Lets go of a segment in which nothing waits any more. One that is damaged is kept.
pub(super) fn let_go(path: &Path, name: &Name) -> io::Result<()> {
    match name.is_damaged {
        true => write_numbers(&name.folder(path).join(DRAINED), &[]),
        false => remove_folder(&name.folder(path)),
    }
}

/// Holding it is holding the queue; the system lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock and writes down who holds it.
    pub(super) fn take(path: &Path) -> Result<Lock, QueueError> {
        let io = |error: io::Error| storage(path, &error);
        let name = path.join("lock");
        loop {
            let mut options = OpenOptions::new();
            let options = options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let mut file = options.open(&name).map_err(io)?;
            check(path, &file, file.try_lock())?;
            // Somebody may have removed it, and made a new one, before it was locked.
            let ours = file.metadata().map_err(io)?;
            if fs::metadata(&name).is_ok_and(|now| (now.dev(), now.ino()) == (ours.dev(), ours.ino())) {
                file.set_len(0).map_err(io)?;
                writeln!(file, "{}", std::process::id()).map_err(io)?;
                return Ok(Lock { _file: file });
            }
        }
    }

    /// Keeps others from taking the lock, and changes nothing: where there is no file, nobody holds it.
    pub(super) fn look(path: &Path) -> Result<Option<Lock>, QueueError> {
        let look_error = |error| format!("could not read its lock: {error}");
        let file = match regular_file::open(&path.join("lock")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(|e| QueueError::Look { path: path.to_owned(), cause: look_error(e) })?,
        };
        check(path, &file, file.try_lock_shared())?;
        Ok(Some(Lock { _file: file }))
    }
}

/// Who holds it, where that is somebody else.
fn check(path: &Path, file: &File, locked: Result<(), TryLockError>) -> Result<(), QueueError> {
    match locked {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // The holder may be just writing it: then it stays unnamed.
            let _ = file.take(64).read_to_string(&mut holder);
            Err(QueueError::InUse { path: path.to_owned(), pid: holder.trim().parse().ok() })
        }
        Err(TryLockError::Error(error)) => Err(storage(path, &error)),
    }
}

/// What stands in the file HIGHEST.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Highest {
    pub sequence: u64,
    pub segment: u64,
    pub batch: u64,
}

impl Highest {
    /// What can't be read says nothing: it is a safeguard, not a record.
    ///
    /// # Errors
    /// [`QueueError::TooNew`] where a newer program has written it.
    pub(super) fn read(path: &Path) -> Result<Highest, QueueError> {
        match read_numbers(path, HIGHEST) {
            Some([found, _, _, _]) if found > FORMAT => {
                Err(QueueError::TooNew { path: path.to_owned(), found, supported: FORMAT })
            }
            Some([_, sequence, segment, batch]) => Ok(Highest { sequence, segment, batch }),
            None => Ok(Highest::default()),
        }
    }
}

/// The file HIGHEST, open for writing.
pub(super) struct Mark {
    file: File,
    pub written: Highest,
}

impl Mark {
    pub(super) fn open(path: &Path) -> Result<Mark, QueueError> {
        let written = Highest::read(path)?;
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).mode(0o600).open(path.join(HIGHEST));
        let file = file.map_err(|error| storage(path, &error))?;
        Ok(Mark { file, written })
    }

    /// Notes what is durable.
    pub(super) fn raise(&mut self, now: Highest) -> io::Result<()> {
        self.file.write_all_at(numbers_line(&[FORMAT, now.sequence, now.segment, now.batch]).as_bytes(), 0)?;
        let before = std::mem::replace(&mut self.written, now);
        if before.segment == now.segment { Ok(()) } else { self.file.sync_all() }
    }
}

/// Whether the folder was written by an earlier version of the program, in whose HIGHEST there was no checksum.
pub(super) fn is_old(path: &Path) -> bool {
    let text = regular_file::read(&path.join(HIGHEST), 128).unwrap_or_default();
    let is_format_1 = text.starts_with(b"1 ") && text.split(|byte| byte.is_ascii_whitespace()).count() == 4;
    path.join("CURRENT").exists() || path.join("sled-1").exists() || is_format_1
}

/// Notes that a segment can't be trusted, for the next opening.
pub(super) fn note_damaged(path: &Path, segment: u64, cause: &str) -> io::Result<()> {
    if damaged(path).iter().any(|(noted, _)| *noted == segment) {
        return Ok(());
    }
    let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(path.join(DAMAGED))?;
    writeln!(file, "{segment} {}", cause.replace('\n', " "))?;
    file.sync_all()
}

/// The segments that can't be trusted, and why.
pub(super) fn damaged(path: &Path) -> Vec<(u64, String)> {
    let text = regular_file::read(&path.join(DAMAGED), 1 << 20).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let noted = text.lines().filter_map(|line| line.split_once(' '));
    noted.filter_map(|(segment, cause)| Some((segment.parse().ok()?, cause.to_owned()))).collect()
}

/// Nobody need be told of them any more.
pub(super) fn forget_damaged(path: &Path) -> io::Result<()> {
    match fs::remove_file(path.join(DAMAGED)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Numbers of a fixed width, and their checksum.
pub(super) fn numbers_line(numbers: &[u64]) -> String {
    let numbers: String = numbers.iter().map(|number| format!("{number:020} ")).collect();
    format!("{numbers}{:08x}\n", crc32fast::hash(numbers.as_bytes()))
}

fn write_numbers(file: &Path, numbers: &[u64]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(file)?;
    file.write_all(numbers_line(numbers).as_bytes())?;
    file.sync_all()
}

fn read_numbers<const N: usize>(path: &Path, name: &str) -> Option<[u64; N]> {
    let text = String::from_utf8(regular_file::read(&path.join(name), 128).ok()?).ok()?;
    let numbers = text.split_whitespace().map_while(|number| number.parse().ok());
    let numbers: Vec<u64> = numbers.take(N).collect();
    let is_sound = text == numbers_line(&numbers) && numbers.iter().all(|number| *number < NUMBER_MAX);
    numbers.try_into().ok().filter(|_| is_sound)
}

pub(super) fn storage(path: &Path, error: &dyn Display) -> QueueError {
    QueueError::Storage { path: path.to_owned(), cause: error.to_string() }
}

/// Makes the folder where it is missing, and takes the rights of others from one that is there.
pub(super) fn ensure_folder(path: &Path) -> Result<Ensured, QueueError> {
    private_folder::ensure(path).map_err(|error| match error {
        FolderError::Io { cause, .. } => storage(path, &cause),
        error => QueueError::Folder(error),
    })
}

/// Makes the entries of `folder` durable.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    File::open(folder)?.sync_all()
}

pub(super) fn remove_folder(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
