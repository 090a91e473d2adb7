//! What is synced when, who waits for it, and what happens when it fails.

use std::io;
use std::sync::mpsc;

use super::*;

/// A sync that waits for a permit each time; the other end says that one has begun.
fn gated(queue: &Queue) -> (mpsc::Receiver<()>, mpsc::Sender<()>) {
    let (begun, begins) = mpsc::channel();
    let (permit, permits) = mpsc::channel();
    let permits = Mutex::new(permits);
    Fixture::on_sync(queue, move || {
        let _ = begun.send(());
        // With the sender gone every sync passes.
        let _ = permits.lock().unwrap().recv();
        Ok(())
    });
    (begins, permit)
}

#[test]
fn window_never_returns_what_has_not_been_synced() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..1)).unwrap();
    let newest = queue.subscribe();
    let (begins, permit) = gated(&queue);
    let ticket = queue.submit(batch(1..3));
    begins.recv().unwrap();
    assert_eq!(numbers(&queue.window(None, 10, u64::MAX).unwrap()), [1]);
    assert_eq!(numbers(&queue.page(None, 10).unwrap()), [1]);
    assert_eq!(*newest.borrow(), Some(sequence(1)));
    permit.send(()).unwrap();
    assert_eq!(ticket.wait().unwrap().sequences.len(), 2);
    assert_eq!(numbers(&queue.window(None, 10, u64::MAX).unwrap()), [1, 2, 3]);
    assert_eq!(*newest.borrow(), Some(sequence(3)));
}

#[test]
fn an_append_is_acknowledged_only_after_its_sync() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let (begins, permit) = gated(&queue);
    let mut ticket = queue.submit(batch(0..1));
    begins.recv().unwrap();
    let waker = std::task::Waker::noop();
    let poll = std::pin::Pin::new(&mut ticket).poll(&mut std::task::Context::from_waker(waker));
    assert!(poll.is_pending());
    permit.send(()).unwrap();
    ticket.wait().unwrap();
}

#[test]
fn settlements_and_cursors_do_not_wait_for_a_sync_of_their_own() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..10)).unwrap();
    let (begins, permit) = gated(&queue);
    queue.settle(delivered(1..=5)).unwrap();
    assert_eq!(queue.stats().pending, 5);
    begins.recv().unwrap();
    permit.send(()).unwrap();
    let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(1)))];
    queue.append(Batch { cursors, ..Batch::default() }).unwrap();
    begins.recv().unwrap();
    drop(permit);
}

#[test]
fn what_is_left_unsynced_is_synced_when_idle() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..10)).unwrap();
    let syncs = Fixture::on_sync(&queue, || Ok(()));
    queue.settle(delivered(1..=5)).unwrap();
    eventually("a sync", || syncs.load(Ordering::SeqCst) == 1);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(syncs.load(Ordering::SeqCst), 1, "an idle queue leaves the disk alone");
}

#[test]
fn never_more_than_one_batch_of_sleds_is_unsynced() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    // Each event has a block of its own, and too many for the journal.
    queue.append(Batch { events: (0..40).map(|number| event(number, 3000)).collect(), ..Batch::default() }).unwrap();
    let syncs = Fixture::on_sync(&queue, || Ok(()));
    for number in 1..=40 {
        queue.settle(delivered([number])).unwrap();
        assert!(syncs.load(Ordering::SeqCst) >= number - 1);
    }
}

#[test]
#[ignore = "needs HEADSPACE_SMALL_FOLDER, a file system of some 24 MB"]
fn a_full_disk_ends_the_queue_and_loses_nothing() {
    let parent = std::env::var_os("HEADSPACE_SMALL_FOLDER").unwrap();
    let folder = TempDir::new_in(&parent).unwrap();
    let config = QueueConfig { path: folder.path().join("queue"), max_pending_bytes: u64::MAX };
    let ballast = folder.path().join("ballast");
    std::fs::write(&ballast, vec![1; 4 << 20]).unwrap();
    let mut acknowledged = 0;
    for round in 0..3 {
        let (queue, recovery) = Queue::open(&config).unwrap();
        assert!(!recovery.repairs.iter().any(Repair::is_loss), "{:?}", recovery.repairs);
        assert!(queue.stats().pending >= acknowledged);
        assert_eq!(everything(&queue).len() as u64, queue.stats().pending);
        let error = loop {
            match queue.append(batch(0..50)) {
                Ok(_) => acknowledged += 50,
                Err(error) => break error,
            }
        };
        println!("round {round}: {acknowledged} acknowledged, then: {error}");
        assert!(matches!(error, QueueError::Storage { .. }), "{error}");
        assert!(queue.failed().borrow().is_some());
        drop(queue);
        match round {
            0 => std::fs::remove_file(&ballast).unwrap(),
            _ => {
                // Without room nothing goes on, but nothing is lost either.
                let Ok((queue, _)) = Queue::open(&config) else { return };
                assert!(queue.stats().pending >= acknowledged);
                return;
            }
        }
    }
}

#[test]
fn appends_that_come_at_once_share_their_syncs() {
    const THREADS: u64 = 8;
    const APPENDS: u64 = 25;
    let fixture = Fixture::new();
    let queue = fixture.open();
    let syncs = Fixture::on_sync(&queue, || {
        std::thread::sleep(Duration::from_millis(2));
        Ok(())
    });
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let queue = queue.clone();
            scope.spawn(move || {
                for number in 0..APPENDS {
                    queue.append(batch(thread * 1000 + number..thread * 1000 + number + 1)).unwrap();
                }
            });
        }
    });
    assert_eq!(queue.stats().pending, THREADS * APPENDS);
    let syncs = syncs.load(Ordering::SeqCst);
    assert!(syncs <= THREADS * APPENDS / 3, "{syncs} syncs for {} appends", THREADS * APPENDS);
}

#[test]
fn a_lone_append_costs_one_sync() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let syncs = Fixture::on_sync(&queue, || Ok(()));
    for number in 0..10 {
        let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(number)))];
        queue.append(Batch { cursors, ..batch(number..number + 1) }).unwrap();
    }
    assert_eq!(syncs.load(Ordering::SeqCst), 10);
}

#[test]
fn a_failed_sync_ends_the_queue_and_acknowledges_nothing() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..1)).unwrap();
    let failed = queue.failed();
    assert!(failed.borrow().is_none());
    Fixture::on_sync(&queue, || Err(io::Error::other("no space left on device")));
    let tickets = [queue.submit(batch(1..2)), queue.submit(batch(2..3))];
    for ticket in tickets {
        let error = ticket.wait().unwrap_err();
        assert!(matches!(&error, QueueError::Storage { cause, .. } if cause.contains("no space")), "{error}");
    }
    assert!(failed.borrow().as_ref().unwrap().to_string().contains("no space"));
    assert!(matches!(queue.append(batch(3..4)), Err(QueueError::Storage { .. })));
    assert!(matches!(queue.settle(delivered([1])), Err(QueueError::Storage { .. })));
    assert!(matches!(queue.window(None, 10, 10), Err(QueueError::Storage { .. })));
    assert!(queue.wait_for_room(Instant::now() + Duration::from_secs(20)));
    assert!(matches!(queue.close(), Err(QueueError::Storage { .. })));

    let queue = fixture.open();
    assert_eq!(numbers(&everything(&queue)).first(), Some(&1), "what was acknowledged is there");
}

#[test]
fn closing_takes_in_what_was_submitted_before() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let tickets: Vec<_> = (0..20).map(|number| queue.submit(batch(number..number + 1))).collect();
    queue.close().unwrap();
    for ticket in tickets {
        ticket.wait().unwrap();
    }
    queue.close().unwrap();
    assert_eq!(fixture.open().stats().pending, 20);
}

#[test]
fn submitters_are_held_back_while_too_much_waits() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let (begins, permit) = gated(&queue);
    let first = queue.submit(batch(0..1));
    begins.recv().unwrap();
    let submitted = Arc::new(AtomicU64::new(0));
    let flood = {
        let (queue, submitted) = (queue.clone(), Arc::clone(&submitted));
        std::thread::spawn(move || {
            for number in 0..12 {
                drop(queue.submit(Batch { events: vec![event(number, 4 << 20)], ..Batch::default() }));
                submitted.fetch_add(1, Ordering::SeqCst);
            }
        })
    };
    eventually("the first submissions", || submitted.load(Ordering::SeqCst) >= 3);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(submitted.load(Ordering::SeqCst), 3, "12 MiB wait, 4 more would be too much");
    drop(permit);
    flood.join().unwrap();
    first.wait().unwrap();
}

#[test]
fn an_empty_queue_with_large_files_moves_on_to_small_ones() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(5)))];
    let large = vec![b'?'; 10_000];
    queue.append(Batch { cursors: cursors.clone(), rejections: vec![rejection(&large)], ..batch(0..2) }).unwrap();
    queue.settle(vec![(sequence(1), refused("no")), (sequence(2), Outcome::Delivered)]).unwrap();
    let mut next = 4;
    while queue.stats().disk_bytes <= 49 << 20 {
        queue.append(Batch { events: vec![event(0, 3 << 20)], ..Batch::default() }).unwrap();
        queue.append(batch(0..200)).unwrap();
        queue.settle(delivered(next..next + 150)).unwrap();
        next += 201;
    }
    assert_eq!(fixture.generation().file_name().unwrap(), "sled-1");
    let letters = queue.dead_letters(None, 10).unwrap();
    let before = queue.stats();
    queue.settle(delivered(1..next)).unwrap();
    eventually("small files", || queue.stats().disk_bytes <= 48 << 20);
    if queue.stats().disk_bytes > 4 << 20 {
        // Now and then sled cuts off free segments at the end of its file, and it is small enough as it is.
        assert!(queue.compact().unwrap());
    }
    assert!(queue.stats().disk_bytes < 4 << 20);
    assert_eq!(fixture.generation().file_name().unwrap(), "sled-2");
    eventually("the removal of the old one", || !fixture.config.path.join("sled-1").exists());
    let moved = |queue: &Queue| {
        assert_eq!(queue.dead_letters(None, 10).unwrap(), letters);
        assert_eq!(queue.cursors().unwrap(), [("/t/a".into(), cursor(5))]);
        let stats = queue.stats();
        assert_eq!((stats.pending, stats.pending_bytes, stats.dead_letters), (0, 0, 2));
        assert_eq!(stats.last_sequence, before.last_sequence);
    };
    moved(&queue);
    queue.close().unwrap();
    let queue = fixture.open();
    moved(&queue);
    assert_eq!(queue.append(batch(0..1)).unwrap().sequences, [sequence(next)]);
    queue.settle(delivered([next])).unwrap();
    assert!(queue.compact().unwrap());
    assert_eq!(queue.append(batch(0..1)).unwrap().sequences, [sequence(next + 1)]);
    assert_eq!(everything(&queue).len(), 1);
}

#[test]
fn little_that_is_pending_is_carried_over_to_fresh_files_and_much_is_not() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(Batch { events: vec![event(0, 20_000), event(1, 900)], ..Batch::default() }).unwrap();
    queue.settle(vec![(sequence(1), refused("no"))]).unwrap();
    queue.append(Batch { events: vec![event(2, 100_000), event(3, 5000)], ..Batch::default() }).unwrap();
    queue.append(batch(4..50)).unwrap();
    queue.settle(delivered(10..20)).unwrap();
    let (pending, letters, stats) = (everything(&queue), queue.dead_letters(None, 10).unwrap(), queue.stats());
    assert!(queue.compact().unwrap());
    assert_eq!(fixture.generation().file_name().unwrap(), "sled-2");
    assert!(everything(&queue) == pending && queue.dead_letters(None, 10).unwrap() == letters);
    assert!(queue.window(None, 1000, u64::MAX).unwrap() == pending);
    assert_eq!(QueueStats { disk_bytes: 0, ..queue.stats() }, QueueStats { disk_bytes: 0, ..stats });
    queue.close().unwrap();
    let queue = fixture.open();
    assert!(everything(&queue) == pending);
    queue.append(Batch { events: vec![event(50, 4 << 20)], ..Batch::default() }).unwrap();
    assert!(!queue.compact().unwrap(), "that is too much to copy");
    assert_eq!(fixture.generation().file_name().unwrap(), "sled-2");
}

#[test]
fn files_shrink_also_while_events_never_cease_to_come() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let mut next = 1;
    while queue.stats().disk_bytes <= 49 << 20 {
        queue.append(Batch { events: vec![event(0, 3 << 20)], ..Batch::default() }).unwrap();
        next += 1;
    }
    queue.append(batch(0..1)).unwrap();
    queue.settle(delivered(1..next)).unwrap();
    eventually("small files", || {
        queue.append(batch(1..2)).unwrap();
        queue.settle(delivered([next])).unwrap();
        next += 1;
        assert!(queue.stats().pending > 0, "one event is always pending");
        queue.stats().disk_bytes < 16 << 20
    });
    assert_eq!(numbers(&everything(&queue)), [next]);
}

#[test]
fn many_cursors_do_not_make_fresh_files_again_and_again() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    // So large that fresh files, too, are above the size at which an empty queue moves on.
    let long = "p".repeat(11_000);
    for first in (0..5_000).step_by(250) {
        let cursor = |offset| Cursor { project_path: Some(format!("{offset}{long}")), ..cursor(offset) };
        let cursors = (first..first + 250).map(|number| (format!("/t/{number}").into(), Some(cursor(number))));
        queue.append(Batch { cursors: cursors.collect(), ..Batch::default() }).unwrap();
    }
    eventually("fresh files", || fixture.generation().file_name().unwrap() != "sled-1");
    queue.compact().unwrap();
    let generation = fixture.generation();
    assert!(queue.stats().disk_bytes > 48 << 20, "{:?}", queue.stats());
    for number in 1..=5 {
        queue.append(batch(number..number + 1)).unwrap();
        queue.settle(delivered([number])).unwrap();
        // An idle moment, with its sync.
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(fixture.generation(), generation);
    assert_eq!(queue.cursors().unwrap().len(), 5_000);
}

/// sled splits and merges pages when they are asked for. Done by a reader, that would be in its log after the sync, and not
/// on the platter before the next batch.
#[test]
fn reading_writes_nothing() {
    const EVENTS: u64 = 90;
    let fixture = Fixture::new();
    let queue = fixture.open();
    for round in 0..40 {
        let first = round * EVENTS;
        if round > 0 {
            queue.settle(delivered(first - EVENTS + 1..=first - EVENTS / 3)).unwrap();
        }
        queue.append(batch(first..first + EVENTS)).unwrap();
        let store = queue.handle.shared.store().unwrap();
        assert_eq!(store.write_out().unwrap(), 0, "round {round}: it was synced");
        everything(&queue);
        assert_eq!(store.write_out().unwrap(), 0, "round {round}");
    }
}
