# shellcheck shell=bash
# One process at a time: the lock of run-watcher.sh and dev-postgres.sh, which source this file. Also all that they ask the
# system about processes: of /proc where there is one, of ps elsewhere.
#
# A lock is a folder. Its file `holder` is the record of the process that has it: process id, start time, boot. A process
# id alone names nobody: ids are used again, in a container at every start.
#
# The lock is the file `holder`, made complete by link(2). A dead process's file is removed only by the process that has
# `holder.stale`, a lock of the same kind: what it removes is the file that it has read.
#
# With /proc and flock(1), a flock of the folder on descriptor 9 comes first. The kernel releases it however its holder ends.
# Processes that the holder starts inherit the descriptor: those that may outlive it are started with 9<&-. `holder` is taken
# all the same, because another process may find no flock in its PATH; only a full disk is no reason to give up.
#
# The script that sources this defines as_owner, which runs a command as the user to whom the folder belongs.

# macOS is known by its name, which bash has, so that Linux can be made to do as macOS does: OSTYPE=darwin.
has_proc=''
case $OSTYPE in
  darwin*) ;;
  *) [ ! -r /proc/self/stat ] || has_proc=1 ;;
esac

# The record of a living process; nothing for a dead one or a zombie.
process_record() { # PID
  local pid=$1 fields boot=''
  case $pid in
    '' | *[!0-9]*) return 0 ;;
  esac
  if [ -n "$has_proc" ]; then
    fields=$(cat "/proc/$pid/stat" 2>/dev/null) || return 0
    # The program's name is in parentheses and may hold anything. The state is the first field after it (3), the start
    # time since boot the 20th (22).
    # shellcheck disable=SC2086 # fields
    set -- ${fields##*) }
    case ${1-} in
      '' | [ZX]) return 0 ;;
    esac
    read -r boot 2>/dev/null </proc/sys/kernel/random/boot_id || true
    printf '%s %s %s\n' "$pid" "${20}" "$boot"
  else
    # The start time is a date, so there is no need of a boot. In one time zone, because the caller's may change.
    fields=$(TZ=UTC0 LC_ALL=C ps -o stat= -o lstart= -p "$pid" 2>/dev/null) || return 0
    # shellcheck disable=SC2086 # fields
    set -- $fields
    case ${1-} in
      '' | Z*) return 0 ;;
    esac
    shift
    printf '%s %s\n' "$pid" "$*"
  fi
}

# The arguments of a process, with blanks between them.
process_arguments() { # PID
  if [ -n "$has_proc" ]; then
    tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline" || true
  else
    # -ww: else BSD's ps cuts them off at the width of the terminal.
    ps -ww -o command= -p "$1" 2>/dev/null || true
  fi
}

# Whether a living process is the server of a PostgreSQL cluster: it works in that folder, or was started with -D FOLDER.
is_server_of() { # PID FOLDER
  local arguments
  [ -n "$(process_record "$1")" ] || return 1
  if [ -n "$has_proc" ]; then
    [ "$(readlink "/proc/$1/cwd" 2>/dev/null)" = "$(cd "$2" && pwd -P)" ]
  else
    arguments=$(process_arguments "$1")
    [ "${arguments##* -D }" -ef "$2" ]
  fi
}

# Sets `seconds`: those since the system's start, which nobody sets back; without /proc those that bash counts, by the clock.
seconds=0
read_time() {
  seconds=$SECONDS
  if [ -n "$has_proc" ]; then read -r seconds _ 2>/dev/null </proc/uptime; fi
  seconds=${seconds%%.*}
}

# Whether another process than this one has this record.
is_alive() { # RECORD
  [ -n "$1" ] && [ "${1%% *}" != $$ ] && [ "$(process_record "${1%% *}")" = "$1" ]
}

lock_holder='' # the process id of the lock's holder, where it is known

# Exit code 0: the lock is ours; 1: another process has it, or its folder was replaced; 2: its folder can't be written.
try_lock() { # FOLDER
  local record code=127 flocked=''
  lock_holder=''
  if [ -n "$has_proc" ] && { exec 9<"$1"; } 2>/dev/null; then
    code=0
    flock -n 9 2>/dev/null || code=$?
  fi
  record=$(cat "$1/holder" 2>/dev/null) || true
  if [ "$code" -eq 1 ]; then
    exec 9<&-
    if is_alive "$record"; then lock_holder=${record%% *}; fi
    return 1
  fi
  # Otherwise flock is not used here, or the file system has none.
  if [ "$code" -eq 0 ]; then
    flocked=1
    is_locked_folder "$1" || { exec 9<&-; return 1; }
  fi
  code=0
  if write_record "$1/holder.$$"; then
    link_lock "$1/holder.$$" "$1/holder" || code=$?
  elif [ -z "$flocked" ]; then
    code=2
  elif is_alive "$record"; then
    lock_holder=${record%% *}
    code=1
  fi
  as_owner rm -f "$1/holder.$$" 2>/dev/null || true
  if [ "$code" -eq 0 ] && [ -n "$flocked" ]; then
    is_locked_folder "$1" && return 0
    # Only our own: the new folder may be locked by another process.
    [ "$(cat "$1/holder" 2>/dev/null)" != "$(process_record $$)" ] || as_owner rm -f "$1/holder"
    code=1
  fi
  exec 9<&-
  return "$code"
}

# Whether descriptor 9 is still the folder of that name: somebody may have removed it between opening and locking it.
is_locked_folder() { # FOLDER
  [ "$1" -ef /dev/fd/9 ]
}

write_record() { # FILE
  local record
  record=$(process_record $$)
  # Without a record (no ps in PATH) others would take us for dead.
  # shellcheck disable=SC2016 # for the owner's own sh
  [ -n "$record" ] && as_owner sh -c 'printf "%s\n" "$2" >"$1"' sh "$1" "$record" 2>/dev/null
}

# Makes FILE a link to RECORD_FILE.
link_lock() { # RECORD_FILE FILE
  local record again tries=0
  until as_owner ln "$1" "$2" 2>/dev/null; do
    if record=$(cat "$2" 2>/dev/null); then
      if is_alive "$record"; then
        # shellcheck disable=SC2034 # for the script that sources this
        lock_holder=${record%% *}
        return 1
      fi
      if link_lock "$1" "$2.stale"; then
        if again=$(cat "$2" 2>/dev/null) && [ "$again" = "$record" ]; then as_owner rm -f "$2"; fi
        as_owner rm -f "$2.stale"
        continue
      fi
    fi
    tries=$((tries + 1))
    [ "$tries" -lt 20 ] || return 2
    sleep 0.05
  done
}

unlock() { # FOLDER
  as_owner rm -f "$1/holder" || true
  exec 9<&-
}
