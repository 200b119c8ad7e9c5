"""TinyTrain on the device: few-shot adaptation of small convolutional networks within a memory and
compute budget (ICML 2024).

Public names are resolved when first used, so that importing the package costs little and never
imports PyTorch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Network": "network",
    "default_network": "network",
    "import_int8": "importers",
    "load_folder": "images",
    "load_image": "images",
    "Budget": "selection",
    "LayerUpdate": "selection",
    "UpdatePolicy": "selection",
    "select": "selection",
    "full_train": "selection",
    "last_layer": "selection",
    "sparse_update": "selection",
    "profile": "cost",
    "fisher_information": "fisher",
    "adapt": "adapt",
    "classify": "adapt",
    "Session": "session",
    "BudgetExceeded": "errors",
    "NonFiniteError": "errors",
    "ImageError": "errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
