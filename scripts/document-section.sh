#!/usr/bin/env bash
# Writes a measured section into a document.
#
# Usage: scripts/document-section.sh DOCUMENT NAME FILE
#
# What is between the lines "<!-- NAME -->" and "<!-- end of NAME -->" of DOCUMENT is replaced by FILE.
set -euo pipefail

[ $# -eq 3 ] || {
  sed -n '/^# Usage/s/^# //p' "${BASH_SOURCE[0]}" >&2
  exit 64
}
document=$1 name=$2 file=$3
for mark in "$name" "end of $name"; do
  grep -qxF "<!-- $mark -->" "$document" && continue
  printf 'document-section: %s has no line "<!-- %s -->"\n' "$document" "$mark" >&2
  exit 65
done
new=$(awk -v name="$name" -v file="$file" '
  $0 == "<!-- end of " name " -->" { inside = 0 }
  !inside
  $0 == "<!-- " name " -->" { while ((getline line < file) > 0) print line; inside = 1 }' "$document")
printf '%s\n' "$new" >"$document"
