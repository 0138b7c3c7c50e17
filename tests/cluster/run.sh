#!/usr/bin/env bash
# Tests the cluster with real containers, and ends all that it makes. An engine that answers is used (with BASE as the
# image's base); where there is none root installs one (Debian) and runs it in a folder of its own for as long. Says why
# where it can't, and ends with 0 then.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
image=dptrain-test-$$ base=${BASE:-} engine=
python=$(command -v "${PYTHON:-python}")
skip() { echo "SKIPPED tests of containers: $*"; exit 0; }
end() {
    docker image rm -f "$image" >/dev/null 2>&1 || true
    if [ -n "$engine" ]; then
        docker ps --all --quiet | xargs --no-run-if-empty docker rm --force --volumes >/dev/null || true
        docker network prune --force >/dev/null || true
        kill "$engine" && wait "$engine" 2>/dev/null || true
        # What an engine leaves behind in the system.
        umount "$work"/engine/exec/netns/* "$work"/engine/data/overlay2/*/merged 2>/dev/null || true
        iptables-restore <"$work/iptables" || true
        cp "$work/ip_forward" /proc/sys/net/ipv4/ip_forward
    elif [ "$base" = "$image-base" ]; then
        docker image rm -f "$base" >/dev/null 2>&1 || true
    fi
    rm -rf "$work"
}
trap end EXIT

if ! docker info >/dev/null 2>&1; then
    [ "$(id -u)" = 0 ] || skip "no engine answers, and only root can start one"
    command -v dockerd >/dev/null && command -v docker-compose >/dev/null ||
        DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends docker.io docker-compose tini iptables >"$work/apt" 2>&1 ||
        skip "no engine can be installed: $(tail -n1 "$work/apt")"
    export DOCKER_HOST=unix://$work/docker.sock PATH=/usr/bin:$PATH # the client that fits this engine
    mkdir "$work/engine"
    iptables-save >"$work/iptables"
    cat /proc/sys/net/ipv4/ip_forward >"$work/ip_forward"
    # Addresses that no rule of another engine, there or gone, speaks of.
    dockerd --bridge none --default-address-pool base=10.213.0.0/16,size=24 --host "$DOCKER_HOST" --data-root "$work/engine/data" --exec-root "$work/engine/exec" \
        --pidfile "$work/engine/pid" >"$work/dockerd" 2>&1 &
    engine=$!
    for _ in $(seq 120); do
        docker info >/dev/null 2>&1 && break
        kill -0 "$engine" 2>/dev/null || { engine=; skip "no engine starts here: $(tail -n1 "$work/dockerd")"; }
        sleep 0.5
    done
fi
# What can't be pulled is made of this machine's own packages.
[ -n "$base" ] || { base=$image-base && tests/cluster/base.sh "$base" >/dev/null; }
secrets=()
[ ! -e /etc/pip.conf ] || secrets+=(--secret id=pip.conf,src=/etc/pip.conf)
[ ! -e "${PIP_CERT:-}" ] || secrets+=(--secret "id=ca.crt,src=$PIP_CERT")
DOCKER_BUILDKIT=1 docker build --progress plain --network host --build-arg BASE="$base" "${secrets[@]}" --file launch/Dockerfile --tag "$image" . \
    >"$work/build" 2>&1 || { tail -n 40 "$work/build"; exit 1; }
echo "image: $(docker image inspect --format '{{.Size}}' "$image") bytes, ${SECONDS} s"
CLUSTER_IMAGE=$image "$python" -m pytest -n0 --durations=0 "$@" tests/cluster/test_containers.py
