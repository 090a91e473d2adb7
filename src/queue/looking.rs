//! Looking at a queue that nobody holds: nothing in its folder changes, whatever state it is in.
//!
//! All segments are read without sled ([`Remains`]), where they are: no process ever writes to a segment of another. The queue is held
//! only until the newest one is open: a watcher that starts meanwhile waits so long, and may remove that segment or rename it
//! afterwards; an open file stays as it is. An older segment that was delivered and removed can't be looked at any more.

use std::path::Path;
use std::sync::Arc;

use super::codec::Marks;
use super::files::{Highest, Lock};
use super::log::{self, Log, Older, Source};
use super::opening;
use super::remains::Remains;
use super::values::QueueError;

/// What is there to be seen: the log as it is, and its marks.
pub(super) fn look(path: &Path) -> Result<(Log, Marks), QueueError> {
    let look_error = |cause: String| QueueError::Look { path: path.to_owned(), cause };
    let damaged = |cause: String| QueueError::Damaged { path: path.to_owned(), cause };
    let lock = Lock::look(path)?;
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
    let remains = Remains::of_newest(path, newest, highest).map_err(|error| look_error(error.to_string()))?;
    drop(lock);
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
