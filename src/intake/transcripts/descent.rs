//! What a transcript has inherited: the files that it may have been copied from, and where its own lines begin.
//!
//! New files are put in order before they are read, copies behind what they were copied from
//! ([`copies`]). While nothing of its own was read of a file it is compared with its ancestors: what
//! both have at their beginning is inherited. That is neither the copy's activity nor its registration; whose turns it
//! holds is told by who was read first.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

use super::Follower;
use super::compressed::{self, is_compressed};
use super::followed::Followed;
use super::reader::{open, open_lines};
use super::tail::{Tail, read_full_at};
use crate::agent::{Agent, Memory};
use crate::claude::copies::{self, Look, Place, Said};
use crate::event::{Cursor, Timestamp};
use crate::transcript::{START, Source, TranscriptKind};

/// Bytes at the end of a file that are looked at.
const TAIL_BYTES: u64 = 64 << 10;

/// Bytes at the beginning that are looked at first, and at most: until the first line of the conversation has come, which may be
/// long, or stand behind long state.
const HEAD_BYTES: usize = 64 << 10;
const HEAD_BYTES_MAX: usize = 16 << 20;

/// Longest line that is compared. Longer ones say nothing of where they are from.
const COMPARED_BYTES_MAX: u64 = 1 << 20;

/// Lines of its ancestors with which a file is compared.
const COMPARED_LINES_MAX: usize = 1 << 20;

/// A new file, and how it is to be read.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Fresh {
    pub(crate) place: Place,
    pub(crate) path: PathBuf,
    /// Those it may have been copied from. `None`: it does not tell yet.
    pub(crate) ancestors: Option<Vec<PathBuf>>,
}

/// What a transcript tells of its descent. Nothing where it can't be read, or is a sub-agent's.
pub(crate) fn look_at(path: &Path, kind: Option<(Agent, TranscriptKind)>) -> Look {
    let Some((agent, TranscriptKind::Main { session })) = kind else { return Look::at(Uuid::nil(), b"", b"") };
    let read = || -> io::Result<Look> {
        let (file, metadata) = open(path)?;
        let head = head_of(path, &file, agent)?;
        let mut tail = Vec::new();
        if metadata.len() > head.len() as u64 && agent.copies_lines() {
            tail.resize(TAIL_BYTES as usize, 0);
            let length = read_full_at(&file, &mut tail, metadata.len().saturating_sub(TAIL_BYTES))?;
            tail.truncate(length);
        }
        let born = metadata.created().ok().and_then(|born| Timestamp::try_from(born).ok());
        Ok(Look { born, bytes: metadata.len(), ..agent.look(session, &head, &tail) })
    };
    read().unwrap_or_else(|_| Look::at(session, b"", b""))
}

/// The beginning of a file, with the first line of its conversation if that is there.
fn head_of(path: &Path, file: &File, agent: Agent) -> io::Result<Vec<u8>> {
    if is_compressed(path) {
        return compressed::head(file.try_clone()?, HEAD_BYTES_MAX as u64);
    }
    let mut head = vec![0; HEAD_BYTES];
    loop {
        let length = read_full_at(file, &mut head, 0)?;
        if length < head.len() || head.len() >= HEAD_BYTES_MAX || agent.is_head_complete(&head) {
            head.truncate(length);
            return Ok(head);
        }
        head.resize(4 * head.len(), 0);
    }
}

/// The uuid of the first line of a transcript's conversation, as far as its head tells.
fn root_of(path: &Path) -> Option<String> {
    copies::root(&head_of(path, &open(path).ok()?.0, Agent::ClaudeCode).ok()?)
}

/// The place of each file in the order of reading, and its ancestors, where it tells them.
pub(crate) fn with_ancestors<'a>(
    looks: &'a [Look],
    paths: &'a [PathBuf],
) -> impl Iterator<Item = (Place, &'a PathBuf, Option<Vec<PathBuf>>)> {
    copies::reading_order(looks).into_iter().zip(looks).zip(paths).map(|((reading, look), path)| {
        let ancestors = reading.ancestors.iter().filter_map(|index| paths.get(*index).cloned());
        (reading.place, path, look.root.as_ref().map(|_| ancestors.collect()))
    })
}

/// A transcript that is compared with others.
pub(crate) struct Compared<'a> {
    pub(crate) path: &'a Path,
    pub(crate) session: Uuid,
    /// What of it is looked at.
    pub(crate) bytes: u64,
    /// Asked at each line: false ends the comparison.
    pub(crate) may_go_on: &'a dyn Fn() -> bool,
}

impl Compared<'_> {
    /// Where its first line begins that none of these has; at its end, as far as it is looked at, where there is none: all it
    /// has may be inherited so far.
    pub(crate) fn inherited_to(&self, ancestors: &[PathBuf]) -> io::Result<u64> {
        let mut known = HashSet::new();
        for ancestor in ancestors {
            // One that is gone, or can't be read, has nothing in common; one that ends in the middle has what was read.
            let _ = self.note_uuids(ancestor, &mut known);
        }
        let (file, _) = open(self.path)?;
        let mut end = 0;
        Tail::new(self.bytes, COMPARED_BYTES_MAX).for_each_line(&file, |offset, line| {
            let said = Said::read(line);
            let is_own = said.as_ref().is_some_and(|said| {
                !said.is_of_another(self.session) && said.uuid.as_ref().is_some_and(|uuid| !known.contains(&hash(uuid)))
            });
            if said.is_some() && !is_own {
                end = offset + line.len() as u64 + 1;
            }
            !is_own && (self.may_go_on)()
        })?;
        Ok(end)
    }

    /// Adds the uuids of an ancestor's lines, as hashes.
    fn note_uuids(&self, ancestor: &Path, known: &mut HashSet<u64>) -> io::Result<()> {
        let (file, metadata) = open(ancestor)?;
        let mut tail = Tail::new(metadata.len(), COMPARED_BYTES_MAX);
        tail.for_each_line(&file, |_, line| {
            known.extend(uuid_hash(line));
            known.len() < COMPARED_LINES_MAX && (self.may_go_on)()
        })?;
        // Its last line may not be finished for its own reader.
        let (_, line) = tail.last_line(&file, Agent::ClaudeCode)?;
        known.extend(uuid_hash(&line));
        Ok(())
    }
}

fn uuid_hash(line: &[u8]) -> Option<u64> {
    Said::read(line)?.uuid.as_deref().map(hash)
}

fn hash(uuid: &str) -> u64 {
    xxh3_64(uuid.as_bytes())
}

/// The transcripts that are known, by the first uuid of their conversation: they are looked up once in a rescan.
#[derive(Default)]
pub(crate) struct Families(HashMap<u64, Vec<PathBuf>>);

impl Follower {
    /// New files in the order in which they are to be read: copies after what they were copied from.
    pub(super) fn in_order_of_reading(&mut self, mut paths: Vec<PathBuf>) -> Vec<Fresh> {
        let new = paths.len();
        let mut looks: Vec<Look> = paths.iter().map(|path| self.look_at_head(path)).collect();
        self.add_known_families(&mut looks, &mut paths);
        let mut ordered = Vec::with_capacity(new);
        for (place, path, ancestors) in with_ancestors(&looks, &paths).take(new) {
            self.in_order |= place.is_copy;
            ordered.push(Fresh { place, path: path.clone(), ancestors });
        }
        ordered.sort_unstable();
        ordered
    }

    fn look_at_head(&self, path: &Path) -> Look {
        // Nothing is read any more when it is stopped.
        look_at(path, self.kind_of(path).filter(|_| self.may_go_on()))
    }

    /// Adds the known transcripts of the same families to looks at new ones: these may have been copied from them.
    fn add_known_families(&mut self, looks: &mut Vec<Look>, paths: &mut Vec<PathBuf>) {
        let roots: HashSet<u64> = looks.iter().filter_map(|look| look.root.as_deref().map(hash)).collect();
        if roots.is_empty() {
            return;
        }
        let known = self.known_families.take().unwrap_or_else(|| self.look_up_families());
        let new: HashSet<PathBuf> = paths.iter().cloned().collect();
        for path in roots.iter().filter_map(|root| known.0.get(root)).flatten().filter(|path| !new.contains(*path)) {
            looks.push(Look { is_known: true, ..self.look_at_head(path) });
            paths.push(path.clone());
        }
        self.known_families = Some(known);
    }

    /// The transcripts that were read before.
    fn look_up_families(&self) -> Families {
        let mut families = Families::default();
        for file in self
            .files
            .values()
            .filter(|file| file.cursor.offset > 0 && file.session().is_some() && file.agent.copies_lines())
        {
            if !self.may_go_on() {
                break;
            }
            if let Some(root) = root_of(&file.path) {
                families.0.entry(hash(&root)).or_default().push(file.path.to_path_buf());
            }
        }
        families
    }

    /// Finds out what a file has inherited, before anything of its own was read.
    pub(super) fn note_beginning(&mut self, file: &mut Followed, size: u64, source: &mut Source) -> io::Result<()> {
        let Some(session) = file.session() else { return Ok(()) };
        if file.has_begun() {
            file.beginning = None;
            return Ok(());
        }
        let agent = file.agent;
        let path = Arc::clone(&file.path);
        let beginning = file.beginning.get_or_insert_default();
        if beginning.ancestors.is_none() && agent.copies_lines() {
            beginning.ancestors = self.ancestors_of(&path);
        }
        let ancestors = beginning.ancestors.as_deref().unwrap_or_default();
        if !ancestors.is_empty() && beginning.compared_to < size {
            let compared = Compared { path: &path, session, bytes: size, may_go_on: &|| self.may_go_on() };
            beginning.inherited_to = compared.inherited_to(ancestors)?;
            beginning.compared_to = size;
        }
        source.inherited_to = beginning.inherited_to;
        if !std::mem::replace(&mut beginning.remembers, true) {
            beginning.memory = self.read_again(&path, &file.cursor, source)?;
        }
        Ok(())
    }

    /// The files from which this one may have been copied. `None`: it does not tell yet.
    fn ancestors_of(&mut self, path: &Path) -> Option<Vec<PathBuf>> {
        let mut looks = vec![self.look_at_head(path)];
        let mut paths = vec![path.to_owned()];
        self.add_known_families(&mut looks, &mut paths);
        with_ancestors(&looks, &paths).next().and_then(|(_, _, ancestors)| ancestors)
    }

    /// What the lines before the cursor leave in memory.
    fn read_again(&self, path: &Path, cursor: &Cursor, source: &Source) -> io::Result<Memory> {
        let (mut scratch, mut memory) = (START, Memory::default());
        if cursor.offset == 0 {
            return Ok(memory);
        }
        let (file, _, _) = open_lines(path)?;
        let mut tail = Tail::new(cursor.offset, self.config.line_bytes_max);
        tail.for_each_line(&file, |offset, line| {
            source.read(line, offset, &mut scratch, &mut memory, |_| {});
            self.may_go_on()
        })?;
        // It may have been read without its newline.
        let (_, line) = tail.last_line(&file, source.agent)?;
        source.read(&line, tail.offset(), &mut scratch, &mut memory, |_| {});
        memory.other = memory.other.map(|other| other.ended_through(cursor.session.ended_through));
        Ok(memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: Uuid = Uuid::from_u128(1);

    fn line(uuid: &str) -> String {
        format!(r#"{{"type":"user","uuid":"{uuid}","sessionId":"{SESSION}","message":{{"content":"{uuid}"}}}}"#)
    }

    fn of_another(uuid: &str) -> String {
        line(uuid).replace(&SESSION.to_string(), &Uuid::from_u128(2).to_string())
    }

    /// How many of these lines are inherited from a file with those.
    fn inherited(lines: &[String], ancestors: &[&[String]]) -> usize {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, lines: &[String]| {
            let path = folder.path().join(name);
            std::fs::write(&path, lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
            path
        };
        let path = write("copy", lines);
        let ancestors: Vec<PathBuf> =
            ancestors.iter().enumerate().map(|(number, lines)| write(&number.to_string(), lines)).collect();
        let size = std::fs::metadata(&path).unwrap().len();
        let compared = Compared { path: &path, session: SESSION, bytes: size, may_go_on: &|| true };
        let end = compared.inherited_to(&ancestors).unwrap();
        let ends = lines.iter().scan(0, |end, line| {
            *end += line.len() as u64 + 1;
            Some(*end)
        });
        ends.take_while(|before| *before <= end).count()
    }

    #[test]
    fn what_both_have_at_their_beginning_is_inherited() {
        let state = || r#"{"type":"mode","mode":"normal"}"#.to_owned();
        let damaged = || "garbage".to_owned();
        let [a, b, c, d] = ["a", "b", "c", "d"].map(line);
        let lines = |lines: &[&String]| lines.iter().map(|line| (*line).clone()).collect::<Vec<_>>();
        let original = lines(&[&a, &b, &c]);
        let of = |copy: &[&String]| inherited(&lines(copy), &[&original]);
        assert_eq!(of(&[&a, &b, &c, &d]), 3);
        assert_eq!(of(&[&a, &b, &d, &c]), 2, "only the beginning");
        assert_eq!(of(&[&d, &a, &b]), 0);
        assert_eq!(of(&[&a, &c, &d]), 2, "what the original has more makes no difference");
        assert_eq!(of(&[&a, &c, &b, &b, &d]), 4, "nor does the order, or that one comes twice");
        assert_eq!(of(&[&a, &b]), 2, "all it has so far");
        assert_eq!(of(&[&state(), &a, &damaged(), &state(), &b, &state(), &d]), 5, "state and damage say nothing");
        let without_uuid = a.replace("uuid", "other");
        assert_eq!(of(&[&a, &without_uuid, &b, &d]), 3, "nor does a line without a uuid");
        assert_eq!(of(&[&of_another("x"), &a, &d]), 2, "a line that says so itself");
        assert_eq!(inherited(&lines(&[&a, &b, &c, &d]), &[&lines(&[&a, &c]), &lines(&[&a, &b])]), 3, "of whichever");
        assert_eq!(inherited(&lines(&[&d]), &[]), 0);
    }

    #[test]
    fn lines_that_are_too_long_are_passed_over() {
        let [a, b, c] = ["a", "b", "c"].map(line);
        let long = line(&"x".repeat(COMPARED_BYTES_MAX as usize));
        assert_eq!(inherited(&[a.clone(), long.clone(), b.clone(), c], &[&[a, long, b]]), 3);
    }

    #[test]
    fn a_last_line_without_newline_of_an_ancestor_counts() {
        let folder = tempfile::tempdir().unwrap();
        let [original, copy] = ["original", "copy"].map(|name| folder.path().join(name));
        std::fs::write(&original, format!("{}\n{}", line("a"), line("b"))).unwrap();
        let text = format!("{}\n{}\n{}\n", line("a"), line("b"), line("c"));
        std::fs::write(&copy, &text).unwrap();
        let bytes = text.len() as u64;
        let compared = Compared { path: &copy, session: SESSION, bytes, may_go_on: &|| true };
        assert_eq!(compared.inherited_to(&[original]).unwrap(), 2 * (line("a").len() as u64 + 1));
    }

    #[test]
    fn the_head_reaches_to_the_first_words_however_long_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let state = format!(r#"{{"type":"api-request","x":"{}"}}"#, "y".repeat(HEAD_BYTES));
        for before in [state.clone(), format!("{state}\n{}", line(&"z".repeat(3 << 20)).replace("user", "mode"))] {
            std::fs::write(&path, format!("{before}\n{}\n", line("a"))).unwrap();
            assert_eq!(root_of(&path).as_deref(), Some("a"));
        }
        let long = line("a").replace(r#""content":"a""#, &format!(r#""content":"{}""#, "z".repeat(5 << 20)));
        std::fs::write(&path, format!("{}{long}\n", "{\"type\":\"summary\"}\n".repeat(70))).unwrap();
        assert_eq!(root_of(&path).as_deref(), Some("a"));
    }

    #[test]
    fn an_ancestor_that_is_gone_has_nothing_in_common() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("copy");
        std::fs::write(&path, line("a") + "\n").unwrap();
        let compared = Compared { path: &path, session: SESSION, bytes: 1000, may_go_on: &|| true };
        assert_eq!(compared.inherited_to(&[folder.path().join("gone")]).unwrap(), 0);
        assert!(
            Compared { path: &folder.path().join("no"), ..compared }.inherited_to(std::slice::from_ref(&path)).is_err()
        );
    }
}
