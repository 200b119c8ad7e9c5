"""One TinyTrain task of `tinytrain evaluate`, on the engine and in plain PyTorch.

    python -m benchmarks.torch_task --network mcunet-meta.safetensors --data images

Both inspect (Eq. 2), select and train for 40 iterations by Adam, on the same fixed views of the
same support images. Plain PyTorch is what a user would write: eager, the network with its BatchNorm
folded, whole gradients of the selected layers masked to the selected channels, frozen layers run
again in every iteration. The engine is measured with its cache of what frozen layers make of a
view, and with fresh views in every iteration, which leave nothing to cache.
One thread, CPU time from the decoded images to the trained network. Exits with an error where
accuracies on the queries differ by more than a few points: then the two do not do the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

import tinytrain_ext as tt
from tinytrain_ext import _core
from tinytrain_ext.bench.torch_peer import TorchNetwork
from tinytrain_ext.cost import inspected_layers
from tinytrain_ext.datasets import cached_images, open_image_set
from tinytrain_ext.evaluate import Domain, Method, Task, channels_of, run_task
from tinytrain_ext.images import (
    apply_augmentation,
    draw_augmentation,
    draw_augmentations,
    normalise,
)
from tinytrain_ext.selection import select

METHOD = Method.parse("tinytrain")
ITERATIONS = 40
BATCH = 64  # whole support sets do not fit a CPU's caches, nor hundreds of photos its memory
LARGEST_DIFFERENCE = 0.04  # of accuracy: rounding moves single channels and single queries


class PlainTask:
    """A task in plain PyTorch: `adapt`, then `accuracy`."""

    def __init__(self, network: tt.Network, task: Task, views: int) -> None:
        self.network, self.task, self.views = network, task, views
        self.ways = int(task.labels.max()) + 1
        self.labels = torch.from_numpy(task.labels)

    def adapt(self) -> tuple[Any, Tensor, tt.UpdatePolicy]:
        """The trained network, its prototypes, and what was trained."""
        network, task = self.network, self.task
        support = self.pixels(normalise(task.images, network.mean, network.std))
        information = self.fisher(support)
        policy = select(information, tt.profile(network), tt.Budget(), 0.5)

        model = self.model(set(policy.layers))
        weights = {layer: model.convs[layer].weight for layer in policy.layers}
        masks = {layer: torch.zeros(len(weights[layer]), 1, 1, 1) for layer in policy.layers}
        for layer, update in policy.layers.items():
            masks[layer][list(update.channels)] = 1
        optimizer = torch.optim.Adam(list(weights.values()), METHOD.learning_rate)
        rng = np.random.default_rng(task.seed)
        size = network.input_size
        draws = draw_augmentations(self.views, len(task.images), size, rng)
        queries = [
            self.pixels(apply_augmentation(task.images, draw, network.mean, network.std))
            for draw in draws
        ]
        for iteration in range(ITERATIONS):
            prototypes = self.prototypes(model, support)
            optimizer.zero_grad()
            for part in batches(len(self.labels)):
                loss = self.loss(model, queries[iteration % self.views], part, prototypes)
                torch.autograd.backward(loss / len(self.labels))
            for layer, weight in weights.items():
                weight.grad *= masks[layer]
            optimizer.step()
        return model, self.prototypes(model, support), policy

    def accuracy(self, model: Any, prototypes: Tensor) -> float:
        """On the queries."""
        network, task = self.network, self.task
        queries = self.pixels(normalise(task.queries, network.mean, network.std))
        # The prototype of largest cosine is that of largest product: its norm is one.
        best = (self.features(model, queries) @ prototypes.T).argmax(dim=1).numpy()
        return float((best == task.targets).mean())

    def fisher(self, support: Tensor) -> dict[int, NDArray[np.float64]]:
        """Eq. 2 by hooks on the inspected layers' outputs."""
        network, task = self.network, self.task
        layers = inspected_layers(network)
        model = self.model({*layers})
        outputs: dict[int, Tensor] = {}
        for layer in layers:
            model.convs[layer].register_forward_hook(_keep(outputs, layer))
        rng = np.random.default_rng(task.seed)
        draw = draw_augmentation(len(task.images), network.input_size, rng)
        query = self.pixels(apply_augmentation(task.images, draw, network.mean, network.std))
        prototypes = self.prototypes(model, support)
        sums = {layer: torch.zeros(len(network.biases[layer])) for layer in layers}
        for part in batches(len(self.labels)):
            loss = self.loss(model, query, part, prototypes)
            kept = [outputs[layer] for layer in layers]
            for layer, a, g in zip(layers, kept, torch.autograd.grad(loss, kept), strict=True):
                sums[layer] += (a * g).sum(dim=(2, 3)).square().sum(dim=0).detach()
        return {layer: sums[layer].double().numpy() / (2 * len(query)) for layer in layers}

    def model(self, trained: set[int]) -> Any:
        """The network, with gradients for the weights of `trained`."""
        model = TorchNetwork(self.network, trained, batch_norm=False)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def pixels(self, images: NDArray[Any]) -> Tensor:
        """(N, H, W, 3) as torch takes them."""
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def features(self, model: Any, images: Tensor) -> Tensor:
        """(N, m), without gradients."""
        with torch.no_grad():
            return torch.cat([model(images[part]) for part in batches(len(images))])

    def prototypes(self, model: Any, support: Tensor) -> Tensor:
        """(ways, m): the directions of the classes' mean features."""
        features = self.features(model, support)
        sums = torch.zeros(self.ways, features.shape[1]).index_add_(0, self.labels, features)
        return functional.normalize(sums, dim=1)

    def loss(self, model: Any, images: Tensor, part: slice, prototypes: Tensor) -> Tensor:
        """Summed cross-entropy of some of the images."""
        features = functional.normalize(model(images[part]), dim=1)
        logits = self.network.logit_scale * features @ prototypes.T
        return functional.cross_entropy(logits, self.labels[part], reduction="sum")


def _keep(outputs: dict[int, Tensor], layer: int) -> Callable[[Any, Any, Tensor], None]:
    def hook(module: Any, inputs: Any, output: Tensor) -> None:
        outputs[layer] = output

    return hook


def batches(count: int) -> Iterator[slice]:
    """Slices of BATCH images."""
    return (slice(start, start + BATCH) for start in range(0, count, BATCH))


def measure(network: tt.Network, task: Task, views: int) -> list[dict[str, Any]]:
    """A row for each way."""
    costs = tt.profile(network)
    rows = []
    for way, of in (("engine, views cached", views), ("engine, fresh views", None)):
        found = run_task(network, costs, METHOD, task, of)
        chosen = {
            (int(layer), channel)
            for layer, (_, mask) in found["layers"].items()
            for channel in channels_of(mask)
        }
        rows.append(
            {"way": way, "cpu_seconds": found["cpu_seconds"], "accuracy": found["accuracy"]}
        )
    plain = PlainTask(network, task, views)
    start = time.process_time()
    model, prototypes, policy = plain.adapt()
    seconds = time.process_time() - start
    theirs = {(layer, c) for layer, update in policy.layers.items() for c in update.channels}
    rows.append(
        {
            "way": "plain PyTorch",
            "cpu_seconds": seconds,
            "accuracy": plain.accuracy(model, prototypes),
            "channels_in_common": len(chosen & theirs) / len(chosen | theirs),
        }
    )
    for row in rows:
        row["times_engine"] = row["cpu_seconds"] / rows[0]["cpu_seconds"]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="as of `tinytrain evaluate`")
    parser.add_argument("--domain", default="traffic_sign")
    parser.add_argument("--task", type=int, default=0, help="its number")
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--json", type=Path, help="append one JSON line a row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network = tt.Network.load(arguments.network)
    images = open_image_set(arguments.data, arguments.domain)
    task = Domain(images).task(
        arguments.task, cached_images(images.paths, network.resize, network.input_size)
    )
    size = f"{task.labels.max() + 1} ways, {len(task.labels)} support images"
    print(f"{arguments.domain}, task {task.number}: {size}, {len(task.targets)} queries")
    print(f"{'':<22}{'CPU s':>8}{'ratio':>8}{'accuracy, %':>14}")
    rows = measure(network, task, arguments.views)
    for row in rows:
        cells = (
            f"{row['cpu_seconds']:>8.1f}{row['times_engine']:>8.1f}{100 * row['accuracy']:>14.1f}"
        )
        print(f"{row['way']:<22}{cells}")
    print(f"channels chosen by both: {100 * rows[-1]['channels_in_common']:.1f} % of either's")
    if arguments.json:
        shared = {
            "network": arguments.network.stem,
            "domain": arguments.domain,
            "task": task.number,
            "views": arguments.views,
            "isa": _core.default_isa(),
            "torch": torch.__version__,
        }
        with arguments.json.open("a") as out:
            out.writelines(json.dumps({**shared, **row}) + "\n" for row in rows)
    difference = abs(rows[0]["accuracy"] - rows[-1]["accuracy"])
    if difference > LARGEST_DIFFERENCE:
        raise SystemExit(f"accuracies differ by {difference:.3f}: these times mean nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
