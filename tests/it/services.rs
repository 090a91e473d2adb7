//! The watcher as a service: what systemd is told and when, and the files that `service` writes.

use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::stage::{SOON, Stage, lacks, pause, project, resume, wait_until};

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

/// With a database in its configuration, at which nobody listens.
fn stage_with_url() -> Stage {
    let stage = Stage::with(None);
    let file = stage.folder().join("config.yaml");
    let config = std::fs::read_to_string(&file).unwrap();
    std::fs::write(file, format!("{config}database:\n  url: postgresql://me@localhost:1/db\n")).unwrap();
    stage
}

/// A `systemctl` that writes down what it is asked to do, first in PATH; returns that file.
fn fake_systemctl(stage: &mut Stage, state: &str) -> std::path::PathBuf {
    let (programs, log) = (stage.folder().join("bin"), stage.folder().join("asked"));
    std::fs::create_dir_all(&programs).unwrap();
    let systemctl = programs.join("systemctl");
    let script = format!("#!/bin/sh\necho \"$*\" >> '{}'\ncase $2 in is-*) echo {state};; esac\n", log.display());
    std::fs::write(&systemctl, script).unwrap();
    std::fs::set_permissions(&systemctl, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    stage.environment.insert("PATH".to_owned(), programs.to_str().unwrap().to_owned());
    log
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
    let stage = stage_with_url();
    let ran = stage.run(&["service", "--for", "systemd", "install", "--no-enable"]);
    assert_eq!(ran.code(), 0, "{}", ran.error());
    assert!(ran.output().contains("systemctl --user enable --now headspace-watcher.service"), "{}", ran.output());
    let file = stage.folder().join("home/.config/systemd/user/headspace-watcher.service");
    let unit = std::fs::read_to_string(&file).unwrap();
    let config = stage.folder().canonicalize().unwrap().join("config.yaml");
    assert!(unit.contains(&format!("--config \"{}\" run", config.display())), "{unit}");
    assert!(unit.contains("Type=notify\n") && unit.contains("WatchdogSec=60\n"), "{unit}");
    if !lacks("systemd-analyze", Command::new("systemd-analyze").arg("--version").output().is_ok()) {
        let verified = Command::new("systemd-analyze").args(["verify", "--user"]).arg(&file).output().unwrap();
        let said = String::from_utf8_lossy(&verified.stderr);
        // What is newer than the systemd at hand is passed over by it, and says so.
        let ours = said.lines().filter(|line| line.contains("headspace-watcher.service"));
        let wrong: Vec<&str> = ours.filter(|line| !line.contains("Restart")).collect();
        assert!(wrong.is_empty(), "{said}");
    }
    // With the default configuration the template's own limits.
    let template = std::fs::read_to_string(project().join("scripts/headspace-watcher.service")).unwrap();
    for limit in ["TimeoutStopSec=", "MemoryMax="] {
        let of = |text: &str| text.lines().find(|line| line.starts_with(limit)).map(str::to_owned);
        assert_eq!(of(&unit), of(&template));
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
    let mut stage = stage_with_url();
    let file = stage.folder().join("home/.config/systemd/user/headspace-watcher.service");
    let programs = stage.folder().join("bin");
    std::fs::create_dir(&programs).unwrap();
    stage.environment.insert("PATH".to_owned(), programs.to_str().unwrap().to_owned());
    let ran = stage.run(&["service", "--for", "systemd", "install"]);
    assert_eq!(ran.code(), 69);
    assert!(ran.error().contains("systemctl") && ran.error().contains("--no-enable"), "the way out: {}", ran.error());
    assert!(!file.exists());
    let log = fake_systemctl(&mut stage, "active");
    stage.environment.insert("DATABASE_URL".to_owned(), "postgresql://me:hunter2@localhost/db".to_owned());
    let ran = stage.run(&["service", "--for", "systemd", "install"]);
    assert_eq!(ran.code(), 0, "{}", ran.error());
    assert!(ran.output().contains("DATABASE_URL is set here, but the service will not see it"), "{}", ran.output());
    assert!(!ran.output().contains("hunter2") && !std::fs::read_to_string(&file).unwrap().contains("hunter2"));
    assert_eq!(stage.run(&["service", "--for", "systemd", "status"]).code(), 0);
    assert_eq!(stage.run(&["service", "--for", "systemd", "uninstall"]).code(), 0);
    assert!(!file.exists());
    // Also where the supervisor can't be reached any more.
    assert_eq!(stage.run(&["service", "--for", "systemd", "install", "--no-enable"]).code(), 0);
    stage.environment.insert("PATH".to_owned(), "/nowhere".to_owned());
    let ran = stage.run(&["service", "--for", "systemd", "uninstall"]);
    assert!(ran.code() == 0 && ran.output().contains("note: could not run"), "{}{}", ran.output(), ran.error());
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
fn a_service_without_a_database_is_refused_and_says_where_to_set_one() {
    let mut stage = Stage::with(None);
    stage.environment.insert("DATABASE_URL".to_owned(), "postgresql://me@localhost/db".to_owned());
    stage.set("database.url", "postgresql://me@localhost/db");
    let install = ["service", "--for", "systemd", "install", "--no-enable"];
    let environment = stage.folder().join("home/.config/headspace-watcher/environment");
    std::fs::create_dir_all(environment.parent().unwrap()).unwrap();
    std::fs::write(&environment, "DATABASE_URL=\n").unwrap();
    let ran = stage.run(&install);
    assert_eq!(ran.code(), 78);
    for part in ["config.yaml", environment.to_str().unwrap(), "database.url", "DATABASE_URL=", "run-watcher.sh"] {
        assert!(ran.error().contains(part), "{part}: {}", ran.error());
    }
    assert!(!stage.folder().join("home/.config/systemd").exists());
    std::fs::write(&environment, "DATABASE_URL='postgresql://me@localhost/db'\n").unwrap();
    let ran = stage.run(&install);
    assert_eq!(ran.code(), 0, "{}", ran.error());
    assert!(!ran.output().contains("DATABASE_URL is set here"), "{}", ran.output());
    let launchd = stage.run(&["service", "--for", "launchd", "install", "--no-enable"]);
    assert_eq!(launchd.code(), 78, "launchd reads no such file: {}", launchd.output());
}

#[test]
fn a_service_whose_queue_another_watcher_holds_is_refused_and_names_it() {
    let mut stage = stage_with_url();
    let watcher = stage.start();
    let log = fake_systemctl(&mut stage, "inactive");
    let ran = stage.run(&["service", "--for", "systemd", "install"]);
    assert_eq!(ran.code(), 69);
    assert!(ran.error().contains(&format!("kill {}", watcher.pid())), "{}", ran.error());
    assert!(!std::fs::read_to_string(&log).unwrap().contains("enable "));
    // Its own process is replaced.
    fake_systemctl(&mut stage, "active");
    assert_eq!(stage.run(&["service", "--for", "systemd", "install"]).code(), 0);
}

#[test]
fn the_limits_of_the_unit_and_the_agent_follow_the_configuration() {
    let mut stage = stage_with_url();
    let unit = stage.folder().join("home/.config/systemd/user/headspace-watcher.service");
    let agent = stage.folder().join("home/Library/LaunchAgents/com.headspace.watcher.plist");
    assert_eq!(stage.run(&["service", "--for", "systemd", "install", "--no-enable"]).code(), 0);
    stage
        .set("event_system.shutdown_timeout_seconds", "20.5")
        .set("file_watcher.max_line_bytes", "1073741824")
        .set("event_system.max_event_bytes", "268435456");
    let status = stage.run(&["service", "--for", "systemd", "status"]);
    assert!(status.output().contains("does not fit the configuration"), "{}", status.output());
    for kind in ["systemd", "launchd"] {
        let ran = stage.run(&["service", "--for", kind, "install", "--no-enable"]);
        assert_eq!(ran.code(), 0, "{}", ran.error());
    }
    let unit = std::fs::read_to_string(unit).unwrap();
    // 20.5 s and one more, as whole seconds.
    assert!(unit.contains("\nTimeoutStopSec=22\n"), "{unit}");
    // 128 MiB, twice 1 GiB, six times 256 MiB.
    assert!(unit.contains("\nMemoryMax=3712M\n"), "{unit}");
    let agent = std::fs::read_to_string(agent).unwrap();
    assert!(agent.contains("<key>ExitTimeOut</key>\n  <integer>22</integer>"), "{agent}");
    let status = stage.run(&["service", "--for", "systemd", "status"]);
    assert!(!status.output().contains("does not fit"), "{}", status.output());
}

#[test]
fn the_agent_of_launchd_is_a_whole_property_list() {
    let stage = stage_with_url();
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

#[test]
fn a_lock_of_somebody_else_on_events_fails_health_but_never_starves_the_watchdog() {
    let mut stage = Stage::new();
    stage.set("database.statement_timeout_ms", "3600000");
    let mut manager = Manager::listen(&mut stage, Duration::from_millis(400));
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    let watcher = stage.start();
    stage.wait_for_rows(2);
    let database = stage.database().clone();
    let locker =
        std::thread::spawn(move || database.try_query("BEGIN; LOCK TABLE events; SELECT pg_sleep(600); COMMIT"));
    wait_until("the table is locked", SOON, || {
        stage.database().value("SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND granted") != "0"
    });
    transcript.say("two");
    wait_until("health fails", Duration::from_secs(90), || {
        manager.heard();
        watcher.health()["status"] == "fail"
    });
    let health = watcher.health();
    assert_eq!(health["database"]["state"], "up", "{health}");
    assert!(health["reasons"][0].as_str().unwrap().contains("stalled"), "{health}");
    // A restart would wait for the same lock.
    let before = manager.feedings();
    wait_until("it is fed on", SOON, || manager.feedings() >= before + 5);
    assert_eq!(watcher.health()["status"], "fail");
    assert_eq!(watcher.get("/livez").unwrap().0, 200);
    stage.database().query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)%' AND pid <> pg_backend_pid()");
    let _ = locker.join().unwrap();
    stage.wait_for_rows(3);
    wait_until("it passes again", SOON, || watcher.health()["status"] == "pass");
}

#[test]
fn a_hang_of_its_own_starves_the_watchdog_and_shows_on_livez() {
    let mut stage = Stage::with(None);
    stage.set("file_watcher.polling_interval", "0.2");
    // The thread that writes the queue stays at work for ever, and so whoever waits for it.
    stage.environment.insert("HEADSPACE_FAULT_POINT".to_owned(), "commit-before-apply".to_owned());
    stage.environment.insert("HEADSPACE_FAULT_KIND".to_owned(), "loop".to_owned());
    let mut manager = Manager::listen(&mut stage, Duration::from_millis(400));
    let watcher = stage.start();
    assert_eq!(watcher.get("/livez").unwrap(), (200, "{\"ok\":true}".to_owned()));
    stage.transcript("-home-me-app", 1).say("one");
    wait_until("it is not alive", Duration::from_secs(90), || {
        manager.heard();
        watcher.get("/livez").unwrap() == (503, "{\"ok\":false}".to_owned())
    });
    let mut fed = manager.feedings();
    let mut since = Instant::now();
    wait_until("the watchdog starves", SOON, || {
        let now = manager.feedings();
        if now != std::mem::replace(&mut fed, now) {
            since = Instant::now();
        }
        // Five times the patience it has.
        since.elapsed() > Duration::from_secs(2)
    });
    assert_eq!(watcher.health()["status"], "fail");
}

#[test]
fn systemd_is_asked_for_patience_while_the_queue_is_being_opened() {
    let mut stage = Stage::with(None);
    stage.environment.insert("HEADSPACE_FAULT_POINT".to_owned(), "open-locked".to_owned());
    stage.environment.insert("HEADSPACE_FAULT_KIND".to_owned(), "loop".to_owned());
    let mut manager = Manager::listen(&mut stage, Duration::from_secs(60));
    let watcher = stage.start_with(&[]);
    manager.wait_for("the status", "STATUS=opening the queue");
    wait_until("it asks again and again", SOON, || {
        let asked = manager.heard().iter().filter(|line| line.starts_with("EXTEND_TIMEOUT_USEC=")).count();
        asked >= 2
    });
    assert!(!manager.heard().contains(&"READY=1".to_owned()));
    assert_eq!(watcher.logged("opening the queue takes long").len(), 1, "said once: {}", watcher.log());
    assert_eq!(watcher.stop().0.code(), Some(0));
    manager.wait_for("stopping", "STOPPING=1");
}
