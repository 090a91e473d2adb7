#!/usr/bin/env bash
# Judges a run of scripts/soak.sh: every row accounted for, memory, descriptors and disk flat. Writes FOLDER/report.
#
# Usage: scripts/soak/judge.sh FOLDER        (of a run that was kept by SOAK_KEEP=1; scripts/soak.sh calls it by itself)
#
# Flat means, by samples taken every two seconds:
#   memory       of the one process of the calm third, without its first two fifths as warm-up (by then the queue has
#                moved to fresh files once): the median of the last third of the samples at most 10 % and 2 MB above that
#                of the first third
#   descriptors  the same, at most 8 more
#   disk         queue and data folder: the most of the run's last quarter at most 1.5 times that of its second quarter
#                and 64 MB
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
postgres=$root/scripts/dev-postgres.sh
work=${1:-}
if [ ! -f "$work/run" ]; then
  printf 'Usage: scripts/soak/judge.sh FOLDER\n' >&2
  exit 64
fi
# shellcheck source=/dev/null # MINUTES, SEED, PROFILE, DISK_WORD, CLOCK_WORD
. "$work/run"
watcher=${SOAK_WATCHER:-$work/bin/headspace-watcher}
sql() { "$postgres" psql "$work/postgres" -qAtX -v ON_ERROR_STOP=1 -c "$1"; }

problems=''
problem() {
  problems="$problems- $1
"
  printf 'WRONG: %s\n' "$1"
}
[ ! -f "$work/failed" ] || problem "the run: $(cat "$work/failed")"

# ---- every row accounted for -----------------------------------------------------------------------------------------

"$postgres" start "$work/postgres" >/dev/null

verify_word='not run: this build has no such command'
if "$watcher" verify --help >/dev/null 2>&1; then
  if "$watcher" --config "$work/config.yaml" verify >"$work/verify" 2>&1; then
    verify_word=$(tail -n 1 "$work/verify")
  else
    verify_word="exit $?: $(tail -n 1 "$work/verify")"
    problem "verify: $verify_word"
  fi
fi

# expect_none WHAT NUMBER
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

sql "COPY (SELECT r.event_id FROM events e JOIN headspace_watcher.event_receipts r ON r.row_id = e.id
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
  FULL JOIN headspace_watcher.event_receipts r ON r.row_id = e.id WHERE e.id IS NULL OR r.row_id IS NULL')"
rows=$(sql 'SELECT count(*) FROM events')
damaged=$(find "$work" -maxdepth 4 -path '*/queue/damaged-*' -prune | wc -l | tr -d ' ')
expect_none 'segments set aside as damaged' "$damaged"

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
      first = int(n * 2 / 5) + 1; count = n - first + 1; part = int(count / 3)
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
\`scripts/soak.sh\`, which says how it is judged. $(date -u +%Y-%m-%d), $MINUTES minutes, seed $SEED,
$(getconf _NPROCESSORS_ONLN) processors, Linux $(uname -r | cut -d - -f 1), PostgreSQL $(sql 'SHOW server_version'), $("$watcher" --version)
($PROFILE build).

$verdict

| **Load** | |
|---|---|
| turns written | $(fact turns) |
| bytes of transcripts | $(fact bytes) |
| sessions, of which copies of others | $(fact sessions), $(fact forks) |
| garbage lines | $(fact 'garbage lines') |
| events emitted, acknowledged and not | $(fact 'emitted, sure'), $(fact 'emitted, unsure') |
| hooks | $(fact hooks) |
| rows in \`events\` at the end | $rows |
| **Faults** | |
| kill -9 of the watcher | $(fact kills) |
| SIGSTOP of the watcher | $(fact pauses) |
| stops of the supervisor | $(fact stops) |
| backlogs of 140 MB and more, of which in several segments | $(fact backlogs), $(fact 'backlogs, in several segments') |
| Postgres: fast, immediate, kill -9 | $(fact 'postgres fast'), $(fact 'postgres immediate'), $(fact 'postgres kill -9') |
| full disks | ${DISK_WORD:-$(fact 'full disks')} |
| clock jumps | ${CLOCK_WORD:-$(fact 'clock jumps')} |
| restarts by the supervisor | $restarts |
| **After it** | |
| settled within | $(fact settled_seconds) s, of which 12 s must be quiet |
| stopped within | $(fact stop_milliseconds) ms |
| \`headspace-watcher verify\` | $verify_word |
| queues set aside as damaged | $damaged |
| **Flat: first, last** | |
| resident memory, calm third, $samples samples | $memory_before, $memory_after kB: $memory_slope kB a minute; peak of the whole run $(largest 3) kB |
| descriptors, calm third | $descriptors_before, $descriptors_after; most in the whole run $(largest 4) |
| queue on disk, second and last quarter | $queue_before, $queue_after kB |
| data folder, second and last quarter | $data_before, $data_after kB |
MARKDOWN
}
report >"$work/report"
cat "$work/report"
[ -z "$problems" ]
