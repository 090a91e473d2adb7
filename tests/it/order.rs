//! Rows come in the order of acceptance, nothing twice and nothing missing, whatever breaks in the middle of a window,
//! and wherever the drainer is cut off.

use std::sync::Arc;
use std::time::{Duration, Instant};

use headspace_watcher::internals::{Delivered, Drainer, Metrics, Place, Sink, Verdict};
use tokio::sync::watch;
use tokio_postgres::NoTls;

use crate::inside::{self, CancelledAt, assert_stored};
use crate::stage::{Database, SOON, Server, Stage, wait_until};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

#[test]
fn transactions_that_fail_in_the_middle_of_a_window_keep_the_order_whatever_the_cause() {
    let mut stage = Stage::new();
    stage.set("event_system.write_retry_delay_ms", "10").set("event_system.write_retry_max_delay_ms", "50");
    let mut transcript = stage.transcript("-home-me-app", 1);
    let mut texts = transcript.say_many("line", 200);
    stage.run_until_idle();
    // Every seventh row is there already. Each of these lines fails three times, line 120 for ever.
    stage.database().query(
        "DELETE FROM event_receipts r USING events e WHERE r.row_id = e.id AND e.id % 7 <> 0;
         DELETE FROM events WHERE id % 7 <> 0;
         CREATE TABLE trouble (line text PRIMARY KEY, code text, seen text);
         INSERT INTO trouble VALUES ('line 21', '40001'), ('line 41', '40P01'), ('line 60', '55P03'), ('line 80', '57014'),
           ('line 101', '57P01'), ('line 120', '23514'), ('line 140', 'XX000'), ('line 161', '53100'),
           ('line 181', '25006');
         CREATE SEQUENCE seen_21; CREATE SEQUENCE seen_41; CREATE SEQUENCE seen_60; CREATE SEQUENCE seen_80;
         CREATE SEQUENCE seen_101; CREATE SEQUENCE seen_120; CREATE SEQUENCE seen_140; CREATE SEQUENCE seen_161;
         CREATE SEQUENCE seen_181;
         CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
         DECLARE code text; seen bigint;
         BEGIN
           SELECT t.code INTO code FROM trouble t WHERE t.line = NEW.payload->>'text';
           IF code IS NULL THEN RETURN NEW; END IF;
           seen := nextval('seen_' || split_part(NEW.payload->>'text', ' ', 2));
           IF seen > 3 AND code <> '23514' THEN RETURN NEW; END IF;
           IF code = '57P01' THEN
             PERFORM pg_terminate_backend(pg_backend_pid());
             PERFORM pg_sleep(1);
           END IF;
           RAISE EXCEPTION 'not now' USING ERRCODE = code;
         END $$;
         CREATE TRIGGER fail BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION fail()",
    );
    let stayed = stage.database().texts();
    assert!(!stayed.contains(&"line 120".to_owned()), "the line that fails for ever must not be there before");
    std::fs::remove_dir_all(stage.folder().join("data")).unwrap();
    stage.run_until_idle();
    texts.retain(|text| text != "line 120");
    let now = stage.database().texts();
    let added: Vec<&String> = now.iter().filter(|text| !stayed.contains(text)).collect();
    let expected: Vec<&String> = texts.iter().filter(|text| !stayed.contains(text)).collect();
    assert_eq!(added, expected);
    assert_eq!(now.len(), texts.len());
    assert_eq!(stage.database().value("SELECT last_value FROM seen_120"), "3");
    for line in [21, 41, 60, 80, 101, 140, 161, 181] {
        assert_eq!(stage.database().value(&format!("SELECT last_value FROM seen_{line}")), "4", "line {line}");
    }
    let letters = stage.run(&["queue-dump", "--dead-letters"]).lines();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0]["sqlstate"], "23514");
}

/// Events in a window that goes one statement at a time, and in one that goes by one call.
const SIZES: [usize; 2] = [8, 40];

#[test]
fn a_deadlock_and_a_lock_that_is_not_given_are_waited_out() {
    SIZES.into_iter().for_each(locks_are_waited_out);
}

fn locks_are_waited_out(size: usize) {
    let database = Database::new();
    let runtime = runtime();
    let texts = inside::texts("line", size);
    let envelopes = inside::envelopes(&texts, 1);
    let place = Place { after: None, durable: true };
    let sink = inside::sink(&format!("{}&options=-c%20deadlock_timeout%3D50ms", database.url));
    let opened = runtime.block_on(sink.deliver(&envelopes[..1], place));
    assert!(opened.failure.is_none(), "{opened:?}");
    // Our transaction holds the receipt of `line 3` and wants the lock; the other holds the lock and wants the receipt.
    database.query(
        "CREATE FUNCTION want_lock() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
           IF NEW.payload->>'text' = 'line 3' THEN PERFORM pg_sleep(0.3), pg_advisory_xact_lock(1); END IF;
           RETURN NEW;
         END $$;
         CREATE TRIGGER want_lock BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION want_lock()",
    );
    let other = runtime.block_on(connect(&database));
    // The one whose timer ends first is the victim: ours.
    let holding = "SET deadlock_timeout = '10s'; BEGIN; SELECT pg_advisory_xact_lock(1)";
    runtime.block_on(other.batch_execute(holding)).unwrap();
    let taking = format!(
        "INSERT INTO headspace_watcher.event_receipts (event_id, row_id, source_id, captured_at, delivered_at)
         VALUES ('{}', 0, 0, now(), now())",
        envelopes[3].event.id()
    );
    let asleep = async {
        let watching = connect(&database).await;
        let sql = "SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()";
        while watching.query_opt(sql, &[]).await.unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        other.batch_execute(&taking).await
    };
    let (deadlocked, taken) = runtime.block_on(async { tokio::join!(sink.deliver(&envelopes[1..], place), asleep) });
    assert!(taken.is_ok(), "the other goes on when ours was ended: {taken:?}");
    assert_eq!(deadlocked.done.len(), 2, "{deadlocked:?}");
    let failure = deadlocked.failure.unwrap();
    assert_eq!((failure.verdict, failure.sqlstate.as_deref()), (Verdict::Again, Some("40P01")), "{failure}");
    // What the other holds now keeps ours waiting until it lets go.
    let limited = inside::sink(&format!("{}&options=-c%20lock_timeout%3D50ms", database.url));
    let waited = runtime.block_on(limited.deliver(&envelopes[3..], place));
    let failure = waited.failure.unwrap();
    assert_eq!((failure.verdict, failure.sqlstate.as_deref()), (Verdict::Again, Some("55P03")), "{failure}");
    runtime.block_on(other.batch_execute("ROLLBACK")).unwrap();
    let rest = runtime.block_on(limited.deliver(&envelopes[3..], place));
    assert!(rest.failure.is_none(), "{rest:?}");
    assert_stored(&database, &texts);
}

async fn connect(database: &Database) -> tokio_postgres::Client {
    let (client, connection) = tokio_postgres::connect(&database.url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

#[test]
fn a_delivery_cut_off_at_any_await_loses_and_doubles_nothing() {
    SIZES.into_iter().for_each(cut_off_loses_nothing);
}

fn cut_off_loses_nothing(size: usize) {
    let database = Database::new();
    let runtime = runtime();
    let (sink, mut texts) = (inside::sink(&database.url), Vec::new());
    let mut waits = 0;
    loop {
        let window = inside::texts(&format!("cut off at wait {waits}, line"), size);
        let envelopes = inside::envelopes(&window, texts.len() as u64 + 1);
        texts.extend(window);
        let place = Place { after: None, durable: true };
        let (first, rest) = runtime.block_on(async {
            let first = CancelledAt::new(sink.deliver(&envelopes, place), waits).await;
            let mut rest = sink.deliver(&envelopes, place).await;
            // The session that was cut off may still be committing: the drainer is told to try again.
            for _ in 0..20 {
                if rest.failure.as_ref().is_none_or(|failure| failure.verdict != Verdict::Again) {
                    break;
                }
                rest = sink.deliver(&envelopes, place).await;
            }
            (first, rest)
        });
        assert!(rest.failure.is_none() && rest.durable && rest.done.len() == size, "{rest:?}");
        assert_stored(&database, &texts);
        if first.is_some() && waits > 8 {
            break;
        }
        // From time to time a new session, so that its opening is cut off too.
        if waits % 3 == 2 {
            database.query(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                  WHERE datname = current_database() AND pid <> pg_backend_pid()",
            );
        }
        waits += 1;
        assert!(waits < 500, "it never comes to its end");
    }
}

#[test]
fn windows_under_way_behind_one_that_is_cut_off_store_nothing() {
    for sizes in [[4, 4], [40, 40], [40, 4], [4, 40]] {
        nothing_is_stored_behind_a_failure(sizes);
    }
}

fn nothing_is_stored_behind_a_failure([size, behind]: [usize; 2]) {
    let database = Database::new();
    let runtime = runtime();
    let sink = inside::sink(&database.url);
    let texts = inside::texts("line", 1 + size + behind);
    let envelopes = inside::envelopes(&texts, 1);
    runtime.block_on(async {
        let opened = sink.deliver(&envelopes[..1], Place { after: None, durable: true }).await;
        assert!(opened.failure.is_none(), "{opened:?}");
    });
    database.query("CREATE SEQUENCE tries; CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
          IF NEW.payload->>'text' = 'line 3' AND nextval('tries') = 1 THEN RAISE 'not now' USING ERRCODE = '40001'; END IF;
          RETURN NEW;
        END $$; CREATE TRIGGER fail BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION fail()");
    runtime.block_on(async {
        let place = |after: usize, durable| Place { after: envelopes.get(after).map(|e| e.sequence), durable };
        let (first, second) = tokio::join!(
            sink.deliver(&envelopes[1..=size], Place { after: None, durable: false }),
            sink.deliver(&envelopes[size + 1..], place(size, true)),
        );
        assert_eq!((first.done.len(), first.durable), (2, true), "{first:?}");
        assert!(second.done.is_empty() && second.failure.is_some(), "{second:?}");
        let again = sink.deliver(&envelopes[size + 1..], place(size, true)).await;
        assert!(again.done.is_empty() && again.failure.is_some(), "it was told to follow what failed: {again:?}");
        let rest = sink.deliver(&envelopes[3..], Place { after: None, durable: true }).await;
        assert!(rest.failure.is_none(), "{rest:?}");
    });
    assert_stored(&database, &texts);
}

#[test]
fn a_drainer_cut_off_at_any_await_loses_and_doubles_nothing() {
    let database = Database::new();
    let runtime = runtime();
    let folder = tempfile::tempdir().unwrap();
    let texts = inside::texts("line", 1500);
    let queue = inside::queue(&folder.path().join("queue"), &texts);
    let metrics = Arc::new(Metrics::default());
    let mut waits = 0;
    let deadline = Instant::now() + SOON;
    while queue.stats().pending > 0 {
        assert!(Instant::now() < deadline, "{} are left", queue.stats().pending);
        let sink = inside::sink(&database.url);
        let window = if waits % 2 == 0 { 8 } else { 64 };
        let drainer = Drainer::new(queue.clone(), sink, inside::drain_config(window), metrics.clone());
        let (_stop, stopped) = watch::channel(false);
        runtime.block_on(async {
            let running = CancelledAt::new(drainer.run(stopped), waits);
            let _ = tokio::time::timeout(Duration::from_millis(200), running).await;
        });
        waits = (waits + 1) % 60;
    }
    assert_stored(&database, &texts);
}

/// A stage whose tables are there, and lines to deliver.
fn backlog(lines: u32) -> (Stage, Vec<String>) {
    let stage = Stage::new();
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    let texts = stage.transcript("-home-me-app", 1).say_many("line", lines);
    (stage, texts)
}

#[test]
fn each_event_of_a_backlog_is_a_transaction_of_its_own() {
    let (stage, mut texts) = backlog(300);
    let watcher = stage.start();
    stage.wait_for_rows(301);
    assert_eq!(stage.database().value("SELECT count(DISTINCT xmin::text) FROM events"), "301");
    // What was stored before is not stored again, and takes no number.
    watcher.stop();
    let numbers = stage.database().value("SELECT last_value FROM events_id_seq");
    std::fs::remove_dir_all(stage.folder().join("data")).unwrap();
    texts.extend(stage.transcript("-home-me-app", 2).say_many("more", 300));
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), texts);
    let more = stage.database().value("SELECT last_value FROM events_id_seq");
    assert_eq!(more.parse::<u64>().unwrap(), numbers.parse::<u64>().unwrap() + 301);
}

#[test]
fn a_call_that_takes_too_long_as_a_whole_is_given_up() {
    let (mut stage, texts) = backlog(100);
    stage.set("database.statement_timeout_ms", "400");
    // Each is quick enough, all together are not.
    stage.database().query(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.02); RETURN NEW; END $$;
         CREATE TRIGGER slow BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION slow()",
    );
    let watcher = stage.start();
    stage.wait_for_rows(101);
    assert_eq!(stage.database().texts(), texts);
    assert!(watcher.logged("database unavailable").is_empty(), "{}", watcher.log());
    assert_eq!(watcher.health()["queue"]["dead_letters"], 0);
}

#[test]
fn routines_that_are_gone_are_made_again() {
    let (stage, mut texts) = backlog(100);
    let watcher = stage.start();
    stage.wait_for_rows(101);
    stage.database().query("DROP SCHEMA headspace_watcher CASCADE; CREATE SCHEMA headspace_watcher");
    texts.extend(stage.transcript("-home-me-app", 2).say_many("more", 100));
    stage.wait_for_rows(202);
    assert_eq!(stage.database().texts(), texts);
    assert_eq!(watcher.health()["queue"]["dead_letters"], 0);
}

#[test]
fn a_window_that_is_said_to_be_durable_has_been_flushed() {
    let server = Server::start();
    // Nothing flushes but what asks for it.
    server.restart_with(&["wal_writer_delay = '10s'", "wal_writer_flush_after = '1GB'", "autovacuum = off"]);
    let database = server.database.another();
    let runtime = runtime();
    let sink = inside::sink(&database.url);
    let mut texts = Vec::new();
    let unflushed = || database.value("SELECT pg_current_wal_insert_lsn() > pg_current_wal_flush_lsn()");
    for (round, size) in SIZES.into_iter().cycle().take(10).enumerate() {
        let window = inside::texts(&format!("round {round}, line"), size);
        let envelopes = inside::envelopes(&window, texts.len() as u64 + 1);
        texts.extend(window);
        let durable = round % 4 < 2;
        let delivery = runtime.block_on(sink.deliver(&envelopes, Place { after: None, durable }));
        let flushed = unflushed() == "f";
        assert!(delivery.failure.is_none() && delivery.durable == durable, "{delivery:?}");
        assert_eq!(flushed, durable, "round {round}");
    }
    assert_stored(&database, &texts);
}

#[test]
fn what_somebody_else_stores_while_a_backlog_is_under_way_is_stored_once() {
    let database = Database::new();
    let runtime = runtime();
    let sink = inside::sink(&database.url);
    let (first, texts) = (inside::texts("first", 64), inside::texts("line", 64));
    let mut envelopes = inside::envelopes(&first, 1);
    let at_once = Place { after: None, durable: true };
    runtime.block_on(sink.deliver(&envelopes, at_once));
    envelopes = inside::envelopes(&texts, 65);
    let other = envelopes[40].event.id().0;
    runtime.block_on(async {
        let (mut client, connection) = tokio_postgres::connect(&database.url, NoTls).await.unwrap();
        tokio::spawn(connection);
        // Not committed when the window looks which are there.
        let transaction = client.transaction().await.unwrap();
        transaction
            .batch_execute(&format!(
                "SET search_path = public, headspace_watcher;
                 INSERT INTO event_receipts (event_id, row_id, source_id, captured_at, delivered_at)
                 SELECT '{other}', nextval(pg_get_serial_sequence('events', 'id')), min(id), now(), now() FROM event_sources;
                 INSERT INTO events (id, timestamp, event_type, payload) OVERRIDING SYSTEM VALUE
                 SELECT row_id, now(), 'turn_detected', jsonb_build_object('text', 'by another') FROM event_receipts
                  WHERE event_id = '{other}'"
            ))
            .await
            .unwrap();
        let delivering = sink.deliver(&envelopes, at_once);
        let committing = async {
            let database = database.clone();
            let waiting = move || {
                let waits = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'transactionid')";
                wait_until("the window waits", SOON, || database.value(waits) == "t");
            };
            tokio::task::spawn_blocking(waiting).await.unwrap();
            transaction.commit().await.unwrap();
        };
        let (mut delivery, ()) = tokio::join!(delivering, committing);
        let mut done = Vec::new();
        for _ in 0..3 {
            // The ledger refuses the second copy; sent again, it is known.
            let refused = delivery.failure.as_ref().and_then(|failure| failure.sqlstate.as_deref());
            assert!(delivery.durable && refused.is_none_or(|code| code == "23505"), "{delivery:?}");
            done.extend(delivery.done);
            if done.len() == 64 {
                break;
            }
            delivery = sink.deliver(&envelopes[done.len()..], at_once).await;
        }
        assert!(done.iter().enumerate().all(|(index, done)| (*done == Delivered::AlreadyStored) == (index == 40)), "{done:?}");
    });
    let mut expected: Vec<&str> = first.iter().chain(&texts).map(String::as_str).collect();
    expected.remove(64 + 40);
    let stored = database.texts();
    let others: Vec<&str> = stored.iter().map(String::as_str).filter(|text| *text != "by another").collect();
    assert_eq!(others, expected);
    assert_eq!(stored.len(), others.len() + 1);
}

#[test]
fn a_durable_window_ends_with_a_commit_that_is_never_weaker_than_on_and_never_weaker_than_the_servers() {
    let database = Database::new();
    let runtime = runtime();
    let at_once = Place { after: None, durable: true };
    // So that the tables are there.
    runtime.block_on(inside::sink(&database.url).deliver(&inside::envelopes(&inside::texts("first", 1), 1), at_once));
    database.query(
        "CREATE TABLE committed (place bigserial, how text);
         CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
           IF NEW.payload ->> 'text' LIKE 'bad%' THEN RAISE check_violation; END IF;
           RETURN NEW; END $$;
         CREATE TRIGGER refuse BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION refuse();
         -- What holds when the transaction commits.
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
           INSERT INTO committed (how) VALUES (current_setting('synchronous_commit'));
           RETURN NULL; END $$;
         CREATE CONSTRAINT TRIGGER note AFTER INSERT ON events DEFERRABLE INITIALLY DEFERRED
           FOR EACH ROW EXECUTE FUNCTION note();
         CREATE CONSTRAINT TRIGGER note AFTER UPDATE ON event_sources DEFERRABLE INITIALLY DEFERRED
           FOR EACH ROW EXECUTE FUNCTION note()",
    );
    let mut sequence = 2;
    for (servers, expected) in
        [("off", "on"), ("local", "on"), ("remote_write", "on"), ("on", "on"), ("remote_apply", "remote_apply")]
    {
        database.query(&format!(
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = {servers}', current_database()); END $$"
        ));
        let sink = inside::sink(&database.url);
        let mut deliver = |texts: &[String], durable: bool| {
            let envelopes = inside::envelopes(texts, sequence);
            sequence += texts.len() as u64;
            let delivery = runtime.block_on(sink.deliver(&envelopes, Place { after: None, durable }));
            let how = database.value("SELECT string_agg(how, ' ' ORDER BY place) FROM committed");
            database.query("TRUNCATE committed");
            let how: Vec<String> = how.split(' ').map(str::to_owned).collect();
            (delivery, how)
        };
        // The last event commits as expected, or what follows a window that broke.
        let commits = |events: usize, durable: bool, broke: bool| {
            let relaxed = if durable && !broke { events - 1 } else { events };
            let mut how = vec!["off".to_owned(); relaxed];
            how.extend(durable.then(|| expected.to_owned()));
            how
        };
        for (turn, (size, durable)) in
            [(64, true), (64, false), (64, true), (5, true), (5, false), (64, true)].into_iter().enumerate()
        {
            let (delivery, how) = deliver(&inside::texts(&format!("{servers} {turn} line"), size), durable);
            assert!(delivery.failure.is_none() && delivery.durable == durable, "{delivery:?}");
            assert_eq!(how, commits(size, durable, false), "{servers}, {size} events, durable {durable}");
        }
        let mut texts = inside::texts(&format!("{servers} broken"), 64);
        texts[50] = format!("bad {servers}");
        let (delivery, how) = deliver(&texts, true);
        assert_eq!((delivery.done.len(), delivery.durable), (50, true), "{delivery:?}");
        assert_eq!(how, commits(50, true, true), "{servers}, the one that broke");
        let (_, how) = deliver(&inside::texts(&format!("{servers} after"), 5), true);
        assert_eq!(how, commits(5, true, false), "{servers}, after the one that broke");
    }
}

#[test]
fn a_barrier_proves_nothing_on_a_server_that_does_not_have_what_came_before_it() {
    let database = Database::new();
    let runtime = runtime();
    let sink = inside::sink(&database.url);
    let mut sequence = 1;
    for size in SIZES {
        let envelopes = inside::envelopes(&inside::texts(&format!("line of {size}"), size), sequence);
        sequence += size as u64;
        let last = envelopes.last().unwrap();
        let relaxed = Place { after: None, durable: false };
        let barrier = Place { after: Some(last.sequence), durable: true };
        let (sent, proven, lost) = runtime.block_on(async {
            let sent = sink.deliver(&envelopes, relaxed).await;
            let proven = sink.deliver(&[], barrier).await;
            // As behind a pooler that goes on with a promoted standby.
            let sql = format!("DELETE FROM event_receipts WHERE event_id = '{}'", last.event.id());
            let elsewhere = database.clone();
            tokio::task::spawn_blocking(move || elsewhere.query(&sql)).await.unwrap();
            (sent, proven, sink.deliver(&[], barrier).await)
        });
        assert!(sent.failure.is_none() && sent.done.len() == size, "{sent:?}");
        assert!(proven.failure.is_none() && proven.durable, "{proven:?}");
        assert!(lost.failure.is_some() && !lost.durable, "{lost:?}");
    }
}
