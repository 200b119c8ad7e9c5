"""The examples do what they say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinytrain_ext.demo import draw_task, save_images
from tinytrain_ext.network import Network

pytestmark = pytest.mark.all_cases

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, directory: Path) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_fine_tuning_in_pytorch(tmp_path):
    *losses, summary = run("finetune_in_pytorch.py", tmp_path).splitlines()
    values = [float(line.split()[1]) for line in losses]
    assert values[-1] < 0.5 * values[0]
    assert summary.startswith("trained ")
    state = torch.load(tmp_path / "finetuned.pt", weights_only=True)
    assert state["0.weight"].shape == (16, 3, 3, 3)


def test_an_own_model_on_the_device(tmp_path):
    save_images(draw_task(96, shots=3, queries=1), tmp_path)
    (tmp_path / "support").rename(tmp_path / "photos")
    assert "(" in run("own_model_on_the_device.py", tmp_path)
    network = Network.load(tmp_path / "my-photos.safetensors")
    assert network.name == "my-model"
    assert len(network.classes) == 5
    assert network.classifier is not None


def test_every_example_is_run():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == [
        "finetune_in_pytorch.py",
        "own_model_on_the_device.py",
    ]
