"""The page of an evaluation's rows: its views, what is missing, its numbers, and its independence
of anything else. The rows are made up (evaluation_rows.py)."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the report needs matplotlib, which no device has")

from evaluation_rows import made_up_rows
from tasks import tiny_network
from tinytrain_ext.architectures import ARCHITECTURES, random_network
from tinytrain_ext.cli import main
from tinytrain_ext.cost import profile
from tinytrain_ext.evaluate import Row, channels_of, summary
from tinytrain_ext.figures import write_report

pytestmark = pytest.mark.all_cases

DOMAINS = ["traffic_sign", "omniglot"]
METHODS = ["none", "lastlayer", "fulltrain", "tinytl", "sparseupdate", "tinytrain"]
ABLATIONS = [
    "tinytrain:ratio=0.25",
    *(f"tinytrain:channels={rule},ratio={r}" for rule in ("random", "l2") for r in (0.25, 0.5)),
    *(f"layer:index={layer},ratio=0.5" for layer in (-3, -2, -1)),
    *(f"layer:channels=random,index={layer},ratio=0.5" for layer in (-2, -1)),
]
VIEWS = {
    "accuracy-macs": "Accuracy against compute",
    "accuracy": "Accuracy by domain",
    "by-support": "Few photos or many",
    "costs": "Memory and compute",
    "single-layers": "Gain of training one layer",
    "channels": "Channels chosen for the task, or not",
    "meta-training": "With and without meta-training",
    "latency": "Time of an adaptation",
    "selection": "What was selected",
    "tasks": "The tasks",
}
NETWORK = random_network(ARCHITECTURES["mcunet"], np.random.default_rng(0)).replace(
    input_size=64, resize=72
)
PROFILES = {name: profile(NETWORK) for name in ("small", "small-meta")}


class Structure(html.parser.HTMLParser):
    """Tags in order, checked to be closed, and the text between them."""

    VOID = frozenset({"meta", "br", "path", "use", "image"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.references.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    networks = {"small": NETWORK, "small-meta": NETWORK}
    found = made_up_rows(networks, DOMAINS, METHODS, 3)
    return found + made_up_rows({"small": NETWORK}, DOMAINS, ABLATIONS, 3)


@pytest.fixture(scope="module")
def folder(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "new"
    assert write_report(rows, "tinytrain", path, PROFILES) == path / "index.html"
    return path


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What the page says, tags as blanks."""
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def section(page: str, anchor: str) -> str:
    return text_of(page.split(f'<section id="{anchor}">')[1].split("</section>")[0])


def test_every_view_is_there(page: str, folder: Path) -> None:
    for anchor, title in VIEWS.items():
        assert section(page, anchor).startswith(title)
    assert 'id="missing"' not in page
    images = {path.stem for path in folder.glob("*.png")}
    drawn = {
        "accuracy-macs",
        "differences",
        "by-support",
        "latency",
        "layers",
        "which-channels",
    }
    assert images == {
        *(f"{name}-small-0" for name in (*drawn, "single-layers", "channels", "meta-training")),
        *(f"{name}-small-meta-1" for name in drawn),
    }
    assert page.count("<svg") == len(images)


def test_the_page_needs_nothing_else(page: str) -> None:
    structure = Structure(page)
    assert "script" not in structure.tags
    assert all(link.startswith(("#", "data:image/png;")) for link in structure.references)
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    # Addresses are names of namespaces, never fetched.
    assert set(re.findall(r'(\S+)="https?:', page)) <= {"xmlns", "xmlns:xlink"}
    assert len(structure.ids) == len(set(structure.ids))
    for link in structure.references:
        assert not link.startswith("#") or link[1:] in structure.ids


def test_drawings_take_the_theme_s_colours(page: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--blue)" in drawings
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", drawings)) == set()
    assert "prefers-color-scheme: dark" in page


def test_the_same_rows_give_the_same_files(rows: list[Row], folder: Path, tmp_path: Path) -> None:
    write_report(rows, "tinytrain", tmp_path, PROFILES)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_accuracies_and_differences_are_the_summary_s(rows: list[Row], page: str) -> None:
    shown = section(page, "accuracy")
    main_rows = [row for row in rows if row["method"] in METHODS]
    found = summary(main_rows, "tinytrain")
    assert found["differences"]
    for cell in found["accuracy"]:
        assert f"{cell['mean']:.1f} ± {cell['interval']:.1f}" in shown
    for cell in found["differences"]:
        text = f"{cell['mean']:+.1f} ± {cell['interval']:.1f}"
        assert text.replace("-", "\N{MINUS SIGN}") in shown
    assert "channels random" not in shown  # it has a view of its own


def test_thirds_of_the_tasks_by_their_support_sets(rows: list[Row], page: str) -> None:
    def accuracies(method: str) -> dict[tuple[int, str, int], float]:
        return {
            (row["support"], row["domain"], row["task"]): 100 * row["accuracy"]
            for row in rows
            if (row["network"], row["method"]) == ("small", method)
        }

    ours, full = accuracies("tinytrain"), accuracies("fulltrain")
    shown = section(page, "by-support")
    by_size = sorted(ours)
    assert len({size for size, *_ in by_size}) == len(by_size) == 6
    for third in (by_size[:2], by_size[2:4], by_size[4:]):
        (least, *_), (most, *_) = third
        assert f"{least} to {most} images (tasks)" in shown
        mean = float(np.mean([full[task] - ours[task] for task in third]))
        text = f"{mean:+.1f}".replace("-", "\N{MINUS SIGN}")
        assert re.search(rf" {re.escape(text)} ± [\d.]+ \(2\)", shown)


def test_tasks_of_one_support_size_stay_together(tmp_path: Path) -> None:
    rows = made_up_rows({"tiny": tiny_network()}, ["omniglot"], ["none", "lastlayer"], 9)
    for row in rows:
        row["support"] = [25, 25, 25, 25, 50, 50, 100, 100, 100][row["task"]]
    page = write_report(rows, "none", tmp_path).read_text(encoding="utf-8")
    shown = section(page, "by-support")
    assert "25 images (tasks) 50 images (tasks) 100 images (tasks)" in shown
    assert re.search(r"LastLayer .*\(4\) .*\(2\) .*\(3\)", shown)
    for row in rows:
        row["support"] = 25
    page = write_report(rows, "none", tmp_path).read_text(encoding="utf-8")
    assert "Few photos or many" in section(page, "missing")


def test_costs_are_in_both_accountings(rows: list[Row], page: str) -> None:
    shown = section(page, "costs")

    def mean(method: str, what: str) -> float:
        cells = [r[what] for r in rows if (r["network"], r["method"]) == ("small", method)]
        return float(np.mean(cells))

    times = "\N{MULTIPLICATION SIGN}"
    for method in METHODS[1:]:
        for what in ("paper_bytes", "planner_bytes"):
            if (method, what) == ("tinytl", "planner_bytes"):
                continue  # the engine plans none
            size, base = mean(method, what), mean("tinytrain", what)
            assert f"{size / 2**20:.2f} MiB {size / base:.2f}{times}" in shown
        assert f"{mean(method, 'backward_macs') / 1e6:.2f} M" in shown
    hundred = PROFILES["small"].full_train_bytes(100)
    ratio = hundred / mean("tinytrain", "paper_bytes")
    text = f"{ratio:,.0f}{times}" if ratio >= 100 else f"{ratio:.2f}{times}"
    assert re.search(r"batch 100, every input kept.*? MiB " + re.escape(text), shown)


def test_channel_rules_are_paired(rows: list[Row], page: str) -> None:
    def accuracies(method: str) -> np.ndarray:
        return np.array([row["accuracy"] for row in rows if row["method"] == method])

    small = [row for row in rows if row["network"] == "small"]
    ours = np.array([row["accuracy"] for row in small if row["method"] == "tinytrain"])
    shown = section(page, "channels")
    for dynamic, share in ((ours, 0.5), (accuracies("tinytrain:ratio=0.25"), 0.25)):
        for rule in ("random", "l2"):
            static = accuracies(f"tinytrain:channels={rule},ratio={share}")
            mean = 100 * float((dynamic - static).mean())
            assert f"{mean:+.1f}".replace("-", "\N{MINUS SIGN}") in shown


def test_held_out_choices_have_no_share_of_channels(tmp_path: Path) -> None:
    methods = ["tinytrain:criterion=held_out", "tinytrain:channels=random,criterion=held_out"]
    rows = made_up_rows({"small": NETWORK}, ["omniglot"], methods, 4)
    page = write_report(rows, methods[0], tmp_path).read_text(encoding="utf-8")
    shown = section(page, "channels")
    assert "channels by held-out gain minus others" in shown
    ours, theirs = ([r["accuracy"] for r in rows if r["method"] == m] for m in methods)
    mean = f"{100 * (np.mean(ours) - np.mean(theirs)):+.1f}".replace("-", "\N{MINUS SIGN}")
    assert re.search(rf"of a layer over random omniglot .* chosen {re.escape(mean)} ", shown)
    assert "L2 norm omniglot" not in shown


def test_agreement_of_selections_by_hand(rows: list[Row], page: str) -> None:
    chosen = [
        {
            (layer, channel)
            for layer, (_, mask) in row["layers"].items()
            for channel in channels_of(mask)
        }
        for row in rows
        if (row["network"], row["method"]) == ("small", "tinytrain")
    ]
    first, second = chosen[:3], chosen[3:]
    within = [
        len(first[i] & first[j]) / len(first[i] | first[j]) for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    between = [len(a & b) / len(a | b) for a in first for b in second]
    shown = section(page, "selection")
    assert re.search(rf"within traffic_sign [\d.]+ {np.mean(within):.2f} [\d.]+ 3 ", shown)
    assert re.search(rf"traffic_sign and omniglot [\d.]+ {np.mean(between):.2f} [\d.]+ 9 ", shown)


def test_meta_training_is_drawn_of_tasks_that_both_have_done(tmp_path: Path) -> None:
    networks = {"small": NETWORK, "small-meta": NETWORK}
    rows = made_up_rows(networks, ["omniglot"], ["none"], 4)
    fewer = [row for row in rows if row["network"] == "small" or row["task"] < 2]
    write_report(fewer, "none", tmp_path / "fewer")
    both = [row for row in rows if row["task"] < 2]
    write_report(both, "none", tmp_path / "both")
    drawing = "meta-training-small-0.png"
    assert (tmp_path / "fewer" / drawing).read_bytes() == (tmp_path / "both" / drawing).read_bytes()


@pytest.mark.parametrize("layers", [{"99": ["out", "1"]}, {"41": ["out", "f" * 99]}])
def test_layers_that_the_network_has_not_are_named(tmp_path: Path, layers: Row) -> None:
    rows = made_up_rows({"small": NETWORK}, ["omniglot"], ["tinytrain"], 1)
    rows[0]["layers"] = layers
    with pytest.raises(
        ValueError, match=r"row of small, omniglot 0, tinytrain: layers: .* no layer"
    ):
        write_report(rows, "tinytrain", tmp_path, PROFILES)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    rows = made_up_rows({"tiny": tiny_network()}, ["omniglot"], ["none", "lastlayer"], 1)
    page = write_report(rows, "none", tmp_path).read_text(encoding="utf-8")
    Structure(page)
    missing = section(page, "missing")
    absent = {
        "accuracy-macs",
        "by-support",
        "single-layers",
        "channels",
        "meta-training",
        "selection",
    }
    for anchor, title in VIEWS.items():
        assert (f'<section id="{anchor}">' in page) == (anchor not in absent)
        assert (f"{title} (" in missing) == (anchor in absent)
    assert "layer:index=NUMBER,ratio=SHARE" in missing
    assert "nan" not in text_of(page)  # one task has no interval


def test_tasks_drawn_otherwise_are_kept_apart(tmp_path: Path) -> None:
    networks = {"tiny": tiny_network()}
    rows = made_up_rows(networks, ["omniglot"], ["none", "lastlayer"], 2)
    rows += made_up_rows(networks, ["omniglot"], ["none", "lastlayer"], 3, largest_support=100)
    page = write_report(rows, "none", tmp_path).read_text(encoding="utf-8")
    shown = section(page, "accuracy")
    for size, label in ((500, "tiny, support up to 500"), (100, "tiny, support up to 100")):
        assert f"{label}: accuracy" in shown
        of = [row for row in rows if row["largest_support"] == size]
        for cell in summary(of, "none")["accuracy"]:
            assert f"{cell['mean']:.1f}" in shown
    assert "omniglot, support up to 100 3 " in section(page, "tasks")


def test_names_are_text_never_markup(tmp_path: Path) -> None:
    rows = made_up_rows({"<b>&/..": tiny_network()}, ["<i>x"], ["none", "lastlayer"], 2)
    page = write_report(rows, "none", tmp_path / "out").read_text(encoding="utf-8")
    Structure(page)
    assert "<b>&/" not in page
    assert "<i>" not in page
    assert "&lt;i&gt;x" in page
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="rows: expected at least one"):
        write_report([], "none", tmp_path)


def test_single_layers_have_a_curve_for_each_rule(page: str) -> None:
    drawing = page.split('<section id="single-layers">')[1].split("</section>")[0]
    assert ">1/2 of its channels</text>" in drawing
    assert ">1/2 of its channels, random</text>" in drawing


def test_a_dollar_in_a_name_is_a_dollar(tmp_path: Path) -> None:
    domains = [r"$\bad{", "$x$"]  # neither is a formula, the first not even a whole one
    rows = made_up_rows({"small": NETWORK}, domains, ["tinytrain"], 2)
    page = write_report(rows, "tinytrain", tmp_path).read_text(encoding="utf-8")
    drawing = page.split('<section id="selection">')[1].split("</section>")[0]
    assert all(f">{domain}</text>" in drawing for domain in domains)


def test_a_reference_without_rows_is_said(tmp_path: Path) -> None:
    rows = made_up_rows({"tiny": tiny_network()}, ["omniglot"], ["none", "lastlayer"], 2)
    for reference, sentence in (
        ("tinytrain", "There are no differences: no row is of TinyTrain"),
        ("none", "Differences are to None and paired"),
    ):
        page = write_report(rows, reference, tmp_path).read_text(encoding="utf-8")
        assert sentence in text_of(page)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = tiny_network()
    network.save(tmp_path / "tiny.safetensors")
    for part, methods in (("a", ["none"]), ("b", ["lastlayer"])):
        (tmp_path / part).mkdir()
        rows = made_up_rows({"tiny": network}, ["omniglot"], methods, 2)
        lines = [json.dumps({**row, "digest": network.digest}) for row in rows]
        (tmp_path / part / "rows-0-of-1.jsonl").write_text("\n".join(lines) + "\n")
    folders = [str(tmp_path / part) for part in ("a", "b")]
    command = ["report", *folders, "--out", str(tmp_path / "out"), "--reference", "none"]
    assert main([*command, "--network", str(tmp_path / "tiny.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "command": "report",
        "rows": 4,
        "networks": ["tiny"],
        "report": str(tmp_path / "out" / "index.html"),
    }
    assert main(command) == 0
    assert "index.html: 4 rows of tiny" in capsys.readouterr().out
    tiny_network(seed=1).save(tmp_path / "tiny.safetensors")
    for wrong, message in (
        (["--network", str(tmp_path / "tiny.safetensors")], "tiny: expected the weights of rows"),
        (["--reference", "best"], "method 'best': expected one of"),
        (["--out", str(tmp_path / "tiny.safetensors")], "tiny.safetensors: File exists"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path)]) == 2
    assert "expected rows-*.jsonl" in capsys.readouterr().err
