# shellcheck shell=bash
# One process at a time: the lock of run-watcher.sh and dev-postgres.sh, which source this file.
#
# A lock is a folder. Its file `holder` is the record of the process that has it: process id, start time, boot. A process
# id alone names nobody: ids are used again, in a container at every start.
#
# The lock is the file `holder`, made complete by link(2). A dead process's file is removed only by the process that has
# `holder.stale`, a lock of the same kind: what it removes is the file that it has read.
#
# With flock(1), a flock of the folder on descriptor 9 comes first. The kernel releases it however its holder ends. Processes
# that the holder starts inherit the descriptor: those that may outlive it are started with 9<&-. `holder` is taken all the
# same, because another process may find no flock in its PATH (macOS has none); only a full disk is no reason to give up.
#
# The script that sources this defines as_owner, which runs a command as the user to whom the folder belongs.

# The record of a living process; nothing for a dead one or a zombie.
process_record() { # PID
  local pid=$1 fields boot=''
  case $pid in
    '' | *[!0-9]*) return 0 ;;
  esac
  if [ -r /proc/self/stat ]; then
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
    fields=$(LC_ALL=C ps -o stat= -o lstart= -p "$pid" 2>/dev/null) || return 0
    # shellcheck disable=SC2086 # fields
    set -- $fields
    case ${1-} in
      '' | Z*) return 0 ;;
    esac
    shift
    printf '%s %s\n' "$pid" "$*"
  fi
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
  if { exec 9<"$1"; } 2>/dev/null; then
    code=0
    flock -n 9 2>/dev/null || code=$?
  fi
  record=$(cat "$1/holder" 2>/dev/null) || true
  if [ "$code" -eq 1 ]; then
    exec 9<&-
    if is_alive "$record"; then lock_holder=${record%% *}; fi
    return 1
  fi
  # Otherwise there is no flock here, or the file system has none.
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
  # shellcheck disable=SC2016 # for the owner's own sh
  as_owner sh -c 'printf "%s\n" "$2" >"$1"' sh "$1" "$(process_record $$)" 2>/dev/null
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
