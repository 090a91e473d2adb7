//! Asks the running watcher over its socket.

use std::path::Path;
use std::time::Duration;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::http::request::Builder;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

/// How long the watcher may take to begin its answer.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// What is sent along. An error breaks the request off.
pub type Body<E = std::convert::Infallible> = UnsyncBoxBody<Bytes, E>;

/// Why the watcher did not answer.
#[derive(Debug)]
pub enum ClientError {
    /// Nobody listens on the socket.
    NotRunning,
    /// Somebody listens but does not answer, or not as HTTP.
    NoAnswer(String),
}

/// The beginning of a request.
pub fn request(method: Method, target: &str) -> Builder {
    Request::builder().method(method).uri(target).header("host", "localhost")
}

/// The answer to `GET target`, its body still to be read.
pub async fn get(socket: &Path, target: &str) -> Result<Response<Incoming>, ClientError> {
    let request = request(Method::GET, target).body(Empty::new().boxed_unsync());
    send(socket, request.map_err(|_| ClientError::NoAnswer(format!("{target} is no address")))?).await
}

/// The answer to a short request, its body still to be read.
pub async fn send(socket: &Path, request: Request<Body>) -> Result<Response<Incoming>, ClientError> {
    match tokio::time::timeout(ANSWER_TIMEOUT, send_patiently(socket, request)).await {
        Ok(answered) => answered,
        Err(_) => Err(ClientError::NoAnswer(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))),
    }
}

/// As [`send`], for a request whose body takes its time.
pub async fn send_patiently<E>(socket: &Path, request: Request<Body<E>>) -> Result<Response<Incoming>, ClientError>
where
    E: std::error::Error + Send + Sync + 'static,
{
    let stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => ClientError::NotRunning,
        _ => ClientError::NoAnswer(error.to_string()),
    })?;
    let no_answer = |error: hyper::Error| ClientError::NoAnswer(error.to_string());
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(no_answer)?;
    tokio::spawn(connection);
    sender.send_request(request).await.map_err(no_answer)
}

/// The whole body.
pub async fn body(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let collecting = tokio::time::timeout(ANSWER_TIMEOUT, response.into_body().collect());
    match collecting.await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) => Err(ClientError::NoAnswer(error.to_string())),
        Err(_) => Err(ClientError::NoAnswer(format!("the answer did not end within {} s", ANSWER_TIMEOUT.as_secs()))),
    }
}

/// What the watcher says is wrong.
pub fn problem(code: StatusCode, body: &[u8]) -> String {
    let answer: Value = serde_json::from_slice(body).unwrap_or_default();
    answer.get("error").and_then(Value::as_str).map_or_else(|| format!("the watcher says {code}"), str::to_owned)
}
