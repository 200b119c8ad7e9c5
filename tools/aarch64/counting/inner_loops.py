"""The kernels' inner loops on the Cortex-A53, by GCC's own pipeline model.

python inner_loops.py BUILD_FOLDER [--least FMAS] [--json FILE]

Compiles the NEON sources of a CMake build folder (count.sh leaves one) once more, with the same
commands, and reads the last scheduling pass's account (-fdump-rtl-sched2): of each loop of one
block the instructions, vector FMAs, loads, references to the stack and cycles; 8 FLOP a cycle is
the A53's peak. The last column is the same block by a53.py, the model that whole runs are costed
with.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import a53


def _commands(build: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, compiler command without output) of each NEON source."""
    listing = subprocess.run(
        ["ninja", "-C", str(build), "-t", "compdb"], capture_output=True, text=True, check=True
    )
    for entry in json.loads(listing.stdout):
        if re.search(r"isa_neon.*(pointwise|depthwise_\w+)\.cpp\.o$", entry["output"]):
            words = shlex.split(entry["command"])
            if "ccache" in words[0]:
                words = words[1:]
            kept, skip = [], False
            for word in words:
                if not skip and word not in ("-c", "-o", "-MF", "-MT", "-MD"):
                    kept.append(word)
                skip = word in ("-o", "-MF", "-MT")
            yield entry["output"], kept


def _loops(command: list[str], build: Path) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "kernel"
        options = [
            f"-fdump-rtl-sched2={base}.sched2",
            "-fsched-verbose=2",
            "-dp",
            "-S",
            "-o",
            f"{base}.s",
        ]
        subprocess.run([*command, *options], cwd=build, check=True, capture_output=True)
        issued: dict[tuple[str, int], int] = {}
        function = ""
        with Path(f"{base}.sched2").open(errors="replace") as dump:
            for line in dump:
                if match := re.match(r";; Function .*\((\S+), funcdef_no", line):
                    function = match[1]
                elif match := re.match(r";;\s+(\d+)--> b\s+\d+: i\s*(\d+)\s", line):
                    issued[function, int(match[2])] = int(match[1])
        lines = Path(f"{base}.s").read_text().splitlines()
    labels: dict[str, int] = {}
    for number, line in enumerate(lines):
        if match := re.match(r"\s+\.type\s+(\S+), %function", line):
            function, labels = match[1], {}
        elif match := re.match(r"(\.L\d+):", line):
            labels[match[1]] = number
        elif match := re.match(r"\t(?:b\.?[a-z]{2}|cbn?z|tbn?z)\s+(?:.*, )?(\.L\d+)", line):
            start = labels.get(match[1])
            # A loop of one block: no label and no other branch between.
            body = lines[start + 1 : number + 1] if start is not None else []
            code = [text for text in body if re.match(r"\t[a-z]", text)]
            inside = [text for text in body[:-1] if re.match(r"\.L\d+:|\t(b|cb|tb)", text)]
            if not code or inside:
                continue
            numbers = [int(m[1]) for text in code if (m := re.search(r"// (\d+)\t", text))]
            cycles = [issued[function, n] for n in numbers if (function, n) in issued]
            block = [a53.decode(text.strip().replace("\t", " ")) for text in code]
            fma = sum(i.vector_fma or i.name == "fmul" for i in block)
            if cycles:
                yield {
                    "table": "inner loops",
                    "function": function,
                    "instructions": len(code),
                    "vector_fma": fma,
                    "vector_load": sum(i.vector_load for i in block),
                    "stack": sum(i.stack for i in block),
                    "cycles": max(cycles) + 1,
                    "cycles_by_a53_py": a53.schedule(block)[-1] + 1,
                }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("build", type=Path)
    parser.add_argument("--least", type=int, default=8, help="vector FMAs of a loop worth a row")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for _, command in _commands(arguments.build):
        rows += [
            row for row in _loops(command, arguments.build) if row["vector_fma"] >= arguments.least
        ]
    names = subprocess.run(
        ["c++filt"],
        input="\n".join(r["function"] for r in rows),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    print("| loop | instructions | FMA | loads | stack | cycles | FLOP a cycle | by a53.py |")
    print("|---|---|---|---|---|---|---|---|")
    for row, name in zip(rows, names, strict=True):
        short = re.sub(r"tinytrain::neon::(\(anonymous namespace\)::)?", "", name)
        row["function"] = short = re.sub(
            r"^(void|bool) |\(.*", "", short.replace("(Ending)", "")
        ).strip()
        flops = 8 * row["vector_fma"] / row["cycles"]
        print(
            f"| {short} | {row['instructions']} | {row['vector_fma']} | {row['vector_load']} "
            f"| {row['stack']} | {row['cycles']} | {flops:.2f} | {row['cycles_by_a53_py']} |"
        )
    if arguments.json:
        with arguments.json.open("a") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
