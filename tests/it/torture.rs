//! Proofs that grow with their rounds: few here, hundreds under `scripts/torture.sh`.

use std::time::Duration;

use crate::stage::{Dice, SOON, Server, Stage, Writer, rounds, wait_until};

#[test]
fn every_turn_is_stored_once_and_in_order_though_the_watcher_is_killed_and_postgres_stopped() {
    let rounds = rounds(6);
    let mut dice = Dice::new("kills");
    let server = Server::start();
    let mut stage = Stage::with(Some(server.database.another()));
    stage.set("file_watcher.polling_interval", "0.5");
    let writer = Writer::start(stage.transcript("-home-me-app", 1), Duration::from_millis(2));
    for round in 0..rounds {
        let watcher = stage.start_with(&[]);
        let moment = Duration::from_millis(20 + dice.below(400));
        if round % 3 == 1 {
            std::thread::sleep(moment / 2);
            server.stop("immediate");
            std::thread::sleep(moment / 2);
            watcher.kill();
            server.start_again();
        } else if round % 3 == 2 {
            std::thread::sleep(moment / 2);
            server.kill();
            server.start_again();
            std::thread::sleep(moment / 2);
            watcher.kill();
        } else {
            std::thread::sleep(moment);
            watcher.kill();
        }
    }
    let texts = writer.finish();
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), texts);
    assert_eq!(stage.database().value("SELECT count(*) FROM event_receipts"), (texts.len() + 1).to_string());
}

#[test]
fn what_was_settled_is_durable_though_the_window_ended_in_a_duplicate_or_broke() {
    // kill -9 of the postmaster right after the queue is empty: whatever left the queue must still be there.
    let rounds = rounds(3);
    let server = Server::start();
    // A wide gap between commit and flush by itself makes what was not flushed explicitly vanish.
    server.restart_with(&["wal_writer_delay = '10s'", "wal_writer_flush_after = '1GB'"]);
    let stage = Stage::with(Some(server.database.another()));
    let mut transcript = stage.transcript("-home-me-app", 1);
    let known = transcript.prompt("known");
    transcript.append(known.clone() + "\n");
    stage.run_until_idle();
    let watcher = stage.start();
    let mut texts = vec!["known".to_owned()];
    for round in 0..rounds {
        // The last line of the window was stored long ago. Every other time so many lines that several windows follow
        // one another, of which not all are flushed on their own.
        let mut lines = String::new();
        for number in 0..if round % 2 == 0 { 5 } else { 400 } {
            let text = format!("round {round} line {number}");
            lines.push_str(&(transcript.prompt(&text) + "\n"));
            texts.push(text);
        }
        transcript.append(lines + &known + "\n");
        wait_until("the queue is empty", SOON, || {
            let health = watcher.health();
            health["queue"]["pending"] == 0 && health["writes"]["succeeded"].as_u64().unwrap() >= texts.len() as u64 - 1
        });
        server.kill();
        server.start_again();
        assert_eq!(stage.database().texts(), texts, "round {round}");
        wait_until("it is up", SOON, || watcher.health()["database"]["state"] == "up");
    }
}

#[test]
fn what_was_settled_is_durable_though_its_window_broke_in_the_middle() {
    // kill -9 of the postmaster right after a window whose last event was refused: nothing after it wrote anything.
    let rounds = rounds(3);
    let server = Server::start();
    server.restart_with(&["wal_writer_delay = '10s'", "wal_writer_flush_after = '1GB'"]);
    let mut stage = Stage::with(Some(server.database.another()));
    stage.set("event_system.write_retry_delay_ms", "10").set("event_system.write_retry_max_delay_ms", "20");
    let mut transcript = stage.transcript("-home-me-app", 1);
    let mut texts = transcript.say_many("first", 1);
    stage.run_until_idle();
    stage.database().query("ALTER TABLE events ADD CONSTRAINT no_bad CHECK (payload->>'text' NOT LIKE 'bad%')");
    let watcher = stage.start();
    for round in 0..rounds {
        let good: Vec<String> = (0..5).map(|number| format!("round {round} line {number}")).collect();
        let lines: String = good.iter().map(|text| transcript.prompt(text) + "\n").collect();
        let bad = transcript.prompt(&format!("bad {round}"));
        transcript.append(lines + &bad + "\n");
        texts.extend(good);
        wait_until("the queue is empty", SOON, || {
            let queue = &watcher.health()["queue"];
            queue["pending"] == 0 && queue["dead_letters"] == round + 1
        });
        server.kill();
        server.start_again();
        assert_eq!(stage.database().texts(), texts, "round {round}");
        wait_until("it is up", SOON, || watcher.health()["database"]["state"] == "up");
    }
}
