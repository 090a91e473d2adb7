//! `completions`: what a shell needs to complete our commands and options.

use std::io;

use clap::CommandFactory;

use super::{Arguments, CompletionsArguments, Exit, Failure};

pub fn completions(arguments: &CompletionsArguments) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Arguments::command(), "headspace-watcher", &mut script);
    match io::Write::write_all(&mut io::stdout(), &script) {
        Ok(()) => Ok(Exit::Fine),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Fine),
        Err(error) => Err(Failure::new(Exit::Io, format!("could not write: {error}"))),
    }
}
