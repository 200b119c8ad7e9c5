"""Network: a convolutional backbone as data, and its safetensors file.

A network is a list of operations over numbered tensors (tensor 0 is the image, tensor i + 1 the
output of operation i), with batch normalisation folded into weights and biases. "Layer" means
convolution number; the stem is layer 0. The last operation is a global average pool and gives the
feature vector; there is no classifier: classes are prototypes (Eq. 1 of the paper).

The file holds the tensors `layer.<i>.weight`, `layer.<i>.bias` and, in an adapted network,
`prototypes`, all float32. Its metadata has one entry, `tinytrain_ext.network`: a JSON object with
the schema version and everything that is not a tensor. (One entry, because safetensors writes
several in random order, and equal networks should give equal files.)
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from typing import Self

    import torch

__all__ = [
    "Classifier",
    "Network",
    "Operation",
    "check_writable",
    "default_network",
    "digest_of",
    "open_at_once",
    "read_tensors",
    "write_atomically",
]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
METADATA_KEY = "tinytrain_ext.network"
DEFAULT_NETWORK = "models/mcunet-miniimagenet.safetensors"

# Files are untrusted input: these caps are far above every network the package is made for, and low
# enough that a hostile file is refused before anything of its pretended size is allocated.
MAX_FILE_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 22
MAX_OPERATIONS = 4096
MAX_CHANNELS = 1 << 16
MAX_KERNEL = 64
MAX_INPUT_SIZE = 4096
MAX_TENSOR_ELEMENTS = 1 << 28

KINDS = ("conv", "add", "max_pool", "average_pool", "global_average_pool")
ACTIVATIONS = ("none", "relu", "relu6")


@dataclass(frozen=True)
class Operation:
    """One operation of a network.

    kind: "conv", "add", "max_pool", "average_pool" or "global_average_pool".
    inputs: numbers of the tensors read (two for "add", else one).
    activation: "none", "relu" or "relu6"; of "conv" and "add" only.
    in_channels, out_channels, groups: of "conv" only; groups is 1 (dense or pointwise) or
    in_channels == out_channels (depthwise).
    kernel, stride, padding: of "conv" and the two pools; square and symmetric, in pixels.
    block: number of the inverted-residual block the operation belongs to, where known.
    """

    kind: str
    inputs: tuple[int, ...]
    activation: str = "none"
    in_channels: int = 0
    out_channels: int = 0
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    groups: int = 1
    block: int | None = None

    @property
    def depthwise(self) -> bool:
        """Whether this is a convolution of one channel to one channel."""
        return self.kind == "conv" and self.groups == self.in_channels == self.out_channels

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(O, C / groups, K, K) of a convolution."""
        return (self.out_channels, self.in_channels // self.groups, self.kernel, self.kernel)


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Operation)}


def tensor_shapes(
    operations: tuple[Operation, ...], input_size: int
) -> tuple[tuple[int, int, int], ...]:
    """Checks the graph and returns the shape (H, W, C) of every tensor, the 3-channel image first.

    Raises ValueError naming the operation when the graph is not one.
    """
    if not 1 <= input_size <= MAX_INPUT_SIZE:
        raise ValueError(f"input_size: expected 1 to {MAX_INPUT_SIZE} pixels, got {input_size}")
    if not 1 <= len(operations) <= MAX_OPERATIONS:
        raise ValueError(f"operations: expected 1 to {MAX_OPERATIONS}, got {len(operations)}")
    shapes = [(input_size, input_size, 3)]
    for index, operation in enumerate(operations):
        shape = _output_shape(index, operation, shapes)
        if math.prod(shape) > MAX_TENSOR_ELEMENTS:
            _refuse(index, operation, f"output of shape {shape} is too large")
        shapes.append(shape)
    last = len(operations) - 1
    if operations[last].kind != "global_average_pool":
        _refuse(last, operations[last], "the last operation must be a global_average_pool")
    used = {number for operation in operations for number in operation.inputs}
    for index, operation in enumerate(operations[:-1]):
        if index + 1 not in used:
            _refuse(index, operation, f"its output, tensor {index + 1}, is never used")
    if not any(operation.kind == "conv" for operation in operations):
        raise ValueError("operations: expected at least one conv, got none")
    return tuple(shapes)


def _refuse(index: int, operation: Operation, reason: str) -> NoReturn:
    raise ValueError(f"operation {index} ({operation.kind}): {reason}")


def _output_shape(
    index: int, operation: Operation, shapes: list[tuple[int, int, int]]
) -> tuple[int, int, int]:
    """Shape (H, W, C) of the output of operation `index`, given the shapes of earlier tensors."""
    o = operation
    if o.kind not in KINDS:
        _refuse(index, o, f"kind: expected one of {', '.join(KINDS)}, got {o.kind!r}")
    expected_inputs = 2 if o.kind == "add" else 1
    if len(o.inputs) != expected_inputs:
        _refuse(index, o, f"inputs: expected {expected_inputs} tensor(s), got {len(o.inputs)}")
    for number in o.inputs:
        if not 0 <= number <= index:
            _refuse(index, o, f"inputs: expected tensors 0 to {index}, got {number}")
    if o.activation not in ACTIVATIONS:
        _refuse(
            index, o, f"activation: expected one of {', '.join(ACTIVATIONS)}, got {o.activation!r}"
        )
    if o.activation != "none" and o.kind not in ("conv", "add"):
        _refuse(index, o, f"activation: only conv and add may have one, got {o.activation!r}")
    if o.block is not None and not 0 <= o.block < MAX_OPERATIONS:
        _refuse(index, o, f"block: expected 0 to {MAX_OPERATIONS - 1} or None, got {o.block}")
    if o.kind != "conv" and (o.in_channels, o.out_channels, o.groups) != (0, 0, 1):
        _refuse(index, o, "in_channels, out_channels and groups belong to a conv")
    height, width, channels = shapes[o.inputs[0]]
    if o.kind in ("add", "global_average_pool"):
        if (o.kernel, o.stride, o.padding) != (1, 1, 0):
            _refuse(index, o, "kernel, stride and padding belong to a conv or a pool")
        if o.kind == "global_average_pool":
            return (1, 1, channels)
        other = shapes[o.inputs[1]]
        if other != (height, width, channels):
            _refuse(index, o, f"inputs of shapes {(height, width, channels)} and {other} differ")
        return other
    if not 1 <= o.kernel <= MAX_KERNEL:
        _refuse(index, o, f"kernel: expected 1 to {MAX_KERNEL}, got {o.kernel}")
    if not 1 <= o.stride <= MAX_KERNEL:
        _refuse(index, o, f"stride: expected 1 to {MAX_KERNEL}, got {o.stride}")
    if not 0 <= o.padding < o.kernel:
        _refuse(index, o, f"padding: expected 0 to kernel - 1 = {o.kernel - 1}, got {o.padding}")
    if o.kind == "conv":
        if o.in_channels != channels:
            _refuse(
                index, o, f"in_channels: expected {channels} as in its input, got {o.in_channels}"
            )
        if not 1 <= o.out_channels <= MAX_CHANNELS:
            _refuse(index, o, f"out_channels: expected 1 to {MAX_CHANNELS}, got {o.out_channels}")
        if o.groups != 1 and not o.groups == o.in_channels == o.out_channels:
            _refuse(
                index,
                o,
                "groups: expected 1 or in_channels == out_channels (depthwise), got "
                f"{o.groups} for {o.in_channels} -> {o.out_channels} channels",
            )
        channels = o.out_channels
    height = (height + 2 * o.padding - o.kernel) // o.stride + 1
    width = (width + 2 * o.padding - o.kernel) // o.stride + 1
    if height < 1 or width < 1:
        _refuse(index, o, f"kernel {o.kernel} does not fit its input")
    return (height, width, channels)


@dataclass(frozen=True, eq=False)
class Classifier:
    """A linear head that a network was trained with: kept, but no part of adaptation.

    weight: (K, m) float32; bias: (K,) float32; classes: K names, or none.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    classes: tuple[str, ...] = ()

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, K) of features (N, m)."""
        result: NDArray[np.float32] = features @ self.weight.T + self.bias
        return result


@dataclass(frozen=True, eq=False)
class Network:
    """A backbone with folded batch normalisation, and the classes it was adapted to, if any.

    name: for people.
    operations: the graph; the last one is a global_average_pool.
    weights: per layer, (O, C / groups, K, K) float32. biases: per layer, (O,) float32. Held
    read-only.
    input_size: side of the square input in pixels; resize: short side before the centre crop.
    mean, std: per RGB channel, of pixel / 255: the network sees (pixel / 255 - mean) / std.
    logit_scale: the factor of the cosine in Eq. 1.
    classes, prototypes: names, and (ways, m) float32 L2-normalised prototypes in the same order;
    empty and None before adaptation.
    unknown_below: a photo whose best probability is below this is "unknown"; None before
    adaptation.
    classifier: the linear head of an imported model, if it had one; `adapt` neither uses nor
    trains it.

    Raises ValueError (TypeError for a wrong dtype) naming the operation, layer or field that is
    wrong.
    """

    name: str
    operations: tuple[Operation, ...]
    weights: tuple[NDArray[np.float32], ...]
    biases: tuple[NDArray[np.float32], ...]
    input_size: int = 128
    resize: int = 146
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    logit_scale: float = 10.0
    classes: tuple[str, ...] = ()
    prototypes: NDArray[np.float32] | None = None
    unknown_below: float | None = None
    classifier: Classifier | None = None
    tensor_shapes: tuple[tuple[int, int, int], ...] = field(init=False, repr=False)
    """(H, W, C) of every tensor, the image first."""
    convolutions: tuple[int, ...] = field(init=False, repr=False)
    """Operation index of each layer."""

    def __post_init__(self) -> None:
        shapes = tensor_shapes(self.operations, self.input_size)
        layers = tuple(i for i, o in enumerate(self.operations) if o.kind == "conv")
        set_field = object.__setattr__  # the dataclass is frozen: derived fields are set once, here
        set_field(self, "tensor_shapes", shapes)
        set_field(self, "convolutions", layers)
        for what, tensors in (("weights", self.weights), ("biases", self.biases)):
            if len(tensors) != len(layers):
                raise ValueError(f"{what}: expected {len(layers)} layers, got {len(tensors)}")
        weights, biases = [], []
        for layer, index in enumerate(layers):
            shape = self.operations[index].weight_shape
            weights.append(_frozen_array(f"weights[{layer}]", self.weights[layer], shape))
            biases.append(_frozen_array(f"biases[{layer}]", self.biases[layer], shape[:1]))
        set_field(self, "weights", tuple(weights))
        set_field(self, "biases", tuple(biases))
        if not self.input_size <= self.resize <= 8 * MAX_INPUT_SIZE:
            raise ValueError(
                f"resize: expected at least input_size = {self.input_size}, got {self.resize}"
            )
        for what, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{what}: expected 3 finite numbers, got {values}")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected positive numbers, got {self.std}")
        if not (math.isfinite(self.logit_scale) and self.logit_scale > 0):
            raise ValueError(f"logit_scale: expected a positive number, got {self.logit_scale}")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: expected distinct names, got a repeated one")
        if self.prototypes is not None:
            expected = (len(self.classes), self.feature_dim)
            set_field(self, "prototypes", _frozen_array("prototypes", self.prototypes, expected))
        elif self.classes:
            raise ValueError(f"prototypes: expected {len(self.classes)} rows, got None")
        if self.unknown_below is not None and not 0 <= self.unknown_below <= 1:
            raise ValueError(f"unknown_below: expected 0 to 1, got {self.unknown_below}")
        if self.classifier is not None:
            set_field(self, "classifier", _checked_classifier(self.classifier, self.feature_dim))

    @property
    def feature_dim(self) -> int:
        """m, the length of the feature vector."""
        return self.tensor_shapes[-1][2]

    @property
    def digest(self) -> str:
        """Stands for the weights and biases (`digest_of`)."""
        return digest_of((*self.weights, *self.biases))

    def replace(self, **changes: Any) -> Self:
        """A new network with some fields changed, checked like any other."""
        return dataclasses.replace(self, **changes)

    def embed(self, images: NDArray[Any], threads: int = 1) -> NDArray[np.float32]:
        """Features (N, m) of `images` (N, H, W, 3): uint8 pixels, or float32 already normalised."""
        from .session import Session

        return Session(self, threads=threads).embed(images)

    @classmethod
    def from_torch(
        cls,
        model: torch.nn.Module,
        example: torch.Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: int | None = None,
        resize: int | None = None,
        classes: Sequence[str] = (),
        name: str | None = None,
    ) -> Network:
        """A network of a PyTorch model (needs the [torch] extra), batch norm folded in.

        model: takes (N, 3, size, size) and is traced by torch.fx in eval mode. example: such
        images, normalised; the result is compared with the model on them. mean, std: of each
        colour in [0, 1], as the model was trained with. size: checked against the example; resize:
        of a photo's short side, 146 / 128 of size by default. A linear head is kept as
        `classifier`, `classes` its names; name: the model's class by default. Inverted residuals
        are marked as blocks.

        Raises ValueError, with the call's name and the reason, for what a network cannot express.
        """
        from .nn.importer import import_torch

        network = import_torch(
            model,
            example,
            mean=mean,
            std=std,
            size=size,
            resize=resize,
            classes=classes,
            name=name,
        )
        if network.classifier is not None:
            logger.warning(
                "%s: the linear head of %d classes is kept as the classifier; "
                "adapt() neither uses nor trains it",
                network.name,
                len(network.classifier.bias),
            )
        return network

    def to_torch(self) -> torch.nn.Module:
        """The network in PyTorch's own layers (needs the [torch] extra).

        Takes normalised images (N, 3, size, size) and returns features (N, m), or the classifier's
        outputs (N, K) where there is one.
        """
        from .nn import TorchNetwork

        return TorchNetwork(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the network to a safetensors file, whole or not at all.

        Raises OSError naming `path`.
        """
        from safetensors.numpy import save

        tensors: dict[str, NDArray[Any]] = {}
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            tensors[f"layer.{layer}.weight"] = weight
            tensors[f"layer.{layer}.bias"] = bias
        if self.prototypes is not None:
            tensors["prototypes"] = self.prototypes
        description: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "operations": [_operation_to_json(operation) for operation in self.operations],
            "input_size": self.input_size,
            "resize": self.resize,
            "mean": list(self.mean),
            "std": list(self.std),
            "logit_scale": self.logit_scale,
            "classes": list(self.classes),
            "unknown_below": self.unknown_below,
        }
        if self.classifier is not None:
            tensors["classifier.weight"] = self.classifier.weight
            tensors["classifier.bias"] = self.classifier.bias
            description["classifier"] = {
                "outputs": len(self.classifier.bias),
                "classes": list(self.classifier.classes),
            }
        write_atomically(path, save(tensors, {METADATA_KEY: json.dumps(description)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a network from a safetensors file written by `save`.

        Raises OSError when the file cannot be read and ValueError, naming the file and the field,
        for anything in it that is not exactly as expected: nothing is repaired or ignored.
        """
        try:
            return cls._load(Path(path))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    @classmethod
    def _load(cls, path: Path) -> Self:
        fields: dict[str, Any] = {}

        def expected(metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
            fields.update(_parse_description(metadata))
            return _expected_tensors(fields)

        tensors = read_tensors(path, expected)
        head = fields.pop("classifier")
        if head is not None:
            fields["classifier"] = Classifier(
                tensors["classifier.weight"], tensors["classifier.bias"], head[1]
            )
        layers = sum(operation.kind == "conv" for operation in fields["operations"])
        return cls(
            weights=tuple(tensors[f"layer.{layer}.weight"] for layer in range(layers)),
            biases=tuple(tensors[f"layer.{layer}.bias"] for layer in range(layers)),
            prototypes=tensors.get("prototypes"),
            **fields,
        )


def default_network() -> Network:
    """The network in the package: MCUNet, meta-trained by this project on miniImageNet's classes.

    Raises FileNotFoundError when this installation does not hold the file.
    """
    from importlib import resources

    with resources.as_file(resources.files(__package__) / DEFAULT_NETWORK) as path:
        if not path.is_file():
            raise FileNotFoundError(
                f"the default network is not part of this installation: expected {path}; "
                "give a network file instead (`tinytrain import` makes one)"
            )
        return Network.load(path)


def digest_of(arrays: Iterable[NDArray[Any]]) -> str:
    """16 hexadecimal digits that stand for the arrays' values."""
    import hashlib  # here: it loads OpenSSL, 3.5 MB that a device need not pay for

    sums = hashlib.sha256()
    for array in arrays:
        sums.update(np.ascontiguousarray(array).tobytes())
    return sums.hexdigest()[:16]


def open_at_once(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file to read, a named pipe too, which otherwise waits for somebody to write to it."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def read_tensors(
    path: Path, expected: Callable[[Mapping[str, str]], Mapping[str, tuple[int, ...]]]
) -> dict[str, NDArray[np.float32]]:
    """Reads a safetensors file, whose sizes are checked before any data.

    expected: the file's metadata -> the shape of every tensor by name; all are float32.
    Raises OSError when the file cannot be read, ValueError for anything that is not as expected.
    """
    from safetensors import SafetensorError, safe_open

    _check_sizes(path)
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = expected(file.metadata() or {})
            _check_tensors(file, shapes)
            return {name: file.get_tensor(name) for name in shapes}
    except SafetensorError as error:
        raise ValueError(f"not a sound safetensors file: {error}") from error


def check_writable(path: Path, source: Path | None = None) -> None:
    """Raises ValueError, before any work, when a file could not be written there.

    source: a file that is read, and would be lost if it were the same.
    """
    import tempfile  # here: only commands need it, and it loads much

    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give the name of a file")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise ValueError(f"{path}: is the file that is read; give another name")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {path.parent}: {error.strerror}") from error


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a whole file or nothing: temporary file in the same directory, fsync, rename.

    Raises OSError naming `path`. Whatever happens, an existing file keeps its old content until the
    new one is complete.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.urandom(6).hex()}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _checked_classifier(classifier: Classifier, feature_dim: int) -> Classifier:
    outputs = len(classifier.bias)
    names = classifier.classes
    if outputs == 0 or len(set(names)) != len(names) or len(names) not in (0, outputs):
        raise ValueError(
            f"classifier: expected at least one output and no or {outputs} distinct classes, "
            f"got {len(names)}"
        )
    weight = _frozen_array("classifier.weight", classifier.weight, (outputs, feature_dim))
    return Classifier(weight, _frozen_array("classifier.bias", classifier.bias, (outputs,)), names)


def _frozen_array(what: str, array: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{what}: expected a float32 array, got {got}")
    if array.shape != shape:
        raise ValueError(f"{what}: expected shape {shape}, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{what}: expected finite numbers, got NaN or infinity")
    frozen = np.ascontiguousarray(array).view()
    frozen.flags.writeable = False
    return frozen


def _operation_to_json(operation: Operation) -> dict[str, Any]:
    values = {f.name: getattr(operation, f.name) for f in dataclasses.fields(operation)}
    return {name: value for name, value in values.items() if value != _DEFAULTS[name]}


def _check_sizes(path: Path) -> None:
    """Refuses a file whose size or header length is absurd, before anything is mapped or parsed."""
    with open_at_once(path) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("expected a regular file")
        if not 8 < status.st_size <= MAX_FILE_BYTES:
            raise ValueError(f"file size: expected 9 to {MAX_FILE_BYTES}, got {status.st_size}")
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, status.st_size - 8):
            raise ValueError(
                f"header: expected at most {min(MAX_HEADER_BYTES, status.st_size - 8)} bytes, "
                f"got {header_bytes}"
            )


def _parse_description(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The keyword arguments of Network, without the tensors, from the file's metadata."""
    if set(metadata) != {METADATA_KEY}:
        raise ValueError(
            f"metadata: expected the one entry {METADATA_KEY!r}, got {sorted(metadata)}"
        )
    try:
        description = json.loads(metadata[METADATA_KEY])
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"metadata: not JSON: {error}") from error
    if not isinstance(description, dict):
        raise TypeError(f"metadata: expected an object, got {type(description).__name__}")
    version = description.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version: expected {SCHEMA_VERSION}, got {version!r}")
    expected = {"name", "operations", "input_size", "resize", "mean", "std", "logit_scale"}
    head = description.pop("classifier", None)  # files of networks without one do not name it
    _check_keys("metadata", description, expected | {"classes", "unknown_below"})
    unknown_below = description["unknown_below"]
    return {
        "name": _typed("name", description["name"], str),
        "operations": tuple(
            _operation_from_json(index, values)
            for index, values in enumerate(_typed("operations", description["operations"], list))
        ),
        "input_size": _typed("input_size", description["input_size"], int),
        "resize": _typed("resize", description["resize"], int),
        "mean": tuple(_number("mean", v) for v in _typed("mean", description["mean"], list)),
        "std": tuple(_number("std", v) for v in _typed("std", description["std"], list)),
        "logit_scale": _number("logit_scale", description["logit_scale"]),
        "classes": tuple(
            _typed("classes", v, str) for v in _typed("classes", description["classes"], list)
        ),
        "unknown_below": None if unknown_below is None else _number("unknown_below", unknown_below),
        "classifier": None if head is None else _head_from_json(head),
    }


def _head_from_json(values: Any) -> tuple[int, tuple[str, ...]]:
    """How many outputs the classifier has, and their names."""
    _typed("classifier", values, dict)
    _check_keys("classifier", values, {"outputs", "classes"})
    outputs = _typed("classifier, outputs", values["outputs"], int)
    if not 1 <= outputs <= MAX_CHANNELS:
        raise ValueError(f"classifier, outputs: expected 1 to {MAX_CHANNELS}, got {outputs}")
    names = _typed("classifier, classes", values["classes"], list)
    return outputs, tuple(_typed("classifier, classes", name, str) for name in names)


def _operation_from_json(index: int, values: Any) -> Operation:
    where = f"operation {index}"
    _typed(where, values, dict)
    unknown = sorted(set(values) - set(_DEFAULTS))
    if unknown or "kind" not in values or "inputs" not in values:
        raise ValueError(f"{where}: expected kind, inputs and known fields, got {sorted(values)}")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        what = f"{where}, {name}"
        if name == "inputs":
            numbers = _typed(what, value, list)
            arguments[name] = tuple(_typed(what, number, int) for number in numbers)
        else:
            arguments[name] = _typed(what, value, str if name in ("kind", "activation") else int)
    return Operation(**arguments)


def _check_keys(what: str, values: Mapping[str, Any], expected: set[str]) -> None:
    missing, unknown = sorted(expected - set(values)), sorted(set(values) - expected)
    if missing or unknown:
        raise ValueError(f"{what}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")


def _typed(what: str, value: Any, kind: type) -> Any:
    # bool is an int to isinstance, never in a file
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{what}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what}: expected a finite number, got {value}")
    return number


def _expected_tensors(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the description calls for; checks the graph on the way."""
    operations: tuple[Operation, ...] = fields["operations"]
    feature_dim = tensor_shapes(operations, fields["input_size"])[-1][2]
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, operation in enumerate(o for o in operations if o.kind == "conv"):
        shapes[f"layer.{layer}.weight"] = operation.weight_shape
        shapes[f"layer.{layer}.bias"] = (operation.out_channels,)
    if fields["classes"]:
        shapes["prototypes"] = (len(fields["classes"]), feature_dim)
    if fields["classifier"] is not None:
        outputs = fields["classifier"][0]
        shapes["classifier.weight"] = (outputs, feature_dim)
        shapes["classifier.bias"] = (outputs,)
    return shapes


def _check_tensors(file: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares the header of an open safetensors file with what is expected, reading no data."""
    names = set(file.keys())
    missing, unknown = sorted(set(shapes) - names), sorted(names - set(shapes))
    if missing:
        raise ValueError(f"missing tensor {missing[0]!r} ({len(missing)} missing)")
    if unknown:
        raise ValueError(f"unknown tensor {unknown[0]!r} ({len(unknown)} unknown)")
    for name, shape in shapes.items():
        header = file.get_slice(name)
        if header.get_dtype() != "F32":
            raise ValueError(f"tensor {name!r}: expected float32 (F32), got {header.get_dtype()}")
        if tuple(header.get_shape()) != shape:
            raise ValueError(
                f"tensor {name!r}: expected shape {shape}, got {tuple(header.get_shape())}"
            )
