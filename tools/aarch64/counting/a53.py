"""What instructions are and what they cost on a Cortex-A53: reads the plugin's counts.

The cost is the issue of a block of code, in order, two instructions a cycle, by the rules of GCC's
scheduling model of the A53 (-mtune=cortex-a53), whose own schedule of our kernels inner_loops.py
prints beside it. Every memory access hits the first
cache, every branch is predicted, and a block starts when all that came before it has finished;
only a loop of a single block is taken as it runs in its steady state.
"""

from __future__ import annotations

import bisect
import functools
import json
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_OBJDUMP, _NM = "aarch64-linux-gnu-objdump", "aarch64-linux-gnu-nm"

_REGISTER = re.compile(r"\b([wxvqdshb])(\d+|zr)(?:\.(\d*)([bhsd]))?|\b(sp|wsp)\b")
_STORES = re.compile(r"st(r|p|ur|n?p|lr|xr|tr|[1-4])|stlxr|stxr")
_CONSUMES_FLAGS = re.compile(r"b\.|cs|cc|cinc|cset|cneg|cinv|adcs?$|sbcs?$|fcsel|fccmp")
_SETS_FLAGS = re.compile(
    r"(adds|subs|ands|bics|cmp|cmn|tst|negs|ccmp|ccmn|fcmpe?|fccmpe?|adcs|sbcs)$"
)
_ACCUMULATES = re.compile(
    r"(fml[as]|ml[as]|[su]ml[as]l2?|ins|movk|bfi|bfxil|bsl|bit|bif|[su]aba|xtn2|sri|sli)$"
)


@dataclass(frozen=True)
class Instruction:
    """One decoded instruction: its class in the model, and the registers between which it waits."""

    name: str
    kind: str
    reads: tuple[str, ...]
    late: tuple[str, ...]  # an FMA's sum, a store's data: needed later than the rest
    writes: tuple[str, ...]
    address: tuple[str, ...]
    base_writes: tuple[str, ...]
    vector_fma: bool
    vector_load: bool
    stack: bool


def _registers(text: str) -> list[str]:
    found = []
    for match in _REGISTER.finditer(text):
        if match[5]:
            found.append("sp")
        elif match[2] != "zr":
            found.append(("x" if match[1] in "wx" else "v") + match[2])
    return found


def decode(text: str) -> Instruction:
    """From objdump's text, mnemonic and operands."""
    name, _, operands = text.partition(" ")
    operands = operands.split("//")[0].split(" <")[0].strip()
    parts = re.split(r",\s*(?![^\[{]*[\]}])", operands) if operands else []
    memory = next((part for part in parts if part.startswith("[")), "")
    vector = bool(re.search(r"\b[vqdshb]\d+", operands))
    whole = bool(re.search(r"\bv\d+\.(16b|8h|4s|2d)|\bq\d+", operands))
    address = tuple(_registers(memory))
    post = parts[parts.index(memory) + 1] if memory and parts[-1] != memory else ""
    base_writes = address[:1] if memory.endswith("!") or post else ()
    reads: list[str] = []
    late: list[str] = []
    writes: list[str] = []
    plain = [part for part in parts if part != memory and part != post]
    if memory and name.startswith("st"):
        late = _registers(",".join(plain))
    elif memory:
        writes = _registers(",".join(plain))
        if name.startswith("ld1") and re.search(r"\}\[\d", operands):
            reads = list(writes)
    elif name.startswith(("b", "cb", "tb", "ret", "br")) and not name.startswith(
        ("bf", "bi", "bs")
    ):
        reads = _registers(operands)
        writes = ["x30"] if name in ("bl", "blr") else []
    elif _SETS_FLAGS.match(name) and name.startswith(("cmp", "cmn", "tst", "ccm", "fcm", "fccm")):
        reads = _registers(operands)
    else:
        writes = _registers(parts[0])[:1] if parts else []
        reads = _registers(",".join(parts[1:]))
        if _ACCUMULATES.match(name) or re.match(r"v\d+\.\w+\[", parts[0] if parts else ""):
            (late if name.startswith(("fmla", "fmls")) else reads).extend(writes)
    if _SETS_FLAGS.match(name):
        writes.append("flags")
    if _CONSUMES_FLAGS.match(name):
        reads.append("flags")
    fma = (name in ("fmla", "fmls") and ".4s" in operands) or (
        name in ("fmla", "fmls") and ".2s" in operands
    )
    load = vector and name.startswith("ld")
    return Instruction(
        name,
        _kind(name, operands, memory, vector, whole),
        tuple(reads),
        tuple(late),
        tuple(writes),
        address,
        base_writes,
        fma,
        load,
        bool(memory) and "sp" in address[:1],
    )


def _kind(name: str, operands: str, memory: str, vector: bool, whole: bool) -> str:
    pair = name.startswith(("ldp", "ldnp"))
    if memory and name.startswith("ld"):
        if not vector:
            return "load two" if pair else "load"
        lane = re.search(r"\}\[\d", operands) or name.startswith("ld1r")
        one = lane or (name in ("ldr", "ldur") and not operands.startswith("q"))
        return "vector load" if one else "wide load"
    if memory and name.startswith("st"):
        wide = vector and (
            operands.startswith("q")
            or name.startswith("stp")
            or (name == "st1" and "}[" not in operands)
        )
        return "wide store" if wide else "store"
    if re.match(r"(b$|b\.|bl$|blr|br$|cbn?z|tbn?z|ret)", name):
        return "branch"
    if vector:
        if name in ("umov", "smov") or (
            name in ("mov", "fmov") and operands.startswith(("w", "x"))
        ):
            return "to integer"
        if name.startswith("fcvt") and operands.startswith(("w", "x")):
            return "to integer"
        if name in ("dup", "fmov", "ins", "mov", "scvtf", "ucvtf") and re.search(
            r"\b[wx](\d+|zr)\b", operands
        ):
            return "from integer"
        if name in ("fdiv", "fsqrt"):
            return "divide"
        if name in ("fmadd", "fmsub", "fnmadd", "fnmsub"):
            return "scalar fma"
        return "vector" if whole else "half vector"
    if name in (
        "mul",
        "madd",
        "msub",
        "smull",
        "umull",
        "smaddl",
        "umaddl",
        "smulh",
        "umulh",
        "mneg",
    ):
        return "multiply"
    if name in ("udiv", "sdiv"):
        return "integer divide"
    return "integer"


_LATENCY = {
    "integer": 3,
    "load": 4,
    "load two": 4,
    "multiply": 4,
    "integer divide": 4,
    "vector load": 3,
    "wide load": 4,
    "vector": 4,
    "half vector": 4,
    "scalar fma": 8,
    "to integer": 5,
    "from integer": 4,
    "divide": 14,
}
_BOTH_SLOTS = ("wide load", "load two")
_FIRST_SLOT = ("vector", "divide", "integer divide")


def _latency(source: str, sink: Instruction, how: str) -> int:
    """Cycles from a source's issue until `sink` may use its result as `how`."""
    if how == "address":
        return 3 if source in ("integer", "load") else _LATENCY[source]
    if source == "integer":
        if (
            sink.kind == "branch"
            or (how == "late" and "store" in sink.kind)
            or sink.kind == "from integer"
        ):
            return 0
        return 1 if sink.kind == "integer" else 2
    if source in ("load", "load two", "multiply"):
        if how == "late" and "store" in sink.kind:
            return 1
        if sink.kind == "integer":
            return 2 if source != "load two" else 3
    return _LATENCY.get(source, 4)


def schedule(block: Sequence[Instruction]) -> list[int]:
    """The cycle in which each instruction issues."""
    ready: dict[str, tuple[str, int]] = {}  # register: class and issue of what wrote it
    cycle = 0
    used = 0  # slots of this cycle
    # The last cycle in which each is taken: the first slot by a vector, and by a wide access that
    # issued in the cycle before.
    agen = first_slot = busy_slot = load_until = -1
    issued = []
    for instruction in block:
        earliest = cycle
        for how, registers in (
            ("plain", instruction.reads),
            ("late", instruction.late),
            ("address", instruction.address),
        ):
            for register in registers:
                if register in ready:
                    source, at = ready[register]
                    earliest = max(earliest, at + _latency(source, instruction, how))
        memory = "load" in instruction.kind or "store" in instruction.kind
        while True:
            if earliest > cycle:
                cycle, used = earliest, 0
            slots = used + (1 if busy_slot == cycle else 0)
            fits = slots < 2
            if instruction.kind in _BOTH_SLOTS:
                fits = slots == 0
            elif instruction.kind in _FIRST_SLOT:
                fits = slots < 2 and busy_slot != cycle and first_slot != cycle
            if memory and agen == cycle:
                fits = False
            if "load" in instruction.kind and load_until > cycle:
                fits = False
            if fits:
                break
            earliest = cycle + 1
        used += 2 if instruction.kind in _BOTH_SLOTS else 1
        if instruction.kind in _FIRST_SLOT:
            first_slot = cycle
        if memory:
            agen = cycle
        if instruction.kind in _BOTH_SLOTS or instruction.kind == "wide store":
            busy_slot = cycle + 1
        if instruction.kind in _BOTH_SLOTS:
            load_until = cycle + 2
        for register in instruction.writes:
            ready[register] = (instruction.kind, cycle)
        for register in instruction.base_writes:
            ready[register] = ("integer", cycle)
        issued.append(cycle)
    return issued


@dataclass
class Counts:
    """What ran: executed instructions of some blocks, by kind, and modelled cycles."""

    instructions: int = 0
    vector_fma: int = 0
    vector_load: int = 0
    stack: int = 0
    cycles: int = 0

    def add(self, block: Counts, times: int) -> None:
        self.instructions += times * block.instructions
        self.vector_fma += times * block.vector_fma
        self.vector_load += times * block.vector_load
        self.stack += times * block.stack
        self.cycles += times * block.cycles


@dataclass
class Block:
    address: int
    words: tuple[int, ...]
    symbol: str = "?"
    library: str = "?"
    counts: Counts = field(default_factory=Counts)


def _disassemble(words: Iterable[int]) -> dict[int, Instruction]:
    """One run of objdump for all words; targets of branches in it mean nothing."""
    distinct = sorted(set(words))
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(word.to_bytes(4, "little") for word in distinct))
        file.flush()
        text = subprocess.run(
            [_OBJDUMP, "-D", "-z", "-b", "binary", "-m", "aarch64", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    decoded = {}
    for line in text.splitlines():
        match = re.match(r"\s*[0-9a-f]+:\t([0-9a-f]{8}) \t(.*)", line)
        if match:
            decoded[int(match[1], 16)] = decode(match[2].replace("\t", " ").strip())
    return decoded


def _target(word: int, address: int) -> int | None:
    """Where a branch goes, if that is in the instruction."""
    if word & 0xFF000010 == 0x54000000 or word & 0x7E000000 == 0x34000000:
        bits, offset = 19, word >> 5
    elif word & 0x7E000000 == 0x36000000:
        bits, offset = 14, word >> 5
    elif word & 0xFC000000 == 0x14000000:
        bits, offset = 26, word
    else:
        return None
    offset &= (1 << bits) - 1
    return address + 4 * (offset - (offset >> (bits - 1) << bits))


def _count(block: Block, decoded: dict[int, Instruction]) -> Counts:
    instructions = [decoded[word] for word in block.words]
    alone = schedule(instructions)[-1] + 1
    last = block.address + 4 * (len(block.words) - 1)
    if _target(block.words[-1], last) == block.address:
        alone = schedule(instructions * 2)[-1] + 1 - alone
    return Counts(
        len(instructions),
        sum(i.vector_fma for i in instructions),
        sum(i.vector_load for i in instructions),
        sum(i.stack for i in instructions),
        alone,
    )


@functools.cache
def _symbols(path: str) -> tuple[list[int], list[str]]:
    found = {}
    for option in ((), ("-D",)):
        text = subprocess.run(
            [_NM, "-C", "--defined-only", *option, path],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        for line in text.splitlines():
            address, kind, name = line.split(" ", 2)
            if kind in "tTwWiu":
                found[int(address, 16)] = name
    order = sorted(found)
    return order, [found[address] for address in order]


def read(folder: Path) -> list[tuple[dict[str, str], list[tuple[Block, int]]]]:
    """Each region of a counted run: its row, and the blocks that ran in it with how often."""
    description = json.loads((folder / "regions.json").read_text())
    objects = sorted((start, path) for path, start in description["objects"].items())
    starts = [start for start, _ in objects]
    blocks: list[Block] = []
    regions = []
    with (folder / "counts.txt").open() as lines:
        for line in lines:
            what, number, *rest = line.split()
            if what == "block":
                address, *words = (int(value, 16) for value in rest)
                blocks.append(Block(address, tuple(words)))
            else:
                pairs = [tuple(map(int, pair.split(":"))) for pair in rest]
                regions.append((int(number), pairs))
    decoded = _disassemble(word for block in blocks for word in block.words)
    known: dict[tuple[int, tuple[int, ...]], Counts] = {}
    for block in blocks:
        key = block.address, block.words
        if key not in known:
            known[key] = _count(block, decoded)
        block.counts = known[key]
        at = bisect.bisect_right(starts, block.address) - 1
        if at >= 0:
            start, path = objects[at]
            block.library = Path(path).name
            addresses, names = _symbols(path)
            symbol = bisect.bisect_right(addresses, block.address - start) - 1
            if symbol >= 0:
                block.symbol = names[symbol]
    return [
        (description["rows"][number], [(blocks[index], times) for index, times in pairs])
        for number, pairs in regions
    ]


def total(blocks: Iterable[tuple[Block, int]]) -> Counts:
    """The sum over blocks."""
    result = Counts()
    for block, times in blocks:
        result.add(block.counts, times)
    return result


def by_symbol(blocks: Iterable[tuple[Block, int]]) -> dict[tuple[str, str], Counts]:
    """The sum over the blocks of each (library, function)."""
    result: dict[tuple[str, str], Counts] = defaultdict(Counts)
    for block, times in blocks:
        result[block.library, block.symbol].add(block.counts, times)
    return result
