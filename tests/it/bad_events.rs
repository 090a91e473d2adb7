//! Events that Postgres does not take: mended where that can be done, else tried so often and set aside, and nobody
//! waits for them.

use std::time::{Duration, Instant};

use crate::stage::{Database, SOON, Stage, wait_until};

/// A stage whose table refuses events in many ways, by their text.
fn strict() -> Stage {
    let mut stage = Stage::new();
    stage.set("event_system.write_retry_delay_ms", "20");
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("first");
    stage.run_until_idle();
    stage.database().query(
        "CREATE TABLE projects (id int PRIMARY KEY);
         ALTER TABLE events ADD FOREIGN KEY (project_id) REFERENCES projects (id);
         ALTER TABLE events ADD CONSTRAINT polite CHECK (payload->>'text' <> 'rude');
         CREATE INDEX ON events ((payload->>'text'));
         CREATE FUNCTION strict() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
           IF NEW.payload->>'text' LIKE 'project %' THEN
             NEW.project_id := split_part(NEW.payload->>'text', ' ', 2);
           END IF;
           RETURN NEW;
         END $$;
         CREATE TRIGGER strict BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION strict()",
    );
    stage
}

#[test]
fn each_is_tried_so_often_then_set_aside_with_its_cause_and_the_next_goes_on() {
    let stage = strict();
    // Random, so that it can't be compressed to fit into an index.
    let large: String = (0..400).map(|_| uuid::Uuid::now_v7().simple().to_string()).collect();
    let bad = [
        ("rude", "23514", "violates check constraint \"polite\""),
        ("project 42", "23503", "Key (project_id)=(42) is not present"),
        ("project 99999999999", "22003", "out of range for type integer"),
        ("project my secret", "22P02", "invalid input syntax for type integer"),
        (&*large, "54000", "index row"),
    ];
    let watcher = stage.start();
    let mut transcript = stage.transcript("-home-me-app", 1);
    let mut expected = vec!["first".to_owned()];
    let mut lines = String::new();
    for (number, (text, ..)) in bad.iter().enumerate() {
        let good = format!("good {number}");
        lines += &(transcript.prompt(text) + "\n" + &transcript.prompt(&good) + "\n");
        expected.push(good);
    }
    let begun = Instant::now();
    transcript.append(lines);
    wait_until("all is settled", SOON, || {
        let queue = &watcher.health()["queue"];
        queue["pending"] == 0 && queue["dead_letters"] == bad.len()
    });
    // Two pauses each, of 20 and 40 ms at most; the rest is for a busy machine.
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(stage.database().texts(), expected);
    let letters = stage.run(&["queue-dump", "--dead-letters"]).lines();
    assert_eq!(letters.len(), bad.len());
    for (letter, (text, sqlstate, message)) in letters.iter().zip(bad) {
        assert_eq!(letter["sqlstate"], sqlstate, "{letter}");
        assert_eq!(letter["attempts"], 3, "{letter}");
        assert!(letter.to_string().replace("\\\"", "\"").contains(message), "{message}: {letter}");
        assert_eq!(
            watcher.logged("trying again").iter().filter(|l| l["error"].to_string().contains(sqlstate)).count(),
            2
        );
        if text.len() > 20 || text.contains("secret") {
            assert!(!letter.to_string().contains(text) && !letter.to_string().contains("my secret"), "{letter}");
        }
    }
    let log = watcher.log();
    assert!(!log.contains("my secret") && !log.contains("99999999999"), "the log holds text of a payload");
}

#[test]
fn one_in_the_middle_of_a_backlog_is_found() {
    let stage = strict();
    let mut transcript = stage.transcript("-home-me-app", 1);
    let mut expected = vec!["first".to_owned()];
    let mut lines = String::new();
    for number in 0..90 {
        let text = match number {
            20 => "rude".to_owned(),
            50 => "project 42".to_owned(),
            _ => format!("good {number}"),
        };
        lines += &(transcript.prompt(&text) + "\n");
        if ![20, 50].contains(&number) {
            expected.push(text);
        }
    }
    transcript.append(lines);
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), expected);
    let letters = stage.run(&["queue-dump", "--dead-letters"]).lines();
    let shown: Vec<_> = letters.iter().map(|letter| (letter["sqlstate"].clone(), letter["attempts"].clone())).collect();
    assert_eq!(shown, [("23514".into(), 3.into()), ("23503".into(), 3.into())]);
    assert_eq!(stage.database().value("SELECT count(*) FROM event_receipts WHERE seen_again_at IS NOT NULL"), "0");
}

#[test]
fn a_letter_that_the_databases_encoding_lacks_pauses_the_delivery_and_check_finds_it_beforehand() {
    let owner = Database::new();
    let name = format!("latin_{}", uuid::Uuid::now_v7().simple());
    owner.query(&format!("CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"));
    let url = owner.url.replace(&owner.value("SELECT current_database()"), &name);
    let stage = Stage::with(Some(Database::at(url)));
    let checked = stage.run(&["check"]);
    assert!(checked.code() != 0 && checked.output().contains("encoding LATIN1"), "{}", checked.output());
    let mut transcript = stage.transcript("-home-me-app", 1);
    let texts = transcript.say_many("before", 40);
    transcript.say("a crab \u{1f980}");
    transcript.say_many("after", 40);
    let watcher = stage.start();
    wait_until("it is paused there", SOON, || {
        let health = watcher.health();
        (&health["database"]["state"], &health["queue"]["pending"]) == (&"misconfigured".into(), &41.into())
    });
    let health = watcher.health();
    assert!(health["database"]["last_error"].as_str().unwrap().contains("encoding LATIN1"), "{health}");
    assert_eq!(health["queue"]["dead_letters"], 0);
    assert_eq!(stage.database().texts(), texts);
}

#[test]
fn text_that_postgres_can_not_hold_is_mended_and_marked() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    let odd = transcript.prompt("ODD").replace("ODD", "nul \\u0000 lone \\ud83d end");
    transcript.append(odd + "\n");
    transcript.say("after");
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), ["nul \u{fffd} lone \u{fffd} end", "after"]);
    let marked = "SELECT payload->'metadata' FROM events WHERE payload->>'text' LIKE 'nul%'";
    assert!(!stage.database().value(marked).is_empty(), "it is not marked");
    assert!(stage.run(&["queue-dump", "--dead-letters"]).lines().is_empty());
}
