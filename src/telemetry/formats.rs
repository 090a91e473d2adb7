//! What transcripts had that this version does not know: the format moves with Claude Code.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::lock;

/// Fields and values that are told apart; what comes beyond is only counted by field.
const VALUES_MAX: usize = 100;

/// How often the log names one of them.
const WARN_INTERVAL: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Default, Debug)]
pub struct UnknownFormats(Mutex<BTreeMap<(String, String), Seen>>);

#[derive(Debug)]
struct Seen {
    version: String,
    lines: u64,
    warned: Instant,
}

/// A value that is not known, of a field, a type of lines, or words without a label.
#[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize, Debug)]
pub struct UnknownFormat {
    pub field: String,
    pub value: String,
    /// The last version of Claude Code that wrote it; empty where its line does not say.
    pub version: String,
    /// Lines since the watcher's start.
    pub lines: u64,
}

impl UnknownFormats {
    /// Counts a line. True where the log is to name it: at its first line, and once a day.
    ///
    /// What is no name is left out: it comes from a transcript, and may be anybody's words.
    pub fn note(&self, field: &str, value: &str, version: &str, now: Instant) -> bool {
        let (value, version) = (name_or_none(value), name_or_none(version));
        let mut formats = lock(&self.0);
        let key = (field.to_owned(), value.to_owned());
        if let Some(seen) = formats.get_mut(&key) {
            seen.lines += 1;
            version.clone_into(&mut seen.version);
            let is_due = now.duration_since(seen.warned) >= WARN_INTERVAL;
            if is_due {
                seen.warned = now;
            }
            return is_due;
        }
        let has_room = formats.len() < VALUES_MAX;
        if has_room {
            formats.insert(key, Seen { version: version.to_owned(), lines: 1, warned: now });
        }
        has_room
    }

    pub fn list(&self) -> Vec<UnknownFormat> {
        let formats = lock(&self.0);
        let listed = formats.iter().map(|((field, value), seen)| UnknownFormat {
            field: field.clone(),
            value: value.clone(),
            version: seen.version.clone(),
            lines: seen.lines,
        });
        listed.collect()
    }
}

/// `text` where it is a name. Anything else comes from a transcript and may be somebody's words.
pub(crate) fn name_or_none(text: &str) -> &str {
    if is_name(text) { text } else { "(no name)" }
}

/// Whether `text` has nothing in it but what names have.
pub(crate) fn is_name(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_named_at_its_first_line_and_once_a_day() {
        let (formats, now) = (UnknownFormats::default(), Instant::now());
        assert!(formats.note("origin", "oracle", "3.0.0", now));
        assert!(!formats.note("origin", "oracle", "3.0.1", now + WARN_INTERVAL - Duration::from_secs(1)));
        assert!(formats.note("origin", "oracle", "3.0.1", now + WARN_INTERVAL));
        assert!(!formats.note("origin", "oracle", "3.0.1", now + WARN_INTERVAL));
        assert!(formats.note("origin", "other", "", now));
        let expected = UnknownFormat {
            field: "origin".to_owned(),
            value: "oracle".to_owned(),
            version: "3.0.1".to_owned(),
            lines: 4,
        };
        assert_eq!(formats.list()[0], expected);
    }

    #[test]
    fn words_are_not_kept() {
        let formats = UnknownFormats::default();
        formats.note("origin", "a secret", "\u{1b}[2J", Instant::now());
        let listed = formats.list();
        assert_eq!((listed[0].value.as_str(), listed[0].version.as_str()), ("(no name)", "(no name)"));
    }

    #[test]
    fn there_is_a_limit() {
        let (formats, now) = (UnknownFormats::default(), Instant::now());
        let named = (0..2 * VALUES_MAX).filter(|number| formats.note("type", &number.to_string(), "", now)).count();
        assert_eq!((named, formats.list().len()), (VALUES_MAX, VALUES_MAX));
    }
}
