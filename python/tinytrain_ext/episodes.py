"""Few-shot episodes: which images are support and which are query, and what accuracies come to.

An episode is drawn from the labels of an image set alone; what the images are, and what is done
with them, is the caller's. Meta-training, the 600-episode evaluation and the benchmarks share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Episode", "FixedEpisodes", "VariousEpisodes", "mean_and_interval"]

# Meta-Dataset (Triantafillou et al., ICLR 2020, section 3.2 and its released sampler).
MIN_WAYS, MAX_WAYS = 5, 50
MAX_QUERIES = 10
MAX_SUPPORT, MAX_SUPPORT_OF_CLASS = 500, 100
LOG_WEIGHT = (np.log(0.5), np.log(2.0))


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


class VariousEpisodes:
    """Episodes of various ways and shots, as Meta-Dataset draws them (the paper's Appendix B).

    Ways: uniform in 5 to 50, or to the number of classes. Queries of a class: 10, or half of the
    smallest class of the episode. Support: a random share of what remains (counting at most 100
    images of a class), at most 500 images, divided unevenly among the classes.

    labels: (N,) of the set's images. superclasses: (N,), one of them is drawn first and all classes
    of the episode come from it, such as the characters of one of Omniglot's alphabets.
    tracks: (N,), images of one track are near-duplicates (frames of a film): a track never serves
    support and query at once; without it only single images are kept apart. largest_support: caps
    the support below Meta-Dataset's 500.

    Raises ValueError when fewer than 5 classes can give a support and a query image, or
    largest_support is below 50, the most ways.
    """

    def __init__(
        self,
        labels: NDArray[np.int64],
        *,
        superclasses: NDArray[np.int64] | None = None,
        tracks: NDArray[np.int64] | None = None,
        largest_support: int = MAX_SUPPORT,
    ) -> None:
        if largest_support < MAX_WAYS:
            raise ValueError(
                f"largest_support: expected at least {MAX_WAYS}, got {largest_support}"
            )
        # A class is its images in groups that stay on one side: tracks, or single images.
        self._classes: dict[int, list[NDArray[np.int64]]] = {}
        for label in np.unique(labels).tolist():
            images = np.flatnonzero(labels == label)
            of = images if tracks is None else tracks[images]
            groups = [images[of == group] for group in np.unique(of)]
            if len(groups) > 1:
                self._classes[label] = groups
        usable = np.array(sorted(self._classes), np.int64)
        homes = usable * 0
        if superclasses is not None:
            homes = np.array([superclasses[self._classes[c][0][0]] for c in usable.tolist()])
        self._superclasses = [
            usable[homes == home] for home in np.unique(homes) if (homes == home).sum() >= MIN_WAYS
        ]
        if not self._superclasses:
            raise ValueError(
                f"labels: expected at least {MIN_WAYS} classes with images for both sides"
                f"{'' if superclasses is None else ' in one superclass'}, got {len(usable)}"
            )
        self._largest_support = largest_support

    def draw(self, rng: np.random.Generator) -> Episode:
        """One episode; support and query are ordered by way."""
        candidates = self._superclasses[rng.integers(len(self._superclasses))]
        ways = int(rng.integers(MIN_WAYS, min(MAX_WAYS, len(candidates)) + 1))
        classes = rng.choice(candidates, ways, replace=False)
        sizes = np.array([sum(map(len, self._classes[c])) for c in classes.tolist()])
        queries = min(MAX_QUERIES, int(sizes.min()) // 2)
        sides = [_divided(self._classes[c], queries, rng) for c in classes.tolist()]
        remaining = np.array([len(support) for support, _ in sides])
        shots = _shots(sizes, remaining, self._largest_support, rng)
        support = [
            rng.choice(images, count, replace=False)
            for (images, _), count in zip(sides, shots, strict=True)
        ]
        query = [images for _, images in sides]
        return Episode(
            classes=classes,
            support=np.concatenate(support),
            support_ways=np.repeat(np.arange(ways), shots),
            query=np.concatenate(query),
            query_ways=np.repeat(np.arange(ways), [len(images) for images in query]),
        )


def _divided(
    groups: list[NDArray[np.int64]], queries: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A class's images that may be support, and its query images, of different groups.

    As many groups go to the query's side as hold `queries` images, but never the last one: a class
    of few, large groups may then have fewer.
    """
    order = rng.permutation(len(groups))
    taken, count = 0, 0
    while count < queries and taken < len(groups) - 1:
        count += len(groups[order[taken]])
        taken += 1
    query = np.concatenate([groups[i] for i in order[:taken]])
    support = np.concatenate([groups[i] for i in order[taken:]])
    return support, rng.choice(query, min(queries, count), replace=False)


def _shots(
    sizes: NDArray[np.int64],
    remaining: NDArray[np.int64],
    largest_support: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Support images of each class: uneven shares of a support of random size."""
    share = 1 - rng.random()  # in (0, 1]
    capped = np.minimum(remaining, MAX_SUPPORT_OF_CLASS)
    support = min(largest_support, int(np.floor(share * capped + 1).sum()))
    weights = sizes * np.exp(rng.uniform(*LOG_WEIGHT, len(sizes)))
    wanted = np.floor(weights / weights.sum() * (support - len(sizes))) + 1
    shots: NDArray[np.int64] = np.minimum(wanted.astype(np.int64), remaining)
    return shots


def mean_and_interval(values: Sequence[float] | NDArray[np.floating]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval (normal approximation).

    The interval of a single value is NaN. Raises ValueError for no values.
    """
    if len(values) == 0:
        raise ValueError("values: expected at least one, got none")
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return float(np.mean(values)), 1.96 * deviation / float(np.sqrt(len(values)))
