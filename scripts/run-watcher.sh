#!/usr/bin/env bash
# Keeps headspace-watcher running: the supervisor.
#
#   watcher ends with             then
#   0                             ends too, with 0: it was asked to stop, or --until-idle is done
#   64 usage, 78 configuration    ends too, with that code: trying again cannot help
#   74 its queue can't be written tries for ever, with a pause growing from 1 s to 60 s: a full disk is no crash loop
#   anything else, or a signal    restarts it, at first at once, then after 0.5, 1, 2, 4, 4 ... s;
#                                 after 5 restarts within 60 s the next end is the last: ERROR, exit 1
#
# The limit is event_system.max_restarts_per_minute. TERM, INT and HUP are passed on, each time they come. After TERM or
# INT the supervisor ends with the watcher's code; a watcher still there 1 s after its shutdown_timeout_seconds is killed.
# HUP is left to the watcher: when it dies of it, so does the supervisor; when it goes on, so does the supervisor.
#
# Written for bash 3.2, which is what macOS has: no wait -n, no mapfile, no empty arrays under set -u.
# No set -e: a supervisor that dies of a failed `date` on a full disk is of no use.
set -uo pipefail

usage() {
  cat <<'USAGE'
Usage: scripts/run-watcher.sh [--config FILE] [--log-format auto|text|json] [--log-level LEVEL] [--log-file FILE]
                              [what `headspace-watcher run` takes, such as --until-idle]

Builds headspace-watcher if need be, starts a private PostgreSQL in data/postgres when no database is configured, and
runs the watcher, restarting it when it ends unexpectedly.

  --config FILE       default: config.yaml of this project
  --log-file FILE     everything goes there instead of to the terminal; rotated at 10 MiB, five files in all
                      (FILE, FILE.1 ... FILE.4)

Environment:
  HEADSPACE_WATCHER_BIN          run this program and build nothing
  HEADSPACE_CRASH_WINDOW_SECONDS the minute in which restarts are counted (60)

Example: scripts/run-watcher.sh --until-idle
USAGE
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P) || exit 70
project=$(dirname "$here")
postgres=$here/dev-postgres.sh
as_owner() { "$@"; }
# shellcheck source=scripts/lock.sh
. "$here/lock.sh" || exit 70

# ---- the log ---------------------------------------------------------------------------------------------------------

log_format=auto

# As the watcher itself: text for people on a terminal, JSON for everything else.
log() { # LEVEL MESSAGE
  local now message format=$log_format
  [ "$format" != auto ] || { if [ -t 2 ]; then format=text; else format=json; fi; }
  # bash prints that a signal ended the watcher once it waits for the next command: not in the log.
  {
    now=$(date -u +%Y-%m-%dT%H:%M:%SZ)
    # A name may hold anything: newlines are escaped, other control characters become blanks.
    # JSON is UTF-8: in a name that is not, each byte outside of ASCII becomes a question mark.
    message=$2
    if command -v iconv >/dev/null && ! printf '%s' "$message" | iconv -f UTF-8 -t UTF-8 >/dev/null; then
      message=$(printf '%s' "$message" | LC_ALL=C tr '\200-\377' '?')
    fi
    message=$(printf '%s\n' "$message" | LC_ALL=C tr '\001-\011\013-\037\177' ' ' | LC_ALL=C sed 's/\\/\\\\/g; s/"/\\"/g' |
      LC_ALL=C awk 'NR > 1 { printf "%s", "\\n" } { printf "%s", $0 }')
  } 2>/dev/null
  if [ "$format" = json ]; then
    printf '{"timestamp":"%s","level":"%s","message":"%s","target":"run-watcher"}\n' "$now" "$1" "$message"
  else
    printf '%s %5s run-watcher: %s\n' "$now" "$1" "$2"
  fi >&2
}

die() { # EXIT_CODE MESSAGE
  log ERROR "$2"
  exit "$1"
}

readonly LOG_FILE_BYTES_MAX=10485760 LOG_FILES_MAX=5

# Writes its input to FILE and its predecessors. dd, because it passes on what it reads at once and whole; 64 reads of at
# most 64 KiB at a time, so that the size is looked at often enough. Ends at the end of input only: if it went away on a
# full disk, or at a signal meant for the others, the watcher would die of its own log.
write_rotating() { # FILE
  trap '' TERM INT HUP
  local before after number
  while :; do
    before=$(wc -c 2>/dev/null <"$1" || echo 0)
    if ! dd bs=65536 count=64 2>/dev/null >>"$1"; then
      sleep 1
      continue
    fi
    after=$(wc -c 2>/dev/null <"$1" || echo 0)
    [ "$after" -ne "$before" ] || return 0
    if [ "$after" -ge $LOG_FILE_BYTES_MAX ]; then
      number=$((LOG_FILES_MAX - 1))
      while [ "$number" -gt 1 ]; do
        mv -f "$1.$((number - 1))" "$1.$number" 2>/dev/null
        number=$((number - 1))
      done
      mv -f "$1" "$1.1"
    fi
  done
}

# ---- configuration ---------------------------------------------------------------------------------------------------

config='' # the file, where there is one

# Where the program gives no answer. An empty database_url stands for a database that may be configured.
restarts_max=5 kill_after_seconds=3 database_url=null

readonly CONFIGURATION_SECONDS_MAX=5

# Asks the program for its effective values: it alone reads config.yaml and the environment as the watcher does. In the
# background and in a group of its own, as the build. One that does not know the command may run for ever: it is killed.
read_configuration() {
  local answer timeout
  set -m
  "${program[@]}" config get event_system.max_restarts_per_minute event_system.shutdown_timeout_seconds database.url \
    </dev/null 2>/dev/null >"$lock/configuration" 9<&- &
  asked=$!
  set +m
  start_killer "$asked" "$CONFIGURATION_SECONDS_MAX"
  handle_early_signal
  wait_for "$asked"
  asked=''
  stop_killer
  handle_early_signal
  answer=$(cat "$lock/configuration" 2>/dev/null)
  rm -f "$lock/configuration"
  case $status in
    0)
      restarts_max=$(whole_number "${answer%%$'\n'*}" 5)
      answer=${answer#*$'\n'}
      timeout=$(whole_number "${answer%%$'\n'*}" 2)
      case ${answer%%$'\n'*} in
        *.*[1-9]*) timeout=$((timeout + 1)) ;;
      esac
      kill_after_seconds=$((timeout + 1))
      database_url=${answer#*$'\n'}
      ;;
    # The configuration is wrong: the watcher says how and ends with 78. It needs no database for that.
    78) database_url='' ;;
    *)
      # A database may be configured: a private one beside it would take its events.
      database_url=''
      log WARN "could not read the configuration: \"$binary config get\" ended with $(reason "$status"); using the defaults, and no private PostgreSQL"
      ;;
  esac
}

# The whole part of a number; DEFAULT where it is none.
whole_number() { # NUMBER DEFAULT
  local whole=${1%%.*}
  case $whole in
    '' | *[!0-9]*) printf '%s\n' "$2" ;;
    *) printf '%s\n' "$((10#$whole))" ;;
  esac
}

# The same rule as the program's (src/config/database.rs): PGUSER, PGPORT and PGDATABASE say no server.
database_is_configured() {
  [ -n "${DATABASE_URL-}${PGHOST-}${PGHOSTADDR-}${PGSERVICE-}" ] || [ "$database_url" != null ]
}

absolute() {
  case $1 in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s/%s\n' "$PWD" "$1" ;;
  esac
}

# ---- one supervisor at a time ----------------------------------------------------------------------------------------

# The lock's folder stays where it is. Beside the lock it holds, while a supervisor runs:
#   watcher    the record of its watcher      postgres   when it has started the private PostgreSQL
#   log        the FIFO to the log file   configuration  what the program says is configured
lock='' # the folder, once the lock is ours

take_lock() { # FOLDER
  local code tries=0
  while
    refuse_earlier_version "$1"
    # Each time, because a supervisor of an earlier version removes the folder at its end.
    { mkdir -p "$(dirname "$1")" && { mkdir -m 0700 "$1" || [ -d "$1" ]; }; } 2>/dev/null ||
      die 74 "could not make $1: is $(dirname "$1") writable, and is there space on the disk?"
    code=0
    try_lock "$1" || code=$?
    [ "$code" -ne 0 ]
  do
    [ "$code" -ne 2 ] || die 74 "could not write in $1: run this as its owner; is there space on the disk?"
    [ -z "$lock_holder" ] ||
      die 69 "another supervisor (pid $lock_holder) runs the watcher already; to stop it: kill $lock_holder"
    # It has not written its id yet, or a command of one that was killed is just ending.
    tries=$((tries + 1))
    [ "$tries" -lt 20 ] ||
      die 69 "another supervisor, which cannot be seen from here (in a container?), runs the watcher already: it holds the lock $1"
    sleep 0.1
  done
  lock=$1
  rm -f "$lock/pid"
  [ ! -e "$lock/postgres" ] || postgres_is_ours=1
}

# An earlier version kept its bare process id in FOLDER/pid, and held no lock that is seen today.
refuse_earlier_version() { # FOLDER
  local pid command_line
  pid=$(cat "$1/pid" 2>/dev/null) || return 0
  [ "$pid" != $$ ] && [ -n "$(process_record "$pid")" ] || return 0
  command_line=$(process_arguments "$pid")
  case $command_line in
    bash\ *run-watcher.sh* | */bash\ *run-watcher.sh*)
      die 69 "a supervisor of an earlier version (pid $pid) runs the watcher already; stop it, then try again: kill $pid"
      ;;
  esac
}

# The watcher of a killed supervisor holds the queue, and would keep the next one out. It loses nothing by being stopped.
stop_orphan() {
  local orphan pid
  orphan=$(cat "$lock/watcher" 2>/dev/null)
  is_alive "$orphan" || return 0
  pid=${orphan%% *}
  log WARN "the last supervisor was killed, but its watcher (pid $pid) still runs; stopping it"
  kill -s TERM "$pid" 2>/dev/null
  # In the background, because bash 5.2 may lose a signal that comes while it reads a $( ); one that comes in a wait it
  # handles at once.
  set -m
  (await_end "$orphan") </dev/null 9<&- &
  asked=$!
  set +m
  handle_early_signal
  wait_for "$asked"
  asked=''
  handle_early_signal
  [ "$status" -eq 0 ] || die 69 "could not stop the old watcher (pid $pid): stop it by hand"
}

# Kills it when its time is over.
await_end() { # RECORD
  local turns=$((kill_after_seconds * 20))
  while is_alive "$1"; do
    [ "$turns" -ne 0 ] || kill -s KILL "${1%% *}" 2>/dev/null
    [ "$turns" -gt -100 ] || return 1
    turns=$((turns - 1))
    sleep 0.05
  done
}

# ---- the program -----------------------------------------------------------------------------------------------------

binary=''

find_binary() {
  if [ -n "${HEADSPACE_WATCHER_BIN-}" ]; then
    binary=$(absolute "$HEADSPACE_WATCHER_BIN")
    { [ -f "$binary" ] && [ -x "$binary" ]; } || die 78 "could not run $binary, which HEADSPACE_WATCHER_BIN names: give the path of a program"
    return
  fi
  local target=${CARGO_TARGET_DIR:-target}
  case $target in
    /*) ;;
    *) target=$project/$target ;;
  esac
  binary=$target/release/headspace-watcher
  if [ -x "$binary" ] && [ -z "$(find "$project/src" "$project/schemas" "$project/Cargo.toml" "$project/Cargo.lock" \
    -newer "$binary" 2>/dev/null)" ]; then
    return
  fi
  command -v cargo >/dev/null 2>&1 || PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
  command -v cargo >/dev/null 2>&1 ||
    die 69 "could not build headspace-watcher: cargo is not installed; get Rust from https://rustup.rs, then try again"
  if [ -x "$binary" ]; then
    log INFO "building headspace-watcher: its sources have changed"
  else
    log INFO "building headspace-watcher with all it depends on: some minutes, this once; the compiler's progress follows"
  fi
  # In the project's folder, so that settings of the caller's folder stay out of it. In the background, because a trap
  # waits for what runs in the foreground, and a build is long; in a group of its own, to be ended as a whole.
  set -m
  (cd "$project" && exec cargo build --release --locked) </dev/null 9<&- &
  build=$!
  set +m
  handle_early_signal
  wait_for "$build"
  build=''
  handle_early_signal
  [ "$status" -eq 0 ] || die 70 "could not build headspace-watcher: the compiler's words are above$(
    command -v cc >/dev/null 2>&1 || printf '%s' "; no C compiler (cc) is installed, which some parts need: install gcc or clang"
  )"
}

# ---- signals ---------------------------------------------------------------------------------------------------------

watcher=''        # its pid while it runs
stop_signal=''    # TERM or INT, once it came; HUP when it came between two runs
hung_up=''        # HUP was passed on to this watcher
undelivered=''    # came while the watcher was being started
trap_ran=''       # wait was, or may have been, cut short
pauser='' killer='' build='' asked=''
early=1           # no watcher has been started yet

on_signal() { # NAME
  trap_ran=1
  [ "$1" = HUP ] || stop_signal=$1
  if [ -n "$early" ]; then
    stop_signal=$1
    end_early_programs
  elif [ -n "$watcher" ]; then
    deliver "$1"
  elif [ -n "$pauser" ]; then
    stop_signal=$1
    kill "$pauser" 2>/dev/null
  else
    undelivered=$1
  fi
}

end_early_programs() {
  [ -z "$build" ] || kill -s TERM -- "-$build" 2>/dev/null
  [ -z "$asked" ] || kill -s KILL -- "-$asked" 2>/dev/null
}

# Before there is a watcher, a signal ends the supervisor between two steps.
handle_early_signal() {
  [ -n "$stop_signal" ] || return 0
  end_early_programs
  log INFO "SIG$stop_signal came before the watcher was started; ending"
  exit $((128 + $(kill -l "$stop_signal")))
}

deliver() { # NAME
  log INFO "SIG$1 passed on to the watcher (pid $watcher)"
  kill -s "$1" "$watcher" 2>/dev/null
  if [ "$1" = HUP ]; then
    hung_up=1
  elif [ -z "$killer" ]; then
    start_killer "$watcher" "$kill_after_seconds"
  fi
}

start_killer() { # GROUP SECONDS
  set -m
  (
    sleep "$2"
    kill -s KILL -- "-$1"
  ) </dev/null >/dev/null 2>&1 9<&- &
  killer=$!
  set +m
}

stop_killer() {
  [ -n "$killer" ] || return 0
  kill -s KILL -- "-$killer" 2>/dev/null
  wait "$killer" 2>/dev/null
  killer=''
}

# ---- running ---------------------------------------------------------------------------------------------------------

start_watcher() {
  hung_up=''
  # Job control for this one start gives the watcher a process group of its own: Ctrl-C on a terminal goes to the whole
  # group, so it would come twice, once from the terminal and once from here, and the second one ends it at once.
  # It records itself before its program runs, so that it is found however soon the supervisor is killed.
  set -m
  (
    # $$ is the supervisor.
    pid=$(exec sh -c 'echo $PPID')
    { process_record "$pid" >"$lock/watcher.new" && mv -f "$lock/watcher.new" "$lock/watcher"; } 2>/dev/null
    exec "${command[@]}"
  ) </dev/null 9<&- &
  watcher=$!
  set +m
  if [ -n "$undelivered" ]; then
    deliver "$undelivered"
    undelivered=''
  fi
}

status=0

# wait returns early when a trap has run, with a status that is not the process's.
wait_for() { # PID
  local again
  while :; do
    trap_ran=''
    wait "$1" 2>/dev/null
    status=$?
    [ -n "$trap_ran" ] || return 0
    [ -z "$early" ] || handle_early_signal
    if kill -0 "$1" 2>/dev/null; then continue; fi
    # It ended about when the trap ran: its status is either the one at hand, or still to be fetched.
    wait "$1" 2>/dev/null
    again=$?
    [ "$again" -eq 127 ] || status=$again
    return 0
  done
}

reason() { # STATUS
  local name
  if [ "$1" -gt 128 ] && name=$(kill -l "$(($1 - 128))" 2>/dev/null) && [ -n "$name" ]; then
    printf 'signal SIG%s' "${name#SIG}"
  else
    printf 'exit code %s' "$1"
  fi
}

# Cut short by the signals.
pause() { # SECONDS
  [ "$1" != 0 ] || return 0
  sleep "$1" >/dev/null 2>&1 9<&- &
  pauser=$!
  [ -z "$stop_signal" ] || kill "$pauser" 2>/dev/null
  while kill -0 "$pauser" 2>/dev/null; do wait "$pauser" 2>/dev/null; done
  pauser=''
}

# The times of the restarts within the last minute.
restarts=''
restarts_within_window() {
  local time kept='' number=0
  for time in $restarts; do
    # What lies ahead was noted before the clock was set back.
    if [ "$time" -le "$seconds" ] && [ $((seconds - time)) -lt "$window_seconds" ]; then
      kept="$kept $time"
      number=$((number + 1))
    fi
  done
  restarts=$kept
  recent=$number
}

finish() {
  local code=$?
  trap '' TERM INT HUP
  stop_killer
  [ -z "$watcher" ] || kill -s TERM "$watcher" 2>/dev/null
  # After the watcher, so that its stop is not held up. A start under way comes first: its server would stay behind.
  [ -z "$postgres_start" ] || wait "$postgres_start" 2>/dev/null
  [ -z "$postgres_is_ours" ] || "$postgres" stop >/dev/null 9<&-
  if [ -n "$logger" ]; then
    exec >/dev/null 2>&1
    local tries=0
    while kill -0 "$logger" 2>/dev/null && [ "$tries" -lt 20 ]; do
      sleep 0.05
      tries=$((tries + 1))
    done
  fi
  if [ -n "$lock" ]; then
    rm -f "$lock/watcher.new" "$lock/configuration" "$lock/postgres" "$lock/log"
    # One that still runs is left to the next supervisor.
    is_alive "$(cat "$lock/watcher" 2>/dev/null)" || rm -f "$lock/watcher"
    unlock "$lock"
  fi
  exit "$code"
}

# ---- from the top ----------------------------------------------------------------------------------------------------

log_file='' log_level='' logger='' postgres_is_ours='' private_postgres='' postgres_start=''
run=(run)
while [ $# -gt 0 ]; do
  case $1 in
    --config | --log-format | --log-level | --log-file)
      if [ $# -lt 2 ]; then
        echo "run-watcher: $1 wants a value; see scripts/run-watcher.sh --help" >&2
        exit 64
      fi
      name=$1 value=$2
      shift 2
      ;;
    --config=* | --log-format=* | --log-level=* | --log-file=*)
      name=${1%%=*} value=${1#*=}
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      run+=("$1")
      shift
      continue
      ;;
  esac
  case $name in
    --config) config=$(absolute "$value") ;;
    --log-format) log_format=$value ;;
    --log-level) log_level=$value ;;
    --log-file) log_file=$(absolute "$value") ;;
  esac
done

lock_name='run-watcher.lock'
if [ -n "$config" ]; then
  [ -f "$config" ] || die 78 "no configuration file $config: give the path of an existing file to --config"
  # One file, one lock, however its path is written.
  config=$(cd "${config%/*}/" && pwd -P)/${config##*/}
  # Another configuration has another queue; side by side they are no harm to each other.
  [ "$config" -ef "$project/config.yaml" ] || lock_name=run-watcher-$(printf '%s' "$config" | cksum | awk '{ print $1 }').lock
elif [ -f "$project/config.yaml" ]; then
  config=$project/config.yaml
else
  # A checkout keeps its state in data/, beside the private PostgreSQL; without a file the program would not.
  export HEADSPACE_QUEUE__PATH="${HEADSPACE_QUEUE__PATH:-$project/data/queue}"
  export HEADSPACE_QUEUE__SPOOL_PATH="${HEADSPACE_QUEUE__SPOOL_PATH:-$project/data/spool}"
  export HEADSPACE_HTTP__SOCKET="${HEADSPACE_HTTP__SOCKET:-$project/data/watcher.sock}"
fi

if [ -e "$log_file" ] && [ ! -f "$log_file" ]; then
  die 78 "will not log to $log_file, which is no regular file: give --log-file a file, or use the shell's 2>"
fi

window_seconds=$(whole_number "${HEADSPACE_CRASH_WINDOW_SECONDS-}" 60)

trap finish EXIT
trap 'on_signal TERM' TERM
trap 'on_signal INT' INT
trap 'on_signal HUP' HUP
take_lock "$project/data/$lock_name"
handle_early_signal

if [ -n "$log_file" ]; then
  { : >>"$log_file"; } 2>/dev/null || die 74 "could not write $log_file: give --log-file a file in a folder you may write to"
  rm -f "$lock/log"
  mkfifo "$lock/log" || die 74 "could not make $lock/log"
  write_rotating "$log_file" <"$lock/log" 9<&- &
  logger=$!
  exec >"$lock/log" 2>&1
fi

find_binary

program=("$binary")
[ -z "$config" ] || program+=(--config "$config")
read_configuration
stop_orphan

command=("${program[@]}")
[ "$log_format" = auto ] || command+=(--log-format "$log_format")
[ -z "$log_level" ] || command+=(--log-level "$log_level")
command+=("${run[@]}")

if ! database_is_configured; then
  private_postgres=1
  # Said before it starts, so that a start that is cut short is cleaned up as well.
  "$postgres" status >/dev/null 2>&1 9<&- || postgres_is_ours=1
  [ -z "$postgres_is_ours" ] || : >"$lock/postgres"
  # A server that was there and does not start today is an outage, which the watcher gets over; one that cannot be had
  # at all is for the user to fix.
  handle_early_signal
  DATABASE_URL=$("$postgres" start 9<&-) || handle_early_signal
  [ -n "$DATABASE_URL" ] || DATABASE_URL=$("$postgres" url 2>/dev/null 9<&-) ||
    die 69 "no database: none is configured, and the private PostgreSQL could not be started (why: above); fix that, or set database.url in config.yaml"
  export DATABASE_URL
  log INFO "no database is configured: using a private PostgreSQL; look at the rows with: $(printf '%q' "$postgres") psql -c 'SELECT time, actor, left(text, 60) AS text FROM headspace_watcher.turns ORDER BY time DESC LIMIT 20'"
fi

early=''
handle_early_signal

recent=0 storage_failures=0
while :; do
  read_time
  started=$seconds
  start_watcher
  log INFO "watcher started (pid $watcher)"
  pid=$watcher
  wait_for "$watcher"
  watcher=''
  stop_killer
  read_time
  lasted=$((seconds > started ? seconds - started : 0))
  ended="watcher (pid $pid) ended after $lasted s: $(reason "$status")"

  if [ -n "$stop_signal" ]; then
    if [ "$status" -eq 137 ]; then
      log ERROR "$ended; it had not stopped within $kill_after_seconds s of SIG$stop_signal and was killed"
    else
      log INFO "$ended, after SIG$stop_signal"
    fi
    exit "$status"
  fi
  if [ -n "$hung_up" ] && [ "$status" -eq 129 ]; then
    log INFO "$ended, which was passed on to it"
    exit 129
  fi
  case $status in
    0)
      log INFO "$ended"
      exit 0
      ;;
    64 | 78)
      log ERROR "$ended; not restarting: it would fail the same way; fix the $([ "$status" -eq 64 ] && echo "command line" || echo "configuration") (see above), then start again"
      exit "$status"
      ;;
    74)
      [ "$lasted" -lt "$window_seconds" ] || storage_failures=0
      delay=$((storage_failures < 6 ? 1 << storage_failures : 60))
      storage_failures=$((storage_failures + 1))
      log ERROR "$ended: its queue cannot be written, is the disk full? Restart in $delay s, and so on until it can; this is not counted as a crash"
      ;;
    *)
      storage_failures=0
      restarts_within_window
      if [ "$recent" -ge "$restarts_max" ]; then
        log ERROR "$ended; giving up after $recent restarts in $window_seconds s. See above for the cause, or run \"$binary check\"; then start again"
        exit 1
      fi
      case $recent in
        0) delay=0 ;;
        1) delay=0.5 ;;
        2) delay=1 ;;
        3) delay=2 ;;
        *) delay=4 ;;
      esac
      restarts="$restarts $seconds"
      log WARN "$ended; restart $((recent + 1)) of at most $restarts_max in $window_seconds s, $([ "$delay" = 0 ] && echo "at once" || echo "in $delay s")"
      ;;
  esac

  # In the background: the watcher captures without a database, and must be back soon.
  if [ -n "$private_postgres" ]; then
    if [ -z "$postgres_start" ] || ! kill -0 "$postgres_start" 2>/dev/null; then
      "$postgres" start </dev/null >/dev/null 9<&- &
      postgres_start=$!
    fi
  fi
  pause "$delay"
  if [ -n "$stop_signal" ]; then
    log INFO "SIG$stop_signal came while the watcher was not running; nothing to stop"
    exit 0
  fi
done
