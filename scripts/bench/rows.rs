//! What was measured, as it is published: a table for the terminal, and lines of a file for everything else.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

/// What a number is to reach.
#[derive(Clone, Copy)]
pub enum Aim {
    None,
    Least(f64),
    Most(f64),
}

/// The file has a line for each row, fields parted by tabs: key, what, value, unit, what stands beside it, aim, and
/// whether the aim is reached (`yes`, `no`, or nothing where there is no aim).
pub struct Rows {
    file: Option<File>,
}

impl Rows {
    pub fn to(path: Option<&Path>) -> Result<Rows> {
        let open = |path: &Path| OpenOptions::new().create(true).append(true).open(path);
        let file = path.map(|path| open(path).with_context(|| format!("could not write {}", path.display())));
        Ok(Rows { file: file.transpose()? })
    }

    /// `key` is `part.what`; `beside` says in words what the number is to be compared with.
    pub fn add(&mut self, key: &str, what: &str, value: f64, unit: &str, beside: &str, aim: Aim) -> Result<()> {
        let (aim, reached) = match aim {
            Aim::None => (String::new(), ""),
            Aim::Least(least) => (format!("≥ {}", short(least)), if value >= least { "yes" } else { "no" }),
            Aim::Most(most) => (format!("≤ {}", short(most)), if value <= most { "yes" } else { "no" }),
        };
        let value = short(value);
        let verdict = match reached {
            "yes" => "   ",
            "no" => " ! ",
            _ => "   ",
        };
        println!("{what:<52} {value:>9} {unit:<9}{verdict}{aim:<9} {beside}");
        if let Some(file) = &mut self.file {
            writeln!(file, "{key}\t{what}\t{value}\t{unit}\t{beside}\t{aim}\t{reached}")?;
        }
        Ok(())
    }

    /// What the rows that follow are about. A line of two fields.
    pub fn title(&mut self, part: &str, title: &str) -> Result<()> {
        println!("\n{title}");
        if let Some(file) = &mut self.file {
            writeln!(file, "{part}\t{title}")?;
        }
        Ok(())
    }

    /// Says why a row is not there.
    pub fn skip(&mut self, key: &str, what: &str, why: &str) -> Result<()> {
        println!("{what:<52} {:>9} {why}", "SKIPPED");
        if let Some(file) = &mut self.file {
            writeln!(file, "{key}\t{what}\tSKIPPED\t\t{why}\t\t")?;
        }
        Ok(())
    }
}

/// Three digits that count; whole numbers from a hundred on.
pub fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || size == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// The middle one.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(0.0)
}

/// Milliseconds that so large a share does not exceed.
pub fn quantile(times: &[Duration], share: f64) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort();
    let index = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).map_or(0.0, |time| milliseconds(*time))
}

pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// "p50 1.2, p95 2.0, p99 2.4, max 5.0 ms"
pub fn quantiles(times: &[Duration]) -> String {
    let at = |share: f64| short(quantile(times, share));
    format!("p50 {}, p95 {}, p99 {}, max {} ms", at(0.5), at(0.95), at(0.99), at(1.0))
}
