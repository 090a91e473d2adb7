//! The layers, read off the sources: who may import whom, and which outside crate is known where.

use std::collections::{BTreeMap, BTreeSet};
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
    let leaves =
        ["config", "telemetry", "event", "faults", "finding", "json", "private_folder", "regular_file", "skip"];
    let allowed = |layer: &str| -> &[&str] {
        match layer {
            "event" => &[],
            // Plain values only, for what happened lately.
            "telemetry" => &["event"],
            // A file is named by its configuration.
            "config" => &["regular_file"],
            "faults" | "finding" | "json" | "private_folder" | "regular_file" => &[],
            // Pure: it sees no file and no clock of its own.
            "session" => &[],
            "transcript" => &["session"],
            "claude" => &["event", "json", "config", "session", "transcript"],
            "codex" => &["event", "json", "session", "transcript"],
            // The seam: nothing else knows which agents there are.
            "agent" => &["claude", "codex", "session", "transcript"],
            "queue" => &["queue"],
            "intake" => &["agent", "claude", "queue", "session", "transcript"],
            "sink" => &["sink", "queue"],
            "listing" | "history" => &["queue"],
            "client" => &[],
            "source" => &["client", "listing", "queue"],
            "verify" => &["agent", "client", "intake", "listing", "queue", "session", "sink", "source", "transcript"],
            "health" => &["queue", "intake", "claude"],
            "http" => &["health", "history", "listing", "queue", "intake", "claude"],
            "service" => &["agent", "http", "health", "history", "listing", "intake", "sink", "queue"],
            _ => panic!("{layer} is a new module: say here what it may import"),
        }
    };
    let mut wrong = Vec::new();
    for (file, text) in sources() {
        let layer = module(&file);
        if matches!(layer, "main" | "lib" | "cli" | "internals") {
            continue;
        }
        for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
            for (_, after) in line.match_indices("crate::").map(|(at, found)| (at, &line[at + found.len()..])) {
                let imported = after.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
                let is_leaf =
                    leaves.contains(&imported) && !leaves.contains(&layer) && !matches!(layer, "claude" | "codex");
                if imported != layer && !is_leaf && !allowed(layer).contains(&imported) {
                    wrong.push(format!("{file}: {}", line.trim()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_knows_an_agent_sees_no_clock_and_no_file() {
    for word in ["::now", "std::fs", "std::io", "std::time::Instant", "SystemTime", "regular_file"] {
        let users: Vec<String> =
            mentions(word).into_iter().filter(|file| matches!(module(file), "claude" | "codex")).collect();
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
        ("ruzstd::", "intake/transcripts/compressed.rs"),
        ("sha2::", "codex/rollout.rs"),
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

/// The paths in code that begin with `crate`, `self` or `super`, one for each leaf of a list in braces.
fn paths(code: &str) -> Vec<Vec<&str>> {
    let mut paths = Vec::new();
    for root in ["crate::", "self::", "super::"] {
        for (at, _) in code.match_indices(root) {
            let before = code[..at].chars().next_back();
            if !before.is_some_and(|before| before.is_alphanumeric() || before == '_' || before == ':') {
                read_path(&code[at..], &[], &mut paths);
            }
        }
    }
    paths
}

/// Reads one path, or a list of them, that goes on from `start`. Returns what stands behind it.
fn read_path<'a>(code: &'a str, start: &[&'a str], paths: &mut Vec<Vec<&'a str>>) -> &'a str {
    if let Some(mut list) = code.strip_prefix('{') {
        loop {
            list = list.trim_start_matches(|next: char| next.is_whitespace() || next == ',');
            if list.is_empty() || list.starts_with('}') {
                return list.strip_prefix('}').unwrap_or_default();
            }
            list = read_path(list, start, paths);
        }
    }
    let end = code.find(|next: char| !next.is_alphanumeric() && next != '_').unwrap_or(code.len());
    let (name, rest) = code.split_at(end);
    let path = [start, &[name]].concat();
    if let Some(rest) = rest.strip_prefix("::") {
        return read_path(rest, &path, paths);
    }
    paths.push(path);
    match rest.strip_prefix(" as ") {
        Some(renamed) => renamed.trim_start_matches(|next: char| next.is_alphanumeric() || next == '_'),
        // A star, or the start of generic arguments.
        None if name.is_empty() => rest.get(1..).unwrap_or_default(),
        None => rest,
    }
}

/// For each file, as a module's path, the other files that it names. The head of a folder stands apart: it names the files of
/// the folder, and they may use what it defines.
fn imports() -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
    let modules: BTreeMap<Vec<String>, String> = sources()
        .into_iter()
        .map(|(file, text)| {
            let module = file.strip_suffix(".rs").unwrap();
            let module = module.strip_suffix("/mod").unwrap_or(module);
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            let module = module.split('/').filter(|name| *name != "lib").map(str::to_owned);
            (module.collect(), code.collect::<Vec<_>>().join("\n"))
        })
        .collect();
    let file_of = |mut path: Vec<String>| {
        while !modules.contains_key(&path) {
            path.pop();
        }
        path
    };
    let named = |module: &Vec<String>, code: &str| {
        let files = paths(code).into_iter().map(|path| {
            let mut full = module.clone();
            for name in path {
                match name {
                    "crate" => full.clear(),
                    "self" => {}
                    "super" => drop(full.pop()),
                    name => full.push(name.to_owned()),
                }
            }
            file_of(full)
        });
        files.filter(|file| !module.starts_with(file)).collect()
    };
    modules.iter().map(|(module, code)| (module.clone(), named(module, code))).collect()
}

#[test]
fn no_files_import_one_another_in_a_cycle() {
    let mut left = imports();
    let name = |module: &[String]| module.join("::");
    let used = |user: &str, used: &str| {
        left.iter().any(|(file, uses)| name(file) == user && uses.iter().any(|file| name(file) == used))
    };
    assert!(used("queue::writer", "queue::segment") && used("sink::postgres", "sink::postgres::session"), "{left:?}");
    assert!(used("intake::spool_reader", "queue"), "{left:?}");
    // A file goes when it uses none of those that are left, or none of them uses it: what stays is in a cycle, or between two.
    while !left.is_empty() {
        let before = left.len();
        let files: BTreeSet<Vec<String>> = left.keys().cloned().collect();
        let in_use: BTreeSet<Vec<String>> = left.values().flatten().cloned().collect();
        left.retain(|file, uses| in_use.contains(file) && uses.iter().any(|used| files.contains(used)));
        let files: BTreeSet<Vec<String>> = left.keys().cloned().collect();
        left.values_mut().for_each(|uses| uses.retain(|used| files.contains(used)));
        let cycle: Vec<String> = left
            .iter()
            .map(|(file, uses)| {
                format!("{} uses {}", name(file), uses.iter().map(|used| name(used)).collect::<Vec<_>>().join(", "))
            })
            .collect();
        assert!(left.len() < before, "these files import one another in a cycle:\n{}", cycle.join("\n"));
    }
}

#[test]
fn a_path_is_read_as_the_compiler_reads_it() {
    let found =
        paths("use crate::a::{B, c::{self, D as E}, f::*};\nsuper::super::g::<u8>(); other::crate_::h; xcrate::i");
    let found: Vec<String> = found.iter().map(|path| path.join("::")).collect();
    assert_eq!(found, ["crate::a::B", "crate::a::c::self", "crate::a::c::D", "crate::a::f::", "super::super::g::"]);
}

#[test]
fn only_the_seam_knows_codex() {
    for word in ["codex::", "CodexCli"] {
        let allowed = ["agent.rs", "session.rs", "lib.rs", "codex.rs"];
        let users = mentions(word).into_iter();
        let elsewhere: Vec<String> =
            users.filter(|file| !file.starts_with("codex/") && !allowed.contains(&file.as_str())).collect();
        assert!(elsewhere.is_empty(), "{word} in {elsewhere:?}");
    }
}
