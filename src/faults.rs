//! Named points at which a test lets the process die, or linger.
//!
//! In a debug build, `HEADSPACE_FAULT_POINT=name` aborts the process when it reaches the point of that name for the
//! first time, `name:n` when it does for the n-th time. With `HEADSPACE_FAULT_KIND=panic` it panics there instead, with
//! `pause` it stays there for 600 ms, with `loop` for ever and at work. A release build compiles every call to nothing.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Every point there is, for tests that go through them all.
pub(crate) const POINTS: &[&str] = &[
    "append-staged",
    "append-between-parts",
    "commit-before-apply",
    "commit-applied",
    "commit-synced",
    "retry-staged",
    "segment-applying",
    "sync-before-flush",
    "sync-flushed",
    "open-locked",
    "open-segment-created",
    "open-recovered",
    "segment-begun",
    "segment-copied",
    "segment-committed",
    "segment-switched",
    "segment-spent",
    "damage-noted",
    "damage-moved",
];

/// How long `pause` stays: long enough to be met there, and well below the time that a stop may take.
const PAUSE: Duration = Duration::from_millis(600);

/// What the environment asks for.
struct Fault {
    point: String,
    passes_left: AtomicU64,
    kind: String,
}

/// Aborts, panics or lingers here when the environment asks for it.
#[inline]
pub(crate) fn reach(point: &'static str) {
    if cfg!(debug_assertions) {
        debug_assert!(POINTS.contains(&point), "{point} is not in POINTS");
        trigger(point);
    }
}

fn trigger(point: &str) {
    static FAULT: OnceLock<Option<Fault>> = OnceLock::new();
    let fault = FAULT.get_or_init(|| {
        let wanted = std::env::var("HEADSPACE_FAULT_POINT").ok()?;
        let (point, count) = wanted.split_once(':').unwrap_or((&wanted, "1"));
        let passes_left = AtomicU64::new(count.parse().unwrap_or(1));
        let kind = std::env::var("HEADSPACE_FAULT_KIND").unwrap_or_default();
        Some(Fault { point: point.to_owned(), passes_left, kind })
    });
    let Some(fault) = fault else { return };
    if fault.point != point || fault.passes_left.fetch_sub(1, Ordering::Relaxed) != 1 {
        return;
    }
    match fault.kind.as_str() {
        "panic" => panic!("the environment asks for it"),
        "pause" => std::thread::sleep(PAUSE),
        "loop" => loop {
            std::hint::spin_loop();
        },
        _ => std::process::abort(),
    }
}

/// Panics in a debug build where `HEADSPACE_FAULT_POINT` is `task-<name>`: a task of the service calls it as it begins.
pub(crate) fn reach_task(name: &str) {
    if cfg!(debug_assertions)
        && std::env::var("HEADSPACE_FAULT_POINT").is_ok_and(|point| point.strip_prefix("task-") == Some(name))
    {
        panic!("the environment asks for it");
    }
}

/// Size above which a segment gets no more events: `bytes`, or in a debug build what
/// `HEADSPACE_SEGMENT_BYTES` says, so that a test need not fill tens of megabytes.
pub(crate) fn segment_bytes(bytes: u64) -> u64 {
    let asked = if cfg!(debug_assertions) { std::env::var("HEADSPACE_SEGMENT_BYTES").ok() } else { None };
    asked.and_then(|text| text.parse().ok()).unwrap_or(bytes)
}
