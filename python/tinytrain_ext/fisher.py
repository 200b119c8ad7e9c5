"""Fisher information of the activations (Eq. 2): how much each output channel matters to a task.

    Delta_o = 1 / (2 N) * sum over images of (sum over H, W of a * g) ** 2

a is a convolution's output with batch normalisation folded in, before its ReLU6; g the gradient
of the loss with respect to it. The loss is the ProtoNet cross-entropy, summed over the images, of
one augmentation draw of the support set (the pseudo-query set) with its true labels against the
prototypes of the un-augmented support set, which are constants to the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .cost import inspected_layers
from .images import draw_augmentation
from .network import Network

if TYPE_CHECKING:
    from .session import Plan

__all__ = ["FisherPass", "fisher_information", "fisher_pass"]


@dataclass(frozen=True, eq=False)
class FisherPass:
    """Fisher information and what it took.

    information: {layer: (O,)} float64; plan: the engine's memory plan for it; arena_high_water:
    bytes of it really touched.
    """

    information: dict[int, NDArray[np.float64]]
    plan: Plan
    arena_high_water: int


def fisher_information(
    network: Network,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    rng: np.random.Generator | int = 0,
    layers: Iterable[int] | None = None,
    threads: int = 1,
    memory_bytes: int | None = None,
) -> dict[int, NDArray[np.float64]]:
    """Eq. 2 for each of `layers` (`inspected_layers` by default): {layer: (O,)}.

    images: (N, H, W, 3) uint8; labels: (N,) int64 in 0..ways-1, every class at least once;
    rng: a generator, or the seed of one, for the augmentation; memory_bytes: hard limit.
    Raises BudgetExceeded naming the smallest limit that would do.
    """
    return fisher_pass(
        network,
        images,
        labels,
        rng=np.random.default_rng(rng),
        layers=layers,
        threads=threads,
        memory_bytes=memory_bytes,
    ).information


def fisher_pass(
    network: Network,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    rng: np.random.Generator,
    layers: Iterable[int] | None = None,
    threads: int = 1,
    memory_bytes: int | None = None,
    frozen_weights: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> FisherPass:
    """`fisher_information` with the plan and the memory it used; progress: of its one pass."""
    from .session import Session

    report = progress or (lambda done, total: None)
    report(0, 1)
    ways = int(labels.max()) + 1
    session = Session(
        network,
        fisher_layers=inspected_layers(network) if layers is None else tuple(layers),
        max_ways=ways,
        threads=threads,
        memory_bytes=memory_bytes,
        frozen_weights=frozen_weights,
    )
    session.set_prototypes(images, labels, ways)
    augmentation = draw_augmentation(len(images), network.input_size, rng)
    session.proto_backward(images, labels, augmentation, scale=network.logit_scale, loss_weight=1.0)
    sums = session.fisher()
    report(1, 1)
    return FisherPass(
        information={
            layer: sums[layer].astype(np.float64) / (2 * len(images)) for layer in sorted(sums)
        },
        plan=session.plan,
        arena_high_water=session.arena_high_water(),
    )
