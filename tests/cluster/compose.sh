#!/usr/bin/env bash
# compose.sh FOLDER: Docker Compose v2 as the plugin of a client whose DOCKER_CONFIG is FOLDER, for a Debian that has only
# docker-compose 1.29. A newer release's package needs nothing but libc; it comes by the mirror that apt has, and apt's
# own lists stay as they are.
set -euo pipefail
mkdir -p "$1/cli-plugins"
folder=$(realpath "$1")
apt=$(mktemp -d)
trap 'rm -rf "$apt"' EXIT
mkdir -p "$apt"/lists/partial "$apt"/cache/archives/partial
mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Origin: Debian' | head -n1)
[ -n "$mirror" ] || { echo "apt has no mirror of Debian's" >&2; exit 1; }
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >"$apt/sources"
own=(-o "Dir::Etc::SourceList=$apt/sources" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache")
cd "$apt"
apt-get "${own[@]}" -o Acquire::Languages=none -o APT::Sandbox::User=root -qq update
apt-get "${own[@]}" -o APT::Sandbox::User=root -qq download docker-compose/trixie
dpkg-deb --fsys-tarfile docker-compose_*.deb | tar --extract --to-stdout ./usr/libexec/docker/cli-plugins/docker-compose >"$folder/cli-plugins/docker-compose"
chmod 755 "$folder/cli-plugins/docker-compose"
