//! The log: lines on stderr, text for people and JSON for everything else.

use std::io::IsTerminal;

use tracing::Level;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum LogFormat {
    /// Text on a terminal, else JSON.
    #[default]
    Auto,
    Text,
    Json,
}

/// Starts logging to stderr. `level` is one of tracing's levels; libraries log warnings and errors only.
///
/// Text has colours on a terminal, unless `NO_COLOR` is set to something.
pub(crate) fn start_logging(format: LogFormat, level: Level) {
    let terminal = std::io::stderr().is_terminal();
    let colours = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let filter = EnvFilter::new(format!("warn,headspace_watcher={level}"));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
        LogFormat::Auto if !terminal => lines.json().flatten_event(true).boxed(),
        LogFormat::Auto | LogFormat::Text => lines.with_target(false).with_ansi(colours).boxed(),
    };
    // A second start (in tests) keeps the first.
    let _ = tracing_subscriber::registry().with(filter).with(lines).try_init();
}
