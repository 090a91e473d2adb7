#!/usr/bin/env bash
# Builds the release twice, from the last commit, in folders of different names and depths, and compares the two programs
# byte by byte. Ends with 0 when they are the same, and leaves one, with its hash, in target/reproducible.
#
# What is the same everywhere: the sources of this commit, Cargo.lock, and the names which the compiler writes for folders.
# What has to be the same: the version of Rust, the system's linker and C library, which are printed with the hash.
#
# Takes two release builds' time; nothing of an earlier build is used.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
command -v cargo >/dev/null 2>&1 || PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
cargo_home=${CARGO_HOME:-$HOME/.cargo}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

[ -z "$(git -C "$root" status --porcelain)" ] ||
  echo "reproduce: what is not committed is left out" >&2

build() { # FOLDER
  mkdir -p "$1"
  git -C "$root" archive HEAD | tar -xf - -C "$1"
  # The seconds since 1970 of the commit, for whoever might want to write a date; nothing does now.
  (
    cd "$1"
    unset CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_RUSTFLAGS
    SOURCE_DATE_EPOCH=$(git -C "$root" log -1 --format=%ct) \
      RUSTFLAGS="--remap-path-prefix=$1=/headspace-watcher --remap-path-prefix=$cargo_home=/cargo" \
      CFLAGS="-ffile-prefix-map=$1=/headspace-watcher -ffile-prefix-map=$cargo_home=/cargo" \
      CARGO_TARGET_DIR="$1/target" CARGO_INCREMENTAL=0 cargo build --quiet --release --locked
  )
}

first=$work/a second=$work/another-folder/deeper/down
build "$first"
build "$second"

kept=$root/target/reproducible
mkdir -p "$kept"
cp "$first/target/release/headspace-watcher" "$kept/headspace-watcher"
cp "$second/target/release/headspace-watcher" "$kept/headspace-watcher.second"

hash_of() {
  if command -v sha256sum >/dev/null 2>&1; then sha256sum <"$1"; else shasum -a 256 <"$1"; fi | cut -d ' ' -f 1
}

echo "commit  $(git -C "$root" rev-parse HEAD)"
echo "rust    $(rustc --version)"
echo "linker  $(ld -v 2>&1 | head -n 1)"
echo "bytes   $(wc -c <"$kept/headspace-watcher" | tr -d ' ')"
for name in headspace-watcher headspace-watcher.second; do
  echo "sha256  $(hash_of "$kept/$name")"
done
if cmp -s "$kept/headspace-watcher" "$kept/headspace-watcher.second"; then
  rm "$kept/headspace-watcher.second"
  echo "the same, byte by byte: $kept/headspace-watcher"
else
  echo "reproduce: they differ; compare them in $kept (diffoscope shows how)" >&2
  exit 1
fi
