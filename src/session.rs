//! When a session is active and when it has ended, by what its lines say, whichever agent's they are; and what is told of
//! it. Pure: the time is an argument.
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

use std::time::Duration;

use jiff::SignedDuration;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::event::{Candidate, EventId, ForeignKeys, Origin, SessionState, Timestamp};

/// Who wrote a transcript.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Agent {
    ClaudeCode,
    CodexCli,
}

impl Agent {
    /// As events name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Agent::ClaudeCode => "claude-code",
            Agent::CodexCli => "codex-cli",
        }
    }
}

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
pub(crate) fn session_ended_event_id(session: Uuid, last_activity: Option<Timestamp>) -> EventId {
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

/// The identity of a session's registration.
pub(crate) fn session_registered_event_id(session: Uuid) -> EventId {
    EventId::derived(format!("session_registered/{session}").as_bytes())
}

/// What is known when a session is first seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SessionFacts<'a> {
    /// `None`: not known.
    pub agent: Option<Agent>,
    pub session: Uuid,
    /// The first working directory: project path and working directory at once.
    pub cwd: &'a str,
    pub git_branch: Option<&'a str>,
    pub transcript_path: Option<&'a str>,
    pub started_at: Option<Timestamp>,
}

impl SessionFacts<'_> {
    /// The payload of `session_registered`.
    pub(crate) fn payload(&self) -> Map<String, Value> {
        known([
            ("agent", self.agent.map(|agent| agent.as_str().into())),
            ("session_uuid", Some(self.session.to_string().into())),
            ("project_path", Some(self.cwd.into())),
            ("working_directory", Some(self.cwd.into())),
            ("git_branch", self.git_branch.map(Value::from)),
            ("transcript_path", self.transcript_path.map(Value::from)),
            ("started_at", self.started_at.map(|at| iso_8601(at).into())),
        ])
    }
}

/// The identity of the turn whose line has this uuid: `turn_uuid` in its payload.
pub(crate) fn event_id_of_turn(uuid: &str) -> EventId {
    EventId::derived(format!("turn/{uuid}").as_bytes())
}

/// A copy is made this long after its first line was said, at least. In originals the two are milliseconds to some
/// seconds apart, in copies minutes or hours.
const COPY_DELAY_SECONDS_MIN: i64 = 60;

/// Whether a transcript that was opened at `opened_at` and whose first line was said at `said_at` is a copy.
pub(crate) fn is_copied_by(opened_at: Timestamp, said_at: Timestamp) -> bool {
    opened_at.as_second() - said_at.as_second() >= COPY_DELAY_SECONDS_MIN
}

/// Milliseconds, as agents write them; finer where the line was.
pub(crate) fn iso_8601(timestamp: Timestamp) -> String {
    if timestamp.subsec_nanosecond() % 1_000_000 == 0 { format!("{timestamp:.3}") } else { timestamp.to_string() }
}

/// The fields of a payload that have a value.
pub(crate) fn known<const N: usize>(fields: [(&str, Option<Value>); N]) -> Map<String, Value> {
    fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
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
}
