"""`tinytrain pre-train` and `tinytrain meta-train`: arguments, and runs by them.

Both are started as they are by torchrun, too:

    torchrun --nproc-per-node 2 -m tinytrain_ext meta-train ...

PyTorch is imported when a command runs, so that the rest of the command line works without it.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..architectures import ARCHITECTURES
from ..network import Network, check_writable, default_network, write_atomically
from .recipes import MetaRecipe, PretrainRecipe, Stage, make, preset, preset_names, read_toml

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .backbones import Backbone
    from .tinytl import TinyTL
    from .training import Epoch, Exported, Ranks, Run

__all__ = [
    "add_metatrain_arguments",
    "add_pretrain_arguments",
    "render",
    "run_metatrain",
    "run_pretrain",
]

Document = dict[str, Any]

WAYS, QUERIES, EPISODES = 5, 15, 400  # of a validation
VALIDATED_IMAGES = 40  # of each class of a further validation set

logger = logging.getLogger(__name__)


def add_pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tinytrain pre-train`."""
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="mcunet")
    parser.add_argument("--name", help="the network's name (default: the architecture's)")
    parser.add_argument("--input-size", type=int, default=128, help="of the network (default: 128)")
    parser.add_argument(
        "--resize", type=int, default=146, help="short side before the crop (default: 146)"
    )
    _add_common_arguments(parser, "pre-train", PretrainRecipe)


def add_metatrain_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `tinytrain meta-train`."""
    parser.add_argument(
        "--network",
        type=Path,
        metavar="PATH",
        help="what to begin with: a network file, or the folder of a pre-training run "
        "(default: the embedded network)",
    )
    parser.add_argument("--name", help="the network's name (default: as it was)")
    parser.add_argument(
        "--batch-norm",
        choices=("frozen", "trained"),
        default="frozen",
        help="frozen: folded into the convolutions, as on the device (default); trained: over the "
        "images of each episode, which needs a pre-training run to begin with",
    )
    parser.add_argument(
        "--tinytl",
        action="store_true",
        help="train TinyTL's modules beside the network, which stays as it is; --out then is what "
        "`evaluate --tinytl-modules` takes",
    )
    _add_common_arguments(parser, "meta-train", MetaRecipe)


def _add_common_arguments(
    parser: argparse.ArgumentParser,
    command: str,
    recipe: type[PretrainRecipe] | type[MetaRecipe],
) -> None:
    data = parser.add_argument_group("images")
    data.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="one folder of images a class"
    )
    data.add_argument(
        "--split",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON {class folder: "train", "val" or anything else}',
    )
    data.add_argument(
        "--validate-on",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="further folders of class folders; the best epoch is that of the best mean over these "
        "and the split's val classes",
    )
    data.add_argument(
        "--stored-size",
        type=int,
        default=146,
        metavar="PIXELS",
        help="side of the training images in the cache (default: 146)",
    )
    data.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="of decoded images (default: ~/.cache/tinytrain_ext)",
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--work",
        type=Path,
        required=True,
        metavar="DIR",
        help="for checkpoints and history; the same command goes on from what is there",
    )
    run.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="what is trained, to write"
    )
    run.add_argument("--validate-every", type=int, default=1, metavar="EPOCHS", help="default: 1")
    run.add_argument("--threads", type=int, default=1, metavar="N", help="of PyTorch (default: 1)")
    run.add_argument(
        "--ahead",
        type=int,
        default=2,
        metavar="N",
        help="batches that a thread of its own prepares in advance (default: 2)",
    )
    run.add_argument("--tensorboard", action="store_true", help="log to WORK/tensorboard, too")
    fields = parser.add_argument_group("recipe (what is not given comes from the preset)")
    names = ", ".join(preset_names(command))
    fields.add_argument("--preset", metavar="NAME", help=f"one of {names}")
    fields.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML of recipe fields, over the preset",
    )
    for field in dataclasses.fields(recipe):
        flag = f"--{field.name.replace('_', '-')}"
        if field.name == "stages":
            fields.add_argument(
                flag,
                type=_stage,
                nargs="+",
                metavar="SIZE:EPOCHS[:SMALLEST_CROP]",
                help="image size in pixels, for how many epochs, smallest crop as a share of the "
                "area; in order",
            )
            continue
        assert isinstance(field.default, int | float)
        fields.add_argument(
            flag,
            type=type(field.default),
            metavar=str(type(field.default).__name__).upper(),
            help=f"default: {field.default:g}",
        )


def _stage(text: str) -> Stage:
    try:
        size, epochs, *crop = text.split(":")
        return Stage(int(size), int(epochs), *map(float, crop))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"expected SIZE:EPOCHS[:SMALLEST_CROP], got {text!r}"
        ) from error


def run_pretrain(args: argparse.Namespace) -> Document | None:
    """`tinytrain pre-train`: a backbone from random weights; None on ranks that do not lead."""
    _check(args)
    recipe = _recipe(PretrainRecipe, "pre-train", args)
    with _ranks(args) as ranks:
        from .pretrain import pretrain

        name = args.name or args.architecture

        def export(backbone: Backbone, logit_scale: float) -> Network:
            return backbone.to_network(name, input_size=args.input_size, resize=args.resize)

        images, labels = _training_images(args, ranks)
        run = _run(args, ranks, args.resize, args.input_size, export)
        _, history = pretrain(ARCHITECTURES[args.architecture], images, labels, recipe, run)
        return _finished("pre-train", args, ranks, recipe, history)


def run_metatrain(args: argparse.Namespace) -> Document | None:
    """`tinytrain meta-train`: episodes from a network on; None on ranks that do not lead."""
    _check(args)
    recipe = _recipe(MetaRecipe, "meta-train", args)
    with _ranks(args) as ranks:
        from .metatrain import metatrain

        network, backbone = _beginning(args)
        if not (set(network.mean) == set(network.std) == {0.5}):
            raise ValueError(
                f"--network: expected mean and std of 0.5, got {network.mean} and {network.std}"
            )
        name = args.name or network.name

        def export(backbone: Backbone, logit_scale: float) -> Network:
            return backbone.to_network(
                name,
                input_size=network.input_size,
                resize=network.resize,
                logit_scale=logit_scale,
            )

        model = _beside(network, recipe, args, ranks) if args.tinytl else backbone
        images, labels = _training_images(args, ranks)
        exported = (lambda model, scale: model) if args.tinytl else export
        run = _run(args, ranks, network.resize, network.input_size, exported)
        assert run.validate is not None  # narrows it for the type checker
        before = run.validate(network) if ranks.leads else {}
        _, history = metatrain(model, network.logit_scale, images, labels, recipe, run)
        document = _finished("meta-train", args, ranks, recipe, history)
        return None if document is None else {**document, "validation_before": before}


def _check(args: argparse.Namespace) -> None:
    """Finds before any work what would fail after it."""
    for name, least in (("threads", 1), ("validate_every", 1), ("ahead", 0), ("stored_size", 1)):
        value = getattr(args, name)
        if value < least:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag}: expected a whole number from {least}, got {value}")
    for path in (args.work, args.out.parent):
        path.mkdir(parents=True, exist_ok=True)
    check_writable(args.out)


def render(document: Document) -> str:
    """A finished training, for people."""
    best = document["history"][document["best_epoch"] - 1]["validation"]
    before = document.get("validation_before", {})
    lines = [
        f"{document['command']}: {len(document['history'])} epochs, the best one was "
        f"{document['best_epoch']}",
        *(
            f"  {name}: {value:.1f} %" + (f", before {before[name]:.1f} %" if before else "")
            for name, value in best.items()
        ),
        f"written: {document['out']}",
    ]
    return "\n".join(lines)


class Alone(NamedTuple):
    """What `Ranks` is, in a run of one process without PyTorch."""

    rank: int = 0
    size: int = 1

    def gather(self, value: list[Any]) -> list[Any]:
        """The list itself: there are no others."""
        return value


@contextmanager
def processes() -> Iterator[Ranks | Alone]:
    """The processes that torchrun started, for commands which need PyTorch for nothing else."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Alone()
        return
    from .training import process_group

    # They meet once, at the end, and may have taken up rows of different numbers.
    with process_group(timedelta(days=7)) as ranks:
        yield ranks


@contextmanager
def _ranks(args: argparse.Namespace) -> Iterator[Ranks]:
    """The process group, once PyTorch is there and set up."""
    try:
        import torch
        import tqdm  # noqa: F401

        if args.tensorboard:
            import tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed; training needs it: pip install 'tinytrain_ext[train]'"
        ) from error
    from .training import process_group

    torch.set_num_threads(args.threads)
    with process_group() as ranks:
        yield ranks


def _recipe(
    kind: type[PretrainRecipe] | type[MetaRecipe], command: str, args: argparse.Namespace
) -> Any:
    """Preset, then the TOML file over it, then the flags."""
    fields: Document = preset(command, args.preset) if args.preset else {}
    make(kind, fields)
    if args.config is not None:
        given = read_toml(args.config)
        try:
            make(kind, given)
        except ValueError as error:
            raise ValueError(f"{args.config}: {error}") from error
        fields |= given
    names = [field.name for field in dataclasses.fields(kind)]
    fields |= {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    return make(kind, fields)


def _beginning(args: argparse.Namespace) -> tuple[Network, Backbone]:
    """What meta-training begins with, as a network and as what is to be trained."""
    from .backbones import Backbone
    from .pretrain import pretrained

    if args.network is not None and args.network.is_dir():
        network = Network.load(args.network / "last.safetensors")
        if args.batch_norm == "trained":
            return network, pretrained(args.network)
    elif args.batch_norm == "trained":
        raise ValueError(
            "--batch-norm trained: expected --network to be the folder of a pre-training run, "
            f"got {args.network or 'the embedded network'}, whose batch norms are folded"
        )
    else:
        network = default_network() if args.network is None else Network.load(args.network)
    return network, Backbone.from_network(network)


def _beside(network: Network, recipe: MetaRecipe, args: argparse.Namespace, ranks: Ranks) -> TinyTL:
    """TinyTL's modules beside a network, to be meta-trained."""
    from .tinytl import TinyTL

    if args.name is not None:
        raise ValueError(f"--name: with --tinytl there is no network to name, got {args.name!r}")
    if args.batch_norm == "trained":
        raise ValueError("--tinytl: the network stays as it is, expected --batch-norm frozen")
    if recipe.size != network.input_size:
        raise ValueError(
            f"--size: with --tinytl expected the network's {network.input_size}, got {recipe.size}"
        )
    if ranks.device.type != "cpu":
        raise ValueError("--tinytl: its frozen layers run on CPUs; hide GPUs from PyTorch")
    return TinyTL(network, seed=recipe.seed)


def _training_images(
    args: argparse.Namespace, ranks: Ranks
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from ..datasets import cached_images, list_images, read_split

    paths, labels = list_images(args.data, read_split(args.split, "train"))
    with ranks.first():
        size = args.stored_size
        return cached_images(paths, size, size, args.cache, args.progress.phase("decoding")), labels


def _run(
    args: argparse.Namespace,
    ranks: Ranks,
    resize: int,
    input_size: int,
    export: Callable[[Any, float], Exported],
) -> Run:
    from ..datasets import cached_images, list_images, read_split
    from .backbones import embed
    from .evaluate_backbone import episode_accuracy
    from .training import Run

    names = ("val", *(directory.name for directory in args.validate_on))
    if len(set(names)) < len(names):
        raise ValueError(f"--validate-on: expected folders of other names, got {', '.join(names)}")

    def decoded(paths: list[Path]) -> NDArray[np.uint8]:
        return cached_images(paths, resize, input_size, args.cache, args.progress.phase("decoding"))

    sets: dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]] = {}
    if ranks.leads:
        paths, labels = list_images(args.data, read_split(args.split, "val"))
        sets["val"] = (decoded(paths), labels)
        for directory in args.validate_on:
            paths, labels = _some_images(directory)
            sets[directory.name] = (decoded(paths), labels)

    def validate(model: Network | TinyTL) -> dict[str, float]:
        accuracies = {}
        for name, (images, labels) in sets.items():
            if isinstance(model, Network):
                features = embed(model, images)
            else:
                features = model.embed(images, args.threads)
            for shots in (5, 1):
                accuracies[f"{name} {shots}-shot"] = episode_accuracy(
                    features,
                    labels,
                    ways=WAYS,
                    shots=shots,
                    queries=QUERIES,
                    episodes=EPISODES,
                    rng=np.random.default_rng(0),
                ).mean
        return accuracies

    def log(epoch: Epoch) -> None:
        logger.info("%s", dataclasses.asdict(epoch))

    return Run(
        directory=args.work,
        ranks=ranks,
        export=export,
        validate=validate,
        validate_every=args.validate_every,
        validated_on=names,
        on_epoch=log,
        ahead=args.ahead,
        tensorboard=args.tensorboard,
        progress=not args.quiet,
    )


def _some_images(directory: Path) -> tuple[list[Path], NDArray[np.int64]]:
    """Some images of each class folder that has enough for an episode."""
    from ..datasets import list_images

    classes = sorted(path.name for path in directory.iterdir() if path.is_dir())
    paths, labels = list_images(directory, classes)
    rng = np.random.default_rng(0)
    chosen = [
        rng.permutation(members)[:VALIDATED_IMAGES]
        for members in (np.flatnonzero(labels == label) for label in range(len(classes)))
        if len(members) >= 5 + QUERIES
    ]
    if len(chosen) < WAYS:
        raise ValueError(
            f"{directory}: expected at least {WAYS} classes of {5 + QUERIES} images, "
            f"got {len(chosen)}"
        )
    order = np.concatenate(chosen)
    return [paths[index] for index in order], labels[order]


def _finished(
    command: str,
    args: argparse.Namespace,
    ranks: Ranks,
    recipe: PretrainRecipe | MetaRecipe,
    history: Sequence[Epoch],
) -> Document | None:
    if not ranks.leads:
        return None
    write_atomically(args.out, (args.work / "best.safetensors").read_bytes())
    return {
        "command": command,
        "recipe": dataclasses.asdict(recipe),
        "processes": ranks.size,
        "best_epoch": max(history, key=lambda record: record.score).epoch,
        "history": [dataclasses.asdict(record) for record in history],
        "out": str(args.out),
    }
