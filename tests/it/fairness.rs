//! Nothing that is in one file holds up the others, or a stop, or takes much memory.

use std::fs::{self, File};
use std::time::Duration;

use serde_json::json;

use crate::stage::{SOON, Stage, Transcript, Watcher, wait_until};

/// Waits until a turn with this text is in the queue of a watcher that has no database.
#[track_caller]
fn wait_for_turn(stage: &Stage, text: &str) {
    wait_until(&format!("the turn {text:?} in the queue"), SOON, || {
        stage.run(&["queue-dump", "--type", "turn_detected", "--payload"]).output().contains(text)
    });
}

/// The most memory that the watcher has had, in kilobytes.
#[cfg(target_os = "linux")]
fn peak(watcher: &Watcher) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", watcher.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[track_caller]
fn assert_stops(watcher: Watcher) {
    let (status, took) = watcher.stop();
    assert!(status.success(), "{status:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");
}

/// A transcript of 200 GB without a newline, which takes no disk.
fn sparse(stage: &Stage) -> Transcript {
    let transcript = stage.transcript("-a", 1);
    fs::create_dir_all(transcript.path.parent().unwrap()).unwrap();
    File::create(&transcript.path).unwrap().set_len(200_000_000_000).unwrap();
    transcript
}

#[test]
fn a_file_of_200_gb_without_newline_holds_up_neither_others_nor_a_stop() {
    let stage = Stage::with(None);
    let sparse = sparse(&stage);
    // There from the start, and new.
    let mut other = stage.transcript("-home-me-app", 2);
    other.say("one");
    let watcher = stage.start();
    wait_for_turn(&stage, "one");
    other.say("two");
    wait_for_turn(&stage, "two");
    stage.transcript("-home-me-new", 3).say("three");
    wait_for_turn(&stage, "three");
    assert_stops(watcher);
    // Started again, and found while it runs.
    let watcher = stage.start();
    other.say("four");
    wait_for_turn(&stage, "four");
    fs::rename(&sparse.path, sparse.path.with_file_name("00000009-0000-4000-8000-000000000000.jsonl")).unwrap();
    other.say("five");
    wait_for_turn(&stage, "five");
    #[cfg(target_os = "linux")]
    assert!(peak(&watcher) < 64 << 10, "{} kB", peak(&watcher));
    assert_stops(watcher);
}

#[test]
#[cfg(target_os = "linux")]
fn a_working_directory_of_a_megabyte_takes_neither_memory_nor_disk() {
    let stage = Stage::with(None);
    let mut transcript = stage.transcript("-home-me-app", 1);
    let mut lines = transcript.prompt("first").replace("/home/me/app", &format!("/{}", "x".repeat(1_000_000))) + "\n";
    for number in 0..1999 {
        let line = json!({"type": "user", "uuid": format!("{number}"), "sessionId": transcript.session,
                          "message": {"role": "user", "content": format!("turn {number}")}});
        lines += &format!("{line}\n");
    }
    transcript.append(lines);
    let watcher = stage.start();
    wait_for_turn(&stage, "turn 1998");
    assert!(peak(&watcher) < 64 << 10, "{} kB", peak(&watcher));
    let bytes = watcher.health()["queue"]["pending_bytes"].as_u64().unwrap();
    assert!(bytes < 4_000_000, "{bytes}");
}

#[test]
fn renaming_a_folder_of_many_transcripts_holds_up_neither_others_nor_a_stop() {
    const FILES: u32 = 5000;
    let stage = Stage::with(None);
    for number in 1..=FILES {
        stage.transcript("-a", number).say("x");
    }
    let mut other = stage.transcript("-home-me-app", FILES + 1);
    other.say("one");
    let watcher = stage.start();
    let has_read = |lines: u64| watcher.health()["watcher"]["lines"].as_u64().unwrap() >= lines;
    wait_until("all are read", SOON, || has_read(u64::from(FILES) + 1));
    let projects = stage.projects();
    fs::rename(projects.join("-a"), projects.join("-z")).unwrap();
    other.say("two");
    wait_for_turn(&stage, "two");
    fs::rename(projects.join("-z"), projects.join("-b")).unwrap();
    assert_stops(watcher);
    // Nothing is read twice.
    let watcher = stage.start();
    other.say("three");
    wait_for_turn(&stage, "three");
    wait_until("it has looked at all", SOON, || watcher.health()["watcher"]["files"] == FILES + 1);
    assert_eq!(watcher.health()["queue"]["pending"], 2 * (FILES + 1) + 2);
    assert_stops(watcher);
}

#[test]
fn a_last_line_that_is_incomplete_is_said_once_and_read_when_it_is_complete() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    let line = transcript.prompt("two") + "\n";
    let (first, second) = line.split_at(line.len() / 2);
    transcript.append(first);
    let watcher = stage.start();
    let message = "the last line of a transcript is incomplete";
    let logged = watcher.wait_for_log(message);
    assert_eq!(logged["file"].as_str(), transcript.path.to_str(), "{logged}");
    let ran = stage.run(&["verify"]);
    assert!(ran.output().contains(&format!("is incomplete ({} bytes", first.len())), "{}", ran.output());
    // Lines that end as on old Macs are one such line.
    let mut mac = stage.transcript("-home-me-app", 2);
    let lines = format!("{}\r{}\r", mac.prompt("three"), mac.prompt("four"));
    mac.append(&lines);
    wait_until("it is said", SOON, || watcher.logged(message).len() == 2);
    // Blanks at the end, and what a crash leaves behind, are nothing to say; nor are a sub-agent's lines.
    stage.transcript("-home-me-app", 3).append("  \t\0\0\0");
    let mut whole = stage.transcript("-home-me-app", 4);
    whole.append(whole.prompt("five") + " \r");
    let mut agent = stage.transcript("-home-me-app", 5);
    agent.path = agent.path.with_file_name("agent-1.jsonl");
    agent.append(first);
    transcript.append(second);
    wait_until("they are read", SOON, || {
        let texts = stage.database().texts();
        texts.len() == 3 && texts.iter().any(|text| text == "two") && texts.iter().any(|text| text == "five")
    });
    assert_eq!(watcher.logged(message).len(), 2);
    let report: serde_json::Value = serde_json::from_str(&stage.run(&["verify", "--json"]).output()).unwrap();
    assert_eq!(report["incomplete"], json!([{"path": mac.path, "offset": 0, "bytes": lines.len()}]));
}

#[test]
fn a_line_rewritten_in_place_is_said() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    // Beyond the bytes by which a file is known again.
    let texts = transcript.say_many(&"x".repeat(500), 10);
    let watcher = stage.start();
    wait_until("all are stored", SOON, || stage.database().count() == texts.len() as u64 + 1);
    let text = fs::read_to_string(&transcript.path).unwrap();
    let rewritten = text.replace(&texts[5], &texts[5].replace("x 5", "y 5"));
    assert_eq!(rewritten.len(), text.len());
    let mut file = File::options().write(true).open(&transcript.path).unwrap();
    std::io::Write::write_all(&mut file, rewritten.as_bytes()).unwrap();
    drop(file);
    watcher.wait_for_log("a transcript was modified without new bytes");
}
