//! The library's parts without the process around them, for what can only be seen from within.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use headspace_watcher::internals::{
    Batch, Candidate, Config, ConnectSettings, DrainConfig, Envelope, Environment, Event, EventId, ForeignKeys, Needs,
    Origin, PostgresSink, Queue, QueueConfig, Schemas, Sequence, TableName, Timestamp,
};

use crate::stage::Database;

/// A sink for `url`.
pub fn sink(url: &str) -> PostgresSink {
    PostgresSink::new(settings(url), "here".to_owned())
}

pub fn settings(url: &str) -> ConnectSettings {
    let environment = Environment::new("/", [("DATABASE_URL", url), ("HOME", "/")]);
    let database = Config::load(None, &environment).unwrap().config.database;
    ConnectSettings {
        target: Arc::new(move || database.resolve(&environment).map_err(|error| error.to_string())),
        pool_size: 2,
        connect_timeout: Duration::from_secs(5),
        statement_timeout: Duration::from_secs(5),
        needs: Needs {
            events: TableName { schema: None, table: "events".to_owned() },
            ledger_schema: "headspace_watcher".to_owned(),
            notify_channel: None,
        },
        auto_migrate: true,
    }
}

pub fn drain_config(window: usize) -> DrainConfig {
    DrainConfig { window, attempts_max: 3, delay_first: Duration::from_millis(5), delay_max: Duration::from_millis(50) }
}

/// Turns with these texts.
pub fn events(texts: &[String]) -> Vec<Event> {
    let schemas = Schemas::load(None, 1 << 20).unwrap();
    let origin = Origin::Transcript { path: "/transcript.jsonl".into(), offset: 0 };
    texts
        .iter()
        .map(|text| {
            let payload = serde_json::json!({"session_uuid": "s", "actor": "user", "text": text, "source": "polling",
                                             "turn_timestamp": "2026-01-02T03:04:05Z"});
            let candidate = Candidate {
                id: EventId::derived(text.as_bytes()),
                event_type: "turn_detected".to_owned(),
                timestamp: Timestamp::now(),
                payload: payload.as_object().unwrap().clone(),
                refs: ForeignKeys::default(),
                origin: origin.clone(),
            };
            schemas.check(candidate).unwrap_or_else(|refused| panic!("{}", refused.invalid))
        })
        .collect()
}

/// The events as the queue hands them out, numbered from `first`.
pub fn envelopes(texts: &[String], first: u64) -> Vec<Envelope> {
    let numbers = first..;
    numbers
        .zip(events(texts))
        .map(|(number, event)| Envelope {
            sequence: Sequence::new(number).unwrap(),
            event,
            captured_at: Timestamp::now(),
            attempts: 0,
        })
        .collect()
}

/// A queue with turns of these texts.
pub fn queue(path: &Path, texts: &[String]) -> Queue {
    let config = QueueConfig { path: path.to_owned(), max_pending_bytes: 1 << 30 };
    let (queue, _) = Queue::open(&config).unwrap();
    queue.append(Batch { events: events(texts), ..Batch::default() }).unwrap();
    queue
}

/// `<prefix> 0` and so on.
pub fn texts(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{prefix} {number}")).collect()
}

/// Drops a future when it would have to wait for the n-th time: [`Poll::Ready`] of `None`.
pub struct CancelledAt<F> {
    future: Pin<Box<F>>,
    waits_left: u32,
}

impl<F: Future> CancelledAt<F> {
    pub fn new(future: F, waits: u32) -> Self {
        CancelledAt { future: Box::pin(future), waits_left: waits }
    }
}

impl<F: Future> Future for CancelledAt<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if self.waits_left == 0 => Poll::Ready(None),
            Poll::Pending => {
                self.waits_left -= 1;
                Poll::Pending
            }
        }
    }
}

/// What must hold after whatever happened: these texts, once, in order, each with its receipt.
#[track_caller]
pub fn assert_stored(database: &Database, texts: &[String]) {
    assert_eq!(database.texts(), texts);
    assert_eq!(database.value("SELECT count(*) FROM event_receipts"), texts.len().to_string());
}
