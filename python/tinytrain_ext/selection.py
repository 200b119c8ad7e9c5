"""Which layers and channels to train: Eq. 3, its budgeted greedy selection, and the fixed policies.

A method is an UpdatePolicy: `UpdatePolicy()` trains nothing, `full_train`, `last_layer` and
`sparse_update` are the paper's baselines, `select` is TinyTrain.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .architectures import architecture_of
from .cost import Profile, words_per_weight
from .errors import BudgetExceeded
from .network import Network

__all__ = [
    "CRITERIA",
    "MAX_BYTES",
    "Budget",
    "LayerUpdate",
    "UpdatePolicy",
    "full_train",
    "last_layer",
    "score",
    "select",
    "sparse_update",
    "top_channels",
    "with_channels",
]

CRITERIA = ("tinytrain", "held_out")
MAX_BYTES = (1 << 63) - 1  # the core counts in 64 bits


@dataclass(frozen=True)
class LayerUpdate:
    """The channels of one convolution that are trained.

    axis: "out" for rows of the weight (output channels); "in" for columns (input channels), of
    dense and pointwise convolutions. channels: at least one; sorted and made unique here.
    """

    axis: str
    channels: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.axis not in ("out", "in"):
            raise ValueError(f"axis: expected 'out' or 'in', got {self.axis!r}")
        object.__setattr__(self, "channels", _sorted_indices("channels", self.channels))
        if not self.channels:
            raise ValueError("channels: expected at least one")


@dataclass(frozen=True, init=False)
class UpdatePolicy:
    """What is trained: {layer: LayerUpdate}, and the layers whose whole bias is trained.

    A plain sequence of channels stands for LayerUpdate("out", channels). Layers are convolution
    numbers, the stem 0. Compares by value; `layers` must not be changed.
    """

    layers: Mapping[int, LayerUpdate]
    biases: tuple[int, ...]

    def __init__(
        self,
        layers: Mapping[int, LayerUpdate | Iterable[int]] | None = None,
        biases: Iterable[int] = (),
    ) -> None:
        layers = layers or {}
        checked: dict[int, LayerUpdate] = {}
        for layer in _sorted_indices("layers", layers):
            update = layers[layer]
            try:
                if not isinstance(update, LayerUpdate):
                    update = LayerUpdate("out", tuple(update))
            except (ValueError, TypeError) as error:
                raise type(error)(f"layer {layer}: {error}") from None
            checked[layer] = update
        object.__setattr__(self, "layers", checked)
        object.__setattr__(self, "biases", _sorted_indices("biases", biases))

    def check(self, network: Network) -> None:
        """Raises ValueError when the policy names layers or channels `network` has not."""
        count = len(network.convolutions)
        for layer in (*self.layers, *self.biases):
            if layer >= count:
                raise ValueError(f"layer {layer}: expected 0 to {count - 1}")
        for layer, update in self.layers.items():
            operation = network.operations[network.convolutions[layer]]
            if update.axis == "in" and operation.groups > 1:
                raise ValueError(f"layer {layer}: a depthwise convolution has axis 'out' only")
            channels = operation.out_channels if update.axis == "out" else operation.in_channels
            if update.channels[-1] >= channels:
                raise ValueError(
                    f"layer {layer}: expected channels 0 to {channels - 1}, "
                    f"got {update.channels[-1]}"
                )

    def to_json(self) -> str:
        """The policy as a JSON object; `from_json` reads it back."""
        layers = [
            {"layer": layer, "axis": update.axis, "channels": list(update.channels)}
            for layer, update in self.layers.items()
        ]
        return json.dumps({"layers": layers, "biases": list(self.biases)})

    @classmethod
    def from_json(cls, text: str) -> UpdatePolicy:
        """Reads what `to_json` wrote. Raises ValueError for anything else."""
        try:
            values = json.loads(text)
            if set(values) != {"layers", "biases"}:
                raise ValueError(f"expected layers and biases, got {sorted(values)}")
            layers = {}
            for entry in values["layers"]:
                if set(entry) != {"layer", "axis", "channels"} or entry["layer"] in layers:
                    raise ValueError(f"expected layer, axis and channels once a layer, got {entry}")
                layers[entry["layer"]] = LayerUpdate(entry["axis"], tuple(entry["channels"]))
            return cls(layers, tuple(values["biases"]))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"update policy: {error}") from error


@dataclass(frozen=True)
class Budget:
    """What an adaptation may take.

    memory_bytes: of "planner" accounting, the peak of the engine's arena in every phase
    (activations, saved inputs, masks, gradients, optimiser state, scratch, features, prototypes);
    of "paper" accounting, the formula of Appendix A.4 (`Profile.memory_bytes`).
    compute: backward MACs as a share of FullTrain's.
    """

    memory_bytes: int = 1 << 20
    compute: float = 0.15
    accounting: str = "planner"

    def __post_init__(self) -> None:
        if isinstance(self.memory_bytes, bool) or not isinstance(self.memory_bytes, int):
            got = type(self.memory_bytes).__name__
            raise TypeError(f"memory_bytes: expected an integer, got {got}")
        if self.memory_bytes <= 0:
            raise ValueError(f"memory_bytes: expected a positive number, got {self.memory_bytes}")
        if self.memory_bytes > MAX_BYTES:
            raise ValueError(f"memory_bytes: expected at most {MAX_BYTES}, got {self.memory_bytes}")
        if not (math.isfinite(self.compute) and self.compute > 0):
            raise ValueError(f"compute: expected a positive share, got {self.compute}")
        if self.accounting not in ("planner", "paper"):
            raise ValueError(f"accounting: expected 'planner' or 'paper', got {self.accounting!r}")


def score(
    fisher: Mapping[int, ArrayLike],
    profile: Profile,
    per: Collection[str] = ("weights", "macs"),
) -> dict[int, float]:
    """Eq. 3: Fisher potential over normalised weights and MACs, for each layer of `fisher`.

    fisher: {layer: (O,)}, per output channel. Only ratios of scores mean anything: Fisher is
    divided by its largest value first, so the scores do not depend on its scale. per: what the
    potential is divided by, for ablations.
    Raises ValueError when an array is not (O,) or holds anything but non-negative numbers.
    """
    arrays = {layer: _checked_fisher(layer, fisher[layer], profile) for layer in sorted(fisher)}
    largest = max((float(array.max()) for array in arrays.values()), default=0.0) or 1.0
    most_weights = max(row.weights for row in profile.layers) if "weights" in per else 0
    most_macs = max(row.macs for row in profile.layers) if "macs" in per else 0
    return {
        layer: float((array / largest).sum())
        / (profile.layers[layer].weights / most_weights if most_weights else 1)
        / (profile.layers[layer].macs / most_macs if most_macs else 1)
        for layer, array in arrays.items()
    }


def select(
    fisher: Mapping[int, ArrayLike],
    profile: Profile,
    budget: Budget | None = None,
    ratio: float = 0.5,
    *,
    criterion: str = "tinytrain",
    per: Collection[str] = ("weights", "macs"),
    optimizer: str = "adam",
    biases: bool = False,
    max_ways: int = 50,
    threads: int = 1,
    frozen_weights: str = "float32",
    peak_bytes: Callable[[UpdatePolicy], int] | None = None,
) -> UpdatePolicy:
    """TinyTrain's dynamic layer and channel selection (Algorithm 1, line 4).

    criterion "tinytrain", as published: walks down the layers by score (Eq. 3; the lower layer
    first in a tie), takes every layer that still fits the budget with the
    max(1, floor(ratio * O)) output channels of largest Fisher information, and skips what does not
    fit. per: see `score`.
    criterion "held_out": `fisher` holds gains instead (`heldout.held_out_gain`). For every layer
    as the earliest one, takes the channels behind it by gain a weight, across layers and as many
    as the budget carries; of these choices the one of largest gain is it. `ratio` and `per` do not
    matter.
    biases: train the biases from the earliest selected layer on, too.

    peak_bytes: memory of a policy under "planner" accounting, in bytes; by default the peak of
    the engine's own plan for `optimizer`, `max_ways`, `threads` and `frozen_weights`.

    Raises BudgetExceeded, naming the smallest budget that would do, when not one layer fits.
    """
    budget = Budget() if budget is None else budget
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: expected {' or '.join(CRITERIA)}, got {criterion!r}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: expected above 0, up to 1, got {ratio}")
    words_per_weight(optimizer)  # refuses an unknown one
    scores = score(fisher, profile, per)
    if not scores:
        raise ValueError("fisher: expected at least one layer, got none")
    if budget.accounting == "paper":
        memory: Callable[[UpdatePolicy], int] = partial(profile.memory_bytes, optimizer=optimizer)
    elif peak_bytes is not None:
        memory = peak_bytes
    else:
        from .session import peak_bytes_within  # here: it loads the engine

        memory = partial(
            peak_bytes_within,
            budget.memory_bytes,
            profile.network,
            optimizer=optimizer,
            max_ways=max_ways,
            threads=threads,
            frozen_weights=frozen_weights,
        )

    def policy_of(layers: dict[int, LayerUpdate]) -> UpdatePolicy:
        trained = range(min(layers), len(profile.layers)) if biases else ()
        return UpdatePolicy(layers, tuple(trained))

    def fits(policy: UpdatePolicy) -> bool:
        # Compute first: a plan of the engine costs more than a sum.
        in_compute = profile.compute_share(policy) <= budget.compute
        return in_compute and memory(policy) <= budget.memory_bytes

    chosen, refused = (
        _walk(scores, fisher, ratio, policy_of, fits)
        if criterion == "tinytrain"
        else _fill(fisher, profile, policy_of, fits)
    )
    if not chosen:
        costs = [(memory(policy), profile.compute_share(policy)) for policy in refused]
        raise _exceeded(costs, budget)
    return policy_of(chosen)


_Layers = dict[int, LayerUpdate]


def _walk(
    scores: Mapping[int, float],
    fisher: Mapping[int, ArrayLike],
    ratio: float,
    policy_of: Callable[[_Layers], UpdatePolicy],
    fits: Callable[[UpdatePolicy], bool],
) -> tuple[_Layers, list[UpdatePolicy]]:
    """The published choice, and the policies that did not fit."""
    chosen: _Layers = {}
    refused: list[UpdatePolicy] = []
    for layer in sorted(scores, key=lambda layer: (-scores[layer], layer)):
        values = np.asarray(fisher[layer])
        channels = top_channels(values, max(1, math.floor(ratio * len(values))))
        policy = policy_of({**chosen, layer: LayerUpdate("out", channels)})
        if fits(policy):
            chosen[layer] = policy.layers[layer]
        else:
            refused.append(policy)
    return chosen, refused


def _fill(
    gains: Mapping[int, ArrayLike],
    profile: Profile,
    policy_of: Callable[[_Layers], UpdatePolicy],
    fits: Callable[[UpdatePolicy], bool],
) -> tuple[_Layers, list[UpdatePolicy]]:
    """The reach and the channels of largest gain, and single channels that did not fit."""
    of = {k: np.asarray(gains[k], np.float64) for k in sorted(gains)}
    layers = np.concatenate([np.full(len(gain), k) for k, gain in of.items()])
    channels = np.concatenate([np.arange(len(gain)) for gain in of.values()])
    values = np.concatenate(list(of.values()))
    sizes = np.array([profile.layers[k].weights / profile.layers[k].out_channels for k in layers])
    order = np.argsort(-values / sizes, kind="stable")  # lower layers and channels first in a tie

    def taken(indices: NDArray[np.int64]) -> _Layers:
        return {
            int(k): LayerUpdate("out", tuple(channels[indices[layers[indices] == k]].tolist()))
            for k in np.unique(layers[indices])
        }

    best: tuple[float, _Layers] = (-1.0, {})
    refused: list[UpdatePolicy] = []
    for first in reversed(of):
        # Its best channel is always in, or it would not be the reach; others where they promise.
        own = order[layers[order] == first][0]
        others = order[(layers[order] >= first) & (values[order] > 0) & (order != own)]
        behind = np.concatenate([[own], others])
        if values[behind].sum() <= best[0]:
            continue
        low, high = 0, len(behind) + 1  # as many fit, as many do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(policy_of(taken(behind[:middle]))) else (low, middle)
        if low == 0:
            refused.append(policy_of(taken(behind[:1])))
        elif values[behind[:low]].sum() > best[0]:
            best = float(values[behind[:low]].sum()), taken(behind[:low])
    return best[1], refused


def top_channels(values: NDArray[Any], count: int) -> tuple[int, ...]:
    """Indices of the `count` largest of `values` (O,), ascending; the lower index wins a tie."""
    order = np.argsort(-np.asarray(values, np.float64), kind="stable")
    return tuple(sorted(order[:count].tolist()))


def with_channels(
    policy: UpdatePolicy, network: Network, rule: str, rng: np.random.Generator
) -> UpdatePolicy:
    """The same layers with as many other channels each: static selection, as in Section 3.3.

    rule: "random"; "l2", those of largest L2 norm of their weights; or "fisher", as they are.
    Raises ValueError for another rule.
    """
    if rule not in ("fisher", "random", "l2"):
        raise ValueError(f"rule: expected 'fisher', 'random' or 'l2', got {rule!r}")
    if rule == "fisher":
        return policy
    layers = {}
    for layer, update in policy.layers.items():
        norms = _norms(network, layer, update.axis)
        values = norms if rule == "l2" else rng.random(len(norms))
        layers[layer] = LayerUpdate(update.axis, top_channels(values, len(update.channels)))
    return UpdatePolicy(layers, policy.biases)


def _norms(network: Network, layer: int, axis: str) -> NDArray[np.float64]:
    """L2 norms of a convolution's weights by channels along `axis`."""
    squares = np.square(network.weights[layer].astype(np.float64))
    norms: NDArray[np.float64] = np.sqrt(
        squares.sum(axis=(1, 2, 3) if axis == "out" else (0, 2, 3))
    )
    return norms


def full_train(network: Network) -> UpdatePolicy:
    """FullTrain: every convolution's weights and biases."""
    layers = range(len(network.convolutions))
    return UpdatePolicy(
        {layer: LayerUpdate("out", tuple(range(len(network.biases[layer])))) for layer in layers},
        tuple(layers),
    )


def last_layer(network: Network) -> UpdatePolicy:
    """LastLayer: the weights of the last convolution."""
    layer = len(network.convolutions) - 1
    return UpdatePolicy({layer: LayerUpdate("out", tuple(range(len(network.biases[layer]))))})


# Per architecture: {layer: ratio}, and how many of the last convolutions have their bias trained,
# as published with SparseUpdate (Lin et al., 2022), its 99 / 99 / 98 KB class.
_SPARSE_UPDATE: dict[str, tuple[dict[int, float], int]] = {
    "mcunet": ({21: 1, 24: 1, 27: 1, 30: 1, 36: 0.125, 39: 0.25}, 22),
    "mobilenetv2": ({27: 1, 30: 1, 33: 1, 36: 1, 39: 1, 42: 0.125, 45: 0.5, 48: 1}, 25),
    "proxylessnas": ({36: 1, 39: 0.5, 42: 1, 45: 1, 48: 0.25, 51: 0.5, 54: 1, 57: 1}, 25),
}


def sparse_update(network: Network, biases: bool = False) -> UpdatePolicy:
    """SparseUpdate's published static policy, for the paper's three architectures.

    The ratio runs along input channels (along the channel, for a depthwise convolution), and the
    channels of largest L2 weight norm are kept. biases: train the published biases, too; the
    published memory and MACs leave them out.
    Raises ValueError for any other network.
    """
    architecture = architecture_of(network.operations)
    if architecture is None:
        raise ValueError(f"network: no SparseUpdate policy is published for {network.name!r}")
    ratios, trained_biases = _SPARSE_UPDATE[architecture.name]
    layers = {}
    for layer, ratio in ratios.items():
        axis = "out" if network.operations[network.convolutions[layer]].depthwise else "in"
        norms = _norms(network, layer, axis)
        layers[layer] = LayerUpdate(axis, top_channels(norms, max(1, int(ratio * len(norms)))))
    # Published for the nets without a feature mix, whose last convolution closes the last block.
    marks = [network.operations[index].block for index in network.convolutions]
    count = max(layer for layer, mark in enumerate(marks) if mark is not None) + 1
    return UpdatePolicy(layers, tuple(range(count - trained_biases, count)) if biases else ())


def _exceeded(costs: list[tuple[int, float]], budget: Budget) -> BudgetExceeded:
    """The error for a budget no layer fits alone, from each layer's (memory, compute share)."""
    in_compute = [memory for memory, share in costs if share <= budget.compute]
    in_memory = [share for memory, share in costs if memory <= budget.memory_bytes]
    needed_bytes: int | None = None
    needed_compute: float | None = None
    if in_compute:
        needed_bytes = min(in_compute)
    elif in_memory:
        needed_compute = min(in_memory)
    else:
        needed_bytes, needed_compute = min(costs)
    needs = []
    if needed_bytes is not None:
        needs.append(f"memory_bytes of at least {needed_bytes}, got {budget.memory_bytes}")
    if needed_compute is not None:
        needs.append(f"compute of at least {needed_compute:.6g}, got {budget.compute}")
    return BudgetExceeded(
        f"budget ({budget.accounting} accounting): no layer fits; expected {' and '.join(needs)}",
        needed_bytes=needed_bytes,
        needed_compute=needed_compute,
    )


def _checked_fisher(layer: int, values: ArrayLike, profile: Profile) -> NDArray[np.float64]:
    if not 0 <= layer < len(profile.layers):
        raise ValueError(f"fisher: expected layers 0 to {len(profile.layers) - 1}, got {layer}")
    array = np.asarray(values, np.float64)
    shape = (profile.layers[layer].out_channels,)
    if array.shape != shape:
        raise ValueError(f"fisher[{layer}]: expected shape {shape}, got {array.shape}")
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError(f"fisher[{layer}]: expected finite numbers of at least 0")
    return array


def _sorted_indices(what: str, values: Iterable[Any]) -> tuple[int, ...]:
    indices = set()
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{what}: expected integers, got {type(value).__name__}")
        if value < 0:
            raise ValueError(f"{what}: expected numbers of at least 0, got {value}")
        indices.add(int(value))
    return tuple(sorted(indices))
