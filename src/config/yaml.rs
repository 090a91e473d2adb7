//! YAML text as a tree whose nodes know their line: what configuration errors need and serde does not keep.
//!
//! The only user of granit-parser, which yields events: the raw text of each value stays
//! at hand for messages, and one wrong key does not hide the next one. Anchors, aliases and tags are refused by name,
//! so a tree is never larger than its text.

use granit_parser::{Event, Parser, ScalarStyle, Span};

/// Levels of nesting that are read; a configuration has three.
const DEPTH_MAX: usize = 16;

#[derive(Debug)]
pub(super) struct Node {
    pub line: usize,
    pub value: Value,
}

#[derive(Debug)]
pub(super) enum Value {
    /// `plain` when it stood without quotes, so that `null` and `2` mean more than their letters.
    Scalar {
        text: String,
        plain: bool,
    },
    List(Vec<Node>),
    Mapping(Vec<(Node, Node)>),
}

impl Node {
    /// Whether it is a plain `null`, `~` or nothing at all.
    pub(super) fn is_null(&self) -> bool {
        matches!(&self.value, Value::Scalar { text, plain: true } if is_null_text(text))
    }
}

/// Whether unquoted `text` is YAML's null.
pub(super) fn is_null_text(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

/// Why a text is no YAML that a configuration may use. Line and column count from 1.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SyntaxError {
    pub line: usize,
    pub column: usize,
    pub message: String,
}

/// A collection whose end has not come yet.
enum Open {
    List { line: usize, items: Vec<Node> },
    Mapping { line: usize, entries: Vec<(Node, Node)>, key: Option<Node> },
}

/// Reads `text` as one YAML document; `None` when it holds nothing but comments.
pub(super) fn parse(text: &str) -> Result<Option<Node>, SyntaxError> {
    let mut root = None;
    let mut open: Vec<Open> = Vec::new();
    let mut documents = 0;
    // An alias without its anchor then arrives as an event, and its name, which may be a secret, stays out of messages.
    let options = granit_parser::options! { emit_unresolved_aliases: true, emit_comments: false };
    for next in Parser::new_from_str_with_options(text, options) {
        let (event, span) = next.map_err(|error| {
            let marker = error.marker();
            explain(text, marker.line().max(1), marker.col() + 1, &error.info())
        })?;
        let line = span.start.line().max(1);
        if event.tag().is_some() {
            return Err(refuse(&span, "tags (!) are not supported here; put the text in quotes if it starts with !"));
        }
        let done = match event {
            Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => continue,
            Event::DocumentStart(..) => {
                documents += 1;
                if documents > 1 {
                    return Err(refuse(&span, "a second document starts here; expected only one"));
                }
                continue;
            }
            Event::Alias(_) | Event::UnresolvedAlias(_) => {
                return Err(refuse(
                    &span,
                    "aliases (*) are not supported here; put the text in quotes if it starts with *",
                ));
            }
            Event::Scalar(_, _, anchor, _) | Event::SequenceStart(_, anchor, _) | Event::MappingStart(_, anchor, _)
                if anchor != 0 =>
            {
                return Err(refuse(
                    &span,
                    "anchors (&) are not supported here; put the text in quotes if it starts with &",
                ));
            }
            Event::Scalar(text, style, ..) => {
                let plain = style == ScalarStyle::Plain;
                Node { line, value: Value::Scalar { text: text.into_owned(), plain } }
            }
            Event::SequenceStart(..) | Event::MappingStart(..) if open.len() >= DEPTH_MAX => {
                return Err(refuse(&span, "nested too deeply"));
            }
            Event::SequenceStart(..) => {
                open.push(Open::List { line, items: Vec::new() });
                continue;
            }
            Event::MappingStart(..) => {
                open.push(Open::Mapping { line, entries: Vec::new(), key: None });
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(Open::List { line, items }) => Node { line, value: Value::List(items) },
                Some(Open::Mapping { line, entries, .. }) => Node { line, value: Value::Mapping(entries) },
                None => continue,
            },
            _ => continue,
        };
        match open.last_mut() {
            None => root = Some(done),
            Some(Open::List { items, .. }) => items.push(done),
            Some(Open::Mapping { entries, key, .. }) => match key.take() {
                None => *key = Some(done),
                Some(key) => entries.push((key, done)),
            },
        }
    }
    // A document of comments alone arrives as one empty scalar.
    Ok(root.filter(|node| !node.is_null()))
}

fn refuse(span: &Span, message: &str) -> SyntaxError {
    SyntaxError { line: span.start.line().max(1), column: span.start.col() + 1, message: message.to_owned() }
}

/// The parser's own words, or plainer ones for the commonest mistake: a tab that indents. The parser may notice it a
/// line early, where the value before it starts.
fn explain(text: &str, line: usize, column: usize, message: &str) -> SyntaxError {
    let tab = (line..=line + 1).find_map(|line| {
        let content = text.lines().nth(line - 1)?;
        let column = content.chars().take_while(|c| c.is_whitespace()).position(|c| c == '\t')? + 1;
        Some((line, column))
    });
    if let Some((line, column)) = tab {
        return SyntaxError { line, column, message: "a tab indents this line; YAML wants spaces".to_owned() };
    }
    let message = if message.is_empty() { "this is no YAML".to_owned() } else { message.replace('\n', " ") };
    SyntaxError { line, column, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(text: &str) -> (usize, String) {
        let error = parse(text).unwrap_err();
        (error.line, error.message)
    }

    #[test]
    fn nodes_know_the_line_they_stand_on() {
        let root = parse("# first\na:\n  b: 1\n  c:\n    - x\n    - y\n").unwrap().unwrap();
        let Value::Mapping(sections) = root.value else { panic!() };
        let Value::Mapping(keys) = &sections[0].1.value else { panic!() };
        assert_eq!((sections[0].0.line, keys[0].0.line, keys[0].1.line, keys[1].0.line), (2, 3, 3, 4));
        let Value::List(items) = &keys[1].1.value else { panic!() };
        assert_eq!((items[0].line, items[1].line), (5, 6));
    }

    #[test]
    fn comments_alone_are_an_empty_document() {
        for text in ["", "\n\n", "# a\n# b\n", "---\n", "---\n# a\n...\n", "null\n"] {
            assert!(parse(text).unwrap().is_none(), "{text:?}");
        }
    }

    #[test]
    fn quoted_null_is_text() {
        assert!(!parse("\"null\"").unwrap().unwrap().is_null());
    }

    #[test]
    fn anchors_aliases_and_tags_are_refused_without_repeating_them() {
        for (text, word) in [
            ("a: &hunter2 1\nb: *hunter2\n", "anchors"),
            ("a: 1\nb: *hunter2\n", "aliases"),
            ("a: !hunter2 1\n", "tags"),
        ] {
            let (_, message) = fails(text);
            assert!(message.starts_with(word) && !message.contains("hunter2"), "{message}");
        }
    }

    #[test]
    fn a_tab_that_indents_is_named() {
        for (text, line) in [("a:\n  b: 1\n\tc: 2\n", 3), ("a:\n\tb: 1\n", 2), ("a:\n  b: 1\n  \tc: 2\n", 3)] {
            assert_eq!(fails(text), (line, "a tab indents this line; YAML wants spaces".to_owned()), "{text:?}");
        }
    }

    #[test]
    fn syntax_errors_tell_line_and_reason() {
        for (text, line) in [("a: 1\nb: [1, 2\n", 3), ("a: 1\nb: \"x\n", 3), ("a: 1\n  b: 2\n", 2), ("a: 1\n}\n", 2)] {
            let (found, message) = fails(text);
            assert!((line - 1..=line).contains(&found), "{text:?}: line {found}: {message}");
            assert!(message.len() > 5 && !message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn deep_nesting_and_second_documents_are_refused() {
        assert_eq!(fails(&format!("{}{}", "[".repeat(40), "]".repeat(40))).1, "nested too deeply");
        assert_eq!(fails("a: 1\n---\nb: 1\n").1, "a second document starts here; expected only one");
    }
}
