//! How to reach Postgres: `database.url`, else `DATABASE_URL`, else libpq's `PG*` variables where one of them says which
//! server: `PGHOST` or `PGHOSTADDR`. `PGUSER`, `PGPORT` and `PGDATABASE` alone, which many shells have, configure nothing.
//!
//! Read as libpq reads them, whose users expect nothing else: a URL or `key=value` words, the `PG*` variables for what
//! these leave out, then defaults; passwords from the string, `PGPASSWORD`, or the password file. The answer is plain
//! values; the sink makes its client's configuration of them. Nothing here opens a connection.
//!
//! Where it differs from libpq, on purpose:
//!
//! * Without a root certificate of the user's own, the system's are trusted (libpq: none, and verifying fails).
//! * `sslmode=allow` is read as `prefer`, which asks for TLS first.
//! * A password found in the password file for one host serves all hosts of the string.
//! * Service files (`PGSERVICE`) and what weakens or strengthens a connection in ways the client can't follow
//!   (`sslcrl`, `requirepeer`, `gssencmode=require`, …) are refused by name, never passed over.

use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::environment::Environment;
use super::load::nearest;
use super::problem::{ConfigError, Place, Problem};
use super::{DatabaseConfig, Secret};
use crate::regular_file;

/// Port of a server that says nothing else.
const PORT: u16 = 5432;

/// Folders in which a local server keeps its socket: Debian's and most distributions', then Postgres' own.
const SOCKET_FOLDERS: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// Longest time that is granted to one attempt to connect, as for `database.connect_timeout_ms`.
const CONNECT_TIMEOUT_MAX: Duration = Duration::from_secs(60);

/// A larger password file is not read.
const PASSWORD_FILE_BYTES_MAX: u64 = 1 << 20;

/// Where Postgres is and how to come in. `Debug` shows no password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseTarget {
    /// To be tried in this order; never empty.
    pub hosts: Vec<DatabaseHost>,
    pub user: String,
    pub dbname: String,
    pub password: Option<Secret>,
    pub ssl: Ssl,
    pub channel_binding: ChannelBinding,
    /// Whether only a server that takes writes will do (`target_session_attrs=read-write` or `primary`).
    pub read_write: bool,
    pub application_name: String,
    /// Command-line options for the server's session (`options`, `PGOPTIONS`).
    pub options: Option<String>,
    /// For one attempt: `connect_timeout` of the string, else `PGCONNECT_TIMEOUT`, else `database.connect_timeout_ms`.
    pub connect_timeout: Duration,
    /// What the string says of TCP keepalives; the sink has its own values for the rest.
    pub keepalive: Keepalive,
    /// For logs and messages, without the password: `postgresql://alice@db.example:5432/headspace`.
    pub described: String,
    /// Who said so: `database.url in config.yaml`, `DATABASE_URL`, `PG* variables`.
    pub source: String,
    /// What was passed over and why, a sentence each: a password file that others may read, for one.
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
    /// Whether TLS starts at once (`sslnegotiation=direct`, Postgres 17) instead of being asked for.
    pub direct: bool,
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

/// libpq's `channel_binding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelBinding {
    Disable,
    Prefer,
    Require,
}

/// TCP keepalives as the string gives them; `None` where it doesn't.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keepalive {
    pub enabled: Option<bool>,
    pub idle: Option<Duration>,
    pub interval: Option<Duration>,
    pub retries: Option<u32>,
    pub tcp_user_timeout: Option<Duration>,
}

impl DatabaseConfig {
    /// How to reach Postgres, or `None` when nothing says so.
    ///
    /// Cheap, and reads the password file each time: to be called before each attempt to connect, so that mending that
    /// file needs no restart.
    ///
    /// # Errors
    /// What can't be understood or isn't supported, naming its place, without any secret.
    pub fn resolve(&self, environment: &Environment) -> Result<Option<DatabaseTarget>, ConfigError> {
        let variable = |name: &str| Place::Variable(name.to_owned());
        let mut settings = Settings {
            parameters: Vec::new(),
            place: variable("PG*"),
            folder: environment.folder(),
            source: "PG* variables".to_owned(),
            environment,
        };
        let given = match &self.url {
            Some(url) => {
                (settings.place, settings.folder, settings.source) = (url.place.clone(), &url.folder, url.source());
                Some(url.text.reveal())
            }
            None => environment.text("DATABASE_URL")?.inspect(|_| {
                (settings.place, settings.source) = (variable("DATABASE_URL"), "DATABASE_URL".to_owned());
            }),
        };
        let mut warnings = Vec::new();
        let service = environment.set("PGSERVICE").is_some();
        if let Some(text) = given {
            settings.parameters = parse(text).map_err(|message| settings.problem(message))?;
            if service {
                warnings.push("PGSERVICE is passed over: service files are not supported".to_owned());
            }
        } else if service {
            let message = "service files are not supported; set database.url, DATABASE_URL, or PGHOST, PGPORT, PGUSER \
                           and PGDATABASE";
            return Err(Problem { place: variable("PGSERVICE"), key: None, message: message.to_owned() }.into());
        } else {
            // scripts/run-watcher.sh has the same rule.
            if !["PGHOST", "PGHOSTADDR"].iter().any(|name| environment.set(name).is_some()) {
                return Ok(None);
            }
        }
        Ok(Some(settings.target(warnings, self.connect_timeout)?))
    }
}

/// A parameter of libpq's, with its twin in the environment.
pub(super) struct Parameter {
    name: &'static str,
    variable: Option<&'static str>,
    form: Form,
}

/// What a connection string says, in its order.
pub(super) type Parameters = Vec<(&'static Parameter, String)>;

/// What the value of a parameter is.
#[derive(Clone, Copy)]
enum Form {
    Text,
    /// A whole number in this unit; libpq takes what is not above 0 for "not set".
    Whole(&'static str),
    /// Ports with commas between them, each of which may be left out.
    Ports,
    /// Addresses with commas between them, each of which may be left out.
    Addresses,
    OneOf(&'static [&'static str]),
    Unsupported,
}

const fn parameter(name: &'static str, variable: Option<&'static str>, form: Form) -> Parameter {
    Parameter { name, variable, form }
}

/// All that libpq knows, so that a typing error is told from what is not supported.
const PARAMETERS: &[Parameter] = &[
    parameter("host", Some("PGHOST"), Form::Text),
    parameter("hostaddr", Some("PGHOSTADDR"), Form::Addresses),
    parameter("port", Some("PGPORT"), Form::Ports),
    parameter("user", Some("PGUSER"), Form::Text),
    parameter("dbname", Some("PGDATABASE"), Form::Text),
    parameter("password", Some("PGPASSWORD"), Form::Text),
    parameter("passfile", Some("PGPASSFILE"), Form::Text),
    parameter("application_name", Some("PGAPPNAME"), Form::Text),
    parameter("fallback_application_name", None, Form::Text),
    parameter("options", Some("PGOPTIONS"), Form::Text),
    parameter("connect_timeout", Some("PGCONNECT_TIMEOUT"), Form::Whole("seconds")),
    parameter(
        "sslmode",
        Some("PGSSLMODE"),
        Form::OneOf(&["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]),
    ),
    parameter("sslnegotiation", Some("PGSSLNEGOTIATION"), Form::OneOf(&["postgres", "direct"])),
    parameter("sslrootcert", Some("PGSSLROOTCERT"), Form::Text),
    parameter("sslcert", Some("PGSSLCERT"), Form::Text),
    parameter("sslkey", Some("PGSSLKEY"), Form::Text),
    parameter("channel_binding", Some("PGCHANNELBINDING"), Form::OneOf(&["disable", "prefer", "require"])),
    parameter("target_session_attrs", Some("PGTARGETSESSIONATTRS"), Form::OneOf(&["any", "read-write", "primary"])),
    parameter("keepalives", None, Form::Whole("1 or 0")),
    parameter("keepalives_idle", None, Form::Whole("seconds")),
    parameter("keepalives_interval", None, Form::Whole("seconds")),
    parameter("keepalives_count", None, Form::Whole("probes")),
    parameter("tcp_user_timeout", None, Form::Whole("milliseconds")),
    // Taken where they ask for nothing that is not done anyway.
    parameter(
        "client_encoding",
        Some("PGCLIENTENCODING"),
        Form::OneOf(&["UTF8", "UTF-8", "utf8", "utf-8", "unicode", "UNICODE", "auto"]),
    ),
    parameter("gssencmode", Some("PGGSSENCMODE"), Form::OneOf(&["disable", "prefer"])),
    parameter("load_balance_hosts", Some("PGLOADBALANCEHOSTS"), Form::OneOf(&["disable"])),
    parameter("sslcertmode", Some("PGSSLCERTMODE"), Form::OneOf(&["allow"])),
    parameter("sslcompression", Some("PGSSLCOMPRESSION"), Form::OneOf(&["0"])),
    parameter("sslsni", Some("PGSSLSNI"), Form::OneOf(&["1"])),
    parameter("gssdelegation", Some("PGGSSDELEGATION"), Form::OneOf(&["0"])),
    parameter("krbsrvname", None, Form::Unsupported),
    parameter("gsslib", None, Form::Unsupported),
    parameter("replication", None, Form::Unsupported),
    parameter("require_auth", Some("PGREQUIREAUTH"), Form::Unsupported),
    parameter("requirepeer", Some("PGREQUIREPEER"), Form::Unsupported),
    parameter("requiressl", Some("PGREQUIRESSL"), Form::Unsupported),
    parameter("service", None, Form::Unsupported),
    parameter("servicefile", None, Form::Unsupported),
    parameter("ssl_max_protocol_version", Some("PGSSLMAXPROTOCOLVERSION"), Form::Unsupported),
    parameter("ssl_min_protocol_version", Some("PGSSLMINPROTOCOLVERSION"), Form::Unsupported),
    parameter("sslcrl", Some("PGSSLCRL"), Form::Unsupported),
    parameter("sslcrldir", Some("PGSSLCRLDIR"), Form::Unsupported),
    parameter("sslpassword", None, Form::Unsupported),
];

impl Parameter {
    fn named(name: &str) -> Option<&'static Parameter> {
        PARAMETERS.iter().find(|parameter| parameter.name == name)
    }

    /// Whether `value` is of this parameter's form. The error says what was expected and repeats nothing: a password
    /// whose special characters are not encoded may have spilled into any value.
    fn check(&self, value: &str) -> Result<(), String> {
        let expected = |what: &str| Err(format!("{}: expected {what}, found something else", self.name));
        match self.form {
            Form::Text => Ok(()),
            Form::Whole(_) if value.parse::<i64>().is_ok() => Ok(()),
            Form::Whole(unit) => expected(&format!("a whole number ({unit})")),
            Form::Ports
                if value
                    .split(',')
                    .all(|port| port.trim().is_empty() || port.trim().parse::<u16>().is_ok_and(|port| port > 0)) =>
            {
                Ok(())
            }
            Form::Ports => {
                expected("a number from 1 to 65535 (in a password, / ? and % must be written %2F, %3F and %25)")
            }
            Form::Addresses
                if value
                    .split(',')
                    .all(|address| address.trim().is_empty() || address.trim().parse::<IpAddr>().is_ok()) =>
            {
                Ok(())
            }
            Form::Addresses => expected("an IP address"),
            Form::OneOf(words) if words.contains(&value) => Ok(()),
            Form::OneOf(words) => expected(&words.join(", ")),
            Form::Unsupported => Err(format!("{} is not supported; leave it out", self.name)),
        }
    }
}

/// What a connection string says, and the environment for what it leaves out.
struct Settings<'a> {
    parameters: Parameters,
    place: Place,
    /// Folder to which relative paths in the string are relative.
    folder: &'a Path,
    source: String,
    environment: &'a Environment,
}

impl<'a> Settings<'a> {
    fn target(self, mut warnings: Vec<String>, connect_timeout: Duration) -> Result<DatabaseTarget, Problem> {
        // All of the environment is looked at, also what is not used below: what can't be honoured must be said.
        for parameter in PARAMETERS {
            self.get(parameter.name)?;
        }
        let hosts = self.hosts()?;
        let user = match self.get("user")?.or(self.environment.user()) {
            Some(user) => user.to_owned(),
            None => {
                return Err(self.problem(
                    "expected a user, found none; add one (postgresql://user@host/db) or set PGUSER".to_owned(),
                ));
            }
        };
        let dbname = self.get("dbname")?.unwrap_or(&user).to_owned();
        let password = match self.get("password")? {
            Some(password) => Some(Secret::new(password)),
            None => self.password_from_file(&hosts, &dbname, &user, &mut warnings)?,
        };
        let seconds = |name| -> Result<Option<Duration>, Problem> { Ok(self.whole(name)?.map(Duration::from_secs)) };
        Ok(DatabaseTarget {
            ssl: self.ssl()?,
            channel_binding: match self.get("channel_binding")? {
                Some("disable") => ChannelBinding::Disable,
                Some("require") => ChannelBinding::Require,
                _ => ChannelBinding::Prefer,
            },
            read_write: self.get("target_session_attrs")?.is_some_and(|wanted| wanted != "any"),
            application_name: match self.get("application_name")? {
                Some(name) => name.to_owned(),
                None => self.get("fallback_application_name")?.unwrap_or(env!("CARGO_PKG_NAME")).to_owned(),
            },
            options: self.get("options")?.map(str::to_owned),
            connect_timeout: seconds("connect_timeout")?.map_or(connect_timeout, |time| time.min(CONNECT_TIMEOUT_MAX)),
            keepalive: Keepalive {
                enabled: self.get("keepalives")?.map(|value| value != "0"),
                idle: seconds("keepalives_idle")?,
                interval: seconds("keepalives_interval")?,
                retries: self.whole("keepalives_count")?.and_then(|count| count.try_into().ok()),
                tcp_user_timeout: self.whole("tcp_user_timeout")?.map(Duration::from_millis),
            },
            described: describe(&hosts, &user, &dbname),
            source: self.source,
            hosts,
            user,
            dbname,
            password,
            warnings,
        })
    }

    /// The value of a parameter: from the string, else from the environment. Empty counts as not given.
    fn get(&self, name: &str) -> Result<Option<&str>, Problem> {
        // The last one wins, as in libpq.
        let given = self.parameters.iter().rev().find(|(parameter, _)| parameter.name == name);
        if let Some((_, value)) = given.filter(|(_, value)| !value.is_empty()) {
            return Ok(Some(value));
        }
        let Some((parameter, variable)) = Parameter::named(name).and_then(|known| Some((known, known.variable?)))
        else {
            return Ok(None);
        };
        let value = self.environment.text(variable)?;
        if let Some(value) = value {
            parameter.check(value).map_err(|message| Problem {
                place: Place::Variable(variable.to_owned()),
                key: None,
                message,
            })?;
        }
        Ok(value)
    }

    /// A number above 0; libpq takes all others for "not set".
    fn whole(&self, name: &str) -> Result<Option<u64>, Problem> {
        Ok(self.get(name)?.and_then(|value| value.parse().ok()).filter(|number| *number > 0))
    }

    /// A path: `~` is the home; relative ones are relative to who gave them.
    fn path(&self, name: &str) -> Result<Option<PathBuf>, Problem> {
        let Some(text) = self.get(name)? else { return Ok(None) };
        let in_string = self.parameters.iter().any(|(parameter, value)| parameter.name == name && !value.is_empty());
        let base = if in_string { self.folder } else { self.environment.folder() };
        let path = self.environment.locate(text, base);
        path.map(Some).map_err(|expected| self.problem(format!("{name}: {expected}")))
    }

    fn hosts(&self) -> Result<Vec<DatabaseHost>, Problem> {
        fn list(text: Option<&str>) -> Vec<&str> {
            text.map(|text| text.split(',').map(str::trim).collect()).unwrap_or_default()
        }
        let (names, addresses, ports) = (list(self.get("host")?), list(self.get("hostaddr")?), list(self.get("port")?));
        let count = names.len().max(addresses.len()).max(1);
        for (what, found) in [("host", names.len()), ("hostaddr", addresses.len())] {
            if found != 0 && found != count {
                return Err(
                    self.problem(format!("{what}: expected {count} entries like its counterpart, found {found}"))
                );
            }
        }
        if ports.len() > 1 && ports.len() != count {
            return Err(self.problem(format!("port: expected 1 or {count} entries, found {}", ports.len())));
        }
        let mut hosts = Vec::with_capacity(count);
        for index in 0..count {
            let given = |list: &[&'_ str]| list.get(index).filter(|text| !text.is_empty()).map(|text| text.to_string());
            let port =
                given(&ports).or_else(|| ports.first().filter(|_| ports.len() == 1).map(|port| port.to_string()));
            let port = port.and_then(|port| port.parse().ok()).unwrap_or(PORT);
            let address: Option<IpAddr> = given(&addresses).and_then(|address| address.parse().ok());
            hosts.push(match (given(&names), address) {
                (Some(name), Some(address)) if !name.starts_with('/') => {
                    DatabaseHost::Tcp { name, address: Some(address), port }
                }
                (_, Some(address)) => DatabaseHost::Tcp { name: address.to_string(), address: Some(address), port },
                (Some(name), None) if name.starts_with('@') => {
                    let message = "host: expected a name, an address or the folder of a socket, found an abstract \
                                   socket, which is not supported";
                    return Err(self.problem(message.to_owned()));
                }
                (Some(name), None) if name.starts_with('/') => DatabaseHost::Unix { folder: name.into(), port },
                (Some(name), None) => DatabaseHost::Tcp { name, address: None, port },
                (None, None) => local_host(port, SOCKET_FOLDERS.map(Path::new)),
            });
        }
        Ok(hosts)
    }

    fn ssl(&self) -> Result<Ssl, Problem> {
        let own = |file: &str| self.environment.home().map(|home| home.join(".postgresql").join(file));
        let system_roots = self.get("sslrootcert")? == Some("system");
        let given = match self.get("sslmode")? {
            Some("disable") => SslMode::Disable,
            Some("require") => SslMode::Require,
            Some("verify-ca") => SslMode::VerifyCa,
            Some("verify-full") => SslMode::VerifyFull,
            None if system_roots => SslMode::VerifyFull,
            _ => SslMode::Prefer,
        };
        if system_roots && given != SslMode::VerifyFull {
            return Err(self.problem(
                "sslmode: expected verify-full, as sslrootcert=system demands, found a weaker one".to_owned(),
            ));
        }
        let direct = self.get("sslnegotiation")? == Some("direct");
        if direct && given < SslMode::Require {
            return Err(self.problem(
                "sslmode: expected at least require, as sslnegotiation=direct demands, found a weaker one".to_owned(),
            ));
        }
        if given == SslMode::Disable {
            return Ok(Ssl { mode: given, root_cert: None, client: None, direct });
        }
        let root_cert = match self.path("sslrootcert")? {
            _ if system_roots => None,
            Some(path) => Some(path),
            None => own("root.crt").filter(|path| path.is_file()),
        };
        let client = match (self.path("sslcert")?, self.path("sslkey")?) {
            (Some(cert), Some(key)) => Some(ClientCertificate { cert, key }),
            (Some(cert), None) => match own("postgresql.key") {
                Some(key) => Some(ClientCertificate { cert, key }),
                None => return Err(self.problem("sslkey: expected the key of sslcert, found none".to_owned())),
            },
            (None, key) => match (own("postgresql.crt"), key.or_else(|| own("postgresql.key"))) {
                (Some(cert), Some(key)) if cert.is_file() && key.is_file() => Some(ClientCertificate { cert, key }),
                _ => None,
            },
        };
        let mode = if given == SslMode::Require && root_cert.is_some() { SslMode::VerifyCa } else { given };
        Ok(Ssl { mode, root_cert, client, direct })
    }

    /// The password that the password file has for the first of `hosts` it knows. A file that can't be used is a
    /// warning, as in libpq: the server may want no password.
    fn password_from_file(
        &self,
        hosts: &[DatabaseHost],
        dbname: &str,
        user: &str,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Secret>, Problem> {
        use std::os::unix::fs::MetadataExt;
        let named = self.path("passfile")?;
        let Some(path) = named.clone().or_else(|| self.environment.home().map(|home| home.join(".pgpass"))) else {
            return Ok(None);
        };
        let mut warn = |why: String| {
            warnings.push(format!("password file {} is passed over: {why}", path.display()));
            Ok(None)
        };
        let metadata = match path.metadata() {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && named.is_none() => return Ok(None),
            Err(error) => return warn(error.to_string()),
        };
        if !metadata.is_file() {
            return warn("it is no plain file".to_owned());
        }
        if metadata.mode() & 0o077 != 0 {
            return warn("group or others may use it; chmod 600 it".to_owned());
        }
        match regular_file::read(&path, PASSWORD_FILE_BYTES_MAX) {
            Err(error) => warn(error.to_string()),
            Ok(bytes) => Ok(hosts.iter().find_map(|host| password_for(&bytes, host, dbname, user)).map(Secret::new)),
        }
    }

    fn problem(&self, message: String) -> Problem {
        Problem { place: self.place.clone(), key: Some("database.url".to_owned()), message }
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
        DatabaseHost::Tcp { name, port, .. } => ([name.clone(), name.clone()], port),
        DatabaseHost::Unix { folder, port } => ([folder.display().to_string(), "localhost".to_owned()], port),
    };
    let port = port.to_string();
    let lines = file.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
    for line in lines.map(|line| line.trim_end_matches('\r')).filter(|line| !line.starts_with('#')) {
        let Some(([line_host, line_port, line_dbname, line_user], password)) = fields(line) else { continue };
        let fits = |field: &Option<String>, wanted: &str| field.as_ref().is_none_or(|field| field == wanted);
        if names.iter().any(|name| fits(&line_host, name))
            && fits(&line_port, &port)
            && fits(&line_dbname, dbname)
            && fits(&line_user, user)
        {
            return Some(password).filter(|password| !password.is_empty());
        }
    }
    None
}

/// A field of a password file; `None` stands for `*`.
type Field = Option<String>;

/// The fields of a line of a password file.
fn fields(line: &str) -> Option<([Field; 4], String)> {
    let mut rest = line;
    let mut field = || {
        let mut escaped = false;
        let end = rest.find(|c| {
            let ends = c == ':' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        })?;
        let (field, after) = rest.split_at(end);
        rest = after.strip_prefix(':')?;
        Some(if field == "*" { None } else { Some(unescape(field)) })
    };
    let names = [field()?, field()?, field()?, field()?];
    Some((names, unescape(rest)))
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
    match text.split_once("://").filter(|(scheme, _)| is_scheme(scheme)) {
        Some((scheme, rest)) => {
            // Python programs write their driver into the scheme: postgresql+psycopg.
            let (family, _driver) = scheme.split_once('+').unwrap_or((scheme, ""));
            if !["postgres", "postgresql"].contains(&family.to_ascii_lowercase().as_str()) {
                return Err(format!("{EXPECTED}, found one that starts with {scheme}://"));
            }
            parse_url(rest)
        }
        None if text.contains('=') => parse_words(text),
        None => Err(format!("{EXPECTED}, found neither")),
    }
}

/// What comes after `postgresql://`.
fn parse_url(rest: &str) -> Result<Parameters, String> {
    let mut parameters = Vec::new();
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, dbname) = place.split_once('/').unwrap_or((place, ""));
    let (account, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
    let (user, password) = account.split_once(':').unwrap_or((account, ""));

    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for host in hosts.split(',') {
        let (name, port) = match host.strip_prefix('[') {
            Some(host) => {
                let (address, after) =
                    host.split_once(']').ok_or("host: expected ] after an IPv6 address, found none")?;
                if address.parse::<Ipv6Addr>().is_err() {
                    return Err("host: expected an IPv6 address between [ and ], found something else".to_owned());
                }
                let port = match after.strip_prefix(':') {
                    Some(port) => port,
                    None if after.is_empty() => "",
                    None => return Err("host: expected : and a port after ], found something else".to_owned()),
                };
                (address, port)
            }
            None => host.split_once(':').unwrap_or((host, "")),
        };
        names.push(decode("host", name)?);
        ports.push(port);
    }
    add(&mut parameters, "host", names.join(","))?;
    // Ports that are all left out are left to PGPORT; a single missing one is the default.
    if ports.iter().any(|port| !port.is_empty()) {
        add(&mut parameters, "port", ports.join(","))?;
    }
    add(&mut parameters, "user", decode("user", user)?)?;
    add(&mut parameters, "password", decode("password", password)?)?;
    add(&mut parameters, "dbname", decode("dbname", dbname)?)?;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or("expected name=value after ?, found something else")?;
        match (decode("parameter", name)?.as_str(), decode("parameter", value)?) {
            // As in JDBC; libpq reads it too.
            ("ssl", value) if value == "true" => add(&mut parameters, "sslmode", "require".to_owned())?,
            (name, value) => add(&mut parameters, name, value)?,
        }
    }
    Ok(parameters)
}

/// `name=value` words, as libpq reads them: values may stand in single quotes, `\` takes the next letter as it is.
fn parse_words(text: &str) -> Result<Parameters, String> {
    let mut parameters = Vec::new();
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
        add(&mut parameters, name.trim_end(), value)?;
    }
    Ok(parameters)
}

/// Adds a parameter whose value is of its form; empty ones are as good as not given.
fn add(parameters: &mut Parameters, name: &str, value: String) -> Result<(), String> {
    let Some(parameter) = Parameter::named(name) else {
        // The name itself is not repeated: a password with = or ? in it makes a name of its rest.
        let known = PARAMETERS.iter().filter(|known| !matches!(known.form, Form::Unsupported));
        return Err(match nearest(name, known, |known| known.name.to_owned()) {
            Some(near) => format!("unknown parameter; did you mean \"{}\"?", near.name),
            None => "unknown parameter; expected libpq's".to_owned(),
        });
    };
    if !value.is_empty() {
        if value.contains('\0') {
            return Err(format!("{name}: expected text, found a zero byte"));
        }
        parameter.check(&value)?;
        parameters.push((parameter, value));
    }
    Ok(())
}

/// `text` with `%41` and the like read; `what` it is, for the error.
fn decode(what: &str, text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let read = after
            .split_first_chunk::<2>()
            .and_then(|([high, low], after)| Some((digit(high)? * 16 + digit(low)?, after)));
        let Some((byte, after)) = read else {
            return Err(format!(
                "{what}: expected two hex digits after %, found something else; write % itself as %25"
            ));
        };
        bytes.push(byte);
        rest = after;
    }
    String::from_utf8(bytes).map_err(|_| format!("{what}: expected UTF-8 text behind the % escapes, found other bytes"))
}

/// A URL for logs, without the password; `psql` takes it as it is.
fn describe(hosts: &[DatabaseHost], user: &str, dbname: &str) -> String {
    let (user, dbname) = (encode(user), encode(dbname));
    if let [DatabaseHost::Unix { folder, port }] = hosts {
        return format!("postgresql://{user}@/{dbname}?host={}&port={port}", encode(&folder.display().to_string()));
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

/// `text` as part of a URL.
fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(char::from(byte)),
            byte => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests;
