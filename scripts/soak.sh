#!/usr/bin/env bash
# Everything at once, for long: load, kill -9, Postgres restarts, full disks, clock jumps; then every row is accounted for.
#
# Usage: scripts/soak.sh [MINUTES] [SEED]        (default: 30 minutes)
#
#   load     transcripts of 50 bytes to 1 MB a line, in pieces and in bursts, new sessions, copies of sessions, garbage;
#            events of `emit`, one at a time and in streams; hooks; three times 200 MB at once while Postgres is away
#   faults   kill -9 and SIGSTOP of the watcher, stops of its supervisor (scripts/run-watcher.sh), Postgres stopped (fast,
#            immediate, kill -9), a full disk below the queue (needs root), the clock moved by up to a day (needs
#            Debian's package faketime). In the middle third only those that the watcher lives through
#   then     all must settle. `headspace-watcher verify` must find nothing missing. A reader that knows nothing of the
#            program compares the table with what the load wrote down: each turn, event and hook once, whole, each
#            file's turns in order
#   flat     memory, descriptors and disk, by samples taken every two seconds; scripts/soak/judge.sh says by which rule
#
# Needs Linux: what it counts of processes it reads from /proc.
# SOAK_PROFILE names another cargo profile than release; SOAK_KEEP=1 keeps the folder of the run, for judge.sh.
# Exit 0 when all of this holds. A run of 30 minutes or more writes its report into docs/benchmarks.md.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
minutes=${1:-30} seed=${2:-$$$(date +%s)}
case $minutes$seed in
  *[!0-9.]* | *.*.*)
    printf 'Usage: scripts/soak.sh [MINUTES] [SEED]\n' >&2
    exit 64
    ;;
esac
[ -d /proc/self/task ] || {
  printf 'soak: this needs Linux: what it counts of processes it reads from /proc\n' >&2
  exit 69
}

cd "$root"
command -v cargo >/dev/null 2>&1 || PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
profile=${SOAK_PROFILE:-release}
cargo build --profile "$profile" --locked --quiet --bin headspace-watcher --example soak-drive
built=$root/target/$profile
[ "$profile" != dev ] || built=$root/target/debug
postgres=$root/scripts/dev-postgres.sh

# Made under /tmp: the path of a socket may not be long.
work=$(mktemp -d /tmp/hw-soak.XXXXXX)
chmod 755 "$work"
driver=''
mounted=''
clean_up() {
  trap '' INT TERM HUP
  if [ -n "$driver" ]; then kill "$driver" 2>/dev/null || true; fi
  # A driver that failed leaves its supervisor behind, and that one its watcher.
  local supervisor tries=0
  supervisor=$(cat "$work/supervisor" 2>/dev/null || true)
  if [ -n "$supervisor" ] && kill "$supervisor" 2>/dev/null; then
    while kill -0 "$supervisor" 2>/dev/null && [ "$tries" -lt 50 ]; do
      tries=$((tries + 1))
      sleep 0.1
    done
  fi
  "$postgres" stop --mode immediate "$work/postgres" >/dev/null 2>&1 || true
  if [ -n "$mounted" ]; then
    # What is in memory is gone with it.
    [ -z "${SOAK_KEEP-}" ] || cp -a "$work/disk/." "$work/kept" || true
    umount "$work/disk" || true
    [ ! -d "$work/kept" ] || cp -a "$work/kept/." "$work/disk" || true
  fi
  if [ -n "${SOAK_KEEP-}" ]; then printf 'kept: %s\n' "$work"; else rm -rf "$work"; fi
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# ---- the scene -------------------------------------------------------------------------------------------------------

# Stopped and started again, so it is none that `stop` would remove.
"$postgres" start "$work/postgres" >/dev/null
url=$("$postgres" url "$work/postgres")

mkdir -p "$work/projects" "$work/disk" "$work/bin"
# What is built meanwhile is another program.
cp "$built/headspace-watcher" "$built/examples/soak-drive" "$work/bin/"
queue=$work/data/queue
disk_word='SKIPPED (a small file system needs root)'
if mount -t tmpfs -o size=1200m tmpfs "$work/disk" 2>/dev/null; then
  mounted=1 queue=$work/disk/queue disk_word=''
  export SOAK_DISK=$work/disk
fi
clock_word='SKIPPED (libfaketime is not here; Debian: apt-get install faketime)'
for library in /usr/lib/*/faketime/libfaketime.so.1 /usr/lib/faketime/libfaketime.so.1; do
  [ -f "$library" ] || continue
  echo '+0' >"$work/clock"
  export SOAK_CLOCK=$work/clock SOAK_FAKETIME=$library
  clock_word=''
done
cat >"$work/config.yaml" <<YAML
claude:
  projects_path: projects
file_watcher:
  polling_interval: 1
event_system:
  max_restarts_per_minute: 60
database:
  url: $url
queue:
  path: $queue
  max_pending_bytes: 201326592
http:
  listen: null
YAML
export SOAK_WATCHER=$work/bin/headspace-watcher SOAK_SCRIPTS=$root/scripts SOAK_POSTGRES=$work/postgres

# ---- the run ---------------------------------------------------------------------------------------------------------

printf '%s minutes, seed %s, in %s\n' "$minutes" "$seed" "$work"
[ -z "$disk_word" ] || printf 'full disks: %s\n' "$disk_word"
[ -z "$clock_word" ] || printf 'clock jumps: %s\n' "$clock_word"
"$work/bin/soak-drive" "$work" "$minutes" "$seed" 2>"$work/driver-error" &
driver=$!
status=0
wait "$driver" || status=$?
driver=''
if [ "$status" -eq 0 ]; then rm "$work/supervisor"; else tail -n 1 "$work/driver-error" >"$work/failed"; fi
{
  printf 'MINUTES=%s SEED=%s PROFILE=%s\n' "$minutes" "$seed" "$profile"
  printf 'DISK_WORD=%q CLOCK_WORD=%q\n' "$disk_word" "$clock_word"
} >"$work/run"

status=0
scripts/soak/judge.sh "$work" || status=$?
if awk -v minutes="$minutes" 'BEGIN { exit !(minutes >= 30) }'; then
  scripts/document-section.sh docs/benchmarks.md scripts/soak.sh "$work/report"
fi
[ "$status" -eq 0 ]
