//! `GET /metrics`: Prometheus reads it, and the numbers are those of what happened.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

use crate::stage::{SOON, Stage, Watcher, lacks, wait_until};

/// Every sample of the page under its name with labels, as it stands there.
pub fn samples(watcher: &Watcher) -> BTreeMap<String, f64> {
    let (code, page) = watcher.get("/metrics").unwrap();
    assert_eq!(code, 200);
    parse(&page)
}

/// Reads the text format strictly: every sample belongs to the HELP and TYPE right before it, and stands once.
fn parse(page: &str) -> BTreeMap<String, f64> {
    let mut samples = BTreeMap::new();
    let (mut name, mut kind) = (String::new(), String::new());
    let mut lines = page.lines();
    assert!(page.ends_with('\n'));
    while let Some(line) = lines.next() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (named, text) = help.split_once(' ').unwrap();
            assert!(text.ends_with('.'), "{line}");
            let declared = lines.next().unwrap().strip_prefix("# TYPE ").unwrap();
            let (typed, of_kind) = declared.split_once(' ').unwrap();
            assert_eq!(named, typed);
            assert!(["counter", "gauge", "histogram"].contains(&of_kind), "{declared}");
            assert_eq!(named.ends_with("_total"), of_kind == "counter", "{declared}");
            (name, kind) = (named.to_owned(), of_kind.to_owned());
            continue;
        }
        let (key, value) = line.rsplit_once(' ').unwrap();
        let sampled = key.split('{').next().unwrap();
        match kind.as_str() {
            "histogram" => {
                assert!(["_bucket", "_sum", "_count"].iter().any(|end| sampled == format!("{name}{end}")), "{line}")
            }
            _ => assert_eq!(sampled, name, "{line}"),
        }
        assert!(sampled.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{line}");
        assert!(samples.insert(key.to_owned(), value.parse().unwrap()).is_none(), "twice: {line}");
    }
    samples
}

#[test]
fn every_number_of_the_contract_is_there_and_prometheus_finds_nothing_wrong() {
    let stage = Stage::new();
    let watcher = stage.start();
    watcher.wait_for_log("database connected");
    let names: Vec<String> = samples(&watcher).into_keys().collect();
    for name in [
        "lines_read_total",
        "bad_lines_total",
        "events_captured_total{type=\"turn_detected\"}",
        "events_rejected_total{type=\"turn_detected\"}",
        "events_delivered_total{type=\"turn_detected\"}",
        "events_duplicate_total",
        "events_dead_lettered_total{reason=\"refused\"}",
        "write_failures_total{class=\"again\"}",
        "queue_events",
        "queue_bytes",
        "queue_oldest_age_seconds",
        "queue_disk_bytes",
        "database_up",
        "capture_seconds_bucket{le=\"+Inf\"}",
        "delivery_seconds_bucket{le=\"0.005\"}",
        "end_to_end_seconds_count",
        "rescans_total{cause=\"interval\"}",
    ] {
        assert!(names.contains(&format!("headspace_watcher_{name}")), "{name}: {names:?}");
    }
    let page = watcher.get("/metrics").unwrap().1;
    assert!(page.contains("# TYPE headspace_watcher_unknown_line_types_total counter\n"));
    if lacks("promtool", Command::new("promtool").arg("--version").output().is_ok()) {
        return;
    }
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut promtool = promtool.spawn().unwrap();
    promtool.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.is_empty(), "{said}");
}

#[test]
fn the_numbers_tell_what_happened() {
    let mut stage = Stage::new();
    stage.set("file_watcher.polling_interval", "0.1");
    let mut transcript = stage.transcript("-home-me-app", 1);
    let watcher = stage.start();
    watcher.wait_for_log("database connected");
    transcript.say_many("line", 100);
    transcript.append("this is no JSON\n{\"type\":\"brand-new\"}\n");
    // The same turns once more in a copy of the session: captured, and found to be there already. Nothing is its own.
    let copy = stage.transcript("-home-me-app", 2);
    stage.wait_for_rows(101);
    std::fs::copy(&transcript.path, &copy.path).unwrap();
    let value = |name: &str| samples(&watcher).get(&format!("headspace_watcher_{name}")).copied().unwrap_or(-1.0);
    wait_until("the copy is delivered", SOON, || {
        value("events_duplicate_total") == 100.0
            && value("queue_events") == 0.0
            // The bell may have brought all this before the first interval has passed.
            && value("rescans_total{cause=\"interval\"}") >= 1.0
    });
    let samples = samples(&watcher);
    let value = |name: &str| samples.get(&format!("headspace_watcher_{name}")).copied();
    for (name, expected) in [
        ("lines_read_total", 204.0),
        ("bad_lines_total", 2.0),
        ("events_captured_total{type=\"turn_detected\"}", 200.0),
        ("events_captured_total{type=\"session_registered\"}", 1.0),
        ("events_delivered_total{type=\"turn_detected\"}", 100.0),
        ("events_delivered_total{type=\"session_registered\"}", 1.0),
        ("events_rejected_total{type=\"turn_detected\"}", 0.0),
        ("events_dead_lettered_total{reason=\"unreadable\"}", 2.0),
        ("events_dead_lettered_total{reason=\"refused\"}", 0.0),
        ("unknown_line_types_total{type=\"brand-new\"}", 2.0),
        ("queue_dead_letters", 2.0),
        ("queue_missing", 0.0),
        ("queue_oldest_age_seconds", 0.0),
        ("database_up", 1.0),
        ("ready", 1.0),
        ("rescans_total{cause=\"start\"}", 1.0),
        ("capture_seconds_count", 201.0),
        ("delivery_seconds_count", 201.0),
        ("end_to_end_seconds_count", 101.0),
        ("end_to_end_seconds_bucket{le=\"+Inf\"}", 101.0),
    ] {
        assert_eq!(value(name), Some(expected), "{name}");
    }
    for name in ["capture_seconds_sum", "delivery_seconds_sum", "end_to_end_seconds_sum"] {
        assert!(value(name).unwrap() > 0.0, "{name}");
    }
}

#[test]
fn dashboard_and_alerts_ask_only_for_numbers_that_there_are_and_each_alert_can_be_caused() {
    let stage = Stage::with(None);
    let watcher = stage.start();
    let page = watcher.get("/metrics").unwrap().1;
    let declared: Vec<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| line.split(' ').next())
        .collect();
    let docs = crate::stage::project().join("docs");
    for file in ["alerts.yml", "alerts.test.yml", "grafana-dashboard.json"] {
        let text = std::fs::read_to_string(docs.join(file)).unwrap();
        let mut asked = 0;
        for (at, _) in text.match_indices("headspace_watcher_") {
            let name = text[at..].split(|c: char| !c.is_ascii_lowercase() && c != '_').next().unwrap();
            let name = name.strip_suffix("_bucket").unwrap_or(name);
            assert!(declared.contains(&name), "{file} asks for {name}");
            asked += 1;
        }
        assert!(asked > 5, "{file}");
    }
    let dashboard = std::fs::read_to_string(docs.join("grafana-dashboard.json")).unwrap();
    serde_json::from_str::<serde_json::Value>(&dashboard).unwrap();
    let rules = std::fs::read_to_string(docs.join("alerts.yml")).unwrap();
    let tests = std::fs::read_to_string(docs.join("alerts.test.yml")).unwrap();
    for alert in rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        assert!(tests.contains(&format!("alertname=\"{alert}\"")), "nothing causes {alert}");
    }
    let Ok(output) = Command::new("promtool").args(["test", "rules", "alerts.test.yml"]).current_dir(docs).output()
    else {
        lacks("promtool", false);
        return;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
