//! `run`: capture and drain until told to stop.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use crate::service::{Service, Until};
use crate::telemetry::Metrics;
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{info, warn};

use super::{Context, Exit, Failure, database};

/// How long threads that hang in a system call are waited for at the very end.
const RUNTIME_SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(50);

/// Between two looks at the progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// Open files that are asked for: transcripts, connections and the queue, with room to spare.
const FILES_WANTED: u64 = 8192;

/// Capture events and drain them into Postgres until told to stop
#[derive(Args)]
#[command(after_help = "Example:\n  headspace-watcher run --until-idle   # back-fill what is there, then end")]
pub(super) struct RunArguments {
    /// Read all that is there, drain the queue empty, then end; exit code 1 when something could not be read
    #[arg(long)]
    until_idle: bool,
}

pub(super) fn run(context: Context, arguments: &RunArguments) -> Result<Exit, Failure> {
    tame_allocator();
    let progress = ProgressBar::hidden();
    context.start_logging(&progress);
    if !context.loaded.unused.is_empty() {
        warn!(unused = context.loaded.unused.join(", "), "the configuration has sections or keys of another program");
    }
    for misspelt in &context.loaded.misspelt_variables {
        warn!(hint = misspelt, "an environment variable may be misspelt");
    }
    allow_files();
    let (target, has_database) = database::of_watcher(&context)?;
    if arguments.until_idle && !has_database {
        return Err(database::none(&context));
    }
    let until = if arguments.until_idle { Until::Idle } else { Until::Stopped };
    // Built by hand: dropping a runtime waits for ever on a thread that hangs.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Internal, format!("could not start the runtime: {error}")))?;
    let metrics = Arc::new(Metrics::default());
    let result = runtime.block_on(async {
        let stop = stop_on_signals()?;
        if until == Until::Idle && std::io::stderr().is_terminal() {
            tokio::spawn(show_progress(progress.clone(), metrics.clone()));
        }
        let config = context.loaded.config.clone();
        let result = Service { config, target, has_database, until, stop, metrics }.run().await;
        progress.finish_and_clear();
        result.map_err(Failure::from)
    });
    runtime.shutdown_timeout(RUNTIME_SHUTDOWN_TIMEOUT);
    result.map(|()| Exit::Fine)
}

/// What glibc's allocator is told: two arenas for all threads, and large blocks given back when they are free.
///
/// By itself it makes an arena for each thread that allocates while another does, keeps what was freed in each of them,
/// and after the first large line takes larger and larger ones out of them: resident memory grew by 6 MB a minute under
/// lines of up to 1 MB, and did not come back. With a single one the thread that reads and the thread that writes the
/// queue wait for each other: capturing a million turns took half as long again, and no less memory.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const ALLOCATOR_SETTINGS: [(&str, &str); 3] =
    [("MALLOC_ARENA_MAX", "2"), ("MALLOC_MMAP_THRESHOLD_", "131072"), ("MALLOC_TRIM_THRESHOLD_", "131072")];

/// Starts the program anew, in the same process, with [`ALLOCATOR_SETTINGS`]: glibc reads them only then. Who has set one
/// of them is left alone. Where it can't be done nothing is lost but memory.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn tame_allocator() {
    use std::os::unix::process::CommandExt;
    if ALLOCATOR_SETTINGS.iter().any(|(name, _)| std::env::var_os(name).is_some()) {
        return;
    }
    let Ok(program) = std::env::current_exe() else { return };
    let mut arguments = std::env::args_os();
    let mut command = std::process::Command::new(program);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    // Only returns where it has failed.
    let _ = command.args(arguments).envs(ALLOCATOR_SETTINGS).exec();
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn tame_allocator() {}

/// Raises our own limit of open files as far as the system lets us; some start programs with 256.
fn allow_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(FILES_WANTED, |maximum| maximum.min(FILES_WANTED));
    if limit.current.is_some_and(|current| current < wanted)
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum })
    {
        warn!(error = %error, "the limit of open files could not be raised");
    }
}

/// Turns true at the first SIGTERM or SIGINT; the second ends the process at once.
fn stop_on_signals() -> Result<watch::Receiver<bool>, Failure> {
    let problem = |error| Failure::new(Exit::Internal, format!("could not listen for signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(problem)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(problem)?;
    // Without a terminal to lose and without a file to read anew, SIGHUP means nothing to us.
    let mut hang_up = signal(SignalKind::hangup()).map_err(problem)?;
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        let mut signals = 0;
        loop {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
                _ = hang_up.recv() => continue,
            };
            signals += 1;
            if signals > 1 {
                // As a process that the signal itself had ended.
                std::process::exit(if name == "SIGTERM" { 143 } else { 130 });
            }
            info!(signal = name, "told to stop");
            sender.send_replace(true);
        }
    });
    Ok(receiver)
}

/// Shows what was captured and what of it has left the queue, once there is something to show.
async fn show_progress(bar: ProgressBar, metrics: Arc<Metrics>) {
    let style = ProgressStyle::with_template("{elapsed_precise} {bar:32} {pos}/{len} events {per_sec} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    loop {
        tokio::time::sleep(PROGRESS_INTERVAL).await;
        if bar.is_finished() {
            return;
        }
        let left = metrics.events_delivered.get()
            + metrics.events_duplicate.get()
            + metrics.events_dead_lettered.of("refused");
        let captured = metrics.events_captured.get().max(left);
        let database = metrics.live.database.get();
        let trouble = database.last_error.map(|_| format!(", database {}", database.state.as_str()));
        bar.set_length(captured);
        bar.set_position(left);
        bar.set_message(format!("{} lines read{}", metrics.lines_read.get(), trouble.unwrap_or_default()));
        if captured > 0 && bar.is_hidden() {
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }
}
