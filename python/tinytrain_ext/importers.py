"""Reading networks other projects publish: the int8 release files of mit-han-lab/tiny-training.

Such a file is a zip with one pickle of plain dicts and NumPy arrays. Files are untrusted input, and
unpickling runs what the pickle names; so the unpickler here admits the four names these files use,
and each of them is a stand-in of our own: not even NumPy's own unpickling code sees the file's
data.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .architectures import architecture_of, random_weights
from .network import Network, Operation, open_at_once

__all__ = ["import_int8"]

MEMBER = "archive/data.pkl"
# The largest of the three published files holds 1.0 MB.
MAX_FILE_BYTES = 1 << 26
MAX_PICKLE_BYTES = 1 << 25

_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("_codecs", "encode"),
}
_DTYPES: dict[object, np.dtype[Any]] = {
    "i1": np.dtype(np.int8),
    "i4": np.dtype("<i4"),
    "f4": np.dtype("<f4"),
}


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, name: object, align: object = False, copy: object = False) -> None:
        if name not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, got {name!r}")
        self.dtype = _DTYPES[name]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|"):
            raise ValueError(f"byte order: expected little endian, got {state[1]!r}")


class _Array:
    """Stands in for numpy.ndarray; holds the array once its state has been set."""

    array: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran_order, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise TypeError("array: expected a dtype and bytes")
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise ValueError(f"array: {len(data)} bytes do not fill shape {shape}")
        self.array = np.frombuffer(data, dtype.dtype).reshape(
            shape, order="F" if fortran_order else "C"
        )


class _Unpickler(pickle._Unpickler):
    """Admits the four names of the release files, as stand-ins, and refuses anything else.

    Of the two unpicklers the one in Python: the one in C lets ten bytes of pickle claim gigabytes
    (its memo is an array as long as the largest index in the file).
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._encodable = len(data)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(f"refused global {module}.{name}")
        return {
            "_reconstruct": self._reconstruct,
            "dtype": _Dtype,
            "ndarray": _Array,
            "encode": self._encode,
        }[name]

    def _reconstruct(self, kind: object, shape: object, typecode: object) -> _Array:
        return _Array()

    def _encode(self, text: str, encoding: str) -> bytes:
        # A pickle may encode one string any number of times; an honest one encodes each once.
        self._encodable -= len(text)
        if encoding != "latin1" or self._encodable < 0:
            raise ValueError(f"_codecs.encode: refused {len(text)} characters as {encoding!r}")
        return text.encode("latin1")


def import_int8(
    path: str | os.PathLike[str],
    *,
    feature_mix: Literal["random"] | None = None,
    seed: int = 0,
) -> Network:
    """Reads an int8 release file, dequantised to float32, without its classifier.

    feature_mix: "random" appends the architecture's feature-mix convolution, which the public
    files lack, He-initialised from `seed`: the network whose costs the paper's tables count.

    Raises OSError when the file cannot be read and ValueError naming the file and what is wrong.
    """
    try:
        description = _read_pickle(Path(path))
        network = _network(description, Path(path).stem)
        return network if feature_mix is None else _with_feature_mix(network, seed)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _read_pickle(path: Path) -> Any:
    with open_at_once(path) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("expected a regular file")
        size = status.st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"file size: expected at most {MAX_FILE_BYTES} bytes, got {size}")
        try:
            with zipfile.ZipFile(file) as archive, archive.open(MEMBER) as member:
                # The size a zip declares may be a lie, so the cap is put on what is read.
                data = member.read(MAX_PICKLE_BYTES + 1)
        except OSError:
            raise
        # Damage shows as BadZipFile, KeyError, zlib.error, NotImplementedError, RuntimeError,
        # EOFError.
        except Exception as error:
            raise ValueError(f"not a sound zip holding {MEMBER}: {error}") from error
    if len(data) > MAX_PICKLE_BYTES:
        raise ValueError(f"{MEMBER}: expected at most {MAX_PICKLE_BYTES} bytes")
    try:
        return _Unpickler(data).load()
    # A damaged pickle can fail in any way its opcodes can.
    except Exception as error:
        raise ValueError(f"{MEMBER}: {str(error) or type(error).__name__}") from error


def _network(description: Any, name: str) -> Network:
    graph: list[Operation] = []
    weights: list[NDArray[np.float32]] = []
    biases: list[NDArray[np.float32]] = []

    def convolution(where: str, values: Any, block: int | None = None) -> None:
        operation, weight, bias = _convolution(where, values, len(graph), block)
        graph.append(operation)
        weights.append(weight)
        biases.append(bias)

    convolution("first_conv", _field("file", description, "first_conv", dict))
    input_size = _field("first_conv", description["first_conv"], "in_shape", int)
    for number, block in enumerate(_field("file", description, "blocks", list)):
        where = f"blocks[{number}]"
        entry = len(graph)
        for part in ("pointwise1", "depthwise", "pointwise2"):
            values = _field(where, block, part, (dict, type(None)))
            if values is not None:
                convolution(f"{where}.{part}", values, number)
            elif part != "pointwise1":
                raise ValueError(f"{where}.{part}: expected a convolution, got None")
        if _field(where, block, "se", object) is not None:
            raise ValueError(f"{where}.se: squeeze-and-excitation is not supported")
        if _field(where, block, "residual", object) is not None:
            graph.append(Operation(kind="add", inputs=(entry, len(graph)), block=number))
    mix = _field("file", description, "feature_mix", (dict, type(None)))
    if mix is not None:
        convolution("feature_mix", mix)
    graph.append(Operation(kind="global_average_pool", inputs=(len(graph),)))
    architecture = architecture_of(tuple(graph))
    return Network(
        name=architecture.name if architecture else name,
        operations=tuple(graph),
        weights=tuple(weights),
        biases=tuple(biases),
        input_size=input_size,
        resize=round(input_size * 8 / 7),
    )


def _convolution(
    where: str, values: Mapping[str, Any], source: int, block: int | None
) -> tuple[Operation, NDArray[np.float32], NDArray[np.float32]]:
    """The operation and the dequantised weight and bias of one convolution of the file."""
    out_channels = _field(where, values, "out_channel", int)
    kernel_size = _field(where, values, "kernel_size", tuple)
    if len(kernel_size) != 2 or kernel_size[0] != kernel_size[1] or type(kernel_size[0]) is not int:
        raise ValueError(f"{where}.kernel_size: expected a square, got {kernel_size}")
    if _field(where, values, "act", object) is not None:
        raise ValueError(f"{where}.act: expected None, got {values['act']!r}")
    params = _field(where, values, "params", dict)
    # ReLU6 is not written down: it is where the quantised output range begins at zero.
    rectified = _field(f"{where}.params", params, "y_zero", int) == -128
    operation = Operation(
        kind="conv",
        inputs=(source,),
        activation="relu6" if rectified else "none",
        in_channels=_field(where, values, "in_channel", int),
        out_channels=out_channels,
        kernel=kernel_size[0],
        stride=_field(where, values, "stride", int),
        padding=(kernel_size[0] - 1) // 2,
        groups=_field(where, values, "groups", int),
        block=block,
    )
    where += ".params"
    quantised = _array(where, params, "weight", np.int8)
    scales = _array(where, params, "w_scales", np.float32)
    bias = _array(where, params, "bias", np.int32)
    if quantised.ndim != 4 or scales.shape != (len(quantised),) or bias.shape != scales.shape:
        raise ValueError(
            f"{where}: expected weight (O, C, K, K), w_scales (O,), bias (O,), got "
            f"{quantised.shape}, {scales.shape}, {bias.shape}"
        )
    x_scale = _field(where, params, "x_scale", float)
    with np.errstate(over="ignore", invalid="ignore"):  # Network refuses what is not finite
        weight = quantised * scales[:, None, None, None]
        real_bias = (bias * scales.astype(np.float64) * x_scale).astype(np.float32)
    return operation, weight, real_bias


def _field(where: str, values: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(values, dict) or name not in values:
        raise ValueError(f"{where}: {name} is missing")
    value = values[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{where}.{name}: unexpected {type(value).__name__}")
    return value


def _array(where: str, values: Any, name: str, dtype: type) -> NDArray[Any]:
    array: NDArray[Any] | None = _field(where, values, name, _Array).array
    if array is None or array.dtype != dtype:
        got = "nothing" if array is None else array.dtype
        raise TypeError(f"{where}.{name}: expected {np.dtype(dtype)}, got {got}")
    return array


def _with_feature_mix(network: Network, seed: int) -> Network:
    architecture = architecture_of(network.operations)
    if architecture is None or architecture.feature_mix is None:
        raise ValueError(f"feature_mix: {network.name} has none in the published tables")
    *graph, pool = network.operations
    if graph[-1].block is None:
        raise ValueError("feature_mix: the file already holds one")
    mix = Operation(
        kind="conv",
        inputs=pool.inputs,
        activation="relu6",
        in_channels=network.feature_dim,
        out_channels=architecture.feature_mix,
    )
    pool = Operation(kind="global_average_pool", inputs=(len(graph) + 1,))
    # random_weights looks at the whole graph to see what is rectified; only the last layer is used.
    weight = random_weights((*graph, mix), np.random.default_rng(seed))[-1]
    return network.replace(
        operations=(*graph, mix, pool),
        weights=(*network.weights, weight),
        biases=(*network.biases, np.zeros(architecture.feature_mix, np.float32)),
    )
