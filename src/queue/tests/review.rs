//! Damage, kills and looks as a second review tried them.

use std::fs;
use std::sync::Mutex;

use super::damage::opened_until_readable;
use super::*;

fn with_cursor(numbers: std::ops::Range<u64>) -> Batch {
    let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(numbers.end)))];
    Batch { cursors, ..batch(numbers) }
}

/// Says that the newest segment can't be trusted, though nothing is wrong with it.
fn condemn(path: &Path) {
    let newest = log::segments(path).unwrap().into_iter().rfind(|name| name.first > 0).unwrap();
    files::note_damaged(path, newest.number, "a test says so").unwrap();
}

/// Zeroes the pieces of a log for which `is_hit` says so.
fn destroy(db: &Path, is_hit: impl Fn(&piece::Piece) -> bool) -> usize {
    let mut log = fs::read(db).unwrap();
    let places: Vec<_> = memchr::memmem::find_iter(&log, &piece::MAGIC).collect();
    let mut hits = 0;
    for at in places {
        let Some(found) = piece::Piece::find(&log[at..]) else { continue };
        if is_hit(&found) {
            let length = found.bytes();
            log[at..at + length].fill(0);
            hits += 1;
        }
    }
    fs::write(db, log).unwrap();
    hits
}

/// damaged-1 from long ago, all of it drained; then segment-2 (waiting), segment-3 (newest).
fn with_an_old_damaged_one(fixture: &Fixture) {
    let queue = fixture.open();
    queue.append(with_cursor(0..100)).unwrap();
    queue.close().unwrap();
    condemn(&fixture.config.path);
    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    assert_eq!(repairs.len(), 1);
    assert_eq!(everything(&queue).len(), 100);
    queue.settle(delivered(1..=100)).unwrap();
    queue.append(with_cursor(100..400)).unwrap();
    queue.roll().unwrap();
    queue.append(with_cursor(400..500)).unwrap();
    queue.close().unwrap();
    let queue = fixture.open();
    assert_eq!(everything(&queue).len(), 400);
    queue.close().unwrap();
    assert_eq!(fixture.segments(), [2, 3, 4]);
}

#[test]
fn a_segment_that_is_gone_behind_an_old_damaged_one_is_missed() {
    let fixture = Fixture::new();
    with_an_old_damaged_one(&fixture);
    fs::remove_dir_all(fixture.segment(2)).unwrap();
    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    let read = queue.page(None, 1000).map(|page| page.len());
    let missing: u64 = repairs.iter().map(Repair::missing).sum();
    assert!(missing >= 300 || read.is_err(), "300 events are gone in silence");
}

#[test]
fn damage_that_grows_in_a_damaged_segment_is_said() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(with_cursor(0..300)).unwrap();
    queue.close().unwrap();
    condemn(&fixture.config.path);
    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    assert_eq!((repairs.len(), repairs[0].missing()), (1, 0));
    queue.append(with_cursor(300..301)).unwrap();
    assert_eq!(everything(&queue).len(), 301);
    queue.close().unwrap();
    // The disk goes on failing.
    zero(&fixture.config.path.join("damaged-1/db"));
    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    let read = queue.page(None, 1000).map(|page| page.len());
    let missing: u64 = repairs.iter().map(Repair::missing).sum();
    assert!(missing >= 300 || read.is_err(), "300 events are gone in silence");
}

#[test]
fn a_damaged_folder_that_is_gone_is_missed() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(with_cursor(0..300)).unwrap();
    queue.close().unwrap();
    condemn(&fixture.config.path);
    let (queue, _) = Queue::open(&fixture.config).unwrap();
    queue.append(with_cursor(300..301)).unwrap();
    queue.close().unwrap();
    fs::remove_dir_all(fixture.config.path.join("damaged-1")).unwrap();
    let (_queue, repairs) = Queue::open(&fixture.config).unwrap();
    assert!(repairs.iter().map(Repair::missing).sum::<u64>() >= 300);
}

fn three(fixture: &Fixture) {
    let queue = fixture.open();
    for segment in 0..3_u64 {
        queue.append(with_cursor(segment * 300..segment * 300 + 300)).unwrap();
        if segment < 2 {
            queue.roll().unwrap();
        }
    }
    queue.settle(delivered(1..=100)).unwrap();
    queue.close().unwrap();
}

#[test]
fn first_that_is_wrong_deletes_nothing() {
    let mut wrong = Vec::new();
    for number in 1..=3_u64 {
        for text in ["", "banana\n", "1\n", "201\n", "901\n", "0\n", "9000000000000000000\n"] {
            let fixture = Fixture::new();
            three(&fixture);
            fs::write(fixture.segment(number).join("FIRST"), text).unwrap();
            let context = format!("segment {number}, FIRST {text:?}");
            let (queue, repairs) = opened_until_readable(&fixture, &context);
            let missing: u64 = repairs.iter().map(Repair::missing).sum();
            let found = everything(&queue).len() as u64;
            if found != 800 || missing < 800 - found {
                wrong.push((number, text, found, missing));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn a_look_at_damage_changes_nothing() {
    let fixture = Fixture::new();
    three(&fixture);
    zero(&fixture.segment(2).join("db"));
    let queue = Queue::inspect(&fixture.config).unwrap();
    let error = queue.page(None, 1000).unwrap_err();
    println!("{error}");
    assert!(!fixture.config.path.join("DAMAGED").exists(), "looking has written DAMAGED");
}

/// The folder at each sync of the writer.
fn copies_at_syncs(fixture: &Fixture, queue: &Queue) -> (Arc<AtomicU64>, PathBuf) {
    let to = fixture.folder.path().join("copies");
    fs::create_dir(&to).unwrap();
    let count = Arc::new(AtomicU64::new(0));
    let (from, into, counter) = (fixture.config.path.clone(), to.clone(), Arc::clone(&count));
    Fixture::on_sync(queue, move || {
        let nth = counter.fetch_add(1, Ordering::SeqCst);
        copy_to(&from, &into.join(nth.to_string()));
        Ok(())
    });
    (count, to)
}

/// Rejections of a torn batch, which was removed at the next opening: are they there for who reads the log raw?
fn torn_rejections() -> (Fixture, QueueConfig) {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..10)).unwrap();
    let (count, to) = copies_at_syncs(&fixture, &queue);
    let rejections = (0..30).map(|_| rejection(&[b'x'; 60_000])).collect();
    queue.append(Batch { rejections, ..Batch::default() }).unwrap();
    assert!(count.load(Ordering::SeqCst) >= 3);
    queue.close().unwrap();
    let config = QueueConfig { path: to.join("1"), ..fixture.config.clone() };
    // Killed at the second part. Then the numbers are given anew, to events.
    let (queue, repairs) = Queue::open(&config).unwrap();
    assert_eq!(repairs, []);
    assert_eq!(queue.stats().dead_letters, 0);
    queue.append(batch(10..40)).unwrap();
    assert_eq!((queue.stats().dead_letters, queue.dead_letters(None, 100).unwrap().len()), (0, 0));
    queue.close().unwrap();
    (fixture, config)
}

#[test]
fn a_look_shows_no_dead_letters_of_a_torn_batch() {
    let (_fixture, config) = torn_rejections();
    let looked = Queue::inspect(&config).unwrap();
    let letters: Vec<_> = looked.dead_letters(None, 100).unwrap().iter().map(|letter| letter.sequence.get()).collect();
    assert_eq!((looked.stats().dead_letters, letters), (0, vec![]));
}

#[test]
fn salvage_brings_no_dead_letters_of_a_torn_batch() {
    let (_fixture, config) = torn_rejections();
    condemn(&config.path);
    let (queue, _repairs) = Queue::open(&config).unwrap();
    assert_eq!(everything(&queue).len(), 40);
    let letters: Vec<_> = queue.dead_letters(None, 100).unwrap().iter().map(|letter| letter.sequence.get()).collect();
    assert_eq!((queue.stats().dead_letters, letters), (0, vec![]));
}

#[test]
fn a_look_shows_no_cursors_that_were_forgotten() {
    let fixture = Fixture::new();
    three(&fixture);
    zero(&fixture.segment(2).join("db"));
    let (queue, _) = Queue::open(&fixture.config).unwrap();
    queue.page(None, 1000).unwrap_err();
    drop(queue);
    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    assert_eq!(repairs.len(), 1);
    assert_eq!(queue.cursors().unwrap(), []);
    queue.close().unwrap();
    assert_eq!(Queue::inspect(&fixture.config).unwrap().cursors().unwrap(), []);
}

#[test]
fn a_dead_letter_is_not_there_before_its_event_has_left() {
    let mut wrong = Vec::new();
    for payload in [520_600, 521_200, 521_800, 522_200] {
        let fixture = Fixture::new();
        let queue = fixture.open();
        queue.append(batch(0..10)).unwrap();
        let to = fixture.folder.path().join("copies");
        fs::create_dir(&to).unwrap();
        let count = Arc::new(AtomicU64::new(0));
        let released = Arc::new(Mutex::new(()));
        let held = released.lock().unwrap();
        let (from, into, counter, gate) =
            (fixture.config.path.clone(), to.clone(), Arc::clone(&count), Arc::clone(&released));
        Fixture::on_sync(&queue, move || {
            let nth = counter.fetch_add(1, Ordering::SeqCst);
            drop(gate.lock().unwrap());
            copy_to(&from, &into.join(nth.to_string()));
            Ok(())
        });
        let first = queue.submit(batch(10..11));
        eventually("the gate", || count.load(Ordering::SeqCst) == 1);
        // In one round: a refusal, and one long event that just seems to fit beside it.
        let settle = queue.submit_settle(vec![(sequence(1), refused("no"))]);
        let long = queue.submit(Batch { events: vec![event(11, payload)], ..Batch::default() });
        drop(held);
        first.wait().unwrap();
        settle.wait().unwrap();
        long.wait().unwrap();
        let syncs = count.load(Ordering::SeqCst);
        queue.close().unwrap();
        for nth in 0..syncs {
            let config = QueueConfig { path: to.join(nth.to_string()), ..fixture.config.clone() };
            let (queue, repairs) = Queue::open(&config).unwrap();
            assert_eq!(repairs, []);
            let waits = everything(&queue).iter().any(|envelope| envelope.sequence.get() == 1);
            let dead = queue.dead_letter(sequence(1)).unwrap().is_some();
            println!("{payload}: killed at sync {nth} of {syncs}: waits {waits}, dead {dead}");
            if waits && dead {
                queue.settle(vec![(sequence(1), refused("again"))]).unwrap();
                let counts = (queue.stats().dead_letters, queue.dead_letters(None, 10).unwrap().len());
                wrong.push((payload, nth, counts));
            }
        }
    }
    assert!(wrong.is_empty(), "it waits and is a dead letter; refused again, it is counted twice: {wrong:?}");
}

#[test]
fn opening_takes_nothing_from_what_could_be_read_before() {
    let seed = seed();
    println!("{SEED}={seed}");
    let mut random = Random(seed);
    let mut wrong = Vec::new();
    for round in 0..30 {
        let fixture = Fixture::new();
        let queue = fixture.open();
        for number in 0..200_u64 {
            queue.append(with_cursor(number * 5..number * 5 + 5)).unwrap();
        }
        queue.close().unwrap();
        // A few bytes of the log, wherever no block is touched.
        let db = fixture.newest().join("db");
        let whole = fs::read(&db).unwrap();
        let whole_before = fixture.raw(1).whole_through(1);
        assert_eq!(whole_before, 1000);
        for _ in 0..200 {
            let mut log = whole.clone();
            let at = random.below(log.len() as u64 - 8) as usize;
            for byte in &mut log[at..at + 8] {
                *byte ^= random.below(255) as u8 + 1;
            }
            fs::write(&db, &log).unwrap();
            if fixture.raw(1).whole_through(1) == 1000 {
                break;
            }
        }
        assert_eq!(fixture.raw(1).whole_through(1), 1000);
        let mut found = 0;
        let mut said = Vec::new();
        for _ in 0..4 {
            let (queue, repairs) = Queue::open(&fixture.config).unwrap();
            said.extend(repairs);
            if queue.page(None, 10_000).is_ok() {
                found = everything(&queue).len();
                break;
            }
        }
        if found != 1000 {
            wrong.push((round, found, said));
        }
    }
    for one in &wrong {
        println!("{one:?}");
    }
    assert!(wrong.is_empty(), "{} rounds lost what could be read", wrong.len());
}

#[test]
fn dead_letters_that_are_lost_are_said() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..10)).unwrap();
    queue.settle((1..=10).map(|number| (sequence(number), refused("no"))).collect()).unwrap();
    queue.roll().unwrap();
    queue.append(with_cursor(10..20)).unwrap();
    queue.close().unwrap();
    assert_eq!(fixture.segments(), [2]);
    let hits = destroy(&fixture.newest().join("db"), |piece| piece.kind == piece::LETTER && piece.number <= 5);
    assert!(hits > 0);
    condemn(&fixture.config.path);
    let (queue, _repairs) = Queue::open(&fixture.config).unwrap();
    let stats = queue.stats();
    assert_eq!(stats.pending, 10);
    assert!(
        stats.dead_letters == 10 || stats.missing >= 5,
        "{} of 10 dead letters, {} missing",
        stats.dead_letters,
        stats.missing
    );
}

/// A stale cursor in the middle of the log: nobody needs it.
#[test]
fn a_stale_cursor_that_is_damaged_costs_no_event() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    for number in 0..20_u64 {
        queue.append(with_cursor(number * 10..number * 10 + 10)).unwrap();
    }
    queue.close().unwrap();
    let batch = fixture.raw(1).last_batch / 2;
    let hits = destroy(&fixture.newest().join("db"), |piece| piece.kind == piece::CURSOR && piece.batch == batch);
    assert!(hits > 0);
    assert_eq!(fixture.raw(1).whole_through(1), 200, "every event is there");
    let (queue, _repairs) = Queue::open(&fixture.config).unwrap();
    assert_eq!(everything(&queue).len(), 200);
}

/// HIGHEST with one bit changed.
#[test]
fn a_bit_of_highest_costs_nothing() {
    let mut wrong = Vec::new();
    for (at, bits) in [(0, 0..2), (3, 0..1), (18, 0..1), (30, 0..1)] {
        for bit in bits {
            let fixture = Fixture::new();
            let queue = fixture.open();
            queue.append(with_cursor(0..30)).unwrap();
            queue.close().unwrap();
            let file = fixture.config.path.join("HIGHEST");
            let mut text = fs::read(&file).unwrap();
            text[at] ^= 1 << bit;
            fs::write(&file, &text).unwrap();
            let said = match Queue::open(&fixture.config) {
                Err(error) => format!("never opens: {error}"),
                Ok((queue, repairs)) => {
                    let found = everything(&queue).len();
                    let next = queue.append(batch(30..31)).map(|accepted| accepted.sequences[0].get());
                    if found == 30 && repairs.is_empty() && next.as_ref().is_ok_and(|next| *next == 31) {
                        continue;
                    }
                    format!("found {found}, next {next:?}, {:?}", repairs.first())
                }
            };
            wrong.push((String::from_utf8_lossy(&text).into_owned(), said));
        }
    }
    wrong.iter().for_each(|one| println!("{one:?}"));
    assert!(wrong.is_empty(), "{}", wrong.len());
}

#[test]
fn what_is_missing_is_a_dead_letter_however_many_there_are() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let one = |number: u64| Rejection { origin: Origin::Hook, ..rejection(&number.to_be_bytes()) };
    for batch in 0..21 {
        let rejections = (batch * 1000..(batch + 1) * 1000).map(one).collect();
        queue.append(Batch { rejections, ..Batch::default() }).unwrap();
    }
    assert_eq!(queue.stats().dead_letters, 20_000);
    queue.append(batch(0..300)).unwrap();
    queue.roll().unwrap();
    queue.close().unwrap();
    zero(&fixture.segment(1).join("db"));
    let (queue, _repairs) = Queue::open(&fixture.config).unwrap();
    drop(queue);
    let (queue, _again) = Queue::open(&fixture.config).unwrap();
    let damaged = queue.dead_letters(Some(sequence(20_299)), 1000).unwrap();
    assert!(damaged.iter().any(|letter| letter.failure.kind == FailureKind::Damaged), "no dead letter says it");
}

type Seen = (Vec<(u64, u64)>, Vec<(u64, Option<u64>)>, Vec<(PathBuf, u64)>, QueueStats);

fn seen(queue: &Queue) -> Seen {
    let events =
        everything(queue).iter().map(|envelope| (envelope.sequence.get(), number_of(&envelope.event))).collect();
    let letters = all_letters(queue).into_iter().map(|letter| {
        let number = match &letter.content {
            DeadContent::Event { event, .. } => Some(number_of(event)),
            DeadContent::Input(_) => None,
        };
        (letter.sequence.get(), number)
    });
    let letters = letters.collect();
    let cursors = queue.cursors().unwrap().into_iter().map(|(path, cursor)| (path, cursor.offset)).collect();
    let stats = QueueStats { disk_bytes: 0, ..queue.stats() };
    (events, letters, cursors, stats)
}

/// What a look shows, and what is salvaged, against what is there, at each sync of a run of anything.
#[test]
fn a_look_and_a_salvage_are_what_opening_gives() {
    let seed = seed();
    println!("{SEED}={seed}");
    let mut random = Random(seed);
    let fixture = Fixture::new();
    let mut wrong = Vec::new();
    let mut checked = 0;
    for life in 0..rounds(1) {
        let (queue, repairs) = Queue::open(&fixture.config).unwrap();
        assert_eq!(repairs, []);
        let (_, copies) = copies_at_syncs(&fixture, &queue);
        let mut next = u64::from(life) * 1_000_000;
        for _ in 0..25 {
            match random.below(10) {
                0 => {
                    let rejections = (0..random.below(12)).map(|_| rejection(&[b'x'; 60_000])).collect();
                    queue.append(Batch { rejections, ..Batch::default() }).unwrap();
                }
                1 => queue.roll().unwrap(),
                2..5 => {
                    let window = queue.window(None, random.below(40) as usize, u64::MAX).unwrap();
                    let outcomes = window.iter().map(|envelope| {
                        (envelope.sequence, if random.below(4) == 0 { refused("no") } else { Outcome::Delivered })
                    });
                    queue.settle(outcomes.collect()).unwrap();
                }
                5 => {
                    for letter in queue.dead_letters(None, 3).unwrap() {
                        if random.below(2) == 0 {
                            queue.retry_dead_letter(letter.sequence).unwrap();
                        } else {
                            queue.drop_dead_letter(letter.sequence).unwrap();
                        }
                    }
                }
                6 => {
                    let first = next;
                    next += 4;
                    let events = (first..next).map(|number| event(number, 300_000)).collect();
                    let cursors = vec![(PathBuf::from("/t/b"), Some(cursor(next)))];
                    queue
                        .append(Batch { events, cursors, rejections: vec![rejection(b"?"); 2], ..Batch::default() })
                        .unwrap();
                }
                _ => {
                    let first = next;
                    next += random.below(20) + 1;
                    let path = PathBuf::from(format!("/t/{}", random.below(4)));
                    let cursors = vec![(path, (random.below(4) > 0).then(|| cursor(next)))];
                    queue.append(Batch { cursors, ..batch(first..next) }).unwrap();
                }
            }
        }
        queue.close().unwrap();
        let mut folders: Vec<_> = fs::read_dir(&copies).unwrap().map(|entry| entry.unwrap().path()).collect();
        folders.sort_by_key(|path| path.file_name().unwrap().to_str().unwrap().parse::<u64>().unwrap());
        let last = folders.len() - 1;
        for (nth, path) in folders.iter().enumerate() {
            if nth % 3 != 0 && nth != last {
                continue;
            }
            checked += 1;
            let config = QueueConfig { path: path.clone(), ..fixture.config.clone() };
            let looked = Queue::inspect(&config).map(|queue| seen(&queue));
            let salvaged = fixture.folder.path().join("salvaged");
            copy_to(path, &salvaged);
            let (queue, repairs) = Queue::open(&config).unwrap();
            assert_eq!(repairs, [], "life {life} sync {nth}: a false alarm");
            let real = seen(&queue);
            drop(queue);
            let mut looked = match looked {
                Ok(looked) => looked,
                Err(error) => {
                    wrong.push(format!("life {life} sync {nth}: no look: {error}"));
                    continue;
                }
            };
            // It may end with rejections, which opening counts as settled.
            looked.3.missing = real.3.missing;
            for (what, is_same) in [
                ("events", looked.0 == real.0),
                ("letters", looked.1 == real.1),
                ("cursors", looked.2 == real.2),
                ("stats", looked.3 == real.3),
            ] {
                if !is_same {
                    let shown = match what {
                        "events" => format!("{} {}", looked.0.len(), real.0.len()),
                        "letters" => format!("{:?} {:?}", looked.1, real.1),
                        "cursors" => format!("{:?} {:?}", looked.2, real.2),
                        _ => format!("{:?} {:?}", looked.3, real.3),
                    };
                    wrong.push(format!("life {life} sync {nth}: a look at {what}: {shown}"));
                }
            }
            let config = QueueConfig { path: salvaged.clone(), ..fixture.config.clone() };
            condemn(&salvaged);
            let (queue, repairs) = Queue::open(&config).unwrap();
            let found = seen(&queue);
            drop(queue);
            let missing: u64 = repairs.iter().map(Repair::missing).sum();
            if missing > 0 || !real.0.iter().all(|one| found.0.contains(one)) {
                wrong.push(format!(
                    "life {life} sync {nth}: salvaged {} of {}, missing {missing}",
                    found.0.len(),
                    real.0.len()
                ));
            } else if found.0 != real.0 {
                wrong.push(format!("life {life} sync {nth}: salvaged events {} of {}", found.0.len(), real.0.len()));
            }
            if found.1 != real.1 {
                wrong.push(format!("life {life} sync {nth}: salvaged letters {:?} of {:?}", found.1, real.1));
            }
            fs::remove_dir_all(&salvaged).unwrap();
        }
        // The next life goes on from where a kill has left it.
        let chosen = &folders[random.below(folders.len() as u64) as usize];
        println!("life {life}: {} syncs, on from {chosen:?}", folders.len());
        let keep = fixture.folder.path().join("keep");
        copy_to(chosen, &keep);
        fs::remove_dir_all(&fixture.config.path).unwrap();
        fs::remove_dir_all(&copies).unwrap();
        fs::rename(&keep, &fixture.config.path).unwrap();
    }
    println!("{checked} checked");
    wrong.iter().for_each(|one| println!("{}", one.get(..one.len().min(700)).unwrap_or(one)));
    assert!(wrong.is_empty(), "{} differ", wrong.len());
}

/// Readers beside a writer that begins and lets go of segments all the time.
#[test]
fn readers_meet_no_error_while_segments_come_and_go() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut threads = Vec::new();
    for kind in 0..4 {
        let (queue, stop) = (queue.clone(), Arc::clone(&stop));
        threads.push(std::thread::spawn(move || {
            let mut rounds = 0_u64;
            while !stop.load(Ordering::SeqCst) {
                rounds += 1;
                match kind {
                    0 => {
                        let page = queue.window(None, 50, u64::MAX).unwrap();
                        assert!(page.is_sorted_by(|one, other| one.sequence.get() + 1 == other.sequence.get()));
                    }
                    1 => drop(everything(&queue)),
                    2 => drop(queue.dead_letters(None, 100).unwrap()),
                    _ => drop(queue.cursors().unwrap()),
                }
            }
            rounds
        }));
    }
    let begun = Instant::now();
    let mut number = 0;
    let mut settled = 0;
    while begun.elapsed() < Duration::from_secs(3) {
        queue.append(with_cursor(number..number + 40)).unwrap();
        number += 40;
        if number % 160 == 0 {
            queue.roll().unwrap();
        }
        if number > 400 {
            let through = settled + 40;
            let mut outcomes = delivered(settled + 1..through);
            outcomes.push((sequence(through), refused("no")));
            queue.settle(outcomes).unwrap();
            settled = through;
            if settled % 400 == 0 {
                for letter in queue.dead_letters(None, 10).unwrap() {
                    queue.drop_dead_letter(letter.sequence).unwrap();
                }
            }
        }
    }
    stop.store(true, Ordering::SeqCst);
    let rounds: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    println!("{number} events, {settled} settled, {rounds:?} readings");
    queue.close().unwrap();
}

#[test]
fn a_dead_letter_is_counted_once_after_its_settlement_was_lost() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..100)).unwrap();
    queue.settle(vec![(sequence(1), refused("no"))]).unwrap();
    let batch_of_letter = fixture.raw(1).last_batch;
    queue.close().unwrap();
    // The latest mark is lost; an older one is still there in the log.
    let db = fixture.newest().join("db");
    let hits = destroy(&db, |piece| piece.kind == piece::MARK && piece.batch >= batch_of_letter);
    condemn(&fixture.config.path);
    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    let waits = everything(&queue).first().is_some_and(|envelope| envelope.sequence.get() == 1);
    let dead = queue.dead_letter(sequence(1)).unwrap().is_some();
    println!("{hits} {repairs:?} waits {waits} dead {dead}");
    queue.settle(vec![(sequence(1), refused("no"))]).unwrap();
    let counts = (queue.stats().dead_letters, queue.dead_letters(None, 1000).unwrap().len() as u64);
    assert_eq!(counts.0, counts.1);
}

/// Where sled goes back to an earlier state by itself, what is behind it in the log must not be believed.
#[test]
fn what_sled_has_gone_back_behind_is_not_believed() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..100)).unwrap();
    for number in 1..=50 {
        queue.settle(vec![(sequence(number), refused("no"))]).unwrap();
    }
    queue.close().unwrap();
    destroy(&fixture.newest().join("db"), |piece| piece.kind == piece::LETTER && piece.number == 5);
    println!("raw {:?}", fixture.raw(1).marks());
    let (queue, _repairs) = Queue::open(&fixture.config).unwrap();
    queue.append(batch(100..110)).unwrap();
    queue.close().unwrap();
    println!("raw {:?}", fixture.raw(1).marks());
    let looked = Queue::inspect(&fixture.config).unwrap().stats();
    let (queue, again) = Queue::open(&fixture.config).unwrap();
    println!("{again:?}");
    assert_eq!(
        (again, looked.pending, looked.dead_letters),
        (vec![], queue.stats().pending, queue.stats().dead_letters)
    );
}

/// Stale blocks of a torn batch must not stand for what was acknowledged under their numbers.
#[test]
fn events_of_a_torn_batch_do_not_hide_that_others_are_lost() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..10)).unwrap();
    let (_, to) = copies_at_syncs(&fixture, &queue);
    queue.append(batch(10_000..12_000)).unwrap();
    queue.close().unwrap();
    let config = QueueConfig { path: to.join("2"), ..fixture.config.clone() };
    let (queue, repairs) = Queue::open(&config).unwrap();
    assert_eq!(repairs, []);
    // Other events take the numbers.
    queue.append(batch(10..310)).unwrap();
    assert_eq!(everything(&queue).len(), 310);
    queue.close().unwrap();
    let db = config.path.join("segment-1/db");
    destroy(&db, |piece| piece.kind == piece::BLOCK && piece.batch > 6 && piece.number < 100);
    condemn(&config.path);
    let (queue, repairs) = Queue::open(&config).unwrap();
    let all: Vec<_> = everything(&queue).iter().map(|envelope| number_of(&envelope.event)).collect();
    let missing: u64 = repairs.iter().map(Repair::missing).sum();
    let lost = (0..310).filter(|number| !all.contains(number)).count() as u64;
    let phantoms = all.iter().filter(|number| **number >= 310).count();
    assert!(
        missing >= lost,
        "{lost} acknowledged events are lost, {missing} are said to be missing; {phantoms} others stand for them"
    );
}

/// A segment that is all zeros, and HIGHEST was lost with it (it is never synced).
#[test]
fn a_zeroed_newest_segment_without_highest_is_kept_and_said() {
    let fixture = Fixture::new();
    three(&fixture);
    fs::remove_file(fixture.config.path.join("HIGHEST")).unwrap();
    zero(&fixture.segment(3).join("db"));
    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    let next = queue.append(batch(900..901)).unwrap().sequences[0];
    assert!(next.get() > 600 && !repairs.is_empty(), "{next} {repairs:?}");
    assert!(fixture.config.path.join("damaged-3/db").exists());
}

/// Half of a batch that was never committed, where the newest segment is damaged as well.
#[test]
fn salvage_takes_no_half_of_a_batch() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..10)).unwrap();
    let (_, to) = copies_at_syncs(&fixture, &queue);
    queue.append(with_cursor(10..2010)).unwrap();
    queue.close().unwrap();
    let config = QueueConfig { path: to.join("2"), ..fixture.config.clone() };
    condemn(&config.path);
    let (queue, _repairs) = Queue::open(&config).unwrap();
    assert_eq!(everything(&queue).len(), 10);
}

/// Chunks of a torn batch under the number of an event that needs none.
#[test]
fn a_whole_event_is_not_lost_for_what_a_torn_batch_left_under_its_number() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..10)).unwrap();
    let (_, to) = copies_at_syncs(&fixture, &queue);
    queue
        .append(Batch { events: (10..20).map(|number| event(number, 200_000)).collect(), ..Batch::default() })
        .unwrap();
    queue.close().unwrap();
    let config = QueueConfig { path: to.join("2"), ..fixture.config.clone() };
    let (queue, repairs) = Queue::open(&config).unwrap();
    assert_eq!((repairs, everything(&queue).len()), (vec![], 10));
    queue.append(batch(10..40)).unwrap();
    queue.close().unwrap();
    // Nothing of an event is damaged.
    condemn(&config.path);
    let (queue, repairs) = Queue::open(&config).unwrap();
    let found = everything(&queue).len();
    assert_eq!((found, repairs[0].missing()), (40, 0));
}

/// Two segments are damaged, and the process dies on the way.
#[test]
fn two_damaged_segments_and_a_death_on_the_way() {
    let mut wrong = Vec::new();
    for fault in [
        "open-locked",
        "damage-noted:1",
        "damage-noted:2",
        "damage-moved:1",
        "damage-moved:2",
        "segment-copied",
        "segment-committed",
        "open-segment-created",
        "open-recovered",
        "commit-before-apply",
        "commit-applied",
        "commit-synced",
        "none",
    ] {
        let fixture = Fixture::new();
        three(&fixture);
        let hit = |number: u64, from: u64, to: u64| {
            destroy(&fixture.segment(number).join("db"), |piece| {
                piece.kind == piece::BLOCK && (from..to).contains(&piece.number)
            })
        };
        assert!(hit(1, 150, 200) > 0 && hit(3, 700, 750) > 0);
        condemn(&fixture.config.path);
        fs::write(fixture.config.path.join("DAMAGED"), "1 met while it was read\n").unwrap();
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "queue::tests::review::opening_child", "--ignored", "--nocapture", "--test-threads=1"])
            .env("HEADSPACE_REVIEW_QUEUE", &fixture.config.path)
            .env("HEADSPACE_FAULT_POINT", fault)
            .output()
            .unwrap();
        let died = !child.status.success();
        let (queue, repairs) = Queue::open(&fixture.config).unwrap();
        let found: Vec<_> = everything(&queue).iter().map(|envelope| number_of(&envelope.event)).collect();
        let lost = (100..900).filter(|number| !found.contains(number)).count() as u64;
        let missing: u64 = repairs.iter().map(Repair::missing).sum();
        let letters = queue.dead_letters(None, 100).unwrap();
        let cursors = queue.cursors().unwrap().len();
        println!("{fault}: died {died}, lost {lost}, missing {missing}, {} letters, {cursors} cursors", letters.len());
        let is_said = missing >= lost || (missing == 0 && !letters.is_empty());
        if !is_said || cursors > 0 || letters.is_empty() || died == (fault == "none") {
            wrong.push((fault, died, lost, missing, letters.len(), cursors));
        }
        let next = queue.append(batch(900..901)).unwrap().sequences[0].get();
        assert!(next > 900);
        queue.close().unwrap();
        let (queue, again) = Queue::open(&fixture.config).unwrap();
        assert_eq!((again, everything(&queue).len()), (vec![], found.len() + 1), "{fault}");
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
#[ignore = "the child of the test above"]
fn opening_child() {
    let Some(path) = std::env::var_os("HEADSPACE_REVIEW_QUEUE") else { return };
    let config = QueueConfig { path: path.into(), max_pending_bytes: u64::MAX / 2 };
    let (queue, _) = Queue::open(&config).unwrap();
    queue.close().unwrap();
}

/// What was drained long ago from a damaged segment.
#[test]
fn what_was_drained_from_an_old_damaged_one_does_not_come_back() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(with_cursor(0..100)).unwrap();
    queue.close().unwrap();
    condemn(&fixture.config.path);
    let (queue, _) = Queue::open(&fixture.config).unwrap();
    let outcomes =
        (1..=100).map(|number| (sequence(number), if number == 7 { refused("no") } else { Outcome::Delivered }));
    queue.settle(outcomes.collect()).unwrap();
    queue.drop_dead_letter(sequence(7)).unwrap();
    queue.append(with_cursor(100..400)).unwrap();
    queue.settle(delivered(101..=300)).unwrap();
    queue.close().unwrap();
    // A year later.
    zero(&fixture.segment(2).join("db"));
    let (queue, _repairs) = Queue::open(&fixture.config).unwrap();
    let found = everything(&queue).len();
    assert_eq!(found, 0, "it was delivered, and what was dropped is there again");
}

/// A mark that went back silently, with segments gone behind it.
#[test]
fn what_was_overwritten_long_ago_may_be_damaged() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..100)).unwrap();
    for number in 1..=20 {
        queue.settle(vec![(sequence(number), refused("no"))]).unwrap();
    }
    for number in 1..=20 {
        assert!(queue.drop_dead_letter(sequence(number)).unwrap());
    }
    queue.close().unwrap();
    let at = fixture.raw(1).last_batch / 3;
    assert!(destroy(&fixture.newest().join("db"), |piece| piece.kind == piece::LETTER && piece.batch == at) > 0);
    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    assert_eq!((repairs, queue.stats().pending, queue.stats().dead_letters), (vec![], 80, 0), "nobody needs it");
}

/// Life after life of anything, with damage to one or two logs in each.
#[test]
fn damage_upon_damage() {
    let seed = seed();
    println!("{SEED}={seed}");
    let mut random = Random(seed);
    let mut wrong = Vec::new();
    let mut lives = 0;
    for world in 0..rounds(15) {
        let fixture = Fixture::new();
        let mut all: std::collections::BTreeMap<u64, u64> = std::collections::BTreeMap::new();
        let mut waiting = std::collections::BTreeSet::new();
        let (mut next, mut highest) = (0_u64, 0_u64);
        let mut story = String::new();
        for _ in 0..4 {
            lives += 1;
            let (queue, repairs) = opened_until_readable(&fixture, &format!("world {world}:{story}"));
            let found: Vec<(u64, u64)> = everything(&queue)
                .iter()
                .map(|envelope| (envelope.sequence.get(), number_of(&envelope.event)))
                .collect();
            let missing: u64 = repairs.iter().map(Repair::missing).sum();
            let known: std::collections::BTreeSet<u64> = found.iter().map(|one| one.0).collect();
            let lost = waiting.iter().filter(|one| !known.contains(one)).count() as u64;
            if lost > missing {
                wrong.push(format!("world {world}: lost {lost}, missing {missing}:{story} {repairs:?}"));
            }
            if lost > 0 && !queue.cursors().unwrap().is_empty() {
                wrong.push(format!("world {world}: cursors are kept:{story} {repairs:?}"));
            }
            if let Some(one) = found.iter().find(|(sequence, number)| all.get(sequence) != Some(number)) {
                wrong.push(format!("world {world}: {one:?} never was:{story} {repairs:?}"));
            }
            if !found.is_sorted_by(|one, other| one.0 < other.0) {
                wrong.push(format!("world {world}: out of order:{story}"));
            }
            waiting = known;
            story += &format!(" | found {} lost {lost} missing {missing} ({})", found.len(), repairs.len());
            for _ in 0..random.below(25) + 5 {
                match random.below(8) {
                    0 => queue.roll().unwrap(),
                    1 | 2 => {
                        let window = queue.window(None, random.below(60) as usize, u64::MAX).unwrap();
                        let outcomes: Vec<_> = window
                            .iter()
                            .map(|envelope| {
                                (
                                    envelope.sequence,
                                    if random.below(9) == 0 { refused("no") } else { Outcome::Delivered },
                                )
                            })
                            .collect();
                        outcomes.iter().for_each(|(sequence, _)| _ = waiting.remove(&sequence.get()));
                        queue.settle(outcomes).unwrap();
                    }
                    3 => {
                        queue.append(Batch { rejections: vec![rejection(b"?"); 3], ..Batch::default() }).unwrap();
                    }
                    _ => {
                        let first = next;
                        next += random.below(20) + 1;
                        let events: Vec<_> = (first..next)
                            .map(|number| event(number, [50, 900, 900, 9000][random.below(4) as usize]))
                            .collect();
                        let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(next)))];
                        let accepted = queue.append(Batch { events, cursors, ..Batch::default() }).unwrap();
                        for (sequence, number) in accepted.sequences.iter().zip(first..) {
                            if sequence.get() <= highest {
                                wrong.push(format!("world {world}: number {sequence:?} is used again:{story}"));
                            }
                            all.insert(sequence.get(), number);
                            waiting.insert(sequence.get());
                        }
                        highest = highest.max(accepted.sequences.last().unwrap().get());
                    }
                }
            }
            queue.close().unwrap();
            for _ in 0..random.below(3) {
                let segments = fixture.segments();
                let number = segments[random.below(segments.len() as u64) as usize];
                let db = fixture.segment(number).join("db");
                let mut bytes = fs::read(&db).unwrap_or_default();
                if bytes.is_empty() {
                    continue;
                }
                let what = random.below(6);
                story += &format!(" damage {what} to {number} of {segments:?}");
                match what {
                    0 => bytes.fill(0),
                    1 => bytes.truncate(random.below(bytes.len() as u64) as usize),
                    2 => fs::write(db.with_file_name("conf"), b"segment_size: banana\n").unwrap(),
                    3 if random.below(3) == 0 => drop(fs::remove_file(db.with_file_name("FIRST"))),
                    _ => {
                        for _ in 0..random.below(4) + 1 {
                            let at = random.below(bytes.len() as u64) as usize;
                            let length = [1, 8, 300, 5000, 100_000][random.below(5) as usize].min(bytes.len() - at);
                            bytes[at..at + length].iter_mut().for_each(|byte| *byte = random.below(256) as u8);
                        }
                    }
                }
                fs::write(&db, bytes).unwrap();
            }
        }
    }
    println!("{lives} lives");
    wrong.iter().for_each(|one| println!("{}", one.get(..one.len().min(1500)).unwrap_or(one)));
    assert!(wrong.is_empty(), "{}", wrong.len());
}
