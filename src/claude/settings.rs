//! Claude Code's settings, as far as they call us: its hooks found, added and taken out again in the text itself.
//!
//! The file is other people's. So nothing is parsed and written anew: every change is a replacement of the smallest range
//! of the text that does it, in the style that stands there (indentation, line ends, one line or many), and all other
//! bytes stay, also keys that come twice, odd blanks and strings that can't be decoded. Pure functions over text.
//!
//! ```text
//! {"hooks": {"Stop": [{"matcher": "…", "hooks": [{"type": "command", "command": "…", "timeout": 12}]}]}}
//!   member    event    group                      hook
//! ```
//!
//! Of a key that comes twice the last one counts, as for Claude Code.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};
use thiserror::Error;

use crate::json::{items, members, string};

/// The events that are hooked. Long known to Claude Code: a version that does not know an event by name may refuse the
/// whole file.
pub const EVENTS: [&str; 10] = [
    "SessionStart",
    "UserPromptSubmit",
    "PreToolUse",
    "PermissionRequest",
    "PostToolUse",
    "Notification",
    "SubagentStop",
    "PreCompact",
    "Stop",
    "SessionEnd",
];

/// Whatever runs at it must print a path, or no worktree is made.
pub const NEVER_HOOKED: &str = "WorktreeCreate";

/// Seconds after which Claude Code kills a hook. Ours needs milliseconds, but waits for its input until shortly before
/// that; without it the hooks at a session's end share 1.5 s.
pub const TIMEOUT_SECONDS: u64 = 12;

/// A larger file is not read: settings have some kilobytes.
pub const FILE_BYTES_MAX: u64 = 16 << 20;

/// The name of this program.
const PROGRAM: &str = "headspace-watcher";

/// What Nix calls the program itself where a wrapper has its name.
const PROGRAM_WRAPPED: &str = ".headspace-watcher-wrapped";

/// Some programs begin a file with it; it is kept.
const BYTE_ORDER_MARK: char = '\u{feff}';

#[derive(Debug, Error, PartialEq, Eq)]
pub enum SettingsError {
    #[error("it is no JSON object: {0}")]
    NoObject(String),
    #[error("{place} is no {expected}")]
    Shape { place: String, expected: &'static str },
}

/// A hook that calls this program, or names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    pub event: String,
    /// As a shell takes it. Of a hook that needs no shell: its words, quoted.
    pub command: String,
    /// Whether Claude Code sees it: no later key of the same name hides it.
    pub is_seen: bool,
    /// Whether the program itself is called, and not a script that somebody wrote around it.
    pub is_own: bool,
    place: Place,
}

/// Where a hook stands: ranges of the text.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Place {
    hook: Range<usize>,
    /// The literal of its command, where that is all that says what is called.
    command: Option<Range<usize>>,
    /// What holds it, inwards, each with its place among all that it holds: the whole file, all hooks, an event, a group,
    /// its hooks.
    holders: [Holder; 5],
}

/// An array or object and one of the things in it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Holder {
    whole: Range<usize>,
    /// The values in it.
    values: Vec<Range<usize>>,
    index: usize,
    /// Whether it has a key that is there only once.
    is_single: bool,
    /// Whether no later key is the same.
    is_last: bool,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.event, self.command)
    }
}

/// The hooks in `text` that call this program or name it, in the order of the file. Empty text holds none.
///
/// `own` is the command that [`install`] would write: it tells the program also where its file has another name.
pub fn find(text: &str, own: &str) -> Result<Vec<Found>, SettingsError> {
    let mut found = Vec::new();
    let text = &Text::of(text);
    if text.is_blank() {
        return Ok(found);
    }
    let root = text.object()?;
    for (hooks_index, hooks) in root.named("hooks") {
        let Ok(events) = text.members(hooks.clone()) else { continue };
        for (event_index, (event, groups)) in events.members.iter().enumerate() {
            let Ok(groups) = text.items(groups.clone()) else { continue };
            for (group_index, group) in groups.values.iter().enumerate() {
                let Ok(group) = text.members(group.clone()) else { continue };
                for (list_index, hooks) in group.named("hooks") {
                    let Ok(hooks) = text.items(hooks.clone()) else { continue };
                    for (hook_index, hook) in hooks.values.iter().enumerate() {
                        let holders = [
                            root.holding(hooks_index),
                            events.holding(event_index),
                            groups.holding(group_index),
                            group.holding(list_index),
                            hooks.holding(hook_index),
                        ];
                        found.extend(text.call(event, hook.clone(), holders, own));
                    }
                }
            }
        }
    }
    Ok(found)
}

/// `text` with a hook at each of `events` that runs `command`: what called us otherwise now runs it, what is there
/// already is left as it is, what is missing is added. The very same text where nothing is to be done.
pub fn install(text: &str, command: &str, events: &[String]) -> Result<String, SettingsError> {
    let mut text = text.to_owned();
    if Text::of(&text).is_blank() {
        text.insert_str(Text::of(&text).end(), "{}");
    }
    // Each change moves what follows it: so they are made one by one.
    while let Some(misplaced) =
        find(&text, command)?.into_iter().find(|found| found.event == NEVER_HOOKED && found.is_own)
    {
        text = without(&text, &misplaced);
    }
    while let Some(other) = find(&text, command)?.into_iter().find(|found| found.is_own && found.command != command) {
        match other.place.command {
            Some(literal) => text.replace_range(literal, &compact(&command)),
            None => {
                let [hook] = Group::of(command).hooks;
                text.replace_range(other.place.hook, &compact(&hook));
            }
        }
    }
    for event in events {
        if !find(&text, command)?.iter().any(|found| found.event == *event && found.is_seen) {
            text = with(&text, event, command)?;
        }
    }
    Ok(text)
}

/// `text` without the hooks that call this program, and without what held nothing else. `own` as for [`find`].
pub fn uninstall(text: &str, own: &str) -> Result<String, SettingsError> {
    let mut text = text.to_owned();
    while let Some(found) = find(&text, own)?.into_iter().find(|found| found.is_own) {
        text = without(&text, &found);
    }
    Ok(text)
}

/// Whether all hooks are switched off.
pub fn are_off(text: &str) -> bool {
    let text = Text::of(text);
    let off = text.object().ok().and_then(|root| root.named("disableAllHooks").last().map(|(_, value)| value.clone()));
    off.is_some_and(|value| text.part(&value) == "true")
}

/// Hooks at one event, as the file has them.
#[derive(Serialize, Debug)]
pub struct Group<'a> {
    hooks: [Hook<'a>; 1],
}

/// Without `args`, which older versions pass over: they would run the program without them. And not `async`: it is over
/// before anybody notices, and what runs behind Claude Code's back is killed when that ends.
#[derive(Serialize, Debug)]
struct Hook<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    command: &'a str,
    timeout: u64,
}

impl<'a> Group<'a> {
    /// What [`install`] adds for one event.
    pub fn of(command: &'a str) -> Group<'a> {
        Group { hooks: [Hook { kind: "command", command, timeout: TIMEOUT_SECONDS }] }
    }
}

/// A word that a shell takes as it is, whatever is in it.
pub fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// The first word of a shell command, its quotes taken off.
pub fn called_program(command: &str) -> String {
    let mut word = String::new();
    let mut quote = None;
    let mut characters = command.trim_start().chars();
    while let Some(character) = characters.next() {
        match (quote, character) {
            (Some(open), _) if character == open => quote = None,
            (Some('\''), _) => word.push(character),
            (None, '"' | '\'') => quote = Some(character),
            (_, '\\') => word.extend(characters.next()),
            (None, _) if character.is_whitespace() => break,
            _ => word.push(character),
        }
    }
    word
}

/// Whether `command` runs this program: a file with one of its usual names, or with the very arguments that are in `own`
/// behind its file. Another program's file may have the same name as a renamed one of ours.
fn calls_us(command: &str, own: &str) -> bool {
    let called = called_program(command);
    let name = called.rsplit('/').next().unwrap_or_default();
    name == PROGRAM
        || name == PROGRAM_WRAPPED
        || configuration(own).is_some_and(|tail| command == format!("{}{tail}", shell_word(&called)))
}

/// What stands in a command of ours from `--config` on.
fn configuration(own: &str) -> Option<&str> {
    own.find(" --config ").and_then(|start| own.get(start..))
}

/// On one line.
fn compact(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain values are written to memory without fail")
}

/// `text` with one more group at `event`.
fn with(text: &str, event: &str, command: &str) -> Result<String, SettingsError> {
    let view = Text::of(text);
    let root = view.object()?;
    let group = Group::of(command);
    let Some((_, hooks)) = root.named("hooks").last() else {
        return Ok(view.adding(&root, Some("hooks"), &BTreeMap::from([(event, [group])])));
    };
    let shape = |place: String, expected| SettingsError::Shape { place, expected };
    let events = view.members(hooks.clone()).map_err(|_| shape("\"hooks\"".to_owned(), "object"))?;
    let Some((_, groups)) = events.named(event).last() else {
        return Ok(view.adding(&events, Some(event), &[group]));
    };
    let groups = view.items(groups.clone()).map_err(|_| shape(format!("\"hooks\".\"{event}\""), "array"))?;
    Ok(view.adding(&groups, None, &group))
}

/// `text` without one hook, and without what held nothing else: its group, its event, all hooks.
fn without(text: &str, found: &Found) -> String {
    let [root, events, groups, group, hooks] = &found.place.holders;
    let is_alone = |holder: &Holder| holder.values.len() == 1;
    let holder = match () {
        // What else a group says is about its hooks.
        () if !(is_alone(hooks) && group.is_single) => hooks,
        () if !is_alone(groups) => groups,
        () if !is_alone(events) => events,
        () => root,
    };
    let mut text = text.to_owned();
    if let Some(range) = holder.extent(&text) {
        text.replace_range(range, "");
    }
    text
}

impl Holder {
    /// What is to be cut out so that the value at `index` is gone, and its key, and one comma.
    fn extent(&self, text: &str) -> Option<Range<usize>> {
        let value = self.values.get(self.index)?;
        if let Some(before) = self.index.checked_sub(1) {
            return Some(self.values.get(before)?.end..value.end);
        }
        let inside = self.whole.start + 1..self.whole.end - 1;
        if self.values.len() == 1 {
            return Some(inside);
        }
        let blanks = |from: usize| {
            let rest = text.get(from..inside.end).unwrap_or_default();
            rest.len() - rest.trim_ascii_start().len()
        };
        let start = inside.start + blanks(inside.start);
        let after_comma = value.end + blanks(value.end) + 1;
        Some(start..after_comma + blanks(after_comma))
    }
}

/// An array or object, its parts as ranges of the text.
struct Parts {
    whole: Range<usize>,
    /// Decoded keys and values; of an object.
    members: Vec<(String, Range<usize>)>,
    values: Vec<Range<usize>>,
}

impl Parts {
    fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (usize, &'a Range<usize>)> {
        let members = self.members.iter().enumerate();
        members.filter(move |(_, (key, _))| key == name).map(|(index, (_, value))| (index, value))
    }

    fn holding(&self, index: usize) -> Holder {
        let same = |members: &[(String, Range<usize>)]| {
            let key = self.members.get(index).map(|(key, _)| key);
            members.iter().filter(|(other, _)| Some(other) == key).count()
        };
        Holder {
            whole: self.whole.clone(),
            values: self.values.clone(),
            index,
            is_single: same(&self.members) == 1,
            is_last: same(self.members.get(index + 1..).unwrap_or_default()) == 0,
        }
    }
}

/// The text of a settings file. Its parts are ranges of the whole, so that they can be replaced there.
struct Text<'a> {
    text: &'a str,
}

impl<'a> Text<'a> {
    fn of(text: &'a str) -> Text<'a> {
        Text { text }
    }

    /// Where what is not blank begins.
    fn start(&self) -> usize {
        let text = self.text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(self.text);
        self.text.len() - text.trim_ascii_start().len()
    }

    fn end(&self) -> usize {
        self.text.trim_ascii_end().len()
    }

    fn is_blank(&self) -> bool {
        self.start() >= self.end()
    }

    fn part(&self, range: &Range<usize>) -> &'a str {
        self.text.get(range.clone()).unwrap_or_default()
    }

    /// The range of a part of this text.
    fn range_of(&self, part: &str) -> Range<usize> {
        let start = part.as_ptr() as usize - self.text.as_ptr() as usize;
        start..start + part.len()
    }

    /// The whole as an object.
    fn object(&self) -> Result<Parts, SettingsError> {
        self.members(self.start()..self.end()).map_err(|error| SettingsError::NoObject(error.to_string()))
    }

    fn members(&self, whole: Range<usize>) -> Result<Parts, serde_json::Error> {
        let mut found = Vec::new();
        members(self.part(&whole), |key, value| found.push((key.to_owned(), self.range_of(value))))?;
        let values = found.iter().map(|(_, value)| value.clone()).collect();
        Ok(Parts { whole, members: found, values })
    }

    fn items(&self, whole: Range<usize>) -> Result<Parts, serde_json::Error> {
        let mut values = Vec::new();
        items(self.part(&whole), |item| values.push(self.range_of(item)))?;
        Ok(Parts { whole, members: Vec::new(), values })
    }

    /// The hook, where it calls this program as a hook, or names it. `own` as for [`find`].
    fn call(&self, event: &str, hook: Range<usize>, holders: [Holder; 5], own: &str) -> Option<Found> {
        let members = self.members(hook.clone()).ok()?;
        let last = |name| members.named(name).last().map(|(_, value)| value.clone());
        let literal = last("command")?;
        let program = string(self.part(&literal))?.text.into_owned();
        let arguments = last("args").map(|arguments| self.words(&arguments));
        let command = match &arguments {
            Some(words) => {
                [&program].into_iter().chain(words).map(|word| shell_word(word)).collect::<Vec<_>>().join(" ")
            }
            None => program,
        };
        let is_hook = command.split([' ', '\'', '"']).any(|word| word == "hook");
        let is_own = command == own || (is_hook && calls_us(&command, own));
        let names_us = command.contains(PROGRAM) || configuration(own).is_some_and(|tail| command.contains(tail));
        if !(is_own || is_hook && names_us) {
            return None;
        }
        let is_seen = holders.iter().all(|holder| holder.is_last);
        let place = Place { hook, command: arguments.is_none().then_some(literal), holders };
        Some(Found { event: event.to_owned(), command, is_seen, is_own, place })
    }

    fn words(&self, array: &Range<usize>) -> Vec<String> {
        let words = self.items(array.clone()).map(|items| items.values).unwrap_or_default();
        words.iter().filter_map(|word| string(self.part(word))).map(|word| word.text.into_owned()).collect()
    }

    /// The text with one more value at the end of `holder`, under `key` in an object, in the style of what is there.
    fn adding(&self, holder: &Parts, key: Option<&str>, value: &impl Serialize) -> String {
        let mut text = self.text.to_owned();
        match holder.values.last() {
            Some(last) => {
                let lead = self.lead(holder);
                text.insert_str(last.end, &format!(",{lead}{}", self.rendered(key, value, lead)));
            }
            None => {
                let (open, close) = (holder.whole.start + 1, holder.whole.end - 1);
                let added = if self.is_one_line() {
                    self.rendered(key, value, "")
                } else {
                    let line = self.part(&(0..holder.whole.start));
                    let line = line.rsplit('\n').next().unwrap_or_default().trim_start_matches(BYTE_ORDER_MARK);
                    let indent = line.get(..line.len() - line.trim_ascii_start().len()).unwrap_or_default();
                    let (newline, unit) = (self.newline(), self.indentation());
                    let lead = format!("{newline}{indent}{unit}");
                    format!("{lead}{}{newline}{indent}", self.rendered(key, value, &lead))
                };
                text.replace_range(open..close, &added);
            }
        }
        text
    }

    /// `key` and `value` as they stand after `lead`: on lines of their own where that ends a line.
    fn rendered(&self, key: Option<&str>, value: &impl Serialize, lead: &str) -> String {
        let key = key.map(|key| compact(&key));
        let Some((_, indent)) = lead.rsplit_once('\n') else {
            let colon = if self.text.contains("\": ") { ": " } else { ":" };
            return key.map(|key| key + colon).unwrap_or_default() + &compact(value);
        };
        let mut pretty = Vec::new();
        let formatter = PrettyFormatter::with_indent(self.indentation().as_bytes());
        value
            .serialize(&mut Serializer::with_formatter(&mut pretty, formatter))
            .expect("a value is written to memory without fail");
        let pretty = String::from_utf8_lossy(&pretty).replace('\n', &format!("{}{indent}", self.newline()));
        key.map(|key| key + ": ").unwrap_or_default() + &pretty
    }

    /// The blanks before the last thing in `holder`.
    fn lead(&self, holder: &Parts) -> &'a str {
        let before = holder.values.len().checked_sub(2).and_then(|index| holder.values.get(index));
        let after = before.map_or(holder.whole.start + 1, |value| value.end);
        let rest = self.part(&(after..holder.whole.end));
        // Past the comma, where there is one.
        let rest = if before.is_some() { rest.trim_ascii_start().get(1..).unwrap_or_default() } else { rest };
        rest.get(..rest.len() - rest.trim_ascii_start().len()).unwrap_or_default()
    }

    /// Whether all of a file that holds something stands on one line.
    fn is_one_line(&self) -> bool {
        let text = self.part(&(self.start()..self.end()));
        !text.contains('\n') && text.len() > "{ }".len()
    }

    fn newline(&self) -> &'static str {
        if self.text.contains("\r\n") { "\r\n" } else { "\n" }
    }

    /// One level of indentation: as the first thing in the file is indented.
    fn indentation(&self) -> &'a str {
        let inside = self.text.get(self.start() + 1..).unwrap_or_default();
        let blanks = inside.get(..inside.len() - inside.trim_ascii_start().len()).unwrap_or_default();
        let indent = blanks.rsplit_once('\n').map(|(_, indent)| indent).unwrap_or_default();
        if indent.is_empty() { "  " } else { indent }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    const COMMAND: &str = "/opt/headspace-watcher --config /etc/hw.yaml hook";

    fn installed(text: &str) -> String {
        install(text, COMMAND, &EVENTS.map(str::to_owned)).unwrap()
    }

    fn stop(text: &str) -> String {
        install(text, COMMAND, &["Stop".to_owned()]).unwrap()
    }

    /// Keys and values in their order, also those that come twice: what is there whatever stands between.
    fn tokens(raw: &str) -> Vec<String> {
        let mut tokens = Vec::new();
        let mut key_and_value = |key: &str, value: &str| tokens.push((key.to_owned(), value.to_owned()));
        if members(raw, &mut key_and_value).is_err() {
            items(raw, |item| key_and_value("", item)).unwrap();
        }
        tokens.into_iter().map(|(key, value)| format!("{key}={value}")).collect()
    }

    #[test]
    fn a_new_file_gets_every_event_and_nothing_else() {
        let value: Value = serde_json::from_str(&installed("{}\n")).unwrap();
        let events: Vec<&String> = value["hooks"].as_object().unwrap().keys().collect();
        assert_eq!(events.len(), EVENTS.len());
        for event in EVENTS {
            assert_eq!(
                value["hooks"][event],
                json!([{"hooks": [{"type": "command", "command": COMMAND, "timeout": 12}]}]),
                "{event}"
            );
        }
        assert_eq!(value.as_object().unwrap().len(), 1);
        assert!(!EVENTS.contains(&NEVER_HOOKED));
    }

    #[test]
    fn what_is_added_stands_there_as_its_neighbours_do() {
        let four = "{\n    \"model\": \"opus\"\n}\n";
        assert_eq!(
            stop(four),
            "{\n    \"model\": \"opus\",\n    \"hooks\": {\n        \"Stop\": [\n            {\n                \"hooks\": [\n                    {\n                        \"type\": \"command\",\n                        \"command\": \"/opt/headspace-watcher --config /etc/hw.yaml hook\",\n                        \"timeout\": 12\n                    }\n                ]\n            }\n        ]\n    }\n}\n"
        );
        let hook = r#"{"type":"command","command":"/opt/headspace-watcher --config /etc/hw.yaml hook","timeout":12}"#;
        assert_eq!(stop(r#"{"a":1}"#), format!(r#"{{"a":1,"hooks":{{"Stop":[{{"hooks":[{hook}]}}]}}}}"#));
        assert_eq!(
            stop("{\"a\": 1, \"b\": 2}\n"),
            format!("{{\"a\": 1, \"b\": 2, \"hooks\": {{\"Stop\":[{{\"hooks\":[{hook}]}}]}}}}\n")
        );
        let tabs = stop("{\r\n\t\"a\": 1\r\n}\r\n");
        assert!(tabs.starts_with("{\r\n\t\"a\": 1,\r\n\t\"hooks\": {\r\n\t\t\"Stop\": [\r\n\t\t\t{\r\n"), "{tabs:?}");
        assert_eq!(tabs.matches('\n').count(), tabs.matches("\r\n").count());
        // An event with a hook of somebody else's on one line.
        let inline =
            "{\n  \"hooks\": {\n    \"Stop\": [{\"hooks\": [{\"type\": \"command\", \"command\": \"x\"}]}]\n  }\n}";
        let expected = format!(
            "{{\n  \"hooks\": {{\n    \"Stop\": [{{\"hooks\": [{{\"type\": \"command\", \"command\": \"x\"}}]}},{{\"hooks\":[{hook}]}}]\n  }}\n}}"
        );
        assert_eq!(stop(inline), expected);
    }

    #[test]
    fn a_call_of_a_program_elsewhere_is_mended_where_it_stands() {
        let before = r#"{"hooks": {"Stop": [{"matcher": "x", "hooks": [{"command": "'/old place/headspace-watcher' hook", "timeout": 3}]}]}}"#;
        let after = r#"{"hooks": {"Stop": [{"matcher": "x", "hooks": [{"command": "/opt/headspace-watcher --config /etc/hw.yaml hook", "timeout": 3}]}]}}"#;
        assert_eq!(stop(before), after);
        let without_shell =
            r#"{"hooks":{"Stop":[{"hooks":[{"type":"command","command":"/old/headspace-watcher","args":["hook"]}]}]}}"#;
        assert_eq!(find(without_shell, COMMAND).unwrap()[0].command, "/old/headspace-watcher hook");
        let value: Value = serde_json::from_str(&stop(without_shell)).unwrap();
        assert_eq!(value["hooks"]["Stop"], json!([Group::of(COMMAND)]));
    }

    #[test]
    fn a_script_around_it_and_other_programs_are_left_alone() {
        for text in [
            r#"{"hooks":{"Stop":[{"hooks":[{"type":"command","command":"cd /x && ./headspace-watcher hook"}]}]}}"#,
            r#"{"hooks":{"Stop":[{"hooks":[{"type":"command","command":"env A=b headspace-watcher hook"}]}]}}"#,
        ] {
            assert_eq!(stop(text), text, "a second call would be a second event");
            assert_eq!(uninstall(text, COMMAND).unwrap(), text);
        }
        for text in [
            r#"{"hooks":{"Stop":[{"hooks":[{"type":"command","command":"headspace-watcher status"}]}]}}"#,
            r#"{"hooks":{"Stop":[{"hooks":[{"type":"command","command":"/x/other hook"}]}]},"note":"headspace-watcher hook"}"#,
        ] {
            assert_eq!(find(text, COMMAND).unwrap(), []);
            assert_eq!(uninstall(&stop(text), COMMAND).unwrap(), text);
        }
    }

    #[test]
    fn the_last_of_keys_that_come_twice_counts_as_for_claude_code() {
        let call = format!(r#"[{{"hooks":[{{"command":"{COMMAND}"}}]}}]"#);
        let hidden = format!(r#"{{"hooks":{{"Stop":{call}}},"hooks":{{"Stop":[]}}}}"#);
        assert!(!find(&hidden, COMMAND).unwrap()[0].is_seen);
        let text = stop(&hidden);
        assert_eq!(find(&text, COMMAND).unwrap().iter().filter(|found| found.is_seen).count(), 1);
        assert_eq!(stop(&text), text);
        assert_eq!(find(&uninstall(&text, COMMAND).unwrap(), COMMAND).unwrap(), []);
    }

    #[test]
    fn what_runs_where_a_worktree_is_made_is_taken_out() {
        let text = format!(r#"{{"hooks":{{"WorktreeCreate":[{{"hooks":[{{"command":"{COMMAND}"}}]}}],"Stop":[]}}}}"#);
        assert!(!installed(&text).contains("WorktreeCreate"));
    }

    #[test]
    fn what_cannot_be_understood_is_refused() {
        for text in [
            "{",
            "[]",
            "null",
            "{\"a\":1,}",
            "{} {}",
            "// no\n{}",
            "{\"hooks\":[]}",
            "{\"hooks\":{\"Stop\":{}}}",
            "{\"hooks\":null}",
        ] {
            assert!(install(text, COMMAND, &["Stop".to_owned()]).is_err(), "{text}");
        }
    }

    #[test]
    fn any_path_comes_through_a_shell_as_it_is() {
        for word in ["/a/b", "", "/a b/c", "/it's/x", "$HOME`\"\\x", "ä", "*"] {
            let shell =
                std::process::Command::new("sh").args(["-c", &format!("printf %s {}", shell_word(word))]).output();
            assert_eq!(String::from_utf8(shell.unwrap().stdout).unwrap(), word);
            assert_eq!(called_program(&format!(" {} hook", shell_word(word))), word);
        }
        assert_eq!(called_program("\"/a \\\"b/headspace-watcher\" hook"), "/a \"b/headspace-watcher");
    }

    #[test]
    fn odd_text_is_no_obstacle_and_stays() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(50_000), "]".repeat(50_000));
        let odd = [
            "\u{feff}{\"a\": \"\\ud83d\", \"a\" :1e999}",
            "{ }",
            " {\n\n} \n",
            "\u{feff}",
            "",
            " \n",
            &deep,
            "{\"\\ud800\":{}}",
        ];
        for text in odd {
            let after = installed(text);
            assert_eq!(find(&after, COMMAND).unwrap().len(), EVENTS.len(), "{text}");
            assert_eq!(installed(&after), after, "{text}");
            let start = text.trim_end().trim_end_matches(['}', '{']).trim_end();
            assert!(after.starts_with(start), "{after:?} does not begin as {text:?}");
        }
    }

    /// Blanks as people and programs leave them.
    fn blanks() -> impl Strategy<Value = String> {
        prop::sample::select(vec!["", "", " ", "  ", "\n", "\n  ", "\r\n\t", "\n\n    ", " \t"]).prop_map(str::to_owned)
    }

    fn literal() -> impl Strategy<Value = String> {
        let odd = ["\"\\ud83d\"", "\"\\\\\\\"\"", "1e999", "-0.10", "true", "null", "\"headspace-watcher\"", "\"ä\""];
        prop_oneof![
            prop::sample::select(odd.map(str::to_owned).to_vec()),
            ".{0,4}".prop_map(|text| json!(text).to_string())
        ]
    }

    fn array(item: impl Strategy<Value = String>, least: usize) -> impl Strategy<Value = String> {
        prop::collection::vec((blanks(), item, blanks()), least..4).prop_flat_map(|items| {
            let inside: Vec<String> =
                items.iter().map(|(before, item, after)| format!("{before}{item}{after}")).collect();
            blanks().prop_map(
                move |empty| if inside.is_empty() { format!("[{empty}]") } else { format!("[{}]", inside.join(",")) },
            )
        })
    }

    fn object(member: impl Strategy<Value = (String, String)>, least: usize) -> impl Strategy<Value = String> {
        prop::collection::vec((blanks(), member, blanks(), blanks(), blanks()), least..5).prop_flat_map(|members| {
            let inside: Vec<String> = members
                .iter()
                .map(|(a, (key, value), b, c, d)| format!("{a}{}{b}:{c}{value}{d}", json!(key)))
                .collect();
            blanks().prop_map(move |empty| {
                if inside.is_empty() { format!("{{{empty}}}") } else { format!("{{{}}}", inside.join(",")) }
            })
        })
    }

    fn any_value() -> impl Strategy<Value = String> {
        literal()
            .prop_recursive(3, 12, 4, |inner| prop_oneof![array(inner.clone(), 0), object(("[a-c]{0,2}", inner), 0)])
    }

    /// Settings with other people's hooks. `least`: things in each array and object.
    fn settings(least: usize) -> impl Strategy<Value = String> {
        let hook = object(
            (prop::sample::select(vec!["type".to_owned(), "command".to_owned(), "timeout".to_owned()]), literal()),
            1,
        );
        let group = object(
            prop_oneof![
                ("matcher".prop_map(|key: String| key), literal()),
                ("hooks".prop_map(|key: String| key), array(hook, least))
            ],
            1,
        );
        let event = prop_oneof!["Stop", "PreToolUse", "WorktreeCreate", "Other"];
        let hooks = object((event, array(group, least)), least);
        let member = prop_oneof![
            1 => ("hooks".prop_map(|key: String| key), hooks),
            2 => ("[a-c]{1,2}", any_value()),
        ];
        (prop::sample::select(vec!["", "\u{feff}"]), blanks(), object(member, least), blanks())
            .prop_map(|(mark, before, object, after)| format!("{mark}{before}{object}{after}"))
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, max_shrink_iters: 300, ..ProptestConfig::with_cases(96) })]

        #[test]
        fn installing_adds_bytes_and_changes_none(text in settings(0)) {
            let after = installed(&text);
            let seen: Vec<String> = find(&after, COMMAND).unwrap().into_iter().filter(|found| found.is_seen).map(|found| found.event).collect();
            for event in EVENTS {
                prop_assert_eq!(seen.iter().filter(|seen| *seen == event).count(), 1, "{}", event);
            }
            prop_assert_eq!(&installed(&after), &after, "a second time changes nothing");
            // All that stood there stands there in its order; blanks in what was empty may be gone.
            let mut rest = after.as_bytes().iter();
            for byte in text.bytes().filter(|byte| !byte.is_ascii_whitespace()) {
                prop_assert!(rest.any(|other| *other == byte), "{:?} lost something in {:?}", text, after);
            }
            let others = |text: &str| -> Vec<String> {
                tokens(text.trim_start_matches(BYTE_ORDER_MARK)).into_iter().filter(|token| !token.starts_with("hooks=")).collect()
            };
            prop_assert_eq!(others(&after), others(&text));
        }

        #[test]
        fn what_was_installed_comes_out_again_byte_for_byte(text in settings(1)) {
            prop_assert_eq!(uninstall(&installed(&text), COMMAND).unwrap(), text);
        }

        #[test]
        fn nothing_panics_on_what_is_no_settings(text in "[{}\\[\\]\",: hoks\u{feff}\n]{0,40}") {
            if let Ok(after) = install(&text, COMMAND, &["Stop".to_owned()]) {
                prop_assert_eq!(uninstall(&after, COMMAND).map(|text| find(&text, COMMAND).unwrap().len()), Ok(0));
            }
        }
    }
}
