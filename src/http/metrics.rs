//! `GET /metrics`: the numbers in Prometheus' text format. Open to every user of the machine: labels are names, never text.

use std::fmt::{Display, Write};

use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};

use super::Api;
use crate::health::{HealthSource, Moment, Status};
use crate::telemetry::{CounterFamily, Database, HistogramSnapshot, OTHER, is_name};

const PREFIX: &str = "headspace_watcher_";

pub async fn metrics(State(api): State<Api>) -> Response {
    let headers = [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8"), (CACHE_CONTROL, "no-store")];
    (headers, exposition(&api.health, Moment::now())).into_response()
}

fn exposition(source: &HealthSource, now: Moment) -> String {
    let metrics = &source.metrics;
    let health = source.health(now);
    let mut page = Page::default();
    page.counter("lines_read_total", "Lines of transcripts that were read.", metrics.lines_read.get());
    page.counter("bad_lines_total", "Lines that are no JSON object or too long.", metrics.bad_lines.get());
    page.family("events_captured_total", "Events durable in the queue.", "type", &metrics.events_captured);
    page.family("events_rejected_total", "Events that failed the check.", "type", &metrics.events_rejected);
    page.family("events_delivered_total", "Events stored in Postgres.", "type", &metrics.events_delivered);
    page.counter("events_duplicate_total", "Events that Postgres had already.", metrics.events_duplicate.get());
    page.family("events_dead_lettered_total", "Events and input set aside.", "reason", &metrics.events_dead_lettered);
    page.family("write_failures_total", "Deliveries that failed, by what follows.", "class", &metrics.write_failures);
    page.family("rescans_total", "Looks at all transcripts, by their cause.", "cause", &metrics.rescans);
    page.family("lines_skipped_total", "Lines of the user's side that are no turns.", "reason", &metrics.lines_skipped);
    page.family(
        "format_unknown_total",
        "Lines with a value or of a type that this version does not know.",
        "field",
        &metrics.format_unknown,
    );
    page.family(
        "unknown_line_types_total",
        "Lines of types that this version does not know.",
        "type",
        &metrics.unknown_line_types,
    );
    page.gauge("queue_events", "Events waiting in the queue.", health.queue.pending);
    page.gauge("queue_bytes", "Bytes of the events waiting.", health.queue.pending_bytes);
    page.gauge("queue_bytes_max", "Bytes that may wait at most.", source.pending_bytes_max);
    page.gauge(
        "queue_oldest_age_seconds",
        "How long the oldest event has been waiting; 0 when none waits.",
        health.queue.oldest_age_seconds.unwrap_or_default(),
    );
    page.gauge("queue_disk_bytes", "Bytes of the queue's files.", health.queue.disk_bytes);
    page.gauge("queue_dead_letters", "Dead letters that are kept.", health.queue.dead_letters);
    page.gauge("queue_missing", "Events that were missing when the queue was opened.", health.queue.missing);
    let up = metrics.database().state == Database::Up;
    page.gauge("database_up", "1 when the last thing heard of the database was good.", u8::from(up));
    page.gauge("files", "Transcripts that are followed.", health.watcher.files);
    page.gauge("sessions", "Sessions that are known.", health.watcher.sessions);
    page.gauge(
        "transcripts_expiring",
        "Transcripts that Claude Code is about to delete and that are not wholly stored.",
        health.watcher.transcripts_expiring,
    );
    page.gauge(
        "spool_unread_files",
        "Files in the spool that can't be read; 1 and more where its folder can't be; GET /health says why.",
        health.spool.unread_files + u64::from(health.spool.folder_unread),
    );
    let status = match health.status {
        Status::Pass => 0,
        Status::Warn => 1,
        Status::Fail => 2,
    };
    page.gauge("health_status", "0 pass, 1 warn, 2 fail; GET /health says why.", status);
    page.gauge("ready", "1 when events are taken in.", u8::from(health.ready));
    page.gauge(
        "uptime_seconds",
        "Time since the start.",
        now.clock.saturating_duration_since(source.started.clock).as_secs_f64(),
    );
    for (name, help, at) in [
        ("last_write_timestamp_seconds", "When the last event was stored; 0 when none was.", metrics.last_write()),
        ("last_rescan_timestamp_seconds", "When all files were last looked at.", metrics.last_rescan()),
    ] {
        page.gauge(name, help, at.map_or(0.0, |at| at.as_millisecond() as f64 / 1000.0));
    }
    page.histogram(
        "capture_seconds",
        "From an event's being handed to the queue to its being durable there.",
        &metrics.capture_seconds.snapshot(),
    );
    page.histogram(
        "delivery_seconds",
        "From an event's being given to Postgres to its being durable there.",
        &metrics.delivery_seconds.snapshot(),
    );
    page.histogram(
        "end_to_end_seconds",
        "From an event's being captured to its being durable in Postgres, outages included.",
        &metrics.end_to_end_seconds.snapshot(),
    );
    page.head("build_info", "The running version.", "gauge");
    page.sample("build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
}

// Writing to a String can't fail.
impl Page {
    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.head(name, help, "counter");
        self.sample(name, &[], value);
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, help, "gauge");
        self.sample(name, &[], value);
    }

    fn family(&mut self, name: &str, help: &str, label: &str, family: &CounterFamily) {
        self.head(name, help, "counter");
        let mut unnamed = 0;
        for (value, count) in family.labels() {
            // Some come from what was read, such as a line's type; what is no name may be text.
            if value != OTHER && is_name(value) {
                self.sample(name, &[(label, value)], count);
            } else {
                unnamed += count;
            }
        }
        if unnamed > 0 {
            self.sample(name, &[(label, OTHER)], unnamed);
        }
    }

    fn histogram(&mut self, name: &str, help: &str, snapshot: &HistogramSnapshot) {
        self.head(name, help, "histogram");
        for (bound, count) in snapshot.cumulative() {
            let bound = if bound.is_infinite() { "+Inf".to_owned() } else { bound.to_string() };
            self.sample(&format!("{name}_bucket"), &[("le", &bound)], count);
        }
        self.sample(&format!("{name}_sum"), &[], snapshot.sum_seconds);
        self.sample(&format!("{name}_count"), &[], snapshot.count());
    }

    fn head(&mut self, name: &str, help: &str, kind: &str) {
        let _ = writeln!(self.text, "# HELP {PREFIX}{name} {help}\n# TYPE {PREFIX}{name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let _ = write!(self.text, "{PREFIX}{name}");
        for (index, (label, text)) in labels.iter().enumerate() {
            let _ = write!(self.text, "{}{label}=\"{}\"", if index == 0 { '{' } else { ',' }, text);
        }
        let _ = writeln!(self.text, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_name_is_no_label() {
        let family = CounterFamily::default();
        for (label, count) in [("file-history", 1), ("a\"} 1\nb\\\r", 2), ("my secret", 4), ("geh\u{e4}ssig", 8)] {
            family.add(label, count);
        }
        // More than are kept apart, so that the family has a remainder of its own.
        (0..70).for_each(|number| family.add(&format!("type_{number}"), 16));
        let mut page = Page::default();
        page.family("x_total", "Help.", "type", &family);
        let samples: Vec<&str> = page.text.lines().skip(2).collect();
        assert_eq!(samples.first(), Some(&"headspace_watcher_x_total{type=\"file-history\"} 1"));
        let others: Vec<&&str> = samples.iter().filter(|sample| !sample.contains("type_")).skip(1).collect();
        assert_eq!(others, [&format!("headspace_watcher_x_total{{type=\"other\"}} {}", 2 + 4 + 8 + 10 * 16)]);
    }
}
