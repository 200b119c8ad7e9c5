"""Pseudo-queries of fine-tuning: augmented views of the support photos, fresh or from a fixed set.

The paper draws new views for every iteration. A fixed set of a few views comes round again and
again, and since nothing before the first trained layer changes, what the frozen prefix makes of a
view need be computed only once: an iteration then costs no more than its trainable tail.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .images import Augmentation, draw_augmentations

if TYPE_CHECKING:
    from .session import Prefix

__all__ = ["PseudoQueries", "Views"]

# Drawing between two steps finds its code gone from the caches; several at once pay for that once.
_DRAWN_AHEAD = 64


@dataclass(frozen=True)
class Views:
    """A fixed set of augmented views of each support photo, taken in turns by the iterations.

    count: views of each photo. cache_bytes: room, beside the training arena, for what the frozen
    prefix makes of them; as many views as it carries are kept, the others are computed again, with
    the same result to the bit. folder: keep them in a nameless temporary file there, memory-mapped,
    instead of in RAM.
    Raises ValueError for a count below 1 or a negative cache_bytes.
    """

    count: int = 8
    cache_bytes: int = 32 << 20
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count: expected at least 1 view, got {self.count}")
        if self.cache_bytes < 0:
            raise ValueError(f"cache_bytes: expected 0 or more, got {self.cache_bytes}")


class Prefixed(Protocol):
    """What computes the same of a view every time before it trains on it: a `Session`."""

    @property
    def prefix_shape(self) -> tuple[int, int, int] | None: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def prefix(
        self, images: NDArray[np.uint8], augmentation: Augmentation, out: NDArray[Any]
    ) -> Prefix: ...


class PseudoQueries:
    """One augmented view of every support photo for each iteration.

    session: what will read them; images: (N, H, W, 3) uint8, the support photos; views: the fixed
    set, or None for fresh views each time; iterations: how many will be asked for. Prefix outputs
    are cached where that pays: where there is a prefix, and a view comes round more than once.

    cached_bytes: size of the cache. Raises OSError if views.folder has no room for it.
    """

    def __init__(
        self,
        session: Prefixed,
        images: NDArray[np.uint8],
        rng: np.random.Generator,
        *,
        views: Views | None,
        iterations: int,
    ) -> None:
        self._session, self._images, self._rng = session, images, rng
        self._iterations = iterations
        self._ahead: list[Augmentation] = []
        self._fixed = self._draw(min(views.count, iterations)) if views else []
        self._cache: list[Prefix | None] = [None] * len(self._fixed)
        self._room: NDArray[Any] | None = None
        self.cached_bytes = 0
        shape = session.prefix_shape
        if views is None or shape is None or iterations <= views.count:
            return
        view_bytes = len(images) * math.prod(shape) * session.dtype.itemsize
        count = min(views.count, views.cache_bytes // view_bytes)
        if count:
            self.cached_bytes = count * view_bytes
            self._room = _room((count, len(images), *shape), session.dtype, views.folder)

    def view(self, iteration: int) -> tuple[NDArray[np.uint8] | Prefix, Augmentation | None]:
        """What `Session.proto_backward` takes: photos and their draw, or cached prefix outputs."""
        if not self._fixed:
            if not self._ahead:
                count = max(1, min(_DRAWN_AHEAD, self._iterations - iteration))
                self._ahead = self._draw(count)[::-1]
            return self._images, self._ahead.pop()
        index = iteration % len(self._fixed)
        if self._room is None or index >= len(self._room):
            return self._images, self._fixed[index]
        cached = self._cache[index]
        if cached is None:
            cached = self._session.prefix(self._images, self._fixed[index], self._room[index])
            self._cache[index] = cached
        return cached, None

    def _draw(self, count: int) -> list[Augmentation]:
        return draw_augmentations(count, len(self._images), self._images.shape[1], self._rng)


def _room(shape: tuple[int, ...], dtype: np.dtype[Any], folder: Path | None) -> NDArray[Any]:
    if folder is None:
        return np.empty(shape, dtype)
    import tempfile  # here: it loads much, and few ask for a file

    with tempfile.TemporaryFile(dir=folder) as file:
        # Blocks are taken now: a full disk is an error here, not a bus error at some later write.
        os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)
        return np.memmap(file, dtype, "r+", shape=shape)
