#!/bin/bash
# count.sh SCRIPT FOLDER [ARGUMENTS...]: runs a Python script of this folder on the emulated Cortex-A53 with this checkout's package,
# and counts the instructions of its marked regions. The script gets FOLDER as its first argument and leaves regions.json there; the
# plugin leaves counts.txt. Needs what ../test.sh has prepared in $TINYTRAIN_AARCH64_WORK, and Debian's qemu-user: the emulator of
# qemu-user-static is linked without plugins. One thread, addresses not randomised: the same counts every time.
set -euo pipefail
here=$(realpath "$(dirname "$0")")
project=$(realpath "$here/../../..")
work=$(realpath "${TINYTRAIN_AARCH64_WORK:-$project/build/aarch64}")
python=${TINYTRAIN_TARGET_PYTHON:-3.11}
script=$1
mkdir -p "$2"
folder=$(realpath "$2")
shift 2
if [ ! -e "$work/sysroot-$python/complete" ] || [ ! -e "$work/site-$python/complete" ] || [ ! -d "$work/headers" ]; then
  echo "count.sh: run tools/aarch64/test.sh first; $work is not complete" >&2
  exit 1
fi
if ! qemu-aarch64 -h 2> /dev/null | grep -q -e -plugin; then
  echo "count.sh: needs qemu-aarch64 with plugins (apt-get install qemu-user)" >&2
  exit 1
fi

# As the wheel's module, but with its symbols.
build=$work/counting
PATH=$work/tools/bin:$PATH
if [ ! -e "$build/build.ninja" ]; then
  cross=()
  if [ "$(uname -m)" != aarch64 ]; then cross=(-D "CMAKE_TOOLCHAIN_FILE=$project/tools/aarch64/toolchain.cmake"
    -D "Python_INCLUDE_DIR=$work/headers/python$python"); fi
  cmake -S "$project" -B "$build" -G Ninja -D CMAKE_BUILD_TYPE=RelWithDebInfo -D CMAKE_CXX_FLAGS_RELWITHDEBINFO="-O3 -DNDEBUG" \
    -D "pybind11_DIR=$("$work/tools/bin/python" -m pybind11 --cmakedir)" ${cross[@]+"${cross[@]}"} > "$build.log"
fi
ninja -C "$build" _core > "$build.log" || { cat "$build.log"; exit 1; }
rm -rf "$build/package"
mkdir -p "$build/package/tinytrain_ext"
ln -s "$project"/python/tinytrain_ext/* "$build/package/tinytrain_ext"
ln -s "$build/_core.so" "$build/package/tinytrain_ext/_core.cpython-${python/./}-aarch64-linux-gnu.so"
gcc -O2 -Wall -Wextra -fPIC -shared -fvisibility=hidden -o "$build/plugin.so" "$here/plugin.c"

export PYTHONPATH=$build/package:$here:$project:$project/tests:$work/site-$python
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONHASHSEED=0
unset PYTHONDONTWRITEBYTECODE
export TINYTRAIN_EXECUTABLE=$project/tools/aarch64/python
run() { setarch "$(uname -m)" -R qemu-aarch64 -cpu cortex-a53 -L "$work/sysroot-$python" "$@"; }
interpreter=$work/sysroot-$python/usr/bin/python$python
# On a device, pip and Debian's packages leave modules compiled to bytecode; here the first import does.
export PYTHONPYCACHEPREFIX=$work/bytecode-$python
run "$interpreter" -c "
import PIL.Image, safetensors.numpy, tinytrain_ext, tinytrain_ext.demo, tinytrain_ext.session
PIL.Image.preinit()"
run -plugin "$build/plugin.so,out=$folder/counts.txt" "$interpreter" "$here/$script" "$folder" "$@"
