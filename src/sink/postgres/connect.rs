//! Connections: where Postgres is, and the pool.
//!
//! Where Postgres is and the password are looked up anew for each attempt, so that a mended password file needs no
//! restart. bb8 answers a failed attempt only with its own time-out; [`Connections::get`] listens to its error sink
//! and answers with the cause at once.
//!
//! Poolers: PgBouncer refuses the startup option by which a session sets its `statement_timeout`; connections are then opened
//! without it.

use std::net::IpAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bb8::{ErrorSink, ManageConnection, Pool, PooledConnection, RunError};
use bb8_postgres::PostgresConnectionManager;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_postgres::Client;
use tokio_postgres_rustls::MakeRustlsConnect;
use tracing::info;

use super::cancel::Canceller;
use super::layout::{Facts, Needs};
use super::notices::Notices;
use super::session::Session;
use super::tls::{no_tls, tls};
use super::verdict::step_error;
use super::{no_answer, schema};
use crate::config::{ChannelBinding, DatabaseHost, DatabaseTarget, SslMode};
use crate::sink::{DeliverError, Verdict};

/// Says where Postgres is, each time it is asked. `Ok(None)`: nothing is configured. The error is for people.
pub type TargetSource = Arc<dyn Fn() -> Result<Option<DatabaseTarget>, String> + Send + Sync>;

/// How long a session may take to be opened. Each step has its own limit, and tells the cause when that is over; this one is for the
/// pool, which would tell none.
const OPENING_MAX: Duration = Duration::from_secs(900);

#[derive(Clone)]
pub struct ConnectSettings {
    pub target: TargetSource,
    pub pool_size: u32,
    /// For one attempt to open a connection.
    pub connect_timeout: Duration,
    pub statement_timeout: Duration,
    pub needs: Needs,
    /// Create what is missing when a connection is opened.
    pub auto_migrate: bool,
}

/// A session on loan from the pool.
pub type PooledSession = PooledConnection<'static, Manager>;

/// The pool.
pub struct Connections {
    pool: Pool<Manager>,
    errors: Arc<Errors>,
}

impl Connections {
    pub fn new(settings: ConnectSettings) -> Self {
        let errors = Arc::new(Errors::default());
        let pool = Pool::builder()
            .max_size(settings.pool_size)
            .min_idle(None)
            .test_on_check_out(false)
            .retry_connection(false)
            .idle_timeout(None)
            .max_lifetime(None)
            .connection_timeout(OPENING_MAX)
            .error_sink(Box::new(Sunk(errors.clone())))
            .build_unchecked(Manager { settings, pooler: Arc::default() });
        Connections { pool, errors }
    }

    /// A session that is ready, or why there is none.
    pub async fn get(&self) -> Result<PooledSession, DeliverError> {
        self.errors.clear();
        // Receipts of an earlier version are copied, say.
        let getting = async {
            tokio::select! {
                pooled = self.pool.get_owned() => pooled.map_err(|error| match error {
                    RunError::User(error) => error,
                    RunError::TimedOut => no_answer(OPENING_MAX),
                }),
                error = self.errors.next() => Err(error),
            }
        };
        within(OPENING_MAX, getting).await.unwrap_or_else(|| Err(no_answer(OPENING_MAX)))
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
}

impl ManageConnection for Manager {
    type Connection = Session;
    type Error = DeliverError;

    async fn connect(&self) -> Result<Session, DeliverError> {
        Session::open(&self.settings, &self.pooler).await
    }

    async fn is_valid(&self, session: &mut Session) -> Result<(), DeliverError> {
        session.check(self.settings.statement_timeout).await
    }

    fn has_broken(&self, session: &mut Session) -> bool {
        session.is_broken()
    }
}

/// Creates what is missing in the database, and removes routines that are not of this version and configuration. Gives the names of
/// what it created, and of what it removed.
pub async fn migrate(settings: &ConnectSettings) -> Result<(Vec<String>, Vec<String>), DeliverError> {
    let (mut client, _) = connect(settings, &Pooler::default(), open).await?;
    schema::migrate(&mut client, &settings.needs, true).await
}

/// The SQL of [`migrate`] for people to read and run: for the database of `settings`, else for an empty one.
pub async fn printable_sql(needs: &Needs, settings: Option<&ConnectSettings>) -> Result<String, DeliverError> {
    let Some(settings) = settings else { return schema::printable_sql(needs, &Facts::none(needs), None) };
    let (client, _) = connect(settings, &Pooler::default(), open).await?;
    let facts = limited(settings, Facts::find(&client, needs)).await?;
    let user = (settings.target)().ok().flatten().map(|target| target.user);
    schema::printable_sql(needs, &facts, user.as_deref())
}

/// What comes within a time, looked for once a second: whoever waits sees that it is no hang.
pub async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    let (mut work, deadline) = (pin!(work), Instant::now() + limit);
    loop {
        tokio::select! {
            answer = &mut work => return Some(answer),
            () = tokio::time::sleep_until(deadline) => return None,
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
    }
}

/// Ends a step of opening a session when the server does not answer.
pub async fn limited<T>(
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
pub async fn open_watched(
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
                    info!("there is a pooler that takes no startup options: the server's own statement_timeout holds");
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

pub fn missing_error(missing: &[String]) -> DeliverError {
    DeliverError {
        verdict: Verdict::Operator,
        sqlstate: None,
        message: format!(
            "missing in the database: {}; run \"headspace-watcher migrate\" or set database.auto_migrate",
            missing.join(", ")
        ),
    }
}
