//! The scene of a measurement: a folder, a database, the watcher as a process, and what Linux says of that process.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::runtime::Runtime;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};
use uuid::Uuid;

use crate::rows::Rows;

/// How long anything may take before the measurement gives up.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// What Linux counts processor time in, for programs, on every machine.
const TICKS_PER_SECOND: u64 = 100;

/// What all parts are given.
pub struct Bench {
    pub quick: bool,
    /// On the disk that is measured; everything in it is thrown away.
    pub folder: PathBuf,
    pub server: Server,
    pub rows: Rows,
    /// What is to be compared with: docs/benchmarks.tsv.
    pub published: Option<PathBuf>,
    /// What holds usr/sbin/rsyslogd, or why there is none.
    pub rsyslog: Result<PathBuf, String>,
}

impl Bench {
    pub fn choose<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }

    /// A folder of its own.
    pub fn make_folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    /// Notes a process, so that scripts/bench.sh ends it where we can't.
    pub fn note(&self, child: &Child) -> Result<()> {
        note(&self.folder, child)
    }
}

fn note(folder: &Path, child: &Child) -> Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(folder.join("pids"))?;
    writeln!(file, "{}", child.id())?;
    Ok(())
}

/// The project's folder.
pub fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The program that is measured, built beside this one.
pub fn watcher_program() -> Result<PathBuf> {
    let examples = std::env::current_exe()?;
    let built = examples.parent().and_then(Path::parent).context("no target folder")?;
    Ok(built.join("headspace-watcher"))
}

/// Waits until `condition` gives something.
pub fn wait_for<T>(what: &str, step: Duration, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        ensure!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(step);
    }
}

// ---- Postgres --------------------------------------------------------------------------------------------------------

/// A server that scripts/dev-postgres.sh started.
pub struct Server {
    folder: PathBuf,
    bin: PathBuf,
    url: String,
    databases: u32,
}

impl Server {
    pub fn at(folder: &Path) -> Result<Server> {
        let mut server = Server { folder: folder.to_owned(), bin: PathBuf::new(), url: String::new(), databases: 0 };
        server.url = server.script(&["url"])?;
        server.bin = PathBuf::from(script(&["bin"])?);
        Ok(server)
    }

    /// One of the server's programs; where its folder is made of links, some may be behind them only.
    pub fn program(&self, name: &str) -> PathBuf {
        let real = self.bin.join("postgres").canonicalize().ok();
        let folders = [Some(self.bin.as_path()), real.as_deref().and_then(Path::parent)];
        let found = folders.into_iter().flatten().map(|folder| folder.join(name)).find(|path| path.exists());
        found.unwrap_or_else(|| PathBuf::from(name))
    }

    fn script(&self, arguments: &[&str]) -> Result<String> {
        let folder = self.folder.to_str().context("the folder's name is not UTF-8")?;
        script(&[arguments, &[folder]].concat())
    }

    pub fn stop(&self) -> Result<()> {
        self.script(&["stop", "--mode", "fast"]).map(drop)
    }

    pub fn start(&self) -> Result<()> {
        self.script(&["start"]).map(drop)
    }

    /// Stops all its processes where they are, or lets them go on.
    pub fn pause(&self, pause: bool) -> Result<()> {
        let moved = self.folder.join("moved");
        let folder =
            if moved.exists() { PathBuf::from(std::fs::read_to_string(moved)?.trim()) } else { self.folder.clone() };
        let lock = std::fs::read_to_string(folder.join("cluster/postmaster.pid"))?;
        let postmaster: i32 = lock.lines().next().context("no pid")?.trim().parse()?;
        let to = if pause { Signal::STOP } else { Signal::CONT };
        // The postmaster first when pausing, so that it starts no others meanwhile.
        send(postmaster, to)?;
        for child in children_of(postmaster)? {
            // It may have ended by itself.
            let _ = send(child, to);
        }
        Ok(())
    }

    /// A new, empty database.
    pub fn database(&mut self) -> Result<Database> {
        self.databases += 1;
        let name = format!("bench_{}_{}", std::process::id(), self.databases);
        let server = Database::open(&self.url)?;
        server.execute(&format!("CREATE DATABASE {name}"))?;
        let (address, parameters) = self.url.split_once('?').context("a URL with parameters")?;
        let (address, _) = address.rsplit_once('/').context("a URL with a path")?;
        Database::open(&format!("{address}/{name}?{parameters}"))
    }

    /// For a database that is not needed any more; the disk is not endless.
    pub fn drop(&self, database: Database) -> Result<()> {
        let name = database.name()?;
        drop(database);
        Database::open(&self.url)?.execute(&format!("DROP DATABASE {name} WITH (FORCE)"))
    }
}

fn script(arguments: &[&str]) -> Result<String> {
    let output = Command::new(project().join("scripts/dev-postgres.sh")).args(arguments).output()?;
    ensure!(output.status.success(), "dev-postgres.sh {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A connection, with a runtime that runs while it is asked.
pub struct Database {
    pub url: String,
    runtime: Runtime,
    client: Client,
}

impl Database {
    pub fn open(url: &str) -> Result<Database> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(async {
            let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
            tokio::spawn(connection);
            anyhow::Ok(client)
        })?;
        Ok(Database { url: url.to_owned(), runtime, client })
    }

    pub fn execute(&self, sql: &str) -> Result<()> {
        self.runtime.block_on(self.client.batch_execute(sql)).with_context(|| format!("could not run {sql}"))
    }

    pub fn value(&self, sql: &str) -> Result<String> {
        let messages =
            self.runtime.block_on(self.client.simple_query(sql)).with_context(|| format!("could not run {sql}"))?;
        let row = messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or_default().to_owned()),
            _ => None,
        });
        row.with_context(|| format!("no row: {sql}"))
    }

    pub fn number(&self, sql: &str) -> Result<f64> {
        self.value(sql)?.parse().with_context(|| format!("no number: {sql}"))
    }

    pub fn has_tables(&self) -> Result<bool> {
        Ok(self.value(
            "SELECT to_regclass('headspace_watcher.event_receipts') IS NOT NULL AND to_regclass('events') IS NOT NULL",
        )? == "t")
    }

    /// Rows of `events`.
    pub fn rows(&self) -> Result<u64> {
        if !self.has_tables()? {
            return Ok(0);
        }
        Ok(self.value("SELECT count(*) FROM events")?.parse()?)
    }

    pub fn name(&self) -> Result<String> {
        self.value("SELECT current_database()")
    }

    /// Empty tables of the same shape, after a checkpoint: how every run begins.
    pub fn empty(&self) -> Result<()> {
        self.execute("TRUNCATE events, headspace_watcher.event_receipts")?;
        self.execute("CHECKPOINT")
    }

    /// The tables, without events.
    pub fn migrate(&self) -> Result<()> {
        let folder = std::env::temp_dir();
        let status = Command::new(watcher_program()?)
            .args(["migrate"])
            .env_clear()
            .env("HOME", &folder)
            .env("DATABASE_URL", &self.url)
            .current_dir(folder)
            .stdout(Stdio::null())
            .status()?;
        ensure!(status.success(), "migrate: {status}");
        Ok(())
    }
}

// ---- processes -------------------------------------------------------------------------------------------------------

pub fn send(pid: i32, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(pid).context("not a process id")?;
    Ok(kill_process(pid, signal)?)
}

pub fn children_of(parent: i32) -> Result<Vec<i32>> {
    let mut children = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<i32>() else { continue };
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        // The name in brackets may hold anything.
        let after = stat.rsplit_once(") ").map_or("", |(_, after)| after);
        if after.split(' ').nth(1).and_then(|number| number.parse::<i32>().ok()) == Some(parent) {
            children.push(pid);
        }
    }
    Ok(children)
}

/// What Linux counted for a process.
#[derive(Clone, Copy, Default)]
pub struct Usage {
    /// Peak of resident memory.
    pub peak_kib: u64,
    /// Bytes it caused to be written to disk.
    pub written_bytes: u64,
    pub cpu: Duration,
    /// How often one of its threads waited and was woken.
    pub wake_ups: u64,
}

impl Usage {
    /// As far as /proc tells: a process that has ended keeps what was seen last.
    fn look(&mut self, pid: u32) {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let field = |text: &str, name: &str| -> Option<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().trim_end_matches(" kB").parse().ok()
        };
        if let Some(peak) = field(&read("status"), "VmHWM:") {
            self.peak_kib = peak;
        }
        if let Some(written) = field(&read("io"), "write_bytes:") {
            self.written_bytes = written;
        }
        let stat = read("stat");
        if let Some((_, after)) = stat.rsplit_once(") ") {
            let ticks: u64 = after.split(' ').skip(11).take(2).filter_map(|number| number.parse::<u64>().ok()).sum();
            self.cpu = Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND);
        }
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let wake_ups: u64 = tasks
            .filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok())
            .filter_map(|status| field(&status, "voluntary_ctxt_switches:"))
            .sum();
        self.wake_ups = self.wake_ups.max(wake_ups);
    }

    pub fn of(pid: u32) -> Usage {
        let mut usage = Usage::default();
        usage.look(pid);
        usage
    }

    pub fn peak_mb(&self) -> f64 {
        self.peak_kib as f64 / 1024.0
    }
}

/// Transcripts, configuration, queue.
pub struct Scene {
    folder: PathBuf,
    socket: PathBuf,
    root: PathBuf,
    settings: Vec<(String, String)>,
}

impl Scene {
    pub fn new(bench: &Bench, name: &str) -> Result<Scene> {
        let folder = bench.make_folder(name)?;
        std::fs::create_dir(folder.join("projects"))?;
        std::fs::create_dir(folder.join("home"))?;
        // A socket's path is short; the project's need not be.
        let socket = std::env::temp_dir().join(format!("bench-{}-{name}.sock", std::process::id()));
        // The lines were said long ago: their sessions are not to end meanwhile.
        let config = format!(
            "claude:\n  projects_path: projects\nfile_watcher:\n  inactivity_timeout: 3153600000\nhttp:\n  listen: null\n  socket: {}\nqueue:\n  max_pending_bytes: 1099511627776\n",
            socket.display()
        );
        std::fs::write(folder.join("config.yaml"), config)?;
        Ok(Scene { folder, socket, root: bench.folder.clone(), settings: Vec::new() })
    }

    /// Sets a configuration key through its twin in the environment.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let (section, name) = key.split_once('.').context("section.key")?;
        let variable = format!("HEADSPACE_{}__{}", section.to_uppercase(), name.to_uppercase());
        self.settings.push((variable, value.to_owned()));
        Ok(())
    }

    /// Sets a variable of the program's environment.
    pub fn add_variable(&mut self, name: &str, value: &str) {
        self.settings.push((name.to_owned(), value.to_owned()));
    }

    pub fn projects(&self) -> PathBuf {
        self.folder.join("projects")
    }

    pub fn queue(&self) -> PathBuf {
        self.folder.join("data/queue")
    }

    pub fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    /// The program with this scene's configuration and nothing of the caller's environment that could steer it.
    pub fn command(&self, program: &Path, url: &str) -> Command {
        let mut command = Command::new(program);
        command.env_clear().stdin(Stdio::null()).current_dir(&self.folder);
        for name in ["PATH", "TMPDIR"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.env("HOME", self.folder.join("home")).env("DATABASE_URL", url);
        command.envs(self.settings.iter().map(|(name, value)| (name, value)));
        command.arg("--config").arg(self.folder.join("config.yaml"));
        command
    }

    /// `run`, not yet ready.
    pub fn start(&self, url: &str, arguments: &[&str]) -> Result<Watcher> {
        let mut command = self.command(&watcher_program()?, url);
        command.args(["--log-format", "json", "run"]).args(arguments);
        self.spawn(command)
    }

    pub fn spawn(&self, mut command: Command) -> Result<Watcher> {
        let log = File::create(self.log())?;
        let begun = Instant::now();
        let child = command.stdout(log.try_clone()?).stderr(log).spawn()?;
        note(&self.root, &child)?;
        Ok(Watcher { child, begun, socket: self.socket.clone(), log: self.log(), usage: Usage::default() })
    }
}

/// A running watcher. Killed when dropped.
pub struct Watcher {
    child: Child,
    pub begun: Instant,
    socket: PathBuf,
    log: PathBuf,
    usage: Usage,
}

impl Watcher {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn usage(&mut self) -> Usage {
        self.usage.look(self.child.id());
        self.usage
    }

    /// What it says of itself; `None` while it does not answer.
    pub fn health(&self) -> Option<serde_json::Value> {
        let mut stream = UnixStream::connect(&self.socket).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (_, body) = answer.split_once("\r\n\r\n")?;
        serde_json::from_str(body.get(body.find('{')?..=body.rfind('}')?)?).ok()
    }

    /// Events that wait in the queue.
    pub fn pending(&self) -> Option<u64> {
        self.health()?.pointer("/queue/pending")?.as_u64()
    }

    fn ended(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("the watcher has ended, {status}: {}", std::fs::read_to_string(&self.log).unwrap_or_default());
        }
        Ok(())
    }

    /// Time from its start until it was ready.
    pub fn wait_until_ready(&mut self) -> Result<Duration> {
        wait_for("ready", Duration::from_millis(1), || {
            self.ended()?;
            let log = std::fs::read_to_string(&self.log)?;
            Ok(log.contains("\"ready\"").then(|| self.begun.elapsed()))
        })
    }

    /// Waits for something of its health, looking at its memory meanwhile.
    pub fn wait_until(&mut self, what: &str, mut condition: impl FnMut(&serde_json::Value) -> bool) -> Result<()> {
        wait_for(what, Duration::from_millis(10), || {
            self.ended()?;
            self.usage.look(self.child.id());
            Ok(self.health().is_some_and(|health| condition(&health)).then_some(()))
        })
    }

    /// Waits until so many rows are written and nothing waits in the queue.
    pub fn wait_until_stored(&mut self, rows: u64) -> Result<()> {
        self.wait_until("all stored", |health| {
            let number = |path: &str| health.pointer(path).and_then(serde_json::Value::as_u64);
            number("/writes/succeeded") == Some(rows) && number("/queue/pending") == Some(0)
        })
    }

    /// What it takes of one processor while `what` is done, in percent, and how often it wakes up a second.
    pub fn effort(&self, what: impl FnOnce() -> Result<()>) -> Result<(f64, f64)> {
        let (before, begun) = (Usage::of(self.pid()), Instant::now());
        what()?;
        let (after, seconds) = (Usage::of(self.pid()), begun.elapsed().as_secs_f64());
        let share = 100.0 * after.cpu.saturating_sub(before.cpu).as_secs_f64() / seconds;
        Ok((share, (after.wake_ups - before.wake_ups) as f64 / seconds))
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        wait_for("its end", Duration::from_millis(1), || {
            self.usage.look(self.child.id());
            Ok(self.child.try_wait()?)
        })
    }

    /// SIGTERM until gone.
    pub fn stop(mut self) -> Result<Duration> {
        let begun = Instant::now();
        send(i32::try_from(self.pid())?, Signal::TERM)?;
        let status = self.child.wait()?;
        let took = begun.elapsed();
        ensure!(status.success(), "it ended with {status}");
        Ok(took)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

// ---- transcripts -----------------------------------------------------------------------------------------------------

/// Half a kilobyte, as a turn's text is.
const TEXT: &str = "The drainer takes the oldest envelopes out of the queue and hands them to the sink. ";

/// A session's transcript, written as Claude Code does: a prompt and an answer in turn, each a turn of 0.9 kB.
pub struct Transcript {
    pub path: PathBuf,
    file: File,
    session: Uuid,
    lines: u64,
}

impl Transcript {
    pub fn create(projects: &Path, number: u32) -> Result<Transcript> {
        let session = Uuid::from_u128((u128::from(number) << 96) | 0x4000_8000_0000_0000_0001);
        let folder = projects.join(format!("-home-me-work-app-{}", number % 20));
        std::fs::create_dir_all(&folder)?;
        let path = folder.join(format!("{session}.jsonl"));
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        Ok(Transcript { path, file, session, lines: 0 })
    }

    /// Turns written so far.
    pub fn turns(&self) -> u64 {
        self.lines
    }

    /// Appends so many turns.
    pub fn say(&mut self, turns: u64) -> Result<()> {
        let mut bytes = Vec::new();
        for _ in 0..turns {
            self.line(&mut bytes)?;
            if bytes.len() > 1 << 20 {
                self.file.write_all(&bytes)?;
                bytes.clear();
            }
        }
        self.file.write_all(&bytes)?;
        Ok(())
    }

    fn line(&mut self, bytes: &mut Vec<u8>) -> Result<()> {
        self.lines += 1;
        let (session, text) = (self.session, TEXT.repeat(6));
        let uuid = scattered(self.session, self.lines);
        let message = if self.lines % 2 == 1 {
            format!("\"type\":\"user\",\"message\":{{\"role\":\"user\",\"content\":\"{text}\"}}")
        } else {
            format!(
                "\"type\":\"assistant\",\"message\":{{\"model\":\"claude-opus-4-8\",\"id\":\"msg_01XFDUDYJgAACzvnptvVoYEL\",\
                 \"type\":\"message\",\"role\":\"assistant\",\"content\":[{{\"type\":\"text\",\"text\":\"{text}\"}}],\
                 \"stop_reason\":\"end_turn\",\"usage\":{{\"input_tokens\":3,\"output_tokens\":120}}}}"
            )
        };
        writeln!(
            bytes,
            "{{\"parentUuid\":null,\"isSidechain\":false,{message},\"uuid\":\"{uuid}\",\
             \"timestamp\":\"2026-01-02T03:04:05.678Z\",\"userType\":\"external\",\"cwd\":\"/home/me/work/app\",\
             \"sessionId\":\"{session}\",\"version\":\"2.1.119\",\"gitBranch\":\"main\"}}"
        )?;
        Ok(())
    }
}

/// A UUID that looks random, as Claude Code's are: in order they would make the receipts' index faster than it is.
fn scattered(session: Uuid, number: u64) -> Uuid {
    let mix = |seed: u64| {
        let mut value = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    };
    let (high, low) = session.as_u64_pair();
    let first = mix(high ^ number);
    uuid::Builder::from_random_bytes(Uuid::from_u64_pair(first, mix(first ^ low ^ (number << 32))).into_bytes())
        .into_uuid()
}
