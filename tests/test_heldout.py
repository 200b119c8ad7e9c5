"""The held-out criterion: gains by their definition, within memory, and what is chosen by them."""

import itertools

import numpy as np
import pytest

from tasks import shapes_task, tiny_network
from tinytrain_ext.adapt import adapt
from tinytrain_ext.architectures import ARCHITECTURES, random_network
from tinytrain_ext.cost import profile
from tinytrain_ext.errors import BudgetExceeded
from tinytrain_ext.heldout import held_out_gain, reachable_layers
from tinytrain_ext.images import draw_augmentation
from tinytrain_ext.selection import Budget, LayerUpdate, UpdatePolicy, select
from tinytrain_ext.session import Session, plan

LAYERS = (12, 15, 18)


def gain(network, images, labels, **options):
    options = {"rng": np.random.default_rng(5), "layers": LAYERS} | options
    return held_out_gain(network, images, labels, **options)


def photo_gradients(network, images, labels, layer):
    """The gradient of one layer's weights by each photo alone: (N, O, weights of a channel)."""
    channels = range(len(network.biases[layer]))
    session = Session(network, UpdatePolicy({layer: channels}), optimizer="sgd", dtype="float64")
    session.set_prototypes(images, labels, int(labels.max()) + 1)
    augmentation = draw_augmentation(len(images), network.input_size, np.random.default_rng(5))
    found = []
    for n in range(len(images)):
        session.proto_backward(
            images[n : n + 1], labels[n : n + 1], augmentation[n : n + 1], network.logit_scale
        )
        found.append(session.gradients()[layer].reshape(len(channels), -1).copy())
        session.zero_grad()
    return np.stack(found)


def test_a_gain_is_the_agreement_between_different_photos():
    network = tiny_network()
    images, labels = shapes_task(ways=3, shots=2)
    found = gain(network, images, labels).information
    assert tuple(found) == LAYERS
    for layer in LAYERS:
        gradients = photo_gradients(network, images, labels, layer)
        pairs = itertools.permutations(gradients, 2)
        agreement = sum((one * other).sum(axis=1) for one, other in pairs)
        size = gradients.shape[2]
        expected = np.sqrt(size * np.maximum(agreement, 0)) / len(images)
        assert expected.max() > 0
        # A difference of sums: what rounding leaves is judged by the sums.
        scale = np.sqrt(size * np.square(gradients).sum(axis=(0, 2))) / len(images)
        np.testing.assert_allclose(found[layer], expected, atol=2e-3 * scale.max())


def test_less_memory_takes_more_passes_to_the_same_gains():
    network = tiny_network()
    images, labels = shapes_task(shots=2)
    free = gain(network, images, labels)
    with pytest.raises(BudgetExceeded) as error:
        gain(network, images, labels, memory_bytes=1)
    needed = error.value.needed_bytes
    passes = []
    tight = gain(
        network, images, labels, memory_bytes=needed, progress=lambda *of: passes.append(of)
    )
    assert passes == [(done, len(passes) - 1) for done in range(len(passes))]
    assert len(passes) - 1 > len(LAYERS)
    assert tight.arena_high_water <= tight.plan.peak_bytes < needed < free.plan.peak_bytes
    for layer in LAYERS:
        np.testing.assert_allclose(
            tight.information[layer],
            free.information[layer],
            atol=1e-4 * free.information[layer].max(),
        )
    with pytest.raises(BudgetExceeded):
        gain(network, images, labels, memory_bytes=needed - 1)


@pytest.mark.all_cases
def test_the_smallest_limit_is_that_of_the_engine_s_smallest_plan():
    network = random_network(ARCHITECTURES["mcunet"], np.random.default_rng(0))
    images = np.zeros((2, 128, 128, 3), np.uint8)
    one_channel = UpdatePolicy({14: (0,)})
    options = {"optimizer": "sgd", "max_ways": 2}
    with pytest.raises(BudgetExceeded) as of_plan:
        plan(network, one_channel, memory_bytes=1, **options)
    smallest = of_plan.value.needed_bytes
    assert smallest < plan(network, one_channel, **options).peak_bytes  # thinner strips
    with pytest.raises(BudgetExceeded) as of_gain:
        gain(network, images, np.arange(2), layers=(14,), memory_bytes=1)
    needed = of_gain.value.needed_bytes
    assert needed == smallest + 8 * network.weights[14][0].size + 40  # the sums of one channel
    gain(network, images, np.arange(2), layers=(14,), memory_bytes=needed)


def test_seed_decides_and_threads_do_not():
    network = tiny_network()
    images, labels = shapes_task()
    first, threaded = (gain(network, images, labels, threads=n).information for n in (1, 3))
    other = gain(network, images, labels, rng=np.random.default_rng(6)).information
    for layer in LAYERS:
        np.testing.assert_array_equal(first[layer], threaded[layer])
    assert any((first[layer] != other[layer]).any() for layer in LAYERS)


def test_reachable_layers_are_expansions_within_the_compute_budget():
    costs = profile(random_network(ARCHITECTURES["mcunet"], np.random.default_rng(0)))
    few, more = (reachable_layers(costs, Budget(compute=share)) for share in (0.15, 0.3))
    assert set(few) < set(more)
    assert few == (30, 33, 36, 39)
    assert all(costs.layers[layer].kind == "pointwise" for layer in more)
    assert all(costs.layers[layer].activation == "relu6" for layer in more)
    assert reachable_layers(costs, Budget(compute=1e-6)) == (len(costs.layers) - 1,)


@pytest.fixture
def costs():
    return profile(tiny_network())


def gains_of(costs, seed):
    """Gains of which many are zero, as real ones are."""
    rng = np.random.default_rng(seed)
    return {
        layer: np.maximum(rng.normal(0, 1, costs.layers[layer].out_channels), 0)
        * np.exp(rng.normal(0, 1))
        for layer in (9, 12, 15, 18, 21)
    }


def bytes_of_weights(costs):
    return lambda policy: 1000 + 16 * costs.updated_weights(policy)


def value(policy, gains):
    return sum(gains[layer][list(update.channels)].sum() for layer, update in policy.layers.items())


@pytest.mark.parametrize("seed", range(12))
def test_a_choice_keeps_the_budget_and_no_reach_promises_more(costs, seed):
    gains, rng = gains_of(costs, seed), np.random.default_rng(seed)
    budget = Budget(int(rng.integers(8_000, 60_000)), float(rng.uniform(0.15, 0.4)))
    peak = bytes_of_weights(costs)
    policy = select(gains, costs, budget, criterion="held_out", peak_bytes=peak)
    assert peak(policy) <= budget.memory_bytes
    assert costs.compute_share(policy) <= budget.compute
    for layer, update in policy.layers.items():
        assert (gains[layer][list(update.channels)] > 0).all()
    # Any other reach, filled by gain a weight one channel at a time, promises no more.
    sizes = {k: costs.layers[k].weights / costs.layers[k].out_channels for k in gains}
    for first in gains:
        offers = sorted(
            (-gains[k][c] / sizes[k], k, c)
            for k in gains
            for c in range(len(gains[k]))
            if k >= first
        )
        own = next(offer for offer in offers if offer[1] == first)
        chosen: dict[int, list[int]] = {}
        filled = UpdatePolicy()
        for offer in [own, *(offer for offer in offers if offer != own)]:
            if offer[0] == 0:
                continue
            chosen.setdefault(offer[1], []).append(offer[2])
            larger = UpdatePolicy({k: LayerUpdate("out", tuple(v)) for k, v in chosen.items()})
            if peak(larger) > budget.memory_bytes or costs.compute_share(larger) > budget.compute:
                break
            filled = larger
        assert value(filled, gains) <= value(policy, gains) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_a_choice_depends_on_neither_order_nor_scale(costs, seed):
    gains = gains_of(costs, seed)
    options = {"criterion": "held_out", "peak_bytes": bytes_of_weights(costs)}
    budget = Budget(30_000, 0.3)
    policy = select(gains, costs, budget, **options)
    assert policy == select(dict(reversed(gains.items())), costs, budget, **options)
    for scale in (1e-20, 1e20):
        scaled = {layer: scale * values for layer, values in gains.items()}
        assert policy == select(scaled, costs, budget, **options)


def test_what_promises_nothing_is_not_trained(costs):
    gains = {layer: np.zeros(costs.layers[layer].out_channels) for layer in (15, 18)}
    gains[15][3] = 1.0
    options = {"criterion": "held_out", "peak_bytes": bytes_of_weights(costs)}
    budget = Budget(compute=0.4)
    policy = select(gains, costs, budget, **options)
    assert policy == UpdatePolicy({15: (3,)})
    gains[15][3] = 0.0
    nothing = select(gains, costs, budget, **options)
    assert list(nothing.layers) == [18]
    assert len(nothing.layers[18].channels) == 1


def test_an_impossible_budget_names_what_would_do(costs):
    gains, peak = gains_of(costs, 0), bytes_of_weights(costs)
    options = {"criterion": "held_out", "peak_bytes": peak}
    with pytest.raises(BudgetExceeded) as error:
        select(gains, costs, Budget(1000, 0.4), **options)
    needed = error.value.needed_bytes
    assert peak(select(gains, costs, Budget(needed, 0.4), **options)) == needed
    with pytest.raises(ValueError, match="criterion: expected tinytrain or held_out, got 'best'"):
        select(gains, costs, Budget(), criterion="best")


def test_adapt_by_it():
    network = tiny_network()
    images, labels = shapes_task()
    budget = Budget(150_000, 0.5)
    result = adapt(
        network, images, labels, budget=budget, criterion="held_out", iterations=30, seed=1
    )
    assert result.peak_bytes <= budget.memory_bytes
    assert set(result.policy.layers) <= set(reachable_layers(profile(network), budget))
    losses = [iteration.loss for iteration in result.history]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    images, labels = shapes_task(shots=2)
    with pytest.raises(BudgetExceeded) as error:
        adapt(network, images, labels, budget=Budget(1000, 0.5), criterion="held_out")
    needed = Budget(error.value.needed_bytes, 0.5)
    again = adapt(network, images, labels, budget=needed, criterion="held_out", iterations=1)
    assert again.peak_bytes <= needed.memory_bytes
    with pytest.raises(ValueError, match="criterion: expected tinytrain or held_out"):
        adapt(network, images, labels, criterion="best")
