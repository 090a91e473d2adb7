//! Notifications: they wake the follower and say where to look first. It never relies on them.
//!
//! What rings is gathered in one place of bounded size; while the follower is busy more of it only means a rescan.

use std::collections::BTreeSet;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use notify::{RecursiveMode, Watcher};
use tracing::{debug, info, warn};
use uuid::Uuid;

use super::followed::identity;
use super::polling::CHECK_INTERVAL;
use crate::agent::AgentFolder;
use crate::event::FileIdentity;

/// Paths that are remembered between two looks. More of them: a rescan finds them all.
const PATHS_MAX: usize = 4096;

/// Wakes and stops the follower. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Doorbell {
    bell: Arc<Bell>,
}

#[derive(Default)]
struct Bell {
    state: Mutex<BellState>,
    changed: Condvar,
}

#[derive(Default)]
struct BellState {
    rung: Rung,
    is_stopped: bool,
    is_idle: bool,
    unread: Unread,
}

/// What a whole pass over the files could not read.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Unread {
    /// Transcripts that are known of.
    pub files: usize,
    /// Folders, in each of which there may be any number of transcripts.
    pub folders: usize,
}

/// What rang since the last time somebody asked.
#[derive(Default, Debug)]
pub(crate) struct Rung {
    pub(crate) paths: BTreeSet<PathBuf>,
    /// Something may have changed anywhere.
    pub(crate) rescan: bool,
    /// The system's limit was reached when a new folder was to be watched.
    limit_reached: bool,
}

impl Rung {
    fn is_nothing(&self) -> bool {
        self.paths.is_empty() && !self.rescan
    }
}

impl Doorbell {
    /// Ends the follower after the chunk it is at.
    pub(crate) fn stop(&self) {
        self.state().is_stopped = true;
        self.bell.changed.notify_all();
    }

    /// Whether a whole pass over the files has found nothing more that can be read.
    pub(crate) fn is_idle(&self) -> bool {
        self.state().is_idle
    }

    /// What the last whole pass over the files could not read.
    pub(crate) fn unread(&self) -> Unread {
        self.state().unread
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.state().is_stopped
    }

    pub(super) fn set_idle(&self, idle: bool) {
        self.state().is_idle = idle;
    }

    pub(super) fn set_unread(&self, unread: Unread) {
        self.state().unread = unread;
    }

    /// What rang, after waiting at most `patience` for it and then `debounce` for more; at once when stopped.
    pub(super) fn wait(&self, patience: Duration, debounce: Duration) -> Rung {
        let wait = |state, timeout, is_waiting: fn(&mut BellState) -> bool| {
            let waited = self.bell.changed.wait_timeout_while(state, timeout, is_waiting);
            waited.unwrap_or_else(PoisonError::into_inner).0
        };
        let mut state = wait(self.state(), patience, |state| state.rung.is_nothing() && !state.is_stopped);
        if !state.rung.is_nothing() && !debounce.is_zero() {
            state = wait(state, debounce, |state| !state.is_stopped);
        }
        std::mem::take(&mut state.rung)
    }

    fn ring(&self, event: notify::Result<notify::Event>) {
        let mut state = self.state();
        let rung = &mut state.rung;
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
        drop(state);
        self.bell.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, BellState> {
        self.bell.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The watch on the projects folders.
#[derive(Default)]
pub(crate) struct Watch {
    watcher: Option<notify::RecommendedWatcher>,
    /// Which folders are watched: each may be removed and made again.
    watched: Vec<Option<FileIdentity>>,
    /// Logged: there are no notifications, or not all.
    is_failure_logged: bool,
    is_silence_logged: bool,
    /// When the watch was last set again because nothing was notified.
    renewed_at: Option<Instant>,
    /// When a watch that failed is tried again.
    again_at: Option<Instant>,
}

/// Pause before a watch that failed is tried again.
const AGAIN_AFTER: Duration = Duration::from_secs(300);

impl Watch {
    /// Sets the watch where it is missing: at the start, after a folder was replaced, and now and then where it failed.
    pub(crate) fn renew(&mut self, folders: &[AgentFolder], doorbell: &Doorbell) {
        // One that can't be read can't be watched either; the walk says so.
        let folders: Vec<&PathBuf> = folders.iter().map(|folder| &folder.path).collect();
        let identity_of = |folder: &&PathBuf| {
            let metadata = std::fs::read_dir(folder).and_then(|_| std::fs::metadata(folder));
            metadata.map(|metadata| identity(&metadata)).ok()
        };
        let identities: Vec<_> = folders.iter().map(identity_of).collect();
        let is_due = self.again_at.is_some_and(|at| at <= Instant::now());
        if identities == self.watched && !is_due {
            return;
        }
        self.watcher = None;
        self.again_at = None;
        let there: Vec<_> = folders.iter().zip(&identities).filter(|(_, identity)| identity.is_some()).collect();
        if !there.is_empty() {
            let ringer = doorbell.clone();
            // FSEvents names files by their real paths, wherever links lead there.
            let real_path = |folder: &PathBuf| (folder.canonicalize().unwrap_or(folder.clone()), folder.clone());
            let real_paths: Vec<_> = there.iter().map(|(folder, _)| real_path(folder)).collect();
            let watched: Vec<_> = real_paths.iter().map(|(real, _)| real.clone()).collect();
            let mut failure = None;
            match notify::recommended_watcher(move |event| ringer.ring(as_configured(event, &real_paths))) {
                Ok(mut watcher) => {
                    for folder in watched {
                        // Also after a failure: some of its folders may be watched.
                        failure = watcher.watch(&folder, RecursiveMode::Recursive).err().or(failure);
                    }
                    self.watcher = Some(watcher);
                }
                Err(error) => failure = Some(error),
            }
            match failure {
                Some(error) => {
                    self.again_at = Some(Instant::now() + AGAIN_AFTER);
                    self.log_failure(&error.to_string());
                }
                None if std::mem::take(&mut self.is_failure_logged) => info!("file notifications work again"),
                None => {}
            }
        }
        self.watched = identities;
    }

    /// Takes note of what rang about the watch itself.
    pub(crate) fn heed(&mut self, rung: &Rung) {
        if rung.limit_reached {
            self.again_at.get_or_insert_with(|| Instant::now() + AGAIN_AFTER);
            self.log_failure("the limit of watches is reached");
        }
    }

    fn log_failure(&mut self, error: &str) {
        if std::mem::replace(&mut self.is_failure_logged, true) {
            debug!(error, "file notifications still fail");
            return;
        }
        warn!(
            error,
            check_interval_ms = CHECK_INTERVAL.as_millis(),
            "file notifications fail; active transcripts are checked instead, and new ones found by rescanning. On Linux \
               raise fs.inotify.max_user_watches and fs.inotify.max_user_instances"
        );
    }

    /// Notes that no notifications arrive for the files below `folder`, though nothing has failed. It may have been mounted
    /// again, with the same identity: the watch is set again, and only then it is logged, once.
    pub(crate) fn note_silence(&mut self, folder: &Path) {
        if self.is_failure_logged || self.is_silence_logged {
            return;
        }
        if self.renewed_at.is_none_or(|at| at.elapsed() >= AGAIN_AFTER) {
            self.renewed_at = Some(Instant::now());
            self.watched.clear();
            return;
        }
        self.is_silence_logged = true;
        let check_interval_ms = CHECK_INTERVAL.as_millis();
        // On macOS that is how it works.
        if cfg!(target_os = "macos") {
            info!(folder = %folder.display(), check_interval_ms, "{SILENCE}");
        } else {
            warn!(folder = %folder.display(), check_interval_ms, "{SILENCE}");
        }
    }
}

const SILENCE: &str = "no file notifications arrive, as on network file systems; active transcripts are checked instead, and \
                       new ones found by rescanning";

/// Replaces the real paths of the folders by those under which they are known here.
fn as_configured(
    event: notify::Result<notify::Event>,
    real_paths: &[(PathBuf, PathBuf)],
) -> notify::Result<notify::Event> {
    event.map(|mut event| {
        for path in &mut event.paths {
            let found = real_paths.iter().find_map(|(real, known)| Some(known.join(path.strip_prefix(real).ok()?)));
            *path = found.unwrap_or(std::mem::take(path));
        }
        event
    })
}

/// Whether this system notifies of files at all: makes one in a temporary folder. The error says why it can't.
pub(crate) fn do_notifications_arrive() -> Result<bool, String> {
    const PATIENCE: Duration = Duration::from_secs(1);
    let folder = std::env::temp_dir().join(format!("headspace-watcher-{}", Uuid::now_v7()));
    if DirBuilder::new().mode(0o700).create(&folder).is_err() {
        // It can't be tried here, and nothing is known to be wrong.
        return Ok(true);
    }
    let (sender, receiver) = mpsc::channel();
    let arrived = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // The receiver is gone when nobody waits any more.
        let _ = sender.send(event.is_ok());
    })
    .and_then(|mut watcher| {
        watcher.watch(&folder, RecursiveMode::Recursive)?;
        std::fs::write(folder.join("file"), "")?;
        Ok(receiver.recv_timeout(PATIENCE).unwrap_or(false))
    });
    // What stays is one empty file in a temporary folder.
    let _ = std::fs::remove_dir_all(&folder);
    arrived.map_err(|error| error.to_string())
}

/// Changes of files that no notification came for. While notifications work a check may be the first to find a change,
/// but the notification follows.
#[derive(Clone, Default)]
pub(crate) struct Silence {
    changes: u32,
    since: Option<Instant>,
}

impl Silence {
    /// Notes a change that was found. Whether it is certain now that no notifications arrive.
    pub(crate) fn is_certain(&mut self) -> bool {
        const CHANGES_MIN: u32 = 3;
        const TIME_MIN: Duration = Duration::from_secs(2);
        self.changes += 1;
        let is_long = self.since.get_or_insert_with(Instant::now).elapsed() >= TIME_MIN;
        self.changes >= CHANGES_MIN && is_long
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
        let doorbell = Doorbell::default();
        for number in 0..=PATHS_MAX {
            doorbell.ring(changed(&format!("/{number}")));
        }
        let rung = doorbell.wait(Duration::ZERO, Duration::ZERO);
        assert!(rung.rescan && rung.paths.is_empty());
        assert!(doorbell.wait(Duration::ZERO, Duration::ZERO).is_nothing());
    }

    #[test]
    fn an_overflow_of_the_system_means_a_rescan() {
        let doorbell = Doorbell::default();
        doorbell.ring(Ok(notify::Event::new(notify::EventKind::Other).set_flag(notify::event::Flag::Rescan)));
        assert!(doorbell.wait(Duration::ZERO, Duration::ZERO).rescan);
    }

    #[test]
    fn stopping_wakes_at_once() {
        let doorbell = Doorbell::default();
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
