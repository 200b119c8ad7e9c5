"""PyTorch as its users run it (`eager`: frozen BatchNorm) and at its best (`best`: BatchNorm
folded, channels_last)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tinytrain_ext.bench.torch_peer import TorchJob
from tinytrain_ext.network import Network, Operation

from .job import Job, class_prototypes, serve


class Row(TorchJob):
    """A network with some layers trained, and its batch."""

    def __init__(self, job: Job, trained: list[int], best: bool) -> None:
        operations = tuple(Operation(**operation) for operation in job.operations)
        network = Network("job", operations, tuple(job.weights), tuple(job.biases))
        super().__init__(network, set(trained), job, best)
        self.job = job

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
