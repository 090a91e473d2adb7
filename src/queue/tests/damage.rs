//! Opening what a crash, a bad disk or a newer program has left.

use std::fs;

use super::*;
use crate::queue::codec::Counters;
use crate::queue::store::Changes;

/// Changes the store of a closed queue behind its back.
fn tamper(fixture: &Fixture, change: impl FnOnce(&Store, &mut Changes)) {
    let (store, _) = Store::open(&fixture.generation()).unwrap();
    let mut changes = Changes::default();
    change(&store, &mut changes);
    store.apply(changes).unwrap();
    store.sync().unwrap();
}

/// Changes what stands in its block of one event.
fn tamper_part(store: &Store, changes: &mut Changes, number: u64, change: impl Fn(&mut Vec<u8>)) {
    let (key, value) = reader::block(store, sequence(number)).unwrap().unwrap();
    let mut tampered = block::Block::default();
    for (here, part) in block::entries(&value).unwrap() {
        let mut part = part.to_vec();
        if here == sequence(number) {
            change(&mut part);
        }
        tampered.add(here, part);
    }
    changes.insert(&store::block_key(key), &tampered.encode());
}

fn filled(fixture: &Fixture) {
    let queue = fixture.open();
    let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(5)))];
    queue.append(Batch { cursors, rejections: vec![rejection(b"?")], ..batch(0..10) }).unwrap();
    queue.close().unwrap();
}

#[test]
fn an_unreadable_record_becomes_a_dead_letter_and_stops_nothing() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(Batch { events: vec![event(10, 20_000)], ..batch(0..4) }).unwrap();
    queue.append(Batch { events: vec![event(10, 20_000)], ..Batch::default() }).unwrap();
    queue.append(batch(5..7)).unwrap();
    queue.close().unwrap();
    let broken = codec::encode_event(&event(10, 20_000), Timestamp::now(), 0).unwrap();
    tamper(&fixture, |store, changes| {
        tamper_part(store, changes, 1, |part| *part.last_mut().unwrap() ^= 1);
        changes.remove(&store::chunk_key(2, 3));
        tamper_part(store, changes, 3, |part| part[0] = codec::Kind::Event.version() + 1);
    });
    let queue = fixture.open();
    let bytes = queue.stats().pending_bytes;
    assert_eq!(numbers(&queue.window(None, 2, u64::MAX).unwrap()), [4], "goes on at once");
    let letters = queue.dead_letters(None, 10).unwrap();
    let shown: Vec<_> = letters.iter().map(|letter| (letter.sequence.get(), letter.failure.kind)).collect();
    assert_eq!(shown, [(1, FailureKind::Damaged), (2, FailureKind::Damaged), (3, FailureKind::Damaged)]);
    assert!(matches!(&letters[0].content, DeadContent::Input(input) if input.bytes.len() == broken.len()));
    assert!(letters[0].failure.message.contains("checksum"));
    assert!(letters[2].failure.message.contains("version 2"));
    assert_eq!(queue.retry_dead_letter(sequence(1)).unwrap(), RetryOutcome::NotAnEvent);
    let stats = queue.stats();
    assert_eq!((stats.pending, stats.dead_letters), (1, 3));
    assert!(stats.pending_bytes < bytes);
    for number in 1..=3 {
        assert!(queue.drop_dead_letter(sequence(number)).unwrap());
    }
    queue.settle(delivered([4])).unwrap();
    assert_eq!(queue.stats().pending_bytes, 0);
    // What it was may still stand in its transcript: that is read again from its beginning.
    let many = (0..3000).map(|number| (PathBuf::from(format!("/t/{number}")), Some(cursor(number))));
    queue.append(Batch { cursors: many.collect(), ..Batch::default() }).unwrap();
    queue.close().unwrap();
    let (queue, recovery) = Queue::open(&fixture.config).unwrap();
    assert_eq!(recovery.repairs, [Repair::CursorsForgotten]);
    assert_eq!(queue.cursors().unwrap(), []);
    queue.close().unwrap();
    fixture.open();
}

#[test]
fn an_unreadable_block_becomes_one_dead_letter_and_the_counters_follow() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(100..120)).unwrap();
    let bytes = queue.stats().pending_bytes;
    queue.settle(vec![(sequence(1), refused("no")), (sequence(2), Outcome::Delivered)]).unwrap();
    queue.close().unwrap();
    let mut entries = 0;
    tamper(&fixture, |store, changes| {
        let value = store.get(&store::block_key(1)).unwrap().unwrap();
        entries = block::entries(&value).unwrap().len() as u64;
        changes.insert(&store::block_key(1), &value[..value.len() - 1]);
    });
    assert!(entries > 0);
    let queue = fixture.open();
    assert_eq!(queue.stats().oldest.unwrap().0, sequence(1));
    assert_eq!(numbers(&queue.window(None, 100, u64::MAX).unwrap()), (3 + entries..=20).collect::<Vec<_>>());
    let letters = queue.dead_letters(None, 10).unwrap();
    let shown: Vec<_> = letters.iter().map(|letter| (letter.sequence.get(), letter.failure.kind)).collect();
    assert_eq!(shown, [(1, FailureKind::Refused), (21, FailureKind::Damaged)]);
    let stats = queue.stats();
    assert_eq!((stats.pending, stats.dead_letters), (18 - entries, 2));
    assert_eq!(stats.pending_bytes, bytes / 20 * (18 - entries));
    assert_eq!(stats.oldest.unwrap().0, sequence(3 + entries));
    assert_eq!(queue.append(batch(20..21)).unwrap().sequences, [sequence(22)]);
}

#[test]
fn an_unfinished_snapshot_is_removed() {
    let fixture = Fixture::new();
    filled(&fixture);
    let unfinished = fixture.generation().join("snap.00000000000FFFFF.generating");
    fs::write(&unfinished, b"half").unwrap();
    let (queue, recovery) = Queue::open(&fixture.config).unwrap();
    assert_eq!(recovery.repairs, [Repair::UnfinishedSnapshotRemoved { file: unfinished.clone() }]);
    assert!(!unfinished.exists());
    assert_eq!(everything(&queue).len(), 10);
}

#[test]
fn a_broken_snapshot_is_set_aside_and_the_log_read_instead() {
    let fixture = Fixture::new();
    filled(&fixture);
    fixture.open().close().unwrap();
    let snapshots: Vec<_> = fs::read_dir(fixture.generation())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("snap."))
        .collect();
    assert!(!snapshots.is_empty());
    for snapshot in snapshots {
        fs::write(snapshot, b"nonsense of some length").unwrap();
    }
    let (queue, recovery) = Queue::open(&fixture.config).unwrap();
    assert!(matches!(recovery.repairs[..], [Repair::SnapshotsSetAside { .. }]), "{:?}", recovery.repairs);
    assert_eq!(everything(&queue).len(), 10);
    assert_eq!(queue.dead_letters(None, 10).unwrap().len(), 1);
}

#[test]
fn a_queue_that_cannot_be_opened_is_kept_and_salvaged() {
    let fixture = Fixture::new();
    filled(&fixture);
    fs::write(fixture.generation().join("conf"), b"segment_size: banana\nno version here, nor a checksum").unwrap();
    let (queue, recovery) = Queue::open(&fixture.config).unwrap();
    let [Repair::QueueSetAside { to, salvaged, .. }] = &recovery.repairs[..] else { panic!("{:?}", recovery.repairs) };
    assert!(recovery.repairs[0].is_loss());
    assert!(to.to_str().unwrap().contains("queue.damaged-2"), "{to:?}");
    assert!(to.join("sled-1/db").exists());
    assert_eq!(*salvaged, 10);
    let found: Vec<_> = everything(&queue).into_iter().map(|envelope| envelope.event).collect();
    assert_eq!(found, (0..10).map(|number| event(number, 900)).collect::<Vec<_>>());
    assert_eq!(queue.cursors().unwrap(), [], "everything is to be read again");
    let first = queue.append(batch(10..11)).unwrap().sequences[0];
    assert!(first.get() > 1_000_000, "no number is used twice");
    assert!(matches!(Queue::open(&fixture.config), Err(QueueError::InUse { .. })), "the new folder is locked");
    queue.close().unwrap();
    assert_eq!(fixture.open().stats().pending, 11);
}

#[test]
fn a_log_full_of_zeros_does_not_stop_the_start() {
    let fixture = Fixture::new();
    filled(&fixture);
    let db = fixture.generation().join("db");
    let length = fs::metadata(&db).unwrap().len();
    for entry in fs::read_dir(fixture.generation()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() && path.file_name().unwrap() != "conf" {
            fs::write(&path, vec![0; usize::try_from(length).unwrap()]).unwrap();
        }
    }
    let (queue, recovery) = Queue::open(&fixture.config).unwrap();
    assert!(recovery.repairs.iter().any(Repair::is_loss), "{:?}", recovery.repairs);
    queue.append(batch(0..1)).unwrap();
}

#[test]
fn a_cut_log_is_noticed_or_nothing_is_missing() {
    for keep in [0, 1, 19, 100, 5_000, 20_000, 60_000] {
        let fixture = Fixture::new();
        filled(&fixture);
        let db = fs::OpenOptions::new().write(true).open(fixture.generation().join("db")).unwrap();
        db.set_len(keep).unwrap();
        let (queue, recovery) = Queue::open(&fixture.config).unwrap();
        let complete = everything(&queue).len() == 10 && queue.cursors().unwrap().len() == 1;
        assert_ne!(queue.append(batch(0..1)).unwrap().sequences, [sequence(1)], "cut to {keep}");
        let noticed = recovery.repairs.iter().any(Repair::is_loss);
        assert!(complete || noticed, "cut to {keep}: {:?}, {:?}", queue.stats(), recovery.repairs);
    }
}

#[test]
fn counters_that_cannot_be_read_are_counted_anew() {
    let fixture = Fixture::new();
    filled(&fixture);
    tamper(&fixture, |_, changes| changes.insert(&store::counters_key(), b"\x01nonsense"));
    let (queue, recovery) = Queue::open(&fixture.config).unwrap();
    assert!(matches!(recovery.repairs[..], [Repair::CountersRebuilt { .. }]), "{:?}", recovery.repairs);
    assert_eq!((recovery.pending, recovery.dead_letters), (10, 1));
    assert_eq!(queue.cursors().unwrap(), [], "nothing tells whether all is there");
    assert!(queue.append(batch(10..11)).unwrap().sequences[0].get() > 1_000_000);
    queue.close().unwrap();
    assert_eq!(fixture.open().stats().pending, 11);
}

/// Takes the block of the pending event `number` away, as sled does with a piece of a page that was overwritten.
fn lose(store: &Store, changes: &mut Changes, number: u64) {
    let (key, _) = reader::block(store, sequence(number)).unwrap().unwrap();
    changes.remove(&store::block_key(key));
}

fn missing(recovery: &Recovery) -> (u64, u64) {
    match recovery.repairs[..] {
        [Repair::EventsMissing { expected, found }] => (expected, found),
        _ => panic!("{:?}", recovery.repairs),
    }
}

#[test]
fn events_that_vanished_are_noticed_and_their_files_read_again() {
    let fixture = Fixture::new();
    filled(&fixture);
    tamper(&fixture, |store, changes| lose(store, changes, 1));
    let (queue, recovery) = Queue::open(&fixture.config).unwrap();
    let (expected, found) = missing(&recovery);
    assert_eq!(expected, 10);
    assert_eq!((found, recovery.pending), (everything(&queue).len() as u64, found));
    assert!(found < 10);
    assert!(recovery.repairs[0].is_loss());
    assert_eq!(queue.cursors().unwrap(), []);
    queue.settle(delivered(1..=10)).unwrap();
    assert_eq!((queue.stats().pending, queue.stats().pending_bytes), (0, 0));
    queue.close().unwrap();
    fixture.open();
}

#[test]
fn one_that_vanished_and_one_that_came_back_do_not_make_up_for_each_other() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    // A block each.
    for number in 0..4 {
        queue.append(Batch { events: vec![event(number, 900)], ..Batch::default() }).unwrap();
    }
    let first = queue.handle.shared.store().unwrap().get(&store::block_key(1)).unwrap().unwrap();
    queue.settle(delivered([1])).unwrap();
    queue.close().unwrap();
    tamper(&fixture, |store, changes| {
        changes.insert(&store::block_key(1), &first);
        lose(store, changes, 3);
    });
    let (queue, recovery) = Queue::open(&fixture.config).unwrap();
    assert_eq!(missing(&recovery), (3, 3));
    assert_eq!(numbers(&everything(&queue)), [1, 2, 4]);
}

#[test]
fn a_dead_letter_that_vanished_is_noticed() {
    let fixture = Fixture::new();
    filled(&fixture);
    tamper(&fixture, |_, changes| changes.remove(&store::letter_key(11)));
    let (queue, recovery) = Queue::open(&fixture.config).unwrap();
    assert_eq!(missing(&recovery), (10, 10));
    assert_eq!((recovery.dead_letters, queue.cursors().unwrap().len()), (0, 0));
}

#[test]
fn a_backlog_too_large_to_be_counted_at_opening_is_counted_when_it_has_drained() {
    for back in [false, true] {
        let fixture = Fixture::new();
        let queue = fixture.open();
        queue.append(batch(9000..9001)).unwrap();
        let first = queue.handle.shared.store().unwrap().get(&store::block_key(1)).unwrap().unwrap();
        queue.settle(delivered([1])).unwrap();
        let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(5)))];
        queue.append(Batch { cursors, ..batch(0..5000) }).unwrap();
        queue.close().unwrap();
        tamper(&fixture, |store, changes| match back {
            // With one more than is counted the last one would never be shown.
            true => changes.insert(&store::block_key(1), &first),
            false => lose(store, changes, 3000),
        });
        fixture.open().close().unwrap();
        let drained = drain_after_damage(&fixture, &[]);
        assert_eq!(back, (0..5000).all(|number| drained.events.contains(&number)), "an event that was never shown");
        assert!(drained.said("EventsMissing") && drained.said("ended with 74"), "{back}: {:?}", drained.said);
        assert_eq!(drained.cursor, 0);
        fixture.open();
    }
}

#[test]
fn a_queue_of_the_first_version_is_counted_once() {
    let fixture = Fixture::new();
    filled(&fixture);
    tamper(&fixture, |store, changes| {
        let counters = folder::read_counters(store).unwrap().unwrap();
        let unchecked = Counters { pending_checksum: None, ..counters };
        changes.insert(&store::counters_key(), &codec::encode_counters(&unchecked).unwrap());
    });
    let queue = fixture.open();
    assert_eq!(everything(&queue).len(), 10);
    assert_eq!(queue.cursors().unwrap().len(), 1);
    queue.close().unwrap();
    let (store, _) = Store::open(&fixture.generation()).unwrap();
    assert!(folder::read_counters(&store).unwrap().unwrap().pending_checksum.is_some());
}

/// A whole record of the journal with no changes in it.
fn journal_record(number: u64) -> Vec<u8> {
    let mut record = b"hwj\x01\0\0\0\0".to_vec();
    record.extend(number.to_le_bytes());
    let checksum = xxhash_rust::xxh3::xxh3_64(&record);
    record.extend(checksum.to_le_bytes());
    record
}

/// Changes a key of sled itself, past the journal.
fn tamper_in_sled(fixture: &Fixture, key: &[u8], value: &[u8]) {
    let db = sled::Config::new().path(fixture.generation()).flush_every_ms(None).open().unwrap();
    db.insert(key, value).unwrap();
    db.flush().unwrap();
}

fn tamper_counters(fixture: &Fixture, change: impl FnOnce(&mut Counters)) {
    tamper(fixture, |store, changes| {
        let mut counters = folder::read_counters(store).unwrap().unwrap();
        change(&mut counters);
        changes.insert(&store::counters_key(), &codec::encode_counters(&counters).unwrap());
    });
}

#[test]
fn numbers_that_no_queue_can_have_reached_are_damage_and_no_panic() {
    type Harm = (&'static str, &'static str, fn(&Fixture));
    let harms: [Harm; 9] = [
        ("the next sequence", "CountersRebuilt", |fixture| {
            tamper_counters(fixture, |all| all.next_sequence = u64::MAX)
        }),
        ("no next sequence", "CountersRebuilt", |fixture| tamper_counters(fixture, |all| all.next_sequence = 0)),
        ("the pending bytes", "CountersRebuilt", |fixture| {
            tamper_counters(fixture, |all| all.pending_bytes = u64::MAX)
        }),
        ("HIGHEST", "", |fixture| fs::write(fixture.config.path.join("HIGHEST"), format!("{}\n", u64::MAX)).unwrap()),
        ("what sled has of the journal", "QueueSetAside", |fixture| {
            tamper_in_sled(fixture, b"j", &u64::MAX.to_be_bytes());
        }),
        ("a record of the journal", "QueueSetAside", |fixture| {
            let file = fixture.generation().join(crate::queue::journal::FILE);
            let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(file).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &journal_record(u64::MAX), 512 << 10).unwrap();
        }),
        ("the end of a sealed generation", "QueueSetAside", |fixture| {
            tamper_in_sled(fixture, b"g", &[7, 1, u64::MAX].map(u64::to_be_bytes).concat());
        }),
        ("what is settled of sealed ones", "QueueSetAside", |fixture| {
            tamper_in_sled(fixture, b"w", &u64::MAX.to_be_bytes());
        }),
        ("the number of a block", "QueueSetAside", |fixture| {
            tamper(fixture, |_, changes| {
                changes.remove(&store::counters_key());
                changes.insert(&store::block_key(u64::MAX), b"no block");
            });
        }),
    ];
    for (what, repair, harm) in harms {
        let fixture = Fixture::new();
        filled(&fixture);
        harm(&fixture);
        if let Ok(inspector) = Queue::inspect(&fixture.config) {
            assert_eq!(inspector.page(None, 100).map(|page| page.len()).unwrap(), 10, "{what}");
        }
        let (queue, recovery) = Queue::open(&fixture.config).unwrap_or_else(|error| panic!("{what}: {error}"));
        let repairs = format!("{:?}", recovery.repairs);
        assert!(repairs.contains(repair) && (repairs == "[]") == repair.is_empty(), "{what}: {repairs}");
        assert_eq!(everything(&queue).len(), 10, "{what}");
        queue.append(batch(10..11)).unwrap();
        queue.close().unwrap();
        assert_eq!(everything(&fixture.open()).len(), 11, "{what}");
    }
}

#[test]
fn a_generation_with_a_number_that_none_can_have_is_none() {
    let fixture = Fixture::new();
    filled(&fixture);
    let name = format!("sled-{}", u64::MAX);
    fs::rename(fixture.generation(), fixture.config.path.join(&name)).unwrap();
    fs::write(fixture.config.path.join("CURRENT"), format!("format 2\n{name}\n")).unwrap();
    let (queue, recovery) = Queue::open(&fixture.config).unwrap();
    let [Repair::QueueSetAside { to, .. }] = &*recovery.repairs else { panic!("{:?}", recovery.repairs) };
    assert!(to.join(&name).join("db").is_file(), "what was there is kept");
    queue.append(batch(0..1)).unwrap();
    queue.compact().unwrap();
}

#[test]
fn a_newer_queue_is_refused_and_left_alone() {
    let fixture = Fixture::new();
    filled(&fixture);
    let mut counters = codec::encode_counters(&Counters::new(1)).unwrap();
    counters[0] = codec::Kind::Counters.version() + 1;
    tamper(&fixture, |_, changes| changes.insert(&store::counters_key(), &counters));
    let error = Queue::open(&fixture.config).unwrap_err();
    assert!(matches!(error, QueueError::TooNew { found: 3, supported: 2, .. }), "{error}");
    let current = fixture.config.path.join("CURRENT");
    fs::write(&current, "format 9\nsomething else\n").unwrap();
    assert!(matches!(Queue::open(&fixture.config), Err(QueueError::TooNew { found: 9, .. })));
    assert!(matches!(Queue::inspect(&fixture.config), Err(QueueError::TooNew { found: 9, .. })));
    assert_eq!(fs::read_dir(fixture.config.path.parent().unwrap()).unwrap().count(), 1, "nothing was moved");
}

#[test]
fn what_was_never_committed_is_removed_and_not_shown() {
    let fixture = Fixture::new();
    filled(&fixture);
    tamper(&fixture, |store, changes| {
        let head = store.get(&store::block_key(1)).unwrap().unwrap();
        changes.insert(&store::block_key(12), &head);
        changes.insert(&store::block_key(13), &head);
        for index in 1..3000 {
            changes.insert(&store::chunk_key(13, index), b"part");
        }
        changes.insert(&store::letter_key(14), &head);
        changes.insert(&store::content_key(14), &head);
    });
    let inspector = Queue::inspect(&fixture.config).unwrap();
    assert_eq!(inspector.page(None, 100).unwrap().len(), 10);
    assert_eq!(inspector.dead_letters(None, 100).unwrap().len(), 1);
    drop(inspector);
    let (queue, recovery) = Queue::open(&fixture.config).unwrap();
    assert_eq!(recovery.repairs, [Repair::UncommittedRemoved { keys: 3003 }]);
    assert_eq!((everything(&queue).len(), queue.stats().pending), (10, 10));
    assert_eq!(queue.append(batch(0..1)).unwrap().sequences, [sequence(12)]);
}

#[test]
fn a_lost_or_unreadable_pointer_is_rebuilt() {
    for pointer in [None, Some("nonsense"), Some("format 1\nsled-7\n"), Some("")] {
        let fixture = Fixture::new();
        filled(&fixture);
        let current = fixture.config.path.join("CURRENT");
        match pointer {
            None => fs::remove_file(&current).unwrap(),
            Some(text) => fs::write(&current, text).unwrap(),
        }
        let (queue, recovery) = Queue::open(&fixture.config).unwrap();
        assert_eq!(recovery.repairs, [Repair::PointerRebuilt { generation: 1 }], "{pointer:?}");
        assert_eq!(everything(&queue).len(), 10);
    }
}

#[test]
fn a_mark_of_damage_leads_to_a_check_and_goes_when_all_is_well() {
    let fixture = Fixture::new();
    filled(&fixture);
    folder::mark_damaged(&fixture.config.path);
    let (queue, recovery) = Queue::open(&fixture.config).unwrap();
    assert_eq!(recovery.repairs, [Repair::Reread]);
    assert_eq!(everything(&queue).len(), 10);
    queue.close().unwrap();
    fixture.open();
}

#[test]
fn others_cannot_read_the_queue() {
    use std::os::unix::fs::PermissionsExt;
    let fixture = Fixture::new();
    filled(&fixture);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&fixture.config.path), 0o700);
    for file in ["lock", "CURRENT", "sled-1/db", "sled-1/conf", "sled-1/journal"] {
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
    let (queue, recovery) = Queue::open(&config).unwrap();
    println!("\nrepaired {:?}", recovery.repairs);
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
        Err(error @ QueueError::Storage { .. }) => {
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
            (Some(0), Some(cursor)) if !fixture.config.path.join("REREAD").exists() => {
                drained.cursor = cursor;
                return drained;
            }
            (Some(0), Some(_)) => {}
            (Some(74), _) => drained.said.push(format!("start {start} ended with 74")),
            _ => panic!("{:?}: {output}{}", child.status, String::from_utf8_lossy(&child.stderr)),
        }
    }
    panic!("it never came to its end: {drained:?}");
}

#[test]
fn a_call_of_sled_that_does_not_come_back_ends_the_process_and_the_queue_is_set_aside() {
    if cfg!(not(debug_assertions)) || !Path::new("/proc/thread-self/stat").exists() {
        eprintln!("SKIPPED: needs a debug build and /proc");
        return;
    }
    let fixture = Fixture::new();
    let queue = fixture.open();
    let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(5)))];
    queue.append(Batch { cursors, ..batch(0..100) }).unwrap();
    queue.close().unwrap();
    let looping = [("HEADSPACE_FAULT_POINT", "store-applying"), ("HEADSPACE_FAULT_KIND", "loop")];
    let drained = drain_after_damage(&fixture, &looping);
    assert_eq!(drained.events, (0..100).collect(), "{drained:?}");
    assert_eq!(drained.cursor, 0, "everything is to be read again");
    assert!(drained.said("start 0 ended with 74") && drained.said("QueueSetAside"), "{drained:?}");
    assert!(!drained.said("start 1 ended"), "{drained:?}");
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
                seal(&queue);
            }
        }
        let settled = random.below(count);
        queue.settle(delivered(1..=settled)).unwrap();
        queue.close().unwrap();
        if random.below(2) == 0 {
            // With a snapshot, which is written when an opened queue is closed again.
            fixture.open().close().unwrap();
        }
        let mut generations = folder::generations(&fixture.config.path).unwrap();
        let generation = generations.swap_remove(random.below(generations.len() as u64) as usize);
        let generation = folder::generation_folder(&fixture.config.path, generation);
        let snapshots = database::snapshots(&generation).unwrap();
        let journal = generation.join(crate::queue::journal::FILE);
        let target = match snapshots.first() {
            Some(snapshot) if random.below(4) == 0 => snapshot.clone(),
            _ if random.below(3) == 0 && journal.exists() => journal,
            _ => generation.join("db"),
        };
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
        match drained.said("QueueSetAside") {
            true => aside += 1,
            false => whole += 1,
        }
        restarted += usize::from(drained.said("ended with 74"));
    }
    println!("{whole} opened as they were, {aside} were set aside; {restarted} had to be started again");
}
