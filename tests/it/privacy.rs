//! Secrets: struck out of everything before anything is written, when `redact` is on.

use std::path::Path;
use std::process::{Child, Stdio};

use serde_json::{Value, json};

use crate::stage::{SOON, Stage, lacks_proc, wait_until};

/// Made of parts, so that no scanner takes this file for a leak.
fn secret() -> String {
    ["sk", "ant", "api03", "abcdefghijklmnopqrstuvwxyz"].join("-")
}

/// Whether any file below `folder` holds these bytes.
fn holds(folder: &Path, text: &str) -> bool {
    std::fs::read_dir(folder).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            return holds(&path, text);
        }
        std::fs::read(&path).is_ok_and(|bytes| memchr::memmem::find(&bytes, text.as_bytes()).is_some())
    })
}

#[test]
fn with_redact_on_no_secret_is_written_wherever_it_comes_in() {
    let mut stage = Stage::new();
    stage.set("redact.enabled", "true").set("redact.patterns", r"[CUSTOMER-\d+]").set("hooks.capture", "full");
    let secret = secret();
    let text = format!("use {secret} for CUSTOMER-17");
    // A hook while no watcher runs: its spool file is on disk before anybody else has looked at it.
    let input = json!({"session_id": "s", "cwd": "/p", "hook_event_name": "UserPromptSubmit", "prompt": text});
    assert_eq!(stage.run_with_input(&["hook"], input.to_string()).code(), 0);
    assert_eq!(stage.run_with_input(&["hook"], format!("garbage {text}")).code(), 0);
    assert!(!holds(&stage.folder().join("data"), &secret));
    // Without a database everything stays in the queue, to be looked for there.
    let database = stage.database.take();
    let watcher = stage.start();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say(&text);
    transcript.append(format!("{{\"type\":\"user\", broken {text}\n"));
    let event = |text: &str| {
        json!({"event_type": "session_ended",
               "payload": {"session_uuid": "s", "reason": "closed", "metadata": {"note": text}}})
        .to_string()
    };
    assert_eq!(watcher.ask("POST", "/events", &[], &event(&text)).code, 202);
    assert_eq!(watcher.ask("POST", "/events", &[], &event(&text).replace("closed", "x")).code, 400);
    assert_eq!(watcher.ask("POST", "/events", &[], &format!("{{\"x {text}")).code, 400);
    assert_eq!(watcher.ask("POST", "/events", &[], &(event(&text) + "\n").repeat(5000)).code, 202);
    wait_until("everything is queued", SOON, || {
        let health = watcher.health();
        health["queue"]["pending"] == 5004 && health["queue"]["dead_letters"] == 2
    });
    assert!(!watcher.log().contains(&secret));
    watcher.stop();
    assert!(!holds(&stage.folder().join("data"), &secret));
    let letters = stage.run(&["queue-dump", "--dead-letters", "--payload"]).output();
    assert!(letters.contains("[redacted]") && !letters.contains("CUSTOMER"), "{letters}");
    stage.database = database;
    stage.run_until_idle();
    let redacted = "use [redacted] for [redacted]";
    assert_eq!(stage.database().texts(), [redacted]);
    let hook = "SELECT payload->'data'->>'prompt' FROM events WHERE event_type = 'hook_received'";
    assert_eq!(stage.database().value(hook), redacted);
    let notes = format!("SELECT count(*) FROM events WHERE payload->'metadata'->>'note' = '{redacted}'");
    assert_eq!(stage.database().value(&notes), "5001");
}

#[test]
fn redact_is_off_by_default() {
    let stage = Stage::new();
    stage.transcript("-home-me-app", 1).say(&secret());
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), [secret()]);
}

#[test]
fn a_bad_pattern_is_a_configuration_error_that_names_it() {
    let mut stage = Stage::new();
    stage.set("redact.patterns", r"['fine', '(open']");
    for arguments in [&["run"][..], &["check", "--no-database"], &["emit", "--type", "session_ended"]] {
        let ran = stage.run(arguments);
        assert_eq!(ran.code(), 78, "{arguments:?}: {}", ran.error());
        let said = ran.output() + &ran.error();
        assert!(said.contains("redact.patterns[1]: '(open'") && said.contains("unclosed group"), "{said}");
    }
    // A hook goes on with what can be used.
    let input: Value = json!({"session_id": "s", "cwd": "/p", "hook_event_name": "Stop"});
    assert_eq!(stage.run_with_input(&["hook"], input.to_string()).code(), 0);
    assert_eq!(std::fs::read_dir(stage.folder().join("data/spool")).unwrap().count(), 1);
}

/// What a process takes away from the mode of every file that it makes.
fn umask(pid: u32) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Umask:")).map(|mask| mask.trim().to_owned())
}

#[test]
fn whatever_writes_makes_files_that_are_private_from_birth() {
    if lacks_proc() {
        return;
    }
    let stage = Stage::with(None);
    let begin = |arguments: &[&str]| -> Child {
        // Under a umask that would let everybody in. Its stdin stays open: it runs on.
        let program = stage.command(arguments).get_program().to_owned();
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", "umask 000; exec \"$0\" \"$@\""]).arg(program).args(arguments);
        shell.current_dir(stage.folder()).env_clear().env("PATH", "/usr/bin:/bin");
        shell.env("HOME", stage.folder().join("home"));
        shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let each = [&["hook"][..], &["emit", "--ndjson"], &["run"]];
    for arguments in each {
        let mut child = begin(arguments);
        wait_until("it takes rights away", SOON, || umask(child.id()).is_some_and(|mask| mask == "0077"));
        let _ = child.kill();
        let _ = child.wait();
    }
}
