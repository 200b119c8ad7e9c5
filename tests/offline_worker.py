"""Meta-training of a tiny network with fixed data; as a program, one process of a distributed run.

offline_worker.py DIRECTORY DTYPE, with the environment that torchrun gives.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from offline_cases import TINY
from tinytrain_ext.architectures import operations
from tinytrain_ext.offline.backbones import Backbone
from tinytrain_ext.offline.metatrain import metatrain
from tinytrain_ext.offline.recipes import MetaRecipe
from tinytrain_ext.offline.training import Ranks, Run, process_group

LABELS = np.repeat(np.arange(4), 10)
COLOURS = np.array([[0, 0, 100], [0, 100, 0], [100, 0, 0], [100, 100, 0]])
NOISE = np.random.default_rng(0).integers(0, 155, (len(LABELS), 20, 20, 3))
IMAGES = (COLOURS[LABELS][:, None, None] + NOISE).astype(np.uint8)
META = MetaRecipe(
    epochs=4,
    episodes=8,
    batch_episodes=4,
    ways=3,
    shots=2,
    queries=3,
    learning_rate=0.005,
    warmup_epochs=1,
    average_decay=0.9,
    rotated=0.5,
    size=16,
    seed=3,
)


def meta_losses(directory: Path, dtype: str, ranks: Ranks) -> list[float]:
    """The loss of each epoch."""
    torch.manual_seed(0)
    backbone = Backbone.from_network(Backbone(operations(TINY)).to_network("t", input_size=16))
    backbone.to(getattr(torch, dtype))
    run = Run(directory, ranks=ranks)
    return [record.loss for record in metatrain(backbone, 10.0, IMAGES, LABELS, META, run)[1]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group() as joined:
        meta_losses(Path(sys.argv[1]), sys.argv[2], joined)
