//! `hook`: run by Claude Code at its hooks, with one JSON object on stdin.
//!
//! It must never slow or break the agent: it prints nothing, exits 0 whatever happens, and waits for nothing but its
//! input, and for that until shortly before Claude Code would kill it. It does not wait for the end of its input where
//! that holds a complete object. What it got is durable in the spool before it ends; then it notifies the watcher over
//! its socket and does not wait for an answer.
//!
//! So it skips everything that other commands do: no runtime, no log, no complaint about arguments or
//! configuration. A configuration that can't be used as a whole makes it careful: it keeps a summary, redacted.
//!
//! | On stdin | Is kept as |
//! |---|---|
//! | objects | an event each |
//! | what is no object, or no longer one behind the last object | a dead letter with its size |
//! | nothing, or no complete object, when the time is over | a dead letter that says so |
//! | nothing before its end (`/dev/null`), or on a terminal | nothing |

use std::ffi::OsString;
use std::io::{IsTerminal, Stdin};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::claude::hook::{self, Arrival};
use crate::claude::settings;
use crate::config::{Config, Environment, HookCapture};
use crate::event::{EventId, Record, Timestamp};
use crate::intake::record;
use crate::intake::redact::Redactor;
use crate::intake::spool::Spool;
use crate::json::{Scan, without_byte_order_mark};
use rustix::event::{PollFd, PollFlags};

use super::client;

/// How long the input may take in all. Two seconds are left to write it to a slow disk.
const INPUT_TIME_MAX: Duration = Duration::from_secs(settings::TIMEOUT_SECONDS - 2);

/// How long more is waited for behind a complete object. Its writer closes stdin at once, as a rule.
const MORE_TIME_MAX: Duration = Duration::from_millis(100);

/// A larger input is not kept.
const INPUT_BYTES_MAX: usize = 64 << 20;

/// Read at once.
const READ_BYTES: usize = 64 << 10;

/// Objects of one input that become events; Claude Code writes one.
const OBJECTS_MAX: usize = 100;

/// Names the spool where no configuration file does.
const SPOOL_VARIABLE: &str = "HEADSPACE_QUEUE__SPOOL_PATH";

/// How long the watcher may take to read what could not be written to the spool.
const HAND_OVER_TIME_MAX: Duration = Duration::from_secs(1);

/// The command line of a hook, read without judging it.
pub(super) struct Invocation {
    config: Option<PathBuf>,
}

impl Invocation {
    /// `None` when these arguments (without the program's name) mean another command, or ask for help.
    pub(super) fn of(arguments: impl IntoIterator<Item = OsString>) -> Option<Invocation> {
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
    pub(super) fn run(self) -> ExitCode {
        let received_at = Timestamp::now();
        std::panic::set_hook(Box::new(|_| {}));
        // Whatever went wrong, there is nobody to be told.
        let _ = std::panic::catch_unwind(|| self.receive(received_at));
        ExitCode::SUCCESS
    }

    fn receive(self, received_at: Timestamp) {
        let mut input = Input::new();
        let mut piece = input.next(INPUT_TIME_MAX);
        if matches!(&piece, Piece::End(bytes) if bytes.is_empty()) {
            return;
        }
        let keeper = Keeper::new(self.config);
        let mut received_at = received_at;
        for number in 1.. {
            let record = match piece {
                Piece::Object(bytes) => match keeper.record(&bytes, received_at) {
                    Record::Event(event) if number <= OBJECTS_MAX => Record::Event(event),
                    Record::Event(_) => hook::too_many(OBJECTS_MAX),
                    // Brackets that close, but no object: its end says nothing, so all of it is one piece.
                    Record::Rejected(_) => match input.rest(bytes) {
                        Piece::TooLarge => hook::too_large(INPUT_BYTES_MAX),
                        Piece::Object(bytes) | Piece::End(bytes) | Piece::TimeIsOver(bytes) => {
                            return keeper.keep(keeper.record(&bytes, received_at));
                        }
                    },
                },
                Piece::End(bytes) | Piece::TimeIsOver(bytes) if bytes.is_empty() && number > 1 => return,
                Piece::TimeIsOver(bytes) if bytes.is_empty() && input.stdin.is_terminal() => return,
                Piece::End(bytes) => keeper.record(&bytes, received_at),
                Piece::TimeIsOver(bytes) => hook::incomplete(&bytes, INPUT_TIME_MAX.as_secs(), keeper.capture),
                Piece::TooLarge => hook::too_large(INPUT_BYTES_MAX),
            };
            let is_event = matches!(record, Record::Event(_));
            // Before more is waited for: it is durable then, whatever happens.
            keeper.keep(record);
            if !is_event {
                return;
            }
            piece = input.next(MORE_TIME_MAX);
            received_at = Timestamp::now();
        }
    }
}

/// Makes records of what came, and puts them where the watcher finds them.
struct Keeper {
    config: Config,
    redactor: Redactor,
    capture: HookCapture,
    /// `None`: there is no watcher that would look where a record could be left.
    spool: Option<Spool>,
}

impl Keeper {
    fn new(file: Option<PathBuf>) -> Keeper {
        // A working directory that is gone leaves relative paths without a meaning; those of the file are not.
        let environment = Environment::of_process().unwrap_or_else(|_| Environment::new("/", std::env::vars_os()));
        let (loaded, is_whole) = Config::load_leniently(file.as_deref(), &environment);
        let config = loaded.config;
        let redactor = match Redactor::new(&config.redact) {
            Ok(redactor) if is_whole => redactor,
            _ => Redactor::careful(&config.redact.patterns),
        };
        let capture = if is_whole { config.hooks.capture } else { HookCapture::Summary };
        // Without a configuration, and where no watcher has made the spool, nobody might ever read what is left there.
        let folder = &config.queue.spool_path;
        let is_set = std::env::var_os(SPOOL_VARIABLE).is_some_and(|value| !value.is_empty());
        let is_wanted = loaded.file.is_some() || is_set || folder.is_dir();
        let spool = is_wanted.then(|| Spool::new(folder));
        Keeper { config, redactor, capture, spool }
    }

    fn record(&self, input: &[u8], received_at: Timestamp) -> Record {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let arrival = Arrival {
            id: EventId::new(),
            received_at,
            hook_type: None,
            working_directory: std::env::current_dir().ok().map(|folder| folder.to_string_lossy().into_owned()),
            project_path: variable("CLAUDE_PROJECT_DIR"),
        };
        hook::record(input, arrival, self.capture, self.config.event_system.max_event_bytes)
    }

    fn keep(&self, record: Record) {
        let Some(spool) = &self.spool else { return };
        let record = self.redactor.record(record);
        if spool.leave(&record).is_ok() {
            let _ = client::notify(&self.config.http.socket);
        } else if let Ok(bytes) = record::encode(&record) {
            // A full disk, a folder of somebody else: the running watcher may still be able to keep it.
            let _ = client::hand_over(&self.config.http.socket, &bytes, HAND_OVER_TIME_MAX);
        }
    }
}

/// Stdin, read in pieces.
struct Input {
    stdin: Stdin,
    begun: Instant,
    /// What was read behind the last object.
    read: Vec<u8>,
}

/// A part of the input, without blanks before it.
enum Piece {
    /// What begins with an object and ends with the bracket that closes it.
    Object(Vec<u8>),
    /// What else there was before the end of the input.
    End(Vec<u8>),
    /// What there was when the time was over.
    TimeIsOver(Vec<u8>),
    TooLarge,
}

impl Input {
    fn new() -> Input {
        Input { stdin: std::io::stdin(), begun: Instant::now(), read: Vec::new() }
    }

    /// The next object, or what there is instead of one. Waits for its beginning no longer than `patience`.
    fn next(&mut self, patience: Duration) -> Piece {
        let (mut scan, mut scanned) = (Scan::default(), 0);
        loop {
            self.drop_blanks();
            // Only what begins as an object may end as one.
            if self.read.first() == Some(&b'{') {
                if let Some(length) = scan.feed(self.read.get(scanned..).unwrap_or_default()) {
                    let rest = self.read.split_off(scanned + length);
                    return Piece::Object(std::mem::replace(&mut self.read, rest));
                }
                scanned = self.read.len();
            }
            // The rest of an object that has begun is on its way.
            let patience = if self.read.first() == Some(&b'{') { INPUT_TIME_MAX } else { patience };
            if let Some(end) = self.read_more(patience) {
                return end;
            }
        }
    }

    /// Blanks, byte order marks, and the NUL that some writers put behind a text.
    fn drop_blanks(&mut self) {
        let is_blank = |byte: &u8| byte.is_ascii_whitespace() || *byte == 0;
        loop {
            let marked = self.read.len() - without_byte_order_mark(&self.read).len();
            let blanks = self.read.iter().skip(marked).take_while(|byte| is_blank(byte)).count();
            if marked + blanks == 0 {
                return;
            }
            self.read.drain(..marked + blanks);
        }
    }

    /// `begun` and what follows it at once.
    fn rest(&mut self, begun: Vec<u8>) -> Piece {
        self.read.splice(..0, begun);
        loop {
            match self.read_more(MORE_TIME_MAX) {
                // What is there may be all that its writer has to say.
                Some(Piece::TimeIsOver(bytes)) => return Piece::End(bytes),
                Some(end) => return end,
                None => {}
            }
        }
    }

    /// Waits until there is more and reads it; `Some` where no more is to be had.
    fn read_more(&mut self, patience: Duration) -> Option<Piece> {
        if self.read.len() > INPUT_BYTES_MAX {
            return Some(Piece::TooLarge);
        }
        let left = INPUT_TIME_MAX.saturating_sub(self.begun.elapsed());
        // Also where there is always more to read.
        if left.is_zero() {
            return Some(Piece::TimeIsOver(std::mem::take(&mut self.read)));
        }
        let patience = patience.min(left);
        let mut descriptors = [PollFd::from_borrowed_fd(self.stdin.as_fd(), PollFlags::IN)];
        let timeout = rustix::event::Timespec::try_from(patience).ok();
        match rustix::event::poll(&mut descriptors, timeout.as_ref()) {
            Ok(0) => return Some(Piece::TimeIsOver(std::mem::take(&mut self.read))),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return None,
            Err(_) => return Some(Piece::End(std::mem::take(&mut self.read))),
        }
        let before = self.read.len();
        self.read.resize(before + READ_BYTES, 0);
        let read = rustix::io::read(self.stdin.as_fd(), self.read.get_mut(before..).unwrap_or_default());
        self.read.truncate(before + read.unwrap_or(0));
        match read {
            Ok(1..) | Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => None,
            Ok(0) | Err(_) => Some(Piece::End(std::mem::take(&mut self.read))),
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
