#!/usr/bin/env bash
# base.sh NAME: a base image out of this machine's own Debian packages, for where no image can be pulled. What is taken
# are the files of Python with its venv, of all that it needs, and of what every Debian has.
set -euo pipefail
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mapfile -t essential < <(dpkg-query -W -f '${Package} ${Essential}\n' | awk '$2 == "yes" { print $1 }')
only=(--recurse --installed --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances)
mapfile -t packages < <(apt-cache depends "${only[@]}" python3-venv ca-certificates passwd apt "${essential[@]}" | grep -v '^[ <|]' | sort -u)
for link in bin sbin lib lib64; do [ ! -L "/$link" ] || ln -s "usr/$link" "$tree/$link"; done
for package in "${packages[@]}"; do dpkg-query -L "$package" 2>/dev/null || true; done |
    grep -vE '^/usr/share/(doc|man|locale|info|lintian)/' | sort -u |
    while read -r path; do
        # Folders that are links here are links there.
        if [ -L "$path" ] || [ -f "$path" ]; then printf '%s/%s\n' "$(realpath "${path%/*}/")" "${path##*/}"; fi
    done | sed 's,^/*,,' | sort -u >"$tree.list"
tar --create --directory / --files-from "$tree.list" --hard-dereference | tar --extract --keep-directory-symlink --directory "$tree"
rm "$tree.list"
mkdir -p "$tree"/{dev,proc,sys,run,root,home,tmp,etc/ssl/certs,var/tmp}
chmod 1777 "$tree/tmp" "$tree/var/tmp"
cp "$tree/usr/share/base-passwd/passwd.master" "$tree/etc/passwd"
cp "$tree/usr/share/base-passwd/group.master" "$tree/etc/group"
cp -L /etc/ssl/certs/ca-certificates.crt "$tree/etc/ssl/certs/"
cp -a /etc/alternatives "$tree/etc/"
ldconfig -r "$tree"
tar --create --directory "$tree" . | docker import --change 'CMD ["bash"]' --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' - "$1"
