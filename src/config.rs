//! Configuration: `config.yaml`, its environment overrides, and how to reach Postgres.
//!
//! [`Config::load`] reads everything once and returns typed values, or every mistake at once, each naming file, line, key,
//! what was expected and what was found. It reads no file but the one it is given: environment and current folder are
//! arguments ([`Environment`]).
//!
//! ```text
//! config/defaults.yaml (compiled in)  <  config.yaml  <  HEADSPACE_SECTION__KEY
//! ```
//!
//! The structs below say which keys there are, and their ranges; `defaults.yaml` gives each its default. The documented
//! `config.yaml` is a copy of `defaults.yaml`; a test holds the three together.
//!
//! Secrets (`database.url`, `http.token`, passwords) are [`Secret`]s: they never show in a log or an error.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

mod database;
mod environment;
mod load;
mod nearest;
mod values;
mod yaml;

pub(crate) use database::{DatabaseHost, DatabaseTarget, NO_DATABASE, SslMode};
pub use environment::Environment;

use values::*;

/// File that is read when none is named: from the current folder, else from the user's folder of configurations.
pub(crate) const CONFIG_FILE: &str = "config.yaml";

/// Everything that can be configured, checked. Paths are absolute.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub claude: ClaudeConfig,
    pub codex: CodexConfig,
    pub file_watcher: FileWatcherConfig,
    pub event_system: EventSystemConfig,
    pub database: DatabaseConfig,
    pub queue: QueueConfig,
    pub http: HttpConfig,
    pub schemas: SchemasConfig,
    pub hooks: HooksConfig,
    pub redact: RedactConfig,
}

/// Section `claude`: where Claude Code keeps what is watched.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClaudeConfig {
    /// At least one; none of them is or lies in another.
    #[serde(rename = "projects_path", deserialize_with = "paths")]
    pub projects_paths: Vec<PathBuf>,
}

/// Section `codex`: where the Codex CLI keeps what is watched.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CodexConfig {
    /// Beside it is `archived_sessions`. `None`: nothing is followed, also where there is no home.
    #[serde(deserialize_with = "optional_path")]
    pub sessions_path: Option<PathBuf>,
}

/// Section `file_watcher`: how transcripts are followed.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileWatcherConfig {
    /// Time between rescans; notifications only make it faster.
    #[serde(deserialize_with = "seconds::<50, 3_600_000, _>")]
    pub polling_interval: Duration,
    /// Quiet after which a session has ended.
    #[serde(deserialize_with = "seconds::<100, 3_153_600_000_000, _>")]
    pub inactivity_timeout: Duration,
    /// How long changes of one file are gathered before it is read; zero reads at once.
    #[serde(deserialize_with = "seconds::<0, 60_000, _>")]
    pub debounce_interval: Duration,
    #[serde(deserialize_with = "bytes::<4096, 0x4000_0000, _>")]
    pub max_line_bytes: u64,
}

/// Section `event_system`: retries, restarts, limits.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventSystemConfig {
    #[serde(deserialize_with = "whole::<1, 100, _, _>")]
    pub write_retry_attempts: u32,
    /// First pause after a failed write (`write_retry_delay_ms`).
    #[serde(rename = "write_retry_delay_ms", deserialize_with = "milliseconds::<1, 60_000, _>")]
    pub write_retry_delay: Duration,
    /// What the doubling pause grows to (`write_retry_max_delay_ms`); never below `write_retry_delay`.
    #[serde(rename = "write_retry_max_delay_ms", deserialize_with = "milliseconds::<1, 600_000, _>")]
    pub write_retry_max_delay: Duration,
    #[serde(deserialize_with = "whole::<1, 60, _, _>")]
    pub max_restarts_per_minute: u32,
    /// Time within which a stop must be done (`shutdown_timeout_seconds`).
    #[serde(rename = "shutdown_timeout_seconds", deserialize_with = "seconds::<100, 60_000, _>")]
    pub shutdown_timeout: Duration,
    #[serde(deserialize_with = "bytes::<1024, 0x1000_0000, _>")]
    pub max_event_bytes: u64,
}

/// Section `database`: how events are delivered.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatabaseConfig {
    #[serde(deserialize_with = "connection_string")]
    pub url: Option<ConnectionString>,
    #[serde(deserialize_with = "whole::<1, 64, _, _>")]
    pub pool_size: u32,
    /// Time for one attempt to connect (`connect_timeout_ms`).
    #[serde(rename = "connect_timeout_ms", deserialize_with = "milliseconds::<10, 60_000, _>")]
    pub connect_timeout: Duration,
    /// Limit for one statement (`statement_timeout_ms`).
    #[serde(rename = "statement_timeout_ms", deserialize_with = "milliseconds::<100, 3_600_000, _>")]
    pub statement_timeout: Duration,
    #[serde(deserialize_with = "table_name")]
    pub events_table: TableName,
    /// Schema of the program's own tables and routines.
    #[serde(deserialize_with = "name::<63, _>")]
    pub ledger_schema: String,
    #[serde(deserialize_with = "flag")]
    pub auto_migrate: bool,
    #[serde(deserialize_with = "optional_name::<63, _>")]
    pub notify_channel: Option<String>,
    /// What this machine is called in `event_sources`; `None`: what it calls itself.
    #[serde(deserialize_with = "optional_name::<253, _>")]
    pub host_name: Option<String>,
}

/// Section `queue`: where events wait.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueConfig {
    #[serde(deserialize_with = "path")]
    pub path: PathBuf,
    /// Folder in which hooks leave their events while the watcher is down; never inside `path`.
    #[serde(deserialize_with = "path")]
    pub spool_path: PathBuf,
    #[serde(deserialize_with = "bytes::<0x10_0000, 0x100_0000_0000, _>")]
    pub max_pending_bytes: u64,
    /// Transactions in flight at once, in order.
    #[serde(deserialize_with = "whole::<1, 4096, _, _>")]
    pub drain_window: usize,
}

/// Section `http`: the watcher's own server.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpConfig {
    /// `None` turns TCP off. An address that is not loopback comes with a configured token only.
    #[serde(deserialize_with = "address")]
    pub listen: Option<SocketAddr>,
    /// The Unix socket, short enough to be bound.
    #[serde(deserialize_with = "path")]
    pub socket: PathBuf,
    /// What callers on TCP show; `None`: the one in [`HttpConfig::token_file`].
    #[serde(deserialize_with = "token")]
    pub token: Option<Secret>,
}

impl HttpConfig {
    /// The file in which a token is made where none is configured: `http.token` beside the socket.
    pub fn token_file(&self) -> PathBuf {
        self.socket.with_file_name("http.token")
    }
}

/// Section `schemas`: additions to the built-in event types.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SchemasConfig {
    #[serde(deserialize_with = "optional_path")]
    pub path: Option<PathBuf>,
}

/// Section `hooks`: what of a hook's input is kept.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HooksConfig {
    #[serde(deserialize_with = "capture")]
    pub capture: HookCapture,
}

/// How much of a hook's input becomes part of its event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookCapture {
    /// No prompt text, no tool input, no tool output.
    Summary,
    /// The whole input, in `data`.
    Full,
}

/// Section `redact`: redaction of secrets before events are stored.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RedactConfig {
    #[serde(deserialize_with = "flag")]
    pub enabled: bool,
    /// Added to the built-in set for keys and tokens. Not compiled here.
    #[serde(deserialize_with = "texts::<100, 1000, _>")]
    pub patterns: Vec<String>,
}

/// A configuration, and where it came from.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    /// Absolute path of the file that was read; `None` when built-in defaults serve.
    pub file: Option<PathBuf>,
    /// Folder of what no key places elsewhere: `data` beside the file; for the user's own file, and without one, the
    /// system's folder of state.
    pub state_folder: PathBuf,
    /// Names of the environment variables that set a key.
    pub variables: Vec<String>,
    /// Environment variables that set nothing but look as if they were to: name and nearest right one, for people.
    pub misspelt_variables: Vec<String>,
    /// Sections and keys of the file that belong to other programs, and are not used.
    pub unused: Vec<String>,
    /// By `section.key`.
    values: BTreeMap<String, KeyValue>,
}

/// The effective value of a key.
#[derive(Clone, Debug)]
pub struct KeyValue {
    value: Secret,
    is_secret: bool,
    /// `config.yaml:2`, `environment HEADSPACE_QUEUE__PATH` or `default`.
    pub source: String,
}

impl KeyValue {
    /// The value as it may be shown.
    pub fn shown(&self) -> &str {
        if self.is_secret && self.value.reveal() != "null" { "***" } else { self.value.reveal() }
    }
}

impl Loaded {
    /// The effective value of `key` (`section.key`) as `config.yaml` would have it: `null`, `true`, `2`. Paths are
    /// absolute, lists are JSON. Secrets are shown.
    ///
    /// # Errors
    /// There is no such key; names one that is like it.
    pub fn value(&self, key: &str) -> Result<&str, String> {
        self.values.get(key).map(|key| key.value.reveal()).ok_or_else(|| load::unknown_key(key))
    }

    /// Every key with its effective value, by `section.key`.
    pub fn values(&self) -> &BTreeMap<String, KeyValue> {
        &self.values
    }
}

impl Config {
    /// Reads `file`, else `config.yaml` in the current folder, else the user's own, else takes the built-in defaults;
    /// then what the environment sets.
    ///
    /// Relative paths, also those of the environment, are relative to the folder of the file (without a file: to the
    /// current folder). `~` is the home, `CLAUDE_CONFIG_DIR` moves `~/.claude`, and `CODEX_HOME` `~/.codex`. Where the file is the user's own,
    /// or there is none, the defaults in `data/` are in the system's folder of state instead.
    ///
    /// # Errors
    /// Every mistake found, not only the first.
    pub fn load(file: Option<&Path>, environment: &Environment) -> Result<Loaded, ConfigError> {
        let (loaded, issues) = load::load(file, environment);
        if issues.is_empty() { Ok(loaded) } else { Err(ConfigError(issues)) }
    }

    /// As [`Config::load`], for callers that must continue whatever is wrong: wrong values are replaced by defaults.
    /// Also returns whether nothing was wrong.
    pub fn load_leniently(file: Option<&Path>, environment: &Environment) -> (Loaded, bool) {
        let (loaded, issues) = load::load(file, environment);
        (loaded, issues.is_empty())
    }
}

/// A configuration that can't be used: one line for each mistake, such as
/// `config.yaml:12: database.pool_size: expected a whole number from 1 to 64, found "many"`. Exit code 78.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(Vec<String>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for ConfigError {}

/// A text that must not be seen: `Debug` and `Display` mask it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// What a token for HTTP is made of.
    pub const TOKEN_RULE: &str = "8 to 256 visible ASCII characters without spaces";

    /// `text` as a token for HTTP, where it keeps to [`Secret::TOKEN_RULE`].
    pub fn token(text: &str) -> Option<Secret> {
        let is_token = (8..=256).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        is_token.then(|| Secret::new(text))
    }

    pub fn new(text: impl Into<String>) -> Self {
        Secret(text.into())
    }

    /// The text itself, for where it is used and nowhere else.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether `presented` is this secret, in a time that does not tell how much of it is right.
    pub fn matches(&self, presented: &str) -> bool {
        let (ours, theirs) = (self.0.as_bytes(), presented.as_bytes());
        let difference = ours.iter().zip(theirs).fold(0, |sum, (a, b)| sum | (a ^ b));
        ours.len() == theirs.len() && std::hint::black_box(difference) == 0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// `database.url` as it was given: it may hold a password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionString {
    text: Secret,
    /// Where it was given, for messages: `config.yaml:2: database.url`.
    location: String,
    /// Folder to which paths in it are relative.
    folder: PathBuf,
}

impl ConnectionString {
    /// One that no configuration names. `location`: where it was found, for messages. Paths in it are absolute.
    pub(crate) fn found(text: &str, location: String) -> Self {
        ConnectionString { text: Secret::new(text), location, folder: PathBuf::from("/") }
    }
}

/// Name of a table, with its schema where one was given. Written exactly as in the database: case matters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableName {
    pub schema: Option<String>,
    pub table: String,
}

impl TableName {
    /// Bytes of the longest name that Postgres keeps whole.
    const NAME_BYTES_MAX: usize = 63;

    /// Reads `table`, `schema.table` or, for names with dots in them, `"sche.ma"."table"`.
    pub fn parse(text: &str) -> Option<Self> {
        let (first, rest) = Self::identifier(text)?;
        if rest.is_empty() {
            return Some(TableName { schema: None, table: first });
        }
        let (table, rest) = Self::identifier(rest.strip_prefix('.')?)?;
        rest.is_empty().then_some(TableName { schema: Some(first), table })
    }

    /// The identifier at the start of `text`, without its quotes, and what follows it.
    fn identifier(text: &str) -> Option<(String, &str)> {
        let (name, rest) = match text.strip_prefix('"') {
            Some(quoted) => {
                // A quote in the name is doubled.
                let end = quoted.replace("\"\"", "__").find('"')?;
                (quoted.get(..end)?.replace("\"\"", "\""), quoted.get(end + 1..)?)
            }
            None => {
                let (name, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
                if name.contains(|c: char| c == '"' || c.is_whitespace() || c.is_control()) {
                    return None;
                }
                (name.to_owned(), rest)
            }
        };
        ((1..=Self::NAME_BYTES_MAX).contains(&name.len()) && !name.contains('\0')).then_some((name, rest))
    }

    /// The name as it is safe to stand in SQL.
    pub fn quoted(&self) -> String {
        match &self.schema {
            Some(schema) => format!("{}.{}", quote_identifier(schema), quote_identifier(&self.table)),
            None => quote_identifier(&self.table),
        }
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.schema {
            Some(schema) => write!(f, "{schema}.{}", self.table),
            None => f.write_str(&self.table),
        }
    }
}

/// A name as it is safe to stand in SQL.
pub(crate) fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests;
