//! `check` finds what is wrong before anybody else does, and names the way out.

use serde_json::json;

use crate::stage::{Database, Stage, unique};

/// The line about a subject that holds `text`, or the test fails with all of it.
#[track_caller]
fn assert_says(stage: &Stage, code: i32, mark: &str, text: &str) {
    let without_database: &[&str] = if stage.database.is_none() { &["--no-database"] } else { &[] };
    let ran = stage.run(&[&["check"], without_database].concat());
    let found = ran.output().lines().any(|line| line.starts_with(mark) && line.contains(text));
    assert!(found, "no line \"{mark}\" with \"{text}\": {}", ran.output());
    assert_eq!(ran.code(), code, "{}", ran.output());
}

#[test]
fn a_sound_set_up_is_fine_in_every_part() {
    let stage = Stage::new();
    let ran = stage.run(&["check"]);
    assert_eq!(ran.code(), 0, "{}", ran.output());
    for subject in ["configuration", "schemas", "transcripts", "notifications", "hooks", "queue", "disk", "database"] {
        assert!(ran.output().lines().any(|line| line.contains(subject)), "{subject}: {}", ran.output());
    }
    assert!(!ran.output().contains("WRONG"), "{}", ran.output());
    let watcher = stage.start();
    assert_says(&stage, 0, "ok", &format!("held by the running watcher, process {}", watcher.pid()));
}

#[test]
fn hooks_that_are_missing_or_point_elsewhere_are_found() {
    let stage = Stage::with(None);
    assert_says(&stage, 0, "note", "hooks install");
    let folder = stage.folder().join("home/.claude");
    std::fs::create_dir(&folder).unwrap();
    let settings = folder.join("settings.json");
    let write = |command: &str| {
        let hooks = json!({"hooks": {"Stop": [{"hooks": [{"type": "command", "command": command}]}]}});
        std::fs::write(&settings, hooks.to_string()).unwrap();
    };
    write("echo hello");
    assert_says(&stage, 0, "note", "none of ");
    write("/gone/headspace-watcher hook");
    assert_says(&stage, 78, "WRONG", "calls /gone/headspace-watcher");
    write(&format!("'{}' hook", env!("CARGO_BIN_EXE_headspace-watcher")));
    assert_says(&stage, 0, "note", "call this program, none at SessionStart, ");
    assert_eq!(stage.run(&["hooks", "install"]).code(), 0);
    assert_says(&stage, 0, "ok", "call this program");
    let all = std::fs::read_to_string(&settings).unwrap();
    std::fs::write(&settings, all.replacen('{', "{\"disableAllHooks\": true,", 1)).unwrap();
    assert_says(&stage, 0, "note", "none of them runs");
    std::fs::write(&settings, "{").unwrap();
    assert_says(&stage, 78, "WRONG", "could not be read as JSON");
}

#[test]
fn a_pattern_that_makes_redaction_slow_is_noted() {
    let mut stage = Stage::with(None);
    stage.set("redact.enabled", "true").set("redact.patterns", r"['\bACME-\d+']");
    assert_says(&stage, 0, "note", r"write (?-u:\b)");
    stage.set("redact.patterns", r"['(?-u:\b)ACME-\d+']");
    assert_says(&stage, 0, "ok", "1 patterns beside the built-in ones");
}

#[test]
fn a_queue_held_by_a_watcher_that_does_not_listen_there_is_found() {
    let mut stage = Stage::with(None);
    let watcher = stage.start();
    stage.set("http.socket", "data/other.sock");
    assert_says(&stage, 78, "WRONG", &format!("held by process {}", watcher.pid()));
}

#[test]
fn a_transcripts_folder_that_is_a_file_is_found() {
    let stage = Stage::with(None);
    std::fs::remove_dir(stage.projects()).unwrap();
    std::fs::write(stage.projects(), "").unwrap();
    assert_says(&stage, 78, "WRONG", "set claude.projects_path");
}

#[test]
fn a_database_that_can_not_be_used_is_found() {
    let mut stage = Stage::new();
    let owner = stage.database().clone();
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    let role = format!("reader_{}", unique());
    owner.query(&format!("CREATE ROLE {role} LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}"));
    let on_ledger = |right: &str| owner.query(&format!("GRANT {right} TO {role}"));
    let (server, parameters) = owner.url.split_once('?').unwrap();
    let parameters: Vec<&str> = parameters.split('&').filter(|parameter| !parameter.starts_with("user=")).collect();
    stage.database = Some(Database::at(format!("{server}?{}&user={role}", parameters.join("&"))));
    assert_says(&stage, 78, "WRONG", "permission denied for schema headspace_watcher");
    on_ledger("USAGE ON SCHEMA headspace_watcher");
    let lacks = "lacks INSERT on events, INSERT on headspace_watcher.event_receipts";
    assert_says(&stage, 78, "WRONG", lacks);
    let lacks = "USAGE on public.events_id_seq, USAGE on headspace_watcher.event_sources_id_seq; GRANT it";
    assert_says(&stage, 78, "WRONG", lacks);
    on_ledger("ALL ON ALL TABLES IN SCHEMA headspace_watcher");
    on_ledger("USAGE ON ALL SEQUENCES IN SCHEMA headspace_watcher");
    owner.query(&format!("GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}"));
    assert_says(&stage, 78, "WRONG", "lacks USAGE on public.events_id_seq");
    owner.query(&format!("GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {role}"));
    assert_says(&stage, 0, "ok", "the tables are there");
    owner.query(&format!("ALTER ROLE {role} SET default_transaction_read_only = on"));
    assert_says(&stage, 78, "WRONG", "takes no writes");
    owner.query(&format!("ALTER ROLE {role} RESET default_transaction_read_only"));
    owner.query("ALTER TABLE events ALTER event_type TYPE integer USING 1");
    assert_says(&stage, 78, "WRONG", "\"event_type\" is of type integer");
    owner.query("ALTER TABLE events ALTER event_type TYPE varchar(50)");
    owner.query("CREATE TRIGGER filter BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()");
    assert_says(&stage, 0, "note", "before a row is inserted: filter");
    owner.query("DROP TRIGGER filter ON events");
    owner.query("DROP TABLE event_receipts");
    assert_says(&stage, 78, "WRONG", "migrate --print");
    owner.query("ALTER TABLE events DROP COLUMN payload; CREATE TABLE headspace_watcher.event_receipts()");
    assert_says(&stage, 78, "WRONG", "no column \"payload\"");
    stage.set("database.events_table", "nowhere.events");
    assert_says(&stage, 78, "WRONG", "CREATE SCHEMA");
    owner.query(&format!("DROP OWNED BY {role}; DROP ROLE {role}"));
    stage.database = Some(Database::at("postgresql://127.0.0.1:1/nowhere?user=me".to_owned()));
    assert_says(&stage, 78, "WRONG", "127.0.0.1:1");
}
