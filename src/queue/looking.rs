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
use super::reader::{self, Letters};
use super::remains::Remains;
use super::values::QueueError;

/// What is there to be seen: the log as it is, what was acknowledged of it, and the dead letters.
pub fn look(path: &Path) -> Result<(Log, Marks, Letters), QueueError> {
    let look_error = |cause: String| QueueError::Look { path: path.to_owned(), cause };
    let damaged = |cause: String| QueueError::Damaged { path: path.to_owned(), cause };
    let lock = Lock::look(path).map_err(|error| match error {
        QueueError::Storage { cause, .. } => look_error(format!("could not read its lock: {cause}")),
        error => error,
    })?;
    let highest = Highest::read(path)?;
    let names = match path.try_exists() {
        Ok(false) => Vec::new(),
        _ => log::segments(path).map_err(|error| look_error(format!("could not read it: {error}")))?,
    };
    let mut newest = None;
    for name in names.iter().rev() {
        let copy = copy(&name.folder(path).join("db")).map_err(|error| look_error(error.to_string()))?;
        let remains = Remains::of_log(*name, copy).map_err(|error| error.of_queue(path))?;
        // One that is only being made may be behind the newest.
        if remains.marks().is_some() || name.number <= highest.segment {
            newest = Some(remains);
            break;
        }
    }
    drop(lock);
    let Some(remains) = newest else { return Err(QueueError::NotFound { path: path.to_owned() }) };
    let Some(mut marks) = remains.marks().filter(|_| !remains.name.is_damaged) else {
        return Err(damaged("its newest segment can't be read".into()));
    };
    let first = remains.name.first.max(marks.settled.sequence + 1);
    let last = remains.whole_through(first);
    if last < highest.sequence {
        return Err(damaged(format!("what has the number {} is not there", last + 1)));
    }
    if last < marks.acknowledged.sequence {
        // The mark is of a batch that never was whole.
        marks.acknowledged = remains.totals_through(last).unwrap_or(marks.acknowledged);
    }
    let older = Older::all(path, &names, remains.name).into_iter();
    let older = older.filter(|one| one.is_needed(marks.settled.sequence)).collect();
    let newest = Source::Raw(Arc::new(remains));
    let letters = reader::count_letters(&newest, marks.acknowledged.sequence).map_err(|error| error.of_queue(path))?;
    Ok((Log::new(path, newest, older), marks, letters))
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
