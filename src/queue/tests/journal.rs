//! Small changes stand in the journal until they are in sled, and nobody notices the difference.

use std::collections::BTreeMap;
use std::fs;

use proptest::prelude::*;

use super::*;
use crate::queue::journal::{FILE, Journal};
use crate::queue::memtable::Change;
use crate::queue::store::Changes;

#[derive(Clone, Debug)]
enum Op {
    /// Keys with the length of what they get, `None` to take them away.
    Apply(Vec<(u8, Option<usize>)>),
    Sync,
    CarryOver,
    Reopen,
    /// Steps an iterator over everything, and goes on with it after the next changes.
    Step(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let few = prop::collection::vec((0..60u8, prop::option::weighted(0.6, 0..200usize)), 1..6);
    let many = prop::collection::vec((0..60u8, prop::option::weighted(0.8, 3000..4000usize)), 1..40);
    prop_oneof![
        8 => few.prop_map(Op::Apply),
        2 => many.prop_map(Op::Apply),
        2 => Just(Op::Sync),
        1 => Just(Op::CarryOver),
        1 => Just(Op::Reopen),
        3 => (1..20usize).prop_map(Op::Step),
    ]
}

fn open(folder: &Path) -> Store {
    let (store, repairs) = Store::open(folder).unwrap();
    assert_eq!(repairs, []);
    store
}

fn check(store: &Store, model: &BTreeMap<Vec<u8>, Vec<u8>>) {
    let pairs = |range| -> Vec<_> {
        let pairs = store.range(range).unwrap().map(Result::unwrap);
        pairs.map(|(key, value)| (key.to_vec(), value.to_vec())).collect()
    };
    let expected = |first: u64, last: u64| -> Vec<_> {
        let range = model.range(store::block_key(first)..=store::block_key(last));
        range.map(|(key, value)| (key.clone(), value.clone())).collect()
    };
    assert!(pairs(store::prefix_range(b'e')) == expected(0, u64::MAX));
    for (first, last) in [(7, 31), (0, 0), (30, 59), (59, 90)] {
        let range = store::block_key(first)..=store::block_key(last);
        let expected = expected(first, last);
        assert!(pairs(range.clone()) == expected);
        let last = expected.last().map(|(key, _)| key.clone());
        assert_eq!(store.last_key(range).unwrap().map(|key| key.to_vec()), last);
    }
    assert_eq!(pairs(store::block_key(9)..=store::block_key(8)), []);
    for number in 0..60 {
        let key = store::block_key(number);
        assert_eq!(store.get(&key).unwrap().as_deref(), model.get(&key).map(Vec::as_slice));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_in_the_journal_and_what_is_in_sled_are_read_as_one(ops in prop::collection::vec(op(), 1..60)) {
        let folder = TempDir::new().unwrap();
        let mut store = open(folder.path());
        let mut model = BTreeMap::new();
        let mut steps = None;
        for op in ops {
            match op {
                Op::Apply(list) => {
                    let mut changes = Changes::default();
                    let before = model.clone();
                    for (number, bytes) in list {
                        let key = store::block_key(number.into());
                        match bytes {
                            Some(bytes) => {
                                let value = vec![number ^ bytes as u8; bytes];
                                changes.insert(&key, &value);
                                model.insert(key, value);
                            }
                            None => {
                                changes.remove(&key);
                                model.remove(&key);
                            }
                        }
                    }
                    store.apply(changes).unwrap();
                    if let Some((_, always)) = &mut steps {
                        // What was there before and after was there all the time.
                        let always: &mut BTreeMap<Vec<u8>, Vec<u8>> = always;
                        always.retain(|key, _| before.contains_key(key) && model.contains_key(key));
                    }
                }
                Op::Sync => store.sync().unwrap(),
                Op::CarryOver => {
                    store.carry_over().unwrap();
                }
                Op::Reopen => {
                    steps = None;
                    store.sync().unwrap();
                    drop(store);
                    store = open(folder.path());
                }
                Op::Step(count) => {
                    let (iter, always) = steps
                        .get_or_insert_with(|| (store.range(store::prefix_range(b'e')).unwrap(), model.clone()));
                    let mut ended = false;
                    for _ in 0..count {
                        let passed = match iter.next().map(Result::unwrap) {
                            None => {
                                ended = true;
                                vec![u8::MAX]
                            }
                            Some((key, value)) => {
                                prop_assert_eq!(model.get(&*key).map(Vec::as_slice), Some(&*value));
                                key.to_vec()
                            }
                        };
                        while let Some((key, _)) = always.first_key_value().filter(|(key, _)| **key <= passed) {
                            prop_assert!(ended || *key == passed, "{:?} was passed over", key);
                            prop_assert!(!ended, "{:?} was there all the time", key);
                            always.pop_first();
                        }
                        if ended {
                            break;
                        }
                    }
                    if ended {
                        steps = None;
                    }
                }
            }
            check(&store, &model);
        }
    }
}

fn changes(number: u64) -> Vec<Change> {
    let key = store::block_key(number);
    vec![(key.as_slice().into(), Some(vec![number as u8; 50 + number as usize * 7].into())), (b"x".into(), None)]
}

/// One more record.
fn write(journal: &mut Journal, number: u64) {
    assert!(journal.has_room(1000));
    journal.note(&changes(number));
    journal.sync().unwrap();
}

/// A journal with that many records, each of some changes; gives where each ends.
fn written(folder: &Path, records: u64) -> Vec<usize> {
    let mut journal = Journal::open(folder, 0).unwrap().journal;
    let mut ends = Vec::new();
    for number in 1..=records {
        write(&mut journal, number);
        let content = fs::read(folder.join(FILE)).unwrap();
        ends.push(content.iter().rposition(|&byte| byte != 0).unwrap() + 1);
    }
    ends
}

#[test]
fn a_record_that_was_being_written_is_not_there_and_those_before_it_are() {
    let folder = TempDir::new().unwrap();
    let ends = written(folder.path(), 4);
    let file = folder.path().join(FILE);
    let whole = fs::read(&file).unwrap();
    for torn in ends[2] + 1..ends[3] {
        let mut content = whole.clone();
        // The disk writes sectors in any order: the beginning may be missing as well as the end.
        match torn % 2 {
            0 => content[torn..ends[3]].fill(0),
            _ => content[ends[2]..torn].fill(0),
        }
        if content == whole {
            continue;
        }
        fs::write(&file, &content).unwrap();
        let mut replay = Journal::open(folder.path(), 0).unwrap();
        assert_eq!(replay.gaps, [], "torn at {torn}");
        assert_eq!(replay.changes, [changes(1), changes(2), changes(3)].concat(), "torn at {torn}");
        // And the next takes its place.
        write(&mut replay.journal, 9);
        let replay = Journal::open(folder.path(), 1).unwrap();
        assert_eq!(replay.gaps, []);
        assert_eq!(replay.changes, [changes(2), changes(3), changes(9)].concat(), "torn at {torn}");
    }
}

#[test]
fn a_hole_is_told_from_an_end() {
    let folder = TempDir::new().unwrap();
    let ends = written(folder.path(), 4);
    let file = folder.path().join(FILE);
    let whole = fs::read(&file).unwrap();
    for at in ends[0]..ends[1] {
        let mut content = whole.clone();
        content[at] ^= 0x55;
        fs::write(&file, &content).unwrap();
        let replay = Journal::open(folder.path(), 0).unwrap();
        if replay.changes.len() == 8 {
            // Zeros between records are not looked at.
            assert_eq!(whole[at], 0);
            continue;
        }
        assert_eq!(replay.changes, [changes(1), changes(3), changes(4)].concat(), "byte {at}");
        let [gap] = &replay.gaps[..] else { panic!("{:?} for byte {at}", replay.gaps) };
        assert!(gap.contains(&(at as u64)), "{gap:?} for byte {at}");
        assert_eq!(Journal::open(folder.path(), 2).unwrap().gaps, [], "sled has it");
    }
    fs::write(&file, &whole).unwrap();
    // sled is older than the journal was when it was begun anew.
    let mut journal = Journal::open(folder.path(), 0).unwrap().journal;
    journal.fold();
    journal.sled_synced().unwrap();
    write(&mut journal, 6);
    assert_eq!(Journal::open(folder.path(), 5).unwrap().changes, changes(6));
    assert_eq!(Journal::open(folder.path(), 5).unwrap().gaps, []);
    assert_eq!(Journal::open(folder.path(), 3).unwrap().gaps.len(), 1);
}

#[test]
fn what_went_to_sled_is_never_read_from_the_journal_again() {
    let folder = TempDir::new().unwrap();
    written(folder.path(), 4);
    let mut journal = Journal::open(folder.path(), 0).unwrap().journal;
    assert!(journal.has_room(1000));
    assert_eq!(journal.number(), 5);
    journal.fold();
    assert!(Journal::open(folder.path(), 5).unwrap().changes.is_empty());
    assert_eq!(Journal::open(folder.path(), 0).unwrap().changes.len(), 8, "sled was not synced");
    journal.sled_synced().unwrap();
    for number in 6..9 {
        write(&mut journal, number);
        // Behind them stand the old ones still.
        let replay = Journal::open(folder.path(), 5).unwrap();
        assert_eq!((replay.gaps, replay.changes.len() as u64), (vec![], 2 * (number - 5)));
    }
}

#[test]
fn the_layout_stays_readable() {
    const RECORD: &str = "68776a011f00000005000000000000008eccd029808796c901090065000000000000000303000000616263000900640000000000000002000000000000000000";
    let folder = TempDir::new().unwrap();
    let mut journal = Journal::open(folder.path(), 4).unwrap().journal;
    assert!(journal.has_room(1000));
    let list: Vec<Change> = vec![
        (store::block_key(3).as_slice().into(), Some(b"abc".into())),
        (store::letter_key(2).as_slice().into(), None),
    ];
    journal.note(&list);
    journal.sync().unwrap();
    let content = fs::read(folder.path().join(FILE)).unwrap();
    let hex: String = content[..64].iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, RECORD);
    assert_eq!(Journal::open(folder.path(), 4).unwrap().changes, list);
}

#[test]
fn small_batches_leave_sled_alone_and_large_ones_carry_them_over() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..100)).unwrap();
    let (log, journal) = (fixture.generation().join("db"), fixture.generation().join(FILE));
    let (before, syncs) = (fs::read(&log).unwrap(), Fixture::on_sync(&queue, || Ok(())));
    for number in 100..110 {
        queue.append(batch(number..number + 1)).unwrap();
    }
    assert_eq!(syncs.load(Ordering::SeqCst), 10);
    assert!(fs::read(&log).unwrap() == before);
    assert_ne!(fs::read(&journal).unwrap()[..8], [0; 8]);
    queue.append(batch(110..210)).unwrap();
    assert_eq!(syncs.load(Ordering::SeqCst), 11);
    assert!(fs::read(&log).unwrap() != before);
    assert_eq!(fs::read(&journal).unwrap()[..8], [0; 8], "it begins anew");
    assert_eq!(numbers(&everything(&queue)), (1..=210).collect::<Vec<_>>());
    queue.close().unwrap();
    assert_eq!(numbers(&everything(&fixture.open())), (1..=210).collect::<Vec<_>>());
}

#[test]
fn a_half_full_journal_is_carried_over_when_nobody_waits() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    let journal = fixture.generation().join(FILE);
    let begins = || fs::read(&journal).unwrap()[..8] != [0; 8];
    // Each has thirteen chunks.
    for number in 0..5 {
        queue.append(Batch { events: vec![event(number, 50_000)], ..Batch::default() }).unwrap();
    }
    eventually("a fresh beginning", || !begins());
    queue.append(batch(5..6)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(begins(), "little is left where it is");
    assert_eq!(everything(&queue).len(), 6);
}

#[test]
fn a_hole_in_the_journal_loses_no_event() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    for number in 0..5 {
        let cursors = vec![(PathBuf::from("/t/a"), Some(cursor(number)))];
        queue.append(Batch { cursors, ..batch(number..number + 1) }).unwrap();
    }
    queue.close().unwrap();
    let file = fixture.generation().join(FILE);
    let mut content = fs::read(&file).unwrap();
    // In the counters of the third, behind its event.
    let third = content.windows(12).position(|bytes| bytes == br#"{"number":2,"#).unwrap();
    let counters = third + content[third..].windows(4).position(|bytes| bytes == [1, 1, 0, b'm']).unwrap();
    content[counters + 20] ^= 1;
    fs::write(&file, &content).unwrap();
    let (queue, recovery) = Queue::open(&fixture.config).unwrap();
    assert!(
        matches!(&recovery.repairs[..], [Repair::JournalDamaged { .. }, Repair::CursorsForgotten, ..]),
        "{:?}",
        recovery.repairs
    );
    assert!(recovery.repairs.iter().any(Repair::is_loss));
    let found: std::collections::BTreeSet<_> = everything(&queue).iter().map(|envelope| envelope.event.id()).collect();
    assert_eq!(found, (0..5).map(|number| event(number, 900).id()).collect());
    assert_eq!(queue.cursors().unwrap(), []);
    let stats = queue.stats();
    assert_eq!(queue.append(batch(5..6)).unwrap().sequences[0].get(), stats.last_sequence.unwrap().get() + 1);
    queue.close().unwrap();
    fixture.open();
}

#[test]
fn a_journal_that_cannot_be_made_is_done_without() {
    let fixture = Fixture::new();
    fixture.open().close().unwrap();
    let file = fixture.generation().join(FILE);
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    let error = Queue::open(&fixture.config).unwrap_err();
    assert!(matches!(error, QueueError::Storage { .. }), "{error}");
    fs::remove_dir(&file).unwrap();
    let queue = fixture.open();
    fs::create_dir(&file).unwrap();
    queue.append(batch(0..1)).unwrap();
    fs::remove_dir(&file).unwrap();
    queue.append(batch(1..2)).unwrap();
    queue.close().unwrap();
    assert_eq!(everything(&fixture.open()).len(), 2);
}

#[test]
fn a_queue_of_the_first_format_becomes_one_of_the_second() {
    let fixture = Fixture::new();
    let queue = fixture.open();
    queue.append(batch(0..100)).unwrap();
    queue.close().unwrap();
    let _ = fs::remove_file(fixture.generation().join(FILE));
    let current = fixture.config.path.join("CURRENT");
    fs::write(&current, "format 1\nsled-1\n").unwrap();
    assert_eq!(Queue::inspect(&fixture.config).unwrap().stats().pending, 100);
    assert_eq!(fs::read_to_string(&current).unwrap(), "format 1\nsled-1\n", "looking changes nothing");
    assert!(!fixture.generation().join(FILE).exists());
    let queue = fixture.open();
    assert_eq!(fs::read_to_string(&current).unwrap(), "format 2\nsled-1\n");
    queue.append(batch(100..101)).unwrap();
    assert_eq!(everything(&queue).len(), 101);
}
