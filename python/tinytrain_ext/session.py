"""The engine under `adapt`: a plan of every byte, and one image at a time through it.

Everything is planned and allocated when a Session is made; afterwards each call crosses into the
native core once per pass. Results are the same bits for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _core
from .errors import BudgetExceeded
from .images import Augmentation
from .network import Network
from .selection import UpdatePolicy

__all__ = [
    "FROZEN_WEIGHTS",
    "OPTIMIZERS",
    "Plan",
    "PlanSlot",
    "Prefix",
    "Session",
    "peak_bytes_within",
    "plan",
]

OPTIMIZERS = ("adam", "sgd", "momentum", "in_place_sgd")
FROZEN_WEIGHTS = ("float32", "int8")
_MOMENTUM = 0.9
_MAX_WAYS = 50


class PlanSlot(NamedTuple):
    """One buffer of the arena; slots of a program whose steps do not overlap may share bytes.

    program: "shared" (lives as long as the session), "embed" or "train". first, last: the steps of
    its program between which it is alive. offset, bytes: where it lies in the arena (first thread).
    """

    program: str
    name: str
    kind: str
    offset: int
    bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Every byte of training memory, known before anything runs.

    peak_bytes: size of the arena, all threads together. Beside it, not in it:
    resident_weight_bytes (weights as the kernels read them; 0 in a plan made without weights).
    threads, keep_images: what the limit carries. recompute: the Fisher pass goes block by block,
    computing activations again instead of keeping them. saved_bytes: what one image's forward
    pass leaves to its backward pass (saved inputs and ReLU bits), all of it within the arena.
    """

    slots: tuple[PlanSlot, ...]
    peak_bytes: int
    shared_bytes: int
    workspace_bytes: int
    threads: int
    keep_images: int
    recompute: bool
    first_tail_operation: int
    saved_bytes: int
    resident_weight_bytes: int = 0

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of each kind at the busiest step of the larger program, plus "alignment and gaps".

        Sums to peak_bytes: the shared slots, and threads times what is alive at that step.
        """
        totals: dict[str, int] = {}
        for slot in self.slots:
            if slot.program == "shared":
                totals[slot.kind] = totals.get(slot.kind, 0) + slot.bytes
        busiest: list[PlanSlot] = []
        for program in ("embed", "train"):
            slots = [s for s in self.slots if s.program == program]
            for step in {s.first for s in slots}:
                alive = [s for s in slots if s.first <= step <= s.last]
                if sum(s.bytes for s in alive) > sum(s.bytes for s in busiest):
                    busiest = alive
        for slot in busiest:
            totals[slot.kind] = totals.get(slot.kind, 0) + slot.bytes * self.threads
        totals["alignment and gaps"] = self.peak_bytes - sum(totals.values())
        return totals

    def table(self) -> str:
        """The plan for people: bytes by kind, the peak, and every slot in order of size."""
        lines = [f"{'kind':<28}{'bytes':>12}"]
        lines += [f"{kind:<28}{size:>12,}" for kind, size in self.bytes_by_kind().items()]
        lines += [f"{'peak of the arena':<28}{self.peak_bytes:>12,}", ""]
        lines += [f"{'program':<9}{'slot':<44}{'bytes':>12}{'offset':>12}  steps"]
        for slot in sorted(self.slots, key=lambda s: -s.bytes):
            steps = "all" if slot.program == "shared" else f"{slot.first}-{slot.last}"
            lines.append(
                f"{slot.program:<9}{slot.name:<44}{slot.bytes:>12,}{slot.offset:>12,}  {steps}"
            )
        return "\n".join(lines)


def _operations(network: Network) -> list[tuple[str, list[int], str, int, int, int, int, bool]]:
    return [
        (
            op.kind,
            list(op.inputs),
            op.activation,
            op.out_channels,
            op.kernel,
            op.stride,
            op.padding,
            op.kind == "conv" and op.groups > 1,
        )
        for op in network.operations
    ]


def _updates(policy: UpdatePolicy) -> list[tuple[int, str, list[int], bool]]:
    """The policy in the core's order: weights by layer, then biases by layer."""
    weights = [
        (layer, update.axis, list(update.channels), False)
        for layer, update in sorted(policy.layers.items())
    ]
    return weights + [(layer, "out", [], True) for layer in sorted(policy.biases)]


def _plan_of(described: dict[str, Any], resident_weight_bytes: int = 0) -> Plan:
    return Plan(
        slots=tuple(PlanSlot(*slot) for slot in described["slots"]),
        resident_weight_bytes=resident_weight_bytes,
        **{
            name: described[name]
            for name in (
                "peak_bytes",
                "shared_bytes",
                "workspace_bytes",
                "threads",
                "keep_images",
                "recompute",
                "first_tail_operation",
                "saved_bytes",
            )
        },
    )


def _request(
    network: Network,
    policy: UpdatePolicy,
    *,
    fisher_layers: Iterable[int],
    optimizer: str,
    max_ways: int,
    keep_images: int,
    threads: int,
    memory_bytes: int | None,
    frozen_weights: str,
    guard_bytes: int = 0,
) -> _core._Request:
    """What the core plans: the network's graph, what to compute, and the limits."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    if memory_bytes is not None and memory_bytes < 1:
        raise ValueError(f"memory_bytes: expected a positive number or None, got {memory_bytes}")
    return {
        "image_size": network.input_size,
        "operations": _operations(network),
        "updates": _updates(policy),
        "fisher_layers": list(fisher_layers),
        "optimizer": optimizer,
        "max_ways": max_ways,
        "keep_images": keep_images,
        "threads": threads,
        "memory_bytes": memory_bytes or 0,
        "guard_bytes": guard_bytes,
        "frozen_weights": frozen_weights,
    }


def plan(
    network: Network,
    policy: UpdatePolicy | None = None,
    *,
    fisher_layers: Iterable[int] = (),
    optimizer: str = "adam",
    max_ways: int = _MAX_WAYS,
    keep_images: int = 0,
    threads: int = 1,
    memory_bytes: int | None = None,
    frozen_weights: str = "float32",
) -> Plan:
    """The plan a Session with these arguments would have, without making one.

    Raises BudgetExceeded (with `needed_bytes`) if no plan fits memory_bytes, ValueError for a
    policy that does not fit the network.
    """
    return _plan_of(
        _core.plan(
            _request(
                network,
                policy or UpdatePolicy({}),
                fisher_layers=fisher_layers,
                optimizer=optimizer,
                max_ways=max_ways,
                keep_images=keep_images,
                threads=threads,
                memory_bytes=memory_bytes,
                frozen_weights=frozen_weights,
            )
        )
    )


def peak_bytes_within(
    memory_bytes: int, network: Network, policy: UpdatePolicy, **options: Any
) -> int:
    """Peak of the `plan` within memory_bytes; of the smallest one, where none fits."""
    try:
        return plan(network, policy, memory_bytes=memory_bytes, **options).peak_bytes
    except BudgetExceeded as error:
        if error.needed_bytes is None:
            raise
        return error.needed_bytes


@dataclass(frozen=True, eq=False)
class Prefix:
    """What a session's frozen prefix made of N images (`Session.prefix`): serves in their place.

    values: (N, H, W, C) of the session's dtype, C-contiguous; may be a part of a memory map.
    """

    values: NDArray[Any]

    def __len__(self) -> int:
        return len(self.values)


class Session:
    """A network, what to update and inspect, and the memory to do it in.

    network: the Network; its weights are copied. policy: what `backward` computes gradients of and
    `step` updates. fisher_layers: layers whose Fisher sums (Eq. 2) the backward pass collects.
    optimizer: "adam" (0.9, 0.999), "sgd", "momentum" (0.9), or "in_place_sgd": no gradient is kept
    at all, `backward` and `proto_backward` take a step of in_place_rate after each image (in an
    order that spreads the classes), layer by layer as its gradient is known, on one thread; there
    is nothing for `step` to do.
    max_ways: classes there is room for. keep_images: images whose frozen-prefix output to keep
    between `update_prototypes` calls, if memory_bytes carries it. threads: workers; fewer where
    memory_bytes does not carry them. memory_bytes: hard limit of the arena in bytes.
    frozen_weights: "float32", or "int8" to keep all weights that are not trained (depthwise ones
    apart) as bytes with a scale for each output channel, expanded a panel at a time when they are
    used; exact for networks that were quantised this way before, such as imported ones, and rounded
    for others. dtype: "float32", or "float64" on the
    scalar instruction set (for comparisons to rounding error).

    Raises BudgetExceeded if no plan fits memory_bytes, naming the smallest that does.
    """

    def __init__(
        self,
        network: Network,
        policy: UpdatePolicy | None = None,
        *,
        fisher_layers: Iterable[int] = (),
        optimizer: str = "adam",
        max_ways: int = _MAX_WAYS,
        keep_images: int = 0,
        threads: int = 1,
        memory_bytes: int | None = None,
        frozen_weights: str = "float32",
        in_place_rate: float | None = None,
        dtype: str = "float32",
        isa: str = "",
        guard_bytes: int = 0,
    ) -> None:
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype: expected 'float32' or 'float64', got {dtype!r}")
        if (optimizer == "in_place_sgd") != (in_place_rate is not None):
            raise ValueError("in_place_rate: expected with optimizer 'in_place_sgd', and only then")
        self._network = network
        self._policy = policy or UpdatePolicy({})
        self._quantised = frozen_weights == "int8"
        self._fisher_layers = tuple(fisher_layers)
        self.dtype = np.dtype(dtype)
        core = _core.Session32 if dtype == "float32" else _core.Session64
        self._core = core(
            _request(
                network,
                self._policy,
                fisher_layers=self._fisher_layers,
                optimizer=optimizer,
                max_ways=max_ways,
                keep_images=keep_images,
                threads=threads,
                memory_bytes=memory_bytes,
                frozen_weights=frozen_weights,
                guard_bytes=guard_bytes,
            ),
            weights=network.weights,
            biases=network.biases,
            mean=network.mean,
            std=network.std,
            isa=isa,
        )
        if in_place_rate is not None:
            self._core.set_in_place_rate(_rate("in_place_rate", in_place_rate))
        self.optimizer = optimizer
        self.plan = _plan_of(self._core.plan(), self._core.resident_weight_bytes())
        self.isa: str = self._core.isa()

    @property
    def kept(self) -> bool:
        """Whether the frozen-prefix outputs of the support are kept (see set_prototypes)."""
        return bool(self._core.keeps_prefix())

    @property
    def prefix_shape(self) -> tuple[int, int, int] | None:
        """(H, W, C) of what the frozen prefix makes of an image; None if there is no prefix."""
        height, width, channels = self._core.prefix_shape()
        return (height, width, channels) if channels else None

    def prefix(
        self,
        images: NDArray[Any],
        augmentation: Augmentation | None = None,
        out: NDArray[Any] | None = None,
    ) -> Prefix:
        """The frozen prefix's outputs for images (N, H, W, 3), for passes that start behind it.

        They never change: nothing before the first layer with a gradient is trained. out: where to
        put them, (N, *prefix_shape) of the session's dtype, C-contiguous.
        Raises ValueError if there is no prefix (`prefix_shape` is None).
        """
        shape = self.prefix_shape
        if shape is None:
            raise ValueError("prefix: gradients reach the first block, nothing comes before them")
        if out is None:
            out = np.empty((len(images), *shape), self.dtype)
        self._core.prefix(_images(images)[0], _augmentation(augmentation), out)
        return Prefix(out)

    def embed(
        self, images: NDArray[Any] | Prefix, augmentation: Augmentation | None = None
    ) -> NDArray[Any]:
        """Features (N, m) of images (N, H, W, 3): uint8, or float32 already normalised."""
        return np.asarray(self._core.embed(*_images(images), _augmentation(augmentation)))

    def set_prototypes(
        self,
        images: NDArray[Any] | Prefix,
        labels: NDArray[np.int64],
        ways: int,
        keep: bool = False,
    ) -> None:
        """Class prototypes from support images (N, H, W, 3) and labels (N,) in [0, ways).

        keep: hold the images' frozen-prefix outputs for update_prototypes, if the plan has room
        for N (`plan.keep_images`); `kept` tells.
        """
        labels = _labels(labels)
        missing = np.setdiff1d(np.arange(min(ways, len(labels) + 1)), labels)
        if missing.size:
            raise ValueError(f"labels: class {missing[0]} of {ways} has no image")
        self._core.set_prototypes(*_images(images), labels, ways, keep)

    def update_prototypes(self) -> None:
        """The same support's prototypes under the present weights, from the kept prefix outputs."""
        self._core.update_prototypes()

    def kept_features(self) -> NDArray[Any]:
        """Features (N, m) of that support under the present weights, from the same."""
        return np.asarray(self._core.kept_features())

    def prototypes(self) -> NDArray[Any]:
        """(ways, m): direction of each class's mean feature (unit length)."""
        return np.asarray(self._core.prototypes())

    def proto_backward(
        self,
        images: NDArray[Any] | Prefix,
        labels: NDArray[np.int64],
        augmentation: Augmentation | None = None,
        scale: float = 10.0,
        loss_weight: float | None = None,
    ) -> tuple[float, int]:
        """ProtoNet cross-entropy (Eq. 1) of images against the prototypes, and its gradient.

        Each image passes once, forward and backward; `loss_weight` (default 1 / N: the mean)
        times its gradient adds to the compact gradients, its squared sums to the Fisher sums.
        Returns (sum of losses, number of images nearest to their own prototype).
        Raises NonFiniteError if a loss is not finite; gradients are cleared then. With
        'in_place_sgd' also if a gradient is not; updates stop before it, weights stay finite.
        """
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale: expected a positive number, got {scale}")
        if loss_weight is not None and not math.isfinite(loss_weight):
            raise ValueError(f"loss_weight: expected a finite number, got {loss_weight}")
        if len(images) == 0:
            raise ValueError("images: expected at least one")
        weight = 1 / len(images) if loss_weight is None else loss_weight
        loss, correct = self._core.proto_backward(
            *_images(images), _labels(labels), _augmentation(augmentation), scale, weight
        )
        return float(loss), int(correct)

    def backward(
        self,
        images: NDArray[Any] | Prefix,
        grad_features: NDArray[Any],
        augmentation: Augmentation | None = None,
    ) -> None:
        """Back-propagates a gradient (N, m) of the images' features; adds into the gradients.

        grad_features is C-contiguous, of the session's dtype.
        """
        _check_gradient(grad_features, self.dtype)
        self._core.backward(*_images(images), grad_features, _augmentation(augmentation))

    def forward(self, images: NDArray[Any] | Prefix) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """The first half of `backward`, for a loss between the two: features (N, m), and what each
        image leaves to `backward_saved`, (N, plan.saved_bytes) bytes.

        Raises ValueError where the session updates nothing and inspects nothing.
        """
        features, saved = self._core.forward(*_images(images))
        return np.asarray(features), np.asarray(saved)

    def backward_saved(
        self,
        saved: NDArray[np.uint8],
        grad_features: NDArray[Any],
        images: NDArray[Any] | None = None,
    ) -> None:
        """The second half: adds into the gradients what `saved` (N, plan.saved_bytes) of `forward`
        and the gradient (N, m) of the features give. The weights must be those of the forward.

        images: the same as in `forward`; needed where the plan has no frozen prefix
        (`plan.first_tail_operation` is 0). Raises ValueError where they are and are not given.
        """
        _check_gradient(grad_features, self.dtype)
        self._core.backward_saved(
            None if images is None else _images(images)[0], saved, grad_features
        )

    def set_selected(self, values: NDArray[Any]) -> None:
        """Overwrites every weight and bias that the policy selects, in the order and the shapes of
        `flat_gradient`: values (P,), C-contiguous, of the session's dtype.

        Raises NonFiniteError, leaving all as they are, for a value that is not finite.
        """
        self._core.set_selected(values)

    def flat_gradient(self) -> NDArray[Any]:
        """All gradients in one array (P,): `gradients`, then `bias_gradients`, each raveled."""
        return np.asarray(self._core.flat_gradient())

    def gradients(self) -> dict[int, NDArray[Any]]:
        """{layer: gradient}: (S, C/groups, k, k) for axis "out", (O, S, k, k) for axis "in"."""
        layers = sorted(self._policy.layers)
        return {layer: np.asarray(self._core.gradient(i)) for i, layer in enumerate(layers)}

    def bias_gradients(self) -> dict[int, NDArray[Any]]:
        """{layer: (O,)} of the layers whose bias is updated."""
        first = len(self._policy.layers)
        biases = sorted(self._policy.biases)
        return {layer: np.asarray(self._core.gradient(first + i)) for i, layer in enumerate(biases)}

    def fisher(self) -> dict[int, NDArray[Any]]:
        """{layer: (O,)}: sum over images of (sum over H, W of a * g)^2; Eq. 2 without its / 2N."""
        return dict(zip(self._fisher_layers, map(np.asarray, self._core.fisher()), strict=True))

    def zero_grad(self) -> None:
        """Clears gradients and Fisher sums."""
        self._core.zero_grad()

    def step(self, learning_rate: float) -> None:
        """One step of the optimiser on the selected weights.

        Raises NonFiniteError, leaving every weight as it is, if a gradient or a new weight is not
        finite; ValueError for a learning rate that is not a positive number.
        """
        if self.optimizer == "in_place_sgd":
            raise ValueError("step: the passes of 'in_place_sgd' take their steps themselves")
        self._core.step(_rate("learning_rate", learning_rate), _MOMENTUM)

    def network(self) -> Network:
        """The network with its updated weights; all weights as they were used, if quantised."""
        weights, biases = list(self._network.weights), list(self._network.biases)
        changed = {*self._policy.layers, *self._policy.biases}
        for layer in range(len(weights)) if self._quantised else changed:
            weight, bias = self._core.layer(layer)
            weights[layer] = np.asarray(weight, np.float32)
            biases[layer] = np.asarray(bias, np.float32)
        return self._network.replace(weights=tuple(weights), biases=tuple(biases))

    def layer(self, number: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """One layer's weight (O, C/groups, k, k) and bias (O,) in the session's own precision."""
        weight, bias = self._core.layer(number)
        return np.asarray(weight), np.asarray(bias)

    def arena_high_water(self) -> int:
        """Measured: one past the highest byte of the arena that was ever written."""
        return int(self._core.arena_high_water())

    def broken_guard(self) -> str:
        """Name of a slot whose guard bytes were overwritten, "" if none (needs guard_bytes)."""
        return str(self._core.broken_guard())


def _rate(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a positive number, got {value}")
    return value


def _images(images: NDArray[Any] | Prefix) -> tuple[NDArray[Any], bool]:
    """What the core reads, and whether the frozen prefix has seen it already."""
    if isinstance(images, Prefix):
        return images.values, True
    if not isinstance(images, np.ndarray) or images.dtype not in (np.uint8, np.float32):
        got = getattr(images, "dtype", type(images).__name__)
        raise TypeError(f"images: expected a uint8 or float32 array, got {got}")
    if not images.flags.c_contiguous:
        raise TypeError("images: expected a C-contiguous array; use numpy.ascontiguousarray")
    return images, False


def _check_gradient(grad_features: NDArray[Any], dtype: np.dtype[Any]) -> None:
    if grad_features.dtype != dtype:
        raise TypeError(f"grad_features: expected {dtype}, got {grad_features.dtype}")
    if not grad_features.flags.c_contiguous:
        raise TypeError("grad_features: expected a C-contiguous array")


def _labels(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise TypeError(f"labels: expected (N,) integers, got {labels.dtype} {labels.shape}")
    return np.ascontiguousarray(labels, np.int64)


def _augmentation(augmentation: Augmentation | None) -> NDArray[np.float32] | None:
    return None if augmentation is None else augmentation.parameters
