"""How much memory a process holds, counted so that an emulator's own does not count."""

from pathlib import Path


def resident_bytes() -> int:
    """Resident memory of this process.

    Under user-mode QEMU /proc/self/maps lists what belongs to the emulated program while
    /proc/self/smaps lists the emulator too; on a real machine the two list the same.
    """
    with Path("/proc/self/maps").open() as maps:
        own = [_ends(line) for line in maps]
    total, counted = 0, False
    with Path("/proc/self/smaps").open() as smaps:
        for line in smaps:
            name = line.split(maxsplit=1)[0]
            if not name.endswith(":"):
                start, end = _ends(line)
                counted = any(start < last and first < end for first, last in own)
            elif counted and name == "Rss:":
                total += int(line.split()[1]) * 1024
    return total


def _ends(line: str) -> tuple[int, int]:
    start, end = line.split(maxsplit=1)[0].split("-")
    return int(start, 16), int(end, 16)
