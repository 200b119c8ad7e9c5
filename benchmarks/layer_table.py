"""The layers of the three networks for the C++ benchmark, written from their Python definition.

    python -m benchmarks.layer_table > benchmarks/cpp/layers.inc

A test fails when the file is not what this prints.
"""

from __future__ import annotations

from tinytrain_ext.bench.jobs import TT_POLICIES, layer_shapes


def text() -> str:
    """One initialiser of a `Layer` (kernel_bench.cpp) a line, in the order the networks run."""
    lines = ["// Written by `python -m benchmarks.layer_table`."]
    for network in TT_POLICIES:
        for shape in layer_shapes(network):
            numbers = (
                shape.in_channels,
                shape.out_channels,
                shape.height,
                shape.width,
                shape.kernel,
                shape.stride,
                shape.padding,
            )
            lines.append(
                f'{{"{network}", "{shape.name}", {", ".join(map(str, numbers))}, '
                f"{str(shape.depthwise).lower()}}},"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(text(), end="")
