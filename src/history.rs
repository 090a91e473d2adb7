//! The last ten minutes in samples, one a second: what the status page and `top` draw.
//!
//! A ring in memory of [`SAMPLES_MAX`] small values. A restart forgets it: what must be kept is Prometheus' to keep.

use std::collections::VecDeque;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::event::Timestamp;
use crate::queue::QueueStats;
use crate::telemetry::{HistogramSnapshot, Metrics, lock};

/// Ten minutes.
pub(crate) const SAMPLES_MAX: usize = 600;

/// Samples of a minute.
const MINUTE: usize = 60;

/// What happened in one second, and what stood at its end.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
pub(crate) struct Sample {
    /// Milliseconds since 1970.
    pub at: i64,
    /// Seconds that the sample covers: about 1.
    pub seconds: f64,
    pub captured: u64,
    pub delivered: u64,
    pub pending: u64,
    /// How long the oldest event has been waiting.
    pub oldest_age_seconds: Option<f64>,
    /// From captured to durable in Postgres, for what was delivered in this second. `None` when nothing was.
    pub lag_p50_seconds: Option<f64>,
    pub lag_p99_seconds: Option<f64>,
}

/// How long events took from captured to durable in Postgres, over the last minute. `None` when none got there.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Default, Debug)]
pub(crate) struct Lag {
    pub events: u64,
    pub p50_seconds: Option<f64>,
    pub p90_seconds: Option<f64>,
    pub p99_seconds: Option<f64>,
}

impl From<HistogramSnapshot> for Lag {
    fn from(lag: HistogramSnapshot) -> Self {
        Lag {
            events: lag.count(),
            p50_seconds: lag.quantile(0.5),
            p90_seconds: lag.quantile(0.9),
            p99_seconds: lag.quantile(0.99),
        }
    }
}

/// Ring buffer of samples, with a channel that announces each new one.
#[derive(Debug)]
pub(crate) struct History {
    ring: Mutex<Ring>,
    updates: watch::Sender<()>,
}

#[derive(Debug)]
struct Ring {
    samples: VecDeque<Sample>,
    /// What was counted when the last sample was taken.
    before: Counts,
    /// The lag at the end of each of the last seconds, oldest first.
    minute: VecDeque<HistogramSnapshot>,
}

#[derive(Clone, Debug)]
struct Counts {
    at: Timestamp,
    captured: u64,
    delivered: u64,
    lag: HistogramSnapshot,
}

impl Counts {
    fn of(metrics: &Metrics, at: Timestamp) -> Counts {
        Counts {
            at,
            captured: metrics.events_captured.get(),
            delivered: metrics.events_delivered.get(),
            lag: metrics.end_to_end_seconds.snapshot(),
        }
    }
}

impl History {
    pub(crate) fn new(metrics: &Metrics, now: Timestamp) -> History {
        let before = Counts::of(metrics, now);
        let minute = VecDeque::from([before.lag.clone()]);
        let ring = Ring { samples: VecDeque::new(), before, minute };
        History { ring: Mutex::new(ring), updates: watch::Sender::new(()) }
    }

    /// Adds a sample of what has changed since the one before.
    pub(crate) fn take_sample(&self, metrics: &Metrics, queue: &QueueStats, now: Timestamp) {
        let counts = Counts::of(metrics, now);
        let mut ring = lock(&self.ring);
        let before = std::mem::replace(&mut ring.before, counts.clone());
        let lag = counts.lag.since(&before.lag);
        let sample = Sample {
            at: now.as_millisecond(),
            seconds: now.duration_since(before.at).as_secs_f64().max(0.001),
            captured: counts.captured - before.captured,
            delivered: counts.delivered - before.delivered,
            pending: queue.pending,
            oldest_age_seconds: queue.oldest.map(|(_, since)| now.duration_since(since).as_secs_f64().max(0.0)),
            lag_p50_seconds: lag.quantile(0.5),
            lag_p99_seconds: lag.quantile(0.99),
        };
        if ring.samples.len() == SAMPLES_MAX {
            ring.samples.pop_front();
        }
        ring.samples.push_back(sample);
        if ring.minute.len() > MINUTE {
            ring.minute.pop_front();
        }
        ring.minute.push_back(counts.lag);
        drop(ring);
        self.updates.send_replace(());
    }

    /// The last `count` samples, oldest first.
    pub(crate) fn last(&self, count: usize) -> Vec<Sample> {
        let samples = &lock(&self.ring).samples;
        samples.iter().skip(samples.len().saturating_sub(count)).cloned().collect()
    }

    /// The lag over the minute before the last sample.
    pub(crate) fn lag(&self) -> Lag {
        let ring = lock(&self.ring);
        ring.minute.front().map(|first| ring.before.lag.since(first)).unwrap_or_default().into()
    }

    /// Changes with every new sample.
    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.updates.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_sample_holds_what_happened_since_the_one_before() {
        let metrics = Metrics::default();
        metrics.events_captured.add("a", 5);
        metrics.end_to_end_seconds.observe(Duration::from_secs(20), 5);
        let history = History::new(&metrics, at(10));
        metrics.events_captured.add("b", 3);
        metrics.events_delivered.add("b", 2);
        metrics.end_to_end_seconds.observe(Duration::from_millis(2), 2);
        let queue =
            QueueStats { pending: 1, oldest: Some((crate::event::Sequence::FIRST, at(8))), ..Default::default() };
        history.take_sample(&metrics, &queue, at(12));
        history.take_sample(&metrics, &QueueStats::default(), at(13));
        let samples = history.last(2);
        let (sample, next) = (&samples[0], &samples[1]);
        assert_eq!((sample.captured, sample.delivered, sample.pending), (3, 2, 1));
        assert_eq!((sample.seconds, sample.oldest_age_seconds), (2.0, Some(4.0)));
        assert_eq!(sample.lag_p50_seconds, Some(0.002), "the slow ones of before are no longer in it");
        assert_eq!((next.captured, next.lag_p50_seconds, next.oldest_age_seconds), (0, None, None));
    }

    #[test]
    fn the_lag_of_the_last_minute_forgets_what_was_before() {
        let metrics = Metrics::default();
        let history = History::new(&metrics, at(0));
        metrics.end_to_end_seconds.observe(Duration::from_secs(20), 1);
        for second in 1..=60 {
            history.take_sample(&metrics, &QueueStats::default(), at(second));
        }
        assert_eq!(history.lag().events, 1);
        metrics.end_to_end_seconds.observe(Duration::from_millis(2), 2);
        history.take_sample(&metrics, &QueueStats::default(), at(61));
        let lag = history.lag();
        assert_eq!((lag.events, lag.p50_seconds, lag.p99_seconds), (2, Some(0.002), Some(0.00249)));
    }

    #[test]
    fn the_ring_keeps_the_last_ten_minutes() {
        let metrics = Metrics::default();
        let history = History::new(&metrics, at(0));
        let mut updates = history.subscribe();
        for second in 1..=SAMPLES_MAX as i64 + 5 {
            history.take_sample(&metrics, &QueueStats::default(), at(second));
        }
        let samples = history.last(usize::MAX);
        assert_eq!((samples.len(), samples[0].at), (SAMPLES_MAX, 6000));
        assert_eq!(history.last(2).iter().map(|sample| sample.at).collect::<Vec<_>>(), [604_000, 605_000]);
        assert!(updates.has_changed().unwrap());
        updates.mark_unchanged();
        assert!(!updates.has_changed().unwrap());
    }
}
