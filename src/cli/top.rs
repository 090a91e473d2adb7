//! `top`: the running watcher live on a terminal.
//!
//! Asks for `GET /overview` once a second. The terminal is given back whatever happens: at the end, at a signal, and
//! when the program panics.

use std::io::{self, IsTerminal};
use std::time::Duration;

use crate::client::ClientError;
use crate::health::Status;
use crate::history::Sample;
use crate::http::Overview;
use crate::telemetry::RecentEvent;
use ratatui::crossterm::event::{self, Event as Input, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Block, Padding, Paragraph, Row, Sparkline, Table, Wrap};
use ratatui::{DefaultTerminal, Frame};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::status::{self, describe, duration, no_answer};
use super::{Context, Exit, Failure, block_on};

const REFRESH_INTERVAL: Duration = Duration::from_secs(1);

/// Samples asked for: more than any terminal has columns.
const SAMPLES: usize = 300;

/// The smallest terminal that has room for everything.
const COLUMNS_MIN: u16 = 80;
const ROWS_MIN: u16 = 24;

/// Rows below what "status" shows: rates and lag, plots, three events in their box with its header, the keys.
const OTHER_ROWS: u16 = 2 + 4 + 6 + 1;

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
    match status::ask(socket, &format!("/overview?samples={SAMPLES}")).await {
        Ok(body) => serde_json::from_slice(&body)
            .map_err(|error| format!("the watcher's answer is not understood: {error}; is it another version?")),
        Err(ClientError::NotRunning) => {
            Err(format!("no watcher listens on {}; start it with scripts/run-watcher.sh", socket.display()))
        }
        Err(ClientError::NoAnswer(problem)) => Err(no_answer(socket, &problem, None)),
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
        let area = frame.area();
        let (columns, rows) = (area.width, area.height);
        if columns < COLUMNS_MIN || rows < ROWS_MIN {
            let problem = format!(
                "top needs {COLUMNS_MIN} columns and {ROWS_MIN} rows; this terminal has {columns} and {rows}. q quits"
            );
            frame.render_widget(Paragraph::new(problem).wrap(Wrap { trim: false }), area);
            return;
        }
        let status = self.status();
        // A line that is wrapped at words takes up to a row more than its characters do.
        let rows_of = |line: &Line<'_>| line.width().div_ceil(usize::from(columns)).max(1);
        let wrapped: usize = status.iter().map(|line| rows_of(line) + usize::from(rows_of(line) > 1)).sum();
        let status_rows = u16::try_from(wrapped).unwrap_or(u16::MAX).min(rows - OTHER_ROWS);
        let [top, rates, plots, events, keys] = Layout::vertical([
            Constraint::Length(status_rows),
            Constraint::Length(2),
            Constraint::Length(4),
            Constraint::Min(6),
            Constraint::Length(1),
        ])
        .areas(area);
        frame.render_widget(Paragraph::new(status).wrap(Wrap { trim: false }), top);
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
            return if self.problem.is_some() { text } else { Text::raw("connecting…") };
        };
        let colour = match overview.health.status {
            Status::Pass => Color::Green,
            Status::Warn => Color::Yellow,
            Status::Fail => Color::Red,
        };
        if self.problem.is_some() {
            let seen = clock(&self.seen.to_string());
            text.push_line(Line::styled(format!("showing data from {seen}"), Style::new().fg(Color::Yellow)));
        }
        for line in describe(&overview.health).lines().filter(|line| !line.starts_with("page")) {
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
    let (captured, delivered) = (rate(|sample| sample.captured), rate(|sample| sample.delivered));
    let [p50, p90, p99] = [overview.lag.p50_seconds, overview.lag.p90_seconds, overview.lag.p99_seconds].map(lag);
    format!(
        "rates     captured {captured:.1}/s, delivered {delivered:.1}/s\n\
         lag       p50 {p50}, p90 {p90}, p99 {p99} over the last minute"
    )
}

fn draw_plots(frame: &mut Frame<'_>, area: Rect, overview: &Overview) {
    let [left, right] = Layout::horizontal([Constraint::Percentage(50), Constraint::Percentage(50)]).areas(area);
    let mut plot = |name: &str, colour, value: fn(&Sample) -> u64, area: Rect| {
        let skipped = overview.samples.len().saturating_sub(usize::from(area.width.saturating_sub(2)));
        let values: Vec<u64> = overview.samples.iter().skip(skipped).map(value).collect();
        let title = format!(" {name}, peak {} ", values.iter().max().unwrap_or(&0));
        let plot = Sparkline::default().block(Block::bordered().title(title)).style(Style::new().fg(colour));
        frame.render_widget(plot.data(values), area);
    };
    plot("delivered/s", Color::Green, |sample| sample.delivered, left);
    plot("waiting", Color::Yellow, |sample| sample.pending, right);
}

fn draw_events(frame: &mut Frame<'_>, area: Rect, events: &[RecentEvent]) {
    let dim = Style::new().add_modifier(Modifier::DIM);
    let rows = events.iter().map(|event| {
        let (name, mut style) = match event.event_type.as_str() {
            "turn_detected" => ("turn", Style::new()),
            "session_registered" => ("started", dim),
            "session_ended" => ("ended", dim),
            "state_transition" => ("state", dim),
            "hook_received" => ("hook", dim),
            other => (other, dim),
        };
        let detail = event.detail.as_deref().unwrap_or("-");
        for (actor, colour) in [("user", Color::Cyan), ("agent", Color::Magenta)] {
            if detail.starts_with(actor) {
                style = Style::new().fg(colour);
            }
        }
        let session: String = event.session.as_deref().unwrap_or("-").chars().take(8).collect();
        let project = event.project.as_deref().unwrap_or("-");
        Row::new([&clock(&event.timestamp), name, detail, project, &session].map(str::to_owned)).style(style)
    });
    let header = Row::new(["TIME", "EVENT", "WHAT", "PROJECT", "SESSION"]).style(dim);
    let [time, event, what, session] = [10, 8, 20, 8].map(Constraint::Length);
    let table = Table::new(rows, [time, event, what, Constraint::Min(10), session]).header(header);
    let block = Block::bordered().title(" last events ").padding(Padding::horizontal(1));
    frame.render_widget(table.block(block), area);
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

/// The time of day of a timestamp, where this terminal is; the date where it is not today.
fn clock(timestamp: &str) -> String {
    let Ok(at) = timestamp.parse::<jiff::Timestamp>() else { return "-".to_owned() };
    let (at, now) = (at.to_zoned(jiff::tz::TimeZone::system()), jiff::Zoned::now());
    at.strftime(if at.date() == now.date() { "%H:%M:%S" } else { "%Y-%m-%d" }).to_string()
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
