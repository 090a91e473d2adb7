//! The seam between the agents and all that follows, verifies and explains their transcripts.
//!
//! An agent is a folder beside this file and an arm in each function here: which files are its transcripts, in which order
//! new ones are read, how a line becomes events, and what the system tells of its sessions. Nothing else asks which agent
//! it is.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::claude;
use crate::claude::copies::{self, Look};
use crate::claude::line;
use crate::claude::transcript::OtherSession;
use crate::codex;
use crate::codex::rollout::Rollout;
use crate::config::{Config, Environment};
use crate::event::Cursor;
pub use crate::session::Agent;
use crate::transcript::{BadLine, Explained, Found, LastLine, LineReport, Source, TranscriptKind};

/// A folder that an agent's transcripts lie below.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct AgentFolder {
    pub(crate) agent: Agent,
    pub(crate) path: PathBuf,
}

/// The folders that are followed. Claude Code's come first: so the places of its folders of running processes are the same.
pub(crate) fn folders(config: &Config) -> Vec<AgentFolder> {
    let of = |agent, path: &PathBuf| AgentFolder { agent, path: path.clone() };
    let claude = config.claude.projects_paths.iter().map(|path| of(Agent::ClaudeCode, path));
    let sessions = config.codex.sessions_path.iter();
    let codex = sessions.flat_map(|path| [path.clone(), path.with_file_name(codex::ARCHIVE)]);
    claude.chain(codex.map(|path| of(Agent::CodexCli, &path))).collect()
}

/// What is remembered of a file from one line to the next, beside its cursor. It is not stored: reading what is before the
/// cursor again gives it again.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Memory {
    /// The session whose lines were read last, where nothing of the file's own came after them.
    pub(crate) other: Option<OtherSession>,
    rollout: Option<Box<Rollout>>,
}

impl Memory {
    /// Whether it may be dropped while nothing happens to its file.
    pub(crate) fn is_disposable(&self) -> bool {
        self.rollout.is_some()
    }
}

impl Agent {
    pub(crate) const ALL: [Agent; 2] = [Agent::ClaudeCode, Agent::CodexCli];

    /// Tells what kind of transcript lies at `relative`, a path below one of the agent's folders; `None` for anything else.
    pub fn classify(self, relative: &Path) -> Option<TranscriptKind> {
        match self {
            Agent::ClaudeCode => line::classify(relative),
            Agent::CodexCli => codex::transcript::classify(relative),
        }
    }

    /// Whose transcript has this path, by its name; `None` where that says nothing.
    pub(crate) fn of_transcript(path: &Path) -> Option<Agent> {
        let is_of = |agent: &Agent| {
            let relative = Path::new("folder").join(path.file_name().unwrap_or_default());
            agent.classify(&relative).is_some()
        };
        Agent::ALL.into_iter().find(is_of)
    }

    /// By its name in events, or the first word of that.
    pub(crate) fn named(name: &str) -> Result<Agent, String> {
        let is_named = |agent: &Agent| agent.as_str() == name || agent.as_str().split('-').next() == Some(name);
        Agent::ALL.into_iter().find(is_named).ok_or_else(|| "expected claude-code or codex-cli".to_owned())
    }

    /// The file that names its hooks, in the user's own folder.
    pub(crate) fn hooks_file(self, environment: &Environment) -> Option<PathBuf> {
        match self {
            Agent::ClaudeCode => environment.claude_folder().map(|folder| folder.join("settings.json")),
            Agent::CodexCli => environment.codex_folder().map(|folder| folder.join("hooks.json")),
        }
    }

    pub(crate) fn hook_events(self) -> &'static [&'static str] {
        match self {
            Agent::ClaudeCode => &claude::settings::EVENTS,
            Agent::CodexCli => codex::HOOK_EVENTS,
        }
    }

    /// What is left to do once its hooks are installed.
    pub(crate) fn hooks_note(self) -> Option<&'static str> {
        let note = "Codex runs no hook that is new or changed before you trust it: open codex and type /hooks";
        (self == Agent::CodexCli).then_some(note)
    }

    /// Whether a folder that is missing is worth a word: the agent is expected to be used.
    pub(crate) fn is_expected(self) -> bool {
        self == Agent::ClaudeCode
    }

    /// What head and tail of a file tell of the order in which it is to be read: copies after what they were copied from.
    pub(crate) fn look(self, session: Uuid, head: &[u8], tail: &[u8]) -> Look {
        match self {
            Agent::ClaudeCode => Look::at(session, head, tail),
            Agent::CodexCli => {
                let meta = codex::rollout::session_of(head);
                let (opened_at, is_marked) = meta.map_or((None, false), |meta| (meta.began_at, meta.is_fork));
                Look { opened_at, is_marked, ..Look::at(session, b"", b"") }
            }
        }
    }

    /// Whether a head of a file is long enough for [`Agent::look`].
    pub(crate) fn is_head_complete(self, head: &[u8]) -> bool {
        match self {
            Agent::ClaudeCode => copies::root(head).is_some(),
            Agent::CodexCli => head.contains(&b'\n'),
        }
    }

    /// Whether a copy keeps the lines of its original as they are, and its beginning is to be compared with that.
    pub(crate) fn copies_lines(self) -> bool {
        self == Agent::ClaudeCode
    }

    /// Whether [`Memory`] is needed for good. Else only before anything of the session's own was read.
    pub(crate) fn always_remembers(self) -> bool {
        self == Agent::CodexCli
    }

    /// The folder where running processes say which session of a transcripts folder they have open.
    pub(crate) fn processes_folder(self, folder: &Path) -> Option<PathBuf> {
        (self == Agent::ClaudeCode).then(|| folder.with_file_name("sessions"))
    }

    /// Whether the agent deletes its transcripts after a time.
    pub(crate) fn deletes_transcripts(self) -> bool {
        self == Agent::ClaudeCode
    }

    /// What `explain` shows of a line, and where on it each record begins. `is_whole`: it has its newline.
    pub(crate) fn explain(
        self,
        line: &[u8],
        kind: &TranscriptKind,
        is_whole: bool,
        memory: &mut Memory,
    ) -> Vec<(usize, Result<Explained, BadLine>)> {
        match self {
            Agent::ClaudeCode => claude::explain::explain(line, kind, is_whole),
            Agent::CodexCli => match codex::transcript::explain(line, memory.rollout.get_or_insert_default()) {
                Ok(explained) => explained.into_iter().map(|explained| (0, Ok(explained))).collect(),
                Err(bad) => vec![(0, Err(bad))],
            },
        }
    }

    /// Judges the bytes behind the last newline of a file.
    pub(crate) fn last_line(self, line: &[u8]) -> LastLine {
        let is_blank = |byte: &u8| byte.is_ascii_whitespace() || *byte == 0;
        let is_record = || match self {
            Agent::ClaudeCode => line::read_line(line, &TranscriptKind::SubAgent).is_ok(),
            Agent::CodexCli => codex::transcript::is_record(line),
        };
        if line.iter().all(is_blank) {
            LastLine::Blank
        } else if line.trim_ascii_end().last() == Some(&b'}') && !line.contains(&b'\n') && is_record() {
            LastLine::Complete
        } else {
            LastLine::Incomplete
        }
    }
}

impl Source {
    /// Reads one complete line, given without its newline, that begins at `offset`. Moves everything in `cursor` but
    /// its place, and `memory`.
    pub fn read(
        &self,
        line: &[u8],
        offset: u64,
        cursor: &mut Cursor,
        memory: &mut Memory,
        mut found: impl FnMut(Found),
    ) -> LineReport {
        if line.iter().all(u8::is_ascii_whitespace) {
            return LineReport { is_blank: true, ..LineReport::default() };
        }
        match self.agent {
            Agent::ClaudeCode => self.read_claude_code(line, offset, cursor, &mut memory.other, &mut found),
            Agent::CodexCli => {
                let rollout = memory.rollout.get_or_insert_default();
                codex::transcript::read(self, line, offset, cursor, rollout, &mut found)
            }
        }
    }
}
