//! The pool of sessions.
//!
//! bb8 does not tell why a connection could not be opened: [`Connections::get`] opens it and adds it to the pool.

use std::sync::Arc;
use std::time::Duration;

use bb8::{ManageConnection, Pool, PooledConnection};

use super::connect::{ConnectSettings, Pooler, within};
use super::session::Session;
use super::verdict::no_answer;
use crate::sink::{DeliverError, Verdict};

/// How long a session may take to be opened. Each step has its own limit, and tells the cause when that is over.
const OPENING_MAX: Duration = Duration::from_secs(900);

/// A session on loan from the pool.
pub(super) type PooledSession = PooledConnection<'static, Manager>;

/// The pool.
pub(super) struct Connections {
    pool: Pool<Manager>,
}

impl Connections {
    pub(super) fn new(settings: ConnectSettings) -> Self {
        let pool = Pool::builder()
            .max_size(settings.pool_size)
            .min_idle(None)
            .test_on_check_out(false)
            .idle_timeout(None)
            .max_lifetime(None)
            .build_unchecked(Manager { settings, pooler: Arc::default() });
        Connections { pool }
    }

    /// A session that is ready, or why there is none.
    pub(super) async fn get(&self) -> Result<PooledSession, DeliverError> {
        if self.pool.state().idle_connections == 0 {
            let opened = within(OPENING_MAX, self.pool.dedicated_connection()).await;
            let session = opened.unwrap_or_else(|| Err(no_answer(OPENING_MAX)))?;
            self.pool.add(session).map_err(|_| unavailable())?;
        }
        self.pool.get_owned().await.map_err(|_| unavailable())
    }
}

/// All connections that the pool may have are in use, or the new one has broken meanwhile.
fn unavailable() -> DeliverError {
    let message = "no connection is free; they are being closed".to_owned();
    DeliverError { verdict: Verdict::Again, sqlstate: None, message }
}

/// Opens sessions for the pool.
pub(super) struct Manager {
    settings: ConnectSettings,
    pooler: Arc<Pooler>,
}

impl ManageConnection for Manager {
    type Connection = Session;
    type Error = DeliverError;

    async fn connect(&self) -> Result<Session, DeliverError> {
        Session::open(&self.settings, &self.pooler).await
    }

    async fn is_valid(&self, session: &mut Session) -> Result<(), DeliverError> {
        session.check(self.settings.statement_timeout).await
    }

    fn has_broken(&self, session: &mut Session) -> bool {
        session.is_broken()
    }
}
