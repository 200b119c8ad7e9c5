import errno
import os

import numpy as np
import pytest

from tasks import shapes_task, tiny_network
from tinytrain_ext.adapt import adapt
from tinytrain_ext.images import draw_augmentation
from tinytrain_ext.selection import LayerUpdate, UpdatePolicy, full_train
from tinytrain_ext.session import Prefix, Session
from tinytrain_ext.views import PseudoQueries, Views

NETWORK = tiny_network()
IMAGES, LABELS = shapes_task(shots=4)
LAST = len(NETWORK.convolutions) - 1
POLICY = UpdatePolicy({LAST: LayerUpdate("out", (1, 2, 5)), LAST - 2: LayerUpdate("out", (0, 3))})


def session(policy=POLICY, **options):
    made = Session(NETWORK, policy, optimizer="sgd", max_ways=3, **options)
    made.set_prototypes(IMAGES, LABELS, 3)
    return made


@pytest.mark.parametrize("options", [{}, {"dtype": "float64"}, {"threads": 2}, {"guard_bytes": 64}])
def test_prefix_outputs_serve_in_place_of_images(options):
    direct, behind = session(**options), session(**options)
    augmentation = draw_augmentation(len(IMAGES), NETWORK.input_size, np.random.default_rng(0))
    outputs = behind.prefix(IMAGES, augmentation)
    assert outputs.values.shape == (len(IMAGES), *behind.prefix_shape)
    for step in range(3):  # the prefix does not change while the tail does
        assert direct.proto_backward(IMAGES, LABELS, augmentation) == behind.proto_backward(
            outputs, LABELS
        )
        for layer, gradient in direct.gradients().items():
            assert gradient.any()
            np.testing.assert_array_equal(gradient, behind.gradients()[layer], err_msg=str(step))
        for one in (direct, behind):
            one.step(0.1)
            one.zero_grad()
    plain = behind.prefix(IMAGES)
    np.testing.assert_array_equal(direct.embed(IMAGES), behind.embed(plain))
    direct.set_prototypes(IMAGES, LABELS, 3)
    behind.set_prototypes(plain, LABELS, 3)
    np.testing.assert_array_equal(direct.prototypes(), behind.prototypes())
    grad_features = np.ones_like(direct.embed(IMAGES))
    direct.backward(IMAGES, grad_features)
    behind.backward(plain, grad_features)
    for layer, gradient in direct.gradients().items():
        np.testing.assert_array_equal(gradient, behind.gradients()[layer])
    assert behind.broken_guard() == ""


def test_prefix_rejects_what_does_not_fit():
    one = session()
    assert session(full_train(NETWORK)).prefix_shape is None
    with pytest.raises(ValueError, match="prefix: gradients reach the first block"):
        session(full_train(NETWORK)).prefix(IMAGES)
    with pytest.raises(ValueError, match=r"prefix: expected shape \(N, "):
        one.embed(Prefix(np.zeros((2, 3, 3, 3), np.float32)))
    with pytest.raises(TypeError, match="prefix: expected a C-contiguous array"):
        one.embed(Prefix(np.zeros((2, *one.prefix_shape))))
    with pytest.raises(ValueError, match="out: expected shape"):
        one.prefix(IMAGES, out=np.zeros((1, *one.prefix_shape), np.float32))
    outputs = one.prefix(IMAGES)
    with pytest.raises(ValueError, match="augmentation: the prefix has seen"):
        one.proto_backward(
            outputs, LABELS, draw_augmentation(len(IMAGES), 1, np.random.default_rng(0))
        )
    read_only = np.zeros((len(IMAGES), *one.prefix_shape), np.float32)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        one.prefix(IMAGES, out=read_only)


def test_only_views_that_are_asked_for_are_drawn():
    def drawn(count):
        queries = PseudoQueries(
            session(), IMAGES, np.random.default_rng(3), views=Views(count), iterations=2
        )
        return [queries.view(iteration)[1].parameters for iteration in range(2)]

    assert np.array_equal(drawn(1 << 50), drawn(3))


def test_a_cache_changes_nothing_but_the_work(tmp_path):
    one_view = IMAGES.shape[0] * int(np.prod(session().prefix_shape)) * 4
    cases = {
        "nothing cached": Views(3, 0),
        "one view cached": Views(3, one_view),
        "all cached": Views(3, 100 * one_view),
        "in a file": Views(3, 100 * one_view, tmp_path),
    }
    results = {
        name: adapt(NETWORK, IMAGES, LABELS, policy=POLICY, iterations=7, views=views)
        for name, views in cases.items()
    }
    assert [r.cache_bytes // one_view for r in results.values()] == [0, 1, 3, 3]
    assert not list(tmp_path.iterdir())
    first = results["nothing cached"]
    for result in results.values():
        assert result.history == first.history
        for layer in POLICY.layers:
            np.testing.assert_array_equal(
                result.network.weights[layer], first.network.weights[layer]
            )
    fresh = adapt(NETWORK, IMAGES, LABELS, policy=POLICY, iterations=7)
    assert fresh.history[:3] == first.history[:3]  # the same draws, until a view comes round
    assert fresh.history[3:] != first.history[3:]


@pytest.mark.parametrize(
    ("views", "policy"), [(Views(7), POLICY), (None, POLICY), (Views(2), full_train(NETWORK))]
)
def test_nothing_is_cached_where_it_would_not_pay(views, policy):
    queries = PseudoQueries(
        session(policy), IMAGES, np.random.default_rng(0), views=views, iterations=7
    )
    assert queries.cached_bytes == 0
    images, augmentation = queries.view(0)
    assert images is IMAGES
    assert augmentation is not None


def test_a_full_disk_is_an_error_before_any_training(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        adapt(NETWORK, IMAGES, LABELS, policy=POLICY, iterations=5, views=Views(2, folder=tmp_path))
    assert not list(tmp_path.iterdir())


def test_views_rejects_nonsense():
    with pytest.raises(ValueError, match="count: expected at least 1"):
        Views(0)
    with pytest.raises(ValueError, match="cache_bytes: expected 0 or more"):
        Views(2, -1)
