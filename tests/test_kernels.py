"""Every kernel x instruction set x case against torch in float64."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from cases import CASES, ConvCase
from tinytrain_ext import _core
from tolerance import assert_as_good_as_naive

ISAS = _core.available_isas()
ACTIVATIONS = ("none", "relu", "relu6")
EXACT = 1e-12  # of the largest sum of magnitudes


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Problem:
    """A case's float32 operands (NHWC), and torch's float64 answers."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    x: NDArray[np.float32]
    grad_output: NDArray[np.float32]
    y: NDArray[np.float64]
    grad_x: NDArray[np.float64]
    grad_weight: NDArray[np.float64]
    y_magnitude: float
    grad_x_magnitude: float
    grad_weight_magnitude: float


def _nchw(array: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(array).double().permute(0, 3, 1, 2)


def _nhwc(tensor: torch.Tensor) -> NDArray[np.float64]:
    return tensor.detach().permute(0, 2, 3, 1).contiguous().numpy()


@functools.lru_cache(maxsize=2)
def problem(case: ConvCase) -> Problem:
    rng = np.random.default_rng(CASES.index(case))
    images = 1 if case.height > 24 else 2
    fan_in = int(np.prod(case.weight_shape[1:]))
    # Outputs of about +-3, so that each activation clips some and lets some pass.
    weight = (rng.standard_normal(case.weight_shape) * 3 / np.sqrt(fan_in)).astype(np.float32)
    bias = rng.standard_normal(case.out_channels).astype(np.float32)
    x = rng.standard_normal((images, case.height, case.width, case.in_channels), np.float32)
    grad_output = rng.standard_normal((images, *case.output_size, case.out_channels), np.float32)

    def passes(absolute: bool) -> list[torch.Tensor]:
        operands = (_nchw(x), torch.from_numpy(weight).double(), torch.from_numpy(bias).double())
        g = _nchw(grad_output)
        if absolute:
            operands, g = tuple(t.abs() for t in operands), g.abs()
        tx, tw, tb = (t.contiguous().requires_grad_() for t in operands)
        groups = case.in_channels if case.depthwise else 1
        y = F.conv2d(tx, tw, tb, case.stride, case.padding, groups=groups)
        return [y, *torch.autograd.grad(y, (tx, tw), g)]

    y, grad_x, grad_weight = passes(absolute=False)
    return Problem(
        weight,
        bias,
        x,
        grad_output,
        _nhwc(y),
        _nhwc(grad_x),
        grad_weight.numpy(),
        *(float(t.detach().max()) for t in passes(absolute=True)),
    )


def convolution(case: ConvCase, isa: str, activation: str = "none"):
    """The core's convolution: of an instruction set, or in double for isa "exact"."""
    p = problem(case)
    make = _core.Convolution64 if isa == "exact" else _core.Convolution32
    return make(
        p.weight,
        p.bias,
        height=case.height,
        width=case.width,
        stride=case.stride,
        padding=case.padding,
        depthwise=case.depthwise,
        activation=activation,
        isa="" if isa == "exact" else isa,
    )


def check(isa, found, reference, naive, magnitude, what):
    """The tolerance rule in float32; rounding error of the reference itself in double."""
    if isa == "exact":
        np.testing.assert_allclose(
            found, reference, rtol=EXACT, atol=EXACT * magnitude, err_msg=what
        )
    else:
        assert_as_good_as_naive(found, reference, naive, magnitude, what)


def activate(v, activation):
    return v if activation == "none" else np.clip(v, 0, 6 if activation == "relu6" else None)


def packed(bits: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Bits (N, H, W, C) as the kernels keep them: (N, H * W, ceil(C / 8)), lowest bit first."""
    n, height, width, channels = bits.shape
    rows = bits.reshape(n, height * width, channels)
    return np.packbits(rows, axis=2, bitorder="little")


@dataclass(frozen=True)
class Naive:
    """The three passes by their definition: float32, one product after the other."""

    y: NDArray[np.float32]
    grad_x: NDArray[np.float32]
    grad_weight: NDArray[np.float32]


@functools.lru_cache(maxsize=2)
def naive(case: ConvCase) -> Naive:
    p = problem(case)
    k, s, pad = case.kernel, case.stride, case.padding
    height, width = case.output_size
    x = np.pad(p.x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    y, grad_x = np.zeros_like(p.grad_output), np.zeros_like(x)
    for ky, kx in itertools.product(range(k), range(k)):
        at = np.s_[:, ky : ky + (height - 1) * s + 1 : s, kx : kx + (width - 1) * s + 1 : s]
        if case.depthwise:
            y += x[at] * p.weight[:, 0, ky, kx]
            grad_x[at] += p.grad_output * p.weight[:, 0, ky, kx]
            continue
        for c in range(case.in_channels):
            y += x[at][..., c : c + 1] * p.weight[:, c, ky, kx]
        for o in range(case.out_channels):
            grad_x[at] += p.grad_output[..., o : o + 1] * p.weight[o, :, ky, kx]
    y += p.bias
    sums = np.zeros((k, k, case.in_channels), np.float32)
    if not case.depthwise:
        sums = np.zeros((case.out_channels, *sums.shape), np.float32)
    for n, oy, ox in itertools.product(range(len(x)), range(height), range(width)):
        window = x[n, oy * s : oy * s + k, ox * s : ox * s + k]
        g = p.grad_output[n, oy, ox]
        sums += window * (g if case.depthwise else g[:, None, None, None])
    grad_weight = np.moveaxis(sums, -1, 0)[:, None] if case.depthwise else np.moveaxis(sums, -1, 1)
    inside = grad_x[:, pad : pad + case.height, pad : pad + case.width]
    return Naive(y, np.ascontiguousarray(inside), np.ascontiguousarray(grad_weight))


every_case_and_isa = pytest.mark.parametrize(
    ("case", "isa"),
    [(case, isa) for case in CASES for isa in (*ISAS, "exact")],
    ids=lambda value: value.name if isinstance(value, ConvCase) else value,
)


def draw(rng: np.random.Generator, shape: tuple[int, ...], isa: str) -> NDArray[np.floating]:
    return rng.standard_normal(shape, np.float32).astype(dtype_of(isa))


def dtype_of(isa: str) -> type:
    return np.float64 if isa == "exact" else np.float32


@every_case_and_isa
def test_forward(case, isa):
    p, plain = problem(case), naive(case)
    x = p.x.astype(dtype_of(isa))
    shortcut = draw(np.random.default_rng(1), p.y.shape, isa)
    magnitude = p.y_magnitude + float(np.abs(shortcut).max())
    for activation in ACTIVATIONS:
        conv = convolution(case, isa, activation)
        for addend in (None, shortcut):
            y, mask = conv.forward(x, addend)
            extra = 0 if addend is None else addend
            reference = activate(p.y + extra, activation)
            what = f"{activation}, {'no' if addend is None else 'an'} addend"
            check(isa, y, reference, activate(plain.y + extra, activation), magnitude, what)
            if activation != "none":
                top = 6 if activation == "relu6" else np.inf
                np.testing.assert_array_equal(mask, packed((y > 0) & (y < top)), what)


@every_case_and_isa
def test_grad_input(case, isa):
    p, plain = problem(case), naive(case)
    rng = np.random.default_rng(2)
    conv = convolution(case, isa)
    grad_output = p.grad_output.astype(dtype_of(isa))
    other, values = draw(rng, p.x.shape, isa), draw(rng, p.x.shape, isa)
    bits = rng.random(p.x.shape) < 0.6
    magnitude = p.grad_x_magnitude + float(np.abs(other).max())
    for addend, mask, inspected in itertools.product((None, other), (None, bits), (None, values)):
        found, fisher = conv.grad_input(
            grad_output,
            addend=addend,
            mask=None if mask is None else packed(mask),
            values=inspected,
        )
        given = ("addend", addend), ("mask", mask), ("values", inspected)
        what = "with " + ", ".join(name for name, value in given if value is not None)
        extra = 0 if addend is None else addend
        keep = 1 if mask is None else mask
        reference, by_hand = (p.grad_x + extra) * keep, (plain.grad_x + extra) * keep
        check(isa, found, reference, by_hand, magnitude, what)
        if mask is not None:
            assert (found[~bits] == 0).all(), what
        if inspected is None:
            assert (fisher == 0).all(), what
            continue
        terms = reference * values
        sums = (by_hand * values).sum(axis=(1, 2))
        scale = float(np.abs(terms).sum(axis=(1, 2)).max()) + magnitude
        check(isa, fisher, terms.sum(axis=(1, 2)), sums, scale, f"Fisher {what}")


def selections(channels: int) -> list[list[int]]:
    """None, the middle one, a scattered half, all."""
    half = np.random.default_rng(3).permutation(channels)[: max(channels // 2, 1)]
    return [[], [channels // 2], sorted(half.tolist()), list(range(channels))]


@every_case_and_isa
def test_grad_weight(case, isa):
    p, plain = problem(case), naive(case)
    conv = convolution(case, isa)
    x, grad_output = p.x.astype(dtype_of(isa)), p.grad_output.astype(dtype_of(isa))
    rows = [("out", channels, np.s_[channels]) for channels in selections(case.out_channels)]
    columns = [("in", channels, np.s_[:, channels]) for channels in selections(case.in_channels)]
    for axis, channels, at in rows if case.depthwise else rows + columns:
        found = conv.grad_weight(grad_output, x, channels, axis)
        what = f"axis {axis}, {len(channels)} channels"
        reference, by_hand = p.grad_weight[at], plain.grad_weight[at]
        check(isa, found, reference, by_hand, p.grad_weight_magnitude, what)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_a_depthwise_row_does_not_depend_on_the_rows_computed_with_it(isa, stride):
    """Kernels may take two rows at a time, and strips begin anywhere: less above, the same bits."""
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((24, 1, 3, 3), np.float32)
    bias = rng.standard_normal(24, np.float32)
    x = rng.standard_normal((1, 12, 12, 24), np.float32)
    grad = rng.standard_normal((1, 12 // stride, 12 // stride, 24), np.float32)
    mask = packed(rng.random(x.shape) < 0.6)
    shape = {"width": 12, "stride": stride, "padding": 1, "depthwise": True, "isa": isa}
    for activation in ACTIVATIONS:
        whole, less = (
            _core.Convolution32(weight, bias, height=height, activation=activation, **shape)
            for height in (12, 12 - stride)
        )
        y, _ = whole.forward(x)
        below, _ = less.forward(np.ascontiguousarray(x[:, stride:]))
        # The first row of `below` meets the border instead of what is above.
        np.testing.assert_array_equal(y[:, 2:], below[:, 1:])
    grad_x, _ = whole.grad_input(grad, mask=mask)
    below, _ = less.grad_input(
        np.ascontiguousarray(grad[:, 1:]), mask=np.ascontiguousarray(mask[:, 12 * stride :])
    )
    np.testing.assert_array_equal(grad_x[:, 2 * stride :], below[:, stride:])


def test_each_instruction_set_is_the_one_asked_for():
    assert ISAS[-1] == "scalar"
    assert _core.default_isa() in ISAS
    case = CASES[0]
    with pytest.raises(ValueError, match=r"isa: unknown instruction set 'sse9'; this machine has"):
        convolution(case, "sse9")


def test_operands_are_checked():
    case = ConvCase(4, 6, 5, 7, kernel=3, padding=1)
    weight, bias = np.ones(case.weight_shape, np.float32), np.ones(6, np.float32)
    shape = {"height": 5, "width": 7, "stride": 1, "padding": 1, "depthwise": False}
    make = functools.partial(_core.Convolution32, **shape, activation="none", isa="")
    for change, message in [
        ({"stride": 0}, "kernel, stride, padding: expected .*; got 3, 0, 1"),
        ({"padding": 3}, "kernel, stride, padding: expected .*; got 3, 1, 3"),
        ({"padding": -1}, "kernel, stride, padding: expected .*; got 3, 1, -1"),
        ({"width": 2, "padding": 0}, "height, width: expected at least .* 3, got 5, 2"),
        ({"depthwise": True}, r"weight: expected shape \(O, 1, k, k\), got \(6, 4, 3, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            _core.Convolution32(weight, bias, **{**shape, **change}, activation="none", isa="")
    conv = make(weight, bias)
    x, g = np.ones((2, 5, 7, 4), np.float32), np.ones((2, 5, 7, 6), np.float32)
    with pytest.raises(ValueError, match=r"bias: expected shape \(6\), got \(5\)"):
        make(weight, bias[:5])
    with pytest.raises(ValueError, match=r"x: expected shape \(N, 5, 7, 4\), got \(2, 5, 7, 3\)"):
        conv.forward(np.ascontiguousarray(x[..., :3]))
    with pytest.raises(TypeError):
        conv.forward(x.astype(np.float64))
    with pytest.raises(TypeError):
        conv.forward(x[:, :, ::-1])
    with pytest.raises(
        ValueError, match=r"addend: expected shape \(2, 5, 7, 6\), got \(1, 5, 7, 6\)"
    ):
        conv.forward(x, g[:1])
    with pytest.raises(ValueError, match=r"x: expected shape \(3, 5, 7, 4\), got \(2, 5, 7, 4\)"):
        conv.grad_weight(np.ones((3, 5, 7, 6), np.float32), x, [0], "out")
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 35, 1\)"):
        conv.grad_input(g, mask=np.zeros((2, 35, 2), np.uint8))
    with pytest.raises(ValueError, match="channels: expected 0 to 5, got 6"):
        conv.grad_weight(g, x, [6], "out")
    with pytest.raises(ValueError, match="channels: expected 0 to 3, got 4"):
        conv.grad_weight(g, x, [4], "in")
    depthwise = _core.Convolution32(
        weight[:4, :1].copy(), bias[:4], **{**shape, "depthwise": True}, activation="none", isa=""
    )
    with pytest.raises(ValueError, match="axis: a depthwise convolution has only axis out"):
        depthwise.grad_weight(g[..., :4].copy(), x, [0], "in")
