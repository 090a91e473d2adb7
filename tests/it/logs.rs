//! The log: what it never holds, what it says once, and how it looks.

use std::process::Command;

use crate::stage::{SOON, Server, Stage, lacks, wait_until};

/// Neither stands anywhere in what the program writes, whatever goes wrong.
const SECRET_TEXT: &str = "planted-payload-text";
const SECRET_PASSWORD: &str = "planted-password";

#[test]
fn neither_payload_text_nor_a_password_is_ever_logged_also_at_the_finest_level() {
    let mut stage = Stage::new();
    let plain = stage.database().clone();
    plain.query("CREATE TABLE IF NOT EXISTS nothing()");
    let (server, parameters) = plain.url.split_once('?').map_or((&*plain.url, ""), |(server, rest)| (server, rest));
    let url = format!("{server}?{parameters}&password={SECRET_PASSWORD}");
    stage.environment.insert("DATABASE_URL".to_owned(), url);
    stage.set("http.token", &format!("{SECRET_PASSWORD}-token")).set("event_system.write_retry_delay_ms", "1");
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say(SECRET_TEXT);
    // Not readable, not valid, too long in each way that is logged.
    transcript.append(format!("{SECRET_TEXT} is no JSON\n"));
    transcript.append(format!("{{\"type\":\"user\",\"message\":{{\"content\":\"{SECRET_TEXT}\n"));
    transcript.append(transcript.prompt(SECRET_TEXT).replace("\"cwd\":\"/home/me/app\"", "\"cwd\":7") + "\n");
    let log = stage.folder().join("trace");
    let mut command = stage.command(&["--log-level", "trace", "run"]);
    let file = std::fs::File::create(&log).unwrap();
    let mut child = command.stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap();
    let read = || std::fs::read_to_string(&log).unwrap();
    wait_until("the first rows", SOON, || plain.count() >= 2);
    // Refused by the database, with a message that quotes the row.
    plain.query("ALTER TABLE events ADD CHECK (payload->>'text' NOT LIKE '%refuse me%')");
    transcript.say(&format!("refuse me {SECRET_TEXT}"));
    wait_until("it is set aside", SOON, || read().contains("is a dead letter now"));
    // A database that is gone, and one that wants another password.
    plain.query("ALTER TABLE events RENAME TO elsewhere");
    transcript.say(&format!("later {SECRET_TEXT}"));
    wait_until("it can't be delivered", SOON, || {
        read().contains("delivery failed") && read().contains("database misconfigured")
    });
    let dump = stage.run(&["queue-dump"]).output() + &stage.run(&["queue-dump", "--dead-letters"]).output();
    let status = stage.run(&["status"]).output() + &stage.run(&["status", "--json"]).output();
    crate::stage::signal(child.id(), "TERM");
    child.wait().unwrap();
    let all = [("log", read()), ("queue-dump", dump), ("status", status)];
    for (what, text) in all {
        assert!(text.len() > 100, "{what}: {text}");
        for secret in [SECRET_TEXT, SECRET_PASSWORD] {
            let line = text.lines().find(|line| line.contains(secret));
            assert_eq!(line, None, "{what} holds {secret}");
        }
    }
}

#[test]
fn an_outage_is_logged_when_it_begins_and_when_it_ends_and_not_in_between() {
    let server = Server::start();
    let mut stage = Stage::with(Some(server.database.another()));
    stage.set("event_system.write_retry_delay_ms", "5").set("event_system.write_retry_max_delay_ms", "20");
    let watcher = stage.start();
    watcher.wait_for_log("database connected");
    server.stop("fast");
    stage.transcript("-home-me-app", 1).say("waits");
    let failures = || watcher.health()["writes"]["failed"].as_u64().unwrap();
    wait_until("many tries", SOON, || failures() > 20);
    server.start_again();
    let back = watcher.wait_for_log("database reachable again");
    assert!(back["outage_seconds"].as_f64().unwrap() > 0.0 && back["pending"] == 2, "{back}");
    stage.wait_for_rows(2);
    let levels: Vec<String> = watcher
        .log()
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|line| line["level"] == "WARN" || line["level"] == "ERROR")
        .map(|line| format!("{} {}", line["level"], line["message"]))
        .collect();
    let away: Vec<&String> = levels.iter().filter(|line| line.contains("database unavailable")).collect();
    assert_eq!((away.len(), levels.len()), (1, 1), "{levels:?}");
}

#[test]
fn until_idle_draws_no_bar_on_a_terminal_where_there_is_nothing_to_show() {
    if Command::new("script").arg("--version").output().is_err() {
        eprintln!("SKIPPED: no script(1) here to make a terminal");
        return;
    }
    let stage = Stage::new();
    let mut terminal = Command::new("script");
    terminal.args(["-qec", &format!("{} run --until-idle", env!("CARGO_BIN_EXE_headspace-watcher")), "/dev/null"]);
    terminal.current_dir(stage.folder()).env_clear().env("PATH", std::env::var_os("PATH").unwrap());
    terminal.env("HOME", stage.folder().join("home")).env("DATABASE_URL", &stage.database().url);
    let output = terminal.env("NO_COLOR", "1").stdin(std::process::Stdio::null()).output().unwrap();
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(shown.contains("everything that could be read is delivered delivered=0"), "{shown}");
    assert!(!shown.contains(['█', '░']), "{shown}");
}

#[test]
fn lines_are_text_with_colour_on_a_terminal_and_json_elsewhere() {
    let stage = Stage::with(None);
    let elsewhere = stage.run(&["--log-level", "info", "run", "--until-idle"]);
    assert_eq!(elsewhere.code(), 78, "there is no database to drain into");
    let watcher = stage.start_with(&[]);
    watcher.wait_for_log("ready");
    let first = watcher.log().lines().next().unwrap().to_owned();
    let json: serde_json::Value = serde_json::from_str(&first).unwrap();
    assert!(json["timestamp"].is_string() && json["level"].is_string() && json["message"].is_string(), "{first}");
    watcher.stop();
    let text = stage.command(&["--log-format", "text", "run"]);
    let shown = first_lines(text);
    assert!(shown.contains(" INFO ") && shown.contains("ready") && !shown.contains('\u{1b}'), "{shown}");
    if lacks("script(1)", Command::new("script").arg("--version").output().is_ok()) {
        return;
    }
    let program = env!("CARGO_BIN_EXE_headspace-watcher");
    for (no_colour, coloured) in [("", true), ("1", false)] {
        let mut terminal = Command::new("script");
        terminal.args(["-qec", &format!("timeout 2 {program} run"), "/dev/null"]).current_dir(stage.folder());
        terminal.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("NO_COLOR", no_colour);
        terminal.env("HOME", stage.folder().join("home")).stdin(std::process::Stdio::null());
        let shown = String::from_utf8_lossy(&terminal.output().unwrap().stdout).into_owned();
        assert!(shown.contains("ready"), "{shown}");
        assert_eq!(shown.contains("\u{1b}[32m INFO"), coloured, "{shown}");
        assert!(!shown.contains("{\"timestamp\""), "{shown}");
    }
}

/// What a watcher writes until it is ready.
fn first_lines(mut command: Command) -> String {
    use std::io::BufRead;
    let mut child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = String::new();
    let mut stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    while !lines.contains("ready") && stderr.read_line(&mut lines).unwrap() > 0 {}
    child.kill().unwrap();
    child.wait().unwrap();
    lines
}
