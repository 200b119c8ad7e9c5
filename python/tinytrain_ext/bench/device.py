"""What machine this is and what state it is in, as far as a benchmark's reader must know."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .. import _core

__all__ = ["Device", "State", "identify", "observe", "pin"]

# Arm's part numbers (MIDR_EL1 bits 15:4) of cores that boards of this size have.
_ARM_CORES = {
    0xD03: "Cortex-A53",
    0xD04: "Cortex-A35",
    0xD05: "Cortex-A55",
    0xD07: "Cortex-A57",
    0xD08: "Cortex-A72",
    0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76",
}
_ARM = 0x41

# Bits of the Raspberry Pi firmware's get_throttled; the same plus 16 mean "since the start".
_THROTTLING = {
    0: "under-voltage",
    1: "clock capped",
    2: "throttled",
    3: "soft temperature limit",
}
_SINCE_START = 16


@dataclass(frozen=True)
class Device:
    """What does not change during a run.

    model: the board or machine, "" where the system does not say. core: CPU core, of its own saying
    (MIDR_EL1 or CPUID; never /proc/cpuinfo, which an emulator passes through from its host).
    machine: "aarch64" or "x86_64". isa: the kernels that run. cpus: how many there are.
    """

    model: str
    core: str
    machine: str
    isa: str
    cpus: int


@dataclass(frozen=True)
class State:
    """What may change during a run; None: the system does not say.

    celsius: temperature of the CPU. megahertz: clock of the first CPU. governor: who sets it.
    throttling: reasons for which a Raspberry Pi slows down or has slowed down since its start.
    """

    celsius: float | None
    megahertz: float | None
    governor: str | None
    throttling: tuple[str, ...] | None


def identify(root: Path = Path("/")) -> Device:
    """This machine. root: where its /sys and /proc are."""
    model = ""
    for place in ("proc/device-tree/model", "sys/class/dmi/id/product_name"):
        model = model or _read(root / place) or ""
    return Device(
        model=model,
        core=core_name(**_core.cpu()),
        machine=platform.machine(),
        isa=_core.default_isa(),
        cpus=os.cpu_count() or 1,
    )


def core_name(brand: str, midr: int, hwcap: int) -> str:
    """The name of a core from what it says of itself (`_core.cpu`); with its revision on Arm."""
    if brand:
        return brand.strip("\0 ")
    if not midr:
        return f"unknown (hwcap {hwcap:#x})"
    implementer, part = midr >> 24 & 0xFF, midr >> 4 & 0xFFF
    name = _ARM_CORES.get(part) if implementer == _ARM else None
    revision = f"r{midr >> 20 & 0xF}p{midr & 0xF}"
    return f"{name} {revision}" if name else f"unknown (MIDR {midr:#010x})"


def observe(root: Path = Path("/"), vcgencmd: str = "vcgencmd") -> State:
    """The machine's state now."""
    clock = root / "sys/devices/system/cpu/cpu0/cpufreq"
    kilohertz = _read(clock / "scaling_cur_freq")
    return State(
        celsius=_temperature(root / "sys/class/thermal"),
        megahertz=int(kilohertz) / 1000 if kilohertz else None,
        governor=_read(clock / "scaling_governor"),
        throttling=_throttling(root, vcgencmd),
    )


def pin(threads: int) -> list[int]:
    """Binds this process to its first `threads` CPUs, one for each thread; returns their numbers.

    Raises ValueError if it has fewer.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise ValueError(f"threads: expected at most {len(allowed)}, got {threads}")
    os.sched_setaffinity(0, allowed[:threads])
    return allowed[:threads]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n") or None
    except OSError:
        return None


def _temperature(zones: Path) -> float | None:
    """Of the zone that is named for the CPU, or the first."""
    found = {
        zone.name: (_read(zone / "type") or "", _read(zone / "temp"))
        for zone in sorted(zones.glob("thermal_zone*"))
    }
    readings = [
        ("cpu" not in kind and "pkg" not in kind, float(value) / 1000)
        for kind, value in found.values()
        if value is not None
    ]
    return min(readings, key=lambda reading: reading[0])[1] if readings else None


def _throttling(root: Path, vcgencmd: str) -> tuple[str, ...] | None:
    text = _read(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    program = shutil.which(vcgencmd)
    if text is None and program is not None:
        try:
            done = subprocess.run(
                [program, "get_throttled"], capture_output=True, text=True, check=True, timeout=5
            )
        except (OSError, subprocess.SubprocessError):
            return None
        text = done.stdout.partition("=")[2]
    try:
        bits = int(text or "", 16)
    except ValueError:
        return None
    now = [name for bit, name in _THROTTLING.items() if bits >> bit & 1]
    before = [
        f"{name} since the start"
        for bit, name in _THROTTLING.items()
        if bits >> bit + _SINCE_START & 1
    ]
    return tuple(now + before)
