"""PyTorch as its users run it (`eager`: frozen BatchNorm) and at its best (`best`: BatchNorm
folded, channels_last)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from .job import LEARNING_RATE, SCALE, Job, class_prototypes, serve


class TorchNetwork(nn.Module):
    """The network as torch users have it: with BatchNorm in eval mode, or folded."""

    def __init__(self, job: Job, trained: list[int], batch_norm: bool) -> None:
        super().__init__()
        self.operations = job.operations
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        convolutions = [op for op in job.operations if op["kind"] == "conv"]
        for layer, op in enumerate(convolutions):
            conv = nn.Conv2d(
                op["in_channels"],
                op["out_channels"],
                op["kernel"],
                op["stride"],
                op["padding"],
                groups=op["groups"],
                bias=not batch_norm,
            )
            conv.weight.data = torch.tensor(job.weights[layer])
            conv.weight.requires_grad_(layer in trained)
            bias = torch.tensor(job.biases[layer])
            if batch_norm:
                norm = nn.BatchNorm2d(op["out_channels"])
                norm.bias.data = bias
                norm.running_var = torch.full((op["out_channels"],), 1 - norm.eps)
                self.norms.append(norm.requires_grad_(False))
            else:
                assert conv.bias is not None
                conv.bias.data = bias
                conv.bias.requires_grad_(False)
            self.convs.append(conv)
        self.eval()

    def forward(
        self, x: torch.Tensor, inspected: dict[int, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The features; fills `inspected` (layer: output before its activation) if given."""
        tensors, layer = [x], 0
        for op in self.operations:
            y = tensors[op["inputs"][0]]
            if op["kind"] == "conv":
                y = self.convs[layer](y)
                if len(self.norms):
                    y = self.norms[layer](y)
                if inspected is not None and layer in inspected:
                    if not y.requires_grad:
                        y.requires_grad_()
                    inspected[layer] = y
                layer += 1
                if op["activation"] == "relu6":
                    y = F.relu6(y)
            elif op["kind"] == "add":
                y = y + tensors[op["inputs"][1]]
            else:
                y = y.mean(dim=(2, 3))
            tensors.append(y)
        return tensors[-1]


class TorchJob:
    """A network with some layers trained, and its batch."""

    def __init__(self, job: Job, trained: list[int], best: bool) -> None:
        self.job = job
        self.model: Any = TorchNetwork(job, trained, batch_norm=not best)
        x = torch.tensor(job.images).permute(0, 3, 1, 2)
        if best:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.x = x.contiguous(memory_format=torch.channels_last)
        else:
            self.x = x.contiguous()
        self.labels = torch.tensor(job.labels)
        self.prototypes = torch.tensor(job.prototypes)
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

    def iteration(self) -> None:
        """A step, then the prototypes of the batch itself, which serves as a support set."""
        self.step()
        features = self.forward().numpy()
        self.prototypes = torch.from_numpy(class_prototypes(features, self.job.labels))

    def fisher(self) -> dict[int, torch.Tensor]:
        """Sum over images of (sum over H, W of a * g)^2; the loss is summed over the images."""
        kept: dict[int, torch.Tensor] = dict.fromkeys(self.job.inspected, self.x)
        loss = self.loss(self.model(self.x, kept)) * len(self.x)
        gradients = torch.autograd.grad(loss, list(kept.values()))
        with torch.no_grad():
            return {
                layer: (a * g).sum(dim=(2, 3)).square().sum(0)
                for (layer, a), g in zip(kept.items(), gradients, strict=True)
            }


class Torch:
    """Both of torch's columns; which, says the constructor."""

    version = torch.__version__

    def __init__(self, best: bool) -> None:
        self.best = best
        torch.set_num_threads(1)

    def load(self, job: Job) -> dict[str, Callable[[], object]]:
        self.job = job
        self.frozen = TorchJob(job, [], self.best)
        calls: dict[str, Callable[[], object]] = {
            "forward": self.frozen.forward,
            "Fisher": self.frozen.fisher,
        }
        for name, layers in job.trained.items():
            calls[f"{name} step"] = TorchJob(job, layers, self.best).step
            calls[f"{name} iteration"] = TorchJob(job, layers, self.best).iteration
        return calls

    def results(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {"features": self.frozen.forward().numpy()}
        for layer, sums in self.frozen.fisher().items():
            arrays[f"Fisher/{layer}"] = sums.numpy()
        for name, layers in self.job.trained.items():
            row = TorchJob(self.job, layers, self.best)
            row.gradients()
            for layer in layers:
                gradient = row.model.convs[layer].weight.grad
                assert isinstance(gradient, torch.Tensor)
                arrays[f"{name} step/{layer}"] = np.ascontiguousarray(gradient.numpy())
        return arrays


if __name__ == "__main__":
    serve(Torch(best=sys.argv[1] == "best"))
