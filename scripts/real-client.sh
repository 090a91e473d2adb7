#!/usr/bin/env bash
# The real Claude Code, of the newest version, against the watcher: what was typed is in the table, and nothing else.
#
# Usage: scripts/real-client.sh [DRIVER_FOLDER]      (../shared/real-client beside the checkout when not given)
#
# DRIVER_FOLDER/drive.py drives the client through what a person does, without the internet, and writes down what was typed;
# compare.py there holds turns against that. Live, with hooks and a running watcher; then the transcripts are read once more
# into another database. In which session each prompt was typed the client says itself, to its hook. The client comes from npm and is kept in target/real-client. Ends with 0 when all is there, 1 when
# not, and 75, with the reason, where it can't be tried.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
driver=${1:-$root/../shared/real-client}
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
# A network of its own may be forbidden in a container.
unshare -n true 2>/dev/null || skip "no network namespace can be made here"

mkdir -p "$tools"
# The package of this platform; its wrapper's install script would only copy the program out of it.
client() { find "$tools/node_modules/@anthropic-ai" -path '*/claude-code-*/claude' -type f -perm -u+x 2>/dev/null | head -n 1; }
npm install --prefix "$tools" --ignore-scripts --no-audit --no-fund --loglevel error \
  "@anthropic-ai/claude-code@latest" >&2 || [ -n "$(client)" ] || skip "npm could not install the client"
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
sql() { "$postgres" psql "$cluster" -XqAt -v ON_ERROR_STOP=1 "$@"; }

# Whatever is configured outside has no say.
headspace() { # DATABASE_URL FOLDER ARGUMENT...
  local url=$1 folder=$2
  shift 2
  env -i PATH="$PATH" HOME="$work/home" DATABASE_URL="$url" "$program" --config "$folder/config.yaml" "$@"
}
configure() { # FOLDER
  mkdir -p "$1"
  cat >"$1/config.yaml" <<YAML
claude: {projects_path: $work/home/.claude/projects}
queue: {path: data/queue, spool_path: data/spool}
http: {listen: null, socket: data/watcher.sock}
hooks: {capture: full}
YAML
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
turns="SELECT jsonb_build_object('kind', payload->>'kind', 'text', payload->>'text') FROM events
        WHERE event_type = 'turn_detected' AND payload->>'actor' = 'user' ORDER BY id"
sessions="SELECT payload->>'turn_uuid', payload->>'session_uuid' FROM events WHERE event_type = 'turn_detected' ORDER BY 1"
# Prompts of which the hook names another session than the turns of that text have, and all that can be compared.
elsewhere="WITH turns AS (SELECT payload->>'text' AS said, array_agg(payload->>'session_uuid') AS sessions FROM events
                          WHERE event_type = 'turn_detected' AND payload->>'actor' = 'user' GROUP BY 1)
           SELECT count(*) FILTER (WHERE h.payload->>'claude_session_id' <> ALL (sessions)) || ' of ' || count(*)
             FROM events h JOIN turns ON said = h.payload#>>'{data,prompt}'
            WHERE h.payload->>'hook_type' = 'UserPromptSubmit'"

printf 'real-client: Claude Code %s\n' "$version"
configure "$work/live"
headspace "$live" "$work/live" hooks install --settings "$work/settings.json" >/dev/null
# exec: what is ended below is the watcher itself.
(exec env -i PATH="$PATH" HOME="$work/home" DATABASE_URL="$live" "$program" --config "$work/live/config.yaml" run) \
  >"$work/watcher.log" 2>&1 &
watcher=$!
drive() { "$driver/drive.py" "$work" --client "$client" --settings "$work/settings.json" >"$work/drive.log" 2>&1; }
drive || {
  tail -n 60 "$work/drive.log" >&2
  skip "the client could not be driven to the end: a dialog may have changed, or the machine is too slow"
}
for ((second = 0; second < 30; second++)); do
  pending=$(headspace "$live" "$work/live" status --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["queue"]["pending"])')
  [ "$pending" = 0 ] && break
  sleep 1
done
status=0
sql -c "$turns" >"$work/live.jsonl"
"$driver/compare.py" "$work/typed.jsonl" "$work/live.jsonl" || status=$?
judge "live" "$status"
status=0
headspace "$live" "$work/live" verify || status=$?
judge "verify" "$status"
status=0
others=$(sql -c "$elsewhere")
[[ $others == '0 of '[1-9]* ]] || status=1
judge "prompts in another session than their hook's: $others" "$status"
# Each of the client's own hooks leaves an event: at least one for each prompt, each begin and each end.
hooks=$(sql -c "SELECT count(DISTINCT payload->>'hook_type') FROM events WHERE event_type = 'hook_received'")
letters=$(headspace "$live" "$work/live" status --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["queue"]["dead_letters"])')
status=0
[ "$hooks" -ge 5 ] && [ "$letters" = 0 ] || status=1
judge "hooks ($hooks kinds, $letters dead letters)" "$status"
kill "$watcher"
wait "$watcher" || true
watcher=''

sql -c 'CREATE DATABASE again' >/dev/null
again=${live/\/headspace?/\/again?}
configure "$work/again"
headspace "$again" "$work/again" run --until-idle >"$work/again.log" 2>&1
"$postgres" psql "$cluster" -d again -XqAt -v ON_ERROR_STOP=1 -c "$turns" >"$work/again.jsonl"
status=0
"$driver/compare.py" "$work/typed.jsonl" "$work/again.jsonl" || status=$?
judge "read once more" "$status"
status=0
sql -c "$sessions" >"$work/live.sessions"
"$postgres" psql "$cluster" -d again -XqAt -v ON_ERROR_STOP=1 -c "$sessions" >"$work/again.sessions"
diff "$work/live.sessions" "$work/again.sessions" || status=1
judge "each turn in the same session as live" "$status"
unknown=$(find "$work/home/.claude/projects" -name '*.jsonl' -exec env -i HOME="$work/home" "$program" --config "$work/again/config.yaml" \
  explain --json {} \; | grep -c '"reason":"unknown type"' || true)
status=0
[ "$unknown" = 0 ] || status=1
judge "lines of unknown types: $unknown" "$status"
[ "$wrong" -eq 0 ]
