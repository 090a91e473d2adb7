//! Events as parameters of statements, and the statements on their way.

use std::collections::HashMap;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use futures_util::TryStreamExt;
use tokio_postgres::Row;
use tokio_postgres::types::private::BytesMut;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use uuid::Uuid;

use super::connect::{Session, Source};
use super::layout::Layout;
use crate::event::{Envelope, Origin, Timestamp};

/// The answer to what was sent; `None` where its condition did not hold, and nothing was done.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<Option<T>, tokio_postgres::Error>> + Send + 'a>>;

/// Sends a request. Polling it once does, so all are on their way before the first answer is awaited.
pub fn sent<'a, T: Send + 'a>(
    request: impl Future<Output = Result<Option<T>, tokio_postgres::Error>> + Send + 'a,
) -> Answer<'a, T> {
    let mut request: Answer<'a, T> = Box::pin(request);
    // An answer can't be there before the connection has been given a turn; what is wrong with a request is told again
    // when its answer is asked for.
    match request.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Pending => request,
        Poll::Ready(answer) => Box::pin(std::future::ready(answer)),
    }
}

/// One event: whether it was new.
pub async fn request(session: &Session, row: StatementRow<'_>) -> Result<Option<bool>, tokio_postgres::Error> {
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
pub struct StatementRow<'a> {
    pub event_id: Uuid,
    pub source_id: i32,
    pub byte_offset: Option<i64>,
    pub captured_at: MicrosecondsUtc,
    pub window_time: MicrosecondsUtc,
    pub predecessor: Option<Uuid>,
    pub predecessor_time: Option<MicrosecondsUtc>,
    pub relaxed: bool,
    pub timestamp: MicrosecondsUtc,
    pub event_type: &'a str,
    pub payload: JsonText<'a>,
    pub project_id: Option<i32>,
    pub agent_id: Option<i32>,
    pub command_id: Option<i32>,
    pub turn_id: Option<i32>,
    /// For the first of a window only.
    pub window_sources: Option<WindowSources<'a>>,
}

/// The rows of `event_sources` that a window speaks of.
#[derive(Clone, Copy)]
pub struct WindowSources<'a> {
    pub ids: &'a [i32],
    pub paths: &'a [&'a str],
}

impl<'a> StatementRow<'a> {
    pub fn new(envelope: &'a Envelope, sources: &HashMap<&str, Source>, window_time: MicrosecondsUtc) -> Self {
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
pub fn source_path(origin: &Origin) -> &str {
    match origin {
        Origin::Transcript { path, .. } => path,
        Origin::Hook | Origin::Http | Origin::Cli => origin.kind(),
    }
}

/// An instant as Postgres sends it: microseconds since 2000-01-01.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MicrosecondsUtc(pub i64);

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
#[derive(Clone, Copy)]
pub struct JsonText<'a>(&'a str);

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
