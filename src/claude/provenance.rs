//! Who said what stands on a line of the user's side: a person, or the program in their name.
//!
//! About one such line in fifteen is a person's; the others carry results of tools, notifications, reminders, output of
//! local commands. [`judge`] decides by evidence, the strongest first:
//!
//! 1. **Structure**: fields that only lines of the program have. Nothing outweighs them.
//! 2. **"Not human" outweighs "human"**: `origin`, `turnOrigin`, `promptSource`, `commandMode`.
//! 3. **How well it is known** ([`Provenance`]), by the same fields. All four grades are turns.
//! 4. **Beside a tool's result**: words typed with an approval, answers to the agent's questions, the reason of a rejection.
//! 5. **Context is peeled** off both ends of a text: reminders, what an editor or a hook put there.
//! 6. **Envelopes are not**: the program writes on behind them. A text that begins with one is the program's, unless it is
//!    known to be typed: then it was pasted.
//! 7. **Sentences of the program**.
//! 8. **Kinds**: commands, shell lines, plans.
//!
//! What is left of the texts is stored, joined by a line break, otherwise untouched. Lines of versions below 2.1.119 have
//! none of the fields and are judged by their text alone.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::LazyLock;

use regex::Regex;

use super::fields::{Content, Fields, Mender, is_object, is_set, is_something, joined};
use crate::json::{members, pick};
use crate::transcript::{Unknown, shortened};

/// How well it is known that a person said it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Provenance {
    /// Claude Code says that it was typed at its terminal.
    Typed,
    /// An application says that a person said it, and passed it on.
    App,
    /// It came through a pipe: `claude -p`, a script, an application. Nothing is known of who said it.
    Sdk,
    /// The line says nothing of it: all lines below 2.1.119, and some later ones.
    Unlabelled,
}

impl Provenance {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Provenance::Typed => "typed",
            Provenance::App => "app",
            Provenance::Sdk => "sdk",
            Provenance::Unlabelled => "unlabelled",
        }
    }
}

/// How a human's turn came about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum TurnKind {
    Prompt,
    /// A slash command; the text is its name and its arguments.
    Command,
    /// A prompt typed while the agent worked.
    Queued,
    /// A prompt made from an approved plan.
    Plan,
    /// A shell command typed behind `!`.
    Shell,
    /// Answers to the agent's questions; the text is each question and its answer, on lines of their own.
    Answer,
    /// The reason typed when refusing a tool.
    Rejection,
}

impl TurnKind {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            TurnKind::Prompt => "prompt",
            TurnKind::Command => "command",
            TurnKind::Queued => "queued",
            TurnKind::Plan => "plan",
            TurnKind::Shell => "shell",
            TurnKind::Answer => "answer",
            TurnKind::Rejection => "rejection",
        }
    }
}

/// What a person said.
#[derive(Debug)]
pub(super) struct Human {
    pub(super) kind: TurnKind,
    pub(super) provenance: Provenance,
    pub(super) text: String,
    /// An image or document came with it.
    pub(super) has_attachment: bool,
}

/// Why a line of the user's side, or of the agent's, is no turn. Names fields and tags, never a text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct NoTurn {
    label: &'static str,
    /// The field's value or the tag, where that varies.
    detail: String,
}

const NOTHING_BUT_CONTEXT: &str = "nothing_but_context";

impl NoTurn {
    /// `label`: a field's name, or a reason in lower case.
    pub(super) fn because(label: &'static str) -> NoTurn {
        NoTurn { label, detail: String::new() }
    }

    fn value(field: &'static str, value: &str) -> NoTurn {
        NoTurn { label: field, detail: shortened(value) }
    }

    fn tag(label: &'static str, tag: &str) -> NoTurn {
        NoTurn { label, detail: format!("<{}>", shortened(tag)) }
    }

    /// The reason without what varies, to count by.
    pub(crate) fn label(&self) -> &'static str {
        self.label
    }
}

impl fmt::Display for NoTurn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label.replace('_', " ").as_str())?;
        if self.detail.is_empty() { Ok(()) } else { write!(f, " {}", self.detail) }
    }
}

/// All words of this version and later ones say where they came from.
const LABELLED_FROM: [u32; 3] = [2, 1, 205];

const ORIGINS: &[&str] = &[
    "auto-continuation",
    "channel",
    "coordinator",
    "human",
    "observer",
    "observer-activity",
    "peer",
    "task-notification",
    "unclassified",
];
const PROMPT_SOURCES: &[&str] = &["queued", "sdk", "suggestion_accepted", "system", "typed"];
const TURN_ORIGINS: &[&str] =
    &["auto_continuation", "human", "peer", "scheduled", "sdk", "system", "task_notification"];

pub(super) fn version(fields: &Fields<'_>, mender: &mut Mender) -> String {
    mender.string(fields.get("version")).map_or_else(String::new, |version| shortened(&version))
}

/// Whether words of this version say where they came from.
fn is_labelled_version(version: &str) -> bool {
    let mut numbers = version.split('.').map(|part| part.parse::<u32>().ok());
    let numbers = [(); 3].map(|()| numbers.next().flatten());
    numbers.iter().all(Option::is_some) && numbers.map(Option::unwrap_or_default) >= LABELLED_FROM
}

/// Judges a `user` line, or an `attachment` line when `is_attachment`. Adds to `unknowns` what it does not know.
pub(super) fn judge(
    fields: &Fields<'_>,
    is_attachment: bool,
    mender: &mut Mender,
    unknowns: &mut Vec<Unknown>,
) -> Result<Human, NoTurn> {
    let queued = if is_attachment {
        Some(queued_command(fields, mender).ok_or(NoTurn::because("no_queued_command"))?)
    } else {
        None
    };
    if queued.is_none() && !is_object(fields.get("message")) {
        return Err(NoTurn::because("no_message"));
    }
    if let Some(field) = field_of_the_program(fields, queued.as_ref()) {
        return Err(NoTurn::because(field));
    }
    let provenance = provenance(fields, queued.as_ref(), mender, unknowns)?;
    let content = match &queued {
        Some(queued) => queued.get("prompt"),
        None => pick(fields.get("message"), ["content"])[0],
    };
    let read = |mender: &mut Mender| {
        let mut content = Content::of(content, mender, rejection_reason);
        let is_result = content.has_tool_result || is_something(fields.get("toolUseResult"));
        if is_result {
            content.texts.retain(|text| !matches!(trim(text), "" | "Tool loaded."));
        }
        (content, is_result)
    };
    let (content, is_result) = read(mender);
    let has_attachment = content.has_attachment;
    if is_result && content.texts.is_empty() {
        let (kind, text) = said_by_result(fields, content.rejection, mender).ok_or(NoTurn::because("tool_result"))?;
        return Ok(Human { kind, provenance, text, has_attachment });
    }
    let text = match without_context(content, provenance) {
        // They pasted it. Read again rather than kept, for it may be long.
        Err(no_turn) if no_turn.label == NOTHING_BUT_CONTEXT && provenance == Provenance::Typed => {
            joined(read(mender).0.texts)
        }
        text => text?,
    };
    let text = without_sentences(text, provenance)?;
    let (kind, text) = kind_of(text, has_attachment)?;
    let kind = match kind {
        _ if is_attachment => TurnKind::Queued,
        TurnKind::Prompt if is_something(fields.get("planContent")) => TurnKind::Plan,
        kind => kind,
    };
    if provenance == Provenance::Unlabelled && matches!(kind, TurnKind::Prompt | TurnKind::Queued) {
        let version = version(fields, mender);
        if is_labelled_version(&version) {
            unknowns.push(Unknown { field: "unlabelled", value: String::new(), version });
        }
    }
    Ok(Human { kind, provenance, text, has_attachment })
}

/// The attachment of a line, where that is a prompt typed while the agent worked.
fn queued_command<'a>(fields: &Fields<'a>, mender: &mut Mender) -> Option<Fields<'a>> {
    let attachment = Fields::of(fields.get("attachment")?).ok()?;
    (mender.string(attachment.get("type"))? == "queued_command").then_some(attachment)
}

/// The first field that only lines of the program have.
fn field_of_the_program(fields: &Fields<'_>, queued: Option<&Fields<'_>>) -> Option<&'static str> {
    const FLAGS: [&str; 5] =
        ["isSidechain", "isMeta", "isCompactSummary", "isVisibleInTranscriptOnly", "turnCompanion"];
    const VALUES: [&str; 4] = ["sourceToolUseID", "scheduledTaskId", "scheduledFireId", "interruptedByShutdown"];
    let is_flagged = |name: &&str| is_set(fields.get(name)) || queued.is_some_and(|queued| is_set(queued.get(name)));
    let flag = FLAGS.into_iter().find(is_flagged);
    flag.or_else(|| VALUES.into_iter().find(|name| is_something(fields.get(name))))
}

/// A field's value as text; what is no string, as it stands in the file.
fn value<'a>(raw: &'a str, mender: &mut Mender) -> Cow<'a, str> {
    mender.string(Some(raw)).unwrap_or(Cow::Borrowed(raw))
}

/// How well a line is known to be a person's, by the fields that say where it came from: those of the attachment before
/// those of its line. Adds values that are not known to `unknowns`.
fn provenance(
    fields: &Fields<'_>,
    queued: Option<&Fields<'_>>,
    mender: &mut Mender,
    unknowns: &mut Vec<Unknown>,
) -> Result<Provenance, NoTurn> {
    let queued_origin = queued.and_then(|queued| queued.get("origin"));
    let origin = queued_origin.or(fields.get("origin"));
    let origin = origin.and_then(|raw| if is_object(Some(raw)) { pick(Some(raw), ["kind"])[0] } else { Some(raw) });
    let label = |name| {
        let on_attachment = queued.and_then(|queued| queued.get(name)).filter(|raw| is_something(Some(raw)));
        on_attachment.or(fields.get(name))
    };
    let mut labels = [None, None, None];
    let raw = [
        ("origin", origin, ORIGINS),
        ("promptSource", label("promptSource"), PROMPT_SOURCES),
        ("turnOrigin", label("turnOrigin"), TURN_ORIGINS),
    ];
    for ((field, raw, known), label) in raw.into_iter().zip(&mut labels) {
        *label = raw.map(|raw| value(raw, mender));
        if let Some(value) = label.as_deref().filter(|value| !known.contains(value)) {
            unknowns.push(Unknown { field, value: shortened(value), version: version(fields, mender) });
        }
    }
    let [origin, source, turn] = &labels;
    let (origin, source, turn) = (origin.as_deref(), source.as_deref(), turn.as_deref());
    if let Some(origin) = origin.filter(|origin| *origin != "human") {
        return Err(NoTurn::value("origin", origin));
    }
    if let Some(turn) = turn.filter(|turn| !matches!(*turn, "human" | "sdk")) {
        return Err(NoTurn::value("turnOrigin", turn));
    }
    if source == Some("system") {
        return Err(NoTurn::value("promptSource", "system"));
    }
    let is_human_turn = is_set(queued.and_then(|queued| queued.get("humanTurn")));
    if let Some(queued) = queued {
        match queued.get("commandMode").map(|raw| value(raw, mender)).as_deref() {
            Some("prompt") => {}
            Some(mode) => return Err(NoTurn::value("commandMode", mode)),
            None if origin == Some("human") || is_human_turn => {}
            None => return Err(NoTurn::because("no_command_mode")),
        }
    }
    let is_typed = matches!(source, Some("typed" | "queued" | "suggestion_accepted"))
        || is_human_turn
        || (queued.is_some() && origin == Some("human"));
    Ok(if is_typed {
        Provenance::Typed
    } else if origin == Some("human") || turn == Some("human") {
        Provenance::App
    } else if source == Some("sdk") || turn == Some("sdk") {
        Provenance::Sdk
    } else {
        Provenance::Unlabelled
    })
}

/// What a person said by the way they met a tool, where no text stands beside its result.
fn said_by_result(fields: &Fields<'_>, rejection: Option<String>, mender: &mut Mender) -> Option<(TurnKind, String)> {
    let [answers] = pick(fields.get("toolUseResult"), ["answers"]);
    if let Some(text) = answers.and_then(|answers| questions_and_answers(answers, mender)) {
        return Some((TurnKind::Answer, text));
    }
    let feedback = mender.string(fields.get("userFeedback")).filter(|feedback| !trim(feedback).is_empty());
    feedback.map(Cow::into_owned).or(rejection).map(|reason| (TurnKind::Rejection, reason))
}

/// Each question and its answer; `None` unless all answers are texts and there is one.
fn questions_and_answers(answers: &str, mender: &mut Mender) -> Option<String> {
    let mut text = String::new();
    let mut are_texts = true;
    members(answers, |question, answer| match mender.string(Some(answer)) {
        Some(answer) => {
            for part in [question, "\n", &answer, "\n"] {
                text.push_str(part);
            }
        }
        None => are_texts = false,
    })
    .ok()?;
    text.pop();
    (are_texts && !text.is_empty()).then_some(text)
}

/// The reason that stands in the text of a tool that was refused: versions below 2.1.220 keep it nowhere else.
fn rejection_reason(text: Cow<'_, str>) -> Option<String> {
    let after = text.strip_prefix("The user doesn't want to proceed with this tool use.")?;
    let sentences =
        ["To tell you how to proceed, the user said:", "The user provided the following reason for the rejection:"];
    let ends = sentences.iter().filter_map(|sentence| Some((after.find(sentence)?, sentence.len())));
    let (start, length) = ends.min()?;
    let reason = after.get(start + length..)?.trim_start_matches(is_blank);
    (!reason.is_empty()).then(|| text.len() - reason.len()..text.len()).map(|range| part(text, range))
}

/// A part of a text that may be long: what is owned is cut in its place.
fn part(text: Cow<'_, str>, range: Range<usize>) -> String {
    match text {
        Cow::Borrowed(text) => text.get(range).unwrap_or_default().to_owned(),
        Cow::Owned(mut text) => {
            text.truncate(range.end);
            text.drain(..range.start);
            text
        }
    }
}

/// Where `inside` stands, which is a part of `text`.
fn range_of(inside: &str, text: &str) -> Range<usize> {
    let start = inside.as_ptr().addr() - text.as_ptr().addr();
    start..start + inside.len()
}

/// The texts without the context that the program put around them, joined.
fn without_context(content: Content<'_>, provenance: Provenance) -> Result<String, NoTurn> {
    let mut kept: Vec<Cow<'_, str>> = Vec::with_capacity(content.texts.len());
    let mut is_peeled = false;
    for text in content.texts {
        let was_empty = text.is_empty();
        let text = unwrap_pasted(text);
        let peeled = peel(&text);
        is_peeled |= peeled.is_peeled;
        if let (Some(tag), Provenance::Unlabelled) = (peeled.unclosed, provenance) {
            return Err(NoTurn::tag("unclosed_context", tag));
        }
        if provenance != Provenance::Typed
            && kept.is_empty()
            && let Some(tag) = opening_tag(trim_start(peeled.rest)).filter(|tag| is_envelope(tag))
        {
            return Err(NoTurn::tag("envelope", tag));
        }
        // A text of which nothing is left leaves no empty line behind.
        if was_empty || !trim(peeled.rest).is_empty() {
            let range = range_of(peeled.rest, &text);
            kept.push(part(text, range).into());
        }
    }
    let is_gone = kept.iter().all(|text| trim(text).is_empty());
    if is_peeled && is_gone && (provenance == Provenance::Typed || !content.has_attachment) {
        return Err(NoTurn::because(NOTHING_BUT_CONTEXT));
    }
    Ok(joined(kept))
}

/// The text without what the program says of an interrupt.
fn without_sentences(text: String, provenance: Provenance) -> Result<String, NoTurn> {
    let text = match behind_interrupt(&text) {
        Some(behind) if trim(behind).is_empty() => return Err(NoTurn::because("interrupt")),
        _ if provenance == Provenance::Typed => return Ok(text),
        Some(behind) => {
            let range = range_of(behind.trim_start_matches(['\r', '\n', ' ']), &text);
            part(text.into(), range)
        }
        None => text,
    };
    let start = trim_start(&text);
    let is_sentence = start.starts_with("Caveat: The messages below were generated")
        || start.starts_with("Operation stopped by hook")
        || start.strip_prefix("Another Claude session sent a message:").is_some_and(|after| {
            let after = trim_start(after);
            ["<teammate-message", "<agent-message", "<cross-session-message"].iter().any(|tag| after.starts_with(tag))
        });
    if is_sentence { Err(NoTurn::because("sentence_of_the_program")) } else { Ok(text) }
}

/// What follows the note of an interrupt that `text` begins with.
fn behind_interrupt(text: &str) -> Option<&str> {
    let after = trim_start(text).strip_prefix("[Request interrupted by user")?;
    after.strip_prefix(" for tool use").unwrap_or(after).strip_prefix(']')
}

/// Commands and shell lines are told by their tags.
fn kind_of(text: String, has_attachment: bool) -> Result<(TurnKind, String), NoTurn> {
    match opening_tag(trim_start(&text)) {
        Some("command-name" | "command-message") => {
            Ok((TurnKind::Command, command(&text).ok_or(NoTurn::because("empty_command"))?))
        }
        Some("bash-input") => {
            let line = tagged(&text, "bash-input").filter(|line| !trim(line).is_empty());
            let range = range_of(line.ok_or(NoTurn::because("empty_shell"))?, &text);
            Ok((TurnKind::Shell, part(text.into(), range)))
        }
        _ if trim(&text).is_empty() && !has_attachment => Err(NoTurn::because("empty")),
        _ => Ok((TurnKind::Prompt, text)),
    }
}

/// Blocks of context that the program puts at the ends of what a person said.
fn is_context(tag: &str) -> bool {
    matches!(tag, "system-reminder" | "user-prompt-submit-hook" | "session-start-hook" | "local-command-caveat")
        || tag.starts_with("ide_")
}

/// Blocks in which the program hands something over in the user's name.
fn is_envelope(tag: &str) -> bool {
    matches!(
        tag,
        "task-notification"
            | "teammate-message"
            | "cross-session-message"
            | "agent-message"
            | "channel"
            | "bash-stdout"
            | "bash-stderr"
            | "local-command-stdout"
            | "local-command-stderr"
            | "tick"
            | "goal"
            | "user-memory-input"
            | "scheduled-task"
    ) || tag.ends_with("-event")
}

struct Peeled<'a> {
    rest: &'a str,
    is_peeled: bool,
    /// The context block at the start that does not close.
    unclosed: Option<&'a str>,
}

/// Takes complete blocks of context off the start, and off the end where they begin a line.
fn peel(text: &str) -> Peeled<'_> {
    let mut peeled = Peeled { rest: text, is_peeled: false, unclosed: None };
    loop {
        let start = peeled.rest.trim_start_matches(['\u{feff}', ' ', '\t', '\r', '\n']);
        let Some(tag) = opening_tag(start).filter(|tag| is_context(tag)) else { break };
        let Some((_, after)) = start.split_once(&format!("</{tag}>")) else {
            peeled.unclosed = Some(tag);
            return peeled;
        };
        peeled.is_peeled = true;
        peeled.rest = after.trim_start_matches(['\r', '\n']);
    }
    while let Some(before) = without_last_block(peeled.rest) {
        peeled.is_peeled = true;
        peeled.rest = before;
    }
    peeled
}

/// What stands before the block of context that `text` ends with, where that begins a line.
fn without_last_block(text: &str) -> Option<&str> {
    let text = text.trim_end_matches(is_blank);
    let inside = text.strip_suffix('>')?;
    let (before, tag) = inside.rsplit_once("</")?;
    if !is_context(tag) || !tag.chars().all(is_tag_character) {
        return None;
    }
    let (before, _) = before.rsplit_once(&format!("<{tag}>"))?;
    (before.is_empty() || before.ends_with('\n')).then(|| before.trim_end_matches(is_blank))
}

/// Of more than so many tags in one text all stay: each takes memory while its partner is searched.
const PASTE_TAGS_MAX: usize = 10_000;

static PASTE_TAG: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r#"<(/?)pasted_content id="([^"]*)">"#).expect("a constant pattern that the tests compile")
});

/// What a person pasted is their text; from 2.1.332 on the program marks where it begins and ends.
fn unwrap_pasted(text: Cow<'_, str>) -> Cow<'_, str> {
    let marks = paste_marks(&text);
    if marks.is_empty() {
        return text;
    }
    // In its place: the text may be long.
    let mut bytes = text.into_owned().into_bytes();
    let (mut length, mut taken) = (0, 0);
    for mark in marks {
        bytes.copy_within(taken..mark.start, length);
        length += mark.start - taken;
        taken = mark.end;
    }
    bytes.drain(length..taken);
    // Whole characters were taken out.
    Cow::Owned(String::from_utf8(bytes).unwrap_or_default())
}

/// The tags around what was pasted, each with the line break inside it, in order.
fn paste_marks(text: &str) -> Vec<Range<usize>> {
    let tags = PASTE_TAG.captures_iter(text).map(|captures| captures.extract());
    let tags: Vec<(&str, [&str; 2])> = tags.take(PASTE_TAGS_MAX + 1).collect();
    let mut marks = Vec::new();
    let mut rest = if tags.len() > PASTE_TAGS_MAX { &[][..] } else { tags.as_slice() };
    while let Some(((opening, [slash, id]), after)) = rest.split_first() {
        rest = after;
        let closing = after.iter().position(|(_, [slash, other])| *slash == "/" && other == id);
        let Some((closing, after)) = closing.filter(|_| slash.is_empty()).and_then(|at| after.get(at..)?.split_first())
        else {
            continue;
        };
        let (opening, closing) = (range_of(opening, text), range_of(closing.0, text));
        let pasted = text.get(opening.end..closing.start).unwrap_or_default();
        let pasted = pasted.strip_prefix('\n').unwrap_or(pasted);
        let pasted = range_of(pasted.strip_suffix('\n').unwrap_or(pasted), text);
        marks.extend([opening.start..pasted.start, pasted.end..closing.end]);
        rest = after;
    }
    marks
}

/// White space, and the separators that ASCII has beside it.
fn is_blank(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

pub(super) fn trim(text: &str) -> &str {
    text.trim_matches(is_blank)
}

fn trim_start(text: &str) -> &str {
    text.trim_start_matches(is_blank)
}

fn is_tag_character(character: char) -> bool {
    character.is_ascii_alphanumeric() || "-_".contains(character)
}

/// The name of the tag that `text` starts with.
fn opening_tag(text: &str) -> Option<&str> {
    let text = text.strip_prefix('<')?;
    let (name, after) = text.split_at_checked(text.find(|character| !is_tag_character(character))?)?;
    (!name.is_empty() && after.starts_with(|c: char| c == '>' || c == '/' || is_blank(c))).then_some(name)
}

/// Name and arguments of a slash command, separated by a space.
fn command(text: &str) -> Option<String> {
    // Old versions append the command's own prompt.
    let text = text.split_once("<command-contents>").map_or(text, |(text, _)| text);
    let name = ["command-name", "command-message"].into_iter().find_map(|tag| tagged(text, tag))?;
    let name = trim(name.split_once("</").map_or(name, |(name, _)| name));
    if name.is_empty() {
        return None;
    }
    Some(match tagged(text, "command-args") {
        Some(arguments) if !trim(arguments).is_empty() => format!("{name} {arguments}"),
        _ => name.to_owned(),
    })
}

/// What stands between the first `<tag>` and its end: the last `</tag>` for what a human typed may hold one, and the end
/// of the text where there is none.
fn tagged<'a>(text: &'a str, tag: &str) -> Option<&'a str> {
    let (_, after) = text.split_once(&format!("<{tag}>"))?;
    Some(after.rsplit_once(&format!("</{tag}>")).map_or(after, |(inside, _)| inside))
}

#[cfg(test)]
mod tests;
