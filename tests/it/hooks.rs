//! Claude Code's hooks: from the hook's stdin to a row, whatever happens on the way, and the settings that run it.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::stage::{Dice, SOON, Stage, Watcher, busy_socket, lacks, project, rounds, signal, wait_until, when_busy};

const SESSION: &str = "11111111-2222-4333-8444-555555555555";

fn input(name: &str, fields: Value) -> String {
    let mut input = json!({
        "session_id": SESSION, "cwd": "/home/u/app", "hook_event_name": name,
        "transcript_path": format!("/home/u/.claude/projects/-home-u-app/{SESSION}.jsonl")
    });
    if let (Value::Object(input), Value::Object(fields)) = (&mut input, fields) {
        input.extend(fields);
    }
    input.to_string()
}

/// Runs the hook with this input; it must be silent and end with 0.
#[track_caller]
fn hook(stage: &Stage, input: impl AsRef<[u8]>) {
    let ran = stage.run_with_input(&["hook"], input);
    assert_eq!((ran.code(), ran.output(), ran.error()), (0, String::new(), String::new()));
}

/// Begins a hook whose stdin stays open.
fn begin(stage: &Stage, arguments: &[&str]) -> Child {
    stage.command(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Payloads of the hooks in the table, in its order.
fn payloads(stage: &Stage) -> Vec<Value> {
    let rows = stage.database().query("SELECT payload FROM events WHERE event_type = 'hook_received' ORDER BY id");
    rows.into_iter().map(|mut row| serde_json::from_str(&row.remove(0).unwrap()).unwrap()).collect()
}

fn spooled(stage: &Stage) -> usize {
    std::fs::read_dir(stage.folder().join("data/spool")).map_or(0, |entries| entries.count())
}

/// What is kept of an input under `summary`, said independently of the program.
fn summary_of(input: &Value) -> Value {
    let mut summary = json!({});
    for (from, to) in [
        ("hook_event_name", "hook_type"),
        ("session_id", "claude_session_id"),
        ("cwd", "working_directory"),
        ("transcript_path", "transcript_path"),
        ("tool_name", "tool_name"),
        ("tool_use_id", "tool_use_id"),
        ("notification_type", "notification_type"),
        ("permission_mode", "permission_mode"),
        ("prompt_id", "prompt_id"),
        ("agent_type", "agent_type"),
        ("agent_id", "subagent_id"),
        ("reason", "reason"),
        ("source", "source"),
        ("trigger", "trigger"),
        ("message", "message"),
        ("title", "title"),
        ("turn_id", "turn_id"),
        ("model", "model"),
    ] {
        if let Some(Value::String(text)) = input.get(from) {
            summary[to] = text.clone().into();
        }
    }
    summary
}

/// Every input as summary and as full capture; `inputs` are lines of JSON as Claude Code writes them.
fn every_input_becomes_the_right_row(inputs: &[String]) {
    for capture in ["summary", "full"] {
        let mut stage = Stage::new();
        stage.set("hooks.capture", capture);
        for input in inputs {
            hook(&stage, input);
        }
        assert_eq!(spooled(&stage), inputs.len());
        stage.run_until_idle();
        let payloads = payloads(&stage);
        assert_eq!(payloads.len(), inputs.len());
        for (mut payload, text) in payloads.into_iter().zip(inputs) {
            // What Postgres can't store is mended by decoding, not by editing text: `\\u0000` are letters.
            let mendable =
                text.replace("\\\\", "\u{1}").replace("\\u0000", "\\ufffd").replace("\\ud83d\"", "\\ufffd\"");
            let is_mended = mendable != text.replace("\\\\", "\u{1}");
            let input: Value = serde_json::from_str(&mendable.replace('\u{1}', "\\\\")).unwrap();
            let hook_id = payload.as_object_mut().unwrap().remove("hook_id").unwrap();
            assert_eq!(hook_id.as_str().unwrap().len(), 36);
            let mut expected = summary_of(&input);
            if capture == "full" {
                expected["data"] = input;
                if is_mended {
                    expected["metadata"] = json!({"repaired": true});
                }
            }
            assert_eq!(payload, expected, "{text}");
        }
        let sessions = stage.database().value("SELECT count(*) FROM events WHERE event_type = 'session_registered'");
        let distinct: std::collections::HashSet<String> = inputs
            .iter()
            .filter(|input| input.contains("\"SessionStart\""))
            .map(|input| input.split("\"session_id\":\"").nth(1).unwrap()[..36].to_owned())
            .collect();
        assert_eq!(sessions, distinct.len().to_string());
    }
}

#[test]
fn every_kind_of_input_becomes_the_right_row() {
    every_input_becomes_the_right_row(&[
        input("SessionStart", json!({"source": "startup", "model": "m"})),
        input("UserPromptSubmit", json!({"prompt": "a prompt 🙂", "permission_mode": "plan", "prompt_id": "p1"})),
        input("PreToolUse", json!({"tool_name": "Bash", "tool_input": {"command": "ls"}, "tool_use_id": "t1"})),
        input("PostToolUse", json!({"tool_name": "Bash", "tool_response": ["x"], "agent_id": "a1", "agent_type": "E"})),
        input("Notification", json!({"message": "m", "title": "t", "notification_type": "idle_prompt"})),
        input("PreCompact", json!({"trigger": "auto", "custom_instructions": null})),
        input("PermissionDenied", json!({"reason": "Blocked by classifier"})),
        input("SomeFutureEvent", json!({"message": {"not": "a text"}, "source": 7})),
        input("Stop", json!({})).replace('}', r#","last_assistant_message":"N\u0000A cut \ud83d"}"#),
        input("Stop", json!({"last_assistant_message": "literal \\u0000 and \\ud83d"})),
        input("SessionEnd", json!({"reason": "clear"})),
    ]);
}

#[test]
fn a_byte_order_mark_before_a_hooks_input_is_accepted() {
    for capture in ["summary", "full"] {
        let mut stage = Stage::new();
        stage.set("hooks.capture", capture);
        let text = input("Stop", json!({}));
        hook(&stage, format!("\u{feff}{text}"));
        // As empty as no input: nothing to keep.
        hook(&stage, "\u{feff} ");
        let watcher = stage.start();
        let answer = watcher.ask("POST", "/hook/stop", &[], &format!("\u{feff}{text}\n"));
        assert_eq!((answer.code, answer.body.as_str()), (200, ""));
        stage.wait_for_rows(2);
        let payloads = payloads(&stage);
        assert_eq!(payloads.len(), 2);
        for mut payload in payloads {
            payload.as_object_mut().unwrap().remove("hook_id");
            let input: Value = serde_json::from_str(&text).unwrap();
            let mut expected = summary_of(&input);
            if capture == "full" {
                expected["data"] = input;
            }
            assert_eq!(payload, expected);
        }
        assert_eq!(watcher.health()["queue"]["dead_letters"], 0);
    }
}

#[test]
fn the_inputs_that_claude_code_documents_become_the_right_rows() {
    let file = project().join("../shared/hook-payloads.jsonl");
    if lacks("hook inputs of the documentation", file.exists()) {
        return;
    }
    let inputs = std::fs::read_to_string(file).unwrap();
    every_input_becomes_the_right_row(&inputs.lines().map(str::to_owned).collect::<Vec<_>>());
}

/// A watcher that looks at the spool by itself so rarely that only a ring can be the reason.
fn woken_by_rings_only() -> (Stage, Watcher) {
    let mut stage = Stage::new();
    stage.set("file_watcher.polling_interval", "60");
    let watcher = stage.start();
    watcher.wait_for_log("database connected");
    (stage, watcher)
}

#[test]
fn a_hook_rings_the_watcher_and_its_row_is_there_at_once() {
    let (stage, _watcher) = woken_by_rings_only();
    let begun = Instant::now();
    hook(&stage, input("Stop", json!({})));
    stage.wait_for_rows(1);
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert_eq!(spooled(&stage), 0);
    // The event is the hook's: its id is the row's identity, its time the hook's.
    let id = payloads(&stage)[0]["hook_id"].as_str().unwrap().to_owned();
    assert_eq!(stage.database().value("SELECT event_id FROM event_receipts"), id);
}

#[test]
fn each_ring_is_heard_though_the_hook_is_gone_by_then() {
    let (stage, _watcher) = woken_by_rings_only();
    for _ in 0..100 {
        hook(&stage, input("Stop", json!({})));
        wait_until("the watcher has heard of it", SOON, || spooled(&stage) == 0);
    }
    stage.wait_for_rows(100);
}

#[test]
fn a_session_start_and_the_first_line_register_a_session_once_whichever_comes_first() {
    for hook_first in [true, false] {
        let stage = Stage::new();
        let mut transcript = stage.transcript("-home-me-app", 0x1111_1111);
        let start = input("SessionStart", json!({"source": "startup"})).replace(SESSION, &transcript.session);
        if hook_first {
            hook(&stage, &start);
            stage.run_until_idle();
        }
        transcript.say("first");
        stage.run_until_idle();
        if !hook_first {
            hook(&stage, &start);
            stage.run_until_idle();
        }
        let registered = "SELECT count(*) FROM events WHERE event_type = 'session_registered'";
        assert_eq!(stage.database().value(registered), "1");
        assert_eq!(stage.database().count(), 3);
    }
}

#[test]
fn a_hook_prints_nothing_and_exits_0_whatever_happens() {
    let mut stage = Stage::with(None);
    // Nothing on stdin, blanks, garbage, half an object, no object.
    for input in ["", " \n", "garbage", "{\"session_id\":", "[1,2]", "{} {}", "\u{0}\u{0}"] {
        hook(&stage, input);
    }
    // Arguments that mean nothing, a configuration that is broken, missing or a folder.
    std::fs::write(stage.folder().join("broken.yaml"), "queue: {\nnonsense").unwrap();
    for arguments in [
        &["hook", "--nonsense", "more"][..],
        &["--config", "broken.yaml", "hook"],
        &["--config", "missing.yaml", "hook"],
        &["--config", "/", "hook"],
        &["--log-level", "nonsense", "hook"],
    ] {
        let ran = stage.run_with_input(arguments, input("Stop", json!({})));
        assert_eq!((ran.code(), ran.output(), ran.error()), (0, String::new(), String::new()), "{arguments:?}");
    }
    // A spool that can't be made, stdin that is closed.
    std::fs::write(stage.folder().join("file"), "").unwrap();
    stage.set("queue.spool_path", "file/spool");
    hook(&stage, input("Stop", json!({})));
    let status = std::process::Command::new("sh")
        .args(["-c", "exec \"$0\" hook <&- >out 2>err", env!("CARGO_BIN_EXE_headspace-watcher")])
        .current_dir(stage.folder())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0));
    for name in ["out", "err"] {
        assert_eq!(std::fs::read(stage.folder().join(name)).unwrap(), b"");
    }
}

/// The records in the spool, taken into a queue without a database: payloads of the events, messages of the dead letters.
fn kept(stage: &Stage) -> (Vec<Value>, Vec<String>) {
    let watcher = stage.start();
    wait_until("the spool is empty", SOON, || spooled(stage) == 0);
    let events = stage.run(&["queue-dump", "--format", "jsonl", "--payload"]).lines();
    let letters = stage.run(&["queue-dump", "--dead-letters", "--format", "jsonl"]).lines();
    drop(watcher);
    (
        events.into_iter().map(|mut event| event["payload"].take()).collect(),
        letters.into_iter().map(|letter| letter["message"].as_str().unwrap().to_owned()).collect(),
    )
}

/// Writes these pieces to a hook's stdin, each a while after the one before, then closes it or keeps it open. Gives how
/// long it took.
fn hook_in_pieces(stage: &Stage, pieces: &[(Duration, &str)], is_closed: bool) -> Duration {
    let begun = Instant::now();
    let mut child = begin(stage, &["hook"]);
    let mut stdin = child.stdin.take().unwrap();
    for (pause, piece) in pieces {
        std::thread::sleep(*pause);
        stdin.write_all(piece.as_bytes()).unwrap();
    }
    let open = (!is_closed).then_some(stdin);
    wait_until("it ends", SOON, || child.try_wait().unwrap().is_some());
    drop(open);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stdout.len(), output.stderr.len()), (Some(0), 0, 0));
    begun.elapsed()
}

#[test]
fn a_hooks_input_that_comes_late_or_in_pieces_is_kept() {
    let stage = Stage::with(None);
    let text = input("Stop", json!({"prompt_id": "1"}));
    let (head, tail) = text.split_at(text.len() / 2);
    let long = Duration::from_millis(1300);
    for is_closed in [true, false] {
        hook_in_pieces(&stage, &[(long, &text)], is_closed);
        hook_in_pieces(&stage, &[(Duration::ZERO, head), (long, tail)], is_closed);
    }
    let (payloads, letters) = kept(&stage);
    assert_eq!((payloads.len(), letters.as_slice()), (4, &[][..]));
    assert!(payloads.iter().all(|payload| payload["prompt_id"] == "1"));
}

#[test]
fn a_hook_that_gets_no_complete_input_ends_before_claude_code_kills_it_and_leaves_a_dead_letter() {
    let stage = Stage::with(None);
    let installed = stage.run(&["hooks", "show"]).output();
    let timeout = installed.lines().find_map(|line| line.trim().strip_prefix("\"timeout\": ")).unwrap();
    let timeout = Duration::from_secs(timeout.trim_end_matches(',').parse().unwrap());
    // All three at once: each takes as long as a hook may.
    let took = std::thread::scope(|scope| {
        let run = |text: &'static str| scope.spawn(|| hook_in_pieces(&stage, &[(Duration::ZERO, text)], false));
        [run(""), run("{\"a\":"), run("garbage")].map(|thread| thread.join().unwrap())
    });
    assert!(took.iter().all(|took| *took < timeout), "{took:?}, Claude Code waits for {timeout:?}");
    // Nobody who writes: there is no input, and nothing to be said of it.
    hook(&stage, "");
    let (payloads, mut letters) = kept(&stage);
    letters.sort();
    assert_eq!(payloads.len(), 0);
    let seconds = timeout.as_secs() - 2;
    let expected = [
        format!(
            "a hook got no complete JSON object within {seconds} s, only 5 bytes; it is kept only where hooks.capture is full"
        ),
        format!(
            "a hook got no complete JSON object within {seconds} s, only 7 bytes; it is kept only where hooks.capture is full"
        ),
        format!("a hook got no input within {seconds} s"),
    ];
    assert_eq!(letters, expected);
}

#[test]
fn a_hook_whose_stdin_stays_open_ends_when_its_object_is_complete() {
    let stage = Stage::with(None);
    let text = input("SessionEnd", json!({"reason": "clear"}));
    let took = hook_in_pieces(&stage, &[(Duration::ZERO, &text)], false);
    assert!(took < Duration::from_secs(5), "{took:?}: it has waited for more");
    assert_eq!(spooled(&stage), 1);
}

#[test]
fn nothing_that_follows_a_hooks_object_on_its_stdin_is_lost_without_a_word() {
    let stage = Stage::with(None);
    let first = input("Stop", json!({"prompt_id": "1"}));
    let second = input("Stop", json!({"prompt_id": "2"}));
    hook(&stage, format!("{first}{second}"));
    hook(&stage, format!("{first}\n{second}\n"));
    // In two writes, and left open.
    hook_in_pieces(&stage, &[(Duration::ZERO, &first), (Duration::ZERO, &second)], false);
    hook(&stage, format!("{first} and more"));
    let (payloads, letters) = kept(&stage);
    let ids: Vec<&str> = payloads.iter().map(|payload| payload["prompt_id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["1", "2", "1", "2", "1", "2", "1"]);
    assert_eq!(letters, ["a hook's input of 8 bytes is no JSON object; it is kept only where hooks.capture is full"]);
}

#[test]
fn what_stands_around_a_hooks_objects_costs_neither_events_nor_time() {
    let stage = Stage::with(None);
    let object = |number: u32| input("Stop", json!({"prompt_id": number.to_string()}));
    let begun = Instant::now();
    // Left open, each.
    for behind in ["\0", ",", "\n\0\n"] {
        hook_in_pieces(&stage, &[(Duration::ZERO, &(object(1) + behind))], false);
    }
    hook_in_pieces(&stage, &[(Duration::ZERO, "{a:1}")], false);
    hook_in_pieces(&stage, &[(Duration::ZERO, &format!("\n\u{feff}\n\u{feff}{}", object(2)))], false);
    assert!(begun.elapsed() < when_busy(Duration::from_secs(5)), "{:?}", begun.elapsed());
    hook(&stage, format!("\u{feff}{}\n\u{feff}{}\n\u{feff}{}", object(3), object(4), object(5)));
    let (payloads, letters) = kept(&stage);
    let ids: Vec<&str> = payloads.iter().map(|payload| payload["prompt_id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["1", "1", "1", "2", "3", "4", "5"]);
    assert_eq!(letters.len(), 2, "the comma, and what is no JSON: {letters:?}");
    hook(&stage, (0..102).map(object).collect::<String>());
    let (payloads, letters) = kept(&stage);
    assert_eq!(payloads.len(), 107);
    assert_eq!(letters.last().unwrap(), "a hook's input has more than 100 objects; the others were not kept");
}

#[test]
fn the_dead_letter_of_garbage_says_how_much_came() {
    let stage = Stage::with(None);
    // Brackets, as in random bytes, are the end of nothing.
    let noise = "x]}{y\u{fffd}".repeat(12_500);
    for text in [noise.clone(), format!("{{]{noise}")] {
        hook(&stage, &text);
        let (payloads, letters) = kept(&stage);
        assert_eq!(payloads.len(), 0);
        assert!(
            letters.last().unwrap().starts_with(&format!("a hook's input of {} bytes is no JSON object", text.len())),
            "{letters:?}"
        );
    }
}

#[test]
fn a_hook_without_a_configuration_leaves_nothing_where_the_agent_works() {
    let stage = Stage::with(None);
    let elsewhere = stage.folder().join("project");
    std::fs::create_dir(&elsewhere).unwrap();
    let run = |has_home: bool| {
        let mut command = stage.command(&["hook"]);
        command.current_dir(&elsewhere).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if !has_home {
            command.env_remove("HOME");
        }
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input("Stop", json!({})).as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), output.stdout.len(), output.stderr.len()), (Some(0), 0, 0));
    };
    for has_home in [true, false] {
        run(has_home);
        assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0, "home: {has_home}");
    }
    // Unless it is told where.
    let told = stage.folder().join("told");
    let mut command = stage.command(&["hook"]);
    command.current_dir("/").env("HEADSPACE_QUEUE__SPOOL_PATH", &told).stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input("Stop", json!({})).as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(std::fs::read_dir(&told).unwrap().count(), 1);
    // Where a watcher has run with its defaults, the spool is there, and somebody reads it.
    let spool = stage.state_folder().join("spool");
    std::fs::create_dir_all(&spool).unwrap();
    run(true);
    assert_eq!(std::fs::read_dir(&spool).unwrap().count(), 1);
}

#[test]
fn a_hook_on_a_terminal_on_which_nobody_types_ends_and_leaves_nothing() {
    let stage = Stage::with(None);
    let mut terminal = std::process::Command::new("script");
    let program = env!("CARGO_BIN_EXE_headspace-watcher");
    terminal.args(["-qec", &format!("{program} hook"), "/dev/null"]).current_dir(stage.folder());
    // What script reads is typed on its terminal: nothing, and no end.
    let Ok(mut child) = terminal.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() else {
        lacks("script(1)", false);
        return;
    };
    let stdin = child.stdin.take();
    wait_until("it ends", SOON, || child.try_wait().unwrap().is_some());
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), output.stdout.len()),
        (Some(0), 0),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    assert_eq!(spooled(&stage), 0);
}

#[test]
fn a_configuration_that_is_wrong_somewhere_makes_a_hook_careful_and_keeps_its_spool() {
    let mut stage = Stage::new();
    let config = "claude:\n  projects_path: projects\nqueue:\n  spool_path: elsewhere\nhooks:\n  capture: full\n";
    std::fs::write(stage.folder().join("config.yaml"), format!("{config}redcat: {{enabled: true}}\n")).unwrap();
    hook(&stage, input("Notification", json!({"prompt": "secret", "message": "token=abcdefgh12345"})));
    std::fs::write(stage.folder().join("config.yaml"), config).unwrap();
    stage.set("http.listen", "null");
    stage.run_until_idle();
    let payload = payloads(&stage).remove(0);
    assert_eq!(payload["message"], "token=[redacted]");
    assert_eq!(payload["data"], Value::Null);
}

#[test]
fn hooks_over_http_are_answered_with_nothing_and_named_by_their_path() {
    let stage = Stage::new();
    let watcher = stage.start();
    // As Claude Headspace's own hook script sends them.
    for (path, body) in [
        ("session-start", json!({"session_id": SESSION, "working_directory": "/w"})),
        ("user-prompt-submit", json!({"session_id": SESSION, "working_directory": "/w", "prompt": "secret"})),
        ("stop", json!({"session_id": SESSION, "working_directory": "/w", "tmux_pane": "%1"})),
    ] {
        let answer =
            watcher.ask("POST", &format!("/hook/{path}"), &["Content-Type: application/json"], &body.to_string());
        assert_eq!((answer.code, &*answer.body), (200, ""), "{answer:?}");
    }
    let rest = ["session-end", "notification", "pre-tool-use", "post-tool-use", "permission-request"];
    for path in rest {
        let body = json!({"session_id": SESSION, "working_directory": "/w"}).to_string();
        assert_eq!(watcher.ask("POST", &format!("/hook/{path}"), &[], &body).code, 200);
    }
    // As Claude Code's http hooks do: the input's own name counts.
    let answer = watcher.ask("POST", "/hook/any", &[], &input("PostToolUse", json!({"tool_name": "Bash"})));
    assert_eq!((answer.code, &*answer.body), (200, ""));
    for _ in 0..2 {
        let again = ["Idempotency-Key: 0199aaaa-bbbb-7ccc-8ddd-eeeeeeeeeeee"];
        assert_eq!(watcher.ask("POST", "/hook/stop", &again, &input("Stop", json!({}))).code, 200);
    }
    assert_eq!(watcher.ask("POST", "/hook/stop", &[], "garbage").code, 200);
    wait_until("all are delivered", SOON, || stage.database().count() == 12);
    wait_until("the queue is empty", SOON, || watcher.health()["queue"]["pending"] == 0);
    let types: Vec<Value> = payloads(&stage).iter().map(|payload| payload["hook_type"].clone()).collect();
    let expected = "SessionStart UserPromptSubmit Stop SessionEnd Notification PreToolUse PostToolUse PermissionRequest PostToolUse Stop";
    assert_eq!(types, expected.split(' ').collect::<Vec<_>>());
    assert_eq!(payloads(&stage)[0]["working_directory"], "/w");
    assert_eq!(stage.database().value("SELECT count(*) FROM events WHERE payload::text LIKE '%secret%'"), "0");
    wait_until("the garbage is a dead letter", SOON, || watcher.health()["queue"]["dead_letters"] == 1);
}

#[test]
fn a_hook_does_not_wait_for_a_watcher_that_hangs() {
    let stage = Stage::with(None);
    std::fs::create_dir(stage.folder().join("data")).unwrap();
    let _busy = busy_socket(&stage.folder().join("data/watcher.sock"));
    let mut child = begin(&stage, &["hook"]);
    child.stdin.take().unwrap().write_all(input("Stop", json!({})).as_bytes()).unwrap();
    wait_until("it ends", SOON, || child.try_wait().unwrap().is_some());
    assert_eq!(spooled(&stage), 1);
}

#[test]
fn hooks_are_kept_while_the_queue_is_full_and_taken_in_when_there_is_room() {
    let mut stage = Stage::with(None);
    stage.set("queue.max_pending_bytes", "1048576").set("event_system.max_event_bytes", "1000000");
    let watcher = stage.start();
    let text = "x".repeat(600_000);
    let payload = json!({"session_uuid": "s", "reason": "closed", "metadata": {"text": text}});
    let large = json!({"event_type": "session_ended", "payload": payload}).to_string();
    for code in [202, 503] {
        assert_eq!(watcher.ask("POST", "/events", &[], &large).code, code);
    }
    for number in 0..3 {
        hook(&stage, input("Stop", json!({"message": "y".repeat(200_000), "prompt_id": number.to_string()})));
    }
    assert_eq!(watcher.ask("POST", "/hook/stop", &[], &input("Stop", json!({"prompt_id": "3"}))).code, 200);
    wait_until("the queue is full", SOON, || watcher.health()["queue"]["full"] == true);
    assert!(spooled(&stage) > 0);
    watcher.stop();
    stage.database = Some(crate::stage::Database::new());
    stage.run_until_idle();
    let ids: Vec<Value> = payloads(&stage).iter().map(|payload| payload["prompt_id"].clone()).collect();
    assert_eq!(ids, ["0", "1", "2", "3"]);
    assert_eq!(spooled(&stage), 0);
}

#[test]
fn two_hundred_hooks_at_once_are_stored_once_each_though_the_watcher_is_killed_among_them() {
    let mut dice = Dice::new("hooks");
    let mut stage = Stage::new();
    stage.set("file_watcher.polling_interval", "0.5");
    let count = 200 * rounds(1) as usize;
    let mut expected = Vec::new();
    for first in (0..count).step_by(200) {
        let mut watcher = Some(stage.start());
        let mut children = Vec::new();
        for number in first..first + 200 {
            let mut child = begin(&stage, &["hook"]);
            let text = input("Stop", json!({"prompt_id": number.to_string()}));
            child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
            children.push(child);
            expected.push(number.to_string());
            if number == first + 100 {
                std::thread::sleep(Duration::from_millis(dice.below(100)));
                watcher.take().unwrap().kill();
            }
            if number == first + 150 {
                watcher = Some(stage.start_with(&[]));
            }
        }
        for child in children {
            let output = child.wait_with_output().unwrap();
            assert_eq!((output.status.code(), output.stdout.len(), output.stderr.len()), (Some(0), 0, 0));
        }
        wait_until("the spool is empty", SOON, || spooled(&stage) == 0);
        watcher.unwrap().kill();
    }
    stage.run_until_idle();
    let mut found: Vec<String> =
        payloads(&stage).iter().map(|payload| payload["prompt_id"].as_str().unwrap().to_owned()).collect();
    found.sort_by_key(|number| number.parse::<usize>().unwrap());
    assert_eq!(found, expected);
}

#[test]
fn a_hook_that_is_killed_leaves_its_event_whole_or_not_at_all() {
    let rounds = rounds(30);
    let mut dice = Dice::new("killed hooks");
    let stage = Stage::new();
    hook(&stage, input("Stop", json!({"prompt_id": "first"})));
    for number in 0..rounds {
        let mut child = begin(&stage, &["hook"]);
        let text = input("Stop", json!({"prompt_id": number.to_string()}));
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        std::thread::sleep(Duration::from_micros(dice.below(30_000)));
        let _ = child.kill();
        let _ = child.wait();
    }
    stage.run_until_idle();
    assert_eq!(stage.run(&["queue-dump", "--dead-letters"]).lines().len(), 0);
    let ids: Vec<String> =
        payloads(&stage).iter().map(|payload| payload["prompt_id"].as_str().unwrap().to_owned()).collect();
    assert!(ids.contains(&"first".to_owned()));
    let distinct: std::collections::HashSet<&String> = ids.iter().collect();
    assert_eq!(distinct.len(), ids.len());
    eprintln!("{} of {rounds} hooks had left their event before they were killed", ids.len() - 1);
}

#[test]
fn spool_and_queue_and_socket_are_for_their_owner_only_from_birth() {
    let stage = Stage::with(None);
    // A umask that would let everybody in.
    let run = |arguments: &str| {
        let mut command = stage.command(&[]);
        let program = command.get_program().to_owned();
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", &format!("umask 000; exec \"$0\" {arguments}")]).arg(program);
        shell.current_dir(stage.folder()).env_clear().env("HOME", stage.folder()).env("PATH", "/usr/bin:/bin");
        command = shell;
        command
    };
    let mut child = run("hook").stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input("Stop", json!({})).as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    assert_private(&stage.folder().join("data"));
    let mut watcher = run("run").stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("the socket is there", SOON, || stage.folder().join("data/watcher.sock").exists());
    assert_private(&stage.folder().join("data"));
    wait_until("the hook is taken in", SOON, || spooled(&stage) == 0);
    assert_private(&stage.folder().join("data"));
    signal(watcher.id(), "TERM");
    watcher.wait().unwrap();
}

/// Nothing in the folder, nor itself, is open to group or others.
#[track_caller]
fn assert_private(path: &Path) {
    let metadata = path.symlink_metadata().unwrap();
    let mode = metadata.permissions().mode() & 0o777;
    assert_eq!(mode & 0o077, 0, "{} has mode {mode:o}", path.display());
    if metadata.is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            // What is gone by now was taken in.
            if path.symlink_metadata().is_ok() {
                assert_private(&path);
            }
        }
    }
}
