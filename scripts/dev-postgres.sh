#!/usr/bin/env bash
# A private PostgreSQL for the watcher: no TCP port, no system service, nothing outside its own folder.
#
# Safe by where it listens: only on a Unix socket in a folder of mode 0700, so whoever can reach the socket is its
# owner or root, and needs no password. PostgreSQL refuses to run as root; called by root, the cluster belongs to an
# unprivileged user and all work inside its folder is done as that user.
#
# DIR/cluster   the data                  DIR/log      the server's log
# DIR/socket    where it listens          DIR/moved    instead of all these: where the cluster is (see prepare_folder)
# DIR/starting  the lock of `start` and `stop`
#
# data/postgres.url of this project holds the URL of the server in data/postgres, for the watcher's commands
# (src/cli/database.rs).
#
# Written for bash 3.2, which is what macOS has.
#
# SC2016: the snippets in single quotes are for the owner's own sh. SC2012: stat differs between systems, ls -l does
# not. SC2015: the second half of each A && B || C may well run after B.
# shellcheck disable=SC2016,SC2012,SC2015
set -euo pipefail

readonly SUPERUSER=headspace DATABASE=headspace
# macOS allows 103 bytes for a socket's path, Linux 107; the file's own name takes 14 of them.
readonly SOCKET_FOLDER_BYTES_MAX=89
readonly START_SECONDS_MAX=60 STOP_SECONDS_MAX=30
# A process id no system hands out.
readonly NO_SUCH_PID=2147483646

usage() {
  cat <<'USAGE'
Usage: scripts/dev-postgres.sh COMMAND [DIR]          (DIR: data/postgres of this project)

  start             starts it and prints its URL; makes the cluster, and installs PostgreSQL, where they are missing
  start --throwaway [DIR]
                    the same in a new temporary folder (or DIR), which `stop` removes; prints the folder
  stop [--mode smart|fast|immediate]
                    stops it; its data stay
  status            says whether it runs: exit 0 when it accepts connections, 3 when not
  url               the connection URL (exit 3 when there is no cluster yet)
  psql [DIR] [psql's own arguments]
                    a psql session; starts the server if need be
  bin               the folder of initdb, pg_ctl and postgres; installs PostgreSQL where it is missing
  user              the user a server started now would run as

Example: scripts/dev-postgres.sh psql -c 'SELECT * FROM headspace_watcher.sessions'
USAGE
}

told=''
say() { printf 'dev-postgres: %s\n' "$*" >&2; }
die() { say "$2"; told=1; exit "$1"; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
project=$(dirname "$here")
# shellcheck source=scripts/lock.sh
. "$here/lock.sh"

# What the caller uses to reach another server must not steer this one (PGPORT alone would rename the socket).
# shellcheck disable=SC2086 # a list of names
unset ${!PG@}
# One locale for byte counts, for messages that are read below, and for macOS, where postgres stops without one.
caller_locale=${LC_ALL-}
export LC_ALL=C

# ---- acting as the user the server runs as ---------------------------------------------------------------------------

owner=''      # set by choose_owner
become=''     # how root acts as `owner`; empty when no change of user is needed

owner_of() { ls -ld "$1" | awk '{ print $3; exit }'; }

# The cluster's owner, else whom to give a new one to.
choose_owner() { # DIR
  become=''
  if [ "$(id -u)" -ne 0 ]; then
    owner=$(id -un)
    return
  fi
  if [ -d "$1/cluster" ]; then
    owner=$(owner_of "$1/cluster")
  elif id postgres >/dev/null 2>&1; then
    owner=postgres
  else
    owner=nobody
  fi
  # Each way is tried, because some setpriv and su can do less than their names promise (busybox).
  local way
  for way in setpriv runuser sudo su; do
    become=$way
    if command -v "$way" >/dev/null 2>&1 && as_owner true >/dev/null 2>&1; then return; fi
  done
  die 69 "root cannot act as user $owner, and postgres refuses to run as root: install setpriv, runuser or su (package util-linux)"
}

as_owner() {
  # From /: the caller's folder may be closed to the owner, and the programs complain about that.
  case $become in
    '') (cd / && "$@") ;;
    setpriv) (cd / && setpriv --reuid="$owner" --regid="$(id -g "$owner")" --init-groups -- "$@") ;;
    runuser) (cd / && runuser -u "$owner" -- "$@") ;;
    sudo) (cd / && sudo -n -u "$owner" -- "$@") ;;
    su) (cd / && su -s /bin/sh "$owner" -c "$(quoted "$@")") ;;
  esac
}

quoted() {
  local word
  for word in "$@"; do
    printf "'%s' " "$(printf '%s' "$word" | sed "s/'/'\\\\''/g")"
  done
}

# ---- PostgreSQL's programs -------------------------------------------------------------------------------------------

# Where Homebrew may be: as its own variable or PATH says, on Apple silicon, on Intel, on Linux.
homebrew_folders() {
  local brew
  [ -z "${HOMEBREW_PREFIX-}" ] || printf '%s\n' "$HOMEBREW_PREFIX"
  if brew=$(command -v brew); then printf '%s\n' "${brew%/bin/brew}"; fi
  printf '%s\n' /opt/homebrew /usr/local /home/linuxbrew/.linuxbrew
}

# Folders that may hold the server's programs, best first: what is in PATH, then the newest version. The version is the
# number in the last name: 17, pgsql-17, postgresql17 or postgresql@17.
bin_candidates() {
  local programs folder
  programs=$(command -v initdb || true)
  [ -z "$programs" ] || dirname "$programs"
  {
    ls -d /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /usr/libexec/postgresql* || true
    homebrew_folders | while IFS= read -r folder; do
      ls -d "$folder"/opt/postgresql*/bin "$folder/bin" || true
    done
    # Postgres.app, EnterpriseDB's installer, MacPorts
    ls -d /Applications/Postgres.app/Contents/Versions/*/bin /Library/PostgreSQL/*/bin /opt/local/lib/postgresql*/bin || true
  } 2>/dev/null | awk '{
    version = $0
    sub("/bin$", "", version)
    sub(".*/[^0-9/]*", "", version)
    print version + 0 "\t" $0
  }' | sort -rn | cut -f2- || true
}

major_of() { # BIN
  "$1/postgres" -V | awk '{ split($3, part, /[^0-9]/); print part[1] }'
}

# Prints the best folder of programs that the owner can run, of one major version when that is asked for.
find_bin() { # [MAJOR]
  local bin
  bin_candidates | while IFS= read -r bin; do
    [ -x "$bin/initdb" ] && [ -x "$bin/pg_ctl" ] && [ -x "$bin/postgres" ] || continue
    as_owner "$bin/postgres" -V >/dev/null 2>&1 || continue
    [ -z "${1-}" ] || [ "$(major_of "$bin")" = "$1" ] || continue
    printf '%s\n' "$bin"
    break
  done
}

# The command line that installs the server here; it is also what the error tells the user to run.
install_command() { # [MAJOR]
  if command -v apt-get >/dev/null 2>&1; then
    # Debian's package makes and starts a cluster of its own on port 5432 unless it is told not to; nobody asked for
    # that here. The setting is put back afterwards.
    cat <<INSTALL
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || true
apt-get install -y -qq --no-install-recommends postgresql-common
settings=/etc/postgresql-common/createcluster.conf
cp -p \$settings \$settings.before && printf 'create_main_cluster = false\n' >> \$settings
apt-get install -y -qq --no-install-recommends postgresql${1:+-$1}
status=\$?
mv \$settings.before \$settings
exit \$status
INSTALL
  elif command -v dnf >/dev/null 2>&1; then
    echo "dnf install -y -q postgresql-server"
  elif command -v pacman >/dev/null 2>&1; then
    echo "pacman -Sy --noconfirm --needed postgresql"
  elif command -v apk >/dev/null 2>&1; then
    echo "apk add --quiet postgresql postgresql-client"
  else
    # cron and launchd have no brew in their PATH.
    local folder
    homebrew_folders | while IFS= read -r folder; do
      if [ -x "$folder/bin/brew" ]; then echo "$folder/bin/brew install --quiet postgresql@${1:-17}"; fi
    done | sed -n 1p
  fi
}

# The same in the words of a user who has to run it.
install_hint() { # [MAJOR]
  if command -v apt-get >/dev/null 2>&1; then
    echo "sudo apt-get install postgresql${1:+-$1}"
  else
    local line
    line=$(install_command "${1-}")
    case $line in
      '') echo "your system's package of the PostgreSQL server" ;;
      *brew\ install*) echo "$line" ;;
      *) echo "sudo $line" ;;
    esac
  fi
}

install_postgres() { # [MAJOR]
  local script
  script=$(install_command "${1-}")
  [ -n "$script" ] ||
    die 69 "PostgreSQL is not installed and no known package manager (apt-get, dnf, pacman, apk, brew) is here: install the PostgreSQL server and put its initdb into PATH"
  local -a sudo
  case $script in
    *brew\ install*)
      [ "$(id -u)" -ne 0 ] || die 69 "PostgreSQL is not installed and brew does not run as root: run \"$script\" as the user who owns Homebrew"
      sudo=(env)
      ;;
    *)
      if [ "$(id -u)" -eq 0 ]; then
        sudo=(env)
      elif command -v sudo >/dev/null 2>&1 && sudo -n true >/dev/null 2>&1; then
        sudo=(sudo -n)
      elif command -v sudo >/dev/null 2>&1 && [ -t 0 ] && [ -t 2 ]; then
        sudo=(sudo)
      else
        die 69 "PostgreSQL is not installed, and installing it needs root: run \"$(install_hint "${1-}")\", then try again"
      fi
      ;;
  esac
  say "PostgreSQL${1:+ $1} is not installed; installing it, as by: $(install_hint "${1-}")"
  local output
  # Kept back unless it fails: pages of a package manager's progress hide what matters.
  if ! output=$("${sudo[@]}" sh -c "$script" 2>&1 </dev/null); then
    printf '%s\n' "$output" | tail -n 20 >&2
    die 69 "could not install PostgreSQL (the package manager's last words are above): run \"$(install_hint "${1-}")\" by hand, then try again"
  fi
}

bin=''
need_bin() { # [MAJOR]
  bin=$(find_bin "${1-}")
  [ -z "$bin" ] || return 0
  install_postgres "${1-}"
  # The package may just have made the user that servers run as.
  choose_owner "$dir"
  bin=$(find_bin "${1-}")
  [ -n "$bin" ] || die 69 "PostgreSQL${1:+ $1} was installed, but its initdb, pg_ctl and postgres are in none of the usual folders: put their folder into PATH"
}

# ---- the folder ------------------------------------------------------------------------------------------------------

dir='' given_dir='' # where the cluster is, and what the caller calls it: not the same when it was moved

absolute() {
  case $1 in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s/%s\n' "$PWD" "$1" ;;
  esac
}

# Follows DIR/moved.
settle_folder() {
  [ ! -d "$dir" ] || [ -x "$dir" ] ||
    die 77 "could not enter $dir: it belongs to user $(owner_of "$dir"); run this as that user or as root"
  given_dir=$dir
  # An empty one was written on a full disk.
  if [ -s "$dir/moved" ]; then dir=$(cat "$dir/moved"); fi
  [ ! -d "$dir" ] || [ -x "$dir" ] ||
    die 77 "could not enter $dir: it belongs to user $(owner_of "$dir"); run this as that user or as root"
}

reachable() { as_owner sh -c 'cd "$1" && [ -x . ]' sh "$1" >/dev/null 2>&1; }

# Nothing, or what a start that was cut short has left.
holds_only_ours() {
  local name
  for name in "$dir"/* "$dir"/.[!.]*; do
    case ${name##*/} in
      '*' | '.[!.]*' | socket | socket-folder | log | log.1 | throwaway | starting | moved | cluster.new) ;;
      *) return 1 ;;
    esac
  done
}

# Makes DIR, private to the owner. Where the owner cannot get to DIR at all (a clone under root's home), the cluster
# lives under /var/lib, and DIR/moved says where.
prepare_folder() {
  [ ! -d "$dir/cluster" ] || return 0
  if [ -d "$dir" ] && ! holds_only_ours; then
    die 73 "will not make a cluster in $dir: it is in use for something else; give an empty folder"
  fi
  mkdir -p "$dir" || die 73 "could not make $dir: give a folder you may write to"
  if ! reachable "$(dirname "$dir")"; then
    local elsewhere
    elsewhere=/var/lib/headspace-watcher/postgres-$(printf '%s' "$dir" | cksum | awk '{ print $1 }')
    mkdir -p "$elsewhere"
    reachable "$(dirname "$elsewhere")" ||
      die 77 "user $owner can enter neither $dir nor $elsewhere: make one of them reachable (chmod a+x on its parent folders)"
    printf '%s\n' "$elsewhere" >"$dir/moved" || die 74 "could not write $dir/moved: is there space on the disk?"
    say "user $owner cannot reach $dir; the cluster is in $elsewhere"
    dir=$elsewhere
  fi
  [ -z "$become" ] || chown "$owner" "$dir"
  chmod 0700 "$dir"
}

# DIR/socket, or a short folder of its own where that path is too long for a socket, or holds a comma, at which
# clients would cut it in two.
socket_folder() {
  if [ -f "$dir/socket-folder" ]; then
    cat "$dir/socket-folder"
  else
    printf '%s/socket\n' "$dir"
  fi
}

prepare_socket_folder() {
  local folder
  folder=$dir/socket
  case $folder in
    *,* | *$'\n'*) folder='' ;;
    *) [ ${#folder} -le $SOCKET_FOLDER_BYTES_MAX ] || folder='' ;;
  esac
  if [ -n "$folder" ]; then
    as_owner mkdir -p "$folder"
    as_owner chmod 0700 "$folder"
    as_owner rm -f "$dir/socket-folder"
    return
  fi
  # /tmp may have been swept since the last time; mkdir's mode and mktemp both keep it private.
  if [ -f "$dir/socket-folder" ]; then
    folder=$(cat "$dir/socket-folder")
    if [ "$(owner_of "$folder" 2>/dev/null)" = "$owner" ]; then return; fi
  fi
  folder=$(as_owner mktemp -d /tmp/headspace-postgres.XXXXXX)
  as_owner sh -c 'printf "%s\n" "$2" >"$1/socket-folder"' sh "$dir" "$folder"
}

# ---- the server ------------------------------------------------------------------------------------------------------

# The postmaster's id, when it is alive and is this cluster's: after a crash or in a container the recorded id may long
# belong to some other process, which pg_ctl takes for the server.
postmaster() {
  local pid
  pid=$(head -n 1 "$dir/cluster/postmaster.pid" 2>/dev/null) || return 1
  [ -n "$pid" ] || return 1
  is_server_of "$pid" "$dir/cluster" || return 1
  printf '%s\n' "$pid"
}

accepts_connections() {
  postmaster >/dev/null && [ "$(sed -n '8s/ *$//p' "$dir/cluster/postmaster.pid" 2>/dev/null)" = ready ]
}

make_cluster() {
  local fresh output
  fresh=$dir/cluster.new
  as_owner rm -rf "$fresh"
  local -a extra
  extra=(--data-checksums)
  # Only the making goes unsynced; the server itself always syncs.
  [ ! -f "$dir/throwaway" ] || extra=(--data-checksums --no-sync)
  if ! output=$(as_owner "$bin/initdb" -D "$fresh" -U "$SUPERUSER" -E UTF8 --no-locale \
    --auth-local=trust --auth-host=reject "${extra[@]}" 2>&1); then
    printf '%s\n' "$output" >&2
    die 73 "could not make a cluster in $dir (initdb's words are above)"
  fi
  as_owner sh -c 'printf "\ninclude = '\''headspace.conf'\''\n" >>"$1/postgresql.conf" && : >"$1/headspace.conf"' sh "$fresh"
  if ! output=$(as_owner sh -c 'printf "CREATE DATABASE %s\n" "$3" | "$1/postgres" --single -D "$2" postgres' sh "$bin" "$fresh" "$DATABASE" 2>&1); then
    printf '%s\n' "$output" >&2
    die 73 "could not make the database $DATABASE in $dir (the server's words are above)"
  fi
  # The name stands only for a finished cluster, so a run killed half-way is simply done again.
  as_owner mv "$fresh" "$dir/cluster"
}

write_settings() {
  local folder
  # Twice quoted: the list wants double quotes around each folder, the file single ones around the list.
  folder=$(socket_folder | sed "s/\"/\"\"/g; s/'/''/g")
  as_owner sh -c 'cat >"$1"' sh "$dir/cluster/headspace.conf" <<SETTINGS
# Written by scripts/dev-postgres.sh at each start; own settings belong into postgresql.conf, below its include line.
listen_addresses = ''
port = 5432
unix_socket_directories = '"$folder"'
unix_socket_permissions = 0700
cluster_name = 'headspace-watcher'
SETTINGS
}

# Moves what a killed server left behind out of the next one's way, for when its id lives on in some other process or
# in a zombie. The lock of the data is not removed but given an id that cannot be alive: so postgres still looks for
# processes that use the cluster's shared memory, which is what guards the data.
release_stale_locks() {
  local file folder
  folder=$(socket_folder)
  as_owner rm -f "$folder/.s.PGSQL.5432" "$folder/.s.PGSQL.5432.lock"
  file=$dir/cluster/postmaster.pid
  [ -f "$file" ] || return 0
  as_owner sh -c 'sed "1s/.*/$2/" "$1" >"$1.stale" && mv "$1.stale" "$1"' sh "$file" "$NO_SUCH_PID"
}

# One start or stop at a time in a folder: two starts would take each other's unfinished work for leftovers, and a stop
# would miss the server of a start that is under way. The server itself, which outlives the start, must not inherit the lock.
lock_starting() { # VERB
  local code turns=0
  as_owner mkdir -p "$dir/starting" || die 77 "could not write in $dir: run this as user $(owner_of "$dir") or as root"
  while code=0; try_lock "$dir/starting" || code=$?; [ "$code" -ne 0 ]; do
    if [ "$code" -eq 2 ]; then
      # A full disk keeps no server from being stopped.
      [ "$1" != stop ] || return 0
      die 74 "could not write in $dir/starting: is there space on the disk?"
    fi
    [ "$turns" -lt $((START_SECONDS_MAX * 10)) ] ||
      die 69 "could not $1 PostgreSQL in $dir: another start or stop (pid ${lock_holder:-unknown}) has taken more than $START_SECONDS_MAX s; wait for it, or end it"
    turns=$((turns + 1))
    sleep 0.1
  done
  locked=1
}

unlock_starting() {
  [ -z "$locked" ] || unlock "$dir/starting"
  locked=''
}

start_server() {
  local output='' turns=0
  while ! accepts_connections; do
    if ! postmaster >/dev/null; then
      # The first time round, and again while the last processes of a killed server are still going.
      case $output in
        '' | *'shared memory block'*) ;;
        *) break ;;
      esac
      prepare_socket_folder
      release_stale_locks
      write_settings
      if [ -f "$dir/log" ] && [ "$(wc -c <"$dir/log")" -gt 10485760 ]; then as_owner mv "$dir/log" "$dir/log.1"; fi
      # A failure may also mean that another start was faster; what counts is whether it serves in the end.
      output=$(as_owner "$bin/pg_ctl" -D "$dir/cluster" -l "$dir/log" -w -t "$START_SECONDS_MAX" -s start 2>&1 9<&-) ||
        output="$output: $(tail -n 5 "$dir/log" 2>/dev/null || true)"
    fi
    [ "$turns" -lt $((START_SECONDS_MAX * 10)) ] || break
    turns=$((turns + 1))
    accepts_connections || sleep 0.1
  done
  accepts_connections || die 69 "could not start PostgreSQL in $dir: ${output:-it does not accept connections}
dev-postgres: the whole log is $dir/log"
}

percent_encoded() {
  local text=$1 i char
  for ((i = 0; i < ${#text}; i++)); do
    char=${text:i:1}
    case $char in
      [A-Za-z0-9._~/-]) printf '%s' "$char" ;;
      *) printf '%%%02X' "$(($(printf '%d' "'$char") & 255))" ;;
    esac
  done
}

url() {
  # All of it, so that nothing is taken from the PG* variables of whoever connects.
  printf 'postgresql:///%s?host=%s&port=5432&user=%s\n' "$DATABASE" "$(percent_encoded "$(socket_folder)")" "$SUPERUSER"
}

# Of the server in data/postgres alone: only beside that folder do the watcher's commands look for it.
leave_url() {
  [ "$given_dir" = "$project/data/postgres" ] || return 0
  if url >"$given_dir.url.new" && mv -f "$given_dir.url.new" "$given_dir.url"; then return; fi
  say "could not write $given_dir.url, from which the watcher's commands know this server"
}

# pg_ctl starts the server through a shell, with its paths in double quotes.
misread_by_pg_ctl() { # PATH
  case $1 in
    *[\"\$\`\\]* | *$'\n'*) return 0 ;;
    *) return 1 ;;
  esac
}

# ---- commands --------------------------------------------------------------------------------------------------------

start() {
  ! misread_by_pg_ctl "$dir" ||
    die 78 "will not run a server in $dir: pg_ctl misreads a path with \", \$, \`, \\ or a newline in it; give another folder"
  choose_owner "$dir"
  keep_permanent
  if accepts_connections; then return; fi
  trap 'end_start $?' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap 'exit 129' HUP
  prepare_folder
  local major=''
  [ ! -f "$dir/cluster/PG_VERSION" ] || major=$(cat "$dir/cluster/PG_VERSION")
  need_bin "$major"
  # Installing may have made the user `postgres`, who gets the folder then.
  prepare_folder
  lock_starting start
  mark_throwaway
  [ -d "$dir/cluster" ] || make_cluster
  start_server
  unlock_starting
  trap - EXIT INT TERM HUP
}

# A permanent cluster never becomes a throw-away one: `stop` would delete its data.
keep_permanent() {
  if [ -n "$throwaway" ] && [ -d "$dir/cluster" ] && [ ! -f "$dir/throwaway" ]; then
    die 73 "will not make the cluster in $dir a throw-away one: stop would delete its data; give an empty folder, or start it without --throwaway"
  fi
}

# DIR/throwaway is set before the cluster is made, under the lock. A mark without a cluster is what a killed start left.
mark_throwaway() {
  keep_permanent
  if [ -n "$throwaway" ]; then
    as_owner touch "$dir/throwaway"
  elif [ ! -d "$dir/cluster" ]; then
    as_owner rm -f "$dir/throwaway"
  fi
}

# Never without a word, whatever failed.
end_start() { # EXIT_CODE
  unlock_starting
  [ -n "$told" ] || say "could not start PostgreSQL in $dir (exit code $1); its log, if there is one, is $dir/log"
}

stop() {
  # Nothing is made in a folder that is none of ours.
  if [ -d "$dir/cluster" ] || [ -d "$dir/starting" ]; then
    choose_owner "$dir"
    trap unlock_starting EXIT
    lock_starting stop
  fi
  if [ -d "$dir/cluster" ]; then
    local pid output
    if pid=$(postmaster); then
      if [ -f "$dir/throwaway" ]; then mode=immediate; fi
      bin=$(find_bin "$(cat "$dir/cluster/PG_VERSION")")
      if ! output=$(as_owner "${bin:-.}/pg_ctl" -D "$dir/cluster" -m "$mode" -w -t "$STOP_SECONDS_MAX" -s stop 2>&1); then
        # A stopped process (SIGSTOP) does not hear pg_ctl. Nobody misses a throw-away.
        if [ -f "$dir/throwaway" ]; then
          kill -KILL "$pid" 2>/dev/null || true
        elif postmaster >/dev/null; then
          die 70 "could not stop PostgreSQL in $dir: $output"
        fi
      fi
    fi
  fi
  [ -f "$dir/throwaway" ] || return 0
  local folder
  folder=$(socket_folder)
  # Backends of a killed server may still be writing.
  local tries
  for tries in 1 2 3 4 5; do
    rm -rf "$folder" "$dir" 2>/dev/null && break
    sleep "0.$tries"
  done
  rm -rf "$folder" "$dir"
  if [ "$dir" != "$given_dir" ]; then
    rm -f "$given_dir/moved"
    rmdir "$given_dir" 2>/dev/null || true
  fi
}

status() {
  local pid
  if [ -d "$dir/cluster" ] && pid=$(postmaster); then
    if accepts_connections; then
      printf 'running, pid %s, %s\n' "$pid" "$(url)"
      return 0
    fi
    printf 'starting or stopping, pid %s, see %s/log\n' "$pid" "$dir"
  elif [ -d "$dir/cluster" ]; then
    printf 'stopped, data in %s\n' "$dir"
  else
    printf 'no cluster in %s; "scripts/dev-postgres.sh start" makes one\n' "$dir"
  fi
  return 3
}

command=${1-}
[ $# -eq 0 ] || shift
throwaway='' locked='' mode=fast

# Options first, then DIR; what follows goes to psql.
while [ $# -gt 0 ]; do
  case $command:$1 in
    start:--throwaway) throwaway=1; shift ;;
    stop:--mode)
      case ${2-} in
        smart | fast | immediate) mode=$2 ;;
        *) die 64 "--mode takes smart, fast or immediate" ;;
      esac
      shift 2
      ;;
    psql:-*) break ;;
    *:-h | *:--help) usage; exit 0 ;;
    *:-*) die 64 "$command has no option $1; see scripts/dev-postgres.sh --help" ;;
    *)
      [ -n "$1" ] || die 64 "the folder's name is empty"
      dir=$(absolute "$1")
      shift
      break
      ;;
  esac
done
[ "$command" = psql ] || [ $# -eq 0 ] || die 64 "too many arguments: $*; see scripts/dev-postgres.sh --help"

if [ -n "$throwaway" ] && [ -z "$dir" ]; then
  choose_owner /nonexistent
  temporary=${TMPDIR:-/tmp}
  temporary=${temporary%/}
  as_owner test -w "$temporary" && [ ${#temporary} -le 56 ] && ! misread_by_pg_ctl "$temporary" || temporary=/tmp
  dir=$(as_owner mktemp -d "$temporary/headspace-postgres.XXXXXX")
fi
dir=${dir:-$project/data/postgres}

case $command in
  start)
    settle_folder
    if [ -n "$throwaway" ]; then
      start
      printf '%s\n' "$given_dir"
    else
      start
      leave_url
      url
    fi
    ;;
  stop) settle_folder; stop ;;
  status) settle_folder; status ;;
  url)
    settle_folder
    [ -d "$dir/cluster" ] || die 3 "no cluster in $dir; \"scripts/dev-postgres.sh start\" makes one"
    url
    ;;
  psql)
    settle_folder
    [ -d "$dir/cluster" ] || die 3 "no cluster in $dir; \"scripts/dev-postgres.sh start\" makes one"
    if ! accepts_connections; then
      start
      leave_url
      say "the server was not running; it is now, until \"scripts/dev-postgres.sh stop\""
    else
      choose_owner "$dir"
      bin=$(find_bin "$(cat "$dir/cluster/PG_VERSION")")
    fi
    psql=$bin/psql
    [ -x "$psql" ] || psql=$(command -v psql) || die 69 "psql is not installed: install the PostgreSQL client, or use any other with $(url)"
    if [ -n "$caller_locale" ]; then export LC_ALL=$caller_locale; else unset LC_ALL; fi
    # In the environment, so that psql's own options, -d for one, change what they name and nothing else.
    PGHOST=$(socket_folder)
    export PGHOST PGPORT=5432 PGUSER=$SUPERUSER PGDATABASE=$DATABASE
    exec "$psql" "$@"
    ;;
  bin) choose_owner "$dir"; need_bin; printf '%s\n' "$bin" ;;
  user) choose_owner "$dir"; printf '%s\n' "$owner" ;;
  -h | --help | help) usage ;;
  '') usage >&2; exit 64 ;;
  *) die 64 "no command $command; see scripts/dev-postgres.sh --help" ;;
esac
