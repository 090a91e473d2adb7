//! The HTTP interface, on the Unix socket and on loopback: health and the queue. The only user of axum.
//!
//! The socket is for the commands on this machine (mode 0600: its owner). On TCP a caller must name a loopback host,
//! which keeps a browser's page on another origin out (DNS rebinding), must not come from another origin, and must
//! bear the token where one is set.

mod metrics;
mod page;

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query, Request, State};
use axum::http::header::{AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HOST, ORIGIN};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Deserialize;

use crate::config::Secret;
use crate::event::Sequence;
use crate::health::{HealthSource, Moment, Status};
use crate::history::History;
use crate::listing::{self, Filter, Listing};
use crate::queue::Queue;

pub use page::{Overview, RecentEvent, RecentSession};

/// What the routes answer from.
#[derive(Clone)]
pub struct Api {
    pub health: Arc<HealthSource>,
    pub history: Arc<History>,
    pub queue: Queue,
}

/// Who may ask over TCP.
#[derive(Clone)]
pub struct Access {
    pub token: Option<Secret>,
    /// The address we listen on, which a caller may name as host.
    pub listen: IpAddr,
}

/// All routes. `access` is `None` for the socket, whose mode says who may ask.
pub fn router(api: Api, access: Option<Access>) -> Router {
    let routes = Router::new()
        .route("/health", get(health))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/queue", get(queue))
        .route("/dead-letters", get(dead_letters))
        .route("/metrics", get(metrics::metrics))
        .route("/", get(page::page))
        .route("/overview", get(page::overview))
        .route("/live", get(page::live))
        .with_state(api);
    match access {
        Some(access) => routes.layer(middleware::from_fn_with_state(Arc::new(access), admit_caller)),
        None => routes,
    }
}

async fn health(State(api): State<Api>) -> Response {
    let health = api.health.health(Moment::now());
    let code = match health.status {
        Status::Pass | Status::Warn => StatusCode::OK,
        Status::Fail => StatusCode::SERVICE_UNAVAILABLE,
    };
    json(code, &health)
}

async fn livez() -> Response {
    json(StatusCode::OK, &serde_json::json!({"ok": true}))
}

async fn readyz(State(api): State<Api>) -> Response {
    let ready = api.health.ready();
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    json(code, &serde_json::json!({"ok": ready}))
}

#[derive(Deserialize)]
struct ListingParameters {
    after: Option<u64>,
    limit: Option<u64>,
    #[serde(rename = "type")]
    event_type: Option<String>,
    session: Option<String>,
    #[serde(default)]
    payload: bool,
}

impl From<ListingParameters> for Filter {
    fn from(parameters: ListingParameters) -> Self {
        Filter {
            after: parameters.after.and_then(Sequence::new),
            limit: parameters.limit,
            event_type: parameters.event_type,
            session: parameters.session,
            payload: parameters.payload,
        }
    }
}

async fn queue(State(api): State<Api>, Query(parameters): Query<ListingParameters>) -> Response {
    ndjson(api.queue, Listing::Pending, parameters.into())
}

async fn dead_letters(State(api): State<Api>, Query(parameters): Query<ListingParameters>) -> Response {
    ndjson(api.queue, Listing::DeadLetters, parameters.into())
}

/// Streams a listing page by page, so that a million lines take the memory of a page.
fn ndjson(queue: Queue, listing: Listing, filter: Filter) -> Response {
    let (sender, receiver) = tokio::sync::mpsc::channel::<Bytes>(2);
    tokio::task::spawn_blocking(move || {
        // An error here is the reader's: it has gone.
        let _ = listing::write_lines(&queue, listing, &filter, |page| {
            sender.blocking_send(Bytes::from(page)).map_err(|_| std::io::ErrorKind::BrokenPipe.into())
        });
    });
    let stream = futures_util::stream::unfold(receiver, |mut receiver| async {
        receiver.recv().await.map(|page| (Ok::<_, Infallible>(page), receiver))
    });
    ([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(stream)).into_response()
}

fn json(code: StatusCode, value: &impl serde::Serialize) -> Response {
    let body = serde_json::to_vec(value).unwrap_or_default();
    (code, [(CONTENT_TYPE, "application/json"), (CACHE_CONTROL, "no-store")], body).into_response()
}

/// Lets through who may ask over TCP.
async fn admit_caller(State(access): State<Arc<Access>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let refusal = if !host_is_ours(headers, access.listen) {
        Some((StatusCode::FORBIDDEN, "the Host header names another host"))
    } else if !origin_is_ours(headers, access.listen) {
        Some((StatusCode::FORBIDDEN, "pages of other origins may not ask"))
    } else if request.uri().path() != "/" && !bears_token(headers, access.token.as_ref()) {
        Some((StatusCode::UNAUTHORIZED, "the token is missing or wrong: send Authorization: Bearer <http.token>"))
    } else {
        None
    };
    match refusal {
        Some((code, error)) => json(code, &serde_json::json!({"error": error})),
        None => next.run(request).await,
    }
}

fn host_is_ours(headers: &HeaderMap, listen: IpAddr) -> bool {
    headers.get(HOST).and_then(|host| host.to_str().ok()).is_some_and(|host| is_our_host(host, listen))
}

fn origin_is_ours(headers: &HeaderMap, listen: IpAddr) -> bool {
    match headers.get(ORIGIN) {
        None => true,
        Some(origin) => origin
            .to_str()
            .ok()
            .and_then(|origin| origin.strip_prefix("http://"))
            .is_some_and(|host| is_our_host(host, listen)),
    }
}

/// `localhost`, a loopback address or the address we listen on, with or without a port.
fn is_our_host(host: &str, listen: IpAddr) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    if name.eq_ignore_ascii_case("localhost") {
        return true;
    }
    name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback() || address == listen || listen.is_unspecified())
}

fn bears_token(headers: &HeaderMap, token: Option<&Secret>) -> bool {
    let Some(token) = token else { return true };
    headers
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .is_some_and(|presented| token.matches(presented))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_hosts_are_let_through() {
        let listen: IpAddr = "127.0.0.1".parse().unwrap();
        for host in ["localhost", "localhost:5056", "127.0.0.1:5056", "[::1]:5056", "LOCALHOST:1"] {
            assert!(is_our_host(host, listen), "{host}");
        }
        for host in ["evil.example", "evil.example:5056", "localhost.evil.example", "10.0.0.1", "", "127.0.0.1.evil"] {
            assert!(!is_our_host(host, listen), "{host}");
        }
    }
}
