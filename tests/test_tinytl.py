"""TinyTL: its modules, what trains, what it costs, and its place among the other methods."""
# ruff: noqa: E402 (without torch the imports below would fail instead of skipping)

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from small_networks import FAMILIES, with_random_biases
from tasks import shapes_task, tiny_network
from tinytrain_ext.adapt import adapt
from tinytrain_ext.cost import profile
from tinytrain_ext.datasets import cached_images, open_image_set
from tinytrain_ext.errors import NonFiniteError
from tinytrain_ext.evaluate import Domain, Method, Rows, evaluate, merged_rows, read_rows
from tinytrain_ext.images import Augmentation
from tinytrain_ext.network import Network
from tinytrain_ext.offline import tinytl
from tinytrain_ext.offline.tinytl import TinyTL, adapt_tinytl, load_modules
from tinytrain_ext.protonet import compute_prototypes, cosine_logits
from tinytrain_ext.selection import UpdatePolicy, last_layer
from tinytrain_ext.session import Session
from tinytrain_ext.views import Views

pytestmark = pytest.mark.all_cases


@pytest.fixture(scope="module")
def network() -> Network:
    return with_random_biases(tiny_network(feature_mix=True))


@pytest.fixture(scope="module")
def task() -> tuple[np.ndarray, np.ndarray]:
    return shapes_task(ways=5, shots=4)


def test_untrained_it_is_the_network(network: Network, task: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = task
    expected = network.embed(images)
    assert np.abs(TinyTL(network).embed(images) - expected).max() < 1e-4 * np.abs(expected).max()
    result = adapt_tinytl(network, images, labels, iterations=0, learning_rate=1e-3)
    none = adapt(network, images, labels, policy=UpdatePolicy()).network.prototypes
    assert np.abs(result.prototypes - none).max() < 1e-5
    assert result.history == ()


def test_it_learns() -> None:
    images, labels = shapes_task(ways=5, shots=4, seed=0)
    queries, targets = shapes_task(ways=5, shots=8, seed=1)

    def trained(iterations: int) -> tuple[float, list[float]]:
        result = adapt_tinytl(
            tiny_network(),
            images,
            labels,
            iterations=iterations,
            learning_rate=1e-2,
            views=Views(2),
        )
        logits = cosine_logits(result.model.embed(queries), result.prototypes, 1.0)
        accuracy = float((logits.argmax(axis=1) == targets).mean())
        return accuracy, [iteration.loss for iteration in result.history]

    before, _ = trained(0)
    after, losses = trained(15)
    assert losses[-1] < 0.7 * losses[0]
    assert after > before + 0.05


@pytest.mark.parametrize("biases", [False, True])
def test_modules_train_and_the_backbone_s_weights_do_not(
    network: Network, task: tuple[np.ndarray, np.ndarray], biases: bool
) -> None:
    before = TinyTL(network, biases=biases, seed=3).state_dict()
    result = adapt_tinytl(network, *task, iterations=2, learning_rate=1e-2, biases=biases, seed=3)
    after = result.model.state_dict()
    for name, value in before.items():
        trained = name.startswith("residuals.") or (biases and name.endswith(".bias"))
        # ReLU6 may cut off all gradients of a bias: most move, not each of them.
        assert not trained or not torch.equal(value, after[name]), name
        assert trained or torch.equal(value, after[name]), name


def test_gradients_do_not_depend_on_chunks(
    network: Network, task: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses() -> list[float]:
        result = adapt_tinytl(network, *task, iterations=3, learning_rate=1e-3, views=Views(2))
        return [iteration.loss for iteration in result.history]

    whole = losses()
    monkeypatch.setattr(tinytl, "CHUNK", 3)
    assert losses() == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("views", [None, Views(2), Views(2, cache_bytes=0)])
def test_views_are_those_of_adapt(
    network: Network,
    task: tuple[np.ndarray, np.ndarray],
    views: Views | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: dict[str, list[np.ndarray]] = {"ours": [], "theirs": []}
    real_prefix, real_backward = tinytl._Pixels.prefix, Session.proto_backward

    def prefix(self: Any, images: Any, augmentation: Augmentation, *rest: Any) -> Any:
        drawn["ours"].append(augmentation.parameters)
        return real_prefix(self, images, augmentation, *rest)

    def backward(self: Any, images: Any, labels: Any, augmentation: Any, **options: Any) -> Any:
        drawn["theirs"].append(augmentation.parameters)
        return real_backward(self, images, labels, augmentation, **options)

    monkeypatch.setattr(tinytl._Pixels, "prefix", prefix)
    monkeypatch.setattr(Session, "proto_backward", backward)
    iterations = 2 if views else 3  # cached views are drawn once
    options: dict[str, Any] = {"iterations": iterations, "learning_rate": 1e-3, "seed": 7}
    adapt_tinytl(network, *task, views=views, **options)
    adapt(network, *task, policy=last_layer(network), views=views, **options)
    assert len(drawn["ours"]) == iterations
    assert np.array_equal(drawn["ours"], drawn["theirs"])


@pytest.mark.parametrize("biases", [False, True])
def test_costs_are_those_of_what_runs(network: Network, biases: bool) -> None:
    model = TinyTL(network, biases=biases)
    macs: list[int] = []
    saved: list[float] = []

    def convolution(module: Any, inputs: Any, output: Any) -> None:
        macs.append(module.weight.numel() * math.prod(output.shape[2:]))
        saved.append(4 * inputs[0].numel())

    def norm(module: Any, inputs: Any, output: Any) -> None:
        saved.append(4 * inputs[0].numel())

    for residual in model.residuals:
        residual.spatial.register_forward_hook(convolution)
        residual.pointwise.register_forward_hook(convolution)
        residual.spatial_norm.register_forward_hook(norm)
        residual.pointwise_norm.register_forward_hook(norm)
        bits = lambda module, inputs, output: saved.append(output.numel() / 8)  # noqa: E731
        residual.spatial_norm.register_forward_hook(bits)
    model.embed(np.zeros((1, 32, 32, 3), np.uint8))

    costs = profile(network)
    found = model.costs(costs)
    # Gradients pass behind the stem where biases train, else behind the first block (two layers).
    chain = costs.layers[1:] if biases else costs.layers[3:]
    first = 0 if biases else macs[0]
    assert found.backward_macs == sum(row.macs for row in chain) + 2 * sum(macs) - first
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() for p in parameters if p.ndim > 1)
    assert found.updated_weights == weights
    assert found.updated_biases == sum(p.numel() for p in parameters) - weights
    layers = range(len(costs.layers)) if biases else (2,)
    masks = costs.mask_bytes(UpdatePolicy(biases=layers))
    activations = max(costs.forward_bytes, masks + sum(saved))
    assert found.paper_bytes == math.ceil(activations) + 16 * weights


def test_what_it_cannot_train_is_named(
    network: Network, task: tuple[np.ndarray, np.ndarray]
) -> None:
    with pytest.raises(ValueError, match="TinyTL needs blocks, and none is marked"):
        TinyTL(FAMILIES["resnet"])
    with pytest.raises(NonFiniteError, match="the loss is not finite"):
        adapt_tinytl(network, *task, iterations=9, learning_rate=1e30)


@pytest.fixture
def domain(tmp_path: Path) -> Domain:
    images, labels = shapes_task(ways=6, shots=12, size=36)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "data" / "shapes" / f"class{label}" / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return Domain(open_image_set(tmp_path / "data", "shapes"), largest_support=50)


def test_it_is_a_method_of_evaluate(network: Network, domain: Domain, tmp_path: Path) -> None:
    methods = [Method.parse("none"), Method.parse("tinytl:biases=1,iterations=1")]
    threads = torch.get_num_threads()
    evaluate(
        {"tiny": network}, [domain], methods, 1, Rows(tmp_path / "rows"), cache=tmp_path, views=2
    )
    assert torch.get_num_threads() == threads
    none, ours = read_rows(tmp_path / "rows")
    assert (ours["ways"], ours["support"]) == (none["ways"], none["support"])
    assert 0 <= ours["accuracy"] <= 1
    assert math.isfinite(ours["final_loss"])
    assert ours["planner_bytes"] is None  # the engine plans no modules
    assert (ours["layers"], ours["first_bias"], ours["selection_seconds"]) == ({}, 0, 0)


def test_it_begins_with_meta_trained_modules(
    network: Network, domain: Domain, tmp_path: Path
) -> None:
    def saved(name: str, seed: int) -> Path:
        model = TinyTL(network, seed=seed)
        with torch.no_grad():
            for residual in model.residuals:
                residual.pointwise_norm.weight.fill_(0.5)
        model.save(tmp_path / name)
        return tmp_path / name

    def run(folder: str, *methods: str, files: dict[str, Path]) -> list[dict[str, Any]]:
        return evaluate(
            {"tiny": network},
            [domain],
            [Method.parse(method) for method in methods],
            1,
            Rows(tmp_path / folder),
            modules=files,
            cache=tmp_path,
            views=2,
        )

    meta = "tinytl:iterations=0,meta_trained=1"
    first, second = saved("first", 1), saved("second", 2)
    plain, begun = run("rows", "tinytl:iterations=0", meta, files={"tiny": first})
    assert "modules" not in plain
    model = TinyTL(network, modules=load_modules(first, network))
    images = cached_images(
        domain.image_set.paths, network.resize, network.input_size, tmp_path, None
    )
    task = domain.task(0, images)
    prototypes = compute_prototypes(model.embed(task.images), task.labels, begun["ways"])
    logits = cosine_logits(model.embed(task.queries), prototypes, 1.0)
    assert begun["accuracy"] == (logits.argmax(axis=1) == task.targets).mean()

    assert run("rows", "tinytl:iterations=0", meta, files={"tiny": first}) == [plain, begun]
    with pytest.raises(ValueError, match=r"rows of tinytl.* there are of other modules"):
        run("rows", meta, files={"tiny": second})
    (other,) = run("others", meta, files={"tiny": second})
    assert other["modules"] != begun["modules"]
    with pytest.raises(ValueError, match="network 'tiny' has other modules here"):
        merged_rows([tmp_path / "rows", tmp_path / "others"])
    with pytest.raises(ValueError, match="meta_trained: no modules of network 'tiny'"):
        run("none", meta, files={})
    with pytest.raises(ValueError, match="modules: have no use but for a method with meta_trained"):
        run("none", "tinytl", files={"tiny": first})


def test_files_of_other_modules_are_refused(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "modules.safetensors"
    model = TinyTL(network)
    model.save(path)
    assert all(
        np.array_equal(array, model.residuals.state_dict()[name].numpy())
        for name, array in load_modules(path, network).items()
    )
    with pytest.raises(ValueError, match=r"modules\.safetensors: expected TinyTL's modules of a"):
        load_modules(path, tiny_network(seed=1))
    network.save(path)
    with pytest.raises(ValueError, match=r"got metadata \{'tinytrain_ext\.network'"):
        load_modules(path, network)
    with torch.no_grad():
        model.residuals[0].spatial.weight[0, 0, 0, 0] = math.nan
    model.save(path)
    with pytest.raises(ValueError, match=r"tensor '0\.spatial\.weight': expected finite numbers"):
        load_modules(path, network)
    del model.residuals[0]
    model.save(path)
    with pytest.raises(ValueError, match="missing tensor"):
        load_modules(path, network)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="header: expected at most"):
        load_modules(path, network)
