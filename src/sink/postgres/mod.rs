//! Postgres as the sink: windows of transactions in flight on one connection.
//!
//! Every envelope is a transaction of its own: a statement, or in a backlog a turn of the loop in [`procedure`]. The
//! statements of a window, and those of the window after it, are sent without waiting for one another; Postgres runs them
//! in order. All commit asynchronously but the last of a window that is to be durable, and as the write-ahead log is one
//! sequence, its flush makes all before it durable.
//!
//! **The barrier must write.** Nothing is reported as durable before a transaction that *wrote*, with synchronous
//! commit, came after it on its connection. In a whole durable window that is the last event's: also a duplicate
//! writes (it marks its receipt). In a window that broke in the middle nothing after the break writes, so a small
//! transaction of our own follows (`Layout::barrier_sql`).
//!
//! **Order.** Each event is stored only when the one before it has been dealt with in this very delivery
//! (the receipt carries the time of its window); across windows too, so that a window under way behind one that breaks
//! stores nothing.
//!
//! **Corrections.** A turn that was stored as a copy of its session had it is given to its own session when it is read
//! there ([`correction`]), before it is reported as done.
//!
//! A connection lost between sending and the answer leaves the outcome unknown: the window is sent again and the
//! receipts decide.
//!
//! The only user of tokio-postgres, bb8, bb8-postgres and rustls.

mod audit;
mod connect;
mod correction;
mod layout;
mod procedure;
mod rows;
mod verdict;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use uuid::Uuid;

pub use self::audit::{ASKED_MAX, AuditedRow, Auditor, Receipt, StaleReceipt};
pub use self::connect::{ConnectSettings, Inspection, TargetSource};
use self::connect::{Connections, PooledSession, Session, Source};
use self::correction::Corrections;
pub use self::layout::printable_sql;
use self::procedure::Calls;
use self::rows::{Answer, MicrosecondsUtc, StatementRow, WindowSources};
use self::verdict::deliver_error;
use super::{DeliverError, Delivered, Delivery, Place, Sink, Verdict};
use crate::event::{Envelope, Sequence, Timestamp};

/// How long a server may take to answer when nothing is asked of it.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// The sink that stores events in Postgres.
pub struct PostgresSink {
    connections: Connections,
    /// Name of this machine in `event_sources`.
    host: String,
    statement_timeout: Duration,
    /// The time of the newest window, microseconds: a window's time is its token and never comes twice.
    newest_window_us: AtomicI64,
    /// Held while a window is sent, not while its answers are awaited.
    line: tokio::sync::Mutex<Line>,
    calls: Calls,
    corrections: Corrections,
}

/// Where windows are sent, one after the other.
#[derive(Default)]
struct Line {
    /// The session in use, kept between windows.
    session: Option<Arc<PooledSession>>,
    /// The envelope that was sent last.
    newest: Option<Link>,
}

/// What the envelope that follows must find in the ledger.
#[derive(Clone, Copy)]
struct Link {
    sequence: Sequence,
    event_id: Uuid,
    window_time: MicrosecondsUtc,
}

impl PostgresSink {
    /// Needs a running tokio runtime; connects at the first delivery or probe.
    pub fn new(settings: ConnectSettings, host: String) -> Self {
        let statement_timeout = settings.statement_timeout;
        PostgresSink {
            connections: Connections::new(settings),
            host,
            statement_timeout,
            newest_window_us: AtomicI64::new(0),
            line: tokio::sync::Mutex::default(),
            calls: Calls::default(),
            corrections: Corrections::default(),
        }
    }

    /// Creates what is missing in the database. Gives the names of what it made.
    pub async fn migrate(settings: ConnectSettings) -> Result<Vec<String>, DeliverError> {
        connect::migrate(&settings).await
    }

    /// What stands in the database, without changing anything.
    pub async fn inspect(settings: ConnectSettings) -> Result<Inspection, DeliverError> {
        connect::inspect(&settings).await
    }

    /// A time that is later than that of every window before.
    fn window_time(&self) -> MicrosecondsUtc {
        let now = Timestamp::now().as_microsecond();
        let before = self.newest_window_us.fetch_max(now, Ordering::Relaxed);
        if before < now {
            return MicrosecondsUtc(now);
        }
        MicrosecondsUtc(self.newest_window_us.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// The server ends a statement after `statement_timeout`; its answer must be here soon after.
    fn answer_timeout(&self) -> Duration {
        self.statement_timeout + Duration::from_secs(1)
    }

    /// A session that is open: the one in use, else one from the pool.
    async fn open_session(&self, line: &mut Line) -> Result<Arc<PooledSession>, DeliverError> {
        if let Some(session) = line.session.as_ref().filter(|session| !session.is_broken()) {
            return Ok(session.clone());
        }
        *line = Line::default();
        let session = Arc::new(self.connections.get().await?);
        line.session = Some(session.clone());
        Ok(session)
    }

    /// Awaits what was sent; then, where the window broke, makes durable what was stored before the break.
    async fn answers(&self, session: &Session, sent: Vec<Answer<'_, bool>>, place: Place) -> Delivery {
        let mut done = Vec::with_capacity(sent.len());
        let mut failure = None;
        for answer in sent {
            let answer = match tokio::time::timeout(self.answer_timeout(), answer).await {
                Ok(answer) => answer,
                Err(_) => {
                    session.give_up();
                    return Delivery::failed(no_answer(self.answer_timeout()));
                }
            };
            // After a failure the remaining answers are awaited too, so that the connection is clean again.
            match answer {
                _ if failure.is_some() => {}
                Ok(Some(true)) => done.push(Delivered::Stored),
                Ok(Some(false)) => done.push(Delivered::AlreadyStored),
                Ok(None) => {
                    session.forget_sources();
                    failure = Some(predecessor_missing());
                }
                Err(error) => failure = Some(session.failed(deliver_error(&error))),
            }
        }
        if failure.is_some() {
            return self.broken(session, done, failure, place).await;
        }
        Delivery { done, durable: place.durable, failure: None }
    }

    /// A window that broke after `done`, which is made durable.
    async fn broken(
        &self,
        session: &Session,
        done: Vec<Delivered>,
        failure: Option<DeliverError>,
        place: Place,
    ) -> Delivery {
        let stored = place.after.is_some() || !done.is_empty();
        let durable = !stored || session.barrier(&self.host, self.answer_timeout()).await.is_ok();
        Delivery { done, durable, failure }
    }

    /// Corrects the rows of turns that had been stored as a copy of their session had them. Where that fails the first
    /// of them and all that follows it count as not done.
    async fn corrected(
        &self,
        session: &Session,
        window: &[Envelope],
        sources: &HashMap<&str, Source>,
        window_time: MicrosecondsUtc,
        mut delivery: Delivery,
    ) -> Delivery {
        let repeated = correction::repeated_turns(window, &delivery.done);
        let Some(first) = repeated.first() else { return delivery };
        let envelopes = repeated.iter().filter_map(|index| window.get(*index));
        let turns: Vec<_> = envelopes.map(|envelope| StatementRow::new(envelope, sources, window_time)).collect();
        if let Err(error) = self.corrections.make(session, &turns, self.answer_timeout()).await {
            delivery.done.truncate(*first);
            delivery.failure = Some(error);
        }
        delivery
    }

    /// Awaits the answer to a window that was sent as one call.
    async fn answer(
        &self,
        session: &Session,
        answer: Answer<'_, Vec<i32>>,
        window: &[Envelope],
        window_time: MicrosecondsUtc,
        place: Place,
    ) -> Delivery {
        let Ok(answer) = tokio::time::timeout(self.answer_timeout(), answer).await else {
            session.give_up();
            return Delivery::failed(no_answer(self.answer_timeout()));
        };
        match answer {
            Ok(Some(repeated)) => {
                let mut done = vec![Delivered::Stored; window.len()];
                for place in repeated {
                    let index = usize::try_from(place).unwrap_or_default().wrapping_sub(1);
                    if let Some(delivered) = done.get_mut(index) {
                        *delivered = Delivered::AlreadyStored;
                    }
                }
                Delivery { done, durable: place.durable, failure: None }
            }
            Ok(None) => {
                session.forget_sources();
                Delivery::failed(predecessor_missing())
            }
            Err(error) => {
                let of_an_event = procedure::is_of_an_event(&error);
                let error = deliver_error(&error);
                if self.calls.are_to_blame(&error) {
                    return Delivery::to_be_repeated();
                }
                let of_a_copy = of_an_event && procedure::is_of_a_copy(&error);
                let error = if of_a_copy { error } else { session.failed(error) };
                if session.is_broken() {
                    return Delivery::failed(error);
                }
                if let Err(error) = session.reset(self.answer_timeout()).await {
                    return Delivery::failed(error);
                }
                if !of_an_event || of_a_copy {
                    self.calls.avoid(window);
                }
                if !of_an_event {
                    return Delivery::to_be_repeated();
                }
                self.calls.heed(&error);
                match session.stored(window, window_time, self.answer_timeout()).await {
                    Ok(done) => self.broken(session, done, (!of_a_copy).then_some(error), place).await,
                    Err(error) => Delivery::failed(error),
                }
            }
        }
    }
}

impl Sink for PostgresSink {
    async fn deliver(&self, window: &[Envelope], place: Place) -> Delivery {
        let mut line = self.line.lock().await;
        let before = line.newest.filter(|newest| Some(newest.sequence) == place.after);
        if place.after.is_some() && before.is_none() {
            return Delivery::failed(predecessor_missing());
        }
        let session = match self.open_session(&mut line).await {
            Ok(session) => session,
            Err(failure) => return Delivery::failed(failure),
        };
        // When this future is dropped half-way, the answers still to come belong to nobody: the session goes too.
        let guard = session.broken_unless_finished();
        // A session that was opened just now knows nothing of the window before.
        if before.is_some() && line.newest.is_none() {
            guard.finished();
            return Delivery::failed(predecessor_missing());
        }
        if window.is_empty() {
            drop(line);
            let barrier = session.barrier(&self.host, self.answer_timeout()).await;
            guard.finished();
            return Delivery { done: Vec::new(), durable: barrier.is_ok(), failure: barrier.err() };
        }
        let asked = async {
            let sources = session.sources(&self.host, window, self.answer_timeout()).await?;
            let call = match self.calls.take(window) {
                true => session.call(self.answer_timeout()).await?,
                false => None,
            };
            Ok((sources, call))
        };
        let (sources, call) = match asked.await {
            Ok(asked) => asked,
            Err(failure) => {
                line.newest = None;
                guard.finished();
                return Delivery::failed(failure);
            }
        };
        let ids: Vec<i32> = sources.values().map(|source| source.id).collect();
        let paths: Vec<&str> = sources.values().map(|source| &*source.path).collect();
        let window_time = self.window_time();
        let mut previous = before;
        let mut rows = Vec::with_capacity(window.len());
        for (index, envelope) in window.iter().enumerate() {
            let mut row = StatementRow::new(envelope, &sources, window_time);
            row.predecessor = previous.map(|previous| previous.event_id);
            row.predecessor_time = previous.map(|previous| previous.window_time);
            row.relaxed = !(place.durable && index + 1 == window.len());
            row.window_sources = (index == 0).then_some(WindowSources { ids: &ids, paths: &paths });
            rows.push(row);
            previous = Some(Link { sequence: envelope.sequence, event_id: envelope.event.id().0, window_time });
        }
        line.newest = previous;
        let delivery = match call {
            Some(call) => {
                let answer = rows::sent(procedure::deliver(session.client(), call, &rows));
                drop(line);
                self.answer(&session, answer, window, window_time, place).await
            }
            None => {
                let answers = rows.into_iter().map(|row| rows::sent(rows::request(&session, row))).collect();
                drop(line);
                self.answers(&session, answers, place).await
            }
        };
        let delivery = self.corrected(&session, window, &sources, window_time, delivery).await;
        guard.finished();
        delivery
    }

    async fn probe(&self) -> Result<(), DeliverError> {
        let mut line = self.line.lock().await;
        let known = line.session.is_some();
        let session = self.open_session(&mut line).await?;
        drop(line);
        if known { session.check(PROBE_TIMEOUT).await } else { Ok(()) }
    }
}

fn no_answer(waited: Duration) -> DeliverError {
    DeliverError {
        verdict: Verdict::Again,
        sqlstate: None,
        message: format!("the server did not answer within {} ms", waited.as_millis()),
    }
}

fn predecessor_missing() -> DeliverError {
    DeliverError {
        verdict: Verdict::Again,
        sqlstate: None,
        message: "the receipt of the event before this one, or a row of event_sources, is not there".to_owned(),
    }
}
