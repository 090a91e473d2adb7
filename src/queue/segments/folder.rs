//! The queue's folder: who holds it, what is in it, and how it is opened.
//!
//! ```text
//! <queue>/lock               held while open; process id of the holder
//! <queue>/segment-<n>/       a sled database; n grows. The newest that has the mark `m` is the current one
//! <queue>/HIGHEST            the last number that was acknowledged, and how long the newest log was then: written after each
//!                            sync, never synced itself
//! <queue>/OPENING            the segment that is being opened, and how often that was tried
//! <queue>/DAMAGED            the segment in which a running queue met damage
//! <queue>/UNSYNCED           a sync had failed: the newest segment is copied before anything is built on it
//! <queue>/salvaged-<n>/      what takes the place of a damaged segment, while it is being made
//! <queue>/damaged-<time>-…   what was damaged, kept as it was
//! ```
//!
//! HIGHEST costs one small write and tells what nothing else can: that a log came back shorter than it was acknowledged to be (a
//! disk that lies about syncing, a restored copy, a file cut by a repair of the file system). sled takes such a log for a
//! whole one.
//!
//! Damage has one answer, whatever it is ([`damage`](super::damage)): the segment is moved aside, and what is found in its
//! log takes its place. A segment that sled did not come back from opening is not opened a second time.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::damage::{self, Asked};
use super::log::Log;
use super::piece::{self, Block, Hole, NUMBER_MAX, OlderSegment, Piece, Totals};
use super::reader;
use super::repairs::{QueueConfig, QueueError, Repair};
use super::segment::{self, Changes, Segment, StoreError};
use crate::event::{Sequence, Timestamp};
use crate::private_folder::Ensured;
use crate::queue::faults;
use crate::queue::folder::{ensure_folder, restrict, storage, sync_folder};
use crate::regular_file;

const DAMAGED_MARK: &str = "DAMAGED";
const UNSYNCED_MARK: &str = "UNSYNCED";
const OPENING_MARK: &str = "OPENING";
const HIGHEST: &str = "HIGHEST";

/// Keys removed in one batch when left-overs of a crash are cleared.
const CLEAR_KEYS_MAX: usize = 1024;

/// Bytes that are copied at once.
const COPY_BYTES: usize = 512 << 10;

/// Holding it is holding the queue; the system lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// The file HIGHEST, open for writing.
pub struct Mark {
    file: File,
    written: Highest,
}

/// What stands in it.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Highest {
    sequence: u64,
    segment: u64,
    log_bytes: u64,
}

impl Mark {
    fn open(path: &Path) -> io::Result<Mark> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(path.join(HIGHEST))?;
        let mut text = Vec::new();
        (&mut file).take(128).read_to_end(&mut text)?;
        // What can't be read says nothing: it is a safeguard, not a record.
        let numbers = String::from_utf8_lossy(&text);
        let mut numbers =
            numbers.split_whitespace().map_while(|number| number.parse().ok().filter(|n| *n < NUMBER_MAX));
        let mut next = || numbers.next().unwrap_or(0);
        let written = Highest { sequence: next(), segment: next(), log_bytes: next() };
        Ok(Mark { file, written })
    }

    fn forget_length(&mut self) -> io::Result<()> {
        self.write(Highest { log_bytes: 0, ..self.written })
    }

    /// Notes that everything up to `sequence` is durable, with a log of this length.
    pub fn raise(&mut self, sequence: u64, segment: &Segment) -> io::Result<()> {
        let now = Highest { sequence, segment: segment.number, log_bytes: segment.bytes() };
        if now == self.written { Ok(()) } else { self.write(now) }
    }

    fn write(&mut self, now: Highest) -> io::Result<()> {
        let text = format!("{:020} {:010} {:020}\n", now.sequence, now.segment, now.log_bytes);
        self.file.write_all_at(text.as_bytes(), 0)?;
        self.written = now;
        Ok(())
    }
}

/// Dead letters, and the bytes of what they hold.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Letters {
    pub count: u64,
    pub bytes: u64,
}

/// A queue's folder, opened.
pub struct Opened {
    pub mark: Mark,
    pub log: Log,
    pub acknowledged: Totals,
    pub settled: Totals,
    pub letters: Letters,
    /// The oldest event that waits, and when it was captured.
    pub oldest: Option<(Sequence, Timestamp)>,
    /// The newest event that waits.
    pub newest: Option<Sequence>,
    pub repairs: Vec<Repair>,
}

/// Opens the folder for work: makes it where it is missing, and puts right what can be.
pub fn open(config: &QueueConfig) -> Result<(Lock, Opened), QueueError> {
    let path = &config.path;
    let io = |error: io::Error| storage(path, &error);
    let mut repairs = Vec::new();
    if let Ensured::Tightened { mode } = ensure_folder(path)? {
        repairs.push(Repair::FolderTightened { folder: path.clone(), mode });
    }
    let lock = take_lock(path)?;
    faults::reach("open-locked");
    repairs.extend(move_old_format(path).map_err(io)?);
    let mut opened = recover(path).map_err(|error| of_store(path, error))?;
    restrict(path);
    repairs.append(&mut opened.repairs);
    faults::reach("open-recovered");
    Ok((lock, Opened { repairs, ..opened }))
}

pub fn of_store(path: &Path, error: StoreError) -> QueueError {
    match error {
        StoreError::Io(cause) => storage(path, &cause),
        StoreError::Damaged { cause, .. } => QueueError::Damaged { path: path.to_owned(), cause },
    }
}

/// What an earlier version of the program has written, moved away.
fn move_old_format(path: &Path) -> io::Result<Option<Repair>> {
    if !path.join("CURRENT").exists() && !path.join("sled-1").exists() {
        return Ok(None);
    }
    let time = Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let to = path.join(format!("old-{time}"));
    fs::create_dir(&to)?;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let is_old = ["CURRENT", HIGHEST, DAMAGED_MARK, "REREAD"].iter().any(|old| name == *old)
            || name.as_encoded_bytes().starts_with(b"sled-");
        if is_old {
            fs::rename(entry.path(), to.join(name))?;
        }
    }
    sync_folder(&to)?;
    sync_folder(path)?;
    Ok(Some(Repair::OldFormat { to }))
}

/// What stands in the folder, cleared of left-overs, with everything in the place of what is damaged that can be had.
pub fn recover(path: &Path) -> Result<Opened, StoreError> {
    /// Far more than there are segments to be opened first.
    const TRIES_MAX: usize = 100;
    let (mut repairs, mut last) = (Vec::new(), String::new());
    for _ in 0..TRIES_MAX {
        match recover_once(path, &mut repairs) {
            // It opened, and could not be read.
            Err(StoreError::Damaged { segment, cause }) => {
                mark_damaged(path, segment);
                last = format!("segment {segment}: {cause}");
            }
            opened => return opened.map(|opened| Opened { repairs, ..opened }),
        }
    }
    Err(StoreError::Io(format!("damage is found again and again, at last in {last}")))
}

fn recover_once(path: &Path, repairs: &mut Vec<Repair>) -> Result<Opened, StoreError> {
    damage::finish_replacing(path)?;
    let mut mark = Mark::open(path)?;
    let (segment, mut acknowledged) = open_newest(path, &mut mark, repairs)?;
    let mut settled = segment.piece(&piece::single_key(piece::SETTLED), Totals::of)?.unwrap_or_default();
    let mut older = read_older(&segment)?;
    older.retain(|one| one.last > settled.sequence);
    let mut holes = read_holes(&segment)?;
    if mark.written.sequence > acknowledged.sequence {
        let (from, to) = (acknowledged.sequence + 1, mark.written.sequence);
        repairs.push(Repair::LogCut { from, to });
        let hole = Hole { first: from, last: to, events: to + 1 - from, bytes: 0 };
        acknowledged = Totals { sequence: to, events: acknowledged.events + hole.events, bytes: acknowledged.bytes };
        let mut changes = Changes::default();
        changes.insert(piece::single_key(piece::ACKNOWLEDGED), acknowledged.encode(piece::ACKNOWLEDGED, 0));
        changes.insert(piece::key(piece::HOLE, from), hole.encode());
        segment.apply(changes)?;
        holes.push(hole);
    }
    remove_uncommitted(&segment, acknowledged.sequence + 1, repairs)?;
    let damaged = read_mark(path, DAMAGED_MARK).map(|(number, _)| number);
    let mut log = Log::new(path, segment, older, holes);
    for one in log.older.clone() {
        let damage = if damaged == Some(one.number) {
            "the queue had stopped at it".to_owned()
        } else {
            // It is opened, and looked at as a whole, when it is read.
            let bytes =
                fs::metadata(segment::folder_of(path, one.number).join("db")).map_or(0, |metadata| metadata.len());
            if bytes >= one.log_bytes {
                continue;
            }
            format!("its log has {bytes} bytes and had {}", one.log_bytes)
        };
        replace_older(path, &mut log, one, damage, settled.sequence, repairs)?;
    }
    if repairs.iter().any(Repair::is_loss) {
        forget_cursors(&log.newest)?;
    }
    // What an earlier process wrote may be in the system's memory only: nothing leaves before it is on disk.
    log.newest.sync()?;
    if path.join(UNSYNCED_MARK).exists() {
        log = copy_newest(path, &log, &acknowledged, &settled)?;
    }
    remove_left_overs(path, &log, repairs)?;
    if settled.sequence > acknowledged.sequence {
        settled = acknowledged;
    }
    let letters = count_letters(&log.newest)?;
    let oldest = reader::oldest(&log, settled.sequence + 1, acknowledged.sequence)?;
    let newest = reader::newest(&log, settled.sequence + 1, acknowledged.sequence)?;
    mark.raise(acknowledged.sequence, &log.newest)?;
    for name in [DAMAGED_MARK, UNSYNCED_MARK, OPENING_MARK] {
        remove_mark(path, name)?;
    }
    Ok(Opened { mark, log, acknowledged, settled, letters, oldest, newest, repairs: Vec::new() })
}

/// Opens the newest segment that was ever in use.
fn open_newest(path: &Path, mark: &mut Mark, repairs: &mut Vec<Repair>) -> Result<(Segment, Totals), StoreError> {
    let numbers = segments(path)?;
    let highest = mark.written;
    for (index, number) in numbers.iter().copied().enumerate().rev() {
        let folder = segment::folder_of(path, number);
        let older = numbers.get(..index).unwrap_or_default();
        let log_bytes = fs::metadata(folder.join("db")).map_or(0, |metadata| metadata.len());
        let damage = if read_mark(path, DAMAGED_MARK).is_some_and(|(damaged, _)| damaged == number) {
            "the queue had stopped at it".to_owned()
        } else if number == highest.segment && log_bytes < highest.log_bytes {
            format!("its log has {log_bytes} bytes and had {}", highest.log_bytes)
        } else if number == highest.segment
            && !damage::is_whole(&folder.join("db"), None, highest.sequence).unwrap_or(false)
        {
            "numbers are missing in its log".to_owned()
        } else if !begin_opening(path, number)? {
            "sled did not come back from opening it".to_owned()
        } else {
            // sled shortens a log as it opens it: who dies before the length is noted anew must not find it cut.
            mark.forget_length()?;
            match Segment::open(&folder, number) {
                Ok((segment, is_without_snapshots)) => {
                    faults::reach("open-segment-opened");
                    repairs.extend(is_without_snapshots.then_some(Repair::SnapshotsSetAside { segment: number }));
                    match segment.piece(&piece::single_key(piece::ACKNOWLEDGED), Totals::of) {
                        Ok(Some(acknowledged)) => {
                            remove_mark(path, OPENING_MARK)?;
                            return Ok((segment, acknowledged));
                        }
                        // It was being made when the process died: nothing was ever acknowledged in it.
                        Ok(None) if number != highest.segment => continue,
                        Ok(None) => "its mark is missing".to_owned(),
                        Err(StoreError::Damaged { cause, .. }) => cause,
                        Err(error) => return Err(error),
                    }
                }
                Err(StoreError::Damaged { cause, .. }) => cause,
                Err(error) => return Err(error),
            }
        };
        return replace_newest(path, number, older, mark, damage, repairs);
    }
    create_first(path)
}

/// Makes the first segment.
fn create_first(path: &Path) -> Result<(Segment, Totals), StoreError> {
    let number = segments(path)?.last().map_or(1, |last| last + 1);
    let segment = Segment::open(&segment::folder_of(path, number), number)?.0;
    let acknowledged = Totals::default();
    let mut changes = Changes::default();
    changes.insert(piece::single_key(piece::ACKNOWLEDGED), acknowledged.encode(piece::ACKNOWLEDGED, 0));
    segment.apply(changes)?;
    segment.sync_folder()?;
    faults::reach("open-segment-created");
    Ok((segment, acknowledged))
}

/// Puts what is found of the newest segment in its place.
fn replace_newest(
    path: &Path,
    number: u64,
    others: &[u64],
    mark: &mut Mark,
    cause: String,
    repairs: &mut Vec<Repair>,
) -> Result<(Segment, Totals), StoreError> {
    // What it said of the others is lost: they tell themselves.
    let mut older: Vec<OlderSegment> = Vec::new();
    let mut before = None;
    for other in others {
        let first = older.last().map_or(1, |before| before.last + 1);
        let unreadable = OlderSegment { number: *other, first, last: first, log_bytes: u64::MAX };
        let (extent, totals) = extent_of(path, *other).unwrap_or((unreadable, None));
        before = totals;
        older.push(extent);
    }
    let first = older.last().map_or(1, |before| before.last + 1);
    let asked = Asked { number, first, before, end: None, last_min: mark.written.sequence, is_newest: true };
    let salvaged = damage::salvage(path, asked, |segment, salvaged| {
        let mut changes = Changes::default();
        older.retain(|one| salvaged.settled.is_none_or(|settled| one.last > settled.sequence));
        put_older(&mut changes, &older);
        for hole in &salvaged.holes {
            changes.insert(piece::key(piece::HOLE, hole.first), hole.encode());
        }
        // Where the mark of what is settled is lost, all is delivered once more, and refused by its receipts.
        let settled = settled_totals(path, segment, &older, salvaged)?;
        changes.insert(piece::single_key(piece::SETTLED), settled.encode(piece::SETTLED, 0));
        changes.insert(piece::single_key(piece::ACKNOWLEDGED), salvaged.end.encode(piece::ACKNOWLEDGED, 0));
        segment.apply(changes)?;
        // What takes its place is shorter.
        Ok(mark.forget_length()?)
    })?;
    let segment = Segment::open(&segment::folder_of(path, number), number)?.0;
    let missing = salvaged.holes.iter().map(|hole| hole.events).sum();
    repairs.push(Repair::SegmentSetAside { to: salvaged.to, cause, found: salvaged.found, missing });
    Ok((segment, salvaged.end))
}

/// The totals up to what is settled: what is behind it counts as pending.
fn settled_totals(
    path: &Path,
    segment: &Segment,
    older: &[OlderSegment],
    salvaged: &damage::Salvaged,
) -> Result<Totals, StoreError> {
    let settled = salvaged.settled.filter(|settled| settled.sequence <= salvaged.end.sequence);
    if let Some(settled) = settled.filter(|_| older.is_empty()) {
        return Ok(settled);
    }
    let first_block = match older.first() {
        Some(one) => {
            let oldest = Segment::open(&segment::folder_of(path, one.number), one.number)?.0;
            oldest.edge(piece::keys(piece::BLOCK, 1..=NUMBER_MAX), false)?
        }
        None => segment.edge(piece::keys(piece::BLOCK, 1..=NUMBER_MAX), false)?,
    };
    let before = first_block.and_then(|(_, value)| Some(Block::of(&Piece::decode(&value)?)?.before));
    // Everything that is there is to be delivered. What is missing before it counts as settled: a segment goes only once all
    // in it is, and the mark that was found may be older than that.
    let before = before.unwrap_or(salvaged.end);
    Ok(settled.filter(|settled| settled.sequence > before.sequence).unwrap_or(before))
}

/// What an older segment holds, by itself, and the totals up to its end. `None` where it can't be read.
fn extent_of(path: &Path, number: u64) -> Option<(OlderSegment, Option<Totals>)> {
    let segment = Segment::open(&segment::folder_of(path, number), number).ok()?.0;
    let blocks = || piece::keys(piece::BLOCK, 1..=NUMBER_MAX);
    let (first, _) = segment.edge(blocks(), false).ok()??;
    let (_, value) = segment.edge(blocks(), true).ok()??;
    let piece = Piece::decode(&value)?;
    let block = Block::of(&piece)?;
    let (last, totals) = (block.last(), block.totals_through(block.last()));
    let extent = OlderSegment { number, first: piece::key_sequence(&first)?, last, log_bytes: segment.bytes() };
    Some((extent, Some(totals)))
}

/// Puts what is found of an older segment in its place.
fn replace_older(
    path: &Path,
    log: &mut Log,
    one: OlderSegment,
    cause: String,
    settled: u64,
    repairs: &mut Vec<Repair>,
) -> Result<(), StoreError> {
    let next = log.older.iter().find(|other| other.first > one.last);
    let next = match next {
        Some(next) => log.open_older(next).ok(),
        None => None,
    };
    let next = next.as_ref().unwrap_or(&log.newest);
    let first_behind = next.edge(piece::keys(piece::BLOCK, one.last + 1..=NUMBER_MAX), false)?;
    let end = first_behind.and_then(|(_, value)| Some(Block::of(&Piece::decode(&value)?)?.before));
    let end = end.filter(|end| end.sequence == one.last);
    let first = one.first.max(settled + 1);
    let asked = Asked { number: one.number, first, before: None, end, last_min: one.last, is_newest: false };
    let salvaged = damage::salvage(path, asked, |_, _| Ok(()))?;
    let folder = segment::folder_of(path, one.number);
    let log_bytes = fs::metadata(folder.join("db"))?.len();
    let fresh = OlderSegment { first, log_bytes, ..one };
    let others = log.older.iter();
    let older: Vec<_> = others.map(|other| if other.number == one.number { fresh } else { *other }).collect();
    let mut changes = Changes::default();
    put_older(&mut changes, &older);
    for hole in &salvaged.holes {
        changes.insert(piece::key(piece::HOLE, hole.first), hole.encode());
    }
    log.newest.apply(changes)?;
    log.newest.sync()?;
    let missing = salvaged.holes.iter().map(|hole| hole.events).sum();
    repairs.push(Repair::SegmentSetAside { to: salvaged.to, cause, found: salvaged.found, missing });
    log.older = older;
    log.holes.extend(salvaged.holes);
    log.holes.sort_unstable_by_key(|hole| hole.first);
    Ok(())
}

/// Copies the newest segment into a fresh one, after a sync that failed: pages of it that the system counts as written may be
/// in its memory only.
fn copy_newest(path: &Path, log: &Log, acknowledged: &Totals, settled: &Totals) -> Result<Log, StoreError> {
    let new = begin_segment(path, log.newest.number + 1)?;
    copy_kinds(&log.newest, &new, b"exdfch", settled.sequence)?;
    finish_segment(&new, &log.older, acknowledged, settled)?;
    Ok(log.with_newest(new.into(), log.older.clone()))
}

/// Makes a segment, empty yet: without a mark it counts as a left-over.
pub fn begin_segment(path: &Path, number: u64) -> Result<Segment, StoreError> {
    let folder = segment::folder_of(path, number);
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    Ok(Segment::open(&folder, number)?.0)
}

/// Copies all of these kinds; of blocks and chunks what is behind `settled`.
fn copy_kinds(from: &Segment, to: &Segment, kinds: &[u8], settled: u64) -> Result<(), StoreError> {
    for kind in kinds {
        let mut from_key = piece::all_keys(*kind).into_inner().0;
        loop {
            let mut changes = Changes::default();
            let mut last = None;
            from.each(from_key.clone()..=piece::all_keys(*kind).into_inner().1, |key, value| {
                let is_block = *kind == piece::BLOCK || *kind == piece::CHUNK;
                let is_settled = is_block
                    && Piece::decode(value)
                        .map(|piece| Block::of(&piece).map_or(piece.sequence, |block| block.last()))
                        .is_some_and(|last| last <= settled);
                if !is_settled {
                    changes.insert(key.to_vec(), value.to_vec());
                }
                last = Some(key.to_vec());
                changes.bytes() < COPY_BYTES
            })?;
            to.apply(changes)?;
            to.sync()?;
            let Some(mut last) = last else { break };
            last.push(0);
            from_key = last;
        }
    }
    Ok(())
}

/// Makes a segment the current one: its mark is the commit, and the last thing that is written.
pub fn finish_segment(
    segment: &Segment,
    older: &[OlderSegment],
    acknowledged: &Totals,
    settled: &Totals,
) -> Result<(), StoreError> {
    let mut changes = Changes::default();
    put_older(&mut changes, older);
    changes.insert(piece::single_key(piece::SETTLED), settled.encode(piece::SETTLED, 0));
    segment.apply(changes)?;
    segment.sync_folder()?;
    faults::reach("segment-copied");
    let mut changes = Changes::default();
    changes.insert(piece::single_key(piece::ACKNOWLEDGED), acknowledged.encode(piece::ACKNOWLEDGED, 0));
    segment.apply(changes)?;
    segment.sync()?;
    restrict(segment.folder());
    faults::reach("segment-committed");
    Ok(())
}

/// Puts the list of the older segments, in as many values as it takes.
pub fn put_older(changes: &mut Changes, older: &[OlderSegment]) {
    let parts = older.chunks(piece::OLDER_MAX).chain(std::iter::once(&[][..]));
    for (index, part) in (0..).zip(parts) {
        changes.insert(piece::indexed_key(piece::OLDER, 0, index), piece::encode_older(part, index));
    }
}

fn read_older(segment: &Segment) -> Result<Vec<OlderSegment>, StoreError> {
    let mut older = Vec::new();
    for index in 0.. {
        let part = segment.piece(&piece::indexed_key(piece::OLDER, 0, index), piece::decode_older)?.unwrap_or_default();
        if part.is_empty() {
            break;
        }
        older.extend(part);
    }
    Ok(older)
}

fn read_holes(segment: &Segment) -> Result<Vec<Hole>, StoreError> {
    let mut holes = Vec::new();
    segment.each(piece::all_keys(piece::HOLE), |_, value| {
        holes.extend(Piece::decode(value).as_ref().and_then(Hole::of));
        true
    })?;
    Ok(holes)
}

fn count_letters(segment: &Segment) -> Result<Letters, StoreError> {
    let mut letters = Letters::default();
    segment.each(piece::all_keys(piece::LETTER), |_, _| {
        letters.count += 1;
        true
    })?;
    segment.each(piece::all_keys(piece::LETTER_CONTENT), |_, value| {
        letters.bytes += value.len() as u64;
        true
    })?;
    Ok(letters)
}

/// Removes what was written for batches that were never committed, so that nothing of it mixes with what comes.
fn remove_uncommitted(segment: &Segment, first: u64, repairs: &mut Vec<Repair>) -> Result<(), StoreError> {
    let mut removed = 0;
    for kind in [piece::BLOCK, piece::CHUNK, piece::LETTER, piece::LETTER_CONTENT] {
        removed += clear(segment, piece::keys(kind, first..=NUMBER_MAX))?;
    }
    if removed > 0 {
        repairs.push(Repair::UncommittedRemoved { keys: removed });
    }
    Ok(())
}

fn forget_cursors(segment: &Segment) -> Result<(), StoreError> {
    clear(segment, piece::all_keys(piece::CURSOR))?;
    segment.sync()
}

/// Removes all keys in `range`; says how many there were.
fn clear(segment: &Segment, range: std::ops::RangeInclusive<Vec<u8>>) -> Result<u64, StoreError> {
    let mut removed = 0;
    let mut before: Option<Vec<u8>> = None;
    loop {
        let mut changes = Changes::default();
        let mut keys = 0;
        let mut first: Option<Vec<u8>> = None;
        segment.each(range.clone(), |key, _| {
            first.get_or_insert_with(|| key.to_vec());
            changes.remove(key.to_vec());
            keys += 1;
            keys < CLEAR_KEYS_MAX
        })?;
        if keys == 0 {
            return Ok(removed);
        }
        if first == before {
            return Err(segment.damaged("a key was removed and is there again"));
        }
        before = first;
        removed += keys as u64;
        segment.apply(changes)?;
    }
}

fn remove_left_overs(path: &Path, log: &Log, repairs: &mut Vec<Repair>) -> Result<(), StoreError> {
    for number in segments(path)? {
        if number == log.newest.number || log.older.iter().any(|one| one.number == number) {
            continue;
        }
        let folder = segment::folder_of(path, number);
        fs::remove_dir_all(&folder)?;
        // One that was settled is no surprise.
        if number > log.newest.number {
            repairs.push(Repair::LeftOverRemoved { folder });
        }
    }
    Ok(())
}

/// Best effort: what stays is removed at the next opening.
pub fn remove_segment(path: &Path, number: u64) {
    let _ = fs::remove_dir_all(segment::folder_of(path, number));
}

/// The segments in the folder, oldest first.
pub fn segments(path: &Path) -> io::Result<Vec<u64>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.strip_prefix("segment-")?.parse::<u64>().ok());
        found.extend(number.filter(|number| *number < NUMBER_MAX && entry.path().is_dir()));
    }
    found.sort_unstable();
    Ok(found)
}

/// Asks the next opening to set a segment aside, because something in it can't be read.
pub fn mark_damaged(path: &Path, segment: u64) {
    // Without the mark the next opening only meets the damage again.
    let _ = write_mark(path, DAMAGED_MARK, &format!("{segment} 1\n"));
}

/// Asks the next opening not to trust what it reads of the newest segment to be on disk.
pub fn mark_unsynced(path: &Path) {
    let _ = write_mark(path, UNSYNCED_MARK, "\n");
}

/// Notes that a segment is about to be opened. False: that was noted twice, and never was it opened.
fn begin_opening(path: &Path, segment: u64) -> io::Result<bool> {
    let tried = read_mark(path, OPENING_MARK).filter(|(number, _)| *number == segment).map_or(0, |(_, tried)| tried);
    if tried >= 2 {
        return Ok(false);
    }
    write_mark(path, OPENING_MARK, &format!("{segment} {}\n", tried + 1))?;
    Ok(true)
}

fn write_mark(path: &Path, name: &str, text: &str) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path.join(name))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// The two numbers of a mark.
fn read_mark(path: &Path, name: &str) -> Option<(u64, u64)> {
    let text = regular_file::read(&path.join(name), 64).ok()?;
    let text = String::from_utf8_lossy(&text);
    let mut numbers = text.split_whitespace().map_while(|number| number.parse().ok());
    Some((numbers.next()?, numbers.next().unwrap_or(0)))
}

fn remove_mark(path: &Path, name: &str) -> io::Result<()> {
    match fs::remove_file(path.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn take_lock(path: &Path) -> Result<Lock, QueueError> {
    let io = |error: io::Error| storage(path, &error);
    let name = path.join("lock");
    loop {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(&name).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // The holder may be just writing it: then it stays unnamed.
                let _ = file.read_to_string(&mut holder);
                return Err(QueueError::InUse { path: path.to_owned(), pid: holder.trim().parse().ok() });
            }
            Err(fs::TryLockError::Error(error)) => return Err(io(error)),
        }
        // Somebody may have removed it, and made a new one, before it was locked.
        let ours = file.metadata().map_err(io)?;
        if !fs::metadata(&name).is_ok_and(|now| (now.dev(), now.ino()) == (ours.dev(), ours.ino())) {
            continue;
        }
        file.set_len(0).map_err(io)?;
        writeln!(file, "{}", std::process::id()).map_err(io)?;
        return Ok(Lock { _file: file });
    }
}
