#!/usr/bin/env bash
# The real Codex CLI, of the newest version, against the watcher: what was typed is in the table, and nothing else.
#
# Usage: scripts/real-client-codex.sh [DRIVER_FOLDER]      (../shared/real-client/codex beside the checkout when not given)
#
# As scripts/real-client.sh does it for Claude Code: driven through what a person does (exec, resume, typed, steered, stopped,
# /fork, /compact, /new) without the internet while a watcher runs, then read once more into another database. Ends with 0
# when all is there, 1 when not, and 75, with the reason, where it can't be tried.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
driver=${1:-$root/../shared/real-client/codex}
postgres=$root/scripts/dev-postgres.sh
tools=$root/target/real-client

skip() {
  printf 'real-client: SKIPPED: %s\n' "$1" >&2
  exit 75
}

[ -f "$driver/drive.py" ] || skip "there is no $driver/drive.py"
driver=$(cd "$driver" && pwd -P)
[ "$(id -u)" -eq 0 ] || skip "it takes root, for a network of its own"
for needed in npm python3 tmux git ip unshare nsenter; do
  command -v "$needed" >/dev/null 2>&1 || skip "$needed is not installed"
done
unshare -n true 2>/dev/null || skip "no network namespace can be made here"

mkdir -p "$tools"
client() { find "$tools/node_modules/@openai" -path '*/vendor/*/bin/codex' -type f -perm -u+x 2>/dev/null | head -n 1; }
npm install --prefix "$tools" --ignore-scripts --no-audit --no-fund --loglevel error @openai/codex@latest >&2 ||
  [ -n "$(client)" ] || skip "npm could not install the client"
client=$(client)
[ -n "$client" ] || skip "the package has no program for this platform"
version=$("$client" --version </dev/null 2>/dev/null | head -n 1) || skip "the client does not run here"

command -v cargo >/dev/null 2>&1 || PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
program=${HEADSPACE_WATCHER_BIN-}
if [ -z "$program" ]; then
  cargo build --locked --quiet
  program=${CARGO_TARGET_DIR:-$root/target}/debug/headspace-watcher
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/real-client.XXXXXX")
cluster='' watcher=''
clean_up() {
  trap '' INT TERM HUP
  [ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true
  [ -z "$cluster" ] || "$postgres" stop "$cluster" >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

cluster=$("$postgres" start --throwaway)
live=$("$postgres" url "$cluster")
mkdir -p "$work/home"

# Whatever is configured outside has no say.
headspace() { # DATABASE_URL FOLDER ARGUMENT...
  local url=$1 folder=$2
  shift 2
  env -i PATH="$PATH" HOME="$work/home" DATABASE_URL="$url" "$program" --config "$folder/config.yaml" "$@"
}
configure() { # FOLDER
  mkdir -p "$1"
  printf 'queue: {path: data/queue, spool_path: data/spool}\nhttp: {listen: null, socket: data/watcher.sock}\n' >"$1/config.yaml"
}
wrong=0
judge() { # WHAT CONDITION_STATUS
  if [ "$2" -eq 0 ]; then
    printf 'real-client: %s: fine\n' "$1"
  else
    printf 'real-client: %s: WRONG\n' "$1"
    wrong=1
  fi
}
compare() { # WHAT DATABASE
  local status=0
  # Of what was typed into a running turn the driver says no more than of any other.
  "$postgres" psql "$cluster" -d "$2" -XqAt -v ON_ERROR_STOP=1 -c "
    SELECT jsonb_build_object('kind', 'prompt', 'text', payload->>'text') FROM events
     WHERE event_type = 'turn_detected' AND payload->>'actor' = 'user' ORDER BY id" >"$work/turns.jsonl"
  "$driver/../compare.py" "$work/typed.jsonl" "$work/turns.jsonl" || status=$?
  judge "$1" "$status"
}
# Each turn's identity and session, for the comparison of two databases.
identities() { # DATABASE
  "$postgres" psql "$cluster" -d "$1" -XqAt -v ON_ERROR_STOP=1 -c "
    SELECT payload->>'turn_uuid', payload->>'session_uuid', payload->>'agent' FROM events
     WHERE event_type = 'turn_detected' ORDER BY 1"
}

printf 'real-client: %s\n' "$version"
configure "$work/live"
(exec env -i PATH="$PATH" HOME="$work/home" DATABASE_URL="$live" "$program" --config "$work/live/config.yaml" run) \
  >"$work/watcher.log" 2>&1 &
watcher=$!
# A model that its catalogue does not know: of those it knows it may ask, at any moment, to go over to a newer one.
printf '#!/bin/sh\nexec %q -c model=mock "$@"\n' "$client" >"$work/client"
chmod +x "$work/client"
"$driver/drive.py" "$work" --client "$work/client" >"$work/drive.log" 2>&1 || {
  tail -n 60 "$work/drive.log" >&2
  skip "the client could not be driven to the end: a dialog may have changed, or the machine is too slow"
}
status=0
headspace "$live" "$work/live" status --json >/dev/null || status=$?
judge "the watcher runs" "$status"
kill "$watcher"
wait "$watcher" || true
watcher=''
headspace "$live" "$work/live" run --until-idle >"$work/idle.log" 2>&1
compare "live" headspace
status=0
headspace "$live" "$work/live" verify || status=$?
judge "verify" "$status"

"$postgres" psql "$cluster" -XqAt -v ON_ERROR_STOP=1 -c 'CREATE DATABASE again' >/dev/null
again=${live/\/headspace?/\/again?}
configure "$work/again"
headspace "$again" "$work/again" run --until-idle >"$work/again.log" 2>&1
compare "read once more" again
status=0
diff <(identities headspace) <(identities again) || status=1
judge "each turn under the same identity and session as live" "$status"
unknown=$(find "$work/home/.codex/sessions" -name '*.jsonl' -exec env -i HOME="$work/home" "$program" --config "$work/again/config.yaml" \
  explain --json {} \; | grep -c '"unknown":' || true)
status=0
[ "$unknown" = 0 ] || status=1
judge "lines with something unknown: $unknown" "$status"
[ "$wrong" -eq 0 ]
