# ruff: noqa: F401, F811
"""What spoils a training: in the audit, on its page, and at the start of a training."""
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_audit import audited, counted, of_folder, table
from test_datasets import city, folder, gta, message, own, pytestmark, save, SIZE

from sac_lit import run_data
from sac_lit.audit import _look_at_all, audit
from sac_lit.core import UserError
from sac_lit.datasets import open_dataset
from sac_lit.findings import (
    blended_edges,
    class_remarks,
    findings_page,
    is_blended,
    same_pictures,
    small_grey,
)
from sac_lit.run_data import _check_data, _warn, data_remarks
from sac_lit.toy_city import render


@pytest.fixture
def streets(tmp_path):
    "Six streets of the toy city, with masks of 0 and 255 for the road."
    for name in ("photos", "maps"): (tmp_path/name).mkdir()
    for i in range(6):
        image, label = render("source", "train", i, (64, 128))
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path/f"photos/{i}.png")
        save(tmp_path/f"maps/{i}.png", (label == 0).numpy() * 255)
    (tmp_path/"classes.txt").write_text("other\nroad\n")
    return tmp_path


def defects(lines):
    start = next(i for i, line in enumerate(lines) if line.split()[1:] in (["defects"], ["defect"]))
    return lines[start + 1:]


def notes(lines):
    "The notes of an audit, if there are some."
    starts = [i for i, line in enumerate(lines) if line.split()[1:] in (["notes"], ["note"])]
    return lines[starts[0] + 1:lines.index("", starts[0])] if starts else []


# ---------------------------------------------------------------- classes

def test_masks_of_0_and_255(streets, audited):
    status, lines = audited(*of_folder(streets))
    assert status == 1 and len(defects(lines)) == 1
    assert "other is the only class; the number 255 is ignored" in defects(lines)[0]
    assert "(255 road)" in defects(lines)[0]
    (streets/"classes.txt").write_text("0 other\n255 road\n")
    status, lines = audited(*of_folder(streets))
    assert status == 0 and table(lines)[2][::4] == ["road", "255"]


@pytest.mark.parametrize("names, status, words", [
    ("a\nb\nc\nd", 1, "no pixel of d; correct the list"), ("a\nb\nc", 0, "")])
def test_a_class_without_a_pixel(own, audited, names, status, words):
    (own/"classes.txt").write_text(names)
    found, lines = audited(*of_folder(own, "--ignore", 7, 255))
    assert found == status and words in " ".join(defects(lines))


def test_classes_of_the_layout_may_be_absent(gta, audited):
    status, lines = audited("gta5", gta)
    assert status == 0 and any("no pixel of" in line for line in notes(lines))


def test_a_class_in_fewer_than_three_images(streets, audited):
    numbers = np.zeros((64, 128))
    for i in range(6): save(streets/f"maps/{i}.png", numbers + (i < 2))
    status, lines = audited(*of_folder(streets))
    assert status == 0 and "in fewer than three images: road (2)" in notes(lines)


def test_label_maps_without_a_class(streets, audited):
    save(streets/"maps/3.png", np.full((64, 128), 255))
    (streets/"classes.txt").write_text("0 other\n1 road\n255 -")
    for i in (0, 1, 2): save(streets/f"maps/{i}.png", np.ones((64, 128)))
    status, lines = audited(*of_folder(streets))
    assert status == 0 and any("1 label maps, such as" in line and "3.png" in line
                               for line in notes(lines))


def test_what_is_ignored_may_be_much():
    args = ("a", "b"), np.array([5, 5]), np.array([9, 9]), {255: 1000}, 9
    assert class_remarks(*args) == []


# ---------------------------------------------------------------- label maps

@pytest.mark.parametrize("how", [Image.BILINEAR, Image.BICUBIC, Image.LANCZOS,
                                 Image.HAMMING])
@pytest.mark.parametrize("size", [(256, 128), (100, 50), (180, 90)])
def test_blended_edges(how, size):
    for i in range(3):
        _, label = render("source", "train", i, (64, 128))
        picture = Image.fromarray(label.numpy())
        assert is_blended(np.asarray(picture.resize(size, how)))
        assert not is_blended(np.asarray(picture.resize(size, Image.NEAREST)))


def test_blended_maps_are_defects(streets, audited):
    _, label = render("source", "train", 0, (32, 64))
    blended = Image.fromarray(label.numpy()).resize((128, 64), Image.BILINEAR)
    blended.save(streets/"maps/2.png")
    command = ("folder", "--images", streets/"photos", "--labels", streets/"maps")
    status, lines = audited(*command)
    assert status == 1 and counted(lines, "label maps with blended edges") == 1


def test_label_maps_as_jpeg(streets, audited):
    Image.open(streets/"maps/2.png").save(streets/"maps/2.jpg")
    (streets/"maps/2.png").unlink()
    (streets/"classes.txt").write_text("0 other\n255 road")
    status, lines = audited(*of_folder(streets))
    assert status == 1 and counted(lines, "label maps saved as JPEG") == 1


def test_edges_of_nothing():
    for shape in ((0, 0), (1, 1), (2, 9)): assert blended_edges(np.zeros(shape, int)) == (0, 0)


# ---------------------------------------------------------------- images

def test_the_same_picture_elsewhere(streets, audited):
    (streets/"val").mkdir()
    Image.open(streets/"photos/4.png").resize((90, 45)).save(streets/"val/x.jpg", quality=60)
    command = ("folder", "--images", streets/"photos")
    assert audited(*command)[0] == 0
    status, lines = audited(*command, "--against", streets/"val", "--fix-list", streets/"good.txt")
    assert status == 1 and len(defects(lines)) == 1
    assert "4.png: shows the same as" in defects(lines)[0] and "x.jpg" in defects(lines)[0]
    assert "4.png" not in (streets/"good.txt").read_text()
    assert audited(*command, "--against", streets/"none")[0] == 2


def test_the_same_picture_twice(streets, audited):
    Image.open(streets/"photos/4.png").save(streets/"photos/7.bmp")
    status, lines = audited("folder", "--images", streets/"photos")
    assert status == 0 and any("1 pairs of images show the same" in line for line in notes(lines))


def test_pictures_are_told_apart():
    small = np.stack([small_grey(Image.fromarray(
        render("source", "train", i, (64, 128))[0].permute(1, 2, 0).numpy())) for i in range(60)])
    assert same_pictures(small) == []
    darker = (small * .7 + 20).astype(np.uint8)
    assert same_pictures(darker, small) == [(i, i) for i in range(60)]
    assert same_pictures(np.zeros((3, 32, 36), np.uint8)) == []   # too flat to be recognised
    assert same_pictures(small[:0], small) == []


def test_sizes_bands_and_bits(streets, audited):
    Image.new("RGB", (128, 300)).save(streets/"photos/a.png")
    Image.new("RGBA", (128, 64), (1, 2, 3, 9)).save(streets/"photos/b.png")
    Image.new("RGBA", (128, 64), (1, 2, 3, 255)).save(streets/"photos/c.png")
    status, lines = audited("folder", "--images", streets/"photos")
    text = "\n".join(notes(lines))
    assert status == 0 and "width / height from 0.43 to 2.00" in text
    assert "1 images" in text and "b.png, have a band beside red, green and blue" in text


def test_the_page(streets, audited, tmp_path):
    (streets/"maps/1.png").write_bytes(b"")
    status, lines = audited(*of_folder(streets, "--html", streets/"found.html"))
    page = (streets/"found.html").read_text()
    assert status == 1 and "unreadable files" in page and "data:image/png" in page
    assert "http" not in page and "<script" not in page
    pictures = [(str(i), Image.new("RGB", (9, 9))) for i in range(9)]
    assert findings_page("x", [("y", "", pictures)] * 40).count("<img") == 60
    status, lines = audited(*of_folder(streets, "--html", streets))
    assert status == 2 and "cannot be written" in lines[0]


def test_processes_find_what_threads_find(streets, monkeypatch):
    data = folder(streets/"photos", streets/"maps", streets/"classes.txt")
    by_threads = audit(data, 2)
    monkeypatch.setattr("sac_lit.audit._MANY", 1)
    assert audit(data, 2)[:4] == by_threads[:4]
    (streets/"maps/1.png").write_bytes(b"")
    assert [f.defect is None for f in _look_at_all(data, 2)] == [True, False, *[True] * 4]


# ---------------------------------------------------------------- at the start of a training

def run_of(check=True):
    "What `_warn` needs of a run."
    cfg = SimpleNamespace(data=SimpleNamespace(check=check))
    run = SimpleNamespace(cfg=cfg, said=[], kept=[])
    run.say, run.log, run.rows = run.said.append, run.kept.append, lambda **match: run.kept
    return run


def test_a_training_says_it_once(streets):
    data = folder(streets/"photos", streets/"maps", streets/"classes.txt")
    run = run_of()
    for _ in range(2): _warn(run, "source", data)
    assert len(run.said) == len(run.kept) == 1 and "road" in run.said[0]
    assert run.kept[0]["event"] == "warning" and run.said[0].startswith("warning: source: ")


@pytest.mark.parametrize("main, steps, looks", [(True, 0, 3), (True, 1, 0), (False, 0, 0)])
def test_only_the_main_process_looks_and_only_before_the_first_step(
        monkeypatch, main, steps, looks):
    asked = []
    monkeypatch.setattr(run_data, "_warn", lambda run, name, data: asked.append(name))
    rows = [{"event": "step"}] * steps
    run = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=main), agreed=lambda x: x,
                          rows=lambda **match: rows)
    _check_data(run, {"source": None, "target": None, "val": None})
    assert len(asked) == looks


def test_what_stops_the_main_process_stops_all(monkeypatch):
    "The others hear of it where they wait for its answer."
    def refuse(run, name, data): raise UserError("no pixel has a class")
    monkeypatch.setattr(run_data, "_warn", refuse)
    run = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=True), agreed=lambda x: x,
                          rows=lambda **match: [])
    assert message(_check_data, run, {"source": None}) == "no pixel has a class"
    run.accelerator.is_main_process, run.agreed = False, lambda x: "no pixel has a class"
    assert message(_check_data, run, {"source": None}) == "no pixel has a class"


def test_a_training_of_nothing_does_not_begin(streets):
    for i in range(6): save(streets/f"maps/{i}.png", np.full((64, 128), 255))
    data = folder(streets/"photos", streets/"maps", streets/"classes.txt")
    text = message(_warn, run_of(), "source", data)
    assert "no pixel has a class; nothing could be learnt" in text
    for run, name in ((run_of(check=False), "source"), (run_of(), "val")):
        _warn(run, name, data)
        assert len(run.said) == 1


def test_a_sample_is_looked_at(streets):
    data = folder(streets/"photos", streets/"maps", streets/"classes.txt")
    assert data_remarks(data, 3) == data_remarks(data, 3)
    assert data_remarks(data, 3)[0].text.startswith("3 of 6 label maps: ")


def test_nothing_is_said_of_what_is_in_order(city):
    data = open_dataset("gta5", city/"gta5")
    assert data_remarks(data) == []
