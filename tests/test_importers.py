import contextlib
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from tinytrain_ext.architectures import ARCHITECTURES, architecture_of, operations
from tinytrain_ext.importers import MAX_PICKLE_BYTES, import_int8

# What NumPy 1 wrote and NumPy 2 calls numpy._core.
_MODULE = np.zeros(1).__reduce__()[0].__module__


def convolution(rng, in_channels, out_channels, kernel=1, stride=1, depthwise=False, y_zero=-128):
    groups = in_channels if depthwise else 1
    shape = (out_channels, in_channels // groups, kernel, kernel)
    return {
        "in_channel": in_channels,
        "in_shape": 16,
        "out_channel": out_channels,
        "out_shape": 16 // stride,
        "kernel_size": (kernel, kernel),
        "stride": stride,
        "groups": groups,
        "depthwise": depthwise,
        "act": None,
        "params": {
            "weight": rng.integers(-127, 128, shape).astype(np.int8),
            "bias": rng.integers(-1000, 1000, out_channels).astype(np.int32),
            "x_scale": 0.01,
            "x_zero": 0,
            "y_scale": 0.02,
            "y_zero": y_zero,
            "w_scales": rng.uniform(0.001, 0.01, out_channels).astype(np.float32),
        },
    }


def description():
    rng = np.random.default_rng(0)
    return {
        "first_conv": convolution(rng, 3, 8, kernel=3, stride=2),
        "blocks": [
            {
                "pointwise1": None,
                "depthwise": convolution(rng, 8, 8, kernel=3, depthwise=True),
                "pointwise2": convolution(rng, 8, 8, y_zero=3),
                "residual": None,
                "se": None,
            },
            {
                "pointwise1": convolution(rng, 8, 16),
                "depthwise": convolution(rng, 16, 16, kernel=5, depthwise=True),
                "pointwise2": convolution(rng, 16, 8, y_zero=0),
                "residual": {"scale": 1.0},
                "se": None,
            },
        ],
        "feature_mix": None,
        "classifier": None,
    }


def write(path, content):
    """Writes `content` as a release file; anything but bytes is pickled as NumPy 1 did."""
    if not isinstance(content, bytes):
        content = pickle.dumps(content, protocol=2)
        content = content.replace(_MODULE.encode(), b"numpy.core.multiarray")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3")
    return path


def test_dequantisation_and_graph(tmp_path):
    source = description()
    network = import_int8(write(tmp_path / "net.pkl", source))
    kinds = [(operation.kind, operation.activation) for operation in network.operations]
    assert kinds == [
        ("conv", "relu6"),
        ("conv", "relu6"),
        ("conv", "none"),
        ("conv", "relu6"),
        ("conv", "relu6"),
        ("conv", "none"),
        ("add", "none"),
        ("global_average_pool", "none"),
    ]
    assert network.operations[6].inputs == (3, 6)
    assert [operation.block for operation in network.operations] == [None, 0, 0, 1, 1, 1, 1, None]
    assert (network.name, network.input_size, network.resize) == ("net", 16, 18)
    params = source["blocks"][1]["depthwise"]["params"]
    np.testing.assert_allclose(
        network.weights[4], params["weight"] * params["w_scales"][:, None, None, None], rtol=1e-6
    )
    np.testing.assert_allclose(
        network.biases[4], params["bias"] * params["w_scales"] * params["x_scale"], rtol=1e-6
    )


def test_a_feature_mix_in_the_file_is_read(tmp_path):
    source = description()
    source["feature_mix"] = convolution(np.random.default_rng(1), 8, 32)
    network = import_int8(write(tmp_path / "net.pkl", source))
    assert network.feature_dim == 32
    assert network.operations[-2].block is None
    with pytest.raises(ValueError, match="feature_mix: net has none"):
        import_int8(tmp_path / "net.pkl", feature_mix="random")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("blocks"), "file: blocks is missing"),
        (lambda d: d.update(blocks={}), "file.blocks: unexpected dict"),
        (lambda d: d["blocks"].append(None), r"blocks\[2\]: pointwise1 is missing"),
        (
            lambda d: d["blocks"][0].update(depthwise=None),
            r"blocks\[0\].depthwise: expected a conv",
        ),
        (lambda d: d["blocks"][0].update(se={}), "squeeze-and-excitation is not supported"),
        (lambda d: d["first_conv"].update(act="swish"), "first_conv.act: expected None"),
        (lambda d: d["first_conv"].update(stride=None), "first_conv.stride: unexpected NoneType"),
        (lambda d: d["first_conv"].update(kernel_size=(3, 5)), "kernel_size: expected a square"),
        (lambda d: d["first_conv"].update(out_channel=10**9), r"operation 0 \(conv\)"),
        (lambda d: d["first_conv"].update(in_channel=4), "in_channels: expected 3"),
        (lambda d: d["first_conv"]["params"].update(weight=3), "params.weight: unexpected int"),
        (
            lambda d: d["first_conv"]["params"].update(weight=np.zeros((8, 3, 3, 3), np.float32)),
            "weight: expected int8, got float32",
        ),
        (
            lambda d: d["first_conv"]["params"].update(weight=np.zeros((8, 3, 3), np.int8)),
            r"expected weight \(O, C, K, K\)",
        ),
        (
            lambda d: d["first_conv"]["params"].update(bias=np.zeros(4, np.int32)),
            r"expected weight \(O, C, K, K\)",
        ),
        (
            lambda d: d["first_conv"]["params"].update(w_scales=np.full(8, np.nan, np.float32)),
            r"weights\[0\]: expected finite numbers",
        ),
        (
            lambda d: d["first_conv"]["params"].update(x_scale=float("inf")),
            r"biases\[0\]: expected finite numbers",
        ),
        (lambda d: d["first_conv"]["params"].update(y_zero=0.0), "y_zero: unexpected float"),
    ],
)
def test_a_file_with_one_thing_wrong_is_refused_by_name(tmp_path, change, message):
    source = description()
    change(source)
    path = write(tmp_path / "net.pkl", source)
    with pytest.raises(ValueError, match=message) as error:
        import_int8(path)
    assert str(error.value).startswith(f"{path}: ")


class Foreign:
    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Foreign(os.system, "touch owned"), "refused global (posix|nt).system"),
        (Foreign(eval, "1"), r"refused global \w+.eval"),
        (Foreign(getattr, {}, "keys"), r"refused global \w+.getattr"),
        (np.array([{}], dtype=object), "dtype: expected one of"),
        (np.zeros(4, np.float64), "dtype: expected one of"),
        (np.zeros(4, ">i4"), "byte order: expected little endian"),
        (b"", "EOFError"),
        # a memo index of four billion
        (b"\x80\x02Nr\xff\xff\xff\xff.", "file: first_conv is missing"),
        (b"cnumpy\nndarray\n(tR.", "file: first_conv is missing"),
        (b"not a pickle", "archive/data.pkl"),
        # codecs.encode with a codec of the attacker's choice
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.", "refused 1"),
        # _reconstruct of a huge array: the stand-in allocates nothing; no network comes of it
        (
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x8a\x06"
            b"\x00\x00\x00\x00\x00\x01\x85U\x01b\x87R.",
            "file: first_conv is missing",
        ),
    ],
)
def test_hostile_pickles_are_refused_and_never_run(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "hostile.pkl", content)
    with pytest.raises(ValueError, match=message):
        import_int8(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hostile.pkl"]


def test_repeated_encoding_is_capped(tmp_path):
    """One memoised string, encoded over and over, would fill any memory."""
    text = b"a" * 1000
    content = b"\x80\x02(X" + struct.pack("<I", len(text)) + text + b"q\x000"
    content += b"c_codecs\nencode\nh\x00U\x06latin1\x86R" * 1000 + b"t."
    with pytest.raises(ValueError, match=r"_codecs\.encode: refused 1000 characters"):
        import_int8(write(tmp_path / "bomb.pkl", content))


def test_damage_anywhere_is_an_error_by_name_or_harmless(tmp_path):
    path = write(tmp_path / "net.pkl", description())
    with zipfile.ZipFile(path) as archive:
        content = archive.read("archive/data.pkl")
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(content), 400):
        damaged = bytearray(content)
        damaged[position] ^= int(rng.integers(1, 256))
        with contextlib.suppress(ValueError):
            import_int8(write(path, bytes(damaged)))


def test_zip_bombs_and_damaged_zips(tmp_path):
    path = tmp_path / "bomb.pkl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(MAX_PICKLE_BYTES + 1))
    with pytest.raises(ValueError, match=f"expected at most {MAX_PICKLE_BYTES} bytes"):
        import_int8(path)
    content = write(path, description()).read_bytes()
    for damaged in (b"", content[:100], content[:-30], content.replace(b"data", b"atad")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a sound zip"):
            import_int8(path)
    path.write_bytes(content.replace(b"depthwise", b"depthwisf"))
    with pytest.raises(ValueError, match="Bad CRC-32"):
        import_int8(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        import_int8(tmp_path / "nowhere.pkl")
    with path.open("wb") as file:
        file.truncate(1 << 27)
    with pytest.raises(ValueError, match="file size: expected at most"):
        import_int8(path)


def test_the_stand_ins_read_what_numpy_wrote(tmp_path):
    """C and Fortran order, and every type the files use."""
    source = description()
    weight = source["first_conv"]["params"]["weight"]
    path = write(tmp_path / "net.pkl", source)
    expected = import_int8(path).weights[0]
    source["first_conv"]["params"]["weight"] = np.asfortranarray(weight)
    np.testing.assert_array_equal(import_int8(write(path, source)).weights[0], expected)
    buffer = io.BytesIO(path.read_bytes())
    assert zipfile.is_zipfile(buffer)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_release_files(imported_networks, release_files, name):
    network = imported_networks[name]
    assert network.name == name
    assert network.operations == operations(ARCHITECTURES[name])
    assert network.feature_dim == {"mcunet": 160, "mobilenetv2": 112, "proxylessnas": 96}[name]
    path = release_files[name]
    if ARCHITECTURES[name].feature_mix is None:
        with pytest.raises(ValueError, match="feature_mix: mcunet has none"):
            import_int8(path, feature_mix="random")
        return
    first, second, other = (import_int8(path, feature_mix="random", seed=s) for s in (1, 1, 2))
    assert first.operations == operations(ARCHITECTURES[name], feature_mix=True)
    assert architecture_of(first.operations) is ARCHITECTURES[name]
    np.testing.assert_array_equal(first.weights[-1], second.weights[-1])
    assert (first.weights[-1] != other.weights[-1]).any()
    np.testing.assert_array_equal(first.weights[7], network.weights[7])
