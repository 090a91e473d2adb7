//! Sessions begin once and end once each time they end: closed, by timeout, or unregistered.

use std::fs;

use serde_json::{Value, json};

use crate::stage::{Process, SOON, Stage, Transcript, Watcher, rounds, wait_for, wait_until};

/// The ends in the table: reason, time, payload.
fn ends(stage: &Stage) -> Vec<(String, String, Value)> {
    if stage.database().count() == 0 {
        return Vec::new();
    }
    let sql = "SELECT payload->>'reason', to_char(\"timestamp\" AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS'), payload
                 FROM events WHERE event_type = 'session_ended' ORDER BY id";
    let rows = stage.database().query(sql).into_iter();
    rows.map(|row| {
        let [reason, at, payload] = row.try_into().unwrap();
        (reason.unwrap(), at.unwrap(), serde_json::from_str(&payload.unwrap()).unwrap())
    })
    .collect()
}

fn reasons(stage: &Stage) -> Vec<String> {
    ends(stage).into_iter().map(|(reason, _, _)| reason).collect()
}

#[track_caller]
fn wait_for_ends(stage: &Stage, expected: &[&str]) {
    wait_until(&format!("the ends {expected:?}, there are {:?}", reasons(stage)), SOON, || reasons(stage) == expected);
}

fn with_timeout(seconds: &str) -> Stage {
    let mut stage = Stage::new();
    stage.set("file_watcher.polling_interval", "0.1");
    stage.set("file_watcher.inactivity_timeout", seconds);
    stage
}

/// A prompt at a time of its own, as `HH:MM` of one day or with the day before it.
fn say_at(transcript: &mut Transcript, text: &str, time: &str) {
    let time = if time.contains('T') { time.to_owned() } else { format!("2026-01-02T{time}:00") };
    let line = transcript.prompt(text).replace("2026-01-02T03:04:05.678Z", &format!("{time}.000Z"));
    transcript.append(line + "\n");
}

fn say_now(transcript: &mut Transcript, text: &str) {
    let now = jiff::Timestamp::now();
    let line = transcript.prompt(text).replace("2026-01-02T03:04:05.678Z", &format!("{now:.3}"));
    transcript.append(line + "\n");
}

#[test]
fn old_history_ends_once_at_the_time_it_ended_and_with_every_pause() {
    let stage = with_timeout("5400");
    let mut transcript = stage.transcript("-home-me-app", 1);
    say_at(&mut transcript, "morning", "08:00");
    say_at(&mut transcript, "still morning", "09:00");
    say_at(&mut transcript, "evening", "18:00");
    let metadata = r#"{"type":"custom-title","customTitle":"t","timestamp":"2026-01-05T00:00:00.000Z"}"#;
    transcript.append(metadata.to_owned() + "\n");
    stage.run_until_idle();
    let found = ends(&stage);
    assert_eq!(found.len(), 2, "{found:?}");
    assert_eq!((found[0].0.as_str(), found[0].1.as_str()), ("timeout", "2026-01-02 10:30:00"));
    assert_eq!((found[1].0.as_str(), found[1].1.as_str()), ("timeout", "2026-01-02 19:30:00"));
    assert_eq!(found[0].2["duration_seconds"], 3600);
    assert_eq!(found[1].2["duration_seconds"], 36_000);
    assert_eq!(found[1].2["last_activity_at"], "2026-01-02T18:00:00.000Z");
    // Neither starting again nor reading everything again ends them again.
    stage.run_until_idle();
    fs::remove_dir_all(stage.folder().join("data")).unwrap();
    stage.run_until_idle();
    assert_eq!(ends(&stage), found);
}

#[test]
fn a_session_that_comes_back_ends_again_whether_the_watcher_ran_or_not() {
    let stage = with_timeout("5400");
    let mut transcript = stage.transcript("-home-me-app", 1);
    say_at(&mut transcript, "one", "08:00");
    let watcher = stage.start();
    wait_for_ends(&stage, &["timeout"]);
    say_at(&mut transcript, "back", "12:00");
    wait_for_ends(&stage, &["timeout", "timeout"]);
    // Killed in the middle; meanwhile it comes back and ends twice.
    watcher.kill();
    say_at(&mut transcript, "back again", "16:00");
    say_at(&mut transcript, "and again", "20:00");
    stage.run_until_idle();
    let times: Vec<String> = ends(&stage).into_iter().map(|(_, at, _)| at).collect();
    let expected = ["2026-01-02 09:30:00", "2026-01-02 13:30:00", "2026-01-02 17:30:00", "2026-01-02 21:30:00"];
    assert_eq!(times, expected);
}

#[test]
fn a_live_session_times_out_by_what_is_said_not_by_metadata() {
    let stage = with_timeout("3");
    let mut transcript = stage.transcript("-home-me-app", 1);
    let _watcher = stage.start();
    say_now(&mut transcript, "one");
    stage.wait_for_rows(2);
    // Opened again and again, which is no activity.
    wait_for("its end", SOON, || {
        transcript.append("{\"type\":\"mode\",\"mode\":\"normal\"}\n");
        reasons(&stage).pop()
    });
    assert_eq!(reasons(&stage), ["timeout"]);
    say_now(&mut transcript, "two");
    wait_for_ends(&stage, &["timeout", "timeout"]);
}

#[test]
fn a_session_whose_process_is_gone_is_closed() {
    let stage = with_timeout("5400");
    let mut first = stage.transcript("-home-me-app", 1);
    let mut second = stage.transcript("-home-me-app", 2);
    say_now(&mut first, "one");
    say_now(&mut second, "two");
    let (crashed, left) =
        (Process::open(&stage, "sessions", &first.session), Process::open(&stage, "sessions", &second.session));
    let watcher = stage.start();
    stage.wait_for_rows(4);
    crashed.kill();
    wait_for_ends(&stage, &["closed"]);
    assert_eq!(ends(&stage)[0].2["session_uuid"], first.session.as_str());
    // Its file goes while nobody looks.
    watcher.kill();
    drop(left);
    stage.run_until_idle();
    wait_for_ends(&stage, &["closed", "closed"]);
    // Opened again it ends again, once something was said.
    let again = Process::open(&stage, "sessions", &first.session);
    say_now(&mut first, "three");
    let _watcher = stage.start();
    stage.wait_for_rows(7);
    assert_eq!(reasons(&stage).len(), 2);
    drop(again);
    wait_for_ends(&stage, &["closed", "closed", "closed"]);
}

#[test]
fn a_session_whose_transcript_is_removed_is_unregistered_also_while_nobody_looks() {
    let stage = with_timeout("5400");
    let mut first = stage.transcript("-home-me-app", 1);
    let mut second = stage.transcript("-home-me-app", 2);
    say_now(&mut first, "one");
    say_now(&mut second, "two");
    let watcher = stage.start();
    stage.wait_for_rows(4);
    fs::remove_file(&first.path).unwrap();
    wait_for_ends(&stage, &["unregistered"]);
    watcher.kill();
    fs::remove_file(&second.path).unwrap();
    stage.run_until_idle();
    wait_for_ends(&stage, &["unregistered", "unregistered"]);
    stage.run_until_idle();
    assert_eq!(reasons(&stage).len(), 2);
}

#[test]
fn a_copy_of_a_session_ends_none_of_the_pauses_that_it_inherited() {
    let stage = with_timeout("5400");
    let mut original = stage.transcript("-home-me-app", 1);
    let mut copy = stage.transcript("-home-me-app", 2);
    say_at(&mut original, "one", "08:00");
    say_at(&mut original, "two", "12:00");
    let opened = r#"{"type":"queue-operation","operation":"enqueue","timestamp":"2026-01-03T10:00:00.000Z"}"#;
    copy.append(opened.to_owned() + "\n");
    let history = fs::read_to_string(&original.path).unwrap();
    copy.append(history.replace(&original.session, &copy.session));
    say_at(&mut copy, "three", "2026-01-03T10:00:05");
    stage.run_until_idle();
    let found = ends(&stage);
    let of = |session: &str| found.iter().filter(|end| end.2["session_uuid"] == session).count();
    assert_eq!((of(&original.session), of(&copy.session)), (2, 1), "{found:?}");
    assert_eq!(
        found.iter().find(|end| end.2["session_uuid"] == copy.session.as_str()).unwrap().2["duration_seconds"],
        0
    );
    assert_eq!(stage.database().texts(), ["one", "two", "three"]);
    let registered = "SELECT payload->>'started_at' FROM events WHERE event_type = 'session_registered' ORDER BY id";
    let started: Vec<_> = stage.database().query(registered).into_iter().flatten().flatten().collect();
    assert_eq!(started, ["2026-01-02T08:00:00.000Z", "2026-01-03T10:00:05.000Z"]);
}

#[test]
fn a_transcript_of_metadata_only_registers_and_ends_nothing() {
    let stage = with_timeout("1");
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.append("{\"type\":\"summary\",\"summary\":\"s\",\"leafUuid\":\"x\"}\n");
    transcript.append("{\"type\":\"mode\",\"mode\":\"normal\"}\n");
    let mut empty = stage.transcript("-home-me-app", 2);
    empty.append("");
    stage.run_until_idle();
    fs::remove_file(&transcript.path).unwrap();
    stage.run_until_idle();
    assert_eq!(stage.database().count(), 0);
}

/// Runs Claude Code's SessionEnd hook for the session.
fn end_by_hook(stage: &Stage, transcript: &Transcript) {
    let input = json!({"session_id": transcript.session, "cwd": "/home/me/app", "hook_event_name": "SessionEnd",
                       "reason": "prompt_input_exit"});
    assert_eq!(stage.run_with_input(&["hook"], input.to_string()).code(), 0);
}

#[test]
fn a_session_end_hook_closes_its_session_once_whether_the_watcher_runs_or_not() {
    let mut stage = with_timeout("5400");
    let mut transcript = stage.transcript("-home-me-app", 1);
    say_now(&mut transcript, "one");
    let watcher = stage.start();
    stage.wait_for_rows(2);
    end_by_hook(&stage, &transcript);
    wait_for_ends(&stage, &["closed"]);
    // The same hook from another settings file, and state that is written at the end: no second end.
    end_by_hook(&stage, &transcript);
    transcript.append("{\"type\":\"last-prompt\",\"lastPrompt\":\"one\"}\n");
    stage.wait_for_rows(5);
    // It comes back, and is closed while nobody looks.
    say_now(&mut transcript, "two");
    stage.wait_for_rows(6);
    watcher.kill();
    end_by_hook(&stage, &transcript);
    stage.run_until_idle();
    assert_eq!(reasons(&stage), ["closed", "closed"], "idle means that the end was told, too");
    // Back again; the watcher dies when the hook is in its queue and the end was not told yet.
    say_now(&mut transcript, "three");
    stage.run_until_idle();
    stage.environment.insert("HEADSPACE_FAULT_POINT".to_owned(), "commit-synced:1".to_owned());
    let mut watcher = stage.start();
    end_by_hook(&stage, &transcript);
    watcher.wait();
    assert_eq!(reasons(&stage).len(), 2);
    stage.environment.remove("HEADSPACE_FAULT_POINT");
    stage.run_until_idle();
    stage.run_until_idle();
    let found = ends(&stage);
    assert_eq!(reasons(&stage), ["closed", "closed", "closed"], "{found:?}");
    let activities: std::collections::BTreeSet<String> =
        found.iter().map(|end| end.2["last_activity_at"].to_string()).collect();
    assert_eq!(activities.len(), 3, "each end is that of another stretch of activity: {found:?}");
    assert_eq!(stage.database().value("SELECT count(*) FROM events WHERE event_type = 'session_registered'"), "1");
}

#[test]
fn a_session_is_registered_once_with_the_working_directory_that_its_lines_name() {
    let stage = with_timeout("3153600000");
    // The name of the folder stands for many paths.
    let mut transcript = stage.transcript("-home-me-my-app", 1);
    transcript.append("{\"type\":\"summary\",\"summary\":\"s\",\"leafUuid\":\"x\"}\n");
    let at = |transcript: &Transcript, text: &str, cwd: &str| {
        transcript.prompt(text).replace("/home/me/app", cwd).replace("\"main\"", "\"fix/login\"") + "\n"
    };
    let line = transcript.prompt("from nowhere").replace("\"cwd\":\"/home/me/app\",", "");
    assert!(!line.contains("cwd"));
    transcript.append(line + "\n");
    stage.run_until_idle();
    assert_eq!(stage.database().count(), 1, "where it runs is not known yet");
    let line = at(&transcript, "one", "/home/me/my_app");
    transcript.append(line);
    let watcher = stage.start();
    stage.wait_for_rows(3);
    watcher.kill();
    let line = at(&transcript, "two", "/home/me/my_app/src");
    transcript.append(line);
    stage.run_until_idle();
    // Read from the start, too.
    fs::remove_dir_all(stage.folder().join("data")).unwrap();
    stage.run_until_idle();
    let rows = stage.database().query("SELECT payload FROM events WHERE event_type = 'session_registered'");
    let payloads: Vec<Value> =
        rows.into_iter().map(|mut row| serde_json::from_str(&row.remove(0).unwrap()).unwrap()).collect();
    assert_eq!(
        payloads,
        [json!({
            "agent": "claude-code", "session_uuid": transcript.session, "project_path": "/home/me/my_app",
            "working_directory": "/home/me/my_app", "git_branch": "fix/login",
            "transcript_path": transcript.path.to_str().unwrap(), "started_at": "2026-01-02T03:04:05.678Z",
        })]
    );
    let places = "SELECT payload->>'project_path', payload->>'working_directory' FROM events
                   WHERE payload->>'text' = 'two'";
    let places = stage.database().query(places).remove(0);
    assert_eq!(places.into_iter().flatten().collect::<Vec<_>>(), ["/home/me/my_app", "/home/me/my_app/src"]);
}

/// Waits until the folder was looked at so many more times.
#[track_caller]
fn wait_for_rescans(watcher: &Watcher, more: u64) {
    let rescans = || {
        let (_, page) = watcher.get("/metrics").unwrap();
        let lines = page.lines().filter(|line| line.starts_with("headspace_watcher_rescans_total{"));
        lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok()).sum::<u64>()
    };
    let before = rescans();
    wait_until(&format!("{more} rescans"), SOON, || rescans() >= before + more);
}

/// A session with a turn that is stored, open in a process, and the watcher that has read it.
fn running_session() -> (Stage, Transcript, Process, Watcher) {
    let stage = with_timeout("5400");
    let mut transcript = stage.transcript("-home-me-app", 1);
    say_now(&mut transcript, "one");
    let process = Process::open(&stage, "sessions", &transcript.session);
    let watcher = stage.start();
    stage.wait_for_rows(2);
    (stage, transcript, process, watcher)
}

#[test]
fn process_files_that_can_not_be_read_end_no_session() {
    let (stage, _transcript, process, watcher) = running_session();
    wait_for_rescans(&watcher, 2);
    let folder = stage.folder().join("sessions");
    let text = fs::read(&process.file).unwrap();
    // Longer than a missing file needs to count as gone.
    fs::rename(&folder, stage.folder().join("sessions.away")).unwrap();
    wait_for_rescans(&watcher, 15);
    fs::rename(stage.folder().join("sessions.away"), &folder).unwrap();
    for bytes in ["", "{\"pid\":"] {
        fs::write(&process.file, bytes).unwrap();
        wait_for_rescans(&watcher, 15);
    }
    fs::write(&process.file, text).unwrap();
    wait_for_rescans(&watcher, 2);
    assert_eq!(reasons(&stage), [""; 0]);
    // Also a watcher that has not seen them whole.
    watcher.kill();
    fs::write(&process.file, "").unwrap();
    let watcher = stage.start();
    wait_for_rescans(&watcher, 15);
    assert_eq!(reasons(&stage), [""; 0]);
    process.kill();
    wait_for_ends(&stage, &["closed"]);
}

#[test]
fn a_process_file_that_is_written_again_and_again_ends_no_session() {
    let (stage, mut transcript, process, watcher) = running_session();
    let text = fs::read(&process.file).unwrap();
    let is_done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // In place, as Claude Code does it, and with an empty moment in between.
            while !is_done.load(std::sync::atomic::Ordering::Relaxed) {
                fs::write(&process.file, &text).unwrap();
            }
        });
        for turn in 0..rounds(20) {
            say_now(&mut transcript, &format!("turn {turn}"));
            wait_for_rescans(&watcher, 1);
        }
        is_done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(reasons(&stage), [""; 0]);
}

#[test]
fn a_session_is_closed_when_its_process_goes_on_without_its_file() {
    let (stage, transcript, process, watcher) = running_session();
    wait_for_rescans(&watcher, 2);
    // Modified before its file went, to the second.
    let earlier = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
    fs::File::options().append(true).open(&transcript.path).unwrap().set_modified(earlier).unwrap();
    fs::remove_file(&process.file).unwrap();
    wait_for_ends(&stage, &["closed"]);
    // Also from a run that ends when it is idle.
    let mut transcript = stage.transcript("-home-me-app", 2);
    say_now(&mut transcript, "two");
    let process = Process::open(&stage, "sessions", &transcript.session);
    stage.wait_for_rows(5);
    wait_for_rescans(&watcher, 2);
    watcher.kill();
    fs::remove_file(&process.file).unwrap();
    stage.run_until_idle();
    assert_eq!(reasons(&stage), ["closed", "closed"]);
}

#[test]
fn a_time_in_the_future_keeps_no_session_alive() {
    let stage = with_timeout("5400");
    let mut first = stage.transcript("-home-me-app", 1);
    say_at(&mut first, "from the future", "9998-12-30T23:59:59");
    say_now(&mut first, "one");
    let process = Process::open(&stage, "sessions", &first.session);
    let watcher = stage.start();
    stage.wait_for_rows(3);
    wait_for_rescans(&watcher, 2);
    process.kill();
    wait_for_ends(&stage, &["closed"]);
    let late =
        "SELECT count(*) FROM events WHERE event_type <> 'turn_detected' AND \"timestamp\" > now() + interval '1 min'";
    assert_eq!(stage.database().value(late), "0");
}

#[test]
fn a_time_that_is_a_day_ahead_ends_its_session_in_time() {
    let stage = with_timeout("2");
    let mut transcript = stage.transcript("-home-me-app", 1);
    let tomorrow = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(24);
    say_at(&mut transcript, "one", &tomorrow.strftime("%Y-%m-%dT%H:%M:%S").to_string());
    let _watcher = stage.start();
    wait_for_ends(&stage, &["timeout"]);
}

#[test]
fn a_time_of_modification_that_was_set_makes_no_difference() {
    let stage = with_timeout("5400");
    let mut transcript = stage.transcript("-home-me-app", 1);
    say_at(&mut transcript, "one", "08:00");
    say_at(&mut transcript, "two", "09:00");
    // As in archives that are made to be the same each time.
    let file = fs::File::options().append(true).open(&transcript.path).unwrap();
    file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1)).unwrap();
    stage.run_until_idle();
    let found = ends(&stage);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((found[0].1.as_str(), &found[0].2["duration_seconds"]), ("2026-01-02 10:30:00", &json!(3600)));
}

#[test]
fn a_last_line_without_newline_is_no_second_end() {
    let stage = with_timeout("5400");
    let watcher = stage.start();
    let mut transcript = stage.transcript("-home-me-app", 1);
    let at = |transcript: &Transcript, text: &str, time: &str| {
        transcript.prompt(text).replace("2026-01-02T03:04:05.678Z", &format!("2026-01-02T{time}:00.000Z"))
    };
    let lines = format!("{}\n{}", at(&transcript, "one", "08:00"), at(&transcript, "two", "09:00"));
    transcript.append(lines);
    stage.wait_for_rows(4);
    wait_for_rescans(&watcher, 3);
    let found = ends(&stage);
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].2["last_activity_at"], "2026-01-02T09:00:00.000Z");
}

#[test]
fn a_session_end_hook_counts_though_a_turn_before_it_has_a_later_time() {
    let stage = with_timeout("5400");
    let mut transcript = stage.transcript("-home-me-app", 1);
    let later = jiff::Timestamp::now() + jiff::SignedDuration::from_mins(5);
    say_at(&mut transcript, "one", &later.strftime("%Y-%m-%dT%H:%M:%S").to_string());
    let watcher = stage.start();
    stage.wait_for_rows(2);
    end_by_hook(&stage, &transcript);
    wait_for_ends(&stage, &["closed"]);
    // Nobody looks.
    let later = jiff::Timestamp::now() + jiff::SignedDuration::from_mins(9);
    watcher.kill();
    say_at(&mut transcript, "two", &later.strftime("%Y-%m-%dT%H:%M:%S").to_string());
    end_by_hook(&stage, &transcript);
    stage.run_until_idle();
    assert_eq!(reasons(&stage), ["closed", "closed"]);
}

#[test]
fn a_session_end_hook_and_what_comes_with_it_are_one_end() {
    let mut stage = with_timeout("5400");
    // A transcript that has nothing but a line without newline.
    let mut first = stage.transcript("-home-me-app", 1);
    let watcher = stage.start();
    let now = jiff::Timestamp::now();
    let line = first.prompt("one").replace("2026-01-02T03:04:05.678Z", &format!("{now:.3}"));
    first.append(line);
    end_by_hook(&stage, &first);
    wait_for_ends(&stage, &["closed"]);
    assert_eq!(stage.database().texts(), ["one"]);
    assert_eq!(ends(&stage)[0].2["last_activity_at"], format!("{now:.3}"));
    watcher.kill();
    // One that is removed as its hook comes.
    let mut second = stage.transcript("-home-me-app", 2);
    say_now(&mut second, "two");
    stage.run_until_idle();
    stage.set("file_watcher.polling_interval", "1");
    let _watcher = stage.start();
    fs::remove_file(&second.path).unwrap();
    end_by_hook(&stage, &second);
    wait_until("its end", SOON, || reasons(&stage).len() >= 2);
    let found = ends(&stage);
    assert_eq!(found.len(), 2, "{found:?}");
}

#[test]
fn while_the_projects_folder_is_unmounted_sessions_end_by_hook_and_process() {
    let stage = with_timeout("5400");
    let (mut first, mut second) = (stage.transcript("-home-me-app", 1), stage.transcript("-home-me-app", 2));
    say_now(&mut first, "one");
    say_now(&mut second, "two");
    let process = Process::open(&stage, "sessions", &first.session);
    let watcher = stage.start();
    stage.wait_for_rows(4);
    wait_for_rescans(&watcher, 2);
    fs::rename(first.path.parent().unwrap(), stage.folder().join("unmounted")).unwrap();
    watcher.wait_for_log("the transcripts folder is empty");
    process.kill();
    wait_for_ends(&stage, &["closed"]);
    watcher.kill();
    end_by_hook(&stage, &second);
    stage.run_until_idle();
    assert_eq!(reasons(&stage), ["closed", "closed"]);
}

#[test]
fn an_unmounted_projects_folder_ends_no_session() {
    let stage = with_timeout("5400");
    let mut transcript = stage.transcript("-home-me-app", 1);
    say_now(&mut transcript, "one");
    let watcher = stage.start();
    stage.wait_for_rows(2);
    // What is left is the empty folder below the mount.
    let folder = transcript.path.parent().unwrap().to_owned();
    fs::rename(&folder, stage.folder().join("unmounted")).unwrap();
    wait_for_rescans(&watcher, 5);
    watcher.kill();
    let watcher = stage.start();
    wait_for_rescans(&watcher, 5);
    assert_eq!(reasons(&stage), [""; 0]);
    fs::rename(stage.folder().join("unmounted"), &folder).unwrap();
    say_now(&mut transcript, "two");
    stage.wait_for_rows(3);
    assert_eq!(stage.database().texts(), ["one", "two"]);
    fs::remove_file(&transcript.path).unwrap();
    wait_for_ends(&stage, &["unregistered"]);
}
