"""Fail unless a wheel holds a loadable extension module for the machine its name promises.

A cross build that goes wrong still ends in a wheel: one without the extension module, or with a
module of the building machine's name or code. Checked: exactly one module, its file name's suffix,
the machine in its ELF header, the wheel's tags, and the newest glibc it asks for.
"""

from __future__ import annotations

import argparse
import re
import struct
import sys
import zipfile
from pathlib import Path

GLIBC = (2, 36)  # Raspberry Pi OS 12 (Debian 12)
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


def elf_machine(module: bytes) -> int:
    """The e_machine field of a 64-bit little-endian ELF file; 0 if it is none."""
    if module[:6] != b"\x7fELF\x02\x01":
        return 0
    (machine,) = struct.unpack_from("<H", module, 18)
    return int(machine)


def glibc_needed(module: bytes) -> tuple[int, int]:
    """The newest GLIBC_x.y that a module's symbols ask for."""
    versions = re.findall(rb"\0GLIBC_(\d+)\.(\d+)", module)
    return max(((int(major), int(minor)) for major, minor in versions), default=(0, 0))


def faults(path: Path, machine: str, python: str) -> list[str]:
    """What is wrong with the wheel at `path`; empty if nothing is."""
    abi = "cp" + python.replace(".", "")
    suffix = f".cpython-{abi[2:]}-{machine}-linux-gnu.so"
    found = []
    if not re.search(rf"-{abi}-{abi}-(manylinux_\d+_\d+_{machine}\.?)+\.whl$", path.name):
        found.append(f"name: expected tags {abi}-{abi}-manylinux_*_{machine}, got {path.name}")
    tag = re.search(r"manylinux_(\d+)_(\d+)", path.name)
    if tag and (int(tag[1]), int(tag[2])) > GLIBC:
        found.append(f"name: expected manylinux_{GLIBC[0]}_{GLIBC[1]} at most, got {tag[0]}")
    with zipfile.ZipFile(path) as wheel:
        modules = [name for name in wheel.namelist() if name.endswith((".so", ".pyd"))]
        if modules != [f"tinytrain_ext/_core{suffix}"]:
            found.append(f"modules: expected tinytrain_ext/_core{suffix}, got {modules}")
        for name in modules:
            module = wheel.read(name)
            if elf_machine(module) != ELF_MACHINES[machine]:
                found.append(f"{name}: expected ELF machine {machine}, got {elf_machine(module)}")
            if glibc_needed(module) > GLIBC:
                found.append(f"{name}: expected glibc {GLIBC} at most, got {glibc_needed(module)}")
    return found


def main() -> int:
    """0 if the wheel is sound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--machine", choices=sorted(ELF_MACHINES), required=True)
    parser.add_argument("--python", default="3.11", help="the Python it is for")
    arguments = parser.parse_args()
    found = faults(arguments.wheel, arguments.machine, arguments.python)
    for fault in found:
        print(f"{arguments.wheel.name}: {fault}", file=sys.stderr)
    if not found:
        print(f"{arguments.wheel.name}: sound")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
