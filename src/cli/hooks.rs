//! `hooks`: has Claude Code call this program, or no longer, by its own settings file.
//!
//! That file is not ours. A change is written beside it, synced and put in its place at once, after a copy of what was
//! there was kept; [`settings`] says which bytes change. Where the file is a symbolic link, its target is changed.
//!
//! Left alone, with a message that says how to go on: a file that is no JSON, that somebody else is writing, that is
//! read-only, or that has a second name (a hard link), which a replacement would cut off.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};

use crate::agent::Agent;
use crate::claude::settings::{self, Found, SettingsError};
use crate::event::Timestamp;
use crate::regular_file;

use super::{Context, Exit, Failure, own_program, plain_path};

/// Links on links that are followed.
const LINKS_MAX: usize = 16;

/// Between the name of the settings file and the time at which the copy was made.
const COPY_INFIX: &str = ".before-headspace-watcher-";

/// An empty file that was changed within this time is being written: programs truncate a file, then write it.
const WRITING_TIME_MAX: Duration = Duration::from_secs(1);

/// What a file that is not there yet begins as.
const EMPTY: &str = "{}\n";

/// Install or remove the hooks of Claude Code or the Codex CLI
#[derive(Args)]
#[command(
    after_help = "Examples:\n  headspace-watcher --config ~/watcher/config.yaml hooks install\n  headspace-watcher hooks show\n  headspace-watcher hooks uninstall --settings ~/project/.claude/settings.local.json"
)]
pub(super) struct HooksArguments {
    #[command(subcommand)]
    action: HooksAction,
    /// The agent's settings [default: settings.json in CLAUDE_CONFIG_DIR or ~/.claude; hooks.json in CODEX_HOME or ~/.codex]
    #[arg(long, global = true, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// Whose hooks: claude-code or codex-cli
    #[arg(long, global = true, value_name = "AGENT", default_value = "claude-code", value_parser = Agent::named)]
    agent: Agent,
}

#[derive(Subcommand)]
enum HooksAction {
    /// Add what is missing and fix what calls a program elsewhere; all else in the file stays, and a copy is kept
    Install {
        /// One more event, by Claude Code's name for it; an old version may refuse a file with an event that is new
        #[arg(long = "event", value_name = "EVENT")]
        events: Vec<String>,
    },
    /// Take the hooks out again
    Uninstall,
    /// What is installed, what is missing, and what would be added. Changes nothing
    Show,
}

pub(super) fn hooks(context: &Context, arguments: &HooksArguments) -> Result<Exit, Failure> {
    let path = match &arguments.settings {
        Some(named) => context.environment.folder().join(named),
        None => context.settings_file(arguments.agent)?,
    };
    let events = match &arguments.action {
        HooksAction::Install { events } => events_of(arguments.agent, events)?,
        _ => Vec::new(),
    };
    let file = SettingsFile::read(arguments.agent, path)?;
    match arguments.action {
        HooksAction::Install { .. } => install(context, &file, &events),
        HooksAction::Uninstall => uninstall(context, &file),
        HooksAction::Show => show(context, &file),
    }
}

/// The usual events and those asked for.
fn events_of(agent: Agent, further: &[String]) -> Result<Vec<String>, Failure> {
    if further.iter().any(|event| event == settings::NEVER_HOOKED) {
        let message = format!(
            "{} is never hooked: whatever runs at it must print the worktree's path, and a hook prints nothing; leave it out",
            settings::NEVER_HOOKED
        );
        return Err(Failure::new(Exit::Usage, message));
    }
    let mut events: Vec<String> = agent.hook_events().iter().map(|event| (*event).to_owned()).collect();
    for event in further {
        if !events.contains(event) {
            events.push(event.clone());
        }
    }
    Ok(events)
}

fn install(context: &Context, file: &SettingsFile, events: &[String]) -> Result<Exit, Failure> {
    let command = command(context)?;
    let before = file.text.as_deref().unwrap_or(EMPTY);
    let after = settings::install(before, &command, events).map_err(|error| file.refused(&error))?;
    let shown = file.path.display();
    if file.text.as_deref() == Some(&after) {
        println!("nothing to do: {shown} has the hooks already");
    } else {
        file.check_replaceable()?;
        file.replace(&after)?;
        println!("{} hooks in {shown} call {command}", find(file, &after, &command)?.len());
        println!("running sessions pick this up; restart one that does not");
        if let Some(note) = file.agent.hooks_note() {
            println!("note: {note}");
        }
    }
    for found in find(file, &after, &command)?.iter().filter(|found| found.command != command) {
        println!("note: left as it is, {found}");
    }
    say_what_else(context, file, &after);
    Ok(Exit::Fine)
}

fn uninstall(context: &Context, file: &SettingsFile) -> Result<Exit, Failure> {
    let own = own_command(context)?;
    let shown = file.path.display();
    let Some(text) = &file.text else {
        println!("nothing to do: there is no {shown}");
        return Ok(Exit::Fine);
    };
    let after = settings::uninstall(text, &own).map_err(|error| file.refused(&error))?;
    if after == *text {
        println!("nothing to do: none of the hooks in {shown} calls headspace-watcher");
        return Ok(Exit::Fine);
    }
    file.check_replaceable()?;
    match file.origin(&find(file, text, &own)?, &own) {
        Some(Origin::Copy(copy, original)) => {
            file.write(&original)?;
            // It says what the file says now.
            let _ = std::fs::remove_file(copy);
            println!("{shown} is what it was before the hooks were installed");
        }
        Some(Origin::Nothing) => {
            std::fs::remove_file(&file.path).map_err(|error| file.io("remove", &error))?;
            println!("removed {shown}: it held nothing but the hooks");
        }
        None => {
            file.replace(&after)?;
            println!("no hook in {shown} calls this program any more");
        }
    }
    for found in find(file, &after, &own)? {
        println!("note: left as it is, {found}");
    }
    Ok(Exit::Fine)
}

fn show(context: &Context, file: &SettingsFile) -> Result<Exit, Failure> {
    let command = command(context)?;
    let shown = file.path.display();
    let text = file.text.as_deref().unwrap_or(EMPTY);
    let found = find(file, text, &command)?;
    println!("{shown}{}", if file.text.is_some() { "" } else { " is not there yet" });
    let further =
        found.iter().map(|found| found.event.as_str()).filter(|event| !file.agent.hook_events().contains(event));
    let mut missing = Vec::new();
    let mut events: Vec<&str> = file.agent.hook_events().iter().copied().chain(further).collect();
    events.dedup();
    for event in events {
        let mut calls: Vec<&str> =
            found.iter().filter(|found| found.event == event).map(|found| found.command.as_str()).collect();
        calls.dedup();
        if calls.is_empty() {
            println!("missing    {event}");
            missing.push(event.to_owned());
        }
        for call in calls {
            let mark = if call == command { "installed" } else { "other    " };
            println!("{mark}  {event:<18}  {call}");
        }
    }
    if let Some(first) = missing.first() {
        let added = settings::install(EMPTY, &command, std::slice::from_ref(first));
        let added = added.map_err(|error| file.refused(&error))?;
        print!("\n\"headspace-watcher hooks install\" adds what is missing, as here for {first}:\n{added}");
    }
    say_what_else(context, file, text);
    Ok(Exit::Fine)
}

/// What keeps hooks from being run, or from finding the watcher.
fn say_what_else(context: &Context, file: &SettingsFile, text: &str) {
    if settings::are_off(text) {
        println!("note: disableAllHooks is true in {}: none of them runs", file.path.display());
    }
    for name in &context.loaded.variables {
        println!(
            "note: {name} is set here, but the agent may not have it when it runs a hook; put it into config.yaml"
        );
    }
}

/// What Claude Code runs. It does so in any folder, so everything is named by its whole path, the configuration too:
/// what a project calls `config.yaml` is none of ours.
fn command(context: &Context) -> Result<String, Failure> {
    let Some(config) = &context.loaded.file else {
        let message = "no configuration file: hooks run in any folder and would not find this watcher's queue; make one with \"headspace-watcher config init\", or give it with --config FILE";
        return Err(Failure::new(Exit::Configuration, message));
    };
    let word = |path: &Path| plain_path(path, "a settings file").map(|path| settings::shell_word(&path));
    Ok(format!("{} --config {} hook", word(&own_program()?)?, word(config)?))
}

/// The command that `install` would write, to recognize it; without a configuration file one that has this program's name.
pub(super) fn own_command(context: &Context) -> Result<String, Failure> {
    match command(context) {
        Ok(command) => Ok(command),
        Err(_) => Ok(format!("{} hook", settings::shell_word(&own_program()?.to_string_lossy()))),
    }
}

/// For `uninstall`: the settings of an agent, and how many hooks in them call this program.
pub(super) fn installed(context: &Context, agent: Agent) -> Result<(PathBuf, usize), Failure> {
    let file = SettingsFile::read(agent, context.settings_file(agent)?)?;
    let found = find(&file, file.text.as_deref().unwrap_or(EMPTY), &own_command(context)?)?;
    Ok((file.path, found.iter().filter(|found| found.is_own).count()))
}

/// As `hooks uninstall` does without further options.
pub(super) fn uninstall_default(context: &Context, agent: Agent) -> Result<Exit, Failure> {
    uninstall(context, &SettingsFile::read(agent, context.settings_file(agent)?)?)
}

fn find(file: &SettingsFile, text: &str, own: &str) -> Result<Vec<Found>, Failure> {
    settings::find(text, own).map_err(|error| file.refused(&error))
}

/// A settings file as it was found.
struct SettingsFile {
    agent: Agent,
    /// Where it really is: links are followed.
    path: PathBuf,
    is_linked: bool,
    /// `None`: there is none.
    text: Option<String>,
}

/// What a file was before the hooks came into it.
enum Origin {
    Nothing,
    Copy(PathBuf, String),
}

impl SettingsFile {
    fn read(agent: Agent, named: PathBuf) -> Result<SettingsFile, Failure> {
        let mut path = named.clone();
        for _ in 0..LINKS_MAX {
            let Ok(target) = std::fs::read_link(&path) else { break };
            path = path.parent().unwrap_or(Path::new("/")).join(target);
        }
        let mut file = SettingsFile { agent, is_linked: path != named, path, text: None };
        file.text = file.current()?;
        file.check_written()?;
        Ok(file)
    }

    /// Refuses an empty file that was changed a moment ago.
    fn check_written(&self) -> Result<(), Failure> {
        let Some("") = self.text.as_deref() else { return Ok(()) };
        let modified = self.metadata()?.modified().map_err(|error| self.io("read", &error))?;
        let now = SystemTime::now();
        // A clock that was set back by less than this time counts, too.
        let distance = now.duration_since(modified).unwrap_or_else(|error| error.duration());
        if distance >= WRITING_TIME_MAX {
            return Ok(());
        }
        let message = format!(
            "{} was left as it is: it was emptied less than a second ago, so it is being written by another program; try again",
            self.path.display()
        );
        Err(Failure::new(Exit::Io, message))
    }

    /// Refuses a file that its owner has closed to writing, and one that is a hard link.
    fn check_replaceable(&self) -> Result<(), Failure> {
        if self.text.is_none() {
            return Ok(());
        }
        let metadata = self.metadata()?;
        let shown = self.path.display();
        let way_out = if metadata.mode() & 0o200 == 0 {
            let path = settings::shell_word(&self.path.to_string_lossy());
            format!(
                "it is read-only (mode {:04o}); \"chmod u+w {path}\", then run this again",
                metadata.mode() & 0o7777
            )
        } else if rustix::fs::access(&self.path, rustix::fs::Access::WRITE_OK).is_err() {
            "you may not write to it (another user's file, or a read-only file system); run this as its owner"
                .to_owned()
        } else if metadata.nlink() > 1 {
            format!(
                "it has {} names (a hard link), and replacing it would cut it off from the others; make it a symbolic link \
                 to one of them (ln -s), then run this again",
                metadata.nlink()
            )
        } else {
            return Ok(());
        };
        Err(Failure::new(Exit::Io, format!("{shown} was left as it is: {way_out}")))
    }

    fn metadata(&self) -> Result<std::fs::Metadata, Failure> {
        self.path.metadata().map_err(|error| self.io("read", &error))
    }

    /// What it says now.
    fn current(&self) -> Result<Option<String>, Failure> {
        let bytes = match regular_file::read(&self.path, settings::FILE_BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.io("read", &error)),
        };
        String::from_utf8(bytes).map(Some).map_err(|error| {
            let message =
                format!("{} was left as it is: it is not UTF-8 ({error}); fix it by hand", self.path.display());
            Failure::new(Exit::Data, message)
        })
    }

    /// What it was before, where all that has happened since is that the hooks were installed.
    fn origin(&self, found: &[Found], own: &str) -> Option<Origin> {
        let text = self.text.as_deref()?;
        let command = &found.first()?.command;
        // In the order in which they were added.
        let usual =
            |event: &str| self.agent.hook_events().iter().position(|usual| *usual == event).unwrap_or(usize::MAX);
        let mut events: Vec<String> = found.iter().map(|found| found.event.clone()).collect();
        events.sort_by_key(|event| usual(event));
        // A copy from before a repair has hooks of ours already.
        let is_before =
            |text: &str| settings::find(text, own).is_ok_and(|found| !found.iter().any(|found| found.is_own));
        let leads_here = |before: &str| {
            is_before(before) && settings::install(before, command, &events).is_ok_and(|after| after == text)
        };
        let mut copies = self.copies();
        // The newest first.
        copies.sort_by(|a, b| b.cmp(a));
        for copy in copies {
            let original = regular_file::read_to_string(&copy, settings::FILE_BYTES_MAX);
            let original = original.ok().filter(|original| leads_here(original));
            if let Some(original) = original {
                return Some(Origin::Copy(copy, original));
            }
        }
        (!self.is_linked && leads_here(EMPTY)).then_some(Origin::Nothing)
    }

    /// The copies that were made of it.
    fn copies(&self) -> Vec<PathBuf> {
        let prefix = format!("{}{COPY_INFIX}", self.name());
        let entries =
            self.path.parent().and_then(|folder| std::fs::read_dir(folder).ok()).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .map(|entry| entry.path())
            .collect()
    }

    fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Keeps a copy of what is there, then writes `text` in its place.
    fn replace(&self, text: &str) -> Result<(), Failure> {
        if let Some(before) = &self.text {
            let time = Timestamp::now().strftime("%Y%m%dT%H%M%S.%6fZ");
            let copy = self.path.with_file_name(format!("{}{COPY_INFIX}{time}", self.name()));
            self.create(&copy, before).map_err(|error| self.io("keep a copy of", &error))?;
            println!("what was there is kept in {}", copy.display());
        }
        self.write(text)
    }

    /// All of it or nothing, also when the power goes.
    fn write(&self, text: &str) -> Result<(), Failure> {
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        std::fs::create_dir_all(folder).map_err(|error| self.io("make the folder of", &error))?;
        let fresh = self.path.with_file_name(format!(".{}.{}", self.name(), std::process::id()));
        let written = self.create(&fresh, text).map_err(|error| self.io("write", &error)).and_then(|()| {
            if self.current()? != self.text {
                let message =
                    format!("{} was changed meanwhile, and left as it is; run this again", self.path.display());
                return Err(Failure::new(Exit::Io, message));
            }
            std::fs::rename(&fresh, &self.path).map_err(|error| self.io("write", &error))
        });
        if written.is_err() {
            let _ = std::fs::remove_file(&fresh);
        }
        written?;
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| self.io("write", &error))
    }

    /// A new file with the mode and the owner of the old one, on disk.
    fn create(&self, path: &Path, text: &str) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
        if let Ok(old) = std::fs::metadata(&self.path) {
            file.set_permissions(PermissionsExt::from_mode(old.mode() & 0o7777))?;
            // Only root may give a file away; it is run for somebody else then.
            let _ = std::os::unix::fs::fchown(&file, Some(old.uid()), Some(old.gid()));
        }
        file.write_all(text.as_bytes())?;
        file.sync_all()
    }

    fn refused(&self, error: &SettingsError) -> Failure {
        Failure::new(Exit::Data, format!("{} was left as it is: {error}; fix it by hand", self.path.display()))
    }

    fn io(&self, what: &str, error: &io::Error) -> Failure {
        let way_out = match error.kind() {
            io::ErrorKind::InvalidInput | io::ErrorKind::IsADirectory => {
                "name a file with --settings, or move it out of the way"
            }
            _ => "correct its owner or mode",
        };
        Failure::new(Exit::Io, format!("could not {what} {}: {error}; {way_out}", self.path.display()))
    }
}
