//! `top` on a real terminal (tmux): what it shows, and that the terminal is given back whatever happens.

use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::stage::{SOON, Stage, lacks, signal, wait_for, wait_until};

/// A terminal in which a shell runs `top` and then says how it has left the terminal.
struct Terminal {
    server: String,
}

impl Terminal {
    /// 80 columns and 24 rows. `None`, said aloud, where there is no tmux.
    fn start(stage: &Stage, fault: &str) -> Option<Terminal> {
        if lacks("tmux", Command::new("tmux").arg("-V").output().is_ok()) {
            return None;
        }
        static TERMINALS: AtomicU32 = AtomicU32::new(0);
        let number = TERMINALS.fetch_add(1, Ordering::Relaxed);
        let terminal = Terminal { server: stage.folder().join(format!("tmux-{number}")).to_str().unwrap().to_owned() };
        let script = stage.folder().join("top.sh");
        let config = stage.folder().join("config.yaml");
        std::fs::write(
            &script,
            format!(
                "export TERM=xterm-256color HEADSPACE_FAULT_POINT={fault} RUST_BACKTRACE=0 TZ=UTC\n{} --config {} top\n\
                 echo \"ended with $?\"; stty -a | grep -o -- '-\\?\\(icanon\\|echo\\|isig\\)\\b'; echo that is all; sleep 600\n",
                env!("CARGO_BIN_EXE_headspace-watcher"),
                config.display()
            ),
        )
        .unwrap();
        let started = terminal.tmux(&["new-session", "-d", "-x", "80", "-y", "24", "sh", script.to_str().unwrap()]);
        assert!(started.status.success(), "{started:?}");
        Some(terminal)
    }

    fn tmux(&self, arguments: &[&str]) -> Output {
        Command::new("tmux").args(["-f", "/dev/null", "-S", &self.server]).args(arguments).output().unwrap()
    }

    fn screen(&self) -> String {
        String::from_utf8(self.tmux(&["capture-pane", "-p"]).stdout).unwrap()
    }

    fn resize(&self, columns: usize, rows: usize) {
        self.tmux(&["resize-window", "-x", &columns.to_string(), "-y", &rows.to_string()]);
    }

    #[track_caller]
    fn wait_for(&self, what: &str) -> String {
        wait_for(&format!("\"{what}\" on the screen"), SOON, || {
            Some(self.screen()).filter(|screen| screen.contains(what))
        })
    }

    /// The process of `top`, a child of the shell.
    fn top(&self) -> u32 {
        let shell = String::from_utf8(self.tmux(&["display", "-p", "#{pane_pid}"]).stdout).unwrap();
        let found = Command::new("ps").args(["-o", "pid=", "--ppid", shell.trim()]).output().unwrap();
        String::from_utf8(found.stdout).unwrap().trim().parse().unwrap()
    }

    /// The shell is back, on the main screen, with a cursor and a terminal that echoes and heeds Ctrl-C.
    #[track_caller]
    fn assert_given_back(&self) -> String {
        let screen = self.wait_for("that is all");
        let flags = String::from_utf8(self.tmux(&["display", "-p", "#{alternate_on} #{cursor_flag}"]).stdout).unwrap();
        assert_eq!(flags.trim(), "0 1", "alternate screen, cursor");
        let settings: Vec<&str> = screen.lines().filter(|line| line.len() < 8 && !line.is_empty()).collect();
        for setting in ["isig", "icanon", "echo"] {
            assert!(settings.contains(&setting), "{setting}: {screen}");
        }
        screen
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.tmux(&["kill-server"]);
    }
}

#[test]
fn top_shows_what_goes_on_at_80_by_24_and_no_texts() {
    let stage = Stage::new();
    let watcher = stage.start();
    let mut transcript = stage.transcript("-home-me-app", 7);
    transcript.say("a secret text");
    transcript.append("no JSON\n");
    stage.wait_for_rows(2);
    let Some(terminal) = Terminal::start(&stage, "") else { return };
    terminal.wait_for("user prompt");
    // Sessions are counted by the next rescan, and a screen may be read while it is drawn.
    for expected in [
        "1 file, 1 session,",
        "status    warn",
        &format!("pid {}", watcher.pid()),
        "1 dead letter;",
        "rates     captured ",
        "delivered ",
        "queue     0 pending (0 B)",
        "database  up for ",
        "writes    2 stored, 0 duplicates, 0 failed",
        "lag       p50 ",
        "over the last minute",
        "delivered/s, peak ",
        "waiting, peak ",
        "TIME       EVENT    WHAT                 PROJECT",
        "2026-01-02 turn     user prompt          app",
        "started",
        " 00000007 │",
        "q quit",
    ] {
        terminal.wait_for(expected);
    }
    let screen = terminal.screen();
    assert!(!screen.contains("secret"), "{screen}");
    watcher.stop();
    let screen = terminal.wait_for("no watcher listens on");
    assert!(screen.contains("start it with") && screen.contains("scripts/run-watcher.sh"), "{screen}");
    assert!(screen.contains("showing data from "), "{screen}");
    let again = stage.start();
    terminal.wait_for(&format!("pid {}", again.pid()));
    terminal.tmux(&["send-keys", "q"]);
    let screen = terminal.assert_given_back();
    assert!(screen.contains("ended with 0"), "{screen}");
}

#[test]
fn top_fits_its_terminal_or_says_what_it_needs() {
    let stage = Stage::new();
    stage.transcript("-home-me-app", 7).say_many("text", 30);
    let _watcher = stage.start();
    stage.wait_for_rows(31);
    let Some(terminal) = Terminal::start(&stage, "") else { return };
    terminal.wait_for("status    pass");
    for (columns, rows) in [(80, 24), (100, 30), (120, 40)] {
        terminal.resize(columns, rows);
        // Events have what is left beside status (6), rates (2), plots (4), their box (3) and the keys; 20 are known.
        let expected = (rows - 6 - 2 - 4 - 3 - 1).min(20);
        wait_until("the events have their rows", SOON, || {
            let screen = terminal.screen();
            screen.matches("user prompt").count() == expected && screen.trim_end().ends_with("q quit")
        });
    }
    for (columns, rows) in [(40, 10), (79, 24), (80, 23)] {
        terminal.resize(columns, rows);
        wait_until("it says what it needs", SOON, || {
            let screen = terminal.screen().split_whitespace().collect::<Vec<_>>().join(" ");
            screen == format!("top needs 80 columns and 24 rows; this terminal has {columns} and {rows}. q quits")
        });
    }
}

#[test]
fn top_gives_the_terminal_back_at_a_signal() {
    let stage = Stage::with(None);
    let _watcher = stage.start();
    for name in ["TERM", "INT", "HUP", "QUIT"] {
        let Some(terminal) = Terminal::start(&stage, "") else { return };
        terminal.wait_for("q quit");
        signal(terminal.top(), name);
        terminal.assert_given_back();
    }
}

#[test]
fn top_gives_the_terminal_back_when_it_panics() {
    let stage = Stage::with(None);
    let _watcher = stage.start();
    let Some(terminal) = Terminal::start(&stage, "top-drawn") else { return };
    let screen = terminal.assert_given_back();
    assert!(screen.contains("the environment asks for it") && screen.contains("ended with 101"), "{screen}");
}

#[test]
fn top_without_a_terminal_names_the_command_that_needs_none() {
    let ran = Stage::with(None).run(&["top"]);
    assert_eq!(ran.code(), 64);
    assert!(ran.error().contains("status --json"), "{}", ran.error());
}
