#!/usr/bin/env bash
# how fast a backlog is drained, beside pgbench and a BEGIN/INSERT/COMMIT loop on the same server and table
#
# Usage: scripts/bench.sh drain [--quick]
#
#   drain     the program's own queue, sink and drainer, one lane, in order, each event exactly once and durable before
#             it leaves the queue
#   pgbench   the best of 1, 4 and 16 clients with single INSERTs as fast as they go: prepared, the payload a parameter,
#             synchronous_commit off, nothing promised
#   loop      BEGIN, INSERT, COMMIT in turn on one connection, with the server's own settings
#   single    with an empty queue, 100 events a second: from append to visible in another connection; and from durable in
#             the queue to acknowledged by Postgres
#
# Rates are medians of rounds in which all take turns, so that a busy machine is busy for all; what counts is the ratio.
# With --quick one small round, to see that everything works.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd "$root"
rounds=5 events=100000 seconds=8 loop=4000 single=1000 million=1000000
case ${1-} in
  '') ;;
  --quick) rounds=1 events=20000 seconds=2 loop=500 single=100 million=100000 ;;
  *)
    printf 'Usage: scripts/bench.sh drain [--quick]\n' >&2
    exit 64
    ;;
esac

command -v cargo >/dev/null 2>&1 || PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
cargo build --release --locked --quiet --example bench-drain
bench=$root/target/release/examples/bench-drain
postgres=$root/scripts/dev-postgres.sh
bin=$("$postgres" bin)

work=$(mktemp -d)
cluster=''
clean_up() {
  trap '' INT TERM HUP
  [ -z "$cluster" ] || "$postgres" stop "$cluster" >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
cluster=$("$postgres" start --throwaway)
url=$("$postgres" url "$cluster")

sql() { "$bin/psql" "$url" -qAtX -v ON_ERROR_STOP=1 -c "$1"; }
median() { sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }
# Every run begins with an empty table of the same shape, after a checkpoint.
fresh() { sql 'TRUNCATE events, event_receipts' && sql 'CHECKPOINT'; }

payload=$("$bench" payload)
cat >"$work/insert.sql" <<'SQL'
INSERT INTO events ("timestamp", event_type, payload) VALUES (now(), 'turn_detected', :payload::jsonb);
SQL

# Makes the tables, and warms everything up.
"$bench" fill "$work/warm" 2000
"$bench" drain "$work/warm" "$url" 256 >/dev/null

printf '%d bytes of payload, %d indexes, PostgreSQL %s, %d processors\n' "${#payload}" \
  "$(sql "SELECT count(*) FROM pg_indexes WHERE tablename = 'events'")" "$(sql 'SHOW server_version')" \
  "$(getconf _NPROCESSORS_ONLN)"

: >"$work/drain" && : >"$work/loop" && : >"$work/ratio"
for clients in 1 4 16; do : >"$work/pgbench-$clients"; done
for round in $(seq "$rounds"); do
  "$bench" fill "$work/queue-$round" "$events"
  fresh
  drained=$("$bench" drain "$work/queue-$round" "$url" 256)
  rm -rf "$work/queue-$round"
  drained=${drained% *}
  echo "$drained" >>"$work/drain"
  best=0
  for clients in 1 4 16; do
    fresh
    rate=$(PGOPTIONS='-c synchronous_commit=off' "$bin/pgbench" -n -M prepared -c "$clients" -j 2 -T "$seconds" \
      -f "$work/insert.sql" -D "payload=$payload" "$url" 2>/dev/null | awk '/^tps/ { printf "%.0f", $3 }')
    echo "$rate" >>"$work/pgbench-$clients"
    [ "$rate" -le "$best" ] || best=$rate
  done
  fresh
  looped=$("$bench" loop "$url" "$loop")
  echo "$looped" >>"$work/loop"
  awk -v d="$drained" -v p="$best" -v l="$looped" 'BEGIN { printf "%.2f %.1f\n", d / p, d / l }' >>"$work/ratio"
  printf 'round %d: drain %s, pgbench at its best %s, loop %s events/s\n' "$round" "$drained" "$best" "$looped"
done
fresh
read -r visible_50 visible_99 acknowledged_50 acknowledged_99 <<<"$("$bench" single "$work/single" "$url" "$single")"

"$bench" fill "$work/million" "$million"
fresh
read -r million_rate million_kib <<<"$("$bench" drain "$work/million" "$url" 256)"

printf '\ndrain                    %8d events/s\n' "$(median <"$work/drain")"
for clients in 1 4 16; do
  printf 'pgbench, %2d clients      %8d events/s\n' "$clients" "$(median <"$work/pgbench-$clients")"
done
printf 'loop                     %8d events/s\n' "$(median <"$work/loop")"
printf 'drain : pgbench          %8s   (median of rounds; aim 0.8, least 0.6)\n' \
  "$(awk '{ print $1 }' "$work/ratio" | median)"
printf 'drain : loop             %8s   (median of rounds; least 8)\n' "$(awk '{ print $2 }' "$work/ratio" | median)"
printf 'draining %8d         %8d events/s, peak memory %d MB\n' "$million" "$million_rate" "$((million_kib / 1024))"
printf 'append to visible        p50 %d µs, p99 %d µs\n' "$visible_50" "$visible_99"
printf 'durable to acknowledged  p50 %d µs, p99 %d µs\n' "$acknowledged_50" "$acknowledged_99"
