"""The sparse convolution as an autograd Function and as a layer, against plain PyTorch."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tinytrain_ext
from cases import TAIL_CASES, ConvCase, few
from tinytrain_ext.nn import (
    BitReLU,
    SparseConv2d,
    bit_relu,
    sparse_conv2d,
    sparse_conv2d_reference,
)
from tinytrain_ext.selection import LayerUpdate
from tolerance import assert_as_good_as_naive

FEW = os.environ.get("TINYTRAIN_TEST_CASES") == "few"  # on an emulated CPU
CASES = few(TAIL_CASES)
# A depthwise convolution has axis "out" only.
AXES = [(c, axis) for c in CASES for axis in ("out", "in") if axis == "out" or not c.depthwise]
SMALL = [c for c in CASES if c.macs <= 3000 and c.in_channels > 1]
# One of each kind and stride is enough for what does not depend on shapes.
KINDS = [
    ConvCase(6, 9, 5, 7),
    ConvCase(9, 9, 6, 5, 3, 2, 1, depthwise=True),
    ConvCase(3, 8, 7, 7, 3, 2, 1),
]


def case_id(case: ConvCase) -> str:
    return case.name


def draw(case: ConvCase, axis: str = "out", seed: int = 0, images: int = 2):
    """x, weight, rows, bias (float64, of float32 values) and channels of a case."""
    rng = np.random.default_rng(seed)

    def values(*shape):
        return torch.tensor(rng.normal(size=shape).astype(np.float32), dtype=torch.float64)

    total = case.out_channels if axis == "out" else case.in_channels
    channels = sorted(rng.permutation(total)[: max(1, total // 2)].tolist())
    x = values(images, case.in_channels, case.height, case.width)
    weight = values(*case.weight_shape)
    rows = values(*weight.index_select(0 if axis == "out" else 1, torch.tensor(channels)).shape)
    return x, weight, rows, values(case.out_channels), channels


def options(case: ConvCase, activation: str, axis: str, channels) -> dict:
    return {
        "channels": channels,
        "axis": axis,
        "stride": case.stride,
        "padding": case.padding,
        "groups": case.in_channels if case.depthwise else 1,
        "activation": activation,
    }


def gradients(call, x, weight, rows, bias, grad=None, **settings):
    """y and the gradients of x, rows and bias."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, rows, bias)]
    y = call(leaves[0], weight, leaves[1], leaves[2], **settings)
    if grad is None:
        generator = torch.Generator().manual_seed(7)
        grad = torch.randn(y.shape, dtype=y.dtype, generator=generator)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


@pytest.mark.parametrize(("case", "axis"), AXES, ids=lambda v: getattr(v, "name", v))
def test_channels_in_any_order(case, axis):
    x, weight, _, bias, _ = draw(case, axis)
    total = weight.shape[0 if axis == "out" else 1]
    if case.depthwise:
        total = case.out_channels
    for count in (total, max(1, total // 2)):
        channels = np.random.default_rng(5).permutation(total)[:count].tolist()
        rows = weight.index_select(0 if axis == "out" else 1, torch.tensor(channels))
        settings = options(case, "none", axis, channels)
        found = gradients(sparse_conv2d, x, weight, rows, bias, **settings)
        wanted = gradients(sparse_conv2d_reference, x, weight, rows, bias, **settings)
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours - theirs).abs().max() <= 1e-10 * max(1, theirs.abs().max())


@pytest.mark.parametrize("activation", ["relu6"] if FEW else ["none", "relu", "relu6"])
@pytest.mark.parametrize(("case", "axis"), AXES, ids=lambda v: getattr(v, "name", v))
def test_values_and_gradients_equal_the_reference(case, activation, axis):
    x, weight, rows, bias, channels = draw(case, axis)
    settings = options(case, activation, axis, channels)
    for layout in (torch.contiguous_format, torch.channels_last):
        arguments = (x.contiguous(memory_format=layout), weight, rows, bias)
        found = gradients(sparse_conv2d, *arguments, **settings)
        wanted = gradients(sparse_conv2d_reference, *arguments, **settings)
        assert found[0].is_contiguous(memory_format=torch.channels_last)
        for name, mine, theirs in zip(("y", "x", "rows", "bias"), found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("case", KINDS, ids=case_id)
@pytest.mark.parametrize("activation", ["none", "relu6"])
def test_float32_is_as_good_as_a_naive_one(case, activation):
    """One step of it: the output and every gradient, by the tolerance rule."""
    x, weight, rows, bias, channels = draw(case)
    x, bias = 0.3 * x, 3 + 0.1 * bias  # away from the corners of ReLU6
    settings = options(case, activation, "out", channels)
    exact = gradients(sparse_conv2d_reference, x, weight, rows, bias, **settings)
    absolute = gradients(
        sparse_conv2d_reference,
        x.abs(),
        weight.abs(),
        rows.abs(),
        bias,
        **{**settings, "activation": "none"},
    )
    single = [t.float() for t in (x, weight, rows, bias)]
    found = gradients(sparse_conv2d, *single, **settings)
    naive = gradients(sparse_conv2d_reference, *single, **settings)
    for name, f, e, n, a in zip(
        ("y", "x", "rows", "bias"), found, exact, naive, absolute, strict=True
    ):
        magnitude = max(float(a.abs().max()), float(case.out_channels * case.kernel**2))
        assert_as_good_as_naive(f.numpy(), e.numpy(), n.numpy(), magnitude, name)


@pytest.mark.parametrize("case", SMALL, ids=case_id)
def test_gradcheck(case):
    """Through the real kernels, in float64."""
    for axis in ("out",) if case.depthwise else ("out", "in"):
        x, weight, rows, bias, channels = draw(case, axis, images=1)
        # A corner of the ReLU within gradcheck's step would be no fault of the kernels.
        settings = options(case, "relu6", axis, channels)
        y = sparse_conv2d_reference(x, weight, rows, bias, **{**settings, "activation": "none"})
        if (y.abs().min() < 1e-4) or ((y - 6).abs().min() < 1e-4):
            settings["activation"] = "none"
        leaves = tuple(t.requires_grad_() for t in (x, rows, bias))
        assert torch.autograd.gradcheck(
            lambda x, rows, bias, s=settings, w=weight: sparse_conv2d(x, w, rows, bias, **s),
            leaves,
            fast_mode=True,
        )


@pytest.mark.parametrize("activation", ["none", "relu6"])
@pytest.mark.parametrize("case", KINDS, ids=case_id)
def test_the_probe_collects_fisher_sums(case, activation):
    x, weight, rows, bias, channels = draw(case, images=3)
    settings = options(case, activation, "out", channels)
    probe = torch.zeros(case.out_channels, dtype=torch.float64, requires_grad=True)
    y = sparse_conv2d(x, weight, rows, bias, probe=probe, **settings)
    if activation == "none":
        y += 0.5  # in place, as residual networks do
    y.square().sum().backward()
    a = sparse_conv2d_reference(x, weight, rows, bias, **{**settings, "activation": "none"})
    a.requires_grad_()
    behind = F.relu6(a) if activation == "relu6" else a + 0.5
    (g,) = torch.autograd.grad(behind.square().sum(), a)
    wanted = (a * g).sum(dim=(2, 3)).square().sum(dim=0)
    torch.testing.assert_close(probe.grad, wanted.detach())


def test_only_one_derivative():
    x, weight, rows, bias, channels = draw(KINDS[0])
    rows.requires_grad_()
    y = sparse_conv2d(x, weight, rows, bias, **options(KINDS[0], "relu6", "out", channels))
    (grad,) = torch.autograd.grad(y.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_bit_relu_is_relu(activation):
    reference = {"relu": F.relu, "relu6": F.relu6}[activation]
    x = torch.randn(2, 11, 5, 3, generator=torch.Generator().manual_seed(0)) * 5
    for dtype in (torch.float32, torch.float64):
        mine, theirs = (x.to(dtype).clone().requires_grad_() for _ in range(2))
        grad = torch.randn(x.shape).to(dtype)
        y, wanted = BitReLU(activation)(mine), reference(theirs)
        torch.testing.assert_close(y, wanted, rtol=0, atol=0)
        y.backward(grad)
        wanted.backward(grad)
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)
    saved = saved_bytes(lambda: bit_relu(x.requires_grad_(), activation))
    assert saved == 2 * 5 * 3 * 2  # 11 channels are two bytes
    with pytest.raises(ValueError, match="expected 'relu' or 'relu6', got 'none'"):
        BitReLU("none")


def saved_bytes(call, *excluded: torch.Tensor) -> int:
    """Bytes of the storages that autograd saves during call()."""
    sizes: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in excluded}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(sizes.values())


def conv_of(case: ConvCase, bias: bool = True, dtype=torch.float32) -> torch.nn.Conv2d:
    torch.manual_seed(0)
    return torch.nn.Conv2d(
        case.in_channels,
        case.out_channels,
        case.kernel,
        case.stride,
        case.padding,
        groups=case.in_channels if case.depthwise else 1,
        bias=bias,
        dtype=dtype,
    )


@pytest.mark.parametrize("case", KINDS, ids=case_id)
def test_what_is_saved(case):
    """Inputs of trained layers only (selected channels only, if depthwise), one bit an element."""
    conv = conv_of(case)
    height, width = case.output_size
    bits = 2 * height * width * -(-case.out_channels // 8)
    inputs = 4 * 2 * case.height * case.width
    x = torch.randn(2, case.in_channels, case.height, case.width).requires_grad_()
    for channels, axis, saved_channels in (
        ((), "out", 0),
        ((1, 3), "out", 2 if case.depthwise else case.in_channels),
        ((0, 2), "in", 2),
    ):
        if axis == "in" and case.depthwise:
            continue
        update = LayerUpdate(axis, channels) if channels else ()
        layer = SparseConv2d.from_conv(conv, update, activation="relu6")
        own = (*layer.parameters(), *layer.buffers())
        found = saved_bytes(lambda layer=layer: layer(x), *own)
        assert found == bits + saved_channels * inputs
        with torch.no_grad():
            assert saved_bytes(lambda layer=layer: layer(x), *own) == 0
    stock = saved_bytes(lambda: F.relu6(conv.requires_grad_(False)(x)), *conv.parameters())
    assert stock >= case.in_channels * inputs  # whatever is frozen


@pytest.mark.parametrize("case", KINDS, ids=case_id)
def test_a_layer_is_a_conv_with_few_parameters(case):
    conv = conv_of(case, bias=False)
    layer = SparseConv2d.from_conv(conv, [2, 0])
    x = torch.randn(1, case.in_channels, case.height, case.width)
    torch.testing.assert_close(layer(x), conv(x))
    assert [(name, p.shape[0]) for name, p in layer.named_parameters()] == [("rows", 2)]
    optimizer = torch.optim.Adam(layer.parameters())
    layer(x).square().sum().backward()
    optimizer.step()
    assert all(t.shape in ((), layer.rows.shape) for t in optimizer.state[layer.rows].values())
    kept = [c for c in range(case.out_channels) if c not in (0, 2)]
    assert torch.equal(layer.weight[kept], conv.weight[kept])
    assert torch.equal(layer.weight[[0, 2]], layer.rows)
    torch.testing.assert_close(layer(x), layer.to_conv()(x))
    assert "trains 2 of" in repr(layer)


def test_state_dict_is_that_of_a_conv():
    conv = conv_of(KINDS[0])
    layer = SparseConv2d.from_conv(conv, [1, 4])
    with torch.no_grad():
        layer.rows += 1
    other = conv_of(KINDS[0])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(other.bias, conv.bias)
    again = SparseConv2d.from_conv(conv, [0])
    x = torch.randn(1, 6, 5, 7)
    again(x)  # packs the old weights
    again.load_state_dict(other.state_dict())
    torch.testing.assert_close(again(x), other(x))
    for change, message in (
        (lambda s: s.pop("weight"), "Missing key"),
        (lambda s: s.update(rows=1), "Unexpected key"),
        (lambda s: s.update(bias=torch.zeros(3)), r"bias: expected shape \(9,\), got \(3,\)"),
    ):
        state = dict(other.state_dict())
        change(state)
        with pytest.raises(RuntimeError, match=message):
            again.load_state_dict(state)
    file = io.BytesIO()
    torch.save(copy.deepcopy(again).state_dict(), file)
    assert torch.equal(copy.deepcopy(again)(x), again(x))


def test_other_channels_can_be_selected():
    conv = conv_of(KINDS[0])
    layer = SparseConv2d.from_conv(conv, [1, 4])
    with torch.no_grad():
        layer.rows += 1
    learned = layer.weight
    layer.set_channels(LayerUpdate("in", (5,)))
    assert layer.rows.shape == (9, 1, 1, 1)
    assert torch.equal(layer.weight, learned)
    x = torch.randn(1, 6, 5, 7)
    torch.testing.assert_close(layer(x), layer.to_conv()(x))
    for wrong in ([9], LayerUpdate("in", (6,))):
        with pytest.raises(ValueError, match="channels: expected 0 to"):
            layer.set_channels(wrong)
    layer.set_channels([])
    assert [*layer.parameters()] == []
    assert torch.equal(layer.weight, learned)


def test_several_forwards_before_one_backward():
    conv = conv_of(KINDS[0], dtype=torch.float64)
    layer = SparseConv2d.from_conv(conv, [1, 4], activation="relu")
    first, second = torch.randn(2, 1, 6, 5, 7, dtype=torch.float64)
    loss = layer(first).square().sum() + layer(second).square().sum()
    loss.backward()
    (F.relu(conv(first)).square().sum() + F.relu(conv(second)).square().sum()).backward()
    torch.testing.assert_close(layer.rows.grad, conv.weight.grad[[1, 4]])
    # Weights that change between a forward and its backward are an error, as everywhere.
    y = layer(first)
    with torch.no_grad():
        layer.rows += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_weights_are_packed_only_when_they_changed(monkeypatch):
    layer = SparseConv2d.from_conv(conv_of(KINDS[0]), [1, 4])
    counted = []
    put = SparseConv2d._put_rows
    monkeypatch.setattr(
        SparseConv2d, "_put_rows", lambda self, *a: (counted.append(1), put(self, *a))
    )
    x = torch.randn(1, 6, 5, 7)
    for change, expected in (
        (lambda: None, 1),
        (lambda: None, 1),
        (lambda: torch.nn.init.ones_(layer.rows), 2),
        (lambda: None, 2),
        (lambda: setattr(layer.rows, "data", torch.zeros(2, 6, 1, 1)), 3),
    ):
        change()
        torch.testing.assert_close(layer(x), layer.to_conv()(x))
        assert len(counted) == expected
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), layer.to_conv()(x))
    layer.double()
    x = x.double()
    torch.testing.assert_close(layer(x), layer.to_conv()(x))
    torch.testing.assert_close(layer(x[:, :, :4]), layer.to_conv()(x[:, :, :4]))


@pytest.mark.parametrize("case", KINDS, ids=case_id)
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_and_relu6_fold_in(case, affine):
    """The parameter is the convolution's own weight, not the folded one."""
    torch.manual_seed(1)
    conv = conv_of(case, dtype=torch.float64)
    norm = torch.nn.BatchNorm2d(case.out_channels, affine=affine, dtype=torch.float64).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, case.in_channels, case.height, case.width, dtype=torch.float64)
    layer = SparseConv2d.from_conv(
        conv,
        [1, 3],
        norm=copy.deepcopy(norm),
        activation=torch.nn.ReLU6(),
        train_bias=affine,
    )
    y, wanted = layer(x), F.relu6(norm(conv(x)))
    torch.testing.assert_close(y, wanted)
    y.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(layer.rows.grad, conv.weight.grad[[1, 3]])
    if affine:
        torch.testing.assert_close(layer.norm.bias.grad, norm.bias.grad)
        assert layer.norm.weight.grad is None
        with torch.no_grad():
            layer.norm.bias += 1
            norm.bias += 1
        torch.testing.assert_close(layer(x), F.relu6(norm(conv(x))))
    with torch.no_grad():
        layer.norm.running_mean += 1
        norm.running_mean += 1
    torch.testing.assert_close(layer(x), F.relu6(norm(conv(x))))


def test_a_bias_can_train():
    conv = conv_of(KINDS[1])
    layer = SparseConv2d.from_conv(conv, train_bias=True)
    x = torch.randn(2, 9, 6, 5)
    layer(x).square().sum().backward()
    conv(x).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, conv.bias.grad)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    with pytest.raises(ValueError, match="train_bias: the convolution has no bias to train"):
        SparseConv2d.from_conv(conv_of(KINDS[1], bias=False), train_bias=True)


WRONG_CONVS = {
    "dilation: expected 1, got 2": {"dilation": 2},
    "groups: expected 1, or in_channels == out_channels .* got 2 for 4 -> 4": {"groups": 2},
    r"kernel_size: expected a square of at most 15, got 3x1": {"kernel_size": (3, 1)},
    r"stride: expected one whole number, got \(1, 2\)": {"stride": (1, 2)},
    "padding: expected one whole number, got same": {"padding": "same"},
    "padding_mode: expected 'zeros', got 'reflect'": {"padding_mode": "reflect"},
}


@pytest.mark.parametrize("message", WRONG_CONVS)
def test_convolutions_that_the_kernels_do_not_compute(message):
    settings = {"kernel_size": 3, **WRONG_CONVS[message]}
    with pytest.raises(ValueError, match=message):
        SparseConv2d.from_conv(torch.nn.Conv2d(4, 4, **settings))


def test_inputs_that_the_kernels_do_not_read():
    layer = SparseConv2d.from_conv(conv_of(KINDS[0]), [1])
    x = torch.randn(1, 6, 5, 7)
    with pytest.raises(TypeError, match="expected a tensor on the CPU, got one on meta"):
        layer(x.to("meta"))
    with pytest.raises(TypeError, match=r"expected torch\.float32 or .*, got torch\.bfl"):
        layer(x.bfloat16())
    with pytest.raises(TypeError, match=r"as of the weights, got torch\.float64"):
        layer(x.double())
    with pytest.raises(ValueError, match=r"expected shape \(N, C, H, W\), got \(6, 5, 7\)"):
        layer(x[0])
    with pytest.raises(ValueError, match="expected 6 channels"):
        layer(x[:, :5])
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match="autocast: these layers run in the precision"),
    ):
        layer(x)
    with pytest.raises(TypeError, match=r"weight: expected torch\.float32"):
        SparseConv2d.from_conv(conv_of(KINDS[0]).half())
    with pytest.raises(ValueError, match="rows, channels: expected both or neither"):
        sparse_conv2d(x, torch.zeros(9, 6, 1, 1), channels=[1])
    with pytest.raises(ValueError, match="activation: expected ReLU or ReLU6, got Hardswish"):
        SparseConv2d.from_conv(conv_of(KINDS[0]), activation=torch.nn.Hardswish())


SCRIPT = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import tinytrain_ext as tt
assert "nn" not in tt.__all__
for touch in (lambda: tt.nn, lambda: tt.default_network().to_torch()):
    try:
        touch()
    except ImportError as error:
        print(error)
"""


def test_without_torch_nn_says_what_to_install():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert all("pip install 'tinytrain_ext[torch]'" in line for line in lines)
    assert tinytrain_ext.nn.SparseConv2d is SparseConv2d
