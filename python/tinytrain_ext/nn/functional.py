"""Convolution with a channel-sparse weight gradient, as an autograd Function over the core.

Stock PyTorch saves the whole input of a convolution even where its weight is frozen, and of an
activation. Here a forward pass saves the input only where weights train (only the channels that
their gradient reads), and one bit an element for ReLU and ReLU6.

The Functions are not registered with `torch.library`: an operator would get plain weights and have
to pack them for the kernels in every call. Tensors are NCHW as everywhere in PyTorch; those in
`torch.channels_last` are read where they lie, others are copied once. Results are channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .. import _core

__all__ = ["MAX_KERNEL", "bit_relu", "sparse_conv2d", "sparse_conv2d_reference"]

MAX_KERNEL = 15
ACTIVATIONS = ("none", "relu", "relu6")
_CORES: dict[torch.dtype, Any] = {
    torch.float32: _core.Convolution32,
    torch.float64: _core.Convolution64,
}


def sparse_conv2d(
    x: Tensor,
    weight: Tensor,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channels: Sequence[int] = (),
    axis: str = "out",
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    activation: str = "none",
    probe: Tensor | None = None,
) -> Tensor:
    """A pointwise, depthwise or dense convolution of which only some channels train.

    x: (N, C, H, W), float32 or float64 on the CPU. weight: (O, C / groups, K, K), frozen; groups
    is 1, or C == O (depthwise). rows: the weights that train, in place of the same ones of
    `weight`: (S, C / groups, K, K), the output channels `channels`, or with axis "in" (not
    depthwise) (O, S, K, K), the input channels. bias: (O,), trains if it requires a gradient.
    activation: "none", "relu" or "relu6", behind the bias. Returns (N, O, H', W').

    probe: None, or (O,) of zeros that requires a gradient: its "gradient" will be the Fisher sums
    of Eq. 2, the sum over images of (sum over H, W of a * g)^2, where a is the convolution's output
    before its activation and g the loss's gradient with respect to it.

    Differentiable once. Raises TypeError and ValueError for what the kernels do not do,
    RuntimeError under autocast. It packs the weights in every call; `SparseConv2d` packs them once.
    """
    if (rows is None) != (len(channels) == 0):
        raise ValueError("rows, channels: expected both or neither")
    check_input(x, weight)
    check_geometry("sparse_conv2d", weight, stride, padding, groups)
    call = Call.of(x, weight, bias, channels, axis, stride, padding, groups, activation)
    if rows is not None:
        call.core.set_weight(_array(rows), call.channels, axis)
    return apply(x, rows, bias, probe, call)


def sparse_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    channels: Sequence[int] = (),
    axis: str = "out",
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """`sparse_conv2d` in plain PyTorch, slowly and with all that PyTorch saves (no `probe`)."""
    if rows is not None:
        index = torch.tensor(channels)
        weight = weight.index_copy(0 if axis == "out" else 1, index, rows)
    y = F.conv2d(x, weight, bias, stride, padding, groups=groups)
    if activation == "none":
        return y
    return F.relu(y) if activation == "relu" else F.relu6(y)


def bit_relu(x: Tensor, activation: str = "relu6") -> Tensor:
    """ReLU or ReLU6 of x (N, C, H, W) that saves one bit an element.

    Raises like `sparse_conv2d`.
    """
    check_input(x, None)
    if activation not in ACTIVATIONS[1:]:
        raise ValueError(f"activation: expected 'relu' or 'relu6', got {activation!r}")
    result: Tensor = _BitRelu.apply(x, activation)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True, eq=False)
class Call:
    """What an application of the Function needs beside the tensors it differentiates.

    core: the convolution with its weights packed, for one height and width. channels: selected
    ones, as a list and as a tensor; scale: None, or what each selected row is multiplied with
    before it is packed, (S, 1, 1, 1) (or (O, 1, 1, 1) for axis "in"). sources: tensors that `core`
    was made of and that must not change between forward and backward.
    """

    core: Any
    channels: list[int]
    index: Tensor
    axis: str
    gather: bool
    activation: str
    scale: Tensor | None = None
    sources: tuple[Tensor, ...] = ()

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        channels: Sequence[int],
        axis: str,
        stride: int,
        padding: int,
        groups: int,
        activation: str,
        **options: Any,
    ) -> Call:
        """A call for the height and width of x, weights packed."""
        depthwise = groups > 1
        limit = len(weight) if axis == "out" else weight.shape[1]
        whole, flat = _array(weight), np.zeros(len(weight), np.float32)
        core = _CORES[x.dtype](
            whole.astype(np.float32, copy=False),
            flat if bias is None else _array(bias).astype(np.float32, copy=False),
            height=x.shape[2],
            width=x.shape[3],
            stride=stride,
            padding=padding,
            depthwise=depthwise,
            activation=activation,
            isa="",
        )
        if x.dtype == torch.float64:  # the constructor rounds to float32
            core.set_weight(whole, list(range(len(weight))), "out")
            if bias is not None:
                core.set_bias(_array(bias))
        return cls(
            core=core,
            channels=list(channels),
            index=torch.tensor(list(channels), dtype=torch.long),
            axis=axis,
            gather=(depthwise or axis == "in") and 0 < len(channels) < limit,
            activation=activation,
            **options,
        )


def forward(x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the input as the kernels read it (N, H, W, C), and the activation's bits."""
    images = _nhwc(x)
    out, bits = call.core.forward(images.numpy())
    return _from_nhwc(out), images, torch.from_numpy(bits)


def apply(
    x: Tensor, rows: Tensor | None, bias: Tensor | None, probe: Tensor | None, call: Call
) -> Tensor:
    """The Function, on inputs that have been checked."""
    result: Tensor = _SparseConv2d.apply(x, rows, bias, probe, call)  # type: ignore[no-untyped-call]
    return result


class _SparseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor | None,
        bias: Tensor | None,
        probe: Tensor | None,
        call: Call,
    ) -> Tensor:
        y, images, bits = forward(x, call)
        _, needs_rows, _, needs_probe, _ = ctx.needs_input_grad
        if not any(ctx.needs_input_grad):
            return y
        saved = mask = values = None
        if needs_rows:
            saved = images.index_select(3, call.index) if call.gather else images
        if call.activation != "none":
            mask = bits
        if needs_probe:
            # A linear output may be added to in place by what follows; a rectified one never is.
            values = y.clone() if mask is None else y
        # The sources are saved for autograd's check that nobody changed them meanwhile.
        parameters = [t for t in (rows, bias) if t is not None]
        ctx.save_for_backward(saved, mask, values, *parameters, *call.sources)
        ctx.call = call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        saved, mask, values, *_ = ctx.saved_tensors
        needs_x, needs_rows, needs_bias, needs_probe, _ = ctx.needs_input_grad
        g = _nhwc(grad).numpy()
        grad_x = grad_rows = grad_bias = grad_probe = None
        if mask is not None or needs_probe:
            n, h, w, o = g.shape
            g, sums = call.core.grad_rectify(
                g.reshape(n, h * w, o),
                None if mask is None else mask.numpy(),
                _nhwc(values).numpy().reshape(n, h * w, o) if needs_probe else None,
            )
            g = g.reshape(n, h, w, o)
            if needs_probe:
                grad_probe = torch.from_numpy(np.square(sums).sum(axis=0))
        if needs_x:
            grad_x = _from_nhwc(call.core.grad_input(g)[0])
        if needs_rows:
            found = call.core.grad_weight(g, saved.numpy(), call.channels, call.axis)
            grad_rows = torch.from_numpy(found)
            if call.scale is not None:
                grad_rows = grad_rows * call.scale
        if needs_bias:
            grad_bias = torch.from_numpy(g.sum(axis=(0, 1, 2)))
        return grad_x, grad_rows, grad_bias, grad_probe, None


class _BitRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str) -> Tensor:
        images = _nhwc(x)
        n, h, w, c = images.shape
        out, bits = _CORES[x.dtype].rectify(images.numpy().reshape(n, h * w, c), activation)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.from_numpy(bits))
        return _from_nhwc(out.reshape(n, h, w, c))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        images = _nhwc(grad)
        n, h, w, c = images.shape
        core = _CORES[grad.dtype]
        g, _ = core.grad_rectify(images.numpy().reshape(n, h * w, c), mask.numpy(), None)
        return _from_nhwc(g.reshape(n, h, w, c)), None


def check_autocast() -> None:
    """Refuses to run under autocast, which would be ignored."""
    if torch.is_autocast_enabled("cpu"):
        raise RuntimeError(
            "autocast: these layers run in the precision of their weights; "
            "call them under torch.autocast('cpu', enabled=False)"
        )


def check_input(x: Tensor, weight: Tensor | None) -> None:
    """Refuses, naming it, an input that the kernels cannot read."""
    check_autocast()
    if x.device.type != "cpu":
        raise TypeError(f"x: expected a tensor on the CPU, got one on {x.device}")
    if x.dtype not in _CORES:
        raise TypeError(f"x: expected torch.float32 or torch.float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"x: expected a dense tensor, got {x.layout}")
    if x.ndim != 4:
        raise ValueError(f"x: expected shape (N, C, H, W), got {tuple(x.shape)}")
    if weight is not None and weight.dtype != x.dtype:
        raise TypeError(f"x: expected {weight.dtype} as of the weights, got {x.dtype}")


def check_geometry(where: str, weight: Tensor, stride: int, padding: int, groups: int) -> None:
    """Refuses, naming it, a convolution that the kernels do not compute."""
    outputs, fan_in, height, width = weight.shape
    if weight.dtype not in _CORES:
        raise TypeError(
            f"{where}: weight: expected torch.float32 or torch.float64, got {weight.dtype}"
        )
    if height != width or height > MAX_KERNEL:
        raise ValueError(
            f"{where}: kernel_size: expected a square of at most {MAX_KERNEL}, got {height}x{width}"
        )
    if stride < 1 or not 0 <= padding < height:
        raise ValueError(
            f"{where}: stride, padding: expected at least 1 and 0 to kernel_size - 1, "
            f"got {stride} and {padding}"
        )
    if groups != 1 and not (groups == outputs and fan_in == 1):
        raise ValueError(
            f"{where}: groups: expected 1, or in_channels == out_channels (depthwise), got "
            f"{groups} for {fan_in * groups} -> {outputs} channels"
        )


def _nhwc(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C), C-contiguous; a view if x is channels_last."""
    return x.detach().permute(0, 2, 3, 1).contiguous()


def _from_nhwc(array: Any) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W) over the same memory, and no view: it may change in place."""
    n, h, w, c = array.shape
    storage = torch.from_numpy(array).untyped_storage()
    strides = (h * w * c, 1, w * c, c)
    return torch.empty(0, dtype=_DTYPES[array.dtype]).set_(storage, 0, (n, c, h, w), strides)


_DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()
