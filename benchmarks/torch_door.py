"""PyTorch's way, and ours inside PyTorch: what a training step saves, and what it takes.

    python -m benchmarks.torch_door                       # both tables, the three networks
    python -m benchmarks.torch_door memory --json rows.jsonl
    python -m benchmarks.torch_door speed --network mobilenetv2 --json rows.jsonl

memory: bytes that autograd saves in the forward pass of one image, counted by
torch.autograd.graph.saved_tensors_hooks, each storage once, parameters and buffers left out.
Networks without the feature mix, random weights. Columns: PyTorch eager with frozen BatchNorm (what
users run), and with BatchNorm folded; converted layers; the whole tail; the engine's plan; the
paper's model (B3 + B4, Appendix A.4).

speed: the TT step of `bench step` (zoo nets, batch 1), each column with the same loss and
torch.optim.SGD in PyTorch: converted layers, the whole tail (its loss in PyTorch, or inside), and
stock PyTorch; beside them the engine alone, with its own optimiser. One thread, CPU time, medians
of interleaved rounds; the gradients of the columns are compared after timing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import tinytrain_ext as tt
from tinytrain_ext import _core
from tinytrain_ext.architectures import ARCHITECTURES, random_network
from tinytrain_ext.bench.jobs import (
    LEARNING_RATE,
    SCALE,
    TT_POLICIES,
    WAYS,
    OurJob,
    Task,
    tt_policy,
    zoo_network,
)
from tinytrain_ext.bench.suite import call_seconds
from tinytrain_ext.bench.torch_peer import TorchJob, TorchNetwork
from tinytrain_ext.cost import inspected_layers
from tinytrain_ext.nn import SparseBackbone, convert, sparse_layers
from tinytrain_ext.session import plan

REPEATS = 25
LARGEST_DIFFERENCE = 1e-4


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the storages that autograd saves during model(x), the model's own left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(sizes.values())


def policies(name: str, network: tt.Network) -> dict[str, tt.UpdatePolicy]:
    """What is trained in the rows of the memory table."""

    def whole(layers: tuple[int, ...]) -> tt.UpdatePolicy:
        return tt.UpdatePolicy({n: tuple(range(len(network.biases[n]))) for n in layers})

    last6 = inspected_layers(network, 6)
    first = tuple(n for n in last6 if n not in inspected_layers(network, 5))
    return {
        "last block": whole(inspected_layers(network, 1)),
        "last 6 blocks": whole(last6),
        "first of the last 6 blocks": whole(first),
        "TT policy": tt_policy(name, network),
    }


def measure_memory(name: str) -> list[dict[str, Any]]:
    """Rows of one network."""
    network = random_network(ARCHITECTURES[name], np.random.default_rng(0))
    x = torch.zeros(1, 3, network.input_size, network.input_size)
    rows = []
    for label, policy in policies(name, network).items():
        trained = set(policy.layers)
        costs = tt.profile(network)
        rows.append(
            {
                "table": "memory",
                "network": name,
                "policy": label,
                "torch_eager_bytes": saved_bytes(TorchNetwork(network, trained, True), x),
                "torch_folded_bytes": saved_bytes(TorchNetwork(network, trained, False), x),
                "layers_bytes": saved_bytes(convert(network.to_torch(), policy), x),
                "tail_bytes": saved_bytes(SparseBackbone(network, policy), x),
                "planned_bytes": plan(network, policy).saved_bytes,
                "paper_bytes": costs.saved_bytes(policy) + costs.mask_bytes(policy),
                "torch": torch.__version__,
            }
        )
    return rows


class DoorJob(TorchJob):
    """The step of a TorchJob on a model of ours."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.model = model
        x = torch.tensor(task.images).permute(0, 3, 1, 2).float() / 127.5 - 1
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.prototypes = torch.tensor(task.prototypes)
        self.labels = torch.tensor(task.labels)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)


class LossInsideJob(DoorJob):
    """The same step with the ProtoNet loss in the Function."""

    def __init__(self, model: SparseBackbone, task: Task) -> None:
        super().__init__(model, task)
        model.set_prototypes(torch.tensor(task.support), torch.arange(WAYS), WAYS)

    def gradients(self) -> None:
        self.model.proto_loss(self.x, self.labels, SCALE).backward()


def largest_difference(network: tt.Network, policy: tt.UpdatePolicy) -> float:
    """Of the selected weights' gradients of both of ours to torch's, as a share of the largest.

    The median over nine images: rounding can tip a value on a ReLU6's corner (torch_peer.check).
    """
    found: dict[tuple[str, int], list[float]] = {}
    for seed in range(9):
        task = Task(network, 1, seed=100 + seed)
        theirs = TorchJob(network, set(policy.layers), task, best=True)
        tails = [SparseBackbone(network, policy) for _ in range(2)]
        layers = convert(network.to_torch(), policy)
        theirs.gradients()
        for job in (
            DoorJob(tails[0], task),
            LossInsideJob(tails[1], task),
            DoorJob(layers, task),
        ):
            job.gradients()
        flat = torch.stack([tail.selected.grad for tail in tails if tail.selected.grad is not None])
        for layer, update in policy.layers.items():
            wanted = theirs.model.convs[layer].weight.grad
            rows = sparse_layers(layers)[layer].rows
            assert isinstance(wanted, torch.Tensor)
            assert rows is not None
            assert rows.grad is not None
            wanted = wanted[list(update.channels)]
            (tail, inside), flat = flat[:, : rows.numel()], flat[:, rows.numel() :]
            for column, mine in (("tail", tail), ("inside", inside), ("layers", rows.grad)):
                difference = float((mine.view_as(wanted) - wanted).abs().max() / wanted.abs().max())
                found.setdefault((column, layer), []).append(difference)
    worst = max(statistics.median(values) for values in found.values())
    if worst > LARGEST_DIFFERENCE:
        raise SystemExit(
            f"gradients differ from torch's by {worst:.2e}: these timings mean nothing"
        )
    return worst


def measure_speed(name: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of one network, batch 1."""
    network = zoo_network(name)
    policy = tt_policy(name, network)
    task = Task(network, 1)
    steps: dict[str, Callable[[], object]] = {
        "torch eager": TorchJob(network, set(policy.layers), task, best=False).step,
        "best torch": TorchJob(network, set(policy.layers), task, best=True).step,
        "converted layers": DoorJob(convert(network.to_torch(), policy), task).step,
        "whole tail": DoorJob(SparseBackbone(network, policy), task).step,
        "whole tail with loss": LossInsideJob(SparseBackbone(network, policy), task).step,
        "engine alone": OurJob(network, policy, task).step,
    }
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {column: [] for column in steps}
    for _ in range(rounds):
        for column, step in steps.items():
            times[column].append(call_seconds(step, REPEATS))
    difference = largest_difference(network, policy)
    rows = []
    for column, seconds in times.items():
        ratios = [eager / mine for eager, mine in zip(times["torch eager"], seconds, strict=True)]
        rows.append(
            {
                "table": "speed",
                "network": name,
                "batch": 1,
                "column": column,
                "milliseconds": 1e3 * statistics.median(seconds),
                "spread": [1e3 * min(seconds), 1e3 * max(seconds)],
                "times_faster_than_eager": statistics.median(ratios),
                "ratio_spread": [min(ratios), max(ratios)],
                "rounds": rounds,
                "largest_difference": difference,
                "isa": _core.default_isa(),
                "torch": torch.__version__,
            }
        )
    return rows


def print_memory(rows: list[dict[str, Any]]) -> None:
    columns = ["torch_eager", "torch_folded", "layers", "tail", "planned", "paper"]
    print("saved by a forward pass of one image, KiB (nets without the feature mix)")
    print(f"{'network':<14}{'trained':<28}" + "".join(f"{name:>14}" for name in columns))
    for row in rows:
        cells = "".join(f"{row[f'{name}_bytes'] / 1024:>14.1f}" for name in columns)
        print(f"{row['network']:<14}{row['policy']:<28}{cells}")


def print_speed(rows: list[dict[str, Any]]) -> None:
    print(
        f"TT step, batch 1 (zoo nets, random weights), isa {rows[0]['isa']}, one thread, CPU time, "
        f"median of {rows[0]['rounds']} interleaved rounds"
    )
    print(f"{'network':<14}{'':<22}{'ms':>8}  times faster than eager torch (lowest to highest)")
    for row in rows:
        low, high = row["ratio_spread"]
        print(
            f"{row['network']:<14}{row['column']:<22}{row['milliseconds']:>8.3f}  "
            f"{row['times_faster_than_eager']:.1f}x ({low:.1f} to {high:.1f})"
        )
    print(f"largest difference to torch: {max(r['largest_difference'] for r in rows):.1e}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("table", nargs="?", choices=("memory", "speed"), help="default: both")
    parser.add_argument("--network", choices=sorted(TT_POLICIES), help="default: all three")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="append one JSON line a row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = [arguments.network] if arguments.network else list(ARCHITECTURES)
    rows: list[dict[str, Any]] = []
    if arguments.table != "speed":
        memory = [row for name in names for row in measure_memory(name)]
        print_memory(memory)
        rows += memory
    if arguments.table != "memory":
        speed = [row for name in names for row in measure_speed(name, arguments.rounds)]
        print_speed(speed)
        rows += speed
    if arguments.json:
        with arguments.json.open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
