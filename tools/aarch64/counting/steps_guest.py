"""Whole training steps of one network, ours and torch's: regions for count.sh.

Arguments: folder, network, --ours to leave torch out. One image a batch; counts are per image then,
and exact. torch as its users have it, with BatchNorm in eval mode ("eager"), and at its best,
folded into the weights with channels_last memory ("best"). The Fisher pass: gradients of the last
six blocks and, of each layer there, the squared sums of activation x gradient (Eq. 2 of the paper),
by hooks in torch.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from regions import Regions

import tinytrain_ext as tt
from tinytrain_ext.bench.jobs import OurJob, Task, tt_policy, zoo_network
from tinytrain_ext.cost import inspected_layers


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    network = zoo_network(name)
    task = Task(network, 1)
    layers = tt_policy(name, network)
    full = tt.UpdatePolicy(tt.full_train(network).layers)
    inspected = inspected_layers(network)
    whole = tt.UpdatePolicy({layer: full.layers[layer] for layer in inspected})
    regions = Regions()

    def count(row: str, implementation: str, call: Callable[[], object]) -> None:
        for _ in range(2):
            call()
        with regions.region(network=name, row=row, implementation=implementation):
            call()

    job = OurJob(network, layers, task)
    count("forward", "ours", job.forward)
    count("TT step", "ours", job.step)
    count("iteration", "ours", job.iteration)
    kept = OurJob(network, layers, task, keep_images=1)
    kept.session.set_prototypes(task.images, task.labels, task.ways, keep=True)
    count("iteration, prefix kept", "ours", kept.kept_iteration)
    count("prototypes, prefix kept", "ours", kept.session.update_prototypes)
    count(
        "prototypes",
        "ours",
        lambda: job.session.set_prototypes(task.images, task.labels, task.ways),
    )
    count("update", "ours", lambda: job.session.step(1e-6))
    adam = tt.Session(network, layers, optimizer="adam", max_ways=5)
    adam.set_prototypes(task.support, np.arange(5), 5)
    adam.proto_backward(task.images, task.labels)
    count("update, Adam", "ours", lambda: adam.step(1e-6))
    count("FullTrain step", "ours", OurJob(network, full, task).step)
    count("Fisher pass", "ours", OurJob(network, whole, task, fisher_layers=inspected).gradients)
    if "--ours" not in sys.argv:
        from torch_steps import TorchFisher, TorchJob, torch_iteration  # torch takes long to import

        for best in (False, True):
            column = "torch, best" if best else "torch, eager"
            theirs = TorchJob(network, set(layers.layers), task, best)
            count("forward", column, theirs.forward)
            count("TT step", column, theirs.step)
            count("iteration", column, partial(torch_iteration, theirs))
            count("FullTrain step", column, TorchJob(network, set(full.layers), task, best).step)
            count("Fisher pass", column, TorchFisher(network, inspected, task, best).gradients)
    regions.write(folder / "regions.json")


main()
