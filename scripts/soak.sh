#!/usr/bin/env bash
# Everything at once, for long: load, kill -9, Postgres restarts, full disks, clock jumps; then every row is accounted for.
#
# Usage: scripts/soak.sh [MINUTES] [SEED]        (default: 30 minutes)
#
#   load     transcripts of 50 bytes to 1 MB a line, in pieces and in bursts, new sessions, copies of sessions, garbage;
#            events of `emit`, one at a time and in streams; hooks
#   faults   kill -9 and SIGSTOP of the watcher, stops of its supervisor (scripts/run-watcher.sh), Postgres stopped (fast,
#            immediate, kill -9), a full disk below the queue (needs root), the clock moved by up to a day (needs
#            Debian's package faketime). In the middle third only those that the watcher lives through
#   then     all must settle. `headspace-watcher verify` must find nothing missing. A reader that knows nothing of the
#            program compares the table with what the load wrote down: each turn, event and hook once, whole, each
#            file's turns in order
#   flat     by samples taken every two seconds:
#            memory       of the one process of the calm third, without its first fifth as warm-up: the median of the
#                         last third of the samples at most 10 % and 2 MB above that of the first third
#            descriptors  the same, at most 8 more
#            disk         queue and data folder: the most of the run's last quarter at most 1.5 times that of its second
#                         quarter and 64 MB
#
# SOAK_PROFILE names another cargo profile than release; SOAK_KEEP=1 keeps the folder of the run.
# Exit 0 when all of this holds. A run of 30 minutes or more writes its report to docs/soak.md.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
minutes=${1:-30} seed=${2:-$$$(date +%s)}
case $minutes$seed in
  *[!0-9.]* | *.*.*)
    printf 'Usage: scripts/soak.sh [MINUTES] [SEED]\n' >&2
    exit 64
    ;;
esac

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
  [ -z "$mounted" ] || umount "$work/disk" || true
  if [ -n "${SOAK_KEEP-}" ]; then printf 'kept: %s\n' "$work"; else rm -rf "$work"; fi
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

problems=''
problem() {
  problems="$problems- $1
"
  printf 'WRONG: %s\n' "$1"
}

# ---- the scene -------------------------------------------------------------------------------------------------------

# Stopped and started again, so it is none that `stop` would remove.
"$postgres" start "$work/postgres" >/dev/null
url=$("$postgres" url "$work/postgres")
sql() { "$postgres" psql "$work/postgres" -qAtX -v ON_ERROR_STOP=1 -c "$1"; }

mkdir -p "$work/projects" "$work/disk" "$work/bin"
# What is built meanwhile is another program.
cp "$built/headspace-watcher" "$built/examples/soak-drive" "$work/bin/"
queue=$work/data/queue
disk_word='SKIPPED (a small file system needs root)'
if mount -t tmpfs -o size=400m tmpfs "$work/disk" 2>/dev/null; then
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
  max_pending_bytes: 67108864
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
if wait "$driver"; then
  rm "$work/supervisor"
else
  problem "the run: $(tail -n 1 "$work/driver-error")"
fi
driver=''

# ---- every row accounted for -----------------------------------------------------------------------------------------

"$postgres" start "$work/postgres" >/dev/null

verify_word='not part of this program'
if "$SOAK_WATCHER" verify --help >/dev/null 2>&1; then
  if "$SOAK_WATCHER" --config "$work/config.yaml" verify >"$work/verify" 2>&1; then
    verify_word=$(tail -n 1 "$work/verify")
  else
    verify_word="exit $?: $(tail -n 1 "$work/verify")"
    problem "verify: $verify_word"
  fi
fi

# expect WHAT NUMBER: a number that must be 0.
expect_none() {
  [ "$2" = 0 ] || problem "$1: $2"
}

sql "COPY (SELECT payload->>'turn_uuid', length(payload->>'text'),
                  payload->>'text' LIKE (payload->>'turn_uuid') || '%.'
             FROM events WHERE event_type = 'turn_detected' ORDER BY id) TO STDOUT" >"$work/rows"
cat "$work"/ledger/turns-* >"$work/turns"
awk -F '\t' '
  FNR == NR {
    if ($1 in place) twice++
    place[$1] = FNR; size[$1] = $2
    if ($3 != "t") torn++
    next
  }
  {
    written[$2] = 1
    if (!($2 in place)) { missing++; next }
    if (size[$2] != $3) torn++
    if (place[$2] <= newest[$1]) disordered++
    newest[$1] = place[$2]
  }
  END {
    for (uuid in place) if (!(uuid in written)) unknown++
    printf "%d %d %d %d %d\n", missing, twice, unknown, torn, disordered
  }' "$work/rows" "$work/turns" >"$work/judged"
read -r missing twice unknown torn disordered <"$work/judged"
expect_none 'turns missing' "$missing"
expect_none 'turns stored twice' "$twice"
expect_none 'turns that nobody wrote' "$unknown"
expect_none 'turns that are not whole' "$torn"
expect_none 'turns out of order in their file' "$disordered"

sql "COPY (SELECT r.event_id FROM events e JOIN event_receipts r ON r.row_id = e.id
            WHERE e.event_type = 'state_transition') TO STDOUT" >"$work/rows"
awk -F '\t' '
  FNR == NR { rows[$1]++; if (rows[$1] > 1) twice++; next }
  { known[$1] = 1; if ($2 == "sure" && !($1 in rows)) missing++ }
  END { for (id in rows) if (!(id in known)) unknown++; printf "%d %d %d\n", missing, twice, unknown }
' "$work/rows" "$work/ledger/emitted" >"$work/judged"
read -r missing twice unknown <"$work/judged"
expect_none 'acknowledged events missing' "$missing"
expect_none 'events stored twice' "$twice"
expect_none 'events that nobody emitted' "$unknown"

sql "COPY (SELECT payload->>'tool_use_id' FROM events WHERE event_type = 'hook_received') TO STDOUT" | sort >"$work/rows"
sort "$work/ledger/hooks" >"$work/hooks"
expect_none 'hooks missing, twice or unknown' "$(diff "$work/rows" "$work/hooks" | grep -c '^[<>]' || true)"

sql "COPY (SELECT payload->>'session_uuid' FROM events WHERE event_type = 'session_registered') TO STDOUT" |
  sort >"$work/rows"
cut -f 1 "$work/turns" | sort -u | sed 's|.*/||; s|\.jsonl$||' | sort >"$work/sessions"
expect_none 'sessions registered twice' "$(uniq -d "$work/rows" | wc -l | tr -d ' ')"
expect_none 'sessions with turns that are not registered' "$(sort -u "$work/rows" | comm -13 - "$work/sessions" | wc -l | tr -d ' ')"
expect_none 'ends of sessions told twice' "$(sql "SELECT count(*) FROM (SELECT FROM events
  WHERE event_type = 'session_ended' GROUP BY payload->>'session_uuid', payload->>'last_activity_at' HAVING count(*) > 1) t")"
expect_none 'rows without receipt or receipts without row' "$(sql 'SELECT count(*) FROM events e
  FULL JOIN event_receipts r ON r.row_id = e.id WHERE e.id IS NULL OR r.row_id IS NULL')"
rows=$(sql 'SELECT count(*) FROM events')
damaged=$(find "$work" -maxdepth 3 -name 'queue.damaged-*' | wc -l | tr -d ' ')
expect_none 'queues set aside as damaged' "$damaged"

# ---- flat ------------------------------------------------------------------------------------------------------------

# Medians of the first and the last third, and the slope a minute, of column $1 of the calm samples.
calm() {
  awk -F '\t' -v column="$1" '
    $7 == 1 { if ($2 != pid) { n = 0; pid = $2 } n++; time[n] = $1; value[n] = $column }
    function median(from, to,   i, j, sorted, count, swap) {
      for (i = from; i <= to; i++) {
        sorted[++count] = value[i]
        for (j = count; j > 1 && sorted[j] < sorted[j - 1]; j--) { swap = sorted[j]; sorted[j] = sorted[j - 1]; sorted[j - 1] = swap }
      }
      return sorted[int((count + 1) / 2)]
    }
    END {
      first = int(n / 5) + 1; count = n - first + 1; part = int(count / 3)
      if (part < 10) { print "0 0 0 0"; exit }
      for (i = first; i <= n; i++) { t += time[i]; v += value[i] }
      t /= count; v /= count
      for (i = first; i <= n; i++) { above += (time[i] - t) * (value[i] - v); below += (time[i] - t) ^ 2 }
      printf "%d %d %d %.1f\n", count, median(first, first + part - 1), median(n - part + 1, n), below ? above / below * 60 : 0
    }' "$work/samples"
}
# The most of the second and of the last quarter of the run, of column $1.
quarters() {
  awk -F '\t' -v column="$1" '
    { time[NR] = $1; value[NR] = $column }
    END {
      end = time[NR]
      for (i = 1; i <= NR; i++) {
        quarter = int(time[i] * 4 / (end + 1)) + 1
        if (value[i] > most[quarter]) most[quarter] = value[i]
      }
      printf "%d %d\n", most[2], most[4]
    }' "$work/samples"
}
largest() { awk -F '\t' -v column="$1" '$column > most { most = $column } END { print most + 0 }' "$work/samples"; }

read -r samples memory_before memory_after memory_slope < <(calm 3)
read -r _ descriptors_before descriptors_after _ < <(calm 4)
read -r queue_before queue_after < <(quarters 5)
read -r data_before data_after < <(quarters 6)
if [ "$samples" -eq 0 ]; then
  printf 'memory and descriptors: too few samples to judge\n'
else
  [ "$memory_after" -le $((memory_before * 110 / 100 + 2048)) ] ||
    problem "memory grows: $memory_before kB, later $memory_after kB"
  [ "$descriptors_after" -le $((descriptors_before + 8)) ] ||
    problem "descriptors grow: $descriptors_before, later $descriptors_after"
  [ "$queue_after" -le $((queue_before * 3 / 2 + 65536)) ] || problem "the queue's files grow: $queue_before kB, later $queue_after kB"
  [ "$data_after" -le $((data_before * 3 / 2 + 65536)) ] || problem "the data folder grows: $data_before kB, later $data_after kB"
fi

# ---- the report ------------------------------------------------------------------------------------------------------

touch "$work/facts"
fact() { awk -F '\t' -v name="$1" '$1 == name { found = $2 } END { print found + 0 }' "$work/facts"; }
restarts=$(grep -c '"message":"[^"]*restart' "$work/log" || true)
verdict='Everything holds.'
[ -z "$problems" ] || verdict="**Wrong:**

$problems"
report() {
  cat <<MARKDOWN
# Soak

The last report of \`scripts/soak.sh\`, which says how it is judged. $(date -u +%Y-%m-%d), $minutes minutes, seed $seed,
$(getconf _NPROCESSORS_ONLN) processors, Linux $(uname -r), PostgreSQL $(sql 'SHOW server_version'), $("$SOAK_WATCHER" --version)
($profile build).

$verdict

| Load | |
|---|---|
| turns written | $(fact turns) |
| bytes of transcripts | $(fact bytes) |
| sessions, of which copies of others | $(fact sessions), $(fact forks) |
| garbage lines | $(fact 'garbage lines') |
| events emitted, acknowledged and not | $(fact 'emitted, sure'), $(fact 'emitted, unsure') |
| hooks | $(fact hooks) |
| rows in \`events\` at the end | $rows |

| Faults | |
|---|---|
| kill -9 of the watcher | $(fact kills) |
| SIGSTOP of the watcher | $(fact pauses) |
| stops of the supervisor | $(fact stops) |
| Postgres: fast, immediate, kill -9 | $(fact 'postgres fast'), $(fact 'postgres immediate'), $(fact 'postgres kill -9') |
| full disks | ${disk_word:-$(fact 'full disks')} |
| clock jumps | ${clock_word:-$(fact 'clock jumps')} |
| restarts by the supervisor | $restarts |

| After it | |
|---|---|
| settled within | $(fact settled_seconds) s, of which 12 s must be quiet |
| stopped within | $(fact stop_milliseconds) ms |
| \`headspace-watcher verify\` | $verify_word |
| queues set aside as damaged | $damaged |

| Flat | first | last | |
|---|---|---|---|
| resident memory, calm third, $samples samples | $memory_before kB | $memory_after kB | $memory_slope kB a minute; peak of the whole run $(largest 3) kB |
| descriptors, calm third | $descriptors_before | $descriptors_after | most in the whole run $(largest 4) |
| queue on disk, second and last quarter | $queue_before kB | $queue_after kB | |
| data folder, second and last quarter | $data_before kB | $data_after kB | |
MARKDOWN
}
report >"$work/report"
cat "$work/report"
if awk -v minutes="$minutes" 'BEGIN { exit !(minutes >= 30) }'; then cp "$work/report" docs/soak.md; fi
[ -z "$problems" ]
