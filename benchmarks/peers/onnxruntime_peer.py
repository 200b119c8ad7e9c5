"""onnxruntime-training: gradients and optimiser as ONNX graphs, BatchNorm folded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.training import artifacts
from onnxruntime.training.api import CheckpointState, Module, Optimizer

from .job import LEARNING_RATE, SCALE, Job, class_prototypes, serve

OPSET = 15


def onnx_model(job: Job, loss: bool) -> Any:
    """Images (N, 3, H, W) to features (N, m), or with labels and prototypes to the mean loss."""
    nodes, constants, layer = [], [], 0

    def constant(name: str, values: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    low, high = constant("low", np.float32(0)), constant("high", np.float32(6))
    names = ["images"]
    for number, op in enumerate(job.operations):
        inputs, output = [names[i] for i in op["inputs"]], f"t{number}"
        if op["kind"] == "conv":
            weight = constant(f"weight{layer}", job.weights[layer])
            bias = constant(f"bias{layer}", job.biases[layer])
            layer += 1
            nodes.append(
                helper.make_node(
                    "Conv",
                    [*inputs, weight, bias],
                    [output],
                    kernel_shape=[op["kernel"]] * 2,
                    strides=[op["stride"]] * 2,
                    pads=[op["padding"]] * 4,
                    group=op["groups"],
                )
            )
            if op["activation"] == "relu6":
                nodes.append(helper.make_node("Clip", [output, low, high], [f"a{number}"]))
                output = f"a{number}"
        elif op["kind"] == "add":
            nodes.append(helper.make_node("Add", inputs, [output]))
        else:
            nodes.append(helper.make_node("GlobalAveragePool", inputs, ["pooled"]))
            shape = constant("flat", np.array([len(job.images), -1], np.int64))
            nodes.append(helper.make_node("Reshape", ["pooled", shape], ["features"]))
            output = "features"
        names.append(output)
    count, size, _, channels = job.images.shape
    width = job.prototypes.shape[1]
    graph_inputs = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, [count, channels, size, size])
    ]
    output_info = helper.make_tensor_value_info("features", TensorProto.FLOAT, [count, width])
    if loss:
        graph_inputs += [
            helper.make_tensor_value_info("directions", TensorProto.FLOAT, [width, "ways"]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, [count]),
        ]
        axes = constant("axes", np.array([1], np.int64))
        scale = constant("scale", np.float32(SCALE))
        nodes += [
            helper.make_node("Mul", ["features", "features"], ["squares"]),
            helper.make_node("ReduceSum", ["squares", axes], ["sum"], keepdims=1),
            helper.make_node("Sqrt", ["sum"], ["norm"]),
            helper.make_node("Div", ["features", "norm"], ["unit"]),
            helper.make_node("MatMul", ["unit", "directions"], ["cosines"]),
            helper.make_node("Mul", ["cosines", scale], ["logits"]),
            # The second output is for the gradient.
            helper.make_node("SoftmaxCrossEntropyLoss", ["logits", "labels"], ["loss", "log"]),
        ]
        output_info = helper.make_tensor_value_info("loss", TensorProto.FLOAT, [])
    graph = helper.make_graph(nodes, "network", graph_inputs, [output_info], constants)
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8)


def one_thread() -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


class Row:
    """A network with some layers trained."""

    def __init__(self, job: Job, trained: list[int], forward: Callable[[], NDArray[Any]]) -> None:
        self.job, self.trained, self.forward = job, trained, forward
        layers = range(len(job.weights))
        with tempfile.TemporaryDirectory() as folder:
            artifacts.generate_artifacts(
                onnx_model(job, loss=True),
                requires_grad=[f"weight{layer}" for layer in trained],
                frozen_params=[f"weight{layer}" for layer in layers if layer not in trained]
                + [f"bias{layer}" for layer in layers],
                optimizer=artifacts.OptimType.SGD,
                artifact_directory=folder,
            )
            self.state = CheckpointState.load_checkpoint(str(Path(folder, "checkpoint")))
            self.module = Module(
                str(Path(folder, "training_model.onnx")), self.state, session_options=one_thread()
            )
            self.optimizer = Optimizer(str(Path(folder, "optimizer_model.onnx")), self.module)
        self.optimizer.set_learning_rate(LEARNING_RATE)
        self.module.train()
        self.x = ort.OrtValue.ortvalue_from_numpy(images(job))
        self.labels = ort.OrtValue.ortvalue_from_numpy(job.labels)
        self.set_prototypes(job.prototypes)

    def set_prototypes(self, prototypes: NDArray[np.float32]) -> None:
        directions = np.ascontiguousarray(prototypes.T)
        self.prototypes = ort.OrtValue.ortvalue_from_numpy(directions)

    def step(self) -> None:
        self.module(self.x, self.prototypes, self.labels)
        self.optimizer.step()
        self.module.lazy_reset_grad()

    def iteration(self) -> None:
        """A step, then the prototypes of the batch itself, which serves as a support set."""
        self.step()
        self.set_prototypes(class_prototypes(self.forward(), self.job.labels))

    def gradients(self) -> dict[int, NDArray[Any]]:
        """Of the weights as they are."""
        self.module(self.x, self.prototypes, self.labels)
        return {
            layer: self.state.parameters[f"weight{layer}"].grad.copy() for layer in self.trained
        }


def images(job: Job) -> NDArray[np.float32]:
    return np.ascontiguousarray(job.normalised().transpose(0, 3, 1, 2))


class OnnxRuntime:
    """The column."""

    version = ort.__version__

    def load(self, job: Job) -> dict[str, Callable[[], object]]:
        self.job = job
        model = onnx_model(job, loss=False).SerializeToString()
        providers = ["CPUExecutionProvider"]
        self.session = ort.InferenceSession(model, one_thread(), providers=providers)
        self.x = images(job)
        self.rows = {name: Row(job, layers, self.forward) for name, layers in job.trained.items()}
        # Before any step: afterwards the weights are others.
        self.computed = {
            f"{name} step/{layer}": gradient
            for name, row in self.rows.items()
            for layer, gradient in row.gradients().items()
        }
        calls: dict[str, Callable[[], object]] = {"forward": self.forward}
        for name, row in self.rows.items():
            row.module.lazy_reset_grad()
            calls[f"{name} step"], calls[f"{name} iteration"] = row.step, row.iteration
        return calls

    def forward(self) -> NDArray[Any]:
        features: NDArray[Any] = self.session.run(None, {"images": self.x})[0]
        return features

    def results(self) -> dict[str, NDArray[Any]]:
        return {"features": self.forward(), **self.computed}


if __name__ == "__main__":
    serve(OnnxRuntime())
