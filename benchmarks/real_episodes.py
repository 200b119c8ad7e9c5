"""Few-shot episodes of real photos: accuracy with and without adaptation.

    TINYTRAIN_DATA=DIR TINYTRAIN_WEIGHTS=DIR python -m benchmarks.real_episodes --episodes 20

For each network (the imported ones, or those of --networks) and test domain (traffic signs,
Omniglot's evaluation alphabets, flowers): 5 to 20 ways, 3 to 10 shots, up to 9 queries a class from
the remaining images (traffic signs: from other tracks), adapted by `tinytrain_ext.adapt` within 1
MiB and 15 %. Same episodes for every network. Nothing is chosen on these domains: --domains
clothing grocery sign_digits are there for that. --variants compares ways to adapt on the same
episodes: "default", or what differs from it, such as views=8, optimizer=in_place_sgd or
frozen_weights=int8,views=4. One JSON line an episode in --out, which a second run continues; a
table at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tinytrain_ext as tt
from tinytrain_ext.images import load_image
from tinytrain_ext.importers import import_int8
from tinytrain_ext.views import Views

NETWORKS = {"mcunet": "mcunet-5fps", "mobilenetv2": "mbv2-w0.35", "proxylessnas": "proxyless-w0.3"}
DOMAINS = ("traffic_sign", "omniglot", "vgg_flower")
MAX_SHOTS = 10
VALIDATION_DOMAINS = ("clothing", "grocery", "sign_digits")


def test_classes(data: Path, domain: str) -> dict[str, list[Path]]:
    """{class: images} of a domain's test split; of a validation domain, all with enough images."""
    folders = {path.name: path for path in sorted((data / domain).iterdir()) if path.is_dir()}
    splits = data / "_splits"
    if domain == "vgg_flower":
        flowers = json.loads((splits / "class_map.json").read_text())[domain]
        folders = {n: p for n, p in folders.items() if flowers[n]["meta_dataset_split"] == "test"}
    elif domain == "omniglot":
        halves = json.loads((splits / "omniglot" / "background_evaluation.json").read_text())
        folders = {n: p for n, p in folders.items() if halves[n] == "evaluation"}
    classes = {name: sorted(path.iterdir()) for name, path in folders.items()}
    if domain in VALIDATION_DOMAINS:
        classes = {n: paths for n, paths in classes.items() if len(paths) > MAX_SHOTS}
    return classes


def sample(
    classes: dict[str, list[Path]], by_track: bool, rng: np.random.Generator
) -> tuple[list[list[Path]], list[list[Path]]]:
    """Support and query images of one episode, by class; disjoint (and by track)."""
    ways = int(rng.integers(5, min(20, len(classes)) + 1))
    shots = int(rng.integers(3, MAX_SHOTS + 1))
    support, query = [], []
    for name in rng.choice(sorted(classes), ways, replace=False):
        paths = classes[str(name)]
        if by_track:
            tracks: dict[str, list[Path]] = defaultdict(list)
            for path in paths:
                tracks[path.name.split("_")[0]].append(path)
            order = [tracks[t] for t in rng.permutation(sorted(tracks))]
            near: list[Path] = []
            while len(near) < shots and len(order) > 1:
                near += order.pop()
            far = [path for track in order for path in track]
        else:
            shuffled = [paths[i] for i in rng.permutation(len(paths))]
            near, far = shuffled[:shots], shuffled[shots:]
        support.append([near[i] for i in rng.permutation(len(near))[:shots]])
        query.append([far[i] for i in rng.permutation(len(far))[:9]])
    return support, query


def load(
    groups: list[list[Path]], network: tt.Network
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, H, W, 3) and labels (N,) of paths grouped by class."""
    images = [
        load_image(p, resize=network.resize, input_size=network.input_size)
        for g in groups
        for p in g
    ]
    labels = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    return np.stack(images), labels.astype(np.int64)


def accuracy(
    network: tt.Network,
    prototypes: NDArray[np.float32],
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
) -> float:
    """Share of images whose nearest prototype (by cosine) is their class's."""
    features = network.embed(images)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return float(((features @ prototypes.T).argmax(axis=1) == labels).mean())


def run_episode(
    network: tt.Network, domain: str, data: Path, episode: int, budget: tt.Budget, **options: Any
) -> dict[str, Any]:
    """One row: accuracy before and after, sizes, what was selected, seconds."""
    rng = np.random.default_rng([(*DOMAINS, *VALIDATION_DOMAINS).index(domain), episode])
    classes = test_classes(data, domain)
    support, query = sample(classes, domain == "traffic_sign", rng)
    images, labels = load(support, network)
    queries, targets = load(query, network)
    start = time.process_time()
    result = tt.adapt(network, images, labels, budget=budget, seed=episode, **options)
    seconds = time.process_time() - start
    before = tt.adapt(network, images, labels, policy=tt.UpdatePolicy({}), iterations=0).network
    assert before.prototypes is not None
    assert result.network.prototypes is not None
    return {
        "domain": domain,
        "episode": episode,
        "ways": len(support),
        "support": len(images),
        "query": len(queries),
        "accuracy_before": accuracy(network, before.prototypes, queries, targets),
        "accuracy_after": accuracy(result.network, result.network.prototypes, queries, targets),
        "layers": {layer: len(u.channels) for layer, u in result.policy.layers.items()},
        "peak_bytes": result.peak_bytes,
        "cache_bytes": result.cache_bytes,
        "cpu_seconds": seconds,
    }


def options_of(variant: str) -> dict[str, Any]:
    """Arguments of `adapt` by a variant's name."""
    options: dict[str, Any] = {}
    for entry in variant.split(",") if variant != "default" else ():
        name, _, value = entry.partition("=")
        if name == "views":
            options[name] = Views(int(value))
        elif name in ("optimizer", "frozen_weights"):
            options[name] = value
        elif name in ("prototype_gradient", "biases"):
            options[name] = bool(int(value))
        elif name == "learning_rate":
            options[name] = float(value)
        else:
            raise ValueError(f"--variants: unknown {name!r}")
    return options


def load_network(name: str) -> tt.Network:
    """An imported network by its architecture, the embedded one, or any network file's."""
    if name in NETWORKS:
        return import_int8(Path(os.environ["TINYTRAIN_WEIGHTS"]) / f"{NETWORKS[name]}.pkl")
    return tt.default_network() if name == "embedded" else tt.Network.load(name)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval."""
    return float(np.mean(values)), float(1.96 * np.std(values, ddof=1) / np.sqrt(len(values)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument(
        "--networks",
        nargs="+",
        default=list(NETWORKS),
        metavar="NAME",
        help=f"{', '.join(NETWORKS)} (default: all), embedded, or a network file",
    )
    parser.add_argument(
        "--domains", nargs="+", default=list(DOMAINS), choices=(*DOMAINS, *VALIDATION_DOMAINS)
    )
    parser.add_argument("--memory", type=int, default=1 << 20, help="bytes")
    parser.add_argument("--compute", type=float, default=0.15)
    parser.add_argument("--variants", nargs="+", default=["default"], metavar="NAME=VALUE,...")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON lines; continued if it exists"
    )
    arguments = parser.parse_args()
    needed = ["TINYTRAIN_DATA"]
    needed += ["TINYTRAIN_WEIGHTS"] if NETWORKS.keys() & set(arguments.networks) else []
    for variable in needed:
        if not os.environ.get(variable):
            print(f"{variable} is not set: it names the folder with the data", file=sys.stderr)
            return 2
    data = Path(os.environ["TINYTRAIN_DATA"])
    rows = (
        [json.loads(line) for line in arguments.out.read_text().splitlines()]
        if arguments.out.exists()
        else []
    )
    # Rows of another budget, or of before it was written down, are left alone.
    limits = {"memory_bytes": arguments.memory, "compute": arguments.compute}
    rows = [row for row in rows if limits.items() <= row.items()]
    done = {(row["network"], row["variant"], row["domain"], row["episode"]) for row in rows}
    budget = tt.Budget(memory_bytes=arguments.memory, compute=arguments.compute)
    with arguments.out.open("a") as out:
        for name in arguments.networks:
            network = load_network(name)
            for domain in arguments.domains:
                for episode, variant in product(range(arguments.episodes), arguments.variants):
                    if (name, variant, domain, episode) in done:
                        continue
                    options = {"threads": arguments.threads, **options_of(variant)}
                    row = run_episode(network, domain, data, episode, budget, **options)
                    rows.append({"network": name, "variant": variant, **limits, **row})
                    out.write(json.dumps(rows[-1]) + "\n")
                    out.flush()
    head = f"{'network':<14}{'domain':<14}{'variant':<26}{'n':>4}"
    print(f"{head}  {'before':>13}  {'after':>13}  {'gain':>13}  {'CPU s':>6}")
    for cell in product(arguments.networks, arguments.domains, arguments.variants):
        mine = [r for r in rows if (r["network"], r["domain"], r["variant"]) == cell]
        before = [100 * r["accuracy_before"] for r in mine]
        after = [100 * r["accuracy_after"] for r in mine]
        cells = [interval(before), interval(after)]
        cells.append(interval([a - b for a, b in zip(after, before, strict=True)]))
        text = "  ".join(f"{mean:6.1f} +-{half:4.1f}" for mean, half in cells)
        seconds = np.mean([r["cpu_seconds"] for r in mine])
        name, domain, variant = cell
        print(f"{name:<14}{domain:<14}{variant:<26}{len(mine):>4}  {text}  {seconds:6.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
