"""TinyTL (Cai et al., NeurIPS 2020): lite residual modules beside the blocks of a frozen backbone.

The one method of the comparison that changes the network, and so no policy of the engine's: it runs
in PyTorch (the [torch] extra), on the views, for the iterations and with the loss of `adapt`.

A module halves its block's input, convolves at that resolution and adds to the block's output: what
training saves is small, but gradients pass through the whole backbone. Norms are group norms, as
on a device that trains on one image at a time. The last norm's gamma begins at zero, so that the
untrained network is the backbone. `meta-train --tinytl` trains the modules of a network in advance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from ..adapt import Iteration
from ..cost import Profile, words_per_weight
from ..errors import NonFiniteError
from ..images import Augmentation, apply_augmentation, normalise
from ..network import Network, read_tensors, write_atomically
from ..nn import TorchNetwork, convert
from ..protonet import compute_prototypes, loss_and_gradient
from ..selection import UpdatePolicy
from ..session import Prefix
from ..views import PseudoQueries, Views

__all__ = ["Costs", "TinyTL", "TinyTLResult", "adapt_tinytl", "block_ends", "load_modules"]

METADATA_KEY = "tinytrain_ext.tinytl"
CHUNK = 32  # images of a pass; gradients add up to those of the whole support set
GROUP_CHANNELS = 8
CONV_GROUPS = 2
LARGEST_KERNEL = 5

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Costs:
    """What training by TinyTL costs, of one image, in the accounting of `cost`.

    updated_weights: of the modules' convolutions; updated_biases: of the backbone's convolutions
    where they are trained, and the modules' gammas and betas; backward_macs: dX through the
    backbone, dX and dW of the modules; paper_bytes: Appendix A.4's rule, for which the modules keep
    the inputs of their convolutions and norms.
    """

    updated_weights: int
    updated_biases: int
    backward_macs: int
    paper_bytes: int


class LiteResidual(nn.Module):
    """A module from a block's input to its output, (H, W, C) each."""

    def __init__(self, source: Shape, target: Shape, generator: torch.Generator) -> None:
        super().__init__()
        channels, out_channels = source[2], target[2]
        self.size = target[:2]
        pooled = [math.ceil(side / 2) for side in source[:2]]
        kernel = LARGEST_KERNEL if min(pooled) >= LARGEST_KERNEL else 3
        stride = max(1, round(source[0] / target[0]))
        groups = CONV_GROUPS if channels % CONV_GROUPS == 0 else 1
        self.spatial = nn.Conv2d(
            channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.spatial_norm = _group_norm(channels)
        self.pointwise = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.pointwise_norm = _group_norm(out_channels)
        for convolution in (self.spatial, self.pointwise):
            nn.init.kaiming_normal_(convolution.weight, generator=generator)
        nn.init.zeros_(self.pointwise_norm.weight)
        inside = math.prod((side - 1) // stride + 1 for side in pooled)
        self.spatial_macs = self.spatial.weight.numel() * inside
        self.pointwise_macs = self.pointwise.weight.numel() * inside
        # Inputs of both convolutions and both norms, and the ReLU's bits.
        elements = math.prod(pooled) * channels + inside * (2 * channels + out_channels)
        self.saved_bytes = 4 * elements + inside * channels / 8

    def forward(self, x: Tensor) -> Tensor:
        x = functional.avg_pool2d(x, 2, ceil_mode=True)
        x = functional.relu(self.spatial_norm(self.spatial(x)), inplace=True)
        x = self.pointwise_norm(self.pointwise(x))
        return functional.interpolate(x, self.size, mode="bilinear", align_corners=False)


class TinyTL(nn.Module):
    """A network with a lite residual module beside every block; what trains requires a gradient.

    biases: train the backbone's biases, too; seed: of the modules' first weights; modules: instead
    of these, meta-trained ones (`load_modules`).
    Raises ValueError for a network whose blocks are not marked.
    """

    def __init__(
        self,
        network: Network,
        *,
        biases: bool = False,
        seed: int = 0,
        modules: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.biases = biases
        # Converted layers save nothing but a bit for each rectified value.
        policy = UpdatePolicy(biases=range(len(network.convolutions)) if biases else ())
        backbone = convert(network.replace(classifier=None).to_torch(), policy)
        assert isinstance(backbone, TorchNetwork)
        self.backbone = backbone
        generator = torch.Generator().manual_seed(seed)
        self._ends = block_ends(network)
        shapes = network.tensor_shapes
        self.residuals = nn.ModuleList(
            LiteResidual(shapes[source], shapes[end + 1], generator)
            for end, source in self._ends.items()
        )
        if modules is not None:
            state = {name: torch.tensor(array) for name, array in modules.items()}
            self.residuals.load_state_dict(state)
        backbone.beside = {
            end: (source, residual)
            for (end, source), residual in zip(self._ends.items(), self.residuals, strict=True)
        }
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> features (N, m)."""
        features: Tensor = self.backbone(images)
        return features

    def embed(self, images: NDArray[Any], threads: int = 1) -> NDArray[np.float32]:
        """Features (N, m) of images (N, H, W, 3): uint8, or float32 already normalised."""
        with torch.inference_mode(), _threads(threads):
            parts = [self(self.pixels(images[part])).numpy() for part in _parts(len(images))]
        return np.concatenate(parts)

    def save(self, path: Path) -> None:
        """Writes the modules, whole or not at all, with the digest of the network beside them.

        Raises OSError naming `path`.
        """
        state = {name: tensor.contiguous() for name, tensor in self.residuals.state_dict().items()}
        write_atomically(path, save(state, {METADATA_KEY: self.network.digest}))

    def pixels(self, images: NDArray[Any]) -> Tensor:
        """Images (N, H, W, 3) as `forward` takes them."""
        if images.dtype == np.uint8:
            images = normalise(images, self.network.mean, self.network.std)
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def costs(self, costs: Profile) -> Costs:
        """Of training it with Adam; costs: the network's."""
        residuals = [module for module in self.residuals if isinstance(module, LiteResidual)]
        # The backbone passes gradients on behind its first trained bias, or its first block.
        first = min(self._ends)
        before = [row.layer for row in costs.layers if row.operation <= first]
        chain = UpdatePolicy(
            biases=[row.layer for row in costs.layers] if self.biases else before[-1:]
        )
        macs = costs.grad_input_macs(chain)
        macs += sum(m.spatial_macs + 2 * m.pointwise_macs for m in residuals)
        # Nothing is trained before the first block but biases.
        macs += sum(m.spatial_macs for m in residuals[0 if self.biases else 1 :])
        weights = sum(m.spatial.weight.numel() + m.pointwise.weight.numel() for m in residuals)
        norms = [norm for m in residuals for norm in (m.spatial_norm, m.pointwise_norm)]
        saved = costs.mask_bytes(chain) + sum(m.saved_bytes for m in residuals)
        return Costs(
            updated_weights=weights,
            updated_biases=sum(2 * norm.num_channels for norm in norms)
            + sum(costs.layers[layer].out_channels for layer in chain.biases if self.biases),
            backward_macs=macs,
            paper_bytes=math.ceil(max(costs.forward_bytes, saved))
            + 4 * words_per_weight("adam") * weights,
        )


@dataclass(frozen=True, eq=False)
class TinyTLResult:
    """A trained model, the prototypes (ways, m) of its support set, and one entry an iteration."""

    model: TinyTL
    prototypes: NDArray[np.float32]
    history: tuple[Iteration, ...]


def adapt_tinytl(
    network: Network,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    iterations: int = 40,
    learning_rate: float,
    biases: bool = False,
    modules: Mapping[str, NDArray[np.float32]] | None = None,
    views: Views | None = None,
    threads: int = 1,
    seed: int = 0,
) -> TinyTLResult:
    """Trains a network's lite residual modules on a support set, by Adam, as `adapt` trains layers.

    images: (N, H, W, 3) uint8; labels: (N,) in 0..ways-1, every class at least once; modules: what
    they begin as, random without. The other arguments are those of `adapt`; the views are the same
    as there for the same seed.
    Raises NonFiniteError when training diverges, ValueError for a network without marked blocks.
    """
    ways, scale = int(labels.max()) + 1, network.logit_scale
    rng = np.random.default_rng(seed)
    history = []
    with _threads(threads):
        model = TinyTL(network, biases=biases, seed=seed, modules=modules)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, learning_rate)
        support = normalise(images, network.mean, network.std)
        pixels = _Pixels(network)
        queries = PseudoQueries(pixels, images, rng, views=views, iterations=iterations)
        prototypes = compute_prototypes(model.embed(support, threads), labels, ways)
        for iteration in range(iterations):
            view, augmentation = queries.view(iteration)
            if not isinstance(view, Prefix):
                assert augmentation is not None  # photos come with their draw
                view = pixels.prefix(view, augmentation)
            loss, correct = 0.0, 0
            for part in _parts(len(images)):
                features = model(model.pixels(view.values[part]))
                found = loss_and_gradient(
                    features.detach().numpy(), labels[part], prototypes, scale
                )
                features.backward(torch.from_numpy(found[2] / np.float32(len(images))))
                loss, correct = loss + found[0], correct + found[1]
            if not math.isfinite(loss):
                raise NonFiniteError("fine-tuning: the loss is not finite")
            optimizer.step()
            optimizer.zero_grad()
            prototypes = compute_prototypes(model.embed(support, threads), labels, ways)
            history.append(Iteration(loss / len(images), correct / len(images)))
    return TinyTLResult(model, prototypes, tuple(history))


def load_modules(path: Path, network: Network) -> dict[str, NDArray[np.float32]]:
    """The meta-trained modules of a network, from a file that `TinyTL.save` wrote.

    Raises OSError when the file cannot be read; ValueError, naming it, for modules of another
    network and for anything that is not exactly as expected.
    """

    def expected(metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
        if metadata != {METADATA_KEY: network.digest}:
            raise ValueError(
                f"expected TinyTL's modules of a network of digest {network.digest}, "
                f"got metadata {metadata!r:.200}"
            )
        state = TinyTL(network).residuals.state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    try:
        arrays = read_tensors(path, expected)
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise ValueError(f"tensor {name!r}: expected finite numbers, got NaN or infinity")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return arrays


def block_ends(network: Network) -> dict[int, int]:
    """{last operation of a block: the tensor that the block reads}, in order.

    Raises ValueError where no block is marked.
    """
    sources: dict[int, int] = {}
    last: dict[int, int] = {}
    for index, operation in enumerate(network.operations):
        if operation.block is not None:
            sources.setdefault(operation.block, operation.inputs[0])
            last[operation.block] = index
    if not last:
        raise ValueError(f"network {network.name!r}: TinyTL needs blocks, and none is marked")
    return {last[block]: source for block, source in sources.items()}


class _Pixels:
    """The prefix of a network in which nothing is frozen for good: normalised, augmented pixels."""

    dtype = np.dtype(np.float32)

    def __init__(self, network: Network) -> None:
        self._network = network
        self.prefix_shape = (network.input_size, network.input_size, 3)

    def prefix(
        self,
        images: NDArray[np.uint8],
        augmentation: Augmentation,
        out: NDArray[Any] | None = None,
    ) -> Prefix:
        network = self._network
        found = apply_augmentation(images, augmentation, network.mean, network.std)
        if out is None:
            return Prefix(found)
        out[:] = found
        return Prefix(out)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch's threads are the process's: they are given back as they were."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, count, CHUNK))


def _group_norm(channels: int) -> nn.GroupNorm:
    groups = channels // GROUP_CHANNELS if channels % GROUP_CHANNELS == 0 else 1
    return nn.GroupNorm(groups, channels)
