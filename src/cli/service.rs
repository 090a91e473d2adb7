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
use crate::queue::QueueError;
use crate::regular_file;
use crate::service::limits;

use super::{Context, Exit, Failure, inspect_queue, own_program, plain_path};

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
    /// Supervisor to write for [default: this system's]
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
    let service = of_kind(context, arguments.kind)?;
    match arguments.action {
        ServiceAction::Install { no_enable } => service.install(context, !no_enable),
        ServiceAction::Uninstall { no_enable } => service.uninstall(!no_enable),
        ServiceAction::Status => service.status(),
    }
}

/// The service of one supervisor, of this system's where none is named.
fn of_kind(context: &Context, kind: Option<ServiceKind>) -> Result<Service, Failure> {
    let usual = if cfg!(target_os = "macos") { ServiceKind::Launchd } else { ServiceKind::Systemd };
    let values = Values::of(context)?;
    Ok(match kind.unwrap_or(usual) {
        ServiceKind::Systemd => Service::systemd(&values),
        ServiceKind::Launchd => Service::launchd(&values),
    })
}

/// Where this system's supervisor has the service, and its environment.
pub(super) fn service_files(context: &Context) -> Vec<(&'static str, PathBuf)> {
    let Ok(service) = of_kind(context, None) else { return Vec::new() };
    let environment = service.environment.map(|file| ("its environment", file));
    [("service", service.file)].into_iter().chain(environment).collect()
}

/// As `service uninstall` does without further options.
pub(super) fn uninstall_default(context: &Context) -> Result<Exit, Failure> {
    of_kind(context, None)?.uninstall(true)
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
    /// Where its environment is, one variable a line; `None`: it has what the configuration says, and nothing more.
    environment: Option<PathBuf>,
    /// Asks whether it is enabled and what state it is in.
    state: fn() -> (String, String),
}

impl Service {
    fn systemd(values: &Values) -> Service {
        let config_home = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
        let config_home = config_home.unwrap_or_else(|| values.home.join(".config"));
        Service {
            file: config_home.join("systemd/user").join(UNIT_NAME),
            environment: Some(config_home.join("headspace-watcher/environment")),
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
            environment: None,
            state: || {
                let loaded = answer(&command_line(&format!("launchctl print {}", agent_target())));
                let state = loaded.lines().find_map(|line| line.trim().strip_prefix("state = "));
                let enabled = if loaded.is_empty() { "not loaded" } else { "loaded" };
                (enabled.to_owned(), state.unwrap_or("not loaded").to_owned())
            },
        }
    }

    fn install(&self, context: &Context, enable: bool) -> Result<Exit, Failure> {
        self.expect_database(context)?;
        if enable {
            self.reach_supervisor("write the file alone with --no-enable, or use scripts/run-watcher.sh")?;
            self.expect_free_queue(context)?;
        }
        self.write()?;
        println!("wrote {}", self.file.display());
        for name in hidden_from_service(context).iter().filter(|name| !self.sets(&[name])) {
            println!("note: {name} is set here, but the service will not see it; {}", self.environment_advice());
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
        if disable && let Err(failure) = run(&self.disable) {
            println!("note: {}; if the service runs, end it by hand", failure.message);
        }
        std::fs::remove_file(&self.file).map_err(|error| self.io("remove", &error))?;
        println!("removed {}", self.file.display());
        if let Some(reload) = self.reload.as_ref().filter(|_| disable) {
            // It can't be reached: that was said.
            let _ = run(reload);
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
        self.reach_supervisor("its state is not known")?;
        let (enabled, state) = (self.state)();
        println!("enabled   {enabled}\nstate     {state}");
        Ok(if self.is_running() { Exit::Fine } else { Exit::NotRunning })
    }

    /// Whether there is a supervisor to enable it: asked before anything is changed.
    fn reach_supervisor(&self, otherwise: &str) -> Result<(), Failure> {
        run(&self.probe).map_err(|failure| {
            let message = format!("{}; log in as the user it is for, or {otherwise}", failure.message);
            Failure::new(Exit::Unavailable, message)
        })
    }

    /// Refuses a service whose events would have nowhere to go: it does not see the shell's environment, and the private
    /// PostgreSQL of scripts/run-watcher.sh runs only with that script.
    fn expect_database(&self, context: &Context) -> Result<(), Failure> {
        let is_configured = context.config().database.url.is_some()
            && !context.loaded.variables.iter().any(|name| name == "HEADSPACE_DATABASE__URL");
        if is_configured || self.sets(&["HEADSPACE_DATABASE__URL", "DATABASE_URL", "PGHOST", "PGHOSTADDR"]) {
            return Ok(());
        }
        let config = match &context.loaded.file {
            Some(file) => format!("set database.url in {}", file.display()),
            None => "make a configuration with \"headspace-watcher config init\" and set database.url in it".to_owned(),
        };
        let environment = self.environment.as_ref();
        let environment =
            environment.map(|file| format!(", or write DATABASE_URL=… into {} (mode 0600)", file.display()));
        let message = format!(
            "the service would have no database: {config}{}. It sees neither this shell's environment nor the private \
             PostgreSQL of scripts/run-watcher.sh, which runs only with that script",
            environment.unwrap_or_default()
        );
        Err(Failure::new(Exit::Configuration, message))
    }

    /// Refuses to start a service that could not open the queue. Its own process is replaced.
    fn expect_free_queue(&self, context: &Context) -> Result<(), Failure> {
        let Err(QueueError::InUse { pid, .. }) = inspect_queue(context.config()) else { return Ok(()) };
        if self.is_running() {
            return Ok(());
        }
        let (holder, kill) = match pid {
            Some(pid) => (format!("process {pid}"), format!("kill {pid}")),
            None => ("another process".to_owned(), "end it".to_owned()),
        };
        let message = format!(
            "another watcher ({holder}) holds the queue: stop it first (Ctrl-C where scripts/run-watcher.sh runs, or {kill}), \
             then install again"
        );
        Err(Failure::new(Exit::Unavailable, message))
    }

    fn is_running(&self) -> bool {
        matches!((self.state)().1.as_str(), "active" | "running")
    }

    /// Whether the service's environment gives one of these variables a value.
    fn sets(&self, names: &[&str]) -> bool {
        let read = |file: &PathBuf| regular_file::read_to_string(file, UNIT_BYTES_MAX).ok();
        let text = self.environment.as_ref().and_then(read).unwrap_or_default();
        let mut set = text.lines().filter_map(|line| line.trim().split_once('='));
        set.any(|(name, value)| names.contains(&name.trim_end()) && !value.trim_matches(['"', '\'', ' ']).is_empty())
    }

    fn environment_advice(&self) -> String {
        match &self.environment {
            Some(file) => format!("put it into {} (mode 0600) or into the configuration", file.display()),
            None => "put it into the configuration, passwords into ~/.pgpass".to_owned(),
        }
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
        // Without a file nothing is relative to it, and no config.yaml of the current folder may come in later.
        let folder = config.and_then(Path::parent).unwrap_or(Path::new("/"));
        let Config { file_watcher, event_system, .. } = context.config();
        let memory_bytes = limits::memory_bytes_max(file_watcher.max_line_bytes, event_system.max_event_bytes);
        Ok(Values {
            program: plain(&own_program()?)?,
            config: config.map(plain).transpose()?,
            folder: plain(folder)?,
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

/// What else than the overrides of keys changes where things are.
const HIDDEN: [&str; 4] = ["DATABASE_URL", "CLAUDE_CONFIG_DIR", "XDG_CONFIG_HOME", "XDG_STATE_HOME"];

/// Names of variables that this command sees and the service will not.
fn hidden_from_service(context: &Context) -> Vec<String> {
    let postgres = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let mut names: Vec<String> = postgres
        .filter(|name| HIDDEN.contains(&name.as_str()) || name.starts_with("PG"))
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
