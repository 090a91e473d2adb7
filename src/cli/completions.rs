//! `completions`: what a shell needs to complete our commands and options.

use std::io;

use clap::{Args, CommandFactory};

use super::{Arguments, Exit, Failure, written};

/// Print what a shell needs to complete commands and options
#[derive(Args)]
#[command(
    after_help = "Examples:\n  headspace-watcher completions bash > ~/.local/share/bash-completion/completions/headspace-watcher\n  headspace-watcher completions zsh > \"${fpath[1]}/_headspace-watcher\""
)]
pub(super) struct CompletionsArguments {
    /// Whose completions
    #[arg(value_enum)]
    shell: clap_complete::Shell,
}

pub(super) fn completions(arguments: &CompletionsArguments) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Arguments::command(), "headspace-watcher", &mut script);
    written(io::Write::write_all(&mut io::stdout(), &script))
}
