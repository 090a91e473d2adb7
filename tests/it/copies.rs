//! Copies of sessions: what they inherited belongs to the session where it was said, and is neither activity nor the beginning
//! of theirs. Rows are only inserted: which file a turn belongs to is decided before it is read.

use std::time::Duration;

use serde_json::Value;

use crate::capture::said;
use crate::stage::{SOON, Stage, Transcript, lacks, wait_until};

/// Sessions end after an hour and a half.
fn stage() -> Stage {
    let mut stage = Stage::new();
    stage.set("file_watcher.inactivity_timeout", "5400");
    stage
}

/// A prompt said at a time of day (`10:00:05`) on the `day`th of January.
fn say_at(transcript: &mut Transcript, text: &str, day: u32, time: &str) {
    let line = transcript.prompt(text).replace("2026-01-02T03:04:05", &format!("2026-01-{day:02}T{time}"));
    transcript.append(line + "\n");
}

/// Lines that Claude Code adds by how it makes a copy.
#[derive(Clone, Copy, Default, Debug)]
struct Marks {
    /// Before what was inherited.
    before: Option<&'static str>,
    /// Behind what was inherited, in the copy.
    behind: Option<&'static str>,
    /// At the end of the original.
    in_original: Option<&'static str>,
}

const OPENED: &str = r#"{"type":"queue-operation","operation":"enqueue","timestamp":"2026-01-03T10:00:00.000Z"}"#;
const IN_BACKGROUND: &str = r#"{"type":"system","uuid":"s","timestamp":"2026-01-03T10:00:04.000Z","sessionKind":"bg","cwd":"/home/me/worktree"}"#;
const WENT_ON: &str = r#"{"type":"continued-in","timestamp":"2026-01-03T10:00:00.000Z","continuedInSessionId":"00000001-0000-4000-8000-000000000000"}"#;

/// How copies are made: by the desktop app, into the background by a version that leaves a pointer and by one that leaves
/// none, by a fork without any mark.
const KINDS: [Marks; 4] = [
    Marks { before: Some(OPENED), behind: None, in_original: None },
    Marks { before: None, behind: Some(IN_BACKGROUND), in_original: Some(WENT_ON) },
    Marks { before: None, behind: Some(IN_BACKGROUND), in_original: None },
    Marks { before: None, behind: None, in_original: None },
];

/// Writes what `copy` has of `from`: the words under its own session and in another folder.
fn inherit(from: &Transcript, copy: &mut Transcript, marks: Marks) {
    let line = |mark: Option<&str>| mark.map_or_else(String::new, |mark| format!("{mark}\n"));
    copy.append(line(marks.before));
    let history = std::fs::read_to_string(&from.path).unwrap();
    let is_state = |line: &&str| line.contains("queue-operation") || line.contains("continued-in");
    for words in history.lines().filter(|line| !is_state(line)) {
        copy.append(words.replace(&from.session, &copy.session).replace("/home/me/app", "/home/me/worktree") + "\n");
    }
    copy.append(line(marks.behind));
}

/// A prompt of the copy's own, in its folder.
fn say_in_copy(copy: &mut Transcript, text: &str, day: u32, time: &str) {
    let line = copy.prompt(text).replace("2026-01-02T03:04:05", &format!("2026-01-{day:02}T{time}"));
    copy.append(line.replace("/home/me/app", "/home/me/worktree") + "\n");
}

/// A transcript with two prompts and a pause between them.
fn original(stage: &Stage) -> Transcript {
    let mut original = stage.transcript("-home-me-app", 2);
    say_at(&mut original, "one", 2, "10:00:00");
    say_at(&mut original, "two", 2, "20:00:00");
    original
}

/// Its copy, whose name comes first.
fn copy_of(stage: &Stage, original: &mut Transcript, marks: Marks) -> Transcript {
    let mut copy = stage.transcript("-home-me-worktree", 1);
    inherit(original, &mut copy, marks);
    original.append(marks.in_original.map_or_else(String::new, |mark| format!("{mark}\n")));
    copy
}

/// The file under another name beside the projects folder, until [`appear`].
fn hide(stage: &Stage, transcript: &Transcript) {
    std::fs::rename(&transcript.path, stage.folder().join(&transcript.session)).unwrap();
}

fn appear(stage: &Stage, transcript: &Transcript) {
    std::fs::create_dir_all(transcript.path.parent().unwrap()).unwrap();
    std::fs::rename(stage.folder().join(&transcript.session), &transcript.path).unwrap();
}

/// Session and text of each turn, sorted.
fn pairs(stage: &Stage) -> Vec<(String, String)> {
    let mut pairs = said(stage);
    pairs.sort();
    pairs
}

#[track_caller]
fn assert_said(stage: &Stage, expected: &[(&Transcript, &str)]) {
    let mut expected: Vec<_> = expected.iter().map(|(file, text)| (file.session.clone(), (*text).to_owned())).collect();
    expected.sort();
    assert_eq!(pairs(stage), expected);
}

/// What is stored of the beginning and the ends of a session: one line for each row, in the order of acceptance.
fn life_of(stage: &Stage, session: &str) -> Vec<String> {
    let rows = stage.database().query(&format!(
        "SELECT event_type, payload FROM events
          WHERE event_type <> 'turn_detected' AND payload->>'session_uuid' = '{session}' ORDER BY id"
    ));
    rows.into_iter()
        .map(|row| {
            let [event_type, payload] = row.try_into().unwrap();
            let payload: Value = serde_json::from_str(&payload.unwrap()).unwrap();
            match event_type.unwrap().as_str() {
                "session_registered" => format!(
                    "registered {} {}",
                    payload["working_directory"].as_str().unwrap(),
                    payload["started_at"].as_str().unwrap()
                ),
                _ => format!("ended after {} s", payload["duration_seconds"]),
            }
        })
        .collect()
}

#[test]
fn of_files_that_are_read_for_the_first_time_what_was_said_is_the_originals_by_whatever_tells_the_copy() {
    /// What each file has before the words of both, and behind them.
    type Edges = (&'static str, &'static str);
    let background = r#"{"type":"system","uuid":"s","timestamp":"2026-01-02T11:00:00.000Z","sessionKind":"bg"}"#;
    let pointer = r#"{"type":"continued-in","continuedInSessionId":"00000001-0000-4000-8000-000000000000"}"#;
    let opened = |second: u32| {
        let line = format!(r#"{{"type":"queue-operation","timestamp":"2026-01-02T10:00:0{second}.000Z"}}"#);
        &*line.leak()
    };
    let cases: [(Edges, Edges); 4] = [
        (("", pointer), ("", "")),
        (("", ""), ("", background)),
        // A line that the background has written in the original, too, which then went on elsewhere.
        (("", &*format!("{background}\n{pointer}").leak()), ("", background)),
        ((opened(1), ""), (opened(2), "")),
    ];
    for (original_has, copy_has) in cases {
        let stage = Stage::new();
        // The copy's name comes first.
        let (mut original, mut copy) = (stage.transcript("-home-me-app", 2), stage.transcript("-home-me-app", 1));
        let mut shared = stage.transcript("-elsewhere", 2);
        say_at(&mut shared, "one", 2, "10:00:03");
        say_at(&mut shared, "two", 2, "10:00:04");
        let words = std::fs::read_to_string(&shared.path).unwrap();
        std::fs::remove_dir_all(shared.path.parent().unwrap()).unwrap();
        let append = |transcript: &mut Transcript, line: &str| {
            if !line.is_empty() {
                transcript.append(format!("{line}\n"));
            }
        };
        append(&mut copy, copy_has.0);
        copy.append(words.replace(&shared.session, &copy.session));
        append(&mut copy, copy_has.1);
        say_at(&mut copy, "three", 2, "11:00:01");
        append(&mut original, original_has.0);
        original.append(words.replace(&shared.session, &original.session));
        append(&mut original, original_has.1);
        stage.run_until_idle();
        assert_said(&stage, &[(&original, "one"), (&original, "two"), (&copy, "three")]);
        assert_eq!(stage.run(&["verify"]).code(), 0);
    }
}

#[test]
fn a_copy_begins_with_its_first_own_line_and_ends_once() {
    for (marks, is_read_before) in KINDS.into_iter().flat_map(|marks| [(marks, false), (marks, true)]) {
        let stage = stage();
        let mut original = original(&stage);
        if is_read_before {
            stage.run_until_idle();
        }
        let mut copy = copy_of(&stage, &mut original, marks);
        say_in_copy(&mut copy, "three", 3, "10:00:05");
        say_in_copy(&mut copy, "four", 3, "10:01:05");
        stage.run_until_idle();
        let context = format!("{marks:?} {is_read_before}");
        assert_said(&stage, &[(&original, "one"), (&original, "two"), (&copy, "three"), (&copy, "four")]);
        let of_original =
            ["registered /home/me/app 2026-01-02T10:00:00.678Z", "ended after 0 s", "ended after 36000 s"];
        assert_eq!(life_of(&stage, &original.session), of_original, "{context}");
        let begun = if marks.behind.is_some() { "10:00:04.000" } else { "10:00:05.678" };
        let lasted = if marks.behind.is_some() { 61 } else { 60 };
        let of_copy = [format!("registered /home/me/worktree 2026-01-03T{begun}Z"), format!("ended after {lasted} s")];
        assert_eq!(life_of(&stage, &copy.session), of_copy, "{context}");
        assert_eq!(stage.run(&["verify"]).code(), 0, "{context}");
    }
}

#[test]
fn a_copy_that_is_written_in_pieces_and_read_on_after_restarts_begins_with_its_own_words() {
    for marks in KINDS {
        let stage = stage();
        let mut original = original(&stage);
        let whole = copy_of(&stage, &mut original, marks);
        let lines = std::fs::read_to_string(&whole.path).unwrap();
        std::fs::remove_file(&whole.path).unwrap();
        let mut copy = whole.clone();
        for line in lines.split_inclusive('\n') {
            copy.append(line);
            stage.run_until_idle();
        }
        say_in_copy(&mut copy, "three", 3, "10:00:05");
        stage.run_until_idle();
        assert_said(&stage, &[(&original, "one"), (&original, "two"), (&copy, "three")]);
        let life = life_of(&stage, &copy.session);
        // Its first own line was read alone: it is so old that the session had ended, and came back.
        let expected = match marks.behind {
            Some(_) => {
                &["registered /home/me/worktree 2026-01-03T10:00:04.000Z", "ended after 0 s", "ended after 1 s"][..]
            }
            None => &["registered /home/me/worktree 2026-01-03T10:00:05.678Z", "ended after 0 s"],
        };
        assert_eq!(life, expected);
    }
}

#[test]
fn a_copy_in_which_nothing_was_said_is_no_session_and_is_not_missing_when_its_original_has_gone() {
    let stage = stage();
    let mut original = original(&stage);
    let copy = copy_of(&stage, &mut original, Marks::default());
    stage.run_until_idle();
    assert_eq!(life_of(&stage, &copy.session), [""; 0]);
    assert_eq!(stage.run(&["verify"]).code(), 0);
    std::fs::remove_file(&original.path).unwrap();
    stage.run_until_idle();
    assert_eq!(stage.run(&["verify"]).code(), 0);
    assert_said(&stage, &[(&original, "one"), (&original, "two")]);
}

#[test]
fn rows_are_only_inserted_also_where_a_copy_was_found_before_its_original() {
    let mut stage = stage();
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    // A role that may INSERT, and a table that takes nothing else of anybody.
    let role = format!("watcher_{}", uuid::Uuid::now_v7().simple());
    let database = stage.database().clone();
    database.query(&format!(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'append only'; END $$;
         CREATE TRIGGER refuse BEFORE UPDATE OR DELETE ON events FOR EACH ROW EXECUTE FUNCTION refuse();
         CREATE ROLE {role} LOGIN; GRANT INSERT ON events TO {role};
         GRANT USAGE ON SCHEMA headspace_watcher TO {role};
         GRANT SELECT, INSERT, UPDATE ON event_receipts, event_sources TO {role};
         GRANT USAGE ON events_id_seq, event_sources_id_seq TO {role}"
    ));
    stage
        .environment
        .insert("DATABASE_URL".to_owned(), database.url.replace("user=headspace", &format!("user={role}")));
    let mut original = original(&stage);
    let mut copy = copy_of(&stage, &mut original, KINDS[0]);
    say_in_copy(&mut copy, "three", 3, "10:00:05");
    hide(&stage, &original);
    stage.run_until_idle();
    let before =
        database.query("SELECT id, \"timestamp\", payload FROM events WHERE event_type = 'turn_detected' ORDER BY id");
    assert_said(&stage, &[(&copy, "one"), (&copy, "two"), (&copy, "three")]);
    let watcher = stage.start();
    appear(&stage, &original);
    wait_until("the original is read", SOON, || watcher.health()["writes"]["duplicates"] == 2);
    assert_eq!(
        database.query("SELECT id, \"timestamp\", payload FROM events WHERE event_type = 'turn_detected' ORDER BY id"),
        before
    );
    let warned: Vec<_> = watcher.logged("").into_iter().filter(|line| line["level"] == "WARN").collect();
    assert!(warned.is_empty(), "{warned:?}");
    let check = stage.run(&["check"]);
    assert_eq!(check.code(), 0, "{}", check.output());
    assert!(!check.output().contains("UPDATE"), "{}", check.output());
}

#[test]
fn however_an_original_a_copy_and_a_copy_of_the_copy_appear_each_turn_is_there_once() {
    let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    for order in orders {
        let stage = stage();
        let mut original = original(&stage);
        let mut copy = copy_of(&stage, &mut original, KINDS[0]);
        say_in_copy(&mut copy, "three", 3, "10:00:05");
        let mut second = stage.transcript("-home-me-app", 3);
        inherit(&copy, &mut second, Marks::default());
        say_in_copy(&mut second, "four", 4, "10:00:05");
        let files = [original, copy, second];
        files.iter().for_each(|file| hide(&stage, file));
        for index in order {
            appear(&stage, &files[index]);
            stage.run_until_idle();
        }
        // Each is its own whose file came first, of those that have it.
        let first_of = |holders: &[usize]| *order.iter().find(|index| holders.contains(index)).unwrap();
        let expected = [
            (&files[first_of(&[0, 1, 2])], "one"),
            (&files[first_of(&[0, 1, 2])], "two"),
            (&files[first_of(&[1, 2])], "three"),
            (&files[2], "four"),
        ];
        assert_said(&stage, &expected);
        assert_eq!(stage.run(&["verify"]).code(), 0, "{order:?}");
    }
}

/// A file that begins with the lines of another session, which keep its name: an old resume.
fn resumed(stage: &Stage) -> (Transcript, Transcript) {
    let mut other = stage.transcript("-home-me-app", 2);
    say_at(&mut other, "one", 2, "10:00:00");
    say_at(&mut other, "two", 2, "20:00:00");
    let mut resumed = stage.transcript("-home-me-app", 1);
    resumed.append(std::fs::read(&other.path).unwrap());
    (other, resumed)
}

#[test]
fn a_session_that_is_only_named_in_anothers_file_is_registered_and_ended() {
    let life_of_other = ["registered /home/me/app 2026-01-02T10:00:00.678Z", "ended after 0 s", "ended after 36000 s"];
    for goes_on in [true, false] {
        for has_file in [true, false] {
            let stage = stage();
            let (other, mut resumed) = resumed(&stage);
            if goes_on {
                say_at(&mut resumed, "three", 3, "10:00:00");
            }
            if !has_file {
                std::fs::remove_file(&other.path).unwrap();
            }
            for _ in 0..2 {
                stage.run_until_idle();
                let mut expected = vec![(&other, "one"), (&other, "two")];
                expected.extend(goes_on.then_some((&resumed, "three")));
                assert_said(&stage, &expected);
                assert_eq!(life_of(&stage, &other.session), life_of_other, "{goes_on} {has_file}");
                let of_resumed = ["registered /home/me/app 2026-01-03T10:00:00.678Z", "ended after 0 s"];
                let of_resumed = if goes_on { &of_resumed[..] } else { &[] };
                assert_eq!(life_of(&stage, &resumed.session), of_resumed);
                assert_eq!(stage.run(&["verify"]).code(), 0);
            }
            let path = if has_file { &other.path } else { &resumed.path };
            let registered = "SELECT payload->>'transcript_path' FROM events
                               WHERE event_type = 'session_registered' ORDER BY id LIMIT 1";
            assert_eq!(stage.database().value(registered), path.to_str().unwrap());
            // What is told is told once, also after a restart.
            if !has_file {
                let again = "SELECT count(*) FROM event_receipts WHERE seen_again_at IS NOT NULL";
                assert_eq!(stage.database().value(again), "0");
            }
        }
    }
}

#[test]
fn the_other_session_of_a_file_is_told_of_as_if_it_had_been_read_at_once() {
    // Read line by line, each in a run of its own.
    let stage = stage();
    let (other, whole) = resumed(&stage);
    std::fs::remove_file(&other.path).unwrap();
    let lines = std::fs::read_to_string(&whole.path).unwrap();
    std::fs::remove_file(&whole.path).unwrap();
    let mut resumed = whole.clone();
    for line in lines.split_inclusive('\n') {
        resumed.append(line);
        stage.run_until_idle();
    }
    say_at(&mut resumed, "three", 3, "10:00:00");
    stage.run_until_idle();
    assert_said(&stage, &[(&other, "one"), (&other, "two"), (&resumed, "three")]);
    let expected = ["registered /home/me/app 2026-01-02T10:00:00.678Z", "ended after 0 s", "ended after 36000 s"];
    assert_eq!(life_of(&stage, &other.session), expected);
    assert_eq!(
        life_of(&stage, &resumed.session),
        ["registered /home/me/app 2026-01-03T10:00:00.678Z", "ended after 0 s"]
    );
}

#[test]
fn cases_of_several_files_come_out_as_they_were_judged_by_hand() {
    let cases = crate::stage::project().join("../shared/turn-cases");
    if lacks("cases of turns", cases.exists()) {
        return;
    }
    let mut judged = 0;
    for case in std::fs::read_dir(cases).unwrap().map(|case| case.unwrap().path()) {
        let Ok(expected) = std::fs::read(case.join("expected.json")) else { continue };
        let expected: Value = serde_json::from_slice(&expected).unwrap();
        if !expected["sessions"].is_array() {
            continue;
        }
        judged += 1;
        let stage = stage();
        let folder = stage.projects().join("-w-app");
        std::fs::create_dir_all(&folder).unwrap();
        let is_transcript = |path: &std::path::PathBuf| path.extension().is_some_and(|extension| extension == "jsonl");
        let files = std::fs::read_dir(&case).unwrap().map(|file| file.unwrap().path()).filter(is_transcript);
        for file in files {
            std::fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
        }
        stage.run_until_idle();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let turns = expected["turns"].as_array().unwrap().iter();
        let mut turns: Vec<_> = turns.map(|turn| [text(&turn["turn_uuid"]), text(&turn["session_uuid"])]).collect();
        turns.sort();
        let sql =
            "SELECT payload->>'turn_uuid', payload->>'session_uuid' FROM events WHERE event_type = 'turn_detected'";
        let rows = stage.database().query(sql).into_iter();
        let mut found: Vec<_> = rows.map(|row| <[_; 2]>::try_from(row).unwrap().map(Option::unwrap)).collect();
        found.sort();
        assert_eq!(found, turns, "{}", case.display());
        for session in expected["sessions"].as_array().unwrap() {
            let life = life_of(&stage, session.as_str().unwrap());
            assert_eq!(life.len(), 2, "it is registered and ended: {life:?}, {}", case.display());
            // What the copies of these cases say first is said at this time.
            if session.as_str().unwrap().ends_with("e02") && expected["sessions"].as_array().unwrap().len() == 2 {
                assert_eq!(life, ["registered /w/app 2026-10-01T10:11:40.000Z", "ended after 10 s"]);
            }
        }
    }
    assert!(judged >= 3, "{judged}");
}

#[test]
fn an_original_that_is_replaced_or_comes_back_is_no_copy_of_its_copy() {
    for comes_back in [true, false] {
        let stage = stage();
        let mut original = original(&stage);
        // Later than the file system's clock can tell.
        std::thread::sleep(Duration::from_millis(50));
        let mut copy = copy_of(&stage, &mut original, Marks::default());
        say_in_copy(&mut copy, "three", 3, "10:00:05");
        stage.run_until_idle();
        let whole = std::fs::read_to_string(&original.path).unwrap();
        if comes_back {
            hide(&stage, &original);
            stage.run_until_idle();
            appear(&stage, &original);
        } else {
            let new = original.path.with_extension("new");
            std::fs::write(&new, format!("{{\"type\":\"summary\"}}\n{whole}")).unwrap();
            std::fs::rename(new, &original.path).unwrap();
        }
        stage.run_until_idle();
        say_at(&mut original, "four", 4, "10:00:00");
        stage.run_until_idle();
        assert_said(&stage, &[(&original, "one"), (&original, "two"), (&copy, "three"), (&original, "four")]);
        let expected = [
            "registered /home/me/app 2026-01-02T10:00:00.678Z",
            "ended after 0 s",
            "ended after 36000 s",
            "ended after 172800 s",
        ];
        assert_eq!(life_of(&stage, &original.session), expected, "{comes_back}");
    }
}

#[test]
fn the_tenth_fork_and_one_of_long_first_words_begin_with_their_own_words() {
    for first in ["one".to_owned(), "one".repeat(60_000)] {
        let stage = stage();
        let mut original = stage.transcript("-home-me-app", 100);
        say_at(&mut original, &first, 2, "10:00:00");
        say_at(&mut original, "two", 2, "20:00:00");
        stage.run_until_idle();
        for number in 1..=9 {
            let mut fork = stage.transcript("-home-me-app", number);
            let words = std::fs::read_to_string(&original.path).unwrap();
            let words = words.lines().next().unwrap().replace(&original.session, &fork.session);
            fork.append(words + "\n");
            say_in_copy(&mut fork, &format!("own {number}"), 3, "10:00:00");
        }
        stage.run_until_idle();
        let mut fork = stage.transcript("-home-me-worktree", 10);
        inherit(&original, &mut fork, Marks::default());
        say_in_copy(&mut fork, "last", 4, "10:00:00");
        stage.run_until_idle();
        let expected = ["registered /home/me/worktree 2026-01-04T10:00:00.678Z", "ended after 0 s"];
        assert_eq!(life_of(&stage, &fork.session), expected, "{} bytes", first.len());
    }
}

#[test]
fn a_file_without_words_of_its_own_does_not_stand_for_its_session() {
    let stage = stage();
    let (other, mut resumed) = resumed(&stage);
    say_at(&mut resumed, "three", 3, "10:00:00");
    std::fs::write(&other.path, "{\"type\":\"summary\",\"summary\":\"x\"}\n").unwrap();
    let expected = ["registered /home/me/app 2026-01-02T10:00:00.678Z", "ended after 0 s", "ended after 36000 s"];
    for is_gone in [false, true] {
        if is_gone {
            std::fs::remove_file(&other.path).unwrap();
        }
        stage.run_until_idle();
        assert_eq!(life_of(&stage, &other.session), expected);
        assert_eq!(stage.run(&["verify"]).code(), 0);
    }
}

#[test]
fn what_a_sessions_own_file_has_told_of_its_end_is_not_told_again_by_another() {
    let stage = stage();
    let (mut other, resumed) = resumed(&stage);
    say_at(&mut other, "three", 2, "20:10:00");
    stage.run_until_idle();
    let expected = ["registered /home/me/app 2026-01-02T10:00:00.678Z", "ended after 0 s", "ended after 36600 s"];
    assert_eq!(life_of(&stage, &other.session), expected);
    std::fs::remove_file(&other.path).unwrap();
    stage.run_until_idle();
    assert_eq!(life_of(&stage, &other.session), expected);
    assert_eq!(life_of(&stage, &resumed.session), [""; 0]);
}

#[test]
fn a_session_whose_last_trace_is_removed_has_ended() {
    let mut stage = stage();
    stage.set("file_watcher.inactivity_timeout", "100000000");
    let (other, resumed) = resumed(&stage);
    std::fs::remove_file(&other.path).unwrap();
    let watcher = stage.start();
    stage.wait_for_rows(3);
    assert_eq!(life_of(&stage, &other.session).len(), 1);
    std::fs::remove_file(&resumed.path).unwrap();
    wait_until("it has ended", SOON, || life_of(&stage, &other.session).len() == 2);
    drop(watcher);
}
