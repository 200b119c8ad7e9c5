"""Results for people: text made of the documents that the command line gathers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

__all__ = [
    "adaptation",
    "classify",
    "evaluation",
    "exported",
    "imported",
    "percent_text",
    "profile",
    "reported",
    "size_text",
]

Document = dict[str, Any]


def adaptation(found: Document) -> str:
    """The document of `adapt` or `demo` for people."""
    policy, seconds, budget = found["policy"], found["seconds"], found["budget"]
    lines = []
    if found["command"] == "demo":
        lines.append(
            "The task is drawn by this program (no photographs): " + ", ".join(found["classes"])
        )
    lines.append(
        f"network      {found['network']}; support set: {found['support_images']} images of "
        f"{len(found['classes'])} classes; query set: {found['query_images']}"
    )
    lines.append(
        f"budget       {size_text(budget['memory_bytes'])} ({budget['accounting']} accounting), "
        f"{percent_text(budget['compute'])} of FullTrain's backward MACs"
    )
    lines.append(
        f"chosen       {found['updated_weights']:,} weights in {len(policy['layers'])} layers, "
        f"{percent_text(found['compute_share'])} of FullTrain's backward MACs"
    )
    for entry in policy["layers"]:
        text = (
            f"  layer {entry['layer']:<3} {entry['kind']:<10}{len(entry['channels']):>4} of "
            f"{entry['of']} {entry['axis']}put channels: {_ranges(entry['channels'])}"
        )
        lines.append(_first_line(text))
    lines.append("memory")
    for phase, plan in found["planned"].items():
        kinds = plan["bytes_by_kind"].items()
        parts = ", ".join(f"{kind} {size_text(size)}" for kind, size in kinds if size)
        text = f"  {phase.replace('_', '-'):<11} planned {size_text(plan['peak_bytes'])}: {parts}"
        lines += textwrap.wrap(text, 100, subsequent_indent=" " * 13)
    lines.append(
        f"  planned peak {size_text(found['planned_peak_bytes'])}, "
        f"measured {size_text(found['arena_high_water_bytes'])}"
    )
    if found["cache_bytes"]:
        lines.append(
            f"  beside it: views behind the frozen layers {size_text(found['cache_bytes'])}"
        )
    lines.append(
        f"  the process grew by {size_text(found['peak_resident_growth_bytes'])}, of which the "
        f"weights as kernels read them are {size_text(found['resident_weight_bytes'])}"
    )
    phases = ", ".join(f"{name.replace('_', '-')} {value:.2f} s" for name, value in seconds.items())
    lines.append(f"time         {phases}")
    if found["accuracy_before"] is not None:
        lines.append(
            f"accuracy     {percent_text(found['accuracy_before'])} before, "
            f"{percent_text(found['accuracy_after'])} after adaptation"
        )
    if found.get("images"):
        lines.append(f"images       {found['images']}")
    if found["out"]:
        lines.append(
            f"written      {found['out']}; next: tinytrain classify --network {found['out']} PHOTO"
        )
    return "\n".join(lines)


def classify(found: Document) -> str:
    """The document of `classify` for people: file, label, probability."""
    photos = found["photos"]
    width = max(len(photo["file"]) for photo in photos)
    return "\n".join(
        f"{photo['file']:<{width}}  {photo['label']}  {photo['probability']:.3f}"
        for photo in photos
    )


def profile(found: Document) -> str:
    """The document of `profile` for people."""
    layers, total = found["layers"], found["total"]
    rows = [("layer", "block", "kind", "channels", "kernel", "weights", "MACs", "saved")]
    for row in layers:
        rows.append(
            (
                f"{row['layer']}",
                "-" if row["block"] is None else f"{row['block']}",
                row["kind"],
                f"{row['in_channels']}->{row['out_channels']}",
                f"{row['kernel']}/{row['stride']}",
                f"{row['weights']:,}",
                f"{row['macs']:,}",
                size_text(row["saved_bytes"]),
            )
        )
    weights, macs, saved = f"{total['weights']:,}", f"{total['macs']:,}", total["saved_bytes"]
    rows.append(("all", "", "", "", "", weights, macs, size_text(saved)))
    methods = [("method", "layers", "weights", "paper", "planner", "backward MACs", "of FullTrain")]
    for row in found["methods"]:
        methods.append(
            (
                row["method"],
                f"{row['layers']}",
                f"{row['weights']:,}",
                size_text(row["paper_bytes"]),
                size_text(row["planned_peak_bytes"]),
                f"{row['backward_macs']:,}",
                percent_text(row["compute_share"]),
            )
        )
    return "\n".join(
        [
            f"{found['network']}: {found['input_size']} x {found['input_size']} pixels -> "
            f"{found['feature_dim']} features. For one image in fp32; saved: the input that "
            "training the layer keeps.",
            _table(rows, left=(2,)),
            "",
            "Training memory at batch 1, weights as they are beside it; paper: the formula of its "
            "Appendix A.4,",
            "planner: the peak of this engine's arena. TinyTrain's choice depends on the task; "
            "here all channels weigh the same.",
            _table(methods, left=(0,)),
            "FullTrain as the paper's Table 2 counts it (batch 100, every input kept): "
            f"{size_text(found['full_train_batch_100_bytes'])}",
        ]
    )


def evaluation(found: Document) -> str:
    """The document of `evaluate` for people: tasks, accuracies, and differences to one method."""
    domains = [row["domain"] for row in found["tasks"]]
    lines = ["tasks, mean (standard deviation)"]
    table = [("domain", "tasks", "ways", "support", "query")]
    for row in found["tasks"]:
        sizes = [f"{row[n][0]:.1f} ({row[n][1]:.1f})" for n in ("ways", "support", "query")]
        table.append((row["domain"], f"{row['tasks']}", *sizes))
    lines.append(_table(table, (0,)))
    columns = [*domains, "all"] if len(domains) > 1 else domains
    networks = list(dict.fromkeys(row["network"] for row in found["accuracy"]))
    for network in networks:
        for title, part in (
            ("accuracy, per cent with 95 % intervals", found["accuracy"]),
            (f"accuracy minus that of {found['reference']}, paired", found["differences"]),
        ):
            cells = {
                (row["method"], row["domain"]): row for row in part if row["network"] == network
            }
            methods = list(dict.fromkeys(method for method, _ in cells))
            if methods:
                rows = [("method", *columns)]
                for method in methods:
                    texts = [_mean_text(cells.get((method, column))) for column in columns]
                    rows.append((method, *texts))
                lines += ["", f"{network}: {title}", _table(rows, (0,))]
    lines += ["", f"rows         {found['out']}"]
    if found["report"]:
        lines.append(f"report       {found['report']}")
    return "\n".join(lines)


def reported(found: Document) -> str:
    """The document of `report` for people."""
    return f"{found['report']}: {found['rows']:,} rows of {', '.join(found['networks'])}"


def _mean_text(cell: Document | None) -> str:
    if cell is None:
        return ""
    interval = "" if math.isnan(cell["interval"]) else f" +- {cell['interval']:.1f}"
    return f"{cell['mean']:.1f}{interval}"


def imported(found: Document) -> str:
    """The document of `import` for people."""
    return (
        f"{found['out']}: {found['network']}, {found['layers']} layers, {found['weights']:,} "
        f"weights, {found['macs']:,} MACs\nfrom {found['file']}, sha256 {found['sha256']}"
    )


def exported(found: Document) -> str:
    """The document of `export` for people."""
    outputs = ", ".join(
        f"{name} ({difference:.1e})" for name, difference in found["differences"].items()
    )
    return (
        f"{found['out']}: {found['network']}, {found['bytes']:,} bytes\n"
        f"outputs, and by what share of its largest value {found['runtime']} differs on "
        f"{found['images']} random images: {outputs}"
    )


def _table(rows: Sequence[tuple[str, ...]], left: tuple[int, ...]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if index in left else f"{cell:>{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _first_line(text: str) -> str:
    """The text cut at a word to one line; the whole of it is in the JSON document."""
    first, *more = textwrap.wrap(text, 96, drop_whitespace=False)
    return f"{first.rstrip()} ..." if more else first


def _ranges(channels: Sequence[int]) -> str:
    """0 1 2 5 as "0-2 5"."""
    runs: list[list[int]] = []
    for channel in channels:
        if runs and channel == runs[-1][-1] + 1:
            runs[-1][1:] = [channel]
        else:
            runs.append([channel])
    return " ".join("-".join(map(str, run)) for run in runs)


def size_text(size: int) -> str:
    """Bytes as "512.0 KiB" or "1.00 MiB"."""
    if abs(size) >= 1 << 20:
        return f"{size / (1 << 20):.2f} MiB"
    return f"{size / 1024:.1f} KiB"


def percent_text(share: float) -> str:
    """0.125 as "12.5 %"."""
    return f"{100 * share:.1f} %"
