//! Transcripts that are being written are checked by `stat` several times a second.
//!
//! Notifications come late or not at all on macOS (FSEvents reports a file when its writer closes it), on network file
//! systems and in WSL's shared folders; there the rescan would find a new line only after up to `polling_interval`. A
//! transcript is active, and checked, for [`ACTIVE_FOR`] after its last change, and while a running process says that it
//! has the session open. New files are left to the rescan.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Follower;
use super::followed::{Access, Followed, Stamp};
use crate::event::Timestamp;

/// How long after its last change a transcript is checked.
const ACTIVE_FOR: Duration = Duration::from_secs(600);

/// Time between two checks of the active transcripts, for each [`FILES_PER_INTERVAL`] of them.
pub(crate) const CHECK_INTERVAL: Duration = Duration::from_millis(200);

/// How long one check may hold up what is notified.
const CHECK_TIME_MAX: Duration = Duration::from_millis(50);

/// With more active transcripts the interval grows, so that checks never take more than a thousandth of a processor.
const FILES_PER_INTERVAL: u32 = 100;

/// The transcripts that are checked.
#[derive(Default)]
pub(crate) struct Active {
    /// Until when.
    until: BTreeMap<Arc<Path>, Instant>,
    /// `None`: nothing was checked yet.
    next_check: Option<Instant>,
    /// Where a check goes on that was not finished.
    checked_to: Option<Arc<Path>>,
}

impl Active {
    /// When the next check is due; `None`: nothing is active.
    pub(crate) fn next_check(&self) -> Option<Instant> {
        (!self.until.is_empty()).then(|| self.next_check.unwrap_or_else(Instant::now))
    }

    fn is_due(&self, now: Instant) -> bool {
        !self.until.is_empty() && self.next_check.is_none_or(|at| at <= now)
    }

    fn insert(&mut self, path: &Arc<Path>, until: Instant) {
        self.until.entry(Arc::clone(path)).and_modify(|known| *known = until.max(*known)).or_insert(until);
    }

    /// Notes that a look at this file found it to be as `stamp` says, and not as before.
    pub(crate) fn note_change(&mut self, file: &Followed, stamp: &Stamp) {
        let now = Instant::now();
        let until = if file.seen.is_some() {
            Some(now + ACTIVE_FOR)
        } else {
            // Not looked at before: its age by its own clock, which on a network file system may differ from ours.
            let age = Timestamp::now().as_second().abs_diff(stamp.modified);
            ACTIVE_FOR.checked_sub(Duration::from_secs(age)).filter(|left| !left.is_zero()).map(|left| now + left)
        };
        if let Some(until) = until {
            self.insert(&file.path, until);
        }
    }
}

impl Follower {
    /// Keeps those active whose session a process has open. What is remembered of others is dropped where it can be.
    pub(super) fn note_open_sessions(&mut self) {
        let until = Instant::now() + ACTIVE_FOR;
        for file in self.files.values_mut() {
            if file.session().is_some_and(|session| self.ends.is_open(session)) {
                self.active.insert(&file.path, until);
            } else if file.beginning.as_ref().is_some_and(|beginning| beginning.memory.is_disposable())
                && !self.active.until.contains_key(&file.path)
            {
                file.beginning = None;
            }
        }
    }

    /// Checks the active transcripts if that is due. Returns those that have changed.
    pub(super) fn check_active(&mut self) -> Vec<Arc<Path>> {
        let begun = Instant::now();
        let mut changed = Vec::new();
        if !self.active.is_due(begun) {
            return changed;
        }
        self.active.until.retain(|path, until| *until > begun && self.files.contains_key(path));
        let first = self.active.checked_to.take().map_or(Bound::Unbounded, Bound::Excluded);
        for path in self.active.until.range::<Arc<Path>, _>((first, Bound::Unbounded)).map(|(path, _)| path) {
            if self.doorbell.is_stopped() {
                break;
            }
            self.intake.metrics().live.reading.beat();
            if let Some(file) = self.files.get(path)
                && has_changed(file)
            {
                changed.push(Arc::clone(path));
            }
            // On a slow file system the others come next time: what is notified is not to wait for them.
            if begun.elapsed() > CHECK_TIME_MAX {
                self.active.checked_to = Some(Arc::clone(path));
                break;
            }
        }
        let interval = check_interval(self.active.until.len(), self.config.polling_interval);
        let interval = if self.active.checked_to.is_some() { CHECK_INTERVAL } else { interval };
        self.active.next_check = Some(Instant::now() + interval);
        changed
    }
}

/// Whether the file is not as it was when it was read to its end.
fn has_changed(file: &Followed) -> bool {
    let metadata = || std::fs::metadata(&file.path).ok().filter(|metadata| metadata.is_file());
    match file.seen {
        Some(seen) => metadata().is_some_and(|metadata| Stamp::of(&metadata) != seen),
        // It was not there; any other that was not read to its end is looked at by the rescan.
        None => file.access == Access::Gone && metadata().is_some(),
    }
}

/// Time until the next check of so many files. Above `polling_interval` the rescan is as soon.
fn check_interval(files: usize, polling_interval: Duration) -> Duration {
    let intervals = u32::try_from(files).unwrap_or(u32::MAX) / FILES_PER_INTERVAL;
    CHECK_INTERVAL.saturating_mul(1 + intervals).min(polling_interval.max(CHECK_INTERVAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_are_active_the_rarer_each_is_checked() {
        let interval = |files| check_interval(files, Duration::from_secs(2)).as_millis();
        assert_eq!([0, 10, 99, 100, 450, 900, usize::MAX].map(interval), [200, 200, 200, 400, 1000, 2000, 2000]);
        assert_eq!(check_interval(10, Duration::from_millis(50)), CHECK_INTERVAL);
    }
}
