//! What the queue promises, each as a test that has been seen to fail.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tempfile::TempDir;

use super::*;
use crate::event::{DeadContent, Event};
use crate::queue::database::snapshots;
use crate::queue::tests::{
    Random, SEED, batch, cursor, delivered, event, eventually, numbers, refused, rejection, rounds, seed, sequence,
};

mod basics;
mod damage;
mod durability;
mod format;
mod kill;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod memory;
mod model;

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
        let (queue, recovery) = Queue::open(&self.config).unwrap();
        assert_eq!(recovery.repairs, []);
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
        *queue.handle.shared.log().unwrap().newest.before_sync.lock().unwrap() = Some(Arc::new(hook));
        count
    }

    /// The folder of the newest segment.
    fn newest(&self) -> PathBuf {
        segment::folder_of(&self.config.path, *self.segments().last().unwrap())
    }

    /// The numbers of the segments, oldest first.
    fn segments(&self) -> Vec<u64> {
        folder::segments(&self.config.path).unwrap()
    }
}

fn everything(queue: &Queue) -> Vec<Envelope> {
    let mut all: Vec<Envelope> = Vec::new();
    loop {
        let page = queue.page(all.last().map(|envelope| envelope.sequence), 1000).unwrap();
        if page.is_empty() {
            return all;
        }
        all.extend(page);
    }
}
