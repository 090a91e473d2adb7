#!/usr/bin/env bash
# from a line appended to a transcript to its row being visible: p50, p95, p99, max
#
# Usage: scripts/bench.sh latency [LINES] [LINES_PER_SECOND ...]      (default: 200 lines at 20, 100 and 1000 a second)
#
# Beside it, in the same run on the same server: one synchronous INSERT by a client that does nothing else, which is
# the floor for anything durable, and write + fdatasync of a line to a plain file.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
root=$(dirname "$here")
lines=${1:-200}
shift || true
[ $# -gt 0 ] || set -- 20 100 1000

cd "$root"
cargo build --release --locked --bin headspace-watcher --example bench-latency
postgres=$("$here/dev-postgres.sh" start --throwaway)
scene=$(mktemp -d)
watcher=''
clean_up() {
  [ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true
  wait 2>/dev/null || true
  "$here/dev-postgres.sh" stop "$postgres" >/dev/null 2>&1 || true
  rm -rf "$scene"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

url=$("$here/dev-postgres.sh" url "$postgres")
mkdir "$scene/projects"
printf 'claude:\n  projects_path: projects\nhttp:\n  listen: null\ndatabase:\n  notify_channel: bench\n' >"$scene/config.yaml"
env -u DATABASE_URL HEADSPACE_DATABASE__URL="$url" target/release/headspace-watcher --config "$scene/config.yaml" \
  --log-level warn run &
watcher=$!
target/release/examples/bench-latency "$url" "$scene/projects" "$lines" "$@"
