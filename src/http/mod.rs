//! The HTTP interface, on the Unix socket and on loopback: health, the queue, and other programs' events.
//!
//! The socket is for the commands on this machine (mode 0600: its owner). On TCP [`access`] says who may do what, by the
//! [`token`]. [`server`] bounds what connections cost, `events` and `hooks` what their bodies do. The only user of axum.

mod access;
mod body;
mod dead_letters;
mod events;
mod hooks;
mod listings;
mod metrics;
mod page;
mod server;
pub(crate) mod token;

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Extension, Router};
use serde_json::json;
use tokio::sync::Semaphore;
use tower_http::timeout::TimeoutLayer;

pub(crate) use self::access::{Access, Caller};
pub(crate) use self::page::Overview;
use self::server::REQUEST_TIMEOUT;
pub(crate) use self::server::{listen, serve_socket, serve_tcp};

use crate::config::HookCapture;
use crate::health::{Health, HealthSource, Moment, Status};
use crate::history::History;
use crate::intake::Intake;
use crate::intake::spool::Spool;

/// Listings at once. Each takes a thread and a page of the queue.
const LISTINGS_MAX: usize = 16;

/// Pages that are open at once.
const VIEWERS_MAX: usize = 32;

/// Requests that check, write or sync at once; each of them holds a thread.
const WORKING_MAX: usize = 16;

/// What the routes answer from. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Api {
    health: Arc<HealthSource>,
    history: Arc<History>,
    intake: Arc<Intake>,
    spool: Spool,
    capture: HookCapture,
    /// How the watcher reaches its database, without the password.
    database: Option<String>,
    /// A permit is a kilobyte.
    body_room: Arc<Semaphore>,
    listings: Arc<Semaphore>,
    viewers: Arc<Semaphore>,
    working: Arc<Semaphore>,
}

impl Api {
    pub(crate) fn new(
        health: Arc<HealthSource>,
        history: Arc<History>,
        intake: Arc<Intake>,
        spool: Spool,
        capture: HookCapture,
        database: Option<String>,
    ) -> Api {
        // All bodies together, beyond what each has for free: room for the largest one. 32 MiB by default.
        let body_bytes_max = hooks::input_bytes_max(&intake).next_power_of_two() as usize;
        Api {
            health,
            history,
            intake,
            spool,
            capture,
            database,
            body_room: Arc::new(Semaphore::new(body_bytes_max / 1024)),
            listings: Arc::new(Semaphore::new(LISTINGS_MAX)),
            viewers: Arc::new(Semaphore::new(VIEWERS_MAX)),
            working: Arc::new(Semaphore::new(WORKING_MAX)),
        }
    }

    /// Does what blocks, when it is its turn.
    async fn work<T>(&self, work: impl FnOnce() -> T) -> T {
        // Nobody closes the semaphore; without a permit it would still be right, only not bounded.
        let _permit = self.working.acquire().await.ok();
        tokio::task::block_in_place(work)
    }
}

/// What a request arrives on.
#[derive(Clone)]
pub(crate) enum Transport {
    /// The Unix socket: access is controlled by its file mode.
    Socket,
    Tcp(Access),
}

/// All routes.
pub(crate) fn router(api: Api, transport: Transport) -> Router {
    let routes = Router::new()
        .route("/health", get(health))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/queue", get(listings::queue))
        .route("/events", post(events::events))
        .route("/hook/{kind}", post(hooks::hook))
        .route("/spool", post(hooks::spool))
        .route("/dead-letters", get(listings::dead_letters).delete(dead_letters::forget_all))
        .route("/dead-letters/{sequence}", delete(dead_letters::forget))
        .route("/dead-letters/{sequence}/retry", post(dead_letters::retry))
        .route("/cursors", get(listings::cursors))
        .route("/metrics", get(metrics::metrics))
        .route("/", get(page::page))
        .route("/overview", get(page::overview))
        .route("/live", get(page::live))
        .fallback(|| async { error(StatusCode::NOT_FOUND, "no such route") })
        .method_not_allowed_fallback(|| async { error(StatusCode::METHOD_NOT_ALLOWED, "not with this method") })
        .with_state(api.clone());
    let routes = match transport {
        Transport::Socket => {
            let own = Router::new().route("/database", get(database)).with_state(api);
            routes.merge(own).layer(Extension(Caller::Owner))
        }
        Transport::Tcp(access) => routes.layer(middleware::from_fn_with_state(Arc::new(access), access::admit_caller)),
    };
    routes.layer(TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, REQUEST_TIMEOUT))
}

/// Where the watcher has its database, for commands that are told of none. On the socket alone.
async fn database(State(api): State<Api>) -> Response {
    answer(StatusCode::OK, &json!({"connection": api.database}))
}

async fn health(State(api): State<Api>, Extension(caller): Extension<Caller>) -> Response {
    let health = health_for(caller, &api);
    let code = match health.status {
        Status::Pass | Status::Warn => StatusCode::OK,
        Status::Fail => StatusCode::SERVICE_UNAVAILABLE,
    };
    answer(code, &health)
}

/// What `caller` may see of the health.
fn health_for(caller: Caller, api: &Api) -> Health {
    let health = api.health.health(Moment::now());
    match caller {
        Caller::Owner => health,
        Caller::Stranger => health.without_details(),
    }
}

/// Whether the program makes progress; what systemd's watchdog asks, too.
async fn livez(State(api): State<Api>) -> Response {
    yes_or_no(api.health.is_alive(Moment::now()))
}

async fn readyz(State(api): State<Api>) -> Response {
    yes_or_no(api.health.ready())
}

fn yes_or_no(is_ok: bool) -> Response {
    let code = if is_ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    answer(code, &json!({"ok": is_ok}))
}

fn answer(code: StatusCode, value: &impl serde::Serialize) -> Response {
    let body = serde_json::to_vec(value).unwrap_or_default();
    (code, [(CONTENT_TYPE, "application/json"), (CACHE_CONTROL, "no-store")], body).into_response()
}

fn error(code: StatusCode, problem: impl std::fmt::Display) -> Response {
    answer(code, &json!({"error": problem.to_string()}))
}
