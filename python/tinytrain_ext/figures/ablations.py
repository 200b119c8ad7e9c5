"""What single layers gain, and channels chosen by other rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..cost import Profile
from ..episodes import mean_and_interval
from ..evaluate import Method
from ..page import table
from .comparison import Group, Report, paired, rule_of
from .drawing import (
    COLOUR,
    DEFAULT_RATIO,
    WIDTH,
    bar,
    difference_text,
    grid,
    new_drawing,
    share_text,
)

_RULES = {"fisher": "Fisher", "l2": "L2 norm", "random": "random"}

_RULE_COLOURS = {"fisher": "blue", "l2": "orange", "random": "grey"}


def single_layers(report: Report) -> list[str]:
    """Figure 3: gains of single layers over None, and over what they cost."""
    figures = []
    for group in report.groups:
        costs = report.profiles.get(group.network)
        points: dict[tuple[float, str], dict[int, dict[str, float]]] = {}
        for name in group.methods(ablations=True):
            method = Method.parse(name)
            gains = paired(group, name, "none")
            if method.kind != "layer" or not gains:
                continue
            layers = {int(layer) for row in group.cells[name].values() for layer in row["layers"]}
            curve = method.options.get("ratio", DEFAULT_RATIO), rule_of(name)
            gain, interval = mean_and_interval(gains)
            (layer,) = layers
            at = points.setdefault(curve, {}).setdefault(layer, {})
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
        drawing = Figure((WIDTH, 0.4 + 1.5 * len(panels)))
        axes_of = drawing.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (what, title) in zip(axes_of, panels.items(), strict=True):
            _shade_depthwise(axes, layers_shown, costs)
            axes.axhline(0, color=COLOUR["soft"], lw=0.8)
            for index, ((share, rule), of) in enumerate(sorted(points.items())):
                known = [layer for layer in layers_shown if layer in of]
                colour = COLOUR[("orange", "green", "red", "blue")[index % 4]]
                axes.errorbar(
                    [layers_shown.index(layer) for layer in known],
                    [of[layer][what] for layer in known],
                    yerr=[bar(of[layer]["interval"]) for layer in known]
                    if what == "gain"
                    else None,
                    fmt="osD^"[index % 4] + "-",
                    color=colour,
                    lw=1.3,
                    ms=3.8,
                    elinewidth=0.8,
                    label=f"{share_text(share)} of its channels"
                    + ("" if rule == "fisher" else f", {_RULES[rule]}"),
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
                ncols=min(len(points), 2),
            )
        description = "gain of training one layer"
        figures.append(report.figure(group, "single-layers", drawing, description))
    return grid(figures)


def _shade_depthwise(axes: Axes, layers: Sequence[int], costs: Profile | None) -> None:
    for place, layer in enumerate(layers):
        if costs is not None and costs.layers[layer].kind == "depthwise":
            axes.axvspan(place - 0.5, place + 0.5, color=COLOUR["line"], alpha=0.5, lw=0)


def channel_rules(report: Report) -> list[str]:
    """Figures 4 and 6b: channels by Fisher information against other rules."""
    figures, tables = [], []
    for group in report.groups:
        families: dict[str, dict[float, dict[str, str]]] = {}
        for name in group.methods(ablations=True):
            method = Method.parse(name)
            if method.kind == "tinytrain":
                options = dict(method.options)
                rule = options.pop("channels", "fisher")
                share = options.pop("ratio", DEFAULT_RATIO)
                rest = ", ".join(f"{key} {value}" for key, value in sorted(options.items()))
                families.setdefault(rest, {}).setdefault(share, {})[rule] = name
        for index, (rest, shares) in enumerate(families.items()):
            compared = {
                share: rules
                for share, rules in sorted(shares.items())
                if "fisher" in rules
                and any(
                    paired(group, rules["fisher"], name)
                    for rule, name in rules.items()
                    if rule != "fisher"
                )
            }
            if not compared:
                continue
            # A held-out choice has no share of its own: how many of a layer is part of it.
            held_out = "criterion held_out" in rest
            shares_text = {share: "chosen" if held_out else share_text(share) for share in compared}
            chosen_by = "held-out gain" if held_out else _RULES["fisher"]
            name = "channels" if index == 0 else f"channels-{index}"
            figures.append(
                _draw_channel_rules(report, group, name, compared, shares_text, chosen_by)
            )
            others = [r for r in ("random", "l2") if any(r in rules for rules in compared.values())]
            body = []
            for share, rules in compared.items():
                cells = [shares_text[share]]
                for rule in others:
                    for domain in (*group.domains, None):
                        gains = paired(group, rules["fisher"], rules.get(rule, ""), domain)
                        cells.append(difference_text(*mean_and_interval(gains)) if gains else "")
                body.append(cells)
            heads = [
                f"over {_RULES[rule]}<br>{'all domains' if domain is None else escape(domain)}"
                for rule in others
                for domain in (*group.domains, None)
            ]
            title = f"{escape(group.label)}: channels by {chosen_by} minus others, points, paired"
            title += f" ({escape(rest)})" if rest else ""
            tables.append(table(["of a layer", *heads], body, title))
    return [*grid(figures), *tables]


def _draw_channel_rules(
    report: Report,
    group: Group,
    name: str,
    compared: Mapping[float, Mapping[str, str]],
    shares_text: Mapping[float, str],
    chosen_by: str,
) -> str:
    drawing, axes = new_drawing(WIDTH, 3.1)
    for index, rule in enumerate(("random", "l2", "fisher")):
        known = [share for share, rules in compared.items() if rule in rules]
        cells = [mean_and_interval(group.accuracies(compared[share][rule])) for share in known]
        if cells:
            axes.errorbar(
                [list(compared).index(share) + 0.08 * (index - 1) for share in known],
                [mean for mean, _ in cells],
                yerr=[bar(interval) for _, interval in cells],
                fmt="s^o"[index] + "-",
                color=COLOUR[_RULE_COLOURS[rule]],
                label=chosen_by if rule == "fisher" else _RULES[rule],
                lw=1.6,
                ms=5,
                elinewidth=1,
            )
    axes.set_xticks(range(len(compared)), [shares_text[share] for share in compared])
    axes.set_xlim(-0.4, len(compared) - 0.6)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("of a layer's channels")
    axes.set_ylabel("accuracy, %")
    drawing.legend(loc="outside upper right", ncols=3, columnspacing=1.2)
    return report.figure(group, name, drawing, "accuracy by rule of choosing channels")
