//! `config`: what is configured, and a file to begin with.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use crate::config::Environment;
use clap::{Args, Subcommand};

use super::{Context, Exit, Failure, written};

/// What `init` writes. Everything in it has its default.
const INITIAL: &str = "\
# Configuration of headspace-watcher: the few keys that are usually changed.
# All keys, their values and where these come from: headspace-watcher config show
# Is it right? headspace-watcher check. A running watcher reads it at its next start.

database:
  # Your Postgres: postgresql://me@localhost/headspace. Keep the password in ~/.pgpass or PGPASSWORD.
  # null: DATABASE_URL or PGHOST say where it is.
  url: null

queue:
  # Folder on a local disk where events wait until Postgres has them.
  # path: /var/tmp/headspace-queue

http:
  # Status page, health and metrics; null turns the port off.
  listen: 127.0.0.1:5056

redact:
  # true: keys and tokens are taken out of texts before anything is stored.
  enabled: false
";

/// Print what is configured, or write a file to begin with
#[derive(Args)]
#[command(
    after_help = "Examples:\n  headspace-watcher config get queue.path\n  headspace-watcher config init      # then: headspace-watcher check"
)]
pub(super) struct ConfigArguments {
    #[command(subcommand)]
    command: ConfigCommand,
}

impl ConfigArguments {
    pub(super) fn is_init(&self) -> bool {
        matches!(self.command, ConfigCommand::Init)
    }
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// The effective value of each KEY, a line each: from the environment, else from the file, else the default
    #[command(
        after_help = "Example:\n  headspace-watcher config get queue.path\n\nAs config.yaml has it: null, true, 2, without units. Paths are absolute, lists are JSON, and secrets are shown.\nExit code 64: there is no such key; 78: the configuration is wrong."
    )]
    Get {
        /// Section and key, such as database.url
        #[arg(value_name = "KEY", required = true)]
        keys: Vec<String>,
    },
    /// Every key with its effective value and where that comes from; secrets are masked
    #[command(after_help = "Example:\n  headspace-watcher config show | grep database")]
    Show,
    /// Write a short configuration file with comments, where there is none
    #[command(
        after_help = "Examples:\n  headspace-watcher config init                                # ~/.config/headspace-watcher/config.yaml\n  headspace-watcher --config ~/watcher/config.yaml config init\n\nExit code 78: there is a file already; it is left as it is."
    )]
    Init,
}

pub(super) fn config(context: &Context, arguments: &ConfigArguments) -> Result<Exit, Failure> {
    let mut out = io::stdout().lock();
    match &arguments.command {
        ConfigCommand::Get { keys } => {
            let values: Result<Vec<&str>, String> = keys.iter().map(|key| context.loaded.value(key)).collect();
            let values = values.map_err(|error| Failure::new(Exit::Usage, error))?;
            written(values.iter().try_for_each(|value| writeln!(out, "{value}")))
        }
        ConfigCommand::Show => written(
            context
                .loaded
                .values()
                .iter()
                .try_for_each(|(key, value)| writeln!(out, "{key:<39}  {:<40}  {}", value.shown(), value.source)),
        ),
        // Taken before anything is read: `init`.
        ConfigCommand::Init => Ok(Exit::Fine),
    }
}

/// Writes the file that is named, else the user's own. Nothing is read: there is no configuration yet.
pub(super) fn init(named: Option<&Path>, environment: &Environment) -> Result<Exit, Failure> {
    let file = match named {
        Some(named) => environment.folder().join(named),
        None => environment.user_config_file().ok_or_else(|| {
            let message = "could not find the folder of configurations: HOME is not set to an absolute path; set it, or \
                           name the file with --config FILE";
            Failure::new(Exit::Configuration, message)
        })?,
    };
    let shown = file.display();
    let folder = file.parent().unwrap_or(Path::new("/"));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .and_then(|()| OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file))
        .and_then(|mut file| file.write_all(INITIAL.as_bytes()))
        .map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                Failure::new(Exit::Configuration, format!("{shown} is there already, and was left as it is"))
            }
            _ => Failure::new(
                Exit::Io,
                format!("could not write {shown}: {error}; fix its folder, or give --config FILE"),
            ),
        })?;
    println!("wrote {shown}\nnext: set database.url in it, then run \"headspace-watcher check\"");
    Ok(Exit::Fine)
}
