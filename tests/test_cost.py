"""The published numbers the cost model must give, and its arithmetic on small graphs."""

import dataclasses

import numpy as np
import pytest

from tinytrain_ext.architectures import ARCHITECTURES, random_network
from tinytrain_ext.cost import inspected_layers, profile, words_per_weight
from tinytrain_ext.network import Network, Operation
from tinytrain_ext.selection import (
    LayerUpdate,
    UpdatePolicy,
    full_train,
    last_layer,
    sparse_update,
)

MIB = 1 << 20


@pytest.fixture(scope="module")
def zoo():
    """Profiles of the networks the paper's tables count, with the feature mix."""
    rng = np.random.default_rng(0)
    return {
        name: profile(random_network(architecture, rng, feature_mix=True))
        for name, architecture in ARCHITECTURES.items()
    }


@pytest.fixture(scope="module")
def released():
    """Profiles of the networks the public files hold, without it."""
    rng = np.random.default_rng(0)
    return {
        name: profile(random_network(architecture, rng))
        for name, architecture in ARCHITECTURES.items()
    }


@pytest.mark.parametrize(
    ("name", "layers", "weights", "macs"),
    [
        ("mcunet", 42, 463_216, 22.454),
        ("mobilenetv2", 52, 288_864, 17.450),
        ("proxylessnas", 61, 357_680, 19.210),
    ],
)
def test_table_3(zoo, name, layers, weights, macs):
    assert len(zoo[name].layers) == layers
    assert zoo[name].weights == weights
    assert round(zoo[name].forward_macs / 1e6, 3) == macs


@pytest.mark.parametrize(
    ("name", "kib"), [("mcunet", 640), ("mobilenetv2", 896), ("proxylessnas", 512)]
)
def test_appendix_f1(zoo, name, kib):
    assert zoo[name].forward_bytes == kib * 1024


TABLE_7 = {
    "mcunet": (80.25, 135.94, 191.62, 280.97, 392.34, 478.97),
    "mobilenetv2": (54.69, 101.61, 148.53, 218.41, 325.66, 432.91),
    "proxylessnas": (60.25, 89.12, 118.00, 171.62, 241.50, 299.25),
}


@pytest.mark.parametrize("blocks", range(1, 7))
@pytest.mark.parametrize("name", TABLE_7)
def test_table_7(zoo, name, blocks):
    kib = zoo[name].activation_bytes(blocks) / 1024
    assert kib == pytest.approx(TABLE_7[name][blocks - 1], abs=0.006)


@pytest.mark.parametrize(
    ("name", "macs", "paper_mib", "rule_mib"),
    [
        ("mcunet", 44.907, 902.5, 10.39),
        ("mobilenetv2", 34.899, 1045.1, 8.19),
        ("proxylessnas", 38.419, 854.3, 8.61),
    ],
)
def test_full_train(zoo, name, macs, paper_mib, rule_mib):
    costs = zoo[name]
    policy = full_train(costs.network)
    assert round(costs.full_train_macs / 1e6, 3) == macs
    assert costs.backward_macs(policy) == costs.full_train_macs - costs.layers[0].macs
    assert round(costs.full_train_bytes(100) / MIB, 1) == paper_mib
    assert round(costs.memory_bytes(policy) / MIB, 2) == rule_mib
    assert costs.updated_weights(policy) == costs.weights
    # and by the paper's own rule for the other methods, at batch 100
    activations = costs.mask_bytes(policy) + costs.saved_bytes(policy)
    at_100 = (100 * activations + 16 * costs.weights) / MIB
    printed = {"mcunet": 338.8, "mobilenetv2": 382.3, "proxylessnas": 320.7}[name]
    assert at_100 == pytest.approx(printed, abs=0.06)


@pytest.mark.parametrize(
    ("name", "mib", "macs"),
    [
        ("mcunet", 2.031, 1.475),
        ("mobilenetv2", 1.641, 0.803),
        ("proxylessnas", 1.0625, 0.590),
    ],
)
def test_last_layer(zoo, name, mib, macs):
    costs = zoo[name]
    policy = last_layer(costs.network)
    assert costs.memory_bytes(policy) / MIB == pytest.approx(mib, abs=5e-4)
    assert round(costs.backward_macs(policy) / 1e6, 3) == macs
    assert costs.grad_input_macs(policy) == 0


def test_sparse_update_mcunet(zoo):
    costs = zoo["mcunet"]
    policy = sparse_update(costs.network)
    assert round(costs.memory_bytes(policy) / MIB, 3) == 1.426
    assert round(costs.backward_macs(policy) / 1e6, 2) == 11.88
    assert costs.updated_weights(policy) == 52_480


@pytest.mark.parametrize("name", ["mobilenetv2", "proxylessnas"])
def test_sparse_update_of_the_other_nets_differs_from_table_2(zoo, name):
    """The paper's cells fit no published policy: these are ours."""
    costs = zoo[name]
    policy = sparse_update(costs.network)
    ours = (
        round(costs.memory_bytes(policy) / MIB, 2),
        round(costs.backward_macs(policy) / 1e6, 2),
    )
    assert ours == {"mobilenetv2": (1.73, 8.46), "proxylessnas": (1.46, 7.90)}[name]


@pytest.mark.parametrize(
    ("name", "weights"), [("mcunet", 24_576), ("mobilenetv2", 8_192), ("proxylessnas", 32_768)]
)
def test_weights_that_one_mib_leaves(zoo, name, weights):
    words = words_per_weight("adam")
    assert (MIB - zoo[name].forward_bytes) // (4 * words) == weights


def test_share_of_full_train(zoo, released):
    def share(costs):
        return round(0.15 * costs.full_train_macs / 1e6, 2)

    assert [share(costs) for costs in zoo.values()] == [6.74, 5.23, 5.76]
    assert [share(costs) for costs in released.values()] == [6.74, 4.99, 5.59]


@pytest.mark.parametrize(("name", "layers"), [("mcunet", 18), ("mobilenetv2", 19)])
def test_inspected_layers(zoo, name, layers):
    network = zoo[name].network
    count = len(network.convolutions)
    assert inspected_layers(network) == tuple(range(count - layers, count))
    assert 0.30 <= layers / count <= 0.44


def test_inspected_layers_without_block_marks(released):
    network = released["mcunet"].network
    unmarked = [dataclasses.replace(o, block=None) for o in network.operations]
    layers = inspected_layers(network.replace(operations=tuple(unmarked)))
    assert layers == tuple(range(25, 42))


def test_dx_dw_and_saved_inputs(released):
    costs = released["mobilenetv2"]
    row = costs.layers[40]
    policy = UpdatePolicy({40: LayerUpdate("out", tuple(range(row.out_channels // 4)))})
    assert costs.grad_input_macs(policy) == sum(r.macs for r in costs.layers[41:])
    assert costs.grad_weight_macs(policy) == row.macs // 4
    assert costs.updated_weights(policy) == row.weights // 4
    assert costs.saved_bytes(policy) == 4 * row.in_elements
    columns = UpdatePolicy({39: LayerUpdate("in", (0, 2))})
    assert costs.updated_weights(columns) == 2 * costs.layers[39].out_channels
    # a bias costs no dW here, but the gradient has to get there
    bias = UpdatePolicy({40: policy.layers[40]}, biases=(38,))
    assert costs.grad_input_macs(bias) == sum(r.macs for r in costs.layers[39:])
    assert costs.memory_bytes(bias) == costs.memory_bytes(policy)


def test_nothing_is_free_of_charge(released):
    costs = released["proxylessnas"]
    nothing = UpdatePolicy()
    assert costs.backward_macs(nothing) == 0
    assert costs.memory_bytes(nothing) == costs.forward_bytes


def test_optimisers(released):
    costs = released["mcunet"]
    policy = last_layer(costs.network)
    state = {
        optimizer: costs.memory_bytes(policy, optimizer) - costs.forward_bytes
        for optimizer in ("in_place_sgd", "sgd", "momentum", "adam")
    }
    weights = costs.updated_weights(policy)
    assert state == {
        "in_place_sgd": 4 * weights,
        "sgd": 8 * weights,
        "momentum": 12 * weights,
        "adam": 16 * weights,
    }
    with pytest.raises(
        ValueError, match="optimizer: expected one of in_place_sgd, sgd, momentum, adam"
    ):
        costs.memory_bytes(policy, "lion")


def test_a_branch_that_needs_no_gradient_costs_none():
    """Two branches from the stem, joined by an add: only one of them is crossed."""
    graph = (
        Operation("conv", (0,), "relu", 3, 4, kernel=3, padding=1),
        Operation("conv", (1,), "relu", 4, 4),
        Operation("conv", (1,), "relu", 4, 4, kernel=3, padding=1),
        Operation("add", (2, 3), "relu"),
        Operation("conv", (4,), "none", 4, 8),
        Operation("global_average_pool", (5,)),
    )
    shapes = [operation.weight_shape for operation in graph if operation.kind == "conv"]
    network = Network(
        name="branches",
        operations=graph,
        weights=tuple(np.ones(shape, np.float32) for shape in shapes),
        biases=tuple(np.ones(shape[0], np.float32) for shape in shapes),
        input_size=8,
        resize=8,
    )
    costs = profile(network)
    macs = [row.macs for row in costs.layers]
    assert macs == [108 * 64, 16 * 64, 144 * 64, 32 * 64]
    policy = UpdatePolicy({1: range(4)})
    assert costs.grad_input_macs(policy) == macs[3]
    assert costs.mask_bytes(policy) == 2 * 4 * 64 / 8  # its own and the sum's
    policy = UpdatePolicy({0: range(4)})
    assert costs.grad_input_macs(policy) == macs[1] + macs[2] + macs[3]
