"""The parent's side: a peer in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLUMNS", "Peer", "available"]

ROOT = Path(__file__).parents[2]
# column: (environment that install.sh makes, None for this one; module; its argument)
COLUMNS: dict[str, tuple[str | None, str, str]] = {
    "torch eager": (None, "torch_peer", "eager"),
    "best torch": (None, "torch_peer", "best"),
    "onnxruntime": ("onnxruntime", "onnxruntime_peer", ""),
    # Before LiteRT, which reads what TensorFlow exports.
    "tensorflow": ("tensorflow", "tensorflow_peer", ""),
    "litert": ("litert", "litert_peer", ""),
}


def available(environments: Path | None) -> list[str]:
    """The columns whose frameworks are installed."""
    return [
        column
        for column, (environment, _, _) in COLUMNS.items()
        if environment is None
        or (environments is not None and (environments / environment / "bin/python").exists())
    ]


class Peer:
    """One column; `load` gives it a job, `results` and what it times are about that job."""

    def __init__(self, column: str, environments: Path | None, folder: Path) -> None:
        environment, module, argument = COLUMNS[column]
        python = Path(sys.executable)
        if environment is not None:
            assert environments is not None
            python = environments.absolute() / environment / "bin/python"
        self.column, self._folder = column, folder
        self._log = (folder / f"{column}.log").open("w+")
        variables = dict(os.environ, OMP_NUM_THREADS="1", TFLITE_MODEL=str(folder / "model.tflite"))
        self._process = subprocess.Popen(
            [python, "-m", f"{__package__}.{module}", argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=variables,
        )
        self.version = str(self._ask(version=True)["version"])

    def load(self, job: Path) -> dict[str, Callable[[int], float]]:
        """Seconds of a call as a function of the number of repeats, for each row it can do."""
        calls = self._ask(load=str(job))["calls"]
        return {name: partial(self._seconds, name) for name in calls}

    def results(self) -> dict[str, NDArray[Any]]:
        """What the job's weights, not yet trained, give (see `Backend.results`)."""
        path = self._folder / "results.npz"
        self._ask(results=str(path))
        with np.load(path) as file:
            return dict(file)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()

    def _seconds(self, name: str, repeats: int) -> float:
        return float(self._ask(run=name, repeats=repeats)["seconds"])

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"{self.column} ended:\n{self._log.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer
