"""Networks as ONNX files: what onnxruntime computes from them."""

import json
import sys

import numpy as np
import pytest

from small_networks import FAMILIES, with_random_biases
from tasks import shapes_task, tiny_network
from tinytrain_ext import exporters
from tinytrain_ext.adapt import adapt, classify
from tinytrain_ext.cli import main
from tinytrain_ext.exporters import check_onnx, to_onnx
from tinytrain_ext.network import Classifier
from tinytrain_ext.selection import last_layer

WHY = "part of the [onnx] extra, which is not installed here"


@pytest.fixture(scope="module")
def adapted():
    """A network with classes, and a classifier beside."""
    network = with_random_biases(tiny_network(feature_mix=True))
    rng = np.random.default_rng(0)
    head = Classifier(
        rng.normal(size=(5, 64)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    )
    network = network.replace(classifier=head, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    images, labels = shapes_task()
    names = ("left", "right", "down")
    result = adapt(network, images, labels, policy=last_layer(network), iterations=2, classes=names)
    return result.network


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_run_elsewhere(family):
    pytest.importorskip("onnx", reason=WHY)
    pytest.importorskip("onnxruntime", reason=WHY)
    parity = check_onnx(FAMILIES[family], to_onnx(FAMILIES[family]))
    assert parity.differences.keys() == {"features"}
    assert parity.differences["features"] < 1e-4


def test_an_adapted_network_runs_elsewhere(adapted):
    pytest.importorskip("onnx", reason=WHY)
    runtime = pytest.importorskip("onnxruntime", reason=WHY)
    model = to_onnx(adapted)
    assert check_onnx(adapted, model).differences.keys() == {
        "features",
        "probabilities",
        "logits",
    }
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    images, _ = shapes_task(seed=9)
    (table,) = session.run(["probabilities"], {"images": images})
    np.testing.assert_allclose(table, classify(adapted, images).table, rtol=1e-3, atol=1e-5)
    described = session.get_modelmeta().custom_metadata_map
    assert json.loads(described["classes"]) == ["left", "right", "down"]
    assert json.loads(described["unknown_below"]) == adapted.unknown_below
    assert to_onnx(adapted) == model


def test_a_wrong_file_is_found_out(adapted):
    pytest.importorskip("onnx", reason=WHY)
    pytest.importorskip("onnxruntime", reason=WHY)
    other = adapted.replace(biases=tuple(bias + 0.1 for bias in adapted.biases))
    with pytest.raises(ArithmeticError, match="features: onnxruntime differs by"):
        check_onnx(adapted, to_onnx(other))


def test_the_command(adapted, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnx", reason=WHY)
    pytest.importorskip("onnxruntime", reason=WHY)
    source, target = tmp_path / "network.safetensors", tmp_path / "network.onnx"
    adapted.save(source)
    assert main(["export", str(source), "--onnx", str(target), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == target.stat().st_size
    assert max(found["differences"].values()) < 1e-4
    assert main(["export", str(source), "--onnx", str(target)]) == 0
    assert "probabilities (" in capsys.readouterr().out
    before = target.read_bytes()
    monkeypatch.setattr(exporters, "_TOLERANCE", -1.0)
    assert main(["export", str(source), "--onnx", str(target)]) == 1
    assert "tinytrain export: features: onnxruntime differs" in capsys.readouterr().err
    assert target.read_bytes() == before
    assert main(["export", str(tmp_path / "none"), "--onnx", str(target)]) == 2
    assert main(["export", str(source), "--onnx", str(tmp_path / "no" / "file")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["network.onnx", "network.safetensors"]


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_a_missing_extra_is_named(adapted, tmp_path, capsys, monkeypatch, missing):
    if missing == "onnxruntime":
        pytest.importorskip("onnx", reason=WHY)
    source = tmp_path / "network.safetensors"
    adapted.save(source)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["export", str(source), "--onnx", str(tmp_path / "network.onnx")]) == 2
    error = capsys.readouterr().err
    assert f"{missing} is not installed here: pip install 'tinytrain_ext[onnx]'" in error
    assert not (tmp_path / "network.onnx").exists()
