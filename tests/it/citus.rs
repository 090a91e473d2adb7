//! Citus with a schema for each team: each schema is on one worker, and its watchers connect to that worker.
//!
//! The cluster is made by a script beside the checkout.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::stage::{Database, Dice, SOON, Stage, Transcript, Watcher, lacks, project, rounds, wait_until};

const BACKLOG: u32 = 2000;

/// A coordinator and two workers. Removed when dropped.
struct Cluster {
    script: PathBuf,
    parent: TempDir,
    coordinator: Database,
    /// Names for the script, and ports.
    workers: Vec<(String, String)>,
}

impl Cluster {
    /// `None` where it can't run; says why.
    fn start() -> Option<Cluster> {
        let script = project().join("../shared/citus/citus-cluster.sh");
        if lacks("a Citus cluster", script.exists()) {
            return None;
        }
        // Another user runs the servers when the tests run as root.
        let parent = tempfile::Builder::new().prefix("hw-citus").tempdir().unwrap();
        std::fs::set_permissions(parent.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut cluster = Cluster { script, parent, coordinator: url(""), workers: Vec::new() };
        let nodes = match cluster.run("start", "2") {
            Ok(nodes) => nodes,
            Err(error) => {
                let log = std::fs::read_to_string(cluster.parent.path().join("cluster/coordinator.log"));
                eprintln!("{error}\n{}", log.unwrap_or_default());
                lacks("a Citus cluster", false);
                return None;
            }
        };
        for (name, port) in nodes.lines().filter_map(|line| line.split_once(' ')) {
            match name {
                "worker" => cluster.workers.push((format!("worker{}", cluster.workers.len() + 1), port.to_owned())),
                _ => cluster.coordinator = url(port),
            }
        }
        Some(cluster)
    }

    fn run(&self, command: &str, argument: &str) -> Result<String, String> {
        let folder = self.parent.path().join("cluster");
        let ran = Command::new(&self.script).arg(command).arg(folder).arg(argument).stdin(Stdio::null()).output();
        let ran = ran.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if ran.status.success() { Ok(text(&ran.stdout)) } else { Err(text(&ran.stderr)) }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.run("stop", "");
    }
}

fn url(port: &str) -> Database {
    Database::at(format!("postgresql://headspace@127.0.0.1:{port}/headspace"))
}

/// A schema, and a watcher that is connected to the worker which holds it.
struct Team {
    name: &'static str,
    worker: String,
    watcher: Watcher,
    transcript: Transcript,
    texts: Vec<String>,
    _stage: Stage,
}

impl Team {
    fn start(cluster: &Cluster, name: &'static str) -> Team {
        cluster.coordinator.query(&format!(
            "SET citus.enable_schema_based_sharding = on;
             CREATE SCHEMA {name};
             CREATE TABLE {name}.events (
                 id bigserial PRIMARY KEY, \"timestamp\" timestamptz NOT NULL, project_id integer, agent_id integer,
                 command_id integer, turn_id integer, event_type varchar(50) NOT NULL, payload jsonb)"
        ));
        let mut stage = Stage::with(Some(cluster.coordinator.clone()));
        stage.set("database.events_table", &format!("{name}.events")).set("database.ledger_schema", name);
        let migrated = stage.run(&["migrate"]);
        assert_eq!(migrated.code(), 0, "{}", migrated.error());
        let check = |stage: &Stage| {
            let output = stage.run(&["check"]).output();
            assert!(output.contains("the tables are there"), "{output}");
            let node = output.split_once("Citus keeps the events on 127.0.0.1:").map(|(_, rest)| rest.to_owned());
            node.and_then(|rest| Some(rest.split_once(':')?.0.to_owned()))
        };
        let port = check(&stage).expect("check names the worker");
        stage.database = Some(url(&port));
        assert_eq!(check(&stage), None, "it is connected to the worker");
        let worker = cluster.workers.iter().find(|(_, its)| *its == port).expect("a worker's port").0.clone();
        let transcript = stage.transcript("-home-me-app", 1);
        Team { name, worker, watcher: stage.start(), transcript, texts: Vec::new(), _stage: stage }
    }

    fn settled(&self) -> u64 {
        let writes = &self.watcher.health()["writes"];
        writes["succeeded"].as_u64().unwrap() + writes["duplicates"].as_u64().unwrap()
    }

    /// All is there, as the coordinator sees it.
    #[track_caller]
    fn assert_all_stored(&self, coordinator: &Database) {
        let Team { name, texts, .. } = self;
        wait_until("all is settled", SOON, || self.watcher.has_settled(texts.len() + 1));
        let stored = coordinator.query(&format!(
            "SELECT payload->>'text' FROM {name}.events WHERE event_type = 'turn_detected' ORDER BY id"
        ));
        let stored: Vec<String> = stored.into_iter().filter_map(|mut row| row.remove(0)).collect();
        assert_eq!(stored, *texts);
        let counts = coordinator.query(&format!(
            "SELECT (SELECT count(*) FROM {name}.events), (SELECT count(*) FROM {name}.event_receipts),
                    (SELECT count(*) FROM {name}.events JOIN {name}.event_receipts ON row_id = id)"
        ));
        let all = Some((texts.len() + 1).to_string());
        assert_eq!(counts, [[all.clone(), all.clone(), all]], "rows, receipts, and rows that have one");
        assert_eq!(self.watcher.health()["queue"]["dead_letters"], 0);
    }
}

#[test]
fn a_schema_on_each_worker_gets_each_event_once_and_in_order_though_the_workers_are_killed() {
    let Some(cluster) = Cluster::start() else { return };
    let mut dice = Dice::new("citus");
    let mut teams = ["team_a", "team_b"].map(|name| Team::start(&cluster, name));
    assert_ne!(teams[0].worker, teams[1].worker, "the schemas are spread over the workers");
    for round in 0..rounds(2) {
        for team in &mut teams {
            team.texts.extend(team.transcript.say_many(&format!("round {round}"), BACKLOG));
            let moment = u64::from(round * BACKLOG) + dice.below(u64::from(BACKLOG) / 2);
            wait_until("so many are stored", SOON, || team.settled() > moment);
            cluster.run("kill", &team.worker).unwrap();
            wait_until("the loss is noticed", SOON, || team.watcher.health()["database"]["state"] == "down");
            let waiting = &team.watcher.health()["queue"]["pending"];
            eprintln!("{} is killed, {waiting} events of {} wait", team.worker, team.name);
            // Refused while a process of the killed server is still there.
            wait_until("it is up again", SOON, || cluster.run("up", &team.worker).is_ok());
        }
        for team in &teams {
            team.assert_all_stored(&cluster.coordinator);
        }
    }
}
