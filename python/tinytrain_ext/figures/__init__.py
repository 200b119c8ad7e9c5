"""The paper's tables and figures of an evaluation's rows: one HTML page, and its drawings as PNG.

Everything is computed from rows (`evaluate.read_rows`); what a layer costs, which rows do not say,
comes from the networks' cost profiles where they are given. A view whose rows are missing is left
out, and the page says which rows it needs. Rows are compared only where they are of one network
and of tasks drawn alike. Needs matplotlib (the [plot] extra).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib as mpl

from ..cost import Profile
from ..evaluate import Method, Row
from ..network import write_atomically
from ..page import Page
from .ablations import channel_rules, single_layers
from .accuracy import MOST_CIRCLES, accuracies, accuracy_and_macs, by_support, meta_training
from .comparison import Report
from .costs import costs_and_ratios, latency, sizes_of_tasks
from .drawing import STYLE
from .selected import selections

__all__ = ["write_report"]


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
    report = Report(rows, reference, folder, profiles or {})
    page = Page("Training on the device, compared", report.lead())
    missing = []
    with mpl.rc_context(STYLE):
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
    make: Callable[[Report], list[str]]


_VIEWS = (
    _View(
        "accuracy-macs",
        "Accuracy against compute",
        "Figure 1",
        "Up and to the left is better. A circle's area is the memory of training with it, by the "
        "paper's formula at batch 1. Means over all tasks; bars are 95 % intervals. Of more than "
        f"{MOST_CIRCLES} methods, those without options and the reference.",
        "needs rows of two kinds of methods that train.",
        accuracy_and_macs,
    ),
    _View(
        "accuracy",
        "Accuracy by domain",
        "Table 1",
        "Mean accuracy on the query images, then each method minus the reference on the same "
        "tasks; a difference is <b>bold</b> where its 95 % interval leaves out 0. In the drawing, "
        "dots are all domains together and small strokes single domains.",
        "needs rows of a method.",
        accuracies,
    ),
    _View(
        "by-support",
        "Few photos or many",
        "by size of the support set",
        "Each method minus the reference on the same tasks, apart for the third of the tasks with "
        "the fewest support images (pale), the next and the one with the most.",
        "needs rows of the reference and another method, of at least six tasks.",
        by_support,
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
        costs_and_ratios,
    ),
    _View(
        "single-layers",
        "Gain of training one layer",
        "Figure 3",
        "Accuracy above that of None on the same tasks when a single convolution is trained; then "
        "over what that costs. Bars are 95 % intervals.",
        "needs rows of <code>none</code> and of <code>layer:index=NUMBER,ratio=SHARE</code> on "
        "the same tasks.",
        single_layers,
    ),
    _View(
        "channels",
        "Channels chosen for the task, or not",
        "Figures 4 and 6b",
        "The same layers with as many channels, chosen by the task's Fisher information (or its "
        "held-out gain, if that is the criterion), by the norm of their weights, or at random.",
        "needs rows of <code>tinytrain:ratio=SHARE</code> and of "
        "<code>tinytrain:channels=random,ratio=SHARE</code> or <code>channels=l2</code> on the "
        "same tasks.",
        channel_rules,
    ),
    _View(
        "meta-training",
        "With and without meta-training",
        "Figure 6a",
        "The same methods on the same tasks, from two starting points.",
        "needs rows of two networks NAME and NAME-meta on the same tasks.",
        meta_training,
    ),
    _View(
        "latency",
        "Time of an adaptation",
        "Tables 5 and 6",
        "Selection is the Fisher pass and the choice; run is everything else but loading the "
        "network. Times are of the machines that wrote these rows, with whatever else they did "
        "meanwhile: they compare methods, not machines. CPU time is less disturbed.",
        "needs rows of a method that trains.",
        latency,
    ),
    _View(
        "selection",
        "What was selected",
        "Section 2.2",
        "First which layers: the darker, the larger the share of tasks; numbers are the channels "
        "trained, per cent the tasks where not all. Then which channels, strong where most tasks "
        "of a domain chose them: strips that differ are choices that depend on the domain.",
        "needs rows of <code>tinytrain</code>.",
        selections,
    ),
    _View(
        "tasks",
        "The tasks",
        "Table 4",
        "Ways and shots vary from task to task, as Meta-Dataset draws them.",
        "needs rows.",
        sizes_of_tasks,
    ),
)
