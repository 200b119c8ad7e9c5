"""The check on the memory a compiler takes: it must pass what is small and bite on what is not."""

import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[1] / "tools" / "compile_memory.py"


@pytest.mark.parametrize(("limit", "code"), [(1000, 0), (100, 1)])
def test_a_compiler_that_takes_too_much_fails(tmp_path, limit, code):
    log = tmp_path / "log"
    source = tmp_path / "large.cpp"
    source.write_text(f"held = bytearray({150 * 10**6})\n")
    command = [sys.executable, LAUNCHER, str(limit), log, sys.executable, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("limit 100" in done.stderr) == bool(code)
    used, logged = log.read_text().split()
    assert 150 <= int(used) < 1000
    assert logged == str(source)


def test_a_compiler_that_fails_stays_failed(tmp_path):
    command = [sys.executable, LAUNCHER, "1000", tmp_path / "log", sys.executable, "-c", "exit(3)"]
    assert subprocess.run(command, check=False).returncode == 3
