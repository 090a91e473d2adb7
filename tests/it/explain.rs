//! Who said what: the program's word on each line of a transcript, in `explain`, `verify`, rows, metrics and `check`.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::capture::copy_folder;
use crate::stage::{SOON, Stage, lacks, project, wait_until};

const SESSION: &str = "00000001-0000-4000-8000-000000000001";

fn user(uuid: u32, content: Value, more: Value) -> String {
    let mut line = json!({
        "uuid": format!("a0000000-0000-4000-8000-{uuid:012}"), "sessionId": SESSION, "version": "2.1.300",
        "timestamp": "2026-01-02T03:04:05.678Z", "cwd": "/home/me/app", "message": {"role": "user", "content": content},
    });
    for (key, value) in more.as_object().unwrap() {
        line[key] = value.clone();
    }
    line.to_string().replacen('{', "{\"type\":\"user\",", 1)
}

/// A transcript with one line of each sort, the fifth of them damaged.
fn transcript(stage: &Stage) -> PathBuf {
    let folder = stage.projects().join("-home-me-app");
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join(format!("{SESSION}.jsonl"));
    let result = json!({"type": "tool_result", "tool_use_id": "t", "content": "ok"});
    let reminder = "<system-reminder>be kind</system-reminder>\nwhat is \u{1b}[1mnew\u{1b}[0m?";
    let lines = [
        user(1, json!(reminder), json!({"promptSource": "typed"})),
        user(2, json!([result]), json!({"toolUseResult": {"answers": {"Which?": "the second"}}})),
        user(3, json!("<task-notification>x</task-notification>"), json!({"origin": {"kind": "task-notification"}})),
        user(4, json!([result]), json!({})),
        format!("{}{}", &user(5, json!("cut"), json!({}))[..90], user(6, json!("whole"), json!({"origin": "human"}))),
        json!({"type": "summary", "summary": "x"}).to_string(),
        json!({"type": "assistant", "uuid": "b1", "message": {"id": "m", "content": [{"type": "text", "text": "this"}]}})
            .to_string(),
        String::new(),
        user(7, json!("from afar"), json!({"origin": {"kind": "oracle"}})),
    ];
    std::fs::write(&path, lines.join("\n") + "\n" + &user(8, json!("half"), json!({}))[..50]).unwrap();
    path
}

fn explained(stage: &Stage, arguments: &[&str]) -> Vec<String> {
    let ran = stage.run(&[&["explain"], arguments].concat());
    assert_eq!(ran.code(), 0, "{}", ran.output());
    ran.output().lines().map(str::to_owned).collect()
}

#[test]
fn each_line_is_a_turn_or_says_why_not() {
    let stage = Stage::new();
    let path = transcript(&stage);
    let path = path.to_str().unwrap();
    let (unknown, lines): (Vec<_>, Vec<_>) =
        explained(&stage, &[path]).into_iter().partition(|line| line.starts_with("unknown to"));
    let found: Vec<(u64, &str, &str)> = lines
        .iter()
        .map(|line| {
            let (number, rest) = line.trim_start().split_once(' ').unwrap();
            let (_, rest) = rest.trim_start().split_once(' ').unwrap();
            let (line_type, what) = rest.trim_start().split_once(' ').unwrap();
            (number.parse().unwrap(), line_type, what.trim_start())
        })
        .collect();
    assert_eq!(found[0], (1, "user", "turn: user, prompt, typed"));
    assert_eq!(found[1], (2, "user", "turn: user, answer, unlabelled"));
    assert_eq!(found[2], (3, "user", "no turn: origin task-notification"));
    assert_eq!(found[3], (4, "user", "no turn: tool result"));
    assert!(found[4].2.starts_with("no turn: no JSON object"), "{:?}", found[4]);
    assert_eq!(found[5], (5, "user", "turn: user, prompt, app"));
    assert_eq!(found[6], (6, "state", "no turn: state"));
    assert_eq!(found[7], (7, "assistant", "turn: agent"));
    assert_eq!(found[8], (9, "user", "no turn: origin oracle"));
    assert_eq!(found[9], (10, "-", "no turn: incomplete: it has no newline yet"));
    assert_eq!(found.len(), 10, "{lines:?}");
    assert_eq!(unknown, ["unknown to this version: origin \"oracle\" on 1 line (version \"2.1.300\")"]);
    // No text but where it is asked for, and then without the power to steer a terminal.
    assert!(!lines.concat().contains("what is"), "{lines:?}");
    let lines = explained(&stage, &["--text", &format!("{path}:1")]);
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[1].ends_with("| what is \u{fffd}[1mnew\u{fffd}[0m?"), "{lines:?}");
    let object: Value =
        serde_json::from_str(&explained(&stage, &["--json", "--text", &format!("{path}:2")])[0]).unwrap();
    assert_eq!(object["offset"], std::fs::read(path).unwrap().iter().position(|byte| *byte == b'\n').unwrap() + 1);
    assert_eq!((&object["kind"], &object["provenance"]), (&json!("answer"), &json!("unlabelled")));
    assert_eq!((&object["text"], &object["text_bytes"]), (&json!("Which?\nthe second"), &json!(17)));
    let object: Value = serde_json::from_str(&explained(&stage, &["--json", &format!("{path}:4")])[0]).unwrap();
    assert_eq!((&object["reason"], &object["text"]), (&json!("tool result"), &Value::Null));
    // A file can't write lines of its own, nor steer a terminal; a line that is too long is listed.
    let path = stage.folder().join("hostile.jsonl");
    let hostile = json!({"type": "\u{1b}[2J\nx", "origin": "x"});
    let forged =
        user(1, json!("x"), json!({"origin": "\u{1b}]0;x\u{7}\n      9           0  user        turn: user\u{202e}"}));
    std::fs::write(&path, format!("{hostile}\n{forged}\n{}\n{}", "x".repeat(10_000), user(2, json!("x"), json!({}))))
        .unwrap();
    let mut stage = stage;
    stage.set("file_watcher.max_line_bytes", "4096");
    let mut lines = explained(&stage, &[path.to_str().unwrap()]);
    let unknown = lines.split_off(4);
    assert!(unknown.iter().all(|line| line.starts_with("unknown to this version: ")), "{unknown:?}");
    assert_eq!(unknown.len(), 3, "{unknown:?}");
    assert!(lines.iter().all(|line| !line.contains(['\u{1b}', '\u{7}', '\u{202e}'])), "{lines:?}");
    assert!(lines[2].contains("10001 bytes, more than file_watcher.max_line_bytes"), "{lines:?}");
    assert!(lines[3].ends_with("turn: user, prompt, unlabelled (it has no newline yet)"), "{lines:?}");
    // What is not there.
    let path = path.to_str().unwrap();
    for (place, message) in [(format!("{path}:5"), "has no line 5"), (format!("{path}x"), "could not read")] {
        let ran = stage.run(&["explain", &place]);
        assert_eq!(ran.code(), 65, "{}", ran.error());
        assert!(ran.error().contains(message), "{}", ran.error());
    }
}

#[test]
fn the_grade_is_in_the_row_and_what_is_no_turn_is_counted_by_reason() {
    let stage = Stage::new();
    transcript(&stage);
    let watcher = stage.start();
    wait_until("all turns are rows", SOON, || {
        stage.database().count() > 0
            && stage.database().value("SELECT count(*) FROM events WHERE event_type = 'turn_detected'") == "4"
    });
    let rows =
        "SELECT string_agg(concat_ws(' ', payload->>'kind', payload->>'provenance'), ', ' ORDER BY id) FROM events
                 WHERE payload->>'actor' = 'user'";
    assert_eq!(stage.database().value(rows), "prompt typed, answer unlabelled, prompt app");
    let (_, page) = watcher.get("/metrics").unwrap();
    for counted in [
        "lines_skipped_total{reason=\"origin\"} 2",
        "lines_skipped_total{reason=\"tool_result\"} 1",
        "format_unknown_total{field=\"origin\"} 1",
    ] {
        assert!(page.contains(&format!("headspace_watcher_{counted}")), "{counted}: {page}");
    }
    // What the format did not have is named once in the log, and by check.
    assert_eq!(watcher.logged("something that this version does not know").len(), 1);
    let checked = stage.run(&["check"]).output();
    let line = checked.lines().find(|line| line.contains(" format ")).unwrap();
    assert!(line.starts_with("note") && line.contains("origin \"oracle\" in 1 lines (version \"2.1.300\")"), "{line}");
    let report: Value = serde_json::from_str(&stage.run(&["verify", "--json"]).output()).unwrap();
    assert_eq!(report["user_lines_no_turns"], json!({"origin": 2, "tool_result": 1}));
    let table = stage.run(&["verify"]);
    assert_eq!(table.code(), 0, "{}", table.output());
    assert!(table.output().contains("3 user lines are no turns"), "{}", table.output());
    assert!(table.output().contains("2 origin, 1 tool_result"), "{}", table.output());
}

#[test]
fn the_comparison_with_another_program_tells_a_difference() {
    let Some(python) =
        ["/usr/bin/python3", "/usr/local/bin/python3"].into_iter().find(|path| PathBuf::from(path).exists())
    else {
        lacks("python3", false);
        return;
    };
    let stage = Stage::new();
    transcript(&stage);
    let other = stage.folder().join("other.py");
    let compare = |lines: &str| {
        std::fs::write(&other, format!("print({lines:?})")).unwrap();
        let output = std::process::Command::new(project().join("scripts/compare-turns.sh"))
            .args([&stage.projects(), &other])
            .env("HEADSPACE_WATCHER_BIN", env!("CARGO_BIN_EXE_headspace-watcher"))
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
        (output.status.code(), text)
    };
    let (code, text) = compare("{}");
    assert_eq!(code, Some(1), "{python}: {text}");
    assert!(text.contains("4 turns here, 1 there, 0 in both"), "{text}");
}

/// What a session of the real client left behind, beside what was typed into it: the truth, without any reading of the format.
#[test]
fn what_was_typed_into_the_real_client_is_in_the_table_and_nothing_else() {
    let sample = project().join("../shared/real-client/sample");
    if lacks("sessions of a real client", sample.exists()) {
        return;
    }
    let typed = std::fs::read_to_string(sample.join("typed.jsonl")).unwrap();
    let mut typed: Vec<[String; 2]> = typed
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|turn| ["kind", "text"].map(|field| turn[field].as_str().unwrap().trim().to_owned()))
        .collect();
    typed.sort();
    let stage = Stage::new();
    copy_folder(&sample.join("projects"), &stage.projects());
    stage.run_until_idle();
    let rows = stage.database().query(
        "SELECT payload->>'kind', btrim(payload->>'text', E' \\n') FROM events WHERE payload->>'actor' = 'user'",
    );
    let mut rows: Vec<[String; 2]> =
        rows.into_iter().map(|row| <[Option<String>; 2]>::try_from(row).unwrap().map(Option::unwrap)).collect();
    rows.sort();
    assert_eq!(rows, typed);
    let report = stage.run(&["verify"]);
    assert_eq!(report.code(), 0, "{}", report.output());
}
