//! The spool as others may leave it: odd files, a folder that can't be written, a file that ends the program.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::stage::{SOON, Stage, Watcher, wait_until};
use crate::starting::without_privileges;

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
    assert!(Command::new("mkfifo").arg(spool.join("0.jsonl")).status().unwrap().success());
    assert!(Command::new("mkfifo").arg(spool.join(".attempt")).status().unwrap().success());
    std::fs::create_dir(spool.join("1.jsonl")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", spool.join("2.jsonl")).unwrap();
    std::os::unix::fs::symlink(stage.folder().join("config.yaml"), spool.join("3.jsonl")).unwrap();
    let watcher = stage.start();
    wait_until("the hook is taken in", SOON, || pending(&watcher) == 1);
    assert_eq!(stage.run_with_input(&["hook"], HOOK).code(), 0);
    wait_until("the next one is too", SOON, || pending(&watcher) == 2);
    assert_eq!(watcher.health()["queue"]["dead_letters"], 0);
    // A file goes after its event is in the queue.
    wait_until("its file is gone", SOON, || names(&spool) == ["0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl"]);
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
    stage.environment.insert("HEADSPACE_FAULT_POINT".to_owned(), "commit-before-apply:1".to_owned());
    for _ in 0..2 {
        let mut watcher = stage.start_with(&[]);
        assert!(!watcher.wait().success(), "it has not died: {}", watcher.log());
        assert!(names(&spool).contains(&fatal));
    }
    stage.environment.clear();
    let watcher = stage.start();
    wait_until("the other hook is taken in", SOON, || pending(&watcher) == 1);
    wait_until("the file is a dead letter", SOON, || watcher.health()["queue"]["dead_letters"] == 1);
    wait_until("the other hook's file is gone", SOON, || names(&spool) == [format!("{fatal}.failed")]);
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

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

#[test]
fn a_spool_file_that_could_not_be_read_is_taken_in_once_its_mode_is_corrected() {
    let Some(mut stage) = without_privileges(Stage::with(None)) else { return };
    stage.set("file_watcher.polling_interval", "0.2");
    for _ in 0..2 {
        assert_eq!(stage.run_with_input(&["hook"], HOOK).code(), 0);
    }
    let spool = stage.folder().join("data/spool");
    let unreadable = spool.join(names(&spool).remove(0));
    set_mode(&unreadable, 0o000);
    let watcher = stage.start();
    wait_until("the other one is taken in", SOON, || pending(&watcher) == 1);
    let unread = || watcher.health()["spool"]["unread_files"].as_u64();
    wait_until("health says so", SOON, || unread() == Some(1));
    let status = stage.run(&["status"]);
    assert_eq!(status.code(), 0, "a warning");
    for words in
        ["1 file in the spool can't be read", "owner or mode", unreadable.to_str().unwrap(), "Permission denied"]
    {
        assert!(status.output().contains(words), "{words}: {}", status.output());
    }
    let gauge = |count: u32| format!("headspace_watcher_spool_unread_files {count}\n");
    assert!(watcher.get("/metrics").unwrap().1.contains(&gauge(1)));
    set_mode(&unreadable, 0o600);
    wait_until("it is taken in", SOON, || pending(&watcher) == 2);
    wait_until("health has nothing to say of it any more", SOON, || unread() == Some(0));
    assert!(watcher.get("/metrics").unwrap().1.contains(&gauge(0)));
    assert!(names(&spool).is_empty());
    assert_eq!(watcher.logged("a spool file could not be read").len(), 1, "said once: {}", watcher.log());
}

#[test]
fn a_spool_file_that_was_taken_in_but_can_not_be_removed_is_never_taken_in_again() {
    let Some(mut stage) = without_privileges(Stage::with(None)) else { return };
    stage.set("file_watcher.polling_interval", "0.1");
    let watcher = stage.start();
    let spool = stage.folder().join("data/spool");
    // A folder in which the watcher may read but not remove: it would make its own one writable at the start, so this one
    // comes in its place later.
    stage.set("queue.spool_path", "locked");
    for _ in 0..7 {
        assert_eq!(stage.run_with_input(&["hook"], HOOK).code(), 0);
    }
    let locked = stage.folder().join("locked");
    let files = names(&locked).into_iter().map(|name| spool.join(name)).collect::<Vec<_>>();
    let later = &files[1..];
    later.iter().for_each(|file| set_mode(&locked.join(file.file_name().unwrap()), 0o000));
    set_mode(&locked, 0o500);
    std::fs::rename(&spool, stage.folder().join("former")).unwrap();
    std::fs::rename(&locked, &spool).unwrap();
    watcher.wait_for_log("can't be removed");
    let unread = || watcher.health()["spool"]["unread_files"].as_u64();
    let elsewhere = stage.folder().join("elsewhere");
    for (number, next) in (2..).zip(later) {
        // A change of the file is no reason to take it in again, nor is it that it was out of reach for a while. The next
        // one's being taken in shows that it was looked at.
        match number {
            3 | 6 => {
                // Its name is seen, it is not. Nothing tells that this was looked at: five times the polling interval.
                set_mode(&spool, 0o400);
                std::thread::sleep(std::time::Duration::from_millis(500));
                set_mode(&spool, 0o500);
            }
            4 => {
                std::fs::rename(&spool, &elsewhere).unwrap();
                wait_until("the folder is gone", SOON, || unread() == Some(0));
                std::fs::rename(&elsewhere, &spool).unwrap();
            }
            5 => {}
            _ => set_mode(&files[0], 0o640),
        }
        set_mode(next, 0o600);
        wait_until("the next one is taken in", SOON, || pending(&watcher) >= number);
        assert_eq!(pending(&watcher), number);
        // A file goes, or does not, after its event is in the queue.
        wait_until("it can't be removed", SOON, || watcher.logged("can't be removed").len() as u64 == number);
    }
    assert_eq!(watcher.logged("can't be removed").len(), 7, "said once of each: {}", watcher.log());
    set_mode(&spool, 0o700);
    wait_until("they are removed once they can be", SOON, || names(&spool).is_empty());
    assert_eq!(pending(&watcher), 7);
}

#[test]
fn what_is_left_in_a_spool_that_can_not_be_listed_is_taken_in_once() {
    let Some(mut stage) = without_privileges(Stage::with(None)) else { return };
    stage.set("file_watcher.polling_interval", "0.1");
    let watcher = stage.start();
    let spool = stage.folder().join("data/spool");
    assert_eq!(stage.run_with_input(&["hook"], HOOK).code(), 0);
    wait_until("the folder is there", SOON, || pending(&watcher) == 1);
    set_mode(&spool, 0o300);
    assert_eq!(stage.run_with_input(&["hook"], HOOK).code(), 0);
    assert_eq!(watcher.ask("POST", "/hook/stop", &[], HOOK).code, 200);
    set_mode(&spool, 0o700);
    wait_until("all of it is taken in", SOON, || pending(&watcher) >= 3 && names(&spool).is_empty());
    assert_eq!(pending(&watcher), 3);
}

#[test]
fn until_idle_takes_in_what_it_could_not_read_at_first_when_that_is_corrected_meanwhile() {
    let Some(mut stage) = without_privileges(Stage::with(None)) else { return };
    stage.set("database.url", crate::stage::AWAY).set("file_watcher.polling_interval", "0.1");
    assert_eq!(stage.run_with_input(&["hook"], HOOK).code(), 0);
    let spool = stage.folder().join("data/spool");
    let unreadable = spool.join(names(&spool).remove(0));
    set_mode(&unreadable, 0o000);
    assert_eq!(stage.run_with_input(&["hook"], HOOK).code(), 0);
    let watcher = stage.start_with(&["--until-idle"]);
    watcher.wait_for_log("a spool file could not be read");
    set_mode(&unreadable, 0o600);
    wait_until("both are taken in", SOON, || pending(&watcher) == 2);
    wait_until("health says so", SOON, || watcher.health()["spool"]["unread_files"] == 0);
}

#[test]
fn without_a_watcher_status_says_how_much_waits_in_the_spool() {
    let stage = Stage::with(None);
    for said in ["spool     1 file to be read\n", "spool     2 files to be read\n"] {
        assert_eq!(stage.run_with_input(&["hook"], HOOK).code(), 0);
        let ran = stage.run(&["status"]);
        assert_eq!(ran.code(), 3);
        assert!(ran.output().contains(said), "{}", ran.output());
    }
    assert_eq!(stage.run(&["status", "--json"]).lines()[0]["spool"]["waiting_files"], 2);
}
