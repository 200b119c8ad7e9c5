"""The offline stage but for its training: folding, augmentation, evaluation."""
# ruff: noqa: E402 (without torch the imports below would fail instead of skipping)

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tqdm")

from offline_cases import TINY
from tinytrain_ext.architectures import operations
from tinytrain_ext.offline.augment import Augmentation, turn
from tinytrain_ext.offline.backbones import Backbone, embed
from tinytrain_ext.offline.evaluate_backbone import episode_accuracy

pytestmark = pytest.mark.all_cases


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (36, 20, 20, 3), dtype=np.uint8)


@pytest.mark.parametrize("feature_mix", [False, True])
def test_folded_network_gives_the_backbone_s_features(
    images: np.ndarray, feature_mix: bool
) -> None:
    torch.manual_seed(0)
    backbone = Backbone(operations(TINY, feature_mix))
    for norm in backbone.norms:  # nothing left at a value that would hide a mistake
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
        torch.nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    network = backbone.to_network("tiny", input_size=20, resize=20)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 127.5 - 1
    with torch.no_grad():
        expected = backbone.double().eval()(x).numpy()
    assert expected.shape == (36, backbone.feature_dim) == (36, network.feature_dim)
    features = embed(network, images, batch_size=10, dtype=torch.float64)
    # The folded weights are rounded to float32 once, everything else is float64.
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)


def test_augment_normalises_and_leaves_a_plain_image_plain() -> None:
    plain = np.full((8, 20, 20, 3), 51, np.uint8)
    x = Augmentation.draw(8, 0.2, 0.0, np.random.default_rng(0)).apply(plain, 32)
    assert x.shape == (8, 3, 32, 32)
    np.testing.assert_allclose(x.numpy(), 51 / 127.5 - 1, atol=1e-5)


def test_augment_flips_sideways_only() -> None:
    ramp = np.arange(20, dtype=np.uint8) * 10
    brighter_down = np.broadcast_to(ramp[:, None, None], (64, 20, 20, 3)).copy()
    brighter_right = np.broadcast_to(ramp[:, None], (64, 20, 20, 3)).copy()
    drawn = Augmentation.draw(64, 0.3, 0.2, np.random.default_rng(0))
    x = drawn.apply(brighter_down, 16).numpy()
    assert (x[:, :, -1] > x[:, :, 0]).all()
    x = drawn.apply(brighter_right, 16).numpy()
    flipped = (x[..., -1] < x[..., 0]).all(axis=(1, 2))
    assert 0.3 < flipped.mean() < 0.7
    assert (x[~flipped][..., -1] > x[~flipped][..., 0]).all()


def test_turned_by_quarters() -> None:
    images = torch.arange(4 * 12).view(4, 3, 2, 2).float()
    expected = [np.rot90(image, k, (1, 2)) for k, image in enumerate(images.clone().numpy())]
    np.testing.assert_array_equal(turn(images, np.arange(4)).numpy(), expected)


def test_a_part_of_a_drawn_augmentation_is_the_part_s(images: np.ndarray) -> None:
    drawn = Augmentation.draw(len(images), 0.2, 0.4, np.random.default_rng(0))
    whole = drawn.apply(images, 16)
    assert torch.equal(drawn[9:18].apply(images[9:18], 16), whole[9:18])


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
