//! Asks the running watcher over its socket.

use std::path::Path;
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// How long the watcher may take to begin its answer.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the watcher did not answer.
#[derive(Debug)]
pub enum ClientError {
    /// Nobody listens on the socket.
    NotRunning,
    /// Somebody listens but does not answer, or not as HTTP.
    NoAnswer(String),
}

/// The answer to `GET target`, its body still to be read.
pub async fn get(socket: &Path, target: &str) -> Result<Response<Incoming>, ClientError> {
    let stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => ClientError::NotRunning,
        _ => ClientError::NoAnswer(error.to_string()),
    })?;
    let asking = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::get(target).header("host", "localhost").body(Empty::<Bytes>::new());
        match request {
            Ok(request) => Ok(Some(sender.send_request(request).await?)),
            Err(_) => Ok::<_, hyper::Error>(None),
        }
    };
    match tokio::time::timeout(ANSWER_TIMEOUT, asking).await {
        Ok(Ok(Some(response))) => Ok(response),
        Ok(Ok(None)) => Err(ClientError::NoAnswer(format!("{target} is no address"))),
        Ok(Err(error)) => Err(ClientError::NoAnswer(error.to_string())),
        Err(_) => Err(ClientError::NoAnswer(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))),
    }
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
