"""Few-shot accuracy of a network as it is: episodes of nearest prototypes (Eq. 1), no adaptation.

    python -m tinytrain_ext.offline.evaluate_backbone NETWORK ... --data DIR --split FILE

Networks are measured on the same episodes, and later ones compared with the first, pair by pair.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..architectures import ARCHITECTURES, random_network
from ..datasets import cached_images, list_images, read_split
from ..episodes import FixedEpisodes, mean_and_interval
from ..network import Network
from ..protonet import compute_prototypes, cosine_logits
from .backbones import embed

__all__ = ["Accuracy", "episode_accuracies", "episode_accuracy", "main"]


@dataclass(frozen=True)
class Accuracy:
    """Mean accuracy over episodes and the half-width of its 95 % confidence interval, per cent."""

    mean: float
    interval: float
    ways: int
    shots: int
    queries: int
    episodes: int


def episode_accuracies(
    features: NDArray[np.floating],
    labels: NDArray[np.int64],
    *,
    ways: int,
    shots: int,
    episodes: int,
    rng: np.random.Generator,
    queries: int = 15,
) -> NDArray[np.float64]:
    """Accuracy of each of some random episodes, (episodes,) in per cent.

    A query belongs to the prototype of largest cosine.

    features: (N, m). labels: (N,). queries: per class; support and query are disjoint.

    Raises ValueError when there are too few classes, or images in a class.
    """
    sampler = FixedEpisodes(labels, ways=ways, shots=shots, queries=queries)
    accuracies = np.empty(episodes)
    for number in range(episodes):
        episode = sampler.draw(rng)
        support = features[episode.support]
        prototypes = compute_prototypes(support, episode.support_ways, ways)
        nearest = cosine_logits(features[episode.query], prototypes, 1.0).argmax(axis=1)
        accuracies[number] = 100 * np.mean(nearest == episode.query_ways)
    return accuracies


def episode_accuracy(
    features: NDArray[np.floating],
    labels: NDArray[np.int64],
    *,
    ways: int,
    shots: int,
    episodes: int,
    rng: np.random.Generator,
    queries: int = 15,
) -> Accuracy:
    """`episode_accuracies`, and what they come to."""
    accuracies = episode_accuracies(
        features, labels, ways=ways, shots=shots, episodes=episodes, rng=rng, queries=queries
    )
    return Accuracy(*mean_and_interval(accuracies), ways, shots, queries, episodes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints one JSON line per network and number of shots."""
    parser = argparse.ArgumentParser(
        prog="python -m tinytrain_ext.offline.evaluate_backbone",
        description="Few-shot accuracy of a network without adaptation.",
    )
    parser.add_argument(
        "networks",
        nargs="+",
        metavar="NETWORK",
        help="a network file, or random:NAME for an untrained one "
        f"(NAME: {', '.join(sorted(ARCHITECTURES))})",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--split", type=Path, required=True, help="JSON {class folder: subset}")
    parser.add_argument("--subset", default="test")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 1])
    parser.add_argument("--queries", type=int, default=15, help="per class")
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    paths, labels = list_images(options.data, read_split(options.split, options.subset))
    first: dict[int, NDArray[np.float64]] = {}
    for source in options.networks:
        network = _network(source, options.seed)
        images = cached_images(paths, network.resize, network.input_size, options.cache)
        features = embed(network, images)
        for shots in options.shots:
            accuracies = episode_accuracies(
                features,
                labels,
                ways=options.ways,
                shots=shots,
                queries=options.queries,
                episodes=options.episodes,
                rng=np.random.default_rng(options.seed),
            )
            accuracy = Accuracy(
                *mean_and_interval(accuracies),
                options.ways,
                shots,
                options.queries,
                options.episodes,
            )
            row = {"network": source, "subset": options.subset, **asdict(accuracy)}
            if shots in first:
                row["minus_first"] = mean_and_interval(accuracies - first[shots])
            first.setdefault(shots, accuracies)
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


def _network(source: str, seed: int) -> Network:
    """The network of a file, or an untrained one."""
    prefix, _, name = source.partition("random:")
    if not name or prefix:
        return Network.load(source)
    if name not in ARCHITECTURES:
        raise ValueError(f"random: expected one of {', '.join(ARCHITECTURES)}, got {name!r}")
    return random_network(ARCHITECTURES[name], np.random.default_rng(seed))


if __name__ == "__main__":
    main()
