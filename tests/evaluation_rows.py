"""Made-up rows of an evaluation, for tests of what is made of rows: costs are real, nothing else.

No network is trained: accuracies, times and selected channels are random numbers, and TinyTL, which
is no policy, has FullTrain's costs.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from tinytrain_ext.cost import inspected_layers, profile
from tinytrain_ext.evaluate import Method, Row, _mask
from tinytrain_ext.network import Network
from tinytrain_ext.selection import (
    Budget,
    UpdatePolicy,
    full_train,
    last_layer,
    select,
    sparse_update,
    top_channels,
    with_channels,
)
from tinytrain_ext.session import plan

GAINS = {"none": 0, "lastlayer": 4, "layer": 3, "sparseupdate": 10, "tinytrain": 11}


def made_up_rows(
    networks: Mapping[str, Network],
    domains: Sequence[str],
    methods: Sequence[str],
    tasks: int,
    *,
    largest_support: int = 500,
) -> list[Row]:
    """Rows such as `evaluate` writes, of all combinations."""
    rows = []
    for name, network in networks.items():
        costs = profile(network)
        for domain in domains:
            for task in range(tasks):
                drawn = np.random.default_rng(zlib.crc32(f"{domain} {task}".encode()))
                ways, support = int(drawn.integers(5, 30)), int(drawn.integers(20, largest_support))
                ease = drawn.normal(60, 8) + (4 if name.endswith("-meta") else 0)
                for method in map(Method.parse, methods):
                    key = f"{name} {domain} {method.name}".encode()
                    rng = np.random.default_rng([zlib.crc32(key), task])
                    policy = _policy(network, costs, method, rng)
                    gain = GAINS.get(method.kind, 9) + rng.normal(0, 3)
                    whole = method.kind == "fulltrain"
                    macs = costs.full_train_macs if whole else costs.backward_macs(policy)
                    rows.append(
                        {
                            "network": name,
                            "domain": domain,
                            "task": task,
                            "method": method.name,
                            "seed": 0,
                            "protocol": "tracks",
                            "largest_support": largest_support,
                            "views": None,
                            "digest": "0" * 16,
                            "ways": ways,
                            "support": support,
                            "query": 10 * ways,
                            "accuracy": float(np.clip((ease + gain) / 100, 0, 1)),
                            "learning_rate": method.learning_rate,
                            "updated_weights": costs.updated_weights(policy),
                            "updated_biases": 0,
                            "backward_macs": macs,
                            "paper_bytes": costs.memory_bytes(policy),
                            "planner_bytes": None
                            if method.kind == "tinytl"
                            else plan(network, policy).peak_bytes,
                            "layers": {
                                str(layer): [update.axis, _mask(update.channels)]
                                for layer, update in policy.layers.items()
                            },
                            "first_bias": None,
                            "final_loss": None,
                            "seconds": 0.2 + support * (3e-3 + macs * 1e-9),
                            "selection_seconds": 0.1 if method.kind == "tinytrain" else 0.0,
                            "cpu_seconds": 0.2 + support * (3e-3 + macs * 1e-9),
                        }
                    )
    return rows


def _policy(network, costs, method, rng):
    makers = {
        "none": lambda network: UpdatePolicy(),
        "fulltrain": full_train,
        "tinytl": full_train,
        "lastlayer": last_layer,
        "sparseupdate": sparse_update,
    }
    if method.kind in makers:
        return makers[method.kind](network)
    ratio = method.options.get("ratio", 0.5)
    if method.kind == "layer":
        layer = range(len(costs.layers))[method.options["index"]]
        channels = costs.layers[layer].out_channels
        return UpdatePolicy(
            {layer: top_channels(rng.random(channels), max(1, int(ratio * channels)))}
        )
    of_domain = np.random.default_rng(1)
    information = {
        layer: of_domain.random(costs.layers[layer].out_channels) ** 3
        + rng.random(costs.layers[layer].out_channels) ** 4
        for layer in inspected_layers(network)
    }
    policy = select(information, costs, Budget(1 << 20, 0.4, "paper"), ratio)
    return with_channels(policy, network, method.options.get("channels", "fisher"), rng)
