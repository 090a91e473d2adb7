//! Folders whose content is private: the queue, the spool, and the folder of the socket.
//!
//! The program makes them with mode 0700. A folder that was there before may belong to somebody else, or let others in:
//! they could read every prompt, or put in events and links of their own. So each is opened without following a link,
//! and owner and mode are read and changed through that descriptor:
//!
//! * Ours, and others have a right to it: the mode becomes 0700 ([`Ensured::Tightened`]).
//! * Somebody else's, or others keep their rights, or everybody may replace it because a folder above it is writable for
//!   all without the sticky bit: refused ([`FolderError`]).
//! * Others could write in it, and something in it is not ours or is a link: refused, it may be planted.
//!
//! Where the configured path is a link, both where it stands and where it leads are checked. Rights of a group above the
//! folder are not refused: many systems give each user a group of their own.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use thiserror::Error;

/// Rights of group and others.
const OTHERS: u32 = 0o077;

/// Rights of group and others to make, remove and rename entries.
const OTHERS_WRITE: u32 = 0o022;

const EVERYBODY_WRITES: u32 = 0o002;

/// In a folder with it only the owner of an entry may rename or remove it.
const STICKY: u32 = 0o1000;

const MODE_BITS: u32 = 0o7777;

/// What [`ensure`] has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ensured {
    /// It was not there.
    Created,
    /// It was there, and nobody else had a right to it.
    Private,
    /// Others had rights to it, by this mode; they have none any more.
    Tightened { mode: u32 },
}

/// Why a folder can't be trusted with what is private. Each message names the path and the fix.
#[derive(Clone, Debug, Error)]
pub enum FolderError {
    #[error(
        "could not use folder {}: it belongs to user {owner}, this program runs as user {user}; chown {user} {}, or set another path",
        path.display(), path.display()
    )]
    Owner { path: PathBuf, owner: u32, user: u32 },
    #[error(
        "could not use folder {}: others have rights to it (mode {mode:04o}) that could not be taken away: {cause}; chmod {fix} {}",
        path.display(), path.display()
    )]
    Mode { path: PathBuf, mode: u32, cause: String, fix: &'static str },
    #[error(
        "could not use folder {}: everybody may replace it, as {} has mode {mode:04o}; chmod o-w {}, or set another path",
        path.display(), above.display(), above.display()
    )]
    Replaceable { path: PathBuf, above: PathBuf, mode: u32 },
    #[error(
        "could not use folder {}: others could write in it, and {} is {what}; remove it if it is not yours, then start again",
        path.display(), entry.display()
    )]
    Planted { path: PathBuf, entry: PathBuf, what: String },
    #[error("could not use folder {}: it is not a folder; move it away, or set another path", path.display())]
    NotAFolder { path: PathBuf },
    /// The system refused: it is no matter of owner and mode alone.
    #[error("could not use folder {}: {cause}; fix its owner or mode, or set another path", path.display())]
    Io { path: PathBuf, cause: String },
}

/// Makes the folder at `path` (and those above it) with mode 0700 where it is missing, and takes the rights of others
/// from one that is there.
///
/// # Errors
/// Any [`FolderError`]. One in which others have put something is left as it is, so that every later caller refuses it, too.
pub(crate) fn ensure(path: &Path) -> Result<Ensured, FolderError> {
    let created = create(path).map_err(|error| io_error(path, &error))?;
    let folder = Folder::open(path)?;
    folder.refuse_owner()?;
    // Before its mode is changed: a folder that is refused looks the same to whoever comes next.
    if folder.mode & OTHERS_WRITE != 0 {
        folder.refuse_planted(folder.mode)?;
    }
    let ensured = folder.tighten(OTHERS, OTHERS, "700")?;
    refuse_replaceable(path, &folder.real, folder.user)?;
    Ok(match ensured {
        _ if created => Ensured::Created,
        Some(mode) => Ensured::Tightened { mode },
        None => Ensured::Private,
    })
}

/// The mode of the folder at `path` where others have rights to it. Changes nothing.
///
/// # Errors
/// As [`ensure`], but for what that would put right.
pub(crate) fn look(path: &Path) -> Result<Option<u32>, FolderError> {
    let Some(folder) = Folder::open_existing(path)? else { return Ok(None) };
    folder.refuse_owner()?;
    let mode = folder.mode;
    if mode & OTHERS_WRITE != 0 {
        folder.refuse_planted(mode)?;
    }
    Ok((mode & OTHERS != 0).then_some(mode))
}

/// Sees to it that nobody can replace what is in the folder at `path`: takes the right to write from group and others
/// where everybody has it, and gives the mode that it had. For a folder that others may use for good reasons; nothing
/// is done where there is none.
///
/// # Errors
/// [`FolderError::Mode`] where it is somebody else's and writable for all without the sticky bit;
/// [`FolderError::Replaceable`], [`FolderError::NotAFolder`] and [`FolderError::Io`] as for [`ensure`].
pub(crate) fn ensure_unwritable(path: &Path) -> Result<Option<u32>, FolderError> {
    let Some(folder) = Folder::open_existing(path)? else { return Ok(None) };
    if !folder.is_writable_by_all() { Ok(None) } else { folder.tighten(EVERYBODY_WRITES, OTHERS_WRITE, "go-w") }
}

/// The mode where everybody may replace what is in the folder at `path`. Changes nothing.
///
/// # Errors
/// As [`ensure_unwritable`], but for what that would put right.
pub(crate) fn look_unwritable(path: &Path) -> Result<Option<u32>, FolderError> {
    let Some(folder) = Folder::open_existing(path)? else { return Ok(None) };
    if !folder.is_writable_by_all() {
        return Ok(None);
    }
    folder.refuse_owner()?;
    Ok(Some(folder.mode))
}

/// Makes the folder; `false` where something of the name was there.
fn create(path: &Path) -> io::Result<bool> {
    let make = || DirBuilder::new().mode(0o700).create(path);
    let made = match (make(), path.parent()) {
        (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound && !parent.as_os_str().is_empty() => {
            DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
            make()
        }
        (made, _) => made,
    };
    match made {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// A folder, by a descriptor of it.
struct Folder {
    path: PathBuf,
    /// Without links.
    real: PathBuf,
    file: File,
    owner: u32,
    /// Its rights and special bits.
    mode: u32,
    /// Who this process acts as.
    user: u32,
}

impl Folder {
    fn open(path: &Path) -> Result<Folder, FolderError> {
        let not_a_folder = || FolderError::NotAFolder { path: path.to_owned() };
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotADirectory => not_a_folder(),
            _ => io_error(path, &error),
        };
        let real = path.canonicalize().map_err(failed)?;
        let flags = (OFlags::DIRECTORY | OFlags::NOFOLLOW).bits() as i32;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(&real).map_err(failed)?;
        let metadata = file.metadata().map_err(|error| io_error(path, &error))?;
        Ok(Folder {
            path: path.to_owned(),
            real,
            file,
            owner: metadata.uid(),
            mode: metadata.mode() & MODE_BITS,
            user: rustix::process::geteuid().as_raw(),
        })
    }

    /// The folder at `path` if there is one, or could be one; also where it is not there nobody may put another in its place.
    fn open_existing(path: &Path) -> Result<Option<Folder>, FolderError> {
        if std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            let above = path.ancestors().skip(1).find_map(|above| above.canonicalize().ok());
            if let Some(above) = above {
                let user = rustix::process::geteuid().as_raw();
                refuse_writable(path, &above.join("new"), user)?;
            }
            return Ok(None);
        }
        let folder = Folder::open(path)?;
        refuse_replaceable(path, &folder.real, folder.user)?;
        Ok(Some(folder))
    }

    fn is_writable_by_all(&self) -> bool {
        self.mode & EVERYBODY_WRITES != 0 && self.mode & STICKY == 0
    }

    fn refuse_owner(&self) -> Result<(), FolderError> {
        let &Folder { owner, user, .. } = self;
        if owner == user { Ok(()) } else { Err(FolderError::Owner { path: self.path.clone(), owner, user }) }
    }

    /// Takes the rights `taken` away where the folder has one of `wrong`; gives the mode that it had. `fix`: what chmod
    /// has to be told for the same.
    fn tighten(&self, wrong: u32, taken: u32, fix: &'static str) -> Result<Option<u32>, FolderError> {
        self.refuse_owner()?;
        let mode = self.mode;
        if mode & wrong == 0 {
            return Ok(None);
        }
        let failed = |cause: String| FolderError::Mode { path: self.path.clone(), mode, cause, fix };
        self.file.set_permissions(Permissions::from_mode(mode & !taken)).map_err(|error| failed(error.to_string()))?;
        // Some file systems accept every mode and keep their own.
        let now = self.file.metadata().map_err(|error| failed(error.to_string()))?.mode();
        if now & wrong != 0 {
            return Err(failed("its file system keeps them".to_owned()));
        }
        Ok(Some(mode))
    }

    /// Looks through all that is in the folder, which had `mode` when others could write in it.
    fn refuse_planted(&self, mode: u32) -> Result<(), FolderError> {
        debug_assert!(mode & OTHERS_WRITE != 0);
        for entry in walkdir::WalkDir::new(&self.real).min_depth(1) {
            let found = entry.and_then(|entry| entry.metadata().map(|metadata| (entry, metadata)));
            // What has gone since is nothing to be afraid of.
            let Ok((entry, metadata)) = found else { continue };
            let what = match metadata.uid() {
                owner if owner != self.user => format!("user {owner}'s"),
                _ if metadata.is_symlink() => "a link".to_owned(),
                _ => continue,
            };
            return Err(FolderError::Planted { path: self.path.clone(), entry: entry.into_path(), what });
        }
        Ok(())
    }
}

/// Refuses a folder that everybody may replace by another: at `path`, or at `real`, where that leads.
fn refuse_replaceable(path: &Path, real: &Path, user: u32) -> Result<(), FolderError> {
    refuse_writable(path, real, user)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match (parent.canonicalize(), path.file_name()) {
        (Ok(parent), Some(name)) if parent.join(name) != real => refuse_writable(path, &parent.join(name), user),
        _ => Ok(()),
    }
}

/// Refuses `place` (without links) where everybody may rename one of the folders in it.
fn refuse_writable(path: &Path, place: &Path, user: u32) -> Result<(), FolderError> {
    let mut below = place;
    for above in place.ancestors().skip(1) {
        let metadata = std::fs::metadata(above).map_err(|error| io_error(path, &error))?;
        let mode = metadata.mode() & MODE_BITS;
        if mode & EVERYBODY_WRITES != 0 {
            // With the sticky bit only the owner of what is below may replace it.
            let owner = std::fs::symlink_metadata(below).map_or(user, |metadata| metadata.uid());
            if mode & STICKY == 0 || (owner != user && owner != 0) {
                return Err(FolderError::Replaceable { path: path.to_owned(), above: above.to_owned(), mode });
            }
        }
        below = above;
    }
    Ok(())
}

fn io_error(path: &Path, error: &io::Error) -> FolderError {
    FolderError::Io { path: path.to_owned(), cause: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scene() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        (folder, path)
    }

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().mode() & MODE_BITS
    }

    #[test]
    fn a_missing_folder_is_made_for_its_owner_only() {
        let (_folder, path) = scene();
        assert_eq!(look(&path).unwrap(), None);
        assert_eq!(ensure(&path).unwrap(), Ensured::Created);
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o700, 0o700));
        assert_eq!(ensure(&path).unwrap(), Ensured::Private);
        assert_eq!(look(&path).unwrap(), None);
    }

    #[test]
    fn rights_of_others_are_found_by_looking_and_taken_away_by_ensuring() {
        for open in [0o777, 0o755, 0o770, 0o701, 0o1777, 0o2750] {
            let (_folder, path) = scene();
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join("file"), "").unwrap();
            set_mode(&path, open);
            assert_eq!(look(&path).unwrap(), Some(open));
            assert_eq!(mode(&path), open, "looking changes nothing");
            assert_eq!(ensure(&path).unwrap(), Ensured::Tightened { mode: open });
            assert_eq!(mode(&path) & 0o777, 0o700);
            assert_eq!(ensure(&path).unwrap(), Ensured::Private);
        }
    }

    #[test]
    fn a_folder_that_everybody_may_replace_is_refused_and_tightened_all_the_same() {
        let (_folder, path) = scene();
        std::fs::create_dir_all(&path).unwrap();
        let above = path.parent().unwrap();
        set_mode(&path, 0o755);
        set_mode(above, 0o777);
        for error in [look(&path).unwrap_err(), ensure(&path).unwrap_err(), look(&above.join("new")).unwrap_err()] {
            assert!(matches!(&error, FolderError::Replaceable { mode: 0o777, .. }), "{error}");
            assert!(
                error.to_string().contains(&format!("chmod o-w {}", above.canonicalize().unwrap().display())),
                "{error}"
            );
        }
        assert_eq!(mode(&path), 0o700);
        // As /tmp is.
        set_mode(above, 0o1777);
        assert_eq!(ensure(&path).unwrap(), Ensured::Private);
        set_mode(above, 0o775);
        assert_eq!(ensure(&path).unwrap(), Ensured::Private);
    }

    #[test]
    fn a_link_is_as_safe_as_where_it_stands_and_where_it_leads() {
        let (folder, path) = scene();
        let link = folder.path().join("links/queue");
        std::fs::create_dir_all(&path).unwrap();
        std::fs::create_dir(link.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        set_mode(&path, 0o755);
        assert_eq!(ensure(&link).unwrap(), Ensured::Tightened { mode: 0o755 });
        for above in [link.parent().unwrap(), path.parent().unwrap()] {
            let before = mode(above);
            set_mode(above, 0o777);
            assert!(matches!(ensure(&link), Err(FolderError::Replaceable { .. })), "{}", above.display());
            assert!(matches!(look(&link), Err(FolderError::Replaceable { .. })), "{}", above.display());
            set_mode(above, before);
        }
    }

    #[test]
    fn what_others_may_have_planted_is_refused() {
        let (folder, path) = scene();
        std::fs::create_dir_all(path.join("segment-1")).unwrap();
        let link = path.join("segment-1/lock");
        std::os::unix::fs::symlink(folder.path().join("mine"), &link).unwrap();
        // Nobody else could write: it is ours.
        set_mode(&path, 0o755);
        assert_eq!(ensure(&path).unwrap(), Ensured::Tightened { mode: 0o755 });
        set_mode(&path, 0o777);
        for error in [look(&path).unwrap_err(), ensure(&path).unwrap_err()] {
            assert!(
                matches!(&error, FolderError::Planted { entry, .. } if entry.ends_with("segment-1/lock")),
                "{error}"
            );
        }
        assert_eq!(mode(&path), 0o777, "whoever comes next is to see it, too");
        std::fs::remove_file(&link).unwrap();
        assert_eq!(ensure(&path).unwrap(), Ensured::Tightened { mode: 0o777 });
    }

    #[test]
    fn a_folder_of_somebody_else_is_refused_and_left_as_it_is() {
        let user = rustix::process::geteuid().as_raw();
        // Root's own; root itself needs one of somebody else's.
        let (_folder, made) = scene();
        let (path, owner) = if user == 0 { (made, 65_534) } else { (PathBuf::from("/"), 0) };
        if user == 0 {
            std::fs::create_dir_all(&path).unwrap();
            set_mode(&path, 0o777);
            std::os::unix::fs::chown(&path, Some(owner), None).unwrap();
        }
        let before = mode(&path);
        for error in [look(&path).unwrap_err(), ensure(&path).unwrap_err()] {
            assert!(matches!(&error, FolderError::Owner { .. }), "{error}");
            assert!(error.to_string().contains(&format!("belongs to user {owner}")), "{error}");
            assert!(error.to_string().contains(&format!("chown {user} ")), "{error}");
        }
        assert_eq!(mode(&path), before);
    }

    #[test]
    fn a_file_is_no_folder() {
        let (folder, _) = scene();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(matches!(ensure(&file), Err(FolderError::NotAFolder { .. })));
        assert!(matches!(look(&file), Err(FolderError::NotAFolder { .. })));
        assert!(matches!(ensure(&file.join("below")), Err(FolderError::Io { .. })));
    }

    #[test]
    fn a_shared_folder_only_loses_the_right_of_all_to_write() {
        let (_folder, path) = scene();
        assert_eq!(ensure_unwritable(&path).unwrap(), None);
        std::fs::create_dir_all(&path).unwrap();
        for (before, after) in
            [(0o755, None), (0o775, None), (0o1777, None), (0o777, Some(0o755)), (0o702, Some(0o700))]
        {
            set_mode(&path, before);
            assert_eq!(look_unwritable(&path).unwrap(), after.map(|_| before));
            assert_eq!(ensure_unwritable(&path).unwrap(), after.map(|_| before));
            assert_eq!(mode(&path), after.unwrap_or(before));
        }
        set_mode(path.parent().unwrap(), 0o777);
        assert!(matches!(ensure_unwritable(&path), Err(FolderError::Replaceable { .. })));
    }
}
