"""Folders of images: layouts, splits in all their spellings, tracks, the cache, and bad data."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from offline_cases import disk_of, write_folder
from tinytrain_ext.datasets import (
    cached_images,
    default_cache_directory,
    find_split,
    list_images,
    open_image_set,
    read_split,
)
from tinytrain_ext.errors import ImageError


def write_images(directory: Path, classes: list[str], count: int = 2) -> None:
    for index, name in enumerate(classes):
        (directory / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (12, 10), (index * 20, number * 20, 90)).save(
                directory / name / f"{number:02}.png"
            )


def write_split(data: Path, name: str, split: object) -> Path:
    path = data / "_splits" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(split))
    return path


# Layouts


def test_class_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "fruit", ["pears", "apples"], 3)
    (tmp_path / "fruit" / "apples" / "notes.txt").write_text("no image")
    (tmp_path / "fruit" / "readme.txt").write_text("no class")
    found = open_image_set(tmp_path, "fruit")
    assert found.name == "fruit"
    assert found.classes == ("apples", "pears")
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.superclasses is None
    assert found.tracks is None
    assert [path.parent.name for path in found.paths] == ["apples"] * 3 + ["pears"] * 3


def test_superclasses_by_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "script", ["Greek/alpha", "Greek/beta", "Latin/a"])
    found = open_image_set(tmp_path, "script")
    assert found.classes == ("Greek/alpha", "Greek/beta", "Latin/a")
    assert found.superclasses is not None
    assert found.superclasses.tolist() == [0, 0, 0, 0, 1, 1]


def test_superclasses_by_name(tmp_path: Path) -> None:
    write_images(tmp_path / "script", ["Greek__alpha", "Greek__beta", "Latin__a"])
    found = open_image_set(tmp_path, "script")
    assert found.classes == ("Greek__alpha", "Greek__beta", "Latin__a")
    assert found.superclasses is not None
    assert found.superclasses.tolist() == [0, 0, 0, 0, 1, 1]


def test_a_class_without_superclass_means_there_are_none(tmp_path: Path) -> None:
    write_images(tmp_path / "script", ["Greek__alpha", "digits"])
    assert open_image_set(tmp_path, "script").superclasses is None


def test_tracks_are_of_filmed_signs_only(tmp_path: Path) -> None:
    for name in ("traffic_sign", "fruit"):
        for label in ("00000", "00001"):
            folder = tmp_path / name / label
            folder.mkdir(parents=True)
            for file in ("00000_00000", "00000_00001", "00001_00000"):
                Image.new("RGB", (12, 10)).save(folder / f"{file}.jpg")
    tracks = open_image_set(tmp_path, "traffic_sign").tracks
    assert tracks is not None
    # Track 0 of one class is not that of another.
    assert tracks.tolist() == [0, 0, 1, 2, 2, 3]
    assert open_image_set(tmp_path, "fruit").tracks is None


# Splits

WORDS = [
    ("train", "train"),
    ("train", "background"),
    ("val", "val"),
    ("val", "valid"),
    ("val", "validation"),
    ("test", "test"),
    ("test", "evaluation"),
]


@pytest.mark.parametrize(("subset", "word"), WORDS)
@pytest.mark.parametrize("form", ["by class", "by subset"])
def test_split_files_in_both_forms_and_all_words(
    tmp_path: Path, subset: str, word: str, form: str
) -> None:
    lists = {word: ["b", "a"], "other": ["c"]}
    by_class = {name: key for key, names in lists.items() for name in names}
    path = write_split(tmp_path, "s.json", by_class if form == "by class" else lists)
    assert read_split(path, subset) == ("a", "b")
    for other in {"train", "val", "test"} - {subset}:
        with pytest.raises(ValueError, match=f"at least one class of '{other}', got none"):
            read_split(path, other)


@pytest.mark.parametrize(
    "file",
    [
        "fruit.json",
        "fruit/class_split.json",
        "fruit/background_evaluation.json",
        "meta_dataset/fruit_splits.json",
    ],
)
def test_a_split_chooses_the_classes(tmp_path: Path, file: str) -> None:
    write_images(tmp_path / "fruit", ["apples", "figs", "pears"])
    split = write_split(tmp_path, file, {"train": ["pears"], "test": ["figs", "apples"]})
    assert find_split(tmp_path, "fruit") == split
    assert open_image_set(tmp_path, "fruit").classes == ("apples", "figs")
    assert open_image_set(tmp_path, "fruit:test").classes == ("apples", "figs")
    found = open_image_set(tmp_path, "fruit:train")
    assert (found.name, found.classes) == ("fruit:train", ("pears",))
    assert found.labels.tolist() == [0, 0]


def test_the_user_s_own_split_comes_first(tmp_path: Path) -> None:
    write_split(tmp_path, "meta_dataset/fruit_splits.json", {"test": ["a"]})
    own = write_split(tmp_path, "fruit.json", {"test": ["b"]})
    assert find_split(tmp_path, "fruit") == own
    assert find_split(tmp_path, "wood") is None


def test_split_names_match_but_for_blanks_and_punctuation(tmp_path: Path) -> None:
    write_images(tmp_path / "flower", ["002_hard-leaved_pocket_orchid", "009_monk's_hood", "x"])
    names = ["002.hard-leaved pocket orchid", "009.monk's hood"]
    write_split(tmp_path, "flower.json", {"test": names})
    found = open_image_set(tmp_path, "flower")
    assert found.classes == ("002_hard-leaved_pocket_orchid", "009_monk's_hood")


def test_a_class_that_a_split_names_twice_is_one_class(tmp_path: Path) -> None:
    write_images(tmp_path / "fruit", ["red_apples", "pears"])
    write_split(tmp_path, "fruit.json", {"test": ["red apples", "red_apples", "red apples"]})
    found = open_image_set(tmp_path, "fruit")
    assert found.classes == ("red_apples",)
    assert found.labels.tolist() == [0, 0]


def test_a_class_s_very_name_goes_before_a_like_one(tmp_path: Path) -> None:
    write_images(tmp_path / "fruit", ["a-b", "a_b", "c"])
    write_split(tmp_path, "fruit.json", {"train": ["a_b"], "test": ["a-b"]})
    assert open_image_set(tmp_path, "fruit").classes == ("a-b",)
    assert open_image_set(tmp_path, "fruit:train").classes == ("a_b",)


def test_traffic_signs_are_test_classes_whatever_a_split_says(tmp_path: Path) -> None:
    write_images(tmp_path / "traffic_sign", ["00000", "00001"])
    write_split(tmp_path, "meta_dataset/traffic_sign_splits.json", {"test": ["00.Speed limit"]})
    assert open_image_set(tmp_path, "traffic_sign").classes == ("00000", "00001")


# (test, validation, training) classes of each of the paper's nine domains; None: no such file.
NINE = {
    "traffic_sign": (43, 0, 0),
    "omniglot": (659, 0, 964),
    "aircraft": (15, 15, 70),
    "vgg_flower": (16, 15, 71),
    "cu_birds": (30, 30, 140),
    "dtd": (7, 7, 33),
    "quickdraw": (52, 52, 241),
    "fungi": (200, 200, 994),
    "mscoco": (40, 40, 0),
}


@pytest.mark.parametrize("name", NINE)
def test_the_nine_domains_splits(data_dir: Path, name: str) -> None:
    path = find_split(data_dir, name)
    if path is None:
        pytest.skip(f"no split file of {name} below {data_dir / '_splits'}")
    for subset, count in zip(("test", "val", "train"), NINE[name], strict=True):
        if count:
            assert len(set(read_split(path, subset))) == count
        else:
            with pytest.raises(ValueError, match="at least one class"):
                read_split(path, subset)


@pytest.mark.parametrize("name", ["traffic_sign", "omniglot", "vgg_flower", "mini_imagenet"])
def test_splits_fit_the_folders(data_dir: Path, name: str) -> None:
    if not (data_dir / name).is_dir():
        pytest.skip(f"no {name} in {data_dir}")
    found = open_image_set(data_dir, name)
    expected = NINE.get(name, (20,))[0]
    assert len(found.classes) == len(set(found.labels.tolist())) == expected
    assert (found.superclasses is not None) == (name == "omniglot")
    assert (found.tracks is not None) == (name == "traffic_sign")
    if found.superclasses is not None:
        assert len(set(found.superclasses.tolist())) == 20  # evaluation alphabets


# What is wrong is named


def test_bad_splits_are_named(tmp_path: Path) -> None:
    write_images(tmp_path / "fruit", ["apples", "pears"])
    with pytest.raises(ValueError, match=r"fruit:val: expected a split file below .*_splits"):
        open_image_set(tmp_path, "fruit:val")
    path = write_split(tmp_path, "fruit.json", {"test": ["apples", "figs", "plums"]})
    with pytest.raises(ValueError, match=r"fruit\.json: .* none for 'figs' \(2 of 3 are missing"):
        open_image_set(tmp_path, "fruit")
    with pytest.raises(ValueError, match="at least one class of 'val'"):
        open_image_set(tmp_path, "fruit:val")
    path.write_text('{"test": ')
    with pytest.raises(ValueError, match=r"fruit\.json: expected a JSON object"):
        open_image_set(tmp_path, "fruit")
    path.write_text('["apples"]')
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        open_image_set(tmp_path, "fruit")


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="fruit"):
        open_image_set(tmp_path, "fruit")
    (tmp_path / "fruit").mkdir()
    with pytest.raises(ValueError, match="fruit: expected a folder for each class, got none"):
        open_image_set(tmp_path, "fruit")
    (tmp_path / "fruit" / "apples").mkdir()
    with pytest.raises(ValueError, match=r"class 'apples': expected images in .*apples, got none"):
        open_image_set(tmp_path, "fruit")
    with pytest.raises(FileNotFoundError, match="class 'figs': expected the folder"):
        list_images(tmp_path / "fruit", ["figs"])
    write_images(tmp_path / "fruit", ["apples/thumbs"])
    write_images(tmp_path, ["more/fruit"])
    (tmp_path / "more" / "fruit" / "00.png").rename(tmp_path / "fruit" / "apples" / "00.png")
    with pytest.raises(ValueError, match=r"apples: expected images or folders .* both \(thumbs\)"):
        open_image_set(tmp_path, "fruit")


@pytest.mark.parametrize("name", ["traffic_sign/", "./traffic_sign", "..", "", "more/traffic_sign"])
def test_a_set_goes_by_one_name(tmp_path: Path, name: str) -> None:
    write_images(tmp_path / "traffic_sign", ["00"])
    write_images(tmp_path / "more" / "traffic_sign", ["00"])
    with pytest.raises(ValueError, match=r"expected the name of a folder in .*, without a slash"):
        open_image_set(tmp_path, name)


# The cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


def test_cache_is_made_once_and_remade_for_changed_files(folder: Path) -> None:
    paths, labels = list_images(folder / "data", read_split(folder / "split.json", "train"))
    assert len(paths) == 100
    assert labels.tolist() == [label for label in range(5) for _ in range(20)]
    images = cached_images(paths, 24, 20, folder / "cache")
    assert images.shape == (100, 20, 20, 3)
    assert isinstance(images, np.memmap)
    again = cached_images(paths, 24, 20, folder / "cache")
    assert images.filename == again.filename
    Image.new("RGB", (30, 24), "red").save(paths[7])
    assert (cached_images(paths, 24, 20, folder / "cache")[7] == (255, 0, 0)).all()
    assert len(list((folder / "cache").iterdir())) == 2


def test_a_full_disk_leaves_no_cache(folder: Path) -> None:
    paths, _ = list_images(folder / "data", ["class0"])
    with disk_of(5000), pytest.raises(OSError, match="cache") as caught:
        cached_images(paths, 24, 20, folder / "cache")
    assert caught.value.errno == errno.EFBIG
    assert not list((folder / "cache").iterdir())
    assert len(cached_images(paths, 24, 20, folder / "cache")) == 20


def test_an_unreadable_image_is_named_and_leaves_no_cache(folder: Path) -> None:
    broken = folder / "data" / "class0" / "07.png"
    broken.write_bytes(broken.read_bytes()[:100])
    paths, _ = list_images(folder / "data", ["class0"])
    with pytest.raises(ImageError, match=r"class0/07\.png"):
        cached_images(paths, 24, 20, folder / "cache")
    assert not list((folder / "cache").iterdir())


def test_the_cache_s_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_directory() == tmp_path / "tinytrain_ext"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_directory() == Path.home() / ".cache" / "tinytrain_ext"
