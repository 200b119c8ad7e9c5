"""Drop-in layers: torch.nn.Conv2d of which only the selected channels are Parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..selection import LayerUpdate
from .functional import ACTIVATIONS, Call, apply, bit_relu, check_geometry, check_input, forward

__all__ = ["BitReLU", "FoldedBatchNorm2d", "Seen", "SparseConv2d", "activation_of"]


def activation_of(module: nn.Module) -> str | None:
    """ "relu" or "relu6" for the modules that are these, "none" for nn.Identity, else None."""
    match module:
        case nn.Identity():
            return "none"
        case nn.ReLU6():
            return "relu6"
        case nn.Hardtanh():
            return "relu6" if (module.min_val, module.max_val) == (0, 6) else None
        case nn.ReLU():
            return "relu"
        case BitReLU():
            return module.activation
    return None


class SparseConv2d(nn.Module):
    """torch.nn.Conv2d that trains some channels only, with a batch norm and a ReLU folded in.

    The one Parameter, `rows`, holds the selected weights: (S, C / groups, K, K) of the output
    channels `update.channels`, or (O, S, K, K) of input channels for axis "in". Gradients and any
    optimiser's state have its size. All other weights are frozen, and stay bit-identical.
    `state_dict` and `load_state_dict` speak of `weight` and `bias` as torch.nn.Conv2d does, the
    selected rows in their places.

    Running statistics and affine part of the batch norm are frozen: as in `eval()`, always.
    Weights are packed for the kernels again when autograd's version counter says that they changed;
    it does not see what is written through `rows.data`: write under `torch.no_grad()`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        update: LayerUpdate | None,
        *,
        stride: int,
        padding: int,
        groups: int,
        activation: str = "none",
        norm: nn.BatchNorm2d | None = None,
        train_bias: bool = False,
    ) -> None:
        """Use `from_conv`. update: what trains, None for nothing; train_bias: the bias, too (the
        batch norm's where there is one).

        Raises TypeError and ValueError for what the kernels do not do.
        """
        super().__init__()
        check_geometry("SparseConv2d", weight, stride, padding, groups)
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation: expected one of {known}, got {activation!r}")
        if norm is not None:
            if norm.running_mean is None or norm.running_var is None:
                raise ValueError("norm: expected a batch norm with running statistics")
            if norm.num_features != len(weight):
                raise ValueError(f"norm: expected {len(weight)} channels, got {norm.num_features}")
        self.stride, self.padding, self.groups = stride, padding, groups
        self.out_channels, self.in_channels = len(weight), weight.shape[1] * groups
        self.kernel_size = weight.shape[2]
        self.activation = activation
        self.norm = norm
        self.probe: Tensor | None = None  # see sparse_conv2d; set by fisher_information
        self.layer: int | None = None  # the convolution's number in the model, where converted
        # The selected weights in here are out of date whenever `rows` has changed since.
        self._frozen: Tensor
        self.register_buffer("_frozen", weight.detach().clone(), persistent=False)
        shift = None if bias is None else bias.detach().clone()
        own = shift if norm is None else norm.bias
        if train_bias and own is None:
            raise ValueError("train_bias: the convolution has no bias to train")
        self.bias: Tensor | None
        if train_bias and norm is None and shift is not None:
            self.bias = nn.Parameter(shift)
        else:
            self.register_buffer("bias", shift, persistent=False)
        if norm is not None:
            norm.requires_grad_(False)
            if train_bias:
                norm.bias.requires_grad_()
        self.train_bias = train_bias
        self._calls: dict[tuple[int, int], _Packed] = {}
        self.rows: nn.Parameter | None
        self.update: LayerUpdate | None = None
        self.register_parameter("rows", None)
        self._select(update)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        channels: LayerUpdate | Iterable[int] = (),
        *,
        norm: nn.BatchNorm2d | None = None,
        activation: str | nn.Module = "none",
        train_bias: bool = False,
    ) -> Self:
        """A layer in place of `conv`, and of the batch norm and activation behind it.

        channels: output channels that train (or a LayerUpdate, for input channels); none by
        default. norm: its statistics and affine part are used as they are; it is a submodule of
        the result. activation: "none", "relu", "relu6", or the module. `conv` is not changed.

        Raises ValueError, naming what it is, for dilation, other groups than depthwise, padding
        that is not zeros or not the same on all sides, and kernels that are not square.
        """
        for name in ("stride", "padding", "dilation"):
            value = getattr(conv, name)
            if isinstance(value, str) or len(set(value)) != 1:
                raise ValueError(f"conv: {name}: expected one whole number, got {value}")
        if conv.dilation[0] != 1:
            raise ValueError(f"conv: dilation: expected 1, got {conv.dilation[0]}")
        if conv.padding_mode != "zeros":
            raise ValueError(f"conv: padding_mode: expected 'zeros', got {conv.padding_mode!r}")
        if type(conv).forward is not nn.Conv2d.forward:
            raise ValueError(f"conv: {type(conv).__name__} does more than torch.nn.Conv2d")
        if isinstance(activation, nn.Module):
            named = activation_of(activation)
            if named is None:
                raise ValueError(f"activation: expected ReLU or ReLU6, got {activation}")
            activation = named
        return cls(
            conv.weight,
            conv.bias,
            _update_of(channels),
            stride=conv.stride[0],
            padding=int(conv.padding[0]),
            groups=conv.groups,
            activation=activation,
            norm=norm,
            train_bias=train_bias,
        )

    @property
    def weight(self) -> Tensor:
        """(O, C / groups, K, K): a copy, the selected rows in their places."""
        weight = self._frozen.clone()
        if self.update is not None and self.rows is not None:
            weight.index_copy_(self._dim, self._index, self.rows.detach())
        return weight

    def set_channels(self, channels: LayerUpdate | Iterable[int]) -> None:
        """Selects other channels; what has been learned stays. `rows` becomes a new Parameter, so
        make a new optimiser.

        Raises ValueError for channels that the layer has not; it is unchanged then.
        """
        self._select(_update_of(channels))

    def share_norm(self) -> None:
        """Gives up the batch norm as a submodule: it has its own place in the model."""
        norm = self._modules.pop("norm")
        self.__dict__["norm"] = norm

    def to_conv(self) -> nn.Conv2d:
        """A torch.nn.Conv2d with the same weights (without the batch norm and the activation)."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            groups=self.groups,
            bias=self.bias is not None,
            dtype=self._frozen.dtype,
            device="meta",
        )
        conv.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone())
        return conv.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self._frozen)
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"x: expected {self.in_channels} channels (N, C, H, W), got {tuple(x.shape)}"
            )
        bias = self.bias
        if self.norm is not None:
            bias = self.norm.bias if self.train_bias else None
        call = self._call(x)
        trains = any(t is not None and t.requires_grad for t in (x, self.rows, bias, self.probe))
        if not (trains and torch.is_grad_enabled()):
            return forward(x, call)[0]  # spares a frozen prefix autograd's machinery
        return apply(x, self.rows, bias, self.probe, call)

    def extra_repr(self) -> str:
        trained = "nothing"
        if self.update is not None:
            axis = self.in_channels if self.update.axis == "in" else self.out_channels
            trained = f"{len(self.update.channels)} of {axis} channels ({self.update.axis})"
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, groups={self.groups}, "
            f"activation={self.activation}, trains {trained}"
        )

    # Weights as the kernels read them

    def _call(self, x: Tensor) -> Call:
        """The packed convolution for x's height and width, brought up to date."""
        size = (x.shape[2], x.shape[3])
        packed = self._calls.get(size)
        others = (self._plain_bias, *self._norm_tensors)
        frozen = [self._frozen, *(t for t in others if t is not None)]
        if packed is None or not packed.frozen.same(frozen):
            packed = self._calls[size] = _Packed(self._pack(x, frozen), Seen(frozen))
        for trained, put in ((self.rows, self._put_rows), (self._trained_bias, self._put_bias)):
            if trained is None:
                continue
            seen = packed.trained.get(put.__name__)
            if seen is None or not seen.same([trained]):
                put(packed.call, trained.detach())
                packed.trained[put.__name__] = Seen([trained])
        return packed.call

    def _pack(self, x: Tensor, frozen: list[Tensor]) -> Call:
        with torch.no_grad():
            weight, bias, scale = self._frozen, self.bias, self._scale()
            if scale is not None:
                weight = (weight.double() * scale.view(-1, 1, 1, 1)).to(x.dtype)
                bias = self._folded_bias(scale).to(x.dtype)
                if self.update is not None:
                    chosen = scale[self._index] if self.update.axis == "out" else scale
                    scale = chosen.view(-1, 1, 1, 1).to(x.dtype)
            return Call.of(
                x,
                weight,
                bias,
                () if self.update is None else self.update.channels,
                "out" if self.update is None else self.update.axis,
                self.stride,
                self.padding,
                self.groups,
                self.activation,
                scale=scale,
                sources=tuple(frozen),
            )

    def _put_rows(self, call: Call, rows: Tensor) -> None:
        if call.scale is not None:
            rows = rows * call.scale
        call.core.set_weight(rows.contiguous().numpy(), call.channels, call.axis)

    def _put_bias(self, call: Call, bias: Tensor) -> None:
        scale = self._scale()
        if scale is not None:
            bias = self._folded_bias(scale).to(bias.dtype)
        call.core.set_bias(bias.contiguous().numpy())

    @property
    def _trained_bias(self) -> Tensor | None:
        if not self.train_bias:
            return None
        return self.bias if self.norm is None else self.norm.bias

    @property
    def _plain_bias(self) -> Tensor | None:
        return None if self.bias is self._trained_bias else self.bias

    @property
    def _norm_tensors(self) -> tuple[Tensor | None, ...]:
        if self.norm is None:
            return ()
        bias = None if self.train_bias else self.norm.bias
        return (self.norm.weight, bias, self.norm.running_mean, self.norm.running_var)

    def _scale(self) -> Tensor | None:
        """(O,) float64: what the batch norm multiplies each output channel with."""
        if self.norm is None:
            return None
        assert self.norm.running_var is not None
        scale = (self.norm.running_var.double() + self.norm.eps).rsqrt()
        return scale if self.norm.weight is None else scale * self.norm.weight.detach().double()

    def _folded_bias(self, scale: Tensor) -> Tensor:
        """(O,) float64: what the batch norm adds, the convolution's own bias in it."""
        assert self.norm is not None
        assert self.norm.running_mean is not None
        mean = self.norm.running_mean.double()
        shift = 0 if self.bias is None else self.bias.detach().double()
        folded = (shift - mean) * scale
        return folded if self.norm.bias is None else folded + self.norm.bias.detach().double()

    # Selection

    @property
    def _dim(self) -> int:
        return 1 if self.update is not None and self.update.axis == "in" else 0

    def _select(self, update: LayerUpdate | None) -> None:
        if update is not None:
            if update.axis == "in" and self.groups > 1:
                raise ValueError("channels: a depthwise convolution has axis 'out' only")
            limit = self._frozen.shape[0 if update.axis == "out" else 1]
            if update.channels[-1] >= limit:
                raise ValueError(f"channels: expected 0 to {limit - 1}, got {update.channels[-1]}")
        self._frozen.copy_(self.weight)
        self.update = update
        self._index: Tensor
        chosen = () if update is None else update.channels
        self.register_buffer("_index", torch.tensor(chosen, dtype=torch.long), persistent=False)
        selected = self._frozen.index_select(self._dim, self._index.to(self._frozen.device))
        self.rows = None if update is None else nn.Parameter(selected)
        self._calls.clear()

    # As torch.nn.Conv2d has it

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[f"{prefix}weight"] = self.weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        targets = {"weight": self._frozen, "bias": self.bias}
        for name, target in targets.items():
            key = prefix + name
            if target is None:
                continue
            if key not in state_dict:
                if strict:
                    missing_keys.append(key)
                continue
            value = state_dict[key]
            if value.shape != target.shape:
                error_msgs.append(
                    f"{key}: expected shape {tuple(target.shape)}, got {tuple(value.shape)}"
                )
                continue
            with torch.no_grad():
                target.copy_(value)
                if name == "weight" and self.rows is not None:
                    self.rows.copy_(target.index_select(self._dim, self._index))
        if strict:
            children = tuple(f"{prefix}{name}." for name, _ in self.named_children())
            known = {prefix + name for name, target in targets.items() if target is not None}
            unexpected_keys += [
                key
                for key in state_dict
                if key.startswith(prefix) and key not in known and not key.startswith(children)
            ]

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed weights, which cannot be copied and are made again when needed."""
        return {**self.__dict__, "_calls": {}, "probe": None}


class BitReLU(nn.Module):
    """ReLU or ReLU6 that saves one bit an element: where it cannot be folded into a convolution."""

    def __init__(self, activation: str = "relu6") -> None:
        super().__init__()
        if activation not in ACTIVATIONS[1:]:
            raise ValueError(f"activation: expected 'relu' or 'relu6', got {activation!r}")
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return bit_relu(x, self.activation)

    def extra_repr(self) -> str:
        return self.activation


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """Stands where a batch norm was that a SparseConv2d has folded in: passes its input on.

    Holds the same tensors under the same names, so that the model's state_dict keeps its form.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
        self._original = (norm,)  # in a tuple: not a submodule
        for name, parameter in norm.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def restored(self) -> nn.BatchNorm2d:
        """The batch norm that was here, with the present tensors."""
        (norm,) = self._original
        for name, parameter in self.named_parameters(recurse=False):
            parameter.requires_grad_()
            norm.register_parameter(name, parameter)
        for name, buffer in self.named_buffers(recurse=False):
            norm.register_buffer(name, buffer)
        return norm

    def forward(self, x: Tensor) -> Tensor:
        return x


class Seen:
    """Tensors as they were when something was made of them; tells whether they have changed since.

    By autograd's version counters: a change through `tensor.data` is not seen, here as there.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Held, so that no other tensor can come to lie where one of them lay.
        self._tensors = [tensor.detach() for tensor in tensors]
        counted = not any(tensor.is_inference() for tensor in tensors)
        self._versions = [tensor._version for tensor in tensors] if counted else None

    def same(self, tensors: Sequence[Tensor]) -> bool:
        if self._versions is None or any(tensor.is_inference() for tensor in tensors):
            return False  # inference tensors count no versions
        return all(
            old.data_ptr() == new.data_ptr() and version == new._version
            for old, new, version in zip(self._tensors, tensors, self._versions, strict=True)
        )


class _Packed:
    """A packed convolution, and what it was made of."""

    def __init__(self, call: Call, frozen: Seen) -> None:
        self.call = call
        self.frozen = frozen
        self.trained: dict[str, Seen] = {}


def _update_of(channels: LayerUpdate | Iterable[int]) -> LayerUpdate | None:
    if isinstance(channels, LayerUpdate):
        return channels
    chosen = tuple(channels)
    return LayerUpdate("out", chosen) if chosen else None
