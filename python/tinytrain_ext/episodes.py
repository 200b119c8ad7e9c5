"""Few-shot episodes: which images are support and which are query, and what accuracies come to.

An episode is drawn from the labels of an image set alone; what the images are, and what is done
with them, is the caller's. Meta-training, the 600-episode evaluation and the benchmarks share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Episode", "FixedEpisodes", "mean_and_interval"]


@dataclass(frozen=True, eq=False)
class Episode:
    """One few-shot task, as positions in an image set.

    classes: (ways,) labels in the set; way k of the episode is `classes[k]`.
    support: (S,) and query: (Q,) positions of images, disjoint.
    support_ways: (S,) and query_ways: (Q,) their ways, 0 .. ways - 1.
    """

    classes: NDArray[np.int64]
    support: NDArray[np.int64]
    support_ways: NDArray[np.int64]
    query: NDArray[np.int64]
    query_ways: NDArray[np.int64]

    @property
    def ways(self) -> int:
        """Number of classes."""
        return len(self.classes)


class FixedEpisodes:
    """Episodes of a fixed number of ways, shots and queries, drawn from an image set.

    labels: (N,) of the set's images. shots, queries: per class.

    Raises ValueError when there are too few classes, or images in a class.
    """

    def __init__(self, labels: NDArray[np.int64], *, ways: int, shots: int, queries: int) -> None:
        for what, number in (("ways", ways), ("shots", shots), ("queries", queries)):
            if number < 1:
                raise ValueError(f"{what}: expected at least 1, got {number}")
        self._classes = np.unique(labels)
        self._members = [np.flatnonzero(labels == label) for label in self._classes]
        if len(self._members) < ways:
            raise ValueError(f"ways: expected at most the {len(self._members)} classes, got {ways}")
        smallest = min(map(len, self._members))
        if smallest < shots + queries:
            raise ValueError(
                f"shots + queries: expected at most the {smallest} images of the smallest class, "
                f"got {shots} + {queries}"
            )
        self.ways, self.shots, self.queries = ways, shots, queries

    def draw(self, rng: np.random.Generator) -> Episode:
        """Distinct classes uniformly, then distinct images of each uniformly.

        Support and query are ordered by way: all images of way 0 come first.
        """
        classes = rng.choice(len(self._members), self.ways, replace=False)
        each = self.shots + self.queries
        chosen = np.stack([rng.choice(self._members[c], each, replace=False) for c in classes])
        return Episode(
            classes=self._classes[classes],
            support=chosen[:, : self.shots].ravel(),
            support_ways=np.repeat(np.arange(self.ways), self.shots),
            query=chosen[:, self.shots :].ravel(),
            query_ways=np.repeat(np.arange(self.ways), self.queries),
        )


def mean_and_interval(values: Sequence[float] | NDArray[np.floating]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval (normal approximation).

    The interval of a single value is NaN. Raises ValueError for no values.
    """
    if len(values) == 0:
        raise ValueError("values: expected at least one, got none")
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return float(np.mean(values)), 1.96 * deviation / float(np.sqrt(len(values)))
