//! Asks a server to cancel a statement that has not been answered.
//!
//! The request goes over a connection of its own, which the server closes when it has dealt with it. libpq waits for that;
//! tokio-postgres closes its side at once, which PgBouncer 1.18 (Debian 12) answers by aborting, for all its users. So the
//! connection is opened here and read to its end. With several hosts only tokio-postgres knows which one answered, and
//! its own request is sent.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_postgres::CancelToken;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::config::DatabaseHost;

/// How long a request may take in all.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(1);

/// How requests to cancel reach the server of a session.
#[derive(Clone)]
pub(super) struct Canceller {
    tls: MakeRustlsConnect,
    /// Where there is only one.
    host: Option<DatabaseHost>,
}

impl Canceller {
    pub(super) fn new(tls: MakeRustlsConnect, hosts: &[DatabaseHost]) -> Canceller {
        let host = if let [host] = hosts { Some(host.clone()) } else { None };
        Canceller { tls, host }
    }

    /// Sends the request. If it does not get through, the server's own `statement_timeout` ends the statement.
    pub(super) async fn cancel(self, token: CancelToken) {
        let requesting = async {
            match self.host.clone() {
                Some(DatabaseHost::Tcp { name, address: Some(address), port }) => {
                    self.request(token, TcpStream::connect((address, port)).await?, &name).await
                }
                Some(DatabaseHost::Tcp { name, address: None, port }) => {
                    self.request(token, TcpStream::connect((name.as_str(), port)).await?, &name).await
                }
                Some(DatabaseHost::Unix { folder, port }) => {
                    let socket: PathBuf = folder.join(format!(".s.PGSQL.{port}"));
                    self.request(token, UnixStream::connect(socket).await?, "localhost").await
                }
                None => token.cancel_query(self.tls).await.map_err(io::Error::other),
            }
        };
        let _ = tokio::time::timeout(CANCEL_TIMEOUT, requesting).await;
    }

    async fn request<S>(mut self, token: CancelToken, stream: S, name: &str) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let tls = MakeTlsConnect::<ReadToEnd<S>>::make_tls_connect(&mut self.tls, name).map_err(io::Error::other)?;
        token.cancel_query_raw(ReadToEnd(stream), tls).await.map_err(io::Error::other)
    }
}

/// A connection whose shutdown waits until the other side has closed it.
struct ReadToEnd<S>(S);

impl<S: AsyncRead + Unpin> AsyncRead for ReadToEnd<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ReadToEnd<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut bytes = [0; 64];
            let mut buffer = ReadBuf::new(&mut bytes);
            // A reset is an end, too.
            let read = ready!(Pin::new(&mut self.0).poll_read(context, &mut buffer));
            if read.is_err() || buffer.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
        }
    }
}
