//! Looking at a queue that nobody holds: nothing in its folder changes, whatever state it is in.
//!
//! sled can't only read: opening may cut its log, closing writes a snapshot. So the newest segment is read as older ones are,
//! without sled ([`Remains`]), and of a copy without a name in the folder for temporary files (`TMPDIR`, else `/tmp`): it goes with the
//! process, however that ends. There, because the user can choose the place, and because a full or read-only disk is a
//! reason to look.
//!
//! The queue is held while it is copied: a watcher that starts meanwhile waits so long. What one removes after that, because it was
//! delivered, can't be looked at any more.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;
use std::sync::Arc;

use super::codec::Marks;
use super::files::{Highest, Lock};
use super::log::{self, Log, Older, Source};
use super::opening;
use super::remains::Remains;
use super::values::QueueError;

/// What is there to be seen: the log as it is, and its marks.
pub fn look(path: &Path) -> Result<(Log, Marks), QueueError> {
    let look_error = |cause: String| QueueError::Look { path: path.to_owned(), cause };
    let damaged = |cause: String| QueueError::Damaged { path: path.to_owned(), cause };
    let lock = Lock::look(path).map_err(|error| match error {
        QueueError::Storage { cause, .. } => look_error(format!("could not read its lock: {cause}")),
        error => error,
    })?;
    let highest = Highest::read(path)?;
    let mut names = match path.try_exists() {
        Ok(false) => Vec::new(),
        _ => log::segments(path).map_err(|error| look_error(format!("could not read it: {error}")))?,
    };
    // One that is only being made may be behind the newest.
    names.retain(|name| name.first > 0);
    let Some(newest) = names.last().copied() else {
        let missing = QueueError::NotFound { path: path.to_owned() };
        return Err(if highest.sequence == 0 { missing } else { damaged("its segments are gone".into()) });
    };
    let copy = copy(&newest.folder(path).join("db")).map_err(|error| look_error(error.to_string()))?;
    drop(lock);
    let remains = Remains::of_log(newest, copy, highest).map_err(|error| error.of_queue(path))?;
    if let Some(cause) = opening::damage_of(&remains, highest) {
        return Err(damaged(cause));
    }
    let Some((marks, _)) = remains.marks().filter(|_| !newest.is_damaged && newest.number >= highest.segment) else {
        return Err(damaged("its newest segment can't be read".into()));
    };
    let older = Older::all(path, &names, newest).into_iter();
    let older = older.filter(|one| one.is_needed(marks.settled.sequence)).collect();
    Ok((Log::new(path, Source::Raw(Arc::new(remains)), older), marks))
}

/// A copy of a file, without a name; none where it is not there.
fn copy(from: &Path) -> io::Result<Option<File>> {
    let mut from = match File::open(from) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        from => from?,
    };
    let temporary = std::env::temp_dir();
    let copied = tempfile::tempfile_in(&temporary).and_then(|mut copy| {
        io::copy(&mut from.by_ref(), &mut copy)?;
        copy.rewind()?;
        Ok(copy)
    });
    copied.map(Some).map_err(|error| {
        let way_out = "set TMPDIR to a folder with room, or start the watcher and ask it";
        io::Error::other(format!("could not copy it to {}: {error}; {way_out}", temporary.display()))
    })
}
