//! Replicated servers: nothing leaves the queue before the synchronous standby that the server requires has it.
//!
//! `synchronous_standby_names` makes a commit wait for a standby. The wait can end without the standby: the server then
//! reports success and a warning. So an absent standby is the test of what counts as durable.

use crate::stage::{Database, Dice, SOON, Server, Stage, Transcript, Watcher, rounds, wait_until};

/// Events that go one statement at a time, and so many that they go by `CALL`.
const SINGLE: u32 = 1;
const BACKLOG: u32 = 600;

/// A watcher of a server of its own.
struct Scene {
    server: Server,
    stage: Stage,
    watcher: Watcher,
    transcript: Transcript,
    /// All that was said, in order.
    texts: Vec<String>,
}

impl Scene {
    /// Events have been stored already, by statements and by `CALL`.
    fn start(statement_timeout_ms: &str, prepare: impl FnOnce(&Database)) -> Scene {
        let server = Server::start();
        let database = server.database.another();
        prepare(&database);
        let mut stage = Stage::with(Some(database));
        stage
            .set("database.statement_timeout_ms", statement_timeout_ms)
            .set("event_system.write_retry_max_delay_ms", "200");
        let watcher = stage.start();
        let transcript = stage.transcript("-home-me-app", 1);
        let mut scene = Scene { server, stage, watcher, transcript, texts: Vec::new() };
        scene.say(BACKLOG);
        scene.wait_for_settled();
        scene
    }

    fn say(&mut self, count: u32) {
        let prefix = format!("line {}", self.texts.len());
        self.texts.extend(self.transcript.say_many(&prefix, count));
    }

    /// Everything said so far has left the queue; the registration of the session, too.
    #[track_caller]
    fn wait_for_settled(&self) {
        wait_until("all is settled", SOON, || self.watcher.has_settled(self.texts.len() + 1));
    }

    /// Waits until health has named the standby and so many deliveries have failed; nothing leaves the queue meanwhile.
    #[track_caller]
    fn assert_waits_for_the_standby(&self, failures: u64) {
        let before = settled(&self.watcher);
        let failed = number(&self.watcher, "failed");
        let mut named = false;
        wait_until("health names the standby", SOON, || {
            assert_eq!(settled(&self.watcher), before, "events left the queue without the standby");
            let health = self.watcher.health();
            let error = health["database"]["last_error"].as_str().unwrap_or_default();
            named |= names_the_standby(error) && health["database"]["state"] == "down" && health["status"] == "warn";
            named && number(&self.watcher, "failed") >= failed + failures
        });
        assert_eq!(self.watcher.health()["queue"]["pending"], self.texts.len() as u64 + 1 - before);
    }

    /// Everything said is in this database, once and in order.
    #[track_caller]
    fn assert_stored_in(&self, database: &Database) {
        assert_eq!(database.texts(), self.texts);
        assert_eq!(database.value("SELECT count(*) FROM event_receipts"), database.count().to_string());
        assert_eq!(self.watcher.health()["queue"]["dead_letters"], 0);
    }
}

/// What a user reads: what is waited for, and which setting to look at.
fn names_the_standby(text: &str) -> bool {
    ["waits for a synchronous standby", "synchronous_standby_names"].iter().all(|words| text.contains(words))
}

fn number(watcher: &Watcher, name: &str) -> u64 {
    watcher.health()["writes"][name].as_u64().unwrap()
}

/// Events that have left the queue since the start.
fn settled(watcher: &Watcher) -> u64 {
    number(watcher, "succeeded") + number(watcher, "duplicates")
}

/// Processes of the server that wait for a standby.
const WAITING: &str = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'";

/// From now on commits wait for the standby of this name.
fn require(server: &Server, name: &str) {
    server.database.query(&format!("ALTER SYSTEM SET synchronous_standby_names = '{name}'"));
    server.database.query("SELECT pg_reload_conf()");
}

/// [`require`] of a standby that does not exist; returns once a commit does wait.
fn require_an_absent_one(server: &Server) {
    require(server, "nobody");
    // The server applies its configuration some time after it was told to.
    wait_until("commits wait", SOON, || {
        let database = server.database.clone();
        let commit = std::thread::spawn(move || database.try_query("SELECT pg_logical_emit_message(true, '', '')"));
        wait_until("it has committed, or waits", SOON, || {
            commit.is_finished() || !server.database.query(WAITING).is_empty()
        });
        let waits = !commit.is_finished();
        server.database.query(&format!("SELECT pg_terminate_backend(pid) FROM ({WAITING}) AS waiting"));
        let _ = commit.join();
        waits
    });
}

/// Commits wait for no standby any more.
fn require_none(server: &Server) {
    server.database.query("ALTER SYSTEM RESET synchronous_standby_names");
    server.database.query("SELECT pg_reload_conf()");
}

#[test]
fn nothing_leaves_the_queue_while_the_required_standby_is_absent() {
    let mut scene = Scene::start("300", |_| ());
    for count in [BACKLOG, SINGLE] {
        require_an_absent_one(&scene.server);
        scene.say(count);
        scene.assert_waits_for_the_standby(3);
        let status = scene.stage.run(&["status"]);
        assert_eq!(status.code(), 0, "{}", status.error());
        assert!(names_the_standby(&status.output()), "{}", status.output());
        require_none(&scene.server);
        scene.wait_for_settled();
        scene.assert_stored_in(scene.stage.database());
        assert!(scene.server.database.query(WAITING).is_empty(), "backends are left behind");
    }
    assert_eq!(
        scene.watcher.logged("database unavailable").len(),
        2,
        "said once for each outage: {}",
        scene.watcher.log()
    );
}

#[test]
fn a_wait_for_the_standby_that_somebody_ends_proves_nothing() {
    // So long that only somebody else ends the wait. Warnings are to be seen though the database hides them.
    let mut scene = Scene::start("60000", |database| {
        database.query(
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET client_min_messages = error', current_database()); END $$",
        );
    });
    for (count, end) in [
        (SINGLE, "pg_cancel_backend"),
        (BACKLOG, "pg_cancel_backend"),
        (SINGLE, "pg_terminate_backend"),
        (BACKLOG, "pg_terminate_backend"),
    ] {
        require_an_absent_one(&scene.server);
        let before = settled(&scene.watcher);
        scene.say(count);
        for _ in 0..4 {
            let mut ended = Vec::new();
            wait_until("a wait is ended", SOON, || {
                ended = scene.server.database.query(&format!("SELECT pid, {end}(pid) FROM ({WAITING}) AS waiting"));
                assert_eq!(settled(&scene.watcher), before, "{end}: events left the queue without the standby");
                !ended.is_empty()
            });
            let failed = number(&scene.watcher, "failed");
            wait_until("the delivery has failed", SOON, || {
                assert_eq!(settled(&scene.watcher), before, "{end}: events left the queue without the standby");
                number(&scene.watcher, "failed") > failed || !scene.server.database.query(WAITING).is_empty()
            });
        }
        if end == "pg_cancel_backend" {
            scene.assert_waits_for_the_standby(0);
        }
        require_none(&scene.server);
        scene.wait_for_settled();
        scene.assert_stored_in(scene.stage.database());
    }
}

#[test]
fn a_database_that_commits_without_its_standby_is_overruled() {
    for weaker in ["off", "local"] {
        let mut scene = Scene::start("300", |database| {
            database.query(&format!(
                "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = {weaker}', current_database()); END $$"
            ));
        });
        for count in [SINGLE, BACKLOG] {
            require_an_absent_one(&scene.server);
            scene.say(count);
            scene.assert_waits_for_the_standby(1);
            require_none(&scene.server);
            scene.wait_for_settled();
        }
        scene.assert_stored_in(scene.stage.database());
    }
}

/// A server, and the database on it that the watcher uses.
struct Node {
    server: Server,
    database: Database,
}

/// A server, its streaming standby, and a watcher that knows both. Commits wait until the standby has applied them.
struct Pair {
    primary: Node,
    standby: Node,
    stage: Stage,
    watcher: Watcher,
}

impl Pair {
    fn start() -> Pair {
        let server = Server::start();
        let database = server.database.another();
        let name = database.value("SELECT current_database()");
        let primary = Node { server, database };
        let server = primary.server.standby("standby");
        let database = Database::at(server.database.url.replace("/headspace?", &format!("/{name}?")));
        let standby = Node { server, database };
        let folder = |node: &Node| {
            let host = node.database.url.split(['?', '&']).find_map(|part| part.strip_prefix("host="));
            host.expect("a URL with a host").to_owned()
        };
        let url = format!(
            "postgresql:///{name}?host={},{}&user=headspace&target_session_attrs=read-write",
            folder(&primary),
            folder(&standby)
        );
        require_applied(&primary.server);
        let mut stage = Stage::with(None);
        stage.environment.insert("DATABASE_URL".to_owned(), url);
        stage.set("database.statement_timeout_ms", "300").set("event_system.write_retry_max_delay_ms", "200");
        let watcher = stage.start();
        Pair { primary, standby, stage, watcher }
    }

    /// kill -9 of the primary, then the standby is promoted. What had left the queue must be there; the rest follows.
    #[track_caller]
    fn fail_over(&mut self, is_running: bool) {
        self.primary.server.kill();
        // Nothing answers any more: what has left the queue is what had been settled.
        wait_until("the loss is noticed", SOON, || self.watcher.health()["database"]["state"] == "down");
        let settled = settled(&self.watcher);
        if !is_running {
            self.standby.server.start_again();
        }
        let there = self.standby.database.count();
        assert!(there >= settled, "{settled} events have left the queue, {there} are on the standby");
        let waiting = &self.watcher.health()["queue"]["pending"];
        eprintln!("{settled} events had left the queue, {there} are on the standby, {waiting} wait");
        self.standby.database.query("SELECT pg_promote()");
        std::mem::swap(&mut self.primary, &mut self.standby);
    }

    /// The server that was killed comes back as the standby of the one that was promoted.
    #[track_caller]
    fn fail_back(&self) {
        self.standby.server.follow(&self.primary.server, "standby");
        require_applied(&self.primary.server);
    }

    #[track_caller]
    fn assert_all_stored(&self, texts: &[String]) {
        wait_until("all is settled", SOON, || self.watcher.has_settled(texts.len() + 1));
        let database = &self.primary.database;
        assert_eq!(database.texts(), texts);
        assert_eq!(database.count(), texts.len() as u64 + 1, "the turns, and one registration");
        assert_eq!(database.value("SELECT count(DISTINCT row_id) FROM event_receipts"), database.count().to_string());
        assert_eq!(database.value("SELECT count(*) FROM event_receipts"), database.count().to_string());
        assert_eq!(self.watcher.health()["queue"]["dead_letters"], 0);
    }
}

/// From now on commits wait until the standby has applied them.
fn require_applied(server: &Server) {
    server.database.query("ALTER SYSTEM SET synchronous_commit = remote_apply");
    require(server, "standby");
    let sync = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'";
    wait_until("the standby is synchronous", SOON, || server.database.value(sync) == "1");
}

#[test]
fn what_left_the_queue_is_on_the_standby_that_was_stopped_and_is_promoted() {
    let mut pair = Pair::start();
    let mut transcript = pair.stage.transcript("-home-me-app", 1);
    let mut texts = transcript.say_many("before", BACKLOG);
    wait_until("all is settled", SOON, || pair.watcher.has_settled(texts.len() + 1));
    // Stopped and started: what came meanwhile waits, then goes on.
    pair.standby.server.stop("fast");
    texts.extend(transcript.say_many("while it is stopped", BACKLOG));
    wait_until("health names the standby, or events leave the queue", SOON, || {
        let health = pair.watcher.health();
        names_the_standby(health["database"]["last_error"].as_str().unwrap_or_default())
            || health["queue"]["pending"] == 0
    });
    pair.standby.server.start_again();
    wait_until("all is settled", SOON, || pair.watcher.has_settled(texts.len() + 1));
    assert_eq!(pair.primary.database.texts(), texts);
    // Stopped, and promoted without having seen the primary again.
    let before = settled(&pair.watcher);
    pair.standby.server.stop("fast");
    texts.extend(transcript.say_many("while it is stopped again", BACKLOG));
    wait_until("health names the standby, or events leave the queue", SOON, || {
        let health = pair.watcher.health();
        names_the_standby(health["database"]["last_error"].as_str().unwrap_or_default())
            || settled(&pair.watcher) > before
    });
    pair.fail_over(false);
    pair.assert_all_stored(&texts);
}

/// The two servers take turns: each round kills the primary in the middle of a backlog, and promotes the other.
#[test]
fn what_left_the_queue_is_on_the_standby_though_the_primary_is_killed_at_any_moment() {
    let mut dice = Dice::new("standby");
    let mut pair = Pair::start();
    let mut transcript = pair.stage.transcript("-home-me-app", 1);
    let mut texts = Vec::new();
    for round in 0..rounds(4) {
        if round > 0 {
            pair.fail_back();
        }
        let before = texts.len() as u64;
        texts.extend(transcript.say_many(&format!("round {round}"), 3000));
        let moment = before + 1 + dice.below(2500);
        wait_until("so many are stored", SOON, || settled(&pair.watcher) >= moment);
        pair.fail_over(true);
        pair.assert_all_stored(&texts);
    }
}
