//! `emit`: events of another program or a script. Through the running watcher, else into the queue itself.
//!
//! Exit 0 only when all of them are durable. Standard output names them: the id of a single event, the number of a
//! stream's.

use std::io::Read;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use headspace_watcher::config::Config;
use headspace_watcher::event::Origin;
use headspace_watcher::intake::redact::Redactor;
use headspace_watcher::intake::request::{AcceptedRequest, EventRequest, Layout, RequestError};
use headspace_watcher::intake::schema::Schemas;
use headspace_watcher::intake::spool::Spool;
use headspace_watcher::intake::spool_reader::SpoolReader;
use headspace_watcher::intake::{Intake, without_byte_order_mark};
use headspace_watcher::queue::QueueConfig;
use headspace_watcher::telemetry::Metrics;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::{Method, Response, StatusCode};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use tokio::sync::mpsc;

use super::client::{self, ClientError};
use super::{Context, EmitArguments, Exit, Failure, block_on};

/// A larger payload can't be an event under any configuration.
const PAYLOAD_BYTES_MAX: u64 = 256 << 20;

/// Bytes that are read from stdin and sent at once.
const PIECE_BYTES: usize = 64 << 10;

/// How long the watcher may take nothing of a stream, or need for its answer after the end of it.
const WATCHER_PATIENCE: Duration = Duration::from_secs(60);

pub fn emit(context: &Context, arguments: &EmitArguments) -> Result<Exit, Failure> {
    let single = if arguments.ndjson { None } else { Some(event(arguments)?) };
    let socket = &context.config().http.socket;
    // Asked first: stdin can be read only once.
    match block_on(client::get(socket, "/livez"))? {
        Ok(_) => through_watcher(socket, single),
        Err(ClientError::NotRunning) => into_queue(context.config(), single),
        Err(ClientError::NoAnswer(problem)) => Err(no_answer(socket, &problem)),
    }
}

/// The event that the options describe, as one line of JSON.
fn event(arguments: &EmitArguments) -> Result<Vec<u8>, Failure> {
    let payload = match arguments.payload.as_deref() {
        None => "{}".to_owned(),
        Some("-") => {
            let mut text = String::new();
            let read = std::io::stdin().lock().take(PAYLOAD_BYTES_MAX + 1).read_to_string(&mut text);
            read.map_err(|error| match error.kind() {
                std::io::ErrorKind::InvalidData => Failure::new(Exit::Data, "payload: not valid UTF-8"),
                _ => Failure::new(Exit::Io, format!("could not read the payload from stdin: {error}")),
            })?;
            if text.len() as u64 > PAYLOAD_BYTES_MAX {
                let message = format!("payload: more than {PAYLOAD_BYTES_MAX} bytes");
                return Err(Failure::new(Exit::Data, message));
            }
            text
        }
        Some(text) => text.to_owned(),
    };
    let payload: &RawValue = serde_json::from_slice(without_byte_order_mark(payload.as_bytes()))
        .map_err(|error| Failure::new(Exit::Data, format!("payload: not valid JSON: {error}")))?;
    // Between tokens a line break is a blank, and within a string there is none.
    let payload = payload.get().replace(['\n', '\r'], " ");
    let mut others = Map::new();
    let mut put = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            others.insert(name.to_owned(), value);
        }
    };
    put("event_type", arguments.event_type.clone().map(Value::from));
    put("timestamp", arguments.timestamp.clone().map(Value::from));
    put("event_id", arguments.event_id.clone().map(Value::from));
    put("project_id", arguments.project_id.map(Value::from));
    put("agent_id", arguments.agent_id.map(Value::from));
    put("command_id", arguments.command_id.map(Value::from));
    put("turn_id", arguments.turn_id.map(Value::from));
    let others = Value::Object(others).to_string();
    let head = others.strip_suffix('}').unwrap_or_default();
    Ok(format!("{head},\"payload\":{payload}}}").into_bytes())
}

/// Feeds `single`, or else stdin, to `take`; ends when it says that it takes no more.
fn pump(single: Option<Vec<u8>>, mut take: impl FnMut(&[u8]) -> bool) -> std::io::Result<()> {
    if let Some(bytes) = single {
        take(&bytes);
        return Ok(());
    }
    let mut stdin = std::io::stdin().lock();
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let length = match stdin.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if !take(piece.get(..length).unwrap_or_default()) {
            return Ok(());
        }
    }
}

fn through_watcher(socket: &Path, single: Option<Vec<u8>>) -> Result<Exit, Failure> {
    let is_single = single.is_some();
    let answered = block_on(async {
        let (pieces, body) = mpsc::channel::<std::io::Result<Bytes>>(2);
        let progress = Arc::new(Mutex::new(Progress::Waiting));
        // Not waited for: it may wait for stdin when there is an answer already.
        {
            let progress = progress.clone();
            std::thread::spawn(move || read(single, &pieces, &progress));
        }
        let body = StreamBody::new(futures_util::stream::unfold(body, |mut body| async {
            body.recv().await.map(|piece| (piece.map(Frame::data), body))
        }));
        let content_type = if is_single { "application/json" } else { "application/x-ndjson" };
        let request = client::request(Method::POST, "/events")
            .header("content-type", content_type)
            .header("x-headspace-origin", "cli")
            .body(body.boxed_unsync())
            .map_err(|error| ClientError::NoAnswer(error.to_string()))?;
        let sending = client::send_patiently(socket, request);
        tokio::pin!(sending);
        let response = loop {
            tokio::select! {
                response = &mut sending => break response,
                () = tokio::time::sleep(Duration::from_millis(500)) => {}
            }
            if lock(&progress).is_stuck() {
                let problem = format!("it has taken nothing for {} s", WATCHER_PATIENCE.as_secs());
                return Err(ClientError::NoAnswer(problem));
            }
        };
        if let Progress::Failed(error) = &*lock(&progress) {
            return Ok(Err(Failure::new(Exit::Io, unread(error))));
        }
        let response = response?;
        Ok(Ok((response.status(), accepted(response).await?)))
    })?;
    match answered {
        Ok(Ok((StatusCode::ACCEPTED, body))) => {
            report(is_single, &body);
            Ok(Exit::Fine)
        }
        Ok(Ok((code, body))) => Err(refused(code, &body)),
        Ok(Err(failure)) => Err(failure),
        Err(ClientError::NotRunning) => Err(no_answer(socket, "it has just ended")),
        Err(ClientError::NoAnswer(problem)) => Err(no_answer(socket, &problem)),
    }
}

/// What the thread that reads stdin is doing.
enum Progress {
    /// Waits for stdin.
    Waiting,
    /// Waits since then for the watcher.
    Sending(Instant),
    /// Stdin can't be read to its end.
    Failed(std::io::Error),
}

impl Progress {
    fn is_stuck(&self) -> bool {
        matches!(self, Progress::Sending(since) if since.elapsed() > WATCHER_PATIENCE)
    }
}

fn lock(progress: &Mutex<Progress>) -> std::sync::MutexGuard<'_, Progress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read(single: Option<Vec<u8>>, pieces: &mpsc::Sender<std::io::Result<Bytes>>, progress: &Mutex<Progress>) {
    let read = pump(single, |bytes| {
        *lock(progress) = Progress::Sending(Instant::now());
        // Nobody receives any more once the watcher has refused the request.
        let sent = pieces.blocking_send(Ok(Bytes::copy_from_slice(bytes))).is_ok();
        *lock(progress) = Progress::Waiting;
        sent
    });
    match read {
        Ok(()) => *lock(progress) = Progress::Sending(Instant::now()),
        Err(error) => {
            let told = std::io::Error::new(error.kind(), error.to_string());
            *lock(progress) = Progress::Failed(error);
            // Else the watcher would take what has come so far for all of it.
            let _ = pieces.blocking_send(Err(told));
        }
    }
}

fn unread(error: &std::io::Error) -> String {
    format!("could not read events from stdin: {error}; nothing was accepted")
}

/// The beginning of the answer, which holds all but the identities of a long stream.
async fn accepted(mut response: Response<Incoming>) -> Result<Vec<u8>, ClientError> {
    const HEAD_BYTES_MAX: usize = 64 << 10;
    let mut body = Vec::new();
    while let Some(frame) = response.body_mut().frame().await {
        let frame = frame.map_err(|error| ClientError::NoAnswer(error.to_string()))?;
        if let Some(bytes) = frame.data_ref() {
            body.extend_from_slice(bytes);
        }
        if body.len() > HEAD_BYTES_MAX {
            break;
        }
    }
    Ok(body)
}

fn report(is_single: bool, body: &[u8]) {
    let body = String::from_utf8_lossy(body);
    let count: String = body.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    let id = serde_json::from_str::<Value>(&body)
        .ok()
        .and_then(|answer| answer.pointer("/event_ids/0").and_then(Value::as_str).map(str::to_owned));
    match id {
        Some(id) if is_single => println!("{id}"),
        _ => println!("{count} events accepted"),
    }
}

fn refused(code: StatusCode, body: &[u8]) -> Failure {
    let answer: Value = serde_json::from_slice(body).unwrap_or_default();
    let line = answer.get("line").and_then(Value::as_u64).map(|line| format!("line {line}: ")).unwrap_or_default();
    let field = answer.get("field").and_then(Value::as_str).map(|field| format!("{field}: ")).unwrap_or_default();
    let exit = match code {
        StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE => Exit::Data,
        // The queue is full, or can't be written.
        _ => Exit::Io,
    };
    Failure::new(exit, format!("could not emit: {line}{field}{}; nothing was accepted", client::problem(code, body)))
}

fn into_queue(config: &Config, single: Option<Vec<u8>>) -> Result<Exit, Failure> {
    let is_single = single.is_some();
    let schemas = Schemas::load(config.schemas.path.as_deref(), config.event_system.max_event_bytes)
        .map_err(|error| Failure::new(Exit::Configuration, error))?;
    let redactor = Redactor::new(&config.redact).map_err(|error| Failure::new(Exit::Configuration, error))?;
    let queue = super::open_queue(&QueueConfig {
        path: config.queue.path.clone(),
        max_pending_bytes: config.queue.max_pending_bytes,
    })?;
    let intake = Arc::new(Intake::new(schemas, queue.clone(), redactor, Arc::new(Metrics::default())));
    let spool = Spool::new(&config.queue.spool_path);
    let mut request = Some(EventRequest::new(intake.clone(), spool.clone(), Origin::Cli, None, Layout::Lines));
    let mut refusal = None;
    let read = pump(single, |bytes| match request.as_mut().map(|request| request.feed(bytes)) {
        Some(Ok(())) => true,
        Some(Err(error)) => {
            refusal = Some(error);
            false
        }
        None => false,
    });
    read.map_err(|error| Failure::new(Exit::Io, unread(&error)))?;
    let accepted = match (refusal, request.take()) {
        (None, Some(request)) => request.finish(),
        (Some(refusal), _) => Err(refusal),
        (None, None) => return Err(Failure::new(Exit::Internal, "the request is gone")),
    };
    let accepted = accepted.map_err(refused_here)?;
    match &accepted {
        AcceptedRequest::Batch(ids) if is_single => ids.iter().for_each(|id| println!("{id}")),
        accepted => println!("{} events accepted", accepted.count()),
    }
    if let AcceptedRequest::Spooled { .. } = accepted {
        // It is durable already; here it also gets its place in the order of the queue.
        let (reader, _) = SpoolReader::new(spool, intake, Duration::ZERO);
        reader.run_once().map_err(|error| Failure::new(Exit::Io, format!("could not read the spool: {error}")))??;
    }
    queue.close()?;
    Ok(Exit::Fine)
}

fn refused_here(refusal: RequestError) -> Failure {
    let exit = match &refusal {
        RequestError::Invalid { .. } | RequestError::TooLarge { .. } => Exit::Data,
        RequestError::Queue(_) | RequestError::Spool { .. } => Exit::Io,
    };
    Failure::new(exit, format!("could not emit: {refusal}; nothing was accepted"))
}

fn no_answer(socket: &Path, problem: &str) -> Failure {
    let socket = socket.display();
    Failure::new(Exit::Unavailable, format!("the watcher on {socket} does not answer: {problem}; restart it"))
}
