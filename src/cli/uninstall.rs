//! `uninstall`: takes away what the program has put on this machine, after a question.
//!
//! In this order, so that nothing is written again behind it: hooks, service, state. Of a folder only what the program
//! makes is removed; the folder itself only where it is empty then. Databases, transcripts, configuration and the
//! program itself are left. The private PostgreSQL holds every event: it is removed only where that was asked for.

use std::io::{self, BufRead, IsTerminal, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::agent::Agent;
use crate::queue::{Queue, QueueError};
use clap::Args;

use super::database::PRIVATE_URL_FILE;
use super::{Context, Exit, Failure, hooks, inspect_queue, service};

/// How long the service that was stopped may hold the queue.
const STOP_TIME_MAX: Duration = Duration::from_secs(60);

/// Remove hooks, service and state, after a question; the database and the configuration stay
#[derive(Args)]
#[command(
    after_help = "Examples:\n  headspace-watcher uninstall          # says what it would remove, and asks\n  headspace-watcher uninstall --yes\n\nWhat waits in the queue is lost. Exit code 1: the answer was no; 64: there is nobody to ask, and --yes is not given;\n69: a watcher runs that is not the service."
)]
pub(super) struct UninstallArguments {
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Also remove the private PostgreSQL of scripts/dev-postgres.sh, with every event in it
    #[arg(long)]
    private_postgres: bool,
}

pub(super) fn uninstall(context: &Context, arguments: &UninstallArguments) -> Result<Exit, Failure> {
    let mut hooked = Vec::new();
    for agent in Agent::ALL {
        let (settings, count) = hooks::installed(context, agent)?;
        hooked.extend((count > 0).then_some((agent, settings, count)));
    }
    let service = service::service_files(context).into_iter().map(|(_, file)| file).next().filter(|file| file.exists());
    let postgres = private_postgres(context, arguments.private_postgres)?;
    let waiting = match inspect_queue(context.config()) {
        Ok(queue) => queue.stats().pending,
        Err(error @ QueueError::InUse { .. }) if service.is_none() => return Err(watcher_runs(&error)),
        Err(_) => 0,
    };
    let state = state(context);

    let mut items = Vec::new();
    for (_, settings, count) in &hooked {
        items.push(format!("{count} hooks in {}", settings.display()));
    }
    items.extend(service.iter().map(|file| format!("the service {}, which is stopped", file.display())));
    items.extend(state.iter().map(|(what, _)| what.clone()));
    items.extend(postgres.iter().map(|path| format!("{} with every event in it", path.display())));
    if items.is_empty() {
        println!("nothing to do: there are no hooks, no service and no state of headspace-watcher");
        return Ok(Exit::Fine);
    }
    println!("to be removed:");
    for item in items {
        println!("  {item}");
    }
    if waiting > 0 {
        println!("{waiting} events wait in the queue and are not in the database: they will be lost");
    }
    println!("not touched: your database, the transcripts, the configuration, this program");
    if !arguments.yes && !ask()? {
        println!("nothing was removed");
        return Ok(Exit::CheckFailed);
    }

    for (agent, ..) in hooked {
        hooks::uninstall_default(context, agent)?;
    }
    if service.is_some() {
        service::uninstall_default(context)?;
    }
    // Held until all is gone: no watcher starts meanwhile.
    let queue = stopped_queue(context)?;
    // With what says where its server listens; see `database`.
    let postgres =
        postgres.map(|folder| (folder.display().to_string(), vec![folder.with_file_name(PRIVATE_URL_FILE), folder]));
    for (what, paths) in state.into_iter().chain(postgres) {
        for path in paths {
            remove(&path).map_err(|error| {
                Failure::new(Exit::Io, format!("could not remove {}: {error}; remove it by hand", path.display()))
            })?;
        }
        println!("removed {what}");
    }
    drop(queue);
    let folders = [&context.config().queue.path, &context.config().queue.spool_path, &context.loaded.state_folder];
    for folder in folders {
        if std::fs::remove_dir(folder).is_err() && folder.exists() {
            println!("left {}: it holds other files", folder.display());
        }
    }
    Ok(Exit::Fine)
}

/// What the program has made in the folders of its state, and the socket with what is beside it: in words, and the paths.
fn state(context: &Context) -> Vec<(String, Vec<PathBuf>)> {
    let config = context.config();
    let entries = |folder: &Path, is_ours: fn(&str) -> bool| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        entries.filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(is_ours)).collect()
    };
    let (queue, spool) = (&config.queue.path, &config.queue.spool_path);
    let (socket, token) = (&config.http.socket, config.http.token_file());
    let is_socket = |path: &&PathBuf| path.symlink_metadata().is_ok_and(|metadata| metadata.file_type().is_socket());
    let segments = entries(queue, |name| {
        matches!(name, "lock" | "HIGHEST" | "DAMAGED") || name.starts_with("segment-") || name.starts_with("damaged-")
    });
    let spooled = entries(spool, |name| {
        name == ".attempt" || [".jsonl", ".jsonl.failed", ".draft"].iter().any(|end| name.ends_with(end))
    });
    let state = [
        (format!("the queue in {}", queue.display()), segments),
        (format!("{} files of the spool in {}", spooled.len(), spool.display()), spooled),
        (socket.display().to_string(), Some(socket).filter(is_socket).cloned().into_iter().collect()),
        (token.display().to_string(), Some(token).filter(|token| token.is_file()).into_iter().collect()),
    ];
    state.into_iter().filter(|(_, paths)| !paths.is_empty()).collect()
}

/// The folder of the private PostgreSQL, where it is to be removed and nobody uses it.
fn private_postgres(context: &Context, is_wanted: bool) -> Result<Option<PathBuf>, Failure> {
    let folder = context.loaded.state_folder.join("postgres");
    if !is_wanted {
        return Ok(None);
    }
    let refused = |exit, why: &str| Err(Failure::new(exit, format!("could not remove {}: {why}", folder.display())));
    if !folder.join("cluster/headspace.conf").is_file() {
        return refused(Exit::Data, "scripts/dev-postgres.sh has made no cluster there");
    }
    if folder.join("cluster/postmaster.pid").exists() {
        return refused(Exit::Unavailable, "the server runs, or was killed; run \"scripts/dev-postgres.sh stop\"");
    }
    Ok(Some(folder))
}

/// The queue, held; `None` where there is none, or none that can be opened.
fn stopped_queue(context: &Context) -> Result<Option<Queue>, Failure> {
    let deadline = Instant::now() + STOP_TIME_MAX;
    loop {
        match inspect_queue(context.config()) {
            Err(error @ QueueError::InUse { .. }) if Instant::now() > deadline => return Err(watcher_runs(&error)),
            Err(QueueError::InUse { .. }) => std::thread::sleep(Duration::from_millis(100)),
            opened => return Ok(opened.ok()),
        }
    }
}

fn watcher_runs(error: &QueueError) -> Failure {
    let message =
        format!("{error}. Stop that watcher first: Ctrl-C where scripts/run-watcher.sh runs, or kill the process");
    Failure::new(Exit::Unavailable, message)
}

fn ask() -> Result<bool, Failure> {
    if !io::stdin().is_terminal() {
        let message = "nothing was removed: there is no terminal to ask on; give --yes";
        return Err(Failure::new(Exit::Usage, message));
    }
    print!("Remove all this? [y/N] ");
    let mut answer = String::new();
    let asked = io::stdout().flush().and_then(|()| io::stdin().lock().read_line(&mut answer));
    asked.map_err(|error| Failure::new(Exit::Io, format!("could not ask: {error}")))?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}

/// Removes a file, or a folder with all in it. Links are removed, not followed.
fn remove(path: &Path) -> io::Result<()> {
    let removed = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    // The watcher removes its own socket when it stops.
    removed.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}
