//! `dead-letters`: what was set aside, to look at, send again or forget. Asks the running watcher; without one it opens
//! the queue itself.

use std::path::Path;

use crate::event::Sequence;
use crate::listing::{self, Filter, Listing, ListingError};
use crate::queue::{Queue, QueueConfig, QueueError, RetryOutcome};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, StatusCode};
use serde_json::Value;

use super::client::{self, ClientError};
use super::{Context, DeadLettersCommand, Exit, Failure, QueueDumpArguments, block_on, inspect_queue, queue_dump};

pub fn dead_letters(context: &Context, command: &DeadLettersCommand) -> Result<Exit, Failure> {
    match command {
        DeadLettersCommand::List(arguments) => {
            let arguments = QueueDumpArguments { dead_letters: true, ..arguments.clone() };
            queue_dump::queue_dump(context, &arguments)
        }
        DeadLettersCommand::Show { sequence } => show(context, *sequence),
        DeadLettersCommand::Retry { sequences, all } => retry(context, sequences, *all),
        DeadLettersCommand::Drop { sequences } => forget(context, sequences),
    }
}

fn show(context: &Context, sequence: u64) -> Result<Exit, Failure> {
    let filter = Filter {
        after: sequence.checked_sub(1).and_then(Sequence::new),
        limit: Some(1),
        payload: true,
        ..Filter::default()
    };
    let target = format!("/dead-letters?payload=true&limit=1&after={}", sequence.saturating_sub(1));
    let socket = &context.config().http.socket;
    let asked = block_on(async { client::body(client::get(socket, &target).await?).await })?;
    let line = match asked {
        Ok(body) => body.to_vec(),
        Err(ClientError::NotRunning) => {
            let queue = inspect_queue(context.config())?;
            let mut line = Vec::new();
            let listed = listing::write_lines(&queue, Listing::DeadLetters, &filter, |piece| {
                line.extend(piece);
                Ok(())
            });
            match listed {
                Ok(()) => line,
                Err(ListingError::Queue(error)) => return Err(error.into()),
                Err(ListingError::Reader(error)) => return Err(Failure::new(Exit::Io, error)),
            }
        }
        Err(ClientError::NoAnswer(problem)) => return Err(no_answer(socket, &problem)),
    };
    let letter: Option<Value> = serde_json::from_slice(&line).ok();
    let letter = letter.filter(|letter| letter.get("sequence").and_then(Value::as_u64) == Some(sequence));
    let letter = letter.ok_or_else(|| not_found(sequence))?;
    println!("{}", serde_json::to_string_pretty(&letter).unwrap_or_default());
    Ok(Exit::Fine)
}

/// What became of one letter.
enum Done {
    Queued(u64),
    Dropped,
    NotFound,
    NotAnEvent,
}

fn retry(context: &Context, sequences: &[u64], all: bool) -> Result<Exit, Failure> {
    let place = Place::of(context)?;
    let sequences = if all { place.events()? } else { sequences.to_vec() };
    let mut outcome = Exit::Fine;
    for &sequence in &sequences {
        match place.retry(sequence)? {
            Done::Queued(new) => println!("{sequence} waits at the tail again, as {new}"),
            // With --all somebody else was faster.
            Done::NotFound if all => {}
            Done::NotAnEvent => {
                eprintln!("headspace-watcher: dead letter {sequence} never was an event: it can only be dropped");
                outcome = Exit::Data;
            }
            Done::NotFound | Done::Dropped => {
                eprintln!("headspace-watcher: {}", not_found(sequence).message);
                outcome = Exit::Data;
            }
        }
    }
    if sequences.is_empty() {
        println!("no dead letters that can be sent again");
    }
    place.close()?;
    Ok(outcome)
}

fn forget(context: &Context, sequences: &[u64]) -> Result<Exit, Failure> {
    let place = Place::of(context)?;
    let mut outcome = Exit::Fine;
    for &sequence in sequences {
        match place.forget(sequence)? {
            Done::Dropped => println!("{sequence} dropped"),
            _ => {
                eprintln!("headspace-watcher: {}", not_found(sequence).message);
                outcome = Exit::Data;
            }
        }
    }
    place.close()?;
    Ok(outcome)
}

/// Where the letters are: with the running watcher, or in the queue that nobody else holds.
enum Place<'a> {
    Watcher(&'a Path),
    Queue(Queue),
}

impl Place<'_> {
    fn of(context: &Context) -> Result<Place<'_>, Failure> {
        let socket = &context.config().http.socket;
        match block_on(client::get(socket, "/livez"))? {
            Ok(_) => Ok(Place::Watcher(socket)),
            Err(ClientError::NotRunning) => {
                let config = queue_config(context);
                if !config.path.exists() {
                    return Err(QueueError::NotFound { path: config.path }.into());
                }
                Ok(Place::Queue(super::open_queue(&config)?))
            }
            Err(ClientError::NoAnswer(problem)) => Err(no_answer(socket, &problem)),
        }
    }

    /// Those that can be sent again, as of now: one that is refused anew gets another number.
    fn events(&self) -> Result<Vec<u64>, Failure> {
        let mut sequences = Vec::new();
        match self {
            Place::Watcher(socket) => {
                let (_, body) = ask(socket, Method::GET, "/dead-letters")?;
                for line in body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                    let letter: Value = serde_json::from_slice(line)
                        .map_err(|error| Failure::new(Exit::Internal, format!("the answer is cut short: {error}")))?;
                    if letter.get("event_id").is_some() {
                        sequences.extend(letter.get("sequence").and_then(Value::as_u64));
                    }
                }
            }
            Place::Queue(queue) => {
                let mut after = None;
                loop {
                    let page = queue.dead_letters(after, 128)?;
                    let Some(last) = page.last() else { break };
                    after = Some(last.sequence);
                    let events =
                        page.iter().filter(|letter| matches!(letter.content, crate::event::DeadContent::Event { .. }));
                    sequences.extend(events.map(|letter| letter.sequence.get()));
                }
            }
        }
        Ok(sequences)
    }

    fn retry(&self, sequence: u64) -> Result<Done, Failure> {
        let Some(number) = Sequence::new(sequence) else { return Ok(Done::NotFound) };
        match self {
            Place::Watcher(socket) => {
                let (code, body) = ask(socket, Method::POST, &format!("/dead-letters/{sequence}/retry"))?;
                match code {
                    StatusCode::OK => {
                        let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
                        Ok(Done::Queued(answer.get("sequence").and_then(Value::as_u64).unwrap_or_default()))
                    }
                    StatusCode::NOT_FOUND => Ok(Done::NotFound),
                    StatusCode::CONFLICT => Ok(Done::NotAnEvent),
                    code => Err(refused(code, &body)),
                }
            }
            Place::Queue(queue) => Ok(match queue.retry_dead_letter(number)? {
                RetryOutcome::Queued(new) => Done::Queued(new.get()),
                RetryOutcome::NotFound => Done::NotFound,
                RetryOutcome::NotAnEvent => Done::NotAnEvent,
            }),
        }
    }

    fn forget(&self, sequence: u64) -> Result<Done, Failure> {
        let Some(number) = Sequence::new(sequence) else { return Ok(Done::NotFound) };
        match self {
            Place::Watcher(socket) => match ask(socket, Method::DELETE, &format!("/dead-letters/{sequence}"))? {
                (StatusCode::OK, _) => Ok(Done::Dropped),
                (StatusCode::NOT_FOUND, _) => Ok(Done::NotFound),
                (code, body) => Err(refused(code, &body)),
            },
            Place::Queue(queue) => Ok(if queue.drop_dead_letter(number)? { Done::Dropped } else { Done::NotFound }),
        }
    }

    fn close(self) -> Result<(), Failure> {
        match self {
            Place::Watcher(_) => Ok(()),
            Place::Queue(queue) => Ok(queue.close()?),
        }
    }
}

fn queue_config(context: &Context) -> QueueConfig {
    let config = &context.config().queue;
    QueueConfig { path: config.path.clone(), max_pending_bytes: config.max_pending_bytes }
}

fn ask(socket: &Path, method: Method, target: &str) -> Result<(StatusCode, Bytes), Failure> {
    let answer = block_on(async {
        let request = client::request(method, target).body(Full::<Bytes>::default().boxed_unsync());
        let request = request.map_err(|error| ClientError::NoAnswer(error.to_string()))?;
        let response = client::send(socket, request).await?;
        Ok((response.status(), client::body(response).await?))
    })?;
    answer.map_err(|error| match error {
        ClientError::NotRunning => no_answer(socket, "it has just ended"),
        ClientError::NoAnswer(problem) => no_answer(socket, &problem),
    })
}

fn refused(code: StatusCode, body: &[u8]) -> Failure {
    Failure::new(Exit::Io, client::problem(code, body))
}

fn not_found(sequence: u64) -> Failure {
    let message = format!("there is no dead letter {sequence}; see \"headspace-watcher dead-letters list\"");
    Failure::new(Exit::Data, message)
}

fn no_answer(socket: &Path, problem: &str) -> Failure {
    let socket = socket.display();
    Failure::new(Exit::Unavailable, format!("the watcher on {socket} does not answer: {problem}; restart it"))
}
