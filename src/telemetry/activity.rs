//! What happened lately: the last events and the sessions they came from, for people who look on.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use super::lock;
use crate::event::{Event, EventId, EventType, Origin, Payload, Timestamp};

/// Events that are remembered.
pub const EVENTS_MAX: usize = 20;

/// Sessions that are remembered: those that were active last.
const SESSIONS_MAX: usize = 64;

/// A larger payload is not kept beside its event.
const PAYLOAD_BYTES_MAX: usize = 16 * 1024;

/// The last events that were taken in, and which sessions are active. One lock for a batch, whatever its size.
#[derive(Default, Debug)]
pub struct Activity {
    lately: Mutex<Lately>,
}

#[derive(Default, Debug)]
struct Lately {
    events: VecDeque<Noted>,
    sessions: HashMap<Arc<str>, SessionActivity>,
}

/// One event as it was taken in.
#[derive(Clone, Debug)]
pub struct Noted {
    pub id: EventId,
    pub event_type: EventType,
    pub timestamp: Timestamp,
    pub captured_at: Timestamp,
    pub origin: Origin,
    /// `None` when it is too large to be kept here.
    pub payload: Option<Payload>,
}

impl Noted {
    fn new(event: &Event, now: Timestamp) -> Noted {
        let payload = event.payload();
        Noted {
            id: event.id(),
            event_type: event.event_type().clone(),
            timestamp: event.timestamp(),
            captured_at: now,
            origin: event.origin().clone(),
            payload: (payload.as_json().len() <= PAYLOAD_BYTES_MAX).then(|| payload.clone()),
        }
    }
}

/// Events of one transcript since the start of the process.
#[derive(Clone, Debug)]
pub struct SessionActivity {
    pub transcript: Arc<str>,
    pub events: u64,
    pub last_seen: Timestamp,
}

/// What a batch will have led to once it is accepted.
#[derive(Debug)]
pub struct BatchActivity {
    events: Vec<Noted>,
    sessions: Vec<(Arc<str>, u64)>,
}

impl BatchActivity {
    pub fn of(events: &[Event], now: Timestamp) -> BatchActivity {
        let last = events.iter().skip(events.len().saturating_sub(EVENTS_MAX));
        let mut sessions: Vec<(Arc<str>, u64)> = Vec::new();
        for event in events {
            let Origin::Transcript { path, .. } = event.origin() else { continue };
            match sessions.iter_mut().find(|(known, _)| Arc::ptr_eq(known, path)) {
                Some((_, count)) => *count += 1,
                None => sessions.push((path.clone(), 1)),
            }
        }
        BatchActivity { events: last.map(|event| Noted::new(event, now)).collect(), sessions }
    }
}

impl Activity {
    pub fn note(&self, batch: BatchActivity, now: Timestamp) {
        let mut lately = lock(&self.lately);
        for event in batch.events {
            if lately.events.len() == EVENTS_MAX {
                lately.events.pop_front();
            }
            lately.events.push_back(event);
        }
        for (transcript, events) in batch.sessions {
            let session = lately.sessions.entry(transcript.clone()).or_insert_with(|| SessionActivity {
                transcript,
                events: 0,
                last_seen: now,
            });
            session.events += events;
            session.last_seen = now;
        }
        while lately.sessions.len() > SESSIONS_MAX {
            let oldest = lately.sessions.values().min_by_key(|session| session.last_seen);
            let Some(oldest) = oldest.map(|session| session.transcript.clone()) else { break };
            lately.sessions.remove(&oldest);
        }
    }

    /// The last events, newest first.
    pub fn events(&self) -> Vec<Noted> {
        lock(&self.lately).events.iter().rev().cloned().collect()
    }

    /// The sessions that were active last, the most recent first.
    pub fn sessions(&self) -> Vec<SessionActivity> {
        let mut sessions: Vec<_> = lock(&self.lately).sessions.values().cloned().collect();
        sessions.sort_by(|a, b| (b.last_seen, &a.transcript).cmp(&(a.last_seen, &b.transcript)));
        sessions
    }
}
