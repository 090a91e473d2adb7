//! From the lines of one transcript to events: the one way that the follower and `verify` both go.
//!
//! [`line`](mod@super::line) says what a line means by itself; here it is put beside what the lines before it said (the session's
//! registration, its pauses, its project), and what is damaged is salvaged. The same bytes give the same events with the
//! same identities, whenever and in however many pieces they are read.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::line::{self, LineMeaning, LineType};
use super::repair;
use crate::event::{Candidate, Cursor, ForeignKeys, SessionState, Timestamp};
use crate::session::{End, EndReason, LineTime};
use crate::transcript::{Found, LineReport, SessionLine, Source, TranscriptKind};

/// A session whose lines stand at the beginning of another's file, as old resumes and forks left them. Where its own file is
/// gone, this is all that tells of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct OtherSession {
    pub session: Uuid,
    project_path: Option<Arc<str>>,
    state: SessionState,
}

impl OtherSession {
    /// What was told of its end before.
    pub(crate) fn ended_through(mut self, ended_through: Option<Timestamp>) -> OtherSession {
        self.state.ended_through = ended_through;
        self
    }

    /// Its end, if that is to be told now.
    pub(crate) fn end(&self, now: Timestamp, timeout: Duration, gone: Option<(EndReason, Timestamp)>) -> Option<End> {
        self.state.end(now, timeout, gone).filter(|_| self.project_path.is_some())
    }

    /// Remembers that its end was told. Gives up to when that is.
    pub(crate) fn ended(&mut self, end: &End) -> Option<Timestamp> {
        self.state.ended(end);
        self.state.ended_through
    }
}

impl Source {
    /// Reads one line of Claude Code's, as [`Source::read`]. `other`: the session whose lines have just been read, if that
    /// is not the file's own.
    pub(crate) fn read_claude_code(
        &self,
        line: &[u8],
        offset: u64,
        cursor: &mut Cursor,
        other: &mut Option<OtherSession>,
        found: &mut impl FnMut(Found),
    ) -> LineReport {
        let mut report = LineReport::default();
        match line::read_line(line, &self.kind) {
            Ok(mut meaning) => {
                report.unknowns = std::mem::take(&mut meaning.unknowns);
                self.take(meaning, line, offset, cursor, other, found);
            }
            Err(bad) => {
                for (range, record) in repair::read_damaged(line, &self.kind, &bad) {
                    let bytes = line.get(range.clone()).unwrap_or_default();
                    let at = offset + range.start as u64;
                    match record {
                        Ok(mut meaning) => {
                            report.unknowns.append(&mut meaning.unknowns);
                            self.take(meaning, bytes, at, cursor, other, found);
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
            found(Found::NoTurn(no_turn.label()));
        }
        let origin = || self.origin(offset);
        let named = meaning.said_in.filter(|named| *named != session);
        let is_inherited = meaning.is_forked || named.is_some() || offset < self.inherited_to;
        let time = meaning.timestamp.map(|at| self.not_in_future(at));
        let time = time.map(|at| LineTime { at, is_envelope: meaning.is_envelope, is_inherited });
        let LineMeaning { is_envelope, .. } = meaning;
        let said = SessionLine { is_envelope, cwd: meaning.cwd.as_deref(), git_branch: meaning.git_branch.as_deref() };
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
            let told = self.note_session(named, said, time, &mut other.project_path, &mut other.state, &origin);
            told.into_iter().flatten().for_each(|candidate| found(Found::OfOther(named, candidate)));
        } else if is_inherited {
            let _ = time.and_then(|time| cursor.session.note(time, self.inactivity_timeout));
        } else {
            if is_beginning && meaning.is_envelope {
                self.end_other(other, cursor, offset, found);
            }
            let Cursor { project_path, session: state, .. } = cursor;
            let told = self.note_session(session, said, time, project_path, state, &origin);
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
            found(Found::OfOther(other.session, end.candidate(other.session, self.origin(offset))));
        }
        // It was the other's.
        cursor.session.ended_through = None;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::agent::{Agent, Memory};
    use crate::transcript::START;

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
            agent: Agent::ClaudeCode,
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
            let (mut cursor, mut memory, mut told) = (START, Memory::default(), Vec::new());
            for (number, line) in lines.iter().enumerate() {
                if number == broken_off_at {
                    let mut scratch = START;
                    memory = Memory::default();
                    for (number, line) in lines.iter().take(broken_off_at).enumerate() {
                        source.read(line.as_bytes(), offset_of(number), &mut scratch, &mut memory, |_| {});
                    }
                }
                source.read(line.as_bytes(), offset_of(number), &mut cursor, &mut memory, |found| {
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
