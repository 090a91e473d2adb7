//! Who may ask over TCP: programs on this machine, and with the token where one is set.
//!
//! A caller must name one of our own hosts, which keeps out a browser's page whose name was made to lead here (DNS
//! rebinding), must not come from a page of another origin, and must bear the token.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::Response;

use super::error;
use crate::config::Secret;

/// Who may ask over TCP.
#[derive(Clone)]
pub struct Access {
    pub token: Option<Secret>,
    /// The address we listen on, which a caller may name as host.
    pub listen: IpAddr,
}

/// Lets through who may ask over TCP.
pub async fn admit_caller(State(access): State<Arc<Access>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    if !host_is_ours(headers, access.listen) {
        return error(StatusCode::FORBIDDEN, "the Host header names another host");
    }
    if !origin_is_ours(headers, access.listen) {
        return error(StatusCode::FORBIDDEN, "pages of other origins may not ask");
    }
    // The page itself holds nothing; it asks for the token and sends it with what it asks for.
    if request.uri().path() != "/" && !bears_token(headers, access.token.as_ref()) {
        let problem = "the token is missing or wrong: send Authorization: Bearer <http.token>";
        return error(StatusCode::UNAUTHORIZED, problem);
    }
    next.run(request).await
}

fn host_is_ours(headers: &HeaderMap, listen: IpAddr) -> bool {
    headers.get(HOST).and_then(|host| host.to_str().ok()).is_some_and(|host| is_our_host(host, listen))
}

fn origin_is_ours(headers: &HeaderMap, listen: IpAddr) -> bool {
    match headers.get(ORIGIN) {
        None => true,
        Some(origin) => origin
            .to_str()
            .ok()
            .and_then(|origin| origin.strip_prefix("http://"))
            .is_some_and(|host| is_our_host(host, listen)),
    }
}

/// `localhost`, a loopback address or the address we listen on, with or without a port.
fn is_our_host(host: &str, listen: IpAddr) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    if name.eq_ignore_ascii_case("localhost") {
        return true;
    }
    name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback() || address == listen || listen.is_unspecified())
}

fn bears_token(headers: &HeaderMap, token: Option<&Secret>) -> bool {
    let Some(token) = token else { return true };
    headers
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .is_some_and(|presented| token.matches(presented))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_hosts_are_let_through() {
        let listen: IpAddr = "127.0.0.1".parse().unwrap();
        for host in ["localhost", "localhost:5056", "127.0.0.1:5056", "[::1]:5056", "LOCALHOST:1"] {
            assert!(is_our_host(host, listen), "{host}");
        }
        for host in ["evil.example", "evil.example:5056", "localhost.evil.example", "10.0.0.1", "", "127.0.0.1.evil"] {
            assert!(!is_our_host(host, listen), "{host}");
        }
    }
}
