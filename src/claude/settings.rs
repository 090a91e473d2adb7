//! Claude Code's settings, as far as they call us: its hooks found, added and taken out again.
//!
//! The file belongs to somebody else. So it is edited as a concrete syntax tree, which keeps every byte that a change
//! does not touch; what is added is indented as its surroundings are. Pure functions over text.
//!
//! ```text
//! {"hooks": {"Stop": [{"matcher": "…", "hooks": [{"type": "command", "command": "…", "timeout": 12}]}]}}
//!             event    group                      hook
//! ```
//!
//! What is added stands on lines of its own, and blank lines around it may go. Text that is
//! not strict JSON is refused, and so is a file with two `hooks` or twice the same event: which of them counts is for its
//! owner to say.

use std::fmt;

use jsonc_parser::ParseOptions;
use jsonc_parser::cst::{
    CstContainerNode, CstInputValue, CstNode, CstObject, CstObjectProp, CstRootNode, CstStringLit,
};
use serde::de::IgnoredAny;
use thiserror::Error;

/// The events that are hooked. Long known to Claude Code: a version that does not know an event by name may refuse the
/// whole file.
pub(crate) const EVENTS: [&str; 10] = [
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
pub(crate) const NEVER_HOOKED: &str = "WorktreeCreate";

/// Seconds after which Claude Code kills a hook. Ours needs milliseconds, but waits for its input until shortly before
/// that; without it the hooks at a session's end share 1.5 s.
pub(crate) const TIMEOUT_SECONDS: u64 = 12;

/// A larger file is not read: settings have some kilobytes.
pub(crate) const FILE_BYTES_MAX: u64 = 16 << 20;

/// The name of this program.
const PROGRAM: &str = "headspace-watcher";

/// What Nix calls the program itself where a wrapper has its name.
const PROGRAM_WRAPPED: &str = ".headspace-watcher-wrapped";

/// Some programs begin a file with it; it is kept.
const BYTE_ORDER_MARK: &str = "\u{feff}";

#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum SettingsError {
    #[error("it could not be read as JSON: {0}")]
    Malformed(String),
    #[error("{place} is not an {expected}")]
    Shape { place: String, expected: &'static str },
    #[error("{place} occurs twice")]
    Duplicate { place: String },
}

/// A hook that calls this program, or names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Found {
    pub event: String,
    /// As a shell takes it. Of a hook that needs no shell: its words, quoted.
    pub command: String,
    /// Whether the program itself is called, and not a script that somebody wrote around it.
    pub is_own: bool,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.event, self.command)
    }
}

/// The hooks in `text` that call this program or name it, in the order of the file. Empty text holds none.
///
/// `own` is the command that [`install`] would write: it tells the program also where its file has another name.
pub(crate) fn find(text: &str, own: &str) -> Result<Vec<Found>, SettingsError> {
    Ok(Settings::parse(text)?.calls(own)?.into_iter().map(|call| call.found).collect())
}

/// `text` with a hook at each of `events` that runs `command`: hooks that called us otherwise now run it, those that do
/// already are left as they are, missing ones are added. The very same text where nothing is to be done.
pub(crate) fn install(text: &str, command: &str, events: &[String]) -> Result<String, SettingsError> {
    let settings = Settings::parse(text)?;
    for call in settings.calls(command)?.into_iter().filter(|call| call.found.is_own) {
        if call.found.event == NEVER_HOOKED {
            call.remove();
        } else if call.found.command != command {
            call.set_command(command);
        }
    }
    let calls = settings.calls(command)?;
    for event in events {
        if !calls.iter().any(|call| call.found.event == *event) {
            settings.add(event, command)?;
        }
    }
    Ok(settings.text())
}

/// `text` without the hooks that call this program, and without what held nothing else. `own` as for [`find`].
pub(crate) fn uninstall(text: &str, own: &str) -> Result<String, SettingsError> {
    let settings = Settings::parse(text)?;
    let calls: Vec<Call> = settings.calls(own)?.into_iter().filter(|call| call.found.is_own).collect();
    if calls.is_empty() {
        return Ok(text.to_owned());
    }
    for call in calls {
        call.remove();
    }
    Ok(settings.text())
}

/// Whether all hooks are switched off.
pub(crate) fn are_off(text: &str) -> bool {
    let off = Settings::parse(text).ok().and_then(|settings| settings.object.get("disableAllHooks")?.value());
    off.and_then(|value| value.as_boolean_lit()).is_some_and(|flag| flag.value())
}

/// A word that a shell takes as it is, whatever is in it.
pub(crate) fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// The first word of a shell command, its quotes taken off.
pub(crate) fn called_program(command: &str) -> String {
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

/// A settings file.
struct Settings {
    byte_order_mark: &'static str,
    root: CstRootNode,
    object: CstObject,
}

impl Settings {
    /// Blank text is an empty object.
    fn parse(text: &str) -> Result<Settings, SettingsError> {
        let (byte_order_mark, json) = match text.strip_prefix(BYTE_ORDER_MARK) {
            Some(json) => (BYTE_ORDER_MARK, json),
            None => ("", text),
        };
        // The other parser also reads comments and trailing commas, which Claude Code does not.
        if !json.trim_ascii().is_empty() {
            serde_json::from_str::<IgnoredAny>(json).map_err(malformed)?;
        }
        let root = CstRootNode::parse(json, &ParseOptions::default()).map_err(malformed)?;
        let object = root.object_value_or_create().ok_or_else(|| shape("the file", "object"))?;
        Ok(Settings { byte_order_mark, root, object })
    }

    fn text(&self) -> String {
        format!("{}{}", self.byte_order_mark, self.root)
    }

    /// All hooks that call this program or name it.
    fn calls(&self, own: &str) -> Result<Vec<Call>, SettingsError> {
        let mut calls = Vec::new();
        let Some(hooks_member) = member(&self.object, "hooks", "\"hooks\"")? else { return Ok(calls) };
        let Some(events) = hooks_member.object_value() else { return Ok(calls) };
        for event_member in events.properties() {
            let Some(event) = event_member.decoded_name() else { continue };
            let place = format!("\"hooks\".\"{event}\"");
            member(&events, &event, &place)?;
            let Some(groups) = event_member.array_value() else { continue };
            for group in groups.elements().iter().filter_map(CstNode::as_object) {
                let Some(hooks) = member(&group, "hooks", &format!("{place}: \"hooks\""))? else { continue };
                let Some(hooks) = hooks.array_value() else { continue };
                for hook in hooks.elements().iter().filter_map(CstNode::as_object) {
                    calls.extend(Call::of(&event, hook, own));
                }
            }
        }
        Ok(calls)
    }

    /// Adds a group at `event` with the one hook that runs `command`.
    ///
    /// Without `args`, which older versions ignore: they would run the program without them. And not `async`: the hook
    /// ends before anybody notices, and what runs in the background is killed when Claude Code ends.
    fn add(&self, event: &str, command: &str) -> Result<(), SettingsError> {
        let hooks = self.object.object_value_or_create("hooks").ok_or_else(|| shape("\"hooks\"", "object"))?;
        let place = format!("\"hooks\".\"{event}\"");
        member(&hooks, event, &place)?;
        let groups = hooks.array_value_or_create(event).ok_or_else(|| shape(&place, "array"))?;
        let hook = CstInputValue::Object(vec![
            ("type".to_owned(), "command".into()),
            ("command".to_owned(), command.into()),
            ("timeout".to_owned(), TIMEOUT_SECONDS.into()),
        ]);
        groups.append(CstInputValue::Object(vec![("hooks".to_owned(), CstInputValue::Array(vec![hook]))]));
        Ok(())
    }
}

fn malformed(error: impl fmt::Display) -> SettingsError {
    SettingsError::Malformed(error.to_string())
}

fn shape(place: &str, expected: &'static str) -> SettingsError {
    SettingsError::Shape { place: place.to_owned(), expected }
}

/// The member `name` of `object`, which errors call `place`; an error where there are two.
fn member(object: &CstObject, name: &str, place: &str) -> Result<Option<CstObjectProp>, SettingsError> {
    let mut named = object.properties().into_iter().filter(|member| member.decoded_name().as_deref() == Some(name));
    let first = named.next();
    match named.next() {
        Some(_) => Err(SettingsError::Duplicate { place: place.to_owned() }),
        None => Ok(first),
    }
}

/// A hook that calls this program or names it, in the syntax tree.
struct Call {
    found: Found,
    hook: CstObject,
    command: CstStringLit,
    arguments: Option<CstObjectProp>,
}

impl Call {
    /// `None` where the hook has nothing to do with this program. `own` as for [`find`].
    fn of(event: &str, hook: CstObject, own: &str) -> Option<Call> {
        let literal = hook.get("command")?.value()?.as_string_lit()?;
        let program = literal.decoded_value().ok()?;
        let arguments = hook.get("args");
        let command = match &arguments {
            Some(arguments) => {
                let words = [program].into_iter().chain(words(arguments));
                words.map(|word| shell_word(&word)).collect::<Vec<_>>().join(" ")
            }
            None => program,
        };
        let is_hook = command.split([' ', '\'', '"']).any(|word| word == "hook");
        let is_own = command == own || (is_hook && calls_us(&command, own));
        let names_us = command.contains(PROGRAM) || configuration(own).is_some_and(|tail| command.contains(tail));
        let concerns_us = is_own || (is_hook && names_us);
        if !concerns_us {
            return None;
        }
        let found = Found { event: event.to_owned(), command, is_own };
        Some(Call { found, hook, command: literal, arguments })
    }

    /// Its matcher and its timeout stay.
    fn set_command(self, command: &str) {
        self.command.set_raw_value(serde_json::Value::from(command).to_string());
        if let Some(arguments) = self.arguments {
            arguments.remove();
        }
    }

    /// Takes the hook out, and what held nothing else. A group goes with its last hook: its matcher is about that.
    fn remove(self) {
        use CstContainerNode::{Array, Object, ObjectProp};
        let holders: Vec<CstContainerNode> = self.hook.ancestors().collect();
        self.hook.remove();
        let [Array(hooks), _, Object(group), Array(groups), ObjectProp(event), Object(events), ObjectProp(all), ..] =
            holders.as_slice()
        else {
            return;
        };
        if !hooks.elements().is_empty() {
            return;
        }
        group.clone().remove();
        if !groups.elements().is_empty() {
            return;
        }
        event.clone().remove();
        if events.properties().is_empty() {
            all.clone().remove();
        }
    }
}

/// The strings in the array that `member` holds.
fn words(member: &CstObjectProp) -> Vec<String> {
    let elements = member.array_value().map(|array| array.elements()).unwrap_or_default();
    elements.iter().filter_map(|word| word.as_string_lit()?.decoded_value().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::{items, members};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    const COMMAND: &str = "/opt/headspace-watcher --config /etc/hw.yaml hook";

    fn installed(text: &str) -> String {
        install(text, COMMAND, &EVENTS.map(str::to_owned)).unwrap()
    }

    fn stop(text: &str) -> String {
        install(text, COMMAND, &["Stop".to_owned()]).unwrap()
    }

    /// Without blanks, which an array or object may get or lose with what is added and taken out.
    fn dense(text: &str) -> String {
        text.split_ascii_whitespace().collect()
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
        let tabs = stop("{\r\n\t\"a\": 1\r\n}\r\n");
        assert!(tabs.starts_with("{\r\n\t\"a\": 1,\r\n\t\"hooks\": {\r\n\t\t\"Stop\": [\r\n\t\t\t{\r\n"), "{tabs:?}");
        assert_eq!(tabs.matches('\n').count(), tabs.matches("\r\n").count());
        // What is added stands on lines of its own also where the rest is on one line.
        let inline = r#"{"a":[1, 2],"hooks": {"Stop": [{"hooks": [{"type": "command", "command": "x"}]}]}}"#;
        let after = stop(inline);
        let start = inline.split_once("]}}").unwrap().0;
        assert!(after.starts_with(&format!("{start},\n")), "{after}");
        assert_eq!(dense(&uninstall(&after, COMMAND).unwrap()), dense(inline));
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
        assert_eq!(value["hooks"]["Stop"], json!([{"hooks": [{"type": "command", "command": COMMAND}]}]));
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
            assert_eq!(dense(&uninstall(&stop(text), COMMAND).unwrap()), dense(text));
        }
    }

    #[test]
    fn a_key_that_comes_twice_is_refused_where_it_says_what_is_called() {
        for text in [
            r#"{"hooks":{},"hooks":{"Stop":[]}}"#,
            r#"{"hooks":{"Stop":[],"Stop":[]}}"#,
            r#"{"hooks":{"Stop":[{"hooks":[],"hooks":[]}]}}"#,
        ] {
            let error = install(text, COMMAND, &["Stop".to_owned()]).unwrap_err();
            assert!(matches!(&error, SettingsError::Duplicate { .. }), "{text}: {error}");
        }
        let elsewhere = r#"{"a": 1, "a": 2}"#;
        assert!(stop(elsewhere).starts_with("{\n  \"a\": 1,\n  \"a\": 2,"), "{}", stop(elsewhere));
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
    fn odd_text_is_kept_or_refused() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(50_000), "]".repeat(50_000));
        for text in ["\u{feff}{\"a\": 0, \"a\" :1e999}", "{ }", " {\n\n} \n", "\u{feff}", "", " \n"] {
            let after = installed(text);
            assert_eq!(find(&after, COMMAND).unwrap().len(), EVENTS.len(), "{text}");
            assert_eq!(installed(&after), after, "{text}");
            let start = dense(text.trim_end().trim_end_matches(['}', '{']));
            assert!(dense(&after).starts_with(&start), "{after:?} does not begin as {text:?}");
        }
        for text in ["{\"a\": \"\\ud83d\"}", "{\"\\ud800\":{}}", &deep] {
            assert!(matches!(find(text, COMMAND), Err(SettingsError::Malformed(_))), "{}", text.len());
        }
    }

    /// Blanks as people and programs leave them.
    fn blanks() -> impl Strategy<Value = String> {
        prop::sample::select(vec!["", "", " ", "  ", "\n", "\n  ", "\r\n\t", "\n\n    ", " \t"]).prop_map(str::to_owned)
    }

    fn literal() -> impl Strategy<Value = String> {
        let odd =
            ["\"\\ud83d\\ude00\"", "\"\\\\\\\"\"", "1e999", "-0.10", "true", "null", "\"headspace-watcher\"", "\"ä\""];
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

    fn has_duplicates(text: &str) -> bool {
        matches!(find(text, COMMAND), Err(SettingsError::Duplicate { .. }))
    }

    /// Settings with other people's hooks.
    fn settings() -> impl Strategy<Value = String> {
        let hook = object(
            (prop::sample::select(vec!["type".to_owned(), "command".to_owned(), "timeout".to_owned()]), literal()),
            1,
        );
        let group = object(
            prop_oneof![
                ("matcher".prop_map(|key: String| key), literal()),
                ("hooks".prop_map(|key: String| key), array(hook, 1))
            ],
            1,
        );
        let event = prop_oneof!["Stop", "PreToolUse", "WorktreeCreate", "Other"];
        let hooks = object((event, array(group, 1)), 1);
        let member = prop_oneof![
            1 => ("hooks".prop_map(|key: String| key), hooks),
            2 => ("[a-c]{1,2}", any_value()),
        ];
        (prop::sample::select(vec!["", "\u{feff}"]), blanks(), object(member, 1), blanks())
            .prop_map(|(mark, before, object, after)| format!("{mark}{before}{object}{after}"))
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, max_shrink_iters: 300, ..ProptestConfig::with_cases(96) })]

        #[test]
        fn installing_adds_bytes_and_changes_none(text in settings()) {
            prop_assume!(!has_duplicates(&text));
            let after = installed(&text);
            for event in EVENTS {
                prop_assert_eq!(find(&after, COMMAND).unwrap().iter().filter(|found| found.event == event).count(), 1, "{}", event);
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
        fn what_was_installed_comes_out_again_with_nothing_else(text in settings()) {
            prop_assume!(!has_duplicates(&text));
            let after = uninstall(&installed(&text), COMMAND).unwrap();
            prop_assert_eq!(dense(&after), dense(&text));
        }

        #[test]
        fn nothing_panics_on_what_is_no_settings(text in "[{}\\[\\]\",: hoks\u{feff}\n]{0,40}") {
            if let Ok(after) = install(&text, COMMAND, &["Stop".to_owned()]) {
                prop_assert_eq!(uninstall(&after, COMMAND).map(|text| find(&text, COMMAND).unwrap().len()), Ok(0));
            }
        }
    }
}
