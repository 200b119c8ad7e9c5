"""The door to PyTorch (the [torch] extra): the engine's kernels as drop-in layers.

`SparseConv2d` takes the place of a torch.nn.Conv2d, `convert` of all of them in a model, and
`SparseBackbone` runs a whole Network in one autograd Function. Gradients and the optimiser's state
have the size of the selected channels; what a forward pass saves is what their gradients need.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as _error:
    raise ImportError(
        "tinytrain_ext.nn needs PyTorch, which is not installed here: "
        "pip install 'tinytrain_ext[torch]'"
    ) from _error

from ..selection import select
from .backbone import SparseBackbone, TorchNetwork
from .convert import convert, fisher_information, revert, sparse_layers
from .functional import bit_relu, sparse_conv2d, sparse_conv2d_reference
from .importer import profile
from .layers import BitReLU, FoldedBatchNorm2d, SparseConv2d

__all__ = [
    "BitReLU",
    "FoldedBatchNorm2d",
    "SparseBackbone",
    "SparseConv2d",
    "TorchNetwork",
    "bit_relu",
    "convert",
    "fisher_information",
    "profile",
    "revert",
    "select",
    "sparse_conv2d",
    "sparse_conv2d_reference",
    "sparse_layers",
]
