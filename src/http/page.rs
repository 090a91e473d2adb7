//! The status page at `/`, and what it and `top` are made of: `GET /overview`, and `GET /live` as server-sent events.
//!
//! The page itself holds no data, so it needs no token. With the token that its reader gives it shows everything, without
//! it numbers: no texts, sessions, projects or dead letters.

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Extension;
use axum::extract::{Query, State};
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderValue, StatusCode};
use axum::response::sse::{Event as ServerEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Api, Caller, answer, health_for};
use crate::event::{Origin, Payload};
use crate::health::{Health, Moment};
use crate::history::{Lag, SAMPLES_MAX, Sample};
use crate::telemetry::{Noted, SessionActivity};

const PAGE: &str = include_str!("page.html");

/// Pages and terminals that look on at once.
const VIEWERS_MAX: usize = 32;

/// Characters of a text that are shown where text is asked for.
const TEXT_CHARACTERS_MAX: usize = 160;

/// `GET /`
pub async fn page() -> Response {
    // Only this very page's own script and style run; a new number each time keeps others from naming it.
    let nonce = uuid::Uuid::now_v7().simple().to_string();
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let Ok(policy) = HeaderValue::from_str(&policy) else { return StatusCode::INTERNAL_SERVER_ERROR.into_response() };
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (CONTENT_SECURITY_POLICY, policy),
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    ];
    (headers, PAGE.replace("{{nonce}}", &nonce)).into_response()
}

/// What people who look on want to see.
#[derive(Serialize, Deserialize, Debug)]
pub struct Overview {
    pub health: Health,
    /// One a second, oldest first.
    pub samples: Vec<Sample>,
    /// Over the last minute.
    pub lag: Lag,
    /// Since the start.
    pub totals: Totals,
    /// The last events that were taken in, newest first.
    pub events: Vec<RecentEvent>,
    /// Sessions that were active since the start, the most recent first; none for callers without the token.
    pub sessions: Vec<RecentSession>,
}

#[derive(Serialize, Deserialize, Debug)]
pub struct Totals {
    pub captured: u64,
    pub delivered: u64,
    pub rejected: u64,
}

#[derive(Serialize, Deserialize, Debug)]
pub struct RecentEvent {
    /// This, `session` and `detail` come from the payload: null for callers without the token.
    pub event_id: Option<String>,
    pub event_type: String,
    pub timestamp: String,
    pub captured_at: String,
    pub origin: String,
    pub session: Option<String>,
    /// Who, what or how, in a word: a turn's actor, a hook's type, an end's reason.
    pub detail: Option<String>,
    /// The beginning of its text, only where it was asked for with the token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

#[derive(Serialize, Deserialize, Debug)]
pub struct RecentSession {
    pub session: String,
    /// Name of the transcript's folder.
    pub project: String,
    pub events: u64,
    pub last_seen: String,
}

#[derive(Deserialize)]
pub struct OverviewParameters {
    samples: Option<usize>,
    #[serde(default)]
    text: bool,
}

/// `GET /overview?samples=600&text=false`
pub async fn overview(
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    Query(parameters): Query<OverviewParameters>,
) -> Response {
    let samples = parameters.samples.unwrap_or(SAMPLES_MAX);
    answer(StatusCode::OK, &look(&api, caller, samples, parameters.text))
}

fn look(api: &Api, caller: Caller, samples: usize, text: bool) -> Overview {
    let metrics = &api.health.metrics;
    let activity = &metrics.activity;
    Overview {
        health: health_for(caller, api.health.health(Moment::now())),
        samples: api.history.last(samples),
        lag: api.history.lag(),
        totals: Totals {
            captured: metrics.events_captured.get(),
            delivered: metrics.events_delivered.get(),
            rejected: metrics.events_rejected.get(),
        },
        events: activity.events().iter().map(|noted| recent_event(noted, caller, text)).collect(),
        sessions: match caller {
            Caller::Owner => activity.sessions().iter().map(recent_session).collect(),
            Caller::Stranger => Vec::new(),
        },
    }
}

/// `GET /live`: an overview with all samples at first, then one with the newest sample every second.
pub async fn live(
    State(api): State<Api>,
    Extension(caller): Extension<Caller>,
    Query(parameters): Query<OverviewParameters>,
) -> Response {
    let Some(viewer) = Viewer::admit() else {
        let error = serde_json::json!({"error": format!("{VIEWERS_MAX} pages are open already; close one")});
        return answer(StatusCode::SERVICE_UNAVAILABLE, &error);
    };
    let newest = api.history.subscribe();
    let text = parameters.text;
    let stream =
        futures_util::stream::unfold((api, newest, viewer, true), move |(api, mut newest, viewer, first)| async move {
            if !first && newest.changed().await.is_err() {
                return None;
            }
            newest.mark_unchanged();
            let overview = look(&api, caller, if first { SAMPLES_MAX } else { 1 }, text);
            let data = serde_json::to_string(&overview).unwrap_or_default();
            Some((Ok::<_, Infallible>(ServerEvent::default().data(data)), (api, newest, viewer, false)))
        });
    ([(CACHE_CONTROL, "no-store")], Sse::new(stream).keep_alive(KeepAlive::default())).into_response()
}

static VIEWERS: AtomicUsize = AtomicUsize::new(0);

/// A place among those who look on, given back when dropped.
struct Viewer(());

impl Viewer {
    fn admit() -> Option<Viewer> {
        let admitted =
            VIEWERS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < VIEWERS_MAX).then_some(n + 1));
        admitted.ok().map(|_| Viewer(()))
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        VIEWERS.fetch_sub(1, Ordering::Relaxed);
    }
}

fn recent_event(noted: &Noted, caller: Caller, text: bool) -> RecentEvent {
    let event = RecentEvent {
        event_id: None,
        event_type: noted.event_type.to_string(),
        timestamp: noted.timestamp.to_string(),
        captured_at: noted.captured_at.to_string(),
        origin: noted.origin.kind().to_owned(),
        session: None,
        detail: None,
        text: None,
    };
    if caller == Caller::Stranger {
        return event;
    }
    let payload = noted.payload.as_ref().map(Payload::as_json).unwrap_or_default();
    let payload: Value = serde_json::from_str(payload).unwrap_or_default();
    let field =
        |names: &[&str]| names.iter().find_map(|name| payload.get(name).and_then(Value::as_str)).map(str::to_owned);
    RecentEvent {
        event_id: Some(noted.id.to_string()),
        session: field(&["session_uuid", "claude_session_id"]).or_else(|| session_of(&noted.origin)),
        detail: field(&["actor", "hook_type", "to_state", "reason"]),
        text: text.then(|| field(&["text", "message"])).flatten().map(|text| beginning(&text)),
        ..event
    }
}

/// Its first characters on one line.
fn beginning(text: &str) -> String {
    let visible = text.chars().map(|character| if character.is_control() { ' ' } else { character });
    let mut beginning: String = visible.take(TEXT_CHARACTERS_MAX).collect();
    if text.chars().nth(TEXT_CHARACTERS_MAX).is_some() {
        beginning.push('…');
    }
    beginning
}

/// A transcript is named after its session.
fn session_of(origin: &Origin) -> Option<String> {
    let Origin::Transcript { path, .. } = origin else { return None };
    std::path::Path::new(&**path).file_stem().map(|stem| stem.to_string_lossy().into_owned())
}

fn recent_session(session: &SessionActivity) -> RecentSession {
    let path = std::path::Path::new(&*session.transcript);
    let name = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
    RecentSession {
        session: name(path.file_stem()),
        project: name(path.parent().and_then(std::path::Path::file_name)),
        events: session.events,
        last_seen: session.last_seen.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_shown_by_its_beginning_on_one_line() {
        assert_eq!(beginning("two\nlines\u{1b}[31m"), "two lines [31m");
        let long = "ä".repeat(500);
        assert_eq!(beginning(&long).chars().count(), TEXT_CHARACTERS_MAX + 1);
    }

    #[test]
    fn only_so_many_look_on_at_once() {
        let viewers: Vec<Viewer> = std::iter::from_fn(Viewer::admit).take(VIEWERS_MAX + 1).collect();
        assert_eq!(viewers.len(), VIEWERS_MAX);
        drop(viewers);
        assert!(Viewer::admit().is_some());
    }
}
