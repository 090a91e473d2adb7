use std::os::unix::fs::PermissionsExt;

use tokio_postgres::config::{ChannelBinding, SslNegotiation};

use super::*;
use crate::config::Config;

/// A home of its own, and what `resolve` makes of variables and `database.url`.
struct Desk {
    home: tempfile::TempDir,
    variables: Vec<(String, String)>,
}

impl Desk {
    fn new(variables: &[(&str, &str)]) -> Self {
        let variables = variables.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Desk { home: tempfile::tempdir().unwrap(), variables }
    }

    fn path(&self, below: &str) -> PathBuf {
        self.home.path().join(below)
    }

    fn write(&self, name: &str, text: &str, mode: u32) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn environment(&self) -> Environment {
        let home = self.home.path().to_str().unwrap().to_owned();
        let own = [("HOME".to_owned(), home), ("USER".to_owned(), "ada".to_owned())];
        Environment::new(self.home.path(), own.into_iter().chain(self.variables.clone()))
    }

    fn try_resolve(&self) -> Result<Option<DatabaseTarget>, String> {
        let environment = self.environment();
        let loaded = Config::load(None, &environment).map_err(|error| error.to_string())?;
        loaded.config.database.resolve(&environment)
    }

    fn resolve(&self) -> DatabaseTarget {
        self.try_resolve().unwrap_or_else(|error| panic!("{error}")).expect("a database is configured")
    }

    fn error(&self) -> String {
        self.try_resolve().unwrap_err()
    }
}

fn resolve(variables: &[(&str, &str)]) -> DatabaseTarget {
    Desk::new(variables).resolve()
}

fn url(url: &str) -> DatabaseTarget {
    resolve(&[("DATABASE_URL", url)])
}

/// The error that a connection string ends with, its place left out.
#[track_caller]
fn refused(url: &str) -> String {
    let error = Desk::new(&[("DATABASE_URL", url)]).error();
    error.strip_prefix("environment DATABASE_URL: ").unwrap_or_else(|| panic!("{error}")).to_owned()
}

#[test]
fn without_its_password_a_connection_string_leads_to_the_same_target() {
    let string = concat!(
        r"host=db.example,/run hostaddr=::1, port=5433, user='a\'da' dbname='it\\s' password='open sesame' ",
        "sslmode=require sslrootcert=certs/root.pem options='-c search_path=x' channel_binding=require",
    );
    let desk = Desk::new(&[("DATABASE_URL", string), ("PGCONNECT_TIMEOUT", "7"), ("PGAPPNAME", "it's me")]);
    let target = desk.resolve();
    assert!(!target.without_password.contains("sesame"), "{}", target.without_password);
    let again = resolve(&[("DATABASE_URL", &target.without_password), ("PGPASSWORD", "open sesame")]);
    assert_eq!(again, target);
}

fn tcp(name: &str, port: u16) -> DatabaseHost {
    DatabaseHost::Tcp { name: name.to_owned(), address: None, port }
}

/// User and database.
fn account(target: &DatabaseTarget) -> (&str, &str) {
    (target.client.get_user().unwrap(), target.client.get_dbname().unwrap())
}

/// Whether they are on; idle and interval in seconds, retries, the time-out for a dead peer in milliseconds.
fn keepalive(client: &tokio_postgres::Config) -> (bool, u64, Option<u64>, Option<u32>, Option<u128>) {
    (
        client.get_keepalives(),
        client.get_keepalives_idle().as_secs(),
        client.get_keepalives_interval().map(|interval| interval.as_secs()),
        client.get_keepalives_retries(),
        client.get_tcp_user_timeout().map(|timeout| timeout.as_millis()),
    )
}

fn password(target: &DatabaseTarget) -> Option<&str> {
    target.client.get_password().map(|password| std::str::from_utf8(password).unwrap())
}

// Which of them serves.

#[test]
fn nothing_set_is_unconfigured() {
    assert_eq!(Desk::new(&[]).try_resolve().unwrap(), None);
    let beside = [
        ("PGPASSWORD", "x"),
        ("PGSSLMODE", "require"),
        ("PGAPPNAME", "x"),
        ("PGUSER", "u"),
        ("PGPORT", "1"),
        ("PGDATABASE", "d"),
        ("DATABASE_URL", ""),
        ("PGHOST", ""),
    ];
    assert_eq!(Desk::new(&beside).try_resolve().unwrap(), None);
}

#[test]
fn database_url_of_the_configuration_goes_before_the_environment() {
    let desk = Desk::new(&[("DATABASE_URL", "postgresql://b@two/b"), ("PGHOST", "three")]);
    desk.write("config.yaml", "database:\n  url: postgresql://a@one/a\n", 0o600);
    let target = desk.resolve();
    assert_eq!(target.described, "postgresql://a@one:5432/a");

    std::fs::remove_file(desk.path("config.yaml")).unwrap();
    assert_eq!(desk.resolve().described, "postgresql://b@two:5432/b");
    assert_eq!(resolve(&[("PGHOST", "three")]).described, "postgresql://ada@three:5432/ada");

    let target = resolve(&[("HEADSPACE_DATABASE__URL", "postgresql://one"), ("DATABASE_URL", "postgresql://two")]);
    assert_eq!(target.hosts, [tcp("one", 5432)]);
}

#[test]
fn a_variable_that_says_which_server_is_enough() {
    for (name, value) in [("PGHOST", "h"), ("PGHOSTADDR", "::1")] {
        assert!(Desk::new(&[(name, value)]).try_resolve().unwrap().is_some(), "{name}");
    }
}

#[test]
fn what_the_url_leaves_out_comes_from_the_variables() {
    let target = resolve(&[
        ("DATABASE_URL", "postgresql:///?sslmode=disable"),
        ("PGHOST", "db"),
        ("PGPORT", "6000"),
        ("PGUSER", "bob"),
        ("PGDATABASE", "head"),
        ("PGPASSWORD", "secret"),
        ("PGSSLMODE", "require"),
        ("PGAPPNAME", "app"),
        ("PGOPTIONS", "-c geqo=off"),
        ("PGCONNECT_TIMEOUT", "7"),
    ]);
    assert_eq!(target.hosts, [tcp("db", 6000)]);
    assert_eq!(account(&target), ("bob", "head"));
    assert_eq!(password(&target), Some("secret"));
    assert_eq!(target.ssl.mode, SslMode::Disable);
    let client = &target.client;
    assert_eq!((client.get_application_name(), client.get_options()), (Some("app"), Some("-c geqo=off")));
    assert_eq!(target.connect_timeout, Duration::from_secs(7));
}

#[test]
fn the_rest_is_libpqs_defaults() {
    let target = resolve(&[("PGHOST", "db")]);
    assert_eq!(target.hosts, [tcp("db", 5432)]);
    assert_eq!(account(&target), ("ada", "ada"));
    assert_eq!(target.ssl, Ssl { mode: SslMode::Prefer, root_cert: None, client: None });
    let client = &target.client;
    assert_eq!(client.get_channel_binding(), ChannelBinding::Prefer);
    assert_eq!((client.get_target_session_attrs(), client.get_options()), (TargetSessionAttrs::Any, None));
    assert_eq!(client.get_application_name(), Some("headspace-watcher"));
    assert_eq!(target.connect_timeout, Duration::from_millis(1000));
    assert_eq!(keepalive(client), (true, 10, Some(3), Some(3), Some(10_000)));
    assert!(client.get_password().is_none() && target.warnings.is_empty());
}

#[test]
fn without_a_user_the_error_says_how_to_name_one() {
    let environment = Environment::new("/", [("HOME", "/"), ("PGHOST", "db")]);
    let config = Config::load(None, &environment).unwrap().config;
    assert_eq!(
        config.database.resolve(&environment).unwrap_err(),
        "environment PG*: expected a user, found none; add one (postgresql://user@host/db) or set PGUSER"
    );
}

#[test]
fn service_files_are_refused_or_ignored_with_a_warning() {
    assert_eq!(
        Desk::new(&[("PGSERVICE", "prod"), ("PGHOST", "db")]).error(),
        "environment PGSERVICE: service files are not supported; set database.url, DATABASE_URL, or PGHOST, PGPORT, \
         PGUSER and PGDATABASE"
    );
    let target = resolve(&[("PGSERVICE", "prod"), ("DATABASE_URL", "postgresql://db")]);
    assert_eq!(target.warnings, ["PGSERVICE is ignored: service files are not supported"]);
    assert_eq!(refused("postgresql://db?service=prod"), "service is not supported; leave it out");
}

// Reading the string.

#[test]
fn a_url_is_read_whole() {
    let target = url("postgresql://al%40ice:p%40ss%3A%2Fw%25@db.example:6432/my%20db\
         ?sslmode=verify-full&application_name=a%26b&options=-c%20geqo%3Doff&connect_timeout=3\
         &target_session_attrs=read-write&channel_binding=require&keepalives=1&keepalives_idle=11\
         &keepalives_interval=5&keepalives_count=2&tcp_user_timeout=1500");
    assert_eq!(target.hosts, [tcp("db.example", 6432)]);
    assert_eq!(account(&target), ("al@ice", "my db"));
    assert_eq!(password(&target), Some("p@ss:/w%"));
    assert_eq!(target.ssl.mode, SslMode::VerifyFull);
    let client = &target.client;
    assert_eq!((client.get_application_name(), client.get_options()), (Some("a&b"), Some("-c geqo=off")));
    assert_eq!(target.connect_timeout, Duration::from_secs(3));
    assert_eq!(client.get_target_session_attrs(), TargetSessionAttrs::ReadWrite);
    assert_eq!(client.get_channel_binding(), ChannelBinding::Require);
    assert_eq!(keepalive(client), (true, 11, Some(5), Some(2), Some(1500)));
    assert_eq!(target.described, "postgresql://al%40ice@db.example:6432/my%20db");
}

#[test]
fn a_password_may_hold_an_at_sign_and_colons() {
    let target = url("postgres://ada:p@s:s@db/x");
    assert_eq!(password(&target), Some("p@s:s"));
    assert_eq!(password(&url("postgres://ada:100%@db/x")), Some("100%"));
    assert_eq!(target.hosts, [tcp("db", 5432)]);
}

#[test]
fn schemes_may_name_a_driver() {
    assert_eq!(url("postgresql+psycopg2://ada@db/x").described, "postgresql://ada@db:5432/x");
    assert_eq!(url("POSTGRES://ada@db/x").described, "postgresql://ada@db:5432/x");
}

#[test]
fn several_hosts_are_tried_in_their_order() {
    assert_eq!(url("postgresql://one:1,two,[::1]:3/x").hosts, [tcp("one", 1), tcp("two", 5432), tcp("::1", 3)]);
    let all = resolve(&[("DATABASE_URL", "postgresql://one,two/x"), ("PGPORT", "6000")]);
    assert_eq!(all.hosts, [tcp("one", 6000), tcp("two", 6000)]);
    let words = url("host=one,two port=1,2 dbname=x user=u");
    assert_eq!(words.hosts, [tcp("one", 1), tcp("two", 2)]);
    assert_eq!(words.described, "postgresql://u@one:1,two:2/x");
    assert_eq!(refused("host=one,two port=1,2,3"), "port: expected 1 or 2 entries, found 3");
    assert_eq!(
        refused("host=one,two hostaddr=127.0.0.1"),
        "hostaddr: expected 2 entries like its counterpart, found 1"
    );
}

#[test]
fn addresses_spare_the_lookup_and_names_stay_for_certificates() {
    let address = Some("10.0.0.1".parse().unwrap());
    let named = DatabaseHost::Tcp { name: "db".to_owned(), address, port: 5432 };
    assert_eq!(url("host=db hostaddr=10.0.0.1").hosts, [named]);
    let bare = DatabaseHost::Tcp { name: "10.0.0.1".to_owned(), address, port: 5432 };
    assert_eq!(url("hostaddr=10.0.0.1").hosts, [bare]);
}

#[test]
fn sockets_are_named_by_their_folder() {
    let socket = DatabaseHost::Unix { folder: "/srv/pg".into(), port: 5433 };
    for text in [
        "postgresql://ada@%2Fsrv%2Fpg:5433/x",
        "postgresql://ada@/x?host=/srv/pg&port=5433",
        "host=/srv/pg port=5433 user=ada dbname=x",
    ] {
        let target = url(text);
        assert_eq!(target.hosts, std::slice::from_ref(&socket), "{text}");
        // What is told can be given back.
        assert_eq!(url(&target.described).hosts, target.hosts, "{}", target.described);
    }
    assert_eq!(
        refused("host=@abstract"),
        "host: expected a name, an address or the folder of a socket, found an abstract socket, which is not supported"
    );
}

#[test]
fn without_a_host_a_local_socket_goes_before_localhost() {
    let (debian, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let folders = [debian.path(), own.path()];
    let unix = |folder: &Path| DatabaseHost::Unix { folder: folder.to_owned(), port: 5432 };
    assert_eq!(local_host(5432, folders), unix(debian.path()));
    std::fs::write(own.path().join(".s.PGSQL.5432"), "").unwrap();
    assert_eq!(local_host(5432, folders), unix(own.path()));
    std::fs::write(debian.path().join(".s.PGSQL.5432"), "").unwrap();
    assert_eq!(local_host(5432, folders), unix(debian.path()));
    let gone = debian.path().join("gone");
    assert_eq!(local_host(5432, [gone.as_path(), debian.path()]), unix(debian.path()));
    assert_eq!(local_host(5433, [gone.as_path(), debian.path()]), tcp("localhost", 5433));
}

#[test]
fn words_may_be_quoted_and_escaped() {
    let target = url(r"  host = db  password = 'a \'b\' \\ c=d' user=x\ y  dbname='' application_name=''");
    assert_eq!(target.hosts, [tcp("db", 5432)]);
    assert_eq!(password(&target), Some(r"a 'b' \ c=d"));
    assert_eq!(account(&target), ("x y", "x y"));
    assert_eq!(refused("host=db password='x"), "expected ' at the end of a value, found none");
    assert_eq!(refused("host=db x"), "expected name=value, found a word without =");
}

#[test]
fn strings_of_no_known_form_are_refused() {
    let expected = "expected a URL like postgresql://user@host/db or words like host=/run/postgresql dbname=db, found";
    assert_eq!(refused("mysql://root@db/x"), format!("{expected} one that starts with mysql://"));
    assert_eq!(refused("events"), format!("{expected} neither"));
}

#[test]
fn wrong_parameters_say_what_was_expected_and_repeat_nothing() {
    for case in r#"
        postgresql://db?sslmod=x => unknown parameter; did you mean "sslmode"?
        postgresql://db?xyzzy=x => unknown parameter; expected libpq's
        postgresql://db?sslmode=full => sslmode: expected disable, allow, prefer, require, verify-ca, verify-full, found something else
        postgresql://db:many/x => port: expected a number from 1 to 65535 (in a password, / ? and % must be written %2F, %3F and %25), found something else
        host=db port=0 => port: expected a number from 1 to 65535 (in a password, / ? and % must be written %2F, %3F and %25), found something else
        host=db hostaddr=db => hostaddr: expected an IP address, found something else
        host=db connect_timeout=x => connect_timeout: expected a whole number (seconds), found something else
        host=db sslcrl=x => sslcrl is not supported; leave it out
        host=db gssencmode=require => gssencmode: expected disable, prefer, found something else
        host=db target_session_attrs=standby => target_session_attrs: expected any, read-write, primary, found something else
        postgresql://db?x => expected name=value after ?, found something else
        postgresql://a:%ff@db => password: expected UTF-8 text behind the % escapes, found other bytes
        postgresql://a%00@db => user: expected text without zero bytes, found something else
        postgresql://[::1/x => host: expected ] after an IPv6 address, found none"#
        .trim()
        .lines()
    {
        let (text, message) = case.trim().split_once(" => ").unwrap();
        assert_eq!(refused(text), message, "{text}");
    }
}

#[test]
fn a_wrong_database_url_in_the_file_names_its_line() {
    let desk = Desk::new(&[]);
    desk.write("config.yaml", "database:\n  url: postgresql://ada:hunter2@db?sslmode=x\n", 0o600);
    assert_eq!(
        desk.error(),
        "config.yaml:2: database.url: sslmode: expected disable, allow, prefer, require, verify-ca, verify-full, found \
         something else"
    );
    // What only shows together with the rest, too.
    desk.write("config.yaml", "\ndatabase:\n  url: host=db sslrootcert=system sslmode=require\n", 0o600);
    assert_eq!(
        desk.error(),
        "config.yaml:3: database.url: sslmode: expected verify-full, as sslrootcert=system demands, found a weaker one"
    );
}

#[test]
fn wrong_variables_are_named() {
    for (name, value, message) in [
        ("PGPORT", "many", "port: expected a number from 1 to 65535"),
        ("PGSSLMODE", "on", "sslmode: expected disable, allow, prefer, require, verify-ca, verify-full"),
        ("PGREQUIREPEER", "postgres", "requirepeer is not supported; leave it out"),
        ("PGSSLCRL", "x", "sslcrl is not supported; leave it out"),
    ] {
        let error = Desk::new(&[("PGHOST", "db"), (name, value)]).error();
        assert!(error.starts_with(&format!("environment {name}: {message}")), "{error}");
    }
}

#[test]
fn the_last_of_two_equal_parameters_counts() {
    assert_eq!(url("postgresql://one/x?host=two").hosts, [tcp("two", 5432)]);
}

#[test]
fn times_that_libpq_takes_for_unlimited_are_the_configured_ones() {
    for time in ["0", "-1"] {
        let target = resolve(&[("PGHOST", "db"), ("PGCONNECT_TIMEOUT", time)]);
        assert_eq!(target.connect_timeout, Duration::from_millis(1000));
    }
    assert_eq!(url("host=db connect_timeout=999999").connect_timeout, CONNECT_TIMEOUT_MAX);
    let slow = resolve(&[("PGHOST", "db"), ("HEADSPACE_DATABASE__CONNECT_TIMEOUT_MS", "2500")]);
    assert_eq!(slow.connect_timeout, Duration::from_millis(2500));
}

// TLS.

#[test]
fn every_sslmode_is_honoured() {
    for (name, mode) in [
        ("disable", SslMode::Disable),
        ("allow", SslMode::Prefer),
        ("prefer", SslMode::Prefer),
        ("require", SslMode::Require),
        ("verify-ca", SslMode::VerifyCa),
        ("verify-full", SslMode::VerifyFull),
    ] {
        assert_eq!(url(&format!("postgresql://db?sslmode={name}")).ssl.mode, mode);
        assert_eq!(resolve(&[("PGHOST", "db"), ("PGSSLMODE", name)]).ssl.mode, mode);
    }
    assert_eq!(url("postgresql://db?ssl=true").ssl.mode, SslMode::Require);
}

#[test]
fn require_with_a_root_certificate_verifies_it() {
    let desk = Desk::new(&[("DATABASE_URL", "postgresql://db?sslmode=require&sslrootcert=ca.pem")]);
    let ssl = desk.resolve().ssl;
    assert_eq!((ssl.mode, ssl.root_cert), (SslMode::VerifyCa, Some(desk.path("ca.pem"))));
    let desk = Desk::new(&[("DATABASE_URL", "postgresql://db?sslmode=require")]);
    desk.write(".postgresql/root.crt", "", 0o644);
    let ssl = desk.resolve().ssl;
    assert_eq!((ssl.mode, ssl.root_cert), (SslMode::VerifyCa, Some(desk.path(".postgresql/root.crt"))));
}

#[test]
fn system_roots_demand_full_verification() {
    let desk = Desk::new(&[("DATABASE_URL", "postgresql://db?sslrootcert=system")]);
    desk.write(".postgresql/root.crt", "", 0o644);
    let ssl = desk.resolve().ssl;
    assert_eq!((ssl.mode, ssl.root_cert), (SslMode::VerifyFull, None));
    assert_eq!(
        refused("postgresql://db?sslrootcert=system&sslmode=verify-ca"),
        "sslmode: expected verify-full, as sslrootcert=system demands, found a weaker one"
    );
}

#[test]
fn direct_tls_demands_tls() {
    let direct = url("host=db sslnegotiation=direct sslmode=require");
    assert_eq!(direct.client.get_ssl_negotiation(), SslNegotiation::Direct);
    assert_eq!(
        refused("host=db sslnegotiation=direct"),
        "sslmode: expected at least require, as sslnegotiation=direct demands, found a weaker one"
    );
}

#[test]
fn client_certificates_come_from_the_string_the_variables_or_the_home() {
    let desk = Desk::new(&[("DATABASE_URL", "host=db sslcert=~/c.pem sslkey=/k.pem")]);
    let given = ClientCertificate { cert: desk.path("c.pem"), key: "/k.pem".into() };
    assert_eq!(desk.resolve().ssl.client, Some(given));

    let desk = Desk::new(&[("PGHOST", "db"), ("PGSSLCERT", "/c.pem")]);
    let own_key = desk.path(".postgresql/postgresql.key");
    assert_eq!(desk.resolve().ssl.client, Some(ClientCertificate { cert: "/c.pem".into(), key: own_key.clone() }));

    let desk = Desk::new(&[("PGHOST", "db")]);
    desk.write(".postgresql/postgresql.crt", "", 0o644);
    assert_eq!(desk.resolve().ssl.client, None);
    desk.write(".postgresql/postgresql.key", "", 0o600);
    let own = ClientCertificate {
        cert: desk.path(".postgresql/postgresql.crt"),
        key: desk.path(".postgresql/postgresql.key"),
    };
    assert_eq!(desk.resolve().ssl.client, Some(own));
}

#[test]
fn paths_in_the_file_are_relative_to_the_file() {
    let desk = Desk::new(&[]);
    desk.write("etc/config.yaml", "database: {url: 'host=db sslmode=verify-ca sslrootcert=ca.pem'}\n", 0o600);
    let environment = desk.environment();
    let config = Config::load(Some(Path::new("etc/config.yaml")), &environment).unwrap().config;
    let target = config.database.resolve(&environment).unwrap().unwrap();
    assert_eq!(target.ssl.root_cert, Some(desk.path("etc/ca.pem")));
}

// Passwords.

#[test]
fn the_string_goes_before_pgpassword_before_the_password_file() {
    let desk = Desk::new(&[("PGHOST", "db")]);
    desk.write(".pgpass", "*:*:*:*:from-file\n", 0o600);
    assert_eq!(password(&desk.resolve()), Some("from-file"));
    let desk = Desk { variables: vec![("PGHOST".into(), "db".into()), ("PGPASSWORD".into(), "set".into())], ..desk };
    assert_eq!(password(&desk.resolve()), Some("set"));
    let desk = Desk { variables: vec![("DATABASE_URL".into(), "postgresql://a:b@db".into())], ..desk };
    assert_eq!(password(&desk.resolve()), Some("b"));
}

#[test]
fn the_password_file_is_read_again_each_time() {
    let desk = Desk::new(&[("PGHOST", "db")]);
    let environment = desk.environment();
    let config = Config::load(None, &environment).unwrap().config;
    let resolved = || config.database.resolve(&environment).unwrap().unwrap();
    let now = || password(&resolved()).map(str::to_owned);
    assert_eq!(now(), None);
    desk.write(".pgpass", "db:5432:ada:ada:wrong\n", 0o600);
    assert_eq!(now().as_deref(), Some("wrong"));
    desk.write(".pgpass", "db:5432:ada:ada:right\n", 0o600);
    assert_eq!(now().as_deref(), Some("right"));
}

#[test]
fn a_password_file_that_others_may_read_is_ignored_with_a_warning() {
    for mode in [0o640, 0o604, 0o620, 0o610] {
        let desk = Desk::new(&[("PGHOST", "db")]);
        desk.write(".pgpass", "*:*:*:*:secret\n", mode);
        let target = desk.resolve();
        assert_eq!(password(&target), None);
        let path = desk.path(".pgpass");
        let expected = format!("password file {} is ignored: group or others may use it; chmod 600 it", path.display());
        assert_eq!(target.warnings, [expected]);
    }
}

#[test]
fn a_named_password_file_serves_instead_and_is_missed_aloud() {
    let desk = Desk::new(&[("PGHOST", "db"), ("PGPASSFILE", "other")]);
    desk.write(".pgpass", "*:*:*:*:wrong\n", 0o600);
    let target = desk.resolve();
    assert_eq!(password(&target), None);
    assert!(target.warnings[0].contains("No such file"), "{:?}", target.warnings);
    desk.write("other", "*:*:*:*:right\n", 0o400);
    assert_eq!(password(&desk.resolve()), Some("right"));
    std::fs::remove_file(desk.path("other")).unwrap();
    std::fs::create_dir(desk.path("other")).unwrap();
    assert!(desk.resolve().warnings[0].ends_with("it is a folder"));
}

#[test]
fn lines_of_the_password_file_are_read_as_libpq_does() {
    let found = |file: &str, host: &DatabaseHost| password_for(file.as_bytes(), host, "head", "ada");
    let db = tcp("db", 5432);
    for (file, password) in [
        ("db:5432:head:ada:p", Some("p")),
        ("db:5432:head:ada:p\r\n", Some("p")),
        ("*:*:*:*:p", Some("p")),
        (
            "# db:5432:head:ada:no\n\nbroken\ndb:5433:head:ada:no\ndb:*:head:bob:no\ndb:*:x:ada:no\ndb:*:head:ada:p\n",
            Some("p"),
        ),
        ("db:5432:head:ada:first\ndb:5432:head:ada:second", Some("first")),
        (r"db:5432:head:ada:a\:b\\c:d", Some(r"a:b\c:d")),
        (r"d\b:5432:head:ada:p", Some("p")),
        (r"\*:5432:head:ada:p", None),
        ("db:5432:head:ada:", None),
        ("db:5432:head:ada", None),
        ("d*:5432:head:ada:p", None),
        ("", None),
    ] {
        assert_eq!(found(file, &db).as_deref(), password, "{file:?}");
    }
    assert_eq!(password_for(b"\xff\xfe\n*:*:*:*:p", &db, "head", "ada").as_deref(), Some("p"));
    let odd = password_for(br"db:5432:a\:b:c\\d:p", &db, "a:b", r"c\d");
    assert_eq!(odd.as_deref(), Some("p"));
    let socket = DatabaseHost::Unix { folder: "/srv/pg".into(), port: 5432 };
    assert_eq!(found("localhost:5432:head:ada:p", &socket).as_deref(), Some("p"));
    assert_eq!(found("/srv/pg:5432:head:ada:p", &socket).as_deref(), Some("p"));
    assert_eq!(found("db:5432:head:ada:p", &socket), None);
}

#[test]
fn one_password_serves_all_hosts_that_the_file_knows() {
    let desk = Desk::new(&[("DATABASE_URL", "postgresql://one,two/x")]);
    desk.write(".pgpass", "two:*:*:*:second\n", 0o600);
    assert_eq!(password(&desk.resolve()), Some("second"));
}

#[test]
fn nothing_that_is_logged_shows_the_password() {
    let target = resolve(&[("DATABASE_URL", "postgresql://ada:hunter2@db/x?application_name=y")]);
    assert_eq!(password(&target), Some("hunter2"));
    let shown = format!("{target:?} {}", target.described);
    assert!(!shown.contains("hunter2"), "{shown}");
}
