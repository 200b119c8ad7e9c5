"""LiteRT with XNNPACK: inference only. Reads the model that the TensorFlow peer exports."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from .job import Job, serve


class LiteRT:
    """The forward pass of a .tflite file."""

    version = metadata.version("ai-edge-litert")

    def load(self, job: Job) -> dict[str, Callable[[], object]]:
        self.interpreter = Interpreter(os.environ["TFLITE_MODEL"], num_threads=1)
        self.interpreter.allocate_tensors()
        place = self.interpreter.get_input_details()[0]["index"]
        self.interpreter.set_tensor(place, job.normalised())
        return {"forward": self.interpreter.invoke}

    def results(self) -> dict[str, NDArray[Any]]:
        self.interpreter.invoke()
        output = self.interpreter.get_output_details()[0]["index"]
        return {"features": self.interpreter.get_tensor(output)}


if __name__ == "__main__":
    serve(LiteRT())
