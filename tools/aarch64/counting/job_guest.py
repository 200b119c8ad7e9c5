"""The paper's job on one network, part by part: regions for count.sh. Arguments: folder, network.

25 photos (JPEG, 640 x 640, drawn by the demo's generator) of five classes, `adapt` as it comes:
Fisher pass, selection for 1 MiB and 15 % of the compute, Adam, prototypes every iteration. Three
iterations are run; they are alike, and the reader takes the last one 40 times.
"""

import sys
from pathlib import Path

from regions import Regions

ITERATIONS = 3
regions = Regions()
folder, name = Path(sys.argv[1]), sys.argv[2]

with regions.region(network=name, part="import"):
    import numpy as np
    from PIL import Image

    import tinytrain_ext as tt
    import tinytrain_ext.session

from tinytrain_ext.architectures import ARCHITECTURES, random_network  # noqa: E402
from tinytrain_ext.demo import CLASSES, draw  # noqa: E402
from tinytrain_ext.images import load_folder  # noqa: E402

photos = folder / "photos"
for label in range(5):
    (photos / CLASSES[label]).mkdir(parents=True, exist_ok=True)
    for index in range(5):
        picture = draw(CLASSES[label], 640, np.random.default_rng((label, index)))
        Image.fromarray(picture).save(photos / CLASSES[label] / f"{index}.jpg", quality=90)
saved = folder / "network.safetensors"
random_network(ARCHITECTURES[name], np.random.default_rng(0), feature_mix=name != "mcunet").save(
    saved
)

with regions.region(network=name, part="load network"):
    network = tt.Network.load(saved)
with regions.region(network=name, part="load photos"):
    task = load_folder(photos)


def progress(phase: str, done: int, total: int) -> None:
    regions.stop()
    regions.start(network=name, part=f"after {phase} {done}")


regions.start(network=name, part="begin")
result = tt.adapt(network, task.images, task.labels, iterations=ITERATIONS, progress=progress)
regions.stop()
regions.write(folder / "regions.json")
