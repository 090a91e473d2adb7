//! A queue whose files were damaged: the start goes on with what is whole or salvages it, the transcripts are read
//! again, and Postgres ends with each turn exactly once.

use std::fs;
use std::path::{Path, PathBuf};

use crate::stage::{AWAY, Dice, SOON, Stage, rounds, wait_until};

/// What is done to the files of a queue that nobody holds.
const KINDS: [&str; 9] = [
    "bytes of db overwritten",
    "conf gone",
    "said to be damaged",
    "snapshots torn",
    "db cut short",
    "db cut by its last bytes",
    "db all zeros",
    "a foreign file",
    "the segment gone",
];

/// The segment that was written last.
pub fn newest(queue: &Path) -> PathBuf {
    let segments = fs::read_dir(queue).unwrap().map(|entry| entry.unwrap().path());
    let number = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix("segment-")?.parse::<u64>().ok();
    segments.filter(|path| number(path).is_some()).max_by_key(number).unwrap()
}

fn damage(kind: &str, queue: &Path, dice: &mut Dice) {
    let segment = newest(queue);
    let db = segment.join("db");
    match kind {
        "bytes of db overwritten" => {
            let mut bytes = fs::read(&db).unwrap();
            for _ in 0..=dice.below(30) {
                let at = dice.below(bytes.len() as u64 - 600) as usize;
                let length = dice.below(600) as usize;
                bytes[at..at + length].fill_with(|| dice.below(256) as u8);
            }
            fs::write(&db, bytes).unwrap();
        }
        "conf gone" => fs::remove_file(segment.join("conf")).unwrap(),
        "said to be damaged" => {
            let number = segment.file_name().unwrap().to_str().unwrap().replace("segment-", "");
            fs::write(queue.join("DAMAGED"), format!("{number} a test says so\n")).unwrap();
        }
        "snapshots torn" => {
            for path in fs::read_dir(&segment).unwrap().map(|entry| entry.unwrap().path()) {
                if path.file_name().unwrap().to_str().unwrap().starts_with("snap.") {
                    let bytes = fs::read(&path).unwrap();
                    fs::write(&path, &bytes[..dice.below(bytes.len() as u64) as usize]).unwrap();
                }
            }
            fs::write(segment.join("snap.00000000000FFFFF"), "torn").unwrap();
        }
        "db cut short" => {
            let file = fs::OpenOptions::new().write(true).open(&db).unwrap();
            file.set_len(dice.below(file.metadata().unwrap().len())).unwrap();
        }
        "db cut by its last bytes" => {
            let file = fs::OpenOptions::new().write(true).open(&db).unwrap();
            let bytes = file.metadata().unwrap().len();
            file.set_len(bytes - bytes / 300).unwrap();
        }
        "db all zeros" => fs::write(&db, vec![0; fs::metadata(&db).unwrap().len() as usize]).unwrap(),
        "a foreign file" => {
            fs::write(queue.join("notes.txt"), "not ours").unwrap();
            fs::create_dir(queue.join("segment-x")).unwrap();
            fs::write(segment.join("notes.txt"), "not ours").unwrap();
            fs::write(segment.join("snap.notes"), "not ours").unwrap();
        }
        "the segment gone" => fs::remove_dir_all(&segment).unwrap(),
        other => panic!("{other}"),
    }
}

/// Folders in the queue that hold what could not be trusted.
fn set_aside(queue: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(queue).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("damaged-")).collect()
}

#[test]
fn whatever_is_damaged_it_starts_and_postgres_ends_with_each_turn_once() {
    let mut dice = Dice::new("damage");
    for round in 0..rounds(KINDS.len() as u32) {
        let kind = KINDS[round as usize % KINDS.len()];
        let mut stage = Stage::new();
        let mut transcripts = [1, 2].map(|number| stage.transcript("-home-me-app", number));
        let mut texts = Vec::new();
        for transcript in &mut transcripts {
            texts.extend(transcript.say_many("delivered before", 50));
        }
        stage.run_until_idle();
        // These wait.
        let away = AWAY.to_owned();
        stage.environment.insert("HEADSPACE_DATABASE__URL".to_owned(), away);
        let watcher = stage.start();
        for transcript in &mut transcripts {
            texts.extend(transcript.say_many("waiting", 200));
            transcript.say(&format!("large {}", "x".repeat(30_000)));
            texts.push(format!("large {}", "x".repeat(30_000)));
        }
        wait_until("all is queued", SOON, || watcher.health()["queue"]["pending"] == 402);
        watcher.kill();
        stage.environment.remove("HEADSPACE_DATABASE__URL");
        let queue = stage.folder().join("data/queue");
        damage(kind, &queue, &mut dice);
        // Damage that is met only while it runs ends it; the next start goes on.
        let mut said = Vec::new();
        loop {
            let ran = stage.run(&["--log-format", "json", "run", "--until-idle"]);
            said.push(ran.error() + &ran.output());
            match ran.code() {
                0 => break,
                code => assert_eq!((code, said.len() < 4), (74, true), "{kind}: {said:?}"),
            }
        }
        let mut stored = stage.database().texts();
        stored.sort();
        texts.sort();
        assert!(stored == texts, "{kind}: {} stored of {}: {said:?}", stored.len(), texts.len());
        assert_eq!(stage.database().value("SELECT count(*) FROM event_receipts"), stage.database().count().to_string());
        // Nothing that was set aside goes unsaid.
        let aside = set_aside(&queue);
        for folder in &aside {
            let is_kept = folder.join("db").exists() || kind == "the segment gone";
            assert!(is_kept, "{kind}: it is kept as it was: {}", folder.display());
            let name = folder.file_name().unwrap().to_str().unwrap();
            let errors = said.iter().flat_map(|log| log.lines()).filter(|line| line.contains("\"ERROR\""));
            assert!(errors.filter(|line| line.contains(name)).count() >= 1, "{kind}: {said:?}");
        }
        if kind == "said to be damaged" {
            assert_eq!(aside.len(), 1, "{said:?}");
        }
        eprintln!("round {round}: {kind}: {} starts, {} set aside", said.len(), aside.len());
    }
}

#[test]
fn what_came_from_elsewhere_than_transcripts_is_salvaged_too() {
    let mut stage = Stage::new();
    let away = AWAY.to_owned();
    stage.environment.insert("HEADSPACE_DATABASE__URL".to_owned(), away);
    let watcher = stage.start();
    let event = |number| {
        format!(
            "{{\"event_type\":\"session_ended\",\"payload\":{{\"session_uuid\":\"{number}\",\"reason\":\"closed\"}}}}"
        )
    };
    for number in 0..300 {
        assert_eq!(watcher.ask("POST", "/events", &[], &event(number)).code, 202);
    }
    watcher.kill();
    let queue = stage.folder().join("data/queue");
    damage("said to be damaged", &queue, &mut Dice::new("salvage"));
    stage.environment.remove("HEADSPACE_DATABASE__URL");
    let watcher = stage.start();
    watcher.wait_for_log("300 of its waiting events are found");
    wait_until("all is delivered", SOON, || watcher.health()["queue"]["pending"] == 0);
    let stored = "SELECT string_agg(payload->>'session_uuid', ' ' ORDER BY id) FROM events";
    let expected: Vec<String> = (0..300).map(|number| number.to_string()).collect();
    assert_eq!(stage.database().value(stored), expected.join(" "));
}

#[test]
fn how_many_events_are_missing_is_said_at_error_in_health_and_in_a_dead_letter() {
    let mut stage = Stage::new();
    stage.environment.insert("HEADSPACE_DATABASE__URL".to_owned(), AWAY.to_owned());
    let watcher = stage.start();
    let event = r#"{"event_type":"session_ended","payload":{"session_uuid":"s","reason":"closed"}}"#;
    for _ in 0..50 {
        assert_eq!(watcher.ask("POST", "/events", &[], event).code, 202);
    }
    watcher.kill();
    let db = newest(&stage.folder().join("data/queue")).join("db");
    fs::write(&db, vec![0; fs::metadata(&db).unwrap().len() as usize]).unwrap();
    let watcher = stage.start();
    watcher.wait_for_log("50 are missing");
    let said = watcher.logged("50 are missing");
    assert_eq!((said.len(), said[0]["level"].as_str()), (1, Some("ERROR")), "{}", watcher.log());
    let health = watcher.health();
    assert_eq!((&health["queue"]["missing"], &health["status"]), (&50.into(), &"warn".into()), "{health}");
    assert!(health["reasons"].to_string().contains("50 events are missing"), "{health}");
    let letters = stage.run(&["queue-dump", "--dead-letters"]).lines();
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert!(letters[0]["message"].to_string().contains("50 are missing"), "{letters:?}");
}
