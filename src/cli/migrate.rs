//! `migrate`: the tables and routines in Postgres.

use crate::service::connect_settings;
use crate::sink::postgres;
use clap::Args;

use super::{Context, Exit, Failure, block_on, database};

/// Create or bring up to date what is needed in Postgres
#[derive(Args)]
#[command(after_help = "Example:\n  headspace-watcher migrate --print | psql mydb")]
pub(super) struct MigrateArguments {
    /// Print the SQL instead of running it
    #[arg(long)]
    print: bool,
}

pub(super) fn migrate(context: &Context, arguments: &MigrateArguments) -> Result<Exit, Failure> {
    let (target, has_database) = database::of_commands(context)?;
    let settings = connect_settings(context.config(), target);
    if arguments.print {
        let settings_of_database = has_database.then_some(&settings);
        print!("{}", block_on(postgres::printable_sql(&settings.needs, settings_of_database))??);
        return Ok(Exit::Fine);
    }
    if !has_database {
        return Err(database::none(context));
    }
    let (made, removed) = block_on(postgres::migrate(&settings))??;
    if made.is_empty() {
        println!("nothing to do: everything is there");
    } else {
        println!("created {}", made.join(", "));
    }
    if !removed.is_empty() {
        println!(
            "removed {}, which another version or configuration has made; one that still runs makes them again",
            removed.join(", ")
        );
    }
    Ok(Exit::Fine)
}
