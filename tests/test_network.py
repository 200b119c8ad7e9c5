import contextlib
import json
import os
import struct
from importlib import resources

import numpy as np
import pytest
from safetensors.numpy import save

from tinytrain_ext.network import (
    DEFAULT_NETWORK,
    METADATA_KEY,
    Network,
    Operation,
    default_network,
    tensor_shapes,
    write_atomically,
)

GRAPH = (
    Operation("conv", (0,), "relu6", 3, 8, kernel=3, stride=2, padding=1),
    Operation("conv", (1,), "relu", 8, 8, kernel=3, padding=1, groups=8, block=0),
    Operation("conv", (2,), "none", 8, 8, block=0),
    Operation("add", (1, 3), "relu", block=0),
    Operation("max_pool", (4,), kernel=2, stride=2),
    Operation("average_pool", (5,), kernel=3, stride=2, padding=1),
    Operation("global_average_pool", (6,)),
)


def small_network(**changes):
    rng = np.random.default_rng(0)
    shapes = [o.weight_shape for o in GRAPH if o.kind == "conv"]
    arguments = {
        "name": "small",
        "operations": GRAPH,
        "weights": tuple(rng.standard_normal(s).astype(np.float32) for s in shapes),
        "biases": tuple(rng.standard_normal(s[0]).astype(np.float32) for s in shapes),
        "input_size": 16,
        "resize": 18,
    }
    return Network(**{**arguments, **changes})


def adapted_network():
    prototypes = np.eye(2, 8, dtype=np.float32)
    return small_network(
        classes=("Katze", "犬"), prototypes=prototypes, unknown_below=0.25, logit_scale=7.5
    )


def test_shapes_and_layers():
    network = small_network()
    assert network.tensor_shapes == (
        (16, 16, 3),
        (8, 8, 8),
        (8, 8, 8),
        (8, 8, 8),
        (8, 8, 8),
        (4, 4, 8),
        (2, 2, 8),
        (1, 1, 8),
    )
    assert network.convolutions == (0, 1, 2)
    assert network.feature_dim == 8


def conv(**changes):
    return {"kind": "conv", "inputs": (0,), "in_channels": 3, "out_channels": 8, **changes}


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ([{"kind": "softmax", "inputs": (0,)}], r"operation 0 \(softmax\): kind: expected one of"),
        ([conv(inputs=(0, 0))], r"operation 0 \(conv\): inputs: expected 1 tensor\(s\), got 2"),
        ([conv(inputs=(1,))], "inputs: expected tensors 0 to 0, got 1"),
        ([conv(inputs=(-1,))], "inputs: expected tensors 0 to 0, got -1"),
        ([conv(activation="gelu")], "activation: expected one of none, relu, relu6, got 'gelu'"),
        ([{"kind": "max_pool", "inputs": (0,), "activation": "relu"}], "only conv and add may"),
        ([{"kind": "max_pool", "inputs": (0,), "in_channels": 3}], "belong to a conv"),
        ([{"kind": "add", "inputs": (0, 0), "kernel": 3}], "belong to a conv or a pool"),
        ([conv(in_channels=4)], "in_channels: expected 3 as in its input, got 4"),
        ([conv(out_channels=0)], "out_channels: expected 1 to"),
        ([conv(out_channels=10**9)], "out_channels: expected 1 to"),
        ([conv(groups=3, out_channels=6)], r"groups: expected 1 or in_channels == out_channels"),
        ([conv(kernel=0)], "kernel: expected 1 to"),
        ([conv(stride=0)], "stride: expected 1 to"),
        ([conv(padding=1)], "padding: expected 0 to kernel - 1 = 0, got 1"),
        ([conv(kernel=17)], "kernel 17 does not fit its input"),
        ([conv(block=-1)], "block: expected 0 to"),
        ([conv(), {"kind": "add", "inputs": (0, 1)}], "differ"),
        ([conv(), conv(), {"kind": "global_average_pool", "inputs": (2,)}], "tensor 1, is never"),
        ([conv()], r"operation 0 \(conv\): the last operation must be a global_average_pool"),
        ([{"kind": "global_average_pool", "inputs": (0,)}], "at least one conv"),
        ([], "operations: expected 1 to"),
    ],
)
def test_impossible_graphs_are_refused_by_operation(operations, message):
    with pytest.raises(ValueError, match=message):
        tensor_shapes(tuple(Operation(**o) for o in operations), 16)


def test_activations_are_capped():
    graph = (Operation(**conv(out_channels=1 << 16)), Operation("global_average_pool", (1,)))
    with pytest.raises(ValueError, match=r"operation 0 \(conv\): output of shape .* is too large"):
        tensor_shapes(graph, 4096)


def replaced(tensors, layer, array):
    return (*tensors[:layer], array, *tensors[layer + 1 :])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (lambda n: {"weights": n.weights[:2]}, ValueError, "weights: expected 3 layers, got 2"),
        (
            lambda n: {"weights": replaced(n.weights, 1, n.weights[1].astype(np.float64))},
            TypeError,
            r"weights\[1\]: expected a float32 array, got float64",
        ),
        (
            lambda n: {"weights": replaced(n.weights, 1, n.weights[1][:4])},
            ValueError,
            r"weights\[1\]: expected shape \(8, 1, 3, 3\), got \(4, 1, 3, 3\)",
        ),
        (
            lambda n: {"biases": replaced(n.biases, 2, np.full(8, np.nan, np.float32))},
            ValueError,
            r"biases\[2\]: expected finite numbers",
        ),
        (
            lambda n: {"biases": replaced(n.biases, 2, [0.0] * 8)},
            TypeError,
            r"biases\[2\]: expected a float32 array, got list",
        ),
        (lambda n: {"resize": 15}, ValueError, "resize: expected at least input_size = 16, got 15"),
        (lambda n: {"input_size": 0}, ValueError, "input_size: expected 1 to"),
        (lambda n: {"std": (0.5, 0.5, 0.0)}, ValueError, "std: expected positive"),
        (lambda n: {"mean": (0.5, 0.5)}, ValueError, "mean: expected 3"),
        (lambda n: {"mean": (0.5, 0.5, np.inf)}, ValueError, "mean: expected 3 finite"),
        (lambda n: {"logit_scale": -1.0}, ValueError, "logit_scale: expected a positive"),
        (lambda n: {"classes": ("a", "b")}, ValueError, "prototypes: expected 2 rows, got None"),
        (
            lambda n: {"classes": ("a",), "prototypes": np.zeros((2, 8), np.float32)},
            ValueError,
            r"prototypes: expected shape \(1, 8\), got \(2, 8\)",
        ),
        (
            lambda n: {"classes": ("a", "a"), "prototypes": np.zeros((2, 8), np.float32)},
            ValueError,
            "classes: expected distinct",
        ),
        (lambda n: {"unknown_below": 1.5}, ValueError, "unknown_below: expected 0 to 1"),
    ],
)
def test_impossible_networks_are_refused_by_field(changes, error, message):
    network = small_network()
    with pytest.raises(error, match=message):
        network.replace(**changes(network))


def test_arrays_are_held_read_only_without_touching_the_callers():
    weights = small_network().weights
    mine = tuple(weight.copy() for weight in weights)
    network = small_network(weights=mine)
    with pytest.raises(ValueError, match="read-only"):
        network.weights[0][0] = 0
    mine[0].flags.writeable = True  # still the caller's own array


@pytest.mark.parametrize("network", [small_network(), adapted_network()])
def test_round_trip(network, tmp_path):
    path = tmp_path / "network.safetensors"
    network.save(path)
    copy = Network.load(path)
    for name in ("name", "operations", "input_size", "resize", "mean", "std", "logit_scale"):
        assert getattr(copy, name) == getattr(network, name)
    assert copy.classes == network.classes
    assert copy.unknown_below == network.unknown_below
    for mine, theirs in zip(
        copy.weights + copy.biases, network.weights + network.biases, strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    if network.prototypes is None:
        assert copy.prototypes is None
    else:
        np.testing.assert_array_equal(copy.prototypes, network.prototypes)
    first = path.read_bytes()
    copy.save(path)
    assert path.read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def write_file(path, change=lambda tensors, description: None, metadata=None):
    """A network file with one thing wrong with it."""
    network = adapted_network()
    tensors = {"prototypes": network.prototypes}
    for layer, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        tensors[f"layer.{layer}.weight"] = weight
        tensors[f"layer.{layer}.bias"] = bias
    network.save(path)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    description = json.loads(header["__metadata__"][METADATA_KEY])
    change(tensors, description)
    if metadata is None:
        metadata = {METADATA_KEY: json.dumps(description)}
    path.write_bytes(save(tensors, metadata))


def setting(name, value):
    return lambda tensors, description: description.update({name: value})


def operation_setting(name, value):
    return lambda tensors, description: description["operations"][0].update({name: value})


def tensor_setting(name, value):
    return lambda tensors, description: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("schema_version", 2), "schema_version: expected 1, got 2"),
        (lambda t, d: d.pop("schema_version"), "schema_version: expected 1, got None"),
        (setting("extra", 1), r"metadata: missing nothing, unknown \['extra'\]"),
        (lambda t, d: d.pop("mean"), r"metadata: missing \['mean'\]"),
        (setting("name", 3), "name: expected str, got int"),
        (setting("input_size", True), "input_size: expected int, got bool"),
        (setting("input_size", 16.0), "input_size: expected int, got float"),
        (setting("input_size", 10**400), "input_size: expected 1 to"),
        (setting("mean", [0.5, "x", 0.5]), "mean: expected a number, got str"),
        (setting("std", [0.5, 0.5]), "std: expected 3"),
        (setting("logit_scale", float("nan")), "logit_scale: expected a finite number"),
        (setting("logit_scale", 10**400), "logit_scale: expected a finite number"),
        (setting("unknown_below", -1), "unknown_below: expected 0 to 1"),
        (setting("classes", ["a", 1]), "classes: expected str, got int"),
        (setting("classes", ["a"]), r"'prototypes': expected shape \(1, 8\), got \(2, 8\)"),
        (setting("classes", []), "unknown tensor 'prototypes'"),
        (setting("operations", {}), "operations: expected list, got dict"),
        (setting("operations", [1]), "operation 0: expected dict, got int"),
        (operation_setting("dilation", 2), "operation 0: expected kind, inputs and known fields"),
        (operation_setting("stride", "2"), "operation 0, stride: expected int, got str"),
        (operation_setting("inputs", [0.5]), "operation 0, inputs: expected int, got float"),
        (operation_setting("block", None), "operation 0, block: expected int, got NoneType"),
        (operation_setting("out_channels", 10**12), r"operation 0 \(conv\): out_channels"),
        (lambda t, d: t.pop("layer.1.bias"), "missing tensor 'layer.1.bias'"),
        (tensor_setting("layer.9.bias", np.zeros(1, np.float32)), "unknown tensor 'layer.9.bias'"),
        (
            tensor_setting("layer.0.bias", np.zeros(8, np.float64)),
            r"tensor 'layer.0.bias': expected float32 \(F32\), got F64",
        ),
        (
            tensor_setting("layer.0.weight", np.zeros((8, 27), np.float32)),
            r"tensor 'layer.0.weight': expected shape \(8, 3, 3, 3\), got \(8, 27\)",
        ),
        (
            tensor_setting("layer.0.bias", np.full(8, np.inf, np.float32)),
            r"biases\[0\]: expected finite numbers",
        ),
        (
            tensor_setting("prototypes", np.full((2, 8), np.nan, np.float32)),
            "prototypes: expected finite numbers",
        ),
    ],
)
def test_a_file_with_one_thing_wrong_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "wrong.safetensors"
    write_file(path, change)
    with pytest.raises(ValueError, match=message) as error:
        Network.load(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "metadata: expected the one entry"),
        ({"format": "pt"}, r"metadata: expected the one entry .*, got \['format'\]"),
        ({METADATA_KEY: "{"}, "metadata: not JSON"),
        ({METADATA_KEY: "[" * 100_000}, "metadata: not JSON"),
        ({METADATA_KEY: "[]"}, "metadata: expected an object, got list"),
    ],
)
def test_wrong_metadata_is_refused(tmp_path, metadata, message):
    path = tmp_path / "wrong.safetensors"
    write_file(path, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        Network.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "file size"),
        (b"12345678", "file size"),
        (struct.pack("<Q", 1 << 40) + b"{}", "header: expected at most 2 bytes"),
        (struct.pack("<Q", (1 << 64) - 1) + b"{}", "header: expected at most 2 bytes"),
        (struct.pack("<Q", 2) + b"xx", "not a sound safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "metadata: expected the one entry"),
        (b"\x80\x02}q\x00." + bytes(100), "header"),
    ],
)
def test_hostile_files_are_refused(tmp_path, content, message):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Network.load(path)


def test_absurd_sizes_are_refused_unread(tmp_path):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate((1 << 30) + 1)  # sparse: nothing is written
    with pytest.raises(ValueError, match="file size: expected 9 to 1073741824"):
        Network.load(path)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 23))
        file.truncate(1 << 24)
    with pytest.raises(ValueError, match="header: expected at most 4194304 bytes, got 8388608"):
        Network.load(path)


def test_truncation_anywhere_is_refused(tmp_path):
    path = tmp_path / "network.safetensors"
    adapted_network().save(path)
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=path.name):
            Network.load(path)


def test_any_damaged_byte_of_the_header_is_an_error_or_harmless(tmp_path):
    path = tmp_path / "network.safetensors"
    adapted_network().save(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, 8 + int.from_bytes(content[:8], "little"), 300):
        damaged = bytearray(content)
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            Network.load(path)


def test_missing_and_special_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Network.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        Network.load(tmp_path)


def test_unwritable_output_is_reported_by_name(tmp_path):
    missing = tmp_path / "missing" / "network.safetensors"
    with pytest.raises(FileNotFoundError, match=str(missing)):
        small_network().save(missing)
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match=str(folder)):
        small_network().save(folder)
    assert [entry.name for entry in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, failure):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fsync(descriptor):
        raise failure

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(type(failure)) as error:
        write_atomically(path, b"new")
    if isinstance(failure, OSError):
        assert str(path) in str(error.value)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_default_network_loads_or_says_why_not():
    if (resources.files("tinytrain_ext") / DEFAULT_NETWORK).is_file():
        assert default_network().input_size == 128
    else:
        with pytest.raises(FileNotFoundError, match="not part of this installation"):
            default_network()
