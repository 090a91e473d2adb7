//! Events of other programs: `emit` and `POST /events`, through the watcher and without one.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::stage::{SOON, Stage, Watcher, lacks_proc, pause, resume, rounds, wait_until};

/// One event of each type with its required fields, as `POST /events` takes it.
fn each_type() -> [Value; 5] {
    let session = "11111111-2222-4333-8444-555555555555";
    [
        ("session_registered", json!({"session_uuid": session, "project_path": "/p", "working_directory": "/p"})),
        ("session_ended", json!({"session_uuid": session, "reason": "unregistered"})),
        (
            "turn_detected",
            json!({"session_uuid": session, "actor": "user", "text": "hi", "source": "hook",
                   "turn_timestamp": "2026-01-02T03:04:05Z"}),
        ),
        (
            "state_transition",
            json!({"agent_id": 1, "command_id": 2, "from_state": "a", "to_state": "b", "trigger": "manual"}),
        ),
        ("hook_received", json!({"hook_type": "Stop", "claude_session_id": session, "working_directory": "/p"})),
    ]
    .map(|(event_type, payload)| json!({"event_type": event_type, "payload": payload}))
}

/// A valid event whose payload bears this number.
fn numbered(number: usize) -> String {
    json!({"event_type": "session_ended",
           "payload": {"session_uuid": "s", "reason": "closed", "metadata": {"number": number}}})
    .to_string()
}

fn stream(count: usize) -> String {
    let mut lines = String::new();
    for number in 0..count {
        let _ = writeln!(lines, "{}", numbered(number));
    }
    lines
}

fn types(stage: &Stage) -> Vec<String> {
    let rows = stage.database().query("SELECT event_type FROM events ORDER BY id");
    rows.into_iter().map(|mut row| row.remove(0).unwrap()).collect()
}

/// The numbers of [`numbered`] events in the order of the table.
fn numbers(stage: &Stage) -> Vec<usize> {
    let rows = stage.database().query("SELECT payload->'metadata'->>'number' FROM events ORDER BY id");
    rows.into_iter().map(|mut row| row.remove(0).unwrap().parse().unwrap()).collect()
}

/// The most memory that a process has had, in bytes.
fn peak_memory_bytes(watcher: &Watcher) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", watcher.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// What was refused was said to its caller, and to nobody else.
#[track_caller]
fn assert_told_alone(watcher: &Watcher) {
    let health = watcher.health();
    assert_eq!(health["queue"]["dead_letters"], 0);
    assert_eq!(health["reasons"].as_array().unwrap().len(), 1, "no database, and nothing else: {health}");
    assert_eq!(watcher.logged("rejected"), Vec::<Value>::new());
}

#[test]
fn all_five_types_are_emitted_one_by_one_and_as_a_stream_with_and_without_the_watcher() {
    let stage = Stage::new();
    let emit_all = || {
        for event in each_type() {
            let event_type = event["event_type"].as_str().unwrap();
            let options = ["emit", "--type", event_type, "--payload", &event["payload"].to_string(), "--agent-id", "7"];
            let ran = stage.run(&options);
            assert_eq!(ran.code(), 0, "{}", ran.error());
            assert_eq!(ran.output().trim().len(), 36, "the id is printed: {}", ran.output());
        }
        let lines: String = each_type().iter().map(|event| format!("{event}\n")).collect();
        let ran = stage.run_with_input(&["emit", "--ndjson"], lines);
        assert_eq!((ran.code(), ran.output().trim()), (0, "5 events accepted"), "{}", ran.error());
    };
    emit_all();
    let watcher = stage.start();
    emit_all();
    stage.wait_for_rows(20);
    let expected: Vec<String> = each_type().iter().map(|event| event["event_type"].as_str().unwrap().into()).collect();
    assert_eq!(types(&stage), [&expected[..], &expected, &expected, &expected].concat());
    assert_eq!(stage.database().value("SELECT count(*) FROM events WHERE agent_id = 7"), "10");
    watcher.stop();
}

#[test]
fn what_does_not_fit_is_65_with_line_and_field_and_nothing_of_it_is_accepted() {
    let stage = Stage::with(None);
    let refused = |stage: &Stage| {
        let field = stage.run(&["emit", "--type", "session_ended", "--payload", r#"{"session_uuid":"s"}"#]);
        assert_eq!(field.code(), 65);
        assert!(field.error().contains("reason: required field is missing"), "{}", field.error());
        let unknown = stage.run(&["emit", "--type", "session_endd", "--payload", "{}"]);
        assert_eq!(unknown.code(), 65);
        assert!(unknown.error().contains("did you mean \"session_ended\""), "{}", unknown.error());
        let broken = stage.run_with_input(&["emit", "--type", "session_ended", "--payload", "-"], "{\"a\":");
        assert_eq!(broken.code(), 65);
        assert!(broken.error().contains("payload: not valid JSON"), "{}", broken.error());
        let time = stage.run(&["emit", "--type", "session_ended", "--payload", "{}", "--timestamp", "noon"]);
        assert_eq!(time.code(), 65);
        assert!(time.error().contains("timestamp: expected a time"), "{}", time.error());
        for many in [3, 20_000] {
            let lines = stream(many) + &numbered(0).replace("closed", "tired") + "\n" + &stream(3);
            let ran = stage.run_with_input(&["emit", "--ndjson"], lines);
            assert_eq!(ran.code(), 65, "{}", ran.error());
            assert!(ran.error().contains(&format!("line {}: reason: ", many + 1)), "{}", ran.error());
            assert!(!ran.error().contains("tired"), "{}", ran.error());
        }
        assert_eq!(stage.run(&["emit"]).code(), 64);
    };
    refused(&stage);
    let watcher = stage.start();
    refused(&stage);
    assert_eq!(watcher.health()["queue"]["pending"], 0);
    assert_eq!(std::fs::read_dir(stage.folder().join("data/spool")).unwrap().count(), 0);
    assert_told_alone(&watcher);
}

#[test]
fn a_byte_order_mark_before_events_is_accepted_by_every_way_in() {
    let stage = Stage::new();
    let payload = "\u{feff}{\"session_uuid\": \"s\", \"reason\": \"closed\", \"metadata\": {\"number\": 1}}";
    let spread = format!("\u{feff}{}", numbered(2).replace(',', ",\n"));
    // Two files, one after the other.
    let lines = format!("\u{feff}{}\n{}\n\u{feff}{}\n", numbered(3), numbered(4), numbered(5));
    let emit = |arguments: &[&str], input: &str| {
        let ran = stage.run_with_input(&[&["emit"], arguments].concat(), input);
        assert_eq!(ran.code(), 0, "{arguments:?}: {}", ran.error());
    };
    let watcher = stage.start();
    emit(&["--type", "session_ended", "--payload", "-"], payload);
    let answer = watcher.ask("POST", "/events", &["Content-Type: application/json"], &spread);
    assert_eq!(answer.code, 202, "{answer:?}");
    emit(&["--ndjson"], &lines);
    stage.wait_for_rows(5);
    watcher.stop();
    emit(&["--ndjson"], &lines);
    stage.run_until_idle();
    let mut found = numbers(&stage);
    found.sort_unstable();
    assert_eq!(found, [1, 2, 3, 3, 4, 4, 5, 5]);
}

#[test]
fn the_same_event_again_is_stored_once() {
    let stage = Stage::new();
    let watcher = stage.start();
    let id = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee";
    let payload = r#"{"session_uuid":"s","reason":"closed"}"#;
    for _ in 0..2 {
        let ran = stage.run(&["emit", "--type", "session_ended", "--payload", payload, "--event-id", id]);
        assert_eq!((ran.code(), ran.output().trim()), (0, id), "{}", ran.error());
    }
    for key in ["my key", id] {
        let header = format!("Idempotency-Key: {key}");
        let first = watcher.ask("POST", "/events", &[&header], &stream(3));
        assert_eq!(first.code, 202, "{first:?}");
        assert_eq!(first.json(), watcher.ask("POST", "/events", &[&header], &stream(3)).json());
    }
    wait_until("all are delivered", SOON, || watcher.health()["queue"]["pending"] == 0);
    // The key that is an id names the event that was emitted above.
    assert_eq!(stage.database().count(), 1 + 3 + 2);
}

#[test]
fn a_long_request_is_taken_whole_in_little_memory_in_order_and_its_answer_names_every_event() {
    if lacks_proc() {
        return;
    }
    let count = 30_000;
    let stage = Stage::new();
    let watcher = stage.start();
    let before = peak_memory_bytes(&watcher);
    let answer = watcher.ask("POST", "/events", &["Content-Type: application/x-ndjson"], &stream(count));
    assert_eq!(answer.code, 202, "{answer:?}");
    let answer = answer.json();
    assert_eq!(answer["accepted"], count);
    let ids: std::collections::HashSet<&str> =
        answer["event_ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap()).collect();
    assert_eq!(ids.len(), count);
    wait_until("all are delivered", SOON, || stage.database().count() == count as u64);
    assert_eq!(numbers(&stage), (0..count).collect::<Vec<_>>());
    let grown = peak_memory_bytes(&watcher).saturating_sub(before);
    eprintln!("{count} events: {} kB of requests, {} kB more memory", stream(count).len() / 1000, grown / 1000);
    assert!(grown < 40_000_000, "{grown} bytes more");
}

#[test]
fn a_request_above_16_mib_is_413_and_nothing_of_it_is_accepted() {
    let stage = Stage::with(None);
    let watcher = stage.start();
    let fitting = stream(2) + &" ".repeat((16 << 20) - stream(2).len());
    assert_eq!(watcher.ask("POST", "/events", &[], &fitting).code, 202);
    let answer = watcher.ask("POST", "/events", &[], &(fitting + " "));
    assert_eq!(answer.code, 413, "{answer:?}");
    assert!(answer.body.contains("at most 16777216 bytes"), "{answer:?}");
    assert_eq!(watcher.health()["queue"]["pending"], 2);
}

#[test]
fn a_long_stream_that_was_accepted_survives_kill_9_and_one_that_was_not_leaves_nothing() {
    let mut stage = Stage::new();
    let count = 6000;
    let ran = stage.run_with_input(&["emit", "--ndjson"], stream(count));
    assert_eq!(ran.code(), 0, "{}", ran.error());
    // Dies once a part of the stream is in the queue, and again after the next part.
    for nth in [2, 5] {
        stage.environment.insert("HEADSPACE_FAULT_POINT".to_owned(), format!("commit-synced:{nth}"));
        stage.start_with(&[]).wait();
    }
    stage.environment.remove("HEADSPACE_FAULT_POINT");
    let watcher = stage.start();
    // Half a request, then the end of its sender.
    {
        use std::io::Write;
        let mut stream_of_one =
            std::os::unix::net::UnixStream::connect(stage.folder().join("data/watcher.sock")).unwrap();
        let body = stream(count);
        write!(stream_of_one, "POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", body.len())
            .unwrap();
        stream_of_one.write_all(&body.as_bytes()[..body.len() - 10]).unwrap();
    }
    stage.wait_for_rows(count as u64);
    wait_until("the spool is empty", SOON, || {
        std::fs::read_dir(stage.folder().join("data/spool")).unwrap().count() == 0
    });
    wait_until("all are delivered", SOON, || watcher.health()["queue"]["pending"] == 0);
    let mut numbers = numbers(&stage);
    numbers.sort_unstable();
    assert_eq!(numbers, (0..count).collect::<Vec<_>>());
}

#[test]
fn a_long_request_that_is_killed_before_its_answer_leaves_nothing() {
    let mut stage = Stage::with(None);
    stage.environment.insert("HEADSPACE_FAULT_POINT".to_owned(), "append-between-parts:1".to_owned());
    let mut watcher = stage.start();
    assert_eq!(watcher.poster().post("/events", &stream(6000)), None);
    watcher.wait();
    stage.environment.remove("HEADSPACE_FAULT_POINT");
    let watcher = stage.start();
    assert_eq!(watcher.health()["queue"]["pending"], 0);
    assert_eq!(std::fs::read_dir(stage.folder().join("data/spool")).unwrap().count(), 0);
}

#[test]
fn a_full_queue_is_503_and_a_full_spool_is_74() {
    let mut stage = Stage::with(None);
    stage.set("queue.max_pending_bytes", "1048576").set("event_system.max_event_bytes", "1024");
    let watcher = stage.start();
    let full = watcher.ask("POST", "/events", &[], &stream(40_000));
    assert_eq!(full.code, 413, "{}", full.body);
    let mut code = 202;
    for _ in 0..20 {
        let answer = watcher.ask("POST", "/events", &[], &stream(1000));
        code = answer.code;
        if code != 202 {
            assert!(answer.head.contains("retry-after: "), "{answer:?}");
            break;
        }
    }
    assert_eq!(code, 503);
    // The spool is a buffer in front of the queue, as large as that.
    assert_eq!(stage.run_with_input(&["emit", "--ndjson"], stream(2000)).code(), 0);
    let ran = stage.run_with_input(&["emit", "--ndjson"], stream(8000));
    assert_eq!(ran.code(), 74, "{}", ran.error());
    assert!(ran.error().contains("is full") && ran.error().contains("start the watcher"), "{}", ran.error());
}

#[test]
fn emit_needs_no_watcher_that_answers() {
    let stage = Stage::with(None);
    let watcher = stage.start();
    pause(watcher.pid());
    let ran = stage.run(&["emit", "--type", "session_ended", "--payload", r#"{"session_uuid":"s","reason":"closed"}"#]);
    assert_eq!(ran.code(), 0, "{}", ran.error());
    resume(watcher.pid());
    wait_until("it is taken in", SOON, || watcher.health()["queue"]["pending"] == 1);
}

#[test]
fn an_emit_whose_input_stays_open_delays_no_watcher_which_takes_its_events_later() {
    let stage = Stage::with(None);
    let mut command = stage.command(&["emit", "--ndjson"]);
    let mut emit = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = emit.stdin.take().unwrap();
    // More than it keeps in memory: so it is writing to the spool when the watcher starts.
    input.write_all(stream(20_000).as_bytes()).unwrap();
    let spool = stage.folder().join("data/spool");
    wait_until("it writes", SOON, || std::fs::read_dir(&spool).is_ok_and(|files| files.count() > 0));
    let watcher = stage.start();
    assert_eq!(watcher.logged("waiting").len(), 0, "{}", watcher.log());
    assert_eq!(watcher.ask("POST", "/events", &[], &numbered(0)).code, 202);
    assert_eq!(watcher.health()["queue"]["pending"], 1, "nothing of it is accepted before its end");
    drop(input);
    assert_eq!(emit.wait_with_output().unwrap().stdout, b"20000 events accepted\n");
    wait_until("all are taken in", SOON, || watcher.health()["queue"]["pending"] == 20_001);
}

#[test]
fn an_idempotency_key_with_another_body_is_409_and_nothing_of_it_is_accepted() {
    let stage = Stage::with(None);
    let watcher = stage.start();
    let key = &["Idempotency-Key: order 7"];
    let first = watcher.ask("POST", "/events", key, &numbered(1));
    assert_eq!(first.code, 202);
    let again = watcher.ask("POST", "/events", key, &numbered(1));
    assert_eq!((again.code, &again.body), (202, &first.body), "the same request again");
    for body in [numbered(2), stream(2), stream(20_000)] {
        let other = watcher.ask("POST", "/events", key, &body);
        assert_eq!(other.code, 409, "{}", other.body);
        assert!(other.body.contains("Idempotency-Key"), "{}", other.body);
    }
    let hook = r#"{"session_id":"s","cwd":"/app","hook_event_name":"Stop"}"#;
    assert_eq!(watcher.ask("POST", "/hook/stop", key, hook).code, 409);
    // What is refused does not use up its key.
    let key = &["Idempotency-Key: order 8"];
    assert_eq!(watcher.ask("POST", "/events", key, "nonsense").code, 400);
    assert_eq!(watcher.ask("POST", "/events", key, &numbered(3)).code, 202);
    assert_eq!(std::fs::read_dir(stage.folder().join("data/spool")).map_or(0, |files| files.count()), 0);
}

#[test]
fn what_postgres_can_not_store_is_mended_and_marked() {
    let stage = Stage::new();
    let watcher = stage.start();
    let event = r#"{"event_type":"session_ended","payload":{"session_uuid":"a\u0000b\ud83d","reason":"closed",
        "metadata":{"literal":"\\u0000","deep":["\ude00"]}}}"#;
    assert_eq!(watcher.ask("POST", "/events", &[], event).code, 202);
    stage.wait_for_rows(1);
    let payload: Value = serde_json::from_str(&stage.database().value("SELECT payload FROM events")).unwrap();
    assert_eq!(
        payload,
        json!({"session_uuid": "a\u{fffd}b\u{fffd}", "reason": "closed",
               "metadata": {"literal": "\\u0000", "deep": ["\u{fffd}"], "repaired": true}})
    );
}

#[test]
fn a_bad_request_is_400_with_line_and_field_and_nothing_of_it_is_accepted() {
    let stage = Stage::with(None);
    let watcher = stage.start();
    let bad = numbered(0).replace("closed", "tired");
    let mut with_surprise: Value = serde_json::from_str(&numbered(0)).unwrap();
    with_surprise["surprise"] = 1.into();
    for (body, line, field) in [
        (bad.clone(), 1, "reason"),
        (stream(2) + &bad + "\n" + &stream(2), 3, "reason"),
        (stream(20_000) + &bad + "\n" + &stream(2), 20_001, "reason"),
        (stream(1) + &with_surprise.to_string(), 2, "surprise"),
        (stream(1) + "nonsense\n", 2, ""),
    ] {
        let answer = watcher.ask("POST", "/events", &[], &body);
        assert_eq!(answer.code, 400, "{answer:?}");
        let answer = answer.json();
        assert_eq!((&answer["line"], answer["field"].as_str().unwrap_or_default()), (&line.into(), field), "{answer}");
        let problem = answer["error"].as_str().unwrap();
        assert!(!problem.is_empty() && !problem.contains("tired"), "{problem}");
    }
    let unknown = watcher.ask("POST", "/events", &[], r#"{"event_type":"zebra","payload":{}}"#);
    assert!(unknown.body.contains("unknown event type; there are hook_received, "), "{unknown:?}");
    let broken_off = watcher.ask("POST", "/events", &["Idempotency-Key: "], &numbered(0));
    assert_eq!(broken_off.code, 400, "{broken_off:?}");
    assert_told_alone(&watcher);
    assert_eq!(watcher.health()["queue"]["pending"], 0);
    assert_eq!(std::fs::read_dir(stage.folder().join("data/spool")).unwrap().count(), 0);
}

#[test]
fn whatever_an_event_says_about_itself_is_in_its_row_by_every_way_in() {
    let mut stage = Stage::new();
    let ids = ["0e000000-0000-4000-8000-000000000001", "0e000000-0000-4000-8000-000000000002"];
    let time = "2026-01-02T03:04:05.678901Z";
    let payload = r#"{"session_uuid":"s","reason":"closed"}"#;
    let told = ["--project-id", "1", "--agent-id", "2", "--command-id", "3", "--turn-id", "4", "--timestamp", time];
    let emit = |stage: &Stage, id: &str| {
        let arguments =
            [&["emit", "--type", "session_ended", "--payload", payload, "--event-id", id], &told[..]].concat();
        let ran = stage.run(&arguments);
        assert_eq!((ran.code(), ran.output().trim()), (0, id), "{}", ran.error());
    };
    emit(&stage, ids[0]);
    stage.set("file_watcher.polling_interval", "0.2");
    let watcher = stage.start();
    emit(&stage, ids[1]);
    // Two ways in have no order among them.
    wait_until("the first two are delivered", SOON, || watcher.has_settled(2));
    let mut event = json!({"event_type": "session_ended", "timestamp": time, "project_id": 1, "agent_id": 2,
                           "command_id": 3, "turn_id": 4});
    event["payload"] = serde_json::from_str(payload).unwrap();
    let posted = ["0e000000-0000-4000-8000-000000000003", "0e000000-0000-4000-8000-000000000004"];
    let lines: String = posted
        .iter()
        .map(|id| {
            event["event_id"] = (*id).into();
            format!("{event}\n")
        })
        .collect();
    let answer = watcher.ask("POST", "/events", &[], &lines);
    assert_eq!((answer.code, &answer.json()["event_ids"]), (202, &json!(posted)));
    // Once more, as a stream: known already.
    assert_eq!(stage.run_with_input(&["emit", "--ndjson"], lines).code(), 0);
    wait_until("all are delivered", SOON, || watcher.has_settled(6));
    let sql = "SELECT r.event_id, to_char(\"timestamp\" AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US'),
                      project_id, agent_id, command_id, turn_id, payload
                 FROM events e JOIN event_receipts r ON r.row_id = e.id ORDER BY e.id";
    let rows = stage.database().query(sql);
    let expected: Vec<Vec<Option<String>>> = ids
        .iter()
        .chain(&posted)
        .map(|id| [*id, "2026-01-02 03:04:05.678901", "1", "2", "3", "4"].map(|text| Some(text.to_owned())).to_vec())
        .collect();
    let found: Vec<Vec<Option<String>>> = rows.into_iter().map(|mut row| row.drain(..6).collect()).collect();
    assert_eq!(found, expected);
    assert_eq!(stage.database().count(), 4);
}

#[test]
fn no_answer_says_accepted_before_the_event_is_durable() {
    for point in ["commit-before-apply:1", "commit-applied:1"] {
        let mut stage = Stage::with(None);
        stage.environment.insert("HEADSPACE_FAULT_POINT".to_owned(), point.to_owned());
        let mut watcher = stage.start();
        assert_eq!(watcher.poster().post("/events", &numbered(1)), None, "{point}");
        watcher.wait();
        // What the command was told is accepted is in the spool, whatever becomes of the watcher.
        let mut watcher = stage.start();
        let payload = r#"{"session_uuid":"s","reason":"closed"}"#;
        let ran = stage.run(&["emit", "--type", "session_ended", "--payload", payload]);
        assert_eq!(ran.code(), 0, "{point}: {}", ran.error());
        watcher.wait();
        stage.environment.remove("HEADSPACE_FAULT_POINT");
        let watcher = stage.start();
        let id = ran.output();
        wait_until("it is taken in", SOON, || {
            watcher.get("/queue").is_some_and(|(_, lines)| lines.contains(id.trim()))
        });
    }
}

/// Peak of the memory that a process has of its own while it runs on this input, in kilobytes; and what it said.
fn peak_kilobytes(
    stage: &Stage,
    arguments: &[&str],
    input: impl Fn(&mut dyn std::io::Write) + Send + 'static,
) -> (u64, String) {
    use std::io::{BufWriter, Read};
    use std::process::Stdio;
    let mut command = stage.command(arguments);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let stdin = child.stdin.take().unwrap();
    let feeding = std::thread::spawn(move || input(&mut BufWriter::new(stdin)));
    let mut peak = 0;
    let status = loop {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let own = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let own = own.and_then(|own| own.trim().trim_end_matches(" kB").parse().ok());
        peak = peak.max(own.unwrap_or(0));
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    };
    feeding.join().unwrap();
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(status.success(), "{status}: {said}");
    assert!(peak > 0, "its memory was never seen");
    (peak, said)
}

#[test]
fn emit_takes_a_long_stream_in_little_memory_with_and_without_the_watcher() {
    if lacks_proc() {
        return;
    }
    let count = rounds(1).max(1) as usize * 30_000;
    let stage = Stage::with(None);
    let emit = |stage: &Stage| {
        let (peak, said) = peak_kilobytes(stage, &["emit", "--ndjson"], move |stdin| {
            for number in 0..count {
                writeln!(stdin, "{}", numbered(number)).unwrap();
            }
        });
        assert_eq!(said.trim(), format!("{count} events accepted"));
        peak
    };
    let alone = emit(&stage);
    let watcher = stage.start();
    wait_until("all are taken in", SOON * rounds(1).max(1), || watcher.health()["queue"]["pending"] == count);
    let before = peak_memory_bytes(&watcher);
    let through = emit(&stage);
    wait_until("all are taken in", SOON * rounds(1).max(1), || watcher.health()["queue"]["pending"] == 2 * count);
    let grown = peak_memory_bytes(&watcher).saturating_sub(before) / 1000;
    eprintln!("{count} events: emit alone {alone} kB, beside the watcher {through} kB, the watcher {grown} kB more");
    assert!(alone < 20_000 && through < 20_000 && grown < 60_000);
}

#[test]
fn a_stream_whose_source_breaks_off_is_not_accepted_in_part() {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::OwnedFd;
    let stage = Stage::with(None);
    let emit_what_breaks_off = |stage: &Stage| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut source = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut stdin = listener.accept().unwrap().0;
        let mut command = stage.command(&["emit", "--ndjson"]);
        command.stdin(OwnedFd::from(stdin.try_clone().unwrap()));
        let child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
        source.write_all(stream(3).as_bytes()).unwrap();
        // Who closes with something unread resets the connection: whoever reads gets an error, not an end.
        stdin.write_all(b"unread").unwrap();
        wait_until("it has come", SOON, || source.peek(&mut [0]).unwrap() == 1);
        drop(source);
        let ended = child.wait_with_output().unwrap();
        let error = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(74), "{error}");
        assert!(error.contains("could not read events from stdin"), "{error}");
    };
    emit_what_breaks_off(&stage);
    let watcher = stage.start();
    emit_what_breaks_off(&stage);
    watcher.stop();
    assert_eq!(stage.run(&["queue-dump"]).lines(), Vec::<Value>::new());
}
