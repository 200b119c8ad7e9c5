"""Trainable PyTorch backbones with batch normalisation, and their way into a `Network`.

A backbone interprets the same list of operations a `Network` does, so there is one description of a
network in the package, and "layer" means the same convolution on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ..network import Network, Operation

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Backbone", "embed", "fold_batch_norm", "run"]


def run(
    graph: tuple[Operation, ...], convolve: Callable[[int, Tensor], Tensor], images: Tensor
) -> Tensor:
    """Runs a network's operations on normalised images (N, 3, H, W) and returns (N, m) features.

    convolve: layer number and input -> the convolution's output before its activation.
    """
    tensors = [images]
    layer = 0
    for operation in graph:
        x = tensors[operation.inputs[0]]
        if operation.kind == "conv":
            x = convolve(layer, x)
            layer += 1
        elif operation.kind == "add":
            x = x + tensors[operation.inputs[1]]
        elif operation.kind == "max_pool":
            x = functional.max_pool2d(x, operation.kernel, operation.stride, operation.padding)
        elif operation.kind == "average_pool":
            x = functional.avg_pool2d(x, operation.kernel, operation.stride, operation.padding)
        else:
            x = x.mean(dim=(2, 3), keepdim=True)
        # In place: neither a convolution, a batch norm nor an add needs its output for backward.
        if operation.activation == "relu6":
            x = functional.relu6(x, inplace=True)
        elif operation.activation == "relu":
            x = functional.relu(x, inplace=True)
        tensors.append(x)
    return tensors[-1].flatten(1)


class Backbone(nn.Module):
    """A network's convolutions in layer order, each with its batch normalisation or its bias.

    Takes normalised images (N, 3, H, W) of any size and returns features (N, m).

    batch_norm: without it, every convolution has a bias instead, as in a `Network`.
    """

    def __init__(self, graph: tuple[Operation, ...], batch_norm: bool = True) -> None:
        super().__init__()
        self.operations = graph
        self.batch_norm = batch_norm
        self.convolutions = nn.ModuleList()
        self.norms = nn.ModuleList()
        for operation in self.operations:
            if operation.kind != "conv":
                continue
            convolution = nn.Conv2d(
                operation.in_channels,
                operation.out_channels,
                operation.kernel,
                operation.stride,
                operation.padding,
                groups=operation.groups,
                bias=not batch_norm,
            )
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
            self.convolutions.append(convolution)
            norm = nn.BatchNorm2d(operation.out_channels) if batch_norm else nn.Identity()
            self.norms.append(norm)

    @classmethod
    def from_network(cls, network: Network) -> Self:
        """A network, whose batch norms are folded, as a backbone without them."""
        backbone = cls(network.operations, batch_norm=False)
        with torch.no_grad():
            layers: Iterable[Any] = backbone.convolutions
            for convolution, weight, bias in zip(
                layers, network.weights, network.biases, strict=True
            ):
                convolution.weight.copy_(torch.tensor(weight))
                convolution.bias.copy_(torch.tensor(bias))
        return backbone

    def to_network(
        self, name: str, *, input_size: int = 128, resize: int = 146, logit_scale: float = 10.0
    ) -> Network:
        """The backbone as the device runs it: batch norm folded, images in [-1, 1]."""
        weights, biases = fold_batch_norm(self)
        return Network(
            name=name,
            operations=self.operations,
            weights=weights,
            biases=biases,
            input_size=input_size,
            resize=resize,
            logit_scale=logit_scale,
        )

    @property
    def feature_dim(self) -> int:
        """m, the length of the feature vector."""
        last = [operation for operation in self.operations if operation.kind == "conv"][-1]
        return last.out_channels

    def forward(self, images: Tensor) -> Tensor:
        return run(self.operations, self._convolve, images)

    def _convolve(self, layer: int, x: Tensor) -> Tensor:
        output: Tensor = self.norms[layer](self.convolutions[layer](x))
        return output


def fold_batch_norm(
    backbone: Backbone,
) -> tuple[tuple[NDArray[np.float32], ...], tuple[NDArray[np.float32], ...]]:
    """Folds each batch norm's running statistics and affine part into its convolution.

    Returns per layer (stem = 0) the weights (O, C / groups, K, K) and biases (O,), float32, as they
    are where there is no batch norm. The folding itself is done in float64, so the only rounding is
    the last one.
    """
    weights, biases = [], []
    # nn.ModuleList forgets what its modules are.
    layers: Iterable[Any] = zip(backbone.convolutions, backbone.norms, strict=True)
    for convolution, norm in layers:
        weight = _float64(convolution.weight)
        if backbone.batch_norm:
            scale = _float64(norm.weight) / np.sqrt(_float64(norm.running_var) + norm.eps)
            weight = weight * scale[:, None, None, None]
            bias = _float64(norm.bias) - _float64(norm.running_mean) * scale
        else:
            bias = _float64(convolution.bias)
        weights.append(weight.astype(np.float32, order="C"))
        biases.append(bias.astype(np.float32))
    return tuple(weights), tuple(biases)


def _float64(tensor: Tensor) -> NDArray[np.float64]:
    values: NDArray[np.float64] = tensor.detach().to("cpu", torch.float64).numpy()
    return values


def embed(
    network: Network,
    images: NDArray[np.uint8],
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> NDArray[np.floating]:
    """Features (N, m) of uint8 images (N, H, W, 3), computed by PyTorch.

    The check of what the native core computes, and usable where the core is not built.
    """
    layers = [
        (torch.tensor(weight, dtype=dtype), torch.tensor(bias, dtype=dtype))
        for weight, bias in zip(network.weights, network.biases, strict=True)
    ]
    mean = torch.tensor(network.mean, dtype=dtype)
    std = torch.tensor(network.std, dtype=dtype)
    convolutions = [network.operations[index] for index in network.convolutions]

    def convolve(layer: int, x: Tensor) -> Tensor:
        operation = convolutions[layer]
        return functional.conv2d(
            x, *layers[layer], operation.stride, operation.padding, groups=operation.groups
        )

    features = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            pixels = torch.from_numpy(np.array(images[start : start + batch_size])).to(dtype)
            x = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
            features.append(run(network.operations, convolve, x).numpy())
    return np.concatenate(features)
