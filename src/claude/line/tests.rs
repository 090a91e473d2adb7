//! Every rule with a small made-up line; a corpus, with transcripts of real sessions beside the checkout, for the whole.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::json;

use super::super::copies::Look;
use super::super::repair::{Segment, salvage};
use super::*;
use crate::session::{SessionFacts, session_registered_event_id};

const SESSION: Uuid = Uuid::from_u128(0x5f00_0000_0000_4000_8000_0000_0000_0001);
const OTHER: Uuid = Uuid::from_u128(0x5f00_0000_0000_4000_8000_0000_0000_0002);
const MAIN: TranscriptKind = TranscriptKind::Main { session: SESSION };

/// An envelope line of type `kind` with `more` fields over the usual ones.
fn envelope(kind: &str, more: Value) -> Value {
    let mut line = json!({
        "parentUuid": null, "isSidechain": false, "userType": "external", "cwd": "/home/u/app",
        "sessionId": SESSION.to_string(), "version": "2.1.219", "gitBranch": "main", "type": kind,
        "uuid": "b1000000-0000-4000-8000-000000000001", "timestamp": "2026-07-28T18:20:34.312Z",
    });
    for (key, value) in more.as_object().unwrap() {
        line[key] = value.clone();
    }
    line
}

fn user(content: impl Into<Value>) -> Value {
    envelope("user", json!({"message": {"role": "user", "content": content.into()}}))
}

fn assistant(content: impl Into<Value>) -> Value {
    let message = json!({"model": "claude-opus-4-8", "id": "msg_01X", "type": "message", "role": "assistant",
        "content": content.into(), "stop_reason": "end_turn"});
    envelope("assistant", json!({"message": message}))
}

fn queued(attachment: Value) -> Value {
    let mut line = envelope("attachment", json!({"attachment": {"type": "queued_command", "commandMode": "prompt"}}));
    for (key, value) in attachment.as_object().unwrap() {
        line["attachment"][key] = value.clone();
    }
    line
}

fn with(mut line: Value, key: &str, value: impl Into<Value>) -> Value {
    line[key] = value.into();
    line
}

fn read(line: &Value) -> LineMeaning {
    read_line(line.to_string().as_bytes(), &MAIN).unwrap()
}

fn turn(line: &Value) -> Option<Turn> {
    read(line).turn
}

/// Kind and text of the turn on `line`.
fn said(line: &Value) -> Option<(Option<TurnKind>, String)> {
    turn(line).map(|turn| (turn.kind, turn.text))
}

fn prompt(text: &str) -> Option<(Option<TurnKind>, String)> {
    Some((Some(TurnKind::Prompt), text.to_owned()))
}

mod places {
    use super::*;

    fn kind(path: &str) -> Option<TranscriptKind> {
        classify(Path::new(path))
    }

    #[test]
    fn a_session_is_named_by_the_stem_of_its_file() {
        assert_eq!(kind(&format!("-home-u-app/{SESSION}.jsonl")), Some(MAIN));
    }

    #[test]
    fn sub_agents_lie_flat_or_below_their_session() {
        for path in [
            "-p/agent-41b9470d.jsonl".to_owned(),
            format!("-p/{SESSION}/subagents/agent-a2018e5.jsonl"),
            format!("-p/{SESSION}/subagents/agent-aprompt_suggestion-05a4c2.jsonl"),
            format!("-p/{SESSION}/subagents/workflows/run1/agent-a1.jsonl"),
        ] {
            assert_eq!(kind(&path), Some(TranscriptKind::SubAgent), "{path}");
        }
    }

    #[test]
    fn everything_else_is_no_transcript() {
        for path in [
            String::new(),
            format!("{SESSION}.jsonl"),
            format!("-p/{SESSION}"),
            format!("-p/{SESSION}.json"),
            format!("-p/{SESSION}.jsonl.orphaned-1"),
            format!("-p/{}.jsonl", SESSION.simple()),
            format!("-p/x/{SESSION}.jsonl"),
            format!("-p/{SESSION}/{OTHER}.jsonl"),
            format!("-p/{SESSION}/agent-a1.jsonl"),
            format!("-p/{SESSION}/subagents/journal.jsonl"),
            format!("-p/{SESSION}/subagents/workflows/run1/journal.jsonl"),
            format!("-p/{SESSION}/subagents/agent-a1.meta.json"),
            format!("-p/{SESSION}/subagents/{OTHER}.jsonl"),
            format!("-p/{SESSION}/tool-results/agent-a1.jsonl"),
            format!("../{SESSION}.jsonl"),
            format!("/-p/{SESSION}.jsonl"),
            "-p/memory/agent-a1.jsonl".into(),
            "-p/memory/subagents/agent-a1.jsonl".into(),
            "-p/agent-.jsonl".into(),
            "-p/notes.jsonl".into(),
            "agent-a1.jsonl".into(),
        ] {
            assert_eq!(kind(&path), None, "{path}");
        }
    }
}

mod user_turns {
    use super::*;

    #[test]
    fn a_folder_or_branch_longer_than_any_path_counts_as_absent() {
        let of = |length: usize| {
            let name = "x".repeat(length);
            let line = with(with(user("x"), "cwd", name.as_str()), "gitBranch", name.as_str());
            let turn = turn(&line).unwrap();
            (
                read(&line).cwd.map(|cwd| cwd.len()),
                turn.cwd.map(|cwd| cwd.len()),
                turn.git_branch.map(|name| name.len()),
            )
        };
        assert_eq!(of(4096), (Some(4096), Some(4096), Some(4096)));
        assert_eq!(of(4097), (None, None, None));
    }

    #[test]
    fn a_typed_prompt_is_a_turn_with_all_its_facts() {
        let line = with(user(" fix the\nlogin test \n"), "promptId", "7c");
        let line = with(line, "origin", json!({"kind": "human"}));
        let meaning = read(&line);
        assert_eq!(meaning.line_type, LineType::User);
        assert!(meaning.is_envelope && meaning.unknown_type().is_none());
        assert_eq!((meaning.said_in, meaning.cwd.as_deref()), (Some(SESSION), Some("/home/u/app")));
        assert_eq!(
            meaning.turn.unwrap(),
            Turn {
                said_in: Some(SESSION),
                uuid: Some("b1000000-0000-4000-8000-000000000001".into()),
                actor: Actor::User,
                kind: Some(TurnKind::Prompt),
                provenance: Some(Provenance::App),
                text: " fix the\nlogin test \n".into(),
                timestamp: Some("2026-07-28T18:20:34.312Z".parse().unwrap()),
                message_id: Some("7c".into()),
                cwd: Some("/home/u/app".into()),
                git_branch: Some("main".into()),
                is_final: None,
                model: None,
                has_attachment: false,
                is_repaired: false,
            }
        );
    }

    #[test]
    fn text_blocks_are_joined_by_newlines() {
        let line = user(json!([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]));
        assert_eq!(said(&line), prompt("one\ntwo"));
    }

    #[test]
    fn slash_commands_are_told_by_name_and_arguments() {
        for (text, command) in [
            (
                "<command-name>/clear</command-name>\n  <command-message>clear</command-message>\n  <command-args></command-args>",
                "/clear",
            ),
            (
                "<command-message>fix is running…</command-message>\n<command-name>/fix</command-name>\n<command-args>the  login\ntest</command-args>",
                "/fix the  login\ntest",
            ),
            ("<command-message>review</command-message>", "review"),
            ("<command-name>/a</command-name><command-args> </command-args>", "/a"),
            (
                "<command-name>/a</command-name><command-args>x </command-args> y</command-args>",
                "/a x </command-args> y",
            ),
            (
                "<command-name>i</command-name><command-args>x</command-args><command-contents>{</command-args></command-contents>",
                "i x",
            ),
            ("<command-name>/cut</command-na", "/cut"),
        ] {
            assert_eq!(said(&user(text)), Some((Some(TurnKind::Command), command.to_owned())), "{text}");
        }
        assert_eq!(said(&user("<command-name></command-name>")), None);
    }

    #[test]
    fn shell_lines_are_turns_of_their_own_kind() {
        assert_eq!(said(&user("<bash-input>ls -l</bash-input>")), Some((Some(TurnKind::Shell), "ls -l".into())));
        assert_eq!(said(&user("<bash-input> </bash-input>")), None);
    }

    #[test]
    fn an_image_alone_is_a_turn_without_text() {
        for block in ["image", "document"] {
            let line = user(json!([{"type": block, "source": {"type": "base64", "data": "AAAA"}}]));
            let turn = turn(&line).unwrap();
            assert_eq!((turn.text.as_str(), turn.has_attachment), ("", true));
        }
        let line = user(json!([{"type": "image"}, {"type": "text", "text": "see"}]));
        let turn = turn(&line).unwrap();
        assert_eq!((turn.text.as_str(), turn.has_attachment), ("see", true));
        assert_eq!(said(&user(json!([{"type": "other"}]))), None);
    }

    #[test]
    fn a_prompt_made_from_a_plan_says_so() {
        let line = with(user("Implement the plan"), "planContent", "# Plan");
        assert_eq!(said(&line), Some((Some(TurnKind::Plan), "Implement the plan".into())));
        assert_eq!(said(&with(user("hi"), "planContent", Value::Null)), prompt("hi"));
    }

    #[test]
    fn a_copied_line_is_known_by_its_first_uuid() {
        let line = with(user("hi"), "forkedFrom", json!({"sessionId": OTHER.to_string(), "messageUuid": "a0"}));
        let copied = turn(&line).unwrap();
        assert_eq!((copied.uuid, copied.said_in), (Some("a0".into()), Some(OTHER)));
        let line = with(user("hi"), "forkedFrom", json!({}));
        assert!(turn(&line).unwrap().uuid.unwrap().starts_with("b1"));
        let line = with(user("hi"), "uuid", "");
        assert_eq!(turn(&line).unwrap().uuid, None);
    }

    #[test]
    fn a_line_that_names_another_session_was_said_there() {
        let turn = |line: &Value| turn(line).unwrap().payload(SESSION, None, Timestamp::UNIX_EPOCH);
        let line = with(user("hi"), "sessionId", OTHER.to_string());
        assert_eq!(turn(&line)["session_uuid"], OTHER.to_string());
        for odd in [Value::Null, "odd".into(), 7.into()] {
            assert_eq!(turn(&with(user("hi"), "sessionId", odd))["session_uuid"], SESSION.to_string());
        }
    }

    #[test]
    fn an_empty_branch_is_none() {
        assert_eq!(turn(&with(user("hi"), "gitBranch", "")).unwrap().git_branch, None);
        assert_eq!(turn(&with(user("hi"), "gitBranch", "HEAD")).unwrap().git_branch.as_deref(), Some("HEAD"));
    }

    #[test]
    fn sub_agents_say_no_turns() {
        for line in [user("hi"), assistant(json!([{"type": "text", "text": "hi"}]))] {
            let meaning = read_line(line.to_string().as_bytes(), &TranscriptKind::SubAgent).unwrap();
            assert_eq!(meaning.turn, None);
            assert_eq!((meaning.is_envelope, meaning.said_in), (true, Some(SESSION)));
        }
    }
}

mod queued_turns {
    use super::*;

    #[test]
    fn a_prompt_typed_while_the_agent_worked_is_a_turn() {
        let line = queued(json!({"prompt": "also lint", "origin": {"kind": "human"}}));
        assert_eq!(said(&line), Some((Some(TurnKind::Queued), "also lint".into())));
        let line = queued(json!({"prompt": "also lint"}));
        assert_eq!(said(&line), Some((Some(TurnKind::Queued), "also lint".into())));
    }

    #[test]
    fn it_may_come_in_blocks() {
        let line = queued(json!({"prompt": [{"type": "text", "text": "see"}, {"type": "image"}]}));
        let turn = turn(&line).unwrap();
        assert_eq!((turn.text.as_str(), turn.has_attachment, turn.actor), ("see", true, Actor::User));
    }

    #[test]
    fn notifications_and_other_attachments_are_no_turns() {
        for attachment in [
            json!({"prompt": "x", "commandMode": "task-notification"}),
            json!({"prompt": "x", "commandMode": null}),
            json!({"prompt": "x", "origin": {"kind": "task-notification"}}),
            json!({"prompt": "x", "isMeta": true}),
            json!({"prompt": "x", "type": "task_reminder"}),
            json!({"prompt": "<task-notification>x</task-notification>"}),
            json!({"prompt": " "}),
            json!({"prompt": 7}),
            json!({}),
        ] {
            assert_eq!(said(&queued(attachment.clone())), None, "{attachment}");
        }
        assert_eq!(said(&with(queued(json!({"prompt": "x"})), "isSidechain", true)), None);
        assert_eq!(said(&with(queued(json!({"prompt": "x"})), "origin", json!({"kind": "peer"}))), None);
    }
}

mod agent_turns {
    use super::*;

    #[test]
    fn a_line_with_text_is_a_turn_with_all_its_facts() {
        let turn = turn(&assistant(json!([{"type": "text", "text": "Done.\n"}]))).unwrap();
        assert_eq!((turn.actor, turn.kind, turn.text.as_str()), (Actor::Agent, None, "Done.\n"));
        assert_eq!((turn.message_id.as_deref(), turn.model.as_deref()), (Some("msg_01X"), Some("claude-opus-4-8")));
        assert_eq!(turn.is_final, Some(true));
    }

    #[test]
    fn thinking_and_tool_use_are_no_turns() {
        for content in [
            json!([{"type": "thinking", "thinking": "hm", "signature": "s"}]),
            json!([{"type": "tool_use", "id": "t", "name": "Bash", "input": {"text": "ls"}}]),
            json!([{"type": "text", "text": " \n"}]),
            json!([]),
            json!(null),
        ] {
            assert_eq!(said(&assistant(content.clone())), None, "{content}");
        }
    }

    #[test]
    fn sidechains_errors_and_the_programs_own_words_are_no_turns() {
        let line = assistant(json!([{"type": "text", "text": "hi"}]));
        assert_eq!(said(&with(line.clone(), "isSidechain", true)), None);
        assert_eq!(said(&with(line.clone(), "isApiErrorMessage", true)), None);
        let mut synthetic = line;
        synthetic["message"]["model"] = "<synthetic>".into();
        assert_eq!(said(&synthetic), None);
    }

    #[test]
    fn the_reason_for_stopping_tells_whether_it_is_final() {
        for (reason, is_final) in [
            (json!("end_turn"), Some(true)),
            (json!("stop_sequence"), Some(true)),
            (json!("max_tokens"), Some(true)),
            (json!("refusal"), Some(true)),
            (json!("tool_use"), Some(false)),
            (json!("pause_turn"), Some(false)),
            (json!(null), None),
        ] {
            let mut line = assistant(json!([{"type": "text", "text": "hi"}]));
            line["message"]["stop_reason"] = reason.clone();
            assert_eq!(turn(&line).unwrap().is_final, is_final, "{reason}");
        }
    }
}

mod other_lines {
    use super::*;

    #[test]
    fn messages_nested_in_progress_lines_are_no_turns() {
        let nested = user("hi");
        let line =
            envelope("progress", json!({"data": {"type": "agent_progress", "message": nested}, "message": nested}));
        let meaning = read(&line);
        assert_eq!((meaning.turn, meaning.line_type, meaning.is_envelope), (None, LineType::Progress, true));
    }

    #[test]
    fn state_of_the_program_is_known_and_no_activity() {
        assert!(METADATA_TYPES.is_sorted());
        for name in METADATA_TYPES {
            let meaning = read(&json!({"type": name, "sessionId": SESSION.to_string(), "uuid": "x", "timestamp": "y"}));
            assert_eq!((meaning.line_type, meaning.is_envelope), (LineType::Metadata, false), "{name}");
            assert_eq!((meaning.unknown_type(), &meaning.cwd, &meaning.turn), (None, &None, &None), "{name}");
        }
        for name in ["system", "attachment", "progress", "user", "assistant"] {
            assert!(read(&envelope(name, json!({}))).is_envelope, "{name}");
        }
    }

    #[test]
    fn unknown_types_are_named_and_never_bad() {
        let meaning = read(&json!({"type": "new-thing", "x": 1}));
        assert_eq!((meaning.unknown_type(), meaning.is_envelope), (Some("new-thing"), false));
        assert!(read(&envelope("new-thing", json!({}))).is_envelope);
        assert_eq!(read(&json!({})).unknown_type(), Some(NO_TYPE));
        assert_eq!(read(&json!({"type": 7})).unknown_type(), Some(NO_TYPE));
        let long = read(&json!({"type": "é".repeat(1000)}));
        assert_eq!(long.unknown_type().unwrap().chars().count(), crate::transcript::UNKNOWN_CHARS_MAX);
    }

    #[test]
    fn blank_lines_mean_nothing() {
        for line in [&b""[..], b" \t\r"] {
            let meaning = read_line(line, &MAIN).unwrap();
            assert_eq!((meaning.line_type, meaning.is_envelope, meaning.turn), (LineType::Blank, false, None));
        }
    }
}

mod odd_fields {
    use super::*;

    #[test]
    fn a_field_of_the_wrong_type_never_makes_an_object_bad() {
        let lines = [user("hi"), assistant(json!([{"type": "text", "text": "hi"}])), queued(json!({"prompt": "hi"}))];
        let odd = [json!(7), json!("odd"), json!(true), json!(null), json!([1, {"a": []}]), json!({"a": {}})];
        for line in lines {
            for key in line.as_object().unwrap().keys() {
                for value in &odd {
                    read(&with(line.clone(), key, value.clone()));
                }
            }
        }
        let content = json!(["hi", 7, null, {}, {"type": 7, "text": "x"}, {"type": "text", "text": 7}]);
        assert_eq!(said(&user(content)), None);
        let meaning = read(&with(with(user("hi"), "uuid", 7), "timestamp", "yesterday"));
        assert_eq!((meaning.timestamp, meaning.turn.unwrap().uuid), (None, None));
    }

    #[test]
    fn the_last_of_duplicate_keys_counts() {
        let line = r#"{"type":"summary","cwd":"/a","type":"user","cwd":"/b","message":{"content":"x","content":"y"}}"#;
        let meaning = read_line(line.as_bytes(), &MAIN).unwrap();
        assert_eq!((meaning.cwd.as_deref(), meaning.turn.unwrap().text.as_str()), (Some("/b"), "y"));
    }

    #[test]
    fn escaped_keys_are_the_same_keys() {
        let line = r#"{"ty\u0070e":"user","message":{"\u0063ontent":"x"}}"#;
        assert_eq!(read_line(line.as_bytes(), &MAIN).unwrap().turn.unwrap().text, "x");
    }

    #[test]
    fn nesting_neither_overflows_the_stack_nor_makes_a_line_bad() {
        let deep = format!("{}1{}", "[{\"type\":".repeat(100_000), "}]".repeat(100_000));
        let line = format!(r#"{{"type":"user","message":{{"content":"hi","deep":{deep}}},"toolUseResult":{deep}}}"#);
        assert_eq!(read_line(line.as_bytes(), &MAIN).unwrap().turn.unwrap().text, "hi");
        let line = format!(r#"{{"type":"user","message":{{"content":{deep}}}}}"#);
        assert_eq!(read_line(line.as_bytes(), &MAIN).unwrap().turn, None);
        for line in ["[".repeat(100_000), format!("{{\"a\":{}", "[".repeat(100_000)), deep] {
            read_line(line.as_bytes(), &MAIN).unwrap_err();
            salvage(line.as_bytes());
        }
    }
}

mod strings_that_hurt {
    use super::*;

    fn text_of(line: &[u8]) -> (String, bool) {
        let turn = read_line(line, &MAIN).unwrap().turn.unwrap();
        (turn.text, turn.is_repaired)
    }

    fn line_saying(content: &[u8]) -> Vec<u8> {
        [br#"{"type":"user","message":{"content":""#, content, br#""},"uuid":"a"}"#].concat()
    }

    #[test]
    fn escapes_that_can_not_be_stored_are_mended_in_the_text() {
        assert_eq!(text_of(&line_saying(br"a\u0000b")), ("a\u{fffd}b".into(), true));
        assert_eq!(text_of(&line_saying(br"a\ud83db")), ("a\u{fffd}b".into(), true));
        assert_eq!(text_of(&line_saying(br"a\udc00\ud83d")), ("a\u{fffd}\u{fffd}".into(), true));
    }

    #[test]
    fn text_about_escapes_is_left_alone() {
        assert_eq!(text_of(&line_saying(br"a\\u0000b \\ud83d")), ("a\\u0000b \\ud83d".into(), false));
        assert_eq!(text_of(&line_saying(br"\u001b[1m \ud83d\ude00 \\")), ("\u{1b}[1m 😀 \\".into(), false));
    }

    #[test]
    fn bytes_that_can_not_be_stored_are_mended_in_the_line() {
        assert_eq!(text_of(&line_saying(b"a\xffb")), ("a\u{fffd}b".into(), true));
        assert_eq!(text_of(&line_saying(b"a\0\0b")), ("ab".into(), true));
        assert_eq!(text_of(&[b"\0\0\0", &line_saying(b"ab")[..], b"\0"].concat()), ("ab".into(), true));
    }

    #[test]
    fn damage_in_what_is_not_kept_harms_nothing() {
        let line =
            br#"{"type":"user","message":{"content":"ab","x":"\ud83d"},"toolUseResult":"\u0000\udfff","\ud800":1}"#;
        assert_eq!(text_of(line), ("ab".into(), false));
    }

    #[test]
    fn a_byte_order_mark_is_passed_over() {
        assert_eq!(text_of(&[b"\xef\xbb\xbf", &line_saying(b"ab")[..]].concat()), ("ab".into(), false));
    }

    #[test]
    fn a_long_text_is_kept_whole() {
        let text = "long ".repeat(200_000);
        assert_eq!(said(&user(text.as_str())), prompt(&text));
    }
}

mod bad_lines {
    use super::*;

    #[test]
    fn what_is_no_object_is_bad_and_its_text_is_not_told() {
        for (line, message) in [
            (&b"garbage secret"[..], "no JSON object: does not begin with a brace, at column 1"),
            (b"  \"secret\"", "no JSON object: does not begin with a brace, at column 3"),
            (b"[{\"a\":1}]", "no JSON object: does not begin with a brace, at column 1"),
            (b"null", "no JSON object: does not begin with a brace, at column 1"),
            (b"\0\0\0", "no JSON object: nothing but NUL bytes, at column 1"),
            (b"{\"type\":\"secret\"", "no JSON object: EOF while parsing an object, at column 16"),
            (b"{\"type\":\"secret", "no JSON object: EOF while parsing a string, at column 15"),
            (b"{\"a\":1}{\"a\":2}", "no JSON object: trailing characters, at column 8"),
            (b"{secret:1}", "no JSON object: key must be a string, at column 2"),
            (b"{\"a\":\"\\q\"}", "no JSON object: invalid escape, at column 8"),
            (b"{\"a\":1,}", "no JSON object: trailing comma, at column 8"),
            (b"{\"a\":01}", "no JSON object: invalid number, at column 7"),
        ] {
            let bad = read_line(line, &MAIN).unwrap_err();
            assert_eq!(bad.to_string(), message, "{}", line.escape_ascii());
        }
    }
}

mod salvaging {
    use super::*;

    /// The records found on `line`, without NULs, and where the lost pieces start and end.
    fn found(line: &[u8]) -> (Vec<Vec<u8>>, Vec<(usize, usize)>) {
        let mut records = Vec::new();
        let mut lost = Vec::new();
        for segment in salvage(line) {
            match segment {
                Segment::Record(range) => records.push(line[range].iter().copied().filter(|byte| *byte != 0).collect()),
                Segment::Lost(range) => lost.push((range.start, range.end)),
            }
        }
        (records, lost)
    }

    /// A record as Claude Code writes it, with much that could be mistaken for another one.
    fn rich_record() -> Vec<u8> {
        let nested =
            r#"{"type":"assistant","message":{"role":"assistant","content":[{"type":"text","text":"n"}]},"uuid":"n"}"#;
        format!(
            r#"{{"parentUuid":null,"isSidechain":false,"data":{{"message":{nested},"type":"agent_progress"}},"message":{{"role":"user","content":[{{"type":"text","text":"a \"{{\"parentUuid\" \\ \u00e9 \ud83d\ude00 {{"}},{{"type":"image","n":-1.5e3}}]}},"list":[[1,2],[],{{}}],"flag":true,"type":"user","uuid":"a","sessionId":"{SESSION}"}}"#,
        )
        .replace(r#"\"{"parentUuid""#, r#"\"{\"parentUuid\""#)
        .into_bytes()
    }

    fn next_record() -> Vec<u8> {
        br#"{"parentUuid":"a","type":"user","message":{"content":[{"type":"text","text":"next"}]},"uuid":"b"}"#.to_vec()
    }

    #[test]
    fn the_record_after_a_cut_one_is_found_wherever_the_cut_is() {
        let cut = rich_record();
        read_line(&cut, &MAIN).unwrap();
        for next in [next_record(), format!(r#"{{"type":"user","sessionId":"{SESSION}"}}"#).into_bytes()] {
            for length in 1..cut.len() {
                let line = [&cut[..length], &next].concat();
                let lost = cut[..length].trim_ascii_end().len();
                assert_eq!(found(&line), (vec![next.clone()], vec![(0, lost)]), "cut at {length}");
            }
        }
    }

    #[test]
    fn a_cut_record_alone_is_lost_and_nothing_inside_it_is_taken_for_a_line() {
        let cut = rich_record();
        for length in 1..cut.len() {
            for part in [&cut[..length], &cut[length..]] {
                let start = part.len() - part.trim_ascii_start().len();
                assert_eq!(found(part), (vec![], vec![(start, part.trim_ascii_end().len())]), "cut at {length}");
            }
        }
    }

    #[test]
    fn whole_records_on_one_line_are_all_found() {
        let (one, two) = (rich_record(), next_record());
        assert_eq!(found(&[&one[..], &two].concat()), (vec![one.clone(), two.clone()], vec![]));
        assert_eq!(found(&[&one[..], b" ", &two, b" "].concat()), (vec![one.clone(), two.clone()], vec![]));
        let line = [&one[..], b"{\"summary\":1}", &two, b"{}"].concat();
        assert_eq!(found(&line).0.len(), 4);
        let line = [&one[..], b" garbage"].concat();
        assert_eq!(found(&line), (vec![one.clone()], vec![(one.len() + 1, one.len() + 8)]));
        assert_eq!(found(b"{\"a\":1},garbage"), (vec![], vec![(0, 15)]));
    }

    #[test]
    fn a_whole_record_then_a_cut_one_then_a_whole_one() {
        let (one, two) = (rich_record(), next_record());
        let line = [&one[..], &one[..200], &two].concat();
        assert_eq!(found(&line), (vec![one.clone(), two], vec![(one.len(), one.len() + 200)]));
    }

    #[test]
    fn runs_of_nul_are_passed_over_and_places_are_those_of_the_line() {
        let record = next_record();
        let line = [b"\0\0cut\0", &record[..], b"\0\0"].concat();
        assert_eq!(salvage(&line), [Segment::Lost(2..5), Segment::Record(6..6 + record.len())]);
        let mut split = record.clone();
        split.splice(30..30, [0; 5]);
        let line = [b"\0", &split[..], &record].concat();
        let end = 1 + split.len();
        assert_eq!(salvage(&line), [Segment::Record(1..end), Segment::Record(end..end + record.len())]);
        assert!(read_line(&line[1..end], &MAIN).is_ok());
    }

    #[test]
    fn a_line_with_nothing_whole_is_one_lost_piece() {
        for line in [&b""[..], b"garbage", b"\0\0\0", b"[1]", b"{\"type\":\"us", b"}{", b"  "] {
            assert_eq!(salvage(line), [Segment::Lost(0..line.len())], "{}", line.escape_ascii());
        }
    }

    #[test]
    fn a_record_of_a_type_without_session_is_found_too() {
        let line = br#"{"type":"summary","su{"type":"summary","summary":"s","leafUuid":"l"}"#;
        assert_eq!(found(line).0, [br#"{"type":"summary","summary":"s","leafUuid":"l"}"#]);
    }

    #[test]
    fn hostile_lines_cost_no_more_than_long_ones() {
        const BYTES: usize = 1 << 20;
        let started = Instant::now();
        for line in [
            br#"{"type""#.repeat(BYTES / 7),
            br#"{"type":"#.repeat(BYTES / 8),
            br#"{"parentUuid":["#.repeat(BYTES / 15),
            br#"x{"type":{"#.repeat(BYTES / 10),
            br#"{"type":"a"},"#.repeat(BYTES / 13),
            [&br#"{"type":"#.repeat(BYTES / 16)[..], b"1", &b"}".repeat(BYTES / 16)].concat(),
            [b"x", &br#"{"type":"#.repeat(BYTES / 16)[..], b"1", &b"}".repeat(BYTES / 16)].concat(),
            [&br#"{"type":"#.repeat(1000)[..], b"\"", &b"a".repeat(BYTES)].concat(),
            b"{\"".repeat(BYTES / 2),
            b"{}".repeat(BYTES / 2),
            b"{\0".repeat(BYTES / 2),
            b"\0".repeat(BYTES),
            b"{".repeat(BYTES),
            b"[".repeat(BYTES),
        ] {
            let pieces = salvage(&line);
            assert!(pieces.len() <= 8194, "{}", pieces.len());
        }
        // Quadratic work on any of them would take minutes.
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    }
}

mod payloads {
    use super::*;

    fn payload(line: &Value, project_path: Option<&str>) -> Value {
        Value::Object(turn(line).unwrap().payload(SESSION, project_path, Timestamp::UNIX_EPOCH))
    }

    #[test]
    fn a_humans_turn_tells_what_is_known() {
        let line = with(user(json!([{"type": "image"}, {"type": "text", "text": "see"}])), "promptId", "7c");
        assert_eq!(
            payload(&line, Some("/home/u")),
            json!({
                "agent": "claude-code", "session_uuid": SESSION.to_string(), "actor": "user", "text": "see", "source": "polling",
                "turn_timestamp": "2026-07-28T18:20:34.312Z", "turn_uuid": "b1000000-0000-4000-8000-000000000001",
                "message_id": "7c", "kind": "prompt", "provenance": "unlabelled", "project_path": "/home/u", "working_directory": "/home/u/app",
                "git_branch": "main", "has_attachment": true,
            })
        );
    }

    #[test]
    fn an_agents_turn_tells_whether_it_is_final_even_when_nobody_knows() {
        let mut line = assistant(json!([{"type": "text", "text": "a\u{0}"}]));
        line["message"]["stop_reason"] = Value::Null;
        assert_eq!(
            payload(&line, None),
            json!({
                "agent": "claude-code", "session_uuid": SESSION.to_string(), "actor": "agent", "text": "a\u{fffd}", "source": "polling",
                "turn_timestamp": "2026-07-28T18:20:34.312Z", "turn_uuid": "b1000000-0000-4000-8000-000000000001",
                "message_id": "msg_01X", "working_directory": "/home/u/app", "git_branch": "main", "is_final": null,
                "model": "claude-opus-4-8", "metadata": {"repaired": true},
            })
        );
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let line = json!({"type": "user", "message": {"content": "hi"}});
        assert_eq!(
            payload(&line, None),
            json!({
                "agent": "claude-code", "session_uuid": SESSION.to_string(), "actor": "user", "text": "hi", "source": "polling",
                "turn_timestamp": "1970-01-01T00:00:00.000Z", "kind": "prompt", "provenance": "unlabelled",
            })
        );
    }

    #[test]
    fn times_are_written_as_they_were() {
        for time in ["2026-07-28T18:20:34.300Z", "2026-07-28T18:20:34.000Z", "2026-07-28T18:20:34.123456Z"] {
            assert_eq!(payload(&with(user("hi"), "timestamp", time), None)["turn_timestamp"], time);
        }
    }

    #[test]
    fn a_session_is_registered_with_what_is_known() {
        let facts = SessionFacts {
            agent: None,
            session: SESSION,
            cwd: "/a",
            git_branch: None,
            transcript_path: None,
            started_at: None,
        };
        assert_eq!(
            Value::Object(facts.payload()),
            json!({"session_uuid": SESSION.to_string(), "project_path": "/a", "working_directory": "/a"})
        );
        let facts = SessionFacts {
            agent: Some(Agent::CodexCli),
            git_branch: Some("main"),
            transcript_path: Some("/p/s.jsonl"),
            started_at: Some(Timestamp::UNIX_EPOCH),
            ..facts
        };
        assert_eq!(
            Value::Object(facts.payload()),
            json!({"agent": "codex-cli", "session_uuid": SESSION.to_string(), "project_path": "/a", "working_directory": "/a",
                "git_branch": "main", "transcript_path": "/p/s.jsonl", "started_at": "1970-01-01T00:00:00.000Z"})
        );
    }
}

mod identities {
    use super::*;

    #[test]
    fn a_uuid_is_global_and_a_place_is_not() {
        let known = turn(&user("hi")).unwrap();
        assert_eq!(turn_event_id(&known, SESSION, 0, b"x"), turn_event_id(&known, OTHER, 9, b"y"));
        let unknown = turn(&with(user("hi"), "uuid", Value::Null)).unwrap();
        let ids = HashSet::from([
            turn_event_id(&known, SESSION, 0, b"x"),
            turn_event_id(&unknown, SESSION, 0, b"x"),
            turn_event_id(&unknown, OTHER, 0, b"x"),
            turn_event_id(&unknown, SESSION, 1, b"x"),
            turn_event_id(&unknown, SESSION, 0, b"y"),
            session_registered_event_id(SESSION),
            session_registered_event_id(OTHER),
        ]);
        assert_eq!(ids.len(), 7);
    }

    /// Stored rows are known again by these; a change would store every turn twice.
    #[test]
    fn identities_never_change() {
        let known = turn(&user("hi")).unwrap();
        assert_eq!(turn_event_id(&known, SESSION, 0, b"").to_string(), "ca26f8a0-eb22-56ae-8a26-cff53c461c62");
        let unknown = turn(&with(user("hi"), "uuid", Value::Null)).unwrap();
        assert_eq!(turn_event_id(&unknown, SESSION, 7, b"line").to_string(), "47f678bb-be83-5ae6-ae98-bb77e44edcf9");
        assert_eq!(session_registered_event_id(SESSION).to_string(), "4d81a325-2170-533e-b2f7-119e138557df");
    }
}

/// Made-up transcripts, and those of real sessions beside the checkout, with the turns that an independent program finds in them.
mod corpus {
    use sha2::{Digest, Sha256};

    use super::*;

    /// What the other program writes of each turn.
    fn found(bytes: &[u8], kind: &TranscriptKind) -> Vec<(u64, Value, String)> {
        let (mut found, mut uuids, mut offset) = (Vec::new(), HashSet::new(), 0);
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            let at = offset;
            offset += line.len() as u64;
            let Ok(meaning) = read_line(line.strip_suffix(b"\n").unwrap_or(line), kind) else { continue };
            let Some(turn) = meaning.turn else { continue };
            let uuid = turn.uuid;
            if uuid.as_ref().is_some_and(|uuid| !uuids.insert(uuid.clone())) {
                continue;
            }
            let mut object = json!({"actor": turn.actor.as_str(), "turn_uuid": uuid});
            if let (Some(kind), Some(provenance)) = (turn.kind, turn.provenance) {
                object["kind"] = kind.as_str().into();
                object["provenance"] = provenance.as_str().into();
            }
            found.push((at, object, turn.text));
        }
        found
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn shared(name: &str, what: &str) -> Option<std::path::PathBuf> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(name);
        (!crate::skip::lacks(what, path.exists())).then_some(path)
    }

    #[test]
    fn the_turns_are_those_that_another_program_finds() {
        the_turns_are_those_of(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/transcripts"));
        if let Some(corpus) = shared("transcripts", "transcripts of real sessions") {
            the_turns_are_those_of(&corpus);
        }
    }

    fn the_turns_are_those_of(corpus: &Path) {
        let expected = std::fs::read_to_string(corpus.join("TURNS.jsonl")).unwrap();
        let mut files = BTreeMap::<String, Vec<Value>>::new();
        for line in expected.lines() {
            let mut turn: Value = serde_json::from_str(line).unwrap();
            let file = turn.as_object_mut().unwrap().remove("file").unwrap();
            files.entry(file.as_str().unwrap().to_owned()).or_default().push(turn);
        }
        let paths = walkdir::WalkDir::new(corpus).into_iter().map(|entry| entry.unwrap().into_path());
        let mut turns = 0;
        for path in paths.filter(|path| path.is_file()) {
            let file = path.strip_prefix(corpus).unwrap().to_str().unwrap().to_owned();
            let Some(kind @ TranscriptKind::Main { .. }) = classify(Path::new(&file)) else { continue };
            let ours = found(&std::fs::read(&path).unwrap(), &kind).into_iter().map(|(offset, mut turn, text)| {
                turn["offset"] = offset.into();
                turn["text_bytes"] = text.len().into();
                turn["text_sha256"] = hex(&Sha256::digest(&text)).into();
                turn
            });
            let ours: Vec<Value> = ours.collect();
            turns += ours.len();
            assert_eq!(ours, files.remove(&file).unwrap_or_default(), "{file}");
        }
        assert!(files.is_empty(), "{files:?}");
        assert_eq!(turns, expected.lines().count());
    }

    #[test]
    fn the_cases_have_the_right_answer() {
        let Some(cases) = shared("turn-cases", "cases of turns") else { return };
        let mut checked = 0;
        for case in std::fs::read_dir(&cases).unwrap() {
            let case = case.unwrap().path();
            // Those with several files are run through the program.
            let Ok(bytes) = std::fs::read(case.join("in.jsonl")) else { continue };
            let expected: Value = serde_json::from_slice(&std::fs::read(case.join("expected.json")).unwrap()).unwrap();
            let ours = found(&bytes, &MAIN).into_iter().map(|(_, mut turn, text)| {
                turn["text"] = text.into();
                turn
            });
            assert_eq!(ours.collect::<Vec<_>>(), *expected["turns"].as_array().unwrap(), "{}", case.display());
            checked += 1;
        }
        assert!(checked >= 10, "{checked}");
    }
}

mod properties {
    use super::*;

    fn any_line() -> impl Strategy<Value = Vec<u8>> {
        let text = prop_oneof![any::<String>(), "[<a-z>/ -]{0,40}", Just("<command-name>/a</command-name>".to_owned())];
        let line = (text, any::<bool>(), any::<bool>()).prop_map(|(text, is_user, is_array)| {
            let content = if is_array { json!([{"type": "text", "text": text}]) } else { json!(text) };
            if is_user { user(content) } else { assistant(content) }.to_string().into_bytes()
        });
        prop_oneof![
            line,
            Just(queued(json!({"prompt": [{"type": "text", "text": "a"}]})).to_string().into_bytes()),
            Just(br#"{"type":"user","message":{"content":"\ud83d\u0000\\u0000"}}"#.to_vec()),
        ]
    }

    /// Lines with some bytes replaced, put in or taken out, and joined to others.
    fn damaged_line() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![any::<u8>(), Just(0), prop::sample::select(br#"{}[]",:\u0dD8"#.to_vec())];
        let damage = prop::collection::vec((any::<prop::sample::Index>(), 0..3_u8, byte), 0..6);
        (prop::collection::vec(any_line(), 1..4), damage).prop_map(|(lines, damage)| {
            let mut line = lines.concat();
            for (place, action, byte) in damage {
                let place = place.index(line.len().max(1));
                match action {
                    0 if place < line.len() => line[place] = byte,
                    1 => line.insert(place.min(line.len()), byte),
                    _ => drop(line.drain(place.min(line.len())..(place + usize::from(byte)).min(line.len()))),
                }
            }
            line
        })
    }

    fn check(line: &[u8]) {
        let _ = Look::at(SESSION, line, line);
        let is_whole = match read_line(line, &MAIN) {
            Ok(meaning) => {
                if let Some(turn) = meaning.turn {
                    assert!(!turn.text.contains('\0'));
                    assert!(turn.has_attachment || !turn.text.trim().is_empty());
                    turn.payload(SESSION, None, Timestamp::UNIX_EPOCH);
                }
                meaning.line_type != LineType::Blank
            }
            Err(_) => false,
        };
        let segments = salvage(line);
        assert!(!segments.is_empty());
        let mut covered = 0;
        for segment in &segments {
            let (Segment::Record(range) | Segment::Lost(range)) = segment;
            let between = &line[covered..range.start];
            assert!(between.iter().all(|byte| *byte == 0 || byte.is_ascii_whitespace()));
            covered = range.end;
            if matches!(segment, Segment::Record(_)) {
                let meaning = read_line(&line[range.clone()], &MAIN).unwrap();
                assert_ne!(meaning.line_type, LineType::Blank);
            }
        }
        assert!(line[covered..].iter().all(|byte| *byte == 0 || byte.is_ascii_whitespace()));
        if is_whole && !line.starts_with("\u{feff}".as_bytes()) {
            assert!(matches!(segments.as_slice(), [Segment::Record(_)]), "{segments:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn nothing_panics_on_arbitrary_bytes(line in prop::collection::vec(any::<u8>(), 0..200)) {
            check(&line);
        }

        #[test]
        fn nothing_panics_on_arbitrary_punctuation(line in "[{}\\[\\]\",:\\\\u0a tyepr\n]{0,80}") {
            check(line.as_bytes());
        }

        #[test]
        fn nothing_panics_on_damaged_lines(line in damaged_line()) {
            check(&line);
        }

        #[test]
        fn whole_records_between_garbage_are_found(
            garbage in prop::collection::vec("[a-z0-9 \\]},:\"\\\\\u{0}]{1,30}", 1..4),
            records in prop::collection::vec(any_record(), 4),
        ) {
            let mut line = Vec::new();
            let mut whole = Vec::new();
            for (garbage, record) in garbage.iter().zip(&records) {
                line.extend(garbage.bytes());
                whole.push(Segment::Record(line.len()..line.len() + record.len()));
                line.extend(record.bytes());
            }
            // A record in the middle of garbage is only believed when a record or nothing follows: here garbage does,
            // so all but the last may be lost, and the last is found.
            let found = salvage(&line);
            prop_assert_eq!(found.last(), whole.last());
            let other = found.iter().filter(|segment| matches!(segment, Segment::Record(_)) && !whole.contains(segment));
            prop_assert_eq!(other.count(), 0);
        }

        #[test]
        fn every_text_typed_comes_back_whole(text in "[^<\\[\u{0}]{0,60}") {
            prop_assume!(!crate::claude::provenance::trim(&text).is_empty() && !text.trim_start().starts_with("Caveat: "));
            prop_assert_eq!(said(&user(text.as_str())), prompt(&text));
        }
    }

    fn any_record() -> impl Strategy<Value = String> {
        any::<String>().prop_map(|text| {
            let text = Value::from(text);
            format!(r#"{{"parentUuid":null,"message":{{"content":{text}}},"type":"user","sessionId":"{SESSION}"}}"#)
        })
    }
}
