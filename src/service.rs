//! The running pipeline: puts the layers together, starts them, and ends them in time.
//!
//! ```text
//! thread "transcripts"   Follower    ─┐
//! thread "spool"         SpoolReader ─┼─► queue (its own writer thread) ─► task Drainer ─► Postgres
//! tasks  HTTP, socket    router      ─┘
//! ```
//!
//! A start that fails leaves everything as it was: it removes a socket only if it has bound it ([`socket`]).
//!
//! The queue is opened on a thread of its own, since recovering a damaged one can take minutes. A stop does not wait for
//! it: opening can be interrupted anywhere, as by a crash, and the next start goes on.
//!
//! Every task is watched ([`tasks`]): one that ends before the service is told to stop ends the process with an error.
//!
//! Stopping takes `shutdown_timeout` at most, whatever hangs: the follower ends after its chunk, the drainer after the
//! answers in flight or [`STOP_GRACE`](crate::sink::drain::STOP_GRACE). Tasks that still run after three fifths of the time
//! are logged and left behind; delivery is idempotent, so nothing is lost. Then the queue is flushed and synced.

pub(crate) mod limits;
mod pulse;
pub(crate) mod socket;
mod systemd;
mod tasks;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::watch;
use tracing::{debug, error, info, warn};

use self::pulse::Pulse;
use self::socket::{BoundSocket, SocketState};
use self::systemd::{Notice, Systemd};
use self::tasks::Tasks;
use crate::agent;
use crate::config::{Config, HttpConfig};
use crate::event::{FailureKind, Timestamp};
use crate::health::{HealthSource, HttpHealth, Moment};
use crate::history::History;
use crate::http::{self, Access, Api, Transport};
use crate::intake::Intake;
use crate::intake::redact::{PatternError, Redactor};
use crate::intake::schema::{SchemaError, Schemas};
use crate::intake::spool::{Spool, UnreadSpool};
use crate::intake::spool_reader::{SpoolHandle, SpoolReader};
use crate::intake::transcripts::{Doorbell, FollowConfig, Follower, Unread};
use crate::private_folder::{self, Ensured, FolderError};
use crate::queue::{Queue, QueueConfig, QueueError};
use crate::sink::Verdict;
use crate::sink::drain::{DrainConfig, Drainer};
use crate::sink::postgres::{ConnectSettings, Needs, PostgresSink, TargetSource};
use crate::telemetry::{Database, DatabaseState, Metrics, RescanCause};

/// How often the counters are summed up in the log while something happens.
const SUMMARY_INTERVAL: Duration = Duration::from_secs(60);

/// How often a look is taken whether everything is read and delivered (`--until-idle`).
const IDLE_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// How often binding the TCP port is tried again.
const BIND_RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// How long a queue that somebody holds is waited for at the start, and how often a look is taken.
const HELD_QUEUE_PATIENCE: Duration = Duration::from_secs(2);
const HELD_QUEUE_INTERVAL: Duration = Duration::from_millis(20);

/// While the queue is being opened systemd is told so often that it takes longer, and each time asked for so much more
/// time.
const OPENING_NOTICE_INTERVAL: Duration = Duration::from_secs(1);
const OPENING_EXTENSION: Duration = Duration::from_secs(30);

/// Why the pipeline could not start or had to end.
#[derive(Debug, Error)]
pub(crate) enum ServiceError {
    #[error(transparent)]
    Schemas(#[from] SchemaError),
    #[error(transparent)]
    Redact(#[from] PatternError),
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error("could not listen on {path}: {problem}")]
    Socket { path: PathBuf, problem: String },
    /// All the rest is delivered.
    #[error("could not read {0}; the log names them: correct their owner or mode, then run again")]
    Unread(UnreadInput),
    #[error("could not start thread {name}: {problem}; raise the limit of processes (ulimit -u, TasksMax)")]
    Thread { name: &'static str, problem: String },
    #[error("{0} ended unexpectedly; this is a fault of the program, please report it")]
    Ended(&'static str),
}

/// Input that could not be read at the end of a run with [`Until::Idle`].
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct UnreadInput {
    pub transcripts: Unread,
    pub spool: UnreadSpool,
}

impl fmt::Display for UnreadInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = |count: usize| if count == 1 { "" } else { "s" };
        let Unread { files, folders } = self.transcripts;
        let spool_files = self.spool.files;
        let parts = [
            (files > 0).then(|| format!("{files} transcript{}", plural(files))),
            (folders > 0).then(|| format!("{folders} folder{} of transcripts", plural(folders))),
            (spool_files > 0).then(|| format!("{spool_files} spool file{}", plural(spool_files))),
            self.spool.is_folder_unread.then(|| "the spool".to_owned()),
        ];
        f.write_str(&parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

/// When the pipeline ends by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Until {
    Stopped,
    /// Everything on disk is read and the queue is empty.
    Idle,
}

/// What it takes to run.
pub(crate) struct Service {
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
    pub(crate) async fn run(self) -> Result<(), ServiceError> {
        let started = Moment::now();
        let config = &self.config;
        let schemas = Schemas::load(config.schemas.path.as_deref(), config.event_system.max_event_bytes)?;
        declare_labels(&self.metrics, &schemas);
        let redactor = Redactor::new(&config.redact)?;
        // Before anything is made: it is bound when the queue is ours.
        socket::inspect(&config.http.socket).await.map_err(|problem| self.socket_error(problem))?;
        secure_folders(config)?;
        let systemd = Systemd::of_process();
        let Some(queue) = self.open_queue(&systemd).await? else {
            systemd.tell(Notice::Stopping);
            info!("stopped while the queue was being opened; the next start goes on with it");
            return Ok(());
        };
        let intake = Arc::new(Intake::new(schemas, queue.clone(), redactor, self.metrics.clone()));
        let spool = Spool::new(&config.queue.spool_path);
        let http_health = watch::Sender::new(None);
        let health = Arc::new(HealthSource {
            queue: queue.clone(),
            spool: spool.clone(),
            metrics: self.metrics.clone(),
            started,
            pending_bytes_max: config.queue.max_pending_bytes,
            polling_interval: config.file_watcher.polling_interval,
            delivery_max: config.database.connect_timeout
                + config.database.statement_timeout
                + config.event_system.write_retry_max_delay,
            http: http_health.subscribe(),
        });
        let history = Arc::new(History::new(&self.metrics, started.time));
        let mut handles = TaskHandles::new(queue);
        let pulse = Pulse { health: health.clone(), history: history.clone(), systemd: systemd.clone() };
        handles.tasks.spawn_server("pulse", pulse.run());
        // Errors are told by the drainer.
        let database = (self.target)().ok().flatten().map(|target| target.without_password);
        let api = Api::new(health, history, intake.clone(), spool.clone(), config.hooks.capture, database);
        let started = tokio::select! {
            started = self.start(&mut handles, api, http_health, intake, spool) => started.map(Some),
            () = self.stopped() => Ok(None),
        };
        let result = match started {
            Ok(None) => Ok(()),
            Ok(Some(input)) => {
                self.log_ready(&handles.queue);
                systemd.tell(Notice::Ready);
                self.wait(&input, &mut handles).await
            }
            Err(error) => Err(error),
        };
        systemd.tell(Notice::Stopping);
        handles.end(config.event_system.shutdown_timeout, result).await
    }

    /// Waits until the caller tells the service to stop.
    async fn stopped(&self) {
        // An error means that the sender is gone, and nobody could stop us any more.
        let _ = self.stop.clone().wait_for(|stopped| *stopped).await;
    }

    fn log_ready(&self, queue: &Queue) {
        let config = &self.config;
        let projects = config.claude.projects_paths.iter().map(|projects| projects.display().to_string());
        info!(pid = std::process::id(), version = env!("CARGO_PKG_VERSION"),
              projects = projects.collect::<Vec<_>>().join(", "), queue = %config.queue.path.display(),
              pending = queue.stats().pending, "ready");
    }

    fn socket_error(&self, problem: String) -> ServiceError {
        ServiceError::Socket { path: self.config.http.socket.clone(), problem }
    }

    /// Opens the queue on a thread of its own. `None`: told to stop before it was open. The thread is left behind then, and
    /// ends with the process: opening survives that as it survives a crash.
    ///
    /// Commands that look into the queue hold it for a moment, and so does a watcher that is ending: they are waited for.
    /// One that listens is not.
    async fn open_queue(&self, systemd: &Systemd) -> Result<Option<Queue>, ServiceError> {
        let config = &self.config;
        debug!(queue = %config.queue.path.display(), "opening the queue");
        let mut is_logged = false;
        let deadline = Instant::now() + HELD_QUEUE_PATIENCE;
        loop {
            let config = config.clone();
            let mut opening = tokio::task::spawn_blocking(move || open_queue(&config));
            let mut notice = tokio::time::interval(OPENING_NOTICE_INTERVAL);
            notice.reset();
            let opened = loop {
                tokio::select! {
                    biased;
                    () = self.stopped() => return Ok(None),
                    opened = &mut opening => break opened.map_err(|_| ServiceError::Ended("opening the queue"))?,
                    _ = notice.tick() => {
                        if !std::mem::replace(&mut is_logged, true) {
                            info!(queue = %self.config.queue.path.display(), "opening the queue takes long: it is being recovered");
                            systemd.tell(Notice::Status("opening the queue: it is being recovered".to_owned()));
                        }
                        systemd.tell(Notice::ExtendTimeout(OPENING_EXTENSION));
                    }
                }
            };
            match opened {
                Err(QueueError::InUse { .. }) if Instant::now() < deadline && !self.is_watched().await => {
                    tokio::select! {
                        () = self.stopped() => return Ok(None),
                        () = tokio::time::sleep(HELD_QUEUE_INTERVAL) => {}
                    }
                }
                opened => return Ok(Some(opened?)),
            }
        }
    }

    /// Whether somebody listens on our socket.
    async fn is_watched(&self) -> bool {
        socket::inspect(&self.config.http.socket).await == Ok(SocketState::Listening)
    }

    /// Starts all tasks and threads.
    async fn start(
        &self,
        handles: &mut TaskHandles,
        api: Api,
        http_health: watch::Sender<Option<HttpHealth>>,
        intake: Arc<Intake>,
        spool: Spool,
    ) -> Result<Input, ServiceError> {
        let config = &self.config;
        let socket = BoundSocket::bind(&config.http.socket).await.map_err(|problem| self.socket_error(problem))?;
        let listener = socket.listener().map_err(|error| self.socket_error(error.to_string()))?;
        handles.socket = Some(socket);
        handles
            .tasks
            .spawn_server("socket", http::serve_socket(listener, http::router(api.clone(), Transport::Socket)));
        if let Some(address) = config.http.listen {
            handles.tasks.spawn_server("http", serve_tcp(address, api, &config.http, http_health));
        }
        if self.has_database {
            handles.tasks.spawn_worker("drainer", self.drainer(intake.queue()).run(handles.stop.subscribe()));
        } else {
            self.metrics.live.database.set(DatabaseState {
                state: Database::Unconfigured,
                since: Timestamp::now(),
                last_error: None,
            });
            warn!("no database is configured; events are kept in the queue. Set database.url, DATABASE_URL or PGHOST");
        }
        let follower = Follower::new(
            FollowConfig {
                folders: agent::folders(config),
                polling_interval: config.file_watcher.polling_interval,
                debounce: config.file_watcher.debounce_interval,
                line_bytes_max: config.file_watcher.max_line_bytes,
                inactivity_timeout: config.file_watcher.inactivity_timeout,
            },
            intake.clone(),
        )?;
        let transcripts = follower.doorbell();
        handles.transcripts = Some(transcripts.clone());
        handles.start_thread("transcripts", move || follower.run())?;
        let (spool_reader, spool) = SpoolReader::new(spool, intake.clone(), config.file_watcher.polling_interval);
        handles.spool = Some(spool.clone());
        handles.start_thread("spool", move || spool_reader.run())?;
        Ok(Input { intake, transcripts, spool })
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
    async fn wait(&self, input: &Input, handles: &mut TaskHandles) -> Result<(), ServiceError> {
        let begun = Instant::now();
        let mut failed = handles.queue.failed();
        let mut idle_check = tokio::time::interval(IDLE_CHECK_INTERVAL);
        let mut summary = tokio::time::interval(SUMMARY_INTERVAL);
        summary.reset();
        let mut summed_up = 0;
        loop {
            tokio::select! {
                // A queue that has failed also ends the tasks that use it.
                biased;
                () = self.stopped() => {
                    info!(pending = handles.queue.stats().pending, "stopping");
                    return Ok(());
                }
                Ok(failure) = failed.wait_for(Option::is_some) => {
                    let error = failure.clone().map_or(ServiceError::Ended("the queue"), ServiceError::Queue);
                    error!(error = %error, "the queue has failed; ending, so that the supervisor starts it again");
                    return Err(error);
                }
                error = handles.tasks.first_end() => return Err(error),
                _ = idle_check.tick(), if self.until == Until::Idle => {
                    if input.is_read() && handles.queue.stats().pending == 0 {
                        self.log_idle(begun);
                        return input.outcome();
                    }
                }
                _ = summary.tick() => self.sum_up(&handles.queue, &mut summed_up),
            }
        }
    }

    /// What a run with [`Until::Idle`] has done.
    fn log_idle(&self, begun: Instant) {
        let metrics = &self.metrics;
        info!(
            delivered = metrics.events_delivered.get(),
            duplicates = metrics.events_duplicate.get(),
            dead_letters = metrics.events_dead_lettered.get(),
            seconds = (begun.elapsed().as_secs_f64() * 10.0).round() / 10.0,
            "everything that could be read is delivered"
        );
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
            database = metrics.live.database.get().state.as_str(),
            "since start"
        );
    }
}

/// Sees to it that nobody else gets into the spool, or can replace what is in the folder of the socket. The queue sees to
/// its own folder.
fn secure_folders(config: &Config) -> Result<(), FolderError> {
    let folder = config.http.socket.parent().unwrap_or(Path::new("/"));
    match private_folder::ensure_unwritable(folder) {
        Ok(None) => {}
        Ok(Some(mode)) => {
            warn!(folder = %folder.display(), mode = format!("{mode:04o}"),
                  "everybody could write in the folder of http.socket; only its owner can now");
        }
        // Listening finds out, and says what to set.
        Err(FolderError::Io { .. } | FolderError::NotAFolder { .. }) => {}
        Err(error) => return Err(error),
    }
    let spool = &config.queue.spool_path;
    match private_folder::ensure(spool) {
        Ok(Ensured::Tightened { mode }) => {
            warn!(folder = %spool.display(), mode = format!("{mode:04o}"),
                  "others had rights to the spool; it has mode 0700 now");
            Ok(())
        }
        Ok(Ensured::Created | Ensured::Private) => Ok(()),
        // Hooks and events find out, as they do when it happens later.
        Err(FolderError::Io { .. } | FolderError::NotAFolder { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// What this machine is called in `event_sources`.
pub(crate) fn host_name(config: &Config) -> String {
    let own = || gethostname::gethostname().to_string_lossy().into_owned();
    config.database.host_name.clone().unwrap_or_else(own)
}

/// How the sink reaches Postgres under this configuration.
pub(crate) fn connect_settings(config: &Config, target: TargetSource) -> ConnectSettings {
    ConnectSettings {
        target,
        pool_size: config.database.pool_size,
        connect_timeout: config.database.connect_timeout,
        statement_timeout: config.database.statement_timeout,
        needs: Needs {
            events: config.database.events_table.clone(),
            ledger_schema: config.database.ledger_schema.clone(),
            notify_channel: config.database.notify_channel.clone(),
        },
        auto_migrate: config.database.auto_migrate,
    }
}

/// Where events come from, as far as [`Until::Idle`] asks.
struct Input {
    intake: Arc<Intake>,
    transcripts: Doorbell,
    spool: SpoolHandle,
}

impl Input {
    /// Whether everything on disk was read that can be. Asked in the order in which an event goes on, so that none is
    /// between two of them.
    fn is_read(&self) -> bool {
        self.spool.is_idle() && !self.intake.has_closings() && self.transcripts.is_idle()
    }

    /// How the run ends once everything is read and delivered.
    fn outcome(&self) -> Result<(), ServiceError> {
        let unread = UnreadInput { transcripts: self.transcripts.unread(), spool: self.spool.unread() };
        if unread != UnreadInput::default() {
            return Err(ServiceError::Unread(unread));
        }
        Ok(())
    }
}

/// What runs, and how each of it is told to end.
struct TaskHandles {
    queue: Queue,
    stop: watch::Sender<bool>,
    tasks: Tasks,
    socket: Option<BoundSocket>,
    transcripts: Option<Doorbell>,
    spool: Option<SpoolHandle>,
}

impl TaskHandles {
    fn new(queue: Queue) -> TaskHandles {
        let (stop, _) = watch::channel(false);
        TaskHandles { queue, stop, tasks: Tasks::default(), socket: None, transcripts: None, spool: None }
    }

    fn start_thread(
        &mut self,
        name: &'static str,
        run: impl FnOnce() -> Result<(), QueueError> + Send + 'static,
    ) -> Result<(), ServiceError> {
        let started = self.tasks.spawn_thread(name, run);
        started.map_err(|error| ServiceError::Thread { name, problem: error.to_string() })
    }

    async fn end(self, timeout: Duration, result: Result<(), ServiceError>) -> Result<(), ServiceError> {
        let begun = Instant::now();
        // Before the listener goes: while it is there nobody else takes the path over.
        drop(self.socket);
        self.stop.send_replace(true);
        if let Some(transcripts) = &self.transcripts {
            transcripts.stop();
        }
        if let Some(spool) = &self.spool {
            spool.stop();
        }
        let (late, ended) = self.tasks.end((begun + timeout * 3 / 5).into()).await;
        if !late.is_empty() {
            warn!(
                tasks = late.join(", "),
                "tasks did not end in time and are left behind; delivery is idempotent, nothing is lost"
            );
        }
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
        let result = result.and(ended).and(closed);
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

fn open_queue(config: &Config) -> Result<Queue, QueueError> {
    let queue_config =
        QueueConfig { path: config.queue.path.clone(), max_pending_bytes: config.queue.max_pending_bytes };
    let (queue, repairs) = Queue::open(&queue_config)?;
    for repair in &repairs {
        if repair.is_loss() {
            error!(queue = %config.queue.path.display(), "{repair}");
        } else {
            warn!(queue = %config.queue.path.display(), "{repair}");
        }
    }
    Ok(queue)
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
) -> impl Future<Output = ()> + Send + use<> {
    let (access, own_health) = http_access(address, config);
    health.send_replace(Some(own_health));
    let router = http::router(api, Transport::Tcp(access));
    async move {
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
                    return http::serve_tcp(listener, router).await;
                }
                Err(error) if !said => {
                    said = true;
                    warn!(%address, error = %error,
                          "can't listen for HTTP, retrying; the commands use the socket and work all the same. Set http.listen to another port or null");
                }
                Err(_) => {}
            }
            tokio::time::sleep(BIND_RETRY_INTERVAL).await;
        }
    }
}
