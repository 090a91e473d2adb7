//! Postgres as the sink: windows of transactions on one connection.
//!
//! Every envelope is a transaction of its own and one call of the function `store` (`sql/store.sql`). A window is one CALL of a
//! procedure that stores and commits all but the last, and one SELECT that stores the last:
//!
//! ```text
//! window of n events ──► CALL   deliver(the first n - 1)   each: store, COMMIT (asynchronous)
//!                    └─► SELECT store(the last)            an ordinary statement: its commit waits for the disk
//! ```
//!
//! Both, and those of the window after it, are sent without waiting for one another; Postgres runs them in order. As the
//! write-ahead log is one sequence, the last one's flush makes all before it durable. A window that need not be durable yet is
//! the CALL alone.
//!
//! **The last statement must write.** Nothing is reported as durable before a transaction that *wrote*, with synchronous
//! commit, came after it on its connection. `store` writes also for a duplicate (it marks its receipt). A window that broke in
//! the middle is followed by a small update of our own, which also tells how far it came ([`Session::progress`]).
//!
//! **Success is not proof.** Where the server requires a synchronous standby, a commit can end without it: with success
//! and a warning. A connection that has seen that warning proves nothing any more ([`notices`]); what was sent on it is
//! sent again on another. A CALL is never proof: once its time-out has fired, its commits stop waiting.
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
mod inspection;
mod layout;
mod migration;
mod notices;
mod pool;
mod routines;
mod rows;
mod session;
mod tls;
mod verdict;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

pub(crate) use self::audit::{ASKED_MAX, AuditedRow, Auditor, Receipt, StaleReceipt};
pub use self::connect::{ConnectSettings, TargetSource};
pub(crate) use self::inspection::inspect;
pub use self::layout::Needs;
pub(crate) use self::migration::{migrate, printable_sql};
use self::pool::{Connections, PooledSession};
use self::rows::{Answer, Head};
use self::session::{Link, Session};
use self::verdict::predecessor_missing;
use super::{DeliverError, Delivered, Delivery, Place, Sink, Verdict};
use crate::event::{Envelope, Timestamp};

/// How long a server may take to answer when nothing is asked of it.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// A way to the server that is slower is given up.
const UPLOAD_BYTES_PER_SECOND_MIN: u64 = 64 << 10;

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
}

/// Where windows are sent, one after the other.
#[derive(Default)]
struct Line {
    /// The session in use, kept between windows.
    session: Option<Arc<PooledSession>>,
    /// The envelope that was sent last, and the bytes of its window.
    newest: Option<Link>,
    newest_bytes: u64,
}

/// A window that was sent, its answers to come.
struct SentWindow<'a> {
    envelopes: &'a [Envelope],
    time: Timestamp,
    /// What the first envelope follows.
    before: Option<Link>,
    call: Option<Answer<'a, Vec<i32>>>,
    /// The statement behind the call, which makes the window durable.
    last: Option<Answer<'a, bool>>,
    /// How long its answers may take.
    limit: Duration,
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
        }
    }

    /// A time that is later than that of every window before.
    fn window_time(&self) -> Timestamp {
        let now = Timestamp::now().as_microsecond();
        let before = self.newest_window_us.fetch_max(now, Ordering::Relaxed);
        let time = if before < now { now } else { self.newest_window_us.fetch_add(1, Ordering::Relaxed) + 1 };
        Timestamp::from_microsecond(time).unwrap_or_default()
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

    /// Sends a window.
    fn send<'a>(
        &'a self,
        session: &'a Session,
        envelopes: &'a [Envelope],
        before: Option<Link>,
        bytes: u64,
        durable: bool,
    ) -> SentWindow<'a> {
        let time = self.window_time();
        // The window before it is to be sent and answered first.
        let answers = if before.is_some() { 2 * self.answer_timeout() } else { self.answer_timeout() };
        let limit = answers + Duration::from_secs(bytes / UPLOAD_BYTES_PER_SECOND_MIN);
        let head = |before: Option<Link>| Head {
            host: &self.host,
            window_time: time,
            predecessor: before.map(|link| (link.event_id, link.window_time)),
        };
        let (last, called) = match envelopes.split_last() {
            Some((last, called)) if durable => (Some(last), called),
            _ => (None, envelopes),
        };
        let call = (!called.is_empty()).then(|| session.send_all(head(before), called));
        let before_last = called.last().map(|envelope| Link::new(envelope, time)).or(before);
        let last = last.map(|last| session.send_one(head(before_last), last));
        SentWindow { envelopes, time, before, call, last, limit }
    }

    /// Awaits what came of a window. All answers are awaited, also after a failure, so that the connection is clean again.
    async fn land(&self, session: &Session, window: SentWindow<'_>) -> Result<Delivery, DeliverError> {
        let SentWindow { envelopes, time, before, call, last, limit } = window;
        let durable = last.is_some();
        let mut done = Vec::with_capacity(envelopes.len());
        let mut failure = None;
        if let Some(call) = call {
            match session.answer(call, true, limit).await? {
                Ok(repeated) => {
                    let count = envelopes.len() - usize::from(durable);
                    let is_repeated =
                        |place: &usize| repeated.iter().any(|repeated| usize::try_from(*repeated) == Ok(*place));
                    done.extend((1..=count).map(|place| Delivered::of(is_repeated(&place))));
                }
                Err(error) => failure = Some(error),
            }
        }
        if let Some(last) = last {
            match session.answer(last, false, limit).await? {
                Ok(is_new) => done.push(Delivered::of(!is_new)),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        if failure.is_some() || envelopes.is_empty() {
            return match (session.progress(envelopes, time, before, limit).await, failure) {
                (Ok(done), None) => Ok(Delivery { done, durable: true, failure: None }),
                (Ok(done), Some(failure)) => {
                    let failure = session.with_lock_holder(failure, limit).await;
                    Ok(Delivery { done, durable: true, failure: Some(failure) })
                }
                // No event is judged before all that came before it is durable.
                (Err(_), Some(failure)) if failure.verdict != Verdict::Event => Err(failure),
                (Err(error), _) => Err(error),
            };
        }
        match session.confirmed() {
            Ok(()) => Ok(Delivery { done, durable, failure: None }),
            Err(error) => Ok(Delivery { done, durable: false, failure: Some(error) }),
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
        // A session that was opened just now knows nothing of the window before.
        if before.is_some() && line.newest.is_none() {
            return Delivery::failed(predecessor_missing());
        }
        // When this future is dropped half-way, the answers still to come belong to nobody: the session goes too.
        let guard = session.broken_unless_finished();
        let bytes: u64 = window.iter().map(|envelope| envelope.event.payload().as_json().len() as u64).sum();
        let under_way = if before.is_some() { line.newest_bytes } else { 0 };
        let sent = self.send(&session, window, before, bytes + under_way, place.durable);
        line.newest_bytes = bytes;
        line.newest = window.last().map(|envelope| Link::new(envelope, sent.time)).or(line.newest);
        drop(line);
        let delivery = self.land(&session, sent).await.unwrap_or_else(Delivery::failed);
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
