//! Large generations are sealed: memory does not grow with what waits, and nothing of it is lost or out of order.

use std::sync::atomic::AtomicBool;

use super::*;

/// The numbers of the generations that are there.
fn generations(fixture: &Fixture) -> Vec<u64> {
    folder::generations(&fixture.config.path).unwrap()
}

fn format_of(fixture: &Fixture) -> String {
    let pointer = std::fs::read_to_string(fixture.config.path.join("CURRENT")).unwrap();
    pointer.lines().next().unwrap().to_owned()
}

/// Events 0 to 49, 50 to 99, and so on, in a generation each; the last one is not sealed.
fn in_generations(queue: &Queue, count: u64) {
    for generation in 0..count {
        if generation > 0 {
            seal(queue);
        }
        queue.append(batch(generation * 50..(generation + 1) * 50)).unwrap();
    }
}

#[test]
fn sealed_generations_are_read_in_order_and_go_one_by_one() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    in_generations(&queue, 4);
    assert_eq!(generations(&fixture), [1, 2, 3, 4]);
    assert_eq!(format_of(&fixture), "format 3", "an older program would take them for left-overs");
    assert_eq!(numbers(&everything(&queue)), (1..=200).collect::<Vec<_>>());
    assert_eq!(numbers(&queue.window(sequence(120).into(), 3, u64::MAX).unwrap()), [121, 122, 123]);
    let before = queue.stats().disk_bytes;

    queue.settle(delivered((1..=50).chain(101..=150).chain([75]))).unwrap();
    queue.append(batch(200..201)).unwrap();
    assert_eq!(generations(&fixture), [2, 3, 4], "the third can't go before the second");
    assert!(queue.stats().disk_bytes < before);
    let left = || (51..75).chain(76..=100).chain(151..=201);
    assert_eq!(numbers(&everything(&queue)), left().collect::<Vec<_>>());

    queue.close().unwrap();
    let queue = fixture.open();
    assert_eq!(numbers(&everything(&queue)), left().collect::<Vec<_>>());
    queue.settle(delivered(51..=62)).unwrap();
    // Once more, as after an answer that was lost: 51 is the number of a block.
    queue.settle(delivered(51..=62)).unwrap();
    assert_eq!(queue.stats().pending, left().count() as u64 - 12);
    queue.settle(delivered(63..=100)).unwrap();
    queue.append(batch(201..202)).unwrap();
    assert_eq!(generations(&fixture), [4]);
    queue.settle(delivered(151..=202)).unwrap();
    assert!(queue.compact().unwrap());
    assert_eq!(format_of(&fixture), "format 2", "an older program may have it again");
    queue.close().unwrap();
    assert_eq!(fixture.open().stats().pending, 0);
}

#[test]
fn a_backlog_is_sealed_when_it_begins_to_be_drained() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    for first in (0..400).step_by(10) {
        let events = (first..first + 10).map(|number| event(number, 400_000)).collect();
        queue.append(Batch { events, ..Batch::default() }).unwrap();
    }
    assert_eq!(generations(&fixture), [1], "nobody drains it");
    queue.settle(delivered([1])).unwrap();
    queue.append(batch(400..401)).unwrap();
    assert_eq!(generations(&fixture), [1, 2]);
    queue.settle(delivered(2..=300)).unwrap();
    queue.append(batch(401..402)).unwrap();
    assert_eq!(generations(&fixture), [1, 2], "there is no backlog in the second one");
    assert_eq!(numbers(&everything(&queue)), (301..=402).collect::<Vec<_>>());
}

#[test]
fn a_dead_letter_outlives_the_generation_it_was_in() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue
        .append(Batch { events: vec![event(0, 900), event(1, 30_000), event(2, 20_000)], ..Batch::default() })
        .unwrap();
    seal(&queue);
    queue.append(batch(3..4)).unwrap();
    queue.settle(vec![(sequence(2), refused("no")), (sequence(3), refused("no"))]).unwrap();
    // Sealed once more while what it says about the first one is still needed.
    seal(&queue);
    queue.append(batch(4..5)).unwrap();
    queue.settle(delivered([1])).unwrap();
    queue.append(batch(5..6)).unwrap();
    assert_eq!(generations(&fixture), [2, 3]);
    let is_whole = |queue: &Queue, number: u64, bytes: usize| {
        let letter = queue.dead_letter(sequence(number)).unwrap().unwrap();
        matches!(letter.content, DeadContent::Event { event: found, .. } if found == event(number - 1, bytes))
    };
    assert!(is_whole(&queue, 2, 30_000) && is_whole(&queue, 3, 20_000));
    // And again with what was carried over.
    seal(&queue);
    assert!(is_whole(&queue, 2, 30_000) && is_whole(&queue, 3, 20_000));
    queue.close().unwrap();

    let queue = fixture.open();
    assert!(is_whole(&queue, 2, 30_000) && is_whole(&queue, 3, 20_000));
    assert_eq!(queue.retry_dead_letter(sequence(2)).unwrap(), RetryOutcome::Queued(sequence(7)));
    assert!(queue.drop_dead_letter(sequence(3)).unwrap());
    queue.settle(delivered([4, 5, 6])).unwrap();
    queue.append(Batch::default()).unwrap();
    assert_eq!(generations(&fixture), [4]);
    assert_eq!(everything(&queue)[0].event, event(1, 30_000));
    let store = queue.handle.shared.store().unwrap();
    let chunks = store.range(store::prefix_range(b'x')).unwrap();
    let owners: Vec<_> = chunks.map(|pair| store::key_sequence(&pair.unwrap().0).unwrap().get()).collect();
    assert!(!owners.is_empty() && owners.iter().all(|&owner| owner == 7), "chunks stay for nothing: {owners:?}");
}

#[test]
#[cfg(target_os = "linux")]
fn few_of_many_sealed_generations_are_open_at_once() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    in_generations(&queue, 9);
    let open = || {
        let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
        let files = descriptors.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
        let ours = files.filter(|file| file.starts_with(&fixture.config.path) && file.ends_with("db"));
        ours.collect::<std::collections::BTreeSet<_>>().len()
    };
    assert_eq!(open(), 1, "nobody has read any of the sealed ones");
    let mut most = 0;
    for first in 0..450 {
        assert_eq!(queue.page(Sequence::new(first), 1).unwrap()[0].sequence, sequence(first + 1));
        most = most.max(open());
    }
    assert_eq!(most, 3);
    queue.close().unwrap();
    let queue = fixture.open();
    assert!(open() <= 3, "opening looks for the oldest and the newest event");
    drop(queue);
}

#[test]
fn who_reads_while_generations_come_and_go_misses_nothing() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    // Every tenth stays to the end.
    let stays = |number: u64| number.is_multiple_of(10);
    let newest = Arc::new(AtomicU64::new(0));
    let ended = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = [3, 40, 1000]
        .into_iter()
        .map(|limit| {
            let (queue, newest, ended) = (queue.clone(), Arc::clone(&newest), Arc::clone(&ended));
            std::thread::spawn(move || {
                let mut rounds = 0;
                while !ended.load(Ordering::SeqCst) || rounds == 0 {
                    let there = newest.load(Ordering::SeqCst);
                    let mut found = Vec::new();
                    while let page = queue.page(found.last().copied(), limit).unwrap()
                        && !page.is_empty()
                    {
                        found.extend(page.iter().map(|envelope| envelope.sequence));
                    }
                    assert!(found.is_sorted_by(|one, other| one < other));
                    let expected = (1..=there).filter(|&number| stays(number));
                    let mut found = found.into_iter().map(Sequence::get).filter(|&number| stays(number));
                    for number in expected {
                        assert_eq!(found.next(), Some(number), "of {there}");
                    }
                    rounds += 1;
                }
                rounds
            })
        })
        .collect();
    let seed = seed();
    println!("{SEED}={seed}");
    let mut random = Random(seed);
    let (mut next, mut settled) = (0, 0);
    while next < 1500 {
        let first = next;
        next += random.below(40) + 1;
        queue.append(batch(first..next)).unwrap();
        newest.store(next, Ordering::SeqCst);
        if random.below(3) == 0 {
            let upto = settled + random.below(next - settled + 1);
            queue.settle(delivered((settled + 1..=upto).filter(|&number| !stays(number)))).unwrap();
            settled = upto;
        }
        match random.below(8) {
            0..=2 => seal(&queue),
            3 => assert!(queue.compact().unwrap()),
            _ => {}
        }
    }
    ended.store(true, Ordering::SeqCst);
    for reader in readers {
        assert!(reader.join().unwrap() > 0);
    }
}

#[test]
fn who_is_in_the_middle_sees_what_is_settled_and_keeps_the_files_that_it_reads() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    in_generations(&queue, 3);
    let store = queue.handle.shared.store().unwrap();
    let mut blocks = store.range(store::prefix_range(b'e')).unwrap();
    assert_eq!(store::key_sequence(&blocks.next().unwrap().unwrap().0), Some(sequence(1)));
    queue.settle(delivered(1..=45)).unwrap();
    let (key, value) = blocks.next().unwrap().unwrap();
    assert!(store::key_sequence(&key).unwrap().get() > 40, "that one is settled");
    assert_eq!(crate::queue::block::entries(&value).unwrap()[0].0, sequence(46));

    // Everything is copied to fresh files.
    assert!(queue.compact().unwrap());
    assert_eq!(numbers(&everything(&queue)), (46..=150).collect::<Vec<_>>());
    let old = reader::envelopes(&store, 46, 150, 1000, u64::MAX).unwrap();
    assert_eq!(numbers(&old.envelopes), (46..=150).collect::<Vec<_>>());
    drop((blocks, store));
    assert_eq!(generations(&fixture), [4]);
}

#[test]
fn where_no_fresh_generation_can_be_made_the_old_one_goes_on() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..50)).unwrap();
    let in_the_way = fixture.config.path.join("sled-2");
    std::fs::write(&in_the_way, "no folder").unwrap();
    seal(&queue);
    queue.append(batch(50..60)).unwrap();
    assert_eq!(fixture.generation().file_name().unwrap(), "sled-1");
    assert_eq!(everything(&queue).len(), 60);
    std::fs::remove_file(&in_the_way).unwrap();
    in_generations(&queue, 2);
    assert_eq!(generations(&fixture), [1, 2]);
    assert_eq!(everything(&queue).len(), 160);
}

#[test]
fn a_lost_pointer_finds_the_sealed_generations_again() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    in_generations(&queue, 3);
    queue.settle(delivered(1..=60)).unwrap();
    queue.close().unwrap();
    std::fs::write(fixture.config.path.join("CURRENT"), "format").unwrap();
    let (queue, recovery) = Queue::open(&fixture.config).unwrap();
    assert_eq!(recovery.repairs, [Repair::PointerRebuilt { generation: 3 }]);
    assert_eq!(numbers(&everything(&queue)), (61..=150).collect::<Vec<_>>());
    assert_eq!(format_of(&fixture), "format 3");
}

/// What can be read again after `damage` to a queue with the events 0 to 149 in three generations.
fn after(damage: impl FnOnce(&Path)) -> (Vec<u64>, Recovery) {
    let fixture = Fixture::new();
    let queue = fixture.open();
    in_generations(&queue, 3);
    queue.append(Batch { cursors: vec![("/t/a".into(), Some(cursor(7)))], ..Batch::default() }).unwrap();
    queue.close().unwrap();
    damage(&fixture.config.path);
    let mut opened = Queue::open(&fixture.config).unwrap();
    let mut all = Vec::new();
    loop {
        match opened.0.page(all.last().copied(), 20) {
            Ok(page) if page.is_empty() => break,
            Ok(page) => all.extend(page.iter().map(|envelope| envelope.sequence)),
            // It ends as at any damage, and the next start sees to it.
            Err(error) => {
                assert!(matches!(error, QueueError::Storage { .. }), "{error}");
                all.clear();
                drop(opened);
                opened = Queue::open(&fixture.config).unwrap();
            }
        }
    }
    assert_eq!(opened.0.cursors().unwrap(), [], "transcripts are to be read again");
    let found = everything(&opened.0);
    let mut numbers: Vec<_> = found
        .iter()
        .map(|envelope| match envelope.event.origin() {
            Origin::Transcript { offset, .. } => *offset,
            _ => panic!("not an event of this test"),
        })
        .collect();
    assert!(numbers.is_sorted(), "out of order: {numbers:?} {:?}", opened.1);
    numbers.dedup();
    (numbers, opened.1)
}

#[test]
fn damage_of_one_generation_costs_nothing_of_the_others() {
    let set_aside = |recovery: &Recovery| matches!(recovery.repairs[..], [Repair::QueueSetAside { .. }]);
    for number in 1..=3 {
        // sled does not open: the records are found in its log.
        let (found, recovery) =
            after(|path| std::fs::write(path.join(format!("sled-{number}/conf")), "segment_size: banana\n").unwrap());
        assert!(set_aside(&recovery), "{recovery:?}");
        assert_eq!(found, (0..150).collect::<Vec<_>>(), "generation {number}");
    }
    // It is not there at all.
    let (found, recovery) = after(|path| std::fs::remove_dir_all(path.join("sled-2")).unwrap());
    assert!(set_aside(&recovery), "{recovery:?}");
    assert_eq!(found, (0..50).chain(100..150).collect::<Vec<_>>());
    // sled opens and passes over what is not there.
    let (found, recovery) = after(|path| {
        let db = std::fs::OpenOptions::new().write(true).open(path.join("sled-1/db")).unwrap();
        db.set_len(db.metadata().unwrap().len() / 2).unwrap();
        for file in database::snapshots(&path.join("sled-1")).unwrap() {
            std::fs::remove_file(file).unwrap();
        }
        folder::mark_damaged(path);
    });
    assert!(recovery.repairs.iter().any(Repair::is_loss), "{recovery:?}");
    assert!(found.ends_with(&(50..150).collect::<Vec<_>>()), "{found:?}");
}

#[test]
fn lost_counters_or_a_lost_list_do_not_cost_what_is_sealed() {
    for key in [store::counters_key(), crate::queue::sealed::LIST_KEY.to_vec()] {
        let fixture = Fixture::new();
        let queue = fixture.open();
        in_generations(&queue, 3);
        queue.close().unwrap();
        let (store, _) = Store::open(&fixture.generation()).unwrap();
        let mut changes = store::Changes::default();
        changes.remove(&key);
        store.apply(changes).unwrap();
        store.carry_over().unwrap();
        drop(store);
        let (queue, recovery) = Queue::open(&fixture.config).unwrap();
        assert!(matches!(recovery.repairs[..], [Repair::QueueSetAside { salvaged: 150, .. }]), "{recovery:?}");
        assert_eq!(everything(&queue).len(), 150);
    }
}
