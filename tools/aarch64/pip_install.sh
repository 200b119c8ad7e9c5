#!/bin/bash
# pip_install.sh [COMMAND...]: what the owner of a Raspberry Pi does, step by step: `pip install .` of this checkout into a virtual
# environment, by an aarch64 Python, pip, CMake and g++, in a Debian root of their own; then `tinytrain demo`, or COMMAND with that
# environment's programs on its PATH. On x86-64 all of it is emulated (most of an hour), on aarch64 it runs natively.
# Needs root or sudo: for apt, for chroot, and on x86-64 for binfmt_misc, through which Linux starts the emulator. Whatever this
# mounts or registers is gone when it ends.
# Environment, all optional: TINYTRAIN_QEMU_CPU (default cortex-a53), TINYTRAIN_AARCH64_WORK as for test.sh.
set -euo pipefail
project=$(realpath "$(dirname "$0")/../..")
mkdir -p "${TINYTRAIN_AARCH64_WORK:=$project/build/aarch64}"
work=$(realpath "$TINYTRAIN_AARCH64_WORK")
if [ "$(id -u)" != 0 ]; then
  exec sudo --preserve-env=TINYTRAIN_QEMU_CPU,CMAKE_BUILD_PARALLEL_LEVEL TINYTRAIN_AARCH64_WORK="$work" "$(realpath "$0")" "$@"
fi
root=$work/pip_install
emulator=/usr/bin/qemu-aarch64-static
native=false
if [ "$(uname -m)" = aarch64 ]; then native=true; fi

started=$SECONDS
step() { printf '%-40s %4d s\n' "$1" $((SECONDS - started)); started=$SECONDS; }

if ! $native && [ ! -x "$emulator" ]; then
  apt-get -qq update
  apt-get -qq -o DPkg::Lock::Timeout=600 install --yes --no-install-recommends qemu-user-static debian-archive-keyring > /dev/null
fi
if [ ! -e "$root/complete" ]; then
  rm -rf "$root"
  "$project/tools/aarch64/sysroot.sh" "$root" bookworm \
    base-files bash coreutils sed grep ca-certificates g++ python3-venv python3.11-venv python3-dev
  # What the packages' own scripts would have done.
  ln -sf bash "$root/bin/sh"
  mkdir -p "$root"/{proc,dev,tmp,root,srv,etc/ssl/certs}
  chmod 1777 "$root/tmp"
  echo 'root:x:0:0:root:/root:/bin/bash' > "$root/etc/passwd"
  echo 'root:x:0:' > "$root/etc/group"
  touch "$root/complete"
fi
# Network and trust as they are here.
cp -L --remove-destination /etc/resolv.conf /etc/hosts "$root/etc/"
cp -L --remove-destination /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
if [ -e /etc/pip.conf ]; then cp -L /etc/pip.conf "$root/etc/"; fi
rm -rf "$root"/srv/*
mkdir -p "$root/srv/tinytrain"
git -C "$project" ls-files -z | tar -C "$project" --null --files-from=- -c | tar -C "$root/srv/tinytrain" -x
step "root"

cat > "$root/srv/install.sh" <<'INSIDE'
set -euo pipefail
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/srv PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_CACHE_DIR=1
# A slow emulator lets connections time out.
export PIP_RETRIES=20
export SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt
cd /srv/tinytrain
python3 -c 'import platform; assert platform.machine() == "aarch64", platform.machine()'
python3 -m venv ../environment
../environment/bin/pip install --quiet .
export PATH=/srv/environment/bin:$PATH
printf '%-40s %4d s\n' "pip install ." $SECONDS
cd /srv
python -c 'import tinytrain_ext._core as core; print(core.__file__, *core.available_isas())'
exec "$@"
INSIDE
if [ $# = 0 ]; then set -- tinytrain demo; fi

# An emulator that Linux opens when it is registered (F), so that it is found inside the root, too.
binfmt=/proc/sys/fs/binfmt_misc
registered=
if ! $native && ! grep -qs -x enabled "$binfmt"/qemu-aarch64; then
  mountpoint -q "$binfmt" || mount -t binfmt_misc none "$binfmt"
  magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
  mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
  printf '%s' ":tinytrain-aarch64:M::$magic:$mask:$emulator:F" > "$binfmt/register"
  registered=$binfmt/tinytrain-aarch64
fi
unregister() { if [ -n "$registered" ]; then echo -1 > "$registered"; fi; }
trap unregister EXIT
# In namespaces of its own: mounts and processes end with it.
# shellcheck disable=SC2016
QEMU_CPU=${TINYTRAIN_QEMU_CPU:-cortex-a53} unshare --mount --pid --fork --kill-child bash -c '
  set -e
  mount --rbind /dev "$0/dev"
  mount -t proc proc "$0/proc"
  exec chroot "$0" /bin/bash /srv/install.sh "$@"' "$root" "$@"
step "pip install . and ${*}"
