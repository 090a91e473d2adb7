//! The one thread that changes the queue.
//!
//! A round: take all that has arrived, stage it as one batch, apply, sync, publish, answer. What is settled is only noted: it
//! goes with the next batch, or is written by itself a little later. A batch above [`STAGE_BYTES_MAX`] is applied and synced in
//! parts; its commit, the mark `m`, is in the last one.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::folder::{self, Letters, Lock, Mark, Opened};
use super::log::{self, Log};
use super::piece::{self, BlockBuilder, CONTENT_BYTES_MAX, OlderSegment, PART_BYTES_MAX, Piece, Totals};
use super::reader;
use super::repairs::{Accepted, Outcome, QueueError, RetryOutcome};
use super::segment::{Changes, Segment, StoreError};
use super::shared::Shared;
use super::submission::{EncodedBatch, EncodedCursor, Reply, Work};
use crate::event::{DeadContent, Sequence, Timestamp};
use crate::queue::codec::{self, CodecError, Content, Letter};
use crate::queue::faults;

/// Bytes of one batch of sled's. Above it the staged part is applied and synced first.
const STAGE_BYTES_MAX: usize = 512 << 10;

/// How long it may take until it is on disk what is settled. Losing it only repeats a delivery.
const SETTLED_UNWRITTEN_MAX: Duration = Duration::from_millis(20);

/// Size of its log above which a segment gets no more events, while some wait, and above which one is left where none do.
const SEGMENT_BYTES: u64 = 64 << 20;

/// Bytes that are carried over to a new segment between two rounds: some ten milliseconds.
const SLICE_BYTES: usize = 512 << 10;

/// Pause after a segment that could not be made.
const ROLL_AGAIN_AFTER: Duration = Duration::from_secs(60);

/// How long closing waits for readers to let go.
const READERS_WAIT: Duration = Duration::from_secs(2);

/// Kinds that are carried over to a new segment.
const CARRIED: [u8; 4] = [piece::CURSOR, piece::LETTER, piece::LETTER_CONTENT, piece::HOLE];

pub struct Writer {
    shared: Arc<Shared>,
    /// When the queue was opened; microseconds since 1970.
    opened: u64,
    log: Log,
    lock: Lock,
    mark: Mark,
    /// As staged: what the commit that comes next will say.
    acknowledged: Totals,
    settled: Totals,
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
    /// Segments in which all is settled, until nobody reads them any more.
    spent: Vec<(Weak<Segment>, u64)>,
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

    fn close_tail(&mut self, opened: u64) {
        if !self.tail.is_empty() {
            let (key, value) = self.tail.take(opened);
            self.changes.insert(key, value);
        }
    }
}

/// A segment that is being made.
struct Rolling {
    segment: Segment,
    /// The kind that is being carried over, and the key from which on.
    kind: usize,
    from: Vec<u8>,
}

/// How answers wait for the end of their round.
#[derive(Default)]
struct Round {
    after_settling: Vec<Reply<()>>,
    after_sync: Vec<Answer>,
    close: Option<Reply<()>>,
    roll: Vec<Reply<()>>,
}

enum Answer {
    Append(Reply<Accepted>, Result<Accepted, QueueError>),
    Retry(Reply<RetryOutcome>, Result<RetryOutcome, QueueError>),
    Drop(Reply<bool>, bool),
    /// A settlement with a dead letter.
    Settle(Reply<()>),
}

impl Answer {
    /// The asker may have gone; then nobody needs the answer.
    fn give(self) {
        match self {
            Answer::Append(reply, answer) => drop(reply.send(answer)),
            Answer::Retry(reply, answer) => drop(reply.send(answer)),
            Answer::Drop(reply, answer) => drop(reply.send(Ok(answer))),
            Answer::Settle(reply) => drop(reply.send(Ok(()))),
        }
    }

    fn refuse(self, error: &QueueError) {
        match self {
            Answer::Append(reply, _) => drop(reply.send(Err(error.clone()))),
            Answer::Retry(reply, _) => drop(reply.send(Err(error.clone()))),
            Answer::Drop(reply, _) => drop(reply.send(Err(error.clone()))),
            Answer::Settle(reply) => drop(reply.send(Err(error.clone()))),
        }
    }
}

impl Writer {
    pub fn new(shared: Arc<Shared>, lock: Lock, opened: Opened) -> Self {
        let Opened { mark, log, acknowledged, settled, letters, .. } = opened;
        Writer {
            shared,
            opened: u64::try_from(Timestamp::now().as_microsecond()).unwrap_or(0),
            log,
            lock,
            mark,
            acknowledged,
            settled,
            settled_synced: settled.sequence,
            unwritten_since: None,
            letters,
            stage: Stage::default(),
            newest_event: None,
            room_wanted: None,
            rolling: None,
            roll_not_before: None,
            spent: Vec::new(),
        }
    }

    /// Works until it is told to close or the storage fails.
    pub fn run(mut self) {
        loop {
            let patience = match self.unwritten_since {
                _ if self.rolling.is_some() || self.is_worth_rolling() => Some(Duration::ZERO),
                Some(since) => Some(SETTLED_UNWRITTEN_MAX.saturating_sub(since.elapsed())),
                None if !self.spent.is_empty() => Some(Duration::from_secs(1)),
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
                round.after_sync.into_iter().for_each(|answer| answer.refuse(&error));
                let waiting = round.after_settling.into_iter().chain(round.roll);
                waiting.for_each(|reply| drop(reply.send(Err(error.clone()))));
                let closing = round.close;
                self.release();
                if let Some(reply) = closing {
                    let _ = reply.send(Err(error));
                }
                return;
            }
            if let Some(reply) = round.close {
                self.release();
                let _ = reply.send(Ok(()));
                return;
            }
        }
    }

    fn round(&mut self, works: Vec<Work>, round: &mut Round) -> Result<(), StoreError> {
        for work in works {
            match work {
                Work::Append(batch, reply) => match self.append(batch) {
                    Ok(answer) => round.after_sync.push(Answer::Append(reply, answer)),
                    Err(error) => {
                        round.after_sync.push(Answer::Append(reply, Ok(Accepted::default())));
                        return Err(error);
                    }
                },
                Work::Settle(outcomes, reply) => {
                    let has_letters = outcomes.iter().any(|(_, outcome)| matches!(outcome, Outcome::Refused { .. }));
                    match has_letters {
                        true => round.after_sync.push(Answer::Settle(reply)),
                        false => round.after_settling.push(reply),
                    }
                    self.settle(outcomes)?;
                }
                Work::Retry(sequence, reply) => {
                    let answer = self.retry(sequence)?;
                    round.after_sync.push(Answer::Retry(reply, answer));
                }
                Work::Drop(sequence, reply) => {
                    let answer = self.drop_dead_letter(sequence)?;
                    round.after_sync.push(Answer::Drop(reply, answer));
                }
                Work::Roll(reply) => round.roll.push(reply),
                Work::Close(reply) => {
                    round.close = Some(reply);
                    break;
                }
            }
        }
        self.publish_settled()?;
        for reply in round.after_settling.drain(..) {
            let _ = reply.send(Ok(()));
        }
        let is_due = self.unwritten_since.is_some_and(|since| since.elapsed() >= SETTLED_UNWRITTEN_MAX);
        if self.stage.is_begun
            || !self.stage.changes.is_empty()
            || is_due
            || round.close.is_some()
            || !round.roll.is_empty()
        {
            self.commit()?;
        }
        for answer in round.after_sync.drain(..) {
            answer.give();
        }
        if round.close.is_none() {
            self.roll(!round.roll.is_empty())?;
        }
        for reply in round.roll.drain(..) {
            let _ = reply.send(Ok(()));
        }
        self.spent.retain(|(segment, number)| {
            let is_read = segment.strong_count() > 0;
            if !is_read {
                folder::remove_segment(&self.shared.path, *number);
            }
            is_read
        });
        Ok(())
    }

    /// Applies what is staged with the marks that go with it, makes it durable, and tells so.
    fn commit(&mut self) -> Result<(), StoreError> {
        self.stage.close_tail(self.opened);
        if self.stage.is_begun {
            let value = self.acknowledged.encode(piece::ACKNOWLEDGED, self.opened);
            self.stage.changes.insert(piece::single_key(piece::ACKNOWLEDGED), value);
            self.stage.is_begun = false;
        }
        if self.unwritten_since.take().is_some() {
            self.stage
                .changes
                .insert(piece::single_key(piece::SETTLED), self.settled.encode(piece::SETTLED, self.opened));
        }
        faults::reach("commit-before-apply");
        self.apply()?;
        faults::reach("commit-synced");
        self.settled_synced = self.settled.sequence;
        self.mark.raise(self.acknowledged.sequence, &self.log.newest)?;
        self.remove_spent();
        self.publish_committed();
        Ok(())
    }

    /// One batch, one sync.
    fn apply(&mut self) -> Result<(), StoreError> {
        let changes = std::mem::take(&mut self.stage.changes);
        if let Some(rolling) = &self.rolling {
            rolling.segment.apply(changes.of_kinds(&CARRIED))?;
        }
        self.log.newest.apply(changes)?;
        faults::reach("commit-applied");
        self.log.newest.sync().inspect_err(|_| folder::mark_unsynced(&self.shared.path))
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
        let before = self.acknowledged;
        let mut accepted = Accepted { sequences: Vec::with_capacity(batch.events.len()) };
        let mut next = before;
        for record in &batch.events {
            let (part, rest) = record.split_at_checked(PART_BYTES_MAX).unwrap_or((record, &[]));
            let sequence = next.sequence + 1;
            for (index, chunk) in (1..).zip(rest.chunks(CONTENT_BYTES_MAX)) {
                let value = Piece { kind: piece::CHUNK, sequence, index, opened: self.opened, content: chunk }.encode();
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
        self.acknowledged = next;
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
        self.log.pending(&self.settled, &self.acknowledged)
    }

    fn add_entry(&mut self, totals: &Totals, record_bytes: u32, part: &[u8]) -> Result<(), StoreError> {
        if !self.stage.tail.has_room(part.len()) {
            let (key, value) = self.stage.tail.take(self.opened);
            self.put(key, value)?;
        }
        self.stage.tail.add(totals, record_bytes, part);
        Ok(())
    }

    fn put_letter(&mut self, sequence: u64, letter: &[u8], content: &[u8]) -> Result<(), StoreError> {
        for (index, chunk) in (0..).zip(content.chunks(CONTENT_BYTES_MAX)) {
            let value =
                Piece { kind: piece::LETTER_CONTENT, sequence, index, opened: self.opened, content: chunk }.encode();
            self.letters.bytes += value.len() as u64;
            self.put(piece::indexed_key(piece::LETTER_CONTENT, sequence, index), value)?;
        }
        let value = Piece { kind: piece::LETTER, sequence, index: 0, opened: self.opened, content: letter }.encode();
        self.letters.count += 1;
        self.put(piece::key(piece::LETTER, sequence), value)
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
            let value = Piece { kind: piece::CURSOR, sequence: 0, index, opened: self.opened, content: chunk }.encode();
            self.stage.changes.insert(piece::cursor_key(cursor.id, index), value);
            chunks = index + 1;
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
        let (mut through, mut events) = (self.settled.sequence, 0);
        for (sequence, outcome) in outcomes {
            // Settled before, or never given.
            if sequence.get() <= through || sequence.get() > self.acknowledged.sequence {
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
        let lost = self.log.lost_behind(self.settled.sequence).0 - self.log.lost_behind(through).0;
        if totals.events != self.settled.events + lost + events {
            return Err(StoreError::Io(format!(
                "{events} events up to {through} were to be settled, and they are not the oldest ones"
            )));
        }
        self.settled = totals;
        self.unwritten_since.get_or_insert_with(Instant::now);
        if self.pending().0 == 0 {
            // Nothing but rejections and holes is behind it.
            self.settled = self.acknowledged;
        }
        Ok(())
    }

    /// Stages an event, which has just been settled, as a dead letter.
    fn bury(&mut self, sequence: u64, letter: &Letter) -> Result<(), StoreError> {
        let mut record = Vec::new();
        self.log.each_block(sequence, sequence, |segment, block| {
            let entry = block.entries.iter().find(|entry| entry.sequence == sequence);
            if let Some(entry) = entry {
                record = log::record(segment, entry)?;
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
        let is_large = self.log.newest.bytes() > faults::segment_bytes(SEGMENT_BYTES);
        is_large && self.roll_not_before.is_none_or(|then| then <= Instant::now())
    }

    /// Makes the next segment, a slice at a time, where the newest is large; all at once where it `is_asked`.
    fn roll(&mut self, is_asked: bool) -> Result<(), StoreError> {
        if self.rolling.is_none() {
            if !is_asked && !self.is_worth_rolling() {
                return Ok(());
            }
            match folder::begin_segment(&self.shared.path, self.log.newest.number + 1) {
                Ok(segment) => {
                    #[cfg(test)]
                    segment.before_sync.lock().unwrap().clone_from(&self.log.newest.before_sync.lock().unwrap());
                    self.rolling = Some(Rolling { segment, kind: 0, from: Vec::new() });
                }
                Err(error) => {
                    self.keep_segment(&error);
                    return Ok(());
                }
            }
            faults::reach("segment-begun");
        }
        loop {
            match self.carry_slice() {
                Ok(true) => break,
                Ok(false) if is_asked => {}
                Ok(false) => return Ok(()),
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
        let last = self.acknowledged.sequence;
        if let Some(first) = first.filter(|_| last > self.settled.sequence) {
            let (number, log_bytes) = (self.log.newest.number, self.log.newest.bytes());
            older.push(OlderSegment { number, first, last, log_bytes });
        }
        if let Err(error) = folder::finish_segment(&segment, &older, &self.acknowledged, &self.settled) {
            self.keep_segment(&error);
            return Ok(());
        }
        tracing::debug!(segment = segment.number, older = older.len(), "began a segment of the queue");
        let log = self.log.with_newest(Arc::new(segment), older);
        let old = std::mem::replace(&mut self.log, log).newest;
        self.publish_log();
        faults::reach("segment-switched");
        if self.log.older.iter().all(|one| one.number != old.number) {
            self.spent.push((Arc::downgrade(&old), old.number));
        }
        self.mark.raise(self.acknowledged.sequence, &self.log.newest)?;
        self.publish_committed();
        Ok(())
    }

    /// Carries the next slice over to the next segment. True: that was all.
    fn carry_slice(&mut self) -> Result<bool, StoreError> {
        let Some(rolling) = &mut self.rolling else { return Ok(true) };
        let Some(kind) = CARRIED.get(rolling.kind) else { return Ok(true) };
        let (start, end) = piece::all_keys(*kind).into_inner();
        let mut changes = Changes::default();
        let mut last = None;
        self.log.newest.each(start.max(rolling.from.clone())..=end, |key, value| {
            changes.insert(key.to_vec(), value.to_vec());
            last = Some(key.to_vec());
            changes.bytes() < SLICE_BYTES
        })?;
        rolling.segment.apply(changes)?;
        rolling.segment.sync()?;
        match last {
            Some(mut last) => {
                last.push(0);
                rolling.from = last;
            }
            None => {
                rolling.kind += 1;
                rolling.from.clear();
            }
        }
        Ok(CARRIED.get(rolling.kind).is_none())
    }

    /// Nothing has happened yet: the large segment can go on serving, and says so by its size.
    fn keep_segment(&mut self, error: &StoreError) {
        tracing::warn!(%error, "could not begin a segment of the queue, going on with the large one");
        self.rolling = None;
        folder::remove_segment(&self.shared.path, self.log.newest.number + 1);
        self.roll_not_before = Some(Instant::now() + ROLL_AGAIN_AFTER);
    }

    /// Lets go of the segments in which everything is settled, once that is on disk.
    fn remove_spent(&mut self) {
        let is_spent = |one: &OlderSegment| one.last <= self.settled_synced;
        let spent: Vec<u64> = self.log.older.iter().filter(|one| is_spent(one)).map(|one| one.number).collect();
        if spent.is_empty() && self.log.holes.iter().all(|hole| hole.last > self.settled_synced) {
            return;
        }
        self.log = self.log.without_settled(self.settled_synced);
        self.publish_log();
        for number in spent {
            faults::reach("segment-spent");
            // Who still reads in it has its files open.
            folder::remove_segment(&self.shared.path, number);
        }
    }

    fn publish_log(&self) {
        let log = Arc::new(self.log.clone());
        *self.shared.log.write().unwrap_or_else(PoisonError::into_inner) = Some(log);
    }

    /// Tells what is settled: fewer events, more room.
    fn publish_settled(&mut self) -> Result<(), StoreError> {
        let (pending, pending_bytes) = self.pending();
        let (durable, known, first) = {
            let state = self.shared.state();
            (state.durable, state.stats.oldest, self.settled.sequence + 1)
        };
        let oldest = match known {
            Some((sequence, _)) if sequence.get() >= first => known,
            _ if first > durable => None,
            _ => reader::oldest(&self.log, first, durable)?,
        };
        let mut state = self.shared.state();
        state.stats.oldest = oldest;
        state.settled = self.settled.sequence;
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
        state.durable = self.acknowledged.sequence;
        state.stats.last_sequence = Sequence::new(self.acknowledged.sequence);
        state.stats.pending = pending;
        state.stats.pending_bytes = pending_bytes;
        state.stats.dead_letters = self.letters.count;
        state.stats.disk_bytes = disk_bytes;
        state.letters = self.letters;
        if state.stats.oldest.is_none()
            && pending > 0
            && let Ok(oldest) = reader::oldest(&self.log, self.settled.sequence + 1, self.acknowledged.sequence)
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
        let Writer { shared, log, lock, rolling, spent, .. } = self;
        shared.inbox.end(QueueError::Closed);
        shared.state().closed = true;
        shared.room.notify_all();
        drop(shared.log.write().unwrap_or_else(PoisonError::into_inner).take());
        // One that is half made is a left-over.
        if let Some(Rolling { segment, .. }) = rolling {
            let number = segment.number;
            drop(segment);
            folder::remove_segment(&shared.path, number);
        }
        // The lock goes last: who opens next must not find sled's own lock held by a reader of ours.
        let readers = Arc::downgrade(&log.newest);
        drop(log);
        let deadline = Instant::now() + READERS_WAIT;
        while readers.strong_count() > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        for (segment, number) in spent {
            if segment.strong_count() == 0 {
                folder::remove_segment(&shared.path, number);
            }
        }
        drop(lock);
    }
}
