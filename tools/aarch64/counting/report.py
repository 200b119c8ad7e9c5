"""Makes of counted runs the tables of docs/neon.md, and the raw rows beside them.

python report.py kernels FOLDER [XNNPACK FOLDER]    after kernels_guest.py and xnnpack_guest.cpp
python report.py steps FOLDER...                    after steps_guest.py
python report.py job FOLDER...                      after job_guest.py
A later folder's counts replace an earlier one's of the same, as after a run with --ours.
--json FILE appends one JSON line a row. Runs where the counts were made: symbols come from the
objects that ran. Needs the installed package, extension module included.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import a53

from tinytrain_ext.architectures import ARCHITECTURES, operations
from tinytrain_ext.bench.jobs import LayerShape, layer_shapes

_PASSES = ("forward", "grad_input", "grad_weight")
_IMAGES, _ITERATIONS, _COUNTED_ITERATIONS, _CLOCK, _BANDWIDTH = 25, 40, 3, 1e9, 2e9
_VIEWS = 8


def _ours(blocks: Iterable[tuple[a53.Block, int]]) -> list[tuple[a53.Block, int]]:
    """Kernels and what calls them for a layer; not the test harness around them."""
    return [
        (block, times)
        for block, times in blocks
        if re.search(r"tinytrain::(neon::|Convolution<float>)", block.symbol)
        and "gather_columns" not in block.symbol
    ]


def _group(case: LayerShape) -> str:
    return f"depthwise {case.kernel} x {case.kernel}" if case.kind == "depthwise" else case.kind


def kernels(folders: list[Path]) -> list[dict[str, Any]]:
    """Prints instructions a MAC and more, weighted by MACs over the layers of each network."""
    counts: dict[tuple[str, str, str], a53.Counts] = {}
    for folder in folders:
        for row, blocks in a53.read(folder):
            kept = _ours(blocks) if row["implementation"] == "ours" else blocks
            counts[row["case"], row["kernel_pass"], row["implementation"]] = a53.total(kept)
    implementations = ("ours", "torch", "XNNPACK")
    rows = []
    print(
        "| network | layers | pass | ours | FMA | loads | stack | FLOP a cycle | torch | XNNPACK |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for network in ARCHITECTURES:
        groups: dict[str, list[LayerShape]] = defaultdict(list)
        for case in layer_shapes(network):
            groups[_group(case)].append(case)
        for group, cases in sorted(groups.items()):
            macs = sum(case.macs for case in cases)
            for kernel_pass in _PASSES:
                cells = {}
                for implementation in implementations:
                    total = a53.Counts()
                    for case in cases:
                        found = counts.get((case.name, kernel_pass, implementation))
                        if found:
                            total.add(found, 1)
                    if total.instructions:
                        cells[implementation] = total
                if "ours" not in cells:
                    continue
                for implementation, total in cells.items():
                    rows.append(
                        {
                            "table": "kernels",
                            "network": network,
                            "layers": group,
                            "pass": kernel_pass,
                            "implementation": implementation,
                            "macs": macs,
                            **asdict(total),
                        }
                    )
                o = cells["ours"]
                others = " | ".join(
                    f"{cells[name].instructions / macs:.2f}" if name in cells else ""
                    for name in implementations[1:]
                )
                print(
                    f"| {network} | {group} | {kernel_pass} | {o.instructions / macs:.3f} | "
                    f"{o.vector_fma / macs:.3f} | {o.vector_load / macs:.3f} | "
                    f"{o.stack / macs:.3f} | {2 * macs / o.cycles:.2f} | {others} |"
                )
    return rows


def steps(folders: list[Path]) -> list[dict[str, Any]]:
    """Prints instructions of whole steps and their ratios."""
    rows = []
    print("| network | one image | ours, million | torch eager | torch, best | ours, ms modelled |")
    print("|---|---|---|---|---|---|")
    table: dict[tuple[str, str], dict[str, a53.Counts]] = defaultdict(dict)
    for folder in folders:
        for row, blocks in a53.read(folder):
            table[row["network"], row["row"]][row["implementation"]] = a53.total(blocks)
    for (network, name), cells in table.items():
        rows += [
            {"table": "steps", "network": network, "row": name, "implementation": cell}
            | asdict(counts)
            for cell, counts in cells.items()
        ]
        ours = cells["ours"]
        ratios = " | ".join(
            f"{cells[column].instructions / ours.instructions:.1f}x" if column in cells else ""
            for column in ("torch, eager", "torch, best")
        )
        print(
            f"| {network} | {name} | {ours.instructions / 1e6:.2f} | {ratios} | "
            f"{1e3 * ours.cycles / _CLOCK:.2f} |"
        )
    return rows


def job(folders: list[Path]) -> list[dict[str, Any]]:
    """Prints the modelled seconds of the paper's job."""
    rows = []
    print("| network | part | million instructions | modelled s, one core | four | of it memory |")
    print("|---|---|---|---|---|---|")
    for folder in folders:
        parts: dict[str, a53.Counts] = defaultdict(a53.Counts)
        for row, blocks in a53.read(folder):
            parts[row["part"]].add(a53.total(blocks), 1)
            network = row["network"]
        weights = _IMAGES * _weight_bytes(network)
        new = _VIEWS if "iterations, new views" in parts else 0
        known = _ITERATIONS - new
        label = f"{network}, --views {new}" if new else network
        # Times, and bytes read from memory.
        passes = {
            "import": (1.0, 0),
            "load network": (1.0, 0),
            "load photos": (1.0, 0),
            "Fisher pass": (1.0, 2 * weights),
            "selection, set-up, end": (1.0, weights),
            "iterations, new views": (new, new * 2 * weights),
            "iterations": (known / _COUNTED_ITERATIONS, known * 2 * weights),
        }
        one_total = four_total = 0.0
        for name, (times, traffic) in passes.items():
            if not times:
                continue
            alone, shared = parts[name], parts[name + ", shared"]
            memory = traffic / _BANDWIDTH
            one = times * (alone.cycles + shared.cycles) / _CLOCK + memory
            busiest = -(-_IMAGES // 4) / _IMAGES
            four = times * (alone.cycles + busiest * shared.cycles) / _CLOCK + memory
            instructions = times * (alone.instructions + shared.instructions)
            one_total += one
            four_total += four
            rows.append(
                {
                    "table": "job",
                    "network": network,
                    "views": new or None,
                    "part": name,
                    "instructions": round(instructions),
                    "cycles": round(times * alone.cycles),
                    "shared_cycles": round(times * shared.cycles),
                    "dram_bytes": traffic,
                    "modelled_seconds_one_core": one,
                    "modelled_seconds_four_cores": four,
                }
            )
            print(
                f"| {label} | {name} | {instructions / 1e6:.0f} | {one:.2f} | {four:.2f} | "
                f"{memory:.2f} |"
            )
        print(f"| {label} | **total** | | **{one_total:.1f}** | **{four_total:.1f}** | |")
    return rows


def _weight_bytes(network: str) -> int:
    """All weights of the job's network as float32: what a pass over it reads from memory."""
    graph = operations(ARCHITECTURES[network], feature_mix=network != "mcunet")
    return 4 * sum(
        op.out_channels * op.kernel**2 * op.in_channels // op.groups
        for op in graph
        if op.kind == "conv"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("table", choices=("kernels", "steps", "job"))
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tables = {"kernels": kernels, "steps": steps, "job": job}
    rows = tables[arguments.table](arguments.folders)
    if arguments.json:
        with arguments.json.open("a") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
