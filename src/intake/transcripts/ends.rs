//! When sessions have ended: by all that is known of their transcripts, their processes and their hooks. The clock is an
//! argument.
//!
//! What a transcript's lines say of its session's end is in [`session`](crate::session).

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::followed::{Access, Files, Followed};
use crate::agent::AgentFolder;
use crate::event::{Origin, SessionState, Timestamp};
use crate::intake::sessions::{Closing, Now, OpenSessions, Roots};
use crate::session::{End, EndReason};

/// Sessions without a transcript that are ended at once.
const WITHOUT_TRANSCRIPT_MAX: usize = 256;

pub(crate) struct Ends {
    inactivity_timeout: Duration,
    open_sessions: OpenSessions,
    /// SessionEnd hooks whose sessions' ends were not emitted yet.
    closings: BTreeMap<Uuid, Closing>,
    /// Sessions that a process was seen to have open in this run.
    seen_open: HashSet<Uuid>,
}

/// What is to be noted of a session.
pub(crate) struct Ending {
    pub(crate) session: Uuid,
    /// `None`: it has not ended.
    pub(crate) end: Option<End>,
    pub(crate) origin: Origin,
    /// The process that has it open.
    pub(crate) process: Option<u32>,
    /// Its transcripts.
    pub(crate) paths: Vec<Arc<Path>>,
    /// The note about its SessionEnd hook is not needed any more.
    pub(crate) has_note: bool,
}

/// The end of a session that is only named in another's file.
pub(crate) struct OtherEnding {
    pub(crate) path: Arc<Path>,
    pub(crate) session: Uuid,
    pub(crate) end: End,
    /// Its own file tells its end.
    pub(crate) is_told: bool,
}

impl Ends {
    pub(crate) fn new(folders: &[AgentFolder], inactivity_timeout: Duration) -> Ends {
        let folders = folders.iter().map_while(|folder| folder.agent.processes_folder(&folder.path));
        Ends {
            inactivity_timeout,
            open_sessions: OpenSessions::new(folders),
            closings: BTreeMap::new(),
            seen_open: HashSet::new(),
        }
    }

    /// Looks which sessions processes have open, and takes in SessionEnd hooks that have arrived.
    pub(crate) fn look(&mut self, closings: BTreeMap<Uuid, Closing>, files: &Files, now: Now) {
        self.closings.extend(closings);
        self.open_sessions.look(&processes(files), now);
    }

    /// Whether another look will tell more.
    pub(crate) fn is_undecided(&self, now: Now) -> bool {
        self.open_sessions.is_undecided(now)
    }

    /// Whether a process's file names the session.
    pub(crate) fn is_open(&self, session: Uuid) -> bool {
        self.open_sessions.named(session).is_some()
    }

    /// The transcripts of sessions that have not ended by what is known of one of them, or of which a hook says that they have;
    /// by session and path.
    pub(crate) fn live(&self, files: &Files) -> Vec<(Uuid, Arc<Path>)> {
        let is_live = |file: &Followed, session| file.cursor.session.is_live() || self.closings.contains_key(&session);
        let session_of =
            |file: &Followed| file.session().filter(|session| file.is_registered() && is_live(file, *session));
        let live: HashSet<Uuid> = files.values().filter_map(|file| session_of(file)).collect();
        let files = files.values().filter_map(|file| Some((file.session()?, Arc::clone(&file.path))));
        let mut transcripts: Vec<_> = files.filter(|(session, _)| live.contains(session)).collect();
        transcripts.sort_unstable();
        transcripts
    }

    /// What is to be noted of the session of these transcripts. Files that were not read to their end may hold more activity:
    /// their sessions wait.
    pub(crate) fn ending(
        &mut self,
        transcripts: &[(Uuid, Arc<Path>)],
        files: &Files,
        unfinished: &[Arc<Path>],
        now: Now,
    ) -> Option<Ending> {
        let (session, first) = transcripts.first()?;
        let (session, first) = (*session, files.get(first)?);
        let mut view = SessionView::default();
        for file in transcripts.iter().filter_map(|(_, path)| files.get(path)) {
            view.add(file, unfinished.contains(&file.path));
        }
        if !view.is_read {
            return None;
        }
        let process = self.open_sessions.process(session, view.roots, view.state.process, view.modified, now);
        if self.is_open(session) {
            self.seen_open.insert(session);
        }
        let closing = self.closings.remove(&session);
        let gone = self.gone(session, &view, process, closing, now.wall);
        let end = view.state.end(now.wall, self.inactivity_timeout, gone);
        if end.is_none() && closing.is_none() && view.state.process == process {
            return None;
        }
        if end.is_some() {
            self.seen_open.remove(&session);
        }
        let paths = transcripts.iter().map(|(_, path)| Arc::clone(path)).collect();
        Some(Ending { session, end, origin: origin(first), process, paths, has_note: closing.is_some() })
    }

    /// How and when a session has ended otherwise than by timeout.
    fn gone(
        &self,
        session: Uuid,
        view: &SessionView,
        process: Option<u32>,
        closing: Option<Closing>,
        now: Timestamp,
    ) -> Option<(EndReason, Timestamp)> {
        let is_resumed =
            |closing: &Closing| closing.is_resumed(view.state.last_activity, view.advanced_at, view.modified);
        let by_hook = closing.filter(|closing| !is_resumed(closing)).map(|closing| closing.at);
        let by_process = (process.is_none() && view.state.process.is_some()).then(|| {
            // Noticed just now, or it went while nobody looked: then the file's last change is the last sign of life.
            let last_sign = Timestamp::from_second(view.modified).unwrap_or(now);
            if self.seen_open.contains(&session) { now } else { last_sign.min(now) }
        });
        [by_hook, by_process].into_iter().flatten().min().map(|at| (EndReason::Closed, at))
    }

    /// The ends of sessions of which there is no transcript: their hooks are all that tells of them.
    pub(crate) fn without_transcript(&mut self, files: &Files) -> Vec<Ending> {
        if self.closings.is_empty() {
            return Vec::new();
        }
        // One that was read and is not registered holds nothing but metadata.
        let may_register = |file: &Followed| file.is_registered() || file.seen.is_none() || file.unterminated.is_some();
        let known: HashSet<Uuid> =
            files.values().filter(|file| may_register(file)).filter_map(|file| file.session()).collect();
        let without = self.closings.iter().filter(|(session, _)| !known.contains(session));
        let without: Vec<(Uuid, Closing)> =
            without.take(WITHOUT_TRANSCRIPT_MAX).map(|(session, closing)| (*session, *closing)).collect();
        let ending = |(session, closing): (Uuid, Closing)| {
            self.closings.remove(&session);
            let state = SessionState { last_activity: Some(closing.at), ..SessionState::default() };
            let end = state.end(closing.at, self.inactivity_timeout, Some((EndReason::Closed, closing.at)));
            Ending { session, end, origin: Origin::Hook, process: None, paths: Vec::new(), has_note: true }
        };
        without.into_iter().map(ending).collect()
    }

    /// The end of the session of a file that is gone, where that was its last one. It is followed no more.
    pub(crate) fn of_gone(&mut self, file: &Followed, now: Timestamp) -> Option<Ending> {
        let session = file.session().filter(|_| file.is_registered())?;
        let closing = self.closings.remove(&session);
        let gone = closing.map_or((EndReason::Unregistered, now), |closing| (EndReason::Closed, closing.at));
        let end = file.cursor.session.end(now, self.inactivity_timeout, Some(gone));
        let has_note = closing.is_some();
        Some(Ending { session, end, origin: origin(file), process: None, paths: Vec::new(), has_note })
    }

    /// The end of the session that a file, which is gone, was the last to tell of.
    pub(crate) fn of_other_of_gone(&self, file: &Followed, files: &Files, now: Timestamp) -> Option<Ending> {
        let other = file.other().filter(|other| !has_transcript(files, other.session))?;
        let end = other.end(now, self.inactivity_timeout, Some((EndReason::Unregistered, now)))?;
        let (session, origin) = (other.session, origin(file));
        Some(Ending { session, end: Some(end), origin, process: None, paths: Vec::new(), has_note: false })
    }

    /// The ends, by timeout, of sessions that are only named in other sessions' files.
    pub(crate) fn of_others(&self, files: &Files, unfinished: &[Arc<Path>], now: Timestamp) -> Vec<OtherEnding> {
        let ending = |file: &Followed| {
            let other = file.other().filter(|_| file.seen.is_some())?;
            let is_told = has_transcript(files, other.session);
            // Its own file tells its end; should that go, it has been told.
            let at_once = is_told.then_some((EndReason::Closed, now));
            let end = other.end(now, self.inactivity_timeout, at_once)?;
            Some(OtherEnding { path: Arc::clone(&file.path), session: other.session, end, is_told })
        };
        let endings = files.values().filter_map(|file| ending(file));
        endings.filter(|ending| !unfinished.contains(&ending.path)).collect()
    }
}

pub(crate) fn origin(file: &Followed) -> Origin {
    Origin::Transcript { path: file.path.to_string_lossy().into(), offset: file.cursor.offset }
}

/// Whether a session has a file of its own that has registered it, or was not read yet.
pub(crate) fn has_transcript(files: &Files, session: Uuid) -> bool {
    let registers = |file: &Followed| file.is_registered() || file.seen.is_none();
    files.values().any(|file| file.session() == Some(session) && registers(file))
}

/// The processes that have sessions open by what was found before, and where those sessions' transcripts are.
fn processes(files: &Files) -> Vec<(Roots, u32)> {
    files.values().filter_map(|file| Some((file.roots, file.cursor.session.process?))).collect()
}

/// What all transcripts of a session say of it.
struct SessionView {
    state: SessionState,
    roots: Roots,
    /// All of them were read to their end.
    is_read: bool,
    /// Seconds since 1970.
    modified: i64,
    /// When the latest activity was read in this run.
    advanced_at: Option<Instant>,
}

impl Default for SessionView {
    fn default() -> Self {
        let (state, roots) = (SessionState::default(), Roots::default());
        SessionView { state, roots, is_read: true, modified: 0, advanced_at: None }
    }
}

impl SessionView {
    fn add(&mut self, file: &Followed, is_unfinished: bool) {
        self.state = self.state.merge(&file.cursor.session);
        self.roots = self.roots.union(file.roots);
        // A last line without newline may be read in a moment.
        let is_read = file.seen.is_some() || file.access != Access::Readable;
        self.is_read &= !is_unfinished && is_read && file.unterminated.is_none();
        self.modified = self.modified.max(file.modified);
        self.advanced_at = self.advanced_at.max(file.advanced_at);
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;
    use crate::agent::Agent;
    use crate::event::Cursor;
    use crate::transcript::{START, TranscriptKind};

    const SESSION: Uuid = Uuid::from_u128(1);
    const TIMEOUT: Duration = Duration::from_secs(600);

    fn noon() -> Timestamp {
        "2026-01-03T12:00:00Z".parse().unwrap()
    }

    /// A session's transcript in which something was said at noon, and that was read to its end.
    fn files() -> Files {
        let path: Arc<Path> = Path::new("/p/projects/-a/1.jsonl").into();
        let session = SessionState { began_at: Some(noon()), last_activity: Some(noon()), ..SessionState::default() };
        let cursor = Cursor { offset: 100, project_path: Some("/a".into()), session, ..START };
        let kind = TranscriptKind::Main { session: SESSION };
        let mut file = Followed::new(Roots::of(0), Arc::clone(&path), Agent::ClaudeCode, kind, cursor);
        file.access = Access::Unreadable;
        file.modified = noon().as_second();
        Files::from([(path, Box::new(file))])
    }

    fn ends() -> Ends {
        Ends::new(&[AgentFolder { agent: Agent::ClaudeCode, path: "/nowhere/projects".into() }], TIMEOUT)
    }

    fn at(seconds: i64) -> Now {
        Now { wall: noon() + SignedDuration::from_secs(seconds), instant: Instant::now() }
    }

    /// The reason and time of the session's end.
    fn end(ends: &mut Ends, files: &Files, now: Now) -> Option<(&'static str, Timestamp)> {
        let ending = ends.ending(&ends.live(files), files, &[], now)?;
        ending.end.map(|end| (end.reason.as_str(), end.at))
    }

    #[test]
    fn a_session_ends_when_its_time_has_come_and_not_a_second_before() {
        let files = files();
        let mut ends = ends();
        assert_eq!(end(&mut ends, &files, at(599)), None);
        assert_eq!(end(&mut ends, &files, at(600)), Some(("timeout", at(600).wall)));
        assert_eq!(end(&mut ends, &files, at(9000)), Some(("timeout", at(600).wall)), "whenever it is noticed");
    }

    #[test]
    fn a_hook_ends_a_session_when_it_ran_and_is_used_once() {
        let files = files();
        let mut ends = ends();
        let closing = Closing::noted(at(20).wall, at(30).wall);
        ends.look(BTreeMap::from([(SESSION, closing)]), &files, at(30));
        assert!(ends.without_transcript(&files).is_empty());
        assert_eq!(end(&mut ends, &files, at(30)), Some(("closed", at(20).wall)));
        assert_eq!(end(&mut ends, &files, at(30)), None);
    }

    #[test]
    fn a_session_waits_for_what_was_not_read_and_one_without_transcript_does_not() {
        let mut files = files();
        let mut ends = ends();
        files.values_mut().for_each(|file| file.access = Access::Readable);
        let closings = [(SESSION, at(20)), (Uuid::from_u128(2), at(25))];
        let closings = closings.map(|(session, ran)| (session, Closing::noted(ran.wall, at(30).wall)));
        ends.look(BTreeMap::from(closings), &files, at(30));
        assert_eq!(end(&mut ends, &files, at(9000)), None);
        let without = ends.without_transcript(&files);
        let ended = without.iter().map(|ending| (ending.session, ending.end.map(|end| end.at), ending.has_note));
        assert_eq!(ended.collect::<Vec<_>>(), [(Uuid::from_u128(2), Some(at(25).wall), true)]);
    }
}
