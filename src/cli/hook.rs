//! `hook`: run by Claude Code at its hooks, with one JSON object on stdin.
//!
//! It must never slow or break the agent: it prints nothing, exits 0 whatever happens, and waits for nothing but its
//! input, and for that a second at most. What it was told is durable in the spool before it ends; then it rings at the
//! watcher's socket and does not wait to be heard.
//!
//! So it goes past everything that other commands do: no runtime, no log, no complaint about arguments or
//! configuration. A configuration that can't be used whole makes it careful: it keeps a summary, redacted.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use headspace_watcher::config::{Config, Environment, HookCapture};
use headspace_watcher::event::{EventId, Timestamp};
use headspace_watcher::intake::hook::{self, Arrival};
use headspace_watcher::intake::redact::Redactor;
use headspace_watcher::intake::spool::{self, Spool};
use headspace_watcher::intake::{Scan, without_byte_order_mark};
use rustix::event::{PollFd, PollFlags};

use super::client;

/// How long the input may pause. SessionEnd hooks share 1.5 s, and some leave the pipe open.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How long the input may take in all.
const INPUT_TIME_MAX: Duration = Duration::from_secs(10);

/// A larger input is not kept.
const INPUT_BYTES_MAX: usize = 64 << 20;

/// How long the watcher may take to read what could not be written to the spool.
const HAND_OVER_TIME_MAX: Duration = Duration::from_secs(1);

/// The command line of a hook, read without judging it.
pub struct Invocation {
    config: Option<PathBuf>,
}

impl Invocation {
    /// `None` when these arguments (without the program's name) mean another command, or ask for help.
    pub fn of(arguments: impl IntoIterator<Item = OsString>) -> Option<Invocation> {
        let mut config = None;
        let mut is_hook = false;
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            match argument.to_str() {
                Some("-h" | "--help") => return None,
                Some("--config") => config = arguments.next().map(PathBuf::from),
                Some("--log-format" | "--log-level") => drop(arguments.next()),
                Some("hook") => is_hook = true,
                Some(option) if option.starts_with('-') => {
                    if let Some(file) = option.strip_prefix("--config=") {
                        config = Some(PathBuf::from(file));
                    }
                }
                // Another command, or more than a hook is given.
                _ if !is_hook => return None,
                _ => {}
            }
        }
        is_hook.then_some(Invocation { config })
    }

    /// Does all of it, and says 0.
    pub fn run(self) -> ExitCode {
        let received_at = Timestamp::now();
        std::panic::set_hook(Box::new(|_| {}));
        // Whatever went wrong, there is nobody to be told.
        let _ = std::panic::catch_unwind(|| self.receive(received_at));
        ExitCode::SUCCESS
    }

    fn receive(self, received_at: Timestamp) {
        let id = EventId::new();
        let input = read_input();
        if matches!(&input, Input::Bytes(bytes) if without_byte_order_mark(bytes).trim_ascii().is_empty()) {
            return;
        }
        // A working directory that is gone leaves relative paths without a meaning; those of the file are not.
        let environment = Environment::of_process().unwrap_or_else(|_| Environment::new("/", std::env::vars_os()));
        let (loaded, is_whole) = Config::load_leniently(self.config.as_deref(), &environment);
        let config = loaded.config;
        let redactor = match Redactor::new(&config.redact) {
            Ok(redactor) if is_whole => redactor,
            _ => Redactor::careful(&config.redact.patterns),
        };
        let capture = if is_whole { config.hooks.capture } else { HookCapture::Summary };
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let arrival = Arrival {
            id,
            received_at,
            hook_type: None,
            working_directory: std::env::current_dir().ok().map(|folder| folder.to_string_lossy().into_owned()),
            project_path: variable("CLAUDE_PROJECT_DIR"),
        };
        let record = match input {
            Input::Bytes(bytes) => hook::record(&bytes, arrival, capture, config.event_system.max_event_bytes),
            Input::TooLarge => hook::too_large(INPUT_BYTES_MAX),
        };
        let record = redactor.record(record);
        if Spool::new(&config.queue.spool_path).leave(&record).is_ok() {
            let _ = client::ring(&config.http.socket);
        } else if let Ok(bytes) = spool::encode(&record) {
            // A full disk, a folder of somebody else: the running watcher may still be able to keep it.
            let _ = client::hand_over(&config.http.socket, &bytes, HAND_OVER_TIME_MAX);
        }
    }
}

enum Input {
    Bytes(Vec<u8>),
    TooLarge,
}

/// Reads stdin until the object is complete, until its end, or until nothing more comes.
fn read_input() -> Input {
    let stdin = std::io::stdin();
    let begun = Instant::now();
    let mut input = Vec::new();
    let mut scan = Scan::default();
    let mut piece = vec![0; 64 << 10];
    loop {
        let patience = PAUSE_MAX.min(INPUT_TIME_MAX.saturating_sub(begun.elapsed()));
        let mut descriptors = [PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN)];
        let timeout = rustix::event::Timespec::try_from(patience).ok();
        match rustix::event::poll(&mut descriptors, timeout.as_ref()) {
            Ok(0) => return Input::Bytes(input),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return Input::Bytes(input),
        }
        let length = match rustix::io::read(stdin.as_fd(), &mut piece) {
            Ok(0) => return Input::Bytes(input),
            Ok(length) => length,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => continue,
            Err(_) => return Input::Bytes(input),
        };
        let bytes = piece.get(..length).unwrap_or_default();
        if let Some(end) = scan.feed(bytes) {
            input.extend_from_slice(bytes.get(..end).unwrap_or_default());
            return Input::Bytes(input);
        }
        input.extend_from_slice(bytes);
        if input.len() > INPUT_BYTES_MAX {
            return Input::TooLarge;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_is_known_by_its_arguments_whatever_else_they_hold() {
        let config = |line: &str| {
            Invocation::of(line.split_whitespace().map(OsString::from)).map(|invocation| invocation.config)
        };
        assert_eq!(config("hook"), Some(None));
        assert_eq!(config("--config /a/c.yaml hook"), Some(Some("/a/c.yaml".into())));
        assert_eq!(config("hook --config=/a/c.yaml --nonsense more"), Some(Some("/a/c.yaml".into())));
        assert_eq!(config("--log-level debug hook"), Some(None));
        for other in ["", "run", "hooks show", "hook --help", "emit --type hook", "run hook", "--config hook"] {
            assert_eq!(config(other), None, "{other}");
        }
    }
}
