//! Dead letters: looked at, sent again and forgotten, while the watcher runs and while it doesn't.

use serde_json::{Value, json};

use crate::stage::{SOON, Server, Stage, wait_until};

/// A stage whose database refuses one turn, which is a dead letter by now; and a rejected event beside it.
fn stage_with_dead_letters() -> Stage {
    let stage = Stage::new();
    stage.refuse_curses();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("first");
    transcript.say("a curse");
    transcript.say("last");
    // A hook without a session.
    assert_eq!(stage.run_with_input(&["hook"], r#"{"hook_event_name":"Stop","cwd":"/app"}"#).code(), 0);
    let ran = stage.run(&["--log-format", "json", "run", "--until-idle"]);
    assert_eq!(ran.code(), 0, "{}", ran.error());
    let told = ran.error().lines().find(|line| line.contains("everything that could be read")).unwrap().to_owned();
    let told: Value = serde_json::from_str(&told).unwrap();
    let counts = ["delivered", "duplicates", "dead_letters"].map(|name| told[name].as_u64().unwrap());
    assert_eq!(counts, [3, 0, 2], "it ends with what it has done: {told}");
    assert!(told["seconds"].is_number(), "{told}");
    assert_eq!(stage.database().texts(), ["first", "last"]);
    stage
}

/// Sequence numbers of the event and of the rejection.
fn letters(stage: &Stage) -> (Option<u64>, Option<u64>) {
    let lines = stage.run(&["dead-letters", "list", "--format", "jsonl"]).lines();
    let find = |reason: &str| {
        lines.iter().find(|line| line["reason"] == reason).map(|line| line["sequence"].as_u64().unwrap())
    };
    (find("refused"), find("invalid"))
}

fn look_retry_and_drop(stage: &Stage) {
    let (event, rejection) = letters(stage);
    let (event, rejection) = (event.unwrap(), rejection.unwrap());
    let show = stage.run(&["dead-letters", "show", &event.to_string()]);
    assert_eq!(show.code(), 0, "{}", show.error());
    let shown: Value = serde_json::from_str(&show.output()).unwrap();
    assert_eq!(shown["payload"]["text"], "a curse");
    assert_eq!((shown["reason"].as_str(), shown["sqlstate"].as_str()), (Some("refused"), Some("23514")));
    assert!(shown["failed_at"].is_string() && shown["origin"]["path"].is_string(), "{shown}");
    let shown = stage.run(&["dead-letters", "show", &rejection.to_string()]).output();
    assert!(shown.contains("claude_session_id: required field is missing"), "{shown}");
    assert!(!stage.run(&["dead-letters", "list"]).output().contains("curse"), "text is shown only when asked for");

    assert_eq!(stage.run(&["dead-letters", "show", "999"]).code(), 65);
    assert_eq!(stage.run(&["dead-letters", "retry", "999"]).code(), 65);
    assert_eq!(stage.run(&["dead-letters", "drop", "999"]).code(), 65);
    for command in ["retry", "drop"] {
        let ran = stage.run(&["dead-letters", command]);
        assert_eq!(ran.code(), 64);
        assert!(ran.error().contains("--all"), "{}", ran.error());
    }
    let never = stage.run(&["dead-letters", "retry", &rejection.to_string()]);
    assert_eq!(never.code(), 65);
    assert!(never.error().contains("is no valid event and can't be sent again"), "{}", never.error());

    stage.database().query("ALTER TABLE events DROP CONSTRAINT no_swearing");
    let retried = stage.run(&["dead-letters", "retry", "--all"]);
    assert_eq!(retried.code(), 0, "{}", retried.error());
    let dropped = stage.run(&["dead-letters", "drop", &rejection.to_string()]);
    assert_eq!(dropped.code(), 0, "{}", dropped.error());
    assert_eq!(letters(stage), (None, None));
    assert_eq!(stage.run(&["dead-letters", "retry", "--all"]).output(), "no dead letters\n");
}

fn drop_by_reason_and_drop_all(stage: &Stage) {
    let drop = |which: &[&str]| {
        let ran = stage.run(&[&["dead-letters", "drop"], which].concat());
        assert_eq!(ran.code(), 0, "{}", ran.error());
        ran.output()
    };
    let (event, rejection) = letters(stage);
    assert_eq!(stage.run(&["dead-letters", "drop", "--reason", "boredom"]).code(), 64);
    assert_eq!(drop(&["--reason", "unreadable"]), "no dead letters with reason unreadable\n");
    assert_eq!(drop(&["--reason", "refused"]), format!("{} dropped\n", event.unwrap()));
    assert_eq!(letters(stage), (None, rejection));
    let none = stage.run(&["dead-letters", "retry", "--all"]).output();
    assert!(none.contains("what is no valid event (1) can only be dropped"), "{none}");
    assert_eq!(drop(&["--all"]), format!("{} dropped\n", rejection.unwrap()));
    assert_eq!(letters(stage), (None, None));
}

#[test]
fn dead_letters_are_dropped_by_their_reason_and_all_at_once_with_and_without_the_watcher() {
    drop_by_reason_and_drop_all(&stage_with_dead_letters());
    let stage = stage_with_dead_letters();
    let watcher = stage.start();
    drop_by_reason_and_drop_all(&stage);
    assert_eq!(watcher.health()["status"], "pass");
}

#[test]
fn over_http_they_are_dropped_by_their_reason_and_all_at_once() {
    let stage = stage_with_dead_letters();
    let watcher = stage.start();
    let drop = |which: &str| watcher.ask("DELETE", &format!("/dead-letters{which}"), &[], "").json();
    assert_eq!(drop("?reason=invalid"), json!({"dropped": 1}));
    assert!(matches!(letters(&stage), (Some(_), None)));
    assert_eq!(drop(""), json!({"dropped": 1}));
    assert_eq!(letters(&stage), (None, None));
}

#[test]
fn dead_letters_are_looked_at_sent_again_and_forgotten_while_the_watcher_runs() {
    let stage = stage_with_dead_letters();
    let watcher = stage.start();
    look_retry_and_drop(&stage);
    wait_until("it is delivered", SOON, || stage.database().count() == 4);
    assert_eq!(stage.database().texts(), ["first", "last", "a curse"]);
    assert_eq!(watcher.health()["queue"]["dead_letters"], 0);
}

#[test]
fn dead_letters_are_looked_at_sent_again_and_forgotten_without_the_watcher() {
    let stage = stage_with_dead_letters();
    look_retry_and_drop(&stage);
    assert_eq!(stage.run(&["queue-dump"]).lines().len(), 1);
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), ["first", "last", "a curse"]);
}

#[test]
fn what_is_too_large_is_a_dead_letter_that_says_where_its_bytes_are() {
    let mut stage = Stage::new();
    stage.set("event_system.max_event_bytes", "20000").set("file_watcher.max_line_bytes", "100000");
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("before");
    let mut places = Vec::new();
    for text in ["e".repeat(30_000), "l".repeat(200_000)] {
        let offset = std::fs::metadata(&transcript.path).unwrap().len() as usize;
        let line = transcript.prompt(&text);
        transcript.append(format!("{line}\n"));
        transcript.say("between");
        places.push((offset, line));
    }
    transcript.say("after");
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), ["before", "between", "after"], "the same text again is the same line");
    let letters = stage.run(&["queue-dump", "--dead-letters"]).lines();
    assert_eq!(letters.len(), 2, "{letters:?}");
    let file = std::fs::read(&transcript.path).unwrap();
    for (letter, (offset, line)) in letters.iter().zip(&places) {
        assert_eq!(letter["reason"], "too_large", "{letter}");
        assert_eq!(letter["origin"]["path"], transcript.path.to_str().unwrap(), "{letter}");
        assert_eq!(letter["origin"]["offset"], *offset as u64, "{letter}");
        assert_eq!(&file[*offset..*offset + line.len()], line.as_bytes(), "there they are");
    }
    let message = |letter: &Value| letter["message"].as_str().unwrap().to_owned();
    assert!(message(&letters[0]).contains("max_event_bytes (20000)"), "{}", letters[0]);
    assert!(message(&letters[1]).contains(&format!("at byte {}", places[1].0)), "{}", letters[1]);
}

#[test]
fn a_letter_that_is_sent_again_goes_to_the_tail() {
    let server = Server::start();
    let stage = Stage::with(Some(server.database.another()));
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    stage.database().query("ALTER TABLE events ADD CONSTRAINT no_one CHECK (payload->>'text' <> 'one') NOT VALID");
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    stage.run_until_idle();
    stage.database().query("ALTER TABLE events DROP CONSTRAINT no_one");
    server.stop("fast");
    let watcher = stage.start();
    transcript.say("two");
    wait_until("it waits", SOON, || watcher.health()["queue"]["pending"] == 1);
    let letter = letters(&stage).0.unwrap();
    let answer = watcher.ask("POST", &format!("/dead-letters/{letter}/retry"), &[], "");
    assert_eq!(answer.code, 200, "{answer:?}");
    let pending = stage.run(&["queue-dump", "--payload"]).lines();
    let texts: Vec<&str> = pending.iter().map(|line| line["payload"]["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["two", "one"]);
    assert_eq!(pending[1]["sequence"], answer.json()["sequence"]);
    assert_eq!(watcher.ask("POST", &format!("/dead-letters/{letter}/retry"), &[], "").code, 404);
    assert_eq!(watcher.ask("DELETE", &format!("/dead-letters/{letter}"), &[], "").code, 404);
    server.start_again();
    wait_until("they are delivered", SOON, || stage.database().texts() == ["two", "one"]);
}

#[test]
fn without_a_queue_there_is_nothing_to_send_again() {
    let stage = Stage::with(None);
    for arguments in
        [&["dead-letters", "list"][..], &["dead-letters", "retry", "--all"], &["dead-letters", "drop", "1"]]
    {
        let ran = stage.run(arguments);
        assert_eq!(ran.code(), 69, "{arguments:?}");
        assert!(ran.error().contains("no queue at"), "{}", ran.error());
    }
    assert!(!stage.folder().join("data/queue").exists(), "looking makes nothing");
}
