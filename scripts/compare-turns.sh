#!/usr/bin/env bash
# Holds the turns that "headspace-watcher explain" finds against those that another program finds in the same transcripts.
#
# Usage: scripts/compare-turns.sh FOLDER [OTHER]
#
# FOLDER is a projects folder. OTHER is a Python program (../shared/reference_turns.py when not given) that is called with
# FOLDER and prints a JSON object for each turn: file, offset, actor, kind and provenance (a user's), turn_uuid, text_sha256,
# text_bytes; each uuid once in a file. Prints what only one of the two has; ends with 0 when they are equal, else 1.
# HEADSPACE_WATCHER_BIN: the program to use; else it is built.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [ $# -lt 1 ] || [ $# -gt 2 ] || [ ! -d "$1" ]; then
  sed -n '2,/^set /{/^#/!d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" >&2
  exit 64
fi
tree=$(cd "$1" && pwd -P)
other=${2:-$root/../shared/reference_turns.py}
[ -f "$other" ] || {
  printf 'compare-turns: there is no %s: name the other program\n' "$other" >&2
  exit 69
}
program=${HEADSPACE_WATCHER_BIN-}
if [ -z "$program" ]; then
  command -v cargo >/dev/null 2>&1 || PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
  (cd "$root" && cargo build --locked --quiet)
  program=${CARGO_TARGET_DIR:-$root/target}/debug/headspace-watcher
fi

python3 - "$program" "$other" "$tree" <<'PYTHON'
import hashlib, json, os, re, subprocess, sys, tempfile

program, other, tree = sys.argv[1:]
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.jsonl", re.I)


def key(turn):
    fields = ("file", "offset", "actor", "kind", "provenance", "turn_uuid", "text_bytes", "text_sha256")
    return json.dumps([turn.get(field) for field in fields])


def ours():
    for project in sorted(os.listdir(tree)):
        folder = os.path.join(tree, project)
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            if not UUID.fullmatch(name):
                continue
            # No configuration of the caller's has a say.
            with tempfile.TemporaryDirectory() as home:
                command = [program, "explain", "--json", "--text", os.path.join(folder, name)]
                run = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=home, env={"HOME": home})
            seen = set()
            for line in run.stdout.splitlines():
                turn = json.loads(line)
                if "actor" not in turn or turn["turn_uuid"] is not None and turn["turn_uuid"] in seen:
                    continue
                seen.add(turn["turn_uuid"])
                turn["file"] = os.path.join(project, name)
                turn["text_sha256"] = hashlib.sha256(turn["text"].encode()).hexdigest()
                yield key(turn)


theirs = subprocess.run([sys.executable, other, tree], stdout=subprocess.PIPE, check=True).stdout.splitlines()
theirs = {key(json.loads(line)) for line in theirs}
ours = set(ours())
for sign, turns in (("only here ", ours - theirs), ("only there", theirs - ours)):
    for turn in sorted(turns):
        print(sign, turn)
print("%d turns here, %d there, %d in both" % (len(ours), len(theirs), len(ours & theirs)))
sys.exit(ours != theirs)
PYTHON
