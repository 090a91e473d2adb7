//! `verify`: each turn on disk is proved to be somewhere, whatever moves meanwhile; what is missing is named and sent
//! again. And the warning before Claude Code deletes what is not stored.

use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::stage::{Database, Dice, Ran, SOON, Server, Stage, Writer, corpora, lacks, rounds, wait_until};

/// `verify --json` with further arguments: exit code and object.
#[track_caller]
fn verify(stage: &Stage, arguments: &[&str]) -> (i32, Value) {
    let ran = stage.run(&[&["verify", "--json"], arguments].concat());
    (ran.code(), json(&ran))
}

#[track_caller]
fn json(ran: &Ran) -> Value {
    serde_json::from_str(&ran.output()).unwrap_or_else(|error| panic!("{error}: {} {}", ran.output(), ran.error()))
}

/// Turns by where they are, of those that are not 0.
fn turns(report: &Value) -> Vec<(String, u64)> {
    counts(report, "turns")
}

fn counts(report: &Value, what: &str) -> Vec<(String, u64)> {
    let counts = report[what].as_object().unwrap_or_else(|| panic!("{report}"));
    let mut counts: Vec<_> = counts
        .iter()
        .filter_map(|(name, count)| Some((name.clone(), count.as_u64().filter(|count| *count > 0)?)))
        .collect();
    counts.sort();
    counts
}

fn expected(counts: &[(&str, u64)]) -> Vec<(String, u64)> {
    let mut counts: Vec<_> = counts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
    counts.sort();
    counts
}

/// What is missing: path and offset.
fn missing(report: &Value) -> Vec<(String, u64)> {
    let mut lines: Vec<_> = report["missing"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| (line["path"].as_str().unwrap().to_owned(), line["offset"].as_u64().unwrap()))
        .collect();
    lines.sort();
    lines
}

/// Ten turns in two transcripts, all delivered. Gives path and offset of each turn.
fn delivered() -> (Stage, Vec<(String, u64)>) {
    let stage = Stage::new();
    let mut places = Vec::new();
    for number in 1..=2 {
        let mut transcript = stage.transcript("-home-me-app", number);
        let mut offset = 0;
        for turn in 0..5 {
            places.push((transcript.path.to_str().unwrap().to_owned(), offset));
            transcript.say(&format!("turn {number} {turn}"));
            offset = std::fs::metadata(&transcript.path).unwrap().len();
        }
    }
    stage.run_until_idle();
    (stage, places)
}

/// Each text once, whatever its order.
#[track_caller]
fn assert_once(database: &Database) {
    let mut texts = database.texts();
    texts.sort();
    let all: Vec<String> = (1..=2).flat_map(|number| (0..5).map(move |turn| format!("turn {number} {turn}"))).collect();
    assert_eq!(texts, all);
}

#[test]
fn everything_on_disk_is_proved_to_be_stored_and_each_turn_counts_once() {
    let (stage, _) = delivered();
    // A fork: the same lines in another session's file, and one of its own.
    let original = stage.transcript("-home-me-app", 1);
    let mut fork = stage.transcript("-home-me-app", 3);
    fork.append(std::fs::read(&original.path).unwrap());
    fork.say("said in the fork");
    // A sub-agent's prompts are no turns.
    let agent = stage.projects().join("-home-me-app/agent-0123.jsonl");
    std::fs::write(agent, original.prompt("written by the agent") + "\n").unwrap();
    stage.run_until_idle();
    let (code, report) = verify(&stage, &[]);
    assert_eq!(turns(&report), expected(&[("on_disk", 11), ("in_postgres", 11)]));
    assert_eq!(counts(&report, "sessions"), expected(&[("on_disk", 3), ("in_postgres", 3)]));
    assert_eq!((&report["transcripts"], &report["sub_agent_transcripts"]), (&3.into(), &1.into()));
    assert_eq!((code, missing(&report)), (0, vec![]));

    let shown = stage.run(&["verify"]);
    assert_eq!(shown.code(), 0, "{}", shown.error());
    let line = |name: &str| shown.output().lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert_eq!(line("in Postgres").split_whitespace().collect::<Vec<_>>(), ["in", "Postgres", "11", "3"]);
    assert_eq!(line("missing").split_whitespace().collect::<Vec<_>>(), ["missing", "0", "0"]);
    assert!(!stage.run(&["verify"]).error().contains("reading"), "no bar without a terminal");
}

#[test]
fn the_object_has_these_fields_for_good() {
    let (stage, places) = delivered();
    stage.database().query("DELETE FROM events WHERE payload->>'text' = 'turn 1 3'");
    let (_, report) = verify(&stage, &[]);
    let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
    assert_eq!(
        names(&report),
        "conflicting error expiring incomplete missing missing_folders sessions sub_agent_transcripts transcripts turns \
         unreadable user_lines_no_turns"
    );
    let all =
        "dead_letters in_postgres in_queue missing not_yet_read on_disk removed sent_again unproven without_receipt";
    assert_eq!((names(&report["turns"]), names(&report["sessions"])), (all.to_owned(), all.to_owned()));
    let line = &report["missing"][0];
    assert_eq!(names(line), "event_id event_type offset path reason sent_again session_uuid");
    assert_eq!((line["path"].as_str().unwrap(), line["offset"].as_u64().unwrap()), (&*places[3].0, places[3].1));
    assert_eq!(line["session_uuid"], stage.transcript("-home-me-app", 1).session);
    let receipt = stage
        .database()
        .value("SELECT event_id FROM event_receipts r WHERE NOT EXISTS (SELECT FROM events e WHERE e.id = r.row_id)");
    assert_eq!(line["event_id"], receipt);
}

/// Deletes some turns and a registration; they are named exactly, sent again once, and then nothing is missing.
fn what_was_deleted_is_named_and_put_back(stage: &Stage, places: &[(String, u64)], with_receipts: bool) {
    let database = stage.database();
    let sql = "DELETE FROM events WHERE payload->>'text' IN ('turn 1 1', 'turn 2 0', 'turn 2 4')
                  OR event_type = 'session_registered' AND payload->>'session_uuid' LIKE '00000002%' RETURNING id";
    let ids: Vec<String> = database.query(sql).into_iter().map(|mut row| row.remove(0).unwrap()).collect();
    assert_eq!(ids.len(), 4);
    if with_receipts {
        database.query(&format!("DELETE FROM event_receipts WHERE row_id IN ({})", ids.join(",")));
    }
    let (code, report) = verify(stage, &[]);
    assert_eq!(code, 1);
    assert_eq!(turns(&report), expected(&[("on_disk", 10), ("in_postgres", 7), ("missing", 3)]));
    assert_eq!(counts(&report, "sessions"), expected(&[("on_disk", 2), ("in_postgres", 1), ("missing", 1)]));
    let mut gone = vec![places[1].clone(), places[5].clone(), places[5].clone(), places[9].clone()];
    gone.sort();
    assert_eq!(missing(&report), gone);
    let reason = if with_receipts { "no_receipt" } else { "no_row" };
    assert!(report["missing"].as_array().unwrap().iter().all(|line| line["reason"] == reason), "{report}");
    let shown = stage.run(&["verify", "--wide"]);
    assert_eq!(shown.code(), 1);
    for (path, offset) in &gone {
        let of_file = shown.output().split(&format!("missing in {path}:\n")).nth(1).unwrap_or_default().to_owned();
        let of_file = of_file.split("\n\n").next().unwrap();
        assert!(
            of_file.lines().any(|line| line.trim_start().starts_with(&format!("{offset}  "))),
            "{}",
            shown.output()
        );
    }

    let (code, report) = verify(stage, &["--repair"]);
    assert_eq!(code, 0, "{report}");
    assert_eq!(counts(&report, "turns").iter().find(|(name, _)| name == "sent_again").unwrap().1, 3);
    assert_eq!(missing(&report), gone);
}

#[test]
fn deleted_rows_are_named_exactly_and_put_back_once_through_the_watcher() {
    let (stage, places) = delivered();
    let watcher = stage.start();
    what_was_deleted_is_named_and_put_back(&stage, &places, false);
    wait_until("they are back", SOON, || stage.database().count() == 12);
    assert_once(stage.database());
    wait_until("nothing is missing", SOON, || verify(&stage, &[]).1["turns"]["in_postgres"] == 10);
    // Sent again it is from the same place in the same transcript.
    let place = "SELECT s.path || ' ' || r.byte_offset FROM event_receipts r JOIN event_sources s ON s.id = r.source_id
                   JOIN events e ON e.id = r.row_id WHERE e.payload->>'text' = 'turn 2 4'";
    assert_eq!(stage.database().value(place), format!("{} {}", places[9].0, places[9].1));
    let (code, report) = verify(&stage, &["--repair"]);
    assert_eq!((code, missing(&report)), (0, vec![]));
    assert!(watcher.has_settled(0));
    assert_eq!(stage.database().count(), 12, "repairing what is whole changes nothing");
}

#[test]
fn repairing_comes_to_an_end_also_where_a_trigger_drops_rows_and_says_so() {
    let (stage, _) = delivered();
    let watcher = stage.start();
    stage.database().query(
        "CREATE FUNCTION filter() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
         CREATE TRIGGER filter BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION filter();
         DELETE FROM events WHERE payload->>'text' = 'turn 1 1'",
    );
    let ran = stage.run(&["verify", "--json", "--repair"]);
    assert_eq!(ran.code(), 0, "{}", ran.error());
    assert!(ran.error().contains("note: triggers run before a row is inserted: filter"), "{}", ran.error());
    assert_eq!(json(&ran)["turns"]["sent_again"], 1);
    wait_until("health names it", SOON, || {
        watcher.health()["database"]["last_error"].as_str().is_some_and(|error| error.contains("drops rows"))
    });
    for _ in 0..2 {
        let (code, report) = verify(&stage, &["--repair"]);
        assert_eq!((code, turns(&report)), (0, expected(&[("on_disk", 10), ("in_postgres", 9), ("in_queue", 1)])));
    }
    stage.database().query("DROP TRIGGER filter ON events");
    wait_until("it is back", SOON, || stage.database().count() == 12);
    assert_once(stage.database());
}

/// Lines of all files in the spool.
fn spooled(stage: &Stage) -> usize {
    let files = std::fs::read_dir(stage.folder().join("data/spool")).into_iter().flatten();
    files.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap().lines().count()).sum()
}

#[test]
fn deleted_rows_are_left_in_the_spool_when_no_watcher_runs() {
    let (stage, places) = delivered();
    what_was_deleted_is_named_and_put_back(&stage, &places, false);
    assert_eq!(spooled(&stage), 4);
    let (code, report) = verify(&stage, &["--repair"]);
    assert_eq!(code, 0);
    assert_eq!(turns(&report), expected(&[("on_disk", 10), ("in_postgres", 7), ("in_queue", 3)]));
    assert_eq!(spooled(&stage), 4, "what waits is not sent once more");
    stage.run_until_idle();
    assert_eq!(spooled(&stage), 0);
    assert_once(stage.database());
    assert_eq!(verify(&stage, &[]).0, 0);
}

#[test]
fn rows_that_were_deleted_with_their_receipts_are_put_back_once() {
    let (stage, places) = delivered();
    what_was_deleted_is_named_and_put_back(&stage, &places, true);
    stage.run_until_idle();
    assert_once(stage.database());
    assert_eq!(stage.database().count(), 12);
    assert_eq!(verify(&stage, &[]).0, 0);
}

#[test]
fn a_row_without_its_receipt_is_there_and_is_not_stored_a_second_time() {
    let (stage, _) = delivered();
    stage.database().query("DELETE FROM event_receipts");
    let (code, report) = verify(&stage, &["--repair"]);
    assert_eq!(code, 0, "{report}");
    assert_eq!(turns(&report), expected(&[("on_disk", 10), ("in_postgres", 10), ("without_receipt", 10)]));
    stage.run_until_idle();
    assert_eq!(stage.database().count(), 12);
    // As after a restore that gave new numbers: the receipts lead elsewhere, but the rows are there.
    let (stage, _) = delivered();
    stage.database().query("UPDATE events SET id = id + 1000");
    let (code, report) = verify(&stage, &["--repair"]);
    assert_eq!((code, report["turns"]["without_receipt"].as_u64()), (0, Some(10)), "{report}");
    assert_eq!(stage.database().count(), 12);
}

#[test]
fn a_receipt_that_leads_to_another_event_s_row_proves_nothing() {
    let (stage, _) = delivered();
    // The table was emptied and its numbers begin again: other events get them.
    stage.database().query("TRUNCATE events RESTART IDENTITY");
    let mut others = stage.transcript("-home-me-app", 3);
    others.say_many("another", 11);
    stage.run_until_idle();
    assert_eq!(stage.database().count(), 12);
    let (code, report) = verify(&stage, &["--repair"]);
    assert_eq!(code, 0);
    let expected_turns = [("on_disk", 21), ("in_postgres", 11), ("missing", 10), ("sent_again", 10)];
    assert_eq!(turns(&report), expected(&expected_turns));
    assert_eq!(report["missing"][0]["reason"], "other_row");
    stage.run_until_idle();
    let (code, report) = verify(&stage, &[]);
    assert_eq!(code, 0);
    assert_eq!(turns(&report), expected(&[("on_disk", 21), ("in_postgres", 21)]));
    assert_eq!(stage.database().count(), 24);
}

#[test]
fn what_was_removed_on_purpose_is_neither_missing_nor_sent_again() {
    let (stage, _) = delivered();
    stage.database().query(
        "WITH gone AS (DELETE FROM events WHERE payload->>'text' LIKE 'turn 1%' RETURNING id)
         UPDATE event_receipts SET row_id = 0 FROM gone WHERE row_id = gone.id",
    );
    let (code, report) = verify(&stage, &["--repair"]);
    assert_eq!(code, 0);
    assert_eq!(turns(&report), expected(&[("on_disk", 10), ("in_postgres", 5), ("removed", 5)]));
    // Rows of other times can be left out, for who prunes without saying so.
    stage.database().query("DELETE FROM events");
    let (code, report) = verify(&stage, &["--since", "1d"]);
    assert_eq!((code, turns(&report)), (0, vec![]), "the turns of the stage were said long ago");
    let (code, report) = verify(&stage, &["--since", "2026-01-02T03:04:05Z"]);
    assert_eq!((code, report["turns"]["missing"].as_u64()), (1, Some(5)));
    assert_eq!(stage.run(&["verify", "--since", "yesterday"]).code(), 64);
}

#[test]
fn rows_that_were_deleted_on_purpose_are_accepted_and_never_sent_again() {
    let (stage, _) = delivered();
    stage.database().query("DELETE FROM events WHERE payload->>'text' LIKE 'turn 1%'");
    assert_eq!(verify(&stage, &[]).0, 1);
    let (code, report) = verify(&stage, &["--accept-missing"]);
    let accepted = expected(&[("on_disk", 10), ("in_postgres", 5), ("removed", 5)]);
    assert_eq!((code, turns(&report)), (0, accepted.clone()), "{report}");
    for arguments in [&[][..], &["--repair"]] {
        let (code, report) = verify(&stage, arguments);
        assert_eq!((code, turns(&report)), (0, accepted.clone()), "{report}");
    }
    stage.run_until_idle();
    assert_eq!(stage.database().count(), 7);
    // Where the receipt is gone as well nothing can say so.
    stage.database().query("DELETE FROM event_receipts");
    let (code, report) = verify(&stage, &["--accept-missing"]);
    assert_eq!((code, report["turns"]["missing"].as_u64()), (1, Some(5)), "{report}");
    assert_eq!(stage.run(&["verify", "--repair", "--accept-missing"]).code(), 64);
}

#[test]
fn what_waits_and_what_was_set_aside_is_counted_where_it_is_with_and_without_a_watcher() {
    let stage = Stage::new();
    stage.refuse_curses();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("first");
    transcript.say("a curse");
    // Above max_event_bytes it is rejected: a dead letter without identity.
    transcript.say(&"long ".repeat(1000));
    let mut stage = stage;
    stage.set("event_system.max_event_bytes", "4096");
    stage.run_until_idle();
    let there = expected(&[("on_disk", 3), ("in_postgres", 1), ("dead_letters", 2)]);
    let (code, report) = verify(&stage, &[]);
    assert_eq!((code, turns(&report)), (0, there.clone()));
    let watcher = stage.start();
    let (code, report) = verify(&stage, &["--repair"]);
    assert_eq!((code, turns(&report)), (0, there));
    // What was dropped is nowhere any more.
    for line in stage.run(&["dead-letters", "list", "--format", "jsonl"]).lines() {
        assert_eq!(stage.run(&["dead-letters", "drop", &line["sequence"].to_string()]).code(), 0);
    }
    let (code, report) = verify(&stage, &[]);
    assert_eq!((code, report["turns"]["missing"].as_u64()), (1, Some(2)));
    stage.database().query("ALTER TABLE events DROP CONSTRAINT no_swearing");
    assert_eq!(verify(&stage, &["--repair"]).0, 0);
    wait_until("one is stored, the other set aside anew", SOON, || {
        let counted = turns(&verify(&stage, &[]).1);
        counted == expected(&[("on_disk", 3), ("in_postgres", 2), ("dead_letters", 1)])
    });
    drop(watcher);
}

#[test]
fn what_was_not_read_yet_is_not_missing() {
    let stage = Stage::new();
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say_many("line", 3);
    let (code, report) = verify(&stage, &["--repair"]);
    assert_eq!(code, 0, "there is no queue yet");
    assert_eq!(turns(&report), expected(&[("on_disk", 3), ("not_yet_read", 3)]));
    assert!(!stage.folder().join("data/queue").exists(), "looking makes nothing");
    stage.run_until_idle();
    transcript.say_many("more", 2);
    let (code, report) = verify(&stage, &[]);
    assert_eq!((code, turns(&report)), (0, expected(&[("on_disk", 5), ("in_postgres", 3), ("not_yet_read", 2)])));
    // A file in its place is another: the cursor says nothing of it.
    std::fs::remove_file(&transcript.path).unwrap();
    let mut other = stage.transcript("-home-me-app", 1);
    other.say_many("something else, and longer than before", 20);
    let (code, report) = verify(&stage, &[]);
    assert_eq!((code, turns(&report)), (0, expected(&[("on_disk", 20), ("not_yet_read", 20)])));
}

#[test]
fn without_the_database_it_says_what_it_can_and_that_nothing_is_proved() {
    let server = Server::start();
    let stage = Stage::with(Some(server.database.another()));
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say_many("stored", 4);
    stage.run_until_idle();
    server.stop("fast");
    let watcher = stage.start();
    transcript.say_many("waits", 2);
    wait_until("they wait", SOON, || watcher.health()["queue"]["pending"] == 2);
    for watcher in [Some(watcher), None] {
        let ran = stage.run(&["verify", "--json", "--repair"]);
        assert_eq!(ran.code(), 69);
        assert!(ran.error().contains("could not ask the database"), "{}", ran.error());
        let report = json(&ran);
        assert_eq!(turns(&report), expected(&[("on_disk", 6), ("in_queue", 2), ("unproven", 4)]));
        assert!(report["turns"]["in_postgres"].is_null() && report["turns"]["missing"].is_null(), "{report}");
        assert!(report["error"].as_str().unwrap().contains("could not ask the database"), "{report}");
        let shown = stage.run(&["verify"]);
        assert_eq!(shown.code(), 69);
        assert!(
            shown.output().lines().any(|line| line.starts_with("missing") && line.contains('?')),
            "{}",
            shown.output()
        );
        drop(watcher);
    }
    let mut stage = stage;
    stage.database = None;
    let ran = stage.run(&["verify"]);
    assert_eq!(ran.code(), 78);
    assert!(ran.error().starts_with("headspace-watcher: no database is configured; set "), "{}", ran.error());
}

#[test]
fn nothing_is_ever_called_missing_while_everything_moves() {
    let mut dice = Dice::new("verify in motion");
    let server = Server::start();
    let mut stage = Stage::with(Some(server.database.another()));
    stage.set("database.connect_timeout_ms", "500");
    let mut watcher = Some(stage.start());
    let writers: Vec<Writer> = (1..=2)
        .map(|number| Writer::start(stage.transcript("-home-me-app", number), Duration::from_millis(60)))
        .collect();
    let mut proved = 0;
    for round in 0..rounds(6) {
        match round % 6 {
            1 => server.stop(if dice.below(2) == 0 { "fast" } else { "immediate" }),
            2 => server.start_again(),
            3 => watcher.take().unwrap().kill(),
            4 => watcher = Some(stage.start_with(&[])),
            _ => {}
        }
        let ran = stage.run(&["verify", "--json"]);
        assert!([0, 69].contains(&ran.code()), "round {round}: {} {}", ran.output(), ran.error());
        if ran.code() == 0 {
            proved += 1;
            assert_eq!(json(&ran)["missing"], Value::Array(vec![]), "round {round}");
        }
    }
    assert!(proved > 0, "the database was there in some rounds");
    let count = writers.into_iter().map(|writer| writer.finish().len() as u64).sum::<u64>();
    let watcher = watcher.unwrap();
    wait_until("everything is stored", 6 * SOON, || {
        watcher.get("/health").is_some() && verify(&stage, &[]).1["turns"]["in_postgres"].as_u64() == Some(count)
    });
}

#[test]
fn looking_needs_no_right_but_select_and_repairing_names_the_one_that_lacks() {
    let (mut stage, _) = delivered();
    let role = format!("auditor_{}", uuid::Uuid::now_v7().simple());
    stage.database().query(&format!(
        "CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA headspace_watcher TO {role};
         GRANT SELECT ON events, event_receipts TO {role}"
    ));
    let url = stage.database().url.replace("user=headspace", &format!("user={role}"));
    stage.environment.insert("DATABASE_URL".to_owned(), url);
    let (code, report) = verify(&stage, &[]);
    assert_eq!((code, turns(&report)), (0, expected(&[("on_disk", 10), ("in_postgres", 10)])));
    stage.database().query("DELETE FROM events WHERE payload->>'text' = 'turn 1 1'");
    let ran = stage.run(&["verify", "--json", "--repair"]);
    assert_eq!(ran.code(), 78);
    assert!(ran.error().contains("GRANT DELETE ON event_receipts"), "{}", ran.error());
    assert_eq!(json(&ran)["turns"]["missing"], 1);
    assert_eq!(json(&ran)["turns"]["sent_again"], 0);
    assert_eq!(spooled(&stage), 0);
    stage.database().query(&format!("GRANT DELETE ON event_receipts TO {role}"));
    assert_eq!(verify(&stage, &["--repair"]).0, 0);
    stage.environment.remove("DATABASE_URL");
    stage.run_until_idle();
    assert_once(stage.database());
}

#[test]
fn another_name_of_the_table_and_redaction_make_no_difference() {
    let mut stage = Stage::new();
    stage.database().query(
        "CREATE SCHEMA audit; CREATE TABLE audit.\"all events\" (id bigserial PRIMARY KEY, timestamp timestamptz NOT NULL,
           project_id int, agent_id int, task_id int, turn_id int, event_type varchar(50) NOT NULL, payload jsonb)",
    );
    stage.set("database.events_table", "audit.\"all events\"");
    stage.set("redact.enabled", "true");
    stage.set("redact.patterns", "[\"[0-9a-f-]{8,}\", \"turn\"]");
    stage.transcript("-home-me-app", 1).say_many("turn", 3);
    stage.run_until_idle();
    let redacted = "SELECT count(*) FROM audit.\"all events\" WHERE payload->>'text' LIKE '[redacted]%'";
    assert_eq!(stage.database().value(redacted), "3");
    let (code, report) = verify(&stage, &[]);
    assert_eq!((code, turns(&report)), (0, expected(&[("on_disk", 3), ("in_postgres", 3)])));
    stage.database().query("DELETE FROM audit.\"all events\" WHERE payload->>'text' = '[redacted] 1'");
    assert_eq!(verify(&stage, &["--repair"]).0, 0);
    stage.run_until_idle();
    assert_eq!(stage.database().value(redacted), "3", "what is sent again is redacted, too");
    assert_eq!(verify(&stage, &[]).0, 0);
}

#[test]
fn a_transcript_that_can_t_be_read_is_named_and_not_passed_over() {
    let (mut stage, _) = delivered();
    let pipe = stage.projects().join("-home-me-app/0000000a-0000-4000-8000-000000000000.jsonl");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert_eq!(verify(&stage, &[]).0, 0, "a pipe is no transcript");
    let folder = stage.projects().join("-home-me-locked");
    std::fs::create_dir(&folder).unwrap();
    let file = stage.transcript("-home-me-app", 2).path;
    let locked = [(folder, 0o700), (file, 0o600)];
    for (path, _) in &locked {
        std::fs::set_permissions(path, Permissions::from_mode(0o000)).unwrap();
    }
    if File::open(&locked[1].0).is_ok() {
        // Root reads everything: in a shell of its own that right is taken away.
        let wanted = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"];
        if lacks("setpriv", Command::new(wanted[0]).arg("--version").output().is_ok()) {
            return;
        }
        stage.wrapped_by = wanted.map(str::to_owned).to_vec();
    }
    let (code, report) = verify(&stage, &[]);
    for (path, mode) in &locked {
        std::fs::set_permissions(path, Permissions::from_mode(*mode)).unwrap();
    }
    if stage.wrapped_by.is_empty() {
        assert_eq!((code, turns(&report)), (1, expected(&[("on_disk", 5), ("in_postgres", 5)])));
    } else {
        // Without that right the server's socket may be closed to root, too.
        assert!([1, 69].contains(&code), "{report}");
        assert_eq!(report["turns"]["on_disk"], 5);
        stage.wrapped_by.clear();
    }
    let unreadable: Vec<&str> =
        report["unreadable"].as_array().unwrap().iter().map(|line| line["path"].as_str().unwrap()).collect();
    assert_eq!(unreadable, locked.each_ref().map(|(path, _)| path.to_str().unwrap()));
    assert_eq!(verify(&stage, &[]).0, 0);
}

#[test]
fn many_that_are_missing_are_all_in_the_object_and_some_of_them_in_the_table() {
    let stage = Stage::new();
    stage.transcript("-home-me-app", 1).say_many("line", 1500);
    stage.run_until_idle();
    stage.database().query("TRUNCATE events");
    let (code, report) = verify(&stage, &[]);
    assert_eq!((code, missing(&report).len()), (1, 1501));
    let shown = stage.run(&["verify"]).output();
    assert!(shown.contains("and 1481 more; --json lists all"), "{shown}");
    let watcher = stage.start();
    assert_eq!(verify(&stage, &["--repair"]).0, 0);
    wait_until("all are back", SOON, || stage.database().count() == 1501);
    wait_until("none waits", SOON, || watcher.health()["queue"]["pending"] == 0);
    assert_eq!(verify(&stage, &["--repair"]).0, 0);
    assert_eq!(stage.database().count(), 1501);
    // In the order of the transcript.
    let texts = stage.database().texts();
    assert_eq!((texts[0].as_str(), texts[1499].as_str()), ("line 0", "line 1499"));
}

#[test]
fn the_corpus_is_all_there() {
    for corpus in corpora() {
        let mut stage = Stage::new();
        stage.environment.insert("HEADSPACE_CLAUDE__PROJECTS_PATH".to_owned(), corpus.to_str().unwrap().to_owned());
        stage.run_until_idle();
        let (code, report) = verify(&stage, &[]);
        assert_eq!((code, &report["missing"]), (0, &Value::Array(vec![])), "{report}");
        assert_eq!(report["conflicting"], Value::Array(vec![]));
        for (what, event_type) in [("turns", "turn_detected"), ("sessions", "session_registered")] {
            let rows = format!("SELECT count(*) FROM events WHERE event_type = '{event_type}'");
            let rows = stage.database().value(&rows).parse().unwrap();
            assert_eq!(counts(&report, what), expected(&[("on_disk", rows), ("in_postgres", rows)]));
        }
    }
}

#[test]
fn a_transcript_that_is_about_to_be_deleted_is_warned_of_until_it_is_stored() {
    let server = Server::start();
    let mut stage = Stage::with(Some(server.database.another()));
    stage.set("file_watcher.polling_interval", "0.2");
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    std::fs::write(stage.folder().join("settings.json"), "{\"cleanupPeriodDays\": 10}").unwrap();
    server.stop("fast");
    let (mut old, mut young) = (stage.transcript("-home-me-app", 1), stage.transcript("-home-me-app", 2));
    for (transcript, days) in [(&mut old, 8), (&mut young, 6)] {
        transcript.say("hello");
        let modified = SystemTime::now() - Duration::from_secs(days * 24 * 3600);
        File::options().append(true).open(&transcript.path).unwrap().set_modified(modified).unwrap();
    }
    let watcher = stage.start();
    let expiring = || watcher.health()["watcher"]["transcripts_expiring"].as_u64();
    wait_until("one is about to be deleted", SOON, || expiring() == Some(1));
    let gauge = "headspace_watcher_transcripts_expiring 1";
    wait_until("the metric says so", SOON, || watcher.get("/metrics").is_some_and(|(_, page)| page.contains(gauge)));
    let status = stage.run(&["status"]);
    assert_eq!(status.code(), 0, "a warning");
    assert!(status.output().contains("deleted by Claude Code within 3 days"), "{}", status.output());
    let report = json(&stage.run(&["verify", "--json"]));
    assert_eq!(report["expiring"].as_array().unwrap().len(), 1, "{report}");
    assert_eq!(report["expiring"][0]["path"].as_str(), old.path.to_str());
    assert_eq!(report["expiring"][0]["not_stored"], 2);
    let kept_until: jiff::Timestamp = report["expiring"][0]["kept_until"].as_str().unwrap().parse().unwrap();
    assert_eq!(kept_until.duration_since(jiff::Timestamp::now()).as_hours(), 47);
    let shown = stage.run(&["verify"]).output();
    assert!(shown.contains("warning: Claude Code keeps") && shown.contains("cleanupPeriodDays"), "{shown}");
    server.start_again();
    wait_until("nothing is to be feared any more", SOON, || expiring() == Some(0));
    let (code, report) = verify(&stage, &[]);
    assert_eq!((code, &report["expiring"]), (0, &Value::Array(vec![])));
    // Also without a watcher, and before anything was read.
    drop(watcher);
    old.say("once more");
    let modified = SystemTime::now() - Duration::from_secs(9 * 24 * 3600);
    File::options().append(true).open(&old.path).unwrap().set_modified(modified).unwrap();
    let (code, report) = verify(&stage, &[]);
    assert_eq!((code, report["expiring"][0]["not_stored"].as_u64()), (0, Some(1)));
}

#[test]
fn two_lines_with_one_uuid_and_different_texts_are_named() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    let offset = std::fs::metadata(&transcript.path).unwrap().len();
    let line = transcript.prompt("one").replace("\"content\":\"one\"", "\"content\":\"another\"");
    transcript.append(line + "\n");
    // The same line in a copy is no conflict.
    let copy = stage.transcript("-home-me-copy", 2);
    std::fs::create_dir_all(copy.path.parent().unwrap()).unwrap();
    let text = std::fs::read_to_string(&transcript.path).unwrap();
    std::fs::write(&copy.path, text.lines().next().unwrap().to_owned() + "\n").unwrap();
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), ["one"]);
    let (code, report) = verify(&stage, &[]);
    assert_eq!(code, 0);
    let conflicting = report["conflicting"].as_array().unwrap();
    assert_eq!(conflicting.len(), 1, "{report}");
    let places = |path: &str, offset: &str| (conflicting[0][path].clone(), conflicting[0][offset].as_u64().unwrap());
    let path = Value::from(transcript.path.to_str().unwrap());
    assert_eq!([places("path", "offset"), places("other_path", "other_offset")], [(path.clone(), 0), (path, offset)]);
    let table = stage.run(&["verify"]).output();
    assert!(table.contains("have one uuid and different texts"), "{table}");
}
