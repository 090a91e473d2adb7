//! What scripts/soak.sh runs: the load, what goes wrong meanwhile, and the measuring of the watcher.
//!
//! Knows nothing of the program but its commands and files, so that it can't share its mistakes. What it has written it
//! puts into ledgers, which scripts/soak.sh compares with the table:
//!
//! ```text
//! FOLDER/ledger/turns-N    path, uuid, characters of the text: a line for each turn, in the order of writing
//! FOLDER/ledger/emitted    event id, "sure" when the command said that it is durable, else "unsure"
//! FOLDER/ledger/hooks      the hook's tool_use_id
//! FOLDER/samples           seconds, pid of the watcher, resident kB, descriptors, kB of the queue, kB of all data, calm?
//! FOLDER/facts             name, number: what was done
//! FOLDER/supervisor        pid of the supervisor, for who must clean up
//! ```
//!
//! Arguments: FOLDER, MINUTES, SEED. FOLDER holds `config.yaml` and `projects`; the environment names the rest:
//! SOAK_WATCHER (the program), SOAK_SCRIPTS, SOAK_POSTGRES (a folder of dev-postgres.sh), SOAK_DISK (a small file system
//! for the queue) and SOAK_CLOCK (a file that moves the watcher's clock), both optional.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use uuid::Uuid;

/// Writers at work at once, each with sessions of its own.
const WRITERS: u64 = 2;
/// Sessions that one writer writes to at a time.
const SESSIONS_OPEN_MAX: usize = 6;
/// When Postgres is away while many turns come in at once, in parts of the run: outside the calm third, as that is to be flat.
const BACKLOGS_AT: [f64; 3] = [0.1, 0.27, 0.8];
/// Bytes of transcripts of such a backlog.
const BACKLOG_BYTES: u64 = 200 << 20;
/// Pending bytes that are waited for: more than goes into two segments of the queue.
const WAITING_BYTES: u64 = 140 << 20;
/// How long is waited for the watcher to have read so much.
const BACKLOG_MAX: Duration = Duration::from_secs(60);
/// How long all may take to settle once nothing goes wrong any more: the supervisor's pause on a full disk is a minute.
const SETTLE_MAX: Duration = Duration::from_secs(300);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, minutes, seed] = arguments.as_slice() else { bail!("usage: soak-drive FOLDER MINUTES SEED") };
    let duration = Duration::from_secs_f64(minutes.parse::<f64>().context("MINUTES")? * 60.0);
    let scene = Arc::new(Scene::new(PathBuf::from(folder))?);
    let mut dice = Dice(seed.parse::<u64>().context("SEED")? | 1);
    let mut supervisor = Some(scene.start_supervisor()?);

    let load = Arc::new(AtomicBool::new(true));
    let mut threads = Vec::new();
    for number in 0..WRITERS {
        let writer = Writer::new(scene.clone(), number, dice.fork())?;
        threads.push(std::thread::spawn(running(&load, move |load| writer.run(load))));
    }
    let (emitter, hooks) = ((scene.clone(), dice.fork()), (scene.clone(), dice.fork()));
    threads.push(std::thread::spawn(running(&load, move |load| emit(&emitter.0, emitter.1, load))));
    threads.push(std::thread::spawn(running(&load, move |load| send_hooks(&hooks.0, hooks.1, load))));
    let sampling = Arc::new(AtomicBool::new(true));
    let sampled = scene.clone();
    let sampler = std::thread::spawn(running(&sampling, move |sampling| sample(&sampled, sampling)));

    let historian = Writer::new(scene.clone(), WRITERS, dice.fork())?;
    let outcome = torment(&scene, &mut supervisor, &mut dice, duration, &load, historian);
    load.store(false, Ordering::Relaxed);
    for thread in threads {
        match thread.join() {
            Ok(result) => result?,
            Err(_) => bail!("a thread of the load has panicked"),
        }
    }
    outcome?;
    let begun = Instant::now();
    let settled = settle(&scene, &mut supervisor);
    scene.count("settled_seconds", begun.elapsed().as_secs());
    sampling.store(false, Ordering::Relaxed);
    if let Ok(result) = sampler.join() {
        result?;
    }
    settled?;
    let mut supervisor = supervisor.take().context("a supervisor")?;
    let begun = Instant::now();
    signal(supervisor.id(), "TERM")?;
    let status = supervisor.wait()?;
    scene.count("stop_milliseconds", begun.elapsed().as_millis() as u64);
    if status.code() != Some(0) {
        bail!("the supervisor ended with {status} after a stop");
    }
    scene.write_facts()
}

/// A loop that ends when `on` turns false; its error ends the load for all.
fn running(
    on: &Arc<AtomicBool>,
    run: impl FnOnce(&AtomicBool) -> Result<()> + Send + 'static,
) -> impl FnOnce() -> Result<()> + Send + 'static {
    let on = on.clone();
    move || run(&on).inspect_err(|_| on.store(false, Ordering::Relaxed))
}

/// Where all takes place.
struct Scene {
    folder: PathBuf,
    watcher: PathBuf,
    scripts: PathBuf,
    postgres: PathBuf,
    disk: Option<PathBuf>,
    clock: Option<PathBuf>,
    begun: Instant,
    facts: Mutex<BTreeMap<String, u64>>,
    /// Nothing that ends the watcher happens now: what is measured is one and the same process.
    calm: AtomicBool,
}

impl Scene {
    fn new(folder: PathBuf) -> Result<Scene> {
        let from_environment = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let needed = |name: &str| from_environment(name).with_context(|| format!("{name} is not set"));
        std::fs::create_dir_all(folder.join("ledger"))?;
        Ok(Scene {
            watcher: needed("SOAK_WATCHER")?,
            scripts: needed("SOAK_SCRIPTS")?,
            postgres: needed("SOAK_POSTGRES")?,
            disk: from_environment("SOAK_DISK"),
            clock: from_environment("SOAK_CLOCK"),
            begun: Instant::now(),
            facts: Mutex::default(),
            calm: AtomicBool::new(false),
            folder,
        })
    }

    fn ledger(&self, name: &str) -> Result<File> {
        Ok(OpenOptions::new().create(true).append(true).open(self.folder.join("ledger").join(name))?)
    }

    fn count(&self, fact: &str, add: u64) {
        let mut facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        *facts.entry(fact.to_owned()).or_default() += add;
    }

    fn write_facts(&self) -> Result<()> {
        let facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        let lines: String = facts.iter().fold(String::new(), |mut lines, (name, number)| {
            let _ = writeln!(lines, "{name}\t{number}");
            lines
        });
        Ok(std::fs::write(self.folder.join("facts"), lines)?)
    }

    /// What happens, said as it does.
    fn say(&self, what: &str) {
        println!("{:7.1} s  {what}", self.begun.elapsed().as_secs_f64());
    }

    /// A program under the clock that jumps.
    fn under_the_clock(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.folder).stdin(Stdio::null());
        if let (Some(clock), Some(library)) = (&self.clock, std::env::var_os("SOAK_FAKETIME")) {
            // The monotonic clock and the files' own times stay what they are, as with a real jump.
            command.env("LD_PRELOAD", library).env("FAKETIME_TIMESTAMP_FILE", clock).env("FAKETIME_NO_CACHE", "1");
            command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("NO_FAKE_STAT", "1");
        }
        command
    }

    /// A command of the program.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.under_the_clock(&self.watcher);
        command.arg("--config").arg(self.folder.join("config.yaml")).args(arguments);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    fn start_supervisor(&self) -> Result<Child> {
        let log = OpenOptions::new().create(true).append(true).open(self.folder.join("log"))?;
        let mut command = self.under_the_clock(&self.scripts.join("run-watcher.sh"));
        command.arg("--config").arg(self.folder.join("config.yaml")).args(["--log-format", "json"]);
        command.env("HEADSPACE_WATCHER_BIN", &self.watcher);
        let child = command.stdout(log.try_clone()?).stderr(log).spawn()?;
        std::fs::write(self.folder.join("supervisor"), child.id().to_string())?;
        Ok(child)
    }

    /// Runs dev-postgres.sh on our server.
    fn postgres(&self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new(self.scripts.join("dev-postgres.sh"));
        let output = command.args(arguments).arg(&self.postgres).stdin(Stdio::null()).output()?;
        if !output.status.success() {
            bail!("dev-postgres.sh {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    /// The process of the watcher: a child of our supervisor that runs our program.
    fn watcher_pid(&self) -> Option<u32> {
        let config = self.folder.join("config.yaml");
        std::fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            if std::fs::read_link(entry.path().join("exe")).ok()? != self.watcher {
                return None;
            }
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
            let ours = words.contains(&config.as_os_str().as_encoded_bytes());
            (ours && words.contains(&b"run".as_slice())).then_some(pid)
        })
    }

    /// Where the queue is.
    fn queue(&self) -> PathBuf {
        self.disk.clone().unwrap_or_else(|| self.folder.join("data")).join("queue")
    }

    /// Segments of the queue.
    fn segments(&self) -> usize {
        let entries = std::fs::read_dir(self.queue()).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"segment-")).count()
    }

    /// Whether `condition` comes true in this time.
    fn wait_for(&self, limit: Duration, condition: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if condition() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        false
    }

    /// What the running watcher says of itself.
    fn health(&self) -> Option<Value> {
        let output = self.command(&["status", "--json"]).stdout(Stdio::piped()).output().ok()?;
        serde_json::from_slice(&output.stdout).ok()
    }
}

fn signal(pid: u32, name: &str) -> Result<()> {
    // It may have ended just now.
    Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).stderr(Stdio::null()).status()?;
    Ok(())
}

/// One thing after another goes wrong, until the time is over. The middle third is calm.
fn torment(
    scene: &Scene,
    supervisor: &mut Option<Child>,
    dice: &mut Dice,
    duration: Duration,
    load: &AtomicBool,
    mut historian: Writer,
) -> Result<()> {
    let third = duration / 3;
    let mut backlogs = BACKLOGS_AT.iter().map(|part| duration.mul_f64(*part)).peekable();
    while scene.begun.elapsed() < duration {
        let left = duration.saturating_sub(scene.begun.elapsed());
        std::thread::sleep(dice.between(2000, 12_000).min(left));
        if !load.load(Ordering::Relaxed) {
            bail!("the load has ended early");
        }
        if let Some(status) = supervisor.as_mut().map(Child::try_wait).transpose()?.flatten() {
            bail!("the supervisor has given up: {status}");
        }
        let calm = scene.begun.elapsed() > third && scene.begun.elapsed() < third * 2;
        scene.calm.store(calm, Ordering::Relaxed);
        if backlogs.next_if(|at| scene.begun.elapsed() > *at).is_some() {
            bring_backlog(scene, &mut historian, dice)?;
            continue;
        }
        match dice.below(if calm { 10 } else { 20 }) {
            0..3 => restart_postgres(scene, "fast", dice)?,
            3..5 => restart_postgres(scene, "immediate", dice)?,
            5 | 6 => restart_postgres(scene, "kill -9", dice)?,
            7..10 => move_clock(scene, dice)?,
            10..15 => kill_watcher(scene)?,
            15 => {
                scene.say("stopped (SIGSTOP) for a while");
                if let Some(pid) = scene.watcher_pid() {
                    signal(pid, "STOP")?;
                    std::thread::sleep(dice.between(500, 4000));
                    signal(pid, "CONT")?;
                    scene.count("pauses", 1);
                }
            }
            16 | 17 => restart_supervisor(scene, supervisor)?,
            _ => fill_disk(scene, dice)?,
        }
    }
    scene.calm.store(false, Ordering::Relaxed);
    Ok(())
}

fn restart_postgres(scene: &Scene, how: &str, dice: &mut Dice) -> Result<()> {
    let away = dice.between(0, 6000);
    scene.say(&format!("Postgres: {how}, away for {:.1} s", away.as_secs_f64()));
    if how == "kill -9" {
        let file = scene.postgres.join("cluster/postmaster.pid");
        let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let pid: u32 = text.lines().next().unwrap_or_default().parse().context("postmaster.pid")?;
        signal(pid, "KILL")?;
    } else {
        scene.postgres(&["stop", "--mode", how])?;
    }
    std::thread::sleep(away);
    scene.postgres(&["start"])?;
    scene.count(&format!("postgres {how}"), 1);
    Ok(())
}

/// Many turns while Postgres is away: more than goes into one segment of the queue.
fn bring_backlog(scene: &Scene, historian: &mut Writer, dice: &mut Dice) -> Result<()> {
    scene.say("Postgres away, and 200 MB of transcripts at once");
    scene.postgres(&["stop", "--mode", "fast"])?;
    historian.write_history(BACKLOG_BYTES)?;
    let waits = scene.wait_for(BACKLOG_MAX, || {
        let health = scene.health().unwrap_or_default();
        health.pointer("/queue/pending_bytes").and_then(Value::as_u64).is_some_and(|bytes| bytes > WAITING_BYTES)
    });
    scene.count("backlogs", u64::from(waits));
    let segments = scene.segments() > 1;
    scene.postgres(&["start"])?;
    scene.count("backlogs, in several segments", u64::from(segments));
    scene.say(&format!("it waits: {waits}, in several segments: {segments}"));
    if dice.one_in(2) { kill_watcher(scene) } else { Ok(()) }
}

fn kill_watcher(scene: &Scene) -> Result<()> {
    if let Some(pid) = scene.watcher_pid() {
        scene.say("kill -9");
        signal(pid, "KILL")?;
        scene.count("kills", 1);
    }
    Ok(())
}

/// A stop in order, and a new supervisor.
fn restart_supervisor(scene: &Scene, supervisor: &mut Option<Child>) -> Result<()> {
    scene.say("SIGTERM to the supervisor, and a new one");
    if let Some(mut child) = supervisor.take() {
        signal(child.id(), "TERM")?;
        let status = child.wait()?;
        // 74: it was trying to open its queue on a full disk. 137, 143: stopped before it was up.
        if !matches!(status.code(), Some(0 | 74 | 137 | 143)) {
            bail!("the supervisor ended with {status} after SIGTERM");
        }
        scene.count("stops", 1);
    }
    *supervisor = Some(scene.start_supervisor()?);
    Ok(())
}

/// Moves the watcher's clock to somewhere between a day ago and a day ahead, most often by little.
fn move_clock(scene: &Scene, dice: &mut Dice) -> Result<()> {
    let Some(clock) = &scene.clock else { return Ok(()) };
    let range = [2, 60, 3600, 86_400].get(dice.below(4) as usize).copied().unwrap_or(2);
    let offset = dice.below(2 * range) as i64 - range as i64;
    scene.say(&format!("the clock goes to {offset:+} s"));
    let new = clock.with_extension("new");
    std::fs::write(&new, format!("{offset:+}\n"))?;
    std::fs::rename(new, clock)?;
    scene.count("clock jumps", 1);
    Ok(())
}

/// Takes all room on the queue's disk for some seconds.
fn fill_disk(scene: &Scene, dice: &mut Dice) -> Result<()> {
    let Some(disk) = &scene.disk else { return Ok(()) };
    let (leave, moment) = (dice.below(300_000), dice.between(1000, 8000));
    scene.say(&format!("the disk is full for {:.1} s", moment.as_secs_f64()));
    let ballast = disk.join("ballast");
    let mut file = File::create(&ballast)?;
    while file.write_all(&[0; 4096]).is_ok() {}
    let length = file.metadata()?.len();
    file.set_len(length.saturating_sub(leave))?;
    std::thread::sleep(moment);
    std::fs::remove_file(ballast)?;
    scene.count("full disks", 1);
    Ok(())
}

/// Waits until the watcher has read all there is and its queue is empty.
fn settle(scene: &Scene, supervisor: &mut Option<Child>) -> Result<()> {
    scene.say("nothing goes wrong any more; settling");
    let deadline = Instant::now() + SETTLE_MAX;
    let mut steady = 0;
    let mut lines_before = None;
    while Instant::now() < deadline {
        if let Some(status) = supervisor.as_mut().map(Child::try_wait).transpose()?.flatten() {
            bail!("the supervisor has given up: {status}");
        }
        std::thread::sleep(Duration::from_secs(1));
        let health = scene.health().unwrap_or_default();
        let pending = health.pointer("/queue/pending").and_then(Value::as_u64);
        let lines = health.pointer("/watcher/lines").and_then(Value::as_u64);
        // Lines without an end are read after a while of quiet, so what is empty must stay so.
        steady = if pending == Some(0) && lines.is_some() && lines == lines_before { steady + 1 } else { 0 };
        lines_before = lines;
        if steady >= 12 {
            return Ok(());
        }
    }
    bail!("it has not settled within {SETTLE_MAX:?}: {}", scene.health().unwrap_or_default())
}

/// Looks at the watcher every two seconds.
fn sample(scene: &Scene, on: &AtomicBool) -> Result<()> {
    let mut samples = File::create(scene.folder.join("samples"))?;
    while on.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_secs(2));
        let Some(pid) = scene.watcher_pid() else { continue };
        let Some(resident) = resident_kib(pid) else { continue };
        let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        let (queue, data) = (used_kib(&scene.queue()), used_kib(&scene.folder.join("data")));
        let calm = u8::from(scene.calm.load(Ordering::Relaxed));
        let seconds = scene.begun.elapsed().as_secs();
        writeln!(samples, "{seconds}\t{pid}\t{resident}\t{}\t{queue}\t{data}\t{calm}", descriptors.count())?;
    }
    Ok(())
}

fn resident_kib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// What a folder takes on disk.
fn used_kib(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let used = entries.flatten().map(|entry| match entry.metadata() {
        Ok(data) if data.is_dir() => used_kib(&entry.path()),
        Ok(data) => data.blocks() / 2,
        Err(_) => 0,
    });
    used.sum()
}

// ---- the load --------------------------------------------------------------------------------------------------------

/// Writes transcripts as Claude Code does, and as it should not.
struct Writer {
    scene: Arc<Scene>,
    dice: Dice,
    ledger: File,
    sessions: Vec<Session>,
    number: u64,
    made: u64,
}

struct Session {
    path: PathBuf,
    id: String,
    /// What a copy of it begins with: line, uuid, characters of the text.
    lines: Vec<(String, String, usize)>,
}

/// What is kept of a session to be copied.
const COPIED_LINES_MAX: usize = 40;

impl Writer {
    fn new(scene: Arc<Scene>, number: u64, dice: Dice) -> Result<Writer> {
        let ledger = scene.ledger(&format!("turns-{number}"))?;
        Ok(Writer { scene, dice, ledger, sessions: Vec::new(), number, made: 0 })
    }

    fn run(mut self, on: &AtomicBool) -> Result<()> {
        while on.load(Ordering::Relaxed) {
            if self.sessions.is_empty() || self.dice.one_in(300) {
                self.open_session()?;
            }
            if self.dice.one_in(600) {
                self.fork_session()?;
            }
            let index = self.dice.below(self.sessions.len() as u64) as usize;
            let lines = if self.dice.one_in(400) { 50 + self.dice.below(500) } else { 1 };
            let bytes = self.write_lines(index, lines)?;
            self.append(index, &bytes)?;
            std::thread::sleep(self.dice.between(0, 30));
        }
        // Ends what was left without an end.
        for index in 0..self.sessions.len() {
            self.append(index, b"\n")?;
        }
        Ok(())
    }

    /// So many bytes in sessions of its own.
    fn write_history(&mut self, bytes: u64) -> Result<()> {
        const LINES_AT_ONCE: u64 = 500;
        const SESSION_BYTES: u64 = 20 << 20;
        let mut left = bytes;
        while left > 0 {
            let session = self.open_session()?;
            let mut room = SESSION_BYTES.min(left);
            while room > 0 {
                let lines = self.write_lines(session, LINES_AT_ONCE)?;
                self.append(session, &lines)?;
                let written = lines.len() as u64;
                (room, left) = (room.saturating_sub(written), left.saturating_sub(written));
            }
        }
        Ok(())
    }

    fn open_session(&mut self) -> Result<usize> {
        if self.sessions.len() >= SESSIONS_OPEN_MAX {
            self.sessions.remove(0);
        }
        self.made += 1;
        let id = self.dice.uuid().to_string();
        let project = self.scene.folder.join("projects").join(format!("-home-me-{}-{}", self.number, self.made % 7));
        std::fs::create_dir_all(&project)?;
        self.sessions.push(Session { path: project.join(format!("{id}.jsonl")), id, lines: Vec::new() });
        self.scene.count("sessions", 1);
        Ok(self.sessions.len() - 1)
    }

    /// A new session that begins with the lines of another, under its own name.
    fn fork_session(&mut self) -> Result<()> {
        let from = self.dice.below(self.sessions.len() as u64) as usize;
        let Some(original) = self.sessions.get(from) else { return Ok(()) };
        let (old, lines) = (original.id.clone(), original.lines.clone());
        let copy = self.open_session()?;
        let Some(session) = self.sessions.get_mut(copy) else { return Ok(()) };
        let mut bytes = String::new();
        for (line, uuid, characters) in lines {
            bytes.push_str(&line.replace(&old, &session.id));
            bytes.push('\n');
            writeln!(self.ledger, "{}\t{uuid}\t{characters}", session.path.display())?;
        }
        self.scene.count("forks", 1);
        self.append(copy, bytes.as_bytes())
    }

    /// The bytes of so many lines, which are in the ledger before they are in the file.
    fn write_lines(&mut self, index: usize, count: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for _ in 0..count {
            match self.dice.below(100) {
                0..3 => {
                    self.garbage(&mut bytes);
                    self.scene.count("garbage lines", 1);
                }
                3..12 => bytes.extend(self.no_turn(index).as_bytes()),
                _ => {
                    let (line, uuid, characters) = self.turn(index)?;
                    bytes.extend(line.as_bytes());
                    let Some(session) = self.sessions.get_mut(index) else { continue };
                    writeln!(self.ledger, "{}\t{uuid}\t{characters}", session.path.display())?;
                    if session.lines.len() < COPIED_LINES_MAX {
                        session.lines.push((line, uuid, characters));
                    }
                    self.scene.count("turns", 1);
                }
            }
            bytes.push(b'\n');
        }
        Ok(bytes)
    }

    /// In one piece, or in two with a pause between them.
    fn append(&mut self, index: usize, bytes: &[u8]) -> Result<()> {
        let Some(session) = self.sessions.get(index) else { return Ok(()) };
        let mut file = OpenOptions::new().create(true).append(true).open(&session.path)?;
        let middle = if self.dice.one_in(10) { self.dice.below(bytes.len() as u64) as usize } else { 0 };
        let (first, second) = bytes.split_at(middle);
        file.write_all(first)?;
        if middle > 0 {
            std::thread::sleep(self.dice.between(0, 50));
        }
        file.write_all(second)?;
        self.scene.count("bytes", bytes.len() as u64);
        Ok(())
    }

    fn turn(&mut self, index: usize) -> Result<(String, String, usize)> {
        let uuid = self.dice.uuid().to_string();
        let text = self.text(&uuid);
        let session = self.sessions.get(index).context("a session")?;
        let mut line = json!({
            "parentUuid": null, "isSidechain": false, "userType": "external", "uuid": uuid,
            "timestamp": jiff::Timestamp::now().to_string(), "cwd": "/home/me/app", "sessionId": session.id,
            "version": "2.1.119", "gitBranch": "main"
        });
        let (kind, message) = if self.dice.one_in(3) {
            let content = json!([{"type": "text", "text": text}]);
            let id = format!("msg_{uuid}");
            (
                "assistant",
                json!({"role": "assistant", "id": id, "type": "message", "model": "claude-opus-4-8",
                                 "content": content, "stop_reason": "end_turn"}),
            )
        } else {
            ("user", json!({"role": "user", "content": text}))
        };
        if let Some(members) = line.as_object_mut() {
            members.insert("type".to_owned(), kind.into());
            members.insert("message".to_owned(), message);
        }
        Ok((line.to_string(), uuid, text.chars().count()))
    }

    /// 50 bytes to a megabyte, seldom more than some kilobytes; begins with the turn's uuid and ends with a full stop.
    fn text(&mut self, uuid: &str) -> String {
        const WORDS: [&str; 8] =
            ["word ", "naïve ", "\"quoted\" ", "back\\slash ", "日本語 ", "🦀 ", "tab\tand\nline ", "x"];
        let largest: f64 = if self.dice.one_in(300) { 1_000_000.0 } else { 4000.0 };
        let bytes = (50.0 * (largest / 50.0).powf(self.dice.fraction())) as usize;
        let mut text = uuid.to_owned();
        while text.len() + 1 < bytes {
            text.push_str(WORDS.get(self.dice.below(8) as usize).copied().unwrap_or_default());
        }
        text.push('.');
        text
    }

    /// Something whole that is no turn.
    fn no_turn(&mut self, index: usize) -> String {
        let id = self.sessions.get(index).map(|session| session.id.clone()).unwrap_or_default();
        match self.dice.below(4) {
            0 => String::new(),
            1 => json!({"type": "mode", "mode": "normal", "sessionId": id}).to_string(),
            2 => json!({"type": "never-heard-of", "sessionId": id, "of": ["this", 1, null]}).to_string(),
            _ => json!({
                "type": "user", "uuid": self.dice.uuid().to_string(), "sessionId": id, "cwd": "/home/me/app",
                "timestamp": jiff::Timestamp::now().to_string(),
                "message": {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "out"}]}
            })
            .to_string(),
        }
    }

    /// Bytes that are no JSON object and have none within.
    fn garbage(&mut self, bytes: &mut Vec<u8>) {
        let length = 1 + self.dice.below(2000);
        match self.dice.below(3) {
            0 => bytes.extend((0..length).map(|_| 0)),
            1 => bytes.extend((0..length).map(|_| match self.dice.below(256) as u8 {
                b'\n' | b'\r' | b'{' | b'}' => b'?',
                byte => byte,
            })),
            _ => bytes.extend(b"{\"type\":\"user\",\"message\":{\"role\":\"user\",\"content\":\"cut in the mid"),
        }
    }
}

/// Events of other programs, one at a time and in streams.
fn emit(scene: &Scene, mut dice: Dice, on: &AtomicBool) -> Result<()> {
    let mut ledger = scene.ledger("emitted")?;
    while on.load(Ordering::Relaxed) {
        std::thread::sleep(dice.between(100, 1500));
        let payload = r#"{"agent_id":1,"command_id":1,"from_state":"a","to_state":"b","trigger":"manual"}"#;
        let ids: Vec<String> =
            (0..if dice.one_in(5) { 1 + dice.below(200) } else { 1 }).map(|_| dice.uuid().to_string()).collect();
        let is_durable = match ids.as_slice() {
            [id] => {
                let arguments = ["emit", "--type", "state_transition", "--payload", payload, "--event-id", id];
                scene.command(&arguments).status()?.success()
            }
            ids => {
                let lines: String = ids.iter().fold(String::new(), |mut lines, id| {
                    let _ =
                        writeln!(lines, r#"{{"event_id":"{id}","event_type":"state_transition","payload":{payload}}}"#);
                    lines
                });
                with_input(scene.command(&["emit", "--ndjson"]), &lines)?
            }
        };
        let word = if is_durable { "sure" } else { "unsure" };
        scene.count(&format!("emitted, {word}"), ids.len() as u64);
        for id in ids {
            writeln!(ledger, "{id}\t{word}")?;
        }
    }
    Ok(())
}

fn send_hooks(scene: &Scene, mut dice: Dice, on: &AtomicBool) -> Result<()> {
    let mut ledger = scene.ledger("hooks")?;
    while on.load(Ordering::Relaxed) {
        std::thread::sleep(dice.between(50, 800));
        let id = dice.uuid().to_string();
        let input = json!({
            "hook_event_name": "PreToolUse", "session_id": dice.uuid().to_string(), "cwd": "/home/me/app",
            "tool_name": "Bash", "tool_use_id": id, "tool_input": {"command": "x".repeat(dice.below(20_000) as usize)}
        });
        writeln!(ledger, "{id}")?;
        if !with_input(scene.command(&["hook"]), &input.to_string())? {
            bail!("a hook did not end with 0");
        }
        scene.count("hooks", 1);
    }
    Ok(())
}

/// Runs a command with this on its stdin; whether it ended with 0.
fn with_input(mut command: Command, input: &str) -> Result<bool> {
    let mut child = command.stdin(Stdio::piped()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // Who refuses its input may not read it to the end.
        let _ = stdin.write_all(input.as_bytes());
    }
    Ok(child.wait()?.success())
}

/// Numbers from a seed.
struct Dice(u64);

impl Dice {
    fn fork(&mut self) -> Dice {
        Dice(self.next() | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit.max(1)
    }

    fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    fn fraction(&mut self) -> f64 {
        self.below(1 << 40) as f64 / (1_u64 << 40) as f64
    }

    fn between(&mut self, least_ms: u64, most_ms: u64) -> Duration {
        Duration::from_millis(least_ms + self.below(most_ms - least_ms + 1))
    }

    fn uuid(&mut self) -> Uuid {
        let bits = (u128::from(self.next()) << 64) | u128::from(self.next());
        uuid::Builder::from_u128(bits).with_version(uuid::Version::Random).into_uuid()
    }
}
