//! Beyond one plain table: partitions, and other servers that follow. What docs/scaling.md says works.

use crate::stage::{Database, SOON, Server, Stage, Transcript, wait_until};

/// Prompts of these numbers at a time of a given month of 2026. Gives their texts.
fn say_in_month(transcript: &mut Transcript, month: u32, numbers: std::ops::Range<u32>) -> Vec<String> {
    let texts: Vec<String> = numbers.map(|number| format!("month {month} line {number}")).collect();
    for text in &texts {
        let line = transcript.prompt(text).replace("2026-01-02", &format!("2026-{month:02}-02"));
        transcript.append(line + "\n");
    }
    texts
}

/// `events` in partitions by month, with the id made in one of the ways there are; January and February have one.
fn partition_events(database: &Database, id: &str) {
    database.query(&format!(
        "CREATE TABLE events (id {id}, \"timestamp\" timestamptz NOT NULL, project_id int, agent_id int,
           command_id int, turn_id int, event_type varchar(50) NOT NULL, payload jsonb, PRIMARY KEY (id, \"timestamp\"))
           PARTITION BY RANGE (\"timestamp\");
         CREATE INDEX ON events (event_type, \"timestamp\");
         CREATE TABLE events_2026_01 PARTITION OF events FOR VALUES FROM ('2026-01-01Z') TO ('2026-02-01Z');
         CREATE TABLE events_2026_02 PARTITION OF events FOR VALUES FROM ('2026-02-01Z') TO ('2026-03-01Z')"
    ));
}

#[test]
fn events_partitioned_by_month_are_filled_once_and_in_order() {
    for id in ["bigserial", "bigint GENERATED ALWAYS AS IDENTITY"] {
        let stage = Stage::new();
        partition_events(stage.database(), id);
        let mut transcript = stage.transcript("-home-me-app", 1);
        let mut texts = say_in_month(&mut transcript, 1, 0..300);
        texts.extend(say_in_month(&mut transcript, 2, 0..300));
        texts.extend(say_in_month(&mut transcript, 1, 300..320));
        stage.run_until_idle();
        assert_eq!(stage.database().texts(), texts);
        assert_eq!(stage.database().value("SELECT count(*) FROM events_2026_02"), "300");
        // A queue that was lost sends all of it again.
        std::fs::remove_dir_all(stage.folder().join("data")).unwrap();
        stage.run_until_idle();
        assert_eq!(stage.database().texts(), texts);
        // The oldest partition goes; what was in it does not come back.
        stage.database().query("DROP TABLE events_2026_01");
        std::fs::remove_dir_all(stage.folder().join("data")).unwrap();
        stage.run_until_idle();
        assert_eq!(stage.database().count(), 300);
    }
}

#[test]
fn delivery_waits_for_a_partition_that_is_missing_and_keeps_the_order() {
    let mut stage = Stage::new();
    stage.set("event_system.write_retry_delay_ms", "5").set("event_system.write_retry_max_delay_ms", "50");
    partition_events(stage.database(), "bigserial");
    let mut transcript = stage.transcript("-home-me-app", 1);
    let mut texts = say_in_month(&mut transcript, 2, 0..5);
    texts.extend(say_in_month(&mut transcript, 3, 0..1));
    texts.extend(say_in_month(&mut transcript, 2, 5..10));
    let watcher = stage.start();
    wait_until("it is paused", SOON, || watcher.health()["database"]["state"] == "misconfigured");
    let health = watcher.health();
    let error = health["database"]["last_error"].as_str().unwrap();
    assert!(error.contains("no partition of relation") && error.contains("create the partition"), "{health}");
    // Longer than any number of tries.
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert_eq!((&watcher.health()["queue"]["dead_letters"], stage.database().texts().len()), (&0.into(), 5));
    stage
        .database()
        .query("CREATE TABLE events_2026_03 PARTITION OF events FOR VALUES FROM ('2026-03-01Z') TO ('2026-04-01Z')");
    wait_until("all is stored", SOON, || stage.database().texts() == texts);
}

#[test]
fn receipts_partitioned_by_hash_refuse_copies_as_before() {
    let stage = Stage::new();
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    stage.database().query(
        "SET search_path = headspace_watcher;
         ALTER TABLE event_receipts RENAME TO plain;
         CREATE TABLE event_receipts (LIKE plain, PRIMARY KEY (event_id)) PARTITION BY HASH (event_id);
         CREATE TABLE event_receipts_0 PARTITION OF event_receipts FOR VALUES WITH (MODULUS 2, REMAINDER 0);
         CREATE TABLE event_receipts_1 PARTITION OF event_receipts FOR VALUES WITH (MODULUS 2, REMAINDER 1);
         DROP TABLE plain",
    );
    let mut transcript = stage.transcript("-home-me-app", 1);
    let texts = transcript.say_many("line", 500);
    let known = transcript.prompt("line 3");
    transcript.append(known + "\n");
    stage.run_until_idle();
    std::fs::remove_dir_all(stage.folder().join("data")).unwrap();
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), texts);
    assert_eq!(stage.database().value("SELECT count(*) FROM event_receipts WHERE seen_again_at IS NULL"), "0");
}

#[test]
fn watchers_of_one_database_are_told_apart_by_their_configured_host_names() {
    let database = Database::new();
    for host in ["pod-1", "pod-2"] {
        let mut stage = Stage::with(Some(database.clone()));
        stage.set("database.host_name", host);
        stage.set("claude.projects_path", "/nowhere");
        let ran =
            stage.run(&["emit", "--type", "session_ended", "--payload", r#"{"session_uuid":"s","reason":"closed"}"#]);
        assert_eq!(ran.code(), 0, "{}", ran.error());
        stage.run_until_idle();
    }
    let hosts = "SELECT string_agg(s.host, ' ' ORDER BY r.row_id) FROM event_receipts r JOIN event_sources s ON s.id = r.source_id";
    assert_eq!(database.value(hosts), "pod-1 pod-2");
}

#[test]
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn the_watcher_keeps_its_allocator_small_unless_it_was_told_otherwise() {
    for (given, expected) in [(None, "2"), (Some("4"), "4")] {
        let mut stage = Stage::with(None);
        stage.environment.extend(given.map(|arenas| ("MALLOC_ARENA_MAX".to_owned(), arenas.to_owned())));
        let watcher = stage.start();
        let environment = std::fs::read(format!("/proc/{}/environ", watcher.pid())).unwrap();
        let arenas = environment.split(|byte| *byte == 0).find_map(|line| line.strip_prefix(b"MALLOC_ARENA_MAX="));
        assert_eq!(arenas, Some(expected.as_bytes()));
        let (status, _) = watcher.stop();
        assert_eq!(status.code(), Some(0));
    }
}

#[test]
fn a_logical_subscriber_gets_each_row_once_and_in_order_though_both_servers_are_killed() {
    let (publisher, subscriber) = (Server::start(), Server::start());
    publisher.restart_with(&["wal_level = 'logical'"]);
    let stage = Stage::with(Some(publisher.database.clone()));
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    publisher.database.query("CREATE PUBLICATION headspace FOR TABLE events, event_receipts, event_sources");
    let copy = Stage::with(Some(subscriber.database.clone()));
    assert_eq!(copy.run(&["migrate"]).code(), 0);
    subscriber.database.query("ALTER SYSTEM SET wal_retrieve_retry_interval = '200ms'");
    subscriber.database.query("SELECT pg_reload_conf()");
    // In which order they arrive, as a consumer of changes sees them.
    subscriber.database.query("ALTER TABLE events ADD COLUMN arrival bigserial");
    let host = publisher.database.url.split(['?', '&']).find_map(|part| part.strip_prefix("host=")).unwrap();
    subscriber.database.query(&format!(
        "CREATE SUBSCRIPTION headspace CONNECTION 'host={host} user=headspace dbname=headspace' PUBLICATION headspace"
    ));
    let mut transcript = stage.transcript("-home-me-app", 1);
    let watcher = stage.start();
    let mut texts = Vec::new();
    for server in [&publisher, &subscriber] {
        texts.extend(transcript.say_many(&format!("round {}", texts.len()), 1000));
        let before = subscriber.database.count();
        wait_until("rows arrive", SOON, || subscriber.database.count() > before);
        server.kill();
        server.start_again();
    }
    texts.extend(transcript.say_many("at the end", 100));
    // One row more: the session's registration.
    wait_until("all have arrived", SOON * 2, || subscriber.database.count() == texts.len() as u64 + 1);
    assert_eq!(subscriber.database.texts(), texts, "{}", watcher.log());
    let disordered =
        "SELECT count(*) FROM (SELECT id, lag(id) OVER (ORDER BY arrival) AS before FROM events) e WHERE id < before";
    assert_eq!(subscriber.database.value(disordered), "0");
    let unmatched = "SELECT count(*) FROM events e FULL JOIN event_receipts r ON r.row_id = e.id
                      WHERE e.id IS NULL OR r.row_id IS NULL";
    wait_until("the receipts have arrived", SOON, || subscriber.database.value(unmatched) == "0");
}
