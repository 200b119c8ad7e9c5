"""How time is taken, and what the machine could do at best.

CPU time, not wall time, unless a row says so: the machine may be busy with other things. The calls
of a comparison take turns, so that whatever disturbs one disturbs all; each result is the median of
the rounds, with the lowest and the highest beside it.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tinytrain_ext import _core
from tinytrain_ext.bench.jobs import fma_gflops

__all__ = [
    "Timer",
    "copy_gigabytes",
    "cpu_timer",
    "describe_machine",
    "interleave",
    "ratios",
    "spread",
    "wall_timer",
]

# Seconds of one call, measured over so many calls.
Timer = Callable[[int], float]
Key = TypeVar("Key", bound=Hashable)

MEASURED_SECONDS = 0.03
# A core's share of the machine's L2 cache holds both arrays of the first, the second is in DRAM.
COPY_BYTES = {"cache": 256 << 10, "memory": 64 << 20}


def cpu_timer(call: Callable[[], object], clock: Callable[[], float] = time.process_time) -> Timer:
    """Times `call` in CPU seconds of this process (one thread, or all its threads together)."""

    def seconds(repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats

    return seconds


def wall_timer(call: Callable[[], object]) -> Timer:
    """Times `call` in seconds that pass."""
    return cpu_timer(call, time.perf_counter)


def interleave(
    timers: Mapping[Key, Timer], rounds: int, least_seconds: float = MEASURED_SECONDS
) -> dict[Key, list[float]]:
    """Seconds of a call for each timer, one a round, taken in turns.

    Each timer runs as often in a round as fills `least_seconds`, after one call that does not count
    (the others have emptied the caches).
    """
    repeats = {}
    for key, timer in timers.items():
        timer(2)
        repeats[key] = max(1, min(500, round(least_seconds / max(timer(1), 1e-7))))
    seconds: dict[Key, list[float]] = {key: [] for key in timers}
    for _ in range(rounds):
        for key, timer in timers.items():
            timer(1)
            seconds[key].append(timer(repeats[key]))
    return seconds


def spread(values: Sequence[float], digits: int = 4) -> list[float]:
    """[median, lowest, highest]."""
    found = (statistics.median(values), min(values), max(values))
    return [float(f"{value:.{digits}g}") for value in found]


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round, values / base: [median, lowest, highest]."""
    return spread([value / other for value, other in zip(values, base, strict=True)], 3)


def copy_gigabytes(size: int) -> float:
    """Bytes read and written a second, in 1e9, when copying `size` bytes."""
    source, target = np.ones(size // 8), np.empty(size // 8)
    timer, best = cpu_timer(lambda: np.copyto(target, source), time.thread_time), 0.0
    repeats = max(1, (64 << 20) // size)
    for _ in range(5):
        best = max(best, 2 * size / timer(repeats) / 1e9)
    return best


def describe_machine() -> dict[str, Any]:
    """What rows of one run have in common: the machine and its peaks, versions, the commit."""
    root = Path(__file__).parents[1]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    ).stdout.strip()
    model = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "section": "machine",
        "cpu": model[0] if model else platform.processor(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "isa": _core.default_isa(),
        "fma_gflops": {isa: round(fma_gflops(isa), 1) for isa in _core.available_isas()},
        "copy_gigabytes": {name: round(copy_gigabytes(n), 1) for name, n in COPY_BYTES.items()},
        "commit": commit,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
