"""Sets of images in folders: their classes and splits, decoded once into a memory-mapped file.

A set is DIR/CLASS/IMAGE, or DIR/SUPERCLASS/CLASS/IMAGE such as Omniglot's alphabets. Which classes
belong to training, validation or test is said by a JSON file of either form, {class: subset} or
{subset: [classes]}, as Meta-Dataset releases it. Decoding JPEGs again for every task or epoch
would cost more than training a small network on them, so decoded pixels are kept in a cache, which
lives outside the set and the project; its name is a digest of everything it depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .images import load_image

__all__ = [
    "ImageSet",
    "cached_images",
    "default_cache_directory",
    "find_split",
    "list_images",
    "open_image_set",
    "read_split",
]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
CACHE_VERSION = 1  # to be raised when the same files would decode to other pixels

# What split files call the same subset: Meta-Dataset's, miniImageNet's and Omniglot's words.
_SUBSETS = {
    "train": ("train", "background"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "evaluation"),
}
# Below DATA/_splits, the first that exists.
_SPLIT_FILES = (
    "{name}.json",
    "{name}/class_split.json",
    "{name}/background_evaluation.json",
    "meta_dataset/{name}_splits.json",
)
_WHOLLY_TEST = frozenset({"traffic_sign"})  # Meta-Dataset tests on all of its classes
_FILMED = frozenset({"traffic_sign"})  # images are frames, named TRACK_FRAME
_SUPERCLASS_MARK = "__"  # Omniglot in one level of folders: ALPHABET__CHARACTER


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of some classes, listed but not decoded.

    paths: N images; labels: (N,), positions in `classes`; superclasses: (N,) such as the alphabet
    of a character, or None; tracks: (N,), images with the same number are frames of one film and
    near-duplicates, or None.
    """

    name: str
    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: NDArray[np.int64]
    superclasses: NDArray[np.int64] | None
    tracks: NDArray[np.int64] | None


def open_image_set(data: Path, name: str) -> ImageSet:
    """Lists the set DATA/NAME: the test classes of its split (`find_split`), else all classes.

    name: a folder of `data`; "NAME:train" or "NAME:val" for another subset of the split. Frames of
    "traffic_sign" carry their track by their file name, TRACK_FRAME; superclasses are folders
    above the class folders, or what stands before "__" in a class folder's name.

    Raises OSError for a folder or file that cannot be read, and ValueError for a set without
    classes, a class without images, a name that is a path, or a split that names classes the set
    has not.
    """
    folder_name, _, subset = name.partition(":")
    if folder_name in ("", "..") or Path(folder_name).name != folder_name:
        # A set's split and its tracks go by its name: by another spelling they would be lost.
        raise ValueError(f"{name!r}: expected the name of a folder in {data}, without a slash")
    directory = data / folder_name
    classes = _class_folders(directory)
    split = find_split(data, folder_name)
    if split is not None and not (folder_name in _WHOLLY_TEST and subset in ("", "test")):
        classes = _of_split(classes, read_split(split, subset or "test"), split)
    elif subset not in ("", "test"):
        raise ValueError(f"{name}: expected a split file below {data / '_splits'}, found none")
    paths, labels = list_images(directory, classes)
    homes = [_superclass(name) for name in classes]
    known = sorted(set(homes))
    tracks = None
    if folder_name in _FILMED:
        films = [
            f"{label}/{path.name.rpartition('_')[0]}"
            for path, label in zip(paths, labels, strict=True)
        ]
        tracks = np.unique(films, return_inverse=True)[1].astype(np.int64)
    return ImageSet(
        name=name,
        classes=tuple(classes),
        paths=tuple(paths),
        labels=labels,
        superclasses=None
        if "" in homes
        else np.array([known.index(home) for home in homes], np.int64)[labels],
        tracks=tracks,
    )


def find_split(data: Path, name: str) -> Path | None:
    """The split file of the set DATA/NAME below DATA/_splits, or None.

    NAME.json, NAME/class_split.json, NAME/background_evaluation.json (Omniglot's halves) or
    meta_dataset/NAME_splits.json, Meta-Dataset's own file.
    """
    candidates = (data / "_splits" / pattern.format(name=name) for pattern in _SPLIT_FILES)
    return next((path for path in candidates if path.exists()), None)


def read_split(path: Path, subset: str) -> tuple[str, ...]:
    """Classes, sorted, that a split file assigns to `subset`: "train", "val" or "test".

    The file is a JSON object {class: subset} or {subset: [classes]}; "valid" and "validation" mean
    "val", Omniglot's "background" means "train" and its "evaluation" "test".
    Raises OSError when the file cannot be read and ValueError when it is not such an object or the
    subset has no class.
    """
    try:
        split = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object: {error}") from error
    if not isinstance(split, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(split).__name__}")
    words = _SUBSETS.get(subset, (subset,))
    if split and all(isinstance(assigned, list) for assigned in split.values()):
        found = [name for word in words for name in split.get(word, [])]
    else:
        found = [name for name, assigned in split.items() if assigned in words]
    if not found:
        raise ValueError(f"{path}: expected at least one class of {subset!r}, got none")
    return tuple(sorted({str(name) for name in found}))


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


def _class_folders(directory: Path) -> list[str]:
    """Class folders below `directory`, as CLASS or SUPERCLASS/CLASS."""
    found: list[str] = []
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        entries = sorted(folder.iterdir())
        below = [path for path in entries if path.is_dir()]
        if below and any(path.suffix.lower() in SUFFIXES for path in entries):
            raise ValueError(
                f"{folder}: expected images or folders of images, got both ({below[0].name})"
            )
        found += [f"{folder.name}/{path.name}" for path in below] or [folder.name]
    if not found:
        raise ValueError(f"{directory}: expected a folder for each class, got none")
    return found


def _superclass(name: str) -> str:
    above, mark, _ = name.partition("/") if "/" in name else name.partition(_SUPERCLASS_MARK)
    return above if mark else ""


def _of_split(folders: Sequence[str], names: Sequence[str], split: Path) -> list[str]:
    """The folders that a split names, where blanks and punctuation may be written otherwise."""
    known = {_plain(folder): folder for folder in folders}
    known |= {folder: folder for folder in folders}  # its very name goes before any likeness
    found = {name: known.get(name) or known.get(_plain(name)) for name in names}
    missing = [name for name in names if found[name] is None]
    if missing:
        raise ValueError(
            f"{split}: expected a folder for every class, got none for {missing[0]!r} "
            f"({len(missing)} of {len(names)} are missing)"
        )
    return sorted({folder for folder in found.values() if folder is not None})


def _plain(name: str) -> str:
    return "_".join(re.findall(r"[^\W_]+", name.lower()))


def default_cache_directory() -> Path:
    """$XDG_CACHE_HOME/tinytrain_ext, by default ~/.cache/tinytrain_ext."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "tinytrain_ext"


def cached_images(
    paths: Sequence[Path],
    resize: int,
    crop: int,
    cache_directory: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.uint8]:
    """The images as one read-only memory-mapped array (N, crop, crop, 3).

    Each is what `load_image` gives for a short side of `resize` pixels and a centre crop of `crop`.
    The array is made at the first call and mapped from `cache_directory` (by default
    `default_cache_directory()`) at later ones. progress: called with (done, total) meanwhile.

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
                _write_images(file, paths, resize, crop, progress)
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
    file: BinaryIO,
    paths: Sequence[Path],
    resize: int,
    crop: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Writes a .npy file image by image: a full disk is then an error, not a signal."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), crop, crop, 3)}
    np.lib.format.write_array_header_1_0(file, header)
    for number, path in enumerate(paths, start=1):
        file.write(load_image(path, resize=resize, input_size=crop).tobytes())
        if progress is not None:
            progress(number, len(paths))
    file.flush()
    os.fsync(file.fileno())


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
