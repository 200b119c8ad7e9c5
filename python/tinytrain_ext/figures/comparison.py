"""Rows in groups that may be compared with each other, and the folder their drawings go to."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from ..cost import Profile
from ..evaluate import METHODS, SETTINGS, Method, Row
from ..network import write_atomically
from ..page import inline_svg
from .drawing import file_name, listed, plain_name

Place = tuple[str, int]  # domain, task
Cells = dict[Place, Row]


@dataclass
class Group:
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
            if ablations or not (Method.parse(name).kind == "layer" or rule_of(name) != "fisher")
        ]
        return sorted(found, key=lambda name: METHODS.index(Method.parse(name).kind))

    def mean(self, method: str, of: str) -> float:
        """The mean of a field over a method's tasks; NaN where the method has no such thing."""
        values = [row[of] for row in self.cells[method].values()]
        return math.nan if None in values else fmean(values)

    def accuracies(self, method: str, domain: str | None = None) -> list[float]:
        """Per cent, a task each."""
        return [
            100 * row["accuracy"]
            for (home, _), row in self.cells.get(method, {}).items()
            if domain in (None, home)
        ]


class Report:
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
        for row in rows:
            if row["network"] in profiles:
                _check_layers(row, profiles[row["network"]])
        found: dict[tuple[Any, ...], Group] = {}
        for row in rows:
            settings = settings_of(row)
            group = found.setdefault((row["network"], settings), Group(row["network"], settings))
            group.cells.setdefault(row["method"], {})[row["domain"], row["task"]] = row
        self.groups = list(found.values())
        self.settings = list(dict.fromkeys(group.settings for group in self.groups))
        for index, group in enumerate(self.groups):
            group.label = group.network + self.suffix(group.settings)
            group.anchor = f"{file_name(group.network)}-{index}"

    def rows_of(self, settings: tuple[Any, ...]) -> list[Row]:
        """The rows of tasks drawn so, of all networks."""
        return [row for row in self.rows if settings_of(row) == settings]

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
        tasks = {(row["domain"], row["task"], *settings_of(row)) for row in self.rows}
        counts = [sum(task[0] == domain for task in tasks) for domain in domains]
        least, most = min(counts), max(counts)
        seed = ", ".join(dict.fromkeys(str(seed) for seed, *_ in self.settings))
        names = listed([f"<b>{escape(name)}</b>" for name in networks])
        reference = f"<b>{escape(plain_name(self.reference))}</b>"
        compared = (
            f"Differences are to {reference} and paired, on tasks that both methods have done"
        )
        if not any(self.reference in group.cells for group in self.groups):
            compared = f"There are no differences: no row is of {reference}, which they would be to"
        return (
            f"{names} on few-shot tasks of {listed([escape(name) for name in domains])}: "
            f"{least if least == most else f'{least} to {most}'} "
            f"{'task' if most == 1 else 'tasks'} a domain, "
            f"{len(self.rows):,} rows, seed {seed}. {compared}; intervals hold 95 %."
        )

    def figure(
        self, group: Group, name: str, drawing: Figure, description: str, wide: bool = False
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


def _check_layers(row: Row, costs: Profile) -> None:
    """Rows come from files: raises ValueError for a layer or channel that the network has not."""
    for layer, (axis, mask) in row["layers"].items():
        known = int(layer) < len(costs.layers)
        if not known or int(mask, 16).bit_length() > costs.layers[int(layer)].channels(axis):
            of = f"{row['network']}, {row['domain']} {row['task']}, {row['method']}"
            raise ValueError(f"row of {of}: layers: the network has no layer {layer} so wide")


def paired(
    group: Group,
    method: str,
    other: str,
    domain: str | None = None,
    base: Group | None = None,
    within: Collection[Place] | None = None,
) -> list[float]:
    """Accuracy of a method minus that of another on the tasks both have done, points."""
    mine, theirs = group.cells.get(method, {}), (base or group).cells.get(other, {})
    return [
        100 * (row["accuracy"] - theirs[place]["accuracy"])
        for place, row in mine.items()
        if place in theirs and domain in (None, place[0]) and (within is None or place in within)
    ]


def settings_of(row: Row) -> tuple[Any, ...]:
    """How the row's task was drawn and its images augmented."""
    return tuple(row[name] for name in SETTINGS)


def rule_of(name: str) -> str:
    """By what a method chooses channels."""
    return str(Method.parse(name).options.get("channels", "fisher"))
