//! Events that another program hands in, by HTTP or `emit`: all of a request or nothing of it.
//!
//! ```text
//!  bytes ─► lines ─► candidates ─► checked ──┬─ small: one batch of the queue
//!                                            └─ larger: a draft in the spool, checked again on its way into the queue
//! ```
//!
//! # Promises
//!
//! 1. **All or nothing.** A small request is one batch, which the queue takes whole or not at all. A larger one is
//!    written to a draft while it comes in, and is accepted in the one moment in which the draft gets its name in the
//!    spool; a crash before that leaves nothing, a crash after it everything. Nothing is accepted before its last byte
//!    was checked.
//! 2. **Durable before the answer**: the batch by the queue's sync, the draft by its own.
//! 3. **Constant memory**: one line, and at most [`BATCH_BYTES_MAX`] of checked events, whatever the request's length.
//! 4. **Idempotent** by `event_id`, else by the request's key and the line's number in it.
//!
//! Limits: an event by `max_event_bytes`, a line by that and [`LINE_OVERHEAD_BYTES`], a request by the room that is left
//! in the queue. The first event that does not fit ends the request; the caller is told, so it is not kept.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value};
use thiserror::Error;
use uuid::Uuid;
use xxhash_rust::xxh3::Xxh3;

use super::schema::{Invalid, Refused};
use super::spool::{Draft, Frames, Kind, ReadError, Spool};
use super::{Checker, Intake};
use crate::event::{Candidate, Event, EventId, EventType, ForeignKeys, Origin, Timestamp};
use crate::json;
use crate::queue::{Batch, QueueError};

/// Payload bytes up to which a request is one batch.
const BATCH_BYTES_MAX: usize = 1 << 20;

/// Events up to which a request is one batch.
const BATCH_EVENTS_MAX: usize = 4096;

/// What a line may have besides its payload.
const LINE_OVERHEAD_BYTES: u64 = 64 << 10;

/// Longest idempotency key.
const KEY_BYTES_MAX: usize = 255;

/// Keys that are remembered with their bodies.
const KEYS_MAX: usize = 10_000;

/// How the bytes of a request are to be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// One event on each line.
    Lines,
    /// One event on each line, or one event over several lines: what the first line is decides.
    Either,
}

/// Why nothing of a request was accepted.
#[derive(Debug, Error)]
pub enum RequestError {
    /// Of the request's own making. `line` counts from 1.
    #[error("{}{problem}", place(.line, .field))]
    Invalid { line: Option<u64>, field: Option<String>, problem: String },
    #[error("{}{problem}", place(.line, &None))]
    TooLarge { line: Option<u64>, problem: String },
    #[error("the Idempotency-Key was used before with another body; send a new key with a new request")]
    KeyReused,
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("could not write the events to the spool {spool}: {source}; free space or fix its permissions")]
    Spool { spool: String, source: io::Error },
    #[error(
        "the spool {spool} is full: {bytes} bytes wait in it, at most {bytes_max} may (queue.max_pending_bytes); start the watcher"
    )]
    SpoolFull { spool: String, bytes: u64, bytes_max: u64 },
}

impl RequestError {
    fn spool(spool: &Spool, source: io::Error) -> RequestError {
        RequestError::Spool { spool: spool.folder().display().to_string(), source }
    }

    fn spool_full(spool: &Spool, bytes: u64, bytes_max: u64) -> RequestError {
        RequestError::SpoolFull { spool: spool.folder().display().to_string(), bytes, bytes_max }
    }
}

fn place(line: &Option<u64>, field: &Option<String>) -> String {
    let line = line.map(|line| format!("line {line}: ")).unwrap_or_default();
    let field = field.as_ref().map(|field| format!("{field}: ")).unwrap_or_default();
    format!("{line}{field}")
}

/// A key that a caller gave to a request, so that repeating it stores nothing twice.
#[derive(Clone, Debug)]
pub struct IdempotencyKey(String);

impl IdempotencyKey {
    /// `None` for what is empty, too long or not visible ASCII.
    pub fn new(key: &str) -> Option<Self> {
        let fits =
            !key.is_empty() && key.len() <= KEY_BYTES_MAX && key.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        fits.then(|| IdempotencyKey(key.to_owned()))
    }

    /// The identity of the `index`th event, from 0. Of the first it is the key itself where that is a UUID.
    pub fn event_id(&self, index: u64) -> EventId {
        match (index, Uuid::try_parse(&self.0)) {
            (0, Ok(id)) => EventId(id),
            (0, Err(_)) => EventId::derived(format!("request/{}", self.0).as_bytes()),
            (index, _) => EventId::derived(format!("request/{}/{index}", self.0).as_bytes()),
        }
    }
}

/// The keys that were used last, each with a hash of its request's body. Kept in memory: after a restart, or when
/// [`KEYS_MAX`] others have been used since, a key that is used again with another body is not noticed. Its events have
/// the identities of the first ones then and count as duplicates.
#[derive(Default)]
pub struct IdempotencyKeys {
    used: Mutex<UsedKeys>,
}

#[derive(Default)]
struct UsedKeys {
    bodies: HashMap<EventId, u128>,
    /// In the order of their first use.
    order: VecDeque<EventId>,
}

impl IdempotencyKeys {
    /// Runs `accept` unless the key was used with another body. What fails leaves the key unused.
    pub fn once<T>(
        &self,
        key: &IdempotencyKey,
        body: u128,
        accept: impl FnOnce() -> Result<T, RequestError>,
    ) -> Result<T, RequestError> {
        let id = key.event_id(0);
        let is_new = self.claim(id, body)?;
        let accepted = accept();
        if is_new && accepted.is_err() {
            let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
            used.bodies.remove(&id);
            used.order.retain(|other| *other != id);
        }
        accepted
    }

    /// Whether the key is used for the first time.
    fn claim(&self, id: EventId, body: u128) -> Result<bool, RequestError> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        match used.bodies.get(&id) {
            Some(known) if *known != body => return Err(RequestError::KeyReused),
            Some(_) => return Ok(false),
            None => {}
        }
        if used.order.len() >= KEYS_MAX
            && let Some(oldest) = used.order.pop_front()
        {
            used.bodies.remove(&oldest);
        }
        used.bodies.insert(id, body);
        used.order.push_back(id);
        Ok(true)
    }
}

/// Where accepted events go.
#[derive(Clone)]
pub enum Destination {
    /// Into the queue as one batch; a larger request by the spool.
    Queue(Arc<Intake>),
    /// Into the spool, whatever the size: for commands, which never open the queue. `bytes_max` is what requests may take
    /// there in all.
    Spool { checker: Arc<Checker>, bytes_max: u64 },
}

impl Destination {
    fn checker(&self) -> &Checker {
        match self {
            Destination::Queue(intake) => intake.checker(),
            Destination::Spool { checker, .. } => checker,
        }
    }
}

/// A request that is coming in.
pub struct EventRequest {
    destination: Destination,
    spool: Spool,
    origin: Origin,
    key: Option<IdempotencyKey>,
    /// Of all bytes so far.
    body: Xxh3,
    layout: Layout,
    /// The line, or the one event, whose end has not come yet.
    partial: Vec<u8>,
    /// Whether the event goes over several lines.
    is_spread: bool,
    /// Number of the line that `partial` is the beginning of.
    line: u64,
    events: Vec<Event>,
    event_bytes: usize,
    draft: Option<Draft>,
    accepted: u64,
}

/// All of a request is durable.
pub enum AcceptedRequest {
    Batch(Vec<EventId>),
    /// Too many to be held: to be read back.
    Spooled {
        count: u64,
        ids: SpooledIds,
    },
}

impl AcceptedRequest {
    pub fn count(&self) -> u64 {
        match self {
            AcceptedRequest::Batch(ids) => ids.len() as u64,
            AcceptedRequest::Spooled { count, .. } => *count,
        }
    }
}

/// The identities of a spooled request's events, in order.
pub struct SpooledIds(Frames);

impl Iterator for SpooledIds {
    type Item = Result<EventId, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let frame = self.0.next_frame(|_| ());
        frame.and_then(|frame| frame.map(|(frame, ())| frame.event_id()).transpose()).transpose()
    }
}

impl EventRequest {
    pub fn new(
        destination: Destination,
        spool: Spool,
        origin: Origin,
        key: Option<IdempotencyKey>,
        layout: Layout,
    ) -> EventRequest {
        EventRequest {
            destination,
            spool,
            origin,
            key,
            body: Xxh3::new(),
            layout,
            partial: Vec::new(),
            is_spread: false,
            line: 1,
            events: Vec::new(),
            event_bytes: 0,
            draft: None,
            accepted: 0,
        }
    }

    /// Bytes of memory that it holds, roughly.
    pub fn memory_bytes(&self) -> usize {
        self.partial.capacity() + self.event_bytes
    }

    /// Takes the next bytes, however they are cut. Blocks for as long as checking and writing them takes.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), RequestError> {
        if self.key.is_some() {
            self.body.update(bytes);
        }
        let mut rest = bytes;
        while !self.is_spread
            && let Some(end) = memchr::memchr(b'\n', rest)
        {
            let (line, after) = rest.split_at(end);
            rest = after.get(1..).unwrap_or_default();
            if self.partial.is_empty() {
                self.take_line(line)?;
            } else {
                self.hold(line)?;
                let line = std::mem::take(&mut self.partial);
                self.take_line(&line)?;
            }
        }
        self.hold(rest)
    }

    /// Takes what has come as the whole request. Blocks until it is durable.
    pub fn finish(mut self) -> Result<AcceptedRequest, RequestError> {
        let last = std::mem::take(&mut self.partial);
        if self.is_spread {
            self.take_event(&last, None)?;
        } else {
            self.take_line_whole(&last)?;
        }
        if self.accepted == 0 {
            let problem = "there is no event: expected one JSON object, or one on each line".to_owned();
            return Err(RequestError::Invalid { line: None, field: None, problem });
        }
        drop(last);
        let destination = self.destination.clone();
        match (&destination, self.key.take()) {
            (Destination::Queue(intake), Some(key)) => {
                let body = self.body.digest128();
                intake.keys().once(&key, body, || self.accept(&destination))
            }
            _ => self.accept(&destination),
        }
    }

    fn accept(mut self, destination: &Destination) -> Result<AcceptedRequest, RequestError> {
        match (destination, self.draft.take()) {
            (Destination::Queue(intake), None) => {
                // A large event is copied on its way to the disk: others are parsed before or after that.
                let is_large = self.event_bytes > BATCH_BYTES_MAX;
                let _reservation = is_large.then(|| intake.checker().values().reserve(self.event_bytes));
                let ids = self.events.iter().map(Event::id).collect();
                intake.submit(&mut Batch { events: self.events, ..Batch::default() }).wait()?;
                Ok(AcceptedRequest::Batch(ids))
            }
            (Destination::Queue(intake), Some(draft)) => {
                let (queue, waiting) = (intake.queue(), self.spool.backlog_bytes() + draft.bytes());
                // Once it is in the spool it must come into the queue some time, so the room for it is looked at now.
                let pending_bytes = queue.stats().pending_bytes;
                if pending_bytes + waiting > queue.max_pending_bytes() {
                    return Err(QueueError::Full { pending_bytes, max: queue.max_pending_bytes() }.into());
                }
                self.commit(draft)
            }
            (Destination::Spool { bytes_max, .. }, draft) => {
                let bytes_max = *bytes_max;
                let mut draft = match draft {
                    Some(draft) => draft,
                    None => self.spool.draft().map_err(|source| self.spool_error(source))?,
                };
                for event in std::mem::take(&mut self.events) {
                    draft.add_event(&event).map_err(|source| self.spool_error(source))?;
                }
                let bytes = self.spool.backlog_bytes() + draft.bytes();
                if bytes > bytes_max {
                    return Err(RequestError::spool_full(&self.spool, bytes, bytes_max));
                }
                self.commit(draft)
            }
        }
    }

    fn commit(&self, draft: Draft) -> Result<AcceptedRequest, RequestError> {
        let frames = draft.commit(Kind::Events).map_err(|source| self.spool_error(source))?;
        self.spool.ring();
        Ok(AcceptedRequest::Spooled { count: self.accepted, ids: SpooledIds(frames) })
    }

    /// Counts and logs what is refused. It is not kept: the caller is told at once.
    fn refuse(&self, event_type: Option<&EventType>, problem: &dyn fmt::Display) {
        if let Destination::Queue(intake) = &self.destination {
            intake.count_rejection(event_type, &self.origin, &problem.to_string());
        }
    }

    /// Keeps the beginning of a line.
    fn hold(&mut self, bytes: &[u8]) -> Result<(), RequestError> {
        let bytes_max = self.destination.checker().event_bytes_max() + LINE_OVERHEAD_BYTES;
        if (self.partial.len() + bytes.len()) as u64 > bytes_max {
            let problem = format!("an event has more than {bytes_max} bytes (max_event_bytes and some more)");
            self.refuse(None, &problem);
            return Err(RequestError::TooLarge { line: self.line_number(), problem });
        }
        self.partial.extend_from_slice(bytes);
        Ok(())
    }

    fn line_number(&self) -> Option<u64> {
        (!self.is_spread).then_some(self.line)
    }

    /// Takes a line that ended with a newline.
    fn take_line(&mut self, line: &[u8]) -> Result<(), RequestError> {
        let line = json::without_byte_order_mark(line);
        let is_first = self.accepted == 0 && self.layout == Layout::Either;
        let text = line.trim_ascii();
        // The beginning of an object that is no whole one, and not the end of one either.
        if is_first && text.starts_with(b"{") && !text.ends_with(b"}") && !is_whole(text) {
            self.is_spread = true;
            self.partial = [line, b"\n"].concat();
            return Ok(());
        }
        self.take_line_whole(line)?;
        self.line += 1;
        Ok(())
    }

    fn take_line_whole(&mut self, line: &[u8]) -> Result<(), RequestError> {
        let line = json::without_byte_order_mark(line);
        if line.trim_ascii().is_empty() {
            return Ok(());
        }
        self.take_event(line, Some(self.line))
    }

    fn take_event(&mut self, bytes: &[u8], line: Option<u64>) -> Result<(), RequestError> {
        let fallback = self.key.as_ref().map_or_else(EventId::new, |key| key.event_id(self.accepted));
        let event = self.check(bytes, line, fallback)?;
        self.accepted += 1;
        if let Some(draft) = &mut self.draft {
            draft.add_event(&event).map_err(|source| RequestError::spool(&self.spool, source))?;
            return match (&self.destination, draft.bytes()) {
                (Destination::Spool { bytes_max, .. }, bytes) if bytes > *bytes_max => {
                    Err(RequestError::spool_full(&self.spool, bytes, *bytes_max))
                }
                _ => Ok(()),
            };
        }
        self.event_bytes += event.payload().as_json().len();
        self.events.push(event);
        if self.event_bytes > BATCH_BYTES_MAX || self.events.len() > BATCH_EVENTS_MAX {
            self.move_to_draft().map_err(|source| self.spool_error(source))?;
        }
        Ok(())
    }

    fn check(&self, bytes: &[u8], line: Option<u64>, fallback: EventId) -> Result<Event, RequestError> {
        let _reservation = self.destination.checker().values().reserve(bytes.len());
        let candidate = match candidate(bytes, fallback, &self.origin) {
            Ok(candidate) => candidate,
            Err(Problem { field, problem }) => {
                self.refuse(None, &format!("{}{problem}", place(&line, &field)));
                return Err(RequestError::Invalid { line, field, problem });
            }
        };
        self.destination.checker().check(candidate).map_err(|refused| {
            let Refused { invalid, candidate } = *refused;
            let event_type = EventType::new(&candidate.event_type);
            self.refuse(Some(&event_type), &invalid);
            match invalid {
                Invalid::TooLarge { .. } => RequestError::TooLarge { line, problem: invalid.to_string() },
                Invalid::UnknownType { .. } => RequestError::Invalid {
                    line,
                    field: Some(invalid.field().to_owned()),
                    problem: invalid.to_string(),
                },
                Invalid::Payload { field, problem, .. } => RequestError::Invalid { line, field: Some(field), problem },
            }
        })
    }

    /// More than a batch: what was checked so far goes into a draft, and what follows too. One event of any size is
    /// a batch.
    fn move_to_draft(&mut self) -> io::Result<()> {
        if self.events.len() < 2 {
            return Ok(());
        }
        let mut draft = self.spool.draft()?;
        for event in self.events.drain(..) {
            draft.add_event(&event)?;
        }
        self.events = Vec::new();
        self.event_bytes = 0;
        self.draft = Some(draft);
        Ok(())
    }

    fn spool_error(&self, source: io::Error) -> RequestError {
        RequestError::spool(&self.spool, source)
    }
}

fn is_whole(text: &[u8]) -> bool {
    serde_json::from_slice::<serde::de::IgnoredAny>(text).is_ok()
}

/// What is wrong with one event, in words that show nothing of its values.
#[derive(PartialEq, Eq, Debug)]
struct Problem {
    field: Option<String>,
    problem: String,
}

impl Problem {
    fn of(field: &str, problem: impl fmt::Display) -> Problem {
        Problem { field: Some(field.to_owned()), problem: problem.to_string() }
    }
}

/// The fields of an event as raw JSON; null counts as absent, except for the payload.
#[derive(Default)]
struct Fields<'a> {
    event_type: Option<&'a str>,
    payload: Option<&'a str>,
    timestamp: Option<&'a str>,
    event_id: Option<&'a str>,
    project_id: Option<&'a str>,
    agent_id: Option<&'a str>,
    command_id: Option<&'a str>,
    turn_id: Option<&'a str>,
}

/// Reads one event; `fallback` is its identity where it names none.
fn candidate(bytes: &[u8], fallback: EventId, origin: &Origin) -> Result<Candidate, Problem> {
    let malformed = |problem: String| Problem { field: None, problem };
    let text = std::str::from_utf8(bytes).map_err(|error| malformed(format!("not valid UTF-8: {error}")))?.trim_ascii();
    if !text.starts_with('{') {
        return Err(malformed("expected a JSON object".to_owned()));
    }
    let mut fields = Fields::default();
    let mut unknown = None;
    json::members(text, |key, value| {
        let field = match key {
            "event_type" => &mut fields.event_type,
            "payload" => {
                fields.payload = Some(value);
                return;
            }
            "timestamp" => &mut fields.timestamp,
            "event_id" => &mut fields.event_id,
            "project_id" => &mut fields.project_id,
            "agent_id" => &mut fields.agent_id,
            "command_id" => &mut fields.command_id,
            "turn_id" => &mut fields.turn_id,
            other => {
                unknown.get_or_insert_with(|| other.to_owned());
                return;
            }
        };
        *field = (value != "null").then_some(value);
    })
    .map_err(|error| malformed(format!("not valid JSON: {error}")))?;
    if let Some(field) = unknown {
        return Err(Problem::of(&field, "unknown field; an event's own data goes into \"payload\""));
    }
    let event_type = required_text("event_type", fields.event_type)?;
    let timestamp = match text_of("timestamp", fields.timestamp)? {
        Some(text) => text
            .parse::<Timestamp>()
            .map_err(|_| Problem::of("timestamp", "expected a time with its zone, such as 2026-01-02T03:04:05.678Z"))?,
        None => Timestamp::now(),
    };
    let id = match text_of("event_id", fields.event_id)? {
        Some(text) => EventId(Uuid::try_parse(&text).map_err(|_| Problem::of("event_id", "expected a UUID"))?),
        None => fallback,
    };
    let refs = ForeignKeys {
        project_id: number("project_id", fields.project_id)?,
        agent_id: number("agent_id", fields.agent_id)?,
        command_id: number("command_id", fields.command_id)?,
        turn_id: number("turn_id", fields.turn_id)?,
    };
    let payload = fields.payload.ok_or_else(|| Problem::of("payload", "required field is missing"))?;
    let mut is_mended = false;
    let payload = json::value(payload, &mut is_mended).map_err(|unfit| Problem::of("payload", unfit))?;
    let Value::Object(mut payload) = payload else { return Err(Problem::of("payload", "expected an object")) };
    if is_mended {
        mark_as_repaired(&mut payload);
    }
    Ok(Candidate { id, event_type, timestamp, payload, refs, origin: origin.clone() })
}

fn mark_as_repaired(payload: &mut Map<String, Value>) {
    let metadata = payload.entry("metadata").or_insert_with(|| Value::Object(Map::new()));
    if let Value::Object(metadata) = metadata {
        metadata.insert("repaired".to_owned(), true.into());
    }
}

fn text_of(field: &str, raw: Option<&str>) -> Result<Option<String>, Problem> {
    let Some(raw) = raw else { return Ok(None) };
    let text = json::string(raw).ok_or_else(|| Problem::of(field, "expected a text"))?;
    Ok(Some(text.text.into_owned()))
}

fn required_text(field: &str, raw: Option<&str>) -> Result<String, Problem> {
    text_of(field, raw)?.ok_or_else(|| Problem::of(field, "required field is missing"))
}

fn number(field: &str, raw: Option<&str>) -> Result<Option<i32>, Problem> {
    let Some(raw) = raw else { return Ok(None) };
    let number = raw.parse().map_err(|_| Problem::of(field, "expected a whole number of 32 bits"))?;
    Ok(Some(number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intake::redact::Redactor;
    use crate::intake::schema::Schemas;
    use crate::queue::{Queue, QueueConfig};
    use crate::telemetry::Metrics;

    struct Scene {
        _folder: tempfile::TempDir,
        intake: Arc<Intake>,
        spool: Spool,
    }

    fn scene(max_pending_bytes: u64) -> Scene {
        let folder = tempfile::tempdir().unwrap();
        let config = QueueConfig { path: folder.path().join("queue"), max_pending_bytes };
        let queue = Queue::open(&config).unwrap().0;
        let schemas = Schemas::load(None, 1 << 20).unwrap();
        let intake = Arc::new(Intake::new(schemas, queue, Redactor::default(), Arc::new(Metrics::default())));
        let spool = Spool::new(&folder.path().join("spool"));
        Scene { _folder: folder, intake, spool }
    }

    impl Scene {
        fn send(&self, pieces: &[&[u8]], key: Option<&str>, layout: Layout) -> Result<AcceptedRequest, RequestError> {
            let key = key.map(|key| IdempotencyKey::new(key).unwrap());
            let mut request = EventRequest::new(
                Destination::Queue(self.intake.clone()),
                self.spool.clone(),
                Origin::Http,
                key,
                layout,
            );
            for piece in pieces {
                request.feed(piece)?;
            }
            request.finish()
        }

        fn refused(&self, body: &str) -> (Option<u64>, String, String) {
            match self.send(&[body.as_bytes()], None, Layout::Either).map(|accepted| accepted.count()) {
                Err(RequestError::Invalid { line, field, problem }) => (line, field.unwrap_or_default(), problem),
                other => panic!("{body}: {other:?}"),
            }
        }
    }

    const EVENT: &str = r#"{"event_type":"session_ended","payload":{"session_uuid":"s","reason":"closed"}}"#;

    #[test]
    fn one_event_may_be_spread_over_lines_and_several_stand_one_on_each() {
        let scene = scene(1 << 30);
        let spread = EVENT.replace(',', ",\n ").replace('{', "{\n");
        let lines = format!("\n{EVENT}\n\n{EVENT}\r\n{EVENT}");
        for (body, count) in [(EVENT, 1), (&*spread, 1), (&*lines, 3)] {
            for cut in 0..body.len() {
                let (head, tail) = body.as_bytes().split_at(cut);
                let accepted = scene.send(&[head, tail], None, Layout::Either).unwrap();
                assert_eq!(accepted.count(), count, "{body} cut at {cut}");
            }
        }
    }

    #[test]
    fn the_line_and_the_field_at_fault_are_named_and_nothing_is_accepted() {
        let scene = scene(1 << 30);
        let with = |extra: &str| format!("{EVENT}\n{}", EVENT.replacen('{', &format!("{{{extra},"), 1));
        for (body, line, field) in [
            (with(r#""surprise":1"#), 2, "surprise"),
            (with(r#""timestamp":"yesterday""#), 2, "timestamp"),
            (with(r#""event_id":"7""#), 2, "event_id"),
            (with(r#""agent_id":3000000000"#), 2, "agent_id"),
            (with(r#""agent_id":"3""#), 2, "agent_id"),
            (EVENT.replace("closed", "tired"), 1, "reason"),
            (EVENT.replace(r#""reason":"closed""#, r#""x":1"#), 1, "reason"),
            (EVENT.replace("session_ended", "session_endd"), 1, "event_type"),
            (r#"{"event_type":"session_ended"}"#.to_owned(), 1, "payload"),
            (r#"{"event_type":"session_ended","payload":[]}"#.to_owned(), 1, "payload"),
            (r#"{"payload":{}}"#.to_owned(), 1, "event_type"),
            (format!("{EVENT}\n{EVENT}\n{{\"event_type\":"), 3, ""),
            (format!("{EVENT}\nnonsense\n{EVENT}"), 2, ""),
            ("[1]".to_owned(), 1, ""),
            ("{\"a\":}\n".to_owned(), 1, ""),
        ] {
            let (found_line, found_field, problem) = scene.refused(&body);
            assert_eq!((found_line, &*found_field), (Some(line), field), "{body}: {problem}");
            assert!(!problem.contains("tired"), "{problem}");
        }
        assert_eq!(scene.refused("").0, None);
        assert_eq!(scene.intake.queue().stats().pending, 0);
        assert_eq!(scene.intake.queue().stats().dead_letters, 0, "its caller was told");
        assert_eq!(scene.intake.metrics().events_rejected.get(), 15);
    }

    #[test]
    fn a_large_request_is_spooled_whole_or_leaves_nothing() {
        let scene = scene(1 << 30);
        let line = format!("{EVENT}\n");
        let many = line.repeat(BATCH_EVENTS_MAX + 1);
        let AcceptedRequest::Spooled { count, ids } = scene.send(&[many.as_bytes()], Some("k"), Layout::Lines).unwrap()
        else {
            panic!("it was held in memory")
        };
        let ids: Vec<EventId> = ids.map(|id| id.unwrap()).collect();
        let key = IdempotencyKey::new("k").unwrap();
        assert_eq!(ids, (0..count).map(|index| key.event_id(index)).collect::<Vec<_>>());
        assert_eq!(scene.spool.waiting().unwrap().len(), 1);
        let files = || std::fs::read_dir(scene.spool.folder()).unwrap().count();
        assert_eq!(
            scene.send(&[many.as_bytes(), b"x"], None, Layout::Lines).map(|_| ()).unwrap_err().to_string(),
            format!("line {}: expected a JSON object", BATCH_EVENTS_MAX + 2)
        );
        assert_eq!(files(), 1);
    }

    #[test]
    fn a_large_request_without_room_for_it_is_refused_as_a_whole() {
        let scene = scene(1 << 20);
        let many = format!("{EVENT}\n").repeat(10_000);
        let refused = scene.send(&[many.as_bytes()], None, Layout::Lines).map(|_| ());
        assert!(matches!(refused, Err(RequestError::Queue(QueueError::Full { .. }))), "{refused:?}");
        assert_eq!(std::fs::read_dir(scene.spool.folder()).unwrap().count(), 0);
    }

    #[test]
    fn an_endless_line_is_refused_before_it_is_held() {
        let scene = scene(1 << 30);
        let piece = vec![b'x'; 100_000];
        let pieces: Vec<&[u8]> =
            vec![b"{", &piece, &piece, &piece, &piece, &piece, &piece, &piece, &piece, &piece, &piece, &piece, &piece];
        let refused = scene.send(&pieces, None, Layout::Either).map(|_| ());
        assert!(matches!(refused, Err(RequestError::TooLarge { line: Some(1), .. })), "{refused:?}");
    }

    #[test]
    fn a_key_gives_each_event_of_a_request_an_identity_of_its_own() {
        let id = "11111111-2222-4333-8444-555555555555";
        assert_eq!(IdempotencyKey::new(id).unwrap().event_id(0).to_string(), id);
        let key = IdempotencyKey::new("order 7").unwrap();
        assert_eq!(key.event_id(0), IdempotencyKey::new("order 7").unwrap().event_id(0));
        assert_ne!(key.event_id(0), key.event_id(1));
        assert!(IdempotencyKey::new("").is_none() && IdempotencyKey::new(&"x".repeat(256)).is_none());
    }
}
