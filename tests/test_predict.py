"""Predictions against slow ones and the official script; label maps, videos; commands; memory."""
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings, strategies as st
from PIL import Image

from sac_lit.core import (
    CLASSES, IGNORE_INDEX, NAMES, ConfusionMatrix, UserError, ahead, generator, progress,
    subset_means)
from sac_lit.datasets import open_dataset
from sac_lit.deeplabv2 import build_model, upsample
from sac_lit.predict import (
    evaluate_network, find_inputs, id_values, label_images, label_video, main, overlay, predict,
    probabilities, read_video, score_strips, score_table, video_writer, view_logits)
from sac_lit.toy_city import render, write_dataset
from sac_lit.views import normalize
from sac_lit.weights import save_snapshot

quick = settings(deadline=None, derandomize=True, max_examples=25)


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


# ---------------------------------------------------------------- one image

side = st.integers(1, 90)
ways = st.sampled_from([((1.,), False), ((1.,), True), ((.5, 1.25), False), ((.7, 1.), True)])


@quick
@given(side, side, st.integers(1, 100), ways)
def test_strips_are_the_whole(network, height, width, rows, how):
    image = noise(3, height, width)
    with torch.no_grad(): logits = list(view_logits(network, image, *how))
    full = [upsample(y[None], (height, width))[0].double() for y in logits]
    slow = torch.stack([y.softmax(0) for y in full]).mean(0)
    strips = score_strips(network, image, *how, rows=rows)
    whole = torch.cat([s.softmax(0) for s in strips], 1)
    torch.testing.assert_close(whole.double(), slow, rtol=0, atol=1e-5)
    torch.testing.assert_close(probabilities(network, image, *how), whole, rtol=0, atol=1e-6)
    labels = predict(network, image, *how)
    assert labels.dtype == torch.uint8 and labels.shape == (height, width)
    chosen = slow.gather(0, labels[None].long())[0]
    assert (slow.amax(0) - chosen).max() < 1e-5                # the best class, or one as good


def test_predicts_what_training_evaluates(network):
    "One view at full resolution: arg max of the upsampled logits, as the evaluation in training."
    image = render("target", "test", 0, (96, 192))[0]
    with torch.no_grad(): logits = network(normalize(image[None] / 255))
    best = upsample(logits, (96, 192)).argmax(1)[0]
    assert torch.equal(predict(network, image), best.to(torch.uint8))


def test_mirrored_views_come_back(network):
    image, how = noise(3, 40, 56), ((.8, 1.), True)
    mirrored = probabilities(network, image.flip(-1), *how).flip(-1)
    torch.testing.assert_close(mirrored, probabilities(network, image, *how), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- evaluation

def official(pairs):
    "IoU by name and mean of the official script, for pairs of prediction and label in its ids."
    script = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    args = script.args
    args.evalInstLevelScore, args.JSONOutput, args.quiet = False, False, True
    predictions, labels = zip(*[map(str, pair) for pair in pairs])
    found = script.evaluateImgLists([*predictions], [*labels], args)
    return {name: found["classScores"][name] for name in NAMES}, found["averageScoreClasses"]


def check(cm, scores, mean):
    mine, table = cm.iou().tolist(), score_table(cm).splitlines()
    for name, x, y, line in zip(NAMES, mine, scores.values(), table[1:]):
        assert x == y or (x != x and y != y), name
        assert line.split()[-1] == ("-" if y != y else f"{100 * y:.1f}")
    subsets = {19: NAMES, 16: [n for n in NAMES if n not in ("terrain", "truck", "train")]}
    subsets[13] = [n for n in subsets[16] if n not in ("wall", "fence", "pole")]
    for (count, names), line in zip(subsets.items(), table[-3:]):
        known = [scores[n] for n in names if scores[n] == scores[n]]
        expected = sum(known) / len(known)
        assert len(names) == count
        assert subset_means(cm, NAMES)[count] == pytest.approx(expected, rel=1e-14)
        assert line == f"{f'mean over {count} classes':<24}{f'{100 * expected:.1f}':>8}"
    assert subset_means(cm, NAMES)[19] == pytest.approx(mean, rel=1e-14)


@pytest.mark.parametrize("seed", range(4))
def test_random_maps_score_as_in_the_official_script(seed, tmp_path):
    "Some with classes that never occur, and with labels of all 34 ids of Cityscapes."
    g, ids = generator(seed, "maps"), torch.tensor([c.cityscapes_id for c in CLASSES])
    train_id = torch.full((34,), IGNORE_INDEX)
    train_id[ids] = torch.arange(19)
    cm, pairs, top = ConfusionMatrix(19), [], 19 - 4 * (seed % 2)
    for k in range(3):
        label = torch.randint(34, (40, 50), generator=g)
        pred = torch.randint(top, (40, 50), generator=g)
        likely = (torch.rand(40, 50, generator=g) < .6) & (train_id[label] < top)
        pred = torch.where(likely, train_id[label], pred)
        if seed % 2: label[torch.isin(train_id[label], torch.arange(top, 19))] = 0
        cm.update(pred, train_id[label])
        write(tmp_path / f"pred{k}.png", ids[pred].to(torch.uint8))
        write(tmp_path / f"gt{k}.png", label.to(torch.uint8))
        pairs.append((tmp_path / f"pred{k}.png", tmp_path / f"gt{k}.png"))
    check(cm, *official(pairs))


def test_toy_predictions_score_as_in_the_official_script(network, city, tmp_path):
    data = validation(city)
    made = {p: tmp_path / f"{p.stem}.png" for p in map(Path, data.images)}
    label_images(network, {p: (to, None) for p, to in made.items()}, "cityscapes")
    check(evaluate_network(network, data), *official(zip(made.values(), data.labels)))


def test_other_classes_have_one_mean_and_are_not_mixed_up(city):
    own = build_model("deeplabv2_tiny", 3, names=("water", "bank", "sky"))
    cm = ConfusionMatrix(3).update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
    assert subset_means(cm, own.names) == {3: pytest.approx(.5)}
    assert "sky                            -" in score_table(cm, own.names)
    with pytest.raises(UserError, match="3 classes .water, bank, sky"):
        evaluate_network(own, validation(city))
    shuffled = build_model("deeplabv2_tiny", 19, names=NAMES[::-1])
    with pytest.raises(UserError, match="same order"):
        evaluate_network(shuffled, validation(city))


# ---------------------------------------------------------------- threads

def test_ahead_gives_all_and_stops():
    assert list(ahead(iter(range(50)))) == list(range(50)) and list(ahead([])) == []
    made = []
    reader = ahead(made.append(k) or k for k in range(100))
    assert [next(reader), next(reader)] == [0, 1]
    reader.close()
    assert len(made) <= 5
    with pytest.raises(ValueError): list(ahead(int(x) for x in "12x4"))


def test_bar_only_where_someone_watches(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self): return True

    assert list(progress([1, 2])) == [1, 2]
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert list(progress(iter([1, 2]))) == [1, 2]
    assert list(progress(iter([1, 2]), 2)) == [1, 2] and list(progress(iter([]), 0)) == []


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
    Path("out/2.png.tmp").write_text("left by a crash")
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
        m.setattr("sac_lit.predict.predict", killed)
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


# ---------------------------------------------------------------- the command line

def test_evaluate_command(network, city, capsys):
    network.save_pretrained("runs/toy/model")
    save_snapshot("toy.pth", network)
    capsys.readouterr()
    for model in ("runs/toy/model", "toy.pth"): main(["evaluate", model, str(city)])
    end = "written: evaluation/scores.json, evaluation/confusion.png\n"
    first, second = capsys.readouterr().out.split(end)[:2]
    assert first == second and "mean over 13 classes" in first
    scores = json.loads(Path("evaluation/scores.json").read_text())
    cm = evaluate_network(network, validation(city))
    assert scores["confusion"] == cm.counts.tolist() and scores["images"] == 4
    assert scores["mean"]["16"] == subset_means(cm, NAMES)[16] and scores["model"] == "toy.pth"
    assert Image.open("evaluation/confusion.png").size[0] > 500


def test_evaluate_command_takes_every_layout(network, tmp_path):
    network.save_pretrained("model")
    for layout in ("gta5", "synthia"):
        write_dataset(layout, layout, "source", {"train": 2}, (32, 64))
        main(["evaluate", "model", layout, "--layout", layout, "--out", layout + "-scores"])
    for k in range(2):
        image, label = render("source", "x", k, (32, 64))
        write(f"own/images/{k}.png", image.permute(1, 2, 0))
        write(f"own/labels/{k}.png", label)
    Path("classes.txt").write_text("\n".join(NAMES))
    main(["evaluate", "model", "own/images", "--layout", "folder", "--labels", "own/labels",
          "--classes", "classes.txt", "--flip", "--scales", "0.5", "1"])
    assert json.loads(Path("evaluation/scores.json").read_text())["scales"] == [.5, 1]


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


@pytest.mark.parametrize("argv, words", [
    (["evaluate", "none", "city"], "none: no such folder"),
    (["evaluate", "model", "nowhere"], "nowhere: no such folder"),
    (["evaluate", "model", "city", "--scales", "0"], "--scales"),
    (["evaluate", "model", "city", "--layout", "folder"], "--labels"),
    (["evaluate", "model", "city", "--layout", "kitti"], "--layout kitti"),
    (["label", "model"], "no images"),
    (["label", "model", "none"], "none: no such file"),
    (["label", "own", "city", "--ids", "cityscapes"], "no ids"),
    (["submit", "own", "city", "--split", "val"], "no ids"),
    (["export", "model", "net.txt"], ".onnx or .pt2"),
    (["label", "model", "city", "--which", "momentum"], "--which momentum")])
def test_mistakes_get_one_sentence(argv, words, network, city, capsys):
    network.save_pretrained("model")
    build_model("deeplabv2_tiny", 2, names=("land", "sea")).save_pretrained("own")
    Path("city").symlink_to(city)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop: main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.startswith("error: ") and words in err
    assert err.count("\n") == 1 and not out


# ---------------------------------------------------------------- memory

MEASURE = r"""
import re, sys, torch
from sac_lit.predict import predict
from sac_lit.deeplabv2 import build_model
torch.set_num_threads(1)
model = build_model(sys.argv[1], 19).eval()
labels = predict(model, torch.zeros(3, 1024, 2048, dtype=torch.uint8), *eval(sys.argv[2]))
assert labels.shape == (1024, 2048)
print(int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) / 2 ** 20)
"""
once = ((1.,), False)


@pytest.mark.parametrize("arch, how", [
    ("deeplabv2_tiny", once),
    pytest.param("deeplabv2_resnet101", once, marks=pytest.mark.slow),
    pytest.param("deeplabv2_tiny", ((.75, 1., 1.25), True), marks=pytest.mark.slow)])
def test_a_large_frame_fits_into_4_gigabytes(arch, how):
    "By the process's own high-water mark; that of getrusage counts its parent before the start."
    if not Path("/proc/self/status").exists(): pytest.skip("needs /proc")
    command = [sys.executable, "-c", MEASURE, arch, repr(how)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < (1.5 if arch == "deeplabv2_tiny" else 4), done.stdout
