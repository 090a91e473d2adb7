//! Exactly once and in order, whatever is killed, stopped or away.

use std::time::{Duration, Instant};

use crate::stage::{SOON, Server, Stage, Writer, pause, wait_for, wait_until};

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
    assert!(begun.elapsed() < BACK_WITHIN, "{:?}", begun.elapsed());
    wait_until("all rows", SOON, || stage.database().count() == 21);
    assert_eq!(stage.database().texts(), texts);
    assert_eq!(watcher.logged("database away").len(), 1, "said once: {}", watcher.log());
    assert_eq!(watcher.logged("database back").len(), 1, "said once: {}", watcher.log());
}

#[test]
fn it_goes_on_by_itself_after_postgres_stopped_was_killed_or_hung() {
    let server = Server::start();
    let mut stage = Stage::with(Some(server.database.another()));
    stage.set("database.statement_timeout_ms", "1000");
    let watcher = stage.start();
    let writer = Writer::start(stage.transcript("-home-me-app", 1), Duration::from_millis(5));
    stage.wait_for_rows(30);
    for outage in ["fast", "immediate", "kill -9", "SIGSTOP"] {
        let before = stage.database().count();
        match outage {
            "kill -9" => server.kill(),
            "SIGSTOP" => server.pause(true),
            mode => server.stop(mode),
        }
        wait_until("the outage is noticed", SOON, || watcher.health()["database"]["state"] == "down");
        match outage {
            "SIGSTOP" => server.pause(false),
            _ => server.start_again(),
        }
        let begun = Instant::now();
        wait_until("rows go on", SOON, || {
            stage
                .database()
                .try_query("SELECT count(*) FROM events")
                .is_ok_and(|rows| rows[0][0].as_ref().unwrap().parse::<u64>().unwrap() > before)
        });
        assert!(begun.elapsed() < BACK_WITHIN, "after {outage}: {:?}", begun.elapsed());
        wait_until("it is up", SOON, || watcher.health()["database"]["state"] == "up");
    }
    let texts = writer.finish();
    wait_until("all rows", SOON, || stage.database().count() == texts.len() as u64 + 1);
    assert_eq!(stage.database().texts(), texts);
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
    let mut stage = Stage::new();
    stage.set("event_system.write_retry_delay_ms", "10").set("event_system.write_retry_max_delay_ms", "50");
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("first");
    stage.run_until_idle();
    stage.database().query("ALTER TABLE events ADD CONSTRAINT nothing CHECK (id < 0) NOT VALID");
    let watcher = stage.start();
    let texts = transcript.say_many("line", 30);
    wait_until("it is paused", SOON, || watcher.health()["database"]["state"] == "misconfigured");
    let health = watcher.health();
    assert_eq!(health["queue"]["dead_letters"], 10);
    assert_eq!(health["queue"]["pending"], 20);
    assert!(health["database"]["last_error"].as_str().unwrap().contains("in a row"), "{health}");
    stage.database().query("ALTER TABLE events DROP CONSTRAINT nothing");
    stage.wait_for_rows(22);
    assert_eq!(stage.database().texts()[1..], texts[10..]);
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
fn the_tables_are_made_once_though_many_start_at_once() {
    let stage = Stage::new();
    let mut children: Vec<_> = (0..6).map(|_| stage.command(&["migrate"]).spawn().unwrap()).collect();
    for child in &mut children {
        assert!(child.wait().unwrap().success());
    }
    let tables = "SELECT string_agg(tablename, ' ' ORDER BY tablename) FROM pg_tables WHERE schemaname = 'public'";
    assert_eq!(stage.database().value(tables), "event_receipts event_sources events");
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
