#!/usr/bin/env bash
# The real Codex CLI, of the newest version, against the watcher: what was typed is in the table, and nothing else.
#
# Usage: scripts/real-client-codex.sh [DRIVER_FOLDER]      (../shared/real-client/codex beside the checkout when not given)
#
# As scripts/real-client.sh does it for Claude Code: driven through what a person does (exec, resume, typed, steered, stopped,
# /fork, /compact, /new) without the internet while a watcher runs, then read once more into another database. Ends with 0
# when all is there, 1 when not, and 75, with the reason, where it can't be tried.
set -euo pipefail

# shellcheck source=scripts/real-client-common.sh
. "$(dirname "${BASH_SOURCE[0]}")/real-client-common.sh"

find_driver "${1:-$root/../shared/real-client/codex}"
install_client @openai/codex '*/@openai/*/vendor/*/bin/codex'
prepare
mkdir -p "$work/home"

configure() { # FOLDER
  mkdir -p "$1"
  printf 'queue: {path: data/queue, spool_path: data/spool}\nhttp: {listen: null, socket: data/watcher.sock}\n' >"$1/config.yaml"
}
compare() { # WHAT DATABASE
  local status=0
  # Of what was typed into a running turn the driver says no more than of any other.
  sql -d "$2" -c "
    SELECT jsonb_build_object('kind', 'prompt', 'text', payload->>'text') FROM events
     WHERE event_type = 'turn_detected' AND payload->>'actor' = 'user' ORDER BY id" >"$work/turns.jsonl"
  "$driver/../compare.py" "$work/typed.jsonl" "$work/turns.jsonl" || status=$?
  judge "$1" "$status"
}
# Each turn's identity and session, for the comparison of two databases.
identities() { # DATABASE
  sql -d "$1" -c "
    SELECT payload->>'turn_uuid', payload->>'session_uuid', payload->>'agent' FROM events
     WHERE event_type = 'turn_detected' ORDER BY 1"
}

printf 'real-client: %s\n' "$version"
configure "$work/live"
start_watcher
# A model that its catalogue does not know: of those it knows it may ask, at any moment, to go over to a newer one.
printf '#!/bin/sh\nexec %q -c model=mock "$@"\n' "$client" >"$work/client"
chmod +x "$work/client"
drive "$work/client"
status=0
headspace "$live" "$work/live" status --json >/dev/null || status=$?
judge "the watcher runs" "$status"
stop_watcher
headspace "$live" "$work/live" run --until-idle >"$work/idle.log" 2>&1
compare "live" headspace
status=0
headspace "$live" "$work/live" verify || status=$?
judge "verify" "$status"

read_again
compare "read once more" again
status=0
diff <(identities headspace) <(identities again) || status=1
judge "each turn under the same identity and session as live" "$status"
unknown=$(explained "$work/home/.codex/sessions" '"unknown":')
status=0
[ "$unknown" = 0 ] || status=1
judge "lines with something unknown: $unknown" "$status"
[ "$wrong" -eq 0 ]
