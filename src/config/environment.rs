//! The process's surroundings as a value: variables, current folder, home and user.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Component, Path, PathBuf};
use std::{fmt, io};

use super::CONFIG_FILE;

/// What surrounds the process. An argument everywhere, so that a test needs no environment of its own.
#[derive(Clone)]
pub struct Environment {
    variables: BTreeMap<OsString, OsString>,
    folder: PathBuf,
    home: Option<PathBuf>,
    user: Option<String>,
}

impl Environment {
    /// The surroundings of this process.
    ///
    /// # Errors
    /// When the current folder is gone.
    pub fn of_process() -> io::Result<Self> {
        let mut environment = Self::new(std::env::current_dir()?, std::env::vars_os());
        // These two also look into the system's user database.
        environment.home = std::env::home_dir().filter(|home| home.is_absolute());
        environment.user = environment.user.or_else(user_of_process);
        Ok(environment)
    }

    /// Surroundings made up from a current folder (absolute) and variables; home and user come from `HOME` and `USER`
    /// or `LOGNAME`.
    pub fn new<K, V>(folder: impl Into<PathBuf>, variables: impl IntoIterator<Item = (K, V)>) -> Self
    where
        K: Into<OsString>,
        V: Into<OsString>,
    {
        let variables: BTreeMap<OsString, OsString> =
            variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        let set = |name: &str| variables.get(OsStr::new(name)).filter(|value| !value.is_empty());
        let home = set("HOME").map(PathBuf::from).filter(|home| home.is_absolute());
        let user = set("USER").or_else(|| set("LOGNAME")).and_then(|user| user.to_str()).map(str::to_owned);
        Environment { folder: folder.into(), home, user, variables }
    }

    /// The current folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn home(&self) -> Option<&Path> {
        self.home.as_deref()
    }

    /// Name of the user whose process this is.
    pub fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// Claude Code's own folder: `CLAUDE_CONFIG_DIR`, else `~/.claude`; `None` without a home.
    pub fn claude_folder(&self) -> Option<PathBuf> {
        match self.set("CLAUDE_CONFIG_DIR") {
            Some(moved) => Some(absolute(&self.folder, Path::new(moved))),
            None => self.home.as_ref().map(|home| home.join(".claude")),
        }
    }

    /// Codex's own folder: `CODEX_HOME`, else `~/.codex`; `None` without a home.
    pub(crate) fn codex_folder(&self) -> Option<PathBuf> {
        match self.set("CODEX_HOME") {
            Some(moved) => Some(absolute(&self.folder, Path::new(moved))),
            None => self.home.as_ref().map(|home| home.join(".codex")),
        }
    }

    /// The user's own configuration file: `$XDG_CONFIG_HOME` or `~/.config`, on macOS too; `None` without a home.
    pub fn user_config_file(&self) -> Option<PathBuf> {
        let file = self.xdg("XDG_CONFIG_HOME", "~/.config") + "/" + CONFIG_FILE;
        self.locate(&file, &self.folder).ok()
    }

    /// Folder of queue, spool and socket where no configuration file has them beside it. `~` stands for the home.
    pub(super) fn state_folder(&self) -> String {
        let usual = if cfg!(target_os = "macos") { "~/Library/Application Support" } else { "~/.local/state" };
        self.xdg("XDG_STATE_HOME", usual)
    }

    /// This program's folder below the one that `variable` names. The XDG specification has relative ones ignored.
    fn xdg(&self, variable: &str, usual: &str) -> String {
        let named = self.set(variable).and_then(OsStr::to_str).filter(|folder| folder.starts_with('/'));
        format!("{}/{}", named.unwrap_or(usual), env!("CARGO_PKG_NAME"))
    }

    /// A variable that is set and not empty, as text. The error is for people.
    pub(super) fn text(&self, name: &str) -> Result<Option<&str>, String> {
        let Some(value) = self.set(name) else { return Ok(None) };
        value.to_str().map(Some).ok_or_else(|| format!("environment {name}: expected UTF-8 text"))
    }

    /// A variable that is set and not empty.
    pub(super) fn set(&self, name: &str) -> Option<&OsStr> {
        self.variables.get(OsStr::new(name)).map(OsString::as_os_str).filter(|value| !value.is_empty())
    }

    /// All variables whose names are UTF-8 and start with `prefix`, empty ones too, by name.
    pub(super) fn starting_with<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a OsStr)> {
        self.variables
            .iter()
            .filter_map(|(name, value)| Some((name.to_str()?, value.as_os_str())))
            .filter(move |(name, _)| name.starts_with(prefix))
    }

    /// The absolute path meant by `text`: `~` is the home, `~/.claude` and `~/.codex` are the agents' folders wherever they were moved,
    /// and what is relative is relative to `base`. The error says what was expected.
    pub(super) fn locate(&self, text: &str, base: &Path) -> Result<PathBuf, String> {
        let Some(rest) = text.strip_prefix('~') else {
            return Ok(absolute(base, Path::new(text)));
        };
        if !(rest.is_empty() || rest.starts_with('/')) {
            return Err("expected the folder written out: only ~ and ~/ are expanded".to_owned());
        }
        let below = Path::new(rest.trim_start_matches('/'));
        let place = match (below.strip_prefix(".claude"), below.strip_prefix(".codex")) {
            (Ok(inner), _) => self.claude_folder().map(|folder| folder.join(inner)),
            (_, Ok(inner)) => self.codex_folder().map(|folder| folder.join(inner)),
            _ => self.home.as_ref().map(|home| home.join(below)),
        };
        place
            .map(|place| absolute(base, &place))
            .ok_or_else(|| "expected an absolute path: HOME is not set, so ~ means nothing".to_owned())
    }
}

/// Shows names only: values may be secrets.
impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Environment")
            .field("variables", &self.variables.keys())
            .field("folder", &self.folder)
            .field("home", &self.home)
            .field("user", &self.user)
            .finish()
    }
}

/// `path` below `base` without `.` and doubled slashes. `..` stays: a link before it may lead elsewhere.
pub(super) fn absolute(base: &Path, path: &Path) -> PathBuf {
    base.join(path).components().filter(|part| *part != Component::CurDir).collect()
}

/// Name of the user that owns this process, where the system keeps a plain list of users.
///
/// For containers, which often set no `USER`.
fn user_of_process() -> Option<String> {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let users = std::fs::read_to_string("/etc/passwd").ok()?;
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    })
}
