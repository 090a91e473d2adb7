//! The files around the segments, and what everybody needs of the file system.
//!
//! ```text
//! <queue>/lock               held while open; process id of the holder
//! <queue>/HIGHEST            format of the folder, the last number that was acknowledged, and the segment it is in: written after
//!                            each sync, never synced itself
//! <queue>/OPENING            the segment that is being opened, and how often that was tried
//! <queue>/DAMAGED            the segment in which a running queue met damage
//! <queue>/REPAIRS            segments that were moved aside, and what is missing: until a dead letter says so
//! <queue>/UNSYNCED           a sync had failed: the newest segment is copied before anything is built on it
//! ```
//!
//! HIGHEST costs one small write and tells what nothing else can: that a log came back shorter than it was acknowledged to be (a
//! disk that lies about syncing, a restored copy, a file cut by a repair of the file system). sled takes such a log for a
//! whole one.

use std::fmt::Display;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::piece::NUMBER_MAX;
use super::values::{QueueError, Repair};
use crate::event::Timestamp;
use crate::private_folder::{self, Ensured, FolderError};
use crate::regular_file;

/// Layout of the folder and of what is in the segments.
const FORMAT: u64 = 1;

pub const DAMAGED: &str = "DAMAGED";
pub const UNSYNCED: &str = "UNSYNCED";
pub const OPENING: &str = "OPENING";
const REPAIRS: &str = "REPAIRS";
const HIGHEST: &str = "HIGHEST";

/// Holding it is holding the queue; the system lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock and writes down who holds it.
    pub fn take(path: &Path) -> Result<Lock, QueueError> {
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
    pub fn look(path: &Path) -> Result<Option<Lock>, QueueError> {
        let file = match regular_file::open(&path.join("lock")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(|error| storage(path, &error))?,
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

/// The file HIGHEST, open for writing.
pub struct Mark {
    file: File,
    pub written: Highest,
}

/// What stands in it.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Highest {
    pub sequence: u64,
    pub segment: u64,
}

impl Highest {
    /// What can't be read says nothing: it is a safeguard, not a record.
    ///
    /// # Errors
    /// [`QueueError::TooNew`] where a newer program has written it.
    pub fn read(path: &Path) -> Result<Highest, QueueError> {
        let [format, sequence, segment] = read_numbers(path, HIGHEST).unwrap_or_default();
        if format > FORMAT {
            return Err(QueueError::TooNew { path: path.to_owned(), found: format, supported: FORMAT });
        }
        Ok(Highest { sequence, segment })
    }
}

impl Mark {
    pub fn open(path: &Path) -> Result<Mark, QueueError> {
        let written = Highest::read(path)?;
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).mode(0o600).open(path.join(HIGHEST));
        let file = file.map_err(|error| storage(path, &error))?;
        Ok(Mark { file, written })
    }

    /// Notes what is durable.
    pub fn raise(&mut self, now: Highest) -> io::Result<()> {
        if now == self.written {
            return Ok(());
        }
        let text = format!("{FORMAT} {:020} {:010}\n", now.sequence, now.segment);
        self.file.write_all_at(text.as_bytes(), 0)?;
        self.written = now;
        Ok(())
    }
}

/// Asks the next opening to set a segment aside. Best effort: a disk that is failing may not take it, and without the mark the damage
/// is only met again.
pub fn mark_damaged(path: &Path, segment: u64) {
    let _ = write_mark(path, DAMAGED, segment, 1);
}

/// Notes something of a segment for the next opening.
pub fn write_mark(path: &Path, name: &str, segment: u64, times: u64) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path.join(name))?;
    writeln!(file, "{segment} {times}")?;
    file.sync_all()
}

/// How often it was noted of this segment; `None`: the mark names another one, or there is none.
pub fn read_mark(path: &Path, name: &str, segment: u64) -> Option<u64> {
    read_numbers(path, name).and_then(|[named, times]| (named == segment).then_some(times))
}

pub fn remove_mark(path: &Path, name: &str) -> io::Result<()> {
    match fs::remove_file(path.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn read_numbers<const N: usize>(path: &Path, name: &str) -> Option<[u64; N]> {
    let text = regular_file::read(&path.join(name), 128).ok()?;
    let text = String::from_utf8_lossy(&text);
    let numbers = text.split_whitespace().map_while(|number| number.parse().ok().filter(|number| *number < NUMBER_MAX));
    numbers.collect::<Vec<_>>().try_into().ok()
}

pub fn storage(path: &Path, error: &dyn Display) -> QueueError {
    QueueError::Storage { path: path.to_owned(), cause: error.to_string() }
}

/// Makes the folder where it is missing, and takes the rights of others from one that is there.
pub fn ensure_folder(path: &Path) -> Result<Ensured, QueueError> {
    private_folder::ensure(path).map_err(|error| match error {
        FolderError::Io { cause, .. } => storage(path, &cause),
        error => QueueError::Folder(error),
    })
}

/// Takes the rights of others from the files of `folder`. Best effort: the folder itself already keeps them out.
pub fn restrict(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_file()) {
            let _ = fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o600));
        }
    }
}

/// Makes the entries of `folder` durable.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    File::open(folder)?.sync_all()
}

pub fn remove_folder(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Folders in `folder` that are called `prefix` and a number, in the order of the numbers.
pub fn numbered(folder: &Path, prefix: &str) -> io::Result<Vec<u64>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.strip_prefix(prefix)?.parse::<u64>().ok());
        found.extend(number.filter(|number| *number < NUMBER_MAX && entry.path().is_dir()));
    }
    found.sort_unstable();
    Ok(found)
}

/// The name under which something in the queue's folder is moved away: it says when. It stays inside of it: that may be a mount point.
pub fn name_aside(path: &Path, what: &Path) -> PathBuf {
    let time = Timestamp::now().strftime("%Y%m%dT%H%M%S.%6fZ");
    path.join(format!("damaged-{time}-{}", what.file_name().unwrap_or_default().to_string_lossy()))
}

pub fn set_aside(path: &Path, what: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(what, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => fs::create_dir(to)?,
        renamed => renamed?,
    }
    sync_folder(path)
}

/// Notes that a segment is about to be moved aside.
pub fn note_repair(path: &Path, repair: &Repair) -> io::Result<()> {
    let Repair::SegmentSetAside { to, cause, found, missing } = repair else { return Ok(()) };
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    let mut options = OpenOptions::new();
    let mut file = options.append(true).create(true).mode(0o600).open(path.join(REPAIRS))?;
    writeln!(file, "{found} {missing} {name} {}", cause.replace('\n', " "))?;
    file.sync_all()
}

/// What was noted, where it did come to it.
pub fn noted_repairs(path: &Path) -> Vec<Repair> {
    let text = regular_file::read(&path.join(REPAIRS), 1 << 20).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let repairs = text.lines().filter_map(|line| {
        let mut fields = line.splitn(4, ' ');
        let (found, missing) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let to = path.join(fields.next()?);
        to.exists().then(|| Repair::SegmentSetAside {
            to,
            cause: fields.next().unwrap_or_default().into(),
            found,
            missing,
        })
    });
    repairs.collect()
}

pub fn forget_repairs(path: &Path) -> io::Result<()> {
    remove_mark(path, REPAIRS)
}
