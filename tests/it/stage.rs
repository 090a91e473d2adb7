//! The scene of a test: a folder of its own, a database of its own, the watcher as a process.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::io::FdFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use rustix::process::{Pid, test_kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};
use uuid::Uuid;

pub(crate) use crate::skip::lacks;

/// A database's address where no Postgres is.
pub const AWAY: &str = "postgresql:///away?host=/nowhere&user=nobody";

/// How long anything may take that should happen soon. Generous: the machine may be busy.
pub const SOON: Duration = Duration::from_secs(30);

/// Waits until `condition` gives something, or fails the test saying `what` did not happen.
#[track_caller]
pub fn wait_for<T>(what: &str, within: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        let waited = begun.elapsed();
        assert!(waited < within, "not within {within:?}: {what}");
        // What takes long is asked for less often: the question takes the time of what it waits for.
        std::thread::sleep((waited / 20).clamp(Duration::from_millis(5), Duration::from_millis(50)));
    }
}

/// [`wait_for`] with a yes or no.
#[track_caller]
pub fn wait_until(what: &str, within: Duration, mut condition: impl FnMut() -> bool) {
    wait_for(what, within, || condition().then_some(()));
}

/// `within` on a machine that has nothing else to do; as much longer as more wants to run than there are processors.
pub fn when_busy(within: Duration) -> Duration {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: f64 = load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(1.0);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    within.mul_f64((load / processors as f64).clamp(1.0, 20.0))
}

/// Whether this system has no `/proc`, which alone tells what a test has to know; says then that the test is skipped.
pub fn lacks_proc() -> bool {
    lacks("/proc", Path::new("/proc/self/status").exists())
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A socket on which nobody accepts and whose backlog is full: whoever connects and can wait does so for ever. It is busy
/// for as long as what this gives is kept.
pub fn busy_socket(path: &Path) -> Vec<OwnedFd> {
    let address = SocketAddrUnix::new(path).unwrap();
    let new = || {
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::io::fcntl_setfd(&socket, FdFlags::CLOEXEC).unwrap();
        socket
    };
    let mut kept = vec![new()];
    rustix::net::bind(&kept[0], &address).unwrap();
    rustix::net::listen(&kept[0], 0).unwrap();
    loop {
        let connection = new();
        rustix::io::ioctl_fionbio(&connection, true).unwrap();
        if rustix::net::connect(&connection, &address).is_err() {
            return kept;
        }
        kept.push(connection);
    }
}

/// The project's folder.
pub fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Folders of transcripts with the turns in them: a made-up one, and one of real sessions where that is beside the checkout.
pub fn corpora() -> impl Iterator<Item = PathBuf> {
    ["tests/data/transcripts", "../shared/transcripts"]
        .map(|folder| project().join(folder))
        .into_iter()
        .filter(|path| path.exists())
}

/// Letters and digits that nothing else has, so that they are good in a name.
pub fn unique() -> String {
    Uuid::now_v7().simple().to_string()
}

/// A database, spoken to in plain SQL.
#[derive(Clone)]
pub struct Database {
    pub url: String,
    /// For what only reads, and is asked again and again: a new connection takes Postgres more time than the question.
    reader: Arc<Mutex<Option<Connection>>>,
}

struct Connection {
    runtime: Runtime,
    client: Client,
}

impl Connection {
    fn open(url: &str) -> Result<Connection, tokio_postgres::Error> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = runtime.block_on(async {
            let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
            tokio::spawn(connection);
            client.batch_execute("SET search_path = public, headspace_watcher").await?;
            Ok(client)
        })?;
        Ok(Connection { runtime, client })
    }

    fn query(&self, sql: &str) -> Result<Vec<Vec<Option<String>>>, tokio_postgres::Error> {
        let messages = self.runtime.block_on(self.client.simple_query(sql))?;
        let rows = messages.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => {
                Some((0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect())
            }
            _ => None,
        });
        Ok(rows.collect())
    }
}

impl Database {
    /// A new one on the server that the test run brought up.
    pub fn new() -> Database {
        let url = std::env::var("HEADSPACE_TEST_DATABASE_URL")
            .expect("HEADSPACE_TEST_DATABASE_URL is not set: run the tests with scripts/test.sh");
        Database::at(url).another()
    }

    pub fn at(url: String) -> Database {
        Database { url, reader: Arc::default() }
    }

    /// A new one beside this one.
    pub fn another(&self) -> Database {
        let name = format!("test_{}", unique());
        self.query(&format!("CREATE DATABASE {name}"));
        let (server, parameters) = self.url.split_once('?').map_or((&*self.url, ""), |(server, rest)| (server, rest));
        let (address, _) = server.rsplit_once('/').expect("a URL has a path");
        Database::at(format!("{address}/{name}?{parameters}"))
    }

    /// The rows as text, or the server's error.
    pub fn try_query(&self, sql: &str) -> Result<Vec<Vec<Option<String>>>, tokio_postgres::Error> {
        // What a connection of its own might change for later ones gets one of its own.
        if !sql.starts_with("SELECT") || sql.contains("pg_") {
            return Connection::open(&self.url)?.query(sql);
        }
        let mut reader = self.reader.lock().unwrap();
        // The server may have ended it since.
        if let Some(rows) = reader.as_ref().and_then(|connection| connection.query(sql).ok()) {
            return Ok(rows);
        }
        reader.insert(Connection::open(&self.url)?).query(sql)
    }

    #[track_caller]
    pub fn query(&self, sql: &str) -> Vec<Vec<Option<String>>> {
        self.try_query(sql).unwrap_or_else(|error| panic!("{sql}: {error:?}"))
    }

    /// The single value of a query.
    #[track_caller]
    pub fn value(&self, sql: &str) -> String {
        self.query(sql)[0][0].clone().unwrap_or_default()
    }

    /// Number of rows in `events`; 0 while there is no such table.
    pub fn count(&self) -> u64 {
        let there = "SELECT to_regclass('events') IS NOT NULL";
        if self.value(there) != "t" { 0 } else { self.value("SELECT count(*) FROM events").parse().unwrap() }
    }

    /// The texts of all turns in the order of the table.
    pub fn texts(&self) -> Vec<String> {
        self.query("SELECT payload->>'text' FROM events WHERE event_type = 'turn_detected' ORDER BY id")
            .into_iter()
            .map(|mut row| row.remove(0).unwrap_or_default())
            .collect()
    }
}

/// A Postgres server for one test alone, to be stopped, killed and paused.
pub struct Server {
    folder: TempDir,
    pub database: Database,
}

impl Server {
    pub fn start() -> Server {
        let mut server = Server::without_data();
        server.script(&["start"]);
        server.database.url = server.script(&["url"]);
        server
    }

    fn without_data() -> Server {
        let folder = tempfile::Builder::new().prefix("hw-pg").tempdir().unwrap();
        // Another user runs the server when the tests run as root, and must get in.
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        Server { folder, database: Database::at(String::new()) }
    }

    /// A streaming standby of this server, running; see [`Server::follow`].
    pub fn standby(&self, name: &str) -> Server {
        let mut standby = Server::without_data();
        standby.follow(self, name);
        standby.database.url = standby.script(&["url"]);
        standby
    }

    /// Makes this server, which does not run, a streaming standby of `primary`; `name` is its `application_name`. It keeps
    /// trying to reach its primary, so each may be stopped and started.
    ///
    /// The files are copied while the primary is stopped: that needs no program which some packages of PostgreSQL lack.
    pub fn follow(&self, primary: &Server, name: &str) {
        primary.stop("fast");
        if self.data().exists() {
            std::fs::remove_dir_all(self.data()).unwrap();
        }
        let copied = Command::new("cp").arg("-pR").arg(primary.data()).arg(self.data()).status().unwrap();
        assert!(copied.success(), "cp -pR {}", primary.data().display());
        primary.start_again();
        std::fs::write(self.data().join("standby.signal"), "").unwrap();
        let url = &primary.database.url;
        let settings =
            format!("primary_conninfo = '{url}&application_name={name}'\nwal_retrieve_retry_interval = '100ms'\n");
        let file = OpenOptions::new().append(true).open(self.data().join("postgresql.auto.conf"));
        file.unwrap().write_all(settings.as_bytes()).unwrap();
        if let Ok(user) = std::env::var("HEADSPACE_TEST_PG_USER") {
            let status = Command::new("chown").args(["-R", &user]).arg(self.folder.path()).status().unwrap();
            assert!(status.success(), "chown -R {user}");
        }
        self.start_again();
    }

    /// Lets it come up again after [`Server::stop`] or [`Server::kill`].
    pub fn start_again(&self) {
        self.script(&["start"]);
    }

    /// Changes settings that hold from its next start on, and starts it anew.
    pub fn restart_with(&self, settings: &[&str]) {
        for setting in settings {
            self.database.query(&format!("ALTER SYSTEM SET {setting}"));
        }
        self.stop("fast");
        self.start_again();
    }

    /// `mode`: smart, fast or immediate.
    pub fn stop(&self, mode: &str) {
        self.script(&["stop", "--mode", mode]);
    }

    /// kill -9 of the postmaster; its children notice and end.
    pub fn kill(&self) {
        let pid = self.postmaster();
        signal(pid, "KILL");
        let process = Pid::from_raw(pid.cast_signed()).unwrap();
        wait_until("the postmaster is gone", SOON, || test_kill_process(process).is_err());
    }

    /// SIGSTOP (`pause` true) or SIGCONT to the postmaster and all its children.
    pub fn pause(&self, pause: bool) {
        let postmaster = self.postmaster();
        let children = Command::new("pgrep").args(["-P", &postmaster.to_string()]).output().unwrap();
        let children = String::from_utf8(children.stdout).unwrap();
        let pids = children.split_whitespace().map(|pid| pid.parse().unwrap()).chain([postmaster]);
        for pid in pids {
            // A child may have ended since.
            let name = if pause { "-STOP" } else { "-CONT" };
            let _ = Command::new("kill").args([name, &pid.to_string()]).output();
        }
    }

    pub fn postmaster(&self) -> u32 {
        let file = self.data().join("postmaster.pid");
        let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        text.lines().next().unwrap().parse().unwrap()
    }

    /// The data folder.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("cluster")
    }

    fn script(&self, arguments: &[&str]) -> String {
        let output = Command::new(project().join("scripts/dev-postgres.sh"))
            .args(arguments)
            .arg(self.folder.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let script = project().join("scripts/dev-postgres.sh");
        let _ = Command::new(script).args(["stop", "--mode", "immediate"]).arg(self.folder.path()).output();
    }
}

/// A folder for PATH in `parent`, with all programs but this one.
pub fn programs_without(name: &str, parent: &Path) -> PathBuf {
    let folder = parent.join(format!("no-{name}"));
    if std::fs::create_dir(&folder).is_ok() {
        let path = std::env::var_os("PATH").expect("PATH is set");
        for program in std::env::split_paths(&path).filter_map(|folder| std::fs::read_dir(folder).ok()).flatten() {
            let program = program.unwrap().path();
            if program.file_name().unwrap() != name {
                // Of two with the same name the first counts.
                let _ = std::os::unix::fs::symlink(&program, folder.join(program.file_name().unwrap()));
            }
        }
    }
    folder
}

/// The command lines of all processes that have `path` open; none where there is no /proc.
pub fn processes_with_open(path: &Path) -> Vec<String> {
    let entries = |folder: PathBuf| std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    entries(PathBuf::from("/proc"))
        .filter(|process| {
            entries(process.path().join("fd"))
                .any(|open| std::fs::read_link(open.path()).is_ok_and(|open| open == path))
        })
        .map(|process| std::fs::read_to_string(process.path().join("cmdline")).unwrap_or_default().replace('\0', " "))
        .collect()
}

/// Sends a signal (without SIG) to a process.
pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap();
    assert!(status.success(), "kill -{name} {pid}");
}

/// SIGSTOP, and waits until every thread has stopped: `kill` returns before that.
pub fn pause(pid: u32) {
    signal(pid, "STOP");
    wait_until("all its threads are stopped", SOON, || {
        let ps = Command::new("ps").args(["-L", "-o", "stat=", "-p", &pid.to_string()]).output().unwrap();
        String::from_utf8(ps.stdout).unwrap().lines().all(|state| state.starts_with('T'))
    });
}

/// SIGCONT.
pub fn resume(pid: u32) {
    signal(pid, "CONT");
}

/// A folder with transcripts, configuration and queue, and a database.
pub struct Stage {
    folder: TempDir,
    pub database: Option<Database>,
    /// Environment of every process started here; overrides the configuration.
    pub environment: BTreeMap<String, String>,
    /// A command and its arguments that run the program for us: with fewer rights, under limits.
    pub wrapped_by: Vec<String>,
}

impl Stage {
    /// Makes the tables, with a constraint that refuses the text "a curse".
    pub fn refuse_curses(&self) {
        assert_eq!(self.run(&["migrate"]).code(), 0);
        self.database().query(
            "ALTER TABLE events ADD CONSTRAINT no_swearing CHECK (payload->>'text' IS DISTINCT FROM 'a curse') NOT VALID",
        );
    }

    /// With a database of its own.
    pub fn new() -> Stage {
        Stage::with(Some(Database::new()))
    }

    pub fn with(database: Option<Database>) -> Stage {
        let folder = tempfile::Builder::new().prefix("hw").tempdir().unwrap();
        std::fs::create_dir(folder.path().join("projects")).unwrap();
        std::fs::create_dir(folder.path().join("home")).unwrap();
        // The lines that tests write were said long ago: only where a test says so do their sessions end.
        let config = "claude:\n  projects_path: projects\nfile_watcher:\n  inactivity_timeout: 3153600000\nhttp:\n  listen: null\n";
        std::fs::write(folder.path().join("config.yaml"), config).unwrap();
        Stage { folder, database, environment: BTreeMap::new(), wrapped_by: Vec::new() }
    }

    /// Sets a configuration key through its twin in the environment: `set("queue.drain_window", "1")`.
    pub fn set(&mut self, key: &str, value: &str) -> &mut Self {
        let (section, name) = key.split_once('.').expect("section.key");
        let variable = format!("HEADSPACE_{}__{}", section.to_uppercase(), name.to_uppercase());
        self.environment.insert(variable, value.to_owned());
        self
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where the state is of a watcher without a configuration file.
    pub fn state_folder(&self) -> PathBuf {
        let usual = if cfg!(target_os = "macos") { "Library/Application Support" } else { ".local/state" };
        self.folder().join("home").join(usual).join("headspace-watcher")
    }

    /// The token that the watcher has made.
    #[track_caller]
    pub fn token(&self) -> String {
        let file = self.folder().join("data/http.token");
        let token = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        token.trim_end().to_owned()
    }

    pub fn projects(&self) -> PathBuf {
        self.folder().join("projects")
    }

    pub fn database(&self) -> &Database {
        self.database.as_ref().expect("this stage has a database")
    }

    /// The transcript of session number `number` in project `project`; made at the first line.
    pub fn transcript(&self, project: &str, number: u32) -> Transcript {
        let session = format!("{number:08x}-0000-4000-8000-000000000000");
        let path = self.projects().join(project).join(format!("{session}.jsonl"));
        Transcript { path, session, lines: 0 }
    }

    /// The program with this stage's configuration and nothing of the caller's environment that could steer it.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let program = env!("CARGO_BIN_EXE_headspace-watcher");
        let mut command = match self.wrapped_by.split_first() {
            Some((wrapper, further)) => {
                let mut command = Command::new(wrapper);
                command.args(further).arg(program);
                command
            }
            None => Command::new(program),
        };
        command.args(arguments).current_dir(self.folder()).env_clear().stdin(Stdio::null());
        for name in ["PATH", "TMPDIR", "LLVM_PROFILE_FILE"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.env("HOME", self.folder().join("home"));
        if let Some(database) = &self.database {
            command.env("DATABASE_URL", &database.url);
        }
        command.envs(&self.environment);
        command
    }

    /// Runs a command to its end with this on its stdin.
    #[track_caller]
    pub fn run_with_input(&self, arguments: &[&str], input: impl AsRef<[u8]>) -> Ran {
        let mut command = self.command(arguments);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Who refuses its input may not read it to the end.
        let _ = child.stdin.take().unwrap().write_all(input.as_ref());
        Ran(child.wait_with_output().unwrap())
    }

    /// Runs a command that might wait for ever; fails the test where it does.
    #[track_caller]
    pub fn run_within(&self, within: Duration, arguments: &[&str]) -> Ran {
        let mut child = self.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let deadline = Instant::now() + within;
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                panic!("it has not ended within {within:?}: {arguments:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ran(child.wait_with_output().unwrap())
    }

    /// Runs a command to its end.
    pub fn run(&self, arguments: &[&str]) -> Ran {
        Ran(self.command(arguments).output().unwrap())
    }

    /// Runs a command in another folder to its end.
    pub fn run_in(&self, folder: &Path, arguments: &[&str]) -> Ran {
        Ran(self.command(arguments).current_dir(folder).output().unwrap())
    }

    /// `run`, once it is ready.
    #[track_caller]
    pub fn start(&self) -> Watcher {
        let watcher = self.start_with(&[]);
        watcher.wait_for_log("ready");
        watcher
    }

    /// `run` with further arguments; does not wait.
    pub fn start_with(&self, arguments: &[&str]) -> Watcher {
        let log = self.folder().join(format!("log-{}", unique()));
        let file = File::create(&log).unwrap();
        let mut command = self.command(&["--log-format", "json", "--log-level", "debug", "run"]);
        let child = command.args(arguments).stderr(file.try_clone().unwrap()).stdout(file).spawn().unwrap();
        Watcher { child, log, socket: self.folder().join("data/watcher.sock") }
    }

    /// Starts the watcher, waits until all is read and delivered, and checks that it ended well.
    #[track_caller]
    pub fn run_until_idle(&self) {
        let ran = self.run(&["run", "--until-idle"]);
        assert_eq!(ran.code(), 0, "{}", ran.error());
    }

    /// Waits until so many rows are there.
    #[track_caller]
    pub fn wait_for_rows(&self, count: u64) {
        wait_until(&format!("{count} rows, there are {}", self.database().count()), SOON, || {
            self.database().count() >= count
        });
    }
}

/// What a command left.
pub struct Ran(Output);

impl Ran {
    pub fn code(&self) -> i32 {
        self.0.status.code().unwrap_or(-1)
    }

    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.0.stdout).into_owned()
    }

    pub fn error(&self) -> String {
        String::from_utf8_lossy(&self.0.stderr).into_owned()
    }

    /// The output as lines of JSON.
    #[track_caller]
    pub fn lines(&self) -> Vec<Value> {
        let output = self.output();
        output.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
    }
}

/// An answer over HTTP.
#[derive(Debug)]
pub struct Answer {
    pub code: u16,
    /// Status line and fields, in lower case.
    pub head: String,
    pub body: String,
}

impl Answer {
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// One request and its answer; `None` where the connection gives none. Chunks are put together.
pub fn exchange(
    mut stream: impl std::io::Read + std::io::Write,
    method: &str,
    target: &str,
    headers: &[&str],
    body: Option<&str>,
) -> Option<Answer> {
    let mut head = format!("{method} {target} HTTP/1.1\r\nConnection: close\r\n");
    for header in headers {
        let _ = write!(head, "{header}\r\n");
    }
    if let Some(body) = body {
        let _ = write!(head, "Content-Length: {}\r\n", body.len());
    }
    // Who is refused early may not be read to the end.
    let _ = stream.write_all((head + "\r\n").as_bytes());
    let _ = stream.write_all(body.unwrap_or_default().as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, rest) = answer.split_once("\r\n\r\n")?;
    let head = head.to_lowercase();
    let mut body = String::new();
    if head.contains("transfer-encoding: chunked") {
        let mut rest = rest;
        while let Some((size, after)) = rest.split_once("\r\n") {
            let size = usize::from_str_radix(size, 16).ok()?;
            body.push_str(after.get(..size)?);
            rest = after.get(size + 2..)?;
        }
    } else {
        body.push_str(rest);
    }
    Some(Answer { code: head.split(' ').nth(1)?.parse().ok()?, head, body })
}

/// A running watcher. Killed when dropped.
pub struct Watcher {
    child: Child,
    log: PathBuf,
    socket: PathBuf,
}

impl Watcher {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Lines of the log with this message.
    pub fn logged(&self, message: &str) -> Vec<Value> {
        self.log()
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|line| line["message"].as_str().is_some_and(|found| found.contains(message)))
            .collect()
    }

    #[track_caller]
    pub fn wait_for_log(&self, message: &str) -> Value {
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(line) = self.logged(message).pop() {
                return line;
            }
            assert!(Instant::now() < deadline, "\"{message}\" is not logged: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Somebody else who sends to the socket.
    pub fn poster(&self) -> Poster {
        Poster { socket: self.socket.clone() }
    }

    /// `GET` over the socket: status code and body.
    pub fn get(&self, target: &str) -> Option<(u16, String)> {
        let stream = std::os::unix::net::UnixStream::connect(&self.socket).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        exchange(stream, "GET", target, &["Host: localhost"], None).map(|answer| (answer.code, answer.body))
    }

    /// Any request over the socket.
    #[track_caller]
    pub fn ask(&self, method: &str, target: &str, headers: &[&str], body: &str) -> Answer {
        let stream = std::os::unix::net::UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let headers = [&["Host: localhost"], headers].concat();
        exchange(stream, method, target, &headers, Some(body)).expect("an answer")
    }

    #[track_caller]
    pub fn health(&self) -> Value {
        wait_for("health answers", SOON, || serde_json::from_str(&self.get("/health")?.1).ok())
    }

    /// Whether so many events have left the queue since the start, as rows or as dead letters, and none is left.
    pub fn has_settled(&self, events: usize) -> bool {
        let health = self.health();
        let number = |section: &str, name: &str| health[section][name].as_u64().unwrap();
        let settled = number("writes", "succeeded") + number("writes", "duplicates") + number("queue", "dead_letters");
        number("queue", "pending") == 0 && settled >= events as u64
    }

    /// SIGTERM, then its status and how long it took.
    #[track_caller]
    pub fn stop(mut self) -> (ExitStatus, Duration) {
        let begun = Instant::now();
        signal(self.pid(), "TERM");
        (self.wait(), begun.elapsed())
    }

    /// How it has ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let log = self.log.clone();
        let child = &mut self.child;
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it goes on: {}", std::fs::read_to_string(log).unwrap_or_default());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// kill -9.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let status = self.child.wait().unwrap();
        assert_eq!(status.signal(), Some(9), "it had ended before: {}", self.log());
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends requests to a watcher's socket.
#[derive(Clone)]
pub struct Poster {
    socket: PathBuf,
}

impl Poster {
    /// `POST` of a JSON body: status code and body. `None` when there is no whole answer.
    pub fn post(&self, target: &str, body: &str) -> Option<(u16, String)> {
        use std::io::Read;
        let mut stream = std::os::unix::net::UnixStream::connect(&self.socket).ok()?;
        stream.set_read_timeout(Some(SOON)).ok()?;
        let length = body.len();
        write!(
            stream,
            "POST {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        )
        .ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let code = answer.split(' ').nth(1)?.parse().ok()?;
        Some((code, answer.split_once("\r\n\r\n")?.1.to_owned()))
    }
}

/// Writes lines as Claude Code does.
#[derive(Clone)]
pub struct Transcript {
    pub path: PathBuf,
    pub session: String,
    lines: u32,
}

impl Transcript {
    /// A human prompt as a line of JSON, without newline. Its uuid follows from the session and the text.
    pub fn prompt(&self, text: &str) -> String {
        json!({
            "parentUuid": null, "isSidechain": false, "type": "user", "userType": "external",
            "message": {"role": "user", "content": text}, "uuid": self.uuid(text),
            "timestamp": "2026-01-02T03:04:05.678Z", "cwd": "/home/me/app", "sessionId": self.session,
            "version": "2.1.119", "gitBranch": "main"
        })
        .to_string()
    }

    /// The agent's answer as a line of JSON, without newline.
    pub fn answer(&self, text: &str) -> String {
        json!({
            "parentUuid": null, "isSidechain": false, "type": "assistant", "userType": "external",
            "message": {"role": "assistant", "id": "msg_1", "type": "message", "model": "claude-opus-4-8",
                        "content": [{"type": "text", "text": text}], "stop_reason": "end_turn"},
            "uuid": self.uuid(text), "timestamp": "2026-01-02T03:04:06.789Z", "cwd": "/home/me/app",
            "sessionId": self.session, "version": "2.1.119", "gitBranch": "main"
        })
        .to_string()
    }

    fn uuid(&self, text: &str) -> String {
        uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, format!("{}/{text}", self.session).as_bytes()).to_string()
    }

    /// Appends bytes as they are.
    pub fn append(&mut self, bytes: impl AsRef<[u8]>) {
        std::fs::create_dir_all(self.path.parent().unwrap()).unwrap();
        let mut file = OpenOptions::new().create(true).append(true).open(&self.path).unwrap();
        file.write_all(bytes.as_ref()).unwrap();
    }

    /// Appends a human prompt with this text.
    pub fn say(&mut self, text: &str) {
        let line = self.prompt(text);
        self.append(line + "\n");
        self.lines += 1;
    }

    /// Appends `count` prompts in one write; their texts are `<prefix> <number>`. Gives the texts.
    pub fn say_many(&mut self, prefix: &str, count: u32) -> Vec<String> {
        let texts: Vec<String> = (0..count).map(|number| format!("{prefix} {number}")).collect();
        let mut lines = String::new();
        for text in &texts {
            let _ = writeln!(lines, "{}", self.prompt(text));
        }
        self.append(lines);
        texts
    }
}

/// A process that has a session open, as files in Claude Code's own folder say. Killed when dropped, and its file removed.
pub struct Process {
    child: Child,
    pub file: PathBuf,
}

impl Process {
    /// `folder` is where the file goes, named from the stage's own folder.
    pub fn open(stage: &Stage, folder: &str, session: &str) -> Process {
        let child = Command::new("sleep").arg("600").spawn().unwrap();
        let mut process = Process { child, file: PathBuf::new() };
        process.file = process.note(stage, folder, session);
        process
    }

    /// Writes that it has `session` open; answers the file.
    pub fn note(&self, stage: &Stage, folder: &str, session: &str) -> PathBuf {
        let folder = stage.folder().join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        let file = folder.join(format!("{}.json", self.child.id()));
        std::fs::write(&file, json!({"pid": self.child.id(), "sessionId": session, "cwd": "/"}).to_string()).unwrap();
        file
    }

    /// As a crash does: the file stays.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.file = PathBuf::new();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.file);
    }
}

/// Appends numbered lines on a thread of its own until it is ended.
pub struct Writer {
    end: Arc<AtomicBool>,
    thread: JoinHandle<Vec<String>>,
}

impl Writer {
    pub fn start(mut transcript: Transcript, pause: Duration) -> Writer {
        let end = Arc::new(AtomicBool::new(false));
        let ended = end.clone();
        let thread = std::thread::spawn(move || {
            let mut texts = Vec::new();
            while !ended.load(Ordering::Relaxed) {
                texts.extend(transcript.say_many(&format!("burst {}", texts.len()), 3));
                std::thread::sleep(pause);
            }
            texts
        });
        Writer { end, thread }
    }

    /// The texts, in the order they were written.
    pub fn finish(self) -> Vec<String> {
        self.end.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// A number from a seed; good enough for random moments, and printed so that a failure can be repeated.
pub struct Dice(u64);

impl Dice {
    pub fn new(name: &str) -> Dice {
        let seed = std::env::var("HEADSPACE_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| uuid::Uuid::now_v7().as_u128() as u64 | 1);
        eprintln!("{name}: HEADSPACE_TEST_SEED={seed}");
        Dice(seed)
    }

    /// Dice of another thread.
    pub fn fork(&mut self) -> Dice {
        Dice(self.below(u64::MAX) | 1)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Rounds of a long proof: few in a test run, many under `scripts/torture.sh`.
pub fn rounds(few: u32) -> u32 {
    std::env::var("HEADSPACE_TORTURE_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(few)
}
