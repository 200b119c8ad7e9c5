"""What steps_guest.py counts of torch."""

from collections.abc import Callable

import torch
from torch import nn

import tinytrain_ext as tt
from tinytrain_ext.bench.jobs import Task
from tinytrain_ext.bench.torch_peer import TorchJob

__all__ = ["TorchFisher", "TorchJob", "torch_iteration"]

torch.set_num_threads(1)


class TorchFisher(TorchJob):
    """The backward pass of the inspected layers, with Fisher sums by hooks."""

    def __init__(
        self, network: tt.Network, layers: tuple[int, ...], task: Task, best: bool
    ) -> None:
        super().__init__(network, set(layers), task, best)
        self.sums: dict[int, torch.Tensor] = {}
        modules = self.model.convs if best else self.model.norms
        for layer in layers:
            modules[layer].register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Callable[..., None]:
        def keep(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            def add(gradient: torch.Tensor) -> None:
                product = (output.detach() * gradient).sum(dim=(2, 3))
                self.sums[layer] = (product**2).sum(dim=0)

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return keep


def torch_iteration(job: TorchJob) -> None:
    """A step, then the prototypes of the support set: one forward pass here."""
    job.step()
    job.forward()
