//! From the lines of one rollout to what was said in it, each message once.
//!
//! # Which lines count
//!
//! The first line says whose session it is, and whether a person talks in it at all: sub-agents and reviewers are left out.
//! Of the forms in which a message may stand ([`Form`]) one counts in a file, decided by what comes first, never two: items,
//! else events, else the model's own input and output. The latter are kept back until the turn has ended without another
//! form. Only a prompt with a picture may have no item of its own: its input counts where no item follows.
//!
//! # Identity
//!
//! Files are compressed, migrated to the other form and copied by forks, with new ids and times. What stays is the turn's id
//! and the text. So a message is identified by turn, actor, the text's hash, and how many with the same text came before in
//! this turn. Without a turn (old files, and what was migrated from them): by the thread of the last `session_meta`, and the
//! number of the actor's messages behind it.
//!
//! # Whose turn it is
//!
//! A legacy fork holds the lines of the thread it was forked from, behind that one's `session_meta`, with new times; its own
//! follow without a mark. A turn belongs to the thread that had begun last when the turn was started.
//!
//! Nothing of this is stored: reading what is before the cursor again gives it again.

use std::collections::HashMap;

use jiff::Timestamp;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::line::{self, Content, Form};
pub(crate) use super::line::{Message, SessionMeta};
use crate::transcript::Actor;

/// Messages that are kept back at most. Then nothing else comes: they count.
const KEPT_BACK_MAX: usize = 256;

/// What is remembered from one line to the next.
#[derive(Clone, Default, PartialEq, Debug)]
pub(crate) struct Rollout {
    standing: Standing,
    /// Its own thread, then those whose lines were copied into it, and when each had begun.
    threads: Vec<(Uuid, Option<Timestamp>)>,
    /// The thread of the last `session_meta`.
    nearest: Uuid,
    form: Option<Form>,
    turn: Turn,
    /// Messages of the user, and of the agent, since the last `session_meta`.
    prompts: u64,
    answers: u64,
    kept_back: Vec<Said>,
    pub(crate) cwd: Option<String>,
    pub(crate) git_branch: Option<String>,
    /// Of the program that began the file.
    pub(crate) version: Option<String>,
    model: Option<String>,
    provenance: Option<&'static str>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
enum Standing {
    /// No line was read yet.
    #[default]
    New,
    Followed,
    /// It does not begin with a `session_meta`.
    NoRollout,
    SubAgent,
}

/// The turn that was started last.
#[derive(Clone, Default, PartialEq, Debug)]
struct Turn {
    id: Option<String>,
    started_at: Option<Timestamp>,
    has_prompt: bool,
    /// How many messages of an actor had a text, by its hash.
    said: HashMap<(Actor, [u8; 32]), u64>,
}

/// Something that was said, by the human or by the agent.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Said {
    /// In which session.
    pub(crate) thread: Uuid,
    /// Of all that is said, in whichever file it stands: the same in each copy.
    pub(crate) uuid: Uuid,
    pub(crate) message: Message,
    pub(crate) timestamp: Option<Timestamp>,
    /// How the human said it.
    pub(crate) kind: Option<&'static str>,
    pub(crate) provenance: Option<&'static str>,
    pub(crate) cwd: Option<String>,
    pub(crate) model: Option<String>,
}

/// What a line led to.
#[derive(Default, PartialEq, Debug)]
pub(crate) struct Reading {
    pub(crate) at: Option<Timestamp>,
    pub(crate) is_activity: bool,
    pub(crate) said: Vec<Said>,
    /// Why words on the user's side are no turn.
    pub(crate) no_turn: Option<&'static str>,
    pub(crate) unknown: Option<(&'static str, String)>,
}

impl Rollout {
    /// The session's identity: the thread of the first line. `None`: the file is not followed.
    pub(crate) fn session(&self) -> Option<Uuid> {
        self.threads.first().filter(|_| self.standing == Standing::Followed).map(|(thread, _)| *thread)
    }

    /// Reads the next line, which is one JSON object; the error says why it is none.
    pub(crate) fn read(&mut self, line: &str) -> Result<Reading, serde_json::Error> {
        let line::Line { at, is_activity, content, unknown } = line::read(line)?;
        let mut reading = Reading { at, is_activity, unknown, ..Reading::default() };
        if self.standing == Standing::New && !matches!(content, Content::Session(_)) {
            self.standing = Standing::NoRollout;
        }
        if self.standing == Standing::NoRollout {
            return Ok(Reading::default());
        }
        match content {
            Content::Session(meta) => self.begin_thread(&meta),
            _ if self.standing == Standing::SubAgent => {
                let is_prompt = |message: &Message| message.actor == Actor::User && message.form != Form::Response;
                reading.no_turn = match &content {
                    Content::Message(message) if is_prompt(message) => Some("sub_agent"),
                    _ => None,
                };
            }
            Content::TurnStarted { turn_id, started_at } => {
                // What stands before the first turn belongs to it.
                if self.turn.id.is_some() {
                    self.release(&mut reading.said);
                }
                self.enter(turn_id, started_at);
            }
            Content::TurnEnded => self.release(&mut reading.said),
            Content::Context { cwd, model } => {
                self.cwd = cwd.or(self.cwd.take());
                self.model = model.or(self.model.take());
            }
            Content::Message(message) => self.take(message, &mut reading),
            Content::Injected => reading.no_turn = Some("injected"),
            Content::Other => {}
        }
        Ok(reading)
    }

    fn begin_thread(&mut self, meta: &SessionMeta) {
        if self.threads.is_empty() {
            self.standing = if meta.is_sub_agent { Standing::SubAgent } else { Standing::Followed };
            self.cwd = meta.cwd.clone();
            self.git_branch = meta.git_branch.clone();
            self.version = meta.version.clone();
            self.provenance = Some(match (meta.source.as_deref(), meta.originator.as_deref()) {
                (Some("exec"), _) | (_, Some("codex_exec")) => "sdk",
                (_, Some("codex-tui" | "codex_cli_rs")) => "typed",
                (_, Some("codex_vscode" | "codex_work_desktop")) => "app",
                _ => "unlabelled",
            });
        }
        // Copied twice it is still the same thread, and the lines behind it are its own.
        if !self.threads.iter().any(|(thread, _)| *thread == meta.thread) {
            self.threads.push((meta.thread, meta.began_at));
        }
        self.nearest = meta.thread;
        (self.turn, self.prompts, self.answers) = (Turn::default(), 0, 0);
    }

    /// Goes on in this turn.
    fn enter(&mut self, id: Option<String>, started_at: Option<Timestamp>) {
        // An id that a migration made up is another in each file.
        let id = id.filter(|id| !id.starts_with("rollout-"));
        if id.is_none() || self.turn.id != id {
            self.turn = Turn { id, started_at, ..Turn::default() };
        }
    }

    fn take(&mut self, mut message: Message, reading: &mut Reading) {
        if message.turn_id.is_some() && message.turn_id != self.turn.id {
            self.release(&mut reading.said);
            self.enter(message.turn_id.take(), None);
        }
        if identifying(&message.text).is_empty() {
            reading.no_turn = (message.actor == Actor::User && self.form == Some(message.form)).then_some("empty");
            return;
        }
        let is_picture = |said: &Said| said.message.actor == Actor::User && said.message.has_attachment;
        match (self.form, message.form) {
            (Some(form), _) if form == message.form => {}
            (None, Form::Response) => {
                let said = self.said(message, reading.at);
                self.kept_back.push(said);
                if self.kept_back.len() >= KEPT_BACK_MAX {
                    self.release(&mut reading.said);
                }
                return;
            }
            (None, form) => {
                self.form = Some(form);
                self.kept_back.retain(|said| form == Form::Item && is_picture(said));
            }
            (Some(Form::Item), Form::Response) if message.actor == Actor::User && message.has_attachment => {
                let said = self.said(message, reading.at);
                self.kept_back.push(said);
                return;
            }
            _ => return,
        }
        match message.actor {
            // It is the item, or the event, of what was kept back.
            Actor::User => self.kept_back.clear(),
            Actor::Agent => self.release(&mut reading.said),
        }
        let mut said = self.said(message, reading.at);
        self.identify(&mut said);
        reading.said.push(said);
    }

    /// What was kept back counts: nothing else is to come.
    fn release(&mut self, released: &mut Vec<Said>) {
        if !self.kept_back.is_empty() {
            self.form.get_or_insert(Form::Response);
        }
        for mut said in std::mem::take(&mut self.kept_back) {
            self.identify(&mut said);
            released.push(said);
        }
    }

    fn said(&self, mut message: Message, written_at: Option<Timestamp>) -> Said {
        let is_user = message.actor == Actor::User;
        let started_at = self.turn.started_at;
        let own = self.threads.first().map_or(Uuid::nil(), |(thread, _)| *thread);
        // A fork is begun at some moment of a second of which turns know only the number.
        let had_begun = |began_at: &Option<Timestamp>| {
            began_at
                .zip(started_at)
                .is_some_and(|(began_at, started_at)| began_at.as_second() <= started_at.as_second())
        };
        let begun = self.threads.iter().filter(|(_, began_at)| had_begun(began_at));
        let thread = begun.max_by_key(|(_, began_at)| *began_at).map_or(own, |(thread, _)| *thread);
        if is_user {
            message.message_id = self.turn.id.clone();
        }
        Said {
            thread,
            uuid: Uuid::nil(),
            // The line of a copied turn has the time of the copy.
            timestamp: message.completed_at.or(if thread == own { written_at } else { started_at }),
            kind: None,
            provenance: self.provenance.filter(|_| is_user),
            cwd: self.cwd.clone(),
            model: self.model.clone().filter(|_| !is_user),
            message,
        }
    }

    /// Gives a message its identity: it is the next one of its turn.
    fn identify(&mut self, said: &mut Said) {
        let Message { actor, text, .. } = &said.message;
        let (actor, name) = (*actor, actor.as_str());
        let hash: [u8; 32] = Sha256::digest(identifying(text)).into();
        let number = if actor == Actor::User { &mut self.prompts } else { &mut self.answers };
        let place = match &self.turn.id {
            Some(turn) => {
                let equal = self.turn.said.entry((actor, hash)).or_default();
                *equal += 1;
                format!("{turn}/{name}/{}", *equal - 1)
            }
            None => format!("{}/{name}#{number}", self.nearest),
        };
        *number += 1;
        said.uuid = Uuid::new_v5(&NAMESPACE, &[place.as_bytes(), b"/", &hash].concat());
        if actor == Actor::User {
            // What is typed while the agent works goes into the turn that runs.
            let is_queued = self.turn.id.is_some() && std::mem::replace(&mut self.turn.has_prompt, true);
            said.kind = Some(if is_queued { "queued" } else { "prompt" });
        }
    }
}

/// Namespace of what is said in the Codex CLI (a random UUID, fixed for ever).
const NAMESPACE: Uuid = Uuid::from_u128(0x1c4e_8d0b_52a7_4f3e_8b6d_9a20_f7e1_35c8);

/// Of a text what is the same in each form: without the marks `[Image #1]` that stand for pictures, here before the
/// text and there behind it, and without blanks at its end.
fn identifying(text: &str) -> String {
    let mut rest = text;
    let mut kept = String::with_capacity(text.len());
    let mut has_marks = false;
    while let Some((before, after)) = rest.split_once("[Image #") {
        let end = after.find(|c: char| !c.is_ascii_digit()).filter(|end| *end > 0);
        match end.and_then(|end| after.get(end..)?.strip_prefix(']')) {
            Some(behind) => {
                kept.push_str(before);
                has_marks = true;
                rest = behind;
            }
            None => {
                kept.push_str(before);
                kept.push_str("[Image #");
                rest = after;
            }
        }
    }
    kept.push_str(rest);
    let kept = if has_marks { kept.trim() } else { kept.trim_end() };
    kept.to_owned()
}

/// What the first line of a rollout says of its session; `None` where it is none, or not complete.
pub(crate) fn session_of(head: &[u8]) -> Option<SessionMeta> {
    let (first, _) = head.split_at(memchr::memchr(b'\n', head)?);
    match line::read(std::str::from_utf8(first).ok()?).ok()?.content {
        Content::Session(meta) => Some(*meta),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const OWN: Uuid = Uuid::from_u128(1);
    const PARENT: Uuid = Uuid::from_u128(2);
    const AT: &str = "2026-01-03T10:00:00.000Z";

    fn line(kind: &str, payload: Value) -> Value {
        json!({"timestamp": AT, "type": kind, "payload": payload})
    }

    fn meta(thread: Uuid, began_at: &str, further: Value) -> Value {
        let mut payload =
            json!({"id": thread, "timestamp": began_at, "cwd": "/app", "originator": "codex-tui", "source": "cli"});
        payload.as_object_mut().unwrap().extend(further.as_object().unwrap().clone());
        line("session_meta", payload)
    }

    fn started(turn: &str, at: &str) -> Value {
        let seconds = at.parse::<Timestamp>().unwrap().as_second();
        line("event_msg", json!({"type": "task_started", "turn_id": turn, "started_at": seconds}))
    }

    fn ended() -> Value {
        line("event_msg", json!({"type": "task_complete"}))
    }

    /// A message of a user (`>`) or an agent in one of the forms.
    fn message(form: Form, turn: &str, text: &str) -> Value {
        let (is_user, text) = text.strip_prefix('>').map_or((false, text), |text| (true, text));
        let pick = |user, agent| if is_user { user } else { agent };
        match form {
            Form::Item => {
                let content = json!([{"type": pick("text", "Text"), "text": text}]);
                let item = json!({"type": pick("UserMessage", "AgentMessage"), "content": content});
                line("event_msg", json!({"type": "item_completed", "turn_id": turn, "item": item}))
            }
            Form::Event => line("event_msg", json!({"type": pick("user_message", "agent_message"), "message": text})),
            Form::Response => {
                let content = json!([{"type": pick("input_text", "output_text"), "text": text}]);
                line("response_item", json!({"type": "message", "role": pick("user", "assistant"), "content": content}))
            }
        }
    }

    fn said(lines: &[Value]) -> Vec<Said> {
        let mut rollout = Rollout::default();
        lines.iter().flat_map(|line| rollout.read(&line.to_string()).unwrap().said).collect()
    }

    fn texts(lines: &[Value]) -> Vec<String> {
        said(lines).into_iter().map(|said| format!("{} {}", said.message.actor.as_str(), said.message.text)).collect()
    }

    fn uuids(lines: &[Value]) -> Vec<Uuid> {
        said(lines).into_iter().map(|said| said.uuid).collect()
    }

    /// The same conversation as a file of each form has it, its model's input first.
    fn conversation(form: Form) -> Vec<Value> {
        let context = message(Form::Response, "t1", "> <environment_context>…</environment_context>");
        let mut lines = vec![meta(OWN, AT, json!({})), started("t1", AT), context];
        for (turn, text) in [("t1", ">hello"), ("t1", "Hi."), ("t1", ">hello"), ("t1", "Hi."), ("t2", ">hello")] {
            if turn == "t2" {
                lines.extend([ended(), started("t2", AT)]);
            }
            if form != Form::Response {
                lines.push(message(Form::Response, turn, text));
            }
            lines.push(message(form, turn, text));
        }
        lines.push(ended());
        lines
    }

    #[test]
    fn each_message_counts_once_in_each_form_and_has_the_same_identity() {
        let expected = ["user hello", "agent Hi.", "user hello", "agent Hi.", "user hello"];
        let forms = [Form::Item, Form::Event, Form::Response].map(conversation);
        for lines in &forms {
            assert_eq!(texts(lines), expected);
            assert_eq!(uuids(lines), uuids(&forms[0]));
        }
        let mut uuids = uuids(&forms[0]);
        uuids.sort_unstable();
        uuids.dedup();
        assert_eq!(uuids.len(), expected.len(), "equal texts are told apart");
        let kinds: Vec<_> = said(&forms[0]).into_iter().filter_map(|said| said.kind).collect();
        assert_eq!(kinds, ["prompt", "queued", "prompt"]);
    }

    #[test]
    fn the_models_own_input_counts_only_when_the_turn_has_ended_without_another_form() {
        let lines = conversation(Form::Response);
        assert_eq!(texts(&lines[..lines.len() - 4]), [""; 0], "items may follow");
        // One form for good: what comes later in another is a second copy.
        let mut lines = lines.clone();
        lines.extend([started("t3", AT), message(Form::Event, "t3", ">more"), message(Form::Response, "t3", ">more")]);
        assert_eq!(texts(&lines).len(), 6);
        let unfinished: Vec<Value> = std::iter::once(meta(OWN, AT, json!({})))
            .chain((0..KEPT_BACK_MAX).map(|number| message(Form::Response, "", &number.to_string())))
            .collect();
        assert_eq!(texts(&unfinished).len(), KEPT_BACK_MAX, "a file without any turn");
    }

    #[test]
    fn a_copied_turn_belongs_to_the_thread_that_ran_when_it_was_started() {
        let grandparent = Uuid::from_u128(3);
        let began = ["2026-01-03T07:00:00Z", "2026-01-03T08:00:00Z", "2026-01-03T09:00:00Z"];
        let lines = [
            meta(OWN, began[2], json!({"forked_from_id": PARENT})),
            meta(PARENT, began[1], json!({"forked_from_id": grandparent})),
            meta(grandparent, began[0], json!({})),
            started("t1", "2026-01-03T07:30:00Z"),
            message(Form::Event, "", ">first"),
            started("t2", "2026-01-03T08:30:00Z"),
            message(Form::Event, "", ">second"),
            started("t3", "2026-01-03T09:00:00Z"),
            message(Form::Event, "", ">third"),
        ];
        let said = said(&lines);
        assert_eq!(said.iter().map(|said| said.thread).collect::<Vec<_>>(), [grandparent, PARENT, OWN]);
        let times: Vec<String> =
            said.iter().map(|said| said.timestamp.unwrap().strftime("%H:%M").to_string()).collect();
        assert_eq!(times, ["07:30", "08:30", "10:00"], "the lines have the time of the copy");
        let in_parent = [&[meta(PARENT, began[1], json!({}))], &lines[5..7]].concat();
        assert_eq!(uuids(&in_parent), [said[1].uuid]);
    }

    #[test]
    fn without_a_turn_the_thread_and_the_number_identify() {
        let old = |first: &[Value]| {
            let rest = [message(Form::Event, "", ">a"), message(Form::Event, "", "b"), message(Form::Event, "", ">a")];
            uuids(&[first, &rest].concat())
        };
        let original = old(&[meta(PARENT, AT, json!({}))]);
        let copied = old(&[meta(OWN, AT, json!({"forked_from_id": PARENT})), meta(PARENT, AT, json!({}))]);
        assert_eq!(original, copied);
        assert_ne!(original[0], original[2]);
        assert_ne!(original, old(&[meta(OWN, AT, json!({}))]));
        let migrated = |turn: &str| uuids(&[meta(OWN, AT, json!({})), message(Form::Item, turn, ">a")]);
        assert_eq!(migrated("rollout-3"), migrated("rollout-7"), "ids that a migration makes up");
    }

    #[test]
    fn files_of_agents_and_what_is_no_rollout_are_left_out() {
        for source in [
            json!({"source": {"subagent": "review"}}),
            json!({"thread_source": "guardian_review"}),
            json!({"parent_thread_id": PARENT}),
        ] {
            let mut rollout = Rollout::default();
            rollout.read(&meta(OWN, AT, source).to_string()).unwrap();
            let reading = rollout.read(&message(Form::Item, "t", ">do it").to_string()).unwrap();
            assert_eq!((rollout.session(), reading.said.len(), reading.no_turn), (None, 0, Some("sub_agent")));
        }
        assert_eq!(texts(&[started("t", AT), meta(OWN, AT, json!({})), message(Form::Item, "t", ">a")]), [""; 0]);
    }

    #[test]
    fn a_prompt_with_a_picture_counts_also_without_an_item() {
        let picture = |text: &str| {
            let content = json!([{"type": "input_text", "text": text}, {"type": "input_image", "image_url": "data:"}]);
            let passed = json!({"turn_id": "t", "content_item_kinds": ["user.text", "user.image"]});
            line(
                "response_item",
                json!({"type": "message", "role": "user", "content": content,
                "internal_chat_message_metadata_passthrough": passed}),
            )
        };
        let begin = [meta(OWN, AT, json!({})), started("t", AT)];
        let answer = message(Form::Item, "t", "I see.");
        let without = [&begin[..], &[picture("[Image #1] look"), answer.clone()]].concat();
        let found = said(&without);
        assert_eq!(texts(&without), ["user [Image #1] look", "agent I see."]);
        assert!(found[0].message.has_attachment);
        let with = [&begin[..], &[picture("[Image #1] look"), message(Form::Item, "t", ">look\n\n[Image #1]"), answer]];
        assert_eq!(texts(&with.concat()), ["user look\n\n[Image #1]", "agent I see."]);
        assert_eq!(uuids(&with.concat()), uuids(&without), "the mark stands elsewhere in each");
    }

    #[test]
    fn only_a_persons_blocks_of_the_input_count_where_it_says_whose_they_are() {
        let content = json!([{"type": "input_text", "text": "skills…"}, {"type": "input_text", "text": "hello"}]);
        let passed = json!({"turn_id": "t", "content_item_kinds": ["skills", "user.text"]});
        let prompt = line(
            "response_item",
            json!({"type": "message", "role": "user", "content": content,
            "internal_chat_message_metadata_passthrough": passed}),
        );
        assert_eq!(texts(&[meta(OWN, AT, json!({})), started("t", AT), prompt, ended()]), ["user hello"]);
    }

    #[test]
    fn what_is_said_in_an_unknown_form_is_told() {
        let unknown = |line: Value| {
            Rollout { standing: Standing::Followed, ..Rollout::default() }.read(&line.to_string()).unwrap().unknown
        };
        let item = json!({"type": "item_completed", "item": {"type": "TeamMessage"}});
        assert_eq!(unknown(line("event_msg", item)), Some(("item", "TeamMessage".to_owned())));
        assert_eq!(unknown(line("brand_new", json!({}))), Some(("type", "brand_new".to_owned())));
        assert_eq!(unknown(line("event_msg", json!({"type": "item_completed", "item": {"type": "Plan"}}))), None);
    }
}
