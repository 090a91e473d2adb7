//! What the operator decides: `config.yaml`, its twins in the environment, and how to reach Postgres.
//!
//! [`Config::load`] reads everything once, checks it whole and answers with typed values or with every mistake at once,
//! each naming file, line, key, what was expected and what was found. It touches nothing but the file it is given:
//! environment and current folder are arguments ([`Environment`]).
//!
//! ```text
//! built-in default  <  config.yaml  <  HEADSPACE_SECTION__KEY
//! ```
//!
//! One table, `keys::KEYS`, declares every key with its default, range, unit and meaning. Defaults, range errors,
//! nearest-key suggestions, the environment twins and the shipped `config.yaml` all come from it.
//!
//! Secrets (`database.url`, `http.token`, passwords) are [`Secret`]s: they never show in a log or an error.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

mod database;
mod environment;
mod keys;
mod load;
mod problem;
mod yaml;

pub use database::{ChannelBinding, ClientCertificate, DatabaseHost, DatabaseTarget, Keepalive, Ssl, SslMode};
pub use environment::Environment;
pub use keys::document;
pub use problem::{ConfigError, Place, Problem};

/// File that is read from the current folder when none is named.
pub const CONFIG_FILE: &str = "config.yaml";

/// Everything that can be configured, checked. Paths are absolute.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub claude: ClaudeConfig,
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
#[derive(Clone, Debug, PartialEq)]
pub struct ClaudeConfig {
    /// At least one; none of them is or lies in another.
    pub projects_paths: Vec<PathBuf>,
}

/// Section `file_watcher`: how transcripts are followed.
#[derive(Clone, Debug, PartialEq)]
pub struct FileWatcherConfig {
    /// Time between rescans; notifications only make it faster.
    pub polling_interval: Duration,
    /// Quiet after which a session has ended.
    pub inactivity_timeout: Duration,
    /// How long changes of one file are gathered before it is read; zero reads at once.
    pub debounce_interval: Duration,
    pub max_line_bytes: u64,
}

/// Section `event_system`: tries, restarts, limits.
#[derive(Clone, Debug, PartialEq)]
pub struct EventSystemConfig {
    pub write_retry_attempts: u32,
    /// First pause after a failed write (`write_retry_delay_ms`).
    pub write_retry_delay: Duration,
    /// What the doubling pause grows to (`write_retry_max_delay_ms`); never below `write_retry_delay`.
    pub write_retry_max_delay: Duration,
    pub max_restarts_per_minute: u32,
    /// Time within which a stop must be done (`shutdown_timeout_seconds`).
    pub shutdown_timeout: Duration,
    pub max_event_bytes: u64,
}

/// Section `database`: how events are delivered.
#[derive(Clone, Debug, PartialEq)]
pub struct DatabaseConfig {
    pub url: Option<ConnectionString>,
    pub pool_size: u32,
    /// Time for one attempt to connect (`connect_timeout_ms`).
    pub connect_timeout: Duration,
    /// Limit for one statement (`statement_timeout_ms`).
    pub statement_timeout: Duration,
    pub events_table: TableName,
    /// Schema of the program's own tables and routines.
    pub ledger_schema: String,
    pub auto_migrate: bool,
    pub notify_channel: Option<String>,
    /// What this machine is called in `event_sources`; `None`: what it calls itself.
    pub host_name: Option<String>,
}

/// Section `queue`: where events wait.
#[derive(Clone, Debug, PartialEq)]
pub struct QueueConfig {
    pub path: PathBuf,
    /// Folder in which hooks leave their events while the watcher is down; never inside `path`.
    pub spool_path: PathBuf,
    pub max_pending_bytes: u64,
    /// Transactions in flight at once, in order.
    pub drain_window: usize,
}

/// Section `http`: the watcher's own door.
#[derive(Clone, Debug, PartialEq)]
pub struct HttpConfig {
    /// `None` turns TCP off. An address that is not loopback comes with a configured token only.
    pub listen: Option<SocketAddr>,
    /// The Unix socket, short enough to be bound.
    pub socket: PathBuf,
    /// What callers on TCP show; `None`: the one in [`HttpConfig::token_file`].
    pub token: Option<Secret>,
}

impl HttpConfig {
    /// The file in which a token is made where none is configured: `http.token` beside the socket.
    pub fn token_file(&self) -> PathBuf {
        self.socket.with_file_name("http.token")
    }
}

/// Section `schemas`: additions to the built-in event types.
#[derive(Clone, Debug, PartialEq)]
pub struct SchemasConfig {
    pub path: Option<PathBuf>,
}

/// Section `hooks`: what of a hook's input is kept.
#[derive(Clone, Debug, PartialEq)]
pub struct HooksConfig {
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

/// Section `redact`: what is struck out of text before anything is written.
#[derive(Clone, Debug, PartialEq)]
pub struct RedactConfig {
    pub enabled: bool,
    /// Added to the built-in set for keys and tokens. Not compiled here.
    pub patterns: Vec<String>,
}

/// A configuration, and where it came from.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    /// Absolute path of the file that was read; `None` when built-in defaults serve.
    pub file: Option<PathBuf>,
    /// Names of the environment variables that set a key.
    pub variables: Vec<String>,
    /// The effective value of each key, by `section.key`.
    values: BTreeMap<String, Secret>,
}

impl Loaded {
    /// The effective value of `key` (`section.key`) as `config.yaml` would have it: `null`, `true`, `2`. Paths are
    /// absolute, lists are JSON. Secrets are shown.
    ///
    /// # Errors
    /// There is no such key; names one that is like it.
    pub fn value(&self, key: &str) -> Result<&str, String> {
        self.values.get(key).map(Secret::reveal).ok_or_else(|| load::unknown_key(key))
    }
}

impl Config {
    /// Reads `file`, else `config.yaml` in the current folder where there is one, else takes the built-in defaults;
    /// then what the environment sets.
    ///
    /// Relative paths, also those of the environment, are relative to the folder of the file (without a file: to the
    /// current folder). `~` is the home, and `CLAUDE_CONFIG_DIR` moves `~/.claude`.
    ///
    /// # Errors
    /// Every mistake found, not only the first.
    pub fn load(file: Option<&Path>, environment: &Environment) -> Result<Loaded, ConfigError> {
        load::load(file, environment)
    }

    /// As [`Config::load`], for who must go on whatever is wrong: what can't be used has its default. Says also whether
    /// nothing was wrong.
    pub fn load_leniently(file: Option<&Path>, environment: &Environment) -> (Loaded, bool) {
        load::load_leniently(file, environment)
    }
}

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

/// `database.url` as it was given: it may hold a password, and knows who gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionString {
    text: Secret,
    place: Place,
    /// Folder to which paths in it are relative.
    folder: PathBuf,
}

impl ConnectionString {
    /// `text` as it was given at `place`; relative paths in it are relative to `folder`.
    ///
    /// # Errors
    /// What is wrong with it, without any secret.
    pub fn parse(text: &str, place: Place, folder: &Path) -> Result<Self, String> {
        database::parse(text)?;
        Ok(ConnectionString { text: Secret::new(text), place, folder: folder.to_owned() })
    }

    /// Who gave it, for messages: `database.url in config.yaml`.
    fn source(&self) -> String {
        match &self.place {
            Place::File { path, .. } => format!("database.url in {}", path.display()),
            Place::Variable(name) => name.clone(),
            Place::Default => "database.url".to_owned(),
        }
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
        let mut names = Vec::new();
        let mut rest = text;
        loop {
            let (name, after) = Self::name(rest)?;
            if name.is_empty() || name.len() > Self::NAME_BYTES_MAX || name.contains('\0') {
                return None;
            }
            names.push(name);
            match after.strip_prefix('.') {
                Some(more) => rest = more,
                None if after.is_empty() => break,
                None => return None,
            }
        }
        let table = names.pop()?;
        let schema = names.pop();
        names.is_empty().then_some(TableName { schema, table })
    }

    /// The first name of `text` and what follows it.
    fn name(text: &str) -> Option<(String, &str)> {
        let Some(quoted) = text.strip_prefix('"') else {
            let end = text.find('.').unwrap_or(text.len());
            let (name, after) = text.split_at(end);
            let plain = !name.contains(|c: char| c == '"' || c.is_whitespace() || c.is_control());
            return plain.then(|| (name.to_owned(), after));
        };
        let mut name = String::new();
        let mut rest = quoted;
        loop {
            let (part, after) = rest.split_once('"')?;
            name.push_str(part);
            match after.strip_prefix('"') {
                Some(more) => {
                    name.push('"');
                    rest = more;
                }
                None => return Some((name, after)),
            }
        }
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
pub fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests;
