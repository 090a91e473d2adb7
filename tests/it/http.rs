//! HTTP on TCP: who may do what, and what callers can't do to it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::stage::{Answer, SOON, Stage, Watcher, exchange, is_root, lacks, project, wait_until};

const EVENT: &str = r#"{"event_type":"session_ended","payload":{"session_uuid":"s","reason":"closed"}}"#;

/// A configured token, and how it is sent.
const TOKEN: &str = "a-very-secret-token";
const BEARER: &str = "Authorization: Bearer a-very-secret-token";

/// What may be read without the token.
const OPEN_PATHS: [&str; 7] = ["/", "/health", "/livez", "/readyz", "/metrics", "/overview", "/live"];

/// A watcher that listens on TCP with [`TOKEN`], and where.
fn start(stage: &mut Stage) -> (Watcher, SocketAddr) {
    stage.set("http.token", TOKEN);
    start_on(stage, "127.0.0.1")
}

/// A watcher that listens on a free port of `host`, and where.
fn start_on(stage: &mut Stage, host: &str) -> (Watcher, SocketAddr) {
    let address = TcpListener::bind(format!("{host}:0")).unwrap().local_addr().unwrap();
    stage.set("http.listen", &address.to_string());
    let watcher = stage.start();
    wait_until("it listens", SOON, || TcpStream::connect(address).is_ok());
    (watcher, address)
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

/// A request with exactly these header lines.
#[track_caller]
fn ask_with(address: SocketAddr, method: &str, target: &str, headers: &[&str], body: &str) -> Answer {
    exchange(connect(address), method, target, headers, Some(body)).expect("an answer")
}

/// A request that names the watcher's address, with further header lines.
#[track_caller]
fn ask(address: SocketAddr, method: &str, target: &str, headers: &[&str], body: &str) -> Answer {
    ask_with(address, method, target, &[&[&*format!("Host: {address}")], headers].concat(), body)
}

/// The status code alone: the answer may be endless.
#[track_caller]
fn code_of(address: SocketAddr, method: &str, target: &str, headers: &[&str]) -> u16 {
    let mut stream = connect(address);
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    write!(stream, "{method} {target} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n{headers}\r\n").unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line.split(' ').nth(1).unwrap_or_else(|| panic!("{method} {target}: {line}")).parse().unwrap()
}

/// The path of every route, read off the router's source; parameters have a value.
fn routes() -> Vec<String> {
    let source = std::fs::read_to_string(project().join("src/http/mod.rs")).unwrap();
    let router = source.split("fn router(").nth(1).unwrap();
    let paths = router.split(".route(\"").skip(1).map(|rest| rest.split('"').next().unwrap());
    let paths: Vec<String> = paths.map(|path| path.replace("{sequence}", "1").replace("{kind}", "Stop")).collect();
    assert_eq!(source.matches(".route(").count(), paths.len(), "every route is found");
    paths
}

#[test]
fn without_the_token_every_route_and_method_is_closed_but_the_open_ones() {
    let mut stage = Stage::with(None);
    let (watcher, address) = start(&mut stage);
    let routes = routes();
    for open in OPEN_PATHS {
        assert!(routes.iter().any(|route| route == open), "{open} is a route");
    }
    let others = ["/nothing", "/health/", "//health", "/Health", "/%68ealth", "/health/../queue", "/livez%2f", "*"];
    for path in routes.iter().map(String::as_str).chain(others) {
        for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"] {
            let is_open = OPEN_PATHS.contains(&path) && matches!(method, "GET" | "HEAD");
            assert_eq!(code_of(address, method, path, &[]), if is_open { 200 } else { 401 }, "{method} {path}");
            let wrong = ["Authorization: Bearer a-very-secret-tokem"];
            assert_eq!(code_of(address, method, path, &wrong), 401, "{method} {path}");
            let code = code_of(address, method, path, &[BEARER]);
            assert!(!matches!(code, 401 | 403), "{method} {path}: {code}");
        }
    }
    // Over the socket no token is needed.
    assert_eq!(watcher.ask("POST", "/events", &[], EVENT).code, 202);
    assert_eq!(watcher.get("/queue?payload=true").unwrap().0, 200);
    let refused = ask(address, "GET", "/queue", &[], "");
    assert!(refused.head.contains("www-authenticate: bearer"), "{refused:?}");
    let error = refused.json()["error"].as_str().unwrap().to_owned();
    for part in ["Authorization: Bearer", "http.token", "headspace-watcher status"] {
        assert!(error.contains(part), "{error}");
    }
    for wrong in [
        "Authorization: a-very-secret-token",
        "Authorization: Bearer",
        "Authorization: Bearer ",
        "Authorization: Bearer a-very-secret-token2",
        "Authorization: Basic a-very-secret-token",
        "Cookie: token=a-very-secret-token",
    ] {
        assert_eq!(code_of(address, "GET", "/queue", &[wrong]), 401, "{wrong}");
    }
    assert_eq!(code_of(address, "GET", "/queue?token=a-very-secret-token", &[]), 401);
    assert!(!watcher.log().contains(TOKEN));
}

/// What a program prints that another user of this machine runs; `None`, said aloud, where we can't become one.
fn as_another_user(program: &str, arguments: &[&str]) -> Option<Output> {
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", program];
    if lacks("root", is_root()) {
        return None;
    }
    let output = Command::new("setpriv").args(nobody).args(arguments).output();
    if lacks("setpriv", output.is_ok()) { None } else { output.ok() }
}

#[test]
fn another_user_of_the_machine_reads_no_text_no_payload_and_no_path_and_changes_nothing() {
    if as_another_user("true", &[]).is_none() {
        return;
    }
    if lacks("curl", Command::new("curl").arg("--version").output().is_ok()) {
        return;
    }
    let mut stage = Stage::with(None);
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("a secret text");
    transcript.append("a secret line that is no JSON\n");
    let (watcher, address) = start_on(&mut stage, "127.0.0.1");
    let counts = || {
        let queue = &watcher.health()["queue"];
        (queue["pending"].clone(), queue["dead_letters"].clone())
    };
    wait_until("two events and a dead letter", SOON, || counts() == (json!(2), json!(1)));
    // The modes of the files alone have to keep others out.
    for folder in [stage.folder().to_owned(), stage.folder().join("data")] {
        std::fs::set_permissions(folder, PermissionsExt::from_mode(0o755)).unwrap();
    }
    let url = format!("http://{address}");
    let curl =
        |arguments: &[&str]| as_another_user("curl", &[&["-s", "-i", "--max-time", "3"], arguments].concat()).unwrap();
    let get = |target: &str| String::from_utf8_lossy(&curl(&[&format!("{url}{target}")]).stdout).into_owned();
    let parameters = "?payload=true&samples=600&limit=1000";
    for path in routes() {
        let answer = get(&format!("{path}{parameters}"));
        let is_open = OPEN_PATHS.contains(&&*path);
        assert!(answer.starts_with(if is_open { "HTTP/1.1 200" } else { "HTTP/1.1 401" }), "{path}: {answer}");
        let folder = stage.folder().to_str().unwrap();
        for private in ["secret", "-home-me-app", "home/me/app", &transcript.session, folder] {
            assert!(!answer.contains(private), "{path} tells {private}: {answer}");
        }
    }
    let letter = stage.run(&["queue-dump", "--dead-letters"]).lines()[0]["sequence"].to_string();
    for (method, target, body) in [
        ("POST", "/events".to_owned(), EVENT),
        ("POST", "/hook/Stop".to_owned(), r#"{"session_id":"s","cwd":"/p"}"#),
        ("POST", "/spool".to_owned(), ""),
        ("POST", format!("/dead-letters/{letter}/retry"), ""),
        ("DELETE", format!("/dead-letters/{letter}"), ""),
    ] {
        let answer = curl(&["-X", method, "-d", body, &format!("{url}{target}")]).stdout;
        assert!(answer.starts_with(b"HTTP/1.1 401"), "{method} {target}: {}", String::from_utf8_lossy(&answer));
    }
    let socket = stage.folder().join("data/watcher.sock");
    let connected = curl(&["--unix-socket", socket.to_str().unwrap(), "http://localhost/health"]);
    assert_eq!(connected.status.code(), Some(7), "could not connect: {connected:?}");
    let config = stage.folder().join("config.yaml");
    std::fs::set_permissions(&config, PermissionsExt::from_mode(0o644)).unwrap();
    let arguments = ["--config", config.to_str().unwrap(), "status"];
    let status = as_another_user(env!("CARGO_BIN_EXE_headspace-watcher"), &arguments).unwrap();
    let told = String::from_utf8_lossy(&status.stderr);
    assert!(told.contains("it belongs to user 0: run this as that user") && !told.contains("restart"), "{told}");
    let token = stage.folder().join("data/http.token");
    let read = as_another_user("cat", &[token.to_str().unwrap()]).unwrap();
    assert!(!read.status.success() && read.stdout.is_empty(), "{read:?}");
    // The command line of a process is everybody's to read.
    let token = stage.token();
    let shown = Command::new("ps").args(["-ww", "-o", "command=", "-p", &watcher.pid().to_string()]).output().unwrap();
    let command_line = String::from_utf8(shown.stdout).unwrap();
    assert!(command_line.contains("headspace-watcher"), "{command_line}");
    assert!(!command_line.contains(&token), "{command_line}");
    assert!(!watcher.log().contains(&token));
    assert_eq!(counts(), (json!(2), json!(1)), "nothing has changed");
    // The owner, with the token, reads and changes everything.
    let bearer = format!("Authorization: Bearer {token}");
    let with_token = |method: &str, target: &str| ask(address, method, target, &[&bearer], "");
    assert!(with_token("GET", "/queue?payload=true").body.contains("a secret text"));
    let overview = with_token("GET", "/overview").body;
    assert!(overview.contains(&transcript.session) && !overview.contains("secret"), "{overview}");
    assert_eq!(with_token("DELETE", &format!("/dead-letters/{letter}")).code, 200);
    assert_eq!(counts(), (json!(2), json!(0)));
}

#[test]
fn what_is_open_never_quotes_what_postgres_said_nor_names_that_are_texts() {
    let mut stage = Stage::new();
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    // A trigger whose message quotes the payload; its code pauses the drainer.
    stage.database().query(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
         RAISE EXCEPTION 'not allowed: %', NEW.payload USING ERRCODE = '42501'; END $$; \
         CREATE TRIGGER fail BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION fail()",
    );
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("a secret text");
    transcript.append("{\"type\":\"a secret type\"}\n");
    let (watcher, address) = start(&mut stage);
    wait_until("the error quotes the payload", SOON, || {
        watcher.health()["database"]["last_error"].as_str().is_some_and(|error| error.contains("not allowed"))
    });
    for target in ["/health", "/metrics", "/overview"] {
        let open = ask(address, "GET", target, &[], "");
        assert_eq!(open.code, 200);
        for private in ["secret", "not allowed", "/home/me", &transcript.session] {
            assert!(!open.body.contains(private), "{target}: {}", open.body);
        }
    }
    // That there is an error is no secret, and where it can be read is said.
    let health = ask(address, "GET", "/health", &[], "").json();
    assert_eq!((&health["status"], &health["database"]["state"]), (&"warn".into(), &"misconfigured".into()));
    assert!(health["database"]["last_error"].as_str().unwrap().contains("headspace-watcher status"), "{health}");
    assert!(!health["reasons"].as_array().unwrap().is_empty(), "{health}");
    let whole = ask(address, "GET", "/health", &[BEARER], "").json();
    assert!(whole["database"]["last_error"].as_str().unwrap().contains("not allowed"), "{whole}");
}

#[test]
fn a_page_of_another_origin_is_turned_away() {
    let mut stage = Stage::with(None);
    let (watcher, address) = start(&mut stage);
    let port = address.port();
    let own = [format!("http://127.0.0.1:{port}")];
    let foreign = [
        "http://localhost:3000".to_owned(),
        "http://127.0.0.1:3000".to_owned(),
        "http://[::1]:3000".to_owned(),
        "http://localhost".to_owned(),
        "http://127.0.0.1".to_owned(),
        "http://127.0.0.1:".to_owned(),
        format!("http://[::1]:{port}"),
        format!("http://127.0.0.2:{port}"),
        format!("http://0.0.0.0:{port}"),
        // The same server under another name is another origin, and a browser says so.
        format!("http://localhost:{port}"),
        format!("https://127.0.0.1:{port}"),
        format!("HTTP://127.0.0.1:{port}"),
        format!("ws://127.0.0.1:{port}"),
        format!("http://localhost.evil.example:{port}"),
        format!("http://127.0.0.1.evil.example:{port}"),
        format!("http://evil.example:{port}"),
        format!("http://127.0.0.1:{port}@evil.example"),
        format!("http://127.0.0.1:{port}@evil.example:{port}"),
        format!("http://evil.example@127.0.0.1:{port}"),
        format!("http://127.0.0.1.:{port}"),
        format!("http://127.0.0.1:{port}/"),
        format!("http://127.0.0.1:{port}.evil.example"),
        format!("http://127.0.0.1:0{port}0"),
        format!("http://127.0.0.1:+{port}"),
        format!("http://127.1:{port}"),
        format!("http://2130706433:{port}"),
        format!("http://127.0.0.1:{port} http://evil.example"),
        format!("127.0.0.1:{port}"),
        "http://".to_owned(),
        "null".to_owned(),
        String::new(),
    ];
    for (origin, admitted) in own.iter().map(|own| (own, true)).chain(foreign.iter().map(|foreign| (foreign, false))) {
        let headers = [BEARER, &format!("Origin: {origin}"), "Content-Type: text/plain"];
        let expected = |code: u16| if admitted { code } else { 403 };
        for (method, target, body, code) in [
            ("POST", "/events", EVENT, 202),
            ("POST", "/hook/Stop", r#"{"session_id":"s","cwd":"/p"}"#, 200),
            ("GET", "/queue?payload=true", "", 200),
            ("GET", "/overview", "", 200),
            ("GET", "/", "", 200),
        ] {
            let answer = ask(address, method, target, &headers, body);
            assert_eq!(answer.code, expected(code), "{method} {target}, Origin: {origin}: {answer:?}");
            assert!(!answer.head.contains("access-control-"), "{answer:?}");
        }
    }
    let own = format!("Origin: {}", own[0]);
    for (several, code) in [
        (&[BEARER, &*own, "Origin: http://localhost:3000"][..], 403),
        (&[BEARER, "Origin: http://localhost:3000", &own], 403),
        (&[BEARER, &own, &own], 403),
        (&[BEARER, &own], 202),
    ] {
        assert_eq!(ask(address, "POST", "/events", several, EVENT).code, code, "{several:?}");
    }
    // Without the token a page of another origin is turned away all the same.
    assert_eq!(code_of(address, "GET", "/health", &["Origin: http://localhost:3000"]), 403);
    assert_eq!(code_of(address, "GET", "/health", &[&own]), 200);
    // By this name too, where the page came under it.
    let localhost = [&*format!("Host: localhost:{port}"), BEARER, &format!("Origin: http://localhost:{port}")];
    assert_eq!(ask_with(address, "POST", "/events", &localhost, EVENT).code, 202);
    // No browser reaches the socket: whoever can open it is the owner.
    assert_eq!(watcher.ask("POST", "/events", &["Origin: http://localhost:3000"], EVENT).code, 202);
}

#[test]
fn a_request_must_name_the_address_that_it_has_reached() {
    let mut stage = Stage::with(None);
    let (_watcher, address) = start(&mut stage);
    let port = address.port();
    let code =
        |target: &str, headers: &[&str]| ask_with(address, "POST", target, &[headers, &[BEARER]].concat(), EVENT).code;
    for host in [format!("127.0.0.1:{port}"), format!("localhost:{port}"), format!("LocalHost:{port}")] {
        assert_eq!(code("/events", &[&format!("Host: {host}")]), 202, "{host}");
    }
    let foreign = [
        format!("evil.example:{port}"),
        "evil.example".to_owned(),
        format!("localhost.evil.example:{port}"),
        format!("127.0.0.1.evil.example:{port}"),
        format!("localhost.:{port}"),
        format!("evil@127.0.0.1:{port}"),
        format!("[::1]:{port}"),
        format!("127.0.0.2:{port}"),
        format!("0.0.0.0:{port}"),
        format!("10.0.0.1:{port}"),
        "127.0.0.1:3000".to_owned(),
        "localhost".to_owned(),
        "127.0.0.1".to_owned(),
        format!("127.0.0.1:{port}:{port}"),
        format!("127.0.0.1:{port}, evil.example"),
        "127.0.0.1:".to_owned(),
        String::new(),
    ];
    for host in &foreign {
        assert_eq!(code("/events", &[&format!("Host: {host}")]), 403, "{host}");
    }
    let own = format!("Host: {address}");
    assert_eq!(code("/events", &[]), 403, "no Host");
    assert_eq!(code("/events", &[&own, "Host: evil.example"]), 403, "two of them");
    assert_eq!(code("/events", &["Host: evil.example", &own]), 403, "two of them");
    // An absolute target names a host as well, and takes precedence where a server looks at one only.
    for (target, expected) in [
        (format!("http://{address}/events"), 202),
        (format!("http://evil.example:{port}/events"), 403),
        (format!("https://{address}/events"), 403),
        ("http://127.0.0.1:3000/events".to_owned(), 403),
        (format!("http://user@{address}/events"), 403),
        (format!("//evil.example:{port}/events"), 404),
    ] {
        assert_eq!(code(&target, &[&own]), expected, "{target}");
    }
    assert_eq!(code(&format!("http://{address}/events"), &["Host: evil.example"]), 403);
    let refused = ask_with(address, "GET", "/health", &["Host: evil.example"], "");
    assert!(refused.json()["error"].as_str().unwrap().contains(&format!("http://{address}")), "{refused:?}");
}

#[test]
fn where_it_listens_on_every_address_the_one_that_was_reached_counts() {
    for listen in ["0.0.0.0", "[::]"] {
        if lacks("an IPv6 address", TcpListener::bind(format!("{listen}:0")).is_ok()) {
            continue;
        }
        let mut stage = Stage::with(None);
        stage.set("http.token", TOKEN);
        let (_watcher, address) = start_on(&mut stage, listen);
        let port = address.port();
        let code = |reached: &str, host: &str| {
            let reached: SocketAddr = format!("{reached}:{port}").parse().unwrap();
            let host = format!("{host}:{port}");
            let headers = [&*format!("Host: {host}"), &format!("Origin: http://{host}"), BEARER];
            ask_with(reached, "POST", "/events", &headers, EVENT).code
        };
        assert_eq!(code("127.0.0.1", "127.0.0.1"), 202, "{listen}");
        assert_eq!(code("127.0.0.1", "localhost"), 202, "{listen}");
        for host in ["0.0.0.0", "[::]", "10.0.0.1", "127.0.0.2", "evil.example"] {
            assert_eq!(code("127.0.0.1", host), 403, "{listen}: {host}");
        }
        assert_eq!(code("127.0.0.2", "127.0.0.2"), 202, "{listen}");
        assert_eq!(code("127.0.0.2", "127.0.0.1"), 403, "{listen}");
        if listen == "[::]" {
            assert_eq!((code("[::1]", "[::1]"), code("[::1]", "127.0.0.1")), (202, 403));
        }
    }
}

#[test]
fn the_token_is_made_at_the_first_start_for_its_owner_alone_and_kept() {
    let mut stage = Stage::with(None);
    let (watcher, address) = start_on(&mut stage, "127.0.0.1");
    let path = stage.folder().join("data/http.token");
    let token = stage.token();
    assert!(token.len() >= 32 && token.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{} bytes", token.len());
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let bearer = format!("Authorization: Bearer {token}");
    assert_eq!(ask(address, "POST", "/events", &[&bearer], EVENT).code, 202);
    assert!(!watcher.log().contains(&token));
    watcher.stop();
    let watcher = stage.start();
    assert_eq!(stage.token(), token, "it is kept");
    watcher.stop();
    // Nothing else is left of making it.
    let names = std::fs::read_dir(path.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name());
    let tokens: Vec<_> = names.filter(|name| name.to_string_lossy().contains("token")).collect();
    assert_eq!(tokens, ["http.token"]);
    // A configured one has precedence, and the file stays as it is.
    stage.set("http.token", TOKEN);
    let _watcher = stage.start();
    wait_until("it listens", SOON, || TcpStream::connect(address).is_ok());
    assert_eq!(ask(address, "POST", "/events", &[&bearer], EVENT).code, 401);
    assert_eq!(ask(address, "POST", "/events", &[BEARER], EVENT).code, 202);
    assert_eq!(stage.token(), token);
}

#[test]
fn without_tcp_or_with_a_configured_token_none_is_made() {
    let mut stage = Stage::with(None);
    stage.start().stop();
    start(&mut stage).0.stop();
    assert!(!stage.folder().join("data/http.token").exists());
}

#[test]
fn a_token_that_others_could_know_opens_nothing_and_capturing_goes_on() {
    let mut stage = Stage::with(None);
    std::fs::create_dir(stage.folder().join("data")).unwrap();
    let path = stage.folder().join("data/http.token");
    std::fs::write(&path, format!("{TOKEN}\n")).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
    stage.transcript("-home-me-app", 1).say("hello");
    let (watcher, address) = start_on(&mut stage, "127.0.0.1");
    wait_until("it captures", SOON, || watcher.health()["queue"]["pending"] == 2);
    assert_eq!(ask(address, "POST", "/events", &[BEARER], EVENT).code, 401);
    assert_eq!(ask(address, "GET", "/health", &[], "").code, 200);
    let warning = watcher.wait_for_log("the HTTP token can't be used");
    assert_eq!(warning["level"], "WARN");
    let shown = path.to_str().unwrap();
    let check = stage.run(&["check", "--no-database"]);
    assert_eq!(check.code(), 78);
    for told in [warning["error"].as_str().unwrap(), &stage.run(&["status"]).output(), &check.output()] {
        assert!(told.contains(shown) && told.contains("mode 644") && told.contains("remove it"), "{told}");
    }
    assert!(!(watcher.log() + &check.output()).contains(TOKEN));
    assert_eq!(stage.token(), TOKEN, "it is left as it was");
    // Done as it is told.
    std::fs::remove_file(&path).unwrap();
    watcher.stop();
    let _watcher = stage.start();
    wait_until("it listens", SOON, || TcpStream::connect(address).is_ok());
    let bearer = format!("Authorization: Bearer {}", stage.token());
    assert_eq!(ask(address, "POST", "/events", &[&bearer], EVENT).code, 202);
    assert_eq!(stage.run(&["check", "--no-database"]).code(), 0);
}

#[test]
fn status_tells_the_pages_address_and_where_the_token_is() {
    let mut stage = Stage::with(None);
    let (watcher, address) = start_on(&mut stage, "127.0.0.1");
    let path = stage.folder().join("data/http.token");
    let status = stage.run(&["status"]).output();
    let line = status.lines().find(|line| line.starts_with("page ")).unwrap_or_else(|| panic!("{status}"));
    assert!(line.contains(&format!("http://{address}/")), "{line}");
    assert!(line.contains(path.to_str().unwrap()), "{line}");
    assert!(!status.contains(&stage.token()), "the token itself is not shown");
    let json = &stage.run(&["status", "--json"]).lines()[0];
    assert_eq!(json["http"]["address"], address.to_string());
    assert_eq!((&json["http"]["listening"], &json["http"]["token_file"]), (&true.into(), &path.to_str().into()));
    // Only the owner is told where the token is.
    assert_eq!(ask(address, "GET", "/health", &[], "").json()["http"], json!(null));
    watcher.stop();
    // Whoever holds the port would be given the token.
    let _other = TcpListener::bind(address).unwrap();
    let watcher = stage.start();
    watcher.wait_for_log("can't listen for HTTP");
    let status = stage.run(&["status"]).output();
    let line = status.lines().find(|line| line.starts_with("page ")).unwrap_or_else(|| panic!("{status}"));
    assert!(line.contains("taken") && !line.contains("http://") && !line.contains("http.token"), "{line}");
    watcher.stop();
    stage.set("http.listen", "null");
    let _watcher = stage.start();
    assert!(stage.run(&["status"]).output().contains("http.listen"));
}

#[test]
fn bodies_and_heads_are_bounded() {
    let mut stage = Stage::with(None);
    stage.set("event_system.max_event_bytes", "2000").set("queue.max_pending_bytes", "3000000");
    let (watcher, address) = start(&mut stage);
    let large = EVENT.replace("\"s\"", &format!("\"{}\"", "s".repeat(3000)));
    assert_eq!(ask(address, "POST", "/events", &[BEARER], &large).code, 413);
    let endless_line = format!("{{\"x\":\"{}", "x".repeat(1 << 20));
    assert_eq!(ask(address, "POST", "/events", &[BEARER], &endless_line).code, 413);
    let host = format!("Host: {address}");
    let announced = [&*host, BEARER, "Content-Length: 99999999999"];
    assert_eq!(exchange(connect(address), "POST", "/events", &announced, None).unwrap().code, 413);
    let header = format!("X-Large: {}", "x".repeat(100_000));
    let code = exchange(connect(address), "GET", "/livez", &[&host, &header], None).map(|answer| answer.code);
    assert!(matches!(code, Some(431) | None), "{code:?}");
    let many: Vec<String> = (0..200).map(|number| format!("X-{number}: y")).collect();
    let many: Vec<&str> = [&*host].into_iter().chain(many.iter().map(String::as_str)).collect();
    let code = exchange(connect(address), "GET", "/livez", &many, None).map(|answer| answer.code);
    assert!(matches!(code, Some(431) | None), "{code:?}");
    assert_eq!(watcher.health()["queue"]["pending"], 0);
    assert_eq!(ask(address, "GET", "/nothing", &[BEARER], "").code, 404);
    assert_eq!(ask(address, "PUT", "/events", &[BEARER], "").code, 405);
}

#[test]
fn five_hundred_connections_do_no_harm() {
    let mut stage = Stage::with(None);
    let (watcher, address) = start(&mut stage);
    // More than are held at once; half say nothing, half begin a request and never end it.
    let idle: Vec<TcpStream> = (0..600)
        .map(|number| {
            let mut stream = TcpStream::connect(address).unwrap();
            if number % 2 == 0 {
                let _ = stream.write_all(b"POST /events HTTP/1.1\r\nHost: x\r\nContent-Le");
            }
            stream
        })
        .collect();
    let begun = Instant::now();
    assert_eq!(ask(address, "POST", "/events", &[BEARER], EVENT).code, 202);
    let elapsed = begun.elapsed();
    // Idle connections are closed, and then it is served.
    assert!(elapsed < Duration::from_secs(9), "answered after {elapsed:?} among {} idle connections", idle.len());
    // The commands' socket does not notice.
    assert_eq!(watcher.get("/livez").unwrap().0, 200);
    drop(idle);
    // Five hundred at once, all with something to say.
    let threads: Vec<_> =
        (0..500).map(|_| std::thread::spawn(move || ask(address, "POST", "/events", &[BEARER], EVENT).code)).collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap(), 202);
    }
    assert_eq!(watcher.health()["queue"]["pending"], 501);
}

#[test]
fn slow_clients_are_sent_away_and_hold_up_nobody() {
    let mut stage = Stage::with(None);
    let (watcher, address) = start(&mut stage);
    // One that never ends its head, one whose body drips, one that does not read its answer.
    let mut head = connect(address);
    head.write_all(b"GET /health HTTP/1.1\r\nHost: loc").unwrap();
    let mut body = connect(address);
    write!(body, "POST /events HTTP/1.1\r\nHost: {address}\r\n{BEARER}\r\nContent-Length: 100000\r\n\r\n{{").unwrap();
    let begun = Instant::now();
    let dripping = std::thread::spawn(move || {
        let mut answer = Vec::new();
        body.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        while begun.elapsed() < SOON {
            let _ = body.write_all(b" ");
            let mut piece = [0; 1024];
            match body.read(&mut piece) {
                Ok(0) => break,
                Ok(length) => answer.extend_from_slice(&piece[..length]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => break,
            }
        }
        String::from_utf8(answer).unwrap()
    });
    assert_eq!(ask(address, "POST", "/events", &[BEARER], EVENT).code, 202);
    let mut rest = Vec::new();
    let _ = head.read_to_end(&mut rest);
    assert!(begun.elapsed() < SOON, "the slow head is still served");
    let answer = dripping.join().unwrap();
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(begun.elapsed() < SOON);
    assert_eq!(watcher.health()["queue"]["pending"], 1);
}
