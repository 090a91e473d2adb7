//! One file: bytes to complete lines, and how far they have been read.
//!
//! A line ends with its newline. What is behind the last newline is not a line yet; see [`Tail::last_line`]. Lines above
//! `line_bytes_max` are skipped without being held in memory.
//!
//! Pure: bytes come from a [`ReadAt`]. However the same bytes are split into appends, and into reads, they give the same
//! lines at the same offsets and leave the same fingerprint.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use xxhash_rust::xxh3::xxh3_64;

use crate::agent::Agent;
use crate::event::Cursor;
use crate::transcript::LastLine;

/// Bytes that are read at once.
pub(crate) const CHUNK_BYTES: usize = 1 << 20;

/// Bytes at the start of the file and before the offset that a fingerprint covers, each.
const FINGERPRINT_BYTES: usize = 1024;

/// Bytes before [`Scanned::to`] by which it is recognized.
const SCANNED_BYTES: u64 = 256;

/// Where bytes come from.
pub(crate) trait ReadAt {
    /// As [`FileExt::read_at`].
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
}

impl ReadAt for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }
}

/// Reads until the buffer is full or the file ends.
pub(crate) fn read_full_at(file: &(impl ReadAt + ?Sized), buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut length = 0;
    while let Some(rest) = buffer.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + length as u64) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

/// # Errors
/// [`io::ErrorKind::UnexpectedEof`] where the file ends before.
fn read_exact_at(file: &(impl ReadAt + ?Sized), length: usize, offset: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    if read_full_at(file, &mut bytes, offset)? < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

/// The bytes that a cursor's fingerprint covers. Kept from what was *read*, not looked up when the cursor has moved on:
/// in between the file may have been rewritten, and then its new bytes would pass for the ones that were read.
struct FingerprintWindow {
    head: Vec<u8>,
    tail: Vec<u8>,
    offset: u64,
}

impl FingerprintWindow {
    /// As the file is now at `offset`.
    fn at(file: &(impl ReadAt + ?Sized), offset: u64) -> io::Result<FingerprintWindow> {
        let length = usize::try_from(offset).unwrap_or(usize::MAX).min(FINGERPRINT_BYTES);
        let head = read_exact_at(file, length, 0)?;
        let tail = read_exact_at(file, length, offset - length as u64)?;
        Ok(FingerprintWindow { head, tail, offset })
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
    fn fingerprint(&self) -> u64 {
        let mut bytes = [0; 2 * FINGERPRINT_BYTES + 8];
        let parts = self.head.iter().chain(&self.tail).copied().chain(self.offset.to_le_bytes());
        for (place, byte) in bytes.iter_mut().zip(parts) {
            *place = byte;
        }
        xxh3_64(&bytes)
    }
}

/// How far a line that is longer than a chunk has been searched for its newline: those bytes are not read again before it
/// has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Scanned {
    pub(crate) to: u64,
    /// Of the last bytes before `to`.
    hash: u64,
}

/// Hash of the last bytes before `end`, at most back to `start`.
fn hash_before(file: &(impl ReadAt + ?Sized), start: u64, end: u64) -> io::Result<u64> {
    let length = (end - start).min(SCANNED_BYTES);
    Ok(xxh3_64(&read_exact_at(file, length as usize, end - length)?))
}

/// What comes next.
#[derive(PartialEq, Eq, Debug)]
pub(crate) enum Step<'a> {
    /// A complete line, without its newline.
    Line { offset: u64, line: &'a [u8] },
    /// A line above `line_bytes_max`: so many bytes without its newline.
    TooLong { offset: u64, bytes: u64 },
    /// No newline in the chunk that was read. There is more.
    Scanned,
    /// No newline up to the end.
    End,
}

/// One pass over what is new in a file.
pub(crate) struct Tail {
    /// What is read; bytes behind it are left to the next pass.
    size: u64,
    line_bytes_max: u64,
    pub(crate) chunk_bytes: usize,
    /// Its offset is that of the next line.
    window: FingerprintWindow,
    /// No newline stands between the offset and here.
    scanned_to: u64,
    buffer: Vec<u8>,
    /// Offset of the buffer's first byte.
    buffer_at: u64,
    bytes_read: u64,
}

impl Tail {
    /// From the first byte on.
    pub(crate) fn new(size: u64, line_bytes_max: u64) -> Tail {
        Tail {
            size,
            line_bytes_max,
            chunk_bytes: CHUNK_BYTES,
            window: FingerprintWindow { head: Vec::new(), tail: Vec::new(), offset: 0 },
            scanned_to: 0,
            buffer: Vec::new(),
            buffer_at: 0,
            bytes_read: 0,
        }
    }

    /// From the cursor on. `None` where the bytes before it are not those that were read.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] where the file has become shorter than `size`.
    pub(crate) fn resume(
        file: &(impl ReadAt + ?Sized),
        size: u64,
        line_bytes_max: u64,
        cursor: &Cursor,
        scanned: Option<Scanned>,
    ) -> io::Result<Option<Tail>> {
        let mut tail = Tail::new(size, line_bytes_max);
        if cursor.offset > size {
            return Ok(None);
        }
        if cursor.offset > 0 {
            tail.window = FingerprintWindow::at(file, cursor.offset)?;
            if tail.window.fingerprint() != cursor.fingerprint {
                return Ok(None);
            }
        }
        tail.scanned_to = cursor.offset;
        // The beginning of a line may have been taken back.
        if let Some(scanned) = scanned.filter(|scanned| (cursor.offset..=size).contains(&scanned.to))
            && hash_before(file, cursor.offset, scanned.to)? == scanned.hash
        {
            tail.scanned_to = scanned.to;
        }
        Ok(Some(tail))
    }

    /// Where the next line begins.
    pub(crate) fn offset(&self) -> u64 {
        self.window.offset
    }

    pub(crate) fn fingerprint(&self) -> u64 {
        self.window.fingerprint()
    }

    /// Bytes that were read in this pass.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Bytes behind the last line.
    pub(crate) fn rest_bytes(&self) -> u64 {
        self.size.saturating_sub(self.offset())
    }

    /// Whether it is in the middle of a line that is too long to be read.
    pub(crate) fn is_skipping(&self) -> bool {
        self.scanned_to - self.offset() > self.line_bytes_max
    }

    /// To be given to the next pass; `None` where reading the line again from its start is as cheap.
    pub(crate) fn scanned(&self, file: &(impl ReadAt + ?Sized)) -> io::Result<Option<Scanned>> {
        if self.scanned_to - self.offset() < self.chunk_bytes as u64 {
            return Ok(None);
        }
        let hash = hash_before(file, self.offset(), self.scanned_to)?;
        Ok(Some(Scanned { to: self.scanned_to, hash }))
    }

    /// The next line. A file that is cut short meanwhile ends there.
    pub(crate) fn next(&mut self, file: &(impl ReadAt + ?Sized)) -> io::Result<Step<'_>> {
        let offset = self.offset();
        let mut length = self.buffered_line();
        if length.is_none() {
            match self.fill(file)? {
                Filled::Line(bytes) => length = Some(bytes),
                Filled::TooLong(bytes) => return Ok(Step::TooLong { offset, bytes }),
                Filled::Nothing if self.scanned_to < self.size => return Ok(Step::Scanned),
                Filled::Nothing => {}
            }
        }
        let Some(length) = length else { return Ok(Step::End) };
        let from = usize::try_from(offset - self.buffer_at).unwrap_or(usize::MAX);
        self.window.advance(self.buffer.get(from..=from + length).unwrap_or_default());
        self.scanned_to = self.window.offset;
        if length as u64 > self.line_bytes_max {
            return Ok(Step::TooLong { offset, bytes: length as u64 });
        }
        Ok(Step::Line { offset, line: self.buffer.get(from..from + length).unwrap_or_default() })
    }

    /// Calls `take` with the offset of each complete line, and the line, until it returns false. Lines that are too long
    /// are skipped.
    pub(crate) fn for_each_line(
        &mut self,
        file: &(impl ReadAt + ?Sized),
        mut take: impl FnMut(u64, &[u8]) -> bool,
    ) -> io::Result<()> {
        loop {
            match self.next(file)? {
                Step::Line { offset, line } if !take(offset, line) => return Ok(()),
                Step::Line { .. } | Step::TooLong { .. } | Step::Scanned => {}
                Step::End => return Ok(()),
            }
        }
    }

    /// What stands behind the last newline, and its bytes; none where they are too many.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] where the file has become shorter.
    pub(crate) fn last_line(&self, file: &(impl ReadAt + ?Sized), agent: Agent) -> io::Result<(LastLine, Vec<u8>)> {
        if self.rest_bytes() > self.line_bytes_max {
            return Ok((LastLine::Incomplete, Vec::new()));
        }
        let bytes = usize::try_from(self.rest_bytes()).unwrap_or(usize::MAX);
        let line = read_exact_at(file, bytes, self.offset())?;
        Ok((agent.last_line(&line), line))
    }

    /// Moves on over the last line, which has no newline.
    pub(crate) fn take_last_line(&mut self, line: &[u8]) {
        self.window.advance(line);
        self.scanned_to = self.window.offset;
    }

    /// Length of the next line, if all of it is in the buffer.
    fn buffered_line(&self) -> Option<usize> {
        let from = usize::try_from(self.offset().checked_sub(self.buffer_at)?).ok()?;
        memchr::memchr(b'\n', self.buffer.get(from..)?)
    }

    /// Reads the next chunk that was not searched for a newline yet; of a line that is longer, then all of it.
    fn fill(&mut self, file: &(impl ReadAt + ?Sized)) -> io::Result<Filled> {
        let (start, from) = (self.offset(), self.scanned_to);
        if from >= self.size {
            return Ok(Filled::Nothing);
        }
        // A long line must not hold its memory on.
        if self.buffer.capacity() > self.chunk_bytes {
            self.buffer = Vec::new();
        }
        let wanted = (self.size - from).min(self.chunk_bytes as u64) as usize;
        self.buffer.resize(wanted, 0);
        let length = read_full_at(file, &mut self.buffer, from)?;
        self.buffer.truncate(length);
        self.buffer_at = from;
        self.bytes_read += length as u64;
        if length < wanted {
            self.size = from + length as u64;
        }
        let Some(newline) = memchr::memchr(b'\n', &self.buffer) else {
            self.scanned_to += length as u64;
            self.buffer.clear();
            return Ok(Filled::Nothing);
        };
        if from == start {
            return Ok(Filled::Line(newline));
        }
        let bytes = from - start + newline as u64;
        if bytes > self.line_bytes_max {
            self.window = FingerprintWindow::at(file, start + bytes + 1)?;
            self.scanned_to = self.window.offset;
            return Ok(Filled::TooLong(bytes));
        }
        self.buffer = read_exact_at(file, usize::try_from(bytes).unwrap_or(usize::MAX).saturating_add(1), start)?;
        self.buffer_at = start;
        // The first one: where its beginning was rewritten meanwhile it ends earlier.
        Ok(memchr::memchr(b'\n', &self.buffer).map_or(Filled::Nothing, Filled::Line))
    }
}

/// What a read led to.
enum Filled {
    /// A line of so many bytes is in the buffer.
    Line(usize),
    /// A line of so many bytes is skipped.
    TooLong(u64),
    Nothing,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use proptest::prelude::*;
    use serde_json::json;
    use uuid::Uuid;

    use super::*;
    use crate::agent::Memory;
    use crate::transcript::{Found, START, Source, TranscriptKind};

    impl ReadAt for [u8] {
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
            let rest = self.get(offset as usize..).unwrap_or_default();
            let length = rest.len().min(buffer.len());
            buffer[..length].copy_from_slice(&rest[..length]);
            Ok(length)
        }
    }

    const LINE_BYTES_MAX: u64 = 400;
    const SESSION: Uuid = Uuid::from_u128(1);

    /// What was made of a file: lines by offset (`None`: too long), events in their order, and the cursor.
    #[derive(PartialEq, Debug)]
    struct Outcome {
        lines: BTreeMap<u64, Option<Vec<u8>>>,
        events: Vec<String>,
        cursor: Cursor,
        memory: Memory,
    }

    /// Reads a file that has each of these sizes in turn.
    fn read(file: &[u8], sizes: &[usize], chunk_bytes: usize) -> Outcome {
        let source = Source {
            agent: Agent::ClaudeCode,
            kind: TranscriptKind::Main { session: SESSION },
            path: "/p/a.jsonl".into(),
            inactivity_timeout: Duration::from_secs(600),
            active_max: "2026-01-04T00:00:00Z".parse().unwrap(),
            inherited_to: 0,
        };
        let mut outcome =
            Outcome { lines: BTreeMap::new(), events: Vec::new(), cursor: START, memory: Memory::default() };
        let mut scanned = None;
        for size in sizes {
            let now = &file[..*size];
            let resumed = Tail::resume(now, *size as u64, LINE_BYTES_MAX, &outcome.cursor, scanned).unwrap();
            let mut tail = Tail { chunk_bytes, ..resumed.expect("the bytes before the cursor are the same") };
            loop {
                match tail.next(now).unwrap() {
                    Step::Line { offset, line } => {
                        let Outcome { events, cursor, memory, .. } = &mut outcome;
                        source.read(line, offset, cursor, memory, |found| match found {
                            Found::Event(event) => events.push(format!("{} {:?}", event.event_type, event.payload)),
                            Found::OfOther(session, event) => events.push(format!("{session} {}", event.event_type)),
                            Found::Unreadable(bytes) => events.push(format!("{bytes:?}")),
                            Found::NoTurn(_) => {}
                        });
                        assert_eq!(outcome.lines.insert(offset, Some(line.to_vec())), None, "read twice");
                    }
                    Step::TooLong { offset, bytes } => {
                        assert!(bytes > LINE_BYTES_MAX);
                        assert_eq!(outcome.lines.insert(offset, None), None, "read twice");
                    }
                    Step::Scanned => {}
                    Step::End => break,
                }
            }
            (outcome.cursor.offset, outcome.cursor.fingerprint) = (tail.offset(), tail.fingerprint());
            scanned = tail.scanned(now).unwrap();
        }
        outcome
    }

    fn line() -> impl Strategy<Value = Vec<u8>> {
        let prompt = (0u128..4, 0usize..120, 0u32..60).prop_map(|(session, length, minute)| {
            json!({"type": "user", "uuid": Uuid::from_u128(u128::from(minute)), "sessionId": Uuid::from_u128(session.max(1)),
                "cwd": "/w", "timestamp": format!("2026-01-03T10:{minute:02}:00.000Z"), "message": {"content": "x".repeat(length)}})
            .to_string()
            .into_bytes()
        });
        prop_oneof![
            6 => prompt,
            2 => (0usize..1000).prop_map(|length| vec![b'y'; length]),
            1 => prop::collection::vec(any::<u8>().prop_filter("no newline", |byte| *byte != b'\n'), 0..40),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

        #[test]
        fn any_split_of_the_same_bytes_gives_the_same_lines_events_and_cursor(
            lines in prop::collection::vec(line(), 0..12),
            rest in prop::sample::select(vec!["", "{\"type\":", "\0"]),
            cuts in prop::collection::vec(0.0..1.0f64, 0..20),
            chunk_bytes in prop_oneof![1usize..300, Just(CHUNK_BYTES)],
        ) {
            let mut file = lines.join(&b'\n');
            file.push(b'\n');
            file.extend(rest.bytes());
            let mut sizes: Vec<usize> = cuts.iter().map(|cut| (cut * file.len() as f64) as usize).collect();
            sizes.sort_unstable();
            sizes.push(file.len());
            let expected = read(&file, &[file.len()], CHUNK_BYTES);
            let offsets = std::iter::once(0).chain(memchr::memchr_iter(b'\n', &file).map(|at| at as u64 + 1));
            let begins: Vec<u64> = offsets.take(expected.lines.len()).collect();
            prop_assert_eq!(expected.lines.keys().copied().collect::<Vec<_>>(), begins);
            prop_assert_eq!(expected.cursor.offset, (file.len() - rest.len()) as u64);
            prop_assert_eq!(read(&file, &sizes, chunk_bytes), expected);
        }
    }

    #[test]
    fn a_fingerprint_is_the_same_read_at_once_or_moved_along() {
        let bytes: Vec<u8> = (0..5000u32).map(|number| (number % 251) as u8).collect();
        for step in [1, 7, 100, 1023, 1024, 1025, 3000, 5000] {
            let mut window = FingerprintWindow::at(bytes.as_slice(), 0).unwrap();
            for piece in bytes.chunks(step) {
                window.advance(piece);
                let there = FingerprintWindow::at(bytes.as_slice(), window.offset).unwrap();
                assert_eq!(window.fingerprint(), there.fingerprint(), "step {step} at {}", window.offset);
            }
        }
    }

    #[test]
    fn a_file_whose_bytes_before_the_cursor_have_changed_is_not_resumed() {
        let file = b"one\ntwo\n".as_slice();
        let cursor = read(file, &[4], 2).cursor;
        let resumes = |file: &[u8]| Tail::resume(file, file.len() as u64, 100, &cursor, None).unwrap().is_some();
        assert!(resumes(file) && resumes(&file[..4]));
        assert!(!resumes(b"One\ntwo\n") && !resumes(&file[..3]));
        let shorter = Tail::resume(&file[..2], 8, 100, &cursor, None).err().unwrap();
        assert_eq!(shorter.kind(), io::ErrorKind::UnexpectedEof, "cut after its size was asked for");
    }

    #[test]
    fn a_long_line_that_was_taken_back_hides_no_line() {
        let begun = [b'x'; 100].as_slice();
        let mut tail = Tail { chunk_bytes: 10, ..Tail::new(100, 1000) };
        while tail.next(begun).unwrap() == Step::Scanned {}
        let scanned = tail.scanned(begun).unwrap();
        assert_eq!(scanned.map(|scanned| scanned.to), Some(100));
        let file = [b"short\n".as_slice(), &[b'y'; 200]].concat();
        let mut tail = Tail::resume(file.as_slice(), 206, 1000, &START, scanned).unwrap().unwrap();
        assert_eq!(tail.next(file.as_slice()).unwrap(), Step::Line { offset: 0, line: b"short" });
    }

    #[test]
    fn a_file_that_is_cut_short_while_it_is_read_ends_there() {
        let mut tail = Tail { chunk_bytes: 4, ..Tail::new(100, 1000) };
        let file = b"one\ntw".as_slice();
        assert_eq!(tail.next(file).unwrap(), Step::Line { offset: 0, line: b"one" });
        assert_eq!(tail.next(file).unwrap(), Step::End);
        assert_eq!((tail.offset(), tail.rest_bytes()), (4, 2));
    }

    #[test]
    fn the_last_line_is_judged_only_where_it_may_be_read() {
        let judge = |file: &[u8], max| Tail::new(file.len() as u64, max).last_line(file, Agent::ClaudeCode).unwrap();
        assert_eq!(judge(b"{\"type\":\"user\"}", 100), (LastLine::Complete, b"{\"type\":\"user\"}".to_vec()));
        assert_eq!(judge(b"{\"type\":\"user\"}", 10), (LastLine::Incomplete, Vec::new()));
        assert_eq!(judge(b"", 10), (LastLine::Blank, Vec::new()));
    }
}
