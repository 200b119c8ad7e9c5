"""Supervised pre-training of a backbone: a cosine classifier over the training classes.

Logits are scale * cos(feature, class vector), the form of Eq. 1, so the features are trained in the
geometry the prototypes use. SGD with Nesterov momentum, label smoothing, warm-up and cosine decay;
an exponential moving average of the weights is what is exported. Most epochs run at a small image
size, where they are cheap, the last ones at the size the network is used at.

On miniImageNet's 64 classes, decaying the learning rate to zero went on fitting the training
classes and lost accuracy on new ones; `final_learning_rate` keeps it up, and the average does what
the decay is for.

Every random number comes from (seed, epoch), so a run continued from its checkpoint gives the same
weights as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ..architectures import Architecture, Block, operations
from .augment import TURNS, Augmentation, turn
from .backbones import Backbone
from .checkpoints import load_checkpoint
from .recipes import PretrainRecipe
from .training import (
    Epoch,
    Learner,
    Run,
    Step,
    finite,
    identity_of,
    learning_rate,
    prefetched,
    run_epochs,
)

__all__ = ["Classifier", "pretrain", "pretrained"]


class Classifier(nn.Module):
    """A backbone under a cosine classifier: (N, 3, H, W) -> logits (N, classes)."""

    def __init__(self, backbone: Backbone, classes: int, logit_scale: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.class_vectors = nn.Parameter(torch.empty(classes, backbone.feature_dim))
        nn.init.normal_(self.class_vectors, std=backbone.feature_dim**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale))

    def forward(self, images: Tensor) -> Tensor:
        features = functional.normalize(self.backbone(images))
        return self.logit_scale * features @ functional.normalize(self.class_vectors).T


def pretrain(
    architecture: Architecture,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    recipe: PretrainRecipe,
    run: Run,
) -> tuple[Classifier, tuple[Epoch, ...]]:
    """Trains a backbone from random weights, or continues from the run's checkpoint.

    images: (N, H, H, 3). labels: (N,) in 0 .. classes - 1. Returns the averaged model, in
    evaluation mode, and the history.

    Raises ValueError when the images are fewer than a batch, a batch does not divide evenly over
    the processes, or the checkpoint is of another run; NonFiniteError when the loss is not finite.
    """
    classes = int(labels.max()) + 1
    steps = len(images) // recipe.batch_size
    if steps == 0:
        raise ValueError(
            f"images: expected at least a batch of {recipe.batch_size}, got {len(images)}"
        )
    mine = run.ranks.shard("batch_size", recipe.batch_size)
    device = run.ranks.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        turned_classes = classes * (TURNS if recipe.rotated else 1)
        model = Classifier(Backbone(operations(architecture)), turned_classes, recipe.logit_scale)
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device.type == "cuda" and run.ranks.size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    learner = Learner(
        model,
        momentum=recipe.momentum,
        nesterov=True,
        weight_decay=recipe.weight_decay,
        average_decay=recipe.average_decay,
    )
    wrapped = run.ranks.wrap(model)

    def train(epoch: int) -> Iterator[Step]:
        rng = np.random.default_rng((recipe.seed, epoch))
        order = rng.permutation(len(images))[: steps * recipe.batch_size].reshape(steps, -1)
        stage = recipe.stage_of(epoch)

        def batch(chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
            # Drawn for the whole batch: every rank draws the same and applies its part.
            drawn = Augmentation.draw(len(chosen), stage.smallest_crop, recipe.jitter, rng)
            part = chosen[mine]
            x = drawn[mine].apply(images[part], stage.size)
            if not recipe.rotated:
                return x, torch.from_numpy(labels[part])
            turned = rng.random(len(chosen)) < recipe.rotated
            turns = np.where(turned, rng.integers(1, TURNS, len(chosen)), 0)[mine]
            return turn(x, turns), torch.from_numpy(labels[part] * TURNS + turns)

        for step, (x, target) in enumerate(prefetched(batch, order, run.ahead)):
            rate = learning_rate(
                epoch + step / steps,
                initial=0.0,
                peak=recipe.learning_rate,
                final=recipe.final_learning_rate,
                warmup=recipe.warmup_epochs,
                total=recipe.epochs,
            )
            target = target.to(device)
            logits = wrapped(x.to(device))
            loss = functional.cross_entropy(logits, target, label_smoothing=recipe.label_smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            value = finite(loss.item())
            learner.step(rate)
            correct = (logits.argmax(1) == target).double().mean().item()
            yield Step(rate, stage.size, value, correct)

    identity = {
        "training": "pre-train",
        "architecture": asdict(architecture),
        **identity_of(images, labels),
        "recipe": asdict(recipe),
    }
    history = run_epochs(run, learner, identity, recipe.epochs, steps, train)
    result = learner.result
    assert isinstance(result, Classifier)  # narrows nn.Module for the type checker
    return result, history


def pretrained(directory: Path) -> Backbone:
    """The averaged backbone of a pre-training run's folder, with its batch norms.

    Raises FileNotFoundError when there is no checkpoint, ValueError when it is of something else.
    """
    checkpoint = load_checkpoint(directory)
    if checkpoint is None:
        raise FileNotFoundError(f"{directory}: expected the checkpoint of a pre-training run")
    if checkpoint.identity.get("training") != "pre-train":
        raise ValueError(f"{directory}: expected a pre-training run, got a run of another training")
    table = checkpoint.identity["architecture"]
    blocks = tuple(Block(**block) for block in table["blocks"])
    backbone = Backbone(operations(Architecture(**{**table, "blocks": blocks})))
    averaged = checkpoint.part("average.module.backbone.")
    backbone.load_state_dict(averaged or checkpoint.part("model.backbone."))
    return backbone
