"""Label maps of images and videos, archives for the test server, and their commands."""
import csv
import io
import os
import resource
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

from sac_lit.bands import Bands
from sac_lit.core import ASIDE, CLASSES, fingerprint, generator, UserError
from sac_lit.datasets import open_dataset
from sac_lit.deeplabv2 import build_model, SegmentationModel
from sac_lit.label import find_inputs, id_values, label_images, overlay
from sac_lit.outputs import at_work, Outputs, RECORD
from sac_lit.predict import main, predict, predict_with_confidence
from sac_lit.toy_city import write_dataset
from sac_lit.video import label_video, read_video, video_writer
from sac_lit.weights import save_snapshot


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def network():
    "With weights so large that every class is predicted somewhere."
    torch.manual_seed(0)
    net = build_model("deeplabv2_tiny", 19).eval()
    for conv in net.backbone.head.conv2d_list: nn.init.normal_(conv.weight, 0, .3)
    return net


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "city"
    write_dataset(root, "cityscapes", "target", {"val": 4}, (64, 128))
    return root


def validation(root):
    return open_dataset("cityscapes", root, split="val")


def noise(*size, seed=0):
    return torch.randint(256, size, generator=generator(seed, "noise"), dtype=torch.uint8)


def write(path, pixels):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)


def read(path):
    return np.array(Image.open(path))


def picture(k=0):
    return noise(3, 48, 64, seed=k).permute(1, 2, 0).numpy()


def names_in(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def times(folder):
    return {p: p.stat().st_mtime_ns for p in Path(folder).iterdir()}


# ---------------------------------------------------------------- images

def test_label_maps_and_overlays(network, tmp_path):
    write("in/a.png", picture(1))
    write("in/sub/b.jpg", picture(2))
    write("in/grey.bmp", picture(3)[..., 0])
    jobs = {Path(p): {"labels": Path("out", p).with_suffix(".png"),
                      "overlays": Path("over", p).with_suffix(".jpg"),
                      "confidence": Path("sure", p).with_suffix(".png")}
            for p in ("in/a.png", "in/sub/b.jpg", "in/grey.bmp")}
    assert label_images(network, jobs, Outputs(Path()), "cityscapes") == {"labelled": 3}
    for source, (to, over, sure) in ((p, files.values()) for p, files in jobs.items()):
        image = torch.from_numpy(np.array(Image.open(source).convert("RGB"))).permute(2, 0, 1)
        made = read(to)
        assert made.dtype == np.uint8 and Image.open(to).mode == "L"
        assert (made == id_values("cityscapes")[predict(network, image)]).all()
        assert Image.open(over).size == Image.open(source).size
        confidence = predict_with_confidence(network, image)[1]
        assert Image.open(sure).mode == "L"
        assert np.abs(read(sure) / 255 - confidence.numpy()).max() < .0021
    labels = predict(network, image)
    color = np.array(CLASSES[labels[0, 0]].color)
    assert (overlay(image, labels)[0, 0] == image[:, 0, 0].numpy() // 2 + color // 2).all()


def some_jobs(count):
    "Images on disk, and where their label maps go."
    for k in range(count): write(f"in/{k}.png", picture(k))
    return {Path(f"in/{k}.png"): {"labels": Path(f"out/{k}.png")} for k in range(count)}


def label(network, jobs, **how):
    "What `label_images` did, by a record that is read anew."
    return label_images(network, jobs, Outputs(Path("out")), **how)


def test_what_is_there_is_skipped(network):
    jobs = some_jobs(3)
    assert label(network, jobs) == {"labelled": 3}
    kept = times("out")
    Path("out/1.png").unlink()
    left = Path("out") / ASIDE.replace("*", fingerprint("2.png"))
    left.write_text("left by a crash")
    assert label(network, jobs) == {"labelled": 1, "already there": 2}
    for name in (RECORD, ".sac_lit.lock"): del kept[Path("out", name)]
    same = [p.stat().st_mtime_ns == t for p, t in sorted(kept.items())]
    assert same == [True, False, True]
    with_overlays = {p: {**files, "overlays": files["labels"].with_suffix(".jpg")}
                     for p, files in jobs.items()}
    assert label(network, with_overlays) == {"labelled": 3}    # asked for later


def test_an_interrupted_run_leaves_whole_files(network, monkeypatch):
    jobs, seen = some_jobs(6), []

    def killed(*args):
        seen.append(args)
        if len(seen) == 4: raise KeyboardInterrupt
        return predict_with_confidence(*args)

    with monkeypatch.context() as m:
        m.setattr("sac_lit.label.predict_with_confidence", killed)
        with pytest.raises(KeyboardInterrupt): label(network, jobs)
    assert names_in("out") == [".sac_lit.lock", "0.png", "1.png", "2.png", RECORD]
    assert label(network, jobs) == {"labelled": 3, "already there": 3}


def test_unreadable_images_are_named_in_the_end(network):
    jobs = some_jobs(3)
    data = Path("in/0.png").read_bytes()
    Path("in/1.png").write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError, match="1 of 3 images left out: in/1.png: is damaged"):
        label(network, jobs)
    assert names_in("out") == [".sac_lit.lock", "0.png", "2.png", RECORD]


def test_inputs():
    for p in ("a/x.png", "a/sub/x.JPG", "a/.hidden.png", "a/out/labels/x.png", "b/x.tif"):
        write(p, picture())
    Path("a/notes.txt").touch()
    Path("v.mp4").touch()
    assert find_inputs(["a", "v.mp4"], Path("a/out")) == {
        Path("x"): Path("a/x.png"), Path("sub/x"): Path("a/sub/x.JPG"), Path("v"): Path("v.mp4")}
    for inputs, words in ((["a", "b"], "same name, x"), (["none"], "no such"),
                          (["a/notes.txt"], "neither"), (["a/out/none"], "no such")):
        with pytest.raises(UserError, match=words): find_inputs(inputs, Path("a/out"))
    Path("empty").mkdir()
    with pytest.raises(UserError, match="no images"): find_inputs(["empty"], Path("out"))
    write("mixed/v/000000.png", picture())
    Path("mixed/v.mp4").touch()
    words = ("mixed/v/000000.png would get its label map among those of the frames of "
             "mixed/v.mp4")
    with pytest.raises(UserError, match=words): find_inputs(["mixed"], Path("out"))


def test_arrays_are_images_where_bands_are_stated():
    four = build_model("deeplabv2_tiny", 3, bands=Bands(4)).eval()
    four.save_pretrained("four")
    Path("in").mkdir()
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 4), np.uint8)
    np.save("in/x.npy", values)
    main(["label", "four", "in", "--overlay"])
    expected = predict(four, torch.from_numpy(values).permute(2, 0, 1)).numpy()
    assert (read("labelled/labels/x.png") == expected).all()
    assert read("labelled/overlays/x.jpg").shape == (40, 60, 3)
    assert find_inputs(["in/x.npy"], Path("out"), Bands(4)) == {Path("x"): Path("in/x.npy")}
    with pytest.raises(UserError, match="neither an image"): find_inputs(["in/x.npy"], Path("o"))
    with pytest.raises(UserError, match="no images"): find_inputs(["in"], Path("out"))


# ---------------------------------------------------------------- video

@pytest.fixture
def video():
    "A function that writes a video of 40 frames, in any container."
    pytest.importorskip("av")

    def make(name):
        with video_writer(Path(name), rate=20) as append:
            for k in range(40): append(picture(k))
        return Path(name)

    return make


def video_files(name):
    "Where the label maps of a video's frames go, and its coloured frames."
    return {"labels": Path("out", name), "overlays": Path("over", f"{name}.mp4")}


def film(network, path, files, **how):
    "What `label_video` did, by a record that is read anew."
    return label_video(network, Path(path), files, Outputs(Path()), **how)


def test_video_is_labelled_frame_by_frame(network, video):
    path, files = video("drive.mp4"), video_files("drive")
    assert film(network, path, files, ids="cityscapes") == {"labelled": 40}
    images = list(read_video(path))
    assert len(images) == 40 and images[0].shape == (3, 48, 64)
    for k in (0, 17, 39):
        expected = id_values("cityscapes")[predict(network, images[k])]
        assert (read(f"out/drive/{k:06}.png") == expected).all()
    tinted = list(read_video(files["overlays"]))
    assert len(tinted) == 40 and tinted[0].shape == (3, 48, 64)
    assert film(network, path, files, ids="cityscapes") == {"already there": 40}
    assert names_in("over") == ["drive.mp4"]
    anew = {"anew because the options changed": 40}
    assert film(network, path, files) == anew


def test_video_of_odd_size(network):
    av = pytest.importorskip("av")
    images = [noise(35, 51, 3, seed=k) for k in range(3)]
    with av.open("odd.avi", "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 51, 35, "bgr0"
        for image in images:
            frame = av.VideoFrame.from_ndarray(image.numpy(), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert torch.equal(list(read_video(Path("odd.avi")))[2], images[2].permute(2, 0, 1))
    assert film(network, "odd.avi", video_files("odd")) == {"labelled": 3}
    assert read("out/odd/000002.png").shape == (35, 51)
    assert next(read_video(Path("over/odd.mp4"))).shape == (3, 34, 50)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2)])
def test_a_video_of_a_few_pixels(network, size):
    av, (height, width) = pytest.importorskip("av"), size
    with av.open("dot.avi", "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24"
        frame = av.VideoFrame.from_ndarray(noise(height, width, 3).numpy(), "rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert film(network, "dot.avi", video_files("dot")) == {"labelled": 1}
    assert read("out/dot/000000.png").shape == size
    even = tuple(max(2, n // 2 * 2) for n in size)
    assert next(read_video(Path("over/dot.mp4"))).shape == (3, *even)


def test_a_video_taken_upright_is_shown_upright(video):
    "As phones write them: lying frames, and a matrix that turns them by 90 degrees clockwise."
    path = video("phone.mp4")
    lying, data = next(read_video(path)), path.read_bytes()

    def numbers(*values):
        return b"".join(v.to_bytes(4, "big", signed=True) for v in values)

    one = 1 << 16
    unit = numbers(one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    turned = numbers(0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    at = data.index(unit, data.index(b"tkhd"))
    path.write_bytes(data[:at] + turned + data[at + len(unit):])
    assert torch.equal(next(read_video(path)), lying.rot90(-1, (1, 2)))


@pytest.mark.parametrize("name", ["drive.mp4", "drive.mkv", "drive.avi"])
def test_a_video_that_breaks_off_keeps_what_was_labelled(network, video, name):
    path, files = video(name), video_files("drive")
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) * 6 // 10])
    words = f"{name}: breaks off after frame [12][0-9] of 40"
    with pytest.raises(UserError, match=words): film(network, path, files)
    kept = times("out/drive")
    with pytest.raises(UserError, match=words): film(network, path, files)
    assert 5 < len(kept) < 30 and len(list(read_video(files["overlays"]))) == len(kept)
    path.write_bytes(whole)                    # the whole file arrives: only the rest is labelled
    done, torn = film(network, path, files), name.endswith("avi")  # its last frame, half there
    assert done.pop("anew because the frame changed", 0) == torn
    assert done == {"labelled": 40 - len(kept), "already there": len(kept) - torn}
    assert len(names_in("out/drive")) == 40
    assert sum(p.stat().st_mtime_ns != t for p, t in kept.items()) == torn
    assert names_in("over") == ["drive.mp4"]
    assert len(list(read_video(files["overlays"]))) == 40


def test_a_damaged_video_and_a_file_that_is_none(network, video):
    path = video("drive.mp4")
    data = path.read_bytes()
    n = len(data)
    path.write_bytes(data[:n // 2] + bytes(n // 4) + data[n * 3 // 4:])
    with pytest.raises(UserError, match="breaks off after frame"):
        film(network, path, video_files("drive"))
    Path("none.mp4").write_text("not a video")
    with pytest.raises(UserError, match="none.mp4: cannot be read as a video"):
        film(network, "none.mp4", video_files("none"))
    with pytest.raises(UserError, match="absent.mp4"): list(read_video(Path("absent.mp4")))


def sound(path):
    av = pytest.importorskip("av")
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def playlist(path):
    Path(path).write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n")


NO_VIDEOS = {
    "a pipe": os.mkfifo, "a folder": os.mkdir, "empty": lambda path: open(path, "w").close(),
    "a loop": lambda path: os.symlink(path, path), "sound only": sound, "a list": playlist}


@pytest.mark.parametrize("kind", NO_VIDEOS)
def test_what_is_no_video_gets_one_sentence(network, kind):
    pytest.importorskip("av")
    NO_VIDEOS[kind]("none.mp4")
    with pytest.raises(UserError, match="^none.mp4: ") as e:
        film(network, "none.mp4", video_files("none"))
    assert "\n" not in str(e.value)
    assert names_in("over") == [] if Path("over").exists() else True


def test_a_shorter_video_leaves_nothing_of_the_longer_one(network, video):
    path, files = video("drive.mp4"), video_files("drive")
    film(network, path, files)
    with video_writer(path, rate=20) as append:
        for k in range(5): append(picture(k + 50))
    Path("out/drive/notes.txt").write_text("mine")
    assert film(network, path, files) == {"anew because the frame changed": 5}
    assert names_in("out/drive") == [*(f"{k:06}.png" for k in range(5)), "notes.txt"]


def test_a_file_like_a_video_in_progress_is_not_touched(network, video):
    "Nor are names of 254 bytes too long for what is in progress."
    name = "v" * 250
    path, files = video(f"{name}.mp4"), video_files(name)
    Path("over").mkdir()
    Path("over/drive.partial.mp4").write_text("mine")
    assert film(network, path, files) == {"labelled": 40}
    assert Path("over/drive.partial.mp4").read_text() == "mine"
    assert len(list(read_video(files["overlays"]))) == 40


def test_pyav_is_named_where_it_is_not_installed(monkeypatch, network):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"av is not installed.*sac_lit\[video\]"):
        film(network, "a.mp4", video_files("a"))
    assert not list(Path().iterdir())


# ---------------------------------------------------------------- the commands

@pytest.fixture
def model(network):
    network.save_pretrained("model")
    return "model"


def refused(argv, capsys):
    "What a command says on its way out."
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop: main(argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def said(argv, capsys):
    "What a command prints."
    capsys.readouterr()
    main(argv)
    return capsys.readouterr().out


def contents(*folders):
    "The bytes of all files, links and pipes left out."
    files = [p for folder in folders for p in Path(folder).rglob("*")]
    return {p: p.read_bytes() for p in files if p.is_file()}


def test_label_command(network, video, capsys):
    save_snapshot("toy.pth", network)
    write("in/a.png", picture(1))
    write("in/sub/b.jpg", picture(2))
    video("in/sub/v.mp4")
    for words in ("labelled", "already there"):
        assert said(["label", "toy.pth", "in", "--overlay"], capsys) == (
            f"labelled: images: 2 {words}\nlabelled: frames of in/sub/v.mp4: 40 {words}\n")
    made = {p.as_posix() for p in Path("labelled").rglob("*.*") if "v/" not in p.as_posix()}
    assert made == {f"labelled/{p}" for p in (
        RECORD, ".sac_lit.lock", "summary.csv", "labels/a.png", "labels/sub/b.png",
        "overlays/a.jpg", "overlays/sub/b.jpg", "overlays/sub/v.mp4")}
    anew = "anew because the options changed"
    assert said(["label", "toy.pth", "in", "--ids", "cityscapes"], capsys) == (
        f"labelled: images: 2 {anew}\nlabelled: frames of in/sub/v.mp4: 40 {anew}\n")
    Path("in/c.png").write_text("none")
    write("in/d.png", picture(4))
    words = "1 of 2 images left out: in/c.png"
    assert words in refused(["label", "toy.pth", "in", "--ids", "cityscapes"], capsys)
    assert Path("labelled/labels/d.png").exists()


def test_the_table_has_a_row_for_each_file(network, video, capsys):
    save_snapshot("toy.pth", network)
    write("in/a.png", picture(1))
    write("in/b.png", picture(2))
    video("in/v.mp4")
    for attempt in range(2):                   # also where nothing is left to do
        main(["label", "toy.pth", "in", "--confidence"])
        header, *rows = csv.reader(io.StringIO(Path("labelled/summary.csv").read_text()))
        assert header[:3] == ["file", "confidence", "road"] and len(header) == 21
        assert [row[0] for row in rows] == ["in/a.png", "in/b.png", "in/v.mp4"]
        labels, sure = (read(f"labelled/{kind}/b.png") for kind in ("labels", "confidence"))
        shares = np.bincount(labels.flatten(), minlength=19) / labels.size
        assert np.abs(np.array(rows[1][2:], float) - shares).max() < 1e-4
        assert abs(float(rows[1][1]) - sure.mean() / 255) < .003
    frames = [read(p) for p in Path("labelled/confidence/v").iterdir()]
    assert len(frames) == 40 and abs(float(rows[2][1]) - np.mean(frames) / 255) < .003


# ---------------------------------------------------------------- current or stale

def another_network(network):
    "With the same name, of other tensors."
    torch.manual_seed(1)
    build_model("deeplabv2_tiny", 19).eval().save_pretrained("model")


def shorten(count):
    "Cut some bytes off the record."
    record = Path("labelled", RECORD)
    os.truncate(record, record.stat().st_size - count)


def cut_line():
    "As a crash leaves it: nothing of what came after is there."
    record = Path("labelled", RECORD)
    before, _, line = record.read_bytes().partition(b'{"file": "labels/2.png"')
    record.write_bytes(before + b'{"file": "labels/2.png"' + line[:60])
    Path("labelled/summary.csv").unlink()


STALE = {  # what is done between two commands, and what the second one says
    "nothing": (lambda network: None, "3 already there"),
    "another network": (another_network, "3 anew because the network changed"),
    "another image": (lambda network: write("in/1.png", picture(9)),
                      "1 anew because the image changed, 2 already there"),
    "an output is gone": (lambda network: Path("labelled/labels/1.png").unlink(),
                          "1 labelled, 2 already there"),
    "an output is cut short": (
        lambda network: os.truncate("labelled/labels/1.png", 50),
        "1 anew because their files were changed (kept as *.changed), 2 already there"),
    "outputs were copied": (
        lambda network: [os.utime(p) for p in Path("labelled/labels").iterdir()],
        "3 already there"),
    "one more image": (lambda network: write("in/3.png", picture(3)),
                       "1 labelled, 3 already there"),
    "the last line is cut": (
        lambda network: shorten(9), "3 already there"),
    "a label map's line is cut": (
        lambda network: cut_line(), "1 anew because the record changed, 2 already there"),
    "a line of garbage": (
        lambda network: Path("labelled", RECORD).open("ab").write(b"\n\0\xff[1]\nnull\n{}\n[]"),
        "3 already there")}


@pytest.mark.parametrize("what", STALE)
def test_stale_outputs_are_made_anew(network, model, capsys, what):
    some_jobs(3)
    main(["label", "model", "in"])
    change, words = STALE[what]
    change(network)
    assert said(["label", "model", "in"], capsys) == f"labelled: images: {words}\n"
    assert said(["label", "model", "in"], capsys).endswith(" already there\n")
    now = SegmentationModel.from_pretrained("model")
    for path in Path("in").iterdir():
        image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        assert (read(f"labelled/labels/{path.name}") == predict(now, image).numpy()).all()


def test_a_video_is_labelled_anew_by_another_network(network, model, video, capsys):
    video("v.mp4")
    main(["label", "model", "v.mp4"])
    another_network(network)
    words = "frames of v.mp4: 40 anew because the network changed"
    assert words in said(["label", "model", "v.mp4"], capsys)
    assert "frames of v.mp4: 40 already there" in said(["label", "model", "v.mp4"], capsys)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_killed_between_the_record_and_a_name(network, model, capsys, monkeypatch, before, k):
    "Whether there was an older output or not, the next command goes on."
    some_jobs(2)
    if before:
        main(["label", "model", "in", "--overlay"])
        another_network(network)
    rename, seen = os.replace, []

    def killed(a, b):
        seen.append(b)
        if len(seen) == k + (not before): raise KeyboardInterrupt  # the first makes the mark
        rename(a, b)

    with monkeypatch.context() as m:
        m.setattr(os, "replace", killed)
        with pytest.raises(SystemExit): main(["label", "model", "in", "--overlay"])
    main(["label", "model", "in", "--overlay"])
    assert "2 already there" in said(["label", "model", "in", "--overlay"], capsys)
    assert not list(Path("labelled").rglob("*.changed"))
    now = SegmentationModel.from_pretrained("model")
    image = torch.from_numpy(picture(1)).permute(2, 0, 1)
    assert (read("labelled/labels/1.png") == predict(now, image).numpy()).all()


def test_overlays_stay_in_step(network, model, capsys):
    "What was asked for once is made anew with the label map, not left behind."
    some_jobs(1)
    main(["label", "model", "in", "--overlay"])
    before = read("labelled/overlays/0.jpg")
    another_network(network)
    main(["label", "model", "in"])
    assert (before != read("labelled/overlays/0.jpg")).any()


# ---------------------------------------------------------------- ours and not ours

def own_labels():
    write("own/labels/x.png", picture())
    return ["own/labels/x.png", "--out", "own"]


def own_labels_by_a_link():
    write("own/labels/x.png", picture())
    os.symlink("own", "link")
    return ["own/labels/../labels", "--out", "link"]


def own_overlays():
    write("own/overlays/x.jpg", picture())
    return ["own/overlays/x.jpg", "--out", "own", "--overlay"]


def hard_link():
    write("in/x.png", picture())
    Path("own/labels").mkdir(parents=True)
    os.link("in/x.png", "own/labels/x.png")
    return ["in", "--out", "own"]


def truth():
    write("in/x.png", picture())
    write("own/labels/x.png", picture(2)[..., 0])
    return ["in", "--out", "own"]


def truth_of_others():
    "Of other images: a folder of ground truth gets no predictions added."
    write("in/x.png", picture())
    write("own/labels/sub/y.png", picture(2)[..., 0])
    return ["in", "--out", "own"]


def truth_behind_a_link():
    write("in/x.png", picture())
    write("truth/y.png", picture(2)[..., 0])
    Path("own").mkdir()
    os.symlink(os.path.abspath("truth"), "own/labels")
    return ["in", "--out", "own"]


def two_suffixes():
    write("own/a.png", picture())
    write("own/a.jpg", picture(2))
    return ["own", "--out", "made"]


def two_days():
    write("in/0.png", picture())
    write("own/0.png", picture(2))
    main(["label", "model", "in", "--out", "made"])
    return ["own", "--out", "made"]


def file_and_folder():
    write("own/a.jpg", picture())
    write("own/a.png/b.png", picture())
    return ["own", "--out", "made"]


def own_table():
    write("in/x.png", picture())
    Path("own").mkdir()
    Path("own/summary.csv").write_text("mine")
    return ["in", "--out", "own"]


def outputs_as_inputs():
    write("in/x.png", picture())
    main(["label", "model", "in", "--out", "own"])
    return ["own/labels", "--out", "own"]


def somebodys_record():
    write("in/x.png", picture())
    Path("own").mkdir()
    Path("own", RECORD).write_text("mine")
    return ["in", "--out", "own"]


NOT_OURS = [own_labels, own_labels_by_a_link, own_overlays, hard_link, truth, truth_of_others,
            truth_behind_a_link, two_suffixes, two_days, file_and_folder, own_table,
            outputs_as_inputs, somebodys_record]


@pytest.mark.parametrize("trial", NOT_OURS, ids=lambda trial: trial.__name__)
def test_what_is_not_ours_is_refused_and_untouched(model, capsys, trial):
    argv = trial()
    before = contents(".")
    refused(["label", "model", *argv], capsys)
    assert contents(".") == before


def test_one_file_where_case_is_folded(monkeypatch, model, capsys):
    write("in/a.png", picture())
    write("in/A.png", picture(2))
    with monkeypatch.context() as m:
        m.setattr("sac_lit.outputs._folds_case", lambda folder: True)
        words = refused(["label", "model", "in"], capsys)
        assert "in/A.png" in words and "in/a.png" in words
    assert "images: 2 labelled" in said(["label", "model", "in"], capsys)


def test_outputs_beside_their_inputs(model, capsys):
    "A folder of photographs may be the folder of outputs: what is made there is no input."
    write("in/x.png", picture())
    for words in ("1 labelled", "1 already there"):
        assert words in said(["label", "model", "in", "--out", "in", "--overlay"], capsys)
    assert names_in("in") == [
        ".sac_lit.lock", "labels", "overlays", RECORD, "summary.csv", "x.png"]


def test_two_at_once(network, model, city, capsys):
    "The second gets a sentence and changes nothing; afterwards, what the first wrote is current."
    write("in/a.png", picture(1))
    commands = [["label", "model", "in", "--out", "out"],
                ["submit", "model", str(city), "--split", "val", "--out", "out"]]
    first, late = Outputs(Path("out")), Outputs(Path("out"))
    with at_work(first, "label"):
        before = contents(".")
        for argv in commands: assert "out: another process writes there" in refused(argv, capsys)
        assert contents(".") == before
        jobs = {Path("in/a.png"): {"labels": Path("out/labels/a.png")}}
        assert label_images(network, jobs, first) == {"labelled": 1}
    with at_work(late, "label"): assert "labels/a.png" in late.lines
    assert said(commands[0], capsys) == "out: images: 1 already there\n"


def test_a_corrected_label_map_is_kept(model, capsys):
    some_jobs(1)
    main(["label", "model", "in"])
    write("labelled/labels/0.png", np.full((48, 64), 7, np.uint8))
    main(["label", "model", "in"])
    with open("labelled/labels/0.png.changed", "rb") as kept:
        assert (np.array(Image.open(kept)) == 7).all()
    write("labelled/labels/0.png", np.full((48, 64), 8, np.uint8))
    before = contents("labelled/labels")
    assert "labels/0.png: is there" in refused(["label", "model", "in"], capsys)
    assert contents("labelled/labels") == before


# ---------------------------------------------------------------- what lies on disk

def wall(path): Image.new("1", (13000, 13000)).save(path)


def larger_wall(path): Image.new("1", (20000, 20000)).save(path)


def loop(path):
    os.symlink("elsewhere.png", path)
    os.symlink(Path(path).name, Path(path).with_name("elsewhere.png"))


ODD_IMAGES = [os.mkfifo, loop, wall, larger_wall, lambda path: Path(path).touch(),
              lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink("none", path)]


@pytest.mark.filterwarnings(  # silenced where the library bounds images; pytest turns it on again
    "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("k", range(len(ODD_IMAGES)))
def test_one_odd_image_does_not_stop_the_others(model, capsys, k):
    write("in/b.png", picture())
    ODD_IMAGES[k]("in/a.png")
    words = refused(["label", "model", "in"], capsys)
    assert "images left out: in/a.png: " in words and Path("labelled/labels/b.png").exists()


def test_a_folder_with_the_name_of_an_image(model, capsys):
    write("in/b.png/c.png", picture())
    assert "1 labelled" in said(["label", "model", "in"], capsys)
    assert Path("labelled/labels/b.png/c.png").exists()


@pytest.mark.parametrize("text", [b"", b"\0garbage", b"[]", b"null", b"[" * 9999, None])
def test_a_record_that_is_none(model, capsys, text):
    write("in/a.png", picture())
    main(["label", "model", "in"])
    record = Path("labelled", RECORD)
    record.unlink()
    if text is None: record.mkdir()
    else: record.write_bytes(text)
    assert f"labelled/{RECORD}: " in refused(["label", "model", "in"], capsys)


@pytest.mark.parametrize("name, content", [("options.json", ""), ("options.json", "[]")])
def test_other_files_in_the_folder_do_not_matter(model, capsys, name, content):
    write("in/a.png", picture())
    write("labelled/x.png", picture())
    Path("labelled", name).write_text(content)
    assert "1 labelled" in said(["label", "model", "in"], capsys)
    assert Path("labelled", name).read_text() == content


@pytest.mark.parametrize("out", ["/proc/o", "in/a.png", "/dev/null", "o" * 300])
@pytest.mark.parametrize("command", ["label", "evaluate", "submit"])
def test_places_where_nothing_can_be_written(model, city, capsys, out, command):
    write("in/a.png", picture())
    argv = {"label": ["in"], "evaluate": [str(city)], "submit": [str(city), "--split", "val"]}
    before = contents("in")
    assert out[:9] in refused([command, "model", *argv[command], "--out", out], capsys)
    assert contents("in") == before


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_names_of_254_bytes(model, capsys, suffix):
    name = "n" * 250
    write(f"in/{name}{suffix}", picture())
    argv = ["label", "model", "in", "--overlay", "--confidence"]
    assert "1 labelled" in said(argv, capsys)
    assert Path(f"labelled/labels/{name}.png").exists()


def test_names_that_would_get_too_long(model, capsys):
    Path("in").mkdir()
    Path(f"in/{'n' * 252}.ts").touch()
    assert "255 bytes" in refused(["label", "model", "in"], capsys)
    assert not Path("labelled").exists()


@pytest.fixture
def small_disk():
    "A function that lets no file become larger than some bytes: as on a disk that is full."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most", [0, 400])
def test_a_full_disk_gets_one_sentence(model, capsys, small_disk, most):
    some_jobs(2)
    small_disk(most)
    with pytest.raises(SystemExit): main(["label", "model", "in", "--overlay"])
    small_disk(resource.RLIM_INFINITY)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not list(Path("labelled").rglob("*.tmp")) and not list(Path("labelled").rglob("*.png"))
    assert "2 labelled" in said(["label", "model", "in", "--overlay"], capsys)


def test_a_full_disk_under_a_video(model, video, capsys, small_disk):
    path = video("v.mp4")
    small_disk(20_000)
    with pytest.raises(SystemExit): main(["label", "model", str(path)])
    small_disk(resource.RLIM_INFINITY)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    main(["label", "model", str(path)])
    assert len(list(read_video(Path("labelled/overlays/v.mp4")))) == 40


# ---------------------------------------------------------------- submit

def test_submit_command(network, city, capsys):
    network.save_pretrained("model")
    main(["submit", "model", str(city), "--split", "val", "--out", "sac"])
    packed, data = zipfile.ZipFile("sac.zip"), validation(city)
    assert sorted(packed.namelist()) == sorted(Path(p).name for p in data.images)
    assert packed.testzip() is None
    first = Image.open(packed.open(Path(data.images[0]).name))
    assert first.mode == "L" and first.size == Image.open(data.images[0]).size
    expected = id_values("cityscapes")[predict(network, data[0]["image"])]
    assert (np.array(first) == expected).all()
    # the server's own way to find a frame
    script = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    script.args.predictionPath, script.args.predictionWalk = "sac", None
    for image, label in zip(data.images, data.labels):
        assert Path(script.getPrediction(script.args, str(label))).name == Path(image).name


def test_submit_packs_what_it_has_checked(network, model, city, capsys):
    argv = ["submit", "model", str(city), "--split", "val", "--out", "sac"]
    assert "sac: 4 labelled" in said(argv, capsys)
    maps = [name for name in names_in("sac") if name.endswith(".png")]
    write("sac/other_leftImg8bit.png", picture())
    changed = Path("sac", maps[0])
    changed.write_bytes(b"")
    assert "1 anew because their files were changed" in said(argv, capsys)
    packed = zipfile.ZipFile("sac.zip")
    assert sorted(packed.namelist()) == maps
    assert packed.read(changed.name) == changed.read_bytes() != b""
    another_network(network)
    assert "4 anew because the network changed" in said(argv, capsys)


@pytest.mark.parametrize("out", ["cs/leftImg8bit/val/valville", "cs", "cs/leftImg8bit", ".",
                                 "cs/leftImg8bit/val/valville/made", "link"])
def test_submit_refuses_the_folders_of_the_images(model, city, capsys, out):
    shutil.copytree(city, "cs")
    os.symlink("cs/leftImg8bit/val", "link")
    before = contents(".")
    said = refused(["submit", "model", "cs", "--split", "val", "--out", out], capsys)
    assert "folder of the images" in said and contents(".") == before


def test_submit_replaces_no_archive_of_others(model, city, capsys):
    Path("sac.zip").write_text("mine")
    assert "sac.zip: " in refused(
        ["submit", "model", str(city), "--split", "val", "--out", "sac"], capsys)
    assert Path("sac.zip").read_text() == "mine" and not Path("sac").exists()
