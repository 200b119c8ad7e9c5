"""TinyTrain's online stage (Algorithm 1): adapt a network to a few labelled photos."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .cost import Profile, inspected_layers, profile
from .errors import BudgetExceeded, NonFiniteError
from .fisher import FisherPass, fisher_pass
from .heldout import held_out_gain, reachable_layers
from .network import Network
from .protonet import leave_one_out, loss_and_gradients, probabilities, unknown_threshold
from .selection import CRITERIA, Budget, UpdatePolicy, select
from .views import PseudoQueries, Views

if TYPE_CHECKING:
    from .images import Augmentation
    from .session import Plan, Prefix, Session

__all__ = ["AdaptResult", "Classification", "Iteration", "adapt", "classify", "inspect"]

DEFAULT_LEARNING_RATE = {"adam": 1e-3, "momentum": 1e-2, "sgd": 1e-1, "in_place_sgd": 1e-1}
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Iteration:
    """One iteration of fine-tuning: mean loss and accuracy on its pseudo-query set."""

    loss: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Classification:
    """What a network says about N photos.

    labels: class names, or "unknown"; probabilities: (N,) of the best class; table: (N, ways),
    of every class in the order of `Network.classes`.
    """

    labels: tuple[str, ...]
    probabilities: NDArray[np.float64]
    table: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class AdaptResult:
    """An adapted network, and how it came about.

    network: with its classes, prototypes and `unknown_below`; policy: what was trained;
    fisher: what the selection asked of the support set (`inspect`: Fisher information, or gains of
    criterion "held_out"), None where the policy was given; plan: the memory plan of fine-tuning;
    arena_high_water: bytes of the engine's arena really touched, over all phases;
    cache_bytes: beside it, prefix outputs of a fixed set of views;
    timings: seconds for "fisher" (by either criterion), "selection", "embed" and "fine_tuning";
    history: one entry an iteration.
    """

    network: Network
    policy: UpdatePolicy
    fisher: FisherPass | None
    plan: Plan
    arena_high_water: int
    cache_bytes: int
    timings: dict[str, float]
    history: tuple[Iteration, ...]

    @property
    def peak_bytes(self) -> int:
        """Planned peak of the arena over all phases."""
        return max(self.plan.peak_bytes, self.fisher.plan.peak_bytes if self.fisher else 0)

    def classify(self, images: NDArray[Any], threads: int = 1) -> Classification:
        """`classify` with the adapted network."""
        return classify(self.network, images, threads=threads)


def adapt(
    network: Network,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    classes: Sequence[str] | None = None,
    budget: Budget | None = None,
    policy: UpdatePolicy | None = None,
    criterion: str = "tinytrain",
    ratio: float = 0.5,
    iterations: int = 40,
    optimizer: str = "adam",
    learning_rate: float | None = None,
    biases: bool = False,
    views: Views | None = None,
    prototype_gradient: bool = False,
    frozen_weights: str = "float32",
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> AdaptResult:
    """Adapts `network` to a support set within `budget` (Algorithm 1).

    images: (N, H, W, 3) uint8, the support set; labels: (N,) int64 in 0..ways-1, every class at
    least once; classes: names of the classes ("0", "1", ... by default).
    budget: Budget() by default; with a given `policy`, which replaces inspection and selection, no
    limit by default. criterion, ratio, biases: see `select`.
    optimizer: one of `session.OPTIMIZERS`; learning_rate: 1e-3 by default for "adam", 1e-2 for
    "momentum", 1e-1 for "sgd" and "in_place_sgd".
    views: a fixed set of pseudo-query views with a cache of what the frozen prefix makes of them;
    by default every iteration draws fresh ones, as in the paper.
    prototype_gradient: let the gradient reach the support photos through their prototypes, too, as
    PMF does, for about twice the work; not for "in_place_sgd".
    frozen_weights: "float32", or "int8" to keep what is not trained in a quarter of the bytes (see
    `Session`).
    progress: called with (phase, done, total). The result depends on seed, not on threads.

    Raises BudgetExceeded, naming the smallest budget that would do, before any training starts;
    NonFiniteError when training diverges; ValueError and TypeError for inputs not as above.
    `network` itself never changes, whatever is raised or interrupted.
    """
    from .session import Session  # here, so that importing the package does not load the engine

    names = _checked_task(network, images, labels, classes)
    count, ways = len(images), len(names)
    if iterations < 0:
        raise ValueError(f"iterations: expected at least 0, got {iterations}")
    if learning_rate is None:
        learning_rate = default_learning_rate(optimizer)
    in_place = optimizer == "in_place_sgd"
    if prototype_gradient and in_place:
        raise ValueError("prototype_gradient: 'in_place_sgd' changes weights before they are known")
    if in_place and threads > 1:
        raise ValueError(f"threads: 'in_place_sgd' takes 1, got {threads}")
    if budget is None and policy is None:
        budget = Budget()
    memory_bytes = budget.memory_bytes if budget and budget.accounting == "planner" else None
    report = progress or (lambda phase, done, total: None)
    rng = np.random.default_rng(seed)
    timings: dict[str, float] = {}
    costs = profile(network)

    fisher = None
    if policy is None:
        assert budget is not None
        choose = partial(
            select,
            profile=costs,
            ratio=ratio,
            criterion=criterion,
            optimizer=optimizer,
            biases=biases,
            max_ways=ways,
            threads=threads,
            frozen_weights=frozen_weights,
        )
        with _timed(timings, "fisher"):  # lines 1 and 2
            try:
                fisher = inspect(
                    network,
                    images,
                    labels,
                    budget,
                    criterion=criterion,
                    rng=rng,
                    threads=threads,
                    frozen_weights=frozen_weights,
                    progress=partial(report, "fisher"),
                )
            except BudgetExceeded as error:
                raise _smallest(error, costs, budget, criterion, choose) from error
        with _timed(timings, "selection"):  # lines 3 and 4
            policy = choose(fisher.information, budget=budget)
    elif budget is not None:
        policy.check(network)
        _check_compute(policy, costs, budget, optimizer)

    session = Session(
        network,
        policy,
        optimizer=optimizer,
        max_ways=ways,
        keep_images=count,
        threads=threads,
        memory_bytes=memory_bytes,
        frozen_weights=frozen_weights,
        in_place_rate=learning_rate if in_place else None,
    )
    with _timed(timings, "embed"):
        session.set_prototypes(images, labels, ways, keep=True)
        # Before training: afterwards the network knows its support photos by heart.
        unknown_below = _unknown_below(session, images, labels, network.logit_scale)
    queries = PseudoQueries(session, images, rng, views=views, iterations=iterations)
    history: list[Iteration] = []
    with _timed(timings, "fine_tuning"):  # lines 5 and 6
        for iteration in range(iterations if policy.layers or policy.biases else 0):
            view, augmentation = queries.view(iteration)
            if prototype_gradient:
                loss, correct = _both_backward(
                    session, images, view, augmentation, labels, network.logit_scale
                )
            else:
                loss, correct = session.proto_backward(
                    view, labels, augmentation, scale=network.logit_scale
                )
            if not in_place:
                session.step(learning_rate)
                session.zero_grad()
            if session.kept:
                session.update_prototypes()
            else:
                session.set_prototypes(images, labels, ways)
            history.append(Iteration(loss / count, correct / count))
            report("fine-tuning", iteration + 1, iterations)
    return AdaptResult(
        network=session.network().replace(
            classes=names,
            prototypes=session.prototypes().astype(np.float32),
            unknown_below=unknown_below,
        ),
        policy=policy,
        fisher=fisher,
        plan=session.plan,
        arena_high_water=max(session.arena_high_water(), fisher.arena_high_water if fisher else 0),
        cache_bytes=queries.cached_bytes,
        timings=timings,
        history=tuple(history),
    )


def inspect(
    network: Network,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    budget: Budget,
    *,
    rng: np.random.Generator,
    criterion: str = "tinytrain",
    layers: Iterable[int] | None = None,
    threads: int = 1,
    frozen_weights: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> FisherPass:
    """What `select` wants to know of the support set by `criterion`: {layer: (O,)}, and its cost.

    criterion: "tinytrain", Fisher information (Eq. 2) of `inspected_layers`; "held_out", gains
    (`held_out_gain`) of `reachable_layers`. layers: others than these; rng: for the augmentation;
    progress: called with (passes done, passes).
    Raises BudgetExceeded when the budget's memory does not carry it, ValueError for another
    criterion.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: expected {' or '.join(CRITERIA)}, got {criterion!r}")
    ask = held_out_gain if criterion == "held_out" else fisher_pass
    return ask(
        network,
        images,
        labels,
        rng=rng,
        layers=_asked(profile(network), budget, criterion) if layers is None else tuple(layers),
        threads=threads,
        memory_bytes=budget.memory_bytes if budget.accounting == "planner" else None,
        frozen_weights=frozen_weights,
        progress=progress,
    )


def _asked(costs: Profile, budget: Budget, criterion: str) -> tuple[int, ...]:
    if criterion == "held_out":
        return reachable_layers(costs, budget)
    return inspected_layers(costs.network)


def _both_backward(
    session: Session,
    images: NDArray[np.uint8],
    view: NDArray[np.uint8] | Prefix,
    augmentation: Augmentation | None,
    labels: NDArray[np.int64],
    scale: float,
) -> tuple[float, int]:
    """`Session.proto_backward` with the gradient through the prototypes: (loss sum, correct)."""
    loss, correct, grad_query, grad_support = loss_and_gradients(
        session.embed(view, augmentation),
        labels,
        session.embed(images),
        labels,
        session.prototypes().shape[0],
        scale,
    )
    if not math.isfinite(loss):
        raise NonFiniteError("fine-tuning: the loss is not finite; weights were left as they are")
    session.backward(view, grad_query / len(labels), augmentation)
    session.backward(images, grad_support / len(labels))
    return loss, correct


def classify(
    network: Network,
    images: NDArray[Any],
    *,
    unknown_below: float | None = None,
    threads: int = 1,
) -> Classification:
    """Names the class of each photo by an adapted network (Algorithm 1, line 7).

    images: (N, H, W, 3) uint8, or float32 already normalised; unknown_below: probability below
    which a photo is "unknown", the network's own by default.
    Raises ValueError when the network has not been adapted.
    """
    if network.prototypes is None:
        raise ValueError(f"network {network.name!r}: has no classes; adapt it first")
    threshold = network.unknown_below if unknown_below is None else unknown_below
    features = network.embed(images, threads=threads).astype(np.float64)
    table = probabilities(features, network.prototypes.astype(np.float64), network.logit_scale)
    best = table.max(axis=1)
    labels = tuple(
        UNKNOWN if threshold is not None and probability < threshold else network.classes[index]
        for index, probability in zip(table.argmax(axis=1), best, strict=True)
    )
    return Classification(labels, best, table)


def default_learning_rate(optimizer: str) -> float:
    """The learning rate chosen for the default budget on validation domains."""
    if optimizer not in DEFAULT_LEARNING_RATE:
        known = ", ".join(DEFAULT_LEARNING_RATE)
        raise ValueError(f"optimizer: expected one of {known}, got {optimizer!r}")
    return DEFAULT_LEARNING_RATE[optimizer]


def _unknown_below(
    session: Session, images: NDArray[np.uint8], labels: NDArray[np.int64], scale: float
) -> float:
    """The threshold under the session's weights as they are, by leave-one-out."""
    prototypes = session.prototypes()
    # Kept prefix outputs spare the photos most of another forward pass, and are larger than this.
    kept = session.kept_features() if session.kept else None
    sure = []
    for way in range(len(prototypes)):
        if kept is not None:
            features = kept[labels == way]
        else:
            # One photo at a time: only the features of a single class leave the engine at once.
            photos = np.flatnonzero(labels == way)
            features = np.concatenate([session.embed(images[n : n + 1]) for n in photos])
        sure.append(leave_one_out(features, way, prototypes, scale))
    return unknown_threshold(np.concatenate(sure))


def _checked_task(
    network: Network,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: Sequence[str] | None,
) -> tuple[str, ...]:
    """The class names, once images and labels have been found sound."""
    size = network.input_size
    if images.dtype != np.uint8:
        raise TypeError(f"images: expected uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise ValueError(f"images: expected shape (N, {size}, {size}, 3), got {images.shape}")
    if labels.dtype != np.int64:
        raise TypeError(f"labels: expected int64, got {labels.dtype}")
    if labels.shape != (len(images),):
        raise ValueError(f"labels: expected shape ({len(images)},), got {labels.shape}")
    ways = int(labels.max(initial=-1)) + 1
    if ways < 2 or labels.min() < 0 or not np.bincount(labels).all():
        raise ValueError("labels: expected 0 to ways - 1, at least two classes, none left out")
    names = tuple(str(way) for way in range(ways)) if classes is None else tuple(classes)
    if len(names) != ways or len(set(names)) != ways:
        raise ValueError(f"classes: expected {ways} different names, got {', '.join(names)}")
    return names


def _check_compute(policy: UpdatePolicy, costs: Profile, budget: Budget, optimizer: str) -> None:
    """Holds a given policy to what the engine does not check: compute, and the paper's memory."""
    share = costs.compute_share(policy)
    if share > budget.compute:
        raise BudgetExceeded(
            f"policy: expected a compute share of at most {budget.compute}, got {share:.6g}",
            needed_compute=share,
        )
    needed = costs.memory_bytes(policy, optimizer)
    if budget.accounting == "paper" and needed > budget.memory_bytes:
        raise BudgetExceeded(
            f"policy: expected at most {budget.memory_bytes} bytes (paper accounting), "
            f"got {needed}",
            needed_bytes=needed,
        )


def _smallest(
    error: BudgetExceeded,
    costs: Profile,
    budget: Budget,
    criterion: str,
    choose: Callable[..., UpdatePolicy],
) -> BudgetExceeded:
    """The error of an inspection that does not fit, naming a budget that carries selection, too."""
    uniform = {
        layer: np.ones(costs.layers[layer].out_channels)
        for layer in _asked(costs, budget, criterion)
    }
    try:
        choose(uniform, budget=dataclasses.replace(budget, memory_bytes=1))
    except BudgetExceeded as selection:
        needed = max(error.needed_bytes or 0, selection.needed_bytes or 0)
        asked = "held-out gains" if criterion == "held_out" else "Fisher pass"
        message = f"{asked}: {error}; an adaptation needs at least {needed} bytes"
        return BudgetExceeded(message, needed, selection.needed_compute)
    return error


@contextmanager
def _timed(timings: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[phase] = time.perf_counter() - start
