//! The status page: one self-contained page that is kept up to date, and nobody else's to read.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::stage::{SOON, Stage, lacks, wait_until};

/// A stage whose watcher listens on TCP, and where.
fn with_port(mut stage: Stage) -> (Stage, u16) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    stage.set("http.listen", &format!("127.0.0.1:{port}"));
    (stage, port)
}

/// A request with further header lines, each ending with CR LF; the answer is to be read from what it gives.
fn ask(port: u16, target: &str, headers: &str) -> BufReader<TcpStream> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    write!(stream, "GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n{headers}\r\n").unwrap();
    BufReader::new(stream)
}

/// The whole answer.
fn get(port: u16, target: &str, headers: &str) -> String {
    let mut answer = String::new();
    ask(port, target, headers).read_to_string(&mut answer).unwrap();
    answer
}

fn code(answer: &str) -> u16 {
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}

/// The next server-sent event.
fn next_event(stream: &mut BufReader<TcpStream>) -> Value {
    loop {
        let mut line = String::new();
        assert!(stream.read_line(&mut line).unwrap() > 0, "the stream has ended");
        if let Some(data) = line.strip_prefix("data: ") {
            return serde_json::from_str(data).unwrap();
        }
    }
}

#[test]
fn the_page_needs_nothing_from_outside_and_lets_nothing_else_run() {
    let (stage, port) = with_port(Stage::with(None));
    let _watcher = stage.start();
    wait_until("it listens", SOON, || TcpStream::connect(("127.0.0.1", port)).is_ok());
    let answer = get(port, "/", "");
    let (head, page) = answer.split_once("\r\n\r\n").unwrap();
    assert_eq!(code(head), 200);
    let policy = head.lines().find_map(|line| line.strip_prefix("content-security-policy: ")).unwrap();
    assert!(policy.starts_with("default-src 'none';") && policy.contains("connect-src 'self'"), "{policy}");
    assert!(!policy.contains("unsafe") && policy.contains("frame-ancestors 'none'"), "{policy}");
    let nonce = policy.split("'nonce-").nth(1).unwrap().split('\'').next().unwrap();
    assert_eq!(page.matches(&format!("nonce=\"{nonce}\"")).count(), 2, "one style and one script");
    assert!(!get(port, "/", "").contains(nonce), "a nonce is used once");
    for outside in ["http://", "https://", "//cdn", " src=", "@import", "{{"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(
        page.contains("<html lang=") && page.contains("name=\"viewport\"") && page.contains("prefers-color-scheme")
    );
}

#[test]
fn without_the_token_the_page_gets_numbers_and_with_it_everything_and_no_page_of_another_origin_gets_anything() {
    let (mut stage, port) = with_port(Stage::with(None));
    stage.set("http.token", "a-secret-token");
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("a secret text");
    let watcher = stage.start();
    wait_until("it is queued", SOON, || watcher.health()["queue"]["pending"] == 2);
    wait_until("it listens", SOON, || TcpStream::connect(("127.0.0.1", port)).is_ok());
    let token = "Authorization: Bearer a-secret-token\r\n";
    for target in ["/overview", "/live", "/metrics", "/health", "/"] {
        let code = |headers: &str| {
            let mut line = String::new();
            ask(port, target, headers).read_line(&mut line).unwrap();
            code(&line)
        };
        assert_eq!((code(""), code(token)), (200, 200), "{target}");
        assert_eq!(code("Authorization: Bearer another-token\r\n"), 401, "{target}");
        assert_eq!(code(&format!("Origin: http://evil.example\r\n{token}")), 403, "{target}");
        assert_eq!(code("Origin: http://evil.example\r\n"), 403, "{target}");
    }
    // It is counted a moment after it is queued.
    let counted = || next_event(&mut ask(port, "/live", ""))["totals"]["captured"] == 2;
    wait_until("it is counted", SOON, counted);
    let open = next_event(&mut ask(port, "/live", ""));
    let event = &open["events"][0];
    assert_eq!((&event["event_type"], &event["origin"]), (&"turn_detected".into(), &"transcript".into()));
    for name in ["event_id", "session", "project", "detail"] {
        assert_eq!(event[name], Value::Null, "{name}: {open}");
    }
    assert_eq!(open["totals"]["captured"], 2);
    for private in ["secret", "-home-me-app", &transcript.session] {
        assert!(!open.to_string().contains(private), "{private}: {open}");
    }
    let whole = next_event(&mut ask(port, "/live", token));
    assert_eq!((&whole["events"][0]["detail"], &whole["events"][0]["project"]), (&"user prompt".into(), &"app".into()));
    assert_eq!(whole["events"][0]["session"], transcript.session.as_str());
    assert!(!whole.to_string().contains("secret"), "texts are never shown: {whole}");
}

#[test]
fn whoever_looks_on_gets_the_last_ten_minutes_and_then_every_second() {
    let (stage, port) = with_port(Stage::new());
    let watcher = stage.start();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say_many("a secret text", 5);
    stage.wait_for_rows(6);
    let overview = || -> Value { serde_json::from_str(&watcher.get("/overview").unwrap().1).unwrap() };
    wait_until("three samples", SOON, || overview()["samples"].as_array().unwrap().len() >= 3);
    let bearer = format!("Authorization: Bearer {}\r\n", stage.token());
    let mut live = ask(port, "/live", &bearer);
    let first = next_event(&mut live);
    assert!(first["samples"].as_array().unwrap().len() >= 3, "{first}");
    let captured: u64 = first["samples"].as_array().unwrap().iter().map(|one| one["captured"].as_u64().unwrap()).sum();
    assert_eq!((captured, &first["totals"]["delivered"]), (6, &6.into()), "{first}");
    assert_eq!(first["lag"]["events"], 6, "{first}");
    assert!(first["lag"]["p50_seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(first["events"].as_array().unwrap().len(), 6);
    assert_eq!(first["events"][0]["session"], transcript.session.as_str());
    assert_eq!(first["events"][0]["origin"], "transcript");
    assert!(!first.to_string().contains("secret"), "{first}");
    let without_samples = serde_json::from_str::<Value>(&watcher.get("/overview?samples=0").unwrap().1).unwrap();
    assert_eq!(without_samples["samples"], json!([]));
    let begun = Instant::now();
    let (second, third) = (next_event(&mut live), next_event(&mut live));
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert_eq!(second["samples"].as_array().unwrap().len(), 1);
    assert!(third["samples"][0]["at"].as_i64() > second["samples"][0]["at"].as_i64());
}

#[test]
fn only_so_many_look_on_and_a_place_is_given_back() {
    let (stage, port) = with_port(Stage::with(None));
    let _watcher = stage.start();
    wait_until("it listens", SOON, || TcpStream::connect(("127.0.0.1", port)).is_ok());
    let mut viewers: Vec<_> = (0..32).map(|_| ask(port, "/live", "")).collect();
    viewers.iter_mut().for_each(|viewer| drop(next_event(viewer)));
    let refused = get(port, "/live", "");
    assert_eq!(code(&refused), 503);
    assert!(refused.contains("close one"), "{refused}");
    drop(viewers);
    wait_until("a place is free", SOON, || {
        let mut line = String::new();
        ask(port, "/live", "").read_line(&mut line).unwrap();
        code(&line) == 200
    });
}

/// What Chromium makes of the page after some seconds, or `None`, said aloud, where there is no Chromium.
fn rendered(stage: &Stage, port: u16) -> Option<(String, String)> {
    let found = ["chromium", "chromium-browser", "google-chrome"].into_iter();
    let program = found.into_iter().find(|program| Command::new(program).arg("--version").output().is_ok());
    lacks("Chromium", program.is_some());
    let profile = stage.folder().join("profile");
    let output = Command::new(program?)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"])
        .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .args(["--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(format!("http://127.0.0.1:{port}/"))
        .output()
        .unwrap();
    Some((String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

#[test]
fn a_browser_shows_numbers_without_the_token_and_says_where_it_is() {
    let (stage, port) = with_port(Stage::new());
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("a secret text");
    transcript.append("<script>alert('no JSON')</script>\n");
    let watcher = stage.start();
    stage.wait_for_rows(2);
    stage.database().query("ALTER TABLE events ADD CHECK (payload->>'text' IS DISTINCT FROM 'poison')");
    transcript.say("poison");
    wait_until("both dead letters", SOON, || watcher.health()["queue"]["dead_letters"] == 2);
    let expected = [
        "▲ Degraded – needs attention",
        "2 dead letters;",
        ">live<",
        ">2 since start<",
        "session started",
        ">2, shown with the token.<",
        "<code>headspace-watcher status</code> says where it is",
        "aria-label=\"Events per second over the last 10 minutes: at most ",
    ];
    // How far the page is when Chromium takes its picture is Chromium's to say.
    let deadline = Instant::now() + SOON;
    let page = loop {
        let Some((page, log)) = rendered(&stage, port) else { return };
        for complaint in ["Content Security Policy", "Uncaught", "SyntaxError", "TypeError"] {
            assert!(!log.contains(complaint), "{log}");
        }
        let Some(missing) = expected.iter().find(|part| !page.contains(**part)) else { break page };
        assert!(Instant::now() < deadline, "{missing}: {page}");
    };
    for private in ["secret text", "-home-me-app", "id=\"retry-", &transcript.session[..8]] {
        assert!(!page.contains(private), "{private}: {page}");
    }
}

/// Chromium in the hands of chromedriver, which speaks WebDriver.
struct Browser {
    driver: Child,
    port: u16,
    session: String,
}

impl Browser {
    /// `None`, said aloud, where there is no chromedriver.
    fn open(stage: &Stage, url: &str) -> Option<Browser> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut driver = Command::new("chromedriver");
        driver.arg(format!("--port={port}")).stdout(Stdio::null()).stderr(Stdio::null());
        let Ok(driver) = driver.spawn() else {
            lacks("chromedriver", false);
            return None;
        };
        let mut browser = Browser { driver, port, session: String::new() };
        wait_until("chromedriver listens", SOON, || TcpStream::connect(("127.0.0.1", port)).is_ok());
        let profile = format!("--user-data-dir={}", stage.folder().join("driven").display());
        let arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", &profile];
        let options = json!({"goog:chromeOptions": {"args": arguments}});
        let opened = browser.ask("POST", "/session", &json!({"capabilities": {"alwaysMatch": options}}));
        browser.session = format!("/session/{}", opened["sessionId"].as_str().unwrap_or_else(|| panic!("{opened}")));
        browser.tell("/url", &json!({"url": url}));
        Some(browser)
    }

    fn ask(&self, method: &str, target: &str, body: &Value) -> Value {
        let (body, port) = (body.to_string(), self.port);
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let (mut stream, mut length) = (BufReader::new(stream), 0);
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).unwrap();
            let line = line.trim_end().to_ascii_lowercase();
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line.is_empty() {
                break;
            }
        }
        let mut answer = vec![0; length];
        stream.read_exact(&mut answer).unwrap();
        serde_json::from_slice::<Value>(&answer).unwrap()["value"].take()
    }

    fn tell(&self, target: &str, body: &Value) -> Value {
        self.ask("POST", &format!("{}{target}", self.session), body)
    }

    /// What an expression in the page comes to.
    fn value(&self, expression: &str) -> Value {
        self.tell("/execute/sync", &json!({"script": format!("return {expression}"), "args": []}))
    }

    /// Types into a field that has the focus or gets it.
    fn enter(&self, selector: &str, text: &str) {
        let element = self.element(selector);
        assert_eq!(self.tell(&format!("/element/{element}/value"), &json!({"text": text})), Value::Null);
    }

    /// Clicks as a person does: what is hidden or covered can't be.
    fn press(&self, selector: &str) {
        let element = self.element(selector);
        assert_eq!(self.tell(&format!("/element/{element}/click"), &json!({})), Value::Null);
    }

    fn element(&self, selector: &str) -> String {
        let found = self.tell("/element", &json!({"using": "css selector", "value": selector}));
        let id = found.as_object().and_then(|found| found.values().next()).and_then(Value::as_str);
        id.unwrap_or_else(|| panic!("{selector}: {found}")).to_owned()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if !self.session.is_empty() && !std::thread::panicking() {
            self.ask("DELETE", &self.session, &json!({}));
        }
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

/// A browser that shows the page, and has been given the token.
fn with_token(stage: &Stage, port: u16) -> Option<Browser> {
    let browser = Browser::open(stage, &format!("http://127.0.0.1:{port}/"))?;
    browser.enter("#token", &format!("{}\u{e007}", stage.token()));
    Some(browser)
}

#[test]
fn with_the_token_the_page_shows_sessions_and_who_presses_retry_sees_the_letter_come_back_or_go_and_keeps_their_place()
{
    let (stage, port) = with_port(Stage::new());
    stage.refuse_curses();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("a curse");
    let watcher = stage.start();
    wait_until("the dead letter", SOON, || watcher.health()["queue"]["dead_letters"] == 1);
    let Some(browser) = Browser::open(&stage, &format!("http://127.0.0.1:{port}/")) else { return };
    let text = |id: &str| browser.value(&format!("document.getElementById('{id}').textContent"));
    let shows = |text: &str| browser.value("document.body.innerText").as_str().unwrap().contains(text);
    wait_until("it asks for the token", SOON, || {
        shows("headspace-watcher status") && text("letters-more") == "1, shown with the token."
    });
    assert!(!shows("a curse") && !shows("user prompt"));
    browser.enter("#token", "another-token\u{e007}");
    wait_until("it refuses another one", SOON, || text("ask-message") == "This is not the watcher's token.");
    assert_eq!(browser.value("sessionStorage.length"), 0);
    browser.enter("#token", &format!("{}\u{e007}", stage.token()));
    wait_until("turns", SOON, || shows("user prompt"));
    let project = browser.value("document.querySelector('#events td:last-child').title");
    assert_eq!(project, transcript.session.as_str());
    assert_eq!(browser.value("document.getElementById('ask').checkVisibility()"), false);
    assert!(!browser.value("location.href").as_str().unwrap().contains(&stage.token()));
    // When it happened, and when it was captured, as these are years apart.
    assert!(shows("2026-01-02 ") && shows("captured "));
    browser.tell("/refresh", &json!({}));
    wait_until("it is kept in this tab", SOON, || shows("user prompt"));
    let letter = || browser.value("document.querySelector('#letters button')?.id ?? ''");
    wait_until("its button", SOON, || letter() != "");
    let first = letter();
    browser.press("#letters button");
    wait_until("it is back under a new number", SOON, || letter() != first && letter() != "");
    let is_focus_kept = || browser.value("document.getElementById('letters').contains(document.activeElement)") == true;
    wait_until("the keyboard's place is kept", SOON, is_focus_kept);
    stage.database().query("ALTER TABLE events DROP CONSTRAINT no_swearing");
    browser.press("#letters button");
    wait_until("the row", SOON, || stage.database().texts() == ["a curse"]);
    wait_until("the list is gone", SOON, || {
        browser.value("document.getElementById('letters').checkVisibility()") == false
    });
    assert_eq!(browser.value("document.activeElement.id"), "letters-result");
}

#[test]
fn who_presses_forget_twice_forgets_a_letter_or_all_that_never_were_valid() {
    let (stage, port) = with_port(Stage::new());
    stage.refuse_curses();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("a curse");
    transcript.append("no JSON\nneither\nnor this\n");
    let watcher = stage.start();
    let letters = || watcher.health()["queue"]["dead_letters"].as_u64().unwrap();
    wait_until("four dead letters", SOON, || letters() == 4);
    let Some(browser) = with_token(&stage, port) else { return };
    let buttons = || browser.value("document.querySelectorAll('#letters tbody button').length");
    wait_until("retry once, forget four times", SOON, || buttons() == 5);
    browser.press("#forget-invalid");
    assert_eq!((buttons(), letters()), (5.into(), 4), "once is not enough");
    browser.press("#forget-invalid");
    wait_until("what never was an event is forgotten", SOON, || letters() == 1);
    wait_until("only the event is left", SOON, || buttons() == 2);
    let said = || browser.value("document.getElementById('letters-result').textContent");
    assert_eq!(said(), "3 dead letters forgotten.");
    let last = stage.run(&["dead-letters", "list"]).lines()[0]["sequence"].as_u64().unwrap();
    for _ in 0..2 {
        browser.press(&format!("#forget-{last}"));
    }
    wait_until("none is left", SOON, || letters() == 0);
    wait_until("it is said", SOON, || said() == format!("No. {last} is forgotten."));
}

#[test]
fn plots_draw_no_line_across_a_time_without_data() {
    let (stage, port) = with_port(Stage::with(None));
    let _watcher = stage.start();
    wait_until("it listens", SOON, || TcpStream::connect(("127.0.0.1", port)).is_ok());
    let Some(browser) = Browser::open(&stage, &format!("http://127.0.0.1:{port}/")) else { return };
    let runs = |points: &str| browser.value(&format!("runs({points})"));
    // A value that is missing, and samples that are missing.
    assert_eq!(runs("[[0, 1], [5000, 2], [10000, null], [15000, 3]]"), json!([[[0, 1], [5000, 2]], [[15000, 3]]]));
    assert_eq!(runs("[[0, 1], [5000, 2], [125000, 3]]"), json!([[[0, 1], [5000, 2]], [[125_000, 3]]]));
    assert_eq!(runs("[]"), json!([]));
}
