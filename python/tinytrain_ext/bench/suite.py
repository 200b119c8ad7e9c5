"""`tinytrain bench kernels | step | adapt`: rows of medians, and the conditions they hold under.

Every row is timed in interleaved rounds: each round takes every row once, so that a machine that
heats up or is disturbed disturbs all alike. Torch's rows appear where torch is installed; the two
are then checked to compute the same. Jobs on one thread are timed in CPU time, others in wall time.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core
from ..cost import inspected_layers, profile
from ..demo import draw_task, save_images
from ..selection import UpdatePolicy, full_train
from .device import identify, observe, pin
from .jobs import (
    INPUT_SIZE,
    AdaptTimes,
    KernelJob,
    OurJob,
    Task,
    adapt_once,
    fma_gflops,
    layer_shapes,
    tt_policy,
    zoo_network,
)

__all__ = [
    "Energy",
    "PowerLog",
    "Row",
    "adaptation",
    "call_seconds",
    "json_lines",
    "kernels",
    "measured",
    "steps",
    "table",
]

logger = logging.getLogger(__name__)

OURS = "tinytrain"
METER_SECONDS = 10.0  # that a power meter may be late with its next line
SECONDS_A_ROUND = 0.002  # of one row at least, so that the clock's step does not count
ADAPT_ROWS = ("load", "fisher", "run", "total")
ADAPT_WAYS, ADAPT_SHOTS = 5, 5

Progress = Callable[[str, int, int], None]
Calls = dict[tuple[str, str], Callable[[], object]]  # (method, implementation)
Document = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One figure. name: the layer, or the job. batch: images. method: what is computed.

    implementation: "tinytrain", or a peer. median, low, high: of the rounds, in `unit`.
    share_of_peak: of the machine's measured FMA rate, where the work is counted in MACs.
    ratio: a peer's time over ours, the median of the rounds' ratios. joules: of the median round.
    """

    name: str
    network: str
    batch: int
    method: str
    implementation: str
    unit: str
    median: float
    low: float
    high: float
    rounds: int
    share_of_peak: float | None = None
    ratio: float | None = None
    joules: float | None = None


@dataclass(frozen=True)
class PowerLog:
    """A power meter's record: seconds since 1970 (UTC), ascending, and watts at those times."""

    seconds: tuple[float, ...]
    watts: tuple[float, ...]

    @staticmethod
    def read(path: Path) -> PowerLog:
        """From a CSV file with a header that names the columns `seconds` and `watts`.

        A last line without its end is left out: the meter is writing it. Raises ValueError, naming
        the line, for anything else.
        """
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        table = csv.DictReader(line for line in lines if line.endswith("\n"))
        if not {"seconds", "watts"} <= set(table.fieldnames or ()):
            raise ValueError(f"{path}: expected a header with columns seconds and watts")
        seconds: list[float] = []
        watts: list[float] = []
        for line in table:
            try:
                at, power = float(line["seconds"]), float(line["watts"])
            except (TypeError, ValueError):
                at = power = math.nan
            if not (math.isfinite(at) and 0 <= power < math.inf):
                raise ValueError(f"{path}: line {table.line_num}: expected two numbers")
            if seconds and at <= seconds[-1]:
                raise ValueError(f"{path}: line {table.line_num}: seconds must ascend")
            seconds.append(at)
            watts.append(power)
        if len(seconds) < 2:
            raise ValueError(f"{path}: expected at least two lines of numbers")
        return PowerLog(tuple(seconds), tuple(watts))

    def joules(self, start: float, seconds: float) -> float:
        """Energy from `start` for `seconds`, by straight lines between the records.

        Raises ValueError where the record does not cover that time.
        """
        end = start + seconds
        if start < self.seconds[0] or end > self.seconds[-1]:
            raise ValueError(
                f"power record: covers {self.seconds[0]:.1f} to {self.seconds[-1]:.1f} s, "
                f"the job ran from {start:.1f} to {end:.1f} s"
            )
        inside = [at for at in self.seconds if start < at < end]
        times = np.array([start, *inside, end])
        watts = np.interp(times, self.seconds, self.watts)
        return float(((watts[1:] + watts[:-1]) / 2 * np.diff(times)).sum())


@dataclass(frozen=True)
class Energy:
    """Where energy comes from: a constant power, or a meter's file that is read after the job."""

    watts: float | None = None
    power_csv: Path | None = None

    def of(self, times: Sequence[AdaptTimes]) -> list[dict[str, float]] | None:
        """Joules of each row of ADAPT_ROWS, for each time; None if nothing is known."""
        if self.watts is not None:
            return [{row: self.watts * float(getattr(t, row)) for row in ADAPT_ROWS} for t in times]
        if self.power_csv is None:
            return None
        end = times[-1].started + times[-1].total
        # The meter writes now and then: its next line may still be to come.
        waited = time.monotonic() + METER_SECONDS
        while (log := PowerLog.read(self.power_csv)).seconds[-1] < end:
            if time.monotonic() > waited:
                break  # `joules` says what is missing
            time.sleep(0.1)
        found = []
        for t in times:
            starts = (t.started, t.started + t.load, t.started + t.load + t.fisher, t.started)
            found.append(
                {
                    row: log.joules(start, getattr(t, row))
                    for row, start in zip(ADAPT_ROWS, starts, strict=True)
                }
            )
        return found


def kernels(network: str, rounds: int, progress: Progress) -> list[Row]:
    """Every different convolution of a zoo net, one image: forward, and both backward passes."""
    peak = fma_gflops(_core.default_isa())
    rows: list[Row] = []
    shapes = layer_shapes(network)
    for number, shape in enumerate(shapes):
        job = KernelJob(shape)
        calls: Calls = {}
        jobs: dict[str, Any] = {OURS: job}
        if _torch_version():
            from .torch_peer import TorchKernelJob

            jobs["torch"] = TorchKernelJob(job)
        for method in ("forward", "grad_input", "grad_weight"):
            for implementation, of in jobs.items():
                calls[method, implementation] = getattr(of, method)
        rows += rows_of(
            interleaved(calls, rounds, cpu_time=True),
            name=shape.name,
            network=network,
            batch=1,
            unit="us",
            macs=dict.fromkeys(("forward", "grad_input", "grad_weight"), shape.macs),
            peak=peak,
        )
        progress(f"kernels {network}", number + 1, len(shapes))
    return rows


def steps(network: str, batch: int, rounds: int, threads: int) -> list[Row]:
    """Forward, TinyTrain's step by a fixed policy, an iteration, FullTrain's step; Fisher sums."""
    net = zoo_network(network)
    task = Task(net, batch)
    tt_layers = tt_policy(network, net)
    # Weights only: torch's columns train no biases either.
    full_layers = UpdatePolicy(full_train(net).layers)
    options: dict[str, Any] = {"threads": threads}
    plain = OurJob(net, tt_layers, task, **options)
    full = OurJob(net, full_layers, task, **options)
    kept = OurJob(net, tt_layers, task, keep_images=batch, **options)
    kept.session.set_prototypes(task.images, task.labels, task.ways, keep=True)
    inspected = inspected_layers(net)
    whole = UpdatePolicy({layer: full_layers.layers[layer] for layer in inspected})
    last = OurJob(net, whole, task, **options)
    fused = OurJob(net, whole, task, fisher_layers=inspected, **options)
    calls: Calls = {
        ("forward", OURS): OurJob(net, UpdatePolicy({}), task, **options).forward,
        ("TT step", OURS): plain.step,
        ("TT iteration", OURS): OurJob(net, tt_layers, task, **options).iteration,
        ("TT iteration, prefix kept", OURS): kept.kept_iteration,
        ("FullTrain step", OURS): full.step,
        ("last blocks, all weights", OURS): last.gradients,
        ("the same with Fisher sums", OURS): fused.gradients,
    }
    if _torch_version():
        from . import torch_peer

        for name, best in (("torch eager", False), ("torch best", True)):
            for method, trained in (
                ("forward", set[int]()),
                ("TT step", set(tt_layers.layers)),
                ("FullTrain step", set(full_layers.layers)),
            ):
                job = torch_peer.TorchJob(net, trained, task, best)
                calls[method, name] = job.forward if method == "forward" else job.step
    times = interleaved(calls, rounds, cpu_time=threads == 1)
    if _torch_version():
        torch_peer.check(net, tt_layers)
    return rows_of(
        times,
        name="step",
        network=network,
        batch=batch,
        unit="ms",
        macs={"forward": profile(net).forward_macs * batch},
        peak=fma_gflops(_core.default_isa()) * threads,
    )


def adaptation(
    network: str,
    rounds: int,
    threads: int,
    energy: Energy,
    progress: Progress,
    iterations: int = 40,
) -> list[Row]:
    """The paper's Table 5: load, Fisher, run and total of one adaptation to 25 photos.

    The photos are drawn by this program and stored as files; load reads them and the network.
    """
    times: list[AdaptTimes] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.safetensors"
        zoo_network(network).save(file)
        task = draw_task(INPUT_SIZE, shots=ADAPT_SHOTS, queries=1)
        save_images(task, Path(folder) / "photos")
        for number in range(rounds):
            photos = Path(folder) / "photos" / "support"
            times.append(adapt_once(file, photos, iterations, threads))
            progress(f"adapt {network}", number + 1, rounds)
    try:
        joules = energy.of(times)
    except (OSError, ValueError) as error:
        logger.warning("energy is left out: %s", error)  # the times are worth having
        joules = None
    rows = []
    for method in ADAPT_ROWS:
        seconds = [float(getattr(t, method)) for t in times]
        spent = None if joules is None else statistics.median(of[method] for of in joules)
        rows.append(
            Row(
                "adapt",
                network,
                ADAPT_WAYS * ADAPT_SHOTS,
                method,
                OURS,
                "s",
                statistics.median(seconds),
                min(seconds),
                max(seconds),
                rounds,
                joules=spent,
            )
        )
    return rows


def measured(what: str, threads: int, rows: Callable[[], list[Row]]) -> Document:
    """Runs `rows` on as many CPUs as threads; with the machine, and its state before and after."""
    cpus = pin(threads)
    # An adaptation has no peer, and torch would take memory from it.
    version = None if what == "adapt" else _torch_version()
    if version:
        import torch

        torch.set_num_threads(threads)
    before = observe()
    found = rows()
    return {
        "command": "bench",
        "bench": what,
        "device": asdict(identify()),
        "threads": threads,
        "pinned_to": cpus,
        "fma_peak_gflops": fma_gflops(_core.default_isa()),
        "torch": version,
        "before": asdict(before),
        "after": asdict(observe()),
        "rows": [asdict(row) for row in found],
    }


def call_seconds(
    call: Callable[[], object], repeats: int, clock: Callable[[], float] = time.thread_time
) -> float:
    """Seconds of one call, by default in CPU time of this thread: the mean of `repeats`."""
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def interleaved(calls: Calls, rounds: int, *, cpu_time: bool) -> dict[tuple[str, str], list[float]]:
    """Seconds of each call in each round; a call too short to time is repeated within a round."""
    clock = time.thread_time if cpu_time else time.perf_counter
    repeats = {}
    for key, call in calls.items():
        call()
        alone = call_seconds(call, 1, clock)
        repeats[key] = max(1, math.ceil(SECONDS_A_ROUND / max(alone, 1e-7)))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            times[key].append(call_seconds(call, repeats[key], clock))
    return times


_PER_SECOND = {"us": 1e6, "ms": 1e3, "s": 1.0}


def rows_of(
    times: dict[tuple[str, str], list[float]],
    *,
    name: str,
    network: str,
    batch: int,
    unit: str,
    macs: dict[str, int],
    peak: float,
) -> list[Row]:
    """Rows of `interleaved` times. macs: of one call, by method; peak: in 1e9 FLOP a second."""
    rows = []
    for (method, implementation), seconds in times.items():
        median = statistics.median(seconds)
        ours = times[method, OURS]
        ratio = None
        if implementation != OURS:
            ratio = statistics.median(s / o for s, o in zip(seconds, ours, strict=True))
        scale = _PER_SECOND[unit]
        rows.append(
            Row(
                name,
                network,
                batch,
                method,
                implementation,
                unit,
                median * scale,
                min(seconds) * scale,
                max(seconds) * scale,
                len(seconds),
                share_of_peak=2e-9 * macs[method] / median / peak if method in macs else None,
                ratio=ratio,
            )
        )
    return rows


def _torch_version() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return str(torch.__version__)


def json_lines(document: Document) -> str:
    """One line a row, each with the conditions it holds under."""
    conditions = {key: value for key, value in document.items() if key not in ("rows", "command")}
    return "\n".join(json.dumps({**row, **conditions}) for row in document["rows"])


def table(document: Document) -> str:
    """The rows for people, peers beside ours."""
    device, before, after = document["device"], document["before"], document["after"]
    lines = [
        f"device       {device['model'] or 'unnamed'}: {device['cpus']} x {device['core']} "
        f"({device['machine']}), kernels: {device['isa']}",
        f"threads      {document['threads']}, pinned to CPU "
        f"{', '.join(map(str, document['pinned_to']))}; measured FMA peak of one: "
        f"{document['fma_peak_gflops']:.1f} GFLOP/s",
        f"before       {_state(before)}",
        f"after        {_state(after)}",
        "",
    ]
    rows = [Row(**row) for row in document["rows"]]
    peers = list(dict.fromkeys(row.implementation for row in rows if row.implementation != OURS))
    energy = any(row.joules is not None for row in rows)
    width = max(len(_label(row)) for row in rows)
    unit = rows[0].unit
    head = f"{'':<{width}}{f'median {unit}':>12}{'lowest to highest':>22}{'of peak':>9}"
    lines.append(head + ("     joules" if energy else "") + "".join(f"{p:>14}" for p in peers))
    for row in rows:
        if row.implementation != OURS:
            continue
        text = f"{_label(row):<{width}}{row.median:>12.3f}"
        text += f"{f'{row.low:.3f} to {row.high:.3f}':>22}"
        text += f"{100 * row.share_of_peak:>7.0f} %" if row.share_of_peak is not None else " " * 9
        if energy:
            text += f"{row.joules:>11.2f}" if row.joules is not None else " " * 11
        lines.append((text + "".join(_ratio(row, peer, rows) for peer in peers)).rstrip())
    if peers:
        lines += ["", "Columns of peers: their time over ours, median of the rounds' ratios."]
    return "\n".join(lines)


def _label(row: Row) -> str:
    subject = row.name if row.unit == "us" else f"B {row.batch}"
    return f"{row.network} {subject} {row.method}"


def _ratio(row: Row, peer: str, rows: Iterable[Row]) -> str:
    for other in rows:
        same = (other.name, other.network, other.batch, other.method) == (
            row.name,
            row.network,
            row.batch,
            row.method,
        )
        if same and other.implementation == peer and other.ratio is not None:
            return f"{f'{other.ratio:.1f}x':>14}"
    return " " * 14


def _state(state: Document) -> str:
    known = []
    if state["celsius"] is not None:
        known.append(f"{state['celsius']:.1f} degrees C")
    if state["megahertz"] is not None:
        known.append(f"{state['megahertz']:.0f} MHz")
    if state["governor"] is not None:
        known.append(f"governor {state['governor']}")
    if state["throttling"] is not None:
        known.append("; ".join(state["throttling"]) or "never throttled")
    return ", ".join(known) or "not known"
