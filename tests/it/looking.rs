//! Looking at the queue without a watcher: nothing on disk changes, whatever state the queue is in, and no watcher is
//! kept from starting.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use crate::stage::{Database, SOON, Stage, signal, wait_until};

/// What can be seen of one file or folder.
#[derive(PartialEq, Eq, Debug)]
struct Seen {
    inode: u64,
    mode: u32,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    size: u64,
    content: Vec<u8>,
}

/// Everything below the data folder, and that itself.
fn everything(stage: &Stage) -> BTreeMap<PathBuf, Seen> {
    let entries = walkdir::WalkDir::new(stage.folder().join("data")).into_iter().map(Result::unwrap);
    entries
        .map(|entry| {
            let metadata = entry.metadata().unwrap();
            let seen = Seen {
                inode: metadata.ino(),
                mode: metadata.mode(),
                modified: (metadata.mtime(), metadata.mtime_nsec()),
                size: metadata.len(),
                content: if metadata.is_file() { std::fs::read(entry.path()).unwrap() } else { Vec::new() },
            };
            (entry.into_path(), seen)
        })
        .collect()
}

/// A stage with events in its queue and dead letters, no database, and a folder of its own for temporary files.
fn filled(kill: bool) -> Stage {
    let mut stage = Stage::with(None);
    let temporary = stage.folder().join("tmp");
    std::fs::create_dir(&temporary).unwrap();
    stage.environment.insert("TMPDIR".to_owned(), temporary.to_str().unwrap().to_owned());
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say_many("a text", 40);
    transcript.append("garbage\n");
    let watcher = stage.start();
    wait_until("all is queued", SOON, || {
        let queue = &watcher.health()["queue"];
        queue["pending"] == 41 && queue["dead_letters"] == 1
    });
    if kill {
        watcher.kill();
    } else {
        watcher.stop();
    }
    stage
}

fn left_in_temporary_folder(stage: &Stage) -> Vec<PathBuf> {
    std::fs::read_dir(stage.folder().join("tmp")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

fn segment(stage: &Stage) -> PathBuf {
    crate::damage::newest(&stage.folder().join("data/queue"))
}

fn overwrite(file: &Path, offset: u64, length: usize) {
    let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    file.write_all_at(&vec![0xa5; length], offset).unwrap();
}

/// Opens the queue and closes it again.
fn reopened() -> Stage {
    let stage = filled(false);
    stage.start().stop();
    stage
}

#[test]
fn looking_changes_no_name_no_size_no_time_and_no_byte_whatever_the_queue_is_like() {
    type State = (&'static str, Option<usize>, fn() -> Stage);
    let states: [State; 9] = [
        ("stopped", Some(41), || filled(false)),
        ("killed", Some(41), || filled(true)),
        ("opened twice", Some(41), reopened),
        ("without its lock", Some(41), || {
            let stage = filled(false);
            std::fs::remove_file(stage.folder().join("data/queue/lock")).unwrap();
            stage
        }),
        ("without its marks", Some(41), || {
            let stage = filled(false);
            std::fs::remove_file(stage.folder().join("data/queue/HIGHEST")).unwrap();
            stage
        }),
        ("with a damaged log", None, || {
            let stage = reopened();
            overwrite(&segment(&stage).join("db"), 0, 300_000);
            overwrite(&segment(&stage).join("conf"), 0, 8);
            stage
        }),
        ("with a log cut short", None, || {
            let stage = filled(true);
            let db = std::fs::OpenOptions::new().write(true).open(segment(&stage).join("db")).unwrap();
            db.set_len(db.metadata().unwrap().len() / 3 + 7).unwrap();
            stage
        }),
        ("without its log", None, || {
            let stage = filled(false);
            std::fs::remove_file(segment(&stage).join("db")).unwrap();
            stage
        }),
        ("without conf", Some(41), || {
            let stage = filled(true);
            std::fs::remove_file(segment(&stage).join("conf")).unwrap();
            stage
        }),
    ];
    let database = Database::new();
    for (state, pending, make) in states {
        let mut stage = make();
        let before = everything(&stage);
        let mut said = Vec::new();
        for command in [
            &["queue-dump"][..],
            &["queue-dump", "--dead-letters"],
            &["dead-letters", "list"],
            &["dead-letters", "show", "42"],
            &["status"],
            &["check", "--no-database"],
            &["verify"],
        ] {
            if command == ["verify"] {
                stage.database = Some(database.clone());
            }
            let ran = stage.run(command);
            said.push(format!("{command:?}: {} {}{}", ran.code(), ran.output(), ran.error()));
            let after = everything(&stage);
            let names = |seen: &BTreeMap<PathBuf, Seen>| seen.keys().cloned().collect::<Vec<_>>();
            assert_eq!(names(&after), names(&before), "{state}, {command:?}");
            for (path, seen) in &before {
                let now = &after[path];
                let differs =
                    [now.inode != seen.inode, now.mode != seen.mode, now.modified != seen.modified, now != seen];
                assert_eq!(differs, [false; 4], "{state}, {command:?}: {} was changed", path.display());
            }
            assert_eq!(left_in_temporary_folder(&stage), Vec::<PathBuf>::new(), "{state}, {command:?}");
        }
        if let Some(pending) = pending {
            stage.database = None;
            assert_eq!(stage.run(&["queue-dump"]).lines().len(), pending, "{state}: {}", said.join("\n"));
            assert_eq!(stage.run(&["queue-dump", "--dead-letters"]).lines().len(), 1, "{state}");
        }
    }
}

/// A dump whose reader takes one line and no more.
fn blocked_dump(stage: &Stage) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = stage.command(&["queue-dump", "--payload"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut reader = BufReader::with_capacity(4096, child.stdout.take().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with('{'), "{line}");
    (child, reader)
}

/// A queue whose dump does not fit into a pipe.
fn long() -> Stage {
    let stage = filled(false);
    let text = "a text of some length, ".repeat(40);
    stage.transcript("-home-me-app", 2).say_many(&text, 2000);
    let watcher = stage.start();
    wait_until("all is queued", SOON, || watcher.health()["queue"]["pending"] == 2042);
    watcher.stop();
    stage
}

#[test]
fn a_watcher_starts_while_somebody_looks_and_who_looks_sees_all_that_was_there() {
    let stage = long();
    let (mut dump, mut reader) = blocked_dump(&stage);
    let watcher = stage.start();
    stage.transcript("-home-me-app", 3).say("what comes after");
    wait_until("it is queued", SOON, || watcher.health()["queue"]["pending"] == 2044);
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    assert!(dump.wait().unwrap().success());
    assert_eq!(rest.lines().count(), 2042 - 1);
    assert_eq!(left_in_temporary_folder(&stage), Vec::<PathBuf>::new());
}

#[test]
fn looking_leaves_nothing_however_it_ends() {
    let stage = long();
    let before = everything(&stage);
    for name in ["TERM", "INT", "HUP", "PIPE", "KILL"] {
        let (mut dump, reader) = blocked_dump(&stage);
        assert_eq!(left_in_temporary_folder(&stage), Vec::<PathBuf>::new(), "{name}");
        if name == "PIPE" {
            drop(reader)
        } else {
            signal(dump.id(), name)
        }
        dump.wait().unwrap();
        assert_eq!(left_in_temporary_folder(&stage), Vec::<PathBuf>::new(), "{name}");
    }
    assert!(everything(&stage) == before);
}

#[test]
fn looking_needs_no_room_for_temporary_files() {
    let mut stage = filled(false);
    let before = everything(&stage);
    stage.environment.insert("TMPDIR".to_owned(), "/nowhere".to_owned());
    let ran = stage.run(&["queue-dump"]);
    assert_eq!(ran.code(), 0, "{}{}", ran.output(), ran.error());
    assert_eq!(ran.lines().len(), 41);
    assert!(everything(&stage) == before);
}
