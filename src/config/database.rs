//! How to reach Postgres: `database.url`, else `DATABASE_URL`, else libpq's `PG*` variables where one of them says which
//! server: `PGHOST` or `PGHOSTADDR`. `PGUSER`, `PGPORT` and `PGDATABASE` alone, which many shells have, configure nothing.
//!
//! Read as libpq does: a URL or `key=value` words, the `PG*` variables for what these leave out, then defaults; passwords
//! from the string, `PGPASSWORD`, or the password file. TLS files, the password file and hosts are resolved here; the
//! rest is handed to [`tokio_postgres::Config`]. Nothing here opens a connection.
//!
//! Where it differs from libpq, on purpose:
//!
//! * Without a root certificate of the user's own, the system's are trusted (libpq: none, and verifying fails).
//! * `sslmode=allow` is read as `prefer`, which asks for TLS first.
//! * A password found in the password file for one host serves all hosts of the string.
//! * A `%` that starts no escape is taken as it is.
//! * Service files (`PGSERVICE`) and what weakens or strengthens a connection in ways the client can't follow
//!   (`sslcrl`, `requirepeer`, `gssencmode=require`, …) are refused by name, never ignored.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use tokio_postgres::config::TargetSessionAttrs;

use super::DatabaseConfig;
use super::environment::Environment;
use super::nearest::nearest;
use crate::regular_file;

/// What every command says that needs a database and finds none. Exit code 78.
pub(crate) const NO_DATABASE: &str = "no database is configured; set database.url, DATABASE_URL or PGHOST, or run \
                                      scripts/run-watcher.sh, which starts a private PostgreSQL";

/// Port of a server that says nothing else.
const PORT: u16 = 5432;

/// Folders in which a local server keeps its socket: Debian's and most distributions', then Postgres' own.
const SOCKET_FOLDERS: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// Longest time that is granted to one attempt to connect, as for `database.connect_timeout_ms`.
const CONNECT_TIMEOUT_MAX: Duration = Duration::from_secs(60);

/// A larger password file is not read.
const PASSWORD_FILE_BYTES_MAX: u64 = 1 << 20;

/// Where Postgres is and how to log in. `Debug` shows no password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseTarget {
    /// Without hosts, TLS and `statement_timeout`, which the sink adds.
    pub client: tokio_postgres::Config,
    /// To be tried in this order; never empty.
    pub hosts: Vec<DatabaseHost>,
    pub user: String,
    pub ssl: Ssl,
    /// For one attempt: `connect_timeout` of the string, else `PGCONNECT_TIMEOUT`, else `database.connect_timeout_ms`.
    pub connect_timeout: Duration,
    /// For logs and messages, without the password: `postgresql://alice@db.example:5432/headspace`.
    pub described: String,
    /// All of it but the password as a connection string, for other processes on this machine.
    pub without_password: String,
    /// What was ignored and why, a sentence each: a password file that others may read, for one.
    pub warnings: Vec<String>,
}

/// One server, by its address or by its socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DatabaseHost {
    Tcp {
        /// Also the name that a certificate must be for.
        name: String,
        /// Address to connect to instead of looking up the name (`hostaddr`).
        address: Option<IpAddr>,
        port: u16,
    },
    /// A Unix socket `.s.PGSQL.<port>` in `folder`. TLS means nothing here, whatever `ssl` says.
    Unix { folder: PathBuf, port: u16 },
}

/// How TLS is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ssl {
    pub mode: SslMode,
    /// Roots to trust instead of the system's (PEM).
    pub root_cert: Option<PathBuf>,
    /// Certificate and key to show the server (PEM): both or none.
    pub client: Option<ClientCertificate>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// libpq's `sslmode`, in rising strictness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SslMode {
    Disable,
    /// TLS where the server has it; nothing is verified.
    Prefer,
    /// TLS; nothing is verified. Never together with a root certificate: that makes it `VerifyCa`, as in libpq.
    Require,
    /// TLS with a certificate from a trusted root, for whatever name.
    VerifyCa,
    /// TLS with a certificate from a trusted root for the host's name.
    VerifyFull,
}

impl DatabaseConfig {
    /// How to reach Postgres, or `None` when nothing says so.
    ///
    /// Cheap, and reads the password file each time: to be called before each attempt to connect, so that fixing that
    /// file needs no restart.
    ///
    /// # Errors
    /// What can't be understood or isn't supported, with its location, without any secret.
    pub fn resolve(&self, environment: &Environment) -> Result<Option<DatabaseTarget>, String> {
        let from_environment = environment.text("DATABASE_URL")?;
        let (text, location, folder) = match (&self.url, from_environment) {
            (Some(url), _) => (Some(url.text.reveal()), url.location.as_str(), url.folder.as_path()),
            (None, Some(text)) => (Some(text), "environment DATABASE_URL", environment.folder()),
            (None, None) => (None, "environment PG*", environment.folder()),
        };
        let mut warnings = Vec::new();
        let is_service = environment.set("PGSERVICE").is_some();
        if is_service && text.is_none() {
            return Err("environment PGSERVICE: service files are not supported; set database.url, DATABASE_URL, or \
                        PGHOST, PGPORT, PGUSER and PGDATABASE"
                .to_owned());
        }
        if is_service {
            warnings.push("PGSERVICE is ignored: service files are not supported".to_owned());
        }
        // scripts/run-watcher.sh has the same rule.
        if text.is_none() && ["PGHOST", "PGHOSTADDR"].iter().all(|name| environment.set(name).is_none()) {
            return Ok(None);
        }
        let parameters = text.map_or(Ok(Vec::new()), parse).map_err(|message| format!("{location}: {message}"))?;
        // All of the environment is checked, also what is not used below: what can't be honoured must be said.
        let mut variables = Vec::new();
        let unsupported = UNSUPPORTED.iter().filter(|name| name.starts_with("ssl") || name.starts_with("require"));
        for name in PARAMETERS.iter().map(|(name, _)| name).chain(unsupported) {
            let variable = variable_of(name);
            if let Some(value) = environment.text(&variable)? {
                check(name, value).map_err(|message| format!("environment {variable}: {message}"))?;
                variables.push((*name, value));
            }
        }
        let settings = Settings { parameters, variables, folder, environment };
        let target = settings.target(warnings, self.connect_timeout);
        target.map(Some).map_err(|message| format!("{location}: {message}"))
    }
}

/// What a connection string says: names of [`PARAMETERS`] with values, in its order.
type Parameters = Vec<(&'static str, String)>;

/// What the value of a parameter is.
enum Form {
    Text,
    /// A whole number in this unit; libpq takes what is not above 0 for "not set".
    Whole(&'static str),
    /// Ports with commas between them, each of which may be left out.
    Ports,
    /// Addresses with commas between them, each of which may be left out.
    Addresses,
    OneOf(&'static str),
}

const PARAMETERS: &[(&str, Form)] = &[
    ("host", Form::Text),
    ("hostaddr", Form::Addresses),
    ("port", Form::Ports),
    ("user", Form::Text),
    ("dbname", Form::Text),
    ("password", Form::Text),
    ("passfile", Form::Text),
    ("application_name", Form::Text),
    ("fallback_application_name", Form::Text),
    ("options", Form::Text),
    ("connect_timeout", Form::Whole("seconds")),
    ("sslmode", Form::OneOf("disable, allow, prefer, require, verify-ca, verify-full")),
    ("sslnegotiation", Form::OneOf("postgres, direct")),
    ("sslrootcert", Form::Text),
    ("sslcert", Form::Text),
    ("sslkey", Form::Text),
    ("channel_binding", Form::OneOf("disable, prefer, require")),
    ("target_session_attrs", Form::OneOf("any, read-write, primary")),
    ("keepalives", Form::Whole("1 or 0")),
    ("keepalives_idle", Form::Whole("seconds")),
    ("keepalives_interval", Form::Whole("seconds")),
    ("keepalives_count", Form::Whole("probes")),
    ("tcp_user_timeout", Form::Whole("milliseconds")),
    // Accepted where they ask for nothing that is not done anyway.
    ("client_encoding", Form::OneOf("UTF8, UTF-8, utf8, utf-8, unicode, UNICODE, auto")),
    ("gssencmode", Form::OneOf("disable, prefer")),
    ("load_balance_hosts", Form::OneOf("disable")),
    ("sslcertmode", Form::OneOf("allow")),
    ("sslcompression", Form::OneOf("0")),
    ("sslsni", Form::OneOf("1")),
    ("gssdelegation", Form::OneOf("0")),
];

/// What else libpq knows.
#[rustfmt::skip]
const UNSUPPORTED: [&str; 13] = [
    "krbsrvname", "gsslib", "replication", "require_auth", "requirepeer", "requiressl", "service", "servicefile",
    "ssl_max_protocol_version", "ssl_min_protocol_version", "sslcrl", "sslcrldir", "sslpassword",
];

/// The environment variable of a parameter.
fn variable_of(name: &str) -> String {
    match name {
        "dbname" => "PGDATABASE".to_owned(),
        "application_name" => "PGAPPNAME".to_owned(),
        "connect_timeout" => "PGCONNECT_TIMEOUT".to_owned(),
        _ => format!("PG{}", name.replace('_', "").to_uppercase()),
    }
}

/// The known parameter that `name` is, where `value` is of its form. The error repeats neither: a password whose special
/// characters are not encoded may have spilled into both.
fn check(name: &str, value: &str) -> Result<&'static str, String> {
    if UNSUPPORTED.contains(&name) {
        return Err(format!("{name} is not supported; leave it out"));
    }
    let Some((name, form)) = PARAMETERS.iter().find(|(known, _)| *known == name) else {
        return Err(match nearest(name, PARAMETERS.iter().map(|(known, _)| *known), |known| known) {
            Some(near) => format!("unknown parameter; did you mean \"{near}\"?"),
            None => "unknown parameter; expected libpq's".to_owned(),
        });
    };
    let all = |is_valid: fn(&str) -> bool| value.split(',').all(|item| item.trim().is_empty() || is_valid(item.trim()));
    let (is_valid, expected) = match form {
        Form::Text => (!value.contains('\0'), "text without zero bytes".to_owned()),
        Form::Whole(unit) => (value.parse::<i64>().is_ok(), format!("a whole number ({unit})")),
        Form::Ports => (
            all(|port| port.parse::<u16>().is_ok_and(|port| port > 0)),
            "a number from 1 to 65535 (in a password, / ? and % must be written %2F, %3F and %25)".to_owned(),
        ),
        Form::Addresses => (all(|address| address.parse::<IpAddr>().is_ok()), "an IP address".to_owned()),
        Form::OneOf(words) => (words.split(", ").any(|word| word == value), (*words).to_owned()),
    };
    if is_valid || value.is_empty() {
        Ok(name)
    } else {
        Err(format!("{name}: expected {expected}, found something else"))
    }
}

/// What a connection string says, and the environment for what it leaves out.
struct Settings<'a> {
    parameters: Parameters,
    variables: Vec<(&'static str, &'a str)>,
    /// Folder to which relative paths in the string are relative.
    folder: &'a Path,
    environment: &'a Environment,
}

impl Settings<'_> {
    fn target(&self, mut warnings: Vec<String>, connect_timeout: Duration) -> Result<DatabaseTarget, String> {
        let hosts = self.hosts()?;
        let user = self.get("user").or(self.environment.user());
        let user = user.ok_or("expected a user, found none; add one (postgresql://user@host/db) or set PGUSER")?;
        let dbname = self.get("dbname").unwrap_or(user);
        let password = match self.get("password") {
            Some(password) => Some(password.to_owned()),
            None => self.password_from_file(&hosts, dbname, user, &mut warnings)?,
        };
        let ssl = self.ssl()?;

        let words = ["sslnegotiation", "channel_binding", "keepalives"];
        let words: String = words.iter().filter_map(|name| Some(format!("{name}={} ", self.get(name)?))).collect();
        let mut client: tokio_postgres::Config = words.parse().map_err(|error| format!("{error}"))?;
        let application_name = self.get("application_name").or(self.get("fallback_application_name"));
        client.user(user).dbname(dbname).application_name(application_name.unwrap_or(env!("CARGO_PKG_NAME")));
        if let Some(password) = password {
            client.password(password);
        }
        if let Some(options) = self.get("options") {
            client.options(options);
        }
        if self.get("target_session_attrs").is_some_and(|wanted| wanted != "any") {
            client.target_session_attrs(TargetSessionAttrs::ReadWrite);
        }
        let connect_timeout = match self.positive("connect_timeout") {
            Some(seconds) => Duration::from_secs(seconds).min(CONNECT_TIMEOUT_MAX),
            None => connect_timeout,
        };
        // A dead peer must be noticed in seconds.
        let positive = |name, default| self.positive(name).unwrap_or(default);
        client
            .connect_timeout(connect_timeout)
            .keepalives_idle(Duration::from_secs(positive("keepalives_idle", 10)))
            .keepalives_interval(Duration::from_secs(positive("keepalives_interval", 3)))
            .keepalives_retries(u32::try_from(positive("keepalives_count", 3)).unwrap_or(3))
            .tcp_user_timeout(Duration::from_millis(positive("tcp_user_timeout", 10_000)));
        let described = describe(&hosts, user, dbname);
        let without_password = self.without_password(user, dbname)?;
        let user = user.to_owned();
        Ok(DatabaseTarget { client, hosts, user, ssl, connect_timeout, described, without_password, warnings })
    }

    /// All parameters but the password as `name='value'` words, with absolute paths.
    fn without_password(&self, user: &str, dbname: &str) -> Result<String, String> {
        let quoted = |value: &str| format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"));
        let mut words = format!("user={} dbname={}", quoted(user), quoted(dbname));
        for (name, _) in PARAMETERS.iter().filter(|(name, _)| !["user", "dbname", "password"].contains(name)) {
            let is_path = ["passfile", "sslrootcert", "sslcert", "sslkey"].contains(name);
            let value = match self.get(name) {
                Some(value) if !is_path || value == "system" => Some(value.to_owned()),
                Some(_) => self.path(name)?.map(|path| path.display().to_string()),
                None => None,
            };
            words.extend(value.map(|value| format!(" {name}={}", quoted(&value))));
        }
        Ok(words)
    }

    /// The value of a parameter in the string; the last one counts, as in libpq. Empty counts as not given.
    fn given(&self, name: &str) -> Option<&str> {
        let (_, value) = self.parameters.iter().rev().find(|(known, _)| *known == name)?;
        Some(value.as_str()).filter(|value| !value.is_empty())
    }

    /// The value of a parameter: from the string, else from the environment.
    fn get(&self, name: &str) -> Option<&str> {
        let variable = || self.variables.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
        self.given(name).or_else(variable)
    }

    /// A number above 0; libpq takes all others for "not set".
    fn positive(&self, name: &str) -> Option<u64> {
        self.get(name)?.parse().ok().filter(|number| *number > 0)
    }

    /// A path: `~` is the home; relative ones are relative to where they were given.
    fn path(&self, name: &str) -> Result<Option<PathBuf>, String> {
        let Some(text) = self.get(name) else { return Ok(None) };
        let base = if self.given(name).is_some() { self.folder } else { self.environment.folder() };
        self.environment.locate(text, base).map(Some).map_err(|expected| format!("{name}: {expected}"))
    }

    fn hosts(&self) -> Result<Vec<DatabaseHost>, String> {
        let list = |name: &str| -> Vec<&str> {
            self.get(name).map(|text| text.split(',').map(str::trim).collect()).unwrap_or_default()
        };
        let (names, addresses, ports) = (list("host"), list("hostaddr"), list("port"));
        let count = names.len().max(addresses.len()).max(1);
        for (what, found) in [("host", names.len()), ("hostaddr", addresses.len())] {
            if found != 0 && found != count {
                return Err(format!("{what}: expected {count} entries like its counterpart, found {found}"));
            }
        }
        if ports.len() > 1 && ports.len() != count {
            return Err(format!("port: expected 1 or {count} entries, found {}", ports.len()));
        }
        let host = |index: usize| {
            let entry = |list: &[&str]| list.get(index).filter(|text| !text.is_empty()).map(|text| text.to_string());
            // One port serves all hosts.
            let port = if ports.len() == 1 { ports.first().map(|port| port.to_string()) } else { entry(&ports) };
            let port = port.and_then(|port| port.parse().ok()).unwrap_or(PORT);
            let address: Option<IpAddr> = entry(&addresses).and_then(|address| address.parse().ok());
            match (entry(&names), address) {
                (Some(name), None) if name.starts_with('@') => {
                    let expected = "a name, an address or the folder of a socket";
                    Err(format!("host: expected {expected}, found an abstract socket, which is not supported"))
                }
                (Some(name), None) if name.starts_with('/') => Ok(DatabaseHost::Unix { folder: name.into(), port }),
                (Some(name), address) if !name.starts_with('/') => Ok(DatabaseHost::Tcp { name, address, port }),
                (_, Some(address)) => Ok(DatabaseHost::Tcp { name: address.to_string(), address: Some(address), port }),
                _ => Ok(local_host(port, SOCKET_FOLDERS.map(Path::new))),
            }
        };
        (0..count).map(host).collect()
    }

    fn ssl(&self) -> Result<Ssl, String> {
        let own = |file: &str| self.environment.home().map(|home| home.join(".postgresql").join(file));
        let has_system_roots = self.get("sslrootcert") == Some("system");
        let is_direct = self.get("sslnegotiation") == Some("direct");
        let given = match self.get("sslmode") {
            Some("disable") => SslMode::Disable,
            Some("require") => SslMode::Require,
            Some("verify-ca") => SslMode::VerifyCa,
            Some("verify-full") => SslMode::VerifyFull,
            None if has_system_roots => SslMode::VerifyFull,
            _ => SslMode::Prefer,
        };
        for (least, name, cause, is_demanded) in [
            (SslMode::VerifyFull, "verify-full", "sslrootcert=system", has_system_roots),
            (SslMode::Require, "at least require", "sslnegotiation=direct", is_direct),
        ] {
            if is_demanded && given < least {
                return Err(format!("sslmode: expected {name}, as {cause} demands, found a weaker one"));
            }
        }
        if given == SslMode::Disable {
            return Ok(Ssl { mode: given, root_cert: None, client: None });
        }
        let root_cert = match self.path("sslrootcert")? {
            _ if has_system_roots => None,
            Some(path) => Some(path),
            None => own("root.crt").filter(|path| path.is_file()),
        };
        let key = self.path("sslkey")?.or_else(|| own("postgresql.key"));
        let client = match self.path("sslcert")? {
            Some(cert) => {
                let key = key.ok_or("sslkey: expected the key of sslcert, found none")?;
                Some(ClientCertificate { cert, key })
            }
            None => {
                let files = own("postgresql.crt").zip(key).filter(|(cert, key)| cert.is_file() && key.is_file());
                files.map(|(cert, key)| ClientCertificate { cert, key })
            }
        };
        let mode = if given == SslMode::Require && root_cert.is_some() { SslMode::VerifyCa } else { given };
        Ok(Ssl { mode, root_cert, client })
    }

    /// The password that the password file has for the first of `hosts` it knows. A file that can't be used is a
    /// warning, as in libpq: the server may want no password.
    fn password_from_file(
        &self,
        hosts: &[DatabaseHost],
        dbname: &str,
        user: &str,
        warnings: &mut Vec<String>,
    ) -> Result<Option<String>, String> {
        use std::os::unix::fs::MetadataExt;
        let named = self.path("passfile")?;
        let is_named = named.is_some();
        let Some(path) = named.or_else(|| self.environment.home().map(|home| home.join(".pgpass"))) else {
            return Ok(None);
        };
        let why = match path.metadata() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !is_named => return Ok(None),
            Err(error) => error.to_string(),
            Ok(metadata) if metadata.is_file() && metadata.mode() & 0o077 != 0 => {
                "group or others may use it; chmod 600 it".to_owned()
            }
            Ok(_) => match regular_file::read(&path, PASSWORD_FILE_BYTES_MAX) {
                Ok(bytes) => return Ok(hosts.iter().find_map(|host| password_for(&bytes, host, dbname, user))),
                Err(error) => error.to_string(),
            },
        };
        warnings.push(format!("password file {} is ignored: {why}", path.display()));
        Ok(None)
    }
}

/// The local server: where its socket is, else where sockets are kept, else `localhost`.
fn local_host<'f>(port: u16, folders: impl IntoIterator<Item = &'f Path> + Clone) -> DatabaseHost {
    let with_socket = folders.clone().into_iter().find(|folder| folder.join(format!(".s.PGSQL.{port}")).exists());
    // The first one belongs to Postgres alone; the others say nothing by being there.
    let of_postgres = || folders.into_iter().take(1).find(|folder| folder.is_dir());
    match with_socket.or_else(of_postgres) {
        Some(folder) => DatabaseHost::Unix { folder: folder.to_owned(), port },
        None => DatabaseHost::Tcp { name: "localhost".to_owned(), address: None, port },
    }
}

/// The password in libpq's password file for a host, if it has one.
///
/// Lines of `host:port:database:user:password`, `*` for any, `\` before `:` and `\`. The first line that fits decides.
fn password_for(file: &[u8], host: &DatabaseHost, dbname: &str, user: &str) -> Option<String> {
    let (names, port) = match host {
        DatabaseHost::Tcp { name, port, .. } => (vec![name.clone()], port.to_string()),
        DatabaseHost::Unix { folder, port } => {
            (vec![folder.display().to_string(), "localhost".to_owned()], port.to_string())
        }
    };
    let fits = |field: &str, wanted: &str| field == "*" || unescape(field) == wanted;
    let password = |line: &str| {
        let mut is_escaped = false;
        let mut fields = line.splitn(5, |c| {
            let ends = c == ':' && !is_escaped;
            is_escaped = c == '\\' && !is_escaped;
            ends
        });
        let host = fields.next()?;
        let is_ours = names.iter().any(|name| fits(host, name))
            && [&port, dbname, user].iter().all(|wanted| fields.next().is_some_and(|field| fits(field, wanted)));
        fields.next().filter(|_| is_ours).map(unescape)
    };
    let lines = file.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
    let mut lines = lines.map(|line| line.trim_end_matches('\r')).filter(|line| !line.starts_with('#'));
    lines.find_map(password).filter(|password| !password.is_empty())
}

/// `text` with each `\` gone and what follows it kept.
fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => plain.extend(chars.next()),
            c => plain.push(c),
        }
    }
    plain
}

/// The parameters of a connection string, each of its form. The error shows no secret.
pub(super) fn parse(text: &str) -> Result<Parameters, String> {
    const EXPECTED: &str = "expected a URL like postgresql://user@host/db or words like host=/run/postgresql dbname=db";
    let text = text.trim();
    let is_scheme =
        |scheme: &str| !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    let pairs = match text.split_once("://").filter(|(scheme, _)| is_scheme(scheme)) {
        Some((scheme, rest)) => {
            // Python programs write their driver into the scheme: postgresql+psycopg.
            let (family, _driver) = scheme.split_once('+').unwrap_or((scheme, ""));
            if !["postgres", "postgresql"].contains(&family.to_ascii_lowercase().as_str()) {
                return Err(format!("{EXPECTED}, found one that starts with {scheme}://"));
            }
            parse_url(rest)?
        }
        None if text.contains('=') => parse_words(text)?,
        None => return Err(format!("{EXPECTED}, found neither")),
    };
    pairs.into_iter().map(|(name, value)| Ok((check(&name, &value)?, value))).collect()
}

/// Names and values of what comes after `postgresql://`.
fn parse_url(rest: &str) -> Result<Vec<(String, String)>, String> {
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, dbname) = place.split_once('/').unwrap_or((place, ""));
    let (account, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
    let (user, password) = account.split_once(':').unwrap_or((account, ""));
    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for host in hosts.split(',') {
        let (name, port) = match host.strip_prefix('[') {
            Some(host) => {
                let (address, port) =
                    host.split_once(']').ok_or("host: expected ] after an IPv6 address, found none")?;
                (address, port.strip_prefix(':').unwrap_or(port))
            }
            None => host.split_once(':').unwrap_or((host, "")),
        };
        names.push(name);
        ports.push(port);
    }
    // Ports that are all left out are left to PGPORT; a single missing one is the default.
    let ports = if ports.iter().all(|port| port.is_empty()) { String::new() } else { ports.join(",") };
    let hosts = names.join(",");
    let mut pairs =
        vec![("host", &*hosts), ("port", &ports), ("user", user), ("password", password), ("dbname", dbname)];
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=').ok_or("expected name=value after ?, found something else")? {
            // As in JDBC; libpq reads it too.
            ("ssl", "true") => pairs.push(("sslmode", "require")),
            pair => pairs.push(pair),
        }
    }
    let decode = |text| percent_decode_str(text).decode_utf8().map(String::from);
    let decode_pair = |(name, value)| {
        let name =
            decode(name).map_err(|_| "expected UTF-8 text behind the % escapes, found other bytes".to_owned())?;
        let value =
            decode(value).map_err(|_| format!("{name}: expected UTF-8 text behind the % escapes, found other bytes"));
        Ok((name, value?))
    };
    pairs.into_iter().map(decode_pair).collect()
}

/// `name=value` words, as libpq reads them: values may stand in single quotes, `\` takes the next letter as it is.
fn parse_words(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut pairs = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (name, value) = rest.split_once('=').ok_or("expected name=value, found a word without =")?;
        rest = value.trim_start();
        let quoted = rest.strip_prefix('\'');
        let mut chars = quoted.unwrap_or(rest).chars();
        let mut value = String::new();
        loop {
            match chars.next() {
                Some('\\') => value.extend(chars.next()),
                Some('\'') if quoted.is_some() => break,
                Some(c) if quoted.is_none() && c.is_whitespace() => break,
                Some(c) => value.push(c),
                None if quoted.is_some() => return Err("expected ' at the end of a value, found none".to_owned()),
                None => break,
            }
        }
        rest = chars.as_str().trim_start();
        pairs.push((name.trim_end().to_owned(), value));
    }
    Ok(pairs)
}

/// A URL for logs, without the password; `psql` takes it as it is.
fn describe(hosts: &[DatabaseHost], user: &str, dbname: &str) -> String {
    const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
    let encode = |text: &str| utf8_percent_encode(text, KEPT).to_string();
    let (user, dbname) = (encode(user), encode(dbname));
    if let [DatabaseHost::Unix { folder, port }] = hosts {
        // Here a slash may stand as it is, and is easier to read.
        const KEPT_IN_PATH: &AsciiSet = &KEPT.remove(b'/');
        let folder = utf8_percent_encode(&folder.display().to_string(), KEPT_IN_PATH).to_string();
        return format!("postgresql://{user}@/{dbname}?host={folder}&port={port}");
    }
    let hosts: Vec<String> = hosts
        .iter()
        .map(|host| match host {
            DatabaseHost::Tcp { name, port, .. } if name.contains(':') => format!("[{name}]:{port}"),
            DatabaseHost::Tcp { name, port, .. } => format!("{name}:{port}"),
            DatabaseHost::Unix { folder, port } => format!("{}:{port}", encode(&folder.display().to_string())),
        })
        .collect();
    format!("postgresql://{user}@{}/{dbname}", hosts.join(","))
}

#[cfg(test)]
mod tests;
