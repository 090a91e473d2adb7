//! What is wrong with a configuration, where, in one line each.

use std::fmt;
use std::path::PathBuf;

/// Where a value was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a file, at a line counted from 1 where the line is known.
    File { path: PathBuf, line: Option<usize>, column: Option<usize> },
    /// In a variable of the environment.
    Variable(String),
    /// Nowhere: the built-in default.
    Default,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File { path, line, column } => {
                write!(f, "{}", path.display())?;
                if let Some(line) = line {
                    write!(f, ":{line}")?;
                }
                if let Some(column) = column {
                    write!(f, ":{column}")?;
                }
                Ok(())
            }
            Place::Variable(name) => write!(f, "environment {name}"),
            Place::Default => f.write_str("built-in default"),
        }
    }
}

/// One mistake: `config.yaml:12: database.pool_size: expected a whole number from 1 to 64, found "many"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub place: Place,
    /// `section.key`, or the section alone; `None` when the place says it, or when it is no matter of one key.
    pub key: Option<String>,
    /// What was expected and what was found, without any secret.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.place)?;
        // The name of a variable says the key already.
        if let (Some(key), Place::File { .. } | Place::Default) = (&self.key, &self.place) {
            write!(f, "{key}: ")?;
        }
        f.write_str(&self.message)
    }
}

/// A configuration that can't be used. Displays one line for each mistake; exit code 78.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    problems: Vec<Problem>,
}

impl ConfigError {
    pub(super) fn new(problems: Vec<Problem>) -> Self {
        ConfigError { problems }
    }

    /// Every mistake, in the order of the file; never empty.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

impl From<Problem> for ConfigError {
    fn from(problem: Problem) -> Self {
        ConfigError { problems: vec![problem] }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}
