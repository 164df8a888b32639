#!/usr/bin/env bash
# Runs the tests that need a container engine: on the one that answers `docker info`, or else as root on Linux on a
# private one with stand-ins for the images of registries. In CI (CI=true) what is missing is installed, and tests
# that cannot run fail; elsewhere they are skipped and say why.
#
#   run_tests.sh [pytest's options]       BATON_ENGINE_DIR=DIR keeps the private engine's data there, for the next run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
tests=("$python" -m pytest -q -p no:cacheprovider tests/deploy/test_compose.py "$@")

is_ci() { [ "${CI:-}" = true ]; }

if docker info >/dev/null 2>&1; then
    BATON_TEST_CONTAINERS=require exec "${tests[@]}"
fi

has_parts() { # `command -v` with several names is content with one of them
    local part
    for part in dockerd slirp4netns mmdebstrap unshare nsenter; do command -v "$part" >/dev/null || return 1; done
}

if is_ci && ! has_parts; then
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends docker.io slirp4netns mmdebstrap >/dev/null
fi
if [ "$(id -u)" != 0 ] || ! has_parts; then
    echo "no container engine, and none can be started: that takes root and docker.io, slirp4netns, mmdebstrap" >&2
    BATON_TEST_CONTAINERS=$(is_ci && echo require || echo auto) exec "${tests[@]}"
fi

directory=${BATON_ENGINE_DIR:-$(mktemp -d /var/tmp/baton-engine.XXXXXX)}
wheel=
finish() {
    deploy/testing/engine.sh stop "$directory"
    [ -n "${BATON_ENGINE_DIR:-}" ] || rm -rf "$directory"
    if [ -n "$wheel" ]; then rm -f deploy/wheels/torch-*.whl; fi
}
trap finish EXIT
# Where pip's own configuration has a wheel of torch on disk, the image gets that one: no index of torch is needed.
if ! ls deploy/wheels/torch-*.whl >/dev/null 2>&1; then
    torch=$(sed -n 's/^ARG TORCH=//p' deploy/Dockerfile)
    if "$python" -m pip download -qq --no-deps --no-index --dest deploy/wheels "$torch" 2>/dev/null; then wheel=1; fi
fi
deploy/testing/engine.sh start "$directory"
export DOCKER_HOST="unix://$directory/docker.sock"
named() { grep -oE "$1[^ ]+" "$2" | head -n 1; } # the image that a file names
deploy/testing/stand_ins.sh "$directory/stand-ins" "$(named python:3 deploy/Dockerfile)" \
    "$(named 'redis:[0-9]' deploy/compose.yaml)" "$(named prom/ deploy/compose.yaml)"
# Not exec: the trap has to run.
BATON_TEST_CONTAINERS=require deploy/testing/engine.sh run "$directory" "${tests[@]}"
