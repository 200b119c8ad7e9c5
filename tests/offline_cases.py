"""A tiny architecture and a tiny folder of images, for the tests of the offline stage."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from tinytrain_ext.architectures import Architecture, Block

TINY = Architecture(
    name="tiny",
    stem_channels=8,
    blocks=(
        Block(3, 8, 8, 8, 1, False),
        Block(3, 8, 16, 8, 1, True),
        Block(5, 8, 24, 16, 2, False),
    ),
    feature_mix=24,
)


def write_folder(root: Path) -> Path:
    """Ten class folders of 20 small images, five of them training classes, and the split.

    A class has a colour of its own, so there is something to learn.
    """
    rng = np.random.default_rng(0)
    split = {f"class{number}": "train" if number < 5 else "val" for number in range(10)}
    for name in split:
        (root / "data" / name).mkdir(parents=True)
        colour = rng.integers(0, 128, 3)
        for number in range(20):
            pixels = (colour + rng.integers(0, 128, (24, 30, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(root / "data" / name / f"{number:02d}.png")
    (root / "split.json").write_text(json.dumps(split))
    return root


@contextmanager
def disk_of(file_bytes: int) -> Iterator[None]:
    """No file can grow beyond this: writing fails as it does on a full disk, but for its number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
