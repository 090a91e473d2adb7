//! Postgres as the sink: windows of transactions in flight on one connection.
//!
//! Every envelope is a transaction of its own: a statement, or in a backlog a turn of the loop in [`procedure`]. The
//! statements of a window, and those of the window after it, are sent without waiting for one another; Postgres runs them
//! in order. All commit asynchronously but the last statement of a window that is to be durable, and as the write-ahead
//! log is one sequence, its flush makes all before it durable.
//!
//! **The last statement must write.** Nothing is reported as durable before a transaction that *wrote*, with synchronous
//! commit, came after it on its connection. In a complete durable window of statements that is the last event's: also a
//! duplicate writes (it marks its receipt). A window that went by CALL and one that broke in the middle are followed
//! by a small transaction of our own, the barrier (`Layout::barrier_sql`).
//!
//! **Success is not proof.** Where the server requires a synchronous standby, a commit can end without it: with success
//! and a warning. A connection that has seen that warning proves nothing any more ([`notices`]); what was sent on it is
//! sent again on another.
//!
//! **Order.** Each event is stored only when the one before it has been dealt with in this very delivery
//! (the receipt carries the time of its window); across windows too, so that a window under way behind one that breaks
//! stores nothing.
//!
//! A connection lost between sending and the answer leaves the outcome unknown: the window is sent again and the
//! receipts decide.
//!
//! The only user of tokio-postgres, bb8, bb8-postgres and rustls.

mod audit;
mod cancel;
mod connect;
mod layout;
mod notices;
mod procedure;
mod rows;
mod verdict;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use uuid::Uuid;

pub use self::audit::{ASKED_MAX, AuditedRow, Auditor, Receipt, StaleReceipt};
pub use self::connect::{ConnectSettings, Inspection, TargetSource};
use self::connect::{Connections, PooledSession, Session};
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

/// A window that was sent, its answers to come.
struct SentWindow<'a> {
    envelopes: &'a [Envelope],
    time: MicrosecondsUtc,
    place: Place,
    /// What the first envelope follows.
    before: Option<Link>,
}

impl SentWindow<'_> {
    /// The last envelope that was dealt with when the first `done` were. `None` when there is none.
    fn link(&self, done: usize) -> Option<Link> {
        match done.checked_sub(1) {
            Some(last) => self.envelopes.get(last).map(|envelope| Link::new(envelope, self.time)),
            None => self.before,
        }
    }
}

impl Link {
    fn new(envelope: &Envelope, window_time: MicrosecondsUtc) -> Link {
        Link { sequence: envelope.sequence, event_id: envelope.event.id().0, window_time }
    }
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

    /// Awaits the answers to a window that was sent as statements.
    async fn answers(&self, session: &Session, answers: Vec<Answer<'_, bool>>, window: &SentWindow<'_>) -> Delivery {
        let mut done = Vec::with_capacity(answers.len());
        let mut failure = None;
        for answer in answers {
            let answer = match tokio::time::timeout(self.answer_timeout(), answer).await {
                Ok(answer) => answer,
                Err(_) => return Delivery::failed(session.no_answer(self.answer_timeout()).await),
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
                Err(error) => failure = Some(session.failed(deliver_error(&error, session.encoding()))),
            }
        }
        if failure.is_some() {
            return self.broken(session, done, failure, window).await;
        }
        // The last of a durable window has committed synchronously.
        match session.confirmed() {
            Ok(()) => Delivery { done, durable: window.place.durable, failure: None },
            Err(error) => Delivery { done, durable: false, failure: Some(error) },
        }
    }

    /// A window that broke after `done`, which is made durable. Where that fails, its failure is the one to report: what
    /// is not durable is delivered again before any event is judged.
    async fn broken(
        &self,
        session: &Session,
        done: Vec<Delivered>,
        failure: Option<DeliverError>,
        window: &SentWindow<'_>,
    ) -> Delivery {
        let Some(last) = window.link(done.len()) else { return Delivery { done, durable: true, failure } };
        match session.barrier(&self.host, last, self.answer_timeout()).await {
            Ok(()) => Delivery { done, durable: true, failure },
            Err(error) => Delivery { done, durable: false, failure: Some(error) },
        }
    }

    /// Awaits the answer to a window that was sent as one call, and the barrier behind it where it is to be durable.
    async fn answer(
        &self,
        session: &Session,
        answer: Answer<'_, Vec<i32>>,
        barrier: Option<Answer<'_, ()>>,
        window: &SentWindow<'_>,
    ) -> Delivery {
        let Ok(answer) = tokio::time::timeout(self.answer_timeout(), answer).await else {
            return Delivery::failed(session.no_answer(self.answer_timeout()).await);
        };
        match answer {
            Ok(Some(repeated)) => {
                let mut done = vec![Delivered::Stored; window.envelopes.len()];
                for place in repeated {
                    let index = usize::try_from(place).unwrap_or_default().wrapping_sub(1);
                    if let Some(delivered) = done.get_mut(index) {
                        *delivered = Delivered::AlreadyStored;
                    }
                }
                let Some(barrier) = barrier else { return Delivery { done, durable: false, failure: None } };
                match session.proven(barrier, self.answer_timeout()).await {
                    Ok(()) => Delivery { done, durable: true, failure: None },
                    Err(error) => Delivery { done, durable: false, failure: Some(error) },
                }
            }
            Ok(None) => {
                session.forget_sources();
                Delivery::failed(predecessor_missing())
            }
            Err(error) => {
                let of_an_event = procedure::is_of_an_event(&error);
                let error = deliver_error(&error, session.encoding());
                if self.calls.are_to_blame(&error) {
                    return Delivery::to_be_repeated();
                }
                let of_a_copy = of_an_event && procedure::is_of_a_copy(&error);
                let error = if of_a_copy { error } else { session.failed(error) };
                if !of_an_event || of_a_copy {
                    self.calls.avoid(window.envelopes);
                }
                if session.is_broken() {
                    return Delivery::failed(error);
                }
                if let Err(error) = session.reset(self.answer_timeout()).await {
                    return Delivery::failed(error);
                }
                if !of_an_event {
                    return Delivery::to_be_repeated();
                }
                self.calls.heed(&error);
                match session.stored(window.envelopes, window.time, self.answer_timeout()).await {
                    Ok(done) => self.broken(session, done, (!of_a_copy).then_some(error), window).await,
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
            let window = SentWindow { envelopes: window, time: self.window_time(), place, before };
            let delivery = self.broken(&session, Vec::new(), None, &window).await;
            guard.finished();
            return delivery;
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
            previous = Some(Link::new(envelope, window_time));
        }
        line.newest = previous;
        let window = SentWindow { envelopes: window, time: window_time, place, before };
        let delivery = match call {
            Some(call) => {
                let answer = rows::sent(procedure::deliver(session.client(), call, &rows));
                let barrier = previous.filter(|_| place.durable).map(|last| session.send_barrier(&self.host, last));
                drop(line);
                self.answer(&session, answer, barrier, &window).await
            }
            None => {
                let answers = rows.into_iter().map(|row| rows::sent(rows::request(&session, row))).collect();
                drop(line);
                self.answers(&session, answers, &window).await
            }
        };
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
