"""The same jobs in PyTorch, where it is installed, and the check that both compute the same."""

from __future__ import annotations

import statistics
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from ..network import Network
from ..selection import UpdatePolicy
from .jobs import LEARNING_RATE, SCALE, KernelJob, OurJob, Task


class TorchKernelJob:
    """The passes of a KernelJob by torch, channels last."""

    def __init__(self, job: KernelJob) -> None:
        layout = torch.channels_last
        shape = job.shape
        self.weight = torch.tensor(job.weight).contiguous(memory_format=layout)
        # (N, H, W, C) in memory is (N, C, H, W) in this layout.
        self.image = torch.tensor(job.image).permute(0, 3, 1, 2)
        self.grad_output = torch.tensor(job.grad_output).permute(0, 3, 1, 2)
        self.stride, self.padding = shape.stride, shape.padding
        self.groups = shape.out_channels if shape.depthwise else 1

    def forward(self) -> torch.Tensor:
        with torch.no_grad():
            return F.conv2d(
                self.image, self.weight, None, self.stride, self.padding, 1, self.groups
            )

    def grad_input(self) -> torch.Tensor:
        return self._backward(0)

    def grad_weight(self) -> torch.Tensor:
        return self._backward(1)

    def _backward(self, wanted: int) -> torch.Tensor:
        mask = [number == wanted for number in range(3)]
        gradients = torch.ops.aten.convolution_backward(
            self.grad_output,
            self.image,
            self.weight,
            None,
            [self.stride] * 2,
            [self.padding] * 2,
            [1, 1],
            False,
            [0, 0],
            self.groups,
            mask,
        )
        found: torch.Tensor = gradients[wanted]
        return found


class TorchNetwork(nn.Module):
    """The network as torch users have it: with BatchNorm in eval mode, or folded."""

    def __init__(self, network: Network, trained: set[int], batch_norm: bool) -> None:
        super().__init__()
        self.operations = network.operations
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for layer, index in enumerate(network.convolutions):
            op = network.operations[index]
            conv = nn.Conv2d(
                op.in_channels,
                op.out_channels,
                op.kernel,
                op.stride,
                op.padding,
                groups=op.groups,
                bias=not batch_norm,
            )
            conv.weight.data = torch.tensor(network.weights[layer])
            conv.weight.requires_grad_(layer in trained)
            bias = torch.tensor(network.biases[layer])
            if batch_norm:
                norm = nn.BatchNorm2d(op.out_channels)
                norm.bias.data = bias
                norm.running_var = torch.full((op.out_channels,), 1 - norm.eps)
                self.norms.append(norm.requires_grad_(False))
            else:
                assert conv.bias is not None
                conv.bias.data = bias
                conv.bias.requires_grad_(False)
            self.convs.append(conv)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tensors, layer = [x], 0
        for op in self.operations:
            y = tensors[op.inputs[0]]
            if op.kind == "conv":
                y = self.convs[layer](y)
                if len(self.norms):
                    y = self.norms[layer](y)
                layer += 1
                if op.activation == "relu6":
                    y = F.relu6(y)
            elif op.kind == "add":
                y = y + tensors[op.inputs[1]]
            else:
                y = y.mean(dim=(2, 3))
            tensors.append(y)
        return tensors[-1]


class Batch(Protocol):
    """What a TorchJob reads of a Task."""

    @property
    def images(self) -> NDArray[np.uint8]: ...
    @property
    def labels(self) -> NDArray[np.int64]: ...
    @property
    def prototypes(self) -> NDArray[np.float32]: ...


class TorchJob:
    """Forward and step of one torch variant on one batch."""

    def __init__(
        self,
        network: Network,
        trained: set[int],
        task: Batch,
        best: bool,
    ) -> None:
        self.model: Any = TorchNetwork(network, trained, batch_norm=not best)
        x = torch.tensor(task.images).permute(0, 3, 1, 2).float() / 127.5 - 1
        if best:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.x = x.contiguous(memory_format=torch.channels_last)
        else:
            self.x = x.contiguous()
        self.prototypes = torch.tensor(task.prototypes)
        self.labels = torch.tensor(task.labels)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE) if parameters else None

    def forward(self) -> torch.Tensor:
        with torch.no_grad():
            features: torch.Tensor = self.model(self.x)
        return features

    def loss(self, features: torch.Tensor) -> torch.Tensor:
        logits = SCALE * F.normalize(features, dim=1) @ self.prototypes.T
        return F.cross_entropy(logits, self.labels)

    def gradients(self) -> None:
        torch.autograd.backward(self.loss(self.model(self.x)))

    def step(self) -> None:
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        self.gradients()
        self.optimizer.step()


def check(network: Network, policy: UpdatePolicy) -> float:
    """Largest relative difference of features and selected gradients to torch; exits if wrong.

    Image by image: rounding can tip a value on a ReLU6's corner to the other side, which moves
    that image's gradients by per cents; a wrong kernel would move all. So each layer's median over
    nine images is held to 1e-4.
    """
    differences: dict[int, list[float]] = {layer: [] for layer in (-1, *policy.layers)}
    for seed in range(9):
        task = Task(network, 1, seed=100 + seed)
        ours = OurJob(network, policy, task)
        theirs = TorchJob(network, set(policy.layers), task, best=True)
        ours.gradients()
        theirs.gradients()
        pairs: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {
            -1: (ours.forward(), theirs.forward().numpy())
        }
        for layer, gradient in ours.session.gradients().items():
            full = theirs.model.convs[layer].weight.grad
            assert isinstance(full, torch.Tensor)
            pairs[layer] = gradient, full.numpy()[list(policy.layers[layer].channels)]
        for layer, (got, wanted) in pairs.items():
            differences[layer].append(float(np.abs(got - wanted).max() / np.abs(wanted).max()))
    worst = max(statistics.median(values) for values in differences.values())
    if worst > 1e-4:
        raise SystemExit(f"results differ from torch by {worst:.2e}: these timings mean nothing")
    return worst
