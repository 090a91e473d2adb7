//! `scripts/run-watcher.sh` as a process: what it does when the watcher ends, and when it is told to.
//!
//! The watcher is a stand-in, a small script that behaves in its n-th run as line n of a plan says, so that each way of
//! ending can be had at will. Everything happens in a project folder of its own, with spaces in its path.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getpgid, kill_process, kill_process_group, test_kill_process};
use tempfile::TempDir;

use crate::bsd_tools::Mac;
use crate::stage::{processes_with_open, programs_without, rounds};

/// For what is not itself under test; generous, because other tests run at the same time.
const PATIENCE: Duration = Duration::from_secs(20);

const STAND_IN: &str = r#"#!/usr/bin/env bash
# Leaves behind: pids (a line for each run), arguments, database (of the last run), signals (in order of arrival).
here=$(dirname "$0")
case " $* " in *" config get "*) exec "REAL" "$@" ;; esac
run=$(($(wc -l <"$here/pids") + 1))
read -r what how then <<<"$(sed -n "${run}p" "$here/plan")"
printf '%s\n' "$@" >"$here/arguments"
printf '%s\n' "${DATABASE_URL-}" >"$here/database"
on() { echo "$1" >>"$here/signals"; [ "$what" = deaf ] || exit "$how"; }
trap 'on TERM' TERM
trap 'on INT' INT
trap 'echo HUP >>"$here/signals"' HUP
# Last, for it says that the traps are set.
echo $$ >>"$here/pids"
case $what in
  exit) exit "$how" ;;
  die) trap - "$how"; kill -s "$how" $$ ;;
  last) sleep "$how"; exit "$then" ;;
  shout) head -c "$how" /dev/zero | tr '\0' '\n'; exit 0 ;;
  stay | deaf) while :; do sleep 0.02; done ;;
esac
"#;

/// A project with the real scripts, and a stand-in for the program.
pub struct Project {
    folder: TempDir,
}

impl Project {
    fn new(plan: &[&str]) -> Project {
        let folder = tempfile::Builder::new().prefix("head space ").tempdir().expect("a temporary folder");
        // Closed by default; called by root, PostgreSQL runs as another user, who has to get in.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        let project = Project { folder };
        fs::create_dir(project.path("scripts")).expect("mkdir scripts");
        for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts")).expect("read scripts") {
            let script = entry.expect("an entry").path();
            if script.extension().is_some_and(|extension| extension == "sh") {
                let copy = project.path("scripts").join(script.file_name().expect("a name"));
                fs::copy(&script, copy).expect("copy a script");
            }
        }
        fs::write(project.path("plan"), format!("{}\n", plan.join("\n"))).expect("write the plan");
        fs::write(project.path("pids"), "").expect("write pids");
        let stand_in = STAND_IN.replace("REAL", env!("CARGO_BIN_EXE_headspace-watcher"));
        fs::write(project.path("stand-in"), stand_in).expect("write the stand-in");
        fs::set_permissions(project.path("stand-in"), fs::Permissions::from_mode(0o755)).expect("chmod");
        project
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// The supervisor's command, seeing nothing of the environment the tests run in.
    pub fn command(&self) -> Command {
        let mut command = Command::new(self.path("scripts/run-watcher.sh"));
        command.env_clear();
        for name in ["PATH", "HOME", "TMPDIR"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command
            .env("HEADSPACE_WATCHER_BIN", self.path("stand-in"))
            .env("DATABASE_URL", "postgresql://nobody.invalid/none")
            .current_dir("/")
            .stdin(Stdio::null());
        command
    }

    /// The supervisor's command with either kind of lock.
    fn command_with(&self, lock: Lock) -> Command {
        match lock {
            Lock::Flock => self.command(),
            Lock::Link => {
                let mut command = self.command();
                command.env("PATH", programs_without("flock", self.folder.path()));
                command
            }
            Lock::MacOs => {
                let mut command = self.command();
                Mac::new(self.folder.path()).put(&mut command);
                command
            }
        }
    }

    fn start(&self) -> Supervisor<'_> {
        self.start_as(&mut self.command())
    }

    pub fn start_as(&self, command: &mut Command) -> Supervisor<'_> {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("log")).expect("open the log");
        let also = log.try_clone().expect("share the log");
        let child = command.stdout(log).stderr(also).spawn().expect("start the supervisor");
        Supervisor { project: self, child }
    }

    /// The process ids of the stand-in's runs so far.
    fn runs(&self) -> Vec<Pid> {
        self.read("pids").lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)).collect()
    }

    /// Waits until the stand-in has been started `number` times; its last process id.
    fn wait_for_run(&self, number: usize, limit: Duration) -> Pid {
        self.wait(&format!("run {number}"), limit, || self.runs().get(number - 1).copied())
    }

    fn wait_for_log(&self, words: &str) {
        self.wait(&format!("\"{words}\" in the log"), PATIENCE, || self.read("log").contains(words).then_some(()));
    }

    fn wait<T>(&self, what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(value) = condition() {
                return value;
            }
            assert!(start.elapsed() < limit, "no {what} within {limit:?}; the log:\n{}", self.read("log"));
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// What the supervisor's lock is made of: flock(1), or link(2) where there is none, or that with what macOS has, where ps
/// says which processes live.
#[derive(Clone, Copy, Debug)]
enum Lock {
    Flock,
    Link,
    MacOs,
}

const LOCKS: [Lock; 3] = [Lock::Flock, Lock::Link, Lock::MacOs];

/// A process that is not ours, with a command line that could be; killed when dropped.
struct Stranger(Child);

impl Stranger {
    fn new(command_line: &str) -> Stranger {
        let child = Command::new("sleep").arg0(command_line).arg("300").stdin(Stdio::null()).spawn();
        Stranger(child.expect("start a stranger"))
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn is_alive(&mut self) -> bool {
        self.0.try_wait().expect("wait for the stranger").is_none()
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Project {
    fn drop(&mut self) {
        // Of a test that failed the watcher may be left as well.
        let watcher = self.read("data/run-watcher.lock/watcher");
        let watcher = watcher.split(' ').next().and_then(|pid| Pid::from_raw(pid.parse().ok()?));
        for pid in self.runs().into_iter().chain(watcher) {
            let _ = kill_process(pid, Signal::KILL);
        }
        // Only a test that failed half-way leaves one running.
        if self.path("data/postgres").exists() {
            let _ = Command::new(self.path("scripts/dev-postgres.sh")).arg("stop").output();
        }
    }
}

pub struct Supervisor<'a> {
    project: &'a Project,
    child: Child,
}

impl Supervisor<'_> {
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("signal the supervisor");
    }

    pub fn wait(&mut self) -> ExitStatus {
        let project = self.project;
        project.wait("end of the supervisor", PATIENCE, || self.child.try_wait().expect("wait for the supervisor"))
    }

    pub fn stop(&mut self) -> Option<i32> {
        self.signal(Signal::TERM);
        self.wait().code()
    }
}

impl Drop for Supervisor<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A log line's level and message, when the line is one of the supervisor's.
fn parse(line: &str) -> Option<(String, String)> {
    let value: serde_json::Value = serde_json::from_str(line).ok()?;
    let text = |pointer| value.pointer(pointer)?.as_str();
    text("/timestamp")?.parse::<jiff::Timestamp>().ok()?;
    Some((text("/level")?.to_owned(), text("/message")?.to_owned()))
}

fn messages(project: &Project, level: &str) -> Vec<String> {
    let log = project.read("log");
    log.lines().filter_map(parse).filter(|(of, _)| of == level).map(|(_, message)| message).collect()
}

#[test]
fn restarts_within_five_seconds_after_kill_9() {
    let project = Project::new(&["stay 0", "stay 0"]);
    let mut supervisor = project.start();
    let first = project.wait_for_run(1, PATIENCE);
    kill_process(first, Signal::KILL).unwrap();
    let second = project.wait_for_run(2, Duration::from_secs(5));
    assert_ne!(first, second);
    assert_eq!(supervisor.stop(), Some(0));
}

#[test]
fn every_restart_is_logged_with_its_time_and_reason() {
    let project = Project::new(&["exit 101", "die SEGV", "die ABRT", "die KILL", "exit 0"]);
    let mut supervisor = project.start();
    assert_eq!(supervisor.wait().code(), Some(0));
    let restarts = messages(&project, "WARN");
    let expected = ["exit code 101", "signal SIGSEGV", "signal SIGABRT", "signal SIGKILL"];
    assert_eq!(restarts.len(), expected.len(), "{restarts:?}");
    for (restart, reason) in restarts.iter().zip(expected) {
        assert!(restart.contains(reason), "{restart:?} lacks {reason:?}");
    }
    // And nothing else: no words of the shell's own about killed jobs.
    assert_eq!(project.read("log").lines().find(|line| parse(line).is_none()), None);
}

#[test]
fn gives_up_after_five_restarts_in_a_minute() {
    let project = Project::new(&["die KILL"; 9]);
    let mut supervisor = project.start();
    assert_eq!(supervisor.wait().code(), Some(1));
    assert_eq!(project.runs().len(), 6, "the first run and five restarts");
    let errors = messages(&project, "ERROR");
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(errors[0].contains("giving up after 5 restarts in 60 s"), "{errors:?}");
}

#[test]
fn the_configured_number_of_restarts_is_the_limit() {
    let project = Project::new(&["exit 1"; 9]);
    fs::write(project.path("config.yaml"), "event_system:\n  max_restarts_per_minute: 1 # not 5\n").unwrap();
    assert_eq!(project.start().wait().code(), Some(1));
    assert_eq!(project.runs().len(), 2);
    // The environment has the last word.
    let name = "HEADSPACE_EVENT_SYSTEM__MAX_RESTARTS_PER_MINUTE";
    assert_eq!(project.start_as(project.command().env(name, "2")).wait().code(), Some(1));
    assert_eq!(project.runs().len(), 2 + 3);
}

#[test]
fn a_healthy_minute_starts_the_count_anew() {
    // A minute of 1 s, and one restart in it: the third run may only come because the second one lasted.
    let project = Project::new(&["exit 1", "last 2 1", "stay 0"]);
    fs::write(project.path("config.yaml"), "event_system:\n  max_restarts_per_minute: 1\n").unwrap();
    let mut supervisor = project.start_as(project.command().env("HEADSPACE_CRASH_WINDOW_SECONDS", "1"));
    project.wait_for_run(3, PATIENCE);
    assert_eq!(supervisor.stop(), Some(0));
}

#[test]
fn does_not_restart_after_a_configuration_error() {
    let project = Project::new(&["exit 78", "stay 0"]);
    assert_eq!(project.start().wait().code(), Some(78));
    assert_eq!(project.runs().len(), 1);
    assert!(messages(&project, "ERROR").concat().contains("exit code 78; not restarting"));
}

#[test]
fn does_not_restart_after_a_usage_error_or_a_clean_end() {
    for code in [64, 0] {
        let project = Project::new(&[&format!("exit {code}"), "stay 0"]);
        assert_eq!(project.start().wait().code(), Some(code));
        assert_eq!(project.runs().len(), 1);
    }
}

#[test]
fn passes_term_on_and_exits_with_the_childs_code() {
    for (signal, name) in [(Signal::TERM, "TERM"), (Signal::INT, "INT")] {
        let project = Project::new(&["stay 7", "stay 0"]);
        let mut supervisor = project.start();
        project.wait_for_run(1, PATIENCE);
        supervisor.signal(signal);
        assert_eq!(supervisor.wait().code(), Some(7));
        assert_eq!(project.read("signals"), format!("{name}\n"), "once, not twice");
        assert_eq!(project.runs().len(), 1);
    }
}

#[test]
fn passes_hup_on_and_lets_the_watcher_decide() {
    let project = Project::new(&["stay 0"]);
    let mut supervisor = project.start();
    project.wait_for_run(1, PATIENCE);
    for hups in ["HUP\n", "HUP\nHUP\n"] {
        supervisor.signal(Signal::HUP);
        project.wait("HUP", PATIENCE, || (project.read("signals") == hups).then_some(()));
    }
    assert_eq!(supervisor.stop(), Some(0));
    assert_eq!(project.runs().len(), 1);
}

#[test]
fn passes_a_second_signal_on_and_kills_a_deaf_watcher() {
    let project = Project::new(&["deaf"]);
    let name = "HEADSPACE_EVENT_SYSTEM__SHUTDOWN_TIMEOUT_SECONDS";
    let mut supervisor = project.start_as(project.command().env(name, "1"));
    project.wait_for_run(1, PATIENCE);
    let start = Instant::now();
    for signals in ["TERM\n", "TERM\nTERM\n"] {
        supervisor.signal(Signal::TERM);
        project.wait("TERM", PATIENCE, || (project.read("signals") == signals).then_some(()));
    }
    assert_eq!(supervisor.wait().code(), Some(128 + 9));
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(1900), "killed after {took:?}, before its time was over");
    assert!(took < Duration::from_secs(4), "killed only after {took:?}");
}

#[test]
fn a_stop_between_two_runs_ends_it_at_once() {
    let project = Project::new(&["exit 74", "exit 74", "exit 74", "stay 0"]);
    let mut supervisor = project.start();
    project.wait_for_log("Restart in 4 s");
    let start = Instant::now();
    assert_eq!(supervisor.stop(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(2), "the pause held it up");
}

/// Ctrl-C on a terminal goes to the whole group; what the watcher gets must be the supervisor's one signal.
#[test]
fn the_watcher_has_a_process_group_of_its_own() {
    let project = Project::new(&["stay 0"]);
    let mut supervisor = project.start();
    let watcher = project.wait_for_run(1, PATIENCE);
    assert_eq!(getpgid(Some(watcher)).unwrap(), watcher);
    assert_ne!(getpgid(Some(supervisor.pid())).unwrap(), watcher);
    assert_eq!(supervisor.stop(), Some(0));
}

#[test]
fn refuses_a_second_supervisor_naming_its_pid() {
    for (of_first, of_second) in [
        (Lock::Flock, Lock::Flock),
        (Lock::Link, Lock::Link),
        (Lock::Flock, Lock::Link),
        (Lock::Link, Lock::Flock),
        (Lock::MacOs, Lock::MacOs),
    ] {
        let project = Project::new(&["stay 0", "stay 0"]);
        let mut first = project.start_as(&mut project.command_with(of_first));
        project.wait_for_run(1, PATIENCE);
        assert_eq!(project.start_as(&mut project.command_with(of_second)).wait().code(), Some(69));
        let errors = messages(&project, "ERROR").concat();
        assert!(errors.contains(&format!("pid {}", first.pid())), "{of_first:?}, {of_second:?}: {errors}");
        assert_eq!(project.runs().len(), 1);
        assert_eq!(first.stop(), Some(0), "the first is none the worse for it");
        // Its place is free again.
        let mut third = project.start_as(&mut project.command_with(of_second));
        project.wait_for_run(2, PATIENCE);
        assert_eq!(third.stop(), Some(0));
    }
}

#[test]
fn takes_over_from_a_supervisor_that_was_killed() {
    for lock in LOCKS {
        let project = Project::new(&["stay 0", "stay 0"]);
        let mut killed = project.start_as(&mut project.command_with(lock));
        let left_behind = project.wait_for_run(1, PATIENCE);
        killed.signal(Signal::KILL);
        assert_eq!(killed.wait().signal(), Some(9));
        test_kill_process(left_behind).expect("the watcher outlives its supervisor");

        let mut next = project.start_as(&mut project.command_with(lock));
        project.wait_for_run(2, PATIENCE);
        assert_eq!(project.read("signals"), "TERM\n", "the old watcher was asked to stop before the new one started");
        assert_eq!(next.stop(), Some(0));
    }
}

#[test]
fn kills_an_orphaned_watcher_that_does_not_stop() {
    let project = Project::new(&["deaf", "stay 0"]);
    let mut killed = project.start();
    let deaf = project.wait_for_run(1, PATIENCE);
    killed.signal(Signal::KILL);
    killed.wait();
    let name = "HEADSPACE_EVENT_SYSTEM__SHUTDOWN_TIMEOUT_SECONDS";
    let mut next = project.start_as(project.command().env(name, "0.2"));
    project.wait_for_run(2, PATIENCE);
    // Nothing is left of a dead process's command line, also while nobody has waited for it.
    assert_eq!(project.read("signals"), "TERM\n");
    assert_eq!(fs::read_to_string(format!("/proc/{deaf}/cmdline")).unwrap_or_default(), "", "the old watcher is gone");
    assert_eq!(next.stop(), Some(0));
}

/// In a container every process has the id that it had the last time.
#[test]
fn a_stale_lock_never_keeps_it_out_whoever_has_its_process_id_now() {
    let mut reader = Stranger::new("less scripts/run-watcher.sh");
    for lock in LOCKS {
        for pid in ["$$".to_owned(), reader.pid().to_string(), "1".to_owned(), String::new()] {
            let project = Project::new(&["stay 0"]);
            // Those of this version, and those of one that kept only ids.
            let plant = format!(
                "mkdir -p \"$1\"; echo {pid} >\"$1/pid\"; echo \"{pid} 1 an-earlier-boot\" >\"$1/holder\"; exec \"$2\""
            );
            let command = project.command_with(lock);
            let mut planted = Command::new("bash");
            planted.args(["-c", &plant, "bash"]);
            planted.arg(project.path("data/run-watcher.lock")).arg(command.get_program());
            planted.env_clear().stdin(Stdio::null());
            planted.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
            let mut supervisor = project.start_as(&mut planted);
            project.wait_for_run(1, PATIENCE);
            assert_eq!(supervisor.stop(), Some(0), "{lock:?}, {pid}");
        }
    }
    assert!(reader.is_alive());
}

#[test]
fn signals_no_process_that_is_not_its_watcher() {
    let mut editor = Stranger::new("vim /home/me/headspace-watcher/src/main.rs");
    let record = |project: &Project| {
        let script = "as_owner() { \"$@\"; }; . \"$1\"; process_record \"$2\"";
        let output = Command::new("bash")
            .args(["-c", script, "bash"])
            .arg(project.path("scripts/lock.sh"))
            .arg(editor.0.id().to_string())
            .output()
            .expect("run lock.sh");
        String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
    };
    let pid = editor.0.id();
    let now = record(&Project::new(&[]));
    // Where there is no boot id, the start time is a date.
    let another_boot = format!("{}x", now.trim_end_matches(|c: char| c.is_alphanumeric()));
    for left in [pid.to_string(), format!("{pid} 1 {}", now.rsplit(' ').next().unwrap_or("")), another_boot] {
        let project = Project::new(&["stay 0"]);
        fs::create_dir_all(project.path("data/run-watcher.lock")).unwrap();
        fs::write(project.path("data/run-watcher.lock/pid"), "2147483646\n").unwrap();
        fs::write(project.path("data/run-watcher.lock/watcher"), format!("{left}\n")).unwrap();
        let mut supervisor = project.start();
        project.wait_for_run(1, PATIENCE);
        assert!(editor.is_alive(), "{left:?}");
        assert!(!project.read("log").contains("still runs; stopping it"), "{left:?}");
        assert_eq!(supervisor.stop(), Some(0));
    }
}

/// An upgrade while the supervisor of an earlier version runs: its lock is the file `pid`.
#[test]
fn refuses_to_run_beside_a_supervisor_that_keeps_only_ids() {
    let project = Project::new(&["stay 0"]);
    let (old, lock) = (project.path("old/run-watcher.sh"), project.path("data/run-watcher.lock"));
    fs::create_dir(project.path("old")).unwrap();
    fs::write(&old, "while :; do sleep 0.05; done\n").unwrap();
    let mut earlier = Stranger(Command::new("bash").arg(&old).stdin(Stdio::null()).spawn().expect("start the old one"));
    fs::create_dir_all(&lock).unwrap();
    fs::write(lock.join("pid"), format!("{}\n", earlier.pid())).unwrap();
    fs::write(lock.join("watcher"), "2147483646\n").unwrap();
    assert_eq!(project.start().wait().code(), Some(69), "{}", project.read("log"));
    let errors = messages(&project, "ERROR").concat();
    assert!(errors.contains(&format!("kill {}", earlier.pid())), "{errors}");
    assert!(lock.join("pid").exists() && lock.join("watcher").exists(), "its files stay");
    assert!(earlier.is_alive());
    drop(earlier);

    let mut supervisor = project.start();
    project.wait_for_run(1, PATIENCE);
    assert!(!lock.join("pid").exists());
    assert_eq!(supervisor.stop(), Some(0));
}

/// A supervisor of an earlier version removes the folder at its end.
#[test]
fn a_lock_whose_folder_was_replaced_meanwhile_is_not_taken() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let script = "as_owner() { \"$@\"; }; . \"$1\"; mkdir \"$2\"
                  lock=$2
                  flock() { mv \"$lock\" \"$lock.old\"; mkdir \"$lock\"; }
                  try_lock \"$lock\"; echo $?
                  unset -f flock; try_lock \"$lock\"; echo $?";
    let output = Command::new("bash")
        .args(["-c", script, "bash"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/lock.sh"))
        .arg(folder.path().join("lock"))
        .output()
        .expect("run lock.sh");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "1\n0\n", "{}", String::from_utf8_lossy(&output.stderr));
}

/// Else the watcher of a supervisor that was killed just then is never found.
#[test]
fn the_watcher_is_recorded_before_its_program_runs() {
    let project = Project::new(&[]);
    let programs = project.path("slow programs");
    fs::create_dir(&programs).unwrap();
    let executable = |path: PathBuf, text: &str| {
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    // A slow look at the process.
    executable(programs.join("cat"), "#!/bin/sh\ncase $1 in /proc/*) sleep 0.2 ;; esac\nexec /bin/cat \"$@\"\n");
    executable(
        project.path("stand-in"),
        "#!/bin/sh\ncase \" $* \" in *\" config get \"*) exit 0 ;; esac\nhere=$(dirname \"$0\")\n\
         /bin/cat \"$here/data/run-watcher.lock/watcher\" >\"$here/record\"\necho $$ >>\"$here/pids\"\nexit 0\n",
    );
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").expect("PATH"));
    assert_eq!(project.start_as(project.command().env("PATH", path)).wait().code(), Some(0));
    let (record, pid) = (project.read("record"), project.runs()[0]);
    assert!(record.starts_with(&format!("{} ", pid.as_raw_pid())) && record.ends_with('\n'), "{pid:?}: {record:?}");
}

#[test]
fn a_start_that_ends_early_leaves_the_orphan_to_the_next_one() {
    let project = Project::new(&["deaf", "stay 0"]);
    let mut killed = project.start();
    project.wait_for_run(1, PATIENCE);
    killed.signal(Signal::KILL);
    killed.wait();
    // Before it stops the orphan, and while it does.
    let mut command = project.command();
    command.env("HEADSPACE_WATCHER_BIN", project.path("none"));
    assert_eq!(project.start_as(&mut command).wait().code(), Some(78));
    let timeout = "HEADSPACE_EVENT_SYSTEM__SHUTDOWN_TIMEOUT_SECONDS";
    let mut stopping = project.start_as(project.command().env(timeout, "60"));
    project.wait_for_log("still runs; stopping it");
    assert_eq!(stopping.stop(), Some(143));
    let mut next = project.start_as(project.command().env(timeout, "0.2"));
    project.wait_for_run(2, PATIENCE);
    assert_eq!(project.read("signals"), "TERM\nTERM\n");
    assert_eq!(next.stop(), Some(0));
}

/// After a crash cron, a login shell and systemd may all start it.
#[test]
fn of_many_starts_at_once_after_a_kill_exactly_one_goes_on() {
    // All with flock, all without, and mixed; a Mac has one kind only.
    for locks in [[Lock::Flock; 2], [Lock::Link; 2], [Lock::Flock, Lock::Link], [Lock::MacOs; 2]] {
        let lock = locks[0];
        let rounds = rounds(3) as usize;
        let project = Project::new(&vec!["stay 0"; rounds * 6 + 1]);
        let mut first = project.start_as(&mut project.command_with(lock));
        project.wait_for_run(1, PATIENCE);
        first.signal(Signal::KILL);
        first.wait();
        for round in 1..=rounds {
            let _ = fs::remove_file(project.path("log"));
            let mut started: Vec<_> =
                (0..6).map(|n| project.start_as(&mut project.command_with(locks[n % 2]))).collect();
            project.wait("five ends", PATIENCE, || {
                started.retain_mut(|supervisor| match supervisor.child.try_wait().expect("wait for a supervisor") {
                    None => true,
                    Some(status) => {
                        assert_eq!(status.code(), Some(69), "{locks:?}, round {round}: {}", project.read("log"));
                        false
                    }
                });
                (started.len() <= 1).then_some(())
            });
            // The orphan of the round before was stopped; only the new one runs.
            project.wait_for_run(round + 1, PATIENCE);
            thread::sleep(Duration::from_millis(50));
            assert_eq!(project.runs().len(), round + 1, "{locks:?}: {}", project.read("log"));
            let mut winner = started.pop().expect("one goes on");
            assert!(winner.child.try_wait().expect("wait for the winner").is_none());
            let errors = messages(&project, "ERROR");
            let expected = format!("another supervisor (pid {}) runs the watcher already", winner.pid());
            assert_eq!(errors.iter().filter(|error| error.contains(&expected)).count(), 5, "{locks:?}: {errors:?}");
            winner.signal(Signal::KILL);
            winner.wait();
        }
    }
}

/// A flock is inherited: what a supervisor starts must not have it.
#[test]
fn nothing_that_outlives_a_killed_supervisor_has_its_lock() {
    let project = Project::new(&["exit 1", "stay 0", "stay 0"]);
    let log = project.path("log");
    let start = || project.start_as(project.command().env_remove("DATABASE_URL").arg("--log-file").arg(&log));
    let mut killed = start();
    project.wait_for_run(2, Duration::from_secs(60));
    killed.signal(Signal::KILL);
    killed.wait();
    let lock = fs::canonicalize(project.path("data/run-watcher.lock")).unwrap();
    // Longer than the short command takes in which it may have been killed.
    project.wait("free lock", Duration::from_secs(2), || processes_with_open(&lock).is_empty().then_some(()));
    let mut next = start();
    project.wait_for_run(3, PATIENCE);
    assert_eq!(project.read("signals"), "TERM\n");
    assert_eq!(next.stop(), Some(0));
    let status = Command::new(project.path("scripts/dev-postgres.sh")).arg("status").output().expect("ask for status");
    assert_eq!(status.status.code(), Some(3), "it takes down what the killed one brought up");
}

#[test]
fn a_full_disk_is_no_crash_loop() {
    let project = Project::new(&["exit 74", "exit 74", "exit 74", "stay 0"]);
    // The second would be the last if they counted.
    fs::write(project.path("config.yaml"), "event_system:\n  max_restarts_per_minute: 1\n").unwrap();
    let mut supervisor = project.start();
    project.wait_for_run(4, PATIENCE);
    let errors = messages(&project, "ERROR");
    assert_eq!(errors.len(), 3, "{errors:?}");
    for (error, pause) in errors.iter().zip(["Restart in 1 s", "Restart in 2 s", "Restart in 4 s"]) {
        assert!(error.contains(pause), "{error:?} lacks {pause:?}");
    }
    assert_eq!(supervisor.stop(), Some(0));
}

#[test]
fn works_from_any_directory_with_spaces_in_paths() {
    let project = Project::new(&["exit 0", "exit 0"]);
    let elsewhere = project.path("else where");
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("my config.yaml"), "database:\n  url: null\n").unwrap();
    let mut command = project.command();
    command.current_dir(&elsewhere).args(["--until-idle", "--config", "my config.yaml", "--log-level=debug", "a  b"]);
    assert_eq!(project.start_as(&mut command).wait().code(), Some(0));
    let config = fs::canonicalize(&elsewhere).unwrap().join("my config.yaml");
    let expected =
        ["--config", &config.display().to_string(), "--log-level", "debug", "run", "--until-idle", "a  b"].join("\n");
    assert_eq!(project.read("arguments"), format!("{expected}\n"));

    // Without --config it is the project's own, where there is one.
    fs::write(project.path("config.yaml"), "").unwrap();
    assert_eq!(project.start().wait().code(), Some(0));
    let arguments = project.read("arguments");
    assert!(arguments.starts_with("--config\n") && arguments.ends_with("/config.yaml\nrun\n"), "{arguments}");
}

#[test]
fn a_log_file_is_rotated_by_size() {
    let project = Project::new(&["shout 31457280"]);
    let log = project.path("my log");
    let mut supervisor = project.start_as(project.command().arg("--log-file").arg(&log));
    assert_eq!(supervisor.wait().code(), Some(0));
    let sizes: Vec<u64> = ["my log", "my log.1", "my log.2", "my log.3"]
        .iter()
        .filter_map(|name| Some(fs::metadata(project.path(name)).ok()?.len()))
        .collect();
    assert!(sizes.len() >= 2, "{sizes:?}");
    assert!(sizes.iter().all(|&size| size < 16 * 1024 * 1024), "{sizes:?}");
    // Nothing is lost on the way: all that was shouted, and the supervisor's own words.
    let total: u64 = sizes.iter().sum();
    assert!(total > 30 * 1024 * 1024, "{sizes:?}");
    assert_eq!(project.read("log"), "", "nothing goes to the terminal");
}

#[test]
fn brings_up_a_private_postgres_where_no_database_is_configured() {
    let project = Project::new(&["stay 0"]);
    fs::write(project.path("config.yaml"), "database:\n  # url: postgresql:///mine\n  url: null # none\n").unwrap();
    let mut command = project.command();
    // Many shells have these. They name no server, and must not lead away from the private one.
    command.env_remove("DATABASE_URL").envs([("PGUSER", "me"), ("PGPORT", "6000"), ("PGDATABASE", "mine")]);
    let mut supervisor = project.start_as(&mut command);
    project.wait_for_run(1, Duration::from_secs(60));
    let postgres = |arguments: &[&str]| {
        Command::new(project.path("scripts/dev-postgres.sh")).args(arguments).output().expect("run dev-postgres.sh")
    };
    let url = postgres(&["url"]);
    assert_eq!(project.read("database"), String::from_utf8_lossy(&url.stdout));
    let answer = postgres(&["psql", "-AtXc", "SELECT 6 * 7"]);
    assert_eq!(String::from_utf8_lossy(&answer.stdout), "42\n", "{}", String::from_utf8_lossy(&answer.stderr));
    assert!(project.read("log").contains("dev-postgres.sh psql"), "it says how to look at the rows");

    assert_eq!(supervisor.stop(), Some(0));
    assert_eq!(postgres(&["status"]).status.code(), Some(3), "it takes down what it brought up");
}

#[test]
fn the_private_postgres_is_stopped_after_a_start_that_is_still_under_way() {
    let project = Project::new(&["exit 1", "stay 0"]);
    // A stand-in whose second start is slow.
    let server = r#"#!/usr/bin/env bash
calls=$(dirname "$0")/../calls
case $1 in
  status) exit 3 ;;
  start) echo start >>"$calls"; [ "$(grep -c '^start' "$calls")" -eq 1 ] || sleep 1; echo up >>"$calls"; echo postgresql:///none ;;
  stop) echo stop >>"$calls" ;;
esac
"#;
    fs::write(project.path("scripts/dev-postgres.sh"), server).unwrap();
    let mut supervisor = project.start_as(project.command().env_remove("DATABASE_URL"));
    project.wait("second start", PATIENCE, || (project.read("calls").lines().count() >= 3).then_some(()));
    project.wait_for_run(2, PATIENCE);
    assert_eq!(supervisor.stop(), Some(0));
    project.wait("end of the start", PATIENCE, || (project.read("calls").lines().count() >= 5).then_some(()));
    assert_eq!(project.read("calls"), "start\nup\nstart\nup\nstop\n");
}

#[test]
fn starts_no_private_postgres_where_a_database_is_configured() {
    let configured = "database: {url: \"postgresql://nobody.invalid/none\"}\n";
    for (config, variable) in [
        (configured, ("IRRELEVANT", "")),
        ("", ("HEADSPACE_DATABASE__URL", "postgresql://nobody.invalid/none")),
        ("", ("PGHOST", "nobody.invalid")),
        ("", ("PGHOSTADDR", "127.0.0.1")),
        // The watcher says that service files are not supported.
        ("", ("PGSERVICE", "mine")),
    ] {
        let project = Project::new(&["exit 0"]);
        fs::write(project.path("config.yaml"), config).unwrap();
        let mut command = project.command();
        command.env_remove("DATABASE_URL").env(variable.0, variable.1);
        assert_eq!(project.start_as(&mut command).wait().code(), Some(0), "{}", project.read("log"));
        assert_eq!(project.read("database"), "\n");
        assert!(!project.path("data/postgres").exists(), "{config} {variable:?}");
    }
}

#[test]
fn a_wrong_configuration_ends_it_with_the_watchers_own_words_before_anything_is_started() {
    let real = Real::new();
    fs::write(real.project.path("config.yaml"), "queue:\n  drain_window: many\n").unwrap();
    let mut command = real.project.command();
    command.env_remove("DATABASE_URL").env("HEADSPACE_WATCHER_BIN", env!("CARGO_BIN_EXE_headspace-watcher"));
    assert_eq!(real.project.start_as(&mut command).wait().code(), Some(78));
    let log = real.project.read("log");
    assert!(log.contains("queue.drain_window") && log.contains("exit code 78; not restarting"), "{log}");
    assert!(!real.project.path("data/postgres").exists());
}

/// It may be an older one, or a script that takes any arguments.
#[test]
fn a_program_that_does_not_answer_what_is_configured_runs_with_the_defaults() {
    let project = Project::new(&[]);
    fs::write(project.path("config.yaml"), "").unwrap();
    let program = "#!/usr/bin/env bash\necho $$ >>\"$(dirname \"$0\")/pids\"\nwhile :; do sleep 0.05; done\n";
    fs::write(project.path("stand-in"), program).unwrap();
    let mut supervisor = project.start_as(project.command().env_remove("DATABASE_URL"));
    let asked = project.wait_for_run(1, PATIENCE);
    let watcher = project.wait_for_run(2, PATIENCE);
    assert!(test_kill_process(asked).is_err(), "the one that was asked is gone");
    assert!(messages(&project, "WARN").concat().contains("could not read the configuration"));
    assert!(!project.path("data/postgres").exists(), "a database may be configured");
    kill_process(watcher, Signal::KILL).unwrap();
    project.wait_for_log("restart 1 of at most 5");
    supervisor.stop();
}

/// Ctrl-C goes to the whole group of the terminal, TERM to the supervisor alone.
#[test]
fn a_signal_ends_it_at_once_while_the_program_does_not_answer_what_is_configured() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let project = Project::new(&[]);
        let program = "#!/usr/bin/env bash\ntrap '' INT TERM\necho $$ >>\"$(dirname \"$0\")/pids\"\nwhile :; do sleep 0.05; done\n";
        fs::write(project.path("stand-in"), program).unwrap();
        let mut supervisor = project.start_as(project.command().process_group(0));
        let asked = project.wait_for_run(1, PATIENCE);
        let begun = Instant::now();
        if signal == Signal::INT {
            kill_process_group(supervisor.pid(), signal).unwrap();
        } else {
            supervisor.signal(signal);
        }
        assert_eq!(supervisor.wait().code(), Some(code), "{}", project.read("log"));
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
        project.wait("end of the asked program", PATIENCE, || test_kill_process(asked).is_err().then_some(()));
        assert_eq!(project.runs().len(), 1);
        assert_eq!(fs::read_dir(project.path("data/run-watcher.lock")).unwrap().count(), 0);
    }
}

#[test]
fn a_log_line_is_one_json_object_whatever_a_name_holds() {
    let project = Project::new(&[]);
    let mut command = project.command();
    command.args(["--config", "/no\nsuch\t\"file\"\u{1}\\ä\n.yaml"]);
    assert_eq!(project.start_as(&mut command).wait().code(), Some(78));
    let log = project.read("log");
    assert_eq!(log.lines().count(), 1, "{log}");
    let (_, message) = parse(log.trim_end()).unwrap_or_else(|| panic!("{log}"));
    assert!(message.contains("/no\nsuch \"file\" \\ä\n.yaml"), "{message}");

    fs::remove_file(project.path("log")).unwrap();
    let mut command = project.command();
    command.arg("--config").arg(OsStr::from_bytes(b"/no\xffsuch\xe4.yaml"));
    assert_eq!(project.start_as(&mut command).wait().code(), Some(78));
    assert!(messages(&project, "ERROR").concat().contains("/no?such?.yaml"), "{}", project.read("log"));
}

#[test]
fn a_log_file_that_is_no_regular_file_is_refused() {
    let project = Project::new(&[]);
    let fifo = project.path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("run mkfifo").success());
    for name in [fifo.as_path(), Path::new("/dev/null"), &project.path("scripts")] {
        let mut command = project.command();
        command.arg("--log-file").arg(name);
        assert_eq!(project.start_as(&mut command).wait().code(), Some(78), "{}", name.display());
        assert!(messages(&project, "ERROR").concat().contains(&name.display().to_string()));
    }
    assert!(!project.path("data").exists());
}

/// The real program under the real supervisor, with transcripts and no database.
pub struct Real {
    pub project: Project,
}

impl Real {
    pub fn new() -> Real {
        let project = Project::new(&[]);
        fs::create_dir(project.path("projects")).expect("mkdir projects");
        let config = "claude:\n  projects_path: projects\nhttp:\n  listen: null\n";
        fs::write(project.path("config.yaml"), config).expect("write the configuration");
        Real { project }
    }

    fn start(&self) -> Supervisor<'_> {
        let mut command = self.project.command();
        self.project.start_as(command.env("HEADSPACE_WATCHER_BIN", env!("CARGO_BIN_EXE_headspace-watcher")))
    }

    /// The watcher that takes events in, other than `before`.
    pub fn watcher(&self, before: Option<Pid>, limit: Duration) -> Pid {
        self.project.wait("new watcher", limit, || {
            let pid =
                Pid::from_raw(self.project.read("data/run-watcher.lock/watcher").split(' ').next()?.parse().ok()?)?;
            (Some(pid) != before && test_kill_process(pid).is_ok()).then_some(pid)
        })
    }

    /// Hands in one event; whether it is durable.
    fn emit(&self) -> bool {
        let payload = r#"{"session_uuid":"s","reason":"closed"}"#;
        let ran = Command::new(env!("CARGO_BIN_EXE_headspace-watcher"))
            .args(["emit", "--type", "session_ended", "--payload", payload, "--config"])
            .arg(self.project.path("config.yaml"))
            .output()
            .expect("run emit");
        ran.status.success()
    }

    fn status(&self) -> serde_json::Value {
        let ran = Command::new(env!("CARGO_BIN_EXE_headspace-watcher"))
            .args(["status", "--json", "--config"])
            .arg(self.project.path("config.yaml"))
            .output()
            .expect("run status");
        serde_json::from_slice(&ran.stdout).unwrap_or_default()
    }

    /// The identities of the events in the queue.
    fn waiting(&self) -> BTreeSet<String> {
        let ran = Command::new(env!("CARGO_BIN_EXE_headspace-watcher"))
            .args(["queue-dump", "--format", "jsonl", "--config"])
            .arg(self.project.path("config.yaml"))
            .output()
            .expect("run queue-dump");
        let lines = String::from_utf8(ran.stdout).expect("UTF-8");
        let event = |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON");
        lines.lines().map(|line| event(line)["event_id"].as_str().expect("an event_id").to_owned()).collect()
    }

    pub fn wait_until_it_is_ready(&self, pid: Pid) {
        self.project.wait("readiness", PATIENCE, || {
            let status = self.status();
            (status["pid"] == pid.as_raw_pid() && status["ready"] == true).then_some(())
        });
    }
}

#[test]
fn the_real_watcher_is_back_within_five_seconds_whatever_killed_it_with_all_that_it_took_in() {
    let real = Real::new();
    let mut supervisor = real.start();
    let mut pid = real.watcher(None, PATIENCE);
    let mut emitted = 0;
    // A crash, an abort as of memory that can't be had, and what the system does when it has none left.
    for (signal, name) in [(Signal::SEGV, "SIGSEGV"), (Signal::ABORT, "SIGABRT"), (Signal::KILL, "SIGKILL")] {
        real.wait_until_it_is_ready(pid);
        assert!(real.emit());
        emitted += 1;
        kill_process(pid, signal).unwrap();
        if signal == Signal::SEGV {
            // At the first one Rust looks whether a stack has overflowed, and lets a real fault happen once more.
            real.project.wait("end", PATIENCE, || kill_process(pid, signal).is_err().then_some(()));
        }
        pid = real.watcher(Some(pid), Duration::from_secs(5));
        real.project.wait_for_log(&format!("signal {name}; restart {emitted} of at most 5"));
    }
    real.wait_until_it_is_ready(pid);
    // The kill may come between an event's commit and the removal of its spool file: then it waits twice, and is stored
    // once.
    assert_eq!(real.waiting().len(), emitted);
    assert_eq!(supervisor.stop(), Some(0));
}

#[test]
fn a_term_to_the_supervisor_ends_the_real_watcher_too_and_soon() {
    let real = Real::new();
    let mut supervisor = real.start();
    let pid = real.watcher(None, PATIENCE);
    real.wait_until_it_is_ready(pid);
    let begun = Instant::now();
    assert_eq!(supervisor.stop(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert!(test_kill_process(pid).is_err(), "the watcher is gone");
    let log = real.project.read("log");
    assert!(log.contains("SIGTERM passed on") && log.contains("\"stopped\""), "{log}");
    // The folder stays, for it is what is locked.
    assert_eq!(fs::read_dir(real.project.path("data/run-watcher.lock")).unwrap().count(), 0);
}

#[test]
fn a_second_watcher_beside_a_supervised_one_is_refused_with_its_pid() {
    let real = Real::new();
    let mut supervisor = real.start();
    let pid = real.watcher(None, PATIENCE);
    real.wait_until_it_is_ready(pid);
    let second = Command::new(env!("CARGO_BIN_EXE_headspace-watcher"))
        .args(["run", "--config"])
        .arg(real.project.path("config.yaml"))
        .output()
        .expect("run a second watcher");
    let said = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(69), "{said}");
    assert!(said.contains(&format!("process {}", pid.as_raw_pid())), "{said}");
    assert_eq!(supervisor.stop(), Some(0));
}

/// bash's SECONDS follows the clock, which may be set back.
#[test]
fn no_deadline_of_the_scripts_depends_on_the_clock() {
    for (name, uses) in [("run-watcher.sh", 0), ("dev-postgres.sh", 0), ("lock.sh", 1)] {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name)).unwrap();
        let code = text.lines().filter_map(|line| line.split("# ").next());
        let words = code.flat_map(|line| line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'));
        // The one use is where there is no /proc/uptime.
        assert_eq!(words.filter(|word| *word == "SECONDS").count(), uses, "{name}");
    }
}
