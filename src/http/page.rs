//! The status page at `/`, and what it and `top` show: `GET /overview`, and `GET /live` as server-sent events.
//!
//! The page itself holds no data, so it needs no token. With the token that its reader gives it also shows sessions and dead
//! letters, without it numbers. No answer here holds the text of an event.

use std::convert::Infallible;

use axum::Extension;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::response::sse::{Event as ServerEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::{Api, Caller, VIEWERS_MAX, answer, error, health_for};
use crate::health::Health;
use crate::history::{Lag, SAMPLES_MAX, Sample};
use crate::telemetry::RecentEvent;

const PAGE: &str = include_str!("page.html");

/// `GET /`
pub(super) async fn page() -> Response {
    // Only this very page's own script and style run; a new number each time keeps others from naming it.
    let nonce = uuid::Uuid::now_v7().simple().to_string();
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8".to_owned()),
        (CONTENT_SECURITY_POLICY, policy),
        (CACHE_CONTROL, "no-store".to_owned()),
        (REFERRER_POLICY, "no-referrer".to_owned()),
        (X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
    ];
    (headers, PAGE.replace("{{nonce}}", &nonce)).into_response()
}

/// What the page and `top` show.
#[derive(Serialize, Deserialize, Debug)]
pub(crate) struct Overview {
    pub health: Health,
    /// One a second, oldest first.
    pub samples: Vec<Sample>,
    /// Over the last minute.
    pub lag: Lag,
    /// Since the start.
    pub totals: Totals,
    /// The last events that were captured, newest first.
    pub events: Vec<RecentEvent>,
}

#[derive(Serialize, Deserialize, Debug)]
pub(crate) struct Totals {
    pub captured: u64,
    pub delivered: u64,
    pub rejected: u64,
}

#[derive(Deserialize)]
pub(crate) struct OverviewParameters {
    samples: Option<usize>,
}

/// `GET /overview?samples=600`
pub(super) async fn overview(
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    Query(parameters): Query<OverviewParameters>,
) -> Response {
    answer(StatusCode::OK, &overview_for(caller, &api, parameters.samples.unwrap_or(SAMPLES_MAX)))
}

fn overview_for(caller: Caller, api: &Api, samples: usize) -> Overview {
    let metrics = &api.health.metrics;
    let mut events = metrics.recent_events.list();
    if caller == Caller::Stranger {
        events = events.into_iter().map(RecentEvent::without_names).collect();
    }
    Overview {
        health: health_for(caller, api),
        samples: api.history.last(samples),
        lag: api.history.lag(),
        totals: Totals {
            captured: metrics.events_captured.get(),
            delivered: metrics.events_delivered.get(),
            rejected: metrics.events_rejected.get(),
        },
        events,
    }
}

/// `GET /live`: an overview with all samples at first, then one with the newest sample every second.
pub(super) async fn live(State(api): State<Api>, Extension(caller): Extension<Caller>) -> Response {
    let Ok(viewer) = api.viewers.clone().try_acquire_owned() else {
        return error(StatusCode::SERVICE_UNAVAILABLE, format!("{VIEWERS_MAX} pages are open already; close one"));
    };
    let newest = api.history.subscribe();
    let stream = futures_util::stream::unfold((api, newest, viewer, true), move |state| async move {
        let (api, mut newest, viewer, is_first) = state;
        if !is_first && newest.changed().await.is_err() {
            return None;
        }
        newest.mark_unchanged();
        let overview = overview_for(caller, &api, if is_first { SAMPLES_MAX } else { 1 });
        let data = serde_json::to_string(&overview).unwrap_or_default();
        Some((Ok::<_, Infallible>(ServerEvent::default().data(data)), (api, newest, viewer, false)))
    });
    ([(CACHE_CONTROL, "no-store")], Sse::new(stream).keep_alive(KeepAlive::default())).into_response()
}
