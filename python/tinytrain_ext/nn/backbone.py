"""A Network in PyTorch: as a plain module, and as one autograd Function on the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..network import Network, Operation
from ..selection import LayerUpdate, UpdatePolicy
from ..session import Plan, Session
from .functional import check_autocast
from .layers import Seen

__all__ = ["SparseBackbone", "TorchNetwork"]


class TorchNetwork(nn.Module):
    """A Network in PyTorch's own layers, one module an operation: what `Network.to_torch` returns.

    Takes normalised images (N, 3, H, W); returns features (N, m), or the classifier's outputs
    (N, K) where the network has one.

    beside: {operation: (tensor, function)}, empty at first: functions of earlier tensors (0 is the
    images, k + 1 what operation k makes) that are added to what an operation makes.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.operations = network.operations
        self.beside: Mapping[int, tuple[int, Callable[[Tensor], Tensor]]] = {}
        self.steps = nn.ModuleList()
        layers = zip(network.weights, network.biases, strict=True)
        for operation in network.operations:
            self.steps.append(_step(operation, layers))
        self.classifier: nn.Linear | None = None
        if network.classifier is not None:
            outputs, features = network.classifier.weight.shape
            self.classifier = nn.Linear(features, outputs)
            self.classifier.weight = nn.Parameter(torch.tensor(network.classifier.weight))
            self.classifier.bias = nn.Parameter(torch.tensor(network.classifier.bias))

    def forward(self, images: Tensor) -> Tensor:
        tensors = [images]
        for index, (operation, step) in enumerate(zip(self.operations, self.steps, strict=True)):
            x = tensors[operation.inputs[0]]
            if operation.kind == "add":
                x = x + tensors[operation.inputs[1]]
            x = step(x)
            if index in self.beside:
                source, function = self.beside[index]
                x = x + function(tensors[source])
            tensors.append(x)
        features = torch.flatten(tensors[-1], 1)
        if self.classifier is not None:
            features = self.classifier(features)
        return features


_ACTIVATIONS: dict[str, type[nn.Module]] = {"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6}


def _step(operation: Operation, layers: Any) -> nn.Module:
    o = operation
    match o.kind:
        case "conv":
            weight, bias = next(layers)
            conv = nn.Conv2d(
                o.in_channels, o.out_channels, o.kernel, o.stride, o.padding, groups=o.groups
            )
            conv.weight = nn.Parameter(torch.tensor(weight))
            conv.bias = nn.Parameter(torch.tensor(bias))
            return nn.Sequential(conv, _ACTIVATIONS[o.activation]())
        case "add":
            return _ACTIVATIONS[o.activation]()
        case "max_pool":
            return nn.MaxPool2d(o.kernel, o.stride, o.padding)
        case "average_pool":
            return nn.AvgPool2d(o.kernel, o.stride, o.padding, count_include_pad=False)
    return nn.AdaptiveAvgPool2d(1)


class SparseBackbone(nn.Module):
    """A Network on the engine, in one autograd Function: frozen prefix, trainable tail, features.

    For a training loop in PyTorch at the engine's speed: any loss of the features, any optimiser.
    The one Parameter, `selected` (P,), holds all weights and biases that the policy selects, layer
    by layer (`rows` and `bias` show them); gradients and optimiser state have its size. A forward
    pass saves `plan.saved_bytes` an image; other memory is as of one image.

    `proto_loss` has the ProtoNet loss inside, and saves nothing of the activations.

    max_ways, threads: as of Session. dtype: torch.float32, or torch.float64 to compare to rounding
    error.
    """

    def __init__(
        self,
        network: Network,
        policy: UpdatePolicy,
        *,
        max_ways: int = 50,
        threads: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        policy.check(network)
        if not policy.layers and not policy.biases:
            raise ValueError("policy: expected at least one layer to train")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
        self.policy = policy
        self._dtype = dtype
        self._open = partial(
            Session,
            network,
            policy,
            optimizer="sgd",  # not used, and needs no state
            max_ways=max_ways,
            threads=threads,
            dtype="float32" if dtype == torch.float32 else "float64",
        )
        self._session = self._open()
        self._size = network.input_size
        parts = [
            _rows(self._session.layer(layer)[0], update) for layer, update in policy.layers.items()
        ]
        parts += [self._session.layer(layer)[1] for layer in policy.biases]
        self._shapes = [part.shape for part in parts]
        selected = np.concatenate([part.ravel() for part in parts])
        self.selected = nn.Parameter(torch.from_numpy(selected))
        self._seen: Seen | None = None  # `selected` as the engine has it

    def __getstate__(self) -> dict[str, Any]:
        """All but the engine and its prototypes: a copy opens an engine of its own."""
        return {**self.__dict__, "_session": None, "_seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._session = self._open()

    def rows(self, layer: int) -> Tensor:
        """The trained weights of a layer of the policy, (S, C / groups, K, K), or (O, S, K, K) for
        axis "in": a view into `selected`."""
        return self._part([*self.policy.layers].index(layer))

    def bias(self, layer: int) -> Tensor:
        """The trained bias of a layer, (O,): a view into `selected`."""
        return self._part(len(self.policy.layers) + self.policy.biases.index(layer))

    def _part(self, index: int) -> Tensor:
        start = sum(math.prod(shape) for shape in self._shapes[:index])
        part = self.selected.detach()[start : start + math.prod(self._shapes[index])]
        return part.view(self._shapes[index])

    @property
    def plan(self) -> Plan:
        """The engine's memory plan."""
        return self._session.plan

    def network(self) -> Network:
        """The network with the weights as trained so far."""
        self._update_session()
        return self._session.network()

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, S, S, 3) uint8, or (N, 3, S, S) float32 already normalised, best in
        torch.channels_last -> features (N, m). Raises TypeError and ValueError for others."""
        features: Tensor = _Backbone.apply(self._checked(images), self.selected, self)  # type: ignore[no-untyped-call]
        return features

    def set_prototypes(self, images: Tensor, labels: Tensor, ways: int) -> None:
        """Class prototypes for `proto_loss`: means of the features, under the present weights, of
        support images (as in `forward`) with labels (N,) in [0, ways), every class at least once.
        They are constants to the gradient."""
        self._update_session()
        self._session.set_prototypes(self._checked(images).numpy(), labels.numpy(), ways)

    def proto_loss(self, images: Tensor, labels: Tensor, scale: float = 10.0) -> Tensor:
        """Mean ProtoNet cross-entropy (Eq. 1) of images with labels (N,) against the prototypes.

        Each image passes once, forward and backward, when the loss is computed: what waits for
        `loss.backward()` is the gradient of `selected` alone, whatever the number of images.
        Raises NonFiniteError if the loss is not finite, ValueError before `set_prototypes`.
        """
        checked = self._checked(images)
        loss: Tensor = _ProtoLoss.apply(checked, labels, scale, self.selected, self)  # type: ignore[no-untyped-call]
        return loss

    def _checked(self, images: Tensor) -> Tensor:
        """The images as the engine reads them, (N, S, S, 3)."""
        check_autocast()
        size = self._size
        if images.device.type != "cpu":
            raise TypeError(f"images: expected a tensor on the CPU, got one on {images.device}")
        if images.requires_grad:
            raise ValueError("images: no gradient reaches them; detach() them")
        if images.dtype == torch.uint8:
            expected: tuple[int, ...] = (size, size, 3)
        elif images.dtype == torch.float32:
            expected = (3, size, size)
        else:
            raise TypeError(f"images: expected torch.uint8 or torch.float32, got {images.dtype}")
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images: expected shape (N, *{expected}), got {tuple(images.shape)}")
        if images.dtype == torch.float32:
            images = images.permute(0, 2, 3, 1)
        return images.contiguous()

    def _update_session(self) -> None:
        """Gives the engine the weights, if they have changed since."""
        if self.selected.dtype != self._dtype:
            raise TypeError(
                f"selected: expected {self._dtype}, got {self.selected.dtype}; "
                "dtype= chooses the type"
            )
        if self._seen is None or not self._seen.same([self.selected]):
            self._session.set_selected(self.selected.detach().numpy())
            self._seen = Seen([self.selected])


def _rows(weight: NDArray[Any], update: LayerUpdate) -> NDArray[Any]:
    return weight.take(update.channels, axis=0 if update.axis == "out" else 1)


class _Backbone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, selected: Tensor, module: SparseBackbone) -> Tensor:
        module._update_session()
        session = module._session
        if not ctx.needs_input_grad[1]:
            return torch.from_numpy(session.embed(images.numpy()))
        features, saved = session.forward(images.numpy())
        # The engine reads the images again only where nothing is frozen before the first update.
        again = images if session.plan.first_tail_operation == 0 else None
        # `selected` is saved for autograd's check that nobody changed it meanwhile.
        ctx.save_for_backward(torch.from_numpy(saved), again, selected)
        ctx.module = module
        return torch.from_numpy(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        saved, again, _ = ctx.saved_tensors
        session = ctx.module._session
        session.zero_grad()
        session.backward_saved(
            saved.numpy(), grad.contiguous().numpy(), None if again is None else again.numpy()
        )
        return None, torch.from_numpy(session.flat_gradient()), None


class _ProtoLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        labels: Tensor,
        scale: float,
        selected: Tensor,
        module: SparseBackbone,
    ) -> Tensor:
        module._update_session()
        session = module._session
        session.zero_grad()
        loss, _ = session.proto_backward(images.numpy(), labels.numpy(), scale=scale)
        if ctx.needs_input_grad[3]:
            ctx.save_for_backward(torch.from_numpy(session.flat_gradient()))
        return selected.new_tensor(loss / len(images))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, None, None, gradient * grad, None
