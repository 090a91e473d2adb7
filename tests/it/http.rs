//! The HTTP door on TCP: who may come in, and what callers can't do to it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::stage::{Answer, SOON, Stage, Watcher, exchange, wait_until};

const EVENT: &str = r#"{"event_type":"session_ended","payload":{"session_uuid":"s","reason":"closed"}}"#;

/// A watcher that listens on TCP, and where.
fn start(stage: &mut Stage) -> (Watcher, SocketAddr) {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
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

#[track_caller]
fn ask(address: SocketAddr, method: &str, target: &str, headers: &[&str], body: &str) -> Answer {
    exchange(connect(address), method, target, headers, Some(body)).expect("an answer")
}

#[test]
fn pages_of_other_origins_and_callers_without_the_token_are_turned_away() {
    let mut stage = Stage::with(None);
    stage.set("http.token", "a-very-secret-token");
    let (watcher, address) = start(&mut stage);
    let host = format!("Host: {address}");
    let token = "Authorization: Bearer a-very-secret-token";
    for (headers, code) in [
        (&[&*host, token][..], 202),
        (&["Host: localhost", token], 202),
        (&[&host, token, "Origin: http://localhost:5056"], 202),
        (&[&host], 401),
        (&[&host, "Authorization: Bearer a-very-secret-tokem"], 401),
        (&[&host, "Authorization: a-very-secret-token"], 401),
        (&["Host: evil.example", token], 403),
        (&[token], 403),
        (&[&host, token, "Origin: https://evil.example"], 403),
        (&[&host, token, "Origin: null"], 403),
    ] {
        assert_eq!(ask(address, "POST", "/events", headers, EVENT).code, code, "{headers:?}");
        let (method, target) = ("POST", "/hook/stop");
        let hook = ask(address, method, target, headers, r#"{"session_id":"s","cwd":"/p"}"#).code;
        assert_eq!(hook, if code == 202 { 200 } else { code }, "{headers:?}");
        let read = ask(address, "GET", "/queue?payload=true", headers, "").code;
        assert_eq!(read, if code == 202 { 200 } else { code }, "{headers:?}");
    }
    // The socket belongs to the user and asks for none of it.
    assert_eq!(watcher.ask("POST", "/events", &[], EVENT).code, 202);
    assert!(!watcher.log().contains("secret-token"));
}

#[test]
fn bodies_and_heads_are_bounded() {
    let mut stage = Stage::with(None);
    stage.set("event_system.max_event_bytes", "2000").set("queue.max_pending_bytes", "3000000");
    let (watcher, address) = start(&mut stage);
    let large = EVENT.replace("\"s\"", &format!("\"{}\"", "s".repeat(3000)));
    assert_eq!(ask(address, "POST", "/events", &["Host: localhost"], &large).code, 413);
    let endless_line = format!("{{\"x\":\"{}", "x".repeat(1 << 20));
    assert_eq!(ask(address, "POST", "/events", &["Host: localhost"], &endless_line).code, 413);
    let announced = ["Host: localhost", "Content-Length: 99999999999"];
    assert_eq!(exchange(connect(address), "POST", "/events", &announced, None).unwrap().code, 413);
    let header = format!("X-Large: {}", "x".repeat(100_000));
    let code =
        exchange(connect(address), "GET", "/livez", &["Host: localhost", &header], None).map(|answer| answer.code);
    assert!(matches!(code, Some(431) | None), "{code:?}");
    let many: Vec<String> = (0..200).map(|number| format!("X-{number}: y")).collect();
    let many: Vec<&str> = ["Host: localhost"].into_iter().chain(many.iter().map(String::as_str)).collect();
    let code = exchange(connect(address), "GET", "/livez", &many, None).map(|answer| answer.code);
    assert!(matches!(code, Some(431) | None), "{code:?}");
    assert_eq!(watcher.health()["queue"]["pending"], 0);
    assert_eq!(ask(address, "GET", "/nothing", &["Host: localhost"], "").code, 404);
    assert_eq!(ask(address, "PUT", "/events", &["Host: localhost"], "").code, 405);
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
                let _ = stream.write_all(b"POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Le");
            }
            stream
        })
        .collect();
    let begun = Instant::now();
    assert_eq!(ask(address, "POST", "/events", &["Host: localhost"], EVENT).code, 202);
    let elapsed = begun.elapsed();
    // Before their heads have run out of time: they are closed because others wait.
    assert!(elapsed < Duration::from_secs(9), "answered after {elapsed:?} among {} idle connections", idle.len());
    // The commands' socket does not notice.
    assert_eq!(watcher.get("/livez").unwrap().0, 200);
    drop(idle);
    // Five hundred at once, all with something to say.
    let threads: Vec<_> = (0..500)
        .map(|_| std::thread::spawn(move || ask(address, "POST", "/events", &["Host: localhost"], EVENT).code))
        .collect();
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
    body.write_all(b"POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n{").unwrap();
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
    assert_eq!(ask(address, "POST", "/events", &["Host: localhost"], EVENT).code, 202);
    let mut rest = Vec::new();
    let _ = head.read_to_end(&mut rest);
    assert!(begun.elapsed() < SOON, "the slow head is still served");
    let answer = dripping.join().unwrap();
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(begun.elapsed() < SOON);
    assert_eq!(watcher.health()["queue"]["pending"], 1);
}
