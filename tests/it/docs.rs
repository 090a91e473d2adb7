//! What the documents say is so: their commands run, and the files, tests, keys and metrics they name are there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::stage::{Stage, project};

/// The documents at the project's root; all others are in docs/.
const ROOT_DOCUMENTS: [&str; 4] = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"];

/// All documents with their names.
fn documents() -> Vec<(String, String)> {
    let mut paths: Vec<PathBuf> = ROOT_DOCUMENTS.iter().map(|name| project().join(name)).collect();
    let docs = std::fs::read_dir(project().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    paths.extend(docs.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    paths.iter().map(|path| (name(path), std::fs::read_to_string(path).unwrap())).collect()
}

/// The lines of all blocks of this language, comments taken off.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for block in text.split("```").skip(1).step_by(2) {
        let (of, body) = block.split_once('\n').unwrap_or((block, ""));
        if of == language {
            lines.extend(body.lines().map(|line| line.split(" #").next().unwrap().trim().to_owned()));
        }
    }
    lines.retain(|line| !line.is_empty() && !line.starts_with('#'));
    lines
}

/// What stands between backquotes outside blocks.
fn quoted(text: &str) -> Vec<String> {
    let prose: String = text.split("```").step_by(2).collect();
    prose.split('`').skip(1).step_by(2).map(|word| word.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

/// Every file below `folder` of these kinds, as paths from the project's root.
fn files(folder: &str) -> Vec<PathBuf> {
    let root = project().join(folder);
    walkdir::WalkDir::new(&root)
        .into_iter()
        .map(|entry| entry.unwrap().into_path())
        .filter(|path| path.is_file())
        .collect()
}

/// The names of all tests.
fn tests() -> BTreeSet<String> {
    let mut tests = BTreeSet::new();
    for path in files("src").into_iter().chain(files("tests")) {
        let text = std::fs::read_to_string(path).unwrap();
        let mut lines = text.lines().map(str::trim);
        while let Some(line) = lines.next() {
            if !line.starts_with("#[test]") && !line.starts_with("#[tokio::test") {
                continue;
            }
            let function = lines.find(|line| line.contains("fn ")).unwrap_or_default();
            let name = function.split("fn ").nth(1).unwrap_or_default();
            tests.insert(name.split(['(', '<']).next().unwrap_or_default().to_owned());
        }
    }
    tests
}

#[test]
fn every_test_and_every_file_that_a_document_names_is_there() {
    let tests = tests();
    assert!(tests.len() > 300, "{}", tests.len());
    let mut named = 0;
    let mut missing = Vec::new();
    for (document, text) in documents() {
        for word in quoted(&text) {
            let name = word.rsplit("::").next().unwrap();
            // Tests are sentences; nothing else that is quoted has so many words.
            let least = if word.contains("::") { 3 } else { 5 };
            if name.matches('_').count() >= least
                && name.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit())
            {
                named += 1;
                if !tests.contains(name) {
                    missing.push(format!("{document}: test {word}"));
                }
                let module = word.split("::").next().unwrap();
                if word.contains("::") && !project().join(format!("tests/it/{module}.rs")).exists() {
                    missing.push(format!("{document}: {word}: no tests/it/{module}.rs"));
                }
            }
            let is_path =
                ["src/", "tests/", "docs/", "scripts/", "schemas/"].iter().any(|folder| word.starts_with(folder));
            let path = word.split(' ').next().unwrap();
            if is_path && !path.contains(['*', '<', '…']) && !project().join(path).exists() {
                missing.push(format!("{document}: {word}"));
            }
        }
        // Links to files beside it.
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let (link, _section) = link.split_once('#').unwrap_or((link, ""));
            let folder = if ROOT_DOCUMENTS.contains(&document.as_str()) { "." } else { "docs" };
            if !link.contains("://") && !project().join(folder).join(link).exists() {
                missing.push(format!("{document}: link to {link}"));
            }
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
    assert!(named > 20, "{named}");
}

#[test]
fn every_key_that_a_document_names_is_in_the_configuration() {
    let shipped = std::fs::read_to_string(project().join("config.yaml")).unwrap();
    let mut keys = BTreeSet::new();
    let mut section = "";
    for line in shipped.lines() {
        let line = line.trim_start_matches("# ");
        let Some((key, _)) = line.split_once(':') else { continue };
        match key.strip_prefix("  ") {
            Some(key) if !key.starts_with(' ') => drop(keys.insert(format!("{section}.{key}"))),
            _ if key.chars().all(|c| c.is_ascii_lowercase() || c == '_') => section = key,
            _ => {}
        }
    }
    let sections: BTreeSet<&str> = keys.iter().filter_map(|key| key.split('.').next()).collect();
    let mut named = 0;
    for (document, text) in documents() {
        for word in quoted(&text) {
            let key = word.split([':', ' ']).next().unwrap().trim_end_matches('.');
            let Some((section, name)) = key.split_once('.') else { continue };
            let is_key = name.chars().all(|c| c.is_ascii_lowercase() || c == '_');
            if !sections.contains(section) || !is_key || ["rs", "yaml", "md"].contains(&name) {
                continue;
            }
            named += 1;
            assert!(keys.contains(key), "{document} names {key}; there are {keys:?}");
        }
    }
    assert!(named > 10, "{named}");
}

#[test]
fn every_metric_of_the_operations_document_is_on_the_page() {
    let stage = Stage::with(None);
    let watcher = stage.start();
    let page = watcher.get("/metrics").unwrap().1;
    let (_, text) = documents().into_iter().find(|(name, _)| name == "operations.md").unwrap();
    let table = text.split("All names begin with").nth(1).unwrap().split("\n## ").next().unwrap();
    let mut documented = BTreeSet::new();
    for row in table.lines().filter(|line| line.starts_with("| `")) {
        for word in row.split('|').nth(1).unwrap().split('`').skip(1).step_by(2) {
            documented.insert(word.split('{').next().unwrap().to_owned());
        }
    }
    let shown: BTreeSet<String> = page
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE headspace_watcher_"))
        .map(|line| line.split(' ').next().unwrap().to_owned())
        .collect();
    assert_eq!(documented, shown, "documented, and shown");
}

/// What the program says to a command line of a document, which is given `--help` too: that a command, an option or a
/// value does not exist is found before that.
fn is_understood(line: &str) -> Result<(), String> {
    let program = format!("{} --help", line.trim());
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_headspace-watcher"), folder.path().join("headspace-watcher"))
        .unwrap();
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
    let ran = Command::new("sh").args(["-c", &program]).env("PATH", path).stdin(Stdio::null()).output().unwrap();
    match ran.status.success() {
        true => Ok(()),
        false => Err(format!("{line}: {}", String::from_utf8_lossy(&ran.stderr))),
    }
}

#[test]
fn every_command_line_of_a_document_or_of_a_help_is_one_that_the_program_takes() {
    let mut lines = BTreeSet::new();
    for (_, text) in documents() {
        lines.extend(blocks(&text, "sh"));
        lines.extend(quoted(&text));
    }
    let stage = Stage::with(None);
    let commands = |arguments: &[&str]| -> Vec<String> {
        let help = stage.run(arguments).output();
        let listed = help.split("Commands:\n").nth(1).map(|rest| rest.split("\n\n").next().unwrap().to_owned());
        let names = listed.unwrap_or_default();
        names.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
    };
    let all = commands(&["--help"]);
    assert!(all.len() > 8, "{all:?}");
    for command in all.iter().filter(|command| *command != "help") {
        let help = stage.run(&[command, "--help"]).output();
        let examples = help.split("Example").nth(1).unwrap_or_default();
        assert!(examples.contains("headspace-watcher "), "{command} --help has no example: {help}");
        lines.extend(examples.lines().skip(1).map(|line| line.split("  #").next().unwrap().trim().to_owned()));
        for line in help.lines().filter(|line| line.trim_start().starts_with("--")) {
            let described = line.trim().split("  ").filter(|part| !part.trim().is_empty()).count() > 1;
            assert!(described, "{command} --help does not say what this is: {line}");
        }
    }
    let mut wrong = Vec::new();
    let mut tried = 0;
    for line in lines {
        // What comes before and after the program in a pipe is not ours, nor where its output goes.
        let Some(at) = line.find("headspace-watcher ").filter(|at| *at == 0 || line[..*at].ends_with([' ', '/']))
        else {
            continue;
        };
        let ours = line[at..].split([';', '|', '>', '<']).next().unwrap();
        let second = ours.split_whitespace().nth(1).unwrap_or_default();
        // `hook` takes nothing but stdin; a word in a sentence is none of its commands.
        if !(second.starts_with("--") || all.iter().any(|command| command == second)) || ours.contains(['…', '[']) {
            continue;
        }
        tried += 1;
        wrong.extend(is_understood(&ours.replace("SEQ", "1")).err());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(tried > 20, "{tried}");
}

#[test]
fn the_commands_of_the_documents_do_what_they_say() {
    let stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("hello");
    std::fs::copy(&transcript.path, stage.folder().join("TRANSCRIPT.jsonl")).unwrap();
    let watcher = stage.start();
    stage.wait_for_rows(2);
    let folder = stage.folder().join("bin");
    std::fs::create_dir(&folder).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_headspace-watcher"), folder.join("headspace-watcher")).unwrap();
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
    // What needs a terminal, a service manager or a watcher of its own has its own tests.
    let elsewhere = [
        " top",
        " service ",
        " run",
        "emit --ndjson",
        " hook",
        "run-watcher.sh",
        "--watch",
        "config init",
        "r uninstall",
    ];
    let mut ran = 0;
    for (document, text) in documents() {
        for line in blocks(&text, "sh") {
            let is_ours = line.starts_with("headspace-watcher ");
            if !is_ours || elsewhere.iter().any(|word| line.contains(word)) {
                continue;
            }
            let mut command = stage.command(&[]);
            let environment: Vec<_> =
                command.get_envs().map(|(name, value)| (name.to_owned(), value.map(ToOwned::to_owned))).collect();
            command = Command::new("bash");
            command.args(["-c", &format!("fpath=(. .); mkdir -p ~/.local/share/bash-completion/completions ~/.config/fish/completions; {line}")]);
            command.env_clear().current_dir(stage.folder()).stdin(Stdio::null());
            command.envs(environment.into_iter().filter_map(|(name, value)| Some((name, value?)))).env("PATH", &path);
            let output = command.output().unwrap();
            assert!(output.status.success(), "{document}: {line}: {}", String::from_utf8_lossy(&output.stderr));
            ran += 1;
        }
    }
    assert!(ran >= 7, "{ran}");
    watcher.stop();
    // Looks for the watcher that is not there any more: exit code 3, as said.
    assert_eq!(stage.run(&["status"]).code(), 3);
}
