//! The program's own tables and routines: in a schema of their own, taken over from where an earlier version kept them; and whose
//! an event is.

use std::process::Command;

use crate::stage::{Database, SOON, Stage, lacks, wait_until};

/// As the first version made them, beside the events.
const FIRST_VERSION: &str = "
    CREATE TABLE public.event_receipts (event_id uuid PRIMARY KEY, row_id bigint NOT NULL, source_id integer NOT NULL,
      byte_offset bigint, captured_at timestamptz NOT NULL, delivered_at timestamptz NOT NULL, seen_again_at timestamptz);
    CREATE TABLE public.event_sources (id serial PRIMARY KEY, host text NOT NULL, path text NOT NULL, UNIQUE (host, path));
    INSERT INTO public.event_sources (id, host, path) SELECT id + 100, host, path FROM headspace_watcher.event_sources;
    INSERT INTO public.event_receipts SELECT event_id, row_id, source_id + 100, byte_offset, captured_at, delivered_at,
      seen_again_at FROM headspace_watcher.event_receipts";

const PLACES: &str =
    "SELECT string_agg(event_id || ' ' || row_id || ' ' || host || path || byte_offset, ';' ORDER BY event_id)
    FROM headspace_watcher.event_receipts r JOIN headspace_watcher.event_sources s ON s.id = r.source_id";

/// A database with so many turns delivered, their receipts as the first version kept them; and what these say.
fn first_version(lines: u32) -> (Stage, Vec<String>, String) {
    let stage = Stage::new();
    let texts = stage.transcript("-home-me-app", 1).say_many("line", lines);
    stage.run_until_idle();
    let places = stage.database().value(PLACES);
    stage.database().query(FIRST_VERSION);
    (stage, texts, places)
}

/// All of the transcripts is sent again, and nothing is stored again.
fn assert_known(stage: &Stage, texts: &[String]) {
    std::fs::remove_dir_all(stage.folder().join("data")).unwrap();
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), texts);
}

#[test]
fn receipts_of_the_first_version_are_taken_over() {
    let (stage, texts, places) = first_version(50);
    stage.database().query("DROP SCHEMA headspace_watcher CASCADE");
    let checked = stage.run(&["check"]);
    assert!(
        checked.output().contains("public.event_receipts, which belong into headspace_watcher"),
        "{}",
        checked.output()
    );
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    assert_eq!(stage.database().value(PLACES), places);
    let left = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'";
    assert_eq!(stage.database().value(left), "1", "only the events");
    assert_known(&stage, &texts);
}

#[test]
fn receipts_in_both_places_are_put_together() {
    // As after a watcher of the first version went on beside a newer one, which had taken its tables over.
    let (stage, texts, places) = first_version(50);
    stage.database().query(
        "DELETE FROM headspace_watcher.event_receipts WHERE row_id % 3 = 0;
         DELETE FROM public.event_receipts WHERE row_id % 3 = 1",
    );
    assert_known(&stage, &texts);
    assert_eq!(stage.database().value(PLACES), places);
}

#[test]
fn a_ledger_beside_the_events_gets_wide_ids() {
    let (mut stage, texts, _) = first_version(20);
    stage.database().query("DROP SCHEMA headspace_watcher CASCADE");
    stage.set("database.ledger_schema", "public");
    assert_known(&stage, &texts);
    let narrow =
        "SELECT count(*) FROM information_schema.columns WHERE table_schema = 'public' AND data_type = 'integer'
                    AND table_name LIKE 'event\\_%'";
    assert_eq!(stage.database().value(narrow), "0");
    assert_eq!(stage.run(&["migrate"]).output(), "nothing to do: everything is there\n");
}

#[test]
fn migrate_removes_routines_of_other_versions_and_a_watcher_that_starts_does_not() {
    let mut stage = Stage::new();
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    let routines = "SELECT count(*) FROM pg_proc WHERE pronamespace = 'headspace_watcher'::regnamespace";
    stage.set("database.notify_channel", "news");
    stage.transcript("-home-me-app", 1).say("hello");
    stage.run_until_idle();
    assert_eq!(stage.database().value(routines), "8");
    stage.database().query("CREATE FUNCTION headspace_watcher.store_mine() RETURNS int LANGUAGE sql AS 'SELECT 1'");
    let ran = stage.run(&["migrate"]);
    assert!(ran.output().contains("removed source_"), "{}", ran.output());
    assert_eq!(stage.database().value(routines), "6");
}

#[test]
fn views_show_turns_and_sessions_and_hold_nothing_fast() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("hello");
    let answer = transcript.answer("hi");
    transcript.append(answer + "\n");
    stage.run_until_idle();
    let database = stage.database();
    let session = &transcript.session;
    let turns = "SELECT concat_ws(' ', session, project, actor, kind, text) FROM headspace_watcher.turns ORDER BY time, actor DESC";
    let said = |rows: Vec<Vec<Option<String>>>| rows.into_iter().flatten().flatten().collect::<Vec<_>>();
    assert_eq!(
        said(database.query(turns)),
        [format!("{session} /home/me/app user prompt hello"), format!("{session} /home/me/app agent hi")]
    );
    let sessions = "SELECT concat_ws(' ', session, project, turns, began <= last_activity, ended IS NULL, reason)
                      FROM headspace_watcher.sessions";
    assert_eq!(database.value(sessions), format!("{session} /home/me/app 2 t t"));
    let end = format!(r#"{{"session_uuid":"{session}","reason":"closed"}}"#);
    let ran = stage.run(&["emit", "--type", "session_ended", "--payload", &end, "--timestamp", "2999-01-01T00:00:00Z"]);
    assert_eq!(ran.code(), 0, "{}", ran.error());
    stage.run_until_idle();
    assert_eq!(database.value(sessions), format!("{session} /home/me/app 2 t f closed"));

    // Conditions reach the table; and its owner may do with it what he likes.
    let plan = database.query("EXPLAIN SELECT * FROM headspace_watcher.turns WHERE session = 'x'");
    assert!(format!("{plan:?}").contains("events"), "the function is inlined: {plan:?}");
    database
        .query("ALTER TABLE events ALTER event_type TYPE varchar(60); ALTER TABLE events RENAME project_id TO project");
    database.query("DROP TABLE events");
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    assert_eq!(database.value("SELECT count(*) FROM headspace_watcher.turns"), "0");
}

#[test]
fn a_table_of_others_with_the_name_of_a_view_is_left_alone() {
    let mut stage = Stage::new();
    stage.set("database.ledger_schema", "public");
    stage.database().query("CREATE TABLE turns (id serial PRIMARY KEY, mine text)");
    let texts = stage.transcript("-home-me-app", 1).say_many("line", 3);
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), texts);
    assert_eq!(stage.run(&["migrate"]).output(), "nothing to do: everything is there\n");
    assert_eq!(stage.database().value("SELECT count(*) FROM pg_views WHERE schemaname = 'public'"), "0");
}

/// The tables of Claude Headspace, as its migrations make them, as far as events refer to them.
const HEADSPACE: &str = "
    CREATE TABLE projects (id serial PRIMARY KEY, name varchar(255) NOT NULL, path varchar(1024) NOT NULL UNIQUE);
    CREATE TABLE agents (id serial PRIMARY KEY, session_uuid uuid NOT NULL UNIQUE, claude_session_id varchar(255),
      project_id integer NOT NULL REFERENCES projects (id) ON DELETE CASCADE);
    CREATE INDEX ON agents (claude_session_id);
    ALTER TABLE events ADD FOREIGN KEY (project_id) REFERENCES projects (id) ON DELETE SET NULL,
                       ADD FOREIGN KEY (agent_id) REFERENCES agents (id) ON DELETE SET NULL";

/// A stage on such tables, with a session of a project and an agent that are known.
fn headspace() -> Stage {
    let stage = Stage::new();
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    let transcript = stage.transcript("-home-me-app", 1);
    stage.database().query(HEADSPACE);
    stage.database().query(&format!(
        "INSERT INTO projects (id, name, path) VALUES (3, 'app', '/home/me/app'), (4, 'other', '/home/me/other');
         INSERT INTO agents (id, session_uuid, claude_session_id, project_id)
         VALUES (6, gen_random_uuid(), '{0}', 3), (7, gen_random_uuid(), '{0}', 3)",
        transcript.session
    ));
    stage
}

const OWNERS: &str =
    "SELECT string_agg(DISTINCT coalesce(project_id, 0) || ' ' || coalesce(agent_id, 0), ', ') FROM events";

#[test]
fn rows_say_whose_they_are_where_the_tables_tell() {
    let stage = headspace();
    stage.transcript("-home-me-app", 1).say_many("line", 30);
    stage.run_until_idle();
    assert_eq!(stage.database().value(OWNERS), "3 7");
    // What the caller says holds; what nothing is known of stays open.
    stage.database().query("DELETE FROM events");
    let _watcher = stage.start();
    let session = stage.transcript("-home-me-app", 1).session;
    for (session, more) in [(&*session, vec!["--project-id", "4"]), ("strange", vec![])] {
        let payload =
            format!(r#"{{"session_uuid":"{session}","reason":"closed","duration_seconds":{}}}"#, session.len());
        let ran = stage.run(&[vec!["emit", "--type", "session_ended", "--payload", &payload], more].concat());
        assert_eq!(ran.code(), 0, "{}", ran.error());
    }
    stage.wait_for_rows(2);
    assert_eq!(stage.database().value(OWNERS), "0 0, 4 7");
}

#[test]
fn a_role_that_may_make_nothing_goes_on_when_tables_of_owners_appear() {
    let mut stage = Stage::new();
    let role = format!("watcher_{}", crate::stage::unique());
    let owner = stage.database().clone();
    owner.query(&format!("CREATE ROLE {role} LOGIN"));
    let url = owner.url.replace("user=headspace", &format!("user={role}"));
    stage.environment.insert("DATABASE_URL".to_owned(), url);
    stage.set("database.events_table", "Ereignisse");
    let printed = stage.run(&["migrate", "--print"]);
    owner.query(&printed.output());
    let told = |text: &str| {
        stage.transcript("-home-me-app", 1).say(text);
        let count = "SELECT count(*) FROM \"Ereignisse\" WHERE event_type = 'turn_detected'";
        let before = owner.value(count);
        stage.run_until_idle();
        assert_ne!(owner.value(count), before);
    };
    told("before");
    owner.query("CREATE TABLE projects (id serial PRIMARY KEY, path text); GRANT SELECT ON projects TO PUBLIC");
    told("after");
    // The owner's own migration leaves the routines of those who may not ask.
    let mut owners = Stage::with(Some(owner.clone()));
    owners.set("database.events_table", "Ereignisse");
    assert_eq!(owners.run(&["migrate"]).code(), 0);
    owner.query("REVOKE SELECT ON projects FROM PUBLIC");
    told("and still");
}

#[test]
fn receipts_are_taken_over_whole_whatever_isolation_is_the_default() {
    let (stage, texts, places) = first_version(20);
    stage.database().query("DROP SCHEMA headspace_watcher CASCADE");
    let database = stage.database().value("SELECT current_database()");
    stage.database().query(&format!("ALTER DATABASE {database} SET default_transaction_isolation = 'repeatable read'"));
    // One more comes while the takeover waits for the table.
    let held = stage.database().clone();
    let holder = std::thread::spawn(move || {
        held.query(
            "BEGIN; SET LOCAL search_path = public;
             INSERT INTO event_receipts SELECT gen_random_uuid(), 4711, min(id), 0, now(), now() FROM event_sources;
             SELECT pg_sleep(2); COMMIT",
        )
    });
    wait_until("it is held", SOON, || {
        stage.database().value(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()",
        ) != "0"
    });
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    holder.join().unwrap();
    assert_eq!(
        stage.database().value("SELECT count(*) FROM headspace_watcher.event_receipts WHERE row_id = 4711"),
        "1"
    );
    assert!(stage.database().value(PLACES).len() > places.len());
    assert_known(&stage, &texts);
}

#[test]
fn an_owner_that_goes_away_meanwhile_holds_no_event_up() {
    let stage = headspace();
    // Between the look at the agents and the row's reference to one.
    stage.database().query(
        "CREATE FUNCTION go() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
           IF NEW.agent_id IS NOT NULL THEN DELETE FROM agents; END IF; RETURN NEW; END $$;
         CREATE TRIGGER go BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION go()",
    );
    let texts = stage.transcript("-home-me-app", 1).say_many("line", 30);
    let watcher = stage.start();
    stage.wait_for_rows(31);
    assert_eq!(stage.database().texts(), texts);
    assert_eq!(stage.database().value(OWNERS), "0 0");
    assert!(watcher.logged("refused an event").is_empty(), "{}", watcher.log());
    assert_eq!(watcher.health()["queue"]["dead_letters"], 0);
}

#[test]
fn a_trigger_that_drops_rows_pauses_delivery_and_one_that_moves_them_does_not() {
    let stage = Stage::new();
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    stage.database().query(
        "CREATE FUNCTION filter() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
         CREATE TRIGGER filter BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION filter()",
    );
    let texts = stage.transcript("-home-me-app", 1).say_many("line", 30);
    let watcher = stage.start();
    wait_until("health names the trigger", SOON, || {
        let health = watcher.health();
        let error = health["database"]["last_error"].as_str().unwrap_or_default();
        health["database"]["state"] == "misconfigured"
            && error.contains("a trigger on \"public\".\"events\" drops rows")
    });
    assert_eq!(watcher.health()["queue"]["dead_letters"], 0);
    assert_eq!(stage.database().value("SELECT count(*) FROM event_receipts"), "0");
    // Partitions by inheritance, as they were before Postgres had its own.
    stage.database().query(
        "CREATE TABLE part () INHERITS (events);
         CREATE OR REPLACE FUNCTION filter() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
           INSERT INTO part SELECT NEW.*; RETURN NULL; END $$",
    );
    stage.wait_for_rows(31);
    assert_eq!(stage.database().texts(), texts);
    wait_until("it is up", SOON, || watcher.health()["database"]["state"] == "up");
}

#[test]
fn an_event_that_is_refused_when_it_commits_is_set_aside_like_any_other() {
    let mut stage = Stage::new();
    stage.set("event_system.write_retry_delay_ms", "10").set("event_system.write_retry_max_delay_ms", "50");
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    stage.database().query(
        "CREATE TABLE turns (id integer PRIMARY KEY);
         ALTER TABLE events ADD FOREIGN KEY (turn_id) REFERENCES turns DEFERRABLE INITIALLY DEFERRED",
    );
    let payload = |number: u32| format!(r#"{{"session_uuid":"session {number}","reason":"closed"}}"#);
    let line = |number: u32| {
        let turn = if number % 10 == 9 { r#","turn_id":7"# } else { "" };
        format!(r#"{{"event_type":"session_ended","payload":{}{turn}}}"#, payload(number)) + "\n"
    };
    // In a window of many, and alone.
    let watcher = stage.start();
    let lines: String = (0..40).map(line).collect();
    assert_eq!(stage.run_with_input(&["emit", "--ndjson"], lines).code(), 0);
    stage.wait_for_rows(36);
    assert_eq!(stage.run_with_input(&["emit", "--ndjson"], line(49)).code(), 0);
    wait_until("five are set aside", SOON, || watcher.health()["queue"]["dead_letters"] == 5);
    wait_until("nothing waits", SOON, || watcher.health()["queue"]["pending"] == 0);
    assert_eq!(stage.database().count(), 36);
}

/// A project of Alembic's with a table `events`, and nothing of ours.
const ALEMBIC: &str = r#"
import sys
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.migration import MigrationContext
from sqlalchemy import Column, DateTime, Index, Integer, MetaData, String, Table, create_engine
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData()
Table("events", metadata, Column("id", Integer, primary_key=True),
      Column("timestamp", DateTime(timezone=True), nullable=False), Column("project_id", Integer), Column("agent_id", Integer),
      Column("command_id", Integer), Column("turn_id", Integer), Column("event_type", String(50), nullable=False),
      Column("payload", JSONB))
engine = create_engine("postgresql+psycopg://", connect_args={"conninfo": sys.argv[1]})
with engine.connect() as connection:
    context = MigrationContext.configure(connection, opts={"target_metadata": metadata})
    print(render_python_code(produce_migrations(context, metadata).upgrade_ops))
"#;

#[test]
fn a_migration_that_alembic_generates_does_not_mention_what_is_ours() {
    let python = std::env::var("HEADSPACE_TEST_ALEMBIC").unwrap_or_else(|_| "python3".to_owned());
    let there = Command::new(&python).args(["-c", "import alembic, sqlalchemy, psycopg"]).output();
    // HEADSPACE_TEST_ALEMBIC may name a python3 that has them.
    if lacks("alembic, sqlalchemy and psycopg", there.is_ok_and(|there| there.status.success())) {
        return;
    }
    let generated = |database: &Database| {
        let ran = Command::new(&python).args(["-c", ALEMBIC, &database.url]).output().unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8(ran.stdout).unwrap()
    };
    let stage = Stage::new();
    stage.transcript("-home-me-app", 1).say("hello");
    stage.run_until_idle();
    let code = generated(stage.database());
    assert!(
        !code.contains("event_receipts") && !code.contains("event_sources") && !code.contains("drop_table"),
        "{code}"
    );
    // Beside the events it takes them for tables that were removed.
    stage.database().query(FIRST_VERSION);
    assert!(generated(stage.database()).contains("drop_table('event_receipts')"));
}
