"""What methods cost: memory and compute, time, and the tasks that they were trained on."""

from __future__ import annotations

from html import escape

from ..evaluate import Method, summary
from ..page import table
from .comparison import Report
from .drawing import (
    COLOUR,
    WIDTH,
    colour_of,
    factor,
    grid,
    html_name,
    mebi,
    name_rows,
    new_drawing,
)


def costs_and_ratios(report: Report) -> list[str]:
    """Table 2, in both accountings."""
    parts = []
    for group in report.groups:
        methods = [name for name in group.methods() if Method.parse(name).kind != "none"]
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
            return factor(value / base[what]) if base else ""

        body = []
        for name in methods:
            costs = of[name]
            body.append(
                [
                    html_name(name),
                    f"{costs['updated_weights']:,.0f}",
                    mebi(costs["paper_bytes"]),
                    ratio(costs["paper_bytes"], "paper_bytes"),
                    mebi(costs["planner_bytes"]),
                    ratio(costs["planner_bytes"], "planner_bytes"),
                    f"{costs['backward_macs'] / 1e6:.2f} M",
                    ratio(costs["backward_macs"], "backward_macs"),
                ]
            )
            costs_of_layers = report.profiles.get(group.network)
            if Method.parse(name).kind == "fulltrain" and costs_of_layers is not None:
                hundred = costs_of_layers.full_train_bytes(100)
                title = "FullTrain<small>batch 100, every input kept: as Table 2 prints it</small>"
                memory = [mebi(hundred), ratio(hundred, "paper_bytes")]
                body.append([title, body[-1][1], *memory, "", "", *body[-1][6:]])
        head = ["method", "weights trained", "memory, paper's formula", "ratio"]
        head += ["memory, planned peak", "ratio", "backward MACs", "ratio"]
        parts.append(table(head, body, f"{escape(group.label)}: one image, fp32, means over tasks"))
    return parts


def latency(report: Report) -> list[str]:
    """Tables 5 and 6: seconds of selection and of the rest."""
    figures, tables = [], []
    for group in report.groups:
        methods = [name for name in group.methods() if Method.parse(name).kind != "none"]
        if not methods:
            continue
        drawing, axes = new_drawing(WIDTH, 0.95 + 0.4 * len(methods))
        body = []
        total_of_reference = (
            group.mean(report.reference, "seconds") if report.reference in methods else None
        )
        for height, name in enumerate(reversed(methods)):
            total = group.mean(name, "seconds")
            selection = group.mean(name, "selection_seconds")
            axes.barh(height, selection, 0.6, color=COLOUR["purple"])
            axes.barh(height, total - selection, 0.6, left=selection, color=colour_of(name))
            axes.annotate(
                f"{total:.1f} s", (total, height), (4, 0), textcoords="offset points", va="center"
            )
        for name in methods:
            total = group.mean(name, "seconds")
            selection = group.mean(name, "selection_seconds")
            support = group.mean(name, "support")
            body.append(
                [
                    html_name(name),
                    f"{selection:.2f}",
                    f"{total - selection:.2f}",
                    f"{total:.2f}",
                    factor(total / total_of_reference) if total_of_reference else "",
                    f"{100 * selection / total:.1f} %" if total else "",
                    f"{group.mean(name, 'cpu_seconds'):.2f}",
                    f"{1e3 * (total - selection) / support:.1f}",
                    f"{support:.1f}",
                ]
            )
        name_rows(axes, methods[::-1])
        axes.margins(x=0.14)
        axes.set_xlabel("seconds a task (purple: selection)", loc="right")
        figures.append(report.figure(group, "latency", drawing, "seconds of a task"))
        head = ["method", "selection, s", "run, s", "total, s", "ratio", "selection's share"]
        head += ["CPU time, s", "run, ms a support image", "support images"]
        tables.append(table(head, body, f"{escape(group.label)}: means over tasks"))
    return [*grid(figures), *tables]


def sizes_of_tasks(report: Report) -> list[str]:
    """Table 4."""
    body = []
    for settings in report.settings:
        for cell in summary(report.rows_of(settings), report.reference)["tasks"]:
            domain = escape(cell["domain"] + report.suffix(settings))
            sizes = [
                f"{cell[what][0]:.1f} <small>({cell[what][1]:.1f})</small>"
                for what in ("ways", "support", "query")
            ]
            body.append([domain, str(cell["tasks"]), *sizes])
    head = ["domain", "tasks", "ways", "support images", "query images"]
    return [table(head, body, "Mean (standard deviation)")]
