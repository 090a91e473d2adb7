//! Transcripts that their agent has compressed (`.zst`): read as if they were not.
//!
//! A compressed file is never added to, only replaced. It is unpacked whole into a file without a name, so that everything
//! else reads it at any place; to see its beginning only that is unpacked.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};
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
    let mut decoder = decoder(file)?;
    if io::copy(&mut decoder.by_ref().take(UNPACKED_BYTES_MAX), &mut whole)? == UNPACKED_BYTES_MAX {
        return Err(io::Error::other("unpacked it would have more than 16 GiB"));
    }
    // Written at once, as agents do, it is one frame.
    if !decoder.into_inner().fill_buf()?.is_empty() {
        return Err(io::Error::other("it has more than one zstd frame"));
    }
    whole.rewind()?;
    Ok(whole)
}

/// The first bytes of what a compressed file holds.
pub(crate) fn head(file: File, bytes: u64) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    decoder(file)?.take(bytes).read_to_end(&mut head)?;
    Ok(head)
}

fn decoder(file: File) -> io::Result<StreamingDecoder<BufReader<File>, FrameDecoder>> {
    StreamingDecoder::new(BufReader::new(file)).map_err(io::Error::other)
}
