//! `queue-dump` of a long queue while events come and go: constant memory, whole lines, one order, and nobody waits.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::stage::{SOON, Server, Stage, Watcher, rounds, wait_until};

/// Greatest resident memory so far, in MB; 0 where the system does not say.
fn memory_max(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

/// What a dump showed, and how much memory the command took.
struct Dump {
    sequences: Vec<u64>,
    memory_mb: u64,
}

fn dump(stage: &Stage) -> Dump {
    let mut child = stage.command(&["queue-dump", "--payload"]).stdout(Stdio::piped()).spawn().unwrap();
    let (mut sequences, mut memory_mb) = (Vec::new(), 0);
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line: Value = serde_json::from_str(&line.unwrap()).expect("each line is JSON");
        assert!(line["payload"].is_object() && line["event_id"].is_string(), "{line}");
        sequences.push(line["sequence"].as_u64().unwrap());
        if sequences.len() % 1000 == 0 {
            memory_mb = memory_mb.max(memory_max(child.id()));
        }
    }
    assert!(child.wait().unwrap().success());
    assert!(sequences.is_sorted_by(|one, other| one < other), "not in order");
    Dump { sequences, memory_mb }
}

/// How long it takes to take in one event, at the median of so many.
fn append_time(watcher: &Watcher, count: usize) -> Duration {
    let event = r#"{"event_type":"session_ended","payload":{"session_uuid":"s","reason":"closed"}}"#;
    let mut times: Vec<Duration> = (0..count)
        .map(|_| {
            let begun = Instant::now();
            assert_eq!(watcher.ask("POST", "/events", &[], event).code, 202);
            begun.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[count / 2]
}

/// Raises the flag when it goes.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_long_queue_is_dumped_in_constant_memory_while_events_come_and_go() {
    // A million in a long run of 84 rounds and more.
    let count = rounds(1).clamp(1, 84) * 12_000;
    let server = Server::start();
    let mut stage = Stage::with(Some(server.database.another()));
    // Else all would be delivered before a dump has ended.
    stage.set("queue.drain_window", if count < 100_000 { "2" } else { "8" });
    server.stop("fast");
    let watcher = stage.start();
    let mut transcript = stage.transcript("-home-me-app", 1);
    let text = "a text of some length, ".repeat(20);
    for first in (0..count).step_by(12_000) {
        transcript.say_many(&format!("{text}{first}"), 12_000);
    }
    wait_until("all is queued", SOON * rounds(1).max(4), || {
        watcher.health()["queue"]["pending"].as_u64().unwrap() > u64::from(count)
    });
    let whole = dump(&stage);
    assert_eq!(whole.sequences.len(), count as usize + 1);

    // How long others wait meanwhile, side by side.
    let alone = append_time(&watcher, 50);
    let ended = AtomicBool::new(false);
    let dumps = std::thread::scope(|scope| {
        let dumping = scope.spawn(|| {
            let mut dumps = Vec::new();
            loop {
                // The last one begins when many are delivered.
                let is_last = ended.load(Ordering::SeqCst);
                dumps.push(dump(&stage));
                if is_last {
                    return dumps;
                }
            }
        });
        // Also after a failure, which would else wait for the thread for ever.
        let end = EndOnDrop(&ended);
        let beside = append_time(&watcher, 50);
        eprintln!("{count} pending: an event is taken in within {alone:?}, beside a dump within {beside:?}");
        // On a busy machine everything takes longer; a dump that held a lock would hold it for seconds.
        assert!(beside < alone * 10 + Duration::from_millis(200), "{beside:?} instead of {alone:?}");
        // Now they go, too.
        server.start_again();
        wait_until("many are delivered", SOON * rounds(1).max(2), || {
            watcher.health()["queue"]["pending"].as_u64().unwrap() < u64::from(count) / 2
        });
        drop(end);
        dumping.join().unwrap()
    });
    let last = dumps.last().unwrap();
    assert!(!last.sequences.is_empty() && dumps.iter().any(|dump| dump.sequences.len() < whole.sequences.len()));
    let memory = dumps.iter().map(|dump| dump.memory_mb).max().unwrap().max(whole.memory_mb);
    eprintln!("queue-dump took {memory} MB at most, the watcher {} MB", memory_max(watcher.pid()));
    assert!(memory < 50, "queue-dump took {memory} MB");
    // The same without the watcher, which reads the folder itself.
    watcher.kill();
    let left = dump(&stage);
    assert!(!left.sequences.is_empty());
    assert!(left.memory_mb < 100, "it took {} MB to read the folder", left.memory_mb);
    let again = dump(&stage);
    assert_eq!(left.sequences, again.sequences, "looking changed something");
}

#[test]
fn tables_fit_80_columns_unless_they_are_to_be_wide() {
    let stage = Stage::new();
    stage.refuse_curses();
    let mut transcript = stage.transcript("-home-me-a-project-with-a-rather-long-name", 7);
    transcript.say("a curse");
    transcript.append("no JSON\n");
    stage.run_until_idle();
    let table = |arguments: &[&str]| stage.run(arguments).output();
    let letters = ["dead-letters", "list", "--format", "table"];
    let narrow = table(&letters);
    assert!(narrow.lines().all(|line| line.chars().count() <= 80), "{narrow}");
    assert!(narrow.contains("…") && narrow.contains("/00000007:"), "the end of a path says most: {narrow}");
    assert!(
        narrow.contains("          23514: ERROR: new row for relation"),
        "the reason has a line of its own: {narrow}"
    );
    let wide = table(&[&letters[..], &["--wide"]].concat());
    assert!(wide.contains(transcript.path.to_str().unwrap()) && wide.contains("no_swearing"), "{wide}");
    assert_eq!((narrow.lines().count(), wide.lines().count()), (5, 3), "{narrow}{wide}");

    stage.database().query("DELETE FROM events");
    let missing = table(&["verify"]);
    assert!(missing.contains("missing in …") && missing.lines().all(|line| line.chars().count() <= 80), "{missing}");
    let missing = table(&["verify", "--wide"]);
    assert!(missing.contains(&format!("missing in {}:\n", transcript.path.display())), "{missing}");

    let stage = Stage::with(None);
    let mut transcript = stage.transcript("-home-me-a-project-with-a-rather-long-name", 7);
    transcript.say("text");
    let watcher = stage.start();
    wait_until("it is queued", SOON, || watcher.health()["queue"]["pending"] == 2);
    let narrow = stage.run(&["queue-dump", "--format", "table"]).output();
    assert!(narrow.lines().all(|line| line.chars().count() <= 80) && narrow.contains("/00000007:"), "{narrow}");
    let wide = stage.run(&["queue-dump", "--format", "table", "--wide"]).output();
    assert!(wide.contains("ATTEMPTS") && wide.contains(transcript.path.to_str().unwrap()), "{wide}");
}
