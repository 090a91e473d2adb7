//! A test that can't run here says so, and is never taken for one that has passed.

use std::io::Write as _;

/// What a test may lack on CI, with the reason.
const ALLOWED: &str = include_str!("../skips.txt");

/// Whether `what`, which a test needs, is not `there`. It is noted then in the file that scripts/test.sh shows at its
/// end, and on CI (`CI=true`) the test fails unless tests/skips.txt allows that.
#[track_caller]
pub(crate) fn lacks(what: &str, there: bool) -> bool {
    if there {
        return false;
    }
    let test = std::thread::current().name().unwrap_or_default().to_owned();
    let line = format!("SKIPPED: {test} needs {what}\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os("HEADSPACE_TEST_SKIPS") {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        file.and_then(|mut file| file.write_all(line.as_bytes())).expect("HEADSPACE_TEST_SKIPS can be written");
    }
    let on_ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(!on_ci || is_allowed(what), "needs {what}, which tests/skips.txt does not allow CI to lack");
    true
}

fn is_allowed(what: &str) -> bool {
    ALLOWED
        .lines()
        .filter_map(|line| line.split_once(": "))
        .any(|(allowed, reason)| allowed == what && !reason.is_empty())
}

#[test]
fn only_what_is_on_the_list_may_be_lacking_on_ci() {
    assert!(is_allowed("root") && !is_allowed("tmux") && !is_allowed(""));
}
