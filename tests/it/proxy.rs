//! A road to Postgres that can be broken: a TCP port in front of the server's socket.
//!
//! Reads the messages of the protocol in both directions, so that it can cut at an exact one.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::stage::Database;

/// What happens to messages from the server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Road {
    Open,
    /// Both directions take everything and pass on nothing, as a dead peer behind a firewall does.
    Swallows,
    /// New connections are cut at once, old ones too.
    Closed,
    /// Each answer takes so long.
    Slow(Duration),
    /// Connections are cut instead of passing on the n-th end of a transaction (ReadyForQuery) counted from now on over
    /// all connections: its COMMIT has been done, its answer is lost. Then the road is open again.
    CutAfter(u64),
}

struct State {
    road: Mutex<Road>,
    /// Ends of transactions passed on since the road was set.
    passed: AtomicU64,
    cuts: AtomicU64,
    streams: Mutex<Vec<TcpStream>>,
    ended: AtomicBool,
}

/// The proxy; ends when dropped.
pub struct Proxy {
    state: Arc<State>,
    port: u16,
    database: Database,
}

impl Proxy {
    /// In front of the server of `database`.
    pub fn start(database: &Database) -> Proxy {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(State {
            road: Mutex::new(Road::Open),
            passed: AtomicU64::new(0),
            cuts: AtomicU64::new(0),
            streams: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let socket = socket(database);
        let shared = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if shared.ended.load(Ordering::SeqCst) {
                    return;
                }
                let client = client.unwrap();
                if *shared.road.lock().unwrap() == Road::Closed {
                    let _ = client.shutdown(Shutdown::Both);
                    continue;
                }
                connect(&shared, client, &socket);
            }
        });
        Proxy { state, port, database: database.clone() }
    }

    /// The database's URL through the proxy.
    pub fn url(&self) -> String {
        let (_, rest) = self.database.url.split_once("///").expect("a URL of a socket");
        let (name, parameters) = rest.split_once('?').expect("a URL with a host");
        let user = parameters.split('&').find_map(|pair| pair.strip_prefix("user=")).expect("a URL with a user");
        format!("postgresql://{user}@127.0.0.1:{}/{name}?sslmode=disable", self.port)
    }

    pub fn set(&self, road: Road) {
        self.state.passed.store(0, Ordering::SeqCst);
        *self.state.road.lock().unwrap() = road;
        if road == Road::Closed {
            self.cut();
        }
    }

    /// Cuts what is connected.
    pub fn cut(&self) {
        for stream in self.state.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Connections that [`Road::CutAfter`] has cut.
    pub fn cuts(&self) -> u64 {
        self.state.cuts.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::SeqCst);
        self.cut();
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
    }
}

/// The socket of a server that listens nowhere else.
fn socket(database: &Database) -> PathBuf {
    let folder = database.url.split(['?', '&']).find_map(|part| part.strip_prefix("host=")).expect("a URL with a host");
    PathBuf::from(folder).join(".s.PGSQL.5432")
}

fn connect(state: &Arc<State>, client: TcpStream, socket: &PathBuf) {
    // A server that is down: the client sees its connection go.
    let Ok(server) = UnixStream::connect(socket) else {
        let _ = client.shutdown(Shutdown::Both);
        return;
    };
    client.set_nodelay(true).unwrap();
    state.streams.lock().unwrap().push(client.try_clone().unwrap());
    let (mut from_client, mut to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    let shared = state.clone();
    std::thread::spawn(move || {
        let mut bytes = [0; 65536];
        while let Ok(count @ 1..) = from_client.read(&mut bytes) {
            if *shared.road.lock().unwrap() != Road::Swallows && to_server.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        let _ = to_server.shutdown(Shutdown::Both);
    });
    let (mut from_server, mut to_client) = (server, client);
    let state = state.clone();
    std::thread::spawn(move || {
        while let Some(message) = read_message(&mut from_server) {
            let mut road = state.road.lock().unwrap();
            match *road {
                Road::Swallows => continue,
                Road::Slow(pause) => {
                    drop(road);
                    std::thread::sleep(pause);
                }
                Road::CutAfter(count) if message[0] == b'Z' => {
                    if state.passed.fetch_add(1, Ordering::SeqCst) + 1 >= count {
                        *road = Road::Open;
                        state.cuts.fetch_add(1, Ordering::SeqCst);
                        break;
                    }
                    drop(road);
                }
                Road::CutAfter(_) | Road::Open => {
                    if message[0] == b'Z' {
                        state.passed.fetch_add(1, Ordering::SeqCst);
                    }
                    drop(road);
                }
                Road::Closed => break,
            }
            if to_client.write_all(&message).is_err() {
                break;
            }
        }
        // What the server has taken already it goes on with.
        let _ = to_client.shutdown(Shutdown::Both);
    });
}

/// One message: its letter, its length, its body. `None` at the end.
fn read_message(from: &mut UnixStream) -> Option<Vec<u8>> {
    let mut message = vec![0; 5];
    from.read_exact(&mut message).ok()?;
    let length = u32::from_be_bytes(message[1..5].try_into().unwrap()) as usize;
    message.resize(1 + length, 0);
    from.read_exact(&mut message[5..]).ok()?;
    Some(message)
}
