//! `migrate`: the tables in Postgres.

use crate::service::connect_settings;
use crate::sink::postgres::{PostgresSink, printable_sql};

use super::{Context, Exit, Failure, MigrateArguments, block_on};

pub fn migrate(context: &Context, arguments: &MigrateArguments) -> Result<Exit, Failure> {
    let config = context.config();
    if arguments.print {
        print!("{}", printable_sql(&config.database.events_table));
        return Ok(Exit::Fine);
    }
    let (target, has_database) = context.target()?;
    if !has_database {
        let message = "no database is configured; set database.url, DATABASE_URL or PGHOST";
        return Err(Failure::new(Exit::Configuration, message));
    }
    let made = block_on(PostgresSink::migrate(connect_settings(config, target)))??;
    if made.is_empty() {
        println!("nothing to do: the tables are there");
    } else {
        println!("created {}", made.join(", "));
    }
    Ok(Exit::Fine)
}
