//! macOS, as far as Linux can show it: the scripts with BSD's programs and options only, without /proc, with PostgreSQL
//! where Homebrew has it, and in the words of bash 3.2.
//!
//! `Mac` is a folder that is the whole PATH. Each program in it is a guard in front of Linux's own: it refuses what BSD's
//! does not take, and notes it. `OSTYPE=darwin` makes the scripts ask ps instead of /proc, `BASH_COMPAT` makes bash keep to
//! 3.2 where it can.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use tempfile::TempDir;

use crate::stage::{SOON, Stage, lacks, project, wait_until};
use crate::supervisor::Real;

/// Programs of macOS with the options that theirs and Linux's have in common, as getopts takes them. No options: see the
/// guard. Those that are not here are not to be used without asking whether they are there.
const PROGRAMS: [(&str, &str); 40] = [
    ("awk", "F:v:f:"),
    ("basename", "as:"),
    ("cat", "bensu"),
    ("chmod", "fhRv"),
    ("chown", "fhRv"),
    ("cksum", ""),
    ("cmp", "ls"),
    ("cp", "HLPRafinpv"),
    ("cut", "b:c:d:f:ns"),
    ("date", "Ru"),
    ("dd", ""),
    ("dirname", ""),
    ("env", "iu:"),
    ("expr", ""),
    ("find", ""),
    ("grep", "abcEFHhIiLlnoqRrsvwxZzA:B:C:e:f:m:"),
    ("head", "c:n:"),
    ("iconv", "clf:t:"),
    ("id", "Gnru"),
    ("kill", "l:s:"),
    ("ln", "Pfinsv"),
    ("ls", "ABCFGHLRSUacdfghiklmnopqrstux1"),
    ("mkdir", "pm:"),
    ("mkfifo", "m:"),
    ("mktemp", "dqu"),
    ("mv", "finv"),
    ("od", "A:aBbcdHhiIj:lN:osvxt:"),
    ("ps", "AaCcefjlMmrvwxO:o:G:g:u:p:t:U:"),
    ("readlink", "n"),
    ("rm", "dfiPRrv"),
    ("rmdir", "pv"),
    ("sed", "Enrue:f:"),
    ("sleep", ""),
    ("sort", "bCcdfghik:Mmno:RrsS:t:T:uz"),
    ("stat", ""),
    ("tail", "Frqb:c:n:"),
    ("touch", "acfhmr:t:"),
    ("tr", "Ccdsu"),
    ("wc", "clmw"),
    ("xargs", "0optE:I:L:n:P:s:x"),
];

/// Those without options that matter.
const PLAIN_PROGRAMS: [&str; 8] = ["bash", "echo", "false", "printf", "pwd", "sh", "test", "true"];

const GUARD: &str = r#"#!/bin/sh
# NAME as macOS has it.
call="NAME $*"
refuse() {
  printf '%s: %s\n' "$1" "$call" >>'REFUSED'
  printf 'NAME: %s\n' "$1" >&2
  exit 64
}
case NAME in
  dd)
    for word; do
      case $word in
        if=* | of=* | conv=notrunc | conv=sync) ;;
        *=*[!0-9kmg]*) refuse "$word" ;;
        bs=* | ibs=* | obs=* | count=* | skip=* | seek=*) ;;
        *) refuse "$word" ;;
      esac
    done
    exec 'REAL' "$@"
    ;;
  expr) exec 'REAL' "$@" ;;
  find)
    case ${1-} in '' | -*) refuse 'no folder' ;; esac
    for word; do
      case $word in
        -printf | -fprintf | -executable | -readable | -writable | -regextype | -daystart | --*) refuse "$word" ;;
      esac
    done
    exec 'REAL' "$@"
    ;;
  sleep) case $*. in .* | *[!0-9.]*) refuse 'no number of seconds' ;; esac ;;
  stat) refuse 'no call is the same in both' ;;
esac

while getopts ':OPTIONS' option; do
  case $option in '?' | ':') refuse "-$OPTARG" ;; esac
  case NAME$option$OPTARG in
    head[cn]*[!0-9]* | tail[cn]*[!0-9+-]*) refuse "-$option $OPTARG" ;;
    psO* | pso*)
      IFS=,
      for keyword in $OPTARG; do
        case ${keyword%%=*} in
          args | comm | command | etime | lstart | nice | pgid | pid | ppid | rss | start | stat | state | time | tty | uid | user | vsz) ;;
          *) refuse "-o $keyword" ;;
        esac
      done
      unset IFS
      ;;
  esac
done

# BSD's getopt ends at the first operand. What follows in env is another program's command line.
number=0 ended=''
for word; do
  number=$((number + 1))
  case NAME$ended$word in
    env* | *--ended*) continue ;;
    NAME--) [ "$number" -ge "$OPTIND" ] || ended=--ended ;;
  esac
  case NAME$word in
    sed*'\+'* | sed*'\|'* | sed*'\?'* | sed*'\s'* | sed*'\w'* | sed*'\t'* | sed*'\n'* | grep*'\+'* | grep*'\|'* | grep*'\?'* | grep*'\s'* | grep*'\w'* | grep*'\b'*)
      refuse "a regular expression of GNU's"
      ;;
    awk*gensub* | awk*strftime* | awk*systime* | awk*asort* | awk*PROCINFO* | awk*IGNORECASE* | awk*'\<'*) refuse "gawk's words" ;;
    date+*%N* | date+*%-* | date+*%:* | date+*%P*) refuse "GNU's words" ;;
  esac
  [ "$number" -ge "$OPTIND" ] || continue
  case NAME$word in
    tr-?* | kill-?*) ;;
    mktemp*[!X]) refuse 'a template with a suffix' ;;
    NAME-?*) refuse 'an option after an operand' ;;
  esac
done

if [ NAME = wc ] && [ "$OPTIND" -gt $# ]; then
  number=$('REAL' "$@") && printf '%8s\n' "$number"
  exit
fi
exec 'REAL' "$@"
"#;

/// The programs of macOS, and nothing else.
pub struct Mac {
    programs: PathBuf,
    refused: PathBuf,
    homebrew: PathBuf,
}

impl Mac {
    /// Made in `parent`, where it stays.
    pub fn new(parent: &Path) -> Mac {
        let mac = Mac {
            programs: parent.join("programs of macos"),
            refused: parent.join("refused"),
            homebrew: parent.join("homebrew"),
        };
        if fs::create_dir(&mac.programs).is_err() {
            return mac;
        }
        fs::write(&mac.refused, "").unwrap();
        // The scripts may run as another user.
        fs::set_permissions(&mac.refused, fs::Permissions::from_mode(0o666)).unwrap();
        for (name, options) in PROGRAMS {
            // The awk of macOS is the one by its authors.
            let Some(real) = (name == "awk").then(|| find("original-awk")).flatten().or_else(|| find(name)) else {
                continue;
            };
            let guard = GUARD
                .replace("NAME", name)
                .replace("OPTIONS", options)
                .replace("REAL", real.to_str().unwrap())
                .replace("REFUSED", mac.refused.to_str().unwrap());
            executable(&mac.programs.join(name), &guard);
        }
        for name in PLAIN_PROGRAMS {
            let real = find(if name == "sh" { "bash" } else { name });
            let Some(real) = real else { continue };
            std::os::unix::fs::symlink(real, mac.programs.join(name)).unwrap();
        }
        executable(&mac.programs.join("uname"), "#!/bin/sh\necho Darwin\n");
        // It is on every Mac.
        if let Some(runuser) = find("runuser") {
            let sudo = "#!/bin/sh\n[ \"$1 $2 $4\" = '-n -u --' ] || { echo \"sudo $*\" >>'REFUSED'; exit 1; }\n\
                        user=$3\nshift 4\nexec 'REAL' -u \"$user\" -- \"$@\"\n";
            let sudo = sudo.replace("REFUSED", mac.refused.to_str().unwrap());
            executable(&mac.programs.join("sudo"), &sudo.replace("REAL", runuser.to_str().unwrap()));
        }
        mac
    }

    /// Lets the command see macOS.
    pub fn put<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let not_found = format!(
            "() {{ printf '%s: not among the programs of macOS\\n' \"$*\" >>'{}'; printf '%s: not found\\n' \"$1\" >&2; return 127; }}",
            self.refused.display()
        );
        command
            .env("PATH", &self.programs)
            .env("OSTYPE", "darwin23")
            .env("BASH_COMPAT", "3.2")
            .env("BASH_FUNC_command_not_found_handle%%", not_found)
            .env("HOMEBREW_PREFIX", &self.homebrew)
    }

    /// PostgreSQL's own programs, where Homebrew keeps those of this version.
    fn pour(&self, version: &str) -> PathBuf {
        let keg = self.homebrew.join("opt").join(format!("postgresql@{version}"));
        fs::create_dir_all(&keg).unwrap();
        let bin = std::env::var("HEADSPACE_TEST_PG_BIN").expect("HEADSPACE_TEST_PG_BIN");
        // The folder may hold links to some of them only.
        let server = fs::canonicalize(Path::new(&bin).join("postgres")).expect("PostgreSQL's programs");
        std::os::unix::fs::symlink(server.parent().unwrap(), keg.join("bin")).unwrap();
        // Some packages have the server alone; psql is another one then, as Homebrew's libpq.
        if !keg.join("bin/psql").exists()
            && let Some(psql) = find("psql")
        {
            let path = std::env::var("PATH").expect("PATH is text");
            let psql = format!("#!/bin/sh\nPATH='{path}' exec '{}' \"$@\"\n", psql.display());
            executable(&self.programs.join("psql"), &psql);
        }
        keg.join("bin")
    }

    #[track_caller]
    fn assert_nothing_was_refused(&self) {
        assert_eq!(fs::read_to_string(&self.refused).unwrap(), "");
    }
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").expect("PATH is set");
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|path| path.is_file())
}

fn executable(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Whom to run the scripts as, where the tests run as root: on a Mac nobody does.
fn user() -> Option<(u32, u32)> {
    let name = std::env::var("HEADSPACE_TEST_PG_USER").ok()?;
    let id = |option: &str| {
        let output = Command::new("id").args([option, &name]).output().expect("run id");
        String::from_utf8(output.stdout).unwrap().trim().parse().expect("an id")
    };
    Some((id("-u"), id("-g")))
}

fn as_user(command: &mut Command) -> &mut Command {
    if let Some((uid, gid)) = user() {
        command.uid(uid).gid(gid);
    }
    command
}

fn give(path: &Path) {
    if let Some((uid, gid)) = user() {
        for entry in walkdir::WalkDir::new(path) {
            std::os::unix::fs::lchown(entry.unwrap().path(), Some(uid), Some(gid)).unwrap();
        }
    }
}

/// A folder with the scripts and a Mac, both for the user.
struct Place {
    folder: TempDir,
    mac: Mac,
}

impl Place {
    fn new() -> Place {
        let folder = tempfile::Builder::new().prefix("hw-mac").tempdir().expect("a temporary folder");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(folder.path().join("scripts")).unwrap();
        for name in ["dev-postgres.sh", "lock.sh"] {
            fs::copy(project().join("scripts").join(name), folder.path().join("scripts").join(name)).unwrap();
        }
        let mac = Mac::new(folder.path());
        give(folder.path());
        Place { folder, mac }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `scripts/dev-postgres.sh` in this environment.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.path("scripts/dev-postgres.sh"));
        command.env_clear().args(arguments).stdin(Stdio::null()).current_dir("/");
        self.mac.put(as_user(&mut command));
        command.env("HOME", self.folder.path()).env("TMPDIR", self.folder.path());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("run dev-postgres.sh")
    }

    /// What it prints, when it ends with this code.
    #[track_caller]
    fn answer(&self, arguments: &[&str], code: i32) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.folder.path()).into_iter().flatten().filter_map(Result::ok) {
            if entry.path().join("cluster").exists() && !entry.path().is_symlink() {
                let script = project().join("scripts/dev-postgres.sh");
                let _ = Command::new(script).args(["stop", "--mode", "immediate"]).arg(entry.path()).output();
            }
        }
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_supervisor_runs_from_start_to_end_with_what_macos_has() {
    let real = Real::new();
    let project = &real.project;
    let mac = Mac::new(&project.path(""));
    mac.pour("99");
    // Where the user may read it.
    let program = project.path("headspace-watcher");
    let built = env!("CARGO_BIN_EXE_headspace-watcher");
    fs::hard_link(built, &program).or_else(|_| fs::copy(built, &program).map(drop)).unwrap();
    let mut transcript = Stage::with(None).transcript("-home-me-app", 1);
    transcript.path = project.path("projects/-home-me-app").join(transcript.path.file_name().unwrap());
    transcript.say("one");
    for name in ["", "scripts", "config.yaml", "projects"] {
        if let Some((uid, gid)) = user() {
            std::os::unix::fs::chown(project.path(name), Some(uid), Some(gid)).unwrap();
        }
    }
    let command = || {
        let mut command = project.command();
        mac.put(as_user(&mut command)).env_remove("DATABASE_URL").env("HEADSPACE_WATCHER_BIN", &program);
        command.env("HOME", project.path("")).env("TMPDIR", "/tmp");
        command
    };
    let postgres = |arguments: &[&str]| {
        let mut command = Command::new(project.path("scripts/dev-postgres.sh"));
        command.env_clear().args(arguments).stdin(Stdio::null());
        mac.put(as_user(&mut command)).env("HOME", project.path("")).output().expect("run dev-postgres.sh")
    };
    let stored = || {
        let query = "SELECT payload->>'text' FROM events WHERE event_type = 'turn_detected' ORDER BY id";
        String::from_utf8(postgres(&["psql", "-AtXc", query]).stdout).unwrap()
    };

    let mut supervisor = project.start_as(&mut command());
    let first = real.watcher(None, Duration::from_secs(60));
    wait_until("the first turn is a row", SOON, || stored() == "one\n");
    let record = project.read("data/run-watcher.lock/holder");
    assert!(record.contains(':'), "by ps, with a date: {record}");
    // A Mac on its travels: the start times of processes are the same ones.
    let refused = project.start_as(command().env("TZ", "Asia/Tokyo")).wait();
    assert_eq!(refused.code(), Some(69), "{}", project.read("log"));
    assert!(project.read("log").contains(&format!("another supervisor (pid {})", supervisor.pid())));

    kill_process(first, Signal::KILL).unwrap();
    let second = real.watcher(Some(first), Duration::from_secs(10));
    transcript.say("two");
    wait_until("the second turn is a row", SOON, || stored() == "one\ntwo\n");

    // The next supervisor ends the watcher of one that was killed.
    supervisor.signal(Signal::KILL);
    supervisor.wait();
    let mut supervisor = project.start_as(&mut command());
    let third = real.watcher(Some(second), SOON);
    // Before that TERM just kills it.
    real.wait_until_it_is_ready(third);
    assert!(project.read("log").contains("still runs; stopping it"), "{}", project.read("log"));
    let url = postgres(&["url"]).stdout;
    assert_eq!(supervisor.stop(), Some(0), "{}", project.read("log"));
    assert_eq!(fs::read_dir(project.path("data/run-watcher.lock")).unwrap().count(), 0);
    assert_eq!(postgres(&["status"]).status.code(), Some(3), "it takes down what it brought up");

    let log = project.path("log file");
    let mut supervisor = project.start_as(command().arg("--log-file").arg(&log));
    real.watcher(Some(third), SOON);
    transcript.say("three");
    wait_until("the database is the same one", SOON, || stored() == "one\ntwo\nthree\n");
    assert_eq!(postgres(&["url"]).stdout, url);
    assert_eq!(supervisor.stop(), Some(0));
    assert!(fs::read_to_string(&log).unwrap().contains("passed on to the watcher"));
    mac.assert_nothing_was_refused();
}

#[test]
fn the_private_postgres_is_made_started_and_stopped_with_what_macos_has() {
    let place = Place::new();
    let bin = place.mac.pour("99");
    assert_eq!(place.answer(&["bin"], 0), bin.to_str().unwrap());
    let server = place.path("server");
    let server = server.to_str().unwrap();
    assert_eq!(
        place.answer(&["status", server], 3),
        format!("no cluster in {server}; \"scripts/dev-postgres.sh start\" makes one")
    );

    // Two at once: both serve, one has made it.
    let other = place.command(&["start", server]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let url = place.answer(&["start", server], 0);
    let other = other.wait_with_output().unwrap();
    assert_eq!(
        (other.status.code(), String::from_utf8_lossy(&other.stdout).trim()),
        (Some(0), &*url),
        "{}",
        said(&other)
    );
    assert_eq!(place.answer(&["url", server], 0), url);
    assert_eq!(place.answer(&["psql", server, "-AtXc", "SELECT 6 * 7"], 0), "42");

    // Under another spelling of its path it is the same one.
    std::os::unix::fs::symlink(server, place.path("link")).unwrap();
    let link = place.path("link");
    let status = place.answer(&["status", link.to_str().unwrap()], 0);
    let pid = fs::read_to_string(place.path("server/cluster/postmaster.pid")).unwrap();
    let pid = pid.lines().next().unwrap();
    assert!(status.starts_with(&format!("running, pid {pid}, ")), "{status}");

    // Killed, it leaves its id behind; so does one whose id another process has now.
    let process = rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
    kill_process(process, Signal::KILL).unwrap();
    wait_until("it is seen to be gone", SOON, || place.run(&["status", server]).status.code() == Some(3));
    place.answer(&["start", server], 0);
    place.answer(&["stop", server], 0);
    let mut stranger = Command::new("sleep").arg("300").spawn().unwrap();
    fs::write(place.path("server/cluster/postmaster.pid"), format!("{}\n", stranger.id())).unwrap();
    give(&place.path("server/cluster/postmaster.pid"));
    assert_eq!(place.answer(&["start", server], 0), url);
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    assert_eq!(place.answer(&["psql", server, "-AtXc", "SELECT 6 * 7"], 0), "42");
    place.answer(&["stop", "--mode", "smart", server], 0);
    assert!(place.answer(&["status", server], 3).starts_with("stopped"));

    let throwaway = place.answer(&["start", "--throwaway"], 0);
    assert!(Path::new(&throwaway).join("cluster").is_dir(), "{throwaway}");
    place.answer(&["status", &throwaway], 0);
    place.answer(&["stop", &throwaway], 0);
    assert!(!Path::new(&throwaway).exists());
    place.mac.assert_nothing_was_refused();
}

/// Root is somebody else for all that is the server's. The comma makes its sockets' folder another one.
#[test]
fn root_runs_the_private_postgres_through_sudo_with_what_macos_has() {
    if lacks("root", user().is_some()) {
        return;
    }
    let place = Place::new();
    place.mac.pour("99");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(place.path("scripts/dev-postgres.sh"));
        place.mac.put(command.env_clear()).args(arguments).arg(place.path("of root, moved")).stdin(Stdio::null());
        let output = command.output().expect("run dev-postgres.sh");
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    run(&["start", "--throwaway"]);
    let sockets = fs::read_to_string(place.path("of root, moved/socket-folder")).unwrap();
    let pid = fs::read_to_string(place.path("of root, moved/cluster/postmaster.pid")).unwrap();
    let pid = rustix::process::Pid::from_raw(pid.lines().next().unwrap().parse().unwrap()).unwrap();
    assert!(run(&["status"]).starts_with(&format!("running, pid {}, ", pid.as_raw_pid())));
    kill_process(pid, Signal::KILL).unwrap();
    run(&["start", "--throwaway"]);
    assert_eq!(fs::read_to_string(place.path("of root, moved/socket-folder")).unwrap(), sockets);
    run(&["stop"]);
    assert!(!place.path("of root, moved").exists() && !Path::new(sockets.trim()).exists());
    place.mac.assert_nothing_was_refused();
}

/// In a mount namespace, where /opt and /usr/local are empty and no other PostgreSQL is.
#[test]
fn the_newest_postgres_of_homebrew_is_found_on_apple_silicon_and_on_intel() {
    let place = Place::new();
    let (namespace, drop_to) = match user() {
        Some((uid, gid)) => ("-m", format!("setpriv --reuid={uid} --regid={gid} --clear-groups")),
        None => {
            // Back to what it was: no root runs Homebrew.
            let user = std::os::unix::fs::MetadataExt::uid(&fs::metadata(place.folder.path()).unwrap());
            ("-rm", format!("unshare --map-user={user}"))
        }
    };
    let script = "set -e
      for folder in /opt /usr/local /usr/lib/postgresql; do
        [ ! -d $folder ] || mount -t tmpfs none $folder
      done
      for keg in $1; do
        mkdir -p $keg/bin
        for program in initdb pg_ctl postgres; do
          printf '#!/bin/sh\\necho \"postgres (PostgreSQL) 1.0\"\\n' >$keg/bin/$program
          chmod 755 $keg/bin/$program
        done
      done
      shift
      exec \"$@\"";
    let mut found = Vec::new();
    let kegs = [
        "/opt/homebrew/opt/postgresql@9.6 /opt/homebrew/opt/postgresql@17 /opt/homebrew/opt/postgresql@14",
        "/usr/local/opt/postgresql@9.6 /usr/local/opt/postgresql@17 /usr/local/opt/postgresql@14",
        "/opt/homebrew/opt/postgresql@16 /usr/local/opt/postgresql@15",
        "/opt/homebrew/opt/postgresql@16 /opt/local/lib/postgresql18",
        "/opt/homebrew",
        "/usr/local",
    ];
    for kegs in kegs {
        let mut command = Command::new("unshare");
        command.args([namespace, "sh", "-c", script, "sh", kegs]).args(drop_to.split(' '));
        // Only the script itself is to see macOS.
        command.args(["env", "-i"]);
        let mut mac = Command::new("none");
        place.mac.put(&mut mac).env_remove("HOMEBREW_PREFIX");
        for (name, value) in mac.get_envs().filter_map(|(name, value)| Some((name.to_str()?, value?.to_str()?))) {
            command.arg(format!("{name}={value}"));
        }
        let output = command.arg(place.path("scripts/dev-postgres.sh")).arg("bin").output();
        let output = match output {
            Ok(output) if !said(&output).starts_with("unshare: ") && !said(&output).starts_with("mount: ") => output,
            _ => {
                lacks("the right to mount", false);
                return;
            }
        };
        assert_eq!(output.status.code(), Some(0), "{kegs}: {}", said(&output));
        found.push(String::from_utf8(output.stdout).unwrap().trim().to_owned());
    }
    let expected = [
        "/opt/homebrew/opt/postgresql@17/bin",
        "/usr/local/opt/postgresql@17/bin",
        "/opt/homebrew/opt/postgresql@16/bin",
        "/opt/local/lib/postgresql18/bin",
        "/opt/homebrew/bin",
        "/usr/local/bin",
    ];
    assert_eq!(found, expected);
    place.mac.assert_nothing_was_refused();
}

#[test]
fn what_homebrew_is_to_install_is_said_before_and_found_after() {
    let place = Place::new();
    // A cluster of a version that is not here, and a brew that is not in PATH.
    fs::create_dir_all(place.path("server/cluster")).unwrap();
    fs::write(place.path("server/cluster/PG_VERSION"), "98\n").unwrap();
    give(&place.path("server"));
    let brew = place.path("homebrew/bin/brew");
    fs::create_dir_all(brew.parent().unwrap()).unwrap();
    let formula = "#!/bin/sh
      keg=$(dirname \"$0\")/../opt/${3:?}/bin
      /bin/mkdir -p \"$keg\"
      for program in initdb pg_ctl postgres; do
        printf '#!/bin/sh\\ncase $1 in -V) echo \"postgres (PostgreSQL) 98.1\" ;; *) echo \"this is %s\"; exit 1 ;; esac\\n' \"$program of $3\" >\"$keg/$program\"
        /bin/chmod 755 \"$keg/$program\"
      done
      echo \"brew $*\" >\"$(dirname \"$0\")/asked\"";
    executable(&brew, formula);
    give(&place.path("homebrew"));
    let output = place.run(&["start", place.path("server").to_str().unwrap()]);
    let said = said(&output);
    let mut lines = said.lines();
    let expected = format!(
        "dev-postgres: PostgreSQL 98 is not installed; installing it, as by: {} install --quiet postgresql@98",
        brew.display()
    );
    assert_eq!(lines.next(), Some(&*expected), "{said}");
    assert_eq!(fs::read_to_string(place.path("homebrew/bin/asked")).unwrap(), "brew install --quiet postgresql@98\n");
    // The program that it has found is asked to start the server; this one can't.
    assert!(lines.next().unwrap().contains("this is pg_ctl of postgresql@98"), "{said}");
    assert_eq!(output.status.code(), Some(69));
    place.mac.assert_nothing_was_refused();
}

/// Else the tests above would show nothing.
#[test]
fn the_stand_ins_for_the_programs_of_macos_refuse_what_it_does_not_have() {
    let folder = tempfile::tempdir().unwrap();
    let mac = Mac::new(folder.path());
    let run = |line: &str| {
        let mut command = Command::new(folder.path().join("programs of macos/bash"));
        let output = mac.put(command.env_clear().args(["-c", line]).current_dir(&folder)).output().unwrap();
        let refused = fs::read_to_string(&mac.refused).unwrap();
        fs::write(&mac.refused, "").unwrap();
        (output, refused)
    };
    for line in [
        "readlink -f .",
        "date -d now",
        "date --date=now",
        "date +%N",
        "stat -c %s .",
        "sed -i s/a/b/ none",
        "sed 's/a\\|b//' none",
        "timeout 1 true",
        "setsid true",
        "nproc",
        "getent passwd",
        "runuser true",
        "flock -n 9",
        "apt-get update",
        "sha256sum none",
        "sort -V none",
        "xargs -r true",
        "xargs -d , true",
        "grep -P a none",
        "grep 'a\\|b' none",
        "cp --archive a b",
        "cp -t a b",
        "mktemp none.XXXXXX.log",
        "mktemp --directory",
        "ln -T a b",
        "ln -r a b",
        "tail --pid=1 none",
        "head -n -1 none",
        "ls . -l",
        "ps -o cmd= -p 1",
        "ps --no-headers",
        "find . -printf x",
        "find -name a",
        "sleep 1s",
        "dd bs=1M",
        "touch -d now a",
        "wc --lines none",
        "tac none",
        "realpath .",
        "awk 'BEGIN { print strftime() }'",
        "mv -t a b",
        "rm --force a",
        "base64 -w0 none",
        "sh -c 'exec env readlink -f .'",
    ] {
        let (output, refused) = run(line);
        assert!(refused.lines().count() == 1 && !output.status.success(), "{line}: {refused:?}, {output:?}");
    }
    for (line, answer) in [
        ("printf 'a\\nb\\n' | wc -l", "       2\n"),
        ("printf '%s' a b | tr ab cd | cut -c 2-", "d\n"),
        ("printf '2 b\\n10 a\\n' | sort -rn | head -n 1 | awk '{ print $2 }'", "a\n"),
        ("printf '%s\\n' a.b | sed -n '1s/\\./-/p'", "a-b\n"),
        ("touch -- -a && ls -d -- -a && rm -f -- -a", "-a\n"),
        ("printf ab | dd bs=1 count=1 2>/dev/null", "a"),
        ("env sh -c 'echo $0 --x' --y", "--y --x\n"),
        ("sleep 0.01; uname -s", "Darwin\n"),
        ("kill -0 $$; kill -s CONT -- $$; ps -ww -o command= -p 1 >/dev/null; echo $?", "0\n"),
    ] {
        let (output, refused) = run(line);
        assert_eq!((String::from_utf8_lossy(&output.stdout).as_ref(), &*refused), (answer, ""), "{line}: {output:?}");
    }
}

/// Programs and options that macOS does not have, so far as a line shows them. Programs that are only used where they are found
/// (flock, runuser) are left to the tests above.
const GNU_ONLY: [&str; 34] = [
    "timeout ",
    "setsid ",
    "nproc",
    "getent ",
    "tac ",
    "realpath ",
    "readlink -f",
    "readlink -m",
    "readlink -e",
    "stat -c",
    "date -d",
    "date -I",
    "%s%N",
    "sed -i",
    "sed -s",
    "sort -V",
    "xargs -r",
    "xargs -d",
    "grep -P",
    "grep -oP",
    "cp -t",
    "cp -T",
    "mv -t",
    "mv -T",
    "ln -r",
    "ln -T",
    "find -",
    " -printf",
    "head -n -",
    "head -c -",
    "base64 -w",
    "mktemp -t",
    "touch -d",
    "install -D",
];

/// Programs whose long options are GNU's.
const WITHOUT_LONG_OPTIONS: [&str; 27] = [
    "awk", "cat", "chmod", "chown", "cp", "cut", "date", "dd", "df", "du", "find", "grep", "head", "id", "ln", "ls",
    "mkdir", "mktemp", "mv", "ps", "rm", "sed", "sort", "tail", "touch", "tr", "xargs",
];

/// What bash 3.2 does not know; most of it it takes for something else without a word.
const NEWER_THAN_BASH_3_2: [&str; 45] = [
    "mapfile",
    "readarray",
    "declare -A",
    "local -A",
    "typeset -A",
    "declare -n",
    "local -n",
    "declare -g",
    "declare -l",
    "declare -u",
    "wait -n",
    "wait -f",
    "coproc",
    "|&",
    "&>>",
    ";;&",
    ";&",
    "[[ -v",
    "[ -v",
    "test -v",
    "-v ${",
    ",,}",
    "^^}",
    ",}",
    "^}",
    "@Q}",
    "@E}",
    "@P}",
    "@A}",
    "@U}",
    "@L}",
    "printf '%(",
    "printf \"%(",
    "EPOCHSECONDS",
    "EPOCHREALTIME",
    "BASHPID",
    "SRANDOM",
    "shopt -s globstar",
    "shopt -s lastpipe",
    "read -N",
    "read -i",
    "${BASH_ARGV0",
    "[-1]",
    "{fd}",
    "exec {",
];

/// What is not for macOS in a script, each with its line.
fn not_for_macos(name: &str, text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut depth = 0;
    for (number, line) in text.lines().enumerate() {
        if line.trim_start().starts_with('#') {
            continue;
        }
        let mut note = |why: &str| wrong.push(format!("scripts/{name}:{}: {why}: {}", number + 1, line.trim()));
        let starts_word = |at: usize| !line[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || "_-$/.".contains(c));
        for word in NEWER_THAN_BASH_3_2 {
            if line.match_indices(word).any(|(at, _)| word != "[ -v" || !line[..at].ends_with('[')) {
                note(&format!("bash 3.2 has no {word:?}"));
            }
        }
        for word in GNU_ONLY {
            // A variable may be called so, too.
            let is_variable =
                |at: usize| line[at + word.len()..].starts_with(['+', '-', '=', '<', '>', '*']) && word == "timeout ";
            if line
                .match_indices(word)
                .any(|(at, _)| word.starts_with([' ', '%']) || starts_word(at) && !is_variable(at))
            {
                note(&format!("macOS has no {word:?}"));
            }
        }
        for program in WITHOUT_LONG_OPTIONS {
            let is_long = |rest: &str| {
                let arguments = rest.split(['|', ';', '&', ')', '"']).next().unwrap();
                let mut words = arguments.split(' ').take_while(|word| *word != "--");
                rest.starts_with(' ') && words.any(|word| word.starts_with("--"))
            };
            let mut uses = line.match_indices(program);
            if uses.any(|(at, _)| starts_word(at) && is_long(&line[at + program.len()..])) {
                note(&format!("{program} has no long options"));
            }
        }
        for program in ["grep ", "sed "] {
            let basic = line.find(program).is_some_and(|at| !line[at..].starts_with(&format!("{program}-E")));
            if basic && ["\\|", "\\+", "\\?"].iter().any(|operator| line.contains(operator)) {
                note("an operator of GNU's regular expressions");
            }
        }
        if line.contains("/proc") && name != "lock.sh" {
            note("what comes from /proc is lock.sh's");
        }
        // Its parser takes the ) of a pattern for the end of $( ), and an apostrophe in a comment for a quote.
        let begins = line.find("$(").filter(|at| !line[*at..].starts_with("$(("));
        let inside = if depth > 0 { line } else { begins.map_or("", |at| &line[at + 2..]) };
        if inside.split("$(").any(|inside| inside.trim_start().starts_with("case "))
            || depth > 0 && inside.contains(" # ")
        {
            note("a case or a comment in $( )");
        }
        let goes_on = depth > 0 || line.ends_with(['|', '(', '\\', '&']);
        if goes_on && (depth > 0 || begins.is_some()) {
            let open = inside.matches('(').count() + usize::from(depth == 0);
            depth = (depth + open).saturating_sub(inside.matches(')').count());
        }
        // In a UTF-8 locale it takes letters beyond ASCII for a part of the name.
        let mut names = line
            .split('$')
            .skip(1)
            .map(|rest| rest.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || c == '_'));
        if line.contains('$') && names.any(|rest| rest.starts_with(|c: char| !c.is_ascii())) {
            note("a name in front of a character beyond ASCII: use ${NAME}");
        }
        if let Some(at) = line.find("read ").filter(|at| starts_word(*at))
            && line[at..].split(" -t ").nth(1).is_some_and(|seconds| seconds.split(' ').next().unwrap().contains('.'))
        {
            note("bash 3.2 reads whole seconds");
        }
    }
    // Under `set -u` bash 3.2 takes "${list[@]}" of an empty list for an unset variable.
    let code = || text.lines().filter(|line| !line.trim_start().starts_with('#'));
    for (at, _) in text.match_indices("[@]}") {
        let Some(list) = text[..at].rsplit("${").next().filter(|list| !list.starts_with(['#', '!'])) else { continue };
        let filled = code().any(|line| {
            let begin = line.find(&format!("{list}=(")).map(|begin| &line[begin + list.len() + 2..]);
            begin.is_some_and(|rest| !rest.starts_with(')') && !line.contains(&format!("+{list}")))
        });
        if !filled && !text[..at].ends_with(&format!("{list}[@]+\"${{{list}")) {
            wrong.push(format!("scripts/{name}:{}: ${{{list}[@]}} may be empty", text[..at].lines().count()));
        }
    }
    wrong
}

#[test]
fn the_scripts_use_nothing_that_macos_and_its_bash_3_2_do_not_have() {
    let mut wrong = String::new();
    let mut checked = 0;
    for entry in fs::read_dir(project().join("scripts")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap_or_default();
        // Those that end with a word where there is no Linux, and the templates of services.
        if path.extension().is_none_or(|extension| extension != "sh") || text.contains("this needs Linux") {
            continue;
        }
        checked += 1;
        for line in not_for_macos(path.file_name().unwrap().to_str().unwrap(), &text) {
            let _ = writeln!(wrong, "{line}");
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
    assert!(checked >= 7, "{checked}");
}

#[test]
fn a_script_with_something_that_macos_does_not_have_is_found_out() {
    for line in [
        "mapfile -t lines <file",
        "declare -A map",
        "echo \"${name^^}\"",
        "program &>>log",
        "program |& cat",
        "wait -n",
        "exec {fd}<file",
        "printf -v now '%(%s)T'; printf '%(%s)T'",
        "[[ -v name ]]",
        "echo $BASHPID",
        "local -n other=$1",
        "echo \"${list[-1]}\"",
        "read -r -t 0.5 line",
        "x=$(case $y in a) echo b ;; esac)",
        "x=$(\n  case $y in (a) echo b ;; esac\n)",
        "echo \"$name…\"",
        "list=()\necho \"${list[@]}\"",
        "readlink -f \"$0\"",
        "x=$(date -d @0)",
        "stat -c %s file",
        "sed -i s/a/b/ file",
        "timeout 5 program",
        "setsid program",
        "sort -V file",
        "cp --archive a b",
        "ls -1 --sort=time",
        "ps --pid 1",
        "grep 'a\\|b' file",
        "cat /proc/1/stat",
        "[ -d \"/proc/$pid\" ]",
        "x=$(nproc)",
    ] {
        let wrong = not_for_macos("planted.sh", &format!("#!/usr/bin/env bash\n# a comment\n{line}\n"));
        assert!(!wrong.is_empty(), "{line}");
        assert!(wrong.iter().all(|wrong| wrong.starts_with("scripts/planted.sh:")), "{wrong:?}");
    }
    let fine = "list=(a)\nlist=()\necho \"${list[@]+\"${list[@]}\"}\" \"${name} …\" \"$(basename -- --x)\" \"$((1 << 2))\"\n\
                # timeout, mapfile, /proc\nread -r -t 1 line\nmy_timeout 3\ncommand -v flock\nprogram --long | cut -f2\n";
    assert_eq!(not_for_macos("planted.sh", fine), Vec::<String>::new());
}
