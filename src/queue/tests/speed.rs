//! How fast it is; to be run by hand, in a release build:
//!
//! ```text
//! cargo test --release --lib queue::tests::speed -- --ignored --nocapture --test-threads 1
//! ```
//!
//! HEADSPACE_SPEED_FOLDER says where the queue is; else it is in the folder for temporary files.

use super::*;

fn fixture() -> Fixture {
    match std::env::var_os("HEADSPACE_SPEED_FOLDER") {
        Some(parent) => {
            let folder = TempDir::new_in(parent).unwrap();
            let config = QueueConfig { path: folder.path().join("queue"), max_pending_bytes: u64::MAX };
            Fixture { folder, config }
        }
        None => Fixture::new(),
    }
}

/// Resident memory of this process, in MB.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

fn report(what: &str, count: u64, began: Instant) {
    let seconds = began.elapsed().as_secs_f64();
    println!("{what}: {:.0}/s ({count} in {seconds:.2} s), {} MB", count as f64 / seconds, memory());
}

fn percentile(times: &mut [Duration], share: f64) -> Duration {
    times.sort_unstable();
    times[((times.len() - 1) as f64 * share) as usize]
}

#[test]
#[ignore = "measures"]
fn appending_windowing_and_settling() {
    let fixture = fixture();
    let queue = fixture.open();
    let prepared = batch(0..256);
    for depth in [1, 4] {
        let syncs = Fixture::on_sync(&queue, || Ok(()));
        let began = Instant::now();
        let mut tickets = std::collections::VecDeque::new();
        for _ in 0..400 {
            tickets.push_back(queue.submit(prepared.clone()));
            if tickets.len() >= depth {
                tickets.pop_front().unwrap().wait().unwrap();
            }
        }
        for ticket in tickets {
            ticket.wait().unwrap();
        }
        report(&format!("append, 256 a batch, {depth} under way"), 400 * 256, began);
        println!("  {} syncs", syncs.load(Ordering::SeqCst));
    }
    println!("{:?}", queue.stats());
    let began = Instant::now();
    let (mut after, mut count) = (None, 0);
    loop {
        let window = queue.window(after, 256, u64::MAX).unwrap();
        let Some(last) = window.last() else { break };
        after = Some(last.sequence);
        count += window.len() as u64;
    }
    report("window of 256", count, began);
    let syncs = Fixture::on_sync(&queue, || Ok(()));
    let began = Instant::now();
    let last = queue.stats().last_sequence.unwrap().get();
    let mut first = 1;
    while first <= last {
        queue.settle(delivered(first..first + 256)).unwrap();
        first += 256;
    }
    report("settle, 256 at once", last, began);
    println!("  {} syncs; {:?}", syncs.load(Ordering::SeqCst), queue.stats());

    let began = Instant::now();
    let (mut appended, mut settled) = (Vec::new(), Vec::new());
    for number in 0..1000 {
        let one = batch(number..number + 1);
        let start = Instant::now();
        let sequence = queue.append(one).unwrap().sequences[0];
        appended.push(start.elapsed());
        let start = Instant::now();
        queue.settle(vec![(sequence, Outcome::Delivered)]).unwrap();
        settled.push(start.elapsed());
        std::thread::sleep(Duration::from_millis(5));
    }
    report("one at a time, a pause of 5 ms", 1000, began);
    println!("  append p50 {:?} p99 {:?}", percentile(&mut appended, 0.5), percentile(&mut appended, 0.99));
    println!("  settle p50 {:?} p99 {:?}", percentile(&mut settled, 0.5), percentile(&mut settled, 0.99));
    let began = Instant::now();
    for number in 0..2000 {
        queue.append(batch(number..number + 1)).unwrap();
    }
    report("append, one at a time", 2000, began);
}

#[test]
#[ignore = "measures"]
fn a_million_pending() {
    let fixture = fixture();
    let queue = fixture.open();
    println!("at first: {} MB", memory());
    let began = Instant::now();
    let get = |name: &str, default: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let (events, bytes, a_batch) = (get("EVENTS", 1_000_000), get("BYTES", 900), get("A_BATCH", 1000));
    for _ in 0..events / a_batch {
        let events = (0..a_batch).map(|number| event(number, usize::try_from(bytes).unwrap()));
        queue.append(Batch { events: events.collect(), ..Batch::default() }).unwrap();
    }
    report(&format!("append, {a_batch} a batch"), events, began);
    println!("{:?}", queue.stats());
    let began = Instant::now();
    queue.close().unwrap();
    println!("close: {:?}", began.elapsed());
    drop(queue);
    let began = Instant::now();
    let queue = fixture.open();
    println!("open: {:?}, {} MB", began.elapsed(), memory());
    queue.append(batch(0..1)).unwrap();
    println!("first append after: {:?}, {} MB", began.elapsed(), memory());
    let began = Instant::now();
    let mut count = 0;
    let mut memory_max = 0;
    loop {
        memory_max = memory_max.max(memory());
        let window = queue.window(None, 256, u64::MAX).unwrap();
        if window.is_empty() {
            break;
        }
        count += window.len() as u64;
        queue.settle(window.iter().map(|envelope| (envelope.sequence, Outcome::Delivered)).collect()).unwrap();
    }
    report("drained in windows of 256", count, began);
    println!("  at most {memory_max} MB");
    let began = Instant::now();
    eventually("the disk is given back", || queue.stats().disk_bytes < 4 << 20);
    println!("given back after {:?}; {:?}", began.elapsed(), queue.stats());
}
