//! Once a second: takes a sample for the plots, logs when health begins or ceases to fail, and tells systemd how it stands.
//!
//! systemd's watchdog is fed only while every part of this program makes progress ([`HealthSource::is_alive`]). A database that is
//! unavailable, a lock that somebody else holds in it, a full queue: none of them starves it, as a restart would not help.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{error, info};

use super::systemd::{Notice, Systemd};
use crate::health::{Health, HealthSource, Moment, Status};
use crate::history::History;

/// Also the longest time between two looks at the parts.
const PULSE_INTERVAL: Duration = Duration::from_secs(1);

/// What is told to systemd changes with every event; it need not hear of each.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);

pub(super) struct Pulse {
    pub health: Arc<HealthSource>,
    pub history: Arc<History>,
    pub systemd: Systemd,
}

impl Pulse {
    /// Runs until the task is aborted.
    pub(super) async fn run(self) {
        // Within half of what systemd asks for, as its manual says.
        let watchdog = sd_notify::watchdog_enabled();
        let period = watchdog.map_or(PULSE_INTERVAL, |limit| PULSE_INTERVAL.min(limit / 2));
        let mut beat = tokio::time::interval(period.max(Duration::from_millis(10)));
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut sampled = Instant::now();
        let mut state = State::default();
        loop {
            beat.tick().await;
            let now = Moment::now();
            if watchdog.is_some() && self.health.is_alive(now) {
                self.systemd.tell(Notice::GoesOn);
            }
            if now.clock.saturating_duration_since(sampled) + period / 2 < PULSE_INTERVAL {
                continue;
            }
            sampled = now.clock;
            self.history.take_sample(&self.health.metrics, &self.health.queue.stats(), now.time);
            let health = self.health.health(now);
            state.note(&health);
            state.tell(&self.systemd, &health, now.clock);
        }
    }
}

/// What was said last.
#[derive(Default)]
struct State {
    is_failing: bool,
    /// To systemd, and when.
    told: Option<(Status, Instant)>,
}

impl State {
    /// Logs when it begins to fail and when that is over. Lesser changes are logged where they are noticed.
    fn note(&mut self, health: &Health) {
        let is_failing = health.status == Status::Fail;
        if std::mem::replace(&mut self.is_failing, is_failing) == is_failing {
            return;
        }
        let reasons = health.reasons.join("; ");
        if is_failing {
            error!(reasons, pending = health.queue.pending, "health fails");
        } else {
            info!(status = health.status.as_str(), reasons, "health fails no longer");
        }
    }

    fn tell(&mut self, systemd: &Systemd, health: &Health, now: Instant) {
        let is_told = |(status, at): (Status, Instant)| {
            status == health.status && now.saturating_duration_since(at) < STATUS_INTERVAL
        };
        if self.told.is_some_and(is_told) {
            return;
        }
        self.told = Some((health.status, now));
        systemd.tell(Notice::Status(format!(
            "{}: {} pending, {} delivered, {} dead letters, database {}",
            health.status.as_str(),
            health.queue.pending,
            health.writes.succeeded,
            health.queue.dead_letters,
            health.database.state.as_str()
        )));
    }
}
