//! Keeps sled's panics away from the rest: they are caught, and nothing is printed of them.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

/// How the threads are called that sled starts. It catches their panics itself, and refuses all work from then on.
const SLED_THREADS: &str = "sled-io-";

thread_local! {
    /// Whether a panic of this thread would be caught.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Runs a call of sled and catches its panic, of which nothing is printed: who called gets it, and says it in an error.
pub(super) fn caught<T>(call: impl FnOnce() -> T) -> std::thread::Result<T> {
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

#[cfg(test)]
mod tests {
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
}
