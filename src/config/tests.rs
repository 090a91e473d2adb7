use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::load::in_bare_units;
use super::*;

/// A folder with a `config.yaml` of its own.
struct Desk {
    folder: tempfile::TempDir,
    variables: Vec<(OsString, OsString)>,
}

impl Desk {
    fn new() -> Self {
        Desk { folder: tempfile::tempdir().unwrap(), variables: vec![("HOME".into(), "/home/ada".into())] }
    }

    fn with(text: impl AsRef<[u8]>) -> Self {
        let desk = Desk::new();
        std::fs::write(desk.folder.path().join(CONFIG_FILE), text).unwrap();
        desk
    }

    fn set(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    fn path(&self, below: &str) -> PathBuf {
        self.folder.path().join(below)
    }

    fn environment(&self) -> Environment {
        Environment::new(self.folder.path(), self.variables.clone())
    }

    fn load(&self) -> Result<Loaded, ConfigError> {
        Config::load(None, &self.environment())
    }

    fn config(&self) -> Config {
        self.load().unwrap_or_else(|error| panic!("{error}")).config
    }

    /// The lines of the error.
    fn errors(&self) -> Vec<String> {
        self.load().unwrap_err().to_string().lines().map(str::to_owned).collect()
    }
}

/// Asserts that a file is refused with exactly these lines.
#[track_caller]
fn refuses(text: &str, expected: &[&str]) {
    assert_eq!(Desk::with(text).errors(), expected);
}

/// Asserts that a variable is refused with exactly this line.
#[track_caller]
fn refuses_variable(name: &str, value: &str, expected: &str) {
    assert_eq!(Desk::new().set(name, value).errors(), [format!("environment {name}: {expected}")]);
}

/// Asserts what is said of files. Each line of `cases` is a file, with `|` between its lines, and after `=>` the issues,
/// with ` && ` between them and `config.yaml:` left out.
#[track_caller]
fn refuses_each(cases: &str) {
    for case in cases.trim().lines() {
        let (file, issues) = case.trim().split_once(" => ").expect(case);
        let expected: Vec<String> = issues.split(" && ").map(|issue| format!("config.yaml:{issue}")).collect();
        assert_eq!(Desk::with(format!("{}\n", file.replace('|', "\n"))).errors(), expected, "{case}");
    }
}

#[test]
fn without_a_file_the_defaults_serve() {
    let desk = Desk::new();
    let loaded = desk.load().unwrap();
    assert!(loaded.file.is_none() && loaded.variables.is_empty() && loaded.unused.is_empty());
    let Config { claude, event_system, database, queue, http, .. } = loaded.config;
    assert_eq!(claude.projects_paths, [Path::new("/home/ada/.claude/projects")]);
    assert_eq!((event_system.write_retry_attempts, event_system.shutdown_timeout), (3, Duration::from_secs(2)));
    assert_eq!((database.url, database.events_table.quoted()), (None, r#""events""#.to_owned()));
    assert_eq!((queue.max_pending_bytes, http.listen), (4 << 30, Some("127.0.0.1:5056".parse().unwrap())));
}

/// A key as config.yaml documents it: `section.key`, its default, and the line above it.
fn documented() -> Vec<(String, String, String)> {
    let lines: Vec<&str> = include_str!("defaults.yaml").lines().collect();
    let mut section = "";
    let mut keys = Vec::new();
    for pair in lines.windows(2) {
        if let Some(name) = pair[1].strip_suffix(':').filter(|name| !name.starts_with(['#', ' '])) {
            section = name;
        } else if let Some((name, default)) = pair[1].strip_prefix("  ").and_then(|line| line.split_once(": "))
            && !name.starts_with('#')
        {
            keys.push((format!("{section}.{name}"), default.to_owned(), pair[0].to_owned()));
        }
    }
    keys
}

fn variable(path: &str) -> String {
    format!("HEADSPACE_{}", path.replace('.', "__").to_uppercase())
}

/// After a change of the defaults: `cp src/config/defaults.yaml config.yaml`.
#[test]
fn the_shipped_file_is_the_defaults() {
    assert_eq!(include_str!("../../config.yaml"), include_str!("defaults.yaml"));
    let desk = Desk::with(include_str!("../../config.yaml"));
    let by_file = desk.config();
    std::fs::write(desk.path(CONFIG_FILE), "").unwrap();
    assert_eq!(by_file, desk.config());
}

#[test]
fn the_shipped_file_says_the_range_that_is_enforced_above_each_key() {
    let keys = documented();
    assert_eq!(keys.len(), 32);
    for (path, default, line) in keys {
        let (section, name) = path.split_once('.').unwrap();
        let errors = Desk::with(format!("{section}:\n  {name}: {{}}\n")).errors();
        let enforced = errors[0].strip_prefix(&format!("config.yaml:2: {path}: expected ")).expect(&path);
        let enforced = enforced.strip_suffix(", found a section").expect(&path);
        assert_eq!(line.to_lowercase(), format!("  # {enforced}. default {default}.").to_lowercase());
    }
}

/// Loads with nothing but the key `path` set, to `value`, in the file and perhaps by its variable; what is said of it.
fn tried(path: &str, value: &str, by_variable: bool) -> Vec<String> {
    let (section, name) = path.split_once('.').unwrap();
    let file = Desk::with(format!("{section}:\n  {name}: {value}\n")).load();
    let own = |loaded: Result<Loaded, ConfigError>, prefix: &str| -> Vec<String> {
        let error = loaded.err().map(|error| error.to_string()).unwrap_or_default();
        // Other keys may have something to say about a value at the end of its range.
        let own = error.lines().filter(|line| !line.contains("not below"));
        own.map(|line| line.strip_prefix(prefix).expect(line).to_owned()).collect()
    };
    let file = own(file, &format!("config.yaml:2: {path}: "));
    if by_variable {
        let loaded = Desk::new().set(&variable(path), value).load();
        assert_eq!(file, own(loaded, &format!("environment {}: ", variable(path))), "{path} {value}");
    }
    file
}

#[test]
fn ranges_hold_at_both_ends_in_file_and_environment() {
    let mut tried_keys = 0;
    for (path, _, line) in documented() {
        let Some((kind, range)) = line.split_once(" from ") else { continue };
        let (min, max) = range.split_once(". Default").unwrap().0.split_once(" to ").unwrap();
        let max = max.split_once(',').map_or(max, |(max, _)| max);
        tried_keys += 1;
        assert_eq!((tried(&path, min, true), tried(&path, max, true)), (vec![], vec![]), "{path}");
        let step = if kind.contains("whole") { 1.0 } else { 0.01 };
        for wrong in [min.parse::<f64>().unwrap() - step, max.parse::<f64>().unwrap() + step] {
            let expected = line.trim_start_matches("  # A ").split_once(". Default").unwrap().0;
            assert_eq!(tried(&path, &wrong.to_string(), true), [format!("expected a {expected}, found {wrong}")]);
        }
    }
    assert_eq!(tried_keys, 15);
}

#[test]
fn values_land_in_their_fields() {
    let desk = Desk::with(
        "claude: {projects_path: /srv/projects}\n\
         codex: {sessions_path: /srv/sessions}\n\
         file_watcher: {polling_interval: 0.25, inactivity_timeout: 90.5, debounce_interval: .5,\n\
         \x20 max_line_bytes: 5000}\n\
         event_system: {write_retry_attempts: 4, write_retry_delay_ms: 7, write_retry_max_delay_ms: 70,\n\
         \x20 max_restarts_per_minute: 6, shutdown_timeout_seconds: 1.5, max_event_bytes: 2048}\n\
         database: {url: 'postgresql://ada@db/head', pool_size: 8, connect_timeout_ms: 20, statement_timeout_ms: 300,\n\
         \x20 events_table: log.events, ledger_schema: log, auto_migrate: false, notify_channel: news, host_name: pod-7}\n\
         queue: {path: q, spool_path: s, max_pending_bytes: 2000000, drain_window: 1}\n\
         http: {listen: 'localhost:80', socket: w.sock, token: sesame-open}\n\
         schemas: {path: schemas}\n\
         hooks: {capture: full}\n\
         redact: {enabled: true, patterns: ['a{1,2}', \"b\"]}\n",
    );
    let Config { claude, codex, file_watcher, event_system, database, queue, http, schemas, hooks, redact } =
        desk.config();
    assert_eq!(claude.projects_paths, [Path::new("/srv/projects")]);
    assert_eq!(codex.sessions_path, Some("/srv/sessions".into()));
    assert_eq!(file_watcher.polling_interval, Duration::from_millis(250));
    assert_eq!(file_watcher.inactivity_timeout, Duration::from_millis(90_500));
    assert_eq!(file_watcher.debounce_interval, Duration::from_millis(500));
    assert_eq!(file_watcher.max_line_bytes, 5000);
    assert_eq!((event_system.write_retry_attempts, event_system.max_restarts_per_minute), (4, 6));
    assert_eq!(event_system.write_retry_delay, Duration::from_millis(7));
    assert_eq!(event_system.write_retry_max_delay, Duration::from_millis(70));
    assert_eq!(event_system.shutdown_timeout, Duration::from_millis(1500));
    assert_eq!(event_system.max_event_bytes, 2048);
    assert_eq!(database.url.unwrap().text.reveal(), "postgresql://ada@db/head");
    assert_eq!((database.pool_size, database.auto_migrate), (8, false));
    assert_eq!(database.connect_timeout, Duration::from_millis(20));
    assert_eq!(database.statement_timeout, Duration::from_millis(300));
    assert_eq!(database.events_table.quoted(), r#""log"."events""#);
    assert_eq!(database.ledger_schema, "log");
    assert_eq!(database.notify_channel.as_deref(), Some("news"));
    assert_eq!(database.host_name.as_deref(), Some("pod-7"));
    assert_eq!((queue.path, queue.spool_path), (desk.path("q"), desk.path("s")));
    assert_eq!((queue.max_pending_bytes, queue.drain_window), (2_000_000, 1));
    assert_eq!(http.listen, Some("127.0.0.1:80".parse().unwrap()));
    assert_eq!(http.socket, desk.path("w.sock"));
    assert_eq!(http.token.unwrap().reveal(), "sesame-open");
    assert_eq!(schemas.path, Some(desk.path("schemas")));
    assert_eq!(hooks.capture, HookCapture::Full);
    assert_eq!((redact.enabled, redact.patterns), (true, vec!["a{1,2}".to_owned(), "b".to_owned()]));
}

#[test]
fn numbers_with_units_are_the_bare_ones() {
    for (key, given, bare) in [
        ("file_watcher.max_line_bytes", "64MiB", "67108864"),
        ("queue.max_pending_bytes", "1 TiB", "1099511627776"),
        ("event_system.max_event_bytes", "2048B", "2048"),
        ("file_watcher.inactivity_timeout", "90m", "5400"),
        ("file_watcher.inactivity_timeout", "7d", "604800"),
        ("file_watcher.polling_interval", "500ms", "0.5"),
        ("file_watcher.debounce_interval", "0s", "0"),
        ("event_system.shutdown_timeout_seconds", "1.5s", "1.5"),
        ("database.statement_timeout_ms", "0.5h", "1800000"),
        ("database.connect_timeout_ms", "20 ms", "20"),
    ] {
        let (section, name) = key.split_once('.').unwrap();
        let by_file = Desk::with(format!("{section}:\n  {name}: {given}\n")).load().unwrap();
        let by_variable = Desk::new().set(&variable(key), given).load().unwrap();
        assert_eq!((by_file.value(key).unwrap(), by_variable.value(key).unwrap()), (bare, bare), "{key}: {given}");
    }
}

#[test]
fn every_key_with_bytes_or_times_takes_units_and_no_other_does() {
    for (path, _, line) in documented() {
        let unit = if line.contains(" of bytes ") { "MiB" } else { "m" };
        let takes = in_bare_units(&path, &format!("1{unit}")).is_some();
        assert_eq!(takes, line.contains(", or with "), "{path}");
    }
}

#[test]
fn a_wrong_unit_is_told_as_it_was_given() {
    refuses_each(
        r#"
        queue:|  max_pending_bytes: 4GB => 2: queue.max_pending_bytes: expected a whole number of bytes from 1048576 to 1099511627776, or with KiB, MiB, GiB or TiB, found "4GB"
        queue:|  max_pending_bytes: 1KiB => 2: queue.max_pending_bytes: expected a whole number of bytes from 1048576 to 1099511627776, or with KiB, MiB, GiB or TiB, found "1KiB"
        queue:|  max_pending_bytes: 99999999999999TiB => 2: queue.max_pending_bytes: expected a whole number of bytes from 1048576 to 1099511627776, or with KiB, MiB, GiB or TiB, found "99999999999999TiB"
        database:|  connect_timeout_ms: 0.5ms => 2: database.connect_timeout_ms: expected a whole number of milliseconds from 10 to 60000, or with ms, s, m, h or d, found "0.5ms"
        database:|  pool_size: 2s => 2: database.pool_size: expected a whole number from 1 to 64, found "2s"
        "#,
    );
}

#[test]
fn a_misspelt_variable_is_named_with_the_nearest_and_those_of_others_are_not() {
    let desk = Desk::new()
        .set("HEADSPACE_QUEUE_PATH", "/srv/q")
        .set("HEADSPACE_DATABASE_ULR", "x")
        .set("HEADSPACE_WATCHER_BIN", "x")
        .set("HEADSPACE_CRASH_WINDOW_SECONDS", "60")
        .set("HEADSPACE_TEST_DATABASE_URL", "x")
        .set("HEADSPACE_SERVER_PORT", "x");
    assert_eq!(
        desk.load().unwrap().misspelt_variables,
        [
            "HEADSPACE_DATABASE_ULR sets nothing; did you mean HEADSPACE_DATABASE__URL?",
            "HEADSPACE_QUEUE_PATH sets nothing; did you mean HEADSPACE_QUEUE__PATH?"
        ]
    );
}

// Where things are.

#[test]
fn without_a_file_state_is_in_one_place_wherever_one_stands() {
    let usual = if cfg!(target_os = "macos") { "Library/Application Support" } else { ".local/state" };
    let home = Path::new("/home/ada").join(usual).join("headspace-watcher");
    for desk in [Desk::new(), Desk::new()] {
        let loaded = desk.load().unwrap();
        let Config { queue, http, .. } = &loaded.config;
        assert_eq!((&queue.path, &queue.spool_path), (&home.join("queue"), &home.join("spool")));
        assert_eq!((&http.socket, &loaded.state_folder), (&home.join("watcher.sock"), &home));
    }
    let moved = Desk::new().set("XDG_STATE_HOME", "/srv/state").load().unwrap();
    assert_eq!(moved.config.queue.path, Path::new("/srv/state/headspace-watcher/queue"));
    let relative = Desk::new().set("XDG_STATE_HOME", "state").load().unwrap();
    assert_eq!(relative.config.queue.path, home.join("queue"), "the specification has relative ones ignored");
}

#[test]
fn the_users_own_file_is_read_where_none_is_here_and_has_its_state_elsewhere() {
    let desk = Desk::new();
    let own = desk.path("xdg/headspace-watcher/config.yaml");
    std::fs::create_dir_all(own.parent().unwrap()).unwrap();
    std::fs::write(&own, "queue:\n  spool_path: mine\ndatabase:\n  pool_size: 3\n").unwrap();
    let folders = [("XDG_CONFIG_HOME", "xdg"), ("XDG_STATE_HOME", "state")];
    let desk = folders.iter().fold(desk, |desk, (name, folder)| {
        let folder = desk.path(folder);
        desk.set(name, folder)
    });
    let link = desk.path("link");
    std::os::unix::fs::symlink(desk.path("xdg"), &link).unwrap();
    let linked = link.join("headspace-watcher/config.yaml");
    for named in [None, Some(own.as_path()), Some(&linked)] {
        let loaded = Config::load(named, &desk.environment()).unwrap();
        assert_eq!(loaded.file.as_deref(), Some(named.unwrap_or(&own)));
        assert_eq!(loaded.config.queue.path, desk.path("state/headspace-watcher/queue"), "{named:?}");
        assert_eq!(loaded.config.queue.spool_path, named.unwrap_or(&own).with_file_name("mine"), "{named:?}");
        assert_eq!(loaded.values()["database.pool_size"].source, format!("{}:4", named.unwrap_or(&own).display()));
    }
    // One that is here comes first, and keeps its state beside it.
    std::fs::write(desk.path(CONFIG_FILE), "").unwrap();
    let loaded = desk.load().unwrap();
    assert_eq!(loaded.config.queue.path, desk.path("data/queue"));
    assert_eq!((loaded.state_folder, loaded.file), (desk.path("data"), Some(desk.path(CONFIG_FILE))));
}

// The file.

#[test]
fn empty_files_and_empty_sections_are_the_defaults() {
    let defaults = Desk::new();
    for text in ["", "\n", "# nothing\n", "---\n", "queue:\nhttp: null\n", "queue: {}\n", "\u{feff}queue:\n"] {
        let desk = Desk { folder: tempfile::tempdir_in(defaults.folder.path()).unwrap(), ..Desk::new() };
        std::fs::write(desk.path(CONFIG_FILE), text).unwrap();
        let config = desk.config();
        assert_eq!(config.queue.path, desk.path("data/queue"), "{text:?}");
        assert_eq!(config.event_system, defaults.config().event_system, "{text:?}");
        assert_eq!(desk.load().unwrap().file, Some(desk.path(CONFIG_FILE)));
    }
}

#[test]
fn a_file_that_is_named_must_exist() {
    let desk = Desk::new();
    let error = Config::load(Some(Path::new("other.yaml")), &desk.environment()).unwrap_err().to_string();
    assert!(error.starts_with("other.yaml: could not read the configuration: No such file"), "{error}");
}

#[test]
fn the_named_file_serves_instead_of_the_one_in_the_current_folder() {
    let desk = Desk::with("queue: {path: here}\n");
    std::fs::create_dir(desk.path("etc")).unwrap();
    std::fs::write(desk.path("etc/other.yaml"), "queue: {path: there}\n").unwrap();
    let loaded = Config::load(Some(Path::new("./etc/other.yaml")), &desk.environment()).unwrap();
    assert_eq!(loaded.file, Some(desk.path("etc/other.yaml")));
    // Relative to the file, also what the file leaves to its default.
    assert_eq!(loaded.config.queue.path, desk.path("etc/there"));
    assert_eq!(loaded.config.queue.spool_path, desk.path("etc/data/spool"));
}

#[test]
fn a_file_that_cannot_be_read_says_why() {
    fn make(what: &str, path: &Path) {
        match what {
            "a folder" => std::fs::create_dir(path).unwrap(),
            "a link to itself" => std::os::unix::fs::symlink("config.yaml", path).unwrap(),
            "a link to nowhere" => std::os::unix::fs::symlink("gone.yaml", path).unwrap(),
            _ => std::fs::write(path, vec![b'\n'; (1 << 20) + 1]).unwrap(),
        }
    }
    for (what, why) in [
        ("a folder", "it is a folder"),
        ("a link to itself", ""),
        ("a link to nowhere", "No such file"),
        ("a huge file", "it has more than 1048576 bytes"),
    ] {
        let desk = Desk::new();
        make(what, &desk.path(CONFIG_FILE));
        let errors = desk.errors();
        let expected = format!("config.yaml: could not read the configuration: {why}");
        assert!(errors.len() == 1 && errors[0].starts_with(&expected), "{what}: {errors:?}");
    }
}

#[test]
fn bytes_that_are_no_utf8_are_found_by_line() {
    let desk = Desk::with(b"queue:\n  path: caf\xe9\n");
    assert_eq!(desk.errors(), ["config.yaml:2: expected UTF-8 text, found other bytes; save the file as UTF-8"]);
}

#[test]
fn syntax_errors_name_line_and_column() {
    refuses("queue:\n\tpath: x\n", &["config.yaml:2:1: a tab indents this line; YAML wants spaces"]);
    let unclosed = Desk::with("queue:\n  path: \"x\n").errors();
    assert!(unclosed.len() == 1 && unclosed[0].starts_with("config.yaml:"), "{unclosed:?}");
}

#[test]
fn an_unknown_key_names_the_nearest() {
    refuses_each(
        r#"
        |||file_watcher:|  polling_intervall: 2 => 5: file_watcher.polling_intervall: unknown key; did you mean "polling_interval"?
        event_system:|  write_retry_delay: 1 => 2: event_system.write_retry_delay: unknown key; did you mean "write_retry_delay_ms"?
        queue:|  Path: x => 2: queue.Path: unknown key; did you mean "path"?
        queue:|  pool_size: 2 => 2: queue.pool_size: unknown key; did you mean "database.pool_size"?
        http:|  xyzzy: 2 => 2: http.xyzzy: unknown key; there are listen, socket, token
        "#,
    );
}

#[test]
fn a_misspelt_section_names_the_nearest() {
    refuses_each(
        r#"
        que:|  path: x => 1: que: unknown section; did you mean "queue"?
        databse:|  url: x => 1: databse: unknown section; did you mean "database"?
        pool_size: 3 => 1: pool_size: unknown section; did you mean pool_size below "database:"?
        queue.path: x => 1: queue.path: unknown section; did you mean path below "queue:"?
        "#,
    );
}

#[test]
fn sections_and_keys_of_claude_headspace_are_accepted_and_named() {
    let names = "server logging sse notifications activity commander tmux_bridge openrouter progress_summary \
                 brain_reboot dashboard reaper archive voice_bridge";
    let others: String = names.split_whitespace().map(|name| format!("{name}:\n  enabled: [x]\n")).collect();
    let desk = Desk::with(format!(
        "database:\n  host: db\n  port: 5432\n  name: x\n  user: x\n  password: x\n  pool_size: 10\n  pool_timeout: 30\n\
         file_watcher:\n  reconciliation_interval: 60\n  awaiting_input_timeout: 10\n\
         hooks:\n  enabled: true\n  polling_interval_with_hooks: 60\n  fallback_timeout: 300\n{others}"
    ));
    let loaded = desk.load().unwrap();
    assert_eq!(loaded.config.database.pool_size, 10);
    assert_eq!(loaded.unused.len(), 11 + names.split_whitespace().count());
    assert!(loaded.unused.contains(&"database.host".to_owned()) && loaded.unused.contains(&"server".to_owned()));
    // Another section does not have these keys.
    refuses("queue:\n  name: x\n", &["config.yaml:2: queue.name: unknown key; did you mean \"path\"?"]);
}

#[test]
fn keys_and_sections_stand_once() {
    refuses_each(
        r#"
        queue:|  path: a|  drain_window: 1|  path: b => 4: queue.path: expected once, found it again: it is already on line 2
        queue:|  path: a|http:|queue:|  path: b => 4: queue: expected once, found it again: it is already on line 1 && 5: queue.path: expected once, found it again: it is already on line 2
        "#,
    );
}

#[test]
fn what_is_no_mapping_is_named() {
    refuses_each(
        r#"
        - a => 1: expected sections such as "queue:", found a list
        queue => 1: expected sections such as "queue:", found a single text (is there a space after the colon?)
        queue: 3 => 1: queue: expected keys with values below it, found a single text (is there a space after the colon?)
        queue:|  - a => 2: queue: expected keys with values below it, found a list
        [a]: 1|queue:|  {b: 1}: 2 => 1: expected a name made of letters, digits and _, then a colon and a space && 3: queue: expected a name made of letters, digits and _, then a colon and a space
        "#,
    );
}

#[test]
fn wrong_values_say_what_was_expected_and_found() {
    for (key, expected, found) in [
        (
            "database.pool_size",
            "a whole number from 1 to 64",
            r#" => nothing;null => nothing;~ => nothing;0 => 0;65 => 65;-1 => -1;2.0 => 2.0;0x10 => "0x10";1e1 => 1e1;
            99999999999999999999 => 99999999999999999999;true => "true";[1] => a list of length 1;{a: 1} => a section;
            "a\nb" => "a\nb";xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx => a text of 70 characters"#,
        ),
        (
            "file_watcher.polling_interval",
            "a number of seconds from 0.05 to 3600, or with ms, s, m, h or d",
            r#"2x => "2x";2S => "2S";s => "s";10ms => "10ms";2h => "2h";1e2s => "1e2s";-2s => "-2s";-2 => -2;.inf => ".inf";inf => "inf";.nan => ".nan";1e2 => 1e2"#,
        ),
        ("redact.enabled", "true or false", r#"yes => "yes";1 => 1;on => "on""#),
        ("queue.path", "a path", r#" => nothing;'' => "";[a] => a list of length 1"#),
        ("schemas.path", "a path, or null", "[a] => a list of length 1"),
        ("hooks.capture", "summary or full", r#"all => "all""#),
        ("http.listen", "an address with a port, like 127.0.0.1:5056, or null", "5056 => 5056"),
        (
            "database.events_table",
            "a name of a table, or schema.table, each of 1 to 63 bytes",
            r#"a.b.c => "a.b.c";null => nothing"#,
        ),
        ("database.notify_channel", "a name of 1 to 63 bytes, or null", r#"'' => """#),
        ("database.host_name", "a name of 1 to 253 bytes, or null", r#"'' => """#),
        (
            "redact.patterns",
            "a list of at most 100 texts of 1 to 1000 characters",
            r#"a => "a";[a, [b]] => a list whose entry 2 is no text"#,
        ),
    ] {
        for case in found.split(';') {
            let (value, found) = case.trim_start_matches(['\n', ' ']).split_once("=> ").unwrap();
            assert_eq!(tried(key, value.trim_end(), false), [format!("expected {expected}, found {found}")], "{case}");
        }
    }
    let many = tried("redact.patterns", &format!("[{}]", vec!["a"; 101].join(",")), true);
    assert!(many[0].ends_with("found a list of length 101"), "{many:?}");
}

#[test]
fn all_mistakes_are_told_at_once_in_the_order_of_the_file() {
    let desk = Desk::with("http:\n  token: x\nqueue:\n  drain_window: 0\n  pth: x\nquue: 1\n")
        .set("HEADSPACE_DATABASE__POOL_SIZE", "many");
    assert_eq!(
        desk.errors(),
        [
            "config.yaml:2: http.token: expected 8 to 256 visible ASCII characters without spaces, or null, found \
             something else (not shown: it may be secret)",
            "config.yaml:4: queue.drain_window: expected a whole number from 1 to 4096, found 0",
            "config.yaml:5: queue.pth: unknown key; did you mean \"path\"?",
            "config.yaml:6: quue: unknown section; did you mean \"queue\"?",
            "environment HEADSPACE_DATABASE__POOL_SIZE: expected a whole number from 1 to 64, found \"many\"",
        ]
    );
}

// The environment.

#[test]
fn every_key_has_an_environment_override() {
    let desk = Desk::with("queue:\n  path: from-file\n").set("HEADSPACE_QUEUE__PATH", "from-environment");
    let loaded = desk.load().unwrap();
    assert_eq!(loaded.config.queue.path, desk.path("from-environment"));
    assert_eq!(loaded.variables, ["HEADSPACE_QUEUE__PATH"]);
    for (path, default, _) in documented() {
        let desk = Desk::with("").set(&variable(&path), default);
        assert_eq!(
            desk.config(),
            Desk { variables: vec![("HOME".into(), "/home/ada".into())], ..desk }.config(),
            "{path}"
        );
    }
}

#[test]
fn an_empty_variable_is_null_where_null_may_be() {
    let nullable = ["DATABASE__URL", "DATABASE__NOTIFY_CHANNEL", "HTTP__LISTEN", "HTTP__TOKEN", "SCHEMAS__PATH"];
    let text = "database: {url: postgresql://a@b/c, notify_channel: x}\nhttp: {token: 12345678}\nschemas: {path: x}\n";
    let desk = nullable.iter().fold(Desk::with(text), |desk, name| desk.set(&format!("HEADSPACE_{name}"), ""));
    let config = desk.config();
    assert_eq!((config.database.url, config.database.notify_channel), (None, None));
    assert_eq!((config.http.listen, config.http.token, config.schemas.path), (None, None, None));
    refuses_variable("HEADSPACE_DATABASE__POOL_SIZE", "", "expected a whole number from 1 to 64, found nothing");
    refuses_variable("HEADSPACE_QUEUE__PATH", "", "expected a path, found nothing");
}

#[test]
fn lists_in_the_environment_stand_with_commas_or_as_in_yaml() {
    for (value, expected) in [
        ("", vec![]),
        ("a", vec!["a"]),
        ("a, b,c", vec!["a", "b", "c"]),
        ("[]", vec![]),
        (r#"['a{1,2}', "b"]"#, vec!["a{1,2}", "b"]),
    ] {
        assert_eq!(Desk::new().set("HEADSPACE_REDACT__PATTERNS", value).config().redact.patterns, expected, "{value}");
    }
    refuses_variable(
        "HEADSPACE_REDACT__PATTERNS",
        "[a",
        "expected a list of at most 100 texts of 1 to 1000 characters, \
         found \"[a\"",
    );
}

#[test]
fn an_unknown_variable_names_the_nearest() {
    for (name, near) in [
        ("HEADSPACE_QUEUE__PTH", "HEADSPACE_QUEUE__PATH"),
        ("HEADSPACE_QUEUES__DRAIN_WINDOW", "HEADSPACE_QUEUE__DRAIN_WINDOW"),
        ("HEADSPACE_QUEUE__POOL_SIZE", "HEADSPACE_DATABASE__POOL_SIZE"),
        ("HEADSPACE_queue__path", "HEADSPACE_QUEUE__PATH"),
    ] {
        refuses_variable(name, "x", &format!("no key has this variable; did you mean \"{near}\"?"));
    }
    refuses_variable("HEADSPACE_FOO__BAR", "x", "no key has this variable; see config.yaml for all keys");
}

#[test]
fn variables_without_two_underscores_are_left_alone() {
    let desk = Desk::new().set("HEADSPACE_HOME", "x").set("HEADSPACE_CONFIG", "y").set("HEADSPACEX__Y", "z");
    assert!(desk.load().unwrap().variables.is_empty());
}

#[test]
fn variables_that_are_no_text_are_refused() {
    let desk = Desk::new().set("HEADSPACE_QUEUE__PATH", OsString::from_vec(vec![b'a', 0xe9]));
    assert_eq!(desk.errors(), ["environment HEADSPACE_QUEUE__PATH: expected UTF-8 text, found other bytes"]);
}

// Paths.

#[test]
fn home_is_expanded_at_the_start_of_a_path_only() {
    let desk = Desk::with("queue: {path: '~/q', spool_path: a/~/b}\nschemas: {path: '~'}\n");
    let config = desk.config();
    assert_eq!(config.queue.path, Path::new("/home/ada/q"));
    assert_eq!(config.queue.spool_path, desk.path("a/~/b"));
    assert_eq!(config.schemas.path.as_deref(), Some(Path::new("/home/ada")));
    refuses(
        "queue:\n  path: ~bob/q\n",
        &["config.yaml:2: queue.path: expected the folder written out: only ~ and ~/ are expanded, found \"~bob/q\""],
    );
}

#[test]
fn without_a_home_the_tilde_is_refused_where_it_stands() {
    let desk = Desk { variables: Vec::new(), ..Desk::with("queue:\n  path: ~/q\n") };
    let expected = "expected an absolute path: HOME is not set, so ~ means nothing, found";
    assert_eq!(
        desk.errors(),
        [
            format!("config.yaml:2: queue.path: {expected} \"~/q\""),
            format!("built-in default: claude.projects_path: {expected} \"~/.claude/projects\""),
        ]
    );
    let desk = Desk { variables: Vec::new(), ..Desk::with("claude:\n  projects_path: /p\n") };
    assert_eq!(desk.config().claude.projects_paths, [Path::new("/p")]);
}

#[test]
fn codex_home_moves_what_lies_in_the_codex_folder_and_without_a_home_there_is_none() {
    let sessions = |desk: Desk| desk.config().codex.sessions_path;
    assert_eq!(sessions(Desk::new()), Some("/home/ada/.codex/sessions".into()));
    assert_eq!(sessions(Desk::new().set("CODEX_HOME", "/srv/codex")), Some("/srv/codex/sessions".into()));
    assert_eq!(sessions(Desk::with("codex: {sessions_path: null}\n")), None);
    assert_eq!(sessions(Desk { variables: Vec::new(), ..Desk::with("claude:\n  projects_path: /p\n") }), None);
}

#[test]
fn claude_config_dir_moves_what_lies_in_the_claude_folder() {
    let moved = |text: &str| Desk::with(text).set("CLAUDE_CONFIG_DIR", "/srv/claude").config().claude.projects_paths;
    assert_eq!(moved(""), [Path::new("/srv/claude/projects")]);
    assert_eq!(moved("claude: {projects_path: ~/.claude/projects}\n"), [Path::new("/srv/claude/projects")]);
    assert_eq!(moved("claude: {projects_path: ~/.claude/}\n"), [Path::new("/srv/claude")]);
    assert_eq!(moved("claude: {projects_path: ~/.claude-2/projects}\n"), [Path::new("/home/ada/.claude-2/projects")]);
    assert_eq!(moved("claude: {projects_path: /other}\n"), [Path::new("/other")]);
    let desk = Desk::new().set("CLAUDE_CONFIG_DIR", "/srv/claude").set("HEADSPACE_CLAUDE__PROJECTS_PATH", "/other");
    assert_eq!(desk.config().claude.projects_paths, [Path::new("/other")]);
    // Also where there is no home at all.
    let desk = Desk { variables: Vec::new(), ..Desk::with("") }.set("CLAUDE_CONFIG_DIR", "claude");
    assert_eq!(desk.config().claude.projects_paths, [desk.path("claude/projects")]);
    assert_eq!(desk.environment().claude_folder(), Some(desk.path("claude")));
    assert_eq!(
        Desk::new().set("CLAUDE_CONFIG_DIR", "").config().claude.projects_paths,
        [Path::new("/home/ada/.claude/projects")]
    );
}

#[test]
fn transcripts_may_lie_in_several_folders() {
    let paths = |text: &str| Desk::with(text).config().claude.projects_paths;
    let two = [Path::new("/home/ada/.claude/projects"), Path::new("/srv/work/projects")];
    assert_eq!(paths("claude:\n  projects_path:\n    - ~/.claude/projects\n    - /srv/work/projects\n"), two);
    assert_eq!(paths("claude: {projects_path: [~/.claude/projects, /srv/work/projects, /srv/work/projects]}\n"), two);
    let desk = Desk::new().set("HEADSPACE_CLAUDE__PROJECTS_PATH", "[\"~/.claude/projects\", /srv/work/projects]");
    assert_eq!(desk.config().claude.projects_paths, two);
    // Named again behind another, it is followed once, and shown once.
    let desk = Desk::with("claude: {projects_path: [/srv/work/projects, ~/.claude/projects, /srv/work/projects]}\n");
    let loaded = desk.load().unwrap();
    assert_eq!(loaded.value("claude.projects_path").unwrap(), r#"["/srv/work/projects","/home/ada/.claude/projects"]"#);
    // However the same folder is spelt.
    assert_eq!(paths("claude: {projects_path: [/srv/work/../work/projects, /srv/work/projects]}\n").len(), 1);
    // In a variable a comma is part of the path.
    let desk = Desk::new().set("HEADSPACE_CLAUDE__PROJECTS_PATH", "/a,b");
    assert_eq!(desk.config().claude.projects_paths, [Path::new("/a,b")]);
    // CLAUDE_CONFIG_DIR can make one of two.
    let desk = Desk::with("claude: {projects_path: [~/.claude/projects, /srv/claude/projects]}\n")
        .set("CLAUDE_CONFIG_DIR", "/srv/claude");
    assert_eq!(desk.config().claude.projects_paths, [Path::new("/srv/claude/projects")]);
}

#[test]
fn folders_of_transcripts_do_not_lie_in_each_other() {
    for (list, message) in [
        ("[/p, /p/q]", "expected folders outside of each other, found /p/q inside another"),
        ("[/p/q, /r, /q/../p]", "expected folders outside of each other, found /p/q inside another"),
        ("[]", "expected a path or a list of 1 to 16 paths, found a list of length 0"),
        ("[/p, {a: b}]", "expected a path or a list of 1 to 16 paths, found a list whose entry 2 is no text"),
        ("{a: b}", "expected a path or a list of 1 to 16 paths, found a section"),
    ] {
        assert_eq!(tried("claude.projects_path", list, false), [message]);
    }
    let desk = Desk::new().set("HEADSPACE_CLAUDE__PROJECTS_PATH", "[\"/p\", ");
    assert!(desk.errors()[0].contains("expected a path or a list of 1 to 16 paths, found"), "{:?}", desk.errors());
}

// Keys together.

#[test]
fn bounds_that_depend_on_another_key_hold() {
    // The key that was given is the one to fix.
    refuses_each(
        r#"
        event_system:|  write_retry_max_delay_ms: 50 => 2: event_system.write_retry_max_delay_ms: expected event_system.write_retry_max_delay_ms not below event_system.write_retry_delay_ms, found 50 below 100
        event_system:|  write_retry_delay_ms: 2001 => 2: event_system.write_retry_delay_ms: expected event_system.write_retry_max_delay_ms not below event_system.write_retry_delay_ms, found 2000 below 2001
        file_watcher:|  inactivity_timeout: 1.5 => 2: file_watcher.inactivity_timeout: expected file_watcher.inactivity_timeout not below file_watcher.polling_interval, found 1.5 below 2
        queue:|  max_pending_bytes: 1048576 => 2: queue.max_pending_bytes: expected queue.max_pending_bytes not below event_system.max_event_bytes, found 1048576 below 16777216
        "#,
    );
}

#[test]
fn a_wrong_override_is_the_only_complaint_about_its_key() {
    let desk = Desk::with("event_system:\n  write_retry_max_delay_ms: 50\n")
        .set("HEADSPACE_EVENT_SYSTEM__WRITE_RETRY_MAX_DELAY_MS", "x");
    assert_eq!(
        desk.errors(),
        ["environment HEADSPACE_EVENT_SYSTEM__WRITE_RETRY_MAX_DELAY_MS: expected a whole number of milliseconds from \
             1 to 600000, or with ms, s, m, h or d, found \"x\""]
    );
}

#[test]
fn queue_spool_and_socket_do_not_lie_in_each_other() {
    for (text, expected) in [
        ("queue: {path: a, spool_path: a}", "expected queue.spool_path outside of queue.path, found "),
        ("queue: {path: a, spool_path: a/b/../../a/b}", "expected queue.spool_path outside of queue.path, found "),
        ("queue: {path: a/q, spool_path: a}", "expected queue.path outside of queue.spool_path, found "),
        ("queue: {path: a}\nhttp: {socket: a/s}", "expected http.socket outside of queue.path, found "),
        ("queue: {spool_path: a}\nhttp: {socket: a/s}", "expected http.socket outside of queue.spool_path, found "),
    ] {
        let errors = Desk::with(text).errors();
        assert!(errors.len() == 1 && errors[0].contains(expected), "{errors:?}");
    }
}

#[test]
fn listening_beyond_loopback_needs_a_token() {
    for address in ["0.0.0.0:80", "192.168.1.2:80", "'[::]:80'", "'[::ffff:10.0.0.1]:80'"] {
        refuses(
            &format!("http:\n  listen: {address}\n"),
            &["config.yaml:2: http.listen: expected a loopback address such as 127.0.0.1:5056 while http.token \
               is null: to listen beyond this machine, set http.token (HEADSPACE_HTTP__TOKEN); the generated \
               token serves on loopback only"],
        );
        Desk::with(format!("http: {{listen: {address}, token: 12345678}}\n")).config();
    }
    for address in ["127.0.0.1:80", "127.1.2.3:80", "'[::1]:80'", "'[::ffff:127.0.0.1]:80'", "localhost:80", "null"] {
        Desk::with(format!("http: {{listen: {address}}}\n")).config();
    }
}

#[test]
fn a_socket_path_that_no_socket_can_have_is_refused() {
    let long = format!("/{}", "s".repeat(120));
    let errors = Desk::with(format!("http:\n  socket: {long}\n")).errors();
    assert_eq!(errors.len(), 1);
    assert!(errors[0].starts_with("config.yaml:2: http.socket: expected a path of at most 10"), "{errors:?}");
    assert!(errors[0].contains(&format!("found 121: {long}")), "{errors:?}");
}

// Secrets.

#[test]
fn no_error_shows_a_secret() {
    let secret = "hunter2";
    for text in [
        "database:\n  url: mysql://ada:hunter2@db/x\n",
        "database:\n  url: hunter2\n",
        "database:\n  url: [postgresql://ada:hunter2@db/x]\n",
        "database:\n  url: {postgresql://ada:hunter2@db/x: 1}\n",
        "database:\n  url: postgresql://ada:hunter2/x@db/x\n",
        "database:\n  url: postgresql://ada:p?hunter2=x@db/x\n",
        "database:\n  url: 'password=pass hunter2=x'\n",
        "database:\n  url: 'password=pass port=hunter2'\n",
        "database:\n  url:postgresql://ada:hunter2@db/x\n",
        "database:\n  {url:postgresql://ada:hunter2@db/x, pool_size: 2}\n",
        "database:url:postgresql://ada:hunter2@db/x\n",
        "database:\n  url: &hunter2\n",
        "database:\n  url: *hunter2\n",
        "database:\n  url: !hunter2\n",
        "database:\n  pool_size: postgresql://ada:hunter2@db/x\n",
        "http:\n  token: hunter2\n",
        "http:\n  token: [hunter2]\n",
        "http:\n  token: 'hunter2\n",
        "http:\n  token: @hunter2\n",
        "http:\n  token: \"\\hunter2\"\n",
    ] {
        let error = Desk::with(text).load().expect_err(text);
        assert!(!format!("{error} {error:?}").contains(secret), "{error}");
        assert!(error.to_string().starts_with("config.yaml:"), "{error}");
    }
    for name in ["HEADSPACE_DATABASE__URL", "HEADSPACE_HTTP__TOKEN", "HEADSPACE_DATABASE__PASSWORD"] {
        let error = Desk::new().set(name, secret).load().unwrap_err();
        assert!(!format!("{error} {error:?}").contains(secret), "{error}");
    }
}

#[test]
fn debug_shows_no_secret() {
    let desk = Desk::with("database: {url: 'postgresql://ada:hunter2@db/x'}\nhttp: {token: hunter2hunter2}\n")
        .set("PGPASSWORD", "hunter2");
    let shown = format!("{:?} {:?}", desk.load().unwrap(), desk.environment());
    assert!(!shown.contains("hunter2"), "{shown}");
    assert_eq!(format!("{0} {0:?}", Secret::new("hunter2")), "*** ***");
}

#[test]
fn a_secret_matches_itself_alone() {
    let secret = Secret::new("hunter22");
    assert!(secret.matches("hunter22"));
    for other in ["", "hunter2", "hunter222", "hunter23", "Hunter22"] {
        assert!(!secret.matches(other), "{other}");
    }
}

// Names of tables.

#[test]
fn table_names_are_quoted_for_sql() {
    for (text, quoted) in [
        ("events", r#""events""#),
        ("log.events", r#""log"."events""#),
        ("Log.Events", r#""Log"."Events""#),
        (r#""a.b".c"#, r#""a.b"."c""#),
        (r#""a""b""#, r#""a""b""#),
        (r#"x;drop"#, r#""x;drop""#),
        ("ereignisse_ä", r#""ereignisse_ä""#),
    ] {
        assert_eq!(TableName::parse(text).unwrap().quoted(), quoted, "{text}");
    }
    let long = "x".repeat(64);
    for text in ["", ".", "a.", ".a", "a.b.c", "a b", r#"a"b"#, r#""a"#, r#""a"b"#, r#""""#, long.as_str(), "\"a\0\""] {
        assert_eq!(TableName::parse(text), None, "{text}");
    }
}

#[test]
fn lenient_loading_keeps_right_keys_and_replaces_wrong_ones_by_defaults() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("c.yaml");
    let environment = Environment::new(folder.path(), [("HOME", "/home/me")]);
    for (text, spool, whole) in [
        ("queue:\n  spool_path: other\n", "other", true),
        ("queue:\n  spool_path: other\n  drain_window: many\nnonsense: 1\n", "other", false),
        ("queue:\n  spool_path: ~bob/x\n", "data/spool", false),
        ("queue:\n  spool_path: [1]\n", "data/spool", false),
        ("queue: {\n", "data/spool", false),
    ] {
        std::fs::write(&file, text).unwrap();
        let (loaded, is_whole) = Config::load_leniently(Some(&file), &environment);
        assert_eq!((loaded.config.queue.spool_path, is_whole), (folder.path().join(spool), whole), "{text}");
        assert_eq!(loaded.config.queue.drain_window, 256);
        assert_eq!(Config::load(Some(&file), &environment).is_ok(), whole);
    }
}
