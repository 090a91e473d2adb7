//! The log: lines on stderr, text for people and JSON for everything else, with a limit on warnings that repeat.
//!
//! A warning from one place of the code is shown [`REPEATS_MAX`] times within [`REPEAT_WINDOW`]; the rest is held back
//! and counted, and the count is logged once. Warnings that name an event (`event_id`) are always shown: each is about
//! another one. Errors are never held back.

use std::collections::HashMap;
use std::fmt;
use std::io::IsTerminal;
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, warn};
use tracing_subscriber::layer::{Context, Filter, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use super::lock;

/// Warnings from one place that are shown within [`REPEAT_WINDOW`].
const REPEATS_MAX: u32 = 30;

const REPEAT_WINDOW: Duration = Duration::from_secs(60);

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LogFormat {
    /// Text on a terminal, else JSON.
    #[default]
    Auto,
    Text,
    Json,
}

/// Starts logging to stderr. `level` is one of tracing's levels; libraries log warnings and errors only.
///
/// Text has colours on a terminal, unless `NO_COLOR` is set to something.
pub fn start_logging(format: LogFormat, level: Level) {
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
    let _ = tracing_subscriber::registry().with(filter).with(limited(lines)).try_init();
}

fn limited<S: Subscriber + for<'a> LookupSpan<'a>>(lines: impl Layer<S>) -> impl Layer<S> {
    lines.with_filter(RepeatLimit)
}

/// Logs how many warnings were held back since the last call, one line for each place in the code.
pub fn report_held_back() {
    let held_back: Vec<(String, u64)> = lock(&REPEATS).values_mut().filter_map(Repeats::take_held_back).collect();
    for (warning, count) in held_back {
        warn!(warning, count, "warnings of one kind were held back, as there were so many of them");
    }
}

static REPEATS: LazyLock<Mutex<HashMap<Identifier, Repeats>>> = LazyLock::new(Mutex::default);

/// Warnings from one place of the code. There are as many of these as such places.
struct Repeats {
    began: Instant,
    shown: u32,
    held_back: u64,
    message: String,
}

impl Repeats {
    /// Whether one more is shown.
    fn admit(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.began) >= REPEAT_WINDOW {
            self.began = now;
            self.shown = 0;
        }
        if self.shown < REPEATS_MAX {
            self.shown += 1;
            return true;
        }
        self.held_back += 1;
        false
    }

    fn take_held_back(&mut self) -> Option<(String, u64)> {
        let count = std::mem::take(&mut self.held_back);
        (count > 0).then(|| (self.message.clone(), count))
    }
}

/// Holds back warnings that repeat.
struct RepeatLimit;

impl<S: Subscriber> Filter<S> for RepeatLimit {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() != Level::WARN || metadata.fields().field("event_id").is_some() {
            return true;
        }
        let now = Instant::now();
        let mut repeats = lock(&REPEATS);
        let repeats = repeats.entry(metadata.callsite()).or_insert_with(|| {
            let mut message = Message::default();
            event.record(&mut message);
            Repeats { began: now, shown: 0, held_back: 0, message: message.0 }
        });
        repeats.admit(now)
    }
}

/// The message of an event.
#[derive(Default)]
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_is_shown_so_often_in_a_minute_and_the_rest_is_counted() {
        let begin = Instant::now();
        let mut repeats = Repeats { began: begin, shown: 0, held_back: 0, message: "a warning".to_owned() };
        let shown = (0..100).filter(|_| repeats.admit(begin + Duration::from_secs(59))).count();
        assert_eq!(shown as u32, REPEATS_MAX);
        assert_eq!(repeats.take_held_back(), Some(("a warning".to_owned(), 70)));
        assert_eq!(repeats.take_held_back(), None);
        assert!(repeats.admit(begin + REPEAT_WINDOW), "the next minute begins anew");
    }
}
