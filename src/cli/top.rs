//! `top`: the running watcher live on a terminal.
//!
//! Asks for `GET /overview` once a second. The terminal is given back whatever happens: at the end, at a signal, and
//! when the program panics.

use std::io::{self, IsTerminal};
use std::time::Duration;

use crate::health::Status;
use crate::history::Sample;
use crate::http::Overview;
use crate::telemetry::RecentEvent;
use ratatui::crossterm::event::{self, Event as Input, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Block, Paragraph, Row, Sparkline, Table, Wrap};
use ratatui::{DefaultTerminal, Frame};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::client::{self, ClientError};
use super::status::{describe, duration};
use super::{Context, Exit, Failure, block_on};

const REFRESH_INTERVAL: Duration = Duration::from_secs(1);

/// How long the watcher may take for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Samples asked for: more than any terminal has columns.
const SAMPLES: usize = 300;

/// Rows for what "status" shows: more would leave the last events no room on 24 rows.
const STATUS_ROWS: u16 = 11;

pub(super) fn top(context: &Context) -> Result<Exit, Failure> {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        let message = "top needs a terminal; for a script use \"headspace-watcher status --json\"";
        return Err(Failure::new(Exit::Usage, message));
    }
    let no_terminal = |error: io::Error| Failure::new(Exit::Io, format!("could not use the terminal: {error}"));
    // Also gives the terminal back when the program panics.
    let terminal = ratatui::try_init().map_err(no_terminal)?;
    let ended = block_on(run(context, terminal));
    ratatui::restore();
    ended?.map_err(no_terminal)?;
    Ok(Exit::Fine)
}

async fn run(context: &Context, mut terminal: DefaultTerminal) -> io::Result<()> {
    let mut view = View::default();
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
                Some(input) if !quits(&input) => {}
                // Nothing can be read from the terminal any more: it is gone.
                Some(_) | None => return Ok(()),
            },
            _ = tick.tick() => {
                tokio::select! {
                    () = &mut ended => return Ok(()),
                    answer = ask(context) => view.take(answer),
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

/// The watcher's answer, or why there is none.
async fn ask(context: &Context) -> Result<Overview, String> {
    let socket = &context.config().http.socket;
    let target = format!("/overview?samples={SAMPLES}");
    let asking = async { client::body(client::get(socket, &target).await?).await };
    let shown = socket.display();
    let no_answer = |why: &str| format!("the watcher on {shown} does not answer: {why}; if it stays so, restart it");
    match tokio::time::timeout(ANSWER_TIMEOUT, asking).await {
        Ok(Ok(body)) => serde_json::from_slice(&body)
            .map_err(|error| format!("the watcher's answer is not understood: {error}; is it another version?")),
        Ok(Err(ClientError::NotRunning)) => {
            Err(format!("no watcher listens on {shown}; start it with scripts/run-watcher.sh"))
        }
        Ok(Err(ClientError::NoAnswer(problem))) => Err(no_answer(&problem)),
        Err(_) => Err(no_answer(&format!("nothing within {} s", ANSWER_TIMEOUT.as_secs()))),
    }
}

/// Whether this key ends it.
fn quits(input: &Input) -> bool {
    let Input::Key(key) = input else { return false };
    let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
    let is_quit = matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) || key.code == KeyCode::Char('c') && is_control;
    key.kind == KeyEventKind::Press && is_quit
}

/// What is shown.
#[derive(Default)]
struct View {
    overview: Option<Overview>,
    /// When that was.
    seen: jiff::Timestamp,
    /// Why what is shown is not of now.
    problem: Option<String>,
}

impl View {
    fn take(&mut self, answer: Result<Overview, String>) {
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
        let [status, rates, plots, events, keys] = Layout::vertical([
            Constraint::Length(STATUS_ROWS),
            Constraint::Length(1),
            Constraint::Length(4),
            Constraint::Min(3),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        frame.render_widget(Paragraph::new(self.status()).wrap(Wrap { trim: false }), status);
        frame.render_widget(Paragraph::new("q quit").style(Style::new().add_modifier(Modifier::DIM)), keys);
        if let Some(overview) = &self.overview {
            frame.render_widget(Paragraph::new(rates_and_lag(overview)), rates);
            draw_plots(frame, plots, overview);
            draw_events(frame, events, &overview.events);
        }
    }

    /// What "status" shows, below what is wrong with asking.
    fn status(&self) -> Text<'static> {
        let mut text = Text::default();
        if let Some(problem) = &self.problem {
            text.push_line(Line::styled(problem.clone(), Style::new().fg(Color::Red)));
        }
        let Some(overview) = &self.overview else {
            return if self.problem.is_some() { text } else { Text::raw("asking…") };
        };
        let colour = match overview.health.status {
            Status::Pass => Color::Green,
            Status::Warn => Color::Yellow,
            Status::Fail => Color::Red,
        };
        if self.problem.is_some() {
            let seen = clock(&self.seen.to_string());
            text.push_line(Line::styled(format!("what stands below is of {seen}"), Style::new().fg(Color::Yellow)));
        }
        for line in describe(&overview.health).lines() {
            // Reasons and errors are indented.
            let is_coloured = line.starts_with("status") || line.starts_with(' ');
            let style = if is_coloured { Style::new().fg(colour) } else { Style::new() };
            text.push_line(Line::styled(line.to_owned(), style));
        }
        text
    }
}

/// The last five seconds' rates and the last minute's lag.
fn rates_and_lag(overview: &Overview) -> String {
    let rate = |count: fn(&Sample) -> u64| {
        let last = overview.samples.iter().rev().take(5);
        let (events, seconds) = last.fold((0, 0.0), |(e, s), sample| (e + count(sample), s + sample.seconds));
        if seconds > 0.0 { events as f64 / seconds } else { 0.0 }
    };
    let minute = &overview.lag;
    format!(
        "rates     captured {:.1}/s, delivered {:.1}/s; lag p50 {}, p90 {}, p99 {}",
        rate(|sample| sample.captured),
        rate(|sample| sample.delivered),
        lag(minute.p50_seconds),
        lag(minute.p90_seconds),
        lag(minute.p99_seconds)
    )
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
        let session = event.session.as_deref().unwrap_or("-");
        let detail = event.detail.as_deref().unwrap_or_default();
        Row::new([clock(&event.captured_at), event.event_type.clone(), detail.to_owned(), session.to_owned()])
    });
    let widths = [Constraint::Length(8), Constraint::Length(18), Constraint::Min(10), Constraint::Length(36)];
    let table = Table::new(rows, widths).block(Block::bordered().title(" last events "));
    frame.render_widget(table, area);
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
    fn a_lag_is_told_in_the_unit_that_fits() {
        let told: Vec<String> = [None, Some(0.00184), Some(2.5), Some(75.0)].into_iter().map(lag).collect();
        assert_eq!(told, ["-", "1.8 ms", "2.5 s", "1m 15s"]);
    }
}
