//! SIGTERM and SIGINT: exit 0 within two seconds, queue flushed, whatever is pending or hanging.

use std::time::Duration;

use crate::proxy::{Proxy, Road};
use crate::stage::{AWAY, Database, SOON, Server, Stage, signal, wait_until};

const LIMIT: Duration = Duration::from_secs(2);

#[test]
fn it_stops_at_once_when_nothing_is_to_be_done() {
    let stage = Stage::new();
    for name in ["TERM", "INT"] {
        let mut watcher = stage.start();
        watcher.wait_for_log("database connected");
        let begun = std::time::Instant::now();
        signal(watcher.pid(), name);
        assert_eq!(watcher.wait().code(), Some(0));
        assert!(begun.elapsed() < LIMIT, "{name}: {:?}", begun.elapsed());
        assert_eq!(watcher.logged("stopped").len(), 1);
        assert!(!stage.folder().join("data/watcher.sock").exists());
    }
}

#[test]
fn without_a_database_it_stops_at_once_and_warns_of_nothing() {
    let mut stage = Stage::with(None);
    // A part that is waited for in vain would take three fifths of it.
    stage.set("event_system.shutdown_timeout_seconds", "60");
    let mut watcher = stage.start();
    signal(watcher.pid(), "TERM");
    assert_eq!(watcher.wait().code(), Some(0));
    assert_eq!(watcher.logged("did not end in time"), Vec::<serde_json::Value>::new());
    let stopped = watcher.logged("stopped").pop().expect("the end is logged");
    assert!(stopped["stop_milliseconds"].as_u64().unwrap() < 10_000, "{stopped}");
}

#[test]
fn it_stops_in_time_with_postgres_down_and_much_pending_and_keeps_it_all() {
    let server = Server::start();
    let stage = Stage::with(Some(server.database.another()));
    server.stop("fast");
    let texts = stage.transcript("-home-me-app", 1).say_many("line", 20_000);
    let watcher = stage.start();
    wait_until("all is queued", SOON, || watcher.health()["queue"]["pending"] == 20_001);
    let (status, took) = watcher.stop();
    assert_eq!(status.code(), Some(0));
    assert!(took < LIMIT, "{took:?}");
    assert_eq!(stage.run(&["queue-dump"]).lines().len(), 20_001);
    server.start_again();
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), texts);
}

#[test]
fn it_stops_in_time_while_it_reads_and_delivers_and_goes_on_later() {
    let stage = Stage::new();
    let texts = stage.transcript("-home-me-app", 1).say_many("line", 30_000);
    let watcher = stage.start();
    wait_until("the first rows", SOON, || stage.database().count() > 100);
    let (status, took) = watcher.stop();
    assert_eq!(status.code(), Some(0));
    assert!(took < LIMIT, "{took:?}");
    let before = stage.database().count();
    assert!(before < 30_001, "it was to be stopped half-way");
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), texts);
}

#[test]
fn it_stops_in_time_while_postgres_hangs() {
    let server = Server::start();
    let stage = Stage::with(Some(server.database.another()));
    let watcher = stage.start();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    stage.wait_for_rows(2);
    server.pause(true);
    transcript.say("two");
    wait_until("the line is queued", SOON, || watcher.health()["queue"]["pending"] == 1);
    let (status, took) = watcher.stop();
    server.pause(false);
    assert_eq!(status.code(), Some(0));
    assert!(took < LIMIT, "{took:?}");
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), ["one", "two"]);
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let server = Server::start();
    let mut stage = Stage::with(Some(server.database.another()));
    stage.set("event_system.shutdown_timeout_seconds", "30");
    let mut watcher = stage.start();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    stage.wait_for_rows(2);
    signal(watcher.pid(), "TERM");
    signal(watcher.pid(), "TERM");
    let status = watcher.wait();
    assert!(matches!(status.code(), Some(0 | 143)), "{status:?}");
}

#[test]
fn it_stops_in_time_with_200_clients_and_half_a_huge_line_and_a_database_that_never_answers() {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    // Takes connections and says nothing, for ever: as behind a firewall that drops what comes back.
    let silence = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("postgresql://me@127.0.0.1:{}/db?sslmode=disable", silence.local_addr().unwrap().port());
    let mut stage = Stage::with(Some(Database::at(url)));
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    stage.set("http.listen", &format!("127.0.0.1:{port}"));
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.say("one");
    transcript.append(vec![b'x'; 60 << 20]);
    let watcher = stage.start();
    wait_until("the whole line is queued", SOON, || watcher.health()["queue"]["pending"] == 2);
    let clients: Vec<TcpStream> = (0..200)
        .map(|number| {
            let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let target = if number < 20 { "/live" } else { "/health" };
            let request = format!("GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n");
            // Some look on, some have asked and stay, some are in the middle of asking.
            let sent = if number % 2 == 0 { request.len() } else { request.len() / 2 };
            client.write_all(&request.as_bytes()[..sent]).unwrap();
            if number % 2 == 0 {
                assert!(client.read(&mut [0; 64]).unwrap() > 0);
            }
            client
        })
        .collect();
    let (status, took) = watcher.stop();
    assert_eq!(status.code(), Some(0));
    assert!(took < LIMIT, "{took:?}");
    drop(clients);
    assert_eq!(stage.run(&["queue-dump"]).lines().len(), 2, "nothing is lost");
}

#[test]
fn it_stops_in_time_while_the_road_to_postgres_swallows_everything() {
    let database = Database::new();
    let proxy = Proxy::start(&database);
    let mut stage = Stage::with(Some(database));
    stage.environment.insert("DATABASE_URL".to_owned(), proxy.url());
    let watcher = stage.start();
    let mut transcript = stage.transcript("-home-me-app", 1);
    let mut texts = transcript.say_many("before", 10);
    stage.wait_for_rows(11);
    wait_until("they are settled", SOON, || watcher.health()["queue"]["pending"] == 0);
    proxy.set(Road::Swallows);
    texts.extend(transcript.say_many("swallowed", 500));
    wait_until("these are queued", SOON, || watcher.health()["queue"]["pending"] == 500);
    let (status, took) = watcher.stop();
    assert_eq!(status.code(), Some(0));
    assert!(took < LIMIT, "{took:?}");
    stage.environment.remove("DATABASE_URL");
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), texts);
}

#[test]
fn it_stops_in_time_in_the_middle_of_making_a_segment_and_loses_nothing() {
    let mut stage = Stage::new();
    let mut transcript = stage.transcript("-home-me-app", 1);
    transcript.append("no JSON, which is carried over\n");
    let mut texts = transcript.say_many(&"x".repeat(900_000), 10);
    let environment = [
        // The first time is that of the first segment.
        ("HEADSPACE_FAULT_POINT", "segment-copied:2"),
        ("HEADSPACE_FAULT_KIND", "pause"),
        ("HEADSPACE_SEGMENT_BYTES", "2000000"),
        ("HEADSPACE_DATABASE__URL", AWAY),
    ];
    stage.environment.extend(environment.map(|(name, value)| (name.to_owned(), value.to_owned())));
    let watcher = stage.start();
    let queue = stage.folder().join("data/queue");
    wait_until("a second segment is begun", SOON, || queue.join("segment-2").exists());
    let (status, took) = watcher.stop();
    assert_eq!(status.code(), Some(0));
    assert!(took < LIMIT, "{took:?}");
    environment.iter().for_each(|(name, _)| drop(stage.environment.remove(*name)));
    texts.extend(transcript.say_many("after", 3));
    stage.run_until_idle();
    assert!(stage.database().texts() == texts, "{} of {} are there", stage.database().count(), texts.len() + 1);
    assert_eq!(stage.run(&["queue-dump", "--dead-letters"]).lines().len(), 1);
}

#[test]
fn a_panic_where_the_queue_is_written_ends_the_process_and_loses_nothing() {
    let mut stage = Stage::new();
    stage.environment.insert("HEADSPACE_FAULT_POINT".to_owned(), "commit-applied:3".to_owned());
    stage.environment.insert("HEADSPACE_FAULT_KIND".to_owned(), "panic".to_owned());
    let mut watcher = stage.start();
    let mut transcript = stage.transcript("-home-me-app", 1);
    let mut texts = Vec::new();
    let status = crate::stage::wait_for("it ends", SOON, || {
        texts.extend(transcript.say_many(&format!("burst {}", texts.len()), 2));
        std::thread::sleep(Duration::from_millis(20));
        watcher.ended()
    });
    assert_eq!(status.code(), Some(74), "so that the supervisor starts it again: {}", watcher.log());
    for name in ["HEADSPACE_FAULT_POINT", "HEADSPACE_FAULT_KIND"] {
        stage.environment.remove(name);
    }
    stage.run_until_idle();
    assert_eq!(stage.database().texts(), texts);
}
