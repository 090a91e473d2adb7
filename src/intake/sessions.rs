//! Which sessions live, and when one has ended. Pure functions over what its transcript and the system tell.
//!
//! * A session is active when something is said or done in it: lines of its conversation. State that Claude Code writes
//!   again whenever a session is merely opened is no activity; nor are lines that it inherited from another session.
//! * It ends as **closed** (its SessionEnd hook came, or the process that had it open is gone), by **timeout** (quiet for
//!   `inactivity_timeout`), or **unregistered** (its transcript was removed); whichever came first.
//! * The end is told once: its identity is the session and its last activity. New activity means that it is back; it
//!   ends again later, under another identity.
//! * A pause above the timeout *between* two lines is an end too: whether the watcher was running then makes no
//!   difference, nor whether a transcript is read once, twice, or years later.
//!
//! All that must be remembered is [`SessionState`], which is stored with the transcript's cursor.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::SignedDuration;
use serde_json::{Map, Value};
use tracing::warn;
use uuid::Uuid;

use super::claude_code::{COPY_DELAY_SECONDS_MIN, iso_8601};
use super::lines::START;
use super::schema::Candidate;
use crate::event::{Cursor, EventId, ForeignKeys, Origin, SessionState, Timestamp};

/// Why a session has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EndReason {
    Closed,
    Timeout,
    Unregistered,
}

impl EndReason {
    pub fn as_str(self) -> &'static str {
        match self {
            EndReason::Closed => "closed",
            EndReason::Timeout => "timeout",
            EndReason::Unregistered => "unregistered",
        }
    }
}

/// The end of a session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct End {
    pub reason: EndReason,
    pub at: Timestamp,
    /// `None`: no line of its own has a time.
    pub last_activity: Option<Timestamp>,
    pub began_at: Option<Timestamp>,
}

impl End {
    /// The event `session_ended`.
    pub fn candidate(&self, session: Uuid, origin: Origin) -> Candidate {
        let mut payload = Map::new();
        payload.insert("session_uuid".to_owned(), session.to_string().into());
        payload.insert("reason".to_owned(), self.reason.as_str().into());
        if let Some(last_activity) = self.last_activity {
            payload.insert("last_activity_at".to_owned(), iso_8601(last_activity).into());
            if let Some(began_at) = self.began_at {
                let seconds = last_activity.duration_since(began_at).as_secs().max(0);
                payload.insert("duration_seconds".to_owned(), Value::from(seconds));
            }
        }
        Candidate {
            id: session_ended_event_id(session, self.last_activity),
            event_type: "session_ended".to_owned(),
            timestamp: self.at,
            payload,
            refs: ForeignKeys::default(),
            origin,
        }
    }
}

/// The identity of a session's end.
pub fn session_ended_event_id(session: Uuid, last_activity: Option<Timestamp>) -> EventId {
    let activity = last_activity.map_or_else(|| "unknown".to_owned(), |at| at.as_nanosecond().to_string());
    EventId::derived(format!("session_ended/{session}/{activity}").as_bytes())
}

/// What one line says about when its session was active.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LineTime {
    pub at: Timestamp,
    /// A line of the conversation.
    pub is_envelope: bool,
    /// It was first said in another session.
    pub is_inherited: bool,
}

impl SessionState {
    /// Takes in the next line's time. Gives the end of the session before a pause that was longer than `timeout`.
    pub fn note(&mut self, line: LineTime, timeout: Duration) -> Option<End> {
        let LineTime { at, is_envelope, is_inherited } = line;
        let Some(last) = self.last_activity else {
            if !is_envelope {
                self.began_at = self.began_at.or(Some(at));
            } else if !is_inherited {
                // A copy begins when it was opened; what it was copied from is older.
                let copied_at = self.began_at.filter(|opened_at| is_copied_by(*opened_at, at));
                self.began_at = copied_at.or(Some(at));
                self.last_activity = self.began_at;
            }
            return None;
        };
        if !is_envelope || is_inherited || at <= last {
            return None;
        }
        let end = self.timed_out(timeout).filter(|end| end.at <= at);
        self.last_activity = Some(at);
        if let Some(end) = end {
            self.ended_through = end.last_activity;
        }
        end
    }

    /// Whether there was activity whose end has not been told.
    pub fn is_live(&self) -> bool {
        match (self.last_activity, self.ended_through) {
            (Some(last), Some(ended)) => last > ended,
            (_, ended) => ended.is_none(),
        }
    }

    /// What is known when another transcript of the same session says more.
    pub fn merge(self, other: &SessionState) -> SessionState {
        SessionState {
            began_at: [self.began_at, other.began_at].into_iter().flatten().min(),
            last_activity: self.last_activity.max(other.last_activity),
            ended_through: self.ended_through.max(other.ended_through),
            process: self.process.or(other.process),
        }
    }

    /// When it ends if nothing more happens.
    pub fn times_out_at(&self, timeout: Duration) -> Option<Timestamp> {
        self.timed_out(timeout).map(|end| end.at)
    }

    /// Its end if nothing more happens.
    fn timed_out(&self, timeout: Duration) -> Option<End> {
        let last = self.last_activity?;
        let at = last.checked_add(SignedDuration::try_from(timeout).ok()?).ok()?;
        self.is_live().then_some(End {
            reason: EndReason::Timeout,
            at,
            last_activity: self.last_activity,
            began_at: self.began_at,
        })
    }

    /// The end that is to be told now, if any: the earliest of `gone` (how and when the session ended otherwise) and the
    /// timeout, where that has come.
    pub fn end(&self, now: Timestamp, timeout: Duration, gone: Option<(EndReason, Timestamp)>) -> Option<End> {
        if !self.is_live() {
            return None;
        }
        let timed_out = self.timed_out(timeout).filter(|end| end.at <= now);
        let gone = gone.map(|(reason, at)| End {
            reason,
            at: at.max(self.last_activity.unwrap_or(at)),
            last_activity: self.last_activity,
            began_at: self.began_at,
        });
        match (timed_out, gone) {
            (Some(timed_out), Some(gone)) if timed_out.at <= gone.at => Some(timed_out),
            (timed_out, gone) => gone.or(timed_out),
        }
    }

    /// Remembers that `end` was told. Lines that were written before a session was closed and are read later bring it
    /// not back; after a timeout any newer line does.
    pub fn ended(&mut self, end: &End) {
        let through = match end.reason {
            EndReason::Timeout => end.last_activity.unwrap_or(end.at),
            EndReason::Closed | EndReason::Unregistered => end.at,
        };
        self.ended_through = self.ended_through.max(Some(through));
        self.process = None;
    }
}

/// Whether a transcript that was opened at `opened_at` and whose first line was said at `said_at` is a copy.
fn is_copied_by(opened_at: Timestamp, said_at: Timestamp) -> bool {
    opened_at.as_second() - said_at.as_second() >= COPY_DELAY_SECONDS_MIN
}

/// Which sessions running processes have open, by the files `sessions/<pid>.json` below Claude Code's own folder.
///
/// A file that is empty, half written or unreadable says nothing, nor does a folder that can't be listed: newer versions
/// of Claude Code rewrite these files at each change of status, older ones write none.
pub struct OpenSessions {
    folder: PathBuf,
    /// The last look at the folder, and the first one.
    looked_at: Instant,
    began_at: Instant,
    time: Timestamp,
    /// Of running processes only.
    files: HashMap<u32, ProcessFile>,
    open: HashMap<Uuid, u32>,
    /// Not all files could be listed in the last look.
    is_partial: bool,
    is_unreadable_logged: bool,
}

/// The file of a running process.
struct ProcessFile {
    /// When it was there last.
    present_at: Instant,
    /// The session that it named in the last look.
    session: Option<Uuid>,
}

/// How long the file of a running process must have been missing before its session counts as closed.
const FILE_MISSING_MIN: Duration = Duration::from_secs(1);

impl OpenSessions {
    /// Knows nothing before the first [`OpenSessions::look`].
    pub fn new(folder: PathBuf) -> OpenSessions {
        let now = Instant::now();
        OpenSessions {
            folder,
            looked_at: now,
            began_at: now,
            time: Timestamp::now(),
            files: HashMap::new(),
            open: HashMap::new(),
            is_partial: true,
            is_unreadable_logged: false,
        }
    }

    /// Reads the files.
    pub fn look(&mut self) {
        /// Processes that are looked at; far more than run at once.
        const FILES_MAX: usize = 4096;
        self.looked_at = Instant::now();
        self.time = Timestamp::now();
        self.open.clear();
        self.files.retain(|pid, _| is_running(*pid));
        self.files.values_mut().for_each(|file| file.session = None);
        let mut entries = match std::fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) => {
                self.is_partial = true;
                // Older versions of Claude Code have no such folder.
                if error.kind() != io::ErrorKind::NotFound && !std::mem::replace(&mut self.is_unreadable_logged, true) {
                    warn!(folder = %self.folder.display(), error = %error,
                          "the folder of running sessions can't be read; sessions end by their hooks or by inactivity");
                }
                return;
            }
        };
        self.is_unreadable_logged = false;
        self.is_partial = false;
        for entry in entries.by_ref().take(FILES_MAX) {
            match entry {
                Ok(entry) => self.look_at(&entry.path()),
                Err(_) => self.is_partial = true,
            }
        }
        self.is_partial |= entries.next().is_some();
    }

    fn look_at(&mut self, path: &Path) {
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        let Some(pid) = stem.and_then(|stem| stem.parse().ok()).filter(|pid| is_running(*pid)) else { return };
        if path.extension().is_none_or(|extension| extension != "json") {
            return;
        }
        let session = session_named_in(path);
        self.files.insert(pid, ProcessFile { present_at: self.looked_at, session });
        self.open.extend(session.map(|session| (session, pid)));
    }

    /// The process that has the session open, as far as is known. `known`: the one that had it open before, whose
    /// transcripts were last modified at `modified` (seconds since 1970). It has it open until it ends, or its file names
    /// another session, or was gone in two looks with nothing written since.
    pub fn process(&self, session: Uuid, known: Option<u32>, modified: i64) -> Option<u32> {
        if let Some(pid) = self.open.get(&session) {
            return Some(*pid);
        }
        let known = known.filter(|pid| is_running(*pid))?;
        let file = self.files.get(&known);
        if file.is_some_and(|file| file.session.is_some()) {
            return None;
        }
        let present_at = file.map_or(self.began_at, |file| file.present_at);
        let missing = self.looked_at.saturating_duration_since(present_at);
        let missing_since = self.time.saturating_sub(missing).map_or(i64::MIN, Timestamp::as_second);
        let is_closed = !self.is_partial && missing >= FILE_MISSING_MIN && modified <= missing_since;
        (!is_closed).then_some(known)
    }
}

/// The session that a process's file names. `None`: it says nothing.
fn session_named_in(path: &Path) -> Option<Uuid> {
    /// Bytes of one file that are read.
    const BYTES_MAX: u64 = 64 * 1024;
    let metadata = std::fs::metadata(path).ok()?;
    if !metadata.is_file() || metadata.len() > BYTES_MAX {
        return None;
    }
    let value: Value = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    value.get("sessionId")?.as_str()?.parse().ok()
}

/// The folder of the notes about sessions whose SessionEnd hook has come and whose end was not told yet. Not a path on
/// disk: the notes are kept among the cursors, whose own paths are absolute.
const CLOSINGS: &str = "session-end";

/// Where the note about `session` is kept.
pub fn closing_path(session: Uuid) -> PathBuf {
    Path::new(CLOSINGS).join(session.to_string())
}

/// The session of a note; `None` for a transcript.
pub fn closing_of(path: &Path) -> Option<Uuid> {
    path.strip_prefix(CLOSINGS).ok()?.to_str()?.parse().ok()
}

/// The note that a session's SessionEnd hook came at `at`.
pub fn closing_note(at: Timestamp) -> Cursor {
    let session = SessionState { ended_through: Some(at), ..SessionState::default() };
    Cursor { session, ..START }
}

/// Whether there is such a process, ours or not.
pub fn is_running(pid: u32) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else { return false };
    match rustix::process::test_kill_process(pid) {
        Ok(()) => true,
        Err(error) => error != rustix::io::Errno::SRCH,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn at(time: &str) -> Timestamp {
        format!("2026-01-01T{time}Z").parse().unwrap()
    }

    fn said(time: &str) -> LineTime {
        LineTime { at: at(time), is_envelope: true, is_inherited: false }
    }

    fn metadata(time: &str) -> LineTime {
        LineTime { is_envelope: false, ..said(time) }
    }

    fn state(lines: &[LineTime]) -> SessionState {
        let mut state = SessionState::default();
        for line in lines {
            assert_eq!(state.note(*line, HOUR), None);
        }
        state
    }

    #[test]
    fn metadata_is_no_activity() {
        let state = state(&[said("10:00:00"), metadata("10:30:00")]);
        assert_eq!(state.last_activity, Some(at("10:00:00")));
        assert_eq!(state.end(at("11:00:00"), HOUR, None).unwrap().at, at("11:00:00"));
    }

    #[test]
    fn a_quiet_session_ends_once_and_when_the_timeout_came_not_when_it_was_noticed() {
        let mut state = state(&[said("10:00:00"), said("10:20:00"), said("10:10:00")]);
        assert_eq!(state.end(at("11:19:59"), HOUR, None), None);
        let end = state.end(at("15:00:00"), HOUR, None).unwrap();
        assert_eq!((end.reason, end.at), (EndReason::Timeout, at("11:20:00")));
        state.ended(&end);
        assert_eq!(state.end(at("16:00:00"), HOUR, None), None);
        assert!(!state.is_live());
    }

    #[test]
    fn a_session_that_comes_back_ends_again_under_another_identity() {
        let session = Uuid::from_u128(1);
        let mut state = state(&[said("10:00:00")]);
        let first = state.end(at("12:00:00"), HOUR, None).unwrap();
        state.ended(&first);
        assert_eq!(state.note(said("12:30:00"), HOUR), None, "its end was told");
        let second = state.end(at("14:00:00"), HOUR, None).unwrap();
        let id = |end: &End| end.candidate(session, Origin::Hook).id;
        assert_ne!(id(&first), id(&second));
        assert_eq!(second.candidate(session, Origin::Hook).payload["duration_seconds"], 9000);
    }

    #[test]
    fn a_pause_above_the_timeout_is_an_end_also_when_it_is_read_later() {
        let mut state = state(&[said("10:00:00"), said("10:59:59")]);
        let end = state.note(said("13:00:00"), HOUR).unwrap();
        assert_eq!((end.reason, end.at, end.last_activity), (EndReason::Timeout, at("11:59:59"), Some(at("10:59:59"))));
        assert!(state.is_live(), "it is back");
    }

    #[test]
    fn closed_or_timeout_whichever_came_first() {
        let state = state(&[said("10:00:00")]);
        let closed = |time| Some((EndReason::Closed, at(time)));
        assert_eq!(state.end(at("10:05:00"), HOUR, closed("10:04:00")).unwrap().reason, EndReason::Closed);
        assert_eq!(state.end(at("12:00:00"), HOUR, closed("11:30:00")).unwrap().reason, EndReason::Timeout);
        let early = state.end(at("12:00:00"), HOUR, closed("09:00:00")).unwrap();
        assert_eq!((early.reason, early.at), (EndReason::Closed, at("10:00:00")));
    }

    #[test]
    fn lines_written_before_a_session_was_closed_bring_it_not_back() {
        let mut state = state(&[said("10:00:00")]);
        let end = state.end(at("10:05:00"), HOUR, Some((EndReason::Closed, at("10:04:00")))).unwrap();
        state.ended(&end);
        state.note(said("10:03:59"), HOUR);
        assert!(!state.is_live());
        state.note(said("10:04:01"), HOUR);
        assert!(state.is_live());
    }

    #[test]
    fn what_a_copy_inherited_is_no_activity_of_its_own() {
        // Opened at noon, the history is from the morning, with a pause in it.
        let state = state(&[metadata("12:00:00"), said("08:00:00"), said("10:00:00")]);
        assert_eq!((state.began_at, state.last_activity), (Some(at("12:00:00")), Some(at("12:00:00"))));
        // Lines that say themselves that they come from elsewhere.
        let inherited = LineTime { is_inherited: true, ..said("08:00:00") };
        let state = self::state(&[inherited, said("12:00:00")]);
        assert_eq!(state.began_at, Some(at("12:00:00")));
    }

    #[test]
    fn a_state_line_just_before_the_first_prompt_makes_no_copy() {
        let state = state(&[metadata("10:00:01"), said("10:00:00")]);
        assert_eq!(state.last_activity, Some(at("10:00:00")));
    }

    #[test]
    fn a_running_process_is_told_from_one_that_is_gone() {
        assert!(is_running(std::process::id()));
        assert!(!is_running(0));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert!(!is_running(child.id()));
    }

    /// A folder of processes' files with one that says that this very process has session 7 open.
    fn open_session() -> (tempfile::TempDir, PathBuf, OpenSessions) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(format!("{}.json", std::process::id()));
        std::fs::write(&file, format!(r#"{{"pid":1,"sessionId":"{SEVEN}","cwd":"/"}}"#)).unwrap();
        let mut open = OpenSessions::new(folder.path().to_owned());
        open.look();
        assert_eq!(open.process(SEVEN, None, 0), Some(std::process::id()));
        (folder, file, open)
    }

    const SEVEN: Uuid = Uuid::from_u128(7);

    /// Looks again as if more than [`FILE_MISSING_MIN`] had passed.
    fn look_later(open: &mut OpenSessions) {
        let earlier = |at: Instant| at.checked_sub(2 * FILE_MISSING_MIN).unwrap();
        open.began_at = earlier(open.began_at);
        open.files.values_mut().for_each(|file| file.present_at = earlier(file.present_at));
        open.look();
    }

    #[test]
    fn open_sessions_are_those_of_running_processes() {
        let (folder, _, mut open) = open_session();
        let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
        write("4194999.json", format!(r#"{{"sessionId":"{}"}}"#, Uuid::from_u128(8)));
        write("1.json", "garbage".to_owned());
        write("notes.txt", String::new());
        open.look();
        assert_eq!(open.open, HashMap::from([(SEVEN, std::process::id())]));
        // A process that is gone has nothing open, whatever the folder says.
        assert_eq!(open.process(Uuid::from_u128(8), Some(4_194_999), 0), None);
        std::fs::rename(folder.path(), folder.path().with_extension("away")).unwrap();
        open.look();
        assert_eq!(open.process(Uuid::from_u128(8), Some(4_194_999), 0), None);
    }

    #[test]
    fn what_can_not_be_read_says_nothing() {
        let own = Some(std::process::id());
        let (_folder, file, mut open) = open_session();
        for bytes in ["", "{\"pid\":", "{}", "garbage"] {
            std::fs::write(&file, bytes).unwrap();
            look_later(&mut open);
            assert_eq!(open.process(SEVEN, own, 0), own, "{bytes:?}");
            assert_eq!(open.process(SEVEN, None, 0), None, "{bytes:?}");
        }
        let away = file.parent().unwrap().with_extension("away");
        std::fs::rename(file.parent().unwrap(), &away).unwrap();
        look_later(&mut open);
        assert_eq!(open.process(SEVEN, own, 0), own, "the folder is missing");
        std::fs::rename(&away, file.parent().unwrap()).unwrap();
    }

    #[test]
    fn a_session_is_closed_when_its_file_is_gone_for_good_or_names_another() {
        let own = Some(std::process::id());
        let (_folder, file, mut open) = open_session();
        std::fs::remove_file(&file).unwrap();
        open.look();
        assert_eq!(open.process(SEVEN, own, 0), own, "it may be about to be replaced");
        look_later(&mut open);
        assert_eq!(open.process(SEVEN, own, Timestamp::now().as_second() + 1), own, "it is written to");
        assert_eq!(open.process(SEVEN, own, 0), None);
        std::fs::write(&file, format!(r#"{{"sessionId":"{}"}}"#, Uuid::from_u128(8))).unwrap();
        open.look();
        assert_eq!(open.process(SEVEN, own, i64::MAX), None, "the process went on to another session");
        // A watcher that has just started has not seen the file.
        std::fs::remove_file(&file).unwrap();
        let mut open = OpenSessions::new(file.parent().unwrap().to_owned());
        open.look();
        assert_eq!(open.process(SEVEN, own, 0), own);
        look_later(&mut open);
        assert_eq!(open.process(SEVEN, own, 0), None);
    }
}
