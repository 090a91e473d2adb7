#!/usr/bin/env bash
# a first build by several profiles: its time, and the size, memory and rates of the program that it makes
#
# Usage: scripts/bench.sh profiles [--quick] [NAME...]      (default: all profiles below)
#
# Each profile is built into a folder of its own, with every dependency to compile; sources are fetched before. Then each
# program delivers the same transcripts from file to Postgres ("backfill" of scripts/bench.sh), in turns, twice. Prints a
# table for docs/benchmarks.md. Takes some five minutes for each profile on two processors, and three gigabytes of disk.
# With --quick nothing is built anew that is there, and one round of a tenth is measured.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd "$root"

# What `cargo build --release` is given beside Cargo.toml's own profile.
declare -A profiles=(
  [release]=''
  [local-lto]='profile.release.lto=false'
  [thin-lto]='profile.release.lto="thin"'
  [fat-lto]='profile.release.lto="fat" profile.release.codegen-units=1'
)
order=(release local-lto thin-lto fat-lto)

rounds=2 quick='' names=()
for argument in "$@"; do
  if [ "$argument" = --quick ]; then
    rounds=1 quick=--quick
  elif [ "${profiles[$argument]+known}" = known ]; then
    names+=("$argument")
  else
    printf 'bench: no profile %s; there are: %s\n' "$argument" "${order[*]}" >&2
    exit 64
  fi
done
[ ${#names[@]} -gt 0 ] || names=("${order[@]}")

command -v cargo >/dev/null 2>&1 || PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
postgres=$root/scripts/dev-postgres.sh
work=$root/target/bench/profiles
mkdir -p "$work/disk"
cluster=''
clean_up() {
  trap '' INT TERM HUP
  [ -z "$cluster" ] || "$postgres" stop "$cluster" >/dev/null 2>&1 || true
  rm -rf "$work/disk"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

cargo fetch --locked --quiet
declare -A seconds
for name in "${names[@]}"; do
  arguments=()
  for setting in ${profiles[$name]}; do arguments+=(--config "$setting"); done
  [ -n "$quick" ] || rm -rf "${work:?}/$name"
  printf 'building: %s\n' "$name" >&2
  began=$(date +%s)
  cargo build --release --locked --timings --bin headspace-watcher --target-dir "$work/$name" ${arguments[@]+"${arguments[@]}"}
  seconds[$name]=$(($(date +%s) - began))
done
# The program that measures is the same for all.
first=${names[0]}
arguments=()
for setting in ${profiles[$first]}; do arguments+=(--config "$setting"); done
cargo build --release --locked --example bench --target-dir "$work/$first" ${arguments[@]+"${arguments[@]}"}
for name in "${names[@]}"; do
  mkdir -p "$work/run-$name/examples"
  cp "$work/$first/release/examples/bench" "$work/run-$name/examples/bench"
  cp "$work/$name/release/headspace-watcher" "$work/run-$name/headspace-watcher"
  rm -f "$work/run-$name/rows"
done

cluster=$("$postgres" start --throwaway)
for ((round = 1; round <= rounds; round++)); do
  for name in "${names[@]}"; do
    "$work/run-$name/examples/bench" --server "$cluster" --folder "$work/disk" --rows "$work/run-$name/rows" \
      ${quick:+"$quick"} backfill
  done
done

# The better of the rounds: whatever else the machine does makes them worse.
best() { # NAME KEY SORT
  awk -F'\t' -v key="$2" '$1 == key { print $3 }' "$work/run-$1/rows" | sort "$3" | head -n 1
}
printf '\n| Profile | Build, s | Program, MB | File to Postgres, events/s | Processor, µs/event | Memory, MB |\n'
printf '|---|--:|--:|--:|--:|--:|\n'
for name in "${names[@]}"; do
  size=$(wc -c <"$work/run-$name/headspace-watcher")
  printf '| %s | %s | %s | %s | %s | %s |\n' "$name" "${seconds[$name]}" "$(awk "BEGIN { printf \"%.1f\", $size / 1e6 }")" \
    "$(best "$name" backfill.rate -rn)" "$(best "$name" backfill.cpu -n)" "$(best "$name" backfill.memory -n)"
done
