"""The paper's job on one network, part by part: regions for count.sh.

Arguments: folder, network, and "views" for a fixed set of views instead of fresh ones.

25 photos (JPEG, 640 x 640, drawn by the demo's generator) of five classes, `adapt` as it comes:
Fisher pass, selection for 1 MiB and 15 % of the compute, Adam, prototypes every iteration. Three
iterations are run; the reader takes their mean 40 times. Of a fixed set, an iteration on a view
that is new is counted apart, and three on one that is known. A session's passes over images, which
threads share, are counted apart from what surrounds them.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regions import Regions

ITERATIONS = 3
regions = Regions()
folder, NETWORK = Path(sys.argv[1]), sys.argv[2]
NEW_VIEWS = int(sys.argv[3:] == ["views"])

with regions.region(network=NETWORK, part="import"):
    import numpy as np
    from PIL import Image

    import tinytrain_ext as tt
    import tinytrain_ext.session

from tinytrain_ext.architectures import ARCHITECTURES, random_network  # noqa: E402
from tinytrain_ext.demo import CLASSES, draw  # noqa: E402
from tinytrain_ext.images import load_folder  # noqa: E402
from tinytrain_ext.views import PseudoQueries, Views  # noqa: E402

photos = folder / "photos"
for label in range(5):
    (photos / CLASSES[label]).mkdir(parents=True, exist_ok=True)
    for index in range(5):
        picture = draw(CLASSES[label], 640, np.random.default_rng((label, index)))
        Image.fromarray(picture).save(photos / CLASSES[label] / f"{index}.jpg", quality=90)
saved = folder / "network.safetensors"
drawn = random_network(
    ARCHITECTURES[NETWORK], np.random.default_rng(0), feature_mix=NETWORK != "mcunet"
)
drawn.save(saved)

with regions.region(network=NETWORK, part="load network"):
    network = tt.Network.load(saved)
with regions.region(network=NETWORK, part="load photos"):
    task = load_folder(photos)


class Part:
    """The part of the job that is being counted."""

    name = ""

    def switch(self, name: str) -> None:
        """Another one from here on."""
        if self.name:
            regions.stop()
        self.name = name
        regions.start(network=NETWORK, part=name)


part = Part()


def progress(phase: str, done: int, total: int) -> None:
    if phase == "fisher":
        part.switch("Fisher pass" if done == 0 else "selection, set-up, end")
    elif done == total:
        part.switch("selection, set-up, end")


def of_iteration(view: Callable[..., Any]) -> Callable[..., Any]:
    """The first thing that an iteration does."""

    @functools.wraps(view)
    def called(queries: PseudoQueries, iteration: int) -> Any:
        part.switch("iterations, new views" if iteration < NEW_VIEWS else "iterations")
        return view(queries, iteration)

    return called


def shared(call: Callable[..., Any]) -> Callable[..., Any]:
    """A pass over images."""

    @functools.wraps(call)
    def called(*arguments: Any, **options: Any) -> Any:
        before = part.name
        part.switch(before + ", shared")
        try:
            return call(*arguments, **options)
        finally:
            part.switch(before)

    return called


Session = tinytrain_ext.session.Session
PASSES = (
    "set_prototypes",
    "update_prototypes",
    "kept_features",
    "embed",
    "prefix",
    "proto_backward",
)
for method in PASSES:
    setattr(Session, method, shared(getattr(Session, method)))
PseudoQueries.view = of_iteration(PseudoQueries.view)  # type: ignore[method-assign]
part.switch("selection, set-up, end")
tt.adapt(
    network,
    task.images,
    task.labels,
    iterations=NEW_VIEWS + ITERATIONS,
    views=Views(NEW_VIEWS) if NEW_VIEWS else None,
    progress=progress,
)
regions.stop()
regions.write(folder / "regions.json")
