"""The drawn task of `tinytrain demo`, and the demo itself."""

import json

import numpy as np
import pytest
from PIL import Image

from tasks import tiny_network
from tinytrain_ext.cli import main
from tinytrain_ext.demo import CLASSES, draw_task, save_images
from tinytrain_ext.network import Network


def test_the_task():
    calls = []
    task = draw_task(64, shots=2, queries=3, progress=lambda *call: calls.append(call))
    assert calls == [(count, 25) for count in range(1, 26)]
    for images, count in ((task.support, 2), (task.query, 3)):
        assert images.classes == CLASSES
        assert images.images.shape == (5 * count, 64, 64, 3)
        assert images.images.dtype == np.uint8
        np.testing.assert_array_equal(images.labels, np.repeat(np.arange(5), count))
        assert images.images.std(axis=(1, 2, 3)).min() > 5
    everything = np.concatenate([task.support.images, task.query.images])
    assert len(np.unique(everything, axis=0)) == 25  # no drawing twice


def test_the_seed_decides():
    first, again, other = (draw_task(48, shots=1, queries=1, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.query.images, again.query.images)
    assert (first.query.images != other.query.images).any()
    more = draw_task(48, shots=2, queries=1, seed=3)
    np.testing.assert_array_equal(more.support.images[::2], first.support.images)


def test_saved_images_are_the_task(tmp_path):
    task = draw_task(32, shots=1, queries=2)
    save_images(task, str(tmp_path))
    files = sorted((tmp_path / "query").rglob("*.png"))
    assert len(files) == 10
    assert {file.parent.name for file in files} == set(CLASSES)
    assert len(list((tmp_path / "support").rglob("*.png"))) == 5
    np.testing.assert_array_equal(np.asarray(Image.open(files[0])), task.query.images[0])
    with Image.open(tmp_path / "task.png") as picture:
        assert picture.size == (2 * 32, 5 * 32)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "tiny.safetensors"
    tiny_network().save(path)
    return str(path)


def test_the_command(capsys, tmp_path, network):
    images, out = tmp_path / "drawings" / "here", tmp_path / "adapted.safetensors"
    arguments = ["demo", "--network", network, "--compute", "0.6", "--iterations", "2"]
    assert main([*arguments, "--json", "--save-images", str(images), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err == ""
    assert (found["support_images"], found["query_images"]) == (25, 100)
    assert 0 <= found["accuracy_before"] <= 1
    assert 0 <= found["accuracy_after"] <= 1
    assert found["arena_high_water_bytes"] <= found["planned_peak_bytes"]
    assert len(list(images.rglob("*.png"))) == 126
    assert Network.load(out).classes == CLASSES

    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("The task is drawn by this program (no photographs): cup, fish")
    for part in ("before", "after", "layer", "channels", "planned", "measured", "time"):
        assert part in text


@pytest.mark.all_cases
def test_the_embedded_network_learns_the_task(capsys):
    before, after = [], []
    for seed in (0, 1):
        assert main(["demo", "--seed", str(seed), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        before.append(found["accuracy_before"])
        after.append(found["accuracy_after"])
        assert found["planned_peak_bytes"] == found["arena_high_water_bytes"] <= 1 << 20
    assert 0.3 < np.mean(before) < 0.9
    assert np.mean(after) > np.mean(before) + 0.08
