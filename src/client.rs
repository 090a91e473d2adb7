//! Asks the running watcher over its socket.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::FdFlags;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketType};
use serde_json::Value;
use tokio::net::UnixStream;

/// How long the watcher may take to begin its answer.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// What tells the watcher to look into the spool.
const NOTICE: &[u8] = b"POST /spool HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";

/// Why the watcher did not answer.
#[derive(Debug)]
pub(crate) enum ClientError {
    /// Nobody listens on the socket.
    NotRunning,
    /// Somebody listens but does not answer, or not as HTTP.
    NoAnswer(String),
}

impl From<hyper::Error> for ClientError {
    fn from(error: hyper::Error) -> ClientError {
        ClientError::NoAnswer(error.to_string())
    }
}

/// The answer to `GET target`, its body still to be read.
pub(crate) async fn get(socket: &Path, target: &str) -> Result<Response<Incoming>, ClientError> {
    send(socket, Method::GET, target).await
}

/// The answer to a request without a body, its own body still to be read.
async fn send(socket: &Path, method: Method, target: &str) -> Result<Response<Incoming>, ClientError> {
    let answering = async {
        let stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => ClientError::NotRunning,
            _ => ClientError::NoAnswer(error.to_string()),
        })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::builder().method(method).uri(target).header("host", "localhost");
        let request = request.body(Empty::<Bytes>::new());
        Ok(sender.send_request(request.map_err(|error| ClientError::NoAnswer(error.to_string()))?).await?)
    };
    match tokio::time::timeout(ANSWER_TIMEOUT, answering).await {
        Ok(answered) => answered,
        Err(_) => Err(ClientError::NoAnswer(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))),
    }
}

/// The whole answer to a request without a body.
pub(crate) async fn ask(socket: &Path, method: Method, target: &str) -> Result<(StatusCode, Bytes), ClientError> {
    let response = send(socket, method, target).await?;
    Ok((response.status(), body(response).await?))
}

/// Tells the watcher to look into the spool. Needs no runtime and waits for nothing: a socket whose backlog is full says
/// so at once.
pub(crate) fn notify(socket: &Path) -> rustix::io::Result<()> {
    let connection = connect(socket)?;
    rustix::net::send(&connection, NOTICE, SendFlags::empty())?;
    Ok(())
}

/// Hands a record over that could not be written to the spool, as `record::encode` writes it. Waits until the watcher has
/// read it, `patience` at most, and not for its answer.
pub(crate) fn hand_over(socket: &Path, record: &[u8], patience: Duration) -> rustix::io::Result<()> {
    let connection = connect(socket)?;
    let deadline = Instant::now() + patience;
    let head = format!("POST /spool HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", record.len());
    for part in [head.as_bytes(), record] {
        let mut rest = part;
        while !rest.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut descriptors = [PollFd::new(&connection, PollFlags::OUT)];
            if rustix::event::poll(&mut descriptors, Timespec::try_from(left).ok().as_ref())? == 0 {
                return Err(rustix::io::Errno::TIMEDOUT);
            }
            let sent = rustix::net::send(&connection, rest, SendFlags::empty())?;
            rest = rest.get(sent..).unwrap_or_default();
        }
    }
    Ok(())
}

/// A connection on which nothing waits. Rust's runtime ignores SIGPIPE: a watcher that is gone is an error of `send`.
fn connect(socket: &Path) -> rustix::io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(socket)?;
    // In calls of their own: macOS takes no flags when a socket is made.
    let connection = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
    rustix::io::fcntl_setfd(&connection, FdFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&connection, true)?;
    rustix::net::connect(&connection, &address)?;
    Ok(connection)
}

/// The whole body.
pub(crate) async fn body(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let collecting = tokio::time::timeout(ANSWER_TIMEOUT, response.into_body().collect());
    match collecting.await {
        Ok(body) => Ok(body?.to_bytes()),
        Err(_) => Err(ClientError::NoAnswer(format!("the answer did not end within {} s", ANSWER_TIMEOUT.as_secs()))),
    }
}

/// What the watcher says is wrong.
pub(crate) fn problem(code: StatusCode, body: &[u8]) -> String {
    let answer: Value = serde_json::from_slice(body).unwrap_or_default();
    answer.get("error").and_then(Value::as_str).map_or_else(|| format!("the watcher says {code}"), str::to_owned)
}
