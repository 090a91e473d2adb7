//! Any sequence of operations leaves what a list in memory would hold.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Op {
    Append {
        sizes: Vec<usize>,
        rejections: usize,
        cursor: bool,
    },
    /// Settles that many from the front.
    Settle {
        count: usize,
    },
    /// Refuses the first one.
    Refuse,
    Retry {
        index: usize,
    },
    Drop {
        index: usize,
    },
    Reopen,
    Roll,
}

fn op() -> impl Strategy<Value = Op> {
    let size = prop_oneof![6 => 0..1500usize, 2 => 3000..5000usize, 1 => 5000..40_000usize];
    prop_oneof![
        6 => (prop::collection::vec(size, 0..12), 0..3usize, any::<bool>())
            .prop_map(|(sizes, rejections, cursor)| Op::Append { sizes, rejections, cursor }),
        4 => (0..25usize).prop_map(|count| Op::Settle { count }),
        2 => Just(Op::Refuse),
        1 => (0..5usize).prop_map(|index| Op::Retry { index }),
        1 => (0..5usize).prop_map(|index| Op::Drop { index }),
        1 => Just(Op::Reopen),
        3 => Just(Op::Roll),
    ]
}

#[derive(Default)]
struct Model {
    pending: BTreeMap<u64, (Event, u32)>,
    /// An event with its attempts, or an input.
    letters: BTreeMap<u64, Option<(Event, u32)>>,
    last: u64,
    cursor: Option<Cursor>,
    numbers: u64,
}

impl Model {
    fn apply(&mut self, op: Op, queue: &mut Queue, fixture: &Fixture) {
        match op {
            Op::Append { sizes, rejections, cursor: moves } => {
                let first = self.numbers;
                self.numbers += sizes.len() as u64;
                let events: Vec<_> = sizes.iter().zip(first..).map(|(&size, number)| event(number, size)).collect();
                let mut batch = Batch { events: events.clone(), ..Batch::default() };
                batch.rejections = vec![rejection(&vec![b'?'; 3000 * rejections]); rejections];
                if moves {
                    self.cursor = Some(cursor(self.numbers));
                    batch.cursors = vec![("/t/a".into(), self.cursor.clone())];
                }
                let sequences = queue.append(batch).unwrap().sequences;
                let expected: Vec<_> = (self.last + 1..).take(events.len()).map(sequence).collect();
                assert_eq!(sequences, expected);
                self.last += events.len() as u64;
                self.pending
                    .extend(sequences.into_iter().map(Sequence::get).zip(events.into_iter().map(|event| (event, 0))));
                for _ in 0..rejections {
                    self.last += 1;
                    self.letters.insert(self.last, None);
                }
            }
            Op::Settle { count } => {
                let numbers: Vec<u64> = self.pending.keys().copied().take(count).collect();
                numbers.iter().for_each(|number| drop(self.pending.remove(number)));
                queue.settle(delivered(numbers)).unwrap();
            }
            Op::Refuse => {
                let Some((&number, _)) = self.pending.iter().next() else { return };
                let (event, _) = self.pending.remove(&number).unwrap();
                self.letters.insert(number, Some((event, 3)));
                queue.settle(vec![(sequence(number), refused("no"))]).unwrap();
            }
            Op::Retry { index } => {
                let Some((&number, _)) = self.letters.iter().nth(index) else { return };
                let outcome = queue.retry_dead_letter(sequence(number)).unwrap();
                match self.letters.get(&number).cloned().unwrap() {
                    None => assert_eq!(outcome, RetryOutcome::NotAnEvent),
                    Some(content) => {
                        self.last += 1;
                        assert_eq!(outcome, RetryOutcome::Queued(sequence(self.last)));
                        self.letters.remove(&number);
                        self.pending.insert(self.last, content);
                    }
                }
            }
            Op::Drop { index } => {
                let Some((&number, _)) = self.letters.iter().nth(index) else { return };
                assert!(queue.drop_dead_letter(sequence(number)).unwrap());
                self.letters.remove(&number);
            }
            Op::Reopen => {
                queue.close().unwrap();
                *queue = fixture.open();
            }
            Op::Roll => queue.roll().unwrap(),
        }
    }

    fn check(&self, queue: &Queue) {
        let pending: BTreeMap<_, _> = everything(queue)
            .into_iter()
            .map(|envelope| (envelope.sequence.get(), (envelope.event, envelope.attempts)))
            .collect();
        assert!(pending == self.pending, "{:?} is not {:?}", pending.keys(), self.pending.keys());
        let letters: BTreeMap<_, _> = queue
            .dead_letters(None, 1000)
            .unwrap()
            .into_iter()
            .map(|letter| {
                let content = match letter.content {
                    DeadContent::Event { event, attempts, .. } => Some((event, attempts)),
                    DeadContent::Input(_) => None,
                };
                (letter.sequence.get(), content)
            })
            .collect();
        assert!(letters == self.letters, "{:?} is not {:?}", letters.keys(), self.letters.keys());
        let stats = queue.stats();
        assert_eq!(stats.pending, self.pending.len() as u64);
        assert_eq!(stats.dead_letters, self.letters.len() as u64);
        assert_eq!(stats.pending == 0, stats.pending_bytes == 0);
        assert_eq!(stats.oldest.map(|(sequence, _)| sequence.get()), self.pending.keys().next().copied());
        assert_eq!(stats.last_sequence, Sequence::new(self.last));
        let cursors: Vec<_> = self.cursor.iter().map(|cursor| (PathBuf::from("/t/a"), cursor.clone())).collect();
        assert_eq!(queue.cursors().unwrap(), cursors);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_queue_does_what_a_list_would_do(ops in prop::collection::vec(op(), 1..40)) {
        let fixture = Fixture::new();
        let mut queue = fixture.open();
        let mut model = Model::default();
        for op in ops {
            model.apply(op, &mut queue, &fixture);
            model.check(&queue);
        }
        queue.close().unwrap();
        model.check(&fixture.open());
        prop_assert_eq!(std::fs::read_dir(fixture.newest().join("blobs")).unwrap().count(), 0);
    }
}
