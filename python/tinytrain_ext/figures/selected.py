"""What was selected: layers and channels by domain, and how alike tasks are in it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import combinations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ..evaluate import Method, channels_of
from ..page import table
from .comparison import Group, Place, Report
from .drawing import COLOUR, WIDTH, grid, new_drawing, plain_name

_KINDS = {"pointwise": "pw", "depthwise": "dw", "dense": "dense"}

_PIXELS_OF_DOMAIN = 8  # height of a domain's strip in the drawing of channels


def selections(report: Report) -> list[str]:
    """Of TinyTrain and the reference, where there are rows of them: what each selected."""
    parts = []
    for group in report.groups:
        adaptive = [name for name in group.methods() if Method.parse(name).kind == "tinytrain"]
        shown = [name for name in adaptive if name in ("tinytrain", report.reference)]
        for index, name in enumerate(shown or adaptive[:1]):
            parts += _selection(report, group, name, f"-{index}" if index else "")
    return parts


def _selection(report: Report, group: Group, name: str, suffix: str) -> list[str]:
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
    drawing, axes = new_drawing(WIDTH + 1.4, 1.0 + 0.34 * len(members))
    for row, mine in enumerate(members.values()):
        for column, layer in enumerate(layers):
            taken = masks[layer][mine].any(axis=1)
            count = masks[layer][mine].sum(axis=1)[taken].mean() if taken.any() else 0
            share = float(taken.mean())
            box = Rectangle(
                (column - 0.46, row - 0.46),
                0.92,
                0.92,
                color=COLOUR["blue"],
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
    axes.tick_params(length=0, labelcolor=COLOUR["ink"])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("layer")
    method = escape(plain_name(name).replace("\n", ", "))
    title = f"<h3>{escape(group.label)}: {method}</h3>"
    description = "which layers were selected on which domain, and how many channels"
    layers_figure = report.figure(group, f"layers{suffix}", drawing, description, wide=True)
    strips = _draw_channels(masks, members)
    description = "how often each channel was selected on each domain"
    channels_figure = report.figure(group, f"which-channels{suffix}", strips, description, True)
    return [title, *grid([layers_figure, channels_figure]), _agreement(masks, members, sizes)]


def _draw_channels(
    masks: Mapping[int, NDArray[np.float64]], members: Mapping[str, NDArray[np.bool_]]
) -> Figure:
    """For each layer, its channels from the most to the least often chosen, by domain."""
    drawing = Figure((WIDTH + 1.4, 0.7 + (0.1 + 0.13 * len(members)) * len(masks)))
    axes_of = drawing.subplots(len(masks), 1, squeeze=False)[:, 0]
    red, green, blue = (int(COLOUR["blue"][at : at + 2], 16) for at in (1, 3, 5))
    for axes, (layer, mask) in zip(axes_of, masks.items(), strict=True):
        order = np.argsort(-mask.mean(axis=0), kind="stable")
        often = np.stack([mask[mine].mean(axis=0)[order] for mine in members.values()])
        image = np.zeros((*often.shape, 4), np.uint8)
        image[..., :3] = red, green, blue
        image[..., 3] = 255 * often
        axes.imshow(image.repeat(_PIXELS_OF_DOMAIN, axis=0), aspect="auto", interpolation="none")
        for row in range(1, len(members)):
            axes.axhline(row * _PIXELS_OF_DOMAIN - 0.5, color=COLOUR["ground"], lw=1)
        axes.set_yticks([])
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.set_ylabel(str(layer), rotation=0, ha="right", va="center")
        for spine in axes.spines.values():
            spine.set(visible=True, color=COLOUR["line"])
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
