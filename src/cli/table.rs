//! What the tables for people have in common: they fit a terminal of 80 columns, unless they are asked to be wide.

use std::path::Path;

/// Columns of a table that is not wide.
pub(super) const COLUMNS: usize = 80;

/// The beginning of `text` on one line, in at most `columns`.
pub(super) fn head(text: &str, columns: usize) -> String {
    let line = one_line(text);
    if line.chars().count() <= columns {
        return line;
    }
    line.chars().take(columns.saturating_sub(1)).chain(['…']).collect()
}

/// The end of `text` on one line, in at most `columns`.
pub(super) fn tail(text: &str, columns: usize) -> String {
    let line = one_line(text);
    let count = line.chars().count();
    if count <= columns {
        return line;
    }
    ['…'].into_iter().chain(line.chars().skip(count - columns.saturating_sub(1))).collect()
}

/// `text` without line breaks, and without anything that a terminal would take for a command.
pub(super) fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}

/// A transcript as its folder and the first digits of its session: `-home-me-app/00000007`.
pub(super) fn short_transcript(path: &str) -> String {
    let path = Path::new(path);
    let folder = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let session = if uuid::Uuid::try_parse(&stem).is_ok() { stem.get(..8).unwrap_or_default() } else { &stem };
    format!("{folder}/{session}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_is_too_long_is_cut_at_one_end_and_stays_on_its_line() {
        assert_eq!((head("abcdef", 6), head("abcdef", 4)), ("abcdef".to_owned(), "abc…".to_owned()));
        assert_eq!((tail("abcdef", 6), tail("abcdef", 4)), ("abcdef".to_owned(), "…def".to_owned()));
        assert_eq!(head("a\nb\u{1b}[2J", 80), "a b [2J");
    }

    #[test]
    fn a_transcript_is_named_by_its_folder_and_session() {
        let path = "/h/.claude/projects/-home-me-app/00000007-0000-4000-8000-000000000000.jsonl";
        assert_eq!(short_transcript(path), "-home-me-app/00000007");
        assert_eq!(short_transcript("/h/2026/rollout-1.jsonl"), "2026/rollout-1");
    }
}
