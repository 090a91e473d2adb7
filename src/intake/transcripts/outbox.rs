//! Batches on their way into the queue: one is in flight, and what comes meanwhile is gathered into the next.
//!
//! Order within a file holds because a batch is submitted only once the one before it is durable: no cursor runs ahead of
//! the events before it. Many small files share a sync.
//!
//! A batch that finds no room is submitted again when there is some. If the follower is stopped instead, that batch and all
//! that came after it are dropped: the cursors in the queue say where the next start reads on.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::watching::Doorbell;
use crate::event::Sequence;
use crate::intake::{Intake, Submission};
use crate::queue::{Accepted, Batch, QueueError};

/// Of a batch that is gathered while another is in flight: cursors, and bytes of payloads.
const BATCH_CURSORS_MAX: usize = 256;
const BATCH_BYTES: usize = 64 << 10;

/// How often the wait for room checks whether it is to stop.
const ROOM_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Where batches go.
pub(crate) trait Port {
    type Submission;
    /// Submits a batch. One that was refused can be submitted again.
    fn submit(&self, batch: &mut Batch) -> Self::Submission;
    /// Whether waiting for the answer takes no time.
    fn is_answered(submission: &Self::Submission) -> bool;
    fn wait(submission: Self::Submission) -> Result<Accepted, QueueError>;
    /// Waits while there is no room. False: the follower is to stop.
    fn wait_for_room(&self) -> bool;
}

/// The queue.
pub(crate) struct QueuePort {
    pub(crate) intake: Arc<Intake>,
    pub(crate) doorbell: Doorbell,
}

impl Port for QueuePort {
    type Submission = Submission;

    fn submit(&self, batch: &mut Batch) -> Submission {
        self.intake.submit(batch)
    }

    fn is_answered(submission: &Submission) -> bool {
        submission.is_answered()
    }

    fn wait(submission: Submission) -> Result<Accepted, QueueError> {
        submission.wait()
    }

    fn wait_for_room(&self) -> bool {
        while !self.doorbell.is_stopped() && !self.intake.queue().wait_for_room(Instant::now() + ROOM_CHECK_INTERVAL) {
            self.intake.metrics().live.reading.beat();
        }
        !self.doorbell.is_stopped()
    }
}

pub(crate) struct Outbox<P: Port> {
    port: P,
    in_flight: Option<(P::Submission, Batch)>,
    gathered: Batch,
    /// It was stopped while a batch found no room.
    is_cut_off: bool,
    /// The newest event of each file of which some may not be delivered.
    newest: HashMap<PathBuf, Sequence>,
    /// What an earlier run left in the queue is delivered.
    is_backlog_delivered: bool,
    /// The newest event of earlier runs.
    backlog: Option<Sequence>,
}

impl<P: Port> Outbox<P> {
    /// `backlog`: the newest event of earlier runs.
    pub(crate) fn new(port: P, backlog: Option<Sequence>) -> Outbox<P> {
        Outbox {
            port,
            in_flight: None,
            gathered: Batch::default(),
            is_cut_off: false,
            newest: HashMap::new(),
            is_backlog_delivered: false,
            backlog,
        }
    }

    /// Adds a batch to what is gathered, and submits that if the batch before it is durable, or if it is large. Cursors
    /// alone wait for company, as each submission costs a sync: losing them only reads those lines again.
    pub(crate) fn submit(&mut self, mut batch: Batch) -> Result<(), QueueError> {
        let is_urgent = !batch.events.is_empty() || !batch.rejections.is_empty();
        self.gathered.events.append(&mut batch.events);
        self.gathered.rejections.append(&mut batch.rejections);
        self.gathered.cursors.append(&mut batch.cursors);
        self.gathered.session_ends.append(&mut batch.session_ends);
        let is_free = self.in_flight.as_ref().is_none_or(|(submission, _)| P::is_answered(submission));
        if is_urgent && is_free || is_large(&self.gathered) { self.submit_gathered() } else { Ok(()) }
    }

    /// Returns when everything is durable, or was dropped because the follower is to stop.
    pub(crate) fn flush(&mut self) -> Result<(), QueueError> {
        self.submit_gathered()?;
        self.await_in_flight()
    }

    /// Waits while the queue is full: the transcripts on disk are the buffer.
    pub(crate) fn wait_for_room(&self) {
        self.port.wait_for_room();
    }

    /// A file has another path now.
    pub(crate) fn rename(&mut self, from: &Path, to: &Path) {
        if let Some(newest) = self.newest.remove(from) {
            self.newest.insert(to.to_owned(), newest);
        }
    }

    /// Forgets what was delivered. `oldest`: of the events that are not.
    pub(crate) fn forget_delivered(&mut self, oldest: Option<Sequence>) {
        let is_pending = |newest: Sequence| oldest.is_some_and(|oldest| oldest <= newest);
        self.newest.retain(|_, newest| is_pending(*newest));
        self.is_backlog_delivered = !self.backlog.is_some_and(is_pending);
    }

    /// Whether all events of a file were delivered when [`Outbox::forget_delivered`] was called. What earlier runs have
    /// left may be of any file.
    pub(crate) fn is_delivered(&self, path: &Path) -> bool {
        self.is_backlog_delivered && !self.newest.contains_key(path)
    }

    fn submit_gathered(&mut self) -> Result<(), QueueError> {
        self.await_in_flight()?;
        let mut batch = std::mem::take(&mut self.gathered);
        let is_empty = batch.cursors.is_empty() && batch.session_ends.is_empty() && batch.events.is_empty();
        if !is_empty && !self.is_cut_off {
            self.in_flight = Some((self.port.submit(&mut batch), batch));
        }
        Ok(())
    }

    /// Waits until the batch in flight is durable.
    fn await_in_flight(&mut self) -> Result<(), QueueError> {
        let Some((mut submission, mut batch)) = self.in_flight.take() else { return Ok(()) };
        let accepted = loop {
            match P::wait(submission) {
                Ok(accepted) => break accepted,
                Err(QueueError::Full { .. }) if self.port.wait_for_room() => submission = self.port.submit(&mut batch),
                Err(QueueError::Full { .. }) => {
                    self.is_cut_off = true;
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        };
        if let Some(newest) = accepted.sequences.last() {
            self.newest.extend(batch.cursors.into_iter().map(|(path, _)| (path, *newest)));
        }
        Ok(())
    }
}

/// Whether a batch is worth a sync of its own.
fn is_large(batch: &Batch) -> bool {
    let payloads = batch.events.iter().map(|event| event.payload().as_json().len());
    let kept = batch.rejections.iter().map(|rejection| rejection.bytes.len());
    batch.cursors.len() >= BATCH_CURSORS_MAX || payloads.chain(kept).sum::<usize>() >= BATCH_BYTES
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::rc::Rc;

    use super::*;
    use crate::event::{Cursor, Failure, FailureKind, Origin, Rejection};
    use crate::transcript::START;

    /// A queue that has room for so many more submissions at once.
    #[derive(Clone, Default)]
    struct Script {
        /// Offsets of the cursors of each batch that was taken in.
        taken: Rc<RefCell<Vec<Vec<u64>>>>,
        /// Submissions that are refused.
        refusals: Rc<Cell<usize>>,
        is_slow: Rc<Cell<bool>>,
        is_stopped: Rc<Cell<bool>>,
    }

    impl Port for Script {
        type Submission = (Result<Accepted, QueueError>, bool);

        fn submit(&self, batch: &mut Batch) -> Self::Submission {
            if self.refusals.get() > 0 {
                self.refusals.set(self.refusals.get() - 1);
                return (Err(QueueError::Full { pending_bytes: 1, max: 1 }), true);
            }
            let offsets = batch.cursors.iter().filter_map(|(_, cursor)| Some(cursor.as_ref()?.offset));
            self.taken.borrow_mut().push(offsets.collect());
            let sequences = Sequence::new(self.taken.borrow().len() as u64).into_iter().collect();
            (Ok(Accepted { sequences }), !self.is_slow.get())
        }

        fn is_answered(submission: &Self::Submission) -> bool {
            submission.1
        }

        fn wait(submission: Self::Submission) -> Result<Accepted, QueueError> {
            submission.0
        }

        fn wait_for_room(&self) -> bool {
            !self.is_stopped.get()
        }
    }

    fn scene() -> (Outbox<Script>, Script) {
        let script = Script::default();
        (Outbox::new(script.clone(), None), script)
    }

    fn cursor(offset: u64) -> Batch {
        Batch { cursors: vec![("/a".into(), Some(Cursor { offset, ..START }))], ..Batch::default() }
    }

    /// With something that is kept.
    fn batch(offset: u64) -> Batch {
        let failure = Failure { kind: FailureKind::Unreadable, message: String::new(), sqlstate: None };
        let rejection = Rejection { failure, event_type: None, origin: Origin::Hook, bytes: Vec::new() };
        Batch { rejections: vec![rejection], ..cursor(offset) }
    }

    #[test]
    fn while_one_is_in_flight_others_are_gathered() {
        let (mut outbox, script) = scene();
        script.is_slow.set(true);
        (1..=3).for_each(|offset| outbox.submit(batch(offset)).unwrap());
        assert_eq!(*script.taken.borrow(), [[1]]);
        outbox.flush().unwrap();
        assert_eq!(*script.taken.borrow(), [vec![1], vec![2, 3]]);
    }

    #[test]
    fn cursors_alone_wait_for_events_or_for_the_end_of_the_round() {
        let (mut outbox, script) = scene();
        outbox.submit(cursor(1)).unwrap();
        outbox.submit(cursor(2)).unwrap();
        assert!(script.taken.borrow().is_empty());
        outbox.submit(batch(3)).unwrap();
        assert_eq!(*script.taken.borrow(), [[1, 2, 3]]);
        (0..BATCH_CURSORS_MAX as u64).for_each(|offset| outbox.submit(cursor(offset)).unwrap());
        assert_eq!(script.taken.borrow().len(), 2, "many are submitted");
        outbox.submit(cursor(1)).unwrap();
        outbox.flush().unwrap();
        assert_eq!(script.taken.borrow()[2], [1]);
    }

    #[test]
    fn a_batch_that_finds_no_room_is_submitted_again_before_those_after_it() {
        let (mut outbox, script) = scene();
        script.refusals.set(3);
        (1..=3).for_each(|offset| outbox.submit(batch(offset)).unwrap());
        outbox.flush().unwrap();
        assert_eq!(script.taken.borrow().concat(), [1, 2, 3]);
    }

    #[test]
    fn nothing_is_submitted_behind_a_batch_that_found_no_room_before_the_stop() {
        let (mut outbox, script) = scene();
        outbox.submit(batch(1)).unwrap();
        script.refusals.set(1);
        outbox.submit(batch(2)).unwrap();
        script.is_stopped.set(true);
        outbox.submit(batch(3)).unwrap();
        outbox.submit(batch(4)).unwrap();
        outbox.flush().unwrap();
        assert_eq!(*script.taken.borrow(), [[1]], "there is room again, and 3 must not come before 2");
    }

    #[test]
    fn a_file_is_delivered_when_its_newest_event_is() {
        let (mut outbox, _) = scene();
        outbox.submit(batch(1)).unwrap();
        outbox.flush().unwrap();
        let is_delivered = |outbox: &mut Outbox<Script>, path: &str, oldest| {
            outbox.forget_delivered(Sequence::new(oldest));
            outbox.is_delivered(Path::new(path))
        };
        assert!(!is_delivered(&mut outbox, "/a", 1) && is_delivered(&mut outbox, "/b", 1));
        outbox.rename(Path::new("/a"), Path::new("/b"));
        assert!(is_delivered(&mut outbox, "/a", 1) && !is_delivered(&mut outbox, "/b", 1));
        assert!(is_delivered(&mut outbox, "/b", 2));
        outbox.backlog = Sequence::new(5);
        assert!(!is_delivered(&mut outbox, "/b", 5), "what is left of earlier runs may be its");
        assert!(is_delivered(&mut outbox, "/b", 6) && is_delivered(&mut outbox, "/b", 0));
    }
}
