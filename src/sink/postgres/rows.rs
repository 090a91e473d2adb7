//! Events as parameters of the routines.

use std::borrow::Cow;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};
use uuid::Uuid;

use super::layout::Layout;
use crate::event::{Envelope, ForeignKeys, Origin, Timestamp};

/// The answer to what was sent; `None` where the event before it was not dealt with, and nothing was done.
pub(super) type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<Option<T>, tokio_postgres::Error>> + Send + 'a>>;

/// Bytes of a path that fit into the index of `event_sources` together with a host's name.
const PATH_BYTES_MAX: usize = 2048;

/// An event as the routines take it.
pub(super) struct EventRow<'a> {
    event_id: Uuid,
    path: Cow<'a, str>,
    byte_offset: Option<i64>,
    captured_at: Timestamp,
    timestamp: Timestamp,
    event_type: &'a str,
    /// Text that is converted to the database's encoding where it is stored: what can't be is that event's error.
    payload: &'a [u8],
    refs: ForeignKeys,
}

impl<'a> EventRow<'a> {
    /// `encoding`: of the database.
    pub(super) fn new(envelope: &'a Envelope, encoding: &str) -> Self {
        let event = &envelope.event;
        let (path, offset) = match event.origin() {
            Origin::Transcript { path, offset } => (stored_path(path, encoding), Some(*offset)),
            origin @ (Origin::Hook | Origin::Http | Origin::Cli) => (Cow::Borrowed(origin.kind()), None),
        };
        EventRow {
            event_id: event.id().0,
            path,
            byte_offset: offset.and_then(|offset| i64::try_from(offset).ok()),
            captured_at: envelope.captured_at,
            timestamp: event.timestamp(),
            event_type: event.event_type().as_str(),
            payload: event.payload().as_json().as_bytes(),
            refs: *event.refs(),
        }
    }
}

/// A path as `event_sources` has it: one that is too long for an index keeps its end, and its hash before that. A database
/// that may lack letters gets those beyond ASCII as escapes.
fn stored_path<'a>(path: &'a str, encoding: &str) -> Cow<'a, str> {
    let path = match encoding {
        "UTF8" => Cow::Borrowed(path),
        _ if path.is_ascii() => Cow::Borrowed(path),
        _ => Cow::Owned(path.escape_default().to_string()),
    };
    if path.len() <= PATH_BYTES_MAX {
        return path;
    }
    let start = (path.len() - PATH_BYTES_MAX..path.len()).find(|at| path.is_char_boundary(*at)).unwrap_or_default();
    let hash = xxhash_rust::xxh3::xxh3_64(path.as_bytes());
    Cow::Owned(format!("{hash:016x}:{}", path.get(start..).unwrap_or_default()))
}

/// What all events of a window share, and the event that the first of them follows.
#[derive(Clone, Copy)]
pub(super) struct Head<'a> {
    pub host: &'a str,
    pub window_time: Timestamp,
    pub predecessor: Option<(Uuid, Timestamp)>,
}

/// Sends one event, which is made durable. The answer: whether it was new.
pub(super) fn send_one<'a>(
    client: &'a Client,
    layout: &'a Layout,
    head: Head<'a>,
    row: EventRow<'a>,
) -> Answer<'a, bool> {
    sent(async move {
        let (predecessor, predecessor_time) = head.predecessor.unzip();
        let EventRow { event_id, path, byte_offset, captured_at, timestamp, event_type, payload, refs } = &row;
        let parameters: [(&(dyn ToSql + Sync), Type); 15] = [
            (&head.window_time, Type::TIMESTAMPTZ),
            (&predecessor, Type::UUID),
            (&predecessor_time, Type::TIMESTAMPTZ),
            (event_id, Type::UUID),
            (&head.host, Type::TEXT),
            (path, Type::TEXT),
            (byte_offset, Type::INT8),
            (captured_at, Type::TIMESTAMPTZ),
            (timestamp, Type::TIMESTAMPTZ),
            (event_type, Type::TEXT),
            (payload, Type::BYTEA),
            (&refs.project_id, Type::INT4),
            (&refs.agent_id, Type::INT4),
            (&refs.command_id, Type::INT4),
            (&refs.turn_id, Type::INT4),
        ];
        let rows = client.query_typed(&layout.store_sql, &parameters).await?;
        rows.first().map_or(Ok(None), |row| row.try_get(0))
    })
}

/// Sends events as one call. The answer: the places of those that had been stored before, from 1 on.
pub(super) fn send_all<'a>(
    client: &'a Client,
    layout: &'a Layout,
    head: Head<'a>,
    rows: Vec<EventRow<'a>>,
) -> Answer<'a, Vec<i32>> {
    fn column<'r, T>(rows: &'r [EventRow<'_>], of: impl Fn(&'r EventRow<'_>) -> T) -> Vec<T> {
        rows.iter().map(of).collect()
    }
    sent(async move {
        let (predecessor, predecessor_time) = head.predecessor.unzip();
        let parameters: [(&(dyn ToSql + Sync), Type); 15] = [
            (&head.host, Type::TEXT),
            (&head.window_time, Type::TIMESTAMPTZ),
            (&predecessor, Type::UUID),
            (&predecessor_time, Type::TIMESTAMPTZ),
            (&column(&rows, |row| row.event_id), Type::UUID_ARRAY),
            (&column(&rows, |row| &*row.path), Type::TEXT_ARRAY),
            (&column(&rows, |row| row.byte_offset), Type::INT8_ARRAY),
            (&column(&rows, |row| row.captured_at), Type::TIMESTAMPTZ_ARRAY),
            (&column(&rows, |row| row.timestamp), Type::TIMESTAMPTZ_ARRAY),
            (&column(&rows, |row| row.event_type), Type::TEXT_ARRAY),
            (&column(&rows, |row| row.payload), Type::BYTEA_ARRAY),
            (&column(&rows, |row| row.refs.project_id), Type::INT4_ARRAY),
            (&column(&rows, |row| row.refs.agent_id), Type::INT4_ARRAY),
            (&column(&rows, |row| row.refs.command_id), Type::INT4_ARRAY),
            (&column(&rows, |row| row.refs.turn_id), Type::INT4_ARRAY),
        ];
        let answer = client.query_typed(&layout.deliver_sql, &parameters).await?;
        answer.first().map_or(Ok(None), |row: &Row| row.try_get(0))
    })
}

/// Sends a request. Polling it once does, so all are on their way before the first answer is awaited.
fn sent<'a, T: Send + 'a>(
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
