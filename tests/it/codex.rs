//! The Codex CLI's rollouts: each turn once, under its own thread, in whichever form and order its files come.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use serde_json::{Value, json};

use crate::stage::{Dice, SOON, Stage, wait_until};

const PARENT: &str = "019c0000-0000-7000-8000-000000000001";
const FORK: &str = "019c0000-0000-7000-8000-000000000002";

/// Second of the 3rd of January 2026 at ten o'clock at which a thread, or a turn, was begun.
fn at(second: u32) -> String {
    format!("2026-01-03T10:{:02}:{:02}.250Z", second / 60, second % 60)
}

fn line(second: u32, kind: &str, payload: Value) -> String {
    json!({"timestamp": at(second), "type": kind, "payload": payload}).to_string() + "\n"
}

fn meta(second: u32, thread: &str, further: Value) -> String {
    let mut payload = json!({"id": thread, "timestamp": at(second), "cwd": "/home/me/app", "originator": "codex-tui",
        "cli_version": "0.171.0", "source": "cli", "git": {"branch": "main"}, "base_instructions": {"text": "x".repeat(17_000)}});
    payload.as_object_mut().unwrap().extend(further.as_object().unwrap().clone());
    line(second, "session_meta", payload)
}

/// One turn, a prompt and its answer, as `form` (`item`, `event`, `response`) has it; its lines were written at `written`.
fn turn(form: &str, written: u32, started: u32, text: &str) -> String {
    let id = format!("019c0000-0000-7000-9000-{started:012}");
    let answer = format!("answer to {text}");
    let started_at = "2026-01-03T10:00:00Z".parse::<jiff::Timestamp>().unwrap().as_second() + i64::from(started);
    let event = |payload: Value| line(written, "event_msg", payload);
    let response = |role: &str, kind: &str, text: &str| {
        let content = json!([{"type": kind, "text": text}]);
        line(written, "response_item", json!({"type": "message", "role": role, "content": content}))
    };
    let shown = |user: bool, text: &str| match form {
        "item" => event(json!({"type": "item_completed", "turn_id": id, "item": {
            "type": if user { "UserMessage" } else { "AgentMessage" }, "id": "msg_1",
            "content": [{"type": if user { "text" } else { "Text" }, "text": text}]}})),
        "event" => event(json!({"type": if user { "user_message" } else { "agent_message" }, "message": text})),
        _ => String::new(),
    };
    [
        event(json!({"type": "task_started", "turn_id": id, "started_at": started_at})),
        response("user", "input_text", "<environment_context>…</environment_context>"),
        line(written, "turn_context", json!({"turn_id": id, "cwd": "/home/me/app/deep", "model": "gpt-5.5"})),
        response("user", "input_text", text),
        shown(true, text),
        shown(false, &answer),
        response("assistant", "output_text", &answer),
        event(json!({"type": "task_complete", "turn_id": id})),
    ]
    .concat()
}

fn parent(form: &str) -> String {
    let mode = if form == "item" { "paginated" } else { "legacy" };
    [meta(0, PARENT, json!({"history_mode": mode})), turn(form, 10, 10, "one"), turn(form, 20, 20, "two")].concat()
}

/// As a legacy fork has it: all lines of its parent, stamped anew, and a turn of its own.
fn fork() -> String {
    let begin =
        meta(60, FORK, json!({"forked_from_id": PARENT})) + &meta(60, PARENT, json!({})).replace(&at(60), &at(0));
    begin + &turn("event", 60, 10, "one") + &turn("event", 60, 20, "two") + &turn("event", 70, 70, "three")
}

fn sessions(stage: &Stage) -> PathBuf {
    stage.folder().join("home/.codex/sessions")
}

/// Where Codex puts the rollout of a thread.
fn rollout(stage: &Stage, thread: &str) -> PathBuf {
    let folder = sessions(stage).join("2026/01/03");
    std::fs::create_dir_all(&folder).unwrap();
    folder.join(format!("rollout-2026-01-03T11-00-00-{thread}.jsonl"))
}

fn compress(path: &Path) -> PathBuf {
    let compressed = path.with_extension("jsonl.zst");
    let bytes = compress_to_vec(&*std::fs::read(path).unwrap(), CompressionLevel::Fastest);
    std::fs::write(path.with_extension("tmp"), bytes).unwrap();
    std::fs::rename(path.with_extension("tmp"), &compressed).unwrap();
    std::fs::remove_file(path).unwrap();
    compressed
}

/// Text, actor and session of each turn, in the order of these.
fn turns(stage: &Stage) -> Vec<[String; 3]> {
    let rows = stage.database().query(
        "SELECT payload->>'text', payload->>'actor', payload->>'session_uuid' FROM events WHERE event_type = 'turn_detected'",
    );
    let row =
        |row: Vec<Option<String>>| <[String; 3]>::try_from(row.into_iter().flatten().collect::<Vec<_>>()).unwrap();
    let mut turns: Vec<[String; 3]> = rows.into_iter().map(row).collect();
    turns.sort();
    turns
}

/// The prompts of these threads, with their answers.
fn expected(prompts: &[(&str, &str)]) -> Vec<[String; 3]> {
    let turns = prompts.iter().flat_map(|(thread, text)| {
        [(format!("answer to {text}"), "agent"), ((*text).to_owned(), "user")]
            .map(|(text, actor)| [text, actor.to_owned(), (*thread).to_owned()])
    });
    let mut turns: Vec<[String; 3]> = turns.collect();
    turns.sort();
    turns
}

fn verified(stage: &Stage) -> Value {
    let ran = stage.run(&["verify", "--json"]);
    assert_eq!(ran.code(), 0, "{}{}", ran.output(), ran.error());
    serde_json::from_str(&ran.output()).unwrap()
}

#[test]
fn a_rollout_becomes_rows_that_name_the_agent_and_verify_explain_and_check_know_it() {
    let stage = Stage::new();
    let path = rollout(&stage, PARENT);
    std::fs::write(&path, parent("item")).unwrap();
    stage.transcript("-home-me-app", 1).say("to the other agent");
    stage.run_until_idle();
    let payloads =
        stage.database().query("SELECT payload FROM events WHERE payload->>'agent' = 'codex-cli' ORDER BY id");
    let payloads: Vec<Value> =
        payloads.iter().map(|row| serde_json::from_str(row[0].as_ref().unwrap()).unwrap()).collect();
    assert_eq!(payloads.len(), 5);
    assert_eq!((&payloads[0]["session_uuid"], &payloads[0]["project_path"]), (&json!(PARENT), &json!("/home/me/app")));
    let uuid = payloads[1]["turn_uuid"].clone();
    assert_eq!(
        payloads[1],
        json!({"agent": "codex-cli", "session_uuid": PARENT, "actor": "user", "text": "one", "source": "polling",
            "turn_timestamp": at(10), "turn_uuid": uuid, "message_id": "019c0000-0000-7000-9000-000000000010",
            "kind": "prompt", "provenance": "typed", "project_path": "/home/me/app",
            "working_directory": "/home/me/app/deep", "git_branch": "main"})
    );
    assert_eq!((&payloads[2]["model"], &payloads[2]["message_id"]), (&json!("gpt-5.5"), &json!("msg_1")));
    let claude = stage.database().value("SELECT count(*) FROM events WHERE payload->>'agent' = 'claude-code'");
    assert_eq!(claude, "2");
    let report = verified(&stage);
    assert_eq!((&report["turns"]["in_postgres"], &report["sessions"]["in_postgres"]), (&json!(5), &json!(2)));
    assert_eq!(report["user_lines_no_turns"]["injected"], 2);
    let explained = stage.run(&["explain", "--json", path.to_str().unwrap()]).lines();
    let found: Vec<&Value> = explained.iter().filter(|line| line["actor"] == "user").collect();
    assert_eq!((found.len(), &found[0]["turn_uuid"]), (2, &uuid));
    assert!(explained.iter().any(|line| line["reason"] == "injected"), "{explained:?}");
    let checked = stage.run(&["check", "--no-database"]).output();
    assert!(checked.contains("codex-cli") && checked.contains(".codex/sessions"), "{checked}");
}

#[test]
fn without_codex_nothing_is_said_of_it() {
    let stage = Stage::new();
    let watcher = stage.start();
    stage.transcript("-home-me-app", 1).say("one");
    stage.wait_for_rows(2);
    assert!(!watcher.log().contains(".codex"), "{}", watcher.log());
    assert!(!stage.run(&["check", "--no-database"]).output().contains("codex"));
    assert_eq!(verified(&stage)["missing_folders"], json!([]));
}

#[test]
fn each_turn_is_stored_once_whatever_becomes_of_its_file_and_in_whatever_order_files_come() {
    // Legacy, migrated in place, compressed, put away, and a fork with copies: after each step a run, killed now and then.
    let mut stage = Stage::new();
    stage.set("file_watcher.polling_interval", "0.1");
    let mut dice = Dice::new("codex");
    let path = rollout(&stage, PARENT);
    let run = |dice: &mut Dice| {
        if dice.below(2) == 0 {
            let watcher = stage.start();
            std::thread::sleep(Duration::from_millis(dice.below(300)));
            watcher.kill();
        }
        stage.run_until_idle();
    };
    std::fs::write(&path, parent("response")).unwrap();
    run(&mut dice);
    std::fs::write(&path, parent("event")).unwrap();
    run(&mut dice);
    std::fs::write(&path, parent("item")).unwrap();
    run(&mut dice);
    let parents = [(PARENT, "one"), (PARENT, "two")];
    assert_eq!(turns(&stage), expected(&parents));
    let compressed = compress(&path);
    run(&mut dice);
    std::fs::write(rollout(&stage, FORK), fork()).unwrap();
    run(&mut dice);
    let archive = sessions(&stage).with_file_name("archived_sessions");
    std::fs::create_dir(&archive).unwrap();
    std::fs::rename(&compressed, archive.join(compressed.file_name().unwrap())).unwrap();
    run(&mut dice);
    let all = [&parents[..], &[(FORK, "three")]].concat();
    assert_eq!(turns(&stage), expected(&all));
    verified(&stage);
    let registered = "SELECT count(*) FROM events WHERE event_type = 'session_registered'";
    assert_eq!(stage.database().value(registered), "2");
    // Materialised again, and gone on with.
    let more = parent("item") + &turn("item", 90, 90, "four");
    std::fs::write(&path, more).unwrap();
    run(&mut dice);
    assert_eq!(turns(&stage), expected(&[&all[..], &[(PARENT, "four")]].concat()));
}

#[test]
fn a_copied_turn_goes_to_its_own_thread_also_when_only_the_fork_is_there() {
    let stage = Stage::new();
    std::fs::write(rollout(&stage, FORK), fork()).unwrap();
    stage.run_until_idle();
    let all = expected(&[(PARENT, "one"), (PARENT, "two"), (FORK, "three")]);
    assert_eq!(turns(&stage), all);
    compress(&{
        let path = rollout(&stage, PARENT);
        std::fs::write(&path, parent("item")).unwrap();
        path
    });
    stage.run_until_idle();
    assert_eq!(turns(&stage), all, "its parent comes later");
    assert_eq!(verified(&stage)["sessions"]["in_postgres"], 2);
}

#[test]
fn a_rollout_is_followed_line_by_line_across_kills_and_a_sub_agents_is_not() {
    let mut stage = Stage::new();
    stage.set("file_watcher.polling_interval", "0.1");
    let (path, agent) = (rollout(&stage, PARENT), rollout(&stage, FORK));
    std::fs::write(agent, meta(0, FORK, json!({"source": {"subagent": "review"}})) + &turn("item", 1, 1, "review it"))
        .unwrap();
    // The same words several times in a turn: how often they came before is found again in the lines before the cursor.
    let text = meta(0, PARENT, json!({})) + &turn("event", 5, 5, "again").repeat(3) + &turn("response", 6, 6, "again");
    let mut written = 0;
    let mut dice = Dice::new("codex, line by line");
    while written < text.len() {
        let watcher = stage.start();
        for _ in 0..3 {
            written = (written + 1 + dice.below(text.len() as u64 / 8) as usize).min(text.len());
            while !text.is_char_boundary(written) {
                written += 1;
            }
            std::fs::write(path.with_extension("part"), "").unwrap();
            let mut file = std::fs::OpenOptions::new().create(true).append(true).open(&path).unwrap();
            let length = file.metadata().unwrap().len() as usize;
            std::io::Write::write_all(&mut file, &text.as_bytes()[length..written]).unwrap();
            std::thread::sleep(Duration::from_millis(dice.below(150)));
        }
        watcher.kill();
    }
    let watcher = stage.start();
    wait_until("all is stored", SOON, || turns(&stage).len() >= 6);
    let found = turns(&stage);
    assert_eq!(found.len(), 6, "{found:?}");
    let distinct = stage
        .database()
        .value("SELECT count(DISTINCT payload->>'turn_uuid') FROM events WHERE event_type = 'turn_detected'");
    assert_eq!(distinct, "6");
    drop(watcher);
    stage.run_until_idle();
    verified(&stage);
    assert_eq!(turns(&stage).len(), 6);
}
