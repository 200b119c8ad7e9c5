"""The benchmark suite: this engine and its peers, interleaved in one run.

    benchmarks/peers/install.sh DIR                      # once; without it, only torch is a peer
    python -m benchmarks --peers DIR --json rows.jsonl   # everything
    python -m benchmarks --only step --network mobilenetv2 --batches 1 25 --rounds 5
    python -m benchmarks --show rows.jsonl --plot docs   # tables and plots of an earlier run

Sections: step (forward, Fisher, steps and iterations of four methods), kernels (each on every layer
shape and instruction set), selection (whole adaptations), python (its share of a step), scaling,
threads. One thread and CPU time unless a table says otherwise; results are checked against the
peers' before timing. --resume goes on with the groups that FILE does not have yet.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinytrain_ext.bench.jobs import TT_POLICIES

from . import kernels, scaling, shares, step
from .measure import describe_machine
from .peers.client import COLUMNS, Peer, available
from .report import plot, tables

SECTIONS = ("step", "kernels", "selection", "python", "scaling", "threads")


def groups(arguments: argparse.Namespace) -> list[tuple[str, str | None, int | None]]:
    """(section, network, batch) of everything to measure, each measured in one go."""
    found: list[tuple[str, str | None, int | None]] = []
    for section in arguments.only:
        if section == "step":
            found += [("step", n, b) for n in arguments.network for b in arguments.batches]
        elif section in ("selection", "python"):
            found += [(section, network, None) for network in arguments.network]
        else:
            found.append((section, None, None))
    return found


def measure(
    group: tuple[str, str | None, int | None],
    arguments: argparse.Namespace,
    peers: dict[str, Peer],
    folder: Path,
    machine: dict[str, Any],
) -> Iterable[dict[str, Any]]:
    """The rows of a group."""
    rounds = arguments.rounds
    match group:
        case "step", str(network), int(batch):
            return step.measure(network, batch, rounds, peers, folder)
        case "selection", str(network), _:
            return shares.selection(network, rounds, peers, folder)
        case "python", str(network), _:
            return shares.python(network, rounds)
        case "kernels", _, _:
            return kernels.measure(rounds, machine["copy_gigabytes"]["cache"])
        case "scaling", _, _:
            return scaling.growth(rounds)
        case _:
            return scaling.threads(rounds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    networks = sorted(TT_POLICIES)
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--network", nargs="+", default=networks, choices=networks)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 25, 100])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, metavar="DIR", help="what install.sh made")
    parser.add_argument("--columns", nargs="+", choices=list(COLUMNS), help="only these peers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON line a row")
    parser.add_argument("--resume", action="store_true", help="leave out groups FILE has")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing, show FILE")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the rows")
    arguments = parser.parse_args()
    if arguments.show is not None:
        rows = [json.loads(line) for line in arguments.show.read_text().splitlines()]
        print("\n\n".join(tables(rows)))
    else:
        rows = run(arguments)
    if arguments.plot is not None:
        for path in plot(rows, arguments.plot):
            print(f"wrote {path}", file=sys.stderr)
    return 0


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures and prints group after group; returns all rows, resumed ones among them."""
    rows: list[dict[str, Any]] = []
    if arguments.resume and arguments.json is not None and arguments.json.exists():
        rows = [json.loads(line) for line in arguments.json.read_text().splitlines()]
    done = {(row["section"], row.get("network"), row.get("batch")) for row in rows}
    sections = {row["section"] for row in rows}

    def is_done(group: tuple[str, str | None, int | None]) -> bool:
        section, network, _ = group
        return group in done if network is not None else section in sections

    machine = describe_machine()
    wanted = [group for group in groups(arguments) if not is_done(group)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        columns = [c for c in available(arguments.peers) if c in (arguments.columns or COLUMNS)]
        peers = {}
        if any(section in ("step", "selection") for section, _, _ in wanted):
            for column in columns:
                peers[column] = Peer(column, arguments.peers, folder)
                stack.callback(peers[column].close)
        machine["peers"] = {column: peer.version for column, peer in peers.items()}
        for number, group in enumerate(tqdm(wanted, file=sys.stderr)):
            found = list(measure(group, arguments, peers, folder, machine))
            if number == 0:
                found.insert(0, machine)
            rows += found
            print("\n\n".join(tables(found)), end="\n\n", flush=True)
            if arguments.json is not None:
                with arguments.json.open("a") as out:
                    out.writelines(json.dumps(row) + "\n" for row in found)
    return rows


if __name__ == "__main__":
    sys.exit(main())
