import contextlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from tinytrain_ext.errors import ImageError
from tinytrain_ext.images import (
    MAX_PIXELS,
    MAX_PIXELS_WHOLE,
    Augmentation,
    apply_augmentation,
    draw_augmentation,
    draw_augmentations,
    load_folder,
    load_image,
    load_images,
    normalise,
)


def gradient(width=200, height=160):
    """A picture whose red grows to the right and whose green grows downward."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 64)], axis=2).astype(np.uint8))


def loaded(tmp_path, image, name="photo.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return load_image(path)


def test_resize_and_centre_crop(tmp_path):
    photo = loaded(tmp_path, gradient(292, 292))
    assert photo.shape == (128, 128, 3)
    assert photo.dtype == np.uint8
    # the crop keeps 128 / 146 of the side: red runs from 6.2 % to 93.8 % of its range
    edge = 255 * (1 - 128 / 146) / 2
    assert photo[64, 0, 0] == pytest.approx(edge, abs=2)
    assert photo[64, 127, 0] == pytest.approx(255 - edge, abs=2)
    assert photo[0, 64, 1] == pytest.approx(edge, abs=2)
    wide = loaded(tmp_path, gradient(876, 292))
    assert wide[64, 0, 0] == pytest.approx(127.5 - (127.5 - edge) / 3, abs=2)
    assert wide[0, 64, 1] == pytest.approx(edge, abs=2)


def test_resize_is_antialiased(tmp_path):
    checkers = np.indices((1460, 1460)).sum(axis=0) % 2 * 255
    photo = loaded(tmp_path, Image.fromarray(checkers.astype(np.uint8)))
    assert np.abs(photo.astype(int) - 127).max() <= 2


def test_sizes_are_parameters(tmp_path):
    path = tmp_path / "photo.png"
    gradient().save(path)
    assert load_image(path, resize=40, input_size=32).shape == (32, 32, 3)
    with pytest.raises(ValueError, match="input_size: expected 1 to resize = 40, got 41"):
        load_image(path, resize=40, input_size=41)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (7, 5)])
def test_tiny_and_slim_images(tmp_path, size):
    photo = loaded(tmp_path, Image.new("RGB", size, (10, 20, 30)))
    np.testing.assert_array_equal(photo, np.broadcast_to((10, 20, 30), (128, 128, 3)))


def test_jpeg_by_draft_is_close_to_the_whole(tmp_path):
    picture = gradient(1600, 1200)
    whole = loaded(tmp_path, picture)
    draft = loaded(tmp_path, picture, "photo.jpg", quality=95)
    assert np.abs(whole.astype(int) - draft).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation(tmp_path, orientation, suffix):
    upright = gradient(160, 160)
    # what a camera stores so that the viewer's turn makes it upright again
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = loaded(tmp_path, stored, f"photo.{suffix}", exif=exif)
    reference = loaded(tmp_path, upright, f"reference.{suffix}")
    assert np.abs(photo.astype(int) - reference).max() <= 8


@pytest.mark.parametrize("exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff"])
def test_damaged_exif_is_no_reason_to_refuse_a_photo(tmp_path, exif):
    photo = loaded(tmp_path, gradient(), "photo.jpg", exif=exif)
    reference = loaded(tmp_path, gradient(), "reference.jpg")
    np.testing.assert_array_equal(photo, reference)


def test_odd_modes(tmp_path):
    grey = np.linspace(0, 255, 200).astype(np.uint8)[None].repeat(200, axis=0)
    expected = loaded(tmp_path, Image.fromarray(grey))
    assert (expected[..., 0] == expected[..., 2]).all()

    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    assert wide.mode == "I;16"
    assert np.abs(loaded(tmp_path, wide).astype(int) - expected).max() <= 1

    opaque = Image.merge("LA", (Image.fromarray(grey), Image.new("L", (200, 200), 255)))
    assert np.abs(loaded(tmp_path, opaque).astype(int) - expected).max() <= 1

    cmyk = loaded(tmp_path, Image.new("CMYK", (200, 200), (0, 255, 255, 0)), "photo.jpg")
    assert np.abs(cmyk[64, 64].astype(int) - (255, 0, 0)).max() <= 3

    grey_jpeg = loaded(tmp_path, Image.fromarray(grey), "photo.jpg", quality=95)
    assert np.abs(grey_jpeg.astype(int) - expected).max() <= 4

    bits = loaded(tmp_path, Image.fromarray(grey > 127))
    assert set(np.unique(bits[:, :50])) == {0}
    assert set(np.unique(bits[:, -50:])) == {255}

    palette = gradient().quantize(256)
    assert palette.mode == "P"
    assert np.abs(loaded(tmp_path, palette).astype(int) - loaded(tmp_path, gradient())).max() < 24


def png(width, height, depth, colour, rows, *chunks):
    """A PNG by hand, for kinds Pillow does not write."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            *(chunk(*extra) for extra in chunks),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        )
    )


def test_16_bit_colour(tmp_path):
    pixel = struct.pack(">HHH", 0x1234, 0x80FF, 0xFF00)
    path = tmp_path / "deep.png"
    path.write_bytes(png(4, 4, 16, 2, (b"\x00" + pixel * 4) * 4))
    np.testing.assert_array_equal(load_image(path)[64, 64], (0x12, 0x80, 0xFF))


def test_transparency_is_white(tmp_path):
    clear = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    assert (loaded(tmp_path, clear) == 255).all()
    half = Image.new("RGBA", (200, 200), (0, 0, 0, 128))
    assert np.abs(loaded(tmp_path, half).astype(int) - 127).max() <= 1
    grey = Image.new("LA", (200, 200), (0, 0))
    assert (loaded(tmp_path, grey) == 255).all()
    # transparent by a palette entry, and by one colour of an RGB image
    palette = Image.new("P", (200, 200), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (loaded(tmp_path, palette, transparency=0) == 255).all()
    path = tmp_path / "key.png"
    rows = (b"\x00" + bytes((1, 2, 3)) * 4) * 4
    path.write_bytes(png(4, 4, 8, 2, rows, (b"tRNS", struct.pack(">HHH", 1, 2, 3))))
    assert (load_image(path) == 255).all()


@pytest.mark.parametrize(
    "content",
    [b"\x00", b"not an image", b"GIF89a" + bytes(100), b"BM" + bytes(100), b"\xff\xd8\xff\xe0"],
)
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "odd.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"odd\.jpg: not a JPEG or PNG image"):
        load_image(path)


def test_empty_missing_and_special_files(tmp_path):
    path = tmp_path / "empty.jpg"
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"empty\.jpg: empty"):
        load_image(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_image(tmp_path / "missing.jpg")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        load_image(tmp_path)


@pytest.mark.parametrize("kind", ["gif", "bmp", "tiff", "webp"])
def test_other_formats_are_refused(tmp_path, kind):
    path = tmp_path / "photo.jpg"
    gradient().save(path, format=kind)
    with pytest.raises(ImageError, match="not a JPEG or PNG image"):
        load_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_files_are_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    for share in (0.01, 0.3, 0.7, 0.95):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ImageError, match=rf"cut\.{suffix}: "):
            load_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_damage_anywhere_is_an_error_by_name_or_harmless(tmp_path, suffix):
    path = tmp_path / f"damaged.{suffix}"
    gradient(60, 50).save(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(content), 200):
        damaged = bytearray(content)
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with contextlib.suppress(ImageError):
            load_image(path)


def test_pixel_caps_are_checked_in_the_header(tmp_path):
    """The pictures are not there: the header alone must do."""
    path = tmp_path / "huge.png"
    path.write_bytes(png(6000, 4001, 8, 2, b""))
    assert MAX_PIXELS_WHOLE == 24_000_000
    with pytest.raises(
        ImageError, match=r"huge\.png: expected at most 24 million pixels, got 6000"
    ):
        load_image(path)
    path.write_bytes(png(100_000, 100_000, 8, 2, b""))
    with pytest.raises(ImageError, match=r"huge\.png: "):
        load_image(path)

    for progressive, size in ((False, (10_000, 8_001)), (True, (6000, 4001))):
        path = tmp_path / "huge.jpg"
        Image.new("RGB", (16, 16)).save(path, progressive=progressive)
        content = path.read_bytes()
        start = content.index(b"\xff\xc2" if progressive else b"\xff\xc0") + 5
        sides = struct.pack(">HH", size[1], size[0])
        path.write_bytes(content[:start] + sides + content[start + 4 :])
        assert size[0] * size[1] > (MAX_PIXELS_WHOLE if progressive else MAX_PIXELS)
        with pytest.raises(ImageError, match=r"huge\.jpg: expected at most \d+ million pixels"):
            load_image(path)


MEMORY_SCRIPT = """
import sys
from tinytrain_ext.images import load_image

def peak():
    with open("/proc/self/status") as status:
        return int(status.read().split("VmHWM:")[1].split()[0]) * 1024

load_image(sys.argv[1])
before = peak()
load_image(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_12_megapixel_jpeg_costs_little(tmp_path):
    gradient().save(tmp_path / "small.jpg")
    gradient().resize((4000, 3000)).save(tmp_path / "large.jpg", quality=92)
    files = [str(tmp_path / name) for name in ("small.jpg", "large.jpg")]
    command = [sys.executable, "-c", MEMORY_SCRIPT, *files]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(output) < 12_000_000


def make_folder(root, classes):
    for name, count in classes.items():
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(count):
            gradient(40 + index, 40).save(folder / f"{index}.png")
    return root


def test_load_folder(tmp_path):
    root = make_folder(tmp_path, {"b": 3, "a": 2})
    (root / ".hidden").mkdir()
    (root / "a" / ".DS_Store").write_bytes(b"x")
    calls = []
    data = load_folder(root, progress=lambda done, total: calls.append((done, total)))
    assert data.classes == ("a", "b")
    assert data.images.shape == (5, 128, 128, 3)
    assert data.images.dtype == np.uint8
    np.testing.assert_array_equal(data.labels, [0, 0, 1, 1, 1])
    assert data.labels.dtype == np.int64
    assert [path.parent.name + path.name for path in data.paths] == [
        "a0.png",
        "a1.png",
        "b0.png",
        "b1.png",
        "b2.png",
    ]
    assert calls == [(n, 5) for n in range(1, 6)]
    np.testing.assert_array_equal(data.images, load_images(data.paths))


def test_folders_that_will_not_do_are_refused_by_name(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="missing"):
        load_folder(tmp_path / "missing")
    with pytest.raises(ValueError, match=rf"{tmp_path}: expected .* two classes, got none"):
        load_folder(tmp_path)
    make_folder(tmp_path, {"cat": 2})
    with pytest.raises(ValueError, match="two classes, got only 'cat'"):
        load_folder(tmp_path)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / ".hidden").write_bytes(b"")
    with pytest.raises(ValueError, match="dog: no photos in this class folder"):
        load_folder(tmp_path)
    (tmp_path / "dog" / "puppies").mkdir()
    with pytest.raises(ValueError, match="puppies: a folder inside a class folder"):
        load_folder(tmp_path)
    (tmp_path / "dog" / "puppies").rmdir()
    (tmp_path / "dog" / "notes.txt").write_text("woof")
    with pytest.raises(ImageError, match=r"notes\.txt: not a JPEG or PNG image"):
        load_folder(tmp_path)
    (tmp_path / "dog" / "notes.txt").unlink()
    gradient().save(tmp_path / "dog" / "rex.jpg")
    (tmp_path / "README").write_text("about")
    assert len(load_folder(tmp_path).images) == 3
    assert "README: ignored" in caplog.text


def test_class_names_that_do_not_print_are_refused(tmp_path):
    make_folder(tmp_path, {"good": 1, "bad\n": 1})
    with pytest.raises(ValueError, match="characters that do not print"):
        load_folder(tmp_path)


def test_draw_augmentation_keeps_to_its_ranges_and_seed():
    drawn = draw_augmentation(2000, 128, np.random.default_rng(0))
    again = draw_augmentation(2000, 128, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn.parameters, again.parameters)
    flip, x, y, brightness, saturation, contrast = drawn.parameters.T
    assert set(np.unique(flip)) == {0, 1}
    assert 0.4 < flip.mean() < 0.6
    for shift in (x, y):
        assert (shift == np.round(shift)).all()
        assert shift.min() == -16
        assert shift.max() == 16
    assert -0.225 <= brightness.min() < -0.2
    assert 0.2 < brightness.max() <= 0.225
    assert 0 <= saturation.min() < 0.1
    assert 1.9 < saturation.max() <= 2
    assert 0.5 <= contrast.min() < 0.55
    assert 1.45 < contrast.max() <= 1.5


def test_each_kind_is_left_out_of_a_tenth_of_the_draws():
    rng = np.random.default_rng(0)
    neutral = np.array([0, 0, 0, 0, 1, 1], np.float32)
    changed = np.mean(
        [(draw_augmentation(8, 128, rng).parameters != neutral).any(axis=0) for _ in range(600)],
        axis=0,
    )
    assert (np.abs(changed - 0.9) < 0.05).all()


def test_draws_are_the_same_one_by_one_and_together():
    one, together = np.random.default_rng(0), np.random.default_rng(0)
    for drawn in draw_augmentations(7, 5, 100, together):
        assert drawn.parameters.flags.c_contiguous
        np.testing.assert_array_equal(drawn.parameters, draw_augmentation(5, 100, one).parameters)
    assert one.random() == together.random()


def test_draws_are_spread_evenly_over_their_ranges():
    drawn = [d.parameters for d in draw_augmentations(3000, 8, 128, np.random.default_rng(1))]
    flip, x, y, *rest = np.concatenate(drawn).T
    expected = len(flip) * 0.9
    assert abs(flip.sum() - expected / 2) < 5 * np.sqrt(expected / 4)
    for shift in (x, y):  # where not left out, and 0 there; each kind is used for whole draws
        counts = np.bincount(shift.astype(int) + 16, minlength=33)
        assert (np.abs(np.delete(counts, 16) - expected / 33) < 6 * np.sqrt(expected / 33)).all()
    for values, low, high, neutral in zip(
        rest, (-0.225, 0, 0.5), (0.225, 2, 1.5), (0, 1, 1), strict=True
    ):
        used = np.sort((values[values != neutral] - low) / (high - low))
        assert np.abs(used - np.linspace(0, 1, len(used))).max() < 2 / np.sqrt(len(used))


def test_augmentation_checks_its_array():
    with pytest.raises(TypeError, match="parameters: expected float32, got float64"):
        Augmentation(np.zeros((3, 6)))
    with pytest.raises(ValueError, match=r"parameters: expected shape \(N, 6\), got \(3, 5\)"):
        Augmentation(np.zeros((3, 5), np.float32))
    drawn = draw_augmentation(5, 128, np.random.default_rng(0))
    assert len(drawn) == 5
    np.testing.assert_array_equal(drawn[1:3].parameters, drawn.parameters[1:3])


def one(flip=0, x=0, y=0, brightness=0, saturation=1, contrast=1):
    return Augmentation(np.array([[flip, x, y, brightness, saturation, contrast]], np.float32))


def test_apply_augmentation_by_its_definition():
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    x = normalise(photo, dtype=np.float64)
    assert x.min() >= -1
    assert x.max() <= 1

    def applied(**kinds):
        return apply_augmentation(photo, one(**kinds), dtype=np.float64)

    np.testing.assert_allclose(applied(), x)
    np.testing.assert_allclose(applied(flip=1), x[:, :, ::-1])
    np.testing.assert_allclose(applied(brightness=0.125), x + 0.125)
    grey = x.mean(axis=3, keepdims=True)
    np.testing.assert_allclose(applied(saturation=0), np.repeat(grey, 3, axis=3), atol=1e-15)
    np.testing.assert_allclose(applied(contrast=0.5), x.mean() + 0.5 * (x - x.mean()))
    moved = applied(x=3, y=-2)
    np.testing.assert_allclose(moved[:, :6, 3:], x[:, 2:, :5])
    assert (moved[:, 6:] == 0).all()
    assert (moved[:, :, :3] == 0).all()
    assert (applied(x=8) == 0).all()
    assert (applied(y=-9) == 0).all()
    # all of them at once, in order
    expected = x + 0.125
    grey = expected.mean(axis=3, keepdims=True)
    expected = grey + 0.5 * (expected - grey)
    expected = expected.mean() + 1.25 * (expected - expected.mean())
    expected = np.roll(expected[:, :, ::-1], 1, axis=2)
    expected[:, :, 0] = 0
    every = applied(flip=1, x=1, brightness=0.125, saturation=0.5, contrast=1.25)
    np.testing.assert_allclose(every, expected)
    assert apply_augmentation(photo, one()).dtype == np.float32


def test_apply_augmentation_needs_a_row_an_image():
    with pytest.raises(ValueError, match="augmentation: expected 2 rows, got 1"):
        apply_augmentation(np.zeros((2, 8, 8, 3), np.uint8), one())
