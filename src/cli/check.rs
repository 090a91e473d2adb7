//! `check`: what is wrong, and how to fix it.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::agent::{self, Agent, AgentFolder};
use crate::claude::retention::WARN_DAYS;
use crate::claude::settings;
use crate::config::{CONFIG_FILE, Config, HttpConfig};
use crate::finding::Finding::{self, Fine, Note, Wrong};
use crate::health::Health;
use crate::http::token;
use crate::intake::redact::Redactor;
use crate::intake::retention::{Retention, settings_beside};
use crate::intake::schema::Schemas;
use crate::intake::transcripts::do_notifications_arrive;
use crate::intake::transcripts::polling::CHECK_INTERVAL;
use crate::private_folder::{self, FolderError};
use crate::queue::QueueError;
use crate::regular_file;
use crate::service::connect_settings;
use crate::service::socket::{self, SocketState};
use crate::sink::Verdict;
use crate::sink::postgres::inspect;
use clap::Args;

use super::client;
use super::hooks::own_command;
use super::service::service_files;
use super::{Context, Exit, Failure, block_on, database, inspect_queue, own_program, written};

/// Below this the queue can't be expected to work.
const FREE_BYTES_MIN: u64 = 64 << 20;

/// Check configuration, schemas, folders and database, and say how to fix what is wrong
#[derive(Args)]
#[command(
    after_help = "Example:\n  headspace-watcher check --no-database\n\nExit code 0: nothing is wrong, notes or not; 78: something is."
)]
pub(super) struct CheckArguments {
    /// Leave the database out
    #[arg(long)]
    no_database: bool,
    /// Only show every path in use, and why it is that one
    #[arg(long)]
    paths: bool,
}

pub(super) fn check(context: &Context, arguments: &CheckArguments) -> Result<Exit, Failure> {
    let config = context.config();
    if arguments.paths {
        return written(write_paths(context, &mut io::stdout().lock()));
    }
    let mut findings =
        vec![("configuration", configuration(context)), ("schemas", schemas(config)), ("redact", redact(config))];
    let projects = &config.claude.projects_paths;
    findings.extend(projects.iter().map(|projects| ("transcripts", transcripts(projects))));
    findings.extend(projects.iter().map(|projects| ("retention", retention(projects))));
    let others = agent::folders(config).into_iter().filter(|folder| !folder.agent.is_expected());
    findings.extend(others.filter_map(|folder| Some(("transcripts", other_transcripts(&folder)?))));
    findings.extend([
        ("notifications", notifications(projects)),
        ("hooks", hooks(context)),
        ("queue", folder(&config.queue.path, "queue.path")),
        ("queue", held(config)),
        ("queue", file_system(&config.queue.path)),
        ("disk", disk(&config.queue.path, config.queue.max_pending_bytes)),
        ("spool", folder(&config.queue.spool_path, "queue.spool_path")),
        ("format", format(config)),
        ("socket", socket(&config.http.socket)?),
        ("token", token(&config.http)),
    ]);
    if !arguments.no_database {
        findings.extend(postgres(context)?.into_iter().map(|finding| ("database", finding)));
    }
    Ok(print(&findings))
}

/// A line for each path: what it is for, where it is, and why there.
fn write_paths(context: &Context, out: &mut impl Write) -> io::Result<()> {
    let loaded = &context.loaded;
    let own = context.environment.user_config_file();
    let here = context.environment.folder().join(CONFIG_FILE);
    let (file, why) = match &loaded.file {
        Some(file) if *file == here => (file.display().to_string(), "in the current folder"),
        Some(file) if Some(file) == own.as_ref() => {
            (file.display().to_string(), "your own, as none is in the current folder")
        }
        Some(file) => (file.display().to_string(), "--config"),
        None => ("none".to_owned(), "none in the current folder or in ~/.config/headspace-watcher"),
    };
    let is_beside = loaded.file.as_ref().and_then(|file| file.parent()) == loaded.state_folder.parent();
    let state = if is_beside { "beside the configuration" } else { "where the system keeps state" };
    let mut lines = vec![
        ("configuration", file, why.to_owned()),
        ("state", loaded.state_folder.display().to_string(), state.to_owned()),
    ];
    for (key, value) in loaded.values().iter().filter(|(key, _)| key.ends_with("path") || *key == "http.socket") {
        lines.push((key, value.shown().to_owned(), value.source.clone()));
    }
    let mut add = |subject, path: PathBuf, why: &str| lines.push((subject, path.display().to_string(), why.to_owned()));
    if let HttpConfig { token: None, listen: Some(_), .. } = context.config().http {
        add("token", context.config().http.token_file(), "beside http.socket");
    }
    let moved_by =
        ["Claude Code's settings: CLAUDE_CONFIG_DIR, else ~/.claude", "Codex's hooks: CODEX_HOME, else ~/.codex"];
    for (agent, why) in Agent::ALL.into_iter().zip(moved_by) {
        if let Ok(settings) = context.settings_file(agent) {
            add("hooks", settings, why);
        }
    }
    for (subject, path) in service_files(context) {
        let why = if path.exists() { "is there" } else { "is not there" };
        add(subject, path, why);
    }
    if let Ok(program) = own_program() {
        add("program", program, "this one");
    }
    lines.iter().try_for_each(|(subject, path, why)| writeln!(out, "{subject:<20}  {path}  ({why})"))
}

/// One line for each finding. The exit code says whether anything is wrong.
fn print(findings: &[(&str, Finding)]) -> Exit {
    for (subject, finding) in findings {
        let (mark, text) = match finding {
            Fine(text) => ("ok   ", text),
            Note(text) => ("note ", text),
            Wrong(text) => ("WRONG", text),
        };
        println!("{mark}  {subject:<13}  {text}");
    }
    let is_wrong = findings.iter().any(|(_, finding)| matches!(finding, Wrong(_)));
    if is_wrong { Exit::Configuration } else { Exit::Fine }
}

/// It was read whole before any command began: what is wrong in it has been said and ended the program.
fn configuration(context: &Context) -> Finding {
    let mut text = match &context.loaded.file {
        Some(file) => file.display().to_string(),
        None => "no file: built-in defaults (\"headspace-watcher config init\" makes one)".to_owned(),
    };
    if !context.loaded.variables.is_empty() {
        text.push_str(&format!("; set by the environment: {}", context.loaded.variables.join(", ")));
    }
    let mut notes = context.loaded.misspelt_variables.clone();
    if !context.loaded.unused.is_empty() {
        notes.push(format!("of another program, not used here: {}", context.loaded.unused.join(", ")));
    }
    if notes.is_empty() {
        return Fine(text);
    }
    Note(format!("{text}; {}", notes.join("; ")))
}

fn schemas(config: &Config) -> Finding {
    match Schemas::load(config.schemas.path.as_deref(), config.event_system.max_event_bytes) {
        Ok(schemas) => {
            let types: Vec<&str> = schemas.types().map(|event_type| event_type.as_str()).collect();
            Fine(types.join(", "))
        }
        Err(error) => {
            // Each error names the schema, but for the folder, whose error has its own way out.
            let way_out = match &config.schemas.path {
                Some(folder) if folder.is_dir() => format!("; correct the file in {} or take it out", folder.display()),
                _ => String::new(),
            };
            Wrong(format!("{error}{way_out}"))
        }
    }
}

fn redact(config: &Config) -> Finding {
    match Redactor::new(&config.redact) {
        Ok(redactor)
            if redactor.is_on() && config.redact.patterns.iter().any(|pattern| has_unicode_boundary(pattern)) =>
        {
            let text = "on, but a pattern of redact.patterns has \\b, which can make text that is not ASCII 300 times as slow; \
                        write (?-u:\\b) for it";
            Note(text.to_owned())
        }
        Ok(redactor) if redactor.is_on() => {
            Fine(format!("on, {} patterns beside the built-in ones", config.redact.patterns.len()))
        }
        Ok(_) => Fine("off".to_owned()),
        Err(error) => Wrong(format!("{error}; correct or remove it: until then the watcher does not start")),
    }
}

/// Whether a regular expression looks for a Unicode word boundary. Takes `\\b`, a backslash and a letter, for one too.
fn has_unicode_boundary(pattern: &str) -> bool {
    [r"\b", r"\B"].iter().any(|boundary| pattern.replace(&format!("(?-u:{boundary})"), "").contains(boundary))
}

/// What the running watcher has read and does not know.
fn format(config: &Config) -> Finding {
    let asking = async { client::body(client::get(&config.http.socket, "/health").await?).await };
    let answer = block_on(asking).ok().and_then(Result::ok);
    let Some(health) = answer.and_then(|body| serde_json::from_slice::<Health>(&body).ok()) else {
        return Fine("what is new in transcripts is named here while a watcher runs".to_owned());
    };
    let unknown = health.watcher.unknown_formats;
    if unknown.is_empty() {
        return Fine(format!("{} lines read, nothing unknown in them", health.watcher.lines));
    }
    let named = unknown.iter().map(|one| {
        let version = if one.version.is_empty() { String::new() } else { format!(" (version {:?})", one.version) };
        format!("{} {:?} in {} lines{version}", one.field, one.value, one.lines)
    });
    Note(format!(
        "not known to this version, and judged by what is: {}; see whether there is a newer version of headspace-watcher",
        named.collect::<Vec<_>>().join(", ")
    ))
}

fn transcripts(folder: &Path) -> Finding {
    let shown = folder.display();
    match std::fs::read_dir(folder) {
        Ok(entries) => Fine(format!("{shown}: {} project folders", entries.count())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Note(format!(
            "{shown} is not there (yet): it is watched for; set claude.projects_path or CLAUDE_CONFIG_DIR if it is elsewhere"
        )),
        Err(error) => Wrong(format!(
            "could not read {shown}: {error}; give this user the right to read it or set claude.projects_path"
        )),
    }
}

/// Of an agent that need not be used: nothing where its folder is missing.
fn other_transcripts(folder: &AgentFolder) -> Option<Finding> {
    let (agent, shown) = (folder.agent.as_str(), folder.path.display());
    match std::fs::read_dir(&folder.path) {
        Ok(_) => Some(Fine(format!("{shown}: followed ({agent})"))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => {
            Some(Wrong(format!("could not read {shown} ({agent}): {error}; give this user the right to read it")))
        }
    }
}

/// How long Claude Code keeps transcripts: what was not captured by then is gone for good.
fn retention(projects: &Path) -> Finding {
    let folder = AgentFolder { agent: Agent::ClaudeCode, path: projects.to_owned() };
    let period = Retention::new(&[folder]).period();
    judge_retention(period.as_secs() / (24 * 60 * 60), &settings_beside(projects))
}

fn judge_retention(days: u64, settings: &Path) -> Finding {
    let text = format!(
        "Claude Code deletes transcripts {days} days after their last change (cleanupPeriodDays in {})",
        settings.display()
    );
    if days <= WARN_DAYS {
        return Note(format!("{text}: what the watcher has not captured by then is lost; raise it"));
    }
    Fine(text)
}

/// Whether nobody else may use a private folder, and files can be made in it, or in the nearest parent that exists.
fn folder(path: &Path, key: &str) -> Finding {
    let shown = path.display();
    let others = match private_folder::look(path) {
        Ok(others) => others,
        // What follows has better words for it.
        Err(FolderError::Io { .. }) => None,
        Err(error) => return Wrong(format!("{error} ({key})")),
    };
    let existing = existing(path);
    if let Err(error) = may_write(existing) {
        let existing = existing.display();
        return Wrong(format!("could not write in {existing}: {error}; fix its owner or mode, or set {key}"));
    }
    match others {
        Some(mode) => Note(format!(
            "others have rights to {shown} (mode {mode:04o}); the next start takes them away, or chmod 700 {shown}"
        )),
        None => Fine(shown.to_string()),
    }
}

/// Asks the system whether files may be made in `folder`, without making one.
fn may_write(folder: &Path) -> std::io::Result<()> {
    use rustix::fs::{Access, AtFlags, CWD, accessat};
    if !folder.is_dir() {
        return Err(std::io::ErrorKind::NotADirectory.into());
    }
    Ok(accessat(CWD, folder, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS)?)
}

/// Whether a watcher can listen at `path`.
fn socket(path: &Path) -> Result<Finding, Failure> {
    match private_folder::look_unwritable(path.parent().unwrap_or(path)) {
        Ok(Some(mode)) => {
            let folder = path.parent().unwrap_or(path).display();
            return Ok(Note(format!(
                "everybody may write in {folder} (mode {mode:04o}); the next start changes that, or chmod go-w {folder}"
            )));
        }
        Err(error @ (FolderError::Owner { .. } | FolderError::Replaceable { .. })) => {
            return Ok(Wrong(format!("{error} (http.socket)")));
        }
        // Any other fault is found where it is listened at.
        Ok(None) | Err(_) => {}
    }
    let shown = path.display();
    Ok(match block_on(socket::inspect(path))? {
        Ok(SocketState::Listening) => Fine(format!("{shown}: a watcher is running")),
        Ok(SocketState::Free | SocketState::LeftOver) => Fine(format!("{shown}: no watcher is running")),
        Err(problem) => Wrong(format!("could not listen on {shown}: {problem}")),
    })
}

/// What callers over TCP have to show.
fn token(http: &HttpConfig) -> Finding {
    let file = http.token_file();
    let shown = file.display();
    match (http.listen, &http.token) {
        (None, _) => Fine("none is needed: http.listen is null".to_owned()),
        (Some(_), Some(_)) => Fine("http.token".to_owned()),
        (Some(_), None) => match token::load(&file) {
            Ok(Some(_)) => Fine(shown.to_string()),
            Ok(None) => Fine(format!("{shown}: made at the first start")),
            Err(error) => Wrong(error.to_string()),
        },
    }
}

fn postgres(context: &Context) -> Result<Vec<Finding>, Failure> {
    let (target, has_database) = match database::of_commands(context) {
        Ok(target) => target,
        Err(failure) => return Ok(vec![Wrong(failure.message)]),
    };
    if !has_database {
        return Ok(vec![Wrong(database::none(context).message)]);
    }
    let config = context.config();
    let place = target().ok().flatten().map(|target| Fine(target.described));
    let inspected = block_on(inspect(&connect_settings(config, target)))?;
    Ok(match inspected {
        Ok(inspection) => place.into_iter().chain(inspection.findings(config.database.auto_migrate)).collect(),
        // What the server says comes with its way out.
        Err(error) if error.sqlstate.is_none() && error.verdict == Verdict::Again => {
            vec![Wrong(format!("{error}; until the server can be reached, events wait in the queue"))]
        }
        Err(error) => vec![Wrong(error.to_string())],
    })
}

/// Notifications make new lines seen at once; where there are none, checks and rescans find them.
fn notifications(projects: &[PathBuf]) -> Finding {
    let instead = format!(
        "lines of active transcripts are found within {} ms by checking them, new transcripts by rescanning",
        CHECK_INTERVAL.as_millis()
    );
    match do_notifications_arrive() {
        Ok(true) => {}
        Ok(false) => return Note(format!("no file notifications arrive on this system; {instead}")),
        Err(error) => return Note(format!("file notifications fail: {error}; {instead}{RAISE_LIMITS}")),
    }
    for folder in projects {
        let found = rustix::fs::statfs(existing(folder)).ok();
        if let Some(kind) = found.and_then(|found| network_file_system(&found)) {
            let shown = folder.display();
            return Note(format!("{shown} is on {kind}: file notifications may not arrive; {instead}"));
        }
    }
    if cfg!(target_os = "macos") {
        return Fine(format!("macOS reports a file when its writer closes it; {instead}"));
    }
    let limit = std::fs::read_to_string("/proc/sys/fs/inotify/max_user_watches");
    let Some(limit) = limit.ok().and_then(|limit| limit.trim().parse::<u64>().ok()) else {
        return Fine("this system needs no watch for each folder".to_owned());
    };
    let walks = projects.iter().flat_map(|projects| walkdir::WalkDir::new(projects).max_depth(8));
    judge_watches(walks.flatten().filter(|entry| entry.file_type().is_dir()).count() as u64, limit)
}

const RAISE_LIMITS: &str = if cfg!(target_os = "linux") {
    "; raise fs.inotify.max_user_watches and fs.inotify.max_user_instances"
} else {
    ""
};

fn judge_watches(folders: u64, limit: u64) -> Finding {
    let text = format!("{folders} folders to watch, fs.inotify.max_user_watches is {limit}");
    // Editors and others of this user take from the same limit.
    if folders.saturating_mul(4) > limit.saturating_mul(3) {
        let way_out = format!("sudo sysctl fs.inotify.max_user_watches={}", (folders * 4).max(524_288));
        return Note(format!("{text}: too low, some files would be checked instead of notified; {way_out}"));
    }
    Fine(text)
}

/// Whether Claude Code's settings call this program.
fn hooks(context: &Context) -> Finding {
    let (file, own) = match (context.settings_file(Agent::ClaudeCode), own_command(context)) {
        (Ok(file), Ok(own)) => (file, own),
        (Err(failure), _) | (_, Err(failure)) => return Note(failure.message),
    };
    let shown = file.display();
    let install = "run \"headspace-watcher hooks install\"";
    let text = match regular_file::read_to_string(&file, settings::FILE_BYTES_MAX) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Note(format!(
                "none: there is no {shown}; transcripts are followed all the same. To have hooks too, {install}"
            ));
        }
        Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {
            return Wrong(format!("could not read {shown}: {error}; Claude Code can't read it either, remove it"));
        }
        Err(error) => return Wrong(format!("could not read {shown}: {error}; correct its owner or mode")),
    };
    let found = match settings::find(&text, &own) {
        Ok(found) => found,
        Err(error) => return Wrong(format!("{shown}: {error}; fix it")),
    };
    let Some(first) = found.iter().find(|found| found.is_own).or_else(|| found.first()) else {
        return Note(format!("none of {shown} calls headspace-watcher; to have hooks too, {install}"));
    };
    if settings::are_off(&text) {
        return Note(format!("{shown} has disableAllHooks: none of them runs; take it out to have hooks"));
    }
    let missing: Vec<&str> =
        settings::EVENTS.into_iter().filter(|event| !found.iter().any(|found| found.event == *event)).collect();
    let ours = std::env::current_exe().and_then(|program| program.canonicalize()).unwrap_or_default();
    let called = PathBuf::from(settings::called_program(&first.command));
    match called.canonicalize() {
        Ok(program) if program == ours && !missing.is_empty() => Note(format!(
            "{} hooks in {shown} call this program, none at {}; {install}",
            found.len(),
            missing.join(", ")
        )),
        Ok(program) if program == ours => Fine(format!("{} hooks in {shown} call this program", found.len())),
        Ok(_) => Note(format!("{shown} calls {}, which is not this program; {install}", called.display())),
        // By its bare name it is looked for in Claude Code's own PATH, which is not known here.
        Err(_) if called.components().count() == 1 => Fine(format!("{shown} calls {}", called.display())),
        Err(error) => Wrong(format!("{shown} calls {}: {error}; {install}", called.display())),
    }
}

/// Whether somebody holds the queue.
fn held(config: &Config) -> Finding {
    match inspect_queue(config) {
        Ok(queue) => Fine(format!("nobody holds it; {} pending", queue.stats().pending)),
        Err(QueueError::NotFound { .. }) => Fine("made when the watcher first runs".to_owned()),
        // The watcher may have rights that this process has not.
        Err(error @ QueueError::Look { .. }) => Note(error.to_string()),
        Err(QueueError::InUse { pid, .. }) => {
            let holder = pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"));
            match std::os::unix::net::UnixStream::connect(&config.http.socket) {
                Ok(_) => Fine(format!("held by the running watcher, {holder}")),
                Err(_) => Wrong(format!(
                    "held by {holder}, which does not listen on {}; end it, or set queue.path or http.socket as it has them",
                    config.http.socket.display()
                )),
            }
        }
        Err(error) => Wrong(error.to_string()),
    }
}

fn file_system(folder: &Path) -> Finding {
    let existing = existing(folder);
    match rustix::fs::statfs(existing) {
        Ok(found) => judge_file_system(network_file_system(&found), existing),
        Err(error) => Note(format!("the file system of {} is not known: {error}", existing.display())),
    }
}

/// The name of a network file system; `None` for a local one.
#[cfg(target_os = "linux")]
fn network_file_system(found: &rustix::fs::StatFs) -> Option<String> {
    name_of_magic(found.f_type as u64).map(str::to_owned)
}

/// By the name and the flags of statfs(2): Linux has numbers instead of them.
#[cfg(not(target_os = "linux"))]
fn network_file_system(found: &rustix::fs::StatFs) -> Option<String> {
    const MNT_LOCAL: u32 = 0x1000;
    let letters = found.f_fstypename.iter().map(|letter| *letter as u8).take_while(|letter| *letter != 0);
    let name: String = letters.map(char::from).collect();
    (found.f_flags & MNT_LOCAL == 0 && !name.contains("fuse")).then_some(name)
}

/// `magic`: the number of the kind of file system, of statfs(2).
#[cfg(target_os = "linux")]
fn name_of_magic(magic: u64) -> Option<&'static str> {
    Some(match magic & 0xffff_ffff {
        0x6969 => "NFS",
        0x517b | 0xfe53_4d42 | 0xff53_4d42 => "SMB",
        0x0102_1997 => "9P",
        0x00c3_6400 => "Ceph",
        0x5346_414f | 0x6b41_4653 => "AFS",
        _ => return None,
    })
}

fn judge_file_system(kind: Option<String>, folder: &Path) -> Finding {
    match kind {
        None => Fine("on a local file system".to_owned()),
        Some(kind) => Wrong(format!(
            "{} is on {kind}, a network file system: its locks and syncs can't be relied on; set queue.path to a local disk",
            folder.display()
        )),
    }
}

fn disk(folder: &Path, pending_bytes_max: u64) -> Finding {
    let existing = existing(folder);
    match rustix::fs::statvfs(existing) {
        Ok(found) => judge_disk(found.f_bavail.saturating_mul(found.f_frsize), pending_bytes_max, existing),
        Err(error) => Note(format!("the room below {} is not known: {error}", existing.display())),
    }
}

fn judge_disk(free: u64, pending_bytes_max: u64, folder: &Path) -> Finding {
    let text = format!("{} free below {}", super::status::bytes(free), folder.display());
    if free < FREE_BYTES_MIN {
        return Wrong(format!("{text}: too little; make room, or set queue.path to another disk"));
    }
    if free < pending_bytes_max {
        let max = super::status::bytes(pending_bytes_max);
        return Note(format!(
            "{text}, less than queue.max_pending_bytes ({max}): the disk would be full before the queue is"
        ));
    }
    Fine(text)
}

/// The folder, or its nearest parent that exists.
fn existing(folder: &Path) -> &Path {
    folder.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_room_few_watches_and_network_file_systems_are_found() {
        let here = Path::new("/here");
        assert!(matches!(judge_disk(10 << 30, 4 << 30, here), Fine(_)));
        assert!(matches!(judge_disk(1 << 30, 4 << 30, here), Note(_)));
        assert!(matches!(judge_disk(1 << 20, 4 << 30, here), Wrong(_)));
        assert!(matches!(judge_retention(30, here), Fine(text) if text.contains("30 days")));
        assert!(matches!(judge_retention(1, here), Note(text) if text.contains("in /here)")));
        assert!(matches!(judge_watches(100, 8192), Fine(_)));
        assert!(matches!(judge_watches(7000, 8192), Note(text) if text.contains("sysctl")));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_network_file_system_is_told_by_its_number() {
        let judge = |magic| judge_file_system(name_of_magic(magic).map(str::to_owned), Path::new("/here"));
        for (magic, expected) in [(0x6969, "NFS"), (0xff53_4d42, "SMB"), (0xffff_ffff_ff53_4d42, "SMB")] {
            assert!(matches!(judge(magic), Wrong(text) if text.contains(expected)));
        }
        assert!(matches!(judge(0xef53), Fine(_)), "ext4");
    }
}
