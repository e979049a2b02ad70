"""The toy city on disk and across processes; the notebook 00a_toy_city tests the scenes."""
import hashlib
import json
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from sac_lit import toy_city
from sac_lit.core import CLASSES, IGNORE_INDEX, UserError
from sac_lit.toy_city import Knobs, main, render, write_dataset

SIZE = (32, 64)
SMALL = dict(counts={"train": 2, "val": 1}, size=SIZE)


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def arrays(domain, split, index):
    image, label = render(domain, split, index, SIZE)
    return image.permute(1, 2, 0).numpy(), label.numpy()


def expect_ids(label, column, ignored):
    table = {i: getattr(c, column) for i, c in enumerate(CLASSES)} | {IGNORE_INDEX: ignored}
    return np.vectorize(table.get)(label)


def unpack_png(data):
    "Header fields and raw rows of a PNG, with every checksum verified."
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, []
    while at < len(data):
        n, kind = struct.unpack(">I4s", data[at:at + 8])
        body = data[at + 8:at + 8 + n]
        assert struct.unpack(">I", data[at + 8 + n:at + 12 + n])[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + n
    assert [k for k, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    return struct.unpack(">IIBBBBB", chunks[0][1]), zlib.decompress(chunks[1][1])


def test_gta5_layout(tmp_path):
    root = write_dataset(tmp_path/"gta5", "gta5", "source", **SMALL)
    names = [f"{i:05d}.png" for i in (1, 2, 3)]
    assert sorted(files(root)) == sorted(
        [f"images/{n}" for n in names] + [f"labels/{n}" for n in names] + ["toy_city.json"]
    )
    for name, (split, index) in zip(names, (("train", 0), ("train", 1), ("val", 0))):
        image, label = arrays("source", split, index)
        with Image.open(root / "images" / name) as x:
            assert x.mode == "RGB" and (np.asarray(x) == image).all()
        with Image.open(root/"labels"/name) as y:
            assert y.mode == "P" and (np.asarray(y) == expect_ids(label, "cityscapes_id", 1)).all()
            assert (np.asarray(y.convert("RGB"))[label == 0] == CLASSES[0].color).all()


def test_synthia_layout(tmp_path):
    root = write_dataset(tmp_path/"synthia", "synthia", "source", counts={"train": 3}, size=SIZE)
    assert sorted(files(root)) == sorted(
        [f"RGB/{i:07d}.png" for i in range(3)]
        + [f"GT/LABELS/{i:07d}.png" for i in range(3)]
        + ["toy_city.json"]
    )
    for i in range(3):
        image, label = arrays("source", "train", i)
        with Image.open(root / f"RGB/{i:07d}.png") as x:
            assert x.mode == "RGB" and (np.asarray(x) == image).all()
        header, raw = unpack_png((root/f"GT/LABELS/{i:07d}.png").read_bytes())
        assert header == (SIZE[1], SIZE[0], 16, 2, 0, 0, 0)
        rows = np.frombuffer(raw, np.uint8).reshape(SIZE[0], -1)
        assert (rows[:, 0] == 0).all()
        pixels = np.frombuffer(rows[:, 1:].tobytes(), ">u2").reshape(*SIZE, 3)
        assert (pixels[..., 0] == expect_ids(label, "synthia_id", 0)).all()
        movable = (label >= 11) & (label < len(CLASSES))
        assert (
            (pixels[..., 1] > 0)[movable].all()
            and (pixels[..., 1] == 0)[~movable].all()
            and (pixels[..., 2] == 0).all()
        )


def test_cityscapes_layout(tmp_path):
    root = write_dataset(
        tmp_path / "cityscapes", "cityscapes", "target", counts={"train": 4, "val": 1}, size=SIZE
    )
    pictures = sorted(root.glob("leftImg8bit/*/*/*_leftImg8bit.png"))
    assert [p.parent.parent.name for p in pictures] == ["train"] * 4 + ["val"] and len(
        files(root)
    ) == 11
    seen = set()
    for path, (split, index) in zip(pictures, [("train", i) for i in range(4)] + [("val", 0)]):
        image, label = arrays("target", split, index)
        city, sequence, frame = path.name.removesuffix("_leftImg8bit.png").split("_")
        assert city == path.parent.name and (sequence, frame) == (f"{index:06d}", "000019")
        with Image.open(path) as x: assert x.mode == "RGB" and (np.asarray(x) == image).all()
        name = f"{city}_{sequence}_{frame}_gtFine_labelIds.png"
        with Image.open(root/f"gtFine/{split}/{city}/{name}") as y:
            assert y.mode == "L" and (np.asarray(y) == expect_ids(label, "cityscapes_id", 1)).all()
            seen |= set(np.unique(y))
    assert 1 in seen  # the bonnet is the ego vehicle


def test_every_process_draws_the_same():
    code = (
        "import hashlib; from sac_lit.toy_city import Knobs, render; "
        "x, y = render('target', 'val', 7, (48, 96), seed=5, knobs=Knobs(gap=.5)); "
        "print(hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    for i in (3, 9): render("target", "val", i, (48, 96))  # whatever was drawn before
    image, label = render("target", "val", 7, (48, 96), seed=5, knobs=Knobs(gap=.5))
    assert other == hashlib.sha256(image.numpy().tobytes() + label.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("size", [(16, 16), (33, 65), (128, 64)])
def test_any_size(size):
    image, label = render("target", "train", 0, size)
    assert (
        image.shape == (3, *size)
        and label.shape == size
        and image.dtype == label.dtype == torch.uint8
    )
    assert set(label.unique().tolist()) <= {*range(len(CLASSES)), IGNORE_INDEX}


KNOBS = [{"gap": 0.}, {"gap": 2.}, {"lens": 1.}, {"rare": 1.}, {"melt": .5}, {"alike": 1.}]


@pytest.mark.parametrize("knob", KNOBS, ids=str)
def test_a_knob_turns_the_target_alone(knob):
    knobs, size = Knobs(**knob), (48, 96)
    with pytest.raises(UserError, match="the source has no knobs"):
        render("source", "train", 6, size, knobs=knobs)
    usual = [render("target", "train", i, size) for i in range(6)]
    turned = [render("target", "train", i, size, knobs=knobs) for i in range(6)]
    assert any((a != b).any() for (a, _), (b, _) in zip(usual, turned))
    streets = any((a != b).any() for (_, a), (_, b) in zip(usual, turned))
    assert streets == bool({*knob} & {"lens", "rare"})


def test_what_is_rare_gathers_in_few_pictures_of_training_alone():
    size, big = (48, 96), [14, 15, 16]  # trucks, buses and trams
    def pictures(split, rare):
        knobs = Knobs(rare=rare)
        labels = (render("target", split, i, size, knobs=knobs)[1] for i in range(48))
        return [int(sum((label == c).any() for c in big)) for label in labels]
    assert pictures("val", 0) == pictures("val", 1)
    usual, gathered = pictures("train", 0), pictures("train", 1)
    some = [n for n in gathered if n]
    assert len(some) < 48 / 6 < sum(n > 0 for n in usual)   # one in sixteen, by the dice
    assert sum(some) / len(some) > 1.5


def test_small_things_melt_into_what_is_around_them():
    def contrast(k):
        image, label = render("target", "val", 6, knobs=Knobs(gap=0, melt=k))
        small = torch.isin(label, torch.tensor([5, 6, 7, 11, 12, 17, 18]))
        assert small.any()
        return (image.float() - usual.mean((1, 2), keepdim=True))[:, small].abs().mean()
    usual = render("target", "val", 6, knobs=Knobs(gap=0))[0].float()
    assert contrast(1) < contrast(.5) < contrast(0)


def test_second_call_does_nothing_and_another_request_is_refused(tmp_path):
    there = tmp_path / "toy", "cityscapes", "target"
    root = write_dataset(*there, **SMALL)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    write_dataset(*there, **SMALL)
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    for change in (dict(seed=1), dict(knobs=Knobs(gap=.5)),
                   dict(size=(32, 32)), dict(counts={"train": 1})):
        with pytest.raises(UserError, match="another root or delete"):
            write_dataset(*there, **{**SMALL, **change})
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*")}


def test_foreign_folder_is_not_touched(tmp_path):
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine/thesis.txt").write_text("x")
    with pytest.raises(UserError, match="no toy city"):
        write_dataset(tmp_path / "mine", "gta5", "source", **SMALL)
    assert files(tmp_path) == {"mine/thesis.txt": b"x"}
    (tmp_path/"empty").mkdir()
    write_dataset(tmp_path/"empty", "gta5", "source", **SMALL)  # an empty folder is fine
    with pytest.raises(UserError):
        write_dataset(tmp_path / "mine/thesis.txt", "gta5", "source", **SMALL)


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def stop(root, number, *rest):
        if number == 2: raise KeyboardInterrupt
        toy_city._save_gta5(root, number, *rest)
    with monkeypatch.context() as m:
        m.setitem(toy_city._WRITERS, "gta5", stop)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(tmp_path / "toy", "gta5", "source", **SMALL)
    assert not list(tmp_path.iterdir())
    write_dataset(tmp_path/"toy", "gta5", "source", **SMALL)
    assert json.loads((tmp_path/"toy/toy_city.json").read_text())["counts"] == SMALL["counts"]


def test_killed_write_is_never_taken(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sac_lit.toy_city",
        "--layout",
        "gta5",
        "--root",
        str(tmp_path / "toy"),
        "--train",
        "100000",
        "--size",
        "32",
        "64",
    ]
    with subprocess.Popen(command) as process:
        deadline = time.time() + 60
        while not list(tmp_path.glob(".toy-*/data/images/00003.png")) and time.time() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path/"toy").exists()
    write_dataset(tmp_path/"toy", "gta5", "source", **SMALL)
    assert len(files(tmp_path/"toy")) == 7


def test_two_writers_at_once(tmp_path):
    "The slower of two processes finds the data set in its place and is content."
    first = toy_city._save_gta5
    def overtaken(root, number, *rest):
        first(root, number, *rest)
        if number == 2 and not (tmp_path/"toy").exists():
            toy_city._WRITERS["gta5"] = first
            write_dataset(tmp_path/"toy", "gta5", "source", **SMALL)
    toy_city._WRITERS["gta5"] = overtaken
    try: write_dataset(tmp_path/"toy", "gta5", "source", **SMALL)
    finally: toy_city._WRITERS["gta5"] = first
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]


@pytest.mark.parametrize("content, why", [
    (b"\xff\xfe", "not UTF-8"), (b"", "other settings"), (b"null", "other settings")])
def test_a_damaged_record_gets_one_sentence(tmp_path, content, why):
    root = write_dataset(tmp_path/"toy", "gta5", "source", **SMALL)
    (root/"toy_city.json").write_bytes(content)
    with pytest.raises(UserError, match=why): write_dataset(root, "gta5", "source", **SMALL)


def test_command_line(tmp_path, capsys):
    main(
        [
            "--layout",
            "cityscapes",
            "--root",
            f"{tmp_path}/city",
            "--train",
            "1",
            "--val",
            "1",
            "--size",
            "32",
            "64",
        ]
    )
    assert "2 scenes of the target domain" in capsys.readouterr().out
    assert json.loads((tmp_path/"city/toy_city.json").read_text())["domain"] == "target"


@pytest.mark.parametrize("extra", [
    ["--size", "4", "8"], ["--train", "-1"], ["--gap", "7"], ["--melt", "2"], ["--lens", "-1"],
    ["--root", "/dev/null/toy"], ["--lens", "1"],
    ["--layout", "kitti"], ["--train", "many"]])
def test_command_line_errors(tmp_path, capsys, extra):
    with pytest.raises(SystemExit) as stop:
        main(
            ["--layout", "gta5", "--root", f"{tmp_path}/toy", "--train", "1", "--val", "0", *extra]
        )
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said and "Traceback" not in said
    assert not (tmp_path/"toy").exists()
