//! From a line in a transcript to a row: what is captured, when, and what is not hurt by damage.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::stage::{SOON, Stage, Transcript, wait_until};

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
fn said(stage: &Stage) -> Vec<(String, String)> {
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
fn desktop_copy(original: &Transcript, copy: &mut Transcript) {
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
    let corpus = crate::stage::project().join("../shared/transcripts");
    if !corpus.exists() {
        eprintln!("skipped: no corpus of transcripts beside the checkout");
        return;
    }
    let stage = Stage::new();
    copy_folder(&corpus, &stage.projects());
    stage.run_until_idle();
    let count = |condition: &str| {
        stage.database().value(&format!("SELECT count(*) FROM events WHERE {condition}")).parse::<u32>().unwrap()
    };
    // By its table of counts: 121 prompts and 1 queued one, 399 texts of the agent, less those that stand in two files
    // and one line of model <synthetic>, which is no turn. Slash and shell commands are not in the table.
    assert_eq!(count("event_type = 'turn_detected' AND payload->>'actor' = 'agent'"), 376);
    assert_eq!(count("payload->>'kind' IN ('prompt', 'plan')"), 117);
    assert_eq!(count("payload->>'kind' = 'queued'"), 1);
    assert_eq!(count("payload->>'kind' = 'command'"), 23);
    assert_eq!(count("payload->>'kind' = 'shell'"), 5);
    assert_eq!(count("event_type = 'session_registered'"), 38);
    let before = stage.database().count();
    stage.run_until_idle();
    assert_eq!(stage.database().count(), before, "running again adds none");
}

fn copy_folder(from: &Path, to: &Path) {
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
