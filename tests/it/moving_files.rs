//! Files that move: cut, replaced, removed, restored, linked, locked, many, fast, and without notifications. Whatever
//! happens to them, each turn is a row once.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::stage::{SOON, Stage, Transcript, Watcher, is_root, lacks, lacks_proc, pause, resume, wait_until};

/// The texts of all turns, whatever their order.
fn texts(stage: &Stage) -> BTreeSet<String> {
    let texts = stage.database().texts();
    let set: BTreeSet<String> = texts.iter().cloned().collect();
    assert_eq!(set.len(), texts.len(), "a turn is there twice: {texts:?}");
    set
}

#[track_caller]
fn wait_for_texts(stage: &Stage, expected: &[&str]) {
    let expected: BTreeSet<String> = expected.iter().map(|text| (*text).to_owned()).collect();
    wait_until(&format!("the turns {expected:?}"), SOON, || stage.database().count() > 0 && texts(stage) == expected);
}

/// As [`wait_for_texts`], by what waits in the queue of a watcher that has no database.
#[track_caller]
fn wait_for_queued(stage: &Stage, expected: &[&str]) {
    let expected: BTreeSet<&str> = expected.iter().copied().collect();
    wait_until(&format!("the turns {expected:?} in the queue"), SOON, || {
        let lines = stage.run(&["queue-dump", "--type", "turn_detected", "--payload"]).lines();
        let texts: BTreeSet<&str> = lines.iter().map(|line| line["payload"]["text"].as_str().unwrap()).collect();
        texts == expected && lines.len() == texts.len()
    });
}

fn size(transcript: &Transcript) -> u64 {
    fs::metadata(&transcript.path).unwrap().len()
}

/// Lets everything happen at once for a watcher that is asleep meanwhile.
fn while_asleep(watcher: &Watcher, change: impl FnOnce()) {
    pause(watcher.pid());
    change();
    resume(watcher.pid());
}

/// The number behind a name in the watcher's metrics.
fn metric(watcher: &Watcher, name: &str) -> u64 {
    let (_, page) = watcher.get("/metrics").unwrap();
    let line = page.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.rsplit_once(' ')).map_or(0, |(_, number)| number.parse().unwrap())
}

#[test]
fn a_transcript_cut_short_in_place_goes_on() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    transcript.say("two");
    let end = size(&transcript);
    transcript.say("taken back");
    let _watcher = stage.start();
    wait_for_texts(&stage, &["one", "two", "taken back"]);
    OpenOptions::new().write(true).open(&transcript.path).unwrap().set_len(end).unwrap();
    transcript.say("three");
    wait_for_texts(&stage, &["one", "two", "taken back", "three"]);
}

#[test]
fn a_transcript_cut_short_and_grown_past_where_it_was_is_read_anew() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    let end = size(&transcript);
    transcript.say("taken back");
    let watcher = stage.start();
    wait_for_texts(&stage, &["one", "taken back"]);
    while_asleep(&watcher, || {
        OpenOptions::new().write(true).open(&transcript.path).unwrap().set_len(end).unwrap();
        transcript.say("something much longer than what was there before");
        transcript.say("three");
    });
    wait_for_texts(&stage, &["one", "taken back", "something much longer than what was there before", "three"]);
}

#[test]
fn a_partial_line_that_was_taken_back_hides_no_line() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    let end = size(&transcript);
    let watcher = stage.start();
    wait_for_texts(&stage, &["one"]);
    let partial = transcript.prompt(&"never finished ".repeat(100));
    transcript.append(partial.trim_end_matches('}'));
    // It has been looked at: later lines of another file are there.
    let mut other = stage.transcript("-home-me-app", 2);
    other.say("other");
    wait_for_texts(&stage, &["one", "other"]);
    while_asleep(&watcher, || {
        OpenOptions::new().write(true).open(&transcript.path).unwrap().set_len(end).unwrap();
        transcript.say("two");
        let rest = "{\"type\":\"user\",".to_owned() + &" ".repeat(partial.len());
        transcript.append(rest);
    });
    wait_for_texts(&stage, &["one", "other", "two"]);
}

#[test]
fn a_transcript_replaced_by_rename_is_read_anew() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    transcript.say("two");
    let _watcher = stage.start();
    wait_for_texts(&stage, &["one", "two"]);
    let rewritten = transcript.path.with_extension("new");
    let lines = transcript.prompt("one") + "\n" + &transcript.prompt("two, rewritten") + "\n";
    fs::write(&rewritten, lines + &transcript.prompt("three") + "\n").unwrap();
    fs::rename(&rewritten, &transcript.path).unwrap();
    wait_for_texts(&stage, &["one", "two", "two, rewritten", "three"]);
    transcript.say("four");
    wait_for_texts(&stage, &["one", "two", "two, rewritten", "three", "four"]);
}

#[test]
fn a_new_transcript_with_the_inode_of_an_old_one_is_read_from_its_start() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    let watcher = stage.start();
    wait_for_texts(&stage, &["one"]);
    let inode = fs::metadata(&transcript.path).unwrap().ino();
    let mut reused = false;
    while_asleep(&watcher, || {
        fs::remove_file(&transcript.path).unwrap();
        for _ in 0..100 {
            let mut new = stage.transcript("-home-me-app", 1);
            new.say("another, and longer than the first");
            new.say("and one more");
            reused = fs::metadata(&new.path).unwrap().ino() == inode;
            if reused {
                break;
            }
            fs::rename(&new.path, stage.folder().join(format!("kept-{}", fs::metadata(&new.path).unwrap().ino())))
                .unwrap();
        }
        if !reused {
            let mut new = stage.transcript("-home-me-app", 1);
            new.say("another, and longer than the first");
            new.say("and one more");
        }
    });
    if !reused {
        eprintln!("this file system does not use inodes again: tested with another inode");
    }
    wait_for_texts(&stage, &["one", "another, and longer than the first", "and one more"]);
}

#[test]
fn a_transcript_removed_and_made_again_is_followed_again() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    let watcher = stage.start();
    wait_for_texts(&stage, &["one"]);
    fs::remove_file(&transcript.path).unwrap();
    wait_until("it is forgotten", SOON, || watcher.health()["watcher"]["files"] == 0);
    transcript.say("two");
    wait_for_texts(&stage, &["one", "two"]);
}

#[test]
fn a_transcript_moved_to_another_project_goes_on_where_it_was() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say_many("line", 20);
    let mut other = stage.transcript("-home-me-other", 2);
    other.say("other");
    let watcher = stage.start();
    stage.wait_for_rows(23);
    let moved = stage.transcript("-home-me-other", 1);
    fs::rename(&transcript.path, &moved.path).unwrap();
    let mut moved = moved;
    moved.say("after the move");
    stage.wait_for_rows(24);
    watcher.stop();
    // Also while nobody looks.
    fs::create_dir_all(stage.projects().join("-third")).unwrap();
    let mut third = stage.transcript("-third", 1);
    fs::rename(&moved.path, &third.path).unwrap();
    third.say("after another move");
    stage.run_until_idle();
    assert_eq!(stage.database().texts().last().unwrap(), "after another move");
    assert_eq!(stage.database().count(), 25, "no end of a session among them");
    let again = "SELECT count(*) FROM event_receipts WHERE seen_again_at IS NOT NULL";
    assert_eq!(stage.database().value(again), "0", "it was read anew");
}

#[test]
fn links_are_followed_and_lead_nobody_astray() {
    let mut stage = Stage::new();
    let elsewhere = stage.folder().join("elsewhere");
    fs::create_dir_all(elsewhere.join("projects/-linked-file")).unwrap();
    fs::create_dir(elsewhere.join("project")).unwrap();
    // The projects folder itself, a project, and a transcript.
    symlink(elsewhere.join("projects"), stage.folder().join("link")).unwrap();
    symlink(elsewhere.join("project"), elsewhere.join("projects/-linked-project")).unwrap();
    let place = |mut transcript: Transcript, folder: &Path| {
        transcript.path = folder.join(transcript.path.file_name().unwrap());
        transcript
    };
    let mut in_project = place(stage.transcript("-", 1), &elsewhere.join("project"));
    let mut file = place(stage.transcript("-", 2), &elsewhere);
    in_project.say("in a linked project");
    file.say("in a linked file");
    symlink(&file.path, elsewhere.join("projects/-linked-file").join(file.path.file_name().unwrap())).unwrap();
    // In a circle, to nowhere, and to something that is no file.
    symlink(elsewhere.join("projects"), elsewhere.join("projects/-circle")).unwrap();
    let nowhere = stage.transcript("-", 3);
    symlink("/nowhere", elsewhere.join("projects/-linked-file").join(nowhere.path.file_name().unwrap())).unwrap();
    let pipe = place(stage.transcript("-", 4), &elsewhere.join("project"));
    assert!(Command::new("mkfifo").arg(&pipe.path).status().unwrap().success());
    let link = stage.folder().join("link").display().to_string();
    stage.set("claude.projects_path", &link);
    stage.set("file_watcher.polling_interval", "0.2");
    let watcher = stage.start();
    wait_for_texts(&stage, &["in a linked project", "in a linked file"]);
    in_project.say("one more in a linked project");
    file.say("one more in a linked file");
    wait_for_texts(
        &stage,
        &["in a linked project", "in a linked file", "one more in a linked project", "one more in a linked file"],
    );
    // What is gone is noticed all the same.
    fs::remove_file(&in_project.path).unwrap();
    wait_until("it is forgotten", SOON, || watcher.health()["watcher"]["files"] == 1);
}

#[test]
fn permission_taken_away_and_given_back_loses_nothing_and_is_said_once() {
    let mut stage = Stage::with(None);
    stage.set("file_watcher.polling_interval", "0.2");
    if is_root() {
        if lacks("setpriv", Command::new("setpriv").arg("--version").output().is_ok()) {
            return;
        }
        let wanted = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"];
        stage.wrapped_by = wanted.map(str::to_owned).to_vec();
    }
    let mut transcript = stage.transcript("-home-me-app", 1);
    let mut other = stage.transcript("-home-me-locked", 2);
    transcript.say("one");
    other.say("other one");
    let watcher = stage.start();
    wait_for_queued(&stage, &["one", "other one"]);
    let folder = other.path.parent().unwrap().to_owned();
    while_asleep(&watcher, || {
        transcript.say("two");
        other.say("other two");
        fs::set_permissions(&transcript.path, Permissions::from_mode(0o000)).unwrap();
        fs::set_permissions(&folder, Permissions::from_mode(0o000)).unwrap();
    });
    watcher.wait_for_log("a transcript can't be read");
    watcher.wait_for_log("a folder can't be read");
    let mut third = stage.transcript("-home-me-app", 3);
    third.say("meanwhile");
    wait_for_queued(&stage, &["one", "other one", "meanwhile"]);
    fs::set_permissions(&transcript.path, Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(&folder, Permissions::from_mode(0o700)).unwrap();
    wait_for_queued(&stage, &["one", "other one", "meanwhile", "two", "other two"]);
    for said in ["a transcript can't be read", "a folder can't be read", "can be read again"] {
        watcher.wait_for_log(said);
    }
    let said = watcher.logged("a transcript can't be read");
    let own = said.iter().filter(|line| line["file"] == transcript.path.to_str().unwrap());
    assert_eq!(own.count(), 1, "once for each file");
    assert_eq!(watcher.logged("a folder can't be read").len(), 1);
    assert_eq!(watcher.health()["watcher"]["files"], 3, "none was taken for removed");
}

#[test]
fn the_projects_folder_may_be_missing_appear_go_and_come_back() {
    let mut stage = Stage::new();
    stage.set("file_watcher.polling_interval", "0.2");
    fs::remove_dir(stage.projects()).unwrap();
    let watcher = stage.start();
    watcher.wait_for_log("the transcripts folder can't be read");
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    wait_for_texts(&stage, &["one"]);
    let away = stage.folder().join("away");
    fs::rename(stage.projects(), &away).unwrap();
    wait_until("it is missed", SOON, || watcher.logged("the transcripts folder can't be read").len() == 2);
    assert_eq!(watcher.health()["watcher"]["files"], 1, "a folder that is away says nothing about its files");
    fs::rename(&away, stage.projects()).unwrap();
    transcript.say("two");
    wait_for_texts(&stage, &["one", "two"]);
    // The file may have been read before the folder was looked at.
    wait_until("it is found again", SOON, || watcher.logged("the transcripts folder is there").len() == 2);
    // Removed with all that is in it, and made anew.
    fs::remove_dir_all(stage.projects()).unwrap();
    wait_until("it is missed", SOON, || watcher.logged("the transcripts folder can't be read").len() == 3);
    transcript.say("three");
    wait_for_texts(&stage, &["one", "two", "three"]);
    // Notified again, not only found by rescans.
    let before = metric(&watcher, "headspace_watcher_rescans_total{cause=\"new_folder\"}");
    let mut number = 2;
    wait_until("a notification", SOON, || {
        // The rescan that comes anyway may be the first to see it.
        stage.transcript(&format!("-new-{number}"), number).say("four");
        number += 1;
        std::thread::sleep(Duration::from_millis(100));
        metric(&watcher, "headspace_watcher_rescans_total{cause=\"new_folder\"}") > before
    });
}

/// Kilobytes of a process's own memory: without the program's pages, which are many in a debug build.
fn own_kilobytes(watcher: &Watcher) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", watcher.pid())).unwrap();
    let own = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    own.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn ten_thousand_transcripts_are_followed_in_little_memory() {
    if lacks_proc() {
        return;
    }
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-project-50", 1);
    transcript.say("one");
    let watcher = stage.start();
    wait_for_texts(&stage, &["one"]);
    let before = own_kilobytes(&watcher);
    for project in 0..100 {
        let folder = stage.projects().join(format!("-home-me-project-{project}"));
        fs::create_dir_all(&folder).unwrap();
        for number in 0..100 {
            let session = format!("{:08x}-0000-4000-8000-000000000000", 1000 + project * 100 + number);
            let line = "{\"type\":\"summary\",\"summary\":\"what it was about\",\"leafUuid\":\"x\"}\n";
            fs::write(folder.join(session).with_extension("jsonl"), line).unwrap();
        }
    }
    wait_until("all are followed", SOON, || watcher.health()["watcher"]["lines"] == 10_001);
    let begun = Instant::now();
    transcript.say("two");
    wait_for_texts(&stage, &["one", "two"]);
    assert!(begun.elapsed() < Duration::from_secs(5), "after {:?}", begun.elapsed());
    let more = own_kilobytes(&watcher).saturating_sub(before);
    eprintln!("10,000 transcripts take {more} kB");
    assert!(more < 20_000, "{more} kB");
    watcher.stop();
    // Started again it knows where it was.
    transcript.say("three");
    let watcher = stage.start();
    wait_for_texts(&stage, &["one", "two", "three"]);
    assert_eq!(watcher.health()["watcher"]["lines"], 1);
}

#[test]
fn a_transcript_that_grows_fast_is_read_whole_and_holds_up_no_other() {
    let stage = Stage::new();
    let fast = stage.transcript("-home-me-app", 1);
    let mut slow = stage.transcript("-home-me-app", 2);
    let mut seed = fast.clone();
    seed.say("first");
    slow.say("slow first");
    let watcher = stage.start();
    wait_for_texts(&stage, &["first", "slow first"]);
    // 100 MB within two seconds: mostly what tools gave back, a prompt now and then.
    let noise = format!(
        "{{\"type\":\"user\",\"message\":{{\"content\":[{{\"type\":\"tool_result\",\"content\":\"{}\"}}]}}}}\n",
        "x".repeat(100_000)
    );
    let begun = Instant::now();
    let mut expected = vec!["first".to_owned(), "slow first".to_owned(), "slow second".to_owned()];
    let mut file = OpenOptions::new().append(true).open(&fast.path).unwrap();
    for second in 0..20 {
        if second == 10 {
            slow.say("slow second");
        }
        for _ in 0..50 {
            file.write_all(noise.as_bytes()).unwrap();
        }
        let text = format!("prompt {second}");
        file.write_all((fast.prompt(&text) + "\n").as_bytes()).unwrap();
        expected.push(text);
        let due = begun + Duration::from_millis(100) * (second + 1);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
    wait_for_texts(&stage, &expected);
    assert_eq!(watcher.health()["watcher"]["bad_lines"], 0);
    let order = stage.database().texts();
    let slow_at = order.iter().position(|text| text == "slow second").unwrap();
    assert!(slow_at + 1 < order.len(), "it had to wait for all of the fast one: {order:?}");
}

#[test]
fn an_overflow_of_notifications_leads_to_a_rescan() {
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events");
    if lacks("inotify", limit.is_ok()) {
        return;
    }
    let limit = limit.unwrap();
    let mut stage = Stage::new();
    // Nothing is found by the clock here.
    stage.set("file_watcher.polling_interval", "60");
    let mut one = stage.transcript("-home-me-app", 1);
    let mut two = stage.transcript("-home-me-app", 2);
    one.say("one");
    two.say("two");
    let watcher = stage.start();
    wait_for_texts(&stage, &["one", "two"]);
    while_asleep(&watcher, || {
        // Each write is opened, changed and closed; equal notifications in a row would be joined.
        let writes = limit.trim().parse::<u32>().unwrap() / 6 + 500;
        for _ in 0..writes {
            one.append("\n");
            two.append("\n");
        }
        let mut three = stage.transcript("-home-me-app", 3);
        three.say("born when nothing was notified any more");
    });
    wait_for_texts(&stage, &["one", "two", "born when nothing was notified any more"]);
    wait_until("it is counted", SOON, || metric(&watcher, "headspace_watcher_rescans_total{cause=\"overflow\"}") > 0);
}

/// Runs the watcher under a limit of its own on inotify; `None` where the system does not let us.
fn with_inotify_limit(stage: &mut Stage, limit: &str, value: u32) -> Option<()> {
    let script = format!("echo {value} > /proc/sys/user/{limit} && exec \"$@\"");
    let wrapper = ["unshare", "--user", "--map-root-user", "sh", "-c", &script, "sh"].map(str::to_owned).to_vec();
    let (program, arguments) = wrapper.split_first().unwrap();
    let works = Command::new(program).args(arguments).arg("true").output().is_ok_and(|output| output.status.success());
    if lacks("a user namespace", works) {
        return None;
    }
    stage.wrapped_by = wrapper;
    stage.set("file_watcher.polling_interval", "0.2");
    Some(())
}

#[test]
fn when_the_limit_of_watches_is_reached_rescans_find_the_rest_and_it_says_so_once() {
    let mut stage = Stage::with(None);
    let Some(()) = with_inotify_limit(&mut stage, "max_inotify_watches", 3) else { return };
    let mut transcripts: Vec<Transcript> =
        (1..=6).map(|number| stage.transcript(&format!("-home-me-{number}"), number)).collect();
    transcripts.iter_mut().for_each(|transcript| transcript.say("first"));
    let watcher = stage.start();
    wait_until("the first of each", SOON, || watcher.health()["queue"]["pending"] == 12);
    transcripts.iter_mut().for_each(|transcript| transcript.say("second"));
    wait_until("the second of each", SOON, || watcher.health()["queue"]["pending"] == 18);
    stage.transcript("-home-me-new", 7).say("in a new folder");
    wait_until("one in a new folder", SOON, || watcher.health()["queue"]["pending"] == 20);
    assert_eq!(watcher.logged("file notifications fail").len(), 1);
}

#[test]
fn without_any_notifications_lines_are_found_by_rescanning() {
    let mut stage = Stage::with(None);
    let Some(()) = with_inotify_limit(&mut stage, "max_inotify_instances", 0) else { return };
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    let watcher = stage.start();
    wait_for_queued(&stage, &["one"]);
    transcript.say("two");
    wait_for_queued(&stage, &["one", "two"]);
    assert_eq!(watcher.logged("file notifications fail").len(), 1);
}

#[test]
fn changes_of_which_no_notification_comes_are_found_as_on_a_network() {
    let mut stage = Stage::new();
    stage.set("file_watcher.polling_interval", "0.2");
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    // What is written under another name in another folder is not notified under this one.
    let other_name = stage.folder().join("other-name");
    fs::hard_link(&transcript.path, &other_name).unwrap();
    let _watcher = stage.start();
    wait_for_texts(&stage, &["one"]);
    let line = transcript.prompt("two") + "\n";
    OpenOptions::new().append(true).open(&other_name).unwrap().write_all(line.as_bytes()).unwrap();
    wait_for_texts(&stage, &["one", "two"]);
}
