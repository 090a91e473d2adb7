//! A session: a connection on which events are delivered, and what is known of its database.
//!
//! Nothing is left in the server's session: no settings, no prepared statements. So it makes no difference where a pooler hands
//! every transaction another server connection.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};
use tracing::{info, warn};
use uuid::Uuid;

use super::cancel::Canceller;
use super::connect::{ConnectSettings, Pooler, connect, limited, open_watched, within};
use super::layout::{Facts, Layout};
use super::migration::create_missing;
use super::notices::Notices;
use super::rows::{Answer, EventRow, Head, send_all, send_one};
use super::verdict::{deliver_error, missing_error, no_answer, predecessor_missing, session_outlives, step_error};
use crate::event::{Envelope, Sequence, Timestamp};
use crate::sink::{DeliverError, Delivered, Verdict};

/// How long a server that has not answered is given to say, when its statement is cancelled, what it was waiting for.
const CANCEL_TIMEOUT: Duration = Duration::from_millis(500);

/// How long what is missing may take to be made: receipts of an earlier version are copied.
const MIGRATION_MAX: Duration = Duration::from_secs(600);

const LOCK_HOLDER_SQL: &str = include_str!("sql/lock_holder.sql");

/// What the envelope that follows must find in the ledger.
#[derive(Clone, Copy)]
pub(super) struct Link {
    pub sequence: Sequence,
    pub event_id: Uuid,
    pub window_time: Timestamp,
}

impl Link {
    pub(super) fn new(envelope: &Envelope, window_time: Timestamp) -> Link {
        Link { sequence: envelope.sequence, event_id: envelope.event.id().0, window_time }
    }
}

/// A connection on which deliveries can be made.
pub(super) struct Session {
    client: Client,
    notices: Notices,
    layout: Layout,
    canceller: Canceller,
    broken: AtomicBool,
}

impl Session {
    pub(super) async fn open(settings: &ConnectSettings, pooler: &Pooler) -> Result<Session, DeliverError> {
        let ((mut client, notices), canceller) = connect(settings, pooler, open_watched).await?;
        let needs = &settings.needs;
        let mut facts = limited(settings, Facts::find(&client, needs)).await?;
        let missing = facts.missing(needs)?;
        if !missing.is_empty() {
            let made = if settings.auto_migrate {
                let making = tokio::time::timeout(MIGRATION_MAX, create_missing(&mut client, needs, false));
                making.await.unwrap_or_else(|_| Err(no_answer(MIGRATION_MAX)))
            } else {
                Err(missing_error(&missing))
            };
            let plain = facts.without_owners();
            facts = match made {
                Ok((made, _)) => {
                    info!(created = made.join(", "), "created what was missing in the database");
                    limited(settings, Facts::find(&client, needs)).await?
                }
                Err(error) if plain.missing(needs)?.is_empty() => {
                    warn!(%error, missing = missing.join(", "), "rows will not say whose they are");
                    plain
                }
                Err(error) => return Err(error),
            };
        }
        let layout = facts.layout(needs)?;
        if needs.notify_channel.is_some() {
            // The server lets go of notifications that nobody is to read any more when it is asked, or when one more fits in: where
            // the queue is full, and whoever held it up has left, it would stay full.
            let asked = async {
                let rows = client.query_typed("SELECT pg_notification_queue_usage()", &[]).await;
                rows.map_err(|error| step_error(&error))
            };
            limited(settings, asked).await?;
        }
        Ok(Session { client, notices, layout, canceller, broken: AtomicBool::new(false) })
    }

    /// Sends one event; its commit waits for the disk.
    pub(super) fn send_one<'a>(&'a self, head: Head<'a>, envelope: &'a Envelope) -> Answer<'a, bool> {
        send_one(&self.client, &self.layout, head, EventRow::new(envelope, &self.notices.encoding))
    }

    /// Sends events as one call, which proves no durability.
    pub(super) fn send_all<'a>(&'a self, head: Head<'a>, envelopes: &'a [Envelope]) -> Answer<'a, Vec<i32>> {
        let rows = envelopes.iter().map(|envelope| EventRow::new(envelope, &self.notices.encoding)).collect();
        send_all(&self.client, &self.layout, head, rows)
    }

    /// Awaits an answer to what was sent; `is_call`: of many events. Outside: it did not come.
    pub(super) async fn answer<T>(
        &self,
        answer: Answer<'_, T>,
        is_call: bool,
        limit: Duration,
    ) -> Result<Result<T, DeliverError>, DeliverError> {
        match within(limit, answer).await {
            Some(Ok(Some(answer))) => Ok(Ok(answer)),
            Some(Ok(None)) => Ok(Err(predecessor_missing())),
            Some(Err(error)) => {
                // What fails before the first event of a call is looked at is no event's fault.
                let context = error.as_db_error().and_then(|error| error.where_()).unwrap_or_default();
                let is_of_an_event = !is_call || context.contains(&self.layout.routines.deliver);
                let error =
                    if is_of_an_event { deliver_error(&error, &self.notices.encoding) } else { step_error(&error) };
                Ok(Err(self.failed(error)))
            }
            None => Err(self.no_answer(limit).await),
        }
    }

    /// How far a window came that was sent at that time and broke; makes that durable, and what came before it on this connection.
    ///
    /// `before`, the event that the window follows, is looked for: behind a pooler the server may be another one meanwhile.
    pub(super) async fn progress(
        &self,
        window: &[Envelope],
        window_time: Timestamp,
        before: Option<Link>,
        limit: Duration,
    ) -> Result<Vec<Delivered>, DeliverError> {
        let ids: Vec<Uuid> = window.iter().map(|envelope| envelope.event.id().0).collect();
        let (before_id, before_time) = before.map(|before| (before.event_id, before.window_time)).unzip();
        let parameters: [(&(dyn ToSql + Sync), Type); 4] = [
            (&ids, Type::UUID_ARRAY),
            (&window_time, Type::TIMESTAMPTZ),
            (&before_id, Type::UUID),
            (&before_time, Type::TIMESTAMPTZ),
        ];
        let asking = self.client.query_typed(&self.layout.progress_sql, &parameters);
        let rows = match tokio::time::timeout(limit, asking).await {
            Ok(rows) => rows.map_err(|error| self.failed(step_error(&error)))?,
            Err(_) => return Err(self.no_answer(limit).await),
        };
        let dealt: Vec<(Uuid, bool)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let of = |id: Uuid| dealt.iter().find(|(dealt, _)| *dealt == id).map(|(_, repeated)| *repeated);
        if before_id.is_some_and(|id| of(id).is_none()) {
            self.break_off();
            return Err(predecessor_missing());
        }
        self.confirmed()?;
        let repeated = ids.into_iter().map_while(of);
        Ok(repeated.map(Delivered::of).collect())
    }

    /// An error of a statement that took too long names who holds a lock that it may have waited for.
    pub(super) async fn with_lock_holder(&self, mut error: DeliverError, limit: Duration) -> DeliverError {
        if matches!(error.sqlstate.as_deref(), Some("57014" | "55P03")) {
            let tables: &[&str] = &[&self.layout.events, &self.layout.receipts, &self.layout.sources];
            let parameters: [(&(dyn ToSql + Sync), Type); 1] = [(&tables, Type::TEXT_ARRAY)];
            let asking = self.client.query_typed(LOCK_HOLDER_SQL, &parameters);
            if let Ok(Ok(rows)) = tokio::time::timeout(limit, asking).await
                && let Some(row) = rows.first()
            {
                error.message.push_str("; ");
                error.message.push_str(row.get(0));
            }
        }
        error
    }

    /// Looks whether the server answers.
    pub(super) async fn check(&self, limit: Duration) -> Result<(), DeliverError> {
        match tokio::time::timeout(limit, self.client.simple_query("")).await {
            Ok(answer) => answer.map(|_| ()).map_err(|error| self.failed(step_error(&error))),
            Err(_) => Err(self.no_answer(limit).await),
        }
    }

    /// What a failure means for this session: it is used no more where the failure can lie in the session itself.
    fn failed(&self, error: DeliverError) -> DeliverError {
        if !session_outlives(&error) {
            self.break_off();
        }
        error
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed) || self.notices.has_wait_ended() || self.client.is_closed()
    }

    fn break_off(&self) {
        self.broken.store(true, Ordering::Relaxed);
    }

    /// Uses the connection no more after an answer has not come within `limit`, and asks the server to end what it is still at, so
    /// that backends do not pile up. The error says whether the server was waiting for a synchronous standby: it answers the request
    /// to cancel with a warning then.
    async fn no_answer(&self, limit: Duration) -> DeliverError {
        self.break_off();
        tokio::spawn(self.canceller.clone().cancel(self.client.cancel_token()));
        match self.notices.wait_ends(CANCEL_TIMEOUT).await {
            true => standby_missing(),
            false => no_answer(limit),
        }
    }

    /// Whether what was committed synchronously on this connection can be relied on: no commit has stopped waiting for
    /// its synchronous standby. Asked once the answer to the commit is there.
    pub(super) fn confirmed(&self) -> Result<(), DeliverError> {
        if self.notices.has_wait_ended() { Err(standby_missing()) } else { Ok(()) }
    }

    /// Breaks the session unless [`FinishGuard::finished`] is called: for futures that may be dropped half-way.
    pub(super) fn broken_unless_finished(&self) -> FinishGuard<'_> {
        FinishGuard { session: self, finished: false }
    }
}

/// A commit waits for a standby that does not confirm it, or has stopped waiting. It is tried again without end.
fn standby_missing() -> DeliverError {
    DeliverError {
        verdict: Verdict::Again,
        sqlstate: None,
        message:
            "could not commit durably: the server waits for a synchronous standby that has not confirmed; start the \
                  standby that synchronous_standby_names requires, or change that setting"
                .to_owned(),
    }
}

pub(super) struct FinishGuard<'a> {
    session: &'a Session,
    finished: bool,
}

impl FinishGuard<'_> {
    pub(super) fn finished(mut self) {
        self.finished = true;
    }
}

impl Drop for FinishGuard<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.session.break_off();
        }
    }
}
