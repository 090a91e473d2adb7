//! Postgres as the sink: windows of transactions in flight on one connection.
//!
//! Every envelope is one statement and so one transaction of its own. The statements of a window, and those of the
//! window after it, are sent without waiting for one another; Postgres runs them in order. All commit asynchronously
//! but the last of a window that is to be durable, and as the write-ahead log is one sequence, its flush makes all
//! before it durable.
//!
//! **The barrier must write.** Nothing is reported as durable before a transaction that *wrote*, with synchronous
//! commit, came after it on its connection. In a whole durable window that is the last statement: also a duplicate
//! writes (it marks its receipt). In a window that broke in the middle nothing after the break writes, so a small
//! transaction of our own follows (`Layout::barrier_sql`).
//!
//! **Order.** Each statement stores its event only when the one before it has been dealt with in this very delivery
//! (the receipt carries the time of its window); across windows too, so that a window under way behind one that breaks
//! stores nothing.
//!
//! A connection lost between sending and the answer leaves the outcome unknown: the window is sent again and the
//! receipts decide.
//!
//! The only user of tokio-postgres, bb8, bb8-postgres and rustls.

mod audit;
mod connect;
mod layout;
mod verdict;

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::TryStreamExt;
use tokio_postgres::Row;
use tokio_postgres::types::private::BytesMut;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use uuid::Uuid;

pub use self::audit::{ASKED_MAX, AuditedRow, Auditor, Receipt, StaleReceipt};
pub use self::connect::{ConnectSettings, Inspection, TargetSource};
use self::connect::{Connections, PooledSession, Session, Source};
use self::layout::Layout;
pub use self::layout::printable_sql;
use self::verdict::deliver_error;
use super::{DeliverError, Delivered, Delivery, Place, Sink, Verdict};
use crate::event::{Envelope, Origin, Sequence, Timestamp};

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
    async fn answers(&self, session: &Session, sent: Vec<Answer<'_>>, place: Place) -> Delivery {
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
        let mut durable = place.durable;
        if failure.is_some() {
            let stored = place.after.is_some() || !done.is_empty();
            durable = !stored || session.barrier(&self.host, self.answer_timeout()).await.is_ok();
        }
        Delivery { done, durable, failure }
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
        let sources = match session.sources(&self.host, window, self.answer_timeout()).await {
            Ok(sources) => sources,
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
        let mut sent = Vec::with_capacity(window.len());
        for (index, envelope) in window.iter().enumerate() {
            let mut row = StatementRow::new(envelope, &sources, window_time);
            row.predecessor = previous.map(|previous| previous.event_id);
            row.predecessor_time = previous.map(|previous| previous.window_time);
            row.relaxed = !(place.durable && index + 1 == window.len());
            row.window_sources = (index == 0).then_some(WindowSources { ids: &ids, paths: &paths });
            sent.push(send(&session, row));
            previous = Some(Link { sequence: envelope.sequence, event_id: envelope.event.id().0, window_time });
        }
        line.newest = previous;
        drop(line);
        let delivery = self.answers(&session, sent, place).await;
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

/// The answer to one statement: whether the event was new, or nothing where its condition did not hold.
type Answer<'a> = Pin<Box<dyn Future<Output = Result<Option<bool>, tokio_postgres::Error>> + Send + 'a>>;

/// Sends one event. Polling a request once sends it, so all are on their way before the first answer is awaited.
fn send<'a>(session: &'a Session, row: StatementRow<'a>) -> Answer<'a> {
    let mut request: Answer<'a> = Box::pin(request(session, row));
    // An answer can't be there before the connection has been given a turn; what is wrong with a request is told again
    // when its answer is asked for.
    match request.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Pending => request,
        Poll::Ready(answer) => Box::pin(std::future::ready(answer)),
    }
}

async fn request(session: &Session, row: StatementRow<'_>) -> Result<Option<bool>, tokio_postgres::Error> {
    let common: [&(dyn ToSql + Sync); 15] = [
        &row.event_id,
        &row.source_id,
        &row.byte_offset,
        &row.captured_at,
        &row.window_time,
        &row.predecessor,
        &row.predecessor_time,
        &row.relaxed,
        &row.timestamp,
        &row.event_type,
        &row.payload,
        &row.project_id,
        &row.agent_id,
        &row.command_id,
        &row.turn_id,
    ];
    let client = session.client();
    let rows = match (session.prepared(), row.window_sources) {
        (Some(prepared), None) => client.query_raw(&prepared.next, common).await?,
        (Some(prepared), Some(WindowSources { ids, paths })) => {
            let sources: [&(dyn ToSql + Sync); 2] = [&ids, &paths];
            let parameters: Vec<_> = common.into_iter().chain(sources).collect();
            client.query_raw(&prepared.first, parameters).await?
        }
        (None, None) => {
            let parameters = common.into_iter().zip(Layout::NEXT_TYPES);
            client.query_typed_raw(&session.layout().next_sql, parameters).await?
        }
        (None, Some(WindowSources { ids, paths })) => {
            let sources: [&(dyn ToSql + Sync); 2] = [&ids, &paths];
            let parameters = common.into_iter().chain(sources).zip(Layout::FIRST_TYPES);
            client.query_typed_raw(&session.layout().first_sql, parameters).await?
        }
    };
    let rows: Vec<Row> = rows.try_collect().await?;
    rows.first().map(|row| row.try_get(0)).transpose()
}

/// The parameters of one statement.
struct StatementRow<'a> {
    event_id: Uuid,
    source_id: i32,
    byte_offset: Option<i64>,
    captured_at: MicrosecondsUtc,
    window_time: MicrosecondsUtc,
    predecessor: Option<Uuid>,
    predecessor_time: Option<MicrosecondsUtc>,
    relaxed: bool,
    timestamp: MicrosecondsUtc,
    event_type: &'a str,
    payload: JsonText<'a>,
    project_id: Option<i32>,
    agent_id: Option<i32>,
    command_id: Option<i32>,
    turn_id: Option<i32>,
    /// For the first of a window only.
    window_sources: Option<WindowSources<'a>>,
}

/// The rows of `event_sources` that a window speaks of.
#[derive(Clone, Copy)]
struct WindowSources<'a> {
    ids: &'a [i32],
    paths: &'a [&'a str],
}

impl<'a> StatementRow<'a> {
    fn new(envelope: &'a Envelope, sources: &HashMap<&str, Source>, window_time: MicrosecondsUtc) -> Self {
        let event = &envelope.event;
        let refs = event.refs();
        let byte_offset = match event.origin() {
            Origin::Transcript { offset, .. } => i64::try_from(*offset).ok(),
            Origin::Hook | Origin::Http | Origin::Cli => None,
        };
        StatementRow {
            event_id: event.id().0,
            source_id: sources.get(source_path(event.origin())).map(|source| source.id).unwrap_or_default(),
            byte_offset,
            captured_at: envelope.captured_at.into(),
            window_time,
            predecessor: None,
            predecessor_time: None,
            relaxed: true,
            timestamp: event.timestamp().into(),
            event_type: event.event_type().as_str(),
            payload: JsonText(event.payload().as_json()),
            project_id: refs.project_id,
            agent_id: refs.agent_id,
            command_id: refs.command_id,
            turn_id: refs.turn_id,
            window_sources: None,
        }
    }
}

/// What stands in `event_sources.path` for an origin.
fn source_path(origin: &Origin) -> &str {
    match origin {
        Origin::Transcript { path, .. } => path,
        Origin::Hook | Origin::Http | Origin::Cli => origin.kind(),
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

/// An instant as Postgres sends it: microseconds since 2000-01-01.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct MicrosecondsUtc(i64);

impl From<Timestamp> for MicrosecondsUtc {
    fn from(timestamp: Timestamp) -> Self {
        MicrosecondsUtc(timestamp.as_microsecond())
    }
}

impl ToSql for MicrosecondsUtc {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        /// Microseconds from the Unix epoch to 2000-01-01T00:00:00Z.
        const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;
        out.extend_from_slice(&(self.0 - POSTGRES_EPOCH_US).to_be_bytes());
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TIMESTAMPTZ
    }

    to_sql_checked!();
}

/// JSON text as a jsonb parameter, without parsing it again. `Debug` shows its size only.
struct JsonText<'a>(&'a str);

impl std::fmt::Debug for JsonText<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "JsonText({} bytes)", self.0.len())
    }
}

impl ToSql for JsonText<'_> {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        /// Version of jsonb's binary format.
        const JSONB_VERSION: u8 = 1;
        out.extend_from_slice(&[JSONB_VERSION]);
        out.extend_from_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::JSONB
    }

    to_sql_checked!();
}
