//! From a line in a transcript to a row: what is captured, when, and what is not hurt by damage.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::stage::{SOON, Stage, Transcript, corpora, wait_until};

#[test]
fn a_turn_becomes_a_row_with_its_session_registered_first() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("fix the login test");
    transcript.append(transcript.answer("I'll look at it.") + "\n");
    stage.run_until_idle();
    let rows = stage.database().query(
        "SELECT event_type, to_char(\"timestamp\" AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.MS'), payload FROM events ORDER BY id",
    );
    let column = |index: usize| rows.iter().map(|row| row[index].clone().unwrap()).collect::<Vec<_>>();
    assert_eq!(column(0), ["session_registered", "turn_detected", "turn_detected"]);
    assert_eq!(column(1), ["2026-01-02 03:04:05.678", "2026-01-02 03:04:05.678", "2026-01-02 03:04:06.789"]);
    let payloads: Vec<Value> = column(2).iter().map(|payload| serde_json::from_str(payload).unwrap()).collect();
    assert_eq!(payloads[0]["session_uuid"], transcript.session.as_str());
    assert_eq!(payloads[0]["working_directory"], "/home/me/app");
    assert_eq!(payloads[1]["actor"], "user");
    assert_eq!(payloads[1]["text"], "fix the login test");
    assert_eq!(payloads[1]["kind"], "prompt");
    assert_eq!(payloads[2]["actor"], "agent");
    assert_eq!(payloads[2]["text"], "I'll look at it.");
    assert_eq!(payloads[2]["is_final"], true);
    assert_eq!(payloads[2]["model"], "claude-opus-4-8");
}

#[test]
fn a_second_run_adds_nothing() {
    let stage = Stage::new();
    stage.transcript("-home-me-app", 1).say_many("line", 50);
    stage.run_until_idle();
    assert_eq!(stage.database().count(), 51);
    stage.run_until_idle();
    assert_eq!(stage.database().count(), 51);
}

#[test]
fn a_lost_queue_only_means_reading_again_and_stores_nothing_twice() {
    let stage = Stage::new();
    stage.transcript("-home-me-app", 1).say_many("line", 300);
    stage.run_until_idle();
    std::fs::remove_dir_all(stage.folder().join("data")).unwrap();
    stage.run_until_idle();
    assert_eq!(stage.database().count(), 301);
    let again = stage.database().value("SELECT count(*) FROM event_receipts WHERE seen_again_at IS NOT NULL");
    assert_eq!(again, "301");
}

#[test]
fn new_files_folders_and_lines_are_followed_while_it_runs() {
    let stage = Stage::new();
    let watcher = stage.start();
    let mut first = stage.transcript("-home-me-app", 1);
    first.say("one");
    stage.wait_for_rows(2);
    first.say("two");
    let mut second = stage.transcript("-home-me-other", 2);
    second.say("three");
    stage.wait_for_rows(5);
    let mut texts = stage.database().texts();
    texts.sort();
    assert_eq!(texts, ["one", "three", "two"]);
    assert_eq!(watcher.stop().0.code(), Some(0));
}

#[test]
fn the_rescan_finds_what_no_notification_announces() {
    // A file that grows under another name on the same inode: nothing below the watched folder is written to.
    let mut stage = Stage::new();
    stage.set("file_watcher.polling_interval", "0.2");
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    let elsewhere = stage.folder().join("elsewhere.jsonl");
    std::fs::hard_link(&transcript.path, &elsewhere).unwrap();
    let _watcher = stage.start();
    stage.wait_for_rows(2);
    let line = transcript.prompt("two");
    transcript.path = elsewhere;
    transcript.append(line + "\n");
    stage.wait_for_rows(3);
}

#[test]
fn an_unfinished_last_line_waits_for_its_end_and_garbage_hurts_nothing() {
    let stage = Stage::new();
    let watcher = stage.start();
    let mut transcript = stage.transcript("-home-me-app", 1);
    let line = transcript.prompt("split in two");
    let (head, tail) = line.split_at(line.len() / 2);
    transcript.say("before");
    transcript.append("garbage\n".to_owned() + head);
    wait_until("the bad line is counted", SOON, || watcher.health()["watcher"]["bad_lines"] == 1);
    stage.wait_for_rows(2);
    assert_eq!(stage.database().texts(), ["before"]);
    transcript.append(tail.to_owned() + "\n");
    stage.wait_for_rows(3);
    assert_eq!(stage.database().texts(), ["before", "split in two"]);
    let health = watcher.health();
    assert_eq!(health["watcher"]["bad_lines"], 1);
    assert_eq!(health["queue"]["dead_letters"], 1);
}

#[test]
fn lines_of_64_megabytes_and_of_a_hundred_thousand_levels_are_read_and_the_file_goes_on() {
    const LINE_BYTES_MAX: usize = 64 << 20;
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    let with_picture = |picture: &str| {
        let content = json!([{"type": "text", "text": "look"}, {"type": "image", "source": {"data": picture}}]);
        let mut line: Value = serde_json::from_str(&transcript.prompt("look")).unwrap();
        line["message"]["content"] = content;
        line.to_string()
    };
    let largest = with_picture(&"A".repeat(LINE_BYTES_MAX - with_picture("").len()));
    assert_eq!(largest.len(), LINE_BYTES_MAX);
    let larger = "x".repeat(LINE_BYTES_MAX + 1);
    let (open, close) = ("[".repeat(100_000), "]".repeat(100_000));
    let mut offsets = vec![largest.len() + 1];
    transcript.append(largest + "\n" + &larger + "\n");
    transcript.append(format!("{{\"type\":\"user\",\"deep\":{open}{close}}}\n"));
    offsets.push(std::fs::metadata(&transcript.path).unwrap().len() as usize);
    transcript.append(format!("{{\"type\":\"user\",\"deep\":{open}}}\n"));
    transcript.say("after");
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), ["look", "after"]);
    let letters = stage.run(&["queue-dump", "--dead-letters"]).lines();
    let found: Vec<u64> = letters.iter().map(|letter| letter["origin"]["offset"].as_u64().unwrap()).collect();
    assert_eq!(found, offsets.iter().map(|offset| *offset as u64).collect::<Vec<_>>(), "{letters:?}");
}

/// The turns in the order of the table: session and text.
pub fn said(stage: &Stage) -> Vec<(String, String)> {
    let sql = "SELECT payload->>'session_uuid', payload->>'text' FROM events
                WHERE event_type = 'turn_detected' ORDER BY id";
    let rows = stage.database().query(sql);
    rows.into_iter().map(|row| row.into_iter().map(Option::unwrap_or_default).collect()).map(pair).collect()
}

fn pair(row: Vec<String>) -> (String, String) {
    let [first, second] = row.try_into().unwrap();
    (first, second)
}

/// What the desktop app writes when it goes on with a session: its lines under another session's name, behind state that
/// is stamped later.
pub fn desktop_copy(original: &Transcript, copy: &mut Transcript) {
    copy.append(
        "{\"type\":\"queue-operation\",\"operation\":\"enqueue\",\"timestamp\":\"2026-01-03T10:00:00.000Z\"}\n",
    );
    let history = std::fs::read_to_string(&original.path).unwrap();
    copy.append(history.replace(&original.session, &copy.session));
}

#[test]
fn what_two_files_hold_is_stored_once_under_the_session_where_it_was_first_said() {
    let stage = Stage::new();
    // The copy's name comes first, by which files are found.
    let mut copy = stage.transcript("-home-me-app", 1);
    let mut original = stage.transcript("-home-me-app", 2);
    original.say("one");
    original.append(original.answer("two") + "\n");
    desktop_copy(&original, &mut copy);
    copy.say("three");
    stage.run_until_idle();
    let of = |transcript: &Transcript, text: &str| (transcript.session.clone(), text.to_owned());
    let expected = [of(&original, "one"), of(&original, "two"), of(&copy, "three")];
    assert_eq!(said(&stage), expected);

    // A fork by the SDK and a resume of old, which say themselves where their first lines were said: found alone, and
    // what they were made from afterwards.
    let mut fork = stage.transcript("-home-me-app", 3);
    let mut resumed = stage.transcript("-home-me-app", 4);
    let mut first = stage.transcript("-home-me-app", 5);
    let line: Value = serde_json::from_str(&first.prompt("four")).unwrap();
    let mut forked = line.clone();
    forked["forkedFrom"] = json!({"sessionId": first.session, "messageUuid": line["uuid"]});
    forked["uuid"] = "0f000000-0000-4000-8000-000000000001".into();
    forked["sessionId"] = fork.session.as_str().into();
    fork.append(forked.to_string() + "\n");
    resumed.append(first.prompt("five") + "\n");
    fork.say("six");
    resumed.say("seven");
    stage.run_until_idle();
    first.say("four");
    first.say("five");
    stage.run_until_idle();
    let mut found = said(&stage).split_off(3);
    found.sort();
    let mut expected = [of(&first, "four"), of(&first, "five"), of(&fork, "six"), of(&resumed, "seven")];
    expected.sort();
    assert_eq!(found, expected);
    let registered = "SELECT count(*) FROM events WHERE event_type = 'session_registered'";
    assert_eq!(stage.database().value(registered), "5");
}

#[test]
fn a_long_original_that_comes_together_with_its_copy_is_read_first() {
    let stage = Stage::new();
    let watcher = stage.start();
    let away = stage.folder().join("away");
    std::fs::create_dir(&away).unwrap();
    let placed = |mut transcript: Transcript| {
        transcript.path = away.join(transcript.path.file_name().unwrap());
        transcript
    };
    let mut copy = placed(stage.transcript("-home-me-app", 1));
    let mut original = placed(stage.transcript("-home-me-app", 2));
    // More than is read of one file before others have their turn.
    let result = "x".repeat(100_000);
    let noise = format!(
        "{{\"type\":\"user\",\"message\":{{\"content\":[{{\"type\":\"tool_result\",\"content\":\"{result}\"}}]}}}}\n"
    );
    original.say("early");
    original.append(noise.repeat(200));
    original.say("late");
    desktop_copy(&original, &mut copy);
    copy.say("new");
    std::fs::rename(&away, stage.projects().join("-home-me-app")).unwrap();
    stage.wait_for_rows(5);
    wait_until("both are read", SOON, || watcher.health()["watcher"]["lines"] == 2 * 202 + 2);
    let of = |transcript: &Transcript, text: &str| (transcript.session.clone(), text.to_owned());
    assert_eq!(said(&stage), [of(&original, "early"), of(&original, "late"), of(&copy, "new")]);
}

#[test]
fn every_kind_of_line_and_file_gives_its_turns_and_nothing_else() {
    let stage = Stage::new();
    let mut main = stage.transcript("-home-me-app", 1);
    let mut expected = Vec::new();
    let changed = |line: String, changes: Value| {
        let mut line: Value = serde_json::from_str(&line).unwrap();
        for (key, value) in changes.as_object().unwrap() {
            line[key] = value.clone();
        }
        line.to_string() + "\n"
    };
    let line = |text: &str, changes: Value| changed(main.prompt(text), changes);
    let answer = |text: &str, changes: Value| changed(main.answer(text), changes);
    let content = |content: Value| json!({"message": {"role": "user", "content": content}});
    let mut lines = String::new();
    // The oldest version: neither branch nor prompt id, no reason for stopping.
    lines += "{\"type\":\"summary\",\"summary\":\"of another session\",\"leafUuid\":\"x\"}\n";
    lines += &line("in 1.0.17", json!({"version": "1.0.17", "gitBranch": null}));
    lines += &answer(
        "in 1.0.17, too",
        json!({"version": "1.0.17", "message": {"id": "msg_0", "model": "m",
        "role": "assistant", "stop_reason": null, "content": [{"type": "text", "text": "in 1.0.17, too"}]}}),
    );
    expected.extend(["prompt in 1.0.17", "agent in 1.0.17, too"]);
    // What a human says in one way or another.
    lines += &line("c", content("<command-name>/model</command-name><command-args>best</command-args>".into()));
    lines += &line("s", content("<bash-input>ls</bash-input>".into()));
    lines += &line("p", json!({"planContent": "# Plan"}));
    lines += &line("i", content(json!([{"type": "image"}, {"type": "text", "text": "look"}])));
    lines += &line(
        "q",
        json!({"type": "attachment", "message": null, "attachment":
        {"type": "queued_command", "prompt": "meanwhile", "commandMode": "prompt", "origin": {"kind": "human"}}}),
    );
    lines += &line("today", json!({"version": "2.1.319", "origin": {"kind": "human"}, "promptId": "p", "news": {}}));
    expected.extend(["command /model best", "shell ls", "plan p", "prompt look", "queued meanwhile", "prompt today"]);
    // What nobody said.
    lines += &line("r", content(json!([{"type": "tool_result", "tool_use_id": "t", "content": "ok"}])));
    lines += &line("o", content("<local-command-stdout>done</local-command-stdout>".into()));
    lines += &line("x", content("[Request interrupted by user]".into()));
    for flag in ["isMeta", "isSidechain", "isVisibleInTranscriptOnly"] {
        lines += &line("no turn", json!({flag: true}));
    }
    for kind in ["task-notification", "peer", "channel", "something-new"] {
        lines += &line("no turn", json!({"origin": {"kind": kind}}));
    }
    lines += &line(
        "n",
        json!({"type": "attachment", "attachment":
        {"type": "queued_command", "prompt": "no turn", "commandMode": "task-notification"}}),
    );
    lines += &answer("API Error: 529", json!({"isApiErrorMessage": true}));
    lines +=
        &line("g", json!({"type": "progress", "data": {"message": {"type": "user", "message": {"content": "no"}}}}));
    lines += &line("d", json!({"type": "system", "subtype": "turn_duration", "durationMs": 7}));
    lines += "{\"type\":\"brand-new\",\"text\":\"no turn\"}\n{\"type\":\"brand-new\"}\n{\"no type\":1}\n";
    // Compaction: a new root, and a summary that nobody typed.
    lines += &line("b", json!({"type": "system", "subtype": "compact_boundary", "logicalParentUuid": "u"}));
    lines += &line("no turn", json!({"isCompactSummary": true, "isVisibleInTranscriptOnly": true}));
    // Rewinding: two children of one parent. What was taken back was said all the same.
    let parent = json!({"parentUuid": "1f000000-0000-4000-8000-000000000001"});
    lines += &line("taken back", parent.clone());
    lines += &line("said instead", parent);
    expected.extend(["prompt taken back", "prompt said instead"]);
    main.append(lines);

    // Sub-agents in the old place and in the new ones, one of them without its session; and what is no transcript.
    let project = stage.projects().join("-home-me-app");
    let below = |path: &str| {
        let path = project.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    };
    let theirs = main.prompt("a sub-agent's") + "\n" + &main.answer("a sub-agent's") + "\n";
    let orphan = stage.transcript("-", 9).session;
    for path in [
        "agent-41b9470d.jsonl".to_owned(),
        format!("{}/subagents/agent-a2018e5.jsonl", main.session),
        format!("{}/subagents/workflows/run/agent-a1.jsonl", main.session),
        format!("{orphan}/subagents/agent-aprompt_suggestion-05a4c2.jsonl"),
    ] {
        std::fs::write(below(&path), &theirs).unwrap();
    }
    let no_transcripts =
        ["subagents/workflows/run/journal.jsonl", "subagents/agent-a2018e5.meta.json", "tool-results/t.jsonl"];
    for path in no_transcripts.map(|path| format!("{}/{path}", main.session)) {
        std::fs::write(below(&path), "no JSON\n").unwrap();
    }
    std::fs::write(below(&format!("{orphan}.jsonl.orphaned-1")), &theirs).unwrap();
    stage.transcript("-home-me-app", 2).append("");
    stage.transcript("-home-me-app", 3).append("{\"type\":\"mode\",\"mode\":\"plan\"}\n");

    let watcher = stage.start();
    stage.wait_for_rows(expected.len() as u64 + 1);
    wait_until("all is read", SOON, || watcher.health()["watcher"]["files"] == 7);
    let sql = "SELECT coalesce(payload->>'kind', payload->>'actor') || ' ' || (payload->>'text') FROM events
                WHERE event_type = 'turn_detected' ORDER BY id";
    let found: Vec<_> = stage.database().query(sql).into_iter().flatten().flatten().collect();
    assert_eq!(found, expected);
    let others = "SELECT event_type, payload->>'session_uuid' FROM events WHERE event_type <> 'turn_detected'";
    let others: Vec<_> = stage.database().query(others).into_iter().flatten().flatten().collect();
    assert_eq!(others, ["session_registered", &main.session]);
    let health = watcher.health();
    assert_eq!((&health["watcher"]["bad_lines"], &health["queue"]["dead_letters"]), (&0.into(), &0.into()), "{health}");
    let page = watcher.get("/metrics").unwrap().1;
    for counted in ["{type=\"brand-new\"} 2\n", "{type=\"none\"} 1\n"] {
        assert!(page.contains(&format!("unknown_line_types_total{counted}")), "{counted}");
    }
}

#[test]
fn of_damaged_lines_what_is_whole_is_stored_and_the_rest_is_a_dead_letter_that_says_where_it_was() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    let record = |text: &str| {
        let line: Value = serde_json::from_str(&transcript.prompt(text)).unwrap();
        // As Claude Code orders its keys.
        let rest = line.to_string().replacen('{', "", 1).replace("\"parentUuid\":null,", "");
        format!("{{\"parentUuid\":null,{rest}").into_bytes()
    };
    let cut = &record("cut off")[..150];
    let mut file = Vec::new();
    let mut lost = Vec::new();
    let mut expected = Vec::new();
    let mut line = |pieces: &[&[u8]], texts: &[&str], lost_piece: Option<usize>| {
        for (index, piece) in pieces.iter().enumerate() {
            if lost_piece == Some(index) {
                lost.push((file.len() as u64, piece.to_vec()));
            }
            file.extend_from_slice(piece);
        }
        file.push(b'\n');
        expected.extend(texts.iter().map(|text| (*text).to_owned()));
    };
    line(&[&record("before")], &["before"], None);
    line(&[&record("two objects"), &record("on one line")], &["two objects", "on one line"], None);
    line(&[cut, &record("after a cut")], &["after a cut"], Some(0));
    line(&[cut], &[], Some(0));
    line(&[b"\0\0\0\0", &record("behind NULs"), b"\0\0"], &["behind NULs"], None);
    line(&[&[0; 4096]], &[], Some(0));
    line(
        &[&record("invalid UTF-8 X").iter().map(|b| if *b == b'X' { 0xff } else { *b }).collect::<Vec<_>>()],
        &["invalid UTF-8 \u{fffd}"],
        None,
    );
    line(
        &[String::from_utf8(record("lone HERE")).unwrap().replace("HERE", "\\ud83d").as_bytes()],
        &["lone \u{fffd}"],
        None,
    );
    line(
        &[String::from_utf8(record("nul HERE")).unwrap().replace("HERE", "\\u0000").as_bytes()],
        &["nul \u{fffd}"],
        None,
    );
    line(&[&record("the text \\u0000")], &["the text \\u0000"], None);
    line(
        &[record("said twice").strip_suffix(b"}").unwrap(), b",\"message\":{\"content\":\"the last one counts\"}}"],
        &["the last one counts"],
        None,
    );
    line(&[b"garbage"], &[], Some(0));
    line(&[&record("after")], &["after"], None);
    transcript.append(&file);
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), expected);
    let letters = stage.run(&["queue-dump", "--dead-letters", "--payload"]).lines();
    assert_eq!(letters.len(), lost.len(), "{letters:?}");
    for (letter, (offset, bytes)) in letters.iter().zip(&lost) {
        assert_eq!(letter["reason"], "unreadable");
        assert_eq!(letter["origin"]["path"], transcript.path.to_str().unwrap());
        assert_eq!(letter["origin"]["offset"], *offset, "{letter}");
        assert_eq!(letter["bytes"], bytes.len(), "{letter}");
        let message = letter["message"].as_str().unwrap();
        assert!(message.contains(&format!("from {} at byte {offset}", transcript.path.display())), "{message}");
    }
    let repaired = "SELECT count(*) FROM events WHERE payload->'metadata'->>'repaired' = 'true'";
    assert_eq!(stage.database().value(repaired), "4");
    // Once more from the start: nothing new.
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), expected);
}

#[test]
fn what_does_not_fit_the_schema_is_a_dead_letter_that_names_file_offset_and_field() {
    let mut stage = Stage::new();
    let schemas = stage.folder().join("schemas");
    std::fs::create_dir(&schemas).unwrap();
    // Prompts must be short here.
    let shipped = std::fs::read_to_string(crate::stage::project().join("schemas/turn_detected.json")).unwrap();
    let mut schema: Value = serde_json::from_str(&shipped).unwrap();
    schema["properties"]["text"]["maxLength"] = 5.into();
    std::fs::write(schemas.join("turn_detected.json"), schema.to_string()).unwrap();
    stage.set("schemas.path", schemas.to_str().unwrap());
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("short");
    let offset = std::fs::metadata(&transcript.path).unwrap().len();
    transcript.say("this secret is too long");
    transcript.say("again");
    let watcher = stage.start();
    stage.wait_for_rows(3);
    assert_eq!(stage.database().texts(), ["short", "again"]);
    let letters = stage.run(&["queue-dump", "--dead-letters"]).lines();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0]["reason"], "invalid");
    assert_eq!(letters[0]["origin"]["offset"], offset);
    assert_eq!(letters[0]["origin"]["path"], transcript.path.to_str().unwrap());
    assert!(letters[0]["message"].as_str().unwrap().contains("turn_detected: text: "), "{}", letters[0]);
    let warning = watcher.wait_for_log("an event was rejected");
    assert_eq!((&warning["level"], &warning["field"]), (&"WARN".into(), &"text".into()));
    assert_eq!(warning["offset"], offset);
    assert!(!watcher.log().contains("secret"), "payload text is in the log");
}

#[test]
fn text_is_kept_whole_and_what_postgres_cannot_store_is_mended_and_marked() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    let long = "long ".repeat(400_000);
    transcript.say(&long);
    transcript.say("literal \\u0000 and \\ud83d must survive");
    transcript.append(transcript.prompt("NUL-here").replace("NUL-here", "a\\u0000b\\ud83dc") + "\n");
    stage.run_until_idle();
    let texts = stage.database().texts();
    assert_eq!(texts[0], long);
    assert_eq!(texts[1], "literal \\u0000 and \\ud83d must survive");
    assert_eq!(texts[2], "a\u{fffd}b\u{fffd}c");
    let marked = "SELECT count(*) FROM events WHERE payload->'metadata'->>'repaired' = 'true'";
    assert_eq!(stage.database().value(marked), "1");
}

#[test]
fn a_last_line_without_newline_is_read_once_it_is_whole_and_its_file_quiet() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    transcript.append(transcript.prompt("two, and no newline"));
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), ["one", "two, and no newline"]);
    transcript.append("\n");
    transcript.say("three");
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), ["one", "two, and no newline", "three"]);
}

#[test]
fn a_line_is_a_row_within_a_second() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("warm up");
    let _watcher = stage.start();
    stage.wait_for_rows(2);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (client, connection) = tokio_postgres::connect(&stage.database().url, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        for number in 0..20 {
            let text = format!("line {number}");
            let begun = Instant::now();
            transcript.say(&text);
            let sql = format!("SELECT 1 FROM events WHERE payload->>'text' = '{text}'");
            while client.simple_query(&sql).await.unwrap().len() < 3 {
                assert!(begun.elapsed() < Duration::from_secs(1), "line {number} is no row after a second");
            }
        }
    });
}

#[test]
fn the_corpus_gives_each_turn_once() {
    for corpus in corpora() {
        let stage = Stage::new();
        copy_folder(&corpus, &stage.projects());
        stage.run_until_idle();
        // Each uuid once, however many files hold it.
        let turns = std::fs::read_to_string(corpus.join("TURNS.jsonl")).unwrap();
        let turns: Vec<Value> = turns.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let fields = ["turn_uuid", "actor", "kind", "provenance"];
        let expected: BTreeSet<[Option<String>; 4]> =
            turns.iter().map(|turn| fields.map(|field| turn[field].as_str().map(str::to_owned))).collect();
        let rows = stage.database().query(
            "SELECT payload->>'turn_uuid', payload->>'actor', payload->>'kind', payload->>'provenance' FROM events
              WHERE event_type = 'turn_detected'",
        );
        assert_eq!(rows.len(), expected.len());
        let rows: BTreeSet<[Option<String>; 4]> = rows.into_iter().map(|row| row.try_into().unwrap()).collect();
        assert_eq!(rows, expected);
        let sessions: BTreeSet<&str> = turns.iter().map(|turn| turn["file"].as_str().unwrap()).collect();
        let registered = "SELECT count(*) FROM events WHERE event_type = 'session_registered'";
        assert_eq!(stage.database().value(registered), sessions.len().to_string());
        let before = stage.database().count();
        stage.run_until_idle();
        assert_eq!(stage.database().count(), before, "running again adds none");
    }
}

pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
