//! Faults that a review found, each as the test that showed it.

use std::fs;
use std::sync::atomic::AtomicBool;

use super::damage::{leave, value_of};
use super::*;
use crate::queue::piece::Piece;
use crate::queue::segment::Segment;

fn aside(fixture: &Fixture) -> usize {
    let entries = fs::read_dir(&fixture.config.path).unwrap();
    entries.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("damaged-")).count()
}

/// Of the queue as it is on disk at this moment: what a kill leaves.
fn killed(fixture: &Fixture) -> QueueConfig {
    let path = fixture.folder.path().join("copy");
    copy_to(&fixture.config.path, &path);
    QueueConfig { path, ..fixture.config.clone() }
}

/// Blocks the writer in a sync: the n-th after it was armed.
struct Gate {
    reached: Arc<AtomicBool>,
    released: Arc<AtomicBool>,
}

fn gate(queue: &Queue, nth: u64) -> Gate {
    let (reached, released) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let gate = Gate { reached: Arc::clone(&reached), released: Arc::clone(&released) };
    let count = AtomicU64::new(0);
    Fixture::on_sync(queue, move || {
        if count.fetch_add(1, Ordering::SeqCst) + 1 == nth {
            reached.store(true, Ordering::SeqCst);
            while !released.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    });
    gate
}

#[test]
fn a_torn_segment_that_was_not_finished_is_a_left_over() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(5)))];
    queue.append(Batch { cursors, rejections: vec![rejection(b"?")], ..batch(0..10) }).unwrap();
    queue.settle(delivered(1..=5)).unwrap();
    queue.close().unwrap();
    let begun = Segment::make(&fixture.config.path, files::Name { number: 2, first: 0, is_damaged: false }).unwrap();
    begun.sync().unwrap();
    drop(begun);
    // A power cut: nothing of it was synced but its length.
    zero(&fixture.segment(2).join("conf"));
    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    assert_eq!(queue.stats().dead_letters, 1, "the dead letter");
    assert_eq!(everything(&queue).len(), 5);
    assert_eq!(queue.cursors().unwrap().len(), 1);
    assert!(!repairs.iter().any(Repair::is_loss));
}

#[test]
fn one_of_which_a_part_was_not_written_back_neither() {
    let mut said = Vec::new();
    for part in 0..5 {
        let fixture = Fixture::new();
        let queue = fixture.open();
        let rejections = || (0..20).map(|_| rejection(&[b'x'; 60_000])).collect();
        for _ in 0..3 {
            queue.append(Batch { rejections: rejections(), ..Batch::default() }).unwrap();
        }
        queue.append(batch(0..10)).unwrap();
        queue.close().unwrap();
        {
            let old = log::Source::Raw(fixture.raw(1).into());
            let begun =
                Segment::make(&fixture.config.path, files::Name { number: 2, first: 0, is_damaged: false }).unwrap();
            let mut left = log::Left::all_of(log::CARRIED);
            while old.carry_over(&mut left, &begun).unwrap() {}
        }
        let db = fixture.segment(2).join("db");
        let mut bytes = fs::read(&db).unwrap();
        let length = bytes.len();
        let from = part * 512 * 1024;
        if from + 512 * 1024 > length {
            break;
        }
        bytes[from..(from + 512 * 1024)].fill(0);
        fs::write(&db, bytes).unwrap();
        let (queue, repairs) = Queue::open(&fixture.config).unwrap();
        said.push((part, queue.stats().dead_letters, repairs.iter().any(Repair::is_loss)));
    }
    assert!(said.iter().all(|(_, letters, is_loss)| *letters == 60 && !is_loss), "{said:?}");
}

#[test]
fn reading_while_dead_letters_are_made_across_segments_is_no_damage() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..10)).unwrap();
    queue.roll().unwrap();
    queue.append(batch(10..20)).unwrap();
    let gate = gate(&queue, 1);
    let mut outcomes = delivered(1..=9);
    outcomes.extend((10..=12).map(|number| (sequence(number), refused("no"))));
    let ticket = queue.submit_settle(outcomes);
    eventually("the gate", || gate.reached.load(Ordering::SeqCst));
    let page = queue.page(None, 100);
    gate.released.store(true, Ordering::SeqCst);
    let settled = ticket.wait();
    assert!(page.is_ok(), "{:?}", page.err());
    settled.unwrap();
}

#[test]
fn where_all_segments_are_gone_no_number_is_given_again() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..10)).unwrap();
    queue.settle(delivered(1..=10)).unwrap();
    queue.roll().unwrap();
    queue.close().unwrap();
    assert_eq!(fixture.segments(), [2]);
    fs::remove_dir_all(fixture.newest()).unwrap();
    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    assert_eq!(repairs.iter().map(Repair::missing).sum::<u64>(), 10);
    assert_eq!(everything(&queue), []);
    assert!(queue.append(batch(10..11)).unwrap().sequences[0].get() > 10);
}

/// The next segment is the current one as soon as it is begun, also where nothing was added to it yet.
#[test]
fn a_new_segment_that_comes_back_empty_is_missed() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..10)).unwrap();
    queue.settle(delivered(1..=10)).unwrap();
    queue.roll().unwrap();
    // The process is killed: nothing is closed.
    let config = killed(&fixture);
    zero(&config.path.join("segment-2/db"));
    let (queue, repairs) = Queue::open(&config).unwrap();
    assert!(matches!(&repairs[..], [Repair::SegmentSetAside { .. }]), "{repairs:?}");
    assert!(queue.append(batch(10..11)).unwrap().sequences[0].get() > 10);
}

#[test]
fn what_was_missing_is_said_once() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..300)).unwrap();
    queue.roll().unwrap();
    queue.close().unwrap();
    assert_eq!(fixture.segments(), [1, 2]);
    zero(&fixture.config.path.join("segment-1/db"));
    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    assert_eq!(repairs.iter().map(Repair::missing).sum::<u64>(), 300);
    // The transcripts are read again; the database can't be reached, so nothing is settled.
    let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(5)))];
    queue.append(Batch { cursors, ..batch(0..10) }).unwrap();
    queue.close().unwrap();
    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    assert_eq!((repairs, aside(&fixture)), (vec![], 1));
    assert_eq!(queue.cursors().unwrap().len(), 1);
}

/// The same without any damage.
#[test]
fn rejections_alone_and_a_kill_are_no_damage() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..1)).unwrap();
    queue.settle(delivered(1..=1)).unwrap();
    // In one round: rejections, and a segment that begins. Then the process is idle, and killed.
    let gate = gate(&queue, 1);
    let first = queue.submit(batch(1..2));
    eventually("the gate", || gate.reached.load(Ordering::SeqCst));
    let settle = queue.submit_settle(delivered(2..=2));
    let rejections = queue.submit(Batch { rejections: vec![rejection(b"?"); 20], ..Batch::default() });
    let roll = queue.handle.shared.inbox.send(submission::Work::Roll);
    gate.released.store(true, Ordering::SeqCst);
    first.wait().unwrap();
    settle.wait().unwrap();
    rejections.wait().unwrap();
    roll.wait().unwrap();
    // The kill: what is on disk by now.
    let config = killed(&fixture);
    queue.close().unwrap();
    let (queue, _) = Queue::open(&config).unwrap();
    let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(5)))];
    queue.append(Batch { cursors, ..batch(2..3) }).unwrap();
    queue.close().unwrap();
    let (queue, repairs) = Queue::open(&config).unwrap();
    assert_eq!(repairs, []);
    assert_eq!(queue.cursors().unwrap().len(), 1);
}

#[test]
fn a_part_of_another_event_is_found_out_when_it_is_salvaged() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..10)).unwrap();
    queue.close().unwrap();
    // A process had written a part of a long event when it was killed.
    let content = vec![b'y'; piece::CONTENT_BYTES_MAX];
    let batch = fixture.raw(1).last_batch + 1;
    leave(&fixture, 1, &[Piece { kind: piece::CHUNK, number: 11, index: 1, batch, content }.encode()]);
    let (queue, _) = Queue::open(&fixture.config).unwrap();
    queue.append(Batch { events: vec![event(10, 20_000)], ..Batch::default() }).unwrap();
    queue.roll().unwrap();
    queue.append(super::batch(11..20)).unwrap();
    queue.close().unwrap();
    // The part that took its number is damaged.
    let db = fixture.segment(2).join("db");
    let value = value_of(&fixture, 2, piece::CHUNK, 11, 1);
    let mut log = fs::read(&db).unwrap();
    let places: Vec<_> = memchr::memmem::find_iter(&log, &value[..]).collect();
    assert!(!places.is_empty());
    places.into_iter().for_each(|at| log[at + 100] ^= 1);
    fs::write(&db, log).unwrap();
    let mut said = Vec::new();
    for _ in 0..5 {
        let (queue, _) = Queue::open(&fixture.config).unwrap();
        let read = queue.page(None, 100);
        said.push(read.is_ok());
    }
    assert!(said.contains(&true), "it never becomes readable; {} folders were kept aside", aside(&fixture));
}

#[test]
fn a_damaged_newest_segment_is_not_deleted_without_highest() {
    for thousandths in [1, 10, 50, 100, 500, 900] {
        let fixture = Fixture::new();
        let queue = fixture.open();
        queue.append(batch(0..100)).unwrap();
        queue.roll().unwrap();
        queue.append(batch(100..400)).unwrap();
        queue.close().unwrap();
        fs::remove_file(fixture.config.path.join("HIGHEST")).unwrap();
        let db = fixture.config.path.join("segment-2/db");
        let file = fs::File::options().write(true).open(&db).unwrap();
        file.set_len(file.metadata().unwrap().len() * thousandths / 1000).unwrap();
        drop(file);
        let (queue, repairs) = Queue::open(&fixture.config).unwrap();
        assert!(queue.stats().pending >= 100, "{thousandths}: {repairs:?}");
        assert_eq!(aside(&fixture), usize::from(!repairs.is_empty()), "{thousandths}: {repairs:?}");
    }
}

#[test]
fn a_cursor_set_and_forgotten_in_one_round_is_forgotten() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..1)).unwrap();
    let gate = gate(&queue, 1);
    let first = queue.submit(batch(1..2));
    eventually("the gate", || gate.reached.load(Ordering::SeqCst));
    let path = PathBuf::from("/t/a");
    let set = queue.submit(Batch { cursors: vec![(path.clone(), Some(cursor(5)))], ..Batch::default() });
    let forget = queue.submit(Batch { cursors: vec![(path, None)], ..Batch::default() });
    gate.released.store(true, Ordering::SeqCst);
    first.wait().unwrap();
    set.wait().unwrap();
    forget.wait().unwrap();
    assert_eq!(queue.cursors().unwrap(), []);
}

#[test]
fn pieces_inside_of_a_dead_letter_are_not_believed() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let far = codec::Totals { sequence: 1 << 40, events: 7, bytes: 7 };
    let inside = piece::mark(&codec::Marks { acknowledged: far, settled: far, ..Default::default() }, 1 << 40, 1).1;
    let bytes = inside.repeat(40_000 / inside.len());
    let mut random = Random(77);
    for number in 0..2000_u64 {
        let rejections = if number % 20 == 0 { vec![rejection(&bytes)] } else { Vec::new() };
        let cursors = (0..random.below(10))
            .map(|_| (PathBuf::from(format!("/t/{}", random.below(300))), Some(cursor(number))))
            .collect();
        queue.append(Batch { rejections, cursors, ..batch(number..number + 1) }).unwrap();
        if number % 40 == 39 {
            let raw = fixture.raw(1);
            assert!(raw.last_batch < 1 << 40, "after {number} appends it is believed");
        }
    }
}

fn hashes(path: &std::path::Path) -> Vec<(PathBuf, u32, u64)> {
    let mut found: Vec<_> = walkdir::WalkDir::new(path)
        .into_iter()
        .map(|entry| {
            let entry = entry.unwrap();
            let bytes = fs::read(entry.path()).unwrap_or_default();
            (entry.path().to_owned(), crc32fast::hash(&bytes), bytes.len() as u64)
        })
        .collect();
    found.sort();
    found
}

#[test]
fn a_look_changes_nothing_whatever_stands_in_the_folder() {
    for case in 0..6 {
        let fixture = Fixture::new();
        let queue = fixture.open();
        for segment in 0..3_u64 {
            queue
                .append(Batch { rejections: vec![rejection(b"?")], ..batch(segment * 100..segment * 100 + 100) })
                .unwrap();
            if segment < 2 {
                queue.roll().unwrap();
            }
        }
        queue.close().unwrap();
        let path = &fixture.config.path;
        match case {
            0 => fs::write(path.join("DAMAGED"), "1 1\n").unwrap(),
            1 => fs::write(path.join("DAMAGED"), "3 1\n").unwrap(),
            2 => fs::write(path.join("OPENING"), "3 2\n").unwrap(),
            // Read only after the first.
            4 => fs::write(path.join("segment-2/db"), [0; 5000]).unwrap(),
            3 => {
                // The newest is gone, and one that was being made is there.
                fs::remove_dir_all(path.join("segment-3")).unwrap();
                drop(Segment::make(path, files::Name { number: 4, first: 0, is_damaged: false }).unwrap());
            }
            _ => {
                fs::remove_dir_all(path.join("segment-3")).unwrap();
                fs::create_dir(path.join("segment-4")).unwrap();
                fs::write(path.join("segment-4/conf"), b"segment_size: banana\n").unwrap();
            }
        }
        let before = hashes(path);
        let looked = Queue::inspect(&fixture.config).map(|queue| queue.page(None, 1000).map(|page| page.len()));
        drop(looked);
        let after = hashes(path);
        assert!(
            before == after,
            "case {case}: {:?}",
            after.iter().filter(|one| !before.contains(one)).collect::<Vec<_>>()
        );
    }
}

#[test]
fn parts_that_a_dead_letter_has_left_are_removed() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(Batch { events: vec![event(0, 3_000_000)], ..Batch::default() }).unwrap();
    let gate = gate(&queue, 3);
    let ticket = queue.submit_settle(vec![(sequence(1), refused("x"))]);
    eventually("the gate", || gate.reached.load(Ordering::SeqCst));
    let config = killed(&fixture);
    gate.released.store(true, Ordering::SeqCst);
    ticket.wait().unwrap();
    queue.close().unwrap();
    let (queue, _) = Queue::open(&config).unwrap();
    queue.settle(delivered(1..=1)).unwrap();
    queue.close().unwrap();
    let (lock, opened) = opening::open(&config.path).unwrap();
    drop(lock);
    assert_eq!((opened.marks.letters.count, opened.marks.letters.bytes), (0, 0));
}

#[test]
#[ignore = "the child of the test below"]
fn letters_that_fill_a_segment() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    for _ in 0..40 {
        queue.append(Batch { rejections: vec![rejection(&[b'x'; 60_000])], ..Batch::default() }).unwrap();
    }
    let mut segments = fixture.segments();
    eventually("it comes to rest", || {
        std::thread::sleep(Duration::from_secs(1));
        std::mem::replace(&mut segments, fixture.segments()) == segments
    });
    assert_eq!(queue.stats().dead_letters, 40);
}

#[cfg(debug_assertions)]
#[test]
fn dead_letters_larger_than_a_segment_do_not_make_segments_for_ever() {
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["queue::tests::attacks::letters_that_fill_a_segment", "--exact", "--ignored", "--nocapture"])
        .env("HEADSPACE_SEGMENT_BYTES", "1000000")
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout).into_owned() + &String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success() && output.contains("1 passed"), "{output}");
}
