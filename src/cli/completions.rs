//! `completions`: what a shell needs to complete our commands and options.

use std::io;

use clap::CommandFactory;

use super::{Arguments, CompletionsArguments, Exit, Failure, written};

pub fn completions(arguments: &CompletionsArguments) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Arguments::command(), "headspace-watcher", &mut script);
    written(io::Write::write_all(&mut io::stdout(), &script))
}
