//! From file and environment to a checked [`Config`], collecting every mistake.
//!
//! Each value is deserialized on its own, in a configuration that has all other keys at their defaults: so one mistake
//! does not hide the next, and an error always belongs to one key, whose line is known.

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::environment::{Environment, absolute};
use super::nearest::nearest;
use super::yaml::{self, Node};
use super::{CONFIG_FILE, Config, KeyValue, Loaded, Secret, database};
use crate::regular_file;

/// Every key with its default.
const DEFAULTS: &str = include_str!("defaults.yaml");

/// Prefix of the environment overrides; two underscores follow the section.
const VARIABLE_PREFIX: &str = "HEADSPACE_";

/// Values of these are never shown.
const SECRETS: [&str; 2] = ["database.url", "http.token"];

const PROJECTS: &str = "claude.projects_path";

/// Where the defaults of paths are, beside a configuration file.
const STATE_FOLDER: &str = "data";
const CODEX_SESSIONS: &str = "codex.sessions_path";

/// Keys of Claude Headspace's own in sections that both programs have.
const CLAUDE_HEADSPACE_KEYS: [(&str, &[&str]); 3] = [
    ("database", &["host", "port", "name", "user", "password", "pool_timeout"]),
    ("file_watcher", &["reconciliation_interval", "awaiting_input_timeout"]),
    ("hooks", &["enabled", "polling_interval_with_hooks", "fallback_timeout"]),
];

/// A larger file is no configuration.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Longest path of a Unix socket that the system takes, its closing zero byte not counted.
const SOCKET_PATH_BYTES_MAX: usize = if cfg!(target_os = "macos") { 103 } else { 107 };

/// What can be used of the configuration, with defaults for the rest, and every mistake in a line of its own. A file
/// that can't be read as YAML is the only mistake.
pub(super) fn load(file: Option<&Path>, environment: &Environment) -> (Loaded, Vec<String>) {
    // The name of the file in messages, and its path.
    let users_own = environment.user_config_file();
    let implied = || {
        let mut files = [Some(PathBuf::from(CONFIG_FILE)), users_own.clone()].into_iter().flatten();
        files.find(|file| environment.folder().join(file).symlink_metadata().is_ok())
    };
    let name = file.map(Path::to_path_buf).or_else(implied);
    let path = name.as_ref().map(|name| absolute(environment.folder(), name));
    let folder = path.as_ref().and_then(|path| path.parent()).unwrap_or(environment.folder());
    // However it was named: what calls the program with "--config" must find the same folder.
    let is_users_own = path.as_ref().is_none_or(|path| users_own.is_some_and(|own| is_same_file(path, &own)));
    let state = if is_users_own { environment.state_folder() } else { STATE_FOLDER.to_owned() };

    let keys = documented_keys(&state);
    let mut loader = Loader { environment, folder, keys, issues: Vec::new(), unused: Vec::new() };
    let mut unusable = None;
    if let (Some(name), Some(path)) = (&name, &path) {
        match read_tree(path) {
            Ok(Some(root)) => loader.read_file(&name.display().to_string(), &root),
            Ok(None) => {}
            Err(issue) => unusable = Some(format!("{}{issue}", name.display())),
        }
    }
    let (variables, misspelt_variables) = loader.read_variables();
    let (config, values) = loader.finish();
    let state_folder = loader.locate(Path::new(&state)).unwrap_or_default();
    let Loader { issues, unused, .. } = loader;
    let issues = unusable.map_or(issues, |issue| vec![issue]);
    (Loaded { config, file: path, state_folder, variables, misspelt_variables, unused, values }, issues)
}

/// Whether both paths lead to one file, by names of their own in perhaps linked folders.
fn is_same_file(a: &Path, b: &Path) -> bool {
    let folder = |path: &Path| path.parent().and_then(|folder| folder.canonicalize().ok());
    a == b || (a.file_name() == b.file_name() && folder(a).is_some() && folder(a) == folder(b))
}

/// The file as YAML; `None` where nothing is in it. The error continues the name of the file.
fn read_tree(path: &Path) -> Result<Option<Node>, String> {
    let bytes = regular_file::read(path, FILE_BYTES_MAX)
        .map_err(|error| format!(": could not read the configuration: {error}"))?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let line = 1 + bytes.iter().take(error.valid_up_to()).filter(|byte| **byte == b'\n').count();
        format!(":{line}: expected UTF-8 text, found other bytes; save the file as UTF-8")
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    yaml::parse(text).map_err(|error| format!(":{error}"))
}

/// A key with its value: a text, null, or a list.
struct Key {
    default: Value,
    value: Value,
    /// Where the value was given, for messages; `None` for the default.
    location: Option<String>,
    /// It was given a value that it does not accept, and has its default instead.
    is_wrong: bool,
}

/// All keys, by `section.key`. Those whose default is in `data/` have it in `state` instead.
fn documented_keys(state: &str) -> BTreeMap<String, Key> {
    let root = yaml::parse(DEFAULTS).ok().flatten().expect("a test reads the defaults");
    let mut keys = BTreeMap::new();
    for (section, content) in root.entries() {
        for (name, value) in content.entries() {
            let path = format!("{}.{}", section.text().unwrap_or_default(), name.text().unwrap_or_default());
            let below = value.text().and_then(|text| text.strip_prefix(STATE_FOLDER));
            let default = below.map_or_else(|| value.value(), |below| Value::String(format!("{state}{below}")));
            let key = Key { value: default.clone(), default, location: None, is_wrong: false };
            keys.insert(path, key);
        }
    }
    keys
}

/// What an environment variable means for the key `path`. Lists are as in YAML when it starts with `[`; patterns may also
/// be `a,b`, paths may not, since a path may hold a comma.
fn from_variable(path: &str, text: &str) -> Value {
    let trimmed = text.trim();
    let is_list = trimmed.starts_with('[');
    if path == "redact.patterns" && !is_list {
        return trimmed.split(',').map(str::trim).filter(|item| !item.is_empty()).collect();
    }
    if ["redact.patterns", PROJECTS].contains(&path)
        && is_list
        && let Ok(Some(node)) = yaml::parse(trimmed)
    {
        return node.value();
    }
    // A path may be called "~": only nothing and the word are null.
    if text.is_empty() || text == "null" { Value::Null } else { Value::String(text.to_owned()) }
}

/// The value as `config.yaml` would have it, with lists as JSON.
fn shown(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// For messages: what was found, without what may be a secret.
fn describe(value: &Value, is_secret: bool) -> String {
    /// A longer text says nothing in a message, and may be anything.
    const SHOWN_CHARS_MAX: usize = 60;
    match value {
        Value::Array(items) => match items.iter().position(|item| !item.is_string()) {
            Some(index) => format!("a list whose entry {} is no text", index + 1),
            None => format!("a list of length {}", items.len()),
        },
        Value::Object(_) => "a section".to_owned(),
        Value::String(_) if is_secret => "something else (not shown: it may be secret)".to_owned(),
        // What looks like a URL is one that slipped into the wrong place, perhaps with its password.
        Value::String(text) if text.contains("://") || text.chars().count() > SHOWN_CHARS_MAX => {
            format!("a text of {} characters", text.chars().count())
        }
        Value::String(text) if text.parse::<f64>().is_ok_and(f64::is_finite) => text.clone(),
        Value::String(text) => format!("{text:?}"),
        _ => "nothing".to_owned(),
    }
}

struct Loader<'a> {
    environment: &'a Environment,
    /// Folder to which relative paths are relative.
    folder: &'a Path,
    keys: BTreeMap<String, Key>,
    issues: Vec<String>,
    /// Sections and keys of other programs.
    unused: Vec<String>,
}

impl Loader<'_> {
    fn read_file(&mut self, file: &str, root: &Node) {
        let at = |node: &Node| format!("{file}:{}", node.line);
        if let Some(found) = no_mapping(root) {
            return self.issues.push(format!("{}: expected sections such as \"queue:\", found {found}", at(root)));
        }
        let mut seen = HashMap::new();
        for (node, content) in root.entries() {
            let Some(section) = self.name(node, &at(node)) else { continue };
            let location = format!("{}: {section}", at(node));
            if !self.keys.keys().any(|path| section_of(path) == section) {
                match suggest_section(&self.keys, section) {
                    Some(hint) => self.issues.push(format!("{location}: unknown section; {hint}")),
                    None => self.unused.push(section.to_owned()),
                }
                continue;
            }
            self.expect_once(&mut seen, section, &location, node.line);
            if let Some(found) = no_mapping(content) {
                let location = format!("{}: {section}", at(content));
                self.issues.push(format!("{location}: expected keys with values below it, found {found}"));
            }
            for (node, value) in content.entries() {
                let Some(name) = self.name(node, &format!("{}: {section}", at(node))) else { continue };
                let path = format!("{section}.{name}");
                // A text may start below its key; a list or a section is looked for at its key.
                let location = format!("{}: {path}", at(if value.text().is_some() { value } else { node }));
                if CLAUDE_HEADSPACE_KEYS.iter().any(|(own, names)| *own == section && names.contains(&name)) {
                    self.unused.push(path);
                } else if !self.keys.contains_key(&path) {
                    let show = |path: &str| if section_of(path) == section { name_of(path) } else { path }.to_owned();
                    let hint = suggest_key(&self.keys, section, name, show);
                    self.issues.push(format!("{location}: unknown key; {hint}"));
                } else if self.expect_once(&mut seen, &path, &location, node.line) {
                    self.take(&path, value.value(), location);
                }
            }
        }
    }

    /// The name of a section or key; an issue when it is no name. What it is instead is not repeated: a colon without a
    /// space after it makes a name of a whole URL.
    fn name<'n>(&mut self, node: &'n Node, location: &str) -> Option<&'n str> {
        let name = node.text().filter(|text| is_name(text));
        if name.is_none() {
            let expected = "expected a name made of letters, digits and _, then a colon and a space";
            self.issues.push(format!("{location}: {expected}"));
        }
        name
    }

    /// Whether `path` was not on an earlier line; an issue when it was.
    fn expect_once(&mut self, seen: &mut HashMap<String, usize>, path: &str, location: &str, line: usize) -> bool {
        let first = seen.insert(path.to_owned(), line);
        if let Some(first) = first {
            self.issues.push(format!("{location}: expected once, found it again: it is already on line {first}"));
        }
        first.is_none()
    }

    /// Takes the environment overrides; returns the names of those that set a key, and what is said of those that may be
    /// meant to. Other programs have variables with this prefix, so these are no mistakes.
    fn read_variables(&mut self) -> (Vec<String>, Vec<String>) {
        /// Similarity from which a variable without `__` is taken for a typing error.
        const NEAR: f64 = 0.8;
        let (mut taken, mut misspelt) = (Vec::new(), Vec::new());
        for (variable, value) in self.environment.starting_with(VARIABLE_PREFIX) {
            let rest = variable.strip_prefix(VARIABLE_PREFIX).unwrap_or_default();
            let Some((section, name)) = rest.split_once("__") else {
                let known = |path: &String| path.replacen('.', "_", 1).to_uppercase();
                let likeness = |path: &String| strsim::normalized_damerau_levenshtein(&known(path), rest);
                let nearest = self.keys.keys().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
                let nearest = nearest.filter(|path| likeness(path) >= NEAR).map(|path| variable_of(path));
                misspelt.extend(nearest.map(|near| format!("{variable} sets nothing; did you mean {near}?")));
                continue;
            };
            let location = format!("environment {variable}");
            let Some(path) = self.keys.keys().find(|path| variable_of(path) == variable).cloned() else {
                let hint = suggest_key(&self.keys, &section.to_lowercase(), name, variable_of);
                self.issues.push(format!("{location}: no key has this variable; {hint}"));
                continue;
            };
            match value.to_str() {
                Some(text) => {
                    self.take(&path, from_variable(&path, text), location);
                    taken.push(variable.to_owned());
                }
                None => self.issues.push(format!("{location}: expected UTF-8 text, found other bytes")),
            }
        }
        (taken, misspelt)
    }

    /// Gives a key a value if it accepts it, else its default.
    fn take(&mut self, path: &str, given: Value, location: String) {
        let value =
            given.as_str().and_then(|text| in_bare_units(path, text)).map_or_else(|| given.clone(), Value::from);
        let accepted = self.accepts(path, &value, &given);
        if let Some(key) = self.keys.get_mut(path) {
            key.is_wrong = accepted.is_err();
            key.value = if key.is_wrong { key.default.clone() } else { value };
            key.location = Some(location.clone());
        }
        if let Err(message) = accepted {
            self.issues.push(format!("{location}: {message}"));
        }
    }

    /// Says why a key does not accept a value, which was `given` so.
    fn accepts(&self, path: &str, value: &Value, given: &Value) -> Result<(), String> {
        // Hooks load a copy of the documented file each time: defaults need no trial.
        if self.keys.get(path).is_some_and(|key| key.default == *value) {
            return Ok(());
        }
        let mut config = self
            .config(|other, key| if other == path { value.clone() } else { key.default.clone() })
            .map_err(|expected| format!("expected {expected}, found {}", describe(given, SECRETS.contains(&path))))?;
        if let Some(url) = &config.database.url {
            database::parse(url.text.reveal())?;
        }
        let mut own = paths(&mut config).into_iter().filter(|(key, _)| *key == path);
        own.try_for_each(|(_, located)| self.locate(located).map(drop))
    }

    /// The absolute path that a value means.
    fn locate(&self, path: &Path) -> Result<PathBuf, String> {
        let text = path.to_string_lossy();
        self.environment.locate(&text, self.folder).map_err(|expected| format!("{expected}, found {text:?}"))
    }

    /// The configuration that has these values, or what was expected instead of one of them.
    fn config(&self, value: impl Fn(&str, &Key) -> Value) -> Result<Config, String> {
        let mut sections: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
        for (path, key) in &self.keys {
            sections.entry(section_of(path)).or_default().insert(name_of(path).to_owned(), value(path, key));
        }
        Config::deserialize(serde_json::json!(sections)).map_err(|error| error.to_string())
    }

    /// The configuration with absolute paths, and the value of each key as `config.yaml` would have it.
    fn finish(&mut self) -> (Config, BTreeMap<String, KeyValue>) {
        let mut config = self.config(|_, key| key.value.clone()).expect("each value was accepted alone");
        if let (Some(url), Some(key)) = (&mut config.database.url, self.keys.get("database.url")) {
            (url.location, url.folder) = (key.location.clone().unwrap_or_default(), self.folder.to_owned());
        }
        let mut values: BTreeMap<String, String> =
            self.keys.iter().map(|(path, key)| (path.clone(), shown(&key.value))).collect();
        // Without a home there is no Codex CLI either.
        let is_default = self.keys.get(CODEX_SESSIONS).is_some_and(|key| key.location.is_none());
        config.codex.sessions_path = config.codex.sessions_path.filter(|path| !is_default || self.locate(path).is_ok());
        for (key, path) in paths(&mut config) {
            match self.locate(path) {
                Ok(located) => *path = located,
                // Only a default can have no path: there is no home.
                Err(message) => self.require(false, key, key, message),
            }
            values.insert(key.to_owned(), path.display().to_string());
        }
        // Each once: CLAUDE_CONFIG_DIR can make one of two.
        let mut projects: Vec<PathBuf> = Vec::new();
        for folder in std::mem::take(&mut config.claude.projects_paths) {
            if !projects.iter().any(|other| lies_in(&folder, other) && lies_in(other, &folder)) {
                projects.push(folder);
            }
        }
        config.claude.projects_paths = projects;
        if self.keys.get(PROJECTS).is_some_and(|key| key.value.is_array()) {
            let folders = config.claude.projects_paths.iter().map(|folder| folder.display().to_string());
            values.insert(PROJECTS.to_owned(), folders.collect::<Value>().to_string());
        }
        self.cross_validate(&config);
        let sourced = |(path, value): (String, String)| {
            let location = self.keys.get(&path).and_then(|key| key.location.as_deref()).unwrap_or("default");
            let source = location.strip_suffix(&format!(": {path}")).unwrap_or(location).to_owned();
            let is_secret = SECRETS.contains(&&*path);
            (path, KeyValue { value: Secret::new(value), is_secret, source })
        };
        (config, values.into_iter().map(sourced).collect())
    }

    /// Checks what no key can know alone.
    fn cross_validate(&mut self, config: &Config) {
        let (watcher, events, queue, http) = (&config.file_watcher, &config.event_system, &config.queue, &config.http);
        let (retry_max, retry) = ("event_system.write_retry_max_delay_ms", "event_system.write_retry_delay_ms");
        let (timeout, polling) = ("file_watcher.inactivity_timeout", "file_watcher.polling_interval");
        let (pending, event) = ("queue.max_pending_bytes", "event_system.max_event_bytes");
        for (holds, upper, lower) in [
            (events.write_retry_max_delay >= events.write_retry_delay, retry_max, retry),
            (watcher.inactivity_timeout >= watcher.polling_interval, timeout, polling),
            (queue.max_pending_bytes >= events.max_event_bytes, pending, event),
        ] {
            let found = |path: &str| self.keys.get(path).map(|key| shown(&key.value)).unwrap_or_default();
            let found = format!("{} below {}", found(upper), found(lower));
            self.require(holds, upper, lower, format!("expected {upper} not below {lower}, found {found}"));
        }
        for (inner_key, inner, outer_key, outer) in [
            ("queue.spool_path", &queue.spool_path, "queue.path", &queue.path),
            ("queue.path", &queue.path, "queue.spool_path", &queue.spool_path),
            ("http.socket", &http.socket, "queue.path", &queue.path),
            ("http.socket", &http.socket, "queue.spool_path", &queue.spool_path),
        ] {
            // Two equal folders are one mistake, not two.
            let holds = !lies_in(inner, outer) || inner_key == "queue.path" && inner == outer;
            let found = format!("{} in {}", inner.display(), outer.display());
            let message = format!("expected {inner_key} outside of {outer_key}, found {found}");
            self.require(holds, inner_key, outer_key, message);
        }
        let folders = &config.claude.projects_paths;
        for inner in folders.iter().filter(|inner| folders.iter().any(|outer| outer != *inner && lies_in(inner, outer)))
        {
            let message = format!("expected folders outside of each other, found {} inside another", inner.display());
            self.require(false, PROJECTS, PROJECTS, message);
        }
        let is_loopback = http.listen.is_none_or(|address| address.ip().to_canonical().is_loopback());
        let message = "expected a loopback address such as 127.0.0.1:5056 while http.token is null: to listen beyond \
                       this machine, set http.token (HEADSPACE_HTTP__TOKEN); the generated token serves on loopback only";
        self.require(is_loopback || http.token.is_some(), "http.listen", "http.token", message.to_owned());
        let (bytes, socket) = (http.socket.as_os_str().len(), http.socket.display());
        let expected = format!("a path of at most {SOCKET_PATH_BYTES_MAX} bytes, as the system demands of sockets");
        let message = format!("expected {expected}, found {bytes}: {socket}");
        self.require(bytes <= SOCKET_PATH_BYTES_MAX, "http.socket", "http.socket", message);
    }

    /// Adds an issue unless `holds`, at the first of two keys, or at the second where only that was given. None when one
    /// of their own values is wrong already.
    fn require(&mut self, holds: bool, first: &str, second: &str, message: String) {
        let (Some(first_key), Some(second_key)) = (self.keys.get(first), self.keys.get(second)) else { return };
        if holds || first_key.is_wrong || second_key.is_wrong {
            return;
        }
        let location = first_key.location.as_ref().or(second_key.location.as_ref());
        let location = location.cloned().unwrap_or_else(|| format!("built-in default: {first}"));
        self.issues.push(format!("{location}: {message}"));
    }
}

/// Every path of the configuration with its key.
fn paths(config: &mut Config) -> Vec<(&'static str, &mut PathBuf)> {
    let mut paths = vec![
        ("queue.path", &mut config.queue.path),
        ("queue.spool_path", &mut config.queue.spool_path),
        ("http.socket", &mut config.http.socket),
    ];
    paths.extend(config.codex.sessions_path.iter_mut().map(|path| (CODEX_SESSIONS, path)));
    paths.extend(config.schemas.path.iter_mut().map(|path| ("schemas.path", path)));
    paths.extend(config.claude.projects_paths.iter_mut().map(|path| (PROJECTS, path)));
    paths
}

fn section_of(path: &str) -> &str {
    path.split_once('.').map_or(path, |(section, _)| section)
}

fn name_of(path: &str) -> &str {
    path.split_once('.').map_or(path, |(_, name)| name)
}

/// `text`, a number with a unit such as `64MiB` or `90m`, as the bare number that the key `path` takes. Names of keys end
/// with what their bare numbers count: bytes, milliseconds, or seconds. `None` where it is something else.
pub(super) fn in_bare_units(path: &str, text: &str) -> Option<String> {
    let text = text.trim();
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic())?);
    let number = number.trim_end();
    if path.ends_with("_bytes") {
        let power = ["B", "KiB", "MiB", "GiB", "TiB"].iter().position(|known| *known == unit)?;
        return Some(number.parse::<u64>().ok()?.checked_mul(1 << (10 * power))?.to_string());
    }
    let bare = if path.ends_with("_ms") {
        1.0
    } else if ["_seconds", "_interval", "_timeout"].iter().any(|end| path.ends_with(end)) {
        1000.0
    } else {
        return None;
    };
    let units = [("ms", 1.0), ("s", 1000.0), ("m", 60_000.0), ("h", 3_600_000.0), ("d", 86_400_000.0)];
    let (_, milliseconds) = units.into_iter().find(|(known, _)| *known == unit)?;
    let is_decimal = number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let number: f64 = is_decimal.then(|| number.parse().ok()).flatten()?;
    Some(((number * milliseconds / bare * 1000.0).round() / 1000.0).to_string())
}

/// The environment override of a key.
fn variable_of(path: &str) -> String {
    format!("{VARIABLE_PREFIX}{}", path.replacen('.', "__", 1).to_uppercase())
}

/// Whether `text` can be a key: everything else may be a misplaced value, and is not shown.
fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
}

/// For messages: what stands in place of a mapping.
fn no_mapping(node: &Node) -> Option<&'static str> {
    match node.value() {
        Value::String(_) => Some("a single text (is there a space after the colon?)"),
        Value::Array(_) => Some("a list"),
        _ => None,
    }
}

/// Whether `inner` is `outer` or below it, by the letters alone.
fn lies_in(inner: &Path, outer: &Path) -> bool {
    fn straight(path: &Path) -> PathBuf {
        path.components().fold(PathBuf::new(), |mut straight, part| {
            if part == Component::ParentDir {
                straight.pop();
            } else {
                straight.push(part);
            }
            straight
        })
    }
    straight(inner).starts_with(straight(outer))
}

/// What to try instead of an unknown section that looks like a mistake; `None` for one of another program.
fn suggest_section(keys: &BTreeMap<String, Key>, name: &str) -> Option<String> {
    let lower = name.to_lowercase();
    let paths = || keys.keys().map(String::as_str);
    if let Some(section) = nearest(&lower, paths().map(section_of), |section| section) {
        return Some(format!("did you mean \"{section}\"?"));
    }
    // A key that stands outside of its section.
    let path = paths().find(|path| name_of(path) == lower || *path == lower)?;
    Some(format!("did you mean {} below \"{}:\"?", name_of(path), section_of(path)))
}

/// What to try instead of an unknown key; `show` says how a key is called here.
fn suggest_key(keys: &BTreeMap<String, Key>, section: &str, name: &str, show: impl Fn(&str) -> String) -> String {
    let lower = name.to_lowercase();
    let paths = || keys.keys().map(String::as_str);
    let here = || paths().filter(|path| section_of(path) == section);
    let found = here()
        .chain(paths())
        .find(|path| name_of(path) == lower)
        .or_else(|| nearest(&lower, here(), name_of))
        .or_else(|| nearest(&format!("{section}.{lower}"), paths(), |path| path));
    match found {
        Some(path) => format!("did you mean \"{}\"?", show(path)),
        None if here().next().is_some() => format!("there are {}", here().map(show).collect::<Vec<_>>().join(", ")),
        None => "see config.yaml for all keys".to_owned(),
    }
}

/// For a user who asks for one key.
pub(super) fn unknown_key(key: &str) -> String {
    let (section, name) = key.split_once('.').unwrap_or(("", key));
    format!("unknown key {key:?}; {}", suggest_key(&documented_keys(STATE_FOLDER), section, name, str::to_owned))
}
