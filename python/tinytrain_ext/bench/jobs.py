"""What is measured: the networks' layers, training steps on random images, and a whole adaptation.

Speed does not depend on weights, so the networks are those of the paper's cost tables ("zoo nets")
with random ones.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..adapt import adapt
from ..architectures import ARCHITECTURES, operations, random_network
from ..images import load_folder
from ..network import Network, tensor_shapes
from ..selection import UpdatePolicy
from ..session import Session

SCALE = 10.0
WAYS = 5
LEARNING_RATE = 1e-6
# (layer, 1 / ratio): expansions and the first depthwise convolution of the last blocks.
# MobileNetV2's is the policy the project's targets are stated for; the others reach about as far.
TT_POLICIES = {
    "mobilenetv2": ((36, 2), (37, 2), (39, 4), (42, 4), (45, 4), (48, 4)),
    "mcunet": ((30, 2), (31, 2), (33, 4), (36, 4), (39, 4)),
    "proxylessnas": ((48, 2), (49, 2), (51, 4), (54, 4), (57, 4)),
}


INPUT_SIZE = 128


@dataclass(frozen=True)
class LayerShape:
    """A convolution of a network; its kind is "pointwise", "depthwise" or "dense" (any other)."""

    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    depthwise: bool = False

    @property
    def kind(self) -> str:
        if self.depthwise:
            return "depthwise"
        pointwise = self.kernel == 1 and self.stride == 1 and self.padding == 0
        return "pointwise" if pointwise else "dense"

    @property
    def name(self) -> str:
        return (
            f"{self.kind}-{self.in_channels}to{self.out_channels}-{self.height}x{self.width}"
            f"-k{self.kernel}s{self.stride}p{self.padding}"
        )

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        fan_in = 1 if self.depthwise else self.in_channels
        return (self.out_channels, fan_in, self.kernel, self.kernel)

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of the output."""
        reach = 2 * self.padding - self.kernel
        return (self.height + reach) // self.stride + 1, (self.width + reach) // self.stride + 1

    @property
    def macs(self) -> int:
        height, width = self.output_size
        fan_in = self.kernel**2 * (1 if self.depthwise else self.in_channels)
        return height * width * self.out_channels * fan_in


def layer_shapes(name: str) -> tuple[LayerShape, ...]:
    """The different convolutions of a zoo net with its feature mix, in the order they run."""
    graph = operations(ARCHITECTURES[name], feature_mix=True)
    shapes = tensor_shapes(graph, INPUT_SIZE)
    found = [
        LayerShape(
            op.in_channels,
            op.out_channels,
            *shapes[op.inputs[0]][:2],
            op.kernel,
            op.stride,
            op.padding,
            op.depthwise,
        )
        for op in graph
        if op.kind == "conv"
    ]
    return tuple(dict.fromkeys(found))


class KernelJob:
    """The three passes of one convolution on one random image, output arrays made each time."""

    def __init__(self, shape: LayerShape, isa: str = "") -> None:
        rng = np.random.default_rng(0)
        self.shape = shape

        def draw(*size: int) -> NDArray[np.float32]:
            return rng.standard_normal(size, np.float32)

        self.weight = draw(*shape.weight_shape)
        self.image = draw(1, shape.height, shape.width, shape.in_channels)
        self.grad_output = draw(1, *shape.output_size, shape.out_channels)
        self.channels = list(range(shape.out_channels))
        self.convolution = _core.Convolution32(
            self.weight,
            np.zeros(shape.out_channels, np.float32),
            height=shape.height,
            width=shape.width,
            stride=shape.stride,
            padding=shape.padding,
            depthwise=shape.depthwise,
            activation="none",
            isa=isa,
        )

    def forward(self) -> NDArray[np.float32]:
        return self.convolution.forward(self.image)[0]

    def grad_input(self) -> NDArray[np.float32]:
        return self.convolution.grad_input(self.grad_output)[0]

    def grad_weight(self) -> NDArray[np.float32]:
        return self.convolution.grad_weight(self.grad_output, self.image, self.channels, "out")


def zoo_network(name: str) -> Network:
    """The network the paper's cost tables count, with random weights."""
    rng = np.random.default_rng(0)
    return random_network(ARCHITECTURES[name], rng, feature_mix=name != "mcunet")


def tt_policy(name: str, network: Network) -> UpdatePolicy:
    """The fixed policy: a random choice of output channels, always the same."""
    rng = np.random.default_rng(1)
    channels = {
        layer: sorted(
            rng.choice(
                len(network.biases[layer]), len(network.biases[layer]) // part, replace=False
            )
        )
        for layer, part in TT_POLICIES[name]
    }
    return UpdatePolicy({layer: tuple(map(int, chosen)) for layer, chosen in channels.items()})


class Task:
    """A batch of random images with labels, and the prototypes of a random support set."""

    def __init__(self, network: Network, batch: int, seed: int = 0, ways: int = WAYS) -> None:
        rng = np.random.default_rng([batch, seed])
        shape = (network.input_size, network.input_size, 3)
        self.images: NDArray[np.uint8] = rng.integers(0, 256, (batch, *shape), dtype=np.uint8)
        # In order, so that any batch is a support set, too (iterations make prototypes of it).
        self.labels: NDArray[np.int64] = np.arange(batch) % ways
        self.ways = min(batch, ways)
        self.support: NDArray[np.uint8] = rng.integers(0, 256, (ways, *shape), dtype=np.uint8)
        session = Session(network, max_ways=ways)
        session.set_prototypes(self.support, np.arange(ways), ways)
        self.prototypes = session.prototypes()


class OurJob:
    """The same job in the engine."""

    def __init__(self, network: Network, policy: UpdatePolicy, task: Task, **options: Any) -> None:
        self.task = task
        ways = len(task.support)
        self.session = Session(network, policy, optimizer="sgd", max_ways=ways, **options)
        self.session.set_prototypes(task.support, np.arange(ways), ways)

    def forward(self) -> NDArray[np.float32]:
        return self.session.embed(self.task.images)

    def gradients(self) -> None:
        self.session.zero_grad()
        self.session.proto_backward(self.task.images, self.task.labels, scale=SCALE)

    def step(self) -> None:
        self.gradients()
        self.session.step(LEARNING_RATE)

    def iteration(self) -> None:
        """A step, then the prototypes of a support set as large as the batch, prefix computed."""
        self.step()
        self.session.set_prototypes(self.task.images, self.task.labels, self.task.ways)

    def kept_iteration(self) -> None:
        """The same with the support's frozen prefix kept."""
        self.step()
        self.session.update_prototypes()


def fma_gflops(isa: str) -> float:
    """The machine's measured peak with this instruction set, GFLOP/s."""
    rounds, best, kept = 1000, 0.0, 0
    while kept < 5:
        start = time.thread_time()
        count = _core.fma_peak(isa, rounds)
        seconds = time.thread_time() - start
        if seconds < 0.005:  # too short to be measured
            rounds *= 4
            continue
        best, kept = max(best, 2 * count / seconds / 1e9), kept + 1
    return best


@dataclass(frozen=True)
class AdaptTimes:
    """Seconds of a whole adaptation, as the paper's Table 5 divides it, and when it started.

    load: the network's file and the photos, decoded. fisher: prototypes, Fisher information and
    selection (Algorithm 1, lines 1 to 3). run: fine-tuning, and everything else that adapt does.
    """

    started: float
    load: float
    fisher: float
    run: float

    @property
    def total(self) -> float:
        return self.load + self.fisher + self.run


def adapt_once(network: Path, photos: Path, iterations: int, threads: int) -> AdaptTimes:
    """Algorithm 1 from files: defaults of `tinytrain adapt`. started is seconds since 1970."""
    started, start = time.time(), time.perf_counter()
    loaded = Network.load(network)
    support = load_folder(photos, resize=loaded.resize, input_size=loaded.input_size)
    load = time.perf_counter() - start
    result = adapt(
        loaded,
        support.images,
        support.labels,
        classes=support.classes,
        iterations=iterations,
        threads=threads,
    )
    whole = time.perf_counter() - start
    fisher = sum(result.timings[phase] for phase in ("embed", "fisher", "selection"))
    return AdaptTimes(started, load, fisher, whole - load - fisher)
