"""Photos in: decode, resize, crop, normalise; and the augmentation that makes pseudo-queries.

Files are untrusted input: JPEG and PNG only, the pixel count is checked in the header before
anything is decoded, and a photo costs little more memory than the piece of it the network sees.
"""

from __future__ import annotations

import logging
import os
import stat
import struct
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .errors import ImageError
from .network import open_at_once

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Augmentation",
    "LabelledImages",
    "apply_augmentation",
    "draw_augmentation",
    "draw_augmentations",
    "load_folder",
    "load_image",
    "load_images",
    "normalise",
]

logger = logging.getLogger(__name__)

# A baseline JPEG is decoded at an eighth of its size where that is enough; everything else needs
# its whole picture in memory (a progressive JPEG twice over, as coefficients).
MAX_PIXELS = 80_000_000
MAX_PIXELS_WHOLE = 24_000_000

EXIF_ORIENTATION = 0x0112

# PMF (Hu et al., CVPR 2022), its DiffAugment with "color" and "translation".
AUGMENTATION_PROBABILITY = 0.9
MAX_BRIGHTNESS = 0.225
MAX_SATURATION = 2.0
CONTRAST = (0.5, 1.5)
TRANSLATION = 0.125


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Photos with their classes.

    images: (N, H, W, 3) uint8; labels: (N,) int64, indices into classes; paths: of the N files.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    paths: tuple[Path, ...]


def load_image(
    path: str | os.PathLike[str], *, resize: int = 146, input_size: int = 128
) -> NDArray[np.uint8]:
    """The photo a network sees: short side resized to `resize`, centre crop of `input_size`.

    Both happen in one antialiased bilinear resampling of the part that is kept, the filter the
    published networks were trained with. EXIF orientation is obeyed, transparency is laid on
    white, 16 bits become 8.

    Returns (input_size, input_size, 3) uint8, RGB. Raises OSError when the file cannot be read
    and ImageError, naming it, when it is not a sound JPEG or PNG or has too many pixels.
    """
    from PIL import UnidentifiedImageError

    if not 1 <= input_size <= resize:
        raise ValueError(f"input_size: expected 1 to resize = {resize}, got {input_size}")
    with open_at_once(path) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            raise ImageError(f"{os.fspath(path)}: empty, or not a regular file")
        try:
            with warnings.catch_warnings():
                # Pillow warns of damaged EXIF data, and of sizes for which we have our own cap.
                warnings.simplefilter("ignore")
                return _decode(file, resize, input_size)
        except MemoryError:
            raise
        # Pillow's decoders fail in many ways: OSError, SyntaxError, struct.error, ...
        except Exception as error:
            reason = str(error) or type(error).__name__
            if isinstance(error, UnidentifiedImageError):
                reason = "not a JPEG or PNG image"
            raise ImageError(f"{os.fspath(path)}: {reason}") from error


def load_images(
    paths: Iterable[str | os.PathLike[str]],
    *,
    resize: int = 146,
    input_size: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.uint8]:
    """`load_image` of each path, one after the other, into one (N, H, W, 3) uint8 array.

    progress: called with (photos read, N).
    """
    paths = list(paths)
    images = np.empty((len(paths), input_size, input_size, 3), np.uint8)
    for index, path in enumerate(paths):
        images[index] = load_image(path, resize=resize, input_size=input_size)
        if progress is not None:
            progress(index + 1, len(paths))
    return images


def load_folder(
    directory: str | os.PathLike[str],
    *,
    resize: int = 146,
    input_size: int = 128,
    least_classes: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> LabelledImages:
    """Reads a folder that holds one folder of photos for each class.

    Classes and photos come in the order of their names; names that begin with a dot are skipped.
    Raises OSError when a folder cannot be read, ValueError naming the folder when there are fewer
    than `least_classes` or one is empty, and ImageError naming any file that is no photo.
    """
    root = Path(directory)
    entries = _visible(root)
    classes = [entry for entry in entries if entry.is_dir()]
    if len(classes) < least_classes:
        got = f"only {', '.join(repr(entry.name) for entry in classes)}" if classes else "none"
        least = {1: "one class", 2: "two classes"}.get(least_classes, f"{least_classes} classes")
        raise ValueError(f"{root}: expected one folder for each of at least {least}, got {got}")
    for entry in entries:
        if not entry.is_dir():
            logger.warning("%s: ignored, it is in no class folder", entry)
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(classes):
        if not folder.name.isprintable():
            raise ValueError(f"{str(folder)!r}: the class name holds characters that do not print")
        photos = _visible(folder)
        if not photos:
            raise ValueError(f"{folder}: no photos in this class folder")
        for photo in photos:
            if photo.is_dir():
                raise ValueError(f"{photo}: a folder inside a class folder")
        paths += photos
        labels += [label] * len(photos)
    return LabelledImages(
        images=load_images(paths, resize=resize, input_size=input_size, progress=progress),
        labels=np.array(labels, np.int64),
        classes=tuple(folder.name for folder in classes),
        paths=tuple(paths),
    )


@dataclass(frozen=True, eq=False)
class Augmentation:
    """How each of N images is changed before the network sees it.

    parameters: (N, 6) float32; columns: flip (0 or 1), shift x and y (whole pixels of the
    network's input; positive moves the content right and down), brightness (added, in normalised
    units), saturation and contrast (factors, 1 changes nothing).
    """

    parameters: NDArray[np.float32]

    def __post_init__(self) -> None:
        parameters = self.parameters
        if parameters.dtype != np.float32:
            raise TypeError(f"parameters: expected float32, got {parameters.dtype}")
        if parameters.ndim != 2 or parameters.shape[1] != 6:
            raise ValueError(f"parameters: expected shape (N, 6), got {parameters.shape}")

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, images: slice) -> Augmentation:
        """The augmentation of a slice of the images."""
        return Augmentation(self.parameters[images])


def draw_augmentation(count: int, size: int, rng: np.random.Generator) -> Augmentation:
    """Draws PMF's DiffAugment for `count` images of `size` x `size` pixels.

    Each kind is used in this draw with probability 0.9. Then for each image alone: a flip with
    probability 1/2, brightness in +-0.225, saturation in [0, 2), contrast in [0.5, 1.5),
    translation of up to an eighth of the size either way.
    """
    return draw_augmentations(1, count, size, rng)[0]


def draw_augmentations(
    draws: int, count: int, size: int, rng: np.random.Generator
) -> list[Augmentation]:
    """What `draws` calls of `draw_augmentation` would return, in a fraction of their time."""
    # One call of the generator for everything, a row of numbers a draw.
    uniform = rng.random((draws, 5 + 6 * count))
    flip, translate, brighten, saturate, contrast = uniform[:, :5].T < AUGMENTATION_PROBABILITY
    used = np.stack([flip, translate, translate, brighten, saturate, contrast], axis=1)
    most = int(size * TRANSLATION + 0.5)
    low = np.array([0, -most, -most, -MAX_BRIGHTNESS, 0, CONTRAST[0]])
    span = [2, 2 * most + 1, 2 * most + 1, 2 * MAX_BRIGHTNESS, MAX_SATURATION, np.ptp(CONTRAST)]
    values = uniform[:, 5:].reshape(draws, count, 6) * span
    values[..., :3] = np.floor(values[..., :3])  # whole numbers: flip and translation
    parameters = np.where(used[:, None], values + low, (0, 0, 0, 0, 1, 1)).astype(np.float32)
    return [Augmentation(draw) for draw in parameters]


def normalise(
    images: NDArray[np.uint8],
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    dtype: DTypeLike = np.float32,
) -> NDArray[Any]:
    """(images / 255 - mean) / std, per RGB channel, of (..., 3) uint8."""
    scale = 1 / (255 * np.asarray(std, np.float64))
    offset = -np.asarray(mean, np.float64) / np.asarray(std, np.float64)
    normalised: NDArray[Any] = images * scale.astype(dtype) + offset.astype(dtype)
    return normalised


def apply_augmentation(
    images: NDArray[np.uint8],
    augmentation: Augmentation,
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    dtype: DTypeLike = np.float32,
) -> NDArray[Any]:
    """Normalised and augmented images, (N, H, W, 3): what the engine computes while its stem
    reads the pixels, in NumPy.

    In this order: brightness, saturation about each pixel's mean, contrast about the image's
    mean, flip, translation with zeros (of normalised units) moving in.
    """
    if len(augmentation) != len(images):
        raise ValueError(f"augmentation: expected {len(images)} rows, got {len(augmentation)}")
    height, width = images.shape[1:3]
    result = np.zeros(images.shape, dtype)
    for index, row in enumerate(augmentation.parameters.astype(dtype)):
        flip, shift_x, shift_y = (int(value) for value in row[:3])
        brightness, saturation, contrast = row[3:]
        image = normalise(images[index], mean, std, dtype) + brightness
        grey = image.mean(axis=2, keepdims=True)
        image = grey + saturation * (image - grey)
        average = image.mean()
        image = average + contrast * (image - average)
        if flip:
            image = image[:, ::-1]
        left, top = max(shift_x, 0), max(shift_y, 0)
        right, bottom = width + min(shift_x, 0), height + min(shift_y, 0)
        if left < right and top < bottom:
            result[index, top:bottom, left:right] = image[
                top - shift_y : bottom - shift_y, left - shift_x : right - shift_x
            ]
    return result


def _visible(directory: Path) -> list[Path]:
    entries = (entry for entry in directory.iterdir() if not entry.name.startswith("."))
    return sorted(entries, key=lambda entry: entry.name)


def _decode(file: BinaryIO, resize: int, input_size: int) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(file, formats=("JPEG", "PNG")) as image:
        _check_pixels(image)
        # Scaled by the decoder, but to no less than twice the size asked.
        image.draft(None, (2 * resize, 2 * resize))
        image.load()
        small = _resample(_displayable(image), resize, input_size)
        return np.array(_upright(small, _orientation(image)), np.uint8)


def _check_pixels(image: Image) -> None:
    whole = image.format == "PNG" or "progressive" in image.info
    most = MAX_PIXELS_WHOLE if whole else MAX_PIXELS
    if image.width * image.height > most:
        raise ImageError(
            f"expected at most {most / 1e6:.0f} million pixels, got {image.width} x {image.height}"
        )


def _orientation(image: Image) -> int:
    # A photo whose EXIF block is damaged is still a photo.
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        logger.warning("unreadable EXIF data ignored")
        return 1


def _upright(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _displayable(image: Image) -> Image:
    """The image in a mode that resamples well: L, RGB, CMYK or RGBA."""
    from PIL import Image as pillow

    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip it at 255
        return pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("L", "RGB", "CMYK", "RGBA") and "transparency" not in image.info:
        return image
    transparent = image.mode in ("LA", "PA") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


def _resample(image: Image, resize: int, input_size: int) -> Image:
    """The centre of the image, RGB, as if its short side had been resized and the centre cut."""
    from PIL import Image as pillow

    side = min(image.size) * input_size / resize
    left, top = (image.width - side) / 2, (image.height - side) / 2
    small = image.resize(
        (input_size, input_size),
        pillow.Resampling.BILINEAR,
        box=(left, top, left + side, top + side),
        reducing_gap=3.0,
    )
    if small.mode == "RGBA":
        white = pillow.new("RGBA", small.size, "white")
        small = pillow.alpha_composite(white, small)
    return small.convert("RGB")
