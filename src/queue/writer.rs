//! The one thread that changes the queue.
//!
//! A round: take all that has arrived, stage it as one batch, apply, sync, publish, answer. What is settled is only noted: it
//! goes with the next batch, or is written by itself a little later. A batch above [`STAGE_BYTES_MAX`] is applied and synced in
//! parts; its commit, the mark `m`, is in the last one.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::codec::{self, CodecError, Marks};
use super::files::{self, Lock, Mark, Name};
use super::log::{CARRIED, Left, Log, Older, Source};
use super::opening::Opened;
use super::piece::{self, Block, PART_BYTES_MAX};
use super::reader;
use super::segment::{Changes, Segment, StoreError};
use super::shared::Shared;
use super::submission::{EncodedBatch, Reply, Work};
use super::values::{Accepted, Outcome, QueueError, RetryOutcome};
use crate::event::{DeadContent, Sequence, Timestamp};
use crate::faults;

/// Bytes of one batch of sled's. Above it what is staged is committed before more is, and a larger batch is applied in parts.
const STAGE_BYTES_MAX: usize = 512 << 10;

/// How long it may take until it is on disk what is settled. Losing it only repeats a delivery.
const SETTLED_UNWRITTEN_MAX: Duration = Duration::from_millis(20);

/// Size of its log above which a segment gets no more events, while some wait, and above which one is left where none do.
const SEGMENT_BYTES: u64 = 64 << 20;

pub(super) struct Writer {
    shared: Arc<Shared>,
    highest: Mark,
    newest: Arc<Segment>,
    next: Option<Next>,
    log: Log,
    /// As staged: what the commit that comes next will say.
    marks: Marks,
    /// The number of the batch that is staged.
    batch: u64,
    /// Since when what is settled is not on disk.
    unwritten_since: Option<Instant>,
    /// What is staged, but for the events of `tail`.
    changes: Changes,
    /// New events, until they fill a block.
    tail: Block,
    /// Size of the newest segment's log when it was begun: what was carried over may be large itself.
    begun_bytes: u64,
    /// The last one to go.
    _lock: Lock,
}

/// The segment that comes next. What changes is carried over to it a slice after each round, so that nobody waits for all of it.
struct Next {
    segment: Segment,
    left: Left,
    /// What changed since it was begun.
    changed: Changes,
}

/// Gives an answer. The asker may have gone; then nobody needs it.
type Answer = Box<dyn FnOnce()>;

fn answer<T: 'static>(reply: Reply<T>, answer: Result<T, QueueError>) -> Answer {
    Box::new(|| drop(reply.send(answer)))
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, lock: Lock, opened: Opened) -> Self {
        let Opened { highest, newest, log, marks, batch, .. } = opened;
        Writer {
            shared,
            highest,
            newest,
            next: None,
            log,
            marks,
            batch: batch + 1,
            unwritten_since: None,
            changes: Changes::default(),
            tail: Block::default(),
            begun_bytes: 0,
            _lock: lock,
        }
    }

    /// Works until it is told to close or the storage fails.
    pub(super) fn run(mut self) {
        let closing = loop {
            let left = |since: Instant| SETTLED_UNWRITTEN_MAX.saturating_sub(since.elapsed());
            let patience =
                if self.next.is_some() { Duration::ZERO } else { self.unwritten_since.map_or(Duration::MAX, left) };
            // `None`: a reader met an error that ended the queue.
            let Some(mut works) = self.shared.inbox.take(patience) else {
                break None;
            };
            // Those that are dropped are the end of the queue.
            let mut answers = Vec::new();
            // A panic must not leave callers waiting for ever: it ends the queue like any storage error.
            let outcome =
                catch_unwind(AssertUnwindSafe(|| self.round(&mut works, &mut answers))).unwrap_or_else(|_| {
                    Err(self.shared.fail(&StoreError::damaged(self.newest.name.number, "the writer panicked")))
                });
            match outcome {
                Ok(None) => {}
                Ok(closing) => break closing,
                Err(_) => break None,
            }
        };
        // Files and lock go before it is said.
        self.release();
        closing.into_iter().for_each(|answer| answer());
    }

    /// Does what has come. Gives the answer to who wants the queue closed.
    fn round(&mut self, works: &mut VecDeque<Work>, answers: &mut Vec<Answer>) -> Result<Option<Answer>, QueueError> {
        let shared = Arc::clone(&self.shared);
        let mut closing = None;
        while let Some(work) = works.pop_front() {
            match work {
                Work::Append(Ok(batch), reply) => answers.push(answer(reply, shared.reading(self.append(batch))?)),
                Work::Append(Err(error), reply) => answers.push(answer(reply, Err(error))),
                Work::Settle(outcomes, reply) => {
                    answers.push(answer(reply, Ok(shared.reading(self.settle(outcomes))?)));
                }
                Work::Retry(sequence, reply) => answers.push(answer(reply, shared.reading(self.retry(sequence))?)),
                Work::Drop(sequence, reply) => {
                    answers.push(answer(reply, Ok(shared.reading(self.drop_dead_letter(sequence))?)));
                }
                #[cfg(test)]
                Work::Roll(reply) => {
                    shared.reading(self.make_next())?;
                    while self.next.is_some() {
                        shared.reading(self.make_next())?;
                    }
                    answers.push(answer(reply, Ok(())));
                }
                Work::Close(reply) => {
                    closing = Some(answer(reply, Ok(())));
                    break;
                }
            }
        }
        let is_due = self.unwritten_since.is_some_and(|since| since.elapsed() >= SETTLED_UNWRITTEN_MAX);
        if self.is_anything_staged() || is_due || closing.is_some() {
            shared.reading(self.commit())?;
        } else {
            shared.reading(self.publish())?;
        }
        answers.drain(..).for_each(|answer| answer());
        let is_large = self.newest.bytes() > faults::segment_bytes(SEGMENT_BYTES) + 2 * self.begun_bytes;
        if closing.is_none() && (is_large || self.next.is_some()) {
            shared.reading(self.make_next())?;
        }
        Ok(closing)
    }

    fn is_anything_staged(&self) -> bool {
        self.changes.count() > 0 || !self.tail.entries.is_empty()
    }

    /// Applies what is staged with the marks that go with it, makes it durable, and tells so.
    fn commit(&mut self) -> Result<(), StoreError> {
        if self.unwritten_since.take().is_none() && !self.is_anything_staged() {
            return Ok(());
        }
        if !self.tail.entries.is_empty() {
            self.changes.insert(self.tail.take(self.batch));
        }
        let mark = piece::mark(&self.marks, self.batch, self.changes.count() + 1);
        faults::reach("commit-before-apply");
        while self.changes.bytes() > STAGE_BYTES_MAX {
            let part = self.changes.take_part(STAGE_BYTES_MAX);
            self.write(part)?;
            faults::reach("append-between-parts");
        }
        self.changes.insert(mark);
        let rest = std::mem::take(&mut self.changes);
        self.write(rest)?;
        faults::reach("commit-synced");
        self.end_batch()
    }

    /// One batch, one sync.
    fn write(&self, changes: Changes) -> Result<(), StoreError> {
        self.newest.apply(changes)?;
        faults::reach("commit-applied");
        self.newest.sync()
    }

    /// Stages a batch. The inner error is the caller's, the outer one the end of the queue.
    fn append(&mut self, batch: EncodedBatch) -> Result<Result<Accepted, QueueError>, StoreError> {
        let (pending, pending_bytes) = self.marks.pending();
        let max = self.shared.config.max_pending_bytes;
        let event_bytes = batch.events.iter().map(|record| record.len() as u64).sum::<u64>();
        if event_bytes > 0 && pending > 0 && pending_bytes + event_bytes > max {
            self.shared.state().refused_bytes = event_bytes;
            return Ok(Err(QueueError::Full { pending_bytes, max }));
        }
        self.make_room(batch.bytes())?;
        let mut accepted = Accepted { sequences: Vec::with_capacity(batch.events.len()) };
        // Each goes when it is staged: a long one takes much memory.
        for record in batch.events {
            let (part, rest) = record.split_at_checked(PART_BYTES_MAX).unwrap_or((&record, &[]));
            self.add_entry(u32::try_from(record.len()).unwrap_or(u32::MAX), part);
            let sequence = self.marks.acknowledged.sequence;
            self.put_chunks(piece::CHUNK, sequence, 1, rest);
            accepted.sequences.extend(Sequence::new(sequence));
        }
        for record in batch.rejections {
            self.add_entry(0, &[]);
            self.put_letter(self.marks.acknowledged.sequence, &record);
        }
        for (kind, number, record) in batch.keyed {
            self.put_chunks(kind, number, 0, &record);
        }
        faults::reach("append-staged");
        Ok(Ok(accepted))
    }

    /// Commits what is staged where so much more would be too much.
    fn make_room(&mut self, bytes: usize) -> Result<(), StoreError> {
        let is_too_much = self.changes.bytes() + self.tail.bytes() + bytes > STAGE_BYTES_MAX;
        if is_too_much && self.is_anything_staged() { self.commit() } else { Ok(()) }
    }

    /// Gives the next number.
    fn add_entry(&mut self, record_bytes: u32, part: &[u8]) {
        if !self.tail.has_room(part.len()) {
            self.changes.insert(self.tail.take(self.batch));
        }
        self.tail.add(&self.marks.acknowledged, record_bytes, part);
        self.marks.acknowledged = self.marks.acknowledged.with(record_bytes);
    }

    fn put_letter(&mut self, sequence: u64, record: &[u8]) {
        self.marks.letters.count += 1;
        self.marks.letters.bytes += record.len() as u64;
        self.put_chunks(piece::LETTER, sequence, 0, record);
    }

    fn put_chunks(&mut self, kind: u8, number: u64, first: u32, record: &[u8]) {
        for chunk in piece::chunks(kind, number, first, self.batch, record) {
            if let Some(next) = self.next.as_mut().filter(|_| CARRIED.contains(&kind)) {
                next.changed.insert(chunk.clone());
            }
            self.changes.insert(chunk);
        }
    }

    /// Events leave from the head, in their order: `outcomes` are those of the oldest ones. Others, which were settled before or never
    /// given, are passed over.
    fn settle(&mut self, outcomes: Vec<(Sequence, Outcome)>) -> Result<(), StoreError> {
        let log = self.log.clone();
        let last = self.marks.acknowledged.sequence;
        // As a rule all of the oldest were delivered: then only the last one's block is read.
        if outcomes.iter().all(|(_, outcome)| matches!(outcome, Outcome::Delivered))
            && outcomes.first().is_some_and(|(first, _)| first.get() > self.marks.settled.sequence)
            && let Some((newest, _)) = outcomes.last().filter(|(newest, _)| newest.get() <= last)
            && let Some(totals) = log.totals(newest.get())?
            && totals.events.checked_sub(self.marks.settled.events) == Some(outcomes.len() as u64)
        {
            self.marks.settled = totals;
            self.unwritten_since.get_or_insert_with(Instant::now);
            return Ok(());
        }
        let mut events = log.events(self.marks.settled.sequence + 1, last);
        for (sequence, outcome) in outcomes {
            if sequence.get() <= self.marks.settled.sequence || sequence.get() > last {
                continue;
            }
            let oldest = events.next().transpose()?.filter(|(_, totals, _)| totals.sequence == sequence.get());
            let Some((source, totals, entry)) = oldest else {
                let cause = format!("event {sequence} was to be settled, and it is not the oldest one");
                return Err(StoreError::Io(cause));
            };
            if let Outcome::Refused { failure, attempts } = outcome {
                let now = Timestamp::now();
                let letter = codec::encode_refused(&failure, now, attempts, &source.record(sequence.get(), &entry)?);
                let letter = letter.map_err(|error| self.unencodable(&error))?;
                self.make_room(letter.len())?;
                // After damage its letter may be there though it waits.
                self.uncount_letter(sequence.get())?;
                self.put_letter(sequence.get(), &letter);
            }
            self.marks.settled = totals;
            self.unwritten_since.get_or_insert_with(Instant::now);
        }
        Ok(())
    }

    fn unencodable(&self, error: &CodecError) -> StoreError {
        StoreError::damaged(self.newest.name.number, error.to_string())
    }

    fn retry(&mut self, old: Sequence) -> Result<Result<RetryOutcome, QueueError>, StoreError> {
        self.commit()?;
        let letter = reader::dead_letters(&self.log.newest, old.get(), old.get(), 1)?.pop();
        let (event, captured_at, attempts) = match letter.map(|letter| letter.content) {
            None => return Ok(Ok(RetryOutcome::NotFound)),
            Some(DeadContent::Input(_)) => return Ok(Ok(RetryOutcome::NotAnEvent)),
            Some(DeadContent::Event { event, captured_at, attempts }) => (event, captured_at, attempts),
        };
        let record = codec::encode_event(&event, captured_at, attempts).map_err(|error| self.unencodable(&error))?;
        let batch = EncodedBatch { events: vec![record], ..EncodedBatch::default() };
        let accepted = match self.append(batch)? {
            Ok(accepted) => accepted,
            Err(error) => return Ok(Err(error)),
        };
        // In the batch that commits the event.
        self.unbury(old.get())?;
        faults::reach("retry-staged");
        Ok(Ok(accepted.sequences.first().map_or(RetryOutcome::NotFound, |&new| RetryOutcome::Queued(new))))
    }

    fn drop_dead_letter(&mut self, sequence: Sequence) -> Result<bool, StoreError> {
        self.commit()?;
        self.unbury(sequence.get())
    }

    /// Stages the removal of a dead letter; `false` where there is none.
    fn unbury(&mut self, sequence: u64) -> Result<bool, StoreError> {
        let is_there = self.uncount_letter(sequence)?;
        if is_there {
            self.put_chunks(piece::LETTER, sequence, 0, &[]);
        }
        Ok(is_there)
    }

    /// Takes a dead letter that is removed or replaced out of the count; `false` where there is none.
    fn uncount_letter(&mut self, sequence: u64) -> Result<bool, StoreError> {
        let pieces = self.log.newest.pieces(piece::LETTER, sequence..=sequence);
        let letter = piece::records(pieces).next().transpose()?;
        if let Some(letter) = &letter {
            self.marks.letters.count = self.marks.letters.count.saturating_sub(1);
            self.marks.letters.bytes = self.marks.letters.bytes.saturating_sub(letter.content.len() as u64);
        }
        Ok(letter.is_some())
    }

    /// Goes on with the next segment, or begins one.
    fn make_next(&mut self) -> Result<(), StoreError> {
        let Some(next) = &mut self.next else {
            // What is staged goes to the newest alone: it must be there when that is carried over.
            self.commit()?;
            let name = Name { number: self.newest.name.number + 1, first: 0, is_damaged: false };
            let segment = Segment::make(&self.shared.config.path, name)?;
            faults::reach("segment-begun");
            self.next = Some(Next { segment, left: Left::all_of(CARRIED), changed: Changes::default() });
            return Ok(());
        };
        if self.log.newest.carry_over(&mut next.left, &next.segment)? { Ok(()) } else { self.switch() }
    }

    /// Makes the next segment the newest.
    fn switch(&mut self) -> Result<(), StoreError> {
        let Some(Next { mut segment, changed, .. }) = self.next.take() else { return Ok(()) };
        self.commit()?;
        segment.apply(changed)?;
        let (path, old, first) = (&self.shared.config.path, self.newest.name, self.marks.acknowledged.sequence + 1);
        segment.name.first = first;
        segment.finish(&self.marks, self.batch)?;
        let mut older = self.log.older.clone();
        older.push(Older::before(path, old, first));
        tracing::debug!(segment = segment.name.number, older = older.len(), "began a segment of the queue");
        self.newest = Arc::new(segment);
        self.begun_bytes = self.newest.bytes();
        self.publish_log(self.log.with(Source::Sled(Arc::clone(&self.newest)), older));
        faults::reach("segment-switched");
        self.end_batch()
    }

    /// Tells that the batch is on disk, and lets go of the segments in which everything is settled.
    fn end_batch(&mut self) -> Result<(), StoreError> {
        // Before anybody is answered: what was acknowledged is missed where it comes back shorter. And before a segment goes: where
        // the one that is begun comes back empty it must not be taken for unfinished.
        self.highest.raise(self.newest.highest(self.marks.acknowledged.sequence, self.batch))?;
        self.batch += 1;
        let settled = self.marks.settled.sequence;
        // Before segments go: who reads in one that is gone must see why.
        self.publish()?;
        let (needed, spent): (Vec<_>, Vec<_>) = self.log.older.iter().partition(|one| one.is_needed(settled));
        if !spent.is_empty() {
            self.publish_log(self.log.with(self.log.newest.clone(), needed));
            self.shared.state().disk_bytes = self.log.bytes();
        }
        for one in spent {
            faults::reach("segment-spent");
            // Who still reads in it has its files open. Best effort: what stays is removed at the next opening.
            let _ = files::let_go(&self.shared.config.path, &one.name);
        }
        Ok(())
    }

    fn publish_log(&mut self, log: Log) {
        self.log = log;
        *self.shared.log.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(self.log.clone()));
    }

    /// Tells how far it is: all that was staged is durable by now.
    fn publish(&mut self) -> Result<(), StoreError> {
        let Marks { acknowledged, settled, .. } = self.marks;
        let known = self.shared.state().oldest.filter(|(sequence, _)| sequence.get() > settled.sequence);
        let (first, last) = (settled.sequence + 1, acknowledged.sequence);
        let oldest = if known.is_some() { known } else { reader::oldest(&self.log, first, last)? };
        if oldest.is_none() && settled != acknowledged {
            // Nothing but rejections and lost ones is behind it.
            self.marks.settled = acknowledged;
            self.unwritten_since.get_or_insert_with(Instant::now);
        }
        let mut state = self.shared.state();
        let has_new_events = acknowledged.events > state.marks.acknowledged.events;
        (state.marks, state.oldest, state.disk_bytes) = (self.marks, oldest, self.log.bytes());
        drop(state);
        self.shared.room.notify_all();
        if has_new_events {
            self.shared.state().refused_bytes = 0;
            self.shared.newest.send_replace(Sequence::new(acknowledged.sequence));
        }
        Ok(())
    }

    /// Lets go of files and lock, and refuses whatever still comes.
    fn release(self) {
        self.shared.end(QueueError::Closed);
        drop(self.shared.log.write().unwrap_or_else(PoisonError::into_inner).take());
    }
}
