import numpy as np
import pytest

from tinytrain_ext.architectures import (
    ARCHITECTURES,
    architecture_of,
    operations,
    random_network,
)

# Table 3 (the paper prints 13 blocks for MCUNet), with each net's feature dimension.
TABLE_3 = {
    "mcunet": (42, 463_216, 14, 160, 160),
    "mobilenetv2": (52, 288_864, 17, 112, 448),
    "proxylessnas": (61, 357_680, 20, 96, 384),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_table_3(name):
    layers, weights, blocks, feature_dim, mixed_dim = TABLE_3[name]
    rng = np.random.default_rng(0)
    network = random_network(ARCHITECTURES[name], rng, feature_mix=True)
    assert len(network.convolutions) == layers
    assert sum(weight.size for weight in network.weights) == weights
    assert len(ARCHITECTURES[name].blocks) == blocks
    assert network.feature_dim == mixed_dim
    released = random_network(ARCHITECTURES[name], rng)
    assert len(released.convolutions) == {"mcunet": 42, "mobilenetv2": 51, "proxylessnas": 60}[name]
    assert released.feature_dim == feature_dim


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_tables_are_consistent(architecture):
    channels = architecture.stem_channels
    for block in architecture.blocks:
        assert block.in_channels == channels
        assert block.expanded_channels % block.in_channels == 0
        if block.residual:
            assert (block.in_channels, 1) == (block.out_channels, block.stride)
        channels = block.out_channels
    assert np.prod([block.stride for block in architecture.blocks]) == 16
    first = architecture.blocks[0]
    assert first.expanded_channels == first.in_channels  # block 0 has no expansion


def test_only_depthwise_and_expansions_are_rectified():
    graph = operations(ARCHITECTURES["mcunet"])
    for index, operation in enumerate(graph):
        linear = operation.kind == "conv" and (
            graph[index + 1].kind in ("add", "global_average_pool")
            or graph[index + 1].block != operation.block
        )
        stem = operation.block is None
        if operation.kind == "conv" and (stem or not linear):
            assert operation.activation == "relu6"
        else:
            assert operation.activation == "none"


def test_marks():
    graph = operations(ARCHITECTURES["mobilenetv2"], feature_mix=True)
    unmarked = [index for index, operation in enumerate(graph) if operation.block is None]
    assert unmarked == [0, len(graph) - 2, len(graph) - 1]
    assert {operation.block for operation in graph if operation.block is not None} == set(range(17))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("feature_mix", [False, True])
def test_architecture_of(name, feature_mix):
    graph = operations(ARCHITECTURES[name], feature_mix)
    assert architecture_of(graph) is ARCHITECTURES[name]
    assert architecture_of(graph[1:]) is None


def test_random_networks_repeat_with_their_seed():
    first, second, other = (
        random_network(ARCHITECTURES["mcunet"], np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first.weights[5], second.weights[5])
    assert (first.weights[5] != other.weights[5]).any()


def convolve(x, weight, stride, padding, groups):
    """(H, W, C) by (O, C / groups, K, K), in float64 by shifted products."""
    kernel = weight.shape[2]
    x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    height = (x.shape[0] - kernel) // stride + 1
    result = np.zeros((height, height, len(weight)))
    for i in range(kernel):
        for j in range(kernel):
            tap = x[i : i + stride * height : stride, j : j + stride * height : stride][
                :height, :height
            ]
            if groups == 1:
                result += tap @ weight[:, :, i, j].T
            else:
                result += tap * weight[:, 0, i, j]
    return result


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activations_of_random_networks_stay_sane(name):
    rng = np.random.default_rng(1)
    network = random_network(ARCHITECTURES[name], rng, feature_mix=True)
    tensors = [rng.uniform(-1, 1, (128, 128, 3))]
    layer = 0
    for operation in network.operations:
        inputs = [tensors[number] for number in operation.inputs]
        if operation.kind == "conv":
            weight = network.weights[layer].astype(np.float64)
            o = operation
            output = convolve(inputs[0], weight, o.stride, o.padding, o.groups)
            layer += 1
        elif operation.kind == "add":
            output = inputs[0] + inputs[1]
        else:
            output = inputs[0].mean(axis=(0, 1), keepdims=True)
        if operation.activation == "relu6":
            output = np.clip(output, 0, 6)
            assert 0.02 < (output > 0).mean() < 0.98
            assert (output >= 6).mean() < 0.2
        tensors.append(output)
        if operation.kind != "global_average_pool":
            assert 0.02 < output.std() < 10, (operation, output.std())
