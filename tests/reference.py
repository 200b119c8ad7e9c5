"""The same network in torch, written for clarity: what the engine is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from tinytrain_ext.network import Network

_ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6}


class TorchNetwork:
    """A Network as torch tensors that require gradients; keeps every convolution's output."""

    def __init__(self, network: Network, dtype: torch.dtype = torch.float64) -> None:
        self.network = network
        self.weights = [torch.tensor(w, dtype=dtype, requires_grad=True) for w in network.weights]
        self.biases = [torch.tensor(b, dtype=dtype, requires_grad=True) for b in network.biases]
        self.outputs: list[torch.Tensor] = []  # of convolutions, before their activation

    def parameters(self) -> list[torch.Tensor]:
        return [*self.weights, *self.biases]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: normalised (N, 3, H, W) -> features (N, m)."""
        tensors = [x]
        self.outputs = []
        for op in self.network.operations:
            inputs = [tensors[i] for i in op.inputs]
            if op.kind == "conv":
                layer = len(self.outputs)
                y = F.conv2d(
                    inputs[0],
                    self.weights[layer],
                    self.biases[layer],
                    stride=op.stride,
                    padding=op.padding,
                    groups=op.groups,
                )
                if y.requires_grad:
                    y.retain_grad()
                self.outputs.append(y)
                y = self.activate(len(tensors), y, op.activation)
            elif op.kind == "add":
                y = self.activate(len(tensors), inputs[0] + inputs[1], op.activation)
            elif op.kind == "max_pool":
                y = F.max_pool2d(inputs[0], op.kernel, op.stride, op.padding)
            elif op.kind == "average_pool":
                y = F.avg_pool2d(
                    inputs[0], op.kernel, op.stride, op.padding, count_include_pad=False
                )
            else:
                y = inputs[0].mean(dim=(2, 3))
            tensors.append(y)
        return tensors[-1]

    def activate(self, number: int, y: torch.Tensor, activation: str) -> torch.Tensor:
        """What tensor `number` becomes behind its sum."""
        return _ACTIVATIONS[activation](y)

    def zero_grad(self) -> None:
        for p in self.parameters():
            p.grad = None


def normalise(images: np.ndarray, network: Network, dtype: torch.dtype) -> torch.Tensor:
    """uint8 (or normalised float32) (N, H, W, 3) -> normalised (N, 3, H, W)."""
    x = torch.tensor(images).to(dtype)
    if images.dtype == np.uint8:
        mean = torch.tensor(network.mean, dtype=torch.float32).to(dtype)
        std = torch.tensor(network.std, dtype=torch.float32).to(dtype)
        x = (x / 255 - mean) / std
    return x.permute(0, 3, 1, 2)


def proto_loss(
    features: torch.Tensor, labels: Sequence[int], prototypes: torch.Tensor, scale: float
) -> torch.Tensor:
    """Each image's ProtoNet cross-entropy (Eq. 1) against detached prototypes."""
    logits = scale * F.normalize(features, dim=1) @ F.normalize(prototypes, dim=1).T
    return F.cross_entropy(logits, torch.as_tensor(labels), reduction="none")


def fisher_sums(model: TorchNetwork, losses: torch.Tensor, layers: Sequence[int]) -> dict:
    """{layer: (O,)}: sum over images of (sum over H, W of a * g)^2, from per-image gradients."""
    losses.sum().backward()
    sums = {}
    for layer in layers:
        a, g = model.outputs[layer], model.outputs[layer].grad
        sums[layer] = (a * g).sum(dim=(2, 3)).square().sum(dim=0).detach().numpy()
    return sums
