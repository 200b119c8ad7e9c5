"""The convolutions that tests and benchmarks run: one table.

Every distinct layer shape of the paper's three networks, and awkward tails: odd maps, channel
counts that fill no vector, kernels larger than the map, no padding. TINYTRAIN_TEST_CASES=few leaves
one case of each kind (see few), for an emulated CPU.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

from tinytrain_ext.architectures import ARCHITECTURES
from tinytrain_ext.bench.jobs import LayerShape as ConvCase
from tinytrain_ext.bench.jobs import layer_shapes

__all__ = ["CASES", "NETWORK_CASES", "TAIL_CASES", "ConvCase", "few"]


def _network_cases() -> list[ConvCase]:
    return [case for name in ARCHITECTURES for case in layer_shapes(name)]


def _tail_cases() -> list[ConvCase]:
    """Kernel, stride, padding and map in every combination; channel counts taken in turn."""
    maps = ((5, 7), (3, 3), (13, 9))
    channels = (1, 3, 5, 9, 12, 17, 20, 24, 40)
    cases: list[ConvCase] = []
    turn = itertools.cycle(channels)
    depthwise = itertools.product((1, 3, 5, 7), (1, 2), (False, True), (*maps, (6, 12), (12, 24)))
    for kernel, stride, padded, (height, width) in depthwise:
        count = next(turn)
        padding = (kernel - 1) // 2 if padded else 0
        if min(height, width) + 2 * padding >= kernel:
            case = ConvCase(count, count, height, width, kernel, stride, padding, depthwise=True)
            cases.append(case)
    # Whole vectors of every instruction set on maps that are cut into several tiles.
    for kernel, stride in itertools.product((3, 5, 7), (1, 2)):
        case = ConvCase(16, 16, 12, 12, kernel, stride, (kernel - 1) // 2, depthwise=True)
        cases.append(case)
    pairs = itertools.cycle(zip(channels, (17, 40, 9, 12, 1, 24, 3, 20, 5), strict=True))
    dense = itertools.product((1, 2, 3, 5, 7), (1, 2), (False, True), maps)
    for kernel, stride, padded, (height, width) in dense:
        in_channels, out_channels = next(pairs)
        padding = (kernel - 1) // 2 if padded else 0
        if min(height, width) + 2 * padding >= kernel:
            cases.append(
                ConvCase(in_channels, out_channels, height, width, kernel, stride, padding)
            )
    for (in_channels, out_channels), (height, width) in itertools.product(
        zip(channels, channels[::-1], strict=True), (maps[0], maps[2])
    ):
        cases.append(ConvCase(in_channels, out_channels, height, width))
    # More pixels than one block of a weight gradient.
    cases.append(ConvCase(9, 20, 23, 29))
    cases.append(ConvCase(1, 1, 1, 1))
    return list(dict.fromkeys(cases))


def few(cases: Sequence[ConvCase]) -> list[ConvCase]:
    """The least work of each kind: every kernel, stride and padding that `cases` has, on maps that
    fill whole tiles of whole vectors and on maps that do not.
    """
    chosen: dict[tuple[object, ...], ConvCase] = {}
    for case in sorted(cases, key=lambda case: case.macs):
        whole = case.in_channels % 8 == case.out_channels % 8 == case.width % 4 == 0
        tiles = whole and case.width > 8  # more than one tile of a row
        key = (case.kind, case.kernel, case.stride, case.padding > 0, whole, tiles)
        chosen.setdefault(key, case)
    return [case for case in cases if case in chosen.values()]


NETWORK_CASES = tuple(dict.fromkeys(_network_cases()))
TAIL_CASES = tuple(case for case in _tail_cases() if case not in NETWORK_CASES)
match os.environ.get("TINYTRAIN_TEST_CASES", "all"):
    case "all":
        pass
    case "few":
        NETWORK_CASES, TAIL_CASES = tuple(few(NETWORK_CASES)), tuple(few(TAIL_CASES))
    case unknown:
        raise ValueError(f"TINYTRAIN_TEST_CASES: expected all or few, got {unknown!r}")
CASES = NETWORK_CASES + TAIL_CASES
