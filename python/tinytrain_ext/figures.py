"""The paper's tables and figures of an evaluation's rows: one HTML page, and its drawings as PNG.

Everything is computed from rows (`evaluate.read_rows`); what a layer costs, which rows do not say,
comes from the networks' cost profiles where they are given. A view whose rows are missing is left
out, and the page says which rows it needs. Rows are compared only where they are of one network
and of tasks drawn alike. Needs matplotlib (the [plot] extra).
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from numpy.typing import NDArray

from .cost import Profile
from .episodes import mean_and_interval
from .evaluate import METHODS, Method, Row, channels_of, summary
from .network import write_atomically
from .page import COLOURS, Page, inline_svg, table

__all__ = ["write_report"]

Place = tuple[str, int]  # domain, task
Cells = dict[Place, Row]

_TITLES = {
    "none": "None",
    "lastlayer": "LastLayer",
    "fulltrain": "FullTrain",
    "sparseupdate": "SparseUpdate",
    "tinytrain": "TinyTrain",
    "layer": "One layer",
}
_COLOUR_OF = {
    "none": "grey",
    "lastlayer": "orange",
    "fulltrain": "red",
    "sparseupdate": "green",
    "tinytrain": "blue",
    "layer": "purple",
}
_COLOUR = {name: light for name, (light, _) in COLOURS.items()}
_RULES = {"fisher": "Fisher", "l2": "L2 norm", "random": "random"}
_RULE_COLOURS = {"fisher": "blue", "l2": "orange", "random": "grey"}
_KINDS = {"pointwise": "pw", "depthwise": "dw", "dense": "dense"}
_MEBI = 1 << 20
_TIMES = "\N{MULTIPLICATION SIGN}"
_DEFAULT_RATIO = 0.5
_WIDTH = 4.2  # inches: drawings are as wide as a phone, and grow
_LONGEST_LINE = 22  # characters of a label
_MOST_CIRCLES = 9
_MOST_POINTS = 900.0  # area of the largest circle, in square points
_PIXELS_OF_DOMAIN = 8  # height of a domain's strip in the drawing of channels

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tinytrain",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.8,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.use": True,
    "text.color": _COLOUR["ink"],
    "axes.labelcolor": _COLOUR["soft"],
    "axes.edgecolor": _COLOUR["soft"],
    "xtick.color": _COLOUR["soft"],
    "ytick.color": _COLOUR["soft"],
    "grid.color": _COLOUR["line"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
}


def write_report(
    rows: Sequence[Row],
    reference: str,
    folder: Path,
    profiles: Mapping[str, Profile] | None = None,
) -> Path:
    """Writes FOLDER/index.html, which needs no other file, and its drawings as PNG beside it.

    rows: of one or several evaluations, each at most once; reference: name of the method that
    others are compared with; profiles: {network as rows name it: its costs}, for what rows do not
    say (layers' kinds, sizes and MACs; FullTrain's memory at batch 100). The same rows give the
    same files. Returns the page.

    Raises ValueError for no rows or a method that is not known, OSError where it cannot write.
    """
    if not rows:
        raise ValueError("rows: expected at least one, got none")
    reference = Method.parse(reference).name
    folder.mkdir(parents=True, exist_ok=True)
    report = _Report(rows, reference, folder, profiles or {})
    page = Page("Training on the device, compared", report.lead())
    missing = []
    with mpl.rc_context(_STYLE):
        for view in _VIEWS:
            parts = view.make(report)
            if parts:
                note = f'<p class="note">{view.note}</p>'
                page.section(view.anchor, view.title, view.source, [note, *parts])
            else:
                sentence = f"<b>{escape(view.title)}</b> ({view.source}): {view.missing}"
                missing.append(f"<li>{sentence}</li>")
    if missing:
        page.section("missing", "What these rows do not show", "", [f"<ul>{''.join(missing)}</ul>"])
    path = folder / "index.html"
    write_atomically(path, page.html().encode())
    return path


@dataclass(frozen=True)
class _View:
    """A section of the page; `missing` says what it needs when `make` returns nothing."""

    anchor: str
    title: str
    source: str
    note: str
    missing: str
    make: Callable[[_Report], list[str]]


@dataclass
class _Group:
    """The rows of one network on tasks drawn alike, which may be compared with each other."""

    network: str
    settings: tuple[Any, ...]
    label: str = ""
    anchor: str = ""
    cells: dict[str, Cells] = field(default_factory=dict)

    @property
    def domains(self) -> list[str]:
        """In the order of their rows."""
        return list(dict.fromkeys(domain for of in self.cells.values() for domain, _ in of))

    def methods(self, *, ablations: bool = False) -> list[str]:
        """Names, cheap kinds first; without those that have a view of their own."""
        found = [
            name
            for name in self.cells
            if ablations or not (_parsed(name).kind == "layer" or _rule(name) != "fisher")
        ]
        return sorted(found, key=lambda name: METHODS.index(_parsed(name).kind))

    def mean(self, method: str, of: str) -> float:
        """The mean of a field over a method's tasks."""
        return fmean(row[of] for row in self.cells[method].values())

    def accuracies(self, method: str, domain: str | None = None) -> list[float]:
        """Per cent, a task each."""
        return [
            100 * row["accuracy"]
            for (home, _), row in self.cells.get(method, {}).items()
            if domain in (None, home)
        ]


class _Report:
    """What the views share: the groups of rows, and the folder of drawings."""

    def __init__(
        self,
        rows: Sequence[Row],
        reference: str,
        folder: Path,
        profiles: Mapping[str, Profile],
    ) -> None:
        self.rows = rows
        self.reference = reference
        self.profiles = profiles
        self._folder = folder
        found: dict[tuple[Any, ...], _Group] = {}
        for row in rows:
            settings = _settings(row)
            group = found.setdefault((row["network"], settings), _Group(row["network"], settings))
            group.cells.setdefault(row["method"], {})[row["domain"], row["task"]] = row
        self.groups = list(found.values())
        self.settings = list(dict.fromkeys(group.settings for group in self.groups))
        for index, group in enumerate(self.groups):
            group.label = group.network + self.suffix(group.settings)
            group.anchor = f"{_file_name(group.network)}-{index}"

    def suffix(self, settings: tuple[Any, ...]) -> str:
        """What tells tasks of these settings from the others, where there are others."""
        different = [
            text.format(value)
            for text, value, values in zip(
                (", seed {}", ", protocol {}", ", support up to {}", ", {} fixed views"),
                settings,
                zip(*self.settings, strict=True),
                strict=True,
            )
            if len(set(values)) > 1 and value is not None
        ]
        return "".join(different)

    def lead(self) -> str:
        """What the rows are of, in a sentence or two."""
        networks = list(dict.fromkeys(group.network for group in self.groups))
        domains = list(dict.fromkeys(row["domain"] for row in self.rows))
        tasks = {(row["domain"], row["task"], *_settings(row)) for row in self.rows}
        counts = [sum(task[0] == domain for task in tasks) for domain in domains]
        least, most = min(counts), max(counts)
        seed = ", ".join(dict.fromkeys(str(seed) for seed, *_ in self.settings))
        names = _listed([f"<b>{escape(name)}</b>" for name in networks])
        return (
            f"{names} on few-shot tasks of {_listed([escape(name) for name in domains])}: "
            f"{least if least == most else f'{least} to {most}'} "
            f"{'task' if most == 1 else 'tasks'} a domain, "
            f"{len(self.rows):,} rows, seed {seed}. Differences are to "
            f"<b>{escape(_plain(self.reference))}</b> and paired, on tasks that both methods have "
            f"done; intervals hold 95 %."
        )

    def figure(
        self, group: _Group, name: str, drawing: Figure, description: str, wide: bool = False
    ) -> str:
        """Saves a drawing beside the page, and gives it as a part of the page."""
        name = f"{name}-{group.anchor}"
        drawing.draw_without_rendering()
        drawing.set_layout_engine("none")  # both files as it has come out now
        image = io.BytesIO()
        drawing.savefig(image, format="png", dpi=200, facecolor="white")
        write_atomically(self._folder / f"{name}.png", image.getvalue())
        text = io.StringIO()
        drawing.savefig(text, format="svg", metadata={"Date": None})
        svg = inline_svg(text.getvalue(), name, f"{group.label}: {description}")
        style = ' class="wide" tabindex="0"' if wide else ""
        return f"<figure{style}><figcaption>{escape(group.label)}</figcaption>{svg}</figure>"


# Views


def _accuracy_and_macs(report: _Report) -> list[str]:
    figures = []
    for group in report.groups:
        names = [name for name in group.methods() if _parsed(name).kind != "none"]
        if len({_parsed(name).kind for name in names}) < 2:
            continue
        if len(names) > _MOST_CIRCLES:
            names = [name for name in names if ":" not in name or name == report.reference]
        drawing, axes = _drawing(_WIDTH, 3.5)
        bytes_of = {name: group.mean(name, "paper_bytes") for name in names}
        scale = _MOST_POINTS / max(*bytes_of.values(), 8 * _MEBI)
        labels = []
        for name in names:
            accuracy, interval = mean_and_interval(group.accuracies(name))
            place = group.mean(name, "backward_macs") / 1e6, accuracy
            colour = _colour(name)
            axes.errorbar(*place, yerr=_finite(interval), color=colour, lw=1, alpha=0.8)
            axes.scatter(
                *place, scale * bytes_of[name], color=colour, alpha=0.75, linewidths=0, zorder=3
            )
            radius = math.sqrt(scale * bytes_of[name] / math.pi)
            labels.append((place, radius, f"{_plain(name)}\n{_mebi(bytes_of[name])}", name))
        axes.margins(y=0.16)
        axes.set_xlim(0, 1.14 * max(place[0] for place, *_ in labels))
        if group.accuracies("none"):
            unadapted = fmean(group.accuracies("none"))
            axes.axhline(unadapted, color=_COLOUR["grey"], ls=(0, (4, 3)), lw=1)
            text = axes.annotate(
                "without adaptation",
                (1, unadapted),
                (0, -3),
                ha="right",
                va="top",
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
            )
            text.set_color(_COLOUR["soft"])
        axes.set_xlabel("backward pass, million MACs an image")
        axes.set_ylabel("accuracy, %")
        _place_labels(drawing, axes, labels, report.reference)
        description = "accuracy against backward MACs, circles by memory"
        figures.append(report.figure(group, "accuracy-macs", drawing, description))
    return _grid(figures)


def _accuracies(report: _Report) -> list[str]:
    parts: list[str] = []
    figures = []
    for settings in report.settings:
        groups = [group for group in report.groups if group.settings == settings]
        shown = [name for group in groups for name in group.methods()]
        rows = [row for row in report.rows if _settings(row) == settings and row["method"] in shown]
        if not rows:
            continue
        found = summary(rows, report.reference)
        for group in groups:
            columns = [*group.domains, "all"] if len(group.domains) > 1 else group.domains
            for part, caption in (
                ("accuracy", "accuracy, % (bold: the best of its column)"),
                ("differences", f"minus {_plain(report.reference)}, points, paired"),
            ):
                cells = {
                    (row["method"], row["domain"]): row
                    for row in found[part]
                    if row["network"] == group.network
                }
                if cells:
                    title = f"{escape(group.label)}: {caption}"
                    signed = part == "differences"
                    parts.append(_accuracy_table(title, group.methods(), columns, cells, signed))
                if cells and part == "differences":
                    figures.append(_differences(report, group, cells))
    return [*_grid(figures), *parts]


def _accuracy_table(
    title: str,
    methods: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[Place | tuple[str, str], Row],
    signed: bool,
) -> str:
    best = {
        column: max((row["mean"] for (_, of), row in cells.items() if of == column), default=0)
        for column in columns
    }
    body = []
    for method in methods:
        if not any((method, column) in cells for column in columns):
            continue
        texts = [_name(method)]
        for column in columns:
            row = cells.get((method, column))
            if row is None:
                texts.append("")
            elif signed:
                texts.append(_difference(row["mean"], row["interval"]))
            else:
                text = f"{row['mean']:.1f}"
                bold = f"<b>{text}</b>" if row["mean"] == best[column] else text
                texts.append(f"{bold} {_plus_minus(row['interval'])}")
        texts.append(str(max(cells[method, c]["tasks"] for c in columns if (method, c) in cells)))
        body.append(texts)
    heads = ["all domains" if column == "all" else escape(column) for column in columns]
    return table(["method", *heads, "tasks"], body, title)


def _differences(report: _Report, group: _Group, cells: Mapping[tuple[str, str], Row]) -> str:
    """Paired differences of all domains together, and of each as a small mark."""
    methods = [name for name in group.methods() if (name, "all") in cells][::-1]
    drawing, axes = _drawing(_WIDTH, 0.75 + 0.4 * len(methods))
    axes.axvline(0, color=_COLOUR["ink"], lw=1)
    for height, method in enumerate(methods):
        colour = _colour(method)
        for domain in group.domains:
            if (method, domain) in cells:
                axes.plot(
                    cells[method, domain]["mean"], height, "|", color=colour, ms=9, alpha=0.55
                )
        row = cells[method, "all"]
        interval = _finite(row["interval"])
        axes.errorbar(row["mean"], height, xerr=interval, fmt="o", color=colour, ms=5.5, lw=2)
    axes.set_yticks(range(len(methods)), [_plain(name) for name in methods])
    axes.tick_params(axis="y", length=0, labelcolor=_COLOUR["ink"])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.6, len(methods) - 0.4)
    reference = _TITLES[_parsed(report.reference).kind]
    axes.set_xlabel(f"points above or below {reference}", loc="right")
    return report.figure(group, "differences", drawing, "paired differences with intervals")


def _costs(report: _Report) -> list[str]:
    parts = []
    for group in report.groups:
        methods = [name for name in group.methods() if _parsed(name).kind != "none"]
        if not methods:
            continue
        of = {
            name: {
                what: group.mean(name, what)
                for what in ("updated_weights", "paper_bytes", "planner_bytes", "backward_macs")
            }
            for name in methods
        }
        base = of.get(report.reference)

        def ratio(value: float, what: str, base: dict[str, float] | None = base) -> str:
            return f"{_factor(value / base[what])}" if base else ""

        body = []
        for name in methods:
            costs = of[name]
            body.append(
                [
                    _name(name),
                    f"{costs['updated_weights']:,.0f}",
                    _mebi(costs["paper_bytes"]),
                    ratio(costs["paper_bytes"], "paper_bytes"),
                    _mebi(costs["planner_bytes"]),
                    ratio(costs["planner_bytes"], "planner_bytes"),
                    f"{costs['backward_macs'] / 1e6:.2f} M",
                    ratio(costs["backward_macs"], "backward_macs"),
                ]
            )
            costs_of_layers = report.profiles.get(group.network)
            if _parsed(name).kind == "fulltrain" and costs_of_layers is not None:
                hundred = costs_of_layers.full_train_bytes(100)
                title = "FullTrain<small>batch 100, every input kept: as Table 2 prints it</small>"
                memory = [_mebi(hundred), ratio(hundred, "paper_bytes")]
                body.append([title, body[-1][1], *memory, "", "", *body[-1][6:]])
        head = ["method", "weights trained", "memory, paper's formula", "ratio"]
        head += ["memory, planned peak", "ratio", "backward MACs", "ratio"]
        parts.append(table(head, body, f"{escape(group.label)}: one image, fp32, means over tasks"))
    return parts


def _single_layers(report: _Report) -> list[str]:
    figures = []
    for group in report.groups:
        costs = report.profiles.get(group.network)
        points: dict[float, dict[int, dict[str, float]]] = {}
        for name in group.methods(ablations=True):
            method = _parsed(name)
            gains = _paired(group, name, "none")
            if method.kind != "layer" or not gains:
                continue
            layers = {int(layer) for row in group.cells[name].values() for layer in row["layers"]}
            share = method.options.get("ratio", _DEFAULT_RATIO)
            gain, interval = mean_and_interval(gains)
            (layer,) = layers
            at = points.setdefault(share, {}).setdefault(layer, {})
            at |= {"gain": gain, "interval": interval}
            trained = group.mean(name, "updated_weights")
            at["weights"] = gain / trained * 1e3
            at["macs"] = gain / group.mean(name, "backward_macs") * 1e6
            if costs is not None:
                row = costs.layers[layer]
                at["own"] = gain / (row.macs * trained / row.weights) * 1e6
        if not points:
            continue
        layers_shown = sorted({layer for of in points.values() for layer in of})
        panels = {
            "gain": "gain over None, points",
            "weights": "gain per 1,000 weights trained",
            **({"own": "gain per million MACs of its own dW"} if costs else {}),
            "macs": "gain per million backward MACs, dX and dW",
        }
        drawing = Figure((_WIDTH, 0.4 + 1.5 * len(panels)))
        axes_of = drawing.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (what, title) in zip(axes_of, panels.items(), strict=True):
            _shade_depthwise(axes, layers_shown, costs)
            axes.axhline(0, color=_COLOUR["soft"], lw=0.8)
            for index, (share, of) in enumerate(sorted(points.items())):
                known = [layer for layer in layers_shown if layer in of]
                colour = _COLOUR[("orange", "green", "red", "blue")[index % 4]]
                axes.errorbar(
                    [layers_shown.index(layer) for layer in known],
                    [of[layer][what] for layer in known],
                    yerr=[_finite(of[layer]["interval"]) for layer in known]
                    if what == "gain"
                    else None,
                    fmt="osD^"[index % 4] + "-",
                    color=colour,
                    lw=1.3,
                    ms=3.8,
                    elinewidth=0.8,
                    label=f"{_share_text(share)} of its channels",
                )
            axes.set_title(title)
            axes.grid(axis="x", visible=False)
        axes_of[-1].set_xticks(range(len(layers_shown)), [str(layer) for layer in layers_shown])
        axes_of[-1].set_xlabel(
            "layer trained" + (" (shaded: depthwise)" if costs is not None else "")
        )
        if len(points) > 1:
            drawing.legend(
                *axes_of[0].get_legend_handles_labels(),
                loc="outside upper right",
                ncols=len(points),
            )
        description = "gain of training one layer"
        figures.append(report.figure(group, "single-layers", drawing, description))
    return _grid(figures)


def _shade_depthwise(axes: Axes, layers: Sequence[int], costs: Profile | None) -> None:
    for place, layer in enumerate(layers):
        if costs is not None and costs.layers[layer].kind == "depthwise":
            axes.axvspan(place - 0.5, place + 0.5, color=_COLOUR["line"], alpha=0.5, lw=0)


def _channel_rules(report: _Report) -> list[str]:
    figures, tables = [], []
    for group in report.groups:
        families: dict[str, dict[float, dict[str, str]]] = {}
        for name in group.methods(ablations=True):
            method = _parsed(name)
            if method.kind == "tinytrain":
                options = dict(method.options)
                rule = options.pop("channels", "fisher")
                share = options.pop("ratio", _DEFAULT_RATIO)
                rest = ", ".join(f"{key} {value}" for key, value in sorted(options.items()))
                families.setdefault(rest, {}).setdefault(share, {})[rule] = name
        for index, (rest, shares) in enumerate(families.items()):
            compared = {
                share: rules
                for share, rules in sorted(shares.items())
                if "fisher" in rules
                and any(
                    _paired(group, rules["fisher"], name)
                    for rule, name in rules.items()
                    if rule != "fisher"
                )
            }
            if not compared:
                continue
            name = "channels" if index == 0 else f"channels-{index}"
            figures.append(_draw_channel_rules(report, group, name, compared))
            body = []
            for share, rules in compared.items():
                cells = [_share_text(share)]
                for rule in ("random", "l2"):
                    for domain in (*group.domains, None):
                        gains = _paired(group, rules["fisher"], rules.get(rule, ""), domain)
                        cells.append(_difference(*mean_and_interval(gains)) if gains else "")
                body.append(cells)
            heads = [
                f"{rule_text}<br>{'all domains' if domain is None else escape(domain)}"
                for rule_text in ("over random", "over L2 norm")
                for domain in (*group.domains, None)
            ]
            title = f"{escape(group.label)}: Fisher's channels minus others, points, paired"
            title += f" ({escape(rest)})" if rest else ""
            tables.append(table(["of a layer", *heads], body, title))
    return [*_grid(figures), *tables]


def _draw_channel_rules(
    report: _Report, group: _Group, name: str, compared: Mapping[float, Mapping[str, str]]
) -> str:
    drawing, axes = _drawing(_WIDTH, 3.1)
    for index, rule in enumerate(("random", "l2", "fisher")):
        known = [share for share, rules in compared.items() if rule in rules]
        cells = [mean_and_interval(group.accuracies(compared[share][rule])) for share in known]
        if cells:
            axes.errorbar(
                [list(compared).index(share) + 0.08 * (index - 1) for share in known],
                [mean for mean, _ in cells],
                yerr=[_finite(interval) for _, interval in cells],
                fmt="s^o"[index] + "-",
                color=_COLOUR[_RULE_COLOURS[rule]],
                label=_RULES[rule],
                lw=1.6,
                ms=5,
                elinewidth=1,
            )
    axes.set_xticks(range(len(compared)), [_share_text(share) for share in compared])
    axes.set_xlim(-0.4, len(compared) - 0.6)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("of a layer's channels")
    axes.set_ylabel("accuracy, %")
    drawing.legend(loc="outside upper right", ncols=3, columnspacing=1.2)
    return report.figure(group, name, drawing, "accuracy by rule of choosing channels")


def _meta_training(report: _Report) -> list[str]:
    by_place = {(group.network, group.settings): group for group in report.groups}
    figures, tables = [], []
    for group in report.groups:
        trained = by_place.get((f"{group.network}-meta", group.settings))
        if trained is None:
            continue
        differences = {
            name: {
                domain: values
                for domain in (*group.domains, None)
                if (values := _paired(trained, name, name, domain, base=group))
            }
            for name in group.methods()
        }
        shown = [name for name in group.methods() if differences[name]]
        if not shown:
            continue
        drawing, axes = _drawing(_WIDTH, 0.95 + 0.4 * len(shown))
        for height, name in enumerate(reversed(shown)):
            before, after = fmean(group.accuracies(name)), fmean(trained.accuracies(name))
            colour = _colour(name)
            axes.plot([before, after], [height, height], color=colour, lw=2, alpha=0.45)
            axes.plot(before, height, "o", mfc=_COLOUR["ground"], mec=colour, mew=1.6, ms=7)
            axes.plot(after, height, "o", color=colour, ms=7)
        axes.plot([], [], "o", mfc="none", mec=_COLOUR["soft"], mew=1.6, label="without")
        axes.plot([], [], "o", color=_COLOUR["soft"], label="with meta-training")
        drawing.legend(loc="outside upper right", ncols=2)
        axes.set_yticks(range(len(shown)), [_plain(name) for name in reversed(shown)])
        axes.tick_params(axis="y", length=0, labelcolor=_COLOUR["ink"])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("accuracy, %")
        description = "accuracy with and without meta-training"
        figures.append(report.figure(group, "meta-training", drawing, description))
        body = [
            [_name(name)]
            + [
                _difference(*mean_and_interval(differences[name][domain]))
                if domain in differences[name]
                else ""
                for domain in (*group.domains, None)
            ]
            for name in shown
        ]
        heads = [*map(escape, group.domains), "all domains"]
        title = f"{escape(group.label)}: what meta-training adds, points, paired"
        tables.append(table(["method", *heads], body, title))
    return [*_grid(figures), *tables]


def _latency(report: _Report) -> list[str]:
    figures, tables = [], []
    for group in report.groups:
        methods = [name for name in group.methods() if _parsed(name).kind != "none"]
        if not methods:
            continue
        drawing, axes = _drawing(_WIDTH, 0.95 + 0.4 * len(methods))
        body = []
        total_of_reference = (
            group.mean(report.reference, "seconds") if report.reference in methods else None
        )
        for height, name in enumerate(reversed(methods)):
            total = group.mean(name, "seconds")
            selection = group.mean(name, "selection_seconds")
            axes.barh(height, selection, 0.6, color=_COLOUR["purple"])
            axes.barh(height, total - selection, 0.6, left=selection, color=_colour(name))
            axes.annotate(
                f"{total:.1f} s", (total, height), (4, 0), textcoords="offset points", va="center"
            )
        for name in methods:
            total = group.mean(name, "seconds")
            selection = group.mean(name, "selection_seconds")
            mine = group.mean(name, "support")
            body.append(
                [
                    _name(name),
                    f"{selection:.2f}",
                    f"{total - selection:.2f}",
                    f"{total:.2f}",
                    _factor(total / total_of_reference) if total_of_reference else "",
                    f"{100 * selection / total:.1f} %",
                    f"{group.mean(name, 'cpu_seconds'):.2f}",
                    f"{1e3 * (total - selection) / mine:.1f}",
                    f"{mine:.1f}",
                ]
            )
        axes.set_yticks(range(len(methods)), [_plain(name) for name in reversed(methods)])
        axes.tick_params(axis="y", length=0, labelcolor=_COLOUR["ink"])
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.14)
        axes.set_xlabel("seconds a task (purple: selection)", loc="right")
        figures.append(report.figure(group, "latency", drawing, "seconds of a task"))
        head = ["method", "selection, s", "run, s", "total, s", "ratio", "selection's share"]
        head += ["CPU time, s", "run, ms a support image", "support images"]
        tables.append(table(head, body, f"{escape(group.label)}: means over tasks"))
    return [*_grid(figures), *tables]


def _selections(report: _Report) -> list[str]:
    parts = []
    for group in report.groups:
        adaptive = [name for name in group.methods() if _parsed(name).kind == "tinytrain"]
        shown = [name for name in adaptive if name in ("tinytrain", report.reference)]
        for index, name in enumerate(shown or adaptive[:1]):
            parts += _selection(report, group, name, f"-{index}" if index else "")
    return parts


def _selection(report: _Report, group: _Group, name: str, suffix: str) -> list[str]:
    """What a method selected on each domain: layers, channels, and how much tasks agree."""
    cells = group.cells[name]
    chosen: dict[Place, dict[int, tuple[int, ...]]] = {
        place: {int(layer): channels_of(mask) for layer, (_, mask) in row["layers"].items()}
        for place, row in cells.items()
    }
    layers = sorted({layer for of in chosen.values() for layer in of})
    costs = report.profiles.get(group.network)
    sizes = {
        layer: costs.layers[layer].out_channels
        if costs
        else 1 + max(max(of[layer]) for of in chosen.values() if layer in of)
        for layer in layers
    }
    # (tasks, channels) of each layer: 1 where a task trains a channel.
    masks = {layer: np.zeros((len(chosen), sizes[layer])) for layer in layers}
    for row, of in enumerate(chosen.values()):
        for layer, channels in of.items():
            masks[layer][row, list(channels)] = 1
    homes = [domain for domain, _ in chosen]
    members = {
        domain: np.array([home == domain for home in homes]) for domain in dict.fromkeys(homes)
    }
    drawing, axes = _drawing(_WIDTH + 1.4, 1.0 + 0.34 * len(members))
    for row, mine in enumerate(members.values()):
        for column, layer in enumerate(layers):
            taken = masks[layer][mine].any(axis=1)
            count = masks[layer][mine].sum(axis=1)[taken].mean() if taken.any() else 0
            share = float(taken.mean())
            box = Rectangle(
                (column - 0.46, row - 0.46),
                0.92,
                0.92,
                color=_COLOUR["blue"],
                alpha=0.1 + 0.6 * share if share else 0.04,
                lw=0,
            )
            axes.add_patch(box)
            if share:
                text = f"{count:.0f}" + (f"\n{100 * share:.0f} %" if share < 1 else "")
                axes.text(column, row, text, ha="center", va="center", fontsize=7)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(len(members) - 0.5, -0.5)
    axes.set_yticks(range(len(members)), list(members))
    ticks = [
        f"{layer}\n{_KINDS[costs.layers[layer].kind]}" if costs else str(layer) for layer in layers
    ]
    axes.set_xticks(range(len(layers)), ticks)
    axes.tick_params(length=0, labelcolor=_COLOUR["ink"])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("layer")
    method = escape(_plain(name).replace("\n", ", "))
    title = f"<h3>{escape(group.label)}: {method}</h3>"
    description = "which layers were selected on which domain, and how many channels"
    layers_figure = report.figure(group, f"layers{suffix}", drawing, description, wide=True)
    strips = _draw_channels(masks, members)
    description = "how often each channel was selected on each domain"
    channels_figure = report.figure(group, f"which-channels{suffix}", strips, description, True)
    return [title, *_grid([layers_figure, channels_figure]), _agreement(masks, members, sizes)]


def _draw_channels(
    masks: Mapping[int, NDArray[np.float64]], members: Mapping[str, NDArray[np.bool_]]
) -> Figure:
    """For each layer, its channels from the most to the least often chosen, by domain."""
    drawing = Figure((_WIDTH + 1.4, 0.7 + (0.1 + 0.13 * len(members)) * len(masks)))
    axes_of = drawing.subplots(len(masks), 1, squeeze=False)[:, 0]
    red, green, blue = (int(_COLOUR["blue"][at : at + 2], 16) for at in (1, 3, 5))
    for axes, (layer, mask) in zip(axes_of, masks.items(), strict=True):
        order = np.argsort(-mask.mean(axis=0), kind="stable")
        often = np.stack([mask[mine].mean(axis=0)[order] for mine in members.values()])
        image = np.zeros((*often.shape, 4), np.uint8)
        image[..., :3] = red, green, blue
        image[..., 3] = 255 * often
        axes.imshow(image.repeat(_PIXELS_OF_DOMAIN, axis=0), aspect="auto", interpolation="none")
        for row in range(1, len(members)):
            axes.axhline(row * _PIXELS_OF_DOMAIN - 0.5, color=_COLOUR["ground"], lw=1)
        axes.set_yticks([])
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.set_ylabel(str(layer), rotation=0, ha="right", va="center")
        for spine in axes.spines.values():
            spine.set(visible=True, color=_COLOUR["line"])
    domains = ", ".join(members)
    axes_of[0].set_title(f"layer by layer; strips from the top: {domains}", fontsize=8.5)
    axes_of[-1].set_xlabel("its channels, from the most to the least often selected")
    return drawing


def _agreement(
    masks: Mapping[int, NDArray[np.float64]],
    members: Mapping[str, NDArray[np.bool_]],
    sizes: Mapping[int, int],
) -> str:
    """Mean Jaccard similarity of two tasks' selections, within and between domains."""
    channels = np.concatenate(list(masks.values()), axis=1)
    layers = np.stack([mask.any(axis=1) for mask in masks.values()], axis=1).astype(np.float64)
    # Of sets drawn at random from the layers, each as large as the task's: |A| |B| / C expected.
    counts = np.stack([mask.sum(axis=1) for mask in masks.values()], axis=1)
    shared = (counts / np.array([sizes[layer] for layer in masks])) @ counts.T
    whole = counts.sum(axis=1)
    chance = shared / (whole[:, None] + whole - shared)
    tables = {
        "layers": _jaccard(layers),
        "channels": _jaccard(channels),
        "channels drawn at random": chance,
    }
    body = []
    domains = list(members)
    for one, other in [*((domain, domain) for domain in domains), *combinations(domains, 2)]:
        pairs = np.outer(members[one], members[other])
        if one == other:
            pairs = np.triu(pairs, 1)
        if pairs.any():
            name = f"within {escape(one)}"
            if one != other:
                name = f"{escape(one)} and {escape(other)}"
            values = [f"{table_[pairs].mean():.2f}" for table_ in tables.values()]
            body.append([name, *values, f"{int(pairs.sum()):,}"])
    if not body:
        return ""
    title = "How alike two tasks' selections are (Jaccard: 1 the same, 0 nothing in common)"
    return table(["tasks", *tables, "pairs"], body, title)


def _jaccard(sets: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, N) of the rows of (N, elements) of zeros and ones."""
    shared = sets @ sets.T
    sizes = sets.sum(axis=1)
    found: NDArray[np.float64] = shared / np.maximum(sizes[:, None] + sizes - shared, 1)
    return found


def _tasks(report: _Report) -> list[str]:
    body = []
    for settings in report.settings:
        rows = [row for row in report.rows if _settings(row) == settings]
        for cell in summary(rows, report.reference)["tasks"]:
            domain = escape(cell["domain"] + report.suffix(settings))
            sizes = [
                f"{cell[what][0]:.1f} <small>({cell[what][1]:.1f})</small>"
                for what in ("ways", "support", "query")
            ]
            body.append([domain, str(cell["tasks"]), *sizes])
    head = ["domain", "tasks", "ways", "support images", "query images"]
    return [table(head, body, "Mean (standard deviation)")]


_VIEWS = (
    _View(
        "accuracy-macs",
        "Accuracy against compute",
        "Figure 1",
        "Up and to the left is better. A circle's area is the memory of training with it, by the "
        "paper's formula at batch 1. Means over all tasks; bars are 95 % intervals. Of more than "
        f"{_MOST_CIRCLES} methods, those without options and the reference.",
        "needs rows of two kinds of methods that train.",
        _accuracy_and_macs,
    ),
    _View(
        "accuracy",
        "Accuracy by domain",
        "Table 1",
        "Mean accuracy on the query images, then each method minus the reference on the same "
        "tasks; a difference is <b>bold</b> where its 95 % interval leaves out 0. In the drawing, "
        "dots are all domains together and small strokes single domains.",
        "needs rows of a method.",
        _accuracies,
    ),
    _View(
        "costs",
        "Memory and compute",
        "Table 2",
        "The paper's formula (Appendix A.4) counts one layer's activations, what is saved, and "
        "weights with their gradient and optimiser state; the planned peak is every byte of the "
        "engine's arena in the phase that takes most. Which weights a task-adaptive method "
        "trains, and so its costs, depends on the task. Ratios are to the reference. The paper "
        "compares its batch-1 methods with FullTrain at batch 100, which makes the ratio some "
        "hundred times larger: both are here, where the network's file was given.",
        "needs rows of a method that trains.",
        _costs,
    ),
    _View(
        "single-layers",
        "Gain of training one layer",
        "Figure 3",
        "Accuracy above that of None on the same tasks when a single convolution is trained; then "
        "over what that costs. Bars are 95 % intervals.",
        "needs rows of <code>none</code> and of <code>layer:index=NUMBER,ratio=SHARE</code> on "
        "the same tasks.",
        _single_layers,
    ),
    _View(
        "channels",
        "Channels chosen for the task, or not",
        "Figures 4 and 6b",
        "The same layers with as many channels, chosen by the task's Fisher information, by the "
        "norm of their weights, or at random.",
        "needs rows of <code>tinytrain:ratio=SHARE</code> and of "
        "<code>tinytrain:channels=random,ratio=SHARE</code> or <code>channels=l2</code> on the "
        "same tasks.",
        _channel_rules,
    ),
    _View(
        "meta-training",
        "With and without meta-training",
        "Figure 6a",
        "The same methods on the same tasks, from two starting points.",
        "needs rows of two networks NAME and NAME-meta on the same tasks.",
        _meta_training,
    ),
    _View(
        "latency",
        "Time of an adaptation",
        "Tables 5 and 6",
        "Selection is the Fisher pass and the choice; run is everything else but loading the "
        "network. Times are of the machines that wrote these rows, with whatever else they did "
        "meanwhile: they compare methods, not machines. CPU time is less disturbed.",
        "needs rows of a method that trains.",
        _latency,
    ),
    _View(
        "selection",
        "What was selected",
        "Section 2.2",
        "First which layers: the darker, the larger the share of tasks; numbers are the channels "
        "trained, per cent the tasks where not all. Then which channels, strong where most tasks "
        "of a domain chose them: strips that differ are choices that depend on the domain.",
        "needs rows of <code>tinytrain</code>.",
        _selections,
    ),
    _View(
        "tasks",
        "The tasks",
        "Table 4",
        "Ways and shots vary from task to task, as Meta-Dataset draws them.",
        "needs rows.",
        _tasks,
    ),
)


# Parts of views


def _drawing(width: float, height: float) -> tuple[Figure, Axes]:
    drawing = Figure((width, height))
    return drawing, drawing.subplots()


_AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


def _place_labels(
    drawing: Figure,
    axes: Axes,
    labels: Sequence[tuple[tuple[float, float], float, str, str]],
    reference: str,
) -> None:
    """Writes each circle's label beside it, where it covers least of the others."""
    canvas: Any = FigureCanvasAgg(drawing)
    canvas.draw()  # places need a layout
    renderer = canvas.get_renderer()
    points_to_pixels = drawing.dpi / 72
    frame = axes.get_window_extent(renderer)
    circles = []
    for place, radius, _, _ in labels:
        x, y = axes.transData.transform(place)
        reach = radius * points_to_pixels
        circles.append((x - reach, y - reach, x + reach, y + reach))
    taken: list[tuple[float, float, float, float]] = []
    for (place, radius, text, name), circle in zip(labels, circles, strict=True):
        gap = radius + 3
        best = None
        for farther, (right, up) in product((0, 22, 44, 66), _AROUND):
            label = axes.annotate(
                text,
                place,
                (right * (gap + farther), up * (gap + farther)),
                textcoords="offset points",
                ha={1: "left", 0: "center", -1: "right"}[right],
                va={1: "bottom", 0: "center", -1: "top"}[up],
                fontsize=8,
                linespacing=1.15,
                fontweight="bold" if name == reference else "normal",
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "lw": 0.6, "color": _COLOUR["soft"], "shrinkB": 0}
                if farther
                else None,
            )
            label.set_in_layout(False)
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # without its line
            corners = (box.x0, box.y0, box.x1, box.y1)
            covered = sum(
                _overlap(corners, other) for other in (*taken, *circles) if other is not circle
            )
            outside = (box.width * box.height) - _overlap(
                corners, (frame.x0, frame.y0, frame.x1, frame.y1)
            )
            cost = covered + 2 * outside
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = cost, label, corners
            else:
                label.remove()
            if best[0] == 0:
                break
        assert best is not None
        taken.append(best[2])


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> float:
    """Area that two boxes (left, bottom, right, top) share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def _paired(
    group: _Group,
    method: str,
    other: str,
    domain: str | None = None,
    base: _Group | None = None,
) -> list[float]:
    """Accuracy of a method minus that of another on the tasks both have done, points."""
    mine, theirs = group.cells.get(method, {}), (base or group).cells.get(other, {})
    return [
        100 * (row["accuracy"] - theirs[place]["accuracy"])
        for place, row in mine.items()
        if place in theirs and domain in (None, place[0])
    ]


def _settings(row: Row) -> tuple[Any, ...]:
    return row["seed"], row["protocol"], row["largest_support"], row["views"]


def _parsed(name: str) -> Method:
    return Method.parse(name)


def _rule(name: str) -> str:
    return str(_parsed(name).options.get("channels", "fisher"))


def _colour(name: str) -> str:
    return _COLOUR[_COLOUR_OF[_parsed(name).kind]]


def _options(name: str) -> Iterator[str]:
    for key, value in _parsed(name).options.items():
        yield f"{key.replace('_', ' ')} {int(value) if isinstance(value, bool) else value}"


def _plain(name: str) -> str:
    """A method's name for drawings: options on lines of their own."""
    options = textwrap.wrap(", ".join(_options(name)), _LONGEST_LINE, break_long_words=False)
    return "\n".join([_TITLES[_parsed(name).kind], *options])


def _name(name: str) -> str:
    """A method's name for tables."""
    options = ", ".join(_options(name))
    return _TITLES[_parsed(name).kind] + (f"<small>{escape(options)}</small>" if options else "")


def _difference(mean: float, interval: float) -> str:
    text = f"{mean:+.1f}".replace("-", "\N{MINUS SIGN}")
    if abs(mean) > interval:
        side = "up" if mean > 0 else "down"
        text = f'<b class="{side}">{text}</b>'
    return f"{text} {_plus_minus(interval)}"


def _plus_minus(interval: float) -> str:
    return "" if math.isnan(interval) else f"<small>± {interval:.1f}</small>"


def _finite(interval: float) -> float:
    return 0.0 if math.isnan(interval) else interval


def _mebi(size: float) -> str:
    return f"{size / _MEBI:.2f} MiB" if size < 100 * _MEBI else f"{size / _MEBI:,.0f} MiB"


def _factor(ratio: float) -> str:
    return f"{ratio:.2f}{_TIMES}" if ratio < 100 else f"{ratio:,.0f}{_TIMES}"


def _share_text(share: float) -> str:
    return {0.125: "1/8", 0.25: "1/4", 0.5: "1/2", 1.0: "all"}.get(share, f"{share:g}")


def _grid(figures: Sequence[str]) -> list[str]:
    return [f'<div class="figures">{"".join(figures)}</div>'] if figures else []


def _listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in text)
