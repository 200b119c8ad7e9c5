"""What a peer is asked to do, in a file; and the loop in which a peer's process answers.

Runs in every peer's environment, so it needs NumPy only, and nothing of tinytrain_ext. The parent
writes one JSON object a line and reads one:

    {"version": true}                 -> {"version": of the framework}
    {"load": FILE}                    -> {"calls": [NAME, ...]}
    {"run": NAME, "repeats": N}       -> {"seconds": CPU seconds of the process for one call}
    {"results": FILE}                 -> {} once FILE (npz) holds what the peer computes
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["SCALE", "Backend", "Job", "class_prototypes", "serve"]

SCALE = 10.0
LEARNING_RATE = 1e-6


@dataclass(frozen=True, eq=False)
class Job:
    """A network, a batch, and the layers whose weights each kind of step trains.

    operations: as in a Network, one dict each; weights, biases: of the convolutions, (O, C/groups,
    k, k) and (O,); images: (N, H, W, 3) uint8; labels: (N,); prototypes: (ways, m);
    trained: {row: layers}; inspected: layers with Fisher sums; in the order of the convolutions.
    """

    operations: list[dict[str, Any]]
    weights: list[NDArray[np.float32]]
    biases: list[NDArray[np.float32]]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    prototypes: NDArray[np.float32]
    trained: dict[str, list[int]]
    inspected: list[int]

    def normalised(self) -> NDArray[np.float32]:
        """The images in [-1, 1]: what the peers are given."""
        return self.images.astype(np.float32) / np.float32(127.5) - np.float32(1)

    def save(self, path: Path) -> None:
        """Writes the job for `load`."""
        arrays: dict[str, Any] = {
            f"weight{layer}": weight for layer, weight in enumerate(self.weights)
        }
        arrays |= {f"bias{layer}": bias for layer, bias in enumerate(self.biases)}
        text = json.dumps([self.operations, self.trained, self.inspected])
        with path.open("wb") as file:
            np.savez(
                file,
                images=self.images,
                labels=self.labels,
                prototypes=self.prototypes,
                text=np.array(text),
                **arrays,
            )

    @classmethod
    def load(cls, path: Path) -> Job:
        """The job that `save` wrote."""
        with np.load(path) as file:
            operations, trained, inspected = json.loads(str(file["text"]))
            count = sum(operation["kind"] == "conv" for operation in operations)
            return cls(
                operations,
                [file[f"weight{layer}"] for layer in range(count)],
                [file[f"bias{layer}"] for layer in range(count)],
                file["images"],
                file["labels"],
                file["prototypes"],
                trained,
                inspected,
            )


def class_prototypes(features: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[Any]:
    """(ways, m): direction of each class's mean feature."""
    means = np.stack([features[labels == way].mean(0) for way in range(int(labels.max()) + 1)])
    directions: NDArray[Any] = means / np.linalg.norm(means, axis=1, keepdims=True)
    return directions


class Backend(Protocol):
    """A framework: what `serve` needs of it."""

    @property
    def version(self) -> str:
        """Of the framework."""

    def load(self, job: Job) -> dict[str, Callable[[], object]]:
        """Gets ready; what can be timed, by row."""

    def results(self) -> dict[str, NDArray[Any]]:
        """ "features" (N, m); "ROW/LAYER": gradients, like the weights; "fisher/LAYER": (O,)."""


def serve(backend: Backend) -> None:
    """Answers the parent until it closes the pipe."""
    # What frameworks print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    calls: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "version" in request:
            answer["version"] = backend.version
        elif "load" in request:
            calls = backend.load(Job.load(Path(request["load"])))
            answer["calls"] = sorted(calls)
        elif "run" in request:
            call = calls[request["run"]]
            start = time.process_time()
            for _ in range(request["repeats"]):
                call()
            answer["seconds"] = (time.process_time() - start) / request["repeats"]
        else:
            with Path(request["results"]).open("wb") as file:
                np.savez(file, **backend.results())  # type: ignore[arg-type]
        print(json.dumps(answer), file=answers, flush=True)
