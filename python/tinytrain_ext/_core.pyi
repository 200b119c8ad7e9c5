"""The native training core (csrc/python); use it through tinytrain_ext.session."""

from collections.abc import Sequence
from typing import Any, Generic, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T", np.float32, np.float64)

# (kind, inputs, activation, out_channels, kernel, stride, padding, depthwise)
_Operation = tuple[str, list[int], str, int, int, int, int, bool]
# (layer, axis, channels, bias)
_Update = tuple[int, str, list[int], bool]

class _Request(TypedDict):
    image_size: int
    operations: list[_Operation]
    updates: list[_Update]
    fisher_layers: list[int]
    optimizer: str
    max_ways: int
    keep_images: int
    threads: int
    memory_bytes: int  # 0: no limit
    guard_bytes: int
    frozen_weights: str

def available_isas() -> list[str]: ...
def default_isa() -> str: ...
def cpu() -> dict[str, Any]: ...
def fma_peak(isa: str, rounds: int) -> int: ...
def plan(request: _Request) -> dict[str, Any]: ...

class _Session(Generic[_T]):
    def __init__(
        self,
        request: _Request,
        *,
        weights: Sequence[NDArray[np.float32]],
        biases: Sequence[NDArray[np.float32]],
        mean: Sequence[float],
        std: Sequence[float],
        isa: str,
    ) -> None: ...
    def plan(self) -> dict[str, Any]: ...
    def isa(self) -> str: ...
    def resident_weight_bytes(self) -> int: ...
    def prefix_shape(self) -> tuple[int, int, int]: ...
    def prefix(
        self,
        images: NDArray[Any],
        augmentation: NDArray[np.float32] | None,
        out: NDArray[_T],
    ) -> None: ...
    def embed(
        self, images: NDArray[Any], prefix: bool, augmentation: NDArray[np.float32] | None
    ) -> NDArray[_T]: ...
    def set_prototypes(
        self,
        images: NDArray[Any],
        prefix: bool,
        labels: NDArray[np.int64],
        ways: int,
        keep: bool,
    ) -> None: ...
    def keeps_prefix(self) -> bool: ...
    def update_prototypes(self) -> None: ...
    def kept_features(self) -> NDArray[_T]: ...
    def prototypes(self) -> NDArray[_T]: ...
    def proto_backward(
        self,
        images: NDArray[Any],
        prefix: bool,
        labels: NDArray[np.int64],
        augmentation: NDArray[np.float32] | None,
        scale: float,
        weight: float,
    ) -> tuple[float, int]: ...
    def backward(
        self,
        images: NDArray[Any],
        prefix: bool,
        grad_features: NDArray[_T],
        augmentation: NDArray[np.float32] | None,
    ) -> None: ...
    def forward(
        self, images: NDArray[Any], prefix: bool
    ) -> tuple[NDArray[_T], NDArray[np.uint8]]: ...
    def backward_saved(
        self,
        images: NDArray[Any] | None,
        saved: NDArray[np.uint8],
        grad_features: NDArray[_T],
    ) -> None: ...
    def set_selected(self, values: NDArray[_T]) -> None: ...
    def zero_grad(self) -> None: ...
    def step(self, learning_rate: float, momentum: float) -> None: ...
    def set_in_place_rate(self, learning_rate: float) -> None: ...
    def gradient(self, index: int) -> NDArray[_T]: ...
    def flat_gradient(self) -> NDArray[_T]: ...
    def fisher(self) -> list[NDArray[_T]]: ...
    def layer(self, number: int) -> tuple[NDArray[_T], NDArray[_T]]: ...
    def arena_high_water(self) -> int: ...
    def broken_guard(self) -> str: ...

class Session32(_Session[np.float32]): ...
class Session64(_Session[np.float64]): ...

class _Convolution(Generic[_T]):
    def __init__(
        self,
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
        *,
        height: int,
        width: int,
        stride: int,
        padding: int,
        depthwise: bool,
        activation: str,
        isa: str,
    ) -> None: ...
    def set_weight(self, values: NDArray[_T], channels: Sequence[int], axis: str) -> None: ...
    def set_bias(self, bias: NDArray[_T]) -> None: ...
    @staticmethod
    def rectify(x: NDArray[_T], activation: str) -> tuple[NDArray[_T], NDArray[np.uint8]]: ...
    @staticmethod
    def grad_rectify(
        grad: NDArray[_T], mask: NDArray[np.uint8] | None, values: NDArray[_T] | None
    ) -> tuple[NDArray[_T], NDArray[_T]]: ...
    def forward(
        self, x: NDArray[_T], addend: NDArray[_T] | None = None
    ) -> tuple[NDArray[_T], NDArray[np.uint8]]: ...
    def grad_input(
        self,
        grad_output: NDArray[_T],
        *,
        addend: NDArray[_T] | None = None,
        mask: NDArray[np.uint8] | None = None,
        values: NDArray[_T] | None = None,
    ) -> tuple[NDArray[_T], NDArray[_T]]: ...
    def grad_weight(
        self, grad_output: NDArray[_T], x: NDArray[_T], channels: Sequence[int], axis: str
    ) -> NDArray[_T]: ...

class Convolution32(_Convolution[np.float32]): ...
class Convolution64(_Convolution[np.float64]): ...
