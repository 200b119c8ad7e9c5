#!/usr/bin/env python3
"""Run a compiler and fail if it took too much memory: CMAKE_CXX_COMPILER_LAUNCHER of a build.

    tools/compile_memory.py LIMIT_MB LOG COMPILER ARGUMENTS...

Appends "MB SOURCE" to LOG: the largest resident memory of any process of this compiler run, in
units of 10^6 bytes.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    limit, log, command = float(arguments[0]), Path(arguments[1]), arguments[2:]
    code = subprocess.run(command, check=False).returncode
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    source = command[-1]
    with log.open("a") as out:
        out.write(f"{used:.0f} {source}\n")
    if used > limit:
        print(f"{source}: took {used:.0f} MB to compile, limit {limit:g}", file=sys.stderr)
    return code or int(used > limit)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
