#!/bin/bash
# nehalem.sh [PYTEST ARGUMENTS...]: the kernel tests on an emulated x86-64 CPU without AVX (Intel Nehalem). Only the scalar kernels
# may be offered there, and nothing may execute what that CPU has not: QEMU stops an unknown instruction with SIGILL.
# Needs an x86-64 machine, qemu-user-static, and a Python ($PYTHON, default python3) with this package and its test extra.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
if ! command -v qemu-x86_64-static > /dev/null; then
  if [ "$(id -u)" = 0 ]; then as_root=(); else as_root=(sudo); fi
  "${as_root[@]}" apt-get -qq update
  "${as_root[@]}" apt-get -qq -o DPkg::Lock::Timeout=600 install --yes --no-install-recommends qemu-user-static > /dev/null
fi
# OpenBLAS takes the emulated CPU for a newer one unless told.
export OPENBLAS_CORETYPE=Nehalem
export TINYTRAIN_TEST_CASES=${TINYTRAIN_TEST_CASES:-few} OMP_NUM_THREADS=1
nehalem=(qemu-x86_64-static -cpu Nehalem "$python")
isas=$("${nehalem[@]}" -c 'from tinytrain_ext import _core; print(*_core.available_isas(), _core.default_isa())')
if [ "$isas" != "scalar scalar" ]; then
  echo "expected only scalar kernels without AVX, got: $isas"
  exit 1
fi
"${nehalem[@]}" -m pytest -q -p no:cacheprovider tests/test_kernels.py "$@"
