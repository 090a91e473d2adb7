//! Connections: where Postgres is, TLS, the pool, and a session that is ready for deliveries.
//!
//! Where Postgres is and the password are looked up anew for each attempt, so that a mended password file needs no
//! restart. bb8 answers a failed attempt only with its own time-out; [`Connections::get`] listens to its error sink
//! and answers with the cause at once.

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
use tokio::sync::Notify;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Statement};
use tokio_postgres_rustls::MakeRustlsConnect;
use tracing::{info, warn};

use super::layout::{Found, Layout};
use super::verdict::deliver_error;
use super::{layout, no_answer, source_path};
use crate::config::{ChannelBinding, DatabaseHost, DatabaseTarget, Ssl, SslMode, TableName};
use crate::event::Envelope;
use crate::sink::{DeliverError, Verdict};

/// Says where Postgres is, each time it is asked. `Ok(None)`: nothing is configured. The error is for people.
pub type TargetSource = Arc<dyn Fn() -> Result<Option<DatabaseTarget>, String> + Send + Sync>;

/// Ids of `event_sources` that a session remembers.
const SOURCES_KEPT_MAX: usize = 16_384;

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
            .build_unchecked(Manager { settings });
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
}

impl ManageConnection for Manager {
    type Connection = Session;
    type Error = DeliverError;

    async fn connect(&self) -> Result<Session, DeliverError> {
        Session::open(&self.settings).await
    }

    async fn is_valid(&self, session: &mut Session) -> Result<(), DeliverError> {
        session.client.simple_query("").await.map(|_| ()).map_err(|error| deliver_error(&error))
    }

    fn has_broken(&self, session: &mut Session) -> bool {
        session.is_broken()
    }
}

/// A connection on which deliveries can be made.
pub struct Session {
    client: Client,
    deliver: Statement,
    layout: Layout,
    /// Ids of `event_sources` by path; forgotten with the session, as the tables may be made anew.
    sources: Mutex<HashMap<String, i32>>,
    broken: AtomicBool,
}

impl Session {
    async fn open(settings: &ConnectSettings) -> Result<Session, DeliverError> {
        let mut client = connect(settings).await?;
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
        let prepare = async {
            client.prepare_typed(&layout.deliver_sql, &Layout::DELIVER_TYPES).await.map_err(|e| deliver_error(&e))
        };
        let deliver = limited(settings, prepare).await?;
        Ok(Session { client, deliver, layout, sources: Mutex::default(), broken: AtomicBool::new(false) })
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    pub fn deliver_statement(&self) -> &Statement {
        &self.deliver
    }

    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed) || self.client.is_closed()
    }

    /// Uses the connection no more, and asks the server to end what it is still at, so that backends do not pile up.
    pub fn give_up(&self) {
        self.broken.store(true, Ordering::Relaxed);
        let token = self.client.cancel_token();
        tokio::spawn(async move {
            // Without TLS the request holds no secret but the key of a session that is over. If it does not get
            // through, the server's own statement_timeout ends the statement.
            let _ = tokio::time::timeout(Duration::from_secs(1), token.cancel_query(tokio_postgres::NoTls)).await;
        });
    }

    /// Breaks the session unless [`FinishGuard::finished`] is called: for futures that may be dropped half-way.
    pub fn broken_unless_finished(&self) -> FinishGuard<'_> {
        FinishGuard { session: self, finished: false }
    }

    /// The ids of the sources of all envelopes, by path.
    pub async fn source_ids<'a>(
        &self,
        host: &str,
        window: &'a [Envelope],
        limit: Duration,
    ) -> Result<HashMap<&'a str, i32>, DeliverError> {
        let mut ids = HashMap::new();
        let mut unknown: Vec<&str> = Vec::new();
        {
            let known = self.known_sources();
            for envelope in window {
                let path = source_path(envelope.event.origin());
                match known.get(path) {
                    Some(id) => {
                        ids.insert(path, *id);
                    }
                    None if unknown.contains(&path) => {}
                    None => unknown.push(path),
                }
            }
        }
        if unknown.is_empty() {
            return Ok(ids);
        }
        let parameters: [(&(dyn ToSql + Sync), Type); 2] = [(&host, Type::TEXT), (&unknown, Type::TEXT_ARRAY)];
        let query = self.client.query_typed(&self.layout.sources_sql, &parameters);
        let rows = match tokio::time::timeout(limit, query).await {
            Ok(rows) => rows.map_err(|error| deliver_error(&error))?,
            Err(_) => {
                self.give_up();
                return Err(no_answer(limit));
            }
        };
        let mut known = self.known_sources();
        if known.len() + rows.len() > SOURCES_KEPT_MAX {
            known.clear();
        }
        for row in rows {
            let (id, path): (i32, String) = (row.get(0), row.get(1));
            if let Some(asked) = unknown.iter().find(|asked| **asked == path) {
                ids.insert(asked, id);
            }
            known.insert(path, id);
        }
        Ok(ids)
    }

    fn known_sources(&self) -> std::sync::MutexGuard<'_, HashMap<String, i32>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A small transaction of our own that writes and commits synchronously: what came before it on this connection is
    /// durable when it has answered.
    pub async fn barrier(&self, source_id: i32, limit: Duration) -> Result<(), DeliverError> {
        let parameters: [(&(dyn ToSql + Sync), Type); 1] = [(&source_id, Type::INT4)];
        let query = self.client.query_typed(&self.layout.barrier_sql, &parameters);
        match tokio::time::timeout(limit, query).await {
            Ok(Ok(rows)) if rows.len() == 1 => Ok(()),
            Ok(Ok(_)) => {
                self.broken.store(true, Ordering::Relaxed);
                Err(DeliverError {
                    verdict: Verdict::Again,
                    sqlstate: None,
                    message: format!("row {source_id} of event_sources is gone; nothing could be made durable"),
                })
            }
            Ok(Err(error)) => Err(deliver_error(&error)),
            Err(_) => {
                self.give_up();
                Err(no_answer(limit))
            }
        }
    }
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
    let mut client = connect(settings).await?;
    limited(settings, layout::migrate(&mut client, &settings.events_table)).await
}

/// What `check` wants to know of the database.
pub async fn inspect(settings: &ConnectSettings) -> Result<Inspection, DeliverError> {
    let client = connect(settings).await?;
    let version = async { client.query_one("SHOW server_version", &[]).await.map_err(|error| deliver_error(&error)) };
    let version: String = limited(settings, version).await?.get(0);
    let missing = match find_layout(&client, settings).await? {
        Found::Complete(_) => Vec::new(),
        Found::Missing(missing) => missing,
    };
    Ok(Inspection { version, missing })
}

pub struct Inspection {
    pub version: String,
    /// Names of tables that are not there.
    pub missing: Vec<String>,
}

async fn find_layout(client: &Client, settings: &ConnectSettings) -> Result<Found, DeliverError> {
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

async fn connect(settings: &ConnectSettings) -> Result<Client, DeliverError> {
    let misconfigured = |message| DeliverError { verdict: Verdict::Operator, sqlstate: None, message };
    let target = (settings.target)().map_err(misconfigured)?.ok_or_else(|| {
        misconfigured("no database is configured; set database.url, DATABASE_URL or PGHOST".to_owned())
    })?;
    let tls = tls(&target.ssl).map_err(misconfigured)?;
    let config = connection_config(&target, tls.is_some());
    let limit = target.connect_timeout.min(settings.connect_timeout.max(Duration::from_millis(1)));
    let manager = PostgresConnectionManager::new(config, MakeRustlsConnect::new(tls.unwrap_or_else(no_tls)));
    let connecting = async {
        let client = manager.connect().await.map_err(|error| deliver_error(&error))?;
        // A role's own statement_timeout must not be taken for the event's fault, and a statement must not wait for a
        // lock for ever.
        let limit = settings.statement_timeout.as_millis();
        client
            .batch_execute(&format!("SET statement_timeout = {limit}"))
            .await
            .map_err(|error| deliver_error(&error))?;
        Ok(client)
    };
    let with_place = |mut error: DeliverError| {
        error.message = format!("{}: {}", target.described, error.message);
        for warning in &target.warnings {
            error.message.push_str("; ");
            error.message.push_str(warning);
        }
        error
    };
    match tokio::time::timeout(limit, connecting).await {
        Ok(connected) => connected.map_err(with_place),
        Err(_) => Err(with_place(no_answer(limit))),
    }
}

fn connection_config(target: &DatabaseTarget, has_tls: bool) -> tokio_postgres::Config {
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
    if let Some(options) = &target.options {
        config.options(options);
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

fn missing_tables(missing: &[String]) -> DeliverError {
    DeliverError {
        verdict: Verdict::Operator,
        sqlstate: None,
        message: format!(
            "missing in the database: {}; run \"headspace-watcher migrate\" or set database.auto_migrate",
            missing.join(", ")
        ),
    }
}

/// The TLS settings that `ssl` asks for; `None` where it wants none.
fn tls(ssl: &Ssl) -> Result<Option<ClientConfig>, String> {
    if ssl.mode == SslMode::Disable {
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
    let certificates = CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| problem(&error))?;
    if certificates.is_empty() { Err(problem(&"it holds none")) } else { Ok(certificates) }
}

fn private_key(file: &Path) -> Result<PrivateKeyDer<'static>, String> {
    PrivateKeyDer::from_pem_file(file)
        .map_err(|error| format!("could not read the private key {}: {error}", file.display()))
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
