//! A disk without room: capture stops with one clear error, nothing acknowledged is lost, and it comes back by itself.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::stage::{SOON, Stage, wait_until};

/// A small file system in memory.
struct SmallDisk {
    folder: TempDir,
}

impl SmallDisk {
    /// `None` where this process may not mount.
    fn new(megabytes: u32) -> Option<SmallDisk> {
        let disk = SmallDisk { folder: tempfile::Builder::new().prefix("hw-small").tempdir().unwrap() };
        let options = format!("size={megabytes}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(disk.path()).output();
        mounted.is_ok_and(|output| output.status.success()).then_some(disk)
    }

    fn path(&self) -> &Path {
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

#[test]
fn a_full_disk_ends_it_with_74_loses_nothing_and_it_goes_on_when_there_is_room() {
    let Some(disk) = SmallDisk::new(24) else {
        eprintln!("SKIPPED: a small file system needs root");
        return;
    };
    let mut stage = Stage::new();
    stage.set("queue.path", disk.path().join("queue").to_str().unwrap());
    stage.set("database.url", "postgresql:///away?host=/nowhere&user=nobody");
    let mut transcript = stage.transcript("-home-me-app", 1);
    let mut watcher = stage.start();
    let mut texts = transcript.say_many("before", 200);
    wait_until("these are queued", SOON, || watcher.health()["queue"]["pending"] == 201);
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
    let Some(disk) = SmallDisk::new(1) else {
        eprintln!("SKIPPED: a small file system needs root");
        return;
    };
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
    let Some(disk) = SmallDisk::new(24) else {
        eprintln!("SKIPPED: a small file system needs root");
        return;
    };
    let mut stage = Stage::new();
    stage.set("queue.path", disk.path().join("queue").to_str().unwrap());
    stage.set("database.url", "postgresql:///away?host=/nowhere&user=nobody");
    let mut transcript = stage.transcript("-home-me-app", 1);
    let watcher = stage.start();
    let mut texts = transcript.say_many("before", 200);
    wait_until("these are queued", SOON, || watcher.health()["queue"]["pending"] == 201);
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
    let Some(disk) = SmallDisk::new(4) else {
        eprintln!("SKIPPED: a read-only file system needs root");
        return;
    };
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
