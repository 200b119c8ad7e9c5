#!/bin/bash
# wheel.sh WORK: builds WORK/wheels/tinytrain_ext-*-cp3XX-cp3XX-manylinux_*_aarch64.whl from this checkout and checks it; and
# WORK/kernel_bench, the benchmark of its kernels as one static program (docs/raspberry-pi.md).
# Needs WORK/tools (a virtual environment) and, on a machine of another kind, WORK/sysroot-3.XX: see test.sh, which makes both.
set -euo pipefail
project=$(realpath "$(dirname "$0")/../..")
work=$(realpath "$1")
python=${TINYTRAIN_TARGET_PYTHON:-3.11}
abi=cp${python/./}
export PATH=$work/tools/bin:$PATH
rm -rf "$work/raw" "$work/wheels/"*-"$abi"-*
# As on a Raspberry Pi, and a compiler run that takes more memory than one has fails.
launcher="$project/tools/compile_memory.py;300;$work/compile_memory-$python.log"
arguments=(-C "build-dir=$work/build-$python" -C cmake.define.TINYTRAIN_LITTLE_MEMORY=ON
  -C "cmake.define.CMAKE_CXX_COMPILER_LAUNCHER=$launcher")
if [ "$(uname -m)" != aarch64 ]; then
  # Debian's pyconfig.h only points to the one of each architecture, by a path that a cross compiler does not search.
  sysroot=$work/sysroot-$python
  headers=$work/headers/python$python
  mkdir -p "$work/headers"
  cp -rn "$sysroot/usr/include/python$python" "$work/headers"
  cp "$sysroot/usr/include/aarch64-linux-gnu/python$python/pyconfig.h" "$headers/pyconfig.h"
  export CMAKE_TOOLCHAIN_FILE=$project/tools/aarch64/toolchain.cmake
  # Without the first the wheel would be tagged for, without the second its module named after, the machine that builds.
  export _PYTHON_HOST_PLATFORM=linux-aarch64
  export SETUPTOOLS_EXT_SUFFIX=.cpython-${python/./}-aarch64-linux-gnu.so
  arguments+=(-C "cmake.define.Python_INCLUDE_DIR=$headers")
fi
pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work/raw" "${arguments[@]}" "$project"
# The building Python's version is in the tags; say which one the module was compiled for.
wheel tags --remove --python-tag "$abi" --abi-tag "$abi" "$work"/raw/*.whl > "$work/tags.log"
if ! LD_LIBRARY_PATH=/usr/aarch64-linux-gnu/lib auditwheel repair --wheel-dir "$work/wheels" "$work"/raw/*.whl > "$work/auditwheel.log" 2>&1; then
  cat "$work/auditwheel.log"
  exit 1
fi
"$work/tools/bin/python" "$project/tools/check_wheel.py" --machine aarch64 --python "$python" "$work/wheels/"*-"$abi"-*.whl
# Of the wheel's own objects.
cmake --build "$work/build-$python" --target kernel_bench > "$work/kernel_bench.log"
cp "$work/build-$python/kernel_bench" "$work"
prefix=
if [ "$(uname -m)" != aarch64 ]; then prefix=aarch64-linux-gnu-; fi
# The objects, and the module with what the linker added to them.
for built in "$work/build-$python" "$work/build-$python"/_core*.so; do
  "$work/tools/bin/python" "$project/tools/isa_gate.py" --prefix "$prefix" "$built"
done
