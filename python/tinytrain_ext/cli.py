"""The command line: `tinytrain demo | adapt | classify | profile | import | export | evaluate |
report | bench`, and the offline stage, `pre-train | meta-train`.

A command gathers its results in one JSON-able document; `--json` prints it as it is, otherwise it
is rendered for people. Results go to stdout, everything else to stderr.

Exit codes: 0 done, 1 unexpected (training diverged, or a fault of this program), 2 wrong usage or
input, 3 the budget cannot be met, 130 interrupted. Files are written whole or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import report
from .adapt import AdaptResult, adapt, classify
from .architectures import ARCHITECTURES
from .cost import Profile, inspected_layers, profile
from .datasets import open_image_set
from .demo import draw_task, save_images
from .episodes import MAX_SUPPORT, MAX_WAYS
from .errors import BudgetExceeded, ImageError, NonFiniteError
from .evaluate import (
    METHODS,
    PROTOCOLS,
    Domain,
    Method,
    Rows,
    evaluate,
    merged_rows,
    summary,
)
from .exporters import check_onnx, to_onnx
from .images import LabelledImages, load_folder, load_images
from .importers import import_int8
from .network import Network, check_writable, default_network, write_atomically
from .offline.commands import (
    add_metatrain_arguments,
    add_pretrain_arguments,
    processes,
    run_metatrain,
    run_pretrain,
)
from .offline.commands import render as report_training
from .selection import (
    CRITERIA,
    MAX_BYTES,
    Budget,
    UpdatePolicy,
    full_train,
    last_layer,
    select,
    sparse_update,
)
from .session import FROZEN_WEIGHTS, OPTIMIZERS, plan
from .views import Views

__all__ = ["main"]

logger = logging.getLogger(__name__)

Document = dict[str, Any]

EXIT_UNEXPECTED, EXIT_INPUT, EXIT_BUDGET, EXIT_INTERRUPTED = 1, 2, 3, 130


class InputError(Exception):
    """Something the user gave is wrong; the message says what, and what to do."""


class Command(NamedTuple):
    """A command's work, and its rendering for people."""

    run: Callable[[argparse.Namespace], Document | None]  # None: another process prints it
    render: Callable[[Document], str]
    render_json: Callable[[Document], str] = lambda document: json.dumps(_json(document), indent=2)


def _json(value: Any) -> Any:
    """The same with null for what is no number: JSON knows no NaN."""
    if isinstance(value, dict):
        return {name: _json(of) for name, of in value.items()}
    if isinstance(value, list | tuple):
        return [_json(of) for of in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. Wrong usage raises SystemExit(2), like argparse."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(
        format="tinytrain: %(message)s", level=logging.ERROR if args.quiet else logging.WARNING
    )
    args.progress = ProgressBar(enabled=sys.stderr.isatty() and not args.quiet)
    try:
        document = args.command.run(args)
        args.progress.close()
        if document is not None:
            command = args.command
            _print((command.render_json if args.json else command.render)(document))
        return 0
    except KeyboardInterrupt:
        return _fail(args, EXIT_INTERRUPTED, "interrupted")
    except BudgetExceeded as error:
        own = "memory" in args  # the budget is this command's, not a method's
        return _fail(args, EXIT_BUDGET, _larger_budget(args, error) if own else str(error))
    except NonFiniteError as error:
        hint = "; give a smaller --learning-rate" if "learning_rate" in args else ""
        return _fail(args, EXIT_UNEXPECTED, f"{error}{hint}")
    except ArithmeticError as error:
        return _fail(args, EXIT_UNEXPECTED, str(error))
    except MemoryError as error:
        return _fail(args, EXIT_UNEXPECTED, f"this machine has not the memory: {error}")
    except BrokenPipeError:
        # The reader of our output has gone; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNEXPECTED
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return _fail(args, EXIT_INPUT, f"{where}{error.strerror or error}")
    except (InputError, ValueError) as error:
        return _fail(args, EXIT_INPUT, str(error))


# Commands


def run_adapt(args: argparse.Namespace) -> Document:
    """`tinytrain adapt`: adapts a network to a folder of labelled photos."""
    check_writable(args.out)
    _check_cache(args)
    start = time.perf_counter()
    network = _network(args.network)
    support = _photos(args.support, network, args, "support", least_classes=2)
    query = (
        None if args.query is None else _photos(args.query, network, args, "query", least_classes=1)
    )
    if query is not None:
        query = _relabelled(query, support.classes)
    loaded = time.perf_counter() - start
    result, document = _adapted(args, network, support, query, loaded)
    result.network.save(args.out)
    return {"command": "adapt", **document, "out": str(args.out)}


def run_demo(args: argparse.Namespace) -> Document:
    """`tinytrain demo`: adapts a network to a task that the program draws itself."""
    if args.save_images is not None:
        args.save_images.mkdir(parents=True, exist_ok=True)
    if args.out is not None:
        check_writable(args.out)
    _check_cache(args)
    start = time.perf_counter()
    network = _network(args.network)
    task = draw_task(network.input_size, seed=args.seed, progress=args.progress.phase("drawing"))
    loaded = time.perf_counter() - start
    if args.save_images is not None:
        save_images(task, args.save_images)
    result, document = _adapted(args, network, task.support, task.query, loaded)
    if args.out is not None:
        result.network.save(args.out)
    return {
        "command": "demo",
        **document,
        "seed": args.seed,
        "images": None if args.save_images is None else str(args.save_images),
        "out": None if args.out is None else str(args.out),
    }


def run_classify(args: argparse.Namespace) -> Document:
    """`tinytrain classify`: names the class of each photo."""
    network = _network(args.network)
    with _photo_hints():
        images = load_images(
            args.photos,
            resize=network.resize,
            input_size=network.input_size,
            progress=args.progress.phase("photos"),
        )
    found = classify(network, images, unknown_below=args.unknown_below, threads=args.threads)
    given = args.unknown_below
    return {
        "command": "classify",
        "network": network.name,
        "unknown_below": network.unknown_below if given is None else given,
        "photos": [
            {
                "file": str(path),
                "label": label,
                "probability": float(row.max()),
                "probabilities": dict(zip(network.classes, row.tolist(), strict=True)),
            }
            for path, label, row in zip(args.photos, found.labels, found.table, strict=True)
        ],
    }


def run_profile(args: argparse.Namespace) -> Document:
    """`tinytrain profile`: what each layer and each method costs."""
    network = _network(args.network)
    costs = profile(network)
    policies = {"None": UpdatePolicy(), "FullTrain": full_train(network)}
    policies["LastLayer"] = last_layer(network)
    try:
        policies["SparseUpdate"] = sparse_update(network)
    except ValueError as error:
        logger.warning("%s", error)
    # Without a task every channel is as good as another.
    alike = {
        layer: np.ones(costs.layers[layer].out_channels) for layer in inspected_layers(network)
    }
    policies["TinyTrain"] = select(
        alike, costs, _budget(args), args.ratio, optimizer=args.optimizer, threads=args.threads
    )
    return {
        "command": "profile",
        "network": network.name,
        "input_size": network.input_size,
        "feature_dim": network.feature_dim,
        "layers": [{**asdict(row), "saved_bytes": row.saved_bytes} for row in costs.layers],
        "total": {
            "weights": costs.weights,
            "macs": costs.forward_macs,
            "saved_bytes": sum(row.saved_bytes for row in costs.layers),
        },
        "forward_bytes": costs.forward_bytes,
        "full_train_batch_100_bytes": costs.full_train_bytes(100),
        "methods": [_method_row(name, policy, costs, args) for name, policy in policies.items()],
    }


def run_import(args: argparse.Namespace) -> Document:
    """`tinytrain import`: turns an int8 release file into a network file."""
    check_writable(args.out, args.file)
    network = import_int8(args.file)
    network.save(args.out)
    costs = profile(network)
    return {
        "command": "import",
        "file": str(args.file),
        "sha256": hashlib.sha256(args.file.read_bytes()).hexdigest(),
        "network": network.name,
        "layers": len(costs.layers),
        "weights": costs.weights,
        "macs": costs.forward_macs,
        "out": str(args.out),
    }


def run_export(args: argparse.Namespace) -> Document:
    """`tinytrain export`: writes a network for other runtimes, compared with one of them."""
    check_writable(args.onnx, args.network)
    network = _network(args.network)
    try:
        model = to_onnx(network)
        parity = check_onnx(network, model)
    except ImportError as error:
        raise InputError(str(error)) from error
    write_atomically(args.onnx, model)
    return {
        "command": "export",
        "network": network.name,
        "out": str(args.onnx),
        "bytes": len(model),
        "runtime": parity.runtime,
        "images": parity.images,
        "differences": parity.differences,
    }


def run_evaluate(args: argparse.Namespace) -> Document | None:
    """`tinytrain evaluate`: methods compared on few-shot tasks; under torchrun, tasks are shared
    out over the processes."""
    if args.report is not None:
        _need_matplotlib()
        args.report.mkdir(parents=True, exist_ok=True)
    networks = _named_networks(args.network)
    if args.tinytl_modules and len(args.tinytl_modules) != len(networks):
        raise InputError(
            f"--tinytl-modules: expected {len(networks)} files, one of each --network, got "
            f"{len(args.tinytl_modules)}"
        )
    methods = [Method.parse(text) for text in args.methods]
    reference = Method.parse(args.reference or args.methods[-1])
    if reference not in methods:
        raise InputError(f"--reference: expected one of --methods, got {args.reference!r}")
    domains = [
        Domain(
            open_image_set(args.data, name),
            seed=args.seed,
            protocol=args.protocol,
            largest_support=args.largest_support,
        )
        for name in args.domains
    ]
    with processes() as ranks:
        rows = evaluate(
            networks,
            domains,
            methods,
            args.tasks,
            Rows(args.out, f"rows-{ranks.rank}-of-{ranks.size}.jsonl"),
            views=args.views,
            shard=(ranks.rank, ranks.size),
            threads=args.threads,
            modules=dict(zip(networks, args.tinytl_modules, strict=False)),
            cache=args.cache,
            progress=args.progress,
        )
        rows = ranks.gather(rows)
        if ranks.rank > 0:
            return None
    document = {
        "command": "evaluate",
        "out": str(args.out),
        "report": None,
        **summary(rows, reference.name),
    }
    if args.report is not None:
        from .figures import write_report

        costs = {name: profile(network) for name, network in networks.items()}
        document["report"] = str(write_report(rows, reference.name, args.report, costs))
    return document


def run_report(args: argparse.Namespace) -> Document:
    """`tinytrain report`: a page of the rows of evaluations; runs no task."""
    _need_matplotlib()
    networks = _named_networks(args.network)
    rows = merged_rows(args.rows)
    digests = {row["network"]: row["digest"] for row in rows}
    for name, network in networks.items():
        if digests.get(name) != network.digest:
            raise InputError(
                f"--network: {name}: expected the weights of rows of that name; there are rows of "
                f"{', '.join(digests)}"
            )
    from .figures import write_report

    costs = {name: profile(network) for name, network in networks.items()}
    return {
        "command": "report",
        "rows": len(rows),
        "networks": list(digests),
        "report": str(write_report(rows, args.reference, args.out, costs)),
    }


def _named_networks(paths: Sequence[Path | None]) -> dict[str, Network]:
    """Networks as rows name them: by their file, without its ending."""
    networks = {"embedded" if path is None else path.stem: _network(path) for path in paths}
    if len(networks) < len(paths):
        raise InputError("--network: expected files of different names; rows are known by them")
    return networks


def _need_matplotlib() -> None:
    """Before hours of work, not after them."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the report needs matplotlib: pip install 'tinytrain_ext[plot]'")


def run_bench(args: argparse.Namespace) -> Document:
    """`tinytrain bench`: how fast this machine trains. Other commands do not load its modules."""
    from .bench import suite

    if args.bench == "adapt" and args.power_csv is not None:
        suite.PowerLog.read(args.power_csv)  # before the work: the meter must be recording already

    def rows() -> list[suite.Row]:
        found: list[suite.Row] = []
        for network in args.network or sorted(ARCHITECTURES):
            if args.bench == "kernels":
                found += suite.kernels(network, args.rounds, args.progress)
            elif args.bench == "step":
                for batch in args.batch:
                    found += suite.steps(network, batch, args.rounds, args.threads)
            else:
                energy = suite.Energy(args.watts, args.power_csv)
                found += suite.adaptation(
                    network, args.rounds, args.threads, energy, args.progress, args.iterations
                )
        return found

    return suite.measured(args.bench, args.threads, rows)


def _bench_table(document: Document) -> str:
    from .bench import suite

    return suite.table(document)


def _bench_lines(document: Document) -> str:
    from .bench import suite

    return suite.json_lines(document)


def _adapted(
    args: argparse.Namespace,
    network: Network,
    support: LabelledImages,
    query: LabelledImages | None,
    load_seconds: float,
) -> tuple[AdaptResult, Document]:
    """Algorithm 1 on a task, and everything there is to say about it."""
    budget = _budget(args)
    _reset_peak_resident()
    resident = _peak_resident_bytes()
    result = adapt(
        network,
        support.images,
        support.labels,
        classes=support.classes,
        budget=budget,
        criterion=args.criterion,
        ratio=args.ratio,
        iterations=args.iterations,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        views=None if args.views is None else Views(args.views, args.cache, args.cache_dir),
        prototype_gradient=args.prototype_gradient,
        frozen_weights=args.frozen_weights,
        threads=args.threads,
        seed=args.seed,
        progress=args.progress,
    )
    grown = _peak_resident_bytes() - resident
    before = after = None
    if query is not None:
        untrained = adapt(
            network,
            support.images,
            support.labels,
            classes=support.classes,
            policy=UpdatePolicy(),
            budget=budget,
            threads=args.threads,
        )
        before = _accuracy(untrained, query, args.threads)
        after = _accuracy(result, query, args.threads)
    if result.plan.threads < args.threads:
        logger.warning("the budget carries only %d thread(s)", result.plan.threads)
    costs = profile(network)
    assert result.fisher is not None  # no policy was given
    return result, {
        "network": network.name,
        "classes": list(support.classes),
        "support_images": len(support.images),
        "query_images": 0 if query is None else len(query.images),
        "accuracy_before": before,
        "accuracy_after": after,
        "budget": {
            "memory_bytes": budget.memory_bytes,
            "compute": budget.compute,
            "accounting": budget.accounting,
        },
        "criterion": args.criterion,
        "policy": _policy_rows(result.policy, costs),
        "updated_weights": costs.updated_weights(result.policy),
        "backward_macs": costs.backward_macs(result.policy),
        "compute_share": costs.compute_share(result.policy),
        "paper_bytes": costs.memory_bytes(result.policy, args.optimizer),
        "planned_peak_bytes": result.peak_bytes,
        "planned": {
            phase: {"peak_bytes": of.peak_bytes, "bytes_by_kind": of.bytes_by_kind()}
            for phase, of in (("fisher", result.fisher.plan), ("fine_tuning", result.plan))
        },
        "arena_high_water_bytes": result.arena_high_water,
        "peak_resident_growth_bytes": grown,
        "resident_weight_bytes": result.plan.resident_weight_bytes,
        "photo_bytes": support.images.nbytes,
        "cache_bytes": result.cache_bytes,
        "threads": result.plan.threads,
        "seconds": {
            "load": load_seconds,
            **{phase: result.timings[phase] for phase in _PHASES},
        },
        "loss": [iteration.loss for iteration in result.history],
        "unknown_below": result.network.unknown_below,
    }


_PHASES = ("embed", "fisher", "selection", "fine_tuning")


def _policy_rows(policy: UpdatePolicy, costs: Profile) -> Document:
    """The policy as `UpdatePolicy.to_json` has it, each layer with its kind and size."""
    document: Document = json.loads(policy.to_json())
    for entry in document["layers"]:
        row = costs.layers[entry["layer"]]
        entry |= {"kind": row.kind, "of": row.channels(entry["axis"])}
    return document


def _relabelled(query: LabelledImages, classes: tuple[str, ...]) -> LabelledImages:
    """The query set with the support set's classes."""
    strange = [name for name in query.classes if name not in classes]
    if strange:
        raise InputError(
            f"--query: class {strange[0]!r} is not in the support set; "
            f"expected folders named {', '.join(classes)}"
        )
    labels = np.array([classes.index(name) for name in query.classes])[query.labels]
    return replace(query, labels=labels, classes=classes)


def _accuracy(result: AdaptResult, query: LabelledImages, threads: int) -> float:
    table = result.classify(query.images, threads=threads).table
    return float((table.argmax(axis=1) == query.labels).mean())


def _method_row(
    name: str, policy: UpdatePolicy, costs: Profile, args: argparse.Namespace
) -> Document:
    whole = name == "FullTrain"
    planned = plan(costs.network, policy, optimizer=args.optimizer, threads=args.threads)
    return {
        "method": name,
        "layers": len(policy.layers),
        "weights": costs.updated_weights(policy),
        "paper_bytes": costs.memory_bytes(policy, args.optimizer),
        "planned_peak_bytes": planned.peak_bytes,
        # The paper counts the gradient of the image, too, which nobody computes.
        "backward_macs": costs.full_train_macs if whole else costs.backward_macs(policy),
        "compute_share": 1.0 if whole else costs.compute_share(policy),
    }


# Inputs and outputs


def _network(path: Path | None) -> Network:
    if path is None:
        return default_network()
    if path.suffix == ".pkl":
        raise InputError(f"{path}: not a network file; make one with `tinytrain import`")
    return Network.load(path)


def _photos(
    directory: Path, network: Network, args: argparse.Namespace, what: str, least_classes: int
) -> LabelledImages:
    with _photo_hints():
        try:
            return load_folder(
                directory,
                resize=network.resize,
                input_size=network.input_size,
                least_classes=least_classes,
                progress=args.progress.phase(what),
            )
        except ImageError:
            raise
        except ValueError as error:
            raise InputError(f"{error}; the layout is {directory}/CLASS/PHOTO.jpg") from error


@contextmanager
def _photo_hints() -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise InputError(f"{error}; replace or remove this file") from error


def _check_cache(args: argparse.Namespace) -> None:
    if args.cache_dir is not None and args.views is None:
        raise InputError("--cache-dir: has no use without --views")
    if args.cache_dir is not None and not args.cache_dir.is_dir():
        raise InputError(f"--cache-dir: expected a folder, got {args.cache_dir}")


def _budget(args: argparse.Namespace) -> Budget:
    return Budget(args.memory, args.compute, args.accounting)


def _larger_budget(args: argparse.Namespace, error: BudgetExceeded) -> str:
    """What the budget was, and the smallest one that would do."""
    needed = []
    if error.needed_bytes is not None:
        needed.append(f"--memory {error.needed_bytes} ({report.size_text(error.needed_bytes)})")
    if error.needed_compute is not None:
        # Rounded up, so that what is printed will do.
        needed.append(f"--compute {np.ceil(error.needed_compute * 1e4) / 1e4:g}")
    return (
        f"a budget of {report.size_text(args.memory)} ({args.accounting} accounting) and "
        f"{report.percent_text(args.compute)} of FullTrain's backward MACs cannot be met; "
        f"give at least {' and '.join(needed)}"
    )


def _peak_resident_bytes() -> int:
    """The process's peak resident memory so far."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        # Less telling: it also remembers the program that started this one.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak_resident() -> None:
    """Forgets the peak so far (decoding photos has one of its own), where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        logger.info("the peak of resident memory includes what was before")


# What people see


class ProgressBar:
    """A bar on stderr, one line a phase; call it with (phase, done, total).

    A phase that takes a while shows the time left, at the mean pace since it began.
    """

    WIDTH = 30
    SECONDS_BETWEEN = 0.1
    SECONDS_OF_PACE = 3.0  # a shorter time says little of the pace

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._phase = ""
        self._open = False
        self._next = 0.0
        self._began: dict[str, tuple[float, int]] = {}  # time and `done` of the first call
        self._done: dict[str, int] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < self._done.get(phase, done + 1):  # once more from the start
            self._began[phase] = now, done
        self._done[phase] = done
        soon = now < self._next and phase == self._phase and done < total
        if not self._enabled or soon:
            return
        self._phase, self._next = phase, now + self.SECONDS_BETWEEN
        filled = self.WIDTH * done // max(total, 1)
        bar = "#" * filled + "." * (self.WIDTH - filled)
        end = "\n" if done >= total else ""
        sys.stderr.write(f"\r{phase:<12} [{bar}] {done}/{total}{self._left(now, total):<18}{end}")
        sys.stderr.flush()
        self._open = done < total

    def _left(self, now: float, total: int) -> str:
        """The time left of the current phase, or nothing while that cannot be known."""
        began, first = self._began[self._phase]
        done, elapsed = self._done[self._phase], now - began
        if elapsed < self.SECONDS_OF_PACE or not first < done < total:
            return ""
        seconds = elapsed / (done - first) * (total - done)
        hours, minutes = divmod(math.ceil(seconds / 60), 60)
        if hours:
            return f", {hours} h {minutes:02} min left"
        return f", {minutes} min left" if seconds > 60 else f", {math.ceil(seconds)} s left"

    def phase(self, name: str) -> Callable[[int, int], None]:
        """The bar as a callback of (done, total)."""
        return lambda done, total: self(name, done, total)

    def close(self) -> None:
        """Ends an unfinished line."""
        if self._open:
            sys.stderr.write("\n")
            self._open = False


def _print(text: str) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be any bytes
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _fail(args: argparse.Namespace, code: int, message: str) -> int:
    args.progress.close()
    sys.stderr.write(f"tinytrain {args.command_name}: {message}\n")
    return code


# Arguments


class _Version(argparse.Action):
    """Like argparse's own, but looks the version up only when asked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib import metadata  # reads mail headers: not for every start

        _print(f"tinytrain_ext {metadata.version('tinytrain_ext')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinytrain",
        description="Adapts small networks to your photos within a memory and compute budget.",
        epilog="exit codes: 0 done, 1 unexpected, 2 wrong usage or input, 3 the budget cannot be "
        "met, 130 interrupted",
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command_name", required=True, metavar="COMMAND")

    def add(name: str, summary: str, command: Command) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary)
        added.set_defaults(command=command)
        added.add_argument("--json", action="store_true", help="print one JSON document")
        added.add_argument("--quiet", action="store_true", help="no progress bar, no warnings")
        return added

    demo = add(
        "demo",
        "Adapt a network to a small task that the program draws itself.",
        Command(run_demo, report.adaptation),
    )
    _add_adaptation_arguments(demo)
    demo.add_argument("--save-images", type=Path, metavar="DIR", help="write the drawings there")
    demo.add_argument("--out", type=Path, metavar="FILE", help="write the adapted network there")

    adapt_ = add(
        "adapt",
        "Adapt a network to a folder of labelled photos.",
        Command(run_adapt, report.adaptation),
    )
    adapt_.add_argument(
        "--support", type=Path, required=True, metavar="DIR", help="one folder of photos a class"
    )
    adapt_.add_argument(
        "--query", type=Path, metavar="DIR", help="other photos, to measure the accuracy with"
    )
    _add_adaptation_arguments(adapt_)
    adapt_.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the adapted network to write"
    )

    classify_ = add(
        "classify", "Name the class of each photo.", Command(run_classify, report.classify)
    )
    classify_.add_argument(
        "--network", type=Path, required=True, metavar="FILE", help="an adapted network"
    )
    classify_.add_argument("photos", nargs="+", type=Path, metavar="PHOTO")
    classify_.add_argument(
        "--unknown-below",
        type=_number(0, 1),
        metavar="P",
        help="a photo whose best probability is below this is 'unknown' (default: the network's "
        "own, from its support set)",
    )
    _add_threads(classify_)

    profile_ = add(
        "profile",
        "What each layer of a network costs, and each method of training it.",
        Command(run_profile, report.profile),
    )
    profile_.add_argument(
        "network", nargs="?", type=Path, metavar="NETWORK", help="default: the embedded network"
    )
    _add_budget_arguments(profile_)

    import_ = add(
        "import",
        "Make a network file from an int8 release file of mit-han-lab/tiny-training.",
        Command(run_import, report.imported),
    )
    import_.add_argument("file", type=Path, metavar="FILE.pkl")
    import_.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the network file to write"
    )

    export_ = add(
        "export",
        "Write a network, adapted or not, as an ONNX file (needs the [onnx] extra).",
        Command(run_export, report.exported),
    )
    export_.add_argument("network", type=Path, metavar="NETWORK", help="a network file")
    export_.add_argument(
        "--onnx", type=Path, required=True, metavar="FILE", help="the ONNX file to write"
    )

    _add_evaluate_arguments(
        add(
            "evaluate",
            "Compare methods of on-device training on few-shot tasks from folders of images.",
            Command(run_evaluate, report.evaluation),
        )
    )
    _add_report_arguments(
        add(
            "report",
            "Make a page of tables and figures from the rows of evaluations.",
            Command(run_report, report.reported),
        )
    )
    add_pretrain_arguments(
        add(
            "pre-train",
            "Train a network from random weights on a large set of classes (offline stage).",
            Command(run_pretrain, report_training),
        )
    )
    add_metatrain_arguments(
        add(
            "meta-train",
            "Meta-train a network by few-shot episodes (offline stage).",
            Command(run_metatrain, report_training),
        )
    )
    _add_bench(commands)
    return parser


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--network",
        type=Path,
        nargs="+",
        default=[None],
        metavar="FILE",
        help="one or more network files; default: the embedded network",
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of image sets, laid out as DIR/DOMAIN/CLASS/IMAGE; splits of classes are "
        "read from DIR/_splits where there are any",
    )
    parser.add_argument(
        "--domains",
        nargs="+",
        required=True,
        metavar="DOMAIN",
        help="folders of --data; their test classes, or DOMAIN:val for another part of the split",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[kind for kind in METHODS if kind not in ("tinytl", "layer")],
        metavar="METHOD",
        help="KIND or KIND:OPTION=VALUE,... such as tinytrain:ratio=0.25,memory=524288; kinds: "
        "none, lastlayer, fulltrain, tinytl (needs PyTorch), sparseupdate (published for the "
        "paper's three networks), tinytrain, layer (default: all but tinytl and layer); "
        "docs/evaluation.md has the options",
    )
    parser.add_argument(
        "--tinytl-modules",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="what `meta-train --tinytl` made of each --network, in their order, for "
        "tinytl:meta_trained=1",
    )
    parser.add_argument(
        "--tasks", type=_whole(1), default=30, metavar="N", help="of each domain; default: 30"
    )
    parser.add_argument(
        "--reference",
        metavar="METHOD",
        help="the method that others are compared with (default: the last of --methods)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("evaluation"),
        metavar="DIR",
        help="folder of the rows, one JSON line a task and method; a run goes on from what is "
        "there (default: evaluation)",
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write a page with tables and figures there"
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default=PROTOCOLS[0],
        help="tracks: frames of one film never are support and query of a task (default); "
        "meta-dataset: they may be, as in the original",
    )
    parser.add_argument(
        "--largest-support",
        type=_whole(MAX_WAYS),
        default=MAX_SUPPORT,
        metavar="N",
        help=f"most support images of a task (default: {MAX_SUPPORT}, Meta-Dataset's)",
    )
    parser.add_argument(
        "--views",
        type=_whole(1),
        metavar="N",
        help="train every method on a fixed set of N views of each image, as `adapt --views` does "
        "(default: fresh views for every iteration)",
    )
    parser.add_argument(
        "--seed", type=_whole(0, math.inf), default=0, metavar="N", help="default: 0"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="decoded images (default: ~/.cache/tinytrain_ext)"
    )
    _add_threads(parser)


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "rows", type=Path, nargs="+", metavar="DIR", help="folders that `tinytrain evaluate` wrote"
    )
    parser.add_argument(
        "--network",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="the networks of the rows, for what only they tell: kinds, sizes and MACs of layers, "
        "FullTrain's memory at batch 100",
    )
    parser.add_argument(
        "--reference",
        default="tinytrain",
        metavar="METHOD",
        help="the method that others are compared with (default: tinytrain)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the page to write"
    )


def _add_bench(commands: Any) -> None:
    summary = "Measure how fast this machine trains: layers, steps, or a whole adaptation."
    bench = commands.add_parser("bench", help=summary, description=summary)
    kinds = bench.add_subparsers(dest="bench", required=True, metavar="WHAT")
    for what, rounds, text in (
        ("kernels", 7, "Every convolution of the paper's networks, forward and backward."),
        ("step", 7, "One training step, beside torch's where torch is installed."),
        ("adapt", 3, "A whole adaptation: load, Fisher, run and total, as the paper's Table 5."),
    ):
        added = kinds.add_parser(what, help=text, description=text)
        added.set_defaults(
            command=Command(run_bench, _bench_table, _bench_lines), threads=1, command_name="bench"
        )
        added.add_argument("--json", action="store_true", help="print one JSON line a row")
        added.add_argument("--quiet", action="store_true", help="no progress bar, no warnings")
        added.add_argument(
            "--network",
            action="append",
            choices=sorted(ARCHITECTURES),
            help="may be given several times; default: all",
        )
        added.add_argument(
            "--rounds", type=_whole(1), default=rounds, metavar="N", help=f"default: {rounds}"
        )
        if what != "kernels":
            _add_threads(added)
        if what == "step":
            added.add_argument(
                "--batch",
                type=_whole(1),
                nargs="+",
                default=[1, 25],
                metavar="N",
                help="images of a step; default: 1 25",
            )
        if what == "adapt":
            added.add_argument(
                "--iterations", type=_whole(0), default=40, metavar="N", help="default: 40"
            )
            power = added.add_mutually_exclusive_group()
            power.add_argument(
                "--watts",
                type=_number(0, float("inf"), above=True),
                metavar="W",
                help="the board's power while it works, for the energy",
            )
            power.add_argument(
                "--power-csv",
                type=Path,
                metavar="FILE",
                help="a power meter's record, columns seconds (since 1970, UTC) and watts, read "
                "when the job is done; for the energy",
            )


def _add_adaptation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--network", type=Path, metavar="FILE", help="default: the embedded network"
    )
    _add_budget_arguments(parser)
    parser.add_argument(
        "--criterion",
        choices=CRITERIA,
        default=CRITERIA[0],
        help="tinytrain: Eq. 3 of the paper (default); held_out: what training a channel promises "
        "for photos that it is not trained on",
    )
    parser.add_argument("--iterations", type=_whole(0), default=40, metavar="N", help="default: 40")
    parser.add_argument(
        "--learning-rate",
        type=_number(0, float("inf"), above=True),
        metavar="RATE",
        help="default: chosen for the optimizer",
    )
    parser.add_argument(
        "--views",
        type=_whole(1),
        metavar="N",
        help="train on a fixed set of N augmented views of each photo, so that frozen layers see "
        "each view once only; faster (default: fresh views for every iteration, as in the paper)",
    )
    parser.add_argument(
        "--cache",
        type=_parse_size,
        default=Views.cache_bytes,
        metavar="SIZE",
        help="beside --memory, for what frozen layers make of --views (default: 32MiB)",
    )
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="keep that in a file there, not in RAM"
    )
    parser.add_argument(
        "--prototype-gradient",
        action="store_true",
        help="let gradients reach the photos through their classes' prototypes, too; slower, often "
        "better",
    )
    parser.add_argument(
        "--frozen-weights",
        choices=FROZEN_WEIGHTS,
        default=FROZEN_WEIGHTS[0],
        help="int8: keep what is not trained as bytes; slower, exact for imported networks "
        "(default: float32)",
    )
    parser.add_argument(
        "--seed", type=_whole(0, math.inf), default=0, metavar="N", help="default: 0"
    )


def _add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory",
        type=_parse_size,
        default=1 << 20,
        metavar="SIZE",
        help="of training, such as 512KiB, 512k or 600000 (default: 1MiB)",
    )
    parser.add_argument(
        "--accounting",
        choices=("planner", "paper"),
        default="planner",
        help="what --memory limits: the peak of everything the engine plans (default), or the "
        "paper's formula",
    )
    parser.add_argument(
        "--compute",
        type=_number(0, float("inf"), above=True),
        default=0.15,
        metavar="SHARE",
        help="backward MACs as a share of FullTrain's (default: 0.15)",
    )
    parser.add_argument(
        "--ratio",
        type=_number(0, 1, above=True),
        default=0.5,
        metavar="R",
        help="share of a chosen layer's channels to train (default: 0.5)",
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam", help="default: adam")
    _add_threads(parser)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_whole(1), default=1, metavar="N", help="default: 1")


_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate(("K", "M", "G"), start=1):
    _UNITS |= {_prefix: 1024**_power, f"{_prefix}IB": 1024**_power, f"{_prefix}B": 1000**_power}


def _parse_size(text: str) -> int:
    """ "1MiB", "1m" and "1048576" are the same number of bytes; "1MB" is a million."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    size = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0.0
    if not 1 <= size <= MAX_BYTES:
        raise argparse.ArgumentTypeError(f"expected a size such as 1MiB or 512k, got {text!r}")
    return int(size)


def _whole(least: int, most: float = (1 << 31) - 1) -> Callable[[str], int]:
    """Reads a count; a seed may have any size."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text, re.ASCII) or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least}, got {text!r}")
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"expected at most {most}, got {text!r}")
        return int(text)

    return parse


def _number(low: float, high: float, above: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (above and value == low) or value == float("inf"):
            limits = f"{'above' if above else 'from'} {low:g}"
            limits += f" to {high:g}" if high < float("inf") else ""
            raise argparse.ArgumentTypeError(f"expected a number {limits}, got {text!r}")
        return value

    return parse
