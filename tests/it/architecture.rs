//! The layers, read off the sources: who may import whom, and which outside crate is known where.

use std::path::{Path, PathBuf};

use crate::stage::project;

/// Every source file of the library and the program with its text, test modules left out.
fn sources() -> Vec<(String, String)> {
    let mut files = Vec::new();
    collect(&project().join("src"), &mut files);
    files
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).unwrap();
            let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap().to_owned();
            let name = path.strip_prefix(project().join("src")).unwrap().to_str().unwrap().to_owned();
            (name, text)
        })
        .filter(|(name, _)| !name.contains("tests"))
        .collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// The module a file belongs to: `queue/store.rs` → `queue`.
fn module(file: &str) -> &str {
    file.split(['/', '.']).next().unwrap()
}

/// Files with code that mentions `word`, comments left out.
fn mentions(word: &str) -> Vec<String> {
    let code = |text: &str| text.lines().any(|line| !line.trim_start().starts_with("//") && line.contains(word));
    sources().into_iter().filter(|(_, text)| code(text)).map(|(file, _)| file).collect()
}

#[test]
fn a_layer_imports_only_what_lies_below_it() {
    let leaves = ["config", "telemetry", "event", "faults", "finding", "json", "private_folder", "regular_file"];
    let allowed = |layer: &str| -> &[&str] {
        match layer {
            "event" => &[],
            // Plain values only, for what happened lately.
            "telemetry" => &["event"],
            // A file is named by its configuration.
            "config" => &["regular_file"],
            "faults" | "finding" | "json" | "private_folder" | "regular_file" => &[],
            // Pure: it sees no file and no clock of its own.
            "claude" => &["event", "json", "config"],
            "queue" => &["queue"],
            "intake" => &["claude", "queue"],
            "sink" => &["sink", "queue"],
            "listing" | "history" => &["queue"],
            "client" => &[],
            "source" => &["client", "listing", "queue"],
            "verify" => &["source", "client", "listing", "intake", "sink", "queue", "claude"],
            "health" => &["queue", "intake", "claude"],
            "http" => &["health", "history", "listing", "queue", "intake", "claude"],
            "service" => &["http", "health", "history", "listing", "intake", "sink", "queue"],
            _ => panic!("{layer} is a new module: say here what it may import"),
        }
    };
    let mut wrong = Vec::new();
    for (file, text) in sources() {
        let layer = module(&file);
        if matches!(layer, "main" | "lib" | "cli") {
            continue;
        }
        for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
            for (_, after) in line.match_indices("crate::").map(|(at, found)| (at, &line[at + found.len()..])) {
                let imported = after.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
                let is_leaf = leaves.contains(&imported) && !leaves.contains(&layer) && layer != "claude";
                if imported != layer && !is_leaf && !allowed(layer).contains(&imported) {
                    wrong.push(format!("{file}: {}", line.trim()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_knows_claude_code_sees_no_clock_and_no_file() {
    for word in ["::now", "std::fs", "std::io", "std::time::Instant", "SystemTime", "regular_file"] {
        let users: Vec<String> = mentions(word).into_iter().filter(|file| module(file) == "claude").collect();
        assert!(users.is_empty(), "{word} in {users:?}");
    }
}

#[test]
fn an_outside_crate_is_known_in_one_place() {
    for (name, place) in [
        ("sled::", "queue"),
        ("bincode::", "queue/codec.rs"),
        ("jsonschema::", "intake/schema.rs"),
        ("notify::recommended_watcher", "intake/transcripts"),
        ("bb8::", "sink/postgres"),
        ("bb8_postgres::", "sink/postgres"),
        ("rustls::", "sink/postgres"),
        ("axum::", "http"),
        ("granit_parser::", "config"),
        ("getrandom::", "http/token.rs"),
        ("prometheus::", "telemetry/metrics.rs"),
        ("jsonc_parser::", "claude/settings.rs"),
    ] {
        let found = mentions(name);
        // `http.rs` serves, and the service starts the serving.
        let elsewhere: Vec<&String> = found
            .iter()
            .filter(|file| !(file.starts_with(place) || name == "axum::" && *file == "service.rs"))
            .collect();
        assert!(!found.is_empty(), "{name} is used nowhere: mend this table");
        assert!(elsewhere.is_empty(), "{name} is used in {elsewhere:?}");
    }
}

#[test]
fn only_the_sink_and_the_connection_settings_know_the_postgres_client() {
    let elsewhere: Vec<String> = mentions("tokio_postgres::")
        .into_iter()
        .filter(|file| !file.starts_with("sink/postgres") && file != "config/database.rs")
        .collect();
    assert!(elsewhere.is_empty(), "{elsewhere:?}");
}

#[test]
fn only_the_schemas_make_an_event_and_only_the_queue_reads_one_back() {
    let mut makers = mentions("from_checked_parts");
    makers.sort();
    assert_eq!(makers, ["event.rs", "intake/schema.rs", "queue/codec.rs"]);
}

#[test]
fn no_module_is_named_after_nothing() {
    for (file, _) in sources() {
        for word in ["util", "helper", "common", "manager", "models", "types", "misc"] {
            assert!(!file.contains(word), "{file}: name it after what it is");
        }
    }
}

/// The files of a folder that a file of it names by `super::` or by the folder's own path.
fn siblings(folder: &str, text: &str, names: &[String]) -> Vec<String> {
    let code: String = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let named = |name: &String| {
        let after = |path: &str| {
            code.match_indices(path).any(|(at, _)| {
                let rest = &code[at + path.len()..];
                let list = rest.strip_prefix('{').and_then(|list| list.split('}').next());
                let words: Vec<&str> = list.map_or_else(|| vec![rest], |list| list.split(',').collect());
                words.iter().any(|word| {
                    let word = word.trim_start();
                    word.starts_with(name.as_str())
                        && !word[name.len()..].starts_with(|next: char| next.is_alphanumeric() || next == '_')
                })
            })
        };
        after("super::") || after(&format!("crate::{folder}::"))
    };
    names.iter().filter(|name| named(name)).cloned().collect()
}

#[test]
fn the_files_of_the_queue_do_not_import_one_another_in_a_circle() {
    let files: Vec<(String, String)> = sources()
        .into_iter()
        .filter_map(|(file, text)| Some((file.strip_prefix("queue/")?.strip_suffix(".rs")?.to_owned(), text)))
        .filter(|(name, _)| name != "mod")
        .collect();
    let names: Vec<String> = files.iter().map(|(name, _)| name.clone()).collect();
    assert!(names.len() > 10, "{names:?}");
    let mut left: Vec<(String, Vec<String>)> =
        files.iter().map(|(name, text)| (name.clone(), siblings("queue", text, &names))).collect();
    assert!(left.iter().any(|(name, uses)| name == "writer" && uses.contains(&"segment".to_owned())), "{left:?}");
    // Who uses none of those that are left goes, until nobody is left.
    while !left.is_empty() {
        let before = left.len();
        let waiting: Vec<String> = left.iter().map(|(name, _)| name.clone()).collect();
        left.retain(|(name, uses)| uses.iter().any(|used| used != name && waiting.contains(used)));
        assert!(left.len() < before, "these import one another in a circle, or are imported by such: {left:?}");
    }
}
