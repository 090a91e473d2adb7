//! What the queue promises, each as a test that has been seen to fail.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tempfile::TempDir;

use super::*;
use crate::event::{
    DeadContent, Event, EventId, EventParts, EventType, FailureKind, FileIdentity, ForeignKeys, Origin, Payload,
    SessionState,
};

mod attacks;
mod basics;
mod damage;
mod durability;
mod format;
mod kill;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod memory;
mod model;
mod review;
mod speed;

const SEED: &str = "HEADSPACE_TEST_SEED";

/// xorshift64*: enough to vary what happens.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }
}

/// A queue in a folder of its own, removed at the end.
struct Fixture {
    folder: TempDir,
    config: QueueConfig,
}

impl Fixture {
    fn new() -> Self {
        Self::with_room(u64::MAX / 2)
    }

    fn with_room(max_pending_bytes: u64) -> Self {
        let folder = TempDir::new().unwrap();
        let config = QueueConfig { path: folder.path().join("data/queue"), max_pending_bytes };
        Fixture { folder, config }
    }

    fn open(&self) -> Queue {
        let (queue, repairs) = Queue::open(&self.config).unwrap();
        assert_eq!(repairs, []);
        queue
    }

    /// Counts every sync and passes it on to `sync` first.
    fn on_sync(queue: &Queue, sync: impl Fn() -> std::io::Result<()> + Send + Sync + 'static) -> Arc<AtomicU64> {
        let count = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&count);
        let hook = move || {
            sync()?;
            counted.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        let writer = queue.handle.writer.lock().unwrap();
        BEFORE_SYNC.lock().unwrap().insert(writer.as_ref().unwrap().thread().id(), Arc::new(hook));
        count
    }

    /// The folder of the newest segment.
    fn newest(&self) -> PathBuf {
        self.segment(*self.segments().last().unwrap())
    }

    /// The numbers of the segments, oldest first.
    fn segments(&self) -> Vec<u64> {
        let names = files::segments(&self.config.path).unwrap().into_iter();
        names.filter(|name| !name.is_damaged).map(|name| name.number).collect()
    }

    /// The folder of a segment.
    fn segment(&self, number: u64) -> PathBuf {
        self.name(number).folder(&self.config.path)
    }

    fn name(&self, number: u64) -> files::Name {
        log::segments(&self.config.path).unwrap().into_iter().find(|name| name.number == number).unwrap()
    }

    /// What can be read of a segment without sled.
    fn raw(&self, number: u64) -> remains::Remains {
        remains::Remains::of(&self.config.path, self.name(number)).unwrap()
    }
}

type Hook = Arc<dyn Fn() -> std::io::Result<()> + Send + Sync>;

/// What is called before each sync of a writer's thread; an error is that of the sync.
static BEFORE_SYNC: std::sync::LazyLock<Mutex<std::collections::HashMap<std::thread::ThreadId, Hook>>> =
    std::sync::LazyLock::new(Mutex::default);

pub(super) fn before_sync() -> std::io::Result<()> {
    let hook = BEFORE_SYNC.lock().unwrap().get(&std::thread::current().id()).cloned();
    hook.map_or(Ok(()), |hook| hook())
}

impl Queue {
    /// [`Queue::submit_settle`], and waits.
    pub(crate) fn settle(&self, outcomes: Vec<(Sequence, Outcome)>) -> Result<(), QueueError> {
        self.submit_settle(outcomes).wait()
    }

    /// Begins a segment now, whatever the size of the newest.
    fn roll(&self) -> Result<(), QueueError> {
        self.handle.shared.inbox.send(Work::Roll).wait()
    }
}

/// The newest segment of a queue that is open.
fn newest(queue: &Queue) -> Arc<segment::Segment> {
    match &queue.handle.shared.log().unwrap().newest {
        log::Source::Sled(segment) => Arc::clone(segment),
        log::Source::Raw(_) => panic!("it is only looked at"),
    }
}

fn event(number: u64, payload_bytes: usize) -> Event {
    let text = "x".repeat(payload_bytes);
    Event::from_checked_parts(EventParts {
        id: EventId::derived(&number.to_be_bytes()),
        event_type: EventType::new("turn_detected"),
        timestamp: Timestamp::from_nanosecond(1_700_000_000_123_456_789 + i128::from(number)).unwrap(),
        payload: Payload::from_json(format!(r#"{{"number":{number},"text":"{text}"}}"#)),
        refs: ForeignKeys { project_id: Some(7), turn_id: Some(-1), ..ForeignKeys::default() },
        origin: Origin::Transcript { path: "/home/someone/a.jsonl".into(), offset: number },
    })
}

fn batch(numbers: std::ops::Range<u64>) -> Batch {
    Batch { events: numbers.map(|number| event(number, 900)).collect(), ..Batch::default() }
}

fn cursor(offset: u64) -> Cursor {
    Cursor {
        file: FileIdentity { device: 1, inode: 2 },
        offset,
        fingerprint: 99,
        project_path: Some("/home/someone".into()),
        session: SessionState::default(),
    }
}

fn rejection(bytes: &[u8]) -> Rejection {
    Rejection {
        failure: Failure { kind: FailureKind::Unreadable, message: "no JSON object".into(), sqlstate: None },
        event_type: None,
        origin: Origin::Transcript { path: "/home/someone/a.jsonl".into(), offset: 5 },
        bytes: bytes.to_vec(),
    }
}

fn refused(message: &str) -> Outcome {
    let failure = Failure { kind: FailureKind::Refused, message: message.into(), sqlstate: Some("22P05".into()) };
    Outcome::Refused { failure, attempts: 3 }
}

fn numbers(envelopes: &[Envelope]) -> Vec<u64> {
    envelopes.iter().map(|envelope| envelope.sequence.get()).collect()
}

fn sequence(number: u64) -> Sequence {
    Sequence::new(number).unwrap()
}

fn everything(queue: &Queue) -> Vec<Envelope> {
    read_all(queue).unwrap()
}

/// All that waits, page by page.
fn read_all(queue: &Queue) -> Result<Vec<Envelope>, QueueError> {
    let mut all: Vec<Envelope> = Vec::new();
    loop {
        let page = queue.page(all.last().map(|envelope| envelope.sequence), 1000)?;
        if page.is_empty() {
            return Ok(all);
        }
        all.extend(page);
    }
}

/// All dead letters, page by page.
fn all_letters(queue: &Queue) -> Vec<DeadLetter> {
    let mut all: Vec<DeadLetter> = Vec::new();
    loop {
        let page = queue.dead_letters(all.last().map(|letter| letter.sequence), 1000).unwrap();
        if page.is_empty() {
            return all;
        }
        all.extend(page);
    }
}

/// Which of the events of [`event`] it is.
fn number_of(event: &Event) -> u64 {
    match event.origin() {
        Origin::Transcript { offset, .. } => *offset,
        other => panic!("not an event of these tests: {other:?}"),
    }
}

/// A copy of the queue's folder as it is now: what a kill leaves.
fn copy_to(from: &Path, to: &Path) {
    let copied = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(copied.unwrap().success());
}

fn zero(file: &Path) {
    std::fs::write(file, vec![0; usize::try_from(std::fs::metadata(file).unwrap().len()).unwrap()]).unwrap();
}

fn delivered(numbers: impl IntoIterator<Item = u64>) -> Vec<(Sequence, Outcome)> {
    numbers.into_iter().map(|number| (sequence(number), Outcome::Delivered)).collect()
}

/// Waits until `condition` holds; panics after 20 s.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen in time");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Rounds of a long proof: few in a test run, many under `scripts/torture.sh`.
pub(crate) fn rounds(few: u32) -> u32 {
    std::env::var("HEADSPACE_TORTURE_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(few)
}

/// Of what is random; printed, so that a failure can be repeated.
fn seed() -> u64 {
    let seed = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok());
    seed.unwrap_or_else(|| Timestamp::now().as_nanosecond() as u64 | 1)
}
