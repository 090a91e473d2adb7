#!/usr/bin/env bash
# many watchers with queues of their own into one database: their rate together beside that of a single one
#
# Usage: scripts/bench.sh fleet [--quick] [WATCHERS] [EVENTS]      (default: 32 watchers, 160,000 events in all)
#
#   single    one watcher, all events in one transcript, from its start until all is in Postgres
#   fleet     the same number of events, shared by so many watchers that start together, each with transcript, queue and
#             host name (database.host_name) of its own
#
# The rate is events by the time from the first window sent to the last (event_receipts.delivered_at). Both take turns;
# what counts is the median of the fleet's rates by the best of the single one's. Aim: 0.9 or more. All of them run on
# this one machine, so the fleet pays for its processes here too.
#
# Checked after each round: each event once, each watcher's rows in the order of its transcript. Measured on the way: the
# most connections of a watcher at one time (at most 2), and the resident memory of all together.
# With --quick 4 watchers, 8,000 events and one round, to see that everything works.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd "$root"
rounds=3 watchers=32 events=160000
numbers=()
for argument in "$@"; do
  if [ "$argument" = --quick ]; then rounds=1 watchers=4 events=8000; else numbers+=("$argument"); fi
done
watchers=${numbers[0]:-$watchers} events=${numbers[1]:-$events}
case $watchers$events in
  *[!0-9]*)
    printf 'Usage: scripts/bench.sh fleet [--quick] [WATCHERS] [EVENTS]\n' >&2
    exit 64
    ;;
esac
each=$((events / watchers))
events=$((each * watchers))

command -v cargo >/dev/null 2>&1 || PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
cargo build --release --locked --quiet --bin headspace-watcher
watcher=$root/target/release/headspace-watcher
postgres=$root/scripts/dev-postgres.sh

mkdir -p target
# The path of a socket may not be long.
work=$(mktemp -d "$root/target/fleet.XXXXXX") sockets=$(mktemp -d /tmp/hw-fleet.XXXXXX)
cluster='' sampler=''
running=()
clean_up() {
  trap '' INT TERM HUP
  [ -z "$sampler" ] || kill "$sampler" 2>/dev/null || true
  [ ${#running[@]} -eq 0 ] || kill "${running[@]}" 2>/dev/null || true
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
median() { sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }

# transcript NUMBER LINES: prompts of 0.9 kB, each with a uuid of its own.
transcript() {
  awk -v number="$1" -v lines="$2" 'BEGIN {
    for (i = 0; i < 8; i++) text = text "The drainer takes the oldest envelopes out of the queue and hands them to the sink. "
    for (i = 1; i <= lines; i++)
      printf "{\"parentUuid\":null,\"isSidechain\":false,\"type\":\"user\",\"message\":{\"role\":\"user\",\"content\":\"%s\"}," \
        "\"uuid\":\"%08x-%04x-4000-8000-000000000000\",\"timestamp\":\"2026-01-02T03:04:05.678Z\",\"cwd\":\"/home/me/app\"," \
        "\"sessionId\":\"%08x-0000-4000-8000-000000000000\",\"version\":\"2.1.219\"}\n", text, i, number, number
  }'
}

# scene NAME NUMBER LINES: a folder for one watcher.
scene() {
  local folder=$work/$1
  mkdir -p "$folder/projects/-home-me-app"
  transcript "$2" "$3" >"$folder/projects/-home-me-app/$(printf '%08x' "$2")-0000-4000-8000-000000000000.jsonl"
  printf 'claude: {projects_path: projects}\nhttp: {listen: null, socket: %s}\nfile_watcher: {inactivity_timeout: 3153600000}\ndatabase: {host_name: %s, url: "%s&application_name=%s"}\n' \
    "$sockets/$1" "$1" "$url" "$1" >"$folder/config.yaml"
}

# Samples until it is killed: connections of the watcher that has most, and kB of all watchers together.
sample() {
  local pids
  while :; do
    sql "SELECT coalesce(max(n), 0) FROM (SELECT count(*) AS n FROM pg_stat_activity
          WHERE application_name ~ '^w[0-9]+$' GROUP BY application_name) t" >>"$work/connections" || true
    pids=$(IFS=,; printf '%s' "$*")
    ps -o rss= -p "$pids" | awk '{ sum += $1 } END { print sum + 0 }' >>"$work/memory" || true
    sleep 0.2
  done
}

# together NAME...: runs these watchers until all is delivered, and prints their rate together.
together() {
  local name pid
  for name in "$@"; do
    rm -rf "$work/$name/data"
    "$watcher" --config "$work/$name/config.yaml" --log-level warn run --until-idle 2>>"$work/log" &
    running+=($!)
  done
  sample "${running[@]}" &
  sampler=$!
  for pid in "${running[@]}"; do
    wait "$pid" || { printf 'a watcher failed: %s\n' "$(tail -n 1 "$work/log")" >&2; exit 1; }
  done
  running=()
  kill "$sampler" && { wait "$sampler" 2>/dev/null || true; }
  sampler=''
  check $#
  sql "SELECT round(count(*) / extract(epoch FROM max(delivered_at) - min(delivered_at))) FROM headspace_watcher.event_receipts" >"$work/rate"
}

# check WATCHERS: every event once, and in order.
check() {
  local found
  found=$(sql "SELECT count(*), count(DISTINCT payload->>'turn_uuid') FROM events WHERE event_type = 'turn_detected'")
  [ "$found" = "$events|$events" ] || { printf 'rows and distinct turns: %s, not %s\n' "$found" "$events" >&2; exit 1; }
  found=$(sql "SELECT count(*) FROM (SELECT byte_offset < lag(byte_offset) OVER (PARTITION BY source_id ORDER BY row_id)
                 AS is_back FROM headspace_watcher.event_receipts) t WHERE is_back")
  [ "$found" = 0 ] || { printf '%s rows are out of their order\n' "$found" >&2; exit 1; }
  found=$(sql "SELECT count(DISTINCT host) FROM headspace_watcher.event_sources")
  [ "$found" = "$1" ] || { printf '%s host names, not %s\n' "$found" "$1" >&2; exit 1; }
}

names=()
for number in $(seq "$watchers"); do
  scene "w$number" "$number" "$each"
  names+=("w$number")
done
scene w0 65535 "$events"
# Makes the tables, and warms everything up.
"$watcher" --config "$work/w1/config.yaml" --log-level warn run --until-idle

printf '%d watchers, %d events in all, PostgreSQL %s, %d processors\n' "$watchers" "$events" "$(sql 'SHOW server_version')" \
  "$(getconf _NPROCESSORS_ONLN)"
: >"$work/single" && : >"$work/fleet"
for round in $(seq "$rounds"); do
  for what in single fleet; do
    sql 'TRUNCATE events, headspace_watcher.event_receipts, headspace_watcher.event_sources'
    sql 'CHECKPOINT'
    : >"$work/connections" && : >"$work/memory"
    if [ "$what" = single ]; then together w0; else together "${names[@]}"; fi
    rate=$(cat "$work/rate")
    echo "$rate" >>"$work/$what"
    connections=$(sort -n "$work/connections" | tail -n 1) memory=$(sort -n "$work/memory" | tail -n 1)
    printf 'round %d: %-6s %6d events/s, at most %d connections of one watcher, %d MB resident in all\n' \
      "$round" "$what" "$rate" "$connections" "$((memory / 1024))"
    [ "$connections" -le 2 ] || { printf 'more than 2 connections of one watcher\n' >&2; exit 1; }
  done
done
single=$(sort -n "$work/single" | tail -n 1) fleet=$(median <"$work/fleet")
printf '\nsingle, best    %8d events/s\n' "$single"
printf 'fleet, median   %8d events/s\n' "$fleet"
printf 'tables, indexes and receipts: %d bytes on the server for each event of 0.9 kB\n' "$(sql "SELECT
  (pg_total_relation_size('events') + pg_total_relation_size('headspace_watcher.event_receipts')) / count(*) FROM events")"
printf 'fleet : single  %8s   (aim 0.9)\n' "$(awk -v f="$fleet" -v s="$single" 'BEGIN { printf "%.2f", f / s }')"
