"""Reading GTA5, SYNTHIA and Cityscapes, with files that are not in order; the geometry of views; the order of images."""
import errno
import itertools
import os
import random
import shutil
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from sac_lit.core import CLASSES, IGNORE_INDEX, NAMES, UserError, generator
from sac_lit.datasets import (COLOR_STATISTICS, IMAGENET_MEAN, IMAGENET_STD, LAYOUTS, FileError, SegmentationDataset, StepSampler, cached, cityscapes, cut,
                              epoch_index, find_images, folder, gta5, in_parallel, label_paths, main, matching_statistics, normalize, open_rgb, photometric_noise, random_box,
                              read_classes, released_gta5_frames, source_view, synthia, target_views)
from sac_lit.toy_city import render, write_dataset, write_png16

quick = settings(deadline=None, derandomize=True, max_examples=40)
SIZE, COUNTS = (32, 64), {"train": 3, "val": 2}
READERS = {"gta5": gta5, "synthia": synthia, "cityscapes": lambda root, **kw: cityscapes(root, "train", **kw)}


pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def city(tmp_path_factory):
    root = tmp_path_factory.mktemp("city")
    for layout in LAYOUTS: write_dataset(root/layout, layout, "target" if layout == "cityscapes" else "source", COUNTS, SIZE)
    return root


@pytest.fixture
def gta(city, tmp_path):  # a copy that a test may damage
    return shutil.copytree(city/"gta5", tmp_path/"gta5")


def message(f, *args, **kwargs):
    try: f(*args, **kwargs)
    except UserError as e: text = str(e.with_traceback(None))  # the traceback would keep a loader's workers waiting for the garbage collector
    else: pytest.fail("no UserError")
    assert text and "\n" not in text and "Traceback" not in text
    return text


# ---------------------------------------------------------------- reading

@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_written_is_read(city, layout):
    dataset, domain = READERS[layout](city/layout), "target" if layout == "cityscapes" else "source"
    assert len(dataset) == len(dataset.images) == len(dataset.labels) == (3 if layout == "cityscapes" else 5) and dataset.num_classes == 19
    for i in range(3):
        sample, (image, label) = dataset[i], render(domain, "train", i, SIZE)
        assert sample["image"].dtype == sample["label"].dtype == torch.uint8 and sample["index"] == i
        assert torch.equal(sample["image"], image) and torch.equal(sample["label"], label)


def test_every_id_of_every_layout(tmp_path):
    for layout, column in (("gta5", "cityscapes_id"), ("synthia", "synthia_id"), ("cityscapes", "cityscapes_id")):
        known = sorted(LAYOUTS[layout].ids)
        Image.fromarray(np.array([known], np.uint8)).save(tmp_path/"y.png")
        Image.new("RGB", (len(known), 1)).save(tmp_path/"x.png")
        read = SegmentationDataset([tmp_path/"x.png"], [tmp_path/"y.png"], LAYOUTS[layout].ids)[0]["label"][0].tolist()
        classes = {getattr(c, column): i for i, c in enumerate(CLASSES)}
        assert read == [classes.get(k, IGNORE_INDEX) for k in known]


def test_grey_labels_of_8_and_16_bits_and_palettes_are_alike(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 34, (6, 8))
    Image.new("RGB", (8, 6)).save(tmp_path/"x.png")
    Image.fromarray(numbers.astype(np.uint8)).save(tmp_path/"l.png")
    Image.fromarray(numbers.astype(np.uint16)).save(tmp_path/"i16.png")
    palette = Image.fromarray(numbers.astype(np.uint8)).convert("P")
    palette.putpalette([random.Random(0).randrange(256) for _ in range(768)])
    palette.save(tmp_path/"p.png")
    labels = [SegmentationDataset([tmp_path/"x.png"], [tmp_path/f"{name}.png"], LAYOUTS["cityscapes"].ids)[0]["label"] for name in ("l", "i16", "p")]
    assert torch.equal(labels[0], labels[1]) and torch.equal(labels[0], labels[2])


def test_images_of_other_modes_become_rgb(tmp_path):
    Image.fromarray(np.full((4, 6), 77, np.uint8)).save(tmp_path/"grey.png")
    Image.new("RGBA", (6, 4), (1, 2, 3, 4)).save(tmp_path/"alpha.png")
    dataset = SegmentationDataset([tmp_path/"grey.png", tmp_path/"alpha.png"], None, {})
    assert dataset[0]["image"].unique().tolist() == [77] and dataset[1]["image"][:, 0, 0].tolist() == [1, 2, 3]


def test_resizing_once(city):
    small, whole = gta5(city/"gta5", size=(16, 16))[0], gta5(city/"gta5")[0]
    assert small["image"].shape == (3, 16, 16) and small["label"].shape == (16, 16)
    assert torch.equal(small["label"], whole["label"][1::2, 2::4])  # the centres of the cells
    assert (cut(whole["image"].float(), (0, 0, *SIZE), (16, 16)) - small["image"]).abs().max() <= 1


def test_no_label_file_is_opened_without_labels(city, tmp_path):
    root = shutil.copytree(city/"cityscapes", tmp_path/"cityscapes")
    for path in (root/"gtFine").rglob("*.png"): path.write_bytes(b"not to be read")
    assert sorted(cityscapes(root, "train", labels=False)[0]) == ["image", "index"]
    shutil.rmtree(root/"gtFine")
    assert len(cityscapes(root, "val", labels=False)) == 2
    assert "2 of 2" in message(cityscapes, root, "val")


def test_a_folder_of_ones_own(tmp_path):
    for name in ("a", "b"):
        for kind, mode in (("photos", "RGB"), ("{masks}", "L")): (tmp_path/kind).mkdir(exist_ok=True); Image.new(mode, (5, 4)).save(tmp_path/kind/f"{name}.png")
    (tmp_path/"photos/._a.png").write_bytes(b"what some archivers leave")
    images = find_images(tmp_path, "photos/*.png")
    dataset = SegmentationDataset(images, label_paths(tmp_path, images, "photos/*.png", "{masks}/*.png"), {0: 1}, names=("a", "b"))
    assert len(dataset) == 2 and dataset[1]["label"].unique().tolist() == [1] and dataset.num_classes == 2


# ---------------------------------------------------------------- folders and files that are not in order

def test_folders(city, tmp_path):
    assert "no such folder" in message(gta5, tmp_path/"nowhere")
    (tmp_path/"empty").mkdir()
    assert "holds nothing" in message(synthia, tmp_path/"empty")
    (tmp_path/"file").write_text("")
    assert "not a folder" in message(gta5, tmp_path/"file")
    for given_layout, wanted in itertools.permutations(LAYOUTS, 2):
        text = message(READERS[wanted], city/given_layout)
        assert f"the layout of {given_layout}" in text and str(city/given_layout) in text and LAYOUTS[wanted].images.split("/")[0] in text
    assert "train/, val/" in message(cityscapes, city/"cityscapes", "valid")
    assert "cityscapes/, gta5/, synthia/" in message(gta5, city)


def test_image_without_label(gta):
    (gta/"labels/00002.png").unlink()
    text = message(gta5, gta)
    assert str(gta/"images/00002.png") in text and str(gta/"labels/00002.png") in text and "1 of 5" in text


def test_label_without_image_is_no_concern(gta):
    (gta/"images/00002.png").unlink()
    assert len(gta5(gta)) == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unknown_label_values(city, layout, tmp_path):
    dataset = READERS[layout](city/layout)
    y = np.zeros(SIZE, np.uint8)
    y[3, 5], y[4] = 77, 99
    write_png16(tmp_path/"y.png", np.stack([y] * 3, -1)) if layout == "synthia" else Image.fromarray(y).save(tmp_path/"y.png")
    dataset.labels[1] = tmp_path/"y.png"
    text = message(dataset.__getitem__, 1)
    assert "77, 99," in text and str(tmp_path/"y.png") in text and {"gta5": "0-34, 255", "synthia": "0-22", "cityscapes": "0-33, 255"}[layout] in text


def test_a_large_number_is_not_taken_for_its_low_byte(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path/"x.png")
    Image.fromarray(np.full((4, 4), 256 + 7, np.uint16)).save(tmp_path/"y.png")
    assert "263" in message(SegmentationDataset([tmp_path/"x.png"], [tmp_path/"y.png"], LAYOUTS["gta5"].ids).__getitem__, 0)


def test_sizes_that_differ(gta):
    Image.new("L", (64, 30), 7).save(gta/"labels/00001.png")
    for size in (None, (16, 16)):  # resizing must not hide it
        text = message(gta5(gta, size).__getitem__, 0)
        assert "64 x 30" in text and "64 x 32" in text and str(gta/"labels/00001.png") in text and str(gta/"images/00001.png") in text


@pytest.mark.parametrize("folder", ["images", "labels"])
@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"<html>404</html>", "half", "all but the end"])
def test_truncated_or_foreign_file(gta, folder, content):
    path = gta/folder/"00003.png"
    whole = path.read_bytes()
    path.write_bytes({"half": whole[:len(whole) // 2], "all but the end": whole[:-30]}.get(content, content) if isinstance(content, str) else content)
    assert str(path) in message(gta5(gta).__getitem__, 2)


def test_file_out_of_reach_is_not_called_damaged(tmp_path):
    (tmp_path/"x.png").mkdir()
    text = message(SegmentationDataset([tmp_path/"x.png"], None, {}).__getitem__, 0)
    assert "cannot be read (Is a directory)" in text and "damaged" not in text and text.count("x.png") == 1


def test_file_that_is_gone(gta):
    dataset = gta5(gta)
    (gta/"images/00001.png").unlink()
    assert "no such file" in message(dataset.__getitem__, 0)


@pytest.mark.parametrize("layout", ["gta5", "synthia"])
def test_damaged_bytes_raise_a_file_error_or_nothing(city, layout, tmp_path):
    dataset, dice = READERS[layout](city/layout), random.Random(0)
    for files, _ in itertools.product((dataset.images, dataset.labels), range(120)):
        whole, data = files[0], bytearray(files[0].read_bytes())
        for _ in range(dice.randint(1, 4)): data[dice.randrange(len(data))] = dice.randrange(256)
        (tmp_path/"damaged.png").write_bytes(data)
        files[0] = tmp_path/"damaged.png"
        try: dataset[0]
        except FileError as e: assert "damaged.png" in str(e) and "\n" not in str(e)
        files[0] = whole


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_sentence_survives_workers(gta, workers):
    (gta/"labels/00004.png").write_bytes(b"")
    dataset = gta5(gta)
    text = message(list, DataLoader(dataset, batch_size=2, num_workers=workers))
    assert text == message(dataset.__getitem__, 3) and text.startswith(str(gta))


def test_folder_named_like_the_error(tmp_path):
    root = tmp_path/"Caught FileError: no"
    root.mkdir()
    (root/"x.png").write_bytes(b"")
    dataset = SegmentationDataset([root/"x.png"] * 2, None, {})
    assert [message(list, DataLoader(dataset, num_workers=n)) for n in (0, 1)] == [f"{root/'x.png'}: is no image; replace it, for example from its archive"] * 2


# ---------------------------------------------------------------- workers, processes, resuming

def test_workers_do_not_matter(city):
    dataset = synthia(city/"synthia", size=(16, 32))
    sampler = lambda: StepSampler(0, 4, range(3), lambda step, slot: epoch_index(1, "sac", step, slot, 3, len(dataset)))
    runs = [list(DataLoader(dataset, batch_sampler=sampler(), num_workers=n)) for n in (0, 1, 3)]
    for batches in zip(*runs):
        for k in ("image", "label", "index"): assert torch.equal(batches[0][k], batches[1][k]) and torch.equal(batches[0][k], batches[2][k])


@quick
@given(st.integers(1, 12), st.integers(5, 40), st.integers(0, 9), st.integers(0, 5))
def test_order_of_images(batch, n, step, seed):
    pick = lambda step, slot: epoch_index(seed, "abn", step, slot, batch, n)
    walk = [pick(k, slot) for k in range(-(-2 * n // batch)) for slot in range(batch)]
    for epoch in range(2): assert sorted(walk[epoch * n:(epoch + 1) * n]) == list(range(n))
    batches = list(StepSampler(0, step + 3, range(batch), pick))
    assert list(StepSampler(step, step + 3, range(batch), pick)) == batches[step:] and len(StepSampler(step, step + 3, range(batch), pick)) == 3
    for P in (p for p in range(1, batch + 1) if batch % p == 0):
        shares = [list(StepSampler(0, step + 3, range(p * batch // P, (p + 1) * batch // P), pick)) for p in range(P)]
        assert [sum(parts, []) for parts in zip(*shares)] == batches


def test_streams_and_epochs_have_their_own_order():
    order = lambda seed, stage, epoch: [epoch_index(seed, stage, epoch, slot, 50, 50) for slot in range(50)]
    orders = [order(*key) for key in ((0, "abn", 0), (0, "abn", 1), (0, "sac", 0), (1, "abn", 0))]
    assert all(a != b for a, b in itertools.combinations(orders, 2)) and orders[0] == order(0, "abn", 0)


# ---------------------------------------------------------------- geometry

@st.composite
def cuts(draw):
    H, W, h, w = (draw(st.integers(2, 12)) for _ in range(4))
    height, width = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    return (H, W), (draw(st.integers(1 - height, H - 1)), draw(st.integers(1 - width, W - 1)), height, width), (h, w), draw(st.booleans())


@quick
@given(cuts(), st.sampled_from([0., .45, 2.]))
def test_cut_is_pad_crop_and_pillows_resize(case, fill):
    (H, W), (top, left, height, width), size, flip = case
    x = torch.rand(1, H, W, generator=generator(0, H, W))
    wide = np.full((H + 40, W + 40), fill, np.float32)
    wide[20:20 + H, 20:20 + W] = x[0]
    part = Image.fromarray(wide[20 + top:20 + top + height, 20 + left:20 + left + width])
    slow = np.asarray(part.resize(size[::-1], Image.BILINEAR))
    assert np.abs(cut(x, (top, left, height, width), size, flip, fill=fill)[0].numpy() - (slow[:, ::-1] if flip else slow)).max() < 1e-5
    nearest = np.asarray([[part.getpixel((int((j + .5) * width / size[1]), int((i + .5) * height / size[0]))) for j in range(size[1])] for i in range(size[0])])
    assert np.array_equal(cut(x, (top, left, height, width), size, flip, "nearest", fill)[0].numpy(), (nearest[:, ::-1] if flip else nearest).astype(np.float32))


def test_cut_fills_each_channel_and_refuses_boxes_outside():
    out = cut(torch.ones(3, 4, 4), (-4, 0, 8, 4), (8, 4), fill=(.1, .2, .3))
    assert torch.allclose(out[:, :4], torch.tensor([.1, .2, .3])[:, None, None].expand(3, 4, 4)) and (out[:, 4:] == 1).all()
    for box in ((4, 0, 2, 2), (-3, 0, 3, 2), (0, 9, 1, 1)):
        with pytest.raises(ValueError, match="outside"): cut(torch.ones(1, 4, 4), box, (2, 2))


@quick
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
def test_random_box_is_inside_or_around(height, width, key):
    top, left, h, w = random_box(generator(key), height, width, (9, 13))
    assert (h, w) == (height, width)
    for start, n, frame in ((top, h, 9), (left, w, 13)): assert 0 <= start <= frame - n if n <= frame else frame - n <= start <= 0


@quick
@given(st.integers(0, 99), st.sampled_from([(.5, 1.), (.5, 2.), (1., 2.), (.1, .2)]))
def test_source_image_and_label_move_together(key, scale):
    blocks = torch.arange(8, dtype=torch.uint8).repeat_interleave(8).expand(32, 64)  # vertical stripes; the image says the label
    image = (blocks * 30)[None].expand(3, -1, -1)
    x, y = source_view(image, blocks, generator(key), (32, 64), scale, fill=[1.] * 3)
    assert x.shape == (3, 32, 64) and y.shape == (32, 64) and y.dtype == torch.int64 and 0 <= x.min() and x.max() <= 1
    inside = y != IGNORE_INDEX
    assert inside.any()
    agree = (x[0] * 255 / 30).round().long() == y
    steady = torch.nn.functional.max_pool2d(y[None, None].float(), 5, 1, 2)[0, 0] == -torch.nn.functional.max_pool2d(-y[None, None].float(), 5, 1, 2)[0, 0]
    assert agree[inside & steady].all() and (x[:, ~inside & steady] > .99).all()


def test_padding_is_zero_after_normalising():
    image, label = render("source", "train", 0, SIZE)
    mean, std = matching_statistics("gta5")
    x, y = source_view(image, label, generator(3), (64, 128), (.25, .25), fill=mean, jitter=.5)
    rows, columns = (y != IGNORE_INDEX).any(1).nonzero(), (y != IGNORE_INDEX).any(0).nonzero()
    outside = torch.ones(64, 128, dtype=torch.bool)
    outside[max(0, rows.min() - 2):rows.max() + 3, max(0, columns.min() - 2):columns.max() + 3] = False
    assert outside.any() and normalize(x, mean, std)[:, outside].abs().max() < 1e-5


def test_matching_statistics():
    for name, (mean_s, std_s) in COLOR_STATISTICS.items():
        mean, std = matching_statistics(name)
        pixels = torch.randn(3, 100, 200, generator=generator(0)) * torch.tensor(std_s)[:, None, None] + torch.tensor(mean_s)[:, None, None]
        ours, (mean_t, std_t) = normalize(pixels, mean, std), COLOR_STATISTICS["cityscapes"]
        assert torch.allclose(ours.mean((1, 2)), (torch.tensor(mean_t) - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD), atol=.03)
        assert torch.allclose(ours.std((1, 2)), torch.tensor(std_t) / torch.tensor(IMAGENET_STD), atol=.03)


# ---------------------------------------------------------------- the batch of views

@quick
@given(st.integers(0, 9999), st.integers(0, 4))
def test_group_of_views(key, crops):
    image, size = render("target", "demo", 0, SIZE)[0], (24, 48)
    views, boxes, flips = target_views(image, generator(key), size, crops)
    assert views.shape == (crops + 1, 3, *size) and boxes.shape == (crops + 1, 4) and boxes.dtype == torch.int64 and flips.shape == (crops + 1,) and flips.dtype == torch.bool
    top, left, height, width = boxes.unbind(1)
    assert boxes[0].tolist() == [0, 0, *size] and (top >= 0).all() and (left >= 0).all() and (top + height <= 24).all() and (left + width <= 48).all()
    assert (height >= 12).all() and (width >= 24).all() and ((width - 2 * height).abs() <= 2).all()  # the aspect ratio, to rounding
    canvas = views[0].flip(-1) if flips[0] else views[0]
    for view, box, flip in zip(views, boxes, flips): assert torch.equal(view, cut(canvas, box, size, flip))
    again = target_views(image, generator(key), size, crops)
    assert torch.equal(views, again[0]) and torch.equal(boxes, again[1]) and torch.equal(flips, again[2])


def test_frequencies_of_the_draws():
    image, n = torch.zeros(3, 16, 32, dtype=torch.uint8), 800
    image[:, :, :16] = 255
    groups = [target_views(image, generator(0, k), (16, 32), 1, joint_scale=(1., 1.)) for k in range(n)]
    flips = torch.stack([f for _, _, f in groups]).float()
    assert ((flips.mean(0) - .5).abs() < .07).all() and abs(torch.corrcoef(flips.T)[0, 1]) < .1
    joint = torch.tensor([(v[0, 0, 0, 0] > .5) != f[0] for v, _, f in groups]).float().mean()  # white on the left: not mirrored
    assert abs(joint - .5) < .07
    heights = torch.stack([b[1, 2] for _, b, _ in groups]).float()
    assert abs(heights.mean() - 12) < .4 and heights.min() == 8 and heights.max() == 16


def test_noise_leaves_geometry_alone_and_draws_by_its_key():
    view = render("target", "demo", 0, SIZE)[0] / 255
    off = dict(p_blur=0., p_jitter=0., p_grey=0.)
    assert torch.equal(photometric_noise(view, generator(0), **off), view)
    for k in range(10):
        out = photometric_noise(view, generator(0, k))
        assert out.shape == view.shape and 0 <= out.min() and out.max() <= 1 + 1e-6 and torch.equal(out, photometric_noise(view, generator(0, k)))
    ramp = torch.linspace(0, 1, 64).expand(3, 32, 64)
    blurred = photometric_noise(ramp, generator(0), (2., 2.), p_jitter=0., p_grey=0.)
    assert (blurred - ramp)[..., 8:-8].abs().max() < 1e-5  # a blur moves no slope
    grey = photometric_noise(view, generator(0), **{**off, "p_grey": 1.})
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    changed = torch.tensor([not torch.equal(photometric_noise(view, generator(0, k), **{**off, "p_jitter": .5}), view) for k in range(150)])
    assert abs(changed.float().mean() - .5) < .15


def test_no_draw_touches_the_global_generator():
    image, label = render("source", "demo", 0, SIZE)
    before = torch.get_rng_state()
    source_view(image, label, generator(0), (16, 32), jitter=.5)
    photometric_noise(target_views(image, generator(0), (16, 32))[0][0], generator(1), p_jitter=1.)
    epoch_index(0, "sac", 5, 1, 4, 10)
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------- lists, folders, the audit

def test_lists_of_frames(gta, tmp_path):
    (tmp_path/"list.txt").write_text("images/00004.png\n\nimages/00002.png\n")
    (gta/"labels/00001.png").unlink()  # of no concern: it is not in the list
    assert [p.name for p in gta5(gta, frames=tmp_path/"list.txt").images] == ["00002.png", "00004.png"]
    (tmp_path/"list.txt").write_text("".join(f"images/{i}.png\n" for i in range(7)))
    text = message(gta5, gta, frames=tmp_path/"list.txt")
    assert "list.txt: 7 of its 7 images" in text and "images/4.png, ..." in text and "images/5.png" not in text
    assert "none.txt" in message(gta5, gta, frames=tmp_path/"none.txt")
    (tmp_path/"list.txt").write_bytes(b"\xef\xbb\xbfimages/00003.png\r\n./images/00005.png \r\n")  # from an editor on Windows
    assert [p.name for p in gta5(gta, frames=tmp_path/"list.txt").images] == ["00003.png", "00005.png"]
    assert [p.name for p in gta5(gta, frames=[gta/"images/00004.png"]).images] == ["00004.png"]
    for other in ("/elsewhere/00001.png", "../images/00001.png", "labels/00002.png"): assert f"1 of its 1 images are not among those in {gta}: {other}" in message(gta5, gta, frames=[other])
    (tmp_path/"list.txt").write_text("\n \n")
    assert "names no images" in message(gta5, gta, frames=tmp_path/"list.txt") and "names no images" in message(gta5, gta, frames=[])
    (tmp_path/"list.txt").write_bytes(b"\xff\xfe\0")
    assert "not UTF-8" in message(gta5, gta, frames=tmp_path/"list.txt")


def test_frames_of_the_released_models():
    frames = released_gta5_frames()
    assert len(set(frames)) == 10000 and frames[0] == "images/00001.png" and frames[-1] == "images/10000.png"


def test_cityscapes_in_train_ids(city, tmp_path):
    root = shutil.copytree(city/"cityscapes", tmp_path/"cityscapes")
    whole = [cityscapes(root, "train")[i]["label"] for i in range(3)]
    for path, label in zip(cityscapes(root, "train").labels, whole): Image.fromarray(label.numpy()).save(str(path).replace("labelIds", "labelTrainIds"))
    for path in cityscapes(root, "train").labels: path.unlink()
    assert len(cityscapes(root, "val").labels) == 2 and "labelIds" in cityscapes(root, "val").labels[0].name  # each split by its own files
    for path in (root/"gtFine/val").rglob("*.png"): path.unlink()
    assert all(torch.equal(a, cityscapes(root, "train")[i]["label"]) for i, a in enumerate(whole))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_synthia_converted_to_8_bits_is_recognised(city, tmp_path, mode):
    root = shutil.copytree(city/"synthia", tmp_path/"synthia")
    Image.new(mode, (SIZE[1], SIZE[0])).save(root/"GT/LABELS/0000001.png")
    text = message(synthia(root).__getitem__, 1)
    assert "0000001.png: 8 bits a channel instead of 16" in text and "archive" in text and "the high byte of each number" in text
    Image.new(mode, (SIZE[1], SIZE[0]), (3, 0, 0) if mode == "RGB" else 3).save(root/"GT/LABELS/0000001.png")
    assert "scaled or clipped" in message(synthia(root).__getitem__, 1)


def test_cityscapes_ids_where_train_ids_are_expected(city, own):
    text = message(folder(city/"gta5/images", city/"gta5/labels").__getitem__, 0)
    assert "look like the ids of Cityscapes" in text and "expected 0-18, 255" in text
    Image.fromarray(np.full((4, 6), 44, np.uint8)).save(own/"maps/z.png")
    assert "data set?" in message(folder(own/"photos", own/"maps").__getitem__, 2)  # no id of Cityscapes either
    assert "a name among the classes" in message(folder(own/"photos", own/"maps", own/"classes.txt").__getitem__, 2)


def test_label_maps_in_colours(gta):
    for mode, color in (("RGB", (128, 64, 128)), ("RGBA", (7, 7, 8, 255))):
        Image.new(mode, SIZE[::-1], color).save(gta/"labels/00001.png")
        assert "a picture in colours" in message(gta5(gta).__getitem__, 0)
    Image.new("RGB", SIZE[::-1], (7, 7, 7)).save(gta/"labels/00001.png")  # grey, as three equal channels
    assert gta5(gta)[0]["label"].unique().tolist() == [0]


def write_png(path, rows, bits, kind, width):
    "A PNG of packed rows, in forms that Pillow does not write."
    chunk = lambda name, data: len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
    head = width.to_bytes(4, "big") + len(rows).to_bytes(4, "big") + bytes([bits, kind, 0, 0, 0])
    palette = chunk(b"PLTE", bytes(3 << bits)) if kind == 3 else b""
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + palette + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + chunk(b"IEND", b""))


@pytest.mark.parametrize("kind", [0, 3], ids=["grey", "palette"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_numbers_in_fewer_than_8_bits(tmp_path, bits, kind):
    values = [k % 2 ** bits for k in range(8)]
    row = int("".join(f"{v:0{bits}b}" for v in values), 2).to_bytes(bits, "big")
    write_png(tmp_path/"y.png", [row] * 3, bits, kind, width=8)
    Image.new("RGB", (8, 3)).save(tmp_path/"x.png")
    assert SegmentationDataset([tmp_path/"x.png"], [tmp_path/"y.png"], {k: k for k in range(16)})[0]["label"].tolist() == [values] * 3


def test_synthia_with_an_alpha_channel(tmp_path):
    write_png(tmp_path/"y.png", [bytes([0, 3, 0, 9, 0, 0, 255, 255] * 5)] * 4, 16, 6, width=5)
    Image.new("RGB", (5, 4)).save(tmp_path/"x.png")
    assert SegmentationDataset([tmp_path/"x.png"], [tmp_path/"y.png"], LAYOUTS["synthia"].ids, bits=16)[0]["label"].unique().tolist() == [0]


@pytest.mark.parametrize("name, values", [("x.png", np.uint16), ("x.tif", np.float32), ("x.tiff", np.int32)])
def test_images_of_unknown_range_are_refused(tmp_path, name, values):
    Image.fromarray(np.arange(24).reshape(4, 6).astype(values)).save(tmp_path/name)
    assert "more than 8 bits" in message(folder(tmp_path).__getitem__, 0)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_photographs_stand_upright(tmp_path):
    lying = np.zeros((8, 16, 3), np.uint8)
    lying[:, 8:] = 255
    exif_of = lambda turn: bytes.fromhex("457869660000" "4d4d002a00000008" "0001" "0112000300000001" f"{turn:04x}0000" "00000000")
    Image.fromarray(lying).save(tmp_path/"x.jpg", exif=exif_of(6), quality=95)  # to be shown a quarter turn clockwise
    data, dice = (tmp_path/"x.jpg").read_bytes(), random.Random(0)
    assert folder(tmp_path)[0]["image"][0].float().mean(1).round().tolist() == [0] * 8 + [255] * 8
    for turn in range(10):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)).save(tmp_path/"x.png", exif=exif_of(turn))
        assert np.array_equal(np.asarray(open_rgb(tmp_path/"x.png")), np.asarray(ImageOps.exif_transpose(Image.open(tmp_path/"x.png"))))
    for _ in range(300):  # whatever stands in the note
        note = bytearray(data[12:60])
        for _ in range(dice.randint(1, 6)): note[dice.randrange(len(note))] = dice.randrange(256)
        (tmp_path/"x.jpg").write_bytes(data[:12] + note + data[60:])
        try: open_rgb(tmp_path/"x.jpg")
        except FileError as e: assert "x.jpg" in str(e)


@pytest.fixture
def own(tmp_path):
    "A folder of images in sub-folders, with three classes and two numbers that mean none."
    for name in ("a/x.jpg", "b/y.png", "z.webp"):
        (tmp_path/"photos"/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (9, 9, 9)).save(tmp_path/"photos"/name)
        label = (tmp_path/"maps"/name).with_suffix(".png")
        label.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.array([[0, 1, 2, 7, 255, 0]] * 4, np.uint8)).save(label)
    (tmp_path/"classes.txt").write_text("one\ntwo\n three \n\n")
    return tmp_path


def test_folder(own):
    data = folder(own/"photos", own/"maps", own/"classes.txt", ignore=(7, 255))
    assert [p.name for p in data.images] == ["x.jpg", "y.png", "z.webp"] and data.names == ("one", "two", "three")
    assert data[1]["label"][0].tolist() == [0, 1, 2, 255, 255, 0]
    assert sorted(folder(own/"photos")[0]) == ["image", "index"]
    assert "unknown label values 7" in message(folder(own/"photos", own/"maps", own/"classes.txt").__getitem__, 0)
    (own/"maps/z.png").unlink()
    assert "z.png is missing (1 of 3" in message(folder, own/"photos", own/"maps", own/"classes.txt")
    (own/"empty").mkdir()
    assert "no images in it" in message(folder, own/"empty") and "no such folder" in message(folder, own/"nowhere")
    for wrong in (-1, 65536): assert f"ignore: {wrong}" in message(folder, own/"photos", own/"maps", own/"classes.txt", (255, wrong))
    assert "its own label map" in message(folder, own/"photos", own/"photos", own/"classes.txt")


@pytest.mark.parametrize("content, words", [("", "0 class names"), ("a\nb\na\n", "a occurs twice"), ("\n".join(map(str, range(256))), "256 class names"),
                                            ("a\n\nb\n", "an empty line")])
def test_class_lists(tmp_path, content, words):
    (tmp_path/"classes.txt").write_text(content)
    assert words in message(read_classes, tmp_path/"classes.txt")



# ---------------------------------------------------------------- the audit

@pytest.fixture
def audited(capsys):
    def audited(*args):
        "Exit status and lines of the command line."
        with pytest.raises(SystemExit) as e: main(["audit", *map(str, args)])
        out, err = capsys.readouterr()
        assert (e.value.code == 2) == bool(err)
        return e.value.code, (err or out).splitlines()
    return audited


def counted(lines, what):
    return int(next(line for line in lines if line.startswith(what + "  ")).split()[-1])


def test_audit_as_a_program(gta):
    (gta/"labels/00003.png").unlink()
    done = subprocess.run([sys.executable, "-m", "sac_lit.datasets", "audit", "gta5", gta, "--fix-list", "good.txt"], cwd=gta, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr == "" and done.stdout.splitlines()[-2:] == ["1 defect", f"{gta}/images/00003.png: its label {gta}/labels/00003.png is missing"]
    assert len(gta5(gta, frames=gta/"good.txt")) == 4


def test_audit_of_what_is_in_order(city, own, audited):
    for args in (("gta5", city/"gta5"), ("synthia", city/"synthia"), ("cityscapes", city/"cityscapes")):
        status, lines = audited(*args)
        assert status == 0 and counted(lines, "images") == counted(lines, "in order") == 5 and lines[-1] == "0 defects" and "width x height: 64 x 32 (5)" in lines
    status, lines = audited("folder", "--images", own/"photos", "--labels", own/"maps", "--classes", own/"classes.txt", "--ignore", 7, 255, "--workers", 1)
    assert status == 0 and [line.split() for line in lines[-7:-2]] == [["class", "pixels", "images", "values"], ["one", "33.333", "%", "3", "0"], ["two", "16.667", "%", "3", "1"],
                                                                           ["three", "16.667", "%", "3", "2"], ["ignored", "33.333", "%", "3", "7,", "255"]]
    assert audited("folder", "--images", own/"photos")[1] == ["images                                3", "in order                              3", "", "width x height: 6 x 4 (3)", "", "0 defects"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_audit_counts_what_training_reads(city, layout, audited):
    dataset = READERS[layout](city/layout)
    labels = torch.stack([dataset[i]["label"] for i in range(len(dataset))])
    _, lines = audited(layout, city/layout, *["--split", "train"] * (layout == "cityscapes"))
    for name, i in [*zip(NAMES, range(19)), ("ignored", IGNORE_INDEX)]:
        share, _, images = next(line for line in lines if line.startswith(name + " "))[len(name):].split()[:3]
        assert share == f"{100 * (labels == i).double().mean():.3f}" and int(images) == (labels == i).any(-1).any(-1).sum()


def test_audit_of_classes_with_words_of_its_own(own, audited):
    (own/"classes.txt").write_text("ignored\nunknown\nimages\n")
    status, lines = audited("folder", "--images", own/"photos", "--labels", own/"maps", "--classes", own/"classes.txt")
    rows = [line.split() for line in lines[lines.index(next(line for line in lines if line.startswith("class "))) + 1:][:5]]
    assert status == 1 and [(r[0], r[-1]) for r in rows] == [("ignored", "0"), ("unknown", "1"), ("images", "2"), ("ignored", "255"), ("unknown", "7")]


def test_audit_names_each_defect_and_lists_the_rest(gta, audited):
    (gta/"labels/00001.png").unlink()
    Image.new("L", (9, 9), 7).save(gta/"labels/00002.png")
    (gta/"images/00003.png").write_bytes(b"no image")
    (gta/"images/00004.png").unlink()
    status, lines = audited("gta5", gta, "--fix-list", gta/"good.txt")
    assert status == 1 and lines[-4] == "3 defects" and all(f"0000{k}.png" in line for k, line in enumerate(lines[-3:], 1))
    for what, n in (("images", 4), ("label maps without an image", 1), ("label maps missing", 1), ("label maps of another size", 1), ("unreadable files", 1), ("in order", 1)): assert counted(lines, what) == n
    assert [p.name for p in gta5(gta, frames=gta/"good.txt").images] == ["00005.png"]


def test_audit_of_a_synthia_that_was_converted(city, tmp_path, audited):
    root = shutil.copytree(city/"synthia", tmp_path/"synthia")
    for path in (root/"GT/LABELS").glob("*.png"): Image.open(path).save(path)
    status, lines = audited("synthia", root)
    assert status == 1 and counted(lines, "converted label maps") == 5 and sum("the high byte of each number" in line for line in lines) == 5


def test_audit_suspects_train_ids_of_the_whole_only(gta, audited):
    truth = [gta5(gta)[i]["label"].numpy() for i in range(5)]
    for k in range(5):
        Image.fromarray(truth[k]).save(gta/f"labels/0000{k + 1}.png")
        status, lines = audited("gta5", gta, "--fix-list", gta/"good.txt")
        assert (status == 1) == (k == 4)
    assert "these look like train ids" in lines[-1] and counted(lines, "in order") == 0 and "names no images" in message(gta5, gta, frames=gta/"good.txt")


def test_audit_of_labels_that_were_withheld(city, tmp_path, audited):
    "As in the test split of Cityscapes: only the parts of the car that took the pictures."
    root = shutil.copytree(city/"cityscapes", tmp_path/"cityscapes")
    for path in cityscapes(root, "val").labels: Image.new("L", SIZE[::-1], 1).save(path)
    status, lines = audited("cityscapes", root, "--split", "val")
    assert status == 1 and lines[-2] == "1 defect" and "no pixel has a class" in lines[-1]
    assert audited("cityscapes", root, "--split", "val", "--no-labels")[0] == 0


def test_audit_lists_of_splits_and_folders(city, own, audited):
    root, good = city/"cityscapes", own/"good.txt"
    assert "name it with --split" in audited("cityscapes", root, "--fix-list", good)[1][0]
    assert audited("cityscapes", root, "--fix-list", good, "--split", "val")[0] == 0 and len(cityscapes(root, "val", frames=good)) == 2
    (own/"photos/b/y.png").write_bytes(b"")
    assert audited("folder", "--images", own/"photos", "--fix-list", good)[0] == 1 and good.read_text() == "a/x.jpg\nz.webp\n"


def test_audit_of_nothing(city, tmp_path, audited):
    status, lines = audited("synthia", tmp_path/"none")
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and "no such folder" in lines[0]
    status, lines = audited("gta5", city/"gta5", "--fix-list", tmp_path/"none/good.txt")
    assert status == 2 and len(lines) == 1 and "good.txt: cannot be written (No such file or directory)" in lines[0]
    for wrong in ([], ["gta6", "x"], ["gta5"], ["folder", "x"], ["folder", "--images", "x", "--ignore", "sky"]): assert audited(*wrong)[0] == 2


@quick
@given(st.integers(0, 30), st.integers(1, 4))
def test_threads_stay_near_and_in_order(n, workers):
    begun, lock = [], threading.Lock()
    def f(k):
        with lock: begun.append(k)
        return k * k
    for done, square in enumerate(in_parallel(f, range(n), workers), 1): assert square == (done - 1) ** 2 and max(begun) < done + 2 * workers
    assert sorted(begun) == list(range(n))


def test_threads_pass_errors_on():
    with pytest.raises(ZeroDivisionError): list(in_parallel(lambda k: 1 // k, [1, 1, 0, 1], 2))


@pytest.fixture
def many(tmp_path):
    "100 tiny images in a folder, as a data set of 4 x 6 pixels."
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(100): Image.fromarray(rng.integers(0, 255, (8, 12, 3), np.uint8)).save(tmp_path / "images" / f"{i:03}.png")
    return folder(tmp_path / "images", size=(4, 6)), tmp_path / "cache"


class Interrupted(SegmentationDataset):
    "A data set whose images count how often they are read, and whose 80th interrupts the first time."
    reads, armed = 0, True

    def __getitem__(self, i):
        self.reads += 1
        if i == 80 and self.armed:
            self.armed = False
            raise KeyboardInterrupt
        return super().__getitem__(i)


def test_cache_goes_on_after_an_interruption(many):
    dataset, place = many
    dataset.__class__ = Interrupted
    with pytest.raises(KeyboardInterrupt): cached(dataset, place)
    assert not [p for p in place.iterdir() if p.is_dir() and p.suffix != ".partial"]       # nothing that could be taken for whole
    fast = cached(dataset, place)
    assert dataset.reads == 81 + 100 - 64                                                   # noted after every 64 images
    for i in range(100): assert torch.equal(fast[i]["image"], dataset[i]["image"])


def test_cache_of_changed_files_is_another_one(many):
    dataset, place = many
    first = cached(dataset, place)
    Image.new("RGB", (12, 8)).save(dataset.images[3])
    second = cached(dataset, place)
    assert first.place != second.place and second[3]["image"].sum() == 0 and first[3]["image"].sum() > 0


def test_cache_on_a_full_disk(many, monkeypatch):
    dataset, place = many
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match="no room for 0.0 GB .No space left on device.; free the disk"): cached(dataset, place)
    assert not list(place.rglob("*.npy"))
    assert torch.equal(cached(dataset, place, workers=2)[7]["image"], dataset[7]["image"])
