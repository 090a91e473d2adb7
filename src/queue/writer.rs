//! The one thread that changes the queue.
//!
//! A round: take all that has arrived, stage it as one batch, apply, sync, publish, answer. What is settled is only noted: it
//! goes with the next batch, or is written by itself a little later. A batch above [`STAGE_BYTES_MAX`] is applied and synced in
//! parts; its commit, the mark `m`, is in the last one.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::codec::{self, CodecError, Content, Letter};
use super::faults;
use super::files::{Lock, Mark};
use super::log::Log;
use super::opening::{Letters, Opened};
use super::piece::{self, BlockBuilder, CONTENT_BYTES_MAX, Marks, OlderSegment, PART_BYTES_MAX, Piece, Totals};
use super::reader;
use super::rolling::{self, Carrying};
use super::segment::{Changes, Segment, StoreError};
use super::shared::Shared;
use super::submission::{EncodedBatch, EncodedCursor, Reply, Work};
use super::values::{Accepted, Outcome, QueueError, RetryOutcome};
use crate::event::{DeadContent, Sequence, Timestamp};

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

/// Kinds that are carried over to a new segment.
const CARRIED: &[u8] = &[piece::CURSOR, piece::LETTER, piece::LETTER_CONTENT];

pub struct Writer {
    shared: Arc<Shared>,
    log: Log,
    lock: Lock,
    mark: Mark,
    /// As staged: what the commit that comes next will say.
    marks: Marks,
    /// As it is on disk.
    settled_synced: u64,
    /// Since when it is not.
    unwritten_since: Option<Instant>,
    letters: Letters,
    stage: Stage,
    /// The newest number given to an event, durable after the next sync.
    newest_event: Option<Sequence>,
    /// Pending bytes with which the last refused batch would fit.
    room_wanted: Option<u64>,
    /// The next segment, while it is being made.
    rolling: Option<Rolling>,
    roll_not_before: Option<Instant>,
    /// Size of the newest segment's log when it was begun: what was carried over may be large itself.
    begun_bytes: u64,
}

#[derive(Default)]
struct Stage {
    changes: Changes,
    /// New events, until they fill a block.
    tail: BlockBuilder,
    /// Numbers were given since the last commit.
    is_begun: bool,
}

impl Stage {
    fn bytes(&self) -> usize {
        self.changes.bytes() + self.tail.bytes()
    }

    fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.tail.is_empty()
    }

    fn close_tail(&mut self, start: u64) {
        if !self.tail.is_empty() {
            let (key, value) = self.tail.take(start);
            self.changes.insert(key, value);
        }
    }
}

/// A segment that is being made.
struct Rolling {
    segment: Segment,
    carrying: Carrying,
}

/// Gives an answer, or the error that came instead. The asker may have gone; then nobody needs it.
type Answer = Box<dyn FnOnce(Result<(), QueueError>)>;

fn answer<T: 'static>(reply: Reply<T>, answer: Result<T, QueueError>) -> Answer {
    Box::new(|done| drop(reply.send(done.and(answer))))
}

/// How answers wait for the end of their round.
#[derive(Default)]
struct Round {
    after_settling: Vec<Answer>,
    after_sync: Vec<Answer>,
    after_rolling: Vec<Answer>,
    close: Option<Answer>,
}

impl Writer {
    pub fn new(shared: Arc<Shared>, lock: Lock, opened: Opened) -> Self {
        let Opened { mark, log, marks, letters, .. } = opened;
        Writer {
            shared,
            log,
            lock,
            mark,
            marks,
            settled_synced: marks.settled.sequence,
            unwritten_since: None,
            letters,
            stage: Stage::default(),
            newest_event: None,
            room_wanted: None,
            rolling: None,
            roll_not_before: None,
            begun_bytes: 0,
        }
    }

    /// Works until it is told to close or the storage fails.
    pub fn run(mut self) {
        loop {
            let patience = match self.unwritten_since {
                _ if self.rolling.is_some() || self.is_worth_rolling() => Some(Duration::ZERO),
                Some(since) => Some(SETTLED_UNWRITTEN_MAX.saturating_sub(since.elapsed())),
                None => None,
            };
            let Some(works) = self.shared.inbox.take(patience) else {
                // A reader met an error that ended the queue.
                return self.release();
            };
            let mut round = Round::default();
            // A panic must not leave callers waiting for ever: it ends the queue like any storage error.
            let outcome = catch_unwind(AssertUnwindSafe(|| self.round(works, &mut round)))
                .unwrap_or_else(|_| Err(self.log.newest.damaged("the writer panicked")));
            if let Err(error) = outcome {
                let error = self.shared.fail(&error);
                self.release();
                let Round { after_settling, after_sync, after_rolling, close } = round;
                let answers = after_settling.into_iter().chain(after_sync).chain(after_rolling).chain(close);
                answers.for_each(|answer| answer(Err(error.clone())));
                return;
            }
            if let Some(answer) = round.close {
                self.release();
                return answer(Ok(()));
            }
        }
    }

    fn round(&mut self, works: Vec<Work>, round: &mut Round) -> Result<(), StoreError> {
        for work in works {
            match work {
                Work::Append(batch, reply) => match self.append(batch) {
                    Ok(accepted) => round.after_sync.push(answer(reply, accepted)),
                    Err(error) => {
                        round.after_sync.push(answer(reply, Ok(Accepted::default())));
                        return Err(error);
                    }
                },
                Work::Settle(outcomes, reply) => {
                    let has_letters = outcomes.iter().any(|(_, outcome)| matches!(outcome, Outcome::Refused { .. }));
                    let waiting = if has_letters { &mut round.after_sync } else { &mut round.after_settling };
                    waiting.push(answer(reply, Ok(())));
                    self.settle(outcomes)?;
                }
                Work::Retry(sequence, reply) => round.after_sync.push(answer(reply, self.retry(sequence)?)),
                Work::Drop(sequence, reply) => {
                    round.after_sync.push(answer(reply, Ok(self.drop_dead_letter(sequence)?)));
                }
                Work::Roll(reply) => round.after_rolling.push(answer(reply, Ok(()))),
                Work::Close(reply) => {
                    round.close = Some(answer(reply, Ok(())));
                    break;
                }
            }
        }
        self.publish_settled()?;
        round.after_settling.drain(..).for_each(|answer| answer(Ok(())));
        let is_due = self.unwritten_since.is_some_and(|since| since.elapsed() >= SETTLED_UNWRITTEN_MAX);
        let is_asked = round.close.is_some() || !round.after_rolling.is_empty();
        if self.stage.is_begun || !self.stage.changes.is_empty() || is_due || is_asked {
            self.commit()?;
        }
        round.after_sync.drain(..).for_each(|answer| answer(Ok(())));
        if round.close.is_none() {
            self.roll(!round.after_rolling.is_empty())?;
        }
        round.after_rolling.drain(..).for_each(|answer| answer(Ok(())));
        // Nobody waits for that.
        self.remove_spent();
        Ok(())
    }

    /// Applies what is staged with the marks that go with it, makes it durable, and tells so.
    fn commit(&mut self) -> Result<(), StoreError> {
        self.stage.close_tail(self.marks.start);
        if self.unwritten_since.take().is_some() | std::mem::take(&mut self.stage.is_begun) {
            let (key, value) = self.marks.encode();
            self.stage.changes.insert(key, value);
        }
        faults::reach("commit-before-apply");
        self.apply()?;
        faults::reach("commit-synced");
        self.settled_synced = self.marks.settled.sequence;
        // Before anybody is answered: what was acknowledged is missed where it comes back shorter.
        self.mark.raise(self.log.newest.highest(self.marks.acknowledged.sequence))?;
        self.publish_committed();
        Ok(())
    }

    /// One batch, one sync.
    fn apply(&mut self) -> Result<(), StoreError> {
        let changes = std::mem::take(&mut self.stage.changes);
        if let Some(rolling) = &self.rolling
            && let Err(error) = rolling.segment.apply(changes.of_kinds(CARRIED))
        {
            self.keep_segment(&error);
        }
        self.log.newest.apply(changes)?;
        faults::reach("commit-applied");
        self.log.newest.sync()
    }

    /// Stages a batch. The inner error is the caller's, the outer one the end of the queue.
    fn append(&mut self, batch: EncodedBatch) -> Result<Result<Accepted, QueueError>, StoreError> {
        if let Err(error) = self.admit(&batch) {
            return Ok(Err(error));
        }
        if self.stage.bytes() + batch.bytes() > STAGE_BYTES_MAX && !self.stage.is_empty() {
            // What was staged before is committed by itself; what comes now may take several parts.
            self.commit()?;
        }
        let before = self.marks.acknowledged;
        let mut accepted = Accepted { sequences: Vec::with_capacity(batch.events.len()) };
        let mut next = before;
        for record in &batch.events {
            let (part, rest) = record.split_at_checked(PART_BYTES_MAX).unwrap_or((record, &[]));
            let sequence = next.sequence + 1;
            for (index, chunk) in (1..).zip(rest.chunks(CONTENT_BYTES_MAX)) {
                let value = self.piece(piece::CHUNK, sequence, index, chunk);
                self.put(piece::indexed_key(piece::CHUNK, sequence, index), value)?;
            }
            let record_bytes = u32::try_from(record.len()).unwrap_or(u32::MAX);
            self.add_entry(&next, record_bytes, part)?;
            next = Totals { sequence, events: next.events + 1, bytes: next.bytes + u64::from(record_bytes) };
            accepted.sequences.extend(Sequence::new(sequence));
        }
        for rejection in &batch.rejections {
            self.add_entry(&next, 0, &[])?;
            next.sequence += 1;
            self.put_letter(next.sequence, &rejection.letter, &rejection.content)?;
        }
        for cursor in &batch.cursors {
            self.stage_cursor(cursor)?;
        }
        self.marks.acknowledged = next;
        self.stage.is_begun |= next != before;
        if let Some(&last) = accepted.sequences.last() {
            self.newest_event = Some(last);
        }
        faults::reach("append-staged");
        Ok(Ok(accepted))
    }

    /// Whether there is room.
    fn admit(&mut self, batch: &EncodedBatch) -> Result<(), QueueError> {
        let (pending, pending_bytes) = self.pending();
        let max = self.shared.max_pending_bytes;
        if batch.events.is_empty() || pending == 0 || pending_bytes + batch.event_bytes <= max {
            return Ok(());
        }
        self.room_wanted = Some(max.saturating_sub(batch.event_bytes));
        Err(QueueError::Full { pending_bytes, max })
    }

    /// Events that wait, and the bytes of their records.
    fn pending(&self) -> (u64, u64) {
        self.marks.acknowledged.since(&self.marks.settled)
    }

    fn add_entry(&mut self, totals: &Totals, record_bytes: u32, part: &[u8]) -> Result<(), StoreError> {
        if !self.stage.tail.has_room(part.len()) {
            let (key, value) = self.stage.tail.take(self.marks.start);
            self.put(key, value)?;
        }
        self.stage.tail.add(totals, record_bytes, part);
        Ok(())
    }

    fn put_letter(&mut self, sequence: u64, letter: &[u8], content: &[u8]) -> Result<(), StoreError> {
        for (index, chunk) in (0..).zip(content.chunks(CONTENT_BYTES_MAX)) {
            let value = self.piece(piece::LETTER_CONTENT, sequence, index, chunk);
            self.letters.bytes += value.len() as u64;
            self.put(piece::indexed_key(piece::LETTER_CONTENT, sequence, index), value)?;
        }
        let value = self.piece(piece::LETTER, sequence, 0, letter);
        self.letters.count += 1;
        self.put(piece::key(piece::LETTER, sequence), value)
    }

    /// A value that is written in this start.
    fn piece(&self, kind: u8, sequence: u64, index: u32, content: &[u8]) -> Vec<u8> {
        Piece { kind, sequence, index, start: self.marks.start, content }.encode()
    }

    /// Stages a value under a number that is not committed yet.
    fn put(&mut self, key: Vec<u8>, value: Vec<u8>) -> Result<(), StoreError> {
        if self.stage.bytes() + key.len() + value.len() > STAGE_BYTES_MAX && !self.stage.is_begun {
            self.apply()?;
            faults::reach("append-between-parts");
        }
        self.stage.changes.insert(key, value);
        Ok(())
    }

    fn stage_cursor(&mut self, cursor: &EncodedCursor) -> Result<(), StoreError> {
        let record = cursor.record.as_deref().unwrap_or_default();
        let mut chunks = 0;
        for (index, chunk) in (0..).zip(record.chunks(CONTENT_BYTES_MAX)) {
            let value = self.piece(piece::CURSOR, 0, index, chunk);
            self.stage.changes.insert(piece::cursor_key(cursor.id, index), value);
            chunks = index + 1;
        }
        if chunks == 0 {
            // It may be among what is staged.
            self.stage.changes.remove(piece::cursor_key(cursor.id, 0));
        }
        // What a longer one has left behind.
        let all = piece::cursor_key(cursor.id, chunks)..=piece::cursor_key(cursor.id, u32::MAX);
        self.log.newest.each(all, |key, _| {
            self.stage.changes.remove(key.to_vec());
            true
        })
    }

    /// Events leave from the head, in their order: `outcomes` are those of the oldest ones.
    fn settle(&mut self, outcomes: Vec<(Sequence, Outcome)>) -> Result<(), StoreError> {
        let (mut through, mut events) = (self.marks.settled.sequence, 0);
        for (sequence, outcome) in outcomes {
            // Settled before, or never given.
            if sequence.get() <= through || sequence.get() > self.marks.acknowledged.sequence {
                continue;
            }
            through = sequence.get();
            events += 1;
            if let Outcome::Refused { failure, attempts } = outcome {
                let letter = Letter { failed_at: Timestamp::now(), failure, content: Content::Event, attempts };
                // In one batch with the mark behind it.
                if !self.stage.is_empty() {
                    self.commit()?;
                }
                self.raise_settled(through, events)?;
                events = 0;
                self.bury(through, &letter)?;
            }
        }
        self.raise_settled(through, events)
    }

    fn raise_settled(&mut self, through: u64, events: u64) -> Result<(), StoreError> {
        if events == 0 {
            return Ok(());
        }
        let totals = self.log.totals_through(through)?;
        // Lost ones among them count in the totals, too.
        if totals.events != self.marks.settled.events + events && self.count(through)? != events {
            return Err(StoreError::Io(format!(
                "{events} events up to {through} were to be settled, and they are not the oldest ones"
            )));
        }
        self.marks.settled = totals;
        self.unwritten_since.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Events that wait up to a number.
    fn count(&self, through: u64) -> Result<u64, StoreError> {
        let (first, mut events) = (self.marks.settled.sequence + 1, 0);
        self.log.each_block(first, through, |_, block| {
            let waiting = block.entries.iter().filter(|entry| (first..=through).contains(&entry.sequence));
            events += waiting.filter(|entry| entry.record_bytes > 0).count() as u64;
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(events)
    }

    /// Stages an event, which has just been settled, as a dead letter.
    fn bury(&mut self, sequence: u64, letter: &Letter) -> Result<(), StoreError> {
        let mut record = Vec::new();
        self.log.each_block(sequence, sequence, |source, block| {
            let entry = block.entries.iter().find(|entry| entry.sequence == sequence);
            if let Some(entry) = entry {
                record = source.record(entry)?;
            }
            Ok(ControlFlow::Break(()))
        })?;
        let letter = codec::encode_letter(letter).map_err(|error| self.unencodable(&error))?;
        self.put_letter(sequence, &letter, &record)
    }

    fn unencodable(&self, error: &CodecError) -> StoreError {
        self.log.newest.damaged(error.to_string())
    }

    fn retry(&mut self, old: Sequence) -> Result<Result<RetryOutcome, QueueError>, StoreError> {
        self.commit()?;
        let Some(letter) = reader::dead_letter(&self.log.newest, old)? else { return Ok(Ok(RetryOutcome::NotFound)) };
        let DeadContent::Event { event, captured_at, attempts } = letter.content else {
            return Ok(Ok(RetryOutcome::NotAnEvent));
        };
        let record = codec::encode_event(&event, captured_at, attempts).map_err(|error| self.unencodable(&error))?;
        let event_bytes = record.len() as u64;
        let batch = EncodedBatch { event_bytes, events: vec![record], rejections: Vec::new(), cursors: Vec::new() };
        let accepted = match self.append(batch)? {
            Ok(accepted) => accepted,
            Err(error) => return Ok(Err(error)),
        };
        // In the batch that commits the event.
        self.unbury(old)?;
        faults::reach("retry-staged");
        Ok(Ok(accepted.sequences.first().map_or(RetryOutcome::NotFound, |&new| RetryOutcome::Queued(new))))
    }

    fn drop_dead_letter(&mut self, sequence: Sequence) -> Result<bool, StoreError> {
        self.commit()?;
        if self.log.newest.get(&piece::key(piece::LETTER, sequence.get()))?.is_none() {
            return Ok(false);
        }
        self.unbury(sequence)?;
        Ok(true)
    }

    /// Stages the removal of a dead letter with all that belongs to it.
    fn unbury(&mut self, sequence: Sequence) -> Result<(), StoreError> {
        let number = sequence.get();
        self.stage.changes.remove(piece::key(piece::LETTER, number));
        let mut bytes = 0;
        self.log.newest.each(piece::keys(piece::LETTER_CONTENT, number..=number), |key, value| {
            self.stage.changes.remove(key.to_vec());
            bytes += value.len() as u64;
            true
        })?;
        self.letters.count = self.letters.count.saturating_sub(1);
        self.letters.bytes = self.letters.bytes.saturating_sub(bytes);
        Ok(())
    }

    fn is_worth_rolling(&self) -> bool {
        let is_large = self.log.newest.bytes() > faults::segment_bytes(SEGMENT_BYTES) + 2 * self.begun_bytes;
        is_large && self.roll_not_before.is_none_or(|then| then <= Instant::now())
    }

    /// Makes the next segment, a slice at a time, where the newest is large; all at once where it `is_asked`.
    fn roll(&mut self, is_asked: bool) -> Result<(), StoreError> {
        if self.rolling.is_none() {
            if !is_asked && !self.is_worth_rolling() {
                return Ok(());
            }
            match rolling::begin_segment(&self.shared.path, self.log.newest.number + 1) {
                Ok(segment) => {
                    #[cfg(test)]
                    segment.before_sync.lock().unwrap().clone_from(&self.log.newest.before_sync.lock().unwrap());
                    self.rolling = Some(Rolling { segment, carrying: Carrying::of(CARRIED) });
                }
                Err(error) => {
                    self.keep_segment(&error);
                    return Ok(());
                }
            }
            faults::reach("segment-begun");
        }
        loop {
            let Some(Rolling { segment, carrying }) = &mut self.rolling else { return Ok(()) };
            match carrying.next(&self.log.newest, segment) {
                Ok(false) => break,
                Ok(true) if is_asked => {}
                Ok(true) => return Ok(()),
                Err(error @ StoreError::Damaged { segment, .. }) if segment == self.log.newest.number => {
                    return Err(error);
                }
                Err(error) => {
                    self.keep_segment(&error);
                    return Ok(());
                }
            }
        }
        self.commit()?;
        let Some(Rolling { segment, .. }) = self.rolling.take() else { return Ok(()) };
        let mut older = self.log.older.clone();
        let all = piece::keys(piece::BLOCK, 1..=piece::NUMBER_MAX);
        let first = self.log.newest.edge(all, false)?.and_then(|(key, _)| piece::key_sequence(&key));
        let last = self.marks.acknowledged.sequence;
        if let Some(first) = first.filter(|_| last > self.marks.settled.sequence) {
            let (number, log_bytes) = (self.log.newest.number, self.log.newest.bytes());
            older.push(OlderSegment { number, first, last, log_bytes });
        }
        if let Err(error) = rolling::finish_segment(&segment, &older, &self.marks) {
            self.keep_segment(&error);
            return Ok(());
        }
        tracing::debug!(segment = segment.number, older = older.len(), "began a segment of the queue");
        let log = self.log.with_newest(Arc::new(segment), older);
        let old = std::mem::replace(&mut self.log, log).newest;
        self.begun_bytes = self.log.newest.bytes();
        self.publish_log();
        faults::reach("segment-switched");
        // Before the old one goes: where the new one comes back empty it must not be taken for unfinished.
        self.mark.raise(self.log.newest.highest(self.marks.acknowledged.sequence))?;
        if self.log.older.iter().all(|one| one.number != old.number) {
            rolling::remove_segment(&self.shared.path, old.number);
        }
        self.publish_committed();
        Ok(())
    }

    /// Nothing has happened yet: the large segment can go on serving, and says so by its size.
    fn keep_segment(&mut self, error: &StoreError) {
        tracing::warn!(%error, "could not begin a segment of the queue, going on with the large one");
        self.rolling = None;
        rolling::remove_segment(&self.shared.path, self.log.newest.number + 1);
        self.roll_not_before = Some(Instant::now() + ROLL_AGAIN_AFTER);
    }

    /// Lets go of the segments in which everything is settled, once that is on disk.
    fn remove_spent(&mut self) {
        let is_spent = |one: &OlderSegment| one.last <= self.settled_synced;
        let spent: Vec<u64> = self.log.older.iter().filter(|one| is_spent(one)).map(|one| one.number).collect();
        if spent.is_empty() {
            return;
        }
        self.log = self.log.without_settled(self.settled_synced);
        self.publish_log();
        self.shared.state().stats.disk_bytes = self.log.bytes();
        for number in spent {
            faults::reach("segment-spent");
            // Who still reads in it has its files open.
            rolling::remove_segment(&self.shared.path, number);
        }
    }

    fn publish_log(&self) {
        let log = Arc::new(self.log.clone());
        *self.shared.log.write().unwrap_or_else(PoisonError::into_inner) = Some(log);
    }

    /// Tells what is settled: fewer events, more room.
    fn publish_settled(&mut self) -> Result<(), StoreError> {
        let (durable, known, first) = {
            let state = self.shared.state();
            (state.durable, state.stats.oldest, self.marks.settled.sequence + 1)
        };
        let oldest = match known {
            Some((sequence, _)) if sequence.get() >= first => known,
            _ if first > durable => None,
            _ => reader::oldest(&self.log, first, durable)?,
        };
        if oldest.is_none()
            && self.marks.acknowledged.sequence == durable
            && self.marks.settled != self.marks.acknowledged
        {
            // Nothing but rejections and lost ones is behind it.
            self.marks.settled = self.marks.acknowledged;
            self.unwritten_since.get_or_insert_with(Instant::now);
        }
        let (pending, pending_bytes) = self.pending();
        let mut state = self.shared.state();
        state.stats.oldest = oldest;
        state.settled = self.marks.settled.sequence;
        state.stats.pending = pending;
        state.stats.pending_bytes = pending_bytes;
        let full = pending > 0
            && (pending_bytes >= self.shared.max_pending_bytes
                || self.room_wanted.is_some_and(|wanted| pending_bytes > wanted));
        let room_appeared = state.stats.full && !full;
        state.stats.full = full;
        drop(state);
        if room_appeared {
            self.room_wanted = None;
            self.shared.room.notify_all();
        }
        Ok(())
    }

    /// Tells what is durable by now.
    fn publish_committed(&mut self) {
        let (pending, pending_bytes) = self.pending();
        let disk_bytes = self.log.bytes();
        let mut state = self.shared.state();
        state.durable = self.marks.acknowledged.sequence;
        state.stats.last_sequence = Sequence::new(self.marks.acknowledged.sequence);
        state.stats.pending = pending;
        state.stats.pending_bytes = pending_bytes;
        state.stats.dead_letters = self.letters.count;
        state.stats.disk_bytes = disk_bytes;
        state.letters = self.letters;
        if state.stats.oldest.is_none()
            && pending > 0
            && let Ok(oldest) =
                reader::oldest(&self.log, self.marks.settled.sequence + 1, self.marks.acknowledged.sequence)
        {
            state.stats.oldest = oldest;
        }
        state.stats.full |= pending > 0 && pending_bytes >= self.shared.max_pending_bytes;
        drop(state);
        if let Some(newest) = self.newest_event.take() {
            self.shared.newest.send_replace(Some(newest));
        }
    }

    /// Lets go of files and lock, and refuses whatever still comes.
    fn release(self) {
        let Writer { shared, log, lock, rolling, .. } = self;
        shared.inbox.end(QueueError::Closed);
        shared.state().closed = true;
        shared.room.notify_all();
        drop(shared.log.write().unwrap_or_else(PoisonError::into_inner).take());
        // One that is half made is a left-over.
        if let Some(Rolling { segment, .. }) = rolling {
            let number = segment.number;
            drop(segment);
            rolling::remove_segment(&shared.path, number);
        }
        // The lock goes last: who opens next must not find sled's own lock held by a reader of ours.
        let readers = Arc::downgrade(&log.newest);
        drop(log);
        let deadline = Instant::now() + READERS_WAIT;
        while readers.strong_count() > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(lock);
    }
}
