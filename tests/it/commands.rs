//! The commands as a user types them: output, exit codes, and what they say when something is wrong.

use std::path::Path;

use crate::stage::{SOON, Server, Stage, wait_until};

#[test]
fn version_and_help_are_there_and_nonsense_is_a_usage_error() {
    let stage = Stage::with(None);
    let version = stage.run(&["--version"]);
    assert_eq!(
        (version.code(), version.output().trim()),
        (0, concat!("headspace-watcher ", env!("CARGO_PKG_VERSION")))
    );
    for command in ["run", "queue-dump", "status", "check", "migrate"] {
        let help = stage.run(&[command, "--help"]);
        assert_eq!(help.code(), 0);
        assert!(help.output().contains("Example"), "{}", help.output());
    }
    for arguments in [&["nonsense"][..], &["run", "--nonsense"], &[]] {
        assert_eq!(stage.run(arguments).code(), 64, "{arguments:?}");
    }
}

#[test]
fn the_queue_is_dumped_by_the_watcher_and_without_it_and_looking_changes_nothing() {
    let server = Server::start();
    let stage = Stage::with(Some(server.database.another()));
    server.stop("fast");
    let mut transcript = stage.transcript("-home-me-app", 1);
    let texts = transcript.say_many("a secret text", 300);
    let watcher = stage.start();
    wait_until("all is queued", SOON, || watcher.health()["queue"]["pending"] == 301);
    let from_watcher = stage.run(&["queue-dump"]).output();
    let payloads = stage.run(&["queue-dump", "--payload", "--type", "turn_detected"]).lines();
    watcher.stop();
    let from_folder = stage.run(&["queue-dump"]).output();
    assert_eq!(from_watcher, from_folder);
    assert_eq!(from_folder, stage.run(&["queue-dump"]).output());
    assert!(!from_folder.contains("secret"), "text is shown only when asked for");
    assert_eq!(payloads.iter().map(|line| line["payload"]["text"].as_str().unwrap()).collect::<Vec<_>>(), texts);
    let sequences: Vec<u64> =
        stage.run(&["queue-dump"]).lines().iter().map(|line| line["sequence"].as_u64().unwrap()).collect();
    assert!(sequences.is_sorted());
    let few = stage.run(&["queue-dump", "--after", &sequences[9].to_string(), "--limit", "5"]).lines();
    assert_eq!(few.iter().map(|line| line["sequence"].as_u64().unwrap()).collect::<Vec<_>>(), sequences[10..15]);
    assert_eq!(stage.run(&["queue-dump", "--session", &transcript.session]).lines().len(), 301);
    assert_eq!(stage.run(&["queue-dump", "--session", "another"]).lines().len(), 0);
    let table = stage.run(&["queue-dump", "--format", "table", "--limit", "1"]).output();
    assert!(table.contains("SEQUENCE") && table.contains("session_registered"), "{table}");
    assert_eq!(stage.run(&["status"]).code(), 3);
}

#[test]
fn status_tells_health_and_its_exit_code() {
    let stage = Stage::new();
    assert_eq!(stage.run(&["status"]).code(), 3);
    let watcher = stage.start();
    watcher.wait_for_log("database connected");
    let status = stage.run(&["status"]);
    assert_eq!(status.code(), 0);
    assert!(status.output().starts_with("status    pass\n"), "{}", status.output());
    let json = &stage.run(&["status", "--json"]).lines()[0];
    for field in ["status", "running", "pid", "version", "started_at", "uptime_seconds", "ready"] {
        assert!(!json[field].is_null(), "{field}: {json}");
    }
    assert_eq!(json["pid"], watcher.pid());
    let has = |section: &str, fields: &[&str]| {
        for field in fields {
            assert!(json[section].get(*field).is_some(), "{section}.{field}: {json}");
        }
    };
    has("queue", &["pending", "pending_bytes", "oldest_age_seconds", "dead_letters", "missing", "disk_bytes", "full"]);
    has("database", &["state", "since", "last_error"]);
    has("writes", &["succeeded", "failed", "duplicates", "last_write_timestamp"]);
    has("watcher", &["files", "sessions", "lines", "bad_lines", "last_rescan"]);
    assert_eq!(watcher.get("/livez").unwrap(), (200, "{\"ok\":true}".to_owned()));
    assert_eq!(watcher.get("/readyz").unwrap(), (200, "{\"ok\":true}".to_owned()));
}

#[test]
fn completions_name_every_command_also_where_the_configuration_is_wrong() {
    let stage = Stage::with(None);
    std::fs::write(stage.folder().join("config.yaml"), "nonsense: 1\n").unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let ran = stage.run(&["completions", shell]);
        assert_eq!(ran.code(), 0, "{}", ran.error());
        for command in ["run", "queue-dump", "status", "top", "check", "migrate"] {
            assert!(ran.output().contains(command), "{shell}: {command}");
        }
    }
    assert_eq!(stage.run(&["completions", "nonsense"]).code(), 64);
}

#[test]
fn check_finds_what_is_wrong_and_says_how_to_mend_it() {
    let mut stage = Stage::new();
    let fine = stage.run(&["check"]);
    assert_eq!(fine.code(), 0, "{}", fine.output());
    assert!(fine.output().contains("will be created at the start"), "{}", fine.output());
    stage.set("database.auto_migrate", "false");
    let missing = stage.run(&["check"]);
    assert_eq!(missing.code(), 78);
    assert!(missing.output().contains("headspace-watcher migrate"), "{}", missing.output());
    assert_eq!(stage.run(&["check", "--no-database"]).code(), 0);
    stage.set("schemas.path", "/nowhere");
    let schemas = stage.run(&["check", "--no-database"]);
    assert_eq!(schemas.code(), 78);
    assert!(schemas.output().contains("check schemas.path"), "{}", schemas.output());
}

#[test]
fn migrate_prints_the_sql_that_makes_what_it_makes() {
    let stage = Stage::new();
    let sql = stage.run(&["migrate", "--print"]).output();
    stage.database().query(&sql);
    let done = stage.run(&["migrate"]);
    assert_eq!((done.code(), done.output().trim()), (0, "nothing to do: everything is there"));
}

#[test]
fn a_wrong_configuration_is_an_error_with_file_line_key_and_the_nearest_known_one() {
    let stage = Stage::with(None);
    let file = stage.folder().join("config.yaml");
    std::fs::write(&file, "file_watcher:\n  polling_intervall: 2\n").unwrap();
    let ran = stage.run(&["check"]);
    assert_eq!(ran.code(), 78);
    let expected = "config.yaml:2: file_watcher.polling_intervall: unknown key; did you mean \"polling_interval\"?";
    assert!(ran.error().contains(expected), "{}", ran.error());
    assert_eq!(stage.run(&["--config", "/nowhere.yaml", "check"]).code(), 78);
}

#[test]
fn one_configuration_file_can_serve_claude_headspace_as_well() {
    let stage = Stage::with(None);
    let file = stage.folder().join("config.yaml");
    std::fs::write(&file, "server:\n  port: 5055\ndatabase:\n  host: db\nqueue:\n  drain_window: 2\n").unwrap();
    let ran = stage.run(&["check", "--no-database"]);
    assert_eq!(ran.code(), 0, "{}", ran.error());
    assert!(ran.output().contains("of another program, not used here: server, database.host"), "{}", ran.output());
}

#[test]
fn a_second_watcher_on_the_same_queue_is_refused_with_the_others_pid() {
    let mut stage = Stage::new();
    let watcher = stage.start();
    stage.set("http.socket", "data/other.sock");
    let ran = stage.run(&["run"]);
    assert_eq!(ran.code(), 69);
    assert!(ran.error().contains(&format!("held by process {}", watcher.pid())), "{}", ran.error());
}

#[test]
fn without_a_database_events_are_kept_and_health_says_so() {
    let stage = Stage::with(None);
    stage.transcript("-home-me-app", 1).say("hello");
    let watcher = stage.start();
    wait_until("the line is queued", SOON, || watcher.health()["queue"]["pending"] == 2);
    assert_eq!(watcher.health()["database"]["state"], "unconfigured");
    assert_eq!(watcher.stop().0.code(), Some(0));
    assert_eq!(stage.run(&["run", "--until-idle"]).code(), 78);
}

#[test]
fn config_get_prints_effective_values_as_the_watcher_has_them() {
    let mut stage = Stage::with(None);
    std::fs::write(
        stage.folder().join("config.yaml"),
        "database: {url: \"postgresql://me@db/x\"}\nqueue:\n  path: a queue\nredact:\n  patterns: ['a\\d', b]\n",
    )
    .unwrap();
    stage.set("event_system.max_restarts_per_minute", "7");
    let keys = [
        "database.url",
        "queue.path",
        "redact.patterns",
        "event_system.max_restarts_per_minute",
        "event_system.shutdown_timeout_seconds",
        "http.token",
        "redact.enabled",
    ];
    let got = stage.run(&[&["config", "get"][..], &keys].concat());
    let queue = stage.folder().join("a queue");
    let expected = format!("postgresql://me@db/x\n{}\n[\"a\\\\d\",\"b\"]\n7\n2\nnull\nfalse\n", queue.display());
    assert_eq!((got.code(), got.output()), (0, expected));

    let unknown = stage.run(&["config", "get", "queue.pth"]);
    assert_eq!(unknown.code(), 64);
    assert!(unknown.error().contains("unknown key \"queue.pth\"; did you mean \"queue.path\"?"), "{}", unknown.error());
    assert_eq!(stage.run(&["config", "get"]).code(), 64);

    std::fs::write(stage.folder().join("config.yaml"), "queue:\n  drain_window: many\n").unwrap();
    let wrong = stage.run(&["config", "get", "queue.path"]);
    assert_eq!((wrong.code(), wrong.output()), (78, String::new()));
    assert!(wrong.error().contains("queue.drain_window"), "{}", wrong.error());
}

#[test]
fn config_init_writes_a_file_that_is_right_and_never_overwrites_one() {
    let stage = Stage::with(None);
    let own = stage.folder().join("home/.config/headspace-watcher/config.yaml");
    let given = stage.folder().join("made/config.yaml");
    for (arguments, file) in
        [(vec!["config", "init"], &own), (vec!["--config", "made/config.yaml", "config", "init"], &given)]
    {
        let ran = stage.run(&arguments);
        assert!(ran.code() == 0 && ran.output().contains(file.to_str().unwrap()), "{}{}", ran.output(), ran.error());
        let mode = std::os::unix::fs::PermissionsExt::mode(&file.metadata().unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        std::fs::write(file, "redact:\n  enabled: true\n").unwrap();
        let again = stage.run(&arguments);
        assert!(again.code() == 78 && again.error().contains("left as it is"), "{}", again.error());
        assert_eq!(std::fs::read_to_string(file).unwrap(), "redact:\n  enabled: true\n");
        std::fs::remove_file(file).unwrap();
    }
    assert_eq!(stage.run(&["config", "init"]).code(), 0);
    // It says what the defaults are.
    let elsewhere = stage.folder().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    let show = || stage.run_in(&elsewhere, &["config", "show"]).output();
    let by_file = show();
    assert!(by_file.contains(&format!("{}:", own.display())), "{by_file}");
    std::fs::remove_file(&own).unwrap();
    let values = |text: &str| -> Vec<Vec<String>> {
        text.lines().map(|line| line.split_whitespace().take(2).map(str::to_owned).collect()).collect()
    };
    assert_eq!(values(&by_file), values(&show()));
}

#[test]
fn config_show_names_the_source_of_each_value_and_masks_secrets() {
    let mut stage = Stage::with(None);
    stage.set("database.url", "postgresql://me:hunter2@db/x").set("queue.max_pending_bytes", "4GiB");
    let shown = stage.run(&["config", "show"]).output();
    let line = |key: &str| -> Vec<String> {
        let line = shown.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().map(str::to_owned).collect()
    };
    assert!(!shown.contains("hunter2"), "{shown}");
    assert_eq!(line("database.url")[1..], ["***", "environment", "HEADSPACE_DATABASE__URL"]);
    assert_eq!(line("queue.max_pending_bytes")[1..3], ["4294967296", "environment"]);
    assert_eq!(line("http.listen")[1..], ["null", "config.yaml:6"]);
    assert_eq!(line("queue.drain_window")[1..], ["256", "default"]);
}

#[test]
fn without_a_configuration_the_watcher_and_every_command_meet_wherever_one_stands() {
    let mut stage = Stage::with(None);
    std::fs::remove_file(stage.folder().join("config.yaml")).unwrap();
    let projects = stage.projects().to_str().unwrap().to_owned();
    stage.set("claude.projects_path", &projects).set("http.listen", "null");
    stage.transcript("-home-me-app", 1).say("hello");
    let watcher = stage.start();
    let state = stage.state_folder();
    wait_until("it answers in another folder", SOON, || {
        let ran = stage.run_in(Path::new("/"), &["status", "--json"]);
        ran.code() == 0 && ran.output().contains("\"lines\":1")
    });
    let paths = stage.run_in(Path::new("/"), &["check", "--paths"]);
    assert_eq!(paths.code(), 0, "{}", paths.error());
    for path in ["queue", "spool", "watcher.sock"] {
        assert!(paths.output().contains(&format!("{}/{path}  (default)", state.display())), "{}", paths.output());
    }
    assert!(
        paths.output().contains("claude.projects_path") && paths.output().contains("HEADSPACE_CLAUDE__PROJECTS_PATH")
    );
    let queue = state.join("queue");
    assert!(queue.is_dir() && !stage.folder().join("data").exists());
    assert_eq!(watcher.stop().0.code(), Some(0));
}

#[test]
fn a_misspelt_variable_is_named_by_check_and_by_the_log_and_stops_nothing() {
    let mut stage = Stage::with(None);
    stage.environment.insert("HEADSPACE_QUEUE_PATH".to_owned(), "/nowhere".to_owned());
    let hint = "HEADSPACE_QUEUE_PATH sets nothing; did you mean HEADSPACE_QUEUE__PATH?";
    let checked = stage.run(&["check", "--no-database"]);
    assert!(checked.code() == 0 && checked.output().contains(hint), "{}", checked.output());
    let watcher = stage.start();
    assert!(watcher.log().contains(hint), "{}", watcher.log());
}
