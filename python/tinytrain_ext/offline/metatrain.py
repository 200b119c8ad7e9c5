"""ProtoNet meta-training of a backbone (the paper's offline stage, after PMF).

Each episode is a few-shot task of the training classes: prototypes are the mean features of the
support images, the loss is the cross-entropy of the query images' scaled cosines to them (Eq. 1),
and its gradient goes through both. SGD with momentum, linear warm-up, half a cosine. On request the
loss of a cosine classifier over all training classes is added, as in pre-training.

With batch norm "frozen" it is folded into the convolutions first, as on the device, and weights and
biases are trained; images then do not see each other and any number of processes gives the same
result. With "trained" it normalises over the images of an episode and keeps running statistics.

Every random number comes from (seed, epoch, episode), so a run continued from its checkpoint gives
the same weights as one never interrupted, and the episodes do not depend on the number of
processes.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from ..episodes import Episode, FixedEpisodes
from .augment import TURNS, Augmentation, turn
from .backbones import Backbone
from .recipes import MetaRecipe
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

if TYPE_CHECKING:
    from .tinytl import TinyTL

__all__ = ["EpisodeLoss", "metatrain"]

CLASS_VECTOR_IMAGES = 20  # of each class, which the classifier's vectors begin as the mean of


class EpisodeLoss(nn.Module):
    """A backbone under Eq. 1: images of an episode -> loss and query accuracy.

    class_vectors: (classes, m) of the cosine classifier whose loss is added, `supervised` times.
    """

    def __init__(
        self,
        backbone: Backbone | TinyTL,
        logit_scale: float,
        label_smoothing: float = 0.0,
        supervised: float = 0.0,
        class_vectors: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        # Modules are used under the scale of the network that they stand beside.
        trained = isinstance(backbone, Backbone)
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale), requires_grad=trained)
        self.label_smoothing, self.supervised = label_smoothing, supervised
        self.class_vectors = self.class_scale = None
        if class_vectors is not None:
            self.class_vectors = nn.Parameter(class_vectors)
            self.class_scale = nn.Parameter(torch.tensor(logit_scale))

    def forward(
        self, images: Tensor, support_ways: Tensor, query_ways: Tensor, classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """images: (S + Q, 3, H, W), support first. The ways: (S,) and (Q,). classes: (S + Q,) of
        the classifier.

        Returns the mean cross-entropy over query images (with the classifier's over all of them)
        and the share of query images that is recognised.
        """
        features = self.backbone(images)
        support, query = features.split([len(support_ways), len(query_ways)])
        # A prototype's length does not matter to a cosine: the sum does for the mean.
        members = functional.one_hot(support_ways).to(features.dtype)
        prototypes = functional.normalize(members.T @ support)
        logits = self.logit_scale * functional.normalize(query) @ prototypes.T
        smoothing = self.label_smoothing
        loss = functional.cross_entropy(logits, query_ways, label_smoothing=smoothing)
        if self.class_vectors is not None and self.class_scale is not None:
            directions = functional.normalize(self.class_vectors)
            scores = self.class_scale * functional.normalize(features) @ directions.T
            class_loss = functional.cross_entropy(scores, classes, label_smoothing=smoothing)
            loss = loss + self.supervised * class_loss
        return loss, (logits.argmax(1) == query_ways).double().mean()


def metatrain(
    backbone: Backbone | TinyTL,
    logit_scale: float,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    recipe: MetaRecipe,
    run: Run,
) -> tuple[EpisodeLoss, tuple[Epoch, ...]]:
    """Meta-trains a backbone, or continues from the run's checkpoint.

    A backbone with batch norm normalises over each episode's images; to freeze it, fold it first
    (`Backbone.from_network(backbone.to_network(...))`). Of TinyTL the modules alone are trained, on
    images of the network's size, and not the logit scale. The backbone given stays as it is.

    images: (N, H, H, 3). labels: (N,). Returns the model (the averaged one, if the recipe has an
    average), in evaluation mode, and the history.

    Raises ValueError when the images do not suffice for an episode, the episodes do not divide
    evenly, or the checkpoint is of another run; NonFiniteError when the loss is not finite.
    """
    sampler = FixedEpisodes(labels, ways=recipe.ways, shots=recipe.shots, queries=recipe.queries)
    mine = run.ranks.shard("batch_episodes", recipe.batch_episodes)
    steps = recipe.episodes // recipe.batch_episodes
    dtype = next(backbone.parameters()).dtype
    _, classes = np.unique(labels, return_inverse=True)
    model = EpisodeLoss(
        copy.deepcopy(backbone),
        logit_scale,
        recipe.label_smoothing,
        recipe.supervised,
        _class_vectors(backbone, images, classes, recipe) if recipe.supervised else None,
    )
    model = model.to(run.ranks.device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = Learner(
        model,
        momentum=recipe.momentum,
        nesterov=False,
        weight_decay=recipe.weight_decay,
        average_decay=recipe.average_decay,
    )
    wrapped = run.ranks.wrap(model)

    def batch(place: tuple[int, int]) -> tuple[Tensor, Episode, Tensor]:
        rng = np.random.default_rng((recipe.seed, *place))
        episode = sampler.draw(rng)
        chosen = np.concatenate([episode.support, episode.query])
        drawn = Augmentation.draw(len(chosen), recipe.smallest_crop, recipe.jitter, rng)
        x = drawn.apply(images[chosen], recipe.size)
        if not recipe.rotated:
            return x, episode, torch.from_numpy(classes[chosen])
        turned = rng.random(episode.ways) < recipe.rotated
        turns = np.where(turned, rng.integers(1, TURNS, episode.ways), 0)
        turns = turns[np.concatenate([episode.support_ways, episode.query_ways])]
        return turn(x, turns), episode, torch.from_numpy(classes[chosen] * TURNS + turns)

    def train(epoch: int) -> Iterator[Step]:
        numbers = np.arange(recipe.episodes).reshape(steps, -1)[:, mine]
        batches = prefetched(batch, [(epoch, int(n)) for n in numbers.flat], run.ahead)
        for step in range(steps):
            rate = learning_rate(
                epoch + step / steps,
                initial=recipe.initial_learning_rate,
                peak=recipe.learning_rate,
                final=recipe.final_learning_rate,
                warmup=recipe.warmup_epochs,
                total=recipe.epochs,
            )
            loss_sum = accuracy = 0.0
            share = numbers.shape[1]
            for left in reversed(range(share)):
                x, episode, targets = next(batches)
                # Ranks exchange gradients once a step, with its last episode.
                local = left and isinstance(wrapped, DistributedDataParallel)
                with wrapped.no_sync() if local else nullcontext():  # type: ignore[operator]
                    loss, correct = wrapped(
                        x.to(run.ranks.device, dtype),
                        torch.from_numpy(episode.support_ways).to(run.ranks.device),
                        torch.from_numpy(episode.query_ways).to(run.ranks.device),
                        targets.to(run.ranks.device),
                    )
                    (loss / share).backward()
                loss_sum += finite(loss.item())
                accuracy += correct.item()
            learner.step(rate)
            yield Step(rate, recipe.size, loss_sum / share, accuracy / share)

    identity = {
        "training": "meta-train",
        "weights": _digest(backbone),
        **identity_of(images, labels),
        "recipe": asdict(recipe),
    }
    history = run_epochs(run, learner, identity, recipe.epochs, steps, train)
    result = learner.result
    assert isinstance(result, EpisodeLoss)  # narrows nn.Module for the type checker
    return result, history


def _class_vectors(
    backbone: Backbone | TinyTL,
    images: NDArray[np.uint8],
    classes: NDArray[np.int64],
    recipe: MetaRecipe,
) -> Tensor:
    """(classes, m) mean features of some images of each class, or of each turn of each class."""
    backbone = copy.deepcopy(backbone).eval()
    rng = np.random.default_rng((recipe.seed, recipe.epochs))  # of no episode
    vectors = []
    for number in range(classes.max() + 1):
        chosen = np.flatnonzero(classes == number)[:CLASS_VECTOR_IMAGES]
        # Crops of the whole image, at most flipped.
        x = Augmentation.draw(len(chosen), 1.0, 0.0, rng).apply(images[chosen], recipe.size)
        for turns in range(TURNS if recipe.rotated else 1):
            turned = torch.rot90(x, turns, (2, 3)).to(next(backbone.parameters()).dtype)
            with torch.no_grad():
                vectors.append(functional.normalize(backbone(turned)).mean(0))
    return functional.normalize(torch.stack(vectors))


def _digest(backbone: nn.Module) -> str:
    """Of the weights that the run begins with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
