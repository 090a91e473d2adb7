//! What stands between us and Postgres, and who else uses it: poolers, standbys, the table's owner, other watchers.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use crate::stage::{Database, SOON, Server, Stage, Writer, is_root, lacks, wait_until};

/// PgBouncer in front of a database.
pub struct Pooler {
    child: Child,
    folder: tempfile::TempDir,
    pub database: Database,
}

impl Pooler {
    /// `None`, said aloud, where there is no PgBouncer.
    pub fn start(database: &Database, settings: &str) -> Option<Pooler> {
        let program = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer", "/opt/homebrew/bin/pgbouncer"]
            .map(PathBuf::from)
            .into_iter()
            .find(|path| path.exists());
        lacks("pgbouncer", program.is_some());
        let program = program?;
        static NEXT: AtomicU8 = AtomicU8::new(0);
        let folder = tempfile::Builder::new().prefix("hw-pool").tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let server = database.url.split(['?', '&']).find_map(|part| part.strip_prefix("host=")).unwrap();
        let port = 20_000 + u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        std::fs::write(folder.path().join("users.txt"), "\"headspace\" \"\"\n").unwrap();
        let config = folder.path().join("pgbouncer.ini");
        let text = format!(
            "[databases]\n* = host={server} port=5432 user=headspace\n[pgbouncer]\nlisten_port = {port}\n\
             unix_socket_dir = {folder}\nauth_type = any\nauth_file = {folder}/users.txt\n\
             logfile = {folder}/log\npidfile = {folder}/pid\ndefault_pool_size = 4\nserver_round_robin = 1\n{settings}\n",
            folder = folder.path().display(),
        );
        std::fs::write(&config, text).unwrap();
        // It does not run as root; the user that runs the server may also reach the server's socket.
        let mut command = match std::env::var("HEADSPACE_TEST_PG_USER") {
            Ok(user) => {
                let mut command = Command::new("setpriv");
                command.args(["--reuid", &user, "--clear-groups", "--"]).arg(program);
                command
            }
            Err(_) if is_root() => {
                let mut command = Command::new("setpriv");
                command.args(["--reuid", "postgres", "--clear-groups", "--"]).arg(program);
                command
            }
            Err(_) => Command::new(program),
        };
        let child = command.arg(&config).stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let url = database.url.replace(server, folder.path().to_str().unwrap());
        let url = url.replace("port=5432", &format!("port={port}"));
        let pooler = Pooler { child, folder, database: Database::at(url) };
        wait_until("the pooler answers", SOON, || pooler.database.try_query("SELECT 1").is_ok());
        Some(pooler)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Events flow through the pooler, exactly once and in order, also while its server connections are cut.
fn flows_through(settings: &str) {
    let database = Database::new();
    let Some(pooler) = Pooler::start(&database, settings) else { return };
    let mut stage = Stage::with(Some(database.clone()));
    stage.environment.insert("DATABASE_URL".to_owned(), pooler.database.url.clone());
    let watcher = stage.start();
    let writer = Writer::start(stage.transcript("-home-me-app", 1), Duration::from_millis(3));
    // Others use the pool too, so that our transactions come to different server connections.
    for _ in 0..3 {
        let before = database.count();
        wait_until("rows go on", SOON, || {
            let _ = pooler.database.try_query("BEGIN; SELECT pg_sleep(0.002); COMMIT");
            database.count() > before + 60
        });
        database.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
              WHERE datname = current_database() AND pid <> pg_backend_pid()",
        );
    }
    let mut texts = writer.finish();
    wait_until("all is delivered", SOON, || watcher.has_settled(texts.len() + 1));
    texts.extend(stage.transcript("-home-me-app", 2).say_many("backlog", 300));
    wait_until("all is delivered", SOON, || watcher.has_settled(texts.len() + 2));
    assert_eq!(database.texts(), texts, "{} {}", watcher.log(), pooler.log());
    assert_eq!(database.value("SELECT count(*) FROM event_receipts"), database.count().to_string());
    assert_eq!(watcher.health()["queue"]["dead_letters"], 0);
    // Nothing of ours is left in the server connections for whoever gets them next.
    assert_eq!(pooler.database.value("SHOW statement_timeout"), "0");
    for setting in ["synchronous_commit", "enable_seqscan", "client_min_messages"] {
        let default = format!("SELECT setting = reset_val FROM pg_settings WHERE name = '{setting}'");
        assert_eq!(pooler.database.value(&default), "t", "{setting}");
    }
}

#[test]
fn a_statement_that_is_given_up_does_pgbouncer_no_harm() {
    for mode in ["session", "transaction"] {
        let database = Database::new();
        let Some(pooler) = Pooler::start(&database, &format!("pool_mode = {mode}")) else { return };
        let mut stage = Stage::with(Some(database.clone()));
        stage.environment.insert("DATABASE_URL".to_owned(), pooler.database.url.clone());
        stage.set("database.statement_timeout_ms", "300");
        assert_eq!(stage.run(&["migrate"]).code(), 0);
        let watcher = stage.start();
        std::thread::scope(|scope| {
            // Until it is ended below.
            scope.spawn(|| database.try_query("BEGIN; LOCK TABLE events; SELECT pg_sleep(60); COMMIT"));
            wait_until("the table is locked", SOON, || {
                database.value("SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND relation = 'events'::regclass") != "0"
            });
            stage.transcript("-home-me-app", 1).say("held up");
            wait_until("it is given up", SOON, || watcher.health()["writes"]["failed"].as_u64().unwrap() > 1);
            database
                .query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'BEGIN; LOCK TABLE%'");
        });
        wait_until("it is delivered", SOON, || database.texts() == ["held up"]);
        assert!(!pooler.log().contains("FATAL"), "{}", pooler.log());
    }
}

#[test]
fn events_flow_through_pgbouncer_in_session_mode() {
    flows_through("pool_mode = session");
}

#[test]
fn events_flow_through_pgbouncer_in_transaction_mode() {
    flows_through("pool_mode = transaction");
}

#[test]
fn events_flow_through_pgbouncer_in_transaction_mode_that_hides_itself() {
    // It takes the startup options and passes them over, so only lost statements give it away.
    flows_through("pool_mode = transaction\nignore_startup_parameters = options,extra_float_digits");
}

#[test]
fn events_flow_through_pgbouncer_in_session_mode_that_hides_itself() {
    // Nothing is lost that could give it away, but what was asked for at the start does not hold.
    flows_through("pool_mode = session\nignore_startup_parameters = options,extra_float_digits");
}

#[test]
fn two_watchers_share_pgbouncer_in_transaction_mode() {
    let database = Database::new();
    let Some(pooler) = Pooler::start(&database, "pool_mode = transaction\nignore_startup_parameters = options") else {
        return;
    };
    let stages = [1, 2].map(|number| {
        let mut stage = Stage::with(Some(database.clone()));
        stage.environment.insert("DATABASE_URL".to_owned(), pooler.database.url.clone());
        stage.transcript("-home-me-app", number).say_many(&format!("watcher {number} line"), 500);
        stage
    });
    let watchers = stages.each_ref().map(Stage::start);
    for watcher in &watchers {
        wait_until("its queue is empty", SOON, || watcher.has_settled(501));
    }
    for number in [1, 2] {
        let expected: Vec<String> = (0..500).map(|line| format!("watcher {number} line {line}")).collect();
        let stored: Vec<String> =
            database.texts().into_iter().filter(|text| text.starts_with(&format!("watcher {number} "))).collect();
        let odd = stored.iter().zip(&expected).find(|(stored, expected)| stored != expected);
        assert_eq!((odd, stored.len()), (None, expected.len()), "{} {}", watchers[0].log(), watchers[1].log());
    }
    assert_eq!(database.count(), 1002);
}

#[test]
fn the_original_s_table_with_its_foreign_keys_and_other_writers_is_used_as_it_stands() {
    for column in ["command_id", "task_id"] {
        let stage = Stage::new();
        stage.database().query(&format!(
            "CREATE TABLE projects (id serial PRIMARY KEY); CREATE TABLE agents (id serial PRIMARY KEY);
             CREATE TABLE commands (id serial PRIMARY KEY); CREATE TABLE turns (id serial PRIMARY KEY);
             CREATE TABLE events (id serial PRIMARY KEY, timestamp timestamptz NOT NULL,
               project_id int REFERENCES projects (id) ON DELETE CASCADE,
               agent_id int REFERENCES agents (id) ON DELETE CASCADE,
               {column} int REFERENCES commands (id) ON DELETE CASCADE,
               turn_id int REFERENCES turns (id) ON DELETE CASCADE,
               event_type varchar(50) NOT NULL, payload jsonb);
             CREATE INDEX ix_events_timestamp ON events (timestamp)"
        ));
        let watcher = stage.start();
        let texts = stage.transcript("-home-me-app", 1).say_many("line", 300);
        for _ in 0..50 {
            stage.database().query(
                "INSERT INTO events (timestamp, event_type, payload) VALUES (now(), 'state_transition', '{\"by\": \"other\"}')",
            );
        }
        wait_until("all is delivered", SOON, || watcher.has_settled(301));
        assert_eq!(stage.database().texts(), texts);
        assert_eq!(stage.database().count(), 351);
    }
}

#[test]
fn service_files_are_refused_by_a_clear_word() {
    let mut stage = Stage::with(None);
    stage.environment.insert("PGSERVICE".to_owned(), "mine".to_owned());
    let ran = stage.run(&["run", "--until-idle"]);
    assert_eq!(ran.code(), 78, "{}", ran.error());
    assert!(ran.error().contains("service files are not supported; set database.url"), "{}", ran.error());
}

/// Who listens on a channel.
pub struct Listener {
    _runtime: tokio::runtime::Runtime,
    _client: tokio_postgres::Client,
    received: std::sync::mpsc::Receiver<String>,
}

impl Listener {
    pub fn on(database: &Database, channel: &str) -> Listener {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (sender, received) = std::sync::mpsc::channel();
        let client = runtime.block_on(async {
            let (client, mut connection) = tokio_postgres::connect(&database.url, tokio_postgres::NoTls).await.unwrap();
            tokio::spawn(async move {
                while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
                    if let tokio_postgres::AsyncMessage::Notification(notification) = message {
                        let _ = sender.send(notification.payload().to_owned());
                    }
                }
            });
            client.batch_execute(&format!("LISTEN \"{channel}\"")).await.unwrap();
            client
        });
        Listener { _runtime: runtime, _client: client, received }
    }

    /// What has come until nothing more does for a while.
    pub fn heard(&self, count: usize) -> Vec<String> {
        let mut heard: Vec<String> = (0..count).map(|_| self.received.recv_timeout(SOON).unwrap()).collect();
        heard.extend(self.received.recv_timeout(Duration::from_millis(200)));
        heard
    }
}

#[test]
fn a_listener_gets_the_id_of_each_committed_row_and_of_no_other() {
    let mut stage = Stage::new();
    stage.set("database.notify_channel", "new events");
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("first");
    stage.run_until_idle();
    stage.database().query("ALTER TABLE events ADD CONSTRAINT no_bad CHECK (payload->>'text' <> 'bad')");
    let received = Listener::on(stage.database(), "new events");
    let bad = transcript.prompt("bad");
    let known = transcript.prompt("first");
    transcript.append(bad + "\n" + &known + "\n");
    let texts = transcript.say_many("line", 300);
    stage.run_until_idle();
    assert_eq!(stage.database().count(), texts.len() as u64 + 2);
    let ids: Vec<String> = stage
        .database()
        .query("SELECT id FROM events WHERE payload->>'text' LIKE 'line %' ORDER BY id")
        .into_iter()
        .map(|mut row| row.remove(0).unwrap())
        .collect();
    assert_eq!(received.heard(ids.len()), ids, "no more was told than was stored");
}

#[test]
fn a_full_queue_of_notifications_is_waited_out_and_blamed_on_no_event() {
    let server = Server::start();
    let database = server.database.another();
    // Before, that queue takes 8 GB.
    if lacks("PostgreSQL 17", database.value("SELECT current_setting('server_version_num')::int >= 170000") == "t") {
        return;
    }
    server.restart_with(&["max_notify_queue_pages = 64"]);
    let mut stage = Stage::with(Some(database.clone()));
    stage.set("database.notify_channel", "news").set("event_system.write_retry_max_delay_ms", "200");
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("before");
    stage.run_until_idle();
    // Somebody listens and stays in a transaction: what is told piles up.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let listener = runtime.block_on(async {
        let (client, connection) = tokio_postgres::connect(&database.url, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client.batch_execute("LISTEN news").await.unwrap();
        client.batch_execute("BEGIN; SELECT 1").await.unwrap();
        client
    });
    let mut told = 0..10_000;
    let tell = |number| database.try_query(&format!("SELECT pg_notify('news', repeat('x', 7000) || {number})"));
    assert!(told.any(|number| tell(number).is_err()), "it is never full");
    let watcher = stage.start();
    let texts = transcript.say_many("line", 30);
    wait_until("it is said", SOON, || {
        let error = watcher.health()["database"]["last_error"].clone();
        error.as_str().is_some_and(|error| error.contains("queue of notifications is full") && error.contains("54000"))
    });
    // Longer than any number of tries.
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!((watcher.health()["queue"]["dead_letters"].as_u64(), database.count()), (Some(0), 2));
    drop(listener);
    drop(runtime);
    wait_until("all is stored", SOON, || database.count() == 32);
    assert_eq!(database.texts()[1..], texts);
}
