//! `dead-letters`: to look at, send again or forget. Asks the running watcher; without one it opens the queue itself.
//!
//! Sending again and forgetting change the queue, which only its writer may do. Without a watcher the command is the writer for
//! as long as that takes, so that its answer and its exit code say what has become of each letter.

use std::path::Path;

use crate::client::{self, ClientError};
use crate::event::Sequence;
use crate::listing::{Filter, Listing};
use crate::queue::{Queue, QueueError, RetryOutcome};
use crate::source::{self, Part, SourceError};
use clap::{Args, Subcommand};
use hyper::{Method, StatusCode};
use serde_json::Value;

use super::queue_dump::{self, QueueDumpArguments};
use super::{Context, Exit, Failure, block_on};

/// Look at dead letters, send them again, or forget them
#[derive(Args)]
#[command(
    after_help = "Examples:\n  headspace-watcher dead-letters list\n  headspace-watcher dead-letters retry --all\n  headspace-watcher dead-letters drop --reason invalid\n\nExit code 65: there is no such dead letter, or it is no valid event and can't be sent again."
)]
pub(super) struct DeadLettersArguments {
    #[command(subcommand)]
    command: DeadLettersCommand,
}

#[derive(Subcommand)]
enum DeadLettersCommand {
    /// One line each, oldest first; the options are those of queue-dump
    #[command(after_help = "Example:\n  headspace-watcher dead-letters list --format jsonl | jq .reason")]
    List(QueueDumpArguments),
    /// All of one, with its payload
    Show {
        /// Its sequence number, as "dead-letters list" shows it
        #[arg(value_name = "SEQ")]
        sequence: u64,
    },
    /// Put events back at the tail of the queue
    Retry(Letters),
    /// Forget for good
    Drop(Letters),
}

/// Which letters are sent again or dropped.
#[derive(Args)]
#[group(required = true, multiple = false)]
struct Letters {
    /// Their sequence numbers
    #[arg(value_name = "SEQ")]
    sequences: Vec<u64>,
    /// All of them; "retry" leaves out what is no valid event
    #[arg(long)]
    all: bool,
    /// All that have this reason
    #[arg(long, value_parser = ["unreadable", "invalid", "too_large", "refused", "damaged"])]
    reason: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Retry,
    Drop,
}

pub(super) fn dead_letters(context: &Context, arguments: &DeadLettersArguments) -> Result<Exit, Failure> {
    match &arguments.command {
        DeadLettersCommand::List(arguments) => queue_dump::queue_dump(context, &arguments.of_dead_letters()),
        DeadLettersCommand::Show { sequence } => show(context, *sequence),
        DeadLettersCommand::Retry(letters) => change(context, Change::Retry, letters),
        DeadLettersCommand::Drop(letters) => change(context, Change::Drop, letters),
    }
}

/// The letters that the filter lets through.
fn listed(context: &Context, filter: &Filter) -> Result<Vec<Value>, Failure> {
    let mut letters = Vec::new();
    let reading = source::read(context.config(), Part::Records(Listing::DeadLetters, filter), |line| {
        letters.push(serde_json::from_slice(line)?);
        Ok(())
    });
    block_on(reading)??;
    Ok(letters)
}

fn sequence_of(letter: &Value) -> Option<u64> {
    letter.get("sequence").and_then(Value::as_u64)
}

fn show(context: &Context, sequence: u64) -> Result<Exit, Failure> {
    let letters = listed(
        context,
        &Filter { after: sequence.checked_sub(1), limit: Some(1), payload: true, ..Filter::default() },
    )?;
    let letter = letters.first().filter(|letter| sequence_of(letter) == Some(sequence));
    let letter = letter.ok_or_else(|| Failure::new(Exit::Data, not_found(sequence)))?;
    println!("{}", serde_json::to_string_pretty(letter).unwrap_or_default());
    Ok(Exit::Fine)
}

fn change(context: &Context, change: Change, letters: &Letters) -> Result<Exit, Failure> {
    let is_named = !letters.all && letters.reason.is_none();
    let sequences = if is_named { letters.sequences.clone() } else { selected(context, change, letters)? };
    if sequences.is_empty() {
        return Ok(Exit::Fine);
    }
    let writer = Writer::of(context)?;
    let mut exit = Exit::Fine;
    for sequence in sequences {
        match (writer.change(change, sequence)?, change) {
            (Outcome::Done(_), Change::Drop) => println!("{sequence} dropped"),
            (Outcome::Done(new), Change::Retry) => println!("{sequence} waits at the tail again, as {new}"),
            (Outcome::NotFound, _) if is_named => exit = refused(&not_found(sequence)),
            // Somebody else was faster.
            (Outcome::NotFound, _) => {}
            (Outcome::NotAnEvent, _) => {
                exit = refused(&format!(
                    "dead letter {sequence} is no valid event and can't be sent again; \"dead-letters drop {sequence}\" forgets it"
                ));
            }
        }
    }
    writer.close()?;
    Ok(exit)
}

/// Those that are there now and can be changed so: one that comes meanwhile, or is refused again, has another number.
fn selected(context: &Context, change: Change, letters: &Letters) -> Result<Vec<u64>, Failure> {
    let reason = letters.reason.as_deref();
    let mut found = listed(context, &Filter::default())?;
    found.retain(|letter| reason.is_none() || letter.get("reason").and_then(Value::as_str) == reason);
    let can_change = |letter: &&Value| change == Change::Drop || letter.get("event_id").is_some();
    let sequences: Vec<u64> = found.iter().filter(can_change).filter_map(sequence_of).collect();
    match (sequences.len(), found.len()) {
        (0, 0) => println!("no dead letters{}", reason.map(|name| format!(" with reason {name}")).unwrap_or_default()),
        (0, count) => println!("nothing to send again: what is no valid event ({count}) can only be dropped"),
        _ => {}
    }
    Ok(sequences)
}

/// What became of one letter.
enum Outcome {
    /// Its number now.
    Done(u64),
    NotFound,
    NotAnEvent,
}

/// The process that changes the queue: the running watcher, or this one, which holds it.
enum Writer<'a> {
    Watcher(&'a Path),
    Queue(Queue),
}

impl Writer<'_> {
    fn of(context: &Context) -> Result<Writer<'_>, Failure> {
        let socket = &context.config().http.socket;
        match block_on(client::get(socket, "/livez"))? {
            Ok(_) => Ok(Writer::Watcher(socket)),
            Err(ClientError::NoAnswer(problem)) => Err(no_answer(socket, problem)),
            Err(ClientError::NotRunning) => {
                let config = source::queue_config(context.config());
                if !config.path.exists() {
                    return Err(QueueError::NotFound { path: config.path }.into());
                }
                let (queue, repairs) = Queue::open(&config)?;
                for repair in &repairs {
                    eprintln!("headspace-watcher: queue {}: {repair}", config.path.display());
                }
                Ok(Writer::Queue(queue))
            }
        }
    }

    fn change(&self, change: Change, sequence: u64) -> Result<Outcome, Failure> {
        match (self, Sequence::new(sequence), change) {
            (_, None, _) => Ok(Outcome::NotFound),
            (Writer::Watcher(socket), _, Change::Retry) => {
                ask(socket, Method::POST, &format!("/dead-letters/{sequence}/retry"))
            }
            (Writer::Watcher(socket), _, Change::Drop) => {
                ask(socket, Method::DELETE, &format!("/dead-letters/{sequence}"))
            }
            (Writer::Queue(queue), Some(sequence), Change::Retry) => Ok(match queue.retry_dead_letter(sequence)? {
                RetryOutcome::Queued(new) => Outcome::Done(new.get()),
                RetryOutcome::NotFound => Outcome::NotFound,
                RetryOutcome::NotAnEvent => Outcome::NotAnEvent,
            }),
            (Writer::Queue(queue), Some(number), Change::Drop) => {
                Ok(if queue.drop_dead_letter(number)? { Outcome::Done(sequence) } else { Outcome::NotFound })
            }
        }
    }

    fn close(self) -> Result<(), Failure> {
        match self {
            Writer::Watcher(_) => Ok(()),
            Writer::Queue(queue) => Ok(queue.close()?),
        }
    }
}

fn ask(socket: &Path, method: Method, target: &str) -> Result<Outcome, Failure> {
    match block_on(client::ask(socket, method, target))? {
        Ok((StatusCode::OK, body)) => {
            let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
            Ok(Outcome::Done(sequence_of(&answer).unwrap_or_default()))
        }
        Ok((StatusCode::NOT_FOUND, _)) => Ok(Outcome::NotFound),
        Ok((StatusCode::CONFLICT, _)) => Ok(Outcome::NotAnEvent),
        Ok((code, body)) => Err(Failure::new(Exit::Io, client::problem(code, &body))),
        Err(ClientError::NotRunning) => Err(no_answer(socket, "it has just ended".to_owned())),
        Err(ClientError::NoAnswer(problem)) => Err(no_answer(socket, problem)),
    }
}

/// Says why one letter could not be dealt with; the others are.
fn refused(problem: &str) -> Exit {
    eprintln!("headspace-watcher: {problem}");
    Exit::Data
}

fn not_found(sequence: u64) -> String {
    format!("there is no dead letter {sequence}; see \"headspace-watcher dead-letters list\"")
}

fn no_answer(socket: &Path, problem: String) -> Failure {
    SourceError::NoAnswer { socket: socket.to_owned(), problem }.into()
}
