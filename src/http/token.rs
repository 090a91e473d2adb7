//! The token that is made where `http.token` is not configured: a file beside the socket, for its owner alone.
//!
//! Made once, at the first start that listens on TCP, and kept. It is written under another name, synced and then
//! linked, so that it is there whole or not at all, and of several starts at once the first one's counts for all. A file
//! that somebody else could have read or written is not used.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use thiserror::Error;

use crate::config::Secret;

/// Random bytes of a new token; the file holds them as hexadecimal digits.
const RANDOM_BYTES: usize = 32;

/// Bytes of the file that are read: more than the longest token.
const FILE_BYTES_MAX: u64 = 4096;

/// Why a token file is not used.
#[derive(Debug, Error)]
pub(crate) enum TokenError {
    #[error("could not use the token file {path}: {problem}; remove it and restart, so that a new one is made, or set http.token", path = .path.display())]
    Unfit { path: PathBuf, problem: String },
    #[error("could not {action} the token file {path}: {source}; correct its folder's owner or mode, or set http.token", path = .path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

/// The token in the file at `path`. Makes the file where there is none.
///
/// # Errors
/// The file can't be read or written, or somebody else could know or have chosen what it holds.
pub(crate) fn load_or_create(path: &Path) -> Result<Secret, TokenError> {
    let failed = |source| TokenError::Io { action: "create", path: path.to_owned(), source };
    if let Some(token) = load(path)? {
        return Ok(token);
    }
    create(path).map_err(failed)?;
    load(path)?.ok_or_else(|| failed(ErrorKind::NotFound.into()))
}

/// The token in the file at `path`; `None` where there is no such file. Changes nothing.
///
/// # Errors
/// As [`load_or_create`].
pub(crate) fn load(path: &Path) -> Result<Option<Secret>, TokenError> {
    let failed = |source| TokenError::Io { action: "read", path: path.to_owned(), source };
    let unfit = |problem: String| TokenError::Unfit { path: path.to_owned(), problem };
    // Neither follows a symbolic link nor waits for the other end of a FIFO.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = match OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            let is_file = path.symlink_metadata().is_ok_and(|metadata| metadata.is_file());
            return Err(if is_file { failed(error) } else { unfit("it is not a regular file".to_owned()) });
        }
    };
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(unfit("it is not a regular file".to_owned()));
    }
    let own = rustix::process::geteuid().as_raw();
    if metadata.uid() != own {
        return Err(unfit(format!("it belongs to user {}, and the watcher runs as user {own}", metadata.uid())));
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(unfit(format!("mode {mode:o} lets other users read or change it")));
    }
    let mut text = String::new();
    match file.take(FILE_BYTES_MAX).read_to_string(&mut text) {
        Err(error) if error.kind() != ErrorKind::InvalidData => return Err(failed(error)),
        _ => {}
    }
    let token = Secret::token(text.trim_end());
    token.map(Some).ok_or_else(|| unfit(format!("it holds no token ({})", Secret::TOKEN_RULE)))
}

/// Makes the file with a new token, unless another start has just done so.
fn create(path: &Path) -> io::Result<()> {
    let mut random = [0; RANDOM_BYTES];
    getrandom::fill(&mut random)?;
    let mut text: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    text.push('\n');
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = folder.join(format!(".http.token-{}", uuid::Uuid::now_v7().simple()));
    let linked = write_new(&temporary, &text).and_then(|()| std::fs::hard_link(&temporary, path));
    let removed = std::fs::remove_file(&temporary);
    // Another start was faster: its token counts.
    linked.or_else(|error| if error.kind() == ErrorKind::AlreadyExists { Ok(()) } else { Err(error) })?;
    removed?;
    File::open(folder)?.sync_all()
}

fn write_new(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    // Where the folder has default ACLs, these decide over the mode of a new file.
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Barrier;

    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn written(path: &Path, text: impl AsRef<[u8]>, mode: u32) {
        std::fs::write(path, text).unwrap();
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    /// Why the file at `path` is not used; that it is left as it is.
    fn refused(path: &Path) -> String {
        let before = path.symlink_metadata().unwrap();
        let error = load_or_create(path).unwrap_err().to_string();
        assert_eq!(load(path).unwrap_err().to_string(), error);
        let after = path.symlink_metadata().unwrap();
        assert_eq!((before.ino(), before.mode(), before.len()), (after.ino(), after.mode(), after.len()));
        assert!(error.contains(path.to_str().unwrap()) && error.contains("remove it"), "{error}");
        error
    }

    #[test]
    fn a_new_token_is_long_and_random_and_kept_and_its_owners_alone() {
        let folder = folder();
        let path = folder.path().join("http.token");
        assert!(load(&path).unwrap().is_none(), "looking makes none");
        let token = load_or_create(&path).unwrap();
        assert_eq!(token.reveal().len(), 2 * RANDOM_BYTES);
        assert!(load_or_create(&path).unwrap() == token);
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o600);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let other = load_or_create(&folder.path().join("other")).unwrap();
        assert!(other != token);
        assert_eq!(format!("{token:?} {token}"), "*** ***");
    }

    #[test]
    fn many_starts_at_once_agree_on_one_token() {
        for _ in 0..20 {
            let folder = folder();
            let path = folder.path().join("http.token");
            let barrier = Barrier::new(8);
            let tokens: BTreeSet<String> = std::thread::scope(|scope| {
                let start = || {
                    barrier.wait();
                    load_or_create(&path).unwrap().reveal().to_owned()
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(tokens.len(), 1);
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_token_that_someone_chose_is_used() {
        let folder = folder();
        let path = folder.path().join("http.token");
        for (text, mode) in [("sesame-open", 0o600), ("sesame-open\n", 0o400), ("sesame-open\r\n", 0o600)] {
            written(&path, text, mode);
            assert_eq!(load_or_create(&path).unwrap().reveal(), "sesame-open");
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn a_file_that_others_may_read_or_change_is_refused() {
        let folder = folder();
        let path = folder.path().join("http.token");
        for mode in [0o644, 0o640, 0o620, 0o604, 0o602, 0o666, 0o777, 0o610] {
            written(&path, "sesame-open", mode);
            assert!(refused(&path).contains(&format!("mode {mode:o}")));
        }
    }

    #[test]
    fn a_file_without_a_token_is_refused() {
        let folder = folder();
        let path = folder.path().join("http.token");
        let long = "x".repeat(257);
        let huge = "x".repeat(1 << 20);
        for text in ["", "\n", "short", "two words", "sesame\nopen-sesame", "sesame-\u{e4}-open", &long, &huge] {
            written(&path, text, 0o600);
            assert!(refused(&path).contains("8 to 256"));
        }
        written(&path, b"sesame-\xff-open", 0o600);
        assert!(refused(&path).contains("8 to 256"));
    }

    #[test]
    fn what_is_no_regular_file_is_refused_and_not_waited_for() {
        let folder = folder();
        let target = folder.path().join("target");
        written(&target, "sesame-open", 0o600);
        let path = folder.path().join("link");
        std::os::unix::fs::symlink(&target, &path).unwrap();
        assert!(refused(&path).contains("regular file"));
        let dangling = folder.path().join("dangling");
        std::os::unix::fs::symlink(folder.path().join("nowhere"), &dangling).unwrap();
        assert!(refused(&dangling).contains("regular file"));
        assert!(!folder.path().join("nowhere").exists());
        let directory = folder.path().join("directory");
        std::fs::create_dir(&directory).unwrap();
        assert!(refused(&directory).contains("regular file"));
        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(refused(&socket).contains("regular file"));
        let fifo = folder.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").args(["-m", "600"]).arg(&fifo).status().unwrap().success());
        assert!(refused(&fifo).contains("regular file"));
    }

    #[test]
    fn another_users_file_is_refused() {
        let folder = folder();
        let path = folder.path().join("http.token");
        written(&path, "sesame-open", 0o600);
        if crate::skip::lacks("root", std::os::unix::fs::chown(&path, Some(65_534), None).is_ok()) {
            return;
        }
        assert!(refused(&path).contains("belongs to user 65534"));
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error_that_says_what_to_do() {
        let error = load_or_create(Path::new("/nowhere/http.token")).unwrap_err().to_string();
        assert!(
            error.contains("create") && error.contains("/nowhere/http.token") && error.contains("http.token"),
            "{error}"
        );
    }
}
