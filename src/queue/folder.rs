//! The queue's folder: who holds it, which generation is the current one, and what to do when it is damaged.
//!
//! ```text
//! <path>/lock         held while open; says the process id of the holder, who writes it before changing anything else
//! <path>/CURRENT      "format 2\nsled-<n>\n", with sealed generations "format 3": replaced by renaming, so it is always whole
//! <path>/sled-<n>/    generation n: a sled database and its journal; another one is sealed, if n says so, or a left-over
//! <path>/HIGHEST      the highest number that was acknowledged, in decimal: written after each sync, never synced itself
//! <path>/DAMAGED      set when a running queue met damage: the next opening reads and counts all, and starts anew if it can't,
//!                     or at once where sled had not come back
//! <path>/REREAD       set when a single record could not be read: the next opening forgets the cursors
//! <path>.damaged-<UTC time>/   a folder that could not be opened, kept as it was
//! <path>.salvaged/             what takes its place, while it is being made
//! ```
//!
//! HIGHEST costs one small write and tells what nothing else can: that the log came back shorter than it was
//! acknowledged to be (a disk that lies about syncing, a restored copy, a file cut by a repair of the file system).
//! sled takes such a log for a whole one.
//!
//! Bytes that were overwritten in the log can make sled pass over the piece of a page that stood there, without a word:
//! an event is gone, or a delivered one is back. So opening counts what is there where that is quickly done, a running
//! queue looks when it has drained, and where the events are not those of the counters all cursors are forgotten.
//!
//! sled's files never shrink. When they are large and little is pending, the writer makes generation n + 1, copies all
//! there is, syncs it, renames CURRENT and removes generation n. Every step may be the last one of a process: until the
//! rename nothing has happened, after it only a left-over stays. When they are large and much is pending, n is sealed
//! instead: n + 1 gets all but the events that are pending, and says that these are in n, until they are settled.
//!
//! A queue that can't be opened is salvaged into a fresh folder beside it, whole and durable, before the two change
//! places: who dies on the way finds the damaged one again, or the fresh one still to be put in its place.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::{Range, RangeInclusive};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::codec::{self, CodecError, Counters};
use super::database::{DatabaseRepair, StoreError};
use super::looking::{self, Copy, LockStamp};
use super::store::{self, Changes, Copying, Store, StoreRepair};
use super::{QueueConfig, QueueError, block, faults, reader, salvage};
use crate::event::{Sequence, Timestamp};
use crate::private_folder::{self, Ensured, FolderError};
use crate::regular_file;

/// Version of the layout of the folder that CURRENT speaks of: 2 since there is a journal, which a program that knows 1
/// would pass over.
const FORMAT: u32 = 2;

/// Version of the layout with sealed generations, which a program that knows 2 would take for left-overs.
const FORMAT_SEALED: u32 = 3;

const DAMAGED_MARK: &str = "DAMAGED";

/// What stands in DAMAGED when sled had not come back.
const LOOPING: &str = "sled does not come back\n";

const REREAD_MARK: &str = "REREAD";

/// Why a queue ends whose counters speak of events that are not there.
pub const EVENTS_MISSING: &str = "events that were waiting are not in its files any more; the next start counts them and reads the transcripts again";

/// Bytes of events and dead letters up to which opening counts them all: some milliseconds.
const COUNTED_BYTES_MAX: u64 = 4 << 20;

/// Keys removed in one batch when left-overs of a crash are cleared.
const CLEAR_KEYS_MAX: usize = 1024;

/// Something opening had to put right.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Repair {
    /// The process died while sled wrote a snapshot.
    UnfinishedSnapshotRemoved { file: PathBuf },
    /// sled did not open with its snapshots, but did without.
    SnapshotsSetAside { cause: String },
    /// Changes that were acknowledged are missing from the journal; all files are to be read from their beginning.
    JournalDamaged { file: PathBuf, gaps: Vec<Range<u64>> },
    /// Records of a batch whose commit was never reached.
    UncommittedRemoved { keys: u64 },
    /// A generation that is not the current one: the process died during compaction.
    GenerationRemoved { folder: PathBuf },
    /// CURRENT was missing or unreadable; the newest whole generation was taken.
    PointerRebuilt { generation: u64 },
    /// A running queue had met damage, but all of it could be read now.
    Reread,
    /// A running queue had met a record that can't be read; all files are to be read from their beginning.
    CursorsForgotten,
    /// The log is shorter than it was: what had been acknowledged from `from` to `to` is gone.
    LogCut { from: u64, to: u64 },
    /// The counters could not be read and were counted anew; all files are to be read from their beginning.
    CountersRebuilt { cause: String },
    /// The events that wait, or the dead letters, are not those that were taken in; all files are to be read from their
    /// beginning.
    EventsMissing { expected: u64, found: u64 },
    /// The queue could not be read: it was moved away and a new one was started.
    QueueSetAside { to: PathBuf, cause: String, salvaged: u64 },
    /// Others had rights to the folder, by this mode.
    FolderTightened { folder: PathBuf, mode: u32 },
}

impl Repair {
    /// Whether something may be missing now: somebody should look.
    pub fn is_loss(&self) -> bool {
        matches!(
            self,
            Repair::QueueSetAside { .. }
                | Repair::CountersRebuilt { .. }
                | Repair::LogCut { .. }
                | Repair::EventsMissing { .. }
                | Repair::JournalDamaged { .. }
        )
    }
}

impl fmt::Display for Repair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Repair::UnfinishedSnapshotRemoved { file } => {
                write!(f, "removed unfinished snapshot {}", file.display())
            }
            Repair::SnapshotsSetAside { cause } => {
                write!(f, "set snapshots aside and read the whole log: {cause}")
            }
            Repair::JournalDamaged { file, .. } => write!(
                f,
                "a piece of {} was not readable, but what stands before and behind it; transcripts are read again from \
                 their beginning",
                file.display()
            ),
            Repair::UncommittedRemoved { keys } => {
                write!(f, "removed {keys} records that had not been acknowledged")
            }
            Repair::GenerationRemoved { folder } => write!(f, "removed left-over {}", folder.display()),
            Repair::PointerRebuilt { generation } => {
                write!(f, "CURRENT was not readable, took generation {generation}")
            }
            Repair::LogCut { from, to } => write!(
                f,
                "the disk lost what it had confirmed: events numbered {from} to {to}, unless delivered, are gone; \
                 those from transcripts are read again"
            ),
            Repair::Reread => write!(f, "the queue had stopped at damage; everything in it was readable now"),
            Repair::CursorsForgotten => {
                write!(
                    f,
                    "a record was not readable and is a dead letter; transcripts are read again from their beginning"
                )
            }
            Repair::CountersRebuilt { cause } => write!(
                f,
                "counted the queue anew ({cause}); something may be missing: transcripts are read again from their beginning"
            ),
            Repair::EventsMissing { expected, found } => write!(
                f,
                "the disk changed what it had confirmed: {expected} events should be waiting, {found} are there, or they \
                 are not the same, or dead letters are missing; transcripts are read again from their beginning"
            ),
            Repair::QueueSetAside { to, cause, salvaged } => write!(
                f,
                "queue was not readable ({cause}); kept it in {}, started a new one, salvaged {salvaged} events; \
                 transcripts are read again from their beginning",
                to.display()
            ),
            Repair::FolderTightened { folder, mode } => {
                write!(f, "others had rights to {} (mode {mode:04o}); it has mode 0700 now", folder.display())
            }
        }
    }
}

/// Holding it is holding the queue; the system lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// The file HIGHEST, open for writing.
pub struct Mark {
    file: File,
    written: u64,
}

impl Mark {
    fn open(path: &Path) -> io::Result<Mark> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join("HIGHEST"))?;
        let mut text = Vec::new();
        (&mut file).take(64).read_to_end(&mut text)?;
        // What can't be read says nothing: it is a safeguard, not a record. Nor does a number that no queue can have reached.
        let written = std::str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok());
        let written = written.filter(|written| *written < codec::NUMBER_MAX).unwrap_or(0);
        Ok(Mark { file, written })
    }

    /// Notes that everything up to `highest` is durable.
    pub fn raise(&mut self, highest: u64) -> io::Result<()> {
        if highest > self.written {
            self.file.write_all_at(format!("{highest:020}\n").as_bytes(), 0)?;
            self.written = highest;
        }
        Ok(())
    }
}

/// A queue's folder, opened.
pub struct Opened {
    pub lock: Lock,
    pub mark: Mark,
    pub store: Store,
    pub generation: u64,
    pub counters: Counters,
    /// The oldest pending event and when it was captured.
    pub oldest: Option<(Sequence, Timestamp)>,
    /// The newest pending event.
    pub newest: Option<Sequence>,
    pub repairs: Vec<Repair>,
}

/// Opens the folder for work: makes it where it is missing, repairs what can be, sets aside what can't.
pub fn open(config: &QueueConfig) -> Result<Opened, QueueError> {
    let path = &config.path;
    let io = |error: io::Error| storage(path, &error);
    let mut repairs = Vec::new();
    put_salvaged_in_place(path).map_err(io)?;
    let tightened = match ensure_folder(path)? {
        Ensured::Tightened { mode } => Some(Repair::FolderTightened { folder: path.clone(), mode }),
        Ensured::Created | Ensured::Private => None,
    };
    let mut lock = take_lock(path)?;
    faults::reach("open-locked");
    remove_folder(&salvaged_folder(path)).map_err(io)?;

    let recovered = match recover(path, &mut repairs) {
        Err(Failed::Damaged(cause)) => {
            let (fresh, to, salvaged) = start_anew(path)?;
            // The old lock went away with the old folder: whoever opens the new one must find it held.
            lock = fresh;
            // What was found before is of files that are not in use any more.
            repairs.clear();
            repairs.push(Repair::QueueSetAside { to, cause, salvaged });
            recover(path, &mut repairs)
        }
        other => other,
    };
    let Recovered { mark, store, generation, counters, oldest, newest } = recovered.map_err(|failed| match failed {
        Failed::Queue(error) => error,
        Failed::Damaged(cause) => QueueError::Damaged { path: path.clone(), cause },
    })?;
    restrict(path);
    restrict(store.folder());
    repairs.extend(tightened);
    faults::reach("open-recovered");
    Ok(Opened { lock, mark, store, generation, counters, oldest, newest, repairs })
}

/// What stands in the folder, cleared of left-overs.
struct Recovered {
    mark: Mark,
    store: Store,
    generation: u64,
    counters: Counters,
    oldest: Option<(Sequence, Timestamp)>,
    newest: Option<Sequence>,
}

/// Opens the current generation and reads what everybody asks for first. Whatever of it can't be read is damage: met
/// at each start anew, it would else end each.
fn recover(path: &Path, repairs: &mut Vec<Repair>) -> Result<Recovered, Failed> {
    let io = |error: io::Error| Failed::Queue(storage(path, &error));
    let damage = |error: StoreError| failed(path, error);
    if is_looping(path) {
        return Err(Failed::Damaged("sled did not come back from reading its pages".into()));
    }
    let (store, generation, mut counters) = open_current(path, repairs)?;
    if let Some(Repair::JournalDamaged { file, gaps }) =
        repairs.iter().find(|repair| matches!(repair, Repair::JournalDamaged { .. }))
    {
        // Before anything is carried over into sled, which would hide it.
        mark_reread(path);
        counters = salvage::gaps(file, gaps, &store, counters).map_err(damage)?;
    }
    let damaged = path.join(DAMAGED_MARK).exists();
    if damaged {
        store.read_all().map_err(damage)?;
    }
    let mark = Mark::open(path).map_err(io)?;
    if mark.written >= counters.next_sequence {
        repairs.push(Repair::LogCut { from: counters.next_sequence, to: mark.written });
        counters.next_sequence = mark.written + 1;
        write_counters(&store, &counters).map_err(damage)?;
    }
    remove_uncommitted(&store, counters.next_sequence, repairs)
        // What an earlier process wrote may be in the system's memory only: nothing leaves before it is on disk.
        .and_then(|()| store.sync())
        .and_then(|()| store.drop_spent())
        .map_err(damage)?;
    if path.join(REREAD_MARK).exists() {
        forget_cursors(&store).map_err(damage)?;
        fs::remove_file(path.join(REREAD_MARK)).map_err(io)?;
        repairs.push(Repair::CursorsForgotten);
    }
    let oldest = reader::oldest(&store, 1, counters.next_sequence - 1).map_err(damage)?;
    let suspicious = damaged || repairs.iter().any(Repair::is_loss) || (oldest.is_none() && counters.pending > 0);
    let bytes = counters.pending_bytes.saturating_add(counters.dead_letter_bytes);
    if suspicious || bytes <= COUNTED_BYTES_MAX || counters.pending_checksum.is_none() {
        counters = count(&store, counters, repairs).map_err(damage)?;
    }
    if damaged {
        fs::remove_file(path.join(DAMAGED_MARK)).map_err(io)?;
        repairs.push(Repair::Reread);
    }
    let newest = reader::newest(&store, &counters).map_err(damage)?;
    Ok(Recovered { mark, store, generation, counters, oldest, newest })
}

/// Counts everything in `store`, and puts right what its counters say differently.
fn count(store: &Store, counters: Counters, repairs: &mut Vec<Repair>) -> Result<Counters, StoreError> {
    let reader::Counted { counters: counted, unreadable } = reader::recount(store, counters.next_sequence)?;
    if unreadable {
        // Whoever reads that block sets it aside, counts then, and has the cursors forgotten.
        return Ok(counters);
    }
    let expected = Counters { pending_checksum: counters.pending_checksum.or(counted.pending_checksum), ..counters };
    if !counted.agrees_with(&expected) {
        // Durable before the counters, which would hide it.
        forget_cursors(store)?;
        repairs.push(Repair::EventsMissing { expected: expected.pending, found: counted.pending });
    }
    if !counted.agrees_with(&counters) {
        write_counters(store, &counted)?;
        store.sync()?;
        return Ok(counted);
    }
    Ok(counters)
}

/// Copies that are begun again because a watcher came and went meanwhile.
const COPIES_MAX: usize = 3;

/// A copy of a queue's folder, opened to be looked at.
pub struct Inspected {
    pub store: Store,
    pub counters: Counters,
    pub oldest: Option<(Sequence, Timestamp)>,
    /// The generation's folder, of which `store` is a copy.
    pub original: PathBuf,
    /// Goes after `store`.
    pub copy: Copy,
}

/// Opens a copy of the folder to look at: nothing in the folder itself changes, and nobody is kept out of it.
pub fn inspect(path: &Path) -> Result<Inspected, QueueError> {
    let missing = || QueueError::NotFound { path: path.to_owned() };
    if !path.is_dir() {
        return Err(missing());
    }
    let mut copies = 0;
    let (generation, copy) = loop {
        copies += 1;
        let before = LockStamp::of(path)?;
        let copied = copy_current(path);
        let after = LockStamp::of(path)?;
        if before == after {
            break copied?;
        }
        if copies >= COPIES_MAX {
            let cause = "a watcher has opened it meanwhile, again and again; try again".to_owned();
            return Err(looking::look_error(path, cause));
        }
    };
    let original = generation_folder(path, generation);
    let folder = generation_folder(copy.folder(), generation);
    let damaged = |cause: String| {
        let (copied, path) = (copy.folder().to_string_lossy(), path);
        QueueError::Damaged { path: path.to_owned(), cause: cause.replace(&*copied, &path.to_string_lossy()) }
    };
    if is_looping(path) {
        return Err(damaged("sled did not come back from reading its pages".into()));
    }
    let open = || -> Result<_, StoreError> {
        let (store, _) = Store::open(&folder)?;
        let counters = match read_counters(&store)? {
            Ok(counters) => counters,
            Err(_) => reader::recount(&store, 1)?.counters,
        };
        let oldest = reader::oldest(&store, 1, counters.next_sequence.saturating_sub(1))?;
        Ok((store, counters, oldest))
    };
    match open() {
        Ok((store, counters, oldest)) => Ok(Inspected { store, counters, oldest, original, copy }),
        Err(StoreError::Corrupt(cause)) => Err(damaged(cause)),
        Err(StoreError::Io(cause)) => Err(looking::look_error(path, cause)),
    }
}

/// Copies the current generation, which is named, and those before it where they may be sealed.
fn copy_current(path: &Path) -> Result<(u64, Copy), QueueError> {
    let missing = || QueueError::NotFound { path: path.to_owned() };
    let found = generations(path).map_err(|error| looking::look_error(path, error.to_string()))?;
    let (generation, has_sealed) = match read_pointer(path)? {
        Pointer::Generation { number, format } => (number, format >= FORMAT_SEALED),
        Pointer::Missing | Pointer::Unreadable => (*found.last().ok_or_else(missing)?, true),
    };
    // sled would make a new one.
    if !generation_folder(path, generation).join("db").is_file() {
        return Err(missing());
    }
    let is_needed = |number: &u64| *number == generation || (has_sealed && *number < generation);
    let needed: Vec<u64> = found.into_iter().filter(is_needed).collect();
    Ok((generation, Copy::of(path, &needed)?))
}

/// Asks the next opening to set this queue aside, because its pages can't be read.
pub fn mark_damaged(path: &Path) {
    // Without the mark the next opening only meets the damage again.
    mark(path, DAMAGED_MARK, "");
}

/// Asks the next opening to set this queue aside without asking sled, which would not come back.
pub fn mark_looping(path: &Path) {
    mark(path, DAMAGED_MARK, LOOPING);
}

fn is_looping(path: &Path) -> bool {
    fs::read(path.join(DAMAGED_MARK)).is_ok_and(|mark| mark == LOOPING.as_bytes())
}

/// Asks the next opening to forget the cursors, because an event that they have passed can't be read any more: its line
/// still stands in its transcript, and the receipts refuse all others.
pub fn mark_reread(path: &Path) {
    // The unreadable record is a dead letter in any case.
    mark(path, REREAD_MARK, "");
}

/// Best effort: a disk that is failing may not take it.
fn mark(path: &Path, name: &str, text: &str) {
    let _ = File::create(path.join(name)).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
}

/// Makes generation `number`, empty but for its counters, durable in itself; nobody points to it yet.
pub fn create_generation(path: &Path, number: u64, next_sequence: u64) -> Result<(Store, Counters), QueueError> {
    let counters = Counters::new(next_sequence);
    let create = || -> Result<Store, StoreError> {
        let folder = generation_folder(path, number);
        fs::DirBuilder::new().mode(0o700).recursive(true).create(&folder)?;
        let (store, _) = Store::open(&folder)?;
        write_counters(&store, &counters)?;
        store.carry_over()?;
        store.sync_folder()?;
        Ok(store)
    };
    create().map(|store| (store, counters)).map_err(|error| storage(path, &error))
}

/// Makes generation `number` with everything of `old`, durable in itself.
///
/// The counters are written last: a generation that has them is whole.
pub fn copy_generation(path: &Path, old: &Store, number: u64, counters: &Counters) -> Result<Store, StoreError> {
    let new = begin_generation(path, old, number)?;
    faults::reach("compact-begun");
    let mut copying = Copying::begin(old, &new)?;
    for prefix in *b"ckedf" {
        for pair in old.range(store::prefix_range(prefix))? {
            let (key, value) = pair?;
            let records = match (prefix, store::key_sequence(&key)) {
                (b'e', _) => block::entries(&value).unwrap_or_default(),
                (b'f', Some(sequence)) => vec![(sequence, &*value)],
                _ => Vec::new(),
            };
            for (sequence, head) in records {
                copying.insert_chunks(sequence.get(), head)?;
            }
            copying.insert(&key, &value)?;
        }
    }
    copying.finish()?;
    faults::reach("compact-copied");
    finish_generation(&new, counters)?;
    faults::reach("compact-synced");
    Ok(new)
}

/// Makes generation `number`, durable in itself, to take what comes after all that `old` has, the generation `sealed`.
///
/// The counters are written last: a generation that has them is whole.
pub fn seal_generation(
    path: &Path,
    old: &Store,
    sealed: u64,
    number: u64,
    counters: &Counters,
) -> Result<Store, StoreError> {
    let mut new = begin_generation(path, old, number)?;
    faults::reach("seal-begun");
    new.adopt(old, sealed, counters.next_sequence)?;
    faults::reach("seal-copied");
    finish_generation(&new, counters)?;
    faults::reach("seal-synced");
    Ok(new)
}

fn begin_generation(path: &Path, old: &Store, number: u64) -> Result<Store, StoreError> {
    let folder = generation_folder(path, number);
    remove_generation(path, number);
    fs::DirBuilder::new().mode(0o700).create(&folder)?;
    let (new, _) = Store::open(&folder)?;
    *new.hooks() = old.hooks().clone();
    Ok(new)
}

fn finish_generation(new: &Store, counters: &Counters) -> Result<(), StoreError> {
    write_counters(new, counters)?;
    new.carry_over()?;
    new.sync_folder()?;
    restrict(new.folder());
    Ok(())
}

/// Best effort: what stays is removed at the next opening.
pub fn remove_generation(path: &Path, number: u64) {
    let _ = fs::remove_dir_all(generation_folder(path, number));
}

/// Points CURRENT to generation `number`, durably; before the return the old one, after it the new one.
pub fn write_pointer(path: &Path, number: u64, has_sealed: bool) -> io::Result<()> {
    let new = path.join("CURRENT.new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    let format = if has_sealed { FORMAT_SEALED } else { FORMAT };
    write!(file, "format {format}\nsled-{number}\n")?;
    file.sync_all()?;
    faults::reach("pointer-before-rename");
    fs::rename(&new, path.join("CURRENT"))?;
    sync_folder(path)?;
    if let Some(parent) = path.parent() {
        sync_folder(parent)?;
    }
    Ok(())
}

pub fn generation_folder(path: &Path, number: u64) -> PathBuf {
    path.join(format!("sled-{number}"))
}

pub fn read_counters(store: &Store) -> Result<Result<Counters, CodecError>, StoreError> {
    let record = store.get(&store::counters_key())?;
    Ok(record.map_or(Err(CodecError::Short(0)), |record| codec::decode_counters(&record)))
}

fn write_counters(store: &Store, counters: &Counters) -> Result<(), StoreError> {
    let mut changes = Changes::default();
    changes.insert(&store::counters_key(), &codec::encode_counters(counters).map_err(corrupt)?);
    store.apply(changes)
}

pub fn storage(path: &Path, error: &dyn fmt::Display) -> QueueError {
    QueueError::Storage { path: path.to_owned(), cause: error.to_string() }
}

/// The codec refusing what we ourselves made: as bad as damage.
pub fn corrupt(error: CodecError) -> StoreError {
    StoreError::Corrupt(error.to_string())
}

enum Failed {
    Queue(QueueError),
    Damaged(String),
}

impl From<QueueError> for Failed {
    fn from(error: QueueError) -> Self {
        Failed::Queue(error)
    }
}

fn open_current(path: &Path, repairs: &mut Vec<Repair>) -> Result<(Store, u64, Counters), Failed> {
    let io = |error: io::Error| Failed::Queue(storage(path, &error));
    let found = generations(path).map_err(io)?;
    let (generation, format) = match read_pointer(path)? {
        Pointer::Generation { number, format } if found.contains(&number) => {
            if format < FORMAT {
                // Before anything is written that an older program would not see.
                write_pointer(path, number, false).map_err(io)?;
            }
            (number, format)
        }
        Pointer::Missing if found.is_empty() => {
            let (store, counters) = create_generation(path, 1, 1)?;
            faults::reach("open-generation-created");
            write_pointer(path, 1, false).map_err(io)?;
            faults::reach("open-pointer-written");
            return Ok((store, 1, counters));
        }
        Pointer::Generation { .. } | Pointer::Missing | Pointer::Unreadable => {
            return rebuild_pointer(path, &found, repairs);
        }
    };
    let (store, counters) = open_generation(path, generation, found.len() > 1, repairs)?;
    if format == FORMAT_SEALED && !store.knows_sealed().map_err(|error| failed(path, error))? {
        // Then the others are no left-overs.
        return Err(Failed::Damaged("its list of sealed generations is missing".into()));
    }
    let sealed = store.sealed();
    let is_needed = |number| number == generation || sealed.iter().any(|sealed| sealed.number() == number);
    for left_over in found.into_iter().filter(|&number| !is_needed(number)) {
        let folder = generation_folder(path, left_over);
        fs::remove_dir_all(&folder).map_err(io)?;
        repairs.push(Repair::GenerationRemoved { folder });
    }
    Ok((store, generation, counters))
}

/// Takes the newest generation that has counters: they are written last when one is made, so it is whole.
fn rebuild_pointer(path: &Path, found: &[u64], repairs: &mut Vec<Repair>) -> Result<(Store, u64, Counters), Failed> {
    let io = |error: io::Error| Failed::Queue(storage(path, &error));
    let mut cause = "CURRENT names no generation that exists".to_owned();
    let mut unused = Vec::new();
    for &generation in found.iter().rev() {
        let mut here = Vec::new();
        let store = match open_store(path, generation, &mut here) {
            Ok(store) => store,
            Err(Failed::Damaged(damage)) => {
                cause = damage;
                continue;
            }
            Err(error) => return Err(error),
        };
        match counters_of(path, &store) {
            Ok(Ok(counters)) => {
                write_pointer(path, generation, !store.sealed().is_empty()).map_err(io)?;
                repairs.append(&mut here);
                repairs.push(Repair::PointerRebuilt { generation });
                return Ok((store, generation, counters));
            }
            Ok(Err(_)) if store.last_key(store::all_keys()).is_ok_and(|key| key.is_none()) => unused.push(generation),
            Ok(Err(error)) => cause = error.to_string(),
            Err(Failed::Damaged(damage)) => cause = damage,
            Err(error) => return Err(error),
        }
    }
    // A first opening that died before its counters were written: nothing was ever in there.
    if unused.len() == found.len() && !path.join("CURRENT").exists() {
        for generation in unused {
            let folder = generation_folder(path, generation);
            fs::remove_dir_all(&folder).map_err(io)?;
            repairs.push(Repair::GenerationRemoved { folder });
        }
        return open_current(path, repairs);
    }
    Err(Failed::Damaged(cause))
}

fn open_generation(
    path: &Path,
    generation: u64,
    has_others: bool,
    repairs: &mut Vec<Repair>,
) -> Result<(Store, Counters), Failed> {
    let store = open_store(path, generation, repairs)?;
    faults::reach("open-store-opened");
    let counters = match counters_of(path, &store)? {
        Ok(counters) => counters,
        // Then nothing says either which of the others are sealed and hold events.
        Err(error) if has_others => return Err(Failed::Damaged(error.to_string())),
        Err(error) => {
            repairs.push(Repair::CountersRebuilt { cause: error.to_string() });
            // Nothing says any more whether all is there. Durable before the counters, which would hide it.
            forget_cursors(&store).map_err(|error| failed(path, error))?;
            reader::recount(&store, unused_sequence())
                .and_then(|counted| write_counters(&store, &counted.counters).map(|()| counted.counters))
                .map_err(|error| failed(path, error))?
        }
    };
    Ok((store, counters))
}

fn open_store(path: &Path, generation: u64, repairs: &mut Vec<Repair>) -> Result<Store, Failed> {
    let opened = Store::open(&generation_folder(path, generation));
    let (store, store_repairs) = opened.map_err(|error| failed(path, error))?;
    repairs.extend(store_repairs.into_iter().map(|repair| match repair {
        StoreRepair::Database(DatabaseRepair::SnapshotUnfinished { file }) => {
            Repair::UnfinishedSnapshotRemoved { file }
        }
        StoreRepair::Database(DatabaseRepair::SnapshotsSetAside { cause }) => Repair::SnapshotsSetAside { cause },
        StoreRepair::JournalDamaged { file, gaps } => Repair::JournalDamaged { file, gaps },
    }));
    Ok(store)
}

/// The counters, or why they can't be read; only a newer program's are an error at once.
fn counters_of(path: &Path, store: &Store) -> Result<Result<Counters, CodecError>, Failed> {
    match read_counters(store).map_err(|error| failed(path, error))? {
        Err(CodecError::TooNew { found, supported }) => {
            let (found, supported) = (u32::from(found), u32::from(supported));
            Err(Failed::Queue(QueueError::TooNew { path: path.to_owned(), found, supported }))
        }
        other => Ok(other),
    }
}

fn failed(path: &Path, error: StoreError) -> Failed {
    match error {
        StoreError::Corrupt(cause) => Failed::Damaged(cause),
        error @ StoreError::Io(_) => Failed::Queue(storage(path, &error)),
    }
}

/// Removes what was written for batches that were never committed, so that nothing of it mixes with what comes.
fn remove_uncommitted(store: &Store, next_sequence: u64, repairs: &mut Vec<Repair>) -> Result<(), StoreError> {
    let mut keys = 0;
    for prefix in *b"edfx" {
        keys += clear(store, &store::sequence_range(prefix, next_sequence, u64::MAX))?;
    }
    if keys > 0 {
        repairs.push(Repair::UncommittedRemoved { keys });
    }
    Ok(())
}

fn forget_cursors(store: &Store) -> Result<(), StoreError> {
    for prefix in *b"ck" {
        clear(store, &store::prefix_range(prefix))?;
    }
    store.sync()
}

/// Removes all keys in `range`; says how many there were.
fn clear(store: &Store, range: &RangeInclusive<Vec<u8>>) -> Result<u64, StoreError> {
    let mut keys = 0;
    let mut before = None;
    loop {
        let mut changes = Changes::default();
        let mut first = None;
        for pair in store.range(range.clone())?.take(CLEAR_KEYS_MAX) {
            let (key, _) = pair?;
            changes.remove(&key);
            keys += 1;
            first.get_or_insert(key);
        }
        if changes.is_empty() {
            return Ok(keys);
        }
        if first == before {
            // It was removed, and is there again.
            return Err(store::contradiction());
        }
        before = first;
        store.apply(changes)?;
    }
}

/// A number that no earlier queue can have reached: the clock in microseconds runs ahead of any counting by ones.
fn unused_sequence() -> u64 {
    u64::try_from(Timestamp::now().as_microsecond()).unwrap_or(1).max(1)
}

/// Makes the folder where it is missing, and takes the rights of others from one that is there.
pub fn ensure_folder(path: &Path) -> Result<Ensured, QueueError> {
    private_folder::ensure(path).map_err(|error| match error {
        FolderError::Io { cause, .. } => storage(path, &cause),
        error => QueueError::Folder(error),
    })
}

/// Takes the rights of others from the files of `folder`. Best effort: the folder itself already keeps them out.
pub fn restrict(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_file()) {
            let _ = fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o600));
        }
    }
}

fn take_lock(path: &Path) -> Result<Lock, QueueError> {
    let io = |error: io::Error| storage(path, &error);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path.join("lock"))
        .map_err(io)?;
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
    file.set_len(0).map_err(io)?;
    writeln!(file, "{}", std::process::id()).map_err(io)?;
    Ok(Lock { _file: file })
}

enum Pointer {
    Generation { number: u64, format: u32 },
    Missing,
    Unreadable,
}

/// It has two short lines.
const POINTER_BYTES_MAX: u64 = 4096;

fn read_pointer(path: &Path) -> Result<Pointer, QueueError> {
    let text = match regular_file::read(&path.join("CURRENT"), POINTER_BYTES_MAX) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Pointer::Missing),
        Err(error) => return Err(storage(path, &error)),
    };
    let mut lines = text.lines();
    let format = lines.next().and_then(|line| line.strip_prefix("format ")?.parse::<u32>().ok());
    match format {
        Some(found) if found > FORMAT_SEALED => {
            Err(QueueError::TooNew { path: path.to_owned(), found, supported: FORMAT_SEALED })
        }
        Some(format) => {
            let number = lines.next().and_then(generation_number);
            Ok(number.map_or(Pointer::Unreadable, |number| Pointer::Generation { number, format }))
        }
        None => Ok(Pointer::Unreadable),
    }
}

/// The generations in the folder, oldest first.
pub fn generations(path: &Path) -> io::Result<Vec<u64>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir()
            && let Some(number) = entry.file_name().to_str().and_then(generation_number)
        {
            found.push(number);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// The folders of the generations at `path`, the newest first.
fn generation_folders(path: &Path) -> Vec<PathBuf> {
    let found = generations(path).unwrap_or_default();
    found.into_iter().rev().map(|number| generation_folder(path, number)).collect()
}

fn generation_number(name: &str) -> Option<u64> {
    name.strip_prefix("sled-")?.parse().ok().filter(|number| *number < codec::NUMBER_MAX)
}

/// Salvages the queue at `path` into a fresh one and lets that take its place. Gives the fresh one's lock, where the
/// damaged one is now, and how many events were salvaged.
fn start_anew(path: &Path) -> Result<(Lock, PathBuf, u64), QueueError> {
    let io = |error: io::Error| storage(path, &error);
    let fresh = salvaged_folder(path);
    ensure_folder(&fresh)?;
    let lock = take_lock(&fresh)?;
    let (store, counters) = create_generation(&fresh, 1, unused_sequence())?;
    // Where CURRENT does not say that there are no sealed ones, any may be one.
    let has_sealed = !matches!(read_pointer(path), Ok(Pointer::Generation { format, .. }) if format < FORMAT_SEALED);
    let (_, salvaged) = salvage::run(&generation_folders(path), has_sealed, !is_looping(path), &store, counters)
        .and_then(|salvaged| store.sync().map(|()| salvaged))
        .map_err(|error| storage(path, &error))?;
    // sled holds on to the path that it was opened with.
    drop(store);
    write_pointer(&fresh, 1, false).map_err(io)?;
    faults::reach("damage-salvaged");
    let to = set_aside(path).map_err(io)?;
    faults::reach("damage-moved");
    put_salvaged_in_place(path).map_err(io)?;
    faults::reach("damage-replaced");
    Ok((lock, to, salvaged))
}

fn salvaged_folder(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".salvaged");
    path.with_file_name(name)
}

/// Puts the fresh queue where the damaged one was, if that has been moved away.
fn put_salvaged_in_place(path: &Path) -> io::Result<()> {
    let fresh = salvaged_folder(path);
    if path.exists() || !fresh.join("CURRENT").exists() {
        return Ok(());
    }
    match fs::rename(&fresh, path) {
        // Somebody else who starts at this moment has done it; the lock decides between us.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
        Ok(()) => path.parent().map_or(Ok(()), sync_folder),
    }
}

/// Makes the entries of `folder` durable.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    File::open(folder)?.sync_all()
}

pub fn remove_folder(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Moves the folder away under a name that says when.
fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let time = Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    for attempt in 0..100 {
        let suffix = if attempt == 0 { String::new() } else { format!("-{attempt}") };
        let to = path.with_file_name(format!("{name}.damaged-{time}{suffix}"));
        if !to.exists() {
            fs::rename(path, &to)?;
            if let Some(parent) = to.parent() {
                sync_folder(parent)?;
            }
            return Ok(to);
        }
    }
    Err(io::Error::new(io::ErrorKind::AlreadyExists, "no free name for the damaged queue"))
}
