//! The walk through the agents' folders: which transcripts are there, new, moved or gone, and which folders can't be read.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::DirEntry;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::{debug, info, warn};

use super::compressed::is_compressed;
use super::followed::{Files, identity};
use super::watching::Silence;
use crate::agent::{Agent, AgentFolder};
use crate::intake::sessions::Roots;
use crate::transcript::TranscriptKind;

/// Folders deep that are searched: Claude Code's `<project>/<session>/subagents/workflows/<run>/agent-x.jsonl` and some room.
pub(crate) const DEPTH_MAX: usize = 8;

/// What is known of one of the agents' folders.
#[derive(Clone, Default)]
struct Root {
    /// Whether the last walk found anything in it. If not, what is missing below it is not known to be gone.
    is_there: bool,
    /// Logged: it can't be read.
    is_missing: bool,
    /// Logged: there is nothing left, though transcripts are known.
    is_emptied: bool,
    /// Logged: it is another of the folders.
    is_second_name: bool,
    silence: Silence,
}

/// What a walk has found.
#[derive(Default)]
pub(crate) struct Scan {
    /// Files that are followed.
    pub(crate) met: Vec<Arc<Path>>,
    /// Others.
    pub(crate) fresh: Vec<PathBuf>,
    /// At the start, and after a whole folder was away.
    pub(crate) is_folder_new: bool,
}

pub(crate) struct Scanner {
    /// The agents' folders, outside of each other.
    folders: Vec<AgentFolder>,
    /// In their order.
    roots: Vec<Root>,
    /// Logged: folders below them that can't be read.
    unreadable: BTreeSet<PathBuf>,
}

impl Scanner {
    pub(crate) fn new(folders: Vec<AgentFolder>) -> Scanner {
        let roots = vec![Root::default(); folders.len()];
        Scanner { folders, roots, unreadable: BTreeSet::new() }
    }

    /// Folders that could not be read at the last walk. What does not exist has nothing to be read.
    pub(crate) fn unread_folders(&self) -> usize {
        let roots = self.folders.iter().zip(&self.roots);
        self.unreadable.len() + roots.filter(|(folder, root)| root.is_missing && !is_gone(&folder.path)).count()
    }

    pub(crate) fn kind_of(&self, path: &Path) -> Option<(Agent, TranscriptKind)> {
        kind_of(&self.folders, path)
    }

    pub(crate) fn roots_of(&self, path: &Path) -> Roots {
        self.root_of(path).map_or(Roots::default(), Roots::of)
    }

    /// Which of the folders holds this path.
    fn root_of(&self, path: &Path) -> Option<usize> {
        self.folders.iter().position(|folder| path.starts_with(&folder.path))
    }

    /// Walks through the folders. `may_go_on` is asked at each entry.
    pub(crate) fn scan(&mut self, files: &Files, may_go_on: &dyn Fn() -> bool) -> Scan {
        let mut scan = Scan::default();
        let mut unreadable = BTreeSet::new();
        for (index, folder) in self.folders.iter().enumerate() {
            let before = self.folders.get(..index).unwrap_or_default();
            let Some(root) = self.roots.get_mut(index) else { break };
            root.note_second_name(&folder.path, before);
            let is_walked = !root.is_second_name
                && root.walk(
                    folder,
                    &mut |path| {
                        if let Some(file) = files.get(path) {
                            scan.met.push(Arc::clone(&file.path));
                        } else if kind_of(&self.folders, path).is_some() {
                            scan.fresh.push(path.to_owned());
                        }
                    },
                    &mut unreadable,
                    may_go_on,
                );
            if !is_walked {
                unreadable.extend(self.unreadable.iter().filter(|unread| unread.starts_with(&folder.path)).cloned());
            }
            let is_known = || files.keys().any(|path| path.starts_with(&folder.path));
            scan.is_folder_new |= root.note_walk(folder, is_walked, is_known);
        }
        for folder in unreadable.difference(&self.unreadable) {
            warn!(folder = %folder.display(), "a folder can't be read; trying again at every rescan");
        }
        for folder in self.unreadable.difference(&unreadable) {
            info!(folder = %folder.display(), "the folder can be read again");
        }
        self.unreadable = unreadable;
        scan
    }

    /// The followed files that are gone for certain. `met`: by the walk before.
    pub(crate) fn vanished(&self, files: &Files, met: &[Arc<Path>]) -> Vec<PathBuf> {
        if met.len() == files.len() {
            return Vec::new();
        }
        let met: HashSet<&Path> = met.iter().map(AsRef::as_ref).collect();
        let is_there =
            |path: &Path| self.root_of(path).and_then(|root| self.roots.get(root)).is_some_and(|root| root.is_there);
        let unmet = files.keys().map(AsRef::as_ref).filter(|path: &&Path| !met.contains(path));
        unmet.filter(|path| is_there(path) && is_gone(path)).map(Path::to_owned).collect()
    }

    /// Notes that a notification has come for something below one of the folders.
    pub(crate) fn note_notification(&mut self, path: &Path) {
        if let Some(root) = self.root_of(path).and_then(|root| self.roots.get_mut(root)) {
            root.silence = Silence::default();
        }
    }

    /// Notes that a file was found to have changed without a notification. Returns the folder for which it is certain now that
    /// none arrive.
    pub(crate) fn note_silence(&mut self, path: &Path) -> Option<&Path> {
        let index = self.root_of(path)?;
        let (folder, root) = (&self.folders.get(index)?.path, self.roots.get_mut(index)?);
        // No watch reports what a link leads to elsewhere.
        let is_inside = path.canonicalize().ok()?.starts_with(folder.canonicalize().ok()?);
        if !is_inside || !root.silence.is_certain() {
            return None;
        }
        root.silence = Silence::default();
        Some(folder)
    }
}

impl Root {
    /// Notes whether this folder is one of those `before` it in the list, under another name.
    fn note_second_name(&mut self, projects: &Path, before: &[AgentFolder]) {
        let identity_of = |folder: &Path| std::fs::metadata(folder).map(|metadata| identity(&metadata)).ok();
        let own = if before.is_empty() { None } else { identity_of(projects) };
        let first = before.iter().map(|folder| &folder.path).find(|folder| own.is_some() && identity_of(folder) == own);
        if let Some(first) = first
            && !self.is_second_name
        {
            warn!(folder = %projects.display(), first = %first.display(),
                  "two of the transcripts folders are the same one; it is followed by the first name");
        }
        self.is_second_name = first.is_some();
    }

    /// Walks through this folder. False: it can't be read, or the walk was stopped.
    fn walk(
        &mut self,
        folder: &AgentFolder,
        met: &mut dyn FnMut(&Path),
        unreadable: &mut BTreeSet<PathBuf>,
        may_go_on: &dyn Fn() -> bool,
    ) -> bool {
        for entry in walkdir::WalkDir::new(&folder.path).follow_links(true).max_depth(DEPTH_MAX) {
            if !may_go_on() {
                return false;
            }
            match entry {
                Ok(entry) if entry.depth() == 0 && !entry.file_type().is_dir() => {
                    if !std::mem::replace(&mut self.is_missing, true) {
                        warn!(folder = %folder.path.display(),
                              "the transcripts folder is no folder; looking for it again at every rescan");
                    }
                    return false;
                }
                Ok(entry) if entry.file_type().is_file() => met(entry.path()),
                Ok(_) => {}
                Err(error) if error.depth() == 0 => {
                    let is_absent = !folder.agent.is_expected() && is_gone(&folder.path);
                    if !is_absent && !std::mem::replace(&mut self.is_missing, true) {
                        warn!(folder = %folder.path.display(), error = %error,
                              "the transcripts folder can't be read; looking for it again at every rescan");
                    }
                    return false;
                }
                Err(error) => {
                    let is_denied =
                        error.io_error().is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
                    match error.path() {
                        Some(path) if is_denied => drop(unreadable.insert(path.to_owned())),
                        // Links that lead nowhere or in circles, and what went while we looked.
                        _ => debug!(error = %error, "skipped"),
                    }
                }
            }
        }
        true
    }

    /// Notes how the walk went. `is_known`: whether transcripts below the folder are followed. Returns whether the folder was
    /// not there before.
    fn note_walk(&mut self, folder: &AgentFolder, is_walked: bool, is_known: impl Fn() -> bool) -> bool {
        // Removed during the walk, or unmounted: then what was not found says nothing.
        let is_there = is_walked && has_entries(folder);
        let is_emptied = is_walked && !is_there && is_known();
        if is_emptied && !self.is_emptied {
            warn!(folder = %folder.path.display(),
                  "the transcripts folder is empty; is it unmounted? Its sessions end by hook, process or inactivity only");
        }
        self.is_emptied = is_emptied || !is_walked && self.is_emptied;
        if is_there && std::mem::take(&mut self.is_missing) {
            info!(folder = %folder.path.display(), "the transcripts folder is there");
        }
        let was_there = std::mem::replace(&mut self.is_there, is_there);
        is_there && !was_there
    }
}

/// Files that were moved, and files that are gone.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Moves {
    /// From where, and to where.
    pub(crate) moved: Vec<(PathBuf, PathBuf)>,
    pub(crate) gone: Vec<PathBuf>,
}

/// A file that is found where none was, and has the name of one that is gone, was moved; or it was compressed in between.
pub(crate) fn moves(fresh: &[PathBuf], vanished: Vec<PathBuf>) -> Moves {
    let mut by_name: HashMap<OsString, Vec<PathBuf>> = HashMap::new();
    for path in vanished {
        by_name.entry(plain_name(&path).to_owned()).or_default().push(path);
    }
    let mut moved = Vec::new();
    for to in fresh {
        let vanished = by_name.get_mut(plain_name(to));
        moved.extend(vanished.and_then(Vec::pop).map(|from| (from, to.clone())));
    }
    Moves { moved, gone: by_name.into_values().flatten().collect() }
}

/// The name of a file, without the mark that it is compressed.
fn plain_name(path: &Path) -> &OsStr {
    let name = if is_compressed(path) { path.file_stem() } else { path.file_name() };
    name.unwrap_or_default()
}

pub(crate) fn kind_of(folders: &[AgentFolder], path: &Path) -> Option<(Agent, TranscriptKind)> {
    let below = |folder: &AgentFolder| Some((folder.agent, path.strip_prefix(&folder.path).ok()?));
    let (agent, relative) = folders.iter().find_map(below)?;
    Some((agent, agent.classify(relative)?))
}

/// Whether there are any folders or transcripts in it. There are none below an unmounted file system.
fn has_entries(folder: &AgentFolder) -> bool {
    let is_any = |entry: io::Result<DirEntry>| {
        entry.is_ok_and(|entry| entry.path().is_dir() || kind_of(std::slice::from_ref(folder), &entry.path()).is_some())
    };
    std::fs::read_dir(&folder.path).is_ok_and(|mut entries| entries.any(is_any))
}

/// Whether there is no such file for certain.
fn is_gone(path: &Path) -> bool {
    let gone = |kind| matches!(kind, io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
    std::fs::metadata(path).is_err_and(|error| gone(error.kind()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_the_name_of_one_that_is_gone_was_moved_and_each_but_once() {
        let paths = |paths: &[&str]| paths.iter().map(PathBuf::from).collect::<Vec<_>>();
        let fresh = paths(&["/p/b/1", "/p/b/2", "/p/c/1", "/p/a/4.zst"]);
        let Moves { moved, gone } = moves(&fresh, paths(&["/p/a/1", "/p/a/3", "/p/a/4"]));
        assert_eq!(moved, [("/p/a/1".into(), "/p/b/1".into()), ("/p/a/4".into(), "/p/a/4.zst".into())]);
        assert_eq!(gone, paths(&["/p/a/3"]));
    }
}
