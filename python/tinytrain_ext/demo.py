"""The task of `tinytrain demo`: a few-shot task drawn by Pillow, so that it needs no photos.

Five kinds of things, every drawing with its own shape, pose, colour, light and background. It shows
that adaptation works, and says nothing about photographs.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .images import LabelledImages
from .network import write_atomically

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

__all__ = ["CLASSES", "DemoTask", "draw", "draw_task", "save_images"]

SUPERSAMPLING = 2

Points = NDArray[np.float64]
# Polygons, painted in order: (n, 2) points, x to the right and y down, within about +-1; and how
# light each is, as a factor of the thing's colour.
Shape = list[tuple[Points, float]]


@dataclass(frozen=True, eq=False)
class DemoTask:
    """A support set, and a query set of other drawings of the same classes."""

    support: LabelledImages
    query: LabelledImages


def draw_task(
    size: int,
    *,
    shots: int = 5,
    queries: int = 20,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> DemoTask:
    """Draws `shots` support and `queries` query images (size, size, 3) of each class.

    The same seed gives the same drawings. progress: called with (images drawn, all images).
    """
    drawn, total = 0, len(CLASSES) * (shots + queries)
    sets = []
    for part, count in enumerate((shots, queries)):
        images = np.empty((len(CLASSES) * count, size, size, 3), np.uint8)
        labels = np.repeat(np.arange(len(CLASSES)), count)
        for index, label in enumerate(labels.tolist()):
            rng = np.random.default_rng((seed, part, label, index % count))
            images[index] = draw(CLASSES[label], size, rng)
            drawn += 1
            if progress is not None:
                progress(drawn, total)
        sets.append(LabelledImages(images, labels, CLASSES, paths=()))
    return DemoTask(*sets)


def draw(name: str, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One drawing (size, size, 3) of a thing of class `name`."""
    from PIL import Image, ImageDraw

    shape, colours = _THINGS[name]
    colour = np.array(colours[rng.integers(len(colours))]) + rng.normal(0, 20, 3)
    # Only the thing has edges that need more pixels than there will be.
    image = Image.fromarray(
        _background(size, rng).repeat(SUPERSAMPLING, 0).repeat(SUPERSAMPLING, 1)
    )
    _paint(ImageDraw.Draw(image), image.width, shape(rng), colour, rng)
    picture = np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float64)
    light, grain = rng.uniform(0.7, 1.1), rng.normal(0, 3, picture.shape)
    pixels: NDArray[np.uint8] = np.clip(picture * light + grain, 0, 255).astype(np.uint8)
    return pixels


def save_images(task: DemoTask, directory: str | os.PathLike[str]) -> None:
    """Writes the drawings for people to look at: DIRECTORY/{support,query}/CLASS/NUMBER.png, and
    DIRECTORY/task.png, one row a class, its support images left of as many of its query images.

    Raises OSError when a folder or file cannot be written.
    """
    root = Path(directory)
    for part, images in (("support", task.support), ("query", task.query)):
        for number, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
            folder = root / part / images.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            _save_png(folder / f"{number:03}.png", image)
    rows = []
    for label in range(len(task.support.classes)):
        shown = task.support.images[task.support.labels == label]
        others = task.query.images[task.query.labels == label][: len(shown)]
        rows.append(np.concatenate([*shown, *others], axis=1))
    _save_png(root / "task.png", np.concatenate(rows))


def _save_png(path: Path, image: NDArray[np.uint8]) -> None:
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG")
    write_atomically(path, encoded.getvalue())


def _paint(
    canvas: ImageDraw, side: int, shape: Shape, colour: Points, rng: np.random.Generator
) -> None:
    """Paints a shape in a pose of its own."""
    angle, mirror = rng.uniform(-0.4, 0.4), rng.choice((-1, 1))
    width = rng.uniform(0.6, 0.85)
    height = width * rng.uniform(0.8, 1.25)
    cos, sin = np.cos(angle), np.sin(angle)
    pose = np.array([[mirror * width * cos, mirror * width * sin], [-height * sin, height * cos]])
    centre = rng.uniform(-0.2, 0.2, 2)
    for points, light in shape:
        corners = ((points @ pose + centre + 1) * (side / 2)).ravel().tolist()
        red, green, blue = np.clip(colour * light, 0, 255).astype(int).tolist()
        canvas.polygon(corners, fill=(red, green, blue))


def _background(side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Two pale colours that run into each other, under faint stripes: (side, side, 3)."""
    rows, columns = np.mgrid[:side, :side] / side
    angle = rng.uniform(0, 2 * np.pi)
    along = (rows * np.cos(angle) + columns * np.sin(angle))[..., None]
    grey, tint = rng.uniform(130, 250, (2, 1)), rng.uniform(0, 255, (2, 3))
    first, second = 0.8 * grey + 0.2 * tint
    stripes = rng.uniform(0, 10) * np.sin(along * rng.uniform(5, 60))
    picture = first + (second - first) * along + stripes
    pixels: NDArray[np.uint8] = np.clip(picture, 0, 255).astype(np.uint8)
    return pixels


def _ellipse(
    x: float, y: float, width: float, height: float, start: float = 0, end: float = 2 * np.pi
) -> Points:
    t = np.linspace(start, end, 32)
    return np.stack([x + width * np.cos(t), y + height * np.sin(t)], axis=1)


def _ring(x: float, y: float, width: float, height: float, hole: float) -> Points:
    outer = _ellipse(x, y, width, height)
    inner = _ellipse(x, y, width * hole, height * hole)
    return np.concatenate([outer, inner[::-1]])


def _polygon(*points: tuple[float, float]) -> Points:
    return np.array(points, np.float64)


def _rectangle(left: float, top: float, right: float, bottom: float) -> Points:
    return _polygon((left, top), (right, top), (right, bottom), (left, bottom))


def _cup(rng: np.random.Generator) -> Shape:
    foot, top = rng.uniform(0.35, 0.6), rng.uniform(-0.8, -0.5)
    handle = _ring(0.7, 0, rng.uniform(0.3, 0.45), rng.uniform(0.35, 0.5), 0.65)
    return [
        (handle, 0.8),
        (_polygon((-0.7, top), (0.7, top), (foot, 0.8), (-foot, 0.8)), 1),
        (_ellipse(0, top, 0.7, 0.13), 0.5),
    ]


def _fish(rng: np.random.Generator) -> Shape:
    body, tail = rng.uniform(0.3, 0.5), rng.uniform(0.3, 0.55)
    return [
        (_polygon((0.4, 0), (1, -tail), (0.85, 0), (1, tail)), 0.8),
        (_polygon((-0.2, -body * 0.8), (0.1, -body - 0.3), (0.35, -body * 0.5)), 0.7),
        (_ellipse(-0.15, 0, 0.75, body), 1),
        (_ellipse(-0.55, -0.08, 0.08, 0.08), 0.2),
    ]


def _key(rng: np.random.Generator) -> Shape:
    bow = rng.uniform(0.3, 0.45)
    shape: Shape = [
        (_ring(-0.6, 0, bow, bow, rng.uniform(0.5, 0.7)), 1),
        (_rectangle(bow - 0.65, -0.09, 1, 0.09), 1),
    ]
    for x in np.linspace(0.95, 0.45, rng.integers(2, 4)):
        shape.append((_rectangle(x - 0.12, 0, x, rng.uniform(0.25, 0.4)), 1))
    return shape


def _leaf(rng: np.random.Generator) -> Shape:
    t = np.linspace(0, 1, 24)
    bulge = rng.uniform(0.35, 0.6) * np.sin(np.pi * t ** rng.uniform(0.6, 1.2))
    edges = [np.stack([2 * t - 1.1, side * bulge], axis=1) for side in (-1, 1)]
    return [
        (np.concatenate([edges[0], edges[1][::-1]]), 1),
        (_rectangle(-1.3, -0.04, 0.7, 0.04), 0.6),
    ]


def _mushroom(rng: np.random.Generator) -> Shape:
    stem, cap = rng.uniform(0.15, 0.3), rng.uniform(0.6, 1)
    shape: Shape = [
        (_polygon((-stem, 0), (stem, 0), (stem * 1.3, 0.9), (-stem * 1.3, 0.9)), 1.3),
        (_ellipse(0, 0.05, 0.85, cap, np.pi, 2 * np.pi), 0.9),
    ]
    for x in rng.uniform(-0.5, 0.5, rng.integers(0, 4)):
        shape.append((_ellipse(x, rng.uniform(-0.45, -0.15), 0.1, 0.08), 1.5))
    return shape


# What each kind of thing looks like, and the colours it comes in.
_THINGS: dict[
    str, tuple[Callable[[np.random.Generator], Shape], tuple[tuple[int, int, int], ...]]
] = {
    "cup": (_cup, ((200, 60, 60), (60, 90, 190), (230, 230, 230), (230, 180, 60))),
    "fish": (_fish, ((70, 110, 170), (230, 130, 40), (120, 140, 150), (190, 190, 200))),
    "key": (_key, ((200, 170, 70), (150, 150, 160), (110, 90, 60))),
    "leaf": (_leaf, ((60, 140, 50), (140, 160, 50), (190, 120, 40))),
    "mushroom": (_mushroom, ((200, 50, 40), (150, 100, 60), (220, 200, 170))),
}
CLASSES = tuple(_THINGS)
