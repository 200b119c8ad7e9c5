"""Few-shot episodes: sizes, disjointness, determinism, and intervals."""

from __future__ import annotations

import numpy as np
import pytest

from tinytrain_ext.episodes import FixedEpisodes, mean_and_interval

LABELS = np.random.default_rng(0).permutation(np.repeat([3, 5, 6, 9], [12, 9, 20, 8]))


def test_an_episode_is_what_was_asked_for() -> None:
    sampler = FixedEpisodes(LABELS, ways=3, shots=2, queries=6)
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(50):
        episode = sampler.draw(rng)
        assert episode.ways == 3
        assert len(set(episode.classes)) == 3
        assert np.array_equal(LABELS[episode.support], episode.classes[episode.support_ways])
        assert np.array_equal(LABELS[episode.query], episode.classes[episode.query_ways])
        assert np.bincount(episode.support_ways).tolist() == [2] * 3
        assert np.bincount(episode.query_ways).tolist() == [6] * 3
        images = np.concatenate([episode.support, episode.query])
        assert len(set(images)) == len(images)
        seen |= set(images)
    assert len(seen) == len(LABELS)  # every image has its turn


def test_episodes_depend_on_the_generator_alone() -> None:
    def draw(seed: int) -> list[int]:
        sampler = FixedEpisodes(LABELS, ways=3, shots=1, queries=2)
        rng = np.random.default_rng(seed)
        return [image for _ in range(3) for image in sampler.draw(rng).query]

    assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ways": 5}, "ways: expected at most the 4 classes, got 5"),
        ({"shots": 3}, "at most the 8 images of the smallest class, got 3 \\+ 6"),
        ({"shots": 0}, "shots: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FixedEpisodes(LABELS, **{"ways": 3, "shots": 2, "queries": 6} | sizes)


def test_interval() -> None:
    values = np.random.default_rng(0).normal(70, 10, 10_000)
    mean, half = mean_and_interval(values)
    assert abs(mean - 70) < 0.4
    assert half == pytest.approx(1.96 * 10 / 100, rel=0.05)
    assert np.isnan(mean_and_interval([1.0])[1])
    with pytest.raises(ValueError, match="at least one"):
        mean_and_interval([])
