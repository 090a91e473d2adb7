//! Opens connections. Where Postgres is and the password are looked up for each attempt, so that a corrected password file
//! needs no restart.
//!
//! Poolers: PgBouncer refuses the startup option by which a session sets its `statement_timeout`; connections are then opened
//! without it.

use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bb8::ManageConnection;
use bb8_postgres::PostgresConnectionManager;
use tokio::time::Instant;
use tokio_postgres::Client;
use tokio_postgres_rustls::MakeRustlsConnect;
use tracing::info;

use super::cancel::Canceller;
use super::layout::{Facts, Needs};
use super::notices::Notices;
use super::tls::{no_tls, tls};
use super::verdict::{no_answer, step_error};
use crate::config::{DatabaseHost, DatabaseTarget, NO_DATABASE, SslMode};
use crate::sink::{DeliverError, Verdict};

/// Says where Postgres is, each time it is asked. `Ok(None)`: nothing is configured. The error is for people.
pub type TargetSource = Arc<dyn Fn() -> Result<Option<DatabaseTarget>, String> + Send + Sync>;

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

/// What is known of a pooler between us and the server.
#[derive(Default, Debug)]
pub(super) struct Pooler {
    /// It takes no startup options, so it is there.
    refuses_options: AtomicBool,
}

/// What comes within a time, looked for once a second: whoever waits sees that it is no hang.
pub(super) async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
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
pub(super) async fn limited<T>(
    settings: &ConnectSettings,
    step: impl Future<Output = Result<T, DeliverError>>,
) -> Result<T, DeliverError> {
    let limit = settings.statement_timeout + Duration::from_secs(1);
    tokio::time::timeout(limit, step).await.unwrap_or_else(|_| Err(no_answer(limit)))
}

/// Opens a connection on which no durable commit is awaited.
pub(super) async fn open(
    config: tokio_postgres::Config,
    tls: MakeRustlsConnect,
) -> Result<Client, tokio_postgres::Error> {
    PostgresConnectionManager::new(config, tls).connect().await
}

/// Opens a connection and watches its notices.
pub(super) async fn open_watched(
    config: tokio_postgres::Config,
    tls: MakeRustlsConnect,
) -> Result<(Client, Notices), tokio_postgres::Error> {
    let (client, connection) = config.connect(tls).await?;
    Ok((client, Notices::drive(connection)))
}

/// Opens a connection for questions, and looks what stands in the database.
pub(super) async fn connect_and_look(settings: &ConnectSettings) -> Result<(Client, Facts), DeliverError> {
    let (client, _) = connect(settings, &Pooler::default(), open).await?;
    let facts = limited(settings, Facts::find(&client, &settings.needs)).await?;
    Ok((client, facts))
}

/// A connection as `open` makes it, and the way to cancel its statements.
pub(super) async fn connect<T>(
    settings: &ConnectSettings,
    pooler: &Pooler,
    open: impl AsyncFn(tokio_postgres::Config, MakeRustlsConnect) -> Result<T, tokio_postgres::Error>,
) -> Result<(T, Canceller), DeliverError> {
    let misconfigured = |message| DeliverError { verdict: Verdict::Operator, sqlstate: None, message };
    let target = (settings.target)().map_err(misconfigured)?;
    let target = target.ok_or_else(|| misconfigured(NO_DATABASE.to_owned()))?;
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
    let mut config = target.client.clone();
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
    let timeout = statement_timeout.map(|timeout| format!("-c statement_timeout={}", timeout.as_millis()));
    let options: Vec<&str> = target.client.get_options().into_iter().chain(timeout.as_deref()).collect();
    if !options.is_empty() {
        config.options(options.join(" "));
    }
    config.ssl_mode(match target.ssl.mode {
        _ if !has_tls => tokio_postgres::config::SslMode::Disable,
        SslMode::Disable => tokio_postgres::config::SslMode::Disable,
        SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => tokio_postgres::config::SslMode::Require,
    });
    config
}
