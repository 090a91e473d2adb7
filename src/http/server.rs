//! Serves HTTP connections within limits, so that neither many of them nor slow ones do harm.
//!
//! [`CONNECTIONS_MAX`] are served at once on each listener; further ones wait in its backlog. No connection keeps its place
//! for nothing, since everything that a client can delay has a timeout:
//!
//! | What | Timeout | Then |
//! |---|---|---|
//! | the head of a request; the next request on a connection | [`HEAD_TIMEOUT`] | closed |
//! | the body of a request, and the work on it | [`REQUEST_TIMEOUT`] | 408 |
//! | reading the answer | [`WRITE_TIMEOUT`] without progress | closed |

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::middleware::AddExtension;
use axum::serve::Listener;
use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;
use tower::Layer;

/// Connections at once on one listener. `cli::run` sees to it that there are files enough beside them.
pub(super) const CONNECTIONS_MAX: usize = 512;

const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// A body of 16 MiB comes over loopback within a second.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);

const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes and fields of a head. A client that sends more is answered 431.
const HEAD_BYTES_MAX: usize = 32 << 10;
const HEADER_FIELDS_MAX: usize = 64;

/// Connections that wait to be served. With a shorter backlog, the system refuses callers when many connect at once.
const BACKLOG: u32 = 1024;

/// Listens on a TCP address.
pub(crate) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Which of our addresses a request has reached; among the extensions of each. `None` on the Unix socket.
#[derive(Clone, Copy)]
pub(super) struct LocalAddress(pub Option<SocketAddr>);

/// Serves on the Unix socket until the task is aborted. Requests under way go on then.
pub(crate) async fn serve_socket(listener: UnixListener, router: Router) {
    serve(listener, router, |_| None).await;
}

/// Serves on TCP in the same way.
pub(crate) async fn serve_tcp(listener: TcpListener, router: Router) {
    serve(listener, router, |stream| stream.local_addr().ok()).await;
}

async fn serve<L: Listener>(mut listener: L, router: Router, reached: fn(&L::Io) -> Option<SocketAddr>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = places.clone().acquire_owned().await.expect("nobody closes the semaphore");
        let (io, _) = listener.accept().await;
        let service = Extension(LocalAddress(reached(&io))).layer(router.clone());
        tokio::spawn(async move {
            serve_connection(io, service, WRITE_TIMEOUT).await;
            drop(place);
        });
    }
}

async fn serve_connection<I>(io: I, service: AddExtension<Router, LocalAddress>, write_timeout: Duration)
where
    I: AsyncRead + AsyncWrite + Send + 'static,
{
    let mut io = TimeoutStream::new(io);
    io.set_write_timeout(Some(write_timeout));
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADER_FIELDS_MAX)
        // A hook closes the connection after sending; its request is handled nevertheless.
        .half_close(true)
        .serve_connection(TokioIo::new(Box::pin(io)), TowerToHyperService::new(service));
    // A connection that broke off, or that was too slow, is its caller's business.
    let _ = serving.await;
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn a_client_that_does_not_read_its_answer_loses_the_connection() {
        let (mut client, io) = tokio::io::duplex(64);
        client.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        let router = Router::new().route("/", get(|| async { "x".repeat(1 << 20) }));
        let service = Extension(LocalAddress(None)).layer(router);
        let serving = serve_connection(io, service, Duration::from_millis(50));
        tokio::time::timeout(Duration::from_secs(30), serving).await.expect("the connection is closed");
    }
}
