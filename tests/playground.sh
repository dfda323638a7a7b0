#!/usr/bin/env bash
# What scripts/playground promises, one line per promise: "ok NAME" or "FAILED NAME: why"; exit code 1
# if one failed. Arguments go to every playground (--no-build saves time).
set -u
cd "$(dirname "$0")/.." || exit 1
playground=(scripts/playground "$@")
TMPDIR=$(mktemp -d /tmp/spillway-test.XXXXXX) && export TMPDIR || exit 1
trap 'rm -rf -- "$TMPDIR"' EXIT
failed=0

check() { # NAME WANTED SEEN
    local left
    left=$(ls -A "$TMPDIR")
    if [[ $2 != "$3" ]]; then
        printf 'FAILED %s: wanted "%s", saw "%s"\n' "$1" "$2" "$3"
        failed=1
    elif [[ $left ]]; then
        printf 'FAILED %s: left behind %s\n' "$1" "$left"
        failed=1
        rm -rf -- "$TMPDIR"/*
    else
        printf 'ok %s\n' "$1"
    fi
}

# Prints something if a `sleep` of so many seconds runs; the pattern does not match itself.
asleep() { cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' ' ' | grep -o "sleep [${1:0:1}]${1:1} "; }

# Runs in the playground; what it printed, and its exit code, in one line.
try() {
    local out
    out=$("${playground[@]}" "$@" 2>/dev/null </dev/null)
    printf '%s=%s' "${out//$'\n'/,}" $?
}

# Starts one in the background with signals as a terminal would have them, waits until its command
# runs, and runs the rest with its pid; then its exit code.
signalled() { # SIGNAL COMMAND
    local pid
    set -m
    "${playground[@]}" --bare -- bash -c "touch $TMPDIR/runs; $2" >"$TMPDIR/out" 2>/dev/null </dev/null &
    pid=$!
    set +m
    until [[ -e $TMPDIR/runs ]]; do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.05
    done
    kill -s "$1" "$pid"
    wait "$pid" 2>/dev/null
    printf '%s' "$?"
    rm -f "$TMPDIR/runs" "$TMPDIR/out"
}

"${playground[@]}" --bare -- true </dev/null || { echo "FAILED it does not start at all"; exit 1; }

check "a command's exit code" '=7' "$(try --bare -- sh -c 'exit 7')"
check "killed by a signal" '=137' "$(try --bare -- sh -c 'kill -9 $$')"
check "no such program" '=127' "$(try --bare -- no-such-program)"
check "not a program" '=126' "$(try --bare -- /etc/passwd)"
check "standard input" 'abc=0' "$(printf abc | "${playground[@]}" --bare -- cat)=$?"
check "the command is not preloaded" '=0' "$(try --bare -- printenv LD_PRELOAD | sed 's/=1$/=0/')"
check "spillway is on the PATH" 'spillway 0=0' "$(try --bare -- sh -c 'spillway --version | cut -d. -f1')"
check "the library is named" '=0' "$(try --bare -- sh -c 'test -r "$SPILLWAY_LIBRARY"')"
check "bare means no coordinator" '=125' "$(try --bare -- spillway run -- true)"
check "a coordinator of its own" '=0' "$(try -- spillway run --limit 1GiB -- true)"
check "its devices" '3=0' "$(try --gpus 3 --memory 512MiB -- sh -c 'spillway status | grep -c "512 MiB"')"
check "flags for the coordinator" '64 MiB=0' \
    "$(try --spillwayd '--pool 64MiB' -- sh -c 'spillway status | grep -o "64 MiB" | head -n 1')"
check "bad flags for the coordinator" '=125' "$(try --spillwayd --no-such-flag -- true)"
check "a coordinator that the command killed" '=0' "$(try -- sh -c 'kill -9 $(spillway status | sed -n "1s/.* pid \([0-9]*\).*/\1/p")')"
check "what the command left running" '=0' "$(try -- sh -c 'sleep 1234 & kill -STOP $!; sleep 1234 & true')"
check "nothing of it still runs" '' "$(asleep 1234)"
for option in '--gpus' '--gpus 0' '--gpus 17' '--memory 4' '--driver 1.0' '--bogus' 'true'; do
    # shellcheck disable=SC2086 # words
    check "refuses $option" '=2' "$(try $option)"
done
check "TERM is passed on" 41 "$(signalled TERM 'trap "exit 41" TERM; while :; do sleep 0.05; done')"
check "INT is passed on" 42 "$(signalled INT 'trap "exit 42" INT; while :; do sleep 0.05; done')"
check "HUP ends what does not catch it" 129 "$(signalled HUP 'exec sleep 1235')"
signalled KILL 'exec sleep 1236' >/dev/null
for _ in {1..100}; do
    [[ $(ls -A "$TMPDIR") || $(asleep 1236) ]] || break
    sleep 0.05
done
check "killed, it still cleans up" '' "$(asleep 1236)"
exit "$failed"
