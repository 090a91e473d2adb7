//! Who may do what over TCP.
//!
//! ```text
//!                  GET of OPEN_PATHS                        everything else
//! without a token  without texts, payloads and paths        401
//! the token        everything                               everything
//! a wrong token    401                                      401
//! ```
//!
//! Loopback is open to every user of the machine, so being able to connect says nothing; the token does. The Unix socket
//! (mode 0600) is its owner's alone and asks for none of this.
//!
//! With and without the token, a request must name the address that it has reached (`Host`, and the target where it is absolute), which
//! keeps out a page whose own name was made to lead here (DNS rebinding); and where it says which page it comes from
//! (`Origin`), that page must be ours: same scheme, host and port. No answer carries CORS headers, so a page of another
//! origin can't read what it asks for without an `Origin`.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HOST, HeaderName, HeaderValue, ORIGIN, WWW_AUTHENTICATE};
use axum::http::uri::Scheme;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error;
use super::server::LocalAddress;
use crate::config::Secret;

/// What may be read without the token, by `GET` or `HEAD`. Every other route is closed without it, a new one too.
const OPEN_PATHS: [&str; 7] = ["/", "/health", "/livez", "/readyz", "/metrics", "/overview", "/live"];

/// Who asks. Routes read it from the request's extensions; where it is missing they fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Caller {
    /// Came by the socket, or has the token: may do everything.
    Owner,
    /// Anybody else: sees no text, no payload and no path.
    Stranger,
}

/// What the owner is recognised by on TCP.
#[derive(Clone)]
pub(crate) struct Access {
    /// Without one nobody is.
    pub token: Option<Secret>,
}

/// Turns away who may not ask, and tells the routes who does.
pub(super) async fn admit_caller(State(access): State<Arc<Access>>, mut request: Request, next: Next) -> Response {
    let Some(LocalAddress(Some(reached))) = request.extensions().get().copied() else {
        return error(StatusCode::FORBIDDEN, "the connection has been closed");
    };
    if let Err(refusal) = check_origin(&request, reached) {
        return error(StatusCode::FORBIDDEN, refusal);
    }
    let caller = match request.headers().get(AUTHORIZATION) {
        None => Caller::Stranger,
        Some(value) if is_token(value, &access) => Caller::Owner,
        Some(_) => return unauthorized(),
    };
    if caller == Caller::Stranger && !is_open(request.method(), request.uri().path()) {
        return unauthorized();
    }
    request.extensions_mut().insert(caller);
    next.run(request).await
}

fn is_open(method: &Method, path: &str) -> bool {
    matches!(*method, Method::GET | Method::HEAD) && OPEN_PATHS.contains(&path)
}

fn is_token(value: &HeaderValue, access: &Access) -> bool {
    let presented = value.to_str().ok().and_then(|value| value.strip_prefix("Bearer "));
    presented.zip(access.token.as_ref()).is_some_and(|(presented, token)| token.matches(presented))
}

/// Says where the token is without a path: the caller may be another user.
fn unauthorized() -> Response {
    let problem = "this needs the token: send \"Authorization: Bearer TOKEN\". It is http.token of the configuration, or \
                   in the file http.token beside the socket; \"headspace-watcher status\" shows where";
    let bearer = HeaderValue::from_static("Bearer");
    ([(WWW_AUTHENTICATE, bearer)], error(StatusCode::UNAUTHORIZED, problem)).into_response()
}

/// Refuses requests for another host or from another origin. The error is the message to the caller.
fn check_origin(request: &Request, reached: SocketAddr) -> Result<(), String> {
    let (headers, target) = (request.headers(), request.uri());
    let [address, localhost] = names(reached);
    let foreign_host = || format!("the request names another host: ask for http://{address} or http://{localhost}");
    let host = only_value(headers, &HOST).map(str::to_ascii_lowercase).filter(|host| is_ours(host, reached));
    let host = host.ok_or_else(foreign_host)?;
    if let Some(authority) = target.authority()
        && !(target.scheme() == Some(&Scheme::HTTP) && authority.as_str().eq_ignore_ascii_case(&host))
    {
        return Err(foreign_host());
    }
    // A browser asks the page's own server by the very name that the page has.
    let is_own = |origin: &str| origin.strip_prefix("http://") == Some(&*host);
    if headers.contains_key(ORIGIN) && !only_value(headers, &ORIGIN).is_some_and(is_own) {
        return Err("a page of another origin may not ask".to_owned());
    }
    Ok(())
}

/// The value of a header line that is there once.
fn only_value<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(value)
}

/// Whether a host, as browsers write it, names the address that was reached. Any name but localhost is foreign: where it
/// leads is not ours to say.
fn is_ours(host: &str, reached: SocketAddr) -> bool {
    // Browsers leave the default port out.
    names(reached).iter().any(|own| host == own || own.strip_suffix(":80") == Some(host))
}

/// Host and port under which the address that was reached may be asked.
fn names(reached: SocketAddr) -> [String; 2] {
    let address = SocketAddr::new(reached.ip().to_canonical(), reached.port());
    [address.to_string(), format!("localhost:{}", reached.port())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_ours_by_the_address_that_was_reached_or_as_localhost() {
        for (reached, host) in [
            ("127.0.0.1:5056", "127.0.0.1:5056"),
            ("127.0.0.1:5056", "localhost:5056"),
            ("127.0.0.1:80", "127.0.0.1"),
            ("127.0.0.1:80", "localhost"),
            ("127.0.0.1:80", "localhost:80"),
            ("[::1]:5056", "[::1]:5056"),
            ("[::1]:80", "[::1]"),
            // An IPv4 caller of a listener on `::`.
            ("[::ffff:127.0.0.1]:5056", "127.0.0.1:5056"),
            ("192.168.1.2:5056", "192.168.1.2:5056"),
            // A port that a container's host passes on.
            ("172.17.0.2:5056", "localhost:5056"),
        ] {
            assert!(is_ours(host, reached.parse().unwrap()), "{host} at {reached}");
        }
        for host in [
            "evil.example",
            "evil.example:5056",
            "localhost.evil.example:5056",
            "127.0.0.1.evil:5056",
            "localhost.:5056",
            "127.0.0.1.:5056",
            "10.0.0.1:5056",
            "127.0.0.2:5056",
            "[::1]:5056",
            "::1:5056",
            "0.0.0.0:5056",
            "[::]:5056",
            "localhost",
            "127.0.0.1",
            "127.0.0.1:",
            "127.0.0.1:5057",
            "127.0.0.1:+5056",
            "127.0.0.1:65592",
            "127.0.0.1:5056/",
            "127.0.0.1:5056@evil.example",
            "evil@127.0.0.1:5056",
            "127.0.0.1:5056:5056",
            "127.1:5056",
            "0x7f.0.0.1:5056",
            "[127.0.0.1]:5056",
            "[::1",
            "[::1]5056",
            " 127.0.0.1:5056",
            "",
            ":5056",
        ] {
            assert!(!is_ours(host, "127.0.0.1:5056".parse().unwrap()), "{host}");
        }
    }
}
