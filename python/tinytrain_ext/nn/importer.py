"""A PyTorch model as a Network: anyone's CNN on the device.

What a Network expresses: square convolutions (dense, pointwise, depthwise) with the batch norm and
the ReLU or ReLU6 behind them folded in, residual adds, max and average pools, a global average
pool, and one linear head. Everything else is refused by the name of the call.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import cost
from ..network import Classifier, Network, Operation, tensor_shapes
from .convert import is_converted, revert
from .graph import Step, norm_activation, read, refuse

__all__ = ["import_torch", "profile"]

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3  # of the largest output; the two sum in different orders
_RESIZE = 146 / 128  # of the photo's short side, as in the paper's networks


def import_torch(
    model: nn.Module,
    example: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    size: int | None = None,
    resize: int | None = None,
    classes: Sequence[str] = (),
    name: str | None = None,
) -> Network:
    """See `Network.from_torch`, which also says what it did with a linear head."""
    check_example(example, size)
    if is_converted(model):
        model = revert(model)
    model = copy.deepcopy(model).cpu().float().eval()
    size = int(example.shape[2])
    steps, result = read(model)
    builder = _Builder(steps, result, size)
    builder.build()
    classifier = builder.classifier(tuple(classes))
    if classes and classifier is None:
        raise ValueError("classes: the model has no linear head whose outputs they could name")
    network = Network(
        name=name or type(model).__name__,
        operations=tuple(mark_blocks(builder.operations)),
        weights=tuple(weight for weight, _ in builder.layers),
        biases=tuple(bias for _, bias in builder.layers),
        input_size=size,
        resize=max(size, round(size * _RESIZE)) if resize is None else resize,
        mean=_three("mean", mean),
        std=_three("std", std),
        classifier=classifier,
    )
    _check_same(network, model, example.detach().float())
    return network


def profile(model: nn.Module, example: Tensor) -> cost.Profile:
    """The costs of a model's layers and of policies on it, as `tinytrain_ext.profile` gives them.

    example: images (N, 3, size, size). `select` takes the result together with
    `fisher_information`'s. Raises ValueError, naming the call, for a model that is no Network.
    """
    network = import_torch(model, example, mean=(0, 0, 0), std=(1, 1, 1))
    return cost.profile(network)


def check_example(example: Tensor, size: int | None) -> None:
    """Refuses an example that is no batch of square normalised images."""
    shape = tuple(example.shape)
    if len(shape) != 4 or shape[0] < 1 or shape[1] != 3 or shape[2] != shape[3]:
        raise ValueError(f"example: expected shape (N, 3, size, size), got {shape}")
    if not example.is_floating_point():
        raise TypeError(f"example: expected normalised floats, got {example.dtype}")
    if size is not None and size != shape[2]:
        raise ValueError(f"example: expected shape (N, 3, {size}, {size}) of size, got {shape}")


class _Builder:
    """Turns steps into operations. `number` gives the network's tensor of each step's tensor."""

    def __init__(self, steps: list[Step], result: int, size: int) -> None:
        self.steps, self.result, self.size = steps, result, size
        self.operations: list[Operation] = []
        self.layers: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
        self.number: dict[int, int] = {0: 0}
        self.halves: dict[int, tuple[int, int]] = {}  # averaged over one dimension
        self.pooled: set[int] = set()  # step tensors behind the global average pool
        self.head: Step | None = None
        self.head_tensor: int | None = None

    def build(self) -> None:
        needed = {self.result}
        for index in reversed(range(len(self.steps))):
            if index + 1 in needed:
                needed.update(self.steps[index].inputs)
        folded = {
            id(other)
            for step in self.steps
            for other in (step.norm, step.activation)
            if other is not None
        }
        for index, step in enumerate(self.steps):
            tensor = index + 1
            if tensor not in needed:
                continue
            if id(step) in folded:
                self.number[tensor] = self.number[step.inputs[0]]
                continue
            self._check_inplace(index, step)
            self._step(tensor, step)
        if self.result in self.number and self.result not in self.pooled:
            logger.warning("model: gives a map; a global average pool makes features of it")
            self._append(self.result, Operation("global_average_pool", (self.number[self.result],)))
        elif self.result != self.head_tensor and self.result not in self.pooled:
            raise ValueError("model: expected features or a linear head's outputs as its result")

    def _append(self, tensor: int, operation: Operation) -> None:
        self.operations.append(operation)
        self.number[tensor] = len(self.operations)

    def _shape(self, number: int) -> tuple[int, int, int]:
        """(H, W, C) of the network's tensor."""
        end = Operation("global_average_pool", (len(self.operations),))
        return tensor_shapes((*self.operations, end), self.size)[number]

    def _check_inplace(self, index: int, step: Step) -> None:
        """In place is as good as not, unless somebody reads the overwritten tensor later."""
        if step.inplace and any(step.inputs[0] in s.inputs for s in self.steps[index + 1 :]):
            raise refuse(step, "writes in place to a tensor that is read again later")

    def _step(self, tensor: int, step: Step) -> None:
        special = step.kind in ("flatten", "linear")
        if special or any(t in self.pooled for t in step.inputs):
            self._behind_pool(tensor, step)
            return
        if step.kind == "half_average":
            self._half_average(tensor, step)
            return
        inputs = []
        for source in step.inputs:
            if source in self.halves:
                raise refuse(step, "reads an average over one dimension only")
            if source not in self.number:
                raise refuse(step, "reads what is behind the linear head")
            inputs.append(self.number[source])
        activation = self._activation(step)
        match step.kind:
            case "conv":
                self._conv(tensor, step, inputs[0], activation)
            case "add":
                operation = Operation("add", (inputs[0], inputs[1]), activation)
                self._append(tensor, operation)
            case "max_pool" | "average_pool":
                self._pool(tensor, step, inputs[0])
            case "global_average_pool":
                self._append(tensor, Operation("global_average_pool", (inputs[0],)))
                self.pooled.add(tensor)
            case "norm":
                raise refuse(step, "a batch norm that is not alone behind a convolution of its own")
            case "activation":
                raise refuse(step, "an activation that is not alone behind a convolution or an add")
            case _:
                self._unknown(step)

    def _unknown(self, step: Step) -> NoReturn:
        what = step.options.get("name") or type(step.module).__name__
        raise refuse(
            step,
            f"{what} is not expressible: expected convolutions, batch norms behind them, ReLU, "
            "ReLU6, adds of two tensors, max, average and global average pools, one linear head",
        )

    def _activation(self, step: Step) -> str:
        if step.norm is not None:
            inner = norm_activation(step.norm)
            if inner is None:
                act = type(getattr(step.norm.module, "act", None)).__name__
                raise refuse(step.norm, f"activation: expected ReLU or ReLU6, got {act}")
            if inner != "none":
                return inner
        return "none" if step.activation is None else str(step.activation.options["activation"])

    def _conv(self, tensor: int, step: Step, source: int, activation: str) -> None:
        conv: Any = step.module
        check_conv(step)
        operation = Operation(
            "conv",
            (source,),
            activation,
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[0],
            conv.stride[0],
            conv.padding[0],
            conv.groups,
        )
        weight = conv.weight.detach().double().numpy()
        bias = np.zeros(len(weight)) if conv.bias is None else conv.bias.detach().double().numpy()
        if step.norm is not None:
            weight, bias = _fold(step.norm, weight, bias)
        self.layers.append(
            (weight.astype(np.float32, order="C"), bias.astype(np.float32, order="C"))
        )
        self._append(tensor, operation)

    def _pool(self, tensor: int, step: Step, source: int) -> None:
        options = {key: _one(step, key, value) for key, value in step.options.items()}
        if options.get("dilation", 1) != 1:
            raise refuse(step, f"dilation: expected 1, got {options['dilation']}")
        if options.get("ceil_mode"):
            raise refuse(step, "ceil_mode: expected False, got True")
        if options.get("divisor_override") is not None:
            raise refuse(step, "divisor_override: expected None")
        padded = options["padding"] > 0 and step.kind == "average_pool"
        if padded and options["count_include_pad"]:
            raise refuse(step, "count_include_pad: expected False where there is padding, got True")
        height, width, _ = self._shape(source)
        kernel = options["kernel_size"]
        if step.kind == "average_pool" and (height, width, options["padding"]) == (
            kernel,
            kernel,
            0,
        ):
            self._append(tensor, Operation("global_average_pool", (source,)))
            self.pooled.add(tensor)
            return
        operation = Operation(
            step.kind,
            (source,),
            kernel=kernel,
            stride=options["stride"],
            padding=options["padding"],
        )
        self._append(tensor, operation)

    def _half_average(self, tensor: int, step: Step) -> None:
        """x.mean(3).mean(2) and the like: a global average pool in two calls."""
        (source,) = step.inputs
        dim = step.options["dim"]
        if source in self.number:
            self.halves[tensor] = (source, dim % 4)
            return
        if source not in self.halves:
            raise refuse(step, "an average over one dimension that is no global average pool")
        origin, first = self.halves[source]
        # Once the width is gone, the height is the last dimension.
        if (first, dim) not in {(3, 2), (3, -1), (2, 2), (2, -1)}:
            raise refuse(step, "an average over one dimension that is no global average pool")
        self._append(tensor, Operation("global_average_pool", (self.number[origin],)))
        self.pooled.add(tensor)

    def _behind_pool(self, tensor: int, step: Step) -> None:
        if step.inputs[0] == self.head_tensor:
            if step.kind != "flatten":
                raise refuse(step, "stands behind the linear head: expected it to be the last")
            self.head_tensor = tensor  # of a head that is a 1 x 1 convolution
            return
        if step.inputs[0] not in self.pooled or len(step.inputs) != 1:
            if step.inputs[0] in self.number and len(step.inputs) == 1:
                h, w, _ = self._shape(self.number[step.inputs[0]])
                raise refuse(
                    step, f"reads a map of {h} x {w} pixels: expected a global average pool before"
                )
            self._unknown(step)
        if step.kind in ("flatten", "global_average_pool"):
            self.pooled.add(tensor)
            self.number[tensor] = self.number[step.inputs[0]]
            return
        pointwise = step.kind == "conv" and step.norm is None and step.activation is None
        if step.kind != "linear" and not pointwise:
            raise refuse(step, "stands behind the global average pool: expected one linear head")
        if pointwise and getattr(step.module, "kernel_size", None) != (1, 1):
            raise refuse(step, "stands behind the global average pool: expected a 1 x 1 kernel")
        if self.head is not None:
            raise refuse(step, "a second linear head")
        self.head, self.head_tensor = step, tensor

    def classifier(self, classes: tuple[str, ...]) -> Classifier | None:
        """The linear head, if there is one."""
        if self.head is None:
            return None
        head: Any = self.head.module
        weight = head.weight.detach().float().flatten(1).numpy()
        bias = np.zeros(len(weight), np.float32)
        if head.bias is not None:
            bias = head.bias.detach().float().numpy()
        if classes and len(classes) != len(bias):
            raise ValueError(f"classes: expected {len(bias)} names, got {len(classes)}")
        return Classifier(np.ascontiguousarray(weight), np.ascontiguousarray(bias), classes)


def check_conv(step: Step) -> None:
    """Refuses a convolution that a Network cannot express, with the reason."""
    conv: Any = step.module
    if type(conv).forward is not nn.Conv2d.forward:
        raise refuse(step, f"{type(conv).__name__} does more than torch.nn.Conv2d")
    for name in ("kernel_size", "stride", "dilation", "padding"):
        value = getattr(conv, name)
        if isinstance(value, str) or len(set(value)) != 1:
            raise refuse(step, f"{name}: expected one whole number, got {value}")
    if conv.dilation[0] != 1:
        raise refuse(step, f"dilation: expected 1, got {conv.dilation[0]}")
    if conv.padding_mode != "zeros":
        raise refuse(step, f"padding_mode: expected 'zeros', got {conv.padding_mode!r}")
    if conv.groups != 1 and not conv.groups == conv.in_channels == conv.out_channels:
        raise refuse(
            step,
            f"groups: expected 1 or in_channels == out_channels (depthwise), got {conv.groups} "
            f"for {conv.in_channels} -> {conv.out_channels} channels",
        )


def _fold(
    step: Step, weight: NDArray[np.float64], bias: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A batch norm's running statistics and affine part in the convolution before it."""
    norm: Any = step.module
    if norm.running_mean is None:
        raise refuse(step, "a batch norm without running statistics")
    scale = 1 / np.sqrt(norm.running_var.double().numpy() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double().numpy()
    bias = (bias - norm.running_mean.double().numpy()) * scale
    if norm.bias is not None:
        bias = bias + norm.bias.detach().double().numpy()
    return weight * scale[:, None, None, None], bias


def mark_blocks(operations: list[Operation]) -> list[Operation]:
    """Numbers the inverted residuals: expansion (if any), depthwise, linear pointwise, add."""
    readers: dict[int, int] = {}
    for operation in operations:
        for tensor in operation.inputs:
            readers[tensor] = readers.get(tensor, 0) + 1
    marked, block = list(operations), 0
    for index, operation in enumerate(operations):
        follower = operations[index + 1] if index + 1 < len(operations) else None
        if (
            not (operation.depthwise and operation.kernel > 1)
            or follower is None
            or not _is_pointwise(follower, "none")
            or follower.inputs != (index + 1,)
            or readers[index + 1] != 1
        ):
            continue
        members = [index, index + 1]
        before = operations[index - 1]
        expands = operation.inputs == (index,) and readers[index] == 1
        if index > 0 and expands and _is_pointwise(before, operation.activation):
            members.insert(0, index - 1)
        add = operations[index + 2] if index + 2 < len(operations) else None
        if add is not None and add.kind == "add" and index + 2 in add.inputs:
            members.append(index + 2)
        for member in members:
            marked[member] = dataclasses.replace(operations[member], block=block)
        block += 1
    return marked


def _is_pointwise(operation: Operation, activation: str) -> bool:
    sizes = (operation.kernel, operation.stride, operation.groups)
    return operation.kind == "conv" and sizes == (1, 1, 1) and operation.activation == activation


def _check_same(network: Network, model: nn.Module, example: Tensor) -> None:
    """Runs both on the example: what has been read wrongly must not leave here."""
    with torch.no_grad():
        wanted: Tensor = model(example)
    if wanted.ndim == 4:
        wanted = wanted.mean(dim=(2, 3))
    found = network.embed(np.ascontiguousarray(example.permute(0, 2, 3, 1).numpy()))
    if network.classifier is not None:
        found = network.classifier.logits(found)
    reference = wanted.numpy()
    if found.shape != reference.shape:
        raise ValueError(f"model: gives shape {reference.shape}, the import {found.shape}")
    error = np.abs(found - reference).max()
    if not error <= _TOLERANCE * max(float(np.abs(reference).max()), 1e-6):
        raise ValueError(
            f"model: the import computes something else: differs by {error:.3g} on the example"
        )


def _one(step: Step, name: str, value: Any) -> Any:
    if isinstance(value, tuple | list):
        if len(set(value)) != 1:
            raise refuse(step, f"{name}: expected one whole number, got {tuple(value)}")
        return value[0]
    return value


def _three(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3:
        raise ValueError(f"{name}: expected 3 numbers, got {len(numbers)}")
    return (numbers[0], numbers[1], numbers[2])
