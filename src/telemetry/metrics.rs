//! What is counted: counters and histograms for `GET /metrics`, the summary in the log and the plots.
//!
//! Each is registered under its name with its help text, and written by the crate `prometheus`. Nothing is decided by these
//! numbers. The only user of that crate.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use prometheus::core::{Collector, Metric};
use prometheus::{Gauge, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry, TextEncoder};

use super::{LiveState, RecentEvents, UnknownFormats, is_name, lock};
use crate::event::Timestamp;

/// What [`Metrics::encode`] writes, for the header Content-Type.
pub(crate) const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A number that only grows.
pub struct Counter(IntCounter);

impl Counter {
    pub fn add(&self, count: u64) {
        self.0.inc_by(count);
    }

    pub fn get(&self) -> u64 {
        self.0.get()
    }
}

/// Labels that a family tells apart; later ones are counted as [`OTHER`].
const LABELS_MAX: usize = 64;

/// A longer label is counted as [`OTHER`].
const LABEL_BYTES_MAX: usize = 64;

/// The label of everything without a label of its own.
const OTHER: &str = "other";

/// Counters told apart by one label.
///
/// Some labels come from what was read, such as a line's type: what is no name may be text, and is counted as [`OTHER`].
pub struct CounterFamily {
    vector: IntCounterVec,
    counters: Mutex<BTreeMap<String, IntCounter>>,
}

impl CounterFamily {
    fn new(vector: IntCounterVec) -> CounterFamily {
        let family = CounterFamily { vector, counters: Mutex::default() };
        family.declare(OTHER);
        family
    }

    pub fn add(&self, label: &str, count: u64) {
        self.counter(label).inc_by(count);
    }

    /// Shows the label from now on, at 0 until something is added: a rate needs a number to start from.
    pub fn declare(&self, label: &str) {
        self.counter(label);
    }

    /// What was counted under the label.
    pub fn of(&self, label: &str) -> u64 {
        lock(&self.counters).get(label).map_or(0, IntCounter::get)
    }

    /// The sum over all labels.
    pub fn get(&self) -> u64 {
        lock(&self.counters).values().map(IntCounter::get).sum()
    }

    fn counter(&self, label: &str) -> IntCounter {
        let label = if is_name(label) && label.len() <= LABEL_BYTES_MAX { label } else { OTHER };
        let mut counters = lock(&self.counters);
        if let Some(counter) = counters.get(label) {
            return counter.clone();
        }
        let label = if counters.len() <= LABELS_MAX { label } else { OTHER };
        let new = || self.vector.with_label_values(&[label]);
        counters.entry(label.to_owned()).or_insert_with(new).clone()
    }
}

/// Upper bounds of a histogram's buckets, in seconds. From half a millisecond, below which nothing durable happens, to
/// an hour, above which an outage is told by the age of the oldest event.
const BUCKET_BOUNDS: [f64; 19] = [
    0.0005, 0.001, 0.0015, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
    3600.0,
];

/// How long something took, over all times it happened.
pub struct Histogram(prometheus::Histogram);

impl Histogram {
    /// `count` things took `duration` each.
    pub fn observe(&self, duration: Duration, count: u64) {
        for _ in 0..count {
            self.0.observe(duration.as_secs_f64());
        }
    }

    pub fn snapshot(&self) -> HistogramSnapshot {
        let metric = self.0.metric();
        let histogram = metric.get_histogram();
        let buckets = histogram.get_bucket().iter().map(|bucket| bucket.cumulative_count());
        HistogramSnapshot(buckets.chain([histogram.get_sample_count()]).collect())
    }
}

/// A histogram at one moment: how many took at most as long as each of [`BUCKET_BOUNDS`], and last how many there were.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct HistogramSnapshot(Vec<u64>);

impl HistogramSnapshot {
    pub fn count(&self) -> u64 {
        self.0.last().copied().unwrap_or_default()
    }

    /// What was added after `earlier`.
    pub fn since(&self, earlier: &HistogramSnapshot) -> HistogramSnapshot {
        let before = earlier.0.iter().copied().chain(std::iter::repeat(0));
        HistogramSnapshot(self.0.iter().zip(before).map(|(now, before)| now.saturating_sub(before)).collect())
    }

    /// The duration in seconds that the share `quantile` (0 to 1) does not exceed, interpolated inside its bucket as
    /// Prometheus does. `None` when nothing was observed; the largest bound for what lies above it.
    pub fn quantile(&self, quantile: f64) -> Option<f64> {
        let rank = quantile * self.count() as f64;
        let (mut lower, mut below) = (0.0, 0);
        for (bound, &up_to) in BUCKET_BOUNDS.into_iter().zip(&self.0) {
            if up_to as f64 >= rank && up_to > below {
                return Some(lower + (bound - lower) * (rank - below as f64) / (up_to - below) as f64);
            }
            (lower, below) = (bound, up_to);
        }
        (self.count() > 0).then_some(lower)
    }
}

/// Why all transcripts were scanned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RescanCause {
    Start,
    /// `polling_interval` was over.
    Interval,
    /// The system lost notifications.
    Overflow,
    /// A new file or folder: more may have been born in it before its watch was set.
    NewFolder,
}

impl RescanCause {
    pub const ALL: [RescanCause; 4] =
        [RescanCause::Start, RescanCause::Interval, RescanCause::Overflow, RescanCause::NewFolder];

    pub fn as_str(self) -> &'static str {
        match self {
            RescanCause::Start => "start",
            RescanCause::Interval => "interval",
            RescanCause::Overflow => "overflow",
            RescanCause::NewFolder => "new_folder",
        }
    }
}

/// Everything that is counted since the start of the process, and what the parts say of themselves beside it.
pub struct Metrics {
    registry: Registry,
    // intake
    pub lines_read: Counter,
    pub bad_lines: Counter,
    /// By type.
    pub events_captured: CounterFamily,
    /// By type, as the caller named it.
    pub events_rejected: CounterFamily,
    /// Lines of the user's side that are no turns, by reason.
    pub lines_skipped: CounterFamily,
    /// Values that the format had not when this was written, by field.
    pub format_unknown: CounterFamily,
    /// The same with their values.
    pub unknown_formats: UnknownFormats,
    /// By name of the line's type.
    pub unknown_line_types: CounterFamily,
    /// By [`RescanCause`].
    pub rescans: CounterFamily,
    /// From being handed to the queue to being durable in it.
    pub capture_seconds: Histogram,
    pub(crate) recent_events: RecentEvents,
    // sink
    /// By type.
    pub events_delivered: CounterFamily,
    pub events_duplicate: Counter,
    /// By reason, a [`FailureKind`](crate::event::FailureKind).
    pub events_dead_lettered: CounterFamily,
    /// By what followed from it: again, operator, event.
    pub write_failures: CounterFamily,
    /// From being given to the sink to being durable in Postgres, the whole window.
    pub delivery_seconds: Histogram,
    /// From being captured to being durable in Postgres, outages included.
    pub end_to_end_seconds: Histogram,
    /// What health is judged by.
    pub(crate) live: LiveState,
}

impl Default for Metrics {
    fn default() -> Self {
        let registry = registry();
        let counter = |name, help| Counter(registered(&registry, IntCounter::new(name, help)));
        let family = |name: &str, help, label| {
            CounterFamily::new(registered(&registry, IntCounterVec::new(Opts::new(name, help), &[label])))
        };
        let histogram = |name: &str, help: &str| {
            let options = HistogramOpts::new(name, help).buckets(BUCKET_BOUNDS.to_vec());
            Histogram(registered(&registry, prometheus::Histogram::with_opts(options)))
        };
        Metrics {
            lines_read: counter("lines_read_total", "Lines of transcripts that were read."),
            bad_lines: counter("bad_lines_total", "Lines that are no JSON object or too long."),
            events_captured: family("events_captured_total", "Events durable in the queue.", "type"),
            events_rejected: family("events_rejected_total", "Events that failed the check.", "type"),
            lines_skipped: family("lines_skipped_total", "Lines of the user's side that are no turns.", "reason"),
            format_unknown: family("format_unknown_total", "Lines that this version does not know all of.", "field"),
            unknown_formats: UnknownFormats::default(),
            unknown_line_types: family("unknown_line_types_total", "Lines of types that are not known.", "type"),
            rescans: family("rescans_total", "Scans of all transcripts, by their cause.", "cause"),
            capture_seconds: histogram("capture_seconds", "From handed to the queue to durable there."),
            recent_events: RecentEvents::default(),
            events_delivered: family("events_delivered_total", "Events stored in Postgres.", "type"),
            events_duplicate: counter("events_duplicate_total", "Events that Postgres had already."),
            events_dead_lettered: family("events_dead_lettered_total", "Moved to the dead letters.", "reason"),
            write_failures: family("write_failures_total", "Deliveries that failed, by what follows.", "class"),
            delivery_seconds: histogram("delivery_seconds", "From sent to Postgres to durable there."),
            end_to_end_seconds: histogram("end_to_end_seconds", "From captured to durable in Postgres."),
            live: LiveState::default(),
            registry,
        }
    }
}

impl Metrics {
    pub fn rescanned(&self, cause: RescanCause, now: Timestamp) {
        self.rescans.add(cause.as_str(), 1);
        self.live.last_rescan.set(Some(now));
    }

    /// Everything in Prometheus' text format, with gauges whose value is known only now: name, help and value.
    pub(crate) fn encode(&self, gauges: &[(&str, &str, f64)]) -> String {
        let current = registry();
        for (name, help, value) in gauges {
            registered(&current, Gauge::new(*name, *help)).set(*value);
        }
        let families = [self.registry.gather(), current.gather()].concat();
        TextEncoder::new().encode_to_string(&families).expect("every family has a sample")
    }
}

fn registry() -> Registry {
    Registry::new_custom(Some("headspace_watcher".to_owned()), None).expect("the prefix is not empty")
}

/// All names and help texts are constants of this program, and each name is used once.
fn registered<M: Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<M>) -> M {
    let metric = metric.expect("a valid name with a help text");
    registry.register(Box::new(metric.clone())).expect("a name is registered once");
    metric
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_tells_labels_apart_and_has_a_limit() {
        let family = Metrics::default().events_captured;
        family.declare("declared");
        for number in 0..LABELS_MAX + 10 {
            family.add(&format!("label_{number}"), 2);
        }
        family.add("label_0", 1);
        assert_eq!((family.of("declared"), family.of("label_0")), (0, 3));
        assert_eq!(family.of(OTHER), 22, "one place is the declared label's");
        assert_eq!(family.get(), 2 * (LABELS_MAX as u64 + 10) + 1);
        assert_eq!(lock(&family.counters).len(), LABELS_MAX + 1);
    }

    #[test]
    fn what_is_no_name_is_no_label() {
        let metrics = Metrics::default();
        let long = "x".repeat(LABEL_BYTES_MAX + 1);
        let labels = ["file-history", "a\"} 1\nb\\\r", "my secret", "geh\u{e4}ssig", &long];
        for (label, count) in labels.into_iter().zip([1, 2, 4, 8, 16]) {
            metrics.unknown_line_types.add(label, count);
        }
        let text = metrics.encode(&[]);
        let samples: Vec<&str> =
            text.lines().filter(|line| line.starts_with("headspace_watcher_unknown_line_types_total{")).collect();
        let expected = [("file-history", 1), ("other", 2 + 4 + 8 + 16)];
        let expected = expected
            .map(|(label, count)| format!("headspace_watcher_unknown_line_types_total{{type=\"{label}\"}} {count}"));
        assert_eq!(samples, expected);
    }

    #[test]
    fn threads_that_add_a_new_label_at_once_lose_nothing() {
        let family = Metrics::default().events_captured;
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|number| family.add(&format!("{}", number % 40), 1)));
            }
        });
        assert_eq!((family.get(), family.of("39")), (4000, 100));
    }

    #[test]
    fn quantiles_are_interpolated_and_those_of_an_interval_forget_what_was_before() {
        let histogram = Metrics::default().end_to_end_seconds;
        assert_eq!(histogram.snapshot().quantile(0.5), None);
        histogram.observe(Duration::from_secs(20), 100);
        let before = histogram.snapshot();
        histogram.observe(Duration::from_micros(1800), 100);
        let since = histogram.snapshot().since(&before);
        assert_eq!(since.count(), 100);
        assert_eq!(since.quantile(0.5), Some(0.002), "half way through the bucket from 1.5 to 2.5 ms");
        assert_eq!(since.quantile(1.0), Some(0.0025));
        assert_eq!(before.since(&HistogramSnapshot::default()), before);
        histogram.observe(Duration::from_secs(9999), 1);
        assert_eq!(histogram.snapshot().quantile(1.0), Some(3600.0));
    }
}
