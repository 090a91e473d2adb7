//! Whatever keeps Postgres from taking events: they wait, and go on by themselves when it is over.
//!
//! Every outage is said once when it begins and once when it ends, with events coming in all the while; afterwards the
//! full set is compared.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::proxy::{Proxy, Road};
use crate::stage::{Database, SOON, Server, Stage, Watcher, Writer, lacks, rounds, wait_for, wait_until, when_busy};

/// How soon rows must come after the cause is gone.
const BACK_WITHIN: Duration = Duration::from_millis(2500);

/// A watcher with a stream of events.
struct Scene {
    stage: Stage,
    watcher: Watcher,
    writer: Writer,
}

impl Scene {
    /// The watcher reaches `database` through `url`.
    fn start(database: &Database, url: &str) -> Scene {
        let mut stage = Stage::with(Some(database.clone()));
        stage.environment.insert("DATABASE_URL".to_owned(), url.to_owned());
        stage.set("database.statement_timeout_ms", "1000");
        let watcher = stage.start();
        let writer = Writer::start(stage.transcript("-home-me-app", 1), Duration::from_millis(5));
        wait_until("the first rows", SOON, || database.count() > 20);
        Scene { stage, watcher, writer }
    }

    /// Begins the outage, waits until it is noticed, ends it, and waits for rows.
    #[track_caller]
    fn outage(&self, state: &str, begin: impl FnOnce(), end: impl FnOnce()) {
        let (warned, told) =
            (self.watcher.logged("events are queued"), self.watcher.logged("database reachable again"));
        let pending = || self.watcher.health()["queue"]["pending"].as_u64().unwrap();
        begin();
        wait_until("the outage is noticed", SOON, || self.watcher.health()["database"]["state"] == state);
        // Some more tries, so that what is said once could be said more often.
        let failed = self.watcher.health()["writes"]["failed"].as_u64().unwrap();
        wait_until("it tries again", SOON, || self.watcher.health()["writes"]["failed"].as_u64().unwrap() > failed + 1);
        let waiting = pending();
        wait_until("events come in meanwhile", SOON, || pending() > waiting);
        let before = self.watcher.health()["writes"]["last_write_timestamp"].clone();
        end();
        let over = Instant::now();
        wait_until("rows go on", SOON, || self.watcher.health()["writes"]["last_write_timestamp"] != before);
        assert!(over.elapsed() < when_busy(BACK_WITHIN), "after {:?}: {}", over.elapsed(), self.watcher.log());
        wait_until("it is up", SOON, || self.watcher.health()["database"]["state"] == "up");
        let warnings = self.watcher.logged("events are queued").split_off(warned.len());
        // On its way to `misconfigured` it may have been down: that is another state.
        let ways = if state == "misconfigured" { 1..=2 } else { 1..=1 };
        assert!(ways.contains(&warnings.len()), "said once: {warnings:?}");
        assert!(warnings.iter().all(|warning| warning["level"] == "WARN"));
        let back = self.watcher.logged("database reachable again").split_off(told.len());
        assert_eq!(back.len(), 1, "said once: {back:?}");
        assert!(back[0]["outage_seconds"].as_f64().unwrap() > 0.0, "{back:?}");
        assert!(back[0]["pending"].as_u64().unwrap() > 0, "it says how many waited: {back:?}");
        assert_eq!(back[0]["level"], "INFO");
    }

    /// The texts that were written and those that are in the table.
    fn finish(self) -> (Vec<String>, Vec<String>) {
        let written = self.writer.finish();
        wait_until("all is delivered", SOON, || self.watcher.has_settled(written.len() + 1));
        let database = self.stage.database();
        assert_eq!(database.value("SELECT count(*) FROM event_receipts"), database.count().to_string());
        (written, database.texts())
    }

    #[track_caller]
    fn finish_whole(self) {
        let (written, stored) = self.finish();
        assert_eq!(stored, written);
    }
}

/// Ends other sessions in this database.
fn terminate(database: &Database, which: &str) {
    database.query(&format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
          WHERE datname = current_database() AND pid <> pg_backend_pid() AND {which}"
    ));
}

/// A role without any right but those that the watcher needs in this database.
fn plain_role(database: &Database) -> (String, Database) {
    let role = format!("watcher_{}", uuid::Uuid::now_v7().simple());
    let name = database.value("SELECT current_database()");
    database.query(&format!(
        "CREATE ROLE {role} LOGIN; GRANT ALL ON SCHEMA public TO {role}; GRANT CREATE ON DATABASE {name} TO {role}"
    ));
    (role.clone(), Database::at(database.url.replace("user=headspace", &format!("user={role}"))))
}

#[test]
fn a_server_that_is_stopped_or_killed_is_waited_for() {
    let server = Server::start();
    let database = server.database.another();
    let scene = Scene::start(&database, &database.url);
    for mode in ["fast", "immediate"] {
        scene.outage("down", || server.stop(mode), || server.start_again());
    }
    scene.outage("down", || server.kill(), || server.start_again());
    scene.finish_whole();
}

#[test]
fn a_server_that_hangs_is_given_up_and_tried_anew() {
    let server = Server::start();
    let database = server.database.another();
    let scene = Scene::start(&database, &database.url);
    // Half a minute in a long run.
    let hung = Duration::from_secs(u64::from(rounds(1).min(30)));
    scene.outage(
        "down",
        || {
            server.pause(true);
            std::thread::sleep(hung);
        },
        || server.pause(false),
    );
    scene.finish_whole();
}

#[test]
fn a_session_that_is_ended_by_the_server_is_replaced() {
    let database = Database::new();
    let scene = Scene::start(&database, &database.url);
    for _ in 0..5 {
        let before = database.count();
        terminate(&database, "true");
        wait_until("rows go on", when_busy(BACK_WITHIN), || database.count() > before);
    }
    scene.finish_whole();
}

#[test]
fn a_backend_killed_hard_takes_the_server_down_and_nothing_with_it() {
    let server = Server::start();
    let database = server.database.another();
    let scene = Scene::start(&database, &database.url);
    // Right after such an end the server takes nobody in.
    let count = || {
        let answer = || database.try_query("SELECT count(*) FROM events").ok()?.pop()?.pop()?;
        wait_for("the server answers", SOON, answer).parse::<u64>().unwrap()
    };
    for _ in 0..2 {
        let before = count();
        // It may be just between two sessions.
        let own = "SELECT pid FROM pg_stat_activity
                    WHERE application_name = 'headspace-watcher' AND datname = current_database()";
        wait_until("its session is killed", SOON, || {
            let pid = database.try_query(own).ok().and_then(|mut rows| rows.pop()?.pop()?);
            pid.is_some_and(|pid| Command::new("kill").args(["-9", &pid]).status().unwrap().success())
        });
        wait_until("rows go on", SOON, || count() > before);
    }
    scene.finish_whole();
}

#[test]
fn a_road_that_swallows_everything_is_given_up_and_tried_anew() {
    let database = Database::new();
    let proxy = Proxy::start(&database);
    let scene = Scene::start(&database, &proxy.url());
    scene.outage("down", || proxy.set(Road::Swallows), || proxy.set(Road::Open));
    scene.finish_whole();
}

#[test]
fn a_road_that_is_closed_is_tried_until_it_opens() {
    let database = Database::new();
    let proxy = Proxy::start(&database);
    let scene = Scene::start(&database, &proxy.url());
    scene.outage("down", || proxy.set(Road::Closed), || proxy.set(Road::Open));
    scene.finish_whole();
}

#[test]
fn a_slow_road_only_slows() {
    let database = Database::new();
    let proxy = Proxy::start(&database);
    let scene = Scene::start(&database, &proxy.url());
    proxy.set(Road::Slow(Duration::from_millis(15)));
    let before = database.count();
    wait_until("rows go on", SOON, || database.count() > before + 20);
    proxy.set(Road::Open);
    assert!(scene.watcher.logged("events are queued").is_empty());
    scene.finish_whole();
}

#[test]
fn too_many_connections_are_waited_out() {
    let database = Database::new();
    let (role, plain) = plain_role(&database);
    let scene = Scene::start(&database, &plain.url);
    let limit = |limit: i32| database.query(&format!("ALTER ROLE {role} CONNECTION LIMIT {limit}"));
    scene.outage(
        "down",
        || {
            limit(0);
            terminate(&database, "true");
        },
        || drop(limit(-1)),
    );
    scene.finish_whole();
}

#[test]
fn a_server_without_free_connections_is_waited_for() {
    let server = Server::start();
    server.restart_with(&["max_connections = 12"]);
    let database = server.database.another();
    let (_, plain) = plain_role(&database);
    let scene = Scene::start(&database, &plain.url);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let mut taken = Vec::new();
    let mut without = 0;
    scene.outage(
        "down",
        || {
            terminate(&database, "true");
            // Who comes first gets a place that has become free: tried until the watcher is left without.
            wait_until("all places are taken", SOON, || {
                terminate(&database, "application_name = 'headspace-watcher'");
                while let Ok((client, connection)) =
                    runtime.block_on(tokio_postgres::connect(&plain.url, tokio_postgres::NoTls))
                {
                    runtime.spawn(connection);
                    taken.push(client);
                }
                let own = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'headspace-watcher'";
                // A session that was ended gives its place back a little later: only a while without one counts.
                without = if taken.len() >= 8 && database.value(own) == "0" { without + 1 } else { 0 };
                without > 20
            });
        },
        || terminate(&database, "application_name = ''"),
    );
    scene.finish_whole();
}

#[test]
fn a_standby_is_waited_for_until_it_is_promoted() {
    let server = Server::start();
    let database = server.database.another();
    let scene = Scene::start(&database, &database.url);
    scene.outage(
        "down",
        || {
            server.stop("fast");
            std::fs::write(server.data().join("standby.signal"), "").unwrap();
            server.start_again();
            assert_eq!(database.value("SELECT pg_is_in_recovery()"), "t");
        },
        || drop(database.query("SELECT pg_promote()")),
    );
    scene.finish_whole();
}

#[test]
fn a_read_only_database_is_waited_for() {
    let database = Database::new();
    let name = database.value("SELECT current_database()");
    let elsewhere = Database::new();
    let scene = Scene::start(&database, &database.url);
    scene.outage(
        "down",
        || {
            elsewhere.query(&format!("ALTER DATABASE {name} SET default_transaction_read_only = on"));
            terminate(&database, "true");
        },
        || drop(elsewhere.query(&format!("ALTER DATABASE {name} RESET default_transaction_read_only"))),
    );
    scene.finish_whole();
}

/// A socket in `folder` that hands on to that of the server in `to`, so many bytes a second.
fn slow_way(to: &Path, folder: &Path, bytes_per_second: usize) {
    const NAME: &str = ".s.PGSQL.5432";
    let listener = UnixListener::bind(folder.join(NAME)).unwrap();
    let to = to.join(NAME);
    // It ends with the process of the test.
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, mut server) = (client.unwrap(), UnixStream::connect(&to).unwrap());
            let (mut back, mut answers) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut answers, &mut back));
            std::thread::spawn(move || {
                let mut piece = vec![0; bytes_per_second / 50];
                while let Ok(read @ 1..) = client.read(&mut piece) {
                    std::thread::sleep(Duration::from_secs(1).mul_f64(read as f64 / bytes_per_second as f64));
                    if server.write_all(&piece[..read]).is_err() {
                        break;
                    }
                }
                let _ = server.shutdown(std::net::Shutdown::Both);
            });
        }
    });
}

#[test]
fn a_slow_way_to_the_server_is_no_server_that_does_not_answer() {
    let database = Database::new();
    let mut stage = Stage::with(Some(database.clone()));
    let server = database.url.split(['?', '&']).find_map(|part| part.strip_prefix("host=")).unwrap();
    slow_way(Path::new(server), stage.folder(), 256 << 10);
    let url = database.url.replace(server, stage.folder().to_str().unwrap());
    stage.environment.insert("DATABASE_URL".to_owned(), url);
    // All of it takes longer than a statement may.
    stage.set("database.statement_timeout_ms", "2000");
    let long = "x".repeat(15_000);
    let texts = stage.transcript("-home-me-app", 1).say_many(&long, 60);
    let watcher = stage.start();
    stage.wait_for_rows(61);
    assert_eq!(database.texts(), texts);
    assert!(watcher.logged("database unavailable").is_empty(), "{}", watcher.log());
}

#[test]
fn a_locked_table_is_waited_for() {
    let database = Database::new();
    let scene = Scene::start(&database, &database.url);
    let (release, released) = mpsc::channel::<()>();
    let (locked, lock) = mpsc::channel::<()>();
    let (url, held) = (database.url.clone(), Duration::from_secs(u64::from(rounds(1).min(60))));
    let holder = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let (client, connection) = runtime.block_on(tokio_postgres::connect(&url, tokio_postgres::NoTls)).unwrap();
        runtime.spawn(connection);
        runtime.block_on(client.batch_execute("BEGIN; LOCK TABLE events IN ACCESS EXCLUSIVE MODE")).unwrap();
        locked.send(()).unwrap();
        released.recv().unwrap();
        runtime.block_on(client.batch_execute("COMMIT")).unwrap();
    });
    scene.outage(
        "down",
        || lock.recv().unwrap(),
        || {
            std::thread::sleep(held);
            wait_until("health names who holds the lock", SOON, || {
                let health = scene.watcher.health();
                let error = health["database"]["last_error"].as_str().unwrap_or_default();
                error.contains("idle in transaction for") && error.contains("holds AccessExclusiveLock on events")
            });
            release.send(()).unwrap();
            holder.join().unwrap();
        },
    );
    scene.finish_whole();
}

#[test]
fn a_statement_timeout_of_the_role_is_not_taken_for_an_outage() {
    let database = Database::new();
    let (role, plain) = plain_role(&database);
    database.query(&format!("ALTER ROLE {role} SET statement_timeout = '1ms'"));
    let scene = Scene::start(&database, &plain.url);
    database.query(
        "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN PERFORM pg_sleep(0.005); RETURN NEW; END $$;
         CREATE TRIGGER dawdle BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION dawdle()",
    );
    let before = database.count();
    wait_until("rows go on", SOON, || database.count() > before + 50);
    assert!(scene.watcher.logged("events are queued").is_empty(), "{}", scene.watcher.log());
    scene.finish_whole();
}

#[test]
fn a_database_that_was_dropped_and_made_anew_gets_what_came_since() {
    let database = Database::new();
    let name = database.value("SELECT current_database()");
    let elsewhere = Database::new();
    let scene = Scene::start(&database, &database.url);
    scene.outage(
        "misconfigured",
        || drop(elsewhere.query(&format!("DROP DATABASE {name} WITH (FORCE)"))),
        || drop(elsewhere.query(&format!("CREATE DATABASE {name}"))),
    );
    let (written, stored) = scene.finish();
    assert!(!stored.is_empty() && written.ends_with(&stored), "{} of {}", stored.len(), written.len());
}

#[test]
fn tables_that_were_dropped_are_made_anew_and_their_sources_too() {
    let database = Database::new();
    let scene = Scene::start(&database, &database.url);
    // It may meet the drainer in a deadlock, which Postgres ends by refusing one of the two.
    let drop_tables = || database.try_query("DROP TABLE events, event_receipts, event_sources").is_ok();
    wait_until("the tables are dropped", SOON, drop_tables);
    wait_until("rows come again", SOON, || database.count() > 20);
    database.query(
        "TRUNCATE event_sources RESTART IDENTITY; INSERT INTO event_sources (host, path) VALUES ('else', 'where')",
    );
    let stale = "SELECT count(*) FROM event_receipts WHERE source_id = 1";
    let before = database.value(stale);
    let rows = database.count();
    wait_until("rows go on", SOON, || database.count() > rows + 20);
    assert_eq!(database.value(stale), before, "receipts name a source that is not theirs");
    let (written, stored) = scene.finish();
    assert!(!stored.is_empty() && written.ends_with(&stored), "{} of {}", stored.len(), written.len());
}

#[test]
fn a_full_disk_of_the_server_is_waited_out() {
    let folder = tempfile::Builder::new().prefix("hw-disk").tempdir().unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=24m,mode=0777", "tmpfs"]).arg(folder.path());
    if lacks("the right to mount", mount.output().is_ok_and(|output| output.status.success())) {
        return;
    }
    struct Mounted<'a>(&'a Path);
    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").args(["-l".as_ref(), self.0.as_os_str()]).status();
        }
    }
    let _mounted = Mounted(folder.path());
    let server = Server::start();
    let disk = folder.path().join("space");
    std::fs::create_dir(&disk).unwrap();
    let owner = std::fs::metadata(server.data()).unwrap();
    std::os::unix::fs::chown(&disk, Some(std::os::unix::fs::MetadataExt::uid(&owner)), None).unwrap();
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let database = server.database.another();
    database.query(&format!("CREATE TABLESPACE small LOCATION '{}'", disk.display()));
    database.query(&format!(
        "CREATE TABLE events (id serial PRIMARY KEY, timestamp timestamptz NOT NULL, project_id int, agent_id int,
         command_id int, turn_id int, event_type varchar(50) NOT NULL, payload jsonb, ballast text DEFAULT repeat('x', {}))
         TABLESPACE small",
        1900
    ));
    let scene = Scene::start(&database, &database.url);
    let ballast = folder.path().join("ballast");
    scene.outage(
        "down",
        || {
            let _ =
                Command::new("dd").args(["if=/dev/zero", "bs=4096"]).arg(format!("of={}", ballast.display())).output();
        },
        || std::fs::remove_file(&ballast).unwrap(),
    );
    let error = scene.watcher.logged("events are queued")[0]["error"].as_str().unwrap().to_owned();
    assert!(error.contains("53100"), "{error}");
    scene.finish_whole();
}

/// The connection is cut before the n-th answer of a window, whose transaction has been done: for every n.
fn cut_at_every_answer(window: &str, lines: u32) {
    let database = Database::new();
    let proxy = Proxy::start(&database);
    let mut stage = Stage::with(Some(database.clone()));
    stage.environment.insert("DATABASE_URL".to_owned(), proxy.url());
    stage.set("queue.drain_window", window);
    stage.set("event_system.write_retry_delay_ms", "10").set("event_system.write_retry_max_delay_ms", "50");
    let mut transcript = stage.transcript("-home-me-app", 1);
    let mut texts = transcript.say_many("first", 1);
    let watcher = stage.start();
    stage.wait_for_rows(2);
    for count in 1..=lines {
        proxy.set(Road::CutAfter(u64::from(count)));
        texts.extend(transcript.say_many(&format!("cut at {count} line"), lines));
        wait_until("the connection is cut", SOON, || proxy.cuts() == u64::from(count));
        wait_until("the queue is empty", SOON, || watcher.has_settled(texts.len() + 1));
    }
    assert_eq!(database.texts(), texts);
    assert_eq!(database.value("SELECT count(*) FROM event_receipts"), database.count().to_string());
}

#[test]
fn a_connection_cut_between_a_commit_and_its_answer_doubles_and_loses_nothing() {
    cut_at_every_answer("256", 12);
}

#[test]
fn a_connection_cut_among_small_windows_doubles_and_loses_nothing() {
    cut_at_every_answer("4", 12);
}

#[test]
fn a_database_away_from_the_start_is_said_once_with_its_cause() {
    let mut stage = Stage::with(None);
    stage.environment.insert("DATABASE_URL".to_owned(), "postgresql://me@127.0.0.1:1/nothing".to_owned());
    let watcher = stage.start();
    let error = wait_for("the cause", SOON, || watcher.health()["database"]["last_error"].as_str().map(str::to_owned));
    assert!(error.contains("127.0.0.1:1") && error.contains("refused"), "{error}");
    let captured = stage.transcript("-home-me-app", 1).say_many("line", 5);
    wait_until("lines are captured", SOON, || watcher.health()["queue"]["pending"] == captured.len() + 1);
    assert_eq!(watcher.logged("events are queued").len(), 1);
}
