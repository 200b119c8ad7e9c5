"""Fixtures shared by the tests; those that need files from outside skip where there are none.

Environment:
    TINYTRAIN_WEIGHTS: folder of the int8 release files.
    TINYTRAIN_DATA: folder of unpacked image sets, laid out as SET/CLASS/IMAGE.
    TINYTRAIN_TEST_CASES: "all" (default), or "few" for an emulated CPU: the kernel tests then run
        one case, that of least work, for every kind of case (cases.py), the tests of whole passes
        and plans run on one network, MCUNet, which has every kind of layer, and what is marked
        "all_cases" does not run at all: what no device does (evaluations of many methods,
        meta-training, examples in PyTorch), and what would take it long and others test as well.
        pytest counts what that leaves out as deselected.
"""

import os
from pathlib import Path

import pytest

from tinytrain_ext.importers import import_int8
from tinytrain_ext.network import Network

RELEASE_FILES = {
    "mcunet": "mcunet-5fps.pkl",
    "mobilenetv2": "mbv2-w0.35.pkl",
    "proxylessnas": "proxyless-w0.3.pkl",
}


def _directory(variable: str, content: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: it names the folder of {content}")
    return Path(value)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("TINYTRAIN_TEST_CASES", "all") != "few":
        return
    others = RELEASE_FILES.keys() - {"mcunet"}

    def left_out(item: pytest.Item) -> bool:
        if item.get_closest_marker("all_cases"):
            return True
        if item.path.name == "test_evaluate.py" and hasattr(item, "fixturenames"):
            return bool({"domains", "every_row"}.intersection(item.fixturenames))
        callspec = getattr(item, "callspec", None)
        if item.path.name not in {"test_session.py", "test_plan.py", "test_nn_models.py"}:
            return False
        return callspec is not None and bool(others.intersection(callspec.id.split("-")))

    config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
    items[:] = [item for item in items if not left_out(item)]


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """Folder of the three int8 release files."""
    return _directory("TINYTRAIN_WEIGHTS", "the int8 release files")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of unpacked image sets, laid out as SET/CLASS/IMAGE."""
    return _directory("TINYTRAIN_DATA", "unpacked image sets")


@pytest.fixture(scope="session")
def release_files(weights_dir: Path) -> dict[str, Path]:
    """Paths of the three int8 release files, by architecture."""
    return {name: weights_dir / file for name, file in RELEASE_FILES.items()}


@pytest.fixture(scope="session")
def imported_networks(release_files: dict[str, Path]) -> dict[str, Network]:
    """The networks of the three int8 release files, by architecture."""
    return {name: import_int8(path) for name, path in release_files.items()}
