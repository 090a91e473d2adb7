//! Copies of sessions that are found before what they were copied from: what they inherited goes to the session where it
//! was first said, whatever the order in which the files appear.

use std::collections::BTreeMap;

use crate::capture::said;
use crate::neighbours::{Listener, Pooler};
use crate::stage::{Database, SOON, Server, Stage, Transcript, wait_until};

/// A prompt said at a time of day (`10:00:05`) on the `day`th of January.
fn say_at(transcript: &mut Transcript, text: &str, day: u32, time: &str) {
    let line = transcript.prompt(text).replace("2026-01-02T03:04:05", &format!("2026-01-{day:02}T{time}"));
    transcript.append(line + "\n");
}

/// Goes on with a session as the desktop app does: the file of `from` under the session of `copy`, behind state that is
/// stamped on the `day`th of January; and a first prompt of its own.
fn go_on(from: &Transcript, copy: &mut Transcript, day: u32, own: &str) {
    copy.append(format!(
        "{{\"type\":\"queue-operation\",\"operation\":\"enqueue\",\"timestamp\":\"2026-01-{day:02}T10:00:00.000Z\"}}\n"
    ));
    let history = std::fs::read_to_string(&from.path).unwrap();
    let history: Vec<&str> = history.lines().filter(|line| !line.contains("queue-operation")).collect();
    copy.append(
        history.join("\n").replace(&from.session, &copy.session).replace("/home/me/app", "/home/me/worktree") + "\n",
    );
    say_at(copy, own, day, "10:00:05");
}

/// The file under another name beside the projects folder, until [`appear`].
fn hide(stage: &Stage, transcript: &Transcript) {
    std::fs::rename(&transcript.path, stage.folder().join(&transcript.session)).unwrap();
}

fn appear(stage: &Stage, transcript: &Transcript) {
    std::fs::create_dir_all(transcript.path.parent().unwrap()).unwrap();
    std::fs::rename(stage.folder().join(&transcript.session), &transcript.path).unwrap();
}

/// An original with `turns` turns and its copy with one of its own; the original is hidden.
fn original_and_copy(stage: &Stage, turns: u32) -> (Transcript, Transcript) {
    let mut original = stage.transcript("-home-me-app", 2);
    let mut copy = stage.transcript("-home-me-app", 1);
    for number in 0..turns {
        say_at(&mut original, &format!("old {number}"), 2, "10:00:00");
    }
    go_on(&original, &mut copy, 3, "new");
    hide(stage, &original);
    (original, copy)
}

/// Session and text of each turn, sorted.
fn pairs(stage: &Stage) -> Vec<(String, String)> {
    let mut pairs = said(stage);
    pairs.sort();
    pairs
}

fn of(transcript: &Transcript, turns: u32) -> Vec<(String, String)> {
    let mut pairs: Vec<_> = (0..turns).map(|number| (transcript.session.clone(), format!("old {number}"))).collect();
    pairs.sort();
    pairs
}

/// Every turn is there once, the old ones under `session` of its first saying, the new one under the copy's.
#[track_caller]
fn assert_told_apart(stage: &Stage, original: &Transcript, copy: &Transcript, turns: u32) {
    let mut expected = of(original, turns);
    expected.push((copy.session.clone(), "new".to_owned()));
    expected.sort();
    assert_eq!(pairs(stage), expected);
    let database = stage.database();
    let marked = "SELECT count(*) FROM events WHERE payload->'metadata'->>'copied_at' IS NOT NULL";
    assert_eq!(database.value(marked), "0");
    // Of the copy nothing is left in them, and the ledger says where they stand.
    let elsewhere = "SELECT count(*) FROM events WHERE payload->>'text' LIKE 'old %' AND payload->>'working_directory' <> '/home/me/app'";
    assert_eq!(database.value(elsewhere), "0");
    let path = original.path.to_str().unwrap();
    let sources = format!(
        "SELECT count(*), count(DISTINCT r.byte_offset) FROM events e JOIN event_receipts r ON r.row_id = e.id
           JOIN event_sources s ON s.id = r.source_id
          WHERE e.payload->>'text' LIKE 'old %' AND s.path = '{path}'"
    );
    let found = database.query(&sources).remove(0);
    assert_eq!(found, [Some(turns.to_string()), Some(turns.to_string())]);
}

fn forget_queue(stage: &Stage) {
    std::fs::remove_dir_all(stage.folder().join("data")).unwrap();
}

/// The rows, but for what a correction changes: ids and times stay.
fn ids_and_times(database: &Database) -> Vec<Vec<Option<String>>> {
    database.query("SELECT id, \"timestamp\", event_type FROM events WHERE event_type = 'turn_detected' ORDER BY id")
}

/// `turns` is below and above that from which a window goes through the procedure.
fn what_a_copy_brought_goes_to_the_original(turns: u32) {
    let stage = Stage::new();
    let (original, copy) = original_and_copy(&stage, turns);
    stage.run_until_idle();
    assert_eq!(said(&stage).iter().filter(|(session, _)| *session == copy.session).count(), turns as usize + 1);
    let marked = "SELECT count(*) FROM events WHERE payload->'metadata'->>'copied_at' = '2026-01-03T10:00:00.000Z'";
    assert_eq!(stage.database().value(marked), turns.to_string(), "what it inherited is marked, and nothing else");
    let before = ids_and_times(stage.database());
    appear(&stage, &original);
    stage.run_until_idle();
    assert_told_apart(&stage, &original, &copy, turns);
    assert_eq!(ids_and_times(stage.database()), before);
    assert_eq!(stage.run(&["verify"]).code(), 0);
    // Read again, in whatever order, nothing flips back.
    forget_queue(&stage);
    hide(&stage, &original);
    stage.run_until_idle();
    assert_told_apart(&stage, &original, &copy, turns);
    appear(&stage, &original);
    forget_queue(&stage);
    stage.run_until_idle();
    assert_told_apart(&stage, &original, &copy, turns);
    assert_eq!(ids_and_times(stage.database()), before);
}

#[test]
fn what_a_copy_brought_goes_to_the_original_when_that_appears() {
    what_a_copy_brought_goes_to_the_original(5);
}

#[test]
fn what_a_copy_brought_goes_to_the_original_when_that_appears_in_a_backlog_too() {
    what_a_copy_brought_goes_to_the_original(600);
}

#[test]
fn a_copy_and_its_original_that_wait_for_postgres_together_come_out_right() {
    for turns in [3, 200] {
        let server = Server::start();
        let stage = Stage::with(Some(server.database.another()));
        server.stop("fast");
        let (original, copy) = original_and_copy(&stage, turns);
        let watcher = stage.start();
        let pending = |count: u32| {
            wait_until("it is pending", SOON, || watcher.health()["queue"]["pending"] == count);
        };
        pending(turns + 2);
        appear(&stage, &original);
        pending(2 * turns + 3);
        server.start_again();
        wait_until("all is delivered", SOON, || watcher.health()["queue"]["pending"] == 0);
        assert_told_apart(&stage, &original, &copy, turns);
    }
}

#[test]
fn of_files_that_are_read_for_the_first_time_what_was_said_is_the_originals_by_whatever_tells_the_copy() {
    /// What each file has before the words of both, and behind them.
    type Marks = (&'static str, &'static str);
    let background = r#"{"type":"system","uuid":"s","timestamp":"2026-01-02T11:00:00.000Z","sessionKind":"bg"}"#;
    let pointer = r#"{"type":"continued-in","continuedInSessionId":"00000001-0000-4000-8000-000000000001"}"#;
    let opened = |second: u32| {
        let line = format!(r#"{{"type":"queue-operation","timestamp":"2026-01-02T10:00:0{second}.000Z"}}"#);
        &*line.leak()
    };
    let cases: [(Marks, Marks); 4] = [
        (("", pointer), ("", "")),
        (("", ""), ("", background)),
        // A line that the background has written in the original, too, which then went on elsewhere.
        (("", &*format!("{background}\n{pointer}").leak()), ("", background)),
        ((opened(1), ""), (opened(2), "")),
    ];
    for (original_has, copy_has) in cases {
        let stage = Stage::new();
        // The copy's name comes first.
        let (mut original, mut copy) = (stage.transcript("-home-me-app", 2), stage.transcript("-home-me-app", 1));
        let mut shared = stage.transcript("-elsewhere", 2);
        say_at(&mut shared, "one", 2, "10:00:03");
        say_at(&mut shared, "two", 2, "10:00:04");
        let words = std::fs::read_to_string(&shared.path).unwrap();
        std::fs::remove_dir_all(shared.path.parent().unwrap()).unwrap();
        let append = |transcript: &mut Transcript, line: &str| {
            if !line.is_empty() {
                transcript.append(format!("{line}\n"));
            }
        };
        append(&mut copy, copy_has.0);
        copy.append(words.replace(&shared.session, &copy.session));
        append(&mut copy, copy_has.1);
        say_at(&mut copy, "three", 2, "11:00:01");
        append(&mut original, original_has.0);
        original.append(words.replace(&shared.session, &original.session));
        append(&mut original, original_has.1);
        stage.run_until_idle();
        let expected = [(&original, "one"), (&original, "two"), (&copy, "three")];
        let mut expected = expected.map(|(file, text)| (file.session.clone(), text.to_owned()));
        expected.sort();
        assert_eq!(pairs(&stage), expected, "{original_has:?} {copy_has:?}");
        assert_eq!(stage.run(&["verify"]).code(), 0);
    }
}

#[test]
fn a_copy_that_is_written_while_it_is_read_and_read_on_after_a_restart_is_known_as_one() {
    let stage = Stage::new();
    let mut original = stage.transcript("-home-me-app", 2);
    let mut copy = stage.transcript("-home-me-app", 1);
    for number in 0..6 {
        say_at(&mut original, &format!("old {number}"), 2, "10:00:00");
    }
    let whole = stage.transcript("-elsewhere", 1);
    let mut written = whole.clone();
    go_on(&original, &mut written, 3, "new");
    hide(&stage, &original);
    let lines = std::fs::read_to_string(&written.path).unwrap();
    std::fs::remove_dir_all(written.path.parent().unwrap()).unwrap();
    let lines: Vec<&str> = lines.split_inclusive('\n').collect();
    // State alone, the first turns, and the others after restarts.
    for piece in [&lines[..1], &lines[1..3], &lines[3..4], &lines[4..]] {
        copy.append(piece.concat());
        stage.run_until_idle();
    }
    let marked = "SELECT count(*) FROM events WHERE payload->'metadata'->>'copied_at' IS NOT NULL";
    assert_eq!(stage.database().value(marked), "6");
    appear(&stage, &original);
    stage.run_until_idle();
    assert_told_apart(&stage, &original, &copy, 6);
}

#[test]
fn the_order_in_which_an_original_a_copy_and_a_copy_of_the_copy_appear_makes_no_difference() {
    let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    let mut outcomes = BTreeMap::new();
    // Once with the original, once without: then the older of the copies has what it inherited.
    for is_there in [true, false] {
        for order in orders {
            let stage = Stage::new();
            // The names of the files are in another order than they came about.
            let mut original = stage.transcript("-home-me-app", 3);
            let mut copy = stage.transcript("-home-me-app", 1);
            let mut second = stage.transcript("-home-me-app", 2);
            say_at(&mut original, "one", 2, "10:00:00");
            say_at(&mut original, "two", 2, "10:00:01");
            go_on(&original, &mut copy, 3, "three");
            go_on(&copy, &mut second, 4, "four");
            let files = [original, copy, second];
            files.iter().for_each(|file| hide(&stage, file));
            for index in order.into_iter().filter(|index| is_there || *index != 0) {
                appear(&stage, &files[index]);
                stage.run_until_idle();
            }
            let first = usize::from(!is_there);
            let expected = [(first, "one"), (first, "two"), (1, "three"), (2, "four")];
            let mut expected = expected.map(|(file, text)| (files[file].session.clone(), text.to_owned()));
            expected.sort();
            assert_eq!(pairs(&stage), expected, "{order:?} {is_there}");
            outcomes.insert((is_there, order), stage.database().count());
        }
    }
    assert!(outcomes.iter().all(|((is_there, _), count)| *count == if *is_there { 7 } else { 6 }), "{outcomes:?}");
}

/// A role with the rights on events that are given, and the others that are needed.
fn as_role(stage: &mut Stage, rights: &str) -> String {
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    let role = format!("watcher_{}", uuid::Uuid::now_v7().simple());
    let database = stage.database().clone();
    database.query(&format!(
        "CREATE ROLE {role} LOGIN; GRANT {rights} ON events TO {role};
         GRANT SELECT, INSERT, UPDATE ON event_receipts, event_sources TO {role};
         GRANT USAGE ON events_id_seq, event_sources_id_seq TO {role}"
    ));
    let url = database.url.replace("user=headspace", &format!("user={role}"));
    assert_ne!(url, database.url);
    stage.environment.insert("DATABASE_URL".to_owned(), url);
    role
}

#[test]
fn without_the_right_to_update_events_a_copys_turns_stay_as_they_are_and_it_is_said_once() {
    for rights in ["INSERT", "SELECT, INSERT"] {
        let mut stage = Stage::new();
        let role = as_role(&mut stage, rights);
        let (mut original, copy) = original_and_copy(&stage, 200);
        stage.run_until_idle();
        let before = pairs(&stage);
        let watcher = stage.start();
        appear(&stage, &original);
        wait_until("the original is read", SOON, || watcher.health()["writes"]["duplicates"] == 200);
        say_at(&mut original, "goes on", 2, "11:00:00");
        wait_until("it goes on", SOON, || stage.database().texts().contains(&"goes on".to_owned()));
        let mut expected = before;
        expected.push((original.session.clone(), "goes on".to_owned()));
        expected.sort();
        assert_eq!(pairs(&stage), expected);
        let warned = watcher.logged("stay under the copy's session");
        assert_eq!(warned.len(), 1, "{}", watcher.log());
        assert_eq!(warned[0]["level"], "WARN");
        assert!(warned[0]["message"].as_str().unwrap().contains("takes SELECT and UPDATE"), "{}", warned[0]);
        assert!(warned[0]["error"].as_str().unwrap().contains("permission denied"), "{}", warned[0]);
        assert_eq!(watcher.health()["database"]["state"], "up");
        assert_eq!(watcher.logged("the database can't be used").len(), 0);
        let check = stage.run(&["check"]);
        assert_eq!(check.code(), 0, "{}", check.output());
        assert!(check.output().contains("SELECT, UPDATE ON events"), "{}", check.output());
        drop(watcher);
        // Once it may, whatever is read again is put right.
        stage.database().query(&format!("GRANT SELECT, UPDATE ON events TO {role}"));
        forget_queue(&stage);
        stage.run_until_idle();
        let texts = said(&stage);
        assert!(
            texts.iter().filter(|(_, text)| text.starts_with("old")).all(|(session, _)| *session == original.session)
        );
        assert!(texts.contains(&(copy.session.clone(), "new".to_owned())));
    }
}

#[test]
fn a_table_that_takes_no_updates_holds_nothing_up() {
    let mut stage = Stage::new();
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    stage.set("event_system.write_retry_delay_ms", "5");
    stage.database().query(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'append only'; END $$;
         CREATE TRIGGER refuse BEFORE UPDATE ON events FOR EACH ROW EXECUTE FUNCTION refuse()",
    );
    let (original, copy) = original_and_copy(&stage, 20);
    stage.run_until_idle();
    appear(&stage, &original);
    let watcher = stage.start();
    wait_until("the original is read", SOON, || watcher.health()["writes"]["duplicates"] == 20);
    assert_eq!(said(&stage).iter().filter(|(session, _)| *session == copy.session).count(), 21);
    assert_eq!(watcher.logged("stay under the copy's session").len(), 1);
}

#[test]
fn a_correction_that_fails_in_passing_is_made_again_before_the_events_leave_the_queue() {
    let mut stage = Stage::new();
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    stage.set("event_system.write_retry_delay_ms", "5");
    // The first three corrections fail as a deadlock would, one of them ends the connection.
    stage.database().query(
        "CREATE SEQUENCE tries;
         CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ DECLARE try bigint := nextval('tries');
         BEGIN
           IF try = 2 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;
           IF try <= 3 THEN RAISE 'deadlock' USING ERRCODE = '40P01'; END IF;
           RETURN NEW;
         END $$;
         CREATE TRIGGER fail BEFORE UPDATE ON events FOR EACH ROW EXECUTE FUNCTION fail()",
    );
    let (original, copy) = original_and_copy(&stage, 40);
    stage.run_until_idle();
    appear(&stage, &original);
    stage.run_until_idle();
    assert_told_apart(&stage, &original, &copy, 40);
    assert!(stage.database().value("SELECT last_value FROM tries").parse::<u32>().unwrap() >= 43);
}

#[test]
fn a_table_in_partitions_is_corrected_as_well_and_nobody_is_notified_twice() {
    let mut stage = Stage::new();
    stage.set("database.notify_channel", "new_rows");
    stage.database().query(
        "CREATE TABLE events (
            id bigserial, \"timestamp\" timestamptz NOT NULL,
            project_id integer, agent_id integer, command_id integer, turn_id integer,
            event_type varchar(50) NOT NULL, payload jsonb,
            PRIMARY KEY (id, \"timestamp\")
         ) PARTITION BY RANGE (\"timestamp\");
         CREATE TABLE events_2026_01 PARTITION OF events FOR VALUES FROM ('2026-01-01Z') TO ('2026-01-03Z');
         CREATE TABLE events_default PARTITION OF events DEFAULT",
    );
    let (original, copy) = original_and_copy(&stage, 30);
    let listener = Listener::on(stage.database(), "new_rows");
    stage.run_until_idle();
    appear(&stage, &original);
    stage.run_until_idle();
    assert_told_apart(&stage, &original, &copy, 30);
    let ids = stage.database().query("SELECT id FROM events ORDER BY id");
    let ids: Vec<String> = ids.into_iter().flatten().flatten().collect();
    assert_eq!(listener.heard(33), ids);
}

#[test]
fn what_was_corrected_is_durable_when_its_events_have_left_the_queue() {
    // kill -9 of the postmaster right after the queue is empty, on a server that flushes nothing by itself.
    let server = Server::start();
    server.restart_with(&["wal_writer_delay = '10s'", "wal_writer_flush_after = '1GB'", "synchronous_commit = off"]);
    for turns in [5, 300] {
        let stage = Stage::with(Some(server.database.another()));
        let (original, copy) = original_and_copy(&stage, turns);
        let watcher = stage.start();
        wait_until("the copy is stored", SOON, || watcher.has_settled(turns as usize + 2));
        appear(&stage, &original);
        wait_until("the original is read", SOON, || watcher.health()["writes"]["duplicates"] == turns);
        server.kill();
        server.start_again();
        assert_told_apart(&stage, &original, &copy, turns);
    }
}

#[test]
fn a_window_that_breaks_corrects_what_was_before_the_break() {
    let stage = Stage::new();
    stage.refuse_curses();
    let (mut original, copy) = original_and_copy(&stage, 5);
    stage.run_until_idle();
    appear(&stage, &original);
    say_at(&mut original, "a curse", 2, "11:00:00");
    say_at(&mut original, "after", 2, "11:00:01");
    stage.run_until_idle();
    let mut expected = of(&original, 5);
    expected.push((original.session.clone(), "after".to_owned()));
    expected.push((copy.session.clone(), "new".to_owned()));
    expected.sort();
    assert_eq!(pairs(&stage), expected);
}

#[test]
fn corrections_go_through_pgbouncer_in_transaction_mode() {
    let database = Database::new();
    let Some(pooler) = Pooler::start(&database, "pool_mode = transaction") else { return };
    let mut stage = Stage::with(Some(database));
    stage.environment.insert("DATABASE_URL".to_owned(), pooler.database.url.clone());
    let (original, copy) = original_and_copy(&stage, 100);
    stage.run_until_idle();
    appear(&stage, &original);
    stage.run_until_idle();
    assert_told_apart(&stage, &original, &copy, 100);
}
