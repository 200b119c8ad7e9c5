import dataclasses
import json
import math

import numpy as np
import pytest

from tinytrain_ext.architectures import ARCHITECTURES, random_network
from tinytrain_ext.cost import inspected_layers, profile
from tinytrain_ext.errors import BudgetExceeded
from tinytrain_ext.selection import (
    Budget,
    LayerUpdate,
    UpdatePolicy,
    full_train,
    last_layer,
    score,
    select,
    sparse_update,
    top_channels,
)

NETWORKS = {
    name: random_network(architecture, np.random.default_rng(0))
    for name, architecture in ARCHITECTURES.items()
}
PROFILES = {name: profile(network) for name, network in NETWORKS.items()}


def drawn_fisher(costs, rng):
    """Fisher information spread over many orders of magnitude, as the real one is."""
    return {
        layer: np.exp(rng.normal(0, 3) + rng.normal(0, 2, costs.layers[layer].out_channels))
        for layer in inspected_layers(costs.network)
    }


def fake_peak(costs):
    """A stand-in for the engine: bytes of saved inputs, masks and training state."""

    def peak_bytes(policy):
        state = 16 * costs.updated_weights(policy)
        return 100_000 + math.ceil(costs.mask_bytes(policy)) + costs.saved_bytes(policy) + state

    return peak_bytes


CASES = [(name, seed) for name in PROFILES for seed in range(8)]


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_a_selection_never_exceeds_its_budget_and_misses_nothing_that_fits(name, seed):
    costs, rng = PROFILES[name], np.random.default_rng(seed)
    fisher = drawn_fisher(costs, rng)
    ratio = float(rng.choice([1 / 8, 1 / 4, 1 / 2, 1]))
    memory = int(rng.integers(300_000, 1_500_000))
    budget = Budget(memory_bytes=memory, compute=float(rng.uniform(0.1, 0.4)))
    peak = fake_peak(costs)
    policy = select(fisher, costs, budget, ratio, peak_bytes=peak)
    assert peak(policy) <= budget.memory_bytes
    assert costs.compute_share(policy) <= budget.compute
    for layer in set(fisher) - set(policy.layers):
        count = max(1, int(ratio * costs.layers[layer].out_channels))
        larger = UpdatePolicy({**policy.layers, layer: LayerUpdate("out", tuple(range(count)))})
        fits = peak(larger) <= budget.memory_bytes and costs.compute_share(larger) <= budget.compute
        assert not fits
    for layer, update in policy.layers.items():
        values = fisher[layer]
        assert len(update.channels) == max(1, int(ratio * len(values)))
        others = np.delete(values, update.channels)
        assert values[list(update.channels)].min() >= others.max(initial=0)


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_a_selection_depends_on_neither_order_nor_scale(name, seed):
    costs, rng = PROFILES[name], np.random.default_rng(seed)
    fisher = drawn_fisher(costs, rng)
    policy = select(fisher, costs, Budget(accounting="paper"), 0.25)
    layers = list(fisher)
    rng.shuffle(layers)
    assert policy == select(
        {layer: fisher[layer] for layer in layers}, costs, Budget(accounting="paper"), 0.25
    )
    for scale in (1e-30, 1 / 3, 1e30):
        scaled = {layer: scale * values for layer, values in fisher.items()}
        assert policy == select(scaled, costs, Budget(accounting="paper"), 0.25)


@pytest.mark.parametrize("name", PROFILES)
def test_paper_accounting_obeys_the_papers_formula(name):
    costs = PROFILES[name]
    fisher = drawn_fisher(costs, np.random.default_rng(1))
    budget = Budget(accounting="paper")
    policy = select(fisher, costs, budget, 0.5)
    assert costs.memory_bytes(policy) <= budget.memory_bytes
    # SGD keeps no moments, so that more fits
    slim = select(fisher, costs, budget, 0.5, optimizer="sgd")
    assert costs.memory_bytes(slim, "sgd") <= budget.memory_bytes
    assert costs.updated_weights(slim) >= costs.updated_weights(policy)


def test_score_is_equation_3():
    costs = PROFILES["mcunet"]
    fisher = drawn_fisher(costs, np.random.default_rng(2))
    scores = score(fisher, costs)
    most_weights = max(row.weights for row in costs.layers)
    most_macs = max(row.macs for row in costs.layers)
    expected = {
        layer: values.sum()
        / (costs.layers[layer].weights / most_weights * costs.layers[layer].macs / most_macs)
        for layer, values in fisher.items()
    }
    factor = expected[30] / scores[30]
    for layer, value in scores.items():
        assert value * factor == pytest.approx(expected[layer])


def test_the_walk_skips_what_does_not_fit():
    """The best layer alone breaks the compute budget; the next ones must still be taken."""
    costs = PROFILES["mcunet"]
    fisher = {
        layer: np.full(costs.layers[layer].out_channels, 1.0)
        for layer in inspected_layers(costs.network)
    }
    fisher[24] = fisher[24] * 1e9
    assert max(score(fisher, costs).items(), key=lambda item: item[1])[0] == 24
    policy = select(fisher, costs, Budget(accounting="paper"))
    assert 24 not in policy.layers
    assert len(policy.layers) > 1


def test_ties_go_to_the_lower_index():
    assert top_channels(np.array([1.0, 2.0, 2.0, 2.0, 0.0]), 2) == (1, 2)
    assert top_channels(np.zeros(5), 3) == (0, 1, 2)
    # Layers 34 and 37 are twins; the budget carries half of one.
    costs = PROFILES["mcunet"]
    assert costs.layers[34].weights == costs.layers[37].weights == 9600
    twins = {layer: np.ones(384) for layer in (37, 34)}
    budget = Budget(costs.forward_bytes + 16 * 4800, 1.0, "paper")
    assert select(twins, costs, budget) == UpdatePolicy({34: range(192)})


@pytest.mark.parametrize("accounting", ["planner", "paper"])
def test_an_impossible_budget_names_the_smallest_that_would_do(accounting):
    costs = PROFILES["mobilenetv2"]
    fisher = drawn_fisher(costs, np.random.default_rng(3))

    def chosen(memory_bytes, compute):
        budget = Budget(memory_bytes, compute, accounting)
        return select(fisher, costs, budget, peak_bytes=fake_peak(costs))

    with pytest.raises(BudgetExceeded, match="no layer fits; expected memory_bytes") as error:
        chosen(1000, 0.15)
    needed = error.value.needed_bytes
    assert error.value.needed_compute is None
    assert chosen(needed, 0.15).layers
    with pytest.raises(BudgetExceeded):
        chosen(needed - 1, 0.15)

    with pytest.raises(BudgetExceeded, match="no layer fits; expected compute") as error:
        chosen(1 << 24, 0.001)
    share = error.value.needed_compute
    assert error.value.needed_bytes is None
    assert chosen(1 << 24, share).layers
    with pytest.raises(BudgetExceeded):
        chosen(1 << 24, math.nextafter(share, 0))

    with pytest.raises(BudgetExceeded, match=r"memory_bytes of .* and compute of") as error:
        chosen(1000, 0.001)
    assert chosen(error.value.needed_bytes, error.value.needed_compute).layers


def test_biases_train_from_the_earliest_layer_on():
    costs = PROFILES["proxylessnas"]
    fisher = drawn_fisher(costs, np.random.default_rng(4))
    policy = select(fisher, costs, Budget(accounting="paper"), biases=True)
    assert policy.biases == tuple(range(min(policy.layers), 60))
    assert policy.layers == select(fisher, costs, Budget(accounting="paper")).layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({36: np.ones(3)}, r"fisher\[36\]: expected shape \(384,\), got \(3,\)"),
        ({36: np.full(384, np.nan)}, r"fisher\[36\]: expected finite numbers"),
        ({36: np.full(384, -1.0)}, r"fisher\[36\]: expected finite numbers of at least 0"),
        ({99: np.ones(3)}, "fisher: expected layers 0 to 41, got 99"),
        ({}, "fisher: expected at least one layer"),
    ],
)
def test_unsound_fisher_information_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        select(change, PROFILES["mcunet"], Budget(accounting="paper"))


def test_unsound_arguments_are_refused():
    costs = PROFILES["mcunet"]
    fisher = {36: np.ones(384)}
    for ratio in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="ratio: expected above 0, up to 1"):
            select(fisher, costs, Budget(accounting="paper"), ratio)
    with pytest.raises(ValueError, match="optimizer: expected one of"):
        select(fisher, costs, Budget(accounting="paper"), optimizer="lion")
    with pytest.raises(ValueError, match="memory_bytes: expected a positive number, got 0"):
        Budget(memory_bytes=0)
    with pytest.raises(ValueError, match="memory_bytes: expected at most 9223372036854775807, got"):
        Budget(memory_bytes=1 << 63)
    with pytest.raises(TypeError, match="memory_bytes: expected an integer, got float"):
        Budget(memory_bytes=1e6)
    for compute in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="compute: expected a positive share"):
            Budget(compute=compute)
    with pytest.raises(ValueError, match="accounting: expected 'planner' or 'paper', got 'mine'"):
        Budget(accounting="mine")


def test_policies_compare_by_value_and_sort():
    policy = UpdatePolicy({5: [3, 1, 1], 2: LayerUpdate("in", (4, 0))}, biases=(7, 3, 3))
    assert list(policy.layers) == [2, 5]
    assert policy.layers[5] == LayerUpdate("out", (1, 3))
    assert policy.layers[2].channels == (0, 4)
    assert policy.biases == (3, 7)
    assert policy == UpdatePolicy({2: LayerUpdate("in", (0, 4)), 5: np.array([1, 3])}, (3, 7))
    assert policy != UpdatePolicy({5: [1, 3]}, (3, 7))
    assert UpdatePolicy() == UpdatePolicy({}, ())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({3: []},), ValueError, "layer 3: channels: expected at least one"),
        (({3: [-1]},), ValueError, "layer 3: channels: expected numbers of at least 0, got -1"),
        (({3: [0.5]},), TypeError, "layer 3: channels: expected integers, got float"),
        (({3: [True]},), TypeError, "layer 3: channels: expected integers, got bool"),
        (({"3": [1]},), TypeError, "layers: expected integers, got str"),
        (({-3: [1]},), ValueError, "layers: expected numbers of at least 0, got -3"),
        (({}, (-1,)), ValueError, "biases: expected numbers of at least 0, got -1"),
    ],
)
def test_unsound_policies_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        UpdatePolicy(*arguments)


def test_axis_is_checked():
    with pytest.raises(ValueError, match="axis: expected 'out' or 'in', got 'both'"):
        LayerUpdate("both", (1,))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (UpdatePolicy({42: [0]}), "layer 42: expected 0 to 41"),
        (UpdatePolicy({}, (42,)), "layer 42: expected 0 to 41"),
        (UpdatePolicy({0: [16]}), "layer 0: expected channels 0 to 15, got 16"),
        (UpdatePolicy({1: LayerUpdate("in", (0,))}), "layer 1: a depthwise convolution has axis"),
        (UpdatePolicy({2: LayerUpdate("in", (16,))}), "layer 2: expected channels 0 to 15, got 16"),
    ],
)
def test_a_policy_is_checked_against_its_network(policy, message):
    with pytest.raises(ValueError, match=message):
        policy.check(NETWORKS["mcunet"])


def test_json_round_trip():
    for policy in (
        UpdatePolicy(),
        UpdatePolicy({5: [3, 1], 2: LayerUpdate("in", (4, 0))}, biases=(7,)),
        sparse_update(NETWORKS["mcunet"], biases=True),
    ):
        assert UpdatePolicy.from_json(policy.to_json()) == policy
    entry = json.loads(UpdatePolicy({5: [3, 1]}).to_json())
    assert entry == {"layers": [{"layer": 5, "axis": "out", "channels": [1, 3]}], "biases": []}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"layers": {}, "biases": [], "extra": 1}',
        '{"layers": [{"layer": 1, "axis": "out"}], "biases": []}',
        '{"layers": [{"layer": 1, "axis": "up", "channels": [1]}], "biases": []}',
        '{"layers": [{"layer": 1, "axis": "out", "channels": ["1"]}], "biases": []}',
        '{"layers": [{"layer": [], "axis": "out", "channels": [1]}], "biases": []}',
        '{"layers": [{"layer": 1, "axis": "out", "channels": [1]},'
        ' {"layer": 1, "axis": "out", "channels": [2]}], "biases": []}',
        '{"layers": [], "biases": 3}',
        "[" * 100_000,
    ],
)
def test_unsound_json_is_refused(text):
    with pytest.raises(ValueError, match="update policy"):
        UpdatePolicy.from_json(text)


@pytest.mark.parametrize("name", NETWORKS)
def test_fixed_policies_fit_their_networks(name):
    network = NETWORKS[name]
    count = len(network.convolutions)
    everything = full_train(network)
    everything.check(network)
    assert list(everything.layers) == list(everything.biases) == list(range(count))
    last = last_layer(network)
    last.check(network)
    assert list(last.layers) == [count - 1]
    assert last.biases == ()
    sparse_update(network, biases=True).check(network)


def test_sparse_update_is_the_published_policy():
    network = NETWORKS["mcunet"]
    policy = sparse_update(network, biases=True)
    assert {
        layer: (update.axis, len(update.channels)) for layer, update in policy.layers.items()
    } == {
        21: ("in", 40),
        24: ("in", 48),
        27: ("in", 48),
        30: ("in", 48),
        36: ("in", 12),
        39: ("in", 24),
    }
    assert policy.biases == tuple(range(20, 42))
    norms = np.square(network.weights[36].astype(np.float64)).sum(axis=(0, 2, 3))
    kept = list(policy.layers[36].channels)
    assert norms[kept].min() >= np.delete(norms, kept).max()
    assert sparse_update(network).biases == ()


def test_sparse_update_counts_biases_without_the_feature_mix():
    rng = np.random.default_rng(0)
    mixed = random_network(ARCHITECTURES["mobilenetv2"], rng, feature_mix=True)
    policy = sparse_update(mixed, biases=True)
    assert policy.biases == tuple(range(26, 51))
    assert list(policy.layers) == [27, 30, 33, 36, 39, 42, 45, 48]


def test_sparse_update_refuses_other_networks():
    network = NETWORKS["mcunet"]
    unmarked = [dataclasses.replace(o, block=None) for o in network.operations]
    with pytest.raises(ValueError, match="no SparseUpdate policy is published for 'mcunet'"):
        sparse_update(network.replace(operations=tuple(unmarked)))
