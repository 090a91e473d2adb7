//! Opening what a crash, a bad disk or an earlier program has left.

use std::fs;

use super::*;
use crate::queue::codec::Totals;
use crate::queue::log::Source;
use crate::queue::segment::Segment;

/// Appends pieces to a log, as a process that was killed may leave them.
pub(super) fn leave(fixture: &Fixture, number: u64, pieces: &[(Vec<u8>, Vec<u8>)]) {
    let mut log = fs::File::options().append(true).open(fixture.segment(number).join("db")).unwrap();
    pieces.iter().for_each(|(_, value)| std::io::Write::write_all(&mut log, value).unwrap());
}

/// The value of a piece.
pub(super) fn value_of(fixture: &Fixture, segment: u64, kind: u8, number: u64, index: u32) -> Vec<u8> {
    let raw = fixture.raw(segment);
    raw.pieces(kind, number..=number).map(Result::unwrap).find(|piece| piece.index == index).unwrap().encode().1
}

/// Ten events, a rejection and a cursor.
fn filled(fixture: &Fixture) {
    let queue = fixture.open();
    let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(5)))];
    queue.append(Batch { cursors, rejections: vec![rejection(b"?")], ..batch(0..10) }).unwrap();
    queue.close().unwrap();
}

/// Three segments with 300 events each and some long ones, of which the first 100 are settled.
fn in_three_segments(fixture: &Fixture) -> u64 {
    let queue = fixture.open();
    let cursors = || vec![(PathBuf::from("/t/a"), Some(cursor(5)))];
    let mut number = 0;
    for segment in 0..3 {
        for _ in 0..30 {
            let mut events: Vec<_> = (number..number + 10).map(|number| event(number, 900)).collect();
            if number % 50 == 0 {
                events[3] = event(number + 3, 30_000);
            }
            number += 10;
            queue.append(Batch { events, cursors: cursors(), ..Batch::default() }).unwrap();
        }
        if segment == 0 {
            queue.settle(delivered(1..=100)).unwrap();
        }
        if segment < 2 {
            queue.roll().unwrap();
        }
    }
    queue.close().unwrap();
    assert_eq!(fixture.segments(), [1, 2, 3]);
    number
}

/// What sled does not notice shows when it is read: then the process ends, and is started again.
pub(super) fn opened_until_readable(fixture: &Fixture, context: &str) -> (Queue, Vec<Repair>) {
    let mut repairs = Vec::new();
    for _ in 0..5 {
        let (queue, found) = Queue::open(&fixture.config).unwrap();
        repairs.extend(found);
        match read_all(&queue) {
            Ok(_) => return (queue, repairs),
            Err(error) => assert!(matches!(error, QueueError::Damaged { .. }), "{context}: {error}"),
        }
    }
    panic!("{context}: it never becomes readable: {repairs:?}");
}

/// Opens a queue that was damaged, and checks what holds whatever the damage was. Gives how many events are there.
fn opened_after_damage(fixture: &Fixture, count: u64, context: &str) -> u64 {
    let (queue, repairs) = opened_until_readable(fixture, context);
    let all = everything(&queue);
    let found: Vec<u64> = all.iter().map(|envelope| number_of(&envelope.event)).collect();
    assert!(found.is_sorted_by(|one, other| one < other), "{context}: out of order, or doubled");
    for envelope in &all {
        let number = number_of(&envelope.event);
        assert_eq!(envelope.sequence, sequence(number + 1), "{context}");
        let size = if number % 50 == 3 { 30_000 } else { 900 };
        assert!(envelope.event == event(number, size), "{context}: {number} is not what it was");
    }
    let stats = queue.stats();
    // Lost ones count until it is past them.
    let (least, missing) = (found.len() as u64, repairs.iter().map(Repair::missing).sum::<u64>());
    let most = if least == 0 { 0 } else { least + missing };
    assert!((least..=most).contains(&stats.pending), "{context}: {} of {least}: {:?}", stats.pending, repairs);
    assert_eq!(stats.oldest.map(|(sequence, _)| sequence), all.first().map(|envelope| envelope.sequence));
    let aside = |path: &Path| {
        fs::read_dir(path)
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("damaged-"))
            .count()
    };
    let set_aside = repairs.iter().filter(|repair| matches!(repair, Repair::SegmentSetAside { .. })).count();
    assert_eq!(aside(&fixture.config.path), set_aside, "{context}: {:?}", repairs);
    // What is missing is said, as a dead letter as well, and the transcripts are read again.
    let lost = (100..count).filter(|number| found.binary_search(number).is_err()).count() as u64;
    assert!(missing >= lost, "{context}: {lost} are missing: {:?}", repairs);
    assert_eq!(stats.dead_letters > 0, missing > 0, "{context}: {:?}", repairs);
    if missing > 0 || set_aside > 0 {
        assert_eq!(queue.cursors().unwrap(), [], "{context}");
    }
    // It goes on: what comes is stored under new numbers, and everything can be delivered.
    let next = queue.append(Batch { events: vec![event(count, 900)], ..Batch::default() }).unwrap().sequences[0];
    assert!(next.get() > count, "{context}");
    loop {
        let window = queue.window(None, 128, u64::MAX).unwrap();
        if window.is_empty() {
            break;
        }
        queue.settle(delivered(window.iter().map(|envelope| envelope.sequence.get()))).unwrap();
    }
    assert_eq!((queue.stats().pending, queue.stats().pending_bytes), (0, 0), "{context}");
    eventually("one segment", || fixture.segments().len() == 1 || queue.stats().pending == 0);
    queue.close().unwrap();
    let queue = fixture.open();
    assert_eq!(everything(&queue), []);
    found.len() as u64
}

#[test]
fn whatever_is_done_to_a_segment_all_that_is_whole_in_it_is_found() {
    type Damage = (&'static str, fn(&Path), u64);
    // How many of a hundred events of the segment must be found at least.
    let damages: [Damage; 7] = [
        ("conf destroyed", |folder| fs::write(folder.join("conf"), b"segment_size: banana\n").unwrap(), 100),
        ("conf gone", |folder| fs::remove_file(folder.join("conf")).unwrap(), 100),
        ("half cut off", |folder| cut(folder, 500), 25),
        ("the last 0.3 % cut off", |folder| cut(folder, 997), 90),
        ("the middle overwritten", |folder| overwrite(folder, 400, 600), 10),
        ("the beginning overwritten", |folder| overwrite(folder, 0, 300), 40),
        ("nothing but zeros", |folder| overwrite(folder, 0, 1000), 0),
    ];
    for number in 1..=3 {
        for (what, damage, least) in damages {
            let fixture = Fixture::new();
            let count = in_three_segments(&fixture);
            damage(&fixture.segment(number));
            let context = format!("{what}, segment {number}");
            let found = opened_after_damage(&fixture, count, &context);
            let of_segment = if number == 1 { 200 } else { 300 };
            assert!(found >= 800 - of_segment + of_segment * least / 100, "{context}: {found}");
        }
    }
}

/// Cuts the log to so many thousandths.
pub(super) fn cut(folder: &Path, thousandths: u64) {
    let file = fs::File::options().write(true).open(folder.join("db")).unwrap();
    let bytes = file.metadata().unwrap().len();
    file.set_len(bytes * thousandths / 1000).unwrap();
}

/// Overwrites the log from so many thousandths to so many.
fn overwrite(folder: &Path, from: usize, to: usize) {
    let mut bytes = fs::read(folder.join("db")).unwrap();
    let length = bytes.len();
    bytes[length * from / 1000..length * to / 1000].fill(0);
    fs::write(folder.join("db"), bytes).unwrap();
}

#[test]
fn a_segment_that_is_gone_is_missed() {
    for number in 1..=3 {
        let fixture = Fixture::new();
        let count = in_three_segments(&fixture);
        fs::remove_dir_all(fixture.segment(number)).unwrap();
        let found = opened_after_damage(&fixture, count, &format!("segment {number} is gone"));
        assert_eq!(found, if number == 1 { 600 } else { 500 });
    }
}

#[test]
fn what_is_damaged_in_a_running_queue_is_noticed_when_it_is_read_and_set_aside_at_the_next_start() {
    for (what, kind, cause) in
        [("a block", piece::BLOCK, "numbers are missing"), ("a part of a long event", piece::CHUNK, "a part of event")]
    {
        let fixture = Fixture::new();
        let count = in_three_segments(&fixture);
        let folder = fixture.segment(2);
        let value = match kind {
            piece::BLOCK => {
                value_of(&fixture, 2, kind, fixture.raw(2).last_block(400).unwrap().unwrap().before.sequence + 1, 0)
            }
            _ => value_of(&fixture, 2, kind, 354, 1),
        };
        let mut log = fs::read(folder.join("db")).unwrap();
        let places: Vec<_> = memchr::memmem::find_iter(&log, &value[..]).collect();
        assert!(!places.is_empty());
        places.into_iter().for_each(|at| log[at..at + value.len()].fill(0));
        fs::write(folder.join("db"), log).unwrap();
        let queue = fixture.open();
        let failed = queue.failed();
        let deliver = || {
            let window = queue.window(None, 100, u64::MAX)?;
            queue.settle(delivered(window.iter().map(|envelope| envelope.sequence.get())))
        };
        let error = (0..count).find_map(|_| deliver().err()).expect("it is read to the end");
        assert!(error.to_string().contains(cause), "{what}: {error}");
        assert!(matches!(error, QueueError::Damaged { .. }) && failed.borrow().is_some());
        drop(queue);
        let (queue, repairs) = Queue::open(&fixture.config).unwrap();
        assert!(matches!(&repairs[..], [Repair::SegmentSetAside { .. }]), "{:?}", repairs);
        let missing = repairs[0].missing();
        assert!(missing > 0 && (what == "a block" || missing == 1), "{what}: {missing}");
        let all = everything(&queue);
        assert_eq!(all.last().map(|envelope| number_of(&envelope.event)), Some(count - 1));
        assert_eq!(all.len() as u64, count - number_of(&all[0].event) - missing, "{what}");
        assert_eq!(queue.cursors().unwrap(), []);
    }
}

#[test]
fn a_log_that_came_back_shorter_is_said_though_sled_takes_it_for_a_whole_one() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(5)))];
    queue.append(Batch { cursors, ..batch(0..10) }).unwrap();
    let copy = fs::read(fixture.newest().join("db")).unwrap();
    queue.append(batch(10..30)).unwrap();
    let highest = queue.stats().last_sequence.unwrap().get();
    queue.close().unwrap();
    // As from a backup.
    fs::write(fixture.newest().join("db"), copy).unwrap();
    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    assert_eq!(repairs.iter().map(Repair::missing).sum::<u64>(), 20, "{:?}", repairs);
    assert_eq!(everything(&queue).len(), 10);
    assert!(queue.append(batch(0..1)).unwrap().sequences[0].get() > highest, "no number is used twice");
    assert_eq!(queue.cursors().unwrap(), []);
}

/// Also where nothing but settlements and dropped letters is missing.
#[test]
fn a_log_that_came_back_without_what_was_settled_is_said_too() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(Batch { rejections: vec![rejection(b"?")], ..batch(0..10) }).unwrap();
    let copy = fs::read(fixture.newest().join("db")).unwrap();
    assert!(queue.drop_dead_letter(sequence(11)).unwrap());
    queue.close().unwrap();
    fs::write(fixture.newest().join("db"), copy).unwrap();
    let (_, repairs) = Queue::open(&fixture.config).unwrap();
    assert!(matches!(&repairs[..], [Repair::SegmentSetAside { missing: 0, .. }]), "{repairs:?}");
}

#[test]
fn what_was_never_committed_is_not_shown() {
    for with_mark in [false, true] {
        let fixture = Fixture::new();
        filled(&fixture);
        let batch = fixture.raw(1).last_batch + 1;
        let before = Totals { sequence: 11, events: 10, bytes: 0 };
        let mut builder = piece::Block::default();
        builder.add(&before, 3, b"abc");
        let letter = piece::Piece { kind: piece::LETTER, number: 13, index: 0, batch, content: b"x".to_vec() };
        let mut pieces = vec![builder.take(batch), letter.encode()];
        if with_mark {
            // Of one that had a piece more.
            let (marks, _) = fixture.raw(1).marks().unwrap();
            let marks = codec::Marks { acknowledged: Totals { sequence: 13, ..before }, ..marks };
            pieces.push(piece::mark(&marks, batch, 4));
        }
        leave(&fixture, 1, &pieces);
        let looked = Queue::inspect(&fixture.config).unwrap();
        assert_eq!((everything(&looked).len(), looked.stats().dead_letters), (10, 1), "{with_mark}");
        let (queue, repairs) = Queue::open(&fixture.config).unwrap();
        assert_eq!(repairs, []);
        assert_eq!((everything(&queue).len(), queue.stats().dead_letters), (10, 1), "{with_mark}");
        assert_eq!(queue.append(super::batch(10..11)).unwrap().sequences, [sequence(12)]);
    }
}

#[test]
fn a_segment_that_was_not_finished_is_removed() {
    let fixture = Fixture::new();
    filled(&fixture);
    let begun = Segment::make(&fixture.config.path, files::Name { number: 2, first: 0, is_damaged: false }).unwrap();
    let old = Source::Raw(fixture.raw(1).into());
    old.carry_over(&mut log::Left::all_of(log::CARRIED), &begun).unwrap();
    drop((old, begun));
    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    assert_eq!(repairs, []);
    assert_eq!((everything(&queue).len(), fixture.segments()), (10, vec![1, 2]));
}

#[test]
fn after_a_sync_that_failed_nothing_is_built_on_what_the_system_only_remembers() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue
        .append(Batch { rejections: vec![rejection(b"?")], events: vec![event(0, 20_000)], ..Batch::default() })
        .unwrap();
    queue.append(batch(1..20)).unwrap();
    queue.settle(delivered([1])).unwrap();
    Fixture::on_sync(&queue, || Err(std::io::Error::other("the device failed")));
    queue.append(batch(20..30)).unwrap_err();
    drop(queue);
    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    let [Repair::SegmentSetAside { cause, missing: 0, .. }] = &repairs[..] else { panic!("{repairs:?}") };
    assert_eq!(cause, "the device failed");
    assert_eq!(fixture.segments(), [2], "the next one was begun");
    let found = everything(&queue);
    assert!(found.len() >= 19, "{}", found.len());
    assert_eq!((queue.stats().dead_letters, queue.stats().pending), (1, found.len() as u64));
    queue.close().unwrap();
    assert!(everything(&fixture.open()) == found);
}

#[test]
fn what_an_earlier_version_wrote_is_moved_aside() {
    let fixture = Fixture::new();
    fs::create_dir_all(fixture.config.path.join("sled-1")).unwrap();
    fs::set_permissions(&fixture.config.path, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    for (file, text) in [("CURRENT", "format 2\nsled-1\n"), ("HIGHEST", "00000000000000000007\n"), ("sled-1/db", "x")] {
        fs::write(fixture.config.path.join(file), text).unwrap();
    }
    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    let [Repair::OldFormat { to }] = &repairs[..] else { panic!("{:?}", repairs) };
    assert_eq!(fs::read(to.join("sled-1/db")).unwrap(), b"x");
    assert!(to.join("CURRENT").exists() && !fixture.config.path.join("CURRENT").exists());
    assert_eq!(queue.append(batch(0..1)).unwrap().sequences, [sequence(1)]);
    queue.close().unwrap();
    assert_eq!(everything(&fixture.open()).len(), 1);
}

#[test]
fn dead_letters_are_bounded_in_number() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let lines = |first: u64| -> Vec<Rejection> {
        let at = |offset| Origin::Transcript { path: "/t/lines".into(), offset };
        (first..first + 1000).map(|offset| Rejection { origin: at(offset), ..rejection(b"x") }).collect()
    };
    for batch in 0..15 {
        queue.append(Batch { rejections: lines(batch * 1000), ..Batch::default() }).unwrap();
    }
    assert_eq!(queue.stats().dead_letters, 10_005);
    let last = queue.dead_letters(Some(sequence(10_000)), 100).unwrap();
    assert_eq!(last.len(), 5);
    let message = &last[1].failure.message;
    assert!(message.contains("1000 pieces from byte 11000 to byte 11999 of /t/lines"), "{message}");
    // Nor are those without end.
    let one = |number: u64| Rejection { origin: Origin::Hook, ..rejection(&number.to_be_bytes()) };
    for batch in 0..12 {
        let rejections = (batch * 1000..(batch + 1) * 1000).map(one).collect();
        queue.append(Batch { rejections, ..Batch::default() }).unwrap();
    }
    assert_eq!(queue.stats().dead_letters, 20_000);
    queue.append(batch(0..1)).unwrap();
    queue.close().unwrap();
    assert_eq!(fixture.open().stats().dead_letters, 20_000);
}

#[test]
fn others_cannot_read_the_queue() {
    use std::os::unix::fs::PermissionsExt;
    let fixture = Fixture::new();
    filled(&fixture);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&fixture.config.path), 0o700);
    for file in ["lock", "HIGHEST"] {
        assert_eq!(mode(&fixture.config.path.join(file)), 0o600, "{file}");
    }
}

const FOLDER: &str = "HEADSPACE_DAMAGED_QUEUE";

/// Drains the queue of a test below in a process of its own, as sled may not come back. Says on its standard output which
/// events it gave, its repairs, and where the cursor stands once it is drained.
#[test]
#[ignore = "the child of the tests below"]
fn draining_child() {
    let Some(path) = std::env::var_os(FOLDER) else { return };
    let config = QueueConfig { path: path.into(), max_pending_bytes: u64::MAX / 2 };
    let (queue, repairs) = Queue::open(&config).unwrap();
    println!("\nrepaired {:?}", repairs);
    let drained = || -> Result<(), QueueError> {
        for _ in 0..1000 {
            let window = queue.window(None, 1000, u64::MAX)?;
            if window.is_empty() {
                let cursors = queue.cursors()?;
                println!("\ncursor {}", cursors.first().map_or(0, |(_, cursor)| cursor.offset));
                return Ok(());
            }
            for envelope in &window {
                let Origin::Transcript { offset, .. } = envelope.event.origin() else { panic!("{envelope:?}") };
                println!("\nevent {offset}");
            }
            queue.settle(delivered(window.iter().map(|envelope| envelope.sequence.get())))?;
        }
        panic!("it gives the same again and again: {:?}", queue.stats());
    };
    match drained() {
        Ok(()) => queue.close().unwrap(),
        Err(error @ (QueueError::Storage { .. } | QueueError::Damaged { .. })) => {
            println!("\nfailed {error}");
            std::process::exit(74);
        }
        Err(error) => panic!("{error}"),
    }
}

/// What children said until the queue was drained: each but the last ended as the program would.
#[derive(Default, Debug)]
struct Drained {
    events: std::collections::BTreeSet<u64>,
    cursor: u64,
    said: Vec<String>,
}

impl Drained {
    fn said(&self, what: &str) -> bool {
        self.said.iter().any(|line| line.contains(what))
    }
}

fn drain_after_damage(fixture: &Fixture, environment: &[(&str, &str)]) -> Drained {
    let mut drained = Drained::default();
    for start in 0..6 {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "queue::tests::damage::draining_child", "--ignored", "--nocapture", "--test-threads=1"])
            .env(FOLDER, &fixture.config.path)
            .envs(if start == 0 { environment } else { &[] }.iter().copied())
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&child.stdout).into_owned();
        let mut cursor = None;
        for line in output.lines() {
            match line.split_once(' ') {
                Some(("event", number)) => drop(drained.events.insert(number.parse().unwrap())),
                Some(("cursor", offset)) => cursor = Some(offset.parse().unwrap()),
                Some(("repaired" | "failed", _)) => drained.said.push(line.to_owned()),
                _ => {}
            }
        }
        match (child.status.code(), cursor) {
            (Some(0), Some(cursor)) => {
                drained.cursor = cursor;
                return drained;
            }
            (Some(74), _) => drained.said.push(format!("start {start} ended with 74")),
            _ => panic!("{:?}: {output}{}", child.status, String::from_utf8_lossy(&child.stderr)),
        }
    }
    panic!("it never came to its end: {drained:?}");
}

#[test]
fn bytes_overwritten_anywhere_lose_no_event_that_its_cursor_has_passed() {
    let seed = seed();
    println!("{SEED}={seed}");
    let mut random = Random(seed);
    let (mut aside, mut whole, mut restarted) = (0, 0, 0);
    for round in 0..rounds(20) {
        let fixture = Fixture::new();
        let queue = fixture.open();
        let mut count = 0;
        let batches = random.below(60) + 1;
        for _ in 0..batches {
            let first = count;
            count += random.below(20) + 1;
            let events = (first..count).map(|number| event(number, [50, 900, 900, 9000][random.below(4) as usize]));
            let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(count)))];
            queue.append(Batch { events: events.collect(), cursors, ..Batch::default() }).unwrap();
            if round % 2 == 1 && random.below(20) == 0 {
                queue.roll().unwrap();
            }
        }
        let settled = random.below(count);
        queue.settle(delivered(1..=settled)).unwrap();
        queue.close().unwrap();
        if random.below(2) == 0 {
            fixture.open().close().unwrap();
        }
        let mut segments = fixture.segments();
        let segment = segments.swap_remove(random.below(segments.len() as u64) as usize);
        let segment = fixture.segment(segment);
        let target = segment.join(match random.below(12) {
            0 => "conf",
            1 => "FIRST",
            _ => "db",
        });
        let mut bytes = fs::read(&target).unwrap();
        for _ in 0..random.below(6) + 1 {
            let at = random.below(bytes.len() as u64) as usize;
            let length = [1, 8, 300, 5000, 100_000][random.below(5) as usize].min(bytes.len() - at);
            let value = random.below(256) as u8;
            let with_noise = random.below(2) == 0;
            for byte in &mut bytes[at..at + length] {
                *byte = if with_noise { random.below(256) as u8 } else { value };
            }
        }
        if random.below(5) == 0 {
            bytes.truncate(random.below(bytes.len() as u64) as usize);
        }
        fs::write(&target, bytes).unwrap();
        let drained = drain_after_damage(&fixture, &[]);
        let lost: Vec<u64> = (settled..drained.cursor).filter(|number| !drained.events.contains(number)).collect();
        assert_eq!(
            lost,
            Vec::<u64>::new(),
            "round {round}: of {count}, {settled} of them settled, cursor at {}: {:?}",
            drained.cursor,
            drained.said
        );
        match drained.said("SegmentSetAside") {
            true => aside += 1,
            false => whole += 1,
        }
        restarted += usize::from(drained.said("ended with 74"));
    }
    println!("{whole} opened as they were, {aside} were set aside; {restarted} had to be started again");
}

#[test]
fn a_newer_queue_is_refused_and_left_alone() {
    let fixture = Fixture::new();
    filled(&fixture);
    fs::write(fixture.config.path.join("HIGHEST"), files::numbers_line(&[3, 11, 1, 5])).unwrap();
    let before = fs::read(fixture.newest().join("db")).unwrap();
    for error in [Queue::open(&fixture.config).unwrap_err(), Queue::inspect(&fixture.config).err().unwrap()] {
        assert!(matches!(&error, QueueError::TooNew { found: 3, supported: 2, .. }), "{error:?}");
        assert!(error.to_string().ends_with("use the newer program again"), "{error}");
    }
    assert_eq!(fs::read(fixture.newest().join("db")).unwrap(), before);
    assert_eq!(fixture.segments(), [1]);
}
