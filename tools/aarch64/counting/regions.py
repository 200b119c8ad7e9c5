"""Marks what the counting plugin counts; nothing without it. Runs on the emulated machine."""

import contextlib
import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MARK, _START, _STOP = 0x74746D6B, 1, 2
_prctl = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = [ctypes.c_int, *4 * (ctypes.c_ulong,)]


class Regions:
    """Numbers regions and remembers what each is; `write` leaves that for who reads the counts."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def region(self, **row: Any) -> Iterator[None]:
        """Counts what runs inside; `row` describes it."""
        self.start(**row)
        try:
            yield
        finally:
            self.stop()

    def start(self, **row: Any) -> None:
        """Opens a region, for code that no `with` can enclose."""
        self.rows.append(row)
        _prctl(_MARK, _START, len(self.rows) - 1, 0, 0)

    def stop(self) -> None:
        """Closes it."""
        _prctl(_MARK, _STOP, len(self.rows) - 1, 0, 0)

    def write(self, path: Path) -> None:
        """The rows, and where this process has its shared objects, as JSON."""
        maps = Path("/proc/self/maps").read_text().splitlines()
        objects: dict[str, int] = {}
        for line in maps:
            fields = line.split()
            if len(fields) > 5 and fields[5].startswith("/"):
                start = int(fields[0].split("-")[0], 16) - int(fields[2], 16)
                objects[fields[5]] = min(objects.get(fields[5], start), start)
        path.write_text(json.dumps({"rows": self.rows, "objects": objects}))
