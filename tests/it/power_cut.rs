//! Power cuts: what was acknowledged is there afterwards, whole, in order, once.
//!
//! The queue lies on an ext4 image behind a loop device. The watcher is stopped (SIGSTOP) at a random moment and the
//! image copied: the copy holds what had reached the disk by then, as after a power cut. Needs root.

use std::collections::{BTreeSet, HashMap};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::stage::{AWAY, Dice, Poster, SOON, Stage, lacks, pause, rounds, wait_for, wait_until};

/// Size above which a segment of the queue gets no more events.
const SEGMENT_BYTES: &str = "HEADSPACE_SEGMENT_BYTES";

/// An ext4 file system on an image file.
struct Disk {
    folder: TempDir,
}

impl Disk {
    /// `None` where this process may not mount.
    fn new() -> Option<Disk> {
        let disk = Disk { folder: tempfile::Builder::new().prefix("hw-disk").tempdir().unwrap() };
        std::fs::create_dir(disk.mount_point()).unwrap();
        let image = std::fs::File::create(disk.image()).unwrap();
        image.set_len(1 << 30).unwrap();
        let made = run("mkfs.ext4", &[Path::new("-q"), Path::new("-F"), &disk.image()]);
        (!lacks("mkfs.ext4", made) && !lacks("a loop device", disk.mount())).then_some(disk)
    }

    /// What would be there after a power cut now: a copy of the image, mounted.
    fn cut(&self) -> Disk {
        let copy = Disk { folder: tempfile::Builder::new().prefix("hw-disk").tempdir().unwrap() };
        std::fs::create_dir(copy.mount_point()).unwrap();
        assert!(run("cp", &[Path::new("--sparse=always"), &self.image(), &copy.image()]));
        assert!(copy.mount());
        copy
    }

    fn mount(&self) -> bool {
        run("mount", &[Path::new("-o"), Path::new("loop"), &self.image(), &self.mount_point()])
    }

    fn image(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    fn mount_point(&self) -> PathBuf {
        self.folder.path().join("mounted")
    }

    fn queue(&self) -> PathBuf {
        self.mount_point().join("queue")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run("umount", &[&self.mount_point()]);
    }
}

fn run(program: &str, arguments: &[&Path]) -> bool {
    Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
}

/// Sends events over the socket until the watcher is gone, and notes what was acknowledged, in order.
struct Sender {
    end: Arc<AtomicBool>,
    thread: JoinHandle<Vec<(String, usize)>>,
}

impl Sender {
    fn start(poster: Poster, mut dice: Dice, lane: usize) -> Sender {
        let end = Arc::new(AtomicBool::new(false));
        let ended = end.clone();
        let thread = std::thread::spawn(move || {
            let mut acknowledged = Vec::new();
            while !ended.load(Ordering::Relaxed) {
                let size = match dice.below(40) {
                    0 => dice.below(2_000_000),
                    1..=4 => dice.below(100_000),
                    _ => 50 + dice.below(2_000),
                } as usize;
                // No answer: the watcher was stopped, and nothing was acknowledged.
                let Some((code, answer)) = poster.post("/events", &event(lane, size)) else { break };
                assert_eq!(code, 202, "{answer}");
                let answer: Value = serde_json::from_str(&answer).unwrap();
                acknowledged.push((answer["event_ids"][0].as_str().unwrap().to_owned(), size));
            }
            acknowledged
        });
        Sender { end, thread }
    }

    fn finish(self) -> Vec<(String, usize)> {
        self.end.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Sends so many events, each a byte longer than the one before, as long as there are answers.
fn send(poster: &Poster, count: usize, bytes: usize) -> Vec<(String, usize)> {
    let mut acknowledged = Vec::new();
    for size in bytes..bytes + count {
        let Some((code, answer)) = poster.post("/events", &event(0, size)) else { break };
        assert_eq!(code, 202, "{answer}");
        let answer: Value = serde_json::from_str(&answer).unwrap();
        acknowledged.push((answer["event_ids"][0].as_str().unwrap().to_owned(), size));
    }
    acknowledged
}

/// Leaves so many events in the queue, none delivered; the watcher has been killed.
fn fill(stage: &mut Stage, count: usize, bytes: usize) -> Vec<(String, usize)> {
    let url = stage.environment.insert("HEADSPACE_DATABASE__URL".to_owned(), AWAY.to_owned());
    assert_eq!(url, None);
    let watcher = stage.start();
    let acknowledged = send(&watcher.poster(), count, bytes);
    assert_eq!(acknowledged.len(), count);
    watcher.kill();
    stage.environment.remove("HEADSPACE_DATABASE__URL");
    acknowledged
}

/// An event with a text of so many bytes.
fn event(lane: usize, size: usize) -> String {
    let payload = json!({"session_uuid": format!("lane {lane}"), "actor": "user", "text": text(size), "source": "hook",
                         "turn_timestamp": "2026-01-02T03:04:05Z"});
    json!({"event_type": "turn_detected", "payload": payload}).to_string()
}

/// Text of so many bytes that does not compress and says when a piece of it is missing.
fn text(size: usize) -> String {
    let mut text = String::with_capacity(size + 16);
    let mut number = size as u64;
    while text.len() < size {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text.push_str(&format!("{number:016x}"));
    }
    text.truncate(size);
    text
}

/// Every file below a folder that is called `blobs` or lies in one. What goes meanwhile is none.
fn blobs(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.file_name().is_some_and(|name| name == "blobs") {
            found.extend(std::fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
        } else if path.is_dir() {
            found.extend(blobs(&path));
        }
    }
    found
}

#[test]
fn what_was_acknowledged_survives_a_power_cut_at_any_moment() {
    let Some(first) = Disk::new() else { return };
    let mut dice = Dice::new("power cuts");
    let mut disk = first;
    for round in 0..rounds(4) {
        // Appending with Postgres away; draining and removing, and with it fresh files; both again right after opening.
        let drains = round % 2 == 1;
        let while_opening = round % 4 >= 2;
        let mut stage = Stage::new();
        stage.set("queue.path", disk.queue().to_str().unwrap());
        stage.set("queue.spool_path", stage.folder().join("spool").to_str().unwrap().to_owned().as_str());
        if !drains {
            stage.set("database.url", AWAY);
        }
        if dice.below(2) == 0 {
            stage.environment.insert(SEGMENT_BYTES.to_owned(), "3000000".to_owned());
        }
        let mut watcher = stage.start();
        if while_opening {
            let filler = Sender::start(watcher.poster(), dice.fork(), 9);
            std::thread::sleep(Duration::from_millis(300));
            let filled = filler.finish();
            assert!(!filled.is_empty());
            watcher.kill();
            watcher = stage.start_with(&[]);
            std::thread::sleep(Duration::from_millis(dice.below(60)));
            pause(watcher.pid());
            check(&stage, &disk.cut(), &[filled], round);
            watcher.kill();
            disk = Disk::new().unwrap();
            continue;
        }
        let senders: Vec<Sender> = (0..3).map(|lane| Sender::start(watcher.poster(), dice.fork(), lane)).collect();
        let moment = Duration::from_millis(200 + dice.below(2_000));
        let deadline = std::time::Instant::now() + moment;
        while std::time::Instant::now() < deadline {
            assert_eq!(blobs(&disk.queue()), Vec::<PathBuf>::new());
            std::thread::sleep(Duration::from_millis(20));
        }
        pause(watcher.pid());
        let after = disk.cut();
        watcher.kill();
        let acknowledged: Vec<_> = senders.into_iter().map(Sender::finish).collect();
        check(&stage, &after, &acknowledged, round);
        disk = Disk::new().unwrap();
    }
}

#[test]
fn what_was_acknowledged_survives_a_power_cut_while_segments_come_and_go() {
    if Disk::new().is_none() {
        return;
    }
    let mut dice = Dice::new("power cuts while segments come and go");
    for round in 0..rounds(1) {
        let disk = Disk::new().unwrap();
        let mut stage = Stage::new();
        stage.set("queue.path", disk.queue().to_str().unwrap());
        stage.environment.insert(SEGMENT_BYTES.to_owned(), "2000000".to_owned());
        let filled = fill(&mut stage, 14, 900_000);
        let watcher = stage.start();
        let sender = Sender::start(watcher.poster(), dice.fork(), 1);
        std::thread::sleep(Duration::from_millis(dice.below(1500)));
        pause(watcher.pid());
        let after = disk.cut();
        let is_removed = !disk.queue().join("segment-1").exists();
        watcher.kill();
        eprint!("the first segment {} there: ", if is_removed { "is not" } else { "is" });
        check(&stage, &after, &[filled, sender.finish()], round);
    }
}

#[test]
fn what_was_acknowledged_survives_a_power_cut_at_each_step_of_opening_and_of_a_new_segment() {
    if Disk::new().is_none() {
        return;
    }
    // Each start makes a segment.
    let points = [
        "open-locked",
        "open-segment-created",
        "open-recovered",
        "commit-applied:20",
        "sync-flushed:8",
        "segment-copied:2",
        "segment-committed:3",
        "segment-switched:2",
        "segment-spent",
        "segment-copied",
        "segment-committed",
        "append-staged:20",
        "append-between-parts:3",
        "commit-before-apply:40",
        "commit-synced:5",
        "segment-applying:30",
        "sync-before-flush:30",
        "segment-begun",
        "segment-spent:3",
    ];
    // One of each kind here, all, many times over, in a long run.
    for (round, point) in points.into_iter().cycle().take(rounds(9) as usize).enumerate() {
        let disk = Disk::new().unwrap();
        let mut stage = Stage::new();
        stage.set("queue.path", disk.queue().to_str().unwrap());
        let mut acknowledged = Vec::new();
        let begins = point.starts_with("segment-") && point.contains(':') || point == "segment-begun";
        let large = begins || point.starts_with("append-between");
        let spends = point.starts_with("segment-spent");
        if large || spends {
            stage.environment.insert(SEGMENT_BYTES.to_owned(), "2000000".to_owned());
        }
        if spends {
            acknowledged = fill(&mut stage, 12, 900_000);
        } else if large {
            stage.set("database.url", AWAY);
        }
        if matches!(
            point,
            "open-locked" | "segment-copied" | "segment-committed" | "open-segment-created" | "open-recovered"
        ) {
            acknowledged = fill(&mut stage, 40, 2_000);
        }
        stage.environment.insert("HEADSPACE_FAULT_POINT".to_owned(), point.to_owned());
        let mut watcher = stage.start_with(&[]);
        if large && !spends {
            watcher.wait_for_log("ready");
            acknowledged = send(&watcher.poster(), 40, 600_000);
        } else if point.contains(':') && acknowledged.is_empty() {
            watcher.wait_for_log("ready");
            acknowledged = send(&watcher.poster(), 1_000, 2_000);
        }
        let died = wait_for(&format!("it dies at {point}"), SOON * 4, || watcher.ended());
        assert_eq!(died.signal(), Some(6), "at {point}: {}", watcher.log());
        eprint!("{point}: ");
        check(&stage, &disk.cut(), &[acknowledged], round as u32);
    }
}

/// Opens what the cut left and compares it with what was acknowledged.
fn check(stage: &Stage, disk: &Disk, lanes: &[Vec<(String, usize)>], round: u32) {
    let acknowledged: usize = lanes.iter().map(Vec::len).sum();
    let mut after = Stage::with(stage.database.clone());
    after.set("queue.path", disk.queue().to_str().unwrap());
    let dump = after.run(&["queue-dump", "--payload"]);
    assert_eq!(dump.code(), 0, "round {round}: {}", dump.error());
    let mut place = HashMap::new();
    for (index, line) in dump.lines().iter().enumerate() {
        let id = line["event_id"].as_str().unwrap().to_owned();
        let size = line["payload"]["text"].as_str().unwrap().len();
        assert_eq!(line["payload"]["text"].as_str().unwrap(), text(size), "round {round}: {id} is not whole");
        assert_eq!(place.insert(id, (index, size)), None, "round {round}: an event is there twice");
    }
    let stored: BTreeSet<String> = if after.database().count() == 0 {
        BTreeSet::new()
    } else {
        let rows = after.database().query("SELECT event_id FROM event_receipts");
        rows.into_iter().map(|mut row| row.remove(0).unwrap()).collect()
    };
    let mut waiting = 0;
    for lane in lanes {
        let mut newest = None;
        for (id, size) in lane {
            match place.get(id) {
                Some((index, found)) => {
                    assert_eq!(found, size, "round {round}: {id} is not whole");
                    assert!(newest < Some(*index), "round {round}: the order has changed");
                    newest = Some(*index);
                    waiting += 1;
                }
                None => assert!(stored.contains(id), "round {round}: {id} was acknowledged and is lost"),
            }
        }
    }
    assert_eq!(blobs(&disk.queue()), Vec::<PathBuf>::new());
    eprintln!("round {round}: {acknowledged} acknowledged, {waiting} of them waiting, {} stored", stored.len());
    // And it goes on from there: each ends in the table once.
    after.run_until_idle();
    let expected = stored.len() + place.keys().filter(|id| !stored.contains(*id)).count();
    assert_eq!(after.database().count(), expected as u64, "round {round}");
    wait_until("the queue is empty", SOON, || after.run(&["queue-dump"]).lines().is_empty());
}
