//! The running pipeline: puts the layers together, starts them, and ends them in time.
//!
//! ```text
//! thread "transcripts"   Follower    ─┐
//! thread "spool"         SpoolReader ─┼─► queue (its own writer thread) ─► task Drainer ─► Postgres
//! tasks  HTTP, socket    router      ─┘
//! ```
//!
//! Stopping takes `shutdown_timeout` at most, whatever hangs: the follower ends after its chunk, the drainer after the
//! answers in flight or 150 ms; who has not ended after three fifths of the time is named once and left behind, which
//! is harmless as every step can be repeated; then the queue is flushed and synced.

mod pulse;
mod systemd;

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::net::UnixListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tracing::{error, info, warn};

use self::pulse::Pulse;
use self::systemd::{Notice, Systemd};
use crate::config::{Config, HttpConfig};
use crate::event::{FailureKind, Timestamp};
use crate::health::{HealthSource, HttpHealth, Moment};
use crate::history::History;
use crate::http::{self, Access, Api, Door};
use crate::intake::Intake;
use crate::intake::redact::{PatternError, Redactor};
use crate::intake::schema::{SchemaError, Schemas};
use crate::intake::spool::Spool;
use crate::intake::spool_reader::{SpoolHandle, SpoolReader};
use crate::intake::transcripts::{AWAKE_MAX, Doorbell, FollowConfig, Follower};
use crate::queue::{Queue, QueueConfig, QueueError, faults};
use crate::sink::Verdict;
use crate::sink::drain::{DrainConfig, Drainer};
use crate::sink::postgres::{ConnectSettings, PostgresSink, TargetSource};
use crate::telemetry::{self, Database, DatabaseState, Metrics, RescanCause};

/// How often the counters are summed up in the log while something happens.
const SUMMARY_INTERVAL: Duration = Duration::from_secs(60);

/// How often a look is taken whether everything is read and delivered (`--until-idle`).
const IDLE_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// How often binding the TCP port is tried again.
const BIND_RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// How long a queue that somebody holds is waited for at the start, and how often a look is taken.
const HELD_QUEUE_PATIENCE: Duration = Duration::from_secs(2);
const HELD_QUEUE_INTERVAL: Duration = Duration::from_millis(20);

/// The threads, as they are called in messages.
const TRANSCRIPTS: &str = "transcripts";
const SPOOL: &str = "spool";

/// Longest path of a Unix socket, on Linux; macOS has 103.
const SOCKET_PATH_BYTES_MAX: usize = if cfg!(target_os = "macos") { 103 } else { 107 };

/// Why the pipeline could not start or had to end.
#[derive(Debug, Error)]
pub enum ServiceError {
    #[error(transparent)]
    Schemas(#[from] SchemaError),
    #[error(transparent)]
    Redact(#[from] PatternError),
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("could not listen on {path}: {problem}")]
    Socket { path: PathBuf, problem: String },
    #[error("no database is configured, so nothing can be drained; set database.url, DATABASE_URL or PGHOST")]
    Unconfigured,
    #[error("{0} ended unexpectedly; this is a fault of the program, please report it")]
    Ended(&'static str),
}

/// When the pipeline ends by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Until {
    Stopped,
    /// Everything on disk is read and the queue is empty.
    Idle,
}

/// What it takes to run.
pub struct Service {
    pub config: Config,
    pub target: TargetSource,
    /// Whether `target` names a database at all.
    pub has_database: bool,
    pub until: Until,
    /// Turns true when the pipeline is to end. Owned by the caller.
    pub stop: watch::Receiver<bool>,
    pub metrics: Arc<Metrics>,
}

impl Service {
    /// Runs until stopped, until idle, or until something fails that only a restart can mend.
    pub async fn run(self) -> Result<(), ServiceError> {
        let started = Moment::now();
        let config = &self.config;
        if self.until == Until::Idle && !self.has_database {
            return Err(ServiceError::Unconfigured);
        }
        let schemas = Schemas::load(config.schemas.path.as_deref(), config.event_system.max_event_bytes)?;
        declare_labels(&self.metrics, &schemas);
        let redactor = Redactor::new(&config.redact)?;
        let queue = self.open_queue().await?;
        let intake = Arc::new(Intake::new(schemas, queue.clone(), redactor, self.metrics.clone()));
        let spool = Spool::new(&config.queue.spool_path);
        let http_health = watch::Sender::new(None);
        let health = Arc::new(HealthSource {
            queue: queue.clone(),
            metrics: self.metrics.clone(),
            started,
            pending_bytes_max: config.queue.max_pending_bytes,
            polling_interval: config.file_watcher.polling_interval,
            delivery_max: config.database.connect_timeout
                + config.database.statement_timeout
                + config.event_system.write_retry_max_delay,
            http: http_health.subscribe(),
        });
        let history = Arc::new(History::default());
        let systemd = Systemd::of_process();
        let pulse = Pulse { health: health.clone(), history: history.clone(), systemd: systemd.clone() };
        let pulse = tokio::spawn(pulse.run());
        let api = Api::new(health, history, intake.clone(), spool.clone(), config.hooks.capture);
        let mut parts =
            Parts { queue: queue.clone(), stop: watch::channel(false).0, tasks: Vec::new(), bell: None, spool: None };
        let started = self.start(&mut parts, api, http_health, intake, spool);
        let result = match started {
            Ok(running) => {
                info!(pid = std::process::id(), version = env!("CARGO_PKG_VERSION"),
                      projects = %config.claude.projects_path.display(), queue = %config.queue.path.display(),
                      pending = queue.stats().pending, "ready");
                systemd.tell(Notice::Ready);
                self.wait(running, &parts).await
            }
            Err(error) => Err(error),
        };
        pulse.abort();
        systemd.tell(Notice::Stopping);
        parts.end(config.event_system.shutdown_timeout, &config.http.socket, result).await
    }

    /// Opens the queue. Commands that look into it hold it for a moment, and so does a watcher that is ending: they are
    /// waited for. One that listens is not.
    async fn open_queue(&self) -> Result<Queue, QueueError> {
        let deadline = Instant::now() + HELD_QUEUE_PATIENCE;
        loop {
            let is_watched = || std::os::unix::net::UnixStream::connect(&self.config.http.socket).is_ok();
            match open_queue(&self.config) {
                Err(QueueError::InUse { .. }) if Instant::now() < deadline && !*self.stop.borrow() && !is_watched() => {
                    tokio::time::sleep(HELD_QUEUE_INTERVAL).await;
                }
                opened => return opened,
            }
        }
    }

    /// Starts the parts.
    fn start(
        &self,
        parts: &mut Parts,
        api: Api,
        http_health: watch::Sender<Option<HttpHealth>>,
        intake: Arc<Intake>,
        spool: Spool,
    ) -> Result<Running, ServiceError> {
        let config = &self.config;
        let socket = bind_socket(&config.http.socket)?;
        parts.tasks.push(("socket", tokio::spawn(http::serve(socket, http::router(api.clone(), Door::Socket)))));
        if let Some(address) = config.http.listen {
            parts.tasks.push(("http", serve_tcp(address, api, &config.http, http_health)));
        }
        let (drained, drainer) = oneshot::channel();
        if self.has_database {
            let task = self.drainer(&api_queue(&intake)).run(parts.stop.subscribe());
            let task = tokio::spawn(async move {
                // The receiver is gone when we are stopping already.
                let _ = drained.send(task.await);
            });
            parts.tasks.push(("drainer", task));
        } else {
            self.metrics.set_database(DatabaseState {
                state: Database::Unconfigured,
                since: Timestamp::now(),
                last_error: None,
            });
            warn!("no database is configured; events are kept in the queue. Set database.url, DATABASE_URL or PGHOST");
            // Keeps the channel open: nothing ends that never began.
            parts.tasks.push((
                "drainer",
                tokio::spawn(async move {
                    let _keep = drained;
                    std::future::pending::<()>().await;
                }),
            ));
        }
        let follower = Follower::new(
            FollowConfig {
                projects: config.claude.projects_path.clone(),
                polling_interval: config.file_watcher.polling_interval,
                debounce: config.file_watcher.debounce_interval,
                line_bytes_max: config.file_watcher.max_line_bytes,
                inactivity_timeout: config.file_watcher.inactivity_timeout,
                awake_max: faults::awake_max(AWAKE_MAX),
            },
            intake.clone(),
        )?;
        let bell = follower.doorbell();
        let idle = bell.idle();
        parts.bell = Some(bell);
        let reader = parts.start_thread(TRANSCRIPTS, move || follower.run())?;
        let (spool_reader, handle) = SpoolReader::new(spool, intake.clone(), config.file_watcher.polling_interval);
        parts.spool = Some(handle.clone());
        let spool_reader = parts.start_thread(SPOOL, move || spool_reader.run())?;
        Ok(Running { drainer, reader, spool_reader, intake, idle, spool: handle })
    }

    fn drainer(&self, queue: &Queue) -> Drainer<PostgresSink> {
        let config = &self.config;
        let sink = PostgresSink::new(connect_settings(config, self.target.clone()), host_name(config));
        let drain = DrainConfig {
            window: config.queue.drain_window,
            attempts_max: config.event_system.write_retry_attempts,
            delay_first: config.event_system.write_retry_delay,
            delay_max: config.event_system.write_retry_max_delay,
        };
        Drainer::new(queue.clone(), sink, drain, self.metrics.clone())
    }

    /// Waits for whatever ends the run.
    async fn wait(&self, running: Running, parts: &Parts) -> Result<(), ServiceError> {
        let Running { mut drainer, mut reader, mut spool_reader, intake, idle, spool } = running;
        let mut stop = self.stop.clone();
        let mut failed = parts.queue.failed();
        let mut idle_check = tokio::time::interval(IDLE_CHECK_INTERVAL);
        let mut summary = tokio::time::interval(SUMMARY_INTERVAL);
        summary.reset();
        let mut summed_up = 0;
        loop {
            tokio::select! {
                // An error means that the sender is gone, and nobody could stop us any more.
                _ = stop.wait_for(|stopped| *stopped) => {
                    info!(pending = parts.queue.stats().pending, "stopping");
                    return Ok(());
                }
                ended = &mut drainer => return Err(ended_early(ended, "the drainer")),
                ended = &mut reader => return Err(ended_early(ended, TRANSCRIPTS)),
                ended = &mut spool_reader => return Err(ended_early(ended, SPOOL)),
                Ok(problem) = changed_to_some(&mut failed) => {
                    error!(error = problem, "the queue can't be written; ending, so that the supervisor starts anew");
                    return parts.queue.append(Default::default()).map(|_| ()).map_err(ServiceError::from);
                }
                _ = idle_check.tick(), if self.until == Until::Idle => {
                    // In the order in which an event goes on, so that none is between two of them.
                    let all_is_read = spool.is_idle() && !intake.has_closings() && *idle.borrow();
                    if all_is_read && parts.queue.stats().pending == 0 {
                        info!("everything is read and delivered");
                        return Ok(());
                    }
                }
                _ = summary.tick() => {
                    telemetry::report_held_back();
                    self.sum_up(&parts.queue, &mut summed_up);
                }
            }
        }
    }

    /// One line a minute while something happens.
    fn sum_up(&self, queue: &Queue, summed_up: &mut u64) {
        let metrics = &self.metrics;
        let happened = metrics.events_captured.get() + metrics.events_delivered.get() + metrics.bad_lines.get();
        if happened == *summed_up {
            return;
        }
        *summed_up = happened;
        let stats = queue.stats();
        info!(
            captured = metrics.events_captured.get(),
            delivered = metrics.events_delivered.get(),
            duplicates = metrics.events_duplicate.get(),
            rejected = metrics.events_rejected.get(),
            bad_lines = metrics.bad_lines.get(),
            pending = stats.pending,
            dead_letters = stats.dead_letters,
            database = metrics.database().state.as_str(),
            "since start"
        );
    }
}

/// What this machine is called in `event_sources`.
pub fn host_name(config: &Config) -> String {
    let own = || gethostname::gethostname().to_string_lossy().into_owned();
    config.database.host_name.clone().unwrap_or_else(own)
}

/// How the sink reaches Postgres under this configuration.
pub fn connect_settings(config: &Config, target: TargetSource) -> ConnectSettings {
    ConnectSettings {
        target,
        pool_size: config.database.pool_size,
        connect_timeout: config.database.connect_timeout,
        statement_timeout: config.database.statement_timeout,
        events_table: config.database.events_table.clone(),
        auto_migrate: config.database.auto_migrate,
        notify_channel: config.database.notify_channel.clone(),
    }
}

async fn changed_to_some(failed: &mut watch::Receiver<Option<String>>) -> Result<String, watch::error::RecvError> {
    failed.wait_for(Option::is_some).await.map(|problem| problem.clone().unwrap_or_default())
}

/// The ends of the parts that are watched.
struct Running {
    drainer: oneshot::Receiver<Result<(), QueueError>>,
    reader: oneshot::Receiver<Result<(), QueueError>>,
    spool_reader: oneshot::Receiver<Result<(), QueueError>>,
    intake: Arc<Intake>,
    idle: watch::Receiver<bool>,
    spool: SpoolHandle,
}

fn ended_early(ended: Result<Result<(), QueueError>, oneshot::error::RecvError>, part: &'static str) -> ServiceError {
    match ended {
        Ok(Err(error)) => ServiceError::Queue(error),
        // It ended though nobody had stopped it, or it panicked.
        Ok(Ok(())) | Err(_) => ServiceError::Ended(part),
    }
}

/// What must be ended.
struct Parts {
    queue: Queue,
    stop: watch::Sender<bool>,
    tasks: Vec<(&'static str, JoinHandle<()>)>,
    bell: Option<Doorbell>,
    spool: Option<SpoolHandle>,
}

impl Parts {
    /// Starts a thread of this name; the receiver tells how it ended.
    fn start_thread(
        &mut self,
        name: &'static str,
        run: impl FnOnce() -> Result<(), QueueError> + Send + 'static,
    ) -> Result<oneshot::Receiver<Result<(), QueueError>>, ServiceError> {
        let (sender, result) = oneshot::channel();
        let (ended, end) = oneshot::channel();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let result = run();
                // The receivers are gone when we are stopping already.
                let _ = sender.send(result);
                let _ = ended.send(());
            })
            .map_err(|_| ServiceError::Ended(name))?;
        self.tasks.push((
            name,
            tokio::spawn(async move {
                let _ = end.await;
            }),
        ));
        Ok(result)
    }

    async fn end(self, timeout: Duration, socket: &Path, result: Result<(), ServiceError>) -> Result<(), ServiceError> {
        let begun = Instant::now();
        self.stop.send_replace(true);
        if let Some(bell) = &self.bell {
            bell.stop();
        }
        if let Some(spool) = &self.spool {
            spool.stop();
        }
        let mut late = Vec::new();
        for (name, mut task) in self.tasks {
            if matches!(name, "socket" | "http") {
                task.abort();
                continue;
            }
            let left = (timeout * 3 / 5).saturating_sub(begun.elapsed());
            if tokio::time::timeout(left, &mut task).await.is_err() {
                task.abort();
                late.push(name);
            }
        }
        if !late.is_empty() {
            warn!(parts = late.join(", "), "did not end in time and are left behind; nothing is lost by that");
        }
        let _ = std::fs::remove_file(socket);
        let pending = self.queue.stats().pending;
        let queue = self.queue;
        let closing = tokio::task::spawn_blocking(move || queue.close());
        let left = timeout.saturating_sub(begun.elapsed()).max(timeout / 10);
        let closed = match tokio::time::timeout(left, closing).await {
            Ok(Ok(closed)) => closed.map_err(ServiceError::from),
            Ok(Err(_)) => Err(ServiceError::Ended("the queue")),
            Err(_) => {
                warn!("the queue could not be closed in time; what was accepted is durable all the same");
                Ok(())
            }
        };
        telemetry::report_held_back();
        let result = result.and(closed);
        if result.is_ok() {
            info!(pending, stop_milliseconds = begun.elapsed().as_millis() as u64, "stopped");
        }
        result
    }
}

/// Shows from the start what can be counted: a rate needs a number to start from.
fn declare_labels(metrics: &Metrics, schemas: &Schemas) {
    for event_type in schemas.types() {
        for family in [&metrics.events_captured, &metrics.events_rejected, &metrics.events_delivered] {
            family.declare(event_type.as_str());
        }
    }
    for reason in [FailureKind::Unreadable, FailureKind::Invalid, FailureKind::TooLarge, FailureKind::Refused] {
        metrics.events_dead_lettered.declare(reason.as_str());
    }
    for verdict in [Verdict::Again, Verdict::Operator, Verdict::Event] {
        metrics.write_failures.declare(verdict.as_str());
    }
    for cause in RescanCause::ALL {
        metrics.rescans.declare(cause.as_str());
    }
}

fn api_queue(intake: &Intake) -> Queue {
    intake.queue().clone()
}

fn open_queue(config: &Config) -> Result<Queue, QueueError> {
    let queue_config =
        QueueConfig { path: config.queue.path.clone(), max_pending_bytes: config.queue.max_pending_bytes };
    let (queue, recovery) = Queue::open(&queue_config)?;
    for repair in &recovery.repairs {
        if repair.is_loss() {
            error!(queue = %config.queue.path.display(), "{repair}");
        } else {
            warn!(queue = %config.queue.path.display(), "{repair}");
        }
    }
    Ok(queue)
}

/// Binds the socket for the commands. Whoever holds the queue owns the socket: one that is left over is removed.
fn bind_socket(path: &Path) -> Result<UnixListener, ServiceError> {
    let failed = |problem: String| ServiceError::Socket { path: path.to_owned(), problem };
    if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        return Err(failed(format!(
            "the path is longer than {SOCKET_PATH_BYTES_MAX} bytes; set http.socket to a shorter one"
        )));
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|error| failed(format!("{error}; set http.socket to another path")))?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(failed("another process listens there; set http.socket to another path".to_owned()));
    }
    let _ = std::fs::remove_file(path);
    // The process's umask makes it private from birth; this also covers a socket folder with default ACLs.
    let listener = UnixListener::bind(path).map_err(|error| failed(error.to_string()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .map_err(|error| failed(error.to_string()))?;
    Ok(listener)
}

/// The token for TCP; where none is configured, the generated one. What captures must not fail for want of a token:
/// without one, nobody is let in by it.
fn http_access(address: SocketAddr, config: &HttpConfig) -> (Access, HttpHealth) {
    let mut health = HttpHealth { address: address.to_string(), listening: false, token_file: None, token_error: None };
    let token = config.token.clone().or_else(|| {
        let file = config.token_file();
        match http::token::load_or_create(&file) {
            Ok(token) => {
                health.token_file = Some(file.display().to_string());
                Some(token)
            }
            Err(error) => {
                warn!(error = %error, "the HTTP token can't be used; over TCP only health, metrics and the page are served");
                health.token_error = Some(error.to_string());
                None
            }
        }
    });
    (Access { token }, health)
}

/// Serves on TCP, trying again where the port is taken: what captures must not fail for want of a port.
fn serve_tcp(
    address: SocketAddr,
    api: Api,
    config: &HttpConfig,
    health: watch::Sender<Option<HttpHealth>>,
) -> JoinHandle<()> {
    let (access, own_health) = http_access(address, config);
    health.send_replace(Some(own_health));
    let router = http::router(api, Door::Tcp(access));
    tokio::spawn(async move {
        let mut said = false;
        loop {
            match http::listen(address) {
                Ok(listener) => {
                    if said {
                        info!(%address, "the HTTP port is free now");
                    }
                    health.send_modify(|health| {
                        if let (Some(health), Ok(address)) = (health, listener.local_addr()) {
                            *health = HttpHealth { address: address.to_string(), listening: true, ..health.clone() };
                        }
                    });
                    return http::serve(listener, router).await;
                }
                Err(error) if !said => {
                    said = true;
                    warn!(%address, error = %error,
                          "can't listen for HTTP, trying on; the commands use the socket. Set http.listen to another port or null");
                }
                Err(_) => {}
            }
            tokio::time::sleep(BIND_RETRY_INTERVAL).await;
        }
    })
}
