"""Exceptions the package raises beside Python's own."""

from __future__ import annotations


class BudgetExceeded(ValueError):
    """No plan or policy fits the budget.

    `needed_bytes` is the smallest memory budget, in bytes, that would do with everything else
    unchanged, and `needed_compute` the smallest compute share; each is None where that side of the
    budget is not the obstacle.
    """

    def __init__(
        self,
        message: str,
        needed_bytes: int | None = None,
        needed_compute: float | None = None,
    ) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.needed_compute = needed_compute


class NonFiniteError(ArithmeticError):
    """A loss, gradient or updated weight is not finite; the step that met it changed nothing."""


class ImageError(ValueError):
    """A file is no image this package reads, or is damaged; the message begins with its name."""
