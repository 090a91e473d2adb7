//! The watcher as a service: what systemd is told and when, and the files that `service` writes.

use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::stage::{SOON, Stage, pause, resume, wait_until};

/// systemd's end of the conversation.
struct Manager {
    socket: UnixDatagram,
    heard: Vec<String>,
}

impl Manager {
    /// Listens, and has the watcher of this stage told so. `watchdog`: how often it wants to be fed.
    fn listen(stage: &mut Stage, watchdog: Duration) -> Manager {
        let path = stage.folder().join("notify.sock");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        stage.environment.insert("NOTIFY_SOCKET".to_owned(), path.to_str().unwrap().to_owned());
        stage.environment.insert("WATCHDOG_USEC".to_owned(), watchdog.as_micros().to_string());
        Manager { socket, heard: Vec::new() }
    }

    /// Everything that it has been told so far.
    fn heard(&mut self) -> &[String] {
        let mut message = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut message) {
            let text = String::from_utf8(message[..length].to_vec()).unwrap();
            self.heard.extend(text.lines().map(str::to_owned));
        }
        &self.heard
    }

    fn feedings(&mut self) -> usize {
        self.heard().iter().filter(|line| *line == "WATCHDOG=1").count()
    }

    #[track_caller]
    fn wait_for(&mut self, what: &str, begins: &str) {
        wait_until(what, SOON, || self.heard().iter().any(|line| line.starts_with(begins)));
    }
}

#[test]
fn systemd_is_told_ready_status_watchdog_and_stopping() {
    let mut stage = Stage::new();
    let mut manager = Manager::listen(&mut stage, Duration::from_millis(400));
    let watcher = stage.start();
    manager.wait_for("ready", "READY=1");
    manager.wait_for("the status", "STATUS=pass: 0 pending, 0 delivered, 0 dead letters, database up");
    let before = manager.feedings();
    wait_until("it is fed again and again", SOON, || manager.feedings() >= before + 5);
    assert!(!manager.heard().contains(&"STOPPING=1".to_owned()));
    watcher.stop();
    manager.wait_for("stopping", "STOPPING=1");
    let order: Vec<&str> =
        manager.heard().iter().map(String::as_str).filter(|line| ["READY=1", "STOPPING=1"].contains(line)).collect();
    assert_eq!(order, ["READY=1", "STOPPING=1"], "each once");
}

#[test]
fn the_watchdog_is_fed_while_the_database_is_away() {
    let mut stage = Stage::with(None);
    let mut manager = Manager::listen(&mut stage, Duration::from_millis(200));
    stage.transcript("-home-me-app", 1).say("waits");
    let watcher = stage.start();
    manager.wait_for("the status", "STATUS=warn: 2 pending");
    let before = manager.feedings();
    wait_until("it is fed: a restart would not help", SOON, || manager.feedings() >= before + 5);
    pause(watcher.pid());
    // Hungry for ten times its patience, apart from what was under way.
    let begun = Instant::now();
    let mut last = (manager.feedings(), Instant::now());
    while last.1.elapsed() < Duration::from_secs(2) {
        assert!(begun.elapsed() < SOON, "a stopped watcher goes on to feed it");
        let now = manager.feedings();
        if now != last.0 {
            last = (now, Instant::now());
        }
    }
    resume(watcher.pid());
    wait_until("it is fed again", SOON, || manager.feedings() > last.0);
}

#[test]
fn a_manager_that_does_not_listen_holds_nothing_up() {
    let mut stage = Stage::new();
    let _manager = Manager::listen(&mut stage, Duration::from_millis(20));
    let watcher = stage.start();
    // Nobody reads: by now its socket is full (ten messages on Linux).
    wait_until("a second", SOON, || watcher.health()["uptime_seconds"].as_u64() >= Some(2));
    stage.transcript("-home-me-app", 1).say("hello");
    stage.wait_for_rows(2);
    assert_eq!(watcher.health()["status"], "pass");
    let (status, took) = watcher.stop();
    assert!(status.code() == Some(0) && took < Duration::from_secs(2), "{status:?} {took:?}");
}

#[test]
fn the_unit_is_written_where_systemd_looks_and_systemd_finds_nothing_wrong() {
    let stage = Stage::with(None);
    let ran = stage.run(&["service", "--for", "systemd", "install", "--no-enable"]);
    assert_eq!(ran.code(), 0, "{}", ran.error());
    assert!(ran.output().contains("systemctl --user enable --now headspace-watcher.service"), "{}", ran.output());
    let file = stage.folder().join("home/.config/systemd/user/headspace-watcher.service");
    let unit = std::fs::read_to_string(&file).unwrap();
    let config = stage.folder().canonicalize().unwrap().join("config.yaml");
    assert!(unit.contains(&format!("--config \"{}\" run", config.display())), "{unit}");
    assert!(unit.contains("Type=notify\n") && unit.contains("WatchdogSec=60\n"), "{unit}");
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        eprintln!("SKIPPED: systemd-analyze is not here");
    } else {
        let verified = Command::new("systemd-analyze").args(["verify", "--user"]).arg(&file).output().unwrap();
        let said = String::from_utf8_lossy(&verified.stderr);
        // What is newer than the systemd at hand is passed over by it, and says so.
        let ours = said.lines().filter(|line| line.contains("headspace-watcher.service"));
        let wrong: Vec<&str> = ours.filter(|line| !line.contains("Restart")).collect();
        assert!(wrong.is_empty(), "{said}");
    }
    let again = stage.run(&["service", "--for", "systemd", "install", "--no-enable"]);
    assert_eq!((again.code(), std::fs::read_to_string(&file).unwrap()), (0, unit), "once more changes nothing");
    let removed = stage.run(&["service", "--for", "systemd", "uninstall", "--no-enable"]);
    assert_eq!((removed.code(), file.exists()), (0, false), "{}", removed.error());
    let nothing = stage.run(&["service", "--for", "systemd", "uninstall"]);
    assert!(nothing.code() == 0 && nothing.output().contains("nothing to do"), "{}", nothing.error());
    assert_eq!(stage.run(&["service", "--for", "systemd", "status"]).code(), 3);
}

#[test]
fn the_service_is_enabled_and_disabled_through_systemctl_and_nothing_is_written_without_it() {
    let mut stage = Stage::with(None);
    let file = stage.folder().join("home/.config/systemd/user/headspace-watcher.service");
    let programs = stage.folder().join("bin");
    std::fs::create_dir(&programs).unwrap();
    stage.environment.insert("PATH".to_owned(), programs.to_str().unwrap().to_owned());
    let ran = stage.run(&["service", "--for", "systemd", "install"]);
    assert_eq!(ran.code(), 69);
    assert!(ran.error().contains("systemctl") && ran.error().contains("--no-enable"), "the way out: {}", ran.error());
    assert!(!file.exists());
    // A systemctl that writes down what it is asked to do.
    let log = stage.folder().join("asked");
    let systemctl = programs.join("systemctl");
    let script = format!("#!/bin/sh\necho \"$*\" >> '{}'\ncase $2 in is-*) echo active;; esac\n", log.display());
    std::fs::write(&systemctl, script).unwrap();
    std::fs::set_permissions(&systemctl, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    stage.environment.insert("DATABASE_URL".to_owned(), "postgresql://me:hunter2@localhost/db".to_owned());
    let ran = stage.run(&["service", "--for", "systemd", "install"]);
    assert_eq!(ran.code(), 0, "{}", ran.error());
    assert!(ran.output().contains("DATABASE_URL is set here, but the service will not see it"), "{}", ran.output());
    assert!(!ran.output().contains("hunter2") && !std::fs::read_to_string(&file).unwrap().contains("hunter2"));
    assert_eq!(stage.run(&["service", "--for", "systemd", "status"]).code(), 0);
    assert_eq!(stage.run(&["service", "--for", "systemd", "uninstall"]).code(), 0);
    assert!(!file.exists());
    let asked = std::fs::read_to_string(log).unwrap();
    let asked: Vec<&str> = asked.lines().filter(|line| !line.contains("show") && !line.contains("is-")).collect();
    assert_eq!(
        asked,
        [
            "--user daemon-reload",
            "--user enable headspace-watcher.service",
            "--user restart headspace-watcher.service",
            "--user disable --now headspace-watcher.service",
            "--user daemon-reload"
        ]
    );
}

#[test]
fn the_agent_of_launchd_is_a_whole_property_list() {
    let stage = Stage::with(None);
    let ran = stage.run(&["service", "--for", "launchd", "install", "--no-enable"]);
    assert_eq!(ran.code(), 0, "{}", ran.error());
    let file = stage.folder().join("home/Library/LaunchAgents/com.headspace.watcher.plist");
    let agent = std::fs::read_to_string(&file).unwrap();
    // Every element that begins also ends, in order.
    let mut open: Vec<&str> = Vec::new();
    let body = agent.split("-->").nth(1).unwrap();
    for tag in body.split('<').skip(1).map(|rest| rest.split('>').next().unwrap()) {
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name), "{agent}"),
            None if tag.ends_with('/') => {}
            None => open.push(tag.split(' ').next().unwrap()),
        }
    }
    assert!(open.is_empty() && !body.contains('@'), "{agent}");
    assert!(body.contains("<string>com.headspace.watcher</string>") && body.contains("<string>run</string>"));
}

mod torture {
    use super::*;
    use crate::stage::rounds;

    /// Takes a minute a round, so that a default run leaves it to the tests of `health` that need no waiting.
    #[test]
    fn the_watchdog_starves_when_nothing_moves_though_the_database_is_up() {
        for _ in 0..rounds(0) {
            let mut stage = Stage::new();
            stage.set("database.statement_timeout_ms", "3600000");
            let mut manager = Manager::listen(&mut stage, Duration::from_millis(400));
            let mut transcript = stage.transcript("-home-me-app", 1);
            transcript.say("one");
            let watcher = stage.start();
            stage.wait_for_rows(2);
            let database = stage.database().clone();
            let locker = std::thread::spawn(move || {
                database.query("BEGIN; LOCK TABLE events; SELECT pg_sleep(45); COMMIT");
            });
            wait_until("the table is locked", SOON, || {
                stage.database().value("SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock'") != "0"
            });
            transcript.say("two");
            wait_until("health fails", Duration::from_secs(60), || {
                manager.heard();
                watcher.health()["status"] == "fail"
            });
            let health = watcher.health();
            assert_eq!(health["database"]["state"], "up", "{health}");
            assert!(health["reasons"][0].as_str().unwrap().contains("stalled"), "{health}");
            std::thread::sleep(Duration::from_secs(1));
            manager.heard();
            let before = manager.feedings();
            std::thread::sleep(Duration::from_secs(3));
            assert_eq!(manager.feedings(), before, "the watchdog starves");
            locker.join().unwrap();
            stage.wait_for_rows(3);
            wait_until("it passes again", SOON, || watcher.health()["status"] == "pass");
            wait_until("it is fed again", SOON, || manager.feedings() > before);
        }
    }
}
