"""Each kernel on each instruction set, on every layer shape of the three networks, one image.

Through the core's Convolution, whose calls also allocate their results; torch's calls
(`conv2d` and `convolution_backward`, NCHW and channels_last) do the same. Bytes: what a kernel
reads and writes at least, for the roofline.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tinytrain_ext import _core
from tinytrain_ext.cost import LayerCost, profile

from .measure import Timer, cpu_timer, fma_gflops, interleave, ratios, spread
from .step import TT_POLICIES, zoo_network

OPERATIONS = ("forward", "grad_input", "grad_weight", "grad_weight, a quarter of the channels")
LEAST_SECONDS = 0.004


def shapes() -> dict[tuple[Any, ...], tuple[LayerCost, list[str]]]:
    """Every distinct convolution: its costs, and the layers that are of this shape."""
    found: dict[tuple[Any, ...], tuple[LayerCost, list[str]]] = {}
    for name in TT_POLICIES:
        for row in profile(zoo_network(name)).layers:
            key = (
                (row.kind, row.kernel, row.stride, row.activation),
                (row.in_channels, row.out_channels, row.in_elements),
            )
            found.setdefault(key, (row, []))[1].append(f"{name} {row.layer}")
    return found


class Arrays:
    """One image's tensors of a convolution, NHWC, and the quarter of channels to be trained."""

    def __init__(self, row: LayerCost) -> None:
        rng = np.random.default_rng(0)
        self.row = row
        self.size = math.isqrt(row.in_elements // row.in_channels)
        self.out_size = math.isqrt(row.out_elements // row.out_channels)
        fan_in = row.in_channels // row.groups
        shape = (row.out_channels, fan_in, row.kernel, row.kernel)
        self.weight = rng.standard_normal(shape, np.float32)
        self.bias = rng.standard_normal(row.out_channels, np.float32)
        x = (1, self.size, self.size, row.in_channels)
        self.x = rng.standard_normal(x, np.float32)
        y = (1, self.out_size, self.out_size, row.out_channels)
        self.grad = rng.standard_normal(y, np.float32)
        self.quarter = [
            int(c) for c in sorted(rng.permutation(row.out_channels)[: row.out_channels // 4])
        ]


def our_calls(arrays: Arrays, isa: str) -> dict[str, Callable[[], Any]]:
    row = arrays.row
    conv = _core.Convolution32(
        arrays.weight,
        arrays.bias,
        height=arrays.size,
        width=arrays.size,
        stride=row.stride,
        padding=(row.kernel - 1) // 2,
        depthwise=row.kind == "depthwise",
        activation=row.activation,
        isa=isa,
    )
    every = list(range(row.out_channels))
    return {
        "forward": lambda: conv.forward(arrays.x)[0],
        "grad_input": lambda: conv.grad_input(arrays.grad)[0],
        "grad_weight": lambda: conv.grad_weight(arrays.grad, arrays.x, every, "out"),
        OPERATIONS[3]: lambda: conv.grad_weight(arrays.grad, arrays.x, arrays.quarter, "out"),
    }


def torch_calls(arrays: Arrays, memory_format: torch.memory_format) -> dict[str, Callable[[], Any]]:
    row = arrays.row

    def tensor(values: NDArray[np.float32]) -> torch.Tensor:
        channels_first = torch.from_numpy(values).permute(0, 3, 1, 2)
        return channels_first.contiguous(memory_format=memory_format)

    x, grad = tensor(arrays.x), tensor(arrays.grad)
    weight = torch.from_numpy(arrays.weight).contiguous(memory_format=memory_format)
    bias = torch.from_numpy(arrays.bias)
    pair = [row.stride] * 2, [(row.kernel - 1) // 2] * 2, [1, 1]

    def forward() -> torch.Tensor:
        y = torch.conv2d(x, weight, bias, *pair, row.groups)
        return y if row.activation == "none" else torch.nn.functional.relu6(y, inplace=True)

    def backward(wanted: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, *pair, False, [0, 0], row.groups, wanted
        )

    return {
        "forward": lambda: forward().permute(0, 2, 3, 1).numpy(),
        "grad_input": lambda: backward([True, False, False])[0].permute(0, 2, 3, 1).numpy(),
        "grad_weight": lambda: backward([False, True, False])[1].numpy(),
    }


def least_bytes(arrays: Arrays, operation: str) -> int:
    """Bytes that have to be read and written once."""
    row = arrays.row
    if operation == OPERATIONS[3]:
        share = len(arrays.quarter) / row.out_channels
        gathered = row.in_elements * (share if row.kind == "depthwise" else 1)
        return int(4 * (share * (row.out_elements + row.weights) + gathered))
    return 4 * (row.in_elements + row.out_elements + row.weights)


def measure(rounds: int, copy_gigabytes: float) -> Iterator[dict[str, Any]]:
    """One row for each kernel and shape; exits if torch computes something else."""
    torch.set_num_threads(1)
    isas = [isa for isa in _core.available_isas() if isa != "scalar"]
    for row, layers in shapes().values():
        arrays = Arrays(row)
        sides = {isa: our_calls(arrays, isa) for isa in isas}
        sides["torch"] = torch_calls(arrays, torch.contiguous_format)
        sides["torch, channels_last"] = torch_calls(arrays, torch.channels_last)
        for operation in OPERATIONS:
            if row.layer == 0 and operation == "grad_input":
                continue  # nobody asks for the photo's gradient
            calls = {side: calls[operation] for side, calls in sides.items() if operation in calls}
            wanted = calls[isas[0]]()
            for side, call in calls.items():
                worst = float(np.abs(call() - wanted).max() / np.abs(wanted).max())
                if worst > 1e-4:
                    raise SystemExit(f"{operation} of {layers[0]}: {side} differs by {worst:.1e}")
            timers: dict[str, Timer] = {side: cpu_timer(call) for side, call in calls.items()}
            seconds = interleave(timers, rounds, LEAST_SECONDS)
            macs = row.macs if operation != OPERATIONS[3] else row.macs // 4
            traffic = least_bytes(arrays, operation)
            columns: dict[str, Any] = {}
            for side, times in seconds.items():
                columns[side] = {"microseconds": spread([1e6 * s for s in times])}
                if side in isas:
                    floor = max(2e-9 * macs / fma_gflops(side), 1e-9 * traffic / copy_gigabytes)
                    columns[side]["roofline"] = round(floor / statistics.median(times), 3)
                else:
                    columns[side]["ratio"] = ratios(times, seconds[isas[0]])
            yield {
                "section": "kernels",
                "row": operation,
                "kind": row.kind,
                "shape": [row.in_channels, row.out_channels, arrays.size, row.kernel, row.stride],
                "layers": layers,
                "macs": macs,
                "bytes": traffic,
                "rounds": rounds,
                "columns": columns,
            }
