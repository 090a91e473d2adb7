//! Connections: where Postgres is, TLS, the pool, and a session that is ready for deliveries.
//!
//! Where Postgres is and the password are looked up anew for each attempt, so that a mended password file needs no
//! restart. bb8 answers a failed attempt only with its own time-out; [`Connections::get`] listens to its error sink
//! and answers with the cause at once.
//!
//! Poolers: where one hands every transaction another server connection (PgBouncer in transaction mode), a session has
//! no state: no settings, no prepared statements. PgBouncer refuses the startup option by which a session sets its
//! `statement_timeout`; that tells it apart, and from then on statements go out unnamed, parsed anew each time. One that
//! is told to ignore that option is noticed when a prepared statement is not there.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bb8::{ErrorSink, ManageConnection, Pool, PooledConnection, RunError};
use bb8_postgres::PostgresConnectionManager;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::sync::{Notify, OnceCell};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row, Statement};
use tokio_postgres_rustls::MakeRustlsConnect;
use tracing::{info, warn};
use uuid::Uuid;

use super::cancel::Canceller;
use super::layout::{Found, Layout};
use super::notices::Notices;
use super::rows::{Answer, MicrosecondsUtc, sent, source_path};
use super::verdict::{session_outlives, step_error};
use super::{Link, layout, no_answer, predecessor_missing, procedure};
use crate::config::{ChannelBinding, DatabaseHost, DatabaseTarget, SslMode, TableName};
use crate::event::{Envelope, Timestamp};
use crate::regular_file;
use crate::sink::{DeliverError, Delivered, Verdict};

/// Says where Postgres is, each time it is asked. `Ok(None)`: nothing is configured. The error is for people.
pub type TargetSource = Arc<dyn Fn() -> Result<Option<DatabaseTarget>, String> + Send + Sync>;

/// Ids of `event_sources` that a session remembers.
const SOURCES_KEPT_MAX: usize = 2048;

/// How long a server that has not answered is given to say, when its statement is cancelled, what it was waiting for.
const CANCEL_TIMEOUT: Duration = Duration::from_millis(500);

/// A larger file holds no certificate and no key: the trusted certificates of a system have some 250 kB.
const PEM_BYTES_MAX: u64 = 16 << 20;

#[derive(Clone)]
pub struct ConnectSettings {
    pub target: TargetSource,
    pub pool_size: u32,
    /// For one attempt to open a connection.
    pub connect_timeout: Duration,
    pub statement_timeout: Duration,
    pub events_table: TableName,
    /// Create missing tables when a connection is opened.
    pub auto_migrate: bool,
    /// NOTIFY this channel with each row's id.
    pub notify_channel: Option<String>,
}

/// A session on loan from the pool.
pub type PooledSession = PooledConnection<'static, Manager>;

/// The pool.
pub struct Connections {
    pool: Pool<Manager>,
    errors: Arc<Errors>,
    connect_timeout: Duration,
}

impl Connections {
    pub fn new(settings: ConnectSettings) -> Self {
        let errors = Arc::new(Errors::default());
        let connect_timeout = settings.connect_timeout;
        let pool = Pool::builder()
            .max_size(settings.pool_size)
            .min_idle(None)
            .test_on_check_out(false)
            .retry_connection(false)
            .idle_timeout(None)
            .max_lifetime(None)
            .connection_timeout(connect_timeout)
            .error_sink(Box::new(Sunk(errors.clone())))
            .build_unchecked(Manager { settings, pooler: Arc::default() });
        Connections { pool, errors, connect_timeout }
    }

    /// A session that is ready, or why there is none.
    pub async fn get(&self) -> Result<PooledSession, DeliverError> {
        self.errors.clear();
        tokio::select! {
            pooled = self.pool.get_owned() => pooled.map_err(|error| match error {
                RunError::User(error) => error,
                RunError::TimedOut => DeliverError {
                    verdict: Verdict::Again,
                    sqlstate: None,
                    message: format!("no connection to the database within {} ms", self.connect_timeout.as_millis()),
                },
            }),
            error = self.errors.next() => Err(error),
        }
    }
}

/// The newest error of the pool.
#[derive(Default, Debug)]
struct Errors {
    newest: Mutex<Option<DeliverError>>,
    arrived: Notify,
}

impl Errors {
    fn slot(&self) -> std::sync::MutexGuard<'_, Option<DeliverError>> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clear(&self) {
        *self.slot() = None;
    }

    async fn next(&self) -> DeliverError {
        loop {
            let arrived = self.arrived.notified();
            if let Some(error) = self.slot().take() {
                return error;
            }
            arrived.await;
        }
    }
}

#[derive(Debug)]
struct Sunk(Arc<Errors>);

impl ErrorSink<DeliverError> for Sunk {
    fn sink(&self, error: DeliverError) {
        *self.0.slot() = Some(error);
        self.0.arrived.notify_waiters();
    }

    fn boxed_clone(&self) -> Box<dyn ErrorSink<DeliverError>> {
        Box::new(Sunk(self.0.clone()))
    }
}

/// Opens sessions for the pool.
pub struct Manager {
    settings: ConnectSettings,
    pooler: Arc<Pooler>,
}

/// What is known of a pooler between us and the server.
#[derive(Default, Debug)]
pub struct Pooler {
    /// It takes no startup options, so it is there.
    refuses_options: AtomicBool,
    /// A prepared statement was not there any more.
    loses_statements: AtomicBool,
}

impl Pooler {
    /// Whether nothing may be left in a session.
    fn is_there(&self) -> bool {
        self.refuses_options.load(Ordering::Relaxed) || self.loses_statements.load(Ordering::Relaxed)
    }

    /// Looks at an error for signs of a pooler.
    fn heed(&self, error: &DeliverError) {
        // Unknown or taken name of a statement; a statement of that name that takes other parameters.
        let lost = matches!(error.sqlstate.as_deref(), Some("26000" | "42P05" | "08P01"));
        if lost && !self.loses_statements.swap(true, Ordering::Relaxed) {
            info!("prepared statements do not last: there seems to be a pooler; going on without them");
        }
    }
}

impl ManageConnection for Manager {
    type Connection = Session;
    type Error = DeliverError;

    async fn connect(&self) -> Result<Session, DeliverError> {
        Session::open(&self.settings, &self.pooler).await
    }

    async fn is_valid(&self, session: &mut Session) -> Result<(), DeliverError> {
        session.client.simple_query("").await.map(|_| ()).map_err(|error| step_error(&error))
    }

    fn has_broken(&self, session: &mut Session) -> bool {
        session.is_broken()
    }
}

/// A connection on which deliveries can be made.
pub struct Session {
    client: Client,
    notices: Notices,
    /// `None` behind a pooler.
    prepared: Option<Prepared>,
    layout: Box<Layout>,
    /// The call that stores a whole window, once one was wanted; `None` in it where there can't be one.
    call: OnceCell<Option<Statement>>,
    pooler: Arc<Pooler>,
    canceller: Canceller,
    /// Rows of `event_sources` by path; forgotten with the session, and when a window finds them changed.
    sources: Mutex<HashMap<String, Source>>,
    broken: AtomicBool,
}

/// A row of `event_sources`.
#[derive(Clone, Debug)]
pub struct Source {
    pub id: i32,
    /// As the row has it.
    pub path: Arc<str>,
}

/// The statements of [`Layout`].
pub struct Prepared {
    pub first: Statement,
    pub next: Statement,
}

impl Session {
    async fn open(settings: &ConnectSettings, pooler: &Arc<Pooler>) -> Result<Session, DeliverError> {
        let ((mut client, notices), canceller) = connect(settings, pooler, open_watched).await?;
        let layout = match find_layout(&client, settings).await? {
            Found::Complete(layout) => layout,
            Found::Missing(_) if settings.auto_migrate => {
                let made = limited(settings, layout::migrate(&mut client, &settings.events_table)).await?;
                info!(tables = made.join(", "), "created what was missing in the database");
                match find_layout(&client, settings).await? {
                    Found::Complete(layout) => layout,
                    Found::Missing(missing) => return Err(missing_tables(&missing)),
                }
            }
            Found::Missing(missing) => return Err(missing_tables(&missing)),
        };
        if settings.notify_channel.is_some() {
            // The server lets go of notifications that nobody is to read any more when it is asked, or when one more fits in: where
            // the queue is full, and whoever held it up has left, it would stay full.
            let asked = async {
                let rows = client.query_typed("SELECT pg_notification_queue_usage()", &[]).await;
                rows.map_err(|error| step_error(&error))
            };
            limited(settings, asked).await?;
        }
        let prepared = if pooler.is_there() {
            None
        } else {
            let preparing = async {
                let first = client.prepare_typed(&layout.first_sql, &Layout::FIRST_TYPES).await?;
                let next = client.prepare_typed(&layout.next_sql, &Layout::NEXT_TYPES).await?;
                Ok(Prepared { first, next })
            };
            let preparing = async { preparing.await.map_err(|error| step_error(&error)) };
            Some(limited(settings, preparing).await.inspect_err(|error| pooler.heed(error))?)
        };
        Ok(Session {
            client,
            notices,
            prepared,
            layout,
            call: OnceCell::new(),
            pooler: pooler.clone(),
            canceller,
            sources: Mutex::default(),
            broken: AtomicBool::new(false),
        })
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn prepared(&self) -> Option<&Prepared> {
        self.prepared.as_ref()
    }

    /// The call that stores a whole window, if this session can have one.
    pub async fn call(&self, limit: Duration) -> Result<Option<&Statement>, DeliverError> {
        if self.prepared.is_none() {
            // Behind a pooler the procedure may be in another session.
            return Ok(None);
        }
        let making = self.call.get_or_init(|| procedure::make(&self.client, &self.layout.procedure_sql));
        match tokio::time::timeout(limit, making).await {
            Ok(call) => Ok(call.as_ref()),
            Err(_) => Err(self.no_answer(limit).await),
        }
    }

    /// Looks whether the server answers.
    pub async fn check(&self, limit: Duration) -> Result<(), DeliverError> {
        match tokio::time::timeout(limit, self.client.simple_query("")).await {
            Ok(answer) => answer.map(|_| ()).map_err(|error| self.failed(step_error(&error))),
            Err(_) => Err(self.no_answer(limit).await),
        }
    }

    /// What a failure means for this session: it is used no more where the failure can lie in the session itself.
    pub fn failed(&self, error: DeliverError) -> DeliverError {
        self.pooler.heed(&error);
        if !session_outlives(&error) {
            self.broken.store(true, Ordering::Relaxed);
        }
        error
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Of the database.
    pub fn encoding(&self) -> &str {
        &self.notices.encoding
    }

    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed) || self.notices.has_wait_ended() || self.client.is_closed()
    }

    /// Uses the connection no more, and asks the server to end what it is still at, so that backends do not pile up.
    pub fn give_up(&self) {
        self.broken.store(true, Ordering::Relaxed);
        tokio::spawn(self.canceller.clone().cancel(self.client.cancel_token()));
    }

    /// [`Session::give_up`] after an answer has not come within `limit`. The error says whether the server was waiting for a
    /// synchronous standby: it answers the request to cancel with a warning then.
    pub async fn no_answer(&self, limit: Duration) -> DeliverError {
        self.give_up();
        match self.notices.wait_ends(CANCEL_TIMEOUT).await {
            true => standby_missing(),
            false => no_answer(limit),
        }
    }

    /// Whether what was committed synchronously on this connection can be relied on: no commit has stopped waiting for
    /// its synchronous standby. Asked once the answer to the commit is there.
    pub fn confirmed(&self) -> Result<(), DeliverError> {
        if self.notices.has_wait_ended() { Err(standby_missing()) } else { Ok(()) }
    }

    /// Breaks the session unless [`FinishGuard::finished`] is called: for futures that may be dropped half-way.
    pub fn broken_unless_finished(&self) -> FinishGuard<'_> {
        FinishGuard { session: self, finished: false }
    }

    /// The sources of all envelopes, by path.
    pub async fn sources<'a>(
        &self,
        host: &str,
        window: &'a [Envelope],
        limit: Duration,
    ) -> Result<HashMap<&'a str, Source>, DeliverError> {
        let mut sources = HashMap::new();
        let mut unknown: Vec<&str> = Vec::new();
        {
            let known = self.known_sources();
            let mut newest = "";
            for path in window.iter().map(|envelope| source_path(envelope.event.origin())) {
                // Most come from where the one before them came from.
                if path == newest || sources.contains_key(path) {
                    continue;
                }
                newest = path;
                match known.get(path) {
                    Some(source) => {
                        sources.insert(path, source.clone());
                    }
                    None if unknown.contains(&path) => {}
                    None => unknown.push(path),
                }
            }
        }
        if unknown.is_empty() {
            return Ok(sources);
        }
        let mut stored: Vec<Cow<'_, str>> = unknown.iter().map(|path| stored_path(path)).collect();
        let ids = match self.ask_sources(host, &stored, limit).await {
            // A database whose encoding has no such letters gets them as escapes.
            Err(error) if error.sqlstate.as_deref().is_some_and(|code| code.starts_with("22")) => {
                stored = stored.iter().map(|path| Cow::Owned(path.escape_default().to_string())).collect();
                self.ask_sources(host, &stored, limit).await?
            }
            answer => answer?,
        };
        let mut known = self.known_sources();
        if known.len() + unknown.len() > SOURCES_KEPT_MAX {
            known.clear();
        }
        for (path, stored) in unknown.into_iter().zip(stored) {
            if let Some(id) = ids.get(&*stored) {
                let source = Source { id: *id, path: stored.into() };
                known.insert(path.to_owned(), source.clone());
                sources.insert(path, source);
            }
        }
        Ok(sources)
    }

    /// The ids that `event_sources` has for these paths, made where they are new.
    async fn ask_sources(
        &self,
        host: &str,
        paths: &[Cow<'_, str>],
        limit: Duration,
    ) -> Result<HashMap<String, i32>, DeliverError> {
        let paths: Vec<&str> = paths.iter().map(|path| &**path).collect();
        let parameters: [(&(dyn ToSql + Sync), Type); 2] = [(&host, Type::TEXT), (&paths, Type::TEXT_ARRAY)];
        let rows = self.ask(&self.layout.sources_sql, &parameters, limit).await?;
        Ok(rows.iter().map(|row| (row.get(1), row.get(0))).collect())
    }

    /// The rows of a query of our own; what its failing means for the session is seen to.
    async fn ask(
        &self,
        sql: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
        limit: Duration,
    ) -> Result<Vec<Row>, DeliverError> {
        match tokio::time::timeout(limit, self.client.query_typed(sql, parameters)).await {
            Ok(rows) => rows.map_err(|error| self.failed(step_error(&error))),
            Err(_) => Err(self.no_answer(limit).await),
        }
    }

    /// Takes back what a call that failed has set.
    pub async fn reset(&self, limit: Duration) -> Result<(), DeliverError> {
        self.ask("RESET synchronous_commit", &[], limit).await.map(drop)
    }

    /// What the window of that time has done, from its start to where it broke.
    pub async fn stored(
        &self,
        window: &[Envelope],
        window_time: MicrosecondsUtc,
        limit: Duration,
    ) -> Result<Vec<Delivered>, DeliverError> {
        let ids: Vec<Uuid> = window.iter().map(|envelope| envelope.event.id().0).collect();
        let parameters: [(&(dyn ToSql + Sync), Type); 2] =
            [(&ids, Type::UUID_ARRAY), (&window_time, Type::TIMESTAMPTZ)];
        let rows = self.ask(&self.layout.stored_sql, &parameters, limit).await?;
        let stored: HashMap<Uuid, bool> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let done = ids.iter().map_while(|id| stored.get(id)).map(|&repeated| match repeated {
            true => Delivered::AlreadyStored,
            false => Delivered::Stored,
        });
        Ok(done.collect())
    }

    fn known_sources(&self) -> std::sync::MutexGuard<'_, HashMap<String, Source>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next window asks for its sources anew.
    pub fn forget_sources(&self) {
        self.known_sources().clear();
    }

    /// Sends a small transaction of our own that writes and commits synchronously. [`Session::proven`] awaits its answer.
    ///
    /// It proves that `last` and everything before it on this connection is durable. `last` is looked for, as behind a
    /// pooler the server may be another one meanwhile.
    pub fn send_barrier<'a>(&'a self, host: &'a str, last: Link) -> Answer<'a, ()> {
        sent(async move {
            let parameters: [(&(dyn ToSql + Sync), Type); 3] =
                [(&host, Type::TEXT), (&last.event_id, Type::UUID), (&last.window_time, Type::TIMESTAMPTZ)];
            let rows = self.client.query_typed(&self.layout.barrier_sql, &parameters).await?;
            Ok(rows.first().map(|_| ()))
        })
    }

    /// Awaits a barrier. Any error means that what came before it may not be durable.
    pub async fn proven(&self, barrier: Answer<'_, ()>, limit: Duration) -> Result<(), DeliverError> {
        let answer = match tokio::time::timeout(limit, barrier).await {
            Ok(answer) => answer.map_err(|error| self.failed(step_error(&error)))?,
            Err(_) => return Err(self.no_answer(limit).await),
        };
        if answer.is_none() {
            self.broken.store(true, Ordering::Relaxed);
            return Err(predecessor_missing());
        }
        self.confirmed()
    }

    /// [`Session::send_barrier`] and [`Session::proven`].
    pub async fn barrier(&self, host: &str, last: Link, limit: Duration) -> Result<(), DeliverError> {
        self.proven(self.send_barrier(host, last), limit).await
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

/// Bytes of a path that fit into the index of `event_sources` together with a host's name.
const PATH_BYTES_MAX: usize = 2048;

/// A path as `event_sources` has it: one that is too long for an index keeps its end, and its hash before that.
fn stored_path(path: &str) -> Cow<'_, str> {
    if path.len() <= PATH_BYTES_MAX {
        return Cow::Borrowed(path);
    }
    let start = (path.len() - PATH_BYTES_MAX..path.len()).find(|at| path.is_char_boundary(*at)).unwrap_or_default();
    let hash = xxhash_rust::xxh3::xxh3_64(path.as_bytes());
    Cow::Owned(format!("{hash:016x}…{}", path.get(start..).unwrap_or_default()))
}

pub struct FinishGuard<'a> {
    session: &'a Session,
    finished: bool,
}

impl FinishGuard<'_> {
    pub fn finished(mut self) {
        self.finished = true;
    }
}

impl Drop for FinishGuard<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.session.broken.store(true, Ordering::Relaxed);
        }
    }
}

/// Creates what is missing in the database. Gives the names of what it made.
pub async fn migrate(settings: &ConnectSettings) -> Result<Vec<String>, DeliverError> {
    let (mut client, _) = connect(settings, &Pooler::default(), open).await?;
    limited(settings, layout::migrate(&mut client, &settings.events_table)).await
}

/// What `check` wants to know of the database.
pub async fn inspect(settings: &ConnectSettings) -> Result<Inspection, DeliverError> {
    let (client, _) = connect(settings, &Pooler::default(), open).await?;
    let (missing, unfit) = match find_layout(&client, settings).await? {
        Found::Complete(layout) => (Vec::new(), limited(settings, layout::try_out(&client, &layout)).await.err()),
        Found::Missing(missing) => (missing, None),
    };
    let table = &settings.events_table;
    let parameters: [(&(dyn ToSql + Sync), Type); 2] = [(&table.quoted(), Type::TEXT), (&table.schema, Type::TEXT)];
    let asked = std::time::Instant::now();
    let facts = async { client.query_typed(INSPECT_SQL, &parameters).await.map_err(|error| step_error(&error)) };
    let facts = limited(settings, facts).await?;
    let Some(row) = facts.first() else { return Err(no_answer(settings.statement_timeout)) };
    // The server looked at its clock somewhere between asking and hearing.
    let theirs = Timestamp::try_from(row.get::<_, std::time::SystemTime>(5)).unwrap_or_else(|_| Timestamp::now());
    let ours = Timestamp::now() - asked.elapsed() / 2;
    Ok(Inspection {
        version: row.get(0),
        version_number: row.get(1),
        missing,
        unfit: unfit.map(|error| error.message),
        lacks: row.get::<_, Vec<String>>(2),
        may_create: row.get(3),
        is_read_only: row.get(4),
        clock_ahead: theirs.duration_since(ours),
        schema_missing: row.get(6),
        may_make_temporary: row.get(7),
        encoding: row.get(8),
    })
}

/// Version, its number, privileges that are lacking, whether tables may be made, whether all is read only, the time,
/// whether the schema that the configuration names is missing, whether a temporary procedure may be made, the encoding.
/// `$1`: the events table, `$2`: its schema or null.
const INSPECT_SQL: &str = "
    SELECT current_setting('server_version'), current_setting('server_version_num')::int,
           ARRAY(SELECT needed.privilege || ' on ' || found.relid::regclass::text
                   FROM (SELECT n.nspname, c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                          WHERE c.oid = to_regclass($1)) AS events
                  CROSS JOIN LATERAL (VALUES
                         (events.oid, 'INSERT'),
                         (to_regclass(quote_ident(events.nspname) || '.event_receipts')::oid, 'INSERT'),
                         (to_regclass(quote_ident(events.nspname) || '.event_receipts')::oid, 'SELECT'),
                         (to_regclass(quote_ident(events.nspname) || '.event_receipts')::oid, 'UPDATE'),
                         (to_regclass(quote_ident(events.nspname) || '.event_sources')::oid, 'INSERT'),
                         (to_regclass(quote_ident(events.nspname) || '.event_sources')::oid, 'SELECT'),
                         (to_regclass(quote_ident(events.nspname) || '.event_sources')::oid, 'UPDATE')
                        ) AS needed(relid, privilege)
                  CROSS JOIN LATERAL (SELECT needed.relid) AS found
                  WHERE found.relid IS NOT NULL AND NOT has_table_privilege(found.relid, needed.privilege)
                 UNION ALL
                 SELECT 'USAGE on ' || counter.name
                   FROM (SELECT n.nspname, c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                          WHERE c.oid = to_regclass($1)) AS events
                  CROSS JOIN LATERAL (VALUES
                         (pg_get_serial_sequence(events.oid::regclass::text, 'id')),
                         (pg_get_serial_sequence(
                            to_regclass(quote_ident(events.nspname) || '.event_sources')::text, 'id'))
                        ) AS counter(name)
                  WHERE counter.name IS NOT NULL AND NOT has_sequence_privilege(counter.name, 'USAGE, UPDATE')),
           COALESCE(has_schema_privilege(COALESCE(
               (SELECT relnamespace FROM pg_class WHERE oid = to_regclass($1)),
               CASE WHEN $2 IS NULL THEN to_regnamespace(current_schema()::text)::oid
                    ELSE to_regnamespace(quote_ident($2))::oid END), 'CREATE'), false),
           current_setting('transaction_read_only') = 'on',
           clock_timestamp(),
           $2 IS NOT NULL AND to_regnamespace(quote_ident($2)) IS NULL,
           has_database_privilege(current_database(), 'TEMP'), current_setting('server_encoding')";

/// The database as `check` finds it.
pub struct Inspection {
    pub version: String,
    /// 150004 is 15.4.
    pub version_number: i32,
    /// Names of tables that are not there.
    pub missing: Vec<String>,
    /// Why events can't be stored in the tables though all are there: a column of another type, say.
    pub unfit: Option<String>,
    /// Privileges that are needed and not there: `INSERT on events`.
    pub lacks: Vec<String>,
    /// Whether the schema that the configuration names is not there.
    pub schema_missing: bool,
    /// Whether missing tables may be created.
    pub may_create: bool,
    /// Whether a session of ours may have a temporary procedure.
    pub may_make_temporary: bool,
    pub is_read_only: bool,
    /// Of the database: `UTF8`.
    pub encoding: String,
    /// How far the server's clock is ahead of ours.
    pub clock_ahead: jiff::SignedDuration,
}

pub async fn find_layout(client: &Client, settings: &ConnectSettings) -> Result<Found, DeliverError> {
    limited(settings, layout::inspect(client, &settings.events_table, settings.notify_channel.as_deref())).await
}

/// Ends a step of opening a session when the server does not answer.
async fn limited<T>(
    settings: &ConnectSettings,
    step: impl Future<Output = Result<T, DeliverError>>,
) -> Result<T, DeliverError> {
    let limit = settings.statement_timeout + Duration::from_secs(1);
    tokio::time::timeout(limit, step).await.unwrap_or_else(|_| Err(no_answer(limit)))
}

/// Opens a connection on which no durable commit is awaited.
pub async fn open(config: tokio_postgres::Config, tls: MakeRustlsConnect) -> Result<Client, tokio_postgres::Error> {
    PostgresConnectionManager::new(config, tls).connect().await
}

/// Opens a connection and watches its notices.
async fn open_watched(
    config: tokio_postgres::Config,
    tls: MakeRustlsConnect,
) -> Result<(Client, Notices), tokio_postgres::Error> {
    let (client, connection) = config.connect(tls).await?;
    Ok((client, Notices::drive(connection)))
}

/// A connection as `open` makes it, and the way to cancel its statements.
pub async fn connect<T>(
    settings: &ConnectSettings,
    pooler: &Pooler,
    open: impl AsyncFn(tokio_postgres::Config, MakeRustlsConnect) -> Result<T, tokio_postgres::Error>,
) -> Result<(T, Canceller), DeliverError> {
    let misconfigured = |message| DeliverError { verdict: Verdict::Operator, sqlstate: None, message };
    let target = (settings.target)().map_err(misconfigured)?.ok_or_else(|| {
        misconfigured("no database is configured; set database.url, DATABASE_URL or PGHOST".to_owned())
    })?;
    let tls = tls(&target).map_err(misconfigured)?;
    let has_tls = tls.is_some();
    let connector = MakeRustlsConnect::new(tls.unwrap_or_else(no_tls));
    let attempt = async |statement_timeout: Option<Duration>| {
        let config = connection_config(&target, has_tls, statement_timeout);
        open(config, connector.clone()).await.map_err(|error| step_error(&error))
    };
    let connecting = async {
        let refuses_options = pooler.refuses_options.load(Ordering::Relaxed);
        let timeout = Some(settings.statement_timeout).filter(|_| !refuses_options);
        match attempt(timeout).await {
            Err(error) if timeout.is_some() && error.message.contains("unsupported startup parameter") => {
                let client = attempt(None).await?;
                if !pooler.refuses_options.swap(true, Ordering::Relaxed) {
                    info!(
                        "there is a pooler that may change the connection below us; going on without prepared \
                         statements, which is slower"
                    );
                }
                Ok(client)
            }
            answer => answer,
        }
    };
    let with_place = |mut error: DeliverError| {
        error.message = format!("{}: {}", target.described, error.message);
        for warning in &target.warnings {
            error.message.push_str("; ");
            error.message.push_str(warning);
        }
        error
    };
    match tokio::time::timeout(target.connect_timeout, connecting).await {
        Ok(Ok(client)) => Ok((client, Canceller::new(connector, &target.hosts))),
        Ok(Err(error)) => Err(with_place(error)),
        Err(_) => Err(with_place(no_answer(target.connect_timeout))),
    }
}

/// With a `statement_timeout` the session has that instead of the role's own, which must not be taken for the server's
/// trouble; and a statement does not wait for a lock for ever.
fn connection_config(
    target: &DatabaseTarget,
    has_tls: bool,
    statement_timeout: Option<Duration>,
) -> tokio_postgres::Config {
    let mut config = tokio_postgres::Config::new();
    for host in &target.hosts {
        match host {
            DatabaseHost::Tcp { name, address, port } => {
                config.host(name).port(*port);
                if let Some(address) = address.or_else(|| name.parse::<IpAddr>().ok()) {
                    config.hostaddr(address);
                }
            }
            DatabaseHost::Unix { folder, port } => {
                config.host_path(folder).port(*port);
            }
        }
    }
    config.user(&target.user).dbname(&target.dbname).application_name(&target.application_name);
    if let Some(password) = &target.password {
        config.password(password.reveal());
    }
    let timeout = statement_timeout.map(|timeout| format!("-c statement_timeout={}", timeout.as_millis()));
    let options: Vec<&str> = target.options.as_deref().into_iter().chain(timeout.as_deref()).collect();
    if !options.is_empty() {
        config.options(options.join(" "));
    }
    config.ssl_mode(match target.ssl.mode {
        _ if !has_tls => tokio_postgres::config::SslMode::Disable,
        SslMode::Disable => tokio_postgres::config::SslMode::Disable,
        SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => tokio_postgres::config::SslMode::Require,
    });
    if target.ssl.direct {
        config.ssl_negotiation(tokio_postgres::config::SslNegotiation::Direct);
    }
    config.channel_binding(match target.channel_binding {
        ChannelBinding::Disable => tokio_postgres::config::ChannelBinding::Disable,
        ChannelBinding::Prefer => tokio_postgres::config::ChannelBinding::Prefer,
        ChannelBinding::Require => tokio_postgres::config::ChannelBinding::Require,
    });
    if target.read_write {
        config.target_session_attrs(tokio_postgres::config::TargetSessionAttrs::ReadWrite);
    }
    // A dead peer must be noticed in seconds.
    config
        .connect_timeout(target.connect_timeout)
        .keepalives(target.keepalive.enabled.unwrap_or(true))
        .keepalives_idle(target.keepalive.idle.unwrap_or(Duration::from_secs(10)))
        .keepalives_interval(target.keepalive.interval.unwrap_or(Duration::from_secs(3)))
        .keepalives_retries(target.keepalive.retries.unwrap_or(3))
        .tcp_user_timeout(target.keepalive.tcp_user_timeout.unwrap_or(Duration::from_secs(10)));
    config
}

pub fn missing_tables(missing: &[String]) -> DeliverError {
    DeliverError {
        verdict: Verdict::Operator,
        sqlstate: None,
        message: format!(
            "missing in the database: {}; run \"headspace-watcher migrate\" or set database.auto_migrate",
            missing.join(", ")
        ),
    }
}

/// The TLS settings that the target asks for; `None` where it wants none, or where there is nothing but sockets.
fn tls(target: &DatabaseTarget) -> Result<Option<ClientConfig>, String> {
    let ssl = &target.ssl;
    let local = target.hosts.iter().all(|host| matches!(host, DatabaseHost::Unix { .. }));
    if local || ssl.mode == SslMode::Disable {
        return Ok(None);
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS can't be set up: {error}"))?;
    let verifier: Arc<dyn ServerCertVerifier> = match ssl.mode {
        SslMode::Disable | SslMode::Prefer | SslMode::Require => Arc::new(AnyCertificate { provider }),
        SslMode::VerifyCa | SslMode::VerifyFull => {
            let roots = Arc::new(roots(ssl.root_cert.as_deref())?);
            let inner = WebPkiServerVerifier::builder_with_provider(roots, provider)
                .build()
                .map_err(|error| format!("the trusted certificates can't be used: {error}"))?;
            match ssl.mode {
                SslMode::VerifyFull => inner,
                _ => Arc::new(AnyName { inner }),
            }
        }
    };
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let config = match &ssl.client {
        None => builder.with_no_client_auth(),
        Some(client) => builder
            .with_client_auth_cert(certificates(&client.cert)?, private_key(&client.key)?)
            .map_err(|error| format!("the client certificate {} can't be used: {error}", client.cert.display()))?,
    };
    Ok(Some(config))
}

/// Never used for a connection: a pool without TLS still wants a connector.
fn no_tls() -> ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring supports TLS 1.3")
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth()
}

/// The roots in `file`, else the system's.
fn roots(file: Option<&Path>) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    match file {
        Some(file) => {
            for certificate in certificates(file)? {
                roots
                    .add(certificate)
                    .map_err(|error| format!("the certificate in {} can't be used: {error}", file.display()))?;
            }
        }
        None => {
            let loaded = rustls_native_certs::load_native_certs();
            if loaded.certs.is_empty() {
                let cause = loaded.errors.first().map(|error| format!(": {error}")).unwrap_or_default();
                return Err(format!("the system has no trusted certificates{cause}; set sslrootcert"));
            }
            let (_, ignored) = roots.add_parsable_certificates(loaded.certs);
            if ignored > 0 {
                warn!(ignored, "some of the system's certificates can't be used");
            }
        }
    }
    Ok(roots)
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let problem = |error: &dyn fmt::Display| format!("could not read certificates from {}: {error}", file.display());
    let bytes = regular_file::read(file, PEM_BYTES_MAX).map_err(|error| problem(&error))?;
    let certificates =
        CertificateDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>().map_err(|error| problem(&error))?;
    if certificates.is_empty() { Err(problem(&"it holds none")) } else { Ok(certificates) }
}

fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let problem = |error: &dyn fmt::Display| format!("could not read the private key {}: {error}", file.display());
    let bytes = regular_file::read(file, PEM_BYTES_MAX).map_err(|error| problem(&error))?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| problem(&error))
}

/// Encryption without proof of who is there: libpq's `prefer` and `require`.
#[derive(Debug)]
struct AnyCertificate {
    provider: Arc<rustls::crypto::CryptoProvider>,
}

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// A certificate from a trusted root, for whatever name: libpq's `verify-ca`.
#[derive(Debug)]
struct AnyName {
    inner: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.inner.verify_server_cert(certificate, intermediates, name, ocsp, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
