#!/usr/bin/env bash
# Tests the cluster with real containers, and ends all that it makes. An engine that answers is used (with BASE as the
# image's base); where there is none root installs one (Debian) and runs it in a folder of its own for as long. All is
# done by docker compose v2, and what no fault befalls by docker-compose 1.29 too. Says why where it can't, and ends with 0
# then. Arguments are pytest's.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
image=dptrain-test-$$ base=${BASE:-} engine=
boards=$image-tensorboard figures=$image-prometheus
python=$(command -v "${PYTHON:-python}")
skip() { echo "SKIPPED tests of containers: $*"; exit 0; }
end() {
    docker image rm -f "$image" "$boards" "$figures" >/dev/null 2>&1 || true
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
made() { # tag, what docker build is told beside
    local tag=$1
    shift
    DOCKER_BUILDKIT=1 docker build --progress plain --network host --build-arg BASE="$base" --tag "$tag" "$@" >"$work/build" 2>&1 ||
        { tail -n 40 "$work/build"; exit 1; }
    echo "image: $(docker image inspect --format '{{.Size}}' "$tag") bytes, $SECONDS s"
}
made "$image" "${secrets[@]}" --file launch/Dockerfile .
made "$boards" "${secrets[@]}" --file launch/Dockerfile --build-arg EXTRAS=tensorboard .
# As Prometheus' own image is laid out, of Debian's package.
if ! (mkdir "$work/figures" && cd "$work/figures" && apt-get -o APT::Sandbox::User=root -qq download prometheus) >"$work/apt" 2>&1; then
    echo "SKIPPED Prometheus: apt-get download prometheus: $(tail -n1 "$work/apt")"
    figures=
else
    dpkg-deb --fsys-tarfile "$work"/figures/*.deb | tar --extract --directory "$work/figures" ./usr/bin/prometheus
    cat >"$work/figures/Dockerfile" <<'END'
ARG BASE
FROM ${BASE}
COPY usr/bin/prometheus /bin/
RUN mkdir /prometheus && chown nobody:nogroup /prometheus
USER nobody
WORKDIR /prometheus
VOLUME /prometheus
ENTRYPOINT ["/bin/prometheus"]
END
    made "$figures" "$work/figures"
fi

export CLUSTER_IMAGE=$image TENSORBOARD_IMAGE=$boards PROMETHEUS_IMAGE=$figures
tested() { CLUSTER_COMPOSE=$1 "$python" -m pytest -n0 --durations=0 "${@:2}"; }
v2= few=(-k undisturbed)
if docker compose version >/dev/null 2>&1; then
    v2=1
elif DOCKER_CONFIG=$work/client tests/cluster/compose.sh "$work/client" >"$work/apt" 2>&1; then
    v2=1
    export DOCKER_CONFIG=$work/client
else
    echo "SKIPPED docker compose v2: $(tail -n1 "$work/apt")"
fi
[ -n "$v2" ] || few=()
[ -z "$v2" ] || tested "docker compose" "$@" tests/cluster/test_containers.py tests/cluster/test_more_containers.py
if command -v docker-compose >/dev/null && docker-compose version --short | grep -q '^1\.'; then
    tested docker-compose "${few[@]}" "$@" tests/cluster/test_containers.py
else
    echo "SKIPPED docker-compose 1.29: not here"
fi
echo "containers: $SECONDS s"
