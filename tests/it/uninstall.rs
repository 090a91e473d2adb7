//! `uninstall`: it takes away what is ours, after a question, and nothing else.

use std::path::Path;

use crate::stage::{Stage, project};

/// A watcher that has run without a database, with hooks, a service file, and one event that waits.
fn used() -> Stage {
    let stage = Stage::with(None);
    let home = stage.folder().join("home");
    std::fs::create_dir_all(home.join(".claude")).unwrap();
    std::fs::write(home.join(".claude/settings.json"), "{\"model\": \"opus\"}\n").unwrap();
    std::fs::create_dir_all(home.join(".config/headspace-watcher")).unwrap();
    std::fs::write(home.join(".config/headspace-watcher/environment"), "PGHOST=localhost\n").unwrap();
    let watcher = stage.start();
    assert_eq!(watcher.stop().0.code(), Some(0));
    let event = ["emit", "--type", "session_ended", "--payload", r#"{"session_uuid":"s","reason":"closed"}"#];
    assert_eq!(stage.run(&event).code(), 0);
    assert_eq!(stage.run(&["hooks", "install"]).code(), 0);
    assert_eq!(stage.run(&["service", "--for", SUPERVISOR, "install", "--no-enable"]).code(), 0);
    stage
}

const SUPERVISOR: &str = "systemd";

#[test]
fn it_removes_hooks_service_and_state_and_leaves_all_else() {
    let mut stage = used();
    let home = stage.folder().join("home");
    let unit = home.join(".config/systemd/user/headspace-watcher.service");
    let mine = stage.folder().join("data/queue/mine.txt");
    std::fs::write(&mine, "mine").unwrap();
    // As one made by scripts/dev-postgres.sh.
    let postgres = stage.folder().join("data/postgres");
    std::fs::create_dir_all(postgres.join("cluster")).unwrap();
    std::fs::write(postgres.join("cluster/headspace.conf"), "").unwrap();
    std::fs::write(stage.folder().join("data/postgres.url"), "postgresql:///headspace\n").unwrap();
    stage.environment.insert("PATH".to_owned(), "/nowhere".to_owned());

    let unasked = stage.run(&["uninstall"]);
    assert_eq!(unasked.code(), 64, "nobody to ask: {}", unasked.output());
    for listed in
        ["10 hooks in", unit.to_str().unwrap(), "the queue in", "1 files of the spool in", "not touched: your database"]
    {
        assert!(unasked.output().contains(listed), "{listed}: {}", unasked.output());
    }
    assert!(unit.exists() && stage.folder().join("data/queue/HIGHEST").exists());

    let ran = stage.run(&["uninstall", "--yes"]);
    assert_eq!(ran.code(), 0, "{}{}", ran.output(), ran.error());
    assert!(!unit.exists());
    assert_eq!(std::fs::read_to_string(home.join(".claude/settings.json")).unwrap(), "{\"model\": \"opus\"}\n");
    let left = |folder: &Path| -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(left(&stage.folder().join("data")), ["postgres", "postgres.url", "queue"]);
    assert_eq!(left(&stage.folder().join("data/queue")), ["mine.txt"]);
    assert!(stage.folder().join("config.yaml").exists());

    std::fs::remove_dir_all(stage.folder().join("data/queue")).unwrap();
    let pid = postgres.join("cluster/postmaster.pid");
    std::fs::write(&pid, "1\n").unwrap();
    let running = stage.run(&["uninstall", "--yes", "--private-postgres"]);
    assert!(running.code() == 69 && running.error().contains("dev-postgres.sh stop"), "{}", running.error());
    std::fs::remove_file(&pid).unwrap();
    let ran = stage.run(&["uninstall", "--yes", "--private-postgres"]);
    assert_eq!((ran.code(), stage.folder().join("data").exists()), (0, false), "{}", ran.error());
    let again = stage.run(&["uninstall", "--yes"]);
    assert!(again.code() == 0 && again.output().contains("nothing to do"), "{}", again.output());
}

#[test]
fn a_watcher_that_is_no_service_is_named_and_nothing_is_removed() {
    let stage = Stage::with(None);
    let watcher = stage.start();
    let ran = stage.run(&["uninstall", "--yes"]);
    assert_eq!(ran.code(), 69);
    assert!(ran.error().contains(&format!("process {}", watcher.pid())), "{}", ran.error());
    assert!(stage.folder().join("data/queue/HIGHEST").exists());
}

/// The recipe of docs/install.md.
#[test]
fn a_session_whose_rows_were_deleted_does_not_come_back() {
    let stage = Stage::new();
    let (mut forgotten, mut other) = (stage.transcript("-home-me-app", 1), stage.transcript("-home-me-app", 2));
    forgotten.say("a secret");
    other.say("stays");
    stage.run_until_idle();
    let recipe = std::fs::read_to_string(project().join("docs/install.md")).unwrap();
    let delete = recipe.lines().find(|line| line.starts_with("DELETE FROM events")).unwrap();
    let session = delete.split('\'').nth(1).unwrap();
    stage.database().query(&delete.replace(session, &forgotten.session));
    assert_eq!(stage.database().count(), 2);
    assert_eq!(stage.run(&["verify"]).code(), 1, "verify sees that rows are gone");
    assert_eq!(stage.run(&["verify", "--accept-missing"]).code(), 0);
    // A new queue reads everything again.
    std::fs::remove_dir_all(stage.folder().join("data/queue")).unwrap();
    stage.run_until_idle();
    assert_eq!(stage.run(&["verify", "--repair"]).code(), 0);
    stage.run_until_idle();
    let turns = "SELECT count(*) FROM events WHERE payload->>'session_uuid' = ";
    assert_eq!(stage.database().value(&format!("{turns}'{}'", forgotten.session)), "0");
    assert_eq!(stage.database().count(), 2);
}
