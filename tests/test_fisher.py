import numpy as np
import pytest

from tasks import shapes_task, tiny_network
from tinytrain_ext.cost import inspected_layers
from tinytrain_ext.errors import BudgetExceeded
from tinytrain_ext.fisher import fisher_information, fisher_pass
from tinytrain_ext.images import apply_augmentation, draw_augmentation
from tinytrain_ext.protonet import compute_prototypes, loss_and_gradient


def test_fisher_of_the_last_convolution_by_its_definition():
    """Its output is linear and feeds the pool: sum over H, W of a * g is feature * gradient."""
    network = tiny_network()
    images, labels = shapes_task(ways=3, shots=4)
    last = len(network.convolutions) - 1
    found = fisher_information(network, images, labels, rng=5, layers=[last])

    pseudo_query = apply_augmentation(
        images, draw_augmentation(len(images), network.input_size, np.random.default_rng(5))
    )
    prototypes = compute_prototypes(network.embed(images), labels, 3)
    features = network.embed(pseudo_query).astype(np.float64)
    _, _, gradient = loss_and_gradient(features, labels, prototypes, network.logit_scale)
    expected = np.square(features * gradient).sum(axis=0) / (2 * len(images))
    np.testing.assert_allclose(found[last], expected, rtol=1e-4, atol=1e-6 * expected.max())


def test_inspected_layers_by_default_and_the_same_alone():
    network = tiny_network()
    images, labels = shapes_task()
    fisher = fisher_information(network, images, labels, rng=1)
    assert tuple(fisher) == inspected_layers(network)
    for layer, values in fisher.items():
        assert values.shape == (network.weights[layer].shape[0],)
        assert values.dtype == np.float64
        assert (values >= 0).all()
        assert values.max() > 0
    alone = fisher_information(network, images, labels, rng=1, layers=[10])
    np.testing.assert_array_equal(alone[10], fisher[10])


def test_seed_decides_and_threads_do_not():
    network = tiny_network()
    images, labels = shapes_task()
    first, threaded, other = (
        fisher_information(network, images, labels, rng=seed, threads=threads)
        for seed, threads in ((1, 1), (1, 4), (2, 1))
    )
    for layer in first:
        np.testing.assert_array_equal(first[layer], threaded[layer])
    assert any((first[layer] != other[layer]).any() for layer in first)


def test_the_pass_obeys_its_limit_down_to_the_smallest():
    network = tiny_network()
    images, labels = shapes_task()

    def run(memory_bytes):
        return fisher_pass(
            network, images, labels, rng=np.random.default_rng(1), memory_bytes=memory_bytes
        )

    free = run(None)
    with pytest.raises(BudgetExceeded) as error:
        run(1)
    needed = error.value.needed_bytes
    assert needed <= free.plan.peak_bytes
    tight = run(needed)
    assert tight.arena_high_water <= tight.plan.peak_bytes <= needed
    for layer, values in free.information.items():
        np.testing.assert_allclose(tight.information[layer], values, rtol=1e-4)
    with pytest.raises(BudgetExceeded):
        run(needed - 1)
