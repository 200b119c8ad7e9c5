"""Augmentation for pre-training: a whole batch at once, from uint8 pixels to network input."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

__all__ = ["augment"]

ASPECT = 4 / 3  # widest aspect ratio of a crop, and its inverse the narrowest
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601 luma


def augment(
    images: NDArray[np.uint8],
    size: int,
    smallest_crop: float,
    jitter: float,
    rng: np.random.Generator,
) -> Tensor:
    """Random resized crop, horizontal flip, brightness, contrast and saturation.

    images: (N, H, H, 3). Returns (N, 3, size, size) float32, channels_last, normalised to [-1, 1]
    up to what the jitter adds.

    smallest_crop: smallest area of a crop as a share of the image; the largest is 1.
    jitter: each of the three colour factors is drawn from U(1 - jitter, 1 + jitter).
    """
    count = len(images)
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
    factors = torch.from_numpy(rng.uniform(1 - jitter, 1 + jitter, (3, count, 1, 1, 1)))
    brightness, contrast, saturation = factors.float()

    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32).contiguous()
    grid = functional.affine_grid(
        torch.from_numpy(transform).float(), [count, 3, size, size], align_corners=False
    )
    x: Tensor = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    gray = torch.einsum("nchw,c->nhw", x, torch.tensor(GRAY)).unsqueeze(1)
    mean = gray.mean(dim=(2, 3), keepdim=True)
    # contrast * brightness * (saturated - mean) + brightness * mean, then the normalisation, with
    # everything constant over an image gathered first: three passes over the pixels instead of ten.
    gain = brightness * contrast / 127.5
    x = x * (gain * saturation) + gray * (gain * (1 - saturation))
    x += brightness * (1 - contrast) * mean / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)
