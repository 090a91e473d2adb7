# shellcheck shell=bash disable=SC2034 # what is set here is used by the scripts that source this
# What real-client.sh and real-client-codex.sh share, which source this file: what they need, the client from npm, the
# program, a throw-away server, and the words for what came of it.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root" || exit
postgres=$root/scripts/dev-postgres.sh
wrong=0 work='' cluster='' watcher=''

# Ends the script: it can't be tried here.
skip() { # REASON
  printf 'real-client: SKIPPED: %s\n' "$1" >&2
  exit 75
}

# Sets `driver`. The client is driven in a network of its own, which may be forbidden in a container.
find_driver() { # FOLDER
  [ -f "$1/drive.py" ] || skip "there is no $1/drive.py"
  driver=$(cd "$1" && pwd -P)
  [ "$(id -u)" -eq 0 ] || skip "it takes root, for a network of its own"
  local needed
  for needed in npm python3 tmux git ip unshare nsenter; do
    command -v "$needed" >/dev/null 2>&1 || skip "$needed is not installed"
  done
  unshare -n true 2>/dev/null || skip "no network namespace can be made here"
}

# Sets `client` and `version`. The package of this platform has the program; its wrapper's install script would only copy it.
install_client() { # PACKAGE PATH_OF_THE_PROGRAM
  local tools=$root/target/real-client
  mkdir -p "$tools"
  program_of() { find "$tools/node_modules" -path "$1" -type f -perm -u+x 2>/dev/null | head -n 1; }
  npm install --prefix "$tools" --ignore-scripts --no-audit --no-fund --loglevel error "$1@latest" >&2 ||
    [ -n "$(program_of "$2")" ] || skip "npm could not install the client"
  client=$(program_of "$2")
  [ -n "$client" ] || skip "the package has no program for this platform"
  version=$("$client" --version </dev/null 2>/dev/null | head -n 1) || skip "the client does not run here"
}

clean_up() {
  trap '' INT TERM HUP
  [ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true
  [ -z "$cluster" ] || "$postgres" stop "$cluster" >/dev/null 2>&1 || true
  rm -rf "$work"
}

# Sets `program`, `work`, a folder that goes at the end, `cluster` and `live`, the URL of its database.
prepare() {
  command -v cargo >/dev/null 2>&1 || PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
  program=${HEADSPACE_WATCHER_BIN-}
  if [ -z "$program" ]; then
    cargo build --locked --quiet
    program=${CARGO_TARGET_DIR:-$root/target}/debug/headspace-watcher
  fi
  work=$(mktemp -d "${TMPDIR:-/tmp}/real-client.XXXXXX")
  trap clean_up EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap 'exit 129' HUP
  cluster=$("$postgres" start --throwaway)
  live=$("$postgres" url "$cluster")
}

sql() { "$postgres" psql "$cluster" -XqAt -v ON_ERROR_STOP=1 "$@"; }

# Whatever is configured outside has no say.
headspace() { # DATABASE_URL FOLDER ARGUMENT...
  local url=$1 folder=$2
  shift 2
  env -i PATH="$PATH" HOME="$work/home" DATABASE_URL="$url" "$program" --config "$folder/config.yaml" "$@"
}

# exec: what is ended by stop_watcher is the watcher itself.
start_watcher() {
  (exec env -i PATH="$PATH" HOME="$work/home" DATABASE_URL="$live" "$program" --config "$work/live/config.yaml" run) \
    >"$work/watcher.log" 2>&1 &
  watcher=$!
}
stop_watcher() {
  kill "$watcher"
  wait "$watcher" || true
  watcher=''
}

drive() { # CLIENT ARGUMENT...
  "$driver/drive.py" "$work" --client "$@" >"$work/drive.log" 2>&1 || {
    tail -n 60 "$work/drive.log" >&2
    skip "the client could not be driven to the end: a dialog may have changed, or the machine is too slow"
  }
}

judge() { # WHAT CONDITION_STATUS
  if [ "$2" -eq 0 ]; then
    printf 'real-client: %s: fine\n' "$1"
  else
    printf 'real-client: %s: WRONG\n' "$1"
    wrong=1
  fi
}

# Reads everything once more, into the database `again`.
read_again() {
  sql -c 'CREATE DATABASE again' >/dev/null
  configure "$work/again"
  headspace "${live/\/headspace?/\/again?}" "$work/again" run --until-idle >"$work/again.log" 2>&1
}

# How many lines of the transcripts below FOLDER `explain` gives with this in its JSON.
explained() { # FOLDER TEXT
  find "$1" -name '*.jsonl' -exec env -i HOME="$work/home" "$program" --config "$work/again/config.yaml" \
    explain --json {} \; | grep -c "$2" || true
}
