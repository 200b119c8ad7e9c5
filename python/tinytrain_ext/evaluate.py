"""Methods of on-device training compared on few-shot tasks, as the paper's Section 3 does.

A method is an update policy and how it is trained; all of them train by `adapt`, on the same tasks.
Every finished task of a method is a row, a JSON object on a line of its own, written at once: an
interrupted evaluation goes on where it was, and rows of several processes or machines are simply
put together. What a task is depends on the seed, the domain and the task's number alone.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .adapt import Iteration, adapt, inspect
from .cost import Profile, inspected_layers, profile
from .datasets import ImageSet, cached_images
from .episodes import MAX_SUPPORT, VariousEpisodes, mean_and_interval
from .errors import BudgetExceeded, NonFiniteError
from .fisher import fisher_pass
from .network import Network, digest_of
from .protonet import cosine_logits
from .selection import (
    CRITERIA,
    MAX_BYTES,
    Budget,
    UpdatePolicy,
    full_train,
    last_layer,
    select,
    sparse_update,
    top_channels,
    with_channels,
)
from .session import OPTIMIZERS, plan
from .views import Views

__all__ = [
    "LEARNING_RATES",
    "METHODS",
    "PROTOCOLS",
    "SETTINGS",
    "Domain",
    "Method",
    "Row",
    "Rows",
    "Task",
    "channels_of",
    "evaluate",
    "merged_rows",
    "read_rows",
    "summary",
]

Row = dict[str, Any]
Modules = Mapping[str, NDArray[np.float32]]  # TinyTL's, by the names of their parameters
Progress = Callable[[str, int, int], None]

METHODS = ("none", "lastlayer", "fulltrain", "tinytl", "sparseupdate", "tinytrain", "layer")
PROTOCOLS = ("tracks", "meta-dataset")
ITERATIONS = 40
CACHE_BYTES = 512 << 20  # for a fixed set of views; a machine that evaluates is no device

# Adam's, chosen per method on the validation episodes of docs/results.md (TinyTL's: of
# docs/evaluation.md), never on a test domain.
LEARNING_RATES = {
    "none": 0.0,
    "lastlayer": 3e-3,
    "fulltrain": 1e-4,
    "tinytl": 1e-3,
    "sparseupdate": 1e-3,
    "tinytrain": 1e-3,
    "layer": 1e-3,
}


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(f"expected 0 or 1, got {text!r}")
    return text == "1"


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"expected a number above 0, got {text!r}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError(f"expected above 0, up to 1, got {text!r}")
    return value


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise ValueError(f"expected a whole number from {least}, got {text!r}")
        if value > MAX_BYTES:
            raise ValueError(f"expected at most {MAX_BYTES}, got {text!r}")
        return value

    return read


# Options of a method: how to read each, and which methods take it.
_TRAINING: dict[str, Callable[[str], Any]] = {
    "optimizer": str,
    "learning_rate": _positive,
    "iterations": _whole(0),
    "prototype_gradient": _flag,
}
_OPTIONS: dict[str, dict[str, Callable[[str], Any]]] = {
    "none": {},
    "lastlayer": {**_TRAINING, "biases": _flag},
    "fulltrain": _TRAINING,
    "tinytl": {
        "learning_rate": _positive,
        "iterations": _whole(0),
        "biases": _flag,
        "meta_trained": _flag,
    },
    "sparseupdate": {**_TRAINING, "biases": _flag},
    "tinytrain": {
        **_TRAINING,
        "biases": _flag,
        "criterion": str,
        "ratio": _share,
        "memory": _whole(1),
        "compute": _positive,
        "accounting": str,
        "budget": str,
        "per": str,
        "blocks": _whole(1),
        "channels": str,
    },
    "layer": {**_TRAINING, "index": int, "ratio": _share, "channels": str},
}
_PER: dict[str, tuple[str, ...]] = {
    "weights+macs": ("weights", "macs"),
    "weights": ("weights",),
    "macs": ("macs",),
    "nothing": (),
}
_CHOICES: dict[str, Collection[str]] = {
    "optimizer": OPTIMIZERS,
    "criterion": CRITERIA,
    "accounting": ("planner", "paper"),
    "budget": ("sparseupdate",),
    "per": _PER,
    "channels": ("fisher", "random", "l2"),
}


# Where an option has this value, others would be ignored or cannot be.
_EXCLUDED: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("budget", "sparseupdate", ("memory", "compute")),
    ("criterion", "held_out", ("ratio", "per")),
    ("optimizer", "in_place_sgd", ("prototype_gradient",)),
)


@dataclass(frozen=True)
class Method:
    """A method and what differs from its defaults, such as "tinytrain:ratio=0.25".

    name: as rows carry it, options in alphabetical order; kind: one of METHODS.
    """

    name: str
    kind: str
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> Method:
        """Reads KIND or KIND:OPTION=VALUE,... Raises ValueError naming what is wrong.

        All but "none" take learning_rate, optimizer, iterations and prototype_gradient (0 or 1);
        lastlayer, sparseupdate and tinytrain biases (0 or 1). tinytl takes learning_rate,
        iterations, biases and meta_trained (0 or 1: its modules as they were meta-trained) only.
        tinytrain takes what `select` takes: criterion, ratio, memory (bytes), compute (share),
        accounting; budget=sparseupdate, the memory and compute of that method's policy instead;
        and for ablations per (what the score divides by: "weights+macs", "weights", "macs" or
        "nothing"), blocks (how many of the last are inspected) and channels ("fisher", "random" or
        "l2": another choice on the same layers). layer trains `ratio` of the channels of the one
        convolution `index` (negative: from the end), chosen by `channels`. An option that another
        one makes meaningless is refused beside it.
        """
        kind, _, rest = text.partition(":")
        if kind not in METHODS:
            raise ValueError(f"method {text!r}: expected one of {', '.join(METHODS)}")
        known = _OPTIONS[kind]
        options: dict[str, Any] = {}
        for entry in rest.split(",") if rest else ():
            name, equals, value = entry.partition("=")
            if name not in known or not equals or name in options:
                expected = ", ".join(known) or "no options"
                raise ValueError(
                    f"method {text!r}: expected {expected} as NAME=VALUE, got {entry!r}"
                )
            try:
                options[name] = known[name](value)
            except ValueError as error:
                raise ValueError(f"method {text!r}: {name}: {error}") from error
        for name, choices in _CHOICES.items():
            if name in options and options[name] not in choices:
                expected = " or ".join(choices)
                got = options[name]
                raise ValueError(f"method {text!r}: {name}: expected {expected}, got {got!r}")
        if kind == "layer" and "index" not in options:
            raise ValueError(f"method {text!r}: expected index=NUMBER")
        for name, value, others in _EXCLUDED:
            for other in others:
                if options.get(name) == value and other in options:
                    beside = f"{name}={_text(value)}"
                    raise ValueError(f"method {text!r}: {other}: has no use beside {beside}")
        entries = ",".join(f"{name}={_text(options[name])}" for name in sorted(options))
        return cls(f"{kind}:{entries}" if entries else kind, kind, options)

    @property
    def learning_rate(self) -> float:
        """Its own, or the one chosen for its kind and Adam, times 100 for SGD."""
        if "learning_rate" in self.options:
            return float(self.options["learning_rate"])
        scale = {"adam": 1.0, "momentum": 10.0}.get(self.options.get("optimizer", "adam"), 100.0)
        return LEARNING_RATES[self.kind] * scale


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


@dataclass(frozen=True, eq=False)
class Task:
    """One few-shot task: support images and labels, query images and labels, ways 0, 1, ..."""

    domain: str
    number: int
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    queries: NDArray[np.uint8]
    targets: NDArray[np.int64]

    @property
    def seed(self) -> int:
        """Of whatever a method draws on this task: the same for every method."""
        return zlib.crc32(f"{self.domain} {self.number}".encode())


class Domain:
    """Tasks of various ways and shots from one set of images (`episodes.VariousEpisodes`).

    image_set: the images; protocol: "tracks" keeps frames of one track on one side, "meta-dataset"
    does not, as the original; largest_support: caps the support set.
    Raises ValueError when the set is too small for tasks.
    """

    def __init__(
        self,
        image_set: ImageSet,
        *,
        seed: int = 0,
        protocol: str = "tracks",
        largest_support: int = MAX_SUPPORT,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol: expected {' or '.join(PROTOCOLS)}, got {protocol!r}")
        if image_set.name == "all":  # see `summary`
            raise ValueError("domain 'all': tables call all domains together so; rename the folder")
        self.image_set = image_set
        self._seed = seed
        self.settings: Row = {
            "seed": seed,
            "protocol": protocol,
            "largest_support": largest_support,
        }
        try:
            self._episodes = VariousEpisodes(
                image_set.labels,
                superclasses=image_set.superclasses,
                tracks=image_set.tracks if protocol == "tracks" else None,
                largest_support=largest_support,
            )
        except ValueError as error:
            raise ValueError(f"{image_set.name}: {error}") from error

    def task(self, number: int, images: NDArray[np.uint8]) -> Task:
        """Task `number`; images: (N, H, W, 3) uint8, the whole set as the network takes it."""
        name = self.image_set.name
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode()), number])
        episode = self._episodes.draw(rng)
        return Task(
            domain=name,
            number=number,
            images=images[episode.support],
            labels=episode.support_ways.astype(np.int64),
            queries=images[episode.query],
            targets=episode.query_ways,
        )


class Rows:
    """Rows in a folder, one JSON object a line, in as many files as processes wrote.

    name: of this process's own file. What a killed process left of a line is removed from it.
    """

    def __init__(self, folder: Path, name: str = "rows-0-of-1.jsonl") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._own = folder / name
        if self._own.exists():
            whole, newline, rest = self._own.read_bytes().rpartition(b"\n")
            if rest:
                with self._own.open("r+b") as file:
                    file.truncate(len(whole) + len(newline))
        self.found: list[Row] = list(read_rows(folder))

    def add(self, row: Row) -> None:
        """Appends a row, for good when this returns."""
        with self._own.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.found.append(row)


def read_rows(folder: Path) -> Iterator[Row]:
    """The rows of all of a folder's rows-*.jsonl; a line that is not yet complete is left out.

    Raises ValueError naming the file and line that holds no row, and what of it is wrong.
    """
    for path in sorted(folder.glob("rows-*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                row = _checked_row(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            yield row


# Rows are compared only where these are the same.
SETTINGS = ("seed", "protocol", "largest_support", "views")
_KEY = ("network", "domain", "task", "method", *SETTINGS)
# What summaries and reports take from a row, and of which type; there are more.
_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_KEY, (int,)),
    **dict.fromkeys(("network", "domain", "method", "protocol", "digest"), (str,)),
    "views": (int, type(None)),
    **dict.fromkeys(("ways", "support", "query", "updated_weights", "backward_macs"), (int,)),
    "paper_bytes": (int,),
    "planner_bytes": (int, type(None)),
    **dict.fromkeys(("accuracy", "seconds", "selection_seconds", "cpu_seconds"), (float, int)),
    "layers": (dict,),
}
_MASK = re.compile(r"0*[1-9a-f][0-9a-f]*")


def _checked_row(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"expected a JSON object: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected {', '.join(_FIELDS)}; got {type(row).__name__}")
    missing = [name for name in _FIELDS if name not in row]
    if missing:
        raise ValueError(f"expected {', '.join(_FIELDS)}; got none of {', '.join(missing)}")
    for name, types in _FIELDS.items():
        value = row[name]
        if not isinstance(value, types) or (isinstance(value, float) and not math.isfinite(value)):
            expected = " or ".join(of.__name__ for of in types)
            raise ValueError(f"{name}: expected {expected}, got {value!r:.60}")
    kind = Method.parse(row["method"]).kind
    for name in ("ways", "support", "query"):
        if row[name] < 1:
            raise ValueError(f"{name}: expected at least 1, got {row[name]}")
    if not 0 <= row["accuracy"] <= 1:
        raise ValueError(f"accuracy: expected 0 to 1, got {row['accuracy']}")
    if kind in ("tinytrain", "layer") and not row["layers"]:
        raise ValueError(f"layers: expected at least one of {row['method']}, got none")
    for layer, update in row["layers"].items():
        pair = isinstance(update, list) and len(update) == 2
        if not (layer.isdecimal() and pair and _MASK.fullmatch(str(update[1]))):
            got = f"{layer!r:.20}: {update!r:.60}"
            raise ValueError(f"layers: expected {{layer: [axis, mask]}}, got {got}")
    return row


def merged_rows(folders: Iterable[Path]) -> list[Row]:
    """The rows of several folders, sorted, each once.

    Raises ValueError for a folder without rows, and where rows under one network's name are of
    different weights, or of different modules beside them.
    """
    found: dict[tuple[Any, ...], Row] = {}
    digests: dict[tuple[str, str], str] = {}
    for folder in folders:
        rows = list(read_rows(folder))
        if not rows:
            raise ValueError(f"{folder}: expected rows-*.jsonl, as `tinytrain evaluate` writes")
        for row in rows:
            for field, what in (("digest", "weights"), ("modules", "modules")):
                key = row["network"], field
                if field in row and digests.setdefault(key, row[field]) != row[field]:
                    raise ValueError(
                        f"{folder}: network {row['network']!r} has other {what} here than in rows "
                        "read before"
                    )
            found.setdefault(key_of(row), row)
    return sorted(found.values(), key=key_of)


def key_of(row: Row) -> tuple[Any, ...]:
    """What makes a row that row; results are sorted by it."""
    return *(row[name] for name in _KEY[:-1]), row["views"] or 0  # None does not sort with numbers


def evaluate(
    networks: Mapping[str, Network],
    domains: Sequence[Domain],
    methods: Sequence[Method],
    tasks: int,
    rows: Rows,
    *,
    views: int | None = None,
    shard: tuple[int, int] = (0, 1),
    threads: int = 1,
    modules: Mapping[str, Path] | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Runs every method on the first `tasks` tasks of every domain, for every network.

    networks: {name: network}. Rows that `rows` has are not computed again; new ones are added to
    it. views: a fixed set of so many augmented views of each support image for every method,
    which lets frozen layers see each view once; None: fresh views in every iteration. shard:
    (rank, size) of this process, which takes every size-th task; modules: {name: file that
    `meta-train --tinytl` wrote} for "tinytl:meta_trained=1"; cache: folder of decoded images
    (`cached_images`); progress: called with (phase, done, total).
    Returns this process's rows, sorted; they do not depend on processes, nor (but for TinyTL's, by
    PyTorch) on threads, except for times.

    Raises ValueError for a method that a network cannot be trained by, and where `rows` holds
    results of other weights, or of other modules, under a network's name; BudgetExceeded naming
    the method whose budget cannot be met, NonFiniteError the one that diverged; OSError and
    ImageError for images that cannot be read.
    """
    for name, network in networks.items():
        for method in methods:
            _check_method(method, name, network, threads)
    meta_trained = _meta_trained_modules(networks, methods, modules or {})
    report = progress or (lambda phase, done, total: None)
    digests = {name: network.digest for name, network in networks.items()}
    beside = {name: digest_of(arrays.values()) for name, arrays in meta_trained.items()}
    done: dict[tuple[Any, ...], Row] = {}
    for row in rows.found:
        if row["network"] in digests and row["digest"] != digests[row["network"]]:
            raise ValueError(
                f"network {row['network']!r}: the rows there are of other weights; "
                "give the network's file another name, or the rows another folder"
            )
        if "modules" in row and row["modules"] != beside.get(row["network"], row["modules"]):
            raise ValueError(
                f"network {row['network']!r}: the rows of {row['method']} there are of other "
                "modules; give the rows another folder"
            )
        done[key_of(row)] = row
    costs = {name: profile(network) for name, network in networks.items()}
    rank, size = shard
    units = [
        (domain, number)
        for index, (number, domain) in enumerate(product(range(tasks), domains))
        if index % size == rank
    ]
    found: dict[tuple[Any, ...], Row] = {}
    for count, (domain, number) in enumerate(units):
        for name, network in networks.items():
            task = None
            for method in methods:
                place = {
                    "network": name,
                    "domain": domain.image_set.name,
                    "task": number,
                    "method": method.name,
                    **domain.settings,
                    "views": views,
                }
                key = key_of(place)
                if key not in done:
                    if task is None:
                        report("tasks", count, len(units))
                        images = cached_images(
                            domain.image_set.paths,
                            network.resize,
                            network.input_size,
                            cache,
                            lambda done, total: report("decoding", done, total),
                        )
                        task = domain.task(number, images)
                    begin = meta_trained[name] if method.options.get("meta_trained") else None
                    try:
                        outcome = run_task(
                            network, costs[name], method, task, views, threads, begin
                        )
                    except BudgetExceeded as error:
                        raise BudgetExceeded(
                            f"network {name!r}, method {method.name!r}: {error}",
                            needed_bytes=error.needed_bytes,
                            needed_compute=error.needed_compute,
                        ) from error
                    except NonFiniteError as error:
                        raise NonFiniteError(
                            f"network {name!r}, method {method.name!r}: {error}; give it a smaller "
                            "learning_rate"
                        ) from error
                    done[key] = {**place, "digest": digests[name], **outcome}
                    if begin is not None:
                        done[key]["modules"] = beside[name]
                    rows.add(done[key])
                found[key] = done[key]
    report("tasks", len(units), len(units))
    return [found[key] for key in sorted(found)]


def _check_method(method: Method, name: str, network: Network, threads: int) -> None:
    """Finds before any work what would fail on the first task."""
    if method.options.get("optimizer") == "in_place_sgd" and threads > 1:
        raise ValueError(
            f"method {method.name!r}: optimizer: in_place_sgd takes 1 thread, got {threads}"
        )
    count = len(network.convolutions)
    index = method.options.get("index", 0)
    if not -count <= index < count:
        raise ValueError(
            f"method {method.name!r}: index: network {name!r} has {count} convolutions, "
            f"expected {-count} to {count - 1}, got {index}"
        )
    try:
        if method.kind == "sparseupdate" or "budget" in method.options:
            sparse_update(network)
        if method.kind == "tinytl":
            from .offline.tinytl import block_ends  # here: no other method needs PyTorch

            block_ends(network)
    except ImportError as error:
        raise ValueError(
            f"method {method.name!r}: needs PyTorch, pip install 'tinytrain_ext[torch]' ({error})"
        ) from error
    except ValueError as error:
        raise ValueError(f"method {method.name!r}: {error}") from error


def _meta_trained_modules(
    networks: Mapping[str, Network], methods: Sequence[Method], files: Mapping[str, Path]
) -> dict[str, Modules]:
    """The modules of every network, where a method is to begin with them; none without one."""
    method = next((method for method in methods if method.options.get("meta_trained")), None)
    if method is None:
        if files:
            raise ValueError("modules: have no use but for a method with meta_trained=1")
        return {}
    missing = [name for name in networks if name not in files]
    if missing:
        raise ValueError(
            f"method {method.name!r}: meta_trained: no modules of network {missing[0]!r}; "
            "`tinytrain meta-train --tinytl` makes them, --tinytl-modules takes them"
        )
    from .offline.tinytl import load_modules

    return {name: load_modules(files[name], network) for name, network in networks.items()}


def run_task(
    network: Network,
    costs: Profile,
    method: Method,
    task: Task,
    views: int | None = None,
    threads: int = 1,
    modules: Modules | None = None,
) -> Row:
    """Adapts `network` to one task by `method`; accuracy, costs, policy and times as a row.

    modules: of TinyTL, to begin with instead of random ones.
    """
    train = partial(_by_tinytl, modules=modules) if method.kind == "tinytl" else _by_policy
    start = time.perf_counter(), time.process_time()
    trained = train(
        network, costs, method, task, None if views is None else Views(views, CACHE_BYTES), threads
    )
    seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    logits = cosine_logits(trained.embed(task.queries), trained.prototypes, 1.0)
    return {
        "ways": int(task.labels.max()) + 1,
        "support": len(task.labels),
        "query": len(task.targets),
        "accuracy": float((logits.argmax(axis=1) == task.targets).mean()),
        "learning_rate": method.learning_rate,
        **trained.costs(),
        "final_loss": trained.history[-1].loss if trained.history else None,
        "seconds": round(seconds, 4),
        "selection_seconds": round(trained.selection_seconds, 4),
        "cpu_seconds": round(cpu, 4),
    }


@dataclass(frozen=True, eq=False)
class _Trained:
    """What a method made of a network: how it embeds photos, and what a row says of it."""

    embed: Callable[[NDArray[np.uint8]], NDArray[Any]]
    prototypes: NDArray[np.float32]
    history: Sequence[Iteration]
    selection_seconds: float
    costs: Callable[[], Row]


def _by_policy(
    network: Network,
    costs: Profile,
    method: Method,
    task: Task,
    views: Views | None,
    threads: int,
) -> _Trained:
    """By the engine: everything but TinyTL."""
    options = dict(method.options)
    optimizer = options.get("optimizer", "adam")
    start = time.perf_counter()
    policy = _policy(network, costs, method, task, threads)
    selected = time.perf_counter()
    result = adapt(
        network,
        task.images,
        task.labels,
        policy=policy,
        iterations=options.get("iterations", ITERATIONS),
        optimizer=optimizer,
        learning_rate=method.learning_rate,
        views=views,
        prototype_gradient=options.get("prototype_gradient", False),
        threads=threads,
        seed=task.seed,
    )

    def row() -> Row:
        whole = method.kind == "fulltrain"
        limit = _limit(network, costs, method)
        return {
            "updated_weights": costs.updated_weights(policy),
            "updated_biases": sum(costs.layers[layer].out_channels for layer in policy.biases),
            "backward_macs": costs.full_train_macs if whole else costs.backward_macs(policy),
            "paper_bytes": costs.memory_bytes(policy, optimizer),
            "planner_bytes": plan(
                network, policy, optimizer=optimizer, memory_bytes=limit
            ).peak_bytes,
            "layers": {
                str(layer): [update.axis, _mask(update.channels)]
                for layer, update in policy.layers.items()
                if method.kind in ("tinytrain", "layer")  # they depend on the task
            },
            "first_bias": min(policy.biases, default=None),
        }

    assert result.network.prototypes is not None
    return _Trained(
        embed=partial(result.network.embed, threads=threads),
        prototypes=result.network.prototypes,
        history=result.history,
        selection_seconds=selected - start,
        costs=row,
    )


def _by_tinytl(
    network: Network,
    costs: Profile,
    method: Method,
    task: Task,
    views: Views | None,
    threads: int,
    modules: Modules | None,
) -> _Trained:
    """In PyTorch: the engine trains no modules beside a network's own layers, nor plans them."""
    from .offline.tinytl import adapt_tinytl

    biases = method.options.get("biases", False)
    result = adapt_tinytl(
        network,
        task.images,
        task.labels,
        iterations=method.options.get("iterations", ITERATIONS),
        learning_rate=method.learning_rate,
        biases=biases,
        modules=modules,
        views=views,
        threads=threads,
        seed=task.seed,
    )

    def row() -> Row:
        return {
            **asdict(result.model.costs(costs)),
            "planner_bytes": None,
            "layers": {},
            "first_bias": 0 if biases else None,
        }

    embed = partial(result.model.embed, threads=threads)
    return _Trained(embed, result.prototypes, result.history, 0.0, row)


def channels_of(mask: str) -> tuple[int, ...]:
    """The channels that a row's hexadecimal mask stands for; bit c is channel c."""
    value = int(mask, 16)
    return tuple(channel for channel in range(value.bit_length()) if value >> channel & 1)


def _mask(channels: Iterable[int]) -> str:
    return f"{sum(1 << channel for channel in channels):x}"


def _policy(
    network: Network, costs: Profile, method: Method, task: Task, threads: int
) -> UpdatePolicy:
    options = method.options
    biases = options.get("biases", False)
    if method.kind == "none":
        return UpdatePolicy()
    if method.kind == "fulltrain":
        return full_train(network)
    if method.kind == "sparseupdate":
        return sparse_update(network, biases)
    if method.kind == "lastlayer":
        policy = last_layer(network)
        return UpdatePolicy(policy.layers, policy.layers if biases else ())
    rng = np.random.default_rng(task.seed)
    ratio = options.get("ratio", 0.5)
    if method.kind == "layer":
        layer = range(len(costs.layers))[options["index"]]
        count = max(1, int(ratio * costs.layers[layer].out_channels))
        rule = options.get("channels", "fisher")
        if rule != "fisher":
            return with_channels(UpdatePolicy({layer: range(count)}), network, rule, rng)
        information = fisher_pass(
            network, task.images, task.labels, rng=rng, layers=(layer,), threads=threads
        ).information[layer]
        return UpdatePolicy({layer: top_channels(information, count)})
    budget = _budget(network, costs, method)
    criterion = options.get("criterion", CRITERIA[0])
    information_of = inspect(
        network,
        task.images,
        task.labels,
        budget,
        criterion=criterion,
        rng=rng,
        layers=inspected_layers(network, options["blocks"]) if "blocks" in options else None,
        threads=threads,
    ).information
    policy = select(
        information_of,
        costs,
        budget,
        ratio,
        criterion=criterion,
        per=_PER[options.get("per", "weights+macs")],
        optimizer=options.get("optimizer", "adam"),
        biases=biases,
    )
    if "channels" in options:
        policy = with_channels(policy, network, options["channels"], rng)
    return policy


def _budget(network: Network, costs: Profile, method: Method) -> Budget:
    """The method's own, or what SparseUpdate's policy takes in the accounting asked for."""
    options = method.options
    accounting = options.get("accounting", "planner")
    if "budget" not in options:
        return Budget(options.get("memory", 1 << 20), options.get("compute", 0.15), accounting)
    optimizer = options.get("optimizer", "adam")
    policy = sparse_update(network, options.get("biases", False))
    memory = (
        costs.memory_bytes(policy, optimizer)
        if accounting == "paper"
        else plan(network, policy, optimizer=optimizer).peak_bytes
    )
    return Budget(memory, costs.compute_share(policy), accounting)


def _limit(network: Network, costs: Profile, method: Method) -> int | None:
    """Bytes that the engine's plan of the method is held to."""
    if method.kind != "tinytrain":
        return None
    budget = _budget(network, costs, method)
    return budget.memory_bytes if budget.accounting == "planner" else None


def summary(rows: Sequence[Row], reference: str) -> Row:
    """Accuracy of each method, and its paired difference to the method `reference`, per cent.

    "accuracy": rows of network, domain, method, tasks, mean and interval (95 %, half the width);
    domain "all" pools the tasks of all domains. "differences": the same, of a method's accuracy
    minus the reference's over the tasks both have done. "tasks": ways, support and query sizes of
    each domain, mean and standard deviation, as the paper's Table 4.
    """
    accuracies: dict[tuple[str, str], dict[tuple[Any, ...], float]] = {}
    sizes: dict[str, dict[int, tuple[int, int, int]]] = {}
    methods: list[str] = []
    for row in rows:
        cell = accuracies.setdefault((row["network"], row["method"]), {})
        cell[row["domain"], row["task"]] = 100 * row["accuracy"]
        sizes.setdefault(row["domain"], {})[row["task"]] = (
            row["ways"],
            row["support"],
            row["query"],
        )
        if row["method"] not in methods:
            methods.append(row["method"])
    methods.sort(key=lambda name: METHODS.index(name.partition(":")[0]))
    domains = list(sizes)
    networks = list(dict.fromkeys(network for network, _ in accuracies))
    found: list[Row] = []
    differences: list[Row] = []
    for network, domain, method in product(networks, [*domains, "all"], methods):
        mine = _of_domain(accuracies.get((network, method), {}), domain)
        theirs = _of_domain(accuracies.get((network, reference), {}), domain)
        place = {"network": network, "domain": domain, "method": method}
        if mine:
            found.append(place | _cell(list(mine.values())))
        both = [mine[task] - theirs[task] for task in mine if task in theirs]
        if both and method != reference:
            differences.append(place | _cell(both))
    return {
        "reference": reference,
        "accuracy": found,
        "differences": differences,
        "tasks": [
            {"domain": domain, "tasks": len(of), **_sizes(np.array(list(of.values()), np.float64))}
            for domain, of in sizes.items()
        ],
    }


def _of_domain(cell: dict[tuple[Any, ...], float], domain: str) -> dict[tuple[Any, ...], float]:
    return {task: value for task, value in cell.items() if domain in ("all", task[0])}


def _cell(values: list[float]) -> Row:
    mean, interval = mean_and_interval(values)
    return {"tasks": len(values), "mean": mean, "interval": interval}


def _sizes(sizes: NDArray[np.float64]) -> Row:
    means, deviations = sizes.mean(axis=0), sizes.std(axis=0)
    return {
        name: [float(mean), float(deviation)]
        for name, mean, deviation in zip(
            ("ways", "support", "query"), means, deviations, strict=True
        )
    }
