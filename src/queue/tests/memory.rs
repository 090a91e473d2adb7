//! What the queue takes in memory does not grow with what it has done.

use super::*;

/// As the program does, see `cli/run.rs`: by itself the allocator keeps more with every thread.
const ALLOCATOR_SETTINGS: [(&str, &str); 3] =
    [("MALLOC_ARENA_MAX", "2"), ("MALLOC_MMAP_THRESHOLD_", "131072"), ("MALLOC_TRIM_THRESHOLD_", "131072")];

/// Memory of its own that this process has, in kB.
fn own_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let own = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    own.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn new_segments_again_and_again_take_no_more_memory() {
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "queue::tests::memory::new_segments", "--ignored", "--nocapture", "--test-threads=1"])
        .envs(ALLOCATOR_SETTINGS)
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout).into_owned() + &String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success() && output.contains("1 passed"), "{output}");
}

#[test]
#[ignore = "the child of the test above"]
fn new_segments() {
    const FILES: u64 = 10_000;
    const DEAD_LETTERS: usize = 2_000;
    const DEAD_LETTER: [u8; 5000] = [b'x'; 5000];
    const BATCH: u64 = 100;
    const ROUNDS: u32 = 6;
    /// kB.
    const MORE_MAX: u64 = 6 << 10;
    let fixture = Fixture::new();
    let queue = fixture.open();
    for first in (0..FILES).step_by(BATCH as usize) {
        let path = |file| PathBuf::from(format!("/home/someone/.claude/projects/-home-someone-app/{file}.jsonl"));
        let cursors = (first..first + BATCH).map(|file| (path(file), Some(cursor(file)))).collect();
        let accepted = queue.append(Batch { cursors, ..batch(first..first + BATCH) }).unwrap();
        queue.settle(accepted.sequences.into_iter().map(|sequence| (sequence, Outcome::Delivered)).collect()).unwrap();
    }
    for _ in 0..DEAD_LETTERS / BATCH as usize {
        let rejections = vec![rejection(&DEAD_LETTER); BATCH as usize];
        queue.append(Batch { rejections, ..Batch::default() }).unwrap();
    }
    // Two that are open at once take more than one.
    queue.roll().unwrap();
    let before = own_memory();
    for round in 0..ROUNDS {
        queue.roll().unwrap();
        let now = own_memory();
        assert!(now < before + MORE_MAX, "{before} kB, after new segment number {round} {now} kB");
    }
    assert_eq!(queue.cursors().unwrap().len() as u64, FILES);
    assert_eq!(queue.stats().dead_letters, DEAD_LETTERS as u64);
}
