//! The spool as others may leave it: odd files, a folder that can't be written, a file that ends the program.

use std::path::Path;
use std::process::Command;

use crate::stage::{SOON, Stage, Watcher, wait_until};

const HOOK: &str = r#"{"session_id":"s","cwd":"/app","hook_event_name":"Stop"}"#;

fn pending(watcher: &Watcher) -> u64 {
    watcher.health()["queue"]["pending"].as_u64().unwrap()
}

/// Names of the files in the spool.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_no_regular_file_in_the_spool_is_ignored_and_holds_nothing_up() {
    let stage = Stage::with(None);
    assert_eq!(stage.run_with_input(&["hook"], HOOK).code(), 0);
    let spool = stage.folder().join("data/spool");
    assert!(Command::new("mkfifo").arg(spool.join("0.hook")).status().unwrap().success());
    assert!(Command::new("mkfifo").arg(spool.join(".attempt")).status().unwrap().success());
    std::fs::create_dir(spool.join("1.hook")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", spool.join("2.hook")).unwrap();
    std::os::unix::fs::symlink(stage.folder().join("config.yaml"), spool.join("3.events")).unwrap();
    let watcher = stage.start();
    wait_until("the hook is taken in", SOON, || pending(&watcher) == 1);
    assert_eq!(stage.run_with_input(&["hook"], HOOK).code(), 0);
    wait_until("the next one is too", SOON, || pending(&watcher) == 2);
    assert_eq!(watcher.health()["queue"]["dead_letters"], 0);
    assert_eq!(names(&spool), ["0.hook", "1.hook", "2.hook", "3.events"]);
    let log = watcher.log();
    assert!(watcher.stop().0.success());
    assert!(!log.contains("did not end in time"), "{log}");
}

#[test]
fn a_hook_that_can_not_write_to_the_spool_goes_by_the_socket() {
    let stage = Stage::with(None);
    let watcher = stage.start();
    let spool = stage.folder().join("data/spool");
    let _ = std::fs::remove_dir_all(&spool);
    std::fs::write(&spool, "a file where the folder should be").unwrap();
    assert_eq!(stage.run_with_input(&["hook"], HOOK).code(), 0);
    wait_until("the command's hook is in the queue", SOON, || pending(&watcher) == 1);
    let end = HOOK.replace("Stop", "SessionEnd");
    assert_eq!(watcher.ask("POST", "/hook/session-end", &[], &end).code, 200);
    assert_eq!(pending(&watcher), 2);
    // Larger than what a socket takes at once.
    let long = HOOK.replace("\"Stop\"", &format!("\"Stop\",\"message\":\"{}\"", "x".repeat(3_000_000)));
    assert_eq!(stage.run_with_input(&["hook"], long).code(), 0);
    wait_until("the long one is in the queue", SOON, || pending(&watcher) == 3);
}

#[test]
fn a_spool_file_that_ends_the_program_twice_is_moved_aside_and_becomes_a_dead_letter() {
    let mut stage = Stage::with(None);
    let long = HOOK.replace("\"Stop\"", &format!("\"Stop\",\"message\":\"{}\"", "x".repeat(2_000_000)));
    assert_eq!(stage.run_with_input(&["hook"], &long).code(), 0);
    let spool = stage.folder().join("data/spool");
    let fatal = names(&spool).remove(0);
    assert_eq!(stage.run_with_input(&["hook"], HOOK).code(), 0);
    stage.environment.insert("HEADSPACE_FAULT_POINT".to_owned(), "append-before-apply:1".to_owned());
    for _ in 0..2 {
        let mut watcher = stage.start_with(&[]);
        assert!(!watcher.wait().success(), "it has not died: {}", watcher.log());
        assert!(names(&spool).contains(&fatal));
    }
    stage.environment.clear();
    let watcher = stage.start();
    wait_until("the other hook is taken in", SOON, || pending(&watcher) == 1);
    wait_until("the file is a dead letter", SOON, || watcher.health()["queue"]["dead_letters"] == 1);
    assert_eq!(names(&spool), [format!("{fatal}.failed")]);
    let letters = stage.run(&["queue-dump", "--dead-letters"]).lines();
    let message = letters[0]["message"].as_str().unwrap();
    assert!(message.contains(&fatal) && message.contains("ended the program 2 times"), "{message}");
    // Nothing of it is lost: renamed back, it is taken in.
    std::fs::rename(spool.join(format!("{fatal}.failed")), spool.join(&fatal)).unwrap();
    wait_until("it is taken in after all", SOON, || pending(&watcher) == 2);
}

#[test]
fn a_kill_while_the_queue_is_full_is_no_spool_files_fault() {
    let mut stage = Stage::with(None);
    stage.set("queue.max_pending_bytes", "1048576").set("event_system.max_event_bytes", "1000000");
    let long = HOOK.replace("\"Stop\"", &format!("\"Stop\",\"message\":\"{}\"", "x".repeat(900_000)));
    for _ in 0..4 {
        assert_eq!(stage.run_with_input(&["hook"], &long).code(), 0);
    }
    for _ in 0..4 {
        let watcher = stage.start();
        watcher.wait_for_log("the spool waits for room");
        watcher.kill();
    }
    let watcher = stage.start();
    assert_eq!(watcher.health()["queue"]["dead_letters"], 0, "{}", watcher.log());
    assert!(names(&stage.folder().join("data/spool")).iter().all(|name| !name.ends_with(".failed")));
}
