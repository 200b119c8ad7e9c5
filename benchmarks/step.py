"""Forward passes, Fisher passes, training steps and whole iterations, ours and the peers'.

Zoo nets (with the feature mix) and random weights. A step is forward, backward and SGD update; an
iteration adds the prototypes of a support set as large as the batch. Prefix: what the layers before
the first trained one make of an image. Peers update whole layers where we update channels of them,
because none has channel masks; and they are given float images where we read photos.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tinytrain_ext as tt
from tinytrain_ext import _core
from tinytrain_ext.bench.jobs import SCALE, OurJob, Task, fma_gflops, tt_policy, zoo_network
from tinytrain_ext.cost import inspected_layers, profile

from .measure import cpu_timer, interleave, ratios, spread
from .peers.client import Peer
from .peers.job import Job

LARGEST_FEATURE_DIFFERENCE, LARGEST_DIFFERENCE = 1e-4, 0.1


def policies(name: str, network: tt.Network) -> dict[str, tt.UpdatePolicy]:
    """The methods, weights only: the peers' columns train no biases either."""
    return {
        "TT": tt_policy(name, network),
        "SparseUpdate": tt.sparse_update(network),
        "LastLayer": tt.UpdatePolicy(tt.last_layer(network).layers),
        "FullTrain": tt.UpdatePolicy(tt.full_train(network).layers),
    }


class CachedJob(OurJob):
    """A job whose batch the frozen prefix has seen already, as that of a fixed set of views."""

    def __init__(
        self, network: tt.Network, policy: tt.UpdatePolicy, task: Task, **options: Any
    ) -> None:
        super().__init__(network, policy, task, **options)
        self.batch = self.session.prefix(task.images)

    def gradients(self) -> None:
        self.session.zero_grad()
        self.session.proto_backward(self.batch, self.task.labels, scale=SCALE)


def keep_support(job: OurJob) -> None:
    """Computes the support's frozen prefix for `kept_iteration`."""
    job.session.set_prototypes(job.task.images, job.task.labels, job.task.ways, keep=True)


@dataclass(frozen=True)
class Row:
    """One line of the table: our call, its MACs for one image, and what the peers call the job."""

    call: Callable[[], object]
    macs: int
    peer: str
    session: tt.Session


def our_rows(name: str, network: tt.Network, task: Task) -> dict[str, Row]:
    """Everything that is timed, and what it computes at least."""
    costs = profile(network)
    forward = costs.forward_macs
    inspected = inspected_layers(network)
    methods = policies(name, network)
    whole = tt.UpdatePolicy({layer: methods["FullTrain"].layers[layer] for layer in inspected})

    def tail(job: OurJob) -> int:
        """Forward MACs behind the frozen prefix."""
        first = job.session.plan.first_tail_operation
        return sum(row.macs for row in costs.layers if row.operation >= first)

    frozen = OurJob(network, tt.UpdatePolicy({}), task)
    fisher = OurJob(network, tt.UpdatePolicy({}), task, fisher_layers=inspected)
    rows = {
        "forward": Row(frozen.forward, forward, "forward", frozen.session),
        "Fisher": Row(
            fisher.gradients, forward + costs.grad_input_macs(whole), "Fisher", fisher.session
        ),
    }
    for method, policy in methods.items():
        job = OurJob(network, policy, task)
        step = forward + costs.backward_macs(policy)
        rows[f"{method} step"] = Row(job.step, step, f"{method} step", job.session)
        rows[f"{method} iteration"] = Row(
            job.iteration, step + forward, f"{method} iteration", job.session
        )
        if method == "FullTrain":
            continue  # nothing is frozen
        kept = OurJob(network, policy, task, keep_images=len(task.images))
        keep_support(kept)
        rows[f"{method} iteration, support's prefix kept"] = Row(
            kept.kept_iteration, step + tail(kept), f"{method} iteration", kept.session
        )
        cached = CachedJob(network, policy, task, keep_images=len(task.images))
        keep_support(cached)
        behind = tail(cached)
        rows[f"{method} step, prefix cached"] = Row(
            cached.step, step - forward + behind, f"{method} step", cached.session
        )
        rows[f"{method} iteration, both prefixes cached"] = Row(
            cached.kept_iteration,
            step - forward + 2 * behind,
            f"{method} iteration",
            cached.session,
        )
    plain = OurJob(network, whole, task)
    fused = OurJob(network, whole, task, fisher_layers=inspected)
    macs = forward + costs.backward_macs(whole)
    rows["last 6 blocks, gradients"] = Row(plain.gradients, macs, "", plain.session)
    rows["last 6 blocks, gradients and Fisher"] = Row(fused.gradients, macs, "", fused.session)
    return rows


def differences(
    network: tt.Network, name: str, task: Task, results: dict[str, Any]
) -> tuple[float, float]:
    """Relative differences (of norms) of a peer's results to ours: of the features; and the largest
    over the kinds of steps, in the median layer, of gradients and Fisher sums.

    Rounding can tip a value on a ReLU6's corner to the other side, which moves one image's
    gradients in the layers before it by per cents (they agree to 1e-6 where none tips); another
    computation would move all.
    """

    def relative(got: NDArray[Any], wanted: NDArray[Any]) -> float:
        return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))

    frozen = OurJob(network, tt.UpdatePolicy({}), task, fisher_layers=inspected_layers(network))
    worst = 0.0
    frozen.session.proto_backward(task.images, task.labels, scale=SCALE, loss_weight=1.0)
    kinds = {"Fisher": frozen.session.fisher()}
    for method, policy in policies(name, network).items():
        job = OurJob(network, policy, task)
        job.gradients()
        kinds[f"{method} step"] = job.session.gradients()
        for layer, update in policy.layers.items():
            whole = results.get(f"{method} step/{layer}")
            if whole is not None:
                axis = 0 if update.axis == "out" else 1
                results[f"{method} step/{layer}"] = whole.take(update.channels, axis)
    for kind, ours in kinds.items():
        found = [
            relative(results[f"{kind}/{layer}"], wanted)
            for layer, wanted in ours.items()
            if f"{kind}/{layer}" in results
        ]
        worst = max(worst, statistics.median(found)) if found else worst
    return relative(results["features"], frozen.forward()), worst


def peer_job(network: tt.Network, task: Task, methods: dict[str, tt.UpdatePolicy]) -> Job:
    """The same task for the peers."""
    return Job(
        operations=[dataclasses.asdict(operation) for operation in network.operations],
        weights=list(network.weights),
        biases=list(network.biases),
        images=task.images,
        labels=task.labels,
        prototypes=task.prototypes,
        trained={method: sorted(policy.layers) for method, policy in methods.items()},
        inspected=list(inspected_layers(network)),
    )


def measure(
    name: str, batch: int, rounds: int, peers: dict[str, Peer], folder: Path
) -> list[dict[str, Any]]:
    """Rows of one network and batch size; exits if a peer computes something else."""
    network = zoo_network(name)
    task = Task(network, batch)
    rows = our_rows(name, network, task)
    timers = {("ours", row): cpu_timer(ours.call) for row, ours in rows.items()}
    isa = _core.default_isa()
    others = [other for other in _core.available_isas() if other not in (isa, "scalar")]
    for other in others:
        for row in ("TT", "FullTrain"):
            job = OurJob(network, policies(name, network)[row], task, isa=other)
            timers[other, f"{row} step"] = cpu_timer(job.step)
        timers[other, "forward"] = cpu_timer(job.forward)
    path = folder / "job.npz"
    peer_job(network, task, policies(name, network)).save(path)
    found: dict[str, tuple[float, float]] = {}
    for column, peer in peers.items():
        calls = peer.load(path)
        found[column] = differences(network, name, task, peer.results())
        if found[column][0] > LARGEST_FEATURE_DIFFERENCE or found[column][1] > LARGEST_DIFFERENCE:
            raise SystemExit(
                f"{column} differs from ours by {found[column]}: these timings mean nothing"
            )
        wanted = {row.peer for row in rows.values()}
        timers |= {(column, call): timer for call, timer in calls.items() if call in wanted}
    seconds = interleave(timers, rounds)
    peaks = {which: fma_gflops(which) for which in (isa, *others)}
    measured: list[dict[str, Any]] = []
    for row, ours in rows.items():
        mine = seconds["ours", row]
        floor = 2e-9 * ours.macs * batch / peaks[isa]
        columns: dict[str, Any] = {}
        for column in (*others, *peers):
            theirs = seconds.get((column, row if column in others else ours.peer))
            if theirs is None:
                continue
            columns[column] = {
                "milliseconds": spread([1e3 * s for s in theirs]),
                "ratio": ratios(theirs, mine),
            }
            if column in others:
                share = 2e-9 * ours.macs * batch / peaks[column] / statistics.median(theirs)
                columns[column]["roofline"] = round(share, 3)
            else:
                columns[column]["differences"] = [float(f"{d:.1e}") for d in found[column]]
        measured.append(
            {
                "section": "step",
                "network": name,
                "batch": batch,
                "row": row,
                "milliseconds": spread([1e3 * s for s in mine]),
                "macs": ours.macs * batch,
                "roofline": round(floor / statistics.median(mine), 3),
                "fma_gflops": round(peaks[isa], 1),
                "rounds": rounds,
                "peak_bytes": ours.session.plan.peak_bytes,
                "columns": columns,
            }
        )
    plain, fused = (
        seconds["ours", f"last 6 blocks, gradients{suffix}"] for suffix in ("", " and Fisher")
    )
    measured[-1]["over_plain"] = ratios(fused, plain)
    return measured
