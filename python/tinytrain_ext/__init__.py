"""TinyTrain on the device: few-shot adaptation of small convolutional networks (ICML 2024).

Public names are resolved when first used, so that importing the package is cheap: it loads
neither the native engine nor Pillow, and never PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Not lazily: `adapt` is a module and a function, and the first import of the module would
# otherwise put itself in the function's place.
from .adapt import adapt, classify

if TYPE_CHECKING:
    from .cost import profile
    from .errors import BudgetExceeded, ImageError, NonFiniteError
    from .fisher import fisher_information
    from .images import load_folder, load_image
    from .importers import import_int8
    from .network import Network, default_network
    from .selection import (
        Budget,
        LayerUpdate,
        UpdatePolicy,
        full_train,
        last_layer,
        select,
        sparse_update,
    )
    from .session import Session
    from .views import Views

__all__ = [
    "Budget",
    "BudgetExceeded",
    "ImageError",
    "LayerUpdate",
    "Network",
    "NonFiniteError",
    "Session",
    "UpdatePolicy",
    "Views",
    "adapt",
    "classify",
    "default_network",
    "fisher_information",
    "full_train",
    "import_int8",
    "last_layer",
    "load_folder",
    "load_image",
    "profile",
    "select",
    "sparse_update",
]

_HOME = {
    "Budget": "selection",
    "BudgetExceeded": "errors",
    "ImageError": "errors",
    "LayerUpdate": "selection",
    "Network": "network",
    "NonFiniteError": "errors",
    "Session": "session",
    "UpdatePolicy": "selection",
    "Views": "views",
    "default_network": "network",
    "fisher_information": "fisher",
    "full_train": "selection",
    "import_int8": "importers",
    "last_layer": "selection",
    "load_folder": "images",
    "load_image": "images",
    "profile": "cost",
    "select": "selection",
    "sparse_update": "selection",
}


def __getattr__(name: str) -> Any:
    if name == "nn":  # the only name that needs PyTorch
        return importlib.import_module(".nn", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
