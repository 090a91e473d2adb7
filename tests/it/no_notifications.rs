//! Without file notifications active transcripts are checked several times a second. The rescan is an hour away here: what
//! is found was found by a check.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::stage::{Process, SOON, Stage, project, wait_until};

/// A library over whose functions the program's file notifications never arrive.
fn library(folder: &Path) -> PathBuf {
    let library = folder.join("no_notifications.so");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let source = project().join("scripts/bench/no_notifications.c");
    let compiled = Command::new(compiler).args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status().unwrap();
    assert!(compiled.success(), "a C compiler is needed");
    library
}

fn stage() -> Stage {
    let mut stage = Stage::new();
    let library = library(stage.folder());
    stage.environment.insert("LD_PRELOAD".to_owned(), library.display().to_string());
    stage.set("file_watcher.polling_interval", "3600");
    stage
}

const FAILURE: &str = "file notifications fail";
const SILENCE: &str = "no file notifications arrive";

#[test]
fn lines_of_an_active_session_become_rows_long_before_the_rescan_and_it_says_so_once() {
    let stage = stage();
    let (mut one, mut two) = (stage.transcript("-home-me-app", 1), stage.transcript("-home-me-other", 2));
    one.say("first");
    two.say("first");
    let watcher = stage.start();
    stage.wait_for_rows(4);
    let mut rows = 4;
    wait_until("it says that no notifications arrive", SOON, || {
        for transcript in [&mut one, &mut two] {
            transcript.say(&format!("line {rows}"));
            rows += 1;
            stage.wait_for_rows(rows);
        }
        std::thread::sleep(Duration::from_millis(300));
        !watcher.logged(SILENCE).is_empty()
    });
    for _ in 0..20 {
        one.say(&format!("line {rows}"));
        rows += 1;
        stage.wait_for_rows(rows);
    }
    assert_eq!((watcher.logged(SILENCE).len(), watcher.logged(FAILURE).len()), (1, 0));
    let checked = stage.run(&["check"]).output();
    let line = checked.lines().find(|line| line.contains("notifications")).unwrap();
    assert!(line.starts_with("note") && line.contains(SILENCE) && line.contains("200 ms"), "{line}");
}

#[test]
fn where_they_can_not_be_had_lines_become_rows_as_soon_and_it_says_why_once() {
    let mut stage = stage();
    stage.environment.insert("NOTIFICATIONS_FAIL".to_owned(), "1".to_owned());
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("first");
    let watcher = stage.start();
    stage.wait_for_rows(2);
    for rows in 3..23 {
        transcript.say(&format!("line {rows}"));
        stage.wait_for_rows(rows);
        std::thread::sleep(Duration::from_millis(150));
    }
    assert_eq!((watcher.logged(SILENCE).len(), watcher.logged(FAILURE).len()), (0, 1));
    let checked = stage.run(&["check"]).output();
    let line = checked.lines().find(|line| line.contains("notifications")).unwrap();
    assert!(line.starts_with("note") && line.contains(FAILURE) && line.contains("max_user_watches"), "{line}");
}

#[test]
fn a_session_that_a_process_has_open_is_checked_however_long_it_was_quiet() {
    let stage = stage();
    let (mut open, mut closed) = (stage.transcript("-home-me-app", 1), stage.transcript("-home-me-app", 2));
    for transcript in [&mut open, &mut closed] {
        transcript.say("first");
        let file = fs::File::options().append(true).open(&transcript.path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
    }
    let _process = Process::open(&stage, "sessions", &open.session);
    let _watcher = stage.start();
    stage.wait_for_rows(4);
    closed.say("not checked");
    open.say("checked");
    stage.wait_for_rows(5);
    // The next check has come by then, too.
    open.say("checked again");
    stage.wait_for_rows(6);
    let texts = stage.database().texts();
    assert!(!texts.contains(&"not checked".to_owned()), "{texts:?}");
}

#[test]
fn active_transcripts_are_checked_after_a_restart() {
    let stage = stage();
    let mut active: Vec<_> = (1..=10).map(|number| stage.transcript("-home-me-app", number)).collect();
    active.iter_mut().for_each(|transcript| transcript.say("first"));
    stage.run_until_idle();
    let watcher = stage.start();
    wait_until("the first rescan", SOON, || watcher.health()["watcher"]["files"] == 10);
    for transcript in &mut active {
        transcript.say("second");
    }
    stage.wait_for_rows(30);
}

#[test]
fn a_new_session_is_found_by_the_rescan_and_checked_from_then_on() {
    let mut stage = stage();
    stage.set("file_watcher.polling_interval", "2");
    let _watcher = stage.start();
    let mut transcript = stage.transcript("-home-me-app", 1);
    for rows in 2..6 {
        transcript.say(&format!("line {rows}"));
        stage.wait_for_rows(rows);
    }
}
