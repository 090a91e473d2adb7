//! Reads what is new in one file: whole lines from its cursor on, and nothing that could still change.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{info, warn};
use xxhash_rust::xxh3::xxh3_64;

use super::super::sessions::{self, Roots};
use super::descent::Beginning;
use super::resting::Group;
use super::{Follower, identity};
use crate::claude::line::{TranscriptKind, UNKNOWN_TYPE, Unknown};
use crate::claude::session::End;
use crate::claude::transcript::{self, Found, LastLine, OtherSession, Source};
use crate::event::{Cursor, Sequence};
use crate::queue::{Batch, QueueError};
use crate::telemetry::name_or_none;

/// How long a file must be unchanged before its last line is read without a newline.
pub const UNTERMINATED_QUIET: Duration = Duration::from_secs(5);

/// Bytes that are read at once.
pub const CHUNK_BYTES: usize = 1 << 20;

/// Events of one batch: with lines of a kilobyte about as much as a chunk.
const BATCH_EVENTS_MAX: usize = 1024;

/// Bytes of events and of damaged lines in one batch, above those of one line.
const BATCH_BYTES_MAX: u64 = 4 << 20;

/// Cursors that moved over lines which are no events, in one batch.
const MOVED_CURSORS_MAX: usize = 256;

/// Bytes that are read from one file, or made of it, before others have their turn, and the time that takes; except where
/// the order of files matters.
const TURN_BYTES_MAX: u64 = 8 << 20;
const TURN_TIME_MAX: Duration = Duration::from_millis(200);

/// Bytes at the start of the file and before the offset that a fingerprint covers, each.
const FINGERPRINT_BYTES: usize = 1024;

/// Bytes before `scanned_to` by which it is known again.
const SCANNED_BYTES: u64 = 256;

/// Warnings about one file's bad lines in one go; the rest is counted.
const WARNINGS_PER_LOOK_MAX: u64 = 5;

/// Files of which one run logs that their last line is incomplete, and that they were modified in place.
const FILE_WARNINGS_MAX: u32 = 5;

/// One transcript that is followed.
pub struct Followed {
    pub kind: TranscriptKind,
    /// Which of the projects folders it lies below.
    pub roots: Roots,
    pub path: Arc<Path>,
    pub cursor: Cursor,
    /// How the file was when it was last read to its end. `None`: there may be more to read.
    pub seen: Option<Stamp>,
    /// Whether there was more to read when others had their turn.
    has_more: bool,
    /// When it was read last in this run.
    pub read_at: Option<Instant>,
    /// When it was last modified, as far as is known; seconds since 1970.
    pub modified: Option<i64>,
    /// No newline stands between the cursor and `scanned_to`, where the bytes before have this hash.
    pub(super) scanned_to: u64,
    scanned_hash: u64,
    /// Since when a last line without newline is there that may be whole: look again when the file has been quiet.
    pub unterminated: Option<Instant>,
    /// Said already that it can't be read.
    pub unreadable: bool,
    /// It was not there when it was last looked at.
    pub is_gone: bool,
    /// Where the last line begins of which was said that it is not complete.
    incomplete_at: Option<u64>,
    /// When a line was read in this run that is its session's latest activity.
    pub advanced_at: Option<Instant>,
    /// The newest event that came from it in this run.
    pub newest: Option<Sequence>,
    /// What is known of its beginning, while nothing of its own was read.
    pub(super) beginning: Option<Box<Beginning>>,
}

/// By what a changed file is told from an unchanged one without reading it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    inode: u64,
    size: u64,
    /// Unlike the time of modification nobody can set it.
    changed: i64,
    changed_nanoseconds: u32,
    modified_nanoseconds: u32,
    /// Seconds since 1970.
    pub modified: i64,
}

impl Stamp {
    pub fn of(metadata: &Metadata) -> Stamp {
        let nanoseconds = |nanoseconds: i64| u32::try_from(nanoseconds).unwrap_or_default();
        Stamp {
            inode: metadata.ino(),
            size: metadata.len(),
            changed: metadata.ctime(),
            changed_nanoseconds: nanoseconds(metadata.ctime_nsec()),
            modified_nanoseconds: nanoseconds(metadata.mtime_nsec()),
            modified: metadata.mtime(),
        }
    }

    fn modified(&self) -> (i64, u32) {
        (self.modified, self.modified_nanoseconds)
    }
}

/// What one look at a file led to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
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

impl Followed {
    pub fn new(roots: Roots, path: Arc<Path>, kind: TranscriptKind, cursor: Cursor) -> Followed {
        Followed {
            kind,
            roots,
            path,
            scanned_to: cursor.offset,
            scanned_hash: 0,
            cursor,
            seen: None,
            has_more: false,
            read_at: None,
            modified: None,
            unterminated: None,
            unreadable: false,
            is_gone: false,
            incomplete_at: None,
            advanced_at: None,
            newest: None,
            beginning: None,
        }
    }

    pub fn group(&self) -> Group {
        Group::of(&self.kind, &self.path)
    }

    /// Whether it was read to its end, and nothing is to be done before it changes. An empty file has no cursor in the queue.
    pub fn is_quiet(&self) -> bool {
        let is_read = self.seen.is_some() && self.cursor.offset > 0;
        let has_live_other = self.other().is_some_and(OtherSession::is_live);
        is_read && !self.has_more && !self.unreadable && self.unterminated.is_none() && !has_live_other
    }

    /// The other session whose lines were read last, where nothing of its own came after them.
    pub fn other(&self) -> Option<&OtherSession> {
        self.beginning.as_ref()?.other.as_ref()
    }

    /// The end of the other session was told. The cursor says so in the place of the file's own session, of which nothing was
    /// read yet.
    pub fn note_end_of_other(&mut self, end: &End) {
        let other = self.beginning.as_mut().and_then(|beginning| beginning.other.as_mut());
        self.cursor.session.ended_through = other.and_then(|other| other.ended(end));
    }

    /// Whether it is in the middle of a line that is too long to be read: what comes next is skipped.
    pub fn is_skipping(&self, line_bytes_max: u64) -> bool {
        self.scanned_to.saturating_sub(self.cursor.offset) > line_bytes_max
    }

    /// Where the search for the next newline goes on; from the cursor where the file is not as it was.
    fn unscanned(&mut self, handle: &File) -> u64 {
        let start = self.cursor.offset;
        if self.scanned_to > start && scanned_hash(handle, start, self.scanned_to).ok() != Some(self.scanned_hash) {
            self.scanned_to = start;
        }
        self.scanned_to.max(start)
    }
}

/// Hash of the last bytes before `end`, at most back to `start`.
fn scanned_hash(handle: &File, start: u64, end: u64) -> io::Result<u64> {
    let length = (end - start).min(SCANNED_BYTES);
    let mut bytes = vec![0; length as usize];
    handle.read_exact_at(&mut bytes, end - length)?;
    Ok(xxh3_64(&bytes))
}

/// The bytes that a cursor's fingerprint covers. Kept from what was *read*, not looked up when the cursor has moved on:
/// in between the file may have been rewritten, and then its new bytes would pass for the ones that were read.
pub struct Place {
    head: Vec<u8>,
    tail: Vec<u8>,
    offset: u64,
}

impl Place {
    /// As the file is now at `offset`.
    pub fn at(handle: &File, offset: u64) -> io::Result<Place> {
        let length = usize::try_from(offset).unwrap_or(usize::MAX).min(FINGERPRINT_BYTES);
        let mut place = Place { head: vec![0; length], tail: vec![0; length], offset };
        handle.read_exact_at(&mut place.head, 0)?;
        handle.read_exact_at(&mut place.tail, offset - length as u64)?;
        Ok(place)
    }

    /// Moves on over `bytes`, which were read at the offset.
    fn advance(&mut self, bytes: &[u8]) {
        let missing = FINGERPRINT_BYTES.saturating_sub(self.head.len()).min(bytes.len());
        self.head.extend_from_slice(bytes.get(..missing).unwrap_or_default());
        let new = bytes.get(bytes.len().saturating_sub(FINGERPRINT_BYTES)..).unwrap_or_default();
        let kept = FINGERPRINT_BYTES - new.len();
        self.tail.drain(..self.tail.len().saturating_sub(kept));
        self.tail.extend_from_slice(new);
        self.offset += bytes.len() as u64;
    }

    /// Hash over the first bytes of the file, the last ones before the offset, and the offset.
    pub fn fingerprint(&self) -> u64 {
        let mut bytes = [0; 2 * FINGERPRINT_BYTES + 8];
        let parts = self.head.iter().chain(&self.tail).copied().chain(self.offset.to_le_bytes());
        for (place, byte) in bytes.iter_mut().zip(parts) {
            *place = byte;
        }
        xxh3_64(&bytes)
    }
}

/// Whether the bytes before the cursor are those that were read.
pub fn stands_where_it_stood(handle: &File, size: u64, cursor: &Cursor) -> io::Result<bool> {
    Ok(cursor.offset == 0
        || (size >= cursor.offset && Place::at(handle, cursor.offset)?.fingerprint() == cursor.fingerprint))
}

/// Looks at a file that is cut short each time between its `stat` and its read. One that ends early at every look is not being
/// cut: it can't be read.
pub(super) const CUT_SHORT_LOOKS_MAX: usize = 4;

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

    pub fn opened(path: &Path) {
        ON_OPENED.with_borrow_mut(|hook| hook.iter_mut().for_each(|hook| hook(path)));
    }
}

/// Opens a transcript for reading. Anything but a file is refused: a pipe would hang us.
pub fn open(path: &Path) -> io::Result<(File, Metadata)> {
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let handle = OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    let metadata = handle.metadata()?;
    if metadata.is_file() { Ok((handle, metadata)) } else { Err(io::Error::other("it is no file")) }
}

impl Follower {
    /// Reads what is new in one file, if anything.
    pub(super) fn look_at(&mut self, path: &Path) -> Result<Progress, QueueError> {
        self.wake_file(path)?;
        let Some(mut file) = self.files.remove(path) else { return Ok(Progress::End) };
        let mut progress = self.read_new(&mut file);
        for _ in 1..CUT_SHORT_LOOKS_MAX {
            if !is_cut_short(&progress) {
                break;
            }
            // Its size now says how it is to be read.
            file.seen = None;
            progress = self.read_new(&mut file);
        }
        file.has_more = !matches!(progress, Ok(Progress::End));
        let key = Arc::clone(&file.path);
        match progress {
            Ok(progress) => {
                self.files.insert(key, file);
                Ok(progress)
            }
            Err(ReadError::Queue(error)) => Err(error),
            Err(ReadError::File(error)) => {
                file.seen = None;
                file.unterminated = None;
                // Gone is no error: the next rescan forgets it, unless its folder is unmounted.
                file.is_gone = error.kind() == io::ErrorKind::NotFound;
                if !file.is_gone && !std::mem::replace(&mut file.unreadable, true) {
                    warn!(file = %path.display(), error = %error,
                          "a transcript can't be read; trying again at every rescan");
                }
                self.files.insert(key, file);
                Ok(Progress::End)
            }
        }
    }

    fn read_new(&mut self, file: &mut Followed) -> Result<Progress, ReadError> {
        let metadata = std::fs::metadata(&file.path)?;
        file.modified = Some(metadata.mtime());
        if file.seen == Some(Stamp::of(&metadata))
            && file.cursor.file == identity(&metadata)
            && file.unterminated.is_none()
        {
            return Ok(Progress::End);
        }
        let stamp = Stamp::of(&metadata);
        if file.seen != Some(stamp) {
            self.active.note_change(file, &stamp);
        }
        file.read_at = Some(Instant::now());
        let (handle, metadata) = open(&file.path)?;
        #[cfg(test)]
        cut::opened(&file.path);
        file.is_gone = false;
        if std::mem::take(&mut file.unreadable) {
            info!(file = %file.path.display(), "the transcript can be read again");
        }
        let stamp = Stamp::of(&metadata);
        let mut place = self.find_place(file, &handle, &metadata)?;
        self.note_change_in_place(file, &stamp);
        let mut source = self.source(file, &metadata);
        self.note_beginning(file, stamp.size, &mut source)?;
        let mut look = Look { handle, source, warnings: 0, work: 0, begun: Instant::now() };
        while file.cursor.offset < stamp.size {
            if self.doorbell.is_stopped() {
                return Ok(Progress::End);
            }
            if self.is_turn_over(&look, file) {
                look.sum_up_warnings();
                return Ok(Progress::More);
            }
            self.wait_for_room();
            if !self.read_chunk(&mut look, &mut place, file)? {
                break;
            }
        }
        if file.seen != Some(stamp) {
            file.unterminated = None;
        }
        self.read_unterminated(&mut look, &mut place, file, &metadata)?;
        look.sum_up_warnings();
        file.seen = Some(stamp);
        if file.cursor.session.last_activity.is_some() {
            file.beginning = None;
        }
        Ok(Progress::End)
    }

    /// Whether others have their turn now.
    fn is_turn_over(&self, look: &Look, file: &Followed) -> bool {
        let is_over = look.work >= TURN_BYTES_MAX || look.begun.elapsed() >= TURN_TIME_MAX;
        is_over && (!self.in_order || file.is_skipping(self.config.line_bytes_max))
    }

    fn source(&self, file: &Followed, metadata: &Metadata) -> Source {
        // What was written since the last look was written just now, whatever the file system's clock says.
        let is_growing = file.seen.is_some_and(|seen| seen.inode == metadata.ino() && seen.size < metadata.len());
        Source {
            kind: file.kind,
            path: file.path.to_string_lossy().into(),
            inactivity_timeout: self.config.inactivity_timeout,
            active_max: if is_growing { sessions::now() } else { sessions::active_max(metadata) },
            inherited_to: 0,
        }
    }

    /// Logs that lines of a file may have been rewritten in place: those are not read again.
    fn note_change_in_place(&mut self, file: &Followed, stamp: &Stamp) {
        let is_changed = file.seen.is_some_and(|seen| {
            (seen.inode, seen.size) == (stamp.inode, stamp.size) && seen.modified() != stamp.modified()
        });
        if !is_changed || file.cursor.offset == 0 || self.changes_logged >= FILE_WARNINGS_MAX {
            return;
        }
        self.changes_logged += 1;
        warn!(file = %file.path.display(),
              "a transcript was modified without new bytes; if lines were rewritten in place, they are not read again: \
               \"headspace-watcher verify\" finds them");
    }

    /// Starts anew where the bytes before the cursor are not those that were read.
    fn find_place(&self, file: &mut Followed, handle: &File, metadata: &Metadata) -> io::Result<Place> {
        let cursor = &mut file.cursor;
        if metadata.len() >= cursor.offset {
            let place = Place::at(handle, cursor.offset)?;
            if cursor.offset == 0 || place.fingerprint() == cursor.fingerprint {
                // Copied or restored from a backup: other inode, same bytes.
                cursor.file = identity(metadata);
                return Ok(place);
            }
        }
        info!(file = %file.path.display(), offset = cursor.offset, bytes = metadata.len(),
              "the transcript was replaced or cut short; reading it anew, what is known already is not stored twice");
        // It is the same session still, with all that was told of it.
        let (project_path, session) = (cursor.project_path.take(), cursor.session);
        *cursor = Cursor { file: identity(metadata), project_path, session, ..transcript::START };
        file.scanned_to = 0;
        file.beginning = None;
        Place::at(handle, 0)
    }

    /// Reads up to one chunk of whole lines and hands them over. False at the end of the whole lines.
    fn read_chunk(&mut self, look: &mut Look, place: &mut Place, file: &mut Followed) -> Result<bool, ReadError> {
        self.intake.metrics().live.reading.beat();
        let start = file.cursor.offset;
        // Bytes that hold no newline are not read again until one has come.
        let unscanned = file.unscanned(&look.handle);
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(self.chunk_bytes, 0);
        let result = read_full_at(&look.handle, &mut buffer, unscanned).map_err(ReadError::File).and_then(|length| {
            look.work += length as u64;
            let bytes = buffer.get(..length).unwrap_or_default();
            match memchr::memrchr(b'\n', bytes) {
                None => {
                    file.scanned_to = unscanned + length as u64;
                    file.scanned_hash = scanned_hash(&look.handle, start, file.scanned_to)?;
                    Ok(length == self.chunk_bytes)
                }
                Some(end) if unscanned == start => {
                    self.take_lines(bytes.get(..=end).unwrap_or_default(), look, place, file).map(|()| true)
                }
                Some(_) => {
                    let first = memchr::memchr(b'\n', bytes).unwrap_or_default();
                    self.take_long_line(unscanned + first as u64 - start, look, place, file).map(|()| true)
                }
            }
        });
        self.buffer = buffer;
        result
    }

    /// A line that is longer than a chunk or came in pieces; its newline is at `line_bytes` after the cursor.
    fn take_long_line(
        &mut self,
        line_bytes: u64,
        look: &mut Look,
        place: &mut Place,
        file: &mut Followed,
    ) -> Result<(), ReadError> {
        let start = file.cursor.offset;
        if line_bytes <= self.config.line_bytes_max {
            let bytes = usize::try_from(line_bytes).unwrap_or(usize::MAX).saturating_add(1);
            let mut line = vec![0; bytes];
            look.handle.read_exact_at(&mut line, start)?;
            return self.take_lines(&line, look, place, file);
        }
        let mut batch = Batch::default();
        self.pass_over(line_bytes, look, file, &mut batch);
        file.cursor.offset += line_bytes + 1;
        *place = Place::at(&look.handle, file.cursor.offset)?;
        self.hand_over(batch, place, file)
    }

    /// Hands over whole lines (each with its newline) that start at the cursor.
    fn take_lines(
        &mut self,
        lines: &[u8],
        look: &mut Look,
        place: &mut Place,
        file: &mut Followed,
    ) -> Result<(), ReadError> {
        let mut batch = Batch::default();
        let mut batch_bytes = 0;
        let mut start = 0;
        let mut handed = 0;
        for end in memchr::memchr_iter(b'\n', lines) {
            let line = lines.get(start..end).unwrap_or_default();
            let (events, rejections) = (batch.events.len(), batch.rejections.len());
            if line.len() as u64 > self.config.line_bytes_max {
                self.pass_over(line.len() as u64, look, file, &mut batch);
            } else {
                self.take_line(line, look, file, &mut batch);
            }
            let made = batch.events.iter().skip(events).map(|event| event.payload().as_json().len());
            let made = made.chain(batch.rejections.iter().skip(rejections).map(|rejection| rejection.bytes.len()));
            batch_bytes += made.sum::<usize>() as u64;
            file.cursor.offset += (end + 1 - start) as u64;
            start = end + 1;
            if batch.events.len() + batch.rejections.len() >= BATCH_EVENTS_MAX || batch_bytes >= BATCH_BYTES_MAX {
                look.work += batch_bytes;
                place.advance(lines.get(handed..start).unwrap_or_default());
                handed = start;
                self.hand_over(std::mem::take(&mut batch), place, file)?;
                // The rest is read again when its turn comes.
                if self.doorbell.is_stopped() || self.is_turn_over(look, file) {
                    return Ok(());
                }
                batch_bytes = 0;
            }
        }
        look.work += batch_bytes;
        place.advance(lines.get(handed..start).unwrap_or_default());
        if handed == start { Ok(()) } else { self.hand_over(batch, place, file) }
    }

    fn take_line(&self, line: &[u8], look: &mut Look, file: &mut Followed, batch: &mut Batch) {
        let metrics = self.intake.metrics();
        let offset = file.cursor.offset;
        let active_before = file.cursor.session.last_activity;
        let Followed { cursor, beginning, .. } = file;
        let mut none = None;
        let other = beginning.as_mut().map_or(&mut none, |beginning| &mut beginning.other);
        let report = look.source.read(line, offset, cursor, other, |found| match found {
            Found::Event(candidate) => self.intake.admit(candidate, batch),
            Found::OfOther(session, _) if self.has_transcript(session) => {}
            Found::OfOther(_, candidate) => self.intake.admit(candidate, batch),
            Found::Unreadable(rejection) => batch.rejections.push(rejection),
            Found::NoTurn(reason) => metrics.lines_skipped.add(reason.label(), 1),
        });
        if file.cursor.session.last_activity != active_before {
            file.advanced_at = Some(Instant::now());
        }
        if !report.is_blank {
            metrics.lines_read.add(1);
        }
        for unknown in &report.unknowns {
            metrics.format_unknown.add(unknown.field, 1);
            if unknown.field == UNKNOWN_TYPE {
                metrics.unknown_line_types.add(&unknown.value, 1);
            }
            self.note_unknown(unknown, look);
        }
        if let Some(bad) = &report.bad {
            metrics.bad_lines.add(1);
            look.warnings += 1;
            if look.warnings <= WARNINGS_PER_LOOK_MAX {
                warn!(file = %look.source.path, offset, bytes = line.len(), error = %bad,
                      "a line can't be read; it is kept among the dead letters");
            }
        }
    }

    /// Nothing is lost by it: such a line is judged by all that is known.
    fn note_unknown(&self, unknown: &Unknown, look: &Look) {
        let Unknown { field, value, version } = unknown;
        if self.intake.metrics().unknown_formats.note(field, value, version, Instant::now()) {
            let (value, version) = (name_or_none(value), name_or_none(version));
            warn!(field, value, version, file = %look.source.path,
                  "a transcript has something that this version does not know; see whether there is a newer one of \
                   headspace-watcher; \"headspace-watcher explain FILE\" shows what is made of each line");
        }
    }

    /// Passes over the line at the cursor, which is longer than `max_line_bytes`.
    fn pass_over(&self, line_bytes: u64, look: &mut Look, file: &Followed, batch: &mut Batch) {
        let offset = file.cursor.offset;
        self.intake.metrics().lines_read.add(1);
        self.intake.metrics().bad_lines.add(1);
        warn!(file = %look.source.path, offset, bytes = line_bytes,
              "a line is longer than max_line_bytes; it is passed over");
        batch.rejections.push(look.source.too_long(line_bytes, offset));
    }

    /// Reads a last line that has no newline, once its file is quiet and if it is one whole object. Logs once where it is not.
    fn read_unterminated(
        &mut self,
        look: &mut Look,
        place: &mut Place,
        file: &mut Followed,
        metadata: &Metadata,
    ) -> Result<(), ReadError> {
        let start = file.cursor.offset;
        let length = metadata.len().saturating_sub(start);
        if length == 0 {
            return Ok(());
        }
        let since = *file.unterminated.get_or_insert_with(Instant::now);
        // By its own time where that is past, else (a clock that was set) by how long we have known it.
        let age = metadata.modified().ok().and_then(|modified| modified.elapsed().ok());
        if age.unwrap_or_default().max(since.elapsed()) < UNTERMINATED_QUIET {
            return Ok(());
        }
        file.unterminated = None;
        if length > self.config.line_bytes_max {
            self.note_incomplete(file, length);
            return Ok(());
        }
        let mut line = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        look.handle.read_exact_at(&mut line, start)?;
        match transcript::last_line(&line, &file.kind) {
            LastLine::Blank => Ok(()),
            LastLine::Incomplete => {
                self.note_incomplete(file, length);
                Ok(())
            }
            LastLine::Complete => {
                let mut batch = Batch::default();
                self.take_line(&line, look, file, &mut batch);
                file.cursor.offset = start + length;
                place.advance(&line);
                self.hand_over(batch, place, file)
            }
        }
    }

    /// Logs that the last line of a quiet session's transcript is incomplete; of each file once, and of a few files.
    fn note_incomplete(&mut self, file: &mut Followed, length: u64) {
        let offset = file.cursor.offset;
        let is_logged = file.incomplete_at.replace(offset) == Some(offset);
        if is_logged || file.kind == TranscriptKind::SubAgent || self.incomplete_logged >= FILE_WARNINGS_MAX {
            return;
        }
        self.incomplete_logged += 1;
        warn!(file = %file.path.display(), offset, bytes = length,
              "the last line of a transcript is incomplete and not stored; \"headspace-watcher verify\" lists all such files");
    }

    /// Hands a batch to the queue together with the file's cursor.
    fn hand_over(&mut self, mut batch: Batch, place: &Place, file: &mut Followed) -> Result<(), ReadError> {
        file.cursor.fingerprint = place.fingerprint();
        file.scanned_to = file.cursor.offset;
        if batch.events.is_empty() && batch.rejections.is_empty() {
            return self.move_cursor(file);
        }
        self.moved.remove(&file.path);
        batch.cursors.extend(self.take_moved());
        batch.cursors.push((file.path.to_path_buf(), Some(file.cursor.clone())));
        Ok(self.submit(batch)?)
    }
}

impl Follower {
    /// Puts a cursor down that moved over lines which are no events: it goes with others, as each batch costs the queue a
    /// sync. Losing it only reads those lines again.
    fn move_cursor(&mut self, file: &Followed) -> Result<(), ReadError> {
        self.moved.insert(Arc::clone(&file.path), file.cursor.clone());
        if self.moved.len() >= MOVED_CURSORS_MAX {
            self.flush_moved()?;
        }
        Ok(())
    }
}

/// One look at one file.
struct Look {
    handle: File,
    source: Source,
    /// Bad lines that were found.
    warnings: u64,
    /// Bytes that were read, and bytes that were made of them.
    work: u64,
    begun: Instant,
}

impl Look {
    fn sum_up_warnings(&self) {
        if self.warnings > WARNINGS_PER_LOOK_MAX {
            warn!(file = %self.source.path, lines = self.warnings - WARNINGS_PER_LOOK_MAX,
                  "more bad lines, not shown");
        }
    }
}

/// Reads until the buffer is full or the file ends.
pub fn read_full_at(handle: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut length = 0;
    while let Some(rest) = buffer.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match handle.read_at(rest, offset + length as u64) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_the_same_read_at_once_or_moved_along() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let bytes: Vec<u8> = (0..5000u32).map(|number| (number % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let handle = File::open(&path).unwrap();
        for step in [1, 7, 100, 1023, 1024, 1025, 3000, 5000] {
            let mut place = Place::at(&handle, 0).unwrap();
            for piece in bytes.chunks(step) {
                place.advance(piece);
                let there = Place::at(&handle, place.offset).unwrap();
                assert_eq!(place.fingerprint(), there.fingerprint(), "step {step} at {}", place.offset);
            }
        }
    }

    #[test]
    fn a_pipe_is_refused_and_does_not_hang() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert!(open(&path).is_err());
    }
}
