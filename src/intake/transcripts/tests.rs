//! However a file comes to be, and however often whoever reads it is stopped or killed, it is read the same.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;

use jiff::SignedDuration;
use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::event::{DeadContent, Envelope, EventId, Origin, Sequence, SessionState};
use crate::intake::redact::Redactor;
use crate::intake::schema::Schemas;
use crate::queue::tests::rounds;
use crate::queue::{Outcome as Settled, Queue, QueueConfig};
use crate::telemetry::Metrics;

const SESSION: &str = "00000001-0000-4000-8000-000000000000";

/// Longer lines are passed over.
const LINE_BYTES_MAX: u64 = 1500;

/// What happens between two reads, beside the bytes that come.
#[derive(Clone, Copy, Debug)]
enum Op {
    /// So many more bytes are written.
    Append(usize),
    /// All up to the next end of a line is written, but for so many bytes: where a place is easily missed by one.
    AppendAlmostToEnd(usize),
    /// Somebody rang.
    Look,
    Rescan,
    /// It ends as it does when it is told to, and starts again.
    Stop,
    /// It ends with batches under way and with cursors that are not put down.
    Kill,
    /// As `Stop`, and the queue is closed and opened too.
    Reopen,
}

/// A transcript that grows, and who reads it.
struct Scene {
    folder: TempDir,
    chunk_bytes: usize,
    queue: Queue,
    /// `None` only while it is being started anew.
    follower: Option<Follower>,
}

/// What was read, without what is different each time: sequence numbers and inodes.
#[derive(PartialEq, Eq, Debug)]
struct Outcome {
    /// By identity, which the receipts go by: what was read twice counts once.
    events: Vec<(EventId, String, String, u64)>,
    /// Offset and bytes of what is no record.
    lost: BTreeSet<(u64, Vec<u8>)>,
    cursors: Vec<(u64, u64, Option<Arc<str>>, SessionState)>,
}

impl Scene {
    fn new(chunk_bytes: usize) -> Scene {
        let folder = TempDir::new().unwrap();
        std::fs::create_dir_all(folder.path().join("projects/-p")).unwrap();
        let queue = open(folder.path());
        let mut scene = Scene { folder, chunk_bytes, queue, follower: None };
        scene.start();
        scene
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("projects/-p").join(format!("{SESSION}.jsonl"))
    }

    /// One that has read nothing yet.
    fn follower(&self) -> Follower {
        let schemas = Schemas::load(None, 1 << 24).unwrap();
        let intake = Intake::new(schemas, self.queue.clone(), Redactor::default(), Arc::new(Metrics::default()));
        let config = FollowConfig {
            folders: vec![AgentFolder { agent: Agent::ClaudeCode, path: self.folder.path().join("projects") }],
            polling_interval: Duration::from_secs(1),
            debounce: Duration::ZERO,
            line_bytes_max: LINE_BYTES_MAX,
            inactivity_timeout: Duration::from_secs(100 * 365 * 86_400),
        };
        let mut follower = Follower::new(config, Arc::new(intake)).unwrap();
        follower.chunk_bytes = self.chunk_bytes;
        follower
    }

    fn start(&mut self) {
        self.follower = Some(self.follower());
        self.rescan();
    }

    fn rescan(&mut self) {
        let follower = self.follower.as_mut().unwrap();
        // As the loop of [`Follower::run`].
        let mut unfinished = follower.rescan(Now::read()).unwrap();
        while let Some(path) = unfinished.pop() {
            if follower.look_at(&path).unwrap() == Progress::More {
                unfinished.push(path);
            }
        }
        follower.outbox.flush().unwrap();
    }

    fn append(&self, bytes: &[u8]) {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(self.path()).unwrap();
        file.write_all(bytes).unwrap();
    }

    /// As the end of [`Follower::run`].
    fn stop(&mut self) {
        let mut follower = self.follower.take().unwrap();
        follower.outbox.flush().unwrap();
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Append(_) | Op::AppendAlmostToEnd(_) => {}
            Op::Look => {
                let path = self.path();
                self.follower.as_mut().unwrap().look_at(&path).unwrap();
            }
            Op::Rescan => self.rescan(),
            Op::Stop => {
                self.stop();
                self.start();
            }
            Op::Kill => {
                let path = self.path();
                self.follower.as_mut().unwrap().look_at(&path).unwrap();
                self.follower = None;
                self.start();
            }
            Op::Reopen => {
                self.stop();
                self.queue.close().unwrap();
                self.queue = open(self.folder.path());
                self.start();
            }
        }
    }

    /// Reads to the end and gives what has come of it all.
    fn outcome(mut self) -> Outcome {
        self.rescan();
        self.stop();
        // What somebody who was killed had handed over may still be under way.
        self.queue.close().unwrap();
        self.queue = open(self.folder.path());
        let mut events = BTreeMap::new();
        let mut after: Option<Sequence> = None;
        loop {
            let page = self.queue.page(after, 1000).unwrap();
            let Some(last) = page.last() else { break };
            after = Some(last.sequence);
            for envelope in page {
                let event = envelope.event;
                let id = event.id();
                let known = (
                    event.event_type().as_str().to_owned(),
                    event.payload().as_json().to_owned(),
                    offset_of(event.origin()),
                );
                let first = events.entry(id).or_insert_with(|| (envelope.sequence, known.clone()));
                assert_eq!(first.1, known, "one identity, two contents");
            }
        }
        let mut events: Vec<_> = events.into_iter().map(|(id, (sequence, known))| (sequence, id, known)).collect();
        events.sort();
        let letters = self.queue.dead_letters(None, 100_000).unwrap();
        let lost = letters.into_iter().map(|letter| match letter.content {
            DeadContent::Input(rejection) => (offset_of(&rejection.origin), rejection.bytes),
            DeadContent::Event { event, .. } => panic!("nobody refused {event:?}"),
        });
        let cursors = self
            .queue
            .cursors()
            .unwrap()
            .into_iter()
            .map(|(_, cursor)| (cursor.offset, cursor.fingerprint, cursor.project_path, cursor.session));
        let text = |path: String| path.replace(&*self.folder.path().to_string_lossy(), "");
        Outcome {
            events: events
                .into_iter()
                .map(|(_, id, (kind, payload, offset))| (id, kind, text(payload), offset))
                .collect(),
            lost: lost.collect(),
            cursors: cursors.collect(),
        }
    }
}

fn open(folder: &Path) -> Queue {
    open_with_room(folder, u64::MAX / 2)
}

fn open_with_room(folder: &Path, max_pending_bytes: u64) -> Queue {
    let config = QueueConfig { path: folder.join("queue"), max_pending_bytes };
    let (queue, repairs) = Queue::open(&config).unwrap();
    assert_eq!(repairs, []);
    queue
}

fn offset_of(origin: &Origin) -> u64 {
    match origin {
        Origin::Transcript { offset, .. } => *offset,
        other => panic!("it comes from a transcript: {other:?}"),
    }
}

/// A line of a transcript without its newline, whole or damaged. `number` tells it from the others.
fn line(number: usize, kind: u8, length: usize) -> Vec<u8> {
    let filling = "ä\u{7f}x".repeat(length / 4);
    // As Claude Code orders its keys: by the first of them a record is found after a cut one.
    let record = |text: &str, number: usize| {
        format!(
            r#"{{"parentUuid":null,"type":"user","message":{{"role":"user","content":{}}},"uuid":"{}","timestamp":"2026-07-28T18:{:02}:{:02}.000Z","cwd":"/w/{}","sessionId":"{SESSION}"}}"#,
            json!(format!("{text} {number}")),
            uuid::Uuid::from_u128(number as u128 + 1),
            number / 60 % 60,
            number % 60,
            number / 3,
        )
    };
    let whole = record(&filling, number);
    match kind {
        0 => format!("{{\"type\":\"mode\",\"mode\":\"{filling}\"}}").into_bytes(),
        1 => format!("garbage {number} {filling}").into_bytes(),
        2 => format!("{whole}{}", record("second", number + 1000)).into_bytes(),
        3 => {
            let cut = (0..=whole.len() / 2).rev().find(|at| whole.is_char_boundary(*at)).unwrap();
            format!("{}{}", &whole[..cut], record("after a cut", number + 1000)).into_bytes()
        }
        4 => ["\0\0\0", &whole, "\0"].concat().into_bytes(),
        5 => [whole.as_bytes(), b" \xff\xfe"].concat(),
        6 => Vec::new(),
        7 => "y".repeat(LINE_BYTES_MAX as usize + 1 + length).into_bytes(),
        8 => format!("{{\"a\":{}{}}}", "[".repeat(length), "]".repeat(length)).into_bytes(),
        _ => whole.into_bytes(),
    }
}

fn file() -> impl Strategy<Value = Vec<u8>> {
    let tail = prop::sample::select(vec!["", "", "{\"type\":\"us", "}{", "\0"]);
    (prop::collection::vec((0u8..14, 0usize..400), 1..14), tail).prop_map(|(lines, tail)| {
        let mut file = Vec::new();
        for (number, (kind, length)) in lines.into_iter().enumerate() {
            file.extend(line(number, kind, length));
            file.push(b'\n');
        }
        file.extend(tail.bytes());
        file
    })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (1usize..700).prop_map(Op::Append),
        4 => (0usize..3).prop_map(Op::AppendAlmostToEnd),
        4 => Just(Op::Look),
        1 => Just(Op::Rescan),
        1 => Just(Op::Stop),
        2 => Just(Op::Kill),
        1 => Just(Op::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, max_shrink_iters: 100, ..ProptestConfig::with_cases(rounds(20)) })]

    #[test]
    fn any_split_into_appends_with_any_stops_and_kills_gives_the_same_events_and_cursors(
        file in file(),
        chunk_bytes in prop_oneof![1usize..200, Just(tail::CHUNK_BYTES)],
        ops in prop::collection::vec(op(), 1..24),
    ) {
        let at_once = Scene::new(tail::CHUNK_BYTES);
        at_once.append(&file);
        let expected = at_once.outcome();
        prop_assert!(expected.cursors.iter().all(|(offset, ..)| *offset <= file.len() as u64));

        let mut scene = Scene::new(chunk_bytes);
        let mut rest = file.as_slice();
        for op in ops {
            let length = match op {
                Op::Append(length) => length.min(rest.len()),
                Op::AppendAlmostToEnd(short) => {
                    let end = memchr::memchr(b'\n', rest).map_or(rest.len(), |end| end + 1);
                    end.saturating_sub(short)
                }
                _ => 0,
            };
            let (now, later) = rest.split_at(length);
            scene.append(now);
            rest = later;
            scene.apply(op);
        }
        // The last byte comes alone: nothing after it makes good what was passed over.
        let (rest, last) = rest.split_at(rest.len().saturating_sub(1));
        scene.append(rest);
        scene.apply(Op::Look);
        scene.append(last);
        prop_assert_eq!(scene.outcome(), expected);
    }
}

#[test]
fn every_single_cut_gives_the_same_events_and_cursors() {
    let mut file = Vec::new();
    for (number, kind) in [9, 2, 3, 4, 6, 1, 9].into_iter().enumerate() {
        file.extend(line(number, kind, 8));
        file.push(b'\n');
    }
    let at_once = Scene::new(tail::CHUNK_BYTES);
    at_once.append(&file);
    let expected = at_once.outcome();
    assert_eq!((expected.events.len(), expected.lost.len()), (7, 2), "{expected:?}");
    // One scene for many cuts: each line is looked at with the cut moving through it.
    for step in [1, 2, 3, 5, 64] {
        let mut scene = Scene::new(32);
        for piece in file.chunks(step) {
            scene.append(piece);
            scene.rescan();
        }
        assert_eq!(scene.outcome(), expected, "{step} bytes at a time");
    }
}

/// Writes a transcript of a session with one more turn.
fn say(scene: &Scene, project: &str, session: &str, number: usize) -> PathBuf {
    let folder = scene.folder.path().join("projects").join(project);
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join(session).with_extension("jsonl");
    let said = String::from_utf8(line(number, 9, 8)).unwrap().replace(SESSION, session);
    let mut file = std::fs::OpenOptions::new().append(true).create(true).open(&path).unwrap();
    writeln!(file, "{said}").unwrap();
    path
}

/// How many events of a type wait.
fn waiting(scene: &Scene, event_type: &str) -> usize {
    let page = scene.queue.page(None, 1000).unwrap();
    page.iter().filter(|envelope| envelope.event.event_type().as_str() == event_type).count()
}

#[test]
fn of_two_transcripts_of_a_session_one_is_read_at_once_though_the_other_is_gone() {
    let mut scene = Scene::new(tail::CHUNK_BYTES);
    say(&scene, "-p", SESSION, 1);
    let gone = say(&scene, "-q", SESSION, 2);
    scene.rescan();
    assert_eq!(waiting(&scene, "turn_detected"), 2);
    say(&scene, "-p", SESSION, 3);
    std::fs::remove_file(gone).unwrap();
    scene.rescan();
    assert_eq!(waiting(&scene, "turn_detected"), 3);
}

#[test]
fn a_session_of_which_one_transcript_is_gone_has_not_ended() {
    let mut scene = Scene::new(tail::CHUNK_BYTES);
    say(&scene, "-p", SESSION, 1);
    let gone = say(&scene, "-q", SESSION, 2);
    scene.rescan();
    std::fs::remove_file(gone).unwrap();
    scene.rescan();
    assert_eq!(scene.follower.as_ref().unwrap().files.len(), 1);
    assert_eq!((waiting(&scene, "turn_detected"), waiting(&scene, "session_ended")), (2, 0));
    assert_eq!(scene.queue.cursors().unwrap().len(), 1);
}

/// A transcript of `lines` lines that was read to its end, with its size and its path.
fn read_scene(lines: usize) -> (Scene, PathBuf, u64) {
    let mut scene = Scene::new(tail::CHUNK_BYTES);
    for number in 0..lines {
        scene.append(&[line(number, 9, 40), b"\n".to_vec()].concat());
    }
    scene.rescan();
    let path = scene.path();
    let size = path.metadata().unwrap().len();
    assert_eq!(scene.follower.as_ref().unwrap().files[path.as_path()].cursor.offset, size);
    (scene, path, size)
}

#[test]
fn a_file_that_is_cut_between_stat_and_read_is_looked_at_again_and_is_no_error() {
    let (mut scene, path, size) = read_scene(10);
    scene.append(&[line(10, 9, 40), b"\n".to_vec()].concat());
    let mut looks = 0;
    let cut = path.clone();
    reader::cut::ON_OPENED.set(Some(Box::new(move |opened| {
        looks += 1;
        if opened == cut && looks == 1 {
            std::fs::OpenOptions::new().write(true).open(opened).unwrap().set_len(size / 2).unwrap();
        }
    })));
    let progress = scene.follower.as_mut().unwrap().look_at(&path).unwrap();
    reader::cut::ON_OPENED.set(None);
    assert!(matches!(progress, Progress::End));
    let file = &scene.follower.as_ref().unwrap().files[path.as_path()];
    assert!(file.access == Access::Readable && file.seen.is_some(), "it was cut, and not unreadable");
    assert!((1..=size / 2).contains(&file.cursor.offset), "{} of {size}: what is left was read", file.cursor.offset);
}

#[test]
fn a_file_that_ends_early_at_every_look_can_not_be_read() {
    let (mut scene, path, size) = read_scene(10);
    let looks = std::rc::Rc::new(std::cell::Cell::new(0));
    let counted = looks.clone();
    let (whole, fresh) = (std::fs::read(&path).unwrap(), scene.folder.path().join("fresh"));
    reader::cut::ON_OPENED.set(Some(Box::new(move |opened| {
        counted.set(counted.get() + 1);
        // What was opened is empty when it is read, and the next look finds a whole file again.
        std::fs::OpenOptions::new().write(true).open(opened).unwrap().set_len(0).unwrap();
        std::fs::write(&fresh, &whole).unwrap();
        std::fs::rename(&fresh, opened).unwrap();
    })));
    let follower = scene.follower.as_mut().unwrap();
    follower.files.get_mut(path.as_path()).unwrap().seen = None;
    let progress = follower.look_at(&path).unwrap();
    assert!(matches!(progress, Progress::End));
    assert_eq!(looks.get(), reader::CUT_SHORT_PASSES_MAX, "bounded");
    assert_eq!(follower.files[path.as_path()].access, Access::Unreadable, "it is said");
    reader::cut::ON_OPENED.set(None);
    follower.look_at(&path).unwrap();
    let file = &follower.files[path.as_path()];
    assert!(file.access == Access::Readable && file.cursor.offset == size);
}

/// A session's transcript of another project folder; `number` makes its name.
fn other_path(scene: &Scene, project: &str, number: u32) -> PathBuf {
    let folder = scene.folder.path().join("projects").join(project);
    std::fs::create_dir_all(&folder).unwrap();
    folder.join(format!("{number:08x}-0000-4000-8000-000000000000.jsonl"))
}

#[test]
fn a_file_without_newline_is_read_in_turns_and_others_are_read_meanwhile_also_at_the_first_pass() {
    let mut scene = Scene::new(tail::CHUNK_BYTES);
    // Before the other in the order of paths.
    let sparse = other_path(&scene, "-a", 7);
    std::fs::File::create(&sparse).unwrap().set_len(1 << 40).unwrap();
    scene.append(&[line(1, 9, 40), b"\n".to_vec()].concat());
    scene.follower.as_mut().unwrap().in_order = true;
    let unfinished = scene.follower.as_mut().unwrap().rescan(Now::read()).unwrap();
    assert_eq!(unfinished.iter().map(AsRef::as_ref).collect::<Vec<&Path>>(), [sparse.as_path()]);
    assert_eq!(waiting(&scene, "turn_detected"), 1);
    let mut scanned_to = 0;
    for _ in 0..3 {
        let follower = scene.follower.as_mut().unwrap();
        assert_eq!(follower.look_at(&sparse).unwrap(), Progress::More);
        let before = scanned_to;
        scanned_to = follower.files[sparse.as_path()].scanned.unwrap().to;
        assert!((1..=9 << 20).contains(&(scanned_to - before)) || before == 0, "{before} to {scanned_to}");
    }
    assert!(scanned_to < 64 << 20);
}

#[test]
fn lines_that_make_large_events_are_read_in_turns_too() {
    let mut scene = Scene::new(tail::CHUNK_BYTES);
    let path = other_path(&scene, "-a", 7);
    let cwd = format!("/{}", "x".repeat(1000));
    let session = path.file_stem().unwrap().to_str().unwrap();
    let record = |number: usize| json!({"type": "user", "uuid": format!("{number:08}"), "sessionId": session, "message": {"content": "x"}});
    let mut text = String::new();
    for number in 0..20_000 {
        let mut line = record(number);
        if number == 0 {
            line["cwd"] = cwd.clone().into();
        }
        text += &format!("{line}\n");
    }
    assert!(text.len() < 3 << 20);
    std::fs::write(&path, &text).unwrap();
    scene.follower.as_mut().unwrap().in_order = false;
    let unfinished = scene.follower.as_mut().unwrap().rescan(Now::read()).unwrap();
    assert_eq!(unfinished.len(), 1, "20 MB of events are more than one turn");
    let bytes = scene.queue.stats().pending_bytes;
    assert!(bytes < 14 << 20, "{bytes}: one turn, and what was begun");
}

#[test]
fn many_renamed_transcripts_go_on_where_they_were_and_a_stop_is_heeded() {
    const FILES: u32 = 600;
    let mut scene = Scene::new(tail::CHUNK_BYTES);
    for number in 1..=FILES {
        let session = format!("{number:08x}-0000-4000-8000-000000000000");
        say(&scene, "-a", &session, number as usize);
    }
    scene.rescan();
    let projects = scene.folder.path().join("projects");
    std::fs::rename(projects.join("-a"), projects.join("-z")).unwrap();
    let follower = scene.follower.as_mut().unwrap();
    let read = |follower: &Follower| follower.files.values().map(|file| file.cursor.offset).sum::<u64>();
    let before = read(follower);
    let Scan { met, fresh, .. } = follower.scan();
    let vanished = follower.scanner.vanished(&follower.files, &met);
    assert_eq!((fresh.len(), vanished.len()), (FILES as usize, FILES as usize));
    let Moves { moved, gone } = scanner::moves(&fresh, vanished);
    assert_eq!((follower.adopt(moved).unwrap().len(), gone.len()), (FILES as usize, 0));
    follower.outbox.flush().unwrap();
    assert_eq!(read(follower), before);
    scene.rescan();
    assert_eq!(scene.queue.cursors().unwrap().len(), FILES as usize);
    // Back again, while it is being stopped.
    std::fs::rename(projects.join("-z"), projects.join("-a")).unwrap();
    let follower = scene.follower.as_mut().unwrap();
    let Scan { met, fresh, .. } = follower.scan();
    let vanished = follower.scanner.vanished(&follower.files, &met);
    follower.doorbell.stop();
    assert!(follower.adopt(scanner::moves(&fresh, vanished).moved).unwrap().is_empty());
}

/// A session that has a turn `ahead` of the time at which its SessionEnd hook ran: how many ends there are.
fn ends_after_hook(ahead: SignedDuration, is_read_before_the_hook: bool) -> usize {
    let at = Timestamp::now();
    let mut scene = Scene::new(tail::CHUNK_BYTES);
    let session = Uuid::parse_str(SESSION).unwrap();
    let read = |scene: &mut Scene| {
        let path = scene.path();
        let file = scene.follower.as_mut().unwrap().files.get_mut(path.as_path()).unwrap();
        file.cursor.session.last_activity = Some(at + ahead);
        file.advanced_at = Some(Instant::now());
    };
    say(&scene, "-p", SESSION, 1);
    scene.rescan();
    // As if the clock had been ahead then.
    if is_read_before_the_hook {
        read(&mut scene);
    }
    scene.follower.as_ref().unwrap().intake.session_closed(session, at);
    if !is_read_before_the_hook {
        read(&mut scene);
    }
    scene.rescan();
    scene.follower.as_mut().unwrap().outbox.flush().unwrap();
    waiting(&scene, "session_ended")
}

#[test]
fn what_was_read_before_a_session_end_hook_came_before_it_whatever_the_clock_says() {
    let hour = SignedDuration::from_hours(1);
    assert_eq!(ends_after_hook(hour, true), 1);
    assert_eq!(ends_after_hook(hour, false), 0, "the session was resumed");
    assert_eq!(ends_after_hook(SignedDuration::from_secs(5), false), 1, "written at about the same time");
}

/// Takes events out until so many turns of a file have come, in their order; looks each time whether the file's cursor is past a
/// line whose turn has not come. `starts`: where the lines begin.
fn drain(queue: &Queue, starts: &[u64], until: usize, seen: &mut Vec<u64>) {
    let is_turn = |envelope: &&Envelope| envelope.event.event_type().as_str() == "turn_detected";
    while seen.len() < until {
        let cursor = queue.cursors().unwrap().first().map_or(0, |(_, cursor)| cursor.offset);
        let passed = |window: &[Envelope]| {
            let pending = window.iter().filter(is_turn).map(|envelope| offset_of(envelope.event.origin()));
            let come: BTreeSet<u64> = seen.iter().copied().chain(pending).collect();
            starts.iter().copied().filter(|start| *start < cursor && !come.contains(start)).collect::<Vec<_>>()
        };
        // A cursor is seen as soon as it is written, events when they are durable.
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut window = queue.window(None, 1000, 1 << 20).unwrap();
        while !passed(&window).is_empty() {
            assert!(Instant::now() < deadline, "the cursor is at {cursor}, and nobody has seen {:?}", passed(&window));
            window = queue.window(None, 1000, 1 << 20).unwrap();
        }
        let taken: Vec<_> = window.iter().take(window.len().div_ceil(2)).collect();
        seen.extend(taken.iter().copied().filter(is_turn).map(|envelope| offset_of(envelope.event.origin())));
        queue.settle(taken.iter().map(|envelope| (envelope.sequence, Settled::Delivered)).collect()).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_batch_that_finds_no_room_is_handed_over_again_and_no_cursor_runs_ahead_of_it() {
    for stops in [0, 3] {
        let mut scene = Scene::new(1000);
        scene.queue.close().unwrap();
        scene.queue = open_with_room(scene.folder.path(), 3000);
        scene.follower = Some(scene.follower());
        let mut starts = Vec::new();
        let mut text = Vec::new();
        for number in 0..150 {
            starts.push(text.len() as u64);
            text.extend([line(number, 9, 40), b"\n".to_vec()].concat());
        }
        scene.append(&text);
        let mut seen = Vec::new();
        for round in 0..=stops {
            let queue = scene.queue.clone();
            let follower = scene.follower.take().unwrap();
            let doorbell = follower.doorbell();
            let reading = std::thread::spawn(move || follower.run());
            if round < stops {
                // Nothing is taken out: it waits for room when it is stopped.
                let deadline = Instant::now() + Duration::from_secs(10);
                while !queue.stats().full && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(1));
                }
                assert!(queue.stats().full, "{:?}", queue.stats());
                drain(&queue, &starts, seen.len() + 7, &mut seen);
            } else {
                drain(&queue, &starts, starts.len(), &mut seen);
            }
            doorbell.stop();
            reading.join().unwrap().unwrap();
            assert!(seen.is_sorted() && seen == starts[..seen.len()], "each once, in order: {seen:?}");
            scene.follower = Some(scene.follower());
        }
        assert_eq!(seen, starts);
    }
}
