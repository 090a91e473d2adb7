//! `service`: the systemd user unit or launchd agent, written and enabled.
//!
//! The templates of both are `scripts/headspace-watcher.service` and `scripts/com.headspace.watcher.plist`. They are
//! compiled in, so that the program alone is enough to install itself.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use clap::{Args, Subcommand, ValueEnum};

use crate::config::Config;
use crate::regular_file;
use crate::service::limits;

use super::{Context, Exit, Failure, own_program, plain_path};

const UNIT: &str = include_str!("../../scripts/headspace-watcher.service");
const AGENT: &str = include_str!("../../scripts/com.headspace.watcher.plist");

const UNIT_NAME: &str = "headspace-watcher.service";
const AGENT_LABEL: &str = "com.headspace.watcher";

/// A larger file is none of ours.
const UNIT_BYTES_MAX: u64 = 1 << 20;

/// Install the systemd user unit or launchd agent that keeps the watcher running
#[derive(Args)]
#[command(
    after_help = "Examples:\n  headspace-watcher --config ~/watcher/config.yaml service install\n  headspace-watcher service status"
)]
pub(super) struct ServiceArguments {
    #[command(subcommand)]
    action: ServiceAction,
    /// For whom; the system's own supervisor when not given
    #[arg(long = "for", global = true, value_enum, value_name = "SUPERVISOR")]
    kind: Option<ServiceKind>,
}

#[derive(Subcommand)]
enum ServiceAction {
    /// Write it, enable it and start it
    Install {
        /// Write the file only
        #[arg(long)]
        no_enable: bool,
    },
    /// Stop it, disable it and remove it
    Uninstall {
        /// Remove the file only
        #[arg(long)]
        no_enable: bool,
    },
    /// Whether it is installed and runs. Exit code 0 when it runs, else 3
    Status,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ServiceKind {
    Systemd,
    Launchd,
}

pub(super) fn service(context: &Context, arguments: &ServiceArguments) -> Result<Exit, Failure> {
    let kind =
        arguments.kind.unwrap_or(if cfg!(target_os = "macos") { ServiceKind::Launchd } else { ServiceKind::Systemd });
    let values = Values::of(context)?;
    let service = match kind {
        ServiceKind::Systemd => Service::systemd(&values),
        ServiceKind::Launchd => Service::launchd(&values),
    };
    match arguments.action {
        ServiceAction::Install { no_enable } => service.install(context, !no_enable),
        ServiceAction::Uninstall { no_enable } => service.uninstall(!no_enable),
        ServiceAction::Status => service.status(),
    }
}

/// A command of the supervisor: program and arguments.
type CommandLine = Vec<String>;

/// The command that `text` stands for, whose words have no blanks in them.
fn command_line(text: &str) -> CommandLine {
    text.split(' ').map(str::to_owned).collect()
}

/// The watcher as a service of one supervisor.
struct Service {
    /// Where its file belongs.
    file: PathBuf,
    /// What belongs in it.
    text: String,
    /// Succeeds where the supervisor can be reached.
    probe: CommandLine,
    /// Run before enabling; may fail.
    unload: Option<CommandLine>,
    enable: Vec<CommandLine>,
    disable: CommandLine,
    /// Run after the file was removed.
    reload: Option<CommandLine>,
    enable_by_hand: String,
    /// Where to put the value of an environment variable.
    environment_advice: &'static str,
    /// Asks whether it is enabled and what state it is in.
    state: fn() -> (String, String),
}

impl Service {
    fn systemd(values: &Values) -> Service {
        let config_home = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
        let config_home = config_home.unwrap_or_else(|| values.home.join(".config"));
        Service {
            file: config_home.join("systemd/user").join(UNIT_NAME),
            text: values.unit(),
            probe: command_line("systemctl --user show --property=Version"),
            unload: None,
            enable: vec![
                command_line("systemctl --user daemon-reload"),
                command_line(&format!("systemctl --user enable {UNIT_NAME}")),
                // Also starts a unit that has changed again.
                command_line(&format!("systemctl --user restart {UNIT_NAME}")),
            ],
            disable: command_line(&format!("systemctl --user disable --now {UNIT_NAME}")),
            reload: Some(command_line("systemctl --user daemon-reload")),
            enable_by_hand: format!("systemctl --user daemon-reload && systemctl --user enable --now {UNIT_NAME}"),
            environment_advice: "put it into ~/.config/headspace-watcher/environment (mode 0600) or into config.yaml",
            state: || {
                let ask = |question: &str| answer(&command_line(&format!("systemctl --user {question} {UNIT_NAME}")));
                (ask("is-enabled"), ask("is-active"))
            },
        }
    }

    fn launchd(values: &Values) -> Service {
        let file = values.home.join("Library/LaunchAgents").join(format!("{AGENT_LABEL}.plist"));
        let shown = file.display().to_string();
        let unload = command_line(&format!("launchctl bootout {}", agent_target()));
        let mut load = command_line(&format!("launchctl bootstrap {}", user_target()));
        load.push(shown.clone());
        Service {
            file,
            text: values.agent(),
            probe: command_line("launchctl managername"),
            // An agent that is loaded already is replaced.
            unload: Some(unload.clone()),
            enable: vec![load],
            disable: unload,
            reload: None,
            enable_by_hand: format!("launchctl bootstrap gui/$(id -u) {shown}"),
            environment_advice: "put it into config.yaml, passwords into ~/.pgpass",
            state: || {
                let loaded = answer(&command_line(&format!("launchctl print {}", agent_target())));
                let state = loaded.lines().find_map(|line| line.trim().strip_prefix("state = "));
                let enabled = if loaded.is_empty() { "not loaded" } else { "loaded" };
                (enabled.to_owned(), state.unwrap_or("not loaded").to_owned())
            },
        }
    }

    fn install(&self, context: &Context, enable: bool) -> Result<Exit, Failure> {
        if enable {
            self.reach_supervisor()?;
        }
        self.write()?;
        println!("wrote {}", self.file.display());
        for name in hidden_from_service(context) {
            println!("note: {name} is set here, but the service will not see it; {}", self.environment_advice);
        }
        if !enable {
            println!("not enabled; to do so: {}", self.enable_by_hand);
            return Ok(Exit::Fine);
        }
        if let Some(unload) = &self.unload {
            answer(unload);
        }
        for command in &self.enable {
            run(command)?;
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
            run(&self.disable)?;
        }
        std::fs::remove_file(&self.file).map_err(|error| self.io("remove", &error))?;
        println!("removed {}", self.file.display());
        match &self.reload {
            Some(reload) if disable => run(reload)?,
            _ => {}
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
        let (enabled, state) = (self.state)();
        println!("enabled   {enabled}\nstate     {state}");
        Ok(if matches!(state.as_str(), "active" | "running") { Exit::Fine } else { Exit::NotRunning })
    }

    /// Whether there is a supervisor to enable it: asked before anything is changed.
    fn reach_supervisor(&self) -> Result<(), Failure> {
        run(&self.probe).map_err(|failure| {
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
        Failure::new(Exit::Io, format!("could not {what} {}: {error}; fix its owner or mode", self.file.display()))
    }
}

/// The values that the templates are filled in with.
struct Values {
    program: String,
    config: Option<String>,
    folder: String,
    home: PathBuf,
    kill_after_seconds: u64,
    memory_mebibytes: u64,
}

impl Values {
    fn of(context: &Context) -> Result<Values, Failure> {
        let home = context.environment.home().map(Path::to_owned).ok_or_else(|| {
            let message = "could not find the folder of services: HOME is not set to an absolute path; set it";
            Failure::new(Exit::Configuration, message)
        })?;
        let plain = |path: &Path| plain_path(path, "a service file");
        plain(&home)?;
        let config = context.loaded.file.as_deref();
        let folder = match config {
            Some(config) => config.parent().map(Path::to_owned),
            None => std::env::current_dir().ok(),
        };
        let Config { file_watcher, event_system, .. } = context.config();
        let memory_bytes = limits::memory_bytes_max(file_watcher.max_line_bytes, event_system.max_event_bytes);
        Ok(Values {
            program: plain(&own_program()?)?,
            config: config.map(plain).transpose()?,
            folder: plain(&folder.unwrap_or_else(|| PathBuf::from("/")))?,
            home,
            kill_after_seconds: limits::kill_after_seconds(event_system.shutdown_timeout),
            memory_mebibytes: memory_bytes.div_ceil(1 << 20),
        })
    }

    fn unit(&self) -> String {
        let config = self.config.as_ref().map(|config| format!(" --config {}", unit_word(config)));
        // systemd expands no variables in the first word. WorkingDirectory= takes its value as it is but for specifiers.
        UNIT.replace("@PROGRAM@", &unit_word(&self.program).replace("$$", "$"))
            .replace(" @ARGUMENTS@", &config.unwrap_or_default())
            .replace("@FOLDER@", &self.folder.replace('%', "%%"))
            .replace("\nTimeoutStopSec=3\n", &format!("\nTimeoutStopSec={}\n", self.kill_after_seconds))
            .replace("\nMemoryMax=352M\n", &format!("\nMemoryMax={}M\n", self.memory_mebibytes))
    }

    fn agent(&self) -> String {
        let config = self.config.as_ref();
        let config =
            config.map(|config| format!("\n    <string>--config</string>\n    <string>{}</string>", xml(config)));
        let exit_timeout = |seconds: u64| format!("<key>ExitTimeOut</key>\n  <integer>{seconds}</integer>");
        // launchd has no useful limit of memory.
        AGENT
            .replace("@PROGRAM@", &xml(&self.program))
            .replace("\n    @ARGUMENTS@", &config.unwrap_or_default())
            .replace("@FOLDER@", &xml(&self.folder))
            .replace("@HOME@", &xml(&self.home.to_string_lossy()))
            .replace(&exit_timeout(3), &exit_timeout(self.kill_after_seconds))
    }
}

/// A word of ExecStart=, whatever is in it.
fn unit_word(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    format!("\"{escaped}\"")
}

fn xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
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

fn output(command: &[String]) -> io::Result<Output> {
    let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    Command::new(program).args(arguments).stdin(Stdio::null()).output()
}

/// What a command prints; empty when it can't be run.
fn answer(command: &[String]) -> String {
    output(command).map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

fn run(command: &[String]) -> Result<(), Failure> {
    let failed =
        |cause: String| Failure::new(Exit::Unavailable, format!("could not run \"{}\": {cause}", command.join(" ")));
    let output = output(command).map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let first = errors.lines().find(|line| !line.trim().is_empty()).unwrap_or("no error message").trim();
    Err(failed(format!("{first} ({})", output.status)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(config: Option<&str>) -> Values {
        Values {
            program: "/opt/my programs/hw".to_owned(),
            config: config.map(str::to_owned),
            folder: "/home/100%/a b".to_owned(),
            home: PathBuf::from("/home/me"),
            kill_after_seconds: 3,
            memory_mebibytes: 352,
        }
    }

    #[test]
    fn other_limits_take_the_place_of_the_templates_own() {
        let values = Values { kill_after_seconds: 61, memory_mebibytes: 4711, ..values(None) };
        let lines = values.unit();
        let of = |name: &str| lines.lines().filter(|line| line.starts_with(name)).collect::<Vec<_>>();
        assert_eq!((of("TimeoutStopSec="), of("MemoryMax=")), (vec!["TimeoutStopSec=61"], vec!["MemoryMax=4711M"]));
        assert!(values.agent().contains("<key>ExitTimeOut</key>\n  <integer>61</integer>"));
    }

    #[test]
    fn a_unit_takes_any_path_as_it_is() {
        let unit = values(Some("/home/$me/\"a\" & b.yaml")).unit();
        let lines: Vec<&str> = unit.lines().collect();
        assert!(
            lines.contains(&r#"ExecStart="/opt/my programs/hw" --config "/home/$$me/\"a\" & b.yaml" run"#),
            "{unit}"
        );
        assert!(lines.contains(&"WorkingDirectory=/home/100%%/a b"), "{unit}");
        assert!(!lines.iter().any(|line| !line.starts_with('#') && line.contains('@') && !line.contains("@system")));
        assert!(values(None).unit().contains("ExecStart=\"/opt/my programs/hw\" run\n"));
    }

    #[test]
    fn an_agent_takes_any_path_as_it_is() {
        let agent = values(Some("/a & b<c>.yaml")).agent();
        assert!(agent.contains("<string>/opt/my programs/hw</string>\n    <string>--config</string>\n    <string>/a &amp; b&lt;c&gt;.yaml</string>\n    <string>run</string>"), "{agent}");
        let plain = values(None).agent();
        let body = plain.split("-->").nth(1).unwrap();
        assert!(body.contains("hw</string>\n    <string>run</string>") && !body.contains('@'), "{plain}");
    }
}
