"""Reading GTA5, SYNTHIA, Cityscapes, folders and layouts of one's own, with files out of order."""
import itertools
import random
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from house import answer
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from sac_lit.core import CLASSES, IGNORE_INDEX, NAMES, UserError
from sac_lit.datasets import (
    FileError,
    find_layout,
    Layout,
    LAYOUTS,
    open_dataset,
    open_rgb,
    read_classes,
    released_gta5_frames,
    SegmentationDataset,
)
from sac_lit.importance_sampling import epoch_index, StepSampler
from sac_lit.toy_city import render, write_dataset, write_png16
from sac_lit.views import crop_and_resize

SIZE, COUNTS = (32, 64), {"train": 3, "val": 2}
PUBLIC = ("gta5", "synthia", "cityscapes")  # the layouts that the toy city can be written in

# more workers than cores, on purpose
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def city(tmp_path_factory):
    root = tmp_path_factory.mktemp("city")
    for layout in PUBLIC: write_dataset(root/layout, layout, domain_of(layout), COUNTS, SIZE)
    return root


@pytest.fixture
def gta(city, tmp_path):  # a copy that a test may damage
    return shutil.copytree(city/"gta5", tmp_path/"gta5")


@pytest.fixture
def own(tmp_path):
    "A folder of images in sub-folders, with three classes and two numbers that mean none."
    for name in ("a/x.jpg", "b/y.png", "z.webp"):
        (tmp_path/"photos"/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (9, 9, 9)).save(tmp_path/"photos"/name)
        label = (tmp_path/"maps"/name).with_suffix(".png")
        label.parent.mkdir(parents=True, exist_ok=True)
        save(label, [[0, 1, 2, 7, 255, 0]] * 4)
    (tmp_path/"classes.txt").write_text("one\ntwo\n three \n\n")
    return tmp_path


def domain_of(layout):
    return "target" if layout == "cityscapes" else "source"


def read(layout, root, **kwargs):
    "A data set of the city; of Cityscapes, the training images."
    return open_dataset(layout, root, split="train", **kwargs)


def gta5(root, size=None, frames=None):
    return open_dataset("gta5", root, size=size, frames=frames)


def cityscapes(root, split, **kwargs):
    return open_dataset("cityscapes", root, split=split, **kwargs)


def folder(images, labels=False, classes=None, ignore=(255,), **kwargs):
    return open_dataset("folder", images, labels, classes=classes, ignore=ignore, **kwargs)


def save(path, numbers, dtype=np.uint8):
    Image.fromarray(np.asarray(numbers).astype(dtype)).save(path)


def one_pair(image, label, ids, **kwargs):
    return SegmentationDataset([image], [label], ids, **kwargs)


def message(f, *args, **kwargs):
    "The one sentence of a `UserError`."
    # the traceback would keep a loader's workers waiting for the garbage collector
    try: f(*args, **kwargs)
    except UserError as e: text = str(e.with_traceback(None))
    else: pytest.fail("no UserError")
    assert text and "\n" not in text and "Traceback" not in text
    return text


# ---------------------------------------------------------------- reading

@pytest.mark.parametrize("layout", PUBLIC)
def test_what_was_written_is_read(city, layout):
    dataset = read(layout, city/layout)
    assert len(dataset) == len(dataset.images) == len(dataset.labels)
    assert len(dataset) == (3 if layout == "cityscapes" else 5)
    assert dataset.num_classes == 19
    for i in range(3):
        sample, (image, label) = dataset[i], render(domain_of(layout), "train", i, SIZE)
        assert sample["image"].dtype == sample["label"].dtype == torch.uint8
        assert sample["index"] == i
        assert torch.equal(sample["image"], image) and torch.equal(sample["label"], label)


@pytest.mark.parametrize("layout", PUBLIC)
def test_every_id_of_every_layout(tmp_path, layout):
    column = "synthia_id" if layout == "synthia" else "cityscapes_id"
    known = sorted(LAYOUTS[layout].ids)
    save(tmp_path/"y.png", [known])
    Image.new("RGB", (len(known), 1)).save(tmp_path/"x.png")
    pair = one_pair(tmp_path/"x.png", tmp_path/"y.png", LAYOUTS[layout].ids)
    classes = {getattr(c, column): i for i, c in enumerate(CLASSES)}
    assert pair[0]["label"][0].tolist() == [classes.get(k, IGNORE_INDEX) for k in known]


def test_grey_labels_of_8_and_16_bits_and_palettes_are_alike(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 34, (6, 8))
    Image.new("RGB", (8, 6)).save(tmp_path/"x.png")
    save(tmp_path/"l.png", numbers)
    save(tmp_path/"i16.png", numbers, np.uint16)
    palette = Image.fromarray(numbers.astype(np.uint8)).convert("P")
    palette.putpalette([random.Random(0).randrange(256) for _ in range(768)])
    palette.save(tmp_path/"p.png")
    ids = LAYOUTS["cityscapes"].ids
    labels = [one_pair(tmp_path/"x.png", tmp_path/f"{name}.png", ids)[0]["label"]
              for name in ("l", "i16", "p")]
    assert torch.equal(labels[0], labels[1]) and torch.equal(labels[0], labels[2])


def test_images_of_other_modes_become_rgb(tmp_path):
    save(tmp_path/"grey.png", np.full((4, 6), 77))
    Image.new("RGBA", (6, 4), (1, 2, 3, 4)).save(tmp_path/"alpha.png")
    dataset = SegmentationDataset([tmp_path/"grey.png", tmp_path/"alpha.png"], None, {})
    assert dataset[0]["image"].unique().tolist() == [77]
    assert dataset[1]["image"][:, 0, 0].tolist() == [1, 2, 3]


def test_resizing_once(city):
    small, whole = gta5(city/"gta5", size=(16, 16))[0], gta5(city/"gta5")[0]
    assert small["image"].shape == (3, 16, 16) and small["label"].shape == (16, 16)
    assert torch.equal(small["label"], whole["label"][1::2, 2::4])  # the centres of the cells
    box = torch.tensor([0, 0, *SIZE])
    ours = crop_and_resize(whole["image"].float(), box, (16, 16))
    assert (ours - small["image"]).abs().max() <= 1


def test_no_label_file_is_opened_without_labels(city, tmp_path):
    root = shutil.copytree(city/"cityscapes", tmp_path/"cityscapes")
    for path in (root/"gtFine").rglob("*.png"): path.write_bytes(b"not to be read")
    assert sorted(cityscapes(root, "train", labels=False)[0]) == ["image", "index"]
    shutil.rmtree(root/"gtFine")
    assert len(cityscapes(root, "val", labels=False)) == 2
    assert "2 of 2" in message(cityscapes, root, "val")


# ---------------------------------------------------------------- layouts of one's own

def pairs(root, images, labels):
    "Small images and label maps under given names."
    for name in images:
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4)).save(root/name)
    for name in labels:
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        save(root/name, np.zeros((4, 5)))


def test_a_layout_of_ones_own(tmp_path, monkeypatch):
    pairs(tmp_path, ("photos/a.png", "photos/b.png"), ("{masks}/a.png", "{masks}/b.png"))
    (tmp_path/"photos/._a.png").write_bytes(b"what some archivers leave")
    monkeypatch.setitem(LAYOUTS, "mine", Layout("photos/*.png", "{masks}/*.png", {0: 1}))
    (tmp_path/"classes.txt").write_text("a\nb")
    dataset = open_dataset("mine", tmp_path, classes=tmp_path/"classes.txt")
    assert len(dataset) == 2 and dataset.num_classes == 2
    assert dataset[1]["label"].unique().tolist() == [1]
    (tmp_path/"classes.txt").write_text("a")
    assert "1 names" in message(open_dataset, "mine", tmp_path, classes=tmp_path/"classes.txt")


@pytest.mark.parametrize("images, labels, image, label", [
    ("img/*.jpg", "ann/*_gt.png", "img/a.b.jpg", "ann/a.b_gt.png"),
    ("**/*.*", "**/*.png", "x.tar.jpg", "x.tar.png"),
    ("**/*.*", "**/*.png", "a/b/x.webp", "a/b/x.png"),
    ("img/{split}/*/*.png", "ann/{split}/*/*_gt.png", "img/val/(a)/x.png", "ann/val/(a)/x_gt.png"),
    ("img/**/*-*.jpg", "ann/**/*/*.png", "img/a/1-2.jpg", "ann/a/1/2.png")])
def test_patterns(tmp_path, monkeypatch, images, labels, image, label):
    monkeypatch.setitem(LAYOUTS, "mine", Layout(images, labels))
    pairs(tmp_path/"x", [image], [])
    pairs(tmp_path/"y", [], [label])
    dataset = open_dataset("mine", tmp_path/"x", tmp_path/"y", split="val")
    assert dataset.images == [tmp_path/"x"/image] and dataset.labels == [tmp_path/"y"/label]
    entry = find_layout("mine", "val", tmp_path/"y")
    assert [*entry.label_files(tmp_path/"y")] == dataset.labels


def test_layouts_by_import(tmp_path, monkeypatch):
    pairs(tmp_path, ["img/a.jpg"], ["ann/a_gt.png"])
    monkeypatch.chdir(tmp_path)
    text = "from sac_lit.datasets import Layout\nYARD = Layout('img/*.jpg', 'ann/*_gt.png')\n"
    (tmp_path/"yard_layout.py").write_text(text)
    assert open_dataset("yard_layout:YARD", ".")[0]["label"].unique().tolist() == [0]
    assert "cannot be imported" in message(open_dataset, "yard_layout:YARDS", ".")
    assert "of type float" in message(open_dataset, "math:pi", ".")
    assert "did you mean gta5? There are gta5, synthia" in message(open_dataset, "gta6", ".")
    done = subprocess.run([sys.executable, "-m", "sac_lit.audit", "yard_layout:YARD", "."],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "0 defects"


IDS = Layout("images/*.png", "labels/*.png", {0: 0})


@pytest.mark.parametrize("layout, words", [
    (IDS._replace(labels="labels/*/*.png"), "2 stars in labels, but 1 in images"),
    (IDS._replace(labels="labels/**/*.png"), "2 stars in labels, but 1 in images"),
    (IDS._replace(labels=None), "None is no pattern"),
    (IDS._replace(images="/images/*.png"), "'/images/*.png' is no pattern"),
    (IDS._replace(ids={70000: 0}), "ids takes 70000 to 0; give numbers from 0 to 65535"),
    (IDS._replace(ids={"7": 0}), "ids takes '7' to 0"),
    (IDS._replace(ids={7: -1}), "ids takes 7 to -1"),
    (IDS._replace(ids=[0, 1]), "its ids are no dictionary"),
    (LAYOUTS["gta5"]._replace(otherwise=IDS._replace(ids={1: 300})), "ids takes 1 to 300")])
def test_a_layout_that_cannot_be_right_gets_one_sentence(tmp_path, monkeypatch, layout, words):
    "Before any file is looked for."
    monkeypatch.setitem(LAYOUTS, "mine", layout)
    text = message(open_dataset, "mine", tmp_path)
    assert text.startswith("layout mine: ") and words in text and "\n" not in text


def test_the_answer_that_adds_a_layout(tmp_path, monkeypatch):
    code = answer("01_datasets", "layout")
    assert len(code.splitlines()) <= 20
    for split, n in (("train", 2), ("val", 1)):
        names = [f"{split}/{i}" for i in range(n)]
        pairs(tmp_path, [f"img/{x}.jpg" for x in names], [])
        for name in names:
            (tmp_path/"ann"/name).parent.mkdir(parents=True, exist_ok=True)
            save(tmp_path/f"ann/{name}_gt.png", [[0, 1, 2, 1, 0]] * 4)
    monkeypatch.setitem(LAYOUTS, "yard", None)  # taken away again after the test
    exec(code, {})
    dataset = open_dataset("yard", tmp_path, split="val")
    assert len(dataset) == 1 and len(open_dataset("yard", tmp_path)) == 3
    road, car = NAMES.index("road"), NAMES.index("car")
    assert dataset[0]["label"][0].tolist() == [255, road, car, road, 255]


# ---------------------------------------------------------------- folders and files out of order

def test_folders(city, tmp_path):
    assert "no such folder" in message(gta5, tmp_path/"nowhere")
    (tmp_path/"empty").mkdir()
    assert "holds nothing" in message(open_dataset, "synthia", tmp_path/"empty")
    (tmp_path/"file").write_text("")
    assert "not a folder" in message(gta5, tmp_path/"file")
    assert "train/, val/" in message(cityscapes, city/"cityscapes", "valid")
    assert "cityscapes/, gta5/, synthia/" in message(gta5, city)


@pytest.mark.parametrize("layout, wanted", [*itertools.permutations(PUBLIC, 2)])
def test_a_folder_of_another_layout(city, layout, wanted):
    text = message(read, wanted, city/layout)
    assert f"the layout of {layout}" in text and str(city/layout) in text
    assert LAYOUTS[wanted].images.split("/")[0] in text


def test_image_without_label(gta):
    (gta/"labels/00002.png").unlink()
    text = message(gta5, gta)
    assert str(gta/"images/00002.png") in text and str(gta/"labels/00002.png") in text
    assert "1 of 5" in text
    assert len(open_dataset("gta5", gta, check=False)) == 5


def test_label_without_image_is_no_concern(gta):
    (gta/"images/00002.png").unlink()
    assert len(gta5(gta)) == 4


@pytest.mark.parametrize("layout, known", [
    ("gta5", "0-34, 255"), ("synthia", "0-22"), ("cityscapes", "0-33, 255")])
def test_unknown_label_values(city, layout, known, tmp_path):
    dataset = read(layout, city/layout)
    y = np.zeros(SIZE, np.uint8)
    y[3, 5], y[4] = 77, 99
    if layout == "synthia": write_png16(tmp_path/"y.png", np.stack([y] * 3, -1))
    else: save(tmp_path/"y.png", y)
    dataset.labels[1] = tmp_path/"y.png"
    text = message(dataset.__getitem__, 1)
    assert "77, 99," in text and str(tmp_path/"y.png") in text and known in text


def test_a_large_number_is_not_taken_for_its_low_byte(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path/"x.png")
    save(tmp_path/"y.png", np.full((4, 4), 256 + 7), np.uint16)
    pair = one_pair(tmp_path/"x.png", tmp_path/"y.png", LAYOUTS["gta5"].ids)
    assert "263" in message(pair.__getitem__, 0)


@pytest.mark.parametrize("size", [None, (16, 16)])  # resizing must not hide it
def test_sizes_that_differ(gta, size):
    Image.new("L", (64, 30), 7).save(gta/"labels/00001.png")
    text = message(gta5(gta, size).__getitem__, 0)
    assert "64 x 30" in text and "64 x 32" in text
    assert str(gta/"labels/00001.png") in text and str(gta/"images/00001.png") in text


@pytest.mark.parametrize("folder", ["images", "labels"])
@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n", b"<html>404</html>", "half", "all but the end"])
def test_truncated_or_foreign_file(gta, folder, content):
    path = gta/folder/"00003.png"
    whole = path.read_bytes()
    parts = {"half": whole[:len(whole) // 2], "all but the end": whole[:-30]}
    path.write_bytes(parts.get(content, content))
    assert str(path) in message(gta5(gta).__getitem__, 2)


def test_file_out_of_reach_is_not_called_damaged(tmp_path):
    (tmp_path/"x.png").mkdir()
    text = message(SegmentationDataset([tmp_path/"x.png"], None, {}).__getitem__, 0)
    assert "a folder, where a file is expected" in text and "damaged" not in text
    assert text.count("x.png") == 1


def test_file_that_is_gone(gta):
    dataset = gta5(gta)
    (gta/"images/00001.png").unlink()
    assert "no such file" in message(dataset.__getitem__, 0)


@pytest.mark.parametrize("layout", ["gta5", "synthia"])
def test_damaged_bytes_raise_a_file_error_or_nothing(city, layout, tmp_path):
    dataset, dice = read(layout, city/layout), random.Random(0)
    for files, _ in itertools.product((dataset.images, dataset.labels), range(120)):
        whole, data = files[0], bytearray(files[0].read_bytes())
        for _ in range(dice.randint(1, 4)): data[dice.randrange(len(data))] = dice.randrange(256)
        (tmp_path/"damaged.png").write_bytes(data)
        files[0] = tmp_path/"damaged.png"
        try: dataset[0]
        except FileError as e: assert "damaged.png" in str(e) and "\n" not in str(e)
        files[0] = whole


def test_label_maps_in_colours(gta):
    for mode, color in (("RGB", (128, 64, 128)), ("RGBA", (7, 7, 8, 255))):
        Image.new(mode, SIZE[::-1], color).save(gta/"labels/00001.png")
        assert "a picture in colours" in message(gta5(gta).__getitem__, 0)
    Image.new("RGB", SIZE[::-1], (7, 7, 7)).save(gta/"labels/00001.png")  # three equal channels
    assert gta5(gta)[0]["label"].unique().tolist() == [0]


def write_png(path, rows, bits, kind, width):
    "A PNG of packed rows, in forms that Pillow does not write."
    def number(n): return n.to_bytes(4, "big")
    def chunk(name, data):
        return number(len(data)) + name + data + number(zlib.crc32(name + data))
    head = number(width) + number(len(rows)) + bytes([bits, kind, 0, 0, 0])
    palette = chunk(b"PLTE", bytes(3 << bits)) if kind == 3 else b""
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    signature = b"\x89PNG\r\n\x1a\n"
    path.write_bytes(signature + chunk(b"IHDR", head) + palette + pixels + chunk(b"IEND", b""))


@pytest.mark.parametrize("kind", [0, 3], ids=["grey", "palette"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_numbers_in_fewer_than_8_bits(tmp_path, bits, kind):
    values = [k % 2 ** bits for k in range(8)]
    row = int("".join(f"{v:0{bits}b}" for v in values), 2).to_bytes(bits, "big")
    write_png(tmp_path/"y.png", [row] * 3, bits, kind, width=8)
    Image.new("RGB", (8, 3)).save(tmp_path/"x.png")
    pair = one_pair(tmp_path/"x.png", tmp_path/"y.png", {k: k for k in range(16)})
    assert pair[0]["label"].tolist() == [values] * 3


def test_synthia_with_an_alpha_channel(tmp_path):
    write_png(tmp_path/"y.png", [bytes([0, 3, 0, 9, 0, 0, 255, 255] * 5)] * 4, 16, 6, width=5)
    Image.new("RGB", (5, 4)).save(tmp_path/"x.png")
    pair = one_pair(tmp_path/"x.png", tmp_path/"y.png", LAYOUTS["synthia"].ids, bits=16)
    assert pair[0]["label"].unique().tolist() == [0]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_synthia_converted_to_8_bits_is_recognised(city, tmp_path, mode):
    root = shutil.copytree(city/"synthia", tmp_path/"synthia")
    path = root/"GT/LABELS/0000001.png"
    Image.new(mode, SIZE[::-1]).save(path)
    text = message(read("synthia", root).__getitem__, 1)
    assert "0000001.png: 8 bits a channel instead of 16" in text
    assert "archive" in text and "the high byte of each number" in text
    Image.new(mode, SIZE[::-1], (3, 0, 0) if mode == "RGB" else 3).save(path)
    assert "scaled or clipped" in message(read("synthia", root).__getitem__, 1)


@pytest.mark.parametrize("name, values", [
    ("x.png", np.uint16), ("x.tif", np.float32), ("x.tiff", np.int32)])
def test_images_of_unknown_range_are_refused(tmp_path, name, values):
    save(tmp_path/name, np.arange(24).reshape(4, 6), values)
    assert "more than 8 bits" in message(folder(tmp_path).__getitem__, 0)


# ---------------------------------------------------------------- the camera's note

def exif_of(turn):
    "A note that says how the camera was held."
    return bytes.fromhex("457869660000" "4d4d002a00000008" "0001"
                         "0112000300000001" f"{turn:04x}0000" "00000000")


def test_photographs_stand_upright(tmp_path):
    lying = np.zeros((8, 16, 3), np.uint8)
    lying[:, 8:] = 255
    path = tmp_path/"x.jpg"
    Image.fromarray(lying).save(path, exif=exif_of(6), quality=95)  # a quarter turn clockwise
    rows = folder(tmp_path)[0]["image"][0].float().mean(1)
    assert rows.round().tolist() == [0] * 8 + [255] * 8


@pytest.mark.parametrize("turn", range(10))
def test_every_way_to_hold_a_camera(tmp_path, turn):
    pixels, path = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8), tmp_path/"x.png"
    Image.fromarray(pixels).save(path, exif=exif_of(turn))
    turned = {  # by EXIF's table of orientations, in numpy's words
        2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.swapaxes(0, 1), 6: pixels.swapaxes(0, 1)[:, ::-1],
        7: pixels[::-1, ::-1].swapaxes(0, 1), 8: pixels.swapaxes(0, 1)[::-1]}
    upright = np.asarray(open_rgb(path))
    assert np.array_equal(upright, turned.get(turn, pixels))
    assert np.array_equal(upright, np.asarray(ImageOps.exif_transpose(Image.open(path))))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_whatever_stands_in_the_note(tmp_path):
    path, dice = tmp_path/"x.jpg", random.Random(0)
    Image.new("RGB", (16, 8)).save(path, exif=exif_of(6))
    data = path.read_bytes()
    for _ in range(300):
        note = bytearray(data[12:60])
        for _ in range(dice.randint(1, 6)): note[dice.randrange(len(note))] = dice.randrange(256)
        path.write_bytes(data[:12] + note + data[60:])
        try: open_rgb(path)
        except FileError as e: assert "x.jpg" in str(e)


# ---------------------------------------------------------------- workers

@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_sentence_survives_workers(gta, workers):
    (gta/"labels/00004.png").write_bytes(b"")
    dataset = gta5(gta)
    text = message(list, DataLoader(dataset, batch_size=2, num_workers=workers))
    assert text == message(dataset.__getitem__, 3) and text.startswith(str(gta))


@pytest.mark.parametrize("workers", [0, 1])
def test_folder_named_like_the_error(tmp_path, workers):
    root = tmp_path/"Caught FileError: no"
    root.mkdir()
    (root/"x.png").write_bytes(b"")
    dataset = SegmentationDataset([root/"x.png"] * 2, None, {})
    text = message(list, DataLoader(dataset, num_workers=workers))
    assert text == f"{root/'x.png'}: is no image; replace it, for example from its archive"


def test_workers_do_not_matter(city):
    dataset = open_dataset("synthia", city/"synthia", size=(16, 32))
    def pick(step, slot): return epoch_index(1, "sac", step, slot, 3, len(dataset))
    def batches(workers):
        sampler = StepSampler(0, 4, range(3), pick)
        return [*DataLoader(dataset, batch_sampler=sampler, num_workers=workers)]
    for alone, one, three in zip(batches(0), batches(1), batches(3)):
        for k in ("image", "label", "index"):
            assert torch.equal(alone[k], one[k]) and torch.equal(alone[k], three[k])


# ---------------------------------------------------------------- lists, folders, classes

def names_of(dataset):
    return [p.name for p in dataset.images]


def test_lists_of_frames(gta, tmp_path):
    path = tmp_path/"list.txt"
    path.write_text("images/00004.png\n\nimages/00002.png\n")
    (gta/"labels/00001.png").unlink()  # of no concern: it is not in the list
    assert names_of(gta5(gta, frames=path)) == ["00002.png", "00004.png"]
    path.write_text("".join(f"images/{i}.png\n" for i in range(7)))
    text = message(gta5, gta, frames=path)
    assert "list.txt: 7 of its 7 images" in text
    assert "images/4.png, ..." in text and "images/5.png" not in text
    assert "none.txt" in message(gta5, gta, frames=tmp_path/"none.txt")
    assert names_of(gta5(gta, frames=[gta/"images/00004.png"])) == ["00004.png"]
    for other in ("/elsewhere/00001.png", "../images/00001.png", "labels/00002.png"):
        text = message(gta5, gta, frames=[other])
        assert f"1 of its 1 images are not among those in {gta}: {other}" in text


def test_lists_from_other_editors(gta, tmp_path):
    path = tmp_path/"list.txt"
    path.write_bytes(b"\xef\xbb\xbfimages/00003.png\r\n./images/00005.png \r\n")  # Windows
    assert names_of(gta5(gta, frames=path)) == ["00003.png", "00005.png"]
    path.write_text("\n \n")
    assert "names no images" in message(gta5, gta, frames=path)
    assert "names no images" in message(gta5, gta, frames=[])
    path.write_bytes(b"\xff\xfe\0")
    assert "not UTF-8" in message(gta5, gta, frames=path)


def test_frames_of_the_released_models():
    frames = released_gta5_frames()
    assert len(set(frames)) == 10000
    assert frames[0] == "images/00001.png" and frames[-1] == "images/10000.png"


def test_cityscapes_in_train_ids(city, tmp_path):
    root = shutil.copytree(city/"cityscapes", tmp_path/"cityscapes")
    whole = [cityscapes(root, "train")[i]["label"] for i in range(3)]
    for path, label in zip(cityscapes(root, "train").labels, whole):
        save(str(path).replace("labelIds", "labelTrainIds"), label)
    for path in cityscapes(root, "train").labels: path.unlink()
    labels = cityscapes(root, "val").labels
    assert len(labels) == 2 and "labelIds" in labels[0].name  # each split by its own files
    for path in (root/"gtFine/val").rglob("*.png"): path.unlink()
    again = cityscapes(root, "train")
    assert all(torch.equal(label, again[i]["label"]) for i, label in enumerate(whole))


def test_cityscapes_ids_where_train_ids_are_expected(city, own):
    text = message(folder(city/"gta5/images", city/"gta5/labels").__getitem__, 0)
    assert "look like the ids of Cityscapes" in text and "expected 0-18, 255" in text
    save(own/"maps/z.png", np.full((4, 6), 44))  # no id of Cityscapes either
    assert "data set?" in message(folder(own/"photos", own/"maps").__getitem__, 2)
    named = folder(own/"photos", own/"maps", own/"classes.txt")
    assert "a name among the classes" in message(named.__getitem__, 2)


def test_folder(own):
    photos, maps, classes = own/"photos", own/"maps", own/"classes.txt"
    data = folder(photos, maps, classes, ignore=(7, 255))
    assert names_of(data) == ["x.jpg", "y.png", "z.webp"] and data.names == ("one", "two", "three")
    assert data[1]["label"][0].tolist() == [0, 1, 2, 255, 255, 0]
    assert sorted(folder(photos)[0]) == ["image", "index"]
    unknown = folder(photos, maps, classes)
    assert "unknown label values 7" in message(unknown.__getitem__, 0)
    (maps/"z.png").unlink()
    assert "z.png is missing (1 of 3" in message(folder, photos, maps, classes)


def test_folders_that_cannot_be_opened(own):
    photos, maps, classes = own/"photos", own/"maps", own/"classes.txt"
    (own/"empty").mkdir()
    assert "no images in it" in message(folder, own/"empty")
    assert "no such folder" in message(folder, own/"nowhere")
    for wrong in (-1, 65536):
        assert f"ignore: {wrong}" in message(folder, photos, maps, classes, (255, wrong))
    assert "its own label map" in message(folder, photos, photos, classes)
    assert "a folder of their own" in message(folder, photos, True, classes)


@pytest.mark.parametrize("content, words", [
    ("", "0 class names"), ("a\nb\na\n", "a occurs twice"),
    ("\n".join(map(str, range(256))), "256 class names"), ("a\n\nb\n", "an empty line")])
def test_class_lists(tmp_path, content, words):
    (tmp_path/"classes.txt").write_text(content)
    assert words in message(read_classes, tmp_path/"classes.txt")
