//! Notices: what the server remarks beside its answers.
//!
//! A commit that waits for a synchronous standby (`synchronous_standby_names`) can stop waiting without the standby: when
//! somebody cancels the wait, or when a time-out fires at that moment. The server then answers with success, and only a
//! warning before the answer says that the standby may not have the transaction. So each connection on which commits are
//! awaited watches for that warning. Notices and answers come in one order: when an answer is there, every warning that
//! belongs to it has been seen.
//!
//! The warning's text is translated and its code (01000) is that of any warning. The name of the function in the server
//! that raises it is neither; a warning without such a name counts too. `client_min_messages` can hide warnings:
//! [`FLUSH`](super::routines::FLUSH) sees to it that it does not.

use std::future::poll_fn;
use std::time::Duration;

use tokio::sync::watch;
use tokio_postgres::error::{DbError, Severity};
use tokio_postgres::tls::TlsStream;
use tokio_postgres::{AsyncMessage, Connection, Socket};

/// Functions of the server that wait for a standby: `SyncRepWaitForLSN` in `syncrep.c`.
const STANDBY_ROUTINES: &str = "SyncRep";

/// Whether a commit on a connection has stopped waiting for its standby.
#[derive(Clone, Debug)]
pub(super) struct Notices {
    wait_ended: watch::Receiver<bool>,
    /// Of the database.
    pub encoding: String,
}

impl Notices {
    /// Drives a connection in a task of its own until it ends, and watches what the server remarks.
    pub(super) fn drive<T>(mut connection: Connection<Socket, T>) -> Notices
    where
        T: TlsStream + Unpin + Send + 'static,
    {
        let (sender, wait_ended) = watch::channel(false);
        let encoding = connection.parameter("server_encoding").unwrap_or("UTF8").to_owned();
        tokio::spawn(async move {
            // An error ends the connection; whoever awaits an answer on it is told.
            while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
                if matches!(&message, AsyncMessage::Notice(notice) if ends_a_wait(notice)) {
                    sender.send_replace(true);
                }
            }
        });
        Notices { wait_ended, encoding }
    }

    /// Whether a commit has stopped waiting for its standby. It never turns false again: such a connection proves nothing.
    pub(super) fn has_wait_ended(&self) -> bool {
        *self.wait_ended.borrow()
    }

    /// [`Notices::has_wait_ended`], once it is so or `limit` is over.
    pub(super) async fn wait_ends(&self, limit: Duration) -> bool {
        let mut wait_ended = self.wait_ended.clone();
        let ends = async { wait_ended.wait_for(|ended| *ended).await.is_ok() };
        tokio::time::timeout(limit, ends).await.unwrap_or(false)
    }
}

fn ends_a_wait(notice: &DbError) -> bool {
    let is_remark =
        matches!(notice.parsed_severity(), Some(Severity::Notice | Severity::Info | Severity::Log | Severity::Debug));
    !is_remark && notice.routine().is_none_or(|routine| routine.starts_with(STANDBY_ROUTINES))
}
