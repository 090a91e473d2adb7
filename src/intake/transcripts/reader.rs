//! One pass over one file: what its [`Tail`] gives becomes events, which go into the queue together with its cursor.
//!
//! A last line without newline waits for it. Only when it is one complete JSON object and its file has been quiet for
//! [`UNTERMINATED_QUIET`] is it read as it stands: nothing that could still follow would change it (a cut-off object is never
//! valid JSON).

use std::collections::BTreeMap;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::compressed::{is_compressed, unpacked};
use super::followed::{Access, Followed, Stamp, identity};
use super::tail::{CHUNK_BYTES, Step, Tail};
use super::{Follower, ends};
use crate::agent::Memory;
use crate::event::{Cursor, FileIdentity, Timestamp};
use crate::intake::sessions;
use crate::queue::{Batch, QueueError};
use crate::telemetry::name_or_none;
use crate::transcript::{Found, LastLine, START, Source, TranscriptKind, UNKNOWN_TYPE, Unknown};

/// How long a file must be unchanged before its last line is read without a newline.
const UNTERMINATED_QUIET: Duration = Duration::from_secs(5);

/// Events of one batch: with lines of a kilobyte about as much as a chunk.
const BATCH_EVENTS_MAX: usize = 1024;

/// Bytes of events and of damaged lines in one batch, above those of one line.
const BATCH_BYTES_MAX: u64 = 4 << 20;

/// Bytes that are read from one file, or made of it, before others have their turn, and the time that takes; except where
/// the order of files matters.
const TURN_BYTES_MAX: u64 = 8 << 20;
const TURN_TIME_MAX: Duration = Duration::from_millis(200);

/// Warnings about one file's bad lines in one pass; the rest is counted.
const WARNINGS_PER_PASS_MAX: u64 = 5;

/// Files of which one run logs that their last line is incomplete, and that they were modified in place.
const FILE_WARNINGS_MAX: usize = 5;

/// Passes over a file that is cut short each time between its `stat` and its read. One that ends early in every pass is not
/// being cut: it can't be read.
pub(super) const CUT_SHORT_PASSES_MAX: usize = 4;

/// What one pass led to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Progress {
    /// Nothing more to read now.
    End,
    /// There is more; others have their turn first.
    More,
}

pub(super) enum ReadError {
    File(io::Error),
    Queue(QueueError),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        ReadError::File(error)
    }
}

impl From<QueueError> for ReadError {
    fn from(error: QueueError) -> Self {
        ReadError::Queue(error)
    }
}

/// Whether a file ended before the size that it had when it was opened.
fn is_cut_short(progress: &Result<Progress, ReadError>) -> bool {
    matches!(progress, Err(ReadError::File(error)) if error.kind() == io::ErrorKind::UnexpectedEof)
}

/// What a test does to a file between its `stat` and its first read.
#[cfg(test)]
pub(super) mod cut {
    use std::cell::RefCell;
    use std::path::Path;

    type Hook = Box<dyn FnMut(&Path)>;

    thread_local! {
        pub static ON_OPENED: RefCell<Option<Hook>> = const { RefCell::new(None) };
    }

    pub(crate) fn opened(path: &Path) {
        ON_OPENED.with_borrow_mut(|hook| hook.iter_mut().for_each(|hook| hook(path)));
    }
}

/// Opens a transcript for reading. Anything but a file is refused: a pipe would hang us.
pub(crate) fn open(path: &Path) -> io::Result<(File, Metadata)> {
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let handle = OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    let metadata = handle.metadata()?;
    if metadata.is_file() { Ok((handle, metadata)) } else { Err(io::Error::other("it is no file")) }
}

/// Opens a transcript to read its lines: the bytes, how many, and what the system says of the file. One that was compressed
/// is unpacked for it.
pub(crate) fn open_lines(path: &Path) -> io::Result<(File, u64, Metadata)> {
    let (handle, metadata) = open(path)?;
    if !is_compressed(path) {
        let bytes = metadata.len();
        return Ok((handle, bytes, metadata));
    }
    let handle = unpacked(handle)?;
    let bytes = handle.metadata()?.len();
    Ok((handle, bytes, metadata))
}

/// One pass over one file.
struct Pass {
    handle: File,
    tail: Tail,
    source: Source,
    /// What was made of the lines behind the cursor.
    batch: Batch,
    batch_bytes: u64,
    /// Bytes of all batches.
    made_bytes: u64,
    /// Bad lines that were found.
    bad_lines: u64,
    begun: Instant,
}

impl Pass {
    fn is_batch_full(&self, cursor: &Cursor) -> bool {
        self.batch.events.len() + self.batch.rejections.len() >= BATCH_EVENTS_MAX
            || self.batch_bytes >= BATCH_BYTES_MAX
            || self.tail.offset() - cursor.offset >= CHUNK_BYTES as u64
    }
}

/// What is logged once, or of a few files.
#[derive(Default)]
pub(super) struct Logged {
    /// Files, and where the last line begins that is incomplete.
    incomplete: BTreeMap<Arc<Path>, u64>,
    /// Files that were modified in place.
    in_place: usize,
}

impl Follower {
    /// Reads what is new in one file, if anything.
    pub(super) fn look_at(&mut self, path: &Path) -> Result<Progress, QueueError> {
        if self.files.get(path).is_none_or(|file| file.is_as_seen()) {
            return Ok(Progress::End);
        }
        let Some(mut file) = self.files.remove(path) else { return Ok(Progress::End) };
        let mut progress = self.read_new(&mut file);
        for _ in 1..CUT_SHORT_PASSES_MAX {
            if !is_cut_short(&progress) {
                break;
            }
            // Its size now says how it is to be read.
            file.seen = None;
            progress = self.read_new(&mut file);
        }
        let progress = match progress {
            Ok(progress) => Ok(progress),
            Err(ReadError::Queue(error)) => Err(error),
            Err(ReadError::File(error)) => {
                file.seen = None;
                file.unterminated = None;
                // Gone is no error: the next rescan forgets it, unless its folder is unmounted.
                let is_gone = error.kind() == io::ErrorKind::NotFound;
                if !is_gone && file.access != Access::Unreadable {
                    warn!(file = %path.display(), error = %error,
                          "a transcript can't be read; trying again at every rescan");
                }
                file.access = if is_gone { Access::Gone } else { Access::Unreadable };
                Ok(Progress::End)
            }
        };
        self.intern(&mut file.cursor);
        self.files.insert(Arc::clone(&file.path), file);
        progress
    }

    fn read_new(&mut self, file: &mut Followed) -> Result<Progress, ReadError> {
        let metadata = std::fs::metadata(&file.path)?;
        file.modified = metadata.mtime();
        let stamp = Stamp::of(&metadata);
        if file.seen != Some(stamp) {
            self.active.note_change(file, &stamp);
        }
        // Only after its end was reached the cursor names a compressed file; such a file does not grow.
        if is_compressed(&file.path) && file.cursor.file == identity(&metadata) {
            (file.seen, file.access) = (Some(stamp), Access::Readable);
            return Ok(Progress::End);
        }
        let (handle, bytes, metadata) = open_lines(&file.path)?;
        #[cfg(test)]
        cut::opened(&file.path);
        if std::mem::replace(&mut file.access, Access::Readable) == Access::Unreadable {
            info!(file = %file.path.display(), "the transcript can be read again");
        }
        let stamp = Stamp::of(&metadata);
        let tail = self.find_place(file, &handle, bytes, &metadata)?;
        self.note_change_in_place(file, &stamp);
        let mut source = self.source(file, &metadata);
        self.note_beginning(file, bytes, &mut source)?;
        let (batch, begun) = (Batch::default(), Instant::now());
        let mut pass = Pass { handle, tail, source, batch, batch_bytes: 0, made_bytes: 0, bad_lines: 0, begun };
        let progress = self.read_lines(&mut pass, file);
        // Also before an error of the file: the cursor's session has moved on over what was read.
        self.hand_over(&mut pass, file)?;
        if pass.bad_lines > WARNINGS_PER_PASS_MAX {
            warn!(file = %pass.source.path, lines = pass.bad_lines - WARNINGS_PER_PASS_MAX, "more bad lines, not shown");
        }
        file.scanned = pass.tail.scanned(&pass.handle)?;
        if progress? == Progress::More {
            return Ok(Progress::More);
        }
        if self.doorbell.is_stopped() {
            return Ok(Progress::End);
        }
        if file.seen != Some(stamp) {
            file.unterminated = None;
        }
        self.read_unterminated(&mut pass, file, &metadata)?;
        file.seen = Some(stamp);
        if file.has_begun() {
            file.beginning = None;
        }
        if is_compressed(&file.path) {
            file.cursor.file = identity(&metadata);
            self.submit_cursor(file)?;
        }
        Ok(Progress::End)
    }

    /// Where reading goes on: at the start where the bytes before the cursor are not those that were read.
    fn find_place(&self, file: &mut Followed, handle: &File, bytes: u64, metadata: &Metadata) -> io::Result<Tail> {
        let line_bytes_max = self.config.line_bytes_max;
        let cursor = &mut file.cursor;
        let mut tail = match Tail::resume(handle, bytes, line_bytes_max, cursor, file.scanned)? {
            Some(tail) => tail,
            None => {
                info!(file = %file.path.display(), offset = cursor.offset, bytes,
                      "the transcript was replaced or truncated; reading it again, what is known is not stored twice");
                // It is the same session still, with all that was told of it.
                let (project_path, session) = (cursor.project_path.take(), cursor.session);
                *cursor = Cursor { project_path, session, ..START };
                (file.beginning, file.scanned) = (None, None);
                Tail::new(bytes, line_bytes_max)
            }
        };
        // Copied or restored from a backup: other inode, same bytes.
        cursor.file = if is_compressed(&file.path) { FileIdentity::default() } else { identity(metadata) };
        tail.chunk_bytes = self.chunk_bytes;
        Ok(tail)
    }

    fn source(&self, file: &Followed, metadata: &Metadata) -> Source {
        let now = Timestamp::now();
        // What was written since the last pass was written just now, whatever the file system's clock says.
        let is_growing = file.seen.is_some_and(|seen| seen.inode == metadata.ino() && seen.size < metadata.len());
        Source {
            agent: file.agent,
            kind: file.kind,
            path: file.path.to_string_lossy().into(),
            inactivity_timeout: self.config.inactivity_timeout,
            active_max: if is_growing { sessions::to_millisecond(now) } else { sessions::active_max(metadata, now) },
            inherited_to: 0,
        }
    }

    /// Reads complete lines until there are no more, or others have their turn.
    fn read_lines(&mut self, pass: &mut Pass, file: &mut Followed) -> Result<Progress, ReadError> {
        loop {
            self.intake.metrics().live.reading.beat();
            self.outbox.wait_for_room();
            if self.doorbell.is_stopped() {
                return Ok(Progress::End);
            }
            let made = pass.made_bytes + pass.tail.bytes_read();
            if (made >= TURN_BYTES_MAX || pass.begun.elapsed() >= TURN_TIME_MAX)
                && (!self.in_order || pass.tail.is_skipping())
            {
                return Ok(Progress::More);
            }
            if !self.read_batch(pass, file)? {
                return Ok(Progress::End);
            }
            self.hand_over(pass, file)?;
        }
    }

    /// Reads one batch, or one chunk of a long line. False: there are no more complete lines.
    fn read_batch(&self, pass: &mut Pass, file: &mut Followed) -> io::Result<bool> {
        while !pass.is_batch_full(&file.cursor) {
            match pass.tail.next(&pass.handle)? {
                Step::Line { offset, line } => {
                    let Pass { source, batch, batch_bytes, bad_lines, .. } = pass;
                    *batch_bytes += self.take_line(line, offset, source, file, batch, bad_lines);
                }
                Step::TooLong { offset, bytes } => {
                    let rejection = pass.source.too_long(bytes, offset);
                    self.intake.metrics().lines_read.add(1);
                    self.intake.metrics().bad_lines.add(1);
                    warn!(file = %pass.source.path, offset, bytes, "a line is longer than max_line_bytes; it is skipped");
                    pass.batch.rejections.push(rejection);
                }
                Step::Scanned => return Ok(true),
                Step::End => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Puts what a line means into the batch. Returns the bytes of that.
    fn take_line(
        &self,
        line: &[u8],
        offset: u64,
        source: &Source,
        file: &mut Followed,
        batch: &mut Batch,
        bad_lines: &mut u64,
    ) -> u64 {
        let metrics = self.intake.metrics();
        let (events, rejections) = (batch.events.len(), batch.rejections.len());
        let active_before = file.cursor.session.last_activity;
        let Followed { cursor, beginning, .. } = file;
        let mut none = Memory::default();
        let memory = beginning.as_mut().map_or(&mut none, |beginning| &mut beginning.memory);
        let report = source.read(line, offset, cursor, memory, |found| match found {
            Found::Event(candidate) => self.intake.admit(candidate, batch),
            // Its own file tells of it.
            Found::OfOther(session, _) if ends::has_transcript(&self.files, session) => {}
            Found::OfOther(_, candidate) => self.intake.admit(candidate, batch),
            Found::Unreadable(rejection) => batch.rejections.push(rejection),
            Found::NoTurn(reason) => metrics.lines_skipped.add(reason, 1),
        });
        if file.cursor.session.last_activity != active_before {
            file.advanced_at = Some(Instant::now());
        }
        if !report.is_blank {
            metrics.lines_read.add(1);
        }
        for unknown in &report.unknowns {
            self.note_unknown(unknown, source);
        }
        if let Some(bad) = &report.bad {
            metrics.bad_lines.add(1);
            *bad_lines += 1;
            if *bad_lines <= WARNINGS_PER_PASS_MAX {
                warn!(file = %source.path, offset, bytes = line.len(), error = %bad,
                      "a line can't be read; it is kept among the dead letters");
            }
        }
        let made = batch.events.iter().skip(events).map(|event| event.payload().as_json().len());
        let kept = batch.rejections.iter().skip(rejections).map(|rejection| rejection.bytes.len());
        made.chain(kept).sum::<usize>() as u64
    }

    /// Counts and logs what this version does not know. Nothing is lost by it: such a line is judged by all that is known.
    fn note_unknown(&self, unknown: &Unknown, source: &Source) {
        let metrics = self.intake.metrics();
        let Unknown { field, value, version } = unknown;
        metrics.format_unknown.add(field, 1);
        if *field == UNKNOWN_TYPE {
            metrics.unknown_line_types.add(value, 1);
        }
        if metrics.unknown_formats.note(field, value, version, Instant::now()) {
            let (value, version) = (name_or_none(value), name_or_none(version));
            warn!(field, value, version, file = %source.path,
                  "a transcript has something that this version does not know; see whether there is a newer one of \
                   headspace-watcher; \"headspace-watcher explain FILE\" shows what is made of each line");
        }
    }

    /// Reads a last line that has no newline, once its file is quiet and if it is one complete object. Logs once where it is
    /// not.
    fn read_unterminated(
        &mut self,
        pass: &mut Pass,
        file: &mut Followed,
        metadata: &Metadata,
    ) -> Result<(), ReadError> {
        if pass.tail.rest_bytes() == 0 {
            return Ok(());
        }
        let since = *file.unterminated.get_or_insert_with(Instant::now);
        // By its own time where that is past, else (a clock that was set) by how long we have known it.
        let age = metadata.modified().ok().and_then(|modified| modified.elapsed().ok());
        if age.unwrap_or_default().max(since.elapsed()) < UNTERMINATED_QUIET {
            return Ok(());
        }
        file.unterminated = None;
        let (judged, line) = pass.tail.last_line(&pass.handle, file.agent)?;
        match judged {
            LastLine::Blank => {}
            LastLine::Incomplete => self.note_incomplete(file, pass.tail.rest_bytes()),
            LastLine::Complete => {
                let Pass { tail, source, batch, bad_lines, .. } = pass;
                self.take_line(&line, tail.offset(), source, file, batch, bad_lines);
                tail.take_last_line(&line);
                self.hand_over(pass, file)?;
            }
        }
        Ok(())
    }

    /// Logs that the last line of a quiet session's transcript is incomplete; of each file once, and of a few files.
    fn note_incomplete(&mut self, file: &Followed, bytes: u64) {
        let offset = file.cursor.offset;
        let logged = &mut self.logged.incomplete;
        let is_logged = logged.get(&file.path) == Some(&offset) || logged.len() >= FILE_WARNINGS_MAX;
        if is_logged || file.kind == TranscriptKind::SubAgent {
            return;
        }
        logged.insert(Arc::clone(&file.path), offset);
        warn!(file = %file.path.display(), offset, bytes,
              "the last line of a transcript is incomplete and not stored; \"headspace-watcher verify\" lists all such files");
    }

    /// Logs that lines of a file may have been rewritten in place: those are not read again.
    fn note_change_in_place(&mut self, file: &Followed, stamp: &Stamp) {
        let is_changed = file.seen.is_some_and(|seen| seen.is_modified_in_place(stamp));
        if !is_changed || file.cursor.offset == 0 || self.logged.in_place >= FILE_WARNINGS_MAX {
            return;
        }
        self.logged.in_place += 1;
        warn!(file = %file.path.display(),
              "a transcript was modified without new bytes; if lines were rewritten in place, they are not read again: \
               \"headspace-watcher verify\" finds them");
    }

    /// Hands what was read over to the queue, together with the file's cursor.
    fn hand_over(&mut self, pass: &mut Pass, file: &mut Followed) -> Result<(), QueueError> {
        if pass.tail.offset() == file.cursor.offset {
            return Ok(());
        }
        file.cursor.offset = pass.tail.offset();
        file.cursor.fingerprint = pass.tail.fingerprint();
        let mut batch = std::mem::take(&mut pass.batch);
        pass.made_bytes += std::mem::take(&mut pass.batch_bytes);
        batch.cursors.push((file.path.to_path_buf(), Some(file.cursor.clone())));
        self.outbox.submit(batch)
    }

    fn submit_cursor(&mut self, file: &Followed) -> Result<(), QueueError> {
        let mut batch = Batch::default();
        batch.cursors.push((file.path.to_path_buf(), Some(file.cursor.clone())));
        self.outbox.submit(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_is_refused_and_does_not_hang() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert!(open(&path).is_err());
    }
}
