//! The spool: events that wait in files of their own until they are taken into the queue.
//!
//! Two leave something here. A hook leaves one record and is gone, whether or not a watcher runs. A request that is too
//! large for one batch is gathered in a file, and the moment in which it gets its final name is the moment in which all
//! of it is accepted.
//!
//! ```text
//!  Draft  .<uuid>.draft ── synced, renamed, folder synced ──► <UUIDv7>.hook | .events ── Reader ──► queue ── removed
//! ```
//!
//! # Promises
//!
//! 1. A file is there whole or not at all: it gets its name once its bytes are on disk. What is left of a writer that
//!    was killed is a draft, which nobody reads and which is removed ten minutes later.
//! 2. A file is removed only once all that is in it is durable in the queue. Killed in between, it is taken in again
//!    under the same event ids, and the receipts refuse the second copy.
//! 3. Files are taken in by their names, which is the order in which they were made.
//! 4. A damaged file gives what is whole in it, and a dead letter for the rest; it stops nothing.
//! 5. A file that can't be read is tried again when it changes and once a minute, and health says so until then. One that
//!    can't be removed is not taken in again.
//! 6. A file that ends the program each time it is processed does not do so for good: `.attempt` names the file being
//!    processed, and at the third attempt the file is renamed to `<name>.failed` and reported as a dead letter.
//!
//! # Layout of a file
//!
//! ```text
//! file   := "HWSPOOL" 0x01  frame*  end
//! frame  := length u32 (not 0)  crc32 u32 of the bytes  bytes (JSON: `Stored`)
//! end    := 0 u32               crc32 u32 of the count  count u64 of frames
//! ```
//!
//! Numbers are little-endian. Files have mode 0600, the folder 0700.

use std::ffi::OsString;
use std::fs::{self, DirEntry, File, Metadata, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use thiserror::Error;
use uuid::Uuid;

use crate::event::{
    Candidate, Event, EventId, EventType, Failure, FailureKind, ForeignKeys, Origin, Record, Rejection, Timestamp,
};
use crate::json;
use crate::private_folder::{self, Ensured};

const MAGIC: &[u8; 8] = b"HWSPOOL\x01";

/// A frame above this is damage. More than the largest `max_event_bytes`, with room for what stands around a payload.
const FRAME_BYTES_MAX: u32 = (256 << 20) + (1 << 20);

/// After this a draft that nobody holds is what a killed writer left.
const DRAFT_AGE_MAX: Duration = Duration::from_secs(10 * 60);

/// Kept of a file that can't be read.
pub const DAMAGED_BYTES_KEPT_MAX: usize = 64 << 10;

/// Who left a file, told by the end of its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Hook,
    Events,
}

impl Kind {
    fn extension(self) -> &'static str {
        match self {
            Kind::Hook => "hook",
            Kind::Events => "events",
        }
    }
}

/// A handle on the folder; cheap to clone.
#[derive(Clone)]
pub struct Spool {
    folder: Arc<Path>,
    bell: Arc<Bell>,
    unread: Arc<Mutex<UnreadSpool>>,
}

/// What could not be read at the last look, and why.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct UnreadSpool {
    /// Files in it.
    pub files: usize,
    /// Path and cause: of the folder where that can't be read, else of the first of the files.
    pub error: Option<String>,
    pub is_folder_unread: bool,
}

#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    ringing: Condvar,
}

impl Spool {
    /// Touches nothing yet: the folder is made by who first leaves something.
    pub fn new(folder: &Path) -> Spool {
        Spool { folder: folder.into(), bell: Arc::default(), unread: Arc::default() }
    }

    /// What its reader could not read at the last look.
    pub fn unread(&self) -> UnreadSpool {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says what could not be read; gives what was said last.
    pub fn set_unread(&self, unread: UnreadSpool) -> UnreadSpool {
        std::mem::replace(&mut *self.unread.lock().unwrap_or_else(PoisonError::into_inner), unread)
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Leaves one record; durable on return.
    pub fn leave(&self, record: &Record) -> io::Result<()> {
        let mut draft = self.draft()?;
        draft.add(record)?;
        draft.commit(Kind::Hook)?;
        Ok(())
    }

    /// Begins a file.
    pub fn draft(&self) -> io::Result<Draft> {
        let path = self.folder.join(format!(".{}.draft", Uuid::now_v7()));
        // Takes the rights of others away where it can. What it can't put right is refused by the watcher's start and by
        // `check`; a hook goes on.
        if let Ok(Ensured::Created) = private_folder::ensure(&self.folder)
            && let Some(parent) = self.folder.parent()
        {
            File::open(parent)?.sync_all()?;
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        // Held while it is written, so that nobody takes it for what a killed writer left.
        file.lock()?;
        let mut draft = Draft { folder: self.folder.clone(), path, file: BufWriter::new(file), frames: 0, bytes: 0 };
        draft.file.write_all(MAGIC)?;
        Ok(draft)
    }

    /// Wakes who waits in [`Spool::wait`].
    pub fn ring(&self) {
        *self.bell.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.bell.ringing.notify_all();
    }

    /// Waits until it is rung or `patience` has run out.
    pub fn wait(&self, patience: Duration) {
        let rung = self.bell.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut rung, _) =
            self.bell.ringing.wait_timeout_while(rung, patience, |rung| !*rung).unwrap_or_else(PoisonError::into_inner);
        *rung = false;
    }

    /// The regular files that wait, in the order in which they were made. None where there is no folder.
    pub fn waiting(&self) -> io::Result<Vec<PathBuf>> {
        let mut paths: Vec<PathBuf> = self
            .entries()?
            .into_iter()
            .filter(|path| {
                let extension = path.extension().and_then(|extension| extension.to_str());
                extension.is_some_and(|end| end == Kind::Hook.extension() || end == Kind::Events.extension())
            })
            .collect();
        paths.sort();
        Ok(paths)
    }

    /// Bytes of accepted requests that are not in the queue yet.
    pub fn backlog_bytes(&self) -> u64 {
        let paths = self.waiting().unwrap_or_default();
        let requests = paths.iter().filter(|path| path.extension().is_some_and(|end| end == Kind::Events.extension()));
        requests.filter_map(|path| path.metadata().ok()).map(|metadata| metadata.len()).sum()
    }

    /// Removes old drafts whose writers are gone.
    pub fn remove_old_drafts(&self) -> io::Result<()> {
        for path in self.entries()? {
            let is_draft = path.extension().is_some_and(|extension| extension == "draft");
            let changed = path.metadata().and_then(|metadata| metadata.modified()).unwrap_or(SystemTime::now());
            let is_old = is_draft && changed.elapsed().is_ok_and(|age| age > DRAFT_AGE_MAX);
            // One that can't be opened or removed harms nothing.
            if is_old && open_own(&path).is_ok_and(|draft| draft.try_lock().is_ok()) {
                let _ = fs::remove_file(&path);
            }
        }
        Ok(())
    }

    /// The attempt that was noted last and not cleared.
    pub fn attempt(&self) -> Option<Attempt> {
        let mut text = String::new();
        // Larger than any note of ours.
        open_own(&self.attempt_path()).ok()?.take(4096).read_to_string(&mut text).ok()?;
        let (count, file) = text.trim_end().split_once(' ')?;
        Some(Attempt { file: file.into(), count: count.parse().ok()? })
    }

    /// Notes that a file is about to be processed. Not synced: losing it only means one attempt more. An error is no
    /// reason not to process the file.
    pub fn note_attempt(&self, attempt: &Attempt) {
        let text = format!("{} {}\n", attempt.count, attempt.file.to_string_lossy());
        self.clear_attempt();
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(self.attempt_path());
        let _ = file.and_then(|mut file| file.write_all(text.as_bytes()));
    }

    /// Notes that no file is being processed.
    pub fn clear_attempt(&self) {
        let _ = fs::remove_file(self.attempt_path());
    }

    /// Where a file goes that nobody is to read any more.
    pub fn aside(path: &Path) -> PathBuf {
        let mut name = path.as_os_str().to_owned();
        name.push(".failed");
        PathBuf::from(name)
    }

    /// Moves a file there.
    pub fn move_aside(&self, path: &Path) -> io::Result<()> {
        fs::rename(path, Spool::aside(path))?;
        File::open(&self.folder)?.sync_all()
    }

    fn attempt_path(&self) -> PathBuf {
        self.folder.join(".attempt")
    }

    fn entries(&self) -> io::Result<Vec<PathBuf>> {
        match fs::read_dir(&self.folder) {
            Ok(entries) => entries.filter_map(|entry| regular_file(entry).transpose()).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

/// Opens a regular file that is ours. Anything else is an error; a FIFO does not block, a link is not followed.
fn open_own(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user"));
    }
    Ok(file)
}

/// The path of an entry that is a regular file. Nothing else is ours: a FIFO would block its reader for good, and a
/// symbolic link leads out of the folder.
fn regular_file(entry: io::Result<DirEntry>) -> io::Result<Option<PathBuf>> {
    let entry = entry?;
    match entry.file_type() {
        Ok(kind) => Ok(kind.is_file().then(|| entry.path())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A file that is being processed, and how often it has been, counting this time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attempt {
    pub file: OsString,
    pub count: u32,
}

/// A file that is being written. Removed when dropped before it was committed.
pub struct Draft {
    folder: Arc<Path>,
    /// Empty once committed.
    path: PathBuf,
    file: BufWriter<File>,
    frames: u64,
    bytes: u64,
}

impl Draft {
    pub fn add(&mut self, record: &Record) -> io::Result<()> {
        self.write(&encode(record)?)
    }

    /// As [`Draft::add`], of an event that was checked already.
    pub fn add_event(&mut self, event: &Event) -> io::Result<()> {
        let payload: &RawValue = serde_json::from_str(event.payload().as_json())?;
        let stored =
            StoredEvent::new(event.id(), event.event_type().as_str(), event.timestamp(), event.refs(), payload);
        self.write(&serde_json::to_vec(&Stored::of_event(event.origin(), stored))?)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).ok().filter(|length| *length <= FRAME_BYTES_MAX);
        let length = length.ok_or_else(|| io::Error::new(io::ErrorKind::FileTooLarge, "the record is too large"))?;
        self.file.write_all(&length.to_le_bytes())?;
        self.file.write_all(&crc32fast::hash(bytes).to_le_bytes())?;
        self.file.write_all(bytes)?;
        self.frames += 1;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Bytes of the records so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes it durable and gives it its name; gives a reader of what is in it, for who must tell what was accepted. After
    /// an error no file has the name, so that the caller may send the records another way.
    pub fn commit(mut self, kind: Kind) -> io::Result<Frames> {
        let count = self.frames.to_le_bytes();
        self.file.write_all(&0u32.to_le_bytes())?;
        self.file.write_all(&crc32fast::hash(&count).to_le_bytes())?;
        self.file.write_all(&count)?;
        self.file.flush()?;
        self.file.get_ref().sync_data()?;
        let frames = Frames::open(&self.path)?;
        let name = NameSync::open(&self.folder, self.file.get_ref())?;
        let path = self.folder.join(format!("{}.{}", Uuid::now_v7(), kind.extension()));
        rename_durably(&self.path, &path, || name.sync())?;
        self.path = PathBuf::new();
        Ok(frames)
    }
}

/// What makes a new name durable; opened before there is the name, so that only the disk can fail afterwards.
enum NameSync {
    Folder(File),
    /// In a folder that may be written but not read: all of its file system, through a file in it.
    #[cfg(target_os = "linux")]
    FileSystem(File),
}

impl NameSync {
    #[cfg_attr(not(target_os = "linux"), allow(unused_variables))]
    fn open(folder: &Path, file: &File) -> io::Result<NameSync> {
        match File::open(folder) {
            Ok(folder) => Ok(NameSync::Folder(folder)),
            #[cfg(target_os = "linux")]
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                Ok(NameSync::FileSystem(file.try_clone()?))
            }
            Err(error) => Err(error),
        }
    }

    fn sync(&self) -> io::Result<()> {
        match self {
            NameSync::Folder(folder) => folder.sync_all(),
            #[cfg(target_os = "linux")]
            NameSync::FileSystem(file) => Ok(rustix::fs::syncfs(file)?),
        }
    }
}

/// Renames a file and makes that durable. Where it can't be made durable the new name is removed again: nobody may find
/// what the caller, told of the error, sends another way. Where that fails too, or somebody has taken the file already,
/// it counts as renamed.
fn rename_durably(from: &Path, to: &Path, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    fs::rename(from, to)?;
    let Err(error) = sync() else { return Ok(()) };
    match fs::remove_file(to) {
        Ok(()) => Err(error),
        Err(_) => Ok(()),
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() {
            // What can't be removed now is removed as an old draft.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Why a file gave no further record.
#[derive(Debug, Error)]
pub enum ReadError {
    #[error("damaged: {0}")]
    Damaged(&'static str),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The records of one file, in order. Ends at the first damage.
pub struct Frames {
    file: BufReader<File>,
    read: u64,
    left: u64,
    started: bool,
}

impl Frames {
    /// Opens a file of ours.
    pub fn open(path: &Path) -> io::Result<Frames> {
        let file = open_own(path)?;
        let left = file.metadata()?.len();
        Ok(Frames { file: BufReader::new(file), read: 0, left, started: false })
    }

    /// The metadata of the file that is read, whatever its path leads to now.
    pub fn metadata(&self) -> io::Result<Metadata> {
        self.file.get_ref().metadata()
    }

    /// The next frame; `None` at the end. `reserve` is called with its size before it is read.
    pub fn next_frame<R>(&mut self, reserve: impl FnOnce(usize) -> R) -> Result<Option<(Frame, R)>, ReadError> {
        if !self.started {
            if self.take::<8>()? != *MAGIC {
                return Err(ReadError::Damaged("it does not begin as a spool file"));
            }
            self.started = true;
        }
        let length = u32::from_le_bytes(self.take()?);
        let checksum = u32::from_le_bytes(self.take()?);
        if length == 0 {
            let count: [u8; 8] = self.take()?;
            if crc32fast::hash(&count) != checksum || u64::from_le_bytes(count) != self.read || self.left > 0 {
                return Err(ReadError::Damaged("its end does not fit what stands before"));
            }
            return Ok(None);
        }
        if length > FRAME_BYTES_MAX || u64::from(length) > self.left {
            return Err(ReadError::Damaged("it ends within a record"));
        }
        let reservation = reserve(length as usize);
        let mut bytes = vec![0; length as usize];
        self.file.read_exact(&mut bytes)?;
        self.left -= u64::from(length);
        if crc32fast::hash(&bytes) != checksum {
            return Err(ReadError::Damaged("a record's checksum is wrong"));
        }
        self.read += 1;
        Ok(Some((Frame { bytes }, reservation)))
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], ReadError> {
        self.left = self.left.checked_sub(N as u64).ok_or(ReadError::Damaged("it is cut short"))?;
        let mut bytes = [0; N];
        self.file.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// The bytes of one record, not parsed yet.
pub struct Frame {
    bytes: Vec<u8>,
}

impl Frame {
    /// A record that came by another way than a file, as [`encode`] wrote it.
    pub fn new(bytes: Vec<u8>) -> Frame {
        Frame { bytes }
    }

    /// Size in bytes.
    pub fn byte_length(&self) -> usize {
        self.bytes.len()
    }

    /// Parses it. A payload that would take too much memory makes it a rejection.
    pub fn record(&self) -> Result<Record, ReadError> {
        self.stored()?.into_record()
    }

    /// The identity of the event in it.
    pub fn event_id(&self) -> Result<EventId, ReadError> {
        let event = self.stored()?.event.ok_or(ReadError::Damaged("a request holds events only"))?;
        Ok(EventId(event.event_id))
    }

    fn stored(&self) -> Result<Stored<&RawValue>, ReadError> {
        serde_json::from_slice(&self.bytes).map_err(|_| ReadError::Damaged("a record is no record"))
    }
}

/// A record as JSON: the bytes of its frame.
pub fn encode(record: &Record) -> io::Result<Vec<u8>> {
    match record {
        Record::Event(candidate) => {
            let Candidate { id, event_type, timestamp, payload, refs, origin } = candidate;
            let stored = StoredEvent::new(*id, event_type, *timestamp, refs, payload);
            Ok(serde_json::to_vec(&Stored::of_event(origin, stored))?)
        }
        Record::Rejected(rejection) => Ok(serde_json::to_vec(&Stored::of_rejection(rejection))?),
    }
}

/// A record as JSON. `P` is the payload: one object, as values or as text.
#[derive(Serialize, Deserialize)]
#[serde(bound(deserialize = "P: Deserialize<'de>"))]
struct Stored<P> {
    origin: StoredOrigin,
    #[serde(default = "no_event", skip_serializing_if = "Option::is_none")]
    event: Option<StoredEvent<P>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rejected: Option<StoredRejection>,
}

#[derive(Serialize, Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum StoredOrigin {
    Hook,
    Http,
    Cli,
}

#[derive(Serialize, Deserialize)]
#[serde(bound(deserialize = "P: Deserialize<'de>"))]
struct StoredEvent<P> {
    event_id: Uuid,
    event_type: String,
    timestamp: Timestamp,
    payload: P,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    project_id: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    agent_id: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    command_id: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    turn_id: Option<i32>,
}

#[derive(Serialize, Deserialize)]
struct StoredRejection {
    too_large: bool,
    message: String,
    event_type: Option<String>,
    /// The input; what was no UTF-8 in it is replaced.
    input: String,
}

fn no_event<P>() -> Option<StoredEvent<P>> {
    None
}

impl<P> StoredEvent<P> {
    fn new(id: EventId, event_type: &str, timestamp: Timestamp, refs: &ForeignKeys, payload: P) -> StoredEvent<P> {
        StoredEvent {
            event_id: id.0,
            event_type: event_type.to_owned(),
            timestamp,
            payload,
            project_id: refs.project_id,
            agent_id: refs.agent_id,
            command_id: refs.command_id,
            turn_id: refs.turn_id,
        }
    }
}

impl<P> Stored<P> {
    fn of_event(origin: &Origin, event: StoredEvent<P>) -> Stored<P> {
        Stored { origin: StoredOrigin::of(origin), event: Some(event), rejected: None }
    }
}

impl Stored<&RawValue> {
    fn of_rejection(rejection: &Rejection) -> Self {
        Stored {
            origin: StoredOrigin::of(&rejection.origin),
            event: None,
            rejected: Some(StoredRejection {
                too_large: rejection.failure.kind == FailureKind::TooLarge,
                message: rejection.failure.message.clone(),
                event_type: rejection.event_type.as_ref().map(|event_type| event_type.as_str().to_owned()),
                input: String::from_utf8_lossy(&rejection.bytes).into_owned(),
            }),
        }
    }

    fn into_record(self) -> Result<Record, ReadError> {
        let origin = self.origin.into_origin();
        match (self.event, self.rejected) {
            (Some(event), _) => event.into_record(origin),
            (None, Some(rejected)) => Ok(Record::Rejected(Rejection {
                failure: Failure {
                    kind: if rejected.too_large { FailureKind::TooLarge } else { FailureKind::Unreadable },
                    message: rejected.message,
                    sqlstate: None,
                },
                event_type: rejected.event_type.as_deref().map(EventType::new),
                origin,
                bytes: rejected.input.into_bytes(),
            })),
            (None, None) => Err(ReadError::Damaged("a record is empty")),
        }
    }
}

impl StoredEvent<&RawValue> {
    fn into_record(self, origin: Origin) -> Result<Record, ReadError> {
        // It was repaired, where needed, before it was written.
        let payload = match json::value(self.payload.get(), &mut false) {
            Ok(Value::Object(payload)) => payload,
            Ok(_) => return Err(ReadError::Damaged("a record's payload is no object")),
            Err(unfit) => {
                let text = self.payload.get().as_bytes();
                return Ok(Record::Rejected(Rejection {
                    failure: Failure {
                        kind: FailureKind::Invalid,
                        message: format!("payload: {unfit}"),
                        sqlstate: None,
                    },
                    event_type: Some(EventType::new(&self.event_type)),
                    origin,
                    bytes: text.get(..text.len().min(DAMAGED_BYTES_KEPT_MAX)).unwrap_or_default().to_vec(),
                }));
            }
        };
        Ok(Record::Event(Candidate {
            id: EventId(self.event_id),
            event_type: self.event_type,
            timestamp: self.timestamp,
            payload,
            refs: ForeignKeys {
                project_id: self.project_id,
                agent_id: self.agent_id,
                command_id: self.command_id,
                turn_id: self.turn_id,
            },
            origin,
        }))
    }
}

impl StoredOrigin {
    /// Transcripts have no need of the spool.
    fn of(origin: &Origin) -> StoredOrigin {
        match origin {
            Origin::Hook | Origin::Transcript { .. } => StoredOrigin::Hook,
            Origin::Http => StoredOrigin::Http,
            Origin::Cli => StoredOrigin::Cli,
        }
    }

    fn into_origin(self) -> Origin {
        match self {
            StoredOrigin::Hook => Origin::Hook,
            StoredOrigin::Http => Origin::Http,
            StoredOrigin::Cli => Origin::Cli,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::PermissionsExt;

    fn event(number: usize) -> Record {
        let serde_json::Value::Object(payload) = json!({"number": number, "text": "ä\u{fffd}"}) else {
            unreachable!()
        };
        Record::Event(Candidate {
            id: EventId::derived(&number.to_le_bytes()),
            event_type: "hook_received".to_owned(),
            timestamp: "2026-01-02T03:04:05.678901234Z".parse().unwrap(),
            payload,
            refs: ForeignKeys { agent_id: Some(-7), ..ForeignKeys::default() },
            origin: Origin::Cli,
        })
    }

    fn shown(record: &Record) -> String {
        String::from_utf8(encode(record).unwrap()).unwrap()
    }

    fn all(path: &Path) -> (Vec<String>, Result<(), String>) {
        let mut frames = Frames::open(path).unwrap();
        let mut records = Vec::new();
        loop {
            match frames.next_frame(|_| ()).and_then(|frame| frame.map(|(frame, ())| frame.record()).transpose()) {
                Ok(Some(record)) => records.push(shown(&record)),
                Ok(None) => return (records, Ok(())),
                Err(error) => return (records, Err(error.to_string())),
            }
        }
    }

    #[test]
    fn records_come_back_as_they_were_left_in_the_order_of_their_files() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::new(&folder.path().join("made/when/needed"));
        assert!(spool.waiting().unwrap().is_empty());
        spool.leave(&event(1)).unwrap();
        let mut draft = spool.draft().unwrap();
        draft.add(&event(2)).unwrap();
        draft.add(&event(3)).unwrap();
        assert_eq!(spool.waiting().unwrap().len(), 1, "a draft is not seen");
        draft.commit(Kind::Events).unwrap();
        drop(spool.draft().unwrap());
        let waiting = spool.waiting().unwrap();
        let found: Vec<String> = waiting.iter().flat_map(|path| all(path).0).collect();
        assert_eq!(found, [shown(&event(1)), shown(&event(2)), shown(&event(3))]);
        assert_eq!(fs::read_dir(spool.folder()).unwrap().count(), 2, "a draft that is given up is removed");
        assert_eq!(spool.backlog_bytes(), waiting[1].metadata().unwrap().len());
        assert_eq!(spool.folder().metadata().unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(waiting[0].metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_name_that_can_not_be_made_durable_is_taken_back_before_the_error_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let [draft, named] = ["draft", "named"].map(|name| folder.path().join(name));
        fs::write(&draft, "").unwrap();
        let error = rename_durably(&draft, &named, || Err(io::Error::from_raw_os_error(5))).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        // One that its reader has taken already is no error: it must not come in a second time.
        fs::write(&draft, "").unwrap();
        let taken = || fs::remove_file(&named).and(Err(io::Error::from_raw_os_error(5)));
        rename_durably(&draft, &named, taken).unwrap();
    }

    #[test]
    fn an_old_draft_is_removed_only_when_nobody_writes_it_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::new(folder.path());
        let draft = spool.draft().unwrap();
        let path = draft.path.clone();
        let old = SystemTime::now() - DRAFT_AGE_MAX - Duration::from_secs(60);
        draft.file.get_ref().set_modified(old).unwrap();
        spool.remove_old_drafts().unwrap();
        assert!(path.exists(), "its writer is still there");
        let left = folder.path().join(".left.draft");
        fs::rename(&path, &left).unwrap();
        drop(draft);
        File::options().write(true).open(&left).unwrap().set_modified(old).unwrap();
        spool.remove_old_drafts().unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn whatever_byte_is_cut_or_changed_gives_whole_records_and_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::new(folder.path());
        let mut draft = spool.draft().unwrap();
        draft.add(&event(1)).unwrap();
        draft.add(&event(2)).unwrap();
        draft.commit(Kind::Events).unwrap();
        let path = spool.waiting().unwrap().remove(0);
        let bytes = fs::read(&path).unwrap();
        let whole = [shown(&event(1)), shown(&event(2))];
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            for damaged in [bytes[..at].to_vec(), changed] {
                fs::write(&path, damaged).unwrap();
                let (found, outcome) = all(&path);
                assert!(outcome.is_err(), "{at}");
                assert!(whole.starts_with(&found), "{at}: {found:?}");
            }
        }
    }
}
