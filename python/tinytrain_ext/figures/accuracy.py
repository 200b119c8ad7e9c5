"""Accuracies: against compute, by domain, by support size, with and without meta-training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean

from ..episodes import mean_and_interval
from ..evaluate import Method, Row, summary
from ..page import table
from .comparison import Group, Place, Report, paired
from .drawing import (
    COLOUR,
    MEBI,
    TITLES,
    WIDTH,
    bar,
    colour_of,
    difference_text,
    grid,
    html_name,
    interval_text,
    mebi,
    name_rows,
    new_drawing,
    place_numbers,
    plain_name,
)

MOST_CIRCLES = 9

_MOST_POINTS = 900.0  # area of the largest circle, in square points
_KEY_LINE = 0.18  # inches
_SHADES = (0.3, 0.6, 1.0)  # of thirds of the tasks, fewest support images first


def accuracy_and_macs(report: Report) -> list[str]:
    """Figure 1: a drawing for each group."""
    figures = []
    for group in report.groups:
        names = [name for name in group.methods() if Method.parse(name).kind != "none"]
        if len({Method.parse(name).kind for name in names}) < 2:
            continue
        if len(names) > MOST_CIRCLES:
            names = [name for name in names if ":" not in name or name == report.reference]
        drawing, axes = new_drawing(WIDTH, 3.2 + _KEY_LINE * len(names))
        bytes_of = {name: group.mean(name, "paper_bytes") for name in names}
        scale = _MOST_POINTS / max(*bytes_of.values(), 8 * MEBI)
        circles = []
        for number, name in enumerate(names, 1):
            accuracy, interval = mean_and_interval(group.accuracies(name))
            place = group.mean(name, "backward_macs") / 1e6, accuracy
            colour = colour_of(name)
            axes.errorbar(*place, yerr=bar(interval), color=colour, lw=1, alpha=0.8)
            axes.scatter(
                *place, scale * bytes_of[name], color=colour, alpha=0.75, linewidths=0, zorder=3
            )
            words = plain_name(name).replace("\n", ": ", 1).replace("\n", " ")
            entry = f"{number}  {words}, {mebi(bytes_of[name])}"
            axes.plot([], [], "o", color=colour, alpha=0.75, mew=0, label=entry)
            circles.append((place, math.sqrt(scale * bytes_of[name] / math.pi)))
        axes.margins(y=0.16)
        axes.set_xlim(0, 1.14 * max(place[0] for place, _ in circles))
        if group.accuracies("none"):
            unadapted = fmean(group.accuracies("none"))
            axes.axhline(unadapted, color=COLOUR["grey"], ls=(0, (4, 3)), lw=1)
            text = axes.annotate(
                "without adaptation",
                (1, unadapted),
                (0, 3),
                ha="right",
                va="bottom",
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
            )
            text.set_color(COLOUR["soft"])
        axes.set_xlabel("backward pass, million MACs an image")
        axes.set_ylabel("accuracy, %")
        key = drawing.legend(loc="outside lower left", fontsize=8, handlelength=1)
        if report.reference in names:
            key.get_texts()[names.index(report.reference)].set_fontweight("bold")
        place_numbers(drawing, axes, circles)
        description = "accuracy against backward MACs, circles by memory"
        figures.append(report.figure(group, "accuracy-macs", drawing, description))
    return grid(figures)


def accuracies(report: Report) -> list[str]:
    """Table 1: drawings of the differences, and tables."""
    parts: list[str] = []
    figures = []
    for settings in report.settings:
        groups = [group for group in report.groups if group.settings == settings]
        shown = [name for group in groups for name in group.methods()]
        rows = [row for row in report.rows_of(settings) if row["method"] in shown]
        if not rows:
            continue
        found = summary(rows, report.reference)
        for group in groups:
            columns = [*group.domains, "all"] if len(group.domains) > 1 else group.domains
            for part, caption in (
                ("accuracy", "accuracy, % (bold: the best of its column)"),
                ("differences", f"minus {plain_name(report.reference)}, points, paired"),
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
    return [*grid(figures), *parts]


def _accuracy_table(
    title: str,
    methods: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[str, str], Row],
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
        texts = [html_name(method)]
        for column in columns:
            row = cells.get((method, column))
            if row is None:
                texts.append("")
            elif signed:
                texts.append(difference_text(row["mean"], row["interval"]))
            else:
                text = f"{row['mean']:.1f}"
                bold = f"<b>{text}</b>" if row["mean"] == best[column] else text
                texts.append(f"{bold} {interval_text(row['interval'])}")
        texts.append(str(max(cells[method, c]["tasks"] for c in columns if (method, c) in cells)))
        body.append(texts)
    heads = ["all domains" if column == "all" else escape(column) for column in columns]
    return table(["method", *heads, "tasks"], body, title)


def _differences(report: Report, group: Group, cells: Mapping[tuple[str, str], Row]) -> str:
    """Paired differences of all domains together, and of each as a small mark."""
    methods = [name for name in group.methods() if (name, "all") in cells][::-1]
    drawing, axes = new_drawing(WIDTH, 0.75 + 0.4 * len(methods))
    axes.axvline(0, color=COLOUR["ink"], lw=1)
    for height, method in enumerate(methods):
        colour = colour_of(method)
        for domain in group.domains:
            if (method, domain) in cells:
                axes.plot(
                    cells[method, domain]["mean"], height, "|", color=colour, ms=9, alpha=0.55
                )
        row = cells[method, "all"]
        interval = bar(row["interval"])
        axes.errorbar(row["mean"], height, xerr=interval, fmt="o", color=colour, ms=5.5, lw=2)
    name_rows(axes, methods)
    axes.set_ylim(-0.6, len(methods) - 0.4)
    reference = TITLES[Method.parse(report.reference).kind]
    axes.set_xlabel(f"points above or below {reference}", loc="right")
    return report.figure(group, "differences", drawing, "paired differences with intervals")


def by_support(report: Report) -> list[str]:
    """Differences to the reference, apart for the tasks with few, more and many support images."""
    figures, tables = [], []
    for group in report.groups:
        parts = _by_support(group, report.reference)
        differences = {
            name: [paired(group, name, report.reference, within=part) for part in parts.values()]
            for name in group.methods()
            if name != report.reference
        }
        shown = [name for name, found in differences.items() if found and all(found)]
        if not shown:
            continue
        cells = {name: [mean_and_interval(found) for found in differences[name]] for name in shown}
        drawing, axes = new_drawing(WIDTH, 0.95 + 0.5 * len(shown))
        axes.axvline(0, color=COLOUR["ink"], lw=1)
        for third, (title, shade) in enumerate(zip(parts, _SHADES, strict=True)):
            axes.plot([], [], "o", color=COLOUR["ink"], alpha=shade, mew=0, label=title)
            for row, name in enumerate(reversed(shown)):
                mean, interval = cells[name][third]
                height, colour = row + 0.22 * (1 - third), colour_of(name)
                axes.errorbar(
                    mean, height, xerr=bar(interval), fmt="o", color=colour, alpha=shade, ms=5, lw=2
                )
        drawing.legend(loc="outside upper right", ncols=len(parts), title="support images")
        name_rows(axes, shown[::-1])
        axes.set_ylim(-0.6, len(shown) - 0.4)
        reference = TITLES[Method.parse(report.reference).kind]
        axes.set_xlabel(f"points above or below {reference}", loc="right")
        description = "paired differences by the size of the support set"
        figures.append(report.figure(group, "by-support", drawing, description))
        body = [
            [
                html_name(name),
                *(
                    f"{difference_text(*cell)} <small>({len(of)})</small>"
                    for cell, of in zip(cells[name], differences[name], strict=True)
                ),
            ]
            for name in shown
        ]
        heads = [f"{title} images (tasks)" for title in parts]
        title = f"{escape(group.label)}: minus {plain_name(report.reference)}, points, paired"
        tables.append(table(["method", *heads], body, title))
    return [*grid(figures), *tables]


def _by_support(group: Group, reference: str) -> dict[str, set[Place]]:
    """{range of support sizes: a third of the reference's tasks}, smallest sets first.

    Tasks of one size stay together. None where there are too few sizes for intervals.
    """
    sizes = {place: row["support"] for place, row in group.cells.get(reference, {}).items()}
    parts: list[set[Place]] = [set() for _ in _SHADES]
    for place, size in sizes.items():
        smaller = sum(other < size for other in sizes.values())
        parts[len(parts) * smaller // len(sizes)].add(place)
    if min(map(len, parts)) < 2:
        return {}
    named = {}
    for part in parts:
        least, *_, most = sorted(sizes[place] for place in part)
        named[str(least) if least == most else f"{least} to {most}"] = part
    return named


def meta_training(report: Report) -> list[str]:
    """Figure 6a: networks NAME and NAME-meta compared."""
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
                if (values := paired(trained, name, name, domain, base=group))
            }
            for name in group.methods()
        }
        shown = [name for name in group.methods() if differences[name]]
        if not shown:
            continue
        drawing, axes = new_drawing(WIDTH, 0.95 + 0.4 * len(shown))
        for height, name in enumerate(reversed(shown)):
            both = [place for place in group.cells[name] if place in trained.cells[name]]
            before, after = (
                100 * fmean(of.cells[name][place]["accuracy"] for place in both)
                for of in (group, trained)
            )
            colour = colour_of(name)
            axes.plot([before, after], [height, height], color=colour, lw=2, alpha=0.45)
            axes.plot(before, height, "o", mfc=COLOUR["ground"], mec=colour, mew=1.6, ms=7)
            axes.plot(after, height, "o", color=colour, ms=7)
        axes.plot([], [], "o", mfc="none", mec=COLOUR["soft"], mew=1.6, label="without")
        axes.plot([], [], "o", color=COLOUR["soft"], label="with meta-training")
        drawing.legend(loc="outside upper right", ncols=2)
        name_rows(axes, shown[::-1])
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.set_xlabel("accuracy, %")
        description = "accuracy with and without meta-training"
        figures.append(report.figure(group, "meta-training", drawing, description))
        body = [
            [html_name(name)]
            + [
                difference_text(*mean_and_interval(differences[name][domain]))
                if domain in differences[name]
                else ""
                for domain in (*group.domains, None)
            ]
            for name in shown
        ]
        heads = [*map(escape, group.domains), "all domains"]
        title = f"{escape(group.label)}: what meta-training adds, points, paired"
        tables.append(table(["method", *heads], body, title))
    return [*grid(figures), *tables]
