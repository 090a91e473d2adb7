//! What a transcript is to those who follow it, whichever agent wrote it: its kind, what its lines lead to, and what becomes of
//! those that can't be read.
//!
//! What a line means is for its agent's folder to say; `agent` asks the right one.

use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use thiserror::Error;
use uuid::Uuid;

use crate::event::{
    Candidate, Cursor, Failure, FailureKind, FileIdentity, ForeignKeys, Origin, Rejection, SessionState, Timestamp,
};
use crate::session::{Agent, LineTime, SessionFacts, session_registered_event_id};

/// Bytes of a damaged line that are kept; what is longer stands in the file, at the place that the message names.
const KEPT_BYTES_MAX: usize = 1 << 20;

/// Longest working directory, branch or model that is kept: no system has longer paths (Linux's PATH_MAX), and they go into
/// every turn.
pub(crate) const NAME_BYTES_MAX: usize = 4096;

/// Longest name or value of something unknown that is passed on.
pub(crate) const UNKNOWN_CHARS_MAX: usize = 64;

/// Where nothing has been read yet.
pub const START: Cursor = Cursor {
    file: FileIdentity { device: 0, inode: 0 },
    offset: 0,
    fingerprint: 0,
    project_path: None,
    session: SessionState { began_at: None, last_activity: None, ended_through: None, process: None },
};

/// What the place of a file below its agent's folder says about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TranscriptKind {
    /// The transcript of a session, whose identity is in the file's name.
    Main { session: Uuid },
    /// A sub-agent's: its lines are no turns.
    SubAgent,
}

/// Who said something.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub(crate) enum Actor {
    #[default]
    User,
    Agent,
}

impl Actor {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Actor::User => "user",
            Actor::Agent => "agent",
        }
    }
}

/// A transcript, as far as its lines need to know.
#[derive(Clone, Debug)]
pub struct Source {
    pub agent: Agent,
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

/// A name or value as it is passed on where it is not known.
pub(crate) fn shortened(value: &str) -> String {
    value.chars().take(UNKNOWN_CHARS_MAX).collect()
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

/// What a line led to.
pub enum Found {
    Event(Candidate),
    /// Registration or end of a session that is only named in this file. To be stored where it has no file of its own:
    /// that one knows better.
    OfOther(Uuid, Candidate),
    /// Bytes that are no whole record.
    Unreadable(Rejection),
    /// A line of the user's side that is no turn, and why: a name to count by.
    NoTurn(&'static str),
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

/// A complete line that is no JSON object. The message names cause and column, never text of the line.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("{message}")]
pub struct BadLine {
    pub message: String,
}

/// Something on a line that the format did not have when this was written. It is judged all the same.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Unknown {
    /// The field, `type` being that of the line, or `unlabelled` for words that say nothing of who typed them, from a version
    /// that says so of all.
    pub field: &'static str,
    pub value: String,
    /// The version of the agent that wrote the line; empty where it does not say.
    pub version: String,
}

/// What `explain` shows of a line, or of one turn that it led to.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Explained {
    pub(crate) line_type: String,
    /// `Err`: why it is no turn.
    pub(crate) turn: Result<ExplainedTurn, String>,
    pub(crate) unknowns: Vec<Unknown>,
}

#[derive(Clone, PartialEq, Debug)]
pub(crate) struct ExplainedTurn {
    pub(crate) actor: &'static str,
    pub(crate) kind: Option<&'static str>,
    pub(crate) provenance: Option<&'static str>,
    pub(crate) uuid: Option<String>,
    pub(crate) text: String,
}

/// The field of an [`Unknown`] that is a type of lines.
pub(crate) const UNKNOWN_TYPE: &str = "type";

/// What a line says of its session.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SessionLine<'a> {
    /// Whether it belongs to the conversation.
    pub(crate) is_envelope: bool,
    pub(crate) cwd: Option<&'a str>,
    pub(crate) git_branch: Option<&'a str>,
}

impl Source {
    /// When a line was said, as far as its session's activity is concerned: a time in the future is no time.
    pub(crate) fn not_in_future(&self, at: Timestamp) -> Timestamp {
        if at.duration_since(self.active_max) > CLOCK_SLACK { self.active_max } else { at }
    }

    pub(crate) fn origin(&self, offset: u64) -> Origin {
        Origin::Transcript { path: self.path.clone(), offset }
    }

    /// Takes in a line of `session`: gives its end before a pause, and its registration at its first working directory.
    pub(crate) fn note_session(
        &self,
        session: Uuid,
        said: SessionLine<'_>,
        time: Option<LineTime>,
        project_path: &mut Option<Arc<str>>,
        state: &mut SessionState,
        origin: &impl Fn() -> Origin,
    ) -> [Option<Candidate>; 2] {
        let end = time.and_then(|time| state.note(time, self.inactivity_timeout));
        // What was not registered can't end.
        let end = end.filter(|_| project_path.is_some()).map(|end| end.candidate(session, origin()));
        let (None, Some(cwd)) = (&project_path, said.cwd) else { return [end, None] };
        let said_at = time.map(|time| time.at);
        let started_at = said_at.max(state.began_at.filter(|_| said.is_envelope));
        let facts = SessionFacts {
            agent: Some(self.agent),
            session,
            cwd,
            git_branch: said.git_branch,
            transcript_path: Some(&self.path),
            started_at,
        };
        let registered = Candidate {
            id: session_registered_event_id(session),
            event_type: "session_registered".to_owned(),
            timestamp: started_at.unwrap_or(self.active_max),
            payload: facts.payload(),
            refs: ForeignKeys::default(),
            origin: origin(),
        };
        *project_path = Some(cwd.into());
        [end, Some(registered)]
    }

    pub(crate) fn unreadable(&self, bytes: &[u8], offset: u64, bad: &BadLine) -> Rejection {
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
            origin: self.origin(offset),
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
            origin: self.origin(offset),
            bytes: Vec::new(),
        }
    }
}
