//! From the lines of one transcript to events: the one way that the follower and `verify` both go.
//!
//! [`claude_code`] says what a line means by itself; here it is put beside what the lines before it said (the session's
//! registration, its pauses, its project), and what is damaged is salvaged. The same bytes give the same events with the
//! same identities, whenever and in however many pieces they are read.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::claude_code::{self, BadLine, LineMeaning, Segment, SessionFacts, TranscriptKind};
use super::schema::Candidate;
use super::sessions::LineTime;
use crate::event::{
    Cursor, Failure, FailureKind, FileIdentity, ForeignKeys, Origin, Rejection, SessionState, Timestamp,
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
}

/// What a line led to.
pub enum Found {
    Event(Candidate),
    /// Bytes that are no whole record.
    Unreadable(Rejection),
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
}

impl Source {
    /// Reads one complete line, given without its newline, that begins at `offset`. Moves everything in `cursor` but
    /// its place.
    pub fn read(&self, line: &[u8], offset: u64, cursor: &mut Cursor, mut found: impl FnMut(Found)) -> LineReport {
        let mut report = LineReport::default();
        if line.iter().all(u8::is_ascii_whitespace) {
            report.is_blank = true;
            return report;
        }
        match claude_code::read_line(line, &self.kind) {
            Ok(meaning) => self.take(meaning, line, offset, cursor, &mut report, &mut found),
            Err(bad) => {
                for segment in claude_code::salvage(line) {
                    let (Segment::Record(range) | Segment::Lost(range)) = &segment;
                    let bytes = line.get(range.clone()).unwrap_or_default();
                    let at = offset + range.start as u64;
                    let record = match segment {
                        Segment::Record(_) => claude_code::read_line(bytes, &self.kind),
                        Segment::Lost(_) => Err(bad.clone()),
                    };
                    match record {
                        Ok(meaning) => self.take(meaning, bytes, at, cursor, &mut report, &mut found),
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
        report: &mut LineReport,
        found: &mut impl FnMut(Found),
    ) {
        report.unknown_type = report.unknown_type.take().or(meaning.unknown_type);
        let TranscriptKind::Main { session } = self.kind else { return };
        let origin = || Origin::Transcript { path: self.path.clone(), offset };
        let is_inherited = meaning.is_forked || meaning.session.is_some_and(|named| named != session);
        let time = meaning.timestamp.map(|at| LineTime { at, is_envelope: meaning.is_envelope, is_inherited });
        let end = time.and_then(|time| cursor.session.note(time, self.inactivity_timeout));
        // What was not registered can't end.
        if let (Some(end), Some(_)) = (end, &cursor.project_path) {
            found(Found::Event(end.candidate(session, origin())));
        }
        if let (None, Some(cwd)) = (&cursor.project_path, &meaning.cwd) {
            let started_at = meaning.timestamp.max(cursor.session.began_at.filter(|_| meaning.is_envelope));
            let facts = SessionFacts {
                session,
                cwd,
                git_branch: meaning.git_branch.as_deref(),
                transcript_path: Some(&self.path),
                started_at,
            };
            found(Found::Event(Candidate {
                id: claude_code::session_registered_event_id(session),
                event_type: "session_registered".to_owned(),
                timestamp: started_at.unwrap_or_else(Timestamp::now),
                payload: facts.payload(),
                refs: ForeignKeys::default(),
                origin: origin(),
            }));
            cursor.project_path = Some(cwd.clone());
        }
        if let Some(turn) = meaning.turn {
            let timestamp = turn.timestamp.unwrap_or_else(Timestamp::now);
            found(Found::Event(Candidate {
                id: claude_code::turn_event_id(&turn, session, offset, line),
                event_type: "turn_detected".to_owned(),
                timestamp,
                payload: turn.payload(session, cursor.project_path.as_deref(), timestamp),
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
