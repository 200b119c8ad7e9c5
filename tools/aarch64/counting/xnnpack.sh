#!/bin/bash
# xnnpack.sh FOLDER: counts XNNPACK's forward pass (Debian 12's package) on every convolution of the networks, as count.sh does ours.
# Needs count.sh to have run once. On Debian's emulator packages and cross compiler: x86-64 hosts only.
set -euo pipefail
here=$(realpath "$(dirname "$0")")
project=$(realpath "$here/../../..")
work=$(realpath "${TINYTRAIN_AARCH64_WORK:-$project/build/aarch64}")
mkdir -p "$1"
folder=$(realpath "$1")
root=$work/xnnpack
if [ ! -e "$root/complete" ]; then
  "$here/../sysroot.sh" "$root" bookworm libxnnpack-dev libpthreadpool-dev libstdc++6
  touch "$root/complete"
fi
# The library by its path: with its folder in the search path the linker would take Debian's libc.so, a script for another root.
aarch64-linux-gnu-g++ -O2 -I "$root/usr/include" "$here/xnnpack_guest.cpp" -o "$work/xnnpack_guest" \
  "$root/usr/lib/aarch64-linux-gnu/libXNNPACK.so" -Wl,--allow-shlib-undefined
PYTHONPATH=$project/python:$project/tests python3 - "$folder" << 'PYTHON'
import json
import sys
from pathlib import Path

from cases import NETWORK_CASES

folder = Path(sys.argv[1])
rows = [{"case": c.name, "kernel_pass": "forward", "implementation": "XNNPACK"} for c in NETWORK_CASES]
(folder / "regions.json").write_text(json.dumps({"rows": rows, "objects": {}}))
with (folder / "layers.txt").open("w") as file:
    for c in NETWORK_CASES:
        shape = c.in_channels, c.out_channels, c.height, c.width, c.kernel, c.stride, c.padding
        print(*shape, int(c.depthwise), file=file)
PYTHON
exec setarch "$(uname -m)" -R qemu-aarch64 -cpu cortex-a53 -L "$root" -plugin "$work/counting/plugin.so,out=$folder/counts.txt" \
  "$work/xnnpack_guest" < "$folder/layers.txt"
