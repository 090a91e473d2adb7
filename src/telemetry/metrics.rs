//! The numbers: counters, gauges and histograms of plain atomics.
//!
//! Adding to them takes neither a lock nor memory, whatever the label; reading them is for `/metrics`, health and the
//! summary in the log, which turn them into text. There is no registry: [`Metrics`] is all there is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::{Activity, UnknownFormats, lock};

/// A number that only grows.
#[derive(Default, Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Default, Debug)]
pub struct Gauge(AtomicU64);

impl Gauge {
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Labels that a family keeps apart; what comes later is counted as [`OTHER`].
const LABELS_MAX: usize = 64;

/// Bytes of a label that are kept.
const LABEL_BYTES_MAX: usize = 64;

/// The label of whatever found no place of its own.
pub const OTHER: &str = "other";

/// Counters told apart by one label. Places are taken once and never given back, so that adding needs no lock.
#[derive(Debug)]
pub struct CounterFamily {
    places: [OnceLock<(Box<str>, Counter)>; LABELS_MAX],
    other: Counter,
}

impl Default for CounterFamily {
    fn default() -> Self {
        CounterFamily { places: [const { OnceLock::new() }; LABELS_MAX], other: Counter::default() }
    }
}

impl CounterFamily {
    pub fn add(&self, label: &str, count: u64) {
        self.counter(label).add(count);
    }

    /// Shows the label from now on, at 0 until something is added: a rate needs a number to start from.
    pub fn declare(&self, label: &str) {
        self.counter(label);
    }

    /// What was counted under the label.
    pub fn of(&self, label: &str) -> u64 {
        self.labels().find(|(name, _)| *name == shortened(label)).map_or(0, |(_, count)| count)
    }

    /// The sum over all labels.
    pub fn get(&self) -> u64 {
        self.labels().map(|(_, count)| count).sum()
    }

    /// Every label with its count, in the order of their first appearance.
    pub fn labels(&self) -> impl Iterator<Item = (&str, u64)> {
        let placed = self.places.iter().map_while(OnceLock::get).map(|(name, counter)| (&**name, counter.get()));
        placed.chain(Some((OTHER, self.other.get())).filter(|(_, count)| *count > 0))
    }

    fn counter(&self, label: &str) -> &Counter {
        let label = shortened(label);
        for place in &self.places {
            let (name, counter) = place.get_or_init(|| (label.into(), Counter::default()));
            if **name == *label {
                return counter;
            }
        }
        &self.other
    }
}

fn shortened(label: &str) -> &str {
    let mut end = label.len().min(LABEL_BYTES_MAX);
    while !label.is_char_boundary(end) {
        end -= 1;
    }
    label.get(..end).unwrap_or_default()
}

/// Upper bounds of a histogram's buckets, in seconds. From half a millisecond, below which nothing durable happens, to
/// an hour, above which an outage is told by the age of the oldest event.
pub const BUCKET_BOUNDS: [f64; 19] = [
    0.0005, 0.001, 0.0015, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
    3600.0,
];

const BUCKETS: usize = BUCKET_BOUNDS.len() + 1;

/// How long something took, over all times it happened.
#[derive(Default, Debug)]
pub struct Histogram {
    /// One for each bound and one above all; not cumulative.
    buckets: [AtomicU64; BUCKETS],
    sum_nanoseconds: AtomicU64,
}

impl Histogram {
    /// `count` things took `duration` each.
    pub fn observe(&self, duration: Duration, count: u64) {
        let seconds = duration.as_secs_f64();
        let index = BUCKET_BOUNDS.partition_point(|bound| *bound < seconds);
        if let Some(bucket) = self.buckets.get(index) {
            bucket.fetch_add(count, Ordering::Relaxed);
        }
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).saturating_mul(count);
        self.sum_nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    pub fn snapshot(&self) -> HistogramSnapshot {
        HistogramSnapshot {
            buckets: std::array::from_fn(|index| self.buckets.get(index).map_or(0, |b| b.load(Ordering::Relaxed))),
            sum_seconds: self.sum_nanoseconds.load(Ordering::Relaxed) as f64 / 1e9,
        }
    }
}

/// A histogram at one moment.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
pub struct HistogramSnapshot {
    buckets: [u64; BUCKETS],
    pub sum_seconds: f64,
}

impl HistogramSnapshot {
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Upper bound in seconds (infinite for the last) and how many took at most that long.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> {
        let bounds = BUCKET_BOUNDS.into_iter().chain([f64::INFINITY]);
        bounds.zip(self.buckets).scan(0, |below, (bound, count)| {
            *below += count;
            Some((bound, *below))
        })
    }

    /// What was added after `earlier`.
    pub fn since(&self, earlier: &HistogramSnapshot) -> HistogramSnapshot {
        let mut buckets = self.buckets;
        for (bucket, before) in buckets.iter_mut().zip(earlier.buckets) {
            *bucket = bucket.saturating_sub(before);
        }
        HistogramSnapshot { buckets, sum_seconds: (self.sum_seconds - earlier.sum_seconds).max(0.0) }
    }

    /// The duration in seconds that the share `quantile` (0 to 1) does not exceed, interpolated inside its bucket as
    /// Prometheus does. `None` when nothing was observed; the largest bound for what lies above it.
    pub fn quantile(&self, quantile: f64) -> Option<f64> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let rank = quantile * count as f64;
        let (mut lower, mut below) = (0.0, 0);
        for (bound, up_to) in self.cumulative() {
            if up_to as f64 >= rank && up_to > below {
                if bound.is_infinite() {
                    return Some(lower);
                }
                return Some(lower + (bound - lower) * (rank - below as f64) / (up_to - below) as f64);
            }
            (lower, below) = (bound, up_to);
        }
        None
    }
}

/// The moment at which something last went on.
#[derive(Debug)]
pub struct Beat {
    epoch: Instant,
    milliseconds: AtomicU64,
}

impl Default for Beat {
    fn default() -> Self {
        Beat { epoch: Instant::now(), milliseconds: AtomicU64::new(0) }
    }
}

impl Beat {
    pub fn beat(&self) {
        let now = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.milliseconds.fetch_max(now, Ordering::Relaxed);
    }

    /// Time since the last beat, or since the start when there was none.
    pub fn age(&self, now: Instant) -> Duration {
        let last = Duration::from_millis(self.milliseconds.load(Ordering::Relaxed));
        now.saturating_duration_since(self.epoch).saturating_sub(last)
    }
}

/// Why all transcripts were looked at.
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

/// Everything that is counted since the start of the process.
#[derive(Default, Debug)]
pub struct Metrics {
    // intake
    pub lines_read: Counter,
    pub bad_lines: Counter,
    /// By type.
    pub events_captured: CounterFamily,
    /// By type, as the caller named it.
    pub events_rejected: CounterFamily,
    pub files_watched: Gauge,
    pub sessions_known: Gauge,
    /// Transcripts that Claude Code is about to delete and that are not wholly stored.
    pub transcripts_expiring: Gauge,
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
    /// The thread that follows transcripts goes on, also when it waits for room.
    pub reading: Beat,
    last_rescan: Mutex<Option<Timestamp>>,
    pub activity: Activity,
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
    /// The drainer goes on, also when all it does is to try to reach the database.
    pub draining: Beat,
    /// Something left the queue.
    pub settling: Beat,
    last_write: Mutex<Option<Timestamp>>,
    database: Mutex<DatabaseState>,
}

impl Metrics {
    pub fn rescanned(&self, cause: RescanCause, now: Timestamp) {
        self.rescans.add(cause.as_str(), 1);
        *lock(&self.last_rescan) = Some(now);
    }

    pub fn last_rescan(&self) -> Option<Timestamp> {
        *lock(&self.last_rescan)
    }

    pub fn wrote(&self, now: Timestamp) {
        *lock(&self.last_write) = Some(now);
    }

    pub fn last_write(&self) -> Option<Timestamp> {
        *lock(&self.last_write)
    }

    pub fn database(&self) -> DatabaseState {
        lock(&self.database).clone()
    }

    pub fn set_database(&self, state: DatabaseState) {
        *lock(&self.database) = state;
    }
}

/// What is known of the database, and since when.
#[derive(Clone, PartialEq, Debug)]
pub struct DatabaseState {
    pub state: Database,
    pub since: Timestamp,
    /// In the server's words where it spoke.
    pub last_error: Option<String>,
}

impl Default for DatabaseState {
    fn default() -> Self {
        DatabaseState { state: Database::Down, since: Timestamp::now(), last_error: None }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Database {
    Up,
    Down,
    /// It answers, but someone must mend something.
    Misconfigured,
    /// Nothing says where it is.
    Unconfigured,
}

impl Database {
    pub fn as_str(self) -> &'static str {
        match self {
            Database::Up => "up",
            Database::Down => "down",
            Database::Misconfigured => "misconfigured",
            Database::Unconfigured => "unconfigured",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_tells_labels_apart_and_has_a_limit() {
        let family = CounterFamily::default();
        family.declare("declared");
        for number in 0..LABELS_MAX + 10 {
            family.add(&format!("label {number}"), 2);
        }
        family.add("label 0", 1);
        assert_eq!(family.of("declared"), 0);
        assert_eq!(family.of("label 0"), 3);
        assert_eq!(family.of(OTHER), 22, "one place is the declared label's");
        assert_eq!(family.labels().count(), LABELS_MAX + 1);
        assert_eq!(family.get(), 2 * (LABELS_MAX as u64 + 10) + 1);
    }

    #[test]
    fn a_long_label_is_cut_at_a_character() {
        let family = CounterFamily::default();
        let label = "ä".repeat(LABEL_BYTES_MAX);
        family.add(&label, 1);
        family.add(&label, 1);
        assert_eq!(family.of(&label), 2);
        assert!(family.labels().all(|(name, _)| name.len() <= LABEL_BYTES_MAX));
    }

    #[test]
    fn threads_that_add_a_new_label_at_once_lose_nothing() {
        let family = CounterFamily::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|number| family.add(&format!("{}", number % 40), 1)));
            }
        });
        assert_eq!((family.get(), family.of("39"), family.labels().count()), (4000, 100, 40));
    }

    #[test]
    fn a_histogram_counts_into_the_bucket_whose_bound_is_not_exceeded() {
        let histogram = Histogram::default();
        histogram.observe(Duration::from_millis(1), 2);
        histogram.observe(Duration::from_micros(1001), 1);
        histogram.observe(Duration::from_secs(7200), 1);
        let snapshot = histogram.snapshot();
        let cumulative: Vec<(f64, u64)> = snapshot.cumulative().collect();
        assert_eq!(cumulative[..3], [(0.0005, 0), (0.001, 2), (0.0015, 3)]);
        assert_eq!(*cumulative.last().unwrap(), (f64::INFINITY, 4));
        assert!((snapshot.sum_seconds - 7_200.003_001).abs() < 1e-6, "{}", snapshot.sum_seconds);
    }

    #[test]
    fn quantiles_are_interpolated_and_those_of_an_interval_forget_what_was_before() {
        let histogram = Histogram::default();
        assert_eq!(histogram.snapshot().quantile(0.5), None);
        histogram.observe(Duration::from_secs(20), 100);
        let before = histogram.snapshot();
        histogram.observe(Duration::from_micros(1800), 100);
        let since = histogram.snapshot().since(&before);
        assert_eq!(since.count(), 100);
        assert_eq!(since.quantile(0.5), Some(0.002), "half way through the bucket from 1.5 to 2.5 ms");
        assert_eq!(since.quantile(1.0), Some(0.0025));
        histogram.observe(Duration::from_secs(9999), 1);
        assert_eq!(histogram.snapshot().quantile(1.0), Some(3600.0));
    }

    #[test]
    fn a_beat_tells_how_long_it_was_silent() {
        let beat = Beat::default();
        let later = Instant::now() + Duration::from_secs(60);
        assert!(beat.age(later) >= Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(3));
        beat.beat();
        assert!(beat.age(later) < Duration::from_secs(60));
        assert_eq!(beat.age(beat.epoch), Duration::ZERO);
    }
}
