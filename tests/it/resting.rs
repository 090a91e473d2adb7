//! Transcripts that rest are followed as those that are awake.

use std::process::Command;

/// The tests of what happens to files and to sessions, with a watcher that puts a transcript to rest whenever it may.
#[test]
fn what_holds_for_transcripts_that_are_awake_holds_for_those_at_rest() {
    let ran = Command::new(std::env::current_exe().unwrap())
        .args(["moving_files::", "sessions::", "--test-threads=2"])
        .env("HEADSPACE_AWAKE_MAX", "0")
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{output}");
    let passed = output.lines().filter(|line| line.ends_with(" ... ok")).count();
    assert!(passed > 20, "only {passed} tests: {output}");
}
