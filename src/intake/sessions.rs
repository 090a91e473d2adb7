//! Which sessions live, by what the system tells: processes that have one open, SessionEnd hooks, times of files.
//!
//! When a session has ended follows from that and from its lines, see [`session`](crate::session).

use std::collections::HashMap;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use tracing::warn;
use uuid::Uuid;

use crate::event::Timestamp;
use crate::regular_file;

/// The time, by both clocks: the system's, which somebody may set, and the one that only goes forward.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    pub(crate) wall: Timestamp,
    pub(crate) instant: Instant,
}

impl Now {
    pub(crate) fn read() -> Now {
        Now { wall: Timestamp::now(), instant: Instant::now() }
    }
}

/// Which of the projects folders something is in.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Roots(u32);

impl Roots {
    pub(crate) fn of(root: usize) -> Roots {
        Roots(1u32.checked_shl(u32::try_from(root).unwrap_or(u32::MAX)).unwrap_or(0))
    }

    pub(crate) fn union(self, other: Roots) -> Roots {
        Roots(self.0 | other.0)
    }

    fn contains(self, root: usize) -> bool {
        self.0 & Roots::of(root).0 != 0
    }
}

/// Which sessions running processes have open: beside each projects folder Claude Code keeps files `sessions/<pid>.json`.
/// Those of one folder say nothing about the transcripts of another: they may be of another version, machine or container.
pub(crate) struct OpenSessions {
    /// In the order of the projects folders.
    folders: Vec<SessionFolder>,
}

impl OpenSessions {
    pub(crate) fn new(folders: impl IntoIterator<Item = PathBuf>) -> OpenSessions {
        OpenSessions { folders: folders.into_iter().map(SessionFolder::new).collect() }
    }

    /// Reads the files. `known`: the processes that have sessions open by what was found before, also in an earlier run, and
    /// where those sessions' transcripts are.
    pub(crate) fn look(&mut self, known: &[(Roots, u32)], now: Now) {
        for (root, folder) in self.folders.iter_mut().enumerate() {
            let known = known.iter().filter(|(roots, _)| roots.contains(root)).map(|(_, pid)| *pid);
            folder.look(known, now);
        }
    }

    /// The process whose file names the session.
    pub(crate) fn named(&self, session: Uuid) -> Option<u32> {
        self.folders.iter().find_map(|folder| folder.open.get(&session).copied())
    }

    /// The process that has the session open, as far as is known. `known`: the one that had it open before, whose
    /// transcripts are in `roots` and were last modified at `modified` (seconds since 1970). It has it open until it ends,
    /// or its file names another session, or is missing in two looks with nothing written since the first.
    pub(crate) fn process(
        &self,
        session: Uuid,
        roots: Roots,
        known: Option<u32>,
        modified: i64,
        now: Now,
    ) -> Option<u32> {
        let folders = || self.folders.iter().enumerate().filter(|(root, _)| roots.contains(*root));
        let has_open = |pid: &u32| folders().all(|(_, folder)| folder.has_open(*pid, modified, now));
        self.named(session).or_else(|| known.filter(has_open))
    }

    /// Whether another look will tell more than the last one: a file is missing and may be about to be replaced.
    pub(crate) fn is_undecided(&self, now: Now) -> bool {
        self.folders.iter().any(|folder| folder.is_undecided(now))
    }
}

/// The files of one folder `sessions/`.
///
/// A file that is empty, half written or unreadable says nothing, nor does a folder that can't be listed: newer versions
/// of Claude Code rewrite these files at each change of status, older ones write none.
struct SessionFolder {
    folder: PathBuf,
    /// By process id.
    processes: HashMap<u32, ProcessState>,
    /// The sessions that were named in the last look.
    open: HashMap<Uuid, u32>,
    is_unreadable_logged: bool,
}

/// What the last look found of a process.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ProcessState {
    /// It has ended.
    Ended,
    /// Its file names a session.
    Names,
    /// It runs, and its file can't be read, or the folder can't.
    SaysNothing,
    /// It runs, and its file is missing since the look at this time. `since_second`: seconds since 1970.
    Missing { since: Instant, since_second: i64 },
}

/// How long the file of a running process must have been missing before its session counts as closed.
const FILE_MISSING_MIN: Duration = Duration::from_secs(1);

impl SessionFolder {
    fn new(folder: PathBuf) -> SessionFolder {
        SessionFolder { folder, processes: HashMap::new(), open: HashMap::new(), is_unreadable_logged: false }
    }

    /// Reads the files. `known`: the processes that have sessions open by what was found before.
    fn look(&mut self, known: impl IntoIterator<Item = u32>, now: Now) {
        self.open.clear();
        let before = std::mem::take(&mut self.processes);
        let is_complete = self.read_files();
        let missing = ProcessState::Missing { since: now.instant, since_second: now.wall.as_second() };
        let not_ended = before.iter().filter(|(_, state)| **state != ProcessState::Ended).map(|(pid, _)| *pid);
        for pid in known.into_iter().chain(not_ended) {
            self.processes.entry(pid).or_insert_with(|| match before.get(&pid) {
                _ if !is_running(pid) => ProcessState::Ended,
                Some(since @ ProcessState::Missing { .. }) => *since,
                _ if is_complete => missing,
                _ => ProcessState::SaysNothing,
            });
        }
    }

    /// Reads the files of running processes. False: there may be more.
    fn read_files(&mut self) -> bool {
        /// Processes that are looked at; far more than run at once.
        const FILES_MAX: usize = 4096;
        let mut entries = match std::fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) => {
                // Older versions of Claude Code have no such folder.
                if error.kind() != io::ErrorKind::NotFound && !std::mem::replace(&mut self.is_unreadable_logged, true) {
                    warn!(folder = %self.folder.display(), error = %error,
                          "the folder of running sessions can't be read; sessions end by their hooks or by inactivity");
                }
                return false;
            }
        };
        self.is_unreadable_logged = false;
        let mut is_complete = true;
        for entry in entries.by_ref().take(FILES_MAX) {
            match entry {
                Ok(entry) => self.read_file(&entry.path()),
                Err(_) => is_complete = false,
            }
        }
        is_complete && entries.next().is_none()
    }

    fn read_file(&mut self, path: &Path) {
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        let Some(pid) = stem.and_then(|stem| stem.parse().ok()).filter(|pid| is_running(*pid)) else { return };
        if path.extension().is_none_or(|extension| extension != "json") {
            return;
        }
        let session = session_named_in(path);
        let state = if session.is_some() { ProcessState::Names } else { ProcessState::SaysNothing };
        self.processes.insert(pid, state);
        self.open.extend(session.map(|session| (session, pid)));
    }

    /// Whether the process has its session open, whose transcripts were last modified at `modified`, as far as is known.
    fn has_open(&self, pid: u32, modified: i64, now: Now) -> bool {
        match self.processes.get(&pid) {
            Some(ProcessState::Ended | ProcessState::Names) => false,
            Some(ProcessState::Missing { since, since_second }) => is_fresh(*since, now) || modified > *since_second,
            Some(ProcessState::SaysNothing) | None => true,
        }
    }

    /// Whether another look will tell more than the last one: a file is missing and may be about to be replaced.
    fn is_undecided(&self, now: Now) -> bool {
        let is_undecided =
            |state: &ProcessState| matches!(state, ProcessState::Missing { since, .. } if is_fresh(*since, now));
        self.processes.values().any(is_undecided)
    }
}

/// Whether a file that is missing since then may be about to be replaced.
fn is_fresh(since: Instant, now: Now) -> bool {
    now.instant.saturating_duration_since(since) < FILE_MISSING_MIN
}

/// The session that a process's file names. `None`: it says nothing.
fn session_named_in(path: &Path) -> Option<Uuid> {
    /// Bytes of one file that are read.
    const BYTES_MAX: u64 = 64 * 1024;
    let value: Value = serde_json::from_slice(&regular_file::read(path, BYTES_MAX).ok()?).ok()?;
    value.get("sessionId")?.as_str()?.parse().ok()
}

/// A SessionEnd hook whose session's end was not emitted yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Closing {
    /// When the hook ran; never in the future.
    pub(crate) at: Timestamp,
    /// When it arrived here. `None`: so long after it ran that its arrival says nothing about the order of things.
    arrived: Option<Instant>,
}

/// How much later than a SessionEnd hook a line must be to count as said after it: the last lines and the hook are written
/// at about the same time.
const RESUMED_AFTER_MIN: Duration = Duration::from_secs(10);

/// How soon after it ran a hook arrives where nothing holds it up.
const ARRIVAL_TIME_MAX: Duration = Duration::from_secs(5);

impl Closing {
    /// A hook that has just arrived.
    pub(crate) fn arriving(at: Timestamp, now: Now) -> Closing {
        let is_prompt = now.wall.duration_since(at).unsigned_abs() <= ARRIVAL_TIME_MAX;
        Closing { at: at.min(now.wall), arrived: is_prompt.then_some(now.instant) }
    }

    /// A hook that arrived in an earlier run.
    pub(crate) fn noted(at: Timestamp, now: Timestamp) -> Closing {
        Closing { at: at.min(now), arrived: None }
    }

    /// Whether the session went on after the hook. A line said so by its time, unless it was read before the hook arrived
    /// (`advanced_at`: when the latest activity was read) or its file was last modified before the hook ran (`modified`,
    /// seconds since 1970): then the clock was wrong.
    pub(crate) fn is_resumed(
        &self,
        last_activity: Option<Timestamp>,
        advanced_at: Option<Instant>,
        modified: i64,
    ) -> bool {
        let is_later =
            |last: Timestamp| last > self.at && last.duration_since(self.at).unsigned_abs() > RESUMED_AFTER_MIN;
        let is_read_later = self.arrived.is_none_or(|arrived| advanced_at.is_some_and(|advanced| advanced > arrived));
        last_activity.is_some_and(is_later) && is_read_later && modified >= self.at.as_second()
    }
}

/// The latest time at which a transcript can have been active: when it was last changed, and not in the future. To the
/// millisecond, as lines have it.
pub(crate) fn active_max(metadata: &Metadata, now: Timestamp) -> Timestamp {
    // The time of modification may be set to any time, that of the change of status may not.
    let changed = metadata.mtime().max(metadata.ctime()).saturating_add(1);
    let now = to_millisecond(now);
    Timestamp::from_second(changed).map_or(now, |changed| changed.min(now))
}

pub(crate) fn to_millisecond(now: Timestamp) -> Timestamp {
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}

/// Whether there is such a process, ours or not.
pub(crate) fn is_running(pid: u32) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else { return false };
    match rustix::process::test_kill_process(pid) {
        Ok(()) => true,
        Err(error) => error != rustix::io::Errno::SRCH,
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;

    #[test]
    fn a_running_process_is_told_from_one_that_is_gone() {
        assert!(is_running(std::process::id()));
        assert!(!is_running(0));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert!(!is_running(child.id()));
    }

    const SEVEN: Uuid = Uuid::from_u128(7);

    /// A folder of processes' files, which is looked at on a clock of its own.
    struct Scene {
        _folder: tempfile::TempDir,
        file: PathBuf,
        open: OpenSessions,
        now: Now,
    }

    impl Scene {
        /// With a file that says that this very process has session 7 open.
        fn new() -> Scene {
            let folder = tempfile::tempdir().unwrap();
            let sessions = folder.path().join("sessions");
            std::fs::create_dir(&sessions).unwrap();
            let file = sessions.join(format!("{}.json", std::process::id()));
            std::fs::write(&file, format!(r#"{{"pid":1,"sessionId":"{SEVEN}","cwd":"/"}}"#)).unwrap();
            let open = OpenSessions::new([sessions]);
            let mut scene = Scene { _folder: folder, file, open, now: Now::read() };
            scene.look();
            assert_eq!(scene.process(None, 0), Some(std::process::id()));
            scene
        }

        fn look(&mut self) {
            self.open.look(&[(Roots::of(0), std::process::id())], self.now);
        }

        /// More than [`FILE_MISSING_MIN`] after the last look.
        fn look_later(&mut self) {
            self.now.instant += 2 * FILE_MISSING_MIN;
            self.look();
        }

        /// The process that has session 7 open.
        fn process(&self, known: Option<u32>, modified: i64) -> Option<u32> {
            self.open.process(SEVEN, Roots::of(0), known, modified, self.now)
        }
    }

    #[test]
    fn open_sessions_are_those_of_running_processes() {
        let Scene { _folder, file, mut open, now } = Scene::new();
        let sessions = file.parent().unwrap();
        let write = |name: &str, text: String| std::fs::write(sessions.join(name), text).unwrap();
        write("4194999.json", format!(r#"{{"sessionId":"{}"}}"#, Uuid::from_u128(8)));
        write("1.json", "garbage".to_owned());
        write("notes.txt", String::new());
        open.look(&[(Roots::of(0), 4_194_999)], now);
        assert_eq!(open.folders[0].open, HashMap::from([(SEVEN, std::process::id())]));
        // A process that is gone has nothing open, whatever the folder says.
        assert_eq!(open.process(Uuid::from_u128(8), Roots::of(0), Some(4_194_999), 0, now), None);
        std::fs::rename(sessions, sessions.with_extension("away")).unwrap();
        open.look(&[(Roots::of(0), 4_194_999)], now);
        assert_eq!(open.process(Uuid::from_u128(8), Roots::of(0), Some(4_194_999), 0, now), None);
    }

    #[test]
    fn what_can_not_be_read_says_nothing() {
        let own = Some(std::process::id());
        let mut scene = Scene::new();
        for bytes in ["", "{\"pid\":", "{}", "garbage"] {
            std::fs::write(&scene.file, bytes).unwrap();
            scene.look_later();
            scene.look_later();
            assert_eq!(scene.process(own, 0), own, "{bytes:?}");
            assert_eq!(scene.process(None, 0), None, "{bytes:?}");
        }
        let sessions = scene.file.parent().unwrap();
        std::fs::rename(sessions, sessions.with_extension("away")).unwrap();
        scene.look_later();
        scene.look_later();
        assert_eq!(scene.process(own, 0), own, "the folder is missing");
    }

    #[test]
    fn a_session_is_closed_when_its_file_is_gone_for_good_or_names_another() {
        let own = Some(std::process::id());
        let mut scene = Scene::new();
        std::fs::remove_file(&scene.file).unwrap();
        // However long ago the last look was that found it.
        scene.look_later();
        assert_eq!(scene.process(own, 0), own, "it may be about to be replaced");
        assert!(scene.open.is_undecided(scene.now));
        let missing_since = scene.now.wall.as_second();
        scene.look_later();
        assert!(!scene.open.is_undecided(scene.now));
        assert_eq!(scene.process(own, missing_since + 1), own, "it is written to");
        assert_eq!(scene.process(own, missing_since), None);
        // There in between: it counts again.
        std::fs::write(&scene.file, "").unwrap();
        scene.look_later();
        assert_eq!(scene.process(own, 0), own);
        std::fs::remove_file(&scene.file).unwrap();
        scene.look();
        assert_eq!(scene.process(own, 0), own);
        std::fs::write(&scene.file, format!(r#"{{"sessionId":"{}"}}"#, Uuid::from_u128(8))).unwrap();
        scene.look();
        assert_eq!(scene.process(own, i64::MAX), None, "the process went on to another session");
        // A watcher that has just started has not seen the file.
        std::fs::remove_file(&scene.file).unwrap();
        scene.open = OpenSessions::new([scene.file.parent().unwrap().to_owned()]);
        scene.look();
        assert_eq!(scene.process(own, 0), own);
        scene.look_later();
        assert_eq!(scene.process(own, 0), None);
    }

    #[test]
    fn a_session_is_resumed_by_what_was_said_written_and_read_after_its_hook() {
        let clock = Now::read();
        let now = clock.wall;
        let after = |seconds: i64| Some(now + SignedDuration::from_secs(seconds));
        let (hook, read_later) = (Closing::arriving(now, clock), Some(clock.instant + Duration::from_millis(1)));
        let modified = now.as_second();
        assert!(hook.is_resumed(after(60), read_later, modified));
        assert!(!hook.is_resumed(after(5), read_later, modified), "at about the same time");
        assert!(!hook.is_resumed(None, read_later, modified));
        assert!(!hook.is_resumed(after(60), None, modified), "read before the hook came");
        assert!(!hook.is_resumed(after(60), read_later, modified - 1), "written before the hook ran");
        // One that comes late is placed by times alone, and so is one of an earlier run.
        let old = now - SignedDuration::from_mins(40);
        for late in [Closing::arriving(old, clock), Closing::noted(old, now), Closing::noted(now, now)] {
            assert!(late.is_resumed(after(60), None, modified));
            assert!(!late.is_resumed(after(60), None, old.as_second() - 1));
        }
        let ahead = Closing::arriving(now + SignedDuration::from_hours(1), clock);
        assert_eq!(ahead.at, now, "no end is in the future");
    }
}
