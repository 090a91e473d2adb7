//! The fields of a line that matter here, as raw JSON: decoded only where somebody asks for one.

use std::borrow::Cow;

use crate::json::{self, items, members};

/// The fields of one line; the last one of a name wins. Null counts as absent.
#[derive(Default)]
pub(super) struct Fields<'a> {
    pub(super) line_type: Option<&'a str>,
    pub(super) version: Option<&'a str>,
    pub(super) session_kind: Option<&'a str>,
    pub(super) continued_in: Option<&'a str>,
    pub(super) uuid: Option<&'a str>,
    pub(super) parent: Option<&'a str>,
    pub(super) session: Option<&'a str>,
    pub(super) timestamp: Option<&'a str>,
    pub(super) cwd: Option<&'a str>,
    pub(super) git_branch: Option<&'a str>,
    pub(super) is_sidechain: Option<&'a str>,
    pub(super) is_meta: Option<&'a str>,
    pub(super) is_compact_summary: Option<&'a str>,
    pub(super) is_visible_in_transcript_only: Option<&'a str>,
    pub(super) turn_companion: Option<&'a str>,
    pub(super) is_api_error_message: Option<&'a str>,
    pub(super) source_tool_use_id: Option<&'a str>,
    pub(super) scheduled_task_id: Option<&'a str>,
    pub(super) scheduled_fire_id: Option<&'a str>,
    pub(super) interrupted_by_shutdown: Option<&'a str>,
    pub(super) origin: Option<&'a str>,
    pub(super) prompt_source: Option<&'a str>,
    pub(super) turn_origin: Option<&'a str>,
    pub(super) tool_use_result: Option<&'a str>,
    pub(super) user_feedback: Option<&'a str>,
    pub(super) prompt_id: Option<&'a str>,
    pub(super) plan_content: Option<&'a str>,
    pub(super) forked_from: Option<&'a str>,
    pub(super) message: Option<&'a str>,
    pub(super) attachment: Option<&'a str>,
}

impl<'a> Fields<'a> {
    pub(super) fn of(line: &'a str) -> Result<Self, serde_json::Error> {
        let mut fields = Fields::default();
        members(line, |key, value| {
            let field = match key {
                "type" => &mut fields.line_type,
                "version" => &mut fields.version,
                "sessionKind" => &mut fields.session_kind,
                "continuedInSessionId" => &mut fields.continued_in,
                "uuid" => &mut fields.uuid,
                "parentUuid" => &mut fields.parent,
                "sessionId" => &mut fields.session,
                "timestamp" => &mut fields.timestamp,
                "cwd" => &mut fields.cwd,
                "gitBranch" => &mut fields.git_branch,
                "isSidechain" => &mut fields.is_sidechain,
                "isMeta" => &mut fields.is_meta,
                "isCompactSummary" => &mut fields.is_compact_summary,
                "isVisibleInTranscriptOnly" => &mut fields.is_visible_in_transcript_only,
                "turnCompanion" => &mut fields.turn_companion,
                "isApiErrorMessage" => &mut fields.is_api_error_message,
                "sourceToolUseID" => &mut fields.source_tool_use_id,
                "scheduledTaskId" => &mut fields.scheduled_task_id,
                "scheduledFireId" => &mut fields.scheduled_fire_id,
                "interruptedByShutdown" => &mut fields.interrupted_by_shutdown,
                "origin" => &mut fields.origin,
                "promptSource" => &mut fields.prompt_source,
                "turnOrigin" => &mut fields.turn_origin,
                "toolUseResult" => &mut fields.tool_use_result,
                "userFeedback" => &mut fields.user_feedback,
                "promptId" => &mut fields.prompt_id,
                "planContent" => &mut fields.plan_content,
                "forkedFrom" => &mut fields.forked_from,
                "message" => &mut fields.message,
                "attachment" => &mut fields.attachment,
                _ => return,
            };
            *field = given(value);
        })?;
        Ok(fields)
    }
}

fn given(value: &str) -> Option<&str> {
    (value != "null").then_some(value)
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

/// The members called `names` of the object `raw`, last ones first served; all absent where it is no object.
pub(super) fn pick<'a, const N: usize>(raw: Option<&'a str>, names: [&str; N]) -> [Option<&'a str>; N] {
    let mut found = [None; N];
    if let Some(raw) = raw {
        // What is no object has no members, which is all there is to know here.
        let _ = members(raw, |key, value| {
            for (name, slot) in names.iter().zip(&mut found) {
                if *name == key {
                    *slot = given(value);
                }
            }
        });
    }
    found
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

    /// All texts, a line break between them. Moves a single one, which may be long.
    pub(super) fn into_text(self) -> String {
        match <[Cow<'a, str>; 1]>::try_from(self.texts) {
            Ok([text]) => text.into_owned(),
            Err(texts) => texts.join("\n"),
        }
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
