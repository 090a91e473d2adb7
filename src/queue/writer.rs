//! The one thread that changes the queue.
//!
//! A round: take all that has arrived, stage it as one batch, apply, answer settlements, sync, publish, answer appends.
//! A batch above [`STAGE_BYTES_MAX`] is applied and synced in parts; its commit (the counters) is in the last one.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::block::{self, Block, PART_BYTES_MAX};
use super::codec::{self, CodecError, Content, Counters, Letter};
use super::database::StoreError;
use super::faults;
use super::folder::{self, Lock, Mark, corrupt};
use super::journal;
use super::reader;
use super::store::{self, CHUNK_BYTES, Changes, Store};
use super::submission::{EncodedBatch, EncodedCursor, Reply, Work};
use super::{Accepted, CURSOR_CHUNKS_MAX, Outcome, QueueError, RetryOutcome, Shared};
use crate::event::{DeadContent, Sequence, Timestamp};

/// Bytes of one sled batch. Above it the staged part is applied and synced first.
const STAGE_BYTES_MAX: usize = 512 << 10;

/// How long changes that nobody waits for may stay unsynced. Longer than it takes the next append of a burst to come,
/// so that they share its sync; short enough that an append after a pause does not have to sync them first.
const LAZY_SYNC_AFTER: Duration = Duration::from_millis(2);

/// Size of the files above which a queue that is empty, or nearly, moves on to fresh ones.
const COMPACT_ABOVE_BYTES: u64 = 48 << 20;

/// Size of its files above which a generation is sealed while half as much is pending: sled has 2 MB of memory for each
/// that is open. With less pending, sled finds room in the files it has. While that much is drained it is sealed at once: of
/// a sealed one no page is written anew for each event that leaves.
const SEAL_ABOVE_BYTES: u64 = 256 << 20;

/// What a block of the current generation that loses entries takes in memory until its batch is through: its share of a
/// batch that is to stay below some 64 copies of sled's pages of 64 kB.
const TOUCHED_BYTES: usize = 16 << 10;

/// Bytes of pending events that are carried over to fresh files. A queue that events keep passing through is never
/// empty, but soon has less than that.
pub const CARRIED_BYTES_MAX: u64 = 4 << 20;

/// Pause after a generation that could not be made, and after one that was made while there was work to do.
const COMPACT_AGAIN_AFTER: Duration = Duration::from_secs(60);

/// How long closing waits for readers to let go.
const READERS_WAIT: Duration = Duration::from_secs(2);

pub struct Writer {
    shared: Arc<Shared>,
    store: Arc<Store>,
    lock: Lock,
    mark: Mark,
    generation: u64,
    /// As staged: what the commit that comes next will say.
    counters: Counters,
    stage: Stage,
    /// The newest number given to an event, durable after the next sync.
    newest_event: Option<Sequence>,
    /// Whether `counters` differ from those last applied.
    counters_changed: bool,
    /// Whether events were removed since it was looked up which is the oldest.
    oldest_unknown: bool,
    /// Whether events of the current generation were removed in this round.
    drains_current: bool,
    /// Events that were to be taken out and were not found: taken out before, as a rule.
    not_found: Vec<Sequence>,
    /// Pending bytes with which the last refused batch would fit.
    room_wanted: Option<u64>,
    compact_not_before: Option<Instant>,
    /// After a generation that could not be made.
    seal_not_before: Option<Instant>,
    /// Size of the files when they were fresh; 0 while that is not known.
    fresh_bytes: u64,
}

#[derive(Default)]
struct Stage {
    changes: Changes,
    /// New events, until they fill a block.
    tail: Block,
    /// Blocks of the store that have lost entries, by their number: what is left of each.
    touched: BTreeMap<u64, Block>,
    /// What they take until they are applied.
    touched_bytes: usize,
    /// Whether what is staged may be applied in parts: nothing but the batch that is being staged is in it.
    may_split: bool,
}

impl Stage {
    fn bytes(&self) -> usize {
        self.changes.bytes() + self.tail.bytes() + self.touched_bytes
    }

    fn close_tail(&mut self) {
        let tail = std::mem::take(&mut self.tail);
        if let Some(first) = tail.first() {
            self.changes.insert(&store::block_key(first.get()), &tail.encode());
        }
    }
}

/// How answers wait for the end of their round.
#[derive(Default)]
struct Round {
    after_apply: Vec<Reply<()>>,
    after_sync: Vec<Answer>,
    /// Whether somebody waits for the disk.
    needs_sync: bool,
    close: Option<Reply<()>>,
    compact: Vec<Reply<bool>>,
}

enum Answer {
    Append(Reply<Accepted>, Result<Accepted, QueueError>),
    Retry(Reply<RetryOutcome>, Result<RetryOutcome, QueueError>),
    Drop(Reply<bool>, bool),
    SetAside(Reply<()>),
}

impl Answer {
    /// The asker may have gone; then nobody needs the answer.
    fn give(self) {
        match self {
            Answer::Append(reply, answer) => drop(reply.send(answer)),
            Answer::Retry(reply, answer) => drop(reply.send(answer)),
            Answer::Drop(reply, answer) => drop(reply.send(Ok(answer))),
            Answer::SetAside(reply) => drop(reply.send(Ok(()))),
        }
    }

    fn refuse(self, error: &QueueError) {
        match self {
            Answer::Append(reply, _) => drop(reply.send(Err(error.clone()))),
            Answer::Retry(reply, _) => drop(reply.send(Err(error.clone()))),
            Answer::Drop(reply, _) => drop(reply.send(Err(error.clone()))),
            Answer::SetAside(reply) => drop(reply.send(Err(error.clone()))),
        }
    }
}

impl Writer {
    pub fn new(
        shared: Arc<Shared>,
        store: Arc<Store>,
        lock: Lock,
        mark: Mark,
        generation: u64,
        counters: Counters,
    ) -> Self {
        Writer {
            shared,
            store,
            lock,
            mark,
            generation,
            counters,
            stage: Stage::default(),
            newest_event: None,
            counters_changed: false,
            oldest_unknown: false,
            drains_current: false,
            not_found: Vec::new(),
            room_wanted: None,
            compact_not_before: None,
            seal_not_before: None,
            fresh_bytes: 0,
        }
    }

    /// Works until it is told to close or the storage fails.
    pub fn run(mut self) {
        // A queue that was left empty, or nearly, and large has its idle moment now.
        let mut lazy_since = self.is_worth_compacting().then(Instant::now);
        loop {
            let patience = lazy_since.map(|since| LAZY_SYNC_AFTER.saturating_sub(since.elapsed()));
            let Some(works) = self.shared.inbox.take(patience) else {
                // A reader met an error that ended the queue.
                return self.release();
            };
            let idle = works.is_empty();
            let mut round = Round::default();
            // A panic must not leave callers waiting for ever: it ends the queue like any storage error.
            let outcome = catch_unwind(AssertUnwindSafe(|| self.round(works, idle, &mut round)))
                .unwrap_or_else(|_| Err(StoreError::Corrupt("writer panicked".into())));
            if let Err(error) = outcome {
                let error = self.shared.fail(&error);
                round.after_sync.into_iter().for_each(|answer| answer.refuse(&error));
                round.after_apply.into_iter().for_each(|reply| drop(reply.send(Err(error.clone()))));
                round.compact.into_iter().for_each(|reply| drop(reply.send(Err(error.clone()))));
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
            let has_work = self.store.is_unsynced() || self.store.is_journal_half_full();
            lazy_since = has_work.then(|| lazy_since.unwrap_or_else(Instant::now));
        }
    }

    fn round(&mut self, works: Vec<Work>, idle: bool, round: &mut Round) -> Result<(), StoreError> {
        for work in works {
            match work {
                Work::Append(batch, reply) => {
                    let only_cursors = batch.events.is_empty() && batch.rejections.is_empty();
                    let answer = self.append(batch);
                    round.needs_sync |= matches!(answer, Ok(Ok(_))) && !only_cursors;
                    match answer {
                        Ok(answer) => round.after_sync.push(Answer::Append(reply, answer)),
                        Err(error) => {
                            round.after_sync.push(Answer::Append(reply, Ok(Accepted::default())));
                            return Err(error);
                        }
                    }
                }
                Work::Settle(outcomes, reply) => {
                    round.after_apply.push(reply);
                    self.settle(outcomes)?;
                }
                Work::SetAside(sequences, reply) => {
                    round.after_sync.push(Answer::SetAside(reply));
                    round.needs_sync = true;
                    self.set_aside(&sequences)?;
                }
                Work::Retry(sequence, reply) => {
                    let answer = self.retry(sequence)?;
                    round.needs_sync |= matches!(answer, Ok(RetryOutcome::Queued(_)));
                    round.after_sync.push(Answer::Retry(reply, answer));
                }
                Work::Drop(sequence, reply) => {
                    let answer = self.drop_dead_letter(sequence)?;
                    round.needs_sync |= answer;
                    round.after_sync.push(Answer::Drop(reply, answer));
                }
                Work::Compact(reply) => round.compact.push(reply),
                Work::Close(reply) => round.close = Some(reply),
            }
            if round.close.is_some() {
                break;
            }
        }
        faults::reach(if round.needs_sync { "append-before-apply" } else { "settle-before-apply" });
        self.apply_stage()?;
        faults::reach(if round.needs_sync { "append-applied" } else { "settle-applied" });
        self.publish_applied()?;
        for reply in round.after_apply.drain(..) {
            let _ = reply.send(Ok(()));
        }
        if round.needs_sync || idle || round.close.is_some() {
            self.store.sync()?;
            faults::reach(if round.needs_sync { "append-synced" } else { "settle-synced" });
            self.publish_synced()?;
        }
        for answer in round.after_sync.drain(..) {
            answer.give();
        }
        if idle && self.store.is_journal_half_full() {
            self.store.carry_over()?;
        }
        if !round.compact.is_empty() || (round.close.is_none() && self.is_worth_compacting()) {
            let done = self.compact()?;
            if !idle {
                // Whoever waits for an answer is held up meanwhile: not again and again.
                self.compact_not_before = Some(Instant::now() + COMPACT_AGAIN_AFTER);
            }
            for reply in round.compact.drain(..) {
                let _ = reply.send(Ok(done));
            }
        } else if round.close.is_none() && self.is_worth_sealing() {
            self.seal()?;
        }
        self.store.drop_spent()
    }

    /// Whether the files are large for what is in them, and fresh ones are soon made.
    fn is_worth_compacting(&self) -> bool {
        let live_bytes_max =
            self.counters.dead_letter_bytes.saturating_add(self.counters.pending_bytes).saturating_mul(4);
        // Many cursors make fresh files large too: they are not made again and again.
        let large = faults::compact_above(COMPACT_ABOVE_BYTES)
            .saturating_add(live_bytes_max)
            .max(self.fresh_bytes.saturating_mul(2));
        self.counters.pending_bytes <= CARRIED_BYTES_MAX
            && self.store.disk_bytes() > large
            && self.compact_not_before.is_none_or(|then| then <= Instant::now())
    }

    /// Whether the current generation is large, or a backlog that is being drained, and what is in it too much to be
    /// carried over.
    fn is_worth_sealing(&mut self) -> bool {
        let large = faults::seal_above(SEAL_ABOVE_BYTES);
        let pending = self.counters.pending_bytes;
        let drains = std::mem::take(&mut self.drains_current);
        // The system is asked for the size of the files only where it matters.
        let is_due = pending > large / 2 && {
            // What is not of pending events is copied: not again and again.
            let copied_bytes = self.fresh_bytes.max(self.counters.dead_letter_bytes).saturating_mul(2);
            let own_bytes = self.store.own_bytes().saturating_sub(copied_bytes);
            own_bytes > large || (drains && own_bytes > pending)
        };
        let may_be = self.seal_not_before.is_none_or(|then| then <= Instant::now());
        // Where nothing came since the last time there is nothing to seal.
        ((is_due && may_be) || self.store.hooks().take_seal_next())
            && self.counters.pending > 0
            && self.counters.next_sequence > self.store.sealed_end()
    }

    /// Seals the current generation and moves on to a fresh one. `sealed` says what that means.
    fn seal(&mut self) -> Result<(), StoreError> {
        let begun = Instant::now();
        self.store.carry_over()?;
        let (sealed, next) = (self.generation, self.generation + 1);
        match folder::seal_generation(&self.shared.path, &self.store, sealed, next, &self.counters) {
            Ok(new) => {
                let old = self.switch(new, next, ["seal-pointer-renamed", "seal-switched"])?;
                // All that stood in its journal is in sled.
                let _ = std::fs::remove_file(old.folder().join(journal::FILE));
                tracing::debug!(generation = sealed, bytes = old.own_bytes(), took = ?begun.elapsed(), "sealed a generation");
                self.publish_synced()
            }
            Err(error) => {
                self.keep_generation(&error);
                Ok(())
            }
        }
    }

    /// Points to the generation `next`, which is whole, and goes on with it; gives the one before.
    fn switch(&mut self, new: Store, next: u64, points: [&'static str; 2]) -> Result<Arc<Store>, StoreError> {
        let [renamed, switched] = points;
        folder::write_pointer(&self.shared.path, next, !new.sealed().is_empty())?;
        faults::reach(renamed);
        let new = Arc::new(new);
        self.fresh_bytes = new.own_bytes();
        let old = std::mem::replace(&mut self.store, Arc::clone(&new));
        *self.shared.store.write().unwrap_or_else(PoisonError::into_inner) = Some(new);
        faults::reach(switched);
        self.generation = next;
        Ok(old)
    }

    /// Nothing has happened yet: the large files can go on serving, and say so by their size.
    fn keep_generation(&mut self, error: &StoreError) {
        tracing::warn!(%error, "could not start a fresh generation of the queue, keeping the old one");
        folder::remove_generation(&self.shared.path, self.generation + 1);
        let later = Some(Instant::now() + COMPACT_AGAIN_AFTER);
        (self.compact_not_before, self.seal_not_before) = (later, later);
    }

    /// Moves on to a fresh generation if little is pending; says whether it did. `folder` says what is safe when.
    fn compact(&mut self) -> Result<bool, StoreError> {
        if self.counters.pending_bytes > CARRIED_BYTES_MAX {
            return Ok(false);
        }
        self.store.sync()?;
        let next = self.generation + 1;
        match folder::copy_generation(&self.shared.path, &self.store, next, &self.counters) {
            Ok(new) => {
                let old = self.switch(new, next, ["compact-pointer-renamed", "compact-switched"])?;
                old.retire();
                drop(old);
                faults::reach("compact-removed");
                self.publish_synced()?;
                Ok(true)
            }
            Err(error) => {
                self.keep_generation(&error);
                Ok(false)
            }
        }
    }

    /// Stages a batch. The inner error is the caller's, the outer one the end of the queue.
    fn append(&mut self, batch: EncodedBatch) -> Result<Result<Accepted, QueueError>, StoreError> {
        if let Err(error) = self.admit(&batch) {
            return Ok(Err(error));
        }
        self.stage.may_split = self.stage.bytes() + batch.bytes() > STAGE_BYTES_MAX;
        if self.stage.may_split {
            self.apply_stage()?;
            self.stage.may_split = true;
        }
        let mut next = self.counters;
        let mut accepted = Accepted { sequences: Vec::with_capacity(batch.events.len()) };
        for record in &batch.events {
            let sequence = take_sequence(&mut next)?;
            let part = self.put_chunks(sequence, record)?;
            if !self.stage.tail.has_room(part.len()) {
                self.stage.close_tail();
            }
            self.stage.tail.add(sequence, part.to_vec());
            next.add_event(sequence, record.len() as u64);
            accepted.sequences.push(sequence);
        }
        for rejection in &batch.rejections {
            let sequence = take_sequence(&mut next)?;
            let part = self.put_chunks(sequence, &rejection.content)?;
            self.put(&store::content_key(sequence.get()), part)?;
            self.put(&store::letter_key(sequence.get()), &rejection.letter)?;
            next.dead_letters += 1;
            next.dead_letter_bytes += rejection.content.len() as u64;
        }
        // From here on it is all in one sled batch with the counters: a cursor stands in its old place until the commit.
        for cursor in &batch.cursors {
            self.stage_cursor(cursor);
        }
        if next != self.counters {
            self.commit(next);
        }
        if let Some(&last) = accepted.sequences.last() {
            self.newest_event = Some(last);
        }
        Ok(Ok(accepted))
    }

    /// Whether there is room.
    fn admit(&mut self, batch: &EncodedBatch) -> Result<(), QueueError> {
        let full = QueueError::Full { pending_bytes: self.counters.pending_bytes, max: self.shared.max_pending_bytes };
        let fits = batch.events.is_empty()
            || self.counters.pending == 0
            || self.counters.pending_bytes + batch.event_bytes <= self.shared.max_pending_bytes;
        if fits {
            return Ok(());
        }
        self.room_wanted = Some(self.shared.max_pending_bytes.saturating_sub(batch.event_bytes));
        Err(full)
    }

    fn stage_cursor(&mut self, cursor: &EncodedCursor) {
        let head_key = store::cursor_key(cursor.id);
        let record = cursor.record.as_deref().unwrap_or_default();
        match record.split_at_checked(CHUNK_BYTES).unwrap_or((record, &[])) {
            ([], _) => self.stage.changes.remove(&head_key),
            (head, _) => self.stage.changes.insert(&head_key, head),
        }
        let chunks = record.chunks(CHUNK_BYTES).map(Some).chain(std::iter::repeat(None));
        for (index, chunk) in (0..).zip(chunks).take(CURSOR_CHUNKS_MAX).skip(1) {
            let key = store::cursor_chunk_key(&head_key, index);
            match chunk {
                Some(chunk) => self.stage.changes.insert(&key, chunk),
                None => self.stage.changes.remove(&key),
            }
        }
    }

    fn settle(&mut self, outcomes: Vec<(Sequence, Outcome)>) -> Result<(), StoreError> {
        let now = Timestamp::now();
        for (sequence, outcome) in outcomes {
            let Some(part) = self.take_event(sequence)? else {
                self.not_found.push(sequence);
                continue;
            };
            match outcome {
                Outcome::Delivered => self.remove_chunks(sequence, &part)?,
                Outcome::Refused { failure, attempts } => {
                    let letter = Letter { failed_at: now, failure, content: Content::Event, attempts };
                    self.bury(sequence, &part, &letter)?;
                }
            }
            if self.stage.bytes() > STAGE_BYTES_MAX {
                self.apply_stage()?;
            }
        }
        Ok(())
    }

    /// Events that a reader could not decode become dead letters, if they really can't be decoded.
    fn set_aside(&mut self, sequences: &[Sequence]) -> Result<(), StoreError> {
        let damaged = |error: &CodecError| Letter {
            failed_at: Timestamp::now(),
            failure: reader::damage(error),
            content: Content::Raw,
            attempts: 0,
        };
        folder::mark_reread(&self.shared.path);
        for &sequence in sequences {
            self.apply_stage()?;
            let Some((number, value)) = reader::block(&self.store, sequence)? else { continue };
            let entries = match block::entries(&value) {
                Ok(entries) => entries,
                Err(error) => {
                    self.bury_block(number, &value, &damaged(&error))?;
                    continue;
                }
            };
            let Some((_, part)) = entries.into_iter().find(|&(here, _)| here == sequence) else { continue };
            if let Err(error) = reader::event_record(&self.store, sequence, part)?
                && let Some(part) = self.take_event(sequence)?
            {
                self.bury(sequence, &part, &damaged(&error))?;
            }
        }
        self.apply_stage()
    }

    /// Stages the removal of a pending event and gives what stood in its block; `None` when there is no such event.
    fn take_event(&mut self, sequence: Sequence) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(number) = self.touch_block(sequence)? else { return Ok(None) };
        let Some(part) = self.stage.touched.get_mut(&number).and_then(|block| block.remove(sequence)) else {
            return Ok(None);
        };
        self.oldest_unknown = true;
        let mut next = self.counters;
        next.remove_event(sequence, stored_bytes(&part));
        self.commit(next);
        Ok(Some(part))
    }

    /// The number of the staged block with the event `sequence`, which is fetched when it is not staged yet.
    fn touch_block(&mut self, sequence: Sequence) -> Result<Option<u64>, StoreError> {
        if let Some((&number, block)) = self.stage.touched.range(..=sequence.get()).next_back()
            && block.contains(sequence)
        {
            return Ok(Some(number));
        }
        let Some((number, value)) = reader::block(&self.store, sequence)? else { return Ok(None) };
        if self.stage.touched.contains_key(&number) {
            return Ok(None);
        }
        // One that can't be read is found by whoever reads it, and set aside then.
        let Some(block) = Block::decode(&value).ok().filter(|block| block.contains(sequence)) else { return Ok(None) };
        self.stage.touched.insert(number, block);
        let is_sealed = number < self.store.sealed_end();
        self.stage.touched_bytes += if is_sealed { CHUNK_BYTES } else { TOUCHED_BYTES };
        self.drains_current |= !is_sealed;
        Ok(Some(number))
    }

    /// Turns an event that was taken into a dead letter; its further chunks stay where they are.
    fn bury(&mut self, sequence: Sequence, part: &[u8], letter: &Letter) -> Result<(), StoreError> {
        let letter = codec::encode_letter(letter).map_err(corrupt)?;
        self.stage.changes.insert(&store::letter_key(sequence.get()), &letter);
        self.stage.changes.insert(&store::content_key(sequence.get()), part);
        let mut next = self.counters;
        next.dead_letters += 1;
        next.dead_letter_bytes += stored_bytes(part);
        self.commit(next);
        Ok(())
    }

    /// Turns a block that can't be read into a dead letter of its own number: the numbers of its events are not known.
    fn bury_block(&mut self, number: u64, value: &[u8], letter: &Letter) -> Result<(), StoreError> {
        let mut next = self.counters;
        let sequence = take_sequence(&mut next)?;
        self.commit(next);
        self.stage.changes.remove(&store::block_key(number));
        self.bury(sequence, value, letter)?;
        self.apply_stage()?;
        // How many events it held is not known either: all others are counted.
        let reader::Counted { counters: counted, .. } = reader::recount(&self.store, 1)?;
        self.commit(Counters {
            pending: counted.pending,
            pending_bytes: counted.pending_bytes,
            pending_checksum: counted.pending_checksum,
            ..self.counters
        });
        self.oldest_unknown = true;
        Ok(())
    }

    fn remove_chunks(&mut self, sequence: Sequence, head: &[u8]) -> Result<(), StoreError> {
        if codec::record_bytes(head) == Ok(head.len()) {
            return Ok(());
        }
        // Asks what is there: the length in a damaged head says nothing.
        let number = sequence.get();
        for pair in self.store.range(store::sequence_range(b'x', number, number))? {
            let (key, _) = pair?;
            self.stage.changes.remove(&key);
        }
        Ok(())
    }

    fn retry(&mut self, old: Sequence) -> Result<Result<RetryOutcome, QueueError>, StoreError> {
        self.apply_stage()?;
        let Some(letter) = reader::dead_letter(&self.store, old)? else { return Ok(Ok(RetryOutcome::NotFound)) };
        let DeadContent::Event { event, captured_at, attempts } = letter.content else {
            return Ok(Ok(RetryOutcome::NotAnEvent));
        };
        let record = codec::encode_event(&event, captured_at, attempts).map_err(corrupt)?;
        let batch = EncodedBatch {
            event_bytes: record.len() as u64,
            events: vec![record],
            rejections: Vec::new(),
            cursors: Vec::new(),
        };
        let accepted = match self.append(batch)? {
            Ok(accepted) => accepted,
            Err(error) => return Ok(Err(error)),
        };
        faults::reach("retry-appended");
        // Nothing was applied since the event was staged whole, or only parts below the commit: one sled batch has both.
        self.unbury(old)?;
        faults::reach("retry-staged");
        Ok(Ok(accepted.sequences.first().map_or(RetryOutcome::NotFound, |&new| RetryOutcome::Queued(new))))
    }

    fn drop_dead_letter(&mut self, sequence: Sequence) -> Result<bool, StoreError> {
        self.apply_stage()?;
        if self.store.get(&store::letter_key(sequence.get()))?.is_none() {
            return Ok(false);
        }
        self.unbury(sequence)?;
        Ok(true)
    }

    /// Stages the removal of a dead letter with all that belongs to it.
    fn unbury(&mut self, sequence: Sequence) -> Result<(), StoreError> {
        let content = store::content_key(sequence.get());
        let mut next = self.counters;
        if let Some(head) = self.store.get(&content)? {
            self.remove_chunks(sequence, &head)?;
            next.dead_letter_bytes = next.dead_letter_bytes.saturating_sub(stored_bytes(&head));
        }
        self.stage.changes.remove(&store::letter_key(sequence.get()));
        self.stage.changes.remove(&content);
        next.dead_letters = next.dead_letters.saturating_sub(1);
        self.commit(next);
        Ok(())
    }

    /// Stages what of a record does not fit into a block, and gives what does.
    fn put_chunks<'a>(&mut self, sequence: Sequence, record: &'a [u8]) -> Result<&'a [u8], StoreError> {
        let (part, rest) = record.split_at_checked(PART_BYTES_MAX).unwrap_or((record, &[]));
        for (index, chunk) in (1..).zip(rest.chunks(CHUNK_BYTES)) {
            self.put(&store::chunk_key(sequence.get(), index), chunk)?;
        }
        Ok(part)
    }

    /// Stages a value at a number that is not committed yet.
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        if self.stage.may_split && self.stage.bytes() + key.len() + value.len() > STAGE_BYTES_MAX {
            self.apply_stage()?;
            self.stage.may_split = true;
            faults::reach("append-between-parts");
        }
        self.stage.changes.insert(key, value);
        Ok(())
    }

    fn commit(&mut self, counters: Counters) {
        self.counters = counters;
        self.counters_changed = true;
    }

    /// Applies what is staged, together with the counters as they are committed by now.
    fn apply_stage(&mut self) -> Result<(), StoreError> {
        if self.counters_changed {
            let record = codec::encode_counters(&self.counters).map_err(corrupt)?;
            self.stage.changes.insert(&store::counters_key(), &record);
            self.counters_changed = false;
        }
        self.stage.close_tail();
        let mut stage = std::mem::take(&mut self.stage);
        for (number, block) in &stage.touched {
            match block.is_empty() {
                true => stage.changes.remove(&store::block_key(*number)),
                false => stage.changes.insert(&store::block_key(*number), &block.encode()),
            }
        }
        self.store.apply(stage.changes)
    }

    /// Tells what readers may see by now, synced or not: fewer events, more room.
    fn publish_applied(&mut self) -> Result<(), StoreError> {
        let (first, oldest_known) = {
            let state = self.shared.state();
            (state.first_pending, state.stats.oldest)
        };
        let last = self.counters.next_sequence - 1;
        let oldest = match oldest_known {
            _ if self.counters.pending == 0 => None,
            Some(known) if !self.oldest_unknown && self.not_found.is_empty() => Some(known),
            _ => reader::oldest(&self.store, first, last)?,
        };
        self.oldest_unknown = false;
        // One that is read and not found would be delivered and stay for ever.
        if oldest.is_some_and(|(oldest, _)| self.not_found.contains(&oldest)) {
            return Err(StoreError::Corrupt("an event that is there can't be taken out".into()));
        }
        self.not_found.clear();
        // Here it costs nothing to ask whether all that was taken in has come out: the numbers of a queue that was drained
        // are those of an empty one, else an event vanished, or a delivered one came back. Opening counts, and puts it right.
        if self.counters.pending == 0 && self.counters.pending_checksum.is_some_and(|sum| sum != 0)
            || self.counters.pending > 0 && oldest.is_none()
        {
            return Err(StoreError::Corrupt(folder::EVENTS_MISSING.into()));
        }
        let mut state = self.shared.state();
        state.stats.oldest = oldest;
        state.first_pending = oldest.map_or(self.counters.next_sequence, |(sequence, _)| sequence.get());
        state.stats.pending = self.counters.pending;
        state.stats.pending_bytes = self.counters.pending_bytes;
        state.stats.dead_letters = self.counters.dead_letters;
        state.stats.last_sequence = Sequence::new(last);
        state.dead_letter_bytes = self.counters.dead_letter_bytes;
        let full = self.counters.pending > 0
            && (self.counters.pending_bytes >= self.shared.max_pending_bytes
                || self.room_wanted.is_some_and(|wanted| self.counters.pending_bytes > wanted));
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
    fn publish_synced(&mut self) -> Result<(), StoreError> {
        self.mark.raise(self.counters.next_sequence - 1)?;
        let disk_bytes = self.store.disk_bytes();
        let mut state = self.shared.state();
        state.durable = self.counters.next_sequence - 1;
        state.stats.disk_bytes = disk_bytes;
        drop(state);
        if let Some(newest) = self.newest_event.take() {
            self.shared.newest.send_replace(Some(newest));
        }
        Ok(())
    }

    /// Lets go of files and lock, and refuses whatever still comes.
    fn release(self) {
        let Writer { shared, store, lock, .. } = self;
        shared.inbox.end(QueueError::Closed);
        shared.state().closed = true;
        shared.room.notify_all();
        drop(shared.store.write().unwrap_or_else(PoisonError::into_inner).take());
        // The lock goes last: who opens next must not find sled's own lock held by a reader of ours.
        let readers = Arc::downgrade(&store);
        drop(store);
        let deadline = Instant::now() + READERS_WAIT;
        while readers.strong_count() > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(lock);
    }
}

fn take_sequence(counters: &mut Counters) -> Result<Sequence, StoreError> {
    let sequence = Sequence::new(counters.next_sequence);
    counters.next_sequence += 1;
    sequence.ok_or_else(|| StoreError::Corrupt("sequence 0 was to be given".into()))
}

/// What a record adds to the counters, from its first part.
fn stored_bytes(part: &[u8]) -> u64 {
    codec::record_bytes(part).unwrap_or(part.len()) as u64
}
