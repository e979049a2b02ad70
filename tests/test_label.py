"""Label maps of images and videos, archives for the test server, and their commands."""
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

from sac_lit.core import ASIDE, CLASSES, fingerprint, generator, UserError
from sac_lit.datasets import open_dataset
from sac_lit.deeplabv2 import build_model
from sac_lit.label import (
    find_inputs,
    id_values,
    label_images,
    label_video,
    overlay,
    read_video,
    video_writer,
)
from sac_lit.predict import main, predict
from sac_lit.toy_city import write_dataset
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
    jobs = {Path(p): (Path("out", p).with_suffix(".png"), Path("over", p).with_suffix(".jpg"))
            for p in ("in/a.png", "in/sub/b.jpg", "in/grey.bmp")}
    assert label_images(network, jobs, "cityscapes") == 3
    for source, (to, over) in jobs.items():
        image = torch.from_numpy(np.array(Image.open(source).convert("RGB"))).permute(2, 0, 1)
        made = read(to)
        assert made.dtype == np.uint8 and Image.open(to).mode == "L"
        assert (made == id_values("cityscapes")[predict(network, image)]).all()
        assert Image.open(over).size == Image.open(source).size
    labels = predict(network, image)
    color = np.array(CLASSES[labels[0, 0]].color)
    assert (overlay(image, labels)[0, 0] == image[:, 0, 0].numpy() // 2 + color // 2).all()


def some_jobs(count):
    "Images on disk, and where their label maps go."
    for k in range(count): write(f"in/{k}.png", picture(k))
    return {Path(f"in/{k}.png"): (Path(f"out/{k}.png"), None) for k in range(count)}


def test_what_is_there_is_skipped(network):
    jobs = some_jobs(3)
    assert label_images(network, jobs) == 3
    kept = times("out")
    Path("out/1.png").unlink()
    left = Path("out") / ASIDE.replace("*", fingerprint("2.png"))
    left.write_text("left by a crash")
    assert label_images(network, jobs) == 1
    same = [p.stat().st_mtime_ns == t for p, t in sorted(kept.items())]
    assert same == [True, False, True]
    with_overlays = {p: (to, to.with_suffix(".jpg")) for p, (to, _) in jobs.items()}
    assert label_images(network, with_overlays) == 3           # asked for later


def test_an_interrupted_run_leaves_whole_files(network, monkeypatch):
    jobs, seen = some_jobs(6), []

    def killed(*args):
        seen.append(args)
        if len(seen) == 4: raise KeyboardInterrupt
        return predict(*args)

    with monkeypatch.context() as m:
        m.setattr("sac_lit.label.predict", killed)
        with pytest.raises(KeyboardInterrupt): label_images(network, jobs)
    assert names_in("out") == ["0.png", "1.png", "2.png"]
    assert label_images(network, jobs) == 3


def test_unreadable_images_are_named_in_the_end(network):
    jobs = some_jobs(3)
    data = Path("in/0.png").read_bytes()
    Path("in/1.png").write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError, match="1 of 3 images left out: in/1.png: is damaged"):
        label_images(network, jobs)
    assert names_in("out") == ["0.png", "2.png"]


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


def test_video_is_labelled_frame_by_frame(network, video):
    path, made = video("drive.mp4"), (Path("out/drive"), Path("over/drive.mp4"))
    assert label_video(network, path, *made, "cityscapes") == 40
    images = list(read_video(path))
    assert len(images) == 40 and images[0].shape == (3, 48, 64)
    for k in (0, 17, 39):
        expected = id_values("cityscapes")[predict(network, images[k])]
        assert (read(f"out/drive/{k:06}.png") == expected).all()
    tinted = list(read_video(made[1]))
    assert len(tinted) == 40 and tinted[0].shape == (3, 48, 64)
    assert label_video(network, path, *made) == 0
    assert names_in("over") == ["drive.mp4"]


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
    assert label_video(network, Path("odd.avi"), Path("out"), Path("odd.mp4")) == 3
    assert read("out/000002.png").shape == (35, 51)
    assert next(read_video(Path("odd.mp4"))).shape == (3, 34, 50)


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
    path, partial = video(name), Path("over.partial.mp4")
    whole, made = path.read_bytes(), (Path("out"), Path("over.mp4"))
    path.write_bytes(whole[:len(whole) * 6 // 10])
    with pytest.raises(UserError, match=f"{name}: breaks off after frame [12][0-9] of 40"):
        label_video(network, path, *made)
    kept = times("out")
    assert 5 < len(kept) < 30 and len(list(read_video(partial))) == len(kept)
    assert not Path("over.mp4").exists()
    path.write_bytes(whole)                    # the whole file arrives: only the rest is labelled
    assert label_video(network, path, *made) == 40 and len(names_in("out")) == 40
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items()) and not partial.exists()


def test_a_damaged_video_and_a_file_that_is_none(network, video):
    path = video("drive.mp4")
    data = path.read_bytes()
    n = len(data)
    path.write_bytes(data[:n // 2] + bytes(n // 4) + data[n * 3 // 4:])
    with pytest.raises(UserError, match="breaks off after frame"):
        label_video(network, path, Path("out"), Path("over.mp4"))
    Path("none.mp4").write_text("not a video")
    with pytest.raises(UserError, match="none.mp4: cannot be read as a video"):
        label_video(network, Path("none.mp4"), Path("none"), Path("none-over.mp4"))
    with pytest.raises(UserError, match="absent.mp4"): list(read_video(Path("absent.mp4")))


def test_pyav_is_named_where_it_is_not_installed(monkeypatch, network):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"av is not installed.*sac_lit\[video\]"):
        label_video(network, Path("a.mp4"), Path("a"), Path("b.mp4"))
    assert not list(Path().iterdir())


# ---------------------------------------------------------------- the commands

DONE = ("labelled: 2 of 2 images labelled\n"
        "labelled: 40 frames of in/sub/v.mp4 labelled\n")
DONE_BEFORE = ("labelled: already there, 0 of 2 images labelled\n"
               "labelled: already there, 0 frames of in/sub/v.mp4 labelled\n")


def refused(argv, capsys):
    "What a command says on its way out."
    with pytest.raises(SystemExit) as stop: main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_label_command(network, video, capsys):
    save_snapshot("toy.pth", network)
    write("in/a.png", picture(1))
    write("in/sub/b.jpg", picture(2))
    video("in/sub/v.mp4")
    for expected in (DONE, DONE_BEFORE):
        main(["label", "toy.pth", "in", "--overlay"])
        assert capsys.readouterr().out == expected
    made = {p.as_posix() for p in Path("labelled").rglob("*.*") if "v/" not in p.as_posix()}
    assert made == {f"labelled/{p}" for p in (
        "options.json", "labels/a.png", "labels/sub/b.png",
        "overlays/a.jpg", "overlays/sub/b.jpg", "overlays/sub/v.mp4")}
    words = "labelled: holds label maps made with other options (ids train there, cityscapes here)"
    assert words in refused(["label", "toy.pth", "in", "--ids", "cityscapes"], capsys)
    Path("in/c.png").write_text("none")
    write("in/d.png", picture(4))
    assert "1 of 2 images left out: in/c.png" in refused(["label", "toy.pth", "in"], capsys)
    assert Path("labelled/labels/d.png").exists()


def test_label_maps_of_another_network_are_not_mixed_in(network, capsys):
    "Of the same name, as after a training anew; and a note that is damaged."
    write("in/a.png", picture(1))
    save_snapshot("toy.pth", network)
    main(["label", "toy.pth", "in"])
    save_snapshot("toy.pth", build_model("deeplabv2_tiny", 19))
    words = "labelled: holds label maps made with other options (weights "
    assert words in refused(["label", "toy.pth", "in"], capsys)
    for text in ("{", "[]"):
        Path("labelled/options.json").write_text(text)
        said = refused(["label", "toy.pth", "in"], capsys)
        assert said.startswith("error: labelled/options.json: damaged") and said.count("\n") == 1


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
