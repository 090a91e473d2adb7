//! The commands. Errors go to stderr as one line each; exit codes follow sysexits (`Exit`).

mod check;
mod completions;
mod config;
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
mod top;
mod verify;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use crate::client;
use crate::config::{Config, Environment, Loaded};
use crate::event::Timestamp;
use crate::listing::Filter;
use crate::queue::QueueError;
use crate::service::ServiceError;
use crate::sink::postgres::TargetSource;
use crate::sink::{DeliverError, Verdict};
use crate::source::{SourceError, inspect_queue};
use crate::telemetry::{self, LogFormat};
use clap::{Args, Parser, Subcommand, ValueEnum};

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
    /// Configuration file [default: ./config.yaml if there is one, else built-in defaults]
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
    /// Capture events and drain them into Postgres until told to stop
    #[command(after_help = "Example:\n  headspace-watcher run --until-idle   # back-fill what is there, then end")]
    Run(run::RunArguments),
    /// Show what waits in the local queue, oldest first
    #[command(
        after_help = "Examples:\n  headspace-watcher queue-dump --limit 20\n  headspace-watcher queue-dump --format jsonl --payload | jq .payload.text\n  headspace-watcher queue-dump --dead-letters"
    )]
    QueueDump(QueueDumpArguments),
    /// Look at what was set aside, send it again, or forget it
    #[command(
        after_help = "Examples:\n  headspace-watcher dead-letters list\n  headspace-watcher dead-letters retry --all\n\nExit code 65: there is no such dead letter, or it never was an event."
    )]
    DeadLetters {
        #[command(subcommand)]
        command: DeadLettersCommand,
    },
    /// Hand in one event, or a stream of them. Exit code 0 only when all of it is durable
    #[command(
        after_help = "Examples:\n  headspace-watcher emit --type session_ended --payload '{\"session_uuid\":\"s\",\"reason\":\"closed\"}'\n  headspace-watcher emit --ndjson < events.jsonl\n\nExit code 65: not valid, the field is named and nothing was accepted; 74: the spool\nis full or can't be written."
    )]
    Emit(EmitArguments),
    /// Take one of Claude Code's hooks: a JSON object on stdin. Prints nothing, always exits 0
    #[command(
        after_help = "Example:\n  headspace-watcher --config ~/watcher/config.yaml hook < hook-input.json   # as \"hooks install\" sets it up\n\nWaits for its input for 10 s at most. Without a configuration file it keeps nothing,\nunless a watcher has run with its defaults in the current folder."
    )]
    Hook,
    /// Have Claude Code call this program at its hooks, or no longer
    #[command(
        after_help = "Examples:\n  headspace-watcher --config ~/watcher/config.yaml hooks install\n  headspace-watcher hooks show\n  headspace-watcher hooks uninstall --settings ~/project/.claude/settings.local.json"
    )]
    Hooks(hooks::HooksArguments),
    /// Health at a glance. Exit code 0: pass or warn, 1: fail, 3: not running
    #[command(
        after_help = "Examples:\n  headspace-watcher status --json | jq .queue.pending\n  headspace-watcher status --watch 5"
    )]
    Status(StatusArguments),
    /// The running watcher live on this terminal: rates, queue, lag, sessions, last events
    #[command(after_help = "Example:\n  headspace-watcher top          # q quits")]
    Top,
    /// Check configuration, schemas, folders and database, and say how to mend what is wrong
    #[command(
        after_help = "Example:\n  headspace-watcher check --no-database\n\nExit code 0: nothing is wrong, notes or not; 78: something is."
    )]
    Check(CheckArguments),
    /// Print what is configured, for scripts
    #[command(after_help = "Example:\n  headspace-watcher config get queue.path")]
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Prove for each turn on disk that it is in Postgres, in the queue or among the dead letters
    #[command(
        after_help = "Examples:\n  headspace-watcher verify\n  headspace-watcher verify --json | jq '.missing[]'\n  headspace-watcher verify --repair    # send again what is missing\n\nExit code 0: nothing is missing, or all of it was sent again; 1: something is missing, or a transcript can't be\nread; 69: the database or the queue can't be asked; 74: the spool is full or can't be used."
    )]
    Verify(VerifyArguments),
    /// Say of each line of a transcript whether it is a turn and whose, or why not
    #[command(
        after_help = "Examples:\n  headspace-watcher explain ~/.claude/projects/-home-me-app/SESSION.jsonl\n  headspace-watcher explain SESSION.jsonl:17 --text\n\nExit code 65: there is no such file or line."
    )]
    Explain(ExplainArguments),
    /// Create or bring up to date what is needed in Postgres
    #[command(after_help = "Example:\n  headspace-watcher migrate --print | psql mydb")]
    Migrate(MigrateArguments),
    /// Install the systemd user unit or launchd agent that keeps the watcher running
    #[command(
        after_help = "Examples:\n  headspace-watcher --config ~/watcher/config.yaml service install\n  headspace-watcher service status"
    )]
    Service(service::ServiceArguments),
    /// Print what a shell needs to complete commands and options
    #[command(
        after_help = "Examples:\n  headspace-watcher completions bash > ~/.local/share/bash-completion/completions/headspace-watcher\n  headspace-watcher completions zsh > \"${fpath[1]}/_headspace-watcher\""
    )]
    Completions(completions::CompletionsArguments),
}

#[derive(Args, Clone)]
struct QueueDumpArguments {
    /// table on a terminal, else jsonl, when not given
    #[arg(long, value_enum)]
    format: Option<DumpFormat>,
    /// At most so many events
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// Only events after this sequence number
    #[arg(long, value_name = "SEQ")]
    after: Option<u64>,
    /// Only events of this type
    #[arg(long = "type", value_name = "T")]
    event_type: Option<String>,
    /// Only events of this session
    #[arg(long, value_name = "UUID")]
    session: Option<String>,
    /// Whole payloads; without it no text is shown
    #[arg(long)]
    payload: bool,
    /// What was set aside or rejected, with reasons
    #[arg(long)]
    dead_letters: bool,
}

impl QueueDumpArguments {
    fn filter(&self) -> Filter {
        Filter {
            after: self.after,
            limit: self.limit,
            event_type: self.event_type.clone(),
            session: self.session.clone(),
            payload: self.payload,
        }
    }
}

#[derive(Subcommand)]
enum DeadLettersCommand {
    /// One line each, oldest first; the options are those of queue-dump
    List(QueueDumpArguments),
    /// All of one, with its payload
    Show {
        /// Its sequence number, as "dead-letters list" shows it
        #[arg(value_name = "SEQ")]
        sequence: u64,
    },
    /// Put events back at the tail of the queue
    Retry {
        /// Their sequence numbers
        #[arg(value_name = "SEQ", required_unless_present = "all", conflicts_with = "all")]
        sequences: Vec<u64>,
        /// All that once were events
        #[arg(long)]
        all: bool,
    },
    /// Forget for good
    Drop {
        /// Their sequence numbers
        #[arg(value_name = "SEQ", required = true)]
        sequences: Vec<u64>,
    },
}

#[derive(Args)]
struct EmitArguments {
    /// The event's type
    #[arg(long = "type", value_name = "T", required_unless_present = "ndjson")]
    event_type: Option<String>,
    /// The event's own data as a JSON object, or - to read it from stdin
    #[arg(long, value_name = "JSON|-")]
    payload: Option<String>,
    /// When it happened, with its zone: 2026-01-02T03:04:05Z [default: now]
    #[arg(long, value_name = "TS")]
    timestamp: Option<String>,
    /// The event's identity: the same one again stores nothing twice [default: a new one]
    #[arg(long, value_name = "UUID")]
    event_id: Option<String>,
    /// The row's project_id
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    project_id: Option<i64>,
    /// The row's agent_id
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    agent_id: Option<i64>,
    /// The row's command_id (task_id in older databases)
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    command_id: Option<i64>,
    /// The row's turn_id
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    turn_id: Option<i64>,
    /// Read events from stdin, one JSON object a line, as POST /events takes them; all of them or none
    #[arg(long, conflicts_with_all = [
        "event_type", "payload", "timestamp", "event_id", "project_id", "agent_id", "command_id", "turn_id"
    ])]
    ndjson: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DumpFormat {
    Table,
    Jsonl,
}

#[derive(Args)]
struct StatusArguments {
    /// The object of GET /health
    #[arg(long)]
    json: bool,
    /// Show it again every so many seconds
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2",
          value_parser = clap::value_parser!(u32).range(1..=86_400))]
    watch: Option<u32>,
}

#[derive(Args)]
struct CheckArguments {
    /// Leave the database out
    #[arg(long)]
    no_database: bool,
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// The effective value of each KEY, a line each: from the environment, else from the file, else the default
    #[command(
        after_help = "Example:\n  headspace-watcher config get queue.path\n\nAs config.yaml has it: null, true, 2. Paths are absolute, lists are JSON, and secrets are shown.\nExit code 64: there is no such key; 78: the configuration is wrong."
    )]
    Get {
        /// Section and key, such as database.url
        #[arg(value_name = "KEY", required = true)]
        keys: Vec<String>,
    },
}

#[derive(Args)]
struct VerifyArguments {
    /// One JSON object; it lists all that is missing
    #[arg(long)]
    json: bool,
    /// Send again what is missing, by the spool: the running watcher takes it in, or the next one when it starts
    #[arg(long)]
    repair: bool,

    /// Take rows that are gone for deleted on purpose: they count as removed from then on, and are not sent again
    #[arg(long, conflicts_with = "repair")]
    accept_missing: bool,
    /// Leave out what happened before: 2026-01-02T03:04:05Z, or 90d for the last 90 days
    #[arg(long, value_name = "TS|DAYSd", value_parser = verify::since)]
    since: Option<Timestamp>,
}

#[derive(Args)]
struct ExplainArguments {
    /// The transcript, and the number of a line in it [default: all lines]
    #[arg(value_name = "FILE[:LINE]")]
    place: PathBuf,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// Show what was said
    #[arg(long)]
    text: bool,
}

#[derive(Args)]
struct MigrateArguments {
    /// Print the SQL instead of running it
    #[arg(long)]
    print: bool,
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
            ServiceError::Unconfigured => Failure::new(Exit::Unavailable, error),
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
    fn settings_file(&self) -> Result<PathBuf, Failure> {
        let folder = self.environment.claude_folder().ok_or_else(|| {
            let message = "could not find Claude Code's settings.json: HOME is not set to an absolute path; set it or \
                           CLAUDE_CONFIG_DIR, or name the file with --settings FILE";
            Failure::new(Exit::Configuration, message)
        })?;
        Ok(folder.join("settings.json"))
    }

    fn start_logging(&self) {
        telemetry::start_logging(self.log_format, self.log_level);
    }

    /// Looks up where Postgres is, anew each time; and whether anything is configured now.
    fn target(&self) -> Result<(TargetSource, bool), Failure> {
        let database = self.config().database.clone();
        let environment = self.environment.clone();
        let resolve = move || database.resolve(&environment).map_err(|error| error.to_string().replace('\n', "; "));
        let now = resolve().map_err(|error| Failure::new(Exit::Configuration, error))?;
        Ok((Arc::new(resolve), now.is_some()))
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
    let loaded = Config::load(arguments.config.as_deref(), &environment)
        .map_err(|error| Failure::new(Exit::Configuration, error))?;
    let context =
        Context { loaded, environment, log_format: arguments.log_format.into(), log_level: arguments.log_level };
    match arguments.command {
        Command::Run(arguments) => run::run(context, &arguments),
        Command::QueueDump(arguments) => queue_dump::queue_dump(&context, &arguments),
        Command::DeadLetters { command } => dead_letters::dead_letters(&context, &command),
        Command::Emit(arguments) => emit::emit(&context, &arguments),
        // Taken in `main`, past all this; what comes here anyway is no reason to fail.
        Command::Hook => Ok(Exit::Fine),
        Command::Hooks(arguments) => hooks::hooks(&context, &arguments),
        Command::Status(arguments) => status::status(&context, &arguments),
        Command::Top => top::top(&context),
        Command::Check(arguments) => check::check(&context, &arguments),
        Command::Config { command } => config::config(&context, &command),
        Command::Verify(arguments) => verify::verify(&context, &arguments),
        Command::Explain(arguments) => explain::explain(&context, &arguments),
        Command::Migrate(arguments) => migrate::migrate(&context, &arguments),
        Command::Service(arguments) => service::service(&context, &arguments),
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
