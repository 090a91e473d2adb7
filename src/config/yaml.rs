//! YAML text as a tree whose nodes know their line: what configuration errors need and serde does not keep.
//!
//! The only user of granit-parser, which yields events: values keep their raw text, and one wrong key does not hide the
//! next one. Anchors, aliases and tags are refused by name, so a tree is never larger than its text.

use granit_parser::{Event, Parser, ScalarStyle, Span};
use serde_json::{Map, Value};

/// Levels of nesting that are read; a configuration has three.
const DEPTH_MAX: usize = 16;

#[derive(Debug)]
pub(super) struct Node {
    pub line: usize,
    pub content: Content,
}

#[derive(Debug)]
pub(super) enum Content {
    /// A text as it was written, without its quotes; null, also for nothing; a list of these, with `{}` for mappings.
    Value(Value),
    Mapping(Vec<(Node, Node)>),
}

impl Node {
    /// The value; `{}` for a mapping.
    pub(super) fn value(&self) -> Value {
        match &self.content {
            Content::Value(value) => value.clone(),
            Content::Mapping(_) => Value::Object(Map::new()),
        }
    }

    pub(super) fn text(&self) -> Option<&str> {
        if let Content::Value(Value::String(text)) = &self.content { Some(text) } else { None }
    }

    /// The entries of a mapping; none for anything else.
    pub(super) fn entries(&self) -> &[(Node, Node)] {
        if let Content::Mapping(entries) = &self.content { entries } else { &[] }
    }
}

type Events<'a, 't> = &'a mut dyn Iterator<Item = Result<(Event<'t>, Span), String>>;

/// Reads `text` as one YAML document; `None` when it holds nothing but comments.
///
/// # Errors
/// `line:column: why` it is no YAML that a configuration may use; line and column count from 1.
pub(super) fn parse(text: &str) -> Result<Option<Node>, String> {
    // An alias without its anchor then arrives as an event, and its name, which may be a secret, stays out of messages.
    let options = granit_parser::options! { emit_unresolved_aliases: true, emit_comments: false };
    let parser = Parser::new_from_str_with_options(text, options);
    let mut events = parser.map(|next| {
        next.map_err(|error| explain(text, error.marker().line().max(1), error.marker().col() + 1, &error.info()))
    });
    let mut root = None;
    while let Some(next) = events.next() {
        let (event, span) = next?;
        match event {
            Event::DocumentStart(..) if root.is_some() => {
                return Err(refuse(&span, "a second document starts here; expected only one"));
            }
            Event::StreamStart | Event::StreamEnd | Event::DocumentStart(..) | Event::DocumentEnd => {}
            event => root = Some(node(event, &span, &mut events, DEPTH_MAX)?),
        }
    }
    // A document of comments alone arrives as one empty scalar.
    Ok(root.filter(|root| !root.value().is_null()))
}

/// The node that starts with `event`.
fn node<'t>(event: Event<'t>, span: &Span, events: Events<'_, 't>, depth: usize) -> Result<Node, String> {
    let unsupported = match &event {
        event if event.tag().is_some() => Some(("tags", '!')),
        event if event.anchor_id().is_some() => Some(("anchors", '&')),
        Event::Alias(_) | Event::UnresolvedAlias(_) => Some(("aliases", '*')),
        Event::SequenceStart(..) | Event::MappingStart(..) if depth == 0 => {
            return Err(refuse(span, "nested too deeply"));
        }
        _ => None,
    };
    if let Some((what, sign)) = unsupported {
        let way_out = format!("put the text in quotes if it starts with {sign}");
        return Err(refuse(span, &format!("{what} ({sign}) are not supported here; {way_out}")));
    }
    let content = match event {
        Event::Scalar(text, style, ..) => {
            let is_null = style == ScalarStyle::Plain && matches!(&*text, "" | "~" | "null" | "Null" | "NULL");
            Content::Value(if is_null { Value::Null } else { Value::String(text.into_owned()) })
        }
        Event::MappingStart(..) => {
            let mut children = children(events, depth)?.into_iter();
            let entries = std::iter::from_fn(|| Some((children.next()?, children.next()?)));
            Content::Mapping(entries.collect())
        }
        _ => Content::Value(children(events, depth)?.iter().map(Node::value).collect()),
    };
    Ok(Node { line: span.start.line().max(1), content })
}

/// The nodes up to the end of a list or mapping.
fn children<'t>(events: Events<'_, 't>, depth: usize) -> Result<Vec<Node>, String> {
    let mut children = Vec::new();
    while let Some(next) = events.next() {
        let (event, span) = next?;
        if matches!(event, Event::SequenceEnd | Event::MappingEnd) {
            break;
        }
        children.push(node(event, &span, events, depth - 1)?);
    }
    Ok(children)
}

fn refuse(span: &Span, message: &str) -> String {
    format!("{}:{}: {message}", span.start.line().max(1), span.start.col() + 1)
}

/// The parser's own words, or plainer ones for the commonest mistake: a tab that indents. The parser may notice it a
/// line early, where the value before it starts.
fn explain(text: &str, line: usize, column: usize, message: &str) -> String {
    for line in line..=line + 1 {
        let indent = text.lines().nth(line - 1).unwrap_or_default().chars().take_while(|c| c.is_whitespace());
        if let Some(column) = indent.into_iter().position(|c| c == '\t') {
            return format!("{line}:{}: a tab indents this line; YAML wants spaces", column + 1);
        }
    }
    let message = if message.is_empty() { "this is no YAML".to_owned() } else { message.replace('\n', " ") };
    format!("{line}:{column}: {message}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(text: &str) -> (usize, String) {
        let error = parse(text).unwrap_err();
        let parts: Vec<&str> = error.splitn(3, ':').collect();
        (parts[0].parse().unwrap(), parts[2].trim().to_owned())
    }

    #[test]
    fn nodes_know_the_line_they_stand_on() {
        let root = parse("# first\na:\n  b: 1\n  c:\n    - x\n    - y\n").unwrap().unwrap();
        let [(section, content)] = root.entries() else { panic!() };
        let [(key, value), (_, list)] = content.entries() else { panic!() };
        assert_eq!([section.line, key.line, value.line, list.line], [2, 3, 3, 5]);
        assert_eq!((value.text(), list.value()), (Some("1"), serde_json::json!(["x", "y"])));
    }

    #[test]
    fn comments_alone_are_an_empty_document() {
        for text in ["", "\n\n", "# a\n# b\n", "---\n", "---\n# a\n...\n", "null\n"] {
            assert!(parse(text).unwrap().is_none(), "{text:?}");
        }
    }

    #[test]
    fn quoted_null_is_text() {
        assert_eq!(parse("\"null\"").unwrap().unwrap().text(), Some("null"));
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
