//! Folders that were there before the watcher: nobody else gets in, or it does not start.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use crate::stage::{Stage, lacks, wait_for};

/// The folders that hold what is private.
fn folders(stage: &Stage) -> [PathBuf; 2] {
    ["queue", "spool"].map(|name| stage.folder().join("data").join(name))
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().mode() & 0o7777
}

/// A stage whose folders are there with this mode.
fn with_mode(open: u32) -> Stage {
    let stage = Stage::with(None);
    for folder in folders(&stage) {
        std::fs::create_dir_all(&folder).unwrap();
        set_mode(&folder, open);
    }
    stage
}

/// What is said is one line with the code for a configuration error, and what it names.
#[track_caller]
fn assert_refused(stage: &Stage, arguments: &[&str], words: &[&str]) {
    let ran = stage.run(arguments);
    assert_eq!(ran.code(), 78, "{arguments:?}: {}{}", ran.output(), ran.error());
    let said = ran.output() + &ran.error();
    for word in words {
        assert!(said.contains(word), "{arguments:?}: no {word} in {said}");
    }
}

#[test]
fn folders_that_others_may_use_are_found_by_check_and_tightened_at_the_start() {
    let stage = with_mode(0o777);
    let check = stage.run(&["check", "--no-database"]);
    for folder in folders(&stage) {
        let name = folder.file_name().unwrap().to_str().unwrap();
        let found = check.output().lines().any(|line| {
            let (shown, path) = (line.starts_with("note"), folder.display().to_string());
            shown && line.contains(name) && line.contains(&format!("chmod 700 {path}")) && line.contains("0777")
        });
        assert!(found, "{name}: {}", check.output());
        assert_eq!(mode(&folder), 0o777, "check changes nothing");
    }
    let watcher = stage.start();
    for folder in folders(&stage) {
        assert_eq!(mode(&folder), 0o700, "{}", folder.display());
        let path = folder.display().to_string();
        let said = watcher.log().lines().filter(|line| line.contains(&path) && line.contains("0777")).count();
        assert_eq!(said, 1, "{}", watcher.log());
    }
    watcher.stop();
    let again = stage.start();
    assert!(!again.log().contains("0777"), "{}", again.log());
}

#[test]
fn a_folder_of_somebody_else_is_refused_with_its_owner_and_the_fix() {
    for index in 0..2 {
        let stage = with_mode(0o777);
        let folder = &folders(&stage)[index];
        if lacks("root", chown(folder, Some(65_534), None).is_ok()) {
            return;
        }
        let path = folder.display().to_string();
        let words = ["belongs to user 65534", &format!("chown 0 {path}")];
        assert_refused(&stage, &["check", "--no-database"], &words);
        assert_refused(&stage, &["run"], &words);
        assert_eq!(mode(folder), 0o777, "it is not ours to change");
        // Who runs at an agent's side never fails.
        let ran = stage.run_with_input(&["hook"], r#"{"hook_event_name":"Stop"}"#);
        assert_eq!((ran.code(), ran.output(), ran.error()), (0, String::new(), String::new()));
    }
}

#[test]
fn below_a_folder_that_everybody_may_write_in_nothing_private_is_kept() {
    for there in [true, false] {
        let stage = if there { with_mode(0o700) } else { Stage::with(None) };
        let open = stage.folder().join("data");
        std::fs::create_dir_all(&open).unwrap();
        let mut moved = stage;
        moved.set("http.socket", "elsewhere/watcher.sock");
        set_mode(&open, 0o777);
        let words = ["everybody may replace it", &format!("chmod o-w {}", open.canonicalize().unwrap().display())];
        assert_refused(&moved, &["check", "--no-database"], &words);
        assert_refused(&moved, &["run"], &words);
        // As /tmp is.
        set_mode(&open, 0o1777);
        drop(moved.start_with(&[]).wait_for_log("ready"));
    }
}

#[test]
fn what_others_have_put_into_an_open_queue_is_not_opened() {
    let stage = with_mode(0o777);
    let [queue, _] = folders(&stage);
    let mine = stage.folder().join("mine");
    std::fs::write(&mine, "precious").unwrap();
    std::os::unix::fs::symlink(&mine, queue.join("lock")).unwrap();
    assert_refused(&stage, &["run"], &["lock is a link", "remove it"]);
    assert_eq!(std::fs::read_to_string(&mine).unwrap(), "precious");
}

#[test]
fn a_folder_in_which_others_have_put_something_stays_refused_whoever_comes_first() {
    let stage = with_mode(0o777);
    let [_, spool] = folders(&stage);
    let mine = stage.folder().join("mine");
    std::fs::write(&mine, "precious").unwrap();
    std::os::unix::fs::symlink(&mine, spool.join(".attempt")).unwrap();
    let hook = r#"{"session_id":"s","cwd":"/p","hook_event_name":"Stop"}"#;
    assert_eq!(stage.run_with_input(&["hook"], hook).code(), 0);
    for _ in 0..2 {
        assert_refused(&stage, &["run"], &[".attempt is a link", "remove it"]);
    }
    let emitted =
        stage.run(&["emit", "--type", "session_ended", "--payload", r#"{"session_uuid":"s","reason":"closed"}"#]);
    assert_eq!(emitted.code(), 78, "{}", emitted.error());
    assert_eq!(std::fs::read_to_string(&mine).unwrap(), "precious");
}

#[test]
fn nobody_may_replace_the_socket_or_what_is_beside_it() {
    let stage = Stage::with(None);
    let data = stage.folder().join("data");
    std::fs::create_dir(&data).unwrap();
    set_mode(&data, 0o777);
    let check = stage.run(&["check", "--no-database"]);
    assert!(check.output().contains(&format!("chmod go-w {}", data.display())), "{}", check.output());
    assert_eq!(mode(&data), 0o777);
    let watcher = stage.start();
    assert_eq!(mode(&data), 0o755, "who may read it still may");
    let line = wait_for("it is said", crate::stage::SOON, || watcher.logged("everybody could write").pop());
    assert_eq!(line["mode"], "0777", "{line}");
}
