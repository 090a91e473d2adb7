//! Memory is bounded by the program, not by who sends: payloads of the permitted size that are made of the tiniest values.
#![cfg(target_os = "linux")]

use std::io::Write as _;
use std::process::Stdio;

use serde_json::Value;

use crate::stage::{SOON, Stage, Watcher, rounds, unique, wait_until};

/// What any request, hook or line may take beside what the program has anyway, also ten at once.
const ON_TOP_KILOBYTES: u64 = 128 << 10;

/// Senders at once.
const SENDERS: usize = 10;

/// Bytes of a body: just below `max_event_bytes`, and what a debug build can take in reasonable time.
const BODY_BYTES: usize = 16_700_000;
const SHORT_BODY_BYTES: usize = 3_000_000;

/// JSON of about `bytes` bytes whose values take the most memory: `item` again and again, `count` times at most, then text.
fn made_of(item: &str, count: usize, bytes: usize) -> String {
    let count = count.min(bytes / (item.len() + 1));
    let mut json = format!("{{\"items\":[{}]", vec![item; count].join(","));
    let text = bytes.saturating_sub(json.len() + 20);
    json.push_str(&format!(",\"text\":\"{}\"}}", "x".repeat(text)));
    json
}

/// Payloads beyond what is permitted, and as much as is. The long proof (`scripts/torture.sh /memory::/`) has all of them
/// in bodies of the permitted size.
fn hostile() -> Vec<(&'static str, String)> {
    let bytes = if is_long() { BODY_BYTES } else { SHORT_BODY_BYTES };
    let mut hostile = vec![
        ("numbers, far too many", made_of("1", usize::MAX, bytes)),
        ("objects, as many as permitted", made_of("{\"\":0}", 40_000, bytes)),
    ];
    // serde_json parses the text under this key as JSON.
    let items = vec!["1"; bytes / 2].join(",");
    hostile.push(("one text in disguise", format!(r#"{{"a":{{"$serde_json::private::RawValue":"[{items}]"}}}}"#)));
    if is_long() {
        let members: Vec<String> = (0..190_000).map(|n| format!("\"{n:025x}\":\"{n:025x}\"")).collect();
        hostile.push(("short texts, as many as permitted", format!("{{{}}}", members.join(","))));
        hostile.push(("one text", made_of("1", 1, BODY_BYTES)));
        hostile.push(("objects, far too many", made_of("{\"\":0}", usize::MAX, BODY_BYTES)));
        hostile.push(("numbers, as many as permitted", made_of("1", 500_000, BODY_BYTES)));
        hostile.push(("arrays, as many as permitted", made_of("[1]", 160_000, BODY_BYTES)));
    }
    hostile
}

fn is_long() -> bool {
    rounds(1) > 1
}

fn kilobytes(pid: u32, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Runs `act` and gives what it took beside what the watcher had before, in kilobytes.
fn on_top(watcher: &Watcher, act: impl FnOnce()) -> u64 {
    let before = kilobytes(watcher.pid(), "VmRSS:");
    std::fs::write(format!("/proc/{}/clear_refs", watcher.pid()), "5").unwrap();
    act();
    kilobytes(watcher.pid(), "VmHWM:").saturating_sub(before)
}

/// Sends `body` from all senders at once, again while there is no room for it. Gives the codes of the answers.
fn send_from_all(watcher: &Watcher, target: &str, body: &str) -> Vec<u16> {
    std::thread::scope(|scope| {
        let senders: Vec<_> = (0..SENDERS)
            .map(|_| {
                scope.spawn(|| {
                    let key = format!("Idempotency-Key: {}", unique());
                    loop {
                        let answer = watcher.ask("POST", target, &[&key], body);
                        if answer.code != 503 {
                            return answer.code;
                        }
                        std::thread::sleep(std::time::Duration::from_millis(500));
                    }
                })
            })
            .collect();
        senders.into_iter().map(|sender| sender.join().unwrap()).collect()
    })
}

#[test]
fn ten_requests_at_once_made_of_tiny_values_take_bounded_memory() {
    let stage = Stage::with(None);
    let watcher = stage.start();
    for (what, metadata) in hostile() {
        let payload = format!(r#"{{"session_uuid":"s","reason":"closed","metadata":{metadata}}}"#);
        let body = format!(r#"{{"event_type":"session_ended","payload":{payload}}}"#);
        let mut codes = Vec::new();
        let taken = on_top(&watcher, || codes = send_from_all(&watcher, "/events", &body));
        eprintln!("{what}: {taken} kB, {codes:?}");
        let expected = if what.contains("too many") { 400 } else { 202 };
        assert_eq!(codes, vec![expected; SENDERS], "{what}");
        assert!(taken <= ON_TOP_KILOBYTES, "{what}: {taken} kB");
    }
}

#[test]
fn ten_hooks_made_of_tiny_values_take_bounded_memory_sent_at_once_and_found_in_the_spool() {
    let mut stage = Stage::with(None);
    stage.set("hooks.capture", "full");
    let hook =
        |json: &str| format!(r#"{{"session_id":"s","cwd":"/app","hook_event_name":"Stop","tool_input":{json}}}"#);
    // Left by the command while there is no watcher.
    for (_, json) in hostile() {
        let mut command = stage.command(&["hook"]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(hook(&json).as_bytes()).unwrap();
        let pid = child.id();
        let mut peak = 0;
        while child.try_wait().unwrap().is_none() {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            peak = peak.max(line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0));
        }
        eprintln!("the command: {peak} kB");
        assert!(peak <= ON_TOP_KILOBYTES, "{peak} kB");
    }
    let left = std::fs::read_dir(stage.folder().join("data/spool")).unwrap().count();
    assert_eq!(left, hostile().len());
    let watcher = stage.start();
    wait_until("all are taken in", SOON, || watcher.health()["queue"]["pending"] == left);
    let peak = kilobytes(watcher.pid(), "VmHWM:");
    eprintln!("from the spool: {peak} kB in all");
    assert!(peak <= ON_TOP_KILOBYTES + (32 << 10), "{peak} kB");
    for (what, json) in hostile() {
        let body = hook(&json);
        let mut codes = Vec::new();
        let taken = on_top(&watcher, || {
            codes = send_from_all(&watcher, "/hook/stop", &body);
            wait_until("all are taken in", SOON, || {
                std::fs::read_dir(stage.folder().join("data/spool")).unwrap().count() == 0
            });
        });
        eprintln!("{what}: {taken} kB, {codes:?}");
        assert_eq!(codes, vec![200; SENDERS], "{what}");
        assert!(taken <= ON_TOP_KILOBYTES, "{what}: {taken} kB");
    }
    // No hook is lost, even where its data could not be kept.
    assert_eq!(watcher.health()["queue"]["dead_letters"], 0);
}

#[test]
fn lines_made_of_tiny_blocks_take_bounded_memory() {
    let stage = Stage::with(None);
    let watcher = stage.start();
    let line = |number: u32, block: &str, bytes: usize| {
        let transcript = stage.transcript("app", number);
        let blocks = vec![block; bytes / (block.len() + 1)].join(",");
        let line: Value = serde_json::from_str(&transcript.prompt("x")).unwrap();
        (transcript, line.to_string().replace("\"content\":\"x\"", &format!("\"content\":[{blocks}]")) + "\n")
    };
    let blocks = [("texts", r#"{"type":"text","text":""}"#), ("empty objects", "{}"), ("numbers", "1")];
    let blocks = if is_long() { &blocks[..] } else { &blocks[..1] };
    let lines = if is_long() { SENDERS as u32 } else { 1 };
    for (index, (what, block)) in blocks.iter().enumerate() {
        let taken = on_top(&watcher, || {
            let read = || watcher.health()["watcher"]["lines"].as_u64().unwrap();
            let before = read();
            for number in 0..lines {
                let (mut transcript, line) = line(100 * index as u32 + number, block, 60_000_000);
                transcript.append(line);
            }
            wait_until("all are read", SOON * 20, || read() == before + u64::from(lines));
        });
        eprintln!("{what}: {taken} kB");
        assert!(taken <= ON_TOP_KILOBYTES, "{what}: {taken} kB");
    }
}

/// Content of some 60 MB each, for what looks into it: marks of pastes, tags, results of tools, bytes that are no text.
fn hostile_contents() -> Vec<(&'static str, Vec<u8>)> {
    const BYTES: usize = 60_000_000;
    let words = "words and ".repeat(BYTES / 10);
    let mut contents = vec![
        ("no text", [&b"\""[..], &vec![0xff; BYTES][..], &b"\""[..]].concat()),
        ("a paste", format!(r#""<pasted_content id=\"1\">x</pasted_content id=\"1\">{words}""#).into_bytes()),
    ];
    if is_long() {
        let tags: String = (0..2_000_000).map(|id| format!(r#"</pasted_content id=\"{id:07}\">"#)).collect();
        let results = vec![r#"{"text":"\n"}"#; BYTES / 14].join(",");
        let sentence =
            "The user doesn't want to proceed with this tool use. To tell you how to proceed, the user said:";
        let result = |content: &str| format!(r#"[{{"type":"tool_result","is_error":true,"content":{content}}}]"#);
        let more = [
            ("tags of pastes", format!("\"{tags}\"")),
            ("a result of small texts", result(&format!("[{results}]"))),
            ("a reason", result(&format!("\"{sentence} \\n{words}\""))),
            ("a long tag", format!("\"<{}-event>x\"", "a".repeat(BYTES))),
            ("behind an interrupt", format!(r#""[Request interrupted by user]\n{words}""#)),
            ("a shell line", format!(r#""<bash-input>\n{words}</bash-input>""#)),
            ("behind a reminder", format!(r#""<system-reminder>\n</system-reminder>{words}""#)),
        ];
        contents.extend(more.map(|(what, content)| (what, content.into_bytes())));
    }
    contents
}

#[test]
fn lines_of_hostile_words_take_bounded_memory() {
    for (number, (what, content)) in (1..).zip(hostile_contents()) {
        let stage = Stage::with(None);
        let watcher = stage.start();
        let taken = on_top(&watcher, || {
            let transcript = stage.transcript("app", number);
            let line = transcript.prompt("x");
            let (before, after) = line.split_once("\"x\"").unwrap();
            std::fs::create_dir_all(transcript.path.parent().unwrap()).unwrap();
            std::fs::write(&transcript.path, [before.as_bytes(), &content, after.as_bytes(), b"\n"].concat()).unwrap();
            wait_until("it is read", SOON * 20, || watcher.health()["watcher"]["lines"] == 1);
        });
        eprintln!("{what}: {taken} kB");
        assert!(taken <= ON_TOP_KILOBYTES, "{what}: {taken} kB");
    }
}

/// What a transcript may take to which nothing happens. A quarter is what the follower remembers of it; the rest is in sled,
/// which has its cursor, and what the allocator keeps.
const IDLE_BYTES_MAX: u64 = 2048;

#[test]
fn twenty_thousand_idle_transcripts_take_two_kilobytes_each_at_most() {
    let stage = Stage::with(None);
    let grown_to = |from: u32, to: u32| {
        for number in from..to {
            stage.transcript("app", number).append("{\"type\":\"summary\",\"summary\":\"x\"}\n");
        }
        let knows_all = |watcher: &Watcher| watcher.health()["watcher"]["files"].as_u64() == Some(u64::from(to));
        let watcher = stage.start();
        wait_until("all transcripts are known", SOON * 10, || knows_all(&watcher));
        watcher.stop();
        // Started again it has their cursors, and nothing that is left of the reading.
        let watcher = stage.start();
        wait_until("all transcripts are known again", SOON * 10, || knows_all(&watcher));
        kilobytes(watcher.pid(), "RssAnon:")
    };
    let (few, many) = (grown_to(0, 1_000), grown_to(1_000, 21_000));
    let each = many.saturating_sub(few) * 1024 / 20_000;
    eprintln!("{few} kB with 1,000 transcripts, {many} kB with 21,000: {each} bytes for each");
    assert!(each <= IDLE_BYTES_MAX, "{each} bytes for each");
}
