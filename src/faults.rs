//! Named points at which a test lets the process die, or linger.
//!
//! In a debug build, `HEADSPACE_FAULT_POINT=name` aborts the process when it reaches the point of that name for the
//! first time, `name:n` when it does for the n-th time. With `HEADSPACE_FAULT_KIND=panic` it panics there instead, with
//! `pause` it stays there for 600 ms, with `loop` for ever and at work. A release build compiles every call to nothing.

/// Every point there is, for tests that go through them all.
pub const POINTS: &[&str] = &[
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

/// Aborts, panics or lingers here when the environment asks for it.
#[inline]
pub(crate) fn reach(point: &'static str) {
    #[cfg(debug_assertions)]
    armed::reach(point);
    #[cfg(not(debug_assertions))]
    let _ = point;
}

/// Panics in a debug build where `HEADSPACE_FAULT_POINT` is `task-<name>`: a task of the service calls it as it begins.
pub fn reach_task(name: &str) {
    #[cfg(debug_assertions)]
    if std::env::var("HEADSPACE_FAULT_POINT").is_ok_and(|point| point.strip_prefix("task-") == Some(name)) {
        panic!("the environment asks for it");
    }
    #[cfg(not(debug_assertions))]
    let _ = name;
}

/// Size above which a segment gets no more events: `bytes`, or in a debug build what
/// `HEADSPACE_SEGMENT_BYTES` says, so that a test need not fill tens of megabytes.
pub(crate) fn segment_bytes(bytes: u64) -> u64 {
    threshold("HEADSPACE_SEGMENT_BYTES", bytes)
}

/// Transcripts that are kept awake: `files`, or what `HEADSPACE_AWAKE_MAX` says.
pub fn awake_max(files: usize) -> usize {
    usize::try_from(threshold("HEADSPACE_AWAKE_MAX", files as u64)).unwrap_or(files)
}

fn threshold(name: &'static str, bytes: u64) -> u64 {
    #[cfg(debug_assertions)]
    return armed::threshold(name).unwrap_or(bytes);
    #[cfg(not(debug_assertions))]
    {
        let _ = name;
        bytes
    }
}

#[cfg(debug_assertions)]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    /// Long enough to be met there, and well below the time that a stop may take.
    const PAUSE: Duration = Duration::from_millis(600);

    enum Kind {
        Abort,
        Panic,
        Pause,
        Loop,
    }

    struct Fault {
        point: String,
        passes_left: AtomicU64,
        kind: Kind,
    }

    static FAULT: OnceLock<Option<Fault>> = OnceLock::new();

    pub fn threshold(name: &str) -> Option<u64> {
        std::env::var(name).ok()?.parse().ok()
    }

    pub fn reach(point: &'static str) {
        debug_assert!(super::POINTS.contains(&point), "{point} is not in POINTS");
        let fault = FAULT.get_or_init(|| {
            let wanted = std::env::var("HEADSPACE_FAULT_POINT").ok()?;
            let (point, count) = wanted.split_once(':').unwrap_or((&wanted, "1"));
            let passes = count.parse().unwrap_or(1);
            let kind = match std::env::var("HEADSPACE_FAULT_KIND").as_deref() {
                Ok("panic") => Kind::Panic,
                Ok("pause") => Kind::Pause,
                Ok("loop") => Kind::Loop,
                _ => Kind::Abort,
            };
            Some(Fault { point: point.to_owned(), passes_left: AtomicU64::new(passes), kind })
        });
        if let Some(fault) = fault
            && fault.point == point
            && fault.passes_left.fetch_sub(1, Ordering::Relaxed) == 1
        {
            match fault.kind {
                Kind::Abort => std::process::abort(),
                Kind::Panic => panic!("the environment asks for it"),
                Kind::Pause => std::thread::sleep(PAUSE),
                Kind::Loop => loop {
                    std::hint::spin_loop();
                },
            }
        }
    }
}
