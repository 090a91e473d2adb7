//! From the lines of one transcript to events: the one way that the follower and `verify` both go.
//!
//! [`line`](mod@super::line) says what a line means by itself; here it is put beside what the lines before it said (the session's
//! registration, its pauses, its project), and what is damaged is salvaged. The same bytes give the same events with the
//! same identities, whenever and in however many pieces they are read.

use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use uuid::Uuid;

use super::line::{self, BadLine, LineMeaning, LineType, NoTurn, SessionFacts, TranscriptKind, Unknown};
use super::repair;
use super::session::{End, EndReason, LineTime};
use crate::event::{
    Candidate, Cursor, Failure, FailureKind, FileIdentity, ForeignKeys, Origin, Rejection, SessionState, Timestamp,
};

/// Bytes of a damaged line that are kept; what is longer stands in the file, at the place that the message names.
const KEPT_BYTES_MAX: usize = 1 << 20;

/// Where nothing has been read yet.
pub const START: Cursor = Cursor {
    file: FileIdentity { device: 0, inode: 0 },
    offset: 0,
    fingerprint: 0,
    project_path: None,
    session: SessionState { began_at: None, last_activity: None, ended_through: None, process: None },
};

/// A transcript, as far as its lines need to know.
#[derive(Clone, Debug)]
pub struct Source {
    pub kind: TranscriptKind,
    /// As events name it: lossy where it is not UTF-8.
    pub path: Arc<str>,
    /// Pause after which a session has ended.
    pub inactivity_timeout: Duration,
    /// The time of lines that have none, and the latest at which a line counts as activity.
    pub active_max: Timestamp,
    /// What begins before this byte stands in the file of another session, too, of which this one is a copy.
    pub inherited_to: u64,
}

/// How much later than [`Source::active_max`] a line's time may be: clocks of file systems are coarse, or another machine's.
const CLOCK_SLACK: SignedDuration = SignedDuration::from_secs(10);

/// When a line was said, as far as its session's activity is concerned: a time in the future is no time.
fn line_time(meaning: &LineMeaning, is_inherited: bool, active_max: Timestamp) -> Option<LineTime> {
    let at = meaning.timestamp?;
    let at = if at.duration_since(active_max) > CLOCK_SLACK { active_max } else { at };
    Some(LineTime { at, is_envelope: meaning.is_envelope, is_inherited })
}

/// A session whose lines stand at the beginning of another's file, as old resumes and forks left them. Where its own file is
/// gone, this is all that tells of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OtherSession {
    pub session: Uuid,
    project_path: Option<Arc<str>>,
    state: SessionState,
}

impl OtherSession {
    /// What was told of its end before.
    pub fn ended_through(mut self, ended_through: Option<Timestamp>) -> OtherSession {
        self.state.ended_through = ended_through;
        self
    }

    /// Its end, if that is to be told now.
    pub fn end(&self, now: Timestamp, timeout: Duration, gone: Option<(EndReason, Timestamp)>) -> Option<End> {
        self.state.end(now, timeout, gone).filter(|_| self.project_path.is_some())
    }

    /// Remembers that its end was told. Gives up to when that is.
    pub fn ended(&mut self, end: &End) -> Option<Timestamp> {
        self.state.ended(end);
        self.state.ended_through
    }
}

/// What bytes without a newline at the end of a file are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LastLine {
    /// Blanks, or NULs as a crash leaves them.
    Blank,
    /// One whole JSON object: nothing that could still follow would change it.
    Complete,
    Incomplete,
}

/// Judges the bytes behind the last newline of a file.
pub(crate) fn last_line(line: &[u8], kind: &TranscriptKind) -> LastLine {
    let is_blank = |byte: &u8| byte.is_ascii_whitespace() || *byte == 0;
    if line.iter().all(is_blank) {
        LastLine::Blank
    } else if line.trim_ascii_end().last() == Some(&b'}')
        && !line.contains(&b'\n')
        && line::read_line(line, kind).is_ok()
    {
        LastLine::Complete
    } else {
        LastLine::Incomplete
    }
}

/// What a line led to.
pub enum Found {
    Event(Candidate),
    /// Registration or end of a session that is only named in this file. To be stored where it has no file of its own:
    /// that one knows better.
    OfOther(Uuid, Candidate),
    /// Bytes that are no whole record.
    Unreadable(Rejection),
    /// A line of the user's side that is no turn.
    NoTurn(NoTurn),
}

/// What a line was.
#[derive(Default, Debug)]
pub struct LineReport {
    /// Nothing but blanks.
    pub is_blank: bool,
    /// Why it is no JSON object.
    pub bad: Option<BadLine>,
    /// What it has that the format did not have when this was written.
    pub unknowns: Vec<Unknown>,
}

impl Source {
    /// Reads one complete line, given without its newline, that begins at `offset`. Moves everything in `cursor` but
    /// its place, and `other`: the session whose lines have just been read, if that is not the file's own. Neither the cursor
    /// nor the queue keeps it; reading what is before the cursor again, with [`START`], gives it again.
    pub fn read(
        &self,
        line: &[u8],
        offset: u64,
        cursor: &mut Cursor,
        other: &mut Option<OtherSession>,
        mut found: impl FnMut(Found),
    ) -> LineReport {
        let mut report = LineReport::default();
        if line.iter().all(u8::is_ascii_whitespace) {
            report.is_blank = true;
            return report;
        }
        match line::read_line(line, &self.kind) {
            Ok(mut meaning) => {
                report.unknowns = std::mem::take(&mut meaning.unknowns);
                self.take(meaning, line, offset, cursor, other, &mut found);
            }
            Err(bad) => {
                for (range, record) in repair::read_damaged(line, &self.kind, &bad) {
                    let bytes = line.get(range.clone()).unwrap_or_default();
                    let at = offset + range.start as u64;
                    match record {
                        Ok(mut meaning) => {
                            report.unknowns.append(&mut meaning.unknowns);
                            self.take(meaning, bytes, at, cursor, other, &mut found);
                        }
                        Err(bad) => found(Found::Unreadable(self.unreadable(bytes, at, &bad))),
                    }
                }
                report.bad = Some(bad);
            }
        }
        report
    }

    /// The session's end before a pause, its registration at its first working directory, and a turn; in this order.
    fn take(
        &self,
        meaning: LineMeaning,
        line: &[u8],
        offset: u64,
        cursor: &mut Cursor,
        other: &mut Option<OtherSession>,
        found: &mut impl FnMut(Found),
    ) {
        let TranscriptKind::Main { session } = self.kind else { return };
        if let (LineType::User | LineType::Attachment, Some(no_turn)) = (meaning.line_type, &meaning.no_turn) {
            found(Found::NoTurn(no_turn.clone()));
        }
        let origin = || Origin::Transcript { path: self.path.clone(), offset };
        let named = meaning.said_in.filter(|named| *named != session);
        let is_inherited = meaning.is_forked || named.is_some() || offset < self.inherited_to;
        let time = line_time(&meaning, is_inherited, self.active_max);
        // Behind the session's own lines nothing is a copy's beginning.
        let is_beginning = cursor.session.last_activity.is_none();
        if let Some(named) = named.filter(|_| is_beginning && meaning.is_envelope) {
            if other.as_ref().is_none_or(|other| other.session != named) {
                self.end_other(other, cursor, offset, found);
            }
            let other = other.get_or_insert_with(|| OtherSession {
                session: named,
                project_path: None,
                state: SessionState::default(),
            });
            let time = time.map(|time| LineTime { is_inherited: false, ..time });
            let told = self.note_session(named, &meaning, time, &mut other.project_path, &mut other.state, &origin);
            told.into_iter().flatten().for_each(|candidate| found(Found::OfOther(named, candidate)));
        } else if is_inherited {
            let _ = time.and_then(|time| cursor.session.note(time, self.inactivity_timeout));
        } else {
            if is_beginning && meaning.is_envelope {
                self.end_other(other, cursor, offset, found);
            }
            let Cursor { project_path, session: state, .. } = cursor;
            let told = self.note_session(session, &meaning, time, project_path, state, &origin);
            told.into_iter().flatten().for_each(|candidate| found(Found::Event(candidate)));
        }
        if let Some(turn) = meaning.turn {
            let timestamp = turn.timestamp.unwrap_or(self.active_max);
            let of_other = other.as_ref().filter(|other| turn.said_in == Some(other.session));
            let project_path = of_other.map_or(&cursor.project_path, |other| &other.project_path);
            let project_path = project_path.clone().or_else(|| turn.cwd.as_deref().map(Arc::from));
            found(Found::Event(Candidate {
                id: line::turn_event_id(&turn, session, offset, line),
                event_type: "turn_detected".to_owned(),
                timestamp,
                payload: turn.payload(session, project_path.as_deref(), timestamp),
                refs: ForeignKeys::default(),
                origin: origin(),
            }));
        }
    }

    /// Takes in a line of `session`: gives its end before a pause, and its registration at its first working directory.
    fn note_session(
        &self,
        session: Uuid,
        meaning: &LineMeaning,
        time: Option<LineTime>,
        project_path: &mut Option<Arc<str>>,
        state: &mut SessionState,
        origin: &impl Fn() -> Origin,
    ) -> [Option<Candidate>; 2] {
        let end = time.and_then(|time| state.note(time, self.inactivity_timeout));
        // What was not registered can't end.
        let end = end.filter(|_| project_path.is_some()).map(|end| end.candidate(session, origin()));
        let (None, Some(cwd)) = (&project_path, &meaning.cwd) else { return [end, None] };
        let said_at = time.map(|time| time.at);
        let started_at = said_at.max(state.began_at.filter(|_| meaning.is_envelope));
        let facts = SessionFacts {
            session,
            cwd,
            git_branch: meaning.git_branch.as_deref(),
            transcript_path: Some(&self.path),
            started_at,
        };
        let registered = Candidate {
            id: line::session_registered_event_id(session),
            event_type: "session_registered".to_owned(),
            timestamp: started_at.unwrap_or(self.active_max),
            payload: facts.payload(),
            refs: ForeignKeys::default(),
            origin: origin(),
        };
        *project_path = Some(cwd.as_str().into());
        [end, Some(registered)]
    }

    /// Ends the session whose lines came before: it has no file any more in which it could go on.
    fn end_other(
        &self,
        other: &mut Option<OtherSession>,
        cursor: &mut Cursor,
        offset: u64,
        found: &mut impl FnMut(Found),
    ) {
        let Some(other) = other.take() else { return };
        let gone = (EndReason::Unregistered, self.active_max);
        if let Some(end) = other.end(self.active_max, self.inactivity_timeout, Some(gone)) {
            let origin = Origin::Transcript { path: self.path.clone(), offset };
            found(Found::OfOther(other.session, end.candidate(other.session, origin)));
        }
        // It was the other's.
        cursor.session.ended_through = None;
    }

    fn unreadable(&self, bytes: &[u8], offset: u64, bad: &BadLine) -> Rejection {
        let kept = bytes.get(..KEPT_BYTES_MAX).unwrap_or(bytes);
        let cut = if kept.len() < bytes.len() {
            format!(" (of its {} bytes the first {KEPT_BYTES_MAX} are kept)", bytes.len())
        } else {
            String::new()
        };
        Rejection {
            failure: Failure {
                kind: FailureKind::Unreadable,
                message: format!("{bad}; from {} at byte {offset}{cut}", self.path),
                sqlstate: None,
            },
            event_type: None,
            origin: Origin::Transcript { path: self.path.clone(), offset },
            bytes: kept.to_vec(),
        }
    }

    /// What becomes of a line above `max_line_bytes`: it is passed over, and this says where it is.
    pub fn too_long(&self, line_bytes: u64, offset: u64) -> Rejection {
        Rejection {
            failure: Failure {
                kind: FailureKind::TooLarge,
                message: format!(
                    "the line has {line_bytes} bytes, more than file_watcher.max_line_bytes; it stands in {} at byte {offset}",
                    self.path
                ),
                sqlstate: None,
            },
            event_type: None,
            origin: Origin::Transcript { path: self.path.clone(), offset },
            bytes: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const SESSION: Uuid = Uuid::from_u128(1);
    const OTHER: Uuid = Uuid::from_u128(2);
    const THIRD: Uuid = Uuid::from_u128(3);

    fn state(time: &str) -> Value {
        json!({"type": "queue-operation", "timestamp": format!("2026-01-03T{time}:00.000Z")})
    }

    /// A prompt whose text is its time.
    fn said(session: Uuid, time: &str) -> Value {
        let at = format!("2026-01-03T{time}:00.000Z");
        json!({"type": "user", "uuid": time, "timestamp": at, "sessionId": session, "cwd": "/app", "message": {"content": time}})
    }

    fn source(inherited_to: u64) -> Source {
        Source {
            kind: TranscriptKind::Main { session: SESSION },
            path: "/p/a.jsonl".into(),
            inactivity_timeout: Duration::from_secs(2 * 3600),
            active_max: "2026-01-04T00:00:00Z".parse().unwrap(),
            inherited_to,
        }
    }

    /// What a found event says, in a word or two.
    fn word(found: Found) -> Option<String> {
        let (other, candidate) = match found {
            Found::Event(candidate) => ("", candidate),
            Found::OfOther(session, candidate) => {
                assert_eq!(candidate.payload["session_uuid"], session.to_string());
                ("other ", candidate)
            }
            Found::Unreadable(_) | Found::NoTurn(_) => return None,
        };
        let session = candidate.payload["session_uuid"].as_str().unwrap().chars().last().unwrap();
        let at = candidate.timestamp.strftime("%H:%M");
        Some(format!("{other}{} {session} {at}", candidate.event_type.rsplit('_').next().unwrap()))
    }

    /// What lines lead to, with the first `inherited` of them in another file, too. It must make no difference where
    /// reading is broken off and taken up again with the cursor and the lines before it.
    fn told(lines: &[Value], inherited: usize) -> Vec<String> {
        let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
        let offset_of = |number: usize| lines.iter().take(number).map(|line| line.len() as u64 + 1).sum::<u64>();
        let source = source(offset_of(inherited));
        let read = |broken_off_at: usize| {
            let (mut cursor, mut other, mut told) = (START, None, Vec::new());
            for (number, line) in lines.iter().enumerate() {
                if number == broken_off_at {
                    let mut scratch = START;
                    other = None;
                    for (number, line) in lines.iter().take(broken_off_at).enumerate() {
                        source.read(line.as_bytes(), offset_of(number), &mut scratch, &mut other, |_| {});
                    }
                }
                source.read(line.as_bytes(), offset_of(number), &mut cursor, &mut other, |found| {
                    told.extend(word(found))
                });
            }
            told
        };
        let whole = read(usize::MAX);
        for broken_off_at in 0..lines.len() {
            assert_eq!(read(broken_off_at), whole, "broken off at {broken_off_at}");
        }
        whole
    }

    #[test]
    fn what_was_inherited_is_neither_the_beginning_nor_an_end() {
        let lines = [state("12:00"), said(SESSION, "04:00"), said(SESSION, "09:00"), said(SESSION, "12:01")];
        assert_eq!(told(&lines, 3), ["detected 1 04:00", "detected 1 09:00", "registered 1 12:01", "detected 1 12:01"]);
        let as_an_original = ["registered 1 12:00", "detected 1 04:00", "detected 1 09:00", "detected 1 12:01"];
        assert_eq!(told(&lines, 0), as_an_original, "stamped state says when it was begun");
        let as_an_original = [
            "registered 1 04:00",
            "detected 1 04:00",
            "ended 1 06:00",
            "detected 1 09:00",
            "ended 1 11:00",
            "detected 1 12:01",
        ];
        assert_eq!(told(&lines[1..], 0), as_an_original);
    }

    #[test]
    fn another_session_at_the_beginning_is_told_of_until_something_of_the_files_own_comes() {
        let lines = [said(OTHER, "04:00"), said(OTHER, "09:00"), said(SESSION, "10:00"), said(SESSION, "10:30")];
        let expected = [
            "other registered 2 04:00",
            "detected 2 04:00",
            "other ended 2 06:00",
            "detected 2 09:00",
            "other ended 2 11:00",
            "registered 1 10:00",
            "detected 1 10:00",
            "detected 1 10:30",
        ];
        assert_eq!(told(&lines, 0), expected);
        // Behind the session's own lines it is no beginning.
        assert_eq!(told(&[&lines[2..], &lines[..1]].concat(), 0)[3..], ["detected 2 04:00"]);
        assert_eq!(told(&lines[..2], 0), expected[..4], "it may go on");
    }

    #[test]
    fn one_session_after_another_each_ends_where_the_next_begins() {
        let lines = [said(OTHER, "04:00"), state("05:00"), said(THIRD, "05:00"), said(SESSION, "06:00")];
        let expected = [
            "other registered 2 04:00",
            "detected 2 04:00",
            "other ended 2 06:00",
            "other registered 3 05:00",
            "detected 3 05:00",
            "other ended 3 07:00",
            "registered 1 06:00",
            "detected 1 06:00",
        ];
        assert_eq!(told(&lines, 0), expected);
        let forked = |messages: &str| {
            let mut line = said(SESSION, messages);
            line["forkedFrom"] = json!({"sessionId": OTHER, "messageUuid": messages});
            line
        };
        let expected = [
            "other registered 2 04:00",
            "detected 2 04:00",
            "other ended 2 06:00",
            "registered 1 05:00",
            "detected 1 05:00",
        ];
        assert_eq!(told(&[forked("04:00"), said(SESSION, "05:00")], 0), expected);
    }

    #[test]
    fn of_a_session_without_a_folder_nothing_is_told() {
        let mut line = said(OTHER, "04:00");
        line["cwd"] = Value::Null;
        let expected = ["detected 2 04:00", "registered 1 10:00", "detected 1 10:00"];
        assert_eq!(told(&[line, said(SESSION, "10:00")], 0), expected);
    }
}
