"""The tolerance rule: our error against a float64 reference is at most twice a naive one's."""

import numpy as np
from numpy.typing import NDArray

_EPSILON = float(np.finfo(np.float32).eps)
_FLOOR = 1  # roundings of the largest sum of magnitudes, for results of a few terms


def assert_as_good_as_naive(
    found: NDArray[np.float32],
    reference: NDArray[np.float64],
    naive: NDArray[np.float32],
    magnitude: float,
    what: str,
) -> None:
    """found: ours, float32. naive: the same by plain float32 arithmetic.

    magnitude: the largest sum of the absolute values of a result's terms.
    """
    assert found.shape == reference.shape, f"{what}: shape {found.shape} for {reference.shape}"
    assert np.isfinite(found).all(), f"{what}: not finite"
    if found.size == 0:
        return
    error = np.abs(found - reference).max()
    allowed = 2 * np.abs(naive - reference).max() + _FLOOR * _EPSILON * magnitude
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
