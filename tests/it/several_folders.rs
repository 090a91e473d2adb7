//! `claude.projects_path` as a list: each folder is followed and verified, and none depends on another.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::stage::{Process, SOON, Stage, Transcript, Watcher, wait_until};

/// A stage with a second projects folder, which does not exist yet.
fn stage() -> Stage {
    let mut stage = Stage::new();
    stage.set("claude.projects_path", r#"[projects, "second/projects"]"#);
    stage.set("file_watcher.polling_interval", "0.1");
    stage
}

fn second(stage: &Stage) -> PathBuf {
    stage.folder().join("second/projects")
}

fn transcript_in_second(stage: &Stage, number: u32) -> Transcript {
    let mut transcript = stage.transcript("-home-me-other", number);
    transcript.path = second(stage).join("-home-me-other").join(transcript.path.file_name().unwrap());
    transcript
}

#[track_caller]
fn wait_for_texts(stage: &Stage, expected: &[&str]) {
    wait_until(&format!("the turns {expected:?}"), SOON, || {
        if stage.database().count() == 0 {
            return false;
        }
        let mut texts = stage.database().texts();
        texts.sort();
        texts == expected
    });
}

fn times_logged(watcher: &Watcher, message: &str) -> usize {
    watcher.logged(message).len()
}

const MISSING: &str = "the transcripts folder can't be read";

#[test]
fn each_folder_is_followed_and_verified_and_a_missing_one_is_a_warning_that_clears() {
    let stage = stage();
    stage.transcript("-home-me-app", 1).say("a");
    let watcher = stage.start();
    wait_for_texts(&stage, &["a"]);
    assert_eq!(watcher.wait_for_log(MISSING)["folder"], second(&stage).to_str().unwrap());
    let ran = stage.run(&["verify"]);
    assert_eq!(ran.code(), 0, "{}", ran.error());
    assert!(ran.output().contains("second/projects does not exist"), "{}", ran.output());
    let checked = stage.run(&["check"]).output();
    assert!(checked.lines().any(|line| line.starts_with("note") && line.contains("second/projects")), "{checked}");

    transcript_in_second(&stage, 2).say("b");
    wait_for_texts(&stage, &["a", "b"]);
    watcher.wait_for_log("the transcripts folder is there");
    // Long after many rescans.
    stage.transcript("-home-me-app", 3).say("c");
    wait_for_texts(&stage, &["a", "b", "c"]);
    assert_eq!(times_logged(&watcher, MISSING), 1);
    assert_eq!(times_logged(&watcher, "the transcripts folder is there"), 1);
    let report: Value = serde_json::from_str(&stage.run(&["verify", "--json"]).output()).unwrap();
    assert_eq!(report["turns"]["in_postgres"], 3);
    assert_eq!(report["missing_folders"], json!([]));
    let checked = stage.run(&["check"]).output();
    assert_eq!(
        checked.lines().filter(|line| line.contains("transcripts") && line.contains("project folders")).count(),
        2
    );
}

#[test]
fn a_folder_that_goes_away_keeps_its_cursors_and_holds_up_no_other() {
    let stage = stage();
    let mut first = stage.transcript("-home-me-app", 1);
    first.say("a");
    let mut removed = stage.transcript("-home-me-app", 3);
    removed.say("b");
    let mut other = transcript_in_second(&stage, 2);
    other.say("c");
    let watcher = stage.start();
    wait_for_texts(&stage, &["a", "b", "c"]);

    let away = stage.folder().join("away");
    fs::rename(second(&stage), &away).unwrap();
    watcher.wait_for_log(MISSING);
    // What is removed from the folder that is there is gone.
    fs::remove_file(&removed.path).unwrap();
    first.say("d");
    wait_for_texts(&stage, &["a", "b", "c", "d"]);
    wait_until("the removed file is forgotten", SOON, || watcher.health()["watcher"]["files"] == 2);
    let ends = "SELECT string_agg(payload->>'session_uuid', ',') FROM events WHERE event_type = 'session_ended'";
    wait_until("its session ends", SOON, || stage.database().query(ends)[0][0].as_ref() == Some(&removed.session));

    fs::rename(&away, second(&stage)).unwrap();
    other.say("e");
    wait_for_texts(&stage, &["a", "b", "c", "d", "e"]);
    assert_eq!(stage.database().query(ends)[0][0].as_ref(), Some(&removed.session), "no other session has ended");
    assert_eq!(watcher.health()["watcher"]["files"], 2);
}

#[test]
fn a_transcript_that_moves_to_another_folder_goes_on_there() {
    let stage = stage();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("a");
    transcript_in_second(&stage, 2).say("b");
    let watcher = stage.start();
    wait_for_texts(&stage, &["a", "b"]);
    let moved = transcript_in_second(&stage, 1).path;
    fs::rename(&transcript.path, &moved).unwrap();
    transcript.path = moved;
    watcher.wait_for_log("a transcript was moved");
    transcript.say("c");
    wait_for_texts(&stage, &["a", "b", "c"]);
}

#[test]
fn a_session_ends_with_its_process_in_whichever_folder_it_is() {
    let stage = stage();
    let mut first = stage.transcript("-home-me-app", 1);
    first.say("a");
    let mut other = transcript_in_second(&stage, 2);
    other.say("b");
    // The first folder is of a version that keeps no such files.
    let process = Process::open(&stage, "second/sessions", &other.session);
    let watcher = stage.start();
    wait_for_texts(&stage, &["a", "b"]);
    let ends = "SELECT string_agg(payload->>'session_uuid' || ' ' || (payload->>'reason'), ',') FROM events
                 WHERE event_type = 'session_ended'";
    // It has the session open no more, though it runs on.
    wait_until("a rescan", SOON, || watcher.health()["watcher"]["files"] == 2);
    std::thread::sleep(std::time::Duration::from_millis(500));
    fs::remove_file(&process.file).unwrap();
    let expected = format!("{} closed", other.session);
    wait_until("its session ends", SOON, || stage.database().query(ends)[0][0].as_ref() == Some(&expected));
}

#[test]
fn a_file_of_the_same_process_id_in_another_folder_ends_no_session() {
    let stage = stage();
    let mut first = stage.transcript("-home-me-app", 1);
    first.say("a");
    let mut other = transcript_in_second(&stage, 2);
    other.say("b");
    // A container's process may have the same id, and a file of an earlier one may be left.
    let process = Process::open(&stage, "sessions", &first.session);
    process.note(&stage, "second/sessions", &other.session);
    let watcher = stage.start();
    wait_for_texts(&stage, &["a", "b"]);
    fs::rename(stage.folder().join("sessions"), stage.folder().join("sessions-away")).unwrap();
    first.say("c");
    wait_for_texts(&stage, &["a", "b", "c"]);
    std::thread::sleep(std::time::Duration::from_millis(500));
    let ends = "SELECT count(*) FROM events WHERE event_type = 'session_ended'";
    assert_eq!(stage.database().value(ends), "0", "{}", watcher.log());
    process.kill();
    let ends = "SELECT string_agg(payload->>'reason', ',') FROM events WHERE event_type = 'session_ended'";
    wait_until("both end with it", SOON, || stage.database().value(ends) == "closed,closed");
}

#[test]
fn a_folder_under_two_names_is_followed_once_and_one_that_is_no_folder_is_missing() {
    let mut stage = stage();
    std::os::unix::fs::symlink(stage.projects(), stage.folder().join("alias")).unwrap();
    fs::write(stage.folder().join("file"), "").unwrap();
    stage.set("claude.projects_path", "[projects, alias, file]");
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("a");
    let watcher = stage.start();
    wait_for_texts(&stage, &["a"]);
    watcher.wait_for_log("two of the transcripts folders are the same one");
    watcher.wait_for_log("the transcripts folder is no folder");
    transcript.say("b");
    wait_for_texts(&stage, &["a", "b"]);
    assert_eq!(watcher.health()["watcher"]["files"], 1);
    assert_eq!(times_logged(&watcher, "two of the transcripts folders are the same one"), 1);
    assert_eq!(times_logged(&watcher, "the transcripts folder is no folder"), 1);
    let ran = stage.run(&["verify"]);
    assert_eq!(ran.code(), 1, "nothing is proved of a folder that can't be read");
    assert!(ran.output().contains("/file, so nothing is proved of it: it is no folder"), "{}", ran.output());
}
