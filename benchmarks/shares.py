"""What surrounds a training step: selection's share of an adaptation, Python's of a step."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tinytrain_ext as tt
from tinytrain_ext.adapt import adapt
from tinytrain_ext.bench.jobs import (
    LEARNING_RATE,
    SCALE,
    WAYS,
    OurJob,
    Task,
    tt_policy,
    zoo_network,
)
from tinytrain_ext.cost import profile
from tinytrain_ext.fisher import fisher_pass
from tinytrain_ext.session import plan
from tinytrain_ext.views import PseudoQueries, Views

from .measure import Timer, cpu_timer, interleave, ratios, spread
from .peers.client import Peer
from .step import CachedJob, peer_job

IMAGES, ITERATIONS = 25, 40
PEER_ITERATIONS = 4
# A stretch holds as many steps as `adapt` draws views for at a time.
STRETCHES_A_ROUND, STEPS_A_STRETCH = 15, 64


def selection(name: str, rounds: int, peers: dict[str, Peer], folder: Path) -> list[dict[str, Any]]:
    """Whole adaptations of 25 photos in 40 iterations, and what choosing the policy adds.

    Fine-tuning includes all but the choice: embedding the support set, the threshold for unknown
    photos, 40 iterations with augmentation and Adam. Peers do four iterations of the fixed policy,
    taken ten times, without any of that.
    """
    network, costs = zoo_network(name), profile(zoo_network(name))
    task = Task(network, IMAGES)
    rng = np.random.default_rng(0)

    def fisher() -> dict[int, NDArray[np.float64]]:
        return fisher_pass(network, task.images, task.labels, rng=rng).information

    information = fisher()

    def choose() -> tt.UpdatePolicy:
        return tt.select(information, costs, tt.Budget(), max_ways=WAYS)

    policy = choose()
    # A limit that carries nothing beside training itself.
    tight = tt.Budget(plan(network, policy, max_ways=WAYS).peak_bytes, compute=1.0)

    def fine_tune(chosen: tt.UpdatePolicy, **options: Any) -> Callable[[], object]:
        return lambda: adapt(
            network, task.images, task.labels, policy=chosen, iterations=ITERATIONS, **options
        )

    step = OurJob(network, policy, task)
    fixed = tt_policy(name, network)
    timers: dict[str, Timer] = {
        "fisher": cpu_timer(fisher),
        "choice": cpu_timer(choose),
        "step": cpu_timer(step.step),
        "iteration": cpu_timer(step.iteration),
        "fine-tuning, nothing cached": cpu_timer(fine_tune(policy, budget=tight)),
        "fine-tuning, support's prefix kept": cpu_timer(fine_tune(policy)),
        "fine-tuning, support's prefix kept and 8 views cached": cpu_timer(
            fine_tune(policy, views=Views(8))
        ),
        "fine-tuning, fixed policy": cpu_timer(fine_tune(fixed)),
    }
    path = folder / "job.npz"
    peer_job(network, task, {"TT": fixed}).save(path)
    for column, peer in peers.items():
        calls = peer.load(path)
        if "TT iteration" in calls:
            timers[column] = partial(_as_adaptation, calls["TT iteration"])
    seconds = interleave(timers, rounds)
    extra = [f + c for f, c in zip(seconds["fisher"], seconds["choice"], strict=True)]
    rows: list[dict[str, Any]] = []
    for key, times in seconds.items():
        row: dict[str, Any] = {
            "section": "selection",
            "network": name,
            "row": key,
            "milliseconds": spread([1e3 * s for s in times]),
            "rounds": rounds,
        }
        if key.startswith("fine-tuning") and "fixed" not in key:
            whole = [t + e for t, e in zip(times, extra, strict=True)]
            row["selection_share"] = ratios(extra, whole)
        elif key in ("step", "iteration"):
            row["selection_in_these"] = ratios(extra, times)
        elif key in peers:
            row["ratio"] = ratios(times, seconds["fine-tuning, fixed policy"])
        rows.append(row)
    return rows


def _as_adaptation(iteration: Timer, repeats: int) -> float:
    return iteration(repeats * PEER_ITERATIONS) * ITERATIONS


def python(name: str, rounds: int) -> list[dict[str, Any]]:
    """Python's share of a step at batch 1.

    The step as `adapt` takes it (a fresh view, proto_backward, step, zero_grad) against the core's
    three functions called with finished arguments, the same draws in turn; what three calls of a
    function of the core that does nothing take is Python's, too, and is taken off the core. Many
    short stretches: the share is a small difference, and the lowest times are undisturbed.
    """
    network = zoo_network(name)
    task = Task(network, 1)
    job = CachedJob(network, tt_policy(name, network), task)
    session, core, cached = job.session, job.session._core, job.batch
    stretches = STRETCHES_A_ROUND * rounds
    steps = stretches * (1 + STEPS_A_STRETCH)

    def fresh_views() -> Iterator[tuple[Any, Any]]:
        queries = PseudoQueries(
            session,
            task.images,
            np.random.default_rng(0),
            views=None,
            iterations=steps,
        )
        return map(queries.view, itertools.count())

    views = fresh_views()
    finished = itertools.islice(fresh_views(), steps)
    draws = iter([augmentation.parameters for _, augmentation in finished])

    def whole() -> None:
        view, augmentation = next(views)
        session.proto_backward(view, task.labels, augmentation, scale=SCALE)
        session.step(LEARNING_RATE)
        session.zero_grad()

    def bare() -> None:
        core.proto_backward(task.images, False, task.labels, next(draws), SCALE, 1.0)
        core.step(LEARNING_RATE, 0.9)
        core.zero_grad()

    def whole_cached() -> None:
        session.proto_backward(cached, task.labels, scale=SCALE)
        session.step(LEARNING_RATE)
        session.zero_grad()

    def bare_cached() -> None:
        core.proto_backward(cached.values, True, task.labels, None, SCALE, 1.0)
        core.step(LEARNING_RATE, 0.9)
        core.zero_grad()

    def nothing() -> None:
        core.keeps_prefix()
        core.keeps_prefix()
        core.keeps_prefix()

    calls = {
        "step": whole,
        "core of step": bare,
        "step, prefix cached": whole_cached,
        "core of step, prefix cached": bare_cached,
        "three empty calls": nothing,
    }
    seconds: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(stretches):
        for key, call in calls.items():
            call()  # the others have emptied the caches
            seconds[key].append(cpu_timer(call)(STEPS_A_STRETCH))
    idle = seconds["three empty calls"]

    def share(whole: float, core: float, calls: float) -> float:
        return (whole - core + calls) / whole

    rows = []
    for key, times in seconds.items():
        row: dict[str, Any] = {
            "section": "python",
            "network": name,
            "row": key,
            "microseconds": spread([1e6 * s for s in times]),
            "rounds": stretches,
        }
        if f"core of {key}" in seconds:
            bare_seconds = seconds[f"core of {key}"]
            shares = [share(*taken) for taken in zip(times, bare_seconds, idle, strict=True)]
            row["python_share"] = round(statistics.median(shares), 4)
            row["python_share_spread"] = spread(shares)
            row["python_share_lowest"] = round(share(min(times), min(bare_seconds), min(idle)), 4)
        rows.append(row)
    return rows
