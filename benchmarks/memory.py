"""Training memory, and what the options that save it cost in time.

    python -m benchmarks.memory                          # zoo nets, the fixed TinyTrain policy
    TINYTRAIN_WEIGHTS=DIR python -m benchmarks.memory    # and policies selected for a task

Training memory is the planned peak of the arena: one thread, five classes, any batch, without the
resident weights, which are listed beside it. `time` is a step's CPU time at batch 1 as a ratio to
SGD with float32 weights, interleaved, median of the rounds.
The second part selects a policy for the demo's drawings on each imported network, within the memory
that the paper reports for TinyTrain on it (Table 2) by the paper's own formula, and plans it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import tinytrain_ext as tt
from tinytrain_ext.bench.jobs import TT_POLICIES, tt_policy, zoo_network
from tinytrain_ext.cost import profile
from tinytrain_ext.demo import draw_task
from tinytrain_ext.importers import import_int8
from tinytrain_ext.session import FROZEN_WEIGHTS, OPTIMIZERS, plan

WAYS = 5
MIB = 1 << 20
# The paper's Table 2, TinyTrain's row, MiB; and the release files.
PUBLISHED = {
    "mcunet": (0.89, "mcunet-5fps"),
    "mobilenetv2": (1.06, "mbv2-w0.35"),
    "proxylessnas": (0.78, "proxyless-w0.3"),
}


def sessions(network: tt.Network, policy: tt.UpdatePolicy) -> dict[tuple[str, str], tt.Session]:
    """One session for each (optimizer, frozen weights)."""
    return {
        (optimizer, frozen): tt.Session(
            network,
            policy,
            optimizer=optimizer,
            max_ways=WAYS,
            frozen_weights=frozen,
            in_place_rate=1e-6 if optimizer == "in_place_sgd" else None,
        )
        for optimizer in OPTIMIZERS
        for frozen in FROZEN_WEIGHTS
    }


def step_seconds(session: tt.Session, image: Any, repeats: int) -> float:
    """CPU seconds of one training step at batch 1."""
    label = np.zeros(1, np.int64)
    start = time.thread_time()
    for _ in range(repeats):
        session.proto_backward(image, label)
        if session.optimizer != "in_place_sgd":
            session.step(1e-6)
            session.zero_grad()
    return (time.thread_time() - start) / repeats


def fixed_policy_rows(name: str, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Arena, resident weights and time of every option, for the policy that targets are set for."""
    network = zoo_network(name)
    made = sessions(network, tt_policy(name, network))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (WAYS, network.input_size, network.input_size, 3), np.uint8)
    for session in made.values():
        session.set_prototypes(images, np.arange(WAYS), WAYS)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in made}
    for _ in range(rounds):
        for key, session in made.items():
            seconds[key].append(step_seconds(session, images[:1], repeats))
    base = seconds["sgd", "float32"]
    return [
        {
            "network": f"{name} (zoo)",
            "optimizer": key[0],
            "frozen_weights": key[1],
            "arena_bytes": session.plan.peak_bytes,
            "arena_high_water_bytes": session.arena_high_water(),
            "resident_weight_bytes": session.plan.resident_weight_bytes,
            "time": statistics.median(
                mine / other for mine, other in zip(seconds[key], base, strict=True)
            ),
        }
        for key, session in made.items()
    ]


def selected_policy_rows(name: str, weights: Path) -> list[dict[str, Any]]:
    """The plan of the policy that the paper's accounting carries for one task."""
    published, file = PUBLISHED[name]
    network = import_int8(weights / f"{file}.pkl")
    support = draw_task(network.input_size, seed=0).support
    information = tt.fisher_information(network, support.images, support.labels)
    budget = tt.Budget(int(published * MIB), accounting="paper")
    costs = profile(network)
    policy = tt.select(information, costs, budget, max_ways=WAYS)
    return [
        {
            "network": f"{name} (imported)",
            "optimizer": optimizer,
            "layers": sorted(policy.layers),
            "weights": costs.updated_weights(policy),
            "arena_bytes": plan(network, policy, optimizer=optimizer, max_ways=WAYS).peak_bytes,
            "published_bytes": int(published * MIB),
        }
        for optimizer in OPTIMIZERS
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=5, help="steps in a round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    arguments = parser.parse_args()
    rows = []
    head = f"{'network':<26}{'optimizer':<14}{'frozen':<9}"
    print(f"{head}{'arena MiB':>10}{'weights MiB':>13}{'time':>7}")
    for name in TT_POLICIES:
        for row in fixed_policy_rows(name, arguments.rounds, arguments.repeats):
            rows.append(row)
            print(
                f"{row['network']:<26}{row['optimizer']:<14}{row['frozen_weights']:<9}"
                f"{row['arena_bytes'] / MIB:>10.3f}{row['resident_weight_bytes'] / MIB:>13.3f}"
                f"{row['time']:>7.2f}"
            )
    weights = os.environ.get("TINYTRAIN_WEIGHTS")
    if weights:
        print(
            f"\n{'network':<26}{'optimizer':<14}{'weights':>9}{'arena MiB':>10}{'of Table 2':>12}"
        )
        for name in PUBLISHED:
            for row in selected_policy_rows(name, Path(weights)):
                rows.append(row)
                print(
                    f"{row['network']:<26}{row['optimizer']:<14}{row['weights']:>9,}"
                    f"{row['arena_bytes'] / MIB:>10.3f}"
                    f"{row['arena_bytes'] / row['published_bytes']:>12.2f}"
                )
    else:
        print("TINYTRAIN_WEIGHTS is not set: no policies selected for a task", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
