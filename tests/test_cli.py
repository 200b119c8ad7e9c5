"""The command line: documents, exit codes, and everything wrong that a user can hand to it."""

import json
import os
import pickle
import pty
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks import shapes_task, tiny_network
from tinytrain_ext.architectures import ARCHITECTURES, random_network
from tinytrain_ext.cli import ProgressBar, _parse_size, main
from tinytrain_ext.network import Network

NAMES = ("crosses", "lines", "waves")


def save_photos(directory, seed, shots):
    images, labels = shapes_task(ways=len(NAMES), shots=shots, seed=seed, size=48)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = directory / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:02}.png")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "tiny.safetensors"
    tiny_network().save(path)
    return path


@pytest.fixture(scope="module")
def query(tmp_path_factory):
    directory = tmp_path_factory.mktemp("query")
    save_photos(directory, seed=1, shots=3)
    return directory


@pytest.fixture
def support(tmp_path):
    directory = tmp_path / "support"
    save_photos(directory, seed=0, shots=3)
    return directory


@pytest.fixture
def out(tmp_path):
    """A file to write, alone in its folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "adapted.safetensors"


# The tiny network needs almost no memory, but its late layers hold most of its MACs.
BUDGET = ("--compute", "0.6", "--iterations", "3")


def run(capsys, *arguments):
    """Exit code, stdout and stderr of one command."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def document_of(capsys, *arguments):
    """The JSON document of a command that succeeds and says nothing else."""
    code, text, errors = run(capsys, *arguments, "--json")
    assert (code, errors) == (0, "")
    return json.loads(text)


def adapt_arguments(network, support, out):
    return ["adapt", "--network", network, "--support", support, "--out", out, *BUDGET]


def test_adapt_and_classify(capsys, network, support, query, out):
    found = document_of(capsys, *adapt_arguments(network, support, out), "--query", query)
    assert found["classes"] == list(NAMES)
    assert (found["support_images"], found["query_images"]) == (9, 9)
    assert 0 <= found["accuracy_before"] <= 1
    assert 0 <= found["accuracy_after"] <= 1
    assert found["criterion"] == "tinytrain"
    assert found["policy"]["layers"]
    for entry in found["policy"]["layers"]:
        assert entry["axis"] == "out"
        assert 0 < len(entry["channels"]) <= entry["of"]
    assert found["compute_share"] <= 0.6
    for phase in found["planned"].values():
        assert sum(phase["bytes_by_kind"].values()) == phase["peak_bytes"]
    peaks = [phase["peak_bytes"] for phase in found["planned"].values()]
    assert found["planned_peak_bytes"] == max(peaks) <= 1 << 20
    assert 0 < found["arena_high_water_bytes"] <= found["planned_peak_bytes"]
    assert found["peak_resident_growth_bytes"] >= 0
    assert set(found["seconds"]) == {"load", "embed", "fisher", "selection", "fine_tuning"}
    assert len(found["loss"]) == 3

    adapted = Network.load(out)
    assert adapted.classes == NAMES
    assert adapted.unknown_below == found["unknown_below"]
    photos = sorted(query.rglob("*.png"))
    named = document_of(capsys, "classify", "--network", out, *photos)
    assert named["unknown_below"] == adapted.unknown_below
    assert [photo["file"] for photo in named["photos"]] == [str(path) for path in photos]
    for photo in named["photos"]:
        assert sum(photo["probabilities"].values()) == pytest.approx(1)
        assert photo["probability"] == max(photo["probabilities"].values())
        unknown = photo["probability"] < adapted.unknown_below
        assert photo["label"] == (
            "unknown" if unknown else max(NAMES, key=photo["probabilities"].get)
        )
    right = [
        max(NAMES, key=photo["probabilities"].get) == Path(photo["file"]).parent.name
        for photo in named["photos"]
    ]
    assert np.mean(right) == found["accuracy_after"]
    sure = document_of(capsys, "classify", "--network", out, *photos, "--unknown-below", 1)
    assert {photo["label"] for photo in sure["photos"]} == {"unknown"}


def test_adapt_names_the_criterion_it_selected_by(capsys, network, support, out):
    options = ("--criterion", "held_out", "--iterations", 1, "--seed", 1 << 40)
    found = document_of(capsys, *adapt_arguments(network, support, out), *options)
    assert found["criterion"] == "held_out"


def test_adapt_with_cached_views_and_frozen_bytes(capsys, network, support, out, tmp_path):
    options = ("--views", 2, "--frozen-weights", "int8", "--cache-dir", tmp_path)
    common = adapt_arguments(network, support, out)
    found = document_of(capsys, *common, *options, "--ratio", 0.1, "--compute", 0.01)
    assert found["cache_bytes"] > 0
    tight = document_of(capsys, *common, *options, "--ratio", 0.1, "--compute", 0.01, "--cache", 10)
    assert tight["cache_bytes"] == 0
    assert tight["loss"] == found["loss"]
    code, text, _ = run(capsys, *common, *options, "--ratio", 0.1, "--compute", 0.01)
    assert code == 0
    assert "views behind the frozen layers" in text
    code, _, errors = run(capsys, *common, "--views", 2, "--cache-dir", tmp_path / "nowhere")
    assert (code, "--cache-dir: expected a folder, got" in errors) == (2, True)
    code, _, errors = run(capsys, *common, "--cache-dir", tmp_path)
    assert (code, "--cache-dir: has no use without --views" in errors) == (2, True)


def test_what_people_see(capsys, network, support, query, out):
    code, text, errors = run(capsys, *adapt_arguments(network, support, out), "--query", query)
    assert (code, errors) == (0, "")
    for part in ("layer ", "planned peak", "measured", "fine-tuning", "accuracy", str(out)):
        assert part in text
    photo = query / "lines" / "03.png"
    code, text, errors = run(capsys, "classify", "--network", out, photo)
    assert (code, errors) == (0, "")
    assert text.startswith(f"{photo}  ")
    code, text, errors = run(capsys, "profile", network, "--compute", "0.6")
    assert (code, errors) == (0, "")
    assert "FullTrain" in text


def test_the_result_depends_on_the_seed_alone(capsys, network, support, out):
    def adapted(*options):
        document_of(capsys, *adapt_arguments(network, support, out), *options)
        return out.read_bytes()

    first = adapted()
    assert adapted("--threads", 2) == first
    assert adapted("--seed", 1) != first


def test_query_folders_may_lack_a_class_but_have_no_other(capsys, network, support, query, out):
    part = query.parent / "part"
    for name in NAMES[1:]:
        photo = sorted((query / name).iterdir())[0]
        (part / name).mkdir(parents=True)
        (part / name / photo.name).write_bytes(photo.read_bytes())
    found = document_of(capsys, *adapt_arguments(network, support, out), "--query", part)
    assert found["query_images"] == 2
    out.unlink()
    (part / "lines").rename(part / "dots")
    code, text, errors = run(capsys, *adapt_arguments(network, support, out), "--query", part)
    assert (code, text) == (2, "")
    assert "class 'dots' is not in the support set; expected folders named crosses" in errors
    assert not out.exists()


def test_profile(capsys, tmp_path, network):
    path = tmp_path / "mcunet.safetensors"
    random_network(ARCHITECTURES["mcunet"], np.random.default_rng(0)).save(path)
    found = document_of(capsys, "profile", path)
    assert found["total"]["weights"] == sum(row["weights"] for row in found["layers"]) == 463_216
    assert found["total"]["macs"] == sum(row["macs"] for row in found["layers"]) == 22_453_504
    methods = {row["method"]: row for row in found["methods"]}
    assert list(methods) == ["None", "FullTrain", "LastLayer", "SparseUpdate", "TinyTrain"]
    assert methods["FullTrain"]["backward_macs"] == 44_907_008
    assert methods["LastLayer"]["paper_bytes"] == round(2.03125 * (1 << 20))
    assert methods["SparseUpdate"]["backward_macs"] == 11_882_240
    assert methods["TinyTrain"]["planned_peak_bytes"] <= 1 << 20
    assert methods["TinyTrain"]["compute_share"] <= 0.15
    # no SparseUpdate policy is published for other networks
    rows = document_of(capsys, "profile", network, "--compute", 0.6)["methods"]
    assert [row["method"] for row in rows] == ["None", "FullTrain", "LastLayer", "TinyTrain"]


def test_import(capsys, release_files, out):
    file = release_files["mcunet"]
    found = document_of(capsys, "import", file, "--out", out)
    assert (found["weights"], found["layers"]) == (463_216, 42)
    assert found["sha256"].startswith("4de2e06e")
    assert Network.load(out).name == found["network"]


def test_what_is_read_is_not_overwritten(capsys, network, tmp_path):
    before = network.read_bytes()
    for command, option in (("import", "--out"), ("export", "--onnx")):
        code, _, errors = run(capsys, command, network, option, network)
        assert code == 2
        assert "is the file that is read; give another name" in errors
    assert network.read_bytes() == before
    os.mkfifo(tmp_path / "pipe.pkl")
    code, _, errors = run(capsys, "import", tmp_path / "pipe.pkl", "--out", tmp_path / "b")
    assert (code, "pipe.pkl: expected a regular file" in errors) == (2, True)
    code, _, errors = run(capsys, "demo", "--save-images", tmp_path / "a", "--out", tmp_path / "a")
    assert (code, "is a folder; give the name of a file" in errors) == (2, True)


def test_an_interruption_while_loading_is_no_traceback():
    script = (
        "import sys, builtins, tinytrain_ext.__main__ as entry\n"
        "def interrupted(*_, **__): raise KeyboardInterrupt\n"
        "builtins.__import__ = interrupted\n"
        "sys.exit(entry.main())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "tinytrain: interrupted\n")


# Wrong input: one line on stderr that names the thing and says what to do; nothing written.


def assert_refused(capsys, code, message, arguments, out):
    found, text, errors = run(capsys, *arguments)
    assert (found, text) == (code, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert errors.startswith(f"tinytrain {arguments[0]}: ")
    assert list(out.parent.iterdir()) == []


def empty_class(support):
    (support / "dots").mkdir()


def one_class(support):
    for name in NAMES[1:]:
        for photo in (support / name).iterdir():
            photo.unlink()
        (support / name).rmdir()


def zero_bytes(support):
    (support / "lines" / "03.png").write_bytes(b"")


def truncated(support):
    path = support / "lines" / "03.png"
    path.write_bytes(path.read_bytes()[:-200])


def truncated_jpeg(support):
    path = support / "lines" / "x.jpg"
    Image.new("RGB", (200, 200)).save(path)
    path.write_bytes(path.read_bytes()[:-100])


def oversized(support):
    # 40,000 x 40,000 pixels in its header
    path = support / "lines" / "03.png"
    data = bytearray(path.read_bytes())
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    path.write_bytes(data)


def no_photo(support):
    (support / "lines" / "notes.txt").write_text("not a photo")


def pipe(support):
    os.mkfifo(support / "lines" / "pipe.png")


def nested(support):
    (support / "lines" / "more").mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (empty_class, "dots: no photos in this class folder; the layout is"),
        (zero_bytes, "03.png: empty, or not a regular file; replace or remove this file"),
        (truncated, "03.png: "),
        (truncated_jpeg, "x.jpg: "),
        (oversized, "03.png: "),
        (no_photo, "notes.txt: not a JPEG or PNG image; replace or remove this file"),
        (nested, "more: a folder inside a class folder; the layout is"),
        (pipe, "pipe.png: empty, or not a regular file; replace or remove this file"),
    ],
)
@pytest.mark.parametrize("part", ["--support", "--query"])
def test_unsound_photo_folders(capsys, network, support, query, out, spoil, message, part):
    spoil(support)
    folders = [support, query] if part == "--support" else [query, support]
    arguments = [*adapt_arguments(network, folders[0], out), "--query", folders[1]]
    assert_refused(capsys, 2, message, arguments, out)


def test_a_support_set_of_one_class(capsys, network, support, query, out):
    one_class(support)
    arguments = [*adapt_arguments(network, support, out), "--query", query]
    message = "at least two classes, got only 'crosses'; the layout is"
    assert_refused(capsys, 2, message, arguments, out)


def test_a_query_of_one_class_is_enough(capsys, network, support, query, out):
    one_class(query)
    found = document_of(capsys, *adapt_arguments(network, support, out), "--query", query)
    assert found["query_images"] == len(list((query / "crosses").iterdir()))


@pytest.mark.parametrize("spoil", [zero_bytes, truncated, oversized])
def test_classify_names_the_unsound_photo(capsys, network, support, out, spoil):
    adapted = out.parent.with_name("adapted.safetensors")
    document_of(capsys, *adapt_arguments(network, support, adapted))
    spoil(support)
    arguments = ["classify", "--network", adapted, *sorted((support / "lines").iterdir())]
    assert_refused(capsys, 2, "03.png: ", arguments, out)
    assert_refused(
        capsys, 2, "has no classes; adapt it first", [*arguments[:2], network, arguments[-1]], out
    )


def test_missing_things(capsys, tmp_path, network, support, out):
    missing = tmp_path / "missing"
    for arguments in (
        adapt_arguments(missing, support, out),
        adapt_arguments(network, missing, out),
        ["classify", "--network", missing, missing],
        ["classify", "--network", network, missing],
        ["profile", missing],
        ["import", missing, "--out", out],
    ):
        assert_refused(capsys, 2, f"{missing}: No such file or directory", arguments, out)


def test_an_impossible_budget_names_the_smallest_that_does(capsys, network, support, out):
    arguments = adapt_arguments(network, support, out)
    for option, least in (("--memory", 1000), ("--compute", 1e-4)):
        found, text, errors = run(capsys, *arguments, option, least)
        assert (found, text) == (3, "")
        assert errors.count("\n") == 1
        assert list(out.parent.iterdir()) == []
        needed = errors.split(f"give at least {option} ")[1].split()[0]
        assert document_of(capsys, *arguments, option, needed)
        out.unlink()
        smaller = str(int(needed) - 1) if option == "--memory" else f"{float(needed) - 2e-4:g}"
        assert run(capsys, *arguments, option, smaller)[0] == 3
    code, _, errors = run(capsys, *arguments, "--accounting", "paper", "--memory", "1k")
    assert (code, errors.count("\n")) == (3, 1)
    code, _, errors = run(capsys, "profile", network, "--memory", "1k")
    assert (code, errors.count("\n")) == (3, 1)


def test_unwritable_output_is_found_before_the_work(capsys, tmp_path, network, support, out):
    missing = tmp_path / "missing"
    a_file = tmp_path / "file"
    a_file.touch()
    for target, message in (
        (out.parent, "is a folder; give the name of a file"),
        (missing / "x", "cannot be written"),
        (a_file / "x", "cannot be written"),
    ):
        # the support folder is missing, too, but nobody looks yet
        assert_refused(capsys, 2, message, adapt_arguments(network, missing, target), out)
        assert_refused(capsys, 2, message, ["import", missing, "--out", target], out)
        assert_refused(capsys, 2, message, ["demo", "--network", missing, "--out", target], out)
    assert_refused(
        capsys, 2, "File exists", ["demo", "--network", missing, "--save-images", a_file], out
    )


class Foreign:
    def __reduce__(self):
        return (os.mkdir, ("foreign-global-was-run",))


def test_hostile_files(capsys, tmp_path, monkeypatch, network, support, out):
    monkeypatch.chdir(tmp_path)
    hostile = tmp_path / "hostile.pkl"
    with zipfile.ZipFile(hostile, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Foreign(), protocol=2))
    assert_refused(capsys, 2, "hostile.pkl: ", ["import", hostile, "--out", out], out)
    assert not (tmp_path / "foreign-global-was-run").exists()
    assert_refused(capsys, 2, "tinytrain import", adapt_arguments(hostile, support, out), out)

    broken = tmp_path / "broken.safetensors"
    sound = network.read_bytes()
    for data in (
        b"",
        sound[:-100],
        sound[:50],
        (1 << 62).to_bytes(8, "little") + sound[8:],
        sound.replace(b'"F32"', b'"F64"'),
        sound.replace(b"schema_version", b"schema_versiom"),
        b"\x80\x04" + pickle.dumps(Foreign()),
    ):
        broken.write_bytes(data)
        assert_refused(
            capsys, 2, "broken.safetensors: ", adapt_arguments(broken, support, out), out
        )
    assert not (tmp_path / "foreign-global-was-run").exists()


def test_weights_that_are_no_numbers(capsys, tmp_path, network, support, out):
    poisoned = tmp_path / "nan.safetensors"
    data = bytearray(network.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    poisoned.write_bytes(data)
    assert_refused(
        capsys, 2, "expected finite numbers, got NaN", adapt_arguments(poisoned, support, out), out
    )


def test_divergence(capsys, network, support, out):
    arguments = [*adapt_arguments(network, support, out), "--learning-rate", "1e38"]
    assert_refused(capsys, 1, "give a smaller --learning-rate", arguments, out)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--memory", "1MX"),
        ("--memory", "0"),
        ("--memory", "-1"),
        ("--memory", "lots"),
        ("--memory", "8589934592GiB"),
        ("--memory", "9" * 400),
        ("--memory", "0.1"),
        ("--compute", "0"),
        ("--compute", "nan"),
        ("--compute", "inf"),
        ("--ratio", "0"),
        ("--ratio", "1.5"),
        ("--iterations", "-1"),
        ("--iterations", "1e3"),
        ("--threads", "0"),
        ("--threads", "3000000000"),
        ("--views", "99999999999999"),
        ("--seed", "-1"),
        ("--learning-rate", "0"),
        ("--learning-rate", "fast"),
        ("--optimizer", "lion"),
        ("--accounting", "creative"),
    ],
)
def test_wrong_options(capsys, network, support, out, option, value):
    arguments = [*adapt_arguments(network, support, out), f"{option}={value}"]
    code, text, errors = run(capsys, *arguments)
    assert (code, text) == (2, "")
    assert f"argument {option}: " in errors


def test_wrong_usage(capsys):
    for arguments in ((), ("train",), ("adapt",), ("classify", "--network", "x")):
        code, text, errors = run(capsys, *arguments)
        assert (code, text) == (2, "")
        assert errors.startswith("usage: tinytrain")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 1 << 20),
        ("1MiB", 1 << 20),
        ("1m", 1 << 20),
        ("0.5 MiB", 1 << 19),
        ("512k", 1 << 19),
        ("512KiB", 1 << 19),
        ("100B", 100),
        ("1MB", 1_000_000),
        ("300kB", 300_000),
        ("2G", 2 << 30),
    ],
)
def test_sizes(text, size):
    assert _parse_size(text) == size


def test_stray_files_are_warned_of_unless_quiet(capsys, caplog, network, support, out):
    (support / "readme.txt").write_text("x")
    document_of(capsys, *adapt_arguments(network, support, out))
    assert "readme.txt: ignored, it is in no class folder" in caplog.text


def test_progress_bar(capsys):
    bar = ProgressBar(enabled=True)
    bar("embed", 0, 4)
    bar.phase("embed")(4, 4)
    bar("fine-tuning", 1, 40)
    bar.close()
    bar.close()
    errors = capsys.readouterr().err
    assert errors.count("\n") == 2
    assert f"[{'#' * 30}] 4/4" in errors
    ProgressBar(enabled=False)("embed", 1, 1)
    assert capsys.readouterr().err == ""


def test_progress_bar_says_how_long_a_phase_takes(capsys, monkeypatch):
    def shown(seconds, phase, done, total):
        nonlocal now
        now += seconds
        bar(phase, done, total)
        return capsys.readouterr().err.rstrip().rpartition("/")[2]

    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    bar = ProgressBar(enabled=True)
    assert shown(0, "tasks", 20, 90) == "90"  # resumed: 20 took no time
    assert shown(2, "tasks", 21, 90) == "90"  # too soon to tell
    assert shown(18, "tasks", 22, 90) == "90, 12 min left"  # 68 of 10 s
    assert shown(0, "decoding", 0, 400) == "400"
    assert shown(10, "decoding", 100, 400) == "400, 30 s left"
    assert shown(570, "tasks", 24, 90) == "90, 2 h 45 min left"  # 66 of 150 s
    assert shown(5, "decoding", 1, 400) == "400"  # once more from the start
    assert shown(9000, "tasks", 90, 90) == "90"


def command(*arguments):
    return [sys.executable, "-m", "tinytrain_ext", *map(str, arguments)]


def test_an_interrupted_run_leaves_no_file(network, support, out):
    controller, terminal = pty.openpty()
    arguments = adapt_arguments(network, support, out)
    process = subprocess.Popen(
        command(*arguments, "--iterations", 10**7),
        stdout=subprocess.PIPE,
        stderr=terminal,
        close_fds=True,
        # A shell's background jobs ignore Ctrl-C, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(terminal)
    shown = b""
    while b"fine-tuning" not in shown:  # the bar of a run that is well under way
        shown += os.read(controller, 1024)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    while b"interrupted" not in shown:
        shown += os.read(controller, 1024)
    os.close(controller)
    assert process.returncode == 130
    assert text == b""
    assert b"Traceback" not in shown
    assert list(out.parent.iterdir()) == []


def test_a_reader_that_has_gone(network):
    reading, writing = os.pipe()
    os.close(reading)
    arguments = command("profile", network, "--compute", "0.6", "--quiet")
    done = subprocess.run(arguments, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_quiet_means_quiet(network, support, out):
    (support / "readme.txt").write_text("x")
    arguments = command(*adapt_arguments(network, support, out), "--json")
    loud = subprocess.run(arguments, capture_output=True, check=True)
    assert b"readme.txt: ignored" in loud.stderr
    assert json.loads(loud.stdout)
    quiet = subprocess.run([*arguments, "--quiet"], capture_output=True, check=True)
    assert quiet.stderr == b""
    assert json.loads(quiet.stdout)
