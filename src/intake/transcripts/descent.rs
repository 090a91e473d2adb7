//! What a transcript has inherited: the files that it may have been copied from, and where its own lines begin.
//!
//! New files are put in order before they are read, copies behind what they were copied from
//! ([`copies`](crate::claude::copies)). While nothing of its own was read of a file it is compared with its ancestors: what
//! both have at their beginning is inherited. That is neither the copy's activity nor its registration; whose turns it
//! holds is told by who was read first.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::reading::{Followed, ReadError, open, read_full_at};
use super::{Follower, HEAD_BYTES};
use crate::claude::copies::{self, ANCESTORS_MAX, Look, Place, Said};
use crate::claude::line::TranscriptKind;
use crate::claude::transcript::{OtherSession, START, Source};
use crate::event::{Cursor, Timestamp};
use crate::queue::QueueError;

/// How long ago the first words of a new file must have been said for others to be searched for the same: those of a new
/// session have just been said.
const SAID_BEFORE_SECONDS_MIN: i64 = 2;

/// A new file, and how it is to be read.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub struct Fresh {
    /// `None`: it was read in part already.
    pub place: Option<Place>,
    pub path: PathBuf,
    /// Those it may have been copied from. `None`: it does not tell yet.
    pub ancestors: Option<Vec<PathBuf>>,
}

/// What is known of the beginning of a file.
#[derive(Default)]
pub struct Beginning {
    /// The files it may have been copied from. `None`: not looked up, or the file does not tell yet.
    pub ancestors: Option<Vec<PathBuf>>,
    /// Lines that begin before here were inherited.
    pub inherited_to: u64,
    /// The file was compared with its ancestors as far as this.
    compared_to: u64,
    /// The other session whose lines were read last.
    pub other: Option<OtherSession>,
    /// `other` is what the lines before the cursor say.
    knows_other: bool,
}

impl Beginning {
    pub fn of_copy_of(ancestors: Vec<PathBuf>) -> Beginning {
        Beginning { ancestors: Some(ancestors), ..Beginning::default() }
    }
}

/// What a transcript tells of its descent. Nothing where it can't be read, or is a sub-agent's.
pub fn look_at(path: &Path, kind: Option<TranscriptKind>) -> Look {
    let Some(TranscriptKind::Main { session }) = kind else { return Look::at(Uuid::nil(), b"", b"") };
    let read = || -> io::Result<Look> {
        let (file, metadata) = open(path)?;
        let mut bytes = vec![0; HEAD_BYTES];
        let length = read_full_at(&file, &mut bytes, 0)?;
        let head = bytes.get(..length).unwrap_or_default().to_vec();
        let mut tail: &[u8] = b"";
        if metadata.len() > HEAD_BYTES as u64 {
            let length = read_full_at(&file, &mut bytes, metadata.len() - HEAD_BYTES as u64)?;
            tail = bytes.get(..length).unwrap_or_default();
        }
        let born = metadata.created().ok().and_then(|born| Timestamp::try_from(born).ok());
        Ok(Look { born, bytes: metadata.len(), ..Look::at(session, &head, tail) })
    };
    read().unwrap_or_else(|_| Look::at(session, b"", b""))
}

/// The uuid of the first line of a transcript's conversation, as far as its head tells.
fn root_of(path: &Path, buffer: &mut Vec<u8>) -> Option<String> {
    let (file, _) = open(path).ok()?;
    buffer.resize(HEAD_BYTES, 0);
    let length = read_full_at(&file, buffer, 0).ok()?;
    copies::root(buffer.get(..length)?)
}

/// The place of each file in the order of reading, and its ancestors, where it tells them.
pub fn with_ancestors<'a>(
    looks: &'a [Look],
    paths: &'a [PathBuf],
) -> impl Iterator<Item = (Place, &'a PathBuf, Option<Vec<PathBuf>>)> {
    copies::reading_order(looks).into_iter().zip(looks).zip(paths).map(|((reading, look), path)| {
        let ancestors = reading.ancestors.iter().filter_map(|index| paths.get(*index).cloned());
        (reading.place, path, look.root.as_ref().map(|_| ancestors.collect()))
    })
}

/// A transcript that is compared with others.
pub struct Compared<'a> {
    pub path: &'a Path,
    pub session: Uuid,
    /// What of it is looked at.
    pub bytes: u64,
    pub line_bytes_max: u64,
    /// Asked at each line: false ends the comparison.
    pub may_go_on: &'a dyn Fn() -> bool,
}

impl Compared<'_> {
    /// Where the part of it ends that one of these has, too. All that it has may be of that part so far.
    pub fn inherited_to(&self, ancestors: &[PathBuf]) -> io::Result<u64> {
        let common = |ancestor: &PathBuf| common_beginning(self, ancestor);
        ancestors.iter().map(common).try_fold(0, |longest, common| Ok(longest.max(common?)))
    }
}

fn common_beginning(compared: &Compared<'_>, ancestor: &Path) -> io::Result<u64> {
    let Compared { path, session, bytes, line_bytes_max, may_go_on } = *compared;
    let mut lines = Lines::open(path, bytes, line_bytes_max)?;
    // One that is gone, or can't be read, has nothing in common.
    let Ok(mut theirs) = Lines::open(ancestor, u64::MAX, line_bytes_max) else { return Ok(0) };
    let mut has = |uuid: &str| -> bool {
        while let Ok(Some((_, line))) = theirs.next()
            && may_go_on()
        {
            if Said::read(line).is_some_and(|said| said.uuid.as_deref() == Some(uuid)) {
                return true;
            }
        }
        false
    };
    let mut end = 0;
    while let Some((_, line)) = lines.next()? {
        let Some(said) = Said::read(line) else { continue };
        if said.is_of_another(session) || said.uuid.is_some_and(|uuid| has(&uuid)) {
            end = lines.offset;
        } else {
            break;
        }
    }
    Ok(end)
}

/// The whole lines of a file, without their newlines; those that are too long are passed over.
struct Lines {
    file: io::Take<BufReader<File>>,
    /// Behind the last line.
    offset: u64,
    line: Vec<u8>,
    line_bytes_max: u64,
}

impl Lines {
    fn open(path: &Path, size: u64, line_bytes_max: u64) -> io::Result<Lines> {
        let (mut file, _) = open(path)?;
        file.rewind()?;
        Ok(Lines { file: BufReader::new(file).take(size), offset: 0, line: Vec::new(), line_bytes_max })
    }

    /// Where the next line begins, and the line.
    fn next(&mut self) -> io::Result<Option<(u64, &[u8])>> {
        loop {
            self.line.clear();
            let start = self.offset;
            let limit = self.line_bytes_max.saturating_add(1);
            let length = self.file.by_ref().take(limit).read_until(b'\n', &mut self.line)?;
            self.offset += length as u64;
            if self.line.last() == Some(&b'\n') {
                self.line.pop();
                return Ok(Some((start, &self.line)));
            }
            if (length as u64) < limit {
                return Ok(None);
            }
            self.offset += self.file.skip_until(b'\n')? as u64;
        }
    }
}

impl Follower {
    /// New files in the order in which they are to be read: those that were read in part, then the others, copies after what
    /// they were copied from.
    pub(super) fn in_order_of_reading(&mut self, fresh: Vec<PathBuf>) -> Result<Vec<Fresh>, QueueError> {
        let (adopted, paths): (Vec<_>, Vec<_>) = fresh.into_iter().partition(|path| self.adopted.contains_key(path));
        let looks: Vec<Look> = paths.iter().map(|path| self.look_at_head(path)).collect();
        let known = self.known_families(&looks, &paths)?;
        let mut ordered = Vec::with_capacity(paths.len());
        for ((place, path, mut ancestors), look) in with_ancestors(&looks, &paths).zip(&looks) {
            if let (Some(ancestors), Some(family)) =
                (&mut ancestors, look.root.as_ref().and_then(|root| known.get(root)))
            {
                ancestors.extend(family.iter().cloned());
            }
            self.in_order |= place.is_copy || ancestors.as_ref().is_some_and(|ancestors| !ancestors.is_empty());
            ordered.push(Fresh { place: Some(place), path: path.clone(), ancestors });
        }
        ordered.extend(adopted.into_iter().map(|path| Fresh { place: None, path, ancestors: None }));
        ordered.sort_unstable();
        Ok(ordered)
    }

    fn look_at_head(&self, path: &Path) -> Look {
        // Nothing is read any more when it is stopped.
        look_at(path, self.kind_of(path).filter(|_| self.may_go_on()))
    }

    /// Notes that reading makes progress. False: it is to end.
    fn may_go_on(&self) -> bool {
        self.intake.metrics().reading.beat();
        !self.doorbell.is_stopped()
    }

    /// The transcripts that are known already, by the first uuid of their conversation, as far as a new one has the same: it
    /// may have been copied from them. Of each family the latest ones.
    fn known_families(&self, new: &[Look], new_paths: &[PathBuf]) -> Result<HashMap<String, Vec<PathBuf>>, QueueError> {
        let now = Timestamp::now();
        let is_old = |said_at: Timestamp| now.duration_since(said_at).as_secs() >= SAID_BEFORE_SECONDS_MIN;
        let roots = new.iter().filter(|look| look.said_at.is_none_or(is_old)).filter_map(|look| look.root.clone());
        let mut families: HashMap<String, Vec<PathBuf>> = roots.map(|root| (root, Vec::new())).collect();
        if families.is_empty() {
            return Ok(families);
        }
        let mut known: HashSet<PathBuf> = self.files.keys().map(|path| path.to_path_buf()).collect();
        self.intake.queue().for_each_cursor(|path, _| {
            known.insert(path);
        })?;
        new_paths.iter().for_each(|path| drop(known.take(path)));
        let stems: HashSet<Uuid> = new.iter().map(|look| look.stem).collect();
        let mut buffer = Vec::new();
        for path in known {
            if !self.may_go_on() {
                break;
            }
            if self.session_of(&path).is_some_and(|session| !stems.contains(&session))
                && let Some(root) = root_of(&path, &mut buffer)
                && let Some(family) = families.get_mut(&root)
            {
                family.push(path);
            }
        }
        for family in families.values_mut() {
            family.sort_by_cached_key(|path| std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok());
            family.drain(..family.len().saturating_sub(ANCESTORS_MAX));
        }
        Ok(families)
    }

    /// Finds out what a file has inherited, before anything of its own was read.
    pub(super) fn note_beginning(&self, file: &mut Followed, size: u64, source: &mut Source) -> Result<(), ReadError> {
        let TranscriptKind::Main { session } = file.kind else { return Ok(()) };
        if file.cursor.session.last_activity.is_some() {
            file.beginning = None;
            return Ok(());
        }
        let beginning = file.beginning.get_or_insert_default();
        if beginning.ancestors.is_none() {
            beginning.ancestors = self.ancestors_of(&file.path)?;
        }
        let line_bytes_max = self.config.line_bytes_max;
        let ancestors = beginning.ancestors.as_deref().unwrap_or_default();
        if !ancestors.is_empty() && beginning.compared_to < size {
            let may_go_on = &|| self.may_go_on();
            let compared = Compared { path: &file.path, session, bytes: size, line_bytes_max, may_go_on };
            beginning.inherited_to = compared.inherited_to(ancestors)?;
            beginning.compared_to = size;
        }
        source.inherited_to = beginning.inherited_to;
        if !std::mem::replace(&mut beginning.knows_other, true) {
            beginning.other = self.read_again(&file.path, &file.cursor, source)?;
        }
        Ok(())
    }

    /// The files from which this one may have been copied. `None`: it does not tell yet.
    fn ancestors_of(&self, path: &Path) -> Result<Option<Vec<PathBuf>>, QueueError> {
        let looks = [self.look_at_head(path)];
        let mut families = self.known_families(&looks, &[path.to_owned()])?;
        let [look] = looks;
        Ok(look.root.map(|root| families.remove(&root).unwrap_or_default()))
    }

    /// The other session of which the lines before the cursor told last.
    fn read_again(&self, path: &Path, cursor: &Cursor, source: &Source) -> io::Result<Option<OtherSession>> {
        let (mut scratch, mut other) = (START, None);
        if cursor.offset == 0 {
            return Ok(None);
        }
        let mut lines = Lines::open(path, cursor.offset, self.config.line_bytes_max)?;
        while let Some((start, line)) = lines.next()?
            && self.may_go_on()
        {
            source.read(line, start, &mut scratch, &mut other, |_| {});
        }
        // A last line that was read without its newline.
        source.read(&lines.line, lines.offset - lines.line.len() as u64, &mut scratch, &mut other, |_| {});
        Ok(other.map(|other| other.ended_through(cursor.session.ended_through)))
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
    fn inherited(lines: &[String], ancestors: &[&[String]], line_bytes_max: u64) -> usize {
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
        let compared = Compared { path: &path, session: SESSION, bytes: size, line_bytes_max, may_go_on: &|| true };
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
        let of = |copy: &[&String]| inherited(&lines(copy), &[&original], 1000);
        assert_eq!(of(&[&a, &b, &c, &d]), 3);
        assert_eq!(of(&[&a, &b, &d, &c]), 2, "only the beginning");
        assert_eq!(of(&[&d, &a, &b]), 0);
        assert_eq!(of(&[&a, &c, &d]), 2, "what the original has more makes no difference");
        assert_eq!(of(&[&a, &b]), 2, "all it has so far");
        assert_eq!(of(&[&state(), &a, &damaged(), &state(), &b, &state(), &d]), 5, "state and damage say nothing");
        assert_eq!(of(&[&of_another("x"), &a, &d]), 2, "a line that says so itself");
        assert_eq!(
            inherited(&lines(&[&a, &b, &d]), &[&lines(&[&a]), &lines(&[&a, &b])], 1000),
            2,
            "the longest counts"
        );
        assert_eq!(inherited(&lines(&[&a]), &[], 1000), 0);
    }

    #[test]
    fn lines_that_are_too_long_are_passed_over() {
        let [a, b, c] = ["a", "b", "c"].map(line);
        let long = line(&"x".repeat(5000));
        assert_eq!(inherited(&[a.clone(), long.clone(), b.clone(), c], &[&[a, long, b]], 200), 3);
    }

    #[test]
    fn an_ancestor_that_is_gone_has_nothing_in_common() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("copy");
        std::fs::write(&path, line("a") + "\n").unwrap();
        let compared =
            Compared { path: &path, session: SESSION, bytes: 1000, line_bytes_max: 1000, may_go_on: &|| true };
        assert_eq!(compared.inherited_to(&[folder.path().join("gone")]).unwrap(), 0);
        assert!(
            Compared { path: &folder.path().join("no"), ..compared }.inherited_to(std::slice::from_ref(&path)).is_err()
        );
    }
}
