//! Every key of the configuration: one table that all else is derived from.
//!
//! The shipped `config.yaml` is [`document`], byte for byte; a test holds the two together.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Config, ConnectionString, HookCapture, Place, Secret, TableName};

/// A section, in the order of the file.
pub(super) struct Section {
    pub name: &'static str,
    pub about: &'static str,
}

/// A key: what it means, what it may be, and where its value goes.
pub(super) struct Key {
    pub section: &'static str,
    pub name: &'static str,
    /// As it would be written in the file.
    pub default: &'static str,
    pub about: &'static [&'static str],
    pub kind: Kind,
}

/// What values a key takes. Bounds are inclusive; `set` stores a value that has passed them.
pub(super) enum Kind {
    Whole {
        min: u64,
        max: u64,
        unit: Unit,
        set: fn(&mut Config, u64),
    },
    /// A duration in seconds, fractions allowed.
    Seconds {
        min: f64,
        max: f64,
        set: fn(&mut Config, Duration),
    },
    Milliseconds {
        min: u64,
        max: u64,
        set: fn(&mut Config, Duration),
    },
    Flag {
        set: fn(&mut Config, bool),
    },
    Path {
        set: fn(&mut Config, PathBuf),
    },
    /// One path, or a list of 1 to `entries_max`; none of them lies in another.
    Paths {
        entries_max: usize,
        set: fn(&mut Config, Vec<PathBuf>),
    },
    OptionalPath {
        set: fn(&mut Config, Option<PathBuf>),
    },
    /// Text that `set` reads; `None` is null, for which `nullable` must be true.
    Text {
        expected: &'static str,
        nullable: bool,
        secret: bool,
        set: fn(&mut Config, Option<&str>, &Giver) -> Result<(), Refusal>,
    },
    Texts {
        entries_max: usize,
        chars_max: usize,
        set: fn(&mut Config, Vec<String>),
    },
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Count,
    Bytes,
}

/// Who gave a text, for values that are read again later.
pub(super) struct Giver<'a> {
    pub place: &'a Place,
    /// Folder to which relative paths are relative.
    pub folder: &'a Path,
}

/// Why a value is not taken.
pub(super) enum Refusal {
    /// It is not what the key expects.
    Other,
    /// A reason of its own, which shows no secret.
    Because(String),
}

impl Key {
    /// `section.key`.
    pub(super) fn path(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }

    /// The twin in the environment.
    pub(super) fn variable(&self) -> String {
        format!("{VARIABLE_PREFIX}{}__{}", self.section.to_uppercase(), self.name.to_uppercase())
    }

    /// What a value must be: used by errors and by the documented file alike.
    pub(super) fn expected(&self) -> String {
        match self.kind {
            Kind::Whole { min, max, unit: Unit::Count, .. } => format!("a whole number from {min} to {max}"),
            Kind::Whole { min, max, unit: Unit::Bytes, .. } => format!("a whole number of bytes from {min} to {max}"),
            Kind::Seconds { min, max, .. } => format!("a number of seconds from {min} to {max}"),
            Kind::Milliseconds { min, max, .. } => format!("a whole number of milliseconds from {min} to {max}"),
            Kind::Flag { .. } => "true or false".to_owned(),
            Kind::Path { .. } => "a path".to_owned(),
            Kind::Paths { entries_max, .. } => format!("a path or a list of 1 to {entries_max} paths"),
            Kind::OptionalPath { .. } => "a path or null".to_owned(),
            Kind::Text { expected, nullable: true, .. } => format!("{expected}, or null"),
            Kind::Text { expected, nullable: false, .. } => expected.to_owned(),
            Kind::Texts { entries_max, chars_max, .. } => {
                format!("a list of at most {entries_max} texts of 1 to {chars_max} characters")
            }
        }
    }

    pub(super) fn is_secret(&self) -> bool {
        matches!(self.kind, Kind::Text { secret: true, .. })
    }
}

/// What the variables that are twins of keys start with; two underscores follow the section.
pub(super) const VARIABLE_PREFIX: &str = "HEADSPACE_";

pub(super) const SECTIONS: &[Section] = &[
    Section { name: "claude", about: "Where Claude Code keeps what is watched." },
    Section { name: "file_watcher", about: "How transcripts are followed." },
    Section { name: "event_system", about: "Tries, restarts, limits." },
    Section { name: "database", about: "How events reach Postgres." },
    Section { name: "queue", about: "Where events wait until Postgres has them." },
    Section { name: "http", about: "Health, metrics, and the door for other programs' events." },
    Section { name: "schemas", about: "What an event of each type must look like." },
    Section { name: "hooks", about: "What Claude Code's hooks may add." },
    Section { name: "redact", about: "What is struck out of text before anything is written." },
];

pub(super) const KEYS: &[Key] = &[
    Key {
        section: "claude",
        name: "projects_path",
        default: "~/.claude/projects",
        about: &[
            "Folder of the transcripts, with a folder for each project in it; or a list of such folders.",
            "If CLAUDE_CONFIG_DIR is set, it replaces ~/.claude.",
        ],
        kind: Kind::Paths { entries_max: 16, set: |config, paths| config.claude.projects_paths = paths },
    },
    Key {
        section: "file_watcher",
        name: "polling_interval",
        default: "2",
        about: &["Time between rescans of all files. Notifications from the system only make it faster."],
        kind: Kind::Seconds { min: 0.05, max: 3600.0, set: |config, time| config.file_watcher.polling_interval = time },
    },
    Key {
        section: "file_watcher",
        name: "inactivity_timeout",
        default: "5400",
        about: &["Quiet after which a session counts as ended. Not below polling_interval."],
        kind: Kind::Seconds {
            min: 0.1,
            max: 3_153_600_000.0,
            set: |config, time| config.file_watcher.inactivity_timeout = time,
        },
    },
    Key {
        section: "file_watcher",
        name: "debounce_interval",
        default: "0",
        about: &["How long changes of one file are gathered before it is read; 0 reads at once."],
        kind: Kind::Seconds { min: 0.0, max: 60.0, set: |config, time| config.file_watcher.debounce_interval = time },
    },
    Key {
        section: "file_watcher",
        name: "max_line_bytes",
        default: "67108864",
        about: &["A longer line of a transcript is passed over, counted and logged."],
        kind: Kind::Whole {
            min: 4096,
            max: 1 << 30,
            unit: Unit::Bytes,
            set: |config, bytes| config.file_watcher.max_line_bytes = bytes,
        },
    },
    Key {
        section: "event_system",
        name: "write_retry_attempts",
        default: "3",
        about: &[
            "Tries before an event that Postgres refuses becomes a dead letter.",
            "Outages don't count: they are retried without end.",
        ],
        kind: Kind::Whole {
            min: 1,
            max: 100,
            unit: Unit::Count,
            set: |config, tries| config.event_system.write_retry_attempts = whole(tries),
        },
    },
    Key {
        section: "event_system",
        name: "write_retry_delay_ms",
        default: "100",
        about: &["Pause after the first failed write; doubles with each further one."],
        kind: Kind::Milliseconds {
            min: 1,
            max: 60_000,
            set: |config, time| config.event_system.write_retry_delay = time,
        },
    },
    Key {
        section: "event_system",
        name: "write_retry_max_delay_ms",
        default: "2000",
        about: &["What that pause grows to. Not below write_retry_delay_ms."],
        kind: Kind::Milliseconds {
            min: 1,
            max: 600_000,
            set: |config, time| config.event_system.write_retry_max_delay = time,
        },
    },
    Key {
        section: "event_system",
        name: "max_restarts_per_minute",
        default: "5",
        about: &["Restarts within 60 seconds after which scripts/run-watcher.sh gives up."],
        kind: Kind::Whole {
            min: 1,
            max: 60,
            unit: Unit::Count,
            set: |config, restarts| config.event_system.max_restarts_per_minute = whole(restarts),
        },
    },
    Key {
        section: "event_system",
        name: "shutdown_timeout_seconds",
        default: "2",
        about: &["Time within which a stop is done, whatever is pending or hanging."],
        kind: Kind::Seconds { min: 0.1, max: 60.0, set: |config, time| config.event_system.shutdown_timeout = time },
    },
    Key {
        section: "event_system",
        name: "max_event_bytes",
        default: "16777216",
        about: &[
            "A larger event is rejected, by its texts as they came in or as it would be stored. Not above",
            "queue.max_pending_bytes.",
        ],
        kind: Kind::Whole {
            min: 1024,
            max: 1 << 28,
            unit: Unit::Bytes,
            set: |config, bytes| config.event_system.max_event_bytes = bytes,
        },
    },
    Key {
        section: "database",
        name: "url",
        default: "null",
        about: &[
            "postgresql://user@host/db?sslmode=verify-full, or libpq's key=value form.",
            "Where it is null, DATABASE_URL serves, then libpq's PG* variables where PGHOST or PGHOSTADDR is among them;",
            "these also fill what a URL leaves out.",
            "Keep passwords out of this file: PGPASSWORD or ~/.pgpass.",
        ],
        kind: Kind::Text {
            expected: "a URL like postgresql://user@host/db",
            nullable: true,
            secret: true,
            set: |config, text, giver| {
                let parse = |text| ConnectionString::parse(text, giver.place.clone(), giver.folder);
                config.database.url = text.map(parse).transpose().map_err(Refusal::Because)?;
                Ok(())
            },
        },
    },
    Key {
        section: "database",
        name: "pool_size",
        default: "2",
        about: &["Connections held at most. One of them delivers, in order."],
        kind: Kind::Whole {
            min: 1,
            max: 64,
            unit: Unit::Count,
            set: |config, size| config.database.pool_size = whole(size),
        },
    },
    Key {
        section: "database",
        name: "connect_timeout_ms",
        default: "1000",
        about: &["Time for one attempt to connect. A connect_timeout in the URL or PGCONNECT_TIMEOUT overrides it."],
        kind: Kind::Milliseconds { min: 10, max: 60_000, set: |config, time| config.database.connect_timeout = time },
    },
    Key {
        section: "database",
        name: "statement_timeout_ms",
        default: "5000",
        about: &["Time for one statement, after which it is tried again."],
        kind: Kind::Milliseconds {
            min: 100,
            max: 3_600_000,
            set: |config, time| config.database.statement_timeout = time,
        },
    },
    Key {
        section: "database",
        name: "events_table",
        default: "events",
        about: &["Table of the events, written exactly as in the database: case matters."],
        kind: Kind::Text {
            expected: "a name of a table, or schema.table, each of 1 to 63 bytes",
            nullable: false,
            secret: false,
            set: |config, text, _| {
                config.database.events_table = text.and_then(TableName::parse).ok_or(Refusal::Other)?;
                Ok(())
            },
        },
    },
    Key {
        section: "database",
        name: "ledger_schema",
        default: "headspace_watcher",
        about: &["Schema of the program's own tables and routines: one for each table of events."],
        kind: Kind::Text {
            expected: "a name of 1 to 63 bytes",
            nullable: false,
            secret: false,
            set: |config, text, _| {
                config.database.ledger_schema = text.and_then(|text| name(text, 63)).ok_or(Refusal::Other)?;
                Ok(())
            },
        },
    },
    Key {
        section: "database",
        name: "auto_migrate",
        default: "true",
        about: &[
            "Whether missing tables and routines are created at the first connection. The events are never altered.",
        ],
        kind: Kind::Flag { set: |config, flag| config.database.auto_migrate = flag },
    },
    Key {
        section: "database",
        name: "notify_channel",
        default: "null",
        about: &["When set: each event's transaction sends its id on this NOTIFY channel."],
        kind: Kind::Text {
            expected: "a name of 1 to 63 bytes",
            nullable: true,
            secret: false,
            set: |config, text, _| {
                config.database.notify_channel = read(text, |text| name(text, 63))?;
                Ok(())
            },
        },
    },
    Key {
        section: "database",
        name: "host_name",
        default: "null",
        about: &[
            "What this machine is called in event_sources; null: what it calls itself.",
            "Needed where several watchers of one database would have the same name, as in containers.",
        ],
        kind: Kind::Text {
            expected: "a name of 1 to 253 bytes",
            nullable: true,
            secret: false,
            set: |config, text, _| {
                config.database.host_name = read(text, |text| name(text, 253))?;
                Ok(())
            },
        },
    },
    Key {
        section: "queue",
        name: "path",
        default: "data/queue",
        about: &["Folder of the queue on disk. Local disk only: one process at a time locks it."],
        kind: Kind::Path { set: |config, path| config.queue.path = path },
    },
    Key {
        section: "queue",
        name: "spool_path",
        default: "data/spool",
        about: &["Folder in which hooks leave their events while the watcher is down. Apart from queue.path."],
        kind: Kind::Path { set: |config, path| config.queue.spool_path = path },
    },
    Key {
        section: "queue",
        name: "max_pending_bytes",
        default: "4294967296",
        about: &["What may wait at most. Then reading stops, and the transcripts are the buffer; nothing is lost."],
        kind: Kind::Whole {
            min: 1 << 20,
            max: 1 << 40,
            unit: Unit::Bytes,
            set: |config, bytes| config.queue.max_pending_bytes = bytes,
        },
    },
    Key {
        section: "queue",
        name: "drain_window",
        default: "256",
        about: &["Transactions in flight at once, in order. 1 flushes each on its own."],
        kind: Kind::Whole {
            min: 1,
            max: 4096,
            unit: Unit::Count,
            set: |config, window| config.queue.drain_window = whole(window),
        },
    },
    Key {
        section: "http",
        name: "listen",
        default: "127.0.0.1:5056",
        about: &[
            "Address and port for HTTP; null turns TCP off, the socket stays.",
            "Beyond loopback only where token is set below.",
        ],
        kind: Kind::Text {
            expected: "an address with a port, like 127.0.0.1:5056",
            nullable: true,
            secret: false,
            set: |config, text, _| {
                config.http.listen = read(text, address)?;
                Ok(())
            },
        },
    },
    Key {
        section: "http",
        name: "socket",
        default: "data/watcher.sock",
        about: &[
            "Unix socket of the running watcher, for its owner only (mode 0600). Commands find the watcher by it.",
        ],
        kind: Kind::Path { set: |config, path| config.http.socket = path },
    },
    Key {
        section: "http",
        name: "token",
        default: "null",
        about: &[
            "Callers over TCP send it as \"Authorization: Bearer TOKEN\". Without it they read health, metrics and the page,",
            "without any text, and change nothing. null: one is made at the first start, in the file http.token beside",
            "the socket (data/http.token, mode 0600), and kept there.",
            "A token of your own is better in HEADSPACE_HTTP__TOKEN than in this file.",
        ],
        kind: Kind::Text {
            expected: Secret::TOKEN_RULE,
            nullable: true,
            secret: true,
            set: |config, text, _| {
                config.http.token = read(text, Secret::token)?;
                Ok(())
            },
        },
    },
    Key {
        section: "schemas",
        name: "path",
        default: "null",
        about: &["Folder whose *.json add to or replace the built-in schemas; a file's stem names its type."],
        kind: Kind::OptionalPath { set: |config, path| config.schemas.path = path },
    },
    Key {
        section: "hooks",
        name: "capture",
        default: "summary",
        about: &[
            "summary: no prompt text, no tool input or output.",
            "full: the hook's whole input, in the event's data.",
        ],
        kind: Kind::Text {
            expected: "summary or full",
            nullable: false,
            secret: false,
            set: |config, text, _| {
                config.hooks.capture = match text {
                    Some("summary") => HookCapture::Summary,
                    Some("full") => HookCapture::Full,
                    _ => return Err(Refusal::Other),
                };
                Ok(())
            },
        },
    },
    Key {
        section: "redact",
        name: "enabled",
        default: "false",
        about: &["Whether patterns act on text."],
        kind: Kind::Flag { set: |config, flag| config.redact.enabled = flag },
    },
    Key {
        section: "redact",
        name: "patterns",
        default: "[]",
        about: &[
            "Regular expressions, added to the built-in set for keys and tokens. Single quotes need no escapes.",
            "Write (?-u:\\b) for \\b: a Unicode word boundary can make text that is not ASCII 300 times as slow.",
        ],
        kind: Kind::Texts {
            entries_max: 100,
            chars_max: 1000,
            set: |config, patterns| config.redact.patterns = patterns,
        },
    },
];

/// The key called `section.name`.
pub(super) fn find(section: &str, name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.section == section && key.name == name)
}

/// `number`, which its key's range keeps far below the type's.
fn whole<T: TryFrom<u64>>(number: u64) -> T {
    T::try_from(number).unwrap_or_else(|_| unreachable!("ranges in KEYS fit their fields; a test tries their ends"))
}

/// A name of at most so many bytes.
fn name(text: &str, bytes_max: usize) -> Option<String> {
    let is_name = (1..=bytes_max).contains(&text.len()) && !text.contains(char::is_control);
    is_name.then(|| text.to_owned())
}

/// What `parse` makes of a text; null stays null.
fn read<T>(text: Option<&str>, parse: impl Fn(&str) -> Option<T>) -> Result<Option<T>, Refusal> {
    text.map(|text| parse(text).ok_or(Refusal::Other)).transpose()
}

fn address(text: &str) -> Option<SocketAddr> {
    match text.strip_prefix("localhost:") {
        Some(port) => Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port.parse().ok()?)),
        None => text.parse().ok(),
    }
}

/// The documented configuration, every key at its default: the text of the shipped `config.yaml`.
pub fn document() -> String {
    let mut text = String::from(HEAD);
    for section in SECTIONS {
        text.push_str(&format!("\n# {}\n{}:\n", section.about, section.name));
        for (index, key) in KEYS.iter().filter(|key| key.section == section.name).enumerate() {
            if index > 0 {
                text.push('\n');
            }
            for line in key.about {
                text.push_str(&format!("  # {line}\n"));
            }
            let expected = key.expected();
            let (first, rest) = expected.split_at(1);
            text.push_str(&format!("  # {}{rest}. Default {}.\n", first.to_uppercase(), key.default));
            text.push_str(&format!("  {}: {}\n", key.name, key.default));
        }
    }
    text
}

/// What the documented configuration opens with.
const HEAD: &str = "\
# Configuration of headspace-watcher. Every key is here, at its default: a file with only what differs does as well.
#
# Relative paths are relative to this file; ~ is the home folder.
# Every key has a twin in the environment that overrides it: HEADSPACE_ + section + __ + key, upper case, such as
# HEADSPACE_QUEUE__PATH. Empty means null there; lists are a,b or [\"a\", \"b\"].
# Unknown keys and wrong values end the program with exit code 78, naming line and key: headspace-watcher check.
";

#[cfg(test)]
mod tests {
    use super::*;

    /// To write it anew after a change of the table:
    /// `UPDATE_CONFIG=1 cargo test --lib config_yaml`.
    #[test]
    fn the_shipped_config_yaml_is_the_document_of_the_table() {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("config.yaml");
        if std::env::var_os("UPDATE_CONFIG").is_some() {
            std::fs::write(&shipped, document()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&shipped).unwrap(), document());
    }
}
