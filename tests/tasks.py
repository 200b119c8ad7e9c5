"""A small network and a small task for tests of whole passes."""

import numpy as np
from numpy.typing import NDArray

from tinytrain_ext.architectures import Architecture, Block, random_network
from tinytrain_ext.network import Network

TINY = Architecture(
    "tiny",
    8,
    (
        Block(3, 8, 8, 8, 1, False),
        Block(3, 8, 16, 8, 2, False),
        Block(5, 8, 24, 8, 1, True),
        Block(3, 8, 24, 16, 2, False),
        Block(3, 16, 32, 16, 1, True),
        Block(3, 16, 32, 24, 1, False),
        Block(3, 24, 48, 24, 1, True),
        Block(7, 24, 48, 32, 1, False),
    ),
    feature_mix=64,
)


def tiny_network(feature_mix: bool = False, seed: int = 0) -> Network:
    """Eight inverted-residual blocks on 32 x 32 pixels, with random weights."""
    network = random_network(TINY, np.random.default_rng(seed), feature_mix)
    return network.replace(input_size=32, resize=36)


def shapes_task(
    ways: int = 3, shots: int = 4, seed: int = 0, size: int = 32
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Noisy stripes in a colour and direction of each class: (ways * shots, size, size, 3)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    images = []
    for way in range(ways):
        angle = np.pi * way / ways
        for _ in range(shots):
            phase = rng.uniform(0, 2 * np.pi)
            wave = np.sin((rows * np.cos(angle) + columns * np.sin(angle)) * 0.8 + phase)
            colour = np.roll([220.0, 120.0, 40.0], way)
            picture = colour + 60 * wave[..., None] + rng.normal(0, 20, (size, size, 3))
            images.append(np.clip(picture, 0, 255).astype(np.uint8))
    return np.stack(images), np.repeat(np.arange(ways), shots)
