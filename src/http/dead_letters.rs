//! `POST /dead-letters/{seq}/retry` and `DELETE /dead-letters/{seq}`. Durable before the answer.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::{Api, answer, error};
use crate::event::Sequence;
use crate::queue::{QueueError, RetryOutcome};

pub(super) async fn retry(State(api): State<Api>, Path(sequence): Path<u64>) -> Response {
    let Some(sequence) = Sequence::new(sequence) else { return not_found(0) };
    match api.work(|| api.intake.queue().retry_dead_letter(sequence)).await {
        Ok(RetryOutcome::Queued(new)) => answer(StatusCode::OK, &json!({"sequence": new.get()})),
        Ok(RetryOutcome::NotFound) => not_found(sequence.get()),
        Ok(RetryOutcome::NotAnEvent) => {
            error(StatusCode::CONFLICT, format!("dead letter {sequence} never was an event: it can only be dropped"))
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

fn not_found(sequence: u64) -> Response {
    error(StatusCode::NOT_FOUND, format!("there is no dead letter {sequence}"))
}

/// The queue did not take it.
pub(super) fn unavailable(problem: &QueueError) -> Response {
    ([(RETRY_AFTER, "5")], error(StatusCode::SERVICE_UNAVAILABLE, problem)).into_response()
}
