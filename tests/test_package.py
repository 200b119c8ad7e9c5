"""What importing the package costs and gives, and which way its modules depend on each other."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tinytrain_ext
from tinytrain_ext import _core
from tinytrain_ext.demo import draw_task, save_images

ROOT = Path(tinytrain_ext.__file__).parent

# A module may import those of its own and earlier rows; `nn`, `offline` and `bench` may import any.
# `figures` is a package, whose modules are held to its row.
LAYERS = [
    {"errors", "episodes", "_core"},
    {"network"},
    {"architectures"},
    {"importers", "exporters", "images", "protonet", "cost"},
    {"datasets"},
    {"selection", "demo"},
    {"session"},
    {"fisher", "views"},
    {"heldout"},
    {"adapt"},
    {"evaluate"},
    {"report", "page", "figures", "offline.commands", "bench"},
    {"cli"},
    {"__main__"},
]


def imported_modules(path, level=1):
    """Modules of the package a file imports at run time, with as many dots."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checking = [
        node
        for statement in ast.walk(tree)
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
        for node in ast.walk(statement)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == level and node not in checking:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def test_dependencies_point_one_way():
    rank = {module: index for index, row in enumerate(LAYERS) for module in row}
    for module, index in rank.items():
        path = ROOT / f"{module}.py"
        if path.exists():
            for other in imported_modules(path):
                if (module, other) in {("network", "session"), ("selection", "session")}:
                    continue  # inside functions that need the engine
                if (module, other.split(".")[0]) == ("network", "nn"):
                    continue  # inside functions that need PyTorch
                if (module, other) == ("evaluate", "offline.tinytl"):
                    continue  # the same
                assert rank[other] <= index, f"{module} imports {other}"
    paths = list((ROOT / "figures").glob("*.py"))
    assert paths
    for path in paths:
        for other in imported_modules(path, level=2):
            assert rank[other] <= rank["figures"], f"figures.{path.stem} imports {other}"


def test_public_names_resolve():
    assert sorted(tinytrain_ext.__all__) == tinytrain_ext.__all__
    for name in tinytrain_ext.__all__:
        if name != "Session" or (ROOT / "session.py").exists():
            assert getattr(tinytrain_ext, name).__name__ == name
    assert set(tinytrain_ext.__all__) <= set(dir(tinytrain_ext))
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        tinytrain_ext.trainer  # noqa: B018


SCRIPT = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import numpy
from memory import resident_bytes
print(resident_bytes())
import tinytrain_ext
import tinytrain_ext.adapt
assert callable(tinytrain_ext.adapt)
for name in ("PIL", "safetensors", "tinytrain_ext._core"):
    assert name not in sys.modules, name
print(resident_bytes())
# What an adaptation needs: the engine, a decoder, the file format.
for name in tinytrain_ext.__all__:
    getattr(tinytrain_ext, name)
import PIL.Image, PIL.JpegImagePlugin, PIL.PngImagePlugin, safetensors.numpy
print(resident_bytes())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_importing_is_cheap_and_imports_no_torch():
    command = [sys.executable, "-c", SCRIPT]
    here = Path(__file__).parent  # where `memory` is
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here).stdout
    numpy, package, everything = map(int, output.split())
    assert package - numpy < 4_000_000
    assert everything - numpy < 12_000_000
    assert everything < 45_000_000  # of which CPython 3.13 takes 3 million more than 3.11 does


def parameters(signature):
    """Names of a signature's parameters, "*" included: "f(self: T, *, x: int = 1) -> None"."""
    arguments = ast.parse(f"def {signature}: ...").body[0].args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    return [*names, "*", *(argument.arg for argument in arguments.kwonlyargs)]


def real_signatures(value):
    """{function or method: its parameters} as pybind11 writes them into docstrings."""
    found = {}
    for name in vars(value):
        member = getattr(value, name)  # a static method itself, not its wrapper
        text = (getattr(member, "__doc__", None) or "").split("\n")[0]
        if callable(member) and re.match(rf"{name}\(.*\)", text):
            found[name] = parameters(re.sub(r"Annotated\[.*?\)\"\]", "X", text))
    return found


def stub_signatures(body):
    return {
        node.name: parameters(f"{node.name}({ast.unparse(node.args)})")
        for node in body
        if isinstance(node, ast.FunctionDef)
    }


def test_the_stub_tells_the_truth_about_the_engine():
    stub = ast.parse((ROOT / "_core.pyi").read_text(encoding="utf-8"))
    assert stub_signatures(stub.body) == real_signatures(_core)
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    public = {name for name in classes if not name.startswith("_")}
    assert public == {name for name, value in vars(_core).items() if isinstance(value, type)}
    for name in public:
        (base,) = classes[name].bases  # the methods are those of a generic base class
        expected = stub_signatures(classes[base.value.id].body)
        assert expected == real_signatures(getattr(_core, name)), name


def test_what_is_installed_with_the_modules():
    assert (ROOT / "py.typed").is_file()
    assert (ROOT / "_core.pyi").is_file()


@pytest.mark.all_cases
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 3
    task = draw_task(128, shots=2, queries=1)
    save_images(task, tmp_path)
    (tmp_path / "support").rename(tmp_path / "photos")
    Image.fromarray(task.query.images[0]).save(tmp_path / "new.jpg")
    monkeypatch.chdir(tmp_path)
    # An emulated CPU takes minutes for the forty that are the default.
    adapt = functools.partial(tinytrain_ext.adapt, iterations=4)
    monkeypatch.setattr(tinytrain_ext, "adapt", adapt)
    names = {"grad_features": np.ones((10, 160), np.float32)}
    exec("\n".join(blocks), names)
    assert "peak of the arena" in capsys.readouterr().out
    assert len(names["found"].labels) == 1
    assert tinytrain_ext.Network.load("fruit.safetensors").classes == task.support.classes
