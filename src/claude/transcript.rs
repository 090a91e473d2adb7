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
use super::session::{End, LineTime};
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
}

/// How much later than [`Source::active_max`] a line's time may be: clocks of file systems are coarse, or another machine's.
const CLOCK_SLACK: SignedDuration = SignedDuration::from_secs(10);

/// When a line was said, as far as its session's activity is concerned: a time in the future is no time.
fn line_time(meaning: &LineMeaning, session: Uuid, active_max: Timestamp) -> Option<LineTime> {
    let is_inherited = meaning.is_forked || meaning.session.is_some_and(|named| named != session);
    let at = meaning.timestamp?;
    let at = if at.duration_since(active_max) > CLOCK_SLACK { active_max } else { at };
    Some(LineTime { at, is_envelope: meaning.is_envelope, is_inherited })
}

/// Notes the time of a line; the first of the session's own conversation tells whether the session is a copy. Gives the
/// end of the session before it, if any.
fn note(
    time: LineTime,
    cursor: &mut Cursor,
    copied_at: &mut Option<Timestamp>,
    inactivity_timeout: Duration,
) -> Option<End> {
    let was_undecided = cursor.session.last_activity.is_none();
    let end = cursor.session.note(time, inactivity_timeout);
    if was_undecided && cursor.session.last_activity.is_some() {
        // That line was said before the session began.
        *copied_at = cursor.session.began_at.filter(|began_at| *began_at > time.at);
    }
    end
}

/// When the session of a transcript was copied from another, by the lines before a cursor; `None` where it was not, or
/// where those lines do not tell yet. `head` is what comes before the cursor, or enough of it: `Err` asks for more.
pub fn copied_at(head: &[u8], kind: &TranscriptKind, cursor: &Cursor) -> Result<Option<Timestamp>, HeadTooShort> {
    let TranscriptKind::Main { session } = kind else { return Ok(None) };
    if cursor.session.last_activity.is_none() {
        return Ok(None);
    }
    let of_first_own_line = |meaning: &LineMeaning| {
        let time = line_time(meaning, *session, Timestamp::MAX)?;
        // The session began then, or when it was copied: what the cursor says is later than the line in a copy only.
        (time.is_envelope && !time.is_inherited).then(|| cursor.session.began_at.filter(|began_at| *began_at > time.at))
    };
    for piece in head.split_inclusive(|byte| *byte == b'\n') {
        let line = piece.strip_suffix(b"\n").unwrap_or(piece);
        let copied_at = match line::read_line(line, kind) {
            Ok(meaning) => of_first_own_line(&meaning),
            // Cut off where the head ends.
            Err(_) if line.len() == piece.len() => break,
            Err(bad) => repair::read_damaged(line, kind, &bad).find_map(|(_, record)| of_first_own_line(&record.ok()?)),
        };
        if let Some(copied_at) = copied_at {
            return Ok(copied_at);
        }
    }
    Err(HeadTooShort)
}

/// The lines that were looked at do not tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeadTooShort;

/// What bytes without a newline at the end of a file are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LastLine {
    /// Blanks, or NULs as a crash leaves them.
    Blank,
    /// One whole JSON object: nothing that could still follow would change it.
    Complete,
    Incomplete,
}

/// Judges the bytes behind the last newline of a file.
pub fn last_line(line: &[u8], kind: &TranscriptKind) -> LastLine {
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
    /// The name of a type that is not known.
    pub unknown_type: Option<String>,
    /// What else it has that the format did not have when this was written.
    pub unknowns: Vec<Unknown>,
}

impl Source {
    /// Reads one complete line, given without its newline, that begins at `offset`. Moves everything in `cursor` but
    /// its place, and notes in `copied_at` when the session was copied from another: what the lines before said of it is
    /// handed in again with the cursor (see [`copied_at`]).
    pub fn read(
        &self,
        line: &[u8],
        offset: u64,
        cursor: &mut Cursor,
        copied_at: &mut Option<Timestamp>,
        mut found: impl FnMut(Found),
    ) -> LineReport {
        let mut report = LineReport::default();
        if line.iter().all(u8::is_ascii_whitespace) {
            report.is_blank = true;
            return report;
        }
        match line::read_line(line, &self.kind) {
            Ok(mut meaning) => {
                report.unknown_type = meaning.unknown_type.take();
                report.unknowns = std::mem::take(&mut meaning.unknowns);
                self.take(meaning, line, offset, cursor, copied_at, &mut found);
            }
            Err(bad) => {
                for (range, record) in repair::read_damaged(line, &self.kind, &bad) {
                    let bytes = line.get(range.clone()).unwrap_or_default();
                    let at = offset + range.start as u64;
                    match record {
                        Ok(mut meaning) => {
                            report.unknown_type = report.unknown_type.take().or(meaning.unknown_type.take());
                            report.unknowns.append(&mut meaning.unknowns);
                            self.take(meaning, bytes, at, cursor, copied_at, &mut found);
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
        copied_at: &mut Option<Timestamp>,
        found: &mut impl FnMut(Found),
    ) {
        let TranscriptKind::Main { session } = self.kind else { return };
        if let (LineType::User | LineType::Attachment, Some(no_turn)) = (meaning.line_type, &meaning.no_turn) {
            found(Found::NoTurn(no_turn.clone()));
        }
        let origin = || Origin::Transcript { path: self.path.clone(), offset };
        let time = line_time(&meaning, session, self.active_max);
        if cursor.session.last_activity.is_none() {
            *copied_at = None;
        }
        let end = time.and_then(|time| note(time, cursor, copied_at, self.inactivity_timeout));
        // What was not registered can't end.
        if let (Some(end), Some(_)) = (end, &cursor.project_path) {
            found(Found::Event(end.candidate(session, origin())));
        }
        if let (None, Some(cwd)) = (&cursor.project_path, &meaning.cwd) {
            let said_at = time.map(|time| time.at);
            let started_at = said_at.max(cursor.session.began_at.filter(|_| meaning.is_envelope));
            let facts = SessionFacts {
                session,
                cwd,
                git_branch: meaning.git_branch.as_deref(),
                transcript_path: Some(&self.path),
                started_at,
            };
            found(Found::Event(Candidate {
                id: line::session_registered_event_id(session),
                event_type: "session_registered".to_owned(),
                timestamp: started_at.unwrap_or(self.active_max),
                payload: facts.payload(),
                refs: ForeignKeys::default(),
                origin: origin(),
            }));
            cursor.project_path = Some(cwd.clone());
        }
        if let Some(turn) = meaning.turn {
            // A line that names another session says itself where it comes from.
            let is_told = turn.said_in.is_some_and(|said_in| said_in != session);
            let copied_at = copied_at.filter(|copied_at| !is_told && turn.timestamp.is_some_and(|at| at < *copied_at));
            let timestamp = turn.timestamp.unwrap_or(self.active_max);
            found(Found::Event(Candidate {
                id: line::turn_event_id(&turn, session, offset, line),
                event_type: "turn_detected".to_owned(),
                timestamp,
                payload: turn.payload(session, cursor.project_path.as_deref(), timestamp, copied_at),
                refs: ForeignKeys::default(),
                origin: origin(),
            }));
        }
    }

    /// The session of a main transcript.
    pub fn session(&self) -> Option<Uuid> {
        match self.kind {
            TranscriptKind::Main { session } => Some(session),
            TranscriptKind::SubAgent => None,
        }
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

    fn at(time: &str) -> String {
        format!("2026-01-03T{time}.000Z")
    }

    fn state(time: &str) -> Value {
        json!({"type": "queue-operation", "timestamp": at(time)})
    }

    /// A prompt whose text is its time.
    fn said(time: &str) -> Value {
        json!({"type": "user", "uuid": time, "timestamp": at(time), "sessionId": SESSION, "message": {"content": time}})
    }

    fn with(mut line: Value, name: &str, value: Value) -> Value {
        line[name] = value;
        line
    }

    /// The texts of the turns that are marked. It must make no difference where reading is broken off and taken up again
    /// with nothing but the cursor and the file.
    fn marked(lines: &[Value]) -> Vec<String> {
        let kind = TranscriptKind::Main { session: SESSION };
        let source = Source {
            kind,
            path: "/p/a.jsonl".into(),
            inactivity_timeout: Duration::from_secs(60),
            active_max: Timestamp::MAX,
        };
        let lines: Vec<String> = lines
            .iter()
            .map(|line| line.as_str().map_or_else(|| line.to_string(), str::to_owned))
            .map(|line| line + "\n")
            .collect();
        let read = |broken_off_at: usize| {
            let (mut cursor, mut copied_at, mut marked) = (START, None, Vec::new());
            let mut file = String::new();
            for (number, line) in lines.iter().enumerate() {
                if number == broken_off_at {
                    copied_at = super::copied_at(file.as_bytes(), &kind, &cursor).unwrap();
                }
                let offset = file.len() as u64;
                source.read(line.trim_end().as_bytes(), offset, &mut cursor, &mut copied_at, |found| {
                    let Found::Event(candidate) = found else { return };
                    if let Some(copied_at) = candidate.payload.get("metadata").map(|metadata| &metadata["copied_at"]) {
                        assert_eq!(*copied_at, at("12:00:00"));
                        marked.push(candidate.payload["text"].as_str().unwrap().to_owned());
                    }
                });
                file += line;
            }
            marked
        };
        let whole = read(usize::MAX);
        for broken_off_at in 0..lines.len() {
            assert_eq!(read(broken_off_at), whole, "broken off at {broken_off_at}");
        }
        whole
    }

    #[test]
    fn what_a_copy_inherited_is_marked_and_what_was_said_in_it_is_not() {
        let lines = [state("12:00:00"), said("08:00:00"), said("09:00:00"), said("12:00:05"), said("13:00:00")];
        assert_eq!(marked(&lines), ["08:00:00", "09:00:00"]);
        // Lines are not in the order of their times.
        let lines = [state("12:00:00"), said("09:00:00"), said("12:00:05"), said("08:00:00")];
        assert_eq!(marked(&lines), ["09:00:00", "08:00:00"]);
    }

    #[test]
    fn a_copy_is_known_behind_damage_and_behind_state_without_a_time() {
        let untimed = json!({"type": "summary", "summary": "x"});
        let lines = [json!("garbage"), untimed, state("12:00:00"), state("12:30:00"), said("08:00:00")];
        assert_eq!(marked(&lines), ["08:00:00"]);
        let joined = format!("{}{}", said("08:00:00"), said("09:00:00"));
        assert_eq!(marked(&[state("12:00:00"), json!(joined), said("10:00:00")]), ["08:00:00", "09:00:00", "10:00:00"]);
    }

    #[test]
    fn no_turn_of_an_original_is_marked() {
        assert_eq!(marked(&[said("12:00:00"), said("08:00:00")]), [""; 0], "out of order");
        assert_eq!(marked(&[state("12:00:00"), said("12:00:00"), said("11:00:00")]), [""; 0]);
        assert_eq!(marked(&[state("12:00:30"), said("12:00:00")]), [""; 0], "a prompt that came with its state");
        assert_eq!(marked(&[said("08:00:00"), state("12:00:00"), said("09:00:00")]), [""; 0], "state in the middle");
    }

    #[test]
    fn lines_that_say_themselves_where_they_come_from_are_not_marked() {
        let resumed = with(said("08:00:00"), "sessionId", json!(OTHER));
        let forked = with(said("08:00:01"), "forkedFrom", json!({"sessionId": OTHER, "messageUuid": "x"}));
        assert_eq!(marked(&[resumed.clone(), forked.clone(), said("12:00:00")]), [""; 0]);
        let lines = [state("12:00:00"), resumed, forked, said("09:00:00"), said("12:00:01")];
        assert_eq!(marked(&lines), ["09:00:00"], "a copy of what had such lines");
    }

    #[test]
    fn a_head_that_does_not_tell_asks_for_more() {
        let kind = TranscriptKind::Main { session: SESSION };
        let source = Source {
            kind,
            path: "/p/a.jsonl".into(),
            inactivity_timeout: Duration::from_secs(60),
            active_max: Timestamp::MAX,
        };
        let file = format!("{}\n{}\n", state("12:00:00"), said("08:00:00"));
        let mut cursor = START;
        for line in file.lines() {
            source.read(line.as_bytes(), 0, &mut cursor, &mut None, |_| {});
        }
        for length in 0..file.len() - 1 {
            assert_eq!(copied_at(&file.as_bytes()[..length], &kind, &cursor), Err(HeadTooShort), "{length}");
        }
        let whole = Ok(Some(at("12:00:00").parse().unwrap()));
        assert_eq!(copied_at(file.as_bytes(), &kind, &cursor), whole);
        assert_eq!(copied_at(file.trim_end().as_bytes(), &kind, &cursor), whole, "a last line without newline");
        assert_eq!(copied_at(b"", &kind, &START), Ok(None), "nothing has been read");
    }
}
