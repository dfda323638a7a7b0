# Shared by the scripts here; to be sourced by bash, not run. Every function says on standard error
# what went wrong and returns non-zero; nothing writes to standard output.
#
#   root                    the repository
#   die TEXT                ends the script with TEXT (exit code 1)
#   build_all [-p CRATE]... builds library, daemon, command and simulator (and more crates) with the
#                           profile "demo"; sets built=FOLDER of the results. $no_build=1: only looks
#                           whether they are there
#   make_place              makes the private folder $place, readable for other users, with bin/, lib/,
#                           run/ and sim/; from then on, whatever way this script ends (kill -9 too),
#                           every process started in it is ended and the folder is removed
#   make_sim GPUS MEMORY DRIVER   the simulated driver and machine in $place; exports LD_LIBRARY_PATH
#                           and SPILLWAY_SIM_*
#   enter_place             exports PATH, SPILLWAY_LIBRARY, SPILLWAY_RUN_DIR for what is in $place
#   start_daemon [FLAG]...  starts spillwayd in $place, waits until both of its sockets answer; sets
#                           daemon_pid; its log is $place/spillwayd.log
#   stop_daemon             ends it and waits for its end
#   cleanup                 what happens at the end anyway; returns when it is done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
me=$(basename "$0")
place='' keep_fd='' daemon_pid='' built=''

say() { printf '%s: %s\n' "$me" "$*" >&2; }
die() { say "$@"; exit 1; }

build_all() {
    local target=${CARGO_TARGET_DIR:-$root/target} log file
    case $target in /*) ;; *) target=$PWD/$target ;; esac
    built=$target/demo
    if [[ ${no_build:-} ]]; then
        for file in libspillway.so libspillway_strict.so spillway spillwayd; do
            [[ -f $built/$file ]] || { say "$built/$file is not there: build first"; return 1; }
        done
        return 0
    fi
    command -v cargo >/dev/null || { say "no cargo on PATH: install Rust (rustup.rs)"; return 1; }
    [[ -f $built/spillwayd && -f $built/libspillway.so ]] || say "building; the first time takes a minute or two"
    if ! log=$(cargo build --manifest-path "$root/Cargo.toml" --target-dir "$target" --profile demo \
        --quiet -p spillway-interposer -p spillway-interposer-strict -p spillway-coordinator -p spillway-simulator-cuda \
        -p spillway-simulator-nvml "$@" 2>&1); then
        printf '%s\n' "$log" >&2
        say "the build failed"
        return 1
    fi
}

make_place() {
    local base=${TMPDIR:-/tmp}
    # A socket's address holds 107 bytes: a deep TMPDIR leaves no room for the names below it.
    ((${#base} <= 60)) || base=/tmp
    place=$(mktemp -d "$base/spillway.XXXXXXXX") || return 1
    chmod 0755 "$place" && mkdir "$place/bin" "$place/lib" "$place/run" || return 1
    # Other users' programs share the simulated machine.
    mkdir -m 1777 "$place/sim" && mkfifo "$place/keeper" || return 1
    keeper "$place" <"$place/keeper" >/dev/null 2>&1 &
    keeper_pid=$!
    exec {keep_fd}>"$place/keeper" || return 1
    export SPILLWAY_PLACE=$place
    trap cleanup EXIT
}

# Waits until nobody holds the other end of its input, which the kernel closes even after kill -9;
# then ends what still runs in the place, and removes it.
keeper() {
    local mine=$1 left tries
    unset SPILLWAY_PLACE
    trap '' HUP INT QUIT TERM TSTP
    read -r _
    for tries in {1..80}; do
        left=$(running_in "$mine") || break
        # shellcheck disable=SC2086 # a list of numbers
        if ((tries == 1)); then kill -TERM $left; kill -CONT $left; elif ((tries > 60)); then kill -KILL $left; fi
        sleep 0.05
    done
    rm -rf -- "$mine"
}

# The pids of the processes started in a place: its name is in their environment.
running_in() {
    local file found=1
    while read -r file; do
        file=${file#/proc/}
        printf '%s ' "${file%/environ}"
        found=0
    done < <(grep -lsF "SPILLWAY_PLACE=$1" /proc/[0-9]*/environ)
    return "$found"
}

make_sim() {
    "$root/scripts/sim-dir" "$built" "$place/lib" >&2 || { say "no simulated driver in $built"; return 1; }
    export LD_LIBRARY_PATH=$place/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export SPILLWAY_SIM_DIR=$place/sim SPILLWAY_SIM_GPUS=$1 SPILLWAY_SIM_MEMORY=$2 SPILLWAY_SIM_DRIVER=$3
}

enter_place() {
    # Copies: a build meanwhile must not replace what runs, and other users may not reach $built.
    cp "$built/spillway" "$built/spillwayd" "$place/bin/" || return 1
    cp "$built/libspillway.so" "$built/libspillway_strict.so" "$place/lib/" || return 1
    chmod 0755 "$place"/bin/* "$place"/lib/libspillway*.so || return 1
    export PATH=$place/bin:$PATH
    export SPILLWAY_LIBRARY=$place/lib/libspillway.so SPILLWAY_RUN_DIR=$place/run
}

start_daemon() {
    local log=$place/spillwayd.log tries
    # In a session of its own, so that Ctrl-C in the terminal does not reach it; without the keeper's
    # descriptor, or its end would have to come first.
    setsid "$place/bin/spillwayd" --run-dir "$place/run" "$@" \
        </dev/null >>"$log" 2>&1 {keep_fd}>&- &
    daemon_pid=$!
    disown "$daemon_pid"
    for tries in {1..600}; do
        if [[ -S $place/run/session/session.sock ]] &&
            "$place/bin/spillway" --run-dir "$place/run" status >/dev/null 2>&1; then
            return 0
        fi
        kill -0 "$daemon_pid" 2>/dev/null || break
        sleep 0.05
    done
    say "spillwayd did not start:"
    tail -n 20 "$log" >&2
    return 1
}

stop_daemon() {
    [[ $daemon_pid ]] || return 0
    kill -TERM "$daemon_pid" 2>/dev/null
    local tries
    for tries in {1..200}; do
        kill -0 "$daemon_pid" 2>/dev/null || break
        ((tries < 150)) || kill -KILL "$daemon_pid" 2>/dev/null
        sleep 0.02
    done
    daemon_pid=''
}

cleanup() {
    trap '' INT TERM HUP QUIT
    if [[ $keep_fd ]]; then
        exec {keep_fd}>&-
        keep_fd=''
        while kill -0 "$keeper_pid" 2>/dev/null; do wait "$keeper_pid" 2>/dev/null; done
    elif [[ $place ]]; then
        rm -rf -- "$place"
    fi
    place=''
}
