//! From when on transcripts are about to be deleted by Claude Code.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::agent::AgentFolder;
use crate::claude::retention::{self, CLEANUP_PERIOD_DAYS, WARN_DAYS};
use crate::claude::settings::FILE_BYTES_MAX;
use crate::event::Timestamp;
use crate::regular_file;
use jiff::SignedDuration;

/// How often the settings are read.
const READ_INTERVAL: Duration = Duration::from_secs(60);

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Knows from when on transcripts are about to be deleted. Of several projects folders the shortest time counts for all:
/// a warning that comes early does no harm.
pub(crate) struct Retention {
    settings: Vec<PathBuf>,
    period: Duration,
    read_at: Option<Instant>,
}

impl Retention {
    /// Claude Code's `settings.json` is beside each of its folders.
    pub(crate) fn new(folders: &[AgentFolder]) -> Retention {
        let settings = folders.iter().filter(|folder| folder.agent.deletes_transcripts());
        let settings = settings.map(|folder| settings_beside(&folder.path)).collect();
        Retention { settings, period: Duration::ZERO, read_at: None }
    }

    /// Transcripts that were last changed before this are deleted within [`WARN_DAYS`], or overdue.
    pub(crate) fn expires_before(&mut self, now: Timestamp) -> Timestamp {
        let age = self.period().saturating_sub(DAY * WARN_DAYS as u32);
        let age = SignedDuration::try_from(age).unwrap_or(SignedDuration::MAX);
        now.checked_sub(age).unwrap_or(Timestamp::MIN)
    }

    /// How long a transcript is kept after it was last changed.
    pub(crate) fn period(&mut self) -> Duration {
        if self.read_at.is_none_or(|at| at.elapsed() >= READ_INTERVAL) {
            self.read_at = Some(Instant::now());
            let days = self.settings.iter().map(|settings| cleanup_period_days(settings)).min();
            let days = days.unwrap_or(CLEANUP_PERIOD_DAYS);
            self.period = DAY.saturating_mul(u32::try_from(days).unwrap_or(u32::MAX));
        }
        self.period
    }
}

/// Claude Code's settings for the sessions of a projects folder.
pub(crate) fn settings_beside(projects: &Path) -> PathBuf {
    projects.with_file_name("settings.json")
}

/// What the settings say; the default where they can't be read.
fn cleanup_period_days(settings: &Path) -> u64 {
    let settings = regular_file::read(settings, FILE_BYTES_MAX).ok();
    settings.and_then(|bytes| retention::cleanup_period_days(&bytes)).unwrap_or(CLEANUP_PERIOD_DAYS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::Agent;

    fn projects(folder: &Path) -> AgentFolder {
        AgentFolder { agent: Agent::ClaudeCode, path: folder.join("projects") }
    }

    fn days_until_warned(settings: Option<&str>) -> i64 {
        let folder = tempfile::tempdir().unwrap();
        if let Some(settings) = settings {
            std::fs::write(folder.path().join("settings.json"), settings).unwrap();
        }
        let now: Timestamp = "2026-06-01T00:00:00Z".parse().unwrap();
        let before = Retention::new(&[projects(folder.path())]).expires_before(now);
        now.duration_since(before).as_hours() / 24
    }

    #[test]
    fn the_settings_say_how_long_and_else_the_default() {
        assert_eq!(days_until_warned(None), 27);
        assert_eq!(days_until_warned(Some("{}")), 27);
        assert_eq!(days_until_warned(Some("garbage")), 27);
        assert_eq!(days_until_warned(Some(r#"{"cleanupPeriodDays": 10}"#)), 7);
        assert_eq!(days_until_warned(Some(r#"{"cleanupPeriodDays": 1}"#)), 0);
        assert_eq!(days_until_warned(Some("\u{feff}{\"cleanupPeriodDays\": 10}")), 7, "as an editor may write it");
    }

    #[test]
    fn an_endless_period_warns_never() {
        let folder = tempfile::tempdir().unwrap();
        let endless = format!("{{\"cleanupPeriodDays\": {}}}", u64::MAX);
        std::fs::write(folder.path().join("settings.json"), endless).unwrap();
        assert_eq!(Retention::new(&[projects(folder.path())]).expires_before(Timestamp::now()), Timestamp::MIN);
    }
}
