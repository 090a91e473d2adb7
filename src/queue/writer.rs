//! The one thread that changes the queue.
//!
//! A round: take all that has arrived, stage it as one batch, apply, sync, publish, answer. What is settled is only noted: it
//! goes with the next batch, or is written by itself a little later. A batch above [`STAGE_BYTES_MAX`] is applied and synced in
//! parts; its commit, the mark `m`, is in the last one.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::codec::{self, CodecError, Marks, Totals};
use super::files::{self, Lock, Mark, Name, remove_folder};
use super::log::{Log, Older};
use super::opening::Opened;
use super::piece::{self, Block, PART_BYTES_MAX};
use super::reader;
use super::rolling::{self, Carrying};
use super::segment::{Changes, Segment, StoreError};
use super::shared::Shared;
use super::submission::{EncodedBatch, Reply, Work};
use super::values::{Accepted, Outcome, QueueError, RetryOutcome};
use crate::event::{DeadContent, Sequence, Timestamp};
use crate::faults;

/// Bytes of one batch of sled's. Above it the staged part is applied and synced first.
const STAGE_BYTES_MAX: usize = 512 << 10;

/// How long it may take until it is on disk what is settled. Losing it only repeats a delivery.
const SETTLED_UNWRITTEN_MAX: Duration = Duration::from_millis(20);

/// Size of its log above which a segment gets no more events, while some wait, and above which one is left where none do.
const SEGMENT_BYTES: u64 = 64 << 20;

/// Pause after a segment that could not be made.
const ROLL_AGAIN_AFTER: Duration = Duration::from_secs(60);

/// How long closing waits for readers to let go.
const READERS_WAIT: Duration = Duration::from_secs(2);

/// As good as for ever.
const FOR_EVER: Duration = Duration::from_secs(1 << 30);

/// Kinds that are carried over to a new segment.
const CARRIED: &[u8] = &[piece::CURSOR, piece::LETTER];

pub struct Writer {
    shared: Arc<Shared>,
    lock: Lock,
    highest: Mark,
    newest: Arc<Segment>,
    log: Log,
    /// As staged: what the commit that comes next will say.
    marks: Marks,
    /// The number of the batch that is staged.
    batch: u64,
    /// Pieces of it that were applied before it is complete.
    pieces: u64,
    /// As it is on disk.
    settled_synced: u64,
    /// Since when it is not.
    unwritten_since: Option<Instant>,
    stage: Stage,
    /// The newest number given to an event, durable after the next sync.
    newest_event: Option<Sequence>,
    /// The next segment, while it is being made.
    rolling: Option<(Segment, Carrying)>,
    roll_not_before: Option<Instant>,
    /// Size of the newest segment's log when it was begun: what was carried over may be large itself.
    begun_bytes: u64,
}

#[derive(Default)]
struct Stage {
    changes: Changes,
    /// New events, until they fill a block.
    tail: Block,
    /// Numbers were given since the last commit.
    is_begun: bool,
}

impl Stage {
    fn bytes(&self) -> usize {
        self.changes.bytes() + self.tail.bytes()
    }

    fn is_empty(&self) -> bool {
        self.changes.count() == 0 && self.tail.is_empty() && !self.is_begun
    }
}

/// Gives an answer. The asker may have gone; then nobody needs it.
type Answer = Box<dyn FnOnce()>;

fn answer<T: 'static>(reply: Reply<T>, answer: Result<T, QueueError>) -> Answer {
    Box::new(|| drop(reply.send(answer)))
}

/// How answers wait for the end of their round. Those that are dropped are the end of the queue.
#[derive(Default)]
struct Round {
    after_settling: Vec<Answer>,
    after_sync: Vec<Answer>,
    after_rolling: Vec<Answer>,
    close: Option<Answer>,
}

impl Writer {
    pub fn new(shared: Arc<Shared>, lock: Lock, opened: Opened) -> Self {
        let Opened { highest, newest, log, marks, batch, .. } = opened;
        Writer {
            shared,
            lock,
            highest,
            newest,
            log,
            marks,
            batch: batch + 1,
            pieces: 0,
            settled_synced: marks.settled.sequence,
            unwritten_since: None,
            stage: Stage::default(),
            newest_event: None,
            rolling: None,
            roll_not_before: None,
            begun_bytes: 0,
        }
    }

    /// Works until it is told to close or the storage fails.
    pub fn run(mut self) {
        loop {
            let patience = match self.unwritten_since {
                _ if self.rolling.is_some() || self.is_worth_rolling() => Duration::ZERO,
                Some(since) => SETTLED_UNWRITTEN_MAX.saturating_sub(since.elapsed()),
                None => FOR_EVER,
            };
            // `None`: a reader met an error that ended the queue.
            let Some(mut works) = self.shared.inbox.take(patience) else { return self.release() };
            let mut round = Round::default();
            // A panic must not leave callers waiting for ever: it ends the queue like any storage error.
            let outcome = catch_unwind(AssertUnwindSafe(|| self.round(&mut works, &mut round)))
                .unwrap_or_else(|_| Err(self.shared.fail(&self.newest.damaged("the writer panicked"))));
            match (outcome, round.close.take()) {
                (Ok(()), None) => {}
                (Ok(()), Some(answer)) => {
                    self.release();
                    return answer();
                }
                // Who still waits is answered after the files are let go of.
                (Err(_), _) => return self.release(),
            }
        }
    }

    fn round(&mut self, works: &mut VecDeque<Work>, round: &mut Round) -> Result<(), QueueError> {
        let shared = Arc::clone(&self.shared);
        while let Some(work) = works.pop_front() {
            match work {
                Work::Append(batch, reply) => {
                    let accepted = shared.reading(self.append(&batch))?;
                    round.after_sync.push(answer(reply, accepted));
                }
                Work::Settle(outcomes, reply) => {
                    let has_letters = outcomes.iter().any(|(_, outcome)| matches!(outcome, Outcome::Refused { .. }));
                    shared.reading(self.settle(outcomes))?;
                    let waiting = if has_letters { &mut round.after_sync } else { &mut round.after_settling };
                    waiting.push(answer(reply, Ok(())));
                }
                Work::Retry(sequence, reply) => {
                    let retried = shared.reading(self.retry(sequence))?;
                    round.after_sync.push(answer(reply, retried));
                }
                Work::Drop(sequence, reply) => {
                    let is_dropped = shared.reading(self.drop_dead_letter(sequence))?;
                    round.after_sync.push(answer(reply, Ok(is_dropped)));
                }
                Work::Roll(reply) => round.after_rolling.push(answer(reply, Ok(()))),
                Work::Close(reply) => {
                    round.close = Some(answer(reply, Ok(())));
                    break;
                }
            }
        }
        shared.reading(self.publish(false))?;
        round.after_settling.drain(..).for_each(|answer| answer());
        let is_due = self.unwritten_since.is_some_and(|since| since.elapsed() >= SETTLED_UNWRITTEN_MAX);
        if !self.stage.is_empty() || is_due || round.close.is_some() {
            shared.reading(self.commit())?;
        }
        round.after_sync.drain(..).for_each(|answer| answer());
        if round.close.is_none() {
            shared.reading(self.roll(!round.after_rolling.is_empty()))?;
        }
        round.after_rolling.drain(..).for_each(|answer| answer());
        // Nobody waits for that.
        self.remove_spent();
        Ok(())
    }

    /// Applies what is staged with the marks that go with it, makes it durable, and tells so.
    fn commit(&mut self) -> Result<(), StoreError> {
        if self.unwritten_since.take().is_none() && self.stage.is_empty() {
            return Ok(());
        }
        if !self.stage.tail.is_empty() {
            self.stage.changes.insert(self.stage.tail.take(self.batch));
        }
        let pieces = self.pieces + self.stage.changes.count() + 1;
        self.stage.changes.insert(piece::mark(&self.marks, self.batch, pieces));
        faults::reach("commit-before-apply");
        self.apply()?;
        faults::reach("commit-synced");
        self.stage.is_begun = false;
        self.settled_synced = self.marks.settled.sequence;
        // Before anybody is answered: what was acknowledged is missed where it comes back shorter.
        self.highest.raise(self.newest.highest(self.marks.acknowledged.sequence, self.batch))?;
        (self.batch, self.pieces) = (self.batch + 1, 0);
        self.publish(true)
    }

    /// One batch, one sync.
    fn apply(&mut self) -> Result<(), StoreError> {
        let changes = std::mem::take(&mut self.stage.changes);
        self.pieces += changes.count();
        if let Some((segment, _)) = &self.rolling
            && let Err(error) = segment.apply(changes.of_kinds(CARRIED))
        {
            self.keep_segment(&error);
        }
        self.newest.apply(changes)?;
        faults::reach("commit-applied");
        self.newest.sync()
    }

    /// Stages a batch. The inner error is the caller's, the outer one the end of the queue.
    fn append(&mut self, batch: &EncodedBatch) -> Result<Result<Accepted, QueueError>, StoreError> {
        let (pending, pending_bytes) = self.marks.acknowledged.since(&self.marks.settled);
        let max = self.shared.max_pending_bytes;
        let event_bytes = batch.events.iter().map(|record| record.len() as u64).sum::<u64>();
        if !batch.events.is_empty() && pending > 0 && pending_bytes + event_bytes > max {
            self.shared.state().room_wanted = Some(max.saturating_sub(event_bytes));
            return Ok(Err(QueueError::Full { pending_bytes, max }));
        }
        if self.stage.bytes() + batch.bytes() > STAGE_BYTES_MAX && !self.stage.is_empty() {
            // What was staged before is committed by itself; what comes now may take several parts.
            self.commit()?;
        }
        let before = self.marks.acknowledged;
        let mut next = before;
        let mut accepted = Accepted { sequences: Vec::with_capacity(batch.events.len()) };
        for record in &batch.events {
            let (part, rest) = record.split_at_checked(PART_BYTES_MAX).unwrap_or((record, &[]));
            self.put_chunks(piece::CHUNK, next.sequence + 1, 1, rest)?;
            next = self.add_entry(next, u32::try_from(record.len()).unwrap_or(u32::MAX), part)?;
            accepted.sequences.extend(Sequence::new(next.sequence));
        }
        for record in &batch.rejections {
            next = self.add_entry(next, 0, &[])?;
            self.put_letter(next.sequence, record)?;
        }
        for (id, record) in &batch.cursors {
            let chunks = piece::chunks(piece::CURSOR, id.0, 0, self.batch, record);
            chunks.for_each(|chunk| self.stage.changes.insert(chunk));
        }
        self.marks.acknowledged = next;
        self.stage.is_begun |= next != before;
        self.newest_event = accepted.sequences.last().copied().or(self.newest_event);
        faults::reach("append-staged");
        Ok(Ok(accepted))
    }

    /// Gives the number behind `totals`; returns the totals up to it.
    fn add_entry(&mut self, totals: Totals, record_bytes: u32, part: &[u8]) -> Result<Totals, StoreError> {
        if !self.stage.tail.has_room(part.len()) {
            let block = self.stage.tail.take(self.batch);
            self.put(block)?;
        }
        self.stage.tail.add(&totals, record_bytes, part);
        Ok(totals.with(record_bytes))
    }

    fn put_letter(&mut self, sequence: u64, record: &[u8]) -> Result<(), StoreError> {
        self.marks.letters.count += 1;
        self.marks.letters.bytes += record.len() as u64;
        self.put_chunks(piece::LETTER, sequence, 0, record)
    }

    /// Stages the chunks of a record. The first one comes last: without it the others are nothing.
    fn put_chunks(&mut self, kind: u8, number: u64, first: u32, record: &[u8]) -> Result<(), StoreError> {
        piece::chunks(kind, number, first, self.batch, record).rev().try_for_each(|chunk| self.put(chunk))
    }

    /// Stages a piece of a batch that is not committed yet.
    fn put(&mut self, (key, value): (Vec<u8>, Vec<u8>)) -> Result<(), StoreError> {
        if self.stage.bytes() + key.len() + value.len() > STAGE_BYTES_MAX && !self.stage.is_begun {
            self.apply()?;
            faults::reach("append-between-parts");
        }
        self.stage.changes.insert((key, value));
        Ok(())
    }

    /// Events leave from the head, in their order: `outcomes` are those of the oldest ones. Others, which were settled before or never
    /// given, are passed over.
    fn settle(&mut self, outcomes: Vec<(Sequence, Outcome)>) -> Result<(), StoreError> {
        let log = self.log.clone();
        let last = self.marks.acknowledged.sequence;
        let mut events = log.events(self.marks.settled.sequence + 1, last);
        for (sequence, outcome) in outcomes {
            if sequence.get() <= self.marks.settled.sequence || sequence.get() > last {
                continue;
            }
            let (source, totals, entry) = match events.next().transpose()? {
                Some(oldest) if oldest.1.sequence == sequence.get() => oldest,
                _ => {
                    return Err(StoreError::Io(format!(
                        "event {sequence} was to be settled, and it is not the oldest one"
                    )));
                }
            };
            if let Outcome::Refused { failure, attempts } = outcome {
                // In one batch with the mark behind it.
                if !self.stage.is_empty() {
                    self.commit()?;
                }
                let record = source.record(sequence.get(), &entry)?;
                let letter = codec::encode_refused(&failure, Timestamp::now(), attempts, &record);
                // After damage its letter may be there though it waits.
                self.uncount_letter(sequence.get())?;
                self.marks.settled = totals;
                self.put_letter(sequence.get(), &letter.map_err(|error| self.unencodable(&error))?)?;
            }
            self.marks.settled = totals;
            self.unwritten_since.get_or_insert_with(Instant::now);
        }
        Ok(())
    }

    fn unencodable(&self, error: &CodecError) -> StoreError {
        self.newest.damaged(error.to_string())
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
        let accepted = match self.append(&batch)? {
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
            piece::chunks(piece::LETTER, sequence, 0, self.batch, &[]).for_each(|none| self.stage.changes.insert(none));
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

    fn is_worth_rolling(&self) -> bool {
        let is_large = self.newest.bytes() > faults::segment_bytes(SEGMENT_BYTES) + 2 * self.begun_bytes;
        is_large && self.roll_not_before.is_none_or(|then| then <= Instant::now())
    }

    /// Makes the next segment, a slice at a time, where the newest is large; all at once where it `is_asked`.
    fn roll(&mut self, is_asked: bool) -> Result<(), StoreError> {
        if self.rolling.is_none() && !is_asked && !self.is_worth_rolling() {
            return Ok(());
        }
        match self.carry_over(is_asked) {
            // What is wrong with the newest is no matter of the next.
            Err(error @ StoreError::Damaged { segment, .. }) if segment == self.newest.name.number => Err(error),
            Err(error) => {
                self.keep_segment(&error);
                Ok(())
            }
            Ok(false) => Ok(()),
            Ok(true) => self.switch(),
        }
    }

    /// Goes on making the next segment; says whether all is carried over.
    fn carry_over(&mut self, is_asked: bool) -> Result<bool, StoreError> {
        if self.rolling.is_none() {
            let segment = Segment::make(&self.shared.path, self.newest.name.number + 1)?;
            #[cfg(test)]
            segment.before_sync.lock().unwrap().clone_from(&self.newest.before_sync.lock().unwrap());
            self.rolling = Some((segment, Carrying::of(CARRIED)));
            faults::reach("segment-begun");
        }
        while let Some((segment, carrying)) = &mut self.rolling {
            if !carrying.next(&self.log.newest, segment)? {
                break;
            }
            if !is_asked {
                return Ok(false);
            }
        }
        Ok(self.rolling.is_some())
    }

    /// Makes the segment to which all was carried over the newest.
    fn switch(&mut self) -> Result<(), StoreError> {
        self.commit()?;
        let Some((mut segment, _)) = self.rolling.take() else { return Ok(()) };
        if let Err(error) = rolling::finish_segment(&mut segment, &self.marks, self.batch) {
            self.keep_segment(&error);
            return Ok(());
        }
        let path = &self.shared.path;
        let mut older = self.log.older.clone();
        let old = Older::before(path, self.newest.name, segment.name.first);
        let is_needed = old.is_needed(self.marks.settled.sequence);
        older.extend(Some(old).filter(|_| is_needed));
        tracing::debug!(segment = segment.name.number, older = older.len(), "began a segment of the queue");
        self.newest = Arc::new(segment);
        self.log = self.log.with_newest(Arc::clone(&self.newest), older);
        self.begun_bytes = self.newest.bytes();
        self.publish_log();
        faults::reach("segment-switched");
        // Before the old one goes: where the new one comes back empty it must not be taken for unfinished.
        self.highest.raise(self.newest.highest(self.marks.acknowledged.sequence, self.batch))?;
        self.batch += 1;
        if !is_needed {
            self.remove(old.name);
        }
        self.publish(true)
    }

    /// Nothing has happened yet: the large segment can go on serving, and says so by its size.
    fn keep_segment(&mut self, error: &StoreError) {
        tracing::warn!(%error, "could not begin a segment of the queue, going on with the large one");
        self.rolling = None;
        self.remove(Name::new(self.newest.name.number + 1));
        self.roll_not_before = Some(Instant::now() + ROLL_AGAIN_AFTER);
    }

    /// Best effort: what stays is removed at the next opening.
    fn remove(&self, name: Name) {
        let _ = files::let_go(&self.shared.path, &name);
    }

    /// Lets go of the segments in which everything is settled, once that is on disk.
    fn remove_spent(&mut self) {
        let is_spent = |one: &&Older| !one.is_needed(self.settled_synced);
        let spent: Vec<Name> = self.log.older.iter().filter(is_spent).map(|one| one.name).collect();
        if spent.is_empty() {
            return;
        }
        self.log = self.log.without_settled(self.settled_synced);
        self.publish_log();
        self.shared.state().disk_bytes = self.log.bytes();
        for name in spent {
            faults::reach("segment-spent");
            // Who still reads in it has its files open.
            self.remove(name);
        }
    }

    fn publish_log(&self) {
        let log = Arc::new(self.log.clone());
        *self.shared.log.write().unwrap_or_else(PoisonError::into_inner) = Some(log);
    }

    /// Tells what is settled; where it `is_committed`, all that is staged is durable by now.
    fn publish(&mut self, is_committed: bool) -> Result<(), StoreError> {
        let acknowledged = self.marks.acknowledged;
        let (durable, known) = {
            let state = self.shared.state();
            (if is_committed { acknowledged } else { state.acknowledged }, state.oldest)
        };
        let first = self.marks.settled.sequence + 1;
        let oldest = match known {
            Some((sequence, _)) if sequence.get() >= first => known,
            _ if first > durable.sequence => None,
            _ => reader::oldest(&self.log, first, durable.sequence)?,
        };
        if oldest.is_none() && acknowledged == durable && self.marks.settled != acknowledged {
            // Nothing but rejections and lost ones is behind it.
            self.marks.settled = acknowledged;
            self.unwritten_since.get_or_insert_with(Instant::now);
        }
        let mut state = self.shared.state();
        (state.acknowledged, state.settled, state.oldest) = (durable, self.marks.settled, oldest);
        let (_, pending_bytes) = durable.since(&self.marks.settled);
        state.room_wanted.take_if(|wanted| pending_bytes <= *wanted);
        if is_committed {
            (state.letters, state.disk_bytes) = (self.marks.letters, self.log.bytes());
        }
        drop(state);
        self.shared.room.notify_all();
        if let Some(newest) = self.newest_event.take_if(|_| is_committed) {
            self.shared.newest.send_replace(Some(newest));
        }
        Ok(())
    }

    /// Lets go of files and lock, and refuses whatever still comes.
    fn release(self) {
        let Writer { shared, log, newest, lock, rolling, .. } = self;
        shared.inbox.end(QueueError::Closed);
        shared.state().closed = true;
        shared.room.notify_all();
        drop(shared.log.write().unwrap_or_else(PoisonError::into_inner).take());
        // One that is half made is a left-over.
        if let Some((segment, _)) = rolling {
            let folder = segment.folder().to_owned();
            drop(segment);
            let _ = remove_folder(&folder);
        }
        // The lock goes last: who opens next must not find sled's own lock held by a reader of ours.
        let readers = Arc::downgrade(&newest);
        drop((log, newest));
        let deadline = Instant::now() + READERS_WAIT;
        while readers.strong_count() > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(lock);
    }
}
