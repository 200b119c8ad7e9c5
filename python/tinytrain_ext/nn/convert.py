"""A user's whole model in sparse layers, and back; Eq. 2 on such a model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import cost
from ..errors import NonFiniteError
from ..selection import LayerUpdate, UpdatePolicy
from .graph import Step, norm_activation, read, refuse
from .layers import BitReLU, FoldedBatchNorm2d, SparseConv2d

__all__ = ["convert", "fisher_information", "is_converted", "revert", "sparse_layers"]

logger = logging.getLogger(__name__)


def convert(
    model: nn.Module, policy: UpdatePolicy | Mapping[str, LayerUpdate | Iterable[int]]
) -> nn.Module:
    """A copy of `model` whose convolutions are SparseConv2d and train what `policy` names.

    policy: by layer, which is the number of the convolution in order of execution, the first 0; or
    by the convolution's name in the model: {name: output channels or LayerUpdate}.
    The batch norm and the ReLU or ReLU6 behind a convolution are folded into it (its statistics
    frozen), other ReLUs save one bit an element, convolutions that are not in the policy are
    frozen. What trains beside them (a linear head, say) stays as it was. Only modules can be
    exchanged: an activation that `forward` calls as a function goes on saving its input.

    The weights are the model's own, not folded ones, and `state_dict` has the model's keys:
    training goes as if the model had been trained with all but the selected channels masked.

    Raises ValueError where torch.fx cannot trace the model, where the policy names a layer or
    channels that the model has not, or a convolution that the kernels do not compute.
    """
    model = revert(model) if is_converted(model) else copy.deepcopy(model)
    steps, _ = read(model)
    calls: dict[int, int] = {}
    for step in steps:
        calls[id(step.module)] = calls.get(id(step.module), 0) + 1
    convolutions: dict[int, Step] = {}
    for step in steps:
        if step.kind == "conv":
            convolutions.setdefault(id(step.module), step)
    layers = list(convolutions.values())
    wanted = _by_layer(policy, layers)
    biases = policy.biases if isinstance(policy, UpdatePolicy) else ()
    for layer, step in enumerate(layers):
        rectifier = step.activation
        if rectifier is not None and (rectifier.module is None or calls[id(rectifier.module)] > 1):
            rectifier = None  # a function, or one module for several places
        try:
            sparse, norm = _sparse_layer(step, rectifier, wanted.get(layer), layer in biases)
        except (TypeError, ValueError) as error:
            if layer in wanted or layer in biases:
                raise refuse(step, f"layer {layer}: {error}") from error
            logger.info("%s stays as it is: %s", step.target, error)
            continue
        sparse.layer = layer
        _exchange(model, step.target, sparse)
        if norm is not None and step.norm is not None:
            sparse.share_norm()
            _exchange(model, step.norm.target, norm)
        if sparse.activation != "none" and rectifier is not None:
            _exchange(model, rectifier.target, _FoldedActivation(rectifier.module))
    for step in steps:
        if step.kind == "activation" and isinstance(step.module, nn.Module):
            present = model.get_submodule(step.target)
            if not isinstance(present, _FoldedActivation):
                _exchange(model, step.target, BitReLU(step.options["activation"]))
    return model


def revert(model: nn.Module) -> nn.Module:
    """A copy of a converted model in PyTorch's own layers, with what has been learned.

    Weights that were not selected are bit-identical to those before the conversion. All weights of
    the convolutions and batch norms require gradients again.
    """
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        match module:
            case SparseConv2d():
                _exchange(model, name, module.to_conv())
            case FoldedBatchNorm2d() | _FoldedActivation():
                _exchange(model, name, module.restored())
            case BitReLU():
                _exchange(model, name, nn.ReLU6() if module.activation == "relu6" else nn.ReLU())
    return model


def is_converted(model: nn.Module) -> bool:
    """Whether there is a SparseConv2d in the model."""
    return any(isinstance(module, SparseConv2d) for module in model.modules())


def sparse_layers(model: nn.Module) -> dict[int, SparseConv2d]:
    """{layer: module} of the model's sparse layers: by the numbers that `convert` gave them, or, in
    a model built by hand, in the order of `model.modules()`."""
    found = [module for module in model.modules() if isinstance(module, SparseConv2d)]
    if any(module.layer is None for module in found):
        return dict(enumerate(found))
    return {int(module.layer or 0): module for module in found}


def fisher_information(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Iterable[Any],
    *,
    layers: Iterable[int] | None = None,
) -> dict[int, NDArray[np.float64]]:
    """Eq. 2 on a model of sparse layers: {layer: (O,)}.

        Delta_o = 1 / (2 N) * sum over images of (sum over H, W of a * g) ** 2

    data: batches (x, target, ...), x of shape (n, C, H, W); loss_fn: of (model(x), target, ...),
    the loss *summed* over the batch's images, so that batches of any size give the same.
    layers: the last 40 % by default, as for a network whose blocks are not known.
    The model's weights and their gradients stay as they are; put it in eval mode if it has dropout.

    Raises ValueError for layers that the model has not, or no data; NonFiniteError where a loss is
    not finite.
    """
    known = sparse_layers(model)
    if layers is None:
        layers = sorted(known)[-max(1, round(cost.INSPECTED_SHARE * len(known))) :]
    inspected = sorted(set(layers))
    missing = [layer for layer in inspected if layer not in known]
    if missing or not inspected:
        raise ValueError(f"layers: expected some of {sorted(known)}, got {inspected}")
    sums = {layer: np.zeros(known[layer].out_channels) for layer in inspected}
    images = 0
    probes = [
        torch.zeros(known[layer].out_channels, dtype=known[layer].weight.dtype, requires_grad=True)
        for layer in inspected
    ]
    try:
        for layer, probe in zip(inspected, probes, strict=True):
            known[layer].probe = probe
        for x, *targets in data:
            with torch.enable_grad():
                loss = loss_fn(model(x), *targets)
            if not torch.isfinite(loss):
                raise NonFiniteError(f"loss_fn: expected a finite loss, got {loss.item()}")
            grads = torch.autograd.grad(loss, probes, allow_unused=True)
            for layer, found in zip(inspected, grads, strict=True):
                if found is not None:
                    sums[layer] += found.double().numpy()
            images += len(x)
    finally:
        for layer in inspected:
            known[layer].probe = None
    if images == 0:
        raise ValueError("data: expected at least one batch, got none")
    return {layer: values / (2 * images) for layer, values in sums.items()}


def _by_layer(
    policy: UpdatePolicy | Mapping[str, LayerUpdate | Iterable[int]], layers: list[Step]
) -> dict[int, LayerUpdate]:
    if isinstance(policy, UpdatePolicy):
        for layer in (*policy.layers, *policy.biases):
            if layer >= len(layers):
                raise ValueError(f"policy: layer {layer}: expected 0 to {len(layers) - 1}")
        return dict(policy.layers)
    names = {step.target: layer for layer, step in enumerate(layers)}
    unknown = [name for name in policy if name not in names]
    if unknown:
        raise ValueError(f"policy: {unknown[0]!r} is no convolution; expected some of {[*names]}")
    by_number = {names[name]: update for name, update in policy.items()}
    return dict(UpdatePolicy(by_number).layers)


def _sparse_layer(
    step: Step, rectifier: Step | None, update: LayerUpdate | None, train_bias: bool
) -> tuple[SparseConv2d, FoldedBatchNorm2d | None]:
    """The layer in place of a convolution, and what takes the place of its batch norm."""
    conv: Any = step.module
    norm = None
    activation = "none"
    if rectifier is not None:
        activation = str(rectifier.options["activation"])
    if step.norm is not None and isinstance(step.norm.module, nn.BatchNorm2d):
        inner = norm_activation(step.norm)
        # A batch norm with another activation in it stays, and so does what is behind it.
        if inner is None or step.norm.module.running_mean is None:
            activation = "none"
        else:
            norm = FoldedBatchNorm2d(step.norm.module)
            activation = inner if inner != "none" else activation
    sparse = SparseConv2d.from_conv(
        conv, update or (), norm=norm, activation=activation, train_bias=train_bias
    )
    return sparse, norm


def _exchange(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), last, module)


class _FoldedActivation(nn.Identity):
    """Stands where an activation was that a SparseConv2d has folded in."""

    def __init__(self, original: nn.Module | None) -> None:
        super().__init__()
        self._original = (original,)

    def restored(self) -> nn.Module:
        (original,) = self._original
        assert original is not None
        return original
