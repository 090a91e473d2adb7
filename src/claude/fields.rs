//! The fields of a line that matter here, as raw JSON: decoded only where somebody asks for one.

use std::borrow::Cow;

use crate::json::{self, items, named, pick};

/// The names of the fields that are kept, of a line and of an attachment. The most frequent first.
const NAMES: [&str; 34] = [
    "type",
    "uuid",
    "parentUuid",
    "sessionId",
    "timestamp",
    "message",
    "cwd",
    "gitBranch",
    "version",
    "isSidechain",
    "isMeta",
    "toolUseResult",
    "promptId",
    "origin",
    "promptSource",
    "turnOrigin",
    "attachment",
    "sourceToolUseID",
    "sessionKind",
    "forkedFrom",
    "isCompactSummary",
    "isVisibleInTranscriptOnly",
    "turnCompanion",
    "isApiErrorMessage",
    "scheduledTaskId",
    "scheduledFireId",
    "interruptedByShutdown",
    "userFeedback",
    "planContent",
    "continuedInSessionId",
    "commandMode",
    "prompt",
    "humanTurn",
    "source_uuid",
];

/// The fields of one line, or of its attachment. Null counts as absent.
pub(super) struct Fields<'a>([Option<&'a str>; NAMES.len()]);

impl<'a> Fields<'a> {
    pub(super) fn of(object: &'a str) -> Result<Self, serde_json::Error> {
        named(object, NAMES).map(Fields)
    }

    /// The raw value of a field that is in [`NAMES`].
    pub(super) fn get(&self, name: &str) -> Option<&'a str> {
        let index = NAMES.iter().position(|known| *known == name);
        debug_assert!(index.is_some(), "{name} is not in NAMES");
        self.0.get(index?).copied()?
    }
}

/// A flag is set by `true` alone.
pub(super) fn is_set(flag: Option<&str>) -> bool {
    flag == Some("true")
}

/// Whether there is anything: neither absent nor false, zero, or empty.
pub(super) fn is_something(raw: Option<&str>) -> bool {
    let Some(raw) = raw else { return false };
    match raw.as_bytes().first() {
        Some(b'"') => raw.len() > 2,
        Some(b'{' | b'[') => raw.get(1..raw.len() - 1).is_some_and(|inside| !inside.trim_ascii().is_empty()),
        Some(b't') => true,
        Some(b'f' | b'n') | None => false,
        Some(_) => raw.parse::<f64>().is_ok_and(|number| number != 0.0),
    }
}

pub(super) fn is_object(raw: Option<&str>) -> bool {
    raw.is_some_and(|raw| raw.starts_with('{'))
}

/// Decodes strings and remembers whether one had to be mended.
pub(super) struct Mender {
    pub(super) is_mended: bool,
}

impl Mender {
    /// `None` where there is no string.
    pub(super) fn string<'a>(&mut self, raw: Option<&'a str>) -> Option<Cow<'a, str>> {
        let decoded = json::string(raw?)?;
        self.is_mended |= decoded.is_mended;
        Some(decoded.text)
    }

    /// As [`Mender::string`], and the empty string is none.
    pub(super) fn filled_string(&mut self, raw: Option<&str>) -> Option<String> {
        self.string(raw).filter(|text| !text.is_empty()).map(Cow::into_owned)
    }
}

/// Texts of one message that are kept apart.
const TEXTS_MAX: usize = 10_000;

/// What a message holds.
#[derive(Default)]
pub(super) struct Content<'a> {
    /// A string is one text.
    pub(super) texts: Vec<Cow<'a, str>>,
    pub(super) has_tool_result: bool,
    pub(super) has_attachment: bool,
    /// What a person answered when they refused a tool.
    pub(super) rejection: Option<String>,
}

impl<'a> Content<'a> {
    /// Of a string or an array of blocks; anything else is empty. `rejection` finds a person's words in the text of a tool
    /// that failed.
    pub(super) fn of(
        raw: Option<&'a str>,
        mender: &mut Mender,
        rejection: impl Fn(Cow<'_, str>) -> Option<String>,
    ) -> Self {
        let mut content = Content::default();
        let Some(raw) = raw else { return content };
        if let Some(text) = mender.string(Some(raw)) {
            content.texts.push(text);
            return content;
        }
        // What is no array has no blocks.
        let _ = items(raw, |block| {
            let [kind, text, result, is_error] = pick(Some(block), ["type", "text", "content", "is_error"]);
            match mender.string(kind).as_deref() {
                Some("text") => content.add(mender.string(text)),
                Some("image" | "document") => content.has_attachment = true,
                Some("tool_result") => {
                    content.has_tool_result = true;
                    if is_something(is_error) && content.rejection.is_none() {
                        content.rejection = rejection(result_text(result, mender));
                    }
                }
                _ => {}
            }
        });
        content
    }

    /// Adds a text. Beyond [`TEXTS_MAX`] it is joined to the last one: millions of empty texts take no memory of their own.
    fn add(&mut self, text: Option<Cow<'a, str>>) {
        let Some(text) = text else { return };
        let is_full = self.texts.len() == TEXTS_MAX;
        match self.texts.last_mut() {
            Some(last) if is_full => {
                let last = last.to_mut();
                last.push('\n');
                last.push_str(&text);
            }
            _ => self.texts.push(text),
        }
    }
}

/// All texts, a line break between them. Moves a single one, which may be long.
pub(super) fn joined(texts: Vec<Cow<'_, str>>) -> String {
    match <[Cow<'_, str>; 1]>::try_from(texts) {
        Ok([text]) => text.into_owned(),
        Err(texts) => texts.join("\n"),
    }
}

/// The text of a tool's result: a string, or its blocks' texts.
fn result_text<'a>(raw: Option<&'a str>, mender: &mut Mender) -> Cow<'a, str> {
    if let Some(text) = mender.string(raw) {
        return text;
    }
    let mut joined = String::new();
    let mut is_first = true;
    let _ = items(raw.unwrap_or_default(), |block| {
        let [text] = pick(Some(block), ["text"]);
        let Some(text) = mender.string(text) else { return };
        if !std::mem::take(&mut is_first) {
            joined.push('\n');
        }
        joined.push_str(&text);
    });
    joined.into()
}
