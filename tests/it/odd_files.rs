//! A FIFO or a device where a file is expected: refused at once, by every command that reads it.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::stage::{SOON, Stage};

fn mkfifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// In place of `path`, one after the other: a FIFO that nobody writes to, a link to it, an endless device.
fn each_odd_file(path: &Path, mut check: impl FnMut()) {
    mkfifo(path);
    check();
    let target = path.with_extension("fifo");
    std::fs::rename(path, &target).unwrap();
    symlink(&target, path).unwrap();
    check();
    std::fs::remove_file(path).unwrap();
    std::fs::remove_file(&target).unwrap();
    symlink("/dev/zero", path).unwrap();
    check();
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_configuration_file_that_is_no_regular_file_is_refused_at_once() {
    let stage = Stage::with(None);
    each_odd_file(&stage.folder().join("odd.yaml"), || {
        for command in [&["run"][..], &["check", "--no-database"], &["status"], &["queue-dump"]] {
            let ran = stage.run_within(SOON, &[&["--config", "odd.yaml"], command].concat());
            assert_eq!(ran.code(), 78, "{}", ran.error());
            assert!(ran.error().contains("odd.yaml") && ran.error().contains("not a regular file"), "{}", ran.error());
        }
        // The hook has no voice, but it ends.
        let ran = stage.run_within(SOON, &["--config", "odd.yaml", "hook"]);
        assert_eq!((ran.code(), ran.output(), ran.error()), (0, String::new(), String::new()));
    });
}

#[test]
fn a_schema_that_is_no_regular_file_is_refused_at_once_and_named() {
    let mut stage = Stage::with(None);
    let folder = stage.folder().join("schemas");
    std::fs::create_dir(&folder).unwrap();
    stage.set("schemas.path", "schemas");
    each_odd_file(&folder.join("x.json"), || {
        for command in [&["run"][..], &["check", "--no-database"], &["emit", "--type", "x"]] {
            let ran = stage.run_within(SOON, command);
            let said = ran.output() + &ran.error();
            assert_eq!(ran.code(), 78, "{said}");
            assert!(said.contains("x.json") && said.contains("not a regular file"), "{said}");
        }
    });
}

#[test]
fn a_schema_may_begin_with_a_byte_order_mark_and_its_extension_may_be_in_capitals() {
    let mut stage = Stage::with(None);
    let folder = stage.folder().join("schemas");
    std::fs::create_dir(&folder).unwrap();
    stage.set("schemas.path", "schemas");
    std::fs::write(folder.join("build.json"), "\u{feff}{\"type\": \"object\", \"required\": [\"id\"]}").unwrap();
    std::fs::write(folder.join("deploy.JSON"), "{\"type\": \"object\", \"required\": [\"id\"]}").unwrap();
    for name in ["build", "deploy"] {
        assert_eq!(stage.run(&["emit", "--type", name, "--payload", "{\"id\": 1}"]).code(), 0);
        let ran = stage.run(&["emit", "--type", name, "--payload", "{}"]);
        assert_eq!(ran.code(), 65);
        assert!(ran.error().contains("id"), "{}", ran.error());
    }
}

#[test]
fn settings_that_are_no_regular_file_are_refused_at_once_by_every_command_and_the_watcher_goes_on() {
    let mut stage = Stage::new();
    let folder = stage.folder().join("claude");
    std::fs::create_dir(&folder).unwrap();
    std::fs::rename(stage.projects(), folder.join("projects")).unwrap();
    stage.set("claude.projects_path", "claude/projects");
    stage.environment.insert("CLAUDE_CONFIG_DIR".to_owned(), folder.to_str().unwrap().to_owned());
    let settings = folder.join("settings.json");
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    each_odd_file(&settings, || {
        for command in ["install", "uninstall", "show"] {
            let ran = stage.run_within(SOON, &["hooks", command]);
            assert_eq!(ran.code(), 74, "{}", ran.error());
            assert!(ran.error().contains("not a regular file"), "{}", ran.error());
        }
        let ran = stage.run_within(SOON, &["check", "--no-database"]);
        assert!(ran.output().contains("not a regular file"), "{}{}", ran.output(), ran.error());
        assert!(settings.symlink_metadata().is_ok(), "it is left alone");
        // Which days transcripts are kept is asked for by these two.
        let ran = stage.run_within(SOON, &["run", "--until-idle"]);
        assert_eq!(ran.code(), 0, "{}", ran.error());
        let ran = stage.run_within(SOON, &["verify"]);
        assert_eq!(ran.code(), 0, "{}", ran.error());
    });
}

#[test]
fn certificates_and_keys_that_are_no_regular_files_are_refused_at_once() {
    let mut stage = Stage::with(None);
    for (file, parameter) in [("ca.pem", "sslrootcert=ca.pem"), ("c.pem", "sslcert=c.pem sslkey=c.pem")] {
        stage.set("database.url", &format!("host=localhost user=me dbname=d sslmode=require {parameter}"));
        each_odd_file(&stage.folder().join(file), || {
            let ran = stage.run_within(SOON, &["check"]);
            let said = ran.output() + &ran.error();
            assert_eq!(ran.code(), 78, "{said}");
            assert!(said.contains(file) && said.contains("not a regular file"), "{said}");
        });
    }
}
