"""A network as an ONNX file, for runtimes that know nothing of this package (the [onnx] extra).

The graph begins with the pixels, normalisation within: `images`, uint8 (N, size, size, 3). Its
outputs are `features` (N, m), with prototypes also `probabilities` (N, ways) as `classify` gives
them, and with a classifier `logits` (N, K). `unknown_below` and the names of the classes are
metadata of the file.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .network import Network, Operation
from .protonet import probabilities

__all__ = ["Parity", "check_onnx", "to_onnx"]

# Old enough for any runtime in use, new enough for all that is needed.
_OPSET = 17
_IR_VERSION = 8
_PARITY_IMAGES = 4
_TOLERANCE = 1e-3  # of the largest value of an output: the two sum in different orders


@dataclass(frozen=True)
class Parity:
    """What a runtime's outputs differ by from this package's, on random images.

    differences: {output: largest difference, as a share of the output's largest value}.
    """

    runtime: str
    images: int
    differences: dict[str, float]


def to_onnx(network: Network) -> bytes:
    """The network as an ONNX model.

    Raises ImportError, saying what to install, where the package `onnx` is missing.
    """
    onnx = _needed("onnx")
    return bytes(_Builder(onnx, network).model().SerializeToString())


def check_onnx(network: Network, model: bytes, seed: int = 0) -> Parity:
    """Runs the model in onnxruntime and compares it with the network.

    Raises ImportError where onnxruntime is missing, ArithmeticError where an output differs by more
    than 0.1 % of its largest value.
    """
    runtime = _needed("onnxruntime")
    size = network.input_size
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (_PARITY_IMAGES, size, size, 3), dtype=np.uint8)
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {"images": images}), strict=True))
    expected = _outputs(network, images)
    differences = {}
    for name, wanted in expected.items():
        largest = float(np.abs(wanted).max()) or 1.0
        differences[name] = float(np.abs(found[name] - wanted).max()) / largest
        if not differences[name] <= _TOLERANCE:
            raise ArithmeticError(
                f"{name}: onnxruntime differs by {differences[name]:.3g} of the largest value"
            )
    return Parity(f"onnxruntime {runtime.__version__}", len(images), differences)


def _outputs(network: Network, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    features = network.embed(images)
    outputs: dict[str, NDArray[Any]] = {"features": features}
    if network.prototypes is not None:
        outputs["probabilities"] = probabilities(
            features.astype(np.float64), network.prototypes, network.logit_scale
        )
    if network.classifier is not None:
        outputs["logits"] = network.classifier.logits(features)
    return outputs


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{package} is not installed here: pip install 'tinytrain_ext[onnx]'"
        ) from error


class _Builder:
    def __init__(self, onnx: Any, network: Network) -> None:
        self.onnx, self.network = onnx, network
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def model(self) -> Any:
        helper, network = self.onnx.helper, self.network
        size, kinds = network.input_size, self.onnx.TensorProto
        outputs = [("features", network.feature_dim)]
        self._features()
        if network.prototypes is not None:
            self._probabilities(network.prototypes)
            outputs.append(("probabilities", len(network.classes)))
        if network.classifier is not None:
            weight = self._constant("classifier.weight", network.classifier.weight)
            bias = self._constant("classifier.bias", network.classifier.bias)
            self._node("Gemm", ["features", weight, bias], "logits", transB=1)
            outputs.append(("logits", len(network.classifier.bias)))
        graph = helper.make_graph(
            self.nodes,
            network.name,
            [helper.make_tensor_value_info("images", kinds.UINT8, ["N", size, size, 3])],
            [helper.make_tensor_value_info(name, kinds.FLOAT, ["N", n]) for name, n in outputs],
            self.initializers,
        )
        model = helper.make_model(
            graph,
            producer_name="tinytrain_ext",
            ir_version=_IR_VERSION,
            opset_imports=[helper.make_opsetid("", _OPSET)],
        )
        described: dict[str, object] = {"resize": network.resize, "input_size": size}
        if network.prototypes is not None:
            described |= {"classes": network.classes, "unknown_below": network.unknown_below}
        if network.classifier is not None:
            described["classifier_classes"] = network.classifier.classes
        helper.set_model_props(model, {key: json.dumps(value) for key, value in described.items()})
        self.onnx.checker.check_model(model)
        return model

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(
            self.onnx.helper.make_node(kind, inputs, [output], name=output, **attributes)
        )
        return output

    def _constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        array = np.ascontiguousarray(value, dtype).reshape(np.shape(value))
        self.initializers.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def _features(self) -> None:
        network = self.network
        floats = self._node("Cast", ["images"], "pixels", to=self.onnx.TensorProto.FLOAT)
        planes = self._node("Transpose", [floats], "planes", perm=[0, 3, 1, 2])
        std, mean = (np.reshape(values, (1, 3, 1, 1)) for values in (network.std, network.mean))
        scaled = self._node("Mul", [planes, self._constant("scale", 1 / (255 * std))], "scaled")
        tensors = [self._node("Add", [scaled, self._constant("offset", -mean / std)], "tensor.0")]
        layers = self._layers()
        for number, operation in enumerate(network.operations, start=1):
            inputs = [tensors[tensor] for tensor in operation.inputs]
            tensors.append(self._operation(operation, inputs, f"tensor.{number}", layers))
        self._node("Flatten", [tensors[-1]], "features", axis=1)

    def _layers(self) -> Iterator[list[str]]:
        """The names of each layer's weight and bias."""
        layers = zip(self.network.weights, self.network.biases, strict=True)
        for number, (weight, bias) in enumerate(layers):
            yield [
                self._constant(f"layer.{number}.weight", weight),
                self._constant(f"layer.{number}.bias", bias),
            ]

    def _operation(
        self, o: Operation, inputs: list[str], output: str, layers: Iterator[list[str]]
    ) -> str:
        window = {
            "kernel_shape": [o.kernel] * 2,
            "strides": [o.stride] * 2,
            "pads": [o.padding] * 4,
        }
        target = output if o.activation == "none" else f"{output}.sum"
        match o.kind:
            case "conv":
                self._node("Conv", inputs + next(layers), target, group=o.groups, **window)
            case "add":
                self._node("Add", inputs, target)
            case "max_pool":
                self._node("MaxPool", inputs, target, **window)
            case "average_pool":  # the mean of the window's pixels inside the image, by default
                self._node("AveragePool", inputs, target, **window)
            case "global_average_pool":
                self._node("GlobalAveragePool", inputs, target)
        if o.activation == "relu":
            self._node("Relu", [target], output)
        elif o.activation == "relu6":
            bounds = [self._constant(f"{output}.{b}", b) for b in (0, 6)]
            self._node("Clip", [target, *bounds], output)
        return output

    def _probabilities(self, prototypes: NDArray[np.float32]) -> None:
        """Eq. 1: softmax of scale * cosine."""
        norms = np.linalg.norm(prototypes, axis=1, keepdims=True)
        units = self.network.logit_scale * prototypes / np.where(norms > 0, norms, 1)
        length = self._node("ReduceL2", ["features"], "length", axes=[1], keepdims=1)
        positive = self._node("Max", [length, self._constant("tiny", 1e-12)], "positive")
        direction = self._node("Div", ["features", positive], "direction")
        logits = self._node("MatMul", [direction, self._constant("prototypes", units.T)], "cosines")
        self._node("Softmax", [logits], "probabilities", axis=1)
