"""Folders of images, one per class, decoded once into a memory-mapped uint8 array.

Decoding JPEGs every epoch would cost more than training a small network on them. The cache lives
outside the data set and the project; its name is a digest of everything it depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..images import load_image

__all__ = ["cached_images", "default_cache_directory", "list_images", "read_split"]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
CACHE_VERSION = 1  # to be raised when the same files would decode to other pixels


def read_split(path: Path, subset: str) -> tuple[str, ...]:
    """Class folders, sorted, that a JSON object {class folder: subset} assigns to `subset`.

    Raises OSError when the file cannot be read and ValueError when it is not such an object or the
    subset has no class.
    """
    try:
        split = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object: {error}") from error
    if not isinstance(split, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(split).__name__}")
    classes = tuple(sorted(name for name, assigned in split.items() if assigned == subset))
    if not classes:
        raise ValueError(f"{path}: expected at least one class of {subset!r}, got none")
    return classes


def list_images(directory: Path, classes: Sequence[str]) -> tuple[list[Path], NDArray[np.int64]]:
    """Lists the image files of the class folders, sorted, and their labels (N,).

    A label is the position of the class in `classes`.

    Raises FileNotFoundError naming a class folder that is missing, ValueError naming one without
    images.
    """
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = directory / name
        if not folder.is_dir():
            raise FileNotFoundError(f"class {name!r}: expected the folder {folder}")
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"class {name!r}: expected images in {folder}, got none")
        paths += found
        labels += [label] * len(found)
    return paths, np.array(labels, np.int64)


def default_cache_directory() -> Path:
    """$XDG_CACHE_HOME/tinytrain_ext, by default ~/.cache/tinytrain_ext."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "tinytrain_ext"


def cached_images(
    paths: Sequence[Path],
    resize: int,
    crop: int,
    cache_directory: Path | None = None,
    progress: bool = True,
) -> NDArray[np.uint8]:
    """The images as one read-only memory-mapped array (N, crop, crop, 3).

    Each is what `load_image` gives for a short side of `resize` pixels and a centre crop of `crop`.
    The array is made at the first call and mapped from `cache_directory` (by default
    `default_cache_directory()`) at later ones. progress: whether to show a bar meanwhile, where
    standard error is a terminal.

    Raises OSError, ImageError or ValueError as `load_image` does, and OSError naming the file in
    the cache when it cannot be written.
    """
    stamps = [(os.fspath(path.resolve()), *_stamp(path)) for path in paths]
    digest = hashlib.sha256(json.dumps([CACHE_VERSION, stamps, resize, crop]).encode()).hexdigest()
    cache_directory = cache_directory or default_cache_directory()
    target = cache_directory / f"{digest[:32]}.npy"
    if not target.exists():
        cache_directory.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
        try:
            with temporary.open("xb") as file:
                bar = tqdm(paths, "decoding", unit="image", disable=None if progress else True)
                _write_images(file, bar, len(paths), resize, crop)
            temporary.replace(target)
        except OSError as error:
            if error.filename is None:  # of a write, such as on a full disk
                raise OSError(error.errno, error.strerror, os.fspath(target)) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
    images: NDArray[np.uint8] = np.load(target, mmap_mode="r", allow_pickle=False)
    return images


def _write_images(
    file: BinaryIO, paths: Iterable[Path], count: int, resize: int, crop: int
) -> None:
    """Writes a .npy file image by image: a full disk is then an error, not a signal."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, crop, crop, 3)}
    np.lib.format.write_array_header_1_0(file, header)
    for path in paths:
        file.write(load_image(path, resize=resize, input_size=crop).tobytes())
    file.flush()
    os.fsync(file.fileno())


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
