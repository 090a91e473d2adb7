//! The commands. Errors go to stderr as one line each; exit codes follow sysexits (`Exit`).

mod check;
mod completions;
mod config;
mod database;
mod dead_letters;
mod emit;
mod explain;
mod hook;
mod hooks;
mod migrate;
mod queue_dump;
mod run;
mod service;
mod status;
mod table;
mod top;
mod uninstall;
mod verify;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::agent::Agent;
use crate::client;
use crate::config::{Config, Environment, Loaded};
use crate::queue::QueueError;
use crate::service::ServiceError;
use crate::sink::{DeliverError, Verdict};
use crate::source::{SourceError, inspect_queue};
use crate::telemetry::{self, LogFormat};
use clap::{Parser, Subcommand, ValueEnum};
use indicatif::ProgressBar;

/// Where the help of each command lists the options that all of them have.
const EVERYWHERE: &str = "Options of every command";

const EXIT_CODES: &str = "\
Exit codes: 0 fine, 1 a check failed, 3 not running, 64 usage, 65 bad data, 69 something needed is not there (database,
watcher, queue), 70 internal, 74 input or output (the queue can't be written), 78 configuration.";

/// Watches Claude Code sessions and moves every event into Postgres, exactly once and in order, through a durable
/// local queue.
#[derive(Parser)]
#[command(name = "headspace-watcher", version, arg_required_else_help = true, after_help = EXIT_CODES)]
struct Arguments {
    /// Configuration file [default: ./config.yaml, else ~/.config/headspace-watcher/config.yaml, else built-in defaults]
    #[arg(long, global = true, value_name = "FILE", help_heading = EVERYWHERE)]
    config: Option<PathBuf>,
    /// How log lines look; auto is text on a terminal, else JSON
    #[arg(long, global = true, value_enum, default_value = "auto", value_name = "FORMAT", help_heading = EVERYWHERE)]
    log_format: LogFormatArgument,
    /// Least level that is logged: error, warn, info, debug or trace
    #[arg(long, global = true, value_name = "LEVEL", default_value = "info", help_heading = EVERYWHERE)]
    log_level: tracing::Level,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormatArgument {
    Auto,
    Text,
    Json,
}

impl From<LogFormatArgument> for LogFormat {
    fn from(argument: LogFormatArgument) -> Self {
        match argument {
            LogFormatArgument::Auto => LogFormat::Auto,
            LogFormatArgument::Text => LogFormat::Text,
            LogFormatArgument::Json => LogFormat::Json,
        }
    }
}

#[derive(Subcommand)]
enum Command {
    Run(run::RunArguments),
    QueueDump(queue_dump::QueueDumpArguments),
    DeadLetters(dead_letters::DeadLettersArguments),
    Emit(emit::EmitArguments),
    /// Take a hook of Claude Code or the Codex CLI: a JSON object on stdin. Prints nothing, always exits 0
    #[command(
        after_help = "Example:\n  headspace-watcher --config ~/watcher/config.yaml hook < hook-input.json   # as \"hooks install\" sets it up\n\nWaits for its input for 10 s at most. Without a configuration file it keeps nothing,\nunless a watcher has run with its defaults."
    )]
    Hook,
    Hooks(hooks::HooksArguments),
    Status(status::StatusArguments),
    /// The running watcher live on this terminal: rates, queue, lag, sessions, last events
    #[command(after_help = "Example:\n  headspace-watcher top          # q quits")]
    Top,
    Check(check::CheckArguments),
    Config(config::ConfigArguments),
    Verify(verify::VerifyArguments),
    Explain(explain::ExplainArguments),
    Migrate(migrate::MigrateArguments),
    Service(service::ServiceArguments),
    Uninstall(uninstall::UninstallArguments),
    Completions(completions::CompletionsArguments),
}

/// Exit codes, as sysexits has them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Exit {
    Fine = 0,
    CheckFailed = 1,
    NotRunning = 3,
    Usage = 64,
    Data = 65,
    Unavailable = 69,
    Internal = 70,
    Io = 74,
    Configuration = 78,
}

/// Why a command ends with other than 0: a code and one line (or one line for each mistake).
#[derive(Debug)]
struct Failure {
    exit: Exit,
    message: String,
}

impl Failure {
    fn new(exit: Exit, message: impl fmt::Display) -> Self {
        Failure { exit, message: message.to_string() }
    }
}

impl From<QueueError> for Failure {
    fn from(error: QueueError) -> Self {
        let exit = match &error {
            QueueError::TooNew { .. } | QueueError::Folder(_) => Exit::Configuration,
            QueueError::InUse { .. } | QueueError::NotFound { .. } => Exit::Unavailable,
            _ => Exit::Io,
        };
        Failure::new(exit, error)
    }
}

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Self {
        match error {
            SourceError::Queue(error) => error.into(),
            SourceError::NoAnswer { .. } => Failure::new(Exit::Unavailable, error),
            SourceError::Reader(_) => Failure::new(Exit::Io, error),
        }
    }
}

impl From<ServiceError> for Failure {
    fn from(error: ServiceError) -> Self {
        match error {
            ServiceError::Queue(error) => error.into(),
            ServiceError::Schemas(_)
            | ServiceError::Redact(_)
            | ServiceError::Folder(_)
            | ServiceError::Socket { .. } => Failure::new(Exit::Configuration, error),
            ServiceError::Unread(_) => Failure::new(Exit::CheckFailed, error),
            ServiceError::Thread { .. } | ServiceError::Ended(_) => Failure::new(Exit::Internal, error),
        }
    }
}

impl From<DeliverError> for Failure {
    fn from(error: DeliverError) -> Self {
        let exit = match error.verdict {
            Verdict::Operator => Exit::Configuration,
            Verdict::Again | Verdict::Event => Exit::Unavailable,
        };
        Failure::new(exit, error)
    }
}

/// What every command starts from.
struct Context {
    loaded: Loaded,
    environment: Environment,
    log_format: LogFormat,
    log_level: tracing::Level,
}

impl Context {
    fn config(&self) -> &Config {
        &self.loaded.config
    }

    /// Claude Code's own settings, which name its hooks. An error where nothing says where they are: never a file below
    /// the current folder.
    fn settings_file(&self, agent: Agent) -> Result<PathBuf, Failure> {
        agent.hooks_file(&self.environment).ok_or_else(|| {
            let message = "could not find the agent's settings: HOME is not set to an absolute path; set it or \
                           CLAUDE_CONFIG_DIR (Codex: CODEX_HOME), or name the file with --settings FILE";
            Failure::new(Exit::Configuration, message)
        })
    }

    fn start_logging(&self, progress: &ProgressBar) {
        telemetry::start_logging(self.log_format, self.log_level, progress.clone());
    }
}

pub fn main() -> ExitCode {
    // What we create (queue, spool, socket) is for its owner only, from birth.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    if let Some(hook) = hook::Invocation::of(std::env::args_os().skip(1)) {
        return hook.run();
    }
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { exit(Exit::Usage) } else { exit(Exit::Fine) };
        }
    };
    match perform(arguments) {
        Ok(code) => exit(code),
        Err(failure) => {
            for line in failure.message.lines() {
                eprintln!("headspace-watcher: {line}");
            }
            exit(failure.exit)
        }
    }
}

/// How a command ends whose output is done: whoever read it may have closed it when they had seen enough.
fn written(result: io::Result<()>) -> Result<Exit, Failure> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::Io, format!("could not write: {error}")))
        }
        _ => Ok(Exit::Fine),
    }
}

fn exit(code: Exit) -> ExitCode {
    ExitCode::from(code as u8)
}

fn perform(arguments: Arguments) -> Result<Exit, Failure> {
    // Needs no configuration, and must work where it is wrong.
    if let Command::Completions(arguments) = &arguments.command {
        return completions::completions(arguments);
    }
    let environment = Environment::of_process()
        .map_err(|error| Failure::new(Exit::Io, format!("the current folder can't be used: {error}")))?;
    if let Command::Config(command) = &arguments.command
        && command.is_init()
    {
        return config::init(arguments.config.as_deref(), &environment);
    }
    let loaded = Config::load(arguments.config.as_deref(), &environment)
        .map_err(|error| Failure::new(Exit::Configuration, error))?;
    let context =
        Context { loaded, environment, log_format: arguments.log_format.into(), log_level: arguments.log_level };
    match arguments.command {
        Command::Run(arguments) => run::run(context, &arguments),
        Command::QueueDump(arguments) => queue_dump::queue_dump(&context, &arguments),
        Command::DeadLetters(arguments) => dead_letters::dead_letters(&context, &arguments),
        Command::Emit(arguments) => emit::emit(&context, &arguments),
        // Taken in `main`, past all this; what comes here anyway is no reason to fail.
        Command::Hook => Ok(Exit::Fine),
        Command::Hooks(arguments) => hooks::hooks(&context, &arguments),
        Command::Status(arguments) => status::status(&context, &arguments),
        Command::Top => top::top(&context),
        Command::Check(arguments) => check::check(&context, &arguments),
        Command::Config(arguments) => config::config(&context, &arguments),
        Command::Verify(arguments) => verify::verify(&context, &arguments),
        Command::Explain(arguments) => explain::explain(&context, &arguments),
        Command::Migrate(arguments) => migrate::migrate(&context, &arguments),
        Command::Service(arguments) => service::service(&context, &arguments),
        Command::Uninstall(arguments) => uninstall::uninstall(&context, &arguments),
        Command::Completions(arguments) => completions::completions(&arguments),
    }
}

/// Where this program's own file is.
fn own_program() -> Result<PathBuf, Failure> {
    std::env::current_exe()
        .map_err(|error| Failure::new(Exit::Io, format!("could not find out where this program is: {error}")))
}

/// `path` as text, for `file`, in which others read it: an error where it is not UTF-8 or holds control characters.
fn plain_path(path: &Path, file: &str) -> Result<String, Failure> {
    path.to_str().filter(|text| !text.contains(char::is_control)).map(str::to_owned).ok_or_else(|| {
        let message = format!("{} can't stand in {file}; move it to a path in plain UTF-8", path.display());
        Failure::new(Exit::Configuration, message)
    })
}

/// A small runtime for commands that ask something and end.
fn block_on<T>(task: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Internal, format!("could not start the runtime: {error}")))?;
    let result = runtime.block_on(task);
    runtime.shutdown_timeout(std::time::Duration::from_millis(100));
    Ok(result)
}
