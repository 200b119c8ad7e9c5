"""How drawings and names look: the style, colours, labels, and numbers as text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from ..evaluate import Method
from ..page import COLOURS

TITLES = {
    "none": "None",
    "lastlayer": "LastLayer",
    "fulltrain": "FullTrain",
    "tinytl": "TinyTL",
    "sparseupdate": "SparseUpdate",
    "tinytrain": "TinyTrain",
    "layer": "One layer",
}

_COLOUR_OF = {
    "none": "grey",
    "lastlayer": "orange",
    "fulltrain": "red",
    "tinytl": "ink",
    "sparseupdate": "green",
    "tinytrain": "blue",
    "layer": "purple",
}

COLOUR = {name: light for name, (light, _) in COLOURS.items()}

MEBI = 1 << 20

_TIMES = "\N{MULTIPLICATION SIGN}"

DEFAULT_RATIO = 0.5

WIDTH = 4.2  # inches: drawings are as wide as a phone, and grow

_LONGEST_LINE = 22  # characters of a label

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tinytrain",
    "text.parse_math": False,  # a dollar in a folder's name is a dollar
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
    "text.color": COLOUR["ink"],
    "axes.labelcolor": COLOUR["soft"],
    "axes.edgecolor": COLOUR["soft"],
    "xtick.color": COLOUR["soft"],
    "ytick.color": COLOUR["soft"],
    "grid.color": COLOUR["line"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
}


def new_drawing(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches with one pair of axes."""
    drawing = Figure((width, height))
    return drawing, drawing.subplots()


def name_rows(axes: Axes, methods: Sequence[str]) -> None:
    """Methods' names beside heights 0, 1, ..., instead of an axis."""
    axes.set_yticks(range(len(methods)), [plain_name(name) for name in methods])
    axes.tick_params(axis="y", length=0, labelcolor=COLOUR["ink"])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


_AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


def place_numbers(
    drawing: Figure, axes: Axes, circles: Sequence[tuple[tuple[float, float], float]]
) -> None:
    """Writes 1, 2, ... beside circles (place, radius in points), where each covers least of them.

    Names are longer than the room between circles: they belong into a key.
    """
    canvas: Any = FigureCanvasAgg(drawing)
    canvas.draw()  # places need a layout
    renderer = canvas.get_renderer()
    taken = []
    for place, radius in circles:
        x, y = axes.transData.transform(place)
        reach = radius * drawing.dpi / 72
        taken.append((x - reach, y - reach, x + reach, y + reach))
    for number, (place, radius) in enumerate(circles, 1):
        label = axes.annotate(str(number), place, (0, 0), textcoords="offset points", fontsize=8)
        gap = radius + 2
        others = [other for n, other in enumerate(taken, 1) if n != number]
        covered = {}
        for side in _AROUND:
            corners = _put_beside(label, side, gap, renderer)
            covered[side] = sum(_overlap(corners, other) for other in others)
        best = min(_AROUND, key=covered.__getitem__)
        taken.append(_put_beside(label, best, gap, renderer))


def _put_beside(
    label: Annotation, side: tuple[int, int], gap: float, renderer: Any
) -> tuple[float, float, float, float]:
    """Moves a label to a side of its place, `gap` points away; where it then is, in pixels."""
    right, up = side
    label.set(
        position=(right * gap, up * gap),
        ha={1: "left", 0: "center", -1: "right"}[right],
        va={1: "bottom", 0: "center", -1: "top"}[up],
    )
    box = label.get_window_extent(renderer)
    return box.x0, box.y0, box.x1, box.y1


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> float:
    """Area that two boxes (left, bottom, right, top) share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def colour_of(name: str) -> str:
    """Of a method: that of its kind."""
    return COLOUR[_COLOUR_OF[Method.parse(name).kind]]


def _options(name: str) -> Iterator[str]:
    for key, value in Method.parse(name).options.items():
        yield f"{key.replace('_', ' ')} {int(value) if isinstance(value, bool) else value}"


def plain_name(name: str) -> str:
    """A method's name for drawings: options on lines of their own."""
    options = textwrap.wrap(", ".join(_options(name)), _LONGEST_LINE, break_long_words=False)
    return "\n".join([TITLES[Method.parse(name).kind], *options])


def html_name(name: str) -> str:
    """A method's name for tables."""
    options = ", ".join(_options(name))
    title = TITLES[Method.parse(name).kind]
    return f"{title}<small>{escape(options)}</small>" if options else title


def difference_text(mean: float, interval: float) -> str:
    """HTML, points with sign; bold and coloured where the interval leaves out 0."""
    text = f"{mean:+.1f}".replace("-", "\N{MINUS SIGN}")
    if abs(mean) > interval:
        side = "up" if mean > 0 else "down"
        text = f'<b class="{side}">{text}</b>'
    return f"{text} {interval_text(interval)}"


def interval_text(interval: float) -> str:
    """HTML, or nothing for the NaN of a single task."""
    return "" if math.isnan(interval) else f"<small>± {interval:.1f}</small>"


def bar(interval: float) -> float:
    """An error bar's length, 0 for the NaN of a single task."""
    return 0.0 if math.isnan(interval) else interval


def mebi(size: float) -> str:
    """Bytes as MiB; nothing for NaN."""
    if math.isnan(size):
        return ""
    return f"{size / MEBI:.2f} MiB" if size < 100 * MEBI else f"{size / MEBI:,.0f} MiB"


def factor(ratio: float) -> str:
    """A ratio as so many times; nothing for NaN."""
    if math.isnan(ratio):
        return ""
    return f"{ratio:.2f}{_TIMES}" if ratio < 100 else f"{ratio:,.0f}{_TIMES}"


def share_text(share: float) -> str:
    """A share of a layer's channels, as a fraction where it is a usual one."""
    return {0.125: "1/8", 0.25: "1/4", 0.5: "1/2", 1.0: "all"}.get(share, f"{share:g}")


def grid(figures: Sequence[str]) -> list[str]:
    """Figures side by side as one part of the page, or none."""
    return [f'<div class="figures">{"".join(figures)}</div>'] if figures else []


def listed(texts: Sequence[str]) -> str:
    """Texts, at least one, as in a sentence: a, b and c."""
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def file_name(text: str) -> str:
    """The text, as part of a file's name and of an HTML id."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in text)
