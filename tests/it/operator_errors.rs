//! What only a person can mend: health says so with the server's own words and the way out, capture goes on, and when
//! it is mended the events follow without a restart.

use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use crate::stage::{Database, SOON, Server, Stage, Watcher, exchange, lacks, wait_for, wait_until, when_busy};

/// How soon health must tell.
const TOLD_WITHIN: Duration = Duration::from_secs(2);

/// The error that health gives once it says `misconfigured`; two events have been captured meanwhile.
#[track_caller]
fn told(stage: &Stage, watcher: &Watcher) -> String {
    let error = wait_for("health tells", when_busy(TOLD_WITHIN), || {
        let database = &watcher.health()["database"];
        (database["state"] == "misconfigured").then(|| database["last_error"].as_str().unwrap().to_owned())
    });
    let pending = watcher.health()["queue"]["pending"].as_u64().unwrap();
    stage.transcript("-home-me-app", 7).say(&format!("captured though {error}"));
    wait_until("capture goes on", SOON, || watcher.health()["queue"]["pending"].as_u64().unwrap() > pending);
    assert_eq!(watcher.health()["status"], "warn");
    error
}

#[track_caller]
fn assert_says(error: &str, words: &[&str]) {
    for word in words {
        assert!(error.contains(word), "\"{word}\" is not in: {error}");
    }
}

/// The events come without a restart.
#[track_caller]
fn assert_mended(database: &Database, watcher: &Watcher) {
    wait_until("it is up", SOON, || watcher.health()["database"]["state"] == "up");
    wait_until("the queue is empty", SOON, || watcher.health()["queue"]["pending"] == 0);
    assert!(database.count() >= 2, "{}", database.count());
    assert_eq!(watcher.logged("database misconfigured").len(), 1);
}

fn role(database: &Database, options: &str) -> (String, Database) {
    let role = format!("watcher_{}", uuid::Uuid::now_v7().simple());
    database.query(&format!("CREATE ROLE {role} LOGIN {options}"));
    (role.clone(), Database::at(database.url.replace("user=headspace", &format!("user={role}"))))
}

fn stage(database: &Database, url: &str) -> Stage {
    let mut stage = Stage::with(Some(database.clone()));
    stage.environment.insert("DATABASE_URL".to_owned(), url.to_owned());
    stage
}

#[test]
fn commands_that_are_told_of_no_database_use_the_watchers_and_learn_no_password() {
    let database = Database::new();
    let mut stage = stage(&database, &format!("{}&password=open-sesame", database.url));
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    stage.set("http.listen", &address.to_string());
    stage.transcript("-home-me-app", 1).say("hello");
    let watcher = stage.start();
    stage.wait_for_rows(2);
    let told = watcher.ask("GET", "/database", &[], "");
    assert_eq!(told.code, 200, "{told:?}");
    assert!(told.body.contains("dbname='test_") && !told.body.contains("sesame"), "{told:?}");
    let bearer = format!("Authorization: Bearer {}", stage.token());
    let stranger = wait_for("it listens", SOON, || TcpStream::connect(address).ok());
    let refused = exchange(stranger, "GET", "/database", &[&format!("Host: {address}"), &bearer], None).unwrap();
    assert_eq!(refused.code, 404, "it is told on the socket alone");

    stage.database = None;
    stage.environment.remove("DATABASE_URL");
    for (command, words) in [("verify", "in Postgres"), ("migrate", "nothing to do"), ("check", "the tables are there")]
    {
        let ran = stage.run(&[command]);
        assert_eq!(ran.code(), 0, "{command}: {}{}", ran.output(), ran.error());
        assert!(ran.output().contains(words), "{command}: {}", ran.output());
    }
    watcher.stop();
    // One cause, one sentence, one exit code.
    for arguments in [&["verify"][..], &["migrate"], &["check"], &["run", "--until-idle"]] {
        let ran = stage.run(arguments);
        assert_eq!(ran.code(), 78, "{arguments:?}: {}{}", ran.output(), ran.error());
        let said = ran.output() + &ran.error();
        let sentence = "no database is configured; set database.url, DATABASE_URL or PGHOST, or run \
                        scripts/run-watcher.sh, which starts a private PostgreSQL\n";
        assert!(said.contains(sentence), "{arguments:?}: {said}");
    }
}

#[test]
fn an_unknown_database() {
    let database = Database::new();
    let name = format!("later_{}", uuid::Uuid::now_v7().simple());
    let url = database.url.replace(&database.value("SELECT current_database()"), &name);
    let stage = stage(&Database::at(url.clone()), &url);
    let watcher = stage.start();
    assert_says(&told(&stage, &watcher), &[&name, "does not exist", "create the database", "3D000"]);
    database.query(&format!("CREATE DATABASE {name}"));
    assert_mended(&Database::at(url), &watcher);
}

#[test]
fn missing_tables_that_are_not_to_be_made() {
    let database = Database::new();
    let mut stage = stage(&database, &database.url);
    stage.set("database.auto_migrate", "false");
    let watcher = stage.start();
    assert_says(&told(&stage, &watcher), &["missing in the database", "events", "headspace-watcher migrate"]);
    assert_eq!(stage.run(&["migrate"]).code(), 0);
    assert_mended(&database, &watcher);
}

#[test]
fn no_privilege_on_the_table() {
    let database = Database::new();
    assert_eq!(stage(&database, &database.url).run(&["migrate"]).code(), 0);
    let (role, plain) = role(&database, "");
    let stage = stage(&database, &plain.url);
    let watcher = stage.start();
    stage.transcript("-home-me-app", 1).say("hello");
    assert_says(&told(&stage, &watcher), &["permission denied", "42501", "migrate --print"]);
    database.query(&format!(
        "GRANT USAGE ON SCHEMA headspace_watcher TO {role}; GRANT INSERT ON events TO {role};
         GRANT SELECT, INSERT, UPDATE ON event_receipts, event_sources TO {role};
         GRANT USAGE ON events_id_seq, event_sources_id_seq TO {role}"
    ));
    assert_mended(&database, &watcher);
}

#[test]
fn no_privilege_to_make_the_tables() {
    let database = Database::new();
    let (_, plain) = role(&database, "");
    let stage = stage(&database, &plain.url);
    let watcher = stage.start();
    assert_says(&told(&stage, &watcher), &["permission denied for schema public", "42501"]);
    // What an administrator is told to run, and nothing else.
    let sql = stage.run(&["migrate", "--print"]);
    database.query(&sql.output());
    assert_mended(&database, &watcher);
}

#[test]
fn a_sequence_behind_its_table_sets_no_event_aside() {
    let database = Database::new();
    let stage = stage(&database, &database.url);
    stage.transcript("-home-me-app", 1).say_many("line", 30);
    stage.run_until_idle();
    // As after a restore that forgot the sequences.
    database.query("SELECT setval('events_id_seq', 1, false)");
    let watcher = stage.start();
    stage.transcript("-home-me-app", 2).say("next");
    assert_says(&told(&stage, &watcher), &["events_pkey", "23505", "setval()"]);
    database.query("SELECT setval('events_id_seq', 100)");
    assert_mended(&database, &watcher);
    assert_eq!(watcher.health()["queue"]["dead_letters"], 0);
}

#[test]
fn a_constraint_on_the_ledger_sets_no_event_aside() {
    let database = Database::new();
    let stage = stage(&database, &database.url);
    stage.transcript("-home-me-app", 1).say("line");
    stage.run_until_idle();
    database.query(
        "ALTER TABLE event_receipts ADD CONSTRAINT odd CHECK (row_id < 0) NOT VALID;
         ALTER TABLE event_sources ADD CONSTRAINT strange CHECK (id < 0) NOT VALID",
    );
    let watcher = stage.start();
    stage.transcript("-home-me-app", 2).say("next");
    assert_says(&told(&stage, &watcher), &["strange", "23514"]);
    database.query("ALTER TABLE event_sources DROP CONSTRAINT strange; ALTER TABLE event_receipts DROP CONSTRAINT odd");
    assert_mended(&database, &watcher);
    assert_eq!(watcher.health()["queue"]["dead_letters"], 0);
}

/// A server that listens on an address of its own, with TLS and passwords.
struct Guarded {
    server: Server,
    folder: tempfile::TempDir,
    address: String,
}

impl Guarded {
    fn start() -> Option<Guarded> {
        let folder = tempfile::tempdir().unwrap();
        if lacks("openssl", Command::new("openssl").arg("version").output().is_ok_and(|output| output.status.success()))
        {
            return None;
        }
        // All of 127.0.0.0/8 is this machine, on Linux; the port is the same for all.
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let pid = std::process::id();
        let last = NEXT.fetch_add(1, Ordering::Relaxed);
        let address = format!("127.{}.{}.{last}", 1 + pid / 250 % 250, 1 + pid % 250);
        let guarded = Guarded { server: Server::start(), folder, address };
        guarded.make_certificates();
        guarded.server.database.query(&format!("ALTER SYSTEM SET listen_addresses = '{}'", guarded.address));
        guarded.hba("hostssl all all 127.0.0.0/8 scram-sha-256");
        for (file, setting) in
            [("server.crt", "ssl_cert_file"), ("server.key", "ssl_key_file"), ("ca.crt", "ssl_ca_file")]
        {
            guarded.install(file);
            guarded.server.database.query(&format!("ALTER SYSTEM SET {setting} = '{file}'"));
        }
        guarded.server.database.query("ALTER SYSTEM SET ssl = on");
        guarded.server.stop("fast");
        guarded.server.start_again();
        Some(guarded)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Who may come in over TCP.
    fn hba(&self, line: &str) {
        std::fs::write(self.server.data().join("pg_hba.conf"), format!("local all all trust\n{line}\n")).unwrap();
        self.server.database.query("SELECT pg_reload_conf()");
    }

    /// Copies a file into the server's folder, for its owner only.
    fn install(&self, name: &str) {
        let to = self.server.data().join(name);
        std::fs::copy(self.file(name), &to).unwrap();
        let owner = std::fs::metadata(self.server.data()).unwrap();
        let (user, group) = (std::os::unix::fs::MetadataExt::uid(&owner), std::os::unix::fs::MetadataExt::gid(&owner));
        std::os::unix::fs::chown(&to, Some(user), Some(group)).unwrap();
        std::fs::set_permissions(&to, PermissionsExt::from_mode(0o600)).unwrap();
    }

    fn make_certificates(&self) {
        for authority in ["ca", "other-ca"] {
            self.openssl(&format!(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {authority}.key \
                 -out {authority}.crt -days 2 -subj /CN={authority}"
            ));
        }
        let extensions = format!("subjectAltName=IP:{}\n", self.address);
        std::fs::write(self.file("server.ext"), extensions).unwrap();
        std::fs::write(self.file("client.ext"), "extendedKeyUsage=clientAuth\n").unwrap();
        for (name, subject) in [("server", "somewhere"), ("client", "certified")] {
            self.openssl(&format!(
                "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {name}.key -out {name}.csr \
                 -subj /CN={subject}"
            ));
            self.openssl(&format!(
                "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out {name}.crt -days 2 \
                 -extfile {name}.ext"
            ));
            std::fs::set_permissions(self.file(&format!("{name}.key")), PermissionsExt::from_mode(0o600)).unwrap();
        }
    }

    fn openssl(&self, arguments: &str) {
        let mut command = Command::new("openssl");
        let output = command.args(arguments.split_whitespace()).current_dir(self.folder.path()).output().unwrap();
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// A database and how to reach it over TCP.
    fn database(&self, user: &str, parameters: &str) -> (Database, String) {
        let database = self.server.database.another();
        let name = database.value("SELECT current_database()");
        database.query(&format!("GRANT ALL ON SCHEMA public TO {user}; GRANT CREATE ON DATABASE {name} TO {user}"));
        (database, format!("postgresql://{user}@{}/{name}?{parameters}", self.address))
    }
}

fn write_private(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).unwrap();
}

#[test]
fn a_wrong_password_a_strange_certificate_and_a_refused_tls() {
    let Some(guarded) = Guarded::start() else { return };
    guarded.server.database.query("CREATE ROLE secret LOGIN PASSWORD 'right'; CREATE ROLE certified LOGIN");

    // SCRAM with a password file: wrong, then mended.
    let (database, url) = guarded.database("secret", "sslmode=require");
    let scram = stage(&database, &url);
    let password_file = scram.folder().join("home/.pgpass");
    write_private(&password_file, "*:*:*:secret:wrong\n");
    let watcher = scram.start();
    let error = told(&scram, &watcher);
    assert_says(&error, &["password authentication failed", "28P01", "~/.pgpass", &guarded.address]);
    assert!(!error.contains("wrong"), "{error}");
    write_private(&password_file, "*:*:*:secret:right\n");
    assert_mended(&database, &watcher);

    // No password at all, then one, in a file that others may read, then not.
    let (database, url) = guarded.database("secret", "sslmode=require");
    let missing = stage(&database, &url);
    let watcher = missing.start();
    assert_says(&told(&missing, &watcher), &["password missing", "~/.pgpass"]);
    let password_file = missing.folder().join("home/.pgpass");
    std::fs::write(&password_file, "*:*:*:secret:right\n").unwrap();
    std::fs::set_permissions(&password_file, PermissionsExt::from_mode(0o644)).unwrap();
    wait_until("the file is passed over", SOON, || {
        watcher.health()["database"]["last_error"].as_str().is_some_and(|error| error.contains("chmod 600"))
    });
    write_private(&password_file, "*:*:*:secret:right\n");
    assert_mended(&database, &watcher);

    // A certificate that is not trusted, then it is: for this very name.
    let root = guarded.file("root.crt");
    std::fs::copy(guarded.file("other-ca.crt"), &root).unwrap();
    let (database, url) =
        guarded.database("secret", &format!("sslmode=verify-full&password=right&sslrootcert={}", root.display()));
    let strange = stage(&database, &url);
    let watcher = strange.start();
    assert_says(&told(&strange, &watcher), &["certificate", "UnknownIssuer", "set sslrootcert"]);
    std::fs::copy(guarded.file("ca.crt"), &root).unwrap();
    assert_mended(&database, &watcher);

    // A name that is not the certificate's: verify-full says no, verify-ca does not ask.
    let other_name = url.replace(&guarded.address, "localhost") + &format!("&hostaddr={}", guarded.address);
    let misnamed = stage(&database, &other_name);
    let watcher = misnamed.start();
    assert_says(&told(&misnamed, &watcher), &["certificate", "set sslrootcert"]);
    drop(watcher);
    let unnamed = stage(&database, &other_name.replace("verify-full", "verify-ca"));
    unnamed.run_until_idle();

    // A client certificate instead of a password.
    guarded.hba("hostssl all certified 127.0.0.0/8 cert\nhostssl all all 127.0.0.0/8 scram-sha-256");
    let (database, url) = guarded.database("certified", "sslmode=require");
    let bare = stage(&database, &url);
    let watcher = bare.start();
    assert_says(&told(&bare, &watcher), &["certificate"]);
    drop(watcher);
    let certified = stage(
        &database,
        &format!(
            "{url}&sslcert={}&sslkey={}",
            guarded.file("client.crt").display(),
            guarded.file("client.key").display()
        ),
    );
    certified.transcript("-home-me-app", 1).say("hello");
    certified.run_until_idle();
    assert_eq!(database.texts(), ["hello"]);

    // TLS demanded of a server that has none.
    guarded.server.database.query("ALTER SYSTEM SET ssl = off");
    guarded.hba("host all all 127.0.0.0/8 scram-sha-256");
    let (database, url) = guarded.database("secret", "sslmode=require&password=right");
    let refused = stage(&database, &url);
    let watcher = refused.start();
    assert_says(&told(&refused, &watcher), &["server does not support TLS", "turn on ssl", "sslmode=prefer"]);
    guarded.server.database.query("ALTER SYSTEM SET ssl = on");
    guarded.hba("hostssl all all 127.0.0.0/8 scram-sha-256");
    assert_mended(&database, &watcher);
    let tls = "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = 'secret'";
    assert_eq!(database.value(tls), "t");

    // No entry for the user.
    guarded.hba("hostssl all nobody 127.0.0.0/8 scram-sha-256");
    let (database, url) = guarded.database("secret", "sslmode=require&password=right");
    let unlisted = stage(&database, &url);
    let watcher = unlisted.start();
    assert_says(&told(&unlisted, &watcher), &["no pg_hba.conf entry", "28000", "let the user in"]);
    guarded.hba("hostssl all all 127.0.0.0/8 scram-sha-256");
    assert_mended(&database, &watcher);
}
