//! What systemd is told, where it listens.
//!
//! Sending blocks while its socket is full. A thread of its own waits for that, so that nothing else does.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::warn;

/// What waits to be told at most; a systemd that does not listen is not told everything.
const NOTICES_MAX: usize = 16;

pub(super) enum Notice {
    Ready,
    Status(String),
    /// Feeds the watchdog.
    GoesOn,
    /// Starting takes longer: so much time from now on, whatever `TimeoutStartSec=` says.
    ExtendTimeout(Duration),
    Stopping,
}

/// The way to systemd. Cheap to clone.
#[derive(Clone)]
pub(super) struct Systemd {
    /// `None` where nobody listens.
    notices: Option<SyncSender<Notice>>,
}

impl Systemd {
    /// The one that `NOTIFY_SOCKET` names, if it does.
    pub(super) fn of_process() -> Systemd {
        if std::env::var_os("NOTIFY_SOCKET").is_none() {
            return Systemd { notices: None };
        }
        let (notices, waiting) = sync_channel(NOTICES_MAX);
        let thread = std::thread::Builder::new().name("systemd".to_owned()).spawn(move || pass_on(&waiting));
        match thread {
            Ok(_) => Systemd { notices: Some(notices) },
            Err(error) => {
                warn!(error = %error, "could not tell systemd");
                Systemd { notices: None }
            }
        }
    }

    /// Returns at once.
    pub(super) fn tell(&self, notice: Notice) {
        if let Some(notices) = &self.notices {
            // Full: it does not listen, and what is told every second is told again.
            let _ = notices.try_send(notice);
        }
    }
}

fn pass_on(notices: &Receiver<Notice>) {
    let mut said = false;
    for notice in notices {
        let told = match &notice {
            Notice::Ready => sd_notify::notify(&[NotifyState::Ready]),
            Notice::Status(status) => sd_notify::notify(&[NotifyState::Status(status)]),
            Notice::GoesOn => sd_notify::notify(&[NotifyState::Watchdog]),
            Notice::ExtendTimeout(time) => {
                let microseconds = u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
                sd_notify::notify(&[NotifyState::ExtendTimeoutUsec(microseconds)])
            }
            Notice::Stopping => sd_notify::notify(&[NotifyState::Stopping]),
        };
        match told {
            Ok(()) => said = false,
            Err(error) if !said => {
                said = true;
                warn!(error = %error, "could not tell systemd");
            }
            Err(_) => {}
        }
    }
}
