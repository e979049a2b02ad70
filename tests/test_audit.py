# ruff: noqa: F401, F811
"""The audit of a data set, its command line, and the cache of decoded images."""
import errno
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_datasets import (  # fixtures among them
    city,
    cityscapes,
    folder,
    gta,
    gta5,
    message,
    own,
    PUBLIC,
    pytestmark,
    read,
    save,
    SIZE,
)

from sac_lit import audit as module
from sac_lit.audit import _in_parallel, cached, look_at, main
from sac_lit.bands import Bands
from sac_lit.core import ASIDE, IGNORE_INDEX, NAMES, UserError
from sac_lit.datasets import Layout, LAYOUTS, open_dataset, SegmentationDataset
from sac_lit.datasets import main as datasets_main
from sac_lit.findings import small_grey

quick = settings(deadline=None, derandomize=True, max_examples=40)


@pytest.fixture
def audited(capsys):
    def audited(*args):
        "Exit status and lines of the command line."
        with pytest.raises(SystemExit) as e: datasets_main(["audit", *map(str, args)])
        out, err = capsys.readouterr()
        assert (e.value.code == 2) == bool(err)
        return e.value.code, (err or out).splitlines()
    return audited


def counted(lines, what):
    return int(next(line for line in lines if line.startswith(what + "  ")).split()[-1])


def table(lines):
    "The rows of the table of classes, in words."
    start = next(i for i, line in enumerate(lines) if line.startswith("class "))
    return [line.split() for line in lines[start:lines.index("", start)]]


def of_folder(root, *more):
    return ("folder", "--images", root/"photos", "--labels", root/"maps",
            "--classes", root/"classes.txt", *more)


def test_audit_as_a_program(gta):
    (gta/"labels/00003.png").unlink()
    command = [sys.executable, "-m", "sac_lit.datasets", "audit", "gta5", gta,
               "--fix-list", "good.txt"]
    done = subprocess.run(command, cwd=gta, capture_output=True, text=True, timeout=120)
    missing = f"{gta}/images/00003.png: its label {gta}/labels/00003.png is missing"
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.splitlines()[-2:] == ["1 defect", missing]
    assert len(gta5(gta, frames=gta/"good.txt")) == 4
    assert not list(gta.glob(ASIDE))


def test_both_names_of_the_command(city, capsys):
    outputs = []
    for argv in (["audit", "gta5"], ["gta5"]):
        with pytest.raises(SystemExit) as e: main([*argv, str(city/"gta5")])
        assert e.value.code == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("layout", PUBLIC)
def test_audit_of_what_is_in_order(city, audited, layout):
    status, lines = audited(layout, city/layout)
    assert status == 0 and counted(lines, "images") == counted(lines, "in order") == 5
    assert lines[-1] == "0 defects" and "width x height: 64 x 32 (5)" in lines


def test_audit_of_a_folder_in_order(own, audited):
    status, lines = audited(*of_folder(own, "--ignore", 7, 255, "--workers", 1))
    assert status == 0 and table(lines) == [
        ["class", "pixels", "images", "values"],
        ["one", "33.333", "%", "3", "0"], ["two", "16.667", "%", "3", "1"],
        ["three", "16.667", "%", "3", "2"], ["ignored", "33.333", "%", "3", "7,", "255"]]
    assert audited("folder", "--images", own/"photos")[1] == [
        "images                                3", "in order                              3", "",
        "width x height: 6 x 4 (3)", "", "0 defects"]


@pytest.mark.parametrize("layout", PUBLIC)
def test_audit_counts_what_training_reads(city, layout, audited):
    dataset = read(layout, city/layout)
    labels = torch.stack([dataset[i]["label"] for i in range(len(dataset))])  # (N, H, W)
    split = ["--split", "train"] if layout == "cityscapes" else []
    _, lines = audited(layout, city/layout, *split)
    for name, i in [*zip(NAMES, range(19)), ("ignored", IGNORE_INDEX)]:
        line = next(line for line in lines if line.startswith(name + " "))
        share, _, images = line[len(name):].split()[:3]
        assert share == f"{100 * (labels == i).double().mean():.3f}"
        assert int(images) == (labels == i).any(-1).any(-1).sum()


def test_audit_of_classes_with_words_of_its_own(own, audited):
    (own/"classes.txt").write_text("ignored\nunknown\nimages\n")
    status, lines = audited(*of_folder(own))
    rows = [(row[0], row[-1]) for row in table(lines)[1:6]]
    assert status == 1 and rows == [
        ("ignored", "0"), ("unknown", "1"), ("images", "2"), ("ignored", "255"), ("unknown", "7")]


def test_audit_names_each_defect_and_lists_the_rest(gta, audited):
    (gta/"labels/00001.png").unlink()
    Image.new("L", (9, 9), 7).save(gta/"labels/00002.png")
    (gta/"images/00003.png").write_bytes(b"no image")
    (gta/"images/00004.png").unlink()
    status, lines = audited("gta5", gta, "--fix-list", gta/"good.txt")
    assert status == 1 and lines[-4] == "3 defects"
    assert all(f"0000{k}.png" in line for k, line in enumerate(lines[-3:], 1))
    for what, n in (("images", 4), ("label maps without an image", 1), ("label maps missing", 1),
                    ("label maps of another size", 1), ("unreadable files", 1), ("in order", 1)):
        assert counted(lines, what) == n
    assert [p.name for p in gta5(gta, frames=gta/"good.txt").images] == ["00005.png"]


def test_audit_of_a_synthia_that_was_converted(city, tmp_path, audited):
    root = shutil.copytree(city/"synthia", tmp_path/"synthia")
    for path in (root/"GT/LABELS").glob("*.png"): Image.open(path).save(path)
    status, lines = audited("synthia", root)
    assert status == 1 and counted(lines, "converted label maps") == 5
    assert sum("the high byte of each number" in line for line in lines) == 5


def test_audit_suspects_train_ids_of_the_whole_only(gta, audited):
    truth = [gta5(gta)[i]["label"] for i in range(5)]
    for k in range(5):
        save(gta/f"labels/0000{k + 1}.png", truth[k])
        status, lines = audited("gta5", gta, "--fix-list", gta/"good.txt")
        assert (status == 1) == (k == 4)
    assert "these look like train ids" in lines[-1] and counted(lines, "in order") == 0
    assert "names no images" in message(gta5, gta, frames=gta/"good.txt")


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
    assert audited("cityscapes", root, "--fix-list", good, "--split", "val")[0] == 0
    assert len(cityscapes(root, "val", frames=good)) == 2
    (own/"photos/b/y.png").write_bytes(b"")
    assert audited("folder", "--images", own/"photos", "--fix-list", good)[0] == 1
    assert good.read_text() == "a/x.jpg\nz.webp\n"


def test_audit_of_nothing(city, tmp_path, audited):
    status, lines = audited("synthia", tmp_path/"none")
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and "no such folder" in lines[0]
    status, lines = audited("gta5", city/"gta5", "--fix-list", tmp_path/"none/good.txt")
    assert status == 2 and len(lines) == 1
    assert "good.txt: cannot be written (No such file or directory)" in lines[0]


@pytest.mark.parametrize("argv", [
    [], ["gta6", "x"], ["gta5"], ["folder", "x"], ["folder", "--images", "x", "--ignore", "sky"],
    ["math:pi", "x"], ["no.such.module:name", "x"]])
def test_commands_that_are_none(audited, argv):
    assert audited(*argv)[0] == 2


def test_a_list_that_is_there_survives_an_interruption(gta, monkeypatch, audited, capsys):
    (gta/"good.txt").write_text("images/00001.png\n")
    def interrupted(*args): raise KeyboardInterrupt
    monkeypatch.setattr(module, "look_at", interrupted)
    with pytest.raises(SystemExit) as e:
        main(["audit", "gta5", str(gta), "--fix-list", str(gta/"good.txt")])
    assert e.value.code == 130 and "Traceback" not in capsys.readouterr().err
    assert (gta/"good.txt").read_text() == "images/00001.png\n"


def test_a_new_layout_has_its_subcommand(own, monkeypatch, audited):
    monkeypatch.setitem(LAYOUTS, "new", Layout("photos/**/*.*", "maps/**/*.png", about="a new one"))
    options = ("--classes", own/"classes.txt", "--ignore", 7, 255)
    assert audited("new", own, *options)[0] == 0
    status, lines = audited("new", own, "--classes", own/"classes.txt")
    assert status == 1 and counted(lines, "label maps with unknown values") == 3
    status, lines = audited("--help")
    assert status == 0
    for name, layout in LAYOUTS.items(): assert name in " ".join(lines) and layout.about
    assert "a new one" in " ".join(lines)


@quick
@given(st.integers(0, 30), st.integers(1, 4))
def test_threads_stay_near_and_in_order(n, workers):
    begun, lock = [], threading.Lock()
    def square(k):
        with lock: begun.append(k)
        return k * k
    for done, result in enumerate(_in_parallel(square, range(n), workers), 1):
        assert result == (done - 1) ** 2 and max(begun) < done + 2 * workers
    assert sorted(begun) == list(range(n))


def test_threads_pass_errors_on():
    with pytest.raises(ZeroDivisionError): [*_in_parallel(lambda k: 1 // k, [1, 1, 0, 1], 2)]


# ---------------------------------------------------------------- other bands than three

def tiles(folder, *shape, count=2, most=4096, dtype=np.uint16):
    "NumPy files of noise in a new folder."
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(count): np.save(folder/f"{k}.npy", rng.integers(0, most, shape, dtype))
    return folder


def test_audit_of_arrays_in_four_bands(tmp_path, audited):
    root, page, good = tiles(tmp_path/"tiles", 24, 36, 4), tmp_path/"x.html", tmp_path/"good.txt"
    command = "folder", "--images", root
    status, lines = audited(*command)
    assert status == 2 and "no images" in lines[0] and "--bands" in lines[0]
    status, lines = audited(*command, "--bands", 4)
    assert status == 1 and counted(lines, "images of more than 8 bits") == 2
    assert "0.npy: grey values of more than 8 bits" in lines[-2] and "--band-range" in lines[-2]
    status, lines = audited(*command, "--bands", 5, "--band-range", 0, 4095)
    assert status == 1 and "has 4 bands" in lines[-1] and " --bands" in lines[-1]
    stated = *command, "--bands", 4, "--band-range", 0, 4095
    status, lines = audited(*stated, "--fix-list", good)
    assert status == 0 and lines[-3:] == ["width x height: 36 x 24 (2)", "", "0 defects"]
    assert good.read_text() == "0.npy\n1.npy\n"
    shutil.copytree(root, tmp_path/"val")
    status, lines = audited(*stated, "--against", tmp_path/"val", "--html", page)
    assert status == 1 and counted(lines, "images that are there twice") == 2
    assert page.read_text().count("<img") == 2


def test_audit_of_a_fourth_band(tmp_path, audited):
    values = np.random.default_rng(0).integers(0, 256, (24, 36, 4), np.uint8)
    (tmp_path/"in").mkdir()
    Image.fromarray(values, "RGBA").save(tmp_path/"in/x.png")
    command = "folder", "--images", tmp_path/"in"
    status, lines = audited(*command)
    assert status == 0 and "which is not used" in "".join(lines)
    status, lines = audited(*command, "--bands", 4)
    assert status == 0 and "not used" not in "".join(lines)
    found = look_at(open_dataset("folder", tmp_path/"in", False, bands=Bands(4)), 0)
    assert (found.small == small_grey(Image.fromarray(values[..., :3]))).all()
    assert audited(*command, "--bands", 1)[0] == 1
    assert audited(*command, "--bands", 3, "--band-range", 0, 255)[0] == 0  # as ever


@pytest.mark.parametrize("options", [("--bands", 0), ("--bands", 257), ("--band-range", 9, 1),
                                     ("--band-range", "nan", 1), ("--bands", "x")])
def test_audit_of_bands_that_cannot_be(own, audited, options):
    status, lines = audited("folder", "--images", own/"photos", *options)
    assert status == 2 and options[0][2:].split("-")[0] in lines[-1]


def test_audit_of_a_tiff_in_four_bands_names_the_options(tmp_path, audited):
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 4096, (24, 36, 4), np.uint16)
    (tmp_path/"in").mkdir()
    tifffile.imwrite(tmp_path/"in/x.tif", values, photometric="minisblack")
    command = "folder", "--images", tmp_path/"in"
    status, lines = audited(*command)
    assert status == 1 and "--bands and --band-range" in lines[-1]
    assert audited(*command, "--bands", 4, "--band-range", 0, 4095)[0] == 0
    (tmp_path/"in/x.tif").write_bytes(b"no image")
    assert "--bands" not in audited(*command)[1][-1]


# ---------------------------------------------------------------- the cache

@pytest.fixture
def many(tmp_path):
    "100 tiny images in a folder, as a data set of 4 x 6 pixels."
    rng = np.random.default_rng(0)
    (tmp_path/"images").mkdir()
    for i in range(100): save(tmp_path/f"images/{i:03}.png", rng.integers(0, 255, (8, 12, 3)))
    return folder(tmp_path/"images", size=(4, 6)), tmp_path/"cache"


class Interrupted(SegmentationDataset):
    "A data set that counts how often it is read; the 80th image interrupts the first time."
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
    folders = [p for p in place.iterdir() if p.is_dir()]
    assert all(p.suffix == ".partial" for p in folders)  # nothing that could be taken for whole
    fast = cached(dataset, place)
    assert dataset.reads == 81 + 100 - 64                # noted after every 64 images
    for i in range(100): assert torch.equal(fast[i]["image"], dataset[i]["image"])


def damage(path, how):
    "Put something else in the place of a file."
    content = path.read_bytes()
    path.unlink()
    if how == "pipe": os.mkfifo(path)
    elif how == "loop": path.symlink_to(path)
    elif how == "folder": path.mkdir()
    elif how == "gone": pass
    else: path.write_bytes({"cut": content[:-1], "zeros": bytes(99), "garbage": b"\xff1\n"}[how])


@pytest.mark.parametrize("how", ["pipe", "loop", "folder", "gone", "cut", "zeros", "garbage"])
@pytest.mark.parametrize("name", ["done", "image.npy"])
def test_a_cache_begun_and_damaged_is_begun_anew(many, name, how):
    dataset, place = many
    dataset.__class__ = Interrupted
    with pytest.raises(KeyboardInterrupt): cached(dataset, place)
    damage(next(place.rglob(name)), how)
    fast = cached(dataset, place)
    assert dataset.reads in (81 + 100, 81 + 94)          # of a note cut short, "6" is left
    for i in (0, 70, 99): assert torch.equal(fast[i]["image"], dataset[i]["image"])


@pytest.mark.parametrize("how", ["pipe", "loop", "folder", "gone", "cut", "zeros", "garbage"])
def test_a_whole_cache_that_was_damaged_gets_one_sentence(many, how):
    dataset, place = many
    path = cached(dataset, place).place/"image.npy"
    damage(path, how)
    assert f"{path}: damaged" in message(cached, dataset, place)
    shutil.rmtree(path.parent)
    assert torch.equal(cached(dataset, place)[7]["image"], dataset[7]["image"])


def test_cache_of_changed_files_is_another_one(many):
    dataset, place = many
    first = cached(dataset, place)
    Image.new("RGB", (12, 8)).save(dataset.images[3])
    second = cached(dataset, place)
    assert first.place != second.place
    assert second[3]["image"].sum() == 0 and first[3]["image"].sum() > 0


def test_cache_of_labels(city, tmp_path):
    dataset = gta5(city/"gta5", (16, 32))
    fast = cached(dataset, tmp_path)
    for i in range(5):
        assert all(torch.equal(fast[i][k], dataset[i][k]) for k in ("image", "label"))
        assert fast[i]["index"] == i


def test_cache_waits_for_the_process_that_makes_it(many):
    dataset, place = many
    made = []
    threads = [threading.Thread(target=lambda: made.append(cached(dataset, place)))
               for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len({data.place for data in made}) == 1 and len(made) == 3
    assert torch.equal(made[2][99]["image"], dataset[99]["image"])


def test_cache_needs_one_size(many):
    dataset, place = many
    Image.new("RGB", (99, 44)).save(dataset.images[3])
    dataset.size = None
    assert "003.png: not of the size of" in message(cached, dataset, place)


def test_cache_on_a_full_disk(many, monkeypatch):
    dataset, place = many
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, "posix_fallocate", full)
        problem = "no room for 0.0 GB .No space left on device.; free the disk"
        with pytest.raises(UserError, match=problem): cached(dataset, place)
    assert not list(place.rglob("*.npy"))
    assert torch.equal(cached(dataset, place, workers=2)[7]["image"], dataset[7]["image"])
