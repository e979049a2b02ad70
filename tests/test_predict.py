"""Predictions against slow ones and the official script; the command line; memory."""
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sac_lit.core import (
    ahead,
    CLASSES,
    ConfusionMatrix,
    generator,
    IGNORE_INDEX,
    NAMES,
    progress,
    subset_means,
    UserError,
)
from sac_lit.datasets import open_dataset
from sac_lit.deeplabv2 import build_model, upsample
from sac_lit.label import label_images
from sac_lit.outputs import Outputs, RECORD
from sac_lit.predict import (
    evaluate_network,
    main,
    MOST_PIXELS,
    predict,
    predict_with_confidence,
    probabilities,
    score_strips,
    score_table,
    view_logits,
)
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
    same, confidence = predict_with_confidence(network, image, *how)
    assert torch.equal(same, labels)
    torch.testing.assert_close(confidence.double(), slow.amax(0), rtol=0, atol=1e-5)


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


GOOD = noise(3, 8, 12)
NO_IMAGES = {
    "0 to 1": GOOD / 255, "float16": GOOD.half(), "int64": GOOD.long(), "bool": GOOD > 9,
    "channels last": GOOD.permute(1, 2, 0), "grey": GOOD[0], "one channel": GOOD[:1],
    "four": GOOD[[0, 1, 2, 0]], "a batch": GOOD[None], "empty": GOOD[:, :0],
    "array": GOOD.numpy(), "picture": Image.fromarray(GOOD.permute(1, 2, 0).numpy()),
    "path": "a.png", "list": [GOOD], "nothing": None}


@pytest.mark.parametrize("kind", NO_IMAGES)
@pytest.mark.parametrize("how", [predict, predict_with_confidence, probabilities])
def test_an_image_is_one_kind_of_thing(network, kind, how):
    with pytest.raises(TypeError, match=r"^image: .* uint8 tensor \(3, H, W\)"):
        how(network, NO_IMAGES[kind])


def test_views_of_absurd_size_are_refused(network, monkeypatch):
    image = torch.zeros(1, dtype=torch.uint8).expand(3, 9000, 9000)
    with pytest.raises(UserError, match="9000 x 9000 pixels at scale 1: .*smaller --scales"):
        predict(network, image)
    assert MOST_PIXELS < 9000 ** 2
    with pytest.raises(UserError, match="at scale 8"): predict(network, image[:, :1500], (8.,))

    def no_room(*args): raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr("sac_lit.predict.network_input", no_room)
    with pytest.raises(UserError, match="not enough memory"): predict(network, GOOD)


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
    jobs = {p: {"labels": to} for p, to in made.items()}
    label_images(network, jobs, Outputs(tmp_path), "cityscapes")
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


@pytest.mark.parametrize("argv, words", [
    (["evaluate", "none", "city"], "none: no such folder"),
    (["evaluate", "model", "nowhere"], "nowhere: no such folder"),
    (["evaluate", "model", "city", "--scales", "0"], "--scales"),
    (["evaluate", "model", "city", "--scales", "1", "nan"], "--scales nan"),
    (["submit", "none", "city", "--scales", "inf"], "--scales inf"),    # before all else
    (["label", "none", "city", "--scales", "1e9"], "--scales 1000000000.0"),
    (["label", "none", "city", "--scales", "-1"], "--scales -1"),
    (["label", "none", "city", "--scales", "8.01"], "0.05 to 8"),
    (["label", "none", "city", "--scales", "0.049"], "0.05 to 8"),
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


@pytest.mark.parametrize("name", ["scores.json", "confusion.png", RECORD])
def test_evaluate_replaces_nothing_of_others(network, city, capsys, name):
    network.save_pretrained("model")
    Path("own").mkdir()
    Path("own", name).write_text("mine")
    with pytest.raises(SystemExit): main(["evaluate", "model", str(city), "--out", "own"])
    err = capsys.readouterr().err
    assert err.startswith(f"error: own/{name}: ") and err.count("\n") == 1
    assert [p.name for p in Path("own").iterdir()] == [name]
    assert Path("own", name).read_text() == "mine"


def test_evaluate_keeps_scores_that_somebody_changed(network, city):
    network.save_pretrained("model")
    main(["evaluate", "model", str(city)])
    Path("evaluation/scores.json").write_text("my notes")
    main(["evaluate", "model", str(city)])
    assert Path("evaluation/scores.json.changed").read_text() == "my notes"
    assert json.loads(Path("evaluation/scores.json").read_text())["images"] == 4


@pytest.mark.parametrize("size, words", [(None, "at its own size"), ((32, 64), "64 x 32 pixels")])
def test_evaluate_says_at_what_size_it_looked(network, city, capsys, size, words):
    own = build_model("deeplabv2_tiny", 19)
    own.set_inference_size(size)
    own.save_pretrained("model")
    main(["evaluate", "model", str(city), "--scales", "0.5", "1", "--flip"])
    assert f"{words}" in capsys.readouterr().out
    found = json.loads(Path("evaluation/scores.json").read_text())["inference_size"]
    assert found == (size and [*size])


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
