"""A PyTorch model as a list of steps: what `convert` and `import_torch` have in common.

torch.fx traces the model; each call becomes a step over numbered tensors (0 is the model's input,
i + 1 the output of step i), and the batch norm and activation behind a convolution are found.
What is no known operation is a step of kind "other": a model may hold anything, as long as only
known operations are asked for.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from .layers import BitReLU, FoldedBatchNorm2d, SparseConv2d, activation_of

__all__ = ["Step", "read", "refuse"]

# Regularisers of torchvision and timm that do nothing in eval mode.
_IDENTITY_NAMES = {"DropPath", "StochasticDepth", "DropBlock2d"}
_IDENTITY_MODULES = (nn.Identity, nn.modules.dropout._DropoutNd)
_IDENTITY_CALLS = {F.dropout, F.dropout2d, F.alpha_dropout, torch.dropout}
_METADATA = {"size", "dim", "ndimension", "numel"}
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_FLATTENING = {torch.flatten, torch.squeeze, torch.reshape}
_FLATTENING |= {"flatten", "squeeze", "view", "reshape"}  # type: ignore[arg-type]
_RECTIFIERS: dict[object, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    F.relu6: "relu6",
}
# Kind, and the arguments behind the tensor with their defaults.
_WINDOW: dict[str, Any] = {"kernel_size": None, "stride": None, "padding": 0}
_MAX_POOL = _WINDOW | {"dilation": 1, "ceil_mode": False, "return_indices": False}
_AVERAGE_POOL = _WINDOW | {
    "ceil_mode": False,
    "count_include_pad": True,
    "divisor_override": None,
}
_POOLS: dict[object, tuple[str, dict[str, Any]]] = {
    F.max_pool2d: ("max_pool", _MAX_POOL),
    F.avg_pool2d: ("average_pool", _AVERAGE_POOL),
}


@dataclass
class Step:
    """One call of the traced model.

    kind: "conv", "norm", "activation", "add", "max_pool", "average_pool", "global_average_pool",
    "half_average" (over one of height and width), "flatten", "linear" or "other".
    node, target: fx's name of the call, and the module's name in the model ("" for a function).
    inputs: tensors read. options: of pools and activations. inplace: writes to its first input.
    norm, activation: of "conv" and "add": the steps behind it that can be folded into it.
    """

    kind: str
    node: str
    inputs: tuple[int, ...]
    module: nn.Module | None = None
    target: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    inplace: bool = False
    norm: Step | None = None
    activation: Step | None = None


def refuse(step: Step, reason: str) -> ValueError:
    """The error for a step that cannot be expressed, naming it."""
    where = f"{step.node} ({step.target})" if step.target else step.node
    return ValueError(f"{where}: {reason}")


def read(model: nn.Module) -> tuple[list[Step], int]:
    """The steps of `model` in order of execution in eval mode, and the number of its result.

    Raises ValueError when torch.fx cannot trace it, or its result is not one tensor.
    """
    training = {name: module.training for name, module in model.named_modules()}
    try:
        traced = _Tracer().trace(model.eval())
    except (fx.proxy.TraceError, TypeError, RuntimeError, AttributeError, NameError) as error:
        name = type(model).__name__
        raise ValueError(f"model: torch.fx cannot trace {name}: {error}") from error
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
    reader = _Reader(dict(model.named_modules()))
    for node in traced.nodes:
        reader.visit(node)
    if reader.result is None:
        raise ValueError("model: expected one tensor as its result")
    _fold(reader.steps, reader.result)
    return reader.steps, reader.result


class _Tracer(fx.Tracer):
    """Sees whole every module that has a meaning here, subclasses of torch's own, too."""

    _WHOLE = (
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.Linear,
        nn.ReLU,
        nn.ReLU6,
        nn.Hardtanh,
        SparseConv2d,
        BitReLU,
        FoldedBatchNorm2d,
    )

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, self._WHOLE) or type(m).__name__ in _IDENTITY_NAMES
        return known or super().is_leaf_module(m, module_qualified_name)


class _Reader:
    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.steps: list[Step] = []
        self.result: int | None = None
        self.tensors: dict[fx.Node, int] = {}

    def visit(self, node: fx.Node) -> None:
        match node.op:
            case "placeholder":
                if not self.tensors:
                    self.tensors[node] = 0
                else:
                    self._add("other", node, ())
            case "output":
                (value,) = node.args
                if isinstance(value, fx.Node):
                    self.result = self.tensors.get(value)
            case "call_module":
                self._module(node, self.modules[str(node.target)])
            case "call_function" | "call_method":
                self._call(node)
            case _:
                self._add("other", node, ())

    def _add(self, kind: str, node: fx.Node, inputs: tuple[int, ...], **values: Any) -> None:
        self.steps.append(Step(kind, node.name, inputs, **values))
        self.tensors[node] = len(self.steps)

    def _inputs(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.tensors[n] for n in node.all_input_nodes if n in self.tensors)

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        inputs = self._inputs(node)
        if len(inputs) != 1:
            self._add("other", node, inputs, module=module, target=str(node.target))
            return
        name = type(module).__name__
        if isinstance(module, _IDENTITY_MODULES) or name in _IDENTITY_NAMES:
            self.tensors[node] = inputs[0]
            return
        options: dict[str, Any] = {}
        kind = "other"
        match module:
            case nn.Conv2d() | SparseConv2d():
                kind = "conv"
            case FoldedBatchNorm2d():
                self.tensors[node] = inputs[0]
                return
            case nn.BatchNorm2d():
                kind = "norm"
            case nn.Linear():
                kind = "linear"
            case nn.MaxPool2d() if not module.return_indices:
                kind = "max_pool"
                options = _pool_options(module)
            case nn.AvgPool2d():
                kind = "average_pool"
                options = _pool_options(module)
            case nn.AdaptiveAvgPool2d() if module.output_size in (1, (1, 1)):
                kind = "global_average_pool"
            case nn.Flatten() if module.start_dim == 1:
                kind = "flatten"
            case _ if activation_of(module) in ("relu", "relu6"):
                kind = "activation"
                options = {"activation": activation_of(module)}
        self._add(
            kind,
            node,
            inputs,
            module=module,
            target=str(node.target),
            options=options,
            inplace=bool(getattr(module, "inplace", False)),
        )

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        inputs = self._inputs(node)
        args, kwargs = node.args, node.kwargs
        name = str(target if isinstance(target, str) else getattr(target, "__name__", ""))
        if name in _METADATA or target in (getattr, torch._assert) or not inputs:
            return  # sizes and checks, no tensors
        if target in _IDENTITY_CALLS or name in ("contiguous", "stochastic_depth"):
            self.tensors[node] = inputs[0]
        elif target in _ADDITIONS:
            both = [self.tensors[a] for a in args if isinstance(a, fx.Node) and a in self.tensors]
            plain = len(both) == 2 and len(args) == 2 and kwargs.get("alpha", 1) == 1
            inplace = target in (operator.iadd, "add_")
            kind = "add" if plain and set(kwargs) <= {"alpha"} else "other"
            sources = tuple(both) if plain else inputs
            self._add(kind, node, sources, inplace=inplace, options={"name": name})
        elif target in _RECTIFIERS:
            inplace = name.endswith("_") or bool(kwargs.get("inplace") or args[1:2] == (True,))
            options = {"activation": _RECTIFIERS[target]}
            self._add("activation", node, inputs, options=options, inplace=inplace)
        elif target is F.hardtanh:
            bounds = tuple(_bound(node, ("min_val", "max_val"), (-1.0, 1.0)))
            kind = "activation" if bounds == (0, 6) else "other"
            self._add(kind, node, inputs, options={"activation": "relu6", "name": name})
        elif target in _POOLS:
            kind, defaults = _POOLS[target]
            values = _bound(node, tuple(defaults), tuple(defaults.values()))
            pool = dict(zip(defaults, values, strict=True))
            pool["stride"] = pool["stride"] or pool["kernel_size"]
            kind = "other" if pool.pop("return_indices", False) else kind
            self._add(kind, node, inputs, options=pool)
        elif target is F.adaptive_avg_pool2d:
            (size,) = _bound(node, ("output_size",), (None,))
            whole = size in (1, (1, 1), [1, 1])
            kind = "global_average_pool" if whole else "other"
            self._add(kind, node, inputs, options={"name": name})
        elif target is torch.mean or target == "mean":
            (dims,) = _bound(node, ("dim",), (None,))
            self._add(_average(dims), node, inputs, options={"dim": dims, "name": name})
        elif target in _FLATTENING:
            self._add("flatten", node, inputs)
        else:
            self._add("other", node, inputs, options={"name": name})


def _bound(node: fx.Node, names: tuple[str, ...], defaults: tuple[Any, ...]) -> list[Any]:
    """Arguments of a call behind its tensor, by name."""
    return [
        node.args[index + 1] if len(node.args) > index + 1 else node.kwargs.get(name, default)
        for index, (name, default) in enumerate(zip(names, defaults, strict=True))
    ]


def _average(dims: Any) -> str:
    """The kind of a mean over `dims` of (N, C, H, W), or of a half average (N, C, H)."""
    if isinstance(dims, int):
        return "half_average" if dims in (2, 3, -1, -2) else "other"
    if not isinstance(dims, list | tuple):
        return "other"
    return "global_average_pool" if {d % 4 for d in dims} == {2, 3} else "other"


def _pool_options(pool: nn.MaxPool2d | nn.AvgPool2d) -> dict[str, Any]:
    return {
        name: getattr(pool, name)
        for name in {**_MAX_POOL, **_AVERAGE_POOL}
        if hasattr(pool, name) and name != "return_indices"
    }


def _fold(steps: list[Step], result: int) -> None:
    """Finds the batch norm and the activation that can be folded into each convolution and add."""
    readers: dict[int, list[int]] = {}
    for index, step in enumerate(steps):
        for tensor in step.inputs:
            readers.setdefault(tensor, []).append(index)
    calls: dict[int, int] = {}
    for step in steps:
        if step.module is not None:
            calls[id(step.module)] = calls.get(id(step.module), 0) + 1

    def sole_reader(tensor: int, kind: str) -> int | None:
        """The step of that kind which alone reads `tensor`."""
        if tensor == result or len(readers.get(tensor, ())) != 1:
            return None
        (index,) = readers[tensor]
        return index if steps[index].kind == kind else None

    for index, step in enumerate(steps):
        if step.kind not in ("conv", "add"):
            continue
        tensor = index + 1
        once = step.module is None or calls[id(step.module)] == 1
        if step.kind == "conv" and once:
            norm = sole_reader(tensor, "norm")
            if norm is not None and calls[id(steps[norm].module)] == 1:
                step.norm = steps[norm]
                tensor = norm + 1
                # timm's batch norms hold their activation.
                inner = getattr(step.norm.module, "act", None)
                if inner is not None and activation_of(inner) != "none":
                    continue
        rectifier = sole_reader(tensor, "activation")
        if rectifier is not None:
            step.activation = steps[rectifier]


def norm_activation(step: Step) -> str | None:
    """The activation that a batch norm of timm applies itself, "none" of torch's own, None for one
    that is neither ReLU nor ReLU6."""
    inner = getattr(step.module, "act", None)
    return "none" if inner is None else activation_of(inner)
