"""Every convolution of the three networks, three passes, ours and torch's: regions for count.sh.

Arguments: folder, --ours to leave torch out.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from regions import Regions

from cases import NETWORK_CASES  # type: ignore[import-not-found]
from tinytrain_ext import _core
from tinytrain_ext.bench.jobs import LayerShape

PASSES = ("forward", "grad_input", "grad_weight")


def ours(case: LayerShape, regions: Regions) -> None:
    """The kernels as training calls them: ReLU6 and bias forward, a mask behind grad_input."""
    rng = np.random.default_rng(0)
    convolution = _core.Convolution32(
        rng.standard_normal(case.weight_shape, np.float32),
        np.zeros(case.out_channels, np.float32),
        height=case.height,
        width=case.width,
        stride=case.stride,
        padding=case.padding,
        depthwise=case.depthwise,
        activation="none"
        if case.kind == "pointwise" and case.out_channels < case.in_channels
        else "relu6",
        isa="neon",
    )
    x = rng.standard_normal((1, case.height, case.width, case.in_channels), np.float32)
    grad = rng.standard_normal((1, *case.output_size, case.out_channels), np.float32)
    mask = np.full((1, case.height * case.width, (case.in_channels + 7) // 8), 0xFF, np.uint8)
    channels = list(range(case.out_channels))
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: convolution.forward(x),
        "grad_input": lambda: convolution.grad_input(grad, mask=mask),
        "grad_weight": lambda: convolution.grad_weight(grad, x, channels, "out"),
    }
    for name in PASSES:
        with regions.region(case=case.name, kernel_pass=name, implementation="ours"):
            calls[name]()


def theirs(case: LayerShape, regions: Regions) -> None:
    """torch's conv2d with bias; its two backward passes one by one."""
    import torch  # here: it takes long
    from torch.nn import functional as F

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal(case.weight_shape, np.float32))
    bias = torch.zeros(case.out_channels)
    x = torch.from_numpy(
        rng.standard_normal((1, case.in_channels, case.height, case.width), np.float32)
    )
    grad = torch.from_numpy(
        rng.standard_normal((1, case.out_channels, *case.output_size), np.float32)
    )
    groups = case.in_channels if case.depthwise else 1

    def backward(input_gradient: bool) -> None:
        two = [case.stride, case.stride], [case.padding, case.padding]
        wanted = [input_gradient, not input_gradient, False]
        torch.ops.aten.convolution_backward(
            grad, x, weight, None, *two, [1, 1], False, [0, 0], groups, wanted
        )

    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: F.conv2d(x, weight, bias, case.stride, case.padding, groups=groups),
        "grad_input": lambda: backward(True),
        "grad_weight": lambda: backward(False),
    }
    with torch.no_grad():
        for name in PASSES:
            calls[name]()
            with regions.region(case=case.name, kernel_pass=name, implementation="torch"):
                calls[name]()


def main() -> None:
    folder = Path(sys.argv[1])
    regions = Regions()
    for case in NETWORK_CASES:
        ours(case, regions)
        if "--ours" not in sys.argv:
            theirs(case, regions)
    regions.write(folder / "regions.json")


main()
