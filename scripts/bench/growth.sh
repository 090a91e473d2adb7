#!/usr/bin/env bash
# ten times the work: time and peak memory of each kind of size, at a size and at ten times it
#
# Usage: scripts/bench.sh growth [--quick | --full] [WHAT ...]
#        WHAT: pending, transcripts, history, single (default: all)
#
#   pending      so many events wait in the queue: the time to capture them with Postgres away, to open the queue, and to
#                drain it into Postgres
#   transcripts  so many transcripts of three turns each, from the start until all is in Postgres; and the same number of
#                lines in ten times as many transcripts, as a thousand with three turns are done before the program has
#                all of the memory that it usually has
#   history      so many bytes to back-fill in transcripts of 25 MB, one line in ten a turn, as they are
#   single       the same in one transcript
#
# Peak memory is of the whole run of the program. Work grows tenfold; time must grow no faster, which is the column
# "time / work" at about 1 or less, and memory not at all.
#
#                      pending              transcripts        history           single
#   --quick            2,000 / 20,000       50 / 500           2 / 20 MB         2 / 20 MB
#   without            100,000 / 1 million  1,000 / 10,000     50 / 500 MB       50 / 500 MB
#   --full             1 / 10 million       1,000 / 10,000     2 / 20 GB         100 MB / 1 GB
#
# A run without --quick, of all kinds, writes that section of docs/benchmarks.md. --full needs 45 GB of disk,
# and half an hour to two hours.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd "$root"
size=default pending=100000 transcripts=1000 history=50 single=50
kinds=()
for argument in "$@"; do
  case $argument in
    --quick) size=quick pending=2000 transcripts=50 history=2 single=2 ;;
    --full) size=full pending=1000000 transcripts=1000 history=2000 single=100 ;;
    pending | transcripts | history | single) kinds+=("$argument") ;;
    *)
      printf 'Usage: scripts/bench.sh growth [--quick | --full] [pending | transcripts | history | single ...]\n' >&2
      exit 64
      ;;
  esac
done
whole=''
if [ ${#kinds[@]} -eq 0 ]; then
  kinds=(pending transcripts history single)
  [ "$size" = quick ] || whole=1
fi

command -v cargo >/dev/null 2>&1 || PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
cargo build --release --locked --quiet --bin headspace-watcher
watcher=$root/target/release/headspace-watcher
postgres=$root/scripts/dev-postgres.sh

mkdir -p target
# The path of a socket may not be long.
work=$(mktemp -d "$root/target/growth.XXXXXX") sockets=$(mktemp -d /tmp/hw-growth.XXXXXX)
cluster='' running=''
clean_up() {
  trap '' INT TERM HUP
  [ -z "$running" ] || kill "$running" 2>/dev/null || true
  [ -z "$cluster" ] || "$postgres" stop "$cluster" >/dev/null 2>&1 || true
  rm -rf "$work" "$sockets"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
cluster=$("$postgres" start --throwaway)
url=$("$postgres" url "$cluster")
sql() { "$postgres" psql "$cluster" -qAtX -v ON_ERROR_STOP=1 -c "$1"; }
now() { date +%s%N; }
since() { awk -v begun="$1" -v now="$(now)" 'BEGIN { printf "%.2f", (now - begun) / 1e9 }'; }
peak_mb_of() { awk '/^VmHWM/ { printf "%d", $2 / 1024 }' "/proc/$1/status"; }

# lines KIND NUMBER COUNT: lines of transcript NUMBER. KIND turns: prompts of 0.9 kB. KIND mixed: each tenth is one, the
# others are results of tools and progress of 2.7 kB in the mean.
lines() {
  awk -v kind="$1" -v number="$2" -v count="$3" 'BEGIN {
    for (i = 0; i < 8; i++) text = text "The drainer takes the oldest envelopes out of the queue and hands them to the sink. "
    for (i = 0; i < 50; i++) output = output "src/queue/writer.rs:120: let batch = gather(&inbox); // one sync\\n"
    session = sprintf("%08x-0000-4000-8000-000000000000", number)
    tail = ",\"timestamp\":\"2026-01-02T03:04:05.678Z\",\"cwd\":\"/home/me/app\",\"sessionId\":\"" session "\",\"version\":\"2.1.219\"}"
    head = "{\"parentUuid\":null,\"isSidechain\":false,\"type\":\"user\",\"message\":{\"role\":\"user\",\"content\":"
    for (i = 1; i <= count; i++) {
      uuid = sprintf("\"uuid\":\"%08x-%04x-4000-8000-%012x\"", i, number % 65536, number)
      if (kind == "turns" || i % 10 == 1) print head "\"" text "\"}," uuid tail
      else {
        result = substr(output, 1, 300 + (i * 7919) % 2900)
        sub(/\\$/, "", result)  # half an escape
        print head "[{\"type\":\"tool_result\",\"tool_use_id\":\"toolu_" i "\",\"content\":\"" result "\"}]}," uuid tail
      }
    }
  }'
}
# transcript KIND NUMBER COUNT
transcript() {
  local folder
  folder=$work/projects/-home-me-$(($2 % 50))
  mkdir -p "$folder"
  lines "$@" >"$folder/$(printf '%08x' "$2")-0000-4000-8000-000000000000.jsonl"
}

fresh() {
  rm -rf "$work/projects" "$work/data"
  mkdir -p "$work/projects"
  if [ "$(sql "SELECT to_regclass('events') IS NOT NULL")" = t ]; then sql 'TRUNCATE events, headspace_watcher.event_receipts, headspace_watcher.event_sources'; fi
  sql 'CHECKPOINT'
}

# until_idle: runs the program until all is delivered; sets seconds, peak_mb and rows.
until_idle() {
  local begun line
  begun=$(now)
  peak_mb=0
  env -u DATABASE_URL HEADSPACE_DATABASE__URL="$url" "$watcher" --config "$work/config.yaml" --log-level warn run --until-idle \
    2>>"$work/log" &
  running=$!
  # What it is in the end is the peak; after its end it is no longer there.
  while line=$(peak_mb_of "$running" 2>/dev/null) && [ -n "$line" ]; do
    peak_mb=$line
    sleep 0.02
  done
  wait "$running" || { tail -n 3 "$work/log" >&2; exit 1; }
  running=''
  # Each line that is written here can be read.
  if grep -q 'dead letters' "$work/log"; then tail -n 3 "$work/log" >&2; exit 1; fi
  seconds=$(since "$begun")
  rows=$(sql 'SELECT count(*) FROM events')
}
cat >"$work/config.yaml" <<YAML
claude: {projects_path: projects}
file_watcher: {inactivity_timeout: 3153600000}
queue: {max_pending_bytes: 1099511627776}
http: {listen: null, socket: $sockets/socket}
YAML

# record WHAT AMOUNT SECONDS MB [WORK]: one point; WORK is by how much this is more work than the one before (10).
record() {
  printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" "${5-10}" >>"$work/points"
  printf '%-34s %12s  %10s s  %6s MB\n' "$1" "$2" "$3" "$4"
}
must_be() { # WHAT FOUND EXPECTED
  [ "$2" = "$3" ] || { printf '%s: %s, not %s\n' "$1" "$2" "$3" >&2; exit 1; }
}

# Captured with Postgres away; opened by a command that shows the oldest event and ends; then drained.
measure_pending() { # EVENTS
  fresh
  # The session's registration is an event too.
  transcript turns 1 $(($1 - 1))
  local begun captured opened
  begun=$(now)
  HEADSPACE_DATABASE__URL='postgresql:///away?host=/nowhere&user=nobody' "$watcher" --config "$work/config.yaml" \
    --log-level error run 2>>"$work/log" &
  running=$!
  until "$watcher" --config "$work/config.yaml" status --json 2>/dev/null | grep -q "\"pending\":$1,"; do
    kill -0 "$running" || { tail -n 3 "$work/log" >&2; exit 1; }
    sleep 0.1
  done
  captured=$(since "$begun")
  record 'pending: captured' "$1 events" "$captured" "$(peak_mb_of "$running")"
  kill "$running" && wait "$running"
  running=''
  begun=$(now)
  "$watcher" --config "$work/config.yaml" queue-dump --limit 1 >/dev/null
  opened=$(since "$begun")
  record 'pending: opened' "$1 events" "$opened" '-'
  until_idle
  must_be 'rows' "$rows" "$1"
  record 'pending: drained' "$1 events" "$seconds" "$peak_mb"
}

transcripts_of() { # TRANSCRIPTS TURNS
  fresh
  local number
  for number in $(seq "$1"); do transcript turns "$number" "$2"; done
  until_idle
  must_be 'rows' "$rows" "$(($1 * ($2 + 1)))"
}
measure_transcripts() { # TRANSCRIPTS TIMES
  if [ "$2" -eq 1 ]; then
    transcripts_of "$1" 39
    record 'the same lines in transcripts' "$1 files" "$seconds" "$peak_mb"
  fi
  transcripts_of "$1" 3
  record 'transcripts of three turns' "$1 files" "$seconds" "$peak_mb"
  [ "$2" -eq 1 ] || record 'the same lines in transcripts' "$1 files" "$seconds" "$peak_mb" 1
}

# Lines of the mixed kind in a megabyte, and of them turns.
readonly LINES_OF_MB=500
measure_history() { # MB
  fresh
  local number files=$(($1 / 25))
  [ "$files" -gt 0 ] || files=1
  # All are the same but for session and uuids; the first is generated, the others are told apart by sed.
  transcript mixed 1 $((LINES_OF_MB * $1 / files))
  for number in $(seq 2 "$files"); do
    local session uuid folder
    session=$(printf '%08x-0000-4000-8000-000000000000' "$number")
    uuid=$(printf -- '-%04x-4000-8000-%012x' "$number" "$number")
    folder=$work/projects/-home-me-$((number % 50))
    mkdir -p "$folder"
    sed "s/00000001-0000-4000-8000-000000000000/$session/; s/-0001-4000-8000-000000000001\"/$uuid\"/" \
      "$work/projects/-home-me-1/00000001-0000-4000-8000-000000000000.jsonl" >"$folder/$session.jsonl"
  done
  until_idle
  must_be 'rows' "$rows" "$((files * (LINES_OF_MB * $1 / files / 10 + 1)))"
  record 'history, one line in ten a turn' "$1 MB" "$seconds" "$peak_mb"
}

measure_single() { # MB
  fresh
  transcript mixed 1 $((LINES_OF_MB * $1))
  until_idle
  must_be 'rows' "$rows" "$((LINES_OF_MB * $1 / 10 + 1))"
  record 'one transcript' "$1 MB" "$seconds" "$peak_mb"
}

: >"$work/points"
for what in "${kinds[@]}"; do
  for times in 1 10; do
    case $what in
      pending) measure_pending $((pending * times)) ;;
      transcripts) measure_transcripts $((transcripts * times)) "$times" ;;
      history) measure_history $((history * times)) ;;
      single) measure_single $((single * times)) ;;
    esac
  done
done

# Two points of each kind, the second of ten times the work, as a rule.
table() {
  awk -F '\t' '
    { kind = $1 }
    kind in amount {
      ratio = seconds[kind] > 0 ? sprintf("%.2f", $3 / seconds[kind] / $5) : "-"
      printf "| %s | %s | %s | %s | %s | **%s** | %s | %s |\n", kind, amount[kind], $2, seconds[kind], $3, ratio, mb[kind], $4
    }
    { amount[kind] = $2; seconds[kind] = $3; mb[kind] = $4 }' "$work/points"
}
page() {
  local option=''
  [ "$size" = default ] || option=" --$size"
  cat <<MARKDOWN
\`scripts/bench.sh growth$option\`, which says what is measured. $(date -u +%Y-%m-%d),
$(getconf _NPROCESSORS_ONLN) processors, Linux $(uname -r | cut -d - -f 1), PostgreSQL $(sql 'SHOW server_version'), $("$watcher" --version).

Time must grow no faster than the work: "time / work" is about 1 or less. Memory must not grow.
Of the same lines in transcripts the work is the same, in ten times as many files: there it is the second time by the first.

| | amount | ten times | s | s | time / work | peak MB | peak MB |
|---|---|---|---|---|---|---|---|
$(table)
MARKDOWN
}
printf '\n'
page | tee "$work/page"
if [ -n "$whole" ]; then
  scripts/document-section.sh docs/benchmarks.md "scripts/bench.sh growth" "$work/page"
fi
