//! `check`: what is wrong, and how to mend it.

use std::path::Path;

use headspace_watcher::config::Config;
use headspace_watcher::intake::redact::Redactor;
use headspace_watcher::intake::schema::Schemas;
use headspace_watcher::service::connect_settings;
use headspace_watcher::sink::postgres::PostgresSink;

use super::{CheckArguments, Context, Exit, Failure, block_on};

/// What became of one thing that was looked at.
enum Finding {
    Fine(String),
    /// Works, but the reader should know.
    Note(String),
    Wrong(String),
}

pub fn check(context: &Context, arguments: &CheckArguments) -> Result<Exit, Failure> {
    let config = context.config();
    let mut findings = vec![
        ("configuration", configuration(context)),
        ("schemas", schemas(config)),
        ("redact", redact(config)),
        ("transcripts", transcripts(&config.claude.projects_path)),
        ("queue", writable(&config.queue.path)),
        ("spool", writable(&config.queue.spool_path)),
        ("socket", socket(&config.http.socket)),
    ];
    if !arguments.no_database {
        findings.push(("database", database(context)?));
    }
    let mut wrong = false;
    for (subject, finding) in findings {
        let (mark, text) = match finding {
            Finding::Fine(text) => ("ok   ", text),
            Finding::Note(text) => ("note ", text),
            Finding::Wrong(text) => {
                wrong = true;
                ("WRONG", text)
            }
        };
        println!("{mark}  {subject:<13}  {text}");
    }
    Ok(if wrong { Exit::Configuration } else { Exit::Fine })
}

/// It was read whole before any command began: what is wrong in it has been said and ended the program.
fn configuration(context: &Context) -> Finding {
    let mut text = match &context.loaded.file {
        Some(file) => file.display().to_string(),
        None => "no config.yaml here: built-in defaults".to_owned(),
    };
    if !context.loaded.variables.is_empty() {
        text.push_str(&format!("; set by the environment: {}", context.loaded.variables.join(", ")));
    }
    Finding::Fine(text)
}

fn schemas(config: &Config) -> Finding {
    match Schemas::load(config.schemas.path.as_deref(), config.event_system.max_event_bytes) {
        Ok(schemas) => {
            let types: Vec<&str> = schemas.types().map(|event_type| event_type.as_str()).collect();
            Finding::Fine(types.join(", "))
        }
        Err(error) => Finding::Wrong(error.to_string()),
    }
}

fn redact(config: &Config) -> Finding {
    match Redactor::new(&config.redact) {
        Ok(redactor) if redactor.is_on() => {
            Finding::Fine(format!("on, {} patterns beside the built-in ones", config.redact.patterns.len()))
        }
        Ok(_) => Finding::Fine("off".to_owned()),
        Err(error) => Finding::Wrong(error.to_string()),
    }
}

fn transcripts(folder: &Path) -> Finding {
    let shown = folder.display();
    match std::fs::read_dir(folder) {
        Ok(entries) => Finding::Fine(format!("{shown}: {} project folders", entries.count())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Finding::Note(format!(
            "{shown} is not there (yet): it is watched for; set claude.projects_path or CLAUDE_CONFIG_DIR if it is elsewhere"
        )),
        Err(error) => Finding::Wrong(format!(
            "could not read {shown}: {error}; give this user the right to read it or set claude.projects_path"
        )),
    }
}

/// Whether a file can be made in `folder`, or in the nearest parent that exists.
fn writable(folder: &Path) -> Finding {
    let existing = folder.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(folder);
    let probe = existing.join(format!(".headspace-watcher-check-{}", std::process::id()));
    match std::fs::write(&probe, b"") {
        Ok(()) => {
            let _ = std::fs::remove_file(&probe);
            Finding::Fine(folder.display().to_string())
        }
        Err(error) => Finding::Wrong(format!(
            "could not write in {}: {error}; mend its owner or mode, or set queue.path",
            existing.display()
        )),
    }
}

fn socket(path: &Path) -> Finding {
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Finding::Fine(format!("{}: a watcher is running", path.display())),
        Err(_) => Finding::Fine(format!("{}: no watcher is running", path.display())),
    }
}

fn database(context: &Context) -> Result<Finding, Failure> {
    let (target, has_database) = match context.target() {
        Ok(target) => target,
        Err(failure) => return Ok(Finding::Wrong(failure.message)),
    };
    if !has_database {
        return Ok(Finding::Note(
            "none is configured: events would stay in the queue; set database.url, DATABASE_URL or PGHOST, or use scripts/run-watcher.sh"
                .to_owned(),
        ));
    }
    let config = context.config();
    let inspected = block_on(PostgresSink::inspect(connect_settings(config, target)))?;
    Ok(match inspected {
        Ok(inspection) if inspection.missing.is_empty() => {
            Finding::Fine(format!("PostgreSQL {}, the tables are there", inspection.version))
        }
        Ok(inspection) if config.database.auto_migrate => Finding::Fine(format!(
            "PostgreSQL {}; will be created at the start: {}",
            inspection.version,
            inspection.missing.join(", ")
        )),
        Ok(inspection) => Finding::Wrong(format!(
            "PostgreSQL {}; missing: {}; run \"headspace-watcher migrate\" or set database.auto_migrate",
            inspection.version,
            inspection.missing.join(", ")
        )),
        Err(error) => Finding::Wrong(error.to_string()),
    })
}
