//! JSON as it is found on disk: skimmed for its shape, decoded only where somebody asks for a value.
//!
//! What serde would refuse or lose is read here all the same, because a valid object must never be turned away:
//!
//! * Members come as raw text, each with its key, in the order of the file. So a field of the wrong type, a key that
//!   comes twice and a string that can't be decoded harm only who looks at them.
//! * Skimming keeps its stack on the heap (serde_json's `RawValue`): nesting has no limit. One level is opened
//!   at a time, so nothing here recurses.
//! * Strings are decoded here ([`string`]): a surrogate without its partner and U+0000, which Postgres stores in neither
//!   `text` nor `jsonb`, become U+FFFD. That happens while decoding, never by editing raw text: in `\\u0000` the
//!   backslash is itself escaped and the rest are letters.

use std::borrow::Cow;
use std::fmt;
use std::sync::{Condvar, Mutex, PoisonError};

use serde::de::{Deserializer as _, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

/// What some programs write before UTF-8 text. RFC 8259 lets a reader of JSON ignore it.
const BYTE_ORDER_MARK: &str = "\u{feff}";

/// `bytes` without a byte order mark at their beginning: input that others write may have one, serde_json refuses it.
pub(crate) fn without_byte_order_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(BYTE_ORDER_MARK.as_bytes()).unwrap_or(bytes)
}

/// Memory for parsed payloads, shared by all threads that parse one. A large payload waits until the others are done.
#[derive(Default, Debug)]
pub(crate) struct ValuesMemory {
    taken: Mutex<usize>,
    freed: Condvar,
}

impl ValuesMemory {
    /// Reserves what the values of `json_bytes` of JSON can take at most. Blocks while others hold too much of it; they
    /// hold it only while they parse and check.
    pub(crate) fn reserve(&self, json_bytes: usize) -> ValuesReservation<'_> {
        let bytes = json_bytes.saturating_mul(VALUES_BYTES_PER_BYTE_MAX).min(VALUES_BYTES_MAX);
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = |taken: &mut usize| *taken + bytes > VALUES_BYTES_MAX;
        let mut taken = self.freed.wait_while(taken, is_full).unwrap_or_else(PoisonError::into_inner);
        *taken += bytes;
        ValuesReservation { memory: self, bytes }
    }
}

/// A share of [`ValuesMemory`], returned when dropped.
#[must_use = "dropped at once it reserves nothing"]
pub(crate) struct ValuesReservation<'a> {
    memory: &'a ValuesMemory,
    bytes: usize,
}

impl Drop for ValuesReservation<'_> {
    fn drop(&mut self) {
        *self.memory.taken.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        self.memory.freed.notify_all();
    }
}

/// What stands in for text that can't be kept.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Calls `visit` with key (decoded) and raw value of each member of the object `json`.
///
/// Errors where `json` is not exactly one object; members before the fault were visited.
pub(crate) fn members<'a, F>(json: &'a str, visit: F) -> Result<(), serde_json::Error>
where
    F: FnMut(&str, &'a str),
{
    let mut deserializer = serde_json::Deserializer::from_str(json);
    deserializer.deserialize_map(Members { visit })?;
    deserializer.end()
}

/// The raw values of the members called `names` of the object `json`; the last one of a name wins, and null counts as absent.
///
/// Errors as [`members`].
pub(crate) fn named<'a, const N: usize>(
    json: &'a str,
    names: [&str; N],
) -> Result<[Option<&'a str>; N], serde_json::Error> {
    let mut values = [None; N];
    members(json, |key, value| {
        let index = names.iter().position(|name| *name == key);
        if let Some(slot) = index.and_then(|index| values.get_mut(index)) {
            *slot = (value != "null").then_some(value);
        }
    })?;
    Ok(values)
}

/// As [`named`], of the value `raw`; all absent where it is no object.
pub(crate) fn pick<'a, const N: usize>(raw: Option<&'a str>, names: [&str; N]) -> [Option<&'a str>; N] {
    raw.and_then(|raw| named(raw, names).ok()).unwrap_or([None; N])
}

/// Calls `visit` with the raw text of each item of the array `json`; errors where it is no array.
pub(crate) fn items<'a, F>(json: &'a str, visit: F) -> Result<(), serde_json::Error>
where
    F: FnMut(&'a str),
{
    let mut deserializer = serde_json::Deserializer::from_str(json);
    deserializer.deserialize_seq(Items { visit })?;
    deserializer.end()
}

/// A decoded string and whether it had to be mended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Text<'a> {
    pub text: Cow<'a, str>,
    pub is_mended: bool,
}

/// Decodes the string literal `raw`; `None` where it is none. Borrows where nothing is escaped.
///
/// `raw` has been skimmed: its escapes are well-formed and it holds no raw control characters.
pub(crate) fn string(raw: &str) -> Option<Text<'_>> {
    let inner = raw.strip_prefix('"')?.strip_suffix('"')?;
    if memchr::memchr(b'\\', inner.as_bytes()).is_none() {
        return Some(Text { text: Cow::Borrowed(inner), is_mended: false });
    }
    let mut text = String::with_capacity(inner.len());
    let mut is_mended = false;
    let mut rest = inner;
    while let Some((plain, escape)) = rest.split_once('\\') {
        text.push_str(plain);
        let (character, after) = match escape.as_bytes().first()? {
            b'u' => {
                let (code, after) = code_unit(escape.get(1..)?)?;
                match code {
                    0xD800..=0xDBFF => match low_surrogate(after) {
                        Some((low, after)) => {
                            let point = 0x1_0000 + ((u32::from(code) - 0xD800) << 10) + (u32::from(low) - 0xDC00);
                            (char::from_u32(point)?, after)
                        }
                        None => (REPLACEMENT, after),
                    },
                    0xDC00..=0xDFFF | 0 => (REPLACEMENT, after),
                    _ => (char::from_u32(u32::from(code))?, after),
                }
            }
            b'n' => ('\n', escape.get(1..)?),
            b't' => ('\t', escape.get(1..)?),
            b'r' => ('\r', escape.get(1..)?),
            b'b' => ('\u{8}', escape.get(1..)?),
            b'f' => ('\u{c}', escape.get(1..)?),
            b'"' => ('"', escape.get(1..)?),
            b'/' => ('/', escape.get(1..)?),
            b'\\' => ('\\', escape.get(1..)?),
            _ => return None,
        };
        // The escape of U+FFFD itself is no damage.
        is_mended |= character == REPLACEMENT && !escape.get(1..5).is_some_and(|hex| hex.eq_ignore_ascii_case("fffd"));
        text.push(character);
        rest = after;
    }
    text.push_str(rest);
    Some(Text { text: Cow::Owned(text), is_mended })
}

/// The code unit written as the first four hexadecimal digits of `text`, and what follows them.
fn code_unit(text: &str) -> Option<(u16, &str)> {
    let (digits, after) = text.split_at_checked(4)?;
    if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    Some((u16::from_str_radix(digits, 16).ok()?, after))
}

/// The low surrogate escaped at the start of `text`, and what follows it.
fn low_surrogate(text: &str) -> Option<(u16, &str)> {
    let (code, after) = code_unit(text.strip_prefix("\\u")?)?;
    (0xDC00..=0xDFFF).contains(&code).then_some((code, after))
}

/// Levels of arrays and objects that a payload may have: every reader of JSON on its way takes them.
pub(crate) const DEPTH_MAX: usize = 100;

/// Memory that the values of a payload may take, beside the bytes of its strings: 520,000 numbers, or 40,000 small
/// objects. Without a limit 16 MB of `[1,1,…]` become 500 MB of values.
pub(crate) const VALUES_BYTES_MAX: usize = 32 << 20;

/// Upper bound of the memory that one byte of JSON can turn into ([`Scan::values_bytes`] of `{"":0},`).
const VALUES_BYTES_PER_BYTE_MAX: usize = 100;

/// Why raw JSON is not taken as a value. Says nothing of the text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unfit {
    TooDeep,
    /// Its values would take more memory than [`VALUES_BYTES_MAX`].
    TooManyValues,
    /// A number outside the range of a double, or no JSON at all.
    Malformed,
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unfit::TooDeep => write!(f, "nested deeper than {DEPTH_MAX} levels"),
            Unfit::TooManyValues => write!(
                f,
                "too many values: they would take more than {} MiB of memory; send them as text or in several events",
                VALUES_BYTES_MAX >> 20
            ),
            Unfit::Malformed => f.write_str("not valid JSON, or a number out of range"),
        }
    }
}

/// The value `raw` with every string and key of it repaired; sets `is_mended` where one had to be.
///
/// What is nested too deep or would take too much memory is refused before anything is parsed.
pub(crate) fn value(raw: &str, is_mended: &mut bool) -> Result<Value, Unfit> {
    check_size(raw.as_bytes())?;
    parse(raw, is_mended)
}

/// [`value`] for what becomes a field of a payload: one level and a megabyte less, so that the payload is not refused for it.
pub(crate) fn field_value(raw: &str, is_mended: &mut bool) -> Result<Value, Unfit> {
    check_size_within(raw.as_bytes(), DEPTH_MAX - 1, VALUES_BYTES_MAX - (1 << 20))?;
    parse(raw, is_mended)
}

fn parse(raw: &str, is_mended: &mut bool) -> Result<Value, Unfit> {
    let bytes = raw.as_bytes();
    let has_escapes = memchr::memmem::find(bytes, b"\\u").is_some();
    // serde_json parses the text under such a key as JSON of its own, which nobody has measured.
    let has_private_key = memchr::memmem::find(bytes, b"$serde_json::private::").is_some();
    if !has_escapes && !has_private_key {
        return serde_json::from_str(raw).map_err(|_| Unfit::Malformed);
    }
    mended_value(raw, is_mended)
}

/// Whether `raw` may be parsed: how deep it is nested, and the memory that its values would take.
pub(crate) fn check_size(raw: &[u8]) -> Result<(), Unfit> {
    check_size_within(raw, DEPTH_MAX, VALUES_BYTES_MAX)
}

fn check_size_within(raw: &[u8], depth_max: usize, values_bytes_max: usize) -> Result<(), Unfit> {
    let mut scan = Scan::default();
    scan.feed(raw);
    if scan.deepest > depth_max {
        return Err(Unfit::TooDeep);
    }
    if scan.values_bytes > values_bytes_max {
        return Err(Unfit::TooManyValues);
    }
    Ok(())
}

/// [`value`] for text with escapes that may need mending. Recurses [`DEPTH_MAX`] deep at most.
fn mended_value(raw: &str, is_mended: &mut bool) -> Result<Value, Unfit> {
    let raw = raw.trim_ascii();
    let mut problem = None;
    let mut mended = |raw: &str| {
        mended_value(raw, is_mended).unwrap_or_else(|unfit| {
            problem.get_or_insert(unfit);
            Value::Null
        })
    };
    let value = match raw.as_bytes().first() {
        Some(b'{') => {
            let mut object = Map::new();
            members(raw, |key, value| {
                object.insert(key.to_owned(), mended(value));
            })
            .map_err(|_| Unfit::Malformed)?;
            Value::Object(object)
        }
        Some(b'[') => {
            let mut array = Vec::new();
            items(raw, |item| array.push(mended(item))).map_err(|_| Unfit::Malformed)?;
            Value::Array(array)
        }
        Some(b'"') => {
            let text = string(raw).ok_or(Unfit::Malformed)?;
            *is_mended |= text.is_mended;
            return Ok(Value::String(text.text.into_owned()));
        }
        _ => return serde_json::from_str(raw).map_err(|_| Unfit::Malformed),
    };
    match problem {
        Some(unfit) => Err(unfit),
        None => Ok(value),
    }
}

/// Follows JSON byte by byte, however it comes in pieces, to know when the first object or array is complete.
///
/// Looks at punctuation and strings only; whether the text between them is JSON is for a parser to say.
#[derive(Default, Debug)]
pub(crate) struct Scan {
    depth: usize,
    deepest: usize,
    in_string: bool,
    escaped: bool,
    /// The last byte of punctuation.
    last: u8,
    /// Memory that `serde_json::Value`s of what was scanned would take, without the bytes of strings. Estimated from
    /// their layout on 64 bits: 32 bytes for a value, twice that in a growing array, 632 for the first eleven members of
    /// an object (a node of a `BTreeMap`), 32 for an allocation.
    values_bytes: usize,
}

impl Scan {
    /// Takes the next bytes; gives the number of them up to the end of the object, once it has come.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut index = 0;
        while let Some(&byte) = bytes.get(index) {
            index += 1;
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.in_string = false,
                    // Most of a long input is text.
                    _ => {
                        let rest = bytes.get(index..).unwrap_or_default();
                        index += memchr::memchr2(b'"', b'\\', rest).unwrap_or(rest.len());
                    }
                }
                continue;
            }
            match byte {
                b'"' => {
                    self.in_string = true;
                    self.values_bytes += 32;
                    continue;
                }
                b'{' | b'[' => {
                    self.depth += 1;
                    self.deepest = self.deepest.max(self.depth);
                    self.values_bytes += if byte == b'[' { 128 } else { 0 };
                }
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(index);
                    }
                }
                // The first member of an object follows its bracket.
                b':' => self.values_bytes += if self.last == b'{' { 650 } else { 40 },
                b',' => self.values_bytes += 64,
                _ => continue,
            }
            self.last = byte;
        }
        None
    }
}

struct Members<F> {
    visit: F,
}

impl<'a, F> Visitor<'a> for Members<F>
where
    F: FnMut(&str, &'a str),
{
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'a>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<&'a RawValue>()? {
            let value = map.next_value::<&'a RawValue>()?;
            let key = string(key.get()).ok_or_else(|| A::Error::custom("a key is no string"))?;
            (self.visit)(&key.text, value.get());
        }
        Ok(())
    }
}

struct Items<F> {
    visit: F,
}

impl<'a, F> Visitor<'a> for Items<F>
where
    F: FnMut(&'a str),
{
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'a>>(mut self, mut seq: A) -> Result<(), A::Error> {
        while let Some(item) = seq.next_element::<&'a RawValue>()? {
            (self.visit)(item.get());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decoded(raw: &str) -> (String, bool) {
        let text = string(raw).unwrap();
        (text.text.into_owned(), text.is_mended)
    }

    #[test]
    fn a_text_under_a_key_of_serde_json_s_own_stays_a_text() {
        for key in ["RawValue", "Number"] {
            let raw = format!(r#"{{"a":[{{"$serde_json::private::{key}":"[1,2]"}}]}}"#);
            let parsed = value(&raw, &mut false).unwrap();
            assert_eq!(parsed["a"][0][format!("$serde_json::private::{key}")], "[1,2]");
            assert_eq!(parsed.to_string(), raw);
        }
    }

    #[test]
    fn a_string_without_escapes_is_borrowed() {
        assert!(matches!(string(r#""plain""#), Some(Text { text: Cow::Borrowed("plain"), is_mended: false })));
    }

    #[test]
    fn what_is_no_string_is_none() {
        for raw in ["1", "null", "{}", "\"", "", "[\"a\"]"] {
            assert_eq!(string(raw), None, "{raw}");
        }
    }

    #[test]
    fn lone_surrogates_are_replaced_and_pairs_are_kept() {
        assert_eq!(decoded(r#""a\ud83db""#), ("a\u{fffd}b".into(), true));
        assert_eq!(decoded(r#""\ude00""#), ("\u{fffd}".into(), true));
        assert_eq!(decoded(r#""\ud83d\ud83d\ude00""#), ("\u{fffd}😀".into(), true));
        assert_eq!(decoded(r#""\ud83d\n""#), ("\u{fffd}\n".into(), true));
        assert_eq!(decoded(r#""\uD83D\uDE00""#), ("😀".into(), false));
    }

    #[test]
    fn escaped_nul_is_replaced_and_the_letters_of_it_are_not() {
        assert_eq!(decoded(r#""a\u0000b""#), ("a\u{fffd}b".into(), true));
        assert_eq!(decoded(r#""a\\u0000b\\ud83d""#), ("a\\u0000b\\ud83d".into(), false));
        assert_eq!(decoded(r#""\\\u0000""#), ("\\\u{fffd}".into(), true));
    }

    #[test]
    fn an_escaped_replacement_character_is_no_damage() {
        assert_eq!(decoded(r#""\ufffd\uFFFD""#), ("\u{fffd}\u{fffd}".into(), false));
    }

    #[test]
    fn duplicate_keys_and_escaped_keys_are_visited() {
        let mut seen = Vec::new();
        members(r#"{"a":1,"\u0061":[2], "b\ud83d" : {"c":"\ud83d"}}"#, |key, value| {
            seen.push(format!("{key}={value}"))
        })
        .unwrap();
        assert_eq!(seen, ["a=1", "a=[2]", "b\u{fffd}={\"c\":\"\\ud83d\"}"]);
    }

    #[test]
    fn nesting_has_no_limit() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let mut length = 0;
        members(&deep, |_, value| length = value.len()).unwrap();
        assert_eq!(length, 200_000);
    }

    #[test]
    fn a_value_is_mended_in_every_string_and_key_and_says_so() {
        let mut is_mended = false;
        let found = value(r#"{"a\u0000":["\ud83d",{"b":"\\u0000"}],"n":1.5}"#, &mut is_mended).unwrap();
        assert_eq!(found, serde_json::json!({"a\u{fffd}": ["\u{fffd}", {"b": "\\u0000"}], "n": 1.5}));
        // A key's mending is not told, only done; the string's is.
        assert!(is_mended);
        let mut is_mended = false;
        value(r#"{"a":"\\u0000 \ud83d\ude00"}"#, &mut is_mended).unwrap();
        assert!(!is_mended);
    }

    #[test]
    fn a_value_that_no_reader_would_take_is_refused() {
        let nested = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        assert!(value(&nested(DEPTH_MAX), &mut false).is_ok());
        assert_eq!(value(&nested(DEPTH_MAX + 1), &mut false), Err(Unfit::TooDeep));
        assert_eq!(value(&nested(100_000), &mut false), Err(Unfit::TooDeep));
        assert_eq!(value("1e999", &mut false), Err(Unfit::Malformed));
        assert_eq!(value(r#"["\u0041", 1e999]"#, &mut false), Err(Unfit::Malformed));
    }

    #[test]
    fn the_end_of_an_object_is_found_in_whatever_pieces_it_comes() {
        let text = br#" {"a":"}\"{","b":[{}]} tail"#;
        for cut in 0..text.len() {
            let (head, tail) = text.split_at(cut);
            let mut scan = Scan::default();
            let end = scan.feed(head).or_else(|| scan.feed(tail).map(|end| end + cut));
            assert_eq!(end, Some(text.len() - 5), "{cut}");
        }
        assert_eq!(Scan::default().feed(b"{\"a\":1"), None);
    }

    proptest! {
        #[test]
        fn decoding_agrees_with_serde(text in any::<String>()) {
            let raw = serde_json::to_string(&text).unwrap();
            let (ours, is_mended) = decoded(&raw);
            prop_assert_eq!(ours, text.replace('\0', "\u{fffd}"));
            prop_assert_eq!(is_mended, text.contains('\0'));
        }

        #[test]
        fn decoding_never_panics(raw in any::<String>(), escapes in "\"(\\\\u[0-9a-fA-F]{0,4}|\\\\[a-z\\\\\"]|[a-zä]){0,8}\"") {
            string(&raw);
            if let Some(text) = string(&escapes) {
                prop_assert!(!text.text.contains('\0'));
            }
        }
    }
}
