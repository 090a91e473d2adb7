#!/usr/bin/env bash
# The long proofs: the very tests of scripts/test.sh with many more rounds.
#
# Usage: scripts/torture.sh [WHAT] [ROUNDS]
#   WHAT    part of the names of the tests to run, or /a regular expression/ (default: all that have rounds)
#   ROUNDS  rounds of each (default: 100)
#
# A failure prints its seed; HEADSPACE_TEST_SEED repeats it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
what=${1:-/torture|power_cut|kill/}
export HEADSPACE_TORTURE_ROUNDS=${2:-100}
exec "$here/test.sh" --profile torture --no-fail-fast --no-capture -E "test($what)"
