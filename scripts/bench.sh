#!/usr/bin/env bash
# Measurements, each beside its reference in the same run: scripts/bench.sh WHAT [arguments]
#
# WHAT is the name of a file in scripts/bench/. Numbers are ratios taken side by side, as machines are noisy.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
what=${1:-}
if [ -z "$what" ] || [ ! -f "$here/bench/$what.sh" ]; then
  {
    printf 'Usage: scripts/bench.sh WHAT [arguments], where WHAT is one of:\n'
    for file in "$here"/bench/*.sh; do
      printf '  %-10s %s\n' "$(basename "$file" .sh)" "$(sed -n '2s/^# //p' "$file")"
    done
  } >&2
  exit 64
fi
shift
exec bash "$here/bench/$what.sh" "$@"
