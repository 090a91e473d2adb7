//! What goes in comes out: order, whole batches, settling, counters, reopening.

use super::*;

#[test]
fn what_is_appended_is_read_back_in_order_and_unchanged() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let before = Timestamp::now();
    let accepted = queue.append(batch(0..5)).unwrap();
    assert_eq!(accepted.sequences, (1..=5).map(sequence).collect::<Vec<_>>());
    queue.append(batch(5..7)).unwrap();
    let window = queue.window(None, 100, u64::MAX).unwrap();
    assert_eq!(numbers(&window), [1, 2, 3, 4, 5, 6, 7]);
    for (number, envelope) in window.iter().enumerate() {
        assert_eq!(envelope.event, event(number as u64, 900));
        assert_eq!(envelope.attempts, 0);
        assert!(before <= envelope.captured_at && envelope.captured_at <= Timestamp::now());
    }
    assert_eq!(everything(&queue), window);
}

#[test]
fn window_and_page_begin_after_and_end_at_their_limits() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..10)).unwrap();
    assert_eq!(numbers(&queue.window(Some(sequence(3)), 2, u64::MAX).unwrap()), [4, 5]);
    assert_eq!(numbers(&queue.page(Some(sequence(8)), 10).unwrap()), [9, 10]);
    assert_eq!(numbers(&queue.window(None, 10, 1).unwrap()), [1], "at least one, however large it is");
    assert_eq!(queue.window(Some(sequence(10)), 10, u64::MAX).unwrap(), []);
    assert_eq!(queue.window(None, 0, u64::MAX).unwrap(), []);
    let one = queue.stats().pending_bytes / 10;
    assert_eq!(numbers(&queue.window(None, 10, one * 3).unwrap()), [1, 2, 3]);
}

#[test]
fn settled_events_are_gone_and_counted() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..10)).unwrap();
    let all = queue.stats();
    let outcomes = |range: std::ops::RangeInclusive<u64>| {
        range.map(|number| (sequence(number), Outcome::Delivered)).collect::<Vec<_>>()
    };
    queue.settle(outcomes(1..=4)).unwrap();
    assert_eq!(numbers(&everything(&queue)), [5, 6, 7, 8, 9, 10]);
    let stats = queue.stats();
    assert_eq!(stats.pending, 6);
    assert_eq!(stats.pending_bytes, all.pending_bytes / 10 * 6);
    assert_eq!(stats.oldest.unwrap().0, sequence(5));
    assert_eq!(stats.last_sequence, Some(sequence(10)));
    queue.settle(outcomes(1..=4)).unwrap();
    let twice = [outcomes(5..=6), outcomes(5..=6), outcomes(20..=30)].concat();
    queue.settle(twice).unwrap();
    assert_eq!(queue.stats().pending, 4, "what is not there is passed over");
    queue.settle(outcomes(1..=10)).unwrap();
    let stats = queue.stats();
    assert_eq!((stats.pending, stats.pending_bytes, stats.oldest), (0, 0, None));
    assert_eq!(queue.append(batch(0..1)).unwrap().sequences, [sequence(11)], "no number is used twice");
    assert_eq!(queue.stats().oldest.unwrap().0, sequence(11));
}

#[test]
fn refused_events_become_dead_letters_that_keep_everything() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..3)).unwrap();
    let captured_at = everything(&queue)[1].captured_at;
    queue.settle(vec![(sequence(1), Outcome::Delivered), (sequence(2), refused("bad text"))]).unwrap();
    assert_eq!(numbers(&everything(&queue)), [3]);
    let letters = queue.dead_letters(None, 10).unwrap();
    assert_eq!(letters.len(), 1);
    let letter = &letters[0];
    assert_eq!(letter.sequence, sequence(2));
    assert_eq!(letter.failure.message, "bad text");
    assert_eq!(letter.failure.sqlstate.as_deref(), Some("22P05"));
    assert_eq!(letter.content, DeadContent::Event { event: event(1, 900), captured_at, attempts: 3 });
    assert_eq!(queue.dead_letter(sequence(2)).unwrap().as_ref(), Some(letter));
    assert_eq!(queue.dead_letter(sequence(3)).unwrap(), None);
    assert_eq!(queue.stats().dead_letters, 1);
}

#[test]
fn rejections_are_kept_with_their_bytes_and_share_the_numbers() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let large = vec![0xff; 3 * piece::CONTENT_BYTES_MAX + 17];
    let both = Batch { rejections: vec![rejection(b"no json"), rejection(&large)], ..batch(0..2) };
    assert_eq!(queue.append(both).unwrap().sequences, [sequence(1), sequence(2)]);
    let letters = queue.dead_letters(None, 10).unwrap();
    assert_eq!(letters[0].content, DeadContent::Input(rejection(b"no json")));
    assert_eq!(letters[1].content, DeadContent::Input(rejection(&large)));
    assert_eq!(letters[1].sequence, sequence(4));
    assert_eq!(queue.append(batch(2..3)).unwrap().sequences, [sequence(5)]);
    assert_eq!(queue.stats().dead_letters, 2);
}

#[test]
fn a_retried_dead_letter_waits_at_the_tail_under_a_new_number() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let large = Batch { events: vec![event(0, 20_000)], rejections: vec![rejection(b"?")], ..Batch::default() };
    queue.append(large).unwrap();
    let captured_at = everything(&queue)[0].captured_at;
    queue.settle(vec![(sequence(1), refused("no"))]).unwrap();
    queue.append(batch(1..2)).unwrap();
    assert_eq!(queue.retry_dead_letter(sequence(1)).unwrap(), RetryOutcome::Queued(sequence(4)));
    assert_eq!(queue.retry_dead_letter(sequence(1)).unwrap(), RetryOutcome::NotFound);
    assert_eq!(queue.retry_dead_letter(sequence(2)).unwrap(), RetryOutcome::NotAnEvent);
    let all = everything(&queue);
    assert_eq!(numbers(&all), [3, 4]);
    assert_eq!(all[1].event, event(0, 20_000));
    assert_eq!((all[1].captured_at, all[1].attempts), (captured_at, 3));
    let stats = queue.stats();
    assert_eq!((stats.pending, stats.dead_letters), (2, 1));
    queue.settle(vec![(sequence(3), Outcome::Delivered), (sequence(4), Outcome::Delivered)]).unwrap();
    assert!(queue.drop_dead_letter(sequence(2)).unwrap());
    assert!(!queue.drop_dead_letter(sequence(2)).unwrap());
    assert_eq!(queue.stats().dead_letters, 0);
    queue.close().unwrap();
    // Nothing of the letters goes into the next segment.
    let queue = fixture.open();
    queue.roll().unwrap();
    queue.close().unwrap();
    let mut kinds = Vec::new();
    for kind in [piece::LETTER, piece::MARK] {
        kinds.extend(fixture.raw(3).pieces(kind, 0..=u64::MAX).map(|piece| piece.unwrap().kind));
    }
    assert_eq!(kinds, b"m", "nothing of the letters is left behind");
}

#[test]
fn cursors_are_stored_replaced_and_removed_with_their_batch() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let (a, b) = (PathBuf::from("/t/a.jsonl"), PathBuf::from("/t/b.jsonl"));
    let long = Cursor { project_path: Some("p".repeat(6000).into()), ..cursor(3) };
    let cursors = vec![(a.clone(), Some(cursor(1))), (b.clone(), Some(long.clone()))];
    queue.append(Batch { cursors, ..batch(0..1) }).unwrap();
    let mut found = queue.cursors().unwrap();
    found.sort_by(|one, other| one.0.cmp(&other.0));
    assert_eq!(found, [(a.clone(), cursor(1)), (b.clone(), long)]);
    let cursors = vec![(a.clone(), None), (b.clone(), Some(cursor(9)))];
    queue.append(Batch { cursors, ..Batch::default() }).unwrap();
    assert_eq!(queue.cursors().unwrap(), [(b.clone(), cursor(9))]);
    let endless = Cursor { project_path: Some("p".repeat(60_000).into()), ..cursor(10) };
    queue.append(Batch { cursors: vec![(b.clone(), Some(endless))], ..Batch::default() }).unwrap();
    assert_eq!(queue.cursors().unwrap(), [(b.clone(), Cursor { project_path: None, ..cursor(10) })]);
    queue.close().unwrap();
    assert_eq!(fixture.open().cursors().unwrap().len(), 1);
}

#[test]
fn notes_of_sessions_ends_are_stored_replaced_and_removed_with_their_batch() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let [a, b] = [1, 2].map(Uuid::from_u128);
    let at = |second| Some(Timestamp::from_second(second).unwrap());
    let note = |session_ends| Batch { session_ends, ..Batch::default() };
    queue.append(note(vec![(a, at(1)), (b, at(2))])).unwrap();
    queue.append(note(vec![(a, at(3))])).unwrap();
    assert_eq!(queue.cursors().unwrap(), [], "they are no cursors");
    queue.roll().unwrap();
    queue.close().unwrap();
    let queue = fixture.open();
    let mut found = queue.session_ends().unwrap();
    found.sort();
    assert_eq!(found, [(a, at(3).unwrap()), (b, at(2).unwrap())], "carried over to the next segment");
    queue.append(note(vec![(a, None)])).unwrap();
    queue.close().unwrap();
    assert_eq!(fixture.open().session_ends().unwrap(), [(b, at(2).unwrap())]);
}

#[test]
fn reopening_finds_everything_again() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(77)))];
    queue.append(Batch { rejections: vec![rejection(b"{")], cursors, ..batch(0..20) }).unwrap();
    queue.settle((1..=5).map(|number| (sequence(number), Outcome::Delivered)).collect()).unwrap();
    queue.settle(vec![(sequence(6), refused("no"))]).unwrap();
    let before = (everything(&queue), queue.dead_letters(None, 10).unwrap(), queue.cursors().unwrap());
    let stats = queue.stats();
    queue.close().unwrap();
    assert!(matches!(queue.append(batch(0..1)), Err(QueueError::Closed)));
    assert!(matches!(queue.window(None, 1, 1), Err(QueueError::Closed)));

    let (queue, repairs) = Queue::open(&fixture.config).unwrap();
    assert_eq!(repairs, []);
    assert_eq!((queue.stats().pending, queue.stats().dead_letters), (14, 2));
    assert_eq!((everything(&queue), queue.dead_letters(None, 10).unwrap(), queue.cursors().unwrap()), before);
    let reopened = queue.stats();
    assert_eq!(QueueStats { disk_bytes: 0, ..reopened }, QueueStats { disk_bytes: 0, ..stats });
    assert_eq!(*queue.subscribe().borrow(), Some(sequence(21)));
    assert_eq!(queue.append(batch(20..21)).unwrap().sequences, [sequence(22)]);
}

#[test]
fn a_second_opening_names_the_holder() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let Err(QueueError::InUse { pid, .. }) = Queue::open(&fixture.config) else { panic!("opened twice") };
    assert_eq!(pid, Some(std::process::id()));
    drop(queue);
    fixture.open();
}

#[test]
fn a_ticket_can_be_awaited_and_the_watch_tells_of_what_is_durable() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let mut newest = queue.subscribe();
    assert_eq!(*newest.borrow_and_update(), None);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let accepted = runtime.block_on(async {
        let accepted = queue.submit(batch(0..2)).await;
        newest.changed().await.unwrap();
        accepted
    });
    assert_eq!(accepted.unwrap().sequences.len(), 2);
    assert_eq!(*newest.borrow(), Some(sequence(2)));
}

#[test]
fn a_full_queue_takes_cursors_and_settlements_but_no_events() {
    let one = {
        let fixture = Fixture::new();
        let queue = fixture.open();
        queue.append(batch(0..1)).unwrap();
        queue.stats().pending_bytes
    };
    let fixture = Fixture::with_room(one * 3);
    let queue = fixture.open();
    queue.append(batch(0..5)).unwrap();
    assert!(queue.stats().full, "an empty queue takes any batch");
    let error = queue.append(batch(5..6)).unwrap_err();
    assert!(matches!(error, QueueError::Full { pending_bytes, max } if pending_bytes == one * 5 && max == one * 3));
    assert!(queue.stats().full);
    assert!(!queue.wait_for_room(Instant::now() + Duration::from_millis(20)));
    let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(1)))];
    queue.append(Batch { cursors, ..Batch::default() }).unwrap();
    let waiting = {
        let queue = queue.clone();
        std::thread::spawn(move || queue.wait_for_room(Instant::now() + Duration::from_secs(20)))
    };
    queue.settle((1..=3).map(|number| (sequence(number), Outcome::Delivered)).collect()).unwrap();
    assert!(waiting.join().unwrap());
    assert_eq!(queue.append(batch(5..6)).unwrap().sequences, [sequence(6)], "a refused batch uses no number");
}

#[test]
fn large_events_survive_in_chunks_and_nothing_reaches_blobs() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let sizes = [16 << 20, 4096, 4095, 8192, 0, 100_000, 131_052, 1 << 20];
    let events: Vec<_> = sizes.iter().zip(0..).map(|(&size, number)| event(number, size)).collect();
    queue.append(Batch { events: events.clone(), ..Batch::default() }).unwrap();
    for _ in 0..3 {
        queue.append(batch(100..400)).unwrap();
    }
    let read: Vec<_> = everything(&queue).into_iter().map(|envelope| envelope.event).take(sizes.len()).collect();
    assert!(read == events);
    queue.settle(vec![(sequence(1), refused("large"))]).unwrap();
    queue.close().unwrap();
    let queue = fixture.open();
    let letter = queue.dead_letter(sequence(1)).unwrap().unwrap();
    assert!(matches!(letter.content, DeadContent::Event { event, .. } if event == events[0]));
    queue.settle((2..=1000).map(|number| (sequence(number), Outcome::Delivered)).collect()).unwrap();
    assert_eq!(queue.stats().pending, 0);
    assert!(queue.drop_dead_letter(sequence(1)).unwrap());
    queue.close().unwrap();
    assert_eq!(std::fs::read_dir(fixture.newest().join("blobs")).unwrap().count(), 0);
}

#[test]
fn handles_can_be_shared_between_threads() {
    fn is_shareable<T: Send + Sync + Clone>() {}
    is_shareable::<Queue>();
    let fixture = Fixture::new();
    let queue = Arc::new(fixture.open());
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let queue = Arc::clone(&queue);
            scope.spawn(move || {
                for number in 0..10 {
                    queue.append(batch(thread * 100 + number..thread * 100 + number + 1)).unwrap();
                }
            });
        }
    });
    assert_eq!(numbers(&everything(&queue)), (1..=40).collect::<Vec<_>>());
}

#[test]
fn inspecting_creates_nothing_and_changes_nothing() {
    let fixture = Fixture::new();
    let inspected = Queue::inspect(&fixture.config);
    assert!(matches!(inspected, Err(QueueError::NotFound { .. })));
    assert!(!fixture.config.path.exists());
    let queue = fixture.open();
    let cursors = vec![(PathBuf::from("/a"), Some(cursor(5)))];
    queue.append(Batch { cursors, rejections: vec![rejection(b"?")], ..batch(0..3) }).unwrap();
    queue.roll().unwrap();
    queue.append(batch(3..5)).unwrap();
    queue.settle(delivered(1..=1)).unwrap();
    assert!(matches!(Queue::inspect(&fixture.config), Err(QueueError::InUse { pid: Some(_), .. })));
    let expected = (everything(&queue), queue.dead_letters(None, 9).unwrap(), queue.cursors().unwrap());
    let stats = queue.stats();
    drop(queue);
    let files = || {
        let files = walkdir::WalkDir::new(&fixture.config.path).sort_by_file_name().into_iter().map(Result::unwrap);
        let files = files.filter(|entry| entry.file_type().is_file());
        files.map(|file| (file.path().to_owned(), std::fs::read(file.path()).unwrap())).collect::<Vec<_>>()
    };
    let before = files();
    let inspector = Queue::inspect(&fixture.config).unwrap();
    let listed = inspector.page(None, 100).unwrap();
    assert_eq!((listed, inspector.dead_letters(None, 9).unwrap(), inspector.cursors().unwrap()), expected);
    let found = inspector.stats();
    assert_eq!((found.pending, found.pending_bytes, found.oldest), (stats.pending, stats.pending_bytes, stats.oldest));
    drop(inspector);
    assert_eq!(files(), before);
    let inspector = Queue::inspect(&fixture.config).unwrap();
    // A watcher may start meanwhile.
    drop(fixture.open());
    assert_eq!(inspector.page(None, 100).unwrap(), expected.0);
    drop(inspector);
    // The older segment is not copied; nothing is put right in it either.
    std::fs::write(fixture.segment(1).join("db"), [0; 5000]).unwrap();
    let before = files();
    let inspected = Queue::inspect(&fixture.config);
    assert!(
        matches!(&inspected, Err(QueueError::Damaged { path, .. }) if *path == fixture.config.path),
        "{inspected:?}"
    );
    assert_eq!(files(), before);
}

#[test]
fn what_is_looked_at_stays_though_a_watcher_delivers_it_meanwhile() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(Batch { rejections: vec![rejection(b"?")], ..batch(0..300) }).unwrap();
    let expected = (everything(&queue), queue.dead_letters(None, 9).unwrap());
    queue.close().unwrap();
    let inspector = Queue::inspect(&fixture.config).unwrap();
    let queue = fixture.open();
    queue.settle(delivered(1..=300)).unwrap();
    eventually("its segment is gone", || fixture.segments() == [2]);
    assert_eq!((everything(&inspector), inspector.dead_letters(None, 9).unwrap()), expected);
}
