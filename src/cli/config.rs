//! `config`: what is configured, for scripts.

use super::{ConfigCommand, Context, Exit, Failure};

pub(super) fn config(context: &Context, command: &ConfigCommand) -> Result<Exit, Failure> {
    let ConfigCommand::Get { keys } = command;
    let values: Result<Vec<&str>, String> = keys.iter().map(|key| context.loaded.value(key)).collect();
    for value in values.map_err(|error| Failure::new(Exit::Usage, error))? {
        println!("{value}");
    }
    Ok(Exit::Fine)
}
