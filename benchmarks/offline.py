"""Speed of the offline stage, against the same loops in plain PyTorch, interleaved in one run.

    python -m benchmarks.offline                  # MCUNet, 128 px, 5-way 5-shot 15-query episodes
    python -m benchmarks.offline --json rows.jsonl

Rows: meta-training with frozen batch norm (episodes of 100 images), pre-training (batches of 64).
Columns: ours, by `metatrain` and `pretrain` themselves, whole calls with their checkpoints; plain
PyTorch, the loop as one writes it (eager modules, batch norm not folded, NCHW, the same images and
augmentation); the input pipeline of ours alone; and decoding the batch's JPEG files anew, which the
cache saves. Random images and weights: neither matters to speed. One thread, CPU time, medians of
interleaved rounds.

With glibc, the GLIBC_TUNABLES of docs/offline.md keep PyTorch's large buffers from going back to
the system at every step, in every column alike; the rows say whether they were set.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from tinytrain_ext.architectures import ARCHITECTURES, operations
from tinytrain_ext.episodes import FixedEpisodes
from tinytrain_ext.images import load_image
from tinytrain_ext.offline.augment import Augmentation
from tinytrain_ext.offline.backbones import Backbone
from tinytrain_ext.offline.metatrain import metatrain
from tinytrain_ext.offline.pretrain import Classifier, pretrain
from tinytrain_ext.offline.recipes import MetaRecipe, PretrainRecipe, Stage
from tinytrain_ext.offline.training import Run

CLASSES, PER_CLASS, STORED = 16, 24, 84
CROP, JITTER = 0.2, 0.4


class Offline:
    """The loops to time, over `steps` steps each."""

    def __init__(self, network: str, size: int, steps: int, directory: Path) -> None:
        rng = np.random.default_rng(0)
        shape = (CLASSES * PER_CLASS, STORED, STORED, 3)
        self.images = rng.integers(0, 256, shape, np.uint8)
        self.labels = np.repeat(np.arange(CLASSES), PER_CLASS)
        self.architecture = ARCHITECTURES[network]
        self.size, self.steps, self.directory = size, steps, directory
        self.runs = 0
        torch.manual_seed(0)
        self.backbone = Backbone(operations(self.architecture))
        self.folded = Backbone.from_network(self.backbone.to_network(network))
        self.meta = MetaRecipe(
            epochs=1, episodes=steps, size=size, smallest_crop=CROP, learning_rate=1e-6
        )
        self.episodes = FixedEpisodes(self.labels, ways=5, shots=5, queries=15)
        self.files = []
        for number, pixels in enumerate(self.images[:100]):
            # Smooth, as photos are: noise would take longer to decode.
            image = Image.fromarray(pixels).resize((STORED // 6,) * 2).resize((STORED,) * 2)
            self.files.append(directory / f"{number}.jpg")
            image.save(self.files[-1], quality=90)

    def run(self) -> Run:
        """A folder of its own for each call: nothing is resumed."""
        self.runs += 1
        return Run(self.directory / str(self.runs))

    def our_metatraining(self) -> None:
        metatrain(self.folded, 10.0, self.images, self.labels, self.meta, self.run())

    def plain_metatraining(self) -> None:
        backbone = self.backbone.eval()
        scale = torch.nn.Parameter(torch.tensor(10.0))
        optimizer = torch.optim.SGD([*backbone.parameters(), scale], lr=1e-6, momentum=0.9)
        for step in range(self.steps):
            x, episode = self.episode(step)
            features = backbone(x.contiguous())
            support, query = features[:25], features[25:]
            prototypes = torch.stack([support[5 * way : 5 * way + 5].mean(0) for way in range(5)])
            logits = scale * F.cosine_similarity(query[:, None], prototypes, dim=-1)
            loss = F.cross_entropy(logits, torch.from_numpy(episode.query_ways))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def episode(self, step: int) -> Any:
        """What `metatrain` prepares for a step."""
        rng = np.random.default_rng((0, 0, step))
        episode = self.episodes.draw(rng)
        chosen = np.concatenate([episode.support, episode.query])
        drawn = Augmentation.draw(len(chosen), CROP, JITTER, rng)
        return drawn.apply(self.images[chosen], self.size), episode

    def metatraining_input(self) -> None:
        for step in range(self.steps):
            self.episode(step)

    def decoding(self) -> None:
        for _ in range(self.steps):
            for path in self.files:
                load_image(path, resize=STORED, input_size=STORED)

    def batches(self) -> NDArray[np.int64]:
        order = np.random.default_rng(0).permutation(len(self.images))
        return np.resize(order, (self.steps, 64))

    def our_pretraining(self) -> None:
        chosen = self.batches().ravel()
        recipe = PretrainRecipe(
            stages=(Stage(self.size, 1, CROP),), batch_size=64, learning_rate=1e-6
        )
        images, labels = self.images[chosen], self.labels[chosen]
        pretrain(self.architecture, images, labels, recipe, self.run())

    def plain_pretraining(self) -> None:
        model = Classifier(self.backbone, CLASSES, 10.0).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, nesterov=True)
        rng = np.random.default_rng(0)
        for batch in self.batches():
            drawn = Augmentation.draw(64, CROP, JITTER, rng)
            x = drawn.apply(self.images[batch], self.size).contiguous()
            loss = F.cross_entropy(model(x), torch.from_numpy(self.labels[batch]))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def pretraining_input(self) -> None:
        rng = np.random.default_rng(0)
        for batch in self.batches():
            Augmentation.draw(64, CROP, JITTER, rng).apply(self.images[batch], self.size)


def measure(network: str, size: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """One row a loop."""
    with tempfile.TemporaryDirectory() as directory:
        loops = Offline(network, size, steps, Path(directory))
        calls: dict[tuple[str, str], Callable[[], None]] = {
            ("meta-train", "ours"): loops.our_metatraining,
            ("meta-train", "plain PyTorch"): loops.plain_metatraining,
            ("meta-train", "input alone"): loops.metatraining_input,
            ("meta-train", "decoding alone"): loops.decoding,
            ("pre-train", "ours"): loops.our_pretraining,
            ("pre-train", "plain PyTorch"): loops.plain_pretraining,
            ("pre-train", "input alone"): loops.pretraining_input,
        }
        times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        for number in range(rounds + 1):
            for key, call in calls.items():
                start = time.process_time()
                call()
                if number:  # the first round warms up
                    times[key].append(time.process_time() - start)
    rows = []
    for (row, column), seconds in times.items():
        images = steps * (100 if row == "meta-train" else 64)
        shares = [s / o for s, o in zip(seconds, times[row, "ours"], strict=True)]
        rows.append(
            {
                "network": network,
                "size": size,
                "row": row,
                "column": column,
                "steps_per_second": steps / statistics.median(seconds),
                "images_per_second": images / statistics.median(seconds),
                "time_over_ours": statistics.median(shares),
                "time_over_ours_spread": [min(shares), max(shares)],
                "steps": steps,
                "rounds": rounds,
                "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
                "machine": platform.machine(),
                "torch": torch.__version__,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", default="mcunet", choices=sorted(ARCHITECTURES))
    parser.add_argument("--size", type=int, default=128, help="of the images, in pixels")
    parser.add_argument("--steps", type=int, default=4, help="of each loop in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="append one JSON line a row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.network, arguments.size, arguments.steps, arguments.rounds)
    print(f"{arguments.network}, {arguments.size} px, one thread, CPU time, medians")
    print(f"{'':<12}{'':<16}{'steps/s':>9}{'images/s':>10}  time over ours")
    for row in rows:
        low, high = row["time_over_ours_spread"]
        print(
            f"{row['row']:<12}{row['column']:<16}{row['steps_per_second']:9.2f}"
            f"{row['images_per_second']:10.0f}  "
            f"{row['time_over_ours']:.2f} ({low:.2f} to {high:.2f})"
        )
    if arguments.json:
        with arguments.json.open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
