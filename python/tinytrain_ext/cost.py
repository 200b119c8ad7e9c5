"""What an update policy costs, in the paper's accounting (Appendix A.4, Tables 2, 3 and 7).

    F2      = max over convolutions of 4 * (numel(in) + numel(out) / groups)
    B3      = 1 bit for each output element of a rectified operation or residual sum, from the
              last layer back to the earliest updated one
    B4      = 4 * numel(in) of the updated convolutions
    B1 + B2 = 4 * (weight + gradient + optimiser state) of the updated weights: 16 bytes with Adam
    memory  = max(F2, B3 + B4) + B1 + B2
    dX MACs = forward MACs of every convolution behind the earliest updated one
    dW MACs = share of channels updated * forward MACs, over the updated convolutions

All for one image in fp32. A depthwise convolution is charged one output channel in F2, because it
can run in place, channel by channel. The paper leaves out biases, and so do these formulas. What
this package's engine really needs is another matter: `Session.plan` names every byte of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .network import Network, Operation

if TYPE_CHECKING:
    from .selection import UpdatePolicy

__all__ = ["LayerCost", "Profile", "inspected_layers", "profile", "words_per_weight"]

INSPECTED_BLOCKS = 6
INSPECTED_SHARE = 0.4


@dataclass(frozen=True)
class LayerCost:
    """One convolution: its place in the network, and its numbers for one image.

    weights: parameters without the bias; macs: multiply-accumulates of the forward pass;
    in_elements, out_elements: of its input and output tensors.
    """

    layer: int
    operation: int
    kind: str
    block: int | None
    activation: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    groups: int
    weights: int
    macs: int
    in_elements: int
    out_elements: int

    @property
    def saved_bytes(self) -> int:
        """fp32 bytes of its input, which training it keeps (B4)."""
        return 4 * self.in_elements

    def channels(self, axis: str) -> int:
        """Channels along `axis`, "out" or "in"."""
        return self.out_channels if axis == "out" else self.in_channels


@dataclass(frozen=True, eq=False)
class Profile:
    """The costs of a network and of policies on it; one row of `layers` per convolution."""

    network: Network
    layers: tuple[LayerCost, ...]

    @property
    def weights(self) -> int:
        """Convolution weights, without biases (Table 3)."""
        return sum(row.weights for row in self.layers)

    @property
    def forward_macs(self) -> int:
        """MACs of one image's forward pass (Table 3)."""
        return sum(row.macs for row in self.layers)

    @property
    def full_train_macs(self) -> int:
        """Backward MACs of FullTrain as the paper counts them: twice the forward pass."""
        return 2 * self.forward_macs

    @property
    def forward_bytes(self) -> int:
        """F2: the input and output of the largest layer (Appendix F.1)."""
        return max(4 * (row.in_elements + row.out_elements // row.groups) for row in self.layers)

    def mask_bytes(self, policy: UpdatePolicy) -> float:
        """B3: one bit an element, for rectified outputs and residual sums the gradient crosses."""
        return self._mask_bytes(self._reached(_trained_layers(policy)))

    def saved_bytes(self, policy: UpdatePolicy) -> int:
        """B4: inputs of the convolutions whose weights are updated."""
        return sum(self.layers[layer].saved_bytes for layer in policy.layers)

    def updated_weights(self, policy: UpdatePolicy) -> int:
        """Weights `policy` trains, without biases."""
        return sum(
            row.weights * count // total for row, count, total in self._channel_shares(policy)
        )

    def memory_bytes(self, policy: UpdatePolicy, optimizer: str = "adam") -> int:
        """Memory of a backward pass: max(F2, B3 + B4) + B1 + B2, rounded up to bytes."""
        activations = max(self.forward_bytes, self.mask_bytes(policy) + self.saved_bytes(policy))
        state = 4 * words_per_weight(optimizer) * self.updated_weights(policy)
        return math.ceil(activations) + state

    def grad_input_macs(self, policy: UpdatePolicy) -> int:
        """dX: forward MACs of every convolution the gradient passes on its way to the updates."""
        reached = self._reached(_trained_layers(policy))
        operations = self.network.operations
        return sum(
            row.macs
            for row in self.layers
            if any(tensor - 1 in reached for tensor in operations[row.operation].inputs)
        )

    def grad_weight_macs(self, policy: UpdatePolicy) -> int:
        """dW: of the updated channels only."""
        return sum(row.macs * count // total for row, count, total in self._channel_shares(policy))

    def backward_macs(self, policy: UpdatePolicy) -> int:
        """dX + dW. (For FullTrain the paper adds the stem's needless dX: `full_train_macs`.)"""
        return self.grad_input_macs(policy) + self.grad_weight_macs(policy)

    def compute_share(self, policy: UpdatePolicy) -> float:
        """Backward MACs as a share of FullTrain's: what `Budget.compute` limits."""
        return self.backward_macs(policy) / self.full_train_macs

    def activation_bytes(self, blocks: int) -> float:
        """B3 + B4 when every layer of the last `blocks` blocks is updated, with the unmarked
        convolutions behind them (Table 7)."""
        layers = inspected_layers(self.network, blocks)
        saved = sum(self.layers[layer].saved_bytes for layer in layers)
        return saved + self._mask_bytes(self._reached(layers))

    def full_train_bytes(self, images: int) -> int:
        """FullTrain as Table 2 counts it: the input of every convolution, batch normalisation and
        ReLU6 of `images` images in fp32, and B1 + B2."""
        elements = sum(
            row.in_elements + row.out_elements * (1 if row.activation == "none" else 2)
            for row in self.layers
        )
        return 4 * elements * images + 16 * self.weights

    def _channel_shares(self, policy: UpdatePolicy) -> Iterable[tuple[LayerCost, int, int]]:
        for layer, update in policy.layers.items():
            row = self.layers[layer]
            yield row, len(update.channels), row.channels(update.axis)

    def _reached(self, layers: Iterable[int]) -> set[int]:
        """Operations whose output depends on the parameters of `layers`."""
        reached = {self.layers[layer].operation for layer in layers}
        for index, operation in enumerate(self.network.operations):
            if any(tensor - 1 in reached for tensor in operation.inputs):
                reached.add(index)
        return reached

    def _mask_bytes(self, reached: set[int]) -> float:
        network = self.network
        return sum(
            math.prod(network.tensor_shapes[index + 1]) / 8
            for index in reached
            if network.operations[index].kind == "add"
            or network.operations[index].activation != "none"
        )


def profile(network: Network) -> Profile:
    """The cost of each convolution of `network`, for one image of its input size."""
    rows = []
    for layer, index in enumerate(network.convolutions):
        operation = network.operations[index]
        shape = operation.weight_shape
        out_height, out_width, _ = network.tensor_shapes[index + 1]
        weights = math.prod(shape)
        rows.append(
            LayerCost(
                layer=layer,
                operation=index,
                kind=_kind(operation),
                block=operation.block,
                activation=operation.activation,
                in_channels=operation.in_channels,
                out_channels=operation.out_channels,
                kernel=operation.kernel,
                stride=operation.stride,
                groups=operation.groups,
                weights=weights,
                macs=weights * out_height * out_width,
                in_elements=math.prod(network.tensor_shapes[operation.inputs[0]]),
                out_elements=math.prod(network.tensor_shapes[index + 1]),
            )
        )
    return Profile(network, tuple(rows))


def inspected_layers(network: Network, blocks: int = INSPECTED_BLOCKS) -> tuple[int, ...]:
    """The layers whose Fisher information is worth its cost (Appendix F.1): those of the last
    `blocks` blocks and the convolutions behind them; without block marks the last 40 %."""
    marks = [network.operations[index].block for index in network.convolutions]
    known = sorted({mark for mark in marks if mark is not None})
    if not known:
        count = max(1, round(INSPECTED_SHARE * len(marks)))
        return tuple(range(len(marks) - count, len(marks)))
    wanted = set(known[-blocks:])
    first = min(layer for layer, mark in enumerate(marks) if mark in wanted)
    return tuple(
        layer
        for layer, mark in enumerate(marks)
        if layer >= first and (mark is None or mark in wanted)
    )


def words_per_weight(optimizer: str) -> int:
    """fp32 words a trained weight takes: itself, its gradient and the optimiser's state."""
    words = {"in_place_sgd": 1, "sgd": 2, "momentum": 3, "adam": 4}
    if optimizer not in words:
        raise ValueError(f"optimizer: expected one of {', '.join(words)}, got {optimizer!r}")
    return words[optimizer]


def _kind(operation: Operation) -> str:
    if operation.depthwise:
        return "depthwise"
    return "pointwise" if operation.kernel == 1 else "dense"


def _trained_layers(policy: UpdatePolicy) -> set[int]:
    return {*policy.layers, *policy.biases}
