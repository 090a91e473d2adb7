//! Replaces keys and tokens in text before anything is written: `redact` in the configuration.
//!
//! The built-in patterns know what a secret looks like, or the words that stand before one. Patterns of the
//! configuration are added to them. What a pattern matches becomes `[redacted]`; where it has a group named `secret`,
//! only that does.
//!
//! What is looked at: every string of a payload but those that say what an event is and what it belongs to
//! ([`is_exempt`]), at any depth, and the kept bytes of rejected input. Off by default, and then it costs nothing.

use std::borrow::Cow;
use std::ops::Range;

use regex::{Regex, RegexSet};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::config::RedactConfig;
use crate::event::Record;

/// What stands where a secret stood.
const REPLACEMENT: &str = "[redacted]";

/// How often the built-in patterns are searched for: what stands beside a secret may be one only once that is replaced.
const ROUNDS_MAX: usize = 4;

/// Known forms of secrets, then words that announce one. No match of one may be matched again once it is replaced.
///
/// `\b` in them is an ASCII word boundary ([`built_in`]). It finds whatever a Unicode one would, as long as what stands on
/// its inner side is always `[A-Za-z0-9_]`: no `-`, and under `(?i)` neither `s` nor `k`, which are also `ſ` and the Kelvin
/// sign.
const BUILT_IN: &[&str] = &[
    // Private keys in PEM, to their end or to the end of the text.
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\z)",
    // Anthropic, OpenAI, Stripe and others of that form.
    r"\bsk-[A-Za-z0-9_-]{16,}",
    r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}",
    // GitHub, GitLab, npm, PyPI, Hugging Face.
    r"\bgh[pousr]_[A-Za-z0-9]{30,}",
    r"\bgithub_pat_[A-Za-z0-9_]{30,}",
    r"\bglpat-[A-Za-z0-9_-]{20,}",
    r"\bnpm_[A-Za-z0-9]{30,}",
    r"\bpypi-[A-Za-z0-9_-]{40,}",
    r"\bhf_[A-Za-z0-9]{30,}",
    // AWS key ids, Google API keys and OAuth tokens, Slack tokens and hooks, SendGrid, Telegram bots.
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    r"\bAIza[A-Za-z0-9_-]{35}",
    r"\bya29\.[A-Za-z0-9_-]{20,}",
    r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    r"https://hooks\.slack\.com/services/(?P<secret>[A-Za-z0-9/_+-]{20,})",
    r"\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
    r"\b[0-9]{8,10}:[A-Za-z0-9_-]{34}(?:-|[A-Za-z0-9_]\b)",
    // JSON Web Tokens.
    r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    // Authorization: Bearer … and Basic …
    r"(?i)\b(?:bearer|basic)\s+(?P<secret>[A-Za-z0-9._~+/=-]{16,})",
    // The password of a URL: scheme://user:password@host
    r"\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s:/@]*:(?P<secret>[^\s/@]+)@",
    // NAME=value and "name": "value" where the end of the name says what it is. A part of the value may be replaced already.
    r#"(?i)(?:api[_-]?key|access[_-]?key|private[_-]?key|secret|passwd|password|passphrase|token|credentials?)[a-z0-9_]*["']?\s*[:=]\s*["']?(?P<secret>[^\s"',;&\[\]{}]{6,}(?:\[redacted\][^\s"',;&\[\]{}]*)*|[^\s"',;&\[\]{}]*(?:\[redacted\][^\s"',;&\[\]{}]*)+)"#,
];

/// A pattern of the configuration is no regular expression, or one that is too large.
#[derive(Debug, Error)]
#[error("redact.patterns[{index}]: '{pattern}' can't be used as a regular expression: {problem}")]
pub(crate) struct PatternError {
    /// Place in the list, from 0.
    pub index: usize,
    pub pattern: String,
    /// What is wrong with it, in one line.
    pub problem: String,
}

/// Replaces secrets; does nothing where redaction is off.
#[derive(Default)]
pub(crate) struct Redactor {
    /// The built-in ones, then those of the configuration: one of these that is slow must not make the others slow. None
    /// where redaction is off.
    patterns: Vec<Patterns>,
}

struct Patterns {
    /// All of them at once, to know in one pass which match.
    set: RegexSet,
    each: Vec<Regex>,
}

impl Patterns {
    /// Of patterns that have been tried one by one.
    fn new<'a>(patterns: impl Iterator<Item = &'a str>) -> Patterns {
        let all: Vec<&str> = patterns.collect();
        let each = all.iter().filter_map(|pattern| Regex::new(pattern).ok()).collect();
        // Together they may be larger than one alone may be.
        let set = regex::RegexSetBuilder::new(&all).size_limit(256 << 20).build().unwrap_or_else(|_| RegexSet::empty());
        Patterns { set, each }
    }

    /// `text` with every match of each pattern replaced; `None` where there is none. All are searched for in the text as it
    /// is, so that a secret within another one does not hide the ends of that.
    fn redact_matches(&self, text: &str) -> Option<String> {
        let matching = self.set.matches(text);
        let matching =
            self.each.iter().enumerate().filter(|(index, _)| self.set.is_empty() || matching.matched(*index));
        let mut found: Vec<Range<usize>> = matching.flat_map(|(_, pattern)| secrets(pattern, text)).collect();
        if found.is_empty() {
            return None;
        }
        found.sort_unstable_by_key(|range| range.start);
        let mut redacted = String::new();
        let mut copied = 0;
        for range in found {
            if range.start >= copied {
                redacted.push_str(text.get(copied..range.start).unwrap_or_default());
                redacted.push_str(REPLACEMENT);
            }
            copied = copied.max(range.end);
        }
        redacted.push_str(text.get(copied..).unwrap_or_default());
        Some(redacted)
    }
}

/// What a pattern strikes out of a text.
fn secrets(pattern: &Regex, text: &str) -> impl Iterator<Item = Range<usize>> {
    let found = pattern.captures_iter(text).filter_map(|captures| captures.name("secret").or_else(|| captures.get(0)));
    found.filter(|found| !found.is_empty() && found.as_str() != REPLACEMENT).map(|found| found.range())
}

/// The built-in patterns with ASCII word boundaries: what they look for is ASCII. A Unicode `\b` beside other text is known
/// to no automaton of regex, so that the whole set would be searched character by character, 300 times as slowly.
fn built_in() -> impl Iterator<Item = String> {
    BUILT_IN.iter().map(|pattern| pattern.replace(r"\b", r"(?-u:\b)"))
}

impl Redactor {
    /// Compiles the patterns, where redaction is on.
    pub(crate) fn new(config: &RedactConfig) -> Result<Redactor, PatternError> {
        for (index, pattern) in config.patterns.iter().enumerate() {
            // Also looked at while redaction is off, so that switching it on is no surprise.
            Regex::new(pattern).map_err(|error| PatternError {
                index,
                pattern: pattern.clone(),
                problem: last_line(&error.to_string()),
            })?;
        }
        if !config.enabled {
            return Ok(Redactor::default());
        }
        Ok(Redactor::of(config.patterns.iter().map(String::as_str)))
    }

    /// The built-in set and those of `patterns` that can be used: for the hook, which must not fail.
    pub(crate) fn careful(patterns: &[String]) -> Redactor {
        Redactor::of(patterns.iter().map(String::as_str).filter(|pattern| Regex::new(pattern).is_ok()))
    }

    /// Of patterns that have been tried one by one.
    fn of<'a>(added: impl Iterator<Item = &'a str>) -> Redactor {
        let built_in: Vec<String> = built_in().collect();
        Redactor { patterns: vec![Patterns::new(built_in.iter().map(String::as_str)), Patterns::new(added)] }
    }

    pub(crate) fn is_on(&self) -> bool {
        !self.patterns.is_empty()
    }

    /// `text` without secrets; borrowed where there are none.
    pub(crate) fn text<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut redacted = Cow::Borrowed(text);
        for (patterns, rounds) in self.patterns.iter().zip([ROUNDS_MAX, 1]) {
            for _ in 0..rounds {
                let Some(replaced) = patterns.redact_matches(&redacted) else { break };
                redacted = Cow::Owned(replaced);
            }
        }
        redacted
    }

    /// Redacts a payload in place.
    pub(crate) fn payload(&self, payload: &mut Map<String, Value>) {
        if !self.is_on() {
            return;
        }
        for (name, value) in payload.iter_mut() {
            if !is_exempt(name, value) {
                self.value(value);
            }
        }
    }

    /// Input as it came, redacted as text: what is no UTF-8 is replaced where anything is redacted.
    pub(crate) fn bytes(&self, bytes: Vec<u8>) -> Vec<u8> {
        if !self.is_on() {
            return bytes;
        }
        let text = String::from_utf8_lossy(&bytes);
        match self.text(&text) {
            Cow::Borrowed(_) => bytes,
            Cow::Owned(redacted) => redacted.into_bytes(),
        }
    }

    /// Redacts what is to be left in the spool.
    pub(crate) fn record(&self, record: Record) -> Record {
        match record {
            Record::Event(mut candidate) => {
                self.payload(&mut candidate.payload);
                Record::Event(candidate)
            }
            Record::Rejected(mut rejection) => {
                rejection.bytes = self.bytes(rejection.bytes);
                Record::Rejected(rejection)
            }
        }
    }

    /// Depth is bounded by what makes a payload.
    fn value(&self, value: &mut Value) {
        match value {
            Value::String(text) => {
                if let Cow::Owned(redacted) = self.text(text) {
                    *text = redacted;
                }
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.value(item)),
            Value::Object(members) => {
                for value in members.values_mut() {
                    self.value(value);
                }
                if members.keys().any(|key| matches!(self.text(key), Cow::Owned(_))) {
                    *members =
                        std::mem::take(members).into_iter().map(|(k, v)| (self.text(&k).into_owned(), v)).collect();
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
}

/// Whether a field of a payload says what an event is, when, or what it belongs to: no place for free text, and redacted
/// it would make the event useless.
fn is_exempt(name: &str, value: &Value) -> bool {
    const NAMES: &[&str] = &["actor", "kind", "source", "trigger", "hook_type", "from_state", "to_state"];
    let is_word = |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    NAMES.contains(&name)
        || ["_id", "_uuid", "_at", "_timestamp"].iter().any(|end| name.ends_with(end))
        // A session's reason is a word, a denial's may be a sentence.
        || (name == "reason" && value.as_str().is_some_and(is_word))
}

/// What regex says is a drawing of several lines; the last one is the cause.
fn last_line(message: &str) -> String {
    let line = message.lines().last().unwrap_or_default().trim();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn redactor(patterns: &[&str]) -> Redactor {
        let patterns = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
        Redactor::new(&RedactConfig { enabled: true, patterns }).unwrap()
    }

    /// Made of two parts, so that no scanner takes these lines for leaked secrets.
    fn token(prefix: &str, rest: &str) -> String {
        format!("{prefix}{rest}")
    }

    #[test]
    fn keys_and_tokens_are_struck_out_and_what_stands_around_them_is_kept() {
        let redactor = redactor(&[]);
        let letters = "Ab3dEf6hIj9lMn2pQr5tUv8xYz1bCd4fGh7jKl0n";
        for secret in [
            token("sk-", "ant-api03-abcdefghijklmnop"),
            token("ghp_", letters),
            token("github_pat_", letters),
            token("glpat-", letters),
            token("AKIA", "ABCDEFGHIJKLMNOP"),
            token("AIza", &letters[..35]),
            token("xoxb-", "123456789012-abcdef"),
            token("npm_", letters),
            token("hf_", letters),
            token("sk_live_", letters),
            token("eyJ", "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0.SflKxwRJSMeKKF2QT4"),
            format!("-----BEGIN {} KEY-----\nMIIE\nabc\n-----END {} KEY-----", "RSA PRIVATE", "RSA PRIVATE"),
        ] {
            let text = format!("before {secret} after");
            assert_eq!(redactor.text(&text), "before [redacted] after", "{secret}");
        }
        assert_eq!(redactor.text("Authorization: Bearer abcdefghijklmnop"), "Authorization: Bearer [redacted]");
        assert_eq!(redactor.text("postgresql://me:hunter2@host/db"), "postgresql://me:[redacted]@host/db");
        assert_eq!(redactor.text("export DB_PASSWORD='correct horse'"), "export DB_PASSWORD='[redacted] horse'");
        assert_eq!(redactor.text(r#"{"api_key": "abcdef123"}"#), r#"{"api_key": "[redacted]"}"#);
    }

    #[test]
    fn plain_text_is_left_alone() {
        let redactor = redactor(&[]);
        for text in [
            "fix the login test",
            "the token is refreshed by the server",
            "see https://example.com/a:b and user@example.com",
            "11111111-2222-4333-8444-555555555555",
            "task-force and risk-averse",
            "/home/me/secret-project/src/password.rs",
        ] {
            assert!(matches!(redactor.text(text), Cow::Borrowed(_)), "{text}: {}", redactor.text(text));
        }
    }

    #[test]
    fn redacting_again_changes_nothing() {
        let redactor = redactor(&[]);
        let once = redactor.text("token=abcdefgh secret: \"hunter22\" Bearer abcdefghijklmnop").into_owned();
        assert_eq!(redactor.text(&once), once);
    }

    #[test]
    fn patterns_are_added_and_reach_every_depth_but_not_what_identifies_an_event() {
        let redactor = redactor(&[r"ACME-\d+", "user|polling|fixed"]);
        let mut payload = json!({
            "session_uuid": "ACME-1", "actor": "user", "source": "polling", "text": "see ACME-22",
            "metadata": {"ACME-3": ["ACME-4", {"x": "ACME-5"}]}
        });
        let Value::Object(map) = &mut payload else { unreachable!() };
        redactor.payload(map);
        assert_eq!(
            payload,
            json!({
                "session_uuid": "ACME-1", "actor": "user", "source": "polling", "text": "see [redacted]",
                "metadata": {"[redacted]": ["[redacted]", {"x": "[redacted]"}]}
            })
        );
    }

    #[test]
    fn it_is_off_until_it_is_enabled_and_a_bad_pattern_is_named_all_the_same() {
        let off = Redactor::new(&RedactConfig { enabled: false, patterns: vec!["a".into()] }).unwrap();
        assert_eq!(off.text("a Bearer abcdefghijklmnopq"), "a Bearer abcdefghijklmnopq");
        for enabled in [true, false] {
            let config = RedactConfig { enabled, patterns: vec!["fine".into(), "(open".into()] };
            let error = Redactor::new(&config).err().unwrap().to_string();
            assert_eq!(error, "redact.patterns[1]: '(open' can't be used as a regular expression: unclosed group");
        }
        assert_eq!(Redactor::careful(&["(open".into(), "x+".into()]).text("xx"), "[redacted]");
    }

    #[test]
    fn a_secret_beside_letters_that_are_not_ascii_is_found() {
        let redactor = redactor(&[]);
        let letters = "Ab3dEf6hIj9lMn2pQr5tUv8xYz1bCd4fGh7jKl0n";
        for (before, after) in
            [("é", "é"), ("キー", "です"), ("—", "—"), ("\u{301}", "\u{301}"), ("🔑", "🔑"), ("ж", "ж")]
        {
            for secret in [
                token("sk-", "ant-api03-abcdefghijklmnop"),
                token("ghp_", letters),
                token("AKIA", "ABCDEFGHIJKLMNOP"),
                token("AIza", &letters[..35]),
                format!("123456789:{}", &letters[..35]),
            ] {
                assert_eq!(redactor.text(&format!("{before}{secret}{after}")), format!("{before}[redacted]{after}"));
            }
            let text = |secret: &str| {
                format!("{before}Bearer {secret} {before}https://me:{secret}@host {before}password={secret} {after}")
            };
            assert_eq!(redactor.text(&text("abcdefghijklmnopq")), text("[redacted]"));
        }
    }

    #[test]
    fn a_token_that_ends_in_a_hyphen_is_found_whatever_follows() {
        let redactor = redactor(&[]);
        for after in ["", " ", "é", "-", "a", "です"] {
            let text = format!("123456789:{}-{after}", "Ab3dEf6hIj9lMn2pQr5tUv8xYz1bCd4fGh");
            assert_eq!(redactor.text(&text), format!("[redacted]{after}"));
        }
    }

    #[test]
    fn a_value_with_a_token_in_it_is_struck_out_as_a_whole() {
        let redactor = redactor(&[]);
        let (sk, aws) = (token("sk-", "abcdefghijklmnopqrstu"), token("AKIA", "ABCDEFGHIJKLMNOP"));
        let key = format!("-----BEGIN {0} KEY-----\nMIIE\n-----END {0} KEY-----", "PRIVATE");
        for (before, value, after) in [
            ("password=", format!("geheimü{sk}ÄRestgeheim"), " x"),
            ("password=", format!("ab-{aws}.rest"), ""),
            ("\"api_key\": \"", format!("схема{aws}секрет12345"), "\""),
            ("https://me:", format!("ab:{aws}:cd"), "@host"),
            ("secret=", key.clone(), "\nMIIE"),
            ("secret=", format!("ab{key}cd"), " MIIE"),
            ("secret=", format!("{aws}{key}{aws}cd"), " MIIE"),
            ("\u{17f}ecret=", "hunter2222".to_owned(), ""),
            ("to\u{212a}en: ", "hunter2222".to_owned(), ""),
        ] {
            let text = format!("{before}{value}{after}");
            let expected = format!("{before}[redacted]{after}");
            assert_eq!(redactor.text(&text), expected, "{text}");
            assert_eq!(redactor.text(&expected), expected);
        }
    }

    #[test]
    fn no_built_in_pattern_makes_text_that_is_not_ascii_slow() {
        let redactor = redactor(&[]);
        for pattern in redactor.patterns.iter().flat_map(|patterns| &patterns.each) {
            let without_ascii_boundaries = pattern.as_str().replace(r"(?-u:\b)", "");
            // No automaton knows a Unicode word boundary beside such text: it is searched a character at a time.
            for slow in [r"\b", r"\B", r"\<", r"\>"] {
                assert!(!without_ascii_boundaries.contains(slow), "{pattern}");
            }
        }
    }

    /// The beginning and the ends of secrets, and what may stand beside them.
    /// Not `Bearer`: beside a letter only an ASCII boundary finds it, and its secret may end with the next `-Bearer`.
    fn pieces() -> impl Strategy<Value = String> {
        let letters = "Ab3dEf6hIj9lMn2pQr5tUv8xYz1bCd4fGh7jKl0n";
        let mut pieces = Vec::from([
            format!("{}-", &letters[..34]),
            format!("123456789:{}-", &letters[..34]),
            token("sk-", letters),
            token("ghp_", letters),
            token("AKIA", "ABCDEFGHIJKLMNOP"),
            token("SG.", letters),
        ]);
        pieces.extend(["-----BEGIN PRIVATE KEY-----".to_owned(), "-----END PRIVATE KEY-----".to_owned()]);
        let others = [
            "é",
            "日本",
            "—",
            "ſ",
            "\u{212a}",
            "\u{a0}",
            "\u{3000}",
            "🔑",
            "a",
            "Z",
            "0",
            "_",
            "-",
            ".",
            " ",
            "\n",
            "=",
            ": ",
            ":",
            "'",
            "\"",
            "//",
            "://",
            "@",
            "http",
            "password",
            "toKen",
            "api_key",
            "secret",
            "\u{17f}ecret=",
            "TO\u{212a}EN: ",
            "password=geheim\u{fc}",
            "\u{444}\u{44b}\u{432}\u{430}\u{444}\u{44b}\u{432}",
            "https://me:",
            "abcdef",
            "123456789:",
        ];
        pieces.extend(others.map(str::to_owned));
        pieces.push(letters.to_owned());
        prop::collection::vec(prop::sample::select(pieces), 1..14).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

        #[test]
        fn whatever_unicode_word_boundaries_would_find_is_found(text in pieces()) {
            static BOTH: std::sync::LazyLock<(Patterns, Redactor)> = std::sync::LazyLock::new(|| {
                // Without a set: it would only say which of them to search for.
                let each = BUILT_IN.iter().map(|pattern| Regex::new(pattern).unwrap()).collect();
                (Patterns { set: RegexSet::empty(), each }, redactor(&[]))
            });
            let (unicode, redactor) = &*BOTH;
            let ours = redactor.text(&text);
            let theirs = unicode.redact_matches(&text).unwrap_or_else(|| text.clone());
            prop_assert!(is_left_of(&ours, &theirs), "{text:?} becomes {ours:?}, and not {theirs:?}");
        }
    }

    /// Whether what is left in `ours` is also left, in that order, in `theirs`.
    fn is_left_of(ours: &str, theirs: &str) -> bool {
        let mut left = theirs.split(REPLACEMENT).peekable();
        ours.split(REPLACEMENT).filter(|piece| !piece.is_empty()).all(|piece| {
            while let Some(rest) = left.peek_mut() {
                if let Some(at) = rest.find(piece) {
                    *rest = &rest[at + piece.len()..];
                    return true;
                }
                left.next();
            }
            false
        })
    }

    /// Speed beside that of ASCII text, in one run. To be run by hand, in a release build:
    ///
    /// ```text
    /// cargo test --release --lib redact -- --ignored --nocapture
    /// ```
    #[test]
    #[ignore = "measures"]
    fn text_that_is_not_ascii_is_redacted_as_fast_as_ascii() {
        let redactor = redactor(&[]);
        // The best of five: others use this machine, too.
        let speed = |line: &str| {
            let text = line.repeat((8 << 20) / line.len());
            let took = (0..5).map(|_| {
                let begun = std::time::Instant::now();
                assert_eq!(redactor.text(&text).contains(REPLACEMENT), line.contains("hunter"));
                begun.elapsed()
            });
            text.len() as f64 / 1e6 / took.min().unwrap().as_secs_f64()
        };
        let secret = "password=hunter2222 https://me:hunter2222@host/";
        let speeds = [
            ("ASCII", "the quick brown fox jumps over the lazy dog; let token be refreshed\n"),
            ("Latin", "the quick brown f\u{e9}x jumps \u{2014} over the lazy dog; let token be refreshed\n"),
            ("Japanese", "日本語のテキストを書きます。これは長い文章です。\n"),
        ]
        .map(|(what, plain)| (what, speed(plain), speed(&format!("{plain}{secret}{plain}"))));
        let [(_, ascii, ascii_with_secrets), ..] = speeds;
        for (what, without, with) in speeds {
            println!("{what}: {without:.0} MB/s, with two secrets on each second line {with:.0} MB/s");
            assert!(without > ascii / 4.0 && with > ascii_with_secrets / 4.0, "{what}");
        }
    }
}
