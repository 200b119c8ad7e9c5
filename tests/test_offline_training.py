"""Pre-training and meta-training: determinism, resumption, processes, and their two commands."""
# ruff: noqa: E402 (without torch the imports below would fail instead of skipping)

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tqdm")

from offline_cases import TINY, disk_of, write_folder
from offline_worker import IMAGES, LABELS, META, meta_losses
from tinytrain_ext.architectures import operations
from tinytrain_ext.cli import main as cli
from tinytrain_ext.errors import NonFiniteError
from tinytrain_ext.network import Network
from tinytrain_ext.offline.backbones import Backbone, fold_batch_norm
from tinytrain_ext.offline.evaluate_backbone import main as evaluate_backbone
from tinytrain_ext.offline.metatrain import metatrain
from tinytrain_ext.offline.pretrain import pretrain, pretrained
from tinytrain_ext.offline.recipes import (
    MetaRecipe,
    PretrainRecipe,
    Stage,
    make,
    preset,
    preset_names,
)
from tinytrain_ext.offline.tinytl import TinyTL, load_modules
from tinytrain_ext.offline.training import Epoch, Ranks, Run, learning_rate

pytestmark = pytest.mark.all_cases

PRE = PretrainRecipe(
    stages=(Stage(16, 2), Stage(24, 2)), batch_size=8, warmup_epochs=1, rotated=0.5, seed=3
)


def tiny_network() -> Network:
    torch.manual_seed(0)
    return Backbone(operations(TINY)).to_network("tiny", input_size=16, resize=18)


def weights(backbone: Backbone) -> list[np.ndarray]:
    return [array for arrays in fold_batch_norm(backbone) for array in arrays]


def pretrained_weights(run: Run, recipe: PretrainRecipe = PRE) -> list[np.ndarray]:
    return weights(pretrain(TINY, IMAGES, LABELS, recipe, run)[0].backbone)


def metatrained_weights(run: Run, recipe: MetaRecipe = META) -> list[np.ndarray]:
    backbone = Backbone.from_network(tiny_network())
    model, _ = metatrain(backbone, 10.0, IMAGES, LABELS, recipe, run)
    return [*weights(model.backbone), model.logit_scale.detach().numpy()]


def module_weights(run: Run, recipe: MetaRecipe = META) -> list[np.ndarray]:
    model, _ = metatrain(TinyTL(tiny_network()), 10.0, IMAGES, LABELS, recipe, run)
    return [tensor.numpy() for tensor in model.backbone.residuals.state_dict().values()]


TRAININGS = pytest.mark.parametrize(
    "train", [pretrained_weights, metatrained_weights, module_weights]
)
Train = Callable[..., list[np.ndarray]]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@TRAININGS
def test_same_seed_same_weights(train: Train, tmp_path: Path) -> None:
    first = train(Run(tmp_path / "a"))
    state = torch.random.get_rng_state()
    torch.manual_seed(99)  # the global generator must not matter
    assert same(first, train(Run(tmp_path / "b", ahead=2)))
    torch.random.set_rng_state(state)
    recipe = PRE if train is pretrained_weights else META
    assert not same(first, train(Run(tmp_path / "c"), dataclasses.replace(recipe, seed=4)))


@TRAININGS
@pytest.mark.parametrize("interrupted_after", [1, 3])
def test_resumed_run_equals_the_uninterrupted_one(
    train: Train, tmp_path: Path, interrupted_after: int
) -> None:
    def interrupt(epoch: Epoch) -> None:
        if epoch.epoch == interrupted_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Run(tmp_path / "interrupted", on_epoch=interrupt))
    resumed = train(Run(tmp_path / "interrupted"))
    assert same(resumed, train(Run(tmp_path / "whole")))
    assert history_of(tmp_path / "interrupted") == history_of(tmp_path / "whole")


def history_of(directory: Path) -> list[dict[str, object]]:
    lines = (directory / "history.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": None} for line in lines]


def test_a_damaged_generation_costs_an_epoch_at_most(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = metatrained_weights(Run(tmp_path))
    for number in (0, 1):
        path = tmp_path / f"checkpoint.{number}.safetensors"
        sound = path.read_bytes()
        path.write_bytes(sound[: len(sound) // 2])
        with caplog.at_level(logging.WARNING):
            assert same(metatrained_weights(Run(tmp_path)), whole)
        assert "skipping a damaged checkpoint" in caplog.text
    for path in tmp_path.glob("checkpoint.*"):
        path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="no sound checkpoint"):
        metatrained_weights(Run(tmp_path))


@TRAININGS
def test_a_run_keeps_to_its_images_and_validation(train: Train, tmp_path: Path) -> None:
    train(Run(tmp_path))
    module = sys.modules[__name__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "IMAGES", IMAGES[::-1])
        with pytest.raises(ValueError, match="of another run: digest: expected"):
            train(Run(tmp_path))
        patch.setattr(module, "IMAGES", IMAGES[:, 1:, 1:])
        with pytest.raises(ValueError, match=r"of another run: (digest|images): expected"):
            train(Run(tmp_path))
    with pytest.raises(ValueError, match=r"validated_on: expected \['val'\], got \[\]"):
        train(Run(tmp_path, validated_on=("val",)))


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    def fill(epoch: Epoch) -> None:
        if epoch.epoch == 2:
            full.__enter__()

    full = disk_of(5000)
    try:
        with pytest.raises(OSError, match=r"checkpoint\.1\.safetensors"):
            metatrained_weights(Run(tmp_path / "full", on_epoch=fill))
    finally:
        full.__exit__(None, None, None)
    assert [record["epoch"] for record in history_of(tmp_path / "full")] == [1, 2]
    assert same(metatrained_weights(Run(tmp_path / "full")), metatrained_weights(Run(tmp_path)))


def test_validation_chooses_the_best_epoch(tmp_path: Path) -> None:
    accuracies = iter([50.0, 70.0, 60.0])
    run = Run(
        tmp_path,
        export=lambda backbone, scale: backbone.to_network("t", input_size=16, logit_scale=scale),
        validate=lambda network: {"val": next(accuracies)},
        validate_every=2,
    )
    recipe = dataclasses.replace(META, epochs=5)
    seen: list[bytes] = []
    run = dataclasses.replace(
        run, on_epoch=lambda _: seen.append((tmp_path / "last.safetensors").read_bytes())
    )
    metatrained_weights(run, recipe)
    validations = [record["validation"] for record in history_of(tmp_path)]
    assert validations == [{}, {"val": 50.0}, {}, {"val": 70.0}, {"val": 60.0}]
    assert (tmp_path / "best.safetensors").read_bytes() == seen[3] != seen[4]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's own
def test_tensorboard_has_the_history(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metatrained_weights(Run(tmp_path, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    np.testing.assert_allclose(logged, [record["loss"] for record in history_of(tmp_path)], 1e-6)


def test_pre_training_goes_through_its_stages(tmp_path: Path) -> None:
    model, history = pretrain(TINY, IMAGES, LABELS, PRE, Run(tmp_path))
    assert [epoch.size for epoch in history] == [16, 16, 24, 24]
    assert all(np.isfinite(epoch.loss) for epoch in history)
    assert not model.training
    assert same(weights(pretrained(tmp_path)), weights(model.backbone))


def test_meta_training_learns_and_leaves_its_input_alone(tmp_path: Path) -> None:
    backbone = Backbone.from_network(tiny_network())
    recipe = dataclasses.replace(META, epochs=8, learning_rate=0.003, smallest_crop=0.8, jitter=0.1)
    before = weights(backbone)
    model, history = metatrain(backbone, 10.0, IMAGES, LABELS, recipe, Run(tmp_path))
    assert same(weights(backbone), before)
    assert not same(weights(model.backbone), before)
    assert history[-1].loss < 0.8 * history[0].loss
    assert history[-1].accuracy > history[0].accuracy
    assert history[-1].logit_scale != 10.0


@pytest.mark.parametrize("rotated", [0.0, 0.5])
def test_a_classifier_of_all_classes_can_help(rotated: float, tmp_path: Path) -> None:
    learning = {"epochs": 8, "learning_rate": 1e-4, "smallest_crop": 0.8, "rotated": rotated}
    recipe = dataclasses.replace(META, supervised=2.0, label_smoothing=0.1, **learning)
    backbone = Backbone.from_network(tiny_network())
    model, history = metatrain(backbone, 10.0, IMAGES, LABELS, recipe, Run(tmp_path))
    assert model.class_vectors.shape == (16 if rotated else 4, backbone.feature_dim)
    assert history[-1].loss < history[0].loss
    resumed, _ = metatrain(backbone, 10.0, IMAGES, LABELS, recipe, Run(tmp_path))
    assert torch.equal(resumed.class_vectors, model.class_vectors)


def test_batch_norm_can_be_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = Backbone(operations(TINY))
    model, history = metatrain(backbone, 10.0, IMAGES, LABELS, META, Run(tmp_path))
    assert model.backbone.batch_norm
    for norm in model.backbone.norms:  # the statistics have followed the episodes'
        assert (norm.running_var - 1).abs().max() > 0.01
    assert np.isfinite(history[-1].loss)


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    pretrained_weights(Run(tmp_path))
    with pytest.raises(ValueError, match=r"another run: momentum: expected 0\.8, got 0\.9"):
        pretrained_weights(Run(tmp_path), dataclasses.replace(PRE, momentum=0.8))
    with pytest.raises(ValueError, match="another run"):
        metatrained_weights(Run(tmp_path))


@TRAININGS
def test_diverging_run_stops(train: Train, tmp_path: Path) -> None:
    recipe = PRE if train is pretrained_weights else META
    recipe = dataclasses.replace(recipe, learning_rate=1e38, warmup_epochs=0)
    with pytest.raises(NonFiniteError, match="loss"):
        train(Run(tmp_path), recipe)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a batch of 64, got 40"):
        pretrained_weights(Run(tmp_path), dataclasses.replace(PRE, batch_size=64))
    with pytest.raises(ValueError, match="ways: expected at most the 4 classes"):
        metatrained_weights(Run(tmp_path), dataclasses.replace(META, ways=5))
    with pytest.raises(ValueError, match="batch_episodes: expected a multiple of the 3 processes"):
        metatrained_weights(Run(tmp_path, ranks=Ranks(0, 3)))


def test_learning_rate() -> None:
    paper = make(MetaRecipe, preset("meta-train", "paper"))
    shape = {"initial": 1e-6, "peak": 5e-5, "final": 1e-6, "warmup": 5, "total": 100}
    assert (paper.epochs, paper.episodes, paper.warmup_epochs) == (100, 2000, 5)
    assert (paper.initial_learning_rate, paper.learning_rate) == (1e-6, 5e-5)
    assert learning_rate(0, **shape) == 1e-6
    assert learning_rate(5, **shape) == pytest.approx(5e-5)
    assert learning_rate(52.5, **shape) == pytest.approx((5e-5 + 1e-6) / 2)
    assert learning_rate(100, **shape) == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("command", "kind"), [("pre-train", PretrainRecipe), ("meta-train", MetaRecipe)]
)
def test_every_preset_is_a_recipe(command: str, kind: type) -> None:
    assert {"quick", "miniimagenet"} <= set(preset_names(command))
    for name in preset_names(command):
        assert make(kind, preset(command, name)) != kind() or name == "paper"


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (MetaRecipe, {"episode": 3}, "episode: no such field"),
        (MetaRecipe, {"ways": 2.5}, "ways: expected int, got 2.5"),
        (MetaRecipe, {"ways": True}, "ways: expected int, got True"),
        (MetaRecipe, {"shots": 0}, "shots: expected a number from 1, got 0"),
        (MetaRecipe, {"rotated": 2}, "rotated: expected a number from 0 to 1, got 2"),
        (MetaRecipe, {"episodes": 10, "batch_episodes": 4}, "multiple of batch_episodes = 4"),
        (PretrainRecipe, {"stages": [{"size": 8}]}, "stages: .*epochs"),
        (PretrainRecipe, {"stages": [3]}, "stages: expected a table, got 3"),
        (PretrainRecipe, {"stages": []}, "stages: expected at least one"),
    ],
)
def test_bad_recipes_are_named(kind: type, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind, fields)


# Processes


def start_ranks(count: int, out: Path, dtype: str) -> list[subprocess.Popen[bytes]]:
    """The worker in `count` processes, with the environment that torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    worker = Path(__file__).with_name("offline_worker.py")
    return [
        subprocess.Popen(
            [sys.executable, str(worker), str(out), dtype],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]


@pytest.mark.parametrize(("count", "dtype"), [(2, "float64"), (4, "float64"), (2, "float32")])
def test_any_number_of_processes_gives_the_same_losses(
    count: int, dtype: str, tmp_path: Path
) -> None:
    processes = start_ranks(count, tmp_path / "several", dtype)
    alone = meta_losses(tmp_path / "alone", dtype, Ranks())
    assert [process.wait(timeout=300) for process in processes] == [0] * count
    together = [record["loss"] for record in history_of(tmp_path / "several")]
    # The sums over episodes are the same up to their order; SGD carries the difference on.
    tolerance = 1e-12 if dtype == "float64" else 1e-4
    np.testing.assert_allclose(together, alone, rtol=tolerance)
    assert len(set(alone)) == META.epochs


def test_modules_learn(tmp_path: Path) -> None:
    losses = {}
    for rate in (0.05, 1e-9):
        recipe = dataclasses.replace(
            META, epochs=6, learning_rate=rate, average_decay=0.0, rotated=0.0
        )
        run = Run(tmp_path / str(rate))
        _, history = metatrain(TinyTL(tiny_network()), 10.0, IMAGES, LABELS, recipe, run)
        losses[rate] = history[-1].loss  # of the same episodes
    assert losses[0.05] < 0.8 * losses[1e-9]


# Commands


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_network().save(write_folder(tmp_path) / "tiny.safetensors")
    return tmp_path


def data_arguments(folder: Path) -> list[str]:
    data = ["--data", str(folder / "data"), "--split", str(folder / "split.json")]
    return [*data, "--cache", str(folder / "cache"), "--stored-size", "24"]


def output_arguments(folder: Path, name: str) -> list[str]:
    return ["--work", str(folder / name), "--out", str(folder / f"{name}.safetensors")]


EPISODES = ["--ways", "3", "--shots", "2", "--queries", "3", "--size", "16", "--episodes", "6"]


def test_commands_end_to_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("commands", "evaluate_backbone"):
        name = f"tinytrain_ext.offline.{module}.ARCHITECTURES"
        monkeypatch.setattr(name, {"mcunet": TINY})
    (folder / "recipe.toml").write_text("batch_size = 16\nwarmup_epochs = 1\naverage_decay = 0.5\n")
    first = ["pre-train", *data_arguments(folder), *output_arguments(folder, "pre"), "--json"]
    first += ["--input-size", "16", "--resize", "18", "--config", str(folder / "recipe.toml")]
    assert cli([*first, "--preset", "quick", "--stages", "12:1", "16:2", "--momentum", "0.8"]) == 0
    document = json.loads(capsys.readouterr().out)
    recipe = document["recipe"]
    assert (recipe["momentum"], recipe["batch_size"], recipe["average_decay"]) == (0.8, 16, 0.5)
    assert [epoch["size"] for epoch in document["history"]] == [12, 16, 16]
    best = document["history"][document["best_epoch"] - 1]
    assert best["validation"].keys() == {"val 5-shot", "val 1-shot"}
    assert Network.load(folder / "pre.safetensors").input_size == 16

    second = ["meta-train", *data_arguments(folder), *EPISODES, "--epochs", "2"]
    for name, network, norm in (("meta", "pre.safetensors", "frozen"), ("norm", "pre", "trained")):
        begin = ["--network", str(folder / network), "--batch-norm", norm]
        further = ["--validate-on", str(folder / "data")]
        assert cli([*second, *begin, *further, *output_arguments(folder, name)]) == 0
        assert re.search(r"val 5-shot: [\d.]+ %, before [\d.]+ %", capsys.readouterr().out)
        trained = Network.load(folder / f"{name}.safetensors")
        assert trained.name == "mcunet"
        assert trained.logit_scale != 10.0
    begin = ["--network", str(folder / "pre"), "--batch-norm", "trained", "--tinytl"]
    assert cli([*second, *begin, *output_arguments(folder, "beside")]) == 2
    assert "--tinytl: the network stays as it is" in capsys.readouterr().err

    validation = history_of(folder / "meta")[0]["validation"]
    assert validation.keys() == {
        f"{name} {shots}-shot" for name in ("val", "data") for shots in (1, 5)
    }

    data = data_arguments(folder)[:-2]
    evaluate_backbone(
        [str(folder / "meta.safetensors"), *data, "--subset", "val", "--episodes", "10"]
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["shots"] for row in rows] == [5, 1]
    # Colours tell the classes apart.
    assert all(30 < row["mean"] <= 100 for row in rows[:4])


def test_modules_are_trained_beside_a_network(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = Network.load(folder / "tiny.safetensors")
    command = ["meta-train", "--tinytl", "--network", str(folder / "tiny.safetensors"), "--json"]
    command += [*data_arguments(folder), *EPISODES, "--epochs", "3", "--learning-rate", "0.05"]
    assert cli([*command, *output_arguments(folder, "modules")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {epoch["logit_scale"] for epoch in document["history"]} == {network.logit_scale}

    modules = load_modules(folder / "modules.safetensors", network)
    begun = TinyTL(network).state_dict()
    after = TinyTL(network, modules=modules).state_dict()
    for name, value in begun.items():
        assert torch.equal(value, after[name]) == (not name.startswith("residuals.")), name
    images = np.ascontiguousarray(IMAGES[:3, :16, :16])
    difference = TinyTL(network, modules=modules).embed(images) - network.embed(images)
    assert np.abs(difference).max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "none"], "preset: expected one of .*paper"),
        (["--ways", "9"], "ways: expected at most the 5 classes, got 9"),
        (["--batch-norm", "trained"], "expected --network to be the folder of a pre-training run"),
        (["--split", "missing.json"], "missing.json: No such file"),
        (["--validate-on", "."], "expected images in"),
        (["--tinytl", "--size", "24"], "--size: with --tinytl expected the network's 16, got 24"),
        (["--tinytl", "--name", "mine"], "--name: with --tinytl there is no network to name"),
        (["--threads", "0"], "--threads: expected a whole number from 1, got 0"),
        (["--validate-every", "0"], "--validate-every: expected a whole number from 1, got 0"),
        (["--out", "empty"], "empty: is a folder; give the name of a file"),
        (
            ["--validate-on", "a/val"],
            "--validate-on: expected folders of other names, got val, val",
        ),
    ],
)
def test_wrong_input_is_named(
    folder: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "empty").mkdir()
    monkeypatch.chdir(folder)
    command = ["meta-train", *data_arguments(folder), *EPISODES, *output_arguments(folder, "out")]
    command += ["--network", str(folder / "tiny.safetensors")]
    assert cli([*command, *arguments]) == 2
    error = capsys.readouterr().err
    assert re.match(f"tinytrain meta-train: .*{message}", error), error
    assert not (folder / "out.safetensors").exists()


def test_an_unreadable_image_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = folder / "data" / "class3" / "05.png"
    broken.write_bytes(broken.read_bytes()[:70])
    command = ["meta-train", *data_arguments(folder), *EPISODES, *output_arguments(folder, "out")]
    assert cli([*command, "--network", str(folder / "tiny.safetensors")]) == 2
    assert "class3/05.png" in capsys.readouterr().err


def test_a_killed_run_goes_on_to_the_same_bits(folder: Path) -> None:
    def command(name: str) -> list[str]:
        begin = [sys.executable, "-m", "tinytrain_ext", "meta-train", "--quiet", "--epochs", "40"]
        begin += ["--network", str(folder / "tiny.safetensors"), "--validate-every", "10"]
        return [*begin, *data_arguments(folder), *EPISODES, *output_arguments(folder, name)]

    killed = subprocess.Popen(command("killed"))
    history = folder / "killed" / "history.jsonl"
    while killed.poll() is None and not history.exists():
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    done = len(history.read_text().splitlines())
    assert 1 <= done < 40
    subprocess.run(command("killed"), check=True, stdout=subprocess.DEVNULL)
    subprocess.run(command("whole"), check=True, stdout=subprocess.DEVNULL)
    assert history_of(folder / "killed") == history_of(folder / "whole")
    for name in ("killed", "whole"):
        assert len(history_of(folder / name)) == 40
    networks = [(folder / f"{name}.safetensors").read_bytes() for name in ("killed", "whole")]
    assert networks[0] == networks[1]


def test_without_torch_a_command_says_what_to_install(folder: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from tinytrain_ext.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = ["meta-train", *data_arguments(folder), *output_arguments(folder, "out")]
    done = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install 'tinytrain_ext[train]'" in done.stderr
