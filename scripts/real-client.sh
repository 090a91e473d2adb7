#!/usr/bin/env bash
# The real Claude Code, of the newest version, against the watcher: what was typed is in the table, and nothing else.
#
# Usage: scripts/real-client.sh [DRIVER_FOLDER]      (../shared/real-client beside the checkout when not given)
#
# DRIVER_FOLDER/drive.py drives the client through what a person does, without the internet, and writes down what was typed;
# compare.py there holds turns against that. Live, with hooks and a running watcher; then the transcripts are read once more
# into another database. In which session each prompt was typed the client says itself, to its hook. The client comes from
# npm and is kept in target/real-client. Ends with 0 when all is there, 1 when not, and 75, with the reason, where it can't
# be tried.
set -euo pipefail

# shellcheck source=scripts/real-client-common.sh
. "$(dirname "${BASH_SOURCE[0]}")/real-client-common.sh"

find_driver "${1:-$root/../shared/real-client}"
install_client @anthropic-ai/claude-code '*/@anthropic-ai/claude-code-*/claude'
prepare

configure() { # FOLDER
  mkdir -p "$1"
  cat >"$1/config.yaml" <<YAML
claude: {projects_path: $work/home/.claude/projects}
queue: {path: data/queue, spool_path: data/spool}
http: {listen: null, socket: data/watcher.sock}
hooks: {capture: full}
YAML
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
start_watcher
drive "$client" --settings "$work/settings.json"
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
stop_watcher

read_again
sql -d again -c "$turns" >"$work/again.jsonl"
status=0
"$driver/compare.py" "$work/typed.jsonl" "$work/again.jsonl" || status=$?
judge "read once more" "$status"
status=0
sql -c "$sessions" >"$work/live.sessions"
sql -d again -c "$sessions" >"$work/again.sessions"
diff "$work/live.sessions" "$work/again.sessions" || status=1
judge "each turn in the same session as live" "$status"
unknown=$(explained "$work/home/.claude/projects" '"reason":"unknown type"')
status=0
[ "$unknown" = 0 ] || status=1
judge "lines of unknown types: $unknown" "$status"
[ "$wrong" -eq 0 ]
