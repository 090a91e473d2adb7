//! `hooks`: Claude Code calls the watcher, and nothing else in its settings is touched.

use std::fs::{File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::stage::{Ran, SOON, Stage, wait_until};

const EVENTS: [&str; 10] = [
    "SessionStart",
    "UserPromptSubmit",
    "PreToolUse",
    "PermissionRequest",
    "PostToolUse",
    "Notification",
    "SubagentStop",
    "PreCompact",
    "Stop",
    "SessionEnd",
];

/// Settings with other people's hooks, in a style of their own: line ends, indentation, a mark, keys that come twice.
const SETTINGS: &str = "\u{feff}{\r\n\t\"model\" : \"opus\",\r\n\r\n\t\"model\" : \"sonnet\",\r\n\t\"odd\": \"\\u0000\",\r\n\t\"hooks\": {\r\n\t\t\"Stop\": [ {\"hooks\":[{\"type\":\"command\",\"command\":\"say done\"}]} ]\r\n\t},\r\n\t\"env\": {\"A\":\"1\"}   }\r\n\r\n";

/// The settings file of this stage's user, in a folder that is there.
fn settings(stage: &Stage) -> PathBuf {
    let folder = stage.folder().join("home/.claude");
    std::fs::create_dir_all(&folder).unwrap();
    folder.join("settings.json")
}

#[track_caller]
fn run(stage: &Stage, arguments: &[&str]) -> Ran {
    let ran = stage.run(&[&["hooks"], arguments].concat());
    assert_eq!((ran.code(), &*ran.error()), (0, ""), "{}", ran.output());
    ran
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Writes the file as somebody did some time ago: an empty one that is younger is being written.
fn written_long_ago(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    let file = File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
}

/// What is beside the settings in their folder.
fn neighbours(path: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(path.parent().unwrap()).unwrap();
    entries.map(|entry| entry.unwrap().path()).filter(|other| other != path).collect()
}

/// The commands that are run at an event.
fn commands(settings: &str, event: &str) -> Vec<String> {
    let settings: Value = serde_json::from_str(settings.trim_start_matches('\u{feff}')).unwrap();
    let groups = settings["hooks"][event].as_array().cloned().unwrap_or_default();
    let hooks = groups.iter().flat_map(|group| group["hooks"].as_array().cloned().unwrap_or_default());
    hooks.map(|hook| hook["command"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn an_installed_hook_is_run_by_a_shell_from_any_folder_and_becomes_a_row() {
    let stage = Stage::new();
    let path = settings(&stage);
    run(&stage, &["install"]);
    let watcher = stage.start();
    let elsewhere = stage.folder().join("else where");
    std::fs::create_dir(&elsewhere).unwrap();
    // Not ours, and not to be taken for ours.
    std::fs::write(elsewhere.join("config.yaml"), "queue:\n  spool_path: here\n").unwrap();
    for event in EVENTS {
        let command = commands(&read(&path), event).remove(0);
        let input = json!({"session_id": "s", "cwd": "/w", "hook_event_name": event}).to_string();
        let script = format!("printf '%s' '{input}' | {command}");
        let ran = Command::new("sh").args(["-c", &script]).current_dir(&elsewhere).env_clear().output().unwrap();
        assert!(ran.status.success() && ran.stdout.is_empty() && ran.stderr.is_empty(), "{ran:?}");
    }
    stage.wait_for_rows(EVENTS.len() as u64);
    let query = "SELECT count(DISTINCT payload->>'hook_type') FROM events WHERE event_type = 'hook_received'";
    assert_eq!(stage.database().value(query), EVENTS.len().to_string());
    assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 1, "nothing is left where the agent works");
    drop(watcher);
}

#[test]
fn everything_else_stays_byte_for_byte_and_comes_back_when_the_hooks_go() {
    let stage = Stage::with(None);
    let path = settings(&stage);
    std::fs::write(&path, SETTINGS).unwrap();
    std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
    run(&stage, &["install"]);
    let after = read(&path);
    // Blanks in the array and the object that something is added to are the only bytes that may change.
    let (head, tail) = SETTINGS.split_once("\"hooks\"").unwrap();
    assert!(after.starts_with(head), "{after}");
    assert!(after.ends_with(tail.split_once("\t}").unwrap().1), "{after}");
    assert_eq!(commands(&after, "Stop").first().map(String::as_str), Some("say done"));
    assert_eq!(commands(&after, "Stop").len(), 2);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    let copies = neighbours(&path);
    assert_eq!(copies.len(), 1, "{copies:?}");
    assert_eq!(read(&copies[0]), SETTINGS);

    let ran = run(&stage, &["install"]);
    assert!(ran.output().starts_with("nothing to do"), "{}", ran.output());
    assert_eq!((read(&path), neighbours(&path)), (after, copies), "a second time changes nothing and copies nothing");

    run(&stage, &["uninstall"]);
    assert_eq!(read(&path), SETTINGS);
    assert_eq!(neighbours(&path), Vec::<PathBuf>::new());
    let ran = run(&stage, &["uninstall"]);
    assert!(ran.output().starts_with("nothing to do"), "{}", ran.output());
}

#[test]
fn what_was_empty_comes_back_as_it_was_and_what_was_changed_since_stays_changed() {
    let stage = Stage::with(None);
    let path = settings(&stage);
    for text in ["", " \n", "{ }", "{\n\n}\n", "{\"hooks\": { }}", "{\"hooks\":{\"Stop\":[\n]}, \"a\":1}"] {
        written_long_ago(&path, text);
        run(&stage, &["install"]);
        assert_eq!(commands(&read(&path), "Stop").len(), 1);
        run(&stage, &["uninstall"]);
        assert_eq!(read(&path), text);
    }
    run(&stage, &["install"]);
    let changed = read(&path).replace("\"a\":1", "\"a\":2");
    std::fs::write(&path, &changed).unwrap();
    run(&stage, &["uninstall"]);
    assert_eq!(read(&path).replace(' ', ""), "{\"a\":2}");
}

#[test]
fn a_folder_and_a_file_that_are_missing_are_made_and_go_again() {
    let mut stage = Stage::with(None);
    let path = stage.folder().join("moved/claude/settings.json");
    stage.environment.insert("CLAUDE_CONFIG_DIR".to_owned(), path.parent().unwrap().to_str().unwrap().to_owned());
    run(&stage, &["install"]);
    assert_eq!(EVENTS.map(|event| commands(&read(&path), event).len()), [1; 10]);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    run(&stage, &["uninstall"]);
    assert!(!path.exists() && neighbours(&path).is_empty());

    let named = stage.folder().join("a project/settings.local.json");
    run(&stage, &["install", "--settings", named.to_str().unwrap()]);
    assert_eq!(commands(&read(&named), "Stop").len(), 1);
    assert!(!path.exists());
}

#[test]
fn a_link_stays_a_link_and_what_it_leads_to_is_changed() {
    let stage = Stage::with(None);
    let path = settings(&stage);
    let dotfiles = stage.folder().join("dotfiles");
    std::fs::create_dir(&dotfiles).unwrap();
    symlink("../../dotfiles/claude.json", &path).unwrap();
    // It leads to nothing yet.
    run(&stage, &["install"]);
    assert!(path.is_symlink());
    assert_eq!(commands(&read(&dotfiles.join("claude.json")), "Stop").len(), 1);
    std::fs::write(dotfiles.join("claude.json"), "{\"a\": 1}\n").unwrap();
    run(&stage, &["install"]);
    assert!(path.is_symlink() && commands(&read(&dotfiles.join("claude.json")), "Stop").len() == 1);
    run(&stage, &["uninstall"]);
    assert!(path.is_symlink());
    assert_eq!(read(&dotfiles.join("claude.json")), "{\"a\": 1}\n");
}

#[test]
fn what_can_not_be_understood_or_written_is_an_error_and_left_alone() {
    let stage = Stage::with(None);
    let path = settings(&stage);
    let wrong: [&[u8]; 5] = [b"{\"a\": 1,}", b"{", b"[1]", b"{\"hooks\": []}", b"{\"a\": \"\xff\"}"];
    for bytes in wrong {
        std::fs::write(&path, bytes).unwrap();
        for command in ["install", "show"] {
            let ran = stage.run(&["hooks", command]);
            // Hooks that are no object can be looked at, though nothing can be added.
            if command == "show" && bytes == b"{\"hooks\": []}" {
                continue;
            }
            assert_eq!(ran.code(), 65, "{command} {:?}: {}", String::from_utf8_lossy(bytes), ran.error());
            assert!(ran.error().contains("left as it is") && ran.error().lines().count() == 1, "{}", ran.error());
        }
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        assert_eq!(neighbours(&path), Vec::<PathBuf>::new());
    }
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert_eq!(stage.run(&["hooks", "install"]).code(), 74);
    let ran = stage.run(&["hooks", "install", "--event", "WorktreeCreate"]);
    assert_eq!(ran.code(), 64, "{}", ran.error());
}

#[test]
fn a_hook_of_a_program_that_moved_is_mended_and_a_script_around_it_is_left() {
    let stage = Stage::with(None);
    let path = settings(&stage);
    let hook =
        |command: &str| json!([{"matcher": "Bash", "hooks": [{"type": "command", "command": command, "timeout": 1}]}]);
    let text = json!({"hooks": {
        "PreToolUse": hook("/gone/headspace-watcher hook"),
        "Stop": hook("nice headspace-watcher hook"),
    }});
    std::fs::write(&path, text.to_string()).unwrap();
    let ran = run(&stage, &["install"]);
    assert!(ran.output().contains("left as it is, Stop: nice headspace-watcher hook"), "{}", ran.output());
    let after: Value = serde_json::from_str(&read(&path)).unwrap();
    let command = commands(&read(&path), "SessionStart").remove(0);
    assert_eq!(after["hooks"]["PreToolUse"], hook(&command), "its matcher and its timeout are the user's");
    assert_eq!(after["hooks"]["Stop"], text["hooks"]["Stop"]);
    assert_eq!(stage.run(&["check"]).output().lines().filter(|line| line.contains("hooks in")).count(), 1);
}

#[test]
fn show_says_what_is_there_what_is_missing_and_what_would_be_added() {
    let stage = Stage::with(None);
    let path = settings(&stage);
    let ran = run(&stage, &["show"]);
    assert_eq!(ran.output().lines().filter(|line| line.starts_with("missing")).count(), EVENTS.len());
    let added: Value = serde_json::from_str(ran.output().split_once("for SessionStart:\n").unwrap().1).unwrap();
    assert!(!path.exists(), "it changes nothing");
    run(&stage, &["install", "--event", "StopFailure"]);
    let there: Value = serde_json::from_str(&read(&path)).unwrap();
    assert!(there["hooks"]["StopFailure"].is_array());
    assert_eq!(added["hooks"], json!({"SessionStart": there["hooks"]["SessionStart"]}), "one for all");
    let ran = run(&stage, &["show"]);
    assert_eq!(ran.output().lines().filter(|line| line.starts_with("installed")).count(), EVENTS.len() + 1);
    assert!(!ran.output().contains("missing"), "{}", ran.output());
    std::fs::write(&path, read(&path).replacen('{', "{\"disableAllHooks\": true,", 1)).unwrap();
    assert!(run(&stage, &["show"]).output().contains("note: disableAllHooks is true"));
}

#[test]
fn without_a_configuration_file_nothing_is_installed() {
    let stage = Stage::with(None);
    std::fs::remove_file(stage.folder().join("config.yaml")).unwrap();
    let ran = stage.run(&["hooks", "install"]);
    assert_eq!(ran.code(), 78, "{}", ran.output());
    assert!(ran.error().contains("--config FILE"), "{}", ran.error());
    assert!(!stage.folder().join("home/.claude").exists());
}

#[test]
fn who_reads_the_settings_meanwhile_never_sees_half_of_them() {
    let stage = Stage::with(None);
    let path = settings(&stage);
    let text = json!({"text": "x".repeat(1 << 20)}).to_string();
    std::fs::write(&path, &text).unwrap();
    let (seen, reader) = {
        let path = path.clone();
        let (sender, seen) = std::sync::mpsc::channel();
        let end = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let ended = end.clone();
        let thread = std::thread::spawn(move || {
            let mut reads = 0u64;
            while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                let text = std::fs::read_to_string(&path).expect("it is always there");
                assert!(serde_json::from_str::<Value>(&text).is_ok(), "half a file of {} bytes", text.len());
                reads += 1;
                let _ = sender.send(reads);
            }
        });
        (seen, (thread, end))
    };
    for command in ["install", "uninstall", "install", "uninstall"] {
        let before = seen.try_iter().last().unwrap_or_default();
        run(&stage, &[command]);
        wait_until("it was read since", SOON, || seen.try_iter().last().is_some_and(|reads| reads > before));
    }
    reader.1.store(true, std::sync::atomic::Ordering::Relaxed);
    reader.0.join().unwrap();
    assert_eq!(read(&path), text);
}

/// The program under another name, with this stage's surroundings.
fn renamed(stage: &Stage, program: &Path, arguments: &[&str]) -> std::process::Output {
    std::fs::create_dir_all(program.parent().unwrap()).unwrap();
    let original = Path::new(env!("CARGO_BIN_EXE_headspace-watcher"));
    // A link, where both are on one file system: the program is large.
    if !program.exists() && std::fs::hard_link(original, program).is_err() {
        std::fs::copy(original, program).unwrap();
    }
    let mut command = Command::new(program);
    command.args(arguments).current_dir(stage.folder()).env_clear().env("HOME", stage.folder().join("home"));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{program:?} {arguments:?}: {output:?}");
    output
}

#[test]
fn a_renamed_or_wrapped_program_knows_its_own_hooks_by_the_command_it_would_write() {
    for name in ["hw", ".headspace-watcher-wrapped", "a watcher's name"] {
        let stage = Stage::with(None);
        let path = settings(&stage);
        std::fs::write(&path, SETTINGS).unwrap();
        let program = stage.folder().join("bin").join(name);
        let run =
            |program: &Path, arguments: &[&str]| String::from_utf8(renamed(&stage, program, arguments).stdout).unwrap();
        let one_each = |what: &str| {
            let after = read(&path);
            for event in EVENTS {
                let expected = if event == "Stop" { 2 } else { 1 };
                assert_eq!(commands(&after, event).len(), expected, "{name}, {what}: {after}");
            }
        };
        run(&program, &["hooks", "install"]);
        one_each("installed");
        assert!(commands(&read(&path), "SessionEnd")[0].contains("/bin/"), "{name}");
        let first = read(&path);
        let again = run(&program, &["hooks", "install"]);
        assert!(again.starts_with("nothing to do"), "{name}: {again}");
        assert_eq!(read(&path), first, "{name}");
        let shown = run(&program, &["hooks", "show"]);
        assert_eq!(shown.lines().filter(|line| line.starts_with("installed")).count(), EVENTS.len(), "{name}: {shown}");
        let checked = run(&program, &["check", "--no-database"]);
        let hooks = checked.lines().find(|line| line.contains("hooks in")).unwrap_or(&checked);
        assert!(hooks.starts_with("ok") && hooks.contains("call this program"), "{name}: {hooks}");

        // As an upgrade does that has a folder for each version.
        let moved = stage.folder().join("next").join(name);
        run(&moved, &["hooks", "install"]);
        one_each("moved");
        assert!(commands(&read(&path), "SessionEnd")[0].contains("/next/"), "{name}");
        run(&moved, &["hooks", "uninstall"]);
        assert_eq!(read(&path), SETTINGS, "{name}");
    }
}

#[test]
fn another_programs_hook_of_the_same_name_is_not_ours() {
    let stage = Stage::with(None);
    let path = settings(&stage);
    let others = r#"{"hooks": {"Stop": [{"hooks": [{"type": "command", "command": "/opt/other/run.sh hook"}]}]}}"#;
    std::fs::write(&path, others).unwrap();
    let program = stage.folder().join("bin/run.sh");
    renamed(&stage, &program, &["hooks", "install"]);
    assert_eq!(commands(&read(&path), "Stop").len(), 2, "{}", read(&path));
    renamed(&stage, &program, &["hooks", "uninstall"]);
    assert_eq!(read(&path), others);
}

#[test]
fn a_wrapper_script_around_the_program_adds_no_second_hook() {
    let stage = Stage::with(None);
    let path = settings(&stage);
    let folder = stage.folder().join("nix/bin");
    let wrapped = folder.join(".headspace-watcher-wrapped");
    renamed(&stage, &wrapped, &["--version"]);
    let script = folder.join("headspace-watcher");
    std::fs::write(&script, format!("#!/bin/sh\nexec '{}' \"$@\"\n", wrapped.display())).unwrap();
    std::fs::set_permissions(&script, Permissions::from_mode(0o755)).unwrap();
    for _ in 0..2 {
        renamed(&stage, &script, &["hooks", "install"]);
        assert_eq!(EVENTS.map(|event| commands(&read(&path), event).len()), [1; 10]);
    }
    renamed(&stage, &script, &["hooks", "uninstall"]);
    assert!(!path.exists(), "it held nothing but the hooks");
}

#[test]
fn without_a_home_no_settings_file_is_written_below_the_current_folder() {
    let mut stage = Stage::with(None);
    stage.environment.insert("HOME".to_owned(), "home".to_owned());
    for command in ["install", "show", "uninstall"] {
        let ran = stage.run(&["hooks", command]);
        assert_eq!(ran.code(), 78, "{command}: {}{}", ran.output(), ran.error());
        assert!(ran.error().contains("HOME is not set to an absolute path"), "{}", ran.error());
        assert_eq!(ran.error().lines().count(), 1, "{}", ran.error());
    }
    assert!(!stage.folder().join("home/.claude").exists());
    let checked = stage.run(&["check", "--no-database"]);
    assert!(checked.output().contains("HOME is not set"), "{}", checked.output());
    let service = stage.run(&["service", "install", "--no-enable"]);
    assert_eq!(service.code(), 78, "{}{}", service.output(), service.error());
    assert!(!stage.folder().join("home/.config").exists());

    // Without the variable the system's list of users says where the home is, if anything does.
    let ran = stage.command(&["hooks", "show"]).env_remove("HOME").output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    let path = said.lines().next().unwrap_or("/");
    assert!(path.starts_with('/') && !path.contains(stage.folder().to_str().unwrap()), "{ran:?}");

    // A file that is named relatively is meant to be there.
    run(&stage, &["install", "--settings", "here.json"]);
    assert_eq!(commands(&read(&stage.folder().join("here.json")), "Stop").len(), 1);
}

/// Runs a command that must be refused with 74 and a sentence that holds `words`, and must leave the file and its folder alone.
#[track_caller]
fn refused(stage: &Stage, path: &Path, command: &str, words: &[&str]) {
    let (before, others) = (std::fs::metadata(path).unwrap(), neighbours(path));
    let ran = stage.run(&["hooks", command]);
    assert_eq!(ran.code(), 74, "{}{}", ran.output(), ran.error());
    for word in words {
        assert!(ran.error().contains(word), "{word}: {}", ran.error());
    }
    assert_eq!(ran.output(), "", "it says nothing else");
    let after = std::fs::metadata(path).unwrap();
    assert_eq!((after.ino(), after.len(), after.nlink()), (before.ino(), before.len(), before.nlink()));
    assert_eq!(neighbours(path), others, "no copy, no draft");
}

#[test]
fn an_empty_file_that_was_just_written_is_being_written_and_is_left_to_its_writer() {
    let stage = Stage::with(None);
    let path = settings(&stage);
    for command in ["install", "uninstall", "show"] {
        // Another program has truncated the file and will write it in a moment. A loaded machine may take longer than
        // that moment to start a program, so that the file is given a time that does not pass.
        std::fs::write(&path, "").unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(SystemTime::now() + Duration::from_millis(900)).unwrap();
        refused(&stage, &path, command, &["is being written", "try again"]);
    }
    // One that has been empty for a while is just empty.
    written_long_ago(&path, "");
    run(&stage, &["install"]);
    assert_eq!(commands(&read(&path), "Stop").len(), 1);
}

#[test]
fn a_file_that_its_owner_may_not_write_is_not_replaced() {
    let stage = Stage::with(None);
    let path = settings(&stage);
    std::fs::write(&path, SETTINGS).unwrap();
    std::fs::set_permissions(&path, Permissions::from_mode(0o444)).unwrap();
    refused(&stage, &path, "install", &["read-only (mode 0444)", "chmod u+w"]);
    assert_eq!(read(&path), SETTINGS);
    // Whoever has nothing to write may look, and find nothing to do.
    run(&stage, &["show"]);
    assert!(run(&stage, &["uninstall"]).output().starts_with("nothing to do"));
    std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    run(&stage, &["install"]);
    std::fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
    assert!(run(&stage, &["install"]).output().starts_with("nothing to do"));
    refused(&stage, &path, "uninstall", &["read-only (mode 0400)"]);
}

#[test]
fn a_file_with_a_second_name_is_not_cut_from_it() {
    let stage = Stage::with(None);
    let path = settings(&stage);
    let twin = stage.folder().join("dotfiles.json");
    std::fs::write(&path, SETTINGS).unwrap();
    std::fs::hard_link(&path, &twin).unwrap();
    refused(&stage, &path, "install", &["2 names", "hard link", "ln -s"]);
    assert_eq!((read(&path), read(&twin)), (SETTINGS.to_owned(), SETTINGS.to_owned()));
    run(&stage, &["show"]);
    // As the message says: a symbolic link instead.
    std::fs::remove_file(&path).unwrap();
    symlink(&twin, &path).unwrap();
    run(&stage, &["install"]);
    assert_eq!(commands(&read(&twin), "Stop").len(), 2);
    // A file of nothing but our hooks would be removed by uninstall: not one with a second name.
    std::fs::remove_file(&path).unwrap();
    run(&stage, &["install"]);
    std::fs::hard_link(&path, stage.folder().join("other.json")).unwrap();
    refused(&stage, &path, "uninstall", &["2 names"]);
}

#[test]
fn codex_gets_its_own_file_and_events_and_is_to_trust_them() {
    let stage = Stage::new();
    let ran = run(&stage, &["install", "--agent", "codex"]);
    assert!(ran.output().contains("type /hooks"), "{}", ran.output());
    let path = stage.folder().join("home/.codex/hooks.json");
    let installed: Value = serde_json::from_str(&read(&path)).unwrap();
    let events: Vec<&String> = installed["hooks"].as_object().unwrap().keys().collect();
    let mut expected: Vec<&str> = EVENTS.into_iter().filter(|event| *event != "Notification").collect();
    expected.sort_unstable();
    assert_eq!(events, expected);
    assert!(!stage.folder().join("home/.claude").exists());
    // What Codex hands over becomes a row with the turn's id; its session is Codex's.
    let input = json!({"session_id": SESSION, "cwd": "/app", "hook_event_name": "SessionStart", "model": "gpt-5.5", "turn_id": "t",
        "transcript_path": format!("/x/rollout-2026-01-03T11-00-00-{SESSION}.jsonl")});
    stage.run_with_input(&["hook"], input.to_string());
    stage.run_until_idle();
    let rows = stage.database().query("SELECT payload FROM events ORDER BY event_type");
    let rows: Vec<Value> = rows.iter().map(|row| serde_json::from_str(row[0].as_ref().unwrap()).unwrap()).collect();
    assert_eq!((&rows[0]["turn_id"], &rows[0]["model"]), (&json!("t"), &json!("gpt-5.5")));
    assert_eq!((&rows[1]["agent"], &rows[1]["session_uuid"]), (&json!("codex-cli"), &json!(SESSION)));
    run(&stage, &["uninstall", "--agent", "codex-cli"]);
    assert!(!path.exists(), "it held nothing else");
}

const SESSION: &str = "019c0000-0000-7000-8000-000000000001";
