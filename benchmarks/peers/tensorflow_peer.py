"""TensorFlow: a traced function for each kind of step, NHWC, BatchNorm folded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from .job import LEARNING_RATE, SCALE, Job, class_prototypes, serve


def network(job: Job, x: Any, weights: list[Any], biases: list[NDArray[np.float32]]) -> Any:
    """The features (N, m) of x (N, H, W, 3)."""
    tensors, layer = [x], 0
    for op in job.operations:
        y = tensors[op["inputs"][0]]
        if op["kind"] == "conv":
            stride, padding = op["stride"], "SAME"
            if stride > 1:  # SAME pads otherwise than the published networks do
                p, padding = op["padding"], "VALID"
                y = tf.pad(y, [[0, 0], [p, p], [p, p], [0, 0]])
            convolve = tf.nn.conv2d if op["groups"] == 1 else tf.nn.depthwise_conv2d
            strides = [1, stride, stride, 1]
            y = tf.nn.bias_add(convolve(y, weights[layer], strides, padding), biases[layer])
            layer += 1
            if op["activation"] == "relu6":
                y = tf.nn.relu6(y)
        elif op["kind"] == "add":
            y = y + tensors[op["inputs"][1]]
        else:
            y = tf.reduce_mean(y, axis=[1, 2])
        tensors.append(y)
    return tensors[-1]


class Row:
    """A network with some layers trained; each row has weights of its own."""

    def __init__(self, job: Job, trained: list[int]) -> None:
        self.job, self.trained = job, trained
        convolutions = [op for op in job.operations if op["kind"] == "conv"]
        self.axes = [(2, 3, 1, 0) if op["groups"] == 1 else (2, 3, 0, 1) for op in convolutions]
        weights = [w.transpose(axes) for w, axes in zip(job.weights, self.axes, strict=True)]
        self.weights = [
            tf.Variable(w) if layer in trained else tf.constant(w)
            for layer, w in enumerate(weights)
        ]
        self.x = tf.constant(job.normalised())
        self.labels = tf.constant(job.labels)
        self.prototypes = tf.Variable(job.prototypes, shape=(None, job.prototypes.shape[1]))
        self.forward = tf.function(self._forward)
        self.gradients = tf.function(self._gradients)
        self.step = tf.function(self._step)

    def _forward(self) -> Any:
        return network(self.job, self.x, self.weights, self.job.biases)

    def _gradients(self) -> Any:
        with tf.GradientTape() as tape:
            features = tf.math.l2_normalize(self._forward(), axis=1)
            logits = SCALE * tf.matmul(features, self.prototypes, transpose_b=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(self.labels, logits)
            loss = tf.reduce_mean(losses)
        return tape.gradient(loss, [self.weights[layer] for layer in self.trained])

    def _step(self) -> None:
        for layer, gradient in zip(self.trained, self._gradients(), strict=True):
            self.weights[layer].assign_sub(LEARNING_RATE * gradient)

    def iteration(self) -> None:
        """A step, then the prototypes of the batch itself, which serves as a support set."""
        self.step()
        self.prototypes.assign(class_prototypes(self.forward().numpy(), self.job.labels))


class TensorFlow:
    """The column; TFLITE_MODEL names the file the forward pass is exported to."""

    version = tf.__version__

    def __init__(self) -> None:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)

    def load(self, job: Job) -> dict[str, Callable[[], object]]:
        self.job = job
        self.frozen = Row(job, [])
        self._export(Path(os.environ["TFLITE_MODEL"]))
        calls: dict[str, Callable[[], object]] = {"forward": self.frozen.forward}
        for name, layers in job.trained.items():
            calls[f"{name} step"] = Row(job, layers).step
            calls[f"{name} iteration"] = Row(job, layers).iteration
        return calls

    def results(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {"features": self.frozen.forward().numpy()}
        for name, layers in self.job.trained.items():
            row = Row(self.job, layers)
            for layer, gradient in zip(layers, row.gradients(), strict=True):
                back = np.argsort(row.axes[layer])
                arrays[f"{name} step/{layer}"] = gradient.numpy().transpose(back)
        return arrays

    def _export(self, path: Path) -> None:
        signature = tf.TensorSpec(self.job.images.shape, tf.float32)

        def forward(x: Any) -> Any:
            return network(self.job, x, self.frozen.weights, self.job.biases)

        concrete = tf.function(forward).get_concrete_function(signature)
        converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete])
        path.write_bytes(converter.convert())


if __name__ == "__main__":
    serve(TensorFlow())
