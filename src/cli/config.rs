//! `config`: what is configured, for scripts.

use clap::{Args, Subcommand};

use super::{Context, Exit, Failure};

/// Print what is configured, for scripts
#[derive(Args)]
#[command(after_help = "Example:\n  headspace-watcher config get queue.path")]
pub(super) struct ConfigArguments {
    #[command(subcommand)]
    command: ConfigCommand,
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

pub(super) fn config(context: &Context, arguments: &ConfigArguments) -> Result<Exit, Failure> {
    let ConfigCommand::Get { keys } = &arguments.command;
    let values: Result<Vec<&str>, String> = keys.iter().map(|key| context.loaded.value(key)).collect();
    for value in values.map_err(|error| Failure::new(Exit::Usage, error))? {
        println!("{value}");
    }
    Ok(Exit::Fine)
}
