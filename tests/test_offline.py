"""Pre-training: folding, determinism, resumption, and what it says about bad data."""
# ruff: noqa: E402 (without torch the imports below would fail instead of skipping)

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("tqdm")

from tinytrain_ext.architectures import Architecture, Block
from tinytrain_ext.errors import ImageError, NonFiniteError
from tinytrain_ext.network import Network
from tinytrain_ext.offline.augment import augment
from tinytrain_ext.offline.backbones import Backbone, embed, fold_batch_norm
from tinytrain_ext.offline.evaluate_backbone import episode_accuracy
from tinytrain_ext.offline.evaluate_backbone import main as evaluate_backbone
from tinytrain_ext.offline.image_cache import cached_images, list_images, read_split
from tinytrain_ext.offline.pretrain import Epoch, Recipe, Stage, pretrain, to_network
from tinytrain_ext.offline.pretrain import main as pretrain_command

TINY = Architecture(
    name="tiny",
    stem_channels=8,
    blocks=(
        Block(3, 8, 8, 8, 1, False),
        Block(3, 8, 16, 8, 1, True),
        Block(5, 8, 24, 16, 2, False),
    ),
    feature_mix=24,
)
RECIPE = Recipe(stages=(Stage(16, 2), Stage(24, 2)), batch_size=8, warmup_epochs=1, seed=3)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (36, 20, 20, 3), dtype=np.uint8)


LABELS = np.repeat(np.arange(3), 12)


def weights_after(
    images: np.ndarray, checkpoint: Path, recipe: Recipe = RECIPE
) -> list[np.ndarray]:
    backbone, _ = pretrain(TINY, images, LABELS, recipe, checkpoint)
    weights, biases = fold_batch_norm(backbone)
    return [*weights, *biases]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("feature_mix", [False, True])
def test_folded_network_gives_the_backbone_s_features(
    images: np.ndarray, feature_mix: bool
) -> None:
    torch.manual_seed(0)
    backbone = Backbone(TINY, feature_mix)
    for norm in backbone.norms:  # nothing left at a value that would hide a mistake
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
        torch.nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    network = to_network(backbone, "tiny", input_size=20, resize=20)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 127.5 - 1
    with torch.no_grad():
        expected = backbone.double().eval()(x).numpy()
    assert expected.shape == (36, backbone.feature_dim) == (36, network.feature_dim)
    features = embed(network, images, batch_size=10, dtype=torch.float64)
    # The folded weights are rounded to float32 once, everything else is float64.
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)


def test_same_seed_same_weights(images: np.ndarray, tmp_path: Path) -> None:
    first = weights_after(images, tmp_path / "a")
    state = torch.random.get_rng_state()
    torch.manual_seed(99)  # the global generator must not matter
    assert same(first, weights_after(images, tmp_path / "b"))
    torch.random.set_rng_state(state)
    other = dataclasses.replace(RECIPE, seed=4)
    assert not same(first, weights_after(images, tmp_path / "c", other))


@pytest.mark.parametrize("interrupted_after", [1, 3])
def test_resumed_run_equals_the_uninterrupted_one(
    images: np.ndarray, tmp_path: Path, interrupted_after: int
) -> None:
    def interrupt(epoch: Epoch) -> None:
        if epoch.epoch == interrupted_after:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        pretrain(TINY, images, LABELS, RECIPE, checkpoint, on_epoch=interrupt)
    assert same(weights_after(images, checkpoint), weights_after(images, tmp_path / "whole"))


def test_history_and_validation(images: np.ndarray, tmp_path: Path) -> None:
    seen: list[bool] = []

    def validate(backbone: Backbone) -> float:
        seen.append(backbone.training)
        return 42.0

    _, history = pretrain(
        TINY, images, LABELS, RECIPE, tmp_path / "c", validate=validate, validate_every=3
    )
    assert [epoch.size for epoch in history] == [16, 16, 24, 24]
    assert [epoch.validation for epoch in history] == [None, None, 42.0, 42.0]
    assert seen == [False, False]
    assert all(np.isfinite(epoch.loss) for epoch in history)


def test_checkpoint_of_another_recipe_is_refused(images: np.ndarray, tmp_path: Path) -> None:
    weights_after(images, tmp_path / "c")
    with pytest.raises(ValueError, match="another run: recipe"):
        weights_after(images, tmp_path / "c", dataclasses.replace(RECIPE, momentum=0.8))


def test_diverging_run_stops(images: np.ndarray, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, learning_rate=1e30, warmup_epochs=0)
    with pytest.raises(NonFiniteError, match="loss"):
        pretrain(TINY, images, LABELS, recipe, tmp_path / "c")


def test_too_few_images(images: np.ndarray, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, batch_size=64)
    with pytest.raises(ValueError, match="a batch of 64, got 36"):
        pretrain(TINY, images, LABELS, recipe, tmp_path / "c")


def test_augment_normalises_and_leaves_a_plain_image_plain() -> None:
    plain = np.full((8, 20, 20, 3), 51, np.uint8)
    x = augment(plain, 32, smallest_crop=0.2, jitter=0.0, rng=np.random.default_rng(0))
    assert x.shape == (8, 3, 32, 32)
    np.testing.assert_allclose(x.numpy(), 51 / 127.5 - 1, atol=1e-5)


def test_augment_flips_sideways_only() -> None:
    ramp = np.arange(20, dtype=np.uint8) * 10
    brighter_down = np.broadcast_to(ramp[:, None, None], (64, 20, 20, 3)).copy()
    brighter_right = np.broadcast_to(ramp[:, None], (64, 20, 20, 3)).copy()
    x = augment(brighter_down, 16, 0.3, 0.2, np.random.default_rng(0)).numpy()
    assert (x[:, :, -1] > x[:, :, 0]).all()
    x = augment(brighter_right, 16, 0.3, 0.2, np.random.default_rng(0)).numpy()
    flipped = (x[..., -1] < x[..., 0]).all(axis=(1, 2))
    assert 0.3 < flipped.mean() < 0.7
    assert (x[~flipped][..., -1] > x[~flipped][..., 0]).all()


def test_episodes_of_separable_and_of_equal_features() -> None:
    labels = np.repeat(np.arange(6), 12)
    rng = np.random.default_rng(0)
    options = {"ways": 5, "shots": 2, "queries": 10, "episodes": 30}
    separable = np.eye(6)[labels] + 0.01 * rng.standard_normal((72, 6))
    assert episode_accuracy(separable, labels, rng=rng, **options).mean == 100
    noise = rng.standard_normal((72, 6))
    accuracy = episode_accuracy(noise, labels, rng=rng, **options)
    assert abs(accuracy.mean - 20) < 5
    assert 0 < accuracy.interval < 5
    with pytest.raises(ValueError, match="ways: expected at most the 6 classes"):
        episode_accuracy(noise, labels, rng=rng, **options | {"ways": 7})
    with pytest.raises(ValueError, match="at most the 12 images"):
        episode_accuracy(noise, labels, rng=rng, **options | {"shots": 3})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight class folders of 20 small images, five of them training classes, and the split."""
    rng = np.random.default_rng(0)
    subsets = ["train"] * 3 + ["val"] * 5
    split = {f"class{number}": subset for number, subset in enumerate(subsets)}
    for name in split:
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number:02d}.png")
    (tmp_path / "split.json").write_text(json.dumps(split))
    return tmp_path


def test_cache_is_made_once_and_remade_for_changed_files(folder: Path) -> None:
    paths, labels = list_images(folder / "data", read_split(folder / "split.json", "train"))
    assert len(paths) == 60
    assert labels.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    images = cached_images(paths, 24, 20, folder / "cache")
    assert images.shape == (60, 20, 20, 3)
    assert isinstance(images, np.memmap)
    again = cached_images(paths, 24, 20, folder / "cache")
    assert images.filename == again.filename
    Image.new("RGB", (30, 24), "red").save(paths[7])
    assert (cached_images(paths, 24, 20, folder / "cache")[7] == (255, 0, 0)).all()
    assert len(list((folder / "cache").iterdir())) == 2


def test_bad_data_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="class 'class9'"):
        list_images(folder / "data", ["class9"])
    (folder / "data" / "empty").mkdir()
    with pytest.raises(ValueError, match="class 'empty': expected images"):
        list_images(folder / "data", ["empty"])
    with pytest.raises(ValueError, match="at least one class of 'test'"):
        read_split(folder / "split.json", "test")
    (folder / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        read_split(folder / "list.json", "test")
    broken = folder / "data" / "class0" / "07.png"
    broken.write_bytes(broken.read_bytes()[:100])
    paths, _ = list_images(folder / "data", ["class0"])
    with pytest.raises(ImageError, match=r"class0/07\.png"):
        cached_images(paths, 24, 20, folder / "cache")
    assert not list((folder / "cache").iterdir())


def test_commands_end_to_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tinytrain_ext.offline.pretrain.ARCHITECTURES", {"mcunet": TINY})
    data = ["--data", str(folder / "data"), "--split", str(folder / "split.json")]
    data += ["--cache", str(folder / "cache")]
    out = folder / "out.safetensors"
    sizes = ["--stored-size", "24", "--input-size", "20", "--resize", "24"]
    output = ["--work", str(folder / "work"), "--out", str(out)]
    pretrain_command([*data, *sizes, *output, "--stages", "16:1", "20:1", "--batch-size", "16"])
    assert Network.load(out).input_size == 20
    history = json.loads((folder / "work" / "history.json").read_text())
    assert [epoch["size"] for epoch in history] == [16, 20]
    assert history[-1]["validation"] is not None
    evaluate_backbone([str(out), *data, "--subset", "val", "--episodes", "10"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["shots"] for row in rows] == [5, 1]
    assert all(5 < row["mean"] < 50 for row in rows)
