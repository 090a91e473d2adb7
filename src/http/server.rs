//! Serves connections within limits, so that neither many of them nor slow ones do harm.
//!
//! So many are held at once ([`CONNECTIONS_MAX`] on each listener); who comes later waits in the listener's backlog until
//! one ends, or until one that does nothing is closed in its favour: one without a request after five seconds, one whose
//! request or answer has not moved for half a minute. Heads are bounded in size, number of fields and time.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::response::Response;
use axum::serve::Listener;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixStream};
use tokio::task::AbortHandle;

/// Connections at once on one listener. `cli::run` sees to it that there are files enough beside them.
pub const CONNECTIONS_MAX: usize = 512;

/// Time for the head of a request, and for the next request on a connection that is kept.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes and fields of a head. A client that sends more is answered 431.
const HEAD_BYTES_MAX: usize = 32 << 10;
const HEADER_FIELDS_MAX: usize = 64;

/// A connection without a request may be closed after this when others wait.
const IDLE_AFTER: Duration = Duration::from_secs(5);

/// One with a request may be when neither it nor its answer has moved for so long.
const STUCK_AFTER: Duration = Duration::from_secs(30);

/// Connections that wait to be taken. With fewer, the system turns callers away when many come at the same moment.
const BACKLOG: u32 = 1024;

/// How often it is looked for a connection to close while others wait.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Listens on a TCP address.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Which of our addresses a request has reached; among the extensions of each that came over TCP.
#[derive(Clone, Copy)]
pub struct LocalAddress(pub SocketAddr);

/// A connection that can say which of our addresses it has reached.
pub trait Reached {
    fn local_address(&self) -> Option<LocalAddress>;
}

impl Reached for TcpStream {
    fn local_address(&self) -> Option<LocalAddress> {
        self.local_addr().ok().map(LocalAddress)
    }
}

impl Reached for UnixStream {
    fn local_address(&self) -> Option<LocalAddress> {
        None
    }
}

/// Serves `router` on `listener` for ever.
pub async fn serve<L>(mut listener: L, router: Router)
where
    L: Listener,
    L::Io: Reached,
{
    let mut connections: VecDeque<Connection> = VecDeque::new();
    loop {
        let (io, _) = listener.accept().await;
        make_room(&mut connections).await;
        let activity = Arc::new(Activity::new());
        let task = tokio::spawn(connection(io, router.clone(), activity.clone()));
        connections.push_back(Connection { activity, task: task.abort_handle() });
    }
}

struct Connection {
    activity: Arc<Activity>,
    task: AbortHandle,
}

/// Waits until there are fewer than [`CONNECTIONS_MAX`], closing what does nothing.
async fn make_room(connections: &mut VecDeque<Connection>) {
    loop {
        connections.retain(|connection| !connection.task.is_finished());
        if connections.len() < CONNECTIONS_MAX {
            return;
        }
        let useless = connections.iter().position(|connection| connection.activity.is_useless());
        match useless.and_then(|index| connections.remove(index)) {
            Some(connection) => connection.task.abort(),
            None => tokio::time::sleep(LOOK_INTERVAL).await,
        }
    }
}

/// What goes on on a connection.
struct Activity {
    begun: Instant,
    /// Milliseconds after `begun` at which something last moved.
    moved: AtomicU64,
    /// Whether it is our turn: to look at the connection for the first time, or to answer.
    is_our_turn: AtomicBool,
}

impl Activity {
    fn new() -> Activity {
        Activity { begun: Instant::now(), moved: AtomicU64::new(0), is_our_turn: AtomicBool::new(true) }
    }

    fn has_turn(&self, is_our_turn: bool) {
        self.is_our_turn.store(is_our_turn, Ordering::Relaxed);
        self.moves();
    }

    fn moves(&self) {
        self.moved.store(self.begun.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn is_useless(&self) -> bool {
        let quiet = self.begun.elapsed().saturating_sub(Duration::from_millis(self.moved.load(Ordering::Relaxed)));
        quiet > if self.is_our_turn.load(Ordering::Relaxed) { STUCK_AFTER } else { IDLE_AFTER }
    }
}

/// A request is being answered while this lives.
struct UnderWay(Arc<Activity>);

impl UnderWay {
    fn new(activity: &Arc<Activity>) -> UnderWay {
        activity.has_turn(true);
        UnderWay(activity.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.has_turn(false);
    }
}

async fn connection<I>(io: I, router: Router, activity: Arc<Activity>)
where
    I: Reached + tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    activity.has_turn(false);
    let reached = io.local_address();
    let routes = TowerToHyperService::new(router);
    let service = service_fn(move |request: hyper::Request<Incoming>| answer(&routes, request, reached, &activity));
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADER_FIELDS_MAX)
        // A hook rings and is gone: what it asked for is done nevertheless.
        .half_close(true)
        .serve_connection(TokioIo::new(io), service);
    // A connection that broke off, or that was too slow, is its caller's business.
    let _ = serving.await;
}

fn answer(
    routes: &TowerToHyperService<Router>,
    request: hyper::Request<Incoming>,
    reached: Option<LocalAddress>,
    activity: &Arc<Activity>,
) -> impl Future<Output = Result<Response, Infallible>> + use<> {
    let under_way = UnderWay::new(activity);
    let moving = activity.clone();
    let mut request: Request = request.map(|body| Body::new(Watched { body, note: move || moving.moves() }));
    if let Some(reached) = reached {
        request.extensions_mut().insert(reached);
    }
    let answering = routes.call(request);
    async move {
        let response = answering.await?;
        Ok(response.map(|body| Body::new(Watched { body, note: move || under_way.0.moves() })))
    }
}

/// A body that takes note of each piece of it.
struct Watched<B, N> {
    body: B,
    note: N,
}

impl<B, N> HttpBody for Watched<B, N>
where
    B: HttpBody<Data = Bytes> + Unpin,
    N: Fn() + Unpin,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if polled.is_ready() {
            (self.note)();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
