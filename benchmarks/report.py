"""The suite's rows as tables for people, in Markdown, and as plots."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot", "tables"]

Rows = Sequence[Mapping[str, Any]]


def tables(rows: Rows) -> Iterator[str]:
    """One text for each table the rows fill."""
    sections = {
        "machine": _machine,
        "step": _steps,
        "kernels": _kernels,
        "selection": _selection,
        "python": _python,
        "scaling": _scaling,
        "threads": _threads,
    }
    for section, table in sections.items():
        chosen = [row for row in rows if row["section"] == section]
        if chosen:
            yield from table(chosen)


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [list(head), ["---"] * len(head), *map(list, lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _times(values: Sequence[float], digits: int = 3) -> str:
    """Median (lowest to highest)."""
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def _ratio(values: Sequence[float]) -> str:
    middle, low, high = (f"{value:.1f}" for value in values)
    return f"{middle}x ({low} to {high})"


def _machine(rows: Rows) -> Iterator[str]:
    for row in rows:
        peaks = ", ".join(f"{isa} {value:.0f}" for isa, value in row["fma_gflops"].items())
        copies = ", ".join(f"{where} {value:.0f}" for where, value in row["copy_gigabytes"].items())
        yield (
            f"{row['cpu']}, {row['cores']} cores, load {row['load']:.1f}; FMA peak in GFLOP/s: "
            f"{peaks}; copy in GB/s: {copies}; kernels {row['isa']}; commit {row['commit']}"
        )


def _steps(rows: Rows) -> Iterator[str]:
    groups = {(row["network"], row["batch"]): None for row in rows}
    for network, batch in groups:
        chosen = [row for row in rows if (row["network"], row["batch"]) == (network, batch)]
        columns = list(dict.fromkeys(column for row in chosen for column in row["columns"]))
        lines = []
        for row in chosen:
            cells = [row["row"], _times(row["milliseconds"]), f"{100 * row['roofline']:.0f} %"]
            for column in columns:
                found = row["columns"].get(column)
                cells.append(_ratio(found["ratio"]) if found else "")
            lines.append(cells)
        head = [f"{network}, B {batch}", "ours, ms", "of the roofline", *columns]
        yield _markdown(head, lines)
        over = next(row["over_plain"] for row in chosen if "over_plain" in row)
        yield f"Fisher sums on top of the same backward pass: {_ratio(over)}"


def _kernels(rows: Rows) -> Iterator[str]:
    """Medians over the shapes of a kind; all of them are in the rows."""
    columns = list(dict.fromkeys(column for row in rows for column in row["columns"]))
    groups = {(row["kind"], row["kernel"], row["row"]): None for row in rows}
    lines = []
    for kind, kernel, operation in sorted(groups):
        key = kind, kernel, operation
        chosen = [row for row in rows if (row["kind"], row["kernel"], row["row"]) == key]
        cells = [f"{kind} {kernel}x{kernel}", operation, str(len(chosen))]
        for column in columns:
            found = [row["columns"][column] for row in chosen if column in row["columns"]]
            if not found:
                cells.append("")
            elif "roofline" in found[0]:
                shares = [100 * cell["roofline"] for cell in found]
                middle = statistics.median(shares)
                cells.append(f"{middle:.0f} % ({min(shares):.0f} to {max(shares):.0f})")
            else:
                middles = [cell["ratio"][0] for cell in found]
                cells.append(_ratio([statistics.median(middles), min(middles), max(middles)]))
        lines.append(cells)
    yield _markdown(["kernel", "operation", "shapes", *columns], lines)


def _selection(rows: Rows) -> Iterator[str]:
    lines = []
    for row in rows:
        said = ""
        if "selection_share" in row:
            middle, low, high = (100 * value for value in row["selection_share"])
            said = f"selection {middle:.1f} % ({low:.1f} to {high:.1f}) of all"
        elif "selection_in_these" in row:
            said = f"selection takes {_times(row['selection_in_these'], 2)} of these"
        elif "ratio" in row:
            said = f"{_ratio(row['ratio'])} ours with the fixed policy"
        lines.append([row["network"], row["row"], _times(row["milliseconds"], 1), said])
    yield _markdown(["network", "25 photos, 40 iterations", "ms", ""], lines)


def _python(rows: Rows) -> Iterator[str]:
    lines = []
    for row in rows:
        share = row.get("python_share")
        said = ["", ""]
        if share is not None:
            said = [f"{100 * share:.1f} %", f"{100 * row['python_share_lowest']:.1f} %"]
        lines.append([row["network"], row["row"], _times(row["microseconds"], 1), *said])
    yield _markdown(["network", "B 1", "us", "Python's share", "of the lowest times"], lines)


def _scaling(rows: Rows) -> Iterator[str]:
    lines = [
        [
            row["axis"],
            f"{row['value']:g}",
            row["row"],
            _times(row["milliseconds"]),
            f"{row['macs'] / 1e6:.1f}",
            f"{2e-6 * row['macs'] / row['milliseconds'][0]:.0f}",
        ]
        for row in rows
    ]
    yield _markdown(["axis", "value", "", "ms", "million MACs", "GFLOP/s"], lines)


def _threads(rows: Rows) -> Iterator[str]:
    lines = [
        [
            row["row"],
            str(row["batch"]),
            _times(row["wall_milliseconds"]["1"]),
            _times(row["wall_milliseconds"]["2"]),
            f"{row['speedup']:.2f}x",
            f"{row['speedup_lowest']:.2f}x",
            f"{row['cpu_ratio']:.2f}",
            f"{row['load']:.1f}",
        ]
        for row in rows
    ]
    head = ["", "B", "1 thread, wall ms", "2 threads", "speed-up"]
    head += ["of the lowest times", "CPU time, 2 / 1", "load"]
    yield _markdown(head, lines)


def plot(rows: Rows, folder: Path) -> list[Path]:
    """Draws what the rows allow into folder; the files it wrote."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "tinytrain"})
    written = []
    for name, draw in (("performance-steps.svg", _draw_steps), ("scaling.svg", _draw_scaling)):
        figure = draw(rows)
        if figure is not None:
            path = folder / name
            figure.savefig(path, metadata={"Date": None})
            written.append(path)
    return written


def _draw_steps(rows: Rows) -> Any:
    """How many times as long the peers take, by kind of step, for the batches 1 and 25."""
    from matplotlib import pyplot

    kinds = ("forward", "TT step", "SparseUpdate step", "FullTrain step")
    chosen = [
        row
        for row in rows
        if row["section"] == "step" and row["network"] == "mobilenetv2" and row["row"] in kinds
    ]
    batches = [b for b in (1, 25) if any(row["batch"] == b for row in chosen)]
    if not batches:
        return None
    columns = ("torch eager", "best torch", "onnxruntime", "tensorflow", "litert")
    figure, axes = pyplot.subplots(
        1, len(batches), figsize=(4.5 * len(batches), 3.2), sharey=True, squeeze=False
    )
    for axis, batch in zip(axes[0], batches, strict=True):
        found = {row["row"]: row["columns"] for row in chosen if row["batch"] == batch}
        for index, column in enumerate(columns):
            bars = [
                (place + 0.16 * (index - 2), found[kind][column]["ratio"])
                for place, kind in enumerate(kinds)
                if column in found.get(kind, {})
            ]
            if not bars:
                continue
            middles = [ratio[0] for _, ratio in bars]
            errors = [
                [ratio[0] - ratio[1] for _, ratio in bars],
                [ratio[2] - ratio[0] for _, ratio in bars],
            ]
            places = [place for place, _ in bars]
            axis.bar(places, middles, 0.15, yerr=errors, label=column, error_kw={"lw": 0.7})
        axis.axhline(1, color="black", lw=0.8)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}x")
        axis.set_xticks(range(len(kinds)), [kind.replace(" ", "\n") for kind in kinds])
        axis.set_title(f"MobileNetV2-0.35, B {batch}")
    axes[0][0].set_ylabel("CPU time over ours")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    return figure


def _draw_scaling(rows: Rows) -> Any:
    """Milliseconds of a step and an iteration along each axis, and what MACs alone would say."""
    from matplotlib import pyplot

    chosen = [row for row in rows if row["section"] == "scaling"]
    if not chosen:
        return None
    names = {
        "images": "images in the batch",
        "ways": "classes (50 images)",
        "size": "image size, pixels (5 images)",
        "width": "network width (5 images)",
    }
    figure, axes = pyplot.subplots(1, len(names), figsize=(11, 2.8), squeeze=False)
    for panel, (name, label) in zip(axes[0], names.items(), strict=True):
        for kind, colour in (("step", "C0"), ("iteration", "C1")):
            points = [row for row in chosen if (row["axis"], row["row"]) == (name, kind)]
            values = [row["value"] for row in points]
            middles = [row["milliseconds"][0] for row in points]
            panel.plot(values, middles, "o-", ms=3, color=colour, label=f"TT {kind}")
            rate = statistics.median(
                middle / row["macs"] for middle, row in zip(middles, points, strict=True)
            )
            panel.plot(
                values,
                [rate * row["macs"] for row in points],
                ":",
                color=colour,
                label="in proportion to MACs",
            )
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(values, [f"{value:g}" for value in values])
        panel.minorticks_off()
        panel.set_xlabel(label)
    axes[0][0].set_ylabel("CPU time, ms")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    return figure
