"""How cost grows with images, classes, image size and network width; and with threads.

MobileNetV2, the fixed policy. Growth is in CPU time. Threads are in wall time, which whatever else
runs here, or beside a virtual machine on its host, can only lengthen: many single steps in turns,
and beside the medians the lowest times, which are those of undisturbed steps. The CPU time of all
threads together shows what sharing the work costs.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tinytrain_ext.architectures import ARCHITECTURES, Architecture, random_network
from tinytrain_ext.bench.jobs import OurJob, Task, tt_policy
from tinytrain_ext.cost import profile

from .measure import Timer, cpu_timer, interleave, spread, wall_timer

NETWORK = "mobilenetv2"
IMAGES = (1, 2, 5, 10, 25, 50, 100)
WAYS = (2, 5, 10, 20, 50)
SIZES = (64, 96, 128, 160, 192, 224)
WIDTHS = (0.5, 1.0, 1.5, 2.0, 3.0)
BATCH = 5
STEPS_A_ROUND = 30


def widened(width: float) -> Architecture:
    """The architecture with its channels multiplied, rounded to eights."""

    def scaled(channels: int) -> int:
        return max(8, round(channels * width / 8) * 8)

    base = ARCHITECTURES[NETWORK]
    blocks = tuple(
        dataclasses.replace(
            block,
            in_channels=scaled(block.in_channels),
            expanded_channels=scaled(block.expanded_channels),
            out_channels=scaled(block.out_channels),
        )
        for block in base.blocks
    )
    assert base.feature_mix is not None
    return Architecture(
        f"{NETWORK} x {width}", scaled(base.stem_channels), blocks, scaled(base.feature_mix)
    )


def job(width: float = 1.0, size: int = 128, images: int = BATCH, ways: int = 5) -> OurJob:
    network = random_network(widened(width), np.random.default_rng(0), feature_mix=True)
    network = network.replace(input_size=size, resize=size)
    return OurJob(network, tt_policy(NETWORK, network), Task(network, images, ways=ways))


def growth(rounds: int) -> list[dict[str, Any]]:
    """A step and an iteration along each axis, with the MACs that either needs."""
    axes: dict[str, dict[float, OurJob]] = {
        "images": {n: job(images=n) for n in IMAGES},
        "ways": {n: job(images=50, ways=n) for n in WAYS},
        "size": {n: job(size=n) for n in SIZES},
        "width": {n: job(width=n) for n in WIDTHS},
    }
    timers: dict[tuple[str, float, str], Timer] = {}
    for axis, jobs in axes.items():
        for value, made in jobs.items():
            timers[axis, value, "step"] = cpu_timer(made.step)
            timers[axis, value, "iteration"] = cpu_timer(made.iteration)
    rows = []
    for (axis, value, kind), seconds in interleave(timers, rounds).items():
        made = axes[axis][value]
        network = made.session.network()
        costs = profile(network)
        macs = costs.forward_macs + costs.backward_macs(tt_policy(NETWORK, network))
        if kind == "iteration":
            macs += costs.forward_macs
        rows.append(
            {
                "section": "scaling",
                "network": NETWORK,
                "row": kind,
                "axis": axis,
                "value": value,
                "milliseconds": spread([1e3 * s for s in seconds]),
                "macs": macs * len(made.task.images),
                "rounds": rounds,
            }
        )
    return rows


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that never rest, meanwhile."""
    spin = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(spin) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def threads(rounds: int) -> list[dict[str, Any]]:
    """Two threads against one, at batch 25 and 1, alone and beside one and two busy processes."""
    rows = []
    made: dict[tuple[int, int], OurJob] = {}
    for batch in (25, 1):
        for count in (1, 2):
            single = job(images=batch)
            made[batch, count] = OurJob(
                single.session.network(),
                tt_policy(NETWORK, single.session.network()),
                single.task,
                threads=count,
            )
    for busy in (0, 1, 2):
        with neighbours(busy):
            wall = {key: wall_timer(j.step) for key, j in made.items()}
            passed = interleave(wall, STEPS_A_ROUND * rounds, least_seconds=0)
            used = interleave({key: cpu_timer(j.step) for key, j in made.items()}, rounds)
            load = os.getloadavg()[0]
        cpu = {key: statistics.median(times) for key, times in used.items()}
        for batch in (25, 1):
            one, two = passed[batch, 1], passed[batch, 2]
            rows.append(
                {
                    "section": "threads",
                    "network": NETWORK,
                    "batch": batch,
                    "row": f"{busy} busy neighbours",
                    "wall_milliseconds": {
                        "1": spread([1e3 * s for s in one]),
                        "2": spread([1e3 * s for s in two]),
                    },
                    "speedup": round(statistics.median(one) / statistics.median(two), 3),
                    "speedup_lowest": round(min(one) / min(two), 3),
                    "cpu_ratio": round(cpu[batch, 2] / cpu[batch, 1], 3),
                    "load": load,
                    "rounds": STEPS_A_ROUND * rounds,
                }
            )
    return rows
