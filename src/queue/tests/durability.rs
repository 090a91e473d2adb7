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
fn settlements_do_not_wait_for_a_sync() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..10)).unwrap();
    let (begins, permit) = gated(&queue);
    queue.settle(delivered(1..=5)).unwrap();
    assert_eq!(queue.stats().pending, 5);
    // That of a moment later.
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
#[ignore = "needs HEADSPACE_SMALL_FOLDER, a file system of some 24 MB"]
fn a_full_disk_ends_the_queue_and_loses_nothing() {
    let parent = std::env::var_os("HEADSPACE_SMALL_FOLDER").unwrap();
    let folder = TempDir::new_in(&parent).unwrap();
    let config = QueueConfig { path: folder.path().join("queue"), max_pending_bytes: u64::MAX };
    let ballast = folder.path().join("ballast");
    std::fs::write(&ballast, vec![1; 4 << 20]).unwrap();
    let mut acknowledged = 0;
    for round in 0..3 {
        let (queue, repairs) = Queue::open(&config).unwrap();
        assert!(!repairs.iter().any(Repair::is_loss), "{:?}", repairs);
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

/// A queue whose segments are full with a hundred kilobytes.
const SMALL: u64 = 100 << 10;

#[test]
fn segments_in_which_all_is_settled_go_as_a_whole() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(5)))];
    let large = vec![b'?'; 10_000];
    queue.append(Batch { cursors: cursors.clone(), rejections: vec![rejection(&large)], ..batch(0..2) }).unwrap();
    queue.settle(vec![(sequence(1), refused("no")), (sequence(2), Outcome::Delivered)]).unwrap();
    let letters = queue.dead_letters(None, 10).unwrap();
    for segment in 1..=4 {
        queue.append(batch(0..100)).unwrap();
        queue.append(Batch { events: vec![event(7, 3 << 20)], ..Batch::default() }).unwrap();
        queue.roll().unwrap();
        assert_eq!(fixture.segments(), (1..=segment + 1).collect::<Vec<_>>());
    }
    let bytes = queue.stats().disk_bytes;
    assert_eq!(queue.stats().pending, 404);
    // Numbers 4 to 104 are in the first, and so on.
    for (through, segments) in [(103, vec![1, 2, 3, 4, 5]), (104, vec![2, 3, 4, 5]), (306, vec![4, 5])] {
        let first = queue.stats().oldest.unwrap().0.get();
        queue.settle(delivered(first..=through)).unwrap();
        eventually("what is settled is gone", || fixture.segments() == segments);
    }
    queue.settle(delivered(307..=407)).unwrap();
    eventually("all is gone", || fixture.segments() == [5]);
    assert!(queue.stats().disk_bytes < bytes / 4);
    for _ in 0..2 {
        assert_eq!(queue.dead_letters(None, 10).unwrap(), letters);
        assert_eq!(queue.cursors().unwrap(), [("/t/a".into(), cursor(5))]);
        queue.roll().unwrap();
    }
    queue.close().unwrap();
    let queue = fixture.open();
    assert_eq!(queue.dead_letters(None, 10).unwrap(), letters);
    assert_eq!(queue.append(batch(0..1)).unwrap().sequences, [sequence(408)]);
}

#[test]
fn a_large_segment_gets_no_more_events_and_an_empty_queue_gives_its_disk_back() {
    // The size is asked of the environment, so it takes a process of its own.
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "queue::tests::durability::rolling", "--ignored", "--nocapture", "--test-threads=1"])
        .env("HEADSPACE_SEGMENT_BYTES", SMALL.to_string())
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout).into_owned() + &String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success() && output.contains("1 passed"), "{output}");
}

#[test]
#[ignore = "the child of the test above"]
fn rolling() {
    if std::env::var_os("HEADSPACE_SEGMENT_BYTES").is_none() {
        return;
    }
    let fixture = Fixture::new();
    let queue = fixture.open();
    let mut next = 1;
    while fixture.segments().len() < 4 {
        queue.append(batch(next..next + 20)).unwrap();
        next += 20;
        // Events come all the time, one is always pending, and what is old goes.
        queue.settle(delivered(next.saturating_sub(40).max(1)..next - 1)).unwrap();
        assert!(next < 100_000);
        if next > 1000 {
            break;
        }
    }
    assert!(*fixture.segments().last().unwrap() > 2, "{:?}", fixture.segments());
    queue.settle(delivered(1..next)).unwrap();
    eventually("one small segment", || fixture.segments().len() == 1);
    assert_eq!(queue.stats().pending, 0);
    assert_eq!(queue.append(batch(0..1)).unwrap().sequences, [sequence(next)]);
    assert_eq!(numbers(&everything(&queue)), [next]);
}

#[test]
fn what_changes_while_the_next_segment_is_made_is_in_it() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    // Several slices.
    let many = (0..3000).map(|number| (PathBuf::from(format!("/t/{number}")), Some(cursor(number))));
    queue
        .append(Batch { cursors: many.collect(), rejections: vec![rejection(&[b'x'; 60_000]); 20], ..batch(0..10) })
        .unwrap();
    let rolling = {
        let queue = queue.clone();
        std::thread::spawn(move || queue.roll().unwrap())
    };
    for number in 0..50 {
        let cursors = vec![(PathBuf::from(format!("/t/{number}")), Some(cursor(100_000 + number)))];
        queue.append(Batch { cursors, ..batch(number..number + 1) }).unwrap();
        if number < 10 {
            assert!(queue.drop_dead_letter(sequence(11 + number)).unwrap());
        }
    }
    rolling.join().unwrap();
    queue.roll().unwrap();
    assert_eq!(queue.stats().dead_letters, 10);
    queue.close().unwrap();
    let queue = fixture.open();
    let cursors = queue.cursors().unwrap();
    assert_eq!(cursors.len(), 3000);
    assert_eq!(cursors.iter().filter(|(_, cursor)| cursor.offset >= 100_000).count(), 50);
    assert_eq!(queue.dead_letters(None, 100).unwrap().len(), 10);
    assert_eq!(everything(&queue).len(), 60);
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
            let oldest = queue.stats().oldest.unwrap().0.get();
            queue.settle(delivered(oldest..=first - EVENTS / 3)).unwrap();
            // What is settled is written by itself a little later.
            std::thread::sleep(Duration::from_millis(60));
        }
        queue.append(batch(first..first + EVENTS)).unwrap();
        let segment = newest(&queue);
        assert_eq!(segment.guarded(|db| db.flush()).unwrap(), 0, "round {round}: it was synced");
        everything(&queue);
        assert_eq!(segment.guarded(|db| db.flush()).unwrap(), 0, "round {round}");
    }
}

#[test]
fn appends_are_answered_while_much_is_carried_over_to_the_next_segment() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let letters = 2_000;
    for part in 0..4 {
        let rejections =
            (0..letters / 4).map(|number| rejection(format!("{part} {number} {}", "x".repeat(4_000)).as_bytes()));
        queue.append(Batch { rejections: rejections.collect(), ..Batch::default() }).unwrap();
    }
    let before = queue.dead_letters(None, usize::MAX).unwrap();
    let more = |number: u64| Batch {
        cursors: vec![(PathBuf::from("/moves"), Some(cursor(number)))],
        ..batch(number..number + 1)
    };
    let large = |number: u64| Batch { events: vec![event(number, 1 << 20)], ..Batch::default() };
    let mut number = 0;
    while !fixture.config.path.join("segment-2").exists() {
        queue.append(large(number)).unwrap();
        number += 1;
    }
    // Meanwhile: what was carried over goes, what was not yet does, and what is new comes.
    let (first, last) = (before.first().unwrap().sequence, before.last().unwrap().sequence);
    let mut answered = 0;
    while !fixture.config.path.join("segment-2/FIRST").exists() {
        queue.append(more(number)).unwrap();
        number += 1;
        answered += 1;
        if answered == 8 {
            assert!(queue.drop_dead_letter(first).unwrap() && queue.drop_dead_letter(last).unwrap());
            queue.append(Batch { rejections: vec![rejection(b"new")], ..Batch::default() }).unwrap();
        }
    }
    assert!(answered > 10, "{answered} were answered while some 8 MB were carried over");
    let after = queue.dead_letters(None, usize::MAX).unwrap();
    let cursors = queue.cursors().unwrap();
    let pending = queue.stats().pending;
    let expected: Vec<_> = before.iter().filter(|letter| ![first, last].contains(&letter.sequence)).collect();
    assert!(after.iter().zip(&expected).all(|(after, before)| after == *before));
    assert_eq!((after.len(), pending), (expected.len() + 1, number));
    queue.close().unwrap();
    let queue = fixture.open();
    assert_eq!(queue.dead_letters(None, usize::MAX).unwrap(), after);
    assert_eq!(queue.cursors().unwrap(), cursors);
    assert_eq!((queue.stats().pending, queue.stats().dead_letters), (number, after.len() as u64));
}
