//! Which database the commands use: the configured one, else that of the running watcher, else the private PostgreSQL of a
//! checkout.
//!
//! * The watcher tells its own over its socket, everything but the password, which each process takes from `PGPASSWORD`
//!   or the password file.
//! * `scripts/dev-postgres.sh` leaves its URL in `postgres.url` in the folder of the state.
//!
//! Both are asked only where the socket or the file belongs to this user: others must not choose where events go.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use hyper::Method;
use serde::Deserialize;

use crate::config::{Config, ConnectionString, NO_DATABASE};
use crate::regular_file;
use crate::sink::postgres::TargetSource;

use super::{Context, Exit, Failure, block_on, client};

/// In the folder of the state.
pub(super) const PRIVATE_URL_FILE: &str = "postgres.url";

/// A larger file is not read.
const URL_BYTES_MAX: u64 = 4096;

/// The database of `run`: the configured one, else the private one. The flag says whether there is any.
///
/// It is looked up at each attempt to connect, so that a corrected password file needs no restart.
pub(super) fn of_watcher(context: &Context) -> Result<(TargetSource, bool), Failure> {
    source(context, |_| Ok(None))
}

/// The database of all other commands. The flag says whether there is any.
pub(super) fn of_commands(context: &Context) -> Result<(TargetSource, bool), Failure> {
    source(context, |config| block_on(ask_watcher(&config.http.socket)))
}

/// What every command says that finds no database.
pub(super) fn none(context: &Context) -> Failure {
    let elsewhere = match &context.loaded.file {
        Some(_) => "",
        None => "; if the watcher has a config.yaml, name it with --config FILE",
    };
    Failure::new(Exit::Configuration, format!("{NO_DATABASE}{elsewhere}"))
}

/// A connection string that no configuration names.
struct Found {
    url: ConnectionString,
    /// Said with each failure to connect.
    hint: String,
}

fn source(
    context: &Context,
    ask: impl FnOnce(&Config) -> Result<Option<Found>, Failure>,
) -> Result<(TargetSource, bool), Failure> {
    let (mut database, environment) = (context.config().database.clone(), context.environment.clone());
    let mut hint = None;
    let configured =
        database.resolve(&environment).map_err(|error| Failure::new(Exit::Configuration, one_line(&error)))?;
    let mut is_there = configured.is_some();
    if !is_there && let Some(found) = ask(context.config())?.or_else(|| private(&context.loaded.state_folder)) {
        (database.url, hint, is_there) = (Some(found.url), Some(found.hint), true);
    }
    let resolve = move || {
        let mut target = database.resolve(&environment).map_err(|error| one_line(&error))?;
        if let Some(target) = &mut target {
            target.warnings.extend(hint.clone());
        }
        Ok(target)
    };
    Ok((Arc::new(resolve), is_there))
}

fn one_line(error: &str) -> String {
    error.replace('\n', "; ")
}

/// Where the running watcher has its database. `None` where none runs, where it has none or does not say, as earlier
/// versions.
async fn ask_watcher(socket: &Path) -> Option<Found> {
    #[derive(Deserialize)]
    struct Answer {
        connection: Option<String>,
    }
    if !is_own(socket.symlink_metadata()) {
        return None;
    }
    let (_, answer) = client::ask(socket, Method::GET, "/database").await.ok()?;
    let connection = serde_json::from_slice::<Answer>(&answer).ok()?.connection?;
    let location = format!("the watcher on {}", socket.display());
    let hint = "this is the database of the running watcher, which does not tell its password: where one is needed, set \
                DATABASE_URL or PGPASSWORD, or put it into ~/.pgpass";
    Some(Found { url: ConnectionString::found(&connection, location), hint: hint.to_owned() })
}

/// The private PostgreSQL, where the state is in the `data` of a checkout in which it has been started.
fn private(data: &Path) -> Option<Found> {
    let file = data.join(PRIVATE_URL_FILE);
    if !is_own(file.symlink_metadata()) {
        return None;
    }
    let url = regular_file::read_to_string(&file, URL_BYTES_MAX).ok()?;
    let scripts = data.parent().unwrap_or(data).join("scripts");
    let hint = format!(
        "this is the private PostgreSQL: start it with the watcher ({}), or alone (\"{} start\")",
        scripts.join("run-watcher.sh").display(),
        scripts.join("dev-postgres.sh").display()
    );
    Some(Found { url: ConnectionString::found(url.trim(), file.display().to_string()), hint })
}

/// Whether it is there and belongs to this user.
fn is_own(metadata: io::Result<Metadata>) -> bool {
    metadata.is_ok_and(|metadata| metadata.uid() == rustix::process::geteuid().as_raw())
}
