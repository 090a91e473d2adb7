//! Each step of the procedure with its table.

use serde_json::{Value, json};

use super::*;

/// What is judged of a `user` line with these fields, as `kind provenance: text` or as the reason.
fn judged(line: &Value) -> String {
    let text = line.to_string();
    let fields = Fields::of(&text).unwrap();
    match judge(&fields, line["type"] == "attachment", &mut Mender { is_mended: false }, &mut Vec::new()) {
        Ok(human) => format!("{} {}: {}", human.kind.as_str(), human.provenance.as_str(), human.text),
        Err(no_turn) => format!("no: {no_turn}"),
    }
}

fn user(content: impl Into<Value>) -> Value {
    json!({"type": "user", "message": {"role": "user", "content": content.into()}})
}

fn queued(attachment: Value) -> Value {
    let mut line = json!({"type": "attachment", "attachment": {"type": "queued_command", "prompt": "hi"}});
    for (key, value) in attachment.as_object().unwrap() {
        line["attachment"][key] = value.clone();
    }
    line
}

fn with(mut line: Value, more: Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        line[key] = value.clone();
    }
    line
}

fn typed(content: impl Into<Value>) -> Value {
    with(user(content), json!({"promptSource": "typed"}))
}

const HI: &str = "prompt unlabelled: hi";

#[test]
fn structure_outweighs_everything() {
    for flag in ["isSidechain", "isMeta", "isCompactSummary", "isVisibleInTranscriptOnly", "turnCompanion"] {
        let no = format!("no: {flag}");
        assert_eq!(judged(&with(typed("hi"), json!({flag: true, "origin": {"kind": "human"}}))), no);
        assert_eq!(judged(&queued(json!({flag: true, "humanTurn": true}))), no);
        assert_eq!(judged(&with(queued(json!({"commandMode": "prompt"})), json!({flag: true}))), no);
        for unset in [json!(false), json!(null), json!("true"), json!(1)] {
            assert_eq!(judged(&with(user("hi"), json!({flag: unset}))), HI, "{flag}");
        }
    }
    for field in ["sourceToolUseID", "scheduledTaskId", "scheduledFireId", "interruptedByShutdown"] {
        for set in [json!("x"), json!(true), json!(1), json!({"a": 1})] {
            assert_eq!(judged(&with(typed("hi"), json!({field: set}))), format!("no: {field}"), "{field}");
        }
        for unset in [json!(null), json!(""), json!(false), json!(0), json!({}), json!([])] {
            assert_eq!(judged(&with(user("hi"), json!({field: unset}))), HI, "{field}");
        }
    }
}

#[test]
fn a_team_and_what_is_stamped_by_the_writing_process_say_nothing() {
    for field in ["teamName", "agentName", "entrypoint", "sessionKind", "permissionMode", "userType"] {
        assert_eq!(judged(&with(user("hi"), json!({field: "x"}))), HI, "{field}");
    }
}

#[test]
fn not_human_outweighs_human() {
    for (fields, expected) in [
        (json!({"origin": {"kind": "peer"}, "promptSource": "typed"}), "no: origin peer"),
        (json!({"origin": "task-notification"}), "no: origin task-notification"),
        (json!({"origin": {"kind": "something-new"}}), "no: origin something-new"),
        (json!({"origin": {"kind": 7}}), "no: origin 7"),
        (json!({"origin": 7}), "no: origin 7"),
        (json!({"turnOrigin": "scheduled", "origin": "human"}), "no: turnOrigin scheduled"),
        (json!({"turnOrigin": "new"}), "no: turnOrigin new"),
        (json!({"promptSource": "system", "origin": "human"}), "no: promptSource system"),
        (json!({"origin": null}), HI),
        (json!({"origin": {}}), HI),
        (json!({"origin": {"kind": null}}), HI),
        (json!({"promptSource": "something-new"}), HI),
    ] {
        assert_eq!(judged(&with(user("hi"), fields.clone())), expected, "{fields}");
    }
    for (attachment, expected) in [
        (json!({"commandMode": "prompt"}), "queued unlabelled: hi"),
        (json!({"commandMode": "task-notification"}), "no: commandMode task-notification"),
        (json!({}), "no: no command mode"),
        (json!({"commandMode": null}), "no: no command mode"),
        (json!({"humanTurn": true}), "queued typed: hi"),
        (json!({"origin": {"kind": "human"}}), "queued typed: hi"),
        (json!({"commandMode": "prompt", "origin": {"kind": "task-notification"}}), "no: origin task-notification"),
        (json!({"type": "task_reminder", "commandMode": "prompt"}), "no: no queued command"),
        (json!({"commandMode": "prompt", "prompt": " "}), "no: empty"),
        (json!({"commandMode": "prompt", "prompt": 7}), "no: empty"),
    ] {
        assert_eq!(judged(&queued(attachment.clone())), expected, "{attachment}");
    }
    // The attachment's own word goes before that of its line.
    let line = with(queued(json!({"commandMode": "prompt"})), json!({"origin": {"kind": "peer"}}));
    assert_eq!(judged(&line), "no: origin peer");
    let line = with(queued(json!({"origin": "human"})), json!({"origin": {"kind": "peer"}}));
    assert_eq!(judged(&line), "queued typed: hi");
    assert_eq!(judged(&json!({"type": "user"})), "no: no message");
    assert_eq!(judged(&json!({"type": "attachment", "attachment": "x"})), "no: no queued command");
}

#[test]
fn the_grade_is_by_the_strongest_field() {
    for (fields, grade) in [
        (json!({"promptSource": "typed", "turnOrigin": "sdk"}), "typed"),
        (json!({"promptSource": "queued"}), "typed"),
        (json!({"promptSource": "suggestion_accepted"}), "typed"),
        (json!({"origin": {"kind": "human"}, "promptSource": "sdk"}), "app"),
        (json!({"turnOrigin": "human"}), "app"),
        (json!({"promptSource": "sdk"}), "sdk"),
        (json!({"turnOrigin": "sdk"}), "sdk"),
        (json!({}), "unlabelled"),
    ] {
        assert_eq!(judged(&with(user("hi"), fields.clone())), format!("prompt {grade}: hi"), "{fields}");
    }
}

#[test]
fn what_the_format_did_not_have_is_named_and_judged_all_the_same() {
    let unknown = |line: Value| {
        let text = line.to_string();
        let mut unknowns = Vec::new();
        let fields = Fields::of(&text).unwrap();
        let _ = judge(&fields, line["type"] == "attachment", &mut Mender { is_mended: false }, &mut unknowns);
        let shown = unknowns.iter().map(|unknown| format!("{} {} {}", unknown.field, unknown.value, unknown.version));
        shown.collect::<Vec<_>>()
    };
    let with_version = |fields: Value| with(with(user("hi"), json!({"version": "2.1.204"})), fields);
    assert_eq!(unknown(with_version(json!({"origin": {"kind": "oracle"}}))), ["origin oracle 2.1.204"]);
    assert_eq!(unknown(with_version(json!({"promptSource": "dictated"}))), ["promptSource dictated 2.1.204"]);
    assert_eq!(unknown(with_version(json!({"turnOrigin": "x"}))), ["turnOrigin x 2.1.204"]);
    assert_eq!(unknown(with_version(json!({"origin": "human", "promptSource": "typed"}))), [""; 0]);
    assert_eq!(unknown(with_version(json!({"origin": {"kind": "peer"}}))), [""; 0]);
    // From 2.1.205 on all words say where they came from.
    for (version, expected) in [
        (json!("2.1.204"), vec![]),
        (json!("2.1.205"), vec!["unlabelled  2.1.205"]),
        (json!("2.2.0"), vec!["unlabelled  2.2.0"]),
        (json!("10.0.1-beta"), vec![]),
        (json!(null), vec![]),
    ] {
        assert_eq!(unknown(with(user("hi"), json!({"version": version}))), expected, "{version}");
        assert_eq!(unknown(with(typed("hi"), json!({"version": version}))), [""; 0]);
        assert_eq!(unknown(with(user("<tick>1</tick>"), json!({"version": version}))), [""; 0]);
    }
}

#[test]
fn beside_a_tools_result_stand_words_answers_and_reasons() {
    let result = json!({"type": "tool_result", "tool_use_id": "t", "content": "ok"});
    let failed = |text: &str| json!({"type": "tool_result", "is_error": true, "content": text});
    let text = |text: &str| json!({"type": "text", "text": text});
    let refused = "The user doesn't want to proceed with this tool use. The tool use was rejected.";
    let told = format!("{refused} To tell you how to proceed, the user said:\nuse pnpm\n");
    let reason = format!("{refused} The user provided the following reason for the rejection:  not there");
    for (content, more, expected) in [
        (json!([result]), json!({}), "no: tool result"),
        (json!([result, text("hi")]), json!({}), HI),
        (json!([text("hi"), result]), json!({}), HI),
        (json!([result, text("Tool loaded."), text(" ")]), json!({}), "no: tool result"),
        (json!([result, text("Tool loaded."), text("hi")]), json!({}), HI),
        (json!("Tool loaded."), json!({"toolUseResult": "x"}), "no: tool result"),
        (json!("Tool loaded."), json!({"toolUseResult": {}}), "prompt unlabelled: Tool loaded."),
        (
            json!([result]),
            json!({"toolUseResult": {"answers": {"A?": "a", "B?": "b"}}}),
            "answer unlabelled: A?\na\nB?\nb",
        ),
        (json!([result]), json!({"toolUseResult": {"answers": {}}}), "no: tool result"),
        (json!([result]), json!({"toolUseResult": {"answers": {"A?": ["a"]}}}), "no: tool result"),
        (json!([result]), json!({"toolUseResult": {"answers": ["a"]}}), "no: tool result"),
        (json!([result]), json!({"userFeedback": "why?", "promptSource": "typed"}), "rejection typed: why?"),
        (json!([result]), json!({"userFeedback": " "}), "no: tool result"),
        (json!([failed(&told)]), json!({}), "rejection unlabelled: use pnpm\n"),
        (json!([failed(&reason)]), json!({}), "rejection unlabelled: not there"),
        (
            json!([{"type": "tool_result", "is_error": true, "content": [text(&reason)]}]),
            json!({}),
            "rejection unlabelled: not there",
        ),
        (json!([failed(refused)]), json!({}), "no: tool result"),
        (json!([failed(&format!("cat: {reason}"))]), json!({}), "no: tool result"),
        (json!([{"type": "tool_result", "content": reason}]), json!({}), "no: tool result"),
    ] {
        assert_eq!(judged(&with(user(content.clone()), more.clone())), expected, "{content} {more}");
    }
}

#[test]
fn context_is_peeled_off_both_ends() {
    let opened = "<ide_opened_file>The user opened a.rs</ide_opened_file>";
    let reminder = "<system-reminder>\nx\n</system-reminder>";
    for (text, expected) in [
        (format!("{reminder}\nhi"), HI),
        (format!("\u{feff} {reminder}\r\n{opened}\n hi"), "prompt unlabelled:  hi"),
        (format!("hi\n{reminder}\n{opened}\n"), HI),
        (format!("{reminder}\n<command-name>/a</command-name>"), "command unlabelled: /a"),
        (reminder.to_owned(), "no: nothing but context"),
        ("<system-reminder>unclosed".to_owned(), "no: unclosed context <system-reminder>"),
        ("<user-prompt-submit-hook>x</user-prompt-submit-hook>hi".to_owned(), HI),
        ("<session-start-hook>x</session-start-hook>\nhi".to_owned(), HI),
        ("<local-command-caveat>x</local-command-caveat>".to_owned(), "no: nothing but context"),
    ] {
        assert_eq!(judged(&user(text.as_str())), expected, "{text}");
    }
    for text in ["why <system-reminder>x</system-reminder>?", "see <ide_selection>x</ide_selection>", "a\n</ide_x>"] {
        assert_eq!(judged(&user(text)), format!("prompt unlabelled: {text}"));
    }
    // A block of which nothing is left leaves no empty line, and an empty one is kept.
    let blocks = json!([{"type": "text", "text": opened}, {"type": "text", "text": "a"}, {"type": "text", "text": ""}]);
    assert_eq!(judged(&user(blocks)), "prompt unlabelled: a\n");
    let with_image = json!([{"type": "text", "text": opened}, {"type": "image"}]);
    assert_eq!(judged(&user(with_image)), "prompt unlabelled: ");
    // What is known to be typed was pasted.
    assert_eq!(judged(&typed(reminder)), format!("prompt typed: {reminder}"));
    assert_eq!(judged(&typed("<system-reminder>unclosed")), "prompt typed: <system-reminder>unclosed");
}

#[test]
fn pasted_content_loses_its_marks_and_nothing_else() {
    for (text, expected) in [
        ("a <pasted_content id=\"1\">\nb\n</pasted_content id=\"1\"> c", "a b c"),
        ("<pasted_content id=\"1\">\n\nb\n\n</pasted_content id=\"1\">", "\nb\n"),
        ("<pasted_content id=\"1\">\n</pasted_content id=\"1\">x", "x"),
        (
            "<pasted_content id=\"1\">x</pasted_content id=\"2\">",
            "<pasted_content id=\"1\">x</pasted_content id=\"2\">",
        ),
        (
            "<pasted_content id=\"1\">x</pasted_content id=\"2\">y</pasted_content id=\"1\">",
            "x</pasted_content id=\"2\">y",
        ),
        ("<pasted_content id=\"1\"><pasted_content id=\"2\">x</pasted_content id=\"2\">", "<pasted_content id=\"1\">x"),
        (
            "<pasted_content id=\"1\"x>y</pasted_content id=\"1\">",
            "<pasted_content id=\"1\"x>y</pasted_content id=\"1\">",
        ),
        ("</pasted_content id=\"1", "</pasted_content id=\"1"),
    ] {
        assert_eq!(unwrap_pasted(text.into()), expected, "{text}");
    }
    let notification = "<task-notification>x</task-notification>";
    let pasted = format!("<pasted_content id=\"1\">\n{notification}\n</pasted_content id=\"1\">");
    assert_eq!(judged(&typed(pasted.as_str())), format!("prompt typed: {notification}"));
}

#[test]
fn envelopes_are_the_programs_unless_they_are_known_to_be_typed() {
    for tag in [
        "task-notification",
        "teammate-message",
        "cross-session-message",
        "agent-message",
        "channel",
        "bash-stdout",
        "bash-stderr",
        "local-command-stdout",
        "local-command-stderr",
        "tick",
        "goal",
        "user-memory-input",
        "scheduled-task",
        "ci-monitor-event",
    ] {
        let text = format!("\n <{tag} a=\"b\">x</{tag}>\nwords behind it");
        let no = format!("no: envelope <{tag}>");
        assert_eq!(judged(&user(text.as_str())), no);
        assert_eq!(judged(&user(json!([{"type": "text", "text": text}]))), no);
        assert_eq!(judged(&with(user(text.as_str()), json!({"origin": "human"}))), no);
        assert_eq!(judged(&with(user(text.as_str()), json!({"promptSource": "sdk"}))), no);
        assert_eq!(judged(&typed(text.as_str())), format!("prompt typed: {text}"));
        // Behind words it is theirs.
        let blocks = json!([{"type": "text", "text": "see"}, {"type": "text", "text": text}]);
        assert_eq!(judged(&user(blocks)), format!("prompt unlabelled: see\n{text}"));
    }
    for text in ["<div>x</div>", "<ticket>7</ticket>", "<goals>x", "<goal", "< tick>", "a <tick>1</tick>"] {
        assert_eq!(judged(&user(text)), format!("prompt unlabelled: {text}"));
    }
}

#[test]
fn sentences_of_the_program_are_no_turns() {
    for (text, expected) in [
        ("[Request interrupted by user]", "no: interrupt"),
        (" [Request interrupted by user for tool use]\n", "no: interrupt"),
        ("[Request interrupted by user]\nhi", HI),
        ("Caveat: The messages below were generated by the user", "no: sentence of the program"),
        ("Operation stopped by hook: no", "no: sentence of the program"),
        ("Another Claude session sent a message:\n<agent-message>x", "no: sentence of the program"),
        ("Another Claude session sent a message: hi", "prompt unlabelled: Another Claude session sent a message: hi"),
        ("a [Request interrupted by user]", "prompt unlabelled: a [Request interrupted by user]"),
        ("[Request interrupted by users]", "prompt unlabelled: [Request interrupted by users]"),
    ] {
        assert_eq!(judged(&user(text)), expected, "{text}");
    }
    assert_eq!(judged(&typed("[Request interrupted by user]\n")), "no: interrupt");
    for text in [
        "[Request interrupted by user] why?",
        "Operation stopped by hook: no",
        "Caveat: The messages below were generated",
    ] {
        assert_eq!(judged(&typed(text)), format!("prompt typed: {text}"));
    }
}

#[test]
fn what_is_empty_is_no_turn() {
    for text in ["", " \n\t", "\u{1f}"] {
        assert_eq!(judged(&user(text)), "no: empty", "{text:?}");
    }
    assert_eq!(judged(&user(json!([{"type": "other"}]))), "no: empty");
    assert_eq!(judged(&user("<command-name></command-name>")), "no: empty command");
    assert_eq!(judged(&user("<bash-input> </bash-input>")), "no: empty shell");
    assert_eq!(
        judged(&queued(json!({"humanTurn": true, "prompt": "<bash-input>ls</bash-input>"}))),
        "queued typed: ls"
    );
}

/// Each of these made another reader of the same text look at all of it for each of its tags.
#[test]
fn hostile_texts_take_time_as_their_length() {
    for piece in [
        "<system-reminder>x</system-reminder>",
        "<pasted_content id=\"1\">",
        "</pasted_content id=\"",
        "<pasted_content id=\"1\"></pasted_content id=\"2\">",
        "<ide_a>\n",
        "\n</ide_a>",
    ] {
        let text = piece.repeat(2_000_000 / piece.len());
        let begun = std::time::Instant::now();
        judged(&user(text.as_str()));
        judged(&user(format!("{text}</ide_b>")));
        assert!(begun.elapsed().as_secs() < 5, "{piece}: {:?}", begun.elapsed());
    }
}
