//! From file and environment to a checked [`Config`], gathering every mistake on the way.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use super::environment::{Environment, absolute};
use super::keys::{self, Giver, KEYS, Key, Kind, Refusal, SECTIONS, VARIABLE_PREFIX};
use super::problem::{ConfigError, Place, Problem};
use super::yaml::{self, Node, Value};
use super::{
    CONFIG_FILE, ClaudeConfig, Config, DatabaseConfig, EventSystemConfig, FileWatcherConfig, HookCapture, HooksConfig,
    HttpConfig, Loaded, QueueConfig, RedactConfig, SchemasConfig, Secret, TableName,
};
use crate::regular_file;

/// A larger file is no configuration.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Longest path of a Unix socket that the system takes, its closing zero byte not counted.
const SOCKET_PATH_BYTES_MAX: usize = if cfg!(target_os = "macos") { 103 } else { 107 };

pub(super) fn load(file: Option<&Path>, environment: &Environment) -> Result<Loaded, ConfigError> {
    let (loaded, mut problems) = gather(file, environment);
    if problems.is_empty() {
        return Ok(loaded);
    }
    problems.sort_by_key(|problem| match &problem.place {
        Place::File { line, .. } => (0, line.unwrap_or(0)),
        _ => (1, 0),
    });
    Err(ConfigError::new(problems))
}

/// What can be used of the configuration, and whether that is all of it. Where it can't, built-in defaults serve.
pub(super) fn load_leniently(file: Option<&Path>, environment: &Environment) -> (Loaded, bool) {
    let (loaded, problems) = gather(file, environment);
    (loaded, problems.is_empty())
}

/// Reads everything; keys with a problem have their defaults. A file that can't be read as YAML is the only problem.
fn gather(file: Option<&Path>, environment: &Environment) -> (Loaded, Vec<Problem>) {
    // How the file is called in messages, and where it is.
    let implied = || {
        let found = environment.folder().join(CONFIG_FILE).symlink_metadata().is_ok();
        found.then(|| PathBuf::from(CONFIG_FILE))
    };
    let name = file.map(Path::to_path_buf).or_else(implied);
    let path = name.as_ref().map(|name| absolute(environment.folder(), name));
    let folder = path.as_ref().and_then(|path| path.parent()).unwrap_or(environment.folder());

    let mut reading = Reading {
        config: blank(),
        values: BTreeMap::new(),
        environment,
        folder,
        places: HashMap::new(),
        seen: HashMap::new(),
        problems: Vec::new(),
    };
    let mut unusable = None;
    if let (Some(name), Some(path)) = (&name, &path) {
        match tree(name, path) {
            Ok(Some(root)) => reading.file(name, &root),
            Ok(None) => {}
            Err(problem) => unusable = Some(problem),
        }
    }
    let variables = reading.variables();
    reading.defaults();
    reading.across_keys();
    reading.stand_in();

    let Reading { config, values, problems, .. } = reading;
    (Loaded { config, file: path, variables, values }, unusable.map_or(problems, |problem| vec![problem]))
}

/// The file `path`, called `name` in messages, as YAML; `None` where nothing is in it.
fn tree(name: &Path, path: &Path) -> Result<Option<Node>, Problem> {
    let whole = |line, column, message: String| Problem {
        place: Place::File { path: name.to_owned(), line, column },
        key: None,
        message,
    };
    let text = read(path).map_err(|message| whole(None, None, message))?;
    let text = text_of(text).map_err(|(line, message)| whole(Some(line), None, message))?;
    yaml::parse(&text).map_err(|error| whole(Some(error.line), Some(error.column), error.message))
}

/// The bytes of a file, or why they can't be had.
fn read(path: &Path) -> Result<Vec<u8>, String> {
    regular_file::read(path, FILE_BYTES_MAX).map_err(|error| match error.kind() {
        ErrorKind::NotFound => "expected a configuration file, found none".to_owned(),
        ErrorKind::IsADirectory => "expected a configuration file, found a folder".to_owned(),
        ErrorKind::FileTooLarge => format!("expected a configuration of at most {FILE_BYTES_MAX} bytes, found more"),
        _ => format!("could not read the configuration: {error}"),
    })
}

/// The bytes as text, or the line at which they are none.
fn text_of(bytes: Vec<u8>) -> Result<String, (usize, String)> {
    let text = String::from_utf8(bytes).map_err(|error| {
        let valid = error.as_bytes().iter().take(error.utf8_error().valid_up_to());
        let line = 1 + valid.filter(|byte| **byte == b'\n').count();
        (line, "expected UTF-8 text, found other bytes; save the file as UTF-8".to_owned())
    })?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

/// A value as it was given, before its key has looked at it.
enum Given {
    Null,
    /// `plain` when it may mean a number, a flag or null.
    Text {
        text: String,
        plain: bool,
    },
    /// A list; `None` for what is no text in it.
    List(Vec<Option<String>>),
    Mapping,
}

impl Given {
    fn from_node(node: &Node) -> Given {
        match &node.value {
            _ if node.is_null() => Given::Null,
            Value::Scalar { text, plain } => Given::Text { text: text.clone(), plain: *plain },
            Value::Mapping(_) => Given::Mapping,
            Value::List(items) => Given::List(
                items
                    .iter()
                    .map(|item| match &item.value {
                        Value::Scalar { text, .. } if !item.is_null() => Some(text.clone()),
                        _ => None,
                    })
                    .collect(),
            ),
        }
    }

    /// What an environment variable means for `key`. Lists are as in YAML when it starts with `[`; lists of texts may also
    /// be `a,b`, lists of paths may not, since a path may hold a comma.
    fn from_variable(key: &Key, text: &str) -> Given {
        let trimmed = text.trim();
        if matches!(key.kind, Kind::Texts { .. } | Kind::Paths { .. }) && trimmed.starts_with('[') {
            return match yaml::parse(trimmed) {
                Ok(Some(node)) => Given::from_node(&node),
                Ok(None) | Err(_) => Given::Text { text: text.to_owned(), plain: true },
            };
        }
        if let Kind::Texts { .. } = key.kind {
            let items = trimmed.split(',').map(str::trim).filter(|item| !item.is_empty());
            return Given::List(items.map(|item| Some(item.to_owned())).collect());
        }
        // A path may be called "~": there, only nothing and the word are null.
        if text.is_empty() || text == "null" {
            return Given::Null;
        }
        Given::Text { text: text.to_owned(), plain: true }
    }

    /// The value as `config.yaml` would have it, with paths absolute and lists as JSON.
    fn shown(&self, key: &Key, folder: &Path, environment: &Environment) -> String {
        let located = |text: &String| match environment.locate(text, folder) {
            Ok(path) => path.display().to_string(),
            Err(_) => text.clone(),
        };
        match (self, &key.kind) {
            (Given::Text { text, .. }, Kind::Path { .. } | Kind::OptionalPath { .. } | Kind::Paths { .. }) => {
                located(text)
            }
            (Given::Text { text, .. }, _) => text.clone(),
            (Given::List(items), Kind::Paths { .. }) => {
                // It was accepted before.
                let paths = paths(items, key, folder, environment).unwrap_or_default();
                serde_json::json!(paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>()).to_string()
            }
            (Given::List(items), _) => serde_json::json!(items).to_string(),
            (Given::Null | Given::Mapping, _) => "null".to_owned(),
        }
    }

    /// For messages: what was found, without what may be a secret.
    fn describe(&self, secret: bool) -> String {
        /// A longer text says nothing in a message, and may be anything.
        const SHOWN_CHARS_MAX: usize = 60;
        match self {
            Given::Null => "nothing".to_owned(),
            Given::List(_) => "a list".to_owned(),
            Given::Mapping => "a section".to_owned(),
            Given::Text { .. } if secret => "something else (not shown: it may be secret)".to_owned(),
            // What looks like a URL is one that slipped into the wrong place, perhaps with its password.
            Given::Text { text, .. } if text.contains("://") || text.chars().count() > SHOWN_CHARS_MAX => {
                format!("a text of {} characters", text.chars().count())
            }
            Given::Text { text, plain: true } if text.parse::<f64>().is_ok_and(f64::is_finite) => text.clone(),
            Given::Text { text, plain: true } => format!("{text:?}"),
            Given::Text { text, plain: false } => format!("the quoted text {text:?}"),
        }
    }
}

struct Reading<'a> {
    config: Config,
    /// What [`Loaded::value`] returns.
    values: BTreeMap<String, Secret>,
    environment: &'a Environment,
    /// Folder to which relative paths are relative.
    folder: &'a Path,
    /// Where the value of each key in `config` came from, by `section.key`; keys with a wrong value are missing.
    places: HashMap<String, Place>,
    /// Keys of the file or the environment, also wrong ones: these need no default.
    seen: HashMap<String, usize>,
    problems: Vec<Problem>,
}

impl Reading<'_> {
    fn file(&mut self, name: &Path, root: &Node) {
        let at = |line| Place::File { path: name.to_owned(), line: Some(line), column: None };
        let Value::Mapping(sections) = &root.value else {
            let message = format!("expected sections such as \"queue:\", found {}", kind_of(root));
            return self.problem(at(root.line), None, message);
        };
        let mut sections_seen = HashMap::new();
        for (key, value) in sections {
            let Some(section) = self.name(key, &at, None) else { continue };
            if !SECTIONS.iter().any(|known| known.name == section) {
                let hint = nearest_section(section);
                self.problem(at(key.line), Some(section.to_owned()), format!("unknown section; {hint}"));
                continue;
            }
            if let Some(first) = sections_seen.insert(section, key.line) {
                let message = format!("expected each section once, found it again: it is already on line {first}");
                self.problem(at(key.line), Some(section.to_owned()), message);
            }
            match &value.value {
                Value::Mapping(entries) => self.section(section, entries, &at),
                _ if value.is_null() => {}
                _ => {
                    let message = format!("expected keys with values below it, found {}", kind_of(value));
                    self.problem(at(value.line), Some(section.to_owned()), message);
                }
            }
        }
    }

    fn section(&mut self, section: &str, entries: &[(Node, Node)], at: &impl Fn(usize) -> Place) {
        for (key, value) in entries {
            let Some(name) = self.name(key, at, Some(section)) else { continue };
            let path = format!("{section}.{name}");
            let Some(known) = keys::find(section, name) else {
                let hint = nearest_key(section, name, |key| match key.section == section {
                    true => key.name.to_owned(),
                    false => key.path(),
                });
                self.problem(at(key.line), Some(path), format!("unknown key; {hint}"));
                continue;
            };
            if let Some(first) = self.seen.insert(path.clone(), key.line) {
                let message = format!("expected each key once, found it again: it is already on line {first}");
                self.problem(at(key.line), Some(path), message);
                continue;
            }
            // A block's first line is below its key, which is where people look.
            let line = if matches!(value.value, Value::Scalar { .. }) { value.line } else { key.line };
            let line = if value.is_null() { key.line } else { line };
            self.take(known, &Given::from_node(value), at(line));
        }
    }

    /// The text of a section's or a key's name; a problem when it is no name. What it is instead is not repeated: a
    /// colon without a space after it makes a name of a whole URL.
    fn name<'n>(&mut self, node: &'n Node, at: &impl Fn(usize) -> Place, section: Option<&str>) -> Option<&'n str> {
        match &node.value {
            Value::Scalar { text, .. } if is_name(text) => Some(text),
            _ => {
                let message = "expected a name made of letters, digits and _, then a colon and a space";
                self.problem(at(node.line), section.map(str::to_owned), message.to_owned());
                None
            }
        }
    }

    /// Takes the twins of keys from the environment; answers with the names of those that set one.
    fn variables(&mut self) -> Vec<String> {
        let mut taken = Vec::new();
        for (name, value) in self.environment.starting_with(VARIABLE_PREFIX) {
            let Some((section, key)) = name.strip_prefix(VARIABLE_PREFIX).and_then(|rest| rest.split_once("__")) else {
                continue;
            };
            let place = Place::Variable(name.to_owned());
            let Some(known) = KEYS.iter().find(|known| known.variable() == name) else {
                let message = if is_name(section) && is_name(key) {
                    let hint = nearest_key(&section.to_lowercase(), &key.to_lowercase(), Key::variable);
                    format!("no key has this variable; {hint}")
                } else {
                    "no key has this variable".to_owned()
                };
                self.problem(place, None, message);
                continue;
            };
            self.seen.insert(known.path(), 0);
            match value.to_str() {
                Some(text) => {
                    self.take(known, &Given::from_variable(known, text), place);
                    taken.push(name.to_owned());
                }
                None => self.problem(place, None, "expected UTF-8 text, found other bytes".to_owned()),
            }
        }
        taken
    }

    fn defaults(&mut self) {
        for key in KEYS {
            if !self.seen.contains_key(&key.path()) {
                self.take(key, &default_of(key), Place::Default);
            }
        }
    }

    /// Gives keys with a wrong value their defaults, for who goes on in spite of that.
    fn stand_in(&mut self) {
        for key in KEYS {
            if !self.places.contains_key(&key.path()) {
                let giver = Giver { place: &Place::Default, folder: self.folder };
                // A default that can't serve here (there is no home) leaves the key blank.
                let _ = accept(key, &default_of(key), &giver, self.environment, &mut self.config);
            }
        }
    }

    /// Stores a value that its key accepts; else remembers why it doesn't.
    fn take(&mut self, key: &Key, given: &Given, place: Place) {
        let giver = Giver { place: &place, folder: self.folder };
        let message = match accept(key, given, &giver, self.environment, &mut self.config) {
            Ok(()) => {
                let value = given.shown(key, self.folder, self.environment);
                self.values.insert(key.path(), Secret::new(value));
                self.places.insert(key.path(), place);
                return;
            }
            Err(Refusal::Because(message)) => message,
            Err(Refusal::Other) => format!("expected {}, found {}", key.expected(), given.describe(key.is_secret())),
        };
        // A right value of the file goes too: it will not serve, so nothing is checked against it.
        self.places.remove(&key.path());
        self.problem(place, Some(key.path()), message);
    }

    /// Checks what no key can know alone.
    fn across_keys(&mut self) {
        let config = self.config.clone();
        let (watcher, events, queue, http) = (&config.file_watcher, &config.event_system, &config.queue, &config.http);
        self.demand(
            events.write_retry_max_delay >= events.write_retry_delay,
            ["event_system.write_retry_max_delay_ms", "event_system.write_retry_delay_ms"],
            |max, delay| {
                format!(
                    "expected {max} not below {delay}, found {} below {}",
                    events.write_retry_max_delay.as_millis(),
                    events.write_retry_delay.as_millis()
                )
            },
        );
        self.demand(
            watcher.inactivity_timeout >= watcher.polling_interval,
            ["file_watcher.inactivity_timeout", "file_watcher.polling_interval"],
            |timeout, interval| {
                format!(
                    "expected {timeout} not below {interval}, found {} below {}",
                    watcher.inactivity_timeout.as_secs_f64(),
                    watcher.polling_interval.as_secs_f64()
                )
            },
        );
        self.demand(
            queue.max_pending_bytes >= events.max_event_bytes,
            ["queue.max_pending_bytes", "event_system.max_event_bytes"],
            |pending, event| {
                format!(
                    "expected {pending} not below {event}, found {} below {}",
                    queue.max_pending_bytes, events.max_event_bytes
                )
            },
        );
        for (inner, outer, [inner_key, outer_key]) in [
            (&queue.spool_path, &queue.path, ["queue.spool_path", "queue.path"]),
            (&queue.path, &queue.spool_path, ["queue.path", "queue.spool_path"]),
            (&http.socket, &queue.path, ["http.socket", "queue.path"]),
            (&http.socket, &queue.spool_path, ["http.socket", "queue.spool_path"]),
        ] {
            // Two equal folders are one mistake, not two.
            let twice = outer_key == "queue.spool_path" && inner_key == "queue.path" && inner == outer;
            self.demand(twice || !lies_in(inner, outer), [inner_key, outer_key], |inner_key, outer_key| {
                format!("expected {inner_key} outside of {outer_key}, found {} in {}", inner.display(), outer.display())
            });
        }
        self.demand(
            http.listen.is_none_or(|address| address.ip().to_canonical().is_loopback()) || http.token.is_some(),
            ["http.listen", "http.token"],
            |_, _| {
                "expected a loopback address such as 127.0.0.1:5056 while http.token is null: to listen beyond this \
                 machine, set http.token (HEADSPACE_HTTP__TOKEN); the generated token serves on loopback only"
                    .to_owned()
            },
        );
        let socket_bytes = http.socket.as_os_str().len();
        self.demand(socket_bytes <= SOCKET_PATH_BYTES_MAX, ["http.socket", "http.socket"], |_, _| {
            format!(
                "expected a path of at most {SOCKET_PATH_BYTES_MAX} bytes, as the system demands of sockets, found \
                 {socket_bytes}: {}",
                http.socket.display()
            )
        });
    }

    /// Adds a problem unless `holds`; at the first of the two keys that was given by someone. Says nothing when a key's
    /// own value is wrong already.
    fn demand(&mut self, holds: bool, keys: [&str; 2], message: impl Fn(&str, &str) -> String) {
        let [first, second] = keys;
        let (Some(first_place), Some(second_place)) = (self.places.get(first), self.places.get(second)) else { return };
        if !holds {
            let blamed = if *first_place == Place::Default { (second, second_place) } else { (first, first_place) };
            let (key, place) = (blamed.0.to_owned(), blamed.1.clone());
            self.problem(place, Some(key), message(first, second));
        }
    }

    fn problem(&mut self, place: Place, key: Option<String>, message: String) {
        self.problems.push(Problem { place, key, message });
    }
}

fn default_of(key: &Key) -> Given {
    match yaml::parse(key.default) {
        Ok(Some(node)) => Given::from_node(&node),
        Ok(None) | Err(_) => Given::Null,
    }
}

/// Checks `given` against `key` and stores it.
fn accept(
    key: &Key,
    given: &Given,
    giver: &Giver,
    environment: &Environment,
    config: &mut Config,
) -> Result<(), Refusal> {
    let text = match given {
        Given::Text { text, .. } => Some(text.as_str()),
        _ => None,
    };
    let plain = match given {
        Given::Text { text, plain: true } => Some(text.trim()),
        _ => None,
    };
    let within = |min: u64, max: u64| {
        let number = plain.and_then(|text| text.parse().ok()).filter(|number| (min..=max).contains(number));
        number.ok_or(Refusal::Other)
    };
    match &key.kind {
        Kind::Whole { min, max, set, .. } => set(config, within(*min, *max)?),
        Kind::Milliseconds { min, max, set } => set(config, Duration::from_millis(within(*min, *max)?)),
        Kind::Seconds { min, max, set } => {
            let number = plain.and_then(decimal).filter(|number| (*min..=*max).contains(number));
            set(config, Duration::from_secs_f64(number.ok_or(Refusal::Other)?));
        }
        Kind::Flag { set } => match plain.map(str::to_ascii_lowercase).as_deref() {
            Some("true") => set(config, true),
            Some("false") => set(config, false),
            _ => return Err(Refusal::Other),
        },
        Kind::Path { set } => set(config, path(text, giver.folder, environment)?),
        Kind::Paths { entries_max, set } => {
            let paths = match given {
                Given::List(items) if (1..=*entries_max).contains(&items.len()) => {
                    paths(items, key, giver.folder, environment)?
                }
                Given::List(items) => {
                    let found = format!("expected {}, found {} entries", key.expected(), items.len());
                    return Err(Refusal::Because(found));
                }
                // A list that is not closed.
                _ if text.is_some_and(|text| text.starts_with('[')) => return Err(Refusal::Other),
                _ => vec![path(text, giver.folder, environment)?],
            };
            let nested = |path: &&PathBuf| paths.iter().any(|other| other != *path && lies_in(path, other));
            if let Some(inner) = paths.iter().find(nested) {
                let found = format!("expected folders outside of each other, found {} inside another", inner.display());
                return Err(Refusal::Because(found));
            }
            set(config, paths);
        }
        Kind::OptionalPath { set } => match given {
            Given::Null => set(config, None),
            _ => set(config, Some(path(text, giver.folder, environment)?)),
        },
        Kind::Text { nullable, set, .. } => match (given, text) {
            (Given::Null, _) if *nullable => set(config, None, giver)?,
            (_, Some(text)) => set(config, Some(text), giver)?,
            _ => return Err(Refusal::Other),
        },
        Kind::Texts { entries_max, chars_max, set } => {
            let Given::List(items) = given else { return Err(Refusal::Other) };
            let found = |what: String| Refusal::Because(format!("expected {}, found {what}", key.expected()));
            if items.len() > *entries_max {
                return Err(found(format!("{} entries", items.len())));
            }
            let fits = |text: &&String| (1..=*chars_max).contains(&text.chars().count());
            let mut texts = Vec::with_capacity(items.len());
            for (index, item) in items.iter().enumerate() {
                let text = item.as_ref().filter(fits);
                texts.push(text.ok_or_else(|| found(format!("another entry {}", index + 1)))?.clone());
            }
            set(config, texts);
        }
    }
    Ok(())
}

/// The paths of a list, each once: CLAUDE_CONFIG_DIR can make one of two.
fn paths(items: &[Option<String>], key: &Key, base: &Path, environment: &Environment) -> Result<Vec<PathBuf>, Refusal> {
    let mut paths: Vec<PathBuf> = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let located = path(item.as_deref(), base, environment).map_err(|refusal| match refusal {
            Refusal::Other => {
                Refusal::Because(format!("expected {}, found no path as entry {}", key.expected(), index + 1))
            }
            because => because,
        })?;
        if !paths.iter().any(|other| lies_in(&located, other) && lies_in(other, &located)) {
            paths.push(located);
        }
    }
    Ok(paths)
}

fn path(text: Option<&str>, base: &Path, environment: &Environment) -> Result<PathBuf, Refusal> {
    let text = text.filter(|text| !text.is_empty() && !text.contains('\0')).ok_or(Refusal::Other)?;
    environment.locate(text, base).map_err(|expected| Refusal::Because(format!("{expected}, found {text:?}")))
}

/// A number written with digits and at most one point: no exponents, no infinities.
fn decimal(text: &str) -> Option<f64> {
    text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.').then(|| text.parse().ok()).flatten()
}

/// Whether `text` can be a key: everything else may be a value that slipped, and is not shown.
fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
}

/// For messages: what stands in place of a mapping.
fn kind_of(node: &Node) -> &'static str {
    match node.value {
        Value::Scalar { .. } => "a single text (is there a space after the colon?)",
        Value::List(_) => "a list",
        Value::Mapping(_) => "a mapping",
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

/// Similarity from which a name is taken for a slip of the finger.
const NEAR: f64 = 0.6;

/// The one of `known` that is most like `name`, when it is like it at all.
pub(super) fn nearest<T>(name: &str, known: impl Iterator<Item = T>, text: impl Fn(&T) -> String) -> Option<T> {
    known
        .map(|candidate| (strsim::normalized_damerau_levenshtein(name, &text(&candidate)), candidate))
        .filter(|(similarity, _)| *similarity >= NEAR)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}

/// What to try in place of an unknown section.
fn nearest_section(name: &str) -> String {
    let lower = name.to_lowercase();
    if let Some(section) = nearest(&lower, SECTIONS.iter(), |section| section.name.to_owned()) {
        return format!("did you mean \"{}\"?", section.name);
    }
    // A key that stands outside of its section.
    if let Some(key) = KEYS.iter().find(|key| key.name == lower || key.path() == lower) {
        return format!("did you mean {} below \"{}:\"?", key.name, key.section);
    }
    let names: Vec<_> = SECTIONS.iter().map(|section| section.name).collect();
    format!("there are {}", names.join(", "))
}

/// What to try in place of an unknown key; `show` says how a key is called here.
fn nearest_key(section: &str, name: &str, show: impl Fn(&'static Key) -> String) -> String {
    let here = || KEYS.iter().filter(|key| key.section == section);
    let lower = name.to_lowercase();
    let found = here()
        .find(|key| key.name == lower)
        .or_else(|| KEYS.iter().find(|key| key.name == lower))
        .or_else(|| nearest(&lower, here(), |key| key.name.to_owned()))
        .or_else(|| nearest(&format!("{section}.{lower}"), KEYS.iter(), |key| key.path()));
    match found {
        Some(key) => format!("did you mean \"{}\"?", show(key)),
        None if here().next().is_some() => {
            format!("there are {}", here().map(show).collect::<Vec<_>>().join(", "))
        }
        None => "see config.yaml for all keys".to_owned(),
    }
}

/// For a user who asks for one key.
pub(super) fn unknown_key(key: &str) -> String {
    let (section, name) = key.split_once('.').unwrap_or(("", key));
    format!("unknown key {key:?}; {}", nearest_key(section, name, Key::path))
}

/// A configuration with nothing in it, to be filled from the table.
fn blank() -> Config {
    let (time, path) = (Duration::ZERO, PathBuf::new());
    Config {
        claude: ClaudeConfig { projects_paths: Vec::new() },
        file_watcher: FileWatcherConfig {
            polling_interval: time,
            inactivity_timeout: time,
            debounce_interval: time,
            max_line_bytes: 0,
        },
        event_system: EventSystemConfig {
            write_retry_attempts: 0,
            write_retry_delay: time,
            write_retry_max_delay: time,
            max_restarts_per_minute: 0,
            shutdown_timeout: time,
            max_event_bytes: 0,
        },
        database: DatabaseConfig {
            url: None,
            pool_size: 0,
            connect_timeout: time,
            statement_timeout: time,
            events_table: TableName { schema: None, table: String::new() },
            ledger_schema: String::new(),
            auto_migrate: false,
            notify_channel: None,
            host_name: None,
        },
        queue: QueueConfig { path: path.clone(), spool_path: path.clone(), max_pending_bytes: 0, drain_window: 0 },
        http: HttpConfig { listen: None, socket: path, token: None },
        schemas: SchemasConfig { path: None },
        hooks: HooksConfig { capture: HookCapture::Summary },
        redact: RedactConfig { enabled: false, patterns: Vec::new() },
    }
}
