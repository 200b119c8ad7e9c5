"""Augmentation for the offline stage: a whole batch at once, from uint8 pixels to network input.

What happens to each image is drawn first and applied later, so that the processes of a distributed
run can draw for the whole batch and each apply its part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from typing import Self

__all__ = ["TURNS", "Augmentation", "turn"]

ASPECT = 4 / 3  # widest aspect ratio of a crop, and its inverse the narrowest
TURNS = 4  # quarters of a full turn
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601 luma


@dataclass(frozen=True, eq=False)
class Augmentation:
    """What happens to each of N images: a random resized crop, perhaps flipped, and its colours.

    transform: (N, 2, 3), the crop as `torch.nn.functional.affine_grid` takes it.
    colours: (3, N), factors of brightness, contrast and saturation.
    """

    transform: NDArray[np.float64]
    colours: NDArray[np.float64]

    @classmethod
    def draw(
        cls, count: int, smallest_crop: float, jitter: float, rng: np.random.Generator
    ) -> Self:
        """Draws for `count` images.

        smallest_crop: smallest area of a crop as a share of the image; the largest is 1.
        jitter: each of the three colour factors is drawn from U(1 - jitter, 1 + jitter).
        """
        area = rng.uniform(smallest_crop, 1, count)
        stretch = np.exp(rng.uniform(-np.log(ASPECT), np.log(ASPECT), count) / 2)
        width = np.minimum(np.sqrt(area) * stretch, 1)
        height = np.minimum(np.sqrt(area) / stretch, 1)
        # In affine_grid's coordinates the image spans [-1, 1]: a crop of relative width w spans
        # w * [-1, 1] about a centre that keeps it inside. A negative width is a flipped crop.
        transform = np.zeros((count, 2, 3))
        transform[:, 0, 0] = width * rng.choice((-1.0, 1.0), count)
        transform[:, 1, 1] = height
        transform[:, 0, 2] = rng.uniform(-1, 1, count) * (1 - width)
        transform[:, 1, 2] = rng.uniform(-1, 1, count) * (1 - height)
        return cls(transform, rng.uniform(1 - jitter, 1 + jitter, (3, count)))

    def __getitem__(self, part: slice) -> Augmentation:
        return Augmentation(self.transform[part], self.colours[:, part])

    def apply(self, images: NDArray[np.uint8], size: int) -> Tensor:
        """Images (N, H, H, 3) as (N, 3, size, size) float32, channels_last.

        Normalised to [-1, 1], up to what the colours add.
        """
        count = len(images)
        factors = torch.from_numpy(self.colours).float()
        brightness, contrast, saturation = factors.view(3, count, 1, 1, 1)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32).contiguous()
        grid = functional.affine_grid(
            torch.from_numpy(self.transform).float(), [count, 3, size, size], align_corners=False
        )
        x: Tensor = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
        gray = torch.einsum("nchw,c->nhw", x, torch.tensor(GRAY)).unsqueeze(1)
        mean = gray.mean(dim=(2, 3), keepdim=True)
        # contrast * brightness * (saturated - mean) + brightness * mean, then the normalisation,
        # everything constant over an image gathered first: three passes over the pixels, not ten.
        gain = brightness * contrast / 127.5
        x = x * (gain * saturation) + gray * (gain * (1 - saturation))
        x += brightness * (1 - contrast) * mean / 127.5 - 1
        return x.contiguous(memory_format=torch.channels_last)


def turn(images: Tensor, turns: NDArray[np.int64]) -> Tensor:
    """Turns each image (C, H, H) of (N, C, H, H) by its number of quarters, in place."""
    for quarters in range(1, TURNS):
        chosen = torch.from_numpy(np.flatnonzero(turns == quarters))
        images[chosen] = torch.rot90(images[chosen], quarters, (2, 3))
    return images
