"""Fail if code that every CPU runs holds instructions that not every CPU has.

Looks at the object files of a build folder. Those of a vector instruction set (in a folder
`isa_NAME*.dir`, as CMakeLists.txt makes them) may use it; all others must stay within the baseline:
ARMv8.0-A on aarch64 (no LSE atomics, dot products, half precision, SVE, ...), SSE2 on x86-64. Each
instruction, disassembled, is handed to an assembler that is told to know nothing newer: what it
refuses is reported. No object of an instruction set, scalar included, may hold a weak symbol: the
linker could keep its copy of an inline function for everybody. A linked module may be given too; it
counts as common code.
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Code built for one instruction set and entered only where the CPU has it. NEON is not among them:
# it is part of ARMv8.0-A.
VECTOR_ISAS = ("avx2", "avx512")
ASSEMBLER = {"x86_64": ["--64", "-march=generic64"], "aarch64": ["-march=armv8-a+nosve"]}
# Hints: older CPUs execute them as no operation. The disassembler names them; baseline assemblers
# need not know the names.
HINTS = {"x86_64": {"endbr64"}, "aarch64": {"bti", "paciasp", "autiasp", "xpaclri"}}


def isa_of(path: Path) -> str | None:
    """The instruction set that an object file is built for; None for common code."""
    match = re.search(r"/isa_([a-z0-9]+)(?:_k\d+)?\.dir/", str(path))
    return match[1] if match else None


def machine_of(path: Path, prefix: str) -> str:
    """ "x86_64" or "aarch64", by the object's header."""
    header = _run([f"{prefix}objdump", "-f", str(path)])
    match = re.search(r"architecture: (i386:x86-64|aarch64)", header)
    if not match:
        raise ValueError(f"{path}: expected an x86-64 or aarch64 object, got {header.strip()!r}")
    return "x86_64" if match[1] == "i386:x86-64" else "aarch64"


def instructions(path: Path, prefix: str) -> dict[str, str]:
    """{instruction as text, without addresses: the first symbol that holds it}."""
    listing = _run([f"{prefix}objdump", "-d", "--no-show-raw-insn", str(path)])
    found: dict[str, str] = {}
    symbol = ""
    for line in listing.splitlines():
        if heading := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            symbol = heading[1]
        elif entry := re.match(r" +[0-9a-f]+:\t(.+)$", line):
            text = re.sub(r"\s*//.*$|\s+# .*$", "", entry[1])
            # A jump's target: any label will do.
            text = re.sub(r"\b(0x)?[0-9a-f]+ <[^>]*>", ".", text.replace("\t", " ")).strip()
            text = re.sub(r"^(?:(?:data16|cs|rex\.W|notrack) )+", "", text)  # padding of x86
            if text and text != "...":
                found.setdefault(text, symbol)
    return found


def beyond_baseline(path: Path, prefix: str) -> dict[str, str]:
    """{instruction: symbol} of those that the baseline does not have."""
    machine = machine_of(path, prefix)
    known = instructions(path, prefix)
    source = [text for text in known if not HINTS[machine].intersection(text.split()[:1])]
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder, "all.s")
        listing.write_text("\n".join(source) + "\n", encoding="ascii")
        command = [f"{prefix}as", *ASSEMBLER[machine], "-o", "/dev/null", str(listing)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = {int(number) for number in re.findall(r"all\.s:(\d+): Error", done.stderr)}
    if done.returncode != 0 and not lines:
        raise RuntimeError(f"{command}: {done.stderr}")
    return {source[line - 1]: known[source[line - 1]] for line in sorted(lines)}


def weak_symbols(path: Path, prefix: str) -> list[str]:
    """Symbols that the linker may take from any one of several objects."""
    listing = _run([f"{prefix}nm", "--demangle", str(path)])
    return [line[19:] for line in listing.splitlines() if line[17:18] in ("V", "v", "W", "w", "u")]


def faults(path: Path, prefix: str) -> list[str]:
    """What is wrong with one object file; empty if nothing is."""
    isa = isa_of(path)
    found = []
    if isa not in VECTOR_ISAS:
        by_symbol = collections.defaultdict(list)
        for text, symbol in beyond_baseline(path, prefix).items():
            by_symbol[symbol].append(text)
        found += [f"{symbol}: beyond the baseline: {texts}" for symbol, texts in by_symbol.items()]
    if isa is not None:
        found += [f"weak symbol {symbol}" for symbol in weak_symbols(path, prefix)]
    return found


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """0 if every object file is sound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path, help="folder of object files (or one file)")
    parser.add_argument("--prefix", default="", help="of the tools, such as aarch64-linux-gnu-")
    arguments = parser.parse_args()
    build: Path = arguments.build
    objects = [build] if build.is_file() else sorted(build.rglob("*.o"))
    isas = {isa_of(path) for path in objects}
    if build.is_dir() and (None not in isas or "scalar" not in isas):
        print(f"{build}: expected common code and kernels, got {len(objects)} object files")
        return 1
    failed = False
    for path in objects:
        for fault in faults(path, arguments.prefix):
            failed = True
            print(f"{path}: {fault}", file=sys.stderr)
    if not failed:
        names = ", ".join(sorted(isa for isa in isas if isa))
        print(f"{len(objects)} object files sound; instruction sets: {names}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
