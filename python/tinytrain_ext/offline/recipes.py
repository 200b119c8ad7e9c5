"""Recipes: everything trained weights depend on besides the images, as dataclasses and TOML.

A recipe comes from a preset in the package, changed by a TOML file of the user's, changed by flags.
Nothing here needs PyTorch.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["MetaRecipe", "PretrainRecipe", "Stage", "make", "preset", "preset_names", "read_toml"]

Recipe = TypeVar("Recipe", bound="PretrainRecipe | MetaRecipe")


# Inclusive; what is not named here is from 0 for floats and from 1 for whole numbers.
_RANGES = {
    "warmup_epochs": (0, math.inf),
    "seed": (0, math.inf),
    "momentum": (0, 1),
    "average_decay": (0, 1),
    "label_smoothing": (0, 1),
    "jitter": (0, 1),
    "rotated": (0, 1),
    "smallest_crop": (0.01, 1),
}


def _check_ranges(values: PretrainRecipe | MetaRecipe | Stage) -> None:
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if field.name == "stages":
            continue
        low, high = _RANGES.get(field.name, (1 if field.type == "int" else 0, math.inf))
        if not low <= value <= high or not math.isfinite(value):
            limits = f"from {low:g}" + (f" to {high:g}" if high < math.inf else "")
            raise ValueError(f"{field.name}: expected a number {limits}, got {value}")


@dataclass(frozen=True)
class Stage:
    """Epochs at one image size, in pixels, with crops of at least `smallest_crop` of the area."""

    size: int
    epochs: int
    smallest_crop: float = 0.2

    def __post_init__(self) -> None:
        _check_ranges(self)


@dataclass(frozen=True)
class PretrainRecipe:
    """Supervised pre-training.

    learning_rate: its peak, reached linearly after `warmup_epochs`; then a half cosine down to
    `final_learning_rate`.
    weight_decay: of convolution and class weights; batch norms and the logit scale have none.
    logit_scale: where the learned factor of the cosine starts.
    average_decay: of the moving average of the weights, per step; 0 keeps none.
    jitter: see `Augmentation.draw`.
    rotated: share of images that are turned by one, two or three quarters, each turn of a class
    being a class of its own.

    Raises ValueError naming a field that is out of range.
    """

    stages: tuple[Stage, ...] = (Stage(80, 50, 0.2), Stage(96, 9, 0.3), Stage(128, 15, 0.25))
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
    rotated: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_ranges(self)
        if not self.stages:
            raise ValueError("stages: expected at least one, got none")

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
class MetaRecipe:
    """ProtoNet meta-training. The defaults are the paper's.

    epochs, episodes: episodes are per epoch; `batch_episodes` of them make a step.
    ways, shots, queries: of an episode; shots and queries per class.
    learning_rate: its peak, reached linearly from `initial_learning_rate` after `warmup_epochs`;
    then a half cosine down to `final_learning_rate`.
    weight_decay: of weights; biases, batch norms and the logit scale have none.
    average_decay: of the moving average of the weights, per step; 0 keeps none.
    size: side of the training images in pixels. smallest_crop, jitter: see `Augmentation.draw`.
    rotated: share of an episode's classes whose images are all turned by the same one, two or three
    quarters.
    supervised: weight of the loss, over all of an episode's images, of a cosine classifier of all
    training classes (and of their turns, if some are rotated).

    Raises ValueError naming a field that is out of range.
    """

    epochs: int = 100
    episodes: int = 2000
    batch_episodes: int = 1
    ways: int = 5
    shots: int = 5
    queries: int = 15
    learning_rate: float = 5e-5
    initial_learning_rate: float = 1e-6
    final_learning_rate: float = 1e-6
    warmup_epochs: int = 5
    momentum: float = 0.9
    weight_decay: float = 0.0
    average_decay: float = 0.0
    size: int = 128
    smallest_crop: float = 0.08
    jitter: float = 0.4
    rotated: float = 0.0
    supervised: float = 0.0
    label_smoothing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_ranges(self)
        if self.episodes % self.batch_episodes:
            raise ValueError(
                f"episodes: expected a multiple of batch_episodes = {self.batch_episodes}, "
                f"got {self.episodes}"
            )


def preset_names(command: str) -> tuple[str, ...]:
    """The presets of "pre-train" or "meta-train"."""
    folder = resources.files(__package__) / "presets" / command
    return tuple(sorted(file.name.removesuffix(".toml") for file in folder.iterdir()))


def preset(command: str, name: str) -> dict[str, Any]:
    """A preset's fields.

    Raises ValueError, naming the ones there are, for any other name.
    """
    names = preset_names(command)
    if name not in names:
        raise ValueError(f"preset: expected one of {', '.join(names)}, got {name!r}")
    file = resources.files(__package__) / "presets" / command / f"{name}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's fields. Raises OSError, or ValueError naming the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not TOML: {error}") from error


def make(kind: type[Recipe], fields: Mapping[str, Any]) -> Recipe:
    """A recipe of these fields; those that are not given have their defaults.

    Raises ValueError naming a field that is unknown, of the wrong type or out of range.
    """
    values = dict(fields)
    if isinstance(values.get("stages"), list):
        values["stages"] = tuple(
            stage if isinstance(stage, Stage) else _typed(Stage, stage, "stages: ")
            for stage in values["stages"]
        )
    recipe: Recipe = _typed(kind, values, "")
    return recipe


def _typed(kind: type[Any], values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where}expected a table, got {values!r}")
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    unknown = sorted(values.keys() - types.keys())
    if unknown:
        raise ValueError(
            f"{where}{unknown[0]}: no such field; expected one of {', '.join(sorted(types))}"
        )
    checked = {}
    for name, value in values.items():
        if types[name] == "float" and type(value) is int:
            value = float(value)
        if types[name] in ("int", "float") and type(value).__name__ != types[name]:
            raise ValueError(f"{where}{name}: expected {types[name]}, got {value!r}")
        checked[name] = value
    try:
        return kind(**checked)
    except TypeError as error:
        raise ValueError(f"{where}{error}") from error
