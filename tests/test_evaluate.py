"""Methods, tasks, rows and their resumption, summaries, and the command that makes them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks import shapes_task, tiny_network
from tinytrain_ext import evaluate as module
from tinytrain_ext.adapt import adapt
from tinytrain_ext.architectures import ARCHITECTURES, random_network
from tinytrain_ext.cli import main
from tinytrain_ext.cost import profile
from tinytrain_ext.datasets import cached_images, open_image_set
from tinytrain_ext.errors import NonFiniteError
from tinytrain_ext.evaluate import (
    METHODS,
    Domain,
    Method,
    Row,
    Rows,
    channels_of,
    evaluate,
    merged_rows,
    read_rows,
    summary,
)
from tinytrain_ext.network import Network
from tinytrain_ext.protonet import cosine_logits
from tinytrain_ext.selection import UpdatePolicy

DOMAINS = ("shapes", "stripes")
TIMES = {"seconds", "selection_seconds", "cpu_seconds"}
# The tiny network's late layers hold most of its MACs.
TINYTRAIN = "tinytrain:compute=0.6,iterations=2"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of six classes with a dozen small images each."""
    root = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(DOMAINS):
        images, labels = shapes_task(ways=6, shots=12, seed=seed, size=36)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / name / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index:02}.png")
    return root


@pytest.fixture
def domains(data: Path) -> list[Domain]:
    return [Domain(open_image_set(data, name), largest_support=50) for name in DOMAINS]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def without_times(rows: list[Row]) -> list[Row]:
    return [{name: row[name] for name in row.keys() - TIMES} for row in rows]


def parsed(*texts: str) -> list[Method]:
    return [Method.parse(text) for text in texts]


# Methods


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *((kind, kind) for kind in METHODS if kind != "layer"),
        ("tinytrain:ratio=0.25", "tinytrain:ratio=0.25"),
        ("tinytrain:ratio=.250,blocks=3", "tinytrain:blocks=3,ratio=0.25"),
        ("tinytrain:memory=524288,compute=0.1", "tinytrain:compute=0.1,memory=524288"),
        ("tinytrain:budget=sparseupdate,per=macs", "tinytrain:budget=sparseupdate,per=macs"),
        ("sparseupdate:biases=1", "sparseupdate:biases=1"),
        ("lastlayer:learning_rate=1e-2", "lastlayer:learning_rate=0.01"),
        ("layer:ratio=1,index=-3", "layer:index=-3,ratio=1.0"),
        ("tinytl:learning_rate=3e-3,biases=1", "tinytl:biases=1,learning_rate=0.003"),
    ],
)
def test_a_method_has_one_name(text: str, name: str) -> None:
    method = Method.parse(text)
    assert method.name == name
    assert Method.parse(method.name) == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("everything", "'everything': expected one of none, lastlayer, .*layer"),
        ("", "expected one of none"),
        ("none:ratio=1", "expected no options as NAME=VALUE, got 'ratio=1'"),
        (
            "tinytl:ratio=0.5",
            "expected learning_rate, iterations, biases, meta_trained as NAME=VALUE",
        ),
        ("fulltrain:biases=1", "expected optimizer, .* got 'biases=1'"),
        ("tinytrain:ratio", "as NAME=VALUE, got 'ratio'"),
        ("tinytrain:ratio=1,ratio=1", "got 'ratio=1'"),
        ("tinytrain:ratio=half", "ratio: could not convert"),
        ("tinytrain:biases=yes", "biases: expected 0 or 1, got 'yes'"),
        ("tinytrain:channels=all", "channels: expected fisher or random or l2, got 'all'"),
        ("tinytrain:per=joule", r"per: expected weights\+macs or"),
        ("tinytrain:accounting=ours", "accounting: expected planner or paper"),
        ("lastlayer:optimizer=lion", "optimizer: expected .*, got 'lion'"),
        ("layer:ratio=1", "expected index=NUMBER"),
        ("layer:channels=best,index=1", "channels: expected fisher or random or l2, got 'best'"),
        ("tinytrain:ratio=nan", "ratio: expected above 0, up to 1, got 'nan'"),
        ("layer:index=1,ratio=1.5", "ratio: expected above 0, up to 1, got '1.5'"),
        ("tinytrain:compute=0", "compute: expected a number above 0, got '0'"),
        ("lastlayer:learning_rate=inf", "learning_rate: expected a number above 0, got 'inf'"),
        ("lastlayer:iterations=-1", "iterations: expected a whole number from 0, got '-1'"),
        ("tinytrain:memory=9223372036854775808", "memory: expected at most 9223372036854775807"),
        ("tinytrain:blocks=0", "blocks: expected a whole number from 1, got '0'"),
        (
            "tinytrain:budget=sparseupdate,compute=0.1",
            "compute: has no use beside budget=sparseupdate",
        ),
        ("tinytrain:memory=9,budget=sparseupdate", "memory: has no use beside budget=sparseupdate"),
        ("tinytrain:criterion=held_out,ratio=1", "ratio: has no use beside criterion=held_out"),
        ("tinytrain:per=macs,criterion=held_out", "per: has no use beside criterion=held_out"),
        (
            "lastlayer:optimizer=in_place_sgd,prototype_gradient=1",
            "prototype_gradient: has no use beside optimizer=in_place_sgd",
        ),
    ],
)
def test_what_is_no_method_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method.parse(text)


def test_learning_rates() -> None:
    adam, momentum, sgd, own = parsed(
        "tinytrain",
        "tinytrain:optimizer=momentum",
        "tinytrain:optimizer=sgd",
        "tinytrain:learning_rate=0.5,optimizer=sgd",
    )
    assert momentum.learning_rate == 10 * adam.learning_rate
    assert sgd.learning_rate == 100 * adam.learning_rate
    assert own.learning_rate == 0.5


def test_channels_as_rows_carry_them() -> None:
    for channels in [(0,), (3, 4, 5), (0, 63, 64, 200)]:
        assert channels_of(module._mask(channels)) == channels


# Tasks


def test_a_task_depends_on_seed_domain_and_number_alone(data: Path, cache: Path) -> None:
    def task(name: str, number: int, seed: int = 0, before: int = 0) -> Any:
        found = open_image_set(data, name)
        images = cached_images(found.paths, 36, 32, cache)
        domain = Domain(found, seed=seed, largest_support=50)
        for earlier in range(before):
            domain.task(earlier, images)
        return domain.task(number, images)

    one = task("shapes", 2)
    again = task("shapes", 2, before=4)
    assert np.array_equal(one.images, again.images)
    assert np.array_equal(one.queries, again.queries)
    assert np.array_equal(one.targets, again.targets)
    assert one.seed == again.seed
    for other in (task("shapes", 3), task("stripes", 2), task("shapes", 2, seed=1)):
        assert not np.array_equal(one.images, other.images)


def test_a_task_is_of_its_domain(domains: list[Domain], cache: Path) -> None:
    found = domains[0].image_set
    images = cached_images(found.paths, 36, 32, cache)
    task = domains[0].task(0, images)
    place = {image.tobytes(): index for index, image in enumerate(images)}
    support = [place[image.tobytes()] for image in task.images]
    query = [place[image.tobytes()] for image in task.queries]
    assert not set(support) & set(query)
    # Ways stand for classes one to one, the same ones on both sides.
    ways = dict(zip(task.labels.tolist(), found.labels[support].tolist(), strict=True))
    assert found.labels[query].tolist() == [ways[way] for way in task.targets.tolist()]
    assert sorted(ways) == list(range(len(ways)))


def test_what_is_no_domain_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="protocol: expected tracks or meta-dataset"):
        Domain(open_image_set(data, "shapes"), protocol="leaky")
    (tmp_path / "few" / "one").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "few" / "one" / "1.png")
    with pytest.raises(ValueError, match="few: labels: expected at least 5 classes"):
        Domain(open_image_set(tmp_path, "few"))
    (tmp_path / "few").rename(tmp_path / "all")
    with pytest.raises(ValueError, match=r"domain 'all': .* rename the folder"):
        Domain(open_image_set(tmp_path, "all"))


# Evaluation

ALL = parsed("none", "lastlayer:iterations=2", TINYTRAIN)


def run(
    domains: list[Domain], folder: Path, cache: Path, methods: list[Method] = ALL, **options: Any
) -> list[Row]:
    networks = {"tiny": options.pop("network", tiny_network())}
    name = "rows-{}-of-{}.jsonl".format(*options.get("shard", (0, 1)))
    return evaluate(networks, domains, methods, 2, Rows(folder, name), cache=cache, **options)


def test_the_same_seed_gives_the_same_table(
    domains: list[Domain], tmp_path: Path, cache: Path
) -> None:
    one = run(domains, tmp_path / "one", cache)
    assert len(one) == 2 * 2 * len(ALL)
    other = run(domains, tmp_path / "other", cache, threads=3)
    assert without_times(one) == without_times(other)
    assert without_times(list(read_rows(tmp_path / "one"))) != []
    assert len({row["accuracy"] for row in one}) > 3  # not one value, which would hide much


def test_shards_together_have_the_same_rows(
    domains: list[Domain], tmp_path: Path, cache: Path
) -> None:
    whole = run(domains, tmp_path / "whole", cache)
    parts = [run(domains, tmp_path / "parts", cache, shard=(rank, 2)) for rank in (0, 1)]
    assert all(len(part) == len(whole) // 2 for part in parts)
    assert without_times(merged_rows([tmp_path / "parts"])) == without_times(whole)
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert names == ["rows-0-of-2.jsonl", "rows-1-of-2.jsonl"]


def test_an_interrupted_run_goes_on(
    domains: list[Domain], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(domains, tmp_path / "whole", cache)
    real, computed = module.run_task, []

    def counted(*arguments: Any) -> Row:
        if len(computed) == limit:
            raise KeyboardInterrupt
        computed.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(module, "run_task", counted)
    limit = 5
    with pytest.raises(KeyboardInterrupt):
        run(domains, tmp_path / "cut", cache)
    path = tmp_path / "cut" / "rows-0-of-1.jsonl"
    assert len(path.read_bytes().splitlines()) == 5
    # A killed process leaves half a line: its row is computed again.
    path.write_bytes(path.read_bytes()[:-30])
    assert len(list(read_rows(tmp_path / "cut"))) == 4
    computed.clear()
    limit = 1000
    assert without_times(run(domains, tmp_path / "cut", cache)) == without_times(whole)
    assert len(computed) == len(whole) - 4
    assert without_times(merged_rows([tmp_path / "cut"])) == without_times(whole)
    # What is there is not computed again, by however many processes.
    computed.clear()
    run(domains, tmp_path / "cut", cache, shard=(0, 2))
    run(domains, tmp_path / "cut", cache, shard=(1, 2))
    assert computed == []


def test_progress_counts_from_what_was_there(
    domains: list[Domain], tmp_path: Path, cache: Path
) -> None:
    run(domains[:1], tmp_path, cache)
    calls: list[tuple[str, int, int]] = []
    run(domains, tmp_path, cache, progress=lambda *call: calls.append(call))
    tasks = [call[1:] for call in calls if call[0] == "tasks"]
    assert tasks == [(1, 4), (3, 4), (4, 4)]


def test_rows_of_other_weights_are_refused(
    domains: list[Domain], tmp_path: Path, cache: Path
) -> None:
    methods = parsed("none")
    run(domains, tmp_path / "a", cache, methods)
    other = tiny_network(seed=1)
    with pytest.raises(ValueError, match="network 'tiny': the rows there are of other weights"):
        run(domains, tmp_path / "a", cache, methods, network=other)
    run(domains, tmp_path / "b", cache, methods, network=other)
    with pytest.raises(ValueError, match="b: network 'tiny' has other weights"):
        merged_rows([tmp_path / "a", tmp_path / "b"])
    assert len(merged_rows([tmp_path / "a", tmp_path / "a"])) == 4


def test_what_are_no_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected rows-\*\.jsonl"):
        merged_rows([tmp_path])
    path = tmp_path / "rows-0-of-1.jsonl"
    path.write_text("[]\n")
    with pytest.raises(ValueError, match="line 1: expected network, domain"):
        list(read_rows(tmp_path))
    path.write_text("\n{\n")
    with pytest.raises(ValueError, match="line 1: expected a JSON object"):
        list(read_rows(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": None}, ".* got none of digest"),
        ({"accuracy": "high"}, "accuracy: expected float or int, got 'high'"),
        ({"accuracy": float("nan")}, "accuracy: expected float or int, got nan"),
        ({"accuracy": 5}, "accuracy: expected 0 to 1, got 5"),
        ({"domain": ["a"]}, r"domain: expected str, got \['a'\]"),
        ({"views": "8"}, "views: expected int or NoneType, got '8'"),
        ({"layers": {"one": ["out", "1"]}}, r"layers: expected \{layer: .*got 'one'"),
        ({"layers": {"1": ["out", "0"]}}, "layers: expected .*got '1'"),
        ({"layers": {"1": "out"}}, "layers: expected .*got '1'"),
        ({"method": "best"}, "method 'best': expected one of"),
        ({"support": 0}, "support: expected at least 1, got 0"),
        ({"method": "layer:index=1"}, "layers: expected at least one of layer:index=1, got none"),
    ],
)
def test_what_is_wrong_in_a_row_is_named(
    domains: list[Domain], tmp_path: Path, cache: Path, change: dict[str, Any], message: str
) -> None:
    (row, *_) = run(domains[:1], tmp_path, cache, parsed("none"))
    wrong = {**row, **change}
    if change == {"digest": None}:
        del wrong["digest"]
    with (tmp_path / "rows-0-of-1.jsonl").open("a") as file:
        file.write(json.dumps(wrong) + "\n")
    with pytest.raises(ValueError, match=f"rows-0-of-1.jsonl, line 3: {message}"):
        list(read_rows(tmp_path))


def test_lines_that_nest_without_end_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows-0-of-1.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="line 1: "):
        list(read_rows(tmp_path))


def test_what_is_given_twice_is_done_once(
    domains: list[Domain], tmp_path: Path, cache: Path
) -> None:
    methods = parsed("none", "lastlayer:iterations=1", "lastlayer:iterations=1")
    rows = run([domains[0], domains[0]], tmp_path, cache, methods)
    assert len(rows) == 2 * 2
    assert len(list(read_rows(tmp_path))) == len(rows)


def test_rows_with_and_without_fixed_views_lie_together(
    domains: list[Domain], tmp_path: Path, cache: Path
) -> None:
    methods = parsed("lastlayer:iterations=1")
    for views in (None, 2):
        assert len(run(domains[:1], tmp_path, cache, methods, views=views)) == 2
    assert [row["views"] for row in merged_rows([tmp_path])] == [None, 2, None, 2]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("layer:index=99", "'layer:index=99': index: network 'tiny' has .* got 99"),
        ("layer:index=-99", "got -99"),
        ("sparseupdate", "'sparseupdate': network: no SparseUpdate policy"),
        ("tinytrain:budget=sparseupdate", "no SparseUpdate policy"),
    ],
)
def test_methods_that_do_not_fit_a_network_fail_before_any_work(
    domains: list[Domain], tmp_path: Path, cache: Path, method: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(domains, tmp_path, cache, parsed("none", method))
    assert list(read_rows(tmp_path)) == []


def test_sgd_in_place_takes_one_thread(domains: list[Domain], tmp_path: Path, cache: Path) -> None:
    methods = parsed("none", "lastlayer:iterations=1,optimizer=in_place_sgd")
    with pytest.raises(ValueError, match="optimizer: in_place_sgd takes 1 thread, got 2"):
        run(domains[:1], tmp_path, cache, methods, threads=2)
    assert list(read_rows(tmp_path)) == []
    assert len(run(domains[:1], tmp_path, cache, methods)) == 4


def test_tinytl_without_pytorch_names_the_extra(
    domains: list[Domain], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "tinytrain_ext.offline.tinytl", raising=False)
    message = r"method 'tinytl': needs PyTorch, pip install 'tinytrain_ext\[torch\]'"
    with pytest.raises(ValueError, match=message):
        run(domains, tmp_path, cache, parsed("none", "tinytl"))
    assert list(read_rows(tmp_path)) == []
    assert run(domains, tmp_path, cache, ALL) != []  # the others need none


def test_a_method_that_diverges_is_named(
    domains: list[Domain], tmp_path: Path, cache: Path
) -> None:
    name = "lastlayer:learning_rate=1e+30,optimizer=sgd"
    with pytest.raises(NonFiniteError, match=re.escape(f"network 'tiny', method {name!r}: ")):
        run(domains, tmp_path, cache, parsed("none", name))
    assert len(list(read_rows(tmp_path))) == 1


EVERY = [
    "none",
    *(
        f"{text}{',' if ':' in text else ':'}iterations=1"
        for text in (
            "lastlayer",
            "lastlayer:biases=1",
            "fulltrain",
            "fulltrain:prototype_gradient=1",
            "sparseupdate",
            "sparseupdate:biases=1,optimizer=momentum",
            "tinytrain",
            "tinytrain:accounting=paper",
            "tinytrain:biases=1,budget=sparseupdate",
            "tinytrain:blocks=3,per=nothing",
            "tinytrain:criterion=held_out",
            "tinytrain:channels=random,ratio=0.25",
            "tinytrain:channels=l2,ratio=0.25",
            "layer:index=-2,ratio=0.25",
            "layer:channels=l2,index=-2,ratio=0.25",
            "layer:channels=random,index=-2,ratio=0.25",
        )
    ),
]


def mcunet() -> Network:
    network = random_network(ARCHITECTURES["mcunet"], np.random.default_rng(0))
    return network.replace(input_size=32, resize=36)


@pytest.fixture(scope="module")
def every_row(data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """One task of every method, on MCUNet with random weights and small images."""
    network = mcunet()
    domain = Domain(open_image_set(data, "shapes"), largest_support=50)
    rows = Rows(tmp_path_factory.mktemp("every"))
    found = evaluate({"mcunet": network}, [domain], parsed(*EVERY), 1, rows, cache=cache)
    return {
        row["method"].replace(",iterations=1", "").removesuffix(":iterations=1"): row
        for row in found
    }


def test_every_method_runs(every_row: dict[str, Row]) -> None:
    assert len(every_row) == len(EVERY)
    assert len({(row["ways"], row["support"], row["query"]) for row in every_row.values()}) == 1
    for name, row in every_row.items():
        assert 0 <= row["accuracy"] <= 1
        assert row["paper_bytes"] > 0
        assert row["planner_bytes"] > 0
        assert (row["updated_weights"] > 0) == (name != "none") == (row["final_loss"] is not None)
        assert 0 <= row["selection_seconds"] <= row["seconds"]


def test_none_and_full_train_are_the_limits(every_row: dict[str, Row]) -> None:
    costs = profile(mcunet())
    none, full = every_row["none"], every_row["fulltrain"]
    assert (none["updated_weights"], none["backward_macs"], none["layers"]) == (0, 0, {})
    assert full["updated_weights"] == costs.weights
    assert full["backward_macs"] == costs.full_train_macs
    assert full["updated_biases"] == sum(layer.out_channels for layer in costs.layers)
    for row in every_row.values():
        for what in ("updated_weights", "backward_macs", "planner_bytes"):
            assert none[what] <= row[what] <= full[what]


def test_rows_tell_what_a_method_trained(every_row: dict[str, Row]) -> None:
    def layers(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        found = every_row[name]["layers"].items()
        return {layer: (axis, channels_of(mask)) for layer, (axis, mask) in found}

    # Fixed policies are known by their names, and would be most of a file of rows.
    for name in ("lastlayer", "sparseupdate", "fulltrain"):
        assert every_row[name]["layers"] == {}
    assert every_row["lastlayer"]["updated_weights"] == 92_160
    assert every_row["sparseupdate"]["updated_weights"] == 52_480
    single = [layers("layer:index=-2,ratio=0.25")]
    single += [layers(f"layer:channels={rule},index=-2,ratio=0.25") for rule in ("l2", "random")]
    assert [list(found) for found in single] == [["40"]] * 3
    assert len({len(found["40"][1]) for found in single}) == 1  # as many channels
    assert len({found["40"][1] for found in single}) == 3  # but others by each rule
    norms = np.square(mcunet().weights[40]).sum(axis=(1, 2, 3))
    assert single[1]["40"][1] == tuple(sorted(np.argsort(-norms)[: len(norms) // 4].tolist()))
    ours, random = (layers(f"tinytrain:channels={rule},ratio=0.25") for rule in ("l2", "random"))
    assert ours.keys() == random.keys()  # the same layers, as many channels, but others
    assert all(len(ours[layer][1]) == len(random[layer][1]) for layer in ours)
    assert ours != random
    assert every_row["lastlayer"]["updated_biases"] == 0
    assert every_row["lastlayer:biases=1"]["updated_biases"] > 0
    bound = every_row["sparseupdate"]["backward_macs"]
    assert every_row["tinytrain:biases=1,budget=sparseupdate"]["backward_macs"] <= bound


def test_none_is_classification_by_prototypes(
    domains: list[Domain], tmp_path: Path, cache: Path
) -> None:
    network = tiny_network()
    (row, *_) = run(domains[:1], tmp_path, cache, parsed("none"))
    images = cached_images(domains[0].image_set.paths, 36, 32, cache)
    task = domains[0].task(0, images)
    result = adapt(network, task.images, task.labels, policy=UpdatePolicy())
    logits = cosine_logits(network.embed(task.queries), result.network.prototypes, 1.0)
    assert row["accuracy"] == float((logits.argmax(axis=1) == task.targets).mean())
    assert (row["support"], row["query"]) == (len(task.labels), len(task.targets))


# Summaries


def made(method: str, domain: str, task: int, accuracy: float) -> Row:
    size = {"ways": 5 + task, "support": 10 * task, "query": 50}
    place = {"network": "n", "method": method, "domain": domain, "task": task}
    return {**place, "accuracy": accuracy, **size}


def test_summary_by_hand() -> None:
    rows = [
        made("tinytrain", "a", 0, 0.8),
        made("tinytrain", "a", 1, 0.6),
        made("tinytrain", "b", 0, 0.7),
        made("none", "a", 0, 0.5),
        made("none", "a", 1, 0.5),
        made("none", "a", 2, 0.9),  # not done by the other: in its mean, in no difference
    ]
    found = summary(rows, "tinytrain")
    accuracy = {(row["method"], row["domain"]): row for row in found["accuracy"]}
    assert list(accuracy) == [
        ("none", "a"),
        ("tinytrain", "a"),
        ("tinytrain", "b"),
        ("none", "all"),
        ("tinytrain", "all"),
    ]
    cell = accuracy["tinytrain", "a"]
    assert cell["tasks"] == 2
    assert cell["mean"] == pytest.approx(70)
    # Sample deviation of 80 and 60: sqrt(200).
    assert cell["interval"] == pytest.approx(1.96 * np.sqrt(200) / np.sqrt(2))
    assert accuracy["tinytrain", "all"]["mean"] == pytest.approx(70)
    assert accuracy["tinytrain", "all"]["tasks"] == 3
    assert accuracy["none", "a"]["mean"] == pytest.approx(190 / 3)
    assert np.isnan(accuracy["tinytrain", "b"]["interval"])
    (one, pooled) = found["differences"]
    assert (one["method"], one["domain"], one["tasks"]) == ("none", "a", 2)
    assert one["mean"] == pytest.approx(-20)  # of -30 and -10
    assert one["interval"] == pytest.approx(1.96 * np.sqrt(200) / np.sqrt(2))
    assert (pooled["domain"], pooled["tasks"]) == ("all", 2)
    (a, b) = found["tasks"]
    assert (a["domain"], a["tasks"], b["tasks"]) == ("a", 3, 1)
    assert a["ways"] == pytest.approx([6, np.sqrt(2 / 3)])
    assert a["support"] == pytest.approx([10, 10 * np.sqrt(2 / 3)])
    assert a["query"] == [50, 0]


# The command


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "tiny.safetensors"
    tiny_network().save(path)
    return path


def arguments(network: Path, data: Path, cache: Path, out: Path) -> list[str]:
    paths = ["--network", str(network), "--data", str(data), "--cache", str(cache)]
    small = ["--tasks", "2", "--largest-support", "50", "--methods", "none", TINYTRAIN]
    return ["evaluate", *paths, "--out", str(out), "--domains", *DOMAINS, *small]


def test_the_command(
    network: Path, data: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(network, data, cache, tmp_path / "out")
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    document = json.loads(captured.out)
    assert (document["command"], document["reference"]) == ("evaluate", TINYTRAIN)
    cells = {(row["method"], row["domain"]): row for row in document["accuracy"]}
    assert set(cells) == {(m, d) for m in ("none", TINYTRAIN) for d in (*DOMAINS, "all")}
    assert len(list(read_rows(tmp_path / "out"))) == 8
    mean = cells["none", "all"]["mean"]
    # One task has no interval, and JSON no word for that but null.
    assert main([*command, "--json", "--tasks", "1"]) == 0
    single = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert {row["interval"] for row in single["accuracy"] if row["domain"] != "all"} == {None}
    # Once more, from the rows: as text, with another reference.
    assert main([*command, "--reference", "none"]) == 0
    text = capsys.readouterr().out
    assert "tiny: accuracy, per cent with 95 % intervals" in text
    assert "tiny: accuracy minus that of none, paired" in text
    assert f"{mean:.1f} +- " in text
    assert len(list(read_rows(tmp_path / "out"))) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--domains", "clouds"], "clouds: No such file"),
        (["--domains", "shapes:val"], "shapes:val: expected a split file"),
        (["--methods", "tinytrain:ratio=x"], "method 'tinytrain:ratio=x': ratio:"),
        (["--methods", "sparseupdate"], "no SparseUpdate policy is published for 'tiny'"),
        (["--reference", "best"], "method 'best': expected one of"),
        (["--reference", "fulltrain"], "--reference: expected one of --methods, got 'fulltrain'"),
        (["--network", "missing.safetensors"], "missing.safetensors: No such file"),
        (["--protocol", "leaky"], "invalid choice: 'leaky'"),
        (["--largest-support", "20"], "expected a whole number from 50"),
        (["--tasks", "0"], "expected a whole number from 1"),
    ],
)
def test_wrong_input_is_named(
    network: Path,
    data: Path,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    message: str,
) -> None:
    try:
        code = main([*arguments(network, data, cache, tmp_path / "out"), *changes])
    except SystemExit as error:
        code = error.code
    errors = capsys.readouterr().err
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


def test_a_budget_that_cannot_be_met(
    network: Path, data: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(network, data, cache, tmp_path / "out")
    assert main([*command, "--methods", "none", "tinytrain:memory=1000"]) == 3
    error = capsys.readouterr().err
    assert "network 'tiny', method 'tinytrain:memory=1000': memory_bytes: 1000 bytes" in error
    assert len(list(read_rows(tmp_path / "out"))) == 1  # what was done stays


def test_two_files_of_one_name_and_changed_weights(
    network: Path, data: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / network.name
    tiny_network(seed=1).save(other)
    command = arguments(network, data, cache, tmp_path / "out")
    assert main([*command, "--network", str(network), str(other)]) == 2
    assert "files of different names" in capsys.readouterr().err
    assert main([*command, "--methods", "none"]) == 0
    capsys.readouterr()
    assert main([*command, "--methods", "none", "--network", str(other)]) == 2
    assert "rows there are of other weights" in capsys.readouterr().err


@pytest.mark.all_cases
def test_two_processes_give_the_table_of_one(
    network: Path, data: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [*arguments(network, data, cache, tmp_path / "two"), "--json"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tinytrain_ext", *command],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    assert main([*arguments(network, data, cache, tmp_path / "one"), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    first, second = (process.communicate(timeout=300)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert second == b""
    together = json.loads(first)
    assert {**together, "out": ""} == {**alone, "out": ""}
