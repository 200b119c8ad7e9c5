"""What pre-training and meta-training share: epochs, checkpoints, ranks, schedule, the run's log.

A training is an iterator of steps; `run_epochs` drives it, and after every epoch validates, keeps
the best weights, writes a checkpoint and the history.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..errors import NonFiniteError
from ..network import digest_of, write_atomically
from .checkpoints import Checkpoint, load_checkpoint, save_checkpoint

__all__ = [
    "BEST",
    "LAST",
    "Epoch",
    "Learner",
    "Ranks",
    "Run",
    "Step",
    "finite",
    "identity_of",
    "learning_rate",
    "prefetched",
    "process_group",
    "run_epochs",
]

logger = logging.getLogger(__name__)

BEST, LAST = "best.safetensors", "last.safetensors"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process's place in a distributed run; the default is a run of one process."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def shard(self, what: str, number: int) -> slice:
        """This rank's part of `number` things in order.

        Raises ValueError, naming `what`, when they do not divide evenly.
        """
        if number % self.size:
            raise ValueError(
                f"{what}: expected a multiple of the {self.size} processes, got {number}"
            )
        share = number // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model under DistributedDataParallel, which averages gradients over ranks."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Lets the leading rank through the block before the others."""
        if self.size > 1 and not self.leads:
            distributed.barrier()
        yield
        if self.size > 1 and self.leads:
            distributed.barrier()

    def gather(self, value: list[Any]) -> list[Any]:
        """Every rank's list, one after the other, on all ranks."""
        if self.size == 1:
            return value
        gathered: list[list[Any]] = [[] for _ in range(self.size)]
        distributed.all_gather_object(gathered, value)
        return [entry for of in gathered for entry in of]

    def total(self, *values: float) -> list[float]:
        """Each value summed over ranks."""
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            distributed.all_reduce(sums)
        return [float(value) for value in sums]


@contextmanager
def process_group(timeout: timedelta | None = None) -> Iterator[Ranks]:
    """Joins the processes that torchrun started, if it did: nccl on GPUs, gloo without.

    timeout: how long one waits for another, PyTorch's (10 or 30 minutes) by default.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size == 1:
        yield Ranks(device=device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timeout)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), device)
    finally:
        distributed.destroy_process_group()


def learning_rate(
    position: float, *, initial: float, peak: float, final: float, warmup: float, total: float
) -> float:
    """At a position in epochs: linear from `initial` to `peak`, then a half cosine to `final`.

    warmup, total: in epochs; a warm-up is at most an epoch shorter than the run.
    """
    warmup = min(warmup, total - 1)
    if position < warmup:
        return initial + (peak - initial) * position / warmup
    progress = (position - warmup) / (total - warmup)
    return final + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - final)


def finite(loss: float) -> float:
    """The loss; raises NonFiniteError when it is not a finite number."""
    if not math.isfinite(loss):
        raise NonFiniteError(f"loss: expected a finite number, got {loss}")
    return loss


def identity_of(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> dict[str, Any]:
    """What tells one run's images from another's: their shape, all labels, some hundred images."""
    some = images[:: max(1, len(images) // 256)]
    return {"images": list(images.shape), "digest": digest_of([labels, some])}


def prefetched(
    work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """`map(work, items)`, done by a thread of its own up to `ahead` items ahead; 0 does without.

    PyTorch and NumPy let go of the interpreter while they compute, so on an idle core the batches
    cost the training loop nothing.
    """
    if ahead == 0:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(thread.submit(work, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@dataclass(frozen=True)
class Step:
    """What one optimiser step gave on this rank.

    size: side of the images in pixels. loss, accuracy (a share): means over the rank's images.
    """

    learning_rate: float
    size: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave.

    size: side of the training images in pixels. learning_rate: of its last step.
    loss, accuracy (per cent): of the augmented training images. validation: accuracy in per cent,
    by name of what it was measured on, where it was measured.
    """

    epoch: int
    size: int
    learning_rate: float
    loss: float
    accuracy: float
    logit_scale: float
    seconds: float
    validation: dict[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """What the best epoch is chosen by: the mean validation accuracy; -inf without one."""
        if not self.validation:
            return -math.inf
        return sum(self.validation.values()) / len(self.validation)


class Model(Protocol):
    """A backbone under a cosine: what both trainings train."""

    backbone: nn.Module
    logit_scale: nn.Parameter


class Exported(Protocol):
    """What a training is for: a network, or the modules beside one."""

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all."""


class Learner:
    """A model, its SGD optimiser, and the moving average of its weights and buffers.

    weight_decay: of weights; one-dimensional parameters (biases, batch norms, the scale) have none.
    average_decay: of the moving average, per step; 0 keeps none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        average_decay: float,
    ) -> None:
        self.model = model
        self.average: AveragedModel | None = None
        if average_decay:
            moving_average = get_ema_multi_avg_fn(average_decay)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(model, multi_avg_fn=moving_average, use_buffers=True)
        decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        self.optimizer = torch.optim.SGD(
            [
                {"params": decayed, "weight_decay": weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=0.0,
            momentum=momentum,
            nesterov=nesterov,
            foreach=True,
        )

    @property
    def result(self) -> nn.Module:
        """The model to use: the moving average, where there is one."""
        return self.model if self.average is None else self.average.module

    def step(self, rate: float) -> None:
        """One step down the gradients at this learning rate; clears them."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def state(self) -> dict[str, Tensor]:
        """Everything that training changes."""
        tensors = _prefixed("model.", self.model.state_dict())
        if self.average is not None:
            tensors |= _prefixed("average.", self.average.state_dict())
        for name, parameter in self.model.named_parameters():
            buffer = self.optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                tensors[f"momentum.{name}"] = buffer
        return tensors

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes over a state."""
        self.model.load_state_dict(checkpoint.part("model."))
        if self.average is not None:
            self.average.load_state_dict(checkpoint.part("average."))
        momentum = checkpoint.part("momentum.")
        for name, parameter in self.model.named_parameters():
            if name in momentum:
                buffer = torch.empty_like(parameter).copy_(momentum[name]).detach()
                self.optimizer.state[parameter]["momentum_buffer"] = buffer


@dataclass(frozen=True)
class Run:
    """Where and how a training runs; nothing in it changes the weights but the number of ranks.

    directory: of checkpoints, networks and history; made if it is missing.
    export: a backbone and its logit scale as what is saved; without it no file of them is written.
    validate: accuracies in per cent, by name, of what was exported; called by the leading rank
    after every `validate_every`-th epoch and the last one. validated_on: names of what it measures
    on, which a run keeps, as its best epoch is by their mean.
    on_epoch: called by the leading rank after each epoch's checkpoint is written.
    ahead: batches that are prepared in advance by a thread of their own.
    tensorboard: whether to log to `directory`/tensorboard, too.
    progress: whether to show a bar, where standard error is a terminal.
    """

    directory: Path
    ranks: Ranks = field(default_factory=Ranks)
    export: Callable[[Any, float], Exported] | None = None
    validate: Callable[[Any], dict[str, float]] | None = None
    validate_every: int = 1
    validated_on: tuple[str, ...] = ()
    on_epoch: Callable[[Epoch], None] | None = None
    ahead: int = 0
    tensorboard: bool = False
    progress: bool = True


def run_epochs(
    run: Run,
    learner: Learner,
    identity: Mapping[str, Any],
    epochs: int,
    steps: int,
    train: Callable[[int], Iterator[Step]],
) -> tuple[Epoch, ...]:
    """Trains, or continues from the run's checkpoint, until `epochs` are done.

    identity: what makes this run this run; a checkpoint of another is refused.
    steps: of an epoch. train: epoch (from 0) -> its steps.

    Writes, after every epoch, `last.safetensors` (what is exported), `best.safetensors` when
    validation was better than ever, the checkpoint, and `history.jsonl`. Leaves the learner's
    result in evaluation mode. Raises ValueError for a checkpoint of another run, OSError when
    something cannot be written (nothing that was is lost).
    """
    from tqdm import tqdm  # here: of the [train] extra; sharing out an evaluation needs none

    run.directory.mkdir(parents=True, exist_ok=True)
    identity = {
        **identity,
        "processes": run.ranks.size,
        "validated_on": run.validated_on,
    }
    history: list[Epoch] = []
    checkpoint = load_checkpoint(run.directory, identity)
    if checkpoint is not None:
        learner.restore(checkpoint)
        history = [Epoch(**record) for record in checkpoint.history]
        logger.info("continuing %s after epoch %d", run.directory, len(history))
    writer = _summary_writer(run, len(history))
    with tqdm(
        total=epochs * steps,
        initial=len(history) * steps,
        unit="step",
        disable=None if run.ranks.leads and run.progress else True,
    ) as bar:
        for epoch in range(len(history), epochs):
            bar.set_description(f"epoch {epoch + 1}/{epochs}")
            start = time.perf_counter()
            learner.model.train()
            loss = accuracy = 0.0
            for count, step in enumerate(train(epoch), start=1):
                loss += step.loss
                accuracy += step.accuracy
                bar.set_postfix(accuracy=f"{100 * accuracy / count:.1f} %", refresh=False)
                bar.update()
            loss, accuracy = run.ranks.total(loss, accuracy)
            record = Epoch(
                epoch=epoch + 1,
                size=step.size,
                learning_rate=step.learning_rate,
                loss=loss / (count * run.ranks.size),
                accuracy=100 * accuracy / (count * run.ranks.size),
                logit_scale=_model(learner.model).logit_scale.item(),
                seconds=time.perf_counter() - start,
            )
            if not run.ranks.leads:
                history.append(record)
                continue
            if run.export is not None:
                model = _model(learner.result)
                exported = run.export(model.backbone.eval(), model.logit_scale.item())
                due = (epoch + 1) % run.validate_every == 0 or epoch + 1 == epochs
                if run.validate is not None and due:
                    record = replace(record, validation=run.validate(exported))
                exported.save(run.directory / LAST)
                if record.score > max((earlier.score for earlier in history), default=-math.inf):
                    exported.save(run.directory / BEST)
            history.append(record)
            records = [asdict(record) for record in history]
            # After the networks: what is lost between the two happens again.
            save_checkpoint(run.directory, Checkpoint(identity, records, learner.state()))
            lines = "".join(json.dumps(record) + "\n" for record in records)
            write_atomically(run.directory / "history.jsonl", lines.encode())
            if writer is not None:
                _summarise(writer, record)
            if run.on_epoch is not None:
                run.on_epoch(record)
    learner.result.eval()
    return tuple(history)


def _model(module: nn.Module) -> Model:
    return module  # type: ignore[return-value]  # nn.Module hides what a model has


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _summary_writer(run: Run, epochs_done: int) -> Any:
    """TensorBoard's writer, where this rank is to have one."""
    if not (run.tensorboard and run.ranks.leads):
        return None
    from torch.utils.tensorboard import SummaryWriter

    # What a killed run logged after its last checkpoint happens again.
    directory = str(run.directory / "tensorboard")
    return SummaryWriter(directory, purge_step=epochs_done + 1)


def _summarise(writer: Any, record: Epoch) -> None:
    for name in ("loss", "accuracy", "learning_rate", "logit_scale", "seconds"):
        writer.add_scalar(f"train/{name}", getattr(record, name), record.epoch)
    for name, accuracy in record.validation.items():
        writer.add_scalar(f"validation/{name}", accuracy, record.epoch)
    writer.flush()
