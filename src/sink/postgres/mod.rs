//! Postgres as the sink: a window of transactions in flight on one connection.
//!
//! Every envelope is one statement and so one transaction of its own. The statements of a window are sent without
//! waiting for one another; Postgres runs them in order. All but the last commit asynchronously, the last one
//! synchronously, and as the write-ahead log is one sequence, its flush makes all before it durable.
//!
//! **The barrier must write.** Nothing is reported as done before a transaction that *wrote*, with synchronous
//! commit, came after it. In a whole window that is the last statement: also a duplicate writes (it marks its
//! receipt). In a window that broke in the middle nothing after the break writes, so a small transaction of our own
//! follows (`Layout::barrier_sql`).
//!
//! A connection lost between sending and the answer leaves the outcome unknown: the window is sent again and the
//! receipts decide.
//!
//! The only user of tokio-postgres, bb8, bb8-postgres and rustls.

mod connect;
mod layout;
mod verdict;

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, TryStreamExt};
use tokio_postgres::Row;
use tokio_postgres::types::private::BytesMut;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use uuid::Uuid;

pub use self::connect::{ConnectSettings, Inspection, TargetSource};
use self::connect::{Connections, Session};
pub use self::layout::printable_sql;
use self::verdict::deliver_error;
use super::{DeliverError, Delivered, Delivery, Sink, Verdict};
use crate::event::{Envelope, Origin, Timestamp};

/// The sink that stores events in Postgres.
pub struct PostgresSink {
    connections: Connections,
    /// Name of this machine in `event_sources`.
    host: String,
    statement_timeout: Duration,
    /// The time of the newest window, microseconds: a window's time is its token and never comes twice.
    newest_window_us: AtomicI64,
    /// The session in use, kept between windows.
    held: tokio::sync::Mutex<Option<connect::PooledSession>>,
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
            held: tokio::sync::Mutex::new(None),
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

    async fn deliver_in(&self, session: &Session, window: &[Envelope]) -> Delivery {
        let sources = match session.source_ids(&self.host, window, self.answer_timeout()).await {
            Ok(sources) => sources,
            Err(failure) => return Delivery { done: Vec::new(), failure: Some(failure) },
        };
        let rows = statement_rows(window, &sources, self.window_time());
        // Polling a request once sends it; all are on their way before the first answer is awaited.
        let mut answers: Vec<Answer<'_>> = Vec::with_capacity(rows.len());
        for row in &rows {
            let mut request = send(session, row).boxed();
            answers.push(match (&mut request).now_or_never() {
                Some(answer) => Answer::Ready(answer),
                None => Answer::Awaited(request),
            });
        }
        let mut done = Vec::with_capacity(window.len());
        let mut failure = None;
        for answer in answers {
            let answer = match answer {
                Answer::Ready(answer) => answer,
                Answer::Awaited(request) => match tokio::time::timeout(self.answer_timeout(), request).await {
                    Ok(answer) => answer,
                    Err(_) => {
                        session.give_up();
                        return Delivery { done: Vec::new(), failure: Some(no_answer(self.answer_timeout())) };
                    }
                },
            };
            // After a failure the remaining answers are awaited too, so that the connection is clean again.
            match answer {
                _ if failure.is_some() => {}
                Ok(Some(true)) => done.push(Delivered::Stored),
                Ok(Some(false)) => done.push(Delivered::AlreadyStored),
                Ok(None) => failure = Some(predecessor_missing()),
                Err(error) => failure = Some(error),
            }
        }
        if failure.is_some() && !done.is_empty() {
            let source = rows.first().map(|row| row.source_id).unwrap_or_default();
            if let Err(error) = session.barrier(source, self.answer_timeout()).await {
                return Delivery { done: Vec::new(), failure: Some(error) };
            }
        }
        Delivery { done, failure }
    }

    /// The server ends a statement after `statement_timeout`; its answer must be here soon after.
    fn answer_timeout(&self) -> Duration {
        self.statement_timeout + Duration::from_secs(1)
    }

    /// A session that is open: the one in use, else one from the pool.
    async fn open_session<'a>(
        &self,
        held: &'a mut Option<connect::PooledSession>,
    ) -> Result<&'a Session, DeliverError> {
        if held.as_ref().is_some_and(|session| session.is_broken()) {
            *held = None;
        }
        match held {
            Some(session) => Ok(session),
            None => Ok(held.insert(self.connections.get().await?)),
        }
    }
}

impl Sink for PostgresSink {
    async fn deliver(&self, window: &[Envelope]) -> Delivery {
        let mut held = self.held.lock().await;
        let session = match self.open_session(&mut held).await {
            Ok(session) => session,
            Err(failure) => return Delivery { done: Vec::new(), failure: Some(failure) },
        };
        // When this future is dropped half-way, the answers still to come belong to nobody: the session goes too.
        let guard = session.broken_unless_finished();
        let delivery = self.deliver_in(session, window).await;
        guard.finished();
        delivery
    }

    async fn probe(&self) -> Result<(), DeliverError> {
        let mut held = self.held.lock().await;
        self.open_session(&mut held).await.map(|_| ())
    }
}

enum Answer<'a> {
    Ready(Result<Option<bool>, DeliverError>),
    Awaited(BoxFuture<'a, Result<Option<bool>, DeliverError>>),
}

/// Sends one event; the answer is whether it was new, or nothing where its predecessor is missing.
async fn send(session: &Session, row: &StatementRow<'_>) -> Result<Option<bool>, DeliverError> {
    let parameters: [&(dyn ToSql + Sync); 14] = [
        &row.event_id,
        &row.source_id,
        &row.byte_offset,
        &row.captured_at,
        &row.predecessor,
        &row.relaxed,
        &row.window_time,
        &row.timestamp,
        &row.event_type,
        &row.payload,
        &row.project_id,
        &row.agent_id,
        &row.command_id,
        &row.turn_id,
    ];
    let rows =
        session.client().query_raw(session.deliver_statement(), parameters).await.map_err(|e| deliver_error(&e))?;
    let rows: Vec<Row> = rows.try_collect().await.map_err(|error| deliver_error(&error))?;
    match rows.first() {
        Some(row) => row.try_get::<_, bool>(0).map(Some).map_err(|error| deliver_error(&error)),
        None => Ok(None),
    }
}

/// The parameters of one statement.
struct StatementRow<'a> {
    event_id: Uuid,
    source_id: i32,
    byte_offset: Option<i64>,
    captured_at: MicrosecondsUtc,
    predecessor: Option<Uuid>,
    relaxed: bool,
    window_time: MicrosecondsUtc,
    timestamp: MicrosecondsUtc,
    event_type: &'a str,
    payload: JsonText<'a>,
    project_id: Option<i32>,
    agent_id: Option<i32>,
    command_id: Option<i32>,
    turn_id: Option<i32>,
}

fn statement_rows<'a>(
    window: &'a [Envelope],
    sources: &HashMap<&str, i32>,
    window_time: MicrosecondsUtc,
) -> Vec<StatementRow<'a>> {
    let mut predecessor = None;
    window
        .iter()
        .enumerate()
        .map(|(index, envelope)| {
            let event = &envelope.event;
            let refs = event.refs();
            let byte_offset = match event.origin() {
                Origin::Transcript { offset, .. } => i64::try_from(*offset).ok(),
                Origin::Hook | Origin::Http | Origin::Cli => None,
            };
            let event_id = event.id().0;
            StatementRow {
                event_id,
                source_id: sources.get(source_path(event.origin())).copied().unwrap_or_default(),
                byte_offset,
                captured_at: envelope.captured_at.into(),
                predecessor: predecessor.replace(event_id),
                relaxed: index + 1 < window.len(),
                window_time,
                timestamp: event.timestamp().into(),
                event_type: event.event_type().as_str(),
                payload: JsonText(event.payload().as_json()),
                project_id: refs.project_id,
                agent_id: refs.agent_id,
                command_id: refs.command_id,
                turn_id: refs.turn_id,
            }
        })
        .collect()
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
        message: "the receipt of the event before this one is gone".to_owned(),
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
