//! `GET /metrics`: the counters, and what health knows as gauges, in Prometheus' text format. Open to every user of the
//! machine: labels are names, never text.

use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};

use super::Api;
use crate::event::Timestamp;
use crate::health::{HealthSource, Moment};
use crate::telemetry::{Database, TEXT_FORMAT};

pub(super) async fn metrics(State(api): State<Api>) -> Response {
    let headers = [(CONTENT_TYPE, TEXT_FORMAT), (CACHE_CONTROL, "no-store")];
    (headers, exposition(&api.health, Moment::now())).into_response()
}

fn exposition(source: &HealthSource, now: Moment) -> String {
    let live = &source.metrics.live;
    let health = source.health(now);
    let number = |is_so: bool| f64::from(u8::from(is_so));
    let last_write = live.last_write.get().unwrap_or(Timestamp::UNIX_EPOCH).as_millisecond() as f64 / 1000.0;
    let is_up = health.database.state == Database::Up;
    let oldest_age = health.queue.oldest_age_seconds.unwrap_or_default();
    let expiring = health.watcher.transcripts_expiring;
    let unread_spool = health.spool.unread_files + u64::from(health.spool.folder_unread);
    source.metrics.encode(&[
        ("queue_events", "Events waiting in the queue.", health.queue.pending as f64),
        ("queue_bytes", "Bytes of the events waiting.", health.queue.pending_bytes as f64),
        ("queue_bytes_max", "Bytes that may wait at most.", source.pending_bytes_max as f64),
        ("queue_oldest_age_seconds", "Age of the oldest event waiting; 0 when none waits.", oldest_age),
        ("queue_disk_bytes", "Bytes of the queue's files.", health.queue.disk_bytes as f64),
        ("queue_dead_letters", "Dead letters that are kept.", health.queue.dead_letters as f64),
        ("queue_missing", "Events that were missing when the queue was opened.", health.queue.missing as f64),
        ("database_up", "1 when the last thing heard of the database was good.", number(is_up)),
        ("transcripts_expiring", "Transcripts about to be deleted and not fully delivered.", expiring as f64),
        ("spool_unread_files", "Files of the spool, or its folder, that can't be read.", unread_spool as f64),
        ("ready", "1 when events are accepted.", number(health.ready)),
        ("last_write_timestamp_seconds", "When an event was last stored; 0 when none was.", last_write),
    ])
}
