//! The process dies at any moment: nothing acknowledged is lost, nothing is doubled, the order stays.
//!
//! The test starts its own binary again as a child that appends, delivers and compacts, and says on its standard output what
//! was acknowledged and what it is about to settle. The child is killed (SIGKILL), or aborts at a fault point; then the
//! queue is opened and compared with what the child had said. Power cuts are not simulated here.
//!
//! HEADSPACE_TORTURE_ROUNDS sets how often the child is killed at random, and how often at the named points all together
//! (few by default).

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::*;
use crate::faults;

const FOLDER: &str = "HEADSPACE_TORTURE_FOLDER";

/// Every number divisible by this is refused, not delivered.
const REFUSED_EVERY: u64 = 37;

fn config(folder: &Path) -> QueueConfig {
    QueueConfig { path: folder.join("queue"), max_pending_bytes: u64::MAX }
}

#[test]
#[ignore = "the child of the tests below"]
fn child() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let mut random = Random(std::env::var(SEED).unwrap().parse().unwrap());
    let (queue, repairs) = Queue::open(&config(Path::new(&folder))).unwrap();
    assert!(!repairs.iter().any(Repair::is_loss), "{:?}", repairs);
    let mut next = queue.cursors().unwrap().first().map_or(0, |(_, cursor)| cursor.offset);
    loop {
        let mut tickets = Vec::new();
        for _ in 0..random.below(8) {
            let first = next;
            next += random.below(30) + 1;
            let mut batch = Batch { cursors: vec![("/t/a".into(), Some(cursor(next)))], ..Batch::default() };
            for number in first..next {
                let size = match random.below(60) {
                    0 => 300_000,
                    1..5 => 9000,
                    _ => 800,
                };
                batch.events.push(event(number, usize::try_from(random.below(size)).unwrap()));
            }
            tickets.push((next, queue.submit(batch)));
        }
        if random.below(20) == 0 {
            // Above the size of one stage: in parts.
            let first = next;
            next += 2;
            let events = (first..next).map(|number| event(number, 1_500_000)).collect();
            let cursors = vec![("/t/a".into(), Some(cursor(next)))];
            tickets.push((next, queue.submit(Batch { events, cursors, ..Batch::default() })));
        }
        for (upto, ticket) in tickets {
            ticket.wait().unwrap();
            println!("\nacknowledged {upto}");
        }
        let all = random.below(4) == 0;
        for _ in 0..if all { u64::MAX } else { random.below(4) } {
            let window = queue.window(None, 64, u64::MAX).unwrap();
            if window.is_empty() {
                break;
            }
            let said: Vec<_> = window.iter().map(|envelope| number_of(&envelope.event).to_string()).collect();
            println!("\nsettling {}", said.join(" "));
            let outcomes = window.iter().map(|envelope| {
                let refuse = number_of(&envelope.event).is_multiple_of(REFUSED_EVERY);
                (envelope.sequence, if refuse { refused("divisible") } else { Outcome::Delivered })
            });
            queue.settle(outcomes.collect()).unwrap();
        }
        if random.below(3) == 0 {
            for letter in queue.dead_letters(None, 2).unwrap() {
                let DeadContent::Event { event, .. } = &letter.content else { panic!("{letter:?}") };
                println!("\nretrying {}", number_of(event));
                queue.retry_dead_letter(letter.sequence).unwrap();
            }
        }
        if random.below(4) == 0 {
            queue.roll().unwrap();
        }
    }
}

/// What the children have said so far.
#[derive(Default)]
struct Said {
    /// Every number below was acknowledged.
    acknowledged: u64,
    settling: BTreeSet<u64>,
    /// Dead letters that were to be put back at the tail.
    retrying: BTreeSet<u64>,
}

impl Said {
    fn hear(&mut self, line: &str) {
        if let Some(upto) = line.strip_prefix("acknowledged ") {
            self.acknowledged = self.acknowledged.max(upto.parse().unwrap());
        } else if let Some(numbers) = line.strip_prefix("settling ") {
            // A line cut by the kill is a settlement that was not begun.
            self.settling.extend(numbers.split(' ').map(|number| number.parse::<u64>().unwrap()));
        } else if let Some(number) = line.strip_prefix("retrying ") {
            self.retrying.insert(number.parse().unwrap());
        }
    }

    /// Opens the queue and compares.
    fn check(&self, folder: &Path) {
        let (queue, repairs) = Queue::open(&config(folder)).unwrap();
        assert!(!repairs.iter().any(Repair::is_loss), "{:?}", repairs);
        let taken = queue.cursors().unwrap().first().map_or(0, |(_, cursor)| cursor.offset);
        assert!(taken >= self.acknowledged, "acknowledged up to {}, taken in up to {taken}", self.acknowledged);
        let all = everything(&queue);
        assert!(all.is_sorted_by(|one, other| one.sequence < other.sequence));
        let numbers = || all.iter().map(|envelope| number_of(&envelope.event));
        let never_retried = numbers().filter(|number| !self.retrying.contains(number));
        assert!(never_retried.is_sorted_by(|one, other| one < other), "out of order");
        let pending: BTreeSet<u64> = numbers().collect();
        assert_eq!(pending.len(), all.len(), "doubled");
        let mut dead = BTreeSet::new();
        for letter in all_letters(&queue) {
            let DeadContent::Event { event, .. } = &letter.content else { panic!("{letter:?}") };
            assert!(dead.insert(number_of(event)), "{} was set aside twice", number_of(event));
        }
        for number in 0..taken {
            let waits = pending.contains(&number);
            let gone = self.settling.contains(&number);
            assert!(waits || gone, "{number} is lost");
            assert!(!(waits && dead.contains(&number)), "{number} waits and is set aside");
            if number.is_multiple_of(REFUSED_EVERY) {
                assert!(waits || dead.contains(&number), "{number} is lost, it was refused");
            }
        }
        assert!(pending.iter().all(|&number| number < taken), "an event is ahead of its cursor");
        let stats = queue.stats();
        assert_eq!((stats.pending, stats.dead_letters), (pending.len() as u64, dead.len() as u64));
        let needed = 1 + queue.handle.shared.log().unwrap().older.len();
        queue.close().unwrap();
        let segments = std::fs::read_dir(config(folder).path).unwrap();
        let segments = segments.filter(|entry| entry.as_ref().unwrap().file_type().unwrap().is_dir());
        assert_eq!(segments.count(), needed);
    }
}

/// Runs a child until it has been killed after `life`, or has died by itself; hears what it says.
fn run(folder: &Path, seed: u64, fault: Option<&str>, life: Duration, said: &mut Said) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["queue::tests::kill::child", "--exact", "--ignored", "--nocapture", "--test-threads", "1"])
        .env(FOLDER, folder)
        .env(SEED, seed.to_string())
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Some(fault) = fault {
        command.env("HEADSPACE_FAULT_POINT", fault);
    }
    let mut child = command.spawn().unwrap();
    let stdout = child.stdout.take().unwrap();
    let stderr = child.stderr.take().unwrap();
    let listener = std::thread::spawn(move || {
        let mut lines = Vec::new();
        let mut reader = BufReader::new(stdout);
        let mut line = String::new();
        while reader.read_line(&mut line).unwrap() > 0 {
            if line.ends_with('\n') {
                lines.push(line.trim_end().to_owned());
            }
            line.clear();
        }
        lines
    });
    let complaints = std::thread::spawn(move || std::io::read_to_string(stderr).unwrap_or_default());
    let deadline = Instant::now() + life;
    let died = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if Instant::now() >= deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    listener.join().unwrap().iter().for_each(|line| said.hear(line));
    let complaints = complaints.join().unwrap();
    if let Some(status) = died {
        use std::os::unix::process::ExitStatusExt;
        assert!(fault.is_some() && status.signal().is_some(), "child ended with {status}: {complaints}");
    }
    died.is_some()
}

#[test]
fn nothing_acknowledged_is_lost_when_killed_at_any_moment() {
    let rounds = rounds(6);
    let seed = seed();
    println!("{SEED}={seed}");
    let mut random = Random(seed);
    let folder = TempDir::new().unwrap();
    let mut said = Said::default();
    for round in 0..rounds {
        let life = Duration::from_millis(20 + random.below(if round % 3 == 0 { 60 } else { 700 }));
        run(folder.path(), random.below(u64::MAX) | 1, None, life, &mut said);
        said.check(folder.path());
    }
    println!("{} events acknowledged in {rounds} rounds", said.acknowledged);
    assert!(said.acknowledged > 0);
}

/// The points that a process passes once at most: those of opening.
#[cfg(debug_assertions)]
fn is_passed_once(point: &str) -> bool {
    point.starts_with("open-")
}

#[test]
#[cfg(debug_assertions)]
fn nothing_acknowledged_is_lost_when_it_dies_at_a_fault_point() {
    let seed = seed();
    println!("{SEED}={seed}");
    let mut random = Random(seed);
    let points: Vec<_> = faults::POINTS.iter().filter(|point| !point.starts_with("damage-")).collect();
    let count = u32::try_from(points.len()).unwrap();
    let each = rounds(count).div_ceil(count);
    for point in &points {
        let folder = TempDir::new().unwrap();
        let mut said = Said::default();
        for round in 0..each {
            let pass = if round == 0 || is_passed_once(point) { 1 } else { random.below(12) + 1 };
            let fault = format!("{point}:{pass}");
            let died = run(folder.path(), random.below(u64::MAX) | 1, Some(&fault), Duration::from_secs(60), &mut said);
            // The first pass must come; a late one of a rare point may not on a busy machine: then it was killed.
            assert!(died || pass > 1, "{fault} was never reached");
            said.check(folder.path());
            if is_passed_once(point) {
                // So that the next one finds something.
                run(folder.path(), random.below(u64::MAX) | 1, None, Duration::from_millis(100), &mut said);
            }
        }
        run(folder.path(), random.below(u64::MAX) | 1, None, Duration::from_millis(100), &mut said);
        said.check(folder.path());
    }
    println!("died {each} times at each of {} points", points.len());
}

#[test]
#[cfg(debug_assertions)]
fn a_damaged_queue_is_salvaged_though_the_process_dies_on_the_way() {
    for point in ["damage-noted", "damage-moved", "segment-copied", "segment-committed", "open-segment-created"] {
        let folder = TempDir::new().unwrap();
        let config = config(folder.path());
        let (queue, _) = Queue::open(&config).unwrap();
        queue.append(Batch { rejections: vec![rejection(b"?")], ..batch(0..300) }).unwrap();
        queue.close().unwrap();
        std::fs::write(config.path.join("DAMAGED"), "1 a test says so\n").unwrap();
        let died = run(folder.path(), 1, Some(point), Duration::from_secs(60), &mut Said::default());
        assert!(died, "{point} was never reached");
        // A second time, so that what the first one left is in the way.
        if point == "damage-noted" {
            assert!(run(folder.path(), 1, Some(point), Duration::from_secs(60), &mut Said::default()));
        }
        let (queue, repairs) = Queue::open(&config).unwrap();
        let found: Vec<_> = everything(&queue).iter().map(|envelope| number_of(&envelope.event)).collect();
        assert_eq!(found, (0..300).collect::<Vec<_>>(), "{point}: {:?}", repairs);
        assert_eq!(queue.append(batch(300..301)).unwrap().sequences, [sequence(302)], "{point}");
        queue.close().unwrap();
        let names = std::fs::read_dir(&config.path).unwrap().map(|entry| entry.unwrap());
        let names = names.filter(|entry| entry.file_type().unwrap().is_dir());
        let mut folders: Vec<_> = names.map(|entry| entry.file_name().into_string().unwrap()).collect();
        folders.sort();
        assert_eq!(folders.len(), 2, "{point}: {folders:?}");
        assert!(folders[0] == "damaged-1" && folders[1].starts_with("segment-"), "{point}: {folders:?}");
    }
}

#[test]
#[cfg(debug_assertions)]
fn what_is_missing_is_said_though_the_process_dies_on_the_way() {
    let mut silent = Vec::new();
    for is_older in [false, true] {
        for point in ["damage-noted", "damage-moved", "segment-copied", "open-segment-created", "open-recovered"] {
            let folder = TempDir::new().unwrap();
            let config = config(folder.path());
            let (queue, _) = Queue::open(&config).unwrap();
            queue.append(batch(0..300)).unwrap();
            if is_older {
                queue.roll().unwrap();
                queue.append(batch(300..310)).unwrap();
            }
            queue.close().unwrap();
            damage::cut(&config.path.join("segment-1"), 500);
            let died = run(folder.path(), 1, Some(point), Duration::from_secs(60), &mut Said::default());
            assert!(died, "{point} was never reached");
            let (queue, _) = Queue::open(&config).unwrap();
            let stats = queue.stats();
            if stats.missing == 0 && stats.dead_letters == 0 {
                silent.push((is_older, point));
            }
        }
    }
    assert!(silent.is_empty(), "nobody is told of what is missing: {silent:?}");
}
