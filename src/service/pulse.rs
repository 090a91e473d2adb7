//! Once a second: takes a sample for the plots, logs when health begins or ceases to fail, and tells systemd how it stands.
//!
//! systemd's watchdog is fed only while every part of this program goes on ([`HealthSource::goes_on`]). A database that is
//! unavailable, a lock that somebody else holds in it, a full queue: none of them starves it, as a restart would not help.

use std::sync::Arc;
use std::time::Duration;

use tracing::{error, info};

use super::systemd::{Notice, Systemd};
use crate::health::{Health, HealthSource, Moment, Status};
use crate::history::{History, Sampler};

/// Also the longest time between two looks at the parts.
const PULSE_INTERVAL: Duration = Duration::from_secs(1);

/// What is told to systemd changes with every event; it need not hear of each.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);

pub struct Pulse {
    pub health: Arc<HealthSource>,
    pub history: Arc<History>,
    pub systemd: Systemd,
}

impl Pulse {
    /// Runs until the task is aborted.
    pub async fn run(self) {
        // Within half of what systemd asks for, as its manual says.
        let watchdog = sd_notify::watchdog_enabled();
        let period = watchdog.map_or(PULSE_INTERVAL, |limit| PULSE_INTERVAL.min(limit / 2));
        let mut beat = tokio::time::interval(period.max(Duration::from_millis(10)));
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let begun = Moment::now();
        let mut sampler = Sampler::new(&self.health.metrics, begun.time);
        let mut sampled = begun.clock;
        let mut state = State::default();
        loop {
            beat.tick().await;
            let now = Moment::now();
            if watchdog.is_some() && self.health.goes_on(now) {
                self.systemd.tell(Notice::GoesOn);
            }
            if now.clock.saturating_duration_since(sampled) + period / 2 < PULSE_INTERVAL {
                continue;
            }
            sampled = now.clock;
            let sample = sampler.sample(&self.health.metrics, &self.health.queue.stats(), now.time);
            self.history.push(sample, sampler.lag_of_last_minute());
            let health = self.health.health(now);
            state.note(&health);
            state.tell(&self.systemd, &health, now);
        }
    }
}

/// What was said last.
#[derive(Default)]
struct State {
    failing: bool,
    told: Option<(String, Moment)>,
}

impl State {
    /// Logs when it begins to fail and when that is over. Lesser changes are logged by who notices them.
    fn note(&mut self, health: &Health) {
        let failing = health.status == Status::Fail;
        if failing == self.failing {
            return;
        }
        self.failing = failing;
        let reasons = health.reasons.join("; ");
        if failing {
            error!(reasons, pending = health.queue.pending, "health fails");
        } else {
            info!(status = health.status.as_str(), reasons, "health fails no longer");
        }
    }

    fn tell(&mut self, systemd: &Systemd, health: &Health, now: Moment) {
        let status = format!(
            "{}: {} pending, {} delivered, {} dead letters, database {}",
            health.status.as_str(),
            health.queue.pending,
            health.writes.succeeded,
            health.queue.dead_letters,
            health.database.state
        );
        let is_due = self.told.as_ref().is_none_or(|(told, at)| {
            let changed = told.split(':').next() != status.split(':').next();
            *told != status && (changed || now.clock.saturating_duration_since(at.clock) >= STATUS_INTERVAL)
        });
        if is_due {
            systemd.tell(Notice::Status(status.clone()));
            self.told = Some((status, now));
        }
    }
}
