#!/usr/bin/env bash
# Measurements, each beside what it is to be compared with, in the same run. Numbers alone say little on a machine that
# does other things too; what counts is the ratio.
#
# Usage: scripts/bench.sh                 all of it, in some eight minutes; writes docs/benchmarks.md and docs/benchmarks.tsv
#        scripts/bench.sh --quick         the same in small, in under a minute, to see that everything works; writes nothing
#        scripts/bench.sh PART [--quick]  one part
#        scripts/bench.sh ratio --check   fails where the drain falls under half of its published ratio to pgbench
#
# PART, and the seconds it took on two processors:
#   queue 10       durable append beside write + fdatasync; opening and memory with a million pending
#   drain 55       the drainer beside pgbench (1, 4, 16 clients, synchronous_commit on and off), COPY, a plain loop
#   ratio 6        the drainer beside pgbench with one client, in a debug build, which CI has anyway
#   backfill 23    200,000 turns from file into Postgres, twice
#   rsyslog 24     the same job by rsyslog
#   latency 35     from a line appended to its row visible, at 1, 100 and 1,000 lines a second
#   unnotified 125 the same without file notifications, and what checking a thousand transcripts costs
#   outage 62      a minute without Postgres at 500 lines a second
#   restart 6      kill -9 with 100,000 pending
#   capture 86     a million turns captured with Postgres away, drained, verified; stops in all kinds of trouble
#   idle 33        1,000 transcripts, nothing happens
#   hook 7         wall time of Claude Code's hook
# and whatever else is in scripts/bench/ as PART.sh.
#
# Needs PostgreSQL's programs (scripts/dev-postgres.sh installs them where it may), Linux's /proc, and 8 GB of disk. All
# is done in a folder of its own below target/, on the disk the project is on, with a server of its own; all of it is
# gone afterwards. rsyslog is taken from the system, or fetched by apt-get and unpacked there, not installed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
postgres=$root/scripts/dev-postgres.sh
readonly PARTS='queue drain backfill rsyslog latency unnotified outage restart capture idle hook'

die() {
  printf 'bench: %s\n' "$2" >&2
  exit "$1"
}

needs_linux() {
  [ -d /proc/self/task ] || die 69 "this needs Linux: what it measures of processes it reads from /proc"
}

parts='' quick='' profile=release published=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      sed -n '2,/^set -euo/s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    --quick) quick=--quick ;;
    --check) published=(--published "$root/docs/benchmarks.tsv") ;;
    -*) die 64 "no option $1; see scripts/bench.sh --help" ;;
    *)
      case " $PARTS ratio " in
        *" $1 "*)
          parts="$parts $1"
          [ "$1" != ratio ] || profile=debug
          ;;
        *)
          [ -f "scripts/bench/$1.sh" ] || die 64 "no part $1; see scripts/bench.sh --help"
          [ -z "$parts" ] || die 64 "$1 is run on its own"
          needs_linux
          part=$1
          shift
          exec bash "scripts/bench/$part.sh" "$@" ${quick:+"$quick"}
          ;;
      esac
      ;;
  esac
  shift
done
everything=''
if [ -z "$parts" ]; then
  everything=1
  parts=$PARTS
fi
needs_linux

# What a caller has set for other servers and other watchers must not steer these.
# shellcheck disable=SC2086 # a list of names
unset DATABASE_URL NOTIFY_SOCKET RUST_LOG ${!PG@} ${!HEADSPACE_@} ${!CLAUDE@}

command -v cargo >/dev/null 2>&1 || PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
command -v cargo >/dev/null 2>&1 || die 69 "cargo is not installed: get Rust from https://rustup.rs, then try again"
if [ "$profile" = release ]; then
  cargo build --release --locked --bin headspace-watcher --example bench
else
  cargo build --locked --bin headspace-watcher --example bench
fi
if [ -n "$everything" ] && [ -z "$quick" ]; then cargo build --locked --example bench; fi
program=$root/target/$profile/examples/bench
bin=$("$postgres" bin)

began=$SECONDS
mkdir -p target/bench
work=$(mktemp -d "$root/target/bench/run.XXXXXX")
# The server's user and mine may differ.
chmod 0711 "$work"
mkdir "$work/disk"
measuring=''
clean_up() {
  trap '' INT TERM HUP
  if [ -n "$measuring" ]; then
    kill "$measuring" 2>/dev/null || true
    # What its watchers listened on.
    rm -f "${TMPDIR:-/tmp}/bench-$measuring-"*.sock
  fi
  local pid
  while IFS= read -r pid; do
    # Only what still is what it was: what runs out of this very folder.
    if grep -qF "$work/" "/proc/$pid/cmdline" 2>/dev/null; then kill -KILL "$pid" 2>/dev/null || true; fi
  done < <(cat "$work/disk/pids" 2>/dev/null)
  # Paused, it would not hear of its end.
  local server
  server=$(head -n 1 "$work/postgres/cluster/postmaster.pid" 2>/dev/null) || server=''
  # shellcheck disable=SC2046 # a list of ids
  [ -z "$server" ] || kill -CONT "$server" $(pgrep -P "$server") 2>/dev/null || true
  [ ! -e "$work/postgres" ] || "$postgres" stop --mode immediate "$work/postgres" >/dev/null 2>&1 || true
  if [ -f "$work/postgres/moved" ]; then rm -rf "$(cat "$work/postgres/moved")"; fi
  rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# rsyslogd with ompgsql: the system's, else Debian's packages unpacked into target/. Nothing is installed, so no system
# logger is started by this.
rsyslog=() why=''
find_rsyslog() {
  local place=$root/target/bench/rsyslog
  if [ -x /usr/sbin/rsyslogd ] && [ -n "$(find /usr/lib -maxdepth 3 -name ompgsql.so 2>/dev/null)" ]; then
    rsyslog=(--rsyslog /)
    return
  fi
  if [ ! -x "$place/usr/sbin/rsyslogd" ]; then
    if ! command -v apt-get >/dev/null 2>&1 || ! command -v dpkg-deb >/dev/null 2>&1; then
      why='neither rsyslog with its rsyslog-pgsql nor apt-get is here'
      return
    fi
    rm -rf "$place" && mkdir -p "$place"
    local packages=(rsyslog rsyslog-pgsql libestr0 libfastjson4 liblognorm5)
    # Lists that are old name versions which are no longer to be had.
    if ! (cd "$place" && apt-get download -qq "${packages[@]}" >/dev/null 2>&1) &&
      ! { [ "$(id -u)" -eq 0 ] && apt-get update -qq >/dev/null 2>&1 &&
        (cd "$place" && apt-get download -qq "${packages[@]}" >/dev/null 2>&1); }; then
      rm -rf "$place"
      why='rsyslog and rsyslog-pgsql are not here, and apt-get could not fetch them'
      return
    fi
    local package
    for package in "$place"/*.deb; do dpkg-deb -x "$package" "$place"; done
    rm -f "$place"/*.deb
  fi
  # Debian's folders are the same as the system's only since its lib is in usr.
  if LD_LIBRARY_PATH=$(dirname "$(find "$place/usr/lib" -name 'libestr.so.0' | head -n 1)") "$place/usr/sbin/rsyslogd" -v >/dev/null 2>&1; then
    rsyslog=(--rsyslog "$place")
  else
    why='rsyslogd was fetched, but does not run here'
  fi
}
case " $parts " in
  *' rsyslog '*)
    find_rsyslog
    [ -z "$why" ] || rsyslog=(--no-rsyslog "$why")
    ;;
esac

"$postgres" start "$work/postgres" >/dev/null
rows=$work/rows.tsv
arguments=(--server "$work/postgres" --folder "$work/disk" --rows "$rows" ${published[@]+"${published[@]}"})
# In the background, so that a signal is heard at once.
# shellcheck disable=SC2086 # a list of parts
"$program" "${arguments[@]}" ${rsyslog[@]+"${rsyslog[@]}"} ${quick:+"$quick"} $parts &
measuring=$!
wait "$measuring"
if [ -n "$everything" ] && [ -z "$quick" ]; then
  target/debug/examples/bench "${arguments[@]}" ratio &
  measuring=$!
  wait "$measuring"
fi
measuring=''

took=$((SECONDS - began))
printf '\n%s s\n' "$took"
[ -n "$everything" ] && [ -z "$quick" ] || exit 0

# ---- docs/benchmarks.md ----------------------------------------------------------------------------------------------

grep -v "^$" "$rows" >docs/benchmarks.tsv
processor=$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -n 1)
memory=$(awk '/^MemTotal/ { printf "%.0f GB", $2 / 1048576 }' /proc/meminfo)
system=$(sed -n 's/^PRETTY_NAME="\(.*\)"$/\1/p' /etc/os-release 2>/dev/null || true)
disk=$(df -T "$root" | awk 'NR == 2 { print $2 }')
{
  cat <<HEAD
| | |
|---|---|
| Command | \`scripts/bench.sh\`, $took s |
| Date | $(date -u +%Y-%m-%d) |
| Machine | $(getconf _NPROCESSORS_ONLN) × ${processor:-$(uname -m)}, $memory, $disk |
| System | ${system:-$(uname -s)}, Linux $(uname -r | cut -d - -f 1) |
| headspace-watcher | $(target/$profile/headspace-watcher --version | awk '{ print $2 }'), $(git rev-parse --short HEAD 2>/dev/null || echo 'no git'), $(rustc --version | cut -d' ' -f1,2), release |
| PostgreSQL | $("$bin/postgres" -V | awk '{ print $3 }'), its own defaults |

| What | | Beside it, in the same run | Aim | |
|---|--:|---|---|---|
HEAD
  awk -F'\t' '
    NF == 2 { printf "| **%s** | | | | |\n", $2; next }
    { printf "| %s | %s | %s | %s | %s |\n", $2, $3 (($4 != "") ? " " $4 : ""), $5, $6, ($7 == "yes") ? "reached" : (($7 == "no") ? "**missed**" : "") }
  ' docs/benchmarks.tsv
} >"$work/benchmarks.md"
scripts/document-section.sh docs/benchmarks.md scripts/bench.sh "$work/benchmarks.md"
printf 'docs/benchmarks.md and docs/benchmarks.tsv are written\n'
