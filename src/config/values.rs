//! How serde reads the values of keys: each arrives as text, as nothing, or as a list of texts.
//!
//! The error of each reader is what it expects, such as "a whole number from 1 to 64"; [`super::load`] adds what was found.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::de::Error;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::{ConnectionString, HookCapture, Secret, TableName};

/// Paths in `claude.projects_path` at most.
const PATHS_MAX: usize = 16;

/// A value that `parse` accepts.
fn parsed<'de, D: Deserializer<'de>, T>(
    input: D,
    expected: &str,
    parse: impl Fn(&Value) -> Option<T>,
) -> Result<T, D::Error> {
    parse(&Value::deserialize(input)?).ok_or_else(|| D::Error::custom(expected))
}

/// A text that `parse` accepts.
fn text<'de, D: Deserializer<'de>, T>(
    input: D,
    expected: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<T, D::Error> {
    parsed(input, expected, |value| value.as_str().and_then(&parse))
}

/// A text that `parse` accepts, or null.
fn optional<'de, D: Deserializer<'de>, T>(
    input: D,
    expected: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, D::Error> {
    parsed(input, &format!("{expected}, or null"), |value| match value {
        Value::Null => Some(None),
        value => value.as_str().and_then(&parse).map(Some),
    })
}

/// Numbers with a unit arrive without it: [`super::load`] has made bare numbers of them.
const BYTE_UNITS: &str = ", or with KiB, MiB, GiB or TiB";
const TIME_UNITS: &str = ", or with ms, s, m, h or d";

fn whole_in<'de, D: Deserializer<'de>>(input: D, [min, max]: [u64; 2], of: &str, units: &str) -> Result<u64, D::Error> {
    text(input, &format!("a whole number{of} from {min} to {max}{units}"), |text| {
        text.trim().parse().ok().filter(|number| (min..=max).contains(number))
    })
}

pub(super) fn whole<'de, const MIN: u64, const MAX: u64, T: TryFrom<u64>, D: Deserializer<'de>>(
    input: D,
) -> Result<T, D::Error> {
    let number = whole_in(input, [MIN, MAX], "", "")?;
    T::try_from(number).map_err(|_| D::Error::custom("a smaller number"))
}

pub(super) fn bytes<'de, const MIN: u64, const MAX: u64, D: Deserializer<'de>>(input: D) -> Result<u64, D::Error> {
    whole_in(input, [MIN, MAX], " of bytes", BYTE_UNITS)
}

pub(super) fn milliseconds<'de, const MIN: u64, const MAX: u64, D: Deserializer<'de>>(
    input: D,
) -> Result<Duration, D::Error> {
    whole_in(input, [MIN, MAX], " of milliseconds", TIME_UNITS).map(Duration::from_millis)
}

/// Seconds with a fraction; the bounds are in milliseconds.
pub(super) fn seconds<'de, const MIN_MS: u64, const MAX_MS: u64, D: Deserializer<'de>>(
    input: D,
) -> Result<Duration, D::Error> {
    let [min, max] = [MIN_MS, MAX_MS].map(|bound| Duration::from_millis(bound).as_secs_f64());
    text(input, &format!("a number of seconds from {min} to {max}{TIME_UNITS}"), |text| {
        // No exponents, no infinities.
        let is_decimal = text.trim().bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        let number = is_decimal.then(|| text.trim().parse().ok()).flatten();
        number.filter(|number| (min..=max).contains(number)).map(Duration::from_secs_f64)
    })
}

pub(super) fn flag<'de, D: Deserializer<'de>>(input: D) -> Result<bool, D::Error> {
    text(input, "true or false", |text| text.trim().to_ascii_lowercase().parse().ok())
}

fn to_path(text: &str) -> Option<PathBuf> {
    (!text.is_empty() && !text.contains('\0')).then(|| PathBuf::from(text))
}

pub(super) fn path<'de, D: Deserializer<'de>>(input: D) -> Result<PathBuf, D::Error> {
    text(input, "a path", to_path)
}

pub(super) fn optional_path<'de, D: Deserializer<'de>>(input: D) -> Result<Option<PathBuf>, D::Error> {
    optional(input, "a path", to_path)
}

/// One path or several.
pub(super) fn paths<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<PathBuf>, D::Error> {
    parsed(input, &format!("a path or a list of 1 to {PATHS_MAX} paths"), |value| match value {
        // A list in a variable that is not closed.
        Value::String(text) if text.starts_with('[') => None,
        Value::String(text) => Some(vec![to_path(text)?]),
        Value::Array(items) if (1..=PATHS_MAX).contains(&items.len()) => {
            items.iter().map(|item| item.as_str().and_then(to_path)).collect()
        }
        _ => None,
    })
}

pub(super) fn texts<'de, const TEXTS_MAX: usize, const CHARS_MAX: usize, D: Deserializer<'de>>(
    input: D,
) -> Result<Vec<String>, D::Error> {
    let expected = format!("a list of at most {TEXTS_MAX} texts of 1 to {CHARS_MAX} characters");
    let item = |item: &Value| {
        let text = item.as_str().filter(|text| (1..=CHARS_MAX).contains(&text.chars().count()));
        text.map(str::to_owned)
    };
    parsed(input, &expected, |value| {
        value.as_array().filter(|items| items.len() <= TEXTS_MAX)?.iter().map(item).collect()
    })
}

fn to_name(text: &str, bytes_max: usize) -> Option<String> {
    let is_name = (1..=bytes_max).contains(&text.len()) && !text.contains(char::is_control);
    is_name.then(|| text.to_owned())
}

pub(super) fn name<'de, const BYTES_MAX: usize, D: Deserializer<'de>>(input: D) -> Result<String, D::Error> {
    text(input, &format!("a name of 1 to {BYTES_MAX} bytes"), |text| to_name(text, BYTES_MAX))
}

pub(super) fn optional_name<'de, const BYTES_MAX: usize, D: Deserializer<'de>>(
    input: D,
) -> Result<Option<String>, D::Error> {
    optional(input, &format!("a name of 1 to {BYTES_MAX} bytes"), |text| to_name(text, BYTES_MAX))
}

pub(super) fn table_name<'de, D: Deserializer<'de>>(input: D) -> Result<TableName, D::Error> {
    text(input, "a name of a table, or schema.table, each of 1 to 63 bytes", TableName::parse)
}

/// Not parsed: [`super::load`] does that, for an error that says more.
pub(super) fn connection_string<'de, D: Deserializer<'de>>(input: D) -> Result<Option<ConnectionString>, D::Error> {
    optional(input, "a URL like postgresql://user@host/db", |text| {
        Some(ConnectionString { text: Secret::new(text), location: String::new(), folder: PathBuf::new() })
    })
}

pub(super) fn address<'de, D: Deserializer<'de>>(input: D) -> Result<Option<SocketAddr>, D::Error> {
    optional(input, "an address with a port, like 127.0.0.1:5056", |text| match text.strip_prefix("localhost:") {
        Some(port) => Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port.parse().ok()?)),
        None => text.parse().ok(),
    })
}

pub(super) fn token<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Secret>, D::Error> {
    optional(input, Secret::TOKEN_RULE, Secret::token)
}

pub(super) fn capture<'de, D: Deserializer<'de>>(input: D) -> Result<HookCapture, D::Error> {
    text(input, "summary or full", |text| match text {
        "summary" => Some(HookCapture::Summary),
        "full" => Some(HookCapture::Full),
        _ => None,
    })
}
