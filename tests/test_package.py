"""What importing the package costs and gives, and which way its modules depend on each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tinytrain_ext

ROOT = Path(tinytrain_ext.__file__).parent

# A module may import those of its own and earlier rows; `nn` and `offline` may import any.
LAYERS = [
    {"errors", "_core"},
    {"network"},
    {"architectures"},
    {"importers", "images", "protonet", "cost"},
    {"selection", "demo"},
    {"session"},
    {"fisher"},
    {"adapt"},
    {"report"},
    {"cli"},
    {"__main__"},
]


def imported_modules(path):
    """Modules of the package a file imports at run time, at any level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checking = [
        node
        for statement in ast.walk(tree)
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
        for node in ast.walk(statement)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node not in checking:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def test_dependencies_point_one_way():
    rank = {module: index for index, row in enumerate(LAYERS) for module in row}
    for module, index in rank.items():
        path = ROOT / f"{module}.py"
        if path.exists():
            for other in imported_modules(path):
                if (module, other) in {("network", "session"), ("selection", "session")}:
                    continue  # inside functions that need the engine
                assert rank[other] <= index, f"{module} imports {other}"


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
import tinytrain_ext
import tinytrain_ext.adapt
assert callable(tinytrain_ext.adapt)
for name in ("torch", "PIL", "safetensors", "tinytrain_ext._core"):
    assert name not in sys.modules, name
with open("/proc/self/status") as status:
    print(int(status.read().split("VmHWM:")[1].split()[0]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_importing_is_cheap_and_imports_no_torch():
    command = [sys.executable, "-c", SCRIPT]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(output) < 40_000
