"""The paper's three networks as tables: MCUNet (5 fps), MobileNetV2 (width 0.35), ProxylessNAS
(width 0.3), input 3x128x128.

Each is a 3x3 stem of stride 2, inverted-residual blocks (1x1 expansion, depthwise, linear 1x1
projection; ReLU6 after the first two) and a global average pool. The paper's Tables 2, 3 and 7
count MobileNetV2 and ProxylessNAS with one more 1x1 convolution before the pool, the feature mix,
which the public int8 releases lack.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .network import Network, Operation

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Block",
    "architecture_of",
    "operations",
    "random_network",
    "random_weights",
]


@dataclass(frozen=True)
class Block:
    """An inverted-residual block; without expansion where expanded_channels == in_channels."""

    kernel: int
    in_channels: int
    expanded_channels: int
    out_channels: int
    stride: int
    residual: bool


@dataclass(frozen=True)
class Architecture:
    """A stem, blocks, and the channels of the feature mix where the published network has one."""

    name: str
    stem_channels: int
    blocks: tuple[Block, ...]
    feature_mix: int | None


def _parse(text: str) -> tuple[Block, ...]:
    """Reads lines `kernel in-mid-out stride[r] [xN]`: r marks a residual, xN a repetition."""
    blocks: list[Block] = []
    for line in text.strip().splitlines():
        kernel, channels, stride, *repeat = line.split()
        in_channels, expanded_channels, out_channels = map(int, channels.split("-"))
        residual = stride.endswith("r")
        block = Block(
            int(kernel),
            in_channels,
            expanded_channels,
            out_channels,
            int(stride.strip("sr")),
            residual,
        )
        blocks += [block] * (int(repeat[0].strip("x")) if repeat else 1)
    return tuple(blocks)


_MCUNET = """
3 16-16-8 s1
3 8-32-16 s2
3 16-48-16 s1r
7 16-48-24 s2
3 24-120-24 s1r
3 24-120-40 s2
7 40-160-40 s1r
5 40-160-48 s1
3 48-144-48 s1r
3 48-192-48 s1r
7 48-240-96 s2
5 96-384-96 s1r x2
3 96-576-160 s1
"""

_MOBILENETV2 = """
3 16-16-8 s1
3 8-48-8 s2
3 8-48-8 s1r
3 8-48-16 s2
3 16-96-16 s1r x2
3 16-96-24 s2
3 24-144-24 s1r x3
3 24-144-32 s1
3 32-192-32 s1r x2
3 32-192-56 s2
3 56-336-56 s1r x2
3 56-336-112 s1
"""

_PROXYLESSNAS = """
3 16-16-8 s1
5 8-24-16 s2
3 16-48-16 s1r
7 16-48-16 s2
3 16-48-16 s1r
5 16-48-16 s1r x2
7 16-96-24 s2
5 24-72-24 s1r x3
5 24-144-32 s1
5 32-96-32 s1r x3
7 32-192-64 s2
7 64-384-64 s1r
7 64-192-64 s1r x2
7 64-384-96 s1
"""

ARCHITECTURES = {
    "mcunet": Architecture("mcunet", 16, _parse(_MCUNET), None),
    "mobilenetv2": Architecture("mobilenetv2", 16, _parse(_MOBILENETV2), 448),
    "proxylessnas": Architecture("proxylessnas", 16, _parse(_PROXYLESSNAS), 384),
}


def operations(architecture: Architecture, feature_mix: bool = False) -> tuple[Operation, ...]:
    """The operations of a network, each block's marked with its number; stem, feature mix and pool
    carry no mark.

    feature_mix: append the architecture's feature mix (MCUNet has none, and stays as it is).
    """
    graph: list[Operation] = []

    def convolution(
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
        activation: str = "relu6",
        block: int | None = None,
    ) -> None:
        graph.append(
            Operation(
                kind="conv",
                inputs=(len(graph),),
                activation=activation,
                in_channels=in_channels,
                out_channels=out_channels,
                kernel=kernel,
                stride=stride,
                padding=(kernel - 1) // 2,
                groups=in_channels if depthwise else 1,
                block=block,
            )
        )

    convolution(3, architecture.stem_channels, kernel=3, stride=2)
    for number, block in enumerate(architecture.blocks):
        entry = len(graph)
        expanded = block.expanded_channels
        if expanded != block.in_channels:
            convolution(block.in_channels, expanded, block=number)
        convolution(expanded, expanded, block.kernel, block.stride, depthwise=True, block=number)
        convolution(expanded, block.out_channels, activation="none", block=number)
        if block.residual:
            graph.append(Operation(kind="add", inputs=(entry, len(graph)), block=number))
    if feature_mix and architecture.feature_mix is not None:
        convolution(architecture.blocks[-1].out_channels, architecture.feature_mix)
    graph.append(Operation(kind="global_average_pool", inputs=(len(graph),)))
    return tuple(graph)


def random_weights(
    graph: tuple[Operation, ...], rng: np.random.Generator
) -> tuple[NDArray[np.float32], ...]:
    """He initialisation: variance 2 / fan-in after a ReLU or ReLU6, 1 / fan-in elsewhere."""
    weights = []
    for operation in graph:
        if operation.kind != "conv":
            continue
        source = operation.inputs[0]
        rectified = source > 0 and graph[source - 1].activation != "none"
        shape = operation.weight_shape
        fan_in = shape[1] * shape[2] * shape[3]
        deviation = np.sqrt((2.0 if rectified else 1.0) / fan_in)
        weights.append((rng.standard_normal(shape) * deviation).astype(np.float32))
    return tuple(weights)


def random_network(
    architecture: Architecture, rng: np.random.Generator, feature_mix: bool = False
) -> Network:
    """An untrained network with He-initialised weights, zero biases: for costs, speed, tests."""
    graph = operations(architecture, feature_mix)
    weights = random_weights(graph, rng)
    biases = tuple(np.zeros(len(weight), np.float32) for weight in weights)
    return Network(name=architecture.name, operations=graph, weights=weights, biases=biases)


def architecture_of(graph: tuple[Operation, ...]) -> Architecture | None:
    """The architecture whose operations these are, with or without its feature mix, if any."""
    for architecture in ARCHITECTURES.values():
        if graph in (operations(architecture), operations(architecture, feature_mix=True)):
            return architecture
    return None
