"""Networks of other families than the paper's, small and of odd sizes, for tests of the engine."""

import numpy as np

from tinytrain_ext.architectures import random_weights
from tinytrain_ext.network import Network, Operation, tensor_shapes

__all__ = ["FAMILIES", "random_graph", "with_random_biases"]


def _conv(source, c_in, c_out, kernel=1, stride=1, padding=None, groups=1, activation="none"):
    padding = (kernel - 1) // 2 if padding is None else padding
    return Operation("conv", (source,), activation, c_in, c_out, kernel, stride, padding, groups)


def _add(first, second, activation="none"):
    return Operation("add", (first, second), activation)


def _pool(kind, source, kernel, stride, padding=0):
    return Operation(kind, (source,), kernel=kernel, stride=stride, padding=padding)


def with_random_biases(network: Network, seed: int = 0) -> Network:
    rng = np.random.default_rng(seed)
    biases = [rng.normal(0, 0.3, len(b)).astype(np.float32) for b in network.biases]
    return network.replace(biases=tuple(biases))


def network_of(name: str, operations: list[Operation], size: int, seed: int = 0) -> Network:
    graph = (*operations, Operation("global_average_pool", (len(operations),)))
    weights = random_weights(graph, np.random.default_rng(seed))
    biases = tuple(np.zeros(len(w), np.float32) for w in weights)
    network = Network(name, graph, weights, biases, input_size=size, resize=size)
    return with_random_biases(network, seed)


def _resnet() -> Network:
    """Dense 3 x 3 convolutions, ReLU behind the adds, a strided 1 x 1 shortcut, a max pool."""
    return network_of(
        "resnet",
        [
            _conv(0, 3, 10, 7, 2, activation="relu"),
            _pool("max_pool", 1, 3, 2, 1),
            _conv(2, 10, 10, 3, activation="relu"),
            _conv(3, 10, 10, 3),
            _add(4, 2, "relu"),
            _conv(5, 10, 18, 3, 2, activation="relu"),
            _conv(6, 18, 18, 3),
            _conv(5, 10, 18, 1, 2),
            _add(7, 8, "relu"),
            _conv(9, 18, 18, 3, activation="relu"),
            _conv(10, 18, 18, 3),
            _add(11, 9, "relu"),
        ],
        size=33,
    )


def _mobilenet_v1() -> Network:
    """Separable convolutions with ReLU, no residual."""
    operations = [_conv(0, 3, 9, 3, 2, activation="relu")]
    channels = 9
    for out, stride in ((12, 1), (24, 2), (24, 1), (40, 2)):
        at = len(operations)
        operations.append(
            _conv(at, channels, channels, 3, stride, groups=channels, activation="relu")
        )
        operations.append(_conv(at + 1, channels, out, activation="relu"))
        channels = out
    return network_of("mobilenet-v1", operations, size=31)


def _pooled() -> Network:
    """Max and average pools, overlapping and padded; an even kernel; no padding in places."""
    return network_of(
        "pooled",
        [
            _conv(0, 3, 8, 5, 1, 0, activation="relu6"),
            _pool("average_pool", 1, 3, 2, 1),
            _conv(2, 8, 12, 2, 1, 0, activation="relu"),
            _pool("max_pool", 3, 2, 2),
            _conv(4, 12, 12, 3, groups=12),
            _pool("average_pool", 5, 2, 1),
            _conv(6, 12, 20, activation="relu6"),
            _pool("max_pool", 7, 3, 1, 1),
        ],
        size=29,
    )


def _branches() -> Network:
    """One tensor read three times, adds of adds, a linear network's end."""
    return network_of(
        "branches",
        [
            _conv(0, 3, 8, activation="relu"),
            _conv(1, 8, 8, 3, activation="relu6"),
            _conv(1, 8, 8, 3, groups=8),
            _add(2, 3),
            _add(4, 1, "relu6"),
            _pool("average_pool", 5, 3, 1, 1),
            _add(6, 5),
            _conv(7, 8, 16, 3, 2),
        ],
        size=11,
    )


FAMILIES = {n.name: n for n in (_resnet(), _mobilenet_v1(), _pooled(), _branches())}


def random_graph(seed: int) -> Network:
    """A graph drawn at random: any operations that fit, each tensor read at least once."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(7, 20))
    first = int(rng.integers(1, 12))
    stem = _conv(0, 3, first, int(rng.integers(1, 5)), int(rng.integers(1, 3)), activation="relu")
    operations = [stem]

    def shapes():
        return tensor_shapes(
            (*operations, Operation("global_average_pool", (len(operations),))), size
        )

    # Each new operation reads the newest tensor, so that none is left over; an add one more.
    for _ in range(int(rng.integers(2, 12))):
        newest, known = len(operations), shapes()[:-1]
        height, _, channels = known[newest]
        activation = str(rng.choice(["none", "relu", "relu6"]))
        twins = [t for t in range(1, newest) if known[t] == known[newest]]
        kind = str(rng.choice(["pointwise", "depthwise", "dense", "add", "pool"]))
        kernel = int(rng.integers(1, min(height, 5) + 1))
        stride = int(rng.integers(1, 3))
        padding = int(rng.integers(0, (kernel - 1) // 2 + 1))
        if kind == "add" and twins:
            operations.append(_add(newest, int(rng.choice(twins)), activation))
        elif kind == "pool":
            pool = str(rng.choice(["max_pool", "average_pool"]))
            operations.append(_pool(pool, newest, kernel, stride, padding))
        elif kind == "depthwise":
            same = _conv(newest, channels, channels, kernel, stride, padding, channels, activation)
            operations.append(same)
        elif kind == "dense":
            out = int(rng.integers(1, 20))
            operations.append(_conv(newest, channels, out, kernel, stride, padding, 1, activation))
        else:
            out = channels if rng.random() < 0.6 else int(rng.integers(1, 20))
            operations.append(_conv(newest, channels, out, activation=activation))
    return network_of(f"random {seed}", operations, size, seed)
