//! Counts what stands on disk, for `verify`: reads every transcript from its first byte by the very rules of the
//! follower, and says of each turn and registration whether the follower's cursor is past it. Changes nothing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use super::super::sessions;
use super::descent::{Compared, look_at, with_ancestors};
use super::reader::open_lines;
use super::scanner::{self, DEPTH_MAX};
use super::tail::Tail;
use crate::agent::{Agent, AgentFolder, Memory};
use crate::event::{Candidate, Cursor, Origin, Timestamp};
use crate::transcript::{Found, LastLine, START, Source, TranscriptKind};

/// How transcripts are found and read: as the follower does.
#[derive(Clone, Debug)]
pub(crate) struct Census {
    folders: Vec<AgentFolder>,
    line_bytes_max: u64,
    inactivity_timeout: Duration,
    /// The sessions that have a transcript of their own with anything said in it, as they were found.
    sessions: HashSet<Uuid>,
}

/// The transcript of a session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct MainTranscript {
    pub path: PathBuf,
    pub agent: Agent,
    pub session: Uuid,
    /// Those it may have been copied from.
    pub ancestors: Vec<PathBuf>,
}

/// The transcripts that were found.
#[derive(Default, Debug)]
pub(crate) struct Transcripts {
    /// Those of sessions, in the order in which they are to be read: copies after what they were copied from.
    pub main: Vec<MainTranscript>,
    /// Sub-agents', whose lines are no turns.
    pub sub_agents: u64,
    /// Bytes of the main ones, as they were found.
    pub bytes: u64,
    /// Folders that can't be looked into, and why.
    pub unreadable: Vec<(PathBuf, String)>,
    /// Folders that do not exist, of agents that are expected to be used.
    pub missing_folders: Vec<PathBuf>,
}

/// A turn, or a session's registration, that stands on disk.
pub(crate) struct Sighting {
    pub candidate: Candidate,
    /// Where its record begins.
    pub offset: u64,
    /// The follower's cursor is past it: it was handed to the queue.
    pub is_read: bool,
}

/// One transcript, read to its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Extent {
    pub bytes: u64,
    /// Bytes that the follower has read.
    pub read_bytes: u64,
    pub modified: Timestamp,
    /// Where its last line begins, if that is incomplete: without newline, and no whole object.
    pub incomplete_at: Option<u64>,
}

/// How many lines of the user's side are no turns, by the reason.
pub(crate) type NoTurns = BTreeMap<&'static str, u64>;

impl Census {
    pub(crate) fn new(folders: Vec<AgentFolder>, line_bytes_max: u64, inactivity_timeout: Duration) -> Census {
        Census { folders, line_bytes_max, inactivity_timeout, sessions: HashSet::new() }
    }

    /// Looks for all transcripts.
    pub(crate) fn find(&mut self) -> Transcripts {
        let mut found = Transcripts::default();
        let mut main = Vec::new();
        let walk = |folder: &AgentFolder| walkdir::WalkDir::new(&folder.path).follow_links(true).max_depth(DEPTH_MAX);
        let walks = self.folders.iter().flat_map(|folder| walk(folder).into_iter().map(|entry| (folder.agent, entry)));
        for (agent, entry) in walks {
            match entry {
                Ok(entry) if entry.depth() == 0 && !entry.file_type().is_dir() => {
                    found.unreadable.push((entry.into_path(), "it is no folder".to_owned()));
                }
                Ok(entry) if entry.file_type().is_file() => match self.kind_of(entry.path()) {
                    Some((_, TranscriptKind::SubAgent)) => found.sub_agents += 1,
                    Some(kind) => {
                        found.bytes += entry.metadata().map_or(0, |metadata| metadata.len());
                        main.push((look_at(entry.path(), Some(kind)), entry.into_path()));
                    }
                    None => {}
                },
                Ok(_) => {}
                Err(error) => {
                    let kind = error.io_error().map(io::Error::kind);
                    match (kind, error.path()) {
                        (Some(io::ErrorKind::NotFound), Some(path)) if error.depth() == 0 => {
                            found.missing_folders.extend(agent.is_expected().then(|| path.to_owned()));
                        }
                        (kind, Some(path)) if error.depth() == 0 || kind == Some(io::ErrorKind::PermissionDenied) => {
                            found.unreadable.push((path.to_owned(), error.to_string()));
                        }
                        _ => {}
                    }
                }
            }
        }
        let (looks, paths): (Vec<_>, Vec<_>) = main.into_iter().unzip();
        let mut ordered: Vec<_> = with_ancestors(&looks, &paths).collect();
        ordered.sort_unstable();
        let main = ordered.into_iter().filter_map(|(_, path, ancestors)| {
            let (agent, TranscriptKind::Main { session }) = self.kind_of(path)? else { return None };
            Some(MainTranscript { path: path.clone(), agent, session, ancestors: ancestors.unwrap_or_default() })
        });
        found.main = main.collect();
        self.sessions = looks.iter().filter(|look| look.root.is_some()).map(|look| look.stem).collect();
        found
    }

    fn kind_of(&self, path: &Path) -> Option<(Agent, TranscriptKind)> {
        scanner::kind_of(&self.folders, path)
    }

    /// Reads one transcript up to the size it has now. `cursor`: the follower's, as it stood before. `Ok(None)`: it is
    /// gone, or no transcript.
    pub(crate) fn read(
        &self,
        transcript: &MainTranscript,
        cursor: Option<&Cursor>,
        no_turns: &mut NoTurns,
        mut sighted: impl FnMut(Sighting),
    ) -> io::Result<Option<Extent>> {
        let MainTranscript { path, agent, session, ancestors } = transcript;
        let (agent, session) = (*agent, *session);
        let (handle, bytes, metadata) = match open_lines(path) {
            Ok(opened) => opened,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let read_bytes = match cursor {
            Some(cursor) if self.is_as_read(&handle, bytes, cursor)? => cursor.offset,
            _ => 0,
        };
        let may_register = read_bytes == 0 || cursor.is_some_and(|cursor| cursor.project_path.is_some());
        let compared = Compared { path, session, bytes, may_go_on: &|| true };
        let source = Source {
            agent,
            kind: TranscriptKind::Main { session },
            path: path.to_string_lossy().into(),
            inactivity_timeout: self.inactivity_timeout,
            active_max: sessions::active_max(&metadata, Timestamp::now()),
            inherited_to: if agent.copies_lines() { compared.inherited_to(ancestors)? } else { 0 },
        };
        let (mut scratch, mut memory) = (START, Memory::default());
        let mut take = |offset: u64, line: &[u8]| {
            source.read(line, offset, &mut scratch, &mut memory, |found| {
                let candidate = match found {
                    // The follower registers no session of which it has found nothing but what it inherited.
                    Found::Event(candidate) if candidate.event_type == "session_registered" && !may_register => return,
                    Found::Event(candidate) => candidate,
                    Found::OfOther(session, _) if self.sessions.contains(&session) => return,
                    Found::OfOther(_, candidate) => candidate,
                    Found::NoTurn(reason) => return *no_turns.entry(reason).or_default() += 1,
                    Found::Unreadable(_) => return,
                };
                let Origin::Transcript { offset, .. } = candidate.origin else { return };
                if matches!(candidate.event_type.as_str(), "turn_detected" | "session_registered") {
                    sighted(Sighting { is_read: offset < read_bytes, offset, candidate });
                }
            });
            true
        };
        let mut tail = Tail::new(bytes, self.line_bytes_max);
        tail.for_each_line(&handle, &mut take)?;
        // A last line without newline counts when it is complete: then the follower reads it, too, once its file is quiet.
        let (judged, line) = tail.last_line(&handle, agent)?;
        if judged == LastLine::Complete {
            take(tail.offset(), &line);
        }
        let incomplete_at = (judged == LastLine::Incomplete).then_some(tail.offset());
        let modified = metadata.modified().ok().and_then(|modified| Timestamp::try_from(modified).ok());
        let modified = modified.unwrap_or(Timestamp::MAX);
        Ok(Some(Extent { bytes, read_bytes, modified, incomplete_at }))
    }

    /// Whether the bytes before the cursor are those that were read.
    fn is_as_read(&self, handle: &File, bytes: u64, cursor: &Cursor) -> io::Result<bool> {
        match Tail::resume(handle, bytes, self.line_bytes_max, cursor, None) {
            Ok(tail) => Ok(tail.is_some()),
            // It was truncated meanwhile.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Cursors by path, as events name it.
pub(crate) type Cursors = HashMap<String, Cursor>;

#[cfg(test)]
mod tests {
    use super::super::tail::CHUNK_BYTES;
    use super::*;

    /// A projects folder with one transcript of these bytes, and the prompts in it: the text, where it begins, whether
    /// it was read.
    fn prompts(bytes: &[u8], line_bytes_max: u64, cursor: Option<&Cursor>) -> Vec<(String, u64, bool)> {
        let folder = tempfile::tempdir().unwrap();
        let projects = folder.path().to_owned();
        let path = projects.join("-app").join(format!("{}.jsonl", Uuid::from_u128(1)));
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        let folder = AgentFolder { agent: Agent::ClaudeCode, path: projects };
        let mut census = Census::new(vec![folder], line_bytes_max, Duration::from_secs(60));
        let session = Uuid::from_u128(1);
        let transcript = MainTranscript { path, agent: Agent::ClaudeCode, session, ancestors: Vec::new() };
        assert_eq!(census.find().main, std::slice::from_ref(&transcript));
        let mut found = Vec::new();
        census
            .read(&transcript, cursor, &mut NoTurns::new(), |sighting| {
                if let Some(text) = sighting.candidate.payload.get("text") {
                    found.push((text.as_str().unwrap().to_owned(), sighting.offset, sighting.is_read));
                }
            })
            .unwrap();
        found
    }

    fn prompt(text: &str) -> String {
        format!(r#"{{"type":"user","uuid":"{text}","message":{{"role":"user","content":"{text}"}}}}"#)
    }

    #[test]
    fn lines_of_every_length_are_found_at_their_place() {
        let long = "x".repeat(CHUNK_BYTES + CHUNK_BYTES / 2);
        let lines = [prompt("a"), prompt(&long), prompt("b"), prompt("c")];
        let text = lines.join("\n");
        let found = prompts(text.as_bytes(), 1 << 30, None);
        let mut offset = 0;
        let expected: Vec<u64> = lines
            .iter()
            .map(|line| {
                offset += line.len() as u64 + 1;
                offset - line.len() as u64 - 1
            })
            .collect();
        assert_eq!(found.iter().map(|(_, offset, _)| *offset).collect::<Vec<_>>(), expected);
        assert_eq!(found[1].0, long);
        assert_eq!(found[3].0, "c", "the last line is whole, though it has no newline");
        // What the follower passes over is no turn here either, in a chunk and beyond one.
        for limit in [100, CHUNK_BYTES as u64 + 5] {
            let found = prompts(text.as_bytes(), limit, None);
            assert_eq!(found.iter().map(|(text, ..)| text.as_str()).collect::<Vec<_>>(), ["a", "b", "c"], "{limit}");
        }
    }

    #[test]
    fn a_cut_last_line_is_no_turn() {
        let text = format!("{}\n{}", prompt("a"), prompt("b"));
        let found = prompts(&text.as_bytes()[..text.len() - 1], 1 << 20, None);
        assert_eq!(found, [("a".to_owned(), 0, false)]);
    }

    #[test]
    fn a_cursor_counts_only_for_the_bytes_that_were_read() {
        let (first, second) = (prompt("a"), prompt("b"));
        let text = format!("{first}\n{second}\n");
        let mut tail = Tail::new(text.len() as u64, 1 << 20);
        tail.for_each_line(text.as_bytes(), |_, _| false).unwrap();
        let (offset, fingerprint) = (tail.offset(), tail.fingerprint());
        let cursor = Cursor { offset, fingerprint, ..START };
        let read = |text: &str| -> Vec<bool> {
            prompts(text.as_bytes(), 1 << 20, Some(&cursor)).into_iter().map(|(_, _, is_read)| is_read).collect()
        };
        assert_eq!(read(&text), [true, false]);
        assert_eq!(read(&text.replace("\"a\"", "\"z\"")), [false, false], "the file was replaced");
        assert_eq!(read(&prompt("a")[..20]), [] as [bool; 0], "cut short");
    }
}
