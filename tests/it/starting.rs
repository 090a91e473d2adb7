//! How a start ends: a failing one leaves everything as it was, one that is told to stop does so while the queue is still
//! being opened, and a task that ends takes the process with it.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::full_disk::SmallDisk;
use crate::proxy::Proxy;
use crate::stage::{
    Database, Dice, SOON, Stage, busy_socket, is_root, lacks, lacks_proc, rounds, signal, wait_for, wait_until,
};

/// What a whole stop may take.
const LIMIT: Duration = Duration::from_secs(2);

fn socket(stage: &Stage) -> PathBuf {
    stage.folder().join("data/watcher.sock")
}

/// Waits until the process handles SIGTERM itself: before that the signal would just kill it.
#[track_caller]
fn wait_for_signal_handlers(pid: u32) {
    const SIGTERM_BIT: u64 = 1 << 14;
    wait_until("it handles SIGTERM", SOON, || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        u64::from_str_radix(caught.trim(), 16).unwrap() & SIGTERM_BIT != 0
    });
}

/// Whether the process has taken the lock of this queue folder.
fn holds(queue: &Path, pid: u32) -> bool {
    fs::read_to_string(queue.join("lock")).is_ok_and(|holder| holder.trim() == pid.to_string())
}

#[test]
fn a_path_that_is_no_socket_is_left_alone_and_named_as_a_configuration_error() {
    for kind in ["file", "folder", "link", "dangling link", "pipe"] {
        let mut stage = Stage::with(None);
        let path = stage.folder().join("notes.md");
        let target = stage.folder().join("target");
        match kind {
            "file" => fs::write(&path, "the user's own").unwrap(),
            "folder" => fs::create_dir(&path).unwrap(),
            "link" => {
                fs::write(&target, "the user's own").unwrap();
                std::os::unix::fs::symlink(&target, &path).unwrap();
            }
            "dangling link" => std::os::unix::fs::symlink(&target, &path).unwrap(),
            _ => assert!(Command::new("mkfifo").arg(&path).status().unwrap().success()),
        }
        let before = fs::symlink_metadata(&path).unwrap();
        stage.set("http.socket", path.to_str().unwrap());
        let checked = stage.run(&["check", "--no-database"]);
        assert_eq!(checked.code(), 78, "{kind}: {}", checked.output());
        let wrong = checked.output();
        let wrong = wrong.lines().find(|line| line.starts_with("WRONG")).unwrap_or_default().to_owned();
        assert!(wrong.contains("http.socket") && wrong.contains("notes.md"), "{kind}: {}", checked.output());
        let ran = stage.run(&["run"]);
        assert_eq!(ran.code(), 78, "{kind}: {}", ran.error());
        let error = ran.error();
        let error = error.lines().find(|line| line.starts_with("headspace-watcher: ")).unwrap();
        assert!(error.contains("http.socket") && error.contains(path.to_str().unwrap()), "{kind}: {error}");
        let after = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{kind}: {error}"));
        let identity = |metadata: &fs::Metadata| (metadata.ino(), metadata.mode(), metadata.mtime_nsec());
        assert_eq!(identity(&before), identity(&after), "{kind}");
        match kind {
            "file" => assert_eq!(fs::read_to_string(&path).unwrap(), "the user's own"),
            "link" => assert_eq!(fs::read_to_string(&target).unwrap(), "the user's own"),
            "dangling link" => assert!(!target.exists()),
            _ => {}
        }
        assert!(!stage.folder().join("data/queue").exists(), "{kind}: found before the queue is made");
    }
}

#[test]
fn a_start_that_fails_removes_nobodys_socket() {
    let stage = Stage::with(None);
    let first = stage.start();
    let mut other = Stage::with(None);
    other.set("http.socket", socket(&stage).to_str().unwrap());
    for arguments in [&["run"] as &[&str], &["run"]] {
        let ran = other.run(arguments);
        assert_eq!(ran.code(), 78, "{}", ran.error());
        let error = ran.error();
        assert!(error.contains("another process listens") && error.contains("http.socket"), "{error}");
        assert!(socket(&stage).exists(), "the running watcher's socket is gone");
        assert_eq!(first.health()["pid"], first.pid());
    }
    assert_eq!(first.stop().0.code(), Some(0));
    assert!(!socket(&stage).exists(), "its own it removes");
    // Now it is free for the other.
    let watcher = other.start_with(&[]);
    watcher.wait_for_log("ready");
}

#[test]
fn sockets_that_belong_to_another_program_are_left_alone() {
    for kind in ["datagram", "busy", "another user's"] {
        let mut stage = Stage::with(None);
        let path = stage.folder().join("own/other.sock");
        fs::create_dir(path.parent().unwrap()).unwrap();
        let mut kept: Vec<Box<dyn std::any::Any>> = Vec::new();
        match kind {
            "datagram" => kept.push(Box::new(UnixDatagram::bind(&path).unwrap())),
            "busy" => kept.push(Box::new(busy_socket(&path))),
            // One that may not be connected to: whether somebody listens can't be told.
            _ => {
                if is_root() && lacks("setpriv", Command::new("setpriv").arg("--version").output().is_ok()) {
                    continue;
                }
                if is_root() {
                    let wrapped = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"];
                    stage.wrapped_by = wrapped.map(str::to_owned).to_vec();
                }
                kept.push(Box::new(UnixListener::bind(&path).unwrap()));
                fs::set_permissions(&path, PermissionsExt::from_mode(0o000)).unwrap();
            }
        }
        let before = fs::symlink_metadata(&path).unwrap();
        stage.set("http.socket", path.to_str().unwrap());
        let mut watcher = stage.start_with(&[]);
        assert_eq!(watcher.wait().code(), Some(78), "{kind}: {}", watcher.log());
        assert!(watcher.log().contains("http.socket"), "{kind}: {}", watcher.log());
        let after = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{kind}: {error}"));
        assert_eq!((before.ino(), before.mode()), (after.ino(), after.mode()), "{kind}");
    }
}

#[test]
fn a_left_over_socket_of_a_dead_watcher_is_taken_over() {
    let stage = Stage::with(None);
    stage.start().kill();
    assert!(fs::symlink_metadata(socket(&stage)).unwrap().file_type().is_socket());
    let checked = stage.run(&["check", "--no-database"]);
    assert_eq!(checked.code(), 0, "{}", checked.output());
    let watcher = stage.start();
    assert_eq!(watcher.health()["pid"], watcher.pid());
    assert_eq!(fs::metadata(socket(&stage)).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn of_two_that_take_over_one_socket_at_once_one_has_it_and_the_other_ends() {
    let mut dice = Dice::new("takeover");
    for _ in 0..rounds(10) {
        let stage = Stage::with(None);
        fs::create_dir(stage.folder().join("data")).unwrap();
        // A left-over: the file stays when the listener goes.
        drop(UnixListener::bind(socket(&stage)).unwrap());
        let mut other = Stage::with(None);
        other.set("http.socket", socket(&stage).to_str().unwrap());
        let mut watchers = [stage.start_with(&[]), other.start_with(&[])];
        if dice.below(2) == 0 {
            watchers.reverse();
        }
        let loser = wait_for("one of them ends", SOON, || watchers.iter_mut().position(|one| one.ended().is_some()));
        assert_eq!(watchers[loser].ended().unwrap().code(), Some(78), "{}", watchers[loser].log());
        let winner = &watchers[1 - loser];
        winner.wait_for_log("ready");
        // Both look at the one socket.
        let health = wait_for("it answers", SOON, || asked(&socket(&stage)));
        assert_eq!(health["pid"], winner.pid(), "{}", winner.log());
    }
}

/// `GET /health` over this socket.
fn asked(socket: &Path) -> Option<serde_json::Value> {
    let stream = std::os::unix::net::UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(SOON)).ok()?;
    let answer = crate::stage::exchange(stream, "GET", "/health", &["Host: localhost"], None)?;
    serde_json::from_str(&answer.body).ok()
}

#[test]
fn a_stop_removes_no_socket_that_somebody_else_has_put_in_its_place() {
    let stage = Stage::with(None);
    let watcher = stage.start();
    fs::remove_file(socket(&stage)).unwrap();
    let _other = UnixListener::bind(socket(&stage)).unwrap();
    assert_eq!(watcher.stop().0.code(), Some(0));
    assert!(socket(&stage).exists(), "somebody else's socket is gone");
}

/// A queue with 300 turns and 20 emitted events that can't be opened, in a stage with a database.
fn damaged() -> (Stage, Vec<String>) {
    let mut stage = Stage::new();
    stage.set("database.url", crate::stage::AWAY);
    let texts = stage.transcript("-home-me-app", 1).say_many("line", 300);
    let watcher = stage.start();
    for number in 0..20 {
        let payload = json!({"session_uuid": format!("emitted {number}"), "reason": "closed"}).to_string();
        let event = json!({"event_type": "session_ended", "payload": serde_json::from_str::<serde_json::Value>(&payload).unwrap()});
        assert_eq!(watcher.ask("POST", "/events", &[], &event.to_string()).code, 202);
    }
    wait_until("all is queued", SOON, || watcher.health()["queue"]["pending"] == 321);
    watcher.kill();
    stage.environment.remove("HEADSPACE_DATABASE__URL");
    fs::write(stage.folder().join("data/queue/DAMAGED"), "1 a test says so\n").unwrap();
    (stage, texts)
}

/// Runs to its end and compares what is stored with what was accepted.
#[track_caller]
fn assert_nothing_is_lost(stage: &Stage, texts: &[String], what: &str) {
    stage.run_until_idle();
    let mut stored = stage.database().texts();
    let mut texts = texts.to_vec();
    stored.sort();
    texts.sort();
    assert!(stored == texts, "{what}: {} of {} turns", stored.len(), texts.len());
    let ended = stage
        .database()
        .value("SELECT count(DISTINCT payload->>'session_uuid') FROM events WHERE event_type = 'session_ended'");
    assert_eq!((ended.as_str(), stage.database().count()), ("20", texts.len() as u64 + 21), "{what}");
}

#[test]
fn it_stops_in_time_while_the_queue_is_being_opened_and_the_next_start_goes_on() {
    for point in ["open-locked", "damage-noted", "damage-moved", "segment-copied", "open-recovered"] {
        let (mut stage, texts) = damaged();
        // There it stays, at work, for ever.
        stage.environment.insert("HEADSPACE_FAULT_POINT".to_owned(), point.to_owned());
        stage.environment.insert("HEADSPACE_FAULT_KIND".to_owned(), "loop".to_owned());
        let watcher = stage.start_with(&[]);
        wait_for_signal_handlers(watcher.pid());
        let queue = stage.folder().join("data/queue");
        let is_there = |name: &str| queue.join(name).exists();
        wait_until(&format!("it is at {point}"), SOON, || match point {
            "open-locked" => holds(&queue, watcher.pid()),
            "damage-noted" => is_there("DAMAGED") && is_there("segment-1"),
            "damage-moved" => is_there("damaged-1"),
            _ => is_there("segment-2") && holds(&queue, watcher.pid()),
        });
        let (status, took) = watcher.stop();
        assert_eq!(status.code(), Some(0), "{point}");
        assert!(took < LIMIT, "{point}: {took:?}");
        for name in ["HEADSPACE_FAULT_POINT", "HEADSPACE_FAULT_KIND"] {
            stage.environment.remove(name);
        }
        assert_nothing_is_lost(&stage, &texts, point);
    }
}

#[test]
fn a_damaged_queue_in_a_mount_point_is_put_right_there() {
    let Some(disk) = SmallDisk::new(64) else { return };
    let (mut stage, texts) = damaged();
    let copied = Command::new("cp").arg("-a").arg(stage.folder().join("data/queue/.")).arg(disk.path()).status();
    assert!(copied.unwrap().success());
    stage.set("queue.path", disk.path().to_str().unwrap());
    assert_nothing_is_lost(&stage, &texts, "in a mount point");
    let aside = fs::read_dir(disk.path()).unwrap().flatten();
    assert_eq!(aside.filter(|entry| entry.file_name().to_string_lossy().starts_with("damaged-")).count(), 1);
}

#[test]
fn a_stop_at_any_moment_of_a_salvage_loses_nothing() {
    if lacks_proc() {
        return;
    }
    let mut dice = Dice::new("salvage");
    for round in 0..rounds(3) {
        let (stage, texts) = damaged();
        // Again and again, until one comes to its end.
        for _ in 0..5 {
            let mut watcher = stage.start_with(&[]);
            wait_for_signal_handlers(watcher.pid());
            std::thread::sleep(Duration::from_micros(dice.below(100_000)));
            signal(watcher.pid(), "TERM");
            assert_eq!(watcher.wait().code(), Some(0), "{}", watcher.log());
        }
        assert_nothing_is_lost(&stage, &texts, &format!("round {round}"));
    }
}

#[test]
fn a_stop_while_a_held_queue_is_waited_for_ends_with_0() {
    if lacks_proc() {
        return;
    }
    let stage = Stage::with(None);
    let queue = stage.folder().join("data/queue");
    fs::create_dir_all(&queue).unwrap();
    let mut lock = fs::File::create(queue.join("lock")).unwrap();
    lock.lock().unwrap();
    writeln!(lock, "{}", std::process::id()).unwrap();
    let watcher = stage.start_with(&[]);
    wait_for_signal_handlers(watcher.pid());
    let (status, took) = watcher.stop();
    assert_eq!(status.code(), Some(0));
    assert!(took < LIMIT, "{took:?}");
    // Without a stop it gives up after a moment, and says who holds it.
    let ran = stage.run(&["run"]);
    assert_eq!(ran.code(), 69);
    assert!(ran.error().contains(&format!("held by process {}", std::process::id())), "{}", ran.error());
}

#[test]
fn a_task_that_ends_ends_the_process_with_an_error_that_names_it() {
    for task in ["socket", "http", "pulse", "drainer", "transcripts", "spool"] {
        let mut stage = Stage::new();
        stage.set("http.listen", "127.0.0.1:0");
        stage.environment.insert("HEADSPACE_FAULT_POINT".to_owned(), format!("task-{task}"));
        let mut watcher = stage.start_with(&[]);
        assert_eq!(watcher.wait().code(), Some(70), "{task}: {}", watcher.log());
        assert!(watcher.log().contains(&format!("headspace-watcher: {task} ended unexpectedly")), "{}", watcher.log());
        assert!(!socket(&stage).exists(), "{task}: its socket is left over");
    }
}

/// A stage whose program reads only what the modes of files let it read; `None` where that can't be had.
pub fn without_privileges(mut stage: Stage) -> Option<Stage> {
    if is_root() {
        if lacks("setpriv", Command::new("setpriv").arg("--version").output().is_ok()) {
            return None;
        }
        let wrapped = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"];
        stage.wrapped_by = wrapped.map(str::to_owned).to_vec();
    }
    Some(stage)
}

#[test]
fn until_idle_ends_with_1_when_something_could_not_be_read_and_says_how_much() {
    // Through the proxy: the server's own socket is closed to those without privileges.
    let database = Database::new();
    let proxy = Proxy::start(&database);
    let Some(mut stage) = without_privileges(Stage::with(Some(database))) else { return };
    stage.environment.insert("DATABASE_URL".to_owned(), proxy.url());
    let mut readable = stage.transcript("-home-me-app", 1);
    readable.say("read");
    let mut locked = [2, 3].map(|number| stage.transcript("-home-me-app", number));
    locked.iter_mut().for_each(|transcript| transcript.say("not read"));
    let mut hidden = stage.transcript("-home-me-hidden", 4);
    hidden.say("not read");
    let hook = json!({"session_id": "s", "cwd": "/w", "hook_event_name": "Stop"}).to_string();
    assert_eq!(stage.run_with_input(&["hook"], &hook).code(), 0);
    let spooled = fs::read_dir(stage.folder().join("data/spool")).unwrap().next().unwrap().unwrap().path();
    let folder = hidden.path.parent().unwrap().to_owned();
    let mode = |path: &Path, mode| fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    locked.iter().for_each(|transcript| mode(&transcript.path, 0o000));
    mode(&folder, 0o000);
    mode(&spooled, 0o000);
    let ran = stage.run(&["run", "--until-idle"]);
    mode(&folder, 0o700);
    assert_eq!(ran.code(), 1, "{}", ran.error());
    let error = ran.error();
    let error = error.lines().find(|line| line.starts_with("headspace-watcher: ")).unwrap_or_default();
    assert!(
        error.contains("2 transcripts, 1 folder of transcripts, 1 spool file") && error.contains("run again"),
        "{}",
        ran.error()
    );
    assert_eq!(stage.database().texts(), ["read"], "what could be read is delivered all the same");
    // Once they can be read, it is done.
    locked.iter().for_each(|transcript| mode(&transcript.path, 0o600));
    mode(&spooled, 0o600);
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), ["read", "not read", "not read", "not read"]);
    assert_eq!(stage.database().value("SELECT count(*) FROM events WHERE event_type = 'hook_received'"), "1");
}

#[test]
fn until_idle_ends_with_1_when_the_spool_itself_can_not_be_read() {
    let database = Database::new();
    let proxy = Proxy::start(&database);
    let Some(mut stage) = without_privileges(Stage::with(Some(database))) else { return };
    stage.environment.insert("DATABASE_URL".to_owned(), proxy.url());
    let spool = stage.folder().join("data/spool");
    fs::create_dir_all(&spool).unwrap();
    fs::set_permissions(&spool, PermissionsExt::from_mode(0o000)).unwrap();
    let ran = stage.run(&["run", "--until-idle"]);
    fs::set_permissions(&spool, PermissionsExt::from_mode(0o700)).unwrap();
    assert_eq!(ran.code(), 1, "{}", ran.error());
    assert!(ran.error().contains("the spool"), "{}", ran.error());
    stage.run_until_idle();
}
