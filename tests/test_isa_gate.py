"""The gates of the build: each must pass what is sound and bite on what is not."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


isa_gate, check_wheel = tool("isa_gate"), tool("check_wheel")

BASELINE = {
    "x86_64": "addps %xmm1, %xmm0",
    "aarch64": "fmla v0.4s, v1.4s, v2.s[0]",
}
BEYOND = {
    "x86_64": [
        "popcnt %rax, %rax",
        "pshufb %xmm1, %xmm0",
        "roundss $1, %xmm0, %xmm1",
        "vaddps %xmm0, %xmm1, %xmm2",
        "vfmadd231ps %ymm0, %ymm1, %ymm2",
        "vaddps %zmm0, %zmm1, %zmm2",
    ],
    "aarch64": [
        "ldaddal w0, w1, [x2]",
        "sdot v0.4s, v1.16b, v2.16b",
        "fadd v0.8h, v1.8h, v2.8h",
        "sqrdmlah v0.4s, v1.4s, v2.4s",
        "ldapr w0, [x1]",
        "fadd z0.s, z1.s, z2.s",
        "bfdot v0.4s, v1.8h, v2.8h",
    ],
}
TOOLCHAINS = [
    pytest.param(
        (machine, prefix),
        marks=pytest.mark.skipif(not found, reason=f"no assembler for {machine}"),
        id=machine,
    )
    for machine, prefix, found in [
        ("x86_64", "x86_64-linux-gnu-", shutil.which("x86_64-linux-gnu-as")),
        ("aarch64", "aarch64-linux-gnu-", shutil.which("aarch64-linux-gnu-as")),
    ]
]


def assemble(path, toolchain, *instructions, symbol=".globl"):
    machine, prefix = toolchain
    path.parent.mkdir(parents=True, exist_ok=True)
    # Everything that the assembler knows, so that the gate is what says no.
    newest = [] if machine == "x86_64" else ["-march=armv8.6-a+sve"]
    lines = [f"{symbol} kernel", "kernel:", *instructions, "ret", ""]
    source = "\n".join(lines)
    subprocess.run([f"{prefix}as", *newest, "-o", path, "-"], input=source, text=True, check=True)
    return path


@pytest.mark.parametrize("toolchain", TOOLCHAINS)
def test_the_gate_bites(tmp_path, toolchain):
    machine, prefix = toolchain
    common = tmp_path / "core.dir" / "plan.cpp.o"
    assemble(common, toolchain, BASELINE[machine])
    assert isa_gate.faults(common, prefix) == []
    for instruction in BEYOND[machine]:
        assemble(common, toolchain, BASELINE[machine], instruction)
        (fault,) = isa_gate.faults(common, prefix)
        assert fault.startswith("kernel: beyond the baseline: "), instruction
        mnemonic = instruction.split()[0]
        assert mnemonic in fault
        scalar = assemble(tmp_path / "isa_scalar.dir" / "pointwise.cpp.o", toolchain, instruction)
        assert isa_gate.faults(scalar, prefix) != [], "the scalar kernels are common code too"
        vector = assemble(
            tmp_path / "isa_avx2_k3.dir" / "depthwise_forward.cpp.o", toolchain, instruction
        )
        assert isa_gate.faults(vector, prefix) == []


@pytest.mark.parametrize("toolchain", TOOLCHAINS)
def test_no_weak_symbol_in_an_object_of_an_instruction_set(tmp_path, toolchain):
    _, prefix = toolchain
    for name in (
        "isa_avx2_k3.dir/depthwise.cpp.o",
        "isa_scalar.dir/table.cpp.o",
        "isa_neon.dir/table.cpp.o",
    ):
        kernel = assemble(tmp_path / name, toolchain, symbol=".weak")
        assert isa_gate.faults(kernel, prefix) == ["weak symbol kernel"]
    common = assemble(tmp_path / "core.dir" / "plan.cpp.o", toolchain, symbol=".weak")
    assert isa_gate.faults(common, prefix) == []


@pytest.mark.parametrize("toolchain", TOOLCHAINS)
def test_a_folder_without_kernels_is_no_build(tmp_path, toolchain, monkeypatch, capsys):
    machine, prefix = toolchain
    monkeypatch.setattr(sys, "argv", ["isa_gate.py", "--prefix", prefix, str(tmp_path)])
    assert isa_gate.main() == 1
    assemble(tmp_path / "core.dir" / "plan.cpp.o", toolchain, BASELINE[machine])
    assert isa_gate.main() == 1
    assemble(tmp_path / "isa_scalar.dir" / "pointwise.cpp.o", toolchain, BASELINE[machine])
    capsys.readouterr()
    assert isa_gate.main() == 0
    assert capsys.readouterr().out == "2 object files sound; instruction sets: scalar\n"
    assemble(tmp_path / "core.dir" / "plan.cpp.o", toolchain, BEYOND[machine][0])
    assert isa_gate.main() == 1


def wheel(folder, name, modules, machine=183, glibc="2.17"):
    path = folder / name
    header = b"\x7fELF\x02\x01".ljust(18, b"\0") + machine.to_bytes(2, "little")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tinytrain_ext/__init__.py", "")
        for module in modules:
            archive.writestr(module, header + f"\0GLIBC_{glibc}\0GLIBC_2.4\0".encode())
    return path


def test_a_wheel_that_only_looks_cross_built_is_refused(tmp_path):
    name = "tinytrain_ext-0.1.0-cp311-cp311-manylinux_2_34_aarch64.whl"
    module = "tinytrain_ext/_core.cpython-311-aarch64-linux-gnu.so"

    def faults(*arguments, **options):
        path = wheel(tmp_path, *arguments, **options)
        return " ".join(check_wheel.faults(path, "aarch64", "3.11"))

    assert faults(name, [module]) == ""
    assert "got []" in faults(name, [])
    assert "x86_64-linux-gnu.so" in faults(name, [module.replace("aarch64", "x86_64")])
    assert "expected ELF machine aarch64, got 62" in faults(name, [module], machine=62)
    assert "expected glibc (2, 36) at most, got (2, 38)" in faults(name, [module], glibc="2.38")
    assert "expected tags" in faults(name.replace("cp311-cp311", "cp313-cp313"), [module])
    assert "expected tags" in faults(name.replace("manylinux_2_34", "linux"), [module])
    assert "manylinux_2_36 at most" in faults(name.replace("2_34", "2_38"), [module])
