//! What a supervisor may hold the watcher to under a configuration: `service install` writes it into the unit.

use std::time::Duration;

const MIB: u64 = 1 << 20;

/// Bytes of memory that the watcher needs at most (`MemoryMax=`).
///
/// 128 MiB for itself: program, caches of the queue, connections, and the values of parsed payloads (32 MiB, whatever their
/// number). A line of a transcript is held twice, as it is in its file and as an event. Of events up to six are held at
/// once: in requests, on their way into the queue, and out of it.
pub(crate) const fn memory_bytes_max(line_bytes_max: u64, event_bytes_max: u64) -> u64 {
    (128 * MIB).saturating_add(line_bytes_max.saturating_mul(2)).saturating_add(event_bytes_max.saturating_mul(6))
}

/// Seconds after SIGTERM before which the watcher must not be killed (`TimeoutStopSec=`, `ExitTimeOut`): what a stop may
/// take, rounded up, and one second more, as in `scripts/run-watcher.sh`.
pub(crate) const fn kill_after_seconds(shutdown_timeout: Duration) -> u64 {
    shutdown_timeout.as_secs() + (shutdown_timeout.subsec_nanos() > 0) as u64 + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_grow_with_the_configuration() {
        assert_eq!(memory_bytes_max(64 * MIB, 16 * MIB), 352 * MIB);
        assert_eq!(memory_bytes_max(1024 * MIB, 256 * MIB), 3712 * MIB);
        assert_eq!(memory_bytes_max(u64::MAX, 1), u64::MAX);
        assert_eq!(kill_after_seconds(Duration::from_secs(2)), 3);
        assert_eq!(kill_after_seconds(Duration::from_millis(2001)), 4);
    }
}
