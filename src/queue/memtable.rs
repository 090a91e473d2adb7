//! What is in the journal and not yet in sled, by key: read before sled, and folded into it now and then.

use std::collections::BTreeMap;
use std::ops::Bound;

use sled::IVec;

/// One key and what is to stand there; `None` takes it away.
pub type Change = (IVec, Option<IVec>);

/// What stands at a key, whatever sled says.
#[derive(Clone)]
struct Entry {
    value: Option<IVec>,
    /// Whether sled has the key, too.
    shadows: bool,
}

/// The newest values of keys that were changed lately.
#[derive(Default)]
pub struct Memtable {
    entries: BTreeMap<IVec, Entry>,
    /// How often sled has changed under its readers: an iterator of sled does not see what is folded in behind its back.
    folds: u64,
}

impl Memtable {
    /// Notes a change. `in_sled` is asked where the key is new here.
    pub fn note<E>(&mut self, (key, value): Change, in_sled: impl FnOnce(&[u8]) -> Result<bool, E>) -> Result<(), E> {
        let shadows = match self.entries.get(&key) {
            Some(entry) => entry.shadows,
            None => in_sled(&key)?,
        };
        match value {
            // Nothing is left to be taken away.
            None if !shadows => drop(self.entries.remove(&key)),
            value => drop(self.entries.insert(key, Entry { value, shadows })),
        }
        Ok(())
    }

    /// `Some(None)` when the key is not there, whatever sled says; `None` when sled has to be asked.
    pub fn get(&self, key: &[u8]) -> Option<Option<IVec>> {
        self.entries.get(key).map(|entry| entry.value.clone())
    }

    /// The first key in a range and what stands there.
    pub fn first(&self, range: (Bound<&[u8]>, Bound<&[u8]>)) -> Option<Change> {
        self.entries.range::<[u8], _>(range).next().map(|(key, entry)| (key.clone(), entry.value.clone()))
    }

    /// The last key in a range that is there.
    pub fn last_present(&self, range: (Bound<&[u8]>, Bound<&[u8]>)) -> Option<IVec> {
        let mut entries = self.entries.range::<[u8], _>(range);
        entries.rfind(|(_, entry)| entry.value.is_some()).map(|(key, _)| key.clone())
    }

    /// Everything, in the order of the keys.
    pub fn changes(&self) -> impl Iterator<Item = Change> {
        self.entries.iter().map(|(key, entry)| (key.clone(), entry.value.clone()))
    }

    /// Whether something is noted about the key.
    pub fn knows(&self, key: &[u8]) -> bool {
        self.entries.contains_key(key)
    }

    /// All of it is in sled now.
    pub fn folded(&mut self) {
        self.entries.clear();
        self.folds += 1;
    }

    /// How many keys are noted.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn folds(&self) -> u64 {
        self.folds
    }
}
