//! Exactly once and in order, whatever is killed, stopped or away.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::stage::{SOON, Server, Stage, Transcript, pause, wait_for, wait_until, when_busy};

/// How soon rows must come after Postgres accepts connections again.
const BACK_WITHIN: Duration = Duration::from_millis(2500);

#[test]
fn the_order_of_rows_is_the_order_of_lines() {
    let stage = Stage::new();
    let texts = stage.transcript("-home-me-app", 1).say_many("line", 3000);
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), texts);
}

#[test]
fn each_event_is_a_transaction_of_its_own() {
    let stage = Stage::new();
    stage.transcript("-home-me-app", 1).say_many("line", 400);
    stage.run_until_idle();
    let transactions = stage.database().value("SELECT count(DISTINCT xmin::text) FROM events");
    assert_eq!(transactions, "401");
}

#[test]
fn it_starts_and_captures_without_postgres_and_delivers_when_it_comes() {
    let server = Server::start();
    let stage = Stage::with(Some(server.database.another()));
    server.stop("fast");
    let watcher = stage.start();
    let texts = stage.transcript("-home-me-app", 1).say_many("line", 20);
    wait_until("the lines are queued", SOON, || watcher.health()["queue"]["pending"] == 21);
    let health = watcher.health();
    assert_eq!((&health["status"], &health["ready"]), (&"warn".into(), &true.into()));
    assert_eq!(health["database"]["state"], "down");
    server.start_again();
    let begun = Instant::now();
    wait_for("the first row", SOON, || (stage.database().count() > 0).then_some(()));
    assert!(begun.elapsed() < when_busy(BACK_WITHIN), "{:?}", begun.elapsed());
    wait_until("all rows", SOON, || stage.database().count() == 21);
    assert_eq!(stage.database().texts(), texts);
    // The row is there a moment before the log says so.
    watcher.wait_for_log("database reachable again");
    assert_eq!(watcher.logged("database unavailable").len(), 1, "said once: {}", watcher.log());
    assert_eq!(watcher.logged("database reachable again").len(), 1, "said once: {}", watcher.log());
}

#[test]
fn an_event_that_postgres_refuses_is_tried_so_often_then_set_aside_and_the_next_goes_on() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("first");
    stage.run_until_idle();
    stage.database().query("ALTER TABLE events ADD CONSTRAINT no_bad CHECK (payload->>'text' <> 'bad')");
    let watcher = stage.start();
    transcript.append(transcript.prompt("bad") + "\n" + &transcript.prompt("good") + "\n");
    stage.wait_for_rows(3);
    assert_eq!(stage.database().texts(), ["first", "good"]);
    let letters = stage.run(&["queue-dump", "--dead-letters", "--payload"]).lines();
    assert_eq!(letters.len(), 1);
    assert_eq!((&letters[0]["reason"], &letters[0]["sqlstate"]), (&"refused".into(), &"23514".into()));
    assert_eq!(letters[0]["attempts"], 3);
    assert_eq!(letters[0]["payload"]["text"], "bad");
    assert_eq!(watcher.logged("trying again").len(), 2);
}

#[test]
fn events_refused_in_a_row_for_one_cause_pause_the_drainer_instead_of_emptying_the_queue() {
    let (stage, mut transcript) = constrained("CHECK (id < 0) NOT VALID");
    let watcher = stage.start();
    let texts = transcript.say_many("line", 30);
    wait_until("it is paused", SOON, || watcher.health()["database"]["state"] == "misconfigured");
    let health = watcher.health();
    assert_eq!(health["queue"]["dead_letters"], 10);
    assert_eq!(health["queue"]["pending"], 20);
    assert!(health["database"]["last_error"].as_str().unwrap().contains("in a row"), "{health}");
    stage.database().query("ALTER TABLE events DROP CONSTRAINT odd");
    stage.wait_for_rows(32);
    assert_eq!(stage.database().texts()[1..], texts, "the ten in their place");
    wait_until("none is left aside", SOON, || watcher.health()["queue"]["dead_letters"] == 0);
    assert_eq!(watcher.health()["database"]["state"], "up");
}

/// A stage that has delivered a line and whose table has a constraint since; and the transcript.
fn constrained(constraint: &str) -> (Stage, Transcript) {
    let mut stage = Stage::new();
    stage.set("event_system.write_retry_delay_ms", "10").set("event_system.write_retry_max_delay_ms", "50");
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("first");
    stage.run_until_idle();
    stage.database().query(&format!("ALTER TABLE events ADD CONSTRAINT odd {constraint}"));
    (stage, transcript)
}

/// A stage whose table takes nothing, and a transcript with these further lines.
fn refusing(lines: impl Fn(u32, &mut Transcript) -> String) -> Stage {
    let (stage, mut transcript) = constrained("CHECK (id < 0) NOT VALID");
    for number in 0..30 {
        let line = lines(number, &mut transcript);
        transcript.append(line + "\n");
    }
    stage
}

#[test]
fn copies_in_between_do_not_make_more_dead_letters_of_a_broken_table() {
    let stage = refusing(|number, transcript| {
        let known = std::fs::read_to_string(&transcript.path).unwrap().lines().next().unwrap().to_owned();
        transcript.prompt(&format!("line {number}")) + "\n" + &known
    });
    let watcher = stage.start();
    wait_until("it is paused", SOON, || watcher.health()["database"]["state"] == "misconfigured");
    assert_eq!(watcher.health()["queue"]["dead_letters"], 10);
}

#[test]
fn a_restart_sets_no_more_aside_and_sends_what_was_in_its_place() {
    let stage = refusing(|number, transcript| transcript.prompt(&format!("line {number}")));
    for _ in 0..3 {
        let watcher = stage.start();
        wait_until("it is paused", SOON, || watcher.health()["database"]["state"] == "misconfigured");
        assert_eq!(watcher.health()["queue"]["dead_letters"], 10);
        watcher.stop();
    }
    stage.database().query("ALTER TABLE events DROP CONSTRAINT odd");
    let watcher = stage.start();
    stage.wait_for_rows(32);
    wait_until("none is left aside", SOON, || watcher.health()["queue"]["dead_letters"] == 0);
    let texts: Vec<String> = (0..30).map(|number| format!("line {number}")).collect();
    assert_eq!(stage.database().texts()[1..], texts);
}

#[test]
fn more_bad_events_in_a_row_than_are_set_aside_go_on_when_the_first_are_dropped() {
    let (stage, mut transcript) = constrained("CHECK (payload->>'text' NOT LIKE 'bad%')");
    let watcher = stage.start();
    transcript.say_many("bad", 15);
    transcript.say("good");
    wait_until("it is paused", SOON, || watcher.health()["database"]["state"] == "misconfigured");
    let letters = stage.run(&["queue-dump", "--dead-letters"]).lines();
    let sequences: Vec<String> = letters.iter().map(|letter| letter["sequence"].to_string()).collect();
    let drop = stage
        .run(&["dead-letters", "drop"].into_iter().chain(sequences.iter().map(String::as_str)).collect::<Vec<_>>());
    assert_eq!(drop.code(), 0, "{}", drop.error());
    stage.wait_for_rows(3);
    assert_eq!(stage.database().texts(), ["first", "good"]);
    // A row is there a moment before its window is settled.
    wait_until("the last five are dead letters", SOON, || watcher.health()["queue"]["dead_letters"] == 5);
}

#[test]
fn a_failure_in_the_middle_of_a_window_keeps_the_order_also_where_duplicates_follow_it() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    let texts = transcript.say_many("line", 200);
    stage.run_until_idle();
    // Every third row is there already; the 49th line fails several times with a code that says: again.
    stage.database().query(
        "DELETE FROM event_receipts r USING events e WHERE r.row_id = e.id AND e.id % 3 <> 0;
         DELETE FROM events WHERE id % 3 <> 0;
         CREATE SEQUENCE failures;
         CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
           IF NEW.payload->>'text' = 'line 48' AND nextval('failures') < 5 THEN
             RAISE EXCEPTION 'not now' USING ERRCODE = '40001';
           END IF;
           RETURN NEW;
         END $$;
         CREATE TRIGGER fail BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION fail()",
    );
    let stayed = stage.database().texts();
    std::fs::remove_dir_all(stage.folder().join("data")).unwrap();
    stage.run_until_idle();
    let now = stage.database().texts();
    let added: Vec<&String> = now.iter().filter(|text| !stayed.contains(text)).collect();
    let expected: Vec<&String> = texts.iter().filter(|text| !stayed.contains(text)).collect();
    assert_eq!(added, expected);
    assert_eq!(now.len(), texts.len());
    assert!(stage.database().value("SELECT last_value FROM failures").parse::<u32>().unwrap() >= 5);
}

#[test]
fn the_same_event_twice_in_one_window_does_not_let_others_pass_a_failed_one() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("first");
    stage.run_until_idle();
    stage.database().query(
        "CREATE SEQUENCE failures;
         CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
           IF NEW.payload->>'text' = 'two' AND nextval('failures') < 3 THEN
             RAISE EXCEPTION 'not now' USING ERRCODE = '40001';
           END IF;
           RETURN NEW;
         END $$;
         CREATE TRIGGER fail BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION fail()",
    );
    let lines: String = ["one", "two", "one", "three"].map(|text| transcript.prompt(text) + "\n").concat();
    transcript.append(lines);
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), ["first", "one", "two", "three"]);
}

#[test]
fn two_watchers_on_copies_of_one_queue_store_each_event_once() {
    let server = Server::start();
    let first = Stage::with(Some(server.database.another()));
    let texts = first.transcript("-home-me-app", 1).say_many("line", 500);
    let mut second = Stage::with(first.database.clone());
    server.stop("fast");
    let watcher = first.start();
    wait_until("all is queued", SOON, || watcher.health()["queue"]["pending"] == 501);
    watcher.kill();
    let copied =
        std::process::Command::new("cp").arg("-r").arg(first.folder().join("data")).arg(second.folder()).status();
    assert!(copied.unwrap().success());
    second.set("claude.projects_path", first.projects().to_str().unwrap());
    server.start_again();
    let watchers = [first.start(), second.start()];
    for watcher in &watchers {
        wait_until("its queue is empty", SOON, || watcher.health()["queue"]["pending"] == 0);
    }
    let mut stored = first.database().texts();
    let mut expected = texts;
    stored.sort();
    expected.sort();
    assert_eq!(stored, expected);
}

#[test]
fn a_queue_that_is_full_stops_the_reading_and_loses_nothing() {
    let server = Server::start();
    let mut stage = Stage::with(Some(server.database.another()));
    stage.set("queue.max_pending_bytes", "2000000").set("event_system.max_event_bytes", "1000000");
    server.stop("fast");
    let watcher = stage.start();
    let texts = stage.transcript("-home-me-app", 1).say_many("line", 20_000);
    wait_until("the queue is full", SOON, || watcher.health()["queue"]["full"] == true);
    let health = watcher.health();
    assert_eq!(health["status"], "fail");
    assert!(health["queue"]["pending"].as_u64().unwrap() < 20_000, "{health}");
    server.start_again();
    wait_until("all rows", SOON * 2, || stage.database().count() == 20_001);
    assert_eq!(stage.database().texts(), texts);
    assert_eq!(watcher.health()["queue"]["full"], false);
}

#[test]
fn a_full_queue_holds_up_every_way_in_and_each_goes_on_by_itself() {
    let server = Server::start();
    let mut stage = Stage::with(Some(server.database.another()));
    stage.set("queue.max_pending_bytes", "2000000").set("event_system.max_event_bytes", "1000000");
    stage.set("file_watcher.polling_interval", "0.5");
    server.stop("fast");
    let watcher = stage.start();
    let texts = stage.transcript("-home-me-app", 1).say_many("line", 10_000);
    wait_until("the tailer stops", SOON, || watcher.health()["queue"]["full"] == true);
    // What is left of the room goes to ever smaller events.
    let closed = |session: &str, bytes: usize| {
        json!({"session_uuid": session, "reason": "closed", "metadata": {"text": "x".repeat(bytes)}}).to_string()
    };
    let event =
        |session: &str, bytes| format!("{{\"event_type\":\"session_ended\",\"payload\":{}}}", closed(session, bytes));
    let mut over_http = Vec::new();
    for bytes in [50_000, 5_000, 500, 1] {
        loop {
            let session = format!("http {}", over_http.len());
            let answer = watcher.ask("POST", "/events", &[], &event(&session, bytes));
            if answer.code == 503 {
                assert!(answer.body.contains("full") && answer.head.contains("retry-after: "), "{answer:?}");
                break;
            }
            assert_eq!(answer.code, 202, "{answer:?}");
            over_http.push(session);
        }
    }
    let emitted = stage.run(&["emit", "--type", "session_ended", "--payload", &closed("emitted", 1)]);
    assert_eq!(emitted.code(), 0, "{}", emitted.error());
    for number in 0..3 {
        let input = json!({"session_id": format!("hook {number}"), "cwd": "/w", "hook_event_name": "Stop"}).to_string();
        assert_eq!(stage.run_with_input(&["hook"], input).code(), 0);
    }
    let spooled = || std::fs::read_dir(stage.folder().join("data/spool")).map_or(0, Iterator::count);
    assert!(spooled() > 0, "events and hooks wait in the spool");
    assert_eq!(watcher.health()["status"], "fail");
    let pending = watcher.health()["queue"]["pending_bytes"].as_u64().unwrap();
    assert!(pending <= 2_000_000, "{pending}");

    server.start_again();
    wait_until("there is room for who tries again", SOON, || {
        let answer = watcher.ask("POST", "/events", &[], &event("tried again", 1));
        answer.code == 202
    });
    wait_until("all of it is delivered", SOON * 4, || stage.database().count() == 10_002 + over_http.len() as u64 + 4);
    wait_until("the spool is empty", SOON, || spooled() == 0);
    assert_eq!(stage.database().texts(), texts);
    let sessions = |of: &str, field: &str| {
        let sql =
            format!("SELECT string_agg(payload->>'{field}', ',' ORDER BY id) FROM events WHERE event_type = '{of}'");
        stage.database().value(&sql)
    };
    over_http.push("tried again".to_owned());
    // What was emitted comes by the spool, in its own order.
    let ended = sessions("session_ended", "session_uuid");
    let (emitted, others): (Vec<&str>, Vec<&str>) = ended.split(',').partition(|session| *session == "emitted");
    assert_eq!((emitted.len(), others), (1, over_http.iter().map(String::as_str).collect()));
    assert_eq!(sessions("hook_received", "claude_session_id"), "hook 0,hook 1,hook 2");
    let health = watcher.health();
    assert_eq!((&health["queue"]["full"], &health["queue"]["dead_letters"]), (&false.into(), &0.into()), "{health}");
    assert!(watcher.logged("queue is full").len() <= 3, "said once, not each time: {}", watcher.log());
}

#[test]
fn the_tables_are_made_once_though_many_start_at_once() {
    let stage = Stage::new();
    let mut children: Vec<_> = (0..6).map(|_| stage.command(&["migrate"]).spawn().unwrap()).collect();
    for child in &mut children {
        assert!(child.wait().unwrap().success());
    }
    let tables = "SELECT string_agg(tablename, ' ' ORDER BY tablename) FROM pg_tables WHERE schemaname IN ('public', 'headspace_watcher')";
    assert_eq!(stage.database().value(tables), "event_receipts event_sources events");
    let routines = "SELECT count(*) FROM pg_proc WHERE pronamespace = 'headspace_watcher'::regnamespace";
    assert_eq!(stage.database().value(routines), "5");
    let indexes = "SELECT count(*) FROM pg_indexes WHERE tablename = 'events'";
    assert_eq!(stage.database().value(indexes), "10");
}

#[test]
fn an_existing_table_is_left_alone_with_command_id_or_task_id() {
    for column in ["command_id", "task_id"] {
        let stage = Stage::new();
        stage.database().query(&format!(
            "CREATE TABLE events (id serial PRIMARY KEY, timestamp timestamptz NOT NULL, project_id int, agent_id int,
             {column} int, turn_id int, event_type varchar(50) NOT NULL, payload jsonb, extra text DEFAULT 'mine')"
        ));
        let shape = "SELECT string_agg(column_name || data_type, ',' ORDER BY ordinal_position)
                     FROM information_schema.columns WHERE table_name = 'events'";
        let before = stage.database().value(shape);
        stage.transcript("-home-me-app", 1).say("hello");
        stage.run_until_idle();
        assert_eq!(stage.database().value(shape), before);
        assert_eq!(stage.database().count(), 2);
    }
}

#[test]
fn the_ledger_tells_where_a_row_came_from() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    let offset = std::fs::metadata(&transcript.path).unwrap().len();
    transcript.say("two");
    stage.run_until_idle();
    let rows = stage.database().query(
        "SELECT s.path, r.byte_offset, s.host <> '', r.captured_at <= r.delivered_at FROM events e
         JOIN event_receipts r ON r.row_id = e.id JOIN event_sources s ON s.id = r.source_id
         WHERE e.payload->>'text' = 'two'",
    );
    let row: Vec<&str> = rows[0].iter().map(|value| value.as_deref().unwrap()).collect();
    assert_eq!(row, [transcript.path.to_str().unwrap(), &offset.to_string(), "t", "t"]);
}

/// The SQL of a page of the documentation, query by query.
fn documented_queries(page: &str) -> Vec<String> {
    let text = std::fs::read_to_string(crate::stage::project().join("docs").join(page)).unwrap();
    let blocks = text.split("```sql\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    blocks.flat_map(|block| block.split_inclusive(";\n")).map(str::to_owned).collect()
}

#[test]
fn every_documented_query_of_the_ledger_answers_its_question() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    let offset = std::fs::metadata(&transcript.path).unwrap().len();
    transcript.say("two");
    stage.run_until_idle();
    let database = stage.database();
    let id = database.value("SELECT id FROM events WHERE payload->>'text' = 'two'");
    let event_id = database.value(&format!("SELECT event_id FROM event_receipts WHERE row_id = {id}"));
    let path = transcript.path.to_str().unwrap();
    let (removals, questions): (Vec<String>, Vec<String>) =
        documented_queries("schema.md").into_iter().partition(|query| query.contains("DELETE"));
    let answers: Vec<(String, Vec<Vec<Option<String>>>)> = questions
        .into_iter()
        .map(|query| {
            let asked = query
                .replace("4711", &id)
                .replace("7c9e6679-7425-40de-944b-e07fc1f90ae7", &event_id)
                .replace("$1", "1")
                .replace('…', &transcript.session);
            let answer = database.query(&asked);
            (query, answer)
        })
        .collect();
    let answer = |words: &str| {
        let found: Vec<_> = answers.iter().filter(|(query, _)| query.contains(words)).collect();
        assert_eq!(found.len(), 1, "{words}");
        found[0]
            .1
            .iter()
            .map(|row| row.iter().map(|value| value.clone().unwrap_or_default()).collect())
            .collect::<Vec<Vec<_>>>()
    };
    let origin = answer("AS happened_at");
    assert_eq!(origin.len(), 1);
    assert_eq!((&*origin[0][1], &*origin[0][2], &*origin[0][6]), (path, &*offset.to_string(), &*event_id));
    assert!(origin[0][3].starts_with("2026-01-02 ") && origin[0][4] <= origin[0][5], "{origin:?}");
    assert_eq!(answer("SELECT row_id, delivered_at")[0][0], id);
    assert_eq!(answer("WHERE id > $1").len(), 2);
    let said: Vec<String> = answer("FROM turns WHERE session").into_iter().map(|mut row| row.remove(2)).collect();
    assert_eq!(said, ["one", "two"]);
    assert_eq!(answer("percentile_cont")[0][1], "3");
    let by_source = answer("AS newest");
    assert_eq!((by_source.len(), &*by_source[0][1], &*by_source[0][2]), (1, path, "3"));
    assert_eq!(answer("FROM events e WHERE NOT EXISTS")[0], ["0"]);
    assert_eq!(answer("FROM event_receipts r WHERE row_id")[0], ["0"]);
    // Those of ninety days ago: none so far, and all once they are that old.
    let removal = |begin: &str| removals.iter().find(|query| query.starts_with(begin)).unwrap();
    assert_eq!(database.value("SELECT count(*) FROM event_receipts"), "3");
    database.query("UPDATE event_receipts SET delivered_at = delivered_at - interval '91 days'");
    database.query(removal("DELETE"));
    assert_eq!(database.value("SELECT count(*) FROM event_receipts"), "0");
    // What that gives up, and what it does not: the queue still knows how far it has read.
    stage.run_until_idle();
    assert_eq!(database.count(), 3);
    std::fs::remove_dir_all(stage.folder().join("data")).unwrap();
    stage.run_until_idle();
    assert_eq!(database.texts(), ["one", "two", "one", "two"]);
    // Rows that are removed for good do not come again: what they tell of is long past.
    database.query(removal("WITH gone"));
    assert_eq!(database.count(), 0);
    std::fs::remove_dir_all(stage.folder().join("data")).unwrap();
    stage.run_until_idle();
    assert_eq!(database.count(), 0);
}

#[test]
fn a_hanging_server_is_noticed_by_its_silence() {
    let server = Server::start();
    let mut stage = Stage::with(Some(server.database.another()));
    stage.set("database.statement_timeout_ms", "300");
    let watcher = stage.start();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    stage.wait_for_rows(2);
    pause(server.postmaster());
    server.pause(true);
    transcript.say("two");
    wait_until("the silence is noticed", SOON, || watcher.health()["database"]["state"] == "down");
    server.pause(false);
    stage.wait_for_rows(3);
    assert_eq!(stage.database().texts(), ["one", "two"]);
}
