//! `scripts/dev-postgres.sh`: the private server, its lock and its folder.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::stage::{Stage, is_root, processes_with_open, programs_without, project, signal, wait_until};

/// Longer than a start takes, shorter than it waits for another one.
const PATIENCE: Duration = Duration::from_secs(40);

/// A folder for a server, in a folder that its user may enter.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Place {
        let folder = tempfile::Builder::new().prefix("hw pg").tempdir().expect("a temporary folder");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        Place { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        finish(spawn(Command::new(script()).args(arguments)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.folder.path()).into_iter().flatten().filter_map(Result::ok) {
            if entry.path().join("cluster").exists() {
                let _ = Command::new(script()).args(["stop", "--mode", "immediate"]).arg(entry.path()).output();
            }
        }
    }
}

fn script() -> PathBuf {
    project().join("scripts/dev-postgres.sh")
}

fn spawn(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("run dev-postgres.sh")
}

/// Its output, when it ends in time.
fn finish(mut child: Child) -> Output {
    let start = Instant::now();
    while child.try_wait().expect("wait for dev-postgres.sh").is_none() {
        if start.elapsed() > PATIENCE {
            child.kill().expect("kill dev-postgres.sh");
            panic!("dev-postgres.sh still runs after {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().expect("read what dev-postgres.sh has written")
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn a_start_that_was_killed_blocks_no_later_one() {
    let place = Place::new();
    let without_flock = programs_without("flock", place.folder.path());
    let folder = place.path("server");
    let mut stranger = Command::new("sleep").arg("300").spawn().expect("start a stranger");
    // Its own id, as in a container; one that somebody else has now; none at all.
    for pid in ["$$".to_owned(), stranger.id().to_string(), String::new()] {
        for path in [None, Some(&without_flock)] {
            let plant = format!(
                "mkdir -p -m 777 \"$1/starting\"; [ -z {pid} ] || echo {pid} >\"$1/starting/pid\"; \
                 [ -z {pid} ] || echo {pid} 1 an-earlier-boot >\"$1/starting/holder\"; exec \"$2\" start \"$1\""
            );
            let mut command = Command::new("bash");
            command.args(["-c", &plant, "bash"]).arg(&folder).arg(script());
            if let Some(path) = path {
                command.env("PATH", path);
            }
            let output = finish(spawn(&mut command));
            assert_eq!(output.status.code(), Some(0), "{pid}: {}", error(&output));
            assert_eq!(place.run(&["stop", "--mode", "immediate", text(&folder)]).status.code(), Some(0));
        }
    }
    assert!(stranger.try_wait().expect("wait for the stranger").is_none());
    stranger.kill().and_then(|()| stranger.wait()).expect("end the stranger");
}

#[test]
fn of_many_starts_at_once_one_makes_the_cluster_and_all_serve_it() {
    let place = Place::new();
    let without_flock = programs_without("flock", place.folder.path());
    for (name, path) in [("flock", None), ("link", Some(&without_flock))] {
        let folder = place.path(name);
        let started: Vec<Child> = (0..4)
            .map(|_| {
                let mut command = Command::new(script());
                command.arg("start").arg(&folder);
                if let Some(path) = path {
                    command.env("PATH", path);
                }
                spawn(&mut command)
            })
            .collect();
        let outputs: Vec<Output> = started.into_iter().map(finish).collect();
        for output in &outputs {
            assert_eq!(output.status.code(), Some(0), "{name}: {}", error(output));
            assert_eq!(output.stdout, outputs[0].stdout);
        }
        // The server does not have the lock of its start.
        assert_eq!(processes_with_open(&folder.join("starting")), Vec::<String>::new());
    }
}

#[test]
fn a_folder_whose_name_pg_ctl_misreads_is_refused_with_a_sentence() {
    let place = Place::new();
    for name in ["dq\"x", "$(touch x)", "`x`", "back\\slash", "new\nline"] {
        let output = place.run(&["start", text(&place.path(name))]);
        assert_eq!(output.status.code(), Some(78), "{name:?}: {}", error(&output));
        assert!(error(&output).contains("pg_ctl misreads"), "{}", error(&output));
        assert!(!place.path(name).exists());
    }
}

#[test]
fn a_start_that_fails_before_there_is_a_log_says_why() {
    let place = Place::new();
    let folder = place.path("server");
    assert!(place.run(&["start", text(&folder)]).status.success());
    assert!(place.run(&["stop", text(&folder)]).status.success());
    // Not a file that the server can write.
    fs::remove_file(folder.join("log")).unwrap();
    fs::create_dir(folder.join("log")).unwrap();
    let output = place.run(&["start", text(&folder)]);
    assert_eq!(output.status.code(), Some(69), "{}", error(&output));
    assert!(error(&output).contains("could not start PostgreSQL in"), "{}", error(&output));
}

/// Stops the server of a project when it goes.
struct StopOnDrop(PathBuf);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        let _ = Command::new(&self.0).args(["stop", "--mode", "immediate"]).output();
    }
}

#[test]
fn the_commands_find_the_private_server_with_and_without_the_watcher_from_any_folder() {
    let stage = Stage::with(None);
    let scripts = stage.folder().join("scripts");
    fs::set_permissions(stage.folder(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(&scripts).unwrap();
    for name in ["run-watcher.sh", "dev-postgres.sh", "lock.sh"] {
        fs::copy(project().join("scripts").join(name), scripts.join(name)).unwrap();
    }
    let postgres = scripts.join("dev-postgres.sh");
    let _stop = StopOnDrop(postgres.clone());
    stage.transcript("-home-me-app", 1).say("hello");
    let config = stage.folder().join("config.yaml");
    let run = |arguments: &[&str]| {
        let mut command = stage.command(&["--config", text(&config)]);
        finish(spawn(command.args(arguments).current_dir("/")))
    };
    let assert_ends = |arguments: &[&str], code: i32, words: &str| {
        let output = run(arguments);
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(words), "{arguments:?}: \"{words}\" is not in: {said}");
    };
    assert_ends(&["verify"], 78, "no database is configured");

    let mut supervisor = Command::new(scripts.join("run-watcher.sh"));
    supervisor.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", stage.folder().join("home"));
    supervisor.env("HEADSPACE_WATCHER_BIN", env!("CARGO_BIN_EXE_headspace-watcher")).current_dir("/");
    let log = fs::File::create(stage.folder().join("log")).unwrap();
    let supervisor = supervisor.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn();
    let mut supervisor = supervisor.expect("start the supervisor");
    wait_until("all is delivered", PATIENCE, || run(&["verify"]).status.success());
    assert_ends(&["verify"], 0, "in Postgres              1           1");
    assert_ends(&["check"], 0, "the tables are there");
    assert_ends(&["migrate"], 0, "nothing to do");
    signal(supervisor.id(), "TERM");
    assert!(supervisor.wait().expect("wait for the supervisor").success());

    // It took its server down. What to do is said with whole paths.
    let hint = format!(
        "start it with the watcher ({}), or alone (\"{} start\")",
        scripts.join("run-watcher.sh").display(),
        postgres.display()
    );
    for (arguments, code) in [(&["verify"][..], 69), (&["migrate"], 69), (&["check"], 78)] {
        assert_ends(arguments, code, &hint);
    }
    assert!(finish(spawn(Command::new(&postgres).arg("start"))).status.success());
    assert_ends(&["verify"], 0, "missing");
    assert_ends(&["migrate"], 0, "nothing to do");
    assert_ends(&["run", "--until-idle"], 0, "everything that could be read is delivered");
    if is_root() {
        std::os::unix::fs::chown(stage.folder().join("data/postgres.url"), Some(65_534), None).unwrap();
        assert_ends(&["migrate"], 78, "no database is configured");
    }
}

#[test]
fn scripts_print_their_own_help_at_once() {
    let place = Place::new();
    let without_cargo = programs_without("cargo", place.folder.path());
    for name in ["test.sh", "run-watcher.sh", "dev-postgres.sh", "bench.sh"] {
        let mut command = Command::new(project().join("scripts").join(name));
        command.arg("--help").env("PATH", &without_cargo).env("CARGO_HOME", "/nowhere").env("HOME", "/nowhere");
        let output = finish(spawn(&mut command));
        let help = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{name}: {}", error(&output));
        assert!(help.contains(&format!("scripts/{name}")), "{name}: {help}");
    }
}

#[test]
fn psql_stays_on_the_private_server_whatever_its_options_say() {
    let place = Place::new();
    let folder = place.path("server");
    assert!(place.run(&["start", text(&folder)]).status.success());
    let query = "SELECT current_database(), current_user, current_setting('cluster_name')";
    for (options, expected) in [
        (&["-d", "postgres"][..], "postgres|headspace"),
        (&[], "headspace|headspace"),
        (&["template1"], "template1|headspace"),
    ] {
        let output = place.run(&[&["psql", text(&folder)], &["-AtXc", query][..], options].concat());
        let answer = String::from_utf8_lossy(&output.stdout);
        assert_eq!(answer.trim(), format!("{expected}|headspace-watcher"), "{options:?}: {}", error(&output));
    }
}

#[test]
fn an_empty_note_of_where_the_cluster_was_moved_counts_as_none() {
    let place = Place::new();
    let folder = place.path("server");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("moved"), "").unwrap();
    let status = place.run(&["status", text(&folder)]);
    assert!(String::from_utf8_lossy(&status.stdout).contains(text(&folder)), "{status:?}");
    let output = place.run(&["start", text(&folder)]);
    assert_eq!(output.status.code(), Some(0), "{}", error(&output));
}

#[test]
fn stop_leaves_nothing_of_a_throwaway_that_was_moved() {
    let place = Place::new();
    let (folder, elsewhere) = (place.path("server"), place.path("elsewhere"));
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("moved"), format!("{}\n", elsewhere.display())).unwrap();
    let output = place.run(&["start", "--throwaway", text(&folder)]);
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), text(&folder), "{}", error(&output));
    assert!(elsewhere.join("cluster").exists());
    let output = place.run(&["stop", text(&folder)]);
    assert_eq!(output.status.code(), Some(0), "{}", error(&output));
    assert!(!folder.exists() && !elsewhere.exists());
}

#[test]
fn a_permanent_cluster_never_becomes_a_throwaway_one() {
    let place = Place::new();
    let folder = place.path("server");
    assert!(place.run(&["start", text(&folder)]).status.success());
    let refused = |state: &str| {
        let output = place.run(&["start", "--throwaway", text(&folder)]);
        assert_eq!(output.status.code(), Some(73), "{state}: {}", error(&output));
        assert!(error(&output).contains("stop would delete its data"), "{state}: {}", error(&output));
    };
    refused("running");
    assert!(place.run(&["stop", text(&folder)]).status.success());
    refused("stopped");
    assert!(place.run(&["stop", text(&folder)]).status.success());
    assert!(folder.join("cluster").exists(), "its data stay");
}

#[test]
fn what_a_killed_start_of_a_throwaway_left_makes_no_later_cluster_a_throwaway_one() {
    let place = Place::new();
    let folder = place.path("server");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("throwaway"), "").unwrap();
    let output = place.run(&["start", text(&folder)]);
    assert_eq!(output.status.code(), Some(0), "{}", error(&output));
    assert!(place.run(&["stop", text(&folder)]).status.success());
    assert!(folder.join("cluster").exists(), "its data stay");
}

#[test]
fn stop_waits_for_a_start_that_is_under_way_and_stops_its_server() {
    let place = Place::new();
    let folder = place.path("server");
    let starting = spawn(Command::new(script()).arg("start").arg(&folder));
    let begun = Instant::now();
    while fs::read_to_string(folder.join("starting/holder")).unwrap_or_default().is_empty() {
        assert!(begun.elapsed() < PATIENCE, "the start takes no lock");
        std::thread::sleep(Duration::from_millis(1));
    }
    let output = place.run(&["stop", text(&folder)]);
    assert_eq!(output.status.code(), Some(0), "{}", error(&output));
    let output = finish(starting);
    assert_eq!(output.status.code(), Some(0), "{}", error(&output));
    assert_eq!(place.run(&["status", text(&folder)]).status.code(), Some(3), "the server is stopped");
}

#[test]
fn stop_makes_nothing_in_a_folder_without_a_cluster() {
    let place = Place::new();
    let folder = place.path("mine");
    fs::create_dir(&folder).unwrap();
    assert_eq!(place.run(&["stop", text(&folder)]).status.code(), Some(0));
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
}
