//! Opens files that other people name or write: only regular files, and never waiting.
//!
//! A plain `open` of a FIFO waits for a writer, and a device such as `/dev/zero` never ends. Where a file is expected, either
//! would hang the program before it can be told to stop.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// Opens the regular file at `path` for reading. Follows links.
///
/// # Errors
/// As [`File::open`]; `IsADirectory` for a folder, `InvalidInput` for anything else that is not a regular file.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    // A terminal that is opened does not become ours.
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path);
    // A socket can't be opened at all; the cause that the system gives says nothing of that.
    let metadata = match &opened {
        Ok(file) => file.metadata()?,
        Err(_) => match path.metadata() {
            Ok(metadata) if !metadata.is_file() && !metadata.is_dir() => metadata,
            _ => return opened,
        },
    };
    match () {
        () if metadata.is_file() => opened,
        () if metadata.is_dir() => Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a folder")),
        () => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")),
    }
}

/// The bytes of the regular file at `path`.
///
/// # Errors
/// As [`open`]; `FileTooLarge` above `bytes_max`.
pub(crate) fn read(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        let message = format!("it has more than {bytes_max} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    Ok(bytes)
}

/// The text of the regular file at `path`.
///
/// # Errors
/// As [`read`]; `InvalidData` where it is no UTF-8.
pub(crate) fn read_to_string(path: &Path, bytes_max: u64) -> io::Result<String> {
    let bytes = read(path, bytes_max)?;
    String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.utf8_error()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_a_regular_file_is_opened_and_nothing_else_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("file"), "12345").unwrap();
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        std::fs::create_dir(path("folder")).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(path("fifo")).status().unwrap().success());
        let _listener = UnixListener::bind(path("socket")).unwrap();
        for name in ["file", "link"] {
            assert_eq!(read_to_string(&path(name), 5).unwrap(), "12345");
            assert_eq!(read(&path(name), 4).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        }
        for (name, kind) in [
            ("fifo", io::ErrorKind::InvalidInput),
            ("socket", io::ErrorKind::InvalidInput),
            ("/dev/zero", io::ErrorKind::InvalidInput),
            ("folder", io::ErrorKind::IsADirectory),
            ("nothing", io::ErrorKind::NotFound),
        ] {
            assert_eq!(read(&path(name), 5).unwrap_err().kind(), kind, "{name}");
        }
        std::fs::write(path("file"), [0xFF]).unwrap();
        assert_eq!(read_to_string(&path("file"), 5).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
