"""Label maps as people have them: numbers and colours, formats, lists of classes, odd files."""
import os
import zlib

import numpy as np
import pytest
from PIL import Image
from test_datasets import message, write_png

from sac_lit.datasets import FileError, open_dataset, open_rgb, read_classes
from sac_lit.image_files import (
    LABEL_SUFFIXES,
    MOST_PIXELS,
    open_image,
    read_class_table,
    read_lines,
    read_numbers,
)

NUMBERS = np.array([[0, 0, 7, 7], [2, 2, 255, 0], [0, 7, 7, 7]], np.uint8)
COLOURS = "- #000000\n7 water #0000ff\nroad #804080\n255 -"


@pytest.fixture
def table(tmp_path):
    def table(text):
        (tmp_path/"classes.txt").write_text(text)
        return read_class_table(tmp_path/"classes.txt")
    return table


def paint(numbers, colours):
    "A picture of a label map."
    flat = [colours[n] for n in numbers.ravel().tolist()]
    rgb = [[c >> shift & 255 for shift in (16, 8, 0)] for c in flat]
    return Image.fromarray(np.array(rgb, np.uint8).reshape(*numbers.shape, 3))


def folders(root, label=NUMBERS, name="a.png", image="a.jpg", **options):
    "A data set of one image and one label map, saved under a name."
    for folder in ("photos", "maps"): (root/folder).mkdir(exist_ok=True)
    Image.new("RGB", label.shape[::-1]).save(root/"photos"/image)
    Image.fromarray(label).save(root/"maps"/name, **options)
    return root/"photos", root/"maps"


# ---------------------------------------------------------------- the list of classes

@pytest.mark.parametrize("text, names, ids", [
    ("a\nb\n", ("a", "b"), {0: 0, 1: 1, 255: 255}),
    ("-\na\nb", ("a", "b"), {0: 255, 1: 0, 2: 1, 255: 255}),
    ("0 a\n255 b", ("a", "b"), {0: 0, 255: 1}),
    ("0 a\n128 b\n255 -", ("a", "b"), {0: 0, 128: 1, 255: 255}),
    ("7 water\nroad\n65535 far", ("water", "road", "far"), {7: 0, 1: 1, 65535: 2, 255: 255}),
    ("a #ff0000\nb c #00FF00", ("a", "b c"), {0: 0, 1: 1, 255: 255}),
    ("# of my camera\n3 a  # most of it\n4 b #123456  # the rest", ("a", "b"),
     {3: 0, 4: 1, 255: 255}),
    ("\ufeff1 a\r\n2 b \r\n", ("a", "b"), {1: 0, 2: 1, 255: 255}),
    ("3\n2nd\nC#", ("3", "2nd", "C#"), {0: 0, 1: 1, 2: 2, 255: 255})])
def test_lines_of_a_list(tmp_path, table, text, names, ids):
    found = table(text)
    assert found.names == names == read_classes(tmp_path/"classes.txt") and found.ids() == ids


@pytest.mark.parametrize("text, words", [
    ("1 a\nb", "1 occurs twice"), ("a #ff0000\nb #FF0000", "#ff0000 occurs twice"),
    ("65536 a", "65535 is the largest"), ("-1 a", "none from 0 to 65535"),
    ("1.5 a", "none from 0 to 65535"), ("#804080", "a colour without a name"),
    ("3 #804080", "a colour without a name"), ("a #80408", "not of the form #804080"),
    ("-\n-", "0 class names")])
def test_lines_that_cannot_be(table, text, words):
    assert words in message(table, text)


def test_a_number_may_not_mean_two_things(table, tmp_path):
    assert "7 is the number of the class water" in message(table("7 water").ids, (7,))
    assert table("a\nb").ids((1,)) == {0: 0, 1: 255}      # a place gives way, as ever
    os.mkfifo(tmp_path/"pipe")
    assert "a pipe" in message(read_lines, tmp_path/"pipe")


# ---------------------------------------------------------------- kinds of label files

@pytest.mark.parametrize("suffix", [*LABEL_SUFFIXES, ".PNG", ".Tif", ".NPY"])
@pytest.mark.parametrize("text", ["0 a\n2 b\n7 c\n255 -", COLOURS])
def test_every_lossless_format(tmp_path, table, suffix, text):
    known = table(text)
    photos, maps = folders(tmp_path)
    (maps/"a.png").unlink()
    if suffix.lower() == ".npy":
        with open(maps/f"a{suffix}", "wb") as file: np.save(file, NUMBERS)
    elif known.colors:
        paint(NUMBERS, {0: 0, 255: 0, 2: 0x804080, 7: 0x0000ff}).save(maps/f"a{suffix}")
    else: Image.fromarray(NUMBERS).save(maps/f"a{suffix}")
    data = open_dataset("folder", photos, maps, classes=tmp_path/"classes.txt")
    ids = known.ids()
    assert data[0]["label"].tolist() == [[ids[n] for n in row] for row in NUMBERS.tolist()]


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32,
                                   np.int64, np.uint64])
def test_arrays_of_whole_numbers(tmp_path, dtype):
    numbers = (np.arange(12).reshape(3, 4) % 2).astype(dtype)
    for name, array in (("a", numbers), ("b", numbers[None]), ("c", numbers[..., None])):
        np.save(tmp_path/f"{name}.npy", array)
        assert np.array_equal(np.asarray(read_numbers(tmp_path/f"{name}.npy")), numbers)


@pytest.mark.parametrize("array, words", [
    (np.full((3, 4), 1.5), "float64, such as 1.5"), (np.full((3, 4), 2.), "float64, such as 2.0"),
    (np.full((3, 4), np.nan, np.float32), "float32, such as nan"),
    (np.full((3, 4), -1), "the value -1"), (np.full((3, 4), 70000), "the value 70000"),
    (np.zeros((3, 4, 2), np.uint8), "of the shape (3, 4, 2)"), (np.zeros(4), "of the shape (4,)"),
    (np.zeros((0, 4)), "(0, 4)"), (np.full((3, 4), "a"), "such as a"),
    (np.full((3, 4), 1j), "complex128")])
def test_arrays_that_are_no_labels(tmp_path, array, words):
    np.save(tmp_path/"y.npy", array)
    text = message(read_numbers, tmp_path/"y.npy")
    assert words in text and "y.npy" in text


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"\x80\x04K\x01."])
def test_arrays_that_are_damaged(tmp_path, content):
    (tmp_path/"y.npy").write_bytes(content)
    with pytest.raises(FileError, match="y.npy"): read_numbers(tmp_path/"y.npy")


@pytest.mark.parametrize("values, words", [
    (np.full((3, 4), .5, np.float32), "float32, such as 0.5"),
    (np.full((3, 4), -3, np.int32), "the value -3"),
    (np.full((3, 4), 65536, np.int32), "the value 65536")])
def test_tiffs_that_are_no_labels(tmp_path, values, words):
    photos, maps = folders(tmp_path, values, "a.tif")
    assert words in message(open_dataset("folder", photos, maps).__getitem__, 0)


def test_one_bit_is_zero_and_one(tmp_path):
    bits = Image.fromarray(NUMBERS > 0)
    for suffix in (".png", ".tif", ".bmp"):
        bits.save(tmp_path/f"y{suffix}")
        assert np.array_equal(np.asarray(read_numbers(tmp_path/f"y{suffix}")), NUMBERS > 0)


@pytest.mark.parametrize("name, options", [
    ("a.jpg", {}), ("a.png", {"format": "JPEG"}), ("a.webp", {"lossless": True}),
    ("a.tif", {"compression": "jpeg"})])
def test_lossy_label_maps_are_refused(tmp_path, name, options):
    photos, maps = folders(tmp_path, np.zeros((8, 8), np.uint8), name, **options)
    assert "which changes numbers along edges" in message(
        open_dataset("folder", photos, maps).__getitem__, 0)


def test_colours(tmp_path, table):
    known = table(COLOURS)
    path = tmp_path/"y.png"
    picture = Image.fromarray(((NUMBERS == 7) + 2 * (NUMBERS == 2)).astype(np.uint8))
    picture.putpalette([0, 0, 0, 0, 0, 255, 128, 64, 128])
    picture.save(path)
    assert np.array_equal(read_numbers(path, classes=known), np.where(NUMBERS == 255, 0, NUMBERS))
    paint(NUMBERS, {0: 0, 255: 1, 2: 0x804080, 7: 0x0000ff}).save(path)
    assert "unknown colours #000001;" in message(read_numbers, path, classes=known)
    assert "a picture in colours" in message(read_numbers, path)


def test_grey_that_could_be_two_things(tmp_path, table):
    path = tmp_path/"y.png"
    Image.new("L", (4, 3), 0).save(path)
    assert "its value 0 may be" in message(
        read_numbers, path, classes=table("road #804080\nsea #000000"))
    same = "land #000000\nsea #ffffff"
    assert not np.asarray(read_numbers(path, classes=table(same))).any()
    numbered = "0 road #804080\n1 sea #000000"
    assert not np.asarray(read_numbers(path, classes=table(numbered))).any()


# ---------------------------------------------------------------- where label maps lie

def test_suffixes_of_label_maps(tmp_path):
    photos, maps = folders(tmp_path, NUMBERS % 2, "a_mask.PNG")
    data = open_dataset("folder", photos, maps, label_suffix="_mask")
    assert data[0]["label"].tolist() == (NUMBERS % 2).tolist()
    beside, _ = folders(tmp_path, NUMBERS % 2)
    Image.fromarray(NUMBERS % 2).save(beside/"a_mask.bmp")
    data = open_dataset("folder", beside, beside, label_suffix="_mask")
    assert [p.name for p in (*data.images, *data.labels)] == ["a.jpg", "a_mask.bmp"]
    assert len(open_dataset("folder", beside, False, label_suffix="_mask")) == 1
    assert "label_suffix ../x" in message(
        open_dataset, "folder", photos, maps, label_suffix="../x")


def test_two_label_maps_of_one_image(tmp_path):
    photos, maps = folders(tmp_path, NUMBERS, "a.tif")
    np.save(maps/"a.npy", NUMBERS)
    assert "a.npy, a.tif: which is the label map?" in message(
        open_dataset, "folder", photos, maps)
    Image.fromarray(NUMBERS).save(maps/"a.png")           # the pattern's own ending goes first
    assert open_dataset("folder", photos, maps).labels == [maps/"a.png"]


# ---------------------------------------------------------------- what is no picture

@pytest.mark.parametrize("name", ["x.png", "x.npy"])
@pytest.mark.parametrize("make, words", [
    (os.mkfifo, "a pipe"), (os.mkdir, "a folder"), (lambda p: p.symlink_to(p.name), "links"),
    (lambda p: p.symlink_to("/dev/zero"), "a device"), (lambda p: None, "no such file")])
def test_what_is_no_file(tmp_path, name, make, words):
    make(tmp_path/name)
    assert words in message(read_numbers, tmp_path/name)


def test_pixels_are_bounded_before_they_are_decoded(tmp_path):
    width, rows = 1 << 15, 1 << 13
    write_png(tmp_path/"x.png", [], 1, 0, width)
    data = bytearray((tmp_path/"x.png").read_bytes())
    data[20:24] = rows.to_bytes(4, "big")                 # a height without its rows
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path/"x.png").write_bytes(data)
    assert width * rows > MOST_PIXELS
    assert "pixels, where at most" in message(open_rgb, tmp_path/"x.png")


def test_no_other_program_is_started(tmp_path):
    (tmp_path/"x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    assert "is no image" in message(open_image, tmp_path/"x.png")


def test_names_that_are_not_utf8(tmp_path):
    path = tmp_path/os.fsdecode(b"stra\xdfe.png")
    try: path.write_bytes(b"")
    except OSError: pytest.skip("a file system that takes no such name")
    message(open_image, path).encode()                    # can be printed


def test_a_tiff_whose_strips_end_too_early_is_damaged(tmp_path, recwarn):
    "A flipped bit in its height: Pillow would fill up the rest, and warn of the odd tag."
    path = tmp_path / "a.tif"
    Image.fromarray(np.full((24, 40, 3), 7, np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    assert open_image(path).size == (40, 24)
    for place, bit in ((26, 2), (31, 16), (18, 64)):  # length and value of the height; the width
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1:])
        with pytest.raises(FileError, match=r"a.tif: is damaged") as e: open_image(path)
        assert "\n" not in str(e.value)
    for compression in (None, "tiff_lzw", "packbits", "tiff_deflate", "jpeg"):
        Image.fromarray(np.full((240, 400, 3), 7, np.uint8)).save(path, compression=compression)
        assert open_image(path).size == (400, 240)
