//! `service`: the systemd user unit or launchd agent, written and enabled.
//!
//! The unit and the agent stand in `scripts/` with places to fill in; they are compiled in, so that the program alone
//! is enough to install itself.

use std::fmt::Write as _;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::config::Config;
use crate::regular_file;
use crate::service::limits;

use super::{Context, Exit, Failure, ServiceAction, ServiceArguments, ServiceKind};

const UNIT: &str = include_str!("../../scripts/headspace-watcher.service");
const AGENT: &str = include_str!("../../scripts/com.headspace.watcher.plist");

const UNIT_NAME: &str = "headspace-watcher.service";
const AGENT_LABEL: &str = "com.headspace.watcher";

/// A larger file is none of ours.
const UNIT_BYTES_MAX: u64 = 1 << 20;

pub fn service(context: &Context, arguments: &ServiceArguments) -> Result<Exit, Failure> {
    let kind =
        arguments.kind.unwrap_or(if cfg!(target_os = "macos") { ServiceKind::Launchd } else { ServiceKind::Systemd });
    let service = Service::of(context, kind)?;
    match arguments.action {
        ServiceAction::Install { no_enable } => service.install(context, !no_enable),
        ServiceAction::Uninstall { no_enable } => service.uninstall(!no_enable),
        ServiceAction::Status => service.status(),
    }
}

struct Service {
    kind: ServiceKind,
    /// Where its file belongs.
    file: PathBuf,
    /// What belongs in it.
    text: String,
}

impl Service {
    fn of(context: &Context, kind: ServiceKind) -> Result<Service, Failure> {
        let home = context.environment.home().map(Path::to_owned).ok_or_else(|| {
            let message = "could not find the folder of services: HOME is not set to an absolute path; set it";
            Failure::new(Exit::Configuration, message)
        })?;
        let program = std::env::current_exe()
            .map_err(|error| Failure::new(Exit::Io, format!("could not find out where this program is: {error}")))?;
        let folder = match &context.loaded.file {
            Some(file) => file.parent().map(Path::to_owned),
            None => std::env::current_dir().ok(),
        };
        let start = Start {
            program: text_of(&program)?,
            config: context.loaded.file.as_deref().map(text_of).transpose()?,
            folder: text_of(&folder.unwrap_or_else(|| PathBuf::from("/")))?,
            home: text_of(&home)?,
            limits: Limits::of(context.config()),
        };
        Ok(match kind {
            ServiceKind::Systemd => {
                let config_home = variable("XDG_CONFIG_HOME").filter(|path| path.is_absolute());
                let folder = config_home.unwrap_or_else(|| home.join(".config")).join("systemd/user");
                Service { kind, file: folder.join(UNIT_NAME), text: start.unit() }
            }
            ServiceKind::Launchd => {
                let file = home.join("Library/LaunchAgents").join(format!("{AGENT_LABEL}.plist"));
                Service { kind, file, text: start.agent() }
            }
        })
    }

    fn install(&self, context: &Context, enable: bool) -> Result<Exit, Failure> {
        if enable {
            self.reach_supervisor()?;
        }
        self.write()?;
        println!("wrote {}", self.file.display());
        for name in hidden_from_service(context) {
            println!("note: {name} is set here, but the service will not see it; {}", self.environment_advice());
        }
        if !enable {
            println!("not enabled; to do so: {}", self.enable_by_hand());
            return Ok(Exit::Fine);
        }
        for command in self.enable_commands() {
            run(&command)?;
        }
        println!("enabled and started; see \"headspace-watcher status\"");
        Ok(Exit::Fine)
    }

    fn uninstall(&self, disable: bool) -> Result<Exit, Failure> {
        if !self.file.exists() {
            println!("nothing to do: there is no {}", self.file.display());
            return Ok(Exit::Fine);
        }
        if disable {
            self.reach_supervisor()?;
            for command in self.disable_commands() {
                run(&command)?;
            }
        }
        std::fs::remove_file(&self.file).map_err(|error| self.io("remove", &error))?;
        println!("removed {}", self.file.display());
        if disable && self.kind == ServiceKind::Systemd {
            run(&["systemctl", "--user", "daemon-reload"].map(str::to_owned))?;
        }
        Ok(Exit::Fine)
    }

    /// 0 when it is installed and runs, else 3.
    fn status(&self) -> Result<Exit, Failure> {
        let shown = self.file.display();
        match regular_file::read_to_string(&self.file, UNIT_BYTES_MAX) {
            Ok(text) if text == self.text => println!("file      {shown}"),
            Ok(_) => println!(
                "file      {shown}, does not fit the configuration or this program: \"service install\" writes it again"
            ),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                println!("file      not installed: there is no {shown}");
                return Ok(Exit::NotRunning);
            }
            Err(error) => return Err(self.io("read", &error)),
        }
        self.reach_supervisor()?;
        let (enabled, active) = match self.kind {
            ServiceKind::Systemd => (
                answer(&["systemctl", "--user", "is-enabled", UNIT_NAME]),
                answer(&["systemctl", "--user", "is-active", UNIT_NAME]),
            ),
            ServiceKind::Launchd => {
                let loaded = answer(&["launchctl", "print", &agent_target()]);
                let state =
                    loaded.lines().find_map(|line| line.trim().strip_prefix("state = ")).unwrap_or("not loaded");
                (if loaded.is_empty() { "not loaded" } else { "loaded" }.to_owned(), state.to_owned())
            }
        };
        println!("enabled   {enabled}\nstate     {active}");
        Ok(if matches!(active.as_str(), "active" | "running") { Exit::Fine } else { Exit::NotRunning })
    }

    /// Whether there is somebody to enable it: looked at before anything is changed.
    fn reach_supervisor(&self) -> Result<(), Failure> {
        let probe: &[&str] = match self.kind {
            ServiceKind::Systemd => &["systemctl", "--user", "show", "--property=Version"],
            ServiceKind::Launchd => &["launchctl", "managername"],
        };
        let probe: Vec<String> = probe.iter().map(|&part| part.to_owned()).collect();
        run(&probe).map_err(|failure| {
            let way_out =
                "log in as the user it is for, or write the file alone with --no-enable, or use scripts/run-watcher.sh";
            Failure::new(Exit::Unavailable, format!("{}; {way_out}", failure.message))
        })
    }

    fn write(&self) -> Result<(), Failure> {
        if let Some(folder) = self.file.parent() {
            std::fs::create_dir_all(folder).map_err(|error| self.io("make the folder of", &error))?;
        }
        let fresh = self.file.with_extension("new");
        std::fs::write(&fresh, &self.text)
            .and_then(|()| std::fs::set_permissions(&fresh, PermissionsExt::from_mode(0o644)))
            .and_then(|()| std::fs::rename(&fresh, &self.file))
            .map_err(|error| self.io("write", &error))
    }

    fn io(&self, what: &str, error: &io::Error) -> Failure {
        Failure::new(Exit::Io, format!("could not {what} {}: {error}; mend its owner or mode", self.file.display()))
    }

    fn enable_commands(&self) -> Vec<Vec<String>> {
        let commands: Vec<Vec<&str>> = match self.kind {
            ServiceKind::Systemd => vec![
                vec!["systemctl", "--user", "daemon-reload"],
                vec!["systemctl", "--user", "enable", UNIT_NAME],
                // Also takes up a unit that has changed.
                vec!["systemctl", "--user", "restart", UNIT_NAME],
            ],
            ServiceKind::Launchd => {
                // One that is loaded already is replaced; that there is none is no error.
                let _ = answer(&["launchctl", "bootout", &agent_target()]);
                let user = user_target();
                let file = self.file.display().to_string();
                return vec![["launchctl", "bootstrap", &user, &file].map(str::to_owned).to_vec()];
            }
        };
        commands.into_iter().map(|command| command.into_iter().map(str::to_owned).collect()).collect()
    }

    fn disable_commands(&self) -> Vec<Vec<String>> {
        vec![match self.kind {
            ServiceKind::Systemd => ["systemctl", "--user", "disable", "--now", UNIT_NAME].map(str::to_owned).to_vec(),
            ServiceKind::Launchd => ["launchctl".to_owned(), "bootout".to_owned(), agent_target()].to_vec(),
        }]
    }

    fn enable_by_hand(&self) -> String {
        match self.kind {
            ServiceKind::Systemd => {
                format!("systemctl --user daemon-reload && systemctl --user enable --now {UNIT_NAME}")
            }
            ServiceKind::Launchd => format!("launchctl bootstrap gui/$(id -u) {}", self.file.display()),
        }
    }

    fn environment_advice(&self) -> &'static str {
        match self.kind {
            ServiceKind::Systemd => {
                "put it into ~/.config/headspace-watcher/environment (mode 0600) or into config.yaml"
            }
            ServiceKind::Launchd => "put it into config.yaml, passwords into ~/.pgpass",
        }
    }
}

/// What the places are filled in with.
struct Start {
    program: String,
    config: Option<String>,
    folder: String,
    home: String,
    limits: Limits,
}

/// What the supervisor holds the watcher to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Limits {
    kill_after_seconds: u64,
    memory_mebibytes: u64,
}

impl Limits {
    fn of(config: &Config) -> Limits {
        let memory_bytes =
            limits::memory_bytes_max(config.file_watcher.max_line_bytes, config.event_system.max_event_bytes);
        Limits {
            kill_after_seconds: limits::kill_after_seconds(config.event_system.shutdown_timeout),
            memory_mebibytes: memory_bytes.div_ceil(1 << 20),
        }
    }
}

impl Start {
    fn unit(&self) -> String {
        let arguments = match &self.config {
            Some(config) => format!("--config {}", unit_word(config)),
            None => String::new(),
        };
        // WorkingDirectory= takes its value as it is, spaces too, but for specifiers.
        let unit = with_value(UNIT, "\nTimeoutStopSec=", &self.limits.kill_after_seconds.to_string(), '\n');
        let unit = with_value(&unit, "\nMemoryMax=", &format!("{}M", self.limits.memory_mebibytes), '\n');
        // systemd expands no variables in the first word.
        unit.replace("@PROGRAM@", &unit_word(&self.program).replace("$$", "$"))
            .replace("@ARGUMENTS@ ", &if arguments.is_empty() { arguments } else { arguments + " " })
            .replace("@FOLDER@", &self.folder.replace('%', "%%"))
    }

    fn agent(&self) -> String {
        let mut arguments = String::new();
        if let Some(config) = &self.config {
            // Writing to a String can't fail.
            let _ = write!(arguments, "<string>--config</string>\n    <string>{}</string>", xml(config));
        }
        let text = AGENT.replace("@PROGRAM@", &xml(&self.program)).replace("@HOME@", &xml(&self.home));
        let text = text.replace("@FOLDER@", &xml(&self.folder));
        // launchd has no limit of memory that would be of use.
        let entry = "<key>ExitTimeOut</key>\n  <integer>";
        let text = with_value(&text, entry, &self.limits.kill_after_seconds.to_string(), '<');
        match arguments.is_empty() {
            true => text.replace("    @ARGUMENTS@\n", ""),
            false => text.replace("@ARGUMENTS@", &arguments),
        }
    }
}

/// `text` with `value` in the place of what stands between `before` and the next `end`. A text without `before` stays as it
/// is, which the tests of the templates find.
fn with_value(text: &str, before: &str, value: &str, end: char) -> String {
    let Some((head, rest)) = text.split_once(before) else { return text.to_owned() };
    let (_, tail) = rest.split_at(rest.find(end).unwrap_or(rest.len()));
    format!("{head}{before}{value}{tail}")
}

/// A word of ExecStart=, whatever is in it.
fn unit_word(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    format!("\"{escaped}\"")
}

fn xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn text_of(path: &Path) -> Result<String, Failure> {
    path.to_str().filter(|text| !text.contains(char::is_control)).map(str::to_owned).ok_or_else(|| {
        let message = format!("{} can't stand in a service file; move it to a path in plain UTF-8", path.display());
        Failure::new(Exit::Configuration, message)
    })
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Names of variables that this command sees and the service will not.
fn hidden_from_service(context: &Context) -> Vec<String> {
    let postgres = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let mut names: Vec<String> = postgres
        .filter(|name| name == "DATABASE_URL" || name == "CLAUDE_CONFIG_DIR" || name.starts_with("PG"))
        .chain(context.loaded.variables.iter().cloned())
        .collect();
    names.sort();
    names.dedup();
    names
}

fn user_target() -> String {
    format!("gui/{}", rustix::process::getuid().as_raw())
}

fn agent_target() -> String {
    format!("{}/{AGENT_LABEL}", user_target())
}

/// What a command says; empty when it can't be run.
fn answer(command: &[&str]) -> String {
    let Some((program, arguments)) = command.split_first() else { return String::new() };
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

fn run(command: &[String]) -> Result<(), Failure> {
    let Some((program, arguments)) = command.split_first() else { return Ok(()) };
    let failed =
        |cause: &str| Failure::new(Exit::Unavailable, format!("could not run \"{}\": {cause}", command.join(" ")));
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(&error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing").trim();
    Err(failed(&format!("{said} ({})", output.status)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(config: Option<&str>) -> Start {
        Start {
            program: "/opt/my programs/hw".to_owned(),
            config: config.map(str::to_owned),
            folder: "/home/100%/a b".to_owned(),
            home: "/home/me".to_owned(),
            limits: Limits { kill_after_seconds: 3, memory_mebibytes: 352 },
        }
    }

    #[test]
    fn other_limits_take_the_place_of_the_templates_own() {
        let limits = Limits { kill_after_seconds: 61, memory_mebibytes: 4711 };
        let start = Start { limits, ..start(None) };
        let lines = start.unit();
        let of = |name: &str| lines.lines().filter(|line| line.starts_with(name)).collect::<Vec<_>>();
        assert_eq!((of("TimeoutStopSec="), of("MemoryMax=")), (vec!["TimeoutStopSec=61"], vec!["MemoryMax=4711M"]));
        assert!(start.agent().contains("<key>ExitTimeOut</key>\n  <integer>61</integer>"));
    }

    #[test]
    fn a_unit_takes_any_path_as_it_is() {
        let unit = start(Some("/home/$me/\"a\" & b.yaml")).unit();
        let lines: Vec<&str> = unit.lines().collect();
        assert!(
            lines.contains(&r#"ExecStart="/opt/my programs/hw" --config "/home/$$me/\"a\" & b.yaml" run"#),
            "{unit}"
        );
        assert!(lines.contains(&"WorkingDirectory=/home/100%%/a b"), "{unit}");
        assert!(!lines.iter().any(|line| !line.starts_with('#') && line.contains('@') && !line.contains("@system")));
        assert!(start(None).unit().contains("ExecStart=\"/opt/my programs/hw\" run\n"));
    }

    #[test]
    fn an_agent_takes_any_path_as_it_is() {
        let agent = start(Some("/a & b<c>.yaml")).agent();
        assert!(agent.contains("<string>/opt/my programs/hw</string>\n    <string>--config</string>\n    <string>/a &amp; b&lt;c&gt;.yaml</string>\n    <string>run</string>"), "{agent}");
        let plain = start(None).agent();
        let body = plain.split("-->").nth(1).unwrap();
        assert!(body.contains("hw</string>\n    <string>run</string>") && !body.contains('@'), "{plain}");
    }
}
