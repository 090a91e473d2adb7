//! Transcripts that their agent has compressed (`.zst`): read as if they were not.
//!
//! A compressed file is never added to, only replaced. It is unpacked whole into a file without a name, so that everything
//! else reads it at any place; to see its beginning only that is unpacked.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use ruzstd::decoding::StreamingDecoder;
use uuid::Uuid;

/// Bytes that one unpacked file has at most.
const UNPACKED_BYTES_MAX: u64 = 16 << 30;

pub(crate) fn is_compressed(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "zst")
}

/// What a compressed file holds, in a file without a name.
pub(crate) fn unpacked(file: File) -> io::Result<File> {
    let path = std::env::temp_dir().join(format!("headspace-watcher-{}", Uuid::now_v7()));
    let mut whole = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    std::fs::remove_file(&path)?;
    let bytes = io::copy(&mut Frames::new(file).take(UNPACKED_BYTES_MAX), &mut whole)?;
    if bytes == UNPACKED_BYTES_MAX {
        return Err(io::Error::other("unpacked it would have more than 16 GiB"));
    }
    whole.rewind()?;
    Ok(whole)
}

/// The first bytes of what a compressed file holds.
pub(crate) fn head(file: File, bytes: usize) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    Frames::new(file).take(bytes as u64).read_to_end(&mut head)?;
    Ok(head)
}

/// The frames of a file, one behind the other.
struct Frames {
    file: Option<BufReader<File>>,
    frame: Option<StreamingDecoder<BufReader<File>, ruzstd::decoding::FrameDecoder>>,
}

impl Frames {
    fn new(file: File) -> Frames {
        Frames { file: Some(BufReader::new(file)), frame: None }
    }
}

impl Read for Frames {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(frame) = &mut self.frame {
                let bytes = frame.read(buffer)?;
                if bytes > 0 || buffer.is_empty() {
                    return Ok(bytes);
                }
                self.file = self.frame.take().map(StreamingDecoder::into_inner);
            }
            let Some(mut file) = self.file.take() else { return Ok(0) };
            if file.fill_buf()?.is_empty() {
                return Ok(0);
            }
            self.frame = Some(StreamingDecoder::new(file).map_err(io::Error::other)?);
        }
    }
}
