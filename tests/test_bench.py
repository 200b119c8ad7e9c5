"""`tinytrain bench`: rows, device and energy. Times themselves are never asserted."""

import json
import os
import threading
from pathlib import Path

import pytest
from benchmarks import layer_table

from tinytrain_ext import _core
from tinytrain_ext.bench import suite
from tinytrain_ext.bench.device import State, core_name, identify, observe, pin
from tinytrain_ext.bench.jobs import AdaptTimes, KernelJob, layer_shapes
from tinytrain_ext.cli import main


@pytest.fixture(autouse=True)
def affinity():
    """A benchmark pins its process; the tests after it need not run on one CPU."""
    allowed = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, allowed)


def put(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def vcgencmd(root, answer):
    program = root / "vcgencmd"
    program.write_text(f"#!/bin/sh\n[ $1 = get_throttled ] && echo {answer}\n")
    program.chmod(0o755)
    return str(program)


def test_a_raspberry_pi_in_full(tmp_path):
    put(tmp_path, "proc/device-tree/model", "Raspberry Pi Zero 2 W Rev 1.0\0")
    cpu = "sys/devices/system/cpu/cpu0/cpufreq"
    put(tmp_path, f"{cpu}/scaling_cur_freq", "1000000\n")
    put(tmp_path, f"{cpu}/scaling_governor", "ondemand\n")
    put(tmp_path, "sys/class/thermal/thermal_zone0/type", "gpu\n")
    put(tmp_path, "sys/class/thermal/thermal_zone0/temp", "10000\n")
    put(tmp_path, "sys/class/thermal/thermal_zone1/type", "cpu-thermal\n")
    put(tmp_path, "sys/class/thermal/thermal_zone1/temp", "51540\n")
    device = identify(tmp_path)
    assert device.model == "Raspberry Pi Zero 2 W Rev 1.0"
    assert device.isa == _core.default_isa()
    state = observe(tmp_path, vcgencmd=vcgencmd(tmp_path, "throttled=0x50005"))
    assert state == State(
        celsius=51.54,
        megahertz=1000.0,
        governor="ondemand",
        throttling=(
            "under-voltage",
            "throttled",
            "under-voltage since the start",
            "throttled since the start",
        ),
    )
    put(tmp_path, "sys/devices/platform/soc/soc:firmware/get_throttled", "0\n")
    assert observe(tmp_path, vcgencmd="absent").throttling == ()


def test_a_machine_that_says_nothing(tmp_path):
    assert identify(tmp_path).model == ""
    assert observe(tmp_path, vcgencmd="absent") == State(None, None, None, None)
    nonsense = observe(tmp_path, vcgencmd=vcgencmd(tmp_path, "error"))
    assert nonsense.throttling is None


def test_the_core_is_named_by_what_it_says_of_itself():
    assert core_name("", 0x410FD034, 0) == "Cortex-A53 r0p4"
    assert core_name("", 0x411FD071, 0) == "Cortex-A57 r1p1"
    assert core_name("", 0x410FFFF0, 0) == "unknown (MIDR 0x410ffff0)"
    assert core_name("", 0x480FD030, 0) == "unknown (MIDR 0x480fd030)"  # not Arm's
    assert core_name("", 0, 0xFF) == "unknown (hwcap 0xff)"
    assert core_name("  AMD EPYC\0", 0, 0) == "AMD EPYC"


def test_this_machine_says_what_its_core_is():
    assert not identify().core.startswith("unknown")


def test_more_threads_than_cpus_are_refused():
    count = len(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match=f"at most {count}, got {count + 1}"):
        pin(count + 1)
    assert len(pin(1)) == 1
    assert len(os.sched_getaffinity(0)) == 1


def test_energy_is_the_integral_of_power(tmp_path):
    file = tmp_path / "power.csv"
    file.write_text("seconds,watts,volts\n0,1,5\n10,1,5\n20,3,5\n30,3,5\n")
    log = suite.PowerLog.read(file)
    assert log.joules(0, 10) == pytest.approx(10)
    assert log.joules(10, 10) == pytest.approx(20)
    assert log.joules(12, 4) == pytest.approx(1.4 * 4 + 0.8 * 4 / 2)
    assert log.joules(0, 30) == pytest.approx(60)
    for start, seconds in ((-1, 5), (25, 6)):
        with pytest.raises(ValueError, match=r"covers 0\.0 to 30\.0 s"):
            log.joules(start, seconds)
    with file.open("a") as growing:
        growing.write("31,")  # a meter is writing it
    (joules,) = suite.Energy(power_csv=file).of([AdaptTimes(2.0, 8.0, 10.0, 5.0)])
    assert joules == pytest.approx({"load": 8.0, "fisher": 20.0, "run": 15.0, "total": 43.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,watts\n0,1\n1,1\n", "columns seconds and watts"),
        ("seconds,watts\n0,1\n", "at least two lines"),
        ("seconds,watts\n0,1\n1,nan\n", "line 3: expected two numbers"),
        ("seconds,watts\n0,1\n1\n", "line 3: expected two numbers"),
        ("seconds,watts\n0,1\n1,-2\n", "line 3: expected two numbers"),
        ("seconds,watts\n5,1\n5,1\n", "line 3: seconds must ascend"),
    ],
)
def test_a_power_record_that_is_none(tmp_path, text, message):
    file = tmp_path / "power.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        suite.PowerLog.read(file)


def test_the_meter_s_next_line_is_waited_for(tmp_path):
    file = tmp_path / "power.csv"
    file.write_text("seconds,watts\n0,2\n4,2\n")

    def write():
        with file.open("a") as growing:
            growing.write("6,2\n")

    timer = threading.Timer(0.3, write)
    timer.start()
    (joules,) = suite.Energy(power_csv=file).of([AdaptTimes(0.0, 1.0, 2.0, 2.0)])
    timer.join()
    assert joules["total"] == pytest.approx(10)


def test_without_a_source_there_is_no_energy():
    times = [AdaptTimes(0.0, 1.0, 2.0, 3.0)]
    assert suite.Energy().of(times) is None
    assert suite.Energy(watts=2).of(times) == [{"load": 2, "fisher": 4, "run": 6, "total": 12}]


def test_rows_are_medians_with_shares_and_ratios():
    times = {("forward", "tinytrain"): [1.0, 2.0, 4.0], ("forward", "torch"): [4.0, 4.0, 4.0]}
    ours, theirs = suite.rows_of(
        times, name="x", network="n", batch=1, unit="ms", macs={"forward": 10**9}, peak=2.0
    )
    assert (ours.median, ours.low, ours.high, ours.rounds) == (2000.0, 1000.0, 4000.0, 3)
    assert ours.share_of_peak == pytest.approx(0.5)
    assert ours.ratio is None
    assert theirs.ratio == 2.0


def test_a_kernel_job_computes_its_three_passes():
    shape = min(layer_shapes("mcunet"), key=lambda shape: shape.macs)
    job = KernelJob(shape)
    assert job.forward().shape == (1, *shape.output_size, shape.out_channels)
    assert job.grad_input().shape == job.image.shape
    assert job.grad_weight().shape == shape.weight_shape


def test_one_line_of_json_a_row_and_a_table(capsys):
    options = ["bench", "adapt", "--network", "mcunet", "--rounds", "1", "--iterations", "0"]
    assert main([*options, "--watts", "2.5", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["method"] for row in rows] == ["load", "fisher", "run", "total"]
    load, fisher, run, total = (row["median"] for row in rows)
    assert total == pytest.approx(load + fisher + run)
    assert rows[3]["joules"] == pytest.approx(2.5 * total)
    assert {row["device"]["isa"] for row in rows} == {_core.default_isa()}
    assert all(row["torch"] is None for row in rows)


def test_the_table_shows_no_energy_that_nobody_measured():
    state = {"celsius": 50.0, "megahertz": 1000.0, "governor": "ondemand", "throttling": ()}
    row = suite.Row("adapt", "mcunet", 25, "total", "tinytrain", "s", 5.0, 4.0, 6.0, 3)
    peer = suite.Row("adapt", "mcunet", 25, "total", "other", "s", 9.0, 8.0, 9.5, 3, ratio=1.8)
    document = {
        "device": {"model": "", "core": "Cortex-A53 r0p4", "machine": "aarch64", "isa": "neon"},
        "threads": 1,
        "pinned_to": [0],
        "fma_peak_gflops": 7.9,
        "before": state,
        "after": {**state, "throttling": ("throttled",), "celsius": None},
        "rows": [vars(row), vars(peer)],
    }
    document["device"]["cpus"] = 4
    text = suite.table(document)
    assert "4 x Cortex-A53 r0p4" in text
    assert "before       50.0 degrees C, 1000 MHz, governor ondemand, never throttled" in text
    assert "after        1000 MHz, governor ondemand, throttled" in text
    assert "5.000        4.000 to 6.000" in text
    assert "1.8x" in text
    assert "joules" not in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("step", "--batch", "0"),
        ("adapt", "--watts", "0"),
        ("adapt", "--watts", "1", "--power-csv", "x.csv"),
        ("kernels", "--network", "resnet"),
        ("kernels", "--threads", "2"),
        (),
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    assert "usage: tinytrain" in capsys.readouterr().err


def test_a_missing_power_record_is_an_input_error(tmp_path, capsys):
    options = ["bench", "adapt", "--network", "mcunet", "--rounds", "1", "--iterations", "0"]
    assert main([*options, "--power-csv", str(tmp_path / "absent.csv")]) == 2
    assert "absent.csv" in capsys.readouterr().err


def test_the_layers_of_the_program_without_python_are_the_networks():
    table = Path(__file__).parents[1] / "benchmarks/cpp/layers.inc"
    assert table.read_text() == layer_table.text()
