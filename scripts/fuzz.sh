#!/usr/bin/env bash
# Fuzzes what reads transcripts for a while, guided by coverage, on the stable toolchain.
#
#   scripts/fuzz.sh [SECONDS] [TARGET]      60 seconds of "lines" when not given
#
# Targets and seeds are in fuzz/. What is found is kept in target/fuzz: corpus/TARGET to go on from, crashes/TARGET with
# the input that failed; give such a file to target/fuzz/bin/TARGET to see it fail again. The layout is cargo-fuzz's, but
# its flags need nothing but rustc. Ends with 0 when nothing failed; 75 when there is no C++ compiler to build libFuzzer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seconds=${1:-60}
target=${2:-lines}

command -v cargo >/dev/null 2>&1 || PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
if ! command -v "${CXX:-c++}" >/dev/null 2>&1; then
  echo "fuzz.sh: no C++ compiler; install g++ or clang, or set CXX" >&2
  exit 75
fi

# Into the folder of all other builds: what the program is made of is there already.
FUZZ_TARGET=$target RUSTC_WRAPPER=$PWD/fuzz/rustc CARGO_TARGET_DIR=target \
  cargo build --locked --manifest-path fuzz/Cargo.toml --bin "$target"

mkdir -p target/fuzz/bin "target/fuzz/corpus/$target" "target/fuzz/crashes/$target"
# Where nothing was to be built cargo has put a link to the same file there.
rm -f "target/fuzz/bin/$target"
mv "target/debug/$target" "target/fuzz/bin/$target"

log=target/fuzz/$target.log
status=0
"target/fuzz/bin/$target" "target/fuzz/corpus/$target" "fuzz/seeds/$target" \
  -dict="fuzz/$target.dict" -artifact_prefix="target/fuzz/crashes/$target/" \
  -max_total_time="$seconds" -max_len=16384 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 >"$log" 2>&1 || status=$?

if [ "$status" -ne 0 ]; then
  tail -n 60 "$log" >&2
  echo "fuzz.sh: $target failed with $status; the input is in target/fuzz/crashes/$target, all of the log in $log" >&2
  exit "$status"
fi
# How far it got: coverage, inputs kept, runs.
grep 'DONE ' "$log" || true
grep -E 'number_of_executed_units|average_exec_per_sec|peak_rss_mb' "$log" || true
