"""What training a channel promises for photos that it is not trained on: a criterion beside Eq. 2.

Fisher information says how much a channel matters to the support photos' own loss; with a handful
of photos every channel does. A step along the gradients of all photos but one, though, lowers that
one's loss only as far as their gradients agree. To first order, and summed over photos,

    A = sum over i != j of g_i . g_j = |sum_i g_i|^2 - sum_i |g_i|^2

for the gradients g_i of one channel's weights by photo i: about zero where the gradients are noise,
however large. Adam moves every weight by about the same step, along which a gradient of length |g|
over P weights promises about |g| sqrt(P); so the gain of a channel is sqrt(P max(A, 0)) / N.

Photos pass one at a time; sums are kept for as many layers at once as the memory carries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cost import Profile, profile
from .errors import BudgetExceeded
from .fisher import FisherPass
from .images import draw_augmentation
from .network import Network
from .selection import Budget, UpdatePolicy

__all__ = ["held_out_gain", "reachable_layers"]


def reachable_layers(costs: Profile, budget: Budget) -> tuple[int, ...]:
    """Convolutions worth asking: pointwise or dense with a rectifier, within the compute budget.

    In inverted residuals these are the expansions. Depthwise convolutions promise next to nothing
    a byte, and linear projections more than they keep (docs/results.md). Where no such one is
    within the budget, the last convolution that is; where none is at all, the network's last.
    """
    within = [
        row.layer
        for row in costs.layers
        if costs.compute_share(UpdatePolicy({row.layer: (0,)})) <= budget.compute
    ]
    rectified = [
        layer
        for layer in within
        if costs.layers[layer].kind != "depthwise" and costs.layers[layer].activation != "none"
    ]
    return tuple(rectified or within[-1:] or (len(costs.layers) - 1,))


def held_out_gain(
    network: Network,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    rng: np.random.Generator,
    layers: Iterable[int],
    threads: int = 1,
    memory_bytes: int | None = None,
    frozen_weights: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> FisherPass:
    """The gain of training each output channel of `layers`: {layer: (O,)} and what it took.

    images: (N, H, W, 3) uint8, the support set; labels: (N,) int64 in 0..ways-1, every class at
    least once; rng: for one augmented view of each photo; memory_bytes: hard limit, of the arena
    and of the sums beside it: the tighter, the more passes; progress: called with (passes done,
    passes).
    Raises BudgetExceeded naming the smallest limit that would do.
    """
    from .session import Session  # here, so that importing the package does not load the engine

    ways = int(labels.max()) + 1
    costs = profile(network)
    layers = sorted(layers)
    options: dict[str, Any] = {
        "optimizer": "sgd",
        "max_ways": ways,
        "frozen_weights": frozen_weights,
    }
    augmentation = draw_augmentation(len(images), network.input_size, rng)
    gains = {layer: np.zeros(costs.layers[layer].out_channels) for layer in layers}
    plans, high_water = [], 0
    parts = _parts(network, costs, layers, memory_bytes, options)
    report = progress or (lambda done, total: None)
    for number, policy in enumerate(parts):
        report(number, len(parts))
        room = None if memory_bytes is None else memory_bytes - _sum_bytes(costs, policy)
        session = Session(network, policy, memory_bytes=room, threads=threads, **options)
        session.set_prototypes(images, labels, ways)
        sizes = np.concatenate(  # weights of each channel, in the gradient's order
            [
                np.full(len(update.channels), _channel_size(costs, layer))
                for layer, update in policy.layers.items()
            ]
        )
        starts = np.cumsum(sizes) - sizes
        total = np.zeros(int(sizes.sum()), np.float32)
        squares = np.zeros(len(sizes))
        for n in range(len(images)):
            session.proto_backward(
                images[n : n + 1],
                labels[n : n + 1],
                augmentation[n : n + 1],
                scale=network.logit_scale,
            )
            gradient = session.flat_gradient()
            session.zero_grad()
            total += gradient
            squares += np.add.reduceat(np.square(gradient, out=gradient), starts)
        agreement = np.add.reduceat(np.square(total, out=total), starts) - squares
        gain = np.sqrt(sizes * np.maximum(agreement, 0)) / len(images)
        ends = np.cumsum([len(update.channels) for update in policy.layers.values()])
        for (layer, update), values in zip(
            policy.layers.items(), np.split(gain, ends[:-1]), strict=True
        ):
            gains[layer][list(update.channels)] = values
        plans.append(session.plan)
        high_water = max(high_water, session.arena_high_water())
    report(len(parts), len(parts))
    return FisherPass(gains, max(plans, key=lambda of: of.peak_bytes), high_water)


def _parts(
    network: Network,
    costs: Profile,
    layers: Sequence[int],
    memory_bytes: int | None,
    options: dict[str, Any],
) -> list[UpdatePolicy]:
    """All channels of `layers` (ascending), in parts whose gradients and sums fit; late first."""
    from .session import peak_bytes_within

    def needed(policy: UpdatePolicy, limit: int) -> int:
        """Bytes of arena and sums: of a plan within the limit, or of the smallest there is."""
        sums = _sum_bytes(costs, policy)
        return peak_bytes_within(max(1, limit - sums), network, policy, **options) + sums

    def fits(policy: UpdatePolicy) -> bool:
        return memory_bytes is None or needed(policy, memory_bytes) <= memory_bytes

    parts: list[UpdatePolicy] = []
    waiting = [(layer, range(costs.layers[layer].out_channels)) for layer in layers]
    while waiting:
        layer, channels = waiting.pop()
        alone = UpdatePolicy({layer: channels})
        if parts:
            joined = UpdatePolicy({**parts[-1].layers, layer: channels})
            apart = layer in parts[-1].layers
            if not apart and fits(joined):
                parts[-1] = joined
                continue
        if fits(alone):
            parts.append(alone)
        elif len(channels) > 1:
            half = len(channels) // 2
            waiting += [(layer, channels[:half]), (layer, channels[half:])]
        else:
            smallest = max(needed(UpdatePolicy({layer: (0,)}), 1) for layer in layers)
            raise BudgetExceeded(
                f"memory_bytes: expected at least {smallest} for the arena and the sums beside it, "
                f"got {memory_bytes}",
                needed_bytes=smallest,
            )
    return parts


def _channel_size(costs: Profile, layer: int) -> int:
    return costs.layers[layer].weights // costs.layers[layer].out_channels


def _sum_bytes(costs: Profile, policy: UpdatePolicy) -> int:
    """Beside the arena: two float32 copies of the gradients, five numbers for each channel."""
    return sum(
        (8 * _channel_size(costs, layer) + 40) * len(update.channels)
        for layer, update in policy.layers.items()
    )
