//! Named points at which a test lets the process die.
//!
//! In a debug build, `HEADSPACE_FAULT_POINT=name` aborts the process when it reaches the point of that name for the
//! first time, `name:n` when it does for the n-th time. A release build compiles every call to nothing.

/// Every point there is, for tests that go through them all.
pub const POINTS: &[&str] = &[
    "append-before-apply",
    "append-between-parts",
    "append-applied",
    "append-flushed",
    "append-synced",
    "settle-applied",
    "open-locked",
    "open-generation-created",
    "open-pointer-written",
    "open-recovered",
    "compact-copied",
    "compact-synced",
    "compact-pointer-renamed",
    "compact-switched",
    "compact-removed",
];

/// Aborts here when the environment asks for it.
#[inline]
pub(super) fn reach(point: &'static str) {
    #[cfg(debug_assertions)]
    armed::reach(point);
    #[cfg(not(debug_assertions))]
    let _ = point;
}

#[cfg(debug_assertions)]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Fault {
        point: String,
        passes_left: AtomicU64,
    }

    static FAULT: OnceLock<Option<Fault>> = OnceLock::new();

    pub fn reach(point: &'static str) {
        debug_assert!(super::POINTS.contains(&point), "{point} is not in POINTS");
        let fault = FAULT.get_or_init(|| {
            let wanted = std::env::var("HEADSPACE_FAULT_POINT").ok()?;
            let (point, count) = wanted.split_once(':').unwrap_or((&wanted, "1"));
            let passes = count.parse().unwrap_or(1);
            Some(Fault { point: point.to_owned(), passes_left: AtomicU64::new(passes) })
        });
        if let Some(fault) = fault
            && fault.point == point
            && fault.passes_left.fetch_sub(1, Ordering::Relaxed) == 1
        {
            std::process::abort();
        }
    }
}
