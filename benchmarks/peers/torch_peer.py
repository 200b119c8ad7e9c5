"""PyTorch as its users run it (`eager`: frozen BatchNorm) and at its best (`best`: BatchNorm
folded, channels_last)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from tinytrain_ext.bench.torch_peer import TorchNetwork
from tinytrain_ext.network import Network, Operation

from .job import LEARNING_RATE, SCALE, Job, class_prototypes, serve


class Row:
    """A network with some layers trained, and its batch."""

    def __init__(self, job: Job, trained: list[int], best: bool) -> None:
        self.job = job
        operations = tuple(Operation(**operation) for operation in job.operations)
        network = Network("job", operations, tuple(job.weights), tuple(job.biases))
        self.model = TorchNetwork(network, set(trained), batch_norm=not best)
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
        kept: dict[int, torch.Tensor] = {}

        def keep(layer: int, output: torch.Tensor) -> None:
            kept[layer] = output if output.requires_grad else output.requires_grad_()

        normalised = self.model.norms if len(self.model.norms) else self.model.convs
        hooks = [
            normalised[layer].register_forward_hook(
                lambda module, inputs, output, layer=layer: keep(layer, output)
            )
            for layer in self.job.inspected
        ]
        loss = self.loss(self.model(self.x)) * len(self.x)
        for hook in hooks:
            hook.remove()
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
        self.frozen = Row(job, [], self.best)
        calls: dict[str, Callable[[], object]] = {
            "forward": self.frozen.forward,
            "Fisher": self.frozen.fisher,
        }
        for name, layers in job.trained.items():
            calls[f"{name} step"] = Row(job, layers, self.best).step
            calls[f"{name} iteration"] = Row(job, layers, self.best).iteration
        return calls

    def results(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {"features": self.frozen.forward().numpy()}
        for layer, sums in self.frozen.fisher().items():
            arrays[f"Fisher/{layer}"] = sums.numpy()
        for name, layers in self.job.trained.items():
            row = Row(self.job, layers, self.best)
            row.gradients()
            for layer in layers:
                gradient = row.model.convs[layer].weight.grad
                assert isinstance(gradient, torch.Tensor)
                arrays[f"{name} step/{layer}"] = np.ascontiguousarray(gradient.numpy())
        return arrays


if __name__ == "__main__":
    serve(Torch(best=sys.argv[1] == "best"))
