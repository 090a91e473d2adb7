//! The taxonomy: one JSON Schema per type of event, and the only way to an [`Event`].
//!
//! The schemas in `schemas/` are compiled into the program; a folder of `*.json` (`schemas.path`) adds types or
//! replaces built-in ones. A file's stem is its type's name. Nothing else in the program knows the types' fields,
//! so a new type is a new file.
//!
//! This is the only user of the `jsonschema` crate. Promise: **nothing unchecked is queued**, as only
//! [`Schemas::check`] makes an [`Event`].

use std::collections::BTreeMap;
use std::path::Path;

use jsonschema::error::ValidationErrorKind;
use serde_json::Value;
use thiserror::Error;

use crate::event::{Candidate, Event, EventParts, EventType, ForeignKeys, Payload};
use crate::json::without_byte_order_mark;
use crate::regular_file;

/// The schemas that come with the program.
static BUILT_IN: include_dir::Dir<'_> = include_dir::include_dir!("$CARGO_MANIFEST_DIR/schemas");

/// Longest name of a type: what `events.event_type` holds in the database.
const TYPE_NAME_BYTES_MAX: usize = 50;

/// A larger file is no schema.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Why a candidate is no event. Names fields and rules, never values.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Invalid {
    #[error("unknown event type; {hint}")]
    UnknownType { hint: String },
    #[error("{event_type}: {field}: {problem}")]
    Payload { event_type: EventType, field: String, problem: String },
    #[error("{event_type}: the event has {bytes} bytes, more than max_event_bytes ({bytes_max})")]
    TooLarge { event_type: EventType, bytes: u64, bytes_max: u64 },
}

impl Invalid {
    /// The field at fault, as a dotted path within the payload.
    pub fn field(&self) -> &str {
        match self {
            Invalid::UnknownType { .. } => "event_type",
            Invalid::Payload { field, .. } => field,
            Invalid::TooLarge { .. } => "payload",
        }
    }
}

/// A candidate that is no event, given back whole.
pub struct Refused {
    pub invalid: Invalid,
    pub candidate: Candidate,
}

/// Why the schemas can't be used.
#[derive(Debug, Error)]
pub enum SchemaError {
    #[error("could not read the schemas folder {path}: {source}; check schemas.path in the configuration")]
    Folder { path: String, source: std::io::Error },
    #[error("could not read schema {path}: {source}")]
    File { path: String, source: std::io::Error },
    #[error("schema {name} is not valid JSON: {source}")]
    Json { name: String, source: serde_json::Error },
    #[error("schema {name} is not a valid JSON Schema: {problem}")]
    Schema { name: String, problem: String },
    #[error(
        "schema {name}: a file's stem is its type's name: lower-case letters, digits and _, at most {TYPE_NAME_BYTES_MAX}"
    )]
    Name { name: String },
}

struct Schema {
    event_type: EventType,
    validator: jsonschema::Validator,
    /// Fields that it requires.
    required: Vec<String>,
}

impl Schema {
    /// A required field that is also a column of the row (`agent_id`) may be given there instead of in the payload.
    fn check(&self, payload: &Value, columns: &ForeignKeys) -> Result<(), Invalid> {
        // Errors are only made up when there are any.
        if self.validator.is_valid(payload) {
            return Ok(());
        }
        let mut whole = payload.clone();
        for (name, id) in columns.named() {
            if let (Some(id), Some(fields)) = (id, whole.as_object_mut())
                && self.required.iter().any(|required| required == name)
            {
                fields.entry(name).or_insert_with(|| id.into());
            }
        }
        if self.validator.is_valid(&whole) {
            return Ok(());
        }
        let (field, problem) = first_problem(&self.validator, &whole);
        Err(Invalid::Payload { event_type: self.event_type.clone(), field, problem })
    }
}

/// The compiled taxonomy.
pub struct Schemas {
    by_type: BTreeMap<String, Schema>,
    event_bytes_max: u64,
}

impl Schemas {
    /// The built-in schemas, then those of `folder`, which add to and replace them.
    pub fn load(folder: Option<&Path>, event_bytes_max: u64) -> Result<Schemas, SchemaError> {
        let mut schemas = Schemas { by_type: BTreeMap::new(), event_bytes_max };
        for file in BUILT_IN.files() {
            let name = file.path().file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            schemas.add(name, file.contents_utf8().unwrap_or_default())?;
        }
        if let Some(folder) = folder {
            schemas.add_folder(folder)?;
        }
        Ok(schemas)
    }

    pub fn event_bytes_max(&self) -> u64 {
        self.event_bytes_max
    }

    /// The types that are known, in alphabetical order.
    pub fn types(&self) -> impl Iterator<Item = &EventType> {
        self.by_type.values().map(|schema| &schema.event_type)
    }

    /// The event, when its type is known and its payload fits the type's schema.
    pub fn check(&self, mut candidate: Candidate) -> Result<Event, Box<Refused>> {
        let Some(schema) = self.by_type.get(&candidate.event_type) else {
            let hint = self.known_types(&candidate.event_type);
            return Err(Box::new(Refused { invalid: Invalid::UnknownType { hint }, candidate }));
        };
        let event_type = schema.event_type.clone();
        let Candidate { payload, refs, .. } = &mut candidate;
        let value = Value::Object(std::mem::take(payload));
        match schema.check(&value, refs).and_then(|()| self.fitting_json(&value, &event_type)) {
            Ok(json) => {
                let Candidate { id, timestamp, refs, origin, .. } = candidate;
                let payload = Payload::from_json(json);
                Ok(Event::from_checked_parts(EventParts { id, event_type, timestamp, payload, refs, origin }))
            }
            Err(invalid) => {
                if let Value::Object(object) = value {
                    candidate.payload = object;
                }
                Err(Box::new(Refused { invalid, candidate }))
            }
        }
    }

    /// Refuses a candidate of a known type whose texts alone are too large: before they are redacted, and before they are
    /// written as JSON, which would take as much memory again.
    pub(super) fn check_texts(&self, candidate: &Candidate) -> Result<(), Invalid> {
        let Some(schema) = self.by_type.get(&candidate.event_type) else { return Ok(()) };
        let (bytes, bytes_max) = (candidate.payload.values().map(text_bytes).sum(), self.event_bytes_max);
        if bytes > bytes_max {
            return Err(Invalid::TooLarge { event_type: schema.event_type.clone(), bytes, bytes_max });
        }
        Ok(())
    }

    /// The payload as text, unless it is too large.
    fn fitting_json(&self, payload: &Value, event_type: &EventType) -> Result<String, Invalid> {
        // Twice as fast as its Display, which can't fail either.
        let json = serde_json::to_string(payload).unwrap_or_else(|_| payload.to_string());
        let (bytes, bytes_max) = (json.len() as u64, self.event_bytes_max);
        if bytes > bytes_max {
            return Err(Invalid::TooLarge { event_type: event_type.clone(), bytes, bytes_max });
        }
        Ok(json)
    }

    /// The known type that `name` is like, else all of them.
    fn known_types(&self, name: &str) -> String {
        let known = self.by_type.keys().map(|known| (strsim::jaro_winkler(known, name), known.as_str()));
        match known.max_by(|a, b| a.0.total_cmp(&b.0)) {
            Some((likeness, known)) if likeness > 0.8 => format!("did you mean \"{known}\"?"),
            _ => format!("there are {}", self.by_type.keys().map(String::as_str).collect::<Vec<_>>().join(", ")),
        }
    }

    fn add_folder(&mut self, folder: &Path) -> Result<(), SchemaError> {
        let folder_error = |source| SchemaError::Folder { path: folder.display().to_string(), source };
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(folder_error)? {
            let path = entry.map_err(folder_error)?.path();
            if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
                paths.push(path);
            }
        }
        paths.sort();
        for path in paths {
            let text = regular_file::read_to_string(&path, FILE_BYTES_MAX)
                .map_err(|source| SchemaError::File { path: path.display().to_string(), source })?;
            let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            self.add(stem, &text)?;
        }
        Ok(())
    }

    fn add(&mut self, name: &str, text: &str) -> Result<(), SchemaError> {
        let well_formed = !name.is_empty()
            && name.len() <= TYPE_NAME_BYTES_MAX
            && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
        if !well_formed {
            return Err(SchemaError::Name { name: name.to_owned() });
        }
        let json: Value = serde_json::from_slice(without_byte_order_mark(text.as_bytes()))
            .map_err(|source| SchemaError::Json { name: name.to_owned(), source })?;
        let validator = jsonschema::options()
            .should_validate_formats(true)
            .build(&json)
            .map_err(|error| SchemaError::Schema { name: name.to_owned(), problem: error.to_string() })?;
        let required = json.get("required").and_then(Value::as_array).into_iter().flatten();
        let required = required.filter_map(Value::as_str).map(str::to_owned).collect();
        self.by_type.insert(name.to_owned(), Schema { event_type: EventType::new(name), validator, required });
        Ok(())
    }
}

/// Bytes of all strings in a value, its keys not counted. Depth is bounded by what makes a payload.
fn text_bytes(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.len() as u64,
        Value::Array(items) => items.iter().map(text_bytes).sum(),
        Value::Object(members) => members.values().map(text_bytes).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    }
}

/// Names the field and the rule it breaks; the value itself is masked.
fn first_problem(validator: &jsonschema::Validator, payload: &Value) -> (String, String) {
    let Some(error) = validator.iter_errors(payload).next() else {
        return ("payload".to_owned(), "does not fit the schema".to_owned());
    };
    let place = dotted(&error.instance_path().to_string());
    let within = |field: &str| if place.is_empty() { field.to_owned() } else { format!("{place}.{field}") };
    match error.kind() {
        ValidationErrorKind::Required { property } => {
            (within(property.as_str().unwrap_or_default()), "required field is missing".to_owned())
        }
        ValidationErrorKind::AdditionalProperties { unexpected } => (
            within(unexpected.first().map(String::as_str).unwrap_or_default()),
            "unknown field; free-form extras go into \"metadata\"".to_owned(),
        ),
        _ => {
            let field = if place.is_empty() { "payload".to_owned() } else { place };
            (field, error.masked_with("value").to_string())
        }
    }
}

/// `/metadata/x/0` → `metadata.x.0`.
fn dotted(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{EventId, Origin, Timestamp};
    use serde_json::json;

    fn schemas() -> Schemas {
        Schemas::load(None, 1 << 20).unwrap()
    }

    fn candidate(event_type: &str, payload: Value) -> Candidate {
        let Value::Object(payload) = payload else { panic!("a payload is an object") };
        Candidate {
            id: EventId::new(),
            event_type: event_type.to_owned(),
            timestamp: Timestamp::UNIX_EPOCH,
            payload,
            refs: ForeignKeys::default(),
            origin: Origin::Cli,
        }
    }

    fn problem(event_type: &str, payload: Value) -> String {
        schemas()
            .check(candidate(event_type, payload))
            .map(|_| ())
            .map_err(|refused| refused.invalid)
            .unwrap_err()
            .to_string()
    }

    /// One payload of each type that has its required fields only.
    fn least() -> [(&'static str, Value); 5] {
        [
            ("session_registered", json!({"session_uuid": "s", "project_path": "/p", "working_directory": "/p"})),
            ("session_ended", json!({"session_uuid": "s", "reason": "timeout"})),
            (
                "turn_detected",
                json!({"session_uuid": "s", "actor": "user", "text": "", "source": "polling",
                       "turn_timestamp": "2026-01-02T03:04:05.678Z"}),
            ),
            (
                "state_transition",
                json!({"agent_id": 1, "command_id": 2, "from_state": "a", "to_state": "b", "trigger": "turn"}),
            ),
            ("hook_received", json!({"hook_type": "Stop", "claude_session_id": "s", "working_directory": "/p"})),
        ]
    }

    #[test]
    fn each_type_is_accepted_with_its_required_fields_only() {
        for (event_type, payload) in least() {
            let event =
                schemas().check(candidate(event_type, payload.clone())).map_err(|refused| refused.invalid).unwrap();
            assert_eq!(event.event_type().as_str(), event_type);
            assert_eq!(serde_json::from_str::<Value>(event.payload().as_json()).unwrap(), payload);
        }
    }

    #[test]
    fn each_required_field_is_named_when_it_is_missing() {
        for (event_type, payload) in least() {
            for field in payload.as_object().unwrap().keys() {
                let mut without = payload.clone();
                without.as_object_mut().unwrap().remove(field);
                assert_eq!(problem(event_type, without), format!("{event_type}: {field}: required field is missing"));
            }
        }
    }

    #[test]
    fn a_required_id_may_be_given_as_the_column_instead() {
        let payload = json!({"command_id": 2, "from_state": "a", "to_state": "b", "trigger": "hook:stop:idle"});
        let mut transition = candidate("state_transition", payload.clone());
        transition.refs.agent_id = Some(7);
        let event = schemas().check(transition).map_err(|refused| refused.invalid).unwrap();
        assert_eq!(serde_json::from_str::<Value>(event.payload().as_json()).unwrap(), payload);
        let mut other = candidate("session_ended", json!({"session_uuid": "s"}));
        other.refs.agent_id = Some(7);
        let refused = schemas().check(other).err().unwrap();
        assert_eq!(refused.invalid.to_string(), "session_ended: reason: required field is missing");
    }

    #[test]
    fn each_type_refuses_an_unknown_field_by_name_and_takes_metadata() {
        for (event_type, mut payload) in least() {
            payload["metadata"] = json!({"anything": [1, 2]});
            assert!(schemas().check(candidate(event_type, payload.clone())).is_ok());
            payload["surprise"] = json!(1);
            assert_eq!(
                problem(event_type, payload),
                format!("{event_type}: surprise: unknown field; free-form extras go into \"metadata\"")
            );
        }
    }

    #[test]
    fn an_error_never_shows_the_value() {
        let mut payload = least()[2].1.clone();
        payload["actor"] = json!("a secret thing");
        let message = problem("turn_detected", payload);
        assert!(message.starts_with("turn_detected: actor: "), "{message}");
        assert!(!message.contains("secret"), "{message}");
    }

    #[test]
    fn an_unknown_type_is_refused_with_the_nearest_known_one() {
        assert_eq!(problem("turn_detectd", json!({})), "unknown event type; did you mean \"turn_detected\"?");
        let known = "hook_received, session_ended, session_registered, state_transition, turn_detected";
        assert_eq!(problem("zebra", json!({})), format!("unknown event type; there are {known}"));
    }

    #[test]
    fn an_event_above_the_limit_is_refused_with_its_size() {
        let mut payload = least()[2].1.clone();
        payload["text"] = json!("x".repeat(2 << 20));
        assert!(problem("turn_detected", payload).contains("more than max_event_bytes (1048576)"));
    }

    #[test]
    fn a_new_type_is_a_new_file() {
        let folder = tempfile::tempdir().unwrap();
        let schema = json!({"type": "object", "required": ["id"], "properties": {"id": {"type": "integer"}}});
        std::fs::write(folder.path().join("build_finished.json"), schema.to_string()).unwrap();
        let schemas = Schemas::load(Some(folder.path()), 1 << 20).unwrap();
        assert!(schemas.check(candidate("build_finished", json!({"id": 1}))).is_ok());
        assert!(schemas.check(candidate("build_finished", json!({}))).is_err());
        assert_eq!(schemas.types().count(), 6);
        std::fs::write(folder.path().join("build_finished.json"), format!("\u{feff}{schema}")).unwrap();
        assert_eq!(
            Schemas::load(Some(folder.path()), 1 << 20).unwrap().types().count(),
            6,
            "as an editor may write it"
        );
    }

    #[test]
    fn a_broken_schema_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("broken.json"), "{").unwrap();
        let error = Schemas::load(Some(folder.path()), 1).err().unwrap().to_string();
        assert!(error.starts_with("schema broken is not valid JSON"), "{error}");
        std::fs::write(folder.path().join("broken.json"), r#"{"type": "nonsense"}"#).unwrap();
        let error = Schemas::load(Some(folder.path()), 1).err().unwrap().to_string();
        assert!(error.starts_with("schema broken is not a valid JSON Schema"), "{error}");
    }
}
