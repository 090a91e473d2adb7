//! A disk without room, or a queue that can't be written for another reason: capture stops with one clear error, nothing
//! acknowledged is lost, and it comes back by itself.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::stage::{AWAY, SOON, Stage, Transcript, Watcher, is_root, lacks, wait_until};

/// A small file system in memory.
pub struct SmallDisk {
    folder: TempDir,
}

impl SmallDisk {
    /// `None` where this process may not mount.
    pub fn new(megabytes: u32) -> Option<SmallDisk> {
        let disk = SmallDisk { folder: tempfile::Builder::new().prefix("hw-small").tempdir().unwrap() };
        let options = format!("size={megabytes}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(disk.path()).output();
        (!lacks("the right to mount", mounted.is_ok_and(|output| output.status.success()))).then_some(disk)
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Takes all room but so many bytes.
    fn fill(&self, leave: usize) -> PathBuf {
        let ballast = self.path().join("ballast");
        let mut file = File::create(&ballast).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        let length = file.metadata().unwrap().len();
        file.set_len(length.saturating_sub(leave as u64)).unwrap();
        ballast
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).output();
    }
}

/// A watcher whose queue lies on this disk and whose database is away, and the turns that are queued by now.
fn with_events_queued_on(disk: &SmallDisk) -> (Stage, Transcript, Watcher, Vec<String>) {
    let mut stage = Stage::new();
    stage.set("queue.path", disk.path().join("queue").to_str().unwrap());
    stage.set("database.url", AWAY);
    let mut transcript = stage.transcript("-home-me-app", 1);
    let watcher = stage.start();
    let texts = transcript.say_many("before", 200);
    wait_until("these are queued", SOON, || watcher.health()["queue"]["pending"] == 201);
    (stage, transcript, watcher, texts)
}

#[test]
fn a_full_disk_ends_it_with_74_loses_nothing_and_it_goes_on_when_there_is_room() {
    let Some(disk) = SmallDisk::new(24) else { return };
    let (mut stage, mut transcript, mut watcher, mut texts) = with_events_queued_on(&disk);
    let ballast = disk.fill(200_000);
    let filler = "x".repeat(3000);
    texts.extend(transcript.say_many(&filler, 3000));
    let status = watcher.wait();
    assert_eq!(status.code(), Some(74), "{}", watcher.log());
    let errors: Vec<_> = watcher.log().lines().filter(|line| line.contains("\"ERROR\"")).map(str::to_owned).collect();
    assert_eq!(errors.len(), 1, "one clear error: {errors:?}");
    assert!(errors[0].contains("No space left"), "{errors:?}");
    // Without room it does not come up, and says why; what was acknowledged is still there.
    let again = stage.run(&["run"]);
    assert_eq!(again.code(), 74, "{}", again.error());
    std::fs::remove_file(ballast).unwrap();
    stage.environment.remove("HEADSPACE_DATABASE__URL");
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), texts);
}

#[test]
fn a_hook_whose_spool_is_full_is_silent_and_the_next_one_with_room_is_stored_alone() {
    let Some(disk) = SmallDisk::new(1) else { return };
    let mut stage = Stage::new();
    stage.set("queue.spool_path", disk.path().join("spool").to_str().unwrap());
    let hook = |prompt: &str| {
        let input = serde_json::json!({"session_id": "s", "cwd": "/w", "hook_event_name": "Stop", "prompt_id": prompt});
        let ran = stage.run_with_input(&["hook"], input.to_string());
        assert_eq!((ran.code(), ran.output(), ran.error()), (0, String::new(), String::new()));
    };
    for leave in [0, 200] {
        let ballast = disk.fill(leave);
        hook("without room");
        std::fs::remove_file(ballast).unwrap();
    }
    hook("with room");
    stage.run_until_idle();
    let prompts = stage.database().query("SELECT payload->>'prompt_id' FROM events");
    assert_eq!(prompts, [[Some("with room".to_owned())]]);
    assert!(stage.run(&["queue-dump", "--dead-letters"]).lines().is_empty(), "no half of one was taken for one");
    let left = std::fs::read_dir(disk.path().join("spool")).unwrap().count();
    assert_eq!(left, 0, "what could not be written was taken away");
}

#[test]
fn it_stops_in_time_with_a_full_disk_and_loses_nothing() {
    let Some(disk) = SmallDisk::new(24) else { return };
    let (mut stage, mut transcript, watcher, mut texts) = with_events_queued_on(&disk);
    let ballast = disk.fill(0);
    texts.extend(transcript.say_many(&"x".repeat(3000), 300));
    let (status, took) = watcher.stop();
    // It may have noticed by itself before.
    assert!(matches!(status.code(), Some(0 | 74)), "{status:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");
    std::fs::remove_file(ballast).unwrap();
    stage.environment.remove("HEADSPACE_DATABASE__URL");
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), texts);
}

#[test]
fn a_folder_that_cannot_be_written_is_named_with_the_way_out() {
    let Some(disk) = SmallDisk::new(4) else { return };
    assert!(Command::new("mount").args(["-o", "remount,ro"]).arg(disk.path()).status().unwrap().success());
    let mut stage = Stage::new();
    let queue = disk.path().join("queue");
    stage.set("queue.path", queue.to_str().unwrap());
    let ran = stage.run(&["run"]);
    assert_eq!(ran.code(), 74);
    assert!(ran.error().contains(queue.to_str().unwrap()), "{}", ran.error());
    assert!(ran.error().contains("Read-only file system"), "{}", ran.error());
    assert_eq!(
        ran.error().lines().filter(|line| line.starts_with("headspace-watcher: ")).count(),
        1,
        "{}",
        ran.error()
    );
}

/// Runs the program without root's right to pass over owners and modes; `None` where that can't be done.
fn without_roots_rights() -> Option<Vec<String>> {
    if !is_root() {
        return Some(Vec::new());
    }
    let words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner", "--inh-caps=-all"];
    if lacks("setpriv", Command::new("setpriv").arg("--version").output().is_ok()) {
        return None;
    }
    Some(words.map(str::to_owned).to_vec())
}

/// It ends with 74 and says in one line that it may not use the queue, where it is and what to do; then nothing is lost.
#[track_caller]
fn assert_not_permitted(stage: &Stage, queue: &Path) {
    let ran = stage.run(&["run"]);
    assert_eq!(ran.code(), 74, "{}", ran.error());
    let said: Vec<_> =
        ran.error().lines().filter(|line| line.starts_with("headspace-watcher: ")).map(str::to_owned).collect();
    assert_eq!(said.len(), 1, "{}", ran.error());
    for words in [queue.to_str().unwrap(), "Permission denied", "correct its owner or mode, or set queue.path"] {
        assert!(said[0].contains(words), "{words}: {said:?}");
    }
    let dump = stage.run(&["queue-dump"]);
    assert_eq!(dump.code(), 74, "{}", dump.error());
}

#[test]
fn a_queue_that_may_not_be_written_or_is_somebody_elses_is_said_and_left_as_it_is() {
    let Some(wrapper) = without_roots_rights() else { return };
    use std::os::unix::fs::PermissionsExt;
    let mut stage = Stage::new();
    stage.wrapped_by = wrapper;
    let mut transcript = stage.transcript("-home-me-app", 1);
    let mut texts = transcript.say_many("before", 20);
    stage.environment.insert("HEADSPACE_DATABASE__URL".to_owned(), AWAY.to_owned());
    let watcher = stage.start();
    wait_until("these are queued", SOON, || watcher.health()["queue"]["pending"] == 21);
    watcher.kill();
    let queue = stage.folder().join("data/queue");
    let mode = |mode| std::fs::set_permissions(&queue, PermissionsExt::from_mode(mode)).unwrap();
    mode(0o000);
    assert_not_permitted(&stage, &queue);
    // The folder itself can't be made.
    mode(0o700);
    let parent = stage.folder().join("locked");
    std::fs::create_dir(&parent).unwrap();
    std::fs::set_permissions(&parent, PermissionsExt::from_mode(0o500)).unwrap();
    let elsewhere = parent.join("queue");
    stage.set("queue.path", elsewhere.to_str().unwrap());
    let ran = stage.run(&["run"]);
    assert_eq!(ran.code(), 74, "{}", ran.error());
    assert!(ran.error().contains(elsewhere.to_str().unwrap()) && ran.error().contains("Permission denied"));
    stage.environment.remove("HEADSPACE_QUEUE__PATH");
    // Somebody else's, with the mode that it was made with.
    if !stage.wrapped_by.is_empty() {
        let chown = |owner| assert!(Command::new("chown").arg("-R").arg(owner).arg(&queue).status().unwrap().success());
        chown("nobody");
        assert_not_permitted(&stage, &queue);
        chown("root");
    }
    stage.environment.remove("HEADSPACE_DATABASE__URL");
    // The server's socket may be closed to who has no rights.
    stage.wrapped_by.clear();
    texts.extend(transcript.say_many("after", 20));
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), texts);
}

#[test]
fn without_open_files_it_says_so_and_what_was_written_meanwhile_is_not_lost() {
    let mut stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    let mut texts = transcript.say_many("line", 20);
    // So few that the queue can't be opened.
    stage.wrapped_by = ["sh", "-c", "ulimit -n 12; exec \"$@\"", "sh"].map(str::to_owned).to_vec();
    let ran = stage.run(&["run"]);
    assert_eq!(ran.code(), 74, "{}", ran.error());
    assert!(ran.error().contains("(os error 24)"), "{}", ran.error());
    assert!(ran.error().contains("raise the limit of open files (ulimit -n)"), "{}", ran.error());
    stage.wrapped_by.clear();
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), texts);
    // While it runs: no file and no connection can be opened any more.
    if lacks("prlimit", Command::new("prlimit").arg("--version").output().is_ok()) {
        return;
    }
    stage.set("file_watcher.polling_interval", "0.2");
    let mut watcher = stage.start();
    wait_until("it is up", SOON, || watcher.health()["database"]["state"] == "up");
    let limit = |pid: u32, limit: &str| {
        let status = Command::new("prlimit").args(["--pid", &pid.to_string(), &format!("--nofile={limit}:")]).status();
        assert!(status.unwrap().success());
    };
    limit(watcher.pid(), "1");
    let mut another = stage.transcript("-home-me-app", 2);
    for number in 0..5 {
        texts.extend(transcript.say_many(&format!("starved {number}"), 10));
        texts.extend(another.say_many(&format!("starved elsewhere {number}"), 10));
        std::thread::sleep(std::time::Duration::from_millis(300));
    }
    // It may go on or end with 74, to be started anew; both lose nothing.
    match watcher.ended() {
        Some(status) => {
            assert_eq!(status.code(), Some(74), "{}", watcher.log());
            watcher = stage.start();
        }
        None => limit(watcher.pid(), "1024"),
    }
    wait_until("all is delivered", SOON, || stage.database().texts().len() >= texts.len());
    let mut stored = stage.database().texts();
    stored.sort();
    texts.sort();
    assert_eq!(stored, texts, "{}", watcher.log());
}
