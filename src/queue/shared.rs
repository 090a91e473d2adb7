//! What the handles and the writer share.

use std::borrow::Cow;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

use tokio::sync::watch;
use uuid::Uuid;

use super::codec::{self, CodecError, Marks};
use super::files;
use super::log::{Log, Source};
use super::piece;
use super::reader;
use super::segment::StoreError;
use super::submission::{EncodedBatch, Inbox};
use super::values::{Batch, QueueConfig, QueueError, QueueStats};
use crate::event::{Cursor, FailureKind, Origin, Rejection, Sequence, Timestamp};

/// Longest path of a project that is kept: above what any system takes.
const PATH_BYTES_MAX: usize = 8 << 10;

/// The share of `max_pending_bytes` up to which the input of rejections is kept: one quarter.
const DEAD_LETTER_SHARE: u64 = 4;

/// Dead letters above which those of one file and batch are one, and twice above which no more are kept of what never was an
/// event: the file they are from still has it.
const DEAD_LETTERS_MAX: u64 = 10_000;

pub(super) struct Shared {
    pub config: QueueConfig,
    /// Nothing in its folder may change.
    is_looked_at: bool,
    pub inbox: Arc<Inbox>,
    /// `None` once closed. Readers clone it and let go.
    pub log: RwLock<Option<Arc<Log>>>,
    state: Mutex<State>,
    /// Signalled when room appears, and at the end.
    pub room: Condvar,
    pub newest: watch::Sender<Option<Sequence>>,
    pub failed: watch::Sender<Option<QueueError>>,
}

#[derive(Default)]
pub(super) struct State {
    /// Of what has been synced; what is settled may not be, yet.
    pub marks: Marks,
    pub oldest: Option<(Sequence, Timestamp)>,
    /// Of the last batch for which there was no room; 0 when events were taken in since.
    pub refused_bytes: u64,
    /// Events that were missing when it was opened.
    pub missing: u64,
    pub disk_bytes: u64,
}

impl Shared {
    pub(super) fn new(config: &QueueConfig, log: Log, marks: &Marks) -> Result<Shared, StoreError> {
        let last = marks.acknowledged.sequence;
        let oldest = reader::oldest(&log, marks.settled.sequence + 1, last)?;
        let state = State { marks: *marks, oldest, disk_bytes: log.bytes(), ..State::default() };
        Ok(Shared {
            config: config.clone(),
            is_looked_at: matches!(log.newest, Source::Raw(_)),
            inbox: Arc::default(),
            log: RwLock::new(Some(Arc::new(log))),
            state: Mutex::new(state),
            room: Condvar::new(),
            newest: watch::Sender::new(oldest.and(Sequence::new(last))),
            failed: watch::Sender::new(None),
        })
    }

    pub(super) fn stats(&self, state: &State) -> QueueStats {
        let (pending, pending_bytes) = state.marks.pending();
        QueueStats {
            pending,
            pending_bytes,
            oldest: state.oldest,
            dead_letters: state.marks.letters.count,
            missing: state.missing,
            disk_bytes: state.disk_bytes,
            full: pending > 0
                && pending_bytes.saturating_add(state.refused_bytes.max(1)) > self.config.max_pending_bytes,
            last_sequence: Sequence::new(state.marks.acknowledged.sequence),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The log as it is now, for reading.
    pub(super) fn log(&self) -> Result<Arc<Log>, QueueError> {
        if let Some(failure) = self.failed.borrow().clone() {
            return Err(failure);
        }
        self.log.read().unwrap_or_else(PoisonError::into_inner).clone().ok_or(QueueError::Closed)
    }

    /// A failed read ends the queue as a failed write does.
    pub(super) fn reading<T>(&self, result: Result<T, StoreError>) -> Result<T, QueueError> {
        result.map_err(|error| self.fail(&error))
    }

    /// Fail-stop: remembers the first error, refuses everything from now on, tells who watches.
    pub(super) fn fail(&self, error: &StoreError) -> QueueError {
        if let StoreError::Damaged { segment, cause } | StoreError::NotWritten { segment, cause } = error
            && !self.is_looked_at
        {
            // A disk that is failing may not take it: then the damage is only met again.
            let _ = files::note_damaged(&self.config.path, *segment, cause);
        }
        let first = self.failed.borrow().clone().unwrap_or_else(|| error.of_queue(&self.config.path));
        self.failed.send_replace(Some(first.clone()));
        self.end(first.clone());
        first
    }

    /// Refuses everything from now on.
    pub(super) fn end(&self, error: QueueError) {
        self.inbox.end(error);
        // Who waits for room is not just between looking and waiting.
        drop(self.state());
        self.room.notify_all();
    }

    pub(super) fn encode(&self, batch: &Batch, captured_at: Timestamp) -> Result<EncodedBatch, QueueError> {
        let too_large = |error: CodecError| QueueError::TooLarge { cause: error.to_string() };
        let letters = self.state().marks.letters;
        let events = batch.events.iter().map(|event| codec::encode_event(event, captured_at, 0));
        let events = events.collect::<Result<Vec<_>, _>>().map_err(too_large)?;
        let mut room = (self.config.max_pending_bytes / DEAD_LETTER_SHARE).saturating_sub(letters.bytes);
        let mut rejections = Vec::with_capacity(batch.rejections.len());
        let is_notice = batch.rejections.iter().any(|rejection| rejection.failure.kind == FailureKind::Damaged);
        let mut kept = Cow::Borrowed(&batch.rejections);
        if !is_notice && letters.count + batch.rejections.len() as u64 > DEAD_LETTERS_MAX {
            let left = (2 * DEAD_LETTERS_MAX).saturating_sub(letters.count);
            kept = Cow::Owned(gathered_by_file(&batch.rejections));
            kept.to_mut().truncate(usize::try_from(left).unwrap_or(usize::MAX));
        }
        for rejection in kept.iter() {
            let mut rejection = Cow::Borrowed(rejection);
            match room.checked_sub(rejection.bytes.len() as u64) {
                Some(left) => room = left,
                None => rejection = Cow::Owned(without_bytes(&rejection)),
            }
            rejections.push(codec::encode_rejection(&rejection, captured_at).map_err(too_large)?);
        }
        let cursors = batch.cursors.iter().map(|(path, cursor)| encode_cursor(path, cursor.as_ref()));
        let session_ends = batch.session_ends.iter().map(|(session, at)| encode_session_end(*session, *at));
        let keyed = cursors.chain(session_ends).collect::<Result<Vec<_>, _>>().map_err(too_large)?;
        Ok(EncodedBatch { events, rejections, keyed })
    }
}

/// Of those that follow one another in a file one that stands for all; others as they are.
fn gathered_by_file(rejections: &[Rejection]) -> Vec<Rejection> {
    let is_of_one_file = |one: &Rejection, next: &Rejection| match (&one.origin, &next.origin) {
        (Origin::Transcript { path, .. }, Origin::Transcript { path: of_next, .. }) => path == of_next,
        _ => false,
    };
    let gathered = rejections.chunk_by(is_of_one_file).flat_map(|of_file| {
        let mut one = of_file.first()?.clone();
        if let Origin::Transcript { path, offset: first } = &one.origin
            && let [_, .., Rejection { origin: Origin::Transcript { offset: last, .. }, .. }] = of_file
        {
            one.bytes.clear();
            one.failure.kind = FailureKind::Unreadable;
            one.failure.message = format!(
                "{} pieces from byte {first} to byte {last} of {path} are no events; they are not kept one by one, for there \
                 are too many dead letters",
                of_file.len()
            );
        }
        Some(one)
    });
    gathered.collect()
}

fn without_bytes(rejection: &Rejection) -> Rejection {
    let mut rejection = Rejection { bytes: Vec::new(), ..rejection.clone() };
    rejection.failure.message.push_str(" (its bytes were not kept: there are too many dead letters)");
    rejection
}

/// Its kind, number and record; that is empty where the cursor is to be removed.
fn encode_cursor(path: &Path, cursor: Option<&Cursor>) -> Result<(u8, u64, Vec<u8>), CodecError> {
    let cursor = cursor.cloned().map(|mut cursor| {
        // No folder has such a name: better to forget it than to be unable to store the cursor.
        cursor.project_path.take_if(|path| path.len() > PATH_BYTES_MAX);
        codec::encode_cursor(path, &cursor)
    });
    Ok((piece::CURSOR, piece::number_of_path(path), cursor.transpose()?.unwrap_or_default()))
}

/// As for a cursor.
fn encode_session_end(session: Uuid, at: Option<Timestamp>) -> Result<(u8, u64, Vec<u8>), CodecError> {
    let record = at.map(|at| codec::encode_session_end(session, at)).transpose()?.unwrap_or_default();
    Ok((piece::SESSION_END, piece::number_of_session(session), record))
}
