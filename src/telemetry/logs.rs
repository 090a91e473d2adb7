//! The log: lines on stderr, text for people and JSON for everything else.

use std::io::{self, IsTerminal, Write};

use indicatif::ProgressBar;
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
/// Text has colours on a terminal, unless `NO_COLOR` is set to something. Lines stand above `progress`, while it is shown.
pub(crate) fn start_logging(format: LogFormat, level: Level, progress: ProgressBar) {
    let terminal = std::io::stderr().is_terminal();
    let colours = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let filter = EnvFilter::new(format!("warn,headspace_watcher={level}"));
    let lines = tracing_subscriber::fmt::layer().with_writer(move || AboveProgress(progress.clone()));
    let lines = match format {
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
        LogFormat::Auto if !terminal => lines.json().flatten_event(true).boxed(),
        LogFormat::Auto | LogFormat::Text => lines.with_target(false).with_ansi(colours).boxed(),
    };
    // A second start (in tests) keeps the first.
    let _ = tracing_subscriber::registry().with(filter).with(lines).try_init();
}

/// Standard error; the bar is taken away while a line is written.
struct AboveProgress(ProgressBar);

impl Write for AboveProgress {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
