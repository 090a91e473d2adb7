//! The watcher's Unix socket: what stands at its path, and who may remove it.
//!
//! A start takes over the socket of a dead watcher and nothing else: no file, no link, no socket on which somebody listens
//! or may be listening. At the end the path is removed only while it still leads to the socket that was bound here.

use std::fs::{self, File, FileType, TryLockError};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::time::Instant;

/// How long another start that is binding a socket in the same folder is waited for, and how often it is looked.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_INTERVAL: Duration = Duration::from_millis(5);

/// The user's way out of every error here.
const WAY_OUT: &str = "set http.socket to another path";

/// What stands at the path of a socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SocketState {
    Free,
    /// A socket on which nobody listens.
    LeftOver,
    /// A process listens, whether or not it answers.
    Listening,
}

/// Looks at `path` and changes nothing. The error says why no watcher may use this path, and the way out.
pub(crate) async fn inspect(path: &Path) -> Result<SocketState, String> {
    let kind = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(SocketState::Free),
        Err(error) => return Err(format!("{error}; {WAY_OUT}")),
    };
    if !kind.is_socket() {
        return Err(format!("it is {}, not a socket; {WAY_OUT}, or move it away", name_of(kind)));
    }
    match UnixStream::connect(path).await {
        Ok(_) => Ok(SocketState::Listening),
        // The backlog of the listener is full.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(SocketState::Listening),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(SocketState::LeftOver),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(SocketState::Free),
        Err(error) => Err(format!("could not find out who listens there: {error}; {WAY_OUT}, or remove it")),
    }
}

fn name_of(kind: FileType) -> &'static str {
    if kind.is_dir() {
        "a folder"
    } else if kind.is_symlink() {
        "a symbolic link"
    } else if kind.is_fifo() {
        "a named pipe"
    } else if kind.is_file() {
        "a file"
    } else {
        "a device"
    }
}

/// A socket that this process has bound. Dropping it removes its path, if that still leads to this socket.
pub(crate) struct BoundSocket {
    path: PathBuf,
    /// While it is open no other file can get the same inode.
    listener: std::os::unix::net::UnixListener,
    identity: (u64, u64),
}

impl BoundSocket {
    /// Binds `path` for the owner alone, making its folder where it is missing.
    pub(crate) async fn bind(path: &Path) -> Result<BoundSocket, String> {
        let failed = |error: io::Error| format!("{error}; {WAY_OUT}");
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(folder).map_err(failed)?;
        let _lock = lock_folder(folder).await?;
        match inspect(path).await? {
            SocketState::Free => {}
            SocketState::Listening => return Err(format!("another process listens there; {WAY_OUT}")),
            SocketState::LeftOver => fs::remove_file(path).map_err(failed)?,
        }
        // The process's umask makes it private from birth.
        let listener = UnixListener::bind(path).and_then(UnixListener::into_std).map_err(failed)?;
        let identity = identity(path).map_err(failed)?;
        let bound = BoundSocket { path: path.to_owned(), listener, identity };
        // Also where the folder has default ACLs.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(bound)
    }

    /// To accept on. Connections are taken until this and the socket itself are dropped.
    pub(crate) fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone().and_then(UnixListener::from_std)
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            // What stays is taken over by the next start.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Held while a path in `folder` is looked at and bound: of two starts that find the same left-over, the second then finds
/// the first one listening. `None` where the folder can't be locked.
async fn lock_folder(folder: &Path) -> Result<Option<File>, String> {
    let Ok(file) = File::open(folder) else { return Ok(None) };
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::Error(_)) => return Ok(None),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => tokio::time::sleep(LOCK_INTERVAL).await,
            Err(TryLockError::WouldBlock) => {
                return Err(format!("another process holds a lock on {}; end it, or {WAY_OUT}", folder.display()));
            }
        }
    }
}
