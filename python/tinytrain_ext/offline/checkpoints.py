"""Checkpoints of a training run: two generations, each written whole or not at all.

A checkpoint is a safetensors file of the run's tensors whose metadata is a JSON object: what run it
is of (`identity`), how many epochs are done, and the history. The generations are two files written
in turn, so that one sound checkpoint exists at every moment, even if the other is damaged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..network import write_atomically

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]

VERSION = 2
METADATA_KEY = "tinytrain_ext.checkpoint"
GENERATIONS = ("checkpoint.0.safetensors", "checkpoint.1.safetensors")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a run needs to go on.

    identity: everything that must be the same for a run to be the same run, as JSON has it.
    history: a record per epoch done. tensors: by name.
    """

    identity: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    tensors: Mapping[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint over the older of the two generations.

    Raises OSError naming the file; the newer generation stays as it was.
    """
    description = {
        "version": VERSION,
        "identity": checkpoint.identity,
        "history": checkpoint.history,
    }
    # safetensors refuses channels_last strides; the values are the same either way.
    plain = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
    target = directory / GENERATIONS[len(checkpoint.history) % 2]
    write_atomically(target, save(plain, {METADATA_KEY: json.dumps(description)}))


def load_checkpoint(
    directory: Path, identity: Mapping[str, Any] | None = None
) -> Checkpoint | None:
    """The newest sound checkpoint of a run's folder, or None where there is none.

    A damaged generation is skipped, with a warning, if the other one is sound.

    Raises ValueError when it is not of the run that `identity` describes, naming the difference, or
    when generations exist but none is sound.
    """
    sound: list[Checkpoint] = []
    damaged: list[str] = []
    for path in (directory / name for name in GENERATIONS):
        if not path.exists():
            continue
        try:
            sound.append(_read(path))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            damaged.append(f"{path}: {error}")
    if not sound:
        if damaged:
            raise ValueError(f"no sound checkpoint: {'; '.join(damaged)}")
        return None
    for message in damaged:
        logger.warning("skipping a damaged checkpoint: %s", message)
    newest = max(sound, key=lambda checkpoint: len(checkpoint.history))
    if identity is not None:
        _check_identity(directory, newest.identity, json.loads(json.dumps(identity)))
    return newest


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        description = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        if not isinstance(description, dict) or description.get("version") != VERSION:
            raise ValueError(f"not a checkpoint of version {VERSION}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Checkpoint(description["identity"], description["history"], tensors)


def _check_identity(directory: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name in expected.keys() | found.keys():
        one, other = expected.get(name), found.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            _check_identity(directory, other, one)
        elif one != other:
            raise ValueError(
                f"{directory}: holds a checkpoint of another run: {name}: expected {one}, "
                f"got {other}"
            )
