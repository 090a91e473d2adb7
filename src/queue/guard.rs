//! Keeps sled's faults away from the rest: catches its panics without a word ([`caught`]), and notices a call that does not come
//! back ([`stuck`]).
//!
//! On pages that contradict one another sled can look for a key for ever, on one processor and with ever more memory; nobody
//! can call it back. Each call notes that it is under way, and who runs the queue asks once a second how much of a
//! processor the same call has used: what waits for a disk uses none, and no honest call uses seconds. Then the segment is
//! marked, so that the next opening sets it aside without asking sled, and the process ends as after any storage error.
//!
//! Only where `/proc` says what a thread has used (Linux).

use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

/// Processor time that one call may use. The largest, one megabyte applied or synced, takes some ten milliseconds.
pub const CALL_MAX: Duration = Duration::from_secs(5);

/// A call that is under way.
struct Call {
    segment: u64,
    /// Processor time that it may use.
    max: Duration,
    /// What its thread had used when it was first asked.
    used: Option<Duration>,
}

/// The calls that are under way, by their threads.
static CALLS: Mutex<BTreeMap<u64, Call>> = Mutex::new(BTreeMap::new());

/// How the threads are called that sled starts. It catches their panics itself, and refuses all work from then on.
const SLED_THREADS: &str = "sled-io-";

thread_local! {
    /// Whether a panic of this thread would be caught.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
    static THREAD: u64 = thread_id();
}

fn calls() -> MutexGuard<'static, BTreeMap<u64, Call>> {
    CALLS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a call of sled for a segment, which may use so much of a processor. It must not panic.
pub fn limited<T>(segment: u64, max: Duration, call: impl FnOnce() -> T) -> T {
    // A thread that is just ending has no number any more: its last calls go unwatched.
    let thread = THREAD.try_with(|thread| *thread).ok();
    thread.map(|thread| calls().insert(thread, Call { segment, max, used: None }));
    let answer = call();
    thread.map(|thread| calls().remove(&thread));
    answer
}

/// Runs a call of sled and catches its panic, of which nothing is printed: who called gets it, and says it in an error.
pub fn caught<T>(call: impl FnOnce() -> T) -> std::thread::Result<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(print_no_caught_panic);
    // A thread that is just ending has no mark any more: then it is printed.
    let before = CAUGHT.try_with(|caught| caught.replace(true)).unwrap_or(false);
    let answer = catch_unwind(AssertUnwindSafe(call));
    let _ = CAUGHT.try_with(|caught| caught.set(before));
    answer
}

/// All other panics are printed as before.
fn print_no_caught_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let is_sleds = std::thread::current().name().is_some_and(|name| name.starts_with(SLED_THREADS));
        let is_caught = CAUGHT.try_with(Cell::get).unwrap_or(false);
        if !is_sleds && !is_caught {
            print(panic);
        }
    }));
}

/// The segment of a call that has used more of a processor than it may. Counts from the first time that it is asked during a call.
pub fn stuck() -> Option<u64> {
    let is_stuck = |(thread, call): (&u64, &mut Call)| {
        let used = processor_time(*thread)?;
        (used.saturating_sub(*call.used.get_or_insert(used)) >= call.max).then_some(call.segment)
    };
    calls().iter_mut().find_map(is_stuck)
}

fn thread_id() -> u64 {
    let link = std::fs::read_link("/proc/thread-self").ok();
    let id = link.as_deref().and_then(Path::file_name).and_then(|name| name.to_str()?.parse().ok());
    id.unwrap_or(0)
}

/// What a thread of this process has used of a processor.
fn processor_time(thread: u64) -> Option<Duration> {
    /// Of the times in `/proc`: USER_HZ, 100 on every Linux.
    const TICK: Duration = Duration::from_millis(10);
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).ok()?;
    // The name stands in parentheses and may hold anything.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut times = fields.split_whitespace().skip(11).map_while(|field| field.parse::<u32>().ok());
    Some(TICK * (times.next()? + times.next()?))
}

#[cfg(test)]
mod tests {
    #[cfg(target_os = "linux")]
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    #[ignore = "the child of the test below"]
    fn child() {
        assert!(caught(|| panic!("inside")).is_err());
        assert_eq!(caught(|| caught(|| panic!("deep inside")).is_err()).ok(), Some(true));
        let sleds = std::thread::Builder::new().name(format!("{SLED_THREADS}7"));
        assert!(sleds.spawn(|| panic!("on its own thread")).unwrap().join().is_err());
        panic!("outside");
    }

    #[test]
    fn a_panic_that_is_caught_prints_nothing_and_every_other_is_printed() {
        let program = std::env::current_exe().unwrap();
        let child = ["--exact", "queue::guard::tests::child", "--ignored", "--nocapture"];
        let ran = std::process::Command::new(program).args(child).output().unwrap();
        let said = String::from_utf8_lossy(&ran.stderr);
        assert_eq!(said.matches("panicked at").count(), 1, "{said}");
        assert!(said.contains("outside") && !said.contains("inside"), "{said}");
    }

    #[cfg(target_os = "linux")] // as the guard itself
    #[test]
    fn a_call_that_works_on_and_on_is_noticed() {
        let max = Duration::from_millis(200);
        let works = std::thread::spawn(move || {
            let until = std::time::Instant::now() + Duration::from_secs(20);
            limited(7, max, || {
                while std::time::Instant::now() < until && !IS_NOTICED.load(Ordering::Relaxed) {
                    std::hint::black_box((0..100_000u64).sum::<u64>());
                }
            });
        });
        static IS_NOTICED: AtomicBool = AtomicBool::new(false);
        while stuck() != Some(7) {
            assert!(!works.is_finished(), "nobody noticed it");
            std::thread::sleep(Duration::from_millis(10));
        }
        IS_NOTICED.store(true, Ordering::Relaxed);
        works.join().unwrap();
        // One that waits is none.
        limited(8, Duration::from_millis(50), || {
            for _ in 0..5 {
                assert_ne!(stuck(), Some(8));
                std::thread::sleep(Duration::from_millis(50));
            }
        });
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_processor_time_of_a_thread_grows_with_its_work() {
        let thread = thread_id();
        let before = processor_time(thread).unwrap();
        while processor_time(thread).unwrap() < before + Duration::from_millis(100) {
            std::hint::black_box((0..100_000u64).sum::<u64>());
        }
        std::thread::sleep(Duration::from_millis(50));
        assert!(processor_time(thread).unwrap() < before + Duration::from_secs(5));
    }
}
