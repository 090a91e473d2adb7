//! The drainer: takes the oldest envelopes out of the queue, has the sink store them, and settles what came of it.
//!
//! ```text
//!            ┌────────────── window ◄─────────────┐
//!            ▼                                    │ all done
//!   queue ─► deliver ── failure? ── Again ──────► pause, then the same envelope
//!                                 ├ Operator ───► pause, say what must be mended, then the same envelope
//!                                 └ Event ──────► a few tries, then set aside; on with the next
//! ```
//!
//! Order: a window starts after the last envelope that was settled, and delivery stops at the first failure, so rows
//! are stored in the order of acceptance. Ten events in a row refused for one cause are not their own fault: the
//! drainer then pauses as for `Operator` instead of emptying the queue into the dead letters.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::{DeliverError, Delivered, Delivery, Sink, Verdict};
use crate::event::{Envelope, Failure, FailureKind, Sequence, Timestamp};
use crate::queue::{Outcome, Queue, QueueError, Ticket};
use crate::telemetry::{Database, DatabaseState, Metrics};

/// Refusals in a row for one cause that are put down to the events. The next one pauses the drainer.
const REFUSALS_IN_A_ROW_MAX: u32 = 10;

/// Payload bytes of one window, so that a window of large events does not fill the memory.
const WINDOW_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// How often the connection is looked after while nothing is to be delivered.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);

/// How long the answers in flight are waited for when the drainer is told to stop.
const STOP_GRACE: Duration = Duration::from_millis(300);

#[derive(Clone, Debug)]
pub struct DrainConfig {
    /// Transactions in flight at once.
    pub window: usize,
    /// Deliveries of an event that Postgres refuses before it is set aside.
    pub attempts_max: u32,
    pub delay_first: Duration,
    pub delay_max: Duration,
}

/// Moves envelopes from the queue to the sink until told to stop.
pub struct Drainer<S> {
    queue: Queue,
    sink: S,
    config: DrainConfig,
    metrics: Arc<Metrics>,
    backoff: Backoff,
    /// Everything up to here is settled.
    settled: Option<Sequence>,
    /// The envelope that was refused last, and how often.
    refused: Option<(Sequence, u32)>,
    /// Cause of the refusals that led to dead letters, and how many there were in a row.
    refusals: Option<(String, u32)>,
    away: Option<Away>,
    /// The settlement under way.
    settlement: Option<Ticket<()>>,
}

/// A time during which nothing could be delivered.
struct Away {
    since: Instant,
    state: Database,
}

impl<S: Sink> Drainer<S> {
    pub fn new(queue: Queue, sink: S, config: DrainConfig, metrics: Arc<Metrics>) -> Self {
        let backoff = Backoff::new(config.delay_first, config.delay_max);
        Drainer {
            queue,
            sink,
            config,
            metrics,
            backoff,
            settled: None,
            refused: None,
            refusals: None,
            away: None,
            settlement: None,
        }
    }

    /// Runs until `stop` turns true. An error is the queue's and ends the process: what can't be settled must not be
    /// forgotten.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) -> Result<(), QueueError> {
        let mut arrivals = self.queue.subscribe();
        let mut ahead: Option<Vec<Envelope>> = None;
        while !*stop.borrow_and_update() {
            let window = match ahead.take() {
                Some(window) => window,
                None => {
                    arrivals.mark_unchanged();
                    self.read_window(self.settled).await?
                }
            };
            let Some(last) = window.last().map(|envelope| envelope.sequence) else {
                self.idle(&mut arrivals, &mut stop).await;
                continue;
            };
            let begun = Instant::now();
            // While this window is under way the next one is read.
            let delivering = async { tokio::join!(self.sink.deliver(&window), self.read_window(Some(last))) };
            let (delivery, next) = tokio::select! {
                both = delivering => both,
                () = stopped_for(stop.clone(), STOP_GRACE) => break,
            };
            let complete = delivery.failure.is_none();
            self.metrics.draining.beat();
            let pause = self.settle(&window, delivery, begun.elapsed()).await?;
            if complete {
                ahead = Some(next?).filter(|window| !window.is_empty());
            }
            if let Some(pause) = pause {
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = stopped_for(stop.clone(), Duration::ZERO) => {}
                }
            }
        }
        self.await_settlement().await
    }

    async fn read_window(&self, after: Option<Sequence>) -> Result<Vec<Envelope>, QueueError> {
        self.queue.window(after, self.config.window, WINDOW_BYTES_MAX)
    }

    /// Waits for something to deliver; meanwhile keeps the connection open, so that `health` tells the truth and the
    /// next event finds it ready.
    async fn idle(&mut self, arrivals: &mut watch::Receiver<Option<Sequence>>, stop: &mut watch::Receiver<bool>) {
        let probed = tokio::select! {
            probed = self.sink.probe() => probed,
            () = stopped_for(stop.clone(), Duration::ZERO) => return,
        };
        self.metrics.draining.beat();
        let wait = match probed {
            Ok(()) => {
                self.note_back();
                self.backoff.reset();
                PROBE_INTERVAL
            }
            Err(error) => {
                self.note_away(&error);
                self.backoff.next()
            }
        };
        tokio::select! {
            _ = arrivals.changed(), if self.away.is_none() => {}
            () = tokio::time::sleep(wait) => {}
            () = stopped_for(stop.clone(), Duration::ZERO) => {}
        }
    }

    /// Settles what came of a window. Gives the pause before the next.
    async fn settle(
        &mut self,
        window: &[Envelope],
        delivery: Delivery,
        took: Duration,
    ) -> Result<Option<Duration>, QueueError> {
        let Delivery { done, failure } = delivery;
        let mut outcomes: Vec<(Sequence, Outcome)> =
            window.iter().zip(&done).map(|(envelope, _)| (envelope.sequence, Outcome::Delivered)).collect();
        if !done.is_empty() {
            self.note_back();
            self.note_delivered(window, &done, took);
        }
        let pause = match (failure, window.get(done.len())) {
            (Some(error), Some(envelope)) => self.after_failure(envelope, error, &mut outcomes),
            _ => {
                self.backoff.reset();
                None
            }
        };
        if let Some((sequence, _)) = outcomes.last() {
            self.settled = Some(*sequence);
            self.metrics.settling.beat();
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

    /// What follows from a failure: a pause, and for an event that was refused often enough, its being set aside.
    fn after_failure(
        &mut self,
        envelope: &Envelope,
        error: DeliverError,
        outcomes: &mut Vec<(Sequence, Outcome)>,
    ) -> Option<Duration> {
        self.metrics.write_failures.add(error.verdict.as_str(), 1);
        let event = &envelope.event;
        debug!(event_id = %event.id(), event_type = %event.event_type(), sequence = %envelope.sequence,
               verdict = error.verdict.as_str(), error = %error, "delivery failed");
        if error.verdict != Verdict::Event {
            self.note_away(&error);
            return Some(self.backoff.next());
        }
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
            return Some(self.backoff.next());
        }
        let cause = error.sqlstate.clone().unwrap_or_default();
        let in_a_row = match &self.refusals {
            Some((same, count)) if *same == cause => *count,
            _ => 0,
        };
        if in_a_row >= REFUSALS_IN_A_ROW_MAX {
            let verdict = Verdict::Operator;
            let message = format!(
                "{in_a_row} events in a row were refused for one cause, so it is not theirs; paused until one passes: {}",
                error.message
            );
            self.note_away(&DeliverError { verdict, sqlstate: error.sqlstate, message });
            return Some(self.backoff.next());
        }
        warn!(event_id = %event.id(), event_type = %event.event_type(), attempts, error = %error,
              "the database refused an event, it is set aside; see \"headspace-watcher dead-letters list\"");
        self.metrics.events_dead_lettered.add(FailureKind::Refused.as_str(), 1);
        self.refusals = Some((cause, in_a_row + 1));
        self.refused = None;
        self.backoff.reset();
        let failure = Failure { kind: FailureKind::Refused, message: error.message, sqlstate: error.sqlstate };
        let attempts = envelope.attempts.saturating_add(attempts);
        outcomes.push((envelope.sequence, Outcome::Refused { failure, attempts }));
        None
    }

    /// Counts what is in Postgres now: `took` is the time of the whole window.
    fn note_delivered(&mut self, window: &[Envelope], done: &[Delivered], took: Duration) {
        let now = Timestamp::now();
        let mut stored = 0;
        for (envelope, _) in window.iter().zip(done).filter(|(_, delivered)| **delivered == Delivered::Stored) {
            stored += 1;
            self.metrics.events_delivered.add(envelope.event.event_type().as_str(), 1);
            let age = Duration::try_from(now.duration_since(envelope.captured_at)).unwrap_or_default();
            self.metrics.end_to_end_seconds.observe(age, 1);
        }
        self.metrics.delivery_seconds.observe(took, done.len() as u64);
        self.metrics.events_duplicate.add(done.len() as u64 - stored);
        self.metrics.wrote(now);
        self.refusals = None;
    }

    /// The database can't be used: said once, when it begins or changes.
    fn note_away(&mut self, error: &DeliverError) {
        let state = match error.verdict {
            Verdict::Operator => Database::Misconfigured,
            Verdict::Again | Verdict::Event => Database::Down,
        };
        let since = self.metrics.database().since;
        let begins = self.away.as_ref().is_none_or(|away| away.state != state);
        let since = if begins { Timestamp::now() } else { since };
        self.metrics.set_database(DatabaseState { state, since, last_error: Some(error.to_string()) });
        if !begins {
            return;
        }
        let pending = self.queue.stats().pending;
        match state {
            Database::Misconfigured => {
                warn!(error = %error, pending, "the database can't be used until someone mends this; events wait in the queue");
            }
            _ => warn!(error = %error, pending, "database away; events wait in the queue"),
        }
        let since = self.away.take().map_or_else(Instant::now, |away| away.since);
        self.away = Some(Away { since, state });
    }

    /// The database takes events again: said once, with how long it was away and how many waited.
    fn note_back(&mut self) {
        if self.away.is_none() && self.metrics.database().state == Database::Up {
            return;
        }
        self.metrics.set_database(DatabaseState { state: Database::Up, since: Timestamp::now(), last_error: None });
        let pending = self.queue.stats().pending;
        match self.away.take() {
            Some(away) => info!(away_seconds = away.since.elapsed().as_secs_f64(), pending, "database back"),
            None => info!(pending, "database connected"),
        }
    }
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
