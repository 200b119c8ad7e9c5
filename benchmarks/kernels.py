"""Each kernel on each instruction set, on every layer shape of the three networks, one image.

Through the core's Convolution, whose calls also allocate their results; torch's calls
(`conv2d` and `convolution_backward`, channels_last) do the same. Bytes: what a kernel reads and
writes at least, for the roofline.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from tinytrain_ext import _core
from tinytrain_ext.bench.jobs import (
    TT_POLICIES,
    KernelJob,
    LayerShape,
    fma_gflops,
    layer_shapes,
)
from tinytrain_ext.bench.torch_peer import TorchKernelJob

from .measure import Timer, cpu_timer, interleave, ratios, spread

OPERATIONS = ("forward", "grad_input", "grad_weight", "grad_weight, a quarter of the channels")
LEAST_SECONDS = 0.004


def shapes() -> dict[LayerShape, list[str]]:
    """Every distinct convolution, and the networks that have it."""
    found: dict[LayerShape, list[str]] = {}
    for name in TT_POLICIES:
        for shape in layer_shapes(name):
            found.setdefault(shape, []).append(name)
    return found


def our_calls(job: KernelJob, quarter: list[int]) -> dict[str, Callable[[], Any]]:
    return {
        "forward": job.forward,
        "grad_input": job.grad_input,
        "grad_weight": job.grad_weight,
        OPERATIONS[3]: lambda: job.convolution.grad_weight(
            job.grad_output, job.image, quarter, "out"
        ),
    }


def torch_calls(job: KernelJob) -> dict[str, Callable[[], Any]]:
    theirs = TorchKernelJob(job)
    return {
        "forward": lambda: theirs.forward().permute(0, 2, 3, 1).numpy(),
        "grad_input": lambda: theirs.grad_input().permute(0, 2, 3, 1).numpy(),
        "grad_weight": lambda: theirs.grad_weight().numpy(),
    }


def least_bytes(job: KernelJob, operation: str) -> int:
    """Bytes that have to be read and written once."""
    image, grad, weight = job.image.size, job.grad_output.size, job.weight.size
    if operation == OPERATIONS[3]:
        return grad + weight + image * (1 if job.shape.depthwise else 4)
    return 4 * (image + grad + weight)


def measure(rounds: int, copy_gigabytes: float) -> Iterator[dict[str, Any]]:
    """One row for each kernel and shape; exits if torch computes something else."""
    torch.set_num_threads(1)
    isas = [isa for isa in _core.available_isas() if isa != "scalar"]
    peaks = {isa: fma_gflops(isa) for isa in isas}
    for shape, networks in shapes().items():
        chosen = np.random.default_rng(0).permutation(shape.out_channels)
        quarter = sorted(map(int, chosen[: shape.out_channels // 4]))
        jobs = {isa: KernelJob(shape, isa) for isa in isas}
        sides = {isa: our_calls(job, quarter) for isa, job in jobs.items()}
        job = jobs[isas[0]]
        sides["torch"] = torch_calls(job)
        for operation in OPERATIONS:
            if shape.in_channels == 3 and operation == "grad_input":
                continue  # nobody asks for the photo's gradient
            calls = {side: calls[operation] for side, calls in sides.items() if operation in calls}
            wanted = calls[isas[0]]()
            for side, call in calls.items():
                worst = float(np.abs(call() - wanted).max() / np.abs(wanted).max())
                if worst > 1e-4:
                    raise SystemExit(f"{operation}, {shape.name}: {side} differs by {worst:.1e}")
            timers: dict[str, Timer] = {side: cpu_timer(call) for side, call in calls.items()}
            seconds = interleave(timers, rounds, LEAST_SECONDS)
            macs = shape.macs if operation != OPERATIONS[3] else shape.macs // 4
            traffic = least_bytes(job, operation)
            columns: dict[str, Any] = {}
            for side, times in seconds.items():
                columns[side] = {"microseconds": spread([1e6 * s for s in times])}
                if side in isas:
                    floor = max(2e-9 * macs / peaks[side], 1e-9 * traffic / copy_gigabytes)
                    columns[side]["roofline"] = round(floor / statistics.median(times), 3)
                else:
                    columns[side]["ratio"] = ratios(times, seconds[isas[0]])
            yield {
                "section": "kernels",
                "row": operation,
                "kind": shape.kind,
                "kernel": shape.kernel,
                "shape": shape.name,
                "networks": networks,
                "macs": macs,
                "bytes": traffic,
                "rounds": rounds,
                "columns": columns,
            }
