//! Notifications: they wake the follower and say where to look first. It never relies on them.
//!
//! What rings is gathered in one place of bounded size; while the follower is busy more of it only means a rescan.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use notify::{RecursiveMode, Watcher};
use tracing::{debug, info, warn};

use super::identity;
use crate::event::FileIdentity;

/// Paths that are remembered between two looks. More of them: a rescan finds them all.
const PATHS_MAX: usize = 4096;

/// Wakes and stops the follower. Cheap to clone.
#[derive(Clone)]
pub struct Doorbell {
    bell: Arc<Bell>,
}

struct Bell {
    rung: Mutex<Rung>,
    rang: Condvar,
    stop: AtomicBool,
    idle: AtomicBool,
    unread: Mutex<Unread>,
}

/// What a whole pass over the files could not read.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Unread {
    /// Transcripts that are known of.
    pub files: usize,
    /// Folders, in each of which there may be any number of transcripts.
    pub folders: usize,
}

/// What rang since the last time somebody asked.
#[derive(Default, Debug)]
pub struct Rung {
    pub paths: BTreeSet<PathBuf>,
    /// Something may have changed anywhere.
    pub rescan: bool,
    /// The system's limit was reached when a new folder was to be watched.
    limit_reached: bool,
}

impl Rung {
    fn is_nothing(&self) -> bool {
        self.paths.is_empty() && !self.rescan
    }
}

impl Doorbell {
    pub(super) fn new() -> Doorbell {
        let bell = Bell {
            rung: Mutex::default(),
            rang: Condvar::new(),
            stop: AtomicBool::new(false),
            idle: AtomicBool::new(false),
            unread: Mutex::default(),
        };
        Doorbell { bell: Arc::new(bell) }
    }

    /// Ends the follower after the chunk it is at.
    pub fn stop(&self) {
        self.bell.stop.store(true, Ordering::Release);
        // With the lock: a follower that has just found nothing is asleep by now or sees it.
        drop(self.rung());
        self.bell.rang.notify_all();
    }

    /// Whether a whole pass over the files has found nothing more that can be read.
    pub fn is_idle(&self) -> bool {
        self.bell.idle.load(Ordering::Acquire)
    }

    /// What the last whole pass over the files could not read.
    pub fn unread(&self) -> Unread {
        *self.bell.unread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.bell.stop.load(Ordering::Acquire)
    }

    pub(super) fn set_idle(&self, idle: bool) {
        self.bell.idle.store(idle, Ordering::Release);
    }

    pub(super) fn set_unread(&self, unread: Unread) {
        *self.bell.unread.lock().unwrap_or_else(PoisonError::into_inner) = unread;
    }

    /// What rang, after waiting at most `patience` for it and then `debounce` for more; at once when stopped.
    pub(super) fn wait(&self, patience: Duration, debounce: Duration) -> Rung {
        let quiet = |rung: &mut Rung| rung.is_nothing() && !self.is_stopped();
        let (mut rung, _) =
            self.bell.rang.wait_timeout_while(self.rung(), patience, quiet).unwrap_or_else(PoisonError::into_inner);
        if !rung.is_nothing() && !debounce.is_zero() {
            (rung, _) = self
                .bell
                .rang
                .wait_timeout_while(rung, debounce, |_| !self.is_stopped())
                .unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::take(&mut rung)
    }

    fn ring(&self, event: notify::Result<notify::Event>) {
        let mut rung = self.rung();
        match event {
            Ok(event) if event.need_rescan() => rung.rescan = true,
            // Also our own reading.
            Ok(event) if matches!(event.kind, notify::EventKind::Access(_)) => return,
            Ok(event) => rung.paths.extend(event.paths),
            Err(error) => {
                rung.limit_reached |= matches!(error.kind, notify::ErrorKind::MaxFilesWatch);
                rung.rescan = true;
            }
        }
        if rung.paths.len() > PATHS_MAX {
            rung.paths.clear();
            rung.rescan = true;
        }
        drop(rung);
        self.bell.rang.notify_all();
    }

    fn rung(&self) -> MutexGuard<'_, Rung> {
        self.bell.rung.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The watch on the projects folder.
#[derive(Default)]
pub struct Watch {
    watcher: Option<notify::RecommendedWatcher>,
    /// Which folder is watched: it may be removed and made anew.
    watched: Option<FileIdentity>,
    /// Said already that there are no notifications, or not all.
    said: bool,
    /// When a watch that failed is tried again.
    again_at: Option<Instant>,
}

/// Pause before a watch that failed is tried again.
const AGAIN_AFTER: Duration = Duration::from_secs(300);

impl Watch {
    /// Sets the watch where it is missing: at the start, after the folder was replaced, and now and then where it failed.
    pub fn renew(&mut self, folder: &Path, doorbell: &Doorbell, polling_interval: Duration) {
        let identity = std::fs::metadata(folder).map(|metadata| identity(&metadata)).ok();
        let is_due = self.again_at.is_some_and(|at| at <= Instant::now());
        if identity == self.watched && !is_due {
            return;
        }
        self.watcher = None;
        self.watched = identity;
        self.again_at = None;
        if identity.is_none() {
            return;
        }
        let ringer = doorbell.clone();
        let watcher = notify::recommended_watcher(move |event| ringer.ring(event));
        let failure = match watcher {
            Ok(mut watcher) => {
                let failure = watcher.watch(folder, RecursiveMode::Recursive).err();
                // Also after a failure: some of its folders may be watched.
                self.watcher = Some(watcher);
                failure
            }
            Err(error) => Some(error),
        };
        match failure {
            Some(error) => {
                self.again_at = Some(Instant::now() + AGAIN_AFTER);
                self.say_once(folder, polling_interval, &error.to_string());
            }
            None if std::mem::take(&mut self.said) => {
                info!(folder = %folder.display(), "changed files are notified now");
            }
            None => {}
        }
    }

    /// Takes note of what rang about the watch itself.
    pub fn heed(&mut self, rung: &Rung, folder: &Path, polling_interval: Duration) {
        if rung.limit_reached {
            self.again_at.get_or_insert_with(|| Instant::now() + AGAIN_AFTER);
            self.say_once(folder, polling_interval, "the limit of watches is reached");
        }
    }

    fn say_once(&mut self, folder: &Path, polling_interval: Duration, error: &str) {
        if std::mem::replace(&mut self.said, true) {
            debug!(error, "still not all changed files are notified");
            return;
        }
        warn!(error, folder = %folder.display(), polling_interval_seconds = polling_interval.as_secs_f64(),
              "changed files are not all notified; new lines are found by rescanning. On Linux raise \
               fs.inotify.max_user_watches and fs.inotify.max_user_instances");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(path: &str) -> notify::Result<notify::Event> {
        Ok(notify::Event::new(notify::EventKind::Any).add_path(path.into()))
    }

    #[test]
    fn what_rings_while_nobody_looks_is_bounded_and_forgets_nothing() {
        let doorbell = Doorbell::new();
        for number in 0..=PATHS_MAX {
            doorbell.ring(changed(&format!("/{number}")));
        }
        let rung = doorbell.wait(Duration::ZERO, Duration::ZERO);
        assert!(rung.rescan && rung.paths.is_empty());
        assert!(doorbell.wait(Duration::ZERO, Duration::ZERO).is_nothing());
    }

    #[test]
    fn an_overflow_of_the_system_means_a_rescan() {
        let doorbell = Doorbell::new();
        doorbell.ring(Ok(notify::Event::new(notify::EventKind::Other).set_flag(notify::event::Flag::Rescan)));
        assert!(doorbell.wait(Duration::ZERO, Duration::ZERO).rescan);
    }

    #[test]
    fn stopping_wakes_at_once() {
        let doorbell = Doorbell::new();
        let waiting = doorbell.clone();
        let thread = std::thread::spawn(move || waiting.wait(Duration::from_secs(60), Duration::ZERO));
        doorbell.stop();
        assert!(thread.join().unwrap().is_nothing());
        doorbell.ring(changed("/a"));
        let begun = Instant::now();
        assert_eq!(doorbell.wait(Duration::ZERO, Duration::from_secs(60)).paths.len(), 1);
        assert!(begun.elapsed() < Duration::from_secs(30));
    }
}
