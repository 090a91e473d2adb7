//! `POST /dead-letters/{seq}/retry`, `DELETE /dead-letters/{seq}` and `DELETE /dead-letters`. Durable before the answer.

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::json;

use super::{Api, answer, error};
use crate::event::Sequence;
use crate::queue::{Queue, QueueError, RetryOutcome};

/// Letters that are read from the queue at once.
const PAGE_LETTERS: usize = 128;

/// Which letters `DELETE /dead-letters` drops: those with this reason, else all.
#[derive(Deserialize)]
pub(super) struct Which {
    reason: Option<String>,
}

pub(super) async fn retry(State(api): State<Api>, Path(sequence): Path<u64>) -> Response {
    let Some(sequence) = Sequence::new(sequence) else { return not_found(0) };
    match api.work(|| api.intake.queue().retry_dead_letter(sequence)).await {
        Ok(RetryOutcome::Queued(new)) => answer(StatusCode::OK, &json!({"sequence": new.get()})),
        Ok(RetryOutcome::NotFound) => not_found(sequence.get()),
        Ok(RetryOutcome::NotAnEvent) => {
            error(StatusCode::CONFLICT, format!("dead letter {sequence} is no valid event: it can only be dropped"))
        }
        Err(problem) => unavailable(&problem),
    }
}

pub(super) async fn forget(State(api): State<Api>, Path(sequence): Path<u64>) -> Response {
    let Some(sequence) = Sequence::new(sequence) else { return not_found(0) };
    match api.work(|| api.intake.queue().drop_dead_letter(sequence)).await {
        Ok(true) => answer(StatusCode::OK, &json!({"dropped": sequence.get()})),
        Ok(false) => not_found(sequence.get()),
        Err(problem) => unavailable(&problem),
    }
}

pub(super) async fn forget_all(State(api): State<Api>, Query(which): Query<Which>) -> Response {
    match api.work(|| drop_all(api.intake.queue(), which.reason.as_deref())).await {
        Ok(dropped) => answer(StatusCode::OK, &json!({"dropped": dropped})),
        Err(problem) => unavailable(&problem),
    }
}

/// Drops the letters that are there now, and returns their number: those that come meanwhile stay.
fn drop_all(queue: &Queue, reason: Option<&str>) -> Result<u64, QueueError> {
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let page = queue.dead_letters(after, PAGE_LETTERS)?;
        let Some(last) = page.last() else { break };
        after = Some(last.sequence);
        let is_wanted = |kind: &str| reason.is_none_or(|reason| reason == kind);
        let wanted = page.iter().filter(|letter| is_wanted(letter.failure.kind.as_str()));
        found.extend(wanted.map(|letter| letter.sequence));
    }
    let mut dropped = 0;
    for sequence in found {
        dropped += u64::from(queue.drop_dead_letter(sequence)?);
    }
    Ok(dropped)
}

fn not_found(sequence: u64) -> Response {
    error(StatusCode::NOT_FOUND, format!("there is no dead letter {sequence}"))
}

/// The queue did not take it.
pub(super) fn unavailable(problem: &QueueError) -> Response {
    ([(RETRY_AFTER, "5")], error(StatusCode::SERVICE_UNAVAILABLE, problem)).into_response()
}
