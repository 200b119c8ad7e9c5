#!/bin/bash
# sysroot.sh DIRECTORY SUITE PACKAGE...
# Unpacks Debian's arm64 packages, and all that they depend on, into DIRECTORY; nothing is configured or run. apt works on a
# state of its own in DIRECTORY.apt: the machine's package database and its list of architectures are not touched.
set -euo pipefail
root=$1 suite=$2
shift 2
state=$root.apt
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
mkdir -p "$root" "$state"/{lists/partial,archives/partial,empty}
echo "deb [arch=arm64 signed-by=$keyring] $mirror $suite main" > "$state/sources.list"
: > "$state/status"
private_apt() {
  apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Install-Recommends=false \
    -o APT::Sandbox::User=root -o Acquire::Languages=none -o Debug::NoLocking=true \
    -o Dir::State="$state" -o Dir::State::Lists="$state/lists" -o Dir::State::status="$state/status" \
    -o Dir::Cache="$state" -o Dir::Cache::Archives="$state/archives" \
    -o Dir::Etc::SourceList="$state/sources.list" -o Dir::Etc::SourceParts="$state/empty" \
    -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts="$state/empty" "$@"
}
# As every Debian has them; from trixie on they are in no package that is unpacked here.
for folder in bin lib sbin; do
  mkdir -p "$root/usr/$folder"
  ln -sfn "usr/$folder" "$root/$folder"
done
private_apt update
private_apt --yes --download-only install "$@"
for package in "$state"/archives/*.deb; do
  # Through tar, because dpkg-deb would replace a merged /lib link by a folder.
  dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink -C "$root"
done
# Absolute links mean the machine the packages were made for; seen from outside they must stay below the root.
find "$root" -type l -lname '/*' -print0 | while IFS= read -r -d '' link; do
  ln -sfnr "$root$(readlink "$link")" "$link"
done
