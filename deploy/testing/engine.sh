#!/usr/bin/env bash
# A private container engine, for machines that have none running: Debian's dockerd as root, in namespaces of its
# own. Its bridges, firewall rules and mounts are not seen outside, and its end is the end of all its containers.
#
#   engine.sh start DIR        the engine's data, socket and logs lie in DIR; containers reach the network
#   engine.sh run DIR CMD...   with DOCKER_HOST set, in the engine's network: published ports are seen there only
#   engine.sh stop DIR         the data stays
#
# Needs the packages docker.io and slirp4netns.
set -euo pipefail
verb=$1
directory=$(realpath -m "$2")
shift 2
export DOCKER_HOST="unix://$directory/docker.sock"

answers() { curl -sf --max-time 2 --unix-socket "$directory/docker.sock" http://engine/_ping >/dev/null; }

# The engine's first process as seen from here; it holds the namespaces.
engine_pid() { pgrep -P "$(cat "$directory/unshare.pid")"; }

start() {
    mkdir -p "$directory"
    rm -rf "$directory/exec" "$directory/docker.pid" # of an engine that was killed
    setsid unshare --net --mount --pid --fork --kill-child --mount-proc --propagation private -- \
        bash -c 'ip link set lo up && exec dockerd --host="$DOCKER_HOST" --data-root="$0/data" --exec-root="$0/exec" \
            --pidfile="$0/docker.pid" --cgroup-parent="/baton-test-$1" --log-level=warn' "$directory" "$$" \
        >"$directory/dockerd.log" 2>&1 </dev/null &
    echo $! >"$directory/unshare.pid"
    echo "/baton-test-$$" >"$directory/cgroup"
    for _ in $(seq 300); do
        if answers; then break; fi
        sleep 0.1
    done
    answers || { tail -n 20 "$directory/dockerd.log" >&2; stop; exit 1; }
    # Packets leave through a process of a user's kind: the machine itself forwards and translates nothing.
    setsid slirp4netns --configure --mtu=1400 --disable-host-loopback "$(engine_pid)" tap0 \
        >"$directory/slirp4netns.log" 2>&1 </dev/null &
    echo $! >"$directory/slirp4netns.pid"
    for _ in $(seq 100); do
        nsenter --target "$(engine_pid)" --net ip link show tap0 >/dev/null 2>&1 && return
        sleep 0.1
    done
    cat "$directory/slirp4netns.log" >&2
    stop
    exit 1
}

stop() {
    [ -f "$directory/unshare.pid" ] || return 0
    local outer
    outer=$(cat "$directory/unshare.pid")
    kill "$(engine_pid)" 2>/dev/null || true
    for _ in $(seq 200); do
        kill -0 "$outer" 2>/dev/null || break
        sleep 0.1
    done
    kill -9 "$outer" 2>/dev/null || true
    [ -f "$directory/slirp4netns.pid" ] && kill "$(cat "$directory/slirp4netns.pid")" 2>/dev/null || true
    find /sys/fs/cgroup -depth -type d -path "*$(cat "$directory/cgroup")*" -exec rmdir {} + 2>/dev/null || true
    rm -f "$directory"/*.pid "$directory/cgroup"
}

case $verb in
start) start ;;
run) exec nsenter --target "$(engine_pid)" --net -- "$@" ;;
stop) stop ;;
*) echo "engine.sh start|run|stop DIR" >&2; exit 2 ;;
esac
