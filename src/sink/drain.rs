//! The drainer: takes the oldest envelopes out of the queue, has the sink store them, and settles what came of it.
//!
//! ```text
//!            ┌────────────── window ◄─────────────┐
//!            ▼                                    │ all done
//!   queue ─► deliver ── failure? ── Again ──────► pause, then the same envelope
//!                                 ├ Operator ───► pause, say what must be fixed, then the same envelope
//!                                 └ Event ──────► a few tries, then set aside; on with the next
//! ```
//!
//! While the answers to one window are awaited the next is on its way, so that the server does not wait for us. Only
//! one window in so many is made durable; what was done is settled when a durable one has come after it.
//!
//! Order: a window starts after the last envelope that was sent, and delivery stops at the first failure, also that of
//! the window under way behind it; so rows are stored in the order of acceptance. Ten events in a row refused for one
//! cause are not their own fault: the drainer then pauses as for `Operator` instead of emptying the queue into the dead
//! letters, and sends these ten first, in their place, until they pass.

use std::collections::HashSet;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::{DeliverError, Delivered, Delivery, Place, Sink, Verdict};
use crate::event::{DeadContent, Envelope, EventType, Failure, FailureKind, Sequence, Timestamp};
use crate::queue::{Outcome, Queue, QueueError, Ticket};
use crate::telemetry::{Database, DatabaseState, Metrics};

/// Refusals in a row for one cause that are put down to the events. The next one pauses the drainer.
const REFUSALS_IN_A_ROW_MAX: usize = 10;

/// Payload bytes of one window. The server's `statement_timeout` runs while it comes in: half a megabit a second is enough for that.
const WINDOW_BYTES_MAX: u64 = 256 * 1024;

/// How often the connection is looked after while nothing is to be delivered.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);

/// How long the answers in flight are waited for, all in all, when the drainer is told to stop. What has not come by then is
/// sent again at the next start, and refused by its receipt.
pub(crate) const STOP_GRACE: Duration = Duration::from_millis(150);

/// Windows under way at once: one is answered while the next is sent.
const WINDOWS_UNDER_WAY: usize = 2;

#[derive(Clone, Debug)]
pub struct DrainConfig {
    /// Transactions in flight at once; as many at most are sent before one that is made durable.
    pub window: usize,
    /// Deliveries of an event that Postgres refuses before it is dead-lettered.
    pub attempts_max: u32,
    pub delay_first: Duration,
    pub delay_max: Duration,
}

/// Moves envelopes from the queue to the sink until told to stop.
pub struct Drainer<S> {
    queue: Queue,
    sink: Arc<S>,
    config: DrainConfig,
    metrics: Arc<Metrics>,
    backoff: Backoff,
    /// Everything up to here is settled.
    settled: Option<Sequence>,
    /// Everything up to here has been sent.
    sent: Option<Sequence>,
    /// Envelopes sent since the last window that is made durable.
    sent_since_durable: usize,
    /// What was done and is not known to be durable yet.
    undurable: Vec<Done>,
    /// The envelope that was refused last, and how often.
    refused: Option<(Sequence, u32)>,
    /// Cause of the refusals that led to dead letters, and those that followed one another.
    refusals: Option<(String, Vec<Sequence>)>,
    /// So many followed one another that they are sent again.
    are_refusals_suspect: bool,
    /// They are from before the start: when they are refused again, the next event is to say whether it is theirs.
    are_refusals_recalled: bool,
    /// Failures in a row that were the moment's.
    passing: u32,
    away: Option<Away>,
    /// The settlement under way.
    settlement: Option<Ticket<()>>,
}

/// A time during which nothing could be delivered.
struct Away {
    since: Instant,
    state: Database,
}

/// A window on its way.
type Flight = Pin<Box<dyn Future<Output = (Vec<Envelope>, Delivery)> + Send>>;

/// An envelope that was done, as it is counted once it is durable.
struct Done {
    sequence: Sequence,
    delivered: Delivered,
    event_type: EventType,
    captured_at: Timestamp,
}

impl<S: Sink> Drainer<S> {
    pub fn new(queue: Queue, sink: S, config: DrainConfig, metrics: Arc<Metrics>) -> Self {
        let backoff = Backoff::new(config.delay_first, config.delay_max);
        Drainer {
            queue,
            sink: Arc::new(sink),
            config,
            metrics,
            backoff,
            settled: None,
            sent: None,
            sent_since_durable: 0,
            undurable: Vec::new(),
            refused: None,
            refusals: None,
            are_refusals_suspect: false,
            are_refusals_recalled: false,
            passing: 0,
            away: None,
            settlement: None,
        }
    }

    /// Runs until `stop` turns true. An error is the queue's and ends the process: what can't be settled must not be
    /// forgotten.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) -> Result<(), QueueError> {
        self.recall_refusals()?;
        let mut arrivals = self.queue.subscribe();
        let mut under_way: FuturesOrdered<Flight> = FuturesOrdered::new();
        while !*stop.borrow_and_update() {
            arrivals.mark_unchanged();
            if self.are_refusals_suspect
                && under_way.is_empty()
                && let Some(pause) = self.send_refused_again(&stop).await?
            {
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = stopped_for(stop.clone(), Duration::ZERO) => {}
                }
                continue;
            }
            while under_way.len() < WINDOWS_UNDER_WAY
                && let Some(flight) = self.next_flight(!under_way.is_empty())?
            {
                under_way.push_back(flight);
            }
            if under_way.is_empty() {
                self.idle(&mut arrivals, &mut stop).await;
                continue;
            }
            let begun = Instant::now();
            let (window, delivery) = tokio::select! {
                Some(landed) = under_way.next() => landed,
                _ = arrivals.changed(), if under_way.len() < WINDOWS_UNDER_WAY => continue,
                () = stopped_for(stop.clone(), Duration::ZERO) => break,
            };
            let Some(pause) = self.landed(&window, delivery).await? else { continue };
            // What is under way behind a failure is not stored; its answers make the connection clean again.
            let clean = async { while under_way.next().await.is_some() {} };
            tokio::select! {
                () = clean => {}
                // The time is used up.
                () = stopped_for(stop.clone(), STOP_GRACE) => return self.await_settlement().await,
            }
            self.start_over();
            let pause = pause.saturating_sub(begun.elapsed()).max(pause.min(self.config.delay_first / 2));
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stopped_for(stop.clone(), Duration::ZERO) => {}
            }
        }
        // What has not come down by then is sent again at the next start.
        let _ = tokio::time::timeout(STOP_GRACE, self.finish(under_way)).await;
        self.await_settlement().await
    }

    /// Awaits what is under way, and makes it durable.
    async fn finish(&mut self, mut under_way: FuturesOrdered<Flight>) -> Result<(), QueueError> {
        while let Some((window, delivery)) = under_way.next().await {
            if self.landed(&window, delivery).await?.is_some() {
                return Ok(());
            }
        }
        if let Some(after) = self.undurable.last().map(|done| done.sequence) {
            let delivery = self.sink.deliver(&[], Place { after: Some(after), durable: true }).await;
            self.landed(&[], delivery).await?;
        }
        Ok(())
    }

    /// Sends the next window; `None` when there is nothing to send.
    fn next_flight(&mut self, follows: bool) -> Result<Option<Flight>, QueueError> {
        let size = self.config.window.div_ceil(WINDOWS_UNDER_WAY);
        if follows && self.config.window < WINDOWS_UNDER_WAY {
            return Ok(None);
        }
        let mut window = self.queue.window(self.sent, size, WINDOW_BYTES_MAX)?;
        end_before_repeat(&mut window);
        // An empty one makes durable what is not, unless that is under way already.
        let undurable = self.sent_since_durable > 0 && !follows;
        let Some(last) = window.last().map(|envelope| envelope.sequence).or(self.sent.filter(|_| undurable)) else {
            return Ok(None);
        };
        let after = self.sent.filter(|_| follows || self.sent_since_durable > 0);
        self.sent_since_durable += window.len();
        let is_last = window.len() < size;
        let durable = is_last || self.sent_since_durable >= self.config.window;
        if durable {
            self.sent_since_durable = 0;
        }
        self.sent = Some(last);
        let sink = self.sink.clone();
        let metrics = self.metrics.clone();
        let delivery = async move {
            let begun = Instant::now();
            let delivery = sink.deliver(&window, Place { after, durable }).await;
            metrics.delivery_seconds.observe(begun.elapsed(), delivery.done.len() as u64);
            (window, delivery)
        };
        Ok(Some(Box::pin(beating(self.metrics.clone(), delivery))))
    }

    /// After a failure everything that is not settled is sent again.
    fn start_over(&mut self) {
        self.sent = self.settled;
        self.sent_since_durable = 0;
        self.undurable.clear();
    }

    /// Waits for something to deliver; meanwhile looks after the connection, so that `health` tells the truth and the
    /// next event finds it ready.
    async fn idle(&mut self, arrivals: &mut watch::Receiver<Option<Sequence>>, stop: &mut watch::Receiver<bool>) {
        if self.away.is_none() && self.metrics.live.database.get().state == Database::Up {
            tokio::select! {
                _ = arrivals.changed() => return,
                () = tokio::time::sleep(PROBE_INTERVAL) => {}
                () = stopped_for(stop.clone(), Duration::ZERO) => return,
            }
        }
        let begun = Instant::now();
        let probed = tokio::select! {
            probed = beating(self.metrics.clone(), self.sink.probe()) => probed,
            () = stopped_for(stop.clone(), Duration::ZERO) => return,
        };
        self.metrics.live.draining.beat();
        match probed {
            Ok(()) => {
                self.note_back();
                self.backoff.reset();
            }
            Err(error) => {
                self.note_away(&error);
                let pause = self.backoff.next().saturating_sub(begun.elapsed()).max(self.config.delay_first / 2);
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = stopped_for(stop.clone(), Duration::ZERO) => {}
                }
            }
        }
    }

    /// Finds the dead letters of the run before that would be sent again: as many as pause the drainer, right before what waits.
    fn recall_refusals(&mut self) -> Result<(), QueueError> {
        let waiting = self.queue.window(None, 1, WINDOW_BYTES_MAX)?;
        let first = waiting.first().map(|envelope| envelope.sequence).or(self.queue.stats().last_sequence);
        let Some(first) = first.map(Sequence::get) else { return Ok(()) };
        let mut known: Option<String> = None;
        let mut in_a_row = Vec::new();
        for number in (1..first + u64::from(waiting.is_empty())).rev().take(REFUSALS_IN_A_ROW_MAX) {
            let letter = Sequence::new(number).map(|sequence| self.queue.dead_letter(sequence)).transpose()?.flatten();
            let Some(letter) = letter.filter(|letter| letter.failure.kind == FailureKind::Refused) else { break };
            let cause = letter.failure.sqlstate.unwrap_or_default();
            if known.get_or_insert_with(|| cause.clone()) != &cause {
                break;
            }
            in_a_row.insert(0, letter.sequence);
        }
        self.are_refusals_suspect = in_a_row.len() >= REFUSALS_IN_A_ROW_MAX;
        self.are_refusals_recalled = self.are_refusals_suspect;
        self.refusals = known.map(|cause| (cause, in_a_row));
        Ok(())
    }

    /// Sends the dead letters that followed one another for one cause, before what comes after them. Gives the pause before the next
    /// try when one is refused for that cause again.
    async fn send_refused_again(&mut self, stop: &watch::Receiver<bool>) -> Result<Option<Duration>, QueueError> {
        let Some((cause, in_a_row)) = &mut self.refusals else { return Ok(None) };
        while let Some(sequence) = in_a_row.first().copied() {
            // Somebody may have dropped it.
            let letter = self.queue.dead_letter(sequence)?;
            if let Some(DeadContent::Event { event, captured_at, attempts }) = letter.map(|letter| letter.content) {
                let event_type = event.event_type().clone();
                let window = [Envelope { sequence, event, captured_at, attempts }];
                let delivering = self.sink.deliver(&window, Place { after: None, durable: true });
                let delivery = tokio::select! {
                    delivery = beating(self.metrics.clone(), delivering) => delivery,
                    () = stopped_for(stop.clone(), Duration::ZERO) => return Ok(Some(Duration::ZERO)),
                };
                match delivery.failure {
                    None => {
                        let queue = self.queue.clone();
                        let dropping = tokio::task::spawn_blocking(move || queue.drop_dead_letter(sequence));
                        dropping.await.map_err(|_| QueueError::Closed)??;
                        self.metrics.events_delivered.add(event_type.as_str(), 1);
                        info!(%sequence, "an event that had been refused is delivered, in its place");
                    }
                    Some(error) if error.verdict != Verdict::Event => return Ok(Some(self.after_outage(&error))),
                    Some(error) if error.sqlstate.as_ref() == Some(cause) => {
                        if std::mem::take(&mut self.are_refusals_recalled) {
                            self.are_refusals_suspect = false;
                            return Ok(None);
                        }
                        self.metrics.write_failures.add(error.verdict.as_str(), 1);
                        return Ok(Some(self.backoff.next()));
                    }
                    // That cause has passed; this one is its own, and it stays where it is.
                    Some(_) => {}
                }
            }
            in_a_row.remove(0);
        }
        self.refusals = None;
        self.are_refusals_suspect = false;
        Ok(None)
    }

    /// Settles what came of a window. After a failure gives the pause before the next, which may be none at all.
    async fn landed(&mut self, window: &[Envelope], delivery: Delivery) -> Result<Option<Duration>, QueueError> {
        let Delivery { done, durable, failure } = delivery;
        self.metrics.live.draining.beat();
        self.undurable.extend(window.iter().zip(&done).map(|(envelope, delivered)| Done {
            sequence: envelope.sequence,
            delivered: *delivered,
            event_type: envelope.event.event_type().clone(),
            captured_at: envelope.captured_at,
        }));
        let mut outcomes = Vec::new();
        if durable && !self.undurable.is_empty() {
            self.note_back();
            self.note_delivered();
            outcomes = self.undurable.drain(..).map(|done| (done.sequence, Outcome::Delivered)).collect();
        }
        if !done.is_empty() {
            // It moves: a window that took too long as a whole, say.
            self.passing = 0;
            self.backoff.reset();
        }
        let pause = match (failure, window.get(done.len())) {
            // What was refused is only ever judged once all before it is settled.
            (Some(error), Some(envelope)) if durable => Some(self.after_failure(envelope, error, &mut outcomes)),
            (Some(error), _) => Some(self.after_outage(&error)),
            (None, _) => {
                self.backoff.reset();
                self.passing = 0;
                None
            }
        };
        if let Some((sequence, _)) = outcomes.last() {
            self.settled = Some(*sequence);
            self.metrics.live.settling.beat();
        }
        self.await_settlement().await?;
        if !outcomes.is_empty() {
            self.settlement = Some(self.queue.submit_settle(outcomes));
        }
        Ok(pause)
    }

    /// One settlement is under way while the next window is; losing it only repeats a delivery.
    async fn await_settlement(&mut self) -> Result<(), QueueError> {
        match self.settlement.take() {
            Some(ticket) => ticket.await,
            None => Ok(()),
        }
    }

    /// What follows from a failure that is no event's fault.
    fn after_outage(&mut self, error: &DeliverError) -> Duration {
        self.metrics.write_failures.add(error.verdict.as_str(), 1);
        self.passing += 1;
        // A deadlock or the like is no outage as long as it passes.
        if error.verdict == Verdict::Operator || error.sqlstate.is_none() || self.passing > 1 {
            self.note_away(error);
        }
        self.backoff.next()
    }

    /// What follows from a failure: a pause, and for an event that was refused often enough, its being set aside.
    fn after_failure(
        &mut self,
        envelope: &Envelope,
        error: DeliverError,
        outcomes: &mut Vec<(Sequence, Outcome)>,
    ) -> Duration {
        let event = &envelope.event;
        debug!(event_id = %event.id(), event_type = %event.event_type(), sequence = %envelope.sequence,
               verdict = error.verdict.as_str(), error = %error, "delivery failed");
        if error.verdict != Verdict::Event {
            return self.after_outage(&error);
        }
        self.metrics.write_failures.add(error.verdict.as_str(), 1);
        let attempts = match self.refused {
            Some((sequence, attempts)) if sequence == envelope.sequence => attempts + 1,
            _ => {
                self.backoff.reset();
                1
            }
        };
        self.refused = Some((envelope.sequence, attempts));
        if attempts < self.config.attempts_max {
            warn!(event_id = %event.id(), event_type = %event.event_type(), attempt = attempts, error = %error,
                  "the database refused an event, trying again");
            return self.backoff.next();
        }
        let cause = error.sqlstate.clone().unwrap_or_default();
        let mut in_a_row = match self.refusals.take() {
            Some((same, in_a_row)) if same == cause => in_a_row,
            _ => Vec::new(),
        };
        if in_a_row.len() >= REFUSALS_IN_A_ROW_MAX {
            let verdict = Verdict::Operator;
            let message = format!(
                "{} events in a row were refused for one cause, so it is not theirs; paused until the first of them passes: {}; \
                 fix the table; or, if it is the events after all, drop these dead letters, and the next may follow them",
                in_a_row.len(),
                error.message
            );
            self.refusals = Some((cause, in_a_row));
            self.are_refusals_suspect = true;
            self.note_away(&DeliverError { verdict, sqlstate: error.sqlstate, message });
            return self.backoff.next();
        }
        warn!(event_id = %event.id(), event_type = %event.event_type(), attempts, error = %error,
              "the database refused an event, which is a dead letter now; see \"headspace-watcher dead-letters list\"");
        self.metrics.events_dead_lettered.add(FailureKind::Refused.as_str(), 1);
        in_a_row.push(envelope.sequence);
        self.refusals = Some((cause, in_a_row));
        self.refused = None;
        self.backoff.reset();
        let failure = Failure { kind: FailureKind::Refused, message: error.message, sqlstate: error.sqlstate };
        let attempts = envelope.attempts.saturating_add(attempts);
        outcomes.push((envelope.sequence, Outcome::Refused { failure, attempts }));
        Duration::ZERO
    }

    /// Counts what is in Postgres for good now.
    fn note_delivered(&mut self) {
        let now = Timestamp::now();
        for done in &self.undurable {
            match done.delivered {
                Delivered::Stored => {
                    self.metrics.events_delivered.add(done.event_type.as_str(), 1);
                    let age = Duration::try_from(now.duration_since(done.captured_at)).unwrap_or_default();
                    self.metrics.end_to_end_seconds.observe(age, 1);
                }
                Delivered::AlreadyStored => self.metrics.events_duplicate.add(1),
            }
        }
        self.metrics.live.last_write.set(Some(now));
        // A copy says nothing of the table.
        if self.undurable.iter().any(|done| done.delivered == Delivered::Stored) {
            self.refusals = None;
            self.are_refusals_suspect = false;
        }
    }

    /// The database can't be used: said once, when it begins or changes.
    fn note_away(&mut self, error: &DeliverError) {
        let state = match error.verdict {
            Verdict::Operator => Database::Misconfigured,
            Verdict::Again | Verdict::Event => Database::Down,
        };
        let since = self.metrics.live.database.get().since;
        let begins = self.away.as_ref().is_none_or(|away| away.state != state);
        let since = if begins { Timestamp::now() } else { since };
        self.metrics.live.database.set(DatabaseState { state, since, last_error: Some(error.to_string()) });
        if !begins {
            return;
        }
        let pending = self.queue.stats().pending;
        match state {
            Database::Misconfigured => {
                warn!(error = %error, pending, "database misconfigured; delivery is paused until someone fixes it, events are queued");
            }
            _ => warn!(error = %error, pending, "database unavailable; events are queued"),
        }
        let since = self.away.take().map_or_else(Instant::now, |away| away.since);
        self.away = Some(Away { since, state });
    }

    /// The database takes events again: said once, with how long it was away and how many waited.
    fn note_back(&mut self) {
        if self.away.is_none() && self.metrics.live.database.get().state == Database::Up {
            return;
        }
        self.metrics.live.database.set(DatabaseState {
            state: Database::Up,
            since: Timestamp::now(),
            last_error: None,
        });
        let pending = self.queue.stats().pending;
        match self.away.take() {
            Some(away) => {
                let outage_seconds = (away.since.elapsed().as_secs_f64() * 100.0).round() / 100.0;
                info!(outage_seconds, pending, "database reachable again");
            }
            None => info!(pending, "database connected"),
        }
    }
}

/// Ends a window before an event that stands in it already. A receipt carries the time of its window: the second of two
/// would seem done by the first, and let what follows it pass a failure between the two.
fn end_before_repeat(window: &mut Vec<Envelope>) {
    let mut seen = HashSet::with_capacity(window.len());
    if let Some(repeat) = window.iter().position(|envelope| !seen.insert(envelope.event.id())) {
        window.truncate(repeat);
    }
}

/// `work`, with a beat of `metrics.live.draining` each time it is looked at: when an answer has come, or a limit was reached. Each
/// single wait in it has a limit, so that what is slow, for locks that others hold or many events, is told from what hangs.
async fn beating<T>(metrics: Arc<Metrics>, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    std::future::poll_fn(|context| {
        metrics.live.draining.beat();
        work.as_mut().poll(context)
    })
    .await
}

/// Ends `grace` after the stop.
async fn stopped_for(mut stop: watch::Receiver<bool>, grace: Duration) {
    // An error means that the sender is gone: nobody can stop us any more, and nobody needs us.
    let _ = stop.wait_for(|stopped| *stopped).await;
    tokio::time::sleep(grace).await;
}

/// Pauses that double from `first` to `max`, each shortened by up to a half so that many watchers do not come at once.
#[derive(Debug)]
struct Backoff {
    first: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    fn new(first: Duration, max: Duration) -> Self {
        Backoff { first, max, next: first }
    }

    fn reset(&mut self) {
        self.next = self.first;
    }

    fn next(&mut self) -> Duration {
        let whole = self.next.min(self.max);
        self.next = (whole * 2).min(self.max);
        whole.mul_f64(0.5 + 0.5 * random_fraction())
    }
}

/// From 0 to 1; good enough to spread retries. The low bits of a new UUID are random.
fn random_fraction() -> f64 {
    let random = uuid::Uuid::now_v7().as_u128() as u32;
    f64::from(random) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_delivery_that_is_slow_but_moves_is_no_silence() {
        let metrics = Arc::new(Metrics::default());
        let (answers, mut answered) = tokio::sync::mpsc::channel::<()>(1);
        let delivery = async move { while answered.recv().await.is_some() {} };
        let delivering = tokio::spawn(beating(metrics.clone(), delivery));
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(5));
            let sent = Instant::now();
            answers.send(()).await.unwrap();
            let deadline = sent + Duration::from_secs(10);
            // Times of beats are whole milliseconds.
            while metrics.live.draining.age(Instant::now()) > sent.elapsed() + Duration::from_millis(1) {
                assert!(Instant::now() < deadline, "an answer came, and no beat");
                tokio::task::yield_now().await;
            }
        }
        drop(answers);
        delivering.await.unwrap();
    }
}
