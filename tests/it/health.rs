//! Health as seen from outside: each state, and the way from one to the next.

use std::time::Duration;

use serde_json::Value;

use crate::stage::{SOON, Server, Stage, pause, resume, wait_until};

#[test]
fn health_warns_while_postgres_is_away_and_passes_again_when_it_is_back() {
    let server = Server::start();
    let stage = Stage::with(Some(server.database.another()));
    let watcher = stage.start();
    wait_until("pass", SOON, || watcher.health()["status"] == "pass");
    let first = watcher.health();
    assert_eq!((&first["ready"], &first["database"]["last_error"]), (&true.into(), &serde_json::Value::Null));
    server.stop("fast");
    stage.transcript("-home-me-app", 1).say("while it is away");
    wait_until("warn", SOON, || watcher.health()["status"] == "warn");
    wait_until("the event waits", SOON, || watcher.health()["queue"]["pending"] == 2);
    let (code, body) = watcher.get("/health").unwrap();
    assert_eq!(code, 200, "that is what the queue is for: {body}");
    let away: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&away["database"]["state"], &away["ready"]), (&"down".into(), &true.into()));
    assert!(away["database"]["last_error"].as_str().is_some_and(|error| !error.is_empty()), "{away}");
    assert!(away["reasons"][0].as_str().unwrap().contains("unavailable"), "{away}");
    assert_eq!(watcher.get("/readyz").unwrap().0, 200);
    let status = stage.run(&["status"]);
    assert_eq!(status.code(), 0);
    assert!(status.output().starts_with("status    warn\n"), "{}", status.output());
    server.start_again();
    wait_until("pass", SOON, || watcher.health()["status"] == "pass");
    // The database is up before what waited has been delivered.
    wait_until("nothing waits", SOON, || watcher.health()["queue"]["oldest_age_seconds"].is_null());
    for message in ["database unavailable", "database reachable again"] {
        assert_eq!(watcher.logged(message).len(), 1, "each change once");
    }
}

#[test]
fn health_fails_when_the_queue_is_full_and_the_exit_code_says_so() {
    let mut stage = Stage::with(None);
    stage.set("queue.max_pending_bytes", "1048576").set("event_system.max_event_bytes", "65536");
    stage.transcript("-home-me-app", 1).say_many(&"long text ".repeat(50), 3000);
    let watcher = stage.start();
    wait_until("fail", SOON, || watcher.health()["status"] == "fail");
    let (code, body) = watcher.get("/health").unwrap();
    assert_eq!(code, 503, "{body}");
    let health: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!((&health["queue"]["full"], &health["ready"]), (&true.into(), &false.into()));
    assert!(health["reasons"][0].as_str().unwrap().contains("max_pending_bytes"), "the way out: {health}");
    assert_eq!((watcher.get("/readyz").unwrap().0, watcher.get("/livez").unwrap().0), (503, 200));
    assert_eq!(stage.run(&["status"]).code(), 1);
    assert_eq!(stage.run(&["status", "--json"]).lines()[0]["status"], "fail");
    let logged = watcher.wait_for_log("health fails");
    assert_eq!(logged["level"], "ERROR", "{logged}");
    assert!(logged["reasons"].as_str().unwrap().contains("full"), "{logged}");
}

#[test]
fn health_warns_of_dead_letters_and_of_a_database_that_someone_must_fix() {
    let mut stage = Stage::new();
    stage.transcript("-home-me-app", 1).append("no JSON at all\n");
    stage.set("database.auto_migrate", "false");
    let watcher = stage.start();
    wait_until("misconfigured", SOON, || watcher.health()["database"]["state"] == "misconfigured");
    wait_until("the dead letter", SOON, || watcher.health()["queue"]["dead_letters"] == 1);
    let health = watcher.health();
    assert_eq!(health["status"], "warn");
    assert!(health["database"]["last_error"].as_str().unwrap().contains("headspace-watcher migrate"), "{health}");
    let reasons = health["reasons"].to_string();
    assert!(reasons.contains("1 dead letter;") && reasons.contains("someone fixes"), "{reasons}");
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    wait_until("up", SOON, || watcher.health()["database"]["state"] == "up");
}

#[test]
fn status_says_within_seconds_that_the_watcher_hangs() {
    let stage = Stage::new();
    let watcher = stage.start();
    watcher.wait_for_log("database connected");
    pause(watcher.pid());
    let begun = std::time::Instant::now();
    let hangs = stage.run(&["status"]);
    let json = stage.run(&["status", "--json"]);
    let took = begun.elapsed();
    resume(watcher.pid());
    assert_eq!(hangs.code(), 1, "{}", hangs.error());
    let pid = watcher.pid().to_string();
    assert!(hangs.error().contains("does not answer") && hangs.error().contains(&pid), "{}", hangs.error());
    let said = &json.lines()[0];
    assert_eq!((json.code(), &said["status"], &said["running"]), (1, &"fail".into(), &true.into()), "{said}");
    assert!(took < Duration::from_secs(8), "{took:?} for both");
    wait_until("it answers again", SOON, || stage.run(&["status"]).code() == 0);
}

#[test]
fn status_of_a_watcher_that_is_gone_gives_the_last_words_of_its_queue() {
    let stage = Stage::with(None);
    let never = stage.run(&["status"]);
    assert_eq!(never.code(), 3);
    assert!(never.error().contains("no queue"), "{}", never.error());
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say_many("a secret", 9);
    transcript.append("no JSON\n");
    let watcher = stage.start();
    // Captured is what is durable; what waits is counted a little sooner.
    let overview = || -> Value { serde_json::from_str(&watcher.get("/overview?samples=0").unwrap().1).unwrap() };
    wait_until("all is in the queue for good", SOON, || overview()["totals"]["captured"] == 10);
    watcher.kill();
    let gone = stage.run(&["status"]);
    assert_eq!(gone.code(), 3);
    assert!(gone.output().starts_with("status    not running\n"), "{}", gone.output());
    assert!(gone.output().contains("10 pending") && gone.output().contains("1 dead letter"), "{}", gone.output());
    assert!(gone.error().contains("scripts/run-watcher.sh"), "the way out: {}", gone.error());
    let json = &stage.run(&["status", "--json"]).lines()[0];
    assert_eq!((&json["running"], &json["queue"]["pending"]), (&false.into(), &10.into()), "{json}");
    assert_eq!(json["queue"]["dead_letters"], 1);
}

#[test]
fn status_is_shown_again_and_again_until_nobody_reads_it() {
    use std::io::{BufRead, BufReader};
    let stage = Stage::with(None);
    let watcher = stage.start();
    let mut command = stage.command(&["status", "--watch", "1"]);
    let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    for _ in 0..2 {
        assert!(lines.any(|line| line == "status    warn"), "it has ended");
        assert!(lines.any(|line| line.starts_with("database  unconfigured for ")), "it has ended");
    }
    watcher.stop();
    assert!(lines.any(|line| line == "status    not running"), "it goes on without a watcher");
    let again = stage.start();
    let next = format!("watcher   pid {}, up ", again.pid());
    assert!(lines.any(|line| line.starts_with(&next)), "and sees the next one");
    drop(lines);
    let mut status = None;
    wait_until("it ends", SOON, || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    assert_eq!(status.unwrap().code(), Some(0));
}

#[test]
fn health_fails_no_longer_once_there_is_room_again() {
    let server = Server::start();
    let mut stage = Stage::with(Some(server.database.another()));
    stage.set("queue.max_pending_bytes", "1048576").set("event_system.max_event_bytes", "65536");
    server.stop("fast");
    let texts = stage.transcript("-home-me-app", 1).say_many(&"long text ".repeat(50), 3000);
    let watcher = stage.start();
    wait_until("fail", SOON, || watcher.health()["status"] == "fail");
    // Who logs it looks once a second.
    watcher.wait_for_log("health fails");
    server.start_again();
    wait_until("pass", 2 * SOON, || watcher.health()["status"] == "pass");
    watcher.wait_for_log("health fails no longer");
    stage.wait_for_rows(3001);
    // Not before: what is still to be read fills the queue again and again.
    assert_eq!(watcher.get("/readyz").unwrap().0, 200);
    assert_eq!(stage.database().texts(), texts);
}
