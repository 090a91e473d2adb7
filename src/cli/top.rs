//! `top`: the running watcher live on a terminal.
//!
//! Asks for `GET /overview` once a second. The terminal is given back whatever happens: at the end, at a signal, and
//! when the program panics.

use std::io::{self, IsTerminal};
use std::time::Duration;

use crate::health::Status;
use crate::http::{Overview, RecentEvent, RecentSession};
use ratatui::crossterm::event::{self, Event as Input, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Paragraph, Row, Sparkline, Table};
use ratatui::{DefaultTerminal, Frame};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::client::{self, ClientError};
use super::status::{bytes, duration};
use super::{Context, Exit, Failure, TopArguments, block_on};

const REFRESH_INTERVAL: Duration = Duration::from_secs(1);

/// How long the watcher may take for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Samples asked for: more than any terminal has columns.
const SAMPLES: usize = 300;

/// Lines for what is wrong: more would leave the last events no room on 24 rows.
const NOTICE_LINES_MAX: usize = 5;

pub fn top(context: &Context, arguments: &TopArguments) -> Result<Exit, Failure> {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        let message = "top needs a terminal; for a script use \"headspace-watcher status --json\"";
        return Err(Failure::new(Exit::Usage, message));
    }
    let no_terminal = |error: io::Error| Failure::new(Exit::Io, format!("could not use the terminal: {error}"));
    // Also gives the terminal back when the program panics.
    let terminal = ratatui::try_init().map_err(no_terminal)?;
    let ended = block_on(run(context, arguments, terminal));
    ratatui::restore();
    ended?.map_err(no_terminal)?;
    Ok(Exit::Fine)
}

async fn run(context: &Context, arguments: &TopArguments, mut terminal: DefaultTerminal) -> io::Result<()> {
    let mut view = View { text: arguments.text, ..View::default() };
    let mut inputs = read_inputs();
    let mut signals = Vec::new();
    for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup(), SignalKind::quit()] {
        signals.push(signal(kind)?);
    }
    let mut ended = Box::pin(async move {
        let any = signals.iter_mut().map(|signal| Box::pin(signal.recv()));
        futures_util::future::select_all(any).await;
    });
    let mut tick = tokio::time::interval(REFRESH_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            () = &mut ended => return Ok(()),
            input = inputs.recv() => match input {
                Some(input) if view.heed(&input) => {}
                // Nothing can be read from the terminal any more: it is gone.
                Some(_) | None => return Ok(()),
            },
            _ = tick.tick() => {
                tokio::select! {
                    () = &mut ended => return Ok(()),
                    answer = ask(context, view.text) => view.take(answer),
                }
            }
        }
        terminal.draw(|frame| view.draw(frame))?;
        #[cfg(debug_assertions)]
        if std::env::var_os("HEADSPACE_FAULT_POINT").is_some_and(|point| point == "top-drawn") {
            panic!("the environment asks for it");
        }
    }
}

/// Keys come from a thread of their own, which ends with the program.
fn read_inputs() -> mpsc::Receiver<Input> {
    let (sender, receiver) = mpsc::channel(16);
    std::thread::spawn(move || {
        while let Ok(input) = event::read() {
            if sender.blocking_send(input).is_err() {
                return;
            }
        }
    });
    receiver
}

async fn ask(context: &Context, text: bool) -> Result<Overview, Problem> {
    let socket = &context.config().http.socket;
    let target = format!("/overview?samples={SAMPLES}&text={text}");
    let asking = async { client::body(client::get(socket, &target).await?).await };
    let shown = socket.display();
    let no_answer = |why: &str| Problem {
        word: "NO ANSWER",
        text: format!("the watcher on {shown} does not answer: {why}; if it stays so, restart it"),
    };
    match tokio::time::timeout(ANSWER_TIMEOUT, asking).await {
        Ok(Ok(body)) => serde_json::from_slice(&body).map_err(|error| Problem {
            word: "NOT UNDERSTOOD",
            text: format!("the watcher's answer is not understood: {error}; is it another version?"),
        }),
        Ok(Err(ClientError::NotRunning)) => Err(Problem {
            word: "NOT RUNNING",
            text: format!("no watcher listens on {shown}; start it with scripts/run-watcher.sh"),
        }),
        Ok(Err(ClientError::NoAnswer(problem))) => Err(no_answer(&problem)),
        Err(_) => Err(no_answer(&format!("nothing within {} s", ANSWER_TIMEOUT.as_secs()))),
    }
}

/// Why there is no answer.
struct Problem {
    word: &'static str,
    text: String,
}

/// What is shown.
#[derive(Default)]
struct View {
    overview: Option<Overview>,
    /// When that was.
    seen: jiff::Timestamp,
    /// Why what is shown is not of now.
    problem: Option<Problem>,
    /// Whether texts of events are shown.
    text: bool,
}

impl View {
    /// False when it is to end.
    fn heed(&mut self, input: &Input) -> bool {
        let Input::Key(key) = input else { return true };
        if key.kind != KeyEventKind::Press {
            return true;
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return false,
            KeyCode::Char('t') => {
                self.text = !self.text;
                if let (false, Some(overview)) = (self.text, &mut self.overview) {
                    overview.events.iter_mut().for_each(|event| event.text = None);
                }
            }
            _ => {}
        }
        true
    }

    fn take(&mut self, answer: Result<Overview, Problem>) {
        match answer {
            Ok(overview) => {
                self.problem = None;
                self.seen = jiff::Timestamp::now();
                self.overview = Some(overview);
            }
            Err(problem) => self.problem = Some(problem),
        }
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let notices = self.notices(frame.area().width);
        let [head, notice, numbers, plots, events, sessions, keys] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(notices.len().max(1) as u16),
            Constraint::Length(6),
            Constraint::Length(4),
            Constraint::Min(3),
            Constraint::Length(4),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        frame.render_widget(self.head(), head);
        let text = if self.text { "t hide texts" } else { "t show texts" };
        let dim = Style::new().add_modifier(Modifier::DIM);
        frame.render_widget(Paragraph::new(format!(" q quit   {text}")).style(dim), keys);
        frame.render_widget(Paragraph::new(notices), notice);
        let Some(overview) = &self.overview else { return };
        draw_numbers(frame, numbers, overview);
        draw_plots(frame, plots, overview);
        draw_events(frame, events, &overview.events);
        draw_sessions(frame, sessions, &overview.sessions);
    }

    /// What is wrong, whole: lines as wide as the terminal, the worst first.
    fn notices(&self, width: u16) -> Vec<Line<'static>> {
        let (yellow, red) = (Style::new().fg(Color::Yellow), Style::new().fg(Color::Red));
        let mut notices = Vec::new();
        match (&self.problem, &self.overview) {
            (Some(problem), overview) => {
                notices.push((problem.text.clone(), red));
                if overview.is_some() {
                    notices.push((format!("what stands below is of {}", clock(&self.seen.to_string())), yellow));
                }
            }
            (None, Some(overview)) => {
                notices.extend(overview.health.reasons.iter().map(|reason| (reason.clone(), yellow)));
                let error = overview.health.database.last_error.iter();
                notices.extend(error.map(|error| (format!("last error: {error}"), red)));
            }
            (None, None) => {}
        }
        let width = usize::from(width.saturating_sub(2));
        let lines = notices.into_iter().flat_map(|(text, style)| {
            wrapped(&text, width).into_iter().map(move |line| Line::styled(format!(" {line}"), style))
        });
        lines.take(NOTICE_LINES_MAX).collect()
    }

    fn head(&self) -> Paragraph<'_> {
        let mut spans = vec![Span::raw(" headspace-watcher  ")];
        match (&self.problem, &self.overview) {
            (Some(problem), _) => spans.push(Span::styled(problem.word, Style::new().fg(Color::Red).bold())),
            (None, None) => spans.push(Span::raw("asking…")),
            (None, Some(overview)) => {
                let health = &overview.health;
                let (word, colour) = match health.status {
                    Status::Pass => ("● pass", Color::Green),
                    Status::Warn => ("▲ warn", Color::Yellow),
                    Status::Fail => ("■ FAIL", Color::Red),
                };
                spans.push(Span::styled(word, Style::new().fg(colour).bold()));
                let up = duration(health.uptime_seconds);
                spans.push(Span::raw(format!("  pid {}  up {up}  version {}", health.pid, health.version)));
            }
        }
        Paragraph::new(Line::from(spans))
    }
}

fn draw_numbers(frame: &mut Frame<'_>, area: Rect, overview: &Overview) {
    let [left, right] = Layout::horizontal([Constraint::Percentage(50), Constraint::Percentage(50)]).areas(area);
    let health = &overview.health;
    let rate = |count: fn(&crate::history::Sample) -> u64| {
        // Over the last five seconds: a rate that can be read.
        let last = overview.samples.iter().rev().take(5);
        let (events, seconds) = last.fold((0, 0.0), |(e, s), sample| (e + count(sample), s + sample.seconds));
        if seconds > 0.0 { events as f64 / seconds } else { 0.0 }
    };
    let waits = health.queue.oldest_age_seconds.map_or_else(String::new, |age| format!(", oldest {}", lag(Some(age))));
    let flow = vec![
        Line::from(format!("captured   {:>9.1}/s  {:>10}", rate(|s| s.captured), overview.totals.captured)),
        Line::from(format!("delivered  {:>9.1}/s  {:>10}", rate(|s| s.delivered), overview.totals.delivered)),
        Line::from(format!("queue      {} ({}){waits}", health.queue.pending, bytes(health.queue.pending_bytes))),
        Line::from(format!(
            "failures {}  duplicates {}  dead {}",
            health.writes.failed, health.writes.duplicates, health.queue.dead_letters
        )),
    ];
    frame.render_widget(Paragraph::new(flow).block(Block::bordered().title(" flow ")), left);
    let minute = &overview.lag;
    let percentiles =
        format!("p50 {}  p90 {}  p99 {}", lag(minute.p50_seconds), lag(minute.p90_seconds), lag(minute.p99_seconds));
    let up = health.database.state == "up";
    let database = Style::new().fg(if up { Color::Green } else { Color::Yellow });
    let lines = vec![
        Line::from(percentiles),
        Line::from(vec![
            Span::raw("database "),
            Span::styled(health.database.state.as_str(), database),
            Span::raw(format!(" since {}", clock(&health.database.since))),
        ]),
        Line::from(format!("{} sessions, {} files", health.watcher.sessions, health.watcher.files)),
        Line::from(match &health.writes.last_write_timestamp {
            Some(then) => format!("last write at {}", clock(then)),
            None => "nothing written since the start".to_owned(),
        }),
    ];
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" lag, last minute ")), right);
}

fn draw_plots(frame: &mut Frame<'_>, area: Rect, overview: &Overview) {
    let [left, right] = Layout::horizontal([Constraint::Percentage(50), Constraint::Percentage(50)]).areas(area);
    let plot = |values: Vec<u64>, title: String, colour, width: u16| {
        let columns = usize::from(width.saturating_sub(2));
        let shown: Vec<u64> = values.iter().skip(values.len().saturating_sub(columns)).copied().collect();
        Sparkline::default().block(Block::bordered().title(title)).style(Style::new().fg(colour)).data(shown)
    };
    let delivered: Vec<u64> = overview.samples.iter().map(|sample| sample.delivered).collect();
    let pending: Vec<u64> = overview.samples.iter().map(|sample| sample.pending).collect();
    let most = |values: &[u64]| values.iter().max().copied().unwrap_or_default();
    let titles = (format!(" delivered/s, most {} ", most(&delivered)), format!(" waiting, most {} ", most(&pending)));
    frame.render_widget(plot(delivered, titles.0, Color::Green, left.width), left);
    frame.render_widget(plot(pending, titles.1, Color::Yellow, right.width), right);
}

fn draw_events(frame: &mut Frame<'_>, area: Rect, events: &[RecentEvent]) {
    let rows = events.iter().map(|event| {
        let session: String = event.session.as_deref().unwrap_or("-").chars().take(8).collect();
        let detail = event.detail.as_deref().unwrap_or_default();
        Row::new([
            Cell::from(clock(&event.captured_at)),
            Cell::from(event.event_type.as_str()),
            Cell::from(session),
            Cell::from(match &event.text {
                Some(text) => format!("{detail}: {text}"),
                None => detail.to_owned(),
            }),
        ])
    });
    let widths = [Constraint::Length(8), Constraint::Length(18), Constraint::Length(8), Constraint::Min(10)];
    let table = Table::new(rows, widths).block(Block::bordered().title(" last events "));
    frame.render_widget(table, area);
}

fn draw_sessions(frame: &mut Frame<'_>, area: Rect, sessions: &[RecentSession]) {
    let rows = sessions.iter().map(|session| {
        Row::new([
            Cell::from(clock(&session.last_seen)),
            Cell::from(session.session.as_str()),
            Cell::from(format!("{}", session.events)),
            Cell::from(session.project.as_str()),
        ])
    });
    let widths = [Constraint::Length(8), Constraint::Length(36), Constraint::Length(7), Constraint::Min(10)];
    let table = Table::new(rows, widths).block(Block::bordered().title(" sessions, events since the start "));
    frame.render_widget(table, area);
}

/// `text` in lines of at most `width` characters, broken between words where they are not longer than that.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let width = width.max(1);
    let (mut lines, mut line, mut used) = (Vec::new(), String::new(), 0);
    for word in text.split_whitespace() {
        if used > 0 {
            if used + 1 + word.chars().count() > width {
                lines.push(std::mem::take(&mut line));
                used = 0;
            } else {
                line.push(' ');
                used += 1;
            }
        }
        for character in word.chars() {
            if used == width {
                lines.push(std::mem::take(&mut line));
                used = 0;
            }
            line.push(character);
            used += 1;
        }
    }
    lines.push(line);
    lines
}

/// `0.00184` → `1.8 ms`.
fn lag(seconds: Option<f64>) -> String {
    match seconds {
        None => "-".to_owned(),
        Some(seconds) if seconds < 1.0 => format!("{:.1} ms", seconds * 1000.0),
        Some(seconds) if seconds < 60.0 => format!("{seconds:.1} s"),
        Some(seconds) => duration(seconds as u64),
    }
}

/// The time of day of a timestamp, where this terminal is.
fn clock(timestamp: &str) -> String {
    let parsed: Result<jiff::Timestamp, _> = timestamp.parse();
    parsed.map_or_else(
        |_| "-".to_owned(),
        |at| at.to_zoned(jiff::tz::TimeZone::system()).strftime("%H:%M:%S").to_string(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_broken_between_words_and_a_long_word_anywhere() {
        assert_eq!(wrapped("the database is away", 12), ["the database", "is away"]);
        assert_eq!(wrapped("see abcdefgh", 5), ["see", "abcde", "fgh"]);
        assert_eq!(wrapped("", 5), [""]);
    }

    #[test]
    fn a_lag_is_told_in_the_unit_that_fits() {
        let told: Vec<String> = [None, Some(0.00184), Some(2.5), Some(75.0)].into_iter().map(lag).collect();
        assert_eq!(told, ["-", "1.8 ms", "2.5 s", "1m 15s"]);
    }
}
