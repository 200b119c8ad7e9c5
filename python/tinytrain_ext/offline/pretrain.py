"""Supervised pre-training of a backbone: a cosine classifier over the training classes.

    python -m tinytrain_ext.offline.pretrain --data DIR --split FILE --architecture mcunet \\
        --stages 80:50:0.2 96:9:0.3 128:15:0.25 --final-learning-rate 0.03 \\
        --work DIR --out FILE.safetensors

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

import argparse
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..architectures import ARCHITECTURES, Architecture
from ..errors import NonFiniteError
from ..network import Network, write_atomically
from .augment import augment
from .backbones import Backbone, embed, fold_batch_norm
from .evaluate_backbone import episode_accuracy
from .image_cache import cached_images, default_cache_directory, list_images, read_split

__all__ = ["Classifier", "Epoch", "Recipe", "Stage", "main", "pretrain", "to_network"]

CHECKPOINT_VERSION = 1
CHECKPOINT_KEY = "tinytrain_ext.pretrain"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """Epochs at one image size, in pixels, with crops of at least `smallest_crop` of the area."""

    size: int
    epochs: int
    smallest_crop: float = 0.2


@dataclass(frozen=True)
class Recipe:
    """Everything the trained weights depend on besides the architecture and the images.

    learning_rate: its peak, reached linearly after `warmup_epochs`; then a half cosine down to
    `final_learning_rate`.
    weight_decay: of convolution and class weights; batch norms and the logit scale have none.
    logit_scale: where the learned factor of the cosine starts.
    average_decay: of the moving average of the weights, per step.
    jitter: see `augment`.
    """

    stages: tuple[Stage, ...]
    batch_size: int = 64
    learning_rate: float = 0.1
    final_learning_rate: float = 0.0
    warmup_epochs: int = 3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    logit_scale: float = 10.0
    average_decay: float = 0.999
    jitter: float = 0.4
    seed: int = 0

    @property
    def epochs(self) -> int:
        """Of all stages together."""
        return sum(stage.epochs for stage in self.stages)

    def stage_of(self, epoch: int) -> Stage:
        """The stage of epoch 0, 1, ..."""
        for stage in self.stages:
            if epoch < stage.epochs:
                return stage
            epoch -= stage.epochs
        raise ValueError(f"epoch: expected less than {self.epochs}, got {epoch + self.epochs}")


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave.

    loss, accuracy (per cent): of the augmented training images. validation: accuracy in per cent of
    5-way 5-shot episodes, where it was measured.
    """

    epoch: int
    size: int
    learning_rate: float
    loss: float
    accuracy: float
    logit_scale: float
    seconds: float
    validation: float | None = None


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


def to_network(backbone: Backbone, name: str, input_size: int = 128, resize: int = 146) -> Network:
    """The backbone as the device runs it: batch norm folded, images in [-1, 1]."""
    weights, biases = fold_batch_norm(backbone)
    return Network(
        name=name,
        operations=backbone.operations,
        weights=weights,
        biases=biases,
        input_size=input_size,
        resize=resize,
    )


def pretrain(
    architecture: Architecture,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    recipe: Recipe,
    checkpoint: Path,
    *,
    validate: Callable[[Backbone], float] | None = None,
    validate_every: int = 5,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> tuple[Backbone, tuple[Epoch, ...]]:
    """Trains, or continues from `checkpoint` if that file exists.

    Returns the averaged backbone, in evaluation mode, and the history.

    images: (N, H, H, 3). labels: (N,) in 0 .. classes - 1.
    checkpoint: rewritten, atomically, after every epoch.
    validate: given the averaged backbone, called after every `validate_every`-th epoch and the
    last one; recorded only, it chooses nothing.
    on_epoch: called after each epoch's checkpoint is written.

    Raises ValueError when the images are fewer than a batch or the checkpoint is of another recipe,
    architecture or number of classes; NonFiniteError when the loss is not finite.
    """
    classes = int(labels.max()) + 1
    steps = len(images) // recipe.batch_size
    if steps == 0:
        raise ValueError(
            f"images: expected at least a batch of {recipe.batch_size}, got {len(images)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = Classifier(Backbone(architecture), classes, recipe.logit_scale)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    moving_average = get_ema_multi_avg_fn(recipe.average_decay)  # type: ignore[no-untyped-call]
    average = AveragedModel(model, multi_avg_fn=moving_average, use_buffers=True)
    optimizer = _optimizer(model, recipe)
    identity = {
        "architecture": asdict(architecture),
        "classes": classes,
        "images": len(images),
        "recipe": asdict(recipe),
    }
    history: list[Epoch] = []
    if checkpoint.exists():
        history = _restore(checkpoint, model, average, optimizer, identity)
        logger.info("continuing %s after epoch %d", checkpoint, len(history))
    for epoch in range(len(history), recipe.epochs):
        start = time.perf_counter()
        rng = np.random.default_rng((recipe.seed, epoch))
        order = rng.permutation(len(images))[: steps * recipe.batch_size]
        model.train()
        loss_sum, correct = 0.0, 0
        stage = recipe.stage_of(epoch)
        bar = tqdm(order.reshape(steps, -1), f"epoch {epoch + 1}/{recipe.epochs}", disable=None)
        for step, batch in enumerate(bar):
            rate = _learning_rate(recipe, epoch + step / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            x = augment(images[batch], stage.size, stage.smallest_crop, recipe.jitter, rng)
            target = torch.from_numpy(labels[batch])
            logits = model(x)
            loss = functional.cross_entropy(logits, target, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            value = loss.item()
            if not math.isfinite(value):
                raise NonFiniteError(f"loss: expected a finite number, got {value}")
            optimizer.step()
            average.update_parameters(model)
            loss_sum += value
            correct += int((logits.argmax(1) == target).sum())
        seconds = time.perf_counter() - start
        validation = None
        if validate and ((epoch + 1) % validate_every == 0 or epoch + 1 == recipe.epochs):
            validation = validate(_averaged_backbone(average))
        record = Epoch(
            epoch=epoch + 1,
            size=stage.size,
            learning_rate=rate,
            loss=loss_sum / steps,
            accuracy=100 * correct / len(order),
            logit_scale=model.logit_scale.item(),
            seconds=seconds,
            validation=validation,
        )
        history.append(record)
        _save(checkpoint, model, average, optimizer, identity, history)
        if on_epoch:
            on_epoch(record)
    return _averaged_backbone(average), tuple(history)


def _optimizer(model: Classifier, recipe: Recipe) -> torch.optim.SGD:
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return torch.optim.SGD(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=True,
        foreach=True,
    )


def _learning_rate(recipe: Recipe, position: float) -> float:
    """At a position in epochs: linear warm-up, then a half cosine."""
    warmup = min(recipe.warmup_epochs, recipe.epochs - 1)
    if position < warmup:
        return recipe.learning_rate * position / warmup
    progress = (position - warmup) / (recipe.epochs - warmup)
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.final_learning_rate + share * (recipe.learning_rate - recipe.final_learning_rate)


def _averaged_backbone(average: AveragedModel) -> Backbone:
    classifier = average.module
    assert isinstance(classifier, Classifier)  # narrows nn.Module for the type checker
    return classifier.backbone.eval()


def _save(
    path: Path,
    model: Classifier,
    average: AveragedModel,
    optimizer: torch.optim.SGD,
    identity: dict[str, Any],
    history: list[Epoch],
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    description = {
        "version": CHECKPOINT_VERSION,
        **identity,
        "history": [asdict(record) for record in history],
    }
    # safetensors refuses channels_last strides; the values are the same either way.
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(plain, {CHECKPOINT_KEY: json.dumps(description)}))


def _restore(
    path: Path,
    model: Classifier,
    average: AveragedModel,
    optimizer: torch.optim.SGD,
    identity: dict[str, Any],
) -> list[Epoch]:
    with safe_open(path, framework="pt") as file:
        description = json.loads((file.metadata() or {}).get(CHECKPOINT_KEY, "{}"))
        expected = json.loads(json.dumps({"version": CHECKPOINT_VERSION, **identity}))
        for name, value in expected.items():
            if description.get(name) != value:
                raise ValueError(
                    f"{path}: a checkpoint of another run: {name}: expected {value}, "
                    f"got {description.get(name)}"
                )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def part(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }

    model.load_state_dict(part("model."))
    average.load_state_dict(part("average."))
    momentum = part("momentum.")
    for name, parameter in model.named_parameters():
        buffer = torch.empty_like(parameter).copy_(momentum[name]).detach()
        optimizer.state[parameter]["momentum_buffer"] = buffer
    return [Epoch(**record) for record in description["history"]]


def _stage(text: str) -> Stage:
    try:
        size, epochs, *crop = text.split(":")
        stage = Stage(int(size), int(epochs), *map(float, crop))
    except (TypeError, ValueError):
        stage = Stage(0, 0)
    if min(stage.size, stage.epochs) < 1 or not 0 < stage.smallest_crop <= 1:
        raise argparse.ArgumentTypeError(f"expected SIZE:EPOCHS[:SMALLEST_CROP], got {text!r}")
    return stage


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains on the split's "train" classes, watches its "val" classes, writes a network file."""
    parser = argparse.ArgumentParser(
        prog="python -m tinytrain_ext.offline.pretrain",
        description="Supervised pre-training of a backbone on a folder of class folders.",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--split", type=Path, required=True, help="JSON {class folder: subset}")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="mcunet")
    parser.add_argument(
        "--stages",
        type=_stage,
        nargs="+",
        required=True,
        metavar="SIZE:EPOCHS[:SMALLEST_CROP]",
        help="image size in pixels, for how many epochs, smallest crop as a share of the area; "
        "in order",
    )
    parser.add_argument("--work", type=Path, required=True, help="for checkpoint and history")
    parser.add_argument("--out", type=Path, required=True, help="the network file to write")
    parser.add_argument("--name", help="the network's name; default: the architecture's")
    parser.add_argument("--input-size", type=int, default=128)
    parser.add_argument("--resize", type=int, default=146)
    parser.add_argument(
        "--stored-size", type=int, default=146, help="side in pixels of the stored training images"
    )
    parser.add_argument("--validate-every", type=int, default=5, metavar="EPOCHS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=default_cache_directory())
    for field in dataclasses.fields(Recipe):
        if field.name != "stages":
            assert isinstance(field.default, int | float)
            parser.add_argument(
                f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default
            )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    recipe = Recipe(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe)}
        | {"stages": tuple(options.stages)}
    )
    paths, labels = list_images(options.data, read_split(options.split, "train"))
    images = cached_images(paths, options.stored_size, options.stored_size, options.cache)
    val_paths, val_labels = list_images(options.data, read_split(options.split, "val"))
    val_images = cached_images(val_paths, options.resize, options.input_size, options.cache)
    name = options.name or options.architecture

    def validate(backbone: Backbone) -> float:
        network = to_network(backbone, name, options.input_size, options.resize)
        return episode_accuracy(
            embed(network, val_images),
            val_labels,
            ways=5,
            shots=5,
            episodes=400,
            rng=np.random.default_rng(recipe.seed),
        ).mean

    def log(record: Epoch) -> None:
        logger.info("%s", json.dumps(asdict(record)))

    backbone, history = pretrain(
        ARCHITECTURES[options.architecture],
        images,
        labels,
        recipe,
        options.work / "checkpoint.safetensors",
        validate=validate,
        validate_every=options.validate_every,
        on_epoch=log,
    )
    records = json.dumps([asdict(record) for record in history], indent=1)
    write_atomically(options.work / "history.json", (records + "\n").encode())
    to_network(backbone, name, options.input_size, options.resize).save(options.out)


if __name__ == "__main__":
    main()
