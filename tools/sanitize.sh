#!/usr/bin/env bash
# Runs the C++ tests and the Python tests of the core under AddressSanitizer and UndefinedBehaviorSanitizer; any finding fails.
# Needs GCC, cmake, ninja, and a Python ($PYTHON, default python3) with the package's test extra. Builds in $BUILD, default
# build/sanitize. Arguments go to pytest, which runs twice (-k must leave tests in both halves).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
build=${BUILD:-$PWD/build/sanitize}

if ! pybind11=$("$python" -m pybind11 --cmakedir 2>/dev/null); then
  # A build requirement, which an environment with the package installed need not hold: put beside the build, not into it.
  "$python" -m pip install --quiet --upgrade --target "$build/pybind11" 'pybind11>=2.13,<3'
  pybind11=$(PYTHONPATH=$build/pybind11 "$python" -m pybind11 --cmakedir)
fi
cmake --preset sanitize -B "$build" -DTINYTRAIN_PYTHON=ON -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$pybind11"
cmake --build "$build"

export UBSAN_OPTIONS=print_stacktrace=1
"$build/core_tests"

# The package as the tests import it: the sources beside the instrumented module.
package=$build/package/tinytrain_ext
rm -rf "$build/package"
mkdir -p "$package"
for file in "$PWD"/python/tinytrain_ext/*; do ln -s "$file" "$package/"; done
cp "$build"/_core*.so "$package/"

# The interpreter and torch leak by design; only faults count here.
export ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 PYTHONPATH=$build/package
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
tests=(env "LD_PRELOAD=$preload" "$python" -m pytest -q -p no:cacheprovider "$@")
# Two processes, for two cores.
"${tests[@]}" tests/test_kernels.py > "$build/kernels.log" 2>&1 &
kernels=$!
passed=true
"${tests[@]}" tests/test_session.py tests/test_plan.py tests/test_fisher.py tests/test_adapt.py || passed=false
wait "$kernels" || passed=false
cat "$build/kernels.log"
$passed
